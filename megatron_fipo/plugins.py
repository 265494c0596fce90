"""Load the user's own functions, named in the configuration: package.module:function or path/to/file.py:function.

A file's path is relative to the directory in which the command is started, as for data files. All processes of a run
are started there. This module does not import torch.
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
    """Raise ConfigError unless `text`, the value of `key`, has the form of a function's name. Nothing is imported."""
    place, _, name = text.rpartition(":")
    is_module = all(part.isidentifier() for part in place.split("."))
    if not name.isidentifier() or not (place.endswith(".py") or is_module):
        raise ConfigError(key, f"{text[:200]!r} does not name a function", FORMS)


@functools.cache
def load_function(text: str, key: str) -> Callable[..., Any]:
    """Return the function that `text`, the value of `key`, names. Its module is imported only once.

    Raises:
        ConfigError: the module cannot be imported, or has no such function; names file and line of the exception.
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
    """Raise ConfigError unless `function` accepts `positional` values by position and `options` by their names.

    `key` is the configuration key whose value `text` names the function. Its options have the key `key`_options.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a builtin has no readable signature
    try:
        signature.bind(*[None] * positional, **options)
    except TypeError as error:
        bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
        name = getattr(function, "__name__", text)
        takes = f"it is defined as {name}{signature.replace(parameters=bare, return_annotation=signature.empty)}"
        raise ConfigError(f"{key}_options" if options else key, f"{text} cannot be called: {error}", takes) from None


def source_file(text: str, key: str) -> Path | None:
    """Return the Python file from which the function was loaded, or None."""
    module = inspect.getmodule(load_function(text, key))
    path = getattr(module, "__file__", None)
    return Path(path) if path and path.endswith(".py") else None


def _from_name(name: str) -> ModuleType:
    # As with `python -m`, independent of how this process was started.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


def _from_file(place: str, key: str) -> ModuleType:
    path = Path(os.path.expanduser(place)).absolute()
    if not path.is_file():
        raise ConfigError(key, f"{place} is not found from {os.getcwd()}", "the path of a Python file")
    # A unique module name: two files may have the same name, and neither may hide an installed module.
    name = f"megatron_fipo_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a path that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up their module in sys.modules, and modules in the same directory can be imported.
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
    """Return ", line N" for the last line of the user's file in the traceback, or an empty text."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno},"
    lines = []
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith(place.lstrip("./~")):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f", line {lines[-1]}," if lines else ""
