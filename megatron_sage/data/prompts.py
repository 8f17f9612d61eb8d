"""Prompt files: their rows, and what is refused."""

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sage.config.loading import nearest
from megatron_sage.config.schema import DataConfig
from megatron_sage.data.cursor import PromptCursor as PromptCursor  # the two are used together
from megatron_sage.data.tables import Table, check_suffix, is_text, read_table, text_lines
from megatron_sage.errors import UserError

PROMPT_COLUMN = "prompt"
# Names in use for the picture that a video begins with: `ref_image_path` is SAGE-GRPO's.
IMAGE_COLUMNS = ("ref_image_path", "reference_image", "reference_image_path", "ref_image", "image_path", "image")
INDEX_COLUMN = "index"


@dataclass(frozen=True)
class PromptRow:
    """What one video is made of: a text, and in image-to-video the image that it begins with."""

    text: str
    image: Path | None = None


@dataclass(frozen=True)
class DataReport:
    """A prompt file as it was read."""

    path: Path
    rows: list[PromptRow]  # in the file's order
    digest: str  # SHA-256 over the rows: texts and image names as the file gives them
    skipped: list[str] = field(default_factory=list)  # one line for each row left out: its place, its image and why
    duplicates: int = 0  # rows that an earlier row equals

    def summary(self) -> dict[str, Any]:
        """What a run keeps of it, for JSON."""
        return {
            "file": str(self.path),
            "rows": len(self.rows),
            "images": sum(row.image is not None for row in self.rows),
            "duplicates": self.duplicates,
            "skipped": self.skipped,
            "sha256": self.digest,
        }

    @property
    def notes(self) -> list[str]:
        """One line for each thing that a reader of the run should know."""
        notes = []
        if self.duplicates:
            notes.append(f"{self.path}: {self.duplicates} of {len(self.rows)} prompts are duplicates; they are kept")
        if self.skipped:
            total = len(self.rows) + len(self.skipped)
            notes.append(f"{self.path}: {len(self.skipped)} of {total} rows are skipped: {'; '.join(self.skipped)}")
        return notes


def read_report(
    path: str | Path,
    *,
    prompt_column: str | None = None,
    image_column: str | None = None,
    skip_unreadable: bool = False,
    decode: bool = False,
) -> DataReport:
    """The rows of a prompt file: .txt (one prompt a line), .csv, .tsv, .jsonl or .parquet, by its suffix.

    Images are named relative to the file's own directory and must exist; `decode` also reads each of them, whole.
    `skip_unreadable` leaves out rows whose image is missing or (with `decode`) damaged, and says so in the report;
    otherwise they are an error. The columns are found by name (`PROMPT_COLUMN`, `IMAGE_COLUMNS`) unless they are given.

    UserError, one line with the line's or row's number, for everything that is wrong with the file.
    """
    path = Path(path)
    check_suffix(path)
    if is_text(path):
        entries = [(f"line {number}", text, "") for number, text in _text_prompts(path)]
    else:
        entries = _table_prompts(path, read_table(path), prompt_column, image_column)
    if not entries:
        raise UserError(f"{path}: no prompt in it (the file is empty, or all comments); write at least one")
    rows, problems, kept = [], [], []
    for place, text, name in entries:
        problem = _image_problem(path, name, decode) if name else None
        if problem is not None:
            problems.append(f"{place}: {problem}")
            continue
        rows.append(PromptRow(text, path.parent / name if name else None))
        kept.append((text, name))
    if problems and not skip_unreadable:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        cure = "correct it, or let such rows be skipped: data.skip_unreadable=true"
        raise UserError(f"{path}, {problems[0]}{more}; {cure}")
    if not rows:
        raise UserError(f"{path}: all of its {len(problems)} rows are unreadable, the first: {problems[0]}")
    return DataReport(path, rows, digest(kept), problems, len(rows) - len(set(rows)))


def read_dataset(data: DataConfig, path: str | Path, decode: bool = False) -> DataReport:
    """`read_report` of data.prompts or evaluation.prompts with the columns and the skipping that the settings say."""
    return read_report(
        path,
        prompt_column=data.prompt_column,
        image_column=data.image_column,
        skip_unreadable=data.skip_unreadable,
        decode=decode,
    )


def read_rows(
    path: str | Path,
    *,
    prompt_column: str | None = None,
    image_column: str | None = None,
    skip_unreadable: bool = False,
    decode: bool = False,
) -> list[PromptRow]:
    """The rows of `read_report`; duplicates (kept: they weigh double) and skipped rows are warned about, each once."""
    report = read_report(
        path, prompt_column=prompt_column, image_column=image_column, skip_unreadable=skip_unreadable, decode=decode
    )
    for note in report.notes:
        warnings.warn(note, stacklevel=2)
    return report.rows


