"""Measure tokens per second and MFU of one update by model shape, precision and packing, and shares of its parts.

    python -m benchmarks.policy                        every shape and precision, packed and padded
    python -m benchmarks.policy --shape 7b --layers 4 --precision off tensorwise

It uses one process on one device, random weights, and FIPO's loss. Each row is measured in its own process. If this
machine cannot run a row, its reason is printed, and the others still run. --shape tiny is for a CPU, to test the code.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.measure import machine, once
from megatron_fipo.config import Config
from megatron_fipo.config.configure import load_config
from megatron_fipo.errors import FipoError
from megatron_fipo.models.costs import attention_operations, products
from megatron_fipo.models.experts import Experts
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.policy import platform
from megatron_fipo.policy.micro_batch import MicroBatch
from megatron_fipo.rollout.plain_batch import Made, plain_batch

WARM_UP, REPEATS = 2, 5
PROMPT = 16
PRECISIONS = ("off", "delayed", "tensorwise", "blockwise", "mxfp8")
RESULT = "result: "


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's sizes and a batch for it."""

    model_config: ModelConfig
    sequences: int
    longest: int
    micro_batch_tokens: int


def _qwen(layers: int, hidden: int, heads: int, groups: int, ffn: int, vocabulary: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        architecture="Qwen2ForCausalLM",
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=hidden // heads,
        ffn_hidden_size=ffn,
        vocab_size=vocabulary,
        tied_embeddings=tied,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
        max_position_embeddings=32768,
        eos_token_ids=(0,),
    )


def _with_experts(dense: ModelConfig, head_dim: int, number: int, per_token: int) -> ModelConfig:
    """A Qwen3 whose layers have so many experts of the dense feed-forward's width."""
    experts = Experts(number, per_token, dense.ffn_hidden_size, normalized=True, layers=(True,) * dense.num_layers)
    return dataclasses.replace(dense, architecture="Qwen3MoeForCausalLM", head_dim=head_dim, experts=experts)


def with_layers(model_config: ModelConfig, layers: int) -> ModelConfig:
    """Return the model with so many layers."""
    experts = model_config.experts and dataclasses.replace(
        model_config.experts, layers=(model_config.experts.layers * layers)[:layers]
    )
    return dataclasses.replace(model_config, num_layers=layers, experts=experts)


SHAPES = {
    "0.5b": Shape(_qwen(24, 896, 14, 2, 4864, 151936, True), 64, 8192, 16384),
    "1.5b": Shape(_qwen(28, 1536, 12, 2, 8960, 151936, True), 64, 8192, 16384),
    # All 28 layers and their optimizer do not fit on one GPU of 80 GB. With 8 layers the output layer has a larger
    # share.
    "7b": Shape(_qwen(8, 3584, 28, 4, 18944, 152064, False), 64, 8192, 16384),
    # As many of Qwen3-30B-A3B's 48 layers as fit with their optimizer: 43 GB of experts.
    "30b_a3b": Shape(_with_experts(_qwen(4, 2048, 32, 4, 768, 151936, False), 128, 128, 8), 64, 8192, 16384),
    "tiny": Shape(_qwen(4, 64, 4, 2, 96, 128, True), 12, 64, 256),
    "tiny_moe": Shape(_with_experts(_qwen(4, 64, 4, 2, 32, 128, False), 16, 4, 2), 12, 64, 256),
}


def make_batch(shape: Shape) -> Made:
    """Make random tokens with lengths spread evenly up to the longest, so that packing matters."""
    generator = torch.Generator().manual_seed(0)
    step = (shape.longest - 2 * PROMPT) / shape.sequences
    lengths = [2 * PROMPT + int(step * (index + 1)) for index in range(shape.sequences)]
    vocabulary = shape.model_config.vocab_size
    return plain_batch(
        streams={
            "token_ids": [torch.randint(0, vocabulary, (length,), generator=generator) for length in lengths],
            "rollout_log_probs": [-torch.rand(length, generator=generator) for length in lengths],
        },
        prompt_lengths=[PROMPT] * len(lengths),
        advantages=torch.randn(len(lengths), generator=generator).tolist(),
    )


