"""The commands in the README and the pages of docs/, as a reader would copy them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FIRST_WORDS = (
    *("make", "python", "python3", "pip", "megatron-fipo", "sbatch", "srun", "torchrun", "vllm", "tensorboard", "git"),
    *("docker", "apptainer", "hf", "cp", "scancel", "squeue", "bash", "jupyter", "mkdocs", "salloc"),
)
_COMMAND = re.compile(rf"^(?:{'|'.join(FIRST_WORDS)}|\S*/(?:bin/\S+|\S+\.(?:sh|py)))(?: |$)")
_PLACEHOLDERS = re.compile(r"\[[A-Z]+(?:\.\.\.)?\]|…|\.\.\.$")


@dataclass(frozen=True)
class Command:
    """One command of a document."""

    page: Path
    line: int
    text: str
    """Without its comment and the variables set in front, its continuation lines joined."""

    @property
    def words(self) -> list[str]:
        """Its words as the shell splits them, without placeholders such as [OVERRIDE...]."""
        return shlex.split(_PLACEHOLDERS.sub("", self.text))

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}: {self.text}"


def commands_of(page: Path) -> Iterator[Command]:
    """Return every command in the page's indented and fenced blocks."""
    lines = page.read_text(encoding="utf-8").splitlines()
    is_fenced, number = False, 0
    while number < len(lines):
        start, line = number, lines[number]
        number += 1
        if line.lstrip().startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    "):
            text = line.strip().removeprefix("$ ")
            while text.endswith("\\") and number < len(lines):
                text = f"{text[:-1].rstrip()} {lines[number].strip()}"
                number += 1
            text = re.sub(r"^(?:[A-Z_]+=\S* )+", "", re.sub(r"\s+#.*$", "", text))
            if _COMMAND.match(text):
                yield Command(page, start + 1, text)
