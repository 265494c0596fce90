"""Checkpoints of a run: Megatron-Core's distributed format, complete or not there, loadable under another layout.

A checkpoint is a directory step-000010 with the model, the optimizer, the learning-rate schedule, trainer.json and
rollout/ (the state of the loop: step, prompt order, ledger of tickets, samples that wait for their step; loop_state.py
reads them), the configuration and tokenizer files that make it a model by itself, and a manifest of all that. It is
written under another name and renamed when all ranks are done, so a directory of that name is complete by construction
and there is no tracker file to go stale.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.utils import unwrap_model

from megatron_fipo.errors import FipoError
from megatron_fipo.files import write_json_atomically
from megatron_fipo.policy import megatron_versions, platform
from megatron_fipo.policy.checkpoint_places import newest, step_of
from megatron_fipo.policy.optimizer import of_this_layout
from megatron_fipo.policy.optimizer_blocks import SHARDING, in_blocks
from megatron_fipo.policy.plain_resume import plain_data_only, plain_extra_state
from megatron_fipo.policy.save_plan import make_plan
from megatron_fipo.policy.saving import Saving
from megatron_fipo.policy.together import no_garbage_collection, together
from megatron_fipo.policy.update import Policy
from megatron_fipo.weights.huggingface_writer import carry_files
from megatron_fipo.weights.reshard import gather_texts

__all__ = ["check_version", "load", "newest", "start_saving", "step_of"]

_TRAINER_STATE = "trainer.json"
# The key of trainer.json that tells which Megatron-Core wrote the checkpoint.
_WRITTEN_BY = "megatron_core"
_EXTRA_STATE = "_extra_state"
# Experts that lie over ranks have an optimizer of their own, whose tensors have the same keys under any layout.
_OPTIMIZER_METADATA = {"distrib_optim_sharding_type": SHARDING, "chained_optim_avoid_prefix": True}


def start_saving(
    policy: Policy,
    directory: Path,
    step: int,
    trainer_state: dict[str, Any],
    keep: int,
    model_dir: Path,
    write_rollout: Callable[[Path], None] | None = None,
) -> Saving:
    """Begin to write a checkpoint of the present state, which may change as soon as this returns.

    Every rank calls this together. Nothing is saved before `Saving.finish`, and one saving has to be finished before
    the next one.

    Args:
        directory: the run's checkpoint directory, on storage that all ranks share.
        step: training steps done.
        trainer_state: JSON-ready state of the loop; rank 0's is written.
        keep: newest checkpoints to leave there; 0 leaves all.
        model_dir: where configuration and tokenizer are copied from.
        write_rollout: writes the rest of that state into the given directory; called in a process of rank 0, if given.

    Raises:
        CheckpointError: on every rank, if there is no space for it, or any rank cannot write.
    """

    def write_small_files(partial: Path) -> None:
        carry_files(model_dir, partial, policy.megatron_config.params_dtype)
        written_by = {_WRITTEN_BY: str(megatron_versions.installed())}
        write_json_atomically(partial / _TRAINER_STATE, trainer_state | written_by)
        if write_rollout is not None:
            write_rollout(partial)

    saving = Saving(directory, step, keep, policy.config.run.collective_timeout_s)
    with no_garbage_collection():
        with in_blocks():
            state = _sharded_state(policy, is_loading=False)
        if policy.offload is not None:
            policy.offload.show(state)
        megatron_versions.dequantise(state)
        saving.start(make_plan(state, saving.partial), write_small_files)
    return saving


def load(policy: Policy, checkpoint: Path) -> None:
    """Fill the policy from a checkpoint, which any layout may have written; every rank calls this together.

    Nothing that the checkpoint says is run: see `plain_resume`.

    Raises:
        FipoError: the checkpoint does not fit this model, is damaged, is of a newer Megatron-Core, or holds pickles of
            more than plain data.
    """
    check_version(checkpoint)
    what = f"{checkpoint}: cannot be resumed from"
    loaded, absent = together(what, lambda: _read(policy, checkpoint))
    _raise_if_lost(checkpoint, absent)
    for name, chunk in _named_chunks(policy):
        unmatched = chunk.load_state_dict(loaded[name], strict=False)
        _raise_if_lost(checkpoint, {*unmatched.missing_keys, *unmatched.unexpected_keys})
    together(what, lambda: _restore_optimizer(policy, loaded))


def _restore_optimizer(policy: Policy, loaded: dict[str, Any]) -> None:
    """Fill the optimizer and the learning-rate schedule. Raises nearly anything."""
    state = of_this_layout(policy.optimizer, loaded["optimizer"])
    with torch.no_grad():  # fp32 parameters are views that the optimizer writes to
        policy.optimizer.load_state_dict(state)
    policy.scheduler.load_state_dict(loaded["scheduler"])


def _read(policy: Policy, checkpoint: Path) -> tuple[dict[str, Any], set[str]]:
    """The policy's state, and the keys that are absent from the checkpoint. Raises nearly anything."""
    state = _sharded_state(policy, is_loading=True)
    megatron_versions.dequantise(state)
    with plain_data_only():
        # Keys that only one of Transformer Engine's versions or Megatron-Core's own layers have come back in `absent`.
        loaded, _, absent = dist_checkpointing.load(state, str(checkpoint), strict=StrictHandling.RETURN_UNEXPECTED)
        for name, _ in _named_chunks(policy):
            extra = {key: value for key, value in loaded[name].items() if key.endswith(_EXTRA_STATE)}
            loaded[name] |= {key: plain_extra_state(value) for key, value in extra.items()}
    return loaded, absent


def check_version(checkpoint: Path) -> None:
    """Raise FipoError where a newer Megatron-Core than the installed one wrote a checkpoint."""
    with contextlib.suppress(OSError, ValueError, RecursionError):  # whoever reads all of it names these
        trainer_state = json.loads((checkpoint / _TRAINER_STATE).read_text())
        noted = trainer_state.get(_WRITTEN_BY) if isinstance(trainer_state, dict) else None
        megatron_versions.check_readable(checkpoint, noted if isinstance(noted, str) else None)


def _raise_if_lost(checkpoint: Path, keys: set[str]) -> None:
    """FipoError on every rank if any rank lacks one of `keys`, extra state aside.

    Transformer Engine keeps FP8 scales there, its norms an empty one in some versions; layers without start without.
    """
    mine = json.dumps(sorted(key for key in keys if not key.endswith(_EXTRA_STATE)))
    lost = {key for text in gather_texts(mine, platform.device()) for key in json.loads(text)}
    if lost:
        raise FipoError(f"{checkpoint}: cannot be resumed from: it lacks {', '.join(sorted(lost))}")


def _named_chunks(policy: Policy) -> list[tuple[str, Any]]:
    """Chunks under the names by which Megatron-Core's optimizer looks them up."""
    chunks = unwrap_model(policy.chunks)
    return [("model", chunks[0])] if len(chunks) == 1 else [(f"model{i}", chunk) for i, chunk in enumerate(chunks)]


def _sharded_state(policy: Policy, is_loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {name: chunk.sharded_state_dict() for name, chunk in _named_chunks(policy)}
    state["optimizer"] = policy.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=_OPTIMIZER_METADATA)
    state["scheduler"] = policy.scheduler.state_dict()
    return state
