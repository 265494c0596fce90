"""Between a Hugging Face directory and a Megatron-Core model that lies in shards over tensor and pipeline ranks.

Every function here is collective: all ranks of the run call it, and either all return or all raise the same
WeightError.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.utils import unwrap_model
from safetensors import SafetensorError
from torch import Tensor, nn

from megatron_fipo.errors import WeightError
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.models.parameters import Parameter, canonical_name, check_tensor_parallel, parameters
from megatron_fipo.models.rules import LAYER_PREFIX
from megatron_fipo.weights.distributed_checkpoint import CheckpointReader
from megatron_fipo.weights.huggingface import HuggingFaceReader, TensorInfo
from megatron_fipo.weights.huggingface_writer import DEFAULT_SHARD_BYTES, HuggingFaceWriter
from megatron_fipo.weights.layouts import cut, merge
from megatron_fipo.weights.ranks import only_rank_0
from megatron_fipo.weights.source import check_source, joined, open_source
from megatron_fipo.weights.staging import check_space

logger = logging.getLogger(__name__)


def check_before_building(model_dir: str | Path, model_config: ModelConfig) -> None:
    """`check_source` on rank 0; its refusal on every rank."""
    only_rank_0(lambda: check_source(model_dir, model_config))


def load_into(model_chunks: Sequence[nn.Module], model_dir: str | Path, model_config: ModelConfig) -> None:
    """Fill this rank's parameters from a Hugging Face directory or from the model of a distributed checkpoint.

    Of the first each rank reads just its own part of each tensor, of the second one whole parameter at a time.
    `model_chunks` are this stage's GPTModels, bare or wrapped, of any floating type. Call it before the optimizer is
    built, which takes its master copy from the parameters. Raises WeightError on every rank, naming every tensor that
    is missing, left over or of a wrong shape on either side. NaN and infinite values are loaded, counted and warned
    of.
    """
    check_tensor_parallel(model_config, parallel_state.get_tensor_model_parallel_world_size())
    table = parameters(model_config)
    held = list(_held(model_chunks))
    device = held[0][1].device
    problems = _model_problems(held, table)
    reader: HuggingFaceReader | CheckpointReader | None = None
    try:
        reader = open_source(model_dir)
        problems += reader.problems([entry for entry in table.values() if entry.exported], model_config)
    except WeightError as error:
        problems.append(str(error))
    _raise_together(problems, device)
    _check_coverage([name for name, _ in held], table, device)
    assert reader is not None
    with reader:
        _copy(held, table, reader, device)


def exported_tensors(model_chunks: Sequence[nn.Module], model_config: ModelConfig) -> list[TensorInfo]:
    """Names, full shapes and types of what `export` yields on this stage, in its order, without any communication."""
    return [
        TensorInfo(name, shape, tensor.dtype)
        for entry, tensor in _exported(model_chunks, model_config)
        for name, shape in zip(entry.names, entry.shapes, strict=True)
    ]


def export(model_chunks: Sequence[nn.Module], model_config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """This pipeline stage's tensors by their Hugging Face names, whole, on the parameters' device and in their type.

    Embedding first, then layer by layer; a tied output layer is left out. Every rank of the tensor-parallel group has
    to consume the iterator: it gathers each parameter once, when its turn comes. A yielded tensor may share memory
    with the model: use it before the next optimizer update.
    """
    size = parallel_state.get_tensor_model_parallel_world_size()
    for entry, held in _exported(model_chunks, model_config):
        tensor = dequantize_fp8_tensor(held) if is_float8tensor(held) else held
        shards: Sequence[Tensor] = [tensor]
        if entry.cut is not None and size > 1:
            gathered = tensor.new_empty((size * tensor.shape[0], *tensor.shape[1:]))
            group = parallel_state.get_tensor_model_parallel_group()
            dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=group)
            shards = gathered.chunk(size)
        yield from zip(entry.names, merge(entry, shards), strict=True)


def save_huggingface(
    model_chunks: Sequence[nn.Module],
    model_config: ModelConfig,
    source_dir: str | Path,
    target_dir: str | Path,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    complete: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Write the model as a Hugging Face directory, from rank 0; the stages send theirs in order, one tensor at a time.

    Configuration and tokenizer come along from `source_dir`, and `complete` adds what else belongs to them.
    `target_dir` appears complete or not at all. Raises WeightError on every rank.
    """
    device = next(model_chunks[0].parameters()).device
    stages = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    listings = [
        json.loads(text) for text in gather_texts(_listing(exported_tensors(model_chunks, model_config)), device)
    ]
    listed = {name for rank in stages for name, _, _ in listings[rank]}
    expected = (name for entry in parameters(model_config).values() for name in entry.names)
    problems = [f"{name}: on no pipeline stage, so it cannot be saved" for name in expected if name not in listed]
    writer = None
    if dist.get_rank() == 0:
        try:
            infos = [
                TensorInfo(name, tuple(shape), getattr(torch, dtype))
                for rank in stages
                for name, shape, dtype in listings[rank]
            ]
            writer = HuggingFaceWriter(source_dir, target_dir, infos, max_shard_bytes, complete=complete)
            check_space(writer.target, sum(info.nbytes for info in infos))
        except (OSError, WeightError) as error:
            problems.append(str(error))
    _raise_together(problems, device)
    if writer is not None:
        problems = _write(writer, _all_stages(model_chunks, model_config, stages, listings, device))
    elif parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        group = parallel_state.get_pipeline_model_parallel_group()
        sends = parallel_state.get_tensor_model_parallel_rank() == 0
        for _, tensor in export(model_chunks, model_config):
            if sends and dist.get_rank() != stages[0]:
                dist.send(tensor.contiguous(), dst=stages[0], group=group)
    _raise_together(problems, device)


