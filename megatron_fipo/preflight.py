"""Check what a run will need, before it starts: `python -m megatron_fipo.preflight experiment=fipo_32b hardware=h200`.

This needs one CPU, no GPU and no weights. It builds one rank of every pipeline stage as the run will build it. It
compares the parameters and their Hugging Face names with the weight plan and with transformers' own model. It estimates
memory and time, prints tables, and writes preflight.json into the run's directory. It exits with 3 if the run does not
fit.
"""

import dataclasses
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from megatron_fipo.config import Config
from megatron_fipo.config.checks import check
from megatron_fipo.config.configure import run_with_config
from megatron_fipo.errors import WeightError
from megatron_fipo.files import write_json_atomically
from megatron_fipo.launch.site import site_file, site_problems, site_values
from megatron_fipo.models.costs import active_parameters, parameter_counts
from megatron_fipo.models.model_config import ModelConfig, read_architecture
from megatron_fipo.planning.search import as_configured, plan_ways
from megatron_fipo.planning.shown import assumptions, busy_warning, faster, predicted
from megatron_fipo.simulation.command import settings_of
from megatron_fipo.simulation.options import parse
from megatron_fipo.sizing.estimate import (
    Estimate,
    estimate,
    model_directory,
    one_node,
    remedies,
    trainer_world_size,
)
from megatron_fipo.sizing.memory import GIB, longest_sequence, micro_batch_tokens
from megatron_fipo.sizing.placement import notes, servers_text
from megatron_fipo.sizing.timing import model_bytes
from megatron_fipo.tracking.console_table import duration
from megatron_fipo.weights.formats import is_checkpoint
from megatron_fipo.weights.plan import parameters_per_rank, plan

if TYPE_CHECKING:
    from megatron_fipo.sizing.meta_ranks import BuiltStage

USAGE = """usage: megatron-fipo preflight [GROUP=CHOICE ...] [SECTION.KEY=VALUE ...]

Check what a run will need, before it starts, on one CPU, without GPU and weights. The keys are those of the run.

  hardware=h200                 the GPUs: a100, h100, h200, gh200, b200, gb200
  cluster.trainer_nodes=4       nodes that train; cluster.rollout_nodes: nodes that sample
  cluster.gpus_per_node=4       GPUs per node

Prints memory and time, and writes preflight.json into run.directory. Exits with 3 if the run does not fit.

examples:
  megatron-fipo preflight experiment=fipo_32b hardware=h200
  megatron-fipo preflight experiment=fipo_7b cluster.gpus_per_node=4
  megatron-fipo preflight --help cluster          what the keys of a section mean

docs/cluster.md explains the estimate and how exact it is."""
DOES_NOT_FIT = 3
_FASTER = 2
"""Number of changes that are shown if the run already fits: the fastest ones."""
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.gguf")
"""Files that show that a directory has weights. The last two kinds cannot be read."""
_COLUMNS = ("weights", "gradients", "optimizer", "activations", "logits", "working", "refit", "server", "total")
_MEANINGS = {
    "activations": "kept for the backward pass, for all micro-batches in flight",
    "working": "additional memory of one layer's backward pass",
    "refit": "buffers of a weight update to the servers, beside the weights of a server on the same GPU",
    "server": "a server on the same GPU while it samples; it sleeps during updates",
    "total": "the peak: the largest of an update, a refit and a server, with what else is on the GPU then",
}
"""Explanations of the columns whose names are not clear."""


