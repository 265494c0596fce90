"""Router replay: the experts that a token went to in the old-log-prob pass are those that it goes to in the updates.

A router takes the largest scores, so that a small change of the weights can send a token to other experts, and its
log-prob jumps. Replayed, the ratio and Δ move by the weights alone: the router still scores, and learns, by the experts
that it is given. Where samples come with the experts that the engine sent their tokens to, the old-log-prob pass
replays those, and chooses by itself where the engine has none. Megatron-Core's router asks an object for its choice,
and knows nothing of micro-batches. The object here does, and so it holds under every schedule, and where layers are
recomputed in the backward pass.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_fipo.config import AlgorithmConfig
from megatron_fipo.models.experts import Experts
from megatron_fipo.policy.micro_batch import MicroBatch, moved
from megatron_fipo.policy.router_losses import RouterLosses
from megatron_fipo.policy.router_statistics import RouterStatistics
from megatron_fipo.records.routes import RouteFormat
from megatron_fipo.records.streams import ROUTED_EXPERTS

Routes = Sequence[Sequence[Tensor]]
"""The experts that tokens went to, by model chunk and micro-batch: [layers of the chunk with experts, local tokens,
experts of a token] int16 on the host. Tokens are in the order in which the routers of this rank see them."""

Choose = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Pass:
    """What is done with the routers' choices while micro-batches go through the model."""

    given: Routes | None = None
    """What routers choose; None: what the engine chose, where that is known, or else by their scores."""
    from_engine: bool = False
    """Whether samples say what the engine chose."""
    compares: bool = False
    """Whether the routers' own choices are compared with the engine's."""
    records: bool = False
    keeps: bool = False
    """Whether the backward pass asks again."""
    counts: bool = False
    """Whether the step's statistics have it."""
    counts_load: bool = False
    """Whether the routers' losses have its load."""


@dataclass(frozen=True)
class Request:
    """What a router does with a micro-batch."""

    given: Tensor | None = None
    """[local tokens, experts of a token] integers; None: the router chooses by its scores."""
    counted: Tensor | None = None
    """[local tokens] bool, those that the statistics have; None: nothing is counted."""
    compared: Tensor | None = None
    """[local tokens] bool, where `given` is the engine's: the tokens that the comparison with it has. For tokens whose
    experts are -1 the router chooses by its scores."""
    load: Tensor | None = None
    """[local tokens] bool: those whose experts are the load of the routers' losses."""
    weights: Tensor | None = None
    """[local tokens] fp32, of the tokens in the routers' losses; None: there are none."""
    keeps: bool = False
    """Whether the backward pass of this micro-batch asks again."""


