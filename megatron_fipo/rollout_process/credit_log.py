"""Which responses of a step are recorded for the credit viewer, and the file of what the trainer computed of them.

The rollout process has text and rewards, and the trainer has the values. The rollout process marks rows of a batch. The
trainer hands back its values of the marked ones after the step's last update.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.config import Config
from megatron_fipo.records.credit import TokenCredit, decode_pieces, join_pieces
from megatron_fipo.records.sample import Group
from megatron_fipo.tracking.credit_file import CreditAbout, CreditResponse, credit_path, warm_up, write_credit
from megatron_fipo.tracking.rollout_log import Decode

WARM_UP = "credit-warm-up"
"""Name of the thread in which libraries are loaded, so that the first step does not wait for them."""
_PER_GROUP = 4
_LONGEST_CHARACTER = 16
"""Tokens that one character can be made of, at most: where bytes never become one, text goes on behind them."""


@dataclass(frozen=True)
class _Marked:
    """A response whose values the trainer will hand back."""

    group: Group
    number: int
    """Of its group in this step's file."""
    index: int
    """Of the response in its group."""
    advantage: float


class CreditLog:
    """Records of one run. Calls for a step: `begin`, then for each batch of it `choose` and `mark`, then `write`."""

    def __init__(self, config: Config, run_directory: Path, decode: Decode):
        self._algorithm, self._settings = config.algorithm, config.tracking.credit
        self._run_directory, self._decode = run_directory, decode
        self._step = 0
        self._marked: dict[int, _Marked] = {}
        if self._settings.responses:
            threading.Thread(target=warm_up, name=WARM_UP).start()

    def begin(self, step: int) -> None:
        """Forget what was marked before."""
        self._step = step
        self._marked.clear()

    def choose(self, groups: Sequence[Group]) -> list[int]:
        """Return the rows to record of a batch that these judged groups become.

        Of a part of a step, only the part's share is chosen. Up to four responses of a group, from the worst reward to
        the best, so that they can be compared. Groups are spread evenly. The last one comes first, since the policy has
        not moved in the first update, where Δ is 0; where responses are long, earlier ones find no room.
        """
        settings = self._settings
        if settings.responses == 0 or self._step % settings.every or not groups:
            return []
        share = min(len(groups) / self._algorithm.prompts_per_step, 1.0)
        count, tokens = max(1, round(settings.responses * share)), int(settings.max_tokens * share)
        most = -(-count // _PER_GROUP)
        first = _first_rows(groups)
        rows: list[int] = []
        for place in reversed(_late(len(groups), min(most, len(groups)))):
            for index in _worst_to_best(groups[place], min(_PER_GROUP, count - len(rows))):
                length = len(groups[place].samples[index])
                if length <= tokens:
                    tokens -= length
                    rows.append(first[place] + _judged(groups[place]).index(index))
        return sorted(rows)

    def mark(
        self, groups: Sequence[Group], rows: Sequence[int], samples: Sequence[int], advantages: Sequence[float]
    ) -> None:
        """Remember the responses in these rows.

        Args:
            samples, advantages: the number and the advantage of each row's sample.
        """
        of_row = [(place, index) for place, group in enumerate(groups) for index in _judged(group)]
        numbers: dict[int, int] = {}
        begun = len({marked.number for marked in self._marked.values()})
        for row in rows:
            place, index = of_row[row]
            number = numbers.setdefault(place, begun + len(numbers))
            self._marked[samples[row]] = _Marked(groups[place], number, index, advantages[row])

    def write(self, frames: Sequence[bytes]) -> Path | None:
        """Write the step's file from what the ranks kept; None if they kept nothing.

        Raises:
            WireError: the frames are not of the responses that were marked.
            OSError: the file cannot be written.
        """
        pieces = [piece for frame in frames for piece in decode_pieces(frame)]
        if not pieces:
            return None
        lengths = {sample: len(found.group.samples[found.index]) for sample, found in self._marked.items()}
        joined = join_pieces(pieces, lengths)
        known: dict[int, str] = {}
        order = sorted(joined, key=lambda sample: (self._marked[sample].number, self._marked[sample].index))
        responses = [self._response(self._marked[sample], joined[sample], known) for sample in order]
        path = credit_path(self._run_directory, self._step)
        write_credit(path, CreditAbout.of(self._step, self._algorithm), responses)
        self._marked.clear()
        return path

    def _response(self, marked: _Marked, credit: TokenCredit, known: dict[int, str]) -> CreditResponse:
        problem = marked.group.problem
        sample, result = marked.group.samples[marked.index], marked.group.results[marked.index]
        facts = {
            "group": marked.number,
            "index": marked.index,
            "problem": _as_utf8(problem.id),
            "data_source": _as_utf8(problem.data_source),
            "prompt": _as_utf8(problem.text),
            "ground_truth": _as_utf8(str(problem.ground_truth)),
            "answer": _as_utf8(result.answer),
            "reward": result.reward,
            "accuracy": result.accuracy,
            "advantage": marked.advantage,
            "finish_reason": sample.finish_reason,
            "weight_version": sample.weight_version,
        }
        texts = token_texts(sample.token_ids.tolist(), self._decode, known)
        return CreditResponse(facts, texts, sample.token_ids, credit)


def token_texts(ids: list[int], decode: Decode, known: dict[int, str]) -> list[str]:
    """Return the text of each token; together they are the text of all, if the tokens' bytes are whole characters.

    A character of several tokens is the last one's. Bytes that never become a character are shown as U+FFFD, of which
    there may be another number than in the text of all. `known` is filled with the texts of single tokens.
    """
    for token in set(ids) - known.keys():
        known[token] = decode([token])
    texts = [known[token] for token in ids]
    if "".join(texts) == decode(ids):
        return texts
    # Characters of several tokens, or a tokenizer that reads a word's first token otherwise when it stands alone.
    texts, start, read = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, now = decode(ids[start:read]), decode(ids[start:end])
        if now.endswith("\ufffd") and end < len(ids) and end - read < _LONGEST_CHARACTER:
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, read = read, end
    return texts


def _as_utf8(text: str) -> str:
    """Return the text without halves of surrogate pairs, which a reward may find in JSON, and a file cannot have."""
    return text.encode(errors="replace").decode()


def _judged(group: Group) -> list[int]:
    """Return the indices of the responses that a batch has: a failed check is no verdict, and leaves them out."""
    return [index for index, result in enumerate(group.results) if result.was_judged]


def _first_rows(groups: Sequence[Group]) -> list[int]:
    rows, first = 0, []
    for group in groups:
        first.append(rows)
        rows += len(_judged(group))
    return first


def _late(size: int, count: int) -> list[int]:
    """Return the last place of each of `count` equal parts of `size` places."""
    return [(part + 1) * size // count - 1 for part in range(count)]


def _worst_to_best(group: Group, count: int) -> list[int]:
    """Return `count` of the judged responses, spread evenly from the worst reward to the best."""
    ranked = sorted(_judged(group), key=lambda index: group.results[index].reward)
    count = max(0, min(count, len(ranked)))
    if count < 2:
        return ranked[:count]
    return [ranked[round(place * (len(ranked) - 1) / (count - 1))] for place in range(count)]
