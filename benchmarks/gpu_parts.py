"""The parts of benchmarks/gpu.py, one per process: `python -m benchmarks.gpu_parts NAME [ARGUMENT ...] [--tiny]`.

Every part prints its rows as JSON lines after `result: `. With --tiny the sizes are for a CPU, to test the code.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import torch
from torch import Tensor

from benchmarks.measure import device, once, peak_bytes, seconds
from megatron_fipo.config import Config

Row = dict[str, Any]
RESULT = "result: "
GIB = 1 << 30
VOCABULARY = 151_936


def ceilings(tiny: bool) -> Iterator[Row]:
    """Measure this device's limits: a copy (bytes read and written), and a bf16 matrix product of random values."""
    elements, width = (1 << 22, 512) if tiny else (1 << 30, 8192)
    source = torch.randn(elements, device=device())
    target = torch.empty_like(source)
    yield {"what": "copy, GB/s", "rate": 2 * 4 * elements / seconds(lambda: target.copy_(source)) / 1e9}
    left, right = (torch.randn(width, width, device=device(), dtype=torch.bfloat16) for _ in range(2))
    yield {"what": "bf16 product, TFLOP/s", "rate": 2 * width**3 / seconds(lambda: left @ right) / 1e12}


def credit(tiny: bool) -> Iterator[Row]:
    """Measure the suffix scan's GB/s, at 8 bytes per token, and its error compared with fp64."""
    from megatron_fipo.algorithm.credit import suffix_scan

    gamma = 2 ** (-1 / 32)
    shapes = [(4, 512)] if tiny else [(8, 20_480), (512, 20_480), (8192, 20_480), (8, 131_072), (64, 1_048_576)]
    for stretches, tokens in shapes:
        values = torch.randn(stretches * tokens, device=device()) * 0.02
        lengths = torch.full((stretches,), tokens, device=device())
        suffix_scan(values, gamma, lengths)  # compiles
        spent = seconds(functools.partial(suffix_scan, values, gamma, lengths), least=0.3)
        part, one = values[:tokens].double().cpu(), torch.tensor([tokens])
        error = (suffix_scan(values, gamma, lengths)[:tokens].cpu().double() - suffix_scan(part, gamma, one)).abs()
        yield {
            "stretches": stretches,
            "tokens": tokens,
            "microseconds": 1e6 * spent,
            "gb_s": 8 * values.numel() / spent / 1e9,
            "error": error.max().item(),
        }


def log_probs(tiny: bool) -> Iterator[Row]:
    """Measure log-prob and entropy, forward and backward: the policy's code, and log_softmax of fp32 logits."""
    from benchmarks.logprobs import plain
    from megatron_fipo.policy.logprobs import log_probs_and_entropy

    def fused(logits: Tensor, labels: Tensor) -> None:
        log_probs_and_entropy(logits * 1, labels, vocabulary, overwrite=True)[0].sum().backward()

    positions, vocabulary = (256, 4096) if tiny else (32_768, VOCABULARY)
    labels = torch.randint(0, vocabulary, (1, positions), device=device())
    for form, way in (("ours", fused), ("log_softmax", plain)):
        logits = torch.randn(1, positions, vocabulary, device=device(), dtype=torch.bfloat16).requires_grad_()
        run = functools.partial(_without_gradient, way, logits, labels)
        try:
            peak = peak_bytes(run)
            spent = statistics.median(once(run) for _ in range(3))
        except torch.cuda.OutOfMemoryError:
            peak, spent = None, None
        size = logits.numel() * 2
        # Ours overwrites its logits, so it gets a copy, which counts neither in time nor in memory.
        copied = seconds(functools.partial(torch.mul, logits, 1)) if form == "ours" and spent else 0.0
        yield {
            "form": form,
            "positions": positions,
            "logits_gib": size / GIB,
            "seconds": spent and spent - copied,
            "peak_gib": peak and (peak - (size if form == "ours" else 0)) / GIB,
        }
        del logits, run


def _without_gradient(way: Callable[[Tensor, Tensor], None], logits: Tensor, labels: Tensor) -> None:
    logits.grad = None
    way(logits, labels)


