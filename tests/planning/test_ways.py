"""Why: a planner's line is copied into the command line of a hundred GPUs. So it has to give the configuration that was
simulated, its numbers have to be the simulator's, and its choice the best of all that there is to choose from.

Not covered: whether the numbers come true on a GPU.
"""

import copy
import dataclasses
import functools
import re
import subprocess
import sys

import pytest

from megatron_fipo import planner
from megatron_fipo.config import Config
from megatron_fipo.config.checks import check
from megatron_fipo.config.configure import load_config
from megatron_fipo.models.model_config import ModelConfig, read_architecture
from megatron_fipo.planning.search import Plan, _Search, _Trainers, as_configured, plan_ways
from megatron_fipo.planning.shown import busy_warning, faster
from megatron_fipo.planning.ways import ASYNCHRONOUS, COLOCATED, SYNCHRONOUS, overrides, variants
from megatron_fipo.simulation.command import all_outcomes, settings_of
from megatron_fipo.simulation.options import parse
from megatron_fipo.simulation.settings import Settings
from megatron_fipo.sizing.estimate import estimate, in_turns, model_directory
from megatron_fipo.sizing.memory import GIB
from megatron_fipo.sizing.placement import turns_s
from megatron_fipo.sizing.timing import engine_costs, rollout_process_s

RECIPE = ("experiment=fipo_32b",)
# Each way's modes of the simulator: without and with early replacement.
MODES = {
    SYNCHRONOUS: ("rounds", "refill-2"),
    COLOCATED: ("colocated-rounds", "colocated-refill-2"),
    ASYNCHRONOUS: ("k1", "k1-2"),
}


@functools.cache
def model_config() -> ModelConfig:
    return read_architecture(model_directory("models/Qwen2.5-32B")[0])


def settings(*flags: str, config: Config | None = None) -> Settings:
    quick = ("--steps=3", "--warm-up=1", "--samples-at-once=512")
    return settings_of(parse([*quick, *flags]), config or load_config(RECIPE))


@functools.cache
def found(mean: int, *more: str) -> Plan:
    return plan_ways(load_config([*RECIPE, *more]), model_config(), settings(f"--mean={mean}"))


@pytest.mark.slow
@pytest.mark.parametrize("way", [SYNCHRONOUS, COLOCATED, ASYNCHRONOUS])
def test_the_overrides_give_what_was_simulated_and_the_simulator_says_the_same(way: str) -> None:
    (proposal,) = (each for each in found(3700).proposals if each.way == way)
    before = load_config(RECIPE)
    chosen = load_config([*RECIPE, *overrides(before, proposal.config).split()])
    assert chosen == proposal.config != before
    check(chosen, world_size=proposal.outcome.placement.estimate.world_size, local=False)
    assert as_configured(chosen, model_config(), settings("--mean=3700")).step_s == proposal.outcome.step_s
    mode = MODES[way][chosen.algorithm.filter_groups.over_sampling is not None]
    rows = all_outcomes(chosen, model_config(), settings("--mean=3700"), (mode,))
    same = [row for row in rows if row.mode.name == mode and row.placement.text == proposal.outcome.placement.text]
    assert [row.step_s for row in same] == [proposal.outcome.step_s]
    other = as_configured(chosen, model_config(), settings("--mean=3800"))
    assert other.step_s != proposal.outcome.step_s, "the control"


@pytest.mark.slow
def test_longer_responses_want_more_nodes_that_sample() -> None:
    nodes = {}
    for mean in (3700, 10_000):
        placed = {each.way: each.config.cluster.rollout_nodes for each in found(mean).proposals}
        assert placed.pop(COLOCATED) == 0
        nodes[mean] = placed
    for way in (SYNCHRONOUS, ASYNCHRONOUS):
        assert nodes[3700][way] < nodes[10_000][way], way


@pytest.mark.slow
@pytest.mark.matrix  # long: every point of a search is simulated
@pytest.mark.parametrize("way", [SYNCHRONOUS, ASYNCHRONOUS])
def test_no_split_and_no_size_of_an_engine_is_clearly_faster_than_the_choice(way: str) -> None:
    """All of them, simulated as exactly as the choice."""
    config = load_config([*RECIPE, "cluster.trainer_nodes=3", "cluster.rollout_nodes=3"])
    played = settings("--mean=3700")
    (variant, *_) = variants(way, config, played.rejected)
    search = _Search(way, variant, model_config(), played, _Trainers(model_config(), played))
    chosen = search.best()
    points = [(trainer, width) for trainer in range(1, 6) for width in (1, 2, 4, 8)]
    every = [outcome.step_s for point in points if (outcome := search._simulated(*point, played))]
    assert chosen is not None and chosen.step_s <= 1.05 * min(every)
    assert max(every) > 1.3 * min(every), "the control: the choice matters"


@pytest.mark.matrix  # the other way round is tried above
@pytest.mark.slow
def test_a_run_in_turns_can_be_taken_apart_again() -> None:
    config = load_config([*RECIPE, "rollout=colocated", "cluster.trainer_nodes=4", "cluster.rollout_nodes=0"])
    plan = plan_ways(config, model_config(), settings(config=config))
    assert {each.way for each in plan.proposals} == {SYNCHRONOUS, COLOCATED, ASYNCHRONOUS} and plan.refused == {}
    apart = next(each.config for each in plan.proposals if each.way == ASYNCHRONOUS)
    assert not apart.rollout.shared_gpu and apart.rollout.weight_transfer == "process_group"
    assert apart.cluster.trainer_nodes + apart.cluster.rollout_nodes == 4


