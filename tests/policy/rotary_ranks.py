"""What tests/policy/test_rotary.py runs on one rank: the same small models in Megatron-Core and in transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megatron_fipo.config import Config
from megatron_fipo.errors import FipoError
from megatron_fipo.models.model_config import ModelConfig, read_architecture
from megatron_fipo.policy import platform
from megatron_fipo.policy.model import build_model, start_model_parallel
from megatron_fipo.policy.probe import Trace, check_traces, megatron_trace, probes, transformers_trace
from megatron_fipo.policy.rotary import angle_problem, check_rotary_embedding
from megatron_fipo.weights.reshard import load_into
from megatron_fipo.weights.transformers_model import rotary_frequencies


def compare(right: dict[str, str], spoilt: dict[str, str], refused: str, context: int) -> dict[str, Any]:
    """Compare each model of `right`, and each change of CHANGES made to one of `spoilt`; what was found or raised."""
    directories = {*right.values(), *spoilt.values()}
    # Before this process becomes a trainer's, in which transformers makes its masks wrong.
    expected = {directory: _expected(directory, context) for directory in directories}
    platform.start_process_group(60)
    start_model_parallel(Config().parallel, seed=0)
    found: dict[str, Any] = {}
    for name, directory in right.items():
        model_config, model = _built(directory)
        frequencies, scale = rotary_frequencies(directory, context - 1)
        same = torch.equal(model.rotary_pos_emb.inv_freq, frequencies) and scale == 1.0
        found[name] = [
            _start(model_config, model, directory, context),
            _probe(model_config, model, expected[directory], context),
            same,
        ]
    for name, directory in spoilt.items():
        model_config, model = _built(directory)
        with torch.no_grad():
            CHANGES[name](model)
        found[name] = [
            _start(model_config, model, directory, context),
            _probe(model_config, model, expected[directory], context),
        ]
    found["refused"] = _start(model_config, model, refused, context)
    frequencies, _ = rotary_frequencies(directory, 7)
    found["fewer pairs"] = angle_problem(model.rotary_pos_emb, frequencies[:4], 1.0, [0, 1])
    found["a factor"] = angle_problem(model.rotary_pos_emb, frequencies, 1.2, [0, 1])
    platform.stop_process_group()
    return found


def spoil_last_rank(directory: str, refused: str, context: int) -> list[str]:
    """What each rank says where one of them built another rotary embedding, and of a directory that is refused."""
    platform.start_process_group(60)
    config = Config()
    config.parallel.tensor = torch.distributed.get_world_size()
    config.model.layers, config.model.dtype = "local", "float32"
    start_model_parallel(config.parallel, seed=0)
    model_config = read_architecture(directory)
    chunks = build_model(config, model_config)
    if torch.distributed.get_rank() == config.parallel.tensor - 1:
        _change_base(chunks[0])
    said = [_start(model_config, chunks[0], where, context) for where in (directory, refused)]
    platform.stop_process_group()
    return said


def _built(directory: str) -> tuple[ModelConfig, Any]:
    config = Config()
    config.model.layers, config.model.dtype = "local", "float32"
    model_config = read_architecture(directory)
    chunks = build_model(config, model_config)
    load_into(chunks, directory, model_config)
    return model_config, chunks[0].eval()


def _start(model_config: ModelConfig, model: Any, directory: str, context: int) -> str:
    return _said(check_rotary_embedding, [model], model_config, directory, context)


def _expected(directory: str, context: int) -> list[Trace]:
    network = AutoModelForCausalLM.from_pretrained(Path(directory), dtype="float32").eval()
    model_config = read_architecture(directory)
    return [
        transformers_trace(network, probe.tokens(model_config.vocab_size), probe.positions)
        for probe in probes(model_config, context)
    ]


def _probe(model_config: ModelConfig, model: Any, expected: list[Trace], context: int) -> str:
    made = probes(model_config, context)
    found = [megatron_trace(model, probe.tokens(model_config.vocab_size), probe.positions) for probe in made]
    return _said(check_traces, found, expected, made)


def _said(check: Any, *arguments: Any) -> str:
    """The error of a check, empty if there is none."""
    try:
        check(*arguments)
    except FipoError as error:
        return str(error)
    return ""


def _stretch(model: Any) -> None:
    """Frequencies below one turn in 600,000 tokens: no difference that a short text shows."""
    frequencies = model.rotary_pos_emb.inv_freq
    model.rotary_pos_emb.inv_freq = torch.where(frequencies < 1e-5, frequencies / 32, frequencies)


def _change_base(model: Any) -> None:
    model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq**0.5


def _change_epsilon(model: Any) -> None:
    model.decoder.layers[2].input_layernorm.eps = 0.1


def _change_embedding(model: Any) -> None:
    model.embedding.word_embeddings.weight[:, 5] += 1


def _change_output(model: Any) -> None:
    model.output_layer.weight[:, 5] += 1


def _change_query_norm(model: Any) -> None:
    model.decoder.layers[1].self_attention.q_layernorm.weight *= 1.5


CHANGES = {
    "stretched": _stretch,
    "other base": _change_base,
    "other query norm": _change_query_norm,
    "other epsilon": _change_epsilon,
    "other embedding": _change_embedding,
    "other output": _change_output,
}
