"""One sentence for a recipe that does not validate: the first mistake, and the nearest known key."""

import difflib
from collections.abc import Sequence
from types import UnionType
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

# pydantic's error type → what was expected, in plain words; {…} come from the error's context
EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "literal_error": "one of {expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "finite_number": "a finite number",
    "too_short": "at least {min_length}",
    "string_pattern_mismatch": "small letters, digits and hyphens",
}


def sentence(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake of a validation error as one sentence; unknown keys before everything else."""
    errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    # pydantic names the key of a mapping and the branch of a union in brackets
    location = [str(part) for part in first["loc"] if "[" not in str(part)]
    key = ".".join(location)
    match first["type"]:
        case "extra_forbidden":
            return unknown_key(location, root)
        case "missing":
            return f"missing key '{key}'"
        case "value_error":
            message = str(first["ctx"]["error"])
            return f"{key}: {message}" if key else message
    expected = EXPECTED.get(first["type"], first["msg"]).format(**first.get("ctx", {}))
    if first["type"] == "too_short":
        return f"{key} is empty, expected {expected}"
    return f"{key} = {shown(first['input'])}, expected {expected}"


def shown(value: Any) -> str:
    """A value as the recipe would write it, cut to 60 characters."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def unknown_key(location: Sequence[str], root: type[BaseModel]) -> str:
    known = known_keys(root)
    pattern: list[str] = []
    for part in location:  # names of arms, sweeps and claims are the user's own
        any_name = ".".join([*pattern, "*."])
        pattern.append("*" if any(key.startswith(any_name) for key in known) else part)
    wanted, parent = ".".join(pattern), ".".join(pattern[:-1])
    siblings = [key for key in known if key.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(wanted, siblings, n=1, cutoff=0.7)
    near = near or [key for key in known if key.rpartition(".")[2] == pattern[-1]]
    near = near or difflib.get_close_matches(wanted, known, n=1, cutoff=0.6)
    hint = ""
    if near:
        names = near[0].split(".")
        names = [location[i] if name == "*" and i < len(location) else name for i, name in enumerate(names)]
        hint = f"; did you mean '{'.'.join(names)}'?"
    elif siblings:
        hint = f"; expected one of {', '.join(key.rpartition('.')[2] for key in siblings)}"
    return f"unknown key '{'.'.join(location)}'{hint}"


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a recipe, sections included; `arms.*` is any arm, and so for all such tables."""
    keys = []
    for name, field in model.model_fields.items():
        key = prefix + name
        keys.append(key)
        annotation: Any = field.annotation
        if isinstance(annotation, UnionType):  # a section that may be left out
            annotation = annotation.__args__[0]
        if get_origin(annotation) is dict and isinstance(annotation.__args__[1], type):
            annotation, key = annotation.__args__[1], key + ".*"
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys.extend(known_keys(annotation, key + "."))
    return keys
