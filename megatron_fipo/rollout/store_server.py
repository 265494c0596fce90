"""Serves a store of samples to the trainer's ranks over HTTP: frames of records/wire.py in, frames out.

A thread with an event loop of its own. Whatever the caller does, no more than a few answers are in memory at once.
"""

import asyncio
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

from megatron_fipo.engines.access import Receive, RequireToken, Scope, Send
from megatron_fipo.processes.addresses import listen_for_ranks
from megatron_fipo.records.fetch_messages import FETCH_PATH, decode_request
from megatron_fipo.records.rows import StoreAddress
from megatron_fipo.records.wire import WireError, encode_frame
from megatron_fipo.rollout.store import NotHere, SampleStore

LONGEST_REQUEST = 64 << 20
"""Most bytes of a request's body: millions of pieces."""
ANSWERS_AT_ONCE = 4
SEND_TIMEOUT_S = 60.0
"""Longest time that one answer takes to be sent; a caller that takes none of it holds up others for so long."""
_SLICE = 1 << 20
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
_STOP_TIMEOUT_S = 5.0


class StoreServer:
    """A store's door. `address` says where it is; `close` shuts it."""

    def __init__(self, store: SampleStore):
        """Listen where the trainer's ranks meet, and begin to serve. OSError: that is no address of this machine."""
        self._server = TokenServer(_Route(store), *listen_for_ranks(), name="sample-store")
        self.address = self._server.address

    def close(self) -> None:
        """Serve no more."""
        self._server.close()


class TokenServer:
    """Serves an ASGI application, in a thread of its own, to whoever has the token in `address`."""

    def __init__(self, application: Application, listener: socket.socket, reached_at: str, name: str):
        """Begin to serve. `reached_at` is host:port of the listener, `name` is the thread's."""
        self.address = StoreAddress(f"http://{reached_at}", secrets.token_urlsafe(32))
        settings = uvicorn.Config(
            RequireToken(application, self.address.token),
            log_config=None,
            log_level="critical",  # whoever asked is told, and says so
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(settings)
        serve = {"sockets": [listener]}
        self._thread = threading.Thread(target=self._server.run, kwargs=serve, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Serve no more."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(_STOP_TIMEOUT_S)


class _Route:
    """ASGI application: POST FETCH_PATH, and nothing else."""

    def __init__(self, store: SampleStore):
        self._store = store
        self._turns = asyncio.Semaphore(ANSWERS_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != FETCH_PATH or scope["method"] != "POST":
            await say(send, 404, "no such route")
            return
        body = await body_of(receive)
        if body is None:
            await say(send, 413, f"a request has at most {LONGEST_REQUEST} bytes")
            return
        async with self._turns:
            try:
                pieces, request = decode_request(body)
                answer = encode_frame({}, self._store.read(pieces, request.streams, request.columns))
            except WireError as error:
                await say(send, 400, f"the request {error}")
            except NotHere as error:
                await say(send, 410, str(error))
            else:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await _send(send, answer)


async def body_of(receive: Receive) -> bytes | None:
    """The request's body; None if it is too long."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > LONGEST_REQUEST:
            return None
        if not message.get("more_body", False):
            return bytes(body)


async def _send(send: Send, answer: bytes) -> None:
    headers = [(b"content-type", b"application/fipo"), (b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for start in range(0, len(answer), _SLICE):
        await send({"type": "http.response.body", "body": answer[start : start + _SLICE], "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def say(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    message: dict[str, Any] = {"type": "http.response.body", "body": text.encode()}
    await send(message)
