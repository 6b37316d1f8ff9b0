"""The style sheet of reports: light, dark and on paper, from a phone to a wide screen."""

CSS = """\
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1c2126; --soft: #5d666f; --line: #dde2e7; --tint: #f5f7f9;
  --accent: #0072b2; --good: #00805e; --bad: #b84a00;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14181c; --ink: #e4e8ec; --soft: #9aa4ae; --line: #2d343b; --tint: #1b2025;
    --accent: #4aa9e6; --good: #2fc79b; --bad: #ff8a3d;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 80rem; padding: 2.5rem clamp(1rem, 4vw, 2.5rem) 4rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  overflow-wrap: break-word;
}
h1 { margin: 0; font-size: clamp(1.5rem, 1.1rem + 1.8vw, 2.1rem); line-height: 1.2;
  letter-spacing: -0.015em; text-wrap: balance; }
h2 { margin: 3rem 0 1rem; padding-top: 1rem; border-top: 1px solid var(--line);
  font-size: 1.3rem; line-height: 1.3; letter-spacing: -0.01em; }
p { margin: 0.75rem 0; max-width: 52rem; }
a { color: var(--accent); text-underline-offset: 0.15em; }
.subtitle { margin: 0.5rem 0 0; color: var(--soft); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.3rem 1.1rem; margin: 1rem 0 0; padding: 0;
  list-style: none; font-size: 0.9rem; }
.finding { margin: 1rem 0; padding: 0.8rem 1.1rem; background: var(--tint);
  border-left: 4px solid var(--soft); border-radius: 0 6px 6px 0; }
.finding strong { display: block; }
.better { border-color: var(--good); }
.worse { border-color: var(--bad); }
.scroll { overflow-x: auto; margin: 1.25rem 0 1.75rem; scrollbar-width: thin;
  /* A shadow on the right as long as there is more to see there. */
  background: linear-gradient(to left, var(--paper) 30%, transparent) 100% 0 / 3rem 100% local,
    linear-gradient(to left, var(--line), transparent) 100% 0 / 1.2rem 100% scroll;
  background-repeat: no-repeat; }
.scroll:focus-visible, a:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.9rem; line-height: 1.4;
  font-variant-numeric: tabular-nums lining-nums; }
caption { padding-bottom: 0.5rem; text-align: left; color: var(--soft); }
caption span { display: inline-block; position: sticky; left: 0;
  max-width: min(46rem, calc(100vw - 2rem)); }
th, td { padding: 0.4rem 0.65rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
thead th { border-bottom: 2px solid var(--soft); vertical-align: bottom; }
thead td { border-bottom: 2px solid var(--soft); }
.over th { text-align: center; border-bottom: 1px solid var(--line); }
.over td { border-bottom: 0; }
tbody th { font-weight: 400; }
tbody th, th.l, td.l, .text td { text-align: left; }
tbody th:first-child, thead tr > :first-child { position: sticky; left: 0; padding-left: 0;
  background: var(--paper); }
tbody tr:hover > * { background: var(--tint); }
.best strong { font-weight: 700; color: var(--accent); }
.text { width: 100%; }
.text th, .text td { white-space: normal; min-width: 8rem; overflow-wrap: anywhere;
  vertical-align: top; }
.matrices { display: flex; flex-wrap: wrap; gap: 0 2rem; }
.matrices .scroll { max-width: 100%; }
.matrix td[style] { min-width: 3.2rem; border: 1px solid var(--paper);
  background: color-mix(in srgb, var(--accent) calc(var(--s) * 60%), var(--tint));
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.matrix tbody th { border-bottom: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 0.35rem 1.4rem; margin: 0.5rem 0 1rem; padding: 0;
  list-style: none; font-size: 0.9rem; }
.legend svg { margin-right: 0.5rem; vertical-align: -0.05em; }
.panels { display: grid; gap: 1.5rem 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
figure { margin: 0; }
figcaption { margin-bottom: 0.35rem; font-size: 0.9rem; font-weight: 600; }
img { display: block; width: 100%; height: auto; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--accent); }
details caption { display: none; }
/* On a phone cells break at their ±, and the student's column stays in sight. */
@media screen and (max-width: 40rem) {
  table { font-size: 0.8rem; }
  th, td { padding: 0.35rem 0.4rem; white-space: normal; }
  tbody th:first-child { min-width: 5.5rem; max-width: 8rem; }
  .student { position: sticky; right: 0; background: var(--paper);
    box-shadow: -0.4rem 0 0.4rem -0.4rem var(--soft); }
  .spans { font-size: 0.72rem; }
  .spans th, .spans td { padding: 0.35rem 0.25rem; }
  .spans tbody th:first-child { min-width: 0; max-width: 5.5rem; }
  .matrix tbody th:first-child { min-width: 0; }
  .matrix td { white-space: nowrap; }
}
@media print {
  @page { margin: 14mm; }
  html { font-size: 12px; }
  body { max-width: none; padding: 0; }
  nav { display: none; }
  h2 { margin-top: 1.75rem; break-after: avoid; }
  .scroll { overflow: visible; background: none; }
  table { font-size: 0.78rem; }
  th, td { padding: 0.25rem 0.35rem; white-space: normal; }
  .finding, figure, tr, .legend { break-inside: avoid; }
  .finding { outline: 1px solid var(--line); }
  .panels { grid-template-columns: repeat(3, 1fr); gap: 1rem; }
  details:not([open]) { display: none; }
}
"""
