"""Writes docs/configuration.md from the schema and conf/, so that neither can drift from its documentation.

python tools/reference.py            writes it
python tools/reference.py --check    fails if it is out of date
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from megatron_fipo.config import every_setting, sections
from megatron_fipo.config.configure import configuration_directory, configuration_groups

_OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

_HEADER = """\
# Configuration

<!-- Written by tools/reference.py from megatron_fipo/config/ and conf/: change those, then `make format`. -->

A run is one choice from each group of `conf/` plus an **experiment**, which chooses from the other groups and sets the
sizes. Precedence, weakest first: the schema's defaults, the groups' files, the experiment's own lines, single keys on
the command line. A group named on the command line replaces the experiment's choice.

```
python -m megatron_fipo.train                                            # experiment=tiny
python -m megatron_fipo.train algorithm=dapo                             # the same run, another algorithm
python -m megatron_fipo.train experiment=fipo_7b optimizer.lr=5e-7       # one key
python -m megatron_fipo.train experiment=fipo_32b --cfg job              # print it and stop
python -m megatron_fipo.train --config-dir my_conf experiment=mine       # my_conf/experiment/mine.yaml
python -m megatron_fipo.train +data.task_options.max_terms=6             # a key that reasoning-gym knows: with a plus
```

A wrong key, type, range or combination ends with exit code 2 and one line that names the key and what would be right.
`algorithm=fipo` has the influence band of the published 32B run and `algorithm=fipo_7b` that of the 7B run. The
recipes' "10 warm-up steps" are training steps; `optimizer.warmup_updates` counts optimizer updates, and so is 10 times
the updates a step.
"""


def reference() -> str:
    """The whole page."""
    return "\n".join([_HEADER, "## Groups\n", *_groups(), "\n## Keys", *_keys()])


def _groups() -> Iterator[str]:
    yield "| group | choice | what it is |\n| --- | --- | --- |"
    for group in configuration_groups():
        for path in sorted((configuration_directory() / group).glob("*.yaml")):
            yield f"| `{group}` | `{path.stem}` | {_first_comment(path)} |"


def _first_comment(path: Path) -> str:
    """What the file says it is: its first comment that is no directive of Hydra's."""
    comments = (line[2:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
    return next(comment for comment in comments if not comment.startswith("@"))


def _keys() -> Iterator[str]:
    settings = list(every_setting())
    for name, kind in sections():
        doc = " ".join((kind.__doc__ or "").split())
        yield f"\n### {name}\n\n{doc}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |"
        for key, entry in settings:
            if key.rpartition(".")[0] == name:
                yield f"| `{key}` | {_type(entry)} | {_default(entry)} | {_meaning(entry)} |"


def _type(entry: Field) -> str:
    kinds = [kind for kind in get_args(entry.type) if kind is not NoneType]
    if NoneType in get_args(entry.type):
        return f"{kinds[0].__name__} or null"
    return str(entry.type) if kinds else getattr(entry.type, "__name__", str(entry.type))


def _default(entry: Field) -> str:
    value: Any = entry.default if entry.default is not MISSING else entry.default_factory()  # type: ignore[misc]
    if value is None:
        return "`null`"
    text = str(value).lower() if isinstance(value, bool) else str(value).replace("\n", "\\n")
    return f"`{text}`" if text else "empty"


def _meaning(entry: Field) -> str:
    limits = entry.metadata
    ranges = [
        f"{words} {limits[name]:g}"
        for name, words in (("minimum", "≥"), ("maximum", "≤"), ("above", ">"))
        if limits[name] is not None
    ]
    if limits["choices"]:
        ranges.append("one of " + ", ".join(f"`{choice}`" for choice in limits["choices"]))
    doc = limits["doc"].replace("|", "\\|")
    return f"{doc} ({'; '.join(ranges)})" if ranges else doc


def main() -> None:
    """Write the page, or with --check compare it with the one that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if docs/configuration.md is out of date")
    page = reference()
    if not parser.parse_args().check:
        _OUTPUT.write_text(page + "\n", encoding="utf-8")
        print(f"wrote {_OUTPUT}")
    elif not _OUTPUT.is_file() or _OUTPUT.read_text(encoding="utf-8") != page + "\n":
        sys.exit(f"error: {_OUTPUT} is out of date (python tools/reference.py writes it)")


if __name__ == "__main__":
    main()
