"""Why: a run is described by the command line alone, and a mistake there must cost seconds, not a cluster hour. These
tests hold the recipes to their published figures and show that each class of mistake is refused by name.

Not covered: what the settings do; the parts that read them test that.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config import Config, checks_here, every_setting
from megatron_fipo.config.checks import check
from megatron_fipo.config.configure import configuration_directory, load_config
from megatron_fipo.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = sorted(path.stem for path in (configuration_directory() / "experiment").glob("*.yaml"))
SERVER = "rollout.addresses=[http://10.0.0.1:8000]"

# An entry point that does nothing but say that it was reached, and what has been imported by then.
PROBE = """
import sys
from megatron_fipo.config.configure import run_with_config
from megatron_fipo.errors import FipoError

def main(config):
    if config.run.name == "fails":
        raise FipoError("it failed")
    heavy = {"torch", "megatron", "vllm", "transformers", "reasoning_gym"} & set(sys.modules)
    print(f"reached {config.run.directory} with {sorted(heavy)}")

run_with_config(main)
"""


def judge(*overrides: str, world_size: int | None = None, local: bool = False) -> list[str]:
    return check(load_config(overrides), world_size=world_size, local=local)


def run_probe(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        cwd=directory,
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def model_directory(tmp_path: Path):
    """Writes a config.json, Qwen2.5-0.5B's figures unless told otherwise, and gives the override that names it."""

    def write(**changes: Any) -> str:
        architecture = {
            "architectures": ["Qwen2ForCausalLM"],
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "num_hidden_layers": 24,
            "max_position_embeddings": 32768,
            **changes,
        }
        (tmp_path / "config.json").write_text(json.dumps(architecture))
        return f"model.path={tmp_path}"

    return write


