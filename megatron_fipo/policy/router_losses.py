"""The losses of routers: one for an even load of the experts, one for small scores.

Both are sums over tokens, and are added to the policy's loss with its own weights of tokens. The load is that of all
the step's responses, at the weights that the step starts with. So a token's part depends on no other token of its
micro-batch, and the gradient is the same in every layout; Megatron-Core's own losses are means of a micro-batch.
"""

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_fipo.algorithm.losses import token_divisors
from megatron_fipo.algorithm.sequences import SequenceLayout
from megatron_fipo.config import AlgorithmConfig
from megatron_fipo.models.experts import Experts
from megatron_fipo.policy.micro_batch import MicroBatch
from megatron_fipo.policy.router_statistics import RouterStatistics, tokens_per_expert


class RouterLosses:
    """What is added to the policy's loss at each router of this rank, and the load of experts that it needs."""

    def __init__(
        self, config: AlgorithmConfig, experts: Experts | None, statistics: RouterStatistics, device: torch.device
    ):
        """Nothing is counted. `statistics` gets the losses of updates."""
        self._config, self._statistics = config, statistics
        self.needs_load = config.router_aux_loss_coef > 0
        """Whether updates need `share_load` before them."""
        self.are_on = config.adds_router_losses
        shape = (len(experts.layers), experts.number) if experts is not None else (0, 0)
        self._counted = torch.zeros(shape, dtype=torch.int64, device=device)
        self._load: Tensor | None = None

    def begin_step(self) -> None:
        """Forget the load of the step before, and what was counted since."""
        self._counted.zero_()
        self._load = None

    def count(self, layer: int, chosen: Tensor, counts: Tensor) -> None:
        """Count the tokens that go to each expert of a layer, before the step's first update.

        Args:
            layer: from 0, of the whole model.
            chosen: [local tokens, experts of a token] int64.
            counts: [local tokens] bool: the tokens that count.
        """
        self._counted[layer] += tokens_per_expert(chosen, counts, self._counted.shape[1])

    def share_load(self) -> None:
        """Have the load of the step's responses, which its updates use. Every rank calls this together.

        Nothing if no update needs it.
        """
        if not self.needs_load:
            return
        torch.distributed.all_reduce(self._counted)
        load = self._counted.float()
        self._load = load / load.sum(1, keepdim=True).clamp(min=1)

    def token_weights(self, micro_batch: MicroBatch) -> Tensor:
        """[rows, local tokens] fp32: what each token's losses are multiplied by before they are summed."""
        layout = SequenceLayout(micro_batch.local_lengths, parallel_state.get_context_parallel_group())
        mask = micro_batch.response_mask.float()
        return mask / token_divisors(mask, micro_batch.response_lengths, layout, self._config)

    def attach(
        self, router: TopKRouter, layer: int, hidden: Tensor, probs: Tensor, weights: Tensor, *, counted: bool
    ) -> Tensor:
        """The router's probs, whose backward pass has the gradient of the router's losses too.

        With E experts, q their shares of the load (summing to 1) and p a token's softmax over all of them, a token's
        loss is router_aux_loss_coef · E · Σ q p (Switch Transformers, eq. 4) + router_z_loss_coef · logsumexp(scores)²
        (ST-MoE, eq. 5). Megatron-Core's schedules scale it as they do the policy's.

        Args:
            router: the layer's.
            layer: from 0, of the whole model.
            hidden: [tokens, sequences, hidden] or [local tokens, hidden], what the router scores.
            probs: what the router returned.
            weights: [local tokens] fp32, of `token_weights`, in the router's order.
            counted: whether the statistics have them; not where a layer is computed again.

        Raises:
            RuntimeError: the load is needed and not known.
        """
        scores = router.gating(hidden).float().view(len(weights), -1)
        z_losses = scores.logsumexp(1).square()
        losses, aux_losses = self._config.router_z_loss_coef * z_losses, torch.zeros_like(z_losses)
        if self.needs_load:
            if self._load is None:
                raise RuntimeError("updates with router_aux_loss_coef come after log_probs and share_load")
            aux_losses = scores.shape[1] * (scores.softmax(1) @ self._load[layer])
            losses = losses + self._config.router_aux_loss_coef * aux_losses
        if counted:
            self._statistics.count_losses(aux_losses.detach(), z_losses.detach(), weights)
        if not torch.is_grad_enabled():
            return probs
        attached: Tensor = MoEAuxLossAutoScaler.apply(probs, (weights * losses).sum())  # type: ignore[no-untyped-call]
        return attached
