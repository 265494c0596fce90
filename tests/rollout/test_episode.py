"""Samples that environments and a real vLLM server make in turns: which tokens are whose, and what they follow.

Why: a later turn that does not extend the earlier ones token by token has other log-probs than the trainer's, and a
told token that is taken for an action is trained on; neither shows in a text. Log-probs are held against transformers'
own over the whole sample. What hangs or crashes is a process of tests/environments. Not covered: what is learnt.
"""

from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config import EnvironmentConfig, RewardConfig
from megatron_fipo.environments.pool import EnvironmentPool
from megatron_fipo.errors import RolloutError
from megatron_fipo.records.problem import Problem
from megatron_fipo.records.sample import Group, Sample
from megatron_fipo.rewards.failures import FailureLog
from megatron_fipo.rewards.pool import RewardPool
from megatron_fipo.rollout.episode import Episodes, Surroundings
from megatron_fipo.rollout.generator import EngineGenerator
from megatron_fipo.rollout.main_loop import all_of
from megatron_fipo.rollout.ongoing import Ongoing
from megatron_fipo.rollout.work import Sampling, Work
from tests.rollout.conftest import Rollout
from tests.rollout.engines import VOCABULARY, forward_log_probs, generate, problems, sampling, serving_pool

pytestmark = pytest.mark.slow
SINGLE_TURN = "megatron_fipo.environments.single_turn:make"
EXAMPLES = "tests.environments.examples"
TOLD = [[40, 41, 42], [50]]


def in_turns(
    rollout: Rollout,
    name: str,
    *,
    prompts: int = 4,
    samples: int = 3,
    max_turns: int = 5,
    max_tokens: int = 24,
    attempts: int = 2,
    temperature: float = 1.0,
    failures: FailureLog | None = None,
    **options: Any,
) -> list[Group]:
    """The groups, in the order of their problems."""
    settings = EnvironmentConfig(name=name, options=options, workers=2, step_timeout_s=3.0)
    with EnvironmentPool(settings, resolve_embedded("embedded:tiny"), VOCABULARY) as environments:
        around = Surroundings(environments, attempts, max_turns, 8, str, failures or FailureLog())
        chosen = sampling(max_tokens=max_tokens, temperature=temperature)
        groups = in_turns_of(rollout.client, around, problems(prompts), samples, chosen)
        return Ongoing(rollout.client, groups).to_the_end(lambda: pytest.fail("no server is left"))


async def in_turns_of(
    client: EngineGenerator, around: Surroundings, asked: list[Problem], samples: int, chosen: Sampling
) -> list[Group]:
    episodes = Episodes(client, around)

    async def group(problem: Problem, seed: int) -> Group:
        work = Work(problem, samples, chosen, seed)
        await episodes.complete(work)
        return work.group

    return await all_of(group(problem, seed) for seed, problem in enumerate(asked))


def check_log_probs(rollout: Rollout, group: Group) -> None:
    """Those of actions are the model's own, given every token before them; context has none."""
    for sample in group.samples:
        own = forward_log_probs(rollout.model, group.problem.token_ids, sample)
        said = sample.streams["rollout_log_probs"]
        for part in sample.segments:
            if part.action:
                assert abs(own[part.start : part.end].numpy() - said[part.start : part.end]).max() < 1e-4
            else:
                assert not said[part.start : part.end].any()


def told(sample: Sample) -> list[list[int]]:
    return [sample.token_ids[part.start : part.end].tolist() for part in sample.told]


def test_an_environment_of_one_turn_gives_the_samples_of_none(rollout: Rollout) -> None:
    """Bit for bit, so that samples in turns begin as samples of one turn."""
    plain = generate(rollout.client, problems(4), 3, sampling(), seeds=range(4))
    assert in_turns(rollout, SINGLE_TURN) == plain
    beginnings = in_turns(rollout, f"{EXAMPLES}:Told", told=TOLD, max_tokens=200)
    for group, first in zip(beginnings, plain, strict=True):
        for sample, alone in zip(group.samples, first.samples, strict=True):
            assert sample.token_ids[: len(alone)].tolist() == alone.token_ids.tolist()
            assert sample.turns > 1 or alone.finish_reason == "length"


def test_each_token_is_the_policys_or_was_told_and_follows_all_before_it(rollout: Rollout) -> None:
    groups = in_turns(rollout, f"{EXAMPLES}:Told", told=TOLD, opening=[60, 61], max_tokens=160)
    assert [group.problem.id for group in groups] == [problem.id for problem in problems(4)]
    turns = set()
    for group in groups:
        check_log_probs(rollout, group)
        for sample in group.samples:
            assert told(sample) == [[60, 61], *TOLD][: sample.turns], "what it was told, in order"
            turns.add(sample.turns)
            if sample.turns == 3:
                # The environment counted the tokens that it was given.
                assert sample.result is not None and sample.result.reward == sample.actions
                assert sample.result.extra == {"turns": 3.0, "id": group.problem.id} and sample.result.accuracy == 0.25
            else:
                assert sample.result is None, "cut off: the rule judges it"
    assert 3 in turns, "the control: some came to the end"
    distinct = {tuple(sample.token_ids) for group in groups for sample in group.samples}
    assert len(distinct) == 12
    assert in_turns(rollout, f"{EXAMPLES}:Told", told=TOLD, opening=[60, 61], max_tokens=160) == groups, "by the seeds"


