"""Convert a model between a Hugging Face directory and a Megatron-Core distributed checkpoint.

    python tools/convert_hf.py to-hf runs/my-run/checkpoints/step-000100 my-model --verify
    python tools/convert_hf.py to-megatron Qwen2.5-7B my-checkpoint --dtype bfloat16
    python tools/convert_hf.py plan Qwen2.5-7B --tensor 2 --pipeline 2 --servers 2 --server-tensor 2

to-hf reads a checkpoint of any parallel layout, also of a training run. to-megatron writes only the model, without
optimizer state. Any layout can load it: model.path=my-checkpoint starts a run from it. plan writes nothing. It prints
the source and the destination of each tensor in a live weight update.

Only one parameter is in memory at a time. A conversion that fails leaves nothing behind. If a conversion was killed,
the same command continues it. Until it is done, there is only a hidden directory beside the target.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fipo.errors import ConfigError, FipoError, WeightError
from megatron_fipo.exporting.progress import progress_bar
from megatron_fipo.models.model_config import ModelConfig, read_architecture
from megatron_fipo.weights.transfer_plan import format_transfers, plan_transfers, transfer_plan

if TYPE_CHECKING:
    import torch
    from megatron.core.models.gpt import GPTModel

DTYPES = ("float32", "bfloat16", "float16")


def main() -> int:
    """Parse and run the command line. Return 0, or the exit code of the error."""
    arguments = parse_arguments()
    warnings.simplefilter("ignore")  # deprecations inside libraries that a user cannot act on
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        if arguments.command == "plan":
            print_plan(arguments)
        else:
            convert(arguments)
    except FipoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="distributed checkpoint → Hugging Face directory")
    to_megatron = commands.add_parser("to-megatron", help="Hugging Face directory → distributed checkpoint")
    for command in (to_hf, to_megatron):
        command.add_argument("source", type=Path)
        command.add_argument("target", type=Path, help="a new directory, or an empty one")
        command.add_argument("--dtype", choices=DTYPES, help="type of the weights written (default: the source's)")
        command.add_argument(
            "--verify",
            nargs="?",
            const="logits",
            choices=("tensors", "logits"),
            help="read the target again. tensors: compare every bit with the source; logits, the default: also run the "
            "whole model in Megatron-Core and in transformers, which takes the memory of one model in fp32",
        )
    to_hf.add_argument("--model", type=Path, help="directory with configuration and tokenizer (default: SOURCE)")
    to_hf.add_argument("--max-shard-mib", type=int, default=4096, help="largest file of weights, in MiB (default 4096)")
    plan = commands.add_parser("plan", help="print the source and destination of each tensor in a live weight update")
    plan.add_argument("model", type=Path, help="Hugging Face directory; its config.json is enough")
    for name, default, text in (
        ("tensor", 1, "the trainer's tensor-parallel size"),
        ("pipeline", 1, "its pipeline-parallel size"),
        ("virtual-pipeline", None, "its model chunks per stage"),
        ("expert", 1, "its expert-parallel size"),
        ("expert-tensor", 1, "its experts' tensor-parallel size"),
        ("replicas", 1, "its data-parallel times its context-parallel size"),
        ("servers", 1, "number of vLLM servers"),
        ("server-tensor", 1, "their tensor-parallel size"),
    ):
        plan.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default {default})")
    plan.add_argument(
        "--server-experts", action="store_true", help="servers deal experts to their workers (rollout.expert_parallel)"
    )
    plan.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="the policy's type (default bfloat16)")
    return parser.parse_args()


def print_plan(arguments: argparse.Namespace) -> None:
    """Print every tensor of a live weight update with bytes, source ranks and destinations, then the sums by rank."""
    bytes_per_value = 4 if arguments.dtype == "float32" else 2
    model_config = read_architecture(arguments.model)
    check_layout(model_config, arguments)
    plan = transfer_plan(
        model_config,
        tensor_parallel_size=arguments.tensor,
        pipeline_parallel_size=arguments.pipeline,
        virtual_pipeline_parallel_size=arguments.virtual_pipeline,
        expert_parallel_size=arguments.expert,
        expert_tensor_parallel_size=arguments.expert_tensor,
        replicas=arguments.replicas,
        bytes_per_value=bytes_per_value,
    )
    transfers = plan_transfers(
        plan,
        servers=arguments.servers,
        server_tensor_parallel_size=arguments.server_tensor,
        server_experts=model_config.dimension("experts") if arguments.server_experts else None,
        bytes_per_value=bytes_per_value,
    )
    for line in format_transfers(transfers):
        print(line)


def check_layout(model_config: ModelConfig, arguments: argparse.Namespace) -> None:
    """Raise ConfigError if experts do not divide the ranks of a stage, or servers deal what a model has not."""
    ranks, size = arguments.tensor * arguments.replicas, arguments.expert * arguments.expert_tensor
    if ranks % size:
        raise ConfigError(
            "--expert",
            f"--expert × --expert-tensor is {size}, which does not divide --tensor × --replicas = {ranks}",
            "a divisor",
        )
    if arguments.server_experts and model_config.experts is None:
        raise ConfigError("--server-experts", "the model has no experts", "leave it out")


def convert(arguments: argparse.Namespace) -> None:
    """Convert, verify if requested, and print what was done."""
    import torch

    from megatron_fipo.data.text_files import complete_text_files
    from megatron_fipo.weights import conversion

    source, target = arguments.source, arguments.target
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    with progress_bar(f"{source.name} → {target.name}") as progress:
        if arguments.command == "to-hf":
            model_dir = arguments.model or source
            if not (model_dir / "config.json").exists():
                raise WeightError(f"{model_dir} has no config.json; name the model's directory with --model")
            shard_bytes = arguments.max_shard_mib << 20
            done = conversion.to_huggingface(
                source,
                target,
                model_dir,
                dtype=dtype,
                max_shard_bytes=shard_bytes,
                progress=progress,
                complete=complete_text_files,
            )
        else:
            done = conversion.to_megatron(source, target, dtype=dtype, progress=progress)
    if done.not_finite:
        listing = "; ".join(f"{count} in {name}" for name, count in done.not_finite.items())
        count = sum(done.not_finite.values())
        logging.warning("%d NaN or infinite values were converted as they are: %s", count, listing)
    earlier = f", {done.taken_up} bytes of them by an earlier call" if done.taken_up else ""
    print(f"{source} → {target}: {done.tensors} tensors, {done.bytes} bytes{earlier}")
    if arguments.verify:
        checkpoint, directory = (source, target) if arguments.command == "to-hf" else (target, source)
        verify(checkpoint, directory, dtype, with_logits=arguments.verify == "logits")


def verify(checkpoint: Path, directory: Path, dtype: "torch.dtype | None", *, with_logits: bool) -> None:
    """Compare the written tensors with the source. WeightError, naming the tensors, if they differ."""
    from megatron_fipo.weights.conversion import differences

    if different := differences(checkpoint, directory, dtype):
        raise WeightError(f"verification failed: {len(different)} tensors differ: {', '.join(different)}")
    print("verified: every tensor is equal, bit for bit")
    if with_logits:
        gap, allowed = logits_difference(checkpoint, directory, dtype)
        print(
            f"verified: logits of Megatron-Core and transformers differ by {gap:.3g} at most, in fp32, at positions "
            f"over the whole context ({allowed:.3g} allowed)"
        )


def logits_difference(checkpoint: Path, directory: Path, dtype: "torch.dtype | None") -> tuple[float, float]:
    """Return the largest difference between logits of random tokens, and the allowed one. WeightError if it is larger.

    transformers loads the directory, and then Megatron-Core loads the checkpoint, each by its own code.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before Megatron-Core is imported
    from transformers import AutoModelForCausalLM

    from megatron_fipo.policy.probe import check_traces, megatron_trace, probes, transformers_trace
    from megatron_fipo.weights.transformers_model import refused

    model_config = read_architecture(directory)
    made = probes(model_config, model_config.max_position_embeddings)
    asked = [(probe.tokens(model_config.vocab_size), probe.positions) for probe in made]
    try:
        network = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype or "auto").float().eval()
    except Exception as error:
        raise refused(directory, error) from error
    expected = [transformers_trace(network, *probe) for probe in asked]
    del network
    with megatron_model(checkpoint, model_config) as model:
        found = [megatron_trace(model, *probe) for probe in asked]
    try:
        return check_traces(found, expected, made)
    except WeightError as error:
        raise WeightError(f"verification failed: {error}") from None


@contextmanager
def megatron_model(checkpoint: Path, model_config: ModelConfig) -> "Iterator[GPTModel]":
    """Provide the whole model of a checkpoint in fp32, loaded as in a training run."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    from megatron.core import dist_checkpointing

    from megatron_fipo.config import Config
    from megatron_fipo.policy import platform
    from megatron_fipo.policy.checkpoint import check_version
    from megatron_fipo.policy.model import build_model, start_model_parallel
    from megatron_fipo.policy.plain_resume import plain_data_only

    check_version(checkpoint)
    config = Config()
    config.model.layers, config.model.dtype = "local", "float32"
    platform.start_process_group(timeout_s=600)
    try:
        start_model_parallel(config.parallel, seed=0)
        model = build_model(config, model_config)[0].eval()
        with plain_data_only():
            loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(checkpoint))
        model.load_state_dict(loaded["model"])
        yield model
    finally:
        platform.stop_process_group()


if __name__ == "__main__":
    sys.exit(main())
