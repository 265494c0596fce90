"""The problems of a run: read or generated, de-duplicated, rendered and tokenised, with every drop counted.

De-duplication matters: the published parquet of DAPO-Math-17k holds its 17 k prompts about 100 times over, that of
AIME 2024 its 30 problems 32 times.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_fipo.config import DataConfig
from megatron_fipo.data.reasoning_tasks import generate
from megatron_fipo.data.sources import RawProblem, fetch_hub_files, read_files
from megatron_fipo.data.tokenizers import Tokenizer
from megatron_fipo.errors import ConfigError, DataError
from megatron_fipo.samples import Problem

Split = Literal["train", "validation"]
_logger = logging.getLogger(__name__)


@dataclass
class ProblemCounts:
    """What became of every row: rows = kept + duplicates + dropped_empty + dropped_overlong + dropped_held_out."""

    rows: int = 0
    kept: int = 0
    duplicates: int = 0
    conflicting_answers: int = 0
    """Duplicates whose answer differs from the first one's, which is the one kept."""
    dropped_empty: int = 0
    dropped_overlong: int = 0
    dropped_held_out: int = 0
    """Generated training problems that validation holds."""
    truncated: int = 0
    """Kept, with the left part of an over-long prompt cut off."""


@dataclass
class ProblemSet:
    """The problems of one split and how they came to be these."""

    problems: list[Problem]
    counts: ProblemCounts


def load_problems(config: DataConfig, split: Split, tokenizer: Tokenizer, max_prompt_length: int) -> ProblemSet:
    """The problems of one split, in the order of their source, unique by prompt.

    `max_prompt_length` in tokens. DataError names file, row and column of what is wrong, or says that nothing is left.
    """
    counts = ProblemCounts()
    unique = _unique(_rows(config, split), counts)
    problems = [
        problem
        for raw in _not_held_out(unique, config, split, counts)
        if (problem := _tokenise(raw, tokenizer, max_prompt_length, config.overlong_prompts, counts)) is not None
    ]
    counts.kept = len(problems)
    report = ", ".join(f"{name} {count}" for name, count in vars(counts).items() if count)
    _logger.info("%s problems: %s", split, report)
    if not problems:
        raise DataError(f"no {split} problem is left: {report or 'the source is empty'}")
    return ProblemSet(problems, counts)


def _rows(config: DataConfig, split: Split) -> Iterable[RawProblem]:
    if config.source == "reasoning_gym":
        return generate(config, split)
    names = config.train if split == "train" else config.validation
    if not names:
        raise ConfigError(f"data.{split}", "names no file", "give at least one, or embedded:NAME")
    return read_files(fetch_hub_files(names) if config.source == "hub" else names)


def _unique(rows: Iterable[RawProblem], counts: ProblemCounts) -> Iterator[RawProblem]:
    """The first row of each prompt; counts rows, duplicates and empty prompts."""
    answers: dict[str, str] = {}
    for raw in rows:
        counts.rows += 1
        if not any(message["content"].strip() for message in raw.messages):
            counts.dropped_empty += 1
            continue
        key = _key(raw)
        if key in answers:
            counts.duplicates += 1
            counts.conflicting_answers += answers[key] != raw.ground_truth
        else:
            answers[key] = raw.ground_truth
            yield raw


def _not_held_out(
    unique: Iterator[RawProblem], config: DataConfig, split: Split, counts: ProblemCounts
) -> Iterator[RawProblem]:
    """Keeps generated training problems apart from validation: a small task draws the same question in both."""
    held_out: set[str] = set()
    if config.source == "reasoning_gym" and split == "train":
        held_out = {_key(raw) for raw in generate(config, "validation")}
    for raw in unique:
        if _key(raw) in held_out:
            counts.dropped_held_out += 1
        else:
            yield raw


def _key(raw: RawProblem) -> str:
    return json.dumps([(message["role"], message["content"]) for message in raw.messages])


def _tokenise(
    raw: RawProblem, tokenizer: Tokenizer, max_prompt_length: int, overlong_prompts: str, counts: ProblemCounts
) -> Problem | None:
    text = tokenizer.render(raw.messages)
    token_ids = tokenizer.encode(text)
    # From the whole text: truncated prompts may agree.
    identity = hashlib.sha256(text.encode()).hexdigest()[:16]
    if len(token_ids) > max_prompt_length:
        if overlong_prompts == "error":
            raise DataError(
                f"{raw.where}: the prompt has {len(token_ids)} tokens, rollout.max_prompt_length is "
                f"{max_prompt_length} (data.overlong_prompts=drop or truncate_left would let the run go on)"
            )
        if overlong_prompts == "drop":
            counts.dropped_overlong += 1
            return None
        counts.truncated += 1
        token_ids = token_ids[-max_prompt_length:]
        text = tokenizer.decode(token_ids)
    return Problem(identity, text, token_ids, raw.ground_truth, raw.data_source, raw.extra)
