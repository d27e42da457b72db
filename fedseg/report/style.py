"""Style of the report: light and dark, wide and narrow, screen and paper.

Colours of lines and bars are Okabe and Ito's (Color Universal Design, 2008), brighter ones of them
on dark; a line's dash and marker tell it apart without colour.
"""

__all__ = ["STYLE"]

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f5f7f9; --ink: #1b2127; --soft: #55606b; --line: #d5dbe1;
  --server: #0072b2; --sites: #b84f00; --unseen: #007a59; --site: #8d97a3; --bar-two: #d98a2b;
  --alert: #8a3500; --alert-paper: #fdf1e7;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --card: #1d2329; --ink: #e6eaee; --soft: #a5b0bb; --line: #39424c;
    --server: #56b4e9; --sites: #f0a35e; --unseen: #35c9a0; --site: #76818d; --bar-two: #e69f00;
    --alert: #f5b98a; --alert-paper: #33241a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.05rem; font-weight: 600; margin: 0; color: var(--soft); }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0; max-width: 75ch; }
small, .soft { color: var(--soft); }
small { font-size: .8rem; }
code { overflow-wrap: anywhere; font-size: .85rem; }
.lead {
  font-size: 1.6rem; line-height: 1.25; font-weight: 650; margin: .5rem 0 1rem;
  max-width: 46ch;
}
.alert {
  border-left: 4px solid var(--alert); background: var(--alert-paper); color: var(--ink);
  padding: .5rem .9rem; margin: 1rem 0; overflow-wrap: anywhere;
}
.tiles, .figures, .pair { display: grid; gap: 12px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(250px, 100%), 1fr)); }
.tile { background: var(--card); border-radius: 10px; padding: 14px 18px; }
.tile dt { color: var(--soft); }
.tile dd { margin: 0; }
.tile .big { font-size: 2.1rem; line-height: 1.2; font-weight: 650; }
.facts { display: flex; flex-wrap: wrap; gap: 4px 28px; margin: 1rem 0; padding: 0; }
.facts div { display: flex; gap: .5em; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; font-weight: 600; }
.figures { grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 20px; }
figure { margin: 0; break-inside: avoid; }
figcaption { font-weight: 600; margin-bottom: .2rem; }
svg { display: block; width: 100%; height: auto; }
.tick, .axis { fill: var(--soft); font-size: 13px; }
.grid { stroke: var(--line); stroke-width: 1; fill: none; }
.line { fill: none; stroke: currentColor; stroke-width: 2.5; stroke-linejoin: round; }
.server-line, .sites-line, .unseen-line, .site-line { fill: currentColor; }
.server-line { color: var(--server); }
.sites-line { color: var(--sites); }
.unseen-line { color: var(--unseen); }
.site-line { color: var(--site); }
.sites-line .line { stroke-dasharray: 8 4; }
.unseen-line .line { stroke-dasharray: 2 4; stroke-linecap: round; }
.site-line .line { stroke-width: 1.2; }
.bar-one { color: var(--server); fill: var(--server); }
.bar-two { color: var(--bar-two); fill: var(--bar-two); }
.legend { list-style: none; margin: .2rem 0 0; padding: 0; font-size: .9rem; }
.legend li { display: flex; gap: .6em; align-items: center; }
.legend svg { width: 34px; height: 14px; flex: none; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td {
  padding: .35rem .8rem; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top;
}
thead th { font-weight: 600; border-bottom: 2px solid var(--line); vertical-align: bottom; }
tbody th { font-weight: 500; white-space: nowrap; }
.numbers td, .numbers thead th + th { text-align: right; }
.numbers td, .short td:nth-child(2), .whole { white-space: nowrap; }
tr { break-inside: avoid; }
.bar {
  display: block; height: 4px; margin-top: 3px; background: var(--line); border-radius: 2px;
  min-width: 70px;
}
.bar i {
  display: block; height: 4px; width: var(--share); background: var(--server);
  border-radius: 2px;
}
.mark {
  display: inline-block; font-size: .75rem; font-weight: 600; border: 1px solid currentColor;
  border-radius: 4px; padding: 0 .35em; color: var(--alert); margin-right: .4em;
}
.shaded td { position: relative; z-index: 0; }
.shaded td::before {
  content: ""; position: absolute; inset: 1px; z-index: -1; background: var(--server);
  opacity: calc(var(--share, 0%) * .45);
}
.shaded .mark { color: inherit; border-style: dotted; }
.pictures { display: grid; gap: 24px; grid-template-columns: minmax(0, 1fr); }
.pair {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(260px, 100%), 1fr)); gap: 8px;
  max-width: 860px;
}
.pair img { width: 100%; height: auto; display: block; background: #000; border-radius: 6px; }
.swatch {
  display: inline-block; width: 1em; height: 1em; vertical-align: -.15em; border-radius: 3px;
}
.fill-liver { background: #56b4e980; } .line-liver { border: 2px solid #56b4e9; }
.fill-tumor { background: #e69f0080; } .line-tumor { border: 2px solid #e69f00; }
details { margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
details caption { position: absolute; clip-path: inset(50%); width: 1px; overflow: hidden; }
:focus-visible { outline: 3px solid var(--server); outline-offset: 2px; }
@media (max-width: 600px) {
  main { padding: 16px 14px 48px; }
  .lead { font-size: 1.35rem; }
  th, td { padding: .35rem .5rem; }
  tbody th, .numbers td { white-space: normal; }
  .numbers small { white-space: nowrap; }
  .numbers td, .numbers thead th + th { min-width: 4.6rem; }
  tbody th { overflow-wrap: normal; }
  .short td:nth-child(3) { min-width: 12rem; }
  caption { max-width: calc(100vw - 28px); }
  .bar { min-width: 0; }
}
@media print {
  :root {
    color-scheme: light;
    --paper: #ffffff; --card: #f5f7f9; --ink: #000000; --soft: #444c55; --line: #c5ccd3;
    --server: #0072b2; --sites: #b84f00; --unseen: #007a59; --site: #8d97a3; --bar-two: #d98a2b;
    --alert: #8a3500; --alert-paper: #fdf1e7;
  }
  body { font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  h2, h3, figcaption, caption { break-after: avoid; }
  .scroll { overflow: visible; }
  .figures { grid-template-columns: 1fr 1fr; }
  .pair { grid-template-columns: 1fr 1fr; }
  details::details-content { display: block; content-visibility: visible; block-size: auto; }
  table { font-size: .8em; }
  th, td { padding: .25rem .4rem; }
  .numbers td, tbody th { white-space: normal; }
  .numbers small { white-space: nowrap; }
  .bar { min-width: 0; }
  @page { margin: 15mm; }
}
"""
