"""The rollouts' part of a checkpoint: what has been drawn, each ticket that has not ended, and the samples there are.

rollout/ledger.json has everything small, a row for each ticket. rollout/samples-00000.safetensors and those after it
have what is as long as tokens (saved_groups.py). All is held to types, ranges and to each other when it is read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import safetensors.numpy
from msgspec import Meta, Struct

from megatron_fipo.data.fingerprint import Fingerprint
from megatron_fipo.data.order import OrderState
from megatron_fipo.errors import DataError, RolloutError
from megatron_fipo.files import write_atomically, write_json_atomically
from megatron_fipo.records.sample import Group
from megatron_fipo.rollout import saved_groups
from megatron_fipo.rollout.collector import CollectorState
from megatron_fipo.rollout.ledger import Count, Ends, Ledger, LedgerState, State, StepCounts, Ticket
from megatron_fipo.rollout.saved_groups import Arrays, GroupRow, Saved
from megatron_fipo.rollout.work import Begun

LEDGER_FILE = Path("rollout", "ledger.json")
_BYTES_PER_FILE = 2**28
"""Of arrays, unless one group has more: a file is copied once in memory to be written."""


class RolloutState(Struct, frozen=True):
    """A run's rollouts at one moment."""

    collected: CollectorState
    data: Fingerprint | None
    """None in checkpoints from before it was kept."""


class Encoded(NamedTuple):
    """What is to be written."""

    ledger: dict[str, Any]
    files: Sequence[Arrays]

    def write(self, checkpoint: Path) -> None:
        """Write the files of a checkpoint. Raises OSError."""
        (checkpoint / LEDGER_FILE).parent.mkdir()
        write_json_atomically(checkpoint / LEDGER_FILE, self.ledger)
        for number, arrays in enumerate(self.files):
            write_atomically(samples_file(checkpoint, number), safetensors.numpy.save(arrays))


