"""Transformer Engine's layers without a GPU: an update by them in fp32 against plain transformers, to rounding; in bf16
and FP8 within their rounding; FP8's training, FP8 weights and checkpoints.

Why: what a GPU would tell late, a CPU tells with every change: the layers' specification and names, packed sequences,
tensor, sequence and context parallelism, recipes, FP8 weights and their exact masters. fp32 is compared exactly, so
that nothing can hide in a tolerance; an unmarked norm weight is the negative control. `tests/te_on_cpu` says what
is real here.

Not covered: CUDA kernels, cuDNN's and flash attention themselves, NCCL.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests.distributed import run_ranks
from tests.policy import engine
from tests.policy.engine import BF16, EXACT, SMOOTH, UPDATES, check_learns_alike, check_near
from tests.policy.layouts import OVERLAPPED
from tests.policy.test_layouts import case, check_gradients, updates_under  # noqa: F401  case is the fixture
from tests.te_on_cpu.install import CAPABILITY, ENGINE, is_there
from tests.weights.models import SMALL_MODELS, write_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_there(), reason=f"Transformer Engine's Python code is not in {ENGINE}: make env"),
]

RANKS = "tests.te_on_cpu.ranks"
ON_HOPPER = ("tensorwise", "blockwise", "delayed")
ROUNDED = {"algorithm": SMOOTH}

ONE: list[dict[str, Any]] = [{}, {"packing": False}, {"model": {"recompute": "full"}}]
TWO: list[dict[str, Any]] = [
    {"tensor": 2, "packing": False},
    {"tensor": 2, "sequence": True},
    {"tensor": 2, "sequence": True, "sabotage": "norm_weight"},
    {"pipeline": 2, "virtual_pipeline": 2},
    {**OVERLAPPED, "compare": "updated"},
]
FOUR: list[dict[str, Any]] = [{"tensor": 2, "pipeline": 2, "sequence": True}]
FAMILIES: list[dict[str, Any]] = [{"tensor": 2, "packing": False}, {"tensor": 2, "sequence": True}, {"pipeline": 2}]

# Delayed scaling has no scales yet in a first update. Context parallelism is for fused attention, which takes no fp32.
TENSORWISE, BLOCKWISE = {"model": {"fp8": "tensorwise"}}, {"model": {"fp8": "blockwise"}}
ROUNDED_ONE: list[dict[str, Any]] = [
    fp8 | {"packing": packing} for fp8 in ({}, TENSORWISE, BLOCKWISE) for packing in (True, False)
] + [{"model": {"fp8": "tensorwise", "recompute": "full"}}]
ROUNDED_TWO: list[dict[str, Any]] = [
    {"context": 2},
    {"context": 2, "packing": False},
    {"context": 2, **TENSORWISE},
    {"context": 2, **BLOCKWISE},
    {"tensor": 2, "sequence": True, **TENSORWISE},
]
ROUNDED_FOUR: list[dict[str, Any]] = [{"context": 4}, {"context": 2, "tensor": 2, "sequence": True, **TENSORWISE}]


@pytest.mark.parametrize("case", ["untied"], indirect=True)
@pytest.mark.parametrize(("world_size", "layouts"), [(1, ONE), (2, TWO), (4, FOUR)], ids=["one", "two", "four"])
def test_gradients_equal_the_reference(case: dict[str, Any], world_size: int, layouts: list[dict[str, Any]]) -> None:  # noqa: F811
    layouts = [{"packing": True, **layout, "model": EXACT | layout.get("model", {})} for layout in layouts]
    check_gradients(case, layouts, updates_under(case, world_size, layouts, RANKS))


@pytest.mark.parametrize("case", ["mistral", "gemma"], indirect=True)
def test_gradients_of_other_families_equal_the_reference(case: dict[str, Any]) -> None:  # noqa: F811
    """A window, norms of 1 + weight, and a GeGLU whose fused kernel has to be the approximation by tanh."""
    layouts = [{"packing": True, **layout, "model": EXACT} for layout in FAMILIES]
    check_gradients(case, layouts, updates_under(case, 2, layouts, RANKS))


@pytest.mark.parametrize("case", ["mistral"], indirect=True)
def test_rounded_gradients_of_a_window_are_near(case: dict[str, Any]) -> None:  # noqa: F811
    """In bf16 attention is another kernel."""
    layouts = [{"packing": packing, **ROUNDED, "model": BF16} for packing in (True, False)]
    ((packed, padded),) = updates_under(case, 1, layouts, RANKS)
    assert packed["worst"] < 0.1 and padded["worst"] < 0.1, (packed, padded)


@pytest.mark.parametrize("case", ["untied"], indirect=True)
@pytest.mark.parametrize(
    ("world_size", "layouts"), [(1, ROUNDED_ONE), (2, ROUNDED_TWO), (4, ROUNDED_FOUR)], ids=["one", "two", "four"]
)
def test_rounded_gradients_are_near(case: dict[str, Any], world_size: int, layouts: list[dict[str, Any]]) -> None:  # noqa: F811
    """The worst tensor and all of them as one, relative to their norms."""
    layouts = [{"packing": True, **layout, **ROUNDED, "model": BF16 | layout.get("model", {})} for layout in layouts]
    check_near(layouts, updates_under(case, world_size, layouts, RANKS))


@pytest.mark.parametrize("case", ["untied"], indirect=True)
def test_weights_stored_in_fp8_start_from_the_exact_ones(case: dict[str, Any]) -> None:  # noqa: F811
    """A master copy made of the rounded weights, or of the random ones before them, would be off by more."""
    layouts = [
        {
            "data": 2,
            "packing": True,
            "distributed_optimizer": True,
            "compare": "updated",
            "model": BF16 | {"fp8": fp8, "fp8_parameter_gather": True},
        }
        for fp8 in ON_HOPPER
    ]
    for results in updates_under(case, 2, layouts, RANKS):
        for layout, result in zip(layouts, results, strict=True):
            assert result["worst"] < 0.05, f"{layout}: {result['where']} is off by {result['worst']}"


def on_one_rank(function: str, model: dict[str, Any], **arguments: Any) -> Any:
    return engine.on_one_rank(f"{RANKS}:{function}", model, **arguments)


def pretend_what_runs(fp8: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CAPABILITY, "10.0" if fp8 == "mxfp8" else "9.0")


@pytest.mark.parametrize("case", ["untied"], indirect=True)
def test_mxfp8_gradients_are_near(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    pretend_what_runs("mxfp8", monkeypatch)
    model = {"model": BF16 | {"fp8": "mxfp8"}}
    layouts = [{"context": 2, "packing": True}, {"data": 2, "packing": False}, {"pipeline": 2, "packing": True}]
    for results in updates_under(case, 2, [layout | model | ROUNDED for layout in layouts], RANKS):
        assert all(result["whole"] < 0.2 for result in results), results


@pytest.mark.parametrize("fp8", ["blockwise", pytest.param("mxfp8", marks=pytest.mark.matrix)])
def test_blocks_of_sequence_parallelism(fp8: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gathered in blocks has to be whole blocks, or the first forward pass ends in an assertion."""
    pretend_what_runs(fp8, monkeypatch)
    layout = {"tensor": 2, "sequence": True}
    ranks = run_ranks(f"{RANKS}:first_ratios", 2, {"model": BF16 | {"fp8": fp8}, "parallel": layout})
    unrounded = on_one_rank("first_ratios", BF16)
    for found in ranks:
        assert found["ppo_kl"] == 0.0
        assert found["grad_norm"] == pytest.approx(unrounded["grad_norm"], rel=0.2)


