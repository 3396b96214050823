"""The recipe's keys from the records themselves: a JSON schema for editors, and the page docs/reference/recipe.md."""

import json
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from croco.config.recipe import Recipe

# which stages read a section; [runtime] changes no table
READ_BY = {
    "run": "all",
    "prompts": "prompts",
    "translate": "translate, eval-translate",
    "policy": "sample, score, train, evaluate, arena-sample, euroeval",
    "reward": "score, score-references, evaluate",
    "judge": "arena",
    "alignment": "score",
    "sampling": "sample",
    "guards": "pair",
    "training": "train",
    "evaluation": "eval-prompts, evaluate, results",
    "euroeval": "euroeval",
    "arena": "arena-prompts, arena-sample, arena",
    "arms": "sample, score, pair, train",
    "sweep": "(makes arms)",
    "study": "(runs the recipe once a seed)",
    "runtime": "every stage, and no fingerprint",
}
HEAD = """# Every key of a recipe

Made from the records in `croco/config` by `croco schema --markdown`; a test compares them. A recipe is a sparse
TOML file: what is not written has its default. Any key can be set on the command line, as in
`--set sampling.completions=8`. The same as a JSON schema, for editors, is `croco schema` (see the end of this page).
"""
TAIL = """
## In an editor

`croco schema > recipe.schema.json`, then the first line of a recipe: `#:schema ./recipe.schema.json`. Taplo, and the VS
Code extension Even Better TOML, which is built on it, complete keys, show their meaning and mark what is wrong.
"""


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe as a person writes it: a sweep has the keys of an arm with lists of values."""
    made = Recipe.model_json_schema()
    written = {
        "type": "object",
        "description": "of = the arm; every other key of an arm with a list of its values",
    }
    made["$defs"]["Sweep"] = written
    made["properties"]["sweep"] |= {"additionalProperties": True}
    return {"$schema": "http://json-schema.org/draft-07/schema#"} | made


def markdown() -> str:
    parts = [HEAD]
    for name, field in Recipe.model_fields.items():
        title = {"arms": "[arms.NAME]", "sweep": "[sweep.NAME]"}.get(name, f"[{name}]")
        model = _model(field.annotation)
        assert model is not None
        parts.append(f"\n## {title}\n\n{_sentence(model)} Read by: {READ_BY[name]}.\n")
        if name == "sweep":
            parts.append(
                "\n`of` is the arm that is varied; every other key is an arm's, with a list of its values.\n"
            )
            continue
        parts.append("\n| Key | Type | Default | Meaning |\n|---|---|---|---|\n")
        skipped = ("guards", "training") if name == "arms" else ()
        parts += [f"| {' | '.join(_cell(cell) for cell in row)} |\n" for row in _rows(model, "", skipped)]
    return "".join([*parts, TAIL])


def _rows(
    model: type[BaseModel], prefix: str, skipped: tuple[str, ...]
) -> Iterator[tuple[str, str, str, str]]:
    for name, field in model.model_fields.items():
        key, below = prefix + name, _model(field.annotation)
        meaning = field.description or ""
        if below is None or name in skipped:
            yield f"`{key}`", _type(field.annotation, field), _default(field), meaning
        else:
            dotted = key + (".NAME." if get_origin(field.annotation) is dict else ".")
            if field.default is None or field.is_required():
                yield f"`{key}`", "a table", _default(field), meaning
            yield from _rows(below, dotted, ())


def _model(annotation: Any) -> type[BaseModel] | None:
    """The record behind a section, or a table or list of sections."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model(part))), None)


def _type(annotation: Any, field: FieldInfo | None = None) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(parts[0])
    if origin is Literal:
        return ", ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in parts)
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in parts if part is not type(None))
    if origin in (tuple, list):
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return "a table"
    names = {str: "text", bool: "true or false", int: "whole number", float: "number"}
    return names.get(annotation, "a table") + _bounds(field)


def _bounds(field: FieldInfo | None) -> str:
    signs = {"gt": "> ", "ge": "≥ ", "lt": "< ", "le": "≤ "}
    metadata = field.metadata if field else []
    bounds = [(sign, getattr(one, name, None)) for one in metadata for name, sign in signs.items()]
    shown = [f"{sign}{bound:,}" for sign, bound in bounds if bound is not None and abs(bound) < 10**8]
    return f" {', '.join(shown)}" if shown else ""


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "(needed)"
    if value is None:
        return "null"
    return "a table" if isinstance(value, BaseModel) else f"`{json.dumps(value, ensure_ascii=False)}`"


def _sentence(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
