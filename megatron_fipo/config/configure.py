"""Turn the command line into a validated Config: Hydra composes it, the schema gives the types, `checks` checks it.

Imports neither torch nor megatron, so that a mistake on the command line is reported quickly.
"""

import contextlib
import difflib
import functools
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_fipo.config import Config, every_setting, resolved, sections
from megatron_fipo.config.checks import check
from megatron_fipo.config.errors import below_null_section, check_overrides, readable, unknown_key
from megatron_fipo.config.explain import explain
from megatron_fipo.errors import ConfigError, FipoError, RefusedOnRank0
from megatron_fipo.models.keys import shown
from megatron_fipo.processes import reasons

ConfigStore.instance().store(name="schema", node=Config)

_HYDRA_VERSION = "1.3"
# Exceptions that composing can raise. Where Hydra and OmegaConf do not check a value, Python's and PyYAML's own appear.
_FAILURES: tuple[type[Exception], ...] = (
    *(HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, RecursionError),
    *(ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError),
)
_TRACEBACKS = "HYDRA_FULL_ERROR"
_FIRST_RANK_SPEAKS_S = 2.0
RESOLVED = "--resolved"
"""The flag of a command line that consists of this flag and a file with a whole configuration."""


def run_with_config(
    main: Callable[[Config], Any],
    *,
    local: bool = True,
    judge: Callable[[Config], list[str]] | None = None,
    usage: str | None = None,
) -> None:
    """Call `main` with the validated configuration that the command line describes.

    Without `local`, files and servers on this machine are not checked. `judge` is for entry points that do not train:
    it is called instead of `check`, and returns warnings too. `usage` is the text of --help for commands other than
    train.

    This function handles --help, --cfg and Hydra's other flags itself. A FipoError, from the configuration or from
    `main`, ends the process with one line on stderr and the error's exit code, which is 2 for a wrong configuration.
    HYDRA_FULL_ERROR=1 shows the traceback instead.
    """
    with refusals_in_one_line():
        config = _config_from_command_line(usage)
        for warning in judge(config) if judge else check(config, world_size=_world_size(), local=local):
            if _speaks_for_the_run():
                print(f"warning: {warning}", file=sys.stderr)
        main(config)


@contextlib.contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """If the block raises a FipoError, end the process with one line on stderr and the error's exit code."""
    with_traceback = os.environ.get(_TRACEBACKS) == "1"
    try:
        yield
    except FipoError as error:
        if with_traceback:
            raise
        _end(error)


def load_config(overrides: Sequence[str] = ()) -> Config:
    """Return the typed configuration for overrides such as ["experiment=fipo_32b"], without the checks of `check`.

    For tools and tests. Entry points use `run_with_config`. Raises ConfigError.
    """
    try:
        check_overrides(overrides, configuration_groups())
        with hydra.initialize_config_dir(str(configuration_directory()), version_base=_HYDRA_VERSION):
            return _to_config(hydra.compose("config", list(overrides)))
    except _FAILURES as error:
        raise _refusal(error, overrides) from error


def configuration_directory() -> Path:
    """Return the directory conf/: inside an installed package, or beside the package in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "conf", package.parent / "conf")
    for directory in candidates:
        if (directory / "config.yaml").is_file():
            return directory
    raise ConfigError(
        "conf", f"config.yaml is neither in {candidates[0]} nor in {candidates[1]}", "reinstall the package"
    )


def configuration_groups() -> list[str]:
    """Return the names of the groups: the directories in conf/, except for Hydra's own."""
    return sorted(path.name for path in configuration_directory().iterdir() if path.is_dir() and path.name != "hydra")


def _config_from_command_line(usage: str | None) -> Config:
    """Compose the configuration by hydra.main, and return it. The run itself happens outside of Hydra."""
    if sys.argv[1:2] == [RESOLVED] and len(sys.argv) == 3:
        return resolved.read(Path(sys.argv[2]))
    named = [text for text in sys.argv[1:] if not text.startswith("-") and "=" not in text]
    if (named or usage) and {"-h", "--help"} & set(sys.argv[1:]):
        print(explain(named) if named else usage)
        raise SystemExit(0)
    composed: list[DictConfig] = []

    def keep(config: DictConfig) -> None:
        composed.append(config)

    if {"-m", "--multirun"} & set(sys.argv[1:]):
        raise ConfigError("--multirun", "this command takes one configuration", "megatron-fipo train takes several")
    entry = hydra.main(version_base=_HYDRA_VERSION, config_path=str(configuration_directory()), config_name="config")
    with_traceback = os.environ.get(_TRACEBACKS)
    # Hydra's own handler prints several lines and exits with 1. With this variable Hydra raises the exception instead.
    os.environ[_TRACEBACKS] = "1"
    try:
        with _flags_in_one_line():
            check_overrides([text for text in sys.argv[1:] if not text.startswith("-")], configuration_groups())
            entry(keep)()
        if not composed:
            raise SystemExit(0)
        return _to_config(composed[0])
    except _FAILURES as error:
        raise _refusal(error, sys.argv[1:]) from error
    finally:
        if with_traceback is None:
            del os.environ[_TRACEBACKS]
        else:
            os.environ[_TRACEBACKS] = with_traceback


