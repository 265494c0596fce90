"""Why: directories of whole models fill a disk, and removing one too many loses what somebody is serving.

Writing them is tests/end_to_end/test_train.py, from real runs; what stops it tests/weights/test_reshard.py.
"""

from pathlib import Path

from megatron_fipo.policy.huggingface_directories import prune


def test_what_has_no_checkpoint_goes_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    directory, checkpoints = tmp_path / "huggingface", tmp_path / "checkpoints"
    newest = checkpoints / "step-000003"
    prune(directory, newest)  # nothing has been written yet
    for name in (
        "step-000001",
        "step-000002",
        newest.name,
        ".step-000002.partial",
        "step-2",
        "best",
        "step-000001.old",
    ):
        (directory / name).mkdir(parents=True)
        (directory / name / "model.safetensors").touch()
    (checkpoints / "step-000002").mkdir(parents=True)
    prune(directory, newest)
    assert {path.name for path in directory.iterdir()} == {
        "step-000002",
        newest.name,
        "step-2",
        "best",
        "step-000001.old",
    }
