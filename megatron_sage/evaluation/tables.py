"""The tables of an evaluation: results.json (all of it), results.csv (one number a line), results.md (to be read)."""

import csv
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sage.evaluation import measures, store
from megatron_sage.evaluation.measures import Rate
from megatron_sage.study.statistics import Interval

MEANINGS = {
    "Overall": "VQ + MQ + TA",
    "VQ": "visual quality",
    "MQ": "motion quality",
    "TA": "text alignment",
    "reward": "the weighted sum that training maximises",
}
NOTES = """Intervals are 95 %, over {prompts} prompts (each prompt's {samples} first averaged: samples of one prompt are
not independent). Means and differences: t-intervals; a difference is taken video by video, both made from the same
noise. Win rates: the share of videos that are better than the other checkpoint's from the same noise, a tie counting
half; Wilson's interval with the number of prompts, which ties and several samples make too wide rather than too narrow.
Nothing is corrected for the number of comparisons."""


@dataclass(frozen=True)
class Checkpoint:
    """One evaluated model and its scores, {column: [prompts, samples]}."""

    name: str
    path: str
    fingerprint: str
    scores: dict[str, np.ndarray]
    rows: dict[measures.Key, dict[str, Any]]

    @property
    def nonfinite(self) -> int:
        """Videos with a score that is not finite."""
        return int(np.any([~np.isfinite(values) for values in self.scores.values()], axis=0).sum())


@dataclass(frozen=True)
class Results:
    """Complete checkpoints of one evaluation; the first is what the others are compared with."""

    out: Path
    prompts: list[str]
    samples: int
    columns: dict[str, dict[str, float]]
    checkpoints: list[Checkpoint]
    unfinished: list[str]  # names without all of their videos: left out

    def means(self) -> dict[str, dict[str, Interval]]:
        """Checkpoint -> column -> mean."""
        return {c.name: {n: measures.mean(c.scores[n]) for n in self.columns} for c in self.checkpoints}

    def differences(self) -> dict[str, dict[str, Interval]]:
        """Checkpoint -> column -> mean of its paired difference to the first checkpoint."""
        first, *others = self.checkpoints
        return {c.name: {n: measures.difference(c.scores[n], first.scores[n]) for n in self.columns} for c in others}

    def wins(self) -> dict[tuple[str, str], dict[str, Rate]]:
        """(a, b) -> column -> how often a is better than b; b stands before a in the order of checkpoints."""
        return {
            (a.name, b.name): {n: measures.win_rate(a.scores[n], b.scores[n]) for n in self.columns}
            for b, a in itertools.combinations(self.checkpoints, 2)
        }


def load_results(out: Path, first: Sequence[str] = ()) -> Results:
    """Everything finished in an evaluation's directory; `first` are the names to begin with."""
    said = store.read_settings(out)
    prompts, settings = said["prompts"], said["settings"]
    samples = int(settings["evaluation.samples_per_prompt"])
    prefix = "reward.weights."
    weights = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    sources = {source["name"]: source for source in store.read_sources(out)}
    names = [*(name for name in first if name in sources), *(name for name in sources if name not in first)]
    rows = {name: store.read_rows(out, name) for name in names}
    whole = [name for name in names if len(rows[name]) == len(prompts) * samples]
    dimensions = list(next(iter(rows[whole[0]].values()))["scores"]) if whole else []
    columns = measures.measures(dimensions, weights)
    checkpoints = [
        Checkpoint(
            name,
            sources[name]["path"],
            sources[name]["fingerprint"],
            measures.score_arrays(rows[name], columns, len(prompts), samples),
            rows[name],
        )
        for name in whole
    ]
    return Results(out, prompts, samples, columns, checkpoints, [name for name in names if name not in whole])


def write_tables(results: Results) -> None:
    """results.json, results.csv and results.md in the evaluation's directory."""
    store.write_json(results.out / "results.json", as_json(results))
    store.write_text(results.out / "results.csv", as_csv(results))
    store.write_text(results.out / "results.md", as_markdown(results))