def main(config: Config) -> None:
    """Check, estimate, print, and write preflight.json. SystemExit with DOES_NOT_FIT if the memory is too small."""
    warnings.simplefilter("ignore")  # from libraries, about packages that could be installed
    check(config, world_size=trainer_world_size(config), local=False)
    check_site(config)
    directory, is_copy = model_directory(config.model.path)
    model_config = read_architecture(directory)
    _check_stored_weights(directory, model_config)
    result = estimate(config, model_config)
    counted = verify_weights(config, model_config, directory, result.world_size)
    leaves_its_node = config.parallel.tensor > config.cluster.gpus_per_node
    changes = remedies(config, model_config) if leaves_its_node or result.tight or not result.fits else []
    if result.fits and not result.tight:
        changes = changes[:_FASTER]  # these changes save time, not memory
    console = Console(width=None if sys.stdout.isatty() else 120)
    if is_copy:
        console.print(f"model: {config.model.path} is not here; its published configuration is used", soft_wrap=True)
    _print(console, config, model_config, result, counted, changes)
    _print_one_node(console, config, model_config, result)
    simulated = _print_simulated(console, config, model_config) if result.fits else None
    report = result.to_dict() | {
        "experiment": config.run.name,
        "hardware": dataclasses.asdict(config.hardware),
        "cluster": dataclasses.asdict(config.cluster),
        "parallel": dataclasses.asdict(config.parallel),
        "weights": counted,
        "remedies": changes,
        "simulated": simulated,
    }
    path = Path(config.run.directory) / "preflight.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(path, report)
    console.print(f"written to {path}", soft_wrap=True)
    if not result.fits:
        raise SystemExit(DOES_NOT_FIT)


def check_site(config: Config) -> None:
    """On a login node, raise ConfigError for the site's first wrong setting. Warn if its GPUs differ from the run's."""
    path = site_file()
    if path is None or shutil.which("sbatch") is None or "SLURM_JOB_ID" in os.environ:
        return
    for problem in site_problems(path):
        raise problem
    gpus = site_values(path).get("FIPO_GPUS_PER_NODE", str(config.cluster.gpus_per_node))
    if int(gpus) != config.cluster.gpus_per_node:
        here = config.cluster.gpus_per_node
        print(f"warning: {path} has {gpus} GPUs per node, not {here}: cluster.gpus_per_node={gpus}", file=sys.stderr)


def _check_stored_weights(directory: Path, model_config: ModelConfig) -> None:
    """Check the stored weights, if they are on this machine, as training does before it builds the model."""
    # Imported here, since it imports torch: a refused configuration should not wait for that.
    from megatron_fipo.weights.source import check_source

    if is_checkpoint(directory) or any(next(directory.glob(pattern), None) for pattern in _WEIGHT_FILES):
        check_source(directory, model_config)


def verify_weights(config: Config, model_config: ModelConfig, model_dir: Path, world_size: int) -> dict[str, Any]:
    """Build every stage, and compare the weight plan with it and with transformers' model, tensor by tensor.

    Returns:
        Numbers of the comparison: parameters of the model and of one rank of each stage, Hugging Face tensors.

    Raises:
        WeightError: the plan is not a bijection with Hugging Face's names, or a stage has other parameters than
            planned.
    """
    # This comes first: building a policy's ranks changes how tensors are created in this process.
    expected = _transformers_shapes(model_dir)
    from megatron_fipo.sizing.meta_ranks import build_stages

    parallel = config.parallel
    built = build_stages(config, model_config, world_size)
    layout = (parallel.tensor, parallel.pipeline, parallel.virtual_pipeline)
    experts = {"expert_parallel_size": parallel.expert, "expert_tensor_parallel_size": parallel.expert_tensor}
    planned = parameters_per_rank(plan(model_config, *layout, **experts))
    problems = [
        f"pipeline stage {stage.stage} holds {stage.parameters} parameters, planned are {planned[stage.stage]}"
        for stage in built
        if stage.parameters != planned[stage.stage]
    ]
    problems += _name_problems(built, expected)
    if problems:
        raise WeightError("\n  ".join(["the weights do not fit the model:", *problems]))
    return {
        "parameters": parameter_counts(model_config)[0],
        "active": active_parameters(model_config),
        "huggingface_tensors": len(expected),
        "stages": [{"stage": stage.stage, "rank": stage.rank, "parameters": stage.parameters} for stage in built],
    }


def _transformers_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the model's parameters as transformers builds it, independently of our tables."""
    import torch

    from megatron_fipo.weights.transformers_model import refused, transformers_config

    settings = transformers_config(model_dir)
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
    except Exception as error:
        raise refused(model_dir, error) from error
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return dict(pair for name, shape in shapes.items() for pair in _stored_shapes(name, shape, settings.model_type))


