"""Read the rows of problem files of all formats. A file or row that cannot be read is named in one line.

.parquet, .arrow    only the requested columns are read
.jsonl              one object per line, UTF-8; blank lines are skipped, but counted as rows
.json               an array of objects, or the same as .jsonl
.jsonl.gz, .json.gz the same, compressed by gzip
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fipo.config.data_files import COMPRESSED, format_of
from megatron_fipo.data.kinds import kind_of
from megatron_fipo.errors import DataError, one_line

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_BATCH_ROWS = 4096
_SHOWN_NAMES = 20
_SPACE = re.compile(r"[ \t\n\r]*")


def read_rows(path: Path, required: Sequence[str], optional: str, *, every: bool = False) -> Iterator[tuple[int, Row]]:
    """Yield (row number from 1, row) for each row of a file from `files_of`, with the requested columns that exist.

    If a required column is missing, or with `every`, rows have all columns.

    Numbers keep the precision of their text: a JSON number with a point is a Decimal, and a float32 is numpy's.

    Raises:
        DataError: the file cannot be read, is damaged or has another format than its name says, or a row is not a JSON
            object. Names file and row.
    """
    ending = str(format_of(path))
    readers = {".parquet": _parquet_rows, ".arrow": _arrow_rows}
    try:
        if ending in readers:
            yield from readers[ending](path, None if every else [*required, optional])
        else:
            yield from _json_rows(path, ending)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from error


def nested(row: Any, column: str) -> Any:
    """Return the value of a column. Dots in its name lead into nested columns and lists (name.0). None inside a null.

    Raises LookupError, which says what is missing and what exists.
    """
    if row is None:
        return None
    if isinstance(row, dict) and column in row:
        return row[column]
    name, _, rest = column.partition(".")
    if isinstance(row, list) and name.isdecimal():
        if int(name) >= len(row):
            raise LookupError(f"no element {name} in a list of {len(row)}")
        return nested(row[int(name)], rest) if rest else row[int(name)]
    if not isinstance(row, dict):
        raise LookupError(f"no column {column} in {kind_of(row)}")
    if name not in row:
        raise LookupError(f"no column {name}; it has {shown_names(row)}")
    return nested(row[name], rest) if rest else row[name]


def shown_names(names: Iterable[str]) -> str:
    """Return the names of columns for a message; only the first ones if there are many."""
    cut = [name if len(name) <= 60 else f"{name[:60]}…" for name in sorted(names)]
    return f"{cut[:_SHOWN_NAMES]}" + (f" and {len(cut) - _SHOWN_NAMES} more" if len(cut) > _SHOWN_NAMES else "")


def _json_rows(path: Path, ending: str) -> Iterator[tuple[int, Row]]:
    with gzip.open(path) if path.suffix == COMPRESSED else path.open("rb") as file:
        start = len(_BYTE_ORDER_MARK) if file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK else 0
        file.seek(start)
        is_array = ending == ".json" and file.read(_BATCH_ROWS).lstrip().startswith(b"[")
        file.seek(start)
        rows: Iterator[tuple[int, Any]]
        if is_array:
            rows = _array_rows(path, file.read())
        else:
            lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
            expected = "one object per line" if ending == ".jsonl" else "an array of objects, or one object per line"
            rows = ((number, _parse(line, f"{path}, row {number}", expected)) for number, line in lines)
        for number, row in rows:
            if not isinstance(row, dict):
                mend = "; a file that is an array ends in .json" if ending == ".jsonl" and isinstance(row, list) else ""
                raise DataError(
                    f"{path}, row {number}: not a JSON object with the columns of a problem but {kind_of(row)}{mend}"
                )
            yield number, row


def _array_rows(path: Path, content: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the elements of a JSON array one by one, so that an error can name the row."""
    with _json_errors(str(path), "an array of objects"):
        text = content.decode()
    decoder = json.JSONDecoder(parse_float=_decimal, object_pairs_hook=_object)
    position, number = _after_space(text, text.index("[") + 1), 0
    is_open = not text.startswith("]", position)
    while is_open:
        number += 1
        with _json_errors(f"{path}, row {number}", "an array of objects"):
            row, position = decoder.raw_decode(text, position)
            position = _after_space(text, position)
            is_open = text.startswith(",", position)
            if not is_open and not text.startswith("]", position):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            if is_open:
                position = _after_space(text, position + 1)
        yield number, row
    if _after_space(text, position + 1) < len(text):
        raise DataError(f"{path}: not JSON (more text after the array of {number} rows)")


def _after_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]  # it matches everywhere


def _parse(text: bytes, where: str, expected: str) -> Any:
    with _json_errors(where, expected):
        return json.loads(text.decode(), parse_float=_decimal, object_pairs_hook=_object)


