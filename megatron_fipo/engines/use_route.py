"""The route of a rollout server that says how full its cache of keys and values was."""

from typing import Any

import msgspec
from starlette.responses import JSONResponse, Response

from megatron_fipo.engines.access import Receive, Scope, Send
from megatron_fipo.engines.cache_counter import TAKE
from megatron_fipo.engines.use_messages import USE_PATH, CacheUse


class UseRoute:
    """ASGI middleware that answers POST USE_PATH, and passes everything else on."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with a CacheUse; its peak begins anew then. 500 if the engine cannot say."""
        if scope["type"] != "http" or scope["path"] != USE_PATH or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        response: Response
        try:
            use = await _use(scope["app"].state.engine_client)
            response = Response(msgspec.json.encode(use), media_type="application/json")
        except Exception as error:
            # Whatever an engine raises is the trainer's to know.
            response = JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)
        await response(scope, receive, send)


async def _use(client: Any) -> CacheUse:
    cache = client.vllm_config.cache_config
    preemptions, peak = await client.engine_core.call_utility_async(TAKE)
    return CacheUse(cache.kv_cache_size_tokens, cache.block_size, preemptions, peak)
