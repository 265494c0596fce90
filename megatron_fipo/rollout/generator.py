"""Sampling from the servers of a pool: token ids in, token ids and log-probs out. A synchronous facade for rank 0.

A request asks for the samples of one prompt, and each sample arrives when it ends. A server has as many samples as it
can run and some that wait there, so that none of its places is empty while a request travels. The seed of a sample
fixes its tokens, whichever server answers; so what a lost server leaves undone, the others do. A response that was long
enough to be sent in parts they go on with, under another seed. When no server is left, the caller hears of it
(rollout/events.py), and sampling goes on when it is asked to.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from megatron_fipo.config import RolloutConfig
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
from megatron_fipo.rollout.events import Steps, WeightsWanted
from megatron_fipo.rollout.requests import NotAnswered, Requests
from megatron_fipo.rollout.work import Pending, Sampling, Work
from megatron_fipo.weights.deadline import Deadline

RETRY_PAUSE_S = 0.5
_WAITING_GROUPS = 2
_CALLS_BESIDE = 3
"""Connections to a server beside its requests: a sign of life, a probe, a control call."""
CONNECT_TIMEOUT_S = 30.0


def connections(config: RolloutConfig, fewest_samples: int) -> int:
    """How many connections an EngineGenerator has open at most, where no request is for fewer samples than these."""
    requests = config.max_num_seqs // fewest_samples + _WAITING_GROUPS
    return (len(config.addresses) or config.servers) * (requests + _CALLS_BESIDE)


class EngineGenerator:
    """Samples groups from all servers of a pool. Its `control` drives their weights.

    Over its life, `retries` counts requests that were sent again, and `continued` the tokens that these did not lose.
    Used from the thread that started the servers.
    """

    def __init__(self, pool: EnginePool, vocab_size: int | None = None):
        """An answer with a token id of `vocab_size` or more is none."""
        self.control = EngineControl(pool)
        self.retries = self.continued = 0
        self._told = 0, 0
        # A run that is resumed may give other weights the same version, on a server that stayed.
        self._salt = secrets.token_hex(8)
        self._pool = pool
        self._vocab_size = vocab_size
        self._runner = asyncio.Runner(loop_factory=_loop)
        self._http = httpx.AsyncClient(
            headers=pool.headers,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
            verify=tls(),
        )
        self._outstanding: dict[str, int] = {}
        self._scarcity: Deadline | None = None
        """How long there may be no descriptor for a request; None while there are."""

    def generate(
        self,
        problems: Sequence[Problem],
        samples_per_prompt: int,
        sampling: Sampling,
        seeds: Sequence[int],
        on_group: Callable[[Group], None] | None = None,
    ) -> Steps[list[Group]]:
        """Sample `samples_per_prompt` responses to each problem; groups come back in the problems' order.

        `seeds` has one seed a problem. `on_group` gets each group as it arrives, in this thread, and has to be quick.
        Greedy samples of a problem are all the same.

        A server that dies, whose engine is silent for rollout.hang_timeout_s, or that repeatedly answers what was not
        asked for, is lost to the pool, and its requests go to the others. When none is left, the next event says so.

        RolloutError when a server refuses a request, when a group's requests fail more than work.MAX_RETRIES times,
        when one takes longer than rollout.request_timeout_s, when a server may not be lost (EnginePool.repair), and
        when none will return.
        """
        self.check_prompts(problems)
        work = [
            Work(problem, samples_per_prompt, sampling, seed) for problem, seed in zip(problems, seeds, strict=True)
        ]
        yield from self.complete(_Groups(deque(work), on_group))
        return [item.group for item in work]

    def complete(self, pending: Pending) -> Steps[None]:
        """Sample until nothing is pending; raises what `generate` does."""
        while pending:
            self._run(self._generate(pending))
            if pending:
                yield self._wanted()

    def check_prompts(self, problems: Sequence[Problem]) -> None:
        """RolloutError for a prompt that servers do not take."""
        longest = self._pool.config.max_prompt_length
        for problem in problems:
            if not 0 < len(problem.token_ids) <= longest:
                raise RolloutError(
                    f"problem {problem.id} has a prompt of {len(problem.token_ids)} tokens; "
                    f"the servers take 1 to rollout.max_prompt_length={longest}"
                )

    def _wanted(self) -> WeightsWanted:
        if not (servers := [*self._pool.returning, *self._pool.in_service]):
            raise RolloutError(f"no vLLM server is left: {self._pool.losses_in_words()}")
        return WeightsWanted(tuple(server.url for server in servers))

    def end_step(self) -> dict[str, int | float]:
        """A step is done: requests that were sent again in it, and tokens that these did not lose."""
        retries, continued = self.retries - self._told[0], self.continued - self._told[1]
        self._told = self.retries, self.continued
        return {"requests_repeated": retries, "tokens_continued": continued}

    def close(self) -> None:
        """Closes the connections; the servers stay. May be called twice."""
        if not self._http.is_closed:
            self._runner.run(self._http.aclose())
            self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, BaseException | None]) -> None:
        """Run `work` to its end, and whatever it has begun, also where a signal's handler raises in the middle of it.

        That ends the loop wherever it is, and leaves tasks behind.
        """
        try:
            ended = self._runner.run(work)
        except BaseException:
            self._runner.run(_cancel_others())
            raise
        if ended is not None:
            raise ended

    async def _generate(self, pending: Pending) -> BaseException | None:
        """Complete what is pending: all of it, unless no server is left. Returns what has ended a task's process.

        Raised from a task, that would end the loop once more.
        """
        self._outstanding = {server.url: 0 for server in self._pool.servers}
        changed = pending.changed
        watch = Watch(self._pool, self._http, changed.set)
        requests = Requests(self._pool, self._http, watch, self._vocab_size, self._salt)
        try:
            async with asyncio.TaskGroup() as running:
                while pending:
                    changed.clear()
                    pending.go_on()
                    self._pool.repair()
                    if not self._pool.serving and not pending.asked:
                        break
                    if (server := self._with_room(pending)) is not None:
                        work = pending.take()
                        # Counted here: the task begins later, and the next work would find the server free.
                        self._outstanding[server.url] += len(work.missing())
                        asking = _Asking(work, server, server.life, pending, requests, watch)
                        running.create_task(self._ask_in_a_task(asking))
                    else:
                        await changed.wait()
        # No `except*`: what is raised in one is a group again in Python 3.11.0 to 3.11.3.
        except BaseExceptionGroup as failures:
            error = _first(failures)
            if isinstance(error, _Ended):
                return error.by
            raise error from None
        finally:
            await watch.stop()
        return None

    def _with_room(self, pending: Pending) -> Server | None:
        """The server with the fewest outstanding samples, if it has places for the next work.

        Beside the samples that it runs, those of _WAITING_GROUPS groups wait at a server: an engine that is full is
        asked for no more before a whole group has ended, and still has work while the next one travels.
        """
        if not pending.waiting or not (serving := self._pool.serving):
            return None
        work = pending.waiting[0]
        servers = [server for server in serving if server.url not in work.failed] or serving
        server = min(servers, key=lambda server: self._outstanding[server.url])
        places = self._pool.config.max_num_seqs + _WAITING_GROUPS * work.samples
        return server if self._outstanding[server.url] + len(work.missing()) <= places else None

    async def _ask_in_a_task(self, asking: "_Asking") -> None:
        try:
            await self._ask(asking)
        except (KeyboardInterrupt, SystemExit) as error:
            raise _Ended(error) from None

    async def _ask(self, asking: "_Asking") -> None:
        """One request for what the work lacks. If it fails, the work waits for another."""
        work, server, changed = asking.work, asking.server, asking.pending.changed
        missing = work.missing()
        before = dict(work.arrived), dict(work.begun)
        self.continued += sum(map(len, work.begun.values()))
        arrived = 0
        try:
            try:
                async with aclosing(
                    asking.requests.samples(server, asking.life, work, missing, asking.pending)
                ) as samples:
                    async for index, sample in samples:
                        work.add(index, sample)
                        if isinstance(sample, Partial):
                            continue
                        arrived += 1
                        self._outstanding[server.url] -= 1
                        self._scarcity = None
                        changed.set()
                self._pool.answered(server)
            except (httpx.TransportError, NotAnswered) as error:
                await self._not_answered(asking, f"{type(error).__name__}: {error}")
            except (BadAnswer, WireError) as error:
                # Whoever is wrong in one thing is not believed in the others.
                work.go_back_to(*before)
                self._answered_wrongly(asking, str(error))
            except NoDescriptors:
                await self._wait_for_descriptors()
        finally:
            self._outstanding[server.url] -= len(missing) - arrived
            asking.pending.give_back(work)
            changed.set()
        if work.is_whole:
            asking.pending.ended(work)

    async def _not_answered(self, asking: "_Asking", problem: str) -> None:
        """A request that was not answered. The server is lost if its engine gives no sign of life."""
        self.retries += 1
        if not await asking.watch.has_fallen_silent(asking.server, asking.life, problem):
            asking.work.note_failure(asking.server.url, problem)
            await asyncio.sleep(RETRY_PAUSE_S)

    def _answered_wrongly(self, asking: "_Asking", problem: str) -> None:
        """An answer that is not what was asked for. A server that repeats it is lost."""
        self.retries += 1
        if self._pool.answered_wrongly(asking.server, asking.life, problem):
            asking.watch.left(asking.server)
        elif asking.server.life == asking.life:
            asking.work.note_failure(asking.server.url, f"its answer is not what was asked for: {problem}")

    async def _wait_for_descriptors(self) -> None:
        """No server is to blame, and a request that ends gives a descriptor back. NoDescriptors where none does."""
        self.retries += 1
        if self._scarcity is None:
            self._scarcity = Deadline(self._pool.config.request_timeout_s)
        if self._scarcity.passed():
            raise NoDescriptors
        await asyncio.sleep(RETRY_PAUSE_S)


class _Groups(Pending):
    """Whole groups, each handed on when it has arrived."""

    def __init__(self, waiting: deque[Work], on_group: Callable[[Group], None] | None):
        super().__init__(waiting)
        self._on_group = on_group

    def ended(self, work: Work) -> None:
        if self._on_group is not None:
            self._on_group(work.group)


@dataclass(frozen=True)
class _Asking:
    """A request that is out: for what, to whom, and in which of its lives."""

    work: Work
    server: Server
    life: int
    pending: Pending
    requests: Requests
    watch: Watch


class _Ended(Exception):
    """What would end this process, on its way out of a task."""

    def __init__(self, by: BaseException):
        super().__init__(by)
        self.by = by


async def _cancel_others() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def _loop() -> asyncio.AbstractEventLoop:
    """An event loop that does not report what its caller has been told: a Ctrl-C, in whatever task it came up."""

    def report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if isinstance(context.get("exception", Exception()), Exception):
            loop.default_exception_handler(context)

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(report)
    return loop


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first failure itself: the others are its consequences or its equals."""
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
