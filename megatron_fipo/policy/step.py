"""All updates of one step, and the comparison of trainer and engine on the way."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from megatron_fipo.policy.agreement import AgreementCheck
from megatron_fipo.policy.micro_batch import MiniBatch
from megatron_fipo.policy.update import Differences, Policy, gather_parameters
from megatron_fipo.tracking.updates import over_updates

Phase = Callable[[str], AbstractContextManager[object]]


def train_step(
    policy: Policy,
    mini_batches: Sequence[MiniBatch],
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
        known = policy.log_probs(mini_batches, without_first=not alone)
    if alone and mini_batches:
        agreement = judged(known.differences)
    with phase("update"):
        for number, (mini_batch, added) in enumerate(zip(mini_batches, known.streams, strict=True)):
            if number == 0 and not alone:
                metrics, differences = policy.first_update(mini_batch, added)
                agreement = judged([*differences, *known.differences])
            else:
                metrics = policy.update(mini_batch, added)
            updates.append(metrics)
        gather_parameters(policy.chunks)
    return agreement | over_updates(updates)
