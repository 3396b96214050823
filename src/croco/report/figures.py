"""The report's figures as SVG text, to stand inside the page.

Each figure is a narrow panel that a phone shows at its own size and a desktop sets side by side. Colours are
written as CSS variables of the page, so light and dark are the stylesheet's business; text stays text
(`svg.fonttype` none) and takes the page's font. Which numbers are shown, and whether they mean anything, is
decided before they come here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any

import numpy as np
import polars as pl
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from croco.report.tables import Board

# Stand-ins that no other colour uses, exchanged for the page's variables once matplotlib has drawn.
INK, MUTED, RULE, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#0501{number:02x}" for number in range(8))
MODE_COLOURS = {
    "good": "#060101", "right-language": "#060101", "careful-wrong": "#060102", "terse": "#060103",
    "rambling": "#060104", "wrong-language": "#060105", "evasive": "#060106", "malformed": "#060107",
    "unknown": "#060107",
}  # fmt: skip
OTHER_MODE = "#060107"
CHOSEN, REJECTED = "#070101", "#070102"
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper", CHOSEN: "--chosen", REJECTED: "--rejected",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES)},
    **{f"#06010{number}": f"--mode-{number}" for number in range(1, 8)},
}  # fmt: skip
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "svg.hashsalt": "croco",
    "font.family": "sans-serif", "font.size": 8.5,
    "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": RULE, "xtick.color": RULE, "ytick.color": RULE,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": INK, "axes.linewidth": 0.8, "xtick.major.width": 0.8,
    "xtick.major.size": 3, "ytick.major.size": 0, "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "figure.facecolor": "none", "axes.facecolor": "none", "lines.linewidth": 1.4,
    "path.simplify": True, "axes.unicode_minus": True, "axes.titlesize": 9, "axes.titlelocation": "left",
}  # fmt: skip
WIDTH = 358  # px: what a 390 px phone leaves
SMALL_WIDTH = 262  # px: four of them on a desktop
_POINTS = 0.75  # per px


def variable(colour: str) -> str:
    """The CSS variable that a figure's colour stands for, for the page's legends."""
    return _VARIABLES[colour]


def mode_colour(mode: str) -> str:
    return MODE_COLOURS.get(mode, OTHER_MODE)


def _draw(
    name: str, description: str, height: int, paint: Callable[[Figure], None], width: int = WIDTH
) -> str:
    """An SVG element of the given size in px, ids made unique by `name`, colours the page's variables."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(width * _POINTS / 72, height * _POINTS / 72))
        paint(figure)
        out = StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(out.getvalue(), name, description, width)


def _axes(figure: Figure, labels: Sequence[str], bottom: int = 40, right: int = 6) -> Axes:
    """Axes that leave room, in px, for the row labels at the left; reckoned here, as matplotlib's layout
    engine takes most of a page's time.
    """
    width, height = (72 * inches / _POINTS for inches in figure.get_size_inches())
    left = 12 + 6.6 * max((len(label) for label in labels), default=4)
    return figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - bottom - 4) / height)
    )


def _for_page(svg: str, name: str, description: str, width: int) -> str:
    """Matplotlib's file as an element of the page: no prologue, no style of its own, sized by the page,
    small.
    """
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


def temperature_colours(temperatures: Iterable[float]) -> dict[float, str]:
    """One colour per temperature, the highest first; greedy always has the second."""
    sampled = iter((SERIES[0], *SERIES[2:]) * 4)
    return {t: SERIES[1] if t == 0 else next(sampled) for t in sorted(temperatures, reverse=True)}


def gains(
    board: Board, arm: str, members: Mapping[str, Sequence[str]], name: str, limits: tuple[float, float]
) -> str:
    """Difference from the base per group and language, with intervals: one row each, one mark per
    temperature.

    `members` are the languages of each group, which the rows keep together.
    """
    temperatures = sorted(board.temperatures(arm), reverse=True)
    blocks = [
        board.groups,
        *([code for code in codes if code in board.languages] for codes in members.values()),
    ]
    scopes = [scope for block in blocks for scope in block]
    scale = 100 if board.is_share else 1
    colours = temperature_colours(temperatures)
    gaps = [0.6 * number for number, block in enumerate(filter(None, blocks)) for _ in block]
    places = [place + gap for place, gap in enumerate(gaps)]

    def paint(figure: Figure) -> None:
        axes = _axes(figure, scopes)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        offsets = np.linspace(-0.17, 0.17, len(temperatures)) if len(temperatures) > 1 else [0.0]
        for offset, temperature in zip(offsets, temperatures, strict=True):
            cells = [board.cell(arm, temperature, scope) for scope in scopes]
            shown = [(place + offset, *cell.difference) for place, cell in zip(places, cells, strict=True)
                     if cell is not None and cell.difference is not None]  # fmt: skip
            if not shown:
                continue
            rows, values, lows, highs = np.array(shown).T
            colour = colours[temperature]
            axes.hlines(rows, scale * lows, scale * highs, color=colour, linewidth=1.1)
            axes.plot(scale * values, rows, "o", color=colour, markersize=4, markeredgewidth=1.1,
                      markerfacecolor=PAPER if temperature == 0 else colour)  # fmt: skip
        axes.set_yticks(places, scopes)
        for label, scope in zip(axes.get_yticklabels(), scopes, strict=True):
            label.set_fontweight("bold" if scope in board.groups else "normal")
        axes.set_ylim(max(places) + 0.6, -0.6)
        axes.set_xlim(scale * limits[0], scale * limits[1])
        axes.grid(axis="x", color=RULE, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.set_xlabel("points" if board.is_share else "score")

    return _draw(
        name, f"{arm}: difference from the base in {board.title}", 60 + int(19 * (max(places) + 1)), paint
    )


def gain_limits(board: Board) -> tuple[float, float]:
    """One x range for all arms of a board, with zero in it and a little air."""
    ends = [
        end
        for cell in board.cells.values()
        if cell.difference
        for end in (cell.difference.low, cell.difference.high)
    ]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    air = 0.04 * ((high - low) or 1.0)
    return low - air, high + air


def modes(
    shares: Mapping[str, Mapping[str, float]], order: Sequence[str], name: str, description: str
) -> str:
    """Stacked bars: one row per setting, its shares of the modes from left to right; the first mode's share
    in figures.
    """
    rows = list(shares)

    def paint(figure: Figure) -> None:
        axes = _axes(figure, rows, bottom=24, right=22)
        left = np.zeros(len(rows))
        for mode in order:
            share = np.array([100 * shares[row].get(mode, 0.0) for row in rows])
            axes.barh(
                range(len(rows)),
                share,
                left=left,
                height=0.66,
                color=mode_colour(mode),
                edgecolor=PAPER,
                linewidth=0.6,
            )
            if mode == order[0]:
                for place in map(int, np.flatnonzero(share >= 9)):
                    axes.text(
                        1.5,
                        place,
                        f"{share[place]:.0f}",
                        color=PAPER,
                        va="center",
                        fontsize=8,
                        fontweight="bold",
                    )
            left += share
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 50, 100], ["0", "50", "100 %"])
        axes.spines["bottom"].set_visible(False)

    return _draw(name, description, 34 + 22 * len(rows), paint)


