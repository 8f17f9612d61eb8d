"""reward_curves and kl_strategies of made-up studies."""

import csv
import math
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from megatron_sage.errors import UserError
from megatron_sage.figures import command, study_curves
from megatron_sage.figures.kl_strategies import LINES, kl_strategies
from megatron_sage.figures.reward_curves import lines, reward_curves
from megatron_sage.recipes import VARIANTS
from tests.study.fake_study import curves, run, write

SAMPLERS = ("dance", "flow", "cps", "sage")
PAIRS = [f"b_{name}_none{tail}" for name in SAMPLERS for tail in ("", "_no_equalizer")]
STRATEGIES = [f"b_sage_{kl}" for kl in ("none", "fixed", "step", "moving", "dual")]
T_4 = 2.7764451  # Student's 97.5 % quantile, 4 degrees of freedom (tables: 2.776)
T_2 = 4.3026527


def made(directory: Path, cells, seeds=range(5)) -> tuple[list, list]:
    """Every value of a run differs from all others, so that a mixed-up column or seed shows."""
    rows = [run(cell, seed) for cell in cells for seed in seeds]
    points = [
        replace(
            point,
            reward_mean=1 + 0.1 * point.iteration + 0.01 * (point.seed + 1) ** 2,
            reward_std=0.3 + 0.02 * point.seed,
            kl_position=1e-3 * (point.iteration + 1) * (point.seed + 1),
        )
        for point in curves(rows, iterations=40)  # long enough that the page would smooth them
    ]
    write(directory / "results.csv", rows)
    write(directory / "curves.csv", points)
    return rows, points


