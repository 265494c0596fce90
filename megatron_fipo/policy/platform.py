"""The one place that knows CPU + gloo from CUDA + NCCL.

Megatron-Core names `torch.cuda` in many places that have nothing to do with a GPU: a device for a buffer, a
random state, a synchronisation before a send. `install` points those names at the CPU where there is no CUDA. It holds
no logic of training; on a GPU machine all it does is to stand in for a fused Adam where none is installed.

The redirects are process-wide, so they belong in trainer processes alone; the vLLM servers are processes of their own.
"""

import functools
import gc
import logging
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from megatron_fipo.policy import cpu_experts
from megatron_fipo.policy.megatron_versions import quiet_warnings
from megatron_fipo.policy.rendezvous import meeting_point

_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "empty_like", "zeros_like")
_CUDA_NAMES = (
    *("current_device", "current_stream", "synchronize", "manual_seed", "get_rng_state", "set_rng_state"),
    *("Stream", "Event", "stream"),
)
_installed = False


def has_cuda() -> bool:
    """Whether the policy runs on CUDA."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """This process's device."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def install() -> None:
    """Point Megatron-Core's uses of `torch.cuda` at the CPU, unless there is CUDA. Idempotent.

    Everywhere, `Adam` takes the place that Transformer Engine's or apex's fused one leaves empty.

    Raises:
        RuntimeError: a name to redirect is gone, which means another torch or Megatron-Core than the pinned one.
    """
    global _installed
    if _installed:
        return
    if not has_cuda():
        _check_names_exist()
        _redirect_device_queries()
        _redirect_random_state()
        # `with torch.device("meta")` knows the factories by their identity, and notes them when it is first asked: from
        # here on it would note the ones below, which it never meets, and models would be built in real memory.
        with torch.device("cpu"):
            torch.empty(0)
        for name in _FACTORIES:
            setattr(torch, name, _on_cpu(getattr(torch, name)))
        _redirect_tensor_methods()
        cpu_experts.install_dispatch()
    _install_adam()
    quiet_warnings()
    _installed = True


def _check_names_exist() -> None:
    import megatron.core.tensor_parallel.random as megatron_random

    missing = [f"torch.cuda.{name}" for name in _CUDA_NAMES if not hasattr(torch.cuda, name)]
    missing += [f"torch.{name}" for name in _FACTORIES if not hasattr(torch, name)]
    if not hasattr(megatron_random, "_set_cuda_rng_state"):
        missing.append("megatron.core.tensor_parallel.random._set_cuda_rng_state")
    if missing:
        raise RuntimeError(f"cannot run on the CPU with these versions, names not found: {', '.join(missing)}")


def _redirect_device_queries() -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    cpu_experts.install_streams()


def _redirect_random_state() -> None:
    """The "CUDA" random state that Megatron-Core forks for tensor parallelism is the CPU's own one here."""
    import megatron.core.tensor_parallel.random as megatron_random

    def manual_seed(seed: int) -> None:
        # torch.manual_seed would come back here through cuda.manual_seed_all.
        torch.default_generator.manual_seed(int(seed))

    def get_state(device: Any = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = "cuda", graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    torch.cuda.manual_seed = manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = get_state
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = set_state  # type: ignore[assignment]
    megatron_random._set_cuda_rng_state = set_state
    # Megatron-Core warns whenever the CPU state changes under a CUDA fork; here that is the intent.
    logger = logging.getLogger(megatron_random.__name__)
    logger.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _is_cuda(place: Any) -> bool:
    return (isinstance(place, str) and place.startswith("cuda")) or (
        isinstance(place, torch.device) and place.type == "cuda"
    )


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The factory with device="cuda" read as the CPU; page-locked memory needs a driver, so it is left out."""

    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return on_cpu


def _redirect_tensor_methods() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    original_type = torch.Tensor.type

    def type_as_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron-Core's optimizer sorts parameters by the string torch.cuda.FloatTensor.
        found = original_type(self, *args, **kwargs)
        if isinstance(found, str) and self.device.type == "cpu" and not found.startswith("torch.cuda."):
            return found.replace("torch.", "torch.cuda.", 1)
        return found

    torch.Tensor.type = type_as_cuda  # type: ignore[method-assign,assignment]


class Adam(torch.optim.Optimizer):
    """Adam with apex FusedAdam's contract, on plain torch.

    Megatron-Core's distributed optimizer stores and restores exp_avg and exp_avg_sq a parameter and one step count a
    group, as apex does; torch.optim.AdamW keeps a step a parameter, and its checkpoints do not load.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **_: Any,
    ):
        if not adam_w_mode or not bias_correction:
            raise ValueError("this Adam has decoupled weight decay and bias correction only")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step_group(group, parameters)

    def _step_group(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
        first = [self.state[parameter]["exp_avg"] for parameter in parameters]
        second = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]
        beta1, beta2 = group["betas"]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, (1 - beta2 ** group["step"]) ** 0.5)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(parameters, first, denominator, -group["lr"] / (1 - beta1 ** group["step"]))


def _install_adam() -> None:
    """Have Megatron-Core take its apex path with `Adam` when neither Transformer Engine nor apex is there."""
    import megatron.core.optimizer as megatron_optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed_optimizer

    if distributed_optimizer.HAVE_APEX_OR_TE:
        return
    megatron_optimizer.Adam = Adam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed_optimizer.Adam = Adam
    distributed_optimizer.HAVE_APEX_OR_TE = True
    distributed_optimizer.USING_APEX_OPTIMIZER = True


def adam_name() -> str:
    """Whose Adam the optimizer is: Transformer Engine's, apex's or the one here."""
    import megatron.core.optimizer as megatron_optimizer

    adam = megatron_optimizer.Adam
    origin = {"transformer_engine": "Transformer Engine's", "apex": "apex's"}.get(adam.__module__.partition(".")[0])
    return f"{origin} {adam.__name__}" if origin else "Adam in plain torch"


def release_memory() -> None:
    """Hand back to the GPU what torch keeps cached, for another process on it. Nothing on a CPU."""
    if has_cuda():
        gc.collect()
        torch.cuda.empty_cache()


def start_process_group(timeout_s: float) -> None:
    """Join the trainer's process group (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the environment).

    Args:
        timeout_s: longest wait of one rank for the others in any collective, in seconds.
    """
    install()
    if has_cuda():
        # Kernels of a layer and its communication start in the order in which they are issued, as tensor parallelism
        # counts on; read when the device is first used.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # gloo beside NCCL: object and CPU-tensor collectives, and Megatron-Core's checkpoints, need it.
        backend = "cpu:gloo,cuda:nccl"
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        backend = "gloo"
    wait = timedelta(seconds=timeout_s)
    if (store := meeting_point(timeout_s)) is None:
        torch.distributed.init_process_group(backend, timeout=wait)
    else:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait)


def stop_process_group() -> None:
    """Leave the trainer's process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
