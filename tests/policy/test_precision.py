"""Why: FP8 runs on a GPU alone, but whether a device can run a recipe, and whether Megatron-Core takes what we give it
for one, can be told without: a cluster job must not find out after its start.

Capabilities and versions are given as plain numbers. Not covered: Transformer Engine itself, which is not installed
here; tests/gpu runs it. Megatron-Core's configurations ask for its version nowhere on these paths, so nothing stands in
for it.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from megatron_fipo.config import Config, ParallelConfig, PolicySection
from megatron_fipo.config.checks import check
from megatron_fipo.config.configure import configuration_directory, load_config
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import ModelConfig, read_architecture
from megatron_fipo.policy.model import transformer_config
from megatron_fipo.policy.precision import (
    RECIPES,
    Machine,
    check_recipe,
    optimizer_settings,
    token_multiple,
)

EXPERIMENTS = sorted(path.stem for path in (configuration_directory() / "experiment").glob("*.yaml"))

A100 = Machine("NVIDIA A100", (8, 0), (2, 11, 0), (12, 9))
L40S = Machine("NVIDIA L40S", (8, 9), (2, 11, 0), (12, 9))
H100 = Machine("NVIDIA H100", (9, 0), (2, 11, 0), (12, 9))
B200 = Machine("NVIDIA B200", (10, 0), (2, 11, 0), (13, 0))
RTX5090 = Machine("NVIDIA GeForce RTX 5090", (12, 0), (2, 11, 0), (13, 0))
OLD_CUDA = dataclasses.replace(H100, cuda=(12, 8))
OLD_ENGINE = dataclasses.replace(H100, transformer_engine=(2, 1, 0))


@pytest.mark.parametrize(
    ("machine", "runs"),
    [
        (A100, set()),
        (L40S, {"delayed", "tensorwise"}),
        (H100, {"delayed", "tensorwise", "blockwise"}),
        (B200, {"delayed", "tensorwise", "mxfp8"}),
        (RTX5090, {"delayed", "tensorwise"}),
        (OLD_CUDA, {"delayed", "tensorwise"}),
        (OLD_ENGINE, {"delayed"}),
    ],
    ids=["A100", "L40S", "H100", "B200", "RTX5090", "CUDA 12.8", "TE 2.1"],
)
def test_a_device_runs_its_recipes_and_no_others(machine: Machine, runs: set[str]) -> None:
    found = set()
    for fp8 in RECIPES:
        try:
            check_recipe(fp8, machine)
            found.add(fp8)
        except ConfigError as refusal:
            assert refusal.key == "model.fp8" and fp8 in refusal.problem
    assert found == runs


@pytest.mark.parametrize(
    ("fp8", "machine", "problem", "remedy"),
    [
        (
            "mxfp8",
            H100,
            "compute capability 10.0 or higher, below 12.0, and NVIDIA H100 has 9.0",
            "model.fp8=delayed or tensorwise or blockwise runs here",
        ),
        ("tensorwise", A100, "compute capability 8.9 or higher, and NVIDIA A100 has 8.0", "model.fp8=off"),
        ("blockwise", OLD_CUDA, "CUDA 12.9, and this torch is built for 12.8", "delayed or tensorwise"),
        ("tensorwise", OLD_ENGINE, "Transformer Engine 2.2, and 2.1.0 is installed", "model.fp8=delayed runs here"),
    ],
)
def test_a_refusal_says_what_is_there_and_what_would_run(fp8: str, machine: Machine, problem: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_recipe(fp8, machine)
    assert problem in refusal.value.problem
    assert remedy in refusal.value.remedy


def test_no_fp8_needs_nothing() -> None:
    check_recipe("off", A100)


@pytest.fixture(scope="module")
def model_config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """Qwen2.5-32B's, whose counts divide by every layout of the experiments."""
    folder: Path = tmp_path_factory.mktemp("model")
    architecture = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "eos_token_id": 151643,
    }
    (folder / "config.json").write_text(json.dumps(architecture))
    return read_architecture(folder)


