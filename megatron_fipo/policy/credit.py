"""Keep the values per token that the loss used, of the responses that a batch marks, and gather them on rank 0.

Nothing here runs unless tracking.credit asks for it. Only the last pipeline stage has these values; its tensor-parallel
ranks have the same ones, so the first of them keeps them. Each context-parallel rank keeps the tokens that it holds.
Values stay on the device until the last update of a step has been started.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy
import torch
from megatron.core import parallel_state
from torch import Tensor
from torch import distributed as dist

from megatron_fipo.algorithm.credit import LOG_RATIO_CLAMP
from megatron_fipo.algorithm.losses import LossInputs, TokenLosses
from megatron_fipo.algorithm.staleness import Staleness
from megatron_fipo.policy.micro_batch import BatchLayout, MicroBatch, MiniBatch, moved
from megatron_fipo.records import credit
from megatron_fipo.records.credit import VALUES, Piece, encode_pieces


@dataclass(frozen=True)
class _Kept:
    sample: int
    update: int
    positions: numpy.ndarray
    values: Tensor
    """[columns, m] fp32, on the device."""
    state: Tensor
    """[m] uint8, on the device."""


class CreditRecorder:
    """This rank's part of a step's records. Every rank makes one."""

    def __init__(self) -> None:
        self._watched: tuple[MiniBatch, int] | None = None
        self._kept: list[_Kept] = []

    def watch(self, mini_batch: MiniBatch, update: int) -> None:
        """Say which update, counted from 0 in its step, the next losses are of."""
        self._watched = mini_batch, update

    @torch.no_grad()
    def observe(
        self,
        micro_batch: MicroBatch,
        inputs: LossInputs,
        entropy: Tensor,
        token: TokenLosses,
        stale: Staleness | None,
    ) -> None:
        """Keep what the batch marks. Does not wait for the device.

        Args:
            entropy: [rows, tokens] fp32.
            token, stale: what `losses.policy_loss` gives its observer.
        """
        if self._watched is None or parallel_state.get_tensor_model_parallel_rank() > 0:
            return
        mini_batch, update = self._watched
        rows = mini_batch.batch.rows[list(micro_batch.places)]
        if not rows["recorded"].any():
            return
        columns, state = _columns(inputs, entropy, token, stale), _state(inputs, token)
        for place, positions, where in _marked(mini_batch.layout, rows):
            index = moved(torch.from_numpy(where), entropy.device)
            values = torch.stack([column.flatten()[index] for column in columns])
            sample = int(rows["sample"][place])
            self._kept.append(_Kept(sample, update, positions, values, state.flatten()[index]))

    def collect(self) -> list[bytes]:
        """Return all ranks' pieces of this step as frames, on rank 0; [] elsewhere. Every rank calls this together."""
        pieces = [
            Piece(kept.sample, kept.update, kept.positions, kept.values.cpu().numpy(), kept.state.cpu().numpy())
            for kept in self._kept
        ]
        self._kept.clear()
        self._watched = None
        return gather_frames(encode_pieces(pieces))


def gather_frames(frame: bytes) -> list[bytes]:
    """Return every rank's frame that is not empty, on rank 0; [] elsewhere. They travel as plain bytes."""
    size = torch.tensor([len(frame)])
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    if dist.get_rank() > 0:
        if frame:
            dist.send(torch.frombuffer(bytearray(frame), dtype=torch.uint8), dst=0)
        return []
    found = [frame] if frame else []
    for rank, length in enumerate(torch.cat(sizes).tolist()):
        if rank and length:
            received = torch.empty(length, dtype=torch.uint8)
            dist.recv(received, src=rank)
            found.append(received.numpy().tobytes())
    return found


def _columns(inputs: LossInputs, entropy: Tensor, token: TokenLosses, stale: Staleness | None) -> list[Tensor]:
    """Return [rows, tokens] fp32 for each of VALUES."""
    log_ratio = (inputs.log_probs.detach() - inputs.old_log_probs).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    none = torch.full_like(log_ratio, torch.nan)
    known = {
        "log_ratio": log_ratio,
        "future_kl": token.influence.future_kl if token.influence else none,
        "influence": token.influence.weights if token.influence else none,
        "entropy": entropy,
        "old_log_prob": inputs.old_log_probs,
        "rollout_log_prob": inputs.rollout_log_probs,
        "importance_weight": stale.weights if stale else none,
    }
    return [known[name].float() for name in VALUES]


def _state(inputs: LossInputs, token: TokenLosses) -> Tensor:
    """Return the bits of records/credit.py, [rows, tokens] uint8."""
    produced, nothing = inputs.response_mask, torch.zeros_like(inputs.response_mask)

    def reported(name: str) -> Tensor:
        return token.means[name] > 0 if name in token.means else nothing

    bits = {
        credit.PRODUCED: produced,
        credit.TAKES_PART: token.influence.takes_part if token.influence else nothing,
        credit.CLIPPED: produced & reported("pg_clipfrac"),
        credit.DUAL_CLIPPED: produced & reported("pg_clipfrac_lower"),
        credit.COUNTS: token.mask,
    }
    state = torch.zeros_like(produced, dtype=torch.uint8)
    for bit, mask in bits.items():
        state |= mask.to(torch.uint8) * bit
    return state


def _marked(layout: BatchLayout, rows: numpy.ndarray) -> Iterator[tuple[int, numpy.ndarray, numpy.ndarray]]:
    """Yield each marked row's place, the positions in its response that this rank has, and where it has them.

    Positions are int32, from the response's begin. Places in the micro-batch's flattened tensors are int64.
    """
    slots = layout.slots((rows["tokens"] - 1).tolist())
    starts = [0, *accumulate(slot // layout.context_size for slot in slots)]
    for place in numpy.flatnonzero(rows["recorded"]).tolist():
        prompt, tokens = int(rows["prompt"][place]), int(rows["tokens"][place])
        # A value lies at the position that predicts its token.
        positions = layout.held(slots[place]).numpy() + 1 - prompt
        where = numpy.flatnonzero((positions >= 0) & (positions < tokens - prompt))
        if len(where):
            yield place, positions[where].astype(numpy.int32), starts[place] + where
