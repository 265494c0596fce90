"""Why: the page shows rounded values. How far they are rounded, and how large the page becomes, must not drift."""

import base64
import math
import zlib
from pathlib import Path

import numpy
import pytest

from megatron_fipo import inspect
from megatron_fipo.config.configure import load_config
from megatron_fipo.credit_page.pack import COLUMNS, Column, codes, columns_of, packed, scale
from megatron_fipo.credit_page.page import credit_page, write_credit_page
from megatron_fipo.tracking.credit_file import credit_path, read_credit, write_credit
from megatron_fipo.tracking.report import Report
from tests.credit_page.made_up import ABOUT, response


def decoded(found: numpy.ndarray, column: Column) -> numpy.ndarray:
    if column.step is not None:
        return found * column.step
    return numpy.sinh(found * scale()["perCode"]) * scale()["finest"]


def test_values_are_rounded_as_the_page_says() -> None:
    values = numpy.array([0, 1e-5, -0.003, 0.182, 1.7, -19.9, 60])
    for column in COLUMNS:
        if column.step is None:
            found = decoded(codes(values, column), column)
            assert found[0] == 0 and (abs(found - values) <= 0.004 * abs(values) + 1e-6).all()
    influence = next(column for column in COLUMNS if column.name == "influence")
    assert decoded(codes(numpy.array([0.8, 1.0, 1.2]), influence), influence).tolist() == pytest.approx([0.8, 1.0, 1.2])
    special = codes(numpy.array([math.nan, math.inf, -math.inf]), COLUMNS[0])
    assert special[0] == scale()["missing"] and special[1] == -special[2] == 2**15 - 1


def test_columns_without_values_are_left_out() -> None:
    assert [column.name for column in columns_of([response(5, 9)])] == [column.name for column in COLUMNS[:-1]]


def test_weights_beyond_16_are_shown_as_they_are() -> None:
    """Linear codes of 16 bits end there, and future_kl.band_high may be larger."""
    far = response(5, 9)
    far.credit.values["influence"][:] = 400.0
    (column,) = [column for column in columns_of([response(4, 9), far]) if column.name == "influence"]
    assert decoded(codes(far.credit.values["influence"], column), column) == pytest.approx(400, rel=0.004)


def test_a_page_of_64_responses_of_4000_tokens_is_below_5_mb() -> None:
    responses = [response(place, 4000) for place in range(64)]
    page = credit_page("run", ABOUT, responses)
    size = len(page.encode())
    assert size < 5e6, size
    whole = zlib.decompress(base64.b64decode(packed(responses[9], columns_of(responses))))
    assert whole[4:].startswith("".join(responses[9].tokens)[:40].encode())


def test_text_of_a_model_cannot_end_the_script() -> None:
    page = credit_page("run", ABOUT, [response(5, 9)])
    assert page.count("</script>") == 4, "three scripts and the data"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(tmp_path), "--credit"]) == 2
    assert "tracking.credit.responses" in (refused := capsys.readouterr().err) and refused.count("\n") == 1
    write_credit(credit_path(tmp_path, 7), ABOUT, [response(place, 9) for place in range(8)])
    about, responses = read_credit(credit_path(tmp_path, 7))
    assert about == ABOUT and len(responses) == 8
    assert inspect.main([str(tmp_path), "--credit"]) == 0
    assert "step 7, 8 responses" in capsys.readouterr().out and (tmp_path / "credit.html").is_file()
    assert inspect.main([str(tmp_path), "--credit", "--step", "3"]) == 2
    assert "there are steps 7" in (refused := capsys.readouterr().err) and refused.count("\n") == 1
    credit_path(tmp_path, 7).write_bytes(b"PAR1 no more")
    assert inspect.main([str(tmp_path), "--credit"]) != 0
    assert "step-000007.parquet" in (refused := capsys.readouterr().err) and refused.count("\n") == 1


def test_the_report_has_a_link_once_the_page_is_there(tmp_path: Path) -> None:
    with Report(tmp_path, load_config([]), print) as report:
        assert 'href="credit.html"' not in (tmp_path / "report.html").read_text()
        write_credit(credit_path(tmp_path, 7), ABOUT, [response(0, 9)])
        assert write_credit_page(tmp_path, 7) == 1
        report.finish(1.0, [])
    assert 'href="credit.html"' in (tmp_path / "report.html").read_text()
