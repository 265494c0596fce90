"""Why: whoever reaches a server's port could read or change the weights, so nothing may answer without the token.

Against a real server. Does not cover other local users reading this process's environment: the kernel forbids that.
"""

import asyncio

import httpx
import psutil
import pytest

from megatron_fipo.engines.access import TOKEN_VARIABLE, RequireToken
from tests.engines.tokens import token_of
from tests.rollout.conftest import Rollout


async def _nothing(*_: object) -> None:
    raise AssertionError("the application was reached")


def _requester(monkeypatch: pytest.MonkeyPatch) -> RequireToken:
    monkeypatch.setenv(TOKEN_VARIABLE, "right")
    return RequireToken(_nothing)


def test_it_refuses_to_be_made_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(RuntimeError, match=TOKEN_VARIABLE):
        RequireToken(_nothing)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"right")],
        [(b"authorization", b"Bearer wrong")],
        [(b"authorization", b"Bearer right ")],
        [(b"authorization", b"bearer right")],
        [(b"authorization", b"Bearer wrong"), (b"authorization", b"Bearer right")],
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_anything_but_the_one_right_header_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: str, headers: list[tuple[bytes, bytes]]
) -> None:
    sent = []

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(_requester(monkeypatch)({"type": kind, "headers": headers}, _nothing, send))
    assert sent[0]["type"] == ("http.response.start" if kind == "http" else "websocket.close")
    assert sent[0].get("status") == (401 if kind == "http" else None)


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_the_right_header_reaches_the_application(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    scope = {"type": kind, "headers": [(b"Authorization", b"Bearer right")]}
    with pytest.raises(AssertionError, match="reached"):
        asyncio.run(_requester(monkeypatch)(scope, _nothing, _nothing))


@pytest.mark.slow
def test_no_route_of_a_real_server_answers_without_the_token(rollout: Rollout) -> None:
    url = rollout.pool.servers[0].url
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        paths = client.get("/openapi.json", headers=rollout.pool.headers).json()["paths"]
        calls = [(method.upper(), path) for path, methods in paths.items() for method in methods]
        # Served without being listed, or mounted.
        calls += [("GET", path) for path in ("/openapi.json", "/docs", "/metrics", "/metrics/", "/ping", "/nothing")]
        answers = {call: client.request(*call).status_code for call in calls}
        wrong = client.get("/health", headers={"Authorization": "Bearer wrong"}).status_code
    assert ("POST", "/update_weights") in answers
    assert ("POST", "/collective_rpc") in answers
    assert {call: status for call, status in answers.items() if status != 401} == {}
    assert wrong == 401


@pytest.mark.slow
def test_with_the_token_it_does_answer(rollout: Rollout) -> None:
    answer = httpx.get(rollout.pool.servers[0].url + "/weight_info", headers=rollout.pool.headers, trust_env=False)
    assert answer.json() == {"weight_version": "0"}


@pytest.mark.slow
def test_the_token_is_in_no_command_line_and_no_log(rollout: Rollout) -> None:
    token = token_of(rollout.pool)
    server = rollout.pool.servers[0]
    assert server.process is not None and server.log is not None
    root = psutil.Process(server.process.pid)
    processes = [root, *root.children(recursive=True)]
    assert len(processes) >= 2
    assert not [process for process in processes if token in " ".join(process.cmdline())]
    assert token not in server.log.path.read_text()
    # Bound to loopback alone.
    listening = {c.laddr.ip for p in processes for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening <= {"127.0.0.1", "::1"}
