"""The statistics of a study: runs that share their seeds, so cells are compared by paired differences.

With five seeds the exact two-sided permutation p-value cannot be below 2/32 = 0.0625, whatever the effect. A verdict
therefore rests on the t-interval of the paired differences at its Holm-adjusted level; the permutation p-value is
shown beside it and decides nothing.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy import stats

from megatron_sage.errors import UserError

MEASURES = ("reward", "VQ", "MQ", "TA", "overall")  # each has a base_ and a final_ column
ALPHA = 0.05
MIN_SEEDS = 3  # with two, t = 12.7: an interval exists but says nothing
MAX_FLIPS = 20  # 2^20 sums; beyond, the exact p-value is not computed


@dataclass(frozen=True)
class RunRow:
    """One finished run: a line of results.csv. base_ and final_ are held-out means on the same noise."""

    cell: str
    sampler: str
    kl: str
    setting: str
    equalizer: bool
    schedule: str
    seed: int
    iterations: int
    videos: int
    base_reward: float  # the trained weighted sum
    final_reward: float
    change: float
    base_VQ: float
    final_VQ: float
    base_MQ: float
    final_MQ: float
    base_TA: float
    final_TA: float
    base_overall: float  # VQ + MQ + TA
    final_overall: float
    kl_position: float
    ratio_max: float
    clip_fraction: float
    lambda_: float
    seconds: float

    def gain(self, measure: str) -> float:
        """final - base of one of MEASURES; NaN where either is not finite."""
        value = float(getattr(self, f"final_{measure}") - getattr(self, f"base_{measure}"))
        return value if math.isfinite(value) else math.nan


@dataclass(frozen=True)
class CurveRow:
    """One iteration of one run: a line of curves.csv."""

    cell: str
    seed: int
    iteration: int
    reward_mean: float
    reward_std: float
    VQ: float
    MQ: float
    TA: float
    kl_position: float
    kl_velocity: float
    lambda_: float
    grad_norm: float
    clip_fraction: float


Row = TypeVar("Row", RunRow, CurveRow)


@dataclass(frozen=True)
class Interval:
    """mean ± half at some confidence level, from n values. half is NaN below two values, mean below one."""

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


@dataclass(frozen=True)
class Comparison:
    """Cell `better` minus cell `worse`, one difference for each common seed with finite results in both."""

    better: str
    worse: str
    measure: str
    differences: tuple[float, ...]

    @property
    def enough(self) -> bool:
        """Whether there are seeds enough for a verdict."""
        return len(self.differences) >= MIN_SEEDS

    def interval(self, alpha: float = ALPHA) -> Interval:
        """t-interval of the mean difference at confidence 1 - alpha."""
        return t_interval(self.differences, alpha)

    @property
    def p_t(self) -> float:
        """Two-sided p-value of the paired t-test; NaN with too few seeds."""
        return t_test(self.differences) if self.enough else math.nan

    @property
    def p_flip(self) -> float:
        """Two-sided exact permutation p-value; NaN with no seeds or more than MAX_FLIPS."""
        return sign_flip_test(self.differences)


def read_results(path: str | Path) -> list[RunRow]:
    """The finished runs. Raises UserError, in one line, naming the line that is malformed."""
    rows = _read(Path(path), RunRow)
    first: dict[str, RunRow] = {}
    seen: dict[tuple[str, int], int] = {}
    for line, row in rows:
        earlier = seen.setdefault((row.cell, row.seed), line)
        if earlier != line:
            raise UserError(
                f"{path}, line {line}: cell {row.cell!r}, seed {row.seed} is in line {earlier} already; keep one"
            )
        other = first.setdefault(row.cell, row)
        for name in ("sampler", "kl", "setting", "equalizer", "schedule"):
            mine, theirs = getattr(row, name), getattr(other, name)
            if mine != theirs:
                raise UserError(
                    f"{path}, line {line}: cell {row.cell!r} has {name} {mine!r} here and {theirs!r} with seed "
                    f"{other.seed}; a cell is one configuration, rename one of them"
                )
    return [row for _, row in rows]


def read_curves(path: str | Path) -> list[CurveRow]:
    """Every iteration of every run. Raises UserError, in one line, naming the line that is malformed."""
    return [row for _, row in _read(Path(path), CurveRow)]


def _read(path: Path, kind: type[Row]) -> list[tuple[int, Row]]:
    """Rows with their line numbers; columns that `kind` does not name are ignored."""
    if not path.is_file():
        raise UserError(f"{path}: not found; expected the directory of a study with at least one finished run")
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            lines = [(reader.line_num, cells) for cells in reader if cells]
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not CSV ({error}); delete the line") from error
    columns = {field.name.rstrip("_"): field for field in fields(kind)}
    missing = [name for name in columns if name not in header]
    if missing:
        raise UserError(f"{path}, line 1: no column {', '.join(missing)}; write the file anew with `study`")
    if not lines:
        raise UserError(f"{path}, line 1: no runs below the header; finish at least one run of the study")
    rows = []
    for line, cells in lines:
        if len(cells) != len(header):
            raise UserError(
                f"{path}, line {line}: {len(cells)} values where the header names {len(header)}; delete the line and "
                "run the study again to repeat that run"
            )
        texts = dict(zip(header, cells, strict=True))
        where = f"{path}, line {line}"
        rows.append((line, kind(**{c.name: _parse(texts[n], c.type, f"{where}, {n}") for n, c in columns.items()})))
    return rows


def _parse(text: str, kind: Any, where: str) -> Any:
    text = text.strip()
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise UserError(f"{where}: {text[:40]!r} is neither True nor False; correct it")
        return text.lower() in ("true", "1")
    if kind is str:
        if not text:
            raise UserError(f"{where}: is empty; give it a name")
        return text
    try:
        return int(text) if kind is int else float(text or "nan")
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise UserError(f"{where}: {text[:40]!r} is not {expected}; correct it") from None


def t_interval(values: Sequence[float], alpha: float = ALPHA) -> Interval:
    """mean ± t_{n-1, 1-alpha/2} · std/√n of finite values, std with ddof = 1."""
    n = len(values)
    if n < 2:
        return Interval(float(values[0]) if n else math.nan, math.nan, n)
    array = np.asarray(values, np.float64)
    half = stats.t.ppf(1 - alpha / 2, n - 1) * array.std(ddof=1) / math.sqrt(n)
    return Interval(float(array.mean()), float(half), n)


def t_test(differences: Sequence[float]) -> float:
    """Two-sided p-value of mean = 0, at least two differences. Equal differences: 1 if they are zero, else 0."""
    array = np.asarray(differences, np.float64)
    error = array.std(ddof=1) / math.sqrt(len(array))
    if error == 0:
        return 1.0 if array.mean() == 0 else 0.0
    return float(2 * stats.t.sf(abs(array.mean()) / error, len(array) - 1))


def sign_flip_test(differences: Sequence[float]) -> float:
    """Share of all 2^n sign patterns whose |sum| is at least the observed one: exact if signs are exchangeable."""
    if not 1 <= len(differences) <= MAX_FLIPS:
        return math.nan
    sums = np.zeros(1)
    for value in differences:
        sums = np.concatenate([sums + value, sums - value])
    # Sums that are equal on paper differ by rounding; they must count as equal.
    slack = 1e-12 * sum(abs(value) for value in differences)
    return float(np.mean(np.abs(sums) >= abs(sum(differences)) - slack))


def cell_interval(rows: Sequence[RunRow], cell: str, measure: str) -> Interval:
    """95 % t-interval of a cell's change over its seeds; runs whose change is not finite are left out."""
    gains = [row.gain(measure) for row in rows if row.cell == cell]
    return t_interval([gain for gain in gains if math.isfinite(gain)])


