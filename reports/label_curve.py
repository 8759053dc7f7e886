"""A metric over the number of labels: intervals, what the last labels brought, and what more of them may bring."""

# ruff: noqa: E501 - a tag on two lines is harder to read

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flashtask.data.page_style import HEAD, page_template
from flashtask.reports.charts import label_chart
from flashtask.reports.page import MACROS, STYLE
from flashtask.reports.statistics import draws as resamples
from flashtask.reports.statistics import ends_of

__all__ = ["CurvePoint", "Forecast", "Gain", "Measured", "curve_page", "measured"]

_TIMES, _ROUNDING = 1000, 1e-9
#: The gain is counted from the largest size up to this share of all labels: about half of them.
_HALF = 0.6
#: Exponents of the power law that are tried, and points that it needs.
_EXPONENTS = np.linspace(0.05, 1.5, 30)
_LEAST_POINTS = 5

Array = np.ndarray[Any, np.dtype[np.float64]]


class CurvePoint(NamedTuple):
    """The metric at a number of labels.

    Args:
        labels: training samples.
        draws: the metric of each draw of so many of them.
        mean: over draws and validation samples.
        low: the lower end of its 95 % interval, over other draws and other validation samples.
        high: the upper end.
        deviation: standard deviation between draws: how much it matters which samples are labelled; NaN of one draw.
    """

    labels: int
    draws: tuple[float, ...]
    mean: float
    low: float
    high: float
    deviation: float


class Gain(NamedTuple):
    """The difference of the metric between two numbers of labels, on the same validation samples.

    Args:
        before: labels.
        after: labels.
        value: the difference.
        low: the lower end of its 95 % interval.
        high: the upper end.
    """

    before: int
    after: int
    value: float
    low: float
    high: float


class Forecast(NamedTuple):
    """The metric at twice as many labels, by a power law; and what the law predicted for the largest size.

    Args:
        labels: twice as many.
        value: the metric there.
        low: the lower end of the 95 % interval, over other draws and validation samples; not over other laws.
        high: the upper end.
        said: what the same law, fitted without the largest size, predicts for it.
        said_low: the lower end of its interval.
        said_high: the upper end.
    """

    labels: int
    value: float
    low: float
    high: float
    said: float
    said_low: float
    said_high: float


class Measured(NamedTuple):
    """What was measured with more and more labels.

    Args:
        points: from few labels to all.
        gain: of the labels since about half of them; None with too few points.
        forecast: for twice as many; None where no power law holds, or with too few points.
        why_no_forecast: in words; empty where there is one.
    """

    points: tuple[CurvePoint, ...]
    gain: Gain | None
    forecast: Forecast | None
    why_no_forecast: str


def measured(values: Mapping[int, Array], metric: str, groups: Sequence[str] | None = None) -> Measured:
    """Intervals, gain and forecast.

    Args:
        values: by number of labels, rising: (draws, validation samples), 1 or 0 for right and wrong, or errors.
        metric: `accuracy`, or `mae`: less is better.
        groups: of the validation samples, which are drawn together; None if there are none.
    """
    sizes = [*values]
    often = np.concatenate([*resamples(groups, values[sizes[0]].shape[1], _TIMES)], axis=1).astype(np.float64)
    often = often / often.sum(axis=0)
    generator = np.random.default_rng(0)
    means, spreads, points = {}, {}, []
    for size, own in values.items():
        drawn = generator.integers(0, len(own), (_TIMES, len(own)))
        means[size] = float(own.mean())
        spreads[size] = np.take_along_axis((own @ often).T, drawn, axis=1).mean(axis=1)
        of_draws = tuple(own.mean(axis=1).tolist())
        deviation = float(np.std(of_draws, ddof=1)) if len(own) > 1 else math.nan
        points.append(CurvePoint(size, of_draws, means[size], *ends_of(spreads[size]), deviation))
    gain = None
    if half := [size for size in sizes if size <= _HALF * sizes[-1]]:
        before, after = half[-1], sizes[-1]
        gain = Gain(before, after, means[after] - means[before], *ends_of(spreads[after] - spreads[before]))
    return Measured(tuple(points), gain, *_forecast(sizes, means, spreads, metric))


