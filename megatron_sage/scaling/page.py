"""scaling.html and scaling.png: throughput, efficiency and phases over the number of devices."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from megatron_sage.reporting.style import CSS
from megatron_sage.scaling.table import MEASURED, PHASES, PREDICTED, Row, flat

# fmt: off
SHOWN = ("mode", "gpus", "tensor", "context", "pipeline", "data", "status", "videos", "seconds", "videos_per_hour",
         "tokens_per_second", "mfu", "memory_gb", "efficiency", "predicted_seconds")
TITLES = {"tensor": "TP", "context": "CP", "pipeline": "PP", "data": "DP", "videos_per_hour": "videos/h", "mfu": "MFU",
          "tokens_per_second": "tokens/s", "memory_gb": "GB", "predicted_seconds": "planner s", "seconds": "s/it"}
# fmt: on


def figure(rows: Sequence[Row]) -> bytes:
    """PNG of three charts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(canvas)
    speed, efficiency, phases = canvas.subplots(1, 3)
    _throughput(speed, rows)
    _efficiency(efficiency, rows)
    _phases(phases, [row for row in rows if row.status == MEASURED] or [row for row in rows if row.status == PREDICTED])
    out = io.BytesIO()
    canvas.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _series(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """(mode, status) -> the fastest row of each number of devices."""
    best: dict[tuple[str, str, int], Row] = {}
    for row in rows:
        if row.status not in (MEASURED, PREDICTED) or not row.numbers:
            continue
        modes = ("strong", "weak") if row.cell.data == 1 else (row.cell.mode,)
        for mode in modes:
            key = mode, row.status, row.cell.gpus
            if key not in best or row.numbers["videos_per_hour"] > best[key].numbers["videos_per_hour"]:
                best[key] = row
    found: dict[tuple[str, str], list[Row]] = {}
    for (mode, status, _), row in sorted(best.items(), key=lambda item: item[0]):
        found.setdefault((mode, status), []).append(row)
    return found


def _throughput(axes: Any, rows: Sequence[Row]) -> None:
    for number, ((mode, status), line) in enumerate(_series(rows).items()):
        gpus = [row.cell.gpus for row in line]
        rates = [row.numbers["videos_per_hour"] for row in line]
        style = "o-" if status == MEASURED else "s--"
        axes.plot(gpus, rates, style, color=f"C{number}", label=f"{mode}, {status}")
        axes.plot(gpus, [rates[0] * count / gpus[0] for count in gpus], ":", color=f"C{number}", alpha=0.5)
    _finish(axes, "videos an hour (dotted: ideal)", "devices")
    if axes.lines:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)


def _efficiency(axes: Any, rows: Sequence[Row]) -> None:
    for (mode, status), line in _series(rows).items():
        base = line[0].numbers["videos_per_hour"] / line[0].cell.gpus
        values = [row.numbers["videos_per_hour"] / row.cell.gpus / base for row in line]
        axes.plot(
            [row.cell.gpus for row in line], values, "o-" if status == MEASURED else "s--", label=f"{mode}, {status}"
        )
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_ylim(bottom=0, top=max(1.1, axes.get_ylim()[1]))
    if len(axes.lines) > 1:
        axes.set_xscale("log", base=2)
    _finish(axes, "efficiency of the fastest layout", "devices")


def _phases(axes: Any, rows: Sequence[Row]) -> None:
    names = [
        f"{r.cell.gpus}: {r.cell.layout.tensor}/{r.cell.layout.context}/{r.cell.layout.pipeline} {r.cell.mode[0]}"
        for r in rows
    ]
    left = [0.0] * len(rows)
    for phase in PHASES:
        values = [row.numbers.get("phases", {}).get(phase, 0.0) for row in rows]
        axes.barh(names, values, left=left, label=phase)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    _finish(axes, "seconds of an iteration by phase", "devices: TP/CP/PP, strong or weak", swap=True)


def _finish(axes: Any, title: str, label: str, swap: bool = False) -> None:
    axes.set_title(title, fontsize=10)
    (axes.set_ylabel if swap else axes.set_xlabel)(label, fontsize=9)
    axes.tick_params(labelsize=8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def page(rows: Sequence[Row], title: str, machine: str, png: bytes) -> str:
    """The whole page; it loads nothing."""
    picture = base64.b64encode(png).decode()
    head = "".join(f"<th>{escape(TITLES.get(key, key))}</th>" for key in SHOWN)
    done = [row for row in rows if row.status in (MEASURED, PREDICTED)]
    lines = [flat(row) for row in done]
    body = "".join("<tr>" + "".join(f"<td>{escape(str(line[key]))}</td>" for key in SHOWN) + "</tr>" for line in lines)
    left = "".join(
        f"<tr><td>{escape(row.cell.name)}</td><td>{escape(row.status)}</td><td>{escape(row.reason)}</td></tr>"
        for row in rows
        if row not in done
    )
    others = f'<h2>Not measured</h2><div class="card"><table class="facts">{left}</table></div>' if left else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · scaling</title><style>{CSS}</style></head>
<body><main>
<header><p class="run">megatron_sage · scaling study</p><h1>{escape(title)}</h1>
<p class="lead">{escape(machine)} Medians of the iterations behind the warm-up. strong: the same prompts on
more devices;
weak: as many prompts for each replica. Efficiency: videos an hour and device, over the fastest layout on the fewest
devices. Rows marked predicted are the planner's, computed and not measured.</p></header>
<div class="card"><img alt="throughput, efficiency, phases" style="width:100%" src="data:image/png;base64,{picture}">
</div><h2>Cells</h2><div class="card" style="overflow-x:auto"><table><thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table></div>
{others}</main></body></html>
"""
