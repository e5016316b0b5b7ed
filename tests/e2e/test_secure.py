"""A server for others: TLS, certificates of clients, tokens, tenants, and metrics on an address of their own."""

from __future__ import annotations

import hashlib
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.e2e.process import Running, started
from tests.e2e.test_triton import scores, some, tensor
from tests.serving import MODEL, TIMEOUT, rows

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
SELF_SIGNED = (
    "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
    "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1",
)  # fmt: skip


@dataclass(frozen=True)
class Secured:
    """A server, and what it takes to speak to it."""

    server: Running
    certificate: str
    """Signed by itself; it is the server's, and the one client's that the server lets in."""
    key: str
    tokens: dict[str, str]
    """By who has them."""

    def context(self, own: bool = True) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=self.certificate)
        if own:
            made.load_cert_chain(self.certificate, self.key)
        return made

    def ask(self, who: str, method: str, path: str, **content: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.tokens[who]}"}
        return self.server.http.request(method, path, headers=headers, **content)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    certificate, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(
        ["openssl", "req", *SELF_SIGNED, "-keyout", key, "-out", certificate], capture_output=True, check=True
    )
    tokens = {who: f"the-token-of-{who}-in-plain" for who in ("ann", "bob", "ops")}
    entries: list[dict[str, Any]] = [
        {"sha256": hashlib.sha256(tokens["ann"].encode()).hexdigest(), "tenant": "ann"},
        {"token": tokens["bob"], "tenant": "bob", "rights": ["predict"]},
        {"token": tokens["ops"], "tenant": "ops", "rights": ["metrics", "admin"]},
    ]
    made = ssl.create_default_context(cafile=certificate)
    made.load_cert_chain(certificate, key)
    with started(
        folder,
        context=made,
        server={
            "tls": {"certificate": "cert.pem", "key": "key.pem", "client_ca": "cert.pem"},
            "metrics": {"port": 0},
        },
        auth={"tokens": entries},
        streams={"unknown_id": "refuse"},
    ) as running:
        yield Secured(running, certificate, key, tokens)
        running.process.terminate()
        assert running.process.wait(TIMEOUT) == 0


@needs_openssl
def test_the_stock_client_over_tls_with_a_token(secured: Secured) -> None:
    with triton.InferenceServerClient(
        f"127.0.0.1:{secured.server.port}", ssl=True, ssl_context_factory=secured.context
    ) as client:
        assert client.is_server_ready(), "health needs no token"
        ann = {"Authorization": f"Bearer {secured.tokens['ann']}"}
        result = client.infer(MODEL, tensor(rows(3).numpy()), headers=ann)
        np.testing.assert_allclose(result.as_numpy("logits"), scores(rows(3))["logits"], rtol=1e-4, atol=1e-5)
        for headers, status, said in (
            (None, "401", "send the header 'Authorization: Bearer <token>'"),
            ({"Authorization": "Bearer nobodys-token-at-all"}, "401", "nobody has this token"),
            ({"Authorization": f"Bearer {secured.tokens['ops']}"}, "403", "does not have the right predict"),
            (ann, "404", "no stream 's'"),
        ):
            with pytest.raises(InferenceServerException) as caught:
                client.infer(MODEL, some(), headers=headers, sequence_id="s")
            assert caught.value.status() == status
            assert said in caught.value.message()
        client.infer(MODEL, some(), headers=ann, sequence_id="s", sequence_start=True)
        bob = {"Authorization": f"Bearer {secured.tokens['bob']}"}
        with pytest.raises(InferenceServerException) as caught:
            client.infer(MODEL, some(), headers=bob, sequence_id="s")
        assert (caught.value.status(), "no stream 's'" in caught.value.message()) == ("404", True), "it is another's"
        client.infer(MODEL, some(), headers=ann, sequence_id="s", sequence_end=True)


@needs_openssl
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_with_a_token_and_a_certificate(secured: Secured) -> None:
    def curl(*options: str) -> subprocess.CompletedProcess[str]:
        quietly = ("--silent", "--show-error", "--noproxy", "*", "--max-time", "60", "--cacert", secured.certificate)
        return subprocess.run(
            ["curl", *quietly, *options, f"{secured.server.url}/v1/models"],
            capture_output=True,
            text=True,
            check=False,
        )

    own = ("--cert", secured.certificate, "--key", secured.key)
    token = ("--oauth2-bearer", secured.tokens["ann"])
    assert f'"name":"{MODEL}"' in curl(*own, *token).stdout
    assert '"error":"a token is needed' in curl(*own).stdout
    assert curl(*token).returncode != 0, "without a certificate of its own"


@needs_openssl
def test_who_is_not_let_in(secured: Secured) -> None:
    with (
        httpx.Client(verify=secured.context(own=False), base_url=secured.server.url) as client,
        pytest.raises(httpx.TransportError),
    ):
        client.get("/v2/health/live")
    with secured.server.connect() as connection:
        connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: test\r\n\r\n")
        try:
            said = connection.recv(100)
        except ConnectionResetError:
            said = b""
    assert b"HTTP" not in said, "nothing is said in the clear"
    assert secured.server.is_ready()


@needs_openssl
def test_metrics_have_an_address_of_their_own(secured: Secured) -> None:
    main, metrics = secured.server.ports
    assert main != metrics
    apart = f"https://127.0.0.1:{metrics}"
    assert secured.ask("ops", "GET", "/metrics").status_code == 404
    reply = secured.ask("ops", "GET", f"{apart}/metrics")
    assert reply.status_code == 200
    assert "\ntta_requests_waiting 0.0\n" in reply.text
    assert secured.ask("ann", "GET", f"{apart}/metrics").status_code == 403
    assert secured.server.http.get(f"{apart}/metrics").status_code == 401
    for path in ("/v2/health/ready", "/v1/models", "/openapi.json", "/metrics/"):
        reply = secured.ask("ann", "GET", apart + path)
        assert (reply.status_code, list(reply.json())) == (404, ["error"])
    assert secured.ask("ann", "PUT", f"{apart}/v1/streams/s").status_code == 404


@needs_openssl
def test_requests_over_tls_that_never_end(secured: Secured) -> None:
    """What is bounded is bounded over TLS, too."""
    context = secured.context()
    with context.wrap_socket(secured.server.connect(), server_hostname="127.0.0.1") as connection:
        connection.sendall(b"GET /v2 HTTP/1.1\r\nX: " + b"x" * 70_000)
        assert connection.recv(12) == b"HTTP/1.1 431"
    reply = secured.ask("ann", "POST", f"/v2/models/{MODEL}/infer", content=bytes(70 * 2**20))
    assert (reply.status_code, "limits.body_bytes" in reply.json()["error"]) == (413, True)


@needs_openssl
def test_clients_that_go_away_over_tls(secured: Secured) -> None:
    """In the middle of the handshake, of a request, or of an answer."""
    request = b"GET /v1/policies HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer " + secured.tokens["ann"].encode()
    context, server = secured.context(), secured.server
    for number in range(100):
        with server.connect() as plain:
            if number % 4 == 0:
                plain.sendall(b"\x16\x03\x01\x02\x00"[: number % 5])
                continue
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
                connection.sendall(request + b"\r\n\r\n" * (number % 4 - 1))
                if number % 4 == 3:
                    connection.recv(1 + number)
    server.wait_for("the end of all connections", lambda: server.connections() == 0)
    assert server.is_ready()
    assert "Traceback" not in server.log
