"""Between a Hugging Face directory and a Megatron-Core model that lies in shards over tensor and pipeline ranks.

Every function here is collective: all ranks of the run call it, and either all return or all raise the same
WeightError.
"""

import json
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import SafetensorError
from torch import Tensor, nn

from megatron_fipo.errors import WeightError
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.models.parameters import Parameter, check_expert_parallel, check_tensor_parallel, parameters
from megatron_fipo.weights.buckets import Bucket, unpack
from megatron_fipo.weights.distributed_checkpoint import CheckpointReader
from megatron_fipo.weights.gather import HeldWeights, cut_over, expert_ranks, held_parameters
from megatron_fipo.weights.huggingface import HuggingFaceReader, TensorInfo
from megatron_fipo.weights.huggingface_writer import DEFAULT_SHARD_BYTES, HuggingFaceWriter
from megatron_fipo.weights.layouts import cut
from megatron_fipo.weights.ranks import only_rank_0
from megatron_fipo.weights.source import check_source, joined, open_source
from megatron_fipo.weights.staging import check_space
from megatron_fipo.weights.transfer_plan import SenderGroup

SAVE_BUCKET_BYTES = 256 << 20
"""At once in memory while a Hugging Face directory is written, beside the model; a larger parameter is alone."""

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
    expert, expert_tensor = expert_ranks()
    check_expert_parallel(model_config, expert.size(), expert_tensor.size())
    table = parameters(model_config)
    held = list(held_parameters(model_chunks))
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


def save_huggingface(
    model_chunks: Sequence[nn.Module],
    model_config: ModelConfig,
    source_dir: str | Path,
    target_dir: str | Path,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    complete: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Write the model as a Hugging Face directory, from rank 0; the senders send theirs in order, bucket by bucket.

    Configuration and tokenizer come along from `source_dir`, and `complete` adds what else belongs to them.
    `target_dir` appears complete or not at all. Raises WeightError on every rank.
    """
    device = next(model_chunks[0].parameters()).device
    problems: list[str] = []
    weights = writer = None
    try:
        weights = HeldWeights(model_chunks, model_config, SAVE_BUCKET_BYTES)
        if dist.get_rank() == 0:
            infos = [TensorInfo(name, shape, weights.dtype) for name, shape in _planned(weights)]
            writer = HuggingFaceWriter(source_dir, target_dir, infos, max_shard_bytes, complete=complete)
            check_space(writer.target, sum(info.nbytes for info in infos))
    except (OSError, WeightError) as error:
        problems.append(str(error))
    _raise_together(problems, device)
    assert weights is not None
    if writer is not None:
        problems = _write(writer, weights)
    else:
        for part in weights.own:
            for index in range(part.buckets):
                bucket = part.gather(index)
                if part.sends:
                    dist.send(bucket.pack(), dst=0)
    _raise_together(problems, device)


def _planned(weights: HeldWeights) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the whole model's tensors, in the order in which they are written."""
    for group in weights.plan.groups:
        for bucket in group.buckets:
            yield from bucket.tensors


def _write(writer: HuggingFaceWriter, weights: HeldWeights) -> list[str]:
    """On rank 0: write every group's buckets, in order; what went wrong, if anything did."""
    pending = deque((group, index) for group in weights.plan.groups for index in range(len(group.buckets)))
    problems = []
    try:
        with writer:
            while pending:
                for name, tensor in _whole(weights, *pending.popleft()).tensors:
                    writer.add(name, tensor)
            writer.close()
    except (OSError, ValueError, WeightError) as error:
        problems = [f"{writer.target} could not be written: {error}"]
    while pending:  # the ranks that hold it would wait for ever
        _whole(weights, *pending.popleft())
    return problems


def _whole(weights: HeldWeights, group: SenderGroup, index: int) -> Bucket:
    """On rank 0: a bucket of a group of its own, or what another group's sender sends."""
    for part in weights.own:
        if part.group is group:
            return part.gather(index)
    expected = weights.empty(group.buckets[index])
    packed = expected.pack()
    dist.recv(packed, src=group.ranks[0])
    return Bucket(list(unpack(packed, expected.layout())))


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


def _model_problems(held: Sequence[tuple[str, nn.Parameter]], table: Mapping[str, Parameter]) -> list[str]:
    """What of this rank's model does not fit the table."""
    problems = []
    for name, parameter in held:
        if name not in table:
            problems.append(f"{name}: in the Megatron model, but no rule of the architecture fills it")
            continue
        size, shape = cut_over(table[name]).size(), tuple(parameter.shape)
        if shape != (expected := table[name].local_shape(size)):
            problems.append(
                f"{name}: {shape} in the Megatron model, {expected} by config.json at tensor-parallel size {size}"
            )
    return problems


def _check_coverage(names: Sequence[str], table: Mapping[str, Parameter], device: torch.device) -> None:
    """Each parameter of the table lies on exactly one pipeline stage, once, and each expert's on one expert-parallel
    rank of it: compared over all ranks.
    """
    stage, expert_rank = parallel_state.get_pipeline_model_parallel_rank(), expert_ranks()[0].rank()
    stages: dict[str, set[int]] = {}
    expert_places: dict[str, set[int]] = {}
    counts = Counter(names)
    problems = [f"{name}: twice on pipeline stage {stage}" for name in sorted(counts) if counts[name] > 1]
    for text in gather_texts(json.dumps([stage, expert_rank, names]), device):
        other_stage, other_expert_rank, other_names = json.loads(text)
        for name in other_names:
            stages.setdefault(name, set()).add(other_stage)
            if name in table and table[name].expert is not None:
                expert_places.setdefault(name, set()).add(other_expert_rank)
    problems += [
        f"{name}: on no rank of the Megatron model; {', '.join(entry.names)} would be dropped"
        for name, entry in table.items()
        if entry.exported and name not in stages
    ]
    for what, places in (("pipeline stages", stages), ("expert-parallel ranks", expert_places)):
        problems += [f"{name}: on {what} {sorted(found)}" for name, found in places.items() if len(found) > 1]
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
    table: Mapping[str, Parameter],
    reader: HuggingFaceReader | CheckpointReader,
    device: torch.device,
) -> None:
    first_replica = {
        False: parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0,
        True: parallel_state.get_expert_data_parallel_rank() == 0,
    }
    counts: dict[str, int] = {}
    problems = []
    for name, parameter in held:
        entry = table[name]
        group = cut_over(entry)
        try:
            shard = cut(entry, reader.sources(entry), group.rank(), group.size())
        except (SafetensorError, OSError, WeightError) as error:
            problems.append(f"{', '.join(entry.names)}: cannot be read from {reader.directory}: {error}")
            continue
        parameter.copy_(shard)
        _keep_exact(parameter, shard)
        only_copy = entry.exported and (entry.cut is not None or group.rank() == 0)
        if only_copy and first_replica[entry.expert is not None]:
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
