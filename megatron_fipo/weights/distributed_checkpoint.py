"""Megatron-Core's distributed checkpoints on disk (its torch_dist format), read and written a parameter at a time.

Megatron-Core itself loads and saves a model as a whole. Here are the same files without a model: metadata that says in
which chunks of which file a tensor lies, torch.save'd chunks, metadata.json and common.pt. Layers and experts are
stacked: layer i of a parameter is row i of one tensor of the whole model, and expert j is row j of that. Where layers
are not all alike, each has tensors of its own. Norms have Transformer Engine's names.
"""

import io
import json
import math
import os
import pickle
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_fipo.errors import WeightError
from megatron_fipo.files import sync
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.models.parameters import Parameter
from megatron_fipo.weights.checkpoint_metadata import read_metadata
from megatron_fipo.weights.dtypes import dtype_name
from megatron_fipo.weights.formats import METADATA
from megatron_fipo.weights.huggingface import TensorInfo
from megatron_fipo.weights.huggingface_writer import carry_files
from megatron_fipo.weights.layouts import merge
from megatron_fipo.weights.staging import Staging

FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
FORMAT |= {"common_backend_version": 1}
OPTIMIZER_PREFIX = "optimizer."


class CheckpointReader:
    """The tensors of a checkpoint that any layout wrote. Values are read on demand.

    Raises WeightError, naming the file, for a directory that is no such checkpoint, or a damaged one. A context
    manager like `HuggingFaceReader`, though it keeps nothing open.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        try:
            found = json.loads((directory / "metadata.json").read_text())
            self._metadata = read_metadata(directory)
        except (OSError, ValueError) as error:
            raise WeightError(f"{directory} is not a distributed checkpoint, or is damaged: {error}") from None
        except pickle.UnpicklingError as error:
            raise WeightError(
                f"{directory} is not a distributed checkpoint, or is damaged: {METADATA} {error}"
            ) from None
        if found.get("sharded_backend") != FORMAT["sharded_backend"]:
            raise WeightError(f"{directory} is in the format {found.get('sharded_backend')}; torch_dist can be read")
        self._chunks = cache(self._find_chunks)
        self.tensors = {
            key: TensorInfo(key, tuple(entry.size), entry.properties.dtype)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def sources(self, parameter: Parameter) -> list[Tensor]:
        """The Hugging Face tensors of one parameter, whole, in the order of its names."""
        return merge(parameter, [self._read(parameter.stored, tuple(row for row, _ in parameter.rows))])

    def problems(self, table: Iterable[Parameter], model_config: ModelConfig) -> list[str]:
        """What does not fit the table: every tensor missing, left over or of a wrong shape, with both shapes."""
        expected: dict[str, tuple[int, ...]] = {}
        padded: set[str] = set()
        for entry in table:
            expected[entry.stored] = (*(length for _, length in entry.rows), *entry.local_shape(1))
            padded |= {entry.stored} if entry.padded else set()
        groups = model_config.num_query_groups
        # The run's tensor-parallel size is unknown, but it divides the groups, and decides how the vocabulary was
        # padded.
        vocab_sizes = {model_config.padded_vocab_size(size) for size in range(1, groups + 1) if groups % size == 0}
        problems = [
            f"{key}: missing, shape {shape} is expected" for key, shape in expected.items() if key not in self.tensors
        ]
        for key, info in self.tensors.items():
            if key in expected:
                right = expected[key]
                padding = key in padded and info.shape[0] in vocab_sizes and info.shape[1:] == right[1:]
                if info.shape != right and not padding:
                    problems.append(f"{key}: {info.shape} in the checkpoint, {right} by the configuration")
            elif not key.startswith(OPTIMIZER_PREFIX):
                problems.append(f"{key}: left over, shape {info.shape}")
        return problems

    def _find_chunks(self, key: str, leading: int) -> dict[tuple[int, ...], list[ChunkStorageMetadata]]:
        """The chunks of a tensor by row of its first `leading` dimensions; one may be of several rows."""
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        found: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
        for chunk in entry.chunks:
            places = zip(chunk.offsets[:leading], chunk.sizes[:leading], strict=True)
            for rows in product(*(range(offset, offset + size) for offset, size in places)):
                found.setdefault(rows, []).append(chunk)
        return found

    def _read(self, key: str, rows: tuple[int, ...]) -> Tensor:
        """One row of a tensor's first dimensions, or the tensor if there are no `rows`, whole and on CPU."""
        info, leading = self.tensors[key], len(rows)
        shape = info.shape[leading:]
        whole: Tensor | None = None
        count = 0
        for chunk in self._chunks(key, leading).get(rows, []):
            part = self._read_chunk(MetadataIndex(key, chunk.offsets))
            for row, offset in zip(rows, chunk.offsets, strict=False):
                part = part[row - offset]
            if tuple(part.shape) == shape:
                return part
            if whole is None:
                whole = torch.empty(shape, dtype=info.dtype)
            place = whole
            for dimension, offset in enumerate(chunk.offsets[leading:]):
                place = place.narrow(dimension, offset, part.shape[dimension])
            place.copy_(part)
            count += part.numel()
        if whole is None or count != whole.numel():
            raise WeightError(f"{self.directory}: {key} has {count} of {math.prod(shape)} values in its chunks")
        return whole

    def _read_chunk(self, index: MetadataIndex) -> Tensor:
        place = self._metadata.storage_data[index]
        path = self.directory / place.relative_path
        try:
            with path.open("rb") as file:
                view: Any = _FileView(file, place.offset, place.length)
                return torch.load(view, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise WeightError(f"{path} is missing, although {METADATA} names it") from None
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise WeightError(f"{path} is damaged or cut short, at {index.fqn}: {error}") from None


class CheckpointWriter:
    """Writes a checkpoint of a model's weights alone, one file a group of parameters, resumable after each.

    `target` appears in `close`; see `Staging` for what is left otherwise, and for `recipe`. Configuration and tokenizer
    come along from `source_dir`. A context manager. Raises WeightError when `target` exists and is not empty, OSError
    when it cannot be written.
    """

    def __init__(self, source_dir: Path, target: Path, recipe: dict[str, Any]):
        self._source = source_dir
        self._staging = Staging(target, recipe)

    def __enter__(self) -> "CheckpointWriter":
        self._staging.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._staging.__exit__(*exception)

    @property
    def records(self) -> dict[str, Any]:
        """What `write` was given with each group, by an earlier process too."""
        return {name: content["record"] for name, content in self._staging.finished.items()}

    def is_written(self, group: int) -> bool:
        """Whether the group is in the checkpoint, by an earlier process perhaps."""
        return _file_name(group) in self._staging.finished

    def write(self, group: int, parameters: Sequence[Parameter], values: Any, record: Any) -> None:
        """Write a file of some parameters. `values` is an iterator of their whole tensors, taken one at a time.

        `record` is called at the end and gives something JSON-ready to keep with the group.
        """
        name, entries = _file_name(group), []
        with self._staging.unfinished(name).open("wb") as file:
            for parameter in parameters:
                key, rows, tensor = parameter.stored, parameter.rows, next(values)
                dtype = dtype_name(tensor.dtype)
                row = tensor[(None,) * len(rows)]
                entries.append([key, rows, list(row.shape), dtype, *_append(file, row)])
                del tensor, row
                if ".linear_" in key and key.endswith(".weight"):
                    # Every Megatron-Core linear layer looks for extra state, and a layer without FP8 has stored None.
                    extra = f"{key.removesuffix('weight')}_extra_state/{_shard(rows)}"
                    entries.append([extra, None, None, None, *_append(file, [None])])
        self._staging.finish(name, {"entries": entries, "record": record()})

    def close(self) -> None:
        """Write the metadata and the carried files, and put the directory in its place."""
        directory = self._staging.directory
        metadata, dtype = self._collect()
        carry_files(self._source, directory, dtype)
        torch.save({}, directory / "common.pt")
        (directory / METADATA).write_bytes(pickle.dumps(metadata))
        (directory / "metadata.json").write_text(json.dumps(FORMAT))
        for name in ("common.pt", METADATA, "metadata.json"):
            sync(directory / name)
        self._staging.commit()

    def _collect(self) -> tuple[Metadata, torch.dtype]:
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, _StorageInfo] = {}
        for name in sorted(self._staging.finished):
            for key, rows, shape, dtype, offset, length in self._staging.finished[name]["entries"]:
                place = _StorageInfo(name, offset, length)
                if shape is None:
                    tensors[key] = BytesStorageMetadata()
                    places[MetadataIndex(key)] = place
                    continue
                whole = [*(stacked for _, stacked in rows), *shape[len(rows) :]]
                start = torch.Size([*(row for row, _ in rows), *[0] * (len(shape) - len(rows))])
                if key not in tensors:
                    properties = TensorProperties(dtype=getattr(torch, dtype))
                    tensors[key] = TensorStorageMetadata(properties, torch.Size(whole), [])
                tensors[key].chunks.append(ChunkStorageMetadata(start, torch.Size(shape)))
                places[MetadataIndex(key, start)] = place
        dtype = next(entry.properties.dtype for entry in tensors.values() if isinstance(entry, TensorStorageMetadata))
        return Metadata(tensors, storage_data=places), dtype


