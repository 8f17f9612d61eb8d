"""Blind ratings: what raters see, what their files are worth, and intervals against simulated truth."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sage.__main__ import main
from megatron_sage.evaluation.measures import wilson
from megatron_sage.evaluation.rating import QUESTIONS, make_rating, sides
from megatron_sage.evaluation.votes import Vote, clustered, read_ratings, table
from tests.evaluation import fake

RATERS = 3


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    broken = [("cps", 1, 0)]
    return fake.write_evaluation(tmp_path_factory.mktemp("rated") / "eval", ("base", "sage", "cps"), broken=broken)


@pytest.fixture(scope="module")
def study(evaluation: Path) -> Path:
    out = evaluation / "rating"
    said = make_rating(evaluation, out, ["base,sage", "sage,cps"], RATERS, 7, 2, None)
    assert any("1 comparisons left out" in line for line in said)
    return out


def key_of(study: Path) -> dict[str, Any]:
    return json.loads((study / "key.json").read_text())


def answers_of(study: Path, rater: int, choose: Any) -> dict[str, Any]:
    """A rater's file; `choose(first, second, question)` is "first", "same" or "second" of the pair."""
    key, data = key_of(study), fake.embedded_data(study / "pages" / f"rater_{rater:02d}.html")
    found: dict[str, Any] = {}
    for item in data["items"]:
        side = key["raters"][str(rater)][item["id"]]
        other = "B" if side == "A" else "A"
        for question in QUESTIONS:
            chosen = choose(*key["items"][item["id"]]["pair"], question)
            found.setdefault(item["id"], {})[question] = {"first": side, "second": other, "same": "same"}[chosen]
    return {k: data[k] for k in ("format", "version", "study", "rater")} | {"answers": found}


def saved(tmp_path: Path, content: Any, name: str) -> Path:
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_pages_show_the_right_clips_and_tell_nothing(study: Path, evaluation: Path) -> None:
    key = key_of(study)
    for rater in range(1, RATERS + 1):
        page = study / "pages" / f"rater_{rater:02d}.html"
        text, data = page.read_text(encoding="utf-8"), fake.embedded_data(page)
        assert not re.search(r"base|sage|cps", text.replace("megatron_sage rating", ""))
        assert len(data["items"]) == len(key["items"]) == 6 + 5
        for item in data["items"]:
            known = key["items"][item["id"]]
            first, second = ("a", "b") if key["raters"][str(rater)][item["id"]] == "A" else ("b", "a")
            for side, name in ((first, known["pair"][0]), (second, known["pair"][1])):
                clip = (page.parent / item[side]).read_bytes()
                file = evaluation / f"videos/{name}/{known['prompt']:04d}_{known['sample']:02d}.mp4"
                assert clip == file.read_bytes()
            assert item["text"] == known["text"] == fake.PROMPTS[known["prompt"]]
    clips = list((study / "pages" / "clips").iterdir())
    assert all(re.fullmatch(r"[0-9a-f]{16}\.mp4", clip.name) and clip.stat().st_mtime == 0 for clip in clips)
    assert not any("key" in path.name for path in (study / "pages").rglob("*"))


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_sides_are_balanced_in_every_pair_and_over_raters(count: int) -> None:
    items = {f"{p}{n}": {"pair": list(p)} for p in ("xy", "yz") for n in range(count)}
    left: dict[str, list[int]] = {"xy": [], "yz": []}
    orders = []
    for rater in range(1, 9):
        order = sides(items, rater, seed=count)
        assert sorted(name for name, _ in order) == sorted(items)
        orders.append([name for name, _ in order])
        for pair in left:
            left[pair].append(sum(side == "A" for name, side in order if name.startswith(pair)))
        assert order == sides(items, rater, seed=count)
    for numbers in left.values():
        assert all(abs(2 * number - count) <= 1 for number in numbers)
        assert 2 * sum(numbers) == 8 * count  # over an even number of raters: exactly
    assert count < 7 or len({tuple(order) for order in orders}) == 8


def test_table_counts_wins_whatever_the_side(study: Path, tmp_path: Path) -> None:
    def choose(first: str, second: str, question: str) -> str:
        if question == "MQ":
            return "same"
        return "second" if (second == "sage") == (question == "VQ") else "first"

    files = [saved(tmp_path, answers_of(study, r, choose), f"a{r}.json") for r in range(1, RATERS + 1)]
    rows = {(row["pair"], row["question"]): row for row in table(read_ratings(files, study / "key.json"))}
    assert len(rows) == 6
    counts = {key: (row["better"], row["same"], row["worse"]) for key, row in rows.items()}
    assert counts["sage over base", "VQ"] == (18, 0, 0) and counts["sage over base", "TA"] == (0, 0, 18)
    assert counts["cps over sage", "MQ"] == (0, 15, 0) and counts["cps over sage", "TA"] == (15, 0, 0)
    all_won = rows["sage over base", "VQ"]
    assert all_won["rate"] == 1 and all_won["low"] == pytest.approx(wilson([1.0] * 3).low)
    assert (all_won["prompts"], all_won["raters"]) == (3, 3)
    assert rows["sage over base", "MQ"]["rate"] == 0.5


