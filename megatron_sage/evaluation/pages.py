"""What the gallery and the rating page share: one HTML file that holds its style, script and data."""

import json
from html import escape
from pathlib import Path
from typing import Any

from megatron_sage.reporting.style import CSS

MORE_CSS = """
main.wide { max-width: 1480px; }
.scroll { overflow-x: auto; } .scroll td, .scroll th { white-space: nowrap; }
button, select, input { font: inherit; font-size: .9rem; color: var(--text); background: var(--card);
  border: 1px solid var(--rule); border-radius: 7px; padding: 6px 10px; }
button { cursor: pointer; } button:hover:enabled { border-color: var(--accent); }
button:disabled { opacity: .45; cursor: default; }
button.main { background: var(--accent); border-color: var(--accent); color: var(--page); font-weight: 600; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
"""


def page(title: str, css: str, body: str, data: Any, script: Path) -> str:
    """The whole file. `title` is plain text, `body` is HTML, `data` is read by the script at `script`."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{CSS}{MORE_CSS}{css}</style></head>
<body>{body}
<script type="application/json" id="data">{embedded(data)}</script>
<script>
{script.read_text(encoding="utf-8")}</script>
</body></html>
"""


def embedded(data: Any) -> str:
    """JSON that no text in it can end early: neither </script> nor <!-- nor a line separator stays as it is."""
    text = json.dumps(data, allow_nan=False)  # ASCII
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
