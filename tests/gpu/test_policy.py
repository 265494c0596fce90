"""One update on a GPU against plain transformers in fp32, as tests/policy/test_layouts.py does on the CPU; and what
only several updates show: FP8 learns as bf16 does, a checkpoint holds the optimizer, the first ratio is 1.

Tolerances, the worst tensor relative to its norm: gradients 1e-4 in fp32 (torch leaves TF32 off), 1e-2 in fp32 by
Transformer Engine (which multiplies by TF32), 0.1 in bf16, 0.4 in FP8; updated weights that are stored in FP8 0.05,
which is their rounding. Not covered: more than one GPU.
"""

from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.errors import ConfigError
from tests.policy import engine
from tests.policy.engine import BF16, EXACT, SMOOTH, UPDATES, check_learns_alike
from tests.policy.test_layouts import case, updates_under  # noqa: F401  case is the fixture

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("triton")]

LOCAL = {"layers": "local", "dtype": "bfloat16"}
FP8 = ("delayed", "tensorwise", "blockwise", "mxfp8")
EXPERTS: list[dict[str, Any]] = [{}, {"replay": "trainer"}, {"algorithm": "grpo_and_routers"}]


def worst_error(case: dict[str, Any], **layout: Any) -> float:  # noqa: F811
    (rank,) = updates_under(case, 1, [layout], timeout=300)
    assert rank[0]["metrics"]["updates_skipped"] == 0
    return rank[0]["worst"]


def on_one_rank(function: str, model: dict[str, Any], **arguments: Any) -> Any:
    return engine.on_one_rank(f"tests.policy.training:{function}", model, **arguments)


def skip_unless_it_runs(fp8: str) -> None:
    """Skip with the refusal that a run would get."""
    from megatron_fipo.policy.precision import check_recipe, this_machine

    try:
        check_recipe(fp8, this_machine())
    except ConfigError as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize("packing", [True, False])
def test_local_layers_in_float32(case: dict[str, Any], packing: bool) -> None:  # noqa: F811
    assert worst_error(case, model={"layers": "local"}, packing=packing) < 1e-4


@pytest.mark.parametrize("packing", [True, False])
def test_local_layers_in_bfloat16(case: dict[str, Any], packing: bool) -> None:  # noqa: F811
    assert worst_error(case, model=LOCAL, packing=packing, algorithm=SMOOTH) < 0.1


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("model", [{"layers": "local"}, EXACT], ids=["local", "transformer_engine"])
@pytest.mark.parametrize("case", ["mistral", "gemma"], indirect=True)
def test_other_families_in_float32(case: dict[str, Any], model: dict[str, Any]) -> None:  # noqa: F811
    assert worst_error(case, model=model, packing=True, algorithm=SMOOTH) < 1e-2


@pytest.mark.parametrize("case", ["qwen3_moe"], indirect=True)
@pytest.mark.parametrize("layout", EXPERTS, ids=lambda layout: layout.get("algorithm") or layout.get("replay", "plain"))
def test_experts_in_local_layers_in_float32(case: dict[str, Any], layout: dict[str, Any]) -> None:  # noqa: F811
    assert worst_error(case, model={"layers": "local"}, packing=True, **layout) < 1e-4


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("case", ["qwen3_moe"], indirect=True)
@pytest.mark.parametrize("packing", [True, False])
def test_experts_of_transformer_engine_in_float32(case: dict[str, Any], packing: bool) -> None:  # noqa: F811
    """Tokens go to transformers' choices: where TF32 takes one to another expert, its whole gradient goes elsewhere."""
    assert worst_error(case, model=EXACT, packing=packing, algorithm=SMOOTH, replay="rollout first") < 1e-2


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("case", ["qwen3_moe_wide"], indirect=True)
@pytest.mark.parametrize("fp8", ["off", "tensorwise", "blockwise", "mxfp8"])
def test_experts_of_transformer_engine_are_near_in_bfloat16_and_fp8(case: dict[str, Any], fp8: str) -> None:  # noqa: F811
    if fp8 != "off":
        skip_unless_it_runs(fp8)
    layout = {"algorithm": SMOOTH, "replay": "rollout first", "packing": True}
    assert worst_error(case, model=BF16 | {"fp8": fp8}, **layout) < (0.1 if fp8 == "off" else 0.4)


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("packing", [True, False])
def test_transformer_engine_in_float32(case: dict[str, Any], packing: bool) -> None:  # noqa: F811
    assert worst_error(case, model=EXACT, packing=packing, algorithm=SMOOTH) < 1e-2


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("packing", [True, False])
def test_transformer_engine_in_bfloat16(case: dict[str, Any], packing: bool) -> None:  # noqa: F811
    assert worst_error(case, model=BF16, packing=packing, algorithm=SMOOTH) < 0.1


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("fp8", ["tensorwise", "blockwise", "mxfp8"])
def test_transformer_engine_in_fp8(case: dict[str, Any], fp8: str, packing: bool) -> None:  # noqa: F811
    """Not for delayed scaling, which has no scales yet in a first update."""
    skip_unless_it_runs(fp8)
    assert worst_error(case, model=BF16 | {"fp8": fp8}, packing=packing, algorithm=SMOOTH) < 0.4


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("fp8", ["delayed", "tensorwise", "blockwise"])
def test_weights_stored_in_fp8_start_from_the_exact_ones(case: dict[str, Any], fp8: str) -> None:  # noqa: F811
    """A master copy made of the rounded weights, or of the random ones before them, would be off by more."""
    skip_unless_it_runs(fp8)
    model = BF16 | {"fp8": fp8, "fp8_parameter_gather": True}
    assert worst_error(case, model=model, distributed_optimizer=True, compare="updated") < 0.05


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("fp8", FP8)
def test_fp8_learns_as_bf16_does(fp8: str) -> None:
    """−log π of the same sequences, at each of 50 updates that lower it by a quarter or more, within 1 % on average."""
    skip_unless_it_runs(fp8)
    exact = on_one_rank("losses", BF16, updates=UPDATES)
    rounded = on_one_rank("losses", BF16 | {"fp8": fp8}, updates=UPDATES)
    check_learns_alike(rounded, exact)


def test_the_first_ratio_is_one_with_local_layers() -> None:
    assert on_one_rank("first_ratios", LOCAL)["ppo_kl"] == 0.0


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("fp8", ["off", "tensorwise", "blockwise", "mxfp8"])
def test_the_first_ratio_is_one_with_transformer_engine(fp8: str) -> None:
    """Not for delayed scaling, whose scales are those of earlier micro-batches."""
    skip_unless_it_runs(fp8)
    assert on_one_rank("first_ratios", BF16 | {"fp8": fp8})["ppo_kl"] == 0.0


def test_a_checkpoint_holds_the_optimizer(tmp_path: Path) -> None:
    """With whichever Adam there is: Transformer Engine's, apex's or ours."""
    found = on_one_rank("resume", LOCAL, directory=str(tmp_path))
    assert found["resumed"] == pytest.approx(found["through"], rel=1e-6)


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("gather", [False, True])
def test_a_checkpoint_holds_transformer_engines_layers(gather: bool, tmp_path: Path) -> None:
    skip_unless_it_runs("tensorwise")
    model = BF16 | {"fp8": "tensorwise", "fp8_parameter_gather": gather}
    found = on_one_rank("resume", model, directory=str(tmp_path))
    assert found["resumed"] == pytest.approx(found["through"], rel=1e-3 if gather else 1e-6)
