"""Why: a run that resumes from a damaged checkpoint must say so in one line, or hold exactly what was saved. Other
values train on without a word.

One rank, one small model, each file of a real checkpoint spoilt. Not covered: pickles that are made to do harm.
"""

import random
from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.fuzz.budget import cases
from tests.weights.models import SMALL_MODELS, write_model

pytestmark = pytest.mark.slow


@cases(seeded=30, campaign=1000)
def test_spoilt_checkpoints_are_refused_or_whole(rng: random.Random, count: int, tmp_path: Path) -> None:
    model = write_model(next(model for model in SMALL_MODELS if model.name == "qwen3-tied"), tmp_path)
    arguments = {"model_dir": str(model), "directory": str(tmp_path), "seed": rng.getrandbits(32), "count": count}
    (seen,) = run_ranks("tests.fuzz.checkpoints:resume_from_spoilt", 1, arguments, timeout=500)
    assert seen["failures"] == [], "\n".join(seen["failures"])
    assert seen["outcomes"]["resumed"] > 0, "the control: the first is not spoilt"
    assert seen["outcomes"]["refused"] > count / 3, seen["outcomes"]