def _stored_shapes(name: str, shape: tuple[int, ...], model_type: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield a parameter as files name it: transformers joins a layer's experts in memory, and renames Mixtral's."""
    parts = ("gate_proj", "up_proj", "down_proj")
    if model_type == "mixtral":
        name, parts = name.replace(".mlp.", ".block_sparse_moe."), ("w1", "w3", "w2")
    prefix, _, joined = name.rpartition(".")
    if not prefix.endswith(".experts"):
        yield name, shape
        return
    for expert in range(shape[0]):
        if joined == "gate_up_proj":
            yield from ((f"{prefix}.{expert}.{part}.weight", (shape[1] // 2, shape[2])) for part in parts[:2])
        else:
            yield f"{prefix}.{expert}.{parts[2]}.weight", shape[1:]


def _name_problems(built: "list[BuiltStage]", expected: dict[str, tuple[int, ...]]) -> list[str]:
    problems, found = [], {}
    for stage in built:
        for tensor in stage.exported:
            if tensor.name in found:
                problems.append(f"{tensor.name}: sent by two pipeline stages")
            found[tensor.name] = tensor.shape
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            sent, wanted = found.get(name, "nothing"), expected.get(name, "nothing")
            problems.append(f"{name}: {sent} is sent, {wanted} in transformers")
    return problems


def _print(
    console: Console,
    config: Config,
    model_config: ModelConfig,
    result: Estimate,
    counted: dict[str, Any],
    changes: list[str],
) -> None:
    parallel = config.parallel
    layout = f"tensor {parallel.tensor} × pipeline {parallel.pipeline}"
    if parallel.virtual_pipeline:
        layout += f" ({parallel.virtual_pipeline} chunks per stage)"
    layout += f" × context {parallel.context} × data {result.data_parallel_size}"
    active = ""
    if model_config.experts is not None:
        active = f", {counted['active'] / 1e9:.2f} B of them active"
        layout += f", experts over {parallel.expert} × {parallel.expert_tensor}"
    console.print(
        f"{config.run.name}: {counted['parameters'] / 1e9:.2f} B parameters{active}, {layout} = {result.world_size} "
        f"trainer GPUs ({config.hardware.name}), {servers_text(config)}",
        soft_wrap=True,
    )
    for note in notes(config, model_config, result.world_size, result.data_parallel_size):
        console.print(f"warning: {note}", soft_wrap=True)
    console.print(
        f"weights: {counted['huggingface_tensors']} Hugging Face tensors, each sent by exactly one pipeline stage; "
        f"names and shapes as transformers has them",
        soft_wrap=True,
    )
    _print_memory(console, config, result, counted)
    verdict = "fits TIGHTLY" if result.tight else "fits" if result.fits else "DOES NOT FIT"
    left = (result.usable_bytes - result.fullest.total) / GIB
    room = f"{left:.1f} GiB left" if result.fits else f"{-left:.1f} GiB too much"
    console.print(
        f"{verdict}: pipeline stage {result.fullest.stage} is the fullest, {result.fullest.total / GIB:.1f} of "
        f"{result.usable_bytes / GIB:.1f} GiB (a GPU's {config.hardware.memory_gib:g} less hardware.reserved_gib="
        f"{config.hardware.reserved_gib:g}), {room}",
        soft_wrap=True,
    )
    for change in changes:
        console.print(f"  {'fits too' if result.fits else 'would fit'} with {change}", soft_wrap=True)
    if not result.fits and not changes:
        console.print("  no single change makes it fit; megatron-fipo planner looks at all layouts")
    _print_time(console, config, model_config, result)


def _print_one_node(console: Console, config: Config, model_config: ModelConfig, result: Estimate) -> None:
    """Print the same recipe on one node, if it uses several nodes or does not fit."""
    several = result.world_size > config.cluster.gpus_per_node or config.cluster.rollout_nodes
    if (not several and result.fits) or (found := one_node(config, model_config)) is None:
        return
    overrides, alone = found
    console.print(
        f"on one node of {config.cluster.gpus_per_node} GPUs: {overrides}\n"
        f"  peak {alone.fullest.total / GIB:.1f} GiB, step {alone.time.total:,.0f} s instead of "
        f"{result.time.total:,.0f} s",
        soft_wrap=True,
    )


def _print_simulated(console: Console, config: Config, model_config: ModelConfig) -> dict[str, Any]:
    """Print what the run comes to with its waits, and warn if another way to spread it is clearly faster."""
    settings = settings_of(parse([]), config)
    own = as_configured(config, model_config, settings)
    console.print(f"simulated, with {assumptions(settings)}: {predicted(own)}", soft_wrap=True)
    several = config.cluster.trainer_nodes + config.cluster.rollout_nodes > 1
    better = faster(config, own, plan_ways(config, model_config, settings)) if several else None
    for warning in filter(None, (busy_warning(own), better)):
        console.print(f"warning: {warning}", soft_wrap=True)
    names = (
        "step_s",
        "tokens_per_gpu_s",
        "trainer_idle",
        "engines_idle",
        "lag_mean",
        "lag_max",
        "rollout_process_busy",
    )
    return {name: getattr(own, name) for name in names} | {"faster": better}


def _print_memory(console: Console, config: Config, result: Estimate, counted: dict[str, Any]) -> None:
    columns = [name for name in _COLUMNS if name != "server" or any(stage.server for stage in result.stages)]
    table = Table(title="Memory of each GPU, in GiB", title_justify="left")
    for name in ("stage", "first rank", "parameters", *columns):
        table.add_column(name, justify="right")
    for stage, built in zip(result.stages, counted["stages"], strict=True):
        sizes = [f"{getattr(stage, name) / GIB:.2f}" for name in columns]
        table.add_row(str(stage.stage), str(built["rank"]), f"{stage.parameters / 1e6:,.1f} M", *sizes)
    console.print(table)
    for name, meaning in _MEANINGS.items():
        if name in columns:
            console.print(f"  {name + ':':<13}{meaning}", style="dim", soft_wrap=True)
    if away := result.host_bytes - result.routes_bytes:
        console.print(
            "  Trainer and servers use the GPUs in turns: weights and optimizer state are in host memory while servers "
            f"sample, and servers' weights while they sleep, {away / GIB:.0f} GiB per node.",
            style="dim",
            soft_wrap=True,
        )
    if result.routes_bytes:
        console.print(
            "  Choices of routers that updates replay are in host memory: up to "
            f"{result.routes_bytes / GIB:.1f} GiB per node (algorithm.router_replay).",
            style="dim",
            soft_wrap=True,
        )
    console.print(
        f"  A micro-batch has up to {micro_batch_tokens(config):,} tokens (parallel.micro_batch_tokens); the longest "
        f"sequence has {longest_sequence(config):,}.",
        style="dim",
        soft_wrap=True,
    )


def _print_time(console: Console, config: Config, model_config: ModelConfig, result: Estimate) -> None:
    time = result.time
    seconds = {
        "sample": time.sample,
        "log-probs": time.log_probs,
        "update": time.update,
        "weights": time.weights,
        **({"copies": time.turns} if time.turns else {}),
        "whole step": time.total,
        "longest step": time.longest,
    }
    table = Table(title="Seconds per step, estimated", title_justify="left")
    for name in seconds:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:,.1f}" for value in seconds.values()))
    console.print(table)
    for line in (
        f"Responses are assumed to have half the maximum length. {config.run.steps:,} steps take "
        f"{_days(config.run.steps * time.total)}, without validation.",
        f"log-probs and update: {time.micro_batches} micro-batches per update; stages wait {time.bubble:.1%} of it for "
        "each other.",
        *(["copies: between GPUs and hosts, for trainer and servers in turns."] if time.turns else []),
        f"weights: {model_bytes(config, model_config) / GIB:.1f} GiB go to each server after every step.",
        "longest step: "
        + (
            "a stop waits for no sample."
            if time.overlaps
            else "dynamic sampling has no groups left over and samples whole batches."
        )
        + " A job needs this much time between the request to stop and its time limit.",
    ):
        console.print(f"  {line}", style="dim", soft_wrap=True)


def _days(seconds: float) -> str:
    return f"{seconds / 86400:.1f} days" if seconds >= 2 * 86400 else duration(seconds)


if __name__ == "__main__":
    run_with_config(main, local=False, usage=USAGE)
