"""Records of txt, csv, tsv, jsonl and parquet files, each with the place that an error message names."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sage.config.loading import nearest
from megatron_sage.errors import UserError


@dataclass(frozen=True)
class Record:
    """One record: where it begins ("line 3", "row 3"; both count from 1), and its cells by column."""

    place: str
    cells: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """All records of a file and the columns that occur in it, in the file's order."""

    columns: list[str]
    records: list[Record]


def read_table(path: Path) -> Table:
    """The records of a csv, tsv, jsonl or parquet file, by its suffix.

    UserError, one line with the place, for anything that is not exactly such a file.
    """
    return _FORMATS[path.suffix.lower()](path)


def check_suffix(path: Path) -> None:
    """UserError unless the suffix names a format; a file without a suffix is text."""
    suffix = path.suffix.lower()
    known = [*TEXT_SUFFIXES, *_FORMATS]
    if suffix not in known:
        match = nearest(suffix, [name for name in known if name])
        cure = f"did you mean {match}? " if match else ""
        formats = ", ".join(sorted(name for name in known if name))
        raise UserError(f"{path}: unknown suffix {suffix}; {cure}prompts are read from {formats}")


def is_text(path: Path) -> bool:
    """Whether the file holds one prompt a line and nothing else."""
    return path.suffix.lower() in TEXT_SUFFIXES


def text_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file, without their ends (LF, CRLF or CR); a byte order mark is dropped."""
    # Not str.splitlines: it also cuts at form feeds and U+2028, which no editor counts as a line.
    return re.split(r"\r\n|\n|\r", decode(path))


def decode(path: Path) -> str:
    """The text of a UTF-8 file; UserError naming the byte, or UTF-16, where it is something else."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the prompts ({error.strerror}); check the path and its rights") from error
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: not UTF-8 but UTF-16 text (byte order mark); save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        place = f"line {text[: text.index(chr(0))].count(chr(10)) + 1}"
        raise UserError(f"{path}, {place}: a NUL character, as in binary or UTF-16 files; save it as UTF-8 text")
    return text


def _read_csv(path: Path, delimiter: str = ",") -> Table:
    lines = _physical_lines(decode(path))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    records: list[Record] = []
    while True:
        place = f"line {reader.line_num + 1}"  # before the record is read: a quoted cell may go over many lines
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            rule = 'a cell with quotes or newlines is written "...", a quote in it as two'
            raise UserError(f"{path}, {place}: not valid CSV ({error}); {rule}") from error
        if not cells:  # a blank line
            continue
        if header is None:
            header = _header(path, place, cells)
            continue
        if len(cells) != len(header):
            rule = f'a cell that holds {"a tab" if delimiter == chr(9) else "a comma"} is written "..."'
            raise UserError(f"{path}, {place}: {len(cells)} cells, the header has {len(header)}; {rule}")
        records.append(Record(place, dict(zip(header, cells, strict=True))))
    if header is None:
        raise UserError(f"{path}: the file is empty; its first line must name the columns, e.g. index,prompt")
    return Table(header, records)


def _physical_lines(text: str) -> Iterator[str]:
    """Lines with their ends, so that a newline inside a quoted cell stays what it was."""
    position = 0
    for match in re.finditer(r"\r\n|\n|\r", text):
        yield text[position : match.end()]
        position = match.end()
    if position < len(text):
        yield text[position:]


def _header(path: Path, place: str, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    doubles = sorted({name for name in names if name and names.count(name) > 1})
    if doubles:
        raise UserError(f"{path}, {place}: column {doubles[0]!r} occurs twice; rename one")
    return names


def _read_jsonl(path: Path) -> Table:
    records: list[Record] = []
    columns: dict[str, None] = {}
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = getattr(error, "msg", "nested too deeply or a number too long")
            raise UserError(f"{path}, line {number}: not valid JSON ({what}); write one object a line") from error
        if not isinstance(cells, dict):
            rule = 'must be an object, e.g. {"prompt": "a cat"}'
            raise UserError(f"{path}, line {number}: {type(cells).__name__}: {rule}")
        records.append(Record(f"line {number}", cells))
        columns |= dict.fromkeys(cells)
    return Table(list(columns), records)


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        cure = "pip install 'megatron-sage[parquet]', or save it as jsonl"
        raise UserError(f"{path}: reading parquet needs pyarrow, which is not installed: {cure}") from error
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            columns = list(file.schema_arrow.names)
            doubles = sorted({name for name in columns if columns.count(name) > 1})
            if doubles:
                raise UserError(f"{path}: column {doubles[0]!r} occurs twice; rename one")
            plain = [field.name for field in file.schema_arrow if _is_plain(field.type)]
            rows = file.read(columns=plain).to_pylist()
    except (OSError, pyarrow.ArrowException, ValueError) as error:
        what = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as parquet ({what}); check the path, or write it anew") from error
    others = dict.fromkeys((name for name in columns if name not in plain), OTHER)
    return Table(columns, [Record(f"row {number}", row | others) for number, row in enumerate(rows, 1)])


def _is_plain(kind: Any) -> bool:
    """Text and whole numbers; data sets keep whole pictures and videos in columns of other types."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind) or types.is_null(kind)


class _Other:
    def __repr__(self) -> str:
        return "neither text nor a whole number"


OTHER = _Other()  # stands for every parquet cell that is not read

TEXT_SUFFIXES = ("", ".txt")
_FORMATS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": lambda path: _read_csv(path, "\t"),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
