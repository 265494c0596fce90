"""A run's rollouts without a server that answers, a state of them, and that state's checkpoint."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config.configure import load_config
from megatron_fipo.loop_state import LoopState
from megatron_fipo.rollout import snapshot
from megatron_fipo.rollout.collector import CollectorState
from megatron_fipo.rollout.ledger import Ends, LedgerState, State, StepCounts, Ticket
from megatron_fipo.rollout.main_loop import MainLoop
from megatron_fipo.rollout.seeds import request_seed
from megatron_fipo.rollout.snapshot import RolloutState
from megatron_fipo.rollout.training_rollouts import TrainingRollouts
from megatron_fipo.tracking.console import Console
from tests.loop_state.states import STEP, group, write


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingRollouts]:
    model = resolve_embedded("embedded:tiny")
    with pytest.MonkeyPatch.context() as patch, Console(1, 0, enabled=False) as console:
        patch.setenv("FIPO_ROLLOUT_TOKEN", "secret")
        server = ["rollout.servers=0", "rollout.addresses=[http://127.0.0.1:9]"]
        config = load_config([*server, "reward.rule=exact_match", "reward.workers=1"])
        directory = tmp_path_factory.mktemp("run")
        with TrainingRollouts(config, model, directory, console, MainLoop()) as rollouts:
            yield rollouts


@pytest.fixture(scope="package")
def before(run: TrainingRollouts) -> LoopState:
    """A state with three groups that wait for their step, and a ticket that waits to be sampled, of nine."""
    groups = {number: group(run, number) for number in (4, 5, 7)}
    names = [(number, each.problem.id, State.READY) for number, each in groups.items()]
    tickets = tuple(
        (Ticket(number, name, request_seed(0, "train", number), number % 2, STEP - 1), at)
        for number, name, at in [*names, (8, run.problems[8].id, State.OPEN)]
    )
    counts = StepCounts(rounds=1, opened=3, carried_in=2, rejected={"all_wrong": 1})
    ledger = LedgerState(9, Ends(trained=3, rejected={"all_wrong": 2}), counts, tickets)
    state = run.snapshot()
    order = replace(state.collected.order, position=9, returned=(3, 1))
    return LoopState(
        step=STEP,
        seconds=1.5,
        results={"accuracy_before": None},
        rollout=RolloutState(CollectorState(order, ledger, groups), state.data),
    )


@pytest.fixture(scope="package")
def saved(before: LoopState, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint's files; its samples are in two, of two groups and of one."""
    directory = tmp_path_factory.mktemp("saved") / "step-000003"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "_BYTES_PER_FILE", 150)
        write(directory, before)
    assert len(list(directory.glob("rollout/*"))) == 3
    return directory
