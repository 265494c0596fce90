"""The scores of each problem on disk: validation/step-NNNNNN.parquet of a run, problems.parquet of an evaluation.

An interval needs the problems: a mean of 30 of them says nothing about how much the choice of these 30 matters.
"""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

from megatron_fipo.errors import DataError
from megatron_fipo.files import write_atomically
from megatron_fipo.tracking.validation import ProblemScores

DIRECTORY = "validation"


def path_of_step(run_directory: Path, step: int) -> Path:
    """Where a run keeps the problems' scores of the validation after `step`."""
    return run_directory / DIRECTORY / f"step-{step:06d}.parquet"


def write_problems(path: Path, problems: Sequence[ProblemScores]) -> None:
    """Put one row a problem, with the columns of ProblemScores, at `path`, whose directory is made if need be."""
    # Imported here: what only reads a run's metrics need not wait for it.
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([dataclasses.asdict(problem) for problem in problems])
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content, compression="zstd")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())


def read_problems(path: Path) -> list[ProblemScores]:
    """The rows of such a file. DataError, naming it, if it cannot be read or has other columns."""
    import pyarrow
    import pyarrow.parquet

    columns = get_type_hints(ProblemScores)
    try:
        rows = pyarrow.parquet.ParquetFile(path).read(columns=list(columns)).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as problems' scores: {error}; remove it") from error
    for number, row in enumerate(rows, start=1):
        for name, kind in columns.items():
            if not isinstance(row.get(name), kind):
                raise DataError(f"{path}, row {number}: {name} is {row.get(name)!r}, no {kind.__name__}; remove it")
    return [ProblemScores(**row) for row in rows]
