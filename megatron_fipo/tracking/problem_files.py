"""The scores of each problem as files: validation/step-NNNNNN.parquet of a run, problems.parquet of an evaluation.

Confidence intervals need the scores of each problem: a mean over 30 problems does not show how much it depends on them.
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
    """Return the path of the problems' scores in the validation after `step`."""
    return run_directory / DIRECTORY / f"step-{step:06d}.parquet"


def write_problems(path: Path, problems: Sequence[ProblemScores]) -> None:
    """Write one row per problem, with the columns of ProblemScores, to `path`. Make its directory if needed."""
    # Imported here, so that code that only reads a run's metrics does not wait for it.
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([dataclasses.asdict(problem) for problem in problems])
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content, compression="zstd")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())


def read_problems(path: Path) -> list[ProblemScores]:
    """Read the rows of such a file. DataError, naming the file, if it cannot be read or has other columns."""
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
