"""Writing a Hugging Face model directory tensor by tensor, whole or not at all.

Each tensor goes straight to its place in its shard, since the sizes of all are known before: memory holds one tensor
and not one shard. The shards are what the safetensors library would write, byte for byte.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_fipo.errors import WeightError
from megatron_fipo.files import sync, write_json_atomically
from megatron_fipo.weights.dtypes import dtype_name
from megatron_fipo.weights.huggingface import INDEX, SAFETENSORS_TYPES, SINGLE, TensorInfo
from megatron_fipo.weights.staging import Staging

CARRIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".md"}
CARRIED_NAMES = {"LICENSE", "NOTICE", "USE_POLICY"}
DEFAULT_SHARD_BYTES = 4 << 30


@dataclass
class _Shard:
    """One file and the place of each of its tensors: (first byte after the header, number of bytes)."""

    file_name: str
    header: bytes
    places: dict[str, tuple[int, int]]


class HuggingFaceWriter:
    """Writes a model directory: safetensors shards of at most `max_shard_bytes` (a larger tensor is one alone), index.

    Configuration and tokenizer files come along from `source_dir`. `target_dir` appears in `close`; see `Staging` for
    what is left otherwise, and for `recipe`. Use as a context manager. Raises WeightError when `target_dir` exists and
    is not empty, OSError when it cannot be written.
    """

    def __init__(
        self,
        source_dir: str | Path,
        target_dir: str | Path,
        tensors: Sequence[TensorInfo],
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        recipe: dict[str, Any] | None = None,
        complete: Callable[[Path], None] = lambda directory: None,
    ):
        """`tensors` are all that will be written, in the order in which `add` will be called.

        `complete` is called with the directory before it is put in its place, to write what else belongs into it.
        """
        self.source, self.target = Path(source_dir), Path(target_dir)
        self._shards = _plan(tensors, max_shard_bytes)
        self._shard_of = {name: shard for shard in self._shards for name in shard.places}
        self._info = {info.name: info for info in tensors}
        self._staging = Staging(self.target, recipe)
        self._complete = complete
        self._file: BinaryIO | None = None
        self._awaited: set[str] = set()
        self._records: dict[str, Any] = {}

    def __enter__(self) -> "HuggingFaceWriter":
        self._staging.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            if self._file is not None:
                self._file.close()  # which writes what is buffered, and fails on a full disk
        finally:
            self._staging.__exit__(*exception)

    @property
    def records(self) -> dict[str, Any]:
        """What `add` was given with each tensor written so far, by an earlier process too."""
        return {name: record for shard in self._staging.finished.values() for name, record in shard.items()}

    def is_written(self, name: str) -> bool:
        """Whether the tensor is in a finished shard, so that `add` need not be called."""
        return self._shard_of[name].file_name in self._staging.finished

    def add(self, name: str, tensor: Tensor, record: Any = None) -> None:
        """Write one tensor, from any device; `record` (JSON-ready) is kept with it."""
        info, shard = self._info[name], self._shard_of[name]
        if (tuple(tensor.shape), tensor.dtype) != (info.shape, info.dtype):
            raise WeightError(f"{name}: {tuple(tensor.shape)} {tensor.dtype} came, {info.shape} {info.dtype} was said")
        path = self._staging.unfinished(shard.file_name)
        if self._file is None:
            self._file = path.open("wb")
            self._file.write(shard.header)
            self._awaited, self._records = set(shard.places), {}
        if name not in self._awaited:
            raise WeightError(f"{name} came twice or out of order: {', '.join(sorted(self._awaited))} is awaited")
        self._file.seek(len(shard.header) + shard.places[name][0])
        data: Any = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.write(data)
        self._awaited.remove(name)
        self._records[name] = record
        if not self._awaited:
            self._file.close()
            self._file = None
            self._staging.finish(shard.file_name, self._records)

    def close(self) -> None:
        """Write the index and the carried files, and put the directory in its place. WeightError if tensors lack."""
        missing = [name for name in self._info if not self.is_written(name)]
        if missing:
            raise WeightError(f"{self.target} lacks {len(missing)} tensors, the first is {missing[0]}")
        directory = self._staging.directory
        if len(self._shards) > 1:
            weight_map = {name: shard.file_name for name, shard in self._shard_of.items()}
            total = sum(info.nbytes for info in self._info.values())
            write_json_atomically(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        carry_files(self.source, directory, _main_dtype(self._info.values()))
        self._complete(directory)
        self._staging.commit()


def carry_files(source: Path, directory: Path, dtype: torch.dtype) -> None:
    """Copy configuration and tokenizer files, with `dtype` in config.json: loaders read the type from there."""
    for path in sorted(source.iterdir()):
        carried = path.suffix in CARRIED_SUFFIXES or path.name in CARRIED_NAMES
        if carried and path.is_file() and not path.name.endswith(".index.json") and path.name not in _NOT_CARRIED:
            shutil.copyfile(path, directory / path.name)
            sync(directory / path.name)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype_name(dtype)
    write_json_atomically(directory / "config.json", config)


_NOT_CARRIED = {"manifest.json", "metadata.json", "trainer.json"}
"""What a distributed checkpoint and a training run call their own files."""


def _main_dtype(tensors: Any) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for info in tensors:
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _plan(tensors: Sequence[TensorInfo], max_shard_bytes: int) -> list[_Shard]:
    groups: list[list[TensorInfo]] = []
    size = 0
    for info in tensors:
        if not groups or size + info.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(info)
        size += info.nbytes
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return [_shard(name, group) for name, group in zip(names, groups, strict=True)]


def _shard(file_name: str, tensors: Sequence[TensorInfo]) -> _Shard:
    types = {dtype: (order, name) for order, (name, dtype) in enumerate(SAFETENSORS_TYPES.items())}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, offset = {}, 0
    # The library's order: wide types first, so that every tensor is aligned, and names within a type.
    for info in sorted(tensors, key=lambda info: (-types[info.dtype][0], info.name)):
        places[info.name] = (offset, info.nbytes)
        span = [offset, offset + info.nbytes]
        header[info.name] = {"dtype": types[info.dtype][1], "shape": list(info.shape), "data_offsets": span}
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return _Shard(file_name, len(text).to_bytes(8, "little") + text, places)
