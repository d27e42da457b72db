"""Templates of the report and of a site's own report (a bundle of the app carries only `.py`)."""

__all__ = ["TEMPLATES"]

_PARTS = """
{% macro whole_words(text) %}
{%- for word in text.split() %}{{ ' ' if not loop.first }}
{%- if '-' in word %}<span class="whole">{{ word }}</span>{% else %}{{ word }}{% endif %}
{%- endfor %}
{%- endmacro %}

{% macro data_table(table) %}
<div class="scroll" role="region" tabindex="0" aria-label="{{ table.caption }}">
<table class="numbers{{ ' shaded' if table.shaded }}">
<caption>{{ table.caption }}</caption>
<thead><tr><th scope="col">{{ table.corner }}</th>
{%- for head in table.heads %}<th scope="col">{{ whole_words(head) }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for name, cells in table.rows %}
<tr><th scope="row">{{ whole_words(name) }}</th>
{%- for cell in cells %}
{%- set share = '%.1f%%' % (100 * cell.share) if cell.share is not none else '' %}
<td{% if table.shaded and share %} style="--share: {{ share }}"{% endif %}>
{%- if cell.mark %}<span class="mark">{{ cell.mark }}</span> {% endif %}{{ cell.text }}
{%- if cell.note %} <small>({{ cell.note }})</small>{% endif %}
{%- if share and not table.shaded %}<span class="bar" aria-hidden="true"
 style="--share: {{ share }}"><i></i></span>{% endif -%}
</td>
{%- endfor %}</tr>
{%- endfor %}
</tbody></table></div>
{% endmacro %}

{% macro text_table(caption, heads, rows) %}
<div class="scroll" role="region" tabindex="0" aria-label="{{ caption }}">
<table class="short"><caption>{{ caption }}</caption>
<thead><tr>{% for head in heads %}<th scope="col">{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody></table></div>
{% endmacro %}

{% macro swatch(style, marker) %}
<svg viewBox="0 0 34 14" aria-hidden="true" class="{{ style }}">
{%- if marker == 'bar' %}<rect x="10" y="1" width="12" height="12"/>
{%- else %}<path class="line" d="M0 7H34"/>
{%- if marker == 'circle' %}<circle cx="17" cy="7" r="4"/>{% endif %}
{%- if marker == 'square' %}<rect x="13" y="3" width="8" height="8"/>{% endif %}
{%- if marker == 'diamond' %}<path d="M17 1.5l5.5 5.5l-5.5 5.5l-5.5-5.5z"/>{% endif %}
{%- endif %}</svg>
{% endmacro %}

{% macro figures(drawn) %}
<div class="figures">
{%- for figure in drawn %}
<figure><figcaption>{{ figure.caption }}</figcaption>
{{ figure.drawing }}
{%- if figure.legend %}<ul class="legend">
{%- for style, name, marker in figure.legend %}
<li>{{ swatch(style, marker) }}<span>{{ name }}</span></li>{% endfor %}</ul>{% endif %}
</figure>
{%- endfor %}
</div>
{% endmacro %}

{% macro pictures(drawn, whose) %}
<p>Each slice is the one with the largest tumour, or else the largest liver, at the network's own
resolution. Seen from the feet: the patient's right is on the left.</p>
<p><span class="swatch fill-liver" aria-hidden="true"></span> <span class="swatch fill-tumor"
aria-hidden="true"></span> filled: what experts drew (blue: liver, orange: tumours) &nbsp;
<span class="swatch line-liver" aria-hidden="true"></span> <span class="swatch line-tumor"
aria-hidden="true"></span> outlined: what the model found. Colour outside an outline was missed; an
outline without colour is a false alarm.</p>
<div class="pictures">
{%- for picture in drawn %}
<figure><figcaption>{{ picture.title }}: {{ picture.case }} {{ whose }};
Dice {{ picture.dice }}</figcaption>
<div class="pair"><img src="{{ picture.scan }}" width="512" height="512"
 alt="Axial slice of {{ picture.case }} {{ whose }}, the scan alone">
<img src="{{ picture.overlay }}" width="512" height="512"
 alt="The same slice, experts' mask filled, model's prediction outlined; Dice of the whole case:
 {{ picture.dice }}"></div>
</figure>
{%- endfor %}
</div>
{% endmacro %}

{% macro dice() %}
<p><strong>Dice</strong> says how far two outlines agree: 0 is nothing in common, 1 is the same
(twice the shared volume, divided by the sum of both volumes). Liver means the liver with its
tumours. A dash stands for what isn't defined, such as the Dice of tumours where there are none;
such cases are counted, never scored.</p>
{% endmacro %}

{% macro head(title) %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
{% endmacro %}
"""

