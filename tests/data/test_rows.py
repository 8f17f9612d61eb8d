"""Prompt files of every format: what is read, and what is refused with its line."""

import csv
import io
import json
import os
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_sage.config import load_config, validate
from megatron_sage.data.prompts import PromptCursor, PromptRow, digest, read_prompts, read_report, read_rows
from megatron_sage.errors import UserError

NASTY = st.lists(
    st.one_of(
        st.sampled_from(
            ['a, "quoted" cat', "two\nlines", "CR\r\nLF\r", "🎬 émoji", "# no comment", "\u2028", "\x0c;\t"]
        ),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
    ).filter(str.strip),
    min_size=1,
    max_size=6,
)
SUFFIXES = [".csv", ".tsv", ".jsonl", ".parquet"]


def write(path: Path, columns: dict[str, list], bom: bool = False, end: str = "\n") -> Path:
    """A file of that suffix by somebody else's writer: csv's, json's, pyarrow's."""
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(columns), path)
        return path
    if path.suffix == ".jsonl":
        text = end.join(json.dumps(row, ensure_ascii=False) for row in rows) + end
    else:
        out = io.StringIO()
        # Python 3.11's csv leaves a lone CR unquoted where lines end in LF, and cannot read it back itself.
        quoting = csv.QUOTE_ALL if end == "\n" else csv.QUOTE_MINIMAL
        delimiter = "\t" if path.suffix == ".tsv" else ","
        writer = csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=quoting)
        writer.writerow(columns)
        writer.writerows(row.values() for row in rows)
        text = out.getvalue()
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    return path


def refusal(path: Path, **options) -> str:
    with pytest.raises(UserError) as error:
        read_report(path, **options)
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1
    return str(error.value)


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), (10, 20, 30)).save(path)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=NASTY, bom=st.booleans(), end=st.sampled_from(["\n", "\r\n"]))
def test_what_was_written_is_read(tmp_path, suffix: str, texts: list[str], bom: bool, end: str) -> None:
    path = write(tmp_path / f"p{suffix}", {"index": list(range(len(texts))), "prompt": texts}, bom, end)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_prompts(path) == texts


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("column", ["ref_image_path", "reference image", "Reference_Image", "image", "image_path"])
def test_images_lie_beside_the_file(tmp_path, monkeypatch, suffix: str, column: str) -> None:
    picture(tmp_path / "set" / "a b.png")
    there = picture(tmp_path / "elsewhere.png")
    monkeypatch.chdir(tmp_path)  # relative to the file, not to where the program runs
    columns = {"prompt": ["x", "y", "z"], column: ["a b.png", "", str(there)], "seed": [1, 2, 3]}
    rows = read_rows(write(tmp_path / "set" / f"p{suffix}", columns))
    assert rows == [PromptRow("x", tmp_path / "set" / "a b.png"), PromptRow("y"), PromptRow("z", there)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_order_is_the_files_not_the_indexs(tmp_path, suffix: str) -> None:
    path = write(tmp_path / f"p{suffix}", {"prompt": ["c", "a", "b"], "index": [7, -2, 0]})
    assert read_prompts(path) == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("p.csv", 'prompt\n"two\nlines"\n\n" "\n', ["line 5", "prompt is empty"]),
        ("p.csv", "index,prompt\n0,a\n1\n", ["line 3", "1 cells, the header has 2"]),
        ("p.csv", "index,prompt\n0,a, b\n", ["line 2", "3 cells"]),
        ("p.csv", 'prompt\nok\n"open\nto the end\n', ["line 3", "not valid CSV"]),
        ("p.csv", "index,promt\n0,a\n", ["no column prompt", "did you mean promt?", "index"]),
        ("p.csv", "prompt,prompt\na,b\n", ["'prompt' occurs twice"]),
        ("p.csv", "index,prompt\n0,a\n1,b\n0,c\n", ["line 4", "index=0", "line 2"]),
        ("p.csv", "index,prompt\n1.5,a\n", ["line 2", "index is '1.5'", "whole number"]),
        ("p.csv", "index,prompt\n,a\n", ["line 2", "index is nothing"]),
        ("p.csv", "prompt,image,ref_image_path\na,b,c\n", ["image, ref_image_path", "data.image_column"]),
        ("p.csv", "", ["the file is empty"]),
        ("p.csv", "index,prompt\n", ["no prompt in it"]),
        ("p.csv", 'prompt,image\na,"x\ny.png"\n', ["line 2", "no such file"]),
        ("p.csv", "prompt,image\na,https://x/y.png\n", ["line 2", "is a URL"]),
        ("p.csv", "prompt\na\0\n", ["line 2", "NUL"]),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', ["line 2", "not valid JSON"]),
        ("p.jsonl", '\n"a"\n', ["line 2", "must be an object"]),
        ("p.jsonl", '{"prompt": "a"}\n\n{"Prompts": "b"}\n', ["line 3", "no column prompt", "did you mean Prompts?"]),
        ("p.jsonl", '{"prompt": 3}\n', ["line 1", "prompt=3", "must be text"]),
        ("p.jsonl", '{"prompt": null}\n', ["line 1", "prompt is empty"]),
        ("p.jsonl", '{"prompt": "\\ud800"}\n', ["line 1", "surrogate"]),
        ("p.jsonl", '{"prompt": "a", "index": true}\n', ["line 1", "index is True"]),
        ("p.jsonl", "[" * 100_000 + "\n", ["line 1", "not valid JSON"]),
        ("p.parquet", "no parquet at all", ["cannot be read as parquet"]),
        ("p.txt", "a\n\0b\n", ["line 2", "NUL"]),
        ("p.cvs", "prompt\na\n", ["unknown suffix .cvs", "did you mean .csv?"]),
    ],
)
def test_each_fault_is_named_with_its_line(tmp_path, name: str, content: str, named: list[str]) -> None:
    path = tmp_path / name
    path.write_text(content, newline="")
    line = refusal(path)
    assert all(part in line for part in named), line


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1"])
def test_other_encodings_are_refused(tmp_path, name: str, encoding: str) -> None:
    path = tmp_path / name
    path.write_bytes('prompt\n{"prompt": "grün"}\n'.encode(encoding))
    assert "UTF-8" in refusal(path)


