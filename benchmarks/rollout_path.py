"""Measure the cost of tokens from the engines to rank 0: by the route that returns arrays, and by JSON of whole groups.

python -m benchmarks.rollout_path [--quick]

The engines are simulated in a separate process (benchmarks/fake_engines.py). CPU seconds are those of this process,
which does what sampling does. "Tokens kept" are tokens that it already holds, as near the end of a large batch.
"""

import argparse
import gc
import heapq
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from benchmarks.fake_engines import STOP_TOKEN, VOCABULARY, length_of
from benchmarks.measure import machine
from megatron_fipo.config import RolloutConfig
from megatron_fipo.engines.access import TOKEN_VARIABLE
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.records.problem import Problem, prompt_ids
from megatron_fipo.records.sample import Group
from megatron_fipo.rollout.generator import EngineGenerator
from megatron_fipo.rollout.ongoing import Ongoing
from megatron_fipo.rollout.work import Sampling, Work

SAMPLES = 16
CAP = 20_000


@contextmanager
def client_of(engines: int, places: int, seconds_per_token: float = 0.0) -> Iterator[EngineGenerator]:
    """Provide a client of simulated engines with this many places each."""
    command = [sys.executable, "-m", "benchmarks.fake_engines", str(engines), str(places), str(seconds_per_token)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        addresses = [f"http://127.0.0.1:{port}" for port in process.stdout.readline().split()]
        os.environ[TOKEN_VARIABLE] = "none"
        config = RolloutConfig(addresses=addresses, max_num_seqs=places, max_prompt_length=8, max_response_length=CAP)
        pool = EnginePool(config, Path(), Path(), seed=0)
        pool.wait_ready()
        with EngineGenerator(pool, vocab_size=VOCABULARY) as client:
            yield client
        process.stdin.close()
        process.wait(timeout=30)


def problems(count: int, mean: int, cap: int) -> list[Problem]:
    """Return prompts that request these lengths from the simulated engines."""
    return [Problem(f"problem-{index}", "", prompt_ids([mean, cap]), "", "made up") for index in range(count)]


def by_arrays(client: EngineGenerator, count: int, length: int) -> list[Group]:
    """Sample groups by the package's own client."""
    sampling = Sampling(1.0, 1.0, -1, CAP, [STOP_TOKEN])
    asked = problems(count, length, length)
    return sampled(client, asked, sampling)


def sampled(client: EngineGenerator, asked: list[Problem], sampling: Sampling, samples: int = SAMPLES) -> list[Group]:
    """Sample groups of `samples` samples."""
    return Ongoing(client, client.generate(asked, samples, sampling, range(len(asked)))).to_the_end(
        client.control.admit
    )


def by_json(client: EngineGenerator, count: int, length: int) -> list[object]:
    """Sample the same groups by vLLM's own route, as Python lists, with as few checks as possible."""
    url = client._pool.servers[0].url + "/inference/v1/generate"
    kept: list[object] = []
    with httpx.Client(trust_env=False, timeout=600) as http:
        for _ in range(count):
            body = {"token_ids": [length, length], "sampling_params": {"n": SAMPLES}}
            for choice in http.post(url, json=body).json()["choices"]:
                content = choice["logprobs"]["content"]
                assert [entry["token_id"] for entry in content] == choice["token_ids"]
                kept.append((choice["token_ids"], [entry["logprob"] for entry in content]))
    return kept


def cost(form: str, length: int, alive: int, measured: int) -> tuple[float, float, float]:
    """Return CPU seconds per million tokens, bytes kept and bytes sent per token, with `alive` tokens kept."""
    fetch = by_arrays if form == "arrays" else by_json
    group = SAMPLES * length
    with client_of(1, 256) as client:
        fetch(client, 1, length)
        gc.collect()
        process = psutil.Process()
        before = process.memory_info().rss
        held = fetch(client, max(1, round(alive / group)), length)
        gc.collect()
        kept = (process.memory_info().rss - before) / (max(1, round(alive / group)) * group)
        received, started = _received(), time.process_time()
        count = max(1, round(measured / group))
        held += fetch(client, count, length)
        seconds = time.process_time() - started
        return seconds / (count * group) * 1e6, kept, (_received() - received) / (count * group)


def cost_apart(*row: object) -> tuple[float, float, float]:
    """Measure `cost` in a separate process: memory that an earlier row has freed would otherwise be reused."""
    command = [sys.executable, "-m", "benchmarks.rollout_path", "--row", *map(str, row)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    seconds, kept, wire = json.loads(done.stdout)
    return seconds, kept, wire


def _received() -> int:
    return psutil.net_io_counters(pernic=True)["lo"].bytes_recv


def makespan(
    engines: int, places: int, groups: int, samples: int, mean: int, seconds_per_token: float
) -> tuple[float, float, float]:
    """Return the seconds of a batch with log-normal lengths, those if no place were ever empty, and CPU seconds.

    Each request is for one group of `samples` samples.
    """
    asked = problems(groups, mean, CAP)
    sampling = Sampling(1.0, 1.0, -1, CAP, [STOP_TOKEN])
    seeds = [
        seed
        for index, problem in enumerate(asked)
        for seed in Work(problem, samples, sampling, index).request(range(samples), "", 1).seeds
    ]
    free = [0.0] * (engines * places)
    for seed in seeds:  # in order, each in the place that is free first
        heapq.heappush(free, heapq.heappop(free) + length_of(seed, mean, CAP) * seconds_per_token)
    with client_of(engines, places, seconds_per_token) as client:
        started, used = time.monotonic(), time.process_time()
        sampled(client, asked, sampling, samples)
        return time.monotonic() - started, max(free), time.process_time() - used


def main() -> None:
    """Print the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few tokens, to test the code")
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        form, *numbers = options.row
        print(json.dumps(cost(form, *map(int, numbers))))
        return
    quick = options.quick
    rows = [("JSON", 3_700, 0.5), ("JSON", 3_700, 5.0), ("arrays", 3_700, 0.5), ("arrays", 3_700, 5.0)]
    rows += [("arrays", 3_700, 50.0), ("arrays", CAP, 0.5), ("arrays", CAP, 5.0), ("arrays", CAP, 50.0)]
    print(f"{machine()}; {SAMPLES} samples per group\n")
    print("| form | tokens per response | tokens kept, millions | CPU s per million | bytes kept | bytes on the wire |")
    print("|---|---|---|---|---|---|")
    for form, length, alive in rows[:1] + rows[2:3] if quick else rows:
        measured = 0.3e6 if quick else 1e6 if form == "JSON" else 10e6
        seconds, kept, wire = cost_apart(form, length, round(alive * 1e6), round(measured))
        print(f"| {form} | {length} | {alive} | {seconds:.3f} | {kept:.1f} | {wire:.1f} |", flush=True)
    engines, places, groups = (2, 16, 8) if quick else (8, 16, 40)
    print(f"\n{groups * SAMPLES} samples on {engines} engines of {places} places\n")
    print("| samples per request | seconds | × the ideal | CPU s |\n|---|---|---|---|")
    for samples in (SAMPLES, 1):
        spread = groups * SAMPLES // samples, samples, 3_700, 2e-5 if quick else 5e-4
        took, ideal, used = makespan(engines, places, *spread)
        print(f"| {samples} | {took:.1f} | {took / ideal:.3f} | {used:.2f} |", flush=True)


if __name__ == "__main__":
    main()
