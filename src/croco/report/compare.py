"""Two runs beside each other: what differs in their recipes, and what differs in their results.

Results are compared arm by arm on the prompts that both runs have in the same words, paired by prompt, by the same
statistics that compare an arm with the base within a run: the first run stands where the base does. What only one run
has is named and left out; nothing is averaged over unequal sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.pipeline.inputs import eval_prompts_of
from croco.pipeline.progress import count_of
from croco.pipeline.status import flat
from croco.report.load_run import read_recipe, require
from croco.report.scores import ARENA, REWARD, Board, Cell, Key, board_of, boards
from croco.report.table import enumerate_words, temperature_name
from croco.stages.evaluate.results import BASE, GROUPS, groups_of, on_common_prompts, summarise
from croco.storage.records import read_record
from croco.storage.seeds import digest
from croco.storage.shards import read_table

UNTUNED = "base, untuned"
ABSENT = "not set"
UNLIKE = {REWARD: "reward model", ARENA: "judge"}  # what must be the same for numbers to be compared
_PROMPT = ["prompt_id", "language"]
_SETTING = ["arm", "temperature"]


@dataclass(frozen=True)
class Setting:
    """One key of the recipe whose value differs."""

    key: str
    first: str
    second: str
    runtime: bool  # changes how a run is made, not what it finds


@dataclass(frozen=True)
class Comparison:
    """Two runs: names, settings that differ, what could not be compared, and the boards of the second minus the first.

    In a board the differences are the second run's minus the first's, the values the second's; `firsts` are the first's
    values under (benchmark, arm, temperature, scope)."""

    names: tuple[str, str]
    settings: list[Setting]
    notes: list[str]
    arms: list[str]
    boards: list[Board]
    firsts: Mapping[tuple[str, str, float, str], Cell]
    groups: Mapping[str, Sequence[str]]


def compare(first: Path, second: Path) -> Comparison:
    """Compare two finished runs. Raises UserError when one has no results, or when they share no arm or prompt."""
    folders = (first, second)
    recipes = [read_recipe(folder) for folder in folders]
    names = _names(folders, recipes)
    arms = [arm for arm in recipes[0].evaluated_arms if arm in recipes[1].evaluated_arms]
    notes = _only(names, "arm", [recipe.evaluated_arms for recipe in recipes])
    for folder, recipe in zip(folders, recipes, strict=True):
        require(folder, [eval_prompts_of(recipe)[0], "evaluate/base", *(f"evaluate/{arm}" for arm in arms)])
    frames = [
        _values(folder, [BASE, *arms], recipe.arena.temperature if recipe.arena else 0.0)
        for folder, recipe in zip(folders, recipes, strict=True)
    ]
    frames, unlike_judges = _judged_alike(folders, arms, frames)
    notes += unlike_judges
    if any(frame.is_empty() for frame in frames):
        raise UserError(f"{names[0]} and {names[1]}: {' '.join(unlike_judges)} Nothing else to compare")
    texts = [_texts(folder, recipe) for folder, recipe in zip(folders, recipes, strict=True)]
    frames, left_out = _shared(names, frames, texts)
    groups, unlike = _groups(recipes)
    notes += [*left_out, *unlike]
    cells: dict[str, dict[Key, Cell]] = {}
    firsts: dict[tuple[str, str, float, str], Cell] = {}
    for arm in [BASE, *arms]:
        shown = UNTUNED if arm == BASE else arm
        # the first run stands where the base does
        sides = zip(frames, (BASE, shown), strict=True)
        rows = pl.concat(
            [side.filter(pl.col("arm") == arm).with_columns(arm=pl.lit(name)) for side, name in sides]
        )
        results = summarise(rows, groups, recipes[0].run.seed, recipes[0].evaluation.bootstrap)
        for board in boards(results, [shown], recipes[0].run.evaluated):
            for (name, temperature, scope), cell in board.cells.items():
                if name == shown:
                    cells.setdefault(board.benchmark, {})[name, temperature, scope] = cell
                else:
                    firsts[board.benchmark, shown, temperature, scope] = cell
    codes = [code for code in recipes[0].run.evaluated if code in recipes[1].run.evaluated]
    names_of_arms = [*arms, UNTUNED]
    merged = [board_of(benchmark, of, names_of_arms, codes, {}) for benchmark, of in cells.items()]
    return Comparison(names, _settings(recipes), notes, names_of_arms, merged, firsts, groups)


def _names(folders: Sequence[Path], recipes: Sequence[Recipe]) -> tuple[str, str]:
    """The runs' own names, or their folders' where those are the same."""
    names = [recipe.run.name for recipe in recipes]
    if names[0] == names[1]:
        names = [folder.resolve().name for folder in folders]
    if names[0] == names[1]:
        names = [str(folder) for folder in folders]
    return names[0], names[1]


def _settings(recipes: Sequence[Recipe]) -> list[Setting]:
    first, second = (
        {key: _word(value) for key, value in flat(recipe.model_dump(mode="json")).items() if value != {}}
        for recipe in recipes
    )
    alone = {arm for arm in (*recipes[0].arms, *recipes[1].arms) if any(arm not in r.arms for r in recipes)}

    def said_elsewhere(key: str) -> bool:
        """Of an arm that one run has alone, or what both runs' arms have from [training] or [guards]."""
        section, _, rest = key.partition(".")
        arm, _, common = rest.partition(".")
        inherited = common in first and all(side.get(key) == side.get(common) for side in (first, second))
        return section == "arms" and (arm in alone or inherited)

    settings = [
        Setting(key, first.get(key, ABSENT), second.get(key, ABSENT), key.startswith("runtime."))
        for key in dict.fromkeys((*first, *second))
        if key != "run.folder"
        and first.get(key, ABSENT) != second.get(key, ABSENT)
        and not said_elsewhere(key)
    ]
    return sorted(settings, key=lambda setting: setting.runtime)


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_word, value)) or "none"
    return ABSENT if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _only(names: Sequence[str], word: str, sets: Sequence[Sequence[Any]]) -> list[str]:
    """What one side has alone, a sentence per side."""
    sentences = []
    for here, there in ((0, 1), (1, 0)):
        if alone := [str(value) for value in sets[here] if value not in sets[there]]:
            s, verb = ("", "is") if len(alone) == 1 else ("s", "are")
            sentences.append(
                f"The {word}{s} {enumerate_words(alone)} {verb} only in {names[here]} and left out."
            )
    return sentences