@pytest.fixture(scope="module")
def losses_in_bf16() -> list[float]:
    return on_one_rank("losses", BF16, updates=UPDATES)


REPEATED = ("tensorwise", "blockwise", "mxfp8")
"""Their gradients are compared above, as delayed scaling's cannot be."""


@pytest.mark.matrix  # test_run.py trains in FP8
@pytest.mark.parametrize("fp8", ["delayed", *REPEATED])
def test_fp8_learns_as_bf16_does(fp8: str, losses_in_bf16: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """−log π of the same sequences, at each of 50 updates that lower it by a quarter or more, within 1 % on average."""
    pretend_what_runs(fp8, monkeypatch)
    rounded = on_one_rank("losses", BF16 | {"fp8": fp8}, updates=UPDATES)
    check_learns_alike(rounded, losses_in_bf16)


@pytest.mark.parametrize("fp8", ["off", "tensorwise", "blockwise", "mxfp8"])
def test_the_first_ratio_is_one(fp8: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for delayed scaling, whose scales are those of earlier micro-batches."""
    pretend_what_runs(fp8, monkeypatch)
    assert on_one_rank("first_ratios", BF16 | {"fp8": fp8})["ppo_kl"] == 0.0


@pytest.mark.parametrize("gather", [False, True])
def test_a_checkpoint_holds_layers_and_optimizer(gather: bool, tmp_path: Path) -> None:
    model = BF16 | {"fp8": "tensorwise", "fp8_parameter_gather": gather}
    found = on_one_rank("resume", model, directory=str(tmp_path))
    assert found["resumed"] == pytest.approx(found["through"], rel=1e-3 if gather else 1e-6)


@pytest.mark.parametrize("dequantised", [True, False])
def test_weights_stored_in_fp8_come_back_from_a_checkpoint(dequantised: bool, tmp_path: Path) -> None:
    """Rounded once more. The negative control: without our step before it, 0.19 rounds each half of the first
    feed-forward matrix by a scale of its own, and keeps the last."""
    model = BF16 | {"fp8": "tensorwise", "fp8_parameter_gather": True}
    off = on_one_rank("reload", model, directory=str(tmp_path), dequantised=dequantised)
    worst = max(off, key=off.__getitem__)
    if dequantised or Version(version("megatron-core")) < Version("0.19"):
        assert off[worst] < 0.01, worst
    else:
        assert off[worst] > 0.05 and worst.endswith("mlp.gate_proj.weight")


def test_checkpoints_go_between_transformer_engine_and_local_layers(tmp_path: Path) -> None:
    model = write_model(next(model for model in SMALL_MODELS if model.name == "qwen3-untied"), tmp_path)
    arguments = {"model_dir": str(model), "directory": str(tmp_path / "checkpoints")}
    (seen,) = run_ranks(f"{RANKS}:exchange_layers", 1, arguments)
    assert len(seen) == 4
    assert all(different == [] for different in seen.values()), seen
