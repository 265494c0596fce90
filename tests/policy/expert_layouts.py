"""The layouts in which test_layouts.py compares a mixture of experts with transformers."""

from importlib.metadata import version
from typing import Any

from packaging.version import Version

from tests.policy.layouts import OVERLAPPED

SPLIT = {"tensor": 2, "sequence": True}
NEWER_MEGATRON = Version(version("megatron-core")) >= Version("0.19")
"""Megatron-Core marks the experts' gradients in every layout, and a wrong replay ends in its dispatcher with an error:
two controls are for the version before it, on which CI runs them."""
EXPERT_LAYOUTS = [
    {**SPLIT, "expert": 2, "data": 2},
    {**SPLIT, "expert": 2, "expert_tensor": 2, "data": 2},
    {**SPLIT, "data": 2},
    *([] if NEWER_MEGATRON else [{**SPLIT, "data": 2, "sabotage": "expert_mark"}]),
    {**OVERLAPPED, "expert": 2, "data": 4, "compare": "updated"},
    {"expert": 2, "data": 4, "sabotage": "router"},
]
RECOMPUTED = {"packing": True, "pipeline": 2, "expert": 2, "data": 2, "model": {"recompute": "full"}}
REPLAYED = [
    {"expert": 2, "data": 4, "replay": "trainer"},
    {**SPLIT, "expert": 2, "data": 2, "replay": "trainer"},
    {"packing": True, "expert": 2, "context": 2, "data": 2, "replay": "trainer"},
    {**RECOMPUTED, "virtual_pipeline": 2, "replay": "trainer"},
    *([] if NEWER_MEGATRON else [{**RECOMPUTED, "replay": "newest", "sabotage": "wrong micro-batch"}]),
    {"expert": 2, "data": 4, "replay": "own choice", "sabotage": "other experts"},
    *({**layout, "replay": "trainer", "sabotage": "on_policy"} for layout in (RECOMPUTED, {**SPLIT, "data": 2})),
    {**SPLIT, "packing": True, "expert": 2, "data": 2, "replay": "undisturbed"},
]
"""In the updates routers would choose the smallest scores, but in the last layout."""
DAPO, GRPO = {"algorithm": "dapo_and_routers"}, {"algorithm": "grpo_and_routers"}
ROUTER_LOSSES = [
    {**DAPO, "expert": 2, "data": 4},
    {**GRPO, **SPLIT, "expert": 2, "data": 2},
    {**GRPO, "packing": True, "expert": 2, "context": 2, "data": 2},
    {**GRPO, "packing": True, "pipeline": 2, "virtual_pipeline": 2, "expert": 2, "data": 2},
    {"algorithm": "dr_grpo_and_routers", "expert": 2, "data": 4},
    {**DAPO, **RECOMPUTED, "virtual_pipeline": 2, "replay": "trainer"},
    {**DAPO, "expert": 2, "data": 4, "sabotage": "local load"},
]
"""Losses of routers beside the policy's. The control has the load of this rank's own tokens."""
CUT_OTHERWISE = [
    {"packing": True, "pipeline": 2, "virtual_pipeline": 2, "expert": 2, "data": 2},
    {"expert": 2, "context": 2, "data": 2, "model": {"recompute": "full"}},
]
MORE_EXPERT_LAYOUTS = [
    *CUT_OTHERWISE,
    {"data": 4},
    {"expert": 2, "data": 4},
    {"expert": 4, "data": 4, "packing": True},
    {**SPLIT, "expert": 4, "data": 2},
    {**SPLIT, "expert": 2, "expert_dispatcher": "allgather", "data": 2},
    {"pipeline": 2, "expert": 2, "data": 2},
    {"packing": True, "expert": 2, "context": 2, "data": 2},
    {"packing": True, "pipeline": 2, "expert": 2, "context": 2, "model": {"recompute": "full"}},
    {"expert": 2, "data": 4, "model": {"recompute": "selective"}},
]
"""Each goes with a control, whose routers score the wrong experts."""
REPEATED = [
    {"pipeline": 2, "virtual_pipeline": 2, "expert": 2, "data": 2, "replay": "trainer"},
    {**RECOMPUTED, "replay": "trainer"},
    {**DAPO, **RECOMPUTED},
]
"""What REPLAYED and ROUTER_LOSSES have together with more."""
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
"""From the layout of a checkpoint to the one that resumes it."""
EVERY_EXPERT_LAYOUT = [
    *MORE_EXPERT_LAYOUTS,
    *({**layout, "sabotage": "router"} for layout in MORE_EXPERT_LAYOUTS),
    *REPEATED,
]
