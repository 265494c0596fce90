"""Why: the benchmark of whole updates is for GPUs, which this suite has not; a table paid for with GPU hours must not
fail on its last line.

Not covered: CUDA's clock and memory.
"""

import pytest

from benchmarks.policy import SHAPES, measure_apart, operations


@pytest.mark.slow
def test_a_row_is_measured() -> None:
    row = measure_apart("tiny", 2, "off", packing=True)
    assert isinstance(row, dict), row
    assert row["padding"] == 0
    assert row["seconds"] > 0
    assert 0 < row["log_probs"] < 1 and 0 < row["loss"] < 1, "both ran forward and backward, inside the updates"


@pytest.mark.slow
def test_a_row_that_this_machine_cannot_run_says_why() -> None:
    assert "model.fp8" in str(measure_apart("tiny", 2, "tensorwise", packing=True))


def test_operations_are_six_a_weight_and_token() -> None:
    geometry = SHAPES["1.5b"].geometry
    assert operations(geometry, [1] * 1000) == pytest.approx(6 * 1.5436e9 * 1000, rel=1e-3)
    assert operations(geometry, [4096]) > 4096 * operations(geometry, [1]), "attention grows with the square"
