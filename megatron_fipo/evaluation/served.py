"""Check that servers that the user started serve the weights to evaluate, and not weights of a training run."""

from pathlib import Path

import httpx

from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.engines.probes import INITIAL_VERSION, PROBE_TIMEOUT_S
from megatron_fipo.errors import RolloutError

_UNTOUCHED = ("default", str(INITIAL_VERSION))
"""Labels of weights that no trainer has replaced: vLLM's own label, and the pool's."""


def check_served(pool: EnginePool, model_dir: Path) -> None:
    """Raise RolloutError if a server has another model, or weights that a run has updated, or does not answer.

    Call it before `EnginePool.wait_ready`, which sets the weights' labels.
    """
    with httpx.Client(headers=pool.headers, timeout=PROBE_TIMEOUT_S, trust_env=False) as client:
        for server in pool.servers:
            try:
                models = client.get(f"{server.url}/v1/models").raise_for_status().json()["data"]
                version = client.get(f"{server.url}/weight_info").raise_for_status().json()["weight_version"]
            except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
                raise RolloutError(f"{server.url} does not say what it serves: {error}") from error
            served = str(models[0]["root"])
            if Path(served).resolve() != model_dir.resolve():
                raise RolloutError(
                    f"{server.url} serves {served}, and model.path is {model_dir}: start it with that one"
                )
            if version not in _UNTOUCHED:
                raise RolloutError(
                    f"{server.url} has weights of a run's step {version}, not those of {model_dir}: start it again"
                )
