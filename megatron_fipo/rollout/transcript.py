"""What has been said in one sample so far: actions with all that the engine tells of them, and context between them."""

from collections.abc import Sequence

import numpy

from megatron_fipo.records.problem import Problem
from megatron_fipo.records.sample import RewardResult, Sample
from megatron_fipo.records.segments import segments_around
from megatron_fipo.records.streams import TOKEN_IDS, checked, read_only, sampled_streams
from megatron_fipo.records.versions import VersionSpan, joined, mixed, oldest


class Transcript:
    """Grows by `tell` and `act`, token after token."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.turns = 0
        """Actions so far."""
        self._parts: dict[str, list[numpy.ndarray]] = {name: [] for name in sampled_streams()}
        self._whole: dict[str, numpy.ndarray] = {}
        """Whole streams of the last action: its prompt is all that was said before."""
        self._told: list[tuple[int, int]] = []
        self._versions: list[VersionSpan] = []
        self._length = 0

    def __len__(self) -> int:
        """Tokens after the prompt."""
        return self._length

    def tell(self, context: Sequence[int]) -> None:
        """Add context, which may be empty. Other streams than the tokens have their fill there."""
        if not context:
            return
        for name, stream in sampled_streams().items():
            values = numpy.full(len(context), stream.fill, stream.dtype)
            if name == TOKEN_IDS:
                values = numpy.array(context, numpy.int32)
            self._parts[name].append(values)
        self._told.append((self._length, self._length + len(context)))
        self._length += len(context)

    def act(self, action: Sample) -> None:
        """Add what the policy produced."""
        self._whole = {name: values for name, values in action.streams.items() if name not in self._parts}
        for name, parts in self._parts.items():
            parts.append(action.streams[name])
        self._versions += [span.moved(self._length) for span in action.versions]
        self._length += len(action)
        self.turns += 1

    def token_ids(self) -> numpy.ndarray:
        """[prompt + all turns] int32, read-only: what the next action follows."""
        return read_only(numpy.concatenate([self.problem.token_ids, *self._parts[TOKEN_IDS]]))

    def sample(self, finish_reason: str, result: RewardResult | None = None) -> Sample:
        """All of it up to the last action; of the oldest weights that an action is of."""
        told, end = self._told, self._length
        if told and told[-1][1] == end:  # an environment failed, and nothing follows
            end = told[-1][0]
            told = told[:-1]
        streams = {
            name: numpy.concatenate([numpy.empty(0, stream.dtype), *self._parts[name]])[:end]
            for name, stream in sampled_streams().items()
        }
        return Sample(
            checked({**streams, **self._whole}, "a sample"),
            finish_reason,
            oldest(self._versions) if self._versions else 0,
            result=result,
            segments=segments_around(told, end, "a sample"),
            spans=mixed(joined(self._versions)),
        )
