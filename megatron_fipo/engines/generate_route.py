"""The route of a rollout server that samples: token ids in; token ids, log-probs and weight versions out, as arrays.

vLLM's own route answers in JSON, 85 bytes a token, and for a group as a whole when its longest response has ended. This
one sends each response when it ends. It asks the same engine, by vLLM's own client object in the server process.
"""

import asyncio
import contextlib
import uuid
from typing import Any

import msgspec
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import TokensInput, tokens_input
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from megatron_fipo.engines.access import Receive, Scope, Send
from megatron_fipo.engines.generate_messages import (
    GENERATE_PATH,
    EndFrame,
    ErrorFrame,
    GenerateRequest,
    SampleFrame,
    VersionSpan,
    sample_frame,
)
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
        """Answer with frames: a SampleFrame for each response as it ends, then an EndFrame or an ErrorFrame."""
        if scope["type"] != "http" or scope["path"] != GENERATE_PATH or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body = await _body(receive)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/fipo")]})
        try:
            request = msgspec.json.decode(body, type=GenerateRequest)
            parameters = [_parameters(request, seed) for seed in request.seeds]
        except _REFUSALS as error:
            await _end(send, ErrorFrame("refused", _one_line(error)))
            return
        await _answer(scope["app"].state.engine_client, request, parameters, receive, send)


async def _answer(
    engine: Any, request: GenerateRequest, parameters: list[SamplingParams], receive: Receive, send: Send
) -> None:
    ended: asyncio.Queue[bytes | ErrorFrame] = asyncio.Queue()
    name = f"fipo-{uuid.uuid4().hex}"
    prompt = tokens_input(request.token_ids, cache_salt=request.cache_salt)
    samples = [
        asyncio.ensure_future(_sample(engine, prompt, chosen, f"{name}-{index}", index, ended))
        for index, chosen in enumerate(parameters)
    ]
    gone = asyncio.ensure_future(_until_disconnect(receive))
    try:
        for _ in samples:
            frame = asyncio.ensure_future(ended.get())
            await asyncio.wait({frame, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not frame.done():
                frame.cancel()
                return
            if isinstance(result := frame.result(), ErrorFrame):
                await _end(send, result)
                return
            await send({"type": "http.response.body", "body": result, "more_body": True})
        await _end(send, EndFrame(len(samples)))
    finally:
        # Nobody waits for what is still being sampled: a cancelled task has the engine drop its request.
        for task in (*samples, gone):
            task.cancel()
        await asyncio.gather(*samples, gone, return_exceptions=True)


async def _sample(
    engine: Any,
    prompt: TokensInput,
    parameters: SamplingParams,
    name: str,
    index: int,
    ended: "asyncio.Queue[bytes | ErrorFrame]",
) -> None:
    try:
        output: CompletionOutput | None = None
        async for answer in engine.generate(prompt, parameters, name):
            output = answer.outputs[0]
        assert output is not None and output.logprobs is not None
        about = SampleFrame(index, output.finish_reason or "none", _spans(output))
        log_probs = output.logprobs.logprobs  # type: ignore[union-attr]
        ended.put_nowait(sample_frame(about, list(output.token_ids), log_probs))
    except _REFUSALS as error:
        ended.put_nowait(ErrorFrame("refused", _one_line(error)))
    except Exception as error:
        # Whatever an engine raises is the trainer's to know: it asks another one.
        ended.put_nowait(ErrorFrame("failed", _one_line(error)))


def _parameters(request: GenerateRequest, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        max_tokens=request.max_tokens,
        stop_token_ids=request.stop_token_ids,
        seed=seed,
        # The log-prob of the sampled token alone, in lists and not in an object for each token.
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
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
