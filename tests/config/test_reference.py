"""docs/reference/recipe.md and the JSON schema are made from the records, and say of every key what it means."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

from croco.cli.main import app
from croco.config import reference
from croco.config.errors import known_keys
from croco.config.recipe import Recipe

ROOT = Path(__file__).parents[2]


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "reference" / "recipe.md").read_text()
    assert page.strip() == reference.markdown().strip(), (
        "run: croco schema --markdown > docs/reference/recipe.md"
    )


def test_every_key_is_on_the_page_with_a_meaning() -> None:
    page = reference.markdown()
    for key in known_keys(Recipe):
        section, _, below = key.partition(".")
        below = below.removeprefix("*.").replace("*", "NAME")
        if section == "sweep" or not below or key.startswith(("arms.*.guards.", "arms.*.training.")):
            continue
        assert f"`{below}`" in page or f"`{below}." in page, key
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert not [row for row in rows if row.endswith("|  |")]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_the_schema_takes_every_recipe(path: Path) -> None:
    jsonschema.validate(tomllib.loads(path.read_text()), reference.schema())


def test_the_schema_refuses_what_the_recipe_refuses() -> None:
    shown = CliRunner().invoke(app, ["schema"])
    schema = json.loads(shown.output)
    good = {"run": {"name": "x", "languages": ["en"]}, "arms": {"a": {}}}
    jsonschema.validate(good, schema)
    for wrong in (
        {"sampling": {"completion": 3}},
        {"sampling": {"completions": 1}},
        {"policy": {"model": 3}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(good | wrong, schema)
