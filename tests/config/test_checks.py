"""Configurations that cannot run are refused with the key and what would be right. Probable mistakes get a warning.

Why: a mistake on the command line must cost seconds, not a cluster hour.

Not covered: what the settings do; the parts that read them test that.
"""

import math
from collections.abc import Sequence
from typing import get_args

import pytest

from megatron_fipo.config import every_setting
from megatron_fipo.config.settings import is_in_range
from megatron_fipo.errors import ConfigError
from tests.config.judging import SERVER, judge


def test_the_default_experiments_have_no_warning() -> None:
    assert judge() == []
    assert judge("experiment=smollm2_135m") == []
    assert judge("experiment=fipo_32b", SERVER) == []
    assert judge("experiment=dapo_32b", SERVER) == []


REFUSED = {
    # Wrong keys, types and choices, which Hydra or OmegaConf notice.
    "run.stepz=1": ("run.stepz", "run.steps"),
    "steps=3": ("steps", "run.steps"),
    "decay_rate=3": ("decay_rate", "algorithm.future_kl.decay_rate"),
    "+run.foo=1": ("run.foo", "no such key"),
    "+extra.x=1": ("extra", "no such key"),
    "algoritm=dapo": ("algoritm", "algorithm"),
    "algorithm=dapoo": ("algorithm=dapoo", "did you mean dapo?"),
    "experiment=fipo32b": ("experiment=fipo32b", "fipo_32b"),
    "run.steps=abc": ("run.steps", "a whole number"),
    "run.steps=1.5": ("run.steps", "a whole number"),
    "run.steps=null": ("run.steps", "a whole number"),
    "rollout.addresses=[null]": ("rollout.addresses[0]", "is null"),
    "data.train=a.parquet": ("data.train", "data.train=[A]"),
    "algorithm.is_bounds=[0.5]": ("algorithm.is_bounds", "[low, high]"),
    "algorithm.is_bounds=[2,5]": ("algorithm.is_bounds", "low < 1 < high"),
    "parallel.tensor=1,2": ("parallel.tensor=1,2", "one value"),
    "run.name=a=b": ("run.name=a=b", "quote"),
    "run.name=${nope}": ("run.name", "nope"),
    "~run.steps": ("run.steps", "deletion"),
    "data.task_options.max_terms=3": ("data.task_options.max_terms", "+data.task_options.max_terms"),
    "algorithm=dapo algorithm.future_kl.band_low=0.9": ("algorithm.future_kl", "algorithm=fipo"),
    # Ranges.
    "run.steps=-1": ("run.steps", "at least 0"),
    "optimizer.lr=0": ("optimizer.lr", "above 0"),
    "optimizer.lr=nan": ("optimizer.lr", "finite"),
    "rollout.top_p=1.5": ("rollout.top_p", "at most 1"),
    "model.dtype=float16": ("model.dtype", "bfloat16"),
    "algorithm.loss_mode=ppo": ("algorithm.loss_mode", "vanilla"),
    "parallel.virtual_pipeline=1": ("parallel.virtual_pipeline", "at least 2"),
    # Combinations.
    "parallel.virtual_pipeline=2 parallel.pipeline=1": ("parallel.virtual_pipeline", "parallel.pipeline=2"),
    "parallel.sequence=true": ("parallel.sequence", "parallel.tensor=2"),
    "model.fp8=delayed": ("model.fp8", "model.dtype=bfloat16"),
    "model.fp8=delayed model.dtype=bfloat16 model.layers=local": ("model.fp8", "model.layers=auto"),
    "model.fp8_parameter_gather=true": ("model.fp8_parameter_gather", "an FP8 recipe"),
    "model.fp8_parameter_gather=true model.dtype=bfloat16 model.fp8=tensorwise "
    "parallel.overlap_grad_reduce=true parallel.overlap_param_gather=true": (
        "model.fp8_parameter_gather",
        "parallel.overlap_param_gather=false",
    ),
    "model.fp8_parameter_gather=true model.dtype=bfloat16 model.fp8=mxfp8": (
        "model.fp8_parameter_gather",
        "model.fp8=tensorwise",
    ),
    "model.fp8_parameter_gather=true model.dtype=bfloat16 model.fp8=tensorwise parallel.distributed_optimizer=false": (
        "model.fp8_parameter_gather",
        "parallel.distributed_optimizer=true",
    ),
    "model.fp8_parameter_gather=true model.dtype=bfloat16 model.fp8=tensorwise algorithm.reference_kl_coef=0.1": (
        "model.fp8_parameter_gather",
        "algorithm.reference_kl_coef=0",
    ),
    "rollout.shared_gpu=true rollout.weight_transfer=process_group": (
        "rollout.weight_transfer",
        "rollout.weight_transfer=cuda_ipc or shared_memory",
    ),
    "rollout.shared_gpu=true cluster.rollout_nodes=1": ("rollout.shared_gpu", "cluster.rollout_nodes=0"),
    "rollout=colocated rollout.tensor_parallel=16": ("rollout.tensor_parallel", "rollout.tensor_parallel=8 or fewer"),
    "rollout.weight_transfer=cuda_ipc parallel.pipeline=1": ("rollout.shared_gpu", "rollout.shared_gpu=true"),
    f"rollout.weight_transfer=cuda_ipc rollout.servers=0 {SERVER}": ("rollout.weight_transfer", "process_group"),
    "rollout.quantization=fp8": ("rollout.quantization", "fp8_per_channel"),
    "rollout.quantization=fp8_per_channel": ("rollout.dtype", "rollout.dtype=bfloat16"),
    "rollout.quantization=fp8_per_channel rollout.dtype=bfloat16": ("model.dtype", "model.dtype=bfloat16"),
    "parallel.overlap_param_gather=true": ("parallel.overlap_param_gather", "parallel.overlap_grad_reduce=true"),
    "algorithm.mini_batch_prompts=12": ("algorithm.mini_batch_prompts", "such as 4"),
    "algorithm.generation_batch_prompts=1": ("algorithm.generation_batch_prompts", "at least 2"),
    "algorithm.loss_mode=vanilla": ("algorithm.future_kl", "algorithm.future_kl=null"),
    "algorithm.future_kl=null": ("algorithm.future_kl", "algorithm=fipo"),
    "algorithm.future_kl.band_low=0.2 algorithm.future_kl.band_high=0.28": ("algorithm.future_kl.band_low", "around 1"),
    "rollout.temperature=0.7": ("rollout.logprobs_mode", "processed_logprobs"),
    "rollout.top_p=0.9 rollout.logprobs_mode=processed_logprobs": ("rollout.logprobs_mode", "raw_logprobs"),
    "rollout.top_k=20 rollout.temperature=0.7": ("rollout.temperature", "rollout.temperature=1"),
    "rollout.top_k=0": ("rollout.top_k", "-1"),
    "rollout.servers=0": ("rollout.addresses", "rollout.servers=1"),
    SERVER: ("rollout.servers", "rollout.servers=0"),
    f"rollout.servers=0 {SERVER}": ("rollout.weight_transfer", "process_group"),
    "rollout.servers=0 rollout.addresses=[node7]": ("rollout.addresses", "http://HOST:PORT"),
    "data.train=[]": ("data.train", "at least one"),
    "data.validation=[]": ("data.validation", "validation.every=0"),
    "data.source=reasoning_gym": ("data.task", "chain_sum"),
    "reward.rule=reasoning_gym": ("reward.rule", "data.source=reasoning_gym"),
    "reward.correct=-1": ("reward.correct", "larger"),
    "reward.overlong_buffer.enable=true": ("reward.overlong_buffer.len", "shorter"),
    "rollout.log_prob_diff_warn=0.9": ("rollout.log_prob_diff_warn", "set rollout.log_prob_diff_stop too"),
    "rollout.log_prob_diff_warn=2 rollout.log_prob_diff_stop=1": ("rollout.log_prob_diff_stop", "a limit at or above"),
    "run.collective_timeout_s=1e30": ("run.collective_timeout_s", "at least 1 and at most 604,800"),
    "rollout.start_timeout_s=1e10": ("rollout.start_timeout_s", "at most 604,800"),
    "reward.workers=1000000000": ("reward.workers", "at most 1,024"),
    f"run.steps={10**30}": ("run.steps", "at most 1,000,000,000"),
    "run.directory=''": ("run.directory", "runs/mine"),
    "run.name=''": ("run.name", "a name"),
    "rollout.host=''": ("rollout.host", "127.0.0.1"),
    "rollout.host=abc": ("rollout.host", "127.0.0.1"),
    "rollout.host=0.0.0.0": ("rollout.host", "127.0.0.1"),
    "rollout.host='::'": ("rollout.host", "127.0.0.1"),
    "rollout.host='::ffff:0.0.0.0'": ("rollout.host", "127.0.0.1"),
    "rollout.host=255.255.255.255": ("rollout.host", "127.0.0.1"),
    "rollout.servers=0 rollout.addresses=['http://[:::]:80']": ("rollout.addresses", "http://HOST:PORT"),
    "rollout.servers=0 rollout.addresses=[http://node7:65536]": ("rollout.addresses", "from 1 to 65535"),
    "rollout.servers=0 rollout.addresses=[http://node7:0]": ("rollout.addresses", "from 1 to 65535"),
    "optimizer.beta2=1": ("optimizer.beta2", "below 1"),
    "optimizer.min_lr=1": ("optimizer.min_lr", "at most lr"),
    "checkpoint.huggingface_every=30": ("checkpoint.huggingface_every", "a multiple of 20, or 0"),
    "checkpoint.huggingface_every=5 checkpoint.every=0": ("checkpoint.huggingface_every", "a checkpoint.every above 0"),
}


