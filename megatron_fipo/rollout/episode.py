"""Samples that an environment and the engines make in turns.

A turn is one request for one sample, whose prompt is all that came before, token by token: nothing is tokenised twice,
and a later turn extends the earlier ones exactly. While an environment answers, the engines sample for others.
"""

import asyncio
import hashlib
import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy

from megatron_fipo.config import Config
from megatron_fipo.environments.pool import EnvironmentFailed, EnvironmentLost, EnvironmentPool, PooledEnvironment
from megatron_fipo.environments.protocol import Task
from megatron_fipo.records.problem import Problem
from megatron_fipo.records.sample import Group, RewardResult, Sample
from megatron_fipo.rewards.failures import LONGEST_NOTED, Failure, FailureLog
from megatron_fipo.rollout.events import Steps
from megatron_fipo.rollout.generator import EngineGenerator
from megatron_fipo.rollout.transcript import Transcript
from megatron_fipo.rollout.work import Pending, Sampling, Work, spread

_OPEN_PER_PLACE = 2
"""Samples that are under way for each place in an engine: some are with their environments."""


@dataclass(frozen=True)
class Surroundings:
    """What the samples of a run have in common."""

    environments: EnvironmentPool
    attempts: int
    max_turns: int
    most_open: int
    """Samples that are under way at the same time."""
    decode: Callable[[list[int]], str]
    failures: FailureLog


def surroundings(
    config: Config, environments: EnvironmentPool, decode: Callable[[list[int]], str], failures: FailureLog
) -> Surroundings:
    """As a configuration has them."""
    rollout, settings = config.rollout, config.environment
    most = _OPEN_PER_PLACE * rollout.max_num_seqs * (len(rollout.addresses) or rollout.servers)
    return Surroundings(environments, settings.attempts, settings.max_turns, most, decode, failures)


def generate_in_turns(
    engines: EngineGenerator,
    around: Surroundings,
    problems: Sequence[Problem],
    samples_per_prompt: int,
    sampling: Sampling,
    seeds: Sequence[int],
    on_group: Callable[[Group], None] | None = None,
) -> Steps[list[Group]]:
    """As EngineGenerator.generate, for samples of several turns; `sampling.max_tokens` bounds all turns together.

    A sample has its result where its environment gave one, or failed: then it is timeout or crash. Every first turn is
    what EngineGenerator.generate samples. Raises what that does, and what EnvironmentPool raises for all.
    """
    engines.check_prompts(problems)
    episodes = Episodes(around, problems, samples_per_prompt, sampling, seeds, on_group)
    yield from engines.complete(episodes)
    return episodes.groups()


class Turn(Work):
    """One action of one sample."""

    def __init__(self, problem: Problem, sampling: Sampling, seed: int):
        """`problem` has all that came before as its prompt; `seed` is the engine's own."""
        super().__init__(problem, 1, sampling, seed)

    @property
    def first_seed(self) -> int:
        return self.seed


