"""What rank 0 alone finds out, on every rank: its answer, or its refusal. Every rank calls these together.

Text travels as JSON in tensors on the CPU, and never as a pickle. The other ranks would else lose rank 0 in the middle
of a collective, and tell of that.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from megatron_fipo.errors import FipoError, RefusedOnRank0

_T = TypeVar("_T")


def fact_of_rank_0(fact: bool) -> bool:
    """Rank 0's `fact`."""
    told = torch.tensor([fact], dtype=torch.int64)
    dist.broadcast(told, src=0)
    return bool(told.item())


def answer_of_rank_0(work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, which JSON has to have a form for; lists stand for tuples.

    Raises:
        FipoError: what rank 0 refused; RefusedOnRank0 on the others.
    """
    said: dict[str, Any] = {}
    refused = None
    if dist.get_rank() == 0:
        try:
            said = {"answer": work()}
        except FipoError as error:
            said, refused = {"refusal": [str(error), error.exit_code]}, error
    said = json.loads(_text_of_rank_0(json.dumps(said)))
    if "refusal" in said:
        # Rank 0 stays until all have heard it: one that has not would tell of a lost connection.
        with suppress(RuntimeError):
            dist.all_reduce(torch.zeros(1))
        raise refused or RefusedOnRank0(*said["refusal"])
    return said["answer"]


def only_rank_0(work: Callable[[], _T]) -> _T | None:
    """What `work` returns on rank 0, and there alone; None elsewhere. Refusals are every rank's."""
    result: list[_T] = []
    answer_of_rank_0(lambda: result.append(work()))
    return result[0] if result else None


def _text_of_rank_0(text: str) -> str:
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    length = torch.tensor([data.numel()])
    dist.broadcast(length, src=0)
    if dist.get_rank() != 0:
        data = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, src=0)
    return bytes(data.tolist()).decode()
