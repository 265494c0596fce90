"""Write a few rollouts of each step and validation to files: as text for people, and as JSONL for programs."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from megatron_fipo.files import write_atomically
from megatron_fipo.records.sample import Group, Sample

Decode = Callable[[list[int]], str]
"""Token ids to text."""

_PER_GROUP = 4
_RULE = "=" * 100
_HALF_PAIR = re.compile("[\ud800-\udfff]")


def log_rollouts(
    run_directory: Path,
    step: int,
    groups: Sequence[Group],
    count: int,
    decode: Decode,
    of: Literal["step", "validation"] = "step",
) -> Path | None:
    """Write about `count` of the responses to samples/step-NNNNNN.{txt,jsonl}, and return the text file's path.

    Responses to held-out problems are written to validation-NNNNNN. The groups are spread evenly over the batch. Each
    has up to four responses, from the worst reward to the best, so that a reader sees what is rewarded. If there is
    nothing to write, no file is written, and the result is None. `decode` gives the text of each turn.
    """
    chosen = list(_choose(groups, count))
    if not chosen:
        return None
    directory = run_directory / "samples"
    directory.mkdir(exist_ok=True)
    path = directory / f"{of}-{step:06d}.txt"
    rows = [_row(step, group, index, decode) for group, indices in chosen for index in indices]
    write_atomically(path.with_suffix(".jsonl"), "".join(_line(row) for row in rows))
    write_atomically(path, "\n".join(_readable(step, group, indices, decode) for group, indices in chosen))
    return path


def _choose(groups: Sequence[Group], count: int) -> Iterator[tuple[Group, list[int]]]:
    """Yield groups with the indices of their responses to write, worst reward first; at most `count` indices."""
    judged = [group for group in groups if group.samples]
    most = min(_PER_GROUP, max((len(group.samples) for group in judged), default=1))
    shown = min(len(judged), -(-count // most))
    for position in _spread(len(judged), shown):
        group = judged[position]
        by_reward = sorted(range(len(group.results)), key=[result.reward for result in group.results].__getitem__)
        take = min(len(by_reward), _PER_GROUP, count)
        count -= take
        yield group, [by_reward[rank] for rank in _spread(len(by_reward), take)]


def _spread(size: int, count: int) -> list[int]:
    """Return `count` positions spread evenly over `size`, including both ends."""
    if count < 2:
        return list(range(count))
    return [round(index * (size - 1) / (count - 1)) for index in range(count)]


def _turns(sample: Sample, decode: Decode) -> list[tuple[str, str]]:
    """Who produced each segment, policy or environment, and its text; none of a sample of one turn."""
    return [
        ("policy" if part.action else "environment", decode(sample.token_ids[part.start : part.end].tolist()))
        for part in sample.segments
    ]


def _row(step: int, group: Group, index: int, decode: Decode) -> dict[str, object]:
    sample, result = group.samples[index], group.results[index]
    return {
        "step": step,
        "problem": group.problem.id,
        "data_source": group.problem.data_source,
        "prompt": group.problem.text,
        "ground_truth": group.problem.ground_truth,
        "response": sample.text,
        **({"turns": [{"by": by, "text": text} for by, text in _turns(sample, decode)]} if sample.told else {}),
        "answer": result.answer,
        "reward": result.reward if result.was_judged else None,
        "accuracy": result.accuracy if result.was_judged else None,
        "outcome": result.outcome,
        **({"extra": result.extra} if result.extra else {}),
        "length": sample.actions,
        **({"context_length": len(sample) - sample.actions} if sample.told else {}),
        "finish_reason": sample.finish_reason,
        "weight_version": sample.weight_version,
    }


def _line(row: dict[str, object]) -> str:
    """Return a row as JSON. Halves of surrogate pairs, which a reward may return, are escapes: UTF-8 has none."""
    text = json.dumps(row, ensure_ascii=False)
    return _HALF_PAIR.sub(lambda half: f"\\u{ord(half[0]):04x}", text) + "\n"


def _readable(step: int, group: Group, indices: list[int], decode: Decode) -> str:
    problem = group.problem
    accuracies = [result.accuracy for result in group.results if result.was_judged]
    parts = [
        _RULE,
        f"step {step} · problem {problem.id} ({problem.data_source}) · right answer {problem.ground_truth}"
        f" · {sum(accuracies):g} of {len(accuracies)} right",
        _RULE,
        problem.text.rstrip("\n"),
        "",
    ]
    for number, index in enumerate(indices, start=1):
        sample, result = group.samples[index], group.results[index]
        verdict = f"reward {result.reward:+.3g} · accuracy {result.accuracy:.3g} · {result.outcome}"
        parts += [
            f"---- {number}/{len(indices)} · {verdict if result.was_judged else result.outcome}"
            f" · answer {result.answer or '(none)'} · {_size(sample)}"
            f" · ended by {sample.finish_reason} · weights v{sample.weight_version} ----",
        ]
        for by, text in _turns(sample, decode) or [("policy", sample.text)]:
            parts += [text.rstrip("\n")] if by == "policy" else ["-- told:", text.strip("\n"), "--"]
        parts.append("")
    return _without_control_characters("\n".join(parts)) + "\n"


def _size(sample: Sample) -> str:
    told = len(sample) - sample.actions
    return f"{sample.actions} tokens" + (f" in {sample.turns} turns · told {told} tokens" if sample.told else "")


def _without_control_characters(text: str) -> str:
    """Make control characters visible. A model can sample escape sequences, which a terminal would execute."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
