"""Stored weights against config.json before anything is built, and what transformers makes of the directory.

Why: quantised weights under names that fit would be trained as if they were plain ones, and sizes that are wrong would
be built first, filling the memory. Does not cover values: loading counts what is not finite.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_fipo.errors import ConfigError, WeightError
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.models.parameters import parameters
from megatron_fipo.preflight import _check_stored_weights, _transformers_shapes
from megatron_fipo.weights.source import check_source
from megatron_fipo.weights.transformers_model import rotary_frequencies, transformers_config
from tests.models.small_configs import MODELS

DOWN = "model.layers.1.mlp.down_proj.weight"


def write(directory: Path, spoil: Callable[[dict[str, torch.Tensor]], None], **changes: Any) -> Path:
    """A directory with weights of zeros for MODELS["qwen2"]; `changes` go into config.json afterwards."""
    (directory / "config.json").write_text(json.dumps(MODELS["qwen2"]))
    tensors = {
        name: torch.zeros(shape)
        for entry in parameters(read_architecture(directory)).values()
        for name, shape in zip(entry.names, entry.shapes, strict=True)
    }
    spoil(tensors)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(MODELS["qwen2"] | changes))
    return directory


def set_to(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


def nothing(tensors: dict[str, torch.Tensor]) -> None:
    pass


def test_weights_that_fit_are_accepted(tmp_path: Path) -> None:
    check_source(write(tmp_path, set_to("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8))), read(tmp_path))


def read(directory: Path) -> Any:
    return read_architecture(directory)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        (DOWN, torch.zeros(64, 96, dtype=torch.float8_e4m3fn), "has type F8_E4M3"),
        (DOWN, torch.zeros(64, 96, dtype=torch.float8_e5m2), "has type F8_E5M2"),
        (DOWN, torch.zeros(64, 96, dtype=torch.int8), "has type I8"),
        (DOWN.replace("weight", "qweight"), torch.zeros(12, 64, dtype=torch.int32), "has type I32"),
        (DOWN.replace("weight", "scales"), torch.zeros(1, 64), "left over"),
        (DOWN + "_scale", torch.zeros(1), "left over"),
        (DOWN.replace("weight", "bias"), torch.zeros(64), "left over"),
        (DOWN.replace("weight", "lora_A.weight"), torch.zeros(8, 96), "left over"),
        (DOWN, torch.zeros(96, 64), r"\(96, 64\) in .*, \(64, 96\) by its config.json"),
    ],
)
def test_tensors_that_do_not_fit_are_one_line_each(tmp_path: Path, name: str, tensor: torch.Tensor, said: str) -> None:
    """In training as in preflight."""
    write(tmp_path, set_to(name, tensor))
    for check in (
        lambda: check_source(tmp_path, read(tmp_path)),
        lambda: _check_stored_weights(tmp_path, read(tmp_path)),
    ):
        with pytest.raises(WeightError, match=said) as error:
            check()
        assert name in str(error.value) and "\n" not in str(error.value)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write(tmp_path, lambda tensors: tensors.__delitem__(DOWN))
    with pytest.raises(WeightError, match=f"^{DOWN}: missing from"):
        check_source(tmp_path, read(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 999}, {"vocab_size": 2**24}, {"intermediate_size": 2**24}, {"tie_word_embeddings": True}],
    ids=str,
)
def test_sizes_that_the_weights_do_not_have_are_noticed_without_building(tmp_path: Path, changes: dict) -> None:
    """Some would take gigabytes to build. A tied output layer must equal the embedding: these are zeros."""
    write(tmp_path, set_to("lm_head.weight", torch.ones(50, 64)), **changes)
    with pytest.raises(WeightError, match=r"missing|by its config\.json|which its config.json ties to it"):
        check_source(tmp_path, read(tmp_path))


def test_a_directory_without_weights_is_for_preflight_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["qwen2"]))
    _check_stored_weights(tmp_path, read(tmp_path))
    with pytest.raises(WeightError, match=r"neither model\.safetensors nor"):
        check_source(tmp_path, read(tmp_path))


@pytest.mark.parametrize(
    ("changes", "named"), [({"use_cache": "perhaps"}, "use_cache"), ({"pad_token_id": 1000}, "Padding_idx")], ids=str
)
def test_what_transformers_alone_refuses_is_one_line(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    """Keys that change nothing that Megatron-Core computes, but that the servers could not start with."""
    write(tmp_path, nothing, **changes)
    read_architecture(tmp_path)
    with pytest.raises(ConfigError, match=rf"transformers refuses .*config\.json: .*{named}") as error:
        _transformers_shapes(tmp_path)
    assert "\n" not in str(error.value)


def test_a_model_without_a_type_is_refused_by_transformers(tmp_path: Path) -> None:
    config = {key: value for key, value in MODELS["qwen2"].items() if key != "model_type"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="model_type"):
        transformers_config(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_frequencies_are_those_of_its_model(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    model = AutoModelForCausalLM.from_config(transformers_config(tmp_path))
    frequencies, scale = rotary_frequencies(tmp_path, 127)
    assert torch.equal(frequencies, model.model.rotary_emb.inv_freq) and scale == 1.0
    assert len(frequencies) == read_architecture(tmp_path).head_dim // 2