@contextmanager
def _json_errors(where: str, expected: str) -> Iterator[None]:
    """Turn Python's exceptions for bad JSON into one line. `expected` says what would be right."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text ({error.reason} at byte {error.start}{_other(error.object)})"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error}); the file should have {expected}") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply to be read") from error
    except ValueError as error:  # a number with too many digits, a key that occurs twice
        raise DataError(f"{where}: cannot be read ({one_line(error)})") from error


def _other(text: bytes) -> str:
    """Return what text that is not UTF-8 probably is, and how to convert it."""
    if text.startswith(_GZIP):
        return "; it is compressed by gzip: name it .jsonl.gz or .json.gz"
    if text.startswith(_UTF_16):
        return "; it is UTF-16: iconv -f UTF-16 -t UTF-8 FILE makes it UTF-8"
    return ""


def _decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:
        raise ValueError(f"a number has too large an exponent: {text[:40]}") from None


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice in one object")
    return row


def _parquet_rows(path: Path, wanted: Sequence[str] | None) -> Iterator[tuple[int, Row]]:
    import pyarrow.parquet

    with _arrow_errors(path, "a parquet file"):
        file = pyarrow.parquet.ParquetFile(path)
        present = file.schema_arrow.names
    names = _top_columns(path, present, wanted)
    yield from _batches(path, lambda: file.iter_batches(batch_size=_BATCH_ROWS, columns=names))


def _arrow_rows(path: Path, wanted: Sequence[str] | None) -> Iterator[tuple[int, Row]]:
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
    names = _top_columns(path, present, wanted)
    yield from _batches(path, lambda: (batch.select(names) for batch in batches))


def _top_columns(path: Path, present: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """Return the top-level columns to read for the wanted columns; all columns if one is missing, or for None.

    Only the last of `wanted` may be missing.
    """
    names = [name if name in present else name.partition(".")[0] for name in wanted or ()]
    if wanted is None or not {*names[:-1]} <= {*present}:
        names = list(present)
    for name in names:
        if present.count(name) > 1:
            raise DataError(f"{path}: has the column {name} {present.count(name)} times")
    return [name for name in dict.fromkeys(names) if name in present]


def _batches(path: Path, read: "Callable[[], Iterator[pyarrow.RecordBatch]]") -> Iterator[tuple[int, Row]]:
    """Yield the rows of record batches, validated: reading at the wrong offsets of a damaged file would crash."""
    number = 0
    batches: Iterator[pyarrow.RecordBatch] | None = None
    while True:
        with _arrow_errors(path, f"readable after row {number}"):
            batches = iter(read()) if batches is None else batches
            batch = next(batches, None)
            if batch is None:
                return
        wanted = batch.schema.names
        columns = [_values(column, name, path, number) for name, column in zip(wanted, batch.columns, strict=True)]
        for values in zip(*columns, strict=True):
            number += 1
            yield number, dict(zip(wanted, values, strict=True))


def _values(column: "pyarrow.Array", name: str, path: Path, rows_before: int) -> list[Any]:
    """Return the Python values of one column of a batch. A map becomes a dict."""
    try:
        column.validate(full=True)
        values = column.to_pylist(maps_as_pydicts="strict")
    except _arrow_exceptions() as error:
        row = next((index for index in range(len(column)) if not _is_readable(column.slice(index, 1))), 0)
        raise DataError(
            f"{path}, row {rows_before + row + 1}, column {name}: cannot be read ({one_line(error)})"
        ) from error
    return [_narrowed(column.type, value) for value in values] if _has_narrow_floats(column.type) else values


def _is_readable(value: "pyarrow.Array") -> bool:
    try:
        value.validate(full=True)
        value.to_pylist(maps_as_pydicts="strict")
    except _arrow_exceptions():
        return False
    return True


def _has_narrow_floats(kind: "pyarrow.DataType") -> bool:
    import pyarrow.types

    if pyarrow.types.is_struct(kind):
        return any(_has_narrow_floats(field.type) for field in kind)
    if pyarrow.types.is_dictionary(kind) or pyarrow.types.is_run_end_encoded(kind):
        return _has_narrow_floats(kind.value_type)
    return pyarrow.types.is_float32(kind) or pyarrow.types.is_float16(kind)


def _narrowed(kind: "pyarrow.DataType", value: Any) -> Any:
    """Convert floats of less than 64 bits to numpy's types, which print as the shortest exact text for that type."""
    import pyarrow.types

    if value is None or not _has_narrow_floats(kind):
        return value
    if pyarrow.types.is_struct(kind):
        return {field.name: _narrowed(field.type, value[field.name]) for field in kind}
    if pyarrow.types.is_dictionary(kind) or pyarrow.types.is_run_end_encoded(kind):
        return _narrowed(kind.value_type, value)
    return kind.to_pandas_dtype()(value)


def _arrow_exceptions() -> tuple[type[Exception], ...]:
    """Return the exceptions that Arrow raises for a damaged file. They have no common base class."""
    import pyarrow

    return (pyarrow.ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError)


@contextmanager
def _arrow_errors(path: Path, expected: str) -> Iterator[None]:
    """Turn Arrow's exceptions for a damaged file into one line."""
    try:
        yield
    except _arrow_exceptions() as error:
        raise DataError(f"{path}: not {expected}: damaged or of another format ({one_line(error)})") from error
