"""The report's figures as SVG text, to stand inside the page.

Each figure is a narrow panel that a phone shows at its own size and a desktop sets side by side. Colours are written as
CSS variables of the page, so light and dark are the stylesheet's business; text stays text (`svg.fonttype` none) and takes
the page's font. Which numbers are shown, and whether they mean anything, is decided before they come here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any

import numpy as np
import polars as pl
from matplotlib import rc_context
from matplotlib.figure import Figure

from croco.report.tables import Board, temperature_name

# Stand-ins that no other colour uses, exchanged for the page's variables once matplotlib has drawn.
INK, MUTED, RULE, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#0501{number:02x}" for number in range(8))
MODE_COLOURS = {
    "good": "#060101", "right-language": "#060101", "careful-wrong": "#060102", "terse": "#060103",
    "rambling": "#060104", "wrong-language": "#060105", "evasive": "#060106", "malformed": "#060107", "unknown": "#060107",
}  # fmt: skip
OTHER_MODE = "#060107"
CHOSEN, REJECTED = "#070101", "#070102"
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper", CHOSEN: "--chosen", REJECTED: "--rejected",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES)},
    **{f"#06010{number}": f"--mode-{number}" for number in range(1, 8)},
}  # fmt: skip
_STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "svg.hashsalt": "croco", "font.family": "sans-serif", "font.size": 8.5,
    "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": RULE, "xtick.color": RULE, "ytick.color": RULE,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": INK, "axes.linewidth": 0.8, "xtick.major.width": 0.8,
    "xtick.major.size": 3, "ytick.major.size": 0, "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "figure.facecolor": "none", "axes.facecolor": "none", "lines.linewidth": 1.4,
    "path.simplify": True, "axes.unicode_minus": True, "axes.titlesize": 9, "axes.titlelocation": "left",
}  # fmt: skip
WIDTH = 358  # px: what a 390 px phone leaves
_POINTS = 0.75  # per px


def variable(colour: str) -> str:
    """The CSS variable that a figure's colour stands for, for the page's legends."""
    return _VARIABLES[colour]


def mode_colour(mode: str) -> str:
    return MODE_COLOURS.get(mode, OTHER_MODE)


def _draw(name: str, description: str, height: int, paint: Callable[[Figure], None], width: int = WIDTH) -> str:
    """An SVG element of the given size in px, its ids made unique by `name`, its colours the page's variables."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(width * _POINTS / 72, height * _POINTS / 72), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)  # type: ignore[union-attr]
        paint(figure)
        out = StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(out.getvalue(), name, description, width)


def _for_page(svg: str, name: str, description: str, width: int) -> str:
    """Matplotlib's file as an element of the page: no prologue, no style of its own, sized by the page, small."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # its selector would reach the whole page
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"#0[1-7][0-9a-f]{4}", lambda match: f"var({_VARIABLES[match[0]]})", svg)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)  # a hundredth of a point is enough
    svg = re.sub(r"\s*\n\s*", " ", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    opening = f'<svg class="figure" role="img" aria-label="{escape(description)}" style="max-width:{width}px" {box[0]}>'
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)


def gains(board: Board, arm: str, name: str, limits: tuple[float, float]) -> str:
    """Difference from the base per group and language, with intervals: one row each, one mark per temperature."""
    temperatures = sorted(board.temperatures(arm), reverse=True)
    scopes = [*board.groups, *board.languages]
    scale = 100 if board.is_share else 1
    gap = 0.7  # between groups and languages
    places = [i + (gap if i >= len(board.groups) else 0) for i in range(len(scopes))]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axvline(0, color=MUTED, linewidth=0.8)
        offsets = np.linspace(-0.17, 0.17, len(temperatures)) if len(temperatures) > 1 else [0.0]
        for offset, temperature in zip(offsets, temperatures, strict=True):
            greedy = temperature == 0
            for place, scope in zip(places, scopes, strict=True):
                cell = board.cell(arm, temperature, scope)
                if cell is None or cell.difference is None:
                    continue
                value, low, high = (scale * number for number in cell.difference)
                colour = SERIES[1] if greedy else SERIES[0]
                axes.plot([low, high], [place + offset] * 2, color=colour, linewidth=1.1, solid_capstyle="butt")
                axes.plot(value, place + offset, "o", color=colour, markersize=4, markeredgewidth=1.1,
                          markerfacecolor=PAPER if greedy else colour)  # fmt: skip
        axes.set_yticks(places, scopes)
        for label, scope in zip(axes.get_yticklabels(), scopes, strict=True):
            label.set_fontweight("bold" if scope in board.groups else "normal")
        axes.set_ylim(max(places) + 0.6, -0.6)
        axes.set_xlim(scale * limits[0], scale * limits[1])
        axes.grid(axis="x", color=RULE, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.set_xlabel("points" if board.is_share else "score")

    return _draw(name, f"{arm}: difference from the base in {board.title}", 60 + 19 * len(scopes), paint)


def gain_limits(board: Board) -> tuple[float, float]:
    """One x range for all arms of a board, with zero in it and a little air."""
    ends = [end for cell in board.cells.values() if cell.difference for end in (cell.difference.low, cell.difference.high)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    air = 0.04 * ((high - low) or 1.0)
    return low - air, high + air


def modes(shares: Mapping[str, Mapping[str, float]], order: Sequence[str], name: str, description: str) -> str:
    """Stacked bars: one row per setting, its shares of the modes from left to right; the first mode's share in figures."""
    rows = list(shares)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for place, row in enumerate(rows):
            left = 0.0
            for mode in order:
                share = 100 * shares[row].get(mode, 0.0)
                axes.barh(place, share, left=left, height=0.66, color=mode_colour(mode), edgecolor=PAPER, linewidth=0.6)
                if mode == order[0] and share >= 9:
                    axes.text(left + 1.5, place, f"{share:.0f}", color=PAPER, va="center", fontsize=8, fontweight="bold")
                left += share
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 50, 100], ["0", "50", "100 %"])
        axes.spines["bottom"].set_visible(False)

    return _draw(name, description, 34 + 22 * len(rows), paint)


