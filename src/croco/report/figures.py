"""Curves of a study as SVG text: values with intervals over a number."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from croco.report.study import Curve

# told apart by lightness too, and by the markers
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vP"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "svg.hashsalt": "croco", "font.family": "sans-serif",
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "none",
    "axes.facecolor": "none", "text.color": "#010101", "axes.labelcolor": "#010101", "xtick.color": "#010101",
    "ytick.color": "#010101", "axes.edgecolor": "#010101",
}  # fmt: skip


def draw(curve: Curve, name: str) -> str:
    """An SVG element, ids made unique by `name`; its ink is the page's."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for place, (title, points) in enumerate(curve.series.items()):
            xs, values = [x for x, _ in points], [100 * i.value for _, i in points]
            errors = [
                [100 * (i.value - i.low) for _, i in points],
                [100 * (i.high - i.value) for _, i in points],
            ]
            style: dict[str, Any] = {
                "color": COLOURS[place % 6],
                "marker": MARKERS[place % 6],
                "label": title,
            }
            axes.errorbar(
                xs, values, yerr=errors, capsize=2, elinewidth=0.8, markersize=4, linewidth=1.3, **style
            )
        ticks = sorted({x for points in curve.series.values() for x, _ in points})
        if len(ticks) > 2 and ticks[-1] / max(ticks[0], 1e-9) >= 8:
            axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
        axes.set_xlabel(curve.x)
        axes.set_ylabel(curve.y)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        out = StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace("#010101", "currentColor")
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{curve.title}" ', 1)
