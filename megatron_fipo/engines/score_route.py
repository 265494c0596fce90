"""The route of a rollout server that scores a text: token ids in; their log-probs and the weights' version out."""

import uuid
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from megatron_fipo.engines.access import Receive, Scope, Send
from megatron_fipo.engines.score_messages import SCORE_PATH, ScoreAnswer, ScoreRequest


class ScoreRoute:
    """ASGI middleware that answers POST SCORE_PATH, and passes everything else on."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with a ScoreAnswer, 400 for what is no ScoreRequest, 500 for what the engine cannot score."""
        if scope["type"] != "http" or scope["path"] != SCORE_PATH or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        response: Response
        try:
            request = msgspec.json.decode(await Request(scope, receive).body(), type=ScoreRequest)
            answer = await _score(scope["app"].state.engine_client, request)
            response = Response(msgspec.json.encode(answer), media_type="application/json")
        except msgspec.ValidationError as error:
            response = JSONResponse({"error": str(error)}, 400)
        except Exception as error:
            # Whatever an engine raises is the trainer's to know.
            response = JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)
        await response(scope, receive, send)


async def _score(engine: Any, request: ScoreRequest) -> ScoreAnswer:
    parameters = SamplingParams(
        temperature=0.0,
        # One token has to be sampled, and its span says which weights there are.
        max_tokens=1,
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    prompt = tokens_input(request.token_ids, cache_salt=request.cache_salt)
    answers = [answer async for answer in engine.generate(prompt, parameters, f"fipo-score-{uuid.uuid4().hex}")]
    answer = answers[-1]
    (span,) = answer.outputs[0].weight_versions
    return ScoreAnswer(answer.prompt_logprobs.logprobs, span.version)
