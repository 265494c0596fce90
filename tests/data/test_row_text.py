"""All columns of a row as JSON, as rewards receive them.

Why: a value that JSON does not have would end a run during loading, or would depend on the file's format.
"""

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_fipo.data.readers import read_rows
from megatron_fipo.data.row_text import row_text


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ("é\ud800", "é\ud800"),
        (Decimal("0.10"), 0.1),
        (10**30, 10**30),
        (numpy.float32(0.5), 0.5),
        (numpy.int64(3), 3),
        (True, True),
        ({"a": (1, None)}, {"a": [1, None]}),
        ({1: "x"}, {"1": "x"}),
        (datetime.date(2026, 1, 31), "2026-01-31"),
        (datetime.timedelta(minutes=1), 60.0),
        (b"text", "text"),
        (b"\xff", "/w=="),
    ],
)
def test_values_are_plain(value: Any, plain: Any) -> None:
    (found,) = json.loads(row_text({"column": value})).values()
    assert found == plain and type(found) is type(plain)


def test_a_table_gives_all_its_columns_only_when_they_are_asked_for(tmp_path: Path) -> None:
    rows = [{"prompt": "a?", "answer": "3", "when": datetime.datetime(2026, 1, 31), "tests": [{"in": "1", "out": "2"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (_, some), *_ = read_rows(tmp_path / "a.parquet", ["prompt", "answer"], "source")
    (_, every), *_ = read_rows(tmp_path / "a.parquet", ["prompt", "answer"], "source", every=True)
    assert set(some) == {"prompt", "answer"}
    assert json.loads(row_text(every)) == rows[0] | {"when": "2026-01-31T00:00:00"}
