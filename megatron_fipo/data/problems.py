"""The problems of a run: read or generated, de-duplicated, rendered and tokenised, with every drop counted.

De-duplication matters: the published parquet file of DAPO-Math-17k has each of its 17 k prompts about 100 times, and
that of AIME 2024 has each of its 30 problems 32 times.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_fipo.config import DataConfig
from megatron_fipo.data.fingerprint import Fingerprint, Fingerprinter
from megatron_fipo.data.reasoning_tasks import generate
from megatron_fipo.data.row_text import row_text
from megatron_fipo.data.rows import names_of, rows_of
from megatron_fipo.data.sources import RawProblem, refuse
from megatron_fipo.data.tokenizers import Tokenizer
from megatron_fipo.data.vocabulary import outside
from megatron_fipo.errors import DataError
from megatron_fipo.records.problem import Problem, prompt_ids

Split = Literal["train", "validation"]
_LONG_ANSWER = 300
_logger = logging.getLogger(__name__)


@dataclass
class ProblemCounts:
    """How many rows were kept, duplicates or dropped: rows = kept + duplicates + all dropped_… counts."""

    rows: int = 0
    kept: int = 0
    duplicates: int = 0
    conflicting_answers: int = 0
    """Duplicates whose answer differs from that of the first row, which is kept."""
    dropped_empty: int = 0
    dropped_overlong: int = 0
    shortest_overlong: int = 0
    """Length of the shortest of these, in tokens."""
    dropped_bad_answers: int = 0
    """Rows whose answer is missing or cannot be read, with data.bad_answers=drop."""
    dropped_held_out: int = 0
    """Training problems whose question is also in validation."""
    long_answers: int = 0
    """Kept rows with an answer that looks like a worked solution."""
    truncated: int = 0
    """Kept rows with an overlong prompt, whose beginning was cut off."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in vars(self).items() if count)


@dataclass(frozen=True)
class ProblemSet:
    """The problems of one split, with counts and warnings."""

    problems: list[Problem]
    counts: ProblemCounts
    fingerprint: Fingerprint
    warnings: list[str]
    """Warnings about them for the user."""


def load_problems(
    config: DataConfig,
    split: Split,
    tokenizer: Tokenizer,
    max_prompt_length: int,
    *,
    validates: bool = True,
    keep_columns: bool = True,
) -> ProblemSet:
    """Load the problems of one split, in the order of their source, unique by prompt.

    Args:
        max_prompt_length: in tokens.
        validates: whether the run validates; if so, training leaves out the validation problems.
        keep_columns: whether problems keep all columns of their rows, for a reward of the user's own.

    Raises:
        DataError: a file, row or column is wrong, which it names, or no problem is left.
        ConfigError: a key names something that does not exist.
    """
    counts = ProblemCounts()
    held_out = _questions(config) if split == "train" and validates else set()
    problems, fingerprinter = [], Fingerprinter()
    rows = _rows(config, split, counts, every_column=keep_columns)
    for raw in _not_held_out(_unique(rows, counts), held_out, config.prompt_template, counts):
        problem = _tokenise(raw, tokenizer, max_prompt_length, config.overlong_prompts, counts)
        if problem is not None:
            if keep_columns:
                problem = replace(problem, columns=row_text(raw.row))
            problems.append(problem)
            fingerprinter.add(raw.messages, raw.ground_truth, problem.token_ids.tolist())
    counts.kept = len(problems)
    counts.long_answers = sum(len(problem.ground_truth) > _LONG_ANSWER for problem in problems)
    _logger.info("%s problems: %s", split, counts)
    if not problems:
        raise DataError(_nothing_left(config, split, counts))
    return ProblemSet(problems, counts, fingerprinter.fingerprint(), list(_warnings(split, counts, tokenizer)))


def _nothing_left(config: DataConfig, split: Split, counts: ProblemCounts) -> str:
    """Return the message that every row was dropped, with the source and what would be right."""
    remedies = {
        "dropped_held_out": "validation asks all of these questions: give other training or validation problems",
        "dropped_overlong": f"rollout.max_prompt_length={counts.shortest_overlong} or more, or a shorter "
        "data.prompt_template",
        "dropped_empty": "give rows that ask something",
        "dropped_bad_answers": "data.bad_answers=error says what is wrong with the first",
    }
    names = config.train if split == "train" else config.validation
    source = f"data.task={config.task}" if config.source == "reasoning_gym" else ", ".join(names)
    most = max(remedies, key=lambda name: int(getattr(counts, name)))
    return f"no {split} problem is left: {counts} ({remedies[most]}) of {source}"


