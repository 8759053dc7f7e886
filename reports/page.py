"""The template of the page of a run."""

# ruff: noqa: E501 - a tag on two lines is harder to read

from __future__ import annotations

from flashtask.data.page_style import HEAD

__all__ = ["MACROS", "PAGE", "STYLE"]

#: Of charts, tables and galleries; it ends the head of the page.
STYLE = """\
:root { --s0: #1c5fb8; --s1: #d9480f; --s2: #2b8a3e; --s3: #9c36b5; --s4: #c2255c; --s5: #0c8599; --s6: #846358;
  --s7: #5c7cfa; --good: #d3ebd9; }
@media screen and (prefers-color-scheme: dark) { :root { --s0: #74b0ff; --s1: #ffa94d; --s2: #69db7c; --s3: #da77f2;
  --s4: #faa2c1; --s5: #66d9e8; --s6: #d0bfae; --s7: #91a7ff; --good: #1f3d2a; } }
.lead { font-size: 1.15rem; max-width: 60rem; margin: .5rem 0; }
.wide { overflow-x: auto; }
.metrics { display: flex; flex-wrap: wrap; gap: .5rem; margin-top: .75rem; font-variant-numeric: tabular-nums; }
.metrics p { margin: 0; padding: .3rem .7rem; border: 1px solid var(--line); border-radius: .5rem; background: var(--card); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .75rem;
  margin-top: .75rem; }
.charts > * { max-width: 38rem; }
.charts .card { padding: .6rem .6rem .3rem; }
.charts h3 { margin: 0 0 .2rem .3rem; font-size: .95rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--soft); }
svg .axis { stroke: var(--line); }
svg .band { fill: var(--line); opacity: .45; }
svg polyline { fill: none; stroke-width: 2; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin: .2rem .3rem .4rem; font-size: .82rem; }
.legend i { display: inline-block; width: .8rem; height: .2rem; margin-right: .35rem; vertical-align: middle; }
{% for n in range(8) %}
svg .s{{ n }} { stroke: var(--s{{ n }}); } svg circle.s{{ n }} { fill: var(--s{{ n }}); stroke: none; }
.legend .s{{ n }} { background: var(--s{{ n }}); }
{% endfor %}
svg .even { stroke: var(--soft); stroke-dasharray: 4 4; stroke-width: 1; } .legend .even { background: var(--soft); }
table { border-collapse: collapse; margin-top: .75rem; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; min-width: 6rem; }
.range { white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.1rem; margin: .75rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: .88rem ui-monospace, monospace; overflow-wrap: anywhere; }
pre { margin: .5rem 0; padding: .6rem .8rem; border: 1px solid var(--line); border-radius: .4rem;
  background: var(--card); white-space: pre-wrap; overflow-wrap: anywhere; }
.matrix td { padding: 0; min-width: 3.4rem; border: 1px solid var(--line); background: var(--card); text-align: center; }
.matrix td:first-child { text-align: center; } .matrix th:first-child { min-width: 0; }
.matrix td a, .matrix td span { display: block; padding: .55rem .5rem; color: var(--text); text-decoration: none; }
.matrix td a { text-decoration: underline; text-decoration-color: var(--soft); text-underline-offset: .2rem; }
.matrix td a:hover, .matrix td a:focus { outline: 2px solid var(--link); }
.matrix th { max-width: 9rem; overflow-wrap: anywhere; border: 0; }
.matrix tbody th { text-align: right; }
.gallery { display: none; scroll-margin-top: 16rem; margin-top: 1rem; }
.gallery:target, .galleries:not(:has(:target)) > .gallery:first-child { display: block; }
.gallery .grid { grid-template-columns: repeat(auto-fill, minmax(min(46%, 9rem), 1fr)); gap: .5rem; }
.gallery .frame { height: 8rem; }
.bar { position: relative; width: 9rem; height: .8rem; background: var(--back); border-radius: .3rem; }
.bar i { position: absolute; top: .25rem; height: .3rem; background: var(--s0); opacity: .55; border-radius: .2rem; }
.bar b { position: absolute; top: 0; width: .2rem; height: .8rem; margin-left: -.1rem; background: var(--s0); }
.bar u { position: absolute; top: 0; width: 1px; height: .8rem; background: var(--soft); }
.share { position: relative; } .share i { position: absolute; left: 0; bottom: 0; height: 2px; background: var(--s0); }
footer { margin-top: 3rem; font-size: .85rem; color: var(--soft); }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  th, td { padding: .3rem .4rem; } .bar { width: 5rem; } .matrix td { min-width: 2.6rem; } }
@media print { body { max-width: none; padding: 0; background: #fff; } nav { display: none; } .gallery { display: none
  !important; } .card, .chart, tr { break-inside: avoid; } h2, h3, h2 + p, h3 + p { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
</style>
</head>
"""