def score_ridges(
    scores: pl.DataFrame, pairs: pl.DataFrame, languages: Sequence[str], name: str, arm: str
) -> str:
    """Per language the distribution of all scores (filled), of the chosen and of the rejected (lines), equal
    in area; at the right how many of the arm's chosen and rejected completions are in the language.
    """
    parts = {
        language: (
            scores.filter(pl.col("language") == language)["score"].to_numpy(),
            pairs.filter(pl.col("chosen_language") == language)["chosen_score"].drop_nulls().to_numpy(),
            pairs.filter(pl.col("rejected_language") == language)["rejected_score"].drop_nulls().to_numpy(),
        )
        for language in languages
    }
    ends = [scores["score"].quantile(q) or 0.0 for q in (0.001, 0.999)]
    if pairs.height:
        sides = (("rejected_score", 0.01), ("chosen_score", 0.99))
        ends += [end for name, q in sides if (end := pairs[name].quantile(q)) is not None]
    air = 0.06 * ((max(ends) - min(ends)) or 1.0)
    edges = np.linspace(min(ends) - air, max(ends) + air, 61)
    centres = (edges[1:] + edges[:-1]) / 2

    def paint(figure: Figure) -> None:
        axes = _axes(figure, languages, right=44)
        for place, (_, chosen, rejected) in enumerate(parts.values()):
            everything, *picked = (_density(values, edges) for values in parts[languages[place]])
            top = max(float(curve.max()) for curve in (everything, *picked)) or 1.0
            axes.fill_between(
                centres, place, place - 0.85 * everything / top, color=MUTED, alpha=0.3, linewidth=0
            )
            axes.axhline(place, color=RULE, linewidth=0.5)
            for curve, colour in zip(picked, (CHOSEN, REJECTED), strict=True):
                axes.plot(
                    centres,
                    np.where(curve > 1e-4, place - 0.85 * curve / top, np.nan),
                    color=colour,
                    linewidth=1.2,
                )
            for lift, values, colour in ((0.42, chosen, CHOSEN), (0.08, rejected, REJECTED)):
                axes.text(1.13, place - lift, f"{len(values):,}", color=colour, fontsize=7.5, ha="right",
                          transform=axes.get_yaxis_transform())  # fmt: skip
        axes.set_yticks(range(len(languages)), languages)
        axes.set_ylim(len(languages) - 0.85, -1.0)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel("score")

    description = f"{arm}: scores of all, chosen and rejected completions per language"
    return _draw(name, description, 46 + 38 * len(languages), paint)


def _density(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """A smoothed histogram; all zero without values."""
    counts, _ = np.histogram(values, bins=edges)
    kernel = np.exp(-0.5 * (np.arange(-4, 5) / 1.5) ** 2)
    return np.convolve(counts / max(1, counts.sum()), kernel / kernel.sum(), mode="same")


def curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]], column: str, name: str, title: str) -> str:
    """One training metric over steps, one colour per arm: lines on training pairs, dots on pairs held out."""

    def paint(figure: Figure) -> None:
        axes = _axes(figure, ["0.000"])
        for colour, lines in zip(SERIES * 4, metrics.values(), strict=False):
            for validation in (False, True):
                points = [
                    (line["step"], line[column])
                    for line in lines
                    if (line.get("split", "train") != "train") == validation and line.get(column) is not None
                ]
                if points:
                    style = (
                        {"linestyle": "none", "marker": "o", "markersize": 3}
                        if validation
                        else {"linewidth": 1.1}
                    )
                    axes.plot(*zip(*points, strict=True), color=colour, **style)
        axes.set_xlabel("step")
        axes.grid(axis="y", color=RULE, linewidth=0.5)
        axes.tick_params(axis="y", labelcolor=MUTED)
        axes.set_axisbelow(True)

    return _draw(name, f"{title} over training steps", 150, paint, width=SMALL_WIDTH)
