"""Blind pairwise rating: one static page for each rater, opaque copies of the videos, and a key that stays at home.

OUT/pages/rater_01.html      what a rater opens; rater_02.html, ... are the other raters'
OUT/pages/clips/<hash>.mp4   the videos
OUT/key.json                 which clip is whose; never hand it to a rater
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sage.config.loading import nearest
from megatron_sage.errors import UserError
from megatron_sage.evaluation import store
from megatron_sage.evaluation.pages import page

KEY, FORMAT, KEY_FORMAT, VERSION = "key.json", "megatron_sage rating", "megatron_sage rating key", 1
QUESTIONS = {  # the three of the paper's user study
    "VQ": "Which video looks better: sharpness, detail, no artefacts?",
    "MQ": "Which video moves better: smooth, plausible, stable?",
    "TA": "Which video fits the text better?",
}
ANSWERS = ("A", "same", "B")
MAX_RATERS = 999
CSS = """
main.rate { max-width: 1180px; padding-top: 16px; } main.rate h1 { font-size: 1.3rem; }
.steps { display: flex; gap: 12px; align-items: center; margin: 14px 0; }
.track { flex: 1; height: 6px; border-radius: 3px; background: var(--rule); overflow: hidden; }
.track i { display: block; height: 100%; background: var(--accent); width: 0; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; }
.two figcaption { font-size: 1.05rem; font-weight: 650; color: var(--text); text-align: center; margin: 6px 0 0; }
.two video { image-rendering: auto; max-height: 56vh; object-fit: contain; cursor: pointer; }
.text { font-size: 1.15rem; font-weight: 600; margin: 0 0 12px; overflow-wrap: anywhere; }
.question { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 6px 16px; align-items: center;
  padding: 9px 10px; border-left: 3px solid transparent; border-radius: 4px; }
.question.now { border-left-color: var(--accent); background: var(--page); } .question p { margin: 0; }
.answers { display: flex; gap: 6px; } .answers button { min-width: 6.4em; }
.answers button[aria-pressed="true"] { background: var(--accent); border-color: var(--accent); color: var(--page);
  font-weight: 600; }
.foot { display: flex; flex-wrap: wrap; gap: 10px; align-items: center; margin-top: 14px; }
.foot .grow { flex: 1; } kbd { font: .8em ui-monospace, monospace; border: 1px solid var(--rule); border-radius: 4px;
  padding: 1px 5px; }
