"""Atomic writes: a failure leaves the old file and nothing beside it. Not covered: a power cut, which fsync is for."""

import json

import pytest

from megatron_fipo.files import write_atomically, write_json_atomically


def test_replaces_whole_files(tmp_path):
    path = tmp_path / "file"
    for content in ("long old content", "ü", b"\xff\x00"):
        write_atomically(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full_disk(_descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_json_is_standard(tmp_path):
    path = tmp_path / "file.json"
    write_json_atomically(path, {"b": 1, "a": None})
    assert json.loads(path.read_text()) == {"b": 1, "a": None}
    with pytest.raises(ValueError):
        write_json_atomically(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"b": 1, "a": None}
