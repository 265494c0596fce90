"""Sampling from the servers of a pool: token ids in, token ids and log-probs out.

A request asks for the samples of one prompt, and each sample arrives when it ends. A server has as many samples as it
can run and some that wait there, so that none of its places is empty while a request travels. The seed of a sample
fixes its tokens, whichever server answers; so what a lost server leaves undone, the others do. A response that was long
enough to be sent in parts they go on with, under another seed. When no server is left, sampling waits for one; who
waits for the samples hears of it (rollout/ongoing.py).
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from megatron_fipo.config import RolloutConfig
from megatron_fipo.engines.cache_use import CacheUseOfSteps
from megatron_fipo.engines.connections import tls
from megatron_fipo.engines.control import EngineControl
from megatron_fipo.engines.descriptors import NoDescriptors
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.engines.states import Server
from megatron_fipo.engines.watch import Watch
from megatron_fipo.errors import RolloutError
from megatron_fipo.records.problem import Problem
from megatron_fipo.records.sample import Group, Partial
from megatron_fipo.records.wire import WireError
from megatron_fipo.rollout.answers import BadAnswer
from megatron_fipo.rollout.events import WeightsWanted
from megatron_fipo.rollout.loads import WAITING_GROUPS, Loads
from megatron_fipo.rollout.main_loop import MainLoop, all_of
from megatron_fipo.rollout.occupancy import Occupancy
from megatron_fipo.rollout.requests import NotAnswered, Requests
from megatron_fipo.rollout.work import Job, Sampling, Work, WorkQueue
from megatron_fipo.weights.deadline import Deadline

RETRY_PAUSE_S = 0.5
_CALLS_BESIDE = 3
"""Connections to a server beside its requests: a sign of life, a probe, a control call."""
CONNECT_TIMEOUT_S = 30.0


def connections(config: RolloutConfig, fewest_samples: int) -> int:
    """How many connections an EngineGenerator has open at most, where no request is for fewer samples than these."""
    requests = config.max_num_seqs // fewest_samples + WAITING_GROUPS
    return (len(config.addresses) or config.servers) * (requests + _CALLS_BESIDE)


class EngineGenerator:
    """Samples groups from all servers of a pool. Its `control` drives their weights.

    Over its life, `retries` counts requests that were sent again, and `continued` the tokens that these did not lose.
    Used from the thread that started the servers.
    """

    def __init__(self, pool: EnginePool, vocab_size: int | None = None, loop: MainLoop | None = None):
        """An answer with a token id of `vocab_size` or more is refused.

        `loop` is this thread's; without one this has its own.
        """
        self.control, self.loop = EngineControl(pool), loop or MainLoop()
        self._own_loop = self.loop if loop is None else None
        self.retries = self.continued = 0
        self._told = 0, 0
        # A run that is resumed may give other weights the same version, on a server that stayed.
        self._salt = secrets.token_hex(8)
        self._pool = pool
        self._vocab_size = vocab_size
        self._http = httpx.AsyncClient(
            headers=pool.headers,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
            verify=tls(),
        )
        self._loads, self._cache_use = Loads(pool.config), CacheUseOfSteps(pool)
        self._occupancy = Occupancy()
        self._scarcity: Deadline | None = None
        """How long there may be no descriptor for a request; None while there are."""
        self._queue = WorkQueue()
        self._changed, self._starved = asyncio.Event(), asyncio.Event()
        """Set when there may be something to do, and while no server is left that could be asked."""
        self._dispatching: asyncio.Task[None] | None = None
        pool.tell(lambda: self.loop.call(self._wake))

    async def generate(
        self,
        problems: Sequence[Problem],
        samples_per_prompt: int,
        sampling: Sampling,
        seeds: Sequence[int],
        on_group: Callable[[Group], None] | None = None,
    ) -> list[Group]:
        """Sample `samples_per_prompt` responses to each problem; groups come back in the problems' order.

        `seeds` has one seed per problem. `on_group` gets each group as it arrives, in this thread, and has to be quick.
        Raises what `complete` does.
        """
        self.check_prompts(problems)

        async def group(problem: Problem, seed: int) -> Group:
            work = Work(problem, samples_per_prompt, sampling, seed)
            await self.complete(work)
            if on_group is not None:
                on_group(work.group)
            return work.group

        return await all_of(group(problem, seed) for problem, seed in zip(problems, seeds, strict=True))

    async def complete(self, work: Work, *, first: bool = False) -> None:
        """Have servers sample what the work lacks. Where this is cancelled, nothing of it goes on.

        A server that dies, whose engine is silent for rollout.hang_timeout_s, or that repeatedly answers what was not
        asked for, is lost to the pool, and its requests go to the others.

        Args:
            first: before all work that is not.

        Raises:
            RolloutError: a server refuses a request, the work's requests fail more than work.MAX_RETRIES times, one
                takes longer than rollout.request_timeout_s, or a server may not be lost (EnginePool.repair).
        """
        if work.is_whole:
            return
        job = self._queue.add(work, first=first, expected=self._expected(work))
        self._wake()
        if self._dispatching is None or self._dispatching.done():
            self._dispatching = asyncio.ensure_future(self._dispatch())
        try:
            await job.done
        finally:
            self._queue.remove(job)
            self._changed.set()
        self._loads.lengths.note(work.problem, [len(sample) for sample in work.arrived.values()])

    async def until(self, done: "asyncio.Future[Any]", also: asyncio.Event | None = None) -> None:
        """Wait until `done` is done, no server is left, or `also` is set."""
        events = [asyncio.ensure_future(each.wait()) for each in (self._starved, also) if each is not None]
        try:
            await asyncio.wait({done, *events}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for event in events:
                event.cancel()

    def wanted(self) -> WeightsWanted:
        """Which servers may sample again, where none is left. RolloutError: none will return."""
        if not (servers := [*self._pool.returning, *self._pool.in_service]):
            raise RolloutError(f"no vLLM server is left: {self._pool.losses_in_words()}")
        return WeightsWanted(tuple(server.url for server in servers))

    def check_prompts(self, problems: Sequence[Problem]) -> None:
        """RolloutError for a prompt that servers do not take."""
        longest = self._pool.config.max_prompt_length
        for problem in problems:
            if not 0 < len(problem.token_ids) <= longest:
                raise RolloutError(
                    f"problem {problem.id} has a prompt of {len(problem.token_ids)} tokens; "
                    f"the servers take 1 to rollout.max_prompt_length={longest}"
                )

    def end_step(self) -> dict[str, int | float]:
        """A step is done: requests that were sent again in it, tokens that these did not lose, and how busy it was.

        Also how full the servers' caches were, where these say so.
        """
        retries, continued = self.retries - self._told[0], self.continued - self._told[1]
        self._told = self.retries, self.continued
        return {
            "requests_repeated": retries,
            "tokens_continued": continued,
            **self._occupancy.metrics(),
            **self._take_use(),
        }

    def forget_occupancy(self) -> None:
        """Leave out of the next `end_step` how busy servers were until now, and how full."""
        self._occupancy.metrics()
        self._take_use()

    def _take_use(self) -> dict[str, float]:
        return self.loop.run(self._cache_use.take(self._http))

    def busy(self) -> list[tuple[float, float]]:
        """See Occupancy.take."""
        return self._occupancy.take()

    def close(self) -> None:
        """Closes the connections; the servers stay. May be called twice."""
        if not self._http.is_closed:
            self.loop.run(self._http.aclose())
        if self._own_loop is not None:
            self._own_loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wake(self) -> None:
        """Something has changed: look again whether a server can be asked."""
        self._starved.clear()
        self._changed.set()

    async def _dispatch(self) -> None:
        """Ask servers for what waits, until nothing does. A failure is told to all who wait."""
        while self._queue:  # there may be more by the time that the watch has stopped
            watch = Watch(self._pool, self._http, self._changed.set)
            requests = Requests(self._pool, self._http, watch, self._queue, self._vocab_size, self._salt)
            try:
                await self._ask_until_empty(requests, watch)
            except Exception as error:
                self._queue.fail(error)
            finally:
                self._starved.clear()
                await watch.stop()

    async def _ask_until_empty(self, requests: Requests, watch: Watch) -> None:
        while self._queue:
            self._changed.clear()
            watch.look()
            self._pool.repair()
            if (server := self._with_room()) is not None:
                self._begin_to_ask(server, requests, watch)
                continue
            if not self._pool.serving and not self._queue.asked:
                self._starved.set()
            await self._changed.wait()

    def _begin_to_ask(self, server: Server, requests: Requests, watch: Watch) -> None:
        job = self._queue.take()
        asking = _Asking(job, server, server.life, requests, watch, job.work.missing(), [len(job.work.missing())])
        # Counted here: the task begins later, and the next work would find the server free.
        self._count(server, asking.left[0])
        job.asking = asyncio.ensure_future(self._ask(asking))
        # Not in the task, which may be cancelled before it begins.
        job.asking.add_done_callback(lambda _: self._has_asked(asking))

    def _has_asked(self, asking: "_Asking") -> None:
        self._count(asking.server, -asking.left[0])
        self._queue.give_back(asking.job)
        self._changed.set()

    def _count(self, server: Server, samples: int) -> None:
        """So many more samples are outstanding at this server; fewer, if negative."""
        self._loads.count(server, samples)
        self._occupancy.add(samples)

    def _with_room(self) -> Server | None:
        """The server that is to have the next work, if one has room for it."""
        if (work := self._queue.next) is None or not (serving := self._pool.serving):
            return None
        servers = [server for server in serving if server.url not in work.failed] or serving
        return self._loads.with_room(servers, work)

    def _expected(self, work: Work) -> float:
        """Longer work is first where a step waits for all. Else the oldest is, which the next batch waits for."""
        return 0.0 if self._pool.config.max_off_policy_steps else self._loads.lengths.expected(work.problem)

    async def _ask(self, asking: "_Asking") -> None:
        """One request for what the work lacks. If it fails, the work waits for another."""
        try:
            await self._request(asking)
        except Exception as error:
            asking.job.fail(error)

    async def _request(self, asking: "_Asking") -> None:
        work, server = asking.job.work, asking.server
        before = dict(work.arrived), dict(work.begun)
        self.continued += sum(map(len, work.begun.values()))
        try:
            async with aclosing(asking.requests.samples(server, asking.life, work, asking.missing)) as samples:
                async for index, sample in samples:
                    work.add(index, sample)
                    if isinstance(sample, Partial):
                        continue
                    asking.left[0] -= 1
                    self._count(server, -1)
                    self._scarcity = None
                    self._changed.set()
            self._pool.answered(server)
        except (httpx.TransportError, NotAnswered) as error:
            await self._not_answered(asking, f"{type(error).__name__}: {error}")
        except (BadAnswer, WireError) as error:
            # Whoever is wrong in one thing is not believed in the others.
            work.go_back_to(*before)
            self._answered_wrongly(asking, str(error))
        except NoDescriptors:
            await self._wait_for_descriptors()

    async def _not_answered(self, asking: "_Asking", problem: str) -> None:
        """A request that was not answered. The server is lost if its engine gives no sign of life."""
        self.retries += 1
        if not await asking.watch.has_fallen_silent(asking.server, asking.life, problem):
            asking.job.work.note_failure(asking.server.url, problem)
            await asyncio.sleep(RETRY_PAUSE_S)

    def _answered_wrongly(self, asking: "_Asking", problem: str) -> None:
        """An answer that is not what was asked for. A server that repeats it is lost."""
        self.retries += 1
        if self._pool.answered_wrongly(asking.server, asking.life, problem):
            asking.watch.left(asking.server)
        elif asking.server.life == asking.life:
            asking.job.work.note_failure(asking.server.url, f"its answer is not what was asked for: {problem}")

    async def _wait_for_descriptors(self) -> None:
        """No server is to blame, and a request that ends gives a descriptor back. NoDescriptors where none does."""
        self.retries += 1
        if self._scarcity is None:
            self._scarcity = Deadline(self._pool.config.request_timeout_s)
        if self._scarcity.passed():
            raise NoDescriptors
        await asyncio.sleep(RETRY_PAUSE_S)


@dataclass(frozen=True)
class _Asking:
    """A request that is out: for what, to whom, and in which of its lives."""

    job: Job
    server: Server
    life: int
    requests: Requests
    watch: Watch
    missing: list[int]
    """Indices of the samples that are asked for."""
    left: list[int]
    """How many of them have not arrived; one number."""
