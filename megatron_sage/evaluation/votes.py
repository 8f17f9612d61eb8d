"""What raters said: answer files checked against the key, win rates with intervals over prompts and raters."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from megatron_sage.errors import UserError
from megatron_sage.evaluation.measures import Rate, wilson
from megatron_sage.evaluation.rating import ANSWERS, FORMAT, KEY_FORMAT, QUESTIONS, VERSION
from megatron_sage.study.statistics import ALPHA


@dataclass(frozen=True)
class Vote:
    """One answer: how much the pair's second checkpoint wins over the first (1, 0.5, 0)."""

    prompt: int
    rater: int
    value: float


@dataclass(frozen=True)
class Ratings:
    """All answers, {(pair, question): votes}, and what is to be known about the files, one sentence each."""

    votes: dict[tuple[tuple[str, str], str], list[Vote]]
    remarks: list[str]


def read_ratings(files: Sequence[Path], key_file: Path) -> Ratings:
    """Raises UserError, in one line that names the file, for one of another study, broken, or of a rater whose answers
    are there already. Missing answers are said and do not count.
    """
    key = _read(key_file, KEY_FORMAT)
    votes: dict[tuple[tuple[str, str], str], list[Vote]] = defaultdict(list)
    seen: dict[str, Path] = {}
    remarks = []
    for file in files:
        answers = _checked(file, key)
        rater = str(answers["rater"])
        if rater in seen:
            raise UserError(f"{file}: of rater {rater}, whose answers are in {seen[rater]}; keep one of the two")
        seen[rater] = file
        given = 0
        for name, side in key["raters"][rater].items():
            item = key["items"][name]
            for question, answer in answers["answers"].get(name, {}).items():
                value = 0.5 if answer == "same" else float(answer != side)  # `side` is the first checkpoint's
                votes[tuple(item["pair"]), question].append(Vote(item["prompt"], int(rater), value))
                given += 1
        wanted = len(key["items"]) * len(QUESTIONS)
        if given < wanted:
            remarks.append(f"{file}: {wanted - given} of {wanted} answers are missing; the others count.")
    absent = [rater for rater in key["raters"] if rater not in seen]
    if absent:
        remarks.append(f"No file of {len(absent)} of {len(key['raters'])} raters: {', '.join(absent)}.")
    return Ratings(dict(votes), remarks)


def _read(file: Path, expected: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); ask for the file again") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != expected:
        what = "the key.json of `rate make`" if expected == KEY_FORMAT else "a file saved by a rating page"
        raise UserError(f"{file}: format {found!r}: is not {what}")
    if content.get("version") != VERSION:
        raise UserError(f"{file}: version {content.get('version')}, this program reads {VERSION}")
    return content


def _checked(file: Path, key: dict[str, Any]) -> dict[str, Any]:
    content = _read(file, FORMAT)
    if content.get("study") != key["study"]:
        raise UserError(f"{file}: of study {content.get('study')}, the key is of {key['study']}; leave the file out")
    if str(content.get("rater")) not in key["raters"]:
        raise UserError(f"{file}: rater {content.get('rater')} is not of this study, which has {len(key['raters'])}")
    answers = content.get("answers")
    if not isinstance(answers, dict):
        raise UserError(f"{file}: no answers in it; ask for the file again")
    for name, given in answers.items():
        if name not in key["items"]:
            raise UserError(f"{file}: comparison {name!r} is not of this study; ask for the file again")
        if not isinstance(given, dict) or any(q not in QUESTIONS or a not in ANSWERS for q, a in given.items()):
            raise UserError(
                f"{file}: comparison {name}: {str(given)[:60]}: expected {', '.join(QUESTIONS)} with one of "
                f"{', '.join(ANSWERS)}; ask for the file again"
            )
    return content


def clustered(votes: Sequence[Vote], alpha: float = ALPHA) -> Rate:
    """Win rate of the second checkpoint, a tie half, with an interval that holds for other prompts and other raters.

    Answers about one prompt resemble each other, and so do those of one rater. With several raters the half-width is
    sqrt((t·s_prompts)^2 + (t·s_raters)^2), with the standard errors clustered by prompts and by raters and Student's t
    of as many clusters less one: what varies with neither is counted twice, so the interval is too wide rather than
    too narrow, and two raters who disagree make it very wide. With one rater, or where all answers are the same, it is
    Wilson's over the prompts, and says nothing about other raters.
    """
    if not votes:
        return Rate(math.nan, math.nan, math.nan, 0)
    values = np.array([vote.value for vote in votes])
    rate, half = float(values.mean()), 0.0
    prompts, raters = ([getattr(vote, name) for vote in votes] for name in ("prompt", "rater"))
    for clusters in (prompts, raters):
        count = len(set(clusters))
        if count > 1:
            sums = [sum(values[k] - rate for k, c in enumerate(clusters) if c == one) for one in set(clusters)]
            error = math.sqrt(count / (count - 1) * math.fsum(s * s for s in sums)) / len(values)
            half = math.hypot(half, float(stats.t.ppf(1 - alpha / 2, count - 1)) * error)
    if len(set(raters)) == 1 or len(set(prompts)) == 1 or half == 0:
        shares = [float(np.mean([v.value for v in votes if v.prompt == prompt])) for prompt in sorted(set(prompts))]
        found = wilson(shares, alpha)
        return Rate(rate, min(found.low, rate), max(found.high, rate), len(values))
    return Rate(rate, max(0.0, rate - half), min(1.0, rate + half), len(values))


def table(ratings: Ratings) -> list[dict[str, Any]]:
    """A row for each pair and question: wins, ties and losses of the pair's second checkpoint, and its win rate."""
    rows, order = [], list(QUESTIONS)
    for (pair, question), votes in sorted(ratings.votes.items(), key=lambda e: (e[0][0], order.index(e[0][1]))):
        rate = clustered(votes)
        count = {value: sum(vote.value == value for vote in votes) for value in (1.0, 0.5, 0.0)}
        rows.append(
            {
                "pair": f"{pair[1]} over {pair[0]}",
                "question": question,
                "better": count[1.0],
                "same": count[0.5],
                "worse": count[0.0],
                "rate": rate.rate,
                "low": rate.low,
                "high": rate.high,
                "prompts": len({vote.prompt for vote in votes}),
                "raters": len({vote.rater for vote in votes}),
            }
        )
    return rows
