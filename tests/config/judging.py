"""A command line as the checks see it."""

from megatron_fipo.config.checks import check
from megatron_fipo.config.configure import load_config

SERVER = "rollout.addresses=[http://10.0.0.1:8000]"


def judge(*overrides: str, world_size: int | None = None, local: bool = False) -> list[str]:
    return check(load_config(overrides), world_size=world_size, local=local)
