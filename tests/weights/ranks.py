"""What the multi-process tests of the weights run on each rank."""

import logging
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from safetensors.torch import load_file

from megatron_fipo.config import Config
from megatron_fipo.errors import FipoError
from megatron_fipo.models.model_config import ModelConfig, read_architecture
from megatron_fipo.policy import platform
from megatron_fipo.policy.model import build_model, start_model_parallel
from megatron_fipo.weights import reshard
from megatron_fipo.weights.gather import HeldWeights, exported_tensors, held_parameters
from megatron_fipo.weights.plan import plan

Layout = Sequence[Any]
"""Tensor, pipeline and virtual pipeline size; then the experts' two sizes, if they are not 1."""


def round_trips(
    model_dirs: list[str], checkpoints: dict[str, str], layouts: list[Layout], target: str
) -> dict[str, dict[str, Any]]:
    """Load and save every model under every layout that fits; per model and layout what was seen on this rank.

    `checkpoints` has, by model, what to-megatron made of it.
    """
    platform.start_process_group(60)
    seen: dict[str, dict[str, Any]] = {}
    for layout in layouts:
        tensor = layout[0]
        config = _config(layout)
        start_model_parallel(config.parallel, seed=0)
        for model_dir in map(Path, model_dirs):
            model_config = read_architecture(model_dir)
            if model_config.num_query_groups % tensor:
                continue
            name = "-".join(map(str, (model_dir.name, *layout)))
            chunks = _loaded(config, model_config, model_dir)
            seen[name] = {
                "planned": _as_planned(chunks, model_config, layout),
                "announced": _as_announced(chunks, model_config),
                "logits": _logits_error(chunks, model_dir),
                "unlike checkpoint": _differing(
                    chunks, _loaded(config, model_config, Path(checkpoints[model_dir.name]))
                ),
            }
            reshard.save_huggingface(_wrapped(chunks, config), model_config, model_dir, Path(target, name), 40_000)
        parallel_state.destroy_model_parallel()
    platform.stop_process_group()
    return seen


