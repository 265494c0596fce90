"""Measure weight updates on this machine: bytes and seconds for each transport, and the memory of a conversion.

    python -m benchmarks.weights              # or one table: bytes, seconds, memory

A synthetic model of the size of Qwen2.5-0.5B in bfloat16 is sent to a real vLLM server over each transport. For
comparison the same bytes are copied in memory. Then 2 GB of weights are converted in both directions. There is also the
CPU time of trainer and server, on which other load on the machine has less effect. Results are in benchmarks/README.md.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.measure import machine, once
from benchmarks.usage import run_measured
from megatron_fipo.config import RolloutConfig
from megatron_fipo.engines.control import EngineControl
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.models.parameters import parameters
from megatron_fipo.weights.buckets import Bucket
from megatron_fipo.weights.huggingface import HuggingFaceReader, TensorInfo
from megatron_fipo.weights.huggingface_writer import HuggingFaceWriter
from megatron_fipo.weights.local_senders import Senders
from megatron_fipo.weights.publisher import open_publisher
from megatron_fipo.weights.transfer_plan import cut_by_size, plan_transfers, transfer_plan

HALF_A_BILLION: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
TWO_GIGABYTES = HALF_A_BILLION | {"hidden_size": 1792, "num_hidden_layers": 27, "vocab_size": 75968}
LAYOUTS = ((1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2))
"""The trainer's tensor and pipeline size, and the server's tensor size."""
UPDATES = 4
CONVERSION_TIMEOUT_S = 600.0


def main() -> None:
    """Measure what is requested and print the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=("bytes", "seconds", "memory"), help="one table; default: all")
    table = parser.parse_args().table
    print(machine())
    with tempfile.TemporaryDirectory(prefix="weights-") as name:
        directory = Path(name)
        if table in (None, "bytes"):
            _bytes_table(directory)
        if table in (None, "seconds"):
            _seconds_table(write_synthetic(HALF_A_BILLION, directory / "half"), directory)
        if table in (None, "memory"):
            _memory_table(write_synthetic(TWO_GIGABYTES, directory / "large"), directory)