[hidden] { display: none !important; }
@media (max-width: 760px) { .question { grid-template-columns: 1fr; } .answers button { min-width: 0; flex: 1; } }
"""


def make_rating(
    evaluation: Path, out: Path, pairs: Sequence[str], raters: int, seed: int, samples: int, limit: int | None
) -> list[str]:
    """Write the pages of `raters` raters and the key. Returns lines that say what was made.

    Each rater sees every item once, in an order of his own; in each pair one side is left as often as right (by one at
    most, and that one falls to the other side for the next rater). All follows from `seed` and the evaluation.
    Raises UserError for a pair that the evaluation does not hold, and for an `out` that is not empty.
    """
    if not 1 <= raters <= MAX_RATERS or samples < 1 or seed < 0 or (limit is not None and limit < 1):
        raise UserError(
            f"--raters {raters} --samples {samples} --seed {seed} --limit {limit}: at least 1 (seed: 0), and at most "
            f"{MAX_RATERS} raters"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists already; ratings belong to one study: choose another")
    prompts = store.read_settings(evaluation)["prompts"]
    sources = {source["name"]: source for source in store.read_sources(evaluation)}
    chosen = [_pair(text, sources, evaluation) for text in pairs]
    if len(set(map(frozenset, chosen))) < len(chosen):
        raise UserError(f"--pairs {' '.join(pairs)}: one pair is named twice; name it once")
    items, clips, skipped = _items(evaluation, chosen, prompts[:limit], samples, seed, sources)
    study = _hash("study", seed, raters, sorted(items))
    orders = {rater: sides(items, rater, seed) for rater in range(1, raters + 1)}
    _write_clips(evaluation, out / "pages" / "clips", clips)
    for rater, order in orders.items():
        store.write_text(out / "pages" / f"rater_{rater:02d}.html", _page(study, rater, order, items))
    key = {
        "format": KEY_FORMAT,
        "version": VERSION,
        "study": study,
        "evaluation": str(evaluation),
        "pairs": chosen,
        "items": {name: {k: item[k] for k in ("pair", "prompt", "sample", "text")} for name, item in items.items()},
        "raters": {str(rater): dict(order) for rater, order in orders.items()},
    }
    store.write_json(out / KEY, key)
    lines = [f"{raters} pages of {len(items)} comparisons each in {out / 'pages'} (study {study})"]
    if skipped:
        lines.append(f"{skipped} comparisons left out: a video was not finite, or not the same prompts are finished")
    return [*lines, f"{out / KEY}: which clip is whose; keep it from the raters"]


def _pair(text: str, sources: dict[str, Any], evaluation: Path) -> tuple[str, str]:
    names = text.split(",")
    if len(names) != 2 or names[0] == names[1]:
        raise UserError(f"--pairs {text}: two different names with a comma between, e.g. base,sage")
    for name in names:
        if name not in sources:
            match = nearest(name, list(sources))
            cure = f"did you mean {match}? " if match else ""
            raise UserError(f"--pairs {text}: {evaluation} has no {name}; {cure}it has {', '.join(sources)}")
    return names[0], names[1]


def _items(
    evaluation: Path,
    pairs: Sequence[tuple[str, str]],
    prompts: Sequence[str],
    samples: int,
    seed: int,
    sources: dict[str, Any],
) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    """Opaque name -> item; opaque name of a clip -> video of the evaluation; number of items that cannot be shown."""
    rows = {name: store.read_rows(evaluation, name) for pair in pairs for name in pair}
    available = max((sample for found in rows.values() for _, sample in found), default=-1) + 1
    if samples > available:
        raise UserError(f"--samples {samples}: {evaluation} has {available} of each prompt")
    items: dict[str, dict[str, Any]] = {}
    clips: dict[str, str] = {}
    skipped = 0
    for pair in pairs:
        for prompt, text in enumerate(prompts):
            for sample in range(samples):
                videos = [rows[name].get((prompt, sample), {}).get("video") for name in pair]
                if not all(videos):
                    skipped += 1
                    continue
                said = [(name, sources[name]["fingerprint"]) for name in pair]
                files = [_hash("clip", seed, one, prompt, sample, text) for one in said]
                clips |= {file: str(video) for file, video in zip(files, videos, strict=True)}
                name = _hash("item", seed, said, prompt, sample, text)
                items[name] = {"pair": list(pair), "prompt": prompt, "sample": sample, "text": text, "clips": files}
    if not items:
        raise UserError(f"{evaluation}: no finished videos of these pairs; finish the evaluation first")
    return items, clips, skipped


def sides(items: dict[str, dict[str, Any]], rater: int, seed: int) -> list[tuple[str, str]]:
    """(item, side of the pair's first checkpoint: A is left) in this rater's order; balanced within each pair."""
    rng = np.random.default_rng([seed, rater])
    by_pair: dict[tuple[str, ...], list[str]] = {}
    for name, item in items.items():
        by_pair.setdefault(tuple(item["pair"]), []).append(name)
    found = []
    for names in by_pair.values():
        left = rng.permutation((np.arange(len(names)) + rater) % 2 == 0)
        found += [(name, "A" if first else "B") for name, first in zip(names, left, strict=True)]
    return [found[place] for place in rng.permutation(len(found))]


def _hash(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _write_clips(evaluation: Path, directory: Path, clips: dict[str, str]) -> None:
    """Copies without a date: the order in which they were made would tell whose they are."""
    directory.mkdir(parents=True)
    for name, video in clips.items():
        target = directory / f"{name}.mp4"
        shutil.copyfile(evaluation / video, target)
        os.utime(target, (0, 0))


def _page(study: str, rater: int, order: Sequence[tuple[str, str]], items: dict[str, dict[str, Any]]) -> str:
    shown = []
    for name, side in order:
        first, second = (f"clips/{clip}.mp4" for clip in items[name]["clips"])
        left, right = (first, second) if side == "A" else (second, first)
        shown.append({"id": name, "text": items[name]["text"], "a": left, "b": right})
    data = {"format": FORMAT, "version": VERSION, "study": study, "rater": rater, "items": shown}
    data |= {"questions": QUESTIONS, "answers": ANSWERS}
    return page("Which video is better?", CSS, _body(rater), data, Path(__file__).with_name("rating.js"))


def _body(rater: int) -> str:
    questions = "".join(
        f'<div class="question" data-question="{key}" role="group" aria-label="{escape(text)}"><p>{escape(text)}</p>'
        '<div class="answers"><button type="button" data-answer="A">A better</button>'
        '<button type="button" data-answer="same">same</button>'
        '<button type="button" data-answer="B">B better</button></div></div>'
        for key, text in QUESTIONS.items()
    )
    videos = "".join(
        f'<figure><video id="{side.lower()}" loop muted playsinline preload="auto" aria-label="video {side}"></video>'
        f"<figcaption>{side}</figcaption></figure>"
        for side in "AB"
    )
    return f"""<main class="rate">
<header><p class="run">rater {rater}</p><h1>Which video is better?</h1></header>
<p class="note" id="warning" role="alert" hidden></p>
<div class="steps"><span id="place" aria-live="polite"></span><div class="track"><i id="done"></i></div>
<span class="soft" id="answered"></span></div>
<section id="item"><div class="card"><p class="text" id="text"></p><div class="two">
{videos}
</div></div>
<div class="card" id="questions" style="margin-top:14px">{questions}</div></section>
<section class="card" id="end" hidden><p class="text">That was the last one. Thank you.</p>
<p>Save your answers and send the file back.</p></section>
<div class="foot"><button type="button" id="back">Back</button><button type="button" id="replay">Play again</button>
<button type="button" id="next" class="main">Next</button><span class="grow"></span>
<button type="button" id="save">Save answers</button></div>
<p class="note" style="margin-top:14px">Keys: <kbd>A</kbd> A better, <kbd>S</kbd> same, <kbd>B</kbd> B better for the
marked question; <kbd>Enter</kbd> next, <kbd>←</kbd> back, <kbd>R</kbd> play again. Answers are kept in this browser
until you save them.</p></main>"""