def errors(model_dirs: dict[str, str], second_rank: dict[str, str], target: str) -> dict[str, str]:
    """Load each directory into the model of the directory named good, at tensor size 2; what was raised or logged.

    `second_rank` names directories that rank 1 sees instead, as on a node with another file system.
    """
    platform.start_process_group(60)
    config = _config((2, 1, None))
    start_model_parallel(config.parallel, seed=0)
    good = model_dirs["good"]
    model_config = read_architecture(good)
    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_fipo").addHandler(handler)
    said = {}
    for case, model_dir in model_dirs.items():
        log.clear()
        chunks = build_model(config, model_config)
        mine = second_rank.get(case, model_dir) if dist.get_rank() == 1 else model_dir
        said[case] = _error(reshard.load_into, chunks, mine, model_config) or "\n".join(log)
    chunks = build_model(config, model_config)
    chunks[0].decoder.layers[1].layer_number = 1  # negative control of the layer offsets
    said["layer twice"] = _error(reshard.load_into, chunks, good, model_config)
    chunks[0].decoder.layers[0].self_attention.extra = torch.nn.Parameter(torch.zeros(3))
    said["unknown parameter"] = _error(reshard.load_into, chunks, good, model_config)
    chunks = build_model(config, model_config)
    occupied = Path(target, "occupied")
    if dist.get_rank() == 0:
        occupied.mkdir()
        (occupied / "file").touch()
    dist.barrier()
    said["target not empty"] = _error(reshard.save_huggingface, chunks, model_config, good, occupied)
    said["target not writable"] = _error(
        reshard.save_huggingface, chunks, model_config, good, occupied / "file" / "target"
    )
    said["no config.json"] = _error(reshard.save_huggingface, chunks, model_config, target, Path(target, "half"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # stands in for a disk that is full
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    said["disk full"] = _error(reshard.save_huggingface, chunks, model_config, good, Path(target, "half full"))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    platform.stop_process_group()
    return said


def differences_from_mbridge(model_dirs: list[str]) -> dict[str, list[str]]:
    """By model the parameters that mbridge, another project, fills otherwise than we do; one process."""
    from mbridge.core.bridge import Bridge

    norms = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
    by_transformer_engine = Bridge._weight_name_mapping_mcore_to_hf

    def by_local_specification(bridge: Any, name: str) -> list[str]:
        parts = name.split(".")
        if parts[-2] in norms:
            return [f"model.layers.{parts[2]}.{norms[parts[-2]]}.weight"]
        return by_transformer_engine(bridge, name)

    Bridge._weight_name_mapping_mcore_to_hf = by_local_specification
    platform.start_process_group(60)
    config = _config((1, 1, None))
    start_model_parallel(config.parallel, seed=0)
    found = {Path(model_dir).name: _differences_from_mbridge(config, model_dir) for model_dir in model_dirs}
    platform.stop_process_group()
    return found


def _differences_from_mbridge(config: Config, model_dir: str) -> list[str]:
    from mbridge import AutoBridge

    model_config = read_architecture(model_dir)
    ours = build_model(config, model_config)
    reshard.load_into(ours, model_dir, model_config)
    theirs = build_model(config, model_config)
    bridge = AutoBridge.from_pretrained(model_dir)
    bridge.dtype = torch.float32
    bridge.load_weights(theirs, model_dir)
    filled = dict(theirs[0].named_parameters())
    assert len(filled) > 20
    return [name for name, value in ours[0].named_parameters() if not torch.equal(value, filled[name])]


def _config(layout: Layout) -> Config:
    config = Config()
    config.model.dtype = "float32"
    config.parallel.tensor, config.parallel.pipeline, config.parallel.virtual_pipeline = layout[:3]
    config.parallel.expert, config.parallel.expert_tensor = layout[3:] or (1, 1)
    return config


def _differing(ours: list[Any], others: list[Any]) -> list[str]:
    """Names of the parameters that differ in any bit between chunks of one shape."""
    pairs = zip(ours, others, strict=True)
    named = [
        (name, value, dict(other.named_parameters())[name])
        for one, other in pairs
        for name, value in one.named_parameters()
    ]
    return [name for name, value, found in named if not torch.equal(value, found)]


def _loaded(config: Config, model_config: ModelConfig, model_dir: Path) -> list[Any]:
    config.model.dtype = "bfloat16" if "bfloat16" in model_dir.name else "float32"
    chunks = build_model(config, model_config)
    for chunk in chunks:
        for parameter in chunk.parameters():
            torch.nn.init.constant_(parameter, torch.nan)  # so that whatever is not loaded shows
    reshard.load_into(_wrapped(chunks, config), model_dir, model_config)
    return chunks


def _wrapped(chunks: list[Any], config: Config) -> list[Any]:
    """As the policy wraps them for training."""
    if config.model.dtype == "bfloat16":
        chunks = [Float16Module(chunk.config, chunk) for chunk in chunks]
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
    return [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]


def _as_planned(chunks: list[Any], model_config: ModelConfig, layout: Layout) -> bool:
    stage = parallel_state.get_pipeline_model_parallel_rank()
    expert, expert_tensor = layout[3:] or (1, 1)
    planned = plan(model_config, *layout[:3], expert_parallel_size=expert, expert_tensor_parallel_size=expert_tensor)
    expert_rank = parallel_state.get_expert_model_parallel_rank()
    expected = {
        item.parameter.megatron: item.local_shape
        for item in planned
        if item.stage == stage and item.expert_rank in (None, expert_rank)
    }
    return expected == {name: tuple(value.shape) for name, value in held_parameters(chunks)}


def _as_announced(chunks: list[Any], model_config: ModelConfig) -> bool:
    """What is gathered, bucket by bucket, is what the plan says, and what is built; buckets have several parameters."""
    weights = HeldWeights(chunks, model_config, bucket_bytes=40_000)
    gathered = [part.gather(index) for part in weights.parts for index in range(part.buckets)]
    found = [(name, tuple(value.shape), value.dtype) for bucket in gathered for name, value in bucket.tensors]
    buckets = [bucket for part in weights.parts for bucket in part.group.buckets]
    planned = [(name, shape, weights.dtype) for bucket in buckets for name, shape in bucket.tensors]
    built = [(info.name, info.shape, info.dtype) for info in exported_tensors(chunks, model_config)]
    if len(weights.parts) > 1:  # experts are sent after the rest
        found, planned, built = sorted(found, key=str), sorted(planned, key=str), sorted(built, key=str)
    return found == planned == built and any(len(bucket.parameters) > 1 for bucket in buckets) and len(buckets) > 1


@torch.no_grad()
def _logits_error(chunks: list[Any], model_dir: Path) -> float | None:
    """Largest difference from transformers' logits, on the last stage; None elsewhere."""
    reference = load_file(model_dir / "reference" / "reference.safetensors")
    tokens = reference["tokens"]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)

    for chunk in chunks:
        chunk.eval()  # in training, experts over tensor-parallel ranks would need sequence parallelism

    def forward_step(_: Any, chunk: Any) -> Any:
        return chunk(tokens, positions, None), lambda output, non_loss_data: output

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None] * len(chunks),
        model=chunks,
        num_microbatches=parallel_state.get_pipeline_model_parallel_world_size(),
        seq_length=tokens.shape[1],
        micro_batch_size=tokens.shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not outputs:
        return None
    logits = tensor_parallel.gather_from_tensor_model_parallel_region(outputs[-1].float())
    expected = reference["logits"]
    return (logits[..., : expected.shape[-1]] - expected).abs().max().item()


def _error(function: Any, *arguments: Any) -> str:
    try:
        function(*arguments)
    except FipoError as error:
        return str(error)
    return ""
