"""docs/paper.md and the paper recipes say the same, value by value."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from croco.config.load import load

ROOT = Path(__file__).parent.parent
NAMES = ("paper-eurollm-9b", "paper-tiny-aya")
ROW = re.compile(
    r"^\| (?P<what>[^|]*) \| [PSD, ]+ \| `(?P<key>[^`]+)` \| `(?P<theirs>[^`]+)` \|(?P<ours>[^|]*)\|"
)
TABLE = [
    found for line in (ROOT / "docs" / "paper.md").read_text().splitlines() if (found := ROW.match(line))
]


def value(recipe: str, key: str) -> Any:
    found: Any = load(ROOT / "recipes" / f"{recipe}.toml")
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return list(found) if isinstance(found, tuple) else found


def toml(text: str) -> Any:
    return tomllib.loads(f"value = {text}")["value"]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row["what"])
def test_a_line_of_the_table_is_what_the_recipes_say(row: re.Match[str]) -> None:
    of = {"9 B": NAMES[:1], "3 B": NAMES[1:]}
    for name in of.get(row["what"].rpartition(", ")[2], NAMES):
        assert value(name, row["key"]) == toml(row["theirs"]), name
        if ours := row["ours"].strip():
            expected = row["theirs"] if ours == "=" else ours.strip("`")
            assert value(f"{name}-croco", row["key"]) == toml(expected), f"{name}-croco"


def test_the_table_is_read_whole() -> None:
    lines = (ROOT / "docs" / "paper.md").read_text().split("## What no")[0].splitlines()
    assert len(TABLE) == sum(line.startswith("| ") for line in lines) - 1


def test_what_is_not_in_the_table_is_the_same_in_both_models_recipes() -> None:
    def rest(name: str) -> dict[str, Any]:
        values = load(ROOT / "recipes" / f"{name}.toml").model_dump(mode="json")
        for arm in values["arms"].values():
            arm.pop("sampler")  # each is the other's off-policy model
        del values["arena"]["temperature"]  # the table has it
        return {key: part for key, part in values.items() if key not in ("run", "policy")}

    for ending in ("", "-croco"):
        assert rest(NAMES[0] + ending) == rest(NAMES[1] + ending)


def test_every_language_has_a_model_of_its_own() -> None:
    for name in NAMES:
        recipe = load(ROOT / "recipes" / f"{name}.toml")
        assert len(recipe.run.languages) == 11
        for code in recipe.run.languages:
            for arm in (f"monolingual-{code}", f"max-r-{code}"):
                assert recipe.arms[arm].languages == (code,)
            assert recipe.arms[f"max-r-{code}"].training.method == "sft"
