"""The event loop of the thread that starts servers and verifiers. It turns whenever that thread waits for something.

Servers and verifiers end with the thread that started them, so that thread does everything, one call after the other.
What a call leaves under way, such as sampling, goes on in every later wait, whatever that waits for.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

_T = TypeVar("_T")


class MainLoop:
    """Turns only inside of `run`. All methods but `call` are for the thread that made it."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner(loop_factory=_loop)
        self._is_closed = False

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What `work` returns. What was begun before goes on meanwhile, and stays where it is afterwards.

        Where a signal's handler raises, wherever the loop is then, all that was begun is cancelled.
        """
        try:
            return self._runner.run(work)
        except (KeyboardInterrupt, SystemExit):
            self._cancel_all()
            raise

    def begin(self, work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        """Have `work` go on in this and in later waits."""
        return self._runner.get_loop().create_task(work)

    def call(self, function: Callable[[], object]) -> None:
        """Have the loop call a function when it turns next. From any thread; without effect once it is closed."""
        with contextlib.suppress(RuntimeError):
            self._runner.get_loop().call_soon_threadsafe(function)

    def close(self) -> None:
        """Cancel what was begun. May be called twice."""
        if not self._is_closed:
            self._is_closed = True
            self._cancel_all()
            self._runner.close()

    def _cancel_all(self) -> None:
        is_done = False
        while not is_done:
            # What a handler has raised in one task comes up again in each one that waits for it.
            with contextlib.suppress(KeyboardInterrupt, SystemExit, asyncio.CancelledError):
                self._runner.run(_cancel_others())
                is_done = True


async def all_of(parts: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """What each part returns, in order. The first failure is raised, and ends the others."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _cancel_others() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def _loop() -> asyncio.AbstractEventLoop:
    """An event loop that does not report what its caller has been told: a Ctrl-C, in whatever task it came up."""

    def report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if isinstance(context.get("exception", Exception()), Exception):
            loop.default_exception_handler(context)

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(report)
    return loop
