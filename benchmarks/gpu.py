"""Test and measure this package on a GPU, the most important parts first, into one results file.

    python -m benchmarks.gpu --results gpu.jsonl             all parts that the file does not have yet
    python -m benchmarks.gpu --results gpu.jsonl --table     the tables of what it has
    python -m benchmarks.gpu --results x.jsonl --tiny        sizes for a CPU: shows that everything runs

Each part runs in its own process, within a time limit. Its rows are written to the file when it ends. So an interrupted
run loses only one part, and continues there when it is started again.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import RESULT

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A command for gpu_parts.py."""

    command: tuple[str, ...]
    limit_s: int

    @property
    def name(self) -> str:
        """Its name in the results file."""
        return " ".join(self.command)


SIZES = [(shape, length) for shape in ("7b", "1.5b", "0.5b") for length in ("4096", "16384")]
LOCAL = [Part(("update", *size, "local", "off"), 120) for size in (*SIZES, ("30b_a3b", "16384"))]
ENGINE = [
    *(Part(("update", "7b", "16384", "transformer_engine", fp8), 150) for fp8 in ("off", "tensorwise", "blockwise")),
    *(Part(("update", *size, "transformer_engine", "off"), 120) for size in SIZES if size != ("7b", "16384")),
    Part(("update", "7b", "16384", "transformer_engine", "delayed"), 150),
    *(Part(("update", "30b_a3b", "16384", "transformer_engine", fp8), 150) for fp8 in ("off", "tensorwise")),
]
PARTS = [
    Part(("ceilings",), 60),
    Part(("credit",), 90),
    Part(("log_probs",), 60),
    Part(("ipc",), 60),
    *LOCAL,
    *ENGINE,
]


def what_is_here() -> Row:
    """Return the GPU and all versions on which the figures of the file are measured. Missing packages are named."""
    import torch

    versions = {"torch": str(torch.__version__)}
    for name in ("megatron-core", "transformer-engine", "vllm", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"gpu": gpu, "versions": versions}


def run(part: Part, tiny: bool) -> Row:
    """Return a part's record: its rows, and the reason if it failed."""
    start = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu_parts", *part.command, *(["--tiny"] if tiny else [])]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            output, _ = process.communicate(timeout=part.limit_s)
            failure = None if process.returncode == 0 else f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            failure = f"over its {part.limit_s} s"
    lines = output.splitlines()
    rows = [json.loads(line.removeprefix(RESULT)) for line in lines if line.startswith(RESULT)]
    record: Row = {"part": part.name, "seconds": round(time.monotonic() - start, 1), "rows": rows}
    return record | ({"failure": f"{failure}: {' / '.join(lines[-3:])[-600:]}"} if failure else {})


def append(results: Path, record: Row) -> None:
    """Add a record. It is on the disk when this returns."""
    with results.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(results: Path) -> list[Row]:
    """Return the records so far. A last line that was cut off is ignored."""
    records = []
    for line in results.read_text().splitlines() if results.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def cell(value: Any) -> str:
    """Return a figure for a table, with three significant digits."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {100 * share:.0f} %" for name, share in value.items() if share >= 0.005)
    return "–" if value is None else str(value)


def print_tables(records: list[Row]) -> None:
    """Print Markdown: one table per kind of part, and a line for each part without a result."""
    for record in records:
        if "gpu" in record:
            print(f"\n{record['gpu']}; {', '.join(f'{name} {found}' for name, found in record['versions'].items())}")
    tables: dict[str, list[Row]] = {}
    for record in records:
        tables.setdefault(record.get("part", "").split(" ")[0], []).extend(record.get("rows", []))
    for name, rows in tables.items():
        if not rows:
            continue
        columns = list(rows[0])
        print(f"\n{name}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for row in rows:
            print(f"| {' | '.join(cell(row.get(column)) for column in columns)} |")
    for record in records:
        if "failure" in record:
            print(f"\n{record['part']}: {record['failure']}")


def main() -> None:
    """Run the parts that the file lacks, and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, required=True, help="file with one JSON line per part; created if missing"
    )
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--only", nargs="+", help="run only parts whose names begin with this")
    options = parser.parse_args()
    records = read(options.results)
    if not options.table:
        here = what_is_here()
        if here not in records:
            append(options.results, here)
        done = {record.get("part") for record in records if "failure" not in record}
        for part in PARTS:
            wanted = not options.only or any(part.name.startswith(start) for start in options.only)
            needs_engine = part in ENGINE and importlib.util.find_spec("transformer_engine") is None
            if part.name in done or not wanted or needs_engine:
                continue
            record = run(part, options.tiny)
            append(options.results, record)
            print(f"{part.name}: {record.get('failure', 'done')}, {record['seconds']} s", flush=True)
    print_tables(read(options.results))


if __name__ == "__main__":
    main()
