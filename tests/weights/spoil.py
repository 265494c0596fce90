"""Ways to spoil a model's directory, and a checkpoint's."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def truncate(model: Path) -> None:
    os.truncate(model / "model.safetensors", 30_000)


def lose_a_shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = dict.fromkeys([EMBEDDING], "model-00001-of-00002.safetensors") | {NORM: "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def misshape(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[NORM] = torch.zeros(47)
    del tensors["model.layers.1.input_layernorm.weight"]
    tensors["model.layers.9.input_layernorm.weight"] = torch.zeros(48)
    save_file(tensors, model / "model.safetensors")


def mix_types(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {NORM: tensors[NORM].half()}, model / "model.safetensors")


def other_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))


def shorten(directory: Path) -> None:
    path = directory / "__0_2.distcp"
    os.truncate(path, path.stat().st_size // 2)


def lose_a_file(directory: Path) -> None:
    (directory / "__0_2.distcp").unlink()


def garble(directory: Path) -> None:
    (directory / ".metadata").write_bytes(b"garbage")


class _Harm:
    def __init__(self, function: Any, *arguments: str):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def plant(function: Any, *arguments: str) -> Callable[[Path], object]:
    return lambda directory: (directory / ".metadata").write_bytes(pickle.dumps(_Harm(function, *arguments)))
