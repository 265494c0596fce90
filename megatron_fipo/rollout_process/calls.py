"""Answers calls of the trainer's rank 0, one after the other in the process's main thread.

Servers and verifiers end with the thread that started them, so that thread does everything; HTTP has a thread of its
own, which passes calls on and says what the main thread has to say. While the main thread waits, for the next call or
in one, sampling that has begun goes on.
"""

import asyncio
import contextlib
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from megatron_fipo.config import Config
from megatron_fipo.engines.access import Receive, Scope, Send
from megatron_fipo.errors import FipoError, RolloutError, one_line
from megatron_fipo.processes.leftovers import own_place
from megatron_fipo.rollout.main_loop import MainLoop
from megatron_fipo.rollout.store_server import body_of, say
from megatron_fipo.rollout_process.call_messages import (
    CALL_PATH,
    METHODS,
    OPEN,
    Alive,
    Heard,
    Message,
    Noted,
    Opened,
    PhaseBegan,
    PhaseEnded,
    Progressed,
    Refused,
    Returned,
    Warned,
    decode_arguments,
    encode,
)
from megatron_fipo.rollout_process.service import RolloutService

ALIVE_EVERY_S = 5.0
BESIDE = "write_snapshot"
"""The call that another may be under way beside: it writes files, and starts nothing."""
BROKEN_OFF = "wait"
"""The call that ends early when whoever made it is gone."""


class Call:
    """A call that waits for the main thread, or is under way there."""

    def __init__(self, name: str, arguments: Callable[[], list[Any]]):
        """`arguments` decodes them. In the thread that answers HTTP."""
        self.name, self.arguments = name, arguments
        self._loop = asyncio.get_running_loop()
        self._said: asyncio.Queue[Message] = asyncio.Queue()

    def say(self, message: Message) -> None:
        """To whoever made the call. From any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: this process ends
            self._loop.call_soon_threadsafe(self._said.put_nowait, message)

    def run(self, work: Callable[[list[Any]], Any]) -> None:
        """Do it, and say how it ended."""
        try:
            self.say(Returned(msgspec.msgpack.encode(work(self.arguments()))))
        except FipoError as error:
            self.say(Refused(type(error).__name__, str(error), error.exit_code))
        except Exception as error:
            traceback.print_exc()
            self.say(Refused(RolloutError.__name__, f"the rollout process failed: {one_line(error)}", 1))
        except asyncio.CancelledError:  # it was broken off, and nobody listens any more
            self.say(Refused(RolloutError.__name__, "broken off", 1))

    async def next_message(self, gone: asyncio.Future[Any]) -> Message | None:
        """What is said next; a sign of life where nothing is said for a while; None as soon as `gone` is done."""
        said = asyncio.ensure_future(self._said.get())
        await asyncio.wait({said, gone}, timeout=ALIVE_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
        if said.done():
            return said.result()
        said.cancel()
        return None if gone.done() else Alive()


class Reporter:
    """The listener of a service: passes on what it hears to whoever has made the call under way, or makes the next."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._waiting: list[Heard] = []

    @contextlib.contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """Report to this call."""
        for message in self._waiting:
            call.say(message)
        self._waiting.clear()
        self._calls.append(call)
        try:
            yield
        finally:
            self._calls.pop()

    def warn(self, text: str) -> None:
        """See Listener."""
        self._report(Warned(text))

    def note(self, text: str) -> None:
        """See Listener."""
        self._report(Noted(text))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator["Reporter"]:
        """See Listener."""
        self._report(PhaseBegan(name))
        try:
            yield self
        finally:
            self._report(PhaseEnded())

    def progress(self, done: int, total: int, unit: str = "") -> None:
        """See Listener."""
        self._report(Progressed(done, total, unit))

    def _report(self, message: Heard) -> None:
        if self._calls:
            self._calls[-1].say(message)
        else:
            self._waiting.append(message)


class Desk:
    """Takes calls over HTTP (an ASGI application), and does them in the thread that calls `run`."""

    def __init__(self, config: Config):
        self._config, self._loop = config, MainLoop()
        self._reporter = Reporter()
        self._waiting: asyncio.Queue[Call] = asyncio.Queue()
        """Of the main thread's loop."""
        self._stack = ExitStack()
        self._services: list[RolloutService] = []
        """One, once it is opened."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call with what it says until its end."""
        name = scope["path"].removeprefix(CALL_PATH) if scope["type"] == "http" else ""
        if name not in METHODS and name != OPEN:
            await say(send, 404, "no such call")
            return
        body = await body_of(receive)
        if body is None:
            await say(send, 413, "the call is too long")
            return
        call = Call(name, lambda: self._arguments(name, body))
        if name == BESIDE:
            beside = asyncio.ensure_future(asyncio.to_thread(call.run, self._do(name)))
            beside.add_done_callback(lambda _: None)
        else:
            self._loop.call(lambda: self._waiting.put_nowait(call))
        await self._tell(call, receive, send)

    def run(self) -> None:
        """Do calls until `close`, whose servers and verifiers are ended then, and on the way out of an error too."""
        with self._stack:
            while True:
                call = self._loop.run(self._waiting.get())
                with self._reporter.during(call):
                    call.run(self._do(call.name))
                if call.name == "close":
                    return

    async def _tell(self, call: Call, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/msgpack")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        gone = asyncio.ensure_future(receive())
        try:
            while (message := await call.next_message(gone)) is not None:
                last = isinstance(message, Returned | Refused)
                await send({"type": "http.response.body", "body": encode(message), "more_body": not last})
                if last:
                    return
            if call.name == BROKEN_OFF:
                self._loop.call(self._services[0].break_wait)
        finally:
            gone.cancel()

    def _do(self, name: str) -> Callable[[list[Any]], Any]:
        if name == OPEN:
            return lambda arguments: self._open(*arguments)
        return lambda arguments: getattr(self._services[0], name)(*arguments)

    def _arguments(self, name: str, body: bytes) -> list[Any]:
        if name == OPEN:
            return [msgspec.msgpack.decode(body, type=Opened)]
        return decode_arguments(name, body)

    def _open(self, where: Opened) -> None:
        run_dir = Path(where.run_dir)
        self._stack.enter_context(own_place(run_dir))
        reporter = self._reporter
        model_dir, progress = Path(where.model_dir), reporter.progress
        service = RolloutService(self._config, model_dir, run_dir, reporter, progress, self._loop)
        self._stack.callback(service.close)
        self._services.append(service)
