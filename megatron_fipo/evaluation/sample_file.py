"""The samples of an evaluation on disk: one line of JSON per problem, with all its samples, as soon as it is judged.

If a kill cuts the last line short, the line is removed, and its problem is sampled again with the same seed.
"""

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from megatron_fipo.errors import DataError
from megatron_fipo.records.sample import Group, RewardResult, Sample
from megatron_fipo.tracking.validation import ProblemScores, score_problem


class JudgedSample(msgspec.Struct, frozen=True):
    """One response and its verdict."""

    text: str
    answer: str
    """The answer that was extracted from it."""
    accuracy: float | None
    """None if the check failed."""
    outcome: str
    tokens: int
    finish_reason: str
    """stop, or length if rollout.max_response_length cut it off."""


class SampledProblem(msgspec.Struct, frozen=True):
    """One line of samples.jsonl."""

    problem: str
    data_source: str
    prompt: str
    ground_truth: str
    samples: list[JudgedSample]

    @property
    def has_failed_checks(self) -> bool:
        """Whether the check of some response failed."""
        return any(sample.accuracy is None for sample in self.samples)

    def scores(self, k: int) -> ProblemScores:
        """Return the scores, computed by the same code as in training's validation."""
        results = [RewardResult(sample.accuracy or 0.0, 0.0, sample.answer, sample.outcome) for sample in self.samples]
        tokens = sum(sample.tokens for sample in self.samples)
        truncated = sum(sample.finish_reason == "length" for sample in self.samples)
        return score_problem(self.problem, self.data_source, results, tokens, truncated, k)


class SampleFile:
    """Appends judged problems, from any thread. It is a context manager, which closes the file."""

    def __init__(self, path: Path):
        """Open the file, create it if needed, and read the problems of an earlier start.

        Raises:
            DataError: a line before the last is damaged. Names it.
        """
        self._lock = threading.Lock()
        self.done: dict[str, SampledProblem] = {}
        """The finished problems by their ids. If one occurs twice, the later one counts."""
        self._file = path.open("a+b")
        try:
            self._file.seek(0)
            self._read(path)
        except BaseException:
            self._file.close()
            raise

    def _read(self, path: Path) -> None:
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                problem = msgspec.json.decode(line, type=SampledProblem)
            except msgspec.MsgspecError as error:
                raise DataError(
                    f"{path}, line {number}: {error}; remove the line, or the file to start anew"
                ) from error
            self.done[problem.problem] = problem
            whole += len(line)
        self._file.truncate(whole)

    def append(self, group: Group) -> None:
        """Write a judged group. It is on disk when this returns."""
        found = SampledProblem(
            problem=group.problem.id,
            data_source=group.problem.data_source,
            prompt=group.problem.text,
            ground_truth=group.problem.ground_truth,
            samples=[_judged(sample, result) for sample, result in zip(group.samples, group.results, strict=True)],
        )
        with self._lock:
            self._file.write(msgspec.json.encode(found) + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self.done[found.problem] = found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._file.close()


def _judged(sample: Sample, result: RewardResult) -> JudgedSample:
    return JudgedSample(
        text=sample.text,
        answer=result.answer,
        accuracy=result.accuracy if result.was_judged else None,
        outcome=result.outcome,
        tokens=sample.actions,
        finish_reason=sample.finish_reason,
    )