def _file_name(group: int) -> str:
    return f"__0_{group}.distcp"


def _shard(rows: Sequence[tuple[int, int]]) -> str:
    """How Megatron-Core names an object of a row: by the rows and their numbers, 0 of 1 if there are none."""
    numbers = rows or ((0, 1),)
    return f"shard_{'.'.join(str(row) for row, _ in numbers)}_{'.'.join(str(length) for _, length in numbers)}"


def _append(file: Any, value: Any) -> tuple[int, int]:
    """Where and how long `value` lies in the file, whose end it is written to."""
    start = file.tell()
    if isinstance(value, Tensor) and value.untyped_storage().nbytes() != value.nbytes:
        value = value.clone()  # torch.save would write all of the storage that a view is of
    torch.save(value, file)
    return start, file.tell() - start


class _FileView(io.RawIOBase):
    """A stretch of a file as a file, to read one chunk without a copy of its bytes."""

    def __init__(self, file: Any, start: int, length: int):
        super().__init__()
        self._file, self._start, self._length = file, start, length
        file.seek(0, os.SEEK_END)
        if file.tell() < start + length:
            raise EOFError(f"{start + length} bytes are expected, {file.tell()} are there")
        file.seek(start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell()) - self._start

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._length}[whence]
        self._file.seek(self._start + base + offset)
        return self.tell()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(self._length - self.tell(), 0)]
        return int(self._file.readinto(view))
