"""How much each server has to do, and which of them gets what is next.

A server is asked for no more samples than its cache of keys and values holds, or it would put some back and compute
them again. How long responses are is learnt from those that have ended.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable

from megatron_fipo.config import RolloutConfig
from megatron_fipo.engines.states import Server
from megatron_fipo.records.problem import Problem
from megatron_fipo.rollout.work import Work

WAITING_GROUPS = 2
_FIRST_GROUPS = 8
"""Groups that have to end before their lengths are believed: the first to end are the shortest."""
_REMEMBERED_GROUPS = 256


def most_samples(max_num_seqs: int, group: int, in_memory: float) -> int:
    """Samples that a server is asked for at a time: those of a group at least. `in_memory`: as many as its cache holds.

    Beside the samples that it runs, those of WAITING_GROUPS groups wait there: an engine that is full is asked for no
    more before a whole group has ended, and still has work while the next one travels. Where memory is the limit, an
    engine would not have them wait.
    """
    return max(group, int(min(max_num_seqs + WAITING_GROUPS * group, in_memory)))


class ResponseLengths:
    """Lengths of the responses that have ended lately, of all problems and of each.

    Whole groups count: the short responses of a group end first.
    """

    def __init__(self, longest: int):
        """`longest`: the most tokens of a response."""
        self._longest = longest
        self._groups: deque[list[int]] = deque()
        self._count = self._tokens = self._squares = 0
        """Of these: how many responses, and the sums of their lengths and of the squares of these."""
        self._mean_of: dict[str, float] = {}

    def note(self, problem: Problem, lengths: Iterable[int]) -> None:
        """A group has ended."""
        found = list(lengths)
        self._groups.append(found)
        self._add(found, 1)
        if len(self._groups) > _REMEMBERED_GROUPS:
            self._add(self._groups.popleft(), -1)
        self._mean_of[problem.id] = sum(found) / len(found)

    @property
    def held(self) -> float:
        """Tokens that a response has on average, while it is sampled: long ones take long. Half the most at first."""
        if len(self._groups) < _FIRST_GROUPS:
            return self._longest / 2
        return self._squares / self._tokens / 2

    def expected(self, problem: Problem) -> float:
        """Mean length of the responses to this problem when it was sampled last; of all lately, if it was not."""
        return self._mean_of.get(problem.id, self._tokens / max(1, self._count))

    def _add(self, lengths: list[int], sign: int) -> None:
        self._count += sign * len(lengths)
        self._tokens += sign * sum(lengths)
        self._squares += sign * sum(length * length for length in lengths)


class Loads:
    """Samples that each server has been asked for and has not answered."""

    def __init__(self, config: RolloutConfig):
        self.lengths = ResponseLengths(config.max_response_length)
        self._config = config
        self._outstanding: Counter[str] = Counter()

    def count(self, server: Server, samples: int) -> None:
        """So many more are outstanding at this server; fewer, if negative."""
        self._outstanding[server.url] += samples

    def with_room(self, servers: Iterable[Server], work: Work) -> Server | None:
        """The server with the fewest outstanding samples, if it has places for what the work lacks."""
        server = min(servers, key=lambda server: self._outstanding[server.url])
        wanted = self._outstanding[server.url] + len(work.missing())
        return server if wanted <= self._places(server, work) else None

    def _places(self, server: Server, work: Work) -> int:
        """Samples that a server may have."""
        in_memory = math.inf
        if server.cache is not None:
            # The last block is half empty on average. Samples of a group share their prompt, which is left out: some
            # room for lengths above the average.
            tokens = len(work.problem.token_ids) + self.lengths.held + server.cache.block / 2
            in_memory = server.cache.tokens / max(tokens, server.cache.block)
        return most_samples(self._config.max_num_seqs, work.samples, in_memory)