#: `chart(one)` draws a `Chart`, `card(one)` and `cards(all)` pictures with words.
MACROS = """\
{% macro chart(one) %}
<div class="card chart"><h3>{{ one.title }}</h3>
<svg viewBox="0 0 {{ one.width }} {{ one.height }}" role="img" aria-label="{{ one.title }}">
{% for left, width, text in one.bands %}
{% if loop.index0 % 2 %}<rect class="band" x="{{ left }}" y="{{ one.top }}" width="{{ width }}" height="{{ one.bottom - one.top }}"/>{% endif %}
{% if width > 60 %}<text x="{{ left + 4 }}" y="{{ one.top + 11 }}">{{ text.split(":")[0] }}</text>{% endif %}
{% endfor %}
{% for y, text in one.y_ticks %}<line class="axis" x1="{{ one.left }}" x2="{{ one.right }}" y1="{{ y }}" y2="{{ y }}"/>
<text x="{{ one.left - 6 }}" y="{{ y + 4 }}" text-anchor="end">{{ text }}</text>
{% endfor %}
{% for x, text in one.x_ticks %}<text x="{{ x }}" y="{{ one.bottom + 15 }}" text-anchor="middle">{{ text }}</text>
{% endfor %}
<text x="{{ (one.left + one.right) / 2 }}" y="{{ one.height - 6 }}" text-anchor="middle">{{ one.across }}</text>
{% for line in one.lines %}
{% if not one.has_dots or line.kind == "even" %}<polyline class="{{ line.kind }}" points="{{ line.path }}"><title>{{ line.name }}</title></polyline>{% endif %}
{% for x, y in line.dots %}<circle class="{{ line.kind }}" cx="{{ x }}" cy="{{ y }}" r="3"/>{% endfor %}
{% endfor %}
</svg>
{% if one.lines|selectattr("name")|list|length > 0 %}
<div class="legend">{% for line in one.lines if line.name %}<span><i class="{{ line.kind }}"></i>{{ line.name }}</span>{% endfor %}</div>
{% endif %}
</div>
{% endmacro %}
{% macro card(one) %}
<div class="card">
{% if one.pictures|select|list %}
<div class="pictures">{% for picture in one.pictures if picture %}<figure><div class="frame"><img src="{{ picture }}" alt="" loading="lazy"></div></figure>{% endfor %}</div>
{% endif %}
<p class="detail">{% if one.title %}<span class="target">{{ one.title }}</span>{% endif %}
{% if one.detail %}<br>{{ one.detail }}{% endif %}
{% if one.name %}<br><span class="soft">{{ one.name }}</span>{% endif %}</p>
</div>
{% endmacro %}
{% macro cards(all) %}<div class="grid">{% for one in all %}{{ card(one) }}{% endfor %}</div>{% endmacro %}
"""

