"""What a run's loop needs to go on where it stood, beside the weights: a record, and its place in a checkpoint.

trainer.json has the loop's own few values, rollout/ has what is sampled (rollout/snapshot.py). Both are held to types,
ranges and to each other when they are read: whatever is wrong is refused in one line that names file and place.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from megatron_fipo import old_loop_state
from megatron_fipo.errors import DataError
from megatron_fipo.rollout import snapshot
from megatron_fipo.rollout.ledger import Count
from megatron_fipo.rollout.snapshot import LEDGER_FILE, RolloutState
from megatron_fipo.rollout.training_rollouts import TrainingRollouts

_FORMAT = 3
_RESULTS = r"^(accuracy|response_length)_(before|after)\Z"
RESULTS = [f"{what}_{when}" for what in ("accuracy", "response_length") for when in ("before", "after")]
"""What validations so far have told."""
STATE_FILE = "trainer.json"


class _Saved(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What stands in the JSON file."""

    format: Literal[3]
    megatron_core: str
    """The version that wrote the checkpoint: policy/checkpoint.py notes and judges it."""
    step: Count
    seconds: Annotated[float, Meta(ge=0, le=1e12)]
    results: dict[Annotated[str, Meta(pattern=_RESULTS)], float | None]


class LoopState(Struct, frozen=True, kw_only=True):
    """A run after a step."""

    step: int
    seconds: float
    """Of training, without the start of processes and servers."""
    results: dict[str, float | None]
    """Of validations so far; None where nothing could be judged."""
    rollout: RolloutState


def content(step: int, seconds: float, results: dict[str, float | None]) -> dict[str, Any]:
    """What trainer.json says of a run after `step`."""
    return {"format": _FORMAT, "step": step, "seconds": seconds, "results": results}


def read(checkpoint: Path, *, step: int, vocab_size: int) -> LoopState:
    """What `encode` gave, from where it was written.

    Args:
        step: the checkpoint's.
        vocab_size: the model's.

    Raises:
        DataError: a file is damaged, or holds what cannot be. One line, with file and key or tensor.
    """
    path = checkpoint / STATE_FILE
    try:
        data = path.read_bytes()
        found = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).get("format")
        number = None if found is None else msgspec.json.decode(found)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if number == old_loop_state.FORMAT or (number is None and not (checkpoint / LEDGER_FILE).exists()):
        old = old_loop_state.read(path, data, step, vocab_size)
        return LoopState(step=old.step, seconds=old.seconds, results=old.results, rollout=old.rollout)
    try:
        saved = msgspec.json.decode(data, type=_Saved)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}") from None
    if saved.step != step:
        raise DataError(f"{path}: step is {saved.step}, and should be {step} in {checkpoint.name}")
    rollout = snapshot.read(checkpoint, step=step, vocab_size=vocab_size)
    return LoopState(step=saved.step, seconds=saved.seconds, results=saved.results, rollout=rollout)


def resume(checkpoint: Path, step: int, rollouts: TrainingRollouts) -> LoopState:
    """Have `rollouts` go on from the state in a checkpoint of `step`; the state.

    Raises:
        DataError: as `read`; or the state is of other data or another order, or has samples too long for this run.
    """
    state = read(checkpoint, step=step, vocab_size=rollouts.vocab_size)
    try:
        rollouts.restore(state.rollout)
    except DataError as error:
        has_ledger = (checkpoint / LEDGER_FILE).exists()
        where = f"{checkpoint / LEDGER_FILE}: " if has_ledger else f"{checkpoint / STATE_FILE}: experience."
        raise DataError(f"{where}{error}") from None
    return state