@pytest.mark.parametrize("command_line", REFUSED)
def test_mistakes_are_refused_with_the_key_and_the_remedy(command_line: str) -> None:
    key, remedy = REFUSED[command_line]
    with pytest.raises(ConfigError) as refusal:
        judge(*command_line.split())
    assert refusal.value.key == key
    assert remedy in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_allowed_sampling_modes_are_allowed() -> None:
    """The control of the refusals above: the settings that they propose do run."""
    assert judge("rollout.temperature=0.7", "rollout.logprobs_mode=processed_logprobs") == []
    assert "biased" in judge("rollout.top_p=0.9")[0]
    assert judge("rollout.servers=0", "rollout.addresses=[http://127.0.0.1:8000,'http://[::1]:8001']") == []


WARNED = {
    "algorithm.mini_batch_prompts=16": "this FIPO is DAPO",
    "rollout.dtype=bfloat16": "rounding",
    "algorithm=grpo algorithm.generation_batch_prompts=64": "without dynamic sampling",
    "validation.temperature=0 validation.samples=4": "are the same",
    "optimizer.warmup_updates=1000": "warm-up takes 1000",
    "rollout.quantization=fp8_per_channel rollout.dtype=bfloat16 model.dtype=bfloat16": "tis_cap",
    "data=chain_sum": "reward.rule=reasoning_gym",
    "reward.rule=exact_match reward.math_tolerance=0.01": "not read",
    "reward.code.cpu_s=9": "reward.rule=code does",
    "data.task=chain_sum": "not read",
    "data.source=reasoning_gym data.task=chain_sum": "not read",
}


