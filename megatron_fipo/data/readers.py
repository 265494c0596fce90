"""Rows of problem files, whatever their format. A file or row that cannot be read is named in one line.

.parquet, .arrow    only the columns asked for are read
.jsonl              one object a line, UTF-8; blank lines are skipped, but counted as rows
.json               an array of objects, or as .jsonl
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fipo.config.data import FILE_SUFFIXES
from megatron_fipo.errors import DataError, one_line

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_BATCH_ROWS = 4096


def read_rows(path: Path, required: Sequence[str], optional: str) -> Iterator[tuple[int, Row]]:
    """(row number, row) of each row, from 1; a row has at least these columns, where the file has them.

    Numbers keep the text they were written with: a JSON number with a point is a Decimal, a float32 is numpy's.

    Raises:
        DataError: the file is missing, of another format or damaged, a row is no JSON object, or a table lacks a
            required column. Names file and row.
    """
    if path.suffix not in FILE_SUFFIXES:
        raise DataError(f"{path}: neither {' nor '.join(FILE_SUFFIXES)}, the formats of problem files")
    if not path.is_file():
        raise DataError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}")
    readers = {".parquet": _parquet_rows, ".arrow": _arrow_rows}
    try:
        if path.suffix in readers:
            yield from readers[path.suffix](path, required, optional)
        else:
            yield from _json_rows(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from error


def nested(row: Any, column: str) -> Any:
    """The value of a column, into nested ones at its dots; None where what it is nested in is null.

    Raises LookupError that says what is missing and what is there.
    """
    if row is None:
        return None
    if isinstance(row, dict) and column in row:
        return row[column]
    name, _, rest = column.partition(".")
    if not isinstance(row, dict):
        raise LookupError(f"no column {column} in a {type(row).__name__}")
    if name not in row:
        raise LookupError(f"no column {name}; it has {sorted(row)}")
    return nested(row[name], rest) if rest else row[name]


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        start = len(_BYTE_ORDER_MARK) if file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK else 0
        file.seek(start)
        is_array = path.suffix == ".json" and file.read(_BATCH_ROWS).lstrip().startswith(b"[")
        file.seek(start)
        rows: Iterator[tuple[int, Any]]
        if is_array:
            rows = enumerate(_parse(file.read(), str(path)), start=1)
        else:
            lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
            rows = ((number, _parse(line, f"{path}, row {number}")) for number, line in lines)
        for number, row in rows:
            if not isinstance(row, dict):
                raise DataError(f"{path}, row {number}: not a JSON object with the columns of a problem")
            yield number, row


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode(), parse_float=_decimal, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply to be read") from error
    except ValueError as error:  # a number of too many digits, a key that stands twice
        raise DataError(f"{where}: cannot be read ({one_line(error)})") from error


def _decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:
        raise ValueError(f"a number has too large an exponent: {text[:40]}") from None


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return row


def _parquet_rows(path: Path, required: Sequence[str], optional: str) -> Iterator[tuple[int, Row]]:
    import pyarrow.parquet

    with _arrow_errors(path, "a parquet file"):
        file = pyarrow.parquet.ParquetFile(path)
        present = file.schema_arrow.names
    wanted = _top_columns(path, present, required, optional)
    yield from _batches(path, lambda: file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted))


def _arrow_rows(path: Path, required: Sequence[str], optional: str) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.ipc

    with _arrow_errors(path, "an Arrow file"):
        source = pyarrow.memory_map(str(path))
        try:
            file = pyarrow.ipc.open_file(source)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        except pyarrow.ArrowInvalid:  # the datasets library writes streams
            length = len(_END_OF_STREAM)
            if source.size() < length or source.read_at(length, source.size() - length) != _END_OF_STREAM:
                raise ValueError("it is cut off") from None
            source.seek(0)
            file = pyarrow.ipc.open_stream(source)
            batches = iter(file)
        present = file.schema.names
    wanted = _top_columns(path, present, required, optional)
    yield from _batches(path, lambda: (batch.select(wanted) for batch in batches))


def _top_columns(path: Path, present: Sequence[str], required: Sequence[str], optional: str) -> list[str]:
    """The columns of the table to read: those asked for, or what they are nested in."""
    names = []
    for column in (*required, optional):
        name = column if column in present else column.partition(".")[0]
        if present.count(name) > 1:
            raise DataError(f"{path}: has the column {name} {present.count(name)} times")
        if name in present:
            names.append(name)
        elif column != optional:
            raise DataError(f"{path}: no column {name}; it has {sorted(present)}")
    return list(dict.fromkeys(names))


def _batches(path: Path, read: "Callable[[], Iterator[pyarrow.RecordBatch]]") -> Iterator[tuple[int, Row]]:
    """The rows of record batches, checked: a damaged file's offsets point anywhere, and reading there kills us."""
    number = 0
    batches: Iterator[pyarrow.RecordBatch] | None = None
    while True:
        with _arrow_errors(path, f"readable after row {number}"):
            batches = iter(read()) if batches is None else batches
            batch = next(batches, None)
            if batch is None:
                return
            batch.validate(full=True)
            narrow = [field for field in batch.schema if _has_narrow_floats(field.type)]
            rows = batch.to_pylist()
        for row in rows:
            number += 1
            row.update((field.name, _narrowed(field.type, row[field.name])) for field in narrow)
            yield number, row


def _has_narrow_floats(kind: "pyarrow.DataType") -> bool:
    import pyarrow.types

    if pyarrow.types.is_struct(kind):
        return any(_has_narrow_floats(field.type) for field in kind)
    return pyarrow.types.is_float32(kind) or pyarrow.types.is_float16(kind)


def _narrowed(kind: "pyarrow.DataType", value: Any) -> Any:
    """Floats of less than 64 bits as numpy's, which print as the shortest text that reads the same in that type."""
    import pyarrow.types

    if value is None or not _has_narrow_floats(kind):
        return value
    if pyarrow.types.is_struct(kind):
        return {field.name: _narrowed(field.type, value[field.name]) for field in kind}
    return kind.to_pandas_dtype()(value)


@contextmanager
def _arrow_errors(path: Path, expected: str) -> Iterator[None]:
    """Turns what Arrow raises over a damaged file, of which there is no common class, into one line."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not {expected}: damaged or of another format ({one_line(error)})") from error
