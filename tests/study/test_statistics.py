"""Statistics of a study: by hand, against scipy and enumeration, and on made-up studies with planted differences."""

import itertools
import math
from dataclasses import fields, replace

import numpy as np
import pytest
from scipy import stats

from megatron_sage.errors import UserError
from megatron_sage.study.claims import CLAIMS, PAPER_OVERALL, judge
from megatron_sage.study.statistics import (
    Comparison,
    RunRow,
    cell_interval,
    compare,
    holm,
    read_curves,
    read_results,
    sign_flip_test,
    t_interval,
    t_test,
    verdict,
)
from tests.study.fake_study import curves, run, study, write

CELLS = sorted({cell for claim in CLAIMS for cell in (claim.better, claim.worse) if cell})


def comparison(*differences: float) -> Comparison:
    return Comparison("x", "y", "reward", differences)


def judged(rows, key: str):
    return next(one for one in judge(rows) if one.claim.key == key)


def test_interval_by_hand() -> None:
    """1, 2, 3: mean 2, std 1, t_{2, 0.975} = 4.302653 from the tables, so half = 4.302653/√3 = 2.484138."""
    found = t_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3) and found.half == pytest.approx(2.484138, abs=1e-6)
    assert found.low == pytest.approx(-0.484138, abs=1e-6) and found.high == pytest.approx(4.484138, abs=1e-6)


def test_interval_of_one_and_of_none() -> None:
    one, none = t_interval([0.3]), t_interval([])
    assert one.mean == 0.3 and math.isnan(one.half) and math.isnan(none.mean) and none.n == 0


def test_t_test_is_scipys_and_agrees_with_the_interval() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        values = draw.normal(0.5, 1, 5).tolist()
        p = stats.ttest_1samp(values, 0).pvalue
        assert t_test(values) == pytest.approx(p, rel=1e-9)
        edge = t_interval(values, p)  # at confidence 1 - p one end of the interval is exactly zero
        assert min(abs(edge.low), abs(edge.high)) < 1e-9


def test_equal_differences_have_no_spread() -> None:
    assert t_test([0.0] * 4) == 1.0 and t_test([0.25] * 4) == 0.0
    assert verdict(comparison(*[0.0] * 4)) == "undecided" and verdict(comparison(*[0.25] * 4)) == "supported"


def test_sign_flips_by_hand() -> None:
    """Five of one sign: only all + and all - reach the sum, 2/32. For 1, 2, -3 (sum 0) every pattern does."""
    assert sign_flip_test([1, 2, 3, 4, 5]) == 2 / 32
    assert sign_flip_test([1, 2, -3]) == 1.0
    assert sign_flip_test([1, 2, 4]) == 2 / 8 and sign_flip_test([-1, 2, 4]) == 4 / 8
    assert sign_flip_test([0.1, 0.2, 0.3]) == 2 / 8  # and not less through rounding
    assert math.isnan(sign_flip_test([])) and math.isnan(sign_flip_test([1.0] * 21))


def test_sign_flips_are_the_enumeration() -> None:
    values = np.random.default_rng(1).normal(0.4, 1, 8)
    patterns = np.array(list(itertools.product([1, -1], repeat=8)))
    expected = np.mean(np.abs(patterns @ values) >= abs(values.sum()) - 1e-12)
    assert sign_flip_test(values.tolist()) == expected
    assert 2 / 256 < expected < 1


def test_holm_by_hand() -> None:
    """0.01, 0.02, 0.03, 0.04 x (4, 3, 2, 1) = 0.04, 0.06, 0.06, 0.04, then the running maximum."""
    found = holm([0.03, 0.01, 0.04, 0.02])
    assert [p for p, _ in found] == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert [level for _, level in found] == pytest.approx([0.05 / 3, 0.05 / 4, 0.05 / 3, 0.05 / 3])
    assert [p for p, _ in holm([0.001, math.nan, 0.04])] == pytest.approx([0.002, math.nan, 0.04], nan_ok=True)
    assert holm([0.9, 0.8])[0][0] == 1.0 and holm([]) == [] and math.isnan(holm([math.nan])[0][0])


def test_verdict_is_holms_decision() -> None:
    """The interval at each comparison's level excludes zero exactly if its adjusted p is below 0.05."""
    draw = np.random.default_rng(2)
    decided = 0
    for _ in range(30):
        family = [comparison(*draw.normal(mean, 0.3, 5)) for mean in (0, 0.5, -0.7, 1.0, 1.5)]
        for one, (p, level) in zip(family, holm([one.p_t for one in family]), strict=True):
            mean = one.interval().mean
            expected = "undecided" if p >= 0.05 else "supported" if mean > 0 else "contradicted"
            assert verdict(one, level) == expected
            decided += p < 0.05
    assert 30 < decided < 120


