"""Faults of routers for tests of their replay."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter

from megatron_fipo.policy.router_replay import Choice
from megatron_fipo.policy.update import Policy


def disturb_choices(policy: Policy) -> None:
    """Have routers that choose by themselves take the smallest scores from now on: the weights stay as they are."""
    for choice in _choices(policy):
        _disturb(choice)


def _disturb(choice: Choice) -> None:
    chosen = choice.get_replay_topk

    def disturbed(
        scores: torch.Tensor, topk: int, num_groups: Any, group_topk: Any, default_compute_topk: Callable[..., Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def smallest(scores: torch.Tensor, topk: int, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            values, experts = default_compute_topk(-scores, topk)
            return -values, experts

        return chosen(scores, topk, num_groups, group_topk, smallest)

    choice.get_replay_topk = disturbed  # type: ignore[method-assign]


class _NewestFirst(deque[tuple[torch.Tensor, torch.Tensor | None]]):
    def popleft(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self[-1]


def take_newest_choices(policy: Policy) -> None:
    """Have every recomputation take the choice of the newest micro-batch."""
    for choice in _choices(policy):
        choice._kept = _NewestFirst()


def _choices(policy: Policy) -> list[Choice]:
    modules = (module for chunk in policy.chunks for module in chunk.modules())
    return [module.router_replay for module in modules if isinstance(module, TopKRouter)]
