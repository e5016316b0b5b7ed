"""What curl sends, with and without its options: the client that everybody has at hand."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.process import Running
from tests.e2e.test_triton import example, png, scores
from tests.serving import MODEL, rows

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: list[str]
    """Lines, with those of answers that came before (100 Continue), in lower case."""
    body: bytes
    uploaded: int
    """Bytes of the body that were sent."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Curl = Callable[..., Reply]

QUIETLY = (
    "--silent", "--show-error", "--noproxy", "*", "--max-time", "60",
    "--dump-header", "headers", "--output", "body", "--write-out", "%{http_code} %{size_upload}",
)  # fmt: skip


@pytest.fixture
def curl(server: Running, tmp_path: Path) -> Curl:
    """Runs curl on a path of the server."""

    def run(path: str, *options: str, body: bytes = b"") -> Reply:
        told = subprocess.run(
            ["curl", *QUIETLY, *options, server.url + path],
            input=body,
            capture_output=True,
            cwd=tmp_path,
            check=True,
        )
        status, uploaded = map(int, told.stdout.split())
        headers = (tmp_path / "headers").read_text().lower().splitlines()
        return Reply(status, headers, (tmp_path / "body").read_bytes(), uploaded)

    return run


@pytest.fixture
def stream(server: Running) -> Any:
    """The path that predicts for a new stream."""
    assert server.http.put("/v1/streams/curl").status_code == 201
    yield "/v1/streams/curl/predict"
    assert server.http.delete("/v1/streams/curl").status_code == 204


SEND = ("--data-binary", "@-")
INFER = f"/v2/models/{MODEL}/infer"


def infer_body(count: int) -> bytes:
    x = rows(count)
    data = {"name": "input", "shape": list(x.shape), "datatype": "FP32", "data": x.tolist()}
    return json.dumps({"inputs": [data]}).encode()


@pytest.mark.parametrize("header", ["Content-Type:", "Content-Type: text/plain", "Accept: */*"])
def test_the_content_type_is_not_asked_for(curl: Curl, header: str) -> None:
    """The last sends curl's own, that of a form."""
    reply = curl(INFER, *SEND, "--header", header, body=infer_body(3))
    assert reply.status == 200
    logits = next(one for one in reply.json["outputs"] if one["name"] == "logits")
    np.testing.assert_allclose(logits["data"], scores(rows(3))["logits"].flatten(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [(), ("--http1.0",), ("--http2",)], ids=str)
@pytest.mark.parametrize("path", ["/v2", "/v2/"])
def test_metadata_with_and_without_a_slash(curl: Curl, path: str, options: tuple[str, ...]) -> None:
    reply = curl(path, *options)
    assert (reply.status, reply.json["name"]) == (200, "tta-server")


def test_a_big_body_waits_for_its_100_continue(curl: Curl, stream: str) -> None:
    x = rows(500).double().numpy()
    options = (*SEND, "--header", "Expect: 100-continue", "--expect100-timeout", "60")
    reply = curl(f"{stream}?datatype=FP64", *options, body=x.tobytes())
    assert reply.headers[0] == "http/1.1 100 continue"
    assert (reply.status, reply.uploaded) == (200, x.nbytes)
    assert len(reply.json["classes"]) == 500


@pytest.mark.parametrize("path", [INFER, "/v1/streams/nobody/predict", "/v3"])
def test_a_refusal_comes_before_a_body_that_waits(curl: Curl, path: str) -> None:
    options = (*SEND, "--header", "Expect: 100-continue", "--expect100-timeout", "60")
    reply = curl(path, *options, body=bytes(2_000_000))
    assert reply.status == (413 if path == INFER else 404)
    assert reply.uploaded == 0
    assert list(reply.json) == ["error"]


@pytest.mark.parametrize("options", [(), ("--header", "Connection: close"), ("--http1.0",)], ids=str)
def test_a_refusal_reaches_a_client_that_sends_all_before_it_reads(curl: Curl, options: tuple[str, ...]) -> None:
    reply = curl(INFER, *SEND, "--header", "Expect:", *options, body=bytes(20_000_000))
    assert (reply.status, list(reply.json)) == (413, ["error"])


def test_a_chunked_body(curl: Curl, stream: str) -> None:
    body = json.dumps({"inputs": rows(20).tolist()}).encode()
    reply = curl(stream, *SEND, "--header", "Transfer-Encoding: chunked", body=body)
    assert (reply.status, len(reply.json["classes"])) == (200, 20)
    reply = curl(stream, *SEND, "--header", "Transfer-Encoding: chunked", body=bytes(2_000_000))
    assert (reply.status, "limits.body_bytes = 900000" in reply.json["error"]) == (413, True)


def test_compressed_answers(curl: Curl) -> None:
    body = infer_body(60)
    plain, packed = curl(INFER, *SEND, body=body), curl(INFER, *SEND, "--compressed", body=body)
    assert "content-encoding: gzip" in packed.headers
    assert "vary: accept-encoding" in packed.headers
    assert not any("content-encoding" in line for line in plain.headers)
    assert plain.json["outputs"] == packed.json["outputs"]


def test_images_as_files(curl: Curl, stream: str, tmp_path: Path) -> None:
    """One as the body, several as a form."""
    pixels, x = example("UINT8")
    for number, one in enumerate(pixels[:2]):
        (tmp_path / f"{number}.png").write_bytes(png(one))
    alone = curl(f"{stream}?adapt=false&output=logits", "--data-binary", "@1.png")
    form = ("--form", "a=@0.png", "--form", "b=@1.png;type=image/png")
    both = curl(f"{stream}?adapt=false&output=logits", *form)
    expected = scores(x[:2])["logits"]
    np.testing.assert_allclose(alone.json["logits"], expected[1:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(both.json["logits"], expected, rtol=1e-4, atol=1e-5)


def test_an_npy_file(curl: Curl, stream: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows(5).numpy())
    reply = curl(f"{stream}?adapt=false&output=logits", "--upload-file", "x.npy", "--request", "POST")
    np.testing.assert_allclose(reply.json["logits"], scores(rows(5))["logits"], rtol=1e-4, atol=1e-5)
