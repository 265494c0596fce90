"""The supported model families, one file each. `FAMILIES` collects the object FAMILY of every module here.

docs/adding_a_family.md explains how to add one. Imports no torch, so that a configuration can be checked quickly.
"""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from megatron_fipo.models.family import Family

__all__ = ["FAMILIES", "Family", "family_modules"]


def family_modules() -> list[ModuleType]:
    """Return the modules of this package that declare a family, sorted by name."""
    modules = (import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__))
    return [module for module in modules if hasattr(module, "FAMILY")]


FAMILIES: Mapping[str, Family] = {module.FAMILY.architecture: module.FAMILY for module in family_modules()}
"""The families, by the value of config.json's `architectures`."""
