"""Download the published recipe's data from Hugging Face: DAPO-Math-17k, and AIME 2024 and 2025 for validation.

    python tools/fetch_recipe_data.py               writes the three files of data=dapo_math_17k into data/
    python tools/fetch_recipe_data.py --out DIR

dapo-math-17k.parquet and aime-2024.parquet are ByteDance's own files. There is no such file for AIME 2025, so it is
made from the problems of math-ai/aime25 with the recipe's prompt. Existing files are kept. HF_ENDPOINT names a mirror.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_fipo.config.data import QUESTION, RECIPE_PROMPT
from megatron_fipo.errors import DataError, FipoError, one_line
from megatron_fipo.files import write_atomically

_AS_THEY_ARE = {
    "dapo-math-17k.parquet": ("BytedTsinghua-SIA/DAPO-Math-17k", "data/dapo-math-17k.parquet"),
    "aime-2024.parquet": ("BytedTsinghua-SIA/AIME-2024", "data/aime-2024.parquet"),
}
_AIME_2025 = ("math-ai/aime25", "test.jsonl")


def fetch(out: Path) -> None:
    """Write the missing ones of the three files. Each file is complete or absent. DataError if the hub refuses."""
    out.mkdir(parents=True, exist_ok=True)
    for name, (repository, file) in _AS_THEY_ARE.items():
        if not (out / name).is_file():
            write_atomically(out / name, _download(repository, file).read_bytes())
            print(f"{out / name}: done")
    if not (out / "aime-2025.parquet").is_file():
        write_atomically(out / "aime-2025.parquet", _as_parquet(_download(*_AIME_2025)))
        print(f"{out / 'aime-2025.parquet'}: done")


def _download(repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except Exception as error:  # the client raises exceptions of several libraries
        remedy = f"`hf download {repository} {file} --repo-type dataset` where there is a network, or HF_ENDPOINT"
        raise DataError(f"{repository}: {file} cannot be fetched from the hub: {one_line(error)}; {remedy}") from error


def _as_parquet(path: Path) -> bytes:
    """Return rows of problem and answer in DAPO-Math-17k's columns, as Parquet."""
    import pyarrow
    import pyarrow.parquet

    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            problem, answer = str(row["problem"]), str(int(row["answer"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, row {number}: has no problem with a whole number for answer: {error}") from None
        prompt = [{"role": "user", "content": RECIPE_PROMPT.replace(QUESTION, problem)}]
        truth = {"ground_truth": answer, "style": "rule"}
        rows.append({"data_source": "aime-2025", "prompt": prompt, "reward_model": truth})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def main() -> int:
    """Run the command line. The exit code is 0 if all files exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data"), metavar="DIR", help="default: %(default)s")
    try:
        fetch(parser.parse_args().out)
    except FipoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