def score_ridges(scores: pl.DataFrame, pairs: pl.DataFrame, languages: Sequence[str], name: str, arm: str) -> str:
    """Per language the distribution of all scores (filled), of the chosen and of the rejected (lines), equal in area."""
    low, high = scores["score"].quantile(0.001) or 0.0, scores["score"].quantile(0.999) or 1.0
    edges = np.linspace(low, high if high > low else low + 1.0, 61)
    centres = (edges[1:] + edges[:-1]) / 2

    def density(values: np.ndarray) -> np.ndarray:
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
        kernel = np.exp(-0.5 * (np.arange(-4, 5) / 1.5) ** 2)
        return np.convolve(counts / max(1, counts.sum()), kernel / kernel.sum(), mode="same")

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for place, language in enumerate(languages):
            curves = [
                density(scores.filter(pl.col("language") == language)["score"].to_numpy()),
                density(pairs.filter(pl.col("chosen_language") == language)["chosen_score"].to_numpy()),
                density(pairs.filter(pl.col("rejected_language") == language)["rejected_score"].to_numpy()),
            ]
            top = max(float(curve.max()) for curve in curves) or 1.0
            heights = [place - 0.85 * curve / top for curve in curves]
            axes.fill_between(centres, place, heights[0], color=MUTED, alpha=0.3, linewidth=0)
            axes.plot(centres, heights[1], color=CHOSEN, linewidth=1.2)
            axes.plot(centres, heights[2], color=REJECTED, linewidth=1.2)
            axes.axhline(place, color=RULE, linewidth=0.5)
        axes.set_yticks(range(len(languages)), languages)
        axes.set_ylim(len(languages) - 0.85, -1.0)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel("score")

    return _draw(name, f"{arm}: scores of all, chosen and rejected completions per language", 46 + 38 * len(languages), paint)


def curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]], columns: Sequence[str], name: str, title: str) -> str:
    """Training curves over steps, one colour per arm; of several columns the second is dashed. Validation as dots."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for colour, lines in zip(SERIES * 4, metrics.values(), strict=False):
            for column, style in zip(columns, ("-", (0, (3, 1.5))), strict=False):
                for split, marker in (("train", ""), ("validation", "o")):
                    points = [(line["step"], line[column]) for line in lines if line.get("split", "train") == split
                              and line.get(column) is not None]  # fmt: skip
                    if points:
                        axes.plot(*zip(*points, strict=True), color=colour, linestyle=style if not marker else "none",
                                  marker=marker, markersize=3, linewidth=1.2)  # fmt: skip
        axes.set_title(title, color=INK)
        axes.set_xlabel("step")
        axes.grid(axis="y", color=RULE, linewidth=0.5)
        axes.tick_params(axis="y", labelcolor=MUTED)
        axes.set_axisbelow(True)

    return _draw(name, f"{title} over training steps", 170, paint)


def setting_name(arm: str, temperature: float) -> str:
    return f"{arm}, {temperature_name(temperature)}"