def _warnings(split: Split, counts: ProblemCounts, tokenizer: Tokenizer) -> Iterator[str]:
    if counts.conflicting_answers:
        yield (
            f"{counts.conflicting_answers} {split} rows repeat a prompt with another answer; "
            "the first answer of each prompt is used"
        )
    if counts.long_answers:
        yield (
            f"{counts.long_answers} of {counts.kept} {split} answers have more than {_LONG_ANSWER} characters, as "
            "worked solutions have; data.answer_format=gsm8k, boxed or pattern takes the answer out of them"
        )
    if split == "train" and tokenizer.template is not None and tokenizer.template.depends_on_date:
        yield (
            "the chat template writes today's date into the prompts, so they will differ tomorrow; "
            "data.chat_template_date=YYYY-MM-DD fixes the date"
        )


def _rows(
    config: DataConfig, split: Split, counts: ProblemCounts, *, every_column: bool = False
) -> Iterator[RawProblem]:
    """Yield the rows of a split whose answers can be used, and count the others."""
    if config.source == "reasoning_gym":
        yield from generate(config, split)
        return

    def drop(error: DataError) -> None:
        counts.rows += 1
        counts.dropped_bad_answers += 1

    on_bad_answer = drop if config.bad_answers == "drop" else refuse
    for name in names_of(config, split):
        yield from rows_of(name, config, split, on_bad_answer, every_column=every_column)


def _questions(config: DataConfig) -> set[str]:
    """Return the questions of validation, if the run validates."""
    if config.source != "reasoning_gym" and not config.validation:
        return set()
    rows = _rows(config, "validation", ProblemCounts())
    return {raw.same_question(config.prompt_template) for raw in rows}


def _unique(rows: Iterable[RawProblem], counts: ProblemCounts) -> Iterator[RawProblem]:
    """Yield the first row of each prompt. Count rows, duplicates and empty prompts."""
    answers: dict[str, str] = {}
    for raw in rows:
        counts.rows += 1
        if not raw.question.strip():
            counts.dropped_empty += 1
            continue
        key = json.dumps([(message["role"], message["content"]) for message in raw.messages])
        if key in answers:
            counts.duplicates += 1
            counts.conflicting_answers += answers[key] != raw.ground_truth
        else:
            answers[key] = raw.ground_truth
            yield raw


def _not_held_out(
    unique: Iterator[RawProblem], held_out: set[str], prompt_template: str, counts: ProblemCounts
) -> Iterator[RawProblem]:
    """Leave out validation problems: training sets often contain benchmarks, and small tasks repeat problems."""
    for raw in unique:
        if held_out and raw.same_question(prompt_template) in held_out:
            counts.dropped_held_out += 1
        else:
            yield raw


def _tokenise(
    raw: RawProblem, tokenizer: Tokenizer, max_prompt_length: int, overlong_prompts: str, counts: ProblemCounts
) -> Problem | None:
    try:
        text = tokenizer.render(raw.messages)
    except DataError as error:
        raise DataError(f"{raw.where}, prompt: {error}") from error
    token_ids = tokenizer.encode(text)
    if (token := outside(token_ids, tokenizer.size)) is not None:
        raise DataError(f"{raw.where}: the prompt has the token id {token}, outside the tokenizer's {tokenizer.size}")
    if not token_ids:
        counts.dropped_empty += 1
        return None
    # Computed from the whole text, since truncated prompts may be equal.
    identity = hashlib.sha256(text.encode()).hexdigest()[:16]
    if len(token_ids) > max_prompt_length:
        if overlong_prompts == "error":
            raise DataError(
                f"{raw.where}: the prompt has {len(token_ids)} tokens, rollout.max_prompt_length is "
                f"{max_prompt_length} (data.overlong_prompts=drop or truncate_left would let the run go on)"
            )
        if overlong_prompts == "drop":
            counts.dropped_overlong += 1
            counts.shortest_overlong = min(counts.shortest_overlong or len(token_ids), len(token_ids))
            return None
        counts.truncated += 1
        token_ids = token_ids[-max_prompt_length:]
        text = tokenizer.decode(token_ids)
    return Problem(identity, text, prompt_ids(token_ids), raw.ground_truth, raw.data_source, raw.extra)
