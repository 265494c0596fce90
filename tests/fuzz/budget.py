"""How many cases a fuzz test tries, from which seed, and that none of them hangs."""

import contextlib
import os
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

_SHOWN = 600
CASE_LIMIT_S = 5.0
"""Processor time of one case: what waits without it is ended by the test's own timeout."""


def cases(seeded: int, campaign: int) -> pytest.MarkDecorator:
    """Run a test with `rng` and `count`: few cases of a fixed seed in `make test`, many of FUZZ_SEED's in a campaign.

    `make test-campaign` takes a new seed, which is in the names of the tests, and FUZZ_SEED=N repeats one.
    """
    seed = int(os.environ.get("FUZZ_SEED", "2"))
    many = pytest.param(random.Random(seed), campaign, id=f"FUZZ_SEED={seed}", marks=pytest.mark.campaign)
    return pytest.mark.parametrize(("rng", "count"), [pytest.param(random.Random(1), seeded, id="seeded"), many])


Case = Callable[[object], AbstractContextManager[None]]


@contextlib.contextmanager
def every_case() -> Iterator[Case]:
    """Gives `one_case` for each of many; what fails does not stop the others, and fails the test at the end."""
    failures: list[str] = []

    @contextlib.contextmanager
    def case(name: object) -> Iterator[None]:
        try:
            with one_case():
                yield
        except BaseException as error:
            # A library in Rust panics with what is no Exception; a timeout of pytest's is none either.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            failures.append(f"{str(name)[:_SHOWN]}\n    {where}: {type(error).__name__}: {str(error)[:_SHOWN]}")

    yield case
    assert not failures, "\n".join([f"{len(failures)} cases failed:", *failures[:50]])


@contextlib.contextmanager
def one_case() -> Iterator[None]:
    """Ends a case that computes for longer than CASE_LIMIT_S."""

    def late(*_: object) -> None:
        raise TimeoutError(f"after {CASE_LIMIT_S:g} s")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, CASE_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
