"""Who gets past a route: every route asks for a token, unless it says that it is public."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute

from tta_server.errors import Unauthenticated
from tta_server.service import Service
from tta_server.settings import Right
from tta_server.tenant import Tenant

E = TypeVar("E", bound=Callable[..., object])


def public(endpoint: E) -> E:
    """Marks an endpoint that needs no token."""
    endpoint.is_public = True  # type: ignore[attr-defined]
    return endpoint


def needs(right: Right) -> Callable[[E], E]:
    """Marks an endpoint that needs a token with ``right``; one without a mark needs any token."""

    def mark(endpoint: E) -> E:
        endpoint.right = right  # type: ignore[attr-defined]
        return endpoint

    return mark


def guarded(service: Service) -> type[APIRoute]:
    """The class of all routes: checks the token, counts the tenant's calls, and leaves the tenant for the endpoint."""

    class GuardedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            declared, endpoint = self.dependant, self.endpoint
            more = (declared.query_params, declared.header_params, declared.cookie_params, declared.body_params)
            handle = super().get_route_handler() if any((*more, declared.dependencies)) else _call_with_path(endpoint)
            right: Right | None = getattr(endpoint, "right", None)
            if hasattr(endpoint, "is_public"):
                return handle

            async def guard(request: Request) -> Response:
                grant = service.access.grant(None if service.access.open else _token(request))
                if right is not None:
                    grant.check(right)
                with service.access.call(grant.tenant), service.room.hold() as take:
                    request.scope["take_room"] = take
                    request.state.tenant = service.tenant(grant.tenant)
                    return await handle(request)

            return guard

    return GuardedRoute


def _call_with_path(endpoint: Callable[..., Any]) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    """Calls an endpoint that takes some of the path's parameters, all texts, and perhaps the request.

    It has nothing for the framework to validate, which would take as long as a small prediction does otherwise.
    """
    takes = inspect.signature(endpoint).parameters

    async def handle(request: Request) -> Response:
        there = {**request.path_params, "request": request}
        response: Response = await endpoint(**{name: there[name] for name in takes})
        return response

    return handle


def tenant_of(request: Request) -> Tenant:
    """Who asks."""
    tenant: Tenant = request.state.tenant
    return tenant


def _token(request: Request) -> str | None:
    header = request.headers.get("authorization")
    if header is None:
        return None
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthenticated("the Authorization header must be 'Bearer <token>'")
    return token.strip()
