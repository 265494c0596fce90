"""Measure how long training waits for a checkpoint, and what its checksums and a resume cost.

    python -m benchmarks.checkpoint              # SmolLM2-135M's shape with random weights, in fp32, on one rank
    python -m benchmarks.checkpoint DIRECTORY    # write there, to measure this disk or file system

Synchronous saves, asynchronous saves and Megatron-Core's own save, which older versions used, alternate over the same
policy. Seconds are wall-clock time. While an asynchronous save is written, the policy is trained, and the time of this
update is compared with that of an update alone. Results are in benchmarks/README.md.
"""

import argparse
import contextlib
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash

from benchmarks.measure import machine
from benchmarks.weights import write_synthetic
from megatron_fipo.config import Config
from megatron_fipo.config.configure import load_config
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.policy import platform

platform.install()

from megatron.core import dist_checkpointing  # noqa: E402

from megatron_fipo.policy import checkpoint, checkpoint_manifest  # noqa: E402
from megatron_fipo.policy.feed import made_alike  # noqa: E402
from megatron_fipo.policy.model import start_model_parallel  # noqa: E402
from megatron_fipo.policy.update import Policy  # noqa: E402
from megatron_fipo.rollout.plain_batch import plain_batch  # noqa: E402

SMOLLM2_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
ROUNDS = 4
TOKENS = 128
"""Few tokens, so that an update ends before a save."""
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


class Clock:
    """Records the seconds of calls, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """Call `work`, record its time, and return its result."""
        start = time.perf_counter()
        result = work()
        self.seconds[name].append(time.perf_counter() - start)
        return result

    def median(self, *names: str) -> float:
        """Return the sum of the medians."""
        return sum(statistics.median(self.seconds[name]) for name in names)


def main() -> None:
    """Measure, and print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, help="where to write; default: a temporary directory")
    parent = parser.parse_args().directory
    os.environ |= ALONE
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=parent) as name:
        place = Path(name)
        policy = _policy(write_synthetic(SMOLLM2_135M, place / "model"))
        clock = Clock()
        for number in range(ROUNDS):
            _round(policy, place, number, clock)
        newest = checkpoint.newest(place / "checkpoints")
        assert newest is not None
        for _ in range(ROUNDS):
            clock("verify", lambda: checkpoint_manifest.verify(newest))
            clock("load", lambda: checkpoint.load(policy, newest))
        size = sum(path.stat().st_size for path in newest.iterdir())
    platform.stop_process_group()
    _print(clock, size)


def _policy(model: Path) -> Policy:
    config: Config = load_config(["parallel=single", "parallel.micro_batch_tokens=512", "model.dtype=float32"])
    platform.start_process_group(600)
    start_model_parallel(config.parallel, seed=0)
    return Policy(config, read_architecture(model), str(model), updates=1000)


def _round(policy: Policy, place: Path, number: int, clock: Clock) -> None:
    """Do one save of each kind, an update alone, and an update during writing."""
    model, checkpoints = place / "model", place / "checkpoints"

    def arguments(step: int) -> tuple[Any, ...]:
        return policy, checkpoints, 10 * number + step, {}, 1, model

    made = plain_batch(
        streams={"token_ids": [torch.randint(3, 1000, (TOKENS,))], "rollout_log_probs": [-torch.rand(TOKENS)]},
        prompt_lengths=[TOKENS // 4],
        advantages=[1.0],
    )
    (mini_batch,) = made_alike(policy, *made)
    (old,) = policy.log_probs([mini_batch]).streams
    clock("update", lambda: policy.update(mini_batch, old))
    kinds = {
        "before": lambda: _save_as_before(policy, place / "before"),
        "synchronous": lambda: checkpoint.start_saving(*arguments(1)).finish(),
        "unchecked": lambda: checkpoint.start_saving(*arguments(2)).finish(),
    }
    # In another order in each round: a disk is busy for a while with files that were written and removed before.
    for kind in sorted(kinds, key=lambda kind: (list(kinds).index(kind) + number) % len(kinds)):
        _settle()
        before = _processor_seconds()
        with _no_checksums() if kind == "unchecked" else contextlib.nullcontext():
            clock(kind, kinds[kind])
        _settle()
        clock.seconds[f"{kind}, of processors"].append(_processor_seconds() - before)
    _settle()
    saving = clock("begin", lambda: checkpoint.start_saving(*arguments(3)))
    clock("update beside", lambda: policy.update(mini_batch, old))
    while not saving.is_written():
        time.sleep(0.05)
    clock("finish", saving.finish)


def _processor_seconds() -> float:
    """Return the CPU time of the child processes that have ended."""
    multiprocessing.active_children()  # reaps those
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _settle() -> None:
    """Wait until the disk has finished earlier writes and removals, so that the next save does not wait for them."""
    time.sleep(1)
    os.sync()


def _save_as_before(policy: Policy, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    dist_checkpointing.save(checkpoint._sharded_state(policy, is_loading=False), str(directory))


@contextlib.contextmanager
def _no_checksums() -> Iterator[None]:
    class Nothing:
        def __init__(self, _: bytes = b"") -> None: ...

        def update(self, _: Any) -> None: ...

        def hexdigest(self) -> str:
            return ""

    checksums = xxhash.xxh3_128
    xxhash.xxh3_128 = Nothing  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        xxhash.xxh3_128 = checksums  # type: ignore[misc]


def _print(clock: Clock, size: int) -> None:
    synchronous, stall = clock.median("synchronous"), clock.median("begin", "finish")
    print(f"{machine()}; {ROUNDS} rounds, medians; {size / 1e9:.2f} GB\n\n| what | seconds | ratio |\n|---|---|---|")
    rows = (
        ("Megatron-Core's own save", clock.median("before"), clock.median("before") / synchronous),
        ("synchronous save", synchronous, 1.0),
        ("without checksums", clock.median("unchecked"), clock.median("unchecked") / synchronous),
        (
            "asynchronous save: training waits at its beginning",
            clock.median("begin"),
            clock.median("begin") / synchronous,
        ),
        ("training waits at its end", clock.median("finish"), clock.median("finish") / synchronous),
        ("both", stall, stall / synchronous),
    )
    for what, seconds, ratio in rows:
        print(f"| {what} | {seconds:.2f} | {ratio:.3f} |")
    checked, unchecked = (clock.median(f"{kind}, of processors") for kind in ("synchronous", "unchecked"))
    print(
        f"| CPU time of the writing processes, and its ratio to the time without checksums | {checked:.2f} "
        f"| {checked / unchecked:.3f} |"
    )
    alone, beside = clock.median("update"), clock.median("update beside")
    load, verify = clock.median("load"), clock.median("verify")
    print(f"| an update alone | {alone:.2f} | |")
    print(f"| an update while a save is written | {beside:.2f} | |")
    print(f"| resume: read the checkpoint | {load:.2f} | |")
    print(f"| resume: compare it with its checksums | {verify:.2f} | |")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