def _all_stages(
    model_chunks: Sequence[nn.Module],
    model_config: ModelConfig,
    stages: Sequence[int],
    listings: Sequence[Sequence[tuple[str, Sequence[int], str]]],
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """On the first stage: its own tensors, then what each later stage sends, in the order that it listed."""
    yield from export(model_chunks, model_config)
    group = parallel_state.get_pipeline_model_parallel_group()
    for sender in stages[1:]:
        for name, shape, dtype in listings[sender]:
            tensor = torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=device)
            dist.recv(tensor, src=sender, group=group)
            yield name, tensor


def _write(writer: HuggingFaceWriter, tensors: Iterator[tuple[str, Tensor]]) -> list[str]:
    """Write them all; what went wrong, if anything did."""
    try:
        with writer:
            for name, tensor in tensors:
                writer.add(name, tensor)
            writer.close()
    except (OSError, ValueError, WeightError) as error:
        for _ in tensors:  # the other stages are still sending, and would wait for ever
            pass
        return [f"{writer.target} could not be written: {error}"]
    return []


def gather_texts(text: str, device: torch.device) -> list[str]:
    """Every rank's text, by rank. It travels as plain bytes, since unpickling what arrives would run it."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
    world = dist.get_world_size()
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(lengths, torch.tensor([data.numel()], device=device))
    longest = int(max(lengths))
    padded = torch.nn.functional.pad(data, (0, longest - data.numel()))
    received = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(received, padded)
    return [bytes(part[: int(size)].tolist()).decode() for part, size in zip(received, lengths, strict=True)]


def _held(model_chunks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters by the names of `parameters`."""
    for chunk in unwrap_model(list(model_chunks)):
        for name, parameter in chunk.named_parameters():
            layer = None
            if name.startswith(LAYER_PREFIX):
                index = int(name.removeprefix(LAYER_PREFIX).split(".", 1)[0])
                layer = chunk.decoder.layers[index].layer_number - 1  # Megatron-Core counts the whole model from 1
            yield canonical_name(name, layer), parameter


def _exported(model_chunks: Sequence[nn.Module], model_config: ModelConfig) -> list[tuple[Parameter, Tensor]]:
    table = parameters(model_config)
    held = {name: parameter.detach() for name, parameter in _held(model_chunks)}
    unknown = held.keys() - table.keys()
    if unknown:
        raise WeightError(f"no rule of {model_config.architecture} exports {', '.join(sorted(unknown))}")
    return [(entry, held[name]) for name, entry in table.items() if name in held and entry.exported]


