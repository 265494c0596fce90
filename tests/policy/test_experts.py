"""Why: experts that lie over ranks have an optimizer of their own, so that another layout has another number of them; a
moment or a step that is lost on the way lets a resumed run go another way, without any error.

A model whose first layers are dense, so that a pipeline stage has no experts, on four ranks. Not covered: Transformer
Engine's grouped experts (tests/gpu).
"""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.policy.test_layouts import make_case

pytestmark = pytest.mark.slow

SHARDED = {"data": 4, "distributed_optimizer": True}
Moves = list[list[dict[str, Any]]]
MOVES: Moves = [
    [{**SHARDED, "expert": 2}, SHARDED],
    [{**SHARDED, "expert": 2}, {**SHARDED, "expert": 2, "data": 2, "pipeline": 2}],
]
MORE_MOVES: Moves = [
    [SHARDED, {**SHARDED, "expert": 4}],
    [{"data": 4, "expert": 2}, {"tensor": 2, "sequence": True, "data": 2}],
]


@pytest.mark.parametrize(
    "moves", [MOVES, pytest.param(MORE_MOVES, marks=pytest.mark.matrix)], ids=["moves", "more moves"]
)
def test_a_checkpoint_resumes_under_another_layout_of_experts(tmp_path: Path, moves: Moves) -> None:
    """As if there had been no break: the same gradient norm, rate and weights."""
    case = make_case(tmp_path, "qwen3_moe_dense_first", [])
    arguments = {
        "model_dir": str(case["folder"] / "model"),
        "batch": str(case["folder"] / "batch.safetensors"),
        "directory": str(tmp_path / "checkpoints"),
        "moves": moves,
    }
    by_rank = run_ranks("tests.policy.expert_ranks:resume", 4, arguments, timeout=180)
    for move, found in zip(moves, zip(*by_rank, strict=True), strict=True):
        for rank in found:
            through, resumed = rank["through"], rank["resumed"]
            assert resumed["grad_norm"] == pytest.approx(through["grad_norm"], rel=1e-5), move
            assert resumed["rate"] == through["rate"], move
            assert rank["worst"] < 1e-4, move
    found = {rank[0][when]["optimizers"] for rank in by_rank for when in ("through", "resumed")}
    assert found == {1, 2}, "the first move is to another number of optimizers"