def update(tiny: bool, shape_name: str, length: str, layers: str, precision: str) -> Iterator[Row]:
    """Measure a whole update of packed sequences of one length, FIPO and DAPO alternating, and its kinds of kernels."""
    from benchmarks.policy import SHAPES, configuration, operations
    from megatron_fipo.policy import platform

    platform.install()
    from megatron_fipo.policy.feed import made_alike
    from megatron_fipo.policy.model import start_model_parallel

    tokens, sequences = (256, 8) if tiny else (16_384, 4 * 16_384 // int(length))
    small = "tiny_moe" if SHAPES[shape_name].model_config.experts else "tiny"
    shape = dataclasses.replace(SHAPES[small if tiny else shape_name], micro_batch_tokens=tokens)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    platform.start_process_group(60)
    fipo = configuration(shape, precision, packing=True, layers=layers)
    start_model_parallel(fipo.parallel, 0)
    policy = _policy(fipo, shape)
    made = _equal_sequences(64 if tiny else int(length), sequences, shape.model_config.vocab_size)
    (batch,) = made_alike(policy, *made)
    scoring = min(once(lambda: policy.log_probs([batch])) for _ in range(2))
    (old,) = policy.log_probs([batch]).streams
    times: dict[str, list[float]] = {"fipo": [], "dapo": []}
    for turn in range(5):
        for name in ("fipo", "dapo") if turn % 2 else ("dapo", "fipo"):
            policy.choose(name)
            spent = once(lambda: policy.update(batch, old))
            times[name] += [spent] if turn else []
    ratios = [fipo / dapo for fipo, dapo in zip(times["fipo"], times["dapo"], strict=True)]
    median = statistics.median(times["fipo"])
    done = operations(shape.model_config, [int(length)] * sequences)
    yield {
        "shape": shape_name,
        "layers": shape.model_config.num_layers,
        "model.layers": layers,
        "model.fp8": precision,
        "length": int(length),
        "tokens": int(length) * sequences,
        "seconds": median,
        "scoring_seconds": scoring,
        "tflops": done / median / 1e12,
        "fipo_over_dapo": statistics.median(ratios),
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None,
        "profile": _profile(lambda: policy.update(batch), median),
    }
    platform.stop_process_group()


def _policy(fipo: Config, shape: Any) -> Any:
    """A Policy with random weights whose loss can be chosen between updates."""
    from megatron_fipo.config.configure import load_config
    from megatron_fipo.policy.update import Policy

    dapo = dataclasses.replace(fipo, algorithm=load_config(["algorithm=dapo"]).algorithm)

    class WithEitherLoss(Policy):
        def choose(self, name: str) -> None:
            self.config = {"fipo": fipo, "dapo": dapo}[name]

    return WithEitherLoss(fipo, shape.model_config, None, updates=1000)


def _equal_sequences(length: int, count: int, vocabulary: int) -> Any:
    from megatron_fipo.rollout.plain_batch import plain_batch

    prompt, generator = 16, torch.Generator().manual_seed(0)
    return plain_batch(
        streams={
            "token_ids": [torch.randint(0, vocabulary, (length + 1,), generator=generator) for _ in range(count)],
            "rollout_log_probs": [-torch.rand(length + 1, generator=generator) for _ in range(count)],
        },
        prompt_lengths=[prompt] * count,
        advantages=torch.randn(count, generator=generator).tolist(),
    )


KERNELS = {
    "log-probs": ("_statistics_kernel", "_gradient_kernel"),
    "attention": ("sdpa", "flash", "fmha", "attention"),
    "products": ("nvjet", "gemm", "cutlass", "gemv", "splitk"),
    "optimizer": ("multi_tensor", "adam"),
    "copies": ("memcpy", "memset", "copy_kernel"),
}


def _profile(function: Callable[[], object], spent: float) -> Row | None:
    """Return shares of `spent` by kind of kernel. `idle` is the time in which the device waited for the CPU."""
    if not torch.cuda.is_available():
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    shares = dict.fromkeys([*KERNELS, "other"], 0.0)
    for event in profile.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, parts in KERNELS.items() if any(part in name for part in parts)), "other")
        shares[kind] += event.self_device_time_total / 1e6 / spent
    return shares | {"idle": max(0.0, 1 - sum(shares.values()))}


RECEIVER = """
import msgspec, sys, torch
from megatron_fipo.weights.cuda_ipc import open_shared
from megatron_fipo.weights.transport_records import CudaHandle
held = None
for line in sys.stdin:
    shared = open_shared(msgspec.json.decode(line, type=CudaHandle), torch.device("cuda", 0))
    held = torch.empty_like(shared) if held is None or held.numel() != shared.numel() else held
    held.copy_(shared)
    torch.cuda.synchronize()
    del shared
    print(held[:16].sum().item(), flush=True)
"""


def ipc(tiny: bool) -> Iterator[Row]:
    """Measure a bucket of weights by CUDA IPC: packed here, opened and copied by another process."""
    from megatron_fipo.weights.buckets import Bucket
    from megatron_fipo.weights.cuda_ipc import CudaIpcTransport
    from megatron_fipo.weights.transport_records import BucketMemory

    if not torch.cuda.is_available():
        return
    tensors = [(f"layer.{index}", torch.randn(8192, 4096, device="cuda").bfloat16()) for index in range(4)]
    transport = CudaIpcTransport()
    transport.open(1)
    with subprocess.Popen(
        [sys.executable, "-c", RECEIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as receiver:
        asked, answered = receiver.stdin, receiver.stdout
        assert asked is not None and answered is not None

        def send() -> None:
            place = transport.send(Bucket(tensors)).place
            assert isinstance(place, BucketMemory)
            (handle,) = place.handles.values()
            print(msgspec.json.encode(handle).decode(), file=asked, flush=True)
            answered.readline()
            transport.sent()

        send()
        spent = statistics.median(once(send) for _ in range(20))
        asked.close()
    size = sum(tensor.numel() * 2 for _, tensor in tensors)
    yield {"mib": size / 2**20, "seconds": spent, "gb_s": size / spent / 1e9}


PARTS: dict[str, Callable[..., Iterator[Row]]] = {
    "ceilings": ceilings,
    "credit": credit,
    "log_probs": log_probs,
    "update": update,
    "ipc": ipc,
}


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    options = parser.parse_args()
    for row in PARTS[options.part](options.tiny, *options.arguments):
        print(RESULT + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
