"""What a model's chunks become before they are trained: frozen parts, precision, sums of gradients over ranks."""

from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import TopKRouter

from megatron_fipo.config import Config
from megatron_fipo.policy.precision import check_exact_values


def wrap(chunks: list[Any], config: Config) -> list[DistributedDataParallel]:
    """Megatron-Core's precision and data-parallel wrappers; gradients are reduced in fp32.

    What is to stay as it is gets no gradient, and no place in the optimizer.
    """
    if config.optimizer.freeze_routers:
        for router in (module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)):
            router.requires_grad_(False)
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
