"""A comparison as one page of HTML: nothing is loaded, everything is escaped."""

from __future__ import annotations

from gpuopt.comparing import render
from gpuopt.comparing.model import Comparison
from gpuopt.comparing.words import conclusion, difference_text

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>gpuopt compare: {{ title }}</title>
<style>
:root { color-scheme: light dark; --text: #1b1b1b; --page: #fff; --line: #d0d0d0; --soft: #5c5c5c;
  --worse: #b3261e; --better: #1b6e3c; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --page: #161616; --line: #444; --soft: #a5a5a5; --worse: #ff8a80; --better: #7fd79f; }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--page);
  margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin-top: 2rem; overflow-wrap: anywhere; }
p, li { overflow-wrap: anywhere; }
.worse td:last-child, .error { color: var(--worse); font-weight: 600; }
.better td:last-child { color: var(--better); font-weight: 600; }
.not-comparable td { color: var(--soft); }
@media print {
  :root { --text: #000; --page: #fff; --line: #999; --soft: #444; --worse: #000; --better: #000; }
  body { margin: 0; max-width: none; font-size: 10pt; }
  h2 { break-after: avoid; }
  thead { display: table-header-group; }
  tr { break-inside: avoid; }
}
</style>
</head>
<body>
<h1>gpuopt compare: {{ title }}</h1>
<ul>{% for name, text in sides %}
<li><strong>{{ name }}</strong> {{ text }}</li>{% endfor %}
</ul>
{% if found.error %}<p class="error">{{ found.error.kind }} (exit code {{ found.error.exit_code }}): \
{{ found.error.message }}</p>
{% endif %}{% if differences %}<ul>{% for text in differences %}
<li>differs: {{ text }}</li>{% endfor %}
</ul>
{% endif %}{% for heading, rows in groups %}<h2>{{ heading }}</h2>
<div class="wide"><table>
<thead><tr>{% for text in head %}<th scope="col">{{ text }}</th>{% endfor %}</tr></thead>
<tbody>{% for row, texts in rows %}
<tr class="{{ row.verdict|replace(' ', '-') }}">{% for text in texts %}<td>{{ text }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% endfor %}{% if found.rows %}<p>{{ conclusion }}. {{ note }}</p>
{% endif %}</body>
</html>
"""


def page(found: Comparison) -> str:
    """A pure function of the comparison; it can be printed, and follows the reader's dark mode."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(_PAGE).render(
        found=found,
        title=render.title(found),
        sides=render.sides(found),
        differences=[difference_text(difference) for difference in found.differences],
        groups=[(heading, [(row, render.cells(row)) for row in rows]) for heading, rows in render.groups(found)],
        head=render.HEAD,
        conclusion=conclusion(found.rows).capitalize(),
        note=render.NOTE,
    )