def operations(model_config: ModelConfig, lengths: list[int]) -> float:
    """Return the multiplications and additions of an update, with backward pass, that the model itself requires."""
    # With a causal mask a token attends to half of the sequence on average.
    attention = sum(length * attention_operations(model_config, length / 2) for length in lengths)
    return 3 * (2 * products(model_config) * sum(lengths) + attention)


class Stopwatch:
    """Times on the device's own time line: CUDA events, or on a CPU the process's time, as in `measure.once`."""

    def __init__(self) -> None:
        self.parts: dict[str, list[tuple[Any, Any]]] = {"log_probs": [], "loss": []}

    def now(self) -> Any:
        """Return the present time."""
        if not torch.cuda.is_available():
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, part: str) -> float:
        """Return the sum of a part's spans, after waiting for the device."""
        if not torch.cuda.is_available():
            return sum(end - start for start, end in self.parts[part])
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self.parts[part]) / 1000


def timed_policy(config: Config, model_config: ModelConfig) -> Any:
    """Make a Policy with random weights that records when log-probs and loss begin and end, forward and backward."""
    # Imported here, since the platform has to be set up before Megatron-Core is imported.
    from megatron_fipo.policy.update import Policy

    class TimedPolicy(Policy):
        watch = Stopwatch()

        def label_log_probs(self, micro_batch: MicroBatch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if not torch.is_grad_enabled():
                return super().label_log_probs(micro_batch, logits)
            watch, backward = self.watch, {}
            start = watch.now()
            log_probs, entropy = super().label_log_probs(micro_batch, logits)
            self.reached = watch.now()
            watch.parts["log_probs"].append((start, self.reached))

            def loss_is_through(_: torch.Tensor) -> None:
                backward["loss"] = watch.now()
                watch.parts["loss"].append((self.backward_began, backward["loss"]))

            log_probs.register_hook(loss_is_through)
            logits.register_hook(lambda _: watch.parts["log_probs"].append((backward["loss"], watch.now())))
            return log_probs, entropy

        def policy_loss(self, micro_batch: MicroBatch, logits: torch.Tensor) -> Any:
            result = super().policy_loss(micro_batch, logits)
            self.watch.parts["loss"].append((self.reached, self.watch.now()))

            def backward_begins(_: torch.Tensor) -> None:
                self.backward_began = self.watch.now()

            result[0].register_hook(backward_begins)
            return result

    return TimedPolicy(config, model_config, None, updates=1000)


def configuration(shape: Shape, precision: str, packing: bool, layers: str) -> Config:
    """Return the published algorithm's configuration on one process."""
    return load_config(
        [
            "algorithm=fipo",
            "parallel=single",
            f"parallel.micro_batch_tokens={shape.micro_batch_tokens}",
            f"parallel.packing={packing}",
            "model.dtype=bfloat16",
            f"model.fp8={precision}",
            f"model.layers={layers}",
        ]
    )


def layers_here() -> str:
    """Return model.layers for every row. Without Transformer Engine it is local, and the table's first line says so."""
    return "auto" if find_spec("transformer_engine") or not torch.cuda.is_available() else "local"


def measure(shape: Shape, precision: str, packing: bool) -> dict[str, float]:
    """Measure one row in this process."""
    platform.install()
    from megatron_fipo.policy.feed import made_alike
    from megatron_fipo.policy.model import start_model_parallel

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    platform.start_process_group(60)
    config = configuration(shape, precision, packing, layers_here())
    start_model_parallel(config.parallel, 0)
    policy = timed_policy(config, shape.model_config)
    batch, store = make_batch(shape)
    (mini_batch,) = made_alike(policy, batch, store)
    (old,) = policy.log_probs([mini_batch]).streams
    for _ in range(WARM_UP):
        policy.update(mini_batch, old)
    policy.watch.parts = {name: [] for name in policy.watch.parts}
    times = [once(lambda: policy.update(mini_batch, old)) for _ in range(REPEATS)]
    slots = sum(micro_batch.position_ids.numel() for micro_batch in mini_batch)
    lengths = [length - 1 for length in batch.lengths]  # the last token of a sequence is only a label
    result = {
        "seconds": statistics.median(times),
        "tokens": sum(lengths),
        "padding": 1 - sum(lengths) / slots,
        "operations": operations(shape.model_config, lengths),
        "log_probs": policy.watch.seconds("log_probs") / sum(times),
        "loss": policy.watch.seconds("loss") / sum(times),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
    }
    platform.stop_process_group()
    return result


def measure_apart(name: str, layers: int, precision: str, packing: bool) -> dict[str, float] | str:
    """Measure one row in a separate process. Return the last line of its output if it failed."""
    row = json.dumps({"name": name, "layers": layers, "precision": precision, "packing": packing})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.policy", "--row", row],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines() or [f"exit code {done.returncode}"]
    results = [line for line in lines if line.startswith(RESULT)]
    return json.loads(results[-1].removeprefix(RESULT)) if results else lines[-1][:300]


def versions() -> str:
    """Return the versions of the packages, besides torch, that determine the speed."""
    from megatron.core.utils import get_te_version

    engine = get_te_version()
    return f"Transformer Engine {engine}" if engine else "no Transformer Engine"


def print_row(label: str, found: dict[str, float] | str, peak_tflops: float | None) -> str | None:
    """Print one row of the table, or return a note if there is no result."""
    if isinstance(found, str):
        return f"{label.replace(' |', ',')}: not run: {found}"
    rate = found["operations"] / found["seconds"] / 1e12
    cells = [
        label,
        f"{found['tokens'] / found['seconds']:.0f}",
        f"{rate:.2f}",
        f"{100 * rate / peak_tflops:.0f} %" if peak_tflops else "–",
        *(f"{100 * found[name]:.1f} %" for name in ("padding", "log_probs", "loss")),
        f"{found['peak_gib']:.1f}" if found["peak_gib"] else "–",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)
    return None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["1.5b", "7b"])
    parser.add_argument("--layers", type=int, help="layers of the model, instead of the shape's own")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="model.fp8")
    parser.add_argument("--hardware", default="h100", help="file in conf/hardware with the bf16 peak for MFU")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Megatron-Core warns about packages that it would prefer to have installed.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    if options.row:
        try:
            print(RESULT + json.dumps(_measure_row(**json.loads(options.row))))
        except FipoError as error:
            sys.exit(str(error))
        return
    peak = load_config([f"hardware={options.hardware}"]).hardware.bf16_tflops if torch.cuda.is_available() else None
    print(f"{machine()}; {versions()}; MFU of {options.hardware}'s bf16 peak\n")
    print("| shape | FP8 | rows | tokens/s | TFLOP/s | MFU | padding | log-probs | credit and loss | peak, GiB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    notes = []
    for name in options.shape:
        layers = options.layers or SHAPES[name].model_config.num_layers
        for precision in options.precision:
            for packing in (True, False):
                label = f"{name}, {layers} layers | {precision} | {'packed' if packing else 'padded'}"
                note = print_row(label, measure_apart(name, layers, precision, packing), peak)
                notes += [note] if note else []
    print("\n" + "\n".join(notes))


def _measure_row(name: str, layers: int, precision: str, packing: bool) -> dict[str, float]:
    shape = SHAPES[name]
    model_config = with_layers(shape.model_config, layers)
    return measure(dataclasses.replace(shape, model_config=model_config), precision, packing)


if __name__ == "__main__":
    main()
