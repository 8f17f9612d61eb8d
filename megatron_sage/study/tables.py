"""The texts and tables of a study, the same in HTML and Markdown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sage.recipes import VARIANTS
from megatron_sage.reporting.figures import number
from megatron_sage.study.claims import NAMES, Judgement
from megatron_sage.study.statistics import MEASURES, MIN_SEEDS, Interval, RunRow, cell_interval

VERDICTS = ("supported", "contradicted", "undecided")
MANY = 6  # cells that a note names; more are counted
TERMS = (
    "A cell is one configuration, named SETTING_SAMPLER_KL and run once for each seed. A seed fixes the noise and the "
    "order of the prompts, alike in all cells. Setting: the reward that is trained, A = VQ + MQ + TA, "
    "B = 0.5 VQ + 0.5 MQ + TA. Sampler: how each step adds noise while the training videos are made. KL: what holds "
    "the policy back: none; fixed (the model as it was given); step (the policy that made the videos); moving (an "
    "anchor that is now and then copied from the policy); dual (moving and step together). The equalizer, which evens "
    "out the steps' gradients, is on unless the name says no_equalizer. λ is the weight of the KL."
)
CELL_NOTE = (
    "Mean change (after − before) over a cell's seeds ± half-width of its 95 % t-interval; nothing behind the mean of "
    "a single run. Measured on held-out prompts, each time from the same noise, and sampled without a sampler's noise, "
    "alike for all. reward is the trained sum of the cell's setting, so compare "
    "it within a setting only; overall = VQ + MQ + TA, in setting A the same as reward. These intervals are not "
    "corrected for their number, and they hold the differences between seeds, which all cells share: two cells whose "
    "intervals overlap may still differ, see the paired claims."
)
CLAIM_NOTE = (
    "Δ: how much more the first cell's held-out score changed than the second's, paired by seed: mean ± half-width of "
    "the 95 % t-interval. The verdict rests on the t-interval of Δ reward (Δ overall in the last claim) at its "
    "Holm-adjusted level, at least as wide as the one shown: the claims of one question are a family, the last "
    "claim's comparisons with every other cell another. Across the questions nothing is corrected: one false verdict "
    "on the whole page would be no surprise. p (flips) is the exact sign-flip permutation p-value, shown for "
    "information: with n seeds it cannot be below 2/2ⁿ (5 seeds: 0.0625). "
    "The paper's column is the difference of its Overall (VideoAlign, HunyuanVideo-1.5), one run for each cell and on "
    "another scale, so only its sign can be compared: for or against the claim (figure only: it has a picture, no "
    "number); in the last claim it is the difference to the next best."
)


@dataclass(frozen=True)
class Table:
    """Plain texts; in a cell, what follows a line break is a remark. A row of one cell is a heading over the next."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def counts(judged: Sequence[Judgement]) -> dict[str, int]:
    """How many claims have each verdict."""
    return {word: sum(one.verdict == word for one in judged) for word in VERDICTS}


