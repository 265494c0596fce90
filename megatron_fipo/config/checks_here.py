"""Check what a configuration needs on this machine: model, problem files, the user's own loss, the servers' token."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_fipo.config import Config
from megatron_fipo.config.checks_environment import check_environment_here
from megatron_fipo.config.checks_experts import (
    check_dispatcher_here,
    check_experts_of_model,
    check_servers_experts,
    check_servers_routes,
)
from megatron_fipo.config.checks_machine import check_host, check_machine, has_cuda_driver
from megatron_fipo.config.checks_reward import check_reward_here
from megatron_fipo.config.checks_tracking import check_trackers_here
from megatron_fipo.config.data_files import NotFound, files_of
from megatron_fipo.config.model_places import fetch_config, how_to_get
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import ModelConfig, read_architecture
from megatron_fipo.plugins import check_call, load_function

ROLLOUT_TOKEN_VARIABLE = "FIPO_ROLLOUT_TOKEN"


def check_here(config: Config, *, on_login_node: bool = False) -> list[str]:
    """Raise ConfigError if something is missing here, or if the model's config.json does not allow the layout.

    Return a warning for each setting that this machine can run, but only badly. A login node may have no GPU.
    """
    with _command_that_gets(config.data.fetch_command):
        _check_data_files(config)
    check_reward_here(config.reward)
    check_environment_here(config.environment)
    check_trackers_here(config.tracking)
    _check_token(config)
    if not on_login_node:
        _check_gpu(config)
        check_dispatcher_here(config, has_cuda_driver())
        check_servers_routes(config, has_cuda_driver())
    _check_model(config, has_cuda=on_login_node or has_cuda_driver())
    warnings = check_machine(config)
    _check_loss(config)
    return warnings


def check_here_to_sample(config: Config, model_dir: Path) -> None:
    """Do the part of `check_here` that sampling validation problems from the model in `model_dir` needs."""
    if config.rollout.servers:
        check_host(config.rollout.host)
    with _command_that_gets(config.data.fetch_command):
        _check_files({"data.validation": config.data.validation}, config.data.source)
    check_reward_here(config.reward)
    check_environment_here(config.environment)
    _check_token(config)
    _check_gpu(config)
    _check_servers_layout(config, read_architecture(model_dir), has_cuda_driver())


@contextmanager
def _command_that_gets(command: str | None) -> Iterator[None]:
    """Add the command that gets the files to the error about missing files. It comes from the configuration's group."""
    try:
        yield
    except ConfigError as error:
        if command is None:
            raise
        raise ConfigError(
            error.key, error.problem, f"{error.remedy}; `{command}` gets the files of this group"
        ) from None


def _check_data_files(config: Config) -> None:
    validation = config.data.validation if config.validation.every else []
    _check_files({"data.train": config.data.train, "data.validation": validation}, config.data.source)


def _check_files(files: dict[str, list[str]], source: str) -> None:
    if source != "files":
        return
    for key, paths in files.items():
        for path in paths:
            try:
                files_of(path)
            except NotFound as error:
                raise ConfigError(key, str(error), error.remedy) from None


def _check_token(config: Config) -> None:
    if config.rollout.addresses and not os.environ.get(ROLLOUT_TOKEN_VARIABLE):
        raise ConfigError(
            "rollout.addresses",
            f"the environment variable {ROLLOUT_TOKEN_VARIABLE} is not set",
            "export the token that the servers were started with",
        )


def _check_gpu(config: Config) -> None:
    rollout = config.rollout
    if rollout.weight_transfer == "cuda_ipc" and not has_cuda_driver():
        raise ConfigError(
            "rollout.weight_transfer",
            "cuda_ipc needs CUDA, but this machine has no CUDA driver",
            "rollout.weight_transfer=shared_memory or process_group",
        )
    if rollout.quantization in ("fp8_per_tensor", "fp8_per_block") and not has_cuda_driver():
        raise ConfigError(
            "rollout.quantization",
            f"{rollout.quantization} needs CUDA, but this machine has no CUDA driver",
            "rollout.quantization=fp8_per_channel, which vLLM supports on CPUs too, or null",
        )


def _check_loss(config: Config) -> None:
    """Import the user's own loss and check its parameters. This runs before processes start, and on each rank."""
    algorithm = config.algorithm
    if algorithm.loss is not None:
        function = load_function(algorithm.loss, "algorithm.loss")
        check_call(function, 2, algorithm.loss_options, algorithm.loss, "algorithm.loss")


def _check_model(config: Config, has_cuda: bool) -> None:
    path = config.model.path
    if not path:
        raise ConfigError("model.path", "is empty", how_to_get(path, config.model.fetch_command))
    directory = fetch_config(path)
    if not os.path.isfile(directory / "config.json"):
        problem = f"{path} holds no config.json" if os.path.isdir(directory) else f"there is no directory {path}"
        raise ConfigError("model.path", problem, how_to_get(path, config.model.fetch_command))
    _check_layout(config, read_architecture(directory), has_cuda)


def _check_layout(config: Config, model_config: ModelConfig, has_cuda: bool) -> None:
    _check_servers_layout(config, model_config, has_cuda)
    check_experts_of_model(config, model_config)
    parallel = config.parallel
    heads, groups, layers = model_config.num_attention_heads, model_config.num_query_groups, model_config.num_layers
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    for key, size, count, name in (
        ("parallel.tensor", parallel.tensor, heads, "attention heads"),
        ("parallel.tensor", parallel.tensor, groups, "key-value heads"),
        ("parallel.virtual_pipeline" if parallel.virtual_pipeline else "parallel.pipeline", chunks, layers, "layers"),
    ):
        if count % size:
            divisors = [str(n) for n in range(1, count + 1) if count % n == 0]
            what = f"{parallel.pipeline} stages of {parallel.virtual_pipeline} chunks" if "virtual" in key else size
            raise ConfigError(
                key, f"{what} does not divide the model's {count} {name}", f"divisors: {', '.join(divisors)}"
            )


def _check_servers_layout(config: Config, model_config: ModelConfig, has_cuda: bool) -> None:
    """Check the servers' part: experts, attention heads per GPU, and the length of prompts and responses."""
    check_servers_experts(config, model_config, has_cuda)
    heads, size = model_config.num_attention_heads, config.rollout.tensor_parallel
    if heads % size:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        problem = f"{size} does not divide the model's {heads} attention heads"
        raise ConfigError("rollout.tensor_parallel", problem, f"divisors: {divisors}")
    context = config.model.max_position_embeddings or model_config.max_position_embeddings
    longest = config.rollout.max_prompt_length + config.rollout.max_response_length
    if longest > context:
        raise ConfigError(
            "rollout.max_response_length",
            f"prompt {config.rollout.max_prompt_length} + response {config.rollout.max_response_length} tokens"
            f" exceed the model's context of {context}",
            f"at most {max(context - config.rollout.max_prompt_length, 0)}, or model.max_position_embeddings={longest}",
        )
