"""What the page lets people look at: rows of several kinds, packed into the page within a budget of bytes.

Every kind is brought to one form, two captioned texts beside each other under a prompt (`rows.py`), so that the page
needs one list. All texts are kept once and the whole is deflated and written in base64, which also means that nothing a
model wrote stands in the page as markup. When all would make the page too large, a spread by digest is taken."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from croco.report.examples import Row, kinds_of
from croco.report.load_run import Run

# deflated bytes of one kind; a third more in the page
MAX_BYTES = {"pairs": 1_100_000, "comparisons": 700_000, "evaluations": 500_000, "left out": 250_000}
COLUMNS = (
    "arm", "prompt", "tags", "languages", "note", "first", "first text", "second", "second text", "order",
)  # fmt: skip


@dataclass
class Pack:
    """Rows as lists of numbers into one list of texts, and how large they are when deflated."""

    texts: dict[str, int] = field(default_factory=dict)
    prompts: dict[tuple[str, str], int] = field(default_factory=dict)
    turns: list[list[int]] = field(default_factory=list)  # of each prompt: role, content, role, content, ...
    kinds: dict[str, Any] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)  # the texts that the last row was the first to have

    def add(self, kind: str, about: Mapping[str, str], total: int, rows: Iterable[Row], budget: int) -> None:
        """Add rows in their order until `budget` deflated bytes are used."""
        packed: list[list[Any]] = []
        squeeze = zlib.compressobj(6)
        used = 0
        for row in rows:
            self.fresh.clear()
            packed.append(self._row(row))
            used += len(squeeze.compress(json.dumps([packed[-1], self.fresh]).encode()))
            if used > budget:
                break
        made = self.kinds.setdefault(kind, {**about, "total": 0, "rows": []})
        made["total"] += total
        keys, names = list(self.prompts), list(self.texts)
        made["rows"] = sorted(made["rows"] + packed, key=lambda row: (names[row[0]], keys[row[1]]))

    def _text(self, text: str) -> int:
        if text not in self.texts:
            self.texts[text] = len(self.texts)
            self.fresh.append(text)
        return self.texts[text]

    def _row(self, row: Row) -> list[Any]:
        place = self.prompts.setdefault((row.prompt_id, row.language), len(self.prompts))
        if place == len(self.turns):
            self.turns.append([])
        if row.messages and not self.turns[place]:
            self.turns[place] = [
                self._text(m[part] or "") for m in row.messages for part in ("role", "content")
            ]
        sides = [self._text(text) for side in row.sides for text in side]
        return [
            self._text(row.arm),
            place,
            [self._text(tag) for tag in row.tags],
            [self._text(code) for code in row.languages],
            self._text(row.note),
            *sides,
            *[-1] * (4 - len(sides)),
            row.order,
        ]

    def data(self) -> dict[str, Any]:
        prompts = [[*key, turns] for key, turns in zip(self.prompts, self.turns, strict=True)]
        return {"columns": COLUMNS, "texts": list(self.texts), "prompts": prompts, "kinds": self.kinds}


def packed(data: Mapping[str, Any]) -> str:
    """Data as base64 of deflated JSON: what the page's script unpacks."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def browse(runs: Mapping[str, Run], budgets: Mapping[str, int] = MAX_BYTES) -> dict[str, Any]:
    """All kinds of rows that the runs have, each a spread of at most `MAX_ROWS` and about its budget of bytes.

    With several runs an arm's name is preceded by its run's."""
    pack = Pack()
    for name, run in runs.items():
        for kind, (about, total, rows) in kinds_of(run).items():
            if total:
                named = (replace(row, arm=f"{name}: {row.arm}") for row in rows) if name else rows
                pack.add(kind, about, total, named, budgets[kind] // len(runs))
    return pack.data()
