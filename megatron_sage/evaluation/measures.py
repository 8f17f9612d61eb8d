"""What the videos' scores say about checkpoints: means, paired differences, win rates, with intervals over prompts.

Samples of one prompt are not independent, prompts are: every interval is over the prompts' means. Arrays of scores are
[prompts, samples]; NaN is a video whose score is not finite, and is left out, never replaced.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from megatron_sage.study.statistics import ALPHA, Interval, t_interval

Key = tuple[int, int]  # number of the prompt, sample
PAPER = ("VQ", "MQ", "TA")
ORDER = ("Overall", *PAPER, "CLIPScore", "PickScore")  # the paper's columns
OVERALL, REWARD = "Overall", "reward"


@dataclass(frozen=True)
class Rate:
    """A share of wins with its interval, from n prompts (or votes); NaN without any."""

    rate: float
    low: float
    high: float
    n: int


def measures(dimensions: Sequence[str], weights: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Column -> its weights over the rewards' dimensions, in the order of the paper's table.

    Overall is the paper's VQ + MQ + TA where the rewards have all three. `reward`, the weighted sum that training
    maximises, has a column of its own where it is another sum; without the three it is what Overall stands for.
    """
    trained = {name: float(weight) for name, weight in weights.items()}
    paper = dict.fromkeys(PAPER, 1.0)
    has_paper = set(PAPER) <= set(dimensions)
    found = {OVERALL: paper if has_paper else trained} | {name: {name: 1.0} for name in dimensions}
    if has_paper and {k: w for k, w in trained.items() if w} != paper:
        found[REWARD] = trained
    first = [name for name in ORDER if name in found]
    return {name: found[name] for name in [*first, *(name for name in found if name not in first)]}


def score_arrays(
    rows: Mapping[Key, Mapping[str, Any]], columns: Mapping[str, Mapping[str, float]], prompts: int, samples: int
) -> dict[str, np.ndarray]:
    """Column -> float64 [prompts, samples]. NaN in one term is NaN in the sum, also at weight 0."""
    found = {name: np.full((prompts, samples), math.nan) for name in columns}
    for (prompt, sample), row in rows.items():
        for name, weights in columns.items():
            terms = [weight * row["scores"].get(dimension, math.nan) for dimension, weight in weights.items()]
            value = math.fsum(terms) if all(map(math.isfinite, terms)) else math.nan
            found[name][prompt, sample] = value
    return found


def prompt_means(values: np.ndarray) -> np.ndarray:
    """Means over each prompt's finite samples; prompts without any are left out."""
    finite = np.isfinite(values)
    kept = finite.any(axis=1)
    return np.where(finite, values, 0.0)[kept].sum(axis=1) / finite[kept].sum(axis=1)


def mean(values: np.ndarray) -> Interval:
    """Mean over prompts with its 95 % t-interval."""
    return t_interval(prompt_means(values).tolist())


def difference(values: np.ndarray, base: np.ndarray) -> Interval:
    """Mean of values - base, video by video from the same noise, with the 95 % t-interval over prompts."""
    return t_interval(prompt_means(values - base).tolist())


def win_rate(values: np.ndarray, base: np.ndarray) -> Rate:
    """How often a video is better than the other from the same noise; a tie is half a win. See `wilson`."""
    change = values - base
    won = np.where(np.isfinite(change), 0.5 + 0.5 * np.sign(change), math.nan)
    return wilson(prompt_means(won))


def wilson(shares: Sequence[float] | np.ndarray, alpha: float = ALPHA) -> Rate:
    """Wilson's score interval of the mean of shares in [0, 1], one for each prompt.

    With one sample and no tie the shares are 0 or 1, and this is the binomial interval. A share in [0, 1] of mean p
    never varies more than p(1 - p), so with samples that depend on each other, and with ties, it is too wide rather
    than too narrow; it needs no resampling and does not shrink to nothing where one side wins everywhere.
    """
    n = len(shares)
    if n == 0:
        return Rate(math.nan, math.nan, math.nan, 0)
    p, z = float(np.mean(shares)), float(stats.norm.ppf(1 - alpha / 2))
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return Rate(p, max(0.0, low), min(1.0, high), n)
