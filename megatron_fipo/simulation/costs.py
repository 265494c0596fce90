"""Seconds of what engines and trainer do: the planner's, or measured ones in their place."""

import math
from dataclasses import dataclass, replace
from typing import Protocol

from megatron_fipo.config import Config
from megatron_fipo.models.costs import attended_tokens
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.rollout.loads import most_samples
from megatron_fipo.simulation.settings import Measured, Settings
from megatron_fipo.sizing.timing import EngineCosts, engine_costs, trainer_time, weight_sync_s


class Decoding(Protocol):
    """Seconds of an engine."""

    def decode_s(self, batch: float, held: float) -> float:
        """Of one token for each of `batch` sequences, whose caches hold `held` tokens in all."""

    def prefill_s(self, tokens: float) -> float:
        """Of a context of so many tokens."""


@dataclass(frozen=True)
class MeasuredDecoding:
    """Linear in the batch; prefill is part of what was measured."""

    fixed: float
    sequence: float

    def decode_s(self, batch: float, held: float) -> float:
        """See Decoding."""
        return self.fixed + self.sequence * batch

    def prefill_s(self, tokens: float) -> float:
        """See Decoding."""
        return 0.0


@dataclass(frozen=True)
class EngineSize:
    """How much one engine runs at the same time."""

    places: int
    """Samples, whatever they hold."""
    cache_tokens: float


def decoding(config: Config, model_config: ModelConfig, settings: Settings) -> Decoding:
    """An engine's seconds."""
    if settings.measured.decode is not None:
        return MeasuredDecoding(*settings.measured.decode)
    return _windowed(engine_costs(config, model_config), model_config, settings)


def engine_size(config: Config, model_config: ModelConfig, settings: Settings) -> EngineSize:
    """Places by rollout.max_num_seqs, and the cache by the memory of its GPUs; no limit where seconds are measured."""
    if settings.measured.decode is not None:
        return EngineSize(config.rollout.max_num_seqs, math.inf)
    costs = _windowed(engine_costs(config, model_config), model_config, settings)
    return EngineSize(config.rollout.max_num_seqs, costs.cache_tokens)


def asked_for(config: Config, size: EngineSize, settings: Settings) -> int:
    """Samples that an engine is asked for at a time, by the run's own rule once it knows the lengths."""
    in_memory = size.cache_tokens / (settings.prompt + settings.lengths.held)
    return most_samples(size.places, config.algorithm.samples_per_prompt, in_memory)


def _windowed(costs: EngineCosts, model_config: ModelConfig, settings: Settings) -> EngineCosts:
    """A token counts for less where attention has a window: the share that a sequence of mean length keeps."""
    length = settings.prompt + settings.lengths.mean
    share = attended_tokens(model_config, length) / (length / 2)
    return replace(costs, token_bytes=costs.token_bytes * share, cache_tokens=costs.cache_tokens / share)


@dataclass(frozen=True)
class TrainerCosts:
    """A trainer's seconds, on `data_parallel_size` replicas."""

    config: Config
    model_config: ModelConfig
    data_parallel_size: int
    measured: Measured

    def phases(self, tokens: float, sequences: int) -> tuple[float, float]:
        """Of log-probs and of updates, for a step that trains on so many tokens. (0, 0) for an empty step."""
        if not sequences:
            return 0.0, 0.0
        algorithm, measured = self.config.algorithm, self.measured
        time = trainer_time(self.config, self.model_config, self.data_parallel_size, tokens, tokens / sequences)
        log_probs, update = time.log_probs, time.update
        if measured.log_probs is not None:
            log_probs = measured.log_probs[0] + measured.log_probs[1] * tokens
        if measured.update is not None:
            updates = algorithm.prompts_per_step // algorithm.mini_batch_prompts
            update = updates * measured.update[0] + measured.update[1] * tokens
        return log_probs, update

    def weights_s(self) -> float:
        """Of a weight update."""
        if self.measured.weights is not None:
            return self.measured.weights
        return weight_sync_s(self.config, self.model_config)
