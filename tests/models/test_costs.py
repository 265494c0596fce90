"""Why: memory is counted by resident parameters, and time by active ones, and one taken for the other is ten
times off.

Both are compared with the model that transformers builds on the meta device. Not covered: seconds, which need a GPU.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_fipo.models.costs import active_parameters, expert_parameters, layer_products, parameter_counts
from megatron_fipo.models.model_config import read_architecture
from tests.config.published import MIXTRAL_8X7B, QWEN3_8B, QWEN3_30B_A3B, QWEN3_235B_A22B, QWEN15_MOE

pytestmark = pytest.mark.slow

MODELS: dict[str, tuple[dict[str, Any], int | None]] = {
    "30B-A3B": (QWEN3_30B_A3B, 30_532_122_624),
    "235B-A22B": (QWEN3_235B_A22B, 235_093_634_560),
    "Mixtral 8x7B": (MIXTRAL_8X7B, 46_702_792_704),
    "A2.7B": (QWEN15_MOE, None),
    "dense": (QWEN3_8B, None),
}
"""Configurations, and the parameters as published."""


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    config, published = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model_config = read_architecture(tmp_path)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    total = sum(parameter.numel() for parameter in network.parameters())
    experts = sum(parameter.numel() for name, parameter in network.named_parameters() if ".experts." in name)
    assert published in (total, None)
    assert (parameter_counts(model_config)[0], expert_parameters(model_config)) == (total, experts)
    unused = 0
    if model_config.experts is not None:
        unused = experts - experts * model_config.experts.per_token // model_config.experts.number
        assert 0 < unused < total, "the control: a token does not use all of them"
    assert active_parameters(model_config) == total - unused
    # Products are over all active weights but those of norms, biases and the shared expert's gate, and the embedding.
    products = model_config.num_layers * layer_products(model_config)
    outside = 2 * model_config.vocab_size * model_config.hidden_size
    assert products == pytest.approx(active_parameters(model_config) - outside, rel=1e-3)