class Episodes(Pending):
    """All samples of a `generate_in_turns`: a task for each, which puts its turns where servers find them."""

    def __init__(
        self,
        around: Surroundings,
        problems: Sequence[Problem],
        samples_per_prompt: int,
        sampling: Sampling,
        seeds: Sequence[int],
        on_group: Callable[[Group], None] | None,
    ):
        super().__init__(deque())
        self._around, self._sampling, self._on_group = around, sampling, on_group
        self._asked_for = list(zip(problems, seeds, strict=True))
        # Greedy samples are all the same, so one is made.
        self._samples, self._copies = (1, samples_per_prompt) if sampling.temperature == 0 else (samples_per_prompt, 1)
        self._places = asyncio.Semaphore(around.most_open)
        self._turns: dict[Work, asyncio.Future[Sample]] = {}
        self._all: list[asyncio.Future[list[Group]]] = []
        """One, as soon as the loop runs. It outlives a time without servers."""

    def __bool__(self) -> bool:
        return not (self._all and self._all[0].done()) or super().__bool__()

    def go_on(self) -> None:
        if not self._all:
            self._all.append(asyncio.ensure_future(self._collect()))
            self._all[0].add_done_callback(lambda _: self.changed.set())
        elif self._all[0].done():
            self._all[0].result()

    def ended(self, work: Work) -> None:
        turn = self._turns.pop(work)
        if not turn.done():
            turn.set_result(work.arrived[0])

    def groups(self) -> list[Group]:
        """The groups in the order of their problems, once nothing is pending."""
        return self._all[0].result()

    async def _collect(self) -> list[Group]:
        return list(await asyncio.gather(*(self._group(problem, seed) for problem, seed in self._asked_for)))

    async def _group(self, problem: Problem, seed: int) -> Group:
        first = spread(seed)
        made = await asyncio.gather(*(self._sample(problem, first + index) for index in range(self._samples)))
        group = Group(problem, tuple(made) * self._copies)
        if self._on_group is not None:
            self._on_group(group)
        return group

    async def _sample(self, problem: Problem, seed: int) -> Sample:
        async with self._places:
            for attempts_left in reversed(range(self._around.attempts)):
                transcript = Transcript(problem)
                environment = self._around.environments.open()
                try:
                    return await self._episode(environment, transcript, seed)
                except EnvironmentFailed as error:
                    may_repeat = isinstance(error, EnvironmentLost) or not transcript.turns
                    if not (attempts_left and may_repeat):
                        return self._failed(transcript, error)
                finally:
                    environment.close()
        raise AssertionError("the last attempt returns")

    async def _episode(self, environment: PooledEnvironment, transcript: Transcript, seed: int) -> Sample:
        """Turn after turn to the end. EnvironmentFailed where the environment does."""
        limit = self._sampling.max_tokens
        told = (await asyncio.wrap_future(environment.reset(_task(transcript.problem))))["context"]
        if len(told) >= limit:
            raise EnvironmentFailed("crash", f"reset: {len(told)} tokens leave no room for an action in {limit}")
        for turns_left in reversed(range(self._around.max_turns)):
            transcript.tell(told)
            action = await self._act(transcript, limit - len(transcript), seed)
            transcript.act(action)
            left = limit - len(transcript)
            answer = await asyncio.wrap_future(environment.step(_action(action, turns_left, left)))
            if "verdict" in answer:
                return transcript.sample(action.finish_reason, _result(answer["verdict"]))
            told = answer["context"]
            if len(told) >= left:
                return transcript.sample("length")
        return transcript.sample("turns")

    async def _act(self, transcript: Transcript, budget: int, seed: int) -> Sample:
        """One action, after what the transcript has."""
        so_far = transcript.token_ids()
        problem = replace(transcript.problem, token_ids=so_far)
        # The first turn is that of a sample of one turn; each later one has a seed of its own, by all before it.
        turn_seed = _turn_seed(seed, so_far) if transcript.turns else seed
        turn = Turn(problem, replace(self._sampling, max_tokens=budget), turn_seed)
        self._turns[turn] = asyncio.get_running_loop().create_future()
        self.waiting.append(turn)
        self.changed.set()
        return await self._turns[turn]

    def _failed(self, transcript: Transcript, error: EnvironmentFailed) -> Sample:
        problem = transcript.problem
        sample = transcript.sample("environment", RewardResult(0.0, 0.0, "", error.outcome))
        self._around.failures.add(
            Failure(
                problem=problem.id,
                data_source=problem.data_source,
                ground_truth=problem.ground_truth[-LONGEST_NOTED:],
                response=self._around.decode(sample.token_ids.tolist())[-LONGEST_NOTED:],
                outcome=error.outcome,
                error=error.error,
                traceback=error.traceback,
            )
        )
        return sample


def _turn_seed(seed: int, so_far: numpy.ndarray) -> int:
    """62 bits, of the sample's seed and all its tokens."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:".encode() + so_far.tobytes(), digest_size=8).digest()) >> 2


def _task(problem: Problem) -> Task:
    return Task(problem.id, problem.text, problem.ground_truth, problem.data_source, json.loads(problem.columns))


def _action(action: Sample, turns_left: int, tokens_left: int) -> dict[str, Any]:
    """The fields of protocol.Action but for its text, which the environment's process decodes."""
    return {
        "token_ids": action.token_ids.tolist(),
        "finish_reason": action.finish_reason,
        "turns_left": turns_left,
        "tokens_left": tokens_left,
    }


def _result(verdict: dict[str, Any] | None) -> RewardResult | None:
    """An environment's own verdict, before the overlong penalty."""
    if verdict is None:
        return None
    return RewardResult(verdict["accuracy"], verdict["reward"], verdict["answer"], "judged", verdict["extra"])
