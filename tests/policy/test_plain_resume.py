"""Why: whoever can write into a run's directory must not thereby run code in it. A resume reads plain data only.

One rank. Each place of a checkpoint that holds a pickle gets one that leaves a mark when it is unpickled; the control
is that it does so where it is unpickled as it would have been. With Megatron-Core 0.16.1 or 0.19.2, whichever is
installed. Not covered: Transformer Engine's own FP8 state (tests/te_on_cpu, tests/gpu), and other readers of pickles
than a resume (tests/weights/test_conversion.py).
"""

from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.weights.models import SMALL_MODELS, write_model

pytestmark = pytest.mark.slow

SAID = {
    "metadata": ".metadata names posix.mkdir, which no metadata needs",
    "common.pt": "a pickle names posix.mkdir, which no checkpoint needs",
    "bytes": "a pickle names posix.mkdir, which no checkpoint needs",
    "extra state": "names posix.mkdir, which no dict needs",
    "storage": "a pickle names posix.mkdir, which no checkpoint needs",
}


def test_no_pickle_in_a_checkpoint_runs(tmp_path: Path) -> None:
    chosen = write_model(next(model for model in SMALL_MODELS if model.name == "qwen3-tied"), tmp_path)
    arguments = {"model_dir": str(chosen), "directory": str(tmp_path / "checkpoints")}
    (found,) = run_ranks("tests.policy.hostile_checkpoints:refusals", 1, arguments, timeout=120)
    assert found.keys() == SAID.keys()
    for place, seen in found.items():
        assert not seen["ran"], place
        assert seen["control ran"], f"{place}: the pickle is harmless, and this test shows nothing"
        assert "cannot be resumed from: " in seen["said"] and SAID[place] in seen["said"], seen["said"]
        assert "\n" not in seen["said"]
