"""A client of many servers under a lowered limit of open files, in a process of its own (test_descriptors.py).

python -m tests.engines.many_servers HARD_LIMIT PROVIDE PORT …; prints what came of it as JSON.
"""

import json
import os
import resource
import sys
from pathlib import Path

from megatron_fipo.config import RolloutConfig
from megatron_fipo.engines.access import TOKEN_VARIABLE
from megatron_fipo.engines.descriptors import provide
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.engines.states import State
from megatron_fipo.errors import FipoError
from megatron_fipo.records.problem import Problem, prompt_ids
from megatron_fipo.rollout.generator import EngineGenerator, connections
from megatron_fipo.rollout.ongoing import Ongoing
from megatron_fipo.rollout.work import Sampling

SOFT, SAMPLES, PLACES = 1024, 4, 64
LENGTH = 40


def main() -> None:
    """Ask all servers for as many samples as they have places for, all at once."""
    hard, provides, *ports = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, int(hard)))
    warnings: list[str] = []
    addresses = [f"http://127.0.0.1:{port}" for port in ports]
    config = RolloutConfig(addresses=addresses, max_num_seqs=PLACES, max_response_length=LENGTH)
    os.environ[TOKEN_VARIABLE] = "none"
    pool = EnginePool(config, Path(), Path(), seed=0, warn=warnings.append)
    for server in pool.servers:
        server.enter(State.SERVING)
    count = len(ports) * (PLACES // SAMPLES + 2)
    problems = [Problem(f"problem-{index}", "", prompt_ids([LENGTH, LENGTH]), "", "made up") for index in range(count)]
    groups, retries, error = 0, 0, ""
    try:
        if provides == "yes":
            provide(connections(pool.config, SAMPLES), f"{len(ports)} servers")
        with EngineGenerator(pool) as client:
            sampling = Sampling(1.0, 1.0, -1, LENGTH, [2])
            groups = len(
                Ongoing(client, client.generate(problems, SAMPLES, sampling, range(count))).to_the_end(pool.admit)
            )
            retries = client.retries
    except FipoError as refusal:
        error = str(refusal)
    answer = {"groups": groups, "asked": count, "retries": retries, "warnings": warnings, "error": error}
    print(json.dumps(answer | {"serving": len(pool.serving)}))


if __name__ == "__main__":
    main()
