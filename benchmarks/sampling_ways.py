"""Sample one step of the quick start in a separate process: by a server of ours, or by vLLM's engine in that process.

`Way` is the benchmark's side. The process reads one seed per line, and answers with the time of a sampling, as JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from megatron_fipo.config import Config
from megatron_fipo.config.configure import load_config
from megatron_fipo.config.model_places import model_directory
from megatron_fipo.data.problems import load_problems
from megatron_fipo.data.tokenizers import load_tokenizer
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.records.problem import Problem
from megatron_fipo.rollout.generator import EngineGenerator
from megatron_fipo.rollout.ongoing import Ongoing
from megatron_fipo.rollout.work import Sampling, Work

WAYS = ("server", "in_process")


class Way:
    """The process that samples in one way."""

    def __init__(self, name: str):
        self.name = name
        # vLLM's own variables, as engines/server_options.py sets them for a server.
        variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        variables |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sampling_ways", name],
            env=os.environ | (variables if name == "in_process" else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def sample(self, seed: int) -> dict[str, float]:
        """Sample all problems, with this seed and the following ones."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            if line.startswith("{"):  # vLLM writes to the same output
                return json.loads(line)
        raise RuntimeError(f"sampling in the way {self.name} has failed; its output is above")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


Sampler = Callable[[int], list[list[int]]]
"""A function from a seed to the tokens of each sample."""


@contextmanager
def by_server(config: Config, problems: list[Problem], sampling: Sampling) -> Iterator[Sampler]:
    """Sample by a server that is started as in a run."""
    samples, model = config.algorithm.samples_per_prompt, model_directory(config.model.path)
    with tempfile.TemporaryDirectory(prefix="sampling-") as directory:
        pool = EnginePool(config.rollout, model, Path(directory), config.run.seed)
        with pool:
            pool.start()
            pool.wait_ready()
            with EngineGenerator(pool) as generator:

                def sample(seed: int) -> list[list[int]]:
                    seeds = range(seed, seed + len(problems))
                    ongoing = Ongoing(generator, generator.generate(problems, samples, sampling, seeds))
                    ongoing.wait()
                    return [sample.token_ids.tolist() for group in ongoing.result for sample in group.samples]

                yield sample


@contextmanager
def in_process(config: Config, problems: list[Problem], sampling: Sampling) -> Iterator[Sampler]:
    """Sample by vLLM's engine in this process, with the server's settings and seeds."""
    from vllm import LLM, SamplingParams

    rollout = config.rollout
    engine = LLM(
        model=str(model_directory(config.model.path)),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=rollout.max_prompt_length + rollout.max_response_length,
        max_num_seqs=rollout.max_num_seqs,
        max_num_batched_tokens=8192,
        enable_chunked_prefill=False,
        enforce_eager=rollout.enforce_eager,
        generation_config="vllm",
        seed=config.run.seed,
    )

    def sample(seed: int) -> list[list[int]]:
        prompts, parameters = [], []
        for index, problem in enumerate(problems):
            work = Work(problem, config.algorithm.samples_per_prompt, sampling, seed + index)
            for own_seed in work.request(work.missing(), cache_salt="", stream_tokens=10**6).seeds:
                prompts.append({"prompt_token_ids": problem.token_ids.tolist()})
                parameters.append(
                    SamplingParams(
                        temperature=sampling.temperature,
                        max_tokens=sampling.max_tokens,
                        stop_token_ids=sampling.stop_token_ids,
                        seed=own_seed,
                        logprobs=0,
                        flat_logprobs=True,
                        detokenize=False,
                    )
                )
        requests: Any = prompts
        return [list(answer.outputs[0].token_ids) for answer in engine.generate(requests, parameters, use_tqdm=False)]

    yield sample


def main() -> None:
    """Sample for each seed on the standard input, until it ends."""
    config = load_config(["run.directory=unused"])
    tokenizer = load_tokenizer(model_directory(config.model.path), config.data)
    every = load_problems(config.data, "train", tokenizer, config.rollout.max_prompt_length, validates=True).problems
    problems = every[: config.algorithm.prompts_per_step]
    sampling = Sampling(1.0, 1.0, -1, config.rollout.max_response_length, tokenizer.eos_ids)
    way = by_server if sys.argv[1] == "server" else in_process
    with way(config, problems, sampling) as sample:
        for line in sys.stdin:
            started, before = time.perf_counter(), _cpu_seconds()
            tokens = sample(int(line))
            took = {"seconds": time.perf_counter() - started, "cpu_seconds": _cpu_seconds() - before}
            print(json.dumps(took | {"tokens": sum(map(len, tokens)), "longest": max(map(len, tokens))}), flush=True)


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and all its child processes."""
    root = psutil.Process()
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(one.user + one.system for one in times)


if __name__ == "__main__":
    main()
