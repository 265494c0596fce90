"""Groups in a checkpoint, whole or not: a row of JSON for each, and what is as long as their tokens in some arrays.

JSON takes 67 bytes a token, and a step of large groups has millions of them to carry over.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy
from msgspec import Meta, Struct
from safetensors import SafetensorError, safe_open

from megatron_fipo.errors import DataError, one_line
from megatron_fipo.records.problem import Problem, prompt_ids
from megatron_fipo.records.sample import Group, Partial, RewardResult, Sample
from megatron_fipo.records.segments import segments_around
from megatron_fipo.records.streams import ROLLOUT_LOG_PROBS, ROUTED_EXPERTS, TOKEN_IDS, checked, sampled_streams
from megatron_fipo.records.versions import VersionSpan
from megatron_fipo.rewards.rules import LARGEST_REWARD

Arrays = dict[str, numpy.ndarray]
_PROMPTS, _TEXT = "prompt_token_ids", "response_text"
_STREAM_NAMES = {ROLLOUT_LOG_PROBS: "response_log_probs"}
"""Streams that checkpoints have had under another name than response_ and theirs from the start."""
_ROUTES = f"response_{ROUTED_EXPERTS}"
_STORED_TYPES = {"int32": "I32", "float32": "F32", "uint8": "U8"}
"""safetensors' names of the types."""


def types() -> dict[str, str]:
    """The arrays that are always there, of one dimension, with their types. Text is UTF-8; streams follow the table.

    Routed experts are in one more, _ROUTES, if any response has them.
    """
    streams = {_stored(name): stream.dtype for name, stream in sampled_streams().items()}
    return {_PROMPTS: "int32", **streams, _TEXT: "uint8"}


def _stored(stream: str) -> str:
    """The name of a stream's array."""
    return _STREAM_NAMES.get(stream, f"response_{stream}")


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


BEGUN, UNJUDGED = "begun", "unjudged"
"""The finish reason of a sample that has not ended, and the outcome of one that is not judged."""


