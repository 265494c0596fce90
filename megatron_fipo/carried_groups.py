"""Groups in a checkpoint: a row of JSON for each, and everything that is as long as their tokens in four arrays.

JSON takes 67 bytes a token, and a step of large groups has millions of them to carry over.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy
from msgspec import Meta, Struct
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open

from megatron_fipo.errors import DataError, one_line
from megatron_fipo.rewards.rules import LARGEST_REWARD
from megatron_fipo.samples import Group, Judgement, Problem, Response

Arrays = dict[str, numpy.ndarray]
_PROMPTS, _TOKENS, _LOG_PROBS, _TEXT = "prompt_token_ids", "response_token_ids", "response_log_probs", "response_text"
TYPES = {_PROMPTS: "I32", _TOKENS: "I32", _LOG_PROBS: "F32", _TEXT: "U8"}
"""The arrays, all of one dimension, by safetensors' names of their types. Text is UTF-8."""
_NUMPY_TYPES = {"I32": numpy.int32, "F32": numpy.float32, "U8": numpy.uint8}

_Count = Annotated[int, Meta(ge=0, le=2**62)]
_OneOrMore = Annotated[int, Meta(ge=1, le=2**62)]
_Verdict = Annotated[float, Meta(ge=-1.1 * LARGEST_REWARD, le=1.1 * LARGEST_REWARD)]
"""With room for the overlong penalty."""


class ProblemRow(Struct, frozen=True, forbid_unknown_fields=True):
    """A problem without its token ids, and without its row's columns: its responses have been judged."""

    id: str
    text: str
    tokens: _OneOrMore
    ground_truth: str
    data_source: str
    extra: dict[str, Any]


