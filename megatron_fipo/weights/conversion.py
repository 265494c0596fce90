"""Hugging Face directory ↔ distributed checkpoint, a parameter at a time: no model is built, Megatron-Core not needed.

Both ways go by the architecture's table. Names and shapes are checked, both ways round, before anything is written; the
target appears complete or not at all, and the same call takes up a conversion that was killed.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.errors import WeightError
from megatron_fipo.models.model_config import ModelConfig, read_architecture
from megatron_fipo.models.parameters import Parameter, parameters
from megatron_fipo.models.rules import LAYER_PREFIX
from megatron_fipo.weights.distributed_checkpoint import CheckpointReader, CheckpointWriter
from megatron_fipo.weights.dtypes import dtype_name
from megatron_fipo.weights.huggingface import HuggingFaceReader, TensorInfo
from megatron_fipo.weights.huggingface_writer import DEFAULT_SHARD_BYTES, HuggingFaceWriter
from megatron_fipo.weights.layouts import cut
from megatron_fipo.weights.source import open_source
from megatron_fipo.weights.staging import check_space

Progress = Callable[[int, int], None]
"""Told the bytes of weights that are done, and those of the whole model."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    tensors: int
    bytes: int
    taken_up: int
    """Bytes that an earlier process had written already."""
    not_finite: dict[str, int]
    """Number of NaN and infinite values by tensor, for those that have any."""


def to_huggingface(
    source: Path,
    target: Path,
    model_dir: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = lambda done, total: None,
    complete: Callable[[Path], None] = lambda directory: None,
) -> Converted:
    """Write the model of a distributed checkpoint of any layout, or of a Hugging Face directory, as the latter.

    Configuration and tokenizer come from `model_dir`, and `complete` adds what else belongs to them. Raises
    WeightError, naming every tensor that does not fit.
    """
    model_config = read_architecture(model_dir)
    table = exported_parameters(model_config)
    made_from: dict[str, Any] = {"from": _fingerprint(source), "model": _fingerprint(model_dir)}
    recipe = {"to": "hf", "dtype": str(dtype), "shard": max_shard_bytes, **made_from}
    with open_source(source) as reader:
        _raise(reader.problems(table, model_config), source)
        infos = [
            TensorInfo(name, shape, dtype or _stored_dtype(reader, entry, name))
            for entry in table
            for name, shape in zip(entry.names, entry.shapes, strict=True)
        ]
        sizes = {info.name: info.nbytes for info in infos}
        total, done = sum(sizes.values()), 0
        with _writing(target), HuggingFaceWriter(model_dir, target, infos, max_shard_bytes, recipe, complete) as writer:
            taken_up = sum(size for name, size in sizes.items() if writer.is_written(name))
            check_space(target, total - taken_up)
            for entry in table:
                if not all(map(writer.is_written, entry.names)):
                    for name, tensor in zip(entry.names, _whole(reader, entry), strict=True):
                        if not writer.is_written(name):
                            tensor = tensor if dtype is None else tensor.to(dtype)
                            writer.add(name, tensor, count_not_finite(tensor))
                done += sum(sizes[name] for name in entry.names)
                progress(done, total)
            counts = writer.records
            writer.close()
    return Converted(len(infos), total, taken_up, {name: count for name, count in counts.items() if count})


def to_megatron(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda done, total: None,
) -> Converted:
    """Write the model of a Hugging Face directory as a distributed checkpoint, for any layout to load.

    Configuration and tokenizer come along. Raises WeightError, naming every tensor that does not fit.
    """
    model_config = read_architecture(source)
    table = exported_parameters(model_config)
    with HuggingFaceReader(source) as reader:
        _raise(reader.problems(table, model_config), source)
        stored_dtype = dtype or _only_dtype(reader, source)
    recipe = {"to": "megatron", "from": _fingerprint(source), "dtype": str(dtype)}
    groups = _groups(table)
    sizes = [sum(map(math.prod, _all_shapes(group))) * stored_dtype.itemsize for group in groups]
    total, done = sum(sizes), 0
    with _writing(target), CheckpointWriter(source, target, recipe) as writer:
        taken_up = sum(size for index, size in enumerate(sizes) if writer.is_written(index))
        check_space(target, total - taken_up)
        for index, group in enumerate(groups):
            if not writer.is_written(index):
                counts: dict[str, int] = {}
                values = _read_group(reader, group, stored_dtype, counts)
                writer.write(index, group, values, lambda counts=counts: counts)
            done += sizes[index]
            progress(done, total)
        not_finite = {name: count for counts in writer.records.values() for name, count in counts.items() if count}
        writer.close()
    return Converted(sum(len(entry.names) for entry in table), total, taken_up, not_finite)


