"""A collector over a coroutine in place of servers and verifiers, which samples by the seed alone."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_fipo.data.fingerprint import Fingerprint
from megatron_fipo.data.order import PromptSampler
from megatron_fipo.records.problem import Problem
from megatron_fipo.records.sample import Group, Partial
from megatron_fipo.records.streams import checked
from megatron_fipo.rollout import snapshot
from megatron_fipo.rollout.admission import Admission
from megatron_fipo.rollout.collector import Batch, CollectorState, RolloutCollector, Sampler
from megatron_fipo.rollout.filters import differing_accuracies
from megatron_fipo.rollout.main_loop import MainLoop
from megatron_fipo.rollout.seeds import request_seed
from megatron_fipo.rollout.work import Sampling, Work
from tests.rollout.groups import make_group, make_problem

PROBLEMS = [make_problem(f"p{number}") for number in range(7)]
DATA = Fingerprint(len(PROBLEMS), "0" * 32, "0" * 32)


class Killed(Exception):
    """The process is gone."""


@dataclass
class Engines:
    """Samples by the seed alone, as engines of one version do, token after token, and dies when it is told to."""

    rejects: float = 0.0
    groups_to_live: int = 10**9
    asked: list[tuple[str, int]] = field(default_factory=list)
    tokens: int = 0
    """Sampled in all lives."""
    loop: MainLoop = field(default_factory=MainLoop)

    def work(self, problem: Problem, seed: int) -> Work:
        return Work(problem, 2, Sampling(1.0, 1.0, -1, 2, [1]), seed)

    async def judged(self, work: Work) -> Group:
        """Samples what the work lacks in random order: two tokens for each sample, and a wait before each."""
        self.asked.append((work.problem.id, work.seed))
        self.groups_to_live -= 1
        if self.groups_to_live < 0:
            raise Killed
        whole = self.group(work.problem.id, work.seed)
        drawn = random.Random(work.seed)
        for index in drawn.sample(work.missing(), len(work.missing())):
            for length in range(len(work.begun.get(index, ())) + 1, 3):
                for _ in range(drawn.randint(1, 9)):
                    await asyncio.sleep(0)
                self.tokens += 1
                streams = whole.samples[index].streams
                so_far = {name: values[:length] for name, values in streams.items()}
                work.add(index, Partial(checked(so_far, "a part"), 0) if length < 2 else whole.samples[index])
        return work.group.with_results(whole.results)

    def group(self, name: str, seed: int) -> Group:
        teaches = random.Random(seed).random() >= self.rejects
        return make_group(name, 1.0, float(not teaches))

    def die(self) -> None:
        """All that is under way is gone."""
        self.loop.close()
        self.loop = MainLoop()

    def go_on(self, turns: int) -> None:
        """What is under way goes on for so long."""

        async def some() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.loop.run(some())


def collector(
    admission: Admission,
    engines: Engines,
    problems: Sequence[Problem] = PROBLEMS,
    *,
    overlaps: bool = False,
    part_prompts: int | None = None,
) -> RolloutCollector:
    prompts = PromptSampler(len(problems), seed=1, shuffle=True)
    sampler = Sampler(engines.work, engines.judged, engines.loop.begin)
    return RolloutCollector(
        problems,
        prompts,
        admission,
        differing_accuracies,
        sampler,
        lambda n: request_seed(1, "train", n),
        overlaps=overlaps,
        part_prompts=part_prompts,
    )


def begun(admission: Admission, engines: Engines, *, overlaps: bool = False) -> RolloutCollector:
    made = collector(admission, engines, overlaps=overlaps)
    made.settle(0)
    return made


def batch_of(rollouts: RolloutCollector, engines: Engines) -> Batch:
    return engines.loop.run(rollouts.next_batch())


def numbers(batch: Batch) -> list[int]:
    return [ticket.number for ticket in batch.tickets]


def rejecting(*wanted: bool) -> Engines:
    """Engines whose first groups are rejected or not, as `wanted` says; the later ones are not."""
    engines = Engines()
    rejected = {request_seed(1, "train", number) for number, rejects in enumerate(wanted) if rejects}
    engines.group = lambda name, seed: make_group(name, 1.0, float(seed in rejected))  # type: ignore[method-assign]
    return engines


def through_files(state: CollectorState, directory: Path, step: int) -> CollectorState:
    """The state as a resumed run reads it."""
    directory.mkdir()
    snapshot.encode(snapshot.RolloutState(state, DATA)).write(directory)
    return snapshot.read(directory, step=step, vocab_size=8).collected
