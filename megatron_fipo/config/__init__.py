"""The schema of a run: documented, validated dataclasses. Imports neither torch nor megatron.

Every key of `conf/` is a field in one of this package's sections. Each field declares its meaning, unit, range and
default in one place, by `setting`. Validation (`checks.py`), `--help` and docs/configuration.md all read it there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast, get_args

from megatron_fipo.config.algorithm import (
    LOSS_SETTINGS,
    AlgorithmConfig,
    FilterGroupsConfig,
    FutureKLConfig,
    OptimizerConfig,
)
from megatron_fipo.config.cluster import ClusterConfig, HardwareConfig
from megatron_fipo.config.data import ColumnsConfig, DataConfig, ValidationColumnsConfig
from megatron_fipo.config.environment import EnvironmentConfig
from megatron_fipo.config.loop import (
    CheckpointConfig,
    CreditConfig,
    EvaluationConfig,
    OverlongBufferConfig,
    RewardConfig,
    RunConfig,
    TrackingConfig,
    ValidationConfig,
)
from megatron_fipo.config.policy import ParallelConfig, PolicySection
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.settings import section

__all__ = [
    "LOSS_SETTINGS",
    "AlgorithmConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "ColumnsConfig",
    "Config",
    "CreditConfig",
    "DataConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "FilterGroupsConfig",
    "FutureKLConfig",
    "HardwareConfig",
    "OptimizerConfig",
    "OverlongBufferConfig",
    "ParallelConfig",
    "PolicySection",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TrackingConfig",
    "ValidationColumnsConfig",
    "ValidationConfig",
    "every_setting",
    "sections",
    "with_values",
]


_Section = TypeVar("_Section")


@dataclass
class Config:
    """One run. The groups in conf/ fill the sections. An experiment chooses groups and overrides single keys."""

    run: RunConfig = section(RunConfig)
    model: PolicySection = section(PolicySection)
    parallel: ParallelConfig = section(ParallelConfig)
    algorithm: AlgorithmConfig = section(AlgorithmConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    rollout: RolloutConfig = section(RolloutConfig)
    data: DataConfig = section(DataConfig)
    environment: EnvironmentConfig = section(EnvironmentConfig)
    reward: RewardConfig = section(RewardConfig)
    validation: ValidationConfig = section(ValidationConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    tracking: TrackingConfig = section(TrackingConfig)
    cluster: ClusterConfig = section(ClusterConfig)
    hardware: HardwareConfig = section(HardwareConfig)


def sections(kind: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each section of the schema, such as "algorithm.filter_groups", with its dataclass, outer sections first."""
    for entry in fields(kind):
        for nested in (entry.type, *get_args(entry.type)):
            if is_dataclass(nested):
                yield f"{prefix}{entry.name}", nested
                yield from sections(nested, f"{prefix}{entry.name}.")


def every_setting() -> Iterator[tuple[str, Field]]:
    """Yield each key of the schema, such as "run.steps", with its dataclass field. Sections themselves are left out."""
    nested = dict(sections())
    for name, kind in nested.items():
        yield from ((f"{name}.{entry.name}", entry) for entry in fields(kind) if f"{name}.{entry.name}" not in nested)


def with_values(config: _Section, values: Mapping[str, Any]) -> _Section:
    """Return a configuration with other values of some keys, such as "run.steps". It shares all else with `config`.

    A section can be given whole, also together with keys of it.

    Raises:
        AttributeError: there is no such section.
        TypeError: a section has no such key.
    """
    own: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        name, _, rest = key.partition(".")
        if rest:
            below.setdefault(name, {})[rest] = value
        else:
            own[name] = value
    for name, inner in below.items():
        own[name] = with_values(own[name] if name in own else getattr(config, name), inner)
    changed: _Section = replace(cast(Any, config), **own)
    return changed