def test_limits_of_tokens_and_of_turns_end_a_sample_with_an_action(rollout: Rollout) -> None:
    whole = in_turns(rollout, f"{EXAMPLES}:Told", told=TOLD * 9, max_tokens=100, max_turns=2)
    reasons = {sample.finish_reason for group in whole for sample in group.samples}
    assert reasons == {"turns", "length"}
    for group in whole:
        check_log_probs(rollout, group)
        for sample in group.samples:
            assert len(sample) <= 100 and sample.turns <= 2 and sample.result is None
            assert not sample.segments or sample.segments[-1].action
            assert sample.turns == 2 or sample.finish_reason == "length"


def test_greedy_samples_are_made_once(rollout: Rollout) -> None:
    (group,) = in_turns(rollout, f"{EXAMPLES}:Told", told=TOLD, prompts=1, temperature=0.0, max_tokens=60)
    assert len(group.samples) == 3 and group.samples[0] is group.samples[2]


@pytest.mark.parametrize(
    ("way", "in_reset", "outcome"),
    [("hang", False, "timeout"), ("exit", False, "crash"), ("raise", True, "crash")],
)
def test_a_failed_environment_costs_its_samples(
    rollout: Rollout, way: str, in_reset: bool, outcome: str, tmp_path: Path
) -> None:
    """Of one problem of two, whose samples are not judged; those of the other are whole, and the failure is noted."""
    failures = FailureLog(tmp_path)
    name, options = f"{EXAMPLES}:Broken", {"way": way, "of": "-1", "in_reset": in_reset}
    sound, broken = in_turns(rollout, name, prompts=2, samples=2, max_tokens=160, failures=failures, **options)
    for sample in broken.samples:
        assert sample.result is not None and sample.result.outcome == outcome and not sample.result.was_judged
        assert sample.finish_reason == "environment" and sample.turns == (0 if in_reset else 1)
        assert not sample.told
    assert {sample.finish_reason for sample in sound.samples} <= {"stop", "length"}
    check_log_probs(rollout, sound)
    assert len((tmp_path / "reward_failures.jsonl").read_text().splitlines()) == 2
    with RewardPool(RewardConfig(workers=1), 100) as verifiers:
        judged = verifiers.submit(broken, decode=str).result(60)
        assert [result.outcome for result in judged.results] == [outcome] * 2
        judged = verifiers.submit(sound, decode=str).result(60)
        assert all(result.was_judged for result in judged.results)


def test_a_reset_that_fails_once_is_repeated(rollout: Rollout, tmp_path: Path) -> None:
    options = {"way": "raise", "in_reset": True, "until": str(tmp_path / "failed")}
    (group,) = in_turns(rollout, f"{EXAMPLES}:Broken", prompts=1, samples=1, max_tokens=160, **options)
    assert group.samples[0].finish_reason != "environment" and Path(options["until"]).exists()
    Path(options["until"]).unlink()
    (group,) = in_turns(rollout, f"{EXAMPLES}:Broken", prompts=1, samples=1, attempts=1, **options)
    assert group.samples[0].finish_reason == "environment", "the control: not without another attempt"


def test_an_environment_that_was_lost_begins_again_under_the_same_seed(rollout: Rollout) -> None:
    """Crashes of other samples kill it between its turns; what comes out is as if nothing had happened."""
    options: dict[str, Any] = {"of": "-1", "keeps_state": False, "prompts": 2, "samples": 4, "max_tokens": 160}
    lost, _ = in_turns(rollout, f"{EXAMPLES}:Broken", way="exit", attempts=20, **options)
    undisturbed, _ = in_turns(rollout, f"{EXAMPLES}:Broken", way="raise", **options)
    assert lost == undisturbed and any(sample.turns == 2 for sample in lost.samples)


def test_without_a_server_the_next_event_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Environments keep what they have; the caller may give up meanwhile, and nothing waits for ever."""
    from megatron_fipo.engines.access import TOKEN_VARIABLE

    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    servers = serving_pool(["http://127.0.0.1:9"], tmp_path)
    settings = EnvironmentConfig(name=SINGLE_TURN, workers=1)
    with (
        EnvironmentPool(settings, resolve_embedded("embedded:tiny"), VOCABULARY) as environments,
        EngineGenerator(servers) as client,
    ):
        around = Surroundings(environments, 1, 1, 8, str, FailureLog())
        asked = Ongoing(client, in_turns_of(client, around, problems(1), 1, sampling()))
        with pytest.raises(RolloutError, match=r"no vLLM server is left|failed"):
            asked.to_the_end(lambda: (_ for _ in ()).throw(RolloutError("no vLLM server is left")))
