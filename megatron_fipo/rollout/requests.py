"""One request to one server: the samples that come of it, checked as they arrive."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

import httpx
import msgspec

from megatron_fipo.engines.descriptors import raise_if_exhausted
from megatron_fipo.engines.generate_messages import (
    GENERATE_PATH,
    EndFrame,
    ErrorFrame,
    GenerateRequest,
    read_about,
)
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.engines.probes import engine_message
from megatron_fipo.engines.states import Server
from megatron_fipo.engines.watch import Watch
from megatron_fipo.errors import RolloutError
from megatron_fipo.records.sample import Partial, Sample
from megatron_fipo.records.wire import Frame, FrameReader
from megatron_fipo.rollout.answers import Answer, Asked, BadAnswer
from megatron_fipo.rollout.work import Work, WorkQueue

_T = TypeVar("_T")


class NotAnswered(Exception):
    """A server answered that it cannot answer."""


class Requests:
    """Sends requests, while a Watch tells which servers fall silent."""

    def __init__(
        self,
        pool: EnginePool,
        http: httpx.AsyncClient,
        watch: Watch,
        queue: WorkQueue,
        vocab_size: int | None,
        salt: str,
    ):
        self._pool, self._http, self._watch, self._vocab_size = pool, http, watch, vocab_size
        self._queue, self._salt = queue, salt

    async def samples(
        self, server: Server, life: int, work: Work, missing: list[int]
    ) -> AsyncGenerator[tuple[int, Sample | Partial], None]:
        """The samples `missing` of `work`, as they come, each with its index in the group, of a server in this life.

        Of a long one there is a Partial first, each time that more of it has come.

        Raises:
            httpx.TransportError, NotAnswered: the server did not answer, or its engine fell silent.
            BadAnswer, WireError: the answer is not what was asked for.
            RolloutError: the request was refused, or took too long.
            NoDescriptors: this process can open no connection.
        """
        sampling, config = work.sampling, self._pool.config
        asked = Asked(
            samples=len(missing),
            max_tokens=sampling.max_tokens,
            stop_token_ids=sampling.stop_token_ids,
            vocab_size=self._vocab_size,
            weight_version=self._pool.weight_version,
            prompt_tokens=len(work.problem.token_ids),
            routes=sampling.routes,
        )
        begun = {place: work.begun[index] for place, index in enumerate(missing) if index in work.begun}
        answer = Answer(asked, begun, lambda: self._pool.weight_version)
        request = work.request(missing, f"{self._salt}-{self._pool.weight_version}", config.stream_tokens)
        try:
            async with (
                asyncio.timeout(config.request_timeout_s),
                aclosing(self._frames(server, life, request)) as frames,
            ):
                async for frame in frames:
                    about = read_about(frame.about)
                    if isinstance(about, ErrorFrame):
                        if about.kind == "refused":
                            raise RolloutError(f"{server.url} refused a request: {about.message}")
                        raise NotAnswered(about.message)
                    if isinstance(about, EndFrame):
                        came = len(answer.arrived)
                        if not about.samples == came == len(missing):
                            raise BadAnswer(
                                f"{came} responses came of the {about.samples} that it says it has sent; "
                                f"{len(missing)} were asked for"
                            )
                        return
                    sample = answer.read(frame, about)
                    yield missing[about.index], sample
        except TimeoutError:
            raise RolloutError(self._queue.late(work, config.request_timeout_s)) from None
        raise BadAnswer(f"it ended after {len(answer.arrived)} of {len(missing)} responses")

    async def _frames(self, server: Server, life: int, request: GenerateRequest) -> AsyncGenerator[Frame, None]:
        """The frames that a server answers with, as they come. ReadError when it is lost meanwhile."""
        gone, reader = self._watch.gone(server, life), FrameReader()
        asked = self._http.build_request("POST", server.url + GENERATE_PATH, content=msgspec.json.encode(request))
        try:
            # A server that hangs may not even say that it has been asked.
            answer = await _unless(gone, self._http.send(asked, stream=True))
            try:
                await _unless(gone, _check_status(server, answer))
                chunks = answer.aiter_raw()
                while chunk := await _unless(gone, anext(chunks, b"")):
                    for frame in reader.feed(chunk):
                        yield frame
            finally:
                await answer.aclose()
        except httpx.TransportError as error:
            raise_if_exhausted(error)
            raise
        reader.finish()


async def _check_status(server: Server, answer: httpx.Response) -> None:
    if answer.is_success:
        return
    await answer.aread()
    problem = f"{answer.status_code}: {engine_message(answer)}"
    if answer.is_client_error:
        # The request itself is wrong: every server would say the same.
        raise RolloutError(f"{server.url} refused a request with {problem}")
    raise NotAnswered(problem)


async def _unless(gone: asyncio.Future[str], wanted: Awaitable[_T]) -> _T:
    """What is wanted of a server. ReadError when it is gone before."""
    coming = asyncio.ensure_future(wanted)
    either: set[asyncio.Future[Any]] = {coming, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            raise httpx.ReadError(gone.result())
        return coming.result()
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
