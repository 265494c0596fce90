"""Why: a killed evaluation goes on from its files, so a line cut short must cost one problem and no more, and other
settings must never be mixed with what is there.

Not covered here: real servers and a real kill, which are in tests/end_to_end/test_evaluate.py.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_fipo.config import Config
from megatron_fipo.config.configure import load_config
from megatron_fipo.errors import ConfigError, DataError
from megatron_fipo.evaluate import _missing
from megatron_fipo.evaluation.inherited import with_settings_of
from megatron_fipo.evaluation.results import in_words, summarise, table
from megatron_fipo.evaluation.sample_file import SampleFile
from megatron_fipo.evaluation.settings import directory_of, keep_settings, settings_of
from megatron_fipo.evaluation.weights import find_weights
from megatron_fipo.tracking.problem_files import read_problems, write_problems
from megatron_fipo.tracking.run_files import write_config
from megatron_fipo.tracking.validation import consensuses
from tests.tracking.groups import make_group


def test_samples_survive_and_a_line_cut_short_costs_its_problem(tmp_path):
    path = tmp_path / "samples.jsonl"
    with SampleFile(path) as samples:
        samples.append(make_group("99", "9", name="a"))
        samples.append(make_group("7T", "9", name="b"))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"problem":"c","data_so')
    with SampleFile(path) as samples:
        assert list(samples.done) == ["a", "b"]
        assert [sample.accuracy for sample in samples.done["b"].samples] == [0.0, None]
        problems = [make_group("9", "9", name=name).problem for name in "abc"]
        assert _missing(problems, samples, is_finished=False) == [1, 2], "a failed check is tried again after a stop"
        assert _missing(problems, samples, is_finished=True) == [2]
        samples.append(make_group("97", "9", name="c"))
    assert path.read_bytes().startswith(whole)
    with SampleFile(path) as samples:
        assert list(samples.done) == ["a", "b", "c"]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"problem":1}\n')
    with pytest.raises(DataError, match=r"samples.jsonl, line 1: .*remove the line"):
        SampleFile(path)


def test_a_rule_without_answers_has_no_consensus(tmp_path):
    """Why: programs do not vote, and had a cons@k of 0 in results.json, in the table and in comparisons."""
    group = make_group("97", "9", name="a")
    program = group.with_results([dataclasses.replace(result, answer="") for result in group.results])
    for name, groups in (("silent", [program]), ("voting", [program, make_group("99", "9", name="b")])):
        with SampleFile(tmp_path / f"{name}.jsonl") as samples:
            for each in groups:
                samples.append(each)
            found = summarise(list(samples.done.values()), k=2)
            write_problems(tmp_path / name / "problems.parquet", [each.scores(2) for each in samples.done.values()])
        titles = [column.header for column in table(found).columns]
        values = consensuses(read_problems(tmp_path / name / "problems.parquet"))
        if name == "silent":
            assert found["all"]["cons_at_k"] is None and "cons@2" not in titles and values == []
        else:
            assert found["all"]["cons_at_k"]["value"] == 0.5 and "cons@2" in titles and values == [0.0, 1.0], "control"


def test_results_of_two_data_sets(tmp_path):
    with SampleFile(tmp_path / "samples.jsonl") as samples:
        samples.append(make_group("9999", "9", name="a", source="aime24", lengths=[10] * 4))
        samples.append(make_group("9977", "9", name="b", source="aime24", lengths=[20] * 4))
        samples.append(make_group("7777", "9", name="c", source="aime25", lengths=[30] * 4))
        scores = summarise(list(samples.done.values()), k=4)
    json.dumps(scores, allow_nan=False)
    assert list(scores) == ["all", "aime24", "aime25"]
    assert scores["all"]["avg_at_k"]["value"] == pytest.approx(0.5)
    assert scores["aime24"]["avg_at_k"]["value"] == pytest.approx(0.75)
    assert [scores["all"][f"{how}_right"] for how in ("always", "sometimes", "never")] == [1, 1, 1]
    # Of 4 samples with 2 right, a pair has none right in one of six draws.
    assert scores["aime24"]["pass_at"]["2"]["value"] == pytest.approx((1 + 5 / 6) / 2)
    assert set(scores["all"]["pass_at"]) == {"1", "2", "4"}
    assert scores["aime24"]["response_length"]["mean"] == 15
    assert [column.header for column in table(scores).columns][2] == "avg@4"
    assert in_words(None) == "-" and in_words({"value": 0.5, "low": None, "high": None}) == "0.500"


def test_no_verdict_is_no_score(tmp_path):
    with SampleFile(tmp_path / "samples.jsonl") as samples:
        samples.append(make_group("TC", "9"))
        scores = summarise(list(samples.done.values()), k=2)["all"]
    assert scores["avg_at_k"] is None and scores["not_judged"] == 2 and scores["problems_not_judged"] == 1


def settings_for(*overrides: str) -> tuple[Config, dict]:
    config = load_config(overrides)
    return config, settings_of(config, find_weights(config.model.path), [make_group("9", "9").problem])


def test_settings_that_matter_make_another_evaluation(tmp_path):
    weights = find_weights("embedded:tiny")
    config, settings = settings_for()
    place = directory_of(config, weights, settings)
    assert place.parent == Path("runs/evaluations") and place.name.startswith("tiny-")
    same, others = settings_for("reward.workers=2", "run.steps=7", "optimizer.lr=1e-5")
    assert directory_of(same, weights, others) == place, "what a trainer reads does not matter"
    other, changed = settings_for("validation.samples=3")
    assert directory_of(other, weights, changed) != place
    keep_settings(tmp_path, settings)
    keep_settings(tmp_path, settings)
    with pytest.raises(ConfigError, match=r"evaluation.directory: .*validation.samples=1, not 3"):
        keep_settings(tmp_path, changed)


def make_run(directory: Path, step: int, *, exported: bool = False) -> Path:
    directory.mkdir()
    (directory / "config.yaml").write_text(yaml.safe_dump({"run": {}}))
    for kind in ("checkpoints", "huggingface")[: 1 + exported]:
        place = directory / kind / f"step-{step:06d}"
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")
    return directory


def test_a_run_is_its_newest_checkpoint(tmp_path):
    run = make_run(tmp_path / "mine", 20)
    found = find_weights(str(run))
    assert (found.directory, found.name, found.run) == (run / "checkpoints/step-000020", "mine-step-000020", run)
    assert find_weights(str(run / "checkpoints/step-000020")) == found
    exported = make_run(tmp_path / "other", 30, exported=True)
    assert find_weights(str(exported)).directory == exported / "huggingface/step-000030"


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("", "is empty"),
        ("nowhere", "there is no directory nowhere"),
        ("run", "has no checkpoint yet"),
        (".", "holds no"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, monkeypatch, path, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("run: {}\n")
    with pytest.raises(ConfigError, match=f"model.path: .*{problem}"):
        find_weights(path)


def test_the_run_that_made_a_model_says_what_the_command_line_does_not(tmp_path):
    trained = load_config(
        ["data=math", "run.seed=7", "reward.timeout_s=3", "validation.samples=16", "rollout.max_response_length=999"]
    )
    write_config(tmp_path, trained)
    said = ["data.columns.prompt=question", "validation.samples=2", "rollout.servers=3", "--cfg"]
    found = with_settings_of(tmp_path, load_config(said[:3]), said)
    assert (found.run.seed, found.reward.timeout_s, found.rollout.max_response_length) == (7, 3.0, 999)
    assert (found.data.validation, found.data.columns.prompt) == (trained.data.validation, "question")
    assert (found.validation.samples, found.validation.top_p, found.rollout.servers) == (2, trained.validation.top_p, 3)
    chosen = with_settings_of(tmp_path, load_config(["data=gsm8k"]), ["data=gsm8k"])
    assert chosen.data == load_config(["data=gsm8k"]).data and chosen.run.seed == 7
    whole = load_config(["experiment=tiny"])
    assert with_settings_of(tmp_path, whole, ["experiment=tiny"]) == whole
    (tmp_path / "config.yaml").write_text("data: {nothing: 1}\n")
    with pytest.raises(DataError, match=r"config.yaml cannot be taken over: .*give an experiment"):
        with_settings_of(tmp_path, whole, [])


def test_a_training_runs_directory_is_refused() -> None:
    """Otherwise the files go elsewhere than it was said, in silence."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_fipo.evaluate", "run.directory=somewhere"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: run.directory: it is a training run's (evaluation.directory=somewhere)\n"
