"""The choices of transformers' own routers, the load of experts by them, and losses of routers."""

from typing import Any

import torch
from torch import Tensor

from megatron_fipo.config import AlgorithmConfig
from megatron_fipo.records.routes import RouteFormat


@torch.no_grad()
def router_load(model: Any, tokens: list[Tensor], prompts: list[int]) -> dict[str, float]:
    """What RouterStatistics says of the tokens that predict a response."""
    loads = _loads(model, tokens, prompts)
    fullest = [load.max() / load.mean() for load in loads]
    entropies = [torch.distributions.Categorical(load).entropy() for load in loads]
    return {
        "router_load": float(sum(fullest) / len(fullest)),
        "router_load_max": float(max(fullest)),
        "router_entropy": float(sum(entropies) / len(entropies)),
        "router_entropy_min": float(min(entropies)),
    }


def router_losses(model: Any, tokens: list[Tensor], prompts: list[int], config: AlgorithmConfig) -> tuple[Tensor, ...]:
    """What routers add to the loss of one mini-batch, a scalar with gradient; and what the metrics say of both losses.

    A mean over responses, or over their tokens, as `config` has it; summed over layers.
    """
    shares = [load / load.sum() for load in _loads(model, tokens, prompts)]
    aux, z, weights = [], [], []
    for ids, prompt in zip(tokens, prompts, strict=True):
        scores = [layer[prompt - 1 :] for layer in model(ids[None, :-1], output_router_logits=True).router_logits]
        length = len(ids) - prompt
        for layer, share in zip(scores, shares, strict=True):
            even = len(share) * (layer.softmax(1) * share.float()).sum(1)
            aux += even.unbind()
            z += layer.exp().sum(1).log().square().unbind()
            divisors = {"token-mean": 1.0, "seq-mean-token-mean": length}
            weights += [1 / divisors.get(config.loss_agg_mode, config.loss_scale_factor)] * length
    aux_sum, z_sum = (sum(w * x for w, x in zip(weights, each, strict=True)) for each in (aux, z))
    added = config.router_aux_loss_coef * aux_sum + config.router_z_loss_coef * z_sum
    count, total = sum(len(ids) - prompt for ids, prompt in zip(tokens, prompts, strict=True)), sum(weights)
    return added / (count if config.loss_agg_mode == "token-mean" else len(prompts)), aux_sum / total, z_sum / total


def _loads(model: Any, tokens: list[Tensor], prompts: list[int]) -> list[Tensor]:
    """For each layer with experts, how many tokens that predict a response go to each, [experts] fp64."""
    chosen = [
        [layer[prompt - 1 :].flatten() for layer in _choices(model, ids)]
        for ids, prompt in zip(tokens, prompts, strict=True)
    ]
    number = route_format_of(model).number
    return [torch.cat(layer).bincount(minlength=number).double() for layer in zip(*chosen, strict=True)]


@torch.no_grad()
def routed_experts(model: Any, tokens: list[Tensor]) -> Tensor:
    """What an engine would send of these sequences, one after the other: [all tokens, bytes] uint8."""
    form = route_format_of(model)
    found = []
    for ids in tokens:
        engines = torch.zeros(len(ids) - 1, model.config.num_hidden_layers, form.per_token, dtype=torch.int64)
        engines[:, list(form.layers)] = torch.stack(_choices(model, ids), dim=1)
        found.append(torch.from_numpy(form.packed(engines.numpy(), len(ids))))
    return torch.cat(found)


def route_format_of(model: Any) -> RouteFormat:
    """Of a model whose layers have experts, but for those of mlp_only_layers."""
    config = model.config
    number = getattr(config, "num_experts", None) or config.num_local_experts
    dense = getattr(config, "mlp_only_layers", None) or []
    layers = tuple(layer for layer in range(config.num_hidden_layers) if layer not in dense)
    return RouteFormat(layers, config.num_experts_per_tok, number)


@torch.no_grad()
def _choices(model: Any, ids: Tensor) -> list[Tensor]:
    """For each layer with experts, those of all tokens but the last, [tokens − 1, experts of a token]."""
    scores = model(ids[None, :-1], output_router_logits=True).router_logits
    return [layer.topk(model.config.num_experts_per_tok).indices.view(len(ids) - 1, -1) for layer in scores]
