"""Problem files for tests, in every format."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

FORMATS = (".parquet", ".jsonl", ".json", ".arrow")


def row(content: str, answer: object = "7") -> dict[str, Any]:
    """A row in the columns of DAPO-Math-17k."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": content, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "0"},
    }


def write(path: Path, rows: list[dict[str, Any]] | pa.Table) -> str:
    """Write rows in the format given by the file's name. Return the name."""
    if path.suffix in (".parquet", ".arrow"):
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
        if path.suffix == ".parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_stream(str(path), table.schema) as sink:
                sink.write_table(table)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)
