"""Runs a few tokens through the same model in Megatron-Core and in transformers, and says where they part.

Three probes, each of a handful of tokens: one token, where no position has any part; the first positions; and positions
over the whole context, which one short sequence holds. The first that fails tells which kind of layer is to blame.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from megatron_fipo.errors import WeightError
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.policy.rotary import probe_positions

TOLERANCE = 1e-4
"""Largest difference of fp32 values, as a share of the largest of them (of 1 if that is smaller)."""
SEQUENCES = 2
NEAR = 8


@dataclass(frozen=True)
class Probe:
    """Tokens at some positions, and what is wrong if this is the first probe that fails."""

    name: str
    positions: tuple[int, ...]
    suspect: str

    def tokens(self, vocab_size: int) -> Tensor:
        """Random token ids [SEQUENCES, positions], the same in every call."""
        shape = (SEQUENCES, len(self.positions))
        return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(len(self.positions)))


Trace = dict[str, Tensor]
"""Values [sequences, positions, width] by the layer that they come out of, in order; the last are logits."""


def probes(model_config: ModelConfig, context: int) -> list[Probe]:
    """The three probes of a model with `context` positions."""
    near, far = tuple(range(min(NEAR, context))), tuple(probe_positions(model_config, context))
    return [
        Probe("one token", (0,), "embedding, norm, value and output projections, MLP or output layer"),
        Probe("the first positions", near, "query and key projections, their norms, or the rotary embedding's base"),
        Probe("the whole context", far, "the rotary embedding's stretching or base"),
    ]


def megatron_trace(model: GPTModel, tokens: Tensor, positions: Sequence[int]) -> Trace:
    """What each layer of a whole model gives for `tokens`, as if they stood at `positions` of one sequence."""

    def move(module: Any, inputs: Any, output: Tensor) -> Tensor:
        # Megatron-Core's rotary embedding counts from 0; these are the same module's rows for other positions.
        return torch.cat([module.get_emb(1, offset=position) for position in positions])

    moving = model.rotary_pos_emb.register_forward_hook(move)
    try:
        with _watched(model.embedding, model.decoder.layers, sequence_first=True) as trace:
            trace["output layer"] = model(tokens, torch.tensor(positions).expand_as(tokens), None).float()
    finally:
        moving.remove()
    return trace


def transformers_trace(model: Any, tokens: Tensor, positions: Sequence[int]) -> Trace:
    """The same of transformers' model."""
    with _watched(model.model.embed_tokens, model.model.layers, sequence_first=False) as trace:
        trace["output layer"] = model(
            tokens,
            position_ids=torch.tensor(positions).expand_as(tokens),
            # Without a mask, positions that do not follow each other are taken for sequences packed into one row.
            attention_mask=torch.ones_like(tokens),
            use_cache=False,
        ).logits.float()
    return trace


def check_traces(found: Sequence[Trace], expected: Sequence[Trace], made: Sequence[Probe]) -> tuple[float, float]:
    """The largest difference of the logits of all probes, and what is allowed of that probe.

    Raises WeightError for the first probe that differs by more, with the first layer whose values do.
    """
    largest = (0.0, TOLERANCE)
    for probe, one, other in zip(made, found, expected, strict=True):
        gap, allowed = _gap(one, other, "output layer")
        if not gap <= allowed:
            raise WeightError(
                f"logits of a probe of {probe.name} differ by {gap:.3g} ({allowed:.3g} allowed), values from "
                f"{_first_difference(one, other)} on; suspected: {probe.suspect}"
            )
        largest = max(largest, (gap, allowed))
    return largest


@contextmanager
def _watched(embedding: nn.Module, layers: Iterable[nn.Module], *, sequence_first: bool) -> Iterator[Trace]:
    """Fills the trace with what the embedding and the layers give, as [sequences, positions, width]."""
    trace: Trace = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            trace[name] = (value.transpose(0, 1) if sequence_first else value).float()

        return hook

    hooks = [embedding.register_forward_hook(keep("the embedding"))]
    hooks += [layer.register_forward_hook(keep(f"layer {index}")) for index, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            yield trace
    finally:
        for hook in hooks:
            hook.remove()


def _first_difference(found: Trace, expected: Trace) -> str:
    """The first layer whose values differ; the logits come last, and do."""
    for name in expected:
        gap, allowed = _gap(found, expected, name)
        if not gap <= allowed:
            break
    return name


def _gap(found: Trace, expected: Trace, name: str) -> tuple[float, float]:
    """The largest difference of one layer's values, and what is allowed; padded tokens are left out."""
    wanted = expected[name]
    gap = float((found[name][..., : wanted.shape[-1]] - wanted).abs().max())
    return gap, TOLERANCE * max(1.0, float(wanted.abs().max()))
