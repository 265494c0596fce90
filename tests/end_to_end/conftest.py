from collections.abc import Iterator

import pytest

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config.configure import load_config
from megatron_fipo.engines.pool import EnginePool
from tests.end_to_end.runs import SMALL


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnginePool]:
    """A server that already runs, which runs adopt one after the other: a start costs as much as a run.

    One for each process of `make test`, which has it to its end.
    """
    config = load_config([*SMALL, "rollout.weight_transfer=process_group"]).rollout
    directory = tmp_path_factory.mktemp("server")
    with EnginePool(config, resolve_embedded("embedded:tiny"), directory, seed=0) as pool:
        pool.start()
        pool.wait_ready()
        yield pool
