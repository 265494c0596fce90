"""Samples that an environment and the engines make in turns.

A turn is one request for one sample, whose prompt is all that came before, token by token: nothing is tokenised twice,
and a later turn extends the earlier ones exactly. While an environment answers, the engines sample for others.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy

from megatron_fipo.config import Config
from megatron_fipo.environments.pool import EnvironmentFailed, EnvironmentLost, EnvironmentPool, PooledEnvironment
from megatron_fipo.environments.protocol import Task
from megatron_fipo.records.problem import Problem
from megatron_fipo.records.sample import RewardResult, Sample
from megatron_fipo.rewards.failures import LONGEST_NOTED, Failure, FailureLog
from megatron_fipo.rollout.generator import EngineGenerator
from megatron_fipo.rollout.main_loop import all_of
from megatron_fipo.rollout.transcript import Transcript
from megatron_fipo.rollout.work import Sampling, Work

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


class Turn(Work):
    """One action of one sample."""

    def __init__(self, problem: Problem, sampling: Sampling, seed: int):
        """`problem` has all that came before as its prompt; `seed` is the engine's own."""
        super().__init__(problem, 1, sampling, seed)

    @property
    def first_seed(self) -> int:
        return self.seed


class Episodes:
    """Completes work by samples of several turns, a task for each; `sampling.max_tokens` bounds all turns together.

    A sample has its result where its environment gave one, or failed: then it is timeout or crash. Every first turn is
    what EngineGenerator samples.
    """

    def __init__(self, engines: EngineGenerator, around: Surroundings):
        """Nothing is begun."""
        self._engines, self._around = engines, around
        self._places = asyncio.Semaphore(around.most_open)

    async def complete(self, work: Work, *, first: bool = False) -> None:
        """Make the samples that the work lacks. What has begun and not ended begins anew.

        Raises what EngineGenerator.complete does, and what EnvironmentPool raises for all.
        """

        async def sample(index: int) -> None:
            work.add(index, await self._sample(work, work.first_seed + index, first))

        await all_of(sample(index) for index in work.missing())

    async def _sample(self, work: Work, seed: int, first: bool) -> Sample:
        async with self._places:
            for attempts_left in reversed(range(self._around.attempts)):
                transcript = Transcript(work.problem)
                environment = self._around.environments.open()
                try:
                    return await self._episode(environment, transcript, work.sampling, seed, first)
                except EnvironmentFailed as error:
                    may_repeat = isinstance(error, EnvironmentLost) or not transcript.turns
                    if not (attempts_left and may_repeat):
                        return self._failed(transcript, error)
                finally:
                    environment.close()
        raise AssertionError("the last attempt returns")

    async def _episode(
        self, environment: PooledEnvironment, transcript: Transcript, sampling: Sampling, seed: int, first: bool
    ) -> Sample:
        """Turn after turn to the end. EnvironmentFailed where the environment does."""
        limit = sampling.max_tokens
        told = (await asyncio.wrap_future(environment.reset(_task(transcript.problem))))["context"]
        if len(told) >= limit:
            raise EnvironmentFailed("crash", f"reset: {len(told)} tokens leave no room for an action in {limit}")
        for turns_left in reversed(range(self._around.max_turns)):
            transcript.tell(told)
            turn = _turn(transcript, replace(sampling, max_tokens=limit - len(transcript)), seed)
            await self._engines.complete(turn, first=first)
            action = turn.arrived[0]
            transcript.act(action)
            left = limit - len(transcript)
            answer = await asyncio.wrap_future(environment.step(_action(action, turns_left, left)))
            if "verdict" in answer:
                return transcript.sample(action.finish_reason, _result(answer["verdict"]))
            told = answer["context"]
            if len(told) >= left:
                return transcript.sample("length")
        return transcript.sample("turns")

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


def _turn(transcript: Transcript, sampling: Sampling, seed: int) -> Turn:
    """The next action, after what the transcript has."""
    so_far = transcript.token_ids()
    problem = replace(transcript.problem, token_ids=so_far)
    # The first turn is that of a sample of one turn; each later one has a seed of its own, by all before it.
    return Turn(problem, sampling, _turn_seed(seed, so_far) if transcript.turns else seed)


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
