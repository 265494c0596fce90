"""Why: intervals are computed from these files long after a run. An error must name a damaged file.

Not covered: files of other versions, which do not exist yet.
"""

import math

import pytest

from megatron_fipo.errors import DataError
from megatron_fipo.tracking.problem_files import path_of_step, read_problems, write_problems
from megatron_fipo.tracking.validation import score
from tests.tracking.groups import make_group


def test_scores_come_back_as_they_were(tmp_path):
    problems = score([make_group("9917", "9", name="a"), make_group("TCTC", "9", name="b")], k=4).problems
    path = path_of_step(tmp_path, 20)
    write_problems(path, problems)
    assert path.name == "step-000020.parquet"
    first, second = read_problems(path)
    assert first == problems[0] and (first.judged, first.right, first.accuracy) == (4, 2, 0.5)
    assert math.isnan(second.accuracy) and (second.judged, second.timeout, second.crash) == (0, 2, 2)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "step-000001.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"step-000001.parquet cannot be read"):
        read_problems(path)
