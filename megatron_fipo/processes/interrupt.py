"""Ctrl-C in a run that this package's launcher has started: the run ends where nothing is lost that was trained.

The launcher sends one SIGINT, to rank 0, which tells the others where all of them meet. Before the first step and under
other launchers a SIGINT ends a rank at once: processes.terminate_on_sigterm.
"""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_fipo.processes.ending import LISTENER_VARIABLE


class Interrupted(KeyboardInterrupt):
    """Ctrl-C broke off what only rank 0 was doing. A KeyboardInterrupt, which asyncio lets through."""


class CtrlC:
    """Rank 0's record of a Ctrl-C. On other ranks, and under other launchers, it never hears of one."""

    def __init__(self, is_led: bool | None = None) -> None:
        """To be made at the start, before ranks meet: the variable that tells of the launcher goes then.

        `is_led` says what is not to be read from that variable.
        """
        self.asked = False
        self.is_led = LISTENER_VARIABLE in os.environ if is_led is None else is_led
        """Whether this is rank 0 of our own launcher, or a process that gets a SIGINT from another of the run alone."""
        self._breaks = False

    def begin(self) -> None:
        """From here on a Ctrl-C asks to stop, and no longer ends this process. In the main thread."""
        # A script's background ignores the terminal's Ctrl-C, and goes on doing so.
        if self.is_led and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._on_signal)

    @contextmanager
    def breaks(self, allowed: bool = True) -> Iterator[None]:
        """A Ctrl-C raises Interrupted in here, also one from before; or not, inside such a place, unless `allowed`."""
        before, self._breaks = self._breaks, allowed
        try:
            self._raise_if_asked()
            yield
        except asyncio.CancelledError:  # by `_on_signal`, if that was called
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
        # Raised here, it would come up in one of the loop's tasks, and once more in each that waits for that one, or be
        # lost in a callback.
        if self._breaks:
            loop.call_soon_threadsafe(_cancel_all, loop)

    def _raise_if_asked(self) -> None:
        if self.asked and self._breaks:
            raise Interrupted


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()
