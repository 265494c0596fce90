"""Why: a comparison decides what a month of GPUs is spent on. Groups, scores, differences and costs are held against
values worked out by hand, on runs that ended early, were resumed, validated nothing, or kept no problems.

Not covered: whether intervals are right (tests/tracking/test_intervals.py), real runs and evaluations
(tests/end_to_end/test_evaluate.py).
"""

import csv
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo.compare import main
from megatron_fipo.comparison.groups import group_runs
from megatron_fipo.comparison.report import build
from megatron_fipo.comparison.runs import find_runs
from megatron_fipo.comparison.scores import cost_of, series
from megatron_fipo.errors import ConfigError, DataError
from megatron_fipo.tracking.metrics import METRICS_FILE, VALIDATION_FILE
from tests.comparison.fake_runs import make_run

LOW, MIDDLE, HIGH = [0, 1, 2, 1] * 5, [1, 2, 3, 2] * 5, [3, 4, 4, 3] * 5


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two algorithms of two seeds each, in one directory, as a sweep leaves them."""
    for algorithm, last in (("fipo", HIGH), ("dapo", MIDDLE)):
        for seed in (1, 2):
            directory = tmp_path / "sweep" / algorithm / str(seed)
            make_run(directory, {0: LOW, 10: MIDDLE, 20: last}, f"algorithm={algorithm}", f"run.seed={seed}")
    return tmp_path / "sweep"


def test_seeds_are_one_group_and_what_differs_is_named(sweep):
    found = group_runs(find_runs([sweep]))
    assert [(group.name, group.seeds) for group in found.groups] == [("dapo", [1, 2]), ("fipo", [1, 2])]
    assert found.differences["algorithm.name"] == ["dapo", "fipo"]
    assert all(key.startswith("algorithm.") for key in found.differences)


def test_names_are_as_short_as_they_can_be(tmp_path):
    for name, overrides in {
        "a": ["algorithm=fipo", "checkpoint.every=4", "rollout.servers=1"],
        "b": ["algorithm=fipo", "optimizer.lr=1e-5"],
        "c": ["algorithm=dapo", "optimizer.lr=1e-5", "run.seed=5"],
    }.items():
        make_run(tmp_path / name, {}, *overrides)
    runs = find_runs([tmp_path])
    first = json.dumps(runs[0].settings["optimizer.lr"])
    names = [group.name for group in group_runs(runs).groups]
    assert names == [f"fipo, lr={first}", "fipo, lr=1e-05", "dapo, lr=1e-05"]
    assert [g.name for g in group_runs(runs, ["optimizer.*"]).groups] == ["fipo", "dapo"]


def test_scores_and_differences_are_those_worked_out_by_hand(sweep):
    found = build(group_runs(find_runs([sweep])), "dapo", "accuracy", None)
    dapo, fipo = found.by_source["all"]
    assert dapo.difference is None and found.target == 0.5
    assert (fipo.final.interval.mean, dapo.final.interval.mean) == (0.875, 0.5)
    assert fipo.difference.interval.mean == pytest.approx(0.375)
    assert fipo.difference.over == "20 problems, 2 and 2 seeds"
    assert fipo.difference.interval.excludes_zero()
    assert found.sentences()[0].startswith("fipo is above dapo: +0.375 [")
    assert (fipo.cost.reached, fipo.cost.seconds, fipo.cost.tokens) == (2, 50.0, 10_000.0)
    at_best = build(group_runs(find_runs([sweep])), "dapo", "accuracy", 0.8).by_source["all"]
    assert [(scores.cost.reached, scores.cost.seconds) for scores in at_best] == [(0, None), (2, 100.0)]


def test_equal_runs_cannot_be_told_apart(tmp_path):
    for name in ("fipo", "dapo"):
        for seed, right in enumerate((LOW, MIDDLE, HIGH)):
            make_run(tmp_path / name / str(seed), {20: right}, f"algorithm={name}", f"run.seed={seed}")
    (sentence,) = build(group_runs(find_runs([tmp_path])), None, "accuracy", None).sentences()
    assert "cannot be told apart: +0.000 [" in sentence


def test_runs_of_other_lengths_are_compared_where_both_have_been(tmp_path):
    make_run(tmp_path / "fipo", {0: LOW, 10: HIGH, 20: HIGH}, "algorithm=fipo")
    make_run(tmp_path / "dapo", {0: LOW, 10: MIDDLE}, "algorithm=dapo", last_step=14)
    grouping = group_runs(find_runs([tmp_path]))
    _, fipo = build(grouping, "dapo", "accuracy", None).by_source["all"]
    assert (fipo.final.steps, fipo.difference.steps) == ([20], [10])
    (sentence,) = build(grouping, "dapo", "accuracy", None).sentences()
    assert sentence.endswith("other seeds may say otherwise: fipo and dapo ran with one")
    assert grouping.notes == ["dapo (dapo) has 14 of 20 steps"]


def test_best_is_the_first_of_the_highest(tmp_path):
    make_run(tmp_path / "run", {0: LOW, 10: HIGH, 15: HIGH, 20: MIDDLE})
    (only,) = build(group_runs(find_runs([tmp_path / "run"])), None, "accuracy", None).by_source["all"]
    assert (only.best.steps, only.best.interval.mean, only.final.interval.mean) == ([10], 0.875, 0.5)
    assert only.final.over == "20 problems, 1 seed" and only.difference is None


def test_a_resumed_run_counts_each_step_once(tmp_path):
    directory = make_run(tmp_path / "run", {0: LOW, 20: HIGH})
    with (directory / METRICS_FILE).open("a") as file:
        file.write(json.dumps({"step": 20, "seconds_step": 7.0, "response_tokens": 500.0}) + "\n")
    with (directory / VALIDATION_FILE).open("a") as file:
        file.write(json.dumps({"step": 20, "accuracy": 0.9}) + '\n{"step": 2')  # and one cut short
    (group,) = group_runs(find_runs([directory])).groups
    cost = cost_of(group, "accuracy", 0.9)
    assert (cost.seconds, cost.tokens) == (19 * 5 + 7, 19_500)
    assert series(group.runs[0], "accuracy")[20] == 0.9


def test_without_validations_or_problems(tmp_path):
    make_run(tmp_path / "new", {20: MIDDLE}, "run.seed=1")
    make_run(tmp_path / "old", {20: HIGH}, "run.seed=2", keep_problems=False)
    make_run(tmp_path / "none", {}, "run.seed=3")
    grouping = group_runs(find_runs([tmp_path]))
    (scores,) = build(grouping, None, "accuracy", None).by_source["all"]
    assert scores.final.interval.mean == pytest.approx((0.5 + 0.875) / 2)
    assert scores.final.over == "2 seeds", "problems only where every run has kept them"
    assert grouping.notes == ["none (fipo_7b) has no validation and is in no score"]


def test_a_seed_that_was_run_twice_is_one_seed(tmp_path):
    for name, right in (("first", MIDDLE), ("second", HIGH)):
        make_run(tmp_path / name, {20: right}, "run.seed=3")
    grouping = group_runs(find_runs([tmp_path]))
    (scores,) = build(grouping, None, "accuracy", None).by_source["all"]
    assert scores.final.over == "20 problems, 1 seed"
    assert scores.final.interval.mean == pytest.approx((0.5 + 0.875) / 2)
    assert grouping.notes == ["fipo_7b: 2 runs have the seed 3; they count as one seed, with their mean"]


def test_data_sources_are_compared_apart(tmp_path):
    sources = ["aime24"] * 10 + ["aime25"] * 10
    for name, right in (("fipo", [4] * 10 + [1] * 10), ("dapo", [2] * 20)):
        make_run(tmp_path / name, {20: right}, f"algorithm={name}", sources=sources)
    found = build(group_runs(find_runs([tmp_path])), "dapo", "accuracy", None).by_source
    assert {source: scores[1].difference.interval.mean for source, scores in found.items()} == pytest.approx(
        {"all": 0.125, "aime24": 0.5, "aime25": -0.25}
    )


def test_files_are_written_and_nothing_of_another_place_is_loaded(sweep, tmp_path, capsys):
    assert main([str(sweep), "--baseline", "dapo", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "fipo is above dapo" in shown and "4 runs in 2 groups" in shown
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "fipo is above dapo" in page and "src=" not in page.split("<script>")[0]
    rows = list(csv.DictReader((tmp_path / "out" / "groups.csv").open()))
    assert [(row["group"], float(row["last"])) for row in rows] == [("dapo", 0.5), ("fipo", 0.875)]
    validations = list(csv.DictReader((tmp_path / "out" / "validations.csv").open()))
    assert len(validations) == 4 * 3 and float(validations[-1]["tokens"]) == 20_000


def test_names_of_groups_and_runs_are_shown_as_text(tmp_path):
    make_run(tmp_path / "<script>alert(1)<", {20: MIDDLE})
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert "<script>alert" not in (tmp_path / "out" / "comparison.html").read_text()


def test_the_baseline_is_a_group_its_beginning_or_a_run(sweep):
    grouping = group_runs(find_runs([sweep]))
    for name in ("fipo", "fi", str(sweep / "fipo" / "2")):
        assert build(grouping, name, "accuracy", None).baseline.name == "fipo"
    with pytest.raises(ConfigError, match=r"--baseline: there is no group grpo.*'dapo', 'fipo'"):
        build(grouping, "grpo", "accuracy", None)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "config.yaml").write_text("run: ["), "config.yaml cannot be read"),
        (lambda run: (run / "config.yaml").write_text("a: 1"), "is not a configuration of a run"),
        (lambda run: (run / METRICS_FILE).write_text("x\n{}\n"), "metrics.jsonl, line 1: not JSON"),
        (lambda run: (run / "validation" / "step-000020.parquet").write_bytes(b""), "step-000020.parquet cannot be"),
        (lambda run: (run / "config.yaml").unlink(), "holds no run"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_it(tmp_path, capsys, spoil, message):
    directory = make_run(tmp_path / "run", {20: MIDDLE})
    spoil(directory)
    assert main([str(directory), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_runs_that_have_validated_nothing_are_said_to_have_no_score(tmp_path, capsys):
    """And no time to a score of 0, which every run would reach."""
    make_run(tmp_path / "run", {})
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("1 run of fipo_7b\n") and "time to" not in shown
    assert "note: no run has a held-out accuracy: validation.every=N" in shown
    assert "time to" not in (tmp_path / "out" / "comparison.html").read_text()
    (line,) = csv.DictReader((tmp_path / "out" / "groups.csv").open())
    assert (line["target"], line["reached_target"]) == ("", "0")


def test_a_place_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="nowhere: not found"):
        find_runs([tmp_path / "nowhere"])


def test_help_takes_a_moment_and_a_comparison_no_torch(sweep, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-m", "megatron_fipo", "compare", "--help"], check=True, capture_output=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2, "of CPU time; torch alone takes more"
    script = (
        "import sys; from megatron_fipo.compare import main; "
        f"main([{str(sweep)!r}, '--output', {str(tmp_path / 'out')!r}]); "
        "print([name for name in ('torch', 'transformers', 'megatron.core') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
