"""One server process for all tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.process import Running, started

CONCURRENT = 8
"""Calls that the server takes at the same time."""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with small limits on size and number, and long ones on time: nothing depends on how fast this is."""
    limits = {
        "body_bytes": 900_000, "inflated_bytes": 8 * 2**20, "header_bytes": 16 * 2**10, "queue_per_stream": 4,
    }  # fmt: skip
    auth = {"tenants": {"default": {"concurrent": CONCURRENT}}}
    with started(tmp_path_factory.mktemp("server"), limits=limits, auth=auth) as running:
        yield running


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"
