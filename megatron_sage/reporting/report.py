"""`megatron-sage report RUN_DIR`: one self-contained page that shows what a run did."""

import argparse
import os
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from megatron_sage.reporting import sections
from megatron_sage.reporting.curves import curves
from megatron_sage.reporting.record import RunRecord, load_record
from megatron_sage.reporting.schedule import schedule_section
from megatron_sage.reporting.style import CSS

FILE = "report.html"


def write_report(run_dir: str | Path) -> Path:
    """Write RUN_DIR/report.html from the run's files and return its path.

    The page holds its style, charts and videos; it loads nothing and runs no script. Raises UserError, in one line,
    for a missing or broken file; only metrics.jsonl must exist.
    """
    run = load_record(run_dir)
    path = run.directory / FILE
    temporary = path.with_name(f".{FILE}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page(run), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def page(run: RunRecord) -> str:
    """The whole page as HTML."""
    name = str(run.setting("name") or run.directory.resolve().name)
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in run.notes)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)} · megatron_sage</title><style>{CSS}</style></head>
<body><main>
<header><p class="run">megatron_sage · run report</p><h1>{escape(name)}</h1>{sections.summary(run)}{notes}</header>
{sections.headline(run)}
{sections.gallery(run)}
{curves(run)}
{schedule_section(run.schedule)}
{sections.facts(run)}
<footer class="soft">Written {written} from the files of this run directory.</footer>
</main></body></html>
"""


def main(argv: list[str]) -> int:
    """Command line of `report`."""
    parser = argparse.ArgumentParser(prog="megatron-sage report", description="Write a run's report.html anew.")
    parser.add_argument("run_dir", help="output directory of a training run")
    arguments = parser.parse_args(argv)
    print(write_report(arguments.run_dir))
    return 0
