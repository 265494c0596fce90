"""A few rollouts of each step and validation as files: text for a person, JSONL beside it for a program."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from megatron_fipo.files import write_atomically
from megatron_fipo.samples import Group

_PER_GROUP = 4
_RULE = "=" * 100


def keep_samples(
    run_directory: Path, step: int, groups: list[Group], count: int, of: Literal["step", "validation"] = "step"
) -> Path | None:
    """Write about `count` of the responses to samples/step-NNNNNN.{txt,jsonl}; return the text file's path.

    Those of held-out problems, after so many steps, go to validation-NNNNNN. Up to four responses each of groups spread
    over the batch, from the group's worst reward to its best, so that what is rewarded can be read off. With nothing to
    keep, writes nothing and returns None.
    """
    chosen = list(_choose(groups, count))
    if not chosen:
        return None
    directory = run_directory / "samples"
    directory.mkdir(exist_ok=True)
    path = directory / f"{of}-{step:06d}.txt"
    rows = [_row(step, group, index) for group, indices in chosen for index in indices]
    write_atomically(path.with_suffix(".jsonl"), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_atomically(path, "\n".join(_readable(step, group, indices) for group, indices in chosen))
    return path


def _choose(groups: list[Group], count: int) -> Iterator[tuple[Group, list[int]]]:
    """Groups, each with the indices of its responses to keep, worst reward first; `count` indices in all at most."""
    judged = [group for group in groups if group.judgements]
    most = min(_PER_GROUP, max((len(group.judgements) for group in judged), default=1))
    shown = min(len(judged), -(-count // most))
    for position in _spread(len(judged), shown):
        group = judged[position]
        by_reward = sorted(range(len(group.judgements)), key=lambda index: group.judgements[index].reward)
        take = min(len(by_reward), _PER_GROUP, count)
        count -= take
        yield group, [by_reward[rank] for rank in _spread(len(by_reward), take)]


def _spread(size: int, count: int) -> list[int]:
    """`count` positions spread evenly over `size`, both ends among them."""
    if count < 2:
        return list(range(count))
    return [round(index * (size - 1) / (count - 1)) for index in range(count)]


def _row(step: int, group: Group, index: int) -> dict[str, object]:
    response, judgement = group.responses[index], group.judgements[index]
    return {
        "step": step,
        "problem": group.problem.id,
        "data_source": group.problem.data_source,
        "prompt": group.problem.text,
        "ground_truth": group.problem.ground_truth,
        "response": group.text[index],
        "answer": judgement.answer,
        "reward": judgement.reward if judgement.was_judged else None,
        "accuracy": judgement.accuracy if judgement.was_judged else None,
        "outcome": judgement.outcome,
        **({"extra": judgement.extra} if judgement.extra else {}),
        "length": len(response.token_ids),
        "finish_reason": response.finish_reason,
        "weight_version": response.weight_version,
    }


def _readable(step: int, group: Group, indices: list[int]) -> str:
    problem = group.problem
    accuracies = [judgement.accuracy for judgement in group.judgements if judgement.was_judged]
    parts = [
        _RULE,
        f"step {step} · problem {problem.id} ({problem.data_source}) · right answer {problem.ground_truth}"
        f" · {sum(accuracies):g} of {len(accuracies)} right",
        _RULE,
        problem.text.rstrip("\n"),
        "",
    ]
    for number, index in enumerate(indices, start=1):
        response, judgement = group.responses[index], group.judgements[index]
        verdict = f"reward {judgement.reward:+.3g} · accuracy {judgement.accuracy:.3g} · {judgement.outcome}"
        parts += [
            f"---- {number}/{len(indices)} · {verdict if judgement.was_judged else judgement.outcome}"
            f" · answer {judgement.answer or '(none)'} · {len(response.token_ids)} tokens"
            f" · ended by {response.finish_reason} · weights v{response.weight_version} ----",
            group.text[index].rstrip("\n"),
            "",
        ]
    return _without_control_characters("\n".join(parts)) + "\n"


def _without_control_characters(text: str) -> str:
    """A model can sample a terminal's escape sequences: show them, so that reading the file does not run them."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
