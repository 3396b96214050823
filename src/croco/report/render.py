"""A `Table` as Markdown, as LaTeX in the layout of the paper (package booktabs), and for a terminal of 80 columns."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from croco.errors import printable
from croco.report.table import Entry, Number, Part, Table, numbers

COLOURS = {"better": "green", "worse": "red"}
_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "±": r"$\pm$", "→": r"$\to$", "½": r"$\frac12$",
}  # fmt: skip


def markdown(table: Table) -> str:
    """Numbers as "61 [58, 64]", several of one entry with a slash between them."""
    rule = ["---"] * table.words + ["---:"] * (len(table.head) - table.words)
    rows = [
        [_words(entry, lambda number: number.with_interval, " / ") for entry in row] for row in table.rows
    ]
    lines = [table.head, rule, *rows]
    return "\n".join("| " + " | ".join(_one_line(cell) for cell in line) + " |" for line in lines) + "\n"


def parts_markdown(parts: Sequence[Part]) -> str:
    """Parts of a page: heading, paragraphs, tables with their titles above them; without curves."""
    lines = []
    for part in parts:
        lines += [f"## {part.title}", *part.text]
        for table in part.tables:
            lines += [*([f"{table.title}:"] if table.title else []), markdown(table).rstrip()]
    return "\n\n".join(lines) + "\n"


def _words(entry: Entry, write: Callable[[Number], str], between: str) -> str:
    if isinstance(entry, str):
        return entry
    return between.join(write(number) for number in numbers(entry))


def _one_line(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def words(text: str) -> Text:
    """A text for the terminal, which may be a model's or a server's: nothing in it steers the terminal."""
    return Text(printable(text))


def terminal(table: Table) -> RichTable:
    """Numbers as "61 ±3", several of one entry beneath each other; words fold where it is too narrow, numbers never."""
    shown = RichTable(
        title=words(table.title) if table.title else None, title_justify="left", box=box.SIMPLE_HEAD
    )
    for place, heading in enumerate(table.head):
        word = place < table.words
        shown.add_column(
            words(heading), justify="left" if word else "right", no_wrap=not word, overflow="fold"
        )
    for row in table.rows:
        shown.add_row(*(_terminal_cell(entry) for entry in row))
    return shown


def _terminal_cell(entry: Entry) -> Text:
    if isinstance(entry, str):
        return words(entry)
    lines = [
        Text(number.with_half_width, style=next((COLOURS[f] for f in number.flags if f in COLOURS), ""))
        for number in numbers(entry)
    ]
    return Text("\n").join(lines)


def escape(text: str) -> str:
    """Text that LaTeX sets as it stands."""
    return re.sub(r"[\\{}$&%#_~^−±→½]", lambda match: _SPECIAL[match[0]], text)


def latex(table: Table, intervals: bool = False) -> str:
    """A floating table: the first number of an entry, bold where it is the best, with its interval if asked for."""
    rows = [_row([_latex_cell(entry, intervals) for entry in row]) for row in table.rows]
    return "\n".join([
        r"\begin{table}", r"\centering\small", rf"\caption{{{escape(table.title)}}}",
        rf"\begin{{tabular}}{{{'l' * table.words}{'r' * (len(table.head) - table.words)}}}", r"\toprule",
        *_block_lines(table), _row(map(escape, table.head)), r"\midrule", *rows, r"\bottomrule",
        r"\end{tabular}", r"\end{table}",
    ])  # fmt: skip


def _row(cells: Sequence[str] | map[str]) -> str:
    return " & ".join(cells) + r" \\"


def _block_lines(table: Table) -> list[str]:
    if not table.blocks:
        return []
    heads, rules, start = [], [], table.words + 1
    for heading, width in table.blocks:
        heads.append(rf"\multicolumn{{{width}}}{{c}}{{{escape(heading)}}}")
        rules.append(rf"\cmidrule(lr){{{start}-{start + width - 1}}}")
        start += width
    return [_row([""] * table.words + heads), " ".join(rules)]


def _latex_cell(entry: Entry, intervals: bool) -> str:
    if isinstance(entry, str):
        return escape(entry)
    if not (shown := numbers(entry)):
        return "--"
    number = shown[0]
    text = rf"\textbf{{{escape(number.text)}}}" if "best" in number.flags else escape(number.text)
    ends = f" {{\\tiny [{escape(number.ends())}]}}" if intervals else ""
    return text + ends
