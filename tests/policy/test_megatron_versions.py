"""Why: two versions of Megatron-Core are served by one code, and what a checkpoint of the wrong one says must not
depend on which of the two runs the tests.

Not covered: the checkpoints themselves (test_checkpoint.py); FP8 weights on their way through one (tests/te_on_cpu).
"""

import json
import logging
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from megatron_fipo.errors import FipoError
from megatron_fipo.policy import megatron_versions
from megatron_fipo.policy.checkpoint import check_version


@pytest.mark.parametrize("written_by", [None, "0.15.3", "0.16.1", "0.16.2"])
def test_checkpoints_of_older_versions_and_of_later_patches_are_read(
    written_by: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron_versions, "installed", lambda: Version("0.16.1"))
    megatron_versions.check_readable("runs/a/step-000010", written_by)


@pytest.mark.parametrize(("here", "written_by"), [("0.16.1", "0.19.2"), ("0.19.2", "0.20.0rc1"), ("0.19.2", "1.0.0")])
def test_a_newer_versions_checkpoint_is_refused_in_one_line(
    here: str, written_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron_versions, "installed", lambda: Version(here))
    with pytest.raises(FipoError) as refusal:
        megatron_versions.check_readable("runs/a/step-000010", written_by)
    message = str(refusal.value)
    assert message.startswith("runs/a/step-000010: ") and "\n" not in message
    assert f"Megatron-Core {written_by} wrote it" in message and here in message


def test_what_a_checkpoint_notes_is_asked(tmp_path: Path) -> None:
    check_version(tmp_path)  # a converted model notes nothing
    for garbled in ("", "[]", "[" * 100_000, '{"megatron_core": 5}', '{"megatron_core": "?"}'):
        (tmp_path / "trainer.json").write_text(garbled)
        check_version(tmp_path)  # loop_state.py refuses it
    for noted in ({}, {"megatron_core": None}, {"megatron_core": str(megatron_versions.installed())}):
        (tmp_path / "trainer.json").write_text(json.dumps({"step": 3} | noted))
        check_version(tmp_path)
    (tmp_path / "trainer.json").write_text(json.dumps({"step": 3, "megatron_core": "99.1.0"}))
    with pytest.raises(FipoError, match=r"99\.1\.0 wrote it"):
        check_version(tmp_path)


def test_the_version_noted_has_no_commit() -> None:
    assert str(megatron_versions.installed()) == version("megatron-core")


def test_only_the_advice_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    before = list(logger.filters)
    megatron_versions.quiet_warnings()
    try:
        logger.warning("GPTModel IS DEPRECATED. GPTModel is only accepting critical bug fixes, no new features.")
        logger.warning("something else")
    finally:
        logger.filters[:] = before
    assert caplog.messages == ["something else"]
