"""Why: trackers have threads and services of their own, which a run that fails while it opens its files must still end.

Not covered: the rest of the assembly, which whole runs test.
"""

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_fipo import assembly
from megatron_fipo.config import Config
from megatron_fipo.errors import DataError
from megatron_fipo.tracking.trackers.background import Trackers


def test_trackers_are_closed_if_the_metrics_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text("broken\n{}\n")
    closed: list[str] = []

    class Open(Trackers):
        def close(self, seconds: float = 0.0) -> None:
            closed.append("closed")

    monkeypatch.setattr(assembly, "keep_settings", lambda *_: [])
    monkeypatch.setattr(assembly, "write_environment", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(assembly, "open_trackers", lambda *_: Open([], print))
    taken: Any = SimpleNamespace(start=None)
    place = assembly._Place(tmp_path, None, 0, taken)
    console: Any = SimpleNamespace(warn=print)
    with pytest.raises(DataError, match=r"metrics\.jsonl"), ExitStack() as stack:
        assembly._open_leader(Config(), place, tmp_path, taken, console, stack)
    assert closed == ["closed"]
