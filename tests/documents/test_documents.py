"""Why: a command in a page that fails costs each reader much time. So each command is run here, or its settings are
checked here as in a run, or the table below says which test runs it, or what it needs that no test has.

Not covered: the output of the commands, which the pages quote.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo.cli import COMMANDS
from megatron_fipo.config.checks import check
from megatron_fipo.config.configure import load_config
from megatron_fipo.launch.sweep import plan
from tests.documents.commands import PAGES, ROOT, Command, commands_of

SHOWN = [command for page in PAGES for command in commands_of(page)]
CONFIGURED = ("train", "evaluate", "preflight", "planner", "simulate")
"""Commands that take a whole configuration as key=value."""
ELSEWHERE = {
    r"make test-gpu": "needs CUDA",
    r"(\S+/)?python3? -m benchmarks\.": "tests/test_benchmarks.py",
    r"(\S+/)?python3? -m tests\.te_on_cpu": "tests/te_on_cpu/test_run.py",
    r"(\S+/)?(python3? )?tools/convert_hf\.py": "tests/tools/test_convert_hf.py",
    r"(\S+/)?python3? (tools/offline_(install|bundle)|bundle/install)\.py": "tests/tools/test_offline_bundle.py",
    r"(\S+/)?pip install": "needs a network; .ci/run installs in the same order",
    r"megatron-fipo export": "tests/test_export.py, tests/exporting/test_hub_upload.py",
    r"hf download": "needs a network; tests/config/test_model_places.py fetches by the same library",
    r"vllm serve": "tests/rollout/test_servers.py starts such servers by the product's own command",
    r"megatron-fipo compare": "tests/comparison/test_compare.py",
    r"(\S+/)?megatron-fipo (doctor|--help|--version)": "tests/test_cli.py",
    r"(\S+/)?megatron-fipo inspect": "tests/test_inspect.py",
    r"cp slurm/site\.example\.sh": "tests/slurm/test_site.py",
    r"scancel --batch --signal=USR1": "tests/slurm/test_slurm.py",
    r"make (env|docs|lint|format|clean)": "the Makefile's target is looked up, and .ci/run calls it",
    r"python -m megatron_fipo\.train --config-dir": "tests/fuzz/test_found.py",
    r"mkdocs serve": "make docs builds the same pages",
}


def is_setting(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def settings_of(command: Command) -> list[str] | None:
    """Return the overrides of a command that composes a configuration; None for other commands."""
    words = command.words
    if words[0] == "srun":
        words = words[1:]
    if words[0].endswith(("python", "python3")) and words[1:2] == ["-m"]:
        name, rest = words[2].removeprefix("megatron_fipo."), words[3:]
    elif words[0].endswith("megatron-fipo"):
        name, rest = words[1], words[2:]
    elif words[:2] == ["make", "train"]:
        name, rest = "train", [part for word in words[2:] if word.startswith("ARGS=") for part in word[5:].split()]
    elif script := next((word for word in words if re.fullmatch(r"(\S*/)?slurm/(fipo|dapo)_\w+\.sh", word)), None):
        experiment = Path(script).stem
        return [f"experiment={experiment}", *filter(is_setting, words[words.index(script) + 1 :])]
    else:
        return None
    if name not in CONFIGURED or {"-m", "--multirun", "--config-dir"} & set(rest):
        return None
    return [word for word in rest if is_setting(word)]


def test_there_are_commands() -> None:
    """The control: a collector that finds nothing would pass everything below."""
    found = {command.text for command in SHOWN}
    assert {"make train", "make test", "slurm/fipo_7b.sh"} <= found and len(found) > 40


@pytest.mark.parametrize("command", SHOWN, ids=str)
def test_a_command_is_right_or_says_what_it_needs(command: Command) -> None:
    if command.words[:3] == ["megatron-fipo", "train", "-m"]:
        for member in plan(command.words[3:]):
            check(member.config, world_size=None, local=False)
        return
    settings = settings_of(command)
    if settings is not None:
        check(load_config(settings), world_size=None, local=False)
        return
    if command.text.startswith("make "):
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert command.words[1] in targets, f"{command}: the Makefile has no such target"
        return
    known = [where for pattern, where in ELSEWHERE.items() if re.match(pattern, command.text)]
    assert known, f"{command}: run it in a test, or say in ELSEWHERE which test does, or what it needs"
    for path in re.findall(r"tests/\S+\.py", known[0]):
        assert (ROOT / path).is_file()


def test_every_command_of_the_package_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert not [name for name in COMMANDS if name not in readme]


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Broken links, and pages that the navigation lacks, are errors."""
    built = build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site/index.html").is_file()


def test_a_broken_link_is_an_error(tmp_path: Path) -> None:
    """The control."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("[nowhere](nowhere.md)\n")
    settings = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(settings[: settings.index("nav:")])
    built = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert built.returncode != 0 and "nowhere.md" in built.stderr


def build(settings: Path, into: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(settings), "-d", str(into)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
