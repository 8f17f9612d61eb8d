"""Rows on the disk, tables and gallery, from made-up evaluations."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_sage.errors import UserError
from megatron_sage.evaluation import store
from megatron_sage.evaluation.gallery import write_gallery
from megatron_sage.evaluation.pages import embedded
from megatron_sage.evaluation.tables import load_results, write_tables
from tests.evaluation import fake


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    broken = [("sage", 2, 1)]
    return fake.write_evaluation(tmp_path_factory.mktemp("fake") / "eval", ("base", "sage", "cps"), broken=broken)


def test_tables_hold_the_numbers_of_the_rows(out: Path) -> None:
    results = load_results(out, ["base", "cps", "sage"])
    write_tables(results)
    assert [c.name for c in results.checkpoints] == ["base", "cps", "sage"]
    lines = list(csv.DictReader((out / "results.csv").open()))
    cell = {(r["table"], r["checkpoint"], r["against"], r["column"]): r for r in lines}
    by_prompt = [np.mean([sum(fake.scores("cps", p, s).values()) for s in range(2)]) for p in range(3)]
    assert float(cell["mean", "cps", "", "Overall"]["value"]) == pytest.approx(np.mean(by_prompt))
    changes = [
        np.mean([fake.scores("cps", p, s)["TA"] - fake.scores("base", p, s)["TA"] for s in range(2)]) for p in range(3)
    ]
    assert float(cell["difference", "cps", "base", "TA"]["value"]) == pytest.approx(np.mean(changes))
    assert float(cell["mean", "cps", "", "reward"]["value"]) == pytest.approx(
        np.mean(
            [
                np.mean([[0.5, 0.5, 1] @ np.array([*fake.scores("cps", p, s).values()]) for s in (0, 1)])
                for p in range(3)
            ]
        )
    )
    assert ("win rate", "sage", "cps", "VQ") in cell
    content = json.loads((out / "results.json").read_text())
    assert [c["nonfinite_videos"] for c in content["checkpoints"]] == [0, 0, 1]
    assert content["means"]["cps"]["VQ"]["mean"] == float(cell["mean", "cps", "", "VQ"]["value"])
    text = (out / "results.md").read_text()
    assert "| base |" in text and "sage: left out for a score that is not finite: 1 of its videos." in text
    assert "reward = 0.5·VQ + 0.5·MQ + 1·TA." in text


def test_an_unfinished_checkpoint_is_named_and_left_out(tmp_path: Path) -> None:
    out = fake.write_evaluation(tmp_path / "eval", prompts=fake.PROMPTS[:2], samples=1)
    rows = out / "rows" / "sage" / "rank_00000.jsonl"
    rows.write_text(rows.read_text().splitlines()[0] + "\n")
    results = load_results(out)
    write_tables(results)
    assert results.unfinished == ["sage"] and len(results.checkpoints) == 1
    assert "Not finished, and left out: sage." in (out / "results.md").read_text()
    assert "## Win rates" not in (out / "results.md").read_text()


def test_a_cut_line_does_not_count_and_is_gone_when_the_rank_goes_on(tmp_path: Path) -> None:
    out = fake.write_evaluation(tmp_path / "eval", ["base"], samples=1)
    file = out / "rows" / "base" / "rank_00000.jsonl"
    whole = file.read_bytes()
    keys = set(store.read_rows(out, "base"))
    start = whole[:-1].rfind(b"\n") + 1  # of the last line
    for end in range(start, len(whole)):
        file.write_bytes(whole[:end])
        assert set(store.read_rows(out, "base")) == keys - {(2, 0)}
    log = store.RowLog(out, "base", 0)
    log.append((2, 0), fake.scores("base", 2, 0), out / store.video_name("base", (2, 0)), out)
    log.close()
    assert file.read_bytes() == whole
    (out / store.video_name("base", (1, 0))).unlink()  # a row without its video is to be made again
    assert set(store.read_rows(out, "base")) == keys - {(1, 0)}
    file.write_bytes(whole.replace(b'"prompt": 1', b'"prompt": x'))
    with pytest.raises(UserError, match="line 2: not a row"):
        store.read_rows(out, "base")


def test_scores_survive_the_disk_bit_for_bit(tmp_path: Path) -> None:
    log = store.RowLog(tmp_path, "base", 3)
    given = {"a": 0.1 + 0.2, "b": math.nan, "c": -1e-300, "d": math.inf}
    log.append((4, 1), given, None, tmp_path)
    log.close()
    found = store.read_rows(tmp_path, "base")[4, 1]["scores"]
    assert found["a"] == given["a"] and found["c"] == given["c"] and math.isnan(found["b"]) and math.isnan(found["d"])
    assert "NaN" not in (tmp_path / "rows/base/rank_00003.jsonl").read_text()  # strict JSON


def test_gallery_holds_every_video_and_no_prompt_can_end_its_script(out: Path) -> None:
    page = write_gallery(load_results(out))
    text, data = page.read_text(encoding="utf-8"), fake.embedded_data(page)
    assert [row["prompt"] for row in data["rows"]] == [p for p in fake.PROMPTS for _ in range(2)]
    assert text.count("</script>") == 2 and "<b>" not in text and "<!-- x" not in text
    for row in data["rows"]:
        for name, video in zip(data["checkpoints"], row["videos"], strict=True):
            if (name, row["number"], row["sample"]) == ("sage", 2, 1):
                assert video == {"file": None, "scores": [None] * 5}
            else:
                assert (out / video["file"]).is_file()
                overall = sum(fake.scores(name, row["number"], row["sample"]).values())
                assert video["scores"][0] == pytest.approx(overall)
    assert "src=" not in text and "http" not in text  # nothing is loaded but the videos


def test_embedded_json_is_the_same_data() -> None:
    data = {"x": ["</script>", "<!--", "&amp;", "\u2028", '"', "🔺", 1.5, None]}
    assert json.loads(embedded(data)) == data and "<" not in embedded(data)
    with pytest.raises(ValueError, match="not JSON compliant"):
        embedded(math.nan)
