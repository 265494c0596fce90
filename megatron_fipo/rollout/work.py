"""What is to be sampled: groups on their way, and which of them wait for a server."""

import asyncio
import functools
import hashlib
import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_fipo.engines.generate_messages import GenerateRequest
from megatron_fipo.errors import RolloutError
from megatron_fipo.records.problem import Problem
from megatron_fipo.records.routes import RouteFormat
from megatron_fipo.records.sample import Group, Partial, Sample
from megatron_fipo.records.streams import TOKEN_IDS

Parts = Mapping[int, Sample | Partial]
"""What there is of a group's samples, by their index."""


@dataclass(frozen=True)
class Begun:
    """A group that is being sampled."""

    problem: Problem
    parts: Parts
    """None is empty."""


MAX_RETRIES = 3
"""Failed requests for one group, on servers that are well, after which the run gives up."""


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled. Temperature 0 is greedy; top_k −1 is off; a stop token ends a response, kept in it."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_token_ids: list[int]
    routes: RouteFormat | None = None
    """What the experts of tokens look like, which come with each sample; None: they do not."""


class Work:
    """One group on its way: what has arrived of it, and which servers have failed it."""

    def __init__(self, problem: Problem, samples: int, sampling: Sampling, seed: int):
        self.problem, self.sampling, self.seed = problem, sampling, seed
        # Greedy samples are all the same, so one is asked for.
        self.samples, self._copies = (1, samples) if sampling.temperature == 0 else (samples, 1)
        self.arrived: dict[int, Sample] = {}
        self.begun: dict[int, Partial] = {}
        """What there is of samples that have not ended: the next server goes on with it."""
        self.failed: dict[str, str] = {}
        self._failures = 0

    @property
    def is_whole(self) -> bool:
        """Whether every sample has arrived."""
        return len(self.arrived) == self.samples

    def add(self, index: int, sample: Sample | Partial) -> None:
        """Take what has arrived of the sample `index`: all of it, or more of its beginning than before."""
        if isinstance(sample, Partial):
            self.begun[index] = sample
        else:
            self.arrived[index] = sample
            self.begun.pop(index, None)

    def so_far(self) -> Begun:
        """What has arrived, whole or not."""
        there: dict[int, Sample | Partial] = {**self.begun, **self.arrived}
        return Begun(self.problem, {index: there[index] for index in sorted(there)})

    def go_back_to(self, arrived: Mapping[int, Sample], begun: Mapping[int, Partial]) -> None:
        """Ask again for what has arrived since there was this."""
        self.arrived, self.begun = dict(arrived), dict(begun)

    @property
    def first_seed(self) -> int:
        """The engine's seed of sample 0; the others have the next ones."""
        return spread(self.seed)

    def missing(self) -> list[int]:
        """Indices of the samples that have not arrived."""
        return [index for index in range(self.samples) if index not in self.arrived]

    @functools.cached_property
    def group(self) -> Group:
        """The whole group, its samples in order: one object, by which the caller knows what it was given before."""
        return Group(self.problem, tuple(self.arrived[index] for index in range(self.samples)) * self._copies)

    def request(self, indices: Sequence[int], cache_salt: str, stream_tokens: int) -> GenerateRequest:
        """For the samples of these indices; prefixes are shared with requests of the same salt only."""
        chosen = self.sampling
        begun = [self.begun[index].streams[TOKEN_IDS].tolist() if index in self.begun else [] for index in indices]
        return GenerateRequest(
            token_ids=self.problem.token_ids.tolist(),
            seeds=[self._seed(index, len(tokens)) for index, tokens in zip(indices, begun, strict=True)],
            begun=begun,
            stream_tokens=stream_tokens,
            temperature=chosen.temperature,
            top_p=chosen.top_p,
            top_k=chosen.top_k,
            max_tokens=chosen.max_tokens,
            stop_token_ids=chosen.stop_token_ids,
            cache_salt=cache_salt,
            routes=chosen.routes,
        )

    def _seed(self, index: int, begun: int) -> int:
        """Of a sample's tokens after the first `begun`: the seed of all would repeat the first ones' random numbers."""
        seed = self.first_seed + index
        return spread(f"{seed}:{begun}") if begun else seed

    def note_failure(self, url: str, problem: str) -> None:
        """RolloutError when it has failed too often, on servers that are well."""
        self.failed[url] = problem
        self._failures += 1
        if self._failures > MAX_RETRIES:
            reasons = "; ".join(f"{url}, problem {self.problem.id}: {why}" for url, why in self.failed.items())
            raise RolloutError(f"a request failed {self._failures} times: {reasons}")


@dataclass(eq=False)
class Job:
    """Work that is to be completed, and who waits for it."""

    work: Work
    place: tuple[bool, float, int]
    """Among the others that wait: the lower comes first."""
    done: "asyncio.Future[None]"
    asking: "asyncio.Task[None] | None" = None
    """The request that is out for it."""

    def fail(self, error: Exception) -> None:
        """Tell who waits."""
        if not self.done.done():
            self.done.set_exception(error)

    def __lt__(self, other: "Job") -> bool:
        return self.place < other.place


class WorkQueue:
    """Work that waits for a server, in order, and work that one has been asked for.

    In order of expected lengths, the longest first, and then of age.
    """

    def __init__(self) -> None:
        self.asked: set[Job] = set()
        self._waiting: list[Job] = []
        self._numbers = itertools.count()

    def __bool__(self) -> bool:
        return bool(self._waiting or self.asked)

    def add(self, work: Work, *, first: bool, expected: float) -> Job:
        """Work that waits: before all that is not `first`, and among these before what is `expected` to be shorter."""
        job = Job(work, (not first, -expected, next(self._numbers)), asyncio.get_running_loop().create_future())
        heapq.heappush(self._waiting, job)
        return job

    @property
    def next(self) -> Work | None:
        """What a server is to be asked for next."""
        return self._waiting[0].work if self._waiting else None

    def take(self) -> Job:
        """The next, which a server is asked for now."""
        job = heapq.heappop(self._waiting)
        self.asked.add(job)
        return job

    def give_back(self, job: Job) -> None:
        """A server has been asked for it: it is done, or waits again where it was before."""
        self.asked.discard(job)
        if job.done.done():
            return
        if job.work.is_whole:
            job.done.set_result(None)
        else:
            heapq.heappush(self._waiting, job)

    def remove(self, job: Job) -> None:
        """Nobody waits for it any more."""
        if job.asking is not None:
            job.asking.cancel()
        self.asked.discard(job)
        if job in self._waiting:
            self._waiting.remove(job)
            heapq.heapify(self._waiting)

    def fail(self, error: Exception) -> None:
        """Tell all who wait. None waits any more then."""
        for job in (*self._waiting, *self.asked):
            job.fail(error)
        self._waiting.clear()
        self.asked.clear()

    def late(self, work: Work, seconds: float) -> str:
        """What to say of work that took longer than `seconds`."""
        names = sorted(job.work.problem.id for job in self.asked)
        return (
            f"problem {work.problem.id} got no answer within rollout.request_timeout_s={seconds:g} s; "
            f"{len(names)} requests are pending: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
        )


def spread(seed: int | str) -> int:
    """A 62-bit seed from `seed`. Sample i of a group has seed + i: seeds in a row would share random numbers."""
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest()) >> 2
