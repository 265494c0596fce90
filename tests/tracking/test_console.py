"""What the console prints, to a file and to a terminal. Not covered: how the live bar looks, only that it is there."""

import io
import time

import pytest

from megatron_fipo.tracking.console import Console
from megatron_fipo.tracking.console_table import COLUMNS, StepTable, duration
from megatron_fipo.tracking.validation import score
from tests.tracking.groups import make_group

ROW = {
    "reward_mean": -0.25,
    "accuracy": 0.375,
    "response_length_mean": 29.41,
    "influence_weights_std": 0.00512,
    "influence_clipfrac_low": 0.1,
    "influence_clipfrac_high": 0.025,
    "tokens_per_second": 12345.0,
    "ppo_kl": 1.25e-4,
    "seconds_sample": 1.25,
    "seconds_log_probs": 2.0,
    "seconds_step": 7.5,
    "log_prob_diff_mean": 9e-8,
}

LEARNS = "step reward acc length f std f clip"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("width", [20, 60, 80, 100, 120, 200])
def test_header_and_lines_have_one_width_that_fits(width):
    table = StepTable(width)
    lengths = {len(line) for line in (table.header(), table.line(ROW | {"step": 12}), table.line({"step": 1}))}
    assert len(lengths) == 1 and lengths.pop() <= width


@pytest.mark.parametrize(
    ("width", "titles"),
    [
        (80, f"{LEARNS} entropy grad |Δlogp| tok/s step s"),
        (100, f"{LEARNS} ppo_kl entropy grad |Δlogp| tok/s sample update step s"),
        (120, f"{LEARNS} ppo_kl entropy grad |Δlogp| tok/s sample verify logp update sync step s"),
        (200, " ".join(column.title for column in COLUMNS)),
    ],
)
def test_the_most_important_columns_stay(width, titles):
    table = StepTable(width)
    assert " ".join(table.header().split()) == titles
    assert len(table.line(ROW | {"step": 12}).split()) == len(table._columns)


def test_eighty_columns_show_what_a_step_is_about():
    cells = StepTable(80).line(ROW | {"step": 12}).split()
    assert cells == ["12", "-0.250", "0.375", "29.4", "0.0051", "12.5%", "-", "-", "9.0e-8", "12.3k", "7.5"]


def test_every_column_survives_extreme_numbers():
    names = ["reward_mean", "accuracy", "response_length_mean", "influence_weights_std", "influence_clipfrac_low"]
    names += ["ppo_kl", "grad_norm", "tokens_per_second", "seconds_sample", "seconds_step"]
    for value in (0.0, -1.0, 1e-12, 123456789.0, float("inf"), -float("inf")):
        assert StepTable(200).line(dict.fromkeys(names, value)).split().count("-") == len(COLUMNS) - len(names)
    assert "nan" not in StepTable(200).line({"step": 3, "grad_norm": float("nan"), "entropy": None})


def test_plain_output_has_no_control_characters():
    out = io.StringIO()
    with Console(total_steps=3, file=out) as console:
        with console.phase("sample") as phase:
            phase.progress(1, 2, "groups")
        console.validation(0, score([make_group("97", "9")], k=2))
        console.step_line({"step": 1, **ROW})
        console.warn("only [3] groups")
        console.step_line({"step": 2})
        console.validation(2, score([make_group("99", "9")], k=2))
    text = out.getvalue()
    assert all(character == "\n" or character.isprintable() for character in text)
    assert "warning: only [3] groups" in text
    assert "held-out, step 2: avg@2 1.000 (+0.500)" in text
    assert [line.split()[0] for line in text.splitlines()].count("step") == 1


def test_a_terminal_gets_the_bar_and_the_lines():
    out = Terminal()
    with Console(total_steps=3, file=out, width=80) as console:
        with console.phase("sample") as phase:
            phase.progress(1, 2, "groups")
            console._progress.refresh()
        console.step_line({"step": 1, **ROW})
    text = out.getvalue()
    assert "sample 1/2 groups" in text and "step 1/3" in text and "-0.250" in text
    assert text.endswith("\x1b[?25h") or "\x1b[?25h" in text  # the cursor is back


def test_the_header_is_repeated():
    out = io.StringIO()
    with Console(total_steps=50, file=out) as console:
        for step in range(1, 51):
            console.step_line({"step": step})
    headers = [index for index, line in enumerate(out.getvalue().splitlines()) if line.startswith("step")]
    assert headers == [1, 22, 43]  # after the legend, then each 20 lines


def test_phases_are_timed_without_counting_twice():
    console = Console(total_steps=1, file=io.StringIO())
    started = time.monotonic()
    with console.phase("validate"):
        time.sleep(0.02)
        with console.phase("log-probs"):
            time.sleep(0.05)
    elapsed = time.monotonic() - started
    seconds = console.take_seconds()
    assert set(seconds) == {"seconds_validate", "seconds_log_probs"}
    assert seconds["seconds_log_probs"] >= 0.05 and seconds["seconds_validate"] >= 0.02
    assert sum(seconds.values()) == pytest.approx(elapsed, abs=0.01)
    assert console.take_seconds() == {}
    inner, outer = console.take_spans()
    assert (inner.phase, outer.phase) == ("log-probs", "validate")
    assert outer.start <= inner.start and outer.seconds >= inner.seconds + 0.02
    assert console.take_spans() == []


def test_a_phase_that_fails_is_closed_and_the_terminal_restored():
    out = Terminal()
    with pytest.raises(RuntimeError), Console(total_steps=1, file=out, width=80) as console, console.phase("update"):
        raise RuntimeError
    assert "\x1b[?25h" in out.getvalue()
    assert "seconds_update" in console.take_seconds()


def test_other_ranks_print_nothing(tmp_path):
    out = Terminal()
    with Console(total_steps=1, enabled=False, file=out) as console:
        with console.phase("sample") as phase:
            phase.progress(1, 2)
        console.step_line({"step": 1})
        console.note("note")
        console.warn("warning")
        console.validation(1, score([make_group("9", "9")], k=1))
        console.finish({"accuracy_before": 0.1, "accuracy_after": 0.2}, tmp_path)
    assert out.getvalue() == ""
    assert console.take_spans() == [], "nobody takes them there: they would pile up"


def test_a_long_phase_gives_signs_of_life_in_a_log(monkeypatch):
    monkeypatch.setattr("megatron_fipo.tracking.console._SIGN_OF_LIFE_S", 0.0)
    out = io.StringIO()
    console = Console(total_steps=9, resumed_step=4, file=out)
    with console.phase("sample") as phase:
        phase.progress(128, 512, "groups")
    assert "step 5: sample 128/512 groups, 0 s" in out.getvalue()


def test_finish_shows_before_and_after_and_the_files(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    summary = {
        "accuracy_before": 0.48,
        "accuracy_after": 0.95,
        "response_length_before": 29.0,
        "response_length_after": 47.0,
        "steps": 40,
        "seconds": 132.0,
    }
    out = io.StringIO()
    with Console(total_steps=40, file=out) as console:
        console.finish(summary, tmp_path)
    text = out.getvalue()
    assert "+0.470" in text and "× 1.62" in text and "40 steps in 2 min 12 s" in text
    assert str(tmp_path) in text and "summary.json" in text and "report.html" not in text
    # A run without validation ends in peace.
    console.finish({"accuracy_before": None, "accuracy_after": None}, tmp_path)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")])
def test_duration(seconds, text):
    assert duration(seconds) == text