def as_json(results: Results) -> dict[str, Any]:
    """Numbers without rounding; what is not finite is null."""

    def plain(table: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return {row: {name: _numbers(value) for name, value in cells.items()} for row, cells in table.items()}

    return {
        "prompts": len(results.prompts),
        "samples_per_prompt": results.samples,
        "columns": results.columns,
        "checkpoints": [
            {"name": c.name, "path": c.path, "fingerprint": c.fingerprint, "nonfinite_videos": c.nonfinite}
            for c in results.checkpoints
        ],
        "unfinished": results.unfinished,
        "means": plain(results.means()),
        "differences": plain(results.differences()),
        "wins": [
            {"better": a, "worse": b, "rates": {name: _numbers(rate) for name, rate in cells.items()}}
            for (a, b), cells in results.wins().items()
        ],
    }


def _numbers(value: Interval | Rate) -> dict[str, float | int | None]:
    low, high = value.low, value.high
    middle = {"rate": value.rate} if isinstance(value, Rate) else {"mean": value.mean}
    found = middle | {"low": low, "high": high}
    return {k: v if math.isfinite(v) else None for k, v in found.items()} | {"prompts": value.n}


def as_csv(results: Results) -> str:
    """One number a line: table, checkpoint, against, column, value, low, high, prompts."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("table", "checkpoint", "against", "column", "value", "low", "high", "prompts"))
    for kind, name, against, column, value in _lines(results):
        middle = value.rate if isinstance(value, Rate) else value.mean
        writer.writerow((kind, name, against, column, *map(_number, (middle, value.low, value.high)), value.n))
    return text.getvalue()


def _lines(results: Results) -> Iterator[tuple[str, str, str, str, Interval | Rate]]:
    for name, cells in results.means().items():
        yield from (("mean", name, "", column, value) for column, value in cells.items())
    first = results.checkpoints[0].name
    for name, cells in results.differences().items():
        yield from (("difference", name, first, column, value) for column, value in cells.items())
    for (a, b), rates in results.wins().items():
        yield from (("win rate", a, b, column, rate) for column, rate in rates.items())


def _number(value: float) -> str:
    return repr(value) if math.isfinite(value) else ""


def as_markdown(results: Results) -> str:
    """The three tables as the paper lays its own out, a row a checkpoint, and how to read them."""
    parts = [f"# {summary(results)}"]
    head = ["checkpoint", *results.columns]
    parts.append(_table(head, [[n, *map(shown, cells.values())] for n, cells in results.means().items()]))
    if len(results.checkpoints) > 1:
        first = results.checkpoints[0].name
        parts.append(f"## Difference to {first}")
        rows = [[n, *(shown(v, signed=True) for v in cells.values())] for n, cells in results.differences().items()]
        parts.append(_table(head, rows))
        parts.append("## Win rates")
        wins = [[f"{a} over {b}", *map(shown_rate, cells.values())] for (a, b), cells in results.wins().items()]
        parts.append(_table(["", *results.columns], wins))
    parts += [notes(results), *remarks(results)]
    return "\n\n".join(parts) + "\n"


def summary(results: Results) -> str:
    """How much was compared, in words."""
    count, videos = len(results.checkpoints), len(results.prompts) * results.samples
    models = "1 checkpoint" if count == 1 else f"{count} checkpoints"
    return f"{models} on {len(results.prompts)} prompts, {videos} videos each"


def notes(results: Results) -> str:
    """How the numbers are to be read."""
    samples = "one video" if results.samples == 1 else f"{results.samples} videos"
    columns = "; ".join(f"{n}: {MEANINGS[n]}" for n in results.columns if n in MEANINGS and n in _named(results))
    text = NOTES.format(prompts=len(results.prompts), samples=samples).replace("\n", " ")
    return f"{text} {columns}." if columns else text


def _named(results: Results) -> set[str]:
    """Columns whose meaning can be said: Overall is the paper's sum only where its three dimensions are there."""
    known = set(results.columns)
    return known if set(measures.PAPER) <= known else known - {"Overall"}


def remarks(results: Results) -> list[str]:
    """What the reader must know about the data, one sentence each."""
    found = []
    if "VQ" not in results.columns or not set(measures.PAPER) <= set(results.columns):
        terms = " + ".join(f"{weight:g}·{name}" for name, weight in results.columns["Overall"].items())
        found.append(f"Overall is the weighted sum {terms}: the rewards have not all of VQ, MQ and TA.")
    elif measures.REWARD in results.columns:
        terms = " + ".join(f"{weight:g}·{name}" for name, weight in results.columns[measures.REWARD].items())
        found.append(f"reward = {terms}.")
    for c in results.checkpoints:
        if c.nonfinite:
            found.append(f"{c.name}: left out for a score that is not finite: {c.nonfinite} of its videos.")
    if results.unfinished:
        found.append(f"Not finished, and left out: {', '.join(results.unfinished)}.")
    return found


def shown(value: Interval, signed: bool = False) -> str:
    """'0.065 ± 0.012'."""
    if not math.isfinite(value.mean):
        return "–"
    text = f"{value.mean:{'+' if signed else ''}.4f}"
    return (text + (f" ± {value.half:.4f}" if math.isfinite(value.half) else "")).replace("-", "−")


def shown_rate(value: Rate) -> str:
    """'62 % (48 to 75)'."""
    if value.n == 0:
        return "–"
    return f"{100 * value.rate:.0f} % ({100 * value.low:.0f} to {100 * value.high:.0f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