_REPORT = """
{%- import "parts" as parts with context -%}
{{ parts.head("fedseg: report of " ~ run.id) }}
<body>
<main>
<header>
<h1>Federated liver and tumour segmentation, run {{ run.id }}</h1>
<p class="lead">{{ headline.title }}</p>
<p class="soft">For research only: no medical device, no clinical use.</p>
{%- if failed %}
<p class="alert"><strong>The run failed</strong>{{ ": " ~ failed if failed is string }}.
What follows is what it had reached.</p>
{%- elif unfinished %}
<p class="alert"><strong>The run is going on</strong>, or was killed; this is what it had
reached.</p>
{%- endif %}
{%- for problem in run.problems %}
<p class="alert">Not read: {{ problem }}.</p>
{%- endfor %}
{%- if headline.tiles %}
<dl class="tiles">
{%- for tile in headline.tiles %}
<div class="tile"><dt>{{ tile.name }}</dt>
<dd><span class="big">{{ tile.value.text }}</span>
{%- if tile.value.note %} <small>({{ tile.value.note }})</small>{% endif %}</dd>
{%- for line in tile.beside %}<dd class="soft">{{ line }}</dd>{% endfor %}</div>
{%- endfor %}
</dl>
{%- endif %}
{%- for note in headline.notes %}<p>{{ note }}</p>{% endfor %}
<dl class="facts">
{%- for name, value in totals %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}
</dl>
</header>

{%- if curves %}
<section aria-labelledby="curves"><h2 id="curves">How the model got better</h2>
{{ parts.dice() }}
{{ parts.figures(curves) }}
{%- if best %}<p>The best model is that of round {{ best.number }}.</p>{% endif %}
</section>
{%- endif %}

{%- if compared or matrices %}
<section aria-labelledby="alone"><h2 id="alone">Alone or together</h2>
{%- for table in compared %}{{ parts.data_table(table) }}{% endfor %}
{%- for table in matrices %}{{ parts.data_table(table) }}{% endfor %}
{%- if matrices %}<p>Each row is one model, each column the cases of one site. A row that fades away
from its own cases is a model that doesn't travel.</p>{% endif %}
</section>
{%- endif %}

{%- if sites %}
<section aria-labelledby="sites"><h2 id="sites">Site by site</h2>
{{ parts.data_table(sites) }}
{%- for line in spread %}<p>{{ line }}</p>{% endfor %}
</section>
{%- endif %}

{%- if pictures %}
<section aria-labelledby="pictures"><h2 id="pictures">Pictures</h2>
{{ parts.pictures(pictures, "at the server") }}
</section>
{%- endif %}

{%- if metrics or lesions %}
<section aria-labelledby="metrics"><h2 id="metrics">Lesions and all metrics</h2>
{%- for table in lesions %}{{ parts.data_table(table) }}{% endfor %}
{%- for line in lesion_notes %}<p>{{ line }}</p>{% endfor %}
{%- for table in metrics %}{{ parts.data_table(table) }}{% endfor %}
<p>Mean over the cases that define it; pooled: over the voxels of all cases at once. Surface
distances say how far the outlines lie apart; the 95% Hausdorff distance is what 95% of them stay
under.</p>
</section>
{%- endif %}

{%- if costs %}
<section aria-labelledby="costs"><h2 id="costs">What it cost</h2>
{{ parts.figures(costs) }}
</section>
{%- endif %}

<section aria-labelledby="missing"><h2 id="missing">Who was missing</h2>
{%- if absences %}
{{ parts.text_table("Updates that a round went without, or that came late",
 ["round", "site", "status", "why"], absences) }}
{%- if more %}<p>And {{ more }} more: see history.jsonl.</p>{% endif %}
{%- elif run.rounds|length > 1 %}
<p>Nobody: each site that was asked gave its update in time, and the guard left none out.</p>
{%- else %}<p>No round of training is written down yet.</p>{% endif %}
</section>

<section aria-labelledby="privacy"><h2 id="privacy">Privacy</h2>
{%- for line in privacy %}<p>{{ line }}</p>{% endfor %}
</section>

{%- if plan %}
<section aria-labelledby="plan"><h2 id="plan">Plan</h2>
{{ parts.text_table("What every site preprocesses and trains with",
 ["what", "value", "why"], plan) }}
</section>
{%- endif %}

<section aria-labelledby="origin"><h2 id="origin">Versions, files, settings</h2>
{%- if models %}
{{ parts.text_table("Model files", ["file", "round", "size", "SHA-256"], models) }}{% endif %}
{%- if versions %}<details open><summary>Versions</summary>
{{ parts.text_table("Versions", ["what", "value"], versions) }}</details>{% endif %}
{%- if config %}<details><summary>Study config</summary>
{{ parts.text_table("Study config", ["key", "value"], config) }}</details>{% endif %}
</section>
</main>
</body>
</html>
"""

_SITE = """
{%- import "parts" as parts with context -%}
{{ parts.head("fedseg: " ~ site ~ " in " ~ run_id) }}
<body>
<main>
<h1>{{ site }} in run {{ run_id }}</h1>
<p class="lead">The shared model of round {{ round }} on this site's own held-out cases</p>
<p class="alert"><strong>This file stays here.</strong> It has pictures of patients' scans.</p>
{{ parts.dice() }}
{{ parts.data_table(metrics) }}
{%- if pictures %}
<section aria-labelledby="pictures"><h2 id="pictures">Pictures</h2>
{{ parts.pictures(pictures, "at this site") }}
</section>
{%- endif %}
</main>
</body>
</html>
"""

TEMPLATES = {"parts": _PARTS, "report": _REPORT, "site": _SITE}
"""Jinja templates by name; all that they show is escaped, but for our own style and drawings."""
