"""study.html and its Markdown of made-up studies."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_sage.errors import UserError
from megatron_sage.study.cells import CHOICES
from megatron_sage.study.charts import curve, forest
from megatron_sage.study.claims import CLAIMS
from megatron_sage.study.page import write_markdown, write_page
from megatron_sage.study.statistics import cell_interval, compare, read_results, t_interval
from tests.study.fake_study import curves, run, study, write

CELLS = sorted({cell for claim in CLAIMS for cell in (claim.better, claim.worse) if cell})


class Page(HTMLParser):
    """Checks that tags are balanced; collects the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs) -> None:
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data) -> None:
        self.text += data


def written(directory, rows, points=None) -> str:
    write(directory / "results.csv", rows)
    if points is None:
        points = curves(rows)
    if points:
        write(directory / "curves.csv", points)
    path = write_page(directory)
    assert path == directory / "study.html" and not list(directory.glob(".*"))
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows():
    return study(dict.fromkeys(CELLS, 0.1) | {"b_flow_none_no_equalizer": 0.0, "a_cps_none": 0.3})


@pytest.fixture(scope="module")
def html(rows, tmp_path_factory) -> str:
    return written(tmp_path_factory.mktemp("study"), rows)


def test_the_page_is_self_contained_and_whole(html: str) -> None:
    page = Page(html)
    assert not re.search(r"<script|http|//[a-z]|@import|url\(", html)
    assert "prefers-color-scheme: dark" in html and page.tags.count("svg") == 2 + 4 + 2 + 3 + 2
    assert not re.search(r'(points|[cxyr][xy]?[12]?)="[^"]*(nan|inf)', html)


def test_every_cell_and_every_claim_is_there(html: str) -> None:
    rows = re.findall(r"<tr><td>(.*?)</td>", html)
    assert [row.partition("<br>")[0] for row in rows[-len(CELLS) :]] == CELLS
    for cell in CELLS:
        assert len(re.findall(rf'text-anchor="end">{cell}</text>', html)) == 2, cell
    for claim in CLAIMS:
        assert claim.sentence in html and f"{claim.better} − " in html


def test_its_numbers_are_the_statistics(html: str, rows) -> None:
    text = Page(html).text
    found = compare(rows, "b_flow_none", "b_flow_none_no_equalizer", "reward").interval()
    assert f"+{found.mean:.3f} ± {found.half:.3f}" in text
    cell = cell_interval(rows, "b_sage_dual", "MQ")
    assert f"{cell.mean:+.3f} ± {cell.half:.3f}".replace("-", "−") in text
    assert "Finished runs: 130, in 26 cells with 5 seeds, each of 12 iterations (384 videos); 3.25 hours" in text
    assert "Of 27 claims this study supports 2, contradicts 2 and leaves 23 undecided. Undecided means" in text
    # fixed_a_cps agrees; sampler_a_cps contradicts SAGE as the paper's own number does; best does not agree
    assert "(3 claims), the sign agrees with the paper's in 2." in text
    assert "−0.1484against" in text and "0.062" in text


def test_a_row_holds_its_own_verdict(html: str) -> None:
    for sentence, word in (
        ("FlowGRPO: with beats without (B, no KL)", "supported"),
        ("SAGE beats CPS (A, no KL)", "contradicted"),
        ("SAGE beats CPS (B, no KL)", "undecided"),
    ):
        (row,) = re.findall(rf"<tr><td>{re.escape(sentence)}.*?</tr>", html)
        assert re.findall(r'class="verdict [a-z-]*">(\w+)<', row) == [word]


