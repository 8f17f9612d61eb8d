"""The charts of report.html, from metrics.jsonl and the noise floor."""

import math
from html import escape
from typing import Any

from megatron_sage.reporting.figures import Series, change_bars, line_chart, number, running_mean, stacked_bars
from megatron_sage.reporting.record import RunRecord

NOT_DIMENSIONS = {"mean", "std", "nonfinite", "zero_std_groups", "dropped_groups"}
NOT_DIMENSIONS |= {"clamped_advantages", "bad_iterations"}
PHASES = ("rollout", "decode", "reward", "reference", "train")


def curves(run: RunRecord) -> str:
    """All charts of metrics.jsonl."""
    x, column = run.iterations, run.column
    window = max(3, len(x) // 10)
    reward = column("reward/mean")
    dimensions = [key for key in run.keys("reward/") if key.removeprefix("reward/") not in NOT_DIMENSIONS]
    phases = [f"seconds/{name}" for name in PHASES]
    phases += [key for key in run.keys("seconds/") if key not in phases and key != "seconds/total"]
    phases = [key for key in phases if any(math.isfinite(v) and v > 0 for v in column(key))]

    def short(key: str) -> str:
        return key.rpartition("/")[2]

    charts = [
        (
            "Training reward",
            "mean ± standard deviation of an iteration's samples; bold: running mean",
            line_chart(
                [
                    Series("reward", x, reward, 0, column("reward/std"), faint=True),
                    Series(f"running mean of {window}", x, running_mean(reward, window), 0),
                ]
            ),
        ),
        (
            "Reward by dimension",
            f"running mean of {window} iterations",
            line_chart(
                [
                    s
                    for i, key in enumerate(dimensions)
                    for s in (
                        Series(short(key), x, column(key), i % 6, faint=True),
                        Series(short(key), x, running_mean(column(key), window), i % 6),
                    )
                ]
            ),
        ),
        (
            "Loss",
            "policy loss, and with λ·KL",
            line_chart([Series("loss", x, column("loss"), 0), Series("policy", x, column("loss/policy"), 1)]),
        ),
        (
            "KL",
            "of the policy against its reference (position) and against the policy of the rollout (velocity)",
            line_chart([Series(name, x, column(f"kl/{name}"), i) for i, name in enumerate(("position", "velocity"))]),
        ),
        ("λ, weight of the KL", "", line_chart([Series("λ", x, column("lambda"), 0)])),
        ("Gradient norm", "before clipping", line_chart([Series("gradient norm", x, column("grad_norm"), 0)])),
        (
            "Probability ratio − 1",
            "of the updated to the sampling policy, over all trained samples and steps",
            line_chart(
                [
                    Series(name, x, [value - 1 for value in column(f"ratio/{name}")], i)
                    for i, name in enumerate(("mean", "min", "max"))
                ]
            ),
        ),
        (
            "Clip fraction",
            "share of (sample, step) pairs outside the clip range",
            line_chart([Series("clip fraction", x, column("clip_fraction"), 0)]),
        ),
        ("Seconds by phase", "", stacked_bars(x, [(short(key), column(key)) for key in phases])),
    ]
    watched = run.keys("watch/")
    if watched:
        bold = [Series(short(key), x, running_mean(column(key), window), i % 6) for i, key in enumerate(watched)]
        charts.insert(2, ("Watched, not trained on", f"running mean of {window} iterations", line_chart(bold)))
    if run.noise_floor:
        charts.append(_noise_floor(run.noise_floor))
    changes = _changes(run)
    if changes:
        charts.insert(1, ("Change of each held-out sample", "reward after − before", change_bars(changes)))
    cards = "".join(
        f'<div class="card chart"><h3>{escape(title)}</h3>'
        + (f'<p class="note">{escape(note)}</p>' if note else "")
        + chart
        + "</div>"
        for title, note, chart in charts
    )
    return f'<h2>Curves</h2><div class="grid">{cards}</div>'


def _changes(run: RunRecord) -> list[tuple[str, float]]:
    befores, afters = (run.evaluation.get(label, {}).get("samples", []) for label in ("before", "after"))
    if len(befores) != len(afters):
        return []
    return [
        (str(new.get("prompt", "")), _value(new.get("reward")) - _value(old.get("reward")))
        for old, new in zip(befores, afters, strict=True)
    ]


def _noise_floor(floor: dict[str, Any]) -> tuple[str, str, str]:
    """|delta logp| between rollout and training path at each step, beside the clip range."""
    steps = [int(step) for step in floor["steps"]]
    values = [_value(value) or math.nan for value in floor["steps"].values()]  # exact agreement has no logarithm: a gap
    clip = _value(floor.get("clip_range"))
    note = (
        f"largest |Δ logp| of the training path against the rollout before the first update: "
        f"{number(_value(floor.get('largest')))}; clip range {number(clip)}; {floor.get('layout', '')}, "
        f"{floor.get('dtype', '')}"
    )
    if all(math.isnan(value) for value in values):
        exact = '<p class="empty">0 at every step: rollout and training path gave the same bits</p>'
        return "Noise floor of the ratio", note, exact
    lines = [Series("|Δ logp|", steps, values, 0), Series("clip range", steps, [clip] * len(steps), 1)]
    return "Noise floor of the ratio", note, line_chart(lines, x_label="denoising step", log=True)


def _value(value: Any) -> float:
    """A number or NaN."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
