"""One real vLLM server for all of tests/rollout that does not kill it."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import Qwen2ForCausalLM

from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.rollout.generator import EngineGenerator
from tests.rollout.engines import rollout_config, save_tiny_model


class Rollout(NamedTuple):
    """A ready server, a client of it, and the model it started with."""

    pool: EnginePool
    client: EngineGenerator
    model: Qwen2ForCausalLM


@pytest.fixture(scope="package")
def rollout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rollout]:
    directory: Path = tmp_path_factory.mktemp("rollout")
    model = save_tiny_model(directory / "model", seed=0)
    with EnginePool(rollout_config(), directory / "model", directory / "run", seed=0) as pool:
        pool.start()
        pool.wait_ready()
        with EngineGenerator(pool) as client:
            yield Rollout(pool, client, model)