def test_parquet_rows_are_numbered_and_types_checked(tmp_path) -> None:
    path = write(tmp_path / "p.parquet", {"prompt": ["a", None, "c"]})
    assert "row 2: prompt is empty" in refusal(path)
    write(path, {"prompt": [1, 2]})
    assert "row 1: prompt=1: must be text" in refusal(path)
    write(path, {"prompt": ["a"], "image": [{"bytes": b"", "path": "a.png"}]})
    assert "row 1: image=neither text nor a whole number" in refusal(path)
    write(path, {"prompt": ["a" * 99, "b"]})
    whole = path.read_bytes()
    for cut in range(0, len(whole), 29):
        path.write_bytes(whole[:cut])
        refusal(path)


def test_without_pyarrow_one_line_names_the_extra(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    assert "megatron-sage[parquet]" in refusal(tmp_path / "p.parquet")


def test_columns_may_be_given(tmp_path) -> None:
    picture(tmp_path / "a.png")
    path = write(tmp_path / "p.csv", {"caption": ["x"], "prompt": ["y"], "first": ["a.png"]})
    assert read_rows(path, prompt_column="caption", image_column="first") == [PromptRow("x", tmp_path / "a.png")]
    assert "data.image_column=frist" in (line := refusal(path, image_column="frist")) and "did you mean first?" in line


def test_unreadable_images_are_named_and_skipped_only_on_request(tmp_path) -> None:
    picture(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes(picture(tmp_path / "whole.png").read_bytes()[:40])
    columns = {"prompt": ["a", "b", "c"], "image": ["none.png", "good.png", "cut.png"]}
    path = write(tmp_path / "p.csv", columns)
    line = refusal(path)
    assert "line 2: none.png: no such file" in line and "data.skip_unreadable=true" in line and "more" not in line
    assert "(and 1 more)" in refusal(path, decode=True)
    report = read_report(path, skip_unreadable=True)
    assert [row.text for row in report.rows] == ["b", "c"] and len(report.skipped) == 1
    report = read_report(path, skip_unreadable=True, decode=True)
    assert (
        [row.text for row in report.rows] == ["b"] and "line 4" in report.skipped[1] and "cut.png" in report.skipped[1]
    )
    with pytest.warns(UserWarning, match="1 of 3 rows are skipped: line 2: none.png"):
        read_rows(path, skip_unreadable=True)
    write(path, {"prompt": ["a"], "image": ["none.png"]})
    assert "all of its 1 rows are unreadable" in refusal(path, skip_unreadable=True)


def test_duplicates_are_rows_that_agree_in_text_and_image(tmp_path) -> None:
    picture(tmp_path / "a.png")
    path = write(tmp_path / "p.csv", {"prompt": ["x", "x", "x"], "image": ["a.png", "", "a.png"]})
    with pytest.warns(UserWarning, match="1 of 3 prompts are duplicates") as caught:
        assert len(read_rows(path)) == 3
    assert len(caught) == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), min_size=2, max_size=5, unique=True), st.data())
