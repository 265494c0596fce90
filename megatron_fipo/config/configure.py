"""From the command line to a validated Config: Hydra composes, the schema types, `checks` judges.

Imports neither torch nor megatron, so that a mistake on the command line is answered at once.
"""

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_fipo.config import Config, every_setting, sections
from megatron_fipo.config.checks import check
from megatron_fipo.config.errors import below_null_section, check_overrides, readable, unknown_key
from megatron_fipo.config.model_keys import shown
from megatron_fipo.errors import ConfigError, FipoError

ConfigStore.instance().store(name="schema", node=Config)

_HYDRA_VERSION = "1.3"
# What composing raises: where Hydra and OmegaConf forget to look at a value, Python's and PyYAML's own come through.
_FAILURES: tuple[type[Exception], ...] = (
    *(HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, RecursionError),
    *(ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError),
)
_TRACEBACKS = "HYDRA_FULL_ERROR"


def run_with_config(
    main: Callable[[Config], Any], *, local: bool = True, judge: Callable[[Config], list[str]] | None = None
) -> None:
    """Call `main` with the validated configuration that the command line describes.

    Without `local`, what must be on this machine (model, problems, servers) is not looked for. `judge` is for entry
    points that do not train; it stands in for `check` and returns warnings as that does.

    Handles --help, --cfg and Hydra's other flags itself. A FipoError, from the configuration or from `main`, ends the
    process with one line on stderr and the error's exit code: 2 for a configuration. HYDRA_FULL_ERROR=1 shows the
    traceback instead.
    """
    with_traceback = os.environ.get(_TRACEBACKS) == "1"
    try:
        config = _config_from_command_line()
        for warning in judge(config) if judge else check(config, world_size=_world_size(), local=local):
            if _speaks_for_the_run():
                print(f"warning: {warning}", file=sys.stderr)
        main(config)
    except FipoError as error:
        if with_traceback:
            raise
        _end(error)


def load_config(overrides: Sequence[str] = ()) -> Config:
    """The typed configuration of the given overrides, such as ["experiment=fipo_32b"]; not judged by `check`.

    For tools and tests: entry points use `run_with_config`. Raises ConfigError.
    """
    try:
        check_overrides(overrides, configuration_groups())
        with hydra.initialize_config_dir(str(configuration_directory()), version_base=_HYDRA_VERSION):
            return _to_config(hydra.compose("config", list(overrides)))
    except _FAILURES as error:
        raise _refusal(error, overrides) from error


def configuration_directory() -> Path:
    """Where conf/ is: inside the package when installed, beside it in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "conf", package.parent / "conf")
    for directory in candidates:
        if (directory / "config.yaml").is_file():
            return directory
    raise ConfigError(
        "conf", f"config.yaml is neither in {candidates[0]} nor in {candidates[1]}", "reinstall the package"
    )


def configuration_groups() -> list[str]:
    """The names of the groups: the directories of conf/, without Hydra's own."""
    return sorted(path.name for path in configuration_directory().iterdir() if path.is_dir() and path.name != "hydra")


def _config_from_command_line() -> Config:
    """Compose under hydra.main, which only hands the result over: the run itself happens outside of Hydra."""
    composed: list[DictConfig] = []

    def keep(config: DictConfig) -> None:
        composed.append(config)

    if {"-m", "--multirun"} & set(sys.argv[1:]):
        raise ConfigError("--multirun", "a run owns its processes and servers", "sweep with a loop in the shell")
    entry = hydra.main(version_base=_HYDRA_VERSION, config_path=str(configuration_directory()), config_name="config")
    with_traceback = os.environ.get(_TRACEBACKS)
    # Hydra's own handler prints several lines and exits with 1; with this set it raises.
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
    """Say in one line what argparse, which reads Hydra's flags, says in ten."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        if end.code == 2 and (lines := said.getvalue().splitlines()):
            problem = lines[-1].partition("error: ")[2][:300]
            raise ConfigError("command line", problem, "--help shows flags") from None
        raise
    finally:
        if not said.getvalue().startswith("usage: "):
            sys.stderr.write(said.getvalue())


def _refusal(error: Exception, overrides: Sequence[str]) -> Exception:
    if isinstance(error, AssertionError):
        return below_null_section() if "NoneType" in str(error) else error
    if isinstance(error, UnicodeDecodeError):
        name = next(_files_of_other_encodings(), "one of the YAML files")
        return ConfigError("configuration", f"{name} is not UTF-8 text: {error.reason}", "save it as UTF-8")
    refusal = readable(error, configuration_groups())
    if refusal.key == "configuration" and ".yaml" not in refusal.problem:
        # Hydra says neither key nor file; what was chosen leads to it.
        return ConfigError(f"configuration of {' '.join(overrides)[:200]}", refusal.problem, refusal.remedy)
    return refusal


def _files_of_other_encodings() -> Iterator[str]:
    """Those in conf/ and in the directories that the command line names, since Python's error does not say which."""
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
            raise ConfigError(
                name, f"{shown(value)} is no section", f"it has keys of its own, such as {name}.KEY=VALUE"
            )
    return config


def _refuse_added_keys(tree: Any, prefix: str = "") -> None:
    """Refuse what `+key=value` has added beside the schema: OmegaConf lets it pass, and nothing would read it."""
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
    """The number of ranks where a launcher has started this process as one of them, else None."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


def _speaks_for_the_run() -> bool:
    """Whether this process prints what all ranks would: the launcher for its ranks, else the first rank."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0" and "TORCHELASTIC_RUN_ID" in os.environ
    return os.environ.get("SLURM_PROCID", "0") == "0"


def _end(error: FipoError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(error.exit_code)
