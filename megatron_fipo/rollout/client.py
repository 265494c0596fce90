"""Sampling from the rollout service: token ids in, token ids and log-probs out. A synchronous facade for rank 0.

A request asks for the samples of one prompt, and each sample arrives when it ends. A server has as many samples as it
can run and some that wait there, so that none of its places is empty while a request travels. The seed of a sample
fixes its tokens, whichever server answers; so what a lost server leaves undone, the others do.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec

from megatron_fipo.engines.generate_messages import (
    GENERATE_PATH,
    EndFrame,
    ErrorFrame,
    GenerateRequest,
    read_about,
)
from megatron_fipo.errors import RolloutError
from megatron_fipo.records.problem import Problem
from megatron_fipo.records.sample import Group, Sample
from megatron_fipo.records.wire import Frame, FrameReader, WireError
from megatron_fipo.rollout.answers import Asked, BadAnswer, read_sample
from megatron_fipo.rollout.control import ControlPlane, engine_message
from megatron_fipo.rollout.service import WORKERS_HEALTH, RolloutService, Server
from megatron_fipo.rollout.work import Pending, Sampling, Work

RETRY_PAUSE_S = 0.5
CONNECT_TIMEOUT_S = 30.0
WATCH_EVERY_S = 10.0
_MOST_ECHOES = 16
MAX_BAD_ANSWERS = 2
"""Answers that are not what was asked for, one after the other, that take a server out of service."""


class RolloutClient:
    """Samples groups from all servers of a service. Its `control` drives their weights.

    `retries` counts requests that were sent again, over the client's life. Used from the thread that started the
    service.
    """

    def __init__(
        self, service: RolloutService, revive: Callable[[], None] | None = None, vocab_size: int | None = None
    ):
        """`revive` is called, between requests, when no server is left: it has to bring the service back or raise.

        An answer with a token id of `vocab_size` or more is none.
        """
        self.control = ControlPlane(service)
        self.retries = 0
        self._service = service
        self._vocab_size = vocab_size
        self._revive = revive or self._give_up
        self._runner = asyncio.Runner(loop_factory=_loop)
        self._http = httpx.AsyncClient(
            headers=service.headers,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )
        self._outstanding: dict[str, int] = {}
        self._bad_answers: dict[str, int] = {}
        self._watches: dict[str, asyncio.Task[str]] = {}

    def generate(
        self,
        problems: Sequence[Problem],
        samples_per_prompt: int,
        sampling: Sampling,
        seeds: Sequence[int],
        on_group: Callable[[Group], None] | None = None,
    ) -> list[Group]:
        """Sample `samples_per_prompt` responses to each problem; groups come back in the problems' order.

        `seeds` has one seed a problem. `on_group` gets each group as it arrives, in this thread, and has to be quick.
        Greedy samples of a problem are all the same.

        A server that dies, whose engine is silent for rollout.hang_timeout_s, or that repeatedly answers what was not
        asked for, is lost to the service, and its requests go to the others.

        RolloutError when a server refuses a request, when a group's requests fail more than work.MAX_RETRIES times,
        when one takes longer than rollout.request_timeout_s, or when a server may not be lost (RolloutService.lose).
        """
        longest = self._service.config.max_prompt_length
        for problem in problems:
            if not 0 < len(problem.token_ids) <= longest:
                raise RolloutError(
                    f"problem {problem.id} has a prompt of {len(problem.token_ids)} tokens; "
                    f"the servers take 1 to rollout.max_prompt_length={longest}"
                )
        work = [
            Work(problem, samples_per_prompt, sampling, seed) for problem, seed in zip(problems, seeds, strict=True)
        ]
        while True:
            missing = deque(item for item in work if not item.is_whole)
            self._runner.run(self._generate(missing, on_group or (lambda _: None)))
            if all(item.is_whole for item in work):
                return [item.group for item in work]
            self._revive()

    def close(self) -> None:
        """Closes the connections; the service stays. May be called twice."""
        if self._http.is_closed:
            return
        # A Ctrl-C that came up in a task comes out again of each that waits for it once the loop runs on, or stops it.
        for _ in range(_MOST_ECHOES):
            try:
                self._runner.run(self._end_requests())
                break
            except (KeyboardInterrupt, asyncio.CancelledError, RuntimeError):
                continue
        self._runner.close()

    async def _end_requests(self) -> None:
        """A `generate` that was interrupted has left its tasks behind: without connections they would fail aloud."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._http.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _generate(self, missing: deque[Work], on_group: Callable[[Group], None]) -> None:
        """Complete what is in `missing`: all of it, unless no server is left."""
        servers = self._service.in_service
        self._outstanding = {server.url: 0 for server in servers}
        self._watches = {server.url: asyncio.ensure_future(self._watch(server)) for server in servers}
        changed, pending = asyncio.Event(), Pending(missing)
        try:
            async with asyncio.TaskGroup() as running:
                while pending:
                    changed.clear()
                    if not self._service.in_service and not pending.asked:
                        return
                    if (server := self._with_room(pending)) is not None:
                        work = pending.take()
                        # Counted here: the task begins later, and the next work would find the server free.
                        self._outstanding[server.url] += len(work.missing())
                        running.create_task(self._ask(work, server, pending, changed, on_group))
                    else:
                        await changed.wait()
        # No `except*`: what is raised in one is a group again in Python 3.11.0 to 3.11.3.
        except BaseExceptionGroup as failures:
            raise _first(failures) from None
        finally:
            for watch in self._watches.values():
                watch.cancel()

    def _with_room(self, pending: Pending) -> Server | None:
        """The server with the fewest outstanding samples, if it has places for the next work.

        Beside the samples that it runs, as many of two groups wait at a server: an engine that is full is asked for no
        more before a whole group of them has ended, and still has work while the next group travels.
        """
        if not pending.waiting or not (in_service := self._service.in_service):
            return None
        work = pending.waiting[0]
        servers = [server for server in in_service if server.url not in work.failed] or in_service
        server = min(servers, key=lambda server: self._outstanding[server.url])
        places = self._service.config.max_num_seqs + 2 * work.samples
        return server if self._outstanding[server.url] + len(work.missing()) <= places else None

    async def _ask(
        self,
        work: Work,
        server: Server,
        pending: Pending,
        changed: asyncio.Event,
        on_group: Callable[[Group], None],
    ) -> None:
        """One request for what `work` lacks. If it fails, the work waits for another."""
        missing = work.missing()
        arrived: list[int] = []
        try:
            try:
                async with aclosing(self._answered(server, work, missing, pending)) as answers:
                    async for index, sample in answers:
                        work.add(index, sample)
                        arrived.append(index)
                        self._outstanding[server.url] -= 1
                        changed.set()
                self._bad_answers[server.url] = 0
            except (httpx.TransportError, _Failed) as error:
                await self._failed(server, work, f"{type(error).__name__.lstrip('_')}: {error}")
            except (BadAnswer, WireError) as error:
                # Whoever is wrong in one thing is not believed in the others.
                work.discard(arrived)
                self._bad_answer(server, work, str(error))
        finally:
            self._outstanding[server.url] -= len(missing) - len(arrived)
            pending.give_back(work)
            changed.set()
        if work.is_whole:
            on_group(work.group)

    async def _answered(
        self, server: Server, work: Work, missing: list[int], pending: Pending
    ) -> AsyncGenerator[tuple[int, Sample], None]:
        """The samples `missing` of `work`, as they come, each with its index in the group.

        Raises:
            httpx.TransportError, _Failed: the server did not answer, or its engine fell silent.
            BadAnswer, WireError: the answer is not what was asked for.
            RolloutError: the request was refused, or took too long.
        """
        sampling, config = work.sampling, self._service.config
        asked = Asked(
            len(missing), sampling.max_tokens, sampling.stop_token_ids, self._vocab_size, self._service.weight_version
        )
        arrived: set[int] = set()
        request = work.request(missing)
        try:
            async with asyncio.timeout(config.request_timeout_s), aclosing(self._frames(server, request)) as frames:
                async for frame in frames:
                    about = read_about(frame.about)
                    if isinstance(about, ErrorFrame):
                        if about.kind == "refused":
                            raise RolloutError(f"{server.url} refused a request: {about.message}")
                        raise _Failed(about.message)
                    if isinstance(about, EndFrame):
                        if not about.samples == len(arrived) == len(missing):
                            raise BadAnswer(
                                f"{len(arrived)} responses came of the {about.samples} that it says it has sent; "
                                f"{len(missing)} were asked for"
                            )
                        return
                    sample = read_sample(frame, about, asked, arrived)
                    arrived.add(about.index)
                    yield missing[about.index], sample
        except TimeoutError:
            raise RolloutError(pending.late(work, config.request_timeout_s)) from None
        raise BadAnswer(f"it ended after {len(arrived)} of {len(missing)} responses")

    async def _frames(self, server: Server, request: GenerateRequest) -> AsyncGenerator[Frame, None]:
        """The frames that a server answers with, as they come. ReadError when its engine falls silent."""
        watch, reader = self._watches[server.url], FrameReader()
        body = msgspec.json.encode(request)
        async with self._http.stream("POST", server.url + GENERATE_PATH, content=body) as answer:
            if not answer.is_success:
                await answer.aread()
                problem = f"{answer.status_code}: {engine_message(answer)}"
                if answer.is_client_error:
                    # The request itself is wrong: every server would say the same.
                    raise RolloutError(f"{server.url} refused a request with {problem}")
                raise _Failed(problem)
            chunks = answer.aiter_raw()
            while True:
                chunk = asyncio.ensure_future(anext(chunks, b""))
                try:
                    await asyncio.wait({chunk, watch}, return_when=asyncio.FIRST_COMPLETED)
                    if not chunk.done():
                        self._service.lose(server, watch.result())
                        raise httpx.ReadError(watch.result())
                finally:
                    chunk.cancel()
                    await asyncio.gather(chunk, return_exceptions=True)
                if not chunk.result():
                    break
                for frame in reader.feed(chunk.result()):
                    yield frame
        reader.finish()

    async def _failed(self, server: Server, work: Work, problem: str) -> None:
        """A request that was not answered. The server is lost if its engine gives no sign of life."""
        if server.lost is None and (silence := await self._silence(server)) is not None:
            self._service.lose(server, f"{problem}; {silence}")
        self.retries += 1
        if server.lost is None:
            work.note_failure(server.url, problem)
            await asyncio.sleep(RETRY_PAUSE_S)

    def _bad_answer(self, server: Server, work: Work, problem: str) -> None:
        """An answer that is not what was asked for. A server that repeats it is taken out of service."""
        self.retries += 1
        self._bad_answers[server.url] = self._bad_answers.get(server.url, 0) + 1
        if server.lost is None and self._bad_answers[server.url] >= MAX_BAD_ANSWERS:
            self._bad_answers[server.url] = 0
            self._service.lose(server, f"its answers are not what was asked for: {problem}", for_good=True)
        else:
            work.note_failure(server.url, f"its answer is not what was asked for: {problem}")

    async def _watch(self, server: Server) -> str:
        """Returns when the server's engine has fallen silent, with how."""
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            if (silence := await self._silence(server)) is not None:
                return silence

    async def _silence(self, server: Server) -> str | None:
        """Asks the engine's workers for a sign of life; None when they give it, else what came in its place."""
        timeout_s = self._service.config.hang_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._http.post(f"{server.url}/collective_rpc", json=WORKERS_HEALTH)
        except TimeoutError:
            return f"its engine has not answered for rollout.hang_timeout_s={timeout_s:g} s"
        except httpx.TransportError as error:
            return f"{type(error).__name__}: {error}"
        return None if response.is_success else f"{response.status_code}: {engine_message(response)}"

    def _give_up(self) -> None:
        raise RolloutError(f"no vLLM server is left: {self._service.losses_in_words()}")


def _loop() -> asyncio.AbstractEventLoop:
    """An event loop that does not report what its caller has been told: a Ctrl-C, in whatever task it came up."""

    def report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if isinstance(context.get("exception", Exception()), Exception):
            loop.default_exception_handler(context)

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(report)
    return loop


class _Failed(Exception):
    """A server answered that it cannot answer."""


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first failure itself: the others are its consequences or its equals."""
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
