"""The route of a rollout server that samples: token ids in; token ids, log-probs and weight versions out, as arrays.

vLLM's own route answers in JSON, 85 bytes a token, and for a group as a whole when its longest response has ended. This
one sends each response when it ends, and a long one in parts, so that another server can go on with it if this one is
lost. It asks the same engine, by vLLM's own client object in the server process.
"""

import asyncio
import contextlib
import uuid
from typing import Any

import msgspec
import numpy
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from megatron_fipo.engines.access import Receive, Scope, Send
from megatron_fipo.engines.generate_messages import (
    GENERATE_PATH,
    About,
    EndFrame,
    ErrorFrame,
    GenerateRequest,
    PartFrame,
    SampleFrame,
    VersionSpan,
    sample_frame,
)
from megatron_fipo.records.routes import RouteFormat
from megatron_fipo.records.wire import encode_frame

_LONGEST_REQUEST = 64 << 20
"""Most bytes of a request's body: millions of prompt tokens."""
_REFUSALS = (VLLMClientError, ValueError, TypeError)
"""What vLLM, and the decoder, raise for a request that is wrong."""


class GenerateRoute:
    """ASGI middleware that answers POST GENERATE_PATH, and passes everything else on."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with frames: PartFrames and a SampleFrame for each response, then an EndFrame or an ErrorFrame."""
        if scope["type"] != "http" or scope["path"] != GENERATE_PATH or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body = await _body(receive)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/fipo")]})
        try:
            request = msgspec.json.decode(body, type=GenerateRequest)
            pairs = zip(request.seeds, request.begun, strict=True)
            parameters = [_parameters(request, seed, len(begun)) for seed, begun in pairs]
        except _REFUSALS as error:
            await _end(send, ErrorFrame("refused", _one_line(error)))
            return
        await _answer(scope["app"].state.engine_client, request, parameters, receive, send)


async def _answer(
    engine: Any, request: GenerateRequest, parameters: list[SamplingParams], receive: Receive, send: Send
) -> None:
    frames: asyncio.Queue[tuple[About, bytes]] = asyncio.Queue()
    name = f"fipo-{uuid.uuid4().hex}"
    samples = [
        asyncio.ensure_future(_sample(engine, request, chosen, f"{name}-{index}", index, frames))
        for index, chosen in enumerate(parameters)
    ]
    gone = asyncio.ensure_future(_until_disconnect(receive))
    ended = 0
    try:
        while ended < len(samples):
            frame = asyncio.ensure_future(frames.get())
            await asyncio.wait({frame, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not frame.done():
                frame.cancel()
                return
            about, content = frame.result()
            if isinstance(about, ErrorFrame):
                await _end(send, about)
                return
            await send({"type": "http.response.body", "body": content, "more_body": True})
            ended += isinstance(about, SampleFrame)
        await _end(send, EndFrame(len(samples)))
    finally:
        # Nobody waits for what is still being sampled: a cancelled task has the engine drop its request.
        for task in (*samples, gone):
            task.cancel()
        await asyncio.gather(*samples, gone, return_exceptions=True)


async def _sample(
    engine: Any,
    request: GenerateRequest,
    parameters: SamplingParams,
    name: str,
    index: int,
    frames: "asyncio.Queue[tuple[About, bytes]]",
) -> None:
    """Put the frames of one response into the queue, or an ErrorFrame as the last."""
    start, token_ids, log_probs = 0, list[int](), list[float]()
    routes: numpy.ndarray | None = None
    prompt = tokens_input(request.token_ids + request.begun[index], cache_salt=request.cache_salt)
    try:
        async for answer in engine.generate(prompt, parameters, name):
            output = answer.outputs[0]
            token_ids += output.token_ids
            log_probs += output.logprobs.logprobs
            about: PartFrame | SampleFrame = PartFrame(index, start)
            if answer.finished:
                about = SampleFrame(index, start, output.finish_reason or "none", _spans(output))
                before = len(request.token_ids) + len(request.begun[index])
                routes = _routes(output, request.routes, before + start + len(token_ids))
            elif len(token_ids) < request.stream_tokens:
                continue
            frames.put_nowait((about, sample_frame(about, token_ids, log_probs, routes)))
            start, token_ids, log_probs = start + len(token_ids), [], []
    except _REFUSALS as error:
        frames.put_nowait((ErrorFrame("refused", _one_line(error)), b""))
    except Exception as error:
        # Whatever an engine raises is the trainer's to know: it asks another one.
        frames.put_nowait((ErrorFrame("failed", _one_line(error)), b""))


def _routes(output: CompletionOutput, wanted: RouteFormat | None, tokens: int) -> numpy.ndarray | None:
    """The experts of prompt and response, so many tokens, as they are sent. ValueError: the engine has none."""
    if wanted is None:
        return None
    if output.routed_experts is None:
        raise ValueError(
            "this server returns no routed experts, which algorithm.router_replay=rollout needs: start it with "
            "--enable-return-routed-experts"
        )
    return wanted.packed(output.routed_experts, tokens)


def _parameters(request: GenerateRequest, seed: int, begun: int) -> SamplingParams:
    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        max_tokens=request.max_tokens - begun,
        stop_token_ids=request.stop_token_ids,
        seed=seed,
        # The log-prob of the sampled token alone, in lists and not in an object for each token.
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        # The new tokens alone: after the first, and then when there are so many.
        output_kind=RequestOutputKind.DELTA,
        stream_interval=request.stream_tokens,
    )


def _spans(output: CompletionOutput) -> list[VersionSpan]:
    return [VersionSpan(span.version, span.start, span.end) for span in output.weight_versions or []]


async def _body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body") or len(body) > _LONGEST_REQUEST:
            return body


async def _until_disconnect(receive: Receive) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        while (await receive())["type"] != "http.disconnect":
            pass


async def _end(send: Send, about: EndFrame | ErrorFrame) -> None:
    await send({"type": "http.response.body", "body": encode_frame(about), "more_body": False})


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000]
