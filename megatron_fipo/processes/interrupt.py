"""Handle Ctrl-C in a run that this package's launcher has started: the run stops without losing an update.

The launcher sends one SIGINT to rank 0. Rank 0 tells the others at the next point where all ranks meet. Before the
first step, and under other launchers, a SIGINT ends a rank at once (processes.terminate_on_sigterm).
"""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_fipo.processes.ending import LISTENER_VARIABLE


class Interrupted(KeyboardInterrupt):
    """Ctrl-C interrupted work of rank 0 alone. It is a KeyboardInterrupt, since asyncio passes this through."""


class CtrlC:
    """Rank 0's record of a Ctrl-C. On other ranks, and under other launchers, it never receives one."""

    def __init__(self, is_led: bool | None = None) -> None:
        """Create it at the start, before ranks meet: the variable that names the launcher is removed then.

        `is_led` is used instead of that variable if it is given.
        """
        self.asked = False
        self.is_led = LISTENER_VARIABLE in os.environ if is_led is None else is_led
        """Whether this is rank 0 under our own launcher, or a process to which only another one sends SIGINT."""
        self._breaks = False

    def begin(self) -> None:
        """From now on a Ctrl-C requests a stop, and no longer ends this process. Call it in the main thread."""
        # A run that a script started in the background ignores the terminal's Ctrl-C. Keep it so.
        if self.is_led and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._on_signal)

    @contextmanager
    def breaks(self, allowed: bool = True) -> Iterator[None]:
        """Raise Interrupted on a Ctrl-C in the block, or on an earlier one. With `allowed` false, do not raise it."""
        before, self._breaks = self._breaks, allowed
        try:
            self._raise_if_asked()
            yield
        except asyncio.CancelledError:  # `_on_signal` cancels, if it was called
            if not self.asked:
                raise
            raise Interrupted from None
        finally:
            self._breaks = before
        self._raise_if_asked()

    def _on_signal(self, signum: int, _frame: object) -> None:
        self.asked = True
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._raise_if_asked()
            return
        # If it were raised here, it would appear in one of the loop's tasks and again in each task that waits for it,
        # or be lost in a callback.
        if self._breaks:
            loop.call_soon_threadsafe(_cancel_all, loop)

    def _raise_if_asked(self) -> None:
        if self.asked and self._breaks:
            raise Interrupted


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()
