"""Check the section `environment` of a configuration: the user's function and its settings."""

import os
from collections.abc import Iterator

from megatron_fipo.config import Config, EnvironmentConfig
from megatron_fipo.config.checks_reward import check_function
from megatron_fipo.config.environment import NAME_KEY, SINGLE_TURN
from megatron_fipo.errors import ConfigError
from megatron_fipo.plugins import FORMS, check_form


def environment(config: Config) -> Iterator[str]:
    """Raise ConfigError if the environment cannot work. Yield a warning for each setting that is not read."""
    settings = config.environment
    if settings.is_own:
        if ":" not in settings.name:
            raise ConfigError(NAME_KEY, f"{settings.name[:200]!r} is not an environment", f"{SINGLE_TURN}, {FORMS}")
        check_form(settings.name, NAME_KEY)
    elif settings.options:
        remedy = f"{NAME_KEY} names an environment of your own"
        raise ConfigError("environment.options", f"is not read by {SINGLE_TURN}", remedy)
    elif settings.variables:
        yield f"environment.variables is not read with {NAME_KEY}={SINGLE_TURN}, which needs none"
    for name in settings.variables:
        if not name.isidentifier():
            problem = f"{name!r} is not the name of a variable"
            raise ConfigError("environment.variables", problem, "only names; the values are taken from the environment")


def check_environment_here(settings: EnvironmentConfig) -> None:
    """Raise ConfigError if an environment's file lacks the function, or a variable is not set. Only rank 0 checks.

    The file is only parsed here. launch/first_look.py imports it.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    place, _, function = settings.name.rpartition(":")
    if place.endswith(".py"):
        check_function(NAME_KEY, place, function)
    for name in settings.variables:
        if name not in os.environ:
            raise ConfigError("environment.variables", f"{name} is not set", f"export {name}=…, or leave it out")