class _TicketRow(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A ticket, and its group once that is judged."""

    ticket: Ticket
    state: Literal["open", "ready"]
    group: GroupRow | None
    parts: GroupRow | None = None
    """What there is of an open ticket's samples."""
    indices: list[Count] = []
    """Which of its group's samples they are."""

    @property
    def saved(self) -> GroupRow | None:
        """What the files have of it."""
        return self.group or self.parts


class _Saved(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What stands in the JSON file."""

    order: OrderState
    data: Fingerprint
    next_number: Count
    ends: Ends
    step: StepCounts
    tickets: list[_TicketRow]
    files: list[Annotated[int, Meta(ge=1, le=2**62)]]
    """Groups, or parts of one, in each file of samples."""

    def ledger(self) -> LedgerState:
        """The ledger alone."""
        tickets = tuple((row.ticket, State(row.state)) for row in self.tickets)
        return LedgerState(self.next_number, self.ends, self.step, tickets)


def samples_file(checkpoint: Path, number: int) -> Path:
    """The file of samples of this number."""
    return checkpoint / LEDGER_FILE.parent / f"samples-{number:05d}.safetensors"


def encode(state: RolloutState) -> Encoded:
    """What to write of `state`, whose fingerprint is known.

    Raises:
        DataError: a number is not finite, or a group's parts do not belong together.
    """
    ledger, groups, begun = state.collected.ledger, state.collected.groups, state.collected.begun
    saved = {number: Saved(group.problem, group.samples) for number, group in groups.items()}
    saved |= {number: Saved(found.problem, list(found.parts.values())) for number, found in begun.items()}
    saved = {ticket.number: saved[ticket.number] for ticket, _ in ledger.tickets if ticket.number in saved}
    files = _files(list(saved.values()))
    try:
        packed = [saved_groups.pack(part) for part in files]
    except (ValueError, OverflowError) as error:
        raise DataError(f"a group that waits for its step cannot be saved: {error}") from None
    rows = dict(zip(saved, [row for part, _ in packed for row in part], strict=True))
    tickets = [
        _TicketRow(
            ticket,
            "ready" if at is State.READY else "open",
            rows.get(ticket.number) if at is State.READY else None,
            rows.get(ticket.number) if at is State.OPEN else None,
            list(begun[ticket.number].parts) if ticket.number in begun else [],
        )
        for ticket, at in ledger.tickets
    ]
    content = {
        "order": state.collected.order,
        "data": state.data,
        "next_number": ledger.next_number,
        "ends": ledger.ends,
        "step": ledger.step,
        "tickets": tickets,
        "files": [len(part) for part in files],
    }
    return Encoded(msgspec.to_builtins(content), [arrays for _, arrays in packed])


def read(checkpoint: Path, *, step: int, vocab_size: int) -> RolloutState:
    """What `Encoded.write` wrote.

    Args:
        step: the checkpoint's.
        vocab_size: the model's.

    Raises:
        DataError: a file is damaged, or holds what cannot be. One line, with file and key or tensor.
    """
    path = checkpoint / LEDGER_FILE
    try:
        saved = msgspec.json.decode(path.read_bytes(), type=_Saved)
    except msgspec.ValidationError as error:
        raise DataError(f"{path}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    _check(saved, step, path)
    rows = [row.saved for row in saved.tickets if row.saved is not None]
    groups: list[Saved] = []
    for number, count in enumerate(saved.files):
        part, file = rows[len(groups) : len(groups) + count], samples_file(checkpoint, number)
        arrays = saved_groups.read(file, part, described_by=path)
        saved_groups.check(arrays, file, vocab_size)
        groups += saved_groups.unpack(part, arrays, file)
    there = zip([row for row in saved.tickets if row.saved is not None], groups, strict=True)
    whole: dict[int, Group] = {}
    begun: dict[int, Begun] = {}
    for row, found in there:
        if row.group is not None:
            whole[row.ticket.number] = found.whole()
        else:
            begun[row.ticket.number] = Begun(found.problem, dict(zip(row.indices, found.samples, strict=True)))
    return RolloutState(CollectorState(saved.order, saved.ledger(), whole, begun), saved.data)


def _files(groups: Sequence[Saved]) -> list[list[Saved]]:
    """The groups of each file, in order."""
    parts: list[list[Saved]] = []
    room = 0
    for group in groups:
        size = sum(array.nbytes for sample in group.samples for array in sample.streams.values())
        if size > room:
            parts.append([])
            room = _BYTES_PER_FILE
        parts[-1].append(group)
        room -= size
    return parts


def _check(saved: _Saved, step: int, path: Path) -> None:
    """What types do not say."""
    check_data(saved.data, saved.order, f"{path}: ")
    try:
        Ledger().load(saved.ledger())
    except RolloutError as error:
        raise DataError(f"{path}: tickets: {error}") from None
    before = -1
    for place, row in enumerate(saved.tickets):
        where, ticket = f"{path}: tickets[{place}]", row.ticket
        if ticket.number <= before:
            raise DataError(f"{where}.ticket.number is {ticket.number}, and should be above {before}")
        before = ticket.number
        if (row.group is not None) != (row.state == "ready"):
            right = "a group" if row.state == "ready" else "null"
            raise DataError(f"{where}.group should be {right}, since the ticket is {row.state}")
        _check_parts(row, where)
        for name, group in (("group", row.group), ("parts", row.parts)):
            if group is None:
                continue
            if group.problem.id != ticket.problem:
                raise DataError(
                    f"{where}.{name}.problem.id is {group.problem.id!r}, and should be the ticket's, {ticket.problem!r}"
                )
            check_versions(group, step, f"{where}.{name}")
        if ticket.start_version > step:
            raise DataError(
                f"{where}.ticket.start_version is {ticket.start_version}, and should be at most the step, {step}"
            )
    if (there := sum(saved.files)) != (groups := sum(row.saved is not None for row in saved.tickets)):
        raise DataError(f"{path}: files has {there} groups, and should have {groups} as tickets has")


def _check_parts(row: _TicketRow, where: str) -> None:
    """A group is whole; parts are an open ticket's, each with its place in the group."""
    if row.group is not None and not row.group.is_whole:
        raise DataError(f"{where}.group has a response that has not ended or is not judged, and the ticket is ready")
    if row.parts is not None and row.state != "open":
        raise DataError(f"{where}.parts should be left out, since the ticket is {row.state}")
    count = len(row.parts.responses) if row.parts else 0
    if len(row.indices) != count or row.indices != sorted(set(row.indices)):
        raise DataError(f"{where}.indices are {row.indices}, and should be one for each of {count} parts, in order")


def check_data(data: Fingerprint | None, order: OrderState, where: str) -> None:
    """Raise DataError, which begins with `where`, if the order is not one of so many problems."""
    if data is not None and data.count != order.size:
        raise DataError(f"{where}data.count is {data.count}, and should be order.size beside it, {order.size}")


def check_versions(group: GroupRow, step: int, where: str) -> None:
    """Raise DataError, which begins with `where`, for a sample of weights that are not there yet."""
    for place, response in enumerate(group.responses):
        newest = max([response.weight_version, *(version for version, _, _ in response.spans)])
        if newest > step:
            raise DataError(
                f"{where}.responses[{place}].weight_version is {newest}, and should be at most the step, {step}"
            )