class ResponseRow(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A response and its judgement, without token ids, log-probs and text."""

    tokens: _Count
    """None where an environment failed before the first action."""
    text_bytes: _Count
    finish_reason: Annotated[str, Meta(pattern=r"^(stop|length|turns|environment|begun)\Z")]
    weight_version: _Count
    accuracy: _Verdict
    reward: _Verdict
    answer: str
    outcome: Annotated[str, Meta(pattern=r"^(judged|too_long|timeout|crash|unjudged)\Z")]
    extra: dict[str, _Verdict | str] = {}
    told: list[Annotated[list[_Count], Meta(min_length=2, max_length=2)]] = []
    """Start and end of each stretch that the policy did not produce; none in checkpoints from before there were."""
    spans: list[Annotated[list[_Count], Meta(min_length=3, max_length=3)]] = []
    """Version, start and end of each stretch, where several versions of the weights sampled it."""
    routed_bytes: Annotated[int, Meta(ge=0, le=2**20)] = 0
    """Bytes of routed experts of each token, the prompt's included; 0: it has none."""

    @property
    def is_whole(self) -> bool:
        """Whether it has ended and is judged."""
        return self.finish_reason != BEGUN and self.outcome != UNJUDGED


class GroupRow(Struct, frozen=True, forbid_unknown_fields=True):
    """A group; its parts of the arrays follow those of the groups before it, response after response."""

    problem: ProblemRow
    responses: Annotated[list[ResponseRow], Meta(min_length=1)]

    @property
    def is_whole(self) -> bool:
        """Whether all responses have ended and are judged."""
        return all(response.is_whole for response in self.responses)


class Saved(NamedTuple):
    """Samples of one problem, whole or not."""

    problem: Problem
    samples: Sequence[Sample | Partial]

    def whole(self) -> Group:
        """The group, of those samples that have ended: all of them, where its row says so."""
        return Group(self.problem, tuple(sample for sample in self.samples if isinstance(sample, Sample)))


def pack(groups: Sequence[Saved]) -> tuple[list[GroupRow], Arrays]:
    """Groups as rows and arrays.

    Raises:
        ValueError, OverflowError: a group has numbers that cannot be saved.
    """
    samples = [sample for group in groups for sample in group.samples]
    texts = [sample.text.encode() if isinstance(sample, Sample) else b"" for sample in samples]
    encoded = iter(texts)
    rows = [_row(group, [len(next(encoded)) for _ in group.samples]) for group in groups]
    arrays = {_PROMPTS: _flat("int32", [group.problem.token_ids for group in groups])}
    for name, stream in sampled_streams().items():
        arrays[_stored(name)] = _flat(stream.dtype, [sample.streams[name] for sample in samples])
    if routed := [sample.streams[ROUTED_EXPERTS] for sample in samples if ROUTED_EXPERTS in sample.streams]:
        arrays[_ROUTES] = _flat("uint8", [values.reshape(-1) for values in routed])
    return rows, arrays | {_TEXT: numpy.frombuffer(b"".join(texts), numpy.uint8)}


def unpack(rows: Sequence[GroupRow], arrays: Arrays, path: Path) -> list[Saved]:
    """Inverse of `pack` for arrays that `read` gave. DataError, naming `path`, where text is not UTF-8."""
    places = dict.fromkeys([*types(), _ROUTES], 0)

    def take(name: str, count: int) -> numpy.ndarray:
        start = places[name]
        places[name] = start + count
        return arrays[name][start : start + count]

    def sample_of(saved: ResponseRow, prompt: int) -> Sample | Partial:
        streams = {name: take(_stored(name), saved.tokens) for name in sampled_streams()}
        if width := saved.routed_bytes:
            tokens = prompt + saved.tokens
            streams[ROUTED_EXPERTS] = take(_ROUTES, tokens * width).reshape(tokens, width)
        spans = tuple(VersionSpan(*span) for span in saved.spans)
        if saved.finish_reason == BEGUN:
            return Partial(checked(streams, "a sample"), saved.weight_version, spans)
        start = places[_TEXT]
        try:
            text = take(_TEXT, saved.text_bytes).tobytes().decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: {_TEXT} is not UTF-8 at {start + error.start}") from None
        result = None
        if saved.outcome != UNJUDGED:
            result = RewardResult(saved.accuracy, saved.reward, saved.answer, saved.outcome, saved.extra)
        return Sample(
            checked(streams, "a sample"),
            saved.finish_reason,
            saved.weight_version,
            text,
            result,
            segments_around(saved.told, saved.tokens, "a sample"),
            spans,
        )

    groups = []
    for row in rows:
        saved = row.problem
        token_ids = prompt_ids(take(_PROMPTS, saved.tokens))
        problem = Problem(saved.id, saved.text, token_ids, saved.ground_truth, saved.data_source, saved.extra)
        groups.append(Saved(problem, [sample_of(response, saved.tokens) for response in row.responses]))
    return groups


def read(path: Path, rows: Sequence[GroupRow], described_by: Path) -> Arrays:
    """The arrays of `rows`. DataError, naming file and tensor, unless types and lengths are what the rows say.

    And naming `described_by`, where the rows are, for stretches of context that cannot be.
    """
    for row in rows:
        for place, response in enumerate(row.responses):
            where = f"{described_by}: responses[{place}].told of problem {row.problem.id[:80]!r}"
            try:
                segments_around(response.told, response.tokens, where)
            except ValueError as error:
                raise DataError(str(error)) from None
            _check_spans(response, f"{described_by}: responses[{place}].spans of problem {row.problem.id[:80]!r}")
    lengths = _lengths(rows)
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            expected = types() | ({_ROUTES: "uint8"} if lengths[_ROUTES] else {})
            if names != expected.keys():
                raise DataError(
                    f"{path} has the tensors {', '.join(sorted(names))}, and should have {', '.join(expected)}"
                )
            for name, dtype in expected.items():
                kind = _STORED_TYPES[dtype]
                stored = file.get_slice(name)
                found = (stored.get_dtype(), list(stored.get_shape()))
                if found != (kind, [lengths[name]]):
                    raise DataError(
                        f"{path}: {name} is {found[0]} of shape {found[1]}, and should be {kind} of shape "
                        f"{[lengths[name]]} by {described_by.name}"
                    )
            return {name: file.get_tensor(name) for name in expected}
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None


def check(arrays: Mapping[str, numpy.ndarray], path: Path, vocab_size: int) -> None:
    """DataError, naming file, tensor and place, for a token id outside the model's and for a log-prob that is none."""
    for name in (_PROMPTS, _stored(TOKEN_IDS)):
        _refuse(path, name, arrays[name], (arrays[name] < 0) | (arrays[name] >= vocab_size), f"0 to {vocab_size - 1}")
    for name in map(_stored, sampled_streams()):
        _refuse(path, name, arrays[name], ~numpy.isfinite(arrays[name]), "a finite number")


def _refuse(path: Path, name: str, array: numpy.ndarray, wrong: numpy.ndarray, right: str) -> None:
    if wrong.any():
        place = int(wrong.argmax())
        raise DataError(f"{path}: {name} is {array[place]} at {place}, and should be {right}")


def _check_spans(row: ResponseRow, where: str) -> None:
    """DataError, which begins with `where`, for spans that are not of the response, or of other weights."""
    if not row.spans:
        return
    ends = [place for _, *span in row.spans for place in span]
    if ends != sorted(ends) or ends[-1] > row.tokens or any(start == end for _, start, end in row.spans):
        raise DataError(f"{where} are {row.spans}, and should follow each other in its {row.tokens} tokens")
    if (oldest := min(version for version, _, _ in row.spans)) != row.weight_version:
        raise DataError(f"{where} begin with version {oldest}, and should with weight_version, {row.weight_version}")


def _row(group: Saved, text_bytes: Sequence[int]) -> GroupRow:
    problem = group.problem
    pairs = zip(group.samples, text_bytes, strict=True)
    responses = [_response(problem, sample, size) for sample, size in pairs]
    row = ProblemRow(
        id=problem.id,
        text=problem.text,
        tokens=len(problem.token_ids),
        ground_truth=problem.ground_truth,
        data_source=problem.data_source,
        extra=problem.extra,
    )
    return GroupRow(row, responses)


def _response(problem: Problem, sample: Sample | Partial, text_bytes: int) -> ResponseRow:
    whole = sample if isinstance(sample, Sample) else None
    result = (whole.result if whole is not None else None) or RewardResult(0.0, 0.0, "", UNJUDGED)
    if not (math.isfinite(result.accuracy) and math.isfinite(result.reward)):
        verdict = f"accuracy {result.accuracy} and reward {result.reward}"
        raise ValueError(f"a response to problem {problem.id} has {verdict}; finite numbers can be saved")
    if sample.weight_version is None:
        raise ValueError(f"a response to problem {problem.id} is of weights without a version")
    return ResponseRow(
        tokens=len(sample),
        text_bytes=text_bytes,
        finish_reason=whole.finish_reason if whole is not None else BEGUN,
        weight_version=sample.weight_version,
        accuracy=result.accuracy,
        reward=result.reward,
        answer=result.answer,
        outcome=result.outcome,
        extra=result.extra,
        told=[[segment.start, segment.end] for segment in whole.told] if whole is not None else [],
        spans=[[span.version, span.start, span.end] for span in sample.spans],
        routed_bytes=sample.streams[ROUTED_EXPERTS].shape[1] if ROUTED_EXPERTS in sample.streams else 0,
    )


def _flat(dtype: str, values: Sequence[numpy.ndarray]) -> numpy.ndarray:
    """All values of that type, one after the other."""
    return numpy.concatenate([numpy.empty(0, dtype), *values])


def _lengths(rows: Sequence[GroupRow]) -> dict[str, int]:
    """The length of each array, by the rows."""
    responses = [response for row in rows for response in row.responses]
    lengths = dict.fromkeys(types(), sum(response.tokens for response in responses))
    lengths[_PROMPTS] = sum(row.problem.tokens for row in rows)
    lengths[_TEXT] = sum(response.text_bytes for response in responses)
    lengths[_ROUTES] = sum(
        response.routed_bytes * (row.problem.tokens + response.tokens) for row in rows for response in row.responses
    )
    return lengths
