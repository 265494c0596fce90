"""How the policy's weights get to the engines, as the training loop sees it: published, repeated, and probed."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from megatron_fipo.config.agreement import agreement_limits
from megatron_fipo.errors import RolloutError
from megatron_fipo.policy import platform
from megatron_fipo.policy.update import Policy
from megatron_fipo.policy.weight_probe import Scorer, beyond, probe_differences, probe_tokens
from megatron_fipo.weights.conductor import WeightControl
from megatron_fipo.weights.deadline import Deadline
from megatron_fipo.weights.gather import HeldWeights
from megatron_fipo.weights.publisher import open_publisher
from megatron_fipo.weights.ranks import fact_of_rank_0


class Engines(WeightControl, Scorer, Protocol):
    """The engines, as rank 0 drives them."""


class PolicyPublisher:
    """Hands the policy's weights to the engines. Every method is called by every rank together."""

    def __init__(self, policy: Policy, control: Engines | None, run_dir: Path, warn: Callable[[str], None]):
        """`control` is given on rank 0, None elsewhere. `warn` gets what the probe has to say."""
        self._policy, self._control, self._warn = policy, control, warn
        config = policy.config
        self._rollout = config.rollout
        self._limit = agreement_limits(config).stop
        longest = config.rollout.max_prompt_length + config.rollout.max_response_length - 1
        self._probe = probe_tokens(policy.model_config.vocab_size, longest)
        # Every forward pass moves the scales of delayed scaling: the probe would change what is trained.
        self._probes = config.model.fp8 != "delayed" and longest > 1
        self._weights = HeldWeights(policy.chunks, policy.model_config, config.rollout.bucket_mib << 20)
        self._publisher = open_publisher(
            config.rollout,
            control,
            groups={part.group.number: part.sends for part in self._weights.own},
            senders=len(self._weights.plan.groups),
            run_dir=run_dir,
        )

    def publish(self, version: int, replace_failed: Callable[[], bool]) -> dict[str, float]:
        """Hand the present weights to all engines as `version`; what that took and found, for the step's metrics.

        Args:
            replace_failed: on rank 0, after an update that failed: whether the engines that failed are replaced, or
                left out, and others are there to repeat it with. Not called elsewhere.

        Raises:
            FipoError: on every rank, if the weights cannot be published.
        """
        if self._rollout.shared_gpu:
            platform.release_memory()
        weights = {part.group.number: part for part in self._weights.own}
        while True:
            try:
                return self._publisher.publish(weights, version).metrics()
            except RolloutError:
                if not fact_of_rank_0(self._control is not None and replace_failed()):
                    raise

    def probe(self) -> dict[str, float]:
        """Compare every engine's log-probs of a fixed text with the policy's; the largest difference, as a metric.

        To be called after `publish`. Engines that differ by more than rollout.log_prob_diff_stop are warned of by name.
        """
        if not self._probes:
            return {}
        deadline = Deadline(self._rollout.hang_timeout_s)
        differences = probe_differences(self._policy, self._control, self._probe, deadline)
        for url in beyond(differences, self._limit):
            self._warn(
                f"the weights of the engine at {url} are not the trainer's: its log-probs of a fixed text differ by "
                f"{differences[url]:.2g} nats per token, above rollout.log_prob_diff_stop={self._limit:g}"
            )
        return {"probe_diff_max": max(differences.values())} if differences else {}

    def close(self) -> None:
        """Release what updates use. May be called twice."""
        self._publisher.close()