def plural(count: int, noun: str) -> str:
    """'1 run', '2 runs'."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def summary(rows: Sequence[RunRow], world: str) -> str:
    """How many runs of what."""
    cells, seeds = ({getattr(row, name) for row in rows} for name in ("cell", "seed"))
    length, videos = (_span([getattr(row, name) for row in rows]) for name in ("iterations", "videos"))
    hours = sum(row.seconds for row in rows if math.isfinite(row.seconds)) / 3600
    return (
        f"Finished runs: {len(rows)}, in {plural(len(cells), 'cell')} with {plural(len(seeds), 'seed')}, each of "
        f"{length} iterations ({videos} videos); {number(hours, 3)} hours of runs in all. The world is {world}."
    )


def _span(values: Sequence[int]) -> str:
    """'12' or '6 to 12'."""
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def reading(judged: Sequence[Judgement]) -> str:
    """What may be said, from the counts alone."""
    number_of = counts(judged)
    thin = sum(not one.comparison.enough for one in judged)
    decided = [one for one in judged if one.verdict != "undecided" and math.isfinite(one.claim.paper)]
    agree = sum((one.claim.paper > 0) == (one.verdict == "supported") for one in decided)
    text = (
        f"Of {len(judged)} claims this study supports {number_of['supported']}, contradicts "
        f"{number_of['contradicted']} and leaves {number_of['undecided']} undecided"
    )
    text += f", {thin} of these for want of {MIN_SEEDS} common seeds. " if thin else ". "
    text += (
        "Undecided means that the runs fit a difference of either sign: it neither confirms nor refutes a claim, and "
        "is no evidence that two cells are equal. "
    )
    if decided:
        text += (
            f"Where a claim is decided and the paper's table has a number ({plural(len(decided), 'claim')}), the sign "
            f"agrees with the paper's in {agree}. "
        )
    return text + (
        "The verdicts hold for this small model, its reward, these settings and these seeds; they say nothing about "
        "the video quality of a large model, and a difference in sign from the paper may come from the world as well "
        "as from the method."
    )


def notes(rows: Sequence[RunRow]) -> list[str]:
    """What the reader must know about the data, one sentence each."""
    found = []
    broken = [row for row in rows if any(math.isnan(row.gain(measure)) for measure in MEASURES)]
    if broken:
        names = ", ".join(f"{row.cell} (seed {row.seed})" for row in broken)
        found.append(
            f"Runs with a result that is not finite: {len(broken)}; left out of the means and comparisons that need "
            f"it, which flatters a cell whose runs break: {names}."
        )
    seeds = {row.seed for row in rows}
    missing = {cell: len(seeds) - sum(row.cell == cell for row in rows) for cell in cell_names(rows)}
    lacking = [f"{cell} ({count})" for cell, count in missing.items() if count]
    if len(lacking) > MANY:
        found.append(
            f"{len(lacking)} of {len(missing)} cells lack some of the study's {len(seeds)} seeds: it is not finished, "
            "or runs failed. The table of cells has the number of runs of each."
        )
    elif lacking:
        found.append(f"Cells without all of the study's {len(seeds)} seeds (number missing): {', '.join(lacking)}.")
    for name in ("iterations", "videos"):
        if len({getattr(row, name) for row in rows}) > 1:
            found.append(f"Runs differ in their number of {name}: their cells are not comparable.")
    return found


def cell_names(rows: Sequence[RunRow]) -> list[str]:
    """Every cell once, sorted, so that a setting's cells and a sampler's stand together."""
    return sorted({row.cell for row in rows})


def cell_table(rows: Sequence[RunRow]) -> Table:
    """One row a cell: its configuration, number of runs, and the mean change of every measure."""
    lines = []
    for cell in cell_names(rows):
        runs = [row for row in rows if row.cell == cell]
        intervals = {measure: cell_interval(rows, cell, measure) for measure in MEASURES}
        texts = {measure: _change(interval) for measure, interval in intervals.items()}
        texts["TA"] += _fall(intervals["TA"], intervals["reward"])
        lines.append((f"{cell}\n{_configuration(runs[0])}", str(len(runs)), *texts.values()))
    return Table(("cell", "runs", *MEASURES), lines)


def _configuration(row: RunRow) -> str:
    """In words; what results.csv has no column for comes from the recipe of that name."""
    equalizer = "" if row.equalizer else ", no equalizer"
    kl = "no KL" if row.kl == "none" else f"{row.kl} KL (λ {row.schedule})"
    text = f"{sampler_name(row.sampler)}, {kl}, setting {row.setting}{equalizer}"
    meaning = VARIANTS[row.cell][0] if row.cell in VARIANTS else ""
    return f"{text}; {meaning}" if meaning.startswith("ablation") and row.equalizer else text


def sampler_name(sde_type: str) -> str:
    """'SAGE' for 'sage_grpo'; a name that is not known stays."""
    return NAMES.get(sde_type.removesuffix("_grpo"), sde_type)


def claim_table(judged: Sequence[Judgement]) -> Table:
    """One row a claim, under its question: the paper's number, ours, and the verdict."""
    header = ("claim", "paper: Overall", "Δ reward", "Δ overall", "seeds", "p (t, Holm)", "p (flips)", "verdict")
    lines: list[tuple[str, ...]] = []
    question = ""
    for one in judged:
        if one.claim.question != question:
            question = one.claim.question
            lines.append((question,))
        says = one.claim.paper_says
        paper = says if math.isnan(one.claim.paper) else f"{_fixed(one.claim.paper, 4)}\n{says}"
        lines.append(
            (
                f"{one.claim.sentence}\n{one.claim.better} − {one.comparison.worse or 'all others'}",
                paper,
                _change(one.comparison.interval()) if one.claim.worse else "–",
                _change(one.overall.interval()),
                str(len(one.comparison.differences)),
                _p(one.p_holm),
                _p(one.comparison.p_flip if one.comparison.enough else math.nan),
                f"{one.verdict}\n{one.note}" if one.note else one.verdict,
            )
        )
    return Table(header, lines)


def _fall(alignment: Interval, reward: Interval) -> str:
    """In words: the sum rises at the cost of the prompt."""
    if not (reward.mean > 0 > alignment.mean):
        return ""
    sure = "interval below 0" if alignment.high < 0 else "interval holds 0" if alignment.n > 1 else "one run"
    return f"\nfalls while the reward rises ({sure})"


def _fixed(value: float, places: int = 3) -> str:
    return f"{value:+.{places}f}".replace("-", "−") if math.isfinite(value) else "–"


def _change(interval: Interval) -> str:
    if not math.isfinite(interval.mean):
        return "–"
    return _fixed(interval.mean) + (f" ± {interval.half:.3f}" if math.isfinite(interval.half) else "")


def _p(value: float) -> str:
    return "–" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"
