"""Why: a Ctrl-C may end sampling at any moment, and nothing that other ranks take part in.

Not covered: a run that is interrupted (end_to_end/test_train.py), and who sends the signal (launch/test_local.py).
"""

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from megatron_fipo.processes.ending import LISTENER_VARIABLE
from megatron_fipo.processes.interrupt import CtrlC, Interrupted


@pytest.fixture
def ctrl_c(monkeypatch: pytest.MonkeyPatch) -> Iterator[CtrlC]:
    monkeypatch.setenv(LISTENER_VARIABLE, "7")
    before = signal.getsignal(signal.SIGINT)
    recorder = CtrlC()
    monkeypatch.delenv(LISTENER_VARIABLE)
    recorder.begin()
    yield recorder
    signal.signal(signal.SIGINT, before)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_it_is_remembered_where_it_may_not_break(ctrl_c: CtrlC) -> None:
    press()
    assert ctrl_c.asked
    with pytest.raises(Interrupted), ctrl_c.breaks():
        raise AssertionError("what may be broken off does not begin any more")


def test_it_breaks_off_what_waits(ctrl_c: CtrlC) -> None:
    async def sample() -> None:
        asyncio.get_running_loop().call_later(0.05, press)
        await asyncio.sleep(30)

    with asyncio.Runner() as runner, pytest.raises(Interrupted), ctrl_c.breaks():
        runner.run(sample())


def test_what_all_ranks_do_together_is_finished_first(ctrl_c: CtrlC) -> None:
    done = []
    with pytest.raises(Interrupted), ctrl_c.breaks():
        with ctrl_c.breaks(False):
            press()
            done.append("weights")
        done.append("more samples")
    assert done == ["weights"]
    press()  # outside again: nothing is raised


def test_under_other_launchers_and_before_training_a_signal_does_what_it_did() -> None:
    before = signal.getsignal(signal.SIGINT)
    CtrlC().begin()
    assert signal.getsignal(signal.SIGINT) is before
