"""Seeds of requests: functions of the run's seed and of what is asked for, so that a run can be repeated."""

import random
from typing import Literal


def request_seed(run_seed: int, purpose: Literal["train", "validation"], number: int) -> int:
    """31 bits: for the ticket of that number, or the held-out problem at that place."""
    return random.Random(f"{run_seed}:{purpose}:{number}").getrandbits(31)
