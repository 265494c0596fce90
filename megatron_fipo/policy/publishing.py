"""How the policy's weights get to the engines, as the training loop sees it: published, repeated, and probed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch.distributed
from torch import Tensor

from megatron_fipo.config import RolloutConfig
from megatron_fipo.config.agreement import agreement_limits
from megatron_fipo.errors import RolloutError
from megatron_fipo.policy import platform
from megatron_fipo.policy.offload import Offload
from megatron_fipo.policy.update import Policy
from megatron_fipo.policy.weight_probe import Scorer, beyond, probe_differences, probe_tokens, trainer_scores
from megatron_fipo.weights.conductor import WeightControl
from megatron_fipo.weights.deadline import Deadline
from megatron_fipo.weights.everywhere import WholeModel, places_of_ranks, sending_ranks
from megatron_fipo.weights.gather import HeldWeights
from megatron_fipo.weights.local_senders import Senders
from megatron_fipo.weights.publisher import open_publisher
from megatron_fipo.weights.ranks import fact_of_rank_0
from megatron_fipo.weights.sender import GroupWeights


class Engines(WeightControl, Scorer, Protocol):
    """The engines, as rank 0 drives them."""


@dataclass(frozen=True)
class _Part:
    """This rank's part of every weight update."""

    senders: Senders
    sends: Mapping[int, bool]
    """By the numbers of the senders that this rank gathers for, whether it is that sender."""
    weights: Mapping[int, GroupWeights]
    """What it gathers for each of them."""


def _part_of_groups(held: HeldWeights) -> _Part:
    """Each group of the plan has a sender, which reaches every engine: this rank gathers its own, or looks on."""
    senders = Senders(len(held.plan.groups))
    own = {part.group.number: part for part in held.own}
    return _Part(senders, {number: part.sends for number, part in own.items()}, own)


def _part_of_all(rollout: RolloutConfig, held: HeldWeights) -> _Part:
    """Each machine, or each GPU, has a sender for the engines there: every rank gathers the whole model."""
    device = platform.device()
    places = places_of_ranks(rollout, device)
    numbers, rank = sending_ranks(places), torch.distributed.get_rank()
    senders = Senders(len(numbers), tuple(places[sender] for sender in numbers))
    number = numbers.get(rank, 0)
    return _Part(senders, {number: rank in numbers}, {number: WholeModel(held, device)})


class _InTurns:
    """This rank's turns on a GPU that it shares with engines, in a weight update."""

    def __init__(self, offload: Offload, before_leaving: Callable[[], None]):
        self._offload, self._before_leaving = offload, before_leaving
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def come(self) -> None:
        """See SharedGpu."""
        self._offload.bring_weights()

    def leave(self) -> None:
        """See SharedGpu."""
        self._before_leaving()
        self._offload.leave()


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
        held = HeldWeights(policy.chunks, policy.model_config, config.rollout.bucket_mib << 20)
        part = _part_of_all(config.rollout, held) if config.rollout.shared_gpu else _part_of_groups(held)
        self._weights = part.weights
        self._publisher = open_publisher(
            config.rollout,
            control,
            groups=part.sends,
            senders=part.senders,
            run_dir=run_dir,
            shared_gpu=_InTurns(policy.offload, self._score) if policy.offload else None,
        )
        self._own_scores: Tensor | None = None
        """The policy's log-probs of the probe's text under the published weights."""

    def publish(self, version: int, replace_failed: Callable[[], bool]) -> dict[str, float]:
        """Hand the present weights to all engines as `version`; what that took and found, for the step's metrics.

        Args:
            replace_failed: on rank 0, after an update that failed: whether the engines that failed are replaced, or
                left out, and others are there to repeat it with. Not called elsewhere.

        Raises:
            FipoError: on every rank, if the weights cannot be published.
        """
        self._own_scores = None
        while True:
            if self._policy.offload is not None:
                self._policy.offload.leave()
                # An engine takes memory as soon as rank 0 begins.
                torch.distributed.all_reduce(torch.zeros(1))
            try:
                return self._publisher.publish(self._weights, version).metrics()
            except RolloutError:
                if not fact_of_rank_0(self._control is not None and replace_failed()):
                    raise

    def probe(self) -> dict[str, float]:
        """Compare every engine's log-probs of a fixed text with the policy's; the largest difference, as a metric.

        To be called after `publish`. Engines that differ by more than rollout.log_prob_diff_stop are warned of by name.
        """
        if not self._probes:
            return {}
        if self._own_scores is None:
            self._score()
        assert self._own_scores is not None
        deadline = Deadline(self._rollout.hang_timeout_s)
        differences = probe_differences(self._own_scores, self._control, self._probe, deadline)
        for url in beyond(differences, self._limit):
            self._warn(
                f"the weights of the engine at {url} are not the trainer's: its log-probs of a fixed text differ by "
                f"{differences[url]:.2g} nats per token, above rollout.log_prob_diff_stop={self._limit:g}"
            )
        return {"probe_diff_max": max(differences.values())} if differences else {}

    def _score(self) -> None:
        """Have the policy score the probe's text, while its weights are there. Collective."""
        if self._probes:
            self._own_scores = trainer_scores(self._policy, self._probe)

    def close(self) -> None:
        """Release what updates use. May be called twice."""
        self._publisher.close()
