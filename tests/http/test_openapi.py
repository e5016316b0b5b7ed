"""The OpenAPI document: complete, true to what is answered, and a source of requests that nobody would think of."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy
from pydantic import TypeAdapter
from schemathesis import Case, GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.python.asgi import shutdown_lifespans
from schemathesis.specs.openapi.schemas import OpenApiSchema

from tests.http.conftest import Loaded, Server, infer_body, routes_of
from tests.serving import MODEL, rows
from tta_server.app import create_app
from tta_server.http import schemas, schemas_v2
from tta_server.http.problems import STATUS

pytestmark = pytest.mark.anyio

HIDDEN = {
    "/", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/v2/", "/v2/systemsharedmemory/{rest:path}",
    "/v2/cudasharedmemory/{rest:path}", "/v2/trace/setting", "/v2/logging", "/v2/models/{name}/trace/setting",
}  # fmt: skip
"""What is not documented: pages of the framework, a second spelling, and what is not offered."""


def references(part: Any) -> list[str]:
    """Every ``$ref`` in a document."""
    if isinstance(part, dict):
        own = [part["$ref"]] if isinstance(part.get("$ref"), str) else []
        return own + [one for value in part.values() for one in references(value)]
    return [one for value in part for one in references(value)] if isinstance(part, list) else []


async def test_every_reference_resolves(server: Server) -> None:
    document = await server.json("GET", "/openapi.json")
    found = set(references(document))
    assert len(found) > 3
    for reference in found:
        target: Any = document
        assert reference.startswith("#/")
        for part in reference[2:].split("/"):
            assert part in target, f"{reference} leads nowhere"
            target = target[part]


async def test_every_route_is_documented(server: Server) -> None:
    document = await server.json("GET", "/openapi.json")
    documented = {(method.upper(), path) for path, one in document["paths"].items() for method in one}
    assert documented == {(method, path) for method, path in routes_of(server.app) if path not in HIDDEN}
    assert {path for _, path in routes_of(server.app)} >= HIDDEN


async def test_operations_say_what_they_take_and_give(server: Server) -> None:
    document = await server.json("GET", "/openapi.json")
    assert document["openapi"].startswith("3.")
    identifiers = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            declared = {one["name"] for one in operation.get("parameters", []) if one["in"] == "path"}
            assert set(re.findall(r"{(\w+)}", path)) == declared, (method, path)
            assert operation["summary"]
            identifiers.append(operation["operationId"])
            if path != "/metrics":
                for status in ("4XX", "5XX"):
                    schema = operation["responses"][status]["content"]["application/json"]["schema"]
                    assert schema["$ref"].endswith("/Problem")
    assert len(set(identifiers)) == len(identifiers)
    assert "422" not in json.dumps(document)
    assert not {"HTTPValidationError", "ValidationError"} & document["components"]["schemas"].keys()
    assert document["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}


@pytest.mark.parametrize("path", ["/v1/streams", "/v1/streams/{id}/predict"])
async def test_the_known_query_parameters_are_the_documented_ones(server: Server, path: str) -> None:
    operations = (await server.json("GET", "/openapi.json"))["paths"][path]
    (method,) = operations
    documented = {one["name"] for one in operations[method]["parameters"] if one["in"] == "query"}
    await server.open("s")
    text = (await server.json(method, path.format(id="s"), 400, params={"x": 1}))["error"]
    assert set(text.partition("there are: ")[2].split(", ")) == documented


async def test_every_answer_fits_its_documented_schema(server: Server) -> None:
    """Each route that answers JSON is called; its answer has what its model says, and nothing else at any depth."""
    loaded = server.service.models._models
    refused = {"name": "norm", "runs": False, "reason": "not on this one"}
    loaded[MODEL] = replace(loaded[MODEL], reports={**loaded[MODEL].reports, "norm": refused})
    document = await server.json("GET", "/openapi.json")
    for id in ("s", "t"):
        await server.open(id)
    x = rows(2)
    await server.json("POST", "/v1/streams/s/snapshots", 201, json={"name": "a"})
    file = (await server.client.get("/v1/streams/s/state")).content
    classification = infer_body(x, outputs=["logits"])
    classification["outputs"][0]["parameters"] = {"classification": 2}
    guard = {"enabled": True, "guarantee": {"kind": "audit", "q": 1.0}}
    await server.json("PATCH", "/v1/streams/s", json={"guard": guard})
    asked = (await server.predict("s", x))["request"]
    calls: dict[tuple[str, str], dict[str, Any]] = {
        ("post", "/v1/streams/{id}/labels"): {"json": {"request": asked, "labels": [0, 1]}},
        ("post", "/v1/streams/{id}/guard"): {"json": {"state": "canary"}},
        ("patch", "/v1/streams/{id}"): {"json": {"adapt": True}},
        ("get", "/v1/streams"): {"params": {"limit": 1}},
        ("post", "/v1/streams/{id}/rollback"): {"json": {"snapshot": "a"}},
        ("put", "/v1/streams/{id}/state"): {"content": file},
        ("post", "/v1/streams/{id}/predict"): {
            "json": {"inputs": x.tolist()}, "params": {"top_k": 2, "output": "logits"},
        },
        ("post", "/v2/models/{name}/infer"): {"json": classification | {"id": "7"}},
        ("post", "/v2/models/{name}/versions/{version}/infer"): {
            "json": infer_body(x, sequence_id="t", sequence_start=True)
        },
    }  # fmt: skip
    called = set()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            content = operation["responses"].get("200", {}).get("content", {}).get("application/json")
            if content is None:
                continue
            schema = content["schema"]
            many = schema.get("type") == "array"
            name = (schema["items"] if many else schema)["$ref"].rpartition("/")[2]
            kind: Any = getattr(schemas if hasattr(schemas, name) else schemas_v2, name)
            adapter: TypeAdapter[Any] = TypeAdapter(list[kind] if many else kind)
            target = path.format(id="s", name="tent" if "policies" in path else MODEL, version="1")
            answer = await server.json(method.upper(), target, **calls.get((method, path), {}))
            read = adapter.validate_python(answer)
            assert adapter.dump_python(read, mode="json", exclude_unset=True, by_alias=True) == answer, (method, path)
            called.add((method, path))
    assert calls.keys() <= called
    without_json = {"/metrics", "/metrics/streams", "/v1/events", "/v1/live"} | {
        "/v2/repository/models/{name}/load", "/v2/repository/models/{name}/unload",
        "/v1/streams/{id}/snapshots/{name}", "/v1/streams/{id}/fork",
    }  # fmt: skip
    assert {path for _, path in called} == document["paths"].keys() - without_json


async def test_the_documentation_page_is_served(server: Server) -> None:
    response = await server.client.get("/docs")
    assert response.status_code == 200
    assert "openapi.json" in response.text


# Requests made up from the document

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "8"))
"""Per operation and way. ``make fuzz`` asks for many more."""
FILE = "application/octet-stream"
KNOWN = {"name": MODEL, "id": "s", "version": "1"}
"""Names that mean something, which no chance would hit upon."""


@pytest.fixture
def documented(loaded: Loaded) -> Iterator[OpenApiSchema]:
    """The document of a running application."""
    document: Any = schemathesis.openapi.from_asgi("/openapi.json", create_app(*loaded))
    yield document.exclude(path=["/v1/events", "/v1/live"])  # which have no end
    shutdown_lifespans()


def made_up(operation: Any) -> Iterator[SearchStrategy[Case[Any]]]:
    """Requests that fit the document and ones that do not, about things that are there and ones that are not."""
    known: dict[str, str] = {one.name: KNOWN[one.name] for one in operation.path_parameters}
    for mode in GenerationMode:
        # Every text fits as a name in a path, and any bytes as a file.
        if mode.is_positive or operation.query or any(one.media_type != FILE for one in operation.body):
            yield operation.as_strategy(mode)
            # A model is not loaded again and again, and stays loaded.
            if known and "/repository/" not in operation.path:
                yield operation.as_strategy(mode, path_parameters=known)


def check(case: Case[Any]) -> None:
    """Sends a request, and looks at what comes back."""
    response = case.call()
    case.validate_response(response, checks=CHECKS)
    if response.status_code >= 400:
        assert response.status_code in {*STATUS.values(), 405}
        content = response.json()
        assert content.keys() == {"error"}
        assert isinstance(content["error"], str)


def test_made_up_requests(documented: OpenApiSchema, subtests: pytest.Subtests) -> None:
    bounded = settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )  # fmt: skip
    for result in documented.get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr]  # every operation is valid, or this raises
        for requests in made_up(operation):
            with subtests.test(operation.label):
                bounded(given(requests)(check))()
