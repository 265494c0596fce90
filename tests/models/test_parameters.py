"""The tables and the cutting of tensors, without processes or models. Why: an error would scramble a model silently.

Not covered: that the tables agree with the models of Megatron-Core and transformers (test_reshard.py compares logits).
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_fipo.errors import ConfigError, WeightError
from megatron_fipo.models.costs import parameter_counts
from megatron_fipo.models.experts import Experts
from megatron_fipo.models.families import FAMILIES
from megatron_fipo.models.model_config import ModelConfig, read_architecture
from megatron_fipo.models.parameters import canonical_name, check_tensor_parallel, parameters
from megatron_fipo.weights.huggingface import HuggingFaceReader, TensorInfo
from megatron_fipo.weights.huggingface_writer import HuggingFaceWriter
from megatron_fipo.weights.layouts import cut, merge
from megatron_fipo.weights.plan import parameters_per_rank, plan
from tests.config.published import (
    GEMMA_7B,
    LLAMA_31_8B,
    MISTRAL_7B,
    MISTRAL_NEMO,
    MIXTRAL_8X7B,
    QWEN3_30B_A3B,
    QWEN3_235B_A22B,
    QWEN15_MOE,
    QWEN25_32B,
)


def read(tmp_path: Path, config: dict[str, Any]) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_architecture(tmp_path)


@st.composite
def model_configs(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """Return a random small model, and a tensor-parallel size that divides it, except for the vocabulary."""
    size = draw(st.sampled_from([1, 2, 3, 4]))
    groups = size * draw(st.integers(1, 2))
    architecture = draw(st.sampled_from(sorted(FAMILIES)))
    experts = Experts(
        number=draw(st.integers(2, 5)),
        per_token=2,
        ffn_hidden_size=size * draw(st.integers(1, 3)),
        normalized=True,
        layers=tuple(draw(st.sampled_from([(True, True), (True, False)]))),
        shared_ffn_hidden_size=size * draw(st.integers(1, 3)),
    )
    model_config = ModelConfig(
        architecture=architecture,
        num_layers=2,
        hidden_size=draw(st.integers(1, 5)),
        num_attention_heads=groups * draw(st.integers(1, 4)),
        num_query_groups=groups,
        head_dim=draw(st.integers(1, 3)),
        ffn_hidden_size=size * draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(size * size, 20 + size * size)),
        tied_embeddings=draw(st.booleans()),
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        rope_scaling=None,
        max_position_embeddings=8,
        eos_token_ids=(),
        experts=experts if FAMILIES[architecture].experts else None,
    )
    return model_config, size


@settings(deadline=None, max_examples=60)
@given(model_configs())
def test_cut_and_merge_are_a_bijection(drawn: tuple[ModelConfig, int]) -> None:
    model_config, size = drawn
    check_tensor_parallel(model_config, size)
    for entry in parameters(model_config).values():
        whole = [torch.randn(shape) for shape in entry.shapes]
        shards = [cut(entry, whole, rank, size) for rank in range(size)]
        assert {tuple(shard.shape) for shard in shards} == {entry.local_shape(size)}
        assert all(torch.equal(a, b) for a, b in zip(whole, merge(entry, shards), strict=True)), entry.megatron
        values = sum(shard.count_nonzero() for shard in shards) / (size if entry.cut is None else 1)
        assert values == sum(tensor.count_nonzero() for tensor in whole), "padding is zeros and nothing is doubled"


def test_query_key_value_are_grouped_as_megatron_splits_them(tmp_path: Path) -> None:
    """Two groups of two heads of one value: [q q k v] for each group, group by group over the ranks."""
    model_config = read(tmp_path, QWEN25_32B | {"num_attention_heads": 4, "num_key_value_heads": 2})
    model_config = dataclasses.replace(model_config, head_dim=1)
    entry = parameters(model_config)["decoder.layers.0.self_attention.linear_qkv.bias"]
    query, key, value = torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 20]), torch.tensor([100.0, 200])
    assert cut(entry, [query, key, value], 0, 1).tolist() == [1, 2, 10, 100, 3, 4, 20, 200]
    assert cut(entry, [query, key, value], 1, 2).tolist() == [3, 4, 20, 200]


def test_gate_and_up_lie_one_after_the_other_on_each_rank(tmp_path: Path) -> None:
    model_config = read(tmp_path, LLAMA_31_8B | {"intermediate_size": 4, "hidden_size": 32, "head_dim": 2})
    entry = parameters(model_config)["decoder.layers.0.mlp.linear_fc1.weight"]
    gate, up = torch.tensor([[1.0], [2], [3], [4]]), torch.tensor([[10.0], [20], [30], [40]])
    assert [cut(entry, [gate, up], rank, 2).flatten().tolist() for rank in (0, 1)] == [[1, 2, 10, 20], [3, 4, 30, 40]]


def test_both_layer_specifications_lead_to_the_same_parameter(tmp_path: Path) -> None:
    table = parameters(read(tmp_path, QWEN25_32B))
    for local, fused in (
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ):
        name = canonical_name(f"decoder.layers.1.{fused}", layer=33)
        assert name == canonical_name(f"decoder.layers.1.{local}", layer=33) == f"decoder.layers.33.{local}"
        assert table[name].shapes == ((5120,),)


def test_both_ways_to_hold_experts_lead_to_the_same_parameter(tmp_path: Path) -> None:
    """Sequential and grouped, on the second of two expert-parallel ranks."""
    table = parameters(read(tmp_path, QWEN3_30B_A3B))
    for name in ("mlp.experts.local_experts.3.linear_fc1.weight", "mlp.experts.linear_fc1.weight3"):
        found = canonical_name(f"decoder.layers.1.{name}", layer=33, first_expert=64)
        assert found == "decoder.layers.33.mlp.experts.local_experts.67.linear_fc1.weight"
        assert table[found].names == tuple(
            f"model.layers.33.mlp.experts.67.{part}_proj.weight" for part in ("gate", "up")
        )
    assert canonical_name("decoder.layers.1.pre_mlp_layernorm.weight", layer=33) in table


def test_plan_of_the_32b_recipe_counts_what_megatron_allocates(tmp_path: Path) -> None:
    """The two counts were taken from GPTModels built on the meta device at TP8·PP4."""
    counts = parameters_per_rank(plan(read(tmp_path, QWEN25_32B), 8, 4))
    assert (counts[0], counts[3]) == (1_072_674_816, 1_072_679_936)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        *((MISTRAL_7B, 7_241_732_096), (MISTRAL_NEMO, 12_247_782_400), (GEMMA_7B, 8_537_680_896)),
        *((QWEN3_30B_A3B, 30_532_122_624), (QWEN3_235B_A22B, 235_093_634_560)),
        *((MIXTRAL_8X7B, 46_702_792_704), (QWEN15_MOE, 14_315_784_192)),
    ],
    ids=["mistral", "nemo", "gemma", "30b-a3b", "235b-a22b", "8x7b", "a2.7b"],
)
def test_published_models_have_as_many_parameters_as_published(
    tmp_path: Path, config: dict[str, Any], expected: int
) -> None:
    assert parameter_counts(read(tmp_path, config))[0] == expected


def test_plan_interleaves_chunks_and_prints(tmp_path: Path) -> None:
    planned = plan(read(tmp_path, LLAMA_31_8B | {"num_hidden_layers": 8}), 2, 2, 2)
    where = {item.parameter.megatron: (item.stage, item.chunk) for item in planned}
    layers = [where[f"decoder.layers.{layer}.mlp.linear_fc2.weight"] for layer in range(8)]
    assert layers == [(0, 0), (0, 0), (1, 0), (1, 0), (0, 1), (0, 1), (1, 1), (1, 1)]
    assert where["output_layer.weight"] == (1, 1)
    assert str(planned[0]) == (
        "stage 0 chunk 0  embedding.word_embeddings.weight (64128, 4096)  <-  model.embed_tokens.weight (128256, 4096)"
    )


def test_layouts_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    model_config = read(tmp_path, QWEN25_32B)
    with pytest.raises(ConfigError, match="3 does not divide the model's 40 attention heads and 8 key-value groups"):
        plan(model_config, tensor_parallel_size=3)
    with pytest.raises(ConfigError, match="this model takes 1, 2, 4, 8"):
        check_tensor_parallel(model_config, 16)
    with pytest.raises(ConfigError, match="the last of 8 ranks has no token of a vocabulary of 14"):
        check_tensor_parallel(dataclasses.replace(model_config, vocab_size=14), 8)
    check_tensor_parallel(dataclasses.replace(model_config, vocab_size=15), 8)
    with pytest.raises(ConfigError, match="3 stages of 1 chunks do not divide the 64 layers"):
        plan(model_config, pipeline_parallel_size=3)


def test_the_tables_need_no_torch() -> None:
    code = "import sys, megatron_fipo.weights.transfer_plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def write(tmp_path: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int = 64) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"torch_dtype": "float16"}')
    (source / "tokenizer.model").write_bytes(b"\0model")
    (source / "model.safetensors.index.json").write_text("{}")
    infos = [TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    with HuggingFaceWriter(source, tmp_path / "target", infos, max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.close()
    return tmp_path / "target"


def test_written_shards_read_back(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(i + 1, 4, dtype=torch.bfloat16) for i in range(6)}
    target = write(tmp_path, tensors)
    assert len(list(target.glob("*-of-00004.safetensors"))) == 4
    with HuggingFaceReader(target) as reader:
        assert reader.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(reader.tensor(name), tensor) and torch.equal(reader.slice(name)[:, 1:3], tensor[:, 1:3])
    assert json.loads((target / "config.json").read_text()) == {"torch_dtype": "bfloat16"}
    assert (target / "tokenizer.model").read_bytes() == b"\0model"
    assert not list(tmp_path.glob(".target*")), "nothing but the target is left"


def test_an_unfinished_directory_does_not_appear(tmp_path: Path) -> None:
    infos = [TensorInfo(name, (2,), torch.float32) for name in "ab"]
    with HuggingFaceWriter(tmp_path, tmp_path / "target", infos, 1) as writer:
        writer.add("a", torch.zeros(2))
        writer.add("b", torch.zeros(2))
    assert not list(tmp_path.iterdir())


def test_damaged_directories_are_named(tmp_path: Path) -> None:
    target = write(tmp_path, {f"t{i}": torch.randn(4, 4) for i in range(3)})
    second = target / "model-00002-of-00003.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-8])
    with pytest.raises(WeightError, match=r"model-00002-of-00003.safetensors is damaged or cut short"):
        HuggingFaceReader(target)
    second.unlink()
    with pytest.raises(WeightError, match=r"model-00002-of-00003.safetensors is missing"):
        HuggingFaceReader(target)
    save_file({"other": torch.zeros(1)}, second)
    with pytest.raises(WeightError, match=r"t1: expected in model-00002-of-00003.safetensors"):
        HuggingFaceReader(target)
    (target / "model.safetensors.index.json").unlink()
    with pytest.raises(WeightError, match=r"neither model.safetensors nor .*index.json; it holds model-00001-of-00003"):
        HuggingFaceReader(target)


def test_a_rule_with_sources_swapped_is_noticed(tmp_path: Path) -> None:
    """Negative control of the bijection test: merging in another order than cutting does not restore the tensors."""
    model_config = read(tmp_path, LLAMA_31_8B | {"intermediate_size": 4, "hidden_size": 64, "num_key_value_heads": 32})
    entry = parameters(model_config)["decoder.layers.0.self_attention.linear_qkv.weight"]
    whole = [torch.randn(shape) for shape in entry.shapes]
    ungrouped = dataclasses.replace(entry, head_groups=0)
    shards = [cut(entry, whole, rank, 2) for rank in range(2)]
    assert not torch.equal(merge(ungrouped, shards)[0], whole[0])