@contextlib.contextmanager
def _flags_in_one_line() -> Iterator[None]:
    """Report in one line what argparse, which reads Hydra's flags, reports in ten lines."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        if end.code == 2 and (lines := said.getvalue().splitlines()):
            problem = lines[-1].partition("error: ")[2][:300]
            raise ConfigError("command line", problem, f"{_nearest_flag(problem)}--help shows flags") from None
        raise
    finally:
        if not said.getvalue().startswith("usage: "):
            sys.stderr.write(said.getvalue())


def _nearest_flag(problem: str) -> str:
    """Return a question that suggests the nearest flag of Hydra's command line, or an empty text."""
    unknown = re.search(r"unrecognized arguments: (-\S+)", problem)
    known = get_args_parser()._option_string_actions if unknown else {}
    near = difflib.get_close_matches(unknown[1], [*known, "--multirun"], n=1, cutoff=0.5) if unknown else []
    return f"did you mean {near[0]}? " if near else ""


def _refusal(error: Exception, overrides: Sequence[str]) -> Exception:
    if isinstance(error, AssertionError):
        return below_null_section() if "NoneType" in str(error) else error
    if isinstance(error, UnicodeDecodeError):
        name = next(_files_of_other_encodings(), "one of the YAML files")
        return ConfigError("configuration", f"{name} is not UTF-8 text: {error.reason}", "save it as UTF-8")
    refusal = readable(error, configuration_groups())
    if refusal.key == "configuration" and ".yaml" not in refusal.problem:
        # Hydra names neither key nor file here. The overrides show where to look.
        return ConfigError(f"configuration of {' '.join(overrides)[:200]}", refusal.problem, refusal.remedy)
    return refusal


def _files_of_other_encodings() -> Iterator[str]:
    """Yield the YAML files that are not UTF-8, in conf/ and in the directories that the command line names.

    Python's error does not name the file.
    """
    places = [configuration_directory(), *(Path(text.rpartition("=")[2]) for text in sys.argv[1:] if "dir" in text)]
    for path in (path for place in places if place.is_dir() for path in place.rglob("*.yaml")):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            yield str(path)


def _to_config(composed: DictConfig) -> Config:
    _refuse_added_keys(OmegaConf.to_container(composed))
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    for name, kind in sections():
        value = functools.reduce(lambda part, field: part and getattr(part, field), name.split("."), config)
        if value is not None and not isinstance(value, kind):
            raise ConfigError(name, f"{shown(value)} is not a section", f"set its keys, such as {name}.KEY=VALUE")
    return config


def _refuse_added_keys(tree: Any, prefix: str = "") -> None:
    """Refuse keys outside the schema that `+key=value` has added. OmegaConf allows them, but nothing reads them."""
    known = {key for key, _ in every_setting()}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in known:
            continue
        if not any(other.startswith(f"{key}.") for other in known):
            raise unknown_key(key, configuration_groups())
        if isinstance(value, dict):
            _refuse_added_keys(value, f"{key}.")


def _world_size() -> int | None:
    """Return the number of ranks if a launcher has started this process as one of them, else None."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


def _speaks_for_the_run() -> bool:
    """Return whether this process prints messages for the run: the launcher of the ranks, or else the first rank."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0" and "TORCHELASTIC_RUN_ID" in os.environ
    return os.environ.get("SLURM_PROCID", "0") == "0"


def _end(error: FipoError) -> NoReturn:
    """Report the error from only one process: the launcher, if it asked for reports, or else the first rank."""
    if not reasons.tell(error):
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
            time.sleep(
                _FIRST_RANK_SPEAKS_S
            )  # if the first rank reports the same error, the launcher ends this process meanwhile
        if not isinstance(error, RefusedOnRank0):
            print(f"error: {error}", file=sys.stderr)
    raise SystemExit(error.exit_code)