class Choice:
    """The choice of one router, in the place of Megatron-Core's RouterReplay."""

    def __init__(self, layer: int, statistics: RouterStatistics, losses: RouterLosses) -> None:
        """Free, until a micro-batch begins. `layer` is the router's, from 0, of the whole model."""
        self.layer, self._statistics, self._losses = layer, statistics, losses
        self._request: Request | None = None
        self._keeps = False
        self._kept: deque[tuple[Tensor, Tensor | None]] = deque()
        self._made: Tensor | None = None
        self._weights: Tensor | None = None
        """Of the call that is under way."""

    def begin(self, request: Request) -> None:
        """Begin the forward pass of a micro-batch."""
        self._request, self._keeps = request, request.keeps

    def end(self) -> Tensor:
        """End the forward pass; the experts chosen, [local tokens, experts of a token] int16."""
        made, self._made, self._request = self._made, None, None
        assert made is not None, "the router has not been asked"
        return made

    def look_at(self, router: TopKRouter, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> Any:
        """See what the router's layer dispatches of its choice, and add the router's losses: its forward hook."""
        request, weights = self._request, self._weights
        if request is not None and request.counted is not None and self._made is not None:
            self._statistics.count_dropped(self._made, output[1])
        if weights is None:
            return output
        self._weights = None
        is_first = request is not None
        return self._losses.attach(router, self.layer, inputs[0], output[0], weights, counted=is_first), output[1]

    def forget(self) -> None:
        """Drop what was kept for backward passes that did not come."""
        self._kept.clear()

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: Any, group_topk: Any, default_compute_topk: Choose
    ) -> tuple[Tensor, Tensor]:
        """The scores of the chosen experts and the experts, as Megatron-Core's router asks for them.

        Where layers are recomputed, a call outside a forward pass is a backward pass. Backward passes of a chunk come
        in the order of its forward passes, so the oldest choice is the micro-batch's.

        Args:
            scores: [local tokens, experts] of a floating type.

        Returns:
            [local tokens, topk] of the type of `scores`, differentiable; [local tokens, topk] int64.
        """
        request = self._request
        if request is None and not self._keeps:  # a model that is called by itself, outside of a pass
            return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if request is None:
            made, self._weights = self._kept.popleft()
            return _of(scores, made)
        if request.given is None:
            found, experts = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        else:
            _, own = default_compute_topk(scores.detach(), topk, num_groups=num_groups, group_topk=group_topk)
            found, experts = _of(scores, torch.where(request.given < 0, own, request.given))
            self._compare(request, request.given, own)
        if request.counted is not None:
            self._statistics.count(self.layer, experts, request.counted)
        if request.load is not None:
            self._losses.count(self.layer, experts, request.load)
        self._made, self._weights = experts.to(torch.int16), request.weights
        if self._keeps:
            self._kept.append((self._made, request.weights))
        return found, experts

    def _compare(self, request: Request, given: Tensor, own: Tensor) -> None:
        """Count where the router would choose otherwise than the engine did, or than it did itself before."""
        if request.compared is not None:
            self._statistics.count_mismatch(given, own, request.compared & (given[:, 0] >= 0))
        elif request.counted is not None:
            self._statistics.count_changed(given, own, request.counted)