_BODY = """\
<body>
<h1>{{ title }}</h1>
<p class="lead">{{ sentence }}</p>
{% if report.remark %}<p class="soft">{{ report.remark }}</p>{% endif %}
<nav>
<a href="#trained">What was trained</a>
{% if runs %}<a href="#runs">Runs</a>{% endif %}
{% if history_charts %}<a href="#curves">Curves</a>{% endif %}
{% if confusion %}<a href="#confusion">Confusion</a><a href="#classes">Classes</a>{% endif %}
{% if number_charts %}<a href="#numbers">Numbers</a>{% endif %}
{% if curve_chart %}<a href="#thresholds">Precision and recall</a>{% endif %}
{% if calibration_chart %}<a href="#calibration">Calibration</a>{% endif %}
{% if report.objects %}<a href="#objects">Errors of objects</a>{% endif %}
{% if report.worst %}<a href="#worst">Worst</a>{% endif %}
{% if report.uncertain %}<a href="#uncertain">{{ "Disputed" if runs else "Uncertain" }}</a>{% endif %}
{% if slices %}<a href="#slices">Slices</a>{% endif %}
{% if report.findings %}<a href="#data">Data</a>{% endif %}
</nav>
{% if metrics %}
<div class="metrics">{% for name, value in metrics.items() %}<p><b>{{ number(value) }}</b> <span class="soft">{{ name }}</span></p>{% endfor %}</div>
{% endif %}
<section id="trained"><h2>What was trained</h2>
<dl>{% for name, value in report.facts.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% if report.command %}<p class="soft">This command repeats it:</p><pre>{{ report.command }}</pre>{% endif %}
</section>
{% if runs %}
<section id="runs"><h2>Runs</h2>
<p class="soft">The {{ report.evaluation.scoring.metric }} of each run with its 95 % interval on other samples like its own; the thin line is the mean of the runs, whose standard deviation is {{ number(runs.deviation) }}.</p>
<div class="wide"><table><thead><tr><th>Run</th><th>Seed</th><th>Split seed</th><th>Samples</th><th>{{ report.evaluation.scoring.metric }}</th><th>Interval</th><th></th><th>Seconds</th></tr></thead><tbody>
{% for row in runs.rows %}<tr><td>{{ row.run.name }}</td><td>{{ row.run.seed }}</td><td>{{ row.run.split_seed }}</td><td>{{ "{:,}".format(row.count) }}</td><td>{{ number(row.interval.value) }}</td>
<td class="range">{{ number(row.interval.low) }} to {{ number(row.interval.high) }}</td><td><div class="bar"><u style="left: {{ runs.whole|round(1) }}%"></u><i style="left: {{ row.left|round(1) }}%; width: {{ row.width|round(1) }}%"></i><b style="left: {{ row.middle|round(1) }}%"></b></div></td><td>{{ "{:,.1f}".format(row.run.seconds) }}</td></tr>
{% endfor %}</tbody></table></div>
<p class="soft">{% if report.several.has_folds %}Everything below is about all folds together: each sample is judged by the run that was not trained on it.{% else %}Everything below is about all runs together: a sample counts once for each run that has judged it.{% endif %} The folder of each run has a page of its own.</p>
</section>
{% endif %}
{% if history_charts %}
<section id="curves"><h2>Curves</h2>
<div class="charts">{% for one in history_charts %}{{ chart(one) }}{% endfor %}</div>
{% if history_charts[0].bands %}<p class="soft">{% for band in history_charts[0].bands %}{{ band[2] }}{{ "; " if not loop.last }}{% endfor %}</p>{% endif %}
</section>
{% endif %}
{% if confusion %}
<section id="confusion"><h2>Confusion matrix</h2>
{% if confusion.rows %}
<p class="soft">Rows are true classes, columns are predictions, in {{ unit }}. A number opens the pictures below.</p>
<div class="wide"><table class="matrix"><thead><tr><th></th>{% for name in confusion.classes %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in confusion.rows %}<tr><th>{{ row.label }}</th>
{% for cell in row.cells %}<td style="background: color-mix(in srgb, var({{ '--s2' if cell.is_right else '--s1' }}) {{ (60 * cell.share)|round|int }}%, var(--card))">
{% if cell.id %}<a href="#{{ cell.id }}">{{ "{:,.0f}".format(cell.count) }}</a>{% else %}<span>{{ "{:,.0f}".format(cell.count) }}</span>{% endif %}</td>{% endfor %}
</tr>{% endfor %}</tbody></table></div>
{% else %}
<p class="soft">Of {{ confusion.count }} classes, those that are confused most, in {{ unit }}. A number opens the pictures below.</p>
<div class="wide"><table><thead><tr><th>Truth</th><th>Predicted</th><th>Count</th><th>Share</th></tr></thead><tbody>
{% for one in confusion.confused %}<tr><td>{{ one.truth }}</td><td>{{ one.predicted }}</td>
<td>{% if one.id %}<a href="#{{ one.id }}">{{ "{:,.0f}".format(one.count) }}</a>{% else %}{{ "{:,.0f}".format(one.count) }}{% endif %}</td>
<td>{{ "{:.1%}".format(one.share) }}</td></tr>{% endfor %}</tbody></table></div>
{% endif %}
<div class="galleries">{% for one in confusion.galleries %}
<div class="gallery" id="{{ one.id }}"><p><span class="target">{{ one.truth }}</span> predicted as
<span class="target">{{ one.predicted }}</span>: {{ "{:,.0f}".format(one.count) }} {{ unit }}{% if one.cards %}, of which {{ one.cards|length }} pictures{% endif %}</p>{{ cards(one.cards) }}</div>
{% endfor %}</div>
</section>
<section id="classes"><h2>Classes</h2>
<div class="wide"><table><thead><tr><th>Class</th><th>{{ unit|capitalize }}</th><th>Precision</th><th>Recall</th><th>F1</th>
{% if unit == "pixels" %}<th>IoU</th>{% endif %}{% if curve_chart %}<th>Average precision</th><th>Best threshold</th>{% endif %}</tr></thead>
<tbody>{% for one, curve in classes %}<tr><td>{{ one.label }}</td><td>{{ "{:,.0f}".format(one.support) }}</td>
{% for value in (one.precision, one.recall, one.f1) %}<td class="share">{{ number(value) }}{% if value == value %}<i style="width: {{ (100 * value)|round(1) }}%"></i>{% endif %}</td>{% endfor %}
{% if unit == "pixels" %}<td>{{ number(one.iou) }}</td>{% endif %}
{% if curve_chart %}<td>{{ number(curve.average_precision) if curve else "-" }}</td><td>{{ number(curve.best) if curve else "-" }}</td>{% endif %}</tr>{% endfor %}</tbody></table></div>
{% if more_classes %}<p class="soft">and {{ more_classes }} more, which the format json has</p>{% endif %}
{% if curve_chart %}<p class="soft">The best threshold is the score of the class from which on F1 is highest.</p>{% endif %}
</section>
{% endif %}
{% if number_charts %}
<section id="numbers"><h2>Predicted over true</h2><div class="charts">{% for one in number_charts %}{{ chart(one) }}{% endfor %}</div></section>
{% endif %}
{% if curve_chart or calibration_chart %}
<div class="charts">
{% if curve_chart %}<section id="thresholds"><h2>Precision and recall</h2>{{ chart(curve_chart) }}
<p class="soft">In brackets: average precision.</p></section>{% endif %}
{% if calibration_chart %}<section id="calibration"><h2>Calibration</h2>{{ chart(calibration_chart) }}
<p class="soft">The expected calibration error is {{ number(calibration.error) }}, the average distance of scores from the share that is right.
{% if calibrations and report.evaluation.temperature %}It was {{ number(calibrations[0].error) }} before the temperature of {{ number(report.evaluation.temperature) }} that the checkpoint has; on the images that it was fitted on, this flatters.
{% elif calibrations %}With a temperature, fitted on the other half of these samples, it would be {{ number(calibrations[1].error) }}; <code>flashtask operate</code> stores one.{% endif %}</p></section>{% endif %}
</div>
{% endif %}
{% if report.objects %}
<section id="objects"><h2>Errors of objects</h2>
<p class="soft">At an overlap of one half (of keypoints: a similarity). class: the wrong class; localisation: the right class at the wrong place;
duplicate: an object that was found already; missed: nothing was found; background: there is nothing.</p>
{% for kind, (count, own) in report.objects.items() %}<h3>{{ kind }}: {{ "{:,}".format(count) }}</h3><div class="gallery" style="display: block">{{ cards(own) }}</div>{% endfor %}
</section>
{% endif %}
{% if report.worst %}
<section id="worst"><h2>Worst samples</h2><p class="soft">Those with the largest error ({{ report.evaluation.scoring.error }}).</p>{{ cards(report.worst) }}</section>
{% endif %}
{% if report.uncertain %}
<section id="uncertain">{% if runs %}<h2>Disputed samples</h2><p class="soft">Those that some runs have right and others wrong.</p>{% else %}<h2>Most uncertain samples</h2><p class="soft">Those that the model is least sure of.</p>{% endif %}{{ cards(report.uncertain) }}</section>
{% endif %}
{% if slices %}
<section id="slices"><h2>Slices</h2>
<p class="soft">The {{ report.evaluation.scoring.metric }} of samples that have something in common, with its 95 % interval; the thin line is all samples.</p>
<div class="wide"><table><thead><tr><th>Samples with</th><th>Count</th><th>{{ report.evaluation.scoring.metric }}</th><th>Interval</th><th></th></tr></thead><tbody>
{% for one in slices %}{% for row in one.rows %}<tr><td>{{ one.column }} {{ row.value }}</td><td>{{ "{:,}".format(row.size) }}</td><td>{{ number(row.result) }}</td>
<td class="range">{{ number(row.low) }} to {{ number(row.high) }}</td><td><div class="bar"><u style="left: {{ one.whole|round(1) }}%"></u><i style="left: {{ row.left|round(1) }}%; width: {{ row.width|round(1) }}%"></i><b style="left: {{ row.middle|round(1) }}%"></b></div></td></tr>{% endfor %}{% endfor %}
</tbody></table></div>
{% if more_columns %}<p class="soft">Not shown: slices by {{ more_columns|join(", ") }}; <code>flashtask report RUN --slices COLUMN,COLUMN</code> shows those that it names.</p>{% endif %}
</section>
{% endif %}
{% if report.findings %}
<section id="data"><h2>The data</h2>
{% for title, count, advice, own in report.findings %}<h3>{{ title }}: {{ "{:,}".format(count) }}</h3><p class="soft">{{ advice }}</p>{{ cards(own) }}{% endfor %}
</section>
{% endif %}
{% if report.evaluation %}<footer>The interval is a {{ (report.several.over_samples if runs else report.evaluation.interval()).method or "single value" }}. {{ report.heat_maps }}</footer>{% endif %}
</body>
</html>
"""

#: Everything but numbers and pictures; see `Report.to_html`.
PAGE = HEAD + STYLE + MACROS + _BODY