class ResponseRow(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A response and its judgement, without token ids, log-probs and text."""

    tokens: _OneOrMore
    text_bytes: _Count
    finish_reason: Annotated[str, Meta(pattern=r"^(stop|length)\Z")]
    weight_version: _Count
    accuracy: _Verdict
    reward: _Verdict
    answer: str
    outcome: Annotated[str, Meta(pattern=r"^(judged|too_long|timeout|crash)\Z")]
    extra: dict[str, _Verdict | str] = {}


class GroupRow(Struct, frozen=True, forbid_unknown_fields=True):
    """A group; its parts of the arrays follow those of the groups before it, response after response."""

    problem: ProblemRow
    responses: Annotated[list[ResponseRow], Meta(min_length=1)]


def pack(groups: Sequence[Group]) -> tuple[list[GroupRow], Arrays]:
    """Judged groups as rows and arrays.

    Log-probs become fp32, which they are when they come from an engine and when they are trained on.

    Raises:
        ValueError, OverflowError: parts of a group do not belong together, or a token id is no 32-bit number.
    """
    rows: list[GroupRow] = []
    texts: list[bytes] = []
    for group in groups:
        encoded = [text.encode() for text in group.text]
        rows.append(_row(group, encoded))
        texts += encoded
    responses = [response for group in groups for response in group.responses]
    arrays = {
        _PROMPTS: _flat(_PROMPTS, [group.problem.token_ids for group in groups]),
        _TOKENS: _flat(_TOKENS, [response.token_ids for response in responses]),
        _LOG_PROBS: _flat(_LOG_PROBS, [response.log_probs for response in responses]),
        _TEXT: numpy.frombuffer(b"".join(texts), numpy.uint8),
    }
    return rows, arrays


def unpack(rows: Sequence[GroupRow], arrays: Arrays, path: Path) -> list[Group]:
    """Inverse of `pack` for arrays that `read` gave. DataError, naming `path`, where text is not UTF-8."""
    places = dict.fromkeys(TYPES, 0)

    def take(name: str, count: int) -> numpy.ndarray:
        start = places[name]
        places[name] = start + count
        return arrays[name][start : start + count]

    groups = []
    for row in rows:
        problem = row.problem
        group = Group(
            Problem(
                problem.id,
                problem.text,
                take(_PROMPTS, problem.tokens).tolist(),
                problem.ground_truth,
                problem.data_source,
                problem.extra,
            ),
            [],
        )
        for saved in row.responses:
            token_ids, log_probs = take(_TOKENS, saved.tokens), take(_LOG_PROBS, saved.tokens)
            group.responses.append(Response(token_ids, log_probs, saved.finish_reason, saved.weight_version))
            group.judgements.append(_judgement(saved))
            start = places[_TEXT]
            try:
                group.text.append(take(_TEXT, saved.text_bytes).tobytes().decode())
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: {_TEXT} is not UTF-8 at {start + error.start}") from None
        groups.append(group)
    return groups


def read(path: Path, rows: Sequence[GroupRow], described_by: Path) -> Arrays:
    """The arrays of `rows`. DataError, naming file and tensor, unless types and lengths are what the rows say."""
    lengths = _lengths(rows)
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            if names != TYPES.keys():
                raise DataError(
                    f"{path} has the tensors {', '.join(sorted(names))}, and should have {', '.join(TYPES)}"
                )
            for name, kind in TYPES.items():
                stored = file.get_slice(name)
                found = (stored.get_dtype(), list(stored.get_shape()))
                if found != (kind, [lengths[name]]):
                    raise DataError(
                        f"{path}: {name} is {found[0]} of shape {found[1]}, and should be {kind} of shape "
                        f"{[lengths[name]]} by {described_by.name}"
                    )
            return {name: file.get_tensor(name) for name in TYPES}
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None


def check(arrays: Mapping[str, numpy.ndarray], path: Path, vocab_size: int) -> None:
    """DataError, naming file, tensor and place, for a token id outside the model's and for a log-prob that is none."""
    for name in (_PROMPTS, _TOKENS):
        _refuse(path, name, arrays[name], (arrays[name] < 0) | (arrays[name] >= vocab_size), f"0 to {vocab_size - 1}")
    _refuse(path, _LOG_PROBS, arrays[_LOG_PROBS], ~numpy.isfinite(arrays[_LOG_PROBS]), "a finite number")


def _refuse(path: Path, name: str, array: numpy.ndarray, wrong: numpy.ndarray, right: str) -> None:
    if wrong.any():
        place = int(wrong.argmax())
        raise DataError(f"{path}: {name} is {array[place]} at {place}, and should be {right}")


def _row(group: Group, texts: Sequence[bytes]) -> GroupRow:
    problem = group.problem
    responses = []
    for response, judgement, text in zip(group.responses, group.judgements, texts, strict=True):
        if len(response.token_ids) != len(response.log_probs):
            counts = f"{len(response.token_ids)} tokens, {len(response.log_probs)} log-probs"
            raise ValueError(f"a response to problem {problem.id} has {counts}")
        if not (math.isfinite(judgement.accuracy) and math.isfinite(judgement.reward)):
            verdict = f"accuracy {judgement.accuracy} and reward {judgement.reward}"
            raise ValueError(f"a response to problem {problem.id} has {verdict}; finite numbers can be saved")
        responses.append(
            ResponseRow(
                tokens=len(response.token_ids),
                text_bytes=len(text),
                finish_reason=response.finish_reason,
                weight_version=response.weight_version,
                accuracy=judgement.accuracy,
                reward=judgement.reward,
                answer=judgement.answer,
                outcome=judgement.outcome,
                extra=judgement.extra,
            )
        )
    row = ProblemRow(
        id=problem.id,
        text=problem.text,
        tokens=len(problem.token_ids),
        ground_truth=problem.ground_truth,
        data_source=problem.data_source,
        extra=problem.extra,
    )
    return GroupRow(row, responses)


def _judgement(saved: ResponseRow) -> Judgement:
    return Judgement(saved.accuracy, saved.reward, saved.answer, saved.outcome, saved.extra)


def _flat(name: str, values: Sequence[ArrayLike]) -> numpy.ndarray:
    """All values, one after the other, in the type of the array `name`."""
    kind = _NUMPY_TYPES[TYPES[name]]
    with numpy.errstate(over="ignore"):  # `check` finds the infinity that it becomes
        return numpy.concatenate([numpy.empty(0, kind), *(numpy.array(value, kind) for value in values)])


def _lengths(rows: Sequence[GroupRow]) -> dict[str, int]:
    """The length of each array, by the rows."""
    responses = [response for row in rows for response in row.responses]
    tokens = sum(response.tokens for response in responses)
    text = sum(response.text_bytes for response in responses)
    return {_PROMPTS: sum(row.problem.tokens for row in rows), _TOKENS: tokens, _LOG_PROBS: tokens, _TEXT: text}