@pytest.mark.parametrize("command_line", WARNED)
def test_what_is_hardly_meant_gets_a_warning(command_line: str) -> None:
    warnings = judge(*command_line.split())
    assert any(WARNED[command_line] in warning for warning in warnings), warnings


def test_dapo_with_one_update_a_step_gets_no_warning() -> None:
    assert judge("algorithm=dapo", "algorithm.mini_batch_prompts=16") == []


@pytest.mark.parametrize(
    ("overrides", "world_size", "key"),
    [
        (["parallel.tensor=2"], 6, "parallel"),
        (["parallel.data=2"], 6, "parallel.data"),
        (["algorithm.mini_batch_prompts=1", "algorithm.samples_per_prompt=2"], 8, "algorithm.mini_batch_prompts"),
    ],
)
def test_layout_must_fit_the_number_of_processes(overrides: Sequence[str], world_size: int, key: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        judge(*overrides, world_size=world_size)
    assert refusal.value.key == key


def test_layouts_that_fit_are_accepted() -> None:
    assert judge("parallel.tensor=2", world_size=8) == []
    assert judge("parallel.data=2", world_size=4) == []
    assert judge("experiment=fipo_32b", SERVER, world_size=64) == []


def test_every_number_has_a_range_and_its_default_lies_inside() -> None:
    """A number without an upper bound could overflow a clock, a socket or the memory."""
    for key, entry in every_setting():
        kinds = {int, float} & {entry.type, *get_args(entry.type)}
        if not kinds:
            continue
        limits = entry.metadata
        assert limits["maximum"] is not None, f"{key} has no upper bound"
        assert (limits["minimum"] is None) != (limits["above"] is None), f"{key} has no lower bound, or two"
        assert entry.default is None or is_in_range(entry.default, limits), key
        for beyond in (limits["maximum"] * 1.001 + 1, -1e30, math.nan):
            assert not is_in_range(beyond, limits), (key, beyond)
