"""Convert a model between a Hugging Face directory and a Megatron-Core distributed checkpoint.

    python tools/convert_hf.py to-hf runs/my-run/checkpoints/step-000100 my-model --model Qwen2.5-7B
    python tools/convert_hf.py to-megatron Qwen2.5-7B my-checkpoint

to-hf reads a checkpoint that any parallel layout wrote, a training run's too, and takes configuration and tokenizer
from --model, the directory that the run started from. to-megatron writes the model alone, without optimizer state, for
any layout to load. Values keep their type. Both run in one process on the CPU and hold the whole model in memory.
"""

import argparse
import logging
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fipo.errors import FipoError, WeightError
from megatron_fipo.weights.architectures import Geometry, read_architecture

if TYPE_CHECKING:
    import torch
    from megatron.core.models.gpt import GPTModel

EMBEDDING = "embedding.word_embeddings.weight"


def main() -> int:
    """Parse the command line and convert; 0, or the exit code of the error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="distributed checkpoint → Hugging Face directory")
    to_megatron = commands.add_parser("to-megatron", help="Hugging Face directory → distributed checkpoint")
    for command in (to_hf, to_megatron):
        command.add_argument("source", type=Path)
        command.add_argument("target", type=Path, help="a new directory, or an empty one")
    to_hf.add_argument("--model", type=Path, required=True, help="directory with configuration and tokenizer")
    to_hf.add_argument("--max-shard-mib", type=int, default=4096, help="largest file of weights, in MiB (default 4096)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # deprecations inside Megatron-Core that a user cannot act on
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        start_single_process()
        if arguments.command == "to-hf":
            convert_to_hf(arguments.source, arguments.target, arguments.model, arguments.max_shard_mib << 20)
        else:
            convert_to_megatron(arguments.source, arguments.target)
    except FipoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments.source} → {arguments.target}")
    return 0


def convert_to_hf(source: Path, target: Path, model_dir: Path, max_shard_bytes: int) -> None:
    """Write the model of a distributed checkpoint as a Hugging Face directory."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    from megatron_fipo.weights.reshard import save_huggingface

    geometry = read_architecture(model_dir)
    try:
        stored = dist_checkpointing.load_tensors_metadata(str(source))
    except (CheckpointingException, OSError, ValueError) as error:
        raise WeightError(f"{source} is not a distributed checkpoint, or is damaged: {error}") from error
    if EMBEDDING not in stored:
        raise WeightError(f"{source} holds no {EMBEDDING}: it is not a checkpoint of a language model")
    model = build(geometry, stored[EMBEDDING].dtype)
    check_checkpoint(stored, model.sharded_state_dict(), geometry, source)
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(source))
    model.load_state_dict(loaded["model"])
    save_huggingface([model], geometry, model_dir, target, max_shard_bytes)


def check_checkpoint(stored: dict[str, Any], wanted: dict[str, Any], geometry: Geometry, source: Path) -> None:
    """Refuse, with a WeightError that names every tensor, a checkpoint of another model than the configuration's."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    apply_factories(wanted)
    expected = {tensor.key: tensor for tensor in nested_values(wanted) if isinstance(tensor, ShardedTensor)}
    groups = geometry.num_query_groups
    # The run's tensor-parallel size is unknown, but it divides the groups, and decides how the vocabulary was padded.
    vocab_sizes = {geometry.padded_vocab_size(size) for size in range(1, groups + 1) if groups % size == 0}
    problems = [f"{name}: missing" for name in expected if name not in stored]
    for name, tensor in stored.items():
        if name in expected:
            shape, right = tuple(tensor.global_shape), tuple(expected[name].global_shape)
            padded = expected[name].allow_shape_mismatch and shape[0] in vocab_sizes and shape[1:] == right[1:]
            if shape != right and not padded:
                problems.append(f"{name}: {shape} in the checkpoint, {right} by the configuration")
        elif not name.startswith("optimizer."):
            problems.append(f"{name}: left over, shape {tuple(tensor.global_shape)}")
    if problems:
        raise WeightError("\n  ".join([f"{source} is of another model:", *problems]))


def convert_to_megatron(source: Path, target: Path) -> None:
    """Write the model of a Hugging Face directory as a distributed checkpoint, which appears complete or not at all."""
    from megatron.core import dist_checkpointing

    from megatron_fipo.weights.huggingface import HuggingFaceReader
    from megatron_fipo.weights.reshard import load_into

    geometry = read_architecture(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WeightError(f"{target} exists and is not empty; choose a new directory")
    with HuggingFaceReader(source) as reader:
        dtypes = {info.dtype for info in reader.tensors.values()}
    if len(dtypes) > 1:
        raise WeightError(f"{source} mixes the types {', '.join(sorted(map(str, dtypes)))}; save it in one first")
    model = build(geometry, dtypes.pop())
    load_into([model], source, geometry)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        dist_checkpointing.save({"model": model.sharded_state_dict()}, str(staging))
        staging.chmod(0o755)
        staging.rename(target)
    except OSError as error:
        raise WeightError(f"{target} could not be written: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def start_single_process() -> None:
    """Start Megatron-Core's parallel state for one process on the CPU."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_fipo.policy import platform
    from megatron_fipo.policy.model import start_model_parallel

    platform.start_process_group(timeout_s=600)
    start_model_parallel(configuration().parallel, seed=0)


def build(geometry: Geometry, dtype: "torch.dtype") -> "GPTModel":
    """The whole model on this process, its weights not yet set."""
    from megatron_fipo.policy.model import build_model

    config = configuration()
    config.model.dtype = str(dtype).removeprefix("torch.")
    return build_model(config, geometry)[0]


def configuration() -> Any:
    """One process, the local layers: their checkpoints and Transformer Engine's have the same names."""
    from megatron_fipo.config import Config

    config = Config()
    config.model.layers = "local"
    return config


if __name__ == "__main__":
    sys.exit(main())
