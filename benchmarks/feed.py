"""Compare two ways to send a step's tokens to the trainer's ranks: all tokens to all ranks, or only to their readers.

    python -m benchmarks.feed [--quick]

Ranks are processes of this machine over gloo. Rank 0 has the samples and serves them. "Held" are the arrays of tokens
that a rank has while the step is trained on. "Peak" is how much its memory grows until then, without rank 0's own
samples. The first way, which older versions used, is written here: one broadcast of every stream of every sequence.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch
import torch.distributed

from benchmarks.measure import machine, peak_bytes
from megatron_fipo.config import AlgorithmConfig
from megatron_fipo.policy import platform
from megatron_fipo.records.problem import Problem, prompt_ids
from megatron_fipo.records.sample import Group, RewardResult, Sample
from megatron_fipo.records.streams import checked, sampled_streams

VOCABULARY, PROMPT, PER_PROMPT, MIB = 150_000, 100, 16, 2**20
REPEATS = 3


@dataclass(frozen=True)
class Layout:
    """How ranks are laid out: data-parallel outermost, then pipeline, then tensor."""

    data: int
    pipeline: int
    tensor: int

    @property
    def world_size(self) -> int:
        return self.data * self.pipeline * self.tensor

    def stages(self, rank: int) -> frozenset[str]:
        stage = rank // self.tensor % self.pipeline
        return frozenset({"first"} if stage == 0 else set()) | ({"last"} if stage == self.pipeline - 1 else set())


def make_groups(samples: int, tokens: int) -> list[Group]:
    """Return judged groups of random samples of `tokens` tokens, prompt included."""
    drawn, groups, result = numpy.random.default_rng(0), [], RewardResult(1.0, 1.0, "7", "judged")
    for number in range(samples // PER_PROMPT):
        members = []
        for _ in range(PER_PROMPT):
            ids = drawn.integers(VOCABULARY, size=tokens - PROMPT, dtype=numpy.int32)
            log_probs = -drawn.random(tokens - PROMPT, dtype=numpy.float32)
            arrays = checked({"token_ids": ids, "rollout_log_probs": log_probs}, "made")
            members.append(Sample(arrays, "length", 0, "", result))
        groups.append(Group(Problem(str(number), "", prompt_ids([1] * PROMPT), "7", "made"), tuple(members)))
    return groups


def broadcast_all(groups: list[Group], samples: int, tokens: int) -> dict[str, torch.Tensor]:
    """Send every stream of every sequence to every rank."""
    held = {}
    for name, stream in sampled_streams().items():
        kind = getattr(torch, stream.dtype)
        flat = torch.empty(samples * tokens, dtype=kind)
        if groups:
            prompt = torch.full((PROMPT,), 1, dtype=kind)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about read-only arrays
                parts = [[prompt, torch.from_numpy(s.streams[name])] for group in groups for s in group.samples]
            flat = torch.cat([part for pair in parts for part in pair])
        torch.distributed.broadcast(flat, src=0)
        held[name] = flat
    return held


def measure(rank: int, layout: Layout, samples: int, tokens: int, port: int) -> None:
    """Run as one rank. Rank 0 prints the rows."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(layout.world_size), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    platform.start_process_group(600)
    from megatron_fipo.policy.feed import Feed
    from megatron_fipo.policy.micro_batch import BatchLayout
    from megatron_fipo.policy.plan import plan_micro_batches
    from megatron_fipo.records.rows import TrainBatch
    from megatron_fipo.rollout.offers import Offers

    groups = make_groups(samples, tokens) if rank == 0 else []
    size = layout.tensor
    peers = [torch.distributed.new_group(range(at, at + size)) for at in range(0, layout.world_size, size)]
    feed = Feed(
        BatchLayout(packed=True, pad_multiple=1, stages=layout.stages(rank)),
        VOCABULARY,
        torch.device("cpu"),
        tensor_group=peers[rank // size] if size > 1 else None,
    )
    offers = Offers(AlgorithmConfig(mini_batch_prompts=len(groups) or 1), print) if rank == 0 else None

    def plan(batch: TrainBatch) -> list[list[list[int]]]:
        ranks = plan_micro_batches(batch.lengths, layout.data, 32_768, packed=True)
        return [ranks[rank // (layout.tensor * layout.pipeline)]]

    def feed_all() -> dict[str, torch.Tensor]:
        offered = offers.offer(groups, 1, 0) if offers else None
        (mini_batch,) = feed.get(offered, offers, plan)
        return dict(mini_batch.tokens.arrays)

    ways = {"all tokens to all": lambda: broadcast_all(groups, samples, tokens), "rows and readers": feed_all}
    for name, way in ways.items():
        report(rank, name, *timed(way))
    if offers:
        offers.close()
    platform.stop_process_group()


def timed(way: Callable[[], dict[str, torch.Tensor]]) -> tuple[float, int, int]:
    """Return the median seconds between barriers, the bytes held afterwards, and the largest growth of memory."""
    held: dict[str, torch.Tensor] = {}
    seconds = []
    torch.distributed.barrier()
    peak = peak_bytes(lambda: held.update(way()))
    for _ in range(REPEATS):
        held = {}
        torch.distributed.barrier()
        started = time.perf_counter()
        held = way()
        torch.distributed.barrier()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), sum(part.numel() * part.element_size() for part in held.values()), peak


def report(rank: int, name: str, seconds: float, held: int, peak: int) -> None:
    """Print the results of all ranks, on rank 0."""
    from megatron_fipo.weights.reshard import gather_texts

    found = [json.loads(text) for text in gather_texts(json.dumps([held, peak]), torch.device("cpu"))]
    if rank == 0:
        shown = ", ".join(f"{each / MIB:.0f}" for each, _ in found)
        peaks = ", ".join(f"{each / MIB:.0f}" for _, each in found)
        print(f"| {name} | {seconds:.2f} | {shown} | {peaks} |", flush=True)


def main() -> None:
    """Print a table for each layout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a hundredth of the samples")
    samples, tokens = (8192 // 128 if parser.parse_args().quick else 8192), 2000
    print(f"{machine()}; {samples} samples of {tokens} tokens")
    for layout in (Layout(2, 1, 1), Layout(2, 3, 2)):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        print(f"\nDP {layout.data} × PP {layout.pipeline} × TP {layout.tensor}\n")
        print("| way | seconds | held by rank, MiB | peak by rank, MiB |\n|---|---|---|---|", flush=True)
        context = multiprocessing.get_context("spawn")
        arguments = [(rank, layout, samples, tokens, port) for rank in range(layout.world_size)]
        ranks = [context.Process(target=measure, args=each) for each in arguments]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit("a rank failed")


if __name__ == "__main__":
    main()
