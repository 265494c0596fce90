"""Why: a model directory comes from elsewhere, half downloaded or edited by hand. A run that starts from it reads what
the directory says, or names the file in one line; never a traceback, a hang or less than all weights.

Files are spoilt one at a time: as JSON, as bytes, or with something else in their place. Not covered: what servers make
of such a directory, and tensors whose values are wrong, which no format shows.
"""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from megatron_fipo.errors import FipoError, WeightError
from tests.fuzz.budget import cases, every_case
from tests.fuzz.model_directories import loaded, spoil

pytestmark = pytest.mark.slow


def outcome(directory: Path) -> str:
    """ "refused", naming a file of the directory or a tensor, or "read" whole."""
    try:
        tensors, prompt = loaded(directory)
    except FipoError as error:
        lines = str(error).splitlines()
        # Several tensors are a list of them.
        assert len(lines) == 1 or isinstance(error, WeightError), lines
        assert all(len(line) < 1200 and line.isprintable() for line in lines), lines
        assert directory.name in str(error), lines
        return "refused"
    assert all(type(token) is int and token >= 0 for token in prompt)
    assert len(tensors) > 30 and all(tensor.dtype.is_floating_point for tensor in tensors.values())
    return "read"


@cases(seeded=300, campaign=3000)
def test_spoilt_model_directories_are_read_or_refused(
    rng: random.Random, count: int, sound: list[Path], tmp_path: Path
) -> None:
    outcomes: Counter[str] = Counter()
    for directory in sound:
        assert outcome(directory) == "read", "the control"
    with every_case() as case:
        for number in range(count):
            directory = tmp_path / f"spoilt-{number}"
            shutil.copytree(rng.choice(sound), directory)
            with case(spoil(rng, directory)):
                outcomes[outcome(directory)] += 1
            shutil.rmtree(directory)
    assert outcomes["refused"] > count / 3 and outcomes["read"] > count / 20, outcomes