def test_two_seeds_decide_nothing() -> None:
    two = comparison(1.0, 1.0000001)
    assert two.interval().low > 0 and verdict(two) == "undecided" and math.isnan(two.p_t)
    assert verdict(comparison(1.0, 1.0001, 0.9999)) == "supported"


def test_changes_and_pairs_by_hand() -> None:
    rows = [run("a_sage_none", seed, gain) for seed, gain in enumerate((0.1, 0.2, 0.6))]
    rows += [run("a_cps_none", seed, gain) for seed, gain in ((2, 0.5), (1, 0.3), (7, 9.0))]
    assert cell_interval(rows, "a_sage_none", "reward").mean == pytest.approx(0.3)
    assert cell_interval(rows, "a_sage_none", "overall").mean == pytest.approx(0.9)
    assert compare(rows, "a_sage_none", "a_cps_none", "reward").differences == pytest.approx((-0.1, 0.1))
    assert compare(rows, "a_sage_none", "nothing", "reward").differences == ()


def test_a_run_that_broke_is_left_out() -> None:
    rows = [run("a_sage_none", seed) for seed in range(4)] + [run("a_cps_none", seed, 0.0) for seed in range(4)]
    rows[1] = replace(rows[1], final_reward=math.nan)
    rows[6] = replace(rows[6], base_reward=math.inf)
    assert cell_interval(rows, "a_sage_none", "reward").n == 3
    assert len(compare(rows, "a_sage_none", "a_cps_none", "reward").differences) == 2
    assert len(compare(rows, "a_sage_none", "a_cps_none", "TA").differences) == 4


def test_planted_differences_are_found_and_equal_cells_are_undecided() -> None:
    """The seeds' common effect is twenty times the noise: without pairing nothing would be found."""
    gains = dict.fromkeys(CELLS, 0.1) | {"b_flow_none_no_equalizer": 0.0, "a_cps_none": 0.3}
    rows = study(gains)
    found = {one.claim.key: one for one in judge(rows)}
    assert found["equalizer_flow"].verdict == "supported" and found["sampler_a_cps"].verdict == "contradicted"
    assert found["fixed_a_cps"].verdict == "supported" and found["best"].verdict == "contradicted"
    rest = {key: one.verdict for key, one in found.items() if key not in ("sampler_a_cps", "best", "fixed_a_cps")}
    assert [key for key, word in rest.items() if word != "undecided"] == ["equalizer_flow"]
    assert found["equalizer_flow"].comparison.p_flip == 2 / 32
    assert cell_interval(rows, "b_flow_none", "reward").low < 0 < found["equalizer_flow"].comparison.interval().low


def test_equal_cells_are_seldom_decided() -> None:
    """Twenty studies without any effect: of 20 x 7 questions, 5 % may have a wrong verdict, so about 7."""
    wrong = 0
    for start in range(20):
        rows = study(dict.fromkeys(CELLS, 0.1), seeds=range(5 * start, 5 * start + 5))
        wrong += len({one.claim.question for one in judge(rows) if one.verdict != "undecided"})
    assert wrong <= 13


def test_claims_are_the_papers() -> None:
    paper = {claim.key: round(claim.paper, 4) for claim in CLAIMS}
    says = {claim.key: claim.paper_says for claim in CLAIMS}
    assert len(CLAIMS) == len(paper) == 27 and len(PAPER_OVERALL) == 18
    assert paper["dual_b_fixed"] == 0.5209 and paper["dual_b_none"] == 0.9288 and says["dual_b_none"] == "for"
    assert paper["dual_a_fixed"] == -0.0071 and paper["dual_a_none"] == -0.2686 and says["dual_a_fixed"] == "against"
    assert paper["sampler_a_cps"] == -0.1484 and paper["sampler_b_flow"] == -0.5995
    assert paper["fixed_a_cps"] == 0.5415 and paper["fixed_b_sage"] == -0.4079 and paper["best"] == 0.1723
    figures = {key for key, word in says.items() if word == "figure only"}
    assert figures == {f"equalizer_{name}" for name in ("dance", "flow", "cps", "sage")} | {
        "dual_step",
        "dual_moving",
        "lambda_fixed",
        "lambda_milder",
    }


