"""What a stage's function is given, its fingerprint holds; and a fingerprint is computed once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from croco.config.load import from_dict
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.pipeline import node as node_module
from croco.pipeline.graph import nodes
from croco.pipeline.node import settings_values

# every kind of stage: translated prompts, all scorers, gold completions, another policy's completions, an arena
WORLD: dict[str, Any] = {
    "run": {"name": "all", "languages": ["en", "da"], "held_out_languages": ["sv"]},
    "prompts": {"source": "lab", "limit": 6, "order": "seed"},
    "policy": {"instruction": {"da": "Svar på dansk.", "en": "Answer in English."}},
    "translate": {"model": "lab:translator"},
    "alignment": {"model": "lab:translator", "targets": 2, "codes": {"da": "dan"}},
    "judge": {"model": "lab:policy"},
    "sampling": {"stop": ["\n\n"]},
    "evaluation": {"limit": 2, "base_temperatures": [0.5]},
    "arena": {"source": "lab", "split": "dev", "languages": ["en", "da"], "limit": 2, "max_new_tokens": 9},
    "arms": {
        "reward": {},
        "random": {"scorer": "random", "languages": ["en"]},
        "likelihood": {"scorer": "likelihood"},
        "verified": {"scorer": "verified"},
        "alignment": {"scorer": "alignment"},
        "gold": {"chosen": "reference"},
        "later": {"start": "reward", "part": [1, 2]},
        "other": {"sampler": {"model": "lab:other"}},
        "english": {"languages": ["en"]},
        "implicit": {"scorer": "implicit", "implicit": {"arm": "english"}},
    },
}
# not in a fingerprint although a function gets them: they name or open a model whose content is in it
OPENING = {"trust_remote_code", "revision", "evaluation"}


def test_a_fingerprint_is_computed_once_for_each_node(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    digest = node_module.digest
    monkeypatch.setattr(node_module, "digest", lambda value: digests.append(1) or digest(value))
    every = nodes(recipe_of(WORLD))
    assert len({node.fingerprint for node in every for _ in range(3)}) == len(every)
    assert len(digests) == len(every)
    assert repr(every[0]) == "Node(prompts in runs/all/prompts)"


def recipe_of(values: dict[str, Any]) -> Recipe:
    return from_dict({**values, "arms": dict(values["arms"])})


def changes(section: BaseModel, key: str = "") -> Iterator[tuple[str, Any]]:
    """Other values for the settings of a recipe, by their dotted keys."""
    for name, field in type(section).model_fields.items():
        value, where = getattr(section, name), f"{key}{name}"
        if isinstance(value, BaseModel):
            yield from changes(value, f"{where}.")
        elif isinstance(value, dict):
            for inner, below in value.items():
                if isinstance(below, BaseModel):
                    yield from changes(below, f"{where}.{inner}.")
                elif isinstance(below, str):
                    yield f"{where}.{inner}", below + "x"
        elif isinstance(value, bool):
            yield where, not value
        elif isinstance(value, int | float):
            yield from ((where, other) for other in (value + 1, value * 0.5))
        elif get_origin(field.annotation) is Literal:
            yield from ((where, other) for other in get_args(field.annotation) if other != value)
        elif isinstance(value, tuple):
            yield from ((where, list(other)) for other in (value[:-1], value[1:]) if value)


def put(values: Any, key: str, value: Any) -> Any:
    name, _, rest = key.partition(".")
    return {**values, name: put(values.get(name) or {}, rest, value) if rest else value}


def seen(value: Any) -> Any:
    """What counts of a value that a stage's function gets."""
    if isinstance(value, BaseModel):
        return {name: seen(one) for name, one in value if name not in OPENING}
    return value


def test_whatever_a_function_is_given_is_in_its_fingerprint() -> None:
    before = {node.title: node for node in nodes(recipe_of(WORLD))}
    assert {title.partition("/")[0] for title in before} >= {
        "translate", "score-references", "arena-prompts", "arena-sample", "arena", "results",
    }  # fmt: skip
    tried, moved = 0, set()
    for key, value in changes(recipe_of(WORLD)):
        if key.startswith("runtime.") or (key.startswith("arms.") and not key.startswith("arms.reward.")):
            continue
        try:
            after = {node.title: node for node in nodes(recipe_of(put(WORLD, key, value)))}
        except (UserError, ValueError):
            continue  # no recipe
        tried += 1
        for title in before.keys() & after.keys():
            old, new = before[title], after[title]
            given = [
                {name: seen(one) for name, one in settings_values(n.settings).items()} for n in (old, new)
            ]
            if given[0] != given[1]:
                moved.add(title)
                assert old.fingerprint != new.fingerprint, (key, value, title)
    assert tried > 150
    assert {title.partition("/")[0] for title in moved} >= {
        "prompts", "translate", "sample", "score", "pair", "train", "evaluate", "arena", "results",
    }  # fmt: skip