def _values(folder: Path, arms: Sequence[str], arena_temperature: float) -> pl.DataFrame:
    """The verdicts of all arms, those of the arena as a benchmark of its own."""
    columns = ["arm", *_PROMPT, "temperature", "benchmark", "value"]
    parts = [read_table(folder / "evaluate" / arm, columns) for arm in arms]
    for arm in arms:
        if (folder / "arena" / arm / "stage.json").is_file():
            rows = read_table(folder / "arena" / arm, ["arm", *_PROMPT, "value"])
            given = {"temperature": pl.lit(arena_temperature), "benchmark": pl.lit(ARENA)}
            parts.append(rows.with_columns(**given).select(columns))
    return pl.concat(parts).with_columns(mode=pl.lit(""))


def _judged_alike(
    folders: Sequence[Path], arms: Sequence[str], frames: Sequence[pl.DataFrame]
) -> tuple[list[pl.DataFrame], list[str]]:
    """The verdicts of judges that are the same in both runs, and a sentence on the others: the scores of two reward
    models have no difference."""
    judges = {REWARD: ("evaluate/base", "reward"), ARENA: (f"arena/{arms[0]}" if arms else "", "judge")}
    kept, notes = list(frames), []
    for benchmark, (title, key) in judges.items():
        both = all(benchmark in frame["benchmark"] for frame in frames)
        if both and _judge(folders[0] / title, key) != _judge(folders[1] / title, key):
            kept = [frame.filter(pl.col("benchmark") != benchmark) for frame in kept]
            notes.append(f"Not judged by the same {UNLIKE[benchmark]}, so left out: '{benchmark}'.")
    return kept, notes


