"""How many cases a fuzz test tries, from which seed, and that none of them hangs."""

import contextlib
import os
import random
import signal
from collections.abc import Iterator

import pytest

CASE_LIMIT_S = 5.0
"""Processor time of one case: what waits without it is ended by the test's own timeout."""


def cases(seeded: int, campaign: int) -> pytest.MarkDecorator:
    """Run a test with `rng` and `count`: few cases of a fixed seed in `make test`, many of FUZZ_SEED's in a campaign.

    `make test-campaign` takes a new seed, which is in the names of the tests, and FUZZ_SEED=N repeats one.
    """
    seed = int(os.environ.get("FUZZ_SEED", "2"))
    many = pytest.param(random.Random(seed), campaign, id=f"FUZZ_SEED={seed}", marks=pytest.mark.campaign)
    return pytest.mark.parametrize(("rng", "count"), [pytest.param(random.Random(1), seeded, id="seeded"), many])


@contextlib.contextmanager
def one_case(name: object) -> Iterator[None]:
    """Names the case in whatever fails inside, and ends one that computes for longer than CASE_LIMIT_S."""

    def late(*_: object) -> None:
        raise TimeoutError(f"after {CASE_LIMIT_S:g} s")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, CASE_LIMIT_S)
    try:
        yield
    except BaseException as error:
        error.add_note(f"the case: {name!r}"[:3000])
        raise
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
