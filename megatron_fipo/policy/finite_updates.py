"""Whether updates change anything: one whose gradient is not finite is left out, and a run of such steps is no run."""

from collections.abc import Mapping

from megatron_fipo.errors import FipoError

STEPS_IN_VAIN = 2
"""Steps in a row without any update that end the run. One alone may be a spike, where a step is one update."""


class FiniteUpdates:
    """Counts steps whose updates were all left out. The same on every rank, by metrics that are the same."""

    def __init__(self) -> None:
        self._in_vain = 0

    def judge(self, metrics: Mapping[str, float]) -> str | None:
        """A warning if some of a step's updates were left out.

        Raises:
            FipoError: so were all of them, for STEPS_IN_VAIN steps in a row.
        """
        updates, left_out = int(metrics["updates"]), int(metrics["updates_skipped"])
        self._in_vain = self._in_vain + 1 if 0 < updates == left_out else 0
        if self._in_vain >= STEPS_IN_VAIN:
            raise FipoError(
                f"no update of {STEPS_IN_VAIN} steps in a row had a finite gradient: the loss or the weights are not "
                "finite any more (look at algorithm.loss, optimizer.lr, model.dtype; resume from an earlier checkpoint)"
            )
        return f"{left_out} updates left out, their gradients are not finite" if left_out else None
