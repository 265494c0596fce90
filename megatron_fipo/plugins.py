"""Functions of the user's own, named in the configuration: package.module:function or path/to/file.py:function.

A file's path counts from where the command is started, as data files' do; every process of a run is started there.
Imports no torch: a function's own imports bring what it needs.
"""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_fipo.errors import ConfigError, one_line

FORMS = "package.module:function or path/to/file.py:function"


def check_form(text: str, key: str) -> None:
    """ConfigError unless `text`, the value of `key`, can be the name of a function; nothing is imported."""
    place, _, name = text.rpartition(":")
    is_module = all(part.isidentifier() for part in place.split("."))
    if not name.isidentifier() or not (place.endswith(".py") or is_module):
        raise ConfigError(key, f"{text[:200]!r} does not name a function", FORMS)


@functools.cache
def load_function(text: str, key: str) -> Callable[..., Any]:
    """The function that `text`, the value of `key`, names; its module is imported once.

    Raises:
        ConfigError: it cannot be imported, or there is no such function; names file and line of what was raised.
    """
    check_form(text, key)
    place, _, name = text.rpartition(":")
    try:
        module = _from_file(place, key) if place.endswith(".py") else _from_name(place)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        remedy = f"{place}{_line_of(error, place)} has to import without an error"
        raise ConfigError(key, f"{text} cannot be imported: {one_line(error)}", remedy) from error
    found = getattr(module, name, None)
    if not callable(found):
        names = [other for other, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(key, f"{place} has no function {name}", f"its functions: {', '.join(names) or 'none'}")
    return found


def check_call(function: Callable[..., Any], positional: int, options: Mapping[str, Any], text: str, key: str) -> None:
    """ConfigError unless `function` takes so many values by position and `options` by their names.

    `key` is the configuration's key of the function's name `text`; its options are `key`_options.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # of a builtin, which has none to read
    try:
        signature.bind(*[None] * positional, **options)
    except TypeError as error:
        bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
        name = getattr(function, "__name__", text)
        takes = f"it is defined as {name}{signature.replace(parameters=bare, return_annotation=signature.empty)}"
        raise ConfigError(f"{key}_options" if options else key, f"{text} cannot be called: {error}", takes) from None


def source_file(text: str, key: str) -> Path | None:
    """The file of Python that the function was loaded from; None where there is none."""
    module = inspect.getmodule(load_function(text, key))
    path = getattr(module, "__file__", None)
    return Path(path) if path and path.endswith(".py") else None


def _from_name(name: str) -> ModuleType:
    # As `python -m` has it, whichever way this process was started.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


def _from_file(place: str, key: str) -> ModuleType:
    path = Path(os.path.expanduser(place)).absolute()
    if not path.is_file():
        raise ConfigError(key, f"{place} is not found from {os.getcwd()}", "the path of a file of Python")
    # A name of its own: two files may be called alike, and neither hides an installed module.
    name = f"megatron_fipo_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a path that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look themselves up there, and its neighbours are imported from its directory.
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _line_of(error: BaseException, place: str) -> str:
    """, line N: the last one of the user's file that the error went through."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno},"
    lines = []
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith(place.lstrip("./~")):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f", line {lines[-1]}," if lines else ""
