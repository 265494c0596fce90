"""The load of experts by transformers' own routers."""

from typing import Any

import torch


@torch.no_grad()
def router_load(model: Any, tokens: list[torch.Tensor], prompts: list[int]) -> dict[str, float]:
    """What RouterStatistics says of the tokens that predict a response."""
    chosen: list[list[torch.Tensor]] = []
    for ids, prompt in zip(tokens, prompts, strict=True):
        scores = model(ids[None, :-1], output_router_logits=True).router_logits
        top = [layer.topk(model.config.num_experts_per_tok).indices for layer in scores]
        chosen.append([layer.view(len(ids) - 1, -1)[prompt - 1 :].flatten() for layer in top])
    loads = [torch.cat(layer).bincount(minlength=scores[0].shape[-1]).double() for layer in zip(*chosen, strict=True)]
    fullest = [load.max() / load.mean() for load in loads]
    entropies = [torch.distributions.Categorical(load).entropy() for load in loads]
    return {
        "router_load": float(sum(fullest) / len(fullest)),
        "router_load_max": float(max(fullest)),
        "router_entropy": float(sum(entropies) / len(entropies)),
        "router_entropy_min": float(min(entropies)),
    }