def curve_page(
    title: str,
    metric: str,
    measured: Measured,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    said: Sequence[str],
) -> str:
    """One page without scripts and network: the curve as SVG, a table, and what they say.

    Args:
        title: of the page.
        metric: its name.
        measured: what is drawn.
        columns: titles of the table.
        rows: cells of the table.
        said: sentences.
    """
    points = [(one.labels, one.mean, one.low, one.high) for one in measured.points]
    chart = label_chart(points, metric, None if measured.forecast is None else measured.forecast[:4])
    page: str = page_template(_PAGE).render(title=title, columns=columns, rows=rows, said=said, one=chart)
    return page


_PAGE = (
    HEAD
    + STYLE
    + MACROS
    + """\
<body>
<h1>{{ title }}</h1>
{% for sentence in said %}<p class="{{ 'lead' if loop.first else 'soft' }}">{{ sentence }}</p>
{% endfor %}
<div class="charts" style="max-width: 44rem">{% if one %}{{ chart(one) }}{% endif %}</div>
<div class="wide"><table><thead><tr>{% for head in columns %}<th style="text-align: right; overflow-wrap: normal; min-width: 0">{{ head }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr>{% for cell in row %}<td style="text-align: right; min-width: 0; white-space: nowrap">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<footer>The intervals are those of the mean over draws of so many labels, by resampling draws and validation samples
together.</footer>
</body>
</html>
"""
)


def _forecast(
    sizes: Sequence[int], means: Mapping[int, float], spreads: Mapping[int, Array], metric: str
) -> tuple[Forecast | None, str]:
    """What a power law says of twice as many labels, if it gets the largest size right from the smaller ones."""
    if len(sizes) < _LEAST_POINTS:
        return None, f"a power law needs {_LEAST_POINTS} numbers of labels"
    whole = np.stack([np.concatenate([[means[size]], spreads[size]]) for size in sizes])
    errors = 1 - whole if metric == "accuracy" else whole
    said = _power_law(np.array(sizes[:-1], float), errors[:-1], sizes[-1])
    beyond = _power_law(np.array(sizes, float), errors, 2 * sizes[-1])
    if metric == "accuracy":
        said, beyond = 1 - said, 1 - beyond
    low, high = ends_of(said[1:])
    if not low - _ROUNDING <= means[sizes[-1]] <= high + _ROUNDING:
        return None, (
            f"a power law through the smaller sizes says {low:.4f} to {high:.4f} for {sizes[-1]:,} labels, which have "
            f"{means[sizes[-1]]:.4f}"
        )
    ends = ends_of(beyond[1:])
    return Forecast(2 * sizes[-1], float(beyond[0]), *ends, float(said[0]), low, high), ""


def _power_law(sizes: Array, errors: Array, where: float) -> Array:
    """`a + b n^-c` with a and b of at least 0, fitted to errors (sizes, fits) by least squares; its values at `where`.

    a is the error that no number of labels takes away.
    """
    least = np.full(errors.shape[1], np.inf)
    found = np.zeros(errors.shape[1])
    for exponent in _EXPONENTS:
        falling = sizes**-exponent
        centred = falling - falling.mean()
        slope = np.maximum(centred @ errors / (centred @ centred), 0)
        base = errors.mean(axis=0) - slope * falling.mean()
        through_zero = falling @ errors / (falling @ falling)
        slope, base = np.where(base < 0, through_zero, slope), np.maximum(base, 0)
        loss = ((base + falling[:, None] * slope - errors) ** 2).sum(axis=0)
        is_better = loss < least
        least = np.where(is_better, loss, least)
        found = np.where(is_better, base + slope * where**-exponent, found)
    return found
