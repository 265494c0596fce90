"""All updates of one step, and the comparison of trainer and engine on the way."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from megatron_fipo.policy.agreement import AgreementCheck
from megatron_fipo.policy.micro_batch import MiniBatch
from megatron_fipo.policy.update import Differences, Policy, StepLogProbs, gather_parameters
from megatron_fipo.tracking.updates import over_updates

Phase = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True)
class Part:
    """The first updates of a step, whose old log-probs were computed while the others were still sampled."""

    mini_batches: Sequence[MiniBatch]
    known: StepLogProbs


@dataclass(frozen=True)
class StepData:
    """What a step trains on, in the order of its updates."""

    parts: Sequence[Part]
    mini_batches: Sequence[MiniBatch]
    """Those after all parts."""


def score_part(policy: Policy, mini_batches: Sequence[MiniBatch], check: AgreementCheck, *, is_first: bool) -> Part:
    """The next updates of a step, with their old log-probs. Every rank calls this before the step's first update."""
    if is_first:
        policy.routing.losses.begin_step()
    return Part(mini_batches, policy.log_probs(mini_batches, without_first=is_first and not check.may_stop))


def train_step(
    policy: Policy,
    data: StepData,
    check: AgreementCheck,
    phase: Phase,
    warn: Callable[[str], None],
) -> dict[str, float]:
    """All updates of a step, none if it has no sequences; their metrics together. Every rank calls this.

    Old log-probs are those of the weights that the step starts with. The first update's own forward pass has these
    weights too and gives them, so that only the other mini-batches need a pass of their own. Where the comparison with
    the engine may end the run, that pass covers all, and nothing is updated before it is judged.

    Args:
        phase: a context that times what is done in it, by its name.
        warn: gets what the comparison has to say.

    Raises:
        FipoError: trainer and engine differ too much.
    """

    def judged(differences: Differences) -> dict[str, float]:
        agreement = policy.agreement(differences)
        if warning := check.judge(agreement):
            warn(warning)
        return agreement

    alone, agreement, updates = check.may_stop, {}, []
    with phase("log-probs"):
        rest = score_part(policy, data.mini_batches, check, is_first=not data.parts)
    parts = [*data.parts, rest]
    mini_batches = [mini_batch for part in parts for mini_batch in part.mini_batches]
    streams = [added for part in parts for added in part.known.streams]
    routes = [found for part in parts for found in part.known.routes]
    known = [difference for part in parts for difference in part.known.differences]
    if alone and mini_batches:
        agreement = judged(known)
    policy.routing.losses.share_load()
    with phase("update"):
        for number, (mini_batch, added, given) in enumerate(zip(mini_batches, streams, routes, strict=True)):
            if policy.credit is not None:
                policy.credit.watch(mini_batch, number)
            if number == 0 and not alone:
                metrics, differences = policy.first_update(mini_batch, added)
                agreement = judged([*differences, *known])
            else:
                metrics = policy.update(mini_batch, added, routes=given)
            updates.append(metrics)
        gather_parameters(policy.chunks)
    return agreement | over_updates(updates) | policy.routing.statistics.metrics()