@pytest.fixture
def tiny_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Overrides for problem files that exist, so that what comes after their check is reached."""
    path = tmp_path / "problems.jsonl"
    path.touch()
    return [f"data.train=[{path}]", f"data.validation=[{path}]"]


def test_recipes_have_the_published_figures() -> None:
    published = {
        "fipo_32b": (512, 16, 64, 2048, 20480, 4096, 1.0, 1.2, 10.0),
        "fipo_7b": (512, 32, 64, None, 10240, 2048, 0.8, 1.2, 3.0),
        "dapo_32b": (512, 16, 32, 1536, 20480, 4096, None, None, None),
    }
    for name, figures in published.items():
        config = load_config([f"experiment={name}"])
        algorithm, future_kl = config.algorithm, config.algorithm.future_kl
        band = (future_kl.band_low, future_kl.band_high, future_kl.safety_thresh) if future_kl else (None, None, None)
        assert figures == (
            algorithm.prompts_per_step,
            algorithm.samples_per_prompt,
            algorithm.mini_batch_prompts,
            algorithm.generation_batch_prompts,
            config.rollout.max_response_length,
            config.reward.overlong_buffer.len,
            *band,
        )
        updates_a_step = algorithm.prompts_per_step // algorithm.mini_batch_prompts
        optimizer = config.optimizer
        assert (optimizer.lr, optimizer.schedule, optimizer.weight_decay, optimizer.clip_grad) == (
            1e-6,
            "constant",
            0.1,
            1.0,
        )
        assert optimizer.warmup_updates == 10 * updates_a_step
        assert (algorithm.clip_ratio_low, algorithm.clip_ratio_high, algorithm.clip_ratio_c) == (0.2, 0.28, 10.0)
        assert algorithm.loss_agg_mode == "token-mean"
        assert (algorithm.filter_groups.enable, algorithm.filter_groups.max_num_gen_batches) == (True, 10)
        assert (config.rollout.max_prompt_length, config.data.overlong_prompts) == (2048, "truncate_left")
        assert (config.rollout.temperature, config.rollout.top_p, config.rollout.top_k) == (1.0, 1.0, -1)
        assert (config.validation.temperature, config.validation.top_p, config.validation.samples) == (1.0, 0.7, 32)
        assert (config.validation.every, config.checkpoint.every) == (5, 5)
        assert (config.reward.rule, config.reward.overlong_buffer.enable) == ("exact_match", True)
        assert (config.reward.correct, config.reward.incorrect) == (1.0, -1.0)
        assert config.reward.overlong_buffer.penalty_factor == 1.0
        if future_kl:
            assert future_kl.decay_rate == 32.0
    assert load_config(["experiment=fipo_7b"]).model.max_position_embeddings == 32768


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("algorithm", ["fipo", "dapo", "grpo", "dr_grpo", "gspo", "cispo", "sapo"])
def test_an_algorithm_on_the_command_line_wins_over_the_experiment(experiment: str, algorithm: str) -> None:
    servers = [SERVER] if experiment.endswith(("7b", "32b")) else []
    config = load_config([f"algorithm={algorithm}", f"experiment={experiment}", *servers])
    check(config, local=False)
    assert config.algorithm.name == algorithm
    assert (config.algorithm.future_kl is not None) == (algorithm == "fipo")
    if algorithm == "grpo":
        assert config.algorithm.clip_ratio_low == config.algorithm.clip_ratio_high == 0.2
        assert config.algorithm.loss_agg_mode == "seq-mean-token-mean"
        assert not config.algorithm.filter_groups.enable


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
    "data.train=a.parquet": ("data.train", "[a,b]"),
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
        "rollout.weight_transfer=shared_memory",
    ),
    f"rollout.shared_gpu=true rollout.servers=0 {SERVER}": ("rollout.shared_gpu", "rollout.addresses=[]"),
    "rollout.weight_transfer=cuda_ipc parallel.pipeline=1": ("rollout.shared_gpu", "rollout.shared_gpu=true"),
    "rollout.weight_transfer=cuda_ipc parallel.pipeline=2": ("rollout.weight_transfer", "shared_memory"),
    "rollout.weight_transfer=cuda_ipc rollout.servers=2": ("rollout.weight_transfer", "process_group"),
    f"rollout.weight_transfer=cuda_ipc rollout.servers=0 {SERVER}": ("rollout.weight_transfer", "process_group"),
    "rollout.quantization=fp8": ("rollout.quantization", "fp8_per_channel"),
    "rollout.quantization=fp8_per_channel": ("rollout.dtype", "rollout.dtype=bfloat16"),
    "rollout.quantization=fp8_per_channel rollout.dtype=bfloat16": ("model.dtype", "model.dtype=bfloat16"),
    "parallel.overlap_param_gather=true": ("parallel.overlap_param_gather", "parallel.overlap_grad_reduce=true"),
    "algorithm.mini_batch_prompts=12": ("algorithm.mini_batch_prompts", "such as 4"),
    "algorithm.generation_batch_prompts=3": ("algorithm.generation_batch_prompts", "at least 4"),
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
    "optimizer.beta2=1": ("optimizer.beta2", "below 1"),
    "optimizer.min_lr=1": ("optimizer.min_lr", "at most lr"),
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
    """The control of the refusals above: the neighbours that they name do run."""
    assert judge("rollout.temperature=0.7", "rollout.logprobs_mode=processed_logprobs") == []
    assert "biased" in judge("rollout.top_p=0.9")[0]
    assert judge("rollout.servers=0", "rollout.addresses=[http://127.0.0.1:8000,'http://[::1]:8001']") == []


WARNED = {
    "algorithm.mini_batch_prompts=32": "this FIPO is DAPO",
    "rollout.dtype=bfloat16": "rounding",
    "algorithm=grpo algorithm.generation_batch_prompts=64": "without dynamic sampling",
    "validation.temperature=0 validation.samples=4": "alike",
    "optimizer.warmup_updates=1000": "warm up",
    "rollout.quantization=fp8_per_channel rollout.dtype=bfloat16 model.dtype=bfloat16": "importance_sampling_cap",
    "data=chain_sum": "reward.rule=reasoning_gym",
    "data.task=chain_sum": "not read",
    "data.source=reasoning_gym data.task=chain_sum": "not read",
}


@pytest.mark.parametrize("command_line", WARNED)
def test_what_is_hardly_meant_gets_a_warning(command_line: str) -> None:
    warnings = judge(*command_line.split())
    assert any(WARNED[command_line] in warning for warning in warnings), warnings


@pytest.mark.skipif(checks_here.has_cuda_driver(), reason="CUDA's driver is on this machine")
@pytest.mark.parametrize(
    ("command_line", "key", "remedy"),
    [
        (
            "rollout.weight_transfer=cuda_ipc rollout.shared_gpu=true parallel.pipeline=1",
            "rollout.weight_transfer",
            "rollout.weight_transfer=shared_memory",
        ),
        (
            "rollout.quantization=fp8_per_tensor rollout.dtype=bfloat16 model.dtype=bfloat16",
            "rollout.quantization",
            "fp8_per_channel",
        ),
    ],
)
def test_what_needs_cuda_is_refused_without(command_line: str, key: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        checks_here.check_here(load_config(command_line.split()))
    assert refusal.value.key == key and remedy in refusal.value.remedy


def test_dapo_with_one_update_a_step_gets_no_warning() -> None:
    assert judge("algorithm=dapo", "algorithm.mini_batch_prompts=32") == []


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


@pytest.mark.parametrize(
    ("overrides", "architecture", "key", "remedy"),
    [
        (["parallel.tensor=4"], {}, "parallel.tensor", "1, 2, 7, 14"),
        (["parallel.tensor=7"], {}, "parallel.tensor", "key-value heads"),
        (["rollout.tensor_parallel=4"], {}, "rollout.tensor_parallel", "1, 2, 7, 14"),
        (["parallel.pipeline=5"], {}, "parallel.pipeline", "1, 2, 3, 4, 6, 8, 12, 24"),
        (["parallel.virtual_pipeline=5"], {}, "parallel.virtual_pipeline", "2 stages of 5 chunks"),
        (
            ["rollout.max_response_length=40000"],
            {},
            "rollout.max_response_length",
            "model.max_position_embeddings=40064",
        ),
        ([], {"architectures": ["MixtralForCausalLM"]}, "model.path", "Qwen2ForCausalLM"),
        ([], {"num_attention_heads": None}, "model.path", "config.json"),
        ([], {"architectures": None}, "model.path", "config.json"),
    ],
)
def test_the_model_must_fit_layout_and_lengths(
    model_directory: Any, tiny_files: list[str], overrides: list[str], architecture: dict, key: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        judge(model_directory(**architecture), *tiny_files, *overrides, local=True)
    assert refusal.value.key == key
    assert remedy in str(refusal.value)


def test_a_model_that_fits_is_accepted(model_directory: Any, tiny_files: list[str]) -> None:
    raised = ["rollout.max_response_length=40000", "model.max_position_embeddings=40064"]
    layout = ["parallel.tensor=2", "parallel.pipeline=4", "parallel.virtual_pipeline=3"]
    assert judge(model_directory(), *tiny_files, *raised, *layout, local=True) == []
    without_groups = model_directory(num_attention_heads=4, num_key_value_heads=None)
    assert judge(without_groups, *tiny_files, "parallel.tensor=4", local=True) == []


def test_missing_files_are_named(model_directory: Any, tiny_files: list[str], tmp_path: Path) -> None:
    for overrides, key in (
        ([*tiny_files, "model.path=models/nowhere"], "model.path"),
        ([*tiny_files, "model.path=''"], "model.path"),
        ([model_directory(), "data.train=[nowhere.jsonl]"], "data.train"),
        ([model_directory(), *tiny_files, "data.validation=[embedded:nowhere.jsonl]"], "data.validation"),
    ):
        with pytest.raises(ConfigError) as refusal:
            judge(*overrides, local=True)
        assert refusal.value.key == key
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        judge(f"model.path={tmp_path}", *tiny_files, local=True)


def test_running_servers_need_their_token(
    monkeypatch: pytest.MonkeyPatch, model_directory: Any, tiny_files: list[str]
) -> None:
    overrides = [model_directory(), *tiny_files, "rollout.servers=0", "rollout.addresses=[http://127.0.0.1:8000]"]
    monkeypatch.delenv("FIPO_ROLLOUT_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="FIPO_ROLLOUT_TOKEN"):
        judge(*overrides, local=True)
    monkeypatch.setenv("FIPO_ROLLOUT_TOKEN", "secret")
    assert judge(*overrides, local=True) == []


def test_every_setting_is_documented() -> None:
    settings = dict(every_setting())
    assert "algorithm.future_kl.decay_rate" in settings and "algorithm.future_kl" not in settings
    assert all(entry.metadata["doc"].endswith(".") for entry in settings.values())


def test_embedded_paths_lie_in_the_package() -> None:
    assert resolve_embedded("embedded:tiny").parent.name == "assets"
    assert resolve_embedded("models/mine") == Path("models/mine")


class TestCommandLine:
    """The entry point as a user sees it: one process each."""

    def test_a_mistake_costs_one_line_and_two_seconds(self, tmp_path: Path) -> None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ended = run_probe(tmp_path, "run.stepz=1")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: what the clock would show on a machine that does nothing else.
        assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) < 2.0
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.splitlines() == [
            "error: run.stepz: there is no such key (did you mean run.steps? docs/configuration.md lists every key)"
        ]

    def test_a_run_starts_light_and_leaves_nothing_behind(
        self, tmp_path: Path, model_directory: Any, tiny_files: list[str]
    ) -> None:
        overrides = [model_directory(), *tiny_files, "algorithm.mini_batch_prompts=32"]
        before = sorted(tmp_path.rglob("*"))
        ended = run_probe(tmp_path, *overrides, "run.name=mine")
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.startswith("reached runs/mine/20") and ended.stdout.endswith("with []\n")
        assert ended.stderr.count("warning: ") == 1
        assert sorted(tmp_path.rglob("*")) == before

        failed = run_probe(tmp_path, *overrides, "run.name=fails", RANK="0")
        assert (failed.returncode, failed.stderr) == (1, "error: it failed\n")

    def test_help_and_cfg_teach(self, tmp_path: Path) -> None:
        text = run_probe(tmp_path, "--help").stdout
        assert all(
            word in text
            for word in (*EXPERIMENTS, "algorithm: cispo, dapo, dr_grpo, fipo", "--cfg job", "configuration.md")
        )
        assert text.count("python -m megatron_fipo.train ") >= 5
        shown = run_probe(tmp_path, "experiment=fipo_32b", "--cfg", "job", "--package", "optimizer")
        assert (shown.returncode, "lr: 1.0e-06" in shown.stdout) == (0, True)


def test_config_is_plain_dataclasses() -> None:
    """Nothing of OmegaConf reaches the code: dictionaries and lists are Python's own."""
    config = load_config(["data=chain_sum", "+data.task_options.extra=1"])
    assert isinstance(config, Config)
    assert type(config.data.task_options) is dict and type(config.data.train) is list
    assert config.data.task_options["extra"] == 1
