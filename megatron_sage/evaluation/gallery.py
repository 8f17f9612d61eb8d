"""gallery.html: every prompt's videos side by side, with their scores; the mp4 files lie beside it."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from megatron_sage.evaluation import store, tables
from megatron_sage.evaluation.pages import page
from megatron_sage.evaluation.tables import Results

FILE = "gallery.html"
CSS = """
.bar { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: 8px 12px; align-items: center;
  background: var(--page); padding: 10px 0; margin-top: 22px; border-bottom: 1px solid var(--rule); }
.bar label { display: inline-flex; gap: 6px; align-items: center; color: var(--soft); font-size: .85rem; }
.bar input { width: 13em; } .bar .count { margin-left: auto; color: var(--soft); font-size: .85rem; }
#rows { display: grid; gap: 14px; margin-top: 14px; }
.row .top { display: flex; gap: 12px; align-items: baseline; justify-content: space-between; }
.row .prompt .number { color: var(--soft); font-weight: 400; margin-right: .5em; }
.row .change { font-size: .88rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
.row .videos { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr)); }
.row video { cursor: pointer; image-rendering: auto; }
.row figcaption { display: flex; flex-wrap: wrap; gap: 0 10px; } .row figcaption b { flex-basis: 100%; }
.tables { margin-top: 22px; min-width: 0; } .tables h3 { margin: 18px 0 2px; } .tables .note { margin: 14px 0 0; }
.tables table { table-layout: fixed; } .tables th:first-child { width: 15em; }
"""


def write_gallery(results: Results) -> Path:
    """Write gallery.html into the evaluation's directory; return its path. It works from file:// and loads nothing
    but the videos beside it.
    """
    title = f"{results.out.resolve().name} · gallery · megatron_sage"
    return store.write_text(
        results.out / FILE, page(title, CSS, _body(results), data(results), Path(__file__).with_name("gallery.js"))
    )


def data(results: Results) -> dict[str, Any]:
    """What the script shows: for each prompt and sample, each checkpoint's file and scores."""
    names = list(results.columns)
    return {
        "columns": names,
        "checkpoints": [c.name for c in results.checkpoints],
        "samples": results.samples,
        "rows": [
            {
                "number": prompt,
                "sample": sample,
                "prompt": text,
                "videos": [
                    {
                        "file": c.rows[prompt, sample]["video"],
                        "scores": [_finite(c.scores[name][prompt, sample]) for name in names],
                    }
                    for c in results.checkpoints
                ],
            }
            for prompt, text in enumerate(results.prompts)
            for sample in range(results.samples)
        ],
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _body(results: Results) -> str:
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    extra = "".join(f'<p class="note">{escape(text)}</p>' for text in tables.remarks(results))
    return f"""<main class="wide">
<header><p class="run">megatron_sage · gallery</p><h1>{escape(tables.summary(results))}</h1>
<p class="lead soft">The same prompts and the same noise for every checkpoint. Click a video to play its row.</p>{extra}
</header>
<details class="card tables" open><summary>Scores</summary>{_tables(results)}
<p class="note">{escape(tables.notes(results))}</p></details>
<div class="bar" role="toolbar" aria-label="Gallery">
<button id="play" class="main" type="button">Play all</button>
<button id="restart" type="button">Restart</button>
<label>Score <select id="column"></select></label>
<label>of <select id="checkpoint"></select></label>
<label>Order <select id="order"><option value="prompt">prompts as given</option>
<option value="gain">largest gain first</option><option value="loss">largest loss first</option></select></label>
<label>Show <select id="show"><option value="all">all</option><option value="better">better</option>
<option value="worse">worse</option><option value="equal">equal</option></select></label>
<input id="search" type="search" placeholder="words of the prompt" aria-label="Words of the prompt">
<span class="count" id="count" aria-live="polite"></span></div>
<div id="rows"></div>
<footer class="soft">Written {written}. The videos are in videos/ beside this page.</footer>
</main>"""


def _tables(results: Results) -> str:
    head = ["", *results.columns]
    parts = [_table(head, [[name, *map(tables.shown, cells.values())] for name, cells in results.means().items()])]
    if len(results.checkpoints) > 1:
        rows = [
            [name, *(tables.shown(cell, signed=True) for cell in cells.values())]
            for name, cells in results.differences().items()
        ]
        parts.append(f"<h3>Difference to {escape(results.checkpoints[0].name)}</h3>{_table(head, rows)}")
        wins = [[f"{a} over {b}", *map(tables.shown_rate, cells.values())] for (a, b), cells in results.wins().items()]
        parts.append(f"<h3>Win rates</h3>{_table(head, wins)}")
    return "".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    width = 15 + 10 * (len(head) - 1)  # em: the columns of the three tables stand below each other
    table = f'<table style="min-width:{width}em"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'