def _judge(folder: Path, key: str) -> list[Any]:
    """Which models or functions judged, each with its weight; how their numbers were kept does not matter."""
    given = read_record(folder)["science"]["settings"].get(key)
    parts = [given, *given.get("also", ())] if isinstance(given, dict) else [given]
    names = ("model", "function", "source", "weight")
    return [[part.get(name) for name in names] if isinstance(part, dict) else part for part in parts]


def _texts(folder: Path, recipe: Recipe) -> pl.DataFrame:
    """A digest of every test prompt's turns: one id may stand for different words in another run."""
    tables = [folder / eval_prompts_of(recipe)[0], folder / "arena-prompts"]
    parts = []
    for table in tables:
        if (table / "stage.json").is_file():
            rows = read_table(table, [*_PROMPT, "messages"])
            words = [digest(*(turn[part] for turn in turns for part in turn)) for turns in rows["messages"]]
            parts.append(rows.select(_PROMPT).with_columns(words=pl.Series(words, dtype=pl.Int64)))
    return pl.concat(parts)


def _shared(
    names: Sequence[str], frames: Sequence[pl.DataFrame], texts: Sequence[pl.DataFrame]
) -> tuple[list[pl.DataFrame], list[str]]:
    """The verdicts on what both runs have, prompts in the same words; and sentences on what only one has."""
    notes = []
    for column in ("benchmark", "temperature", "language"):
        sets = [frame[column].unique().sort().to_list() for frame in frames]
        if column == "temperature":
            sets = [[temperature_name(value) for value in values] for values in sets]
        notes += _only(names, column, sets)
    same = texts[0].join(texts[1], on=[*_PROMPT, "words"], how="semi").unique(_PROMPT)
    reworded = texts[0].join(texts[1], on=_PROMPT, how="semi").join(same, on=_PROMPT, how="anti").height
    kept: list[list[pl.DataFrame]] = [[], []]
    benchmarks = [
        name for name in frames[0]["benchmark"].unique(maintain_order=True) if name in frames[1]["benchmark"]
    ]
    lost = [0, 0]
    for benchmark in benchmarks:
        sides = [frame.filter(pl.col("benchmark") == benchmark) for frame in frames]
        pairs = sides[0].select(_SETTING).unique().join(sides[1].select(_SETTING).unique(), on=_SETTING)
        if pairs.is_empty():
            notes.append(
                f"The completions of '{benchmark}' were drawn at other temperatures: it is left out."
            )
            continue
        sides = [side.join(pairs, on=_SETTING, how="semi") for side in sides]
        usable = [side.join(same, on=_PROMPT, how="semi") for side in sides]
        if any(side.is_empty() for side in usable):
            raise UserError(
                f"{names[0]} and {names[1]} share no prompt of '{benchmark}' in the same words: nothing to compare"
            )
        both = pl.concat(
            [side.with_columns(arm=pl.lit(f"{i} ") + pl.col("arm")) for i, side in enumerate(usable)]
        )
        common = on_common_prompts(both)
        for place, side in enumerate(sides):
            whole = side.select(_PROMPT).n_unique()
            part = side.join(common.select(_PROMPT).unique(), on=_PROMPT, how="semi")
            lost[place] += whole - part.select(_PROMPT).n_unique()
            kept[place].append(part)
    if not kept[0]:
        raise UserError(
            f"{names[0]} and {names[1]} share no benchmark at one temperature: nothing to compare"
        )
    if any(lost):
        reason = f", {count_of(reworded, 'prompt')} of the same name in other words" if reworded else ""
        notes.append(
            f"Not all prompts have a verdict in both runs: {lost[0]:,} of {names[0]} and {lost[1]:,} of {names[1]} "
            f"(prompts by language{reason}) are left out, and the rest is compared."
        )
    return [pl.concat(parts) for parts in kept], notes


def _groups(recipes: Sequence[Recipe]) -> tuple[dict[str, list[str]], list[str]]:
    """The groups that hold the same languages in both runs, and a sentence on the others."""
    first, second = map(groups_of, recipes)
    unlike = [name for name in GROUPS if set(first[name]) != set(second[name])]
    same = {name: codes for name, codes in first.items() if name not in unlike and codes}
    if not unlike:
        return same, []
    return same, [
        f"Not the same languages in both runs, so not compared as a group: {enumerate_words(unlike)}."
    ]
