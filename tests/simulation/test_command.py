"""Why: a table of modes is asked for on a laptop before a week of 128 GPUs is, so it has to be quick, to need nothing
that a laptop lacks, and to refuse in a line what it cannot play.

Not covered: whether the numbers come true; tests/simulation/test_run.py has those that can be worked out.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo import simulate
from megatron_fipo.config.configure import load_config
from megatron_fipo.simulation.options import MODE_NAMES
from megatron_fipo.simulation.scenarios import MODES, trainer_nodes

QUICK = ("--steps=2", "--warm-up=1", "--samples-at-once=256")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = simulate.main([*arguments, *QUICK])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, ""), captured.err
    return captured.out


def test_every_mode_has_a_row_and_the_splits_that_fit_are_tried(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "experiment=fipo_32b", "--mean=3700")
    assert tuple(mode.name for mode in MODES) == MODE_NAMES
    assert all(mode.title in text for mode in MODES)
    assert "8 + 8" in text and "16, in turns" in text and "Simulated, not measured" in text
    assert re.search(r"simulated in \d+\.\d s", text)


def test_16000_gpus_take_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = ("cluster.trainer_nodes=1000", "cluster.rollout_nodes=1000", "algorithm.prompts_per_step=8000")
    text = shown(capsys, "experiment=fipo_32b", "algorithm.mini_batch_prompts=1000", "--modes=rounds,k1", *nodes)
    seconds = re.search(r"simulated in (\d+\.\d) s", text)
    assert "16,000 GPUs" in text and seconds is not None and float(seconds[1]) < 30


def test_a_page_shows_trainer_and_engines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert f"written to {page}" in shown(capsys, "experiment=fipo_7b", "--modes=rounds,k1", f"--html={page}").replace(
        "\n", ""
    )
    text = page.read_text()
    assert '"kind":"timeline"' in text and '"engine 0"' in text and '"trainer"' in text and "window, k = 1" in text
    assert "http://" not in text.partition("<script>")[0], "it is one file"


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (
            ["experiment=fipo_32b", "--mean=30000"],
            "--mean: 30000 tokens are more than rollout.max_response_length=20480",
        ),
        (["--modes=rounds,k3"], "k3 is no mode; there are rounds, refill"),
        (["--rejected=1"], "1 should be from 0 to 0.95"),
        (["algorithm.filter_groups.enable=false", "--rejected=0.5"], "rejects no group"),
        (["--slow=2"], "2 should be a share up to 1 and a factor from 1"),
        (["--decode-s=fast"], "fast should be seconds"),
        (["--steps=none"], "invalid whole number value: 'none'"),
        (["--sede=1"], "did you mean --seed?"),
        (["run.stepz=1"], "run.stepz"),
        (["experiment=fipo_32b", "parallel.tensor=3"], "multiple of 12"),
        (["--html=nowhere/page.html", "--modes=rounds", *QUICK], "nowhere/page.html cannot be written"),
    ],
)
def test_what_cannot_be_played_is_refused_in_one_line(
    arguments: list[str],
    answer: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = simulate.main(arguments)
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and answer in error, error


def test_help_and_a_run_need_no_torch() -> None:
    check = "import sys; from megatron_fipo.simulate import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", check, "--modes=rounds", *QUICK]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.splitlines()[-1] == "False"


def test_help_of_a_section_is_the_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(["--help", "cluster.trainer_nodes"]) == 0
    assert capsys.readouterr().out.startswith("  cluster.trainer_nodes=")


def test_a_split_has_whole_sets_of_experts() -> None:
    """Else the search for the best split ended with the refusal of a split that nobody had asked for."""
    nodes = ["cluster.trainer_nodes=2", "cluster.rollout_nodes=2", "parallel.tensor=1", "parallel.sequence=false"]
    layout = [*nodes, "parallel.pipeline=2", "parallel.virtual_pipeline=null", "parallel.context=1"]
    assert trainer_nodes(load_config(["experiment=fipo_30b_a3b", *layout, "parallel.expert=8"])) == [2]
    assert trainer_nodes(load_config(["experiment=fipo_30b_a3b", *layout, "parallel.expert=4"])) == [1, 2, 3]
