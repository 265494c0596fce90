"""The embedded code task: the column sums of the embedded task, with tests for what the model writes as a program.

    4+5+8+0=?                                           the problem
    4+5=9. 9+8=7. 7+0=7. Answer: 7                      a response; its program is print((7) % 10)
    {"inputs": [""], "outputs": ["7"]}                  its tests

The embedded model has learnt no language but sums, so its programs are sums: `Answer: 4+5+8+0` is as right as
`Answer: 7`. conf/reward/tiny_code.yaml has the pattern and the template. To make the files again:

    python -m megatron_fipo.data.column_programs --out megatron_fipo/assets
"""

import argparse
import json
from pathlib import Path

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.files import write_atomically

_SIZES = {"train": 1000, "validation": 128}


def write_problems(directory: Path) -> None:
    """Write tiny_code_train.jsonl and tiny_code_validation.jsonl, of the first problems of the embedded task's files.

    So the base model has seen no held-out problem.
    """
    for split, size in _SIZES.items():
        lines = resolve_embedded(f"embedded:tiny_{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = "".join(_row(json.loads(line)) for line in lines[:size])
        write_atomically(directory / f"tiny_code_{split}.jsonl", rows.encode())


def _row(row: dict[str, object]) -> str:
    truth = row["reward_model"]
    assert isinstance(truth, dict)
    tests = {"inputs": [""], "outputs": [truth["ground_truth"]]}
    made = {"data_source": "column_programs", "prompt": row["prompt"], "input_output": tests}
    return json.dumps(made, separators=(",", ":")) + "\n"


def main() -> None:
    """Write the problem files."""
    parser = argparse.ArgumentParser(description="Make the embedded code task's problem files.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write to")
    write_problems(parser.parse_args().out)


if __name__ == "__main__":
    main()
