"""The page's look: one column on a phone, two on a desk, light or dark as the reader's system is."""

CSS = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1b2230; --soft: #5c6675; --rule: #e2e6ec; --accent: #2a5bd7;
  --up: #14804a; --down: #c2372e;
  --c0: #2a5bd7; --c1: #d9662b; --c2: #14804a; --c3: #9a4fc9; --c4: #b8860b; --c5: #0e8a9c; }
@media (prefers-color-scheme: dark) { :root {
  --page: #12151b; --card: #1b2029; --text: #e7eaf0; --soft: #9aa5b5; --rule: #2d3542; --accent: #7aa2ff;
  --up: #4cc38a; --down: #ff7d73;
  --c0: #7aa2ff; --c1: #ff9e64; --c2: #4cc38a; --c3: #c792ea; --c4: #e0b64a; --c5: #4fc6d8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 56px; }
header .run { color: var(--soft); font-size: .8rem; letter-spacing: .09em; text-transform: uppercase; margin: 0; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 4px 0 10px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 14px; }
h3 { font-size: .95rem; margin: 0 0 6px; }
p { margin: 0 0 10px; } .lead { max-width: 75ch; } .soft, .note { color: var(--soft); font-size: .88rem; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 16px 18px; }
.chart { display: flex; flex-direction: column; } .chart svg { margin-top: auto; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
.headline { display: grid; gap: 18px 36px; margin-top: 22px; align-items: center;
  grid-template-columns: minmax(0, 1.1fr) minmax(0, 1fr); }
.headline .what { font-size: .88rem; color: var(--soft); margin: 0; }
.headline .numbers { font-size: 2.3rem; font-weight: 650; line-height: 1.2; margin: 2px 0; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.headline .numbers .arrow { color: var(--soft); font-weight: 400; padding: 0 .15em; }
.headline .change { font-size: 1.15rem; font-weight: 600; margin: 0 0 6px; }
.up-text { color: var(--up); } .down-text { color: var(--down); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 8px; border-bottom: 1px solid var(--rule); vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 500; font-size: .82rem; } tbody tr:last-child > * { border-bottom: 0; }
table.facts td { text-align: left; overflow-wrap: anywhere; } table.facts th { font-weight: 500; color: var(--soft);
  white-space: nowrap; width: 1%; padding-right: 18px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 10px; }
figure { margin: 0; min-width: 0; } figcaption { font-size: .8rem; color: var(--soft); margin-top: 4px;
  font-variant-numeric: tabular-nums; }
figcaption b { color: var(--text); }
video { width: 100%; display: block; border-radius: 6px; background: #000; image-rendering: pixelated; }
.missing { border: 1px dashed var(--rule); border-radius: 6px; color: var(--soft); font-size: .85rem;
  display: grid; place-items: center; min-height: 90px; padding: 8px; text-align: center; }
.prompt { font-weight: 600; overflow-wrap: anywhere; margin-bottom: 8px; }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--rule); display: inline; } svg .axis { stroke: var(--soft); }
.line, .faint { fill: none; stroke-linejoin: round; stroke-linecap: round; } .line { stroke-width: 2; }
.faint { stroke-width: 1; opacity: .4; } .band { opacity: .14; stroke: none; }
.hover { fill: transparent; stroke: none; } .hover:hover { fill: currentColor; opacity: .35; }
.up { fill: var(--up); } .down { fill: var(--down); }
.line.c0, .faint.c0 { stroke: var(--c0); } .line.c1, .faint.c1 { stroke: var(--c1); }
.line.c2, .faint.c2 { stroke: var(--c2); } .line.c3, .faint.c3 { stroke: var(--c3); }
.line.c4, .faint.c4 { stroke: var(--c4); } .line.c5, .faint.c5 { stroke: var(--c5); }
.fill.c0, .band.c0, .dot.c0 { fill: var(--c0); } .fill.c1, .band.c1, .dot.c1 { fill: var(--c1); }
.fill.c2, .band.c2, .dot.c2 { fill: var(--c2); } .fill.c3, .band.c3, .dot.c3 { fill: var(--c3); }
.fill.c4, .band.c4, .dot.c4 { fill: var(--c4); } .fill.c5, .band.c5, .dot.c5 { fill: var(--c5); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .8rem; color: var(--soft); margin-bottom: 4px; }
.legend i { display: inline-block; width: 12px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; }
i.c0 { background: var(--c0); } i.c1 { background: var(--c1); } i.c2 { background: var(--c2); }
i.c3 { background: var(--c3); } i.c4 { background: var(--c4); } i.c5 { background: var(--c5); }
.empty { color: var(--soft); font-size: .88rem; padding: 24px 0; text-align: center; }
details > summary { cursor: pointer; font-weight: 600; } details pre { margin: 12px 0 0; }
pre { font: .8rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-x: auto; }
footer { margin-top: 44px; }
@media (max-width: 760px) { .headline { grid-template-columns: minmax(0, 1fr); } h1 { font-size: 1.5rem; }
  .headline .numbers { font-size: 1.8rem; } main { padding: 20px 14px 40px; } }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""
