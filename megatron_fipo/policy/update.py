"""The policy on Megatron-Core: log-probs and updates through its pipeline schedules, the loss on the last stage.

Only the last stage has logits, so log-probs, credit and loss live there, once a micro-batch inside the schedule. What
every stage must know alike — the metrics, whether an update is sound — is combined once an update.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_fipo.algorithm.losses import LossInputs, policy_loss
from megatron_fipo.algorithm.sequences import SequenceLayout
from megatron_fipo.algorithm.statistics import combine, from_vector, metrics, to_vector
from megatron_fipo.config import Config
from megatron_fipo.models.costs import attention_cost
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.policy import platform
from megatron_fipo.policy.agreement import log_prob_differences
from megatron_fipo.policy.credit import CreditRecorder
from megatron_fipo.policy.logprobs import log_probs_and_entropy
from megatron_fipo.policy.micro_batch import BatchLayout, MicroBatch, MiniBatch, TrainerStreams
from megatron_fipo.policy.model import build_model, context_length, uses_transformer_engine
from megatron_fipo.policy.offload import Offload
from megatron_fipo.policy.optimizer import build_optimizer, build_scheduler
from megatron_fipo.policy.plan import plan_micro_batches
from megatron_fipo.policy.precision import token_multiple
from megatron_fipo.policy.reference import ReferenceWeights
from megatron_fipo.policy.rotary import check_rotary_embedding
from megatron_fipo.policy.router_replay import Routes, Routing
from megatron_fipo.policy.wrapping import wrap
from megatron_fipo.records.routes import RouteFormat, route_format
from megatron_fipo.records.rows import TrainBatch
from megatron_fipo.records.streams import LABELS, OLD_LOG_PROBS, REFERENCE_LOG_PROBS, TOKEN_IDS
from megatron_fipo.weights.reshard import check_before_building, load_into

Differences = list[dict[str, Tensor]]
"""Statistics of `agreement.log_prob_differences` for each micro-batch, in order; none but on the last stage."""

LossFunction = Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""(micro-batch, logits) → loss sum, normaliser, statistics; called on the last pipeline stage."""


@dataclass(frozen=True)
class StepLogProbs:
    """What `Policy.log_probs` found."""

    streams: Sequence[TrainerStreams]
    """For each mini-batch, for `Policy.update`."""
    routes: Sequence[Routes | None]
    """For each mini-batch, for `Policy.update`: the experts of its tokens, where they are to be replayed."""
    differences: Differences


