"""A mixture of experts by Transformer Engine's grouped layers without a GPU: an update in fp32 against plain
transformers, to rounding; in bf16 and FP8 within their rounding.

Why: on GPUs these are the layers of a model with experts, and no other test has them: local layers multiply one expert
after the other. In bf16 and FP8 the experts are transformers' choices, as samples have them: rounded scores choose
others now and then, and a token's whole gradient goes elsewhere.

Not covered: see test_layers.py; Megatron-Core's kernel in Triton that deals tokens to experts, and DeepEP.
"""

from typing import Any

import pytest

from tests.policy.engine import BF16, EXACT, SMOOTH, check_near
from tests.policy.expert_layouts import SPLIT
from tests.policy.test_layouts import case, check_gradients, updates_under  # noqa: F401  case is the fixture
from tests.te_on_cpu.install import ENGINE, is_there

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_there(), reason=f"Transformer Engine's Python code is not in {ENGINE}: make env"),
]

RANKS = "tests.te_on_cpu.ranks"
STAGES = {"pipeline": 2, "virtual_pipeline": 2, "expert": 2, "data": 2}
EXACT_LAYOUTS: list[dict[str, Any]] = [
    {**SPLIT, "expert": 2, "data": 2, "replay": "trainer"},
    {**SPLIT, "expert": 2, "expert_tensor": 2, "data": 2, "packing": False},
    {**STAGES, "algorithm": "grpo_and_routers", "model": {"recompute": "full"}},
    {"expert": 2, "data": 4, "sabotage": "router"},
]
TENSORWISE, BLOCKWISE = {"model": {"fp8": "tensorwise"}}, {"model": {"fp8": "blockwise"}}
ROUNDED: list[dict[str, Any]] = [
    {"expert": 2, "data": 2},
    {"expert": 2, "data": 2, **TENSORWISE},
    {"expert": 2, "data": 2, "packing": False, **BLOCKWISE},
    {**SPLIT, **TENSORWISE},
]
STORED = {"expert": 2, "data": 2, "packing": True, "distributed_optimizer": True, "compare": "updated"}


@pytest.mark.parametrize(
    "case",
    ["qwen3_moe", *(pytest.param(n, marks=pytest.mark.matrix) for n in ("qwen2_moe", "qwen3_moe_dense_first"))],
    indirect=True,
)
def test_gradients_equal_the_reference(case: dict[str, Any]) -> None:  # noqa: F811
    """Of every expert and router. The control's routers score the wrong experts."""
    layouts = [{"packing": True, **layout, "model": EXACT | layout.get("model", {})} for layout in EXACT_LAYOUTS]
    check_gradients(case, layouts, updates_under(case, 4, layouts, RANKS))


@pytest.mark.parametrize("case", ["qwen3_moe_wide"], indirect=True)
def test_rounded_gradients_are_near(case: dict[str, Any]) -> None:  # noqa: F811
    """The worst tensor and all of them as one, relative to their norms. Some experts of a micro-batch have no token."""
    layouts = [
        {"packing": True, **layout, "replay": "rollout first", "algorithm": SMOOTH}
        | {"model": BF16 | layout.get("model", {})}
        for layout in ROUNDED
    ]
    check_near(layouts, updates_under(case, 2, layouts, RANKS))


@pytest.mark.parametrize("case", ["qwen3_moe_wide"], indirect=True)
def test_weights_stored_in_fp8_start_from_the_exact_ones(case: dict[str, Any]) -> None:  # noqa: F811
    """A master copy made of the rounded weights, or of the random ones before them, would be off by more."""
    stored = [BF16 | {"fp8": fp8, "fp8_parameter_gather": True} for fp8 in ("tensorwise", "blockwise")]
    for results in updates_under(case, 2, [{**STORED, "model": model} for model in stored], RANKS):
        for result in results:
            assert result["worst"] < 0.05, f"{result['where']} is off by {result['worst']}"
