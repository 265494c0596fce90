"""credit/step-NNNNNN.parquet: one row per recorded response, with the values per token that the loss used.

Parquet, compressed with zstd: other tools read it as it is. Columns of values are lists with one entry per token.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet

from megatron_fipo.config import AlgorithmConfig
from megatron_fipo.errors import DataError, one_line
from megatron_fipo.files import write_atomically
from megatron_fipo.records.credit import VALUES, TokenCredit
from megatron_fipo.tracking.run_files import CREDIT_DIRECTORY

_FILE = re.compile(r"step-(\d+)\.parquet")
_ABOUT = b"megatron_fipo.credit"
_FORMAT = 1
_FACTS = {
    "update": pyarrow.int32(),
    "group": pyarrow.int32(),
    "index": pyarrow.int32(),
    "problem": pyarrow.string(),
    "data_source": pyarrow.string(),
    "prompt": pyarrow.string(),
    "ground_truth": pyarrow.string(),
    "answer": pyarrow.string(),
    "reward": pyarrow.float64(),
    "accuracy": pyarrow.float64(),
    "advantage": pyarrow.float64(),
    "finish_reason": pyarrow.string(),
    "weight_version": pyarrow.int32(),
    "dropped": pyarrow.bool_(),
}
SCHEMA = pyarrow.schema(
    [
        *_FACTS.items(),
        ("tokens", pyarrow.list_(pyarrow.string())),
        ("token_ids", pyarrow.list_(pyarrow.int32())),
        ("state", pyarrow.list_(pyarrow.uint8())),
        *((name, pyarrow.list_(pyarrow.float32())) for name in VALUES),
    ]
)


@dataclass(frozen=True)
class CreditAbout:
    """What a file's values were computed with."""

    step: int
    loss: str
    gamma: float | None
    """The discount of F; None without future_kl."""
    band: tuple[float, float] | None
    """The bounds of f."""
    clip: tuple[float, float] | None
    """The bounds of the ratio."""

    @staticmethod
    def of(step: int, algorithm: AlgorithmConfig) -> "CreditAbout":
        """Return what a step of this configuration uses."""
        future = algorithm.future_kl if algorithm.loss is None and algorithm.loss_mode == "future_kl" else None
        low, high = algorithm.clip_ratio_low, algorithm.clip_ratio_high
        return CreditAbout(
            step=step,
            loss=algorithm.loss or algorithm.loss_mode,
            gamma=2.0 ** (-1.0 / future.decay_rate) if future else None,
            band=(future.band_low, future.band_high) if future else None,
            clip=(1 - low, 1 + high) if low is not None and high is not None else None,
        )


@dataclass(frozen=True, eq=False)
class CreditResponse:
    """One response."""

    facts: Mapping[str, Any]
    """By the names of SCHEMA before `tokens`: its problem, reward, advantage, and how it ended."""
    tokens: Sequence[str]
    """The text of each token; "" where a character goes on in the next one, and of special tokens."""
    token_ids: numpy.ndarray
    """[tokens] int32"""
    credit: TokenCredit


def credit_path(run_directory: Path, step: int) -> Path:
    """Return where a step's file is."""
    return run_directory / CREDIT_DIRECTORY / f"step-{step:06d}.parquet"


def recorded_steps(run_directory: Path) -> list[int]:
    """Return the steps that have a file, in order."""
    names = (_FILE.fullmatch(path.name) for path in (run_directory / CREDIT_DIRECTORY).glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def warm_up() -> None:
    """Make a first array, for which pyarrow loads pandas. This takes a good half second."""
    pyarrow.array([0])


def write_credit(path: Path, about: CreditAbout, responses: Sequence[CreditResponse]) -> None:
    """Write a step's file. After a crash at any point there is the whole file or none."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for response in responses:
        found = {name: response.facts[name] for name in _FACTS if name not in ("update", "dropped")}
        found |= {"update": response.credit.update, "dropped": response.credit.is_dropped}
        found |= {"tokens": response.tokens, "token_ids": response.token_ids, "state": response.credit.state}
        for name, value in (found | dict(response.credit.values)).items():
            columns[name].append(value)
    told = json.dumps({"format": _FORMAT, **asdict(about)})
    table = pyarrow.Table.from_pydict(columns, SCHEMA.with_metadata({_ABOUT: told.encode()}))
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, sink.getvalue().to_pybytes())


def read_credit(path: Path) -> tuple[CreditAbout, list[CreditResponse]]:
    """Return what `write_credit` wrote. DataError if the file is none of these."""
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: {one_line(error)}") from error
    told = (table.schema.metadata or {}).get(_ABOUT)
    if told is None or not table.schema.equals(SCHEMA):
        raise DataError(f"{path}: this is no file of tracking.credit of this version")
    about = json.loads(told)
    if about.pop("format", None) != _FORMAT:
        raise DataError(f"{path}: written by another version of megatron_fipo; format {_FORMAT} can be read")
    pair = {name: tuple(about[name]) if about[name] else None for name in ("band", "clip")}
    return CreditAbout(**(about | pair)), [_response(table, row) for row in range(table.num_rows)]


def _response(table: pyarrow.Table, row: int) -> CreditResponse:
    def array(name: str) -> numpy.ndarray:
        return table[name][row].values.to_numpy()

    facts = {name: table[name][row].as_py() for name in _FACTS}
    values = {name: array(name) for name in VALUES}
    credit = TokenCredit(facts["update"], values, array("state"))
    return CreditResponse(facts, table["tokens"][row].as_py(), array("token_ids"), credit)