def table(path: Path) -> dict[tuple[str, str, int], tuple[float, float, float, int]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = {
        (row["cell"], row["quantity"], int(row["iteration"])): (
            float(row["mean"]),
            float(row["low"] or "nan"),
            float(row["high"] or "nan"),
            int(row["seeds"]),
        )
        for row in rows
    }
    assert len(numbers) == len(rows)
    return numbers


@pytest.fixture
def titles(monkeypatch) -> list[str]:
    """The panels' titles as they are drawn."""
    seen: list[str] = []
    monkeypatch.setattr(Axes, "set_title", lambda self, text, *a, **k: seen.append(text))
    return seen


def test_the_cells_exist_as_recipes() -> None:
    cells = {line.cell for name in ("dance_grpo", "flow_grpo", "cps", "sage_grpo") for line in lines(name)}
    assert cells == set(PAIRS) <= VARIANTS.keys()
    assert [line.cell for line in LINES] == STRATEGIES and set(STRATEGIES) <= VARIANTS.keys()


def test_reward_curves_numbers_are_means_and_intervals_by_hand(tmp_path, titles) -> None:
    made(tmp_path, PAIRS)
    paths = reward_curves(tmp_path, tmp_path)
    assert [path.name for path in paths] == ["reward_curves.csv", "reward_curves.png"]
    found = table(paths[0])
    assert {key[0] for key in found} == set(PAIRS) and len(found) == len(PAIRS) * 40
    # seeds add 0.01 x (1, 4, 9, 16, 25): mean 0.11, sum of squared deviations 374e-4
    half = T_4 * math.sqrt(374e-4 / 4) / math.sqrt(5)
    for iteration in (0, 7, 39):
        mean, low, high, seeds = found["b_cps_none", "reward_mean", iteration]
        middle = 1.11 + 0.1 * iteration
        assert seeds == 5 and (mean, low, high) == pytest.approx((middle, middle - half, middle + half), rel=2e-5)
    assert titles == ["DanceGRPO", "FlowGRPO", "SAGE", "CPS"]
    assert paths[1].read_bytes().startswith(b"\x89PNG")


def test_kl_strategies_numbers_by_hand(tmp_path) -> None:
    made(tmp_path, STRATEGIES, seeds=(0, 1, 3))
    found = table(kl_strategies(tmp_path, tmp_path)[0])
    stds = [0.3, 0.32, 0.36]
    half = T_2 * statistics.stdev(stds) / math.sqrt(3)
    mean, low, high, seeds = found["b_sage_moving", "reward_std", 11]
    assert seeds == 3 and (mean, low, high) == pytest.approx((0.326667, 0.326667 - half, 0.326667 + half), rel=2e-5)
    assert found["b_sage_dual", "kl_position", 11][0] == pytest.approx(12e-3 * (1 + 2 + 4) / 3, rel=1e-5)
    # none and step have no position reference: their zeros are no measurement
    assert {cell for cell, quantity, _ in found if quantity == "kl_position"} == {
        "b_sage_fixed",
        "b_sage_moving",
        "b_sage_dual",
    }
    assert {cell for cell, quantity, _ in found if quantity == "reward_mean"} == set(STRATEGIES)


def test_two_seeds_have_a_mean_and_no_interval_and_unfinished_runs_do_not_count(tmp_path) -> None:
    rows, _ = made(tmp_path, STRATEGIES[:1], seeds=(0, 1, 2))
    write(tmp_path / "results.csv", rows[:2])  # seed 2 did not finish
    mean, low, high, seeds = table(kl_strategies(tmp_path, tmp_path)[0])["b_sage_none", "reward_mean", 0]
    assert (mean, seeds) == (pytest.approx(1.025), 2) and math.isnan(low) and math.isnan(high)


def test_values_that_are_not_finite_are_left_out(tmp_path) -> None:
    _, points = made(tmp_path, ["b_sage_none"])
    broken = [replace(p, reward_mean=math.nan) if (p.seed, p.iteration) == (4, 3) else p for p in points]
    write(tmp_path / "curves.csv", broken)
    found = table(kl_strategies(tmp_path, tmp_path)[0])
    assert found["b_sage_none", "reward_mean", 3][::3] == (pytest.approx(1.375), 4)  # (1 + 4 + 9 + 16) / 4 = 7.5
    assert found["b_sage_none", "reward_mean", 4][3] == 5


def test_missing_cells_are_named_and_do_not_stop_the_figure(tmp_path, titles) -> None:
    made(tmp_path, ["b_flow_none", "b_sage_none", "b_sage_none_no_equalizer"])
    found = table(reward_curves(tmp_path, tmp_path)[0])
    assert {key[0] for key in found} == {"b_flow_none", "b_sage_none", "b_sage_none_no_equalizer"}
    assert titles == [
        "DanceGRPO\nnot in this study: b_dance_none, b_dance_none_no_equalizer",
        "FlowGRPO\nnot in this study: b_flow_none_no_equalizer",
        "SAGE",
        "CPS\nnot in this study: b_cps_none, b_cps_none_no_equalizer",
    ]
    titles.clear()
    kl_strategies(tmp_path, tmp_path)  # b_sage_none alone: no curve at all in the KL panel
    assert not any("different seeds" in title for title in titles)
    assert titles[0].endswith("not in this study: b_sage_fixed, b_sage_step, b_sage_moving, b_sage_dual")
    assert titles[2].endswith("not in this study: b_sage_fixed, b_sage_moving, b_sage_dual")


def test_curves_of_different_seeds_are_said_not_to_be_comparable(tmp_path, titles) -> None:
    rows, _ = made(tmp_path, ["b_sage_none", "b_sage_step"])
    write(tmp_path / "results.csv", rows[:-1])
    kl_strategies(tmp_path, tmp_path)
    assert ["different seeds" in title for title in titles] == [True, True, False]


def test_the_legend_says_how_many_seeds(tmp_path) -> None:
    from matplotlib.figure import Figure

    made(tmp_path, ["b_sage_none"])
    study, axes = study_curves.load(tmp_path, STRATEGIES), Figure().subplots()
    study_curves.panel(axes, study, "t", LINES[:2], "reward_mean")
    assert axes.get_legend_handles_labels()[1] == ["none (5 seeds)"]
    assert axes.get_title() == "t\nnot in this study: b_sage_fixed" and len(axes.lines) == 1
    band = np.asarray(axes.collections[0].get_paths()[0].vertices)
    assert band[:, 1].min() == pytest.approx(1.11 - 0.12006, abs=1e-4)  # iteration 0, T_4 as above


@pytest.mark.parametrize(("name", "cells"), [("reward_curves", PAIRS), ("kl_strategies", STRATEGIES)])
def test_the_documented_numbers_are_those_of_every_cell(name, cells) -> None:
    found = table(Path(__file__).parents[2] / "docs" / "figures" / f"{name}.csv")
    assert {cell for cell, _, _ in found} == set(cells)
    for (cell, quantity, iteration), (mean, low, high, seeds) in found.items():
        assert (cell, quantity, 0) in found and iteration >= 0 and math.isfinite(mean) and seeds >= 1
        assert low <= mean <= high if seeds >= 3 else math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize("name", ["reward_curves", "kl_strategies"])
def test_no_study_is_one_line_with_its_cure(name, tmp_path) -> None:
    def refused(directory: Path) -> str:
        with pytest.raises(UserError) as error:
            command.main([name, "--out", str(tmp_path / "out"), "--study", str(directory)])
        assert "\n" not in str(error.value) and not list((tmp_path / "out").iterdir())
        return str(error.value)

    missing = tmp_path / "nowhere"
    assert refused(missing).startswith(f"--study {missing}: has no results.csv; run a study (`megatron-sage study")
    made(tmp_path, ["a_sage_none"])
    cells = ",".join(sorted(PAIRS, key=lambda cell: ("dance", "flow", "sage", "cps").index(cell.split("_")[1])))
    cells = cells if name == "reward_curves" else ",".join(STRATEGIES)
    message = refused(tmp_path)
    assert message.startswith(f"--study {tmp_path}: has no finished run of any cell of this figure; run them with ")
    assert message.endswith(f"`megatron-sage study --out {tmp_path} --cells {cells}`")
    (tmp_path / "curves.csv").unlink()
    assert "has no curves.csv; run a study" in refused(tmp_path)
