"""Which sender of the trainer serves which engine, where senders reach only engines beside them. Imports no torch.

Files in shared memory reach the engines on the same machine, and a handle to a GPU's memory reaches the engine worker
on the same GPU. So every machine, or every GPU, has a sender, and all of them send the same buckets at the same time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from megatron_fipo.errors import RolloutError
from megatron_fipo.weights.transport_records import (
    BucketHeader,
    BucketMemory,
    CudaHandle,
    CudaIpcAddress,
    TransportAddress,
    WorkerPlace,
)


@dataclass(frozen=True)
class Senders:
    """The senders of a trainer by number, and how they take turns."""

    count: int
    places: tuple[WorkerPlace, ...] | None = None
    """By number, where each one runs: it sends everything to the engines there. None: each one reaches all engines."""

    @property
    def turns(self) -> list[tuple[int, ...]]:
        """The senders of each turn, which send the same buckets at the same time."""
        everyone = tuple(range(self.count))
        return [everyone] if self.places is not None else [(sender,) for sender in everyone]

    def of_servers(
        self, turn: Sequence[int], workers_of_server: Sequence[Sequence[WorkerPlace]]
    ) -> list[tuple[int, ...]]:
        """For each server, those senders of a turn that serve its engine workers.

        Raises:
            RolloutError: no sender is on a worker's machine, or on its GPU.
        """
        if self.places is None:
            return [tuple(turn) for _ in workers_of_server]
        by_place = {place: number for number, place in enumerate(self.places)}
        with_gpus = any(place.gpu is not None for place in self.places)
        found = []
        for workers in workers_of_server:
            places = [worker if with_gpus else WorkerPlace(worker.machine) for worker in workers]
            if lonely := [place for place in places if place not in by_place]:
                raise RolloutError(
                    f"no process of the trainer is where an engine worker is: {_words(lonely[0])}; the trainer has "
                    f"{_some(self.places)}. rollout.weight_transfer=process_group reaches engines anywhere"
                )
            found.append(tuple(sorted({by_place[place] for place in places})))
        return found


def joined_address(addresses: Sequence[TransportAddress]) -> TransportAddress:
    """What a server has to know of all senders that serve it."""
    first = addresses[0]
    if isinstance(first, CudaIpcAddress):
        uuids = [uuid for address in addresses if isinstance(address, CudaIpcAddress) for uuid in address.device_uuids]
        return CudaIpcAddress(tuple(uuids))
    return first


def joined_header(headers: Sequence[BucketHeader]) -> BucketHeader:
    """One header for the same bucket of several senders, each with a place of its own.

    Raises:
        RolloutError: it is not the same bucket.
    """
    first = headers[0]
    if any(header.layout != first.layout or header.checksums != first.checksums for header in headers):
        raise RolloutError("senders that should send the same bucket have different ones")
    if not isinstance(first.place, BucketMemory):
        return first
    handles: dict[str, CudaHandle] = {}
    for header in headers:
        assert isinstance(header.place, BucketMemory)
        handles |= header.place.handles
    return msgspec.structs.replace(first, place=BucketMemory(handles))


def memory_of(header: BucketHeader, memory: BucketMemory, workers: Sequence[WorkerPlace]) -> BucketHeader:
    """The header as the server of these workers needs it: a job has a handle for every GPU."""
    gpus = {worker.gpu for worker in workers}
    own = {gpu: handle for gpu, handle in memory.handles.items() if gpu in gpus}
    return msgspec.structs.replace(header, place=BucketMemory(own))


def _words(place: WorkerPlace) -> str:
    return place.machine if place.gpu is None else f"GPU {place.gpu} of {place.machine}"


def _some(places: Sequence[WorkerPlace]) -> str:
    return ", ".join(map(_words, places[:3])) + (" …" if len(places) > 3 else "")
