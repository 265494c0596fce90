"""FIPO reinforcement learning of reasoning models on Megatron-Core and vLLM.

    from megatron_fipo import load_config, run
    result = run(load_config(["algorithm=dapo", "run.steps=2"]))

docs/library.md has more.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_fipo.library import Config, FipoError, RunResult, load_config, read_run, run

__all__ = ["Config", "FipoError", "RunResult", "load_config", "read_run", "run"]


def __getattr__(name: str) -> Any:
    """Import the library only when one of its names is used, so that commands start quickly."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import megatron_fipo.library as library

    return getattr(library, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