def test_markdown_has_the_same_tables(html: str, rows, tmp_path) -> None:
    write(tmp_path / "results.csv", rows)
    text = write_markdown(tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(CLAIMS) + 7 + 2 + len(CELLS)
    assert {line.count("|") for line in lines} == {9, 8}
    numbers = re.compile(r"[+−]\d\.\d{3} ± \d\.\d{3}")
    assert numbers.findall(text) == numbers.findall(html.partition('<div class="grid after">')[0])
    assert "b\\_sage\\_dual\\_lambda\\_milder" in text and "supports 2, contradicts 2" in text


def test_falling_alignment_is_said_in_words(tmp_path) -> None:
    sure = [run("b_sage_none", seed, 0.1, final_TA=0.4 + seed / 100) for seed in range(4)]
    unsure = [run("b_cps_none", seed, 0.1, final_TA=0.45 + (-1) ** seed) for seed in range(4)]
    unsure[0] = replace(unsure[0], final_TA=1.3)
    lower = [run("b_flow_none", seed, -0.1, final_TA=0.4) for seed in range(4)]
    html = written(tmp_path, sure + unsure + lower)
    cells = {row.partition("<br>")[0]: row for row in re.findall(r"<tr><td>(.*?)</tr>", html)}
    assert "falls while the reward rises (interval below 0)" in cells["b_sage_none"]
    assert "falls while the reward rises (interval holds 0)" in cells["b_cps_none"]
    assert "falls" not in cells["b_flow_none"]  # the reward falls too
    assert "falls while the reward rises" in write_markdown(tmp_path)


def test_broken_short_and_uneven_runs_are_said(tmp_path) -> None:
    rows = study({"b_sage_none": 0.1, "b_cps_none": 0.1, "b_flow_none": 0.1})
    rows[1] = replace(rows[1], final_reward=math.nan, final_VQ=math.nan)
    rows[2] = replace(rows[2], iterations=6)
    rows = [row for row in rows if row.cell != "b_cps_none" or row.seed == 0]
    rows = [replace(row, final_overall=math.nan) if row.cell == "b_flow_none" else row for row in rows]
    html = written(tmp_path, rows)
    text = Page(html).text
    assert "Runs with a result that is not finite: 6" in text and "b_sage_none (seed 1)" in text
    assert "Cells without all of the study's 5 seeds (number missing): b_cps_none (4)." in text
    assert "each of 6 to 12 iterations" in text and "differ in their number of iterations" in text
    assert "no finite result" in text and "27 undecided, 26 of these for want of 3 common seeds" in text
    assert not re.search(r'(points|[cxyr][xy]?[12]?)="[^"]*(nan|inf)', html)
    (row,) = re.findall(r"<tr><td>b_cps_none<.*?</tr>", html)
    assert re.search(r"<td>1</td><td>[+−]\d\.\d{3}</td>", row)  # one run has no interval


def test_a_study_that_is_not_finished_is_said_without_a_list_of_all_cells(tmp_path) -> None:
    rows = study(dict.fromkeys(CELLS, 0.1))
    text = Page(written(tmp_path, [row for row in rows if row.seed < 4 or row.cell < "a_sage"])).text
    assert f"{len(CELLS) - 6} of {len(CELLS)} cells lack some of the study's 5 seeds" in text
    assert "(number missing)" not in text


def test_cells_with_the_same_columns_are_told_apart(tmp_path) -> None:
    html = written(tmp_path, [run(cell, 0) for cell in ("b_sage_dual", "b_sage_dual_lambda_tighten")])
    configuration = dict(re.findall(r"<tr><td>(b_\w+)<br><span class=\"soft\">(.*?)</span>", html))
    assert configuration["b_sage_dual"] == "SAGE, dual KL (λ two_stage), setting B"
    assert configuration["b_sage_dual_lambda_tighten"].endswith("B; ablation: feedback of the other sign")


def test_only_strategies_with_a_position_reference_have_its_kl(tmp_path) -> None:
    html = written(tmp_path, study(dict.fromkeys(("b_sage_none", "b_sage_step", "b_sage_fixed"), 0.1)))
    (card,) = re.findall(r"<h3>KL against the strategy.*?</svg>", html)
    assert "fixed; fixed: from the model" in card and card.count("<polyline") == 1
    assert "KL against the strategy" not in written(tmp_path, study({"b_sage_none": 0.1, "b_sage_step": 0.1}))


def test_smoothing_is_said_where_there_is_any(tmp_path) -> None:
    rows = study({"b_sage_none": 0.1})
    assert "Nothing is smoothed." in written(tmp_path, rows)
    longer = written(tmp_path, [replace(row, iterations=30) for row in rows])
    assert "smoothed within each run" in longer and "Nothing is smoothed" not in longer


def test_each_setting_has_its_heading_in_the_forest() -> None:
    chart = forest([run(cell, 0) for cell in ("b_cps_none", "a_sage_none", "a_cps_none")], "reward")
    places = [(text, float(y)) for y, text in re.findall(r'<text [^>]*y="([^"]*)"[^>]*>(setting \w|[ab]_\w+)<', chart)]
    assert [text for text, _ in places] == ["setting A", "a_cps_none", "a_sage_none", "setting B", "b_cps_none"]
    assert all(after - before == 20 for (_, before), (_, after) in zip(places, places[1:], strict=False))


def test_one_run_and_no_curves_make_a_page(tmp_path) -> None:
    html = written(tmp_path, [run("b_sage_none", 0)], points=[])
    text = Page(html).text
    assert "What 1 small run can say" in text and "in 1 cell with 1 seed" in text
    assert html.count("<svg") == 2 and "Samplers" not in text


def test_only_non_finite_results_make_a_page(tmp_path) -> None:
    broken = {f"final_{name}": math.nan for name in ("reward", "VQ", "MQ", "TA", "overall")}
    html = written(tmp_path, [run("b_sage_none", 0, **broken)])
    assert html.count("no finite result in this study") == 2
    Page(html)


def test_text_of_the_files_is_escaped(tmp_path) -> None:
    name = 'b_sage_<script>alert("|")</script>_and_a_long_tail'
    rows = [replace(run("b_sage_none", seed), cell=name, sampler="<b>x</b>", schedule="&") for seed in range(3)]
    html = written(tmp_path, rows)
    assert "<script" not in html and "<b>x" not in html and name in Page(html).text
    assert "b_sage_&lt;script&gt;alert(&quot;|…" in html or "…</text>" in html
    text = write_markdown(tmp_path)
    assert "<script" not in text and 'alert("\\|")' in text


def test_a_wide_interval_does_not_set_the_scale() -> None:
    """Two runs give ±1.3, five about ±0.01: the axis is that of the five, the line of the two is cut."""
    narrow = [run("a_sage_none", seed, 0.1 + 0.01 * (-1) ** seed) for seed in range(5)]
    wide = [run("a_cps_none", seed, 0.1 + 0.1 * seed) for seed in range(2)]
    chart = forest(narrow + wide, "reward")
    x = [float(value) for value in re.findall(r' (?:x1|x2|cx|x)="([^"]*)"', chart)]
    assert 0 <= min(x) and max(x) <= 560
    lines = re.findall(r'<line class="line c\d" x1="([^"]*)" x2="([^"]*)"', chart)
    cut, kept = ([float(value) for value in line] for line in lines)
    assert cut[1] - cut[0] > 300 and 10 < kept[1] - kept[0] < 200


def test_curves_are_means_over_finished_seeds() -> None:
    rows = study({"b_sage_none": 0.1}, seeds=(0, 1, 2))
    points = curves([*rows, run("b_sage_none", 9, 50.0)])  # seed 9 did not finish
    points.append(replace(points[0], reward_mean=-1.0, lambda_=3.0))  # an iteration that was run twice: the last counts
    x, mean, half, seeds = curve(rows, points, "b_sage_none", "lambda_")
    assert x == list(range(12)) and seeds == 3
    first = t_interval([3.0, 0.01, 0.01])
    assert (mean[0], half[0]) == pytest.approx((first.mean, first.half))
    assert mean[1] == pytest.approx(0.02) and half[1] == pytest.approx(0.0, abs=1e-12)
    _, reward, _, _ = curve(rows, points, "b_sage_none", "reward_mean")
    expected = [0.5 + row.change * 5 / 12 for row in rows]
    assert reward[5] == pytest.approx(sum(expected) / 3)
    assert all(math.isnan(value) for value in curve(rows[:2], points, "b_sage_none", "lambda_")[2])


def test_gaps_in_curves(tmp_path) -> None:
    rows = study({"b_sage_none": 0.1, "b_sage_dual": 0.1})
    points = [replace(one, kl_position=math.nan, lambda_=math.nan) for one in curves(rows)]
    points[3] = replace(points[3], reward_mean=math.nan)
    html = written(tmp_path, rows, points)
    assert "KL against the strategy" not in html and "Training reward, mean" in html
    assert not re.search(r'(points|[cxyr][xy]?[12]?)="[^"]*(nan|inf)', html)


def test_malformed_files_leave_no_page(tmp_path) -> None:
    write(tmp_path / "results.csv", [run("b_sage_none", 0)])
    (tmp_path / "curves.csv").write_text("cell,seed\nx,1\n")
    with pytest.raises(UserError, match=r"curves\.csv, line 1: no column iteration"):
        write_page(tmp_path)
    assert not (tmp_path / "study.html").exists() and not list(tmp_path.glob(".*"))


def test_the_documented_tables_are_those_of_the_committed_results() -> None:
    root = Path(__file__).parents[2] / "docs"
    text = (root / "study.md").read_text()
    assert text.endswith(write_markdown(root / "study")), "megatron-sage study --markdown --out docs/study"
    assert len(read_results(root / "study" / "results.csv")) >= 5 * len(CHOICES["all"])
