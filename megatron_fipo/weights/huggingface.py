"""Hugging Face model directories on disk, read tensor by tensor; `huggingface_writer` writes them."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_fipo.errors import WeightError
from megatron_fipo.models.model_config import QUANTIZED_REMEDY, ModelConfig
from megatron_fipo.models.parameters import Parameter

_LONGEST_NAME = 255
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SAFETENSORS_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""The types a weight may have, in the format's own order."""

UNUSED = (".rotary_emb.inv_freq",)
"""Endings of tensors that old checkpoints hold and no model reads."""


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

    def sources(self, parameter: Parameter) -> list[Any]:
        """Slices of the tensors of one parameter, in the order of its names; see `slice`."""
        return [self.slice(name) for name in parameter.names]

    def problems(self, table: Iterable[Parameter], model_config: ModelConfig) -> list[str]:
        """What does not fit the table: every tensor missing, left over or of a wrong shape."""
        expected = {name: shape for entry in table for name, shape in zip(entry.names, entry.shapes, strict=True)}
        problems = [
            f"{name}: missing from {self.directory}; expected shape {shape}"
            for name, shape in expected.items()
            if name not in self.tensors
        ]
        for name, info in self.tensors.items():
            if name in expected:
                if info.shape != expected[name]:
                    problems.append(f"{name}: {info.shape} in {self.directory}, {expected[name]} by its config.json")
            elif name == "lm_head.weight" and model_config.tied_embeddings:
                embedding = "model.embed_tokens.weight"
                if embedding in self.tensors and not torch.equal(self.tensor(name), self.tensor(embedding)):
                    problems.append(
                        f"{name}: in {self.directory} it differs from {embedding}, which its config.json ties to it"
                    )
            elif not name.endswith(UNUSED):
                problems.append(
                    f"{name}: left over in {self.directory}, shape {info.shape};"
                    f" {model_config.architecture} has no such"
                )
        return problems

    def slice(self, name: str) -> Any:
        """The named tensor as something to index like a tensor; each indexing reads just that part from the file."""
        return self._files[self._location[name]].get_slice(name)

    def tensor(self, name: str) -> Tensor:
        """The named tensor, whole, on CPU."""
        return self._files[self._location[name]].get_tensor(name)

    def detached_tensor(self, name: str) -> Tensor:
        """Like `tensor`, over a mapping of its own: its pages leave memory with the tensor, not with the reader."""
        path = self.directory / self._location[name]
        try:
            with safe_open(path, framework="pt", device="cpu") as handle:
                return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightError(f"{path}: {name} cannot be read: {error}") from None

    def _read_index(self) -> dict[str, str]:
        path = self.directory / INDEX
        if not path.exists():
            found = (
                ", ".join(sorted(entry.name for entry in self.directory.glob("*.safetensors"))) or "no safetensors file"
            )
            raise WeightError(f"{self.directory} has neither {SINGLE} nor {INDEX}; it holds {found}")
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            if weight_map and all(map(_is_file_name, weight_map.values())):
                return weight_map
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and name.isprintable() and len(os.fsencode(name)) <= _LONGEST_NAME


def _torch_dtype(path: Path, name: str, safetensors_dtype: str) -> torch.dtype:
    if safetensors_dtype not in SAFETENSORS_TYPES:
        supported = ", ".join(SAFETENSORS_TYPES)
        raise WeightError(f"{path}: {name} has type {safetensors_dtype}; supported: {supported} ({QUANTIZED_REMEDY})")
    return SAFETENSORS_TYPES[safetensors_dtype]
