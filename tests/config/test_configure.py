"""The command line alone describes a run: the recipes have their published figures, an override replaces the
experiment's value, and the entry point starts quickly and refuses in one line.

Not covered: which combinations are refused (test_checks.py).
"""

import copy
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.usage import Ended, run_measured
from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config import Config, every_setting, sections, with_values
from megatron_fipo.config.checks import check
from megatron_fipo.config.configure import configuration_directory, load_config
from megatron_fipo.errors import ConfigError
from tests.config.judging import SERVER

ROOT = Path(__file__).resolve().parents[2]


EXPERIMENTS = sorted(path.stem for path in (configuration_directory() / "experiment").glob("*.yaml"))

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


def run_probe(directory: Path, *arguments: str, **environment: str) -> Ended:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-c", PROBE, *arguments]
    return run_measured(command, 60, cwd=directory, env={**clean, "PYTHONPATH": str(ROOT), **environment})


class TestCommandLine:
    """The entry point as a user sees it, in a separate process."""

    def test_a_mistake_costs_one_line_and_two_seconds(self, tmp_path: Path) -> None:
        ended = run_probe(tmp_path, "run.stepz=1")
        # Processor time: what the clock would show on a machine that does nothing else.
        assert ended.cpu_seconds < 2.0
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.splitlines() == [
            "error: run.stepz: there is no such key (did you mean run.steps? docs/configuration.md lists every key)"
        ]

    def test_a_run_starts_light_and_leaves_nothing_behind(
        self, tmp_path: Path, model_directory: Any, tiny_files: list[str]
    ) -> None:
        overrides = [model_directory(), *tiny_files, "algorithm.mini_batch_prompts=16"]
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
        assert text.count("megatron-fipo train ") >= 5
        listed = text.partition("Sections: ")[2].partition("\n\n")[0]
        assert [name.strip() for name in listed.split(",")] == [name for name, _ in sections() if "." not in name]
        shown = run_probe(tmp_path, "experiment=fipo_32b", "--cfg", "job", "--package", "optimizer")
        assert (shown.returncode, "lr: 1.0e-06" in shown.stdout) == (0, True)
        shown = run_probe(tmp_path, "--help", "algorithm.filter_groups", "run.steps")
        assert shown.stdout.startswith("algorithm.filter_groups: Dynamic sampling: ")
        assert (
            "  run.steps=1    (whole number, at least 0 and at most 1,000,000,000)\n      Training steps"
            in shown.stdout
        )
        refused = run_probe(tmp_path, "--help", "algorithn")
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert "did you mean algorithm" in refused.stderr

    def test_an_unknown_flag_is_answered_by_the_nearest_one(self, tmp_path: Path) -> None:
        for typed, meant in (("--multrun", "--multirun"), ("--confg-dir=x", "--config-dir")):
            refused = run_probe(tmp_path, typed)
            assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
            assert f"did you mean {meant}?" in refused.stderr


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


def test_every_setting_is_documented() -> None:
    settings = dict(every_setting())
    assert "algorithm.future_kl.decay_rate" in settings and "algorithm.future_kl" not in settings
    assert all(entry.metadata["doc"].endswith(".") for entry in settings.values())


def test_embedded_paths_lie_in_the_package() -> None:
    assert resolve_embedded("embedded:tiny").parent.name == "assets"
    assert resolve_embedded("models/mine") == Path("models/mine")


def test_config_is_plain_dataclasses() -> None:
    """The configuration contains no objects of OmegaConf: dictionaries and lists are Python's own."""
    config = load_config(["data=chain_sum", "+data.task_options.extra=1"])
    assert isinstance(config, Config)
    assert type(config.data.task_options) is dict and type(config.data.train) is list
    assert config.data.task_options["extra"] == 1


def test_other_values_make_another_configuration() -> None:
    """Why: a planner tries thousands of them, and none may show in the one that it was given."""
    before = load_config([])
    kept = copy.deepcopy(before)
    changed = with_values(before, {"run.steps": 7, "algorithm.filter_groups.surplus": "carry", "model": before.model})
    assert (changed.run.steps, changed.algorithm.filter_groups.surplus) == (7, "carry")
    assert before == kept != changed
    assert changed.rollout is before.rollout and changed.run.name == before.run.name
    both = with_values(before, {"run.seed": 3, "run": changed.run})
    assert (both.run.steps, both.run.seed) == (7, 3), "a section, and a key of it"
    with pytest.raises(TypeError, match="stepz"):
        with_values(before, {"run.stepz": 7})
    with pytest.raises(AttributeError, match="runs"):
        with_values(before, {"runs.steps": 7})


@pytest.mark.parametrize(
    ("override", "quoted"),
    [
        ("data.train=~/x.jsonl", "'data.train=[\"~/x.jsonl\"]'"),
        ("data.train=[~/x.jsonl, b.jsonl]", "'data.train=[\"~/x.jsonl\",b.jsonl]'"),
        ("model.path=~/m", "'model.path=\"~/m\"'"),
    ],
)
def test_a_home_directory_is_told_how_to_be_quoted(override: str, quoted: str) -> None:
    """Neither the shell nor Hydra expands ~ there. The proposed text has to work as it is."""
    with pytest.raises(ConfigError, match=r"has a ~ that is not quoted \(quote it twice: ") as refusal:
        load_config([override])
    assert str(refusal.value).endswith(f"quote it twice: {quoted})")
    (argument,) = shlex.split(quoted)
    assert "~/" in str(getattr(load_config([argument]), override.partition(".")[0]))
