"""The policy on Megatron-Core: log-probs and updates through its pipeline schedules, the loss on the last stage.

Only the last stage has logits, so log-probs, credit and loss live there, once a micro-batch inside the schedule. What
every stage must know alike — the metrics, whether an update is sound — is combined once an update.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_fipo.algorithm.losses import LossInputs, policy_loss
from megatron_fipo.algorithm.sequences import SequenceLayout
from megatron_fipo.algorithm.statistics import combine, from_vector, metrics, to_vector
from megatron_fipo.config import Config
from megatron_fipo.models.costs import attention_cost
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.policy import platform
from megatron_fipo.policy.agreement import log_prob_differences
from megatron_fipo.policy.batches import Cut, MicroBatch, Sequences, build_micro_batch
from megatron_fipo.policy.logprobs import log_probs_and_entropy
from megatron_fipo.policy.model import build_model, context_length, uses_transformer_engine
from megatron_fipo.policy.plan import plan_micro_batches
from megatron_fipo.policy.precision import check_exact_values, optimizer_settings, token_multiple
from megatron_fipo.policy.reference import ReferenceWeights
from megatron_fipo.policy.rotary import check_rotary_embedding
from megatron_fipo.weights.reshard import check_before_building, load_into

MiniBatch = list[MicroBatch]

LossFunction = Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""(micro-batch, logits) → loss sum, normaliser, statistics; called on the last pipeline stage."""


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
        self.chunks = _wrap(chunks, config)
        self.reference = ReferenceWeights(self.chunks) if config.algorithm.reference_kl_coef > 0 else None
        self.cut = _cut(config)
        # Plain operations ask for the lengths as numbers; on the GPU every layer would wait for them.
        with_te = uses_transformer_engine(config.model)
        self.offsets_device = platform.device() if with_te else torch.device("cpu")
        self.optimizer = _build_optimizer(config, self.chunks)
        self.scheduler = _build_scheduler(config, self.optimizer, updates)
        self.megatron_config.grad_scale_func = self.optimizer.scale_loss
        self.megatron_config.finalize_model_grads_func = finalize_model_grads
        self.forward_backward = get_forward_backward_func()

    def plan(self, sequences: Sequences) -> list[MiniBatch]:
        """This rank's micro-batches of each update of a step."""
        parallel, cut = self.config.parallel, self.cut
        tokens = [cut.slots([length - 1])[0] for length in sequences.lengths()]
        mini_batches, start = [], 0
        for size in sequences.mini_batch_sizes:
            ranks = plan_micro_batches(
                tokens[start : start + size],
                parallel_state.get_data_parallel_world_size(),
                # A sequence's tokens are spread over the context-parallel ranks.
                parallel.micro_batch_tokens * parallel.context,
                packed=cut.packed,
                multiple_of=parallel.pipeline if parallel.virtual_pipeline else 1,
                attention_cost=attention_cost(self.model_config),
            )
            mine = ranks[parallel_state.get_data_parallel_rank()]
            mini_batches.append(
                [
                    build_micro_batch(sequences, [start + index for index in indices], cut, platform.device())
                    for indices in mine
                ]
            )
            start += size
        return mini_batches

    @torch.no_grad()
    def score(self, mini_batches: list[MiniBatch]) -> dict[str, float]:
        """Set `old_log_probs` of every micro-batch, on the last pipeline stage, from the present weights.

        And `reference_log_probs` from those that training started from, where the loss has a KL term.

        Returns:
            log_prob_diff_mean and the others of `agreement.log_prob_differences`. The same on every rank; empty if
            there are no sequences.
        """
        parts = []
        for micro_batch, log_probs in self._scored(mini_batches):
            micro_batch.old_log_probs = log_probs
            parts.append(log_prob_differences(micro_batch, log_probs))
        if self.reference is not None:
            with self.reference.in_place():
                for micro_batch, log_probs in self._scored(mini_batches):
                    micro_batch.reference_log_probs = log_probs
        reported = self._combine_over_ranks(parts) if mini_batches else {}
        return {name: value for name, value in reported.items() if name.startswith("log_prob_diff")}

    def update(self, mini_batch: MiniBatch, loss: LossFunction | None = None) -> dict[str, float]:
        """One optimizer update.

        An update whose gradient is not finite is left out on every rank alike, and counted in `updates_skipped`.

        Args:
            mini_batch: this rank's micro-batches, with `old_log_probs` unless `loss` does without.
            loss: what to minimise; the configured policy loss if None.

        Returns:
            Metrics over all ranks, the same on each.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.scheduler.step(increment=1)  # first, so that a warm-up does not spend an update at rate zero
        parts = self._run(mini_batch, loss or self.policy_loss, forward_only=False)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        sound = math.isfinite(grad_norm)
        if sound:
            self._step(grad_norm)
        reported = self._combine_over_ranks(parts) | {"updates_skipped": float(not sound)}
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

    def _run(self, mini_batch: MiniBatch, loss_function: Callable[..., Any], **schedule: Any) -> list[Any]:
        """Drive the pipeline schedule over the micro-batches; what the last stage collected, [] on other stages."""

        def forward_step(micro_batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
            micro_batch = next(micro_batches)
            keep_dtype = {"fp32_output": False} if self.megatron_config.bf16 else {}
            logits = model(
                micro_batch.tokens,
                micro_batch.position_ids,
                None,
                packed_seq_params=_packed_seq_params(micro_batch, self.cut, self.offsets_device),
                **keep_dtype,
            )
            return logits, partial(loss_function, micro_batch)

        iterators = [iter(mini_batch) for _ in self.chunks]
        several = len(self.chunks) > 1
        return self.forward_backward(
            forward_step_func=forward_step,
            data_iterator=iterators if several else iterators[0],
            model=self.chunks if several else self.chunks[0],
            num_microbatches=len(mini_batch),
            # Lengths differ by micro-batch (variable_seq_lengths); these two are only the schedule's placeholders.
            seq_length=mini_batch[0].tokens.shape[1],
            micro_batch_size=mini_batch[0].tokens.shape[0],
            **schedule,
        )

    def _scored(self, mini_batches: list[MiniBatch]) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Each micro-batch with its log-probs under the weights in place; none but on the last pipeline stage."""
        for mini_batch in mini_batches:
            found = self._run(mini_batch, self._collect_log_probs, forward_only=True, collect_non_loss_data=True)
            if found:
                yield from zip(mini_batch, found, strict=True)

    def log_probs(self, micro_batch: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of the micro-batch's labels and the entropy, [rows, local tokens] fp32 each."""
        return log_probs_and_entropy(
            logits,
            micro_batch.labels,
            self.model_config.vocab_size,
            self.config.rollout.temperature,
            parallel_state.get_tensor_model_parallel_group(),
            overwrite=True,
        )

    def _collect_log_probs(self, micro_batch: MicroBatch, logits: Tensor, non_loss_data: bool) -> Tensor:
        return self.log_probs(micro_batch, logits)[0]

    def policy_loss(self, micro_batch: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The configured loss of one micro-batch: see `losses.policy_loss`, and LossFunction."""
        log_probs, entropy = self.log_probs(micro_batch, logits)
        assert micro_batch.old_log_probs is not None, "score() runs before update()"
        inputs = LossInputs(
            log_probs=log_probs,
            old_log_probs=micro_batch.old_log_probs,
            rollout_log_probs=micro_batch.rollout_log_probs,
            advantages=micro_batch.advantages,
            response_mask=micro_batch.response_mask,
            response_lengths=micro_batch.response_lengths,
            reference_log_probs=micro_batch.reference_log_probs,
            layout=SequenceLayout(micro_batch.local_lengths, parallel_state.get_context_parallel_group()),
        )
        loss_sum, normaliser, statistics = policy_loss(inputs, self.config.algorithm)
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


def _cut(config: Config) -> Cut:
    """How this rank's micro-batches are laid out."""
    parallel = config.parallel
    packed = parallel.packing
    if packed is None:
        packed = platform.has_cuda() or uses_transformer_engine(config.model)
    return Cut(
        packed=packed,
        pad_multiple=token_multiple(config),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel.context,
    )


def _packed_seq_params(micro_batch: MicroBatch, cut: Cut, device: torch.device) -> PackedSeqParams | None:
    """Where packed sequences begin and end, as Megatron-Core's rotary embedding and attention want it."""
    if micro_batch.offsets is None:
        return None
    offsets = micro_batch.offsets.to(device)
    # Where sequences lie in memory, beside where they end. Both are the same here, and Transformer Engine compares them
    # at the cost of a wait; but its context parallelism cannot do without.
    padded = offsets if cut.context_size > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=micro_batch.longest,
        max_seqlen_kv=micro_batch.longest,
    )


def _wrap(chunks: list[Any], config: Config) -> list[DistributedDataParallel]:
    """Megatron-Core's precision and data-parallel wrappers; gradients are reduced in fp32."""
    megatron = chunks[0].config
    if megatron.bf16:
        chunks = [Float16Module(megatron, chunk) for chunk in chunks]
    parallel, quantized = config.parallel, config.model.fp8_parameter_gather
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_param_gather=quantized,
        # A gradient that is not finite is found by its norm, and the update left out rather than the run ended.
        check_for_nan_in_grad=False,
    )
    wrapped = [
        DistributedDataParallel(megatron, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    if parallel.overlap_grad_reduce:
        # The schedule holds reductions back by these until the last micro-batch.
        hold_back = [chunk.no_sync for chunk in wrapped]
        megatron.no_sync_func = hold_back if len(hold_back) > 1 else hold_back[0]
    if quantized:
        # They cannot be broadcast, and come from the same files on every rank.
        check_exact_values(wrapped)
    else:
        for chunk in wrapped:
            chunk.broadcast_params()
    return wrapped


def gather_parameters(chunks: list[DistributedDataParallel]) -> None:
    """Complete the weights after the last of several updates, where the next forward pass would gather them.

    Collective over data-parallel ranks. Whoever reads the weights otherwise than by a forward pass needs it first.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _build_optimizer(config: Config, chunks: list[DistributedDataParallel]) -> Any:
    settings = config.optimizer
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=chunks[0].config.bf16,
            params_dtype=chunks[0].config.params_dtype,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            overlap_param_gather=config.parallel.overlap_param_gather,
            **optimizer_settings(config.model),
        ),
        chunks,
    )
    for part in optimizer.chained_optimizers:
        # Moments from the start: a run whose first steps found nothing to train on can be saved too.
        part.init_state_fn(part.optimizer, part.config)
        for group in part.optimizer.param_groups:
            group.setdefault("step", 0)
    return optimizer


def _build_scheduler(config: Config, optimizer: Any, updates: int) -> OptimizerParamScheduler:
    settings = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=min(settings.warmup_updates, max(updates - 1, 0)),
        lr_decay_steps=max(updates, 1),
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # A resumed run keeps its place in the schedule, and takes the schedule from its configuration.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
