"""Hugging Face model directories on disk: read tensor by tensor, written whole or not at all."""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_fipo.errors import WeightError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARRIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".md"}
CARRIED_NAMES = {"LICENSE", "NOTICE", "USE_POLICY"}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor without its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class HuggingFaceReader:
    """The tensors of a model directory, one safetensors file or shards with an index. Values are read on demand.

    Raises WeightError, naming the file, for a directory without safetensors, a missing or truncated shard, or an index
    that disagrees with its shards. Use as a context manager: it keeps the files open.
    """

    def __init__(self, model_dir: str | Path):
        self.directory = Path(model_dir)
        self._files: dict[str, Any] = {}
        self._location: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        single = (self.directory / SINGLE).exists()  # which transformers prefers, too
        index = {} if single else self._read_index()
        for file_name in [SINGLE] if single else sorted(set(index.values())):
            self._open(file_name)
        misplaced = [name for name, file_name in index.items() if self._location.get(name) != file_name]
        if misplaced:
            listing = "\n".join(f"  {name}: expected in {index[name]}" for name in sorted(misplaced))
            raise WeightError(f"{self.directory / INDEX} names tensors that are not in their shards:\n{listing}")

    def __enter__(self) -> "HuggingFaceReader":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._files.values():
            handle.__exit__(None, None, None)
        self._files.clear()

    def slice(self, name: str) -> Any:
        """The named tensor as something to index like a tensor; each indexing reads just that part from the file."""
        return self._files[self._location[name]].get_slice(name)

    def tensor(self, name: str) -> Tensor:
        """The named tensor, whole, on CPU."""
        return self._files[self._location[name]].get_tensor(name)

    def _read_index(self) -> dict[str, str]:
        path = self.directory / INDEX
        if not path.exists():
            found = (
                ", ".join(sorted(entry.name for entry in self.directory.glob("*.safetensors"))) or "no safetensors file"
            )
            raise WeightError(f"{self.directory} has neither {SINGLE} nor {INDEX}; it holds {found}")
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            if weight_map and all(Path(file_name).name == file_name for file_name in weight_map.values()):
                return weight_map
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightError(f"{path} is not a safetensors index: {type(error).__name__}: {error}") from None
        raise WeightError(f"{path} must map each tensor to a file beside it")

    def _open(self, file_name: str) -> None:
        path = self.directory / file_name
        try:
            handle = safe_open(path, framework="pt", device="cpu").__enter__()
        except FileNotFoundError:
            raise WeightError(f"{path} is missing, although {INDEX} names it") from None
        except (SafetensorError, OSError) as error:
            raise WeightError(f"{path} is damaged or cut short: {error}") from None
        self._files[file_name] = handle
        for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no dictionary)
            if name in self._location:
                raise WeightError(f"{name} is in both {self._location[name]} and {file_name} of {self.directory}")
            self._location[name] = file_name
            part = handle.get_slice(name)
            self.tensors[name] = TensorInfo(name, tuple(part.get_shape()), _torch_dtype(path, name, part.get_dtype()))


class HuggingFaceWriter:
    """Writes a model directory: safetensors shards of at most `max_shard_bytes` (a larger tensor is one alone), index.

    Configuration and tokenizer files come along from `source_dir`. All is written beside `target_dir`, which appears
    by one rename in `close`; without `close` nothing appears, and leaving the context removes what was written. Use as
    a context manager. Raises WeightError when `target_dir` exists and is not empty.
    """

    def __init__(self, source_dir: str | Path, target_dir: str | Path, max_shard_bytes: int = 4 << 30):
        self.source, self.target = Path(source_dir), Path(target_dir)
        self.max_shard_bytes = max_shard_bytes
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            raise WeightError(f"{self.target} exists and is not empty; choose a new directory")
        self._staging = Path()
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._dtypes: dict[torch.dtype, int] = {}

    def __enter__(self) -> "HuggingFaceWriter":
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._staging = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.partial-", dir=self.target.parent))
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor, copied to CPU memory until its shard is full."""
        size = tensor.numel() * tensor.dtype.itemsize
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += size
        self._total_bytes += size
        self._dtypes[tensor.dtype] = self._dtypes.get(tensor.dtype, 0) + tensor.numel()

    def close(self) -> None:
        """Write the last shard, the index and the carried files, and put the directory in its place."""
        self._flush()
        weight_map = {}
        count = len(self._shards)
        for number, names in enumerate(self._shards, start=1):
            file_name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._shard_path(number).rename(self._staging / file_name)
            weight_map.update(dict.fromkeys(names, file_name))
        if count > 1:
            _write_json(
                self._staging / INDEX, {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            )
        self._carry_files()
        self._staging.chmod(0o755)
        _sync(self._staging)
        self._staging.rename(self.target)
        _sync(self.target.parent)

    def _flush(self) -> None:
        if not self._pending:
            return
        self._shards.append(list(self._pending))
        path = self._shard_path(len(self._shards))
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(0o644)
        _sync(path)
        self._pending = {}
        self._pending_bytes = 0

    def _shard_path(self, number: int) -> Path:
        return self._staging / f"shard-{number:05d}.safetensors"

    def _carry_files(self) -> None:
        for path in sorted(self.source.iterdir()):
            carried = path.suffix in CARRIED_SUFFIXES or path.name in CARRIED_NAMES
            if carried and path.is_file() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, self._staging / path.name)
                _sync(self._staging / path.name)
        config_path = self._staging / "config.json"
        config = json.loads(config_path.read_text(encoding="utf-8"))
        dtype = str(max(self._dtypes, key=lambda dtype: self._dtypes[dtype])).removeprefix("torch.")
        # Loaders read the type from here: with the source's bfloat16, float32 weights would be rounded in silence.
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
        _write_json(config_path, config)


def _torch_dtype(path: Path, name: str, safetensors_dtype: str) -> torch.dtype:
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if safetensors_dtype not in dtypes:
        raise WeightError(f"{path}: {name} has type {safetensors_dtype}; supported: {', '.join(dtypes)}")
    return dtypes[safetensors_dtype]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
