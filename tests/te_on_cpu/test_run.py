"""A run on Transformer Engine's layers with weights stored in FP8, without a GPU: sampling by a real vLLM, live weight
updates whose checksums both sides compare, a checkpoint and a resume.

Why: of FP8 weights everything outside of a layer has to take what they stand for, and not their bytes.
Not covered: see test_layers.py.
"""

from pathlib import Path

import pytest

from tests.end_to_end import runs
from tests.end_to_end.runs import SMALL
from tests.te_on_cpu.install import ENGINE, is_there

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_there(), reason=f"Transformer Engine's Python code is not in {ENGINE}: make env"),
]

IN_FP8 = (
    *SMALL,
    "parallel=single",
    "model.layers=transformer_engine",
    "model.dtype=bfloat16",
    "model.fp8=tensorwise",
    "model.fp8_parameter_gather=true",
    "rollout.checksum_every=1",
    "checkpoint.every=1",
)


RANK = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


# test_layers.py has checkpoints of FP8 weights.
@pytest.mark.parametrize("stops", [(2,), pytest.param((2, 3), marks=pytest.mark.matrix)], ids=["run", "resume"])
def test_a_run_in_fp8(stops: tuple[int, ...], tmp_path: Path) -> None:
    for steps in stops:
        process = runs.start(tmp_path, *IN_FP8, f"run.steps={steps}", module="tests.te_on_cpu.train", environment=RANK)
        output = runs.finish(process, tmp_path)
    assert "precision: bfloat16 with FP8 tensorwise; optimizer: Transformer Engine's FusedAdam" in output
    rows = runs.rows(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, stops[-1] + 1))
    assert all(0 < row["log_prob_diff_mean"] < 0.05 for row in rows)
    assert all(row["updates_skipped"] == 0 for row in rows)
