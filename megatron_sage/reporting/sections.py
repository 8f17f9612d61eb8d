"""The parts of report.html. Every text that comes from a file passes through `escape`."""

import base64
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sage.errors import UserError
from megatron_sage.reporting.figures import number, signed
from megatron_sage.reporting.record import RunRecord

MEANINGS = {"VQ": "visual quality", "MQ": "motion quality", "TA": "text alignment"}


def summary(run: RunRecord) -> str:
    """One sentence: what was run."""
    get = run.setting
    steps = run.column("optimizer_steps")[-1]
    parts = [f"{len(run.metrics)} iterations"]
    if not math.isnan(steps):
        parts.append(f"{number(steps)} optimizer steps")
    for key, text in (
        ("grpo.group_size", "groups of {}"),
        ("grpo.prompts_per_iteration", "{} prompts an iteration"),
        ("sampler.sde_type", "sampler {}"),
        ("sampler.num_steps", "{} denoising steps"),
        ("sampler.guidance_scale", "guidance {}"),
        ("optimizer.lr", "learning rate {}"),
        ("parallel.tensor", "TP={}"),
        ("parallel.context", "CP={}"),
        ("parallel.pipeline", "PP={}"),
        ("precision.dtype", "{}"),
    ):
        value = get(key)
        if value is not None:
            parts.append(text.format(number(value) if isinstance(value, float) else value))
    model = get("model.pretrained")
    video = get("video", {})
    size = (
        f", clips of {video['frames']} frames {video['height']}x{video['width']} at {video.get('fps')} fps"
        if isinstance(video, dict) and {"frames", "height", "width"} <= video.keys()
        else ""
    )
    subject = f"SAGE-GRPO on {model}{size}" if model else f"SAGE-GRPO{size}"
    return f'<p class="lead">{escape(subject)}: {escape(", ".join(parts))}.</p>'


def headline(run: RunRecord) -> str:
    """The held-out reward before and after, or the training reward where nothing was held out."""
    before, after = (run.evaluation.get(label) or {} for label in ("before", "after"))
    if not (_is_number(before.get("mean")) and _is_number(after.get("mean"))):
        return _training_headline(run)
    difference = run.evaluation.get("difference") or {}
    change = _value(difference.get("mean", after["mean"] - before["mean"]))
    error = _value(difference.get("stderr"))
    sureness = f' <span class="soft">({number(abs(change) / error, 2)} standard errors)</span>' if error > 0 else ""
    old, new = (number(part["mean"], strip=False) for part in (before, after))
    prompts = len({sample.get("prompt") for sample in after.get("samples", [])})
    return f"""<section class="card headline"><div>
<p class="what">Mean reward on {prompts} held-out prompts, before → after</p>
<p class="numbers">{old}<span class="arrow">→</span>{new}</p>
<p class="change {_kind(change)}">{signed(change)} ± {number(error, 2)}{sureness}</p>
<p class="soft">The same prompts and the same initial noise, sampled by the ODE. ± is the standard error of the
paired difference.</p></div><div>{_dimension_table(run, before, after)}</div></section>"""