def _model_problems(held: Sequence[tuple[str, nn.Parameter]], table: dict[str, Parameter]) -> list[str]:
    """What of this rank's model does not fit the table."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    problems = []
    for name, parameter in held:
        if name not in table:
            problems.append(f"{name}: in the Megatron model, but no rule of the architecture fills it")
        elif tuple(parameter.shape) != (expected := table[name].local_shape(size)):
            shape = tuple(parameter.shape)
            problems.append(
                f"{name}: {shape} in the Megatron model, {expected} by config.json at tensor-parallel size {size}"
            )
    return problems


def _check_coverage(names: Sequence[str], table: dict[str, Parameter], device: torch.device) -> None:
    """Each parameter of the table lies on exactly one pipeline stage, once: compared over all ranks."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    stages: dict[str, set[int]] = {}
    problems = [f"{name}: twice on pipeline stage {stage}" for name in sorted(set(names)) if names.count(name) > 1]
    for text in gather_texts(json.dumps([stage, names]), device):
        other_stage, other_names = json.loads(text)
        for name in other_names:
            stages.setdefault(name, set()).add(other_stage)
    problems += [
        f"{name}: on no rank of the Megatron model; {', '.join(entry.names)} would be dropped"
        for name, entry in table.items()
        if entry.exported and name not in stages
    ]
    problems += [f"{name}: on pipeline stages {sorted(found)}" for name, found in stages.items() if len(found) > 1]
    _raise_together(problems, device)


def _raise_together(problems: Sequence[str], device: torch.device) -> None:
    """Raise one WeightError on every rank if any rank has a problem; say which ranks unless all of them have it."""
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(gather_texts(json.dumps(list(problems)), device)):
        for problem in json.loads(text):
            ranks.setdefault(problem, []).append(rank)
    if ranks:
        everywhere = dist.get_world_size()
        lines = [
            problem if len(found) == everywhere else f"{problem} (rank {', '.join(map(str, found))})"
            for problem, found in ranks.items()
        ]
        raise WeightError(joined(lines))


@torch.no_grad()
def _copy(
    held: Sequence[tuple[str, nn.Parameter]],
    table: dict[str, Parameter],
    reader: HuggingFaceReader | CheckpointReader,
    device: torch.device,
) -> None:
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    counts: dict[str, int] = {}
    problems = []
    for name, parameter in held:
        entry = table[name]
        try:
            shard = cut(entry, reader.sources(entry), rank, size)
        except (SafetensorError, OSError, WeightError) as error:
            problems.append(f"{', '.join(entry.names)}: cannot be read from {reader.directory}: {error}")
            continue
        parameter.copy_(shard)
        _keep_exact(parameter, shard)
        only_copy = entry.exported and (entry.cut is not None or rank == 0)
        if only_copy and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
            counts[", ".join(entry.names)] = int(shard.isfinite().logical_not().sum())
    _raise_together(problems, device)
    _warn_of_non_finite(counts, device)


def _keep_exact(parameter: nn.Parameter, shard: Tensor) -> None:
    """Give an FP8 parameter its exact values too, from which Megatron-Core's optimizer makes its master copy.

    Transformer Engine keeps those that it was initialised with beside the rounded ones until then.
    """
    exact = getattr(parameter, "get_high_precision_init_val", lambda: None)()
    if exact is not None:
        exact.copy_(shard)


def _warn_of_non_finite(counts: dict[str, int], device: torch.device) -> None:
    total: dict[str, int] = {}
    for text in gather_texts(json.dumps({names: count for names, count in counts.items() if count}), device):
        for names, count in json.loads(text).items():
            total[names] = total.get(names, 0) + count
    if total and dist.get_rank() == 0:
        listing = "; ".join(f"{count} in {names}" for names, count in total.items())
        logger.warning("%d NaN or infinite values in the loaded weights: %s", sum(total.values()), listing)


def _listing(tensors: Sequence[TensorInfo]) -> str:
    return json.dumps([(info.name, info.shape, str(info.dtype).removeprefix("torch.")) for info in tensors])