def compare(rows: Sequence[RunRow], better: str, worse: str, measure: str) -> Comparison:
    """The paired comparison of two cells; seeds that either lacks, or where either is not finite, are left out."""
    ours, theirs = ({row.seed: row.gain(measure) for row in rows if row.cell == cell} for cell in (better, worse))
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return Comparison(better, worse, measure, tuple(value for value in differences if math.isfinite(value)))


def holm(p_values: Sequence[float], alpha: float = ALPHA) -> list[tuple[float, float]]:
    """Holm's step-down over a family: for each p-value (adjusted p, level of its interval).

    The k-th smallest of m (k from 0) is tested at alpha/(m - k), and testing stops at the first failure: all later
    ones keep that failure's level. So an interval at 1 - level excludes zero exactly if the adjusted p < alpha. NaN
    (not testable) stays NaN and does not count in m.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    m = len(order)
    adjusted = list(accumulate((min(1.0, (m - k) * p) for k, (p, _) in enumerate(order)), max))
    found, level = [(math.nan, alpha)] * len(p_values), alpha
    for k, ((_, place), p_adjusted) in enumerate(zip(order, adjusted, strict=True)):
        if k == 0 or adjusted[k - 1] < alpha:
            level = alpha / (m - k)
        found[place] = (p_adjusted, level)
    return found


def verdict(comparison: Comparison, alpha: float = ALPHA) -> str:
    """'supported', 'contradicted' or 'undecided' that `better` is better.

    The t-interval at confidence 1 - alpha (Holm's level of this comparison) must lie wholly on one side of zero. Below
    MIN_SEEDS common seeds: undecided. The permutation p-value is not used: it cannot be small with few seeds.
    """
    interval = comparison.interval(alpha)
    if comparison.enough and interval.low > 0:
        return "supported"
    if comparison.enough and interval.high < 0:
        return "contradicted"
    return "undecided"