def _of(scores: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    indices = experts.to(torch.int64)
    return scores.gather(1, indices), indices


@dataclass
class _Chunk:
    """A model chunk's routers, and its micro-batches in the present pass."""

    choices: list[Choice]
    begun: int = 0
    found: list[Tensor] = field(default_factory=list)


class Routing:
    """What the routers of this rank choose. Nothing for a model without experts."""

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        experts: Experts | None,
        algorithm: AlgorithmConfig,
        device: torch.device,
        sampled: RouteFormat | None = None,
    ):
        """Take the place of Megatron-Core's own choice in each router of the chunks.

        `sampled`: what the engine's choices look like, which samples come with; None: they do not.
        """
        self._modules, self._device, self._sampled = list(chunks), device, sampled
        self._replays = algorithm.router_replay != "none"
        self.statistics = RouterStatistics(experts, device)
        """Of the tokens of updates since they were last asked for."""
        self.losses = RouterLosses(algorithm, experts, self.statistics, device)
        self._chunks = [
            _Chunk([_take_over(router, self.statistics, self.losses) for router in _routers(chunk)]) for chunk in chunks
        ]
        layers = [choice.layer for chunk in self._chunks for choice in chunk.choices]
        self.columns = sampled.columns(layers) if sampled is not None else (0, 0)
        """The bytes [start, end) of a token's routed experts that the routers here read."""
        self._pass = _Pass()
        megatron: Any = next((router.config for chunk in chunks for router in _routers(chunk)), None)
        # Where a router is inside what is recomputed, a backward pass asks it again.
        self._asked_again = megatron is not None and (
            megatron.recompute_granularity == "full" or "moe" in (megatron.recompute_modules or ())
        )

    @contextmanager
    def recording(self) -> Iterator[list[list[Tensor]] | None]:
        """A pass without backward before the step's first update.

        The list has its choices afterwards, Routes; None if they are not replayed.
        """
        found: list[list[Tensor]] | None = [] if self._replays else None
        knows, counts_load = self._sampled is not None, self.losses.needs_load
        records = found is not None
        with self._during(_Pass(from_engine=knows, compares=knows, records=records, counts_load=counts_load)):
            yield found
            if found is not None:
                found += [chunk.found for chunk in self._chunks]

    @contextmanager
    def updating(self, given: Routes | None) -> Iterator[None]:
        """A pass with backward, in which routers choose what is given; None: what a recording pass would."""
        from_engine = given is None and self._sampled is not None
        with self._during(
            _Pass(given, from_engine=from_engine, compares=from_engine, keeps=self._asked_again, counts=True)
        ):
            yield

    @contextmanager
    def of_engine(self) -> Iterator[None]:
        """A pass without backward of other weights, in which routers choose what the engine did where it is known."""
        with self._during(_Pass(from_engine=self._sampled is not None)):
            yield

    @contextmanager
    def forward(self, module: nn.Module, micro_batch: MicroBatch) -> Iterator[None]:
        """The forward pass of a chunk's next micro-batch."""
        chunk, present = self._chunks[self._modules.index(module)], self._pass
        given: Sequence[Tensor | None] = [None] * len(chunk.choices)
        if present.given is not None and chunk.choices:
            given = list(moved(present.given[self._modules.index(module)][chunk.begun], self._device))
        elif present.from_engine and chunk.choices:
            given = self._of_engine(chunk, micro_batch)
        chunk.begun += 1
        if chunk.choices:
            response = _in_routers_order(micro_batch.response_mask)
            weights = None
            if present.counts and self.losses.are_on:
                weights = _in_routers_order(self.losses.token_weights(micro_batch))
            request = Request(
                counted=response if present.counts else None,
                compared=response if present.compares else None,
                load=response if present.counts_load else None,
                weights=weights,
                keeps=present.keeps,
            )
            for choice, experts in zip(chunk.choices, given, strict=True):
                choice.begin(replace(request, given=experts))
        yield
        made = [choice.end() for choice in chunk.choices]
        if present.records and made:
            chunk.found.append(torch.stack(made).cpu())

    def _of_engine(self, chunk: _Chunk, micro_batch: MicroBatch) -> list[Tensor]:
        """What the engine chose in each router of the chunk, [local tokens, experts of a token] int16; -1: unknown."""
        assert self._sampled is not None
        values = _in_routers_order(micro_batch.streams[ROUTED_EXPERTS])
        size = self._sampled.item_bytes
        numbers = sum(values[:, place::size].to(torch.int32) << 8 * place for place in range(size))
        experts = torch.where(numbers == 2 ** (8 * size) - 1, -1, numbers).to(torch.int16)
        starts = [self._sampled.columns([choice.layer])[0] - self.columns[0] for choice in chunk.choices]
        return [experts[:, start // size : start // size + self._sampled.per_token] for start in starts]

    @contextmanager
    def _during(self, present: _Pass) -> Iterator[None]:
        for chunk in self._chunks:
            chunk.begun, chunk.found = 0, []
            for choice in chunk.choices:
                choice.forget()
        self._pass = present
        try:
            yield
        finally:
            self._pass = _Pass()


def _routers(chunk: nn.Module) -> list[TopKRouter]:
    """In the order of layers."""
    return [module for module in chunk.modules() if isinstance(module, TopKRouter)]


def _take_over(router: TopKRouter, statistics: RouterStatistics, losses: RouterLosses) -> Choice:
    router.router_replay = choice = Choice(router.layer_number - 1, statistics, losses)
    router.register_forward_hook(choice.look_at)
    return choice


def _in_routers_order(column: Tensor) -> Tensor:
    """[local tokens, …] of [rows, tokens, …]: those of this tensor-parallel rank, whose part of them routers get."""
    group = parallel_state.get_tensor_model_parallel_group()
    return column.transpose(0, 1).chunk(group.size())[group.rank()].flatten(0, 1)