def read_prompts(path: str | Path) -> list[str]:
    """The texts of `read_rows`."""
    report = read_report(path)
    for note in report.notes:
        warnings.warn(note, stacklevel=2)
    return [row.text for row in report.rows]


def digest(rows: Sequence[tuple[str, str]]) -> str:
    """SHA-256 of (text, image name or "") pairs in their order."""
    sums = hashlib.sha256()
    for row in rows:
        # As JSON: no choice of texts can look like another list of rows.
        sums.update(json.dumps(row).encode() + b"\n")
    return sums.hexdigest()


def _text_prompts(path: Path) -> list[tuple[int, str]]:
    """Numbers and prompts of the lines that are neither blank nor begin with #."""
    lines = enumerate(text_lines(path), 1)
    return [(number, line.strip()) for number, line in lines if line.strip() and not line.lstrip().startswith("#")]


def _table_prompts(
    path: Path, table: Table, prompt_column: str | None, image_column: str | None
) -> list[tuple[str, str, str]]:
    """(place, text, image name or "") of each record."""
    if not table.records:
        return []
    text_column = _column(path, table.columns, "prompt", prompt_column, (PROMPT_COLUMN,))
    picture_column = _column(path, table.columns, "image", image_column, IMAGE_COLUMNS)
    _check_index(path, table)
    entries = []
    for record in table.records:
        where = f"{path}, {record.place}"
        if text_column not in record.cells:  # jsonl: each line has its own keys
            raise UserError(f"{where}: {_missing(str(text_column), list(record.cells))}")
        text = _text(where, str(text_column), record.cells[text_column])
        if not text.strip():
            raise UserError(f"{where}: {text_column} is empty; write a prompt, or remove the {record.place.split()[0]}")
        name = "" if picture_column is None else _text(where, picture_column, record.cells.get(picture_column))
        entries.append((record.place, text, name.strip()))
    return entries


def _column(path: Path, columns: list[str], kind: str, given: str | None, usual: tuple[str, ...]) -> str | None:
    """The column of that kind: the given one, or the only one with a usual name; None: there is no image column."""
    key = f"data.{kind}_column"
    if given is not None:
        if given not in columns:
            raise UserError(f"{path}: {key}={given}: {_missing(given, columns)}")
        return given
    found = [name for name in columns if "_".join(name.lower().replace("-", " ").split()) in usual]
    if len(found) > 1:
        raise UserError(f"{path}: columns {', '.join(found)} could all be the {kind}: name one by {key}")
    if not found and kind == "prompt":
        raise UserError(f"{path}: {_missing(usual[0], columns)}; or name the column by {key}")
    return found[0] if found else None


def _missing(name: str, columns: list[str]) -> str:
    named = [_one_line(column) for column in columns if column]
    match = nearest(name, named)
    cure = f"did you mean {match}? " if match else ""
    return f"no column {name}; {cure}there are {', '.join(named) or 'none'}"


def _one_line(name: str) -> str:
    """A name out of a file as an error may hold it: quoted cells can contain newlines."""
    return name if name.isprintable() else repr(name)


def _text(where: str, column: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {column}={value!r}: must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud800" in JSON
        raise UserError(
            f"{where}: {column}: character {error.start} is half of a surrogate pair; write it anew"
        ) from error
    return value


def _check_index(path: Path, table: Table) -> None:
    """The index column, where there is one, numbers the rows: whole numbers, none twice. Their order means nothing."""
    seen: dict[int, str] = {}
    if INDEX_COLUMN not in table.columns:
        return
    for record in table.records:
        value = record.cells.get(INDEX_COLUMN)
        number = _whole(value)
        if number is None:
            shown = "nothing" if value is None or value == "" else repr(value)
            rule = "must be a whole number in every row, or leave the column out"
            raise UserError(f"{path}, {record.place}: {INDEX_COLUMN} is {shown}: {rule}")
        if number in seen:
            raise UserError(
                f"{path}, {record.place}: {INDEX_COLUMN}={number} is that of {seen[number]} too; number anew"
            )
        seen[number] = record.place


def _whole(value: Any) -> int | None:
    if isinstance(value, str):
        stripped = value.strip()
        digits = stripped.removeprefix("-")
        return int(stripped) if digits.isascii() and digits.isdecimal() and len(digits) < 20 else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _image_problem(path: Path, name: str, decode: bool) -> str | None:
    """Why the image of a row cannot be used, in a few words; None: it can."""
    image, name = path.parent / name, _one_line(name)
    if "://" in name:
        return f"{name}: is a URL; fetch it and name the file"
    if not os.path.isfile(image):  # unlike Path.is_file it is False, not an error, for names that cannot be
        return f"{name}: no such file in {path.parent}"
    if not os.access(image, os.R_OK):
        return f"{name}: may not be read"
    if decode:
        from megatron_sage.data.images import read_image

        try:
            read_image(image)
        except UserError as error:
            return str(error)
    return None
