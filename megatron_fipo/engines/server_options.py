"""How a vLLM server is started for a `RolloutConfig`: its command-line options, its environment, its GPUs."""

import json
import os
from pathlib import Path

import megatron_fipo
from megatron_fipo.config import RolloutConfig
from megatron_fipo.config.checks_machine import has_cuda_driver
from megatron_fipo.errors import ConfigError
from megatron_fipo.weights.formats import is_checkpoint

CPU_BATCHED_TOKENS = 8192
"""Prompt tokens that a CPU server processes at once; vLLM's default there, 2048, cuts up small batches already."""

TRAINER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "TORCHDYNAMO_DISABLE",
)
"""What a launcher or a test tells the trainer about itself: a server would take it as its own."""


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def server_arguments(
    config: RolloutConfig,
    model_dir: Path,
    seed: int,
    max_position_embeddings: int | None = None,
    *,
    returns_routes: bool = False,
) -> list[str]:
    """Options of `python -m megatron_fipo.engines.server`, but for its host and port.

    `returns_routes`: requests may ask for the experts that tokens go to.
    """
    longest = config.max_prompt_length + config.max_response_length
    arguments = [
        f"--model={model_dir}",
        "--generation-config=vllm",
        f"--dtype={config.dtype}",
        f"--max-model-len={longest}",
        f"--max-num-seqs={config.max_num_seqs}",
        f"--tensor-parallel-size={config.tensor_parallel}",
        f"--logprobs-mode={config.logprobs_mode}",
        "--enable-prefix-caching",
        f"--seed={seed}",
        f"--weight-transfer-config={json.dumps({'backend': config.weight_transfer})}",
        # A Mistral's directory has it all once more in Mistral's own format, which vLLM would follow and we do not.
        "--config-format=hf",
        "--tokenizer-mode=hf",
        # From a checkpoint, whose weights vLLM cannot read, made-up ones: a run pushes its own before it samples.
        f"--load-format={'dummy' if is_checkpoint(model_dir) else 'safetensors'}",
    ]
    if config.quantization is not None:
        # A router's choice would change by its own rounding. vLLM leaves the routers of some models out by itself.
        routers = {"ignore": [r"re:.*mlp\.gate$"]}
        arguments += [f"--quantization={config.quantization}", f"--quantization-config={json.dumps(routers)}"]
    if gpus():
        arguments.append(f"--gpu-memory-utilization={config.gpu_memory_utilization}")
        if config.shared_gpu:
            arguments.append("--enable-sleep-mode")
    else:
        # After a prompt processed in parts vLLM winds a seeded request's generator back, which a CPU one cannot.
        arguments += ["--no-enable-chunked-prefill", f"--max-num-batched-tokens={max(longest, CPU_BATCHED_TOKENS)}"]
    if config.expert_parallel:
        arguments.append("--enable-expert-parallel")
    if returns_routes:
        arguments.append("--enable-return-routed-experts")
    if config.enforce_eager:
        arguments.append("--enforce-eager")
    if max_position_embeddings is not None:
        arguments.append(f"--hf-overrides={json.dumps({'max_position_embeddings': max_position_embeddings})}")
    return arguments


def server_environment(config: RolloutConfig, devices: list[str] | None) -> dict[str, str]:
    """The environment of a server on the GPUs named in `devices`, or on the CPU. Without its token."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in TRAINER_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    # The server has to import this package wherever the run's working directory is.
    package_parent = str(Path(megatron_fipo.__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH", "")]))
    environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        if config.shared_gpu:
            # Set for the trainer, perhaps; vLLM's sleeping memory pool cannot live with expandable segments.
            for name in ALLOCATOR_VARIABLES:
                environment.pop(name, None)
    else:
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": str(config.cpu_kv_cache_gib),
            # vLLM's own binding of threads to cores fails where there are fewer cores than workers.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(config.cpu_threads),
        }
        if config.enforce_eager:
            # vLLM compiles a comparison of its sampler all the same: seconds of a run's first step, for no speed.
            environment["TORCHDYNAMO_DISABLE"] = "1"
    return environment


def gpus() -> int:
    """How many GPUs torch, and so a server, sees here. Without CUDA's driver torch is not imported for it."""
    if not has_cuda_driver():
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def visible_devices(config: RolloutConfig, *, beside_trainer: bool) -> list[list[str]] | None:
    """GPUs of each server on this machine. None without CUDA.

    `beside_trainer`: the processes of a trainer have the first GPUs, as many as its launcher says.
    """
    count = gpus()
    if not count:
        return None
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(index) for index in range(count)]
    trainer = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if beside_trainer else 0
    return assign_devices(config, devices, trainer)


def assign_devices(config: RolloutConfig, devices: list[str], trainer: int) -> list[list[str]]:
    """Some of `devices` for each server: the first `trainer` if they are shared, else those after these.

    Raises:
        ConfigError: there are too few.
    """
    width = config.tensor_parallel
    needed = config.servers * width
    usable = devices[:trainer] if config.shared_gpu else devices[trainer:]
    if len(usable) < needed and not trainer:
        problem = f"{needed} GPUs are needed, and {len(usable)} are here"
        raise ConfigError("rollout.servers", problem, "fewer servers, or a smaller rollout.tensor_parallel")
    if len(usable) < needed:
        where = f"among the trainer's {trainer}" if config.shared_gpu else f"beside the trainer's {trainer}"
        raise ConfigError(
            "rollout.servers",
            f"{needed} GPUs are needed, but {len(usable)} of {len(devices)} are there {where}",
            "fewer servers, or another number of trainer processes"
            + ("" if config.shared_gpu else ", or rollout.shared_gpu=true to sample on the trainer's in turns"),
        )
    return [usable[index * width : (index + 1) * width] for index in range(config.servers)]
