"""Why: a checkpoint must be whole or not there, whatever happens to the disk, to a file or to a rank.

Four ranks of tensor and data parallelism, so that parameters are cut both ways: what they save without gathering is
bit for bit what Megatron-Core gathers and saves. Then damage, full disks and killed writers. A limit on the size of
files stands in for a full disk on one of several ranks; a file system of memory really is full, for one rank, where it
may be mounted. Not covered: kills of a whole run (test_killed_saves.py), layouts' resumes (tests/end_to_end), storage
of several machines.
"""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.distributed import run_ranks
from tests.weights.models import SMALL_MODELS, write_model

MODEL = next(model for model in SMALL_MODELS if model.name == "qwen3-tied")


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_stretch_is_its_boxes_in_their_order(shape: list[int], data: st.DataObject) -> None:
    from megatron_fipo.policy.optimizer_blocks import boxes

    count = math.prod(shape)
    start, end = sorted((data.draw(st.integers(0, count)), data.draw(st.integers(0, count))))
    whole = torch.arange(count).view(shape)
    found = list(boxes(shape, start, end))
    pieces = [
        whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))].flatten()
        for offsets, sizes in found
    ]
    assert torch.cat([torch.arange(0), *pieces]).tolist() == list(range(start, end))
    assert len(found) <= 2 * len(shape) - 1


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    model = write_model(MODEL, tmp_path)
    arguments = {
        "model_dir": str(model),
        "directory": str(tmp_path / "checkpoints"),
        "parallel": {"tensor": 2, "data": 2, "distributed_optimizer": True},
    }
    seen = run_ranks("tests.policy.saving_ranks:all_together", 4, arguments, timeout=200)
    assert all(rank["differing"] == rank["not loaded"] == [] for rank in seen)
    assert all(rank["damage"] == seen[0]["damage"] for rank in seen), "every rank says the same"
    damage = seen[0]["damage"]
    assert damage.pop("unharmed") == ""
    assert "manifest.json is missing" in damage.pop("no manifest")
    assert "has no manifest.json" in damage.pop("older"), "a warning"
    assert "spoilt: __1_0.distcp has 1000 bytes, and " in damage.pop("truncated")
    assert damage.pop("missing").endswith("spoilt: __1_0.distcp is missing")
    assert damage.pop("link").endswith("spoilt: __1_0.distcp is a link, and should be a file")
    assert damage.pop("pipe").endswith("spoilt: manifest.json is a pipe, a socket or a device, and should be a file")
    assert "spoilt: inner/other.txt does not belong to it" in damage.pop("extra")
    assert "manifest.json is damaged" in damage.pop("changed manifest.json")
    assert len([name for name in damage if name.endswith(".distcp")]) == 8
    for what, said in damage.items():
        assert f"{what.removeprefix('changed ')} is damaged: its checksum is another one" in said

    expected = {
        "limit": "distcp could not be written: File too large",
        "killed": "ended with status -9, perhaps for lack of memory",
        "space": f"no space left in {tmp_path / 'checkpoints'}: 0.00 GiB are needed, 0.00 GiB are free",
    }
    for rank in seen:
        for name, text in expected.items():
            failure = rank["failures"][name]
            assert failure["said"].startswith("step 2 is not saved (0.00 GiB): ") and text in failure["said"]
            assert "\n" not in failure["said"]
            assert failure["left"] == ["step-000001"], "the last one stays, and nothing of the failed one"
            assert failure["warning"] == ""
            assert failure["seconds"] < 30
        assert rank["left"] == ["step-000001"]
    assert seen[0]["kept"] == seen[0]["left at last"] == ["step-000003", "step-000004"]


@pytest.mark.slow
def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    arguments = {"model_dir": str(write_model(MODEL, tmp_path)), "directory": str(disk)}
    (seen,) = run_ranks("tests.policy.saving_ranks:on_a_full_disk", 1, arguments, timeout=120)
    if not seen:
        pytest.skip("no file system can be mounted here")
    assert "could not be written: No space left on device (0.00 GiB are free)" in seen["said"]
    assert seen["left"] == ["step-000001"]
    assert seen["verified"] == ["", ""] and seen["newest"] == "step-000002"
