"""Why: code of the user's is imported by every process, and what is wrong with it has to be said once and in one line.

Losses are in tests/algorithm/test_adding_a_loss.py.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo.errors import ConfigError
from megatron_fipo.plugins import check_call, load_function, source_file

ROOT = Path(__file__).resolve().parents[1]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_and_a_module_beside_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "json.py", "from neighbour import VALUE\ndef own(): return VALUE\n")
    write(tmp_path / "neighbour.py", "VALUE = 3\n")
    write(tmp_path / "plugin_package" / "inner.py", "def own(): return 4\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert load_function("json.py:own", "key")() == 3
    assert "dumps" in dir(__import__("json")), "an installed module of the same name stays"
    assert load_function("plugin_package.inner:own", "key")() == 4
    assert source_file("json.py:own", "key") == tmp_path / "json.py"
    assert load_function("json.py:own", "key") is load_function("json.py:own", "key")


@pytest.mark.slow
def test_every_way_of_starting_finds_a_module_of_the_working_directory(tmp_path: Path) -> None:
    write(tmp_path / "own_module.py", "def own(): return 5\n")
    code = "import sys; sys.path.pop(0); from megatron_fipo.plugins import load_function; "
    code += "print(load_function('own_module:own', 'key')())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout == "5\n", done.stderr


@pytest.mark.parametrize(
    ("text", "content", "said"),
    [
        ("FILE", "", "does not name a function"),
        ("FILE:", "", "does not name a function"),
        ("a-b:own", "", "does not name a function"),
        ("no_such_module_at_all:own", "", "No module named"),
        ("nowhere.py:own", "", "is not found from"),
        ("FILE:other", "def own(): pass\n", "its functions: own"),
        ("FILE:own", "own = 3\n", "has no function own"),
        ("FILE:own", "def own(:\n", "line 1"),
        ("FILE:own", "import math\n\nmath.nothing\n", "line 3"),
        ("FILE:own", "import sys\nsys.exit(3)\n", "SystemExit"),
    ],
)
def test_what_cannot_be_loaded_is_one_line_that_says_where(tmp_path: Path, text: str, content: str, said: str) -> None:
    path = write(tmp_path / "mine.py", content)
    with pytest.raises(ConfigError, match=said) as refusal:
        load_function(text.replace("FILE", str(path)), "algorithm.loss")
    assert refusal.value.key == "algorithm.loss" and "\n" not in str(refusal.value)


def test_a_call_that_does_not_fit_is_told_by_the_definition() -> None:
    def own(inputs, config, *, epsilon, tau=1.0):
        return inputs, config, epsilon, tau

    check_call(own, 2, {"epsilon": 1}, "f.py:own", "algorithm.loss")
    check_call(lambda *values, **options: None, 2, {"anything": 1}, "f.py:own", "algorithm.loss")
    for options, key, said in (
        ({}, "algorithm.loss", "missing a required argument: 'epsilon'|epsilon"),
        ({"epsilon": 1, "tua": 2}, "algorithm.loss_options", "tua.*own\\(inputs, config, \\*, epsilon, tau=1.0\\)"),
    ):
        with pytest.raises(ConfigError, match=said) as refusal:
            check_call(own, 2, options, "f.py:own", "algorithm.loss")
        assert refusal.value.key == key
    with pytest.raises(ConfigError, match="cannot be called"):
        check_call(lambda inputs: None, 2, {}, "f.py:own", "algorithm.loss")
