"""Why: a run is killed by time limits, by pre-emption and for lack of memory, and a save takes minutes of it.

One rank, killed at eight moments of an asynchronous save, in `make test-all` at 32, from before its first byte to after
its rename; each time the next run finds a complete checkpoint, holds it against its manifest, loads it, and finds the
values of one step in all of it although they changed while it was written. Not covered: a power cut, which takes along
what the disk has not yet written though it said so; several ranks (they write to files of their own, and one of them
commits).
"""

from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.weights.models import SMALL_MODELS, write_model


@pytest.mark.slow
@pytest.mark.parametrize("moments", [6, pytest.param(32, marks=pytest.mark.matrix)])
def test_a_kill_at_any_moment_leaves_the_last_complete_checkpoint(moments: int, tmp_path: Path) -> None:
    model = write_model(next(model for model in SMALL_MODELS if model.name == "qwen3-tied"), tmp_path)
    arguments = {"model_dir": str(model), "directory": str(tmp_path / "checkpoints"), "moments": moments}
    (found,) = run_ranks("tests.policy.killed_saves:kill_at", 1, arguments, timeout=280)
    assert len(found) == moments
    for kill in found:
        assert kill["loaded"] == kill["newest"], kill
    unfinished = [kill for kill in found if any(name.endswith(".partial") for name in kill["left"])]
    assert len(unfinished) >= moments // 4, "the kills have to come in the middle of saves for this to show anything"
    newest = [kill["newest"] for kill in found]
    assert min(newest) < max(newest), "and some after them"