def exported_parameters(model_config: ModelConfig) -> list[Parameter]:
    """The parameters whose tensors a Hugging Face directory holds: all but a tied output layer."""
    return [entry for entry in parameters(model_config).values() if entry.exported]


def differences(checkpoint: Path, directory: Path, dtype: torch.dtype | None = None) -> list[str]:
    """Names of the tensors whose bits differ between a distributed checkpoint and a Hugging Face directory.

    `dtype` is what the one was cast to when the other was made of it.
    """
    found = []
    source = CheckpointReader(checkpoint)
    with HuggingFaceReader(directory) as reader:
        for entry in exported_parameters(read_architecture(directory)):
            for name, tensor in zip(entry.names, source.sources(entry), strict=True):
                other = reader.detached_tensor(name)
                if not _same_bits(tensor.to(dtype or tensor.dtype), other.to(dtype or other.dtype)):
                    found.append(name)
    return found


def _stored_dtype(reader: HuggingFaceReader | CheckpointReader, entry: Parameter, name: str) -> torch.dtype:
    key = entry.stored if isinstance(reader, CheckpointReader) else name
    return reader.tensors[key].dtype


def _whole(reader: HuggingFaceReader | CheckpointReader, entry: Parameter) -> list[Tensor]:
    """The Hugging Face tensors of one parameter, in the order of its names."""
    if isinstance(reader, CheckpointReader):
        return reader.sources(entry)
    return [reader.detached_tensor(name) for name in entry.names]


def count_not_finite(tensor: Tensor) -> int:
    """Number of NaN and infinite values, found in pieces, so that no second tensor of its size is made."""
    return sum(int(piece.isfinite().logical_not().sum()) for piece in tensor.reshape(-1).split(_CHUNK))


def _read_group(
    reader: HuggingFaceReader, group: Iterable[Parameter], dtype: torch.dtype, counts: dict[str, int]
) -> Iterator[Tensor]:
    for entry in group:
        tensors = [reader.detached_tensor(name) for name in entry.names]
        counts |= {name: count_not_finite(tensor) for name, tensor in zip(entry.names, tensors, strict=True)}
        joined = cut(entry, tensors, 0, 1).to(dtype)
        del tensors
        yield joined


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal type, shape and bits: NaN equals itself, and 0 is not -0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _groups(table: Iterable[Parameter]) -> list[list[Parameter]]:
    """What goes into one file: each layer, and each parameter outside layers."""
    groups: dict[str, list[Parameter]] = {}
    for entry in table:
        name = entry.megatron
        if name.startswith(LAYER_PREFIX):
            name = name.removeprefix(LAYER_PREFIX).split(".", 1)[0]
        groups.setdefault(name, []).append(entry)
    return list(groups.values())


def _all_shapes(group: Iterable[Parameter]) -> list[tuple[int, ...]]:
    return [shape for entry in group for shape in entry.shapes]


def _only_dtype(reader: HuggingFaceReader, source: Path) -> torch.dtype:
    dtypes = {info.dtype for info in reader.tensors.values()}
    if len(dtypes) > 1:
        names = ", ".join(sorted(map(dtype_name, dtypes)))
        raise WeightError(f"{source} mixes the types {names}; choose one with --dtype")
    return dtypes.pop()


def _raise(problems: list[str], source: Path) -> None:
    if problems:
        raise WeightError("\n  ".join([f"{source} does not fit its configuration:", *problems]))


def _fingerprint(directory: Path) -> list[Any]:
    """What tells whether a source is still the same: its path, and its files' names, sizes and times."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return [str(directory.resolve()), states]


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turns what the file system says into a WeightError that names the target."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises the latter when a write of its own fails
        raise WeightError(f"{target} could not be written: {error}") from error
