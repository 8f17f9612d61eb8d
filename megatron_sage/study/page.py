"""study.html and the same tables as Markdown, from the results.csv and curves.csv of a study's directory."""

import os
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from megatron_sage.reporting.style import CSS
from megatron_sage.study import tables
from megatron_sage.study.charts import curve_sections, forest, smoothing_window
from megatron_sage.study.claims import Judgement, judge
from megatron_sage.study.statistics import MIN_SEEDS, CurveRow, RunRow, read_curves, read_results

FILE = "study.html"
WORLD = (
    "the tiny world: a model of 7.5 M parameters that makes short clips of 32x48 pixels of one moving coloured form, "
    "scored by rule (VQ, MQ and TA in [0, 1])"
)
COLOURS = {"supported": "up-text", "contradicted": "down-text", "undecided": ""}
MORE_CSS = """
.scroll { overflow-x: auto; } .scroll td { white-space: nowrap; } .scroll td .soft { white-space: normal; }
.scroll td:first-child { min-width: 17em; white-space: normal; } .scroll td:last-child { min-width: 9em; }
.verdict { font-weight: 600; } tr.group th { text-align: left; padding-top: 18px; font-weight: 600; }
.counts { font-size: 1.5rem; font-weight: 650; margin: 0 0 8px; } .counts .soft { font-weight: 400; }
.after { margin-top: 14px; }
"""


def write_page(directory: str | Path, world: str = WORLD) -> Path:
    """Write DIRECTORY/study.html from its results.csv and, where there is one, curves.csv; return its path.

    The page loads nothing and runs no script. `world` says in the headline what was trained. Raises UserError, in one
    line, for a missing or malformed file.
    """
    rows, judged = _load(Path(directory))
    curves_file = Path(directory) / "curves.csv"
    curves = read_curves(curves_file) if curves_file.is_file() else []
    path = Path(directory) / FILE
    temporary = path.with_name(f".{FILE}.{os.getpid()}.tmp")
    try:
        temporary.write_text(_page(rows, curves, judged, world), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_markdown(directory: str | Path, world: str = WORLD) -> str:
    """The page's text and tables as Markdown, without the charts. Raises UserError as write_page does."""
    rows, judged = _load(Path(directory))
    parts = [
        _markdown_text(tables.summary(rows, world)),
        "\n".join(f"- {_markdown_text(note)}" for note in tables.notes(rows)),
        _markdown_text(tables.TERMS),
        _markdown_text(tables.reading(judged)),
        "## Claims",
        _markdown_table(tables.claim_table(judged)),
        _markdown_text(tables.CLAIM_NOTE),
        "## Cells",
        _markdown_table(tables.cell_table(rows)),
        _markdown_text(tables.CELL_NOTE),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _load(directory: Path) -> tuple[list[RunRow], list[Judgement]]:
    rows = read_results(directory / "results.csv")
    return rows, judge(rows)


def _page(rows: list[RunRow], curves: list[CurveRow], judged: list[Judgement], world: str) -> str:
    title = f"What {tables.plural(len(rows), 'small run')} can say about the method"
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in tables.notes(rows))
    counted = " · ".join(
        f'<span class="{COLOURS[word]}">{count}</span> <span class="soft">{word}</span>'
        for word, count in tables.counts(judged).items()
    )
    forests = "".join(
        f'<div class="card chart"><h3>Change of {measure}</h3>{forest(rows, measure)}</div>'
        for measure in ("reward", "overall")
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Study · megatron_sage</title><style>{CSS}{MORE_CSS}</style></head>
<body><main>
<header><p class="run">megatron_sage · study</p><h1>{title}</h1>
<p class="lead">{escape(tables.summary(rows, world))}</p>{notes}</header>
<section class="card"><p class="soft">Verdicts on {len(judged)} claims of the paper</p>
<p class="counts">{counted}</p><p class="lead">{escape(tables.reading(judged))}</p>
<p class="note lead">{escape(tables.TERMS)}</p></section>
<h2>Claims</h2><div class="card">{_html_table(tables.claim_table(judged))}
<p class="note after">{escape(tables.CLAIM_NOTE)}</p></div>
<h2>Cells</h2><div class="card">{_html_table(tables.cell_table(rows))}
<p class="note after">{escape(tables.CELL_NOTE)}</p></div>
<div class="grid after">{forests}</div>
<p class="note after">Dot: mean over seeds; line: 95 % t-interval, cut at the edge where two runs give a very wide one.
</p>
{_curves(rows, curves)}
<footer class="soft">Written {written} from results.csv and curves.csv of this directory.</footer>
</main></body></html>
"""


def _curves(rows: list[RunRow], curves: list[CurveRow]) -> str:
    """The charts over the iterations and how to read them; nothing without curves."""
    charts = curve_sections(rows, curves)
    if not charts:
        return ""
    window = max(smoothing_window(row.iterations) for row in rows)
    smoothed = "Nothing is smoothed."
    if window > 1:
        smoothed = "Reward curves are smoothed within each run by a centred running mean over a fifteenth of it."
    return f"""{charts}
<p class="note after">Curves are means over the seeds of finished runs, bands their 95 % t-intervals at each iteration
(none below {MIN_SEEDS} seeds). {smoothed} Iteration 0 is the model as it was given. Axes differ from chart to chart.
Prompts and noise change from iteration to iteration, alike in all cells of a seed, and every curve follows them. Bands
hold the differences between seeds too, so those that overlap decide nothing: the tables are the paired measurement, on
held-out prompts.</p>"""


def _html_table(table: tables.Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    body = []
    for row in table.rows:
        if len(row) == 1:
            body.append(f'<tr class="group"><th colspan="{len(table.header)}">{escape(row[0])}</th></tr>')
        else:
            body.append(f"<tr>{''.join(f'<td>{_html_cell(text)}</td>' for text in row)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _html_cell(text: str) -> str:
    first, _, remark = text.partition("\n")
    shown = escape(first)
    if first in COLOURS:
        shown = f'<span class="verdict {COLOURS[first]}">{shown}</span>'
    return shown + (f'<br><span class="soft">{escape(remark)}</span>' if remark else "")


def _markdown_table(table: tables.Table) -> str:
    blank = ("",) * (len(table.header) - 1)
    lines = [_markdown_row(table.header), "|---" + "|---:" * len(blank) + "|"]
    for row in table.rows:
        lines.append(_markdown_row((f"**{row[0]}**", *blank) if len(row) == 1 else row))
    return "\n".join(lines)


def _markdown_row(texts: tuple[str, ...]) -> str:
    return "| " + " | ".join(_markdown_text(text) for text in texts) + " |"


def _markdown_text(text: str) -> str:
    """Safe in a paragraph and in a table's cell: no border, no HTML but <br>, no emphasis by underscores."""
    return escape(text, quote=False).replace("|", "\\|").replace("_", "\\_").replace("\n", "<br>")