def _training_headline(run: RunRecord) -> str:
    rewards = [value for value in run.column("reward/mean") if math.isfinite(value)]
    if not rewards:
        return '<section class="card"><p>Neither a held-out evaluation nor a finite training reward.</p></section>'
    part = max(1, len(rewards) // 5)
    first, last = float(np.mean(rewards[:part])), float(np.mean(rewards[-part:]))
    return f"""<section class="card headline"><div><p class="what">Training reward, first → last {part} iterations</p>
<p class="numbers">{number(first)}<span class="arrow">→</span>{number(last)}</p>
<p class="change {_kind(last - first)}">{signed(last - first)}</p></div>
<div><p class="soft">This run has no held-out evaluation before and after (evaluation.json): training prompts differ
from iteration to iteration, so the numbers are not paired. Set evaluation.prompts to get them.</p></div></section>"""


def _dimension_table(run: RunRecord, before: dict[str, Any], after: dict[str, Any]) -> str:
    weights = run.setting("reward.weights", {})
    first, last = before.get("per_dimension") or {}, after.get("per_dimension") or {}
    rows = []
    for name in dict.fromkeys([*first, *last]):
        old, new = _value(first.get(name)), _value(last.get(name))
        meaning = f' <span class="soft">{MEANINGS[name]}</span>' if name in MEANINGS else ""
        weight = weights.get(name) if isinstance(weights, dict) else None
        rows.append(
            f"<tr><td>{escape(str(name))}{meaning}</td><td>{number(_value(weight), 3)}</td>"
            f"<td>{number(old, 3, strip=False)}</td><td>{number(new, 3, strip=False)}</td>"
            f'<td class="{_kind(new - old)}">{_change(new - old)}</td></tr>'
        )
    if not rows:
        return ""
    return (
        "<table><thead><tr><th>Dimension</th><th>weight</th><th>before</th><th>after</th><th>change</th></tr>"
        f"</thead><tbody>{''.join(rows)}</tbody></table>"
    )


def gallery(run: RunRecord) -> str:
    """Before and after, side by side: evaluated samples, or the files in samples/ where there are no scores."""
    samples = [run.evaluation.get(label, {}).get("samples", []) for label in ("before", "after")]
    befores, afters = ([s for s in part if s.get("file")] for part in samples)
    if not (befores or afters):
        names = sorted({path.name for path in run.directory.glob("samples/*/*.mp4")})
        befores, afters = ([{"file": f"samples/{label}/{name}"} for name in names] for label in ("before", "after"))
    cards = []
    for place in range(max(len(befores), len(afters))):
        old = befores[place] if place < len(befores) else {}
        new = afters[place] if place < len(afters) else {}
        prompt = str(new.get("prompt") or old.get("prompt") or f"sample {place}")
        cards.append(
            f'<article class="card"><p class="prompt">{escape(prompt)}</p><div class="pair">'
            f"{_clip(run, 'before', old)}{_clip(run, 'after', new)}</div></article>"
        )
    if not cards:
        return ""
    return f'<h2>Videos before and after</h2><div class="grid">{"".join(cards)}</div>'


def _clip(run: RunRecord, label: str, sample: dict[str, Any]) -> str:
    name = str(sample.get("file", ""))
    path = (run.directory / name).resolve()
    if name and not path.is_relative_to(run.directory.resolve()):
        raise UserError(f"{run.directory / 'evaluation.json'}: file {name!r} lies outside the run directory")
    if name and path.is_file():
        shown = (
            f'<video autoplay loop muted playsinline aria-label="{label}" src="data:video/mp4;base64,'
            f'{_base64(path)}"></video>'
        )
    else:
        shown = f'<div class="missing">{escape(name) + " is missing" if name else "no video"}</div>'
    scores = [
        f"{escape(key)} {number(_value(value), 3, strip=False)}"
        for key, value in sample.items()
        if key not in ("file", "prompt", "index", "reward") and _is_number(value)
    ]
    reward = f" · reward <b>{number(_value(sample.get('reward')), 3, strip=False)}</b>" if "reward" in sample else ""
    detail = "<br>" + " · ".join(scores) if scores else ""
    return f"<figure>{shown}<figcaption>{label}{reward}{detail}</figcaption></figure>"


def facts(run: RunRecord) -> str:
    """Health of the run, machine and versions."""
    health = []
    for key, name, how in (
        ("ratio/initial_deviation", "largest |ratio − 1| before an update", np.max),
        ("reward/nonfinite", "samples with a non-finite reward", np.sum),
        ("reward/zero_std_groups", "groups without a difference in reward", np.sum),
        ("reward/dropped_groups", "groups dropped", np.sum),
        ("reward/clamped_advantages", "advantages clamped", np.sum),
        ("seconds/total", "seconds an iteration (median)", np.median),
    ):
        values = [value for value in run.column(key) if math.isfinite(value)]
        if values:
            health.append((name, number(float(how(values)))))
    machine = []
    for key, value in run.environment.items():
        if isinstance(value, dict):
            machine += [(f"{name}", str(version)) for name, version in value.items()]
        elif value is not None:
            machine.append((key.replace("_", " "), str(value)))
    cards = "".join(
        f'<div class="card"><h3>{title}</h3>{_table(rows)}</div>'
        for title, rows in (("Health", health), ("Machine and versions", machine))
        if rows
    )
    config = (
        f'<details class="card" style="margin-top:16px"><summary>Configuration</summary>'
        f"<pre>{escape(run.config_text)}</pre></details>"
        if run.config_text
        else ""
    )
    return f'<h2>Run</h2><div class="grid">{cards}</div>{config}'


def _table(rows: list[tuple[str, str]]) -> str:
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<table class="facts"><tbody>{body}</tbody></table>'


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")


def _change(change: float) -> str:
    """A change in a table: signed, to a thousandth."""
    return f"{change:+.3f}".replace("-", "−") if math.isfinite(change) else "–"


def _kind(change: float) -> str:
    """Colour class of a change; none where it is too small to be shown."""
    return "" if not abs(change) >= 0.0005 else "up-text" if change > 0 else "down-text"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _value(value: Any) -> float:
    """A number or NaN, which prints as a dash."""
    return float(value) if _is_number(value) else math.nan