def test_what_cannot_be_is_said() -> None:
    config = load_config(["experiment=fipo_7b", "cluster.trainer_nodes=1", "cluster.rollout_nodes=0"])
    math_7b = read_architecture(model_directory(config.model.path)[0])
    plan = plan_ways(config, math_7b, settings("--mean=1000", config=config))
    assert [each.way for each in plan.proposals] == [COLOCATED]
    assert plan.refused == dict.fromkeys((SYNCHRONOUS, ASYNCHRONOUS), "one node cannot be split")


@pytest.mark.slow
def test_preflight_names_another_way_only_if_it_is_clearly_faster() -> None:
    config, plan, played = load_config(RECIPE), found(3700), settings("--mean=3700")
    line = faster(config, as_configured(config, model_config(), played), plan)
    assert line is not None and plan.proposals[0].way in line
    assert line.endswith(overrides(config, plan.proposals[0].config))
    best = plan.proposals[0]
    assert faster(best.config, best.outcome, plan) is None
    within = dataclasses.replace(best.outcome, step_s=1.09 * best.outcome.step_s)
    assert faster(config, within, plan) is None


def test_copies_in_turns_leave_gradients_out() -> None:
    """By hand, for the stage with the most. Its gradients are 4.3 GB, which would take 0.1 s."""
    config = in_turns(load_config(RECIPE), 4)
    result = estimate(config, model_config())
    weights, moments = 2 * 1_072_679_936, 12 * 1_072_679_936 / 4
    engine = 2 * 32_763_876_352 / 4
    assert result.time.turns == pytest.approx((3 * weights + moments + 2 * engine) / (64e9 * 0.7), rel=1e-3)
    assert result.time.total == result.time.sample + result.time.trainer
    assert result.time.trainer > result.time.log_probs + result.time.update + result.time.weights
    freed = [dataclasses.replace(stage, gradients=100 * GIB) for stage in result.stages]
    assert turns_s(config, model_config(), freed) == result.time.turns
    assert estimate(load_config(RECIPE), model_config()).time.turns == 0


def test_an_engine_of_several_gpus_pays_for_what_crosses_between_them() -> None:
    config = load_config(RECIPE)
    costs = []
    for width in (1, 2, 8):
        config.rollout.tensor_parallel = width
        costs.append(engine_costs(config, model_config()))
    assert costs[0].token_sent_s == 0 < costs[1].token_sent_s < costs[2].token_sent_s
    assert costs[0].step_s < costs[1].step_s == costs[2].step_s
    assert costs[0].decode_s(64, 1e5) > costs[1].decode_s(64, 1e5) > costs[2].decode_s(64, 1e5)


@pytest.mark.parametrize(("length", "least", "most"), [(3700, 0.053, 0.055), (20_000, 0.020, 0.022)])
def test_receiving_takes_what_was_measured(length: int, least: float, most: float) -> None:
    """CPU seconds per million tokens, as benchmarks/README.md has them."""
    assert 0.95 * least < rollout_process_s(1e6 / length, 1e6) < 1.05 * most


@pytest.mark.slow
def test_a_rollout_process_that_is_too_slow_is_warned_of() -> None:
    busy = found(3700).proposals[0].outcome
    assert busy_warning(busy) is None and 0 < busy.rollout_process_busy < 0.02
    short = copy.deepcopy(load_config([*RECIPE, "rollout.max_response_length=40", "rollout.max_prompt_length=40"]))
    many = as_configured(short, model_config(), settings(config=short))
    assert many.rollout_process_busy > 10 * busy.rollout_process_busy
    assert "on one core" in (busy_warning(dataclasses.replace(many, rollout_process_busy=0.6)) or "")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = planner.main(arguments)
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, ""), captured.err
    return captured.out


@pytest.mark.matrix  # tests/simulation has as many engines
@pytest.mark.slow
def test_two_thousand_nodes_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = ("cluster.trainer_nodes=1000", "cluster.rollout_nodes=1000", "algorithm.prompts_per_step=8000")
    text = shown(capsys, *RECIPE, *nodes, "algorithm.mini_batch_prompts=1000", "--mean=3700")
    assert "2,000 nodes of 8" in text and re.search(r"planned in \d+\.\d s", text)
    assert all(way in text for way in MODES) and "is had by adding to the command line" in text


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ([*RECIPE, "--mean=30000"], "--mean: 30000 tokens are more than rollout.max_response_length=20480"),
        (["--maen=1"], "did you mean --mean?"),
        (["run.stepz=1"], "run.stepz"),
        ([*RECIPE, "cluster.trainer_nodes=1", "cluster.rollout_nodes=1", "hardware.memory_gib=20"], "no layout"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = planner.main(arguments)
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and answer in error, error


@pytest.mark.slow
def test_planning_needs_no_torch() -> None:
    code = "import sys; from megatron_fipo.planner import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    nodes = ("cluster.trainer_nodes=1", "cluster.rollout_nodes=1")
    command = [sys.executable, "-c", code, "experiment=fipo_7b", *nodes]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.splitlines()[-1] == "False"