def write_synthetic(config: dict[str, Any], target: Path) -> Path:
    """Make a model directory with random weights, one tensor at a time."""
    source = target.with_suffix(".source")
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    infos = [
        TensorInfo(name, shape, torch.bfloat16)
        for entry in parameters(read_architecture(source)).values()
        if entry.exported
        for name, shape in zip(entry.names, entry.shapes, strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    with HuggingFaceWriter(source, target, infos) as writer:
        for info in infos:
            writer.add(info.name, torch.empty(info.shape).normal_(0, 0.02, generator=generator).bfloat16())
        writer.close()
    return target


def _print_head(title: str, *columns: str) -> None:
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def _print_row(*values: str) -> None:
    print(f"| {' | '.join(values)} |", flush=True)


def _bytes_table(directory: Path) -> None:
    """Print megabytes of one update by rank. The least possible: shards are sent directly from owners to users."""
    _print_head(
        "Megabytes of one weight update of 0.5 B parameters in bfloat16. The least possible number is in brackets.",
        *("trainer", "server", "a rank gathers", "a sender sends", "a worker receives"),
    )
    (directory / "config.json").write_text(json.dumps(HALF_A_BILLION))
    model_config = read_architecture(directory)
    for tensor, pipeline, server in LAYOUTS:
        plan = transfer_plan(model_config, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
        transfers = plan_transfers(plan, server_tensor_parallel_size=server)
        sent: dict[int, int] = {}
        gathered: dict[int, int] = {}
        for transfer in transfers:
            sent[transfer.sources[0]] = sent.get(transfer.sources[0], 0) + transfer.nbytes
            for rank in transfer.sources:
                part = transfer.nbytes - transfer.nbytes // len(transfer.sources)
                gathered[rank] = gathered.get(rank, 0) + part
        total = sum(transfer.nbytes for transfer in transfers)
        needed = sum(transfer.needed for transfer in transfers)
        pairs = ((max(gathered.values()), 0), (max(sent.values()), total // (tensor * pipeline)), (total, needed))
        cells = (f"{moved / 1e6:.0f} ({least / 1e6:.0f})" for moved, least in pairs)
        _print_row(f"TP{tensor} PP{pipeline}", f"TP{server}", *cells)


@dataclass
class _Cost:
    """A cost: wall-clock seconds, and CPU seconds of this process and of the server."""

    wall: float
    trainer: float
    server: float


def _seconds_table(model: Path, directory: Path) -> None:
    with HuggingFaceReader(model) as reader:
        tensors = [(name, reader.tensor(name).clone()) for name in reader.tensors]
    total = sum(tensor.nbytes for _, tensor in tensors)
    _print_head(
        f"Seconds of one weight update of {total / 1e6:.0f} MB to one server; medians of {UPDATES}.",
        *("transport", "checksums", "update", "CPU time of the trainer", "of the server"),
        *("copy of the same bytes, CPU time", "CPU time / copy"),
    )
    for transport in ("process_group", "shared_memory"):
        plain, checked, copy_s = _costs_of_updates(transport, model, directory, tensors)
        for name, cost in (("no", plain), ("yes", checked)):
            row = (cost.wall, cost.trainer, cost.server, copy_s)
            ratio = (cost.trainer + cost.server) / copy_s
            _print_row(transport, name, *(f"{value:.2f}" for value in row), f"{ratio:.0f}")


def _costs_of_updates(
    transport: str, model: Path, directory: Path, tensors: list[tuple[str, Tensor]]
) -> tuple[_Cost, _Cost, float]:
    """Return medians of updates without and with checksums, and of a copy in memory, in CPU seconds."""
    config = RolloutConfig(
        weight_transfer=transport,
        max_prompt_length=64,
        max_response_length=64,
        max_num_seqs=4,
        enforce_eager=True,
        checksum_every=2,
    )
    run_dir = directory / transport
    buffers = [tensor.clone() for _, tensor in tensors]
    costs: dict[int, _Cost] = {}
    copies = []
    with EnginePool(config, model, run_dir, seed=0) as pool:
        pool.start()
        pool.wait_ready()
        server = psutil.Process(pool.servers[0].process.pid)  # type: ignore[union-attr]
        publisher = open_publisher(config, EngineControl(pool), groups={0: True}, senders=Senders(1), run_dir=run_dir)
        weights = _Whole(tensors, config.bucket_mib << 20)
        try:
            publisher.publish({0: weights}, version=1)  # the first one allocates all memory
            for version in range(2, 2 + 2 * UPDATES):
                copies.append(once(lambda: _copy(tensors, buffers)))
                mine, theirs = time.process_time(), _cpu_seconds(server)
                wall = publisher.publish({0: weights}, version).seconds
                costs[version] = _Cost(wall, time.process_time() - mine, _cpu_seconds(server) - theirs)
        finally:
            publisher.close()
    plain, checked = (_median([cost for version, cost in costs.items() if version % 2 == rest]) for rest in (1, 0))
    return plain, checked, statistics.median(copies)


class _Whole:
    """A sender's weights, of which every tensor is whole in this process."""

    def __init__(self, tensors: list[tuple[str, Tensor]], bucket_bytes: int):
        cuts = cut_by_size([tensor.nbytes for _, tensor in tensors], bucket_bytes)
        self._buckets = [Bucket(tensors[start:end]) for start, end in cuts]

    @property
    def buckets(self) -> int:
        return len(self._buckets)

    def gather(self, index: int) -> Bucket:
        return self._buckets[index]


def _copy(tensors: list[tuple[str, Tensor]], buffers: list[Tensor]) -> None:
    for buffer, (_, tensor) in zip(buffers, tensors, strict=True):
        buffer.copy_(tensor)


def _cpu_seconds(root: psutil.Process) -> float:
    """Return the CPU time so far of a process and its children."""
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def _median(costs: list[_Cost]) -> _Cost:
    values = [astuple(cost) for cost in costs]
    return _Cost(*(statistics.median(column) for column in zip(*values, strict=True)))


def _memory_table(model: Path, directory: Path) -> None:
    size = (model / "model.safetensors").stat().st_size
    _print_head(f"Converting {size / 1e9:.2f} GB.", "direction", "peak memory, MB", "seconds")
    for command, source, target in (("to-megatron", model, "megatron"), ("to-hf", directory / "megatron", "back")):
        started = time.perf_counter()
        conversion: list[str | Path] = [sys.executable, "tools/convert_hf.py", command, source, directory / target]
        ended = run_measured(conversion, CONVERSION_TIMEOUT_S)
        if ended.returncode != 0:
            sys.exit(f"{command} failed: {ended.stderr}")
        _print_row(command, str(ended.peak_bytes // 10**6), f"{time.perf_counter() - started:.0f}")


if __name__ == "__main__":
    main()