def test_the_digest_sees_every_edit(rows: list[tuple[str, str]], data) -> None:
    assert digest(rows) == digest([*rows])
    assert digest(rows) != digest([*rows[1:], rows[0]])
    changed = [*rows]
    at = data.draw(st.integers(0, len(rows) - 1))
    changed[at] = (rows[at][1] + "x", rows[at][0])
    assert (digest(changed) == digest(rows)) == (changed == rows)


def test_an_edited_file_is_refused_on_resume(tmp_path) -> None:
    path = write(tmp_path / "p.csv", {"prompt": ["a", "b", "c"]})
    cursor = PromptCursor(3, 2, 0, read_report(path).digest)
    cursor.take()
    state = json.loads(json.dumps(cursor.state_dict()))
    PromptCursor(3, 2, 0, read_report(path).digest).load_state_dict(state)
    picture(tmp_path / "a.png")
    assert len({read_report(write(path, {"prompt": ["a"], "image": [name]})).digest for name in ("", "a.png")}) == 2
    # The same rows in another format are the same data.
    other = write(tmp_path / "p.jsonl", {"prompt": ["a", "b", "c"]})
    PromptCursor(3, 2, 0, read_report(other).digest).load_state_dict(state)
    write(path, {"prompt": ["a", "b", "d"]})
    with pytest.raises(UserError, match="resume: the 3 prompts are not those of the run"):
        PromptCursor(3, 2, 0, read_report(path).digest).load_state_dict(state)
    del state["digest"]  # as an earlier version wrote it
    resumed = PromptCursor(3, 2, 0, read_report(path).digest)
    resumed.load_state_dict(state)
    assert resumed.take() == cursor.take()


@given(st.integers(1, 9), st.sampled_from([1, 2, 4]), st.integers(0, 3))
def test_replicas_take_the_same_rows_whatever_their_number(num: int, per_replica: int, seed: int) -> None:
    """The prompts of an iteration depend on its size, not on how many replicas share it."""
    whole = PromptCursor(num, 4, seed)
    for _ in range(3):
        together = whole.take()
        parts = []
        for rank in range(4 // per_replica):
            cursor = PromptCursor(num, 4, seed)
            cursor.taken = whole.taken - 4
            parts.append(cursor.take()[rank :: 4 // per_replica])
        assert sorted(index for part in parts for index in part) == sorted(together)


@pytest.fixture
def settings_of_a_run(tmp_path) -> list[str]:
    model = tmp_path / "model"
    for part in ("transformer", "vae", "text_encoder"):
        (model / part).mkdir(parents=True)
    (model / "transformer" / "config.json").write_text(
        json.dumps({"_class_name": "HunyuanVideo15Transformer3DModel", "num_attention_heads": 4, "num_layers": 2})
    )
    (model / "vae" / "config.json").write_text("{}")
    return [f"model.pretrained={model}", f"model.weights={model}", f"data.prompts={tmp_path / 'p.csv'}"]


def test_the_run_is_refused_before_it_starts(tmp_path, settings_of_a_run) -> None:
    write(tmp_path / "p.csv", {"prompt": ["x", "y"], "image": ["none.png", ""]})

    def say(*overrides: str) -> str:
        with pytest.raises(UserError) as error:
            validate(load_config(None, [*settings_of_a_run, *overrides]), 1)
        return str(error.value)

    assert "data.prompts: " in (line := say()) and "line 2: none.png: no such file" in line
    validate(load_config(None, [*settings_of_a_run, "data.skip_unreadable=true"]), 1)
    (tmp_path / "p.txt").write_text("x\n")
    assert "has no columns" in say(f"data.prompts={tmp_path / 'p.txt'}", "data.prompt_column=text")
    held_out = write(tmp_path / "held_out.jsonl", {"text": ["x"]})
    assert "evaluation.prompts: " in say("data.skip_unreadable=true", f"evaluation.prompts={held_out}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_rights_is_named(tmp_path) -> None:
    path = write(tmp_path / "p.csv", {"prompt": ["x"]})
    path.chmod(0)
    assert "cannot read" in refusal(path)