def test_best_of_all() -> None:
    gains = dict.fromkeys(CELLS, 0.1) | {"b_sage_dual": 0.5, "a_sage_none": 0.3}
    best = judged(study(gains), "best")
    assert best.verdict == "supported" and best.comparison.worse == "a_sage_none"
    assert f"of {len(CELLS) - 1} other cells {len(CELLS) - 1} beaten" in best.note
    assert best.comparison.measure == "overall" and best.comparison.interval().mean == pytest.approx(0.6, abs=0.05)
    assert judged(study(gains | {"a_sage_none": 0.5}), "best").verdict == "undecided"
    short = [row for row in study(gains) if (row.cell, row.seed) not in {("a_cps_none", seed) for seed in range(3)}]
    assert judged(short, "best").verdict == "undecided" and "1 not tested" in judged(short, "best").note
    few = judged(study({"b_sage_dual": 0.5, "b_sage_none": 0.1}), "best")  # most of the paper's table is not run
    assert few.verdict == "undecided" and "of 17 other cells 1 beaten, 0 better, 16 not tested" in few.note
    alone = judged(study({"b_sage_dual": 0.5}), "best")
    assert alone.verdict == "undecided" and "no other cell" in alone.note and math.isnan(alone.p_holm)


def test_an_interrupted_study_says_what_is_missing() -> None:
    rows = study({"b_cps_none": 0.3, "b_cps_none_no_equalizer": 0.0, "b_sage_none": 0.3})
    rows = [row for row in rows if row.cell != "b_sage_none" or row.seed < 2]
    assert judged(rows, "equalizer_cps").verdict == "supported"
    assert judged(rows, "equalizer_sage").note == "not run: b_sage_none_no_equalizer"
    assert judged(rows, "sampler_b_cps").note == "common finite seeds: 2, 3 are needed"
    assert {one.verdict for one in judge(rows) if one.claim.key != "equalizer_cps"} == {"undecided"}


def test_what_only_the_correction_makes_undecided_is_said() -> None:
    rows = study(dict.fromkeys(CELLS, 0.1))
    rows = [row for row in rows if row.cell != "b_sage_step"]
    base = {row.seed: row.gain("VQ") for row in rows if row.cell == "b_sage_dual"}
    rows += [
        run("b_sage_step", seed, gain - shift)
        for (seed, gain), shift in zip(base.items(), (0.3, 3, 2, 0.7, 4), strict=True)
    ]
    step = judged(rows, "dual_step")
    assert 0.025 < step.comparison.p_t < 0.05 < step.p_holm
    assert step.verdict == "undecided" and step.note.startswith("its own 95 % interval excludes 0")


def test_files_are_read_back(tmp_path) -> None:
    rows = study({"a_sage_none": 0.1, "b_sage_none_no_equalizer": 0.2}, seeds=(3, 4))
    rows[0] = replace(rows[0], kl_position=math.inf)
    assert read_results(write(tmp_path / "results.csv", rows)) == rows
    assert "lambda," in (tmp_path / "results.csv").read_text() and not rows[-1].equalizer
    assert read_curves(write(tmp_path / "curves.csv", curves(rows))) == curves(rows)


def test_blank_and_nan_numbers_and_other_columns(tmp_path) -> None:
    names = [field.name.rstrip("_") for field in fields(RunRow)]
    row = {field.name.rstrip("_"): getattr(run("a_sage_none", 0), field.name) for field in fields(RunRow)}
    row |= {"kl_position": "", "final_TA": "nan", "equalizer": "false", "extra": "x"}
    path = tmp_path / "results.csv"
    path.write_text("\n".join([",".join([*names, "extra"]), "", ",".join(str(row[n]) for n in [*names, "extra"])]))
    (read,) = read_results(path)
    assert math.isnan(read.kl_position) and math.isnan(read.gain("TA")) and read.equalizer is False
    assert read.gain("VQ") == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("cell,sampler", "name,sampler", "line 1: no column cell"),
        (",3,12,", ",3.5,12,", "line 3, seed: '3.5' is not a whole number"),
        (",True,", ",yes,", "line 2, equalizer: 'yes' is neither True nor False"),
        (",384,", ",384,,", "line 2: 26 values where the header names 25"),
        ("a_sage_none,sage_grpo", "a_sage_none,", "line 2, sampler: is empty"),
        (",3,12,", ",2,12,", "line 3: cell 'a_sage_none', seed 2 is in line 2 already"),
        ("a_sage_none,sage_grpo,none,A", "a_sage_none,sage_grpo,dual,A", "line 3: cell 'a_sage_none' has kl 'none'"),
        (",0.5,", ",half,", "is not a number"),
    ],
)
def test_malformed_files_are_refused_with_the_line(tmp_path, old: str, new: str, named: str) -> None:
    path = write(tmp_path / "results.csv", [run("a_sage_none", seed) for seed in (2, 3)])
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        read_results(path)
    assert named in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_and_empty_files_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="not found"):
        read_results(tmp_path / "results.csv")
    path = write(tmp_path / "results.csv", [run("a_sage_none", 0)])
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="line 1: no runs below the header"):
        read_results(path)
    path.write_text("")
    with pytest.raises(UserError, match="line 1: no column"):
        read_results(path)