class Policy:
    """The model being trained: this rank's chunks of it, its optimizer and its learning-rate schedule."""

    def __init__(self, config: Config, model_config: ModelConfig, model_dir: str | None, updates: int):
        """Build, load and wrap the model. Every rank calls this together, after `start_model_parallel`.

        Args:
            model_dir: Hugging Face directory whose weights to start from; None is random ones, for measurements.
            updates: optimizer updates of the whole run, which a decaying learning rate spans.
        """
        self.config, self.model_config = config, model_config
        if model_dir is not None:
            check_before_building(model_dir, model_config)
        chunks = build_model(config, model_config)
        if model_dir is not None:
            check_rotary_embedding(chunks, model_config, model_dir, context_length(config, model_config))
            load_into(chunks, model_dir, model_config)
        self.megatron_config = chunks[0].config
        self.chunks = wrap(chunks, config)
        self.reference = ReferenceWeights(self.chunks) if config.algorithm.reference_kl_coef > 0 else None
        routes = route_format(model_config.experts) if config.algorithm.router_replay == "rollout" else None
        self.routing = Routing(self.chunks, model_config.experts, config.algorithm, platform.device(), routes)
        self.layout = _layout(config, routes, self.routing.columns)
        # Plain operations ask for the lengths as numbers; on the GPU every layer would wait for them.
        with_te = uses_transformer_engine(config.model)
        self.offsets_device = platform.device() if with_te else torch.device("cpu")
        self.optimizer = build_optimizer(config, self.chunks)
        self.scheduler = build_scheduler(config, self.optimizer, updates)
        self.credit = CreditRecorder() if config.tracking.credit.responses else None
        """Keeps values per token of the responses that batches mark."""
        self.offload = Offload(self.chunks, self.optimizer) if config.rollout.shared_gpu else None
        """Moves its state to host memory and back, where the GPU is used in turns."""
        self.megatron_config.grad_scale_func = self.optimizer.scale_loss
        self.megatron_config.finalize_model_grads_func = finalize_model_grads
        self.forward_backward = get_forward_backward_func()

    def return_to_gpu(self) -> None:
        """Have all of the policy's state on the GPU; nothing unless rollout.shared_gpu moves it away."""
        if self.offload is not None:
            self.offload.bring_all()

    def plan(self, batch: TrainBatch) -> list[list[list[int]]]:
        """For each update of a step, this rank's micro-batches: the places of their sequences in the batch."""
        parallel = self.config.parallel
        tokens = [self.layout.slots([length - 1])[0] for length in batch.lengths]
        mini_batches, start = [], 0
        for size in batch.mini_batch_sizes:
            ranks = plan_micro_batches(
                tokens[start : start + size],
                parallel_state.get_data_parallel_world_size(),
                # A sequence's tokens are spread over the context-parallel ranks.
                parallel.micro_batch_tokens * parallel.context,
                packed=self.layout.packed,
                multiple_of=parallel.pipeline if parallel.virtual_pipeline else 1,
                attention_cost=attention_cost(self.model_config),
            )
            mine = ranks[parallel_state.get_data_parallel_rank()]
            mini_batches.append([[start + index for index in indices] for indices in mine])
            start += size
        return mini_batches

    @torch.no_grad()
    def log_probs(self, mini_batches: Sequence[MiniBatch], *, without_first: bool = False) -> StepLogProbs:
        """The log-probs of a step's tokens under the present weights, and under the reference's where the loss asks.

        Args:
            without_first: leave the first mini-batch's present log-probs to `first_update`. The losses of routers may
                still need a pass over it.
        """
        found: list[list[dict[str, Tensor]]] = []
        routes: list[Routes | None] = []
        differences: Differences = []
        for place, mini_batch in enumerate(mini_batches):
            is_left = place == 0 and without_first
            if not is_left or self.routing.losses.needs_load:
                with self.routing.recording() as recorded:
                    passed = self._run(mini_batch, self._measure, forward_only=True, collect_non_loss_data=True)
            if is_left:
                found.append([{} for _ in mini_batch.plan] if "last" in self.layout.stages else [])
                routes.append(None)
                continue
            routes.append(recorded)
            found.append([{OLD_LOG_PROBS: log_probs} for log_probs, _ in passed])
            differences += [difference for _, difference in passed]
        if self.reference is not None:
            # By the engine's experts too: a divergence is of weights, and 0 before the first update.
            with self.reference.in_place(), self.routing.of_engine():
                for place, mini_batch in enumerate(mini_batches):
                    passed = self._run(mini_batch, self._measure, forward_only=True, collect_non_loss_data=True)
                    for streams, (log_probs, _) in zip(found[place], passed, strict=True):
                        streams[REFERENCE_LOG_PROBS] = log_probs
        return StepLogProbs(found, routes, differences)

    @torch.no_grad()
    def forward(self, mini_batch: MiniBatch, measure: Callable[[MicroBatch, Tensor, bool], Tensor]) -> list[Tensor]:
        """What `measure` makes of each micro-batch's logits under the present weights; none but on the last stage."""
        return self._run(mini_batch, measure, forward_only=True, collect_non_loss_data=True)

    def agreement(self, differences: Differences) -> dict[str, float]:
        """What `agreement.log_prob_differences` names, over a step; every rank calls this.

        The same on every rank.
        """
        reported = self._combine_over_ranks(differences)
        return {name: value for name, value in reported.items() if name.startswith(("log_prob_diff", "behaviour_kl"))}

    def first_update(self, mini_batch: MiniBatch, added: TrainerStreams = ()) -> tuple[dict[str, float], Differences]:
        """The first update of a step, whose own forward pass gives old log-probs: the weights are still those.

        Args:
            added: as for `update`, without `old_log_probs`.

        Returns:
            What `update` returns, and what `log_probs` would have found of the differences to the engine.
        """
        differences: Differences = []
        return self.update(mini_batch, added, partial(self._on_policy_loss, differences)), differences

    def update(
        self,
        mini_batch: MiniBatch,
        added: TrainerStreams = (),
        loss: LossFunction | None = None,
        routes: Routes | None = None,
    ) -> dict[str, float]:
        """One optimizer update.

        An update whose gradient is not finite is left out on every rank alike, and counted in `updates_skipped`. So is
        one with losses of routers and no token in the policy's loss, whose number divides both.

        Args:
            mini_batch: this rank's micro-batches.
            added: the streams that `log_probs` found of them; none if `loss` does without.
            loss: what to minimise beside the losses of routers; the configured policy loss if None.
            routes: the experts that tokens go to; None: those that `log_probs` would record.

        Returns:
            Metrics over all ranks, the same on each.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.scheduler.step(increment=1)  # first, so that a warm-up does not spend an update at rate zero
        with self.routing.updating(routes):
            parts = self._run(mini_batch, loss or self.policy_loss, added, forward_only=False)
        if self.offload is not None:
            self.offload.wait()
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        reported = self._combine_over_ranks(parts)
        sound = math.isfinite(grad_norm) and ("loss" in reported or not self.routing.losses.are_on)
        if sound:
            self._step(grad_norm)
        reported["updates_skipped"] = float(not sound)
        if sound:
            reported["grad_norm"] = grad_norm
        return reported | {"learning_rate": self.optimizer.param_groups[0]["lr"]}

    def _step(self, grad_norm: float) -> None:
        """Clip by the norm that is known, and step: the optimizer's own `step` would work out both anew."""
        clip = self.config.optimizer.clip_grad
        for part in self.optimizer.chained_optimizers:
            parameters = part.get_parameters()
            if parameters and clip > 0:
                clip_grad_by_total_norm_fp32(parameters, max_norm=clip, total_norm=grad_norm)
        self.optimizer.step_with_ready_grads()

    def _run(
        self, mini_batch: MiniBatch, loss_function: Callable[..., Any], added: TrainerStreams = (), **schedule: Any
    ) -> list[Any]:
        """Drive the pipeline schedule over the micro-batches; what the last stage collected, [] on other stages."""

        def forward_step(micro_batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
            micro_batch = next(micro_batches)
            keep_dtype = {"fp32_output": False} if self.megatron_config.bf16 else {}
            with self.routing.forward(model, micro_batch):
                logits = model(
                    micro_batch.streams.get(TOKEN_IDS),  # None where the stage has no embedding to read it
                    micro_batch.position_ids,
                    None,
                    packed_seq_params=_packed_seq_params(micro_batch, self.layout, self.offsets_device),
                    **keep_dtype,
                )
            return logits, partial(loss_function, micro_batch)

        iterators = [mini_batch.with_streams(added) for _ in self.chunks]
        several = len(self.chunks) > 1
        return self.forward_backward(
            forward_step_func=forward_step,
            data_iterator=iterators if several else iterators[0],
            model=self.chunks if several else self.chunks[0],
            num_microbatches=len(mini_batch),
            # Lengths differ by micro-batch (variable_seq_lengths); these two are only the schedule's placeholders.
            seq_length=self.config.parallel.micro_batch_tokens,
            micro_batch_size=1,
            **schedule,
        )

    def label_log_probs(self, micro_batch: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of the micro-batch's labels and the entropy, [rows, local tokens] fp32 each."""
        return log_probs_and_entropy(
            logits,
            micro_batch.streams[LABELS],
            self.model_config.vocab_size,
            self.config.rollout.temperature,
            parallel_state.get_tensor_model_parallel_group(),
            overwrite=True,
        )

    def _measure(
        self, micro_batch: MicroBatch, logits: Tensor, non_loss_data: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_probs, _ = self.label_log_probs(micro_batch, logits)
        return log_probs, log_prob_differences(micro_batch, log_probs)

    def policy_loss(self, micro_batch: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The configured loss of one micro-batch: see `losses.policy_loss`, and LossFunction."""
        return self._loss(micro_batch, *self.label_log_probs(micro_batch, logits))

    def _on_policy_loss(
        self, differences: Differences, micro_batch: MicroBatch, logits: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The same where the weights are those of the old log-probs; `differences` gets what `_measure` would find."""
        log_probs, entropy = self.label_log_probs(micro_batch, logits)
        differences.append(log_prob_differences(micro_batch, log_probs.detach()))
        return self._loss(micro_batch.with_stream(OLD_LOG_PROBS, log_probs.detach()), log_probs, entropy)

    def _loss(
        self, micro_batch: MicroBatch, log_probs: Tensor, entropy: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        inputs = LossInputs(
            log_probs=log_probs,
            streams=micro_batch.streams,
            advantages=micro_batch.advantages,
            response_mask=micro_batch.response_mask,
            response_lengths=micro_batch.response_lengths,
            layout=SequenceLayout(micro_batch.local_lengths, parallel_state.get_context_parallel_group()),
        )
        observe = partial(self.credit.observe, micro_batch, inputs, entropy) if self.credit is not None else None
        loss_sum, normaliser, statistics = policy_loss(inputs, self.config.algorithm, observe)
        statistics["sum/entropy"] = torch.where(micro_batch.response_mask, entropy, 0.0).sum()
        return loss_sum, normaliser, statistics

    @staticmethod
    def _combine_over_ranks(parts: list[dict[str, Tensor]]) -> dict[str, float]:
        """Metrics of the update: one gather over the last stage's ranks, one broadcast down each pipeline."""
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        reported: list[Any] = [None]
        if parts:
            mine = combine(parts)
            vector = to_vector(mine)
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            gathered = [torch.empty_like(vector) for _ in range(group.size())]
            torch.distributed.all_gather(gathered, vector, group=group)
            reported = [metrics(combine([from_vector(row, mine) for row in torch.stack(gathered).cpu()]))]
        torch.distributed.broadcast_object_list(reported, src=last, group=pipeline)
        return reported[0]


def _layout(config: Config, routes: RouteFormat | None, columns: tuple[int, int]) -> BatchLayout:
    """How this rank's micro-batches are laid out."""
    parallel = config.parallel
    packed = parallel.packing
    if packed is None:
        packed = platform.has_cuda() or uses_transformer_engine(config.model)
    stages = {
        "first": parallel_state.is_pipeline_first_stage(ignore_virtual=True),
        "last": parallel_state.is_pipeline_last_stage(ignore_virtual=True),
    }
    return BatchLayout(
        packed=packed,
        pad_multiple=token_multiple(config),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel.context,
        stages=frozenset(name for name, is_here in stages.items() if is_here),
        routes=routes,
        columns=columns,
    )


def _packed_seq_params(micro_batch: MicroBatch, layout: BatchLayout, device: torch.device) -> PackedSeqParams | None:
    """Where packed sequences begin and end, as Megatron-Core's rotary embedding and attention want it."""
    if micro_batch.offsets is None:
        return None
    offsets = micro_batch.offsets.to(device)
    # Where sequences lie in memory, beside where they end. Both are the same here, and Transformer Engine compares them
    # at the cost of a wait; but its context parallelism cannot do without.
    padded = offsets if layout.context_size > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=micro_batch.longest,
        max_seqlen_kv=micro_batch.longest,
    )


def gather_parameters(chunks: list[DistributedDataParallel]) -> None:
    """Complete the weights after the last of several updates, where the next forward pass would gather them.

    Collective over data-parallel ranks. Whoever reads the weights otherwise than by a forward pass needs it first.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
