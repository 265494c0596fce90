"""Why: sampling runs on rank 0 alone, and all ranks have to go on together: with a batch, with weights, or not at all.

Ranks are threads with a TCPStore each, as processes have. What sampling itself says is tests/rollout/test_answers.py;
killed servers in whole runs are tests/end_to_end.
"""

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
from torch.distributed import HashStore, Store, TCPStore

from megatron_fipo.errors import ConfigError, FipoError, RefusedOnRank0
from megatron_fipo.rollout.events import BrokenOff, Event, Ready, WeightsWanted
from megatron_fipo.runs.sampling_events import SamplingEvents

WORLD = 3


def everywhere(waits: list[Callable[[], Event]]) -> list[list[Event | FipoError]]:
    """What each rank hears, one call after the other, until the first error."""
    host = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    visitors = [TCPStore("127.0.0.1", host.port, timeout=timedelta(seconds=30)) for _ in range(1, WORLD)]
    heard: list[list[Event | FipoError]] = [[] for _ in range(WORLD)]

    def run(rank: int, store: Store) -> None:
        events = SamplingEvents(store, rank, WORLD)
        for wait in waits:
            try:
                heard[rank].append(events.next(wait if rank == 0 else _never))
            except FipoError as error:
                heard[rank].append(error)
                return

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate([host, *visitors])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    return heard


def _never() -> Event:
    raise AssertionError("only rank 0 samples")


def test_every_rank_hears_what_rank_0_waits_for() -> None:
    def slow() -> Event:
        time.sleep(0.3)
        return Ready()

    wanted = WeightsWanted(("http://a", "http://b"))
    heard = everywhere([lambda: wanted, slow, lambda: BrokenOff()])
    assert heard == [[wanted, Ready(), BrokenOff()]] * WORLD


def test_a_failure_is_one_on_every_rank_and_rank_0_leaves_last() -> None:
    """The launcher reports who fails first, and a rank that has lost rank 0 knows no reason."""

    def fail() -> Event:
        raise ConfigError("rollout.addresses", "nobody is there", "another")

    heard = everywhere([lambda: Ready(), fail, lambda: Ready()])
    assert [len(events) for events in heard] == [2] * WORLD
    first, *others = [events[1] for events in heard]
    assert isinstance(first, ConfigError)
    assert all(isinstance(error, RefusedOnRank0) and str(error) == str(first) for error in others)
    assert {error.exit_code for error in others if isinstance(error, FipoError)} == {ConfigError.exit_code}


def test_alone_nobody_is_waited_for() -> None:
    started = time.monotonic()
    events = SamplingEvents(HashStore(), 0, 1)
    assert events.next(lambda: Ready()) == Ready()
    with pytest.raises(FipoError, match="gone"):
        events.next(_raise(FipoError("gone")))
    assert time.monotonic() - started < 20


def _raise(error: Exception) -> Callable[[], Event]:
    def wait() -> Event:
        raise error

    return wait
