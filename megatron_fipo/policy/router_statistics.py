"""How evenly routers spread tokens over experts, and how often they would choose otherwise than what they replay.

What they replay is what they chose themselves before, or what the engine chose.
"""

import torch
import torch.distributed
from torch import Tensor

from megatron_fipo.models.experts import Experts


class RouterStatistics:
    """Counts of one step, of the tokens whose labels the policy produced.

    Each token is counted on the one rank whose router sees it: tensor-parallel ranks have different tokens, since
    experts need sequence parallelism there.
    """

    def __init__(self, experts: Experts | None, device: torch.device):
        """Nothing is counted; nothing ever is without experts."""
        self._experts, self._device = experts, device
        self._clear()

    def count(self, layer: int, chosen: Tensor, counts: Tensor) -> None:
        """Count the tokens that go to each expert of a layer.

        Args:
            layer: from 0, of the whole model.
            chosen: [local tokens, experts of a token] int64.
            counts: [local tokens] bool: the tokens that count.
        """
        self._load[layer] += tokens_per_expert(chosen, counts, self._load.shape[1])

    def count_changed(self, given: Tensor, own: Tensor, counts: Tensor) -> None:
        """Count the tokens of a layer whose router would choose other experts than it replays.

        Args:
            given, own: [local tokens, experts of a token] of one integer type: the experts replayed, and those that it
                would choose, in any order.
            counts: as for `count`.
        """
        self._replayed += _different(given, own, counts)

    def count_mismatch(self, engines: Tensor, own: Tensor, counts: Tensor) -> None:
        """Count the tokens of a layer that the engine sent to other experts than the router would, at the weights that
        a step starts with.

        Args:
            engines, own, counts: as `given`, `own` and `counts` of `count_changed`.
        """
        self._sampled += _different(engines, own, counts)

    def count_dropped(self, chosen: Tensor, served: Tensor) -> None:
        """Count the choices that no expert serves, those of tokens that do not count included.

        Args:
            chosen: [local tokens, experts of a token].
            served: [local tokens, experts] bool, what the router's layer dispatches.
        """
        self._dropped += chosen.numel() - torch.count_nonzero(served)

    def count_losses(self, aux_losses: Tensor, z_losses: Tensor, weights: Tensor) -> None:
        """Count the losses of a layer's router.

        Args:
            aux_losses, z_losses: [local tokens] fp32, without their coefficients.
            weights: [local tokens] fp32, of the tokens in the loss.
        """
        self._losses += torch.stack([(aux_losses * weights).sum(), (z_losses * weights).sum(), weights.sum()])

    def metrics(self) -> dict[str, float]:
        """Metrics over all ranks, the same on each; counting starts anew. Every rank calls this together.

        Empty if no token was counted.
        """
        if self._experts is None:
            return {}
        # Counts are whole in this type.
        parts = (self._load.flatten(), self._replayed, self._sampled, self._dropped, self._losses)
        vector = torch.cat([part.double() for part in parts])
        torch.distributed.all_reduce(vector)
        counted = vector.cpu()
        self._clear()
        load = counted[:-8].view(-1, self._experts.number)[list(self._experts.layers)]
        changed, replayed, differing, sampled, dropped, aux_loss, z_loss, weight = counted[-8:].tolist()
        if not load.sum():
            return {}
        share = load / load.sum(1, keepdim=True)
        fullest = share.amax(1) * self._experts.number
        entropy = torch.special.entr(share).sum(1)
        found = {
            "router_load": fullest.mean().item(),
            "router_load_max": fullest.max().item(),
            "router_entropy": entropy.mean().item(),
            "router_entropy_min": entropy.min().item(),
            "router_tokens_dropped": dropped,
        }
        if weight:  # updates have losses of routers
            found |= {"router_z_loss": z_loss / weight}
            found |= {"router_aux_loss": aux_loss / weight} if aux_loss else {}  # with the load known it is above 0
        found |= {"router_changed": changed / replayed} if replayed else {}
        return found | ({"router_mismatch": differing / sampled} if sampled else {})

    def _clear(self) -> None:
        layers, number = (len(self._experts.layers), self._experts.number) if self._experts else (0, 0)
        self._load = torch.zeros(layers, number, dtype=torch.int64, device=self._device)
        self._replayed = torch.zeros(2, dtype=torch.int64, device=self._device)
        self._sampled = torch.zeros(2, dtype=torch.int64, device=self._device)
        self._dropped = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._losses = torch.zeros(3, dtype=torch.float64, device=self._device)


def tokens_per_expert(chosen: Tensor, counts: Tensor, number: int) -> Tensor:
    """[number] int32: the tokens that go to each of so many experts.

    Args:
        chosen: [local tokens, experts of a token] int64.
        counts: [local tokens] bool: the tokens that count.
    """
    ones = counts.to(torch.int32)[:, None].expand_as(chosen).reshape(-1)
    added = torch.zeros(number, dtype=torch.int32, device=ones.device)
    return added.scatter_add_(0, chosen.reshape(-1), ones)


def _different(given: Tensor, own: Tensor, counts: Tensor) -> Tensor:
    """[2] int64: the tokens that count whose two sets of experts differ, and all that count."""
    same = (given[:, :, None] == own[:, None, :]).any(2).all(1)
    return torch.stack([(~same & counts).sum(), counts.sum()])
