"""What the ranks of test_checkpoint.py run."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from megatron_fipo.config import Config
from megatron_fipo.errors import FipoError
from megatron_fipo.policy import platform

platform.install()

from megatron_fipo.models.model_config import read_architecture  # noqa: E402
from megatron_fipo.policy import checkpoint, megatron_versions, model  # noqa: E402
from megatron_fipo.policy.attention import RMSNorm  # noqa: E402
from megatron_fipo.policy.update import Policy  # noqa: E402
from tests.weights.whole import stage_tensors  # noqa: E402

STATE = {"step": 3}
EXTRA_STATE = {"scale_fwd": torch.arange(3.0), "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1}}


class NormWithExtraState(RMSNorm):
    """A norm that keeps extra state, pickled and unpickled as Transformer Engine does it."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(EXTRA_STATE)), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        assert str(pickle.loads(state.numpy().tobytes())) == str(EXTRA_STATE)


def save_and_load(model_dir: str, directory: str) -> dict[str, Any]:
    """Save from layers with and without extra state in the norms, and load each with the other kind and its own."""
    platform.start_process_group(60)
    seen: dict[str, Any] = {}
    model.start_model_parallel(Config().parallel, seed=0)
    for kind in (RMSNorm, NormWithExtraState):
        saved = _save(_policy(model_dir, kind), model_dir, Path(directory, kind.__name__))
        seen[kind.__name__] = str(saved)
        for other in (RMSNorm, NormWithExtraState):
            policy = _policy(model_dir, other)
            for value in _values(policy).values():
                value.fill_(torch.nan)
            checkpoint.load(policy, saved)
            seen[f"{kind.__name__} to {other.__name__}"] = _differing(policy, _policy(model_dir, kind))
    seen["rates"] = _rates(_policy(model_dir, RMSNorm, lr=3e-3), Path(seen["RMSNorm"]))
    seen["other model"] = _refusal_of_another_model(model_dir, Path(seen["RMSNorm"]))
    noted = _note_the_version(Path(seen["RMSNorm"]), "99.1.0")
    seen["newer version"] = _refusal(_policy(model_dir, RMSNorm), Path(seen["RMSNorm"]))
    _note_the_version(Path(seen["RMSNorm"]), None)
    checkpoint.load(_policy(model_dir, RMSNorm), Path(seen["RMSNorm"]))
    _note_the_version(Path(seen["RMSNorm"]), noted)
    seen["noted"] = noted
    platform.stop_process_group()
    return seen


def exchange_layers(model_dir: str, directory: str) -> dict[str, list[str]]:
    """Save from Transformer Engine's layers and from local ones, and load each with both; what differs, by name."""
    platform.start_process_group(60)
    seen: dict[str, list[str]] = {}
    model.start_model_parallel(Config().parallel, seed=0)
    kinds = ("local", "transformer_engine")
    for kind in kinds:
        saved = _save(_policy(model_dir, RMSNorm, kind), model_dir, Path(directory, kind))
        for other in kinds:
            policy = _policy(model_dir, RMSNorm, other)
            for value in _values(policy).values():
                value.fill_(torch.nan)
            checkpoint.load(policy, saved)
            found, expected = (
                stage_tensors(p.chunks, p.model_config) for p in (policy, _policy(model_dir, RMSNorm, other))
            )
            seen[f"{kind} to {other}"] = [
                name for name, value in expected.items() if not torch.equal(found[name], value)
            ]
    platform.stop_process_group()
    return seen


def _policy(model_dir: str, norm: type[torch.nn.Module], layers: str = "local", lr: float = 1e-6) -> Policy:
    config = Config()
    config.optimizer.lr = lr
    config.model.dtype, config.model.layers = "bfloat16", layers
    model.RMSNorm = norm  # type: ignore[misc, assignment]
    policy = Policy(config, read_architecture(model_dir), model_dir, updates=1)
    model.RMSNorm = RMSNorm  # type: ignore[misc]
    return policy


def _save(policy: Policy, model_dir: str, directory: Path) -> Path:
    return checkpoint.start_saving(
        policy, directory, step=3, trainer_state=STATE, keep=0, model_dir=Path(model_dir)
    ).finish()


def _values(policy: Policy) -> dict[str, torch.Tensor]:
    """Parameters, their fp32 master copies and the moments."""
    values = {name: value.detach() for name, value in policy.chunks[0].named_parameters()}
    for part in policy.optimizer.chained_optimizers:
        for index, (master, moments) in enumerate(part.optimizer.state.items()):
            values[f"master {index}"] = master.detach()
            values |= {f"{name} {index}": moments[name] for name in ("exp_avg", "exp_avg_sq")}
    return values


def _differing(policy: Policy, other: Policy) -> list[str]:
    expected = _values(other)
    found = _values(policy)
    assert len(found) > 60 and found.keys() == expected.keys()
    return [name for name, value in found.items() if not torch.equal(value, expected[name])]


def _rates(policy: Policy, saved: Path) -> list[float]:
    """Learning rates of the groups at the first update after a resume."""
    checkpoint.load(policy, saved)
    policy.scheduler.step(increment=1)
    return [group["lr"] for group in policy.optimizer.param_groups]


def _refusal_of_another_model(model_dir: str, saved: Path) -> str:
    """What a model with an output layer of its own says to a checkpoint without one."""
    policy = _policy(model_dir, RMSNorm)
    policy.chunks[0].module.module.extra_layer = torch.nn.Linear(2, 2)
    return _refusal(policy, saved)


def _refusal(policy: Policy, saved: Path) -> str:
    try:
        checkpoint.load(policy, saved)
    except FipoError as error:
        return str(error)
    return ""


def _note_the_version(saved: Path, version: str | None) -> str:
    """Have a checkpoint say that this Megatron-Core wrote it, or say nothing; what it said before."""
    path = saved / "trainer.json"
    state = json.loads(path.read_text())
    before = state.pop("megatron_core", "")
    path.write_text(json.dumps(state | ({"megatron_core": version} if version else {})))
    return before


def save_one(model_dir: str, directory: str, seed: int) -> str:
    """Save weights, master copies and moments that are random by the seed; where."""
    platform.start_process_group(60)
    model.start_model_parallel(Config().parallel, seed=0)
    policy = _policy(model_dir, RMSNorm)
    _fill_at_random(policy, seed)
    saved = _save(policy, model_dir, Path(directory))
    platform.stop_process_group()
    return str(saved)


def load_one(model_dir: str, saved: str, seed: int) -> dict[str, Any]:
    """Load what `save_one` saved: what differs from it, by name, or the refusal; and this Megatron-Core's version."""
    platform.start_process_group(60)
    model.start_model_parallel(Config().parallel, seed=0)
    policy, expected = _policy(model_dir, RMSNorm, lr=3e-3), _policy(model_dir, RMSNorm)
    _fill_at_random(expected, seed)
    found: dict[str, Any] = {"version": str(megatron_versions.installed()), "refusal": _refusal(policy, Path(saved))}
    if not found["refusal"]:
        found["differing"] = _differing(policy, expected)
    platform.stop_process_group()
    return found


def _fill_at_random(policy: Policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for value in _values(policy).values():
        value.copy_(torch.rand(value.shape, generator=generator))
