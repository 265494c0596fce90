"""What the ranks of test_offload.py run."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch

from megatron_fipo.config import Config, PolicySection
from megatron_fipo.policy import platform

platform.install()

from megatron_fipo.models.model_config import read_architecture  # noqa: E402
from megatron_fipo.policy import checkpoint  # noqa: E402
from megatron_fipo.policy.feed import made_alike  # noqa: E402
from megatron_fipo.policy.model import start_model_parallel  # noqa: E402
from megatron_fipo.policy.offload import Offload  # noqa: E402
from megatron_fipo.policy.update import Policy, gather_parameters  # noqa: E402
from megatron_fipo.weights.away import readable  # noqa: E402
from tests.policy.training import MODEL, _batch, _policy  # noqa: E402

UPDATES = 3


def train(
    model: dict[str, Any], parallel: dict[str, Any], directory: str, model_dir: str | None = None
) -> dict[str, Any]:
    """Three updates without a break, and three between which the state leaves; digests of everything after each.

    The last state of each is saved: at home, and away. The model is the embedded one, or that of `model_dir`.
    """
    platform.start_process_group(60)
    start = Path(model_dir) if model_dir else MODEL
    found: dict[str, Any] = {}
    for name in ("stays", "leaves"):
        policy = _policy(model, parallel, UPDATES, start=start, architecture=start)
        offload = Offload(policy.chunks, policy.optimizer)
        if name == "leaves":
            policy.offload = offload
            found["freed"] = _leave(policy, offload)
        seen = [_update(policy) for _ in range(UPDATES)]
        if name == "leaves":
            _leave(policy, offload)
        saving = checkpoint.start_saving(policy, Path(directory, name), UPDATES, {}, keep=0, model_dir=start)
        saved = saving.finish()
        # What is saved away is read by another policy, at home.
        fresh = _policy(model, parallel, UPDATES, start=start, architecture=start)
        checkpoint.load(fresh, saved)
        found[name] = {"updates": seen, "saved": _digests(fresh), "at the end": _digests(policy)}
    platform.stop_process_group()
    return found


def free_bytes() -> dict[str, int]:
    """What the driver has free with a model of 0.1 B parameters at home, away and back, and what its state takes."""
    platform.start_process_group(60)
    config = Config(model=PolicySection(dtype="bfloat16", layers="local"))
    start_model_parallel(config.parallel, 0)
    architecture = dataclasses.replace(read_architecture(MODEL), hidden_size=1024, ffn_hidden_size=8192)
    policy = Policy(config, architecture, None, updates=1)
    offload = Offload(policy.chunks, policy.optimizer)
    found = {"at home": _free()}
    offload.leave()
    found["away"] = _free()
    offload.bring_all()
    offload.wait()
    found["back"] = _free()
    gradients = sum(buffer.grad_data.nbytes for chunk in policy.chunks for buffer in chunk.buffers)
    found["state"] = offload.host_bytes + gradients
    platform.stop_process_group()
    return found


def _free() -> int:
    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])


def _update(policy: Policy) -> dict[str, Any]:
    """One update, before and after which the state leaves."""
    if policy.offload is not None:
        _leave(policy, policy.offload)
        policy.offload.bring_weights()  # as for a weight update, after which only weights have to be freed
        _leave(policy, policy.offload)
        policy.offload.bring_all()
    (mini_batch,) = made_alike(policy, *_batch(policy.model_config.vocab_size))
    metrics = policy.update(mini_batch, *policy.log_probs([mini_batch]).streams)
    gather_parameters(policy.chunks)
    return {"metrics": metrics, "state": _digests(policy)}


def _leave(policy: Policy, offload: Offload) -> dict[str, int]:
    """Bytes of the buffers of weights and gradients before and after the state left."""
    buffers = [buffer for chunk in policy.chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    storages = {
        "gradients": [buffer.grad_data.untyped_storage() for buffer in buffers],
        "weights": [buffer.param_data.untyped_storage() for buffer in buffers if buffer.param_data is not None],
    }
    sizes = {f"{name} before": sum(map(len, kept)) for name, kept in storages.items()}
    offload.leave()
    return sizes | {name: sum(map(len, kept)) for name, kept in storages.items()}


def _digests(policy: Policy) -> dict[str, str]:
    """Of every parameter, master weight and moment, wherever they are."""
    tensors: dict[str, torch.Tensor] = {
        f"{place}.{name}": parameter
        for place, chunk in enumerate(policy.chunks)
        for name, parameter in chunk.named_parameters()
    }
    for place, part in enumerate(policy.optimizer.chained_optimizers):
        masters = [master for group in part.optimizer.param_groups for master in group["params"]]
        for number, master in enumerate(masters):
            tensors[f"{place}.master.{number}"] = master
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{place}.{key}.{number}"] = part.optimizer.state[master][key]
    # Copies, since numpy pins the storage that it shows.
    copies = {
        name: readable(tensor).detach().clone().cpu().view(-1).view(torch.uint8).numpy()
        for name, tensor in tensors.items()
    }
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in copies.items()}