@pytest.mark.filterwarnings("ignore::UserWarning:megatron")
@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize(
    ("fp8", "gather"), [("off", False), *((fp8, gather) for fp8 in RECIPES for gather in {False, fp8 != "mxfp8"})]
)
def test_megatron_core_takes_every_recipe_in_every_experiment(
    model_config: ModelConfig, experiment: str, fp8: str, gather: bool
) -> None:
    overrides = [f"experiment={experiment}", f"model.fp8={fp8}", f"model.fp8_parameter_gather={gather}"]
    if fp8 != "off":
        overrides += ["model.dtype=bfloat16", "model.layers=auto"]
    config = load_config(overrides)
    check(config, local=False)
    megatron = transformer_config(config, model_config)
    assert megatron.fp8_param == gather
    if fp8 == "off":
        assert megatron.fp8 is None
        return
    assert (megatron.fp8, megatron.fp8_recipe) == ("e4m3" if fp8 in ("blockwise", "mxfp8") else "hybrid", fp8)
    edges = (megatron.num_layers_at_start_in_bf16, megatron.num_layers_at_end_in_bf16)
    assert megatron.first_last_layers_bf16 == (fp8 != "delayed")
    assert fp8 == "delayed" or edges == (1, 1)
    MegatronOptimizerConfig(
        bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True, **optimizer_settings(config.model)
    )
    DistributedDataParallelConfig(use_distributed_optimizer=True, fp8_param_gather=gather)


@pytest.mark.parametrize(("fp8", "parts"), [("off", 1), ("delayed", 16), ("blockwise", 16), ("mxfp8", 32)])
def test_token_multiple_is_megatron_cores_alignment_of_each_part(fp8: str, parts: int) -> None:
    from megatron.core.enums import Fp8Recipe
    from megatron.core.fp8_utils import get_fp8_align_size

    if fp8 != "off":
        assert get_fp8_align_size(Fp8Recipe[fp8]) == parts

    def multiple(**parallel: object) -> int:
        return token_multiple(Config(model=PolicySection(fp8=fp8), parallel=ParallelConfig(**parallel)))  # type: ignore[arg-type]

    assert multiple() == parts
    assert multiple(tensor=2) == parts, "without sequence parallelism every rank has all tokens"
    gathered = 128 if fp8 == "blockwise" else parts  # whole blocks, as tests/te_on_cpu shows
    assert multiple(tensor=2, sequence=True) == 2 * gathered
    assert multiple(tensor=2, sequence=True, context=4) == 2 * 4 * 2 * gathered


def test_a_width_that_fp8_cannot_multiply_is_refused(model_config: ModelConfig) -> None:
    config = load_config(["model.fp8=mxfp8", "model.dtype=bfloat16"])
    narrow = dataclasses.replace(model_config, ffn_hidden_size=27648 + 16)
    with pytest.raises(ConfigError, match="feed-forward size of a tensor-parallel rank is 27664"):
        transformer_config(config, narrow)


def test_a_hidden_size_that_is_not_gathered_in_whole_blocks_is_refused(model_config: ModelConfig) -> None:
    config = load_config(["model.fp8=blockwise", "model.dtype=bfloat16", "parallel.tensor=2"])
    narrow = dataclasses.replace(model_config, hidden_size=5120 + 64)
    transformer_config(config, narrow)
    config.parallel.sequence = True
    with pytest.raises(ConfigError, match="128 with sequence parallelism, and the model's hidden size is 5184"):
        transformer_config(config, narrow)


def test_float32_over_context_parallel_ranks_is_refused_with_transformer_engine(model_config: ModelConfig) -> None:
    config = load_config(["model.dtype=float32", "model.layers=transformer_engine", "parallel.context=2"])
    with pytest.raises(ConfigError, match="no float32 over context-parallel ranks"):
        transformer_config(config, model_config)
    config.model.layers = "local"
    transformer_config(config, model_config)