def test_bad_files_are_refused_by_name(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], evaluation: Path
) -> None:
    good = answers_of(study, 1, lambda *_: "same")
    item = next(iter(good["answers"]))
    cases = {
        "foreign": (good | {"study": "0" * 16}, "of study 0000000000000000"),
        "unknown_rater": (good | {"rater": 9}, "rater 9 is not of this study"),
        "twice": (good, "of rater 1, whose answers are in"),
        "text": ("{", "not JSON"),
        "list": ([1], "is not a file saved by a rating page"),
        "version": (good | {"version": 2}, "version 2"),
        "none": (good | {"answers": None}, "no answers in it"),
        "item": (good | {"answers": {"ffff": {"VQ": "A"}}}, "'ffff' is not of this study"),
        "answer": (good | {"answers": {item: {"VQ": "C"}}}, "expected VQ, MQ, TA"),
        "key": (key_of(study), "is not a file saved by a rating page"),
    }
    first = str(saved(tmp_path, good, "first.json"))
    for name, (content, said) in cases.items():
        other = saved(tmp_path, content, f"{name}.json")
        assert main(["rate", "table", first, str(other), "--key", str(study / "key.json")]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {other}: ") and said in error and error.count("\n") == 1, error
    assert main(["rate", "table", first, "--key", str(evaluation / "settings.json")]) == 2
    assert "is not the key.json" in capsys.readouterr().err


def test_incomplete_and_absent_files_are_said(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = answers_of(study, 2, lambda *_: "second")
    part["answers"] = dict(list(part["answers"].items())[:4])
    part["answers"][next(iter(part["answers"]))].pop("TA")
    file = saved(tmp_path, part, "part.json")
    assert main(["rate", "table", str(file), "--key", str(study / "key.json"), "--csv", str(tmp_path / "t.csv")]) == 0
    out = capsys.readouterr().out
    assert f"{file}: 22 of 33 answers are missing; the others count." in out
    assert "No file of 2 of 3 raters: 1, 3." in out
    assert (tmp_path / "t.csv").read_text().startswith("pair,question,better,same,worse,rate,low,high,prompts,raters\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pairs", "base"], "two different names"),
        (["--pairs", "base,base"], "two different names"),
        (["--pairs", "base,sgae"], "has no sgae; did you mean sage?"),
        (["--pairs", "base,sage", "--pairs", "sage,base"], "named twice"),
        (["--pairs", "base,sage", "--samples", "3"], "has 2 of each prompt"),
        (["--pairs", "base,sage", "--raters", "0"], "--raters 0"),
        (["--pairs", "base,sage", "--out", "{evaluation}"], "exists already"),
    ],
)
def test_make_refuses(evaluation: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    filled = [text.format(evaluation=evaluation) for text in arguments]
    assert main(["rate", "make", str(evaluation), "--out", str(evaluation.parent / "new"), *filled]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error
    assert main(["rate", "make", str(evaluation.parent / "nothing"), "--pairs", "a,b"]) == 2
    assert "settings.json" in capsys.readouterr().err


def test_interval_is_scipys_cluster_formula_by_hand() -> None:
    """Two raters of opposite taste and two prompts: by hand."""
    votes = [Vote(p, r, float(r == 1)) for p in (0, 1) for r in (1, 2)]
    found = clustered(votes)
    # sums of (x - 1/2): 0 for each prompt, +1 and -1 for the raters: s_raters = sqrt(2/1 · 2) / 4 = 1/2
    assert found.rate == 0.5 and (found.low, found.high) == (0.0, 1.0)  # 0.5 ± 12.7 · 0.5
    alone = clustered([v for v in votes if v.rater == 1])
    assert (alone.low, alone.high) == pytest.approx((wilson([1, 1]).low, 1.0))
    assert math.isnan(clustered([]).rate)


def test_interval_holds_the_truth_for_other_prompts_and_raters() -> None:
    """Prompts and raters with effects of their own: ignoring the raters would not do."""
    rng = np.random.default_rng(5)
    prompts, raters, times, held, naive = 40, 6, 300, 0, 0
    for _ in range(times):
        taste = 0.8 * rng.normal(size=(prompts, 1)) + 1.2 * rng.normal(size=(1, raters))
        won = taste + rng.normal(size=(prompts, raters)) > 0  # the truth is 1/2
        found = clustered([Vote(p, r, float(won[p, r])) for p in range(prompts) for r in range(raters)])
        held += found.low <= 0.5 <= found.high
        one = wilson(won.mean(axis=1))
        naive += one.low <= 0.5 <= one.high
    assert held / times >= 0.94 and naive / times < 0.9
