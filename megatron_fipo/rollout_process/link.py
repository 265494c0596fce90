"""What the trainer's rank 0 asks of its rollouts, wherever these run. Types are such that calls travel as MessagePack.

`RolloutService` answers in the same process, `RemoteRollouts` by the rollout process.
"""

from typing import Protocol

import msgspec

from megatron_fipo.rollout.events import PartReady, Ready, WeightsWanted
from megatron_fipo.tracking.validation import ValidationResult
from megatron_fipo.weights.transport_records import BucketHeader, JoinRequest, WorkerPlace


class Offer(msgspec.Struct, frozen=True):
    """The batch that has been sampled."""

    batch: bytes
    """`TrainBatch.to_bytes`."""
    metrics: dict[str, int | float]
    """Of how it came about."""


class Resumed(msgspec.Struct, frozen=True):
    """What a checkpoint has of the loop itself."""

    seconds: float
    results: dict[str, float | None]


class Rollouts(Protocol):
    """Sampling for one run. Each call raises FipoError for what the user has to know."""

    def connect(self) -> None:
        """Wait until the servers answer."""

    def make_room(self) -> None:
        """Have the servers free the GPUs that they share with the trainer, until the next weight update."""

    def replace_failed(self) -> bool:
        """Replace the servers that made a weight update fail; False if none did, or if that was tried too often."""

    def begin_batch(self, step: int, weight_version: int) -> None:
        """Begin to sample the batch of `step`, which starts from the weights of `weight_version`; `wait` goes on."""

    def begin_validation(self, step: int) -> None:
        """Begin to sample the held-out problems, after `step`; `wait` goes on."""

    def wait(self) -> Ready | PartReady | WeightsWanted:
        """Sample what was begun until all is there, a part of the batch is certain, or no server is left."""

    def part(self) -> bytes:
        """The part, once `wait` has said PartReady: `TrainBatch.to_bytes`."""

    def taken(self) -> Offer:
        """The batch without its parts before, once `wait` has said Ready."""

    def validated(self) -> ValidationResult:
        """The scores of the held-out problems, once `wait` has said Ready."""

    def give_back(self, reason: str) -> bytes:
        """The batch anew, whose tokens could not be fetched for this reason: `TrainBatch.to_bytes`."""

    def fetched(self) -> None:
        """Every rank has what it reads of the batch."""

    def settle(self, version: int) -> None:
        """The servers have the weights `version`; the batch that was taken before, if one was, is trained."""

    def break_off(self) -> None:
        """Nobody waits for the batch that was begun.

        Where sampling and training take turns, what was sampled since the last `settle` is dropped; else nothing is.
        """

    def record_credit(self, frames: list[bytes]) -> None:
        """Write the values per token that the trainer kept in this step: frames of `records.credit.encode_pieces`."""

    def busy(self) -> list[tuple[float, float]]:
        """Stretches of time, since the last call, in which some server sampled: begin, since 1970, and seconds."""

    def end_step(self) -> dict[str, int | float]:
        """A step is done: metrics of the servers in it, and of all tickets so far."""

    def snapshot(self) -> int:
        """Keep the present state, and no other, for `write_snapshot`; its number.

        DataError: a number is not finite, or a group's parts do not belong together.
        """

    def write_snapshot(self, number: int, directory: str) -> None:
        """Write a kept state into a checkpoint's directory, and keep it no longer. May be called beside other calls."""

    def resume(self, checkpoint: str, step: int) -> Resumed:
        """Go on from the state in a checkpoint of `step`."""

    def close(self) -> None:
        """End servers and verifiers."""


class Engines(Protocol):
    """The servers, as weight updates and probes drive them; `seconds` is for the whole call. See EngineControl."""

    def roster(self) -> int: ...

    def admit(self) -> None: ...

    def workers_of_server(self) -> list[tuple[WorkerPlace, ...]]: ...

    def pause(self, seconds: float) -> None: ...

    def resume_sampling(self, seconds: float) -> None: ...

    def join_transport(self, requests: list[JoinRequest], seconds: float) -> None: ...

    def start_weight_update(self, seconds: float) -> None: ...

    def update_weights(self, header: BucketHeader, seconds: float) -> None: ...

    def finish_weight_update(self, version: int, seconds: float) -> None: ...

    def score(self, token_ids: list[int], seconds: float) -> dict[str, list[float | None]]: ...


class RolloutCalls(Rollouts, Engines, Protocol):
    """All that may be asked of the rollout process."""
