"""Ways of writing arms: `rounds` and `[sweep]` become ordinary arms before a recipe is checked."""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

Values = dict[str, Any]
MAX_ROUNDS = 100
MAX_POINTS = 1000  # of a grid


def expanded(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Values:
    """The recipe's values with the arms that `[sweep]` and `rounds` make; `defaults` are an arm's."""
    values = dict(values)
    if isinstance(values.get("arms"), dict):
        _expand_sweeps(values, defaults)
        values["arms"] = _expand_rounds(values["arms"])
    return values


def _expand_rounds(arms: Mapping[str, Any]) -> Values:
    """NAME with rounds = 3 becomes NAME-1, NAME-2 and NAME, each from the one before; the last is evaluated."""
    result: Values = {}
    for name, arm in arms.items():
        rounds = arm.get("rounds", 1) if isinstance(arm, dict) else 1
        if (
            isinstance(rounds, bool)
            or not isinstance(rounds, int)
            or not 2 <= rounds <= MAX_ROUNDS
            or "part" in arm
            or arm.get("sampler")
        ):
            result[name] = arm  # what is wrong with it, the arm's own checks say
            continue
        before, reference = arm.get("start"), arm.get("reference", "base")
        for number in range(1, rounds + 1):
            last = number == rounds
            round_name = name if last else f"{name}-{number}"
            if not last and round_name in arms:
                raise ValueError(f"arms.{round_name} is a round of arms.{name}: expected another name")
            made = {
                **arm,
                "rounds": 1,
                "part": [number, rounds],
                "reference": reference if before else "base",
            }
            result[round_name] = (
                made | ({"start": before} if before else {}) | ({} if last else {"evaluated": False})
            )
            before = round_name
    return result


def _expand_sweeps(values: Values, defaults: Mapping[str, Any]) -> None:
    sweeps = values.get("sweep")
    if not isinstance(sweeps, dict):
        return
    named = {str(sweeps["of"]): sweeps} if "of" in sweeps else sweeps
    arms, made = dict(values["arms"]), {}
    for name, sweep in named.items():
        if not isinstance(sweep, dict) or "arms" in sweep:
            made[name] = sweep  # made already, or no sweep: the recipe's checks say
            continue
        made[name], new = _grid(name, sweep, values, defaults)
        for arm, section in new.items():
            if arm in arms:
                raise ValueError(
                    f"sweep.{name} makes arms.{arm}, which is there already: expected another name"
                )
            arms[arm] = section
    values["sweep"], values["arms"] = made, arms


def _grid(name: str, sweep: Values, values: Values, defaults: Mapping[str, Any]) -> tuple[Values, Values]:
    """A resolved sweep, and its new arms; a point that is the arm itself makes none."""
    of, arms = str(sweep.get("of")), values["arms"]
    if of not in arms or not isinstance(arms[of], dict):
        raise ValueError(f"sweep.{name}.of = '{of}', expected an arm: one of {', '.join(arms)}")
    grid = {key: value for key, value in sweep.items() if key != "of"}
    for key, options in grid.items():
        if key.split(".")[0] not in defaults or not isinstance(options, list) or not options:
            raise ValueError(
                f"sweep.{name}.{key} = {options!r}, expected a key of an arm with a list of its values"
            )
    if (points := math.prod(map(len, grid.values()))) > MAX_POINTS:
        raise ValueError(f"sweep.{name} makes {points:,} arms, expected at most {MAX_POINTS:,}")
    places: dict[str, Values] = {}
    new: Values = {}
    for point in itertools.product(*grid.values()):
        place = dict(zip(grid, point, strict=True))
        if all(_value(values, of, key, defaults) == value for key, value in place.items()):
            places[of] = place
            continue
        arm = "-".join([of, *(_label(key, value) for key, value in place.items())])
        if arm in new:
            raise ValueError(f"sweep.{name} makes arms.{arm} twice: expected different values")
        places[arm], new[arm] = place, _set(arms[of], place)
    return {"of": of, "grid": grid, "arms": places}, new


def _value(values: Values, of: str, key: str, defaults: Mapping[str, Any]) -> Any:
    """What an arm has under a key, by itself, by the recipe's common section, or by default."""
    if key == "languages":
        return values["arms"][of].get(key) or _section(values, "run").get("languages")
    if key == "completions":
        default = defaults["sampling.completions"]
        return values["arms"][of].get(key) or _section(values, "sampling").get(key, default)
    for source in (values["arms"][of], values, defaults):
        value: Any = source
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
        if value is not None:
            return value
    return None


def _section(values: Values, name: str) -> Mapping[str, Any]:
    """A section, empty where it is none: what is wrong with it, the recipe's checks say."""
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def _label(key: str, value: Any) -> str:
    """A grid value in an arm's name: "min", "8-completions", "en-da", "beta-0-05"."""
    last = key.rpartition(".")[2]
    if isinstance(value, list | tuple):
        text = "-".join(map(str, value))
    elif isinstance(value, str):
        text = value.replace("+", "-plus-")
    elif last == "completions":
        text = f"{value}-{last}"
    else:
        text = f"{last}-{value:g}" if isinstance(value, float) else f"{last}-{value}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _set(arm: Values, place: Mapping[str, Any]) -> Values:
    result = dict(arm)
    for key, value in place.items():
        below, parts = result, key.split(".")
        for part in parts[:-1]:
            below[part] = dict(below.get(part, {}))
            below = below[part]
        below[parts[-1]] = value
    return result
