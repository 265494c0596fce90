"""What a configuration needs on this machine: the model's files and its config.json, problems, a token, CUDA.

Why: a wrong path, or a layout that does not divide the model, would otherwise show only after all processes have
started.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from megatron_fipo.config import checks_here, checks_machine
from megatron_fipo.config.configure import load_config
from megatron_fipo.errors import ConfigError
from tests.config.judging import judge


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
        ([], {"architectures": ["FalconForCausalLM"]}, "model.path", "Qwen2ForCausalLM"),
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


def test_a_model_that_fits_is_accepted(
    model_directory: Any, tiny_files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda _: list(range(8)))
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
    # A job's script checks where there need not be a GPU.
    assert checks_here.check_here(load_config(command_line.split()), on_login_node=True) == []


def test_servers_on_every_node_are_refused_outside_of_a_job() -> None:
    """Only the job's script starts them, so nobody would answer; preflight, which starts nothing, takes them."""
    overrides = ["rollout.shared_gpu=true", "rollout.servers=0"]
    with pytest.raises(ConfigError, match=r"rollout.addresses: .*are started by a Slurm job's script"):
        judge(*overrides, local=True)
    assert judge(*overrides) == []


@pytest.mark.parametrize(
    ("override", "key", "said"),
    [
        ("run.directory=FILE", "run.directory", "is not a directory"),
        ("run.directory=FILE/run", "run.directory", "is not a directory"),
        (f"run.directory={'x' * 300}", "run.directory", "more than 255 bytes"),
        ("rollout.host=192.0.2.1", "rollout.host", "is not an address of this machine"),
        ("reward.workers=1024", "reward.workers", "1024 verifier processes of 4 GiB each take more than"),
        ("rollout.cpu_kv_cache_gib=100000", "rollout.cpu_kv_cache_gib", "of memory here"),
        ("parallel.data=20000 algorithm.mini_batch_prompts=100000 PROMPTS", "parallel", "trainer processes"),
    ],
)
def test_what_this_machine_has_not_is_refused(
    override: str, key: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 << 30))
    monkeypatch.setattr(checks_machine, "has_cuda_driver", lambda: False)
    override = override.replace("FILE", str(tmp_path / "file")).replace("PROMPTS", "algorithm.prompts_per_step=100000")
    with pytest.raises(ConfigError) as refusal:
        judge(*override.split(), local=True)
    assert refusal.value.key == key and said in refusal.value.problem
    # The other ranks start neither servers nor verifiers, and may be on another machine.
    monkeypatch.setenv("RANK", "1")
    judge(*override.split(), local=True)


@pytest.mark.parametrize(
    ("override", "gpus", "cores", "said"),
    [
        (
            "parallel.tensor=2 parallel.data=7",
            0,
            2,
            "tensor 2 × pipeline 2 × data 7 is 28 processes, and this machine ",
        ),
        ("parallel.tensor=2 parallel.data=7", 8, 2, "is 28 processes, one per GPU, and this machine has 8 GPUs; para"),
        ("parallel.pipeline=4", 2, 64, "pipeline 4 is 4 processes, one per GPU, and this machine has 2 GPUs; a smalle"),
        (
            "parallel.tensor=2",
            0,
            1,
            "tensor 2 × pipeline 2 is 4 processes, and this machine has 1 core: steps will be ",
        ),
        ("parallel.tensor=2", 0, 2, ""),
        ("parallel.tensor=2 parallel.data=2", 8, 2, ""),
    ],
)
def test_more_processes_than_the_machine_can_serve_are_warned_about(
    override: str, gpus: int, cores: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quick start's layout has two stages; four processes on two cores are one of its examples."""
    monkeypatch.setattr(checks_machine, "cuda_devices", lambda: gpus)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda _: list(range(cores)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 << 30))
    warnings = judge(*override.split(), local=True)
    assert [warning.startswith("parallel: ") and said in warning for warning in warnings] == [True] * bool(said)
    monkeypatch.setenv("RANK", "0")
    assert judge(*override.split(), local=True) == [], "ranks that torchrun or srun have started"
