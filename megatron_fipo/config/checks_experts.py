"""Checks of how the experts of a model are laid out over processes. Imports no torch."""

from collections.abc import Iterator
from importlib.util import find_spec

from megatron_fipo.config import Config
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.models.parameters import check_expert_parallel

ROUTER_LOSSES = ("router_aux_loss_coef", "router_z_loss_coef")
"""The coefficients of the routers' losses, in the section algorithm."""


def experts(config: Config) -> Iterator[str]:
    """Yield warnings. Raise ConfigError for a dispatcher that cannot serve the layout, or servers of one rank that deal
    experts.
    """
    check_dispatcher(config)
    _check_ranks_of_server(config)
    algorithm = config.algorithm
    for key in ROUTER_LOSSES if config.optimizer.freeze_routers else ():
        if getattr(algorithm, key) > 0:
            problem = "teaches routers, and optimizer.freeze_routers=true keeps them as they are"
            raise ConfigError(f"algorithm.{key}", problem, f"algorithm.{key}=0, or optimizer.freeze_routers=false")
    if algorithm.router_replay == "trainer" and algorithm.prompts_per_step == algorithm.mini_batch_prompts:
        yield (
            "algorithm.router_replay: trainer changes nothing with one update per step, whose own "
            "forward pass gives old log-probs; make mini_batch_prompts smaller than prompts_per_step, or set it to "
            "none or rollout"
        )


def check_dispatcher(config: Config) -> None:
    """Raise ConfigError for a dispatcher that cannot serve the layout or the precision."""
    parallel = config.parallel
    size = parallel.expert * parallel.expert_tensor
    if parallel.expert_dispatcher == "allgather":
        replica = parallel.tensor * parallel.context
        if parallel.pipeline > 1 or replica % size:
            raise ConfigError(
                "parallel.expert_dispatcher",
                "allgather needs micro-batches of one length, which only the ranks of one replica without a pipeline"
                f" have, and expert × expert_tensor is {size}, tensor × context {replica}, pipeline"
                f" {parallel.pipeline}",
                "parallel.expert_dispatcher=alltoall",
            )
        if config.model.fp8 != "off":
            problem = f"allgather cannot pad the tokens of an expert, which model.fp8={config.model.fp8} needs"
            raise ConfigError("parallel.expert_dispatcher", problem, "parallel.expert_dispatcher=alltoall")
    if parallel.expert_dispatcher == "flex" and size == 1:
        problem = "flex sends between ranks, and every expert is whole on each"
        raise ConfigError("parallel.expert_dispatcher", problem, "parallel.expert=2 or more, or alltoall")


def check_expert_ranks(config: Config, data: int) -> None:
    """Raise ConfigError if the experts' layout does not divide the ranks of a pipeline stage.

    Args:
        data: data-parallel size.
    """
    parallel = config.parallel
    stage, size = parallel.tensor * parallel.context * data, parallel.expert * parallel.expert_tensor
    if stage % size:
        raise ConfigError(
            "parallel.expert",
            f"expert {parallel.expert} × expert_tensor {parallel.expert_tensor} is {size}, which does not divide the "
            f"{stage} ranks of a pipeline stage, tensor × context × data",
            "a divisor of them",
        )


def check_experts_of_model(config: Config, model_config: ModelConfig) -> None:
    """Raise ConfigError if the model's experts cannot be laid out as configured."""
    parallel, replay = config.parallel, config.algorithm.router_replay
    check_expert_parallel(model_config, parallel.expert, parallel.expert_tensor)
    if model_config.experts is None and replay != "none":
        problem = f"is {replay}, and the model has no experts"
        raise ConfigError("algorithm.router_replay", problem, "algorithm.router_replay=none")
    for key in ROUTER_LOSSES if model_config.experts is None else ():
        if getattr(config.algorithm, key) > 0:
            raise ConfigError(f"algorithm.{key}", "the model has no experts", f"algorithm.{key}=0")
    if model_config.experts is None and config.optimizer.freeze_routers:
        raise ConfigError("optimizer.freeze_routers", "the model has no experts", "optimizer.freeze_routers=false")
    if model_config.experts is not None and parallel.tensor > 1 and not parallel.sequence:
        raise ConfigError(
            "parallel.sequence",
            "is false, and experts of a model over tensor-parallel ranks need it: all would dispatch each token",
            "parallel.sequence=true",
        )


def check_servers_routes(config: Config, has_cuda: bool) -> None:
    """Raise ConfigError if the servers that the run starts cannot say which experts tokens went to.

    Servers that already run say so themselves, when they are asked first. `has_cuda`: where servers run.
    """
    if config.algorithm.router_replay != "rollout" or not config.rollout.servers or (has_cuda and find_spec("triton")):
        return
    lacking = "has no Triton" if has_cuda else "has no CUDA driver: vLLM's CPU engine cannot tell"
    raise ConfigError(
        "algorithm.router_replay",
        f"is rollout, for which vLLM has to return the experts of each token, and this machine {lacking}",
        "algorithm.router_replay=trainer, or servers with CUDA and Triton",
    )


def check_servers_experts(config: Config, model_config: ModelConfig, has_cuda: bool) -> None:
    """Raise ConfigError if servers cannot run the model's experts as configured. `has_cuda`: where they run."""
    rollout, found = config.rollout, model_config.experts
    _check_ranks_of_server(config)
    if found is None:
        if rollout.expert_parallel:
            raise ConfigError("rollout.expert_parallel", "the model has no experts", "rollout.expert_parallel=false")
        return
    if rollout.expert_parallel and rollout.servers and not has_cuda:
        problem = "vLLM's CPU kernels take every rank of a server to have all experts, and would compute nonsense"
        raise ConfigError("rollout.expert_parallel", problem, "rollout.expert_parallel=false without a GPU")
    if rollout.quantization is not None and rollout.servers and not has_cuda:
        problem = f"{rollout.quantization} of a model with experts needs CUDA, and this machine has no CUDA driver"
        raise ConfigError("rollout.quantization", problem, "rollout.quantization=null")
    size, width = rollout.tensor_parallel, found.ffn_hidden_size
    if size > found.number:
        problem = f"{size} is more than the model's {found.number} experts, which vLLM refuses"
        raise ConfigError("rollout.tensor_parallel", problem, f"at most {found.number}")
    if not rollout.expert_parallel and width % size:
        problem = f"{size} does not divide the {width} rows of an expert"
        raise ConfigError("rollout.tensor_parallel", problem, "a divisor, or rollout.expert_parallel=true")


def _check_ranks_of_server(config: Config) -> None:
    if config.rollout.expert_parallel and config.rollout.tensor_parallel == 1:
        problem = "deals experts to the ranks of a server, and rollout.tensor_parallel is 1"
        raise ConfigError("rollout.expert_parallel", problem, "false, or a larger rollout.tensor_parallel")


def check_dispatcher_here(config: Config, has_cuda: bool) -> None:
    """Raise ConfigError if this machine lacks what the dispatcher runs on."""
    if config.parallel.expert_dispatcher == "flex" and not (has_cuda and find_spec("deep_ep")):
        lacking = "DeepEP (the package deep_ep)" if has_cuda else "CUDA"
        raise ConfigError("parallel.expert_dispatcher", f"flex needs {lacking}", "parallel.expert_dispatcher=alltoall")
