"""The look of report.html: one style sheet for light and dark, wide and narrow, screen and paper."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #16181d; --muted: #5b6270; --rule: #e2e5ea; --soft: #f1f3f6;
  --accent: #2563eb; --good: #067647; --good-soft: #dcf5e7; --warn: #935a00; --warn-soft: #fdf0d0; --bad: #b42318;
    --bad-soft: #fde4e1;
  --series-1: #2563eb; --series-2: #d97706; --series-3: #059669; --series-4: #9333ea;
  --series-5: #dc2626; --series-6: #0891b2; --series-7: #a16207; --series-8: #64748b;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #101216; --card: #181b21; --ink: #e8eaee; --muted: #9aa2b1; --rule: #2a2f38; --soft: #20242c;
    --accent: #7aa7ff; --good: #6fd8a1; --good-soft: #12331f; --warn: #f2c46d; --warn-soft: #3a2c0c;
    --bad: #ff9c91; --bad-soft: #43190f;
    --series-1: #7aa7ff; --series-2: #f5b14c; --series-3: #4fd1a1; --series-4: #c59bff;
    --series-5: #ff8f85; --series-6: #5fd0e6; --series-7: #d9b45f; --series-8: #a5b1c2;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink); font-size: 15px; line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "Liberation Sans",
    Arial, sans-serif;
}
main, header, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 48px; padding-bottom: 8px; }
.eyebrow { margin: 0 0 12px; color: var(--muted); font-size: 13px; }
h1 { margin: 0; max-width: 34em; font-size: clamp(24px, 3vw, 32px); line-height: 1.18; letter-spacing: -0.02em;
  font-weight: 700; text-wrap: balance; }
.lead { margin: 16px 0 0; max-width: 50em; color: var(--muted); font-size: 16px; }
.lead b { color: var(--ink); font-weight: 600; }
h2 { margin: 0 0 4px; font-size: 18px; line-height: 1.3; letter-spacing: -0.01em; }
h3 { margin: 24px 0 12px; font-size: 15px; } h3:first-child { margin-top: 0; }
section { margin: 20px 0; padding: 24px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 12px; }
.about { margin: 0 0 16px; max-width: 56em; color: var(--muted); font-size: 14px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 12px; margin: 28px 0 20px; }
.tile { padding: 16px 18px; background: var(--card); border: 1px solid var(--rule); border-radius: 12px; }
.tile .name { color: var(--muted); font-size: 13px; }
.tile .value { margin: 2px 0; font-size: 27px; line-height: 1.2; font-weight: 650; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile .value small { font-size: 15px; font-weight: 500; letter-spacing: 0; color: var(--muted); }
.tile .more { color: var(--muted); font-size: 13px; }
table { width: calc(100% + 24px); margin: 0 -12px; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 10px 0 10px 14px; text-align: right; vertical-align: baseline;
  border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { padding-left: 12px; text-align: left; }
table.wrapped th:first-child, tbody th:first-child, td.name { white-space: normal; }
th.name, td.name { text-align: left; overflow-wrap: anywhere; }
th:last-child, td:last-child { padding-right: 12px; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--muted); font-size: 12.5px; font-weight: 500; line-height: 1.3; vertical-align: bottom;
  white-space: normal; }
tbody th { font-weight: 600; }
td small, th small { display: block; color: var(--muted); font-size: 12px; font-weight: 400; }
td.reason { text-align: left; color: var(--muted); white-space: normal; font-size: 14px; }
tr.lead-row > * { background: color-mix(in srgb, var(--accent) 7%, transparent); }
tr.lead-row > :first-child { box-shadow: inset 3px 0 0 var(--accent); }
.dot { display: inline-block; width: 9px; height: 9px; margin-right: 8px; border-radius: 50%;
  background: var(--rule); }
.chip { display: inline-block; padding: 1px 8px; border-radius: 99px; font-size: 12px; line-height: 1.5;
  white-space: nowrap; font-weight: 600; background: var(--soft); color: var(--muted); }
.chip.good { background: var(--good-soft); color: var(--good); }
.chip.warn { background: var(--warn-soft); color: var(--warn); }
.chip.bad { background: var(--bad-soft); color: var(--bad); }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 20px; margin: 20px 0; }
.pair > section { margin: 0; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px 40px; align-items: start; }
svg { display: block; overflow: visible; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(148px, 1fr)); gap: 12px; margin: 0;
  padding: 0; list-style: none; }
.sheet li { min-width: 0; border: 1px solid var(--rule); border-radius: 10px; overflow: hidden;
  background: var(--card); }
.sheet img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--soft); }
.sheet img.small { image-rendering: pixelated; }
.sheet .words { padding: 9px 11px 11px; font-size: 13px; line-height: 1.4; }
.answer { margin: 5px 0 0; line-height: 1.3; overflow-wrap: anywhere; }
.answer b { font-weight: 600; }
.answer small { display: block; color: var(--muted); font-size: 12px; font-variant-numeric: tabular-nums; }
.answer span { display: inline-block; margin-right: 6px; }
.answer.wrong b { color: var(--bad); }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 6px 20px; margin: 12px 0 0; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 16px; }
summary { width: max-content; color: var(--accent); font-size: 14px; cursor: pointer; }
details table { margin-top: 8px; max-width: 640px; }
ul.notes { margin: 12px 0 0; padding-left: 18px; }
ul.notes li { margin: 4px 0; overflow-wrap: anywhere; }
pre { margin: 12px 0 0; padding: 12px 14px; background: var(--soft); border-radius: 8px;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
    overflow-wrap: anywhere; }
pre span { display: inline-block; }
footer { padding-top: 4px; padding-bottom: 48px; color: var(--muted); font-size: 13px; }
@media screen and (max-width: 940px) {
  .pair, .plots { grid-template-columns: minmax(0, 1fr); }
  table.stacked thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table.stacked, table.stacked tbody { display: block; }
  table.stacked { width: 100%; margin: 0; }
  table.stacked tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(138px, 1fr)); gap: 6px 20px;
    padding: 14px 0; border-bottom: 1px solid var(--rule); }
  table.stacked tr:first-child { padding-top: 4px; }
  table.stacked tr:last-child { border-bottom: 0; padding-bottom: 0; }
  table.stacked th { white-space: normal; }
  table.stacked th, table.stacked td { display: flex; justify-content: space-between; align-items: baseline;
    gap: 8px; padding: 0; border: 0; background: none; }
  table.stacked .lead-row > :first-child { box-shadow: none; }
  table.stacked th, table.stacked td.reason { grid-column: 1 / -1; display: block; }
  table.stacked td::before { content: attr(data-name); color: var(--muted); font-size: 13px; text-align: left;
    white-space: normal; }
  table.stacked td.reason::before { content: none; }
  table.stacked td small { display: none; }
  table.stacked th small { display: inline; margin-left: 8px; }
}
@media screen and (max-width: 760px) {
  main, header, footer { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 28px; }
  section { padding: 18px 16px; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; margin-top: 20px; }
  .tile:last-child:nth-child(odd) { grid-column: 1 / -1; }
  .tile { padding: 12px 14px; } .tile .value { font-size: 23px; }
  .sheet { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; }
  .facts { grid-template-columns: minmax(0, 1fr); gap: 0; } .facts dd { margin-bottom: 8px; }
  table { width: 100%; margin: 0; } th:first-child, td:first-child { padding-left: 0; }
    th:last-child, td:last-child { padding-right: 0; }
}
@media screen and (max-width: 360px) { th, td { padding-left: 7px; } section { padding: 16px 12px; } }
@page { margin: 12mm; }
@media print {
  :root { --page: #ffffff; }
  body { font-size: 12.5px; }
  main, header, footer { max-width: none; padding: 0; }
  section { padding: 16px 18px; }
  section, .tile, .sheet li, tr { break-inside: avoid; }
  .dot, .chip, .lead-row > * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .tiles { grid-template-columns: repeat(auto-fit, minmax(110px, 1fr)); }
  .tile { padding: 10px 12px; } .tile .value { font-size: 21px; }
  .pair, .plots { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; }
  th, td { padding: 6px 0 6px 8px; }
  td small, th small, thead th { font-size: 10.5px; }
  .sheet { grid-template-columns: repeat(5, minmax(0, 1fr)); }
}
"""
