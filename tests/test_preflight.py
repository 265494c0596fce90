"""Preflight and planner as a user runs them: numbers worked out by hand, refusals, limits of time and memory.

Why: they decide what is started on a cluster. tests/sizing/test_memory.py compares the memory with real allocations.
Not covered: how near the estimated seconds come to a cluster's.
"""

import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.usage import Ended, run_measured
from megatron_fipo.config.configure import load_config
from megatron_fipo.errors import ConfigError, WeightError
from megatron_fipo.models.model_config import ModelConfig, read_architecture
from megatron_fipo.planning.ways import overrides
from megatron_fipo.preflight import _check_stored_weights
from megatron_fipo.sizing.estimate import estimate, model_directory, remedies
from megatron_fipo.sizing.layouts import layouts
from megatron_fipo.sizing.memory import GIB
from tests.config.published import GEMMA_7B, MISTRAL_7B, QWEN3_235B_A22B

ROOT = Path(__file__).resolve().parent.parent
QWEN_32B = 32_763_876_352
"""Parameters of Qwen2.5-32B: 2 × 152064 × 5120 for the vocabulary, 64 layers of 487,653,376, one norm."""


def run(module: str, directory: Path, *overrides: str) -> Ended:
    command = [sys.executable, "-m", f"megatron_fipo.{module}", f"run.directory={directory}", *overrides]
    return run_measured(command, 120, cwd=directory, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def model_config() -> ModelConfig:
    directory, is_copy = model_directory("models/Qwen2.5-32B")
    assert is_copy
    return read_architecture(directory)


@pytest.mark.slow
@pytest.mark.parametrize("hardware", ["h100", pytest.param("h200", marks=pytest.mark.matrix)])
def test_the_32b_run(tmp_path: Path, hardware: str) -> None:
    before = time.monotonic()
    ended = run("preflight", tmp_path, "experiment=fipo_32b", f"hardware={hardware}")
    seconds = time.monotonic() - before
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report: dict[str, Any] = json.loads((tmp_path / "preflight.json").read_text())
    assert report["weights"]["parameters"] == QWEN_32B
    assert report["weights"]["huggingface_tensors"] == 3 + 64 * 12
    built = [stage["parameters"] for stage in report["weights"]["stages"]]
    assert built == [1_072_674_816, 975_353_856, 975_353_856, 1_072_679_936]
    assert (report["world_size"], report["data_parallel_size"], report["fullest_stage"]) == (64, 2, 0)
    first = report["stages"][0]
    assert (first["weights"], first["gradients"], first["optimizer"]) == (built[0] * 2, built[0] * 4, built[0] * 6)
    assert "stage 0 is the fullest" in ended.stdout and "32.76 B parameters" in ended.stdout
    assert "16 rollout servers on 8 nodes of their own" in ended.stdout
    faster = report["simulated"]["faster"]
    assert "times as fast, simulated" in faster and "rollout." in faster and report["simulated"]["trainer_idle"] > 0.5
    assert seconds < 30 or os.getloadavg()[0] > 2, f"{seconds:.0f} s"
    assert ended.peak_bytes < 2 * GIB


LARGE_LAYOUT = [
    *("parallel.tensor=4", "parallel.sequence=true", "parallel.pipeline=2", "parallel.virtual_pipeline=null"),
    *("parallel.expert=16", "cluster.trainer_nodes=16", "cluster.rollout_nodes=16", "rollout.tensor_parallel=8"),
]
SHAPES = {
    "fipo_30b_a3b": (30_532_122_624, 3_353_032_704, 3 + 48 * (3 + 6 + 128 * 3), []),
    "235B-A22B": (
        235_093_634_560,
        22_190_763_520,
        3 + 94 * (3 + 6 + 128 * 3),
        LARGE_LAYOUT,
    ),
}
"""All parameters and those of one token, tensors, and the layout."""


@pytest.mark.slow
@pytest.mark.matrix  # tests/sizing has experts
@pytest.mark.parametrize("shape", ["fipo_30b_a3b", "235B-A22B"])
def test_a_run_with_experts(tmp_path: Path, shape: str) -> None:
    """Parameters as published, and every rank of an expert-parallel group built: no expert is missing or twice."""
    parameters, active, tensors, layout = SHAPES[shape]
    model = []
    if shape == "235B-A22B":
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN3_235B_A22B))
        model = [f"model.path={tmp_path}/model"]
    ended = run("preflight", tmp_path, "experiment=fipo_30b_a3b", *model, *layout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report: dict[str, Any] = json.loads((tmp_path / "preflight.json").read_text())
    weights = report["weights"]
    assert (weights["parameters"], weights["active"]) == (parameters, active)
    assert weights["huggingface_tensors"] == tensors
    assert f"{active / 1e9:.2f} B of them active" in ended.stdout
    first, parallel = report["stages"][0], report["parallel"]
    assert first["weights"] == 2 * weights["stages"][0]["parameters"]
    # 12 bytes a parameter, shared by the ranks that have the same ones: fewer have the same experts.
    data = report["data_parallel_size"]
    same_experts = data * parallel["tensor"] // parallel["expert"]
    assert first["parameters"] * 12 / data <= first["optimizer"] <= first["parameters"] * 12 / same_experts + 12
    assert ended.peak_bytes < 3 * GIB


def test_a_layout_of_experts_is_chosen_by_its_costs(tmp_path: Path) -> None:
    """The largest model fits only with its experts dealt, and the printed overrides give the layout."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_235B_A22B))
    large = read_architecture(tmp_path)
    servers = ["cluster.rollout_nodes=0", "rollout.addresses=[http://a:80]", "rollout.tensor_parallel=8"]
    start = ["experiment=fipo_30b_a3b", "cluster.trainer_nodes=16", *servers]
    configured = load_config(start)
    ranked = layouts(configured, large)
    fitting = [layout for layout in ranked if layout.estimate.fits]
    assert fitting and all(layout.config.parallel.expert > 1 for layout in fitting)
    assert any(layout.config.parallel.expert == 1 for layout in ranked), "the control"
    best = fitting[0]
    chosen = load_config([*start, *overrides(configured, best.config).split()])
    assert estimate(chosen, large).time == best.estimate.time


@pytest.mark.matrix  # tests/models has the parameters of every family
@pytest.mark.slow
def test_a_run_of_another_family(tmp_path: Path) -> None:
    """Its stages are built without memory, and hold what transformers has."""
    (tmp_path / "gemma").mkdir()
    (tmp_path / "gemma" / "config.json").write_text(json.dumps(GEMMA_7B))
    ended = run("preflight", tmp_path, "experiment=fipo_7b", f"model.path={tmp_path}/gemma", "parallel.tensor=4")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    weights: dict[str, Any] = json.loads((tmp_path / "preflight.json").read_text())["weights"]
    assert (weights["parameters"], weights["huggingface_tensors"]) == (8_537_680_896, 2 + 28 * 9)


def test_a_window_saves_time_and_keeps_sequences_whole(tmp_path: Path) -> None:
    """Time of attention alone. Where no sequence is longer than the window, it has no effect."""
    seconds, cut = {}, {}
    config = load_config(["experiment=fipo_7b"])
    for window in (4096, 32768, None):
        (tmp_path / "config.json").write_text(json.dumps(MISTRAL_7B | {"sliding_window": window}))
        mistral = read_architecture(tmp_path)
        found = estimate(config, mistral)
        seconds[window] = (found.time.update, found.time.sample)
        cut[window] = {layout.config.parallel.context > 1 for layout in layouts(config, mistral)}
    assert seconds[32768] == seconds[None]
    assert all(with_one < without for with_one, without in zip(seconds[4096], seconds[None], strict=True))
    assert cut[4096] == {False} and cut[32768] == cut[None] == {False, True}
    with pytest.raises(ConfigError, match=r"no window \(8 tokens here\) over context-parallel ranks"):
        estimate(load_config(["experiment=fipo_7b", "parallel.context=2"]), dataclasses.replace(mistral, window=8))


@pytest.mark.slow
def test_a_run_that_does_not_fit_says_what_would(tmp_path: Path) -> None:
    ended = run("preflight", tmp_path, "experiment=fipo_32b", "parallel.micro_batch_tokens=65536")
    assert ended.returncode == 3
    assert "DOES NOT FIT" in ended.stdout and "would fit with model.recompute=full" in ended.stdout
    assert not json.loads((tmp_path / "preflight.json").read_text())["fits"]


@pytest.mark.slow
def test_a_server_that_leaves_no_room_on_a_shared_gpu(tmp_path: Path) -> None:
    """It does not fit, what would is said, and so is a whole command for the node."""
    shared = ["rollout=shared_gpu", "rollout.servers=8", "rollout.gpu_memory_utilization=0.95"]
    ended = run(
        "preflight", tmp_path, "experiment=fipo_7b", "cluster.trainer_nodes=1", "cluster.rollout_nodes=0", *shared
    )
    assert ended.returncode == 3, ended.stdout + ended.stderr
    assert "75.6 of 74.6 GiB" in ended.stdout and "GiB too much" in ended.stdout
    assert "8 rollout servers on 8 of the trainer's GPUs, in turns" in ended.stdout
    assert "would fit with rollout.gpu_memory_utilization=0.8" in ended.stdout
    assert "on one node of 8 GPUs: cluster.trainer_nodes=1 cluster.rollout_nodes=0" in ended.stdout


@pytest.mark.slow
def test_a_bad_override_is_refused(tmp_path: Path) -> None:
    ended = run("preflight", tmp_path, "experiment=fipo_32b", "parallel.tensor=3")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "parallel" in ended.stderr


@pytest.mark.parametrize("experiment", ["fipo_32b", "dapo_32b", "fipo_7b", "fipo_30b_a3b"])
@pytest.mark.parametrize("hardware", ["a100", "h100", "h200", "gh200", "b200", "gb200"])
def test_the_shipped_recipes_fit(experiment: str, hardware: str) -> None:
    config = load_config([f"experiment={experiment}", f"hardware={hardware}"])
    found = estimate(config, read_architecture(model_directory(config.model.path)[0]))
    assert found.fits and not found.tight


def test_the_longest_step_samples_whole_generation_batches(model_config: ModelConfig) -> None:
    """Half of the groups are kept on average: 1024 prompts a step, which come 2048 at a time, every other step."""
    config = load_config(["experiment=fipo_32b"])
    time = estimate(config, model_config).time
    config.algorithm.filter_groups.surplus = "drop"
    every = estimate(config, model_config).time
    assert time.longest == every.longest == every.total > time.total
    config.rollout.max_off_policy_steps = 1
    beside = estimate(config, model_config).time
    assert beside.total == max(beside.sample, beside.log_probs + beside.update) + beside.weights < every.total
    assert beside.longest == beside.trainer < time.longest, "a stop waits for no sample"
    config.rollout.max_off_policy_steps = 0
    config.algorithm.generation_batch_prompts = 1024
    assert estimate(config, model_config).time.longest == pytest.approx(time.total)
    config.algorithm.filter_groups.enable = False
    assert estimate(config, model_config).time.longest < time.total


@pytest.mark.parametrize("experiment", ["fipo_32b", "dapo_32b", "fipo_7b", "fipo_30b_a3b"])
def test_a_job_is_asked_to_stop_before_its_longest_step_would_meet_the_time_limit(experiment: str) -> None:
    """With a fifth of it to spare, on the slowest hardware that the recipes are estimated for."""
    config = load_config([f"experiment={experiment}", "hardware=h100"])
    longest = estimate(config, read_architecture(model_directory(config.model.path)[0])).time.longest
    script = (ROOT / "slurm" / f"{experiment}.sh").read_text()
    found = re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", script, re.MULTILINE)
    assert found is not None and int(found[1]) > 1.2 * longest


def test_interleaving_halves_the_bubble_and_costs_activations(model_config: ModelConfig) -> None:
    plain = estimate(load_config(["experiment=fipo_32b"]), model_config)
    interleaved = estimate(load_config(["experiment=fipo_32b", "parallel.virtual_pipeline=2"]), model_config)
    count = plain.time.micro_batches
    assert plain.time.bubble == pytest.approx(3 / (count + 3))
    assert interleaved.time.bubble == pytest.approx(1.5 / (count + 1.5))
    # 11 chunks of 8 layers in flight on the first stage, against 4 of 16.
    assert interleaved.stages[0].activations / plain.stages[0].activations == pytest.approx(11 / 8, rel=0.01)


def test_remedies_do_fit(model_config: ModelConfig) -> None:
    config = load_config(["experiment=fipo_32b", "hardware.memory_gib=40"])
    assert not estimate(config, model_config).fits
    assert any(text.startswith("model.recompute=full: peak") for text in remedies(config, model_config))
    config.hardware.memory_gib = 62
    tight = estimate(config, model_config)
    assert tight.fits and tight.tight
    # More context-parallel ranks help only where each works on fewer tokens.
    assert any(
        text.startswith("parallel.context=2 parallel.micro_batch_tokens=11264: peak")
        for text in remedies(config, model_config)
    )
    config.hardware.memory_gib = 6
    assert remedies(config, model_config) == []


def test_layouts_that_fit_are_ranked_by_time(model_config: ModelConfig) -> None:
    ranked = layouts(load_config(["experiment=fipo_32b"]), model_config)
    fitting = [layout for layout in ranked if layout.estimate.fits]
    assert 0 < len(fitting) < len(ranked)
    assert ranked[: len(fitting)] == fitting
    times = [layout.estimate.time.trainer for layout in fitting]
    assert times == sorted(times)
    assert all(layout.estimate.fullest.total <= 74.6 * GIB for layout in fitting)
    assert "too large, mostly" in ranked[-1].reason()


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin", "model-Q4_K_M.gguf"])
def test_weights_that_training_could_not_read_are_refused(tmp_path: Path, model_config: ModelConfig, name: str) -> None:
    """Without any file of weights, a directory is a published configuration, and is estimated."""
    _check_stored_weights(tmp_path, model_config)
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(WeightError, match=r"has neither model.safetensors nor|is not a safetensors index"):
        _check_stored_weights(tmp_path, model_config)
