"""The stages `prompts` and `eval-prompts`: parallel prompts from the lab, a JSONL or Parquet file, or a hub dataset.

Every turn of a conversation is kept. A row that is wrong (no JSON, no id, an unknown role, nothing to answer) stops the
stage with the file and the row, because half a data set is not the data set the recipe names; a row that is right but
cannot be carried (a message with tool calls) goes to the ledger. Languages that nobody asked for are counted, not read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.pipeline.fingerprint import prompts_settings
from croco.pipeline.node import Settings, settings_values
from croco.pipeline.stage import Work
from croco.stages.prompts.columns import FileRow, Turn, Unusable, warn_of_unread
from croco.stages.prompts.files import EXPECTED, SUFFIXES, Located, file_rows, kind
from croco.storage.hashing import canonical
from croco.storage.schemas import PROMPTS, ledger
from croco.storage.seeds import digest

FROM_SOURCE = ("split", "revision", "id_column", "language_column")  # settings that `load` takes as they are


@dataclass(frozen=True)
class Loaded:
    """Prompts in the source's order, the rows left out, and how many rows of each language nobody asked for."""

    prompts: pa.Table
    dropped: pa.Table
    not_asked_for: dict[str, int]
    beyond_limit: int
    unread: dict[str, int] = field(default_factory=dict)  # columns and message keys that are not read


def prompts(work: Work) -> None:
    """The prompts to tune on, in the tuned languages or the one they are translated from."""
    _stage(work, "prompts")


def eval_prompts(work: Work) -> None:
    """The prompts to evaluate on, in all languages or the one they are translated from."""
    _stage(work, "evaluation")


def arena_prompts(work: Work) -> None:
    """The arena's own prompts, in the languages it compares in."""
    _stage(work, "arena")


def _stage(work: Work, key: str) -> None:
    loaded = load_settings(work.settings, key)
    warn_of_unread(work.title, loaded.unread)
    ids = loaded.prompts.column("prompt_id")
    work.record(
        num_prompt_ids=len(ids.unique()),
        prompts_per_language=_counts(loaded.prompts),
        rows_of_other_languages=loaded.not_asked_for,
        rows_beyond_limit=loaded.beyond_limit,
        **({"not_read": loaded.unread} if loaded.unread else {}),
    )
    size, rows = work.runtime.shard_prompts, loaded.prompts.num_rows
    for index in work.todo(-(-rows // size)):
        part = loaded.prompts.slice(index * size, size)
        dropped = loaded.dropped if index == 0 else None
        read = part.num_rows + (dropped.num_rows if dropped is not None else 0)
        work.write(index, part, read={"prompt": read}, dropped=dropped)


def load_settings(settings: Settings, key: str) -> Loaded:
    """What a stage's settings ask for."""
    order, limit = settings.get("order"), settings["limit"]
    loaded = load(
        settings["source"],
        languages=settings["languages"],
        limit=limit if order is None else None,
        key=key,
        **{name: settings[name] for name in FROM_SOURCE if name in settings},
    )
    return loaded if order is None else first_of_shuffled(loaded, limit, order[1])


def check_overlap(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Raise UserError when most test prompts are prompts tuned on, say when some are."""
    same, num = overlap(recipe)
    sentence = (
        f"{same:,} of {num:,} test prompts of evaluation.source = '{recipe.evaluation.source}' are prompts"
    )
    if 2 * same > num:
        raise UserError(f"{sentence} of prompts.source = '{recipe.prompts.source}' too: expected others")
    if same:
        say(f"{'eval-prompts':<24} {sentence} tuned on too")


def overlap(recipe: Recipe) -> tuple[int, int]:
    """How many test prompts are prompts to tune on, word for word, and how many test prompts there are."""
    tuning, test = (
        load_settings(settings_values(prompts_settings(recipe, section, key, languages)), key).prompts
        for section, key, languages in (
            (recipe.prompts, "prompts", recipe.prompts_languages),
            (recipe.evaluation, "evaluation", recipe.evaluation_languages),
        )
    )
    known = set(map(canonical, tuning.column("messages").to_pylist()))
    same = sum(canonical(messages) in known for messages in test.column("messages").to_pylist())
    return same, test.num_rows


def first_of_shuffled(loaded: Loaded, limit: int | None, seed: int) -> Loaded:
    """The first prompts, in all their languages, of an order that the seed and each prompt_id decide."""
    ids = loaded.prompts.column("prompt_id")
    order = sorted(ids.unique().to_pylist(), key=lambda prompt_id: digest("order", seed, prompt_id))[:limit]
    place = pc.index_in(ids, pa.array(order))
    kept = loaded.prompts.append_column("place", place).filter(pc.is_valid(place)).sort_by("place")
    beyond = loaded.beyond_limit + loaded.prompts.num_rows - kept.num_rows
    return replace(loaded, prompts=kept.drop_columns("place"), beyond_limit=beyond)


def _counts(table: pa.Table) -> dict[str, int]:
    counts = table.column("language").value_counts().to_pylist()
    return {row["values"]: row["counts"] for row in counts}


def load(
    source: str,
    *,
    languages: Sequence[str],
    limit: int | None,
    split: str = "",
    revision: str | None = None,
    id_column: str = "prompt_id",
    language_column: str = "language",
    key: str = "prompts",
) -> Loaded:
    """Read and check prompts; `limit` counts prompt ids, in order of first appearance.

    Raises UserError naming the file and row (or `key.source`) for a malformed row, a duplicate (prompt_id, language),
    and a language of `languages` that has no prompt.
    """
    if source == "lab":
        from croco.lab import world

        table = world.prompts(split, languages, limit)
        loaded = Loaded(table, ledger([]), {}, 0)
    else:
        loaded = _checked(
            _rows(source, split, key, revision), languages, limit, id_column, language_column, key
        )
    there = _counts(loaded.prompts)
    for code in languages:
        if code not in there:
            found = ", ".join(sorted(there.keys() | loaded.not_asked_for.keys())) or "none at all"
            raise UserError(
                f"{key}.source = '{source}' has no prompts in '{code}' (languages found: {found}"
                f"{_reasons(loaded.dropped, code)})"
            )
    return loaded


def _reasons(dropped: pa.Table, language: str) -> str:
    """Why rows in a language were left out, the most frequent reasons first."""
    rows = dropped.filter(pc.field("language") == language).column("reason").to_pylist()
    return "".join(f"; left out: {count:,}, {reason}" for reason, count in Counter(rows).most_common(3))


def _rows(source: str, split: str, key: str, revision: str | None) -> Iterator[Located]:
    """(where, row) of each row of a source; where is "FILE, line 3"."""
    if source.startswith("hf:"):
        return _hub_rows(source.removeprefix("hf:"), split, key, revision)
    path = Path(os.path.expanduser(source))
    if not os.path.isfile(path):
        raise UserError(f"{key}.source = '{source:.200}': no such file")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{key}.source = '{source}', expected 'lab', {EXPECTED}, or 'hf:NAME'")
    return file_rows(path)


def _hub_rows(name: str, split: str, key: str, revision: str | None) -> Iterator[Located]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # the library raises many kinds for one thing: not there
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{key}.source = 'hf:{name}' (split '{split}') cannot be loaded: {reason}") from error
    for number, row in enumerate(rows, start=1):
        yield f"hf:{name}, row {number}", row


def _checked(
    rows: Iterable[Located],
    languages: Sequence[str],
    limit: int | None,
    id_column: str,
    language_column: str,
    key: str,
) -> Loaded:
    kept: list[dict[str, Any]] = []
    drops: list[tuple[str, str, str, int | None, str]] = []
    seen: dict[tuple[str, str], str] = {}
    ids: set[str] = set()
    others, unread = Counter[str](), Counter[str]()
    beyond = 0
    for where, values in rows:
        prompt_id, language = _identity(where, values, id_column, language_column, key)
        if (prompt_id, language) in seen:
            first = seen[prompt_id, language]
            raise UserError(f"{where}: prompt_id '{prompt_id}' in '{language}' is a duplicate of {first}")
        seen[prompt_id, language] = where
        if language not in languages:
            others[language] += 1
            continue
        if limit is not None and prompt_id not in ids and len(ids) >= limit:
            beyond += 1
            continue
        ids.add(prompt_id)
        row = FileRow(where, values, {"prompt_id": id_column, "language": language_column}, unread)
        try:
            messages = _prompt(row)
        except Unusable as reason:
            drops.append(("prompt", prompt_id, language, None, str(reason)))
            continue
        kept.append(
            {
                "prompt_id": prompt_id,
                "language": language,
                "messages": messages,
                "reference": _optional_text(row, "reference"),
                "source": _optional_text(row, "source") or where.partition(", ")[0].rpartition("/")[2],
                "domain": _optional_text(row, "domain"),
            }
        )
    table = pa.Table.from_pylist(kept, schema=PROMPTS.schema)
    return Loaded(table, ledger(drops), dict(others), beyond, dict(unread))


def _identity(where: str, row: Any, id_column: str, language_column: str, key: str) -> tuple[str, str]:
    """The key of a row. Never its text, never its number: both shift when a row is edited or lost."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object with messages, found {kind(row)}")
    found = []
    for column, option in ((id_column, "id_column"), (language_column, "language_column")):
        if column not in row:
            there = ", ".join(map(str, row)) or "none"
            raise UserError(
                f"{where}: no column '{column}' (found: {there}); name the one to use in {key}.{option}"
            )
        value = row[column]
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            raise UserError(f"{where}: {column} is {kind(value)}, expected text or a whole number")
        found.append(str(value))
    return found[0], found[1]


def _prompt(row: FileRow) -> list[Turn]:
    """The conversation; raises Unusable when it cannot be carried."""
    value = row.values.get("messages")
    if not isinstance(value, list) or not value:
        raise UserError(f"{row.where}: messages is {kind(value)}, expected a list of {{role, content}}")
    row.can_carry()
    turns = row.prompt()
    if turns[-1]["role"] not in ("user", "tool"):
        raise UserError(
            f"{row.where}: the last message is the {turns[-1]['role']}'s, expected the user's or a tool's"
        )
    if not turns[-1]["content"].strip():
        raise UserError(f"{row.where}: the prompt is empty, expected text in its last message")
    row.check_unread(turns, [], ("prompt", "system"))
    return turns


def _optional_text(row: FileRow, column: str) -> str | None:
    value = row.values.get(column)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{row.where}: {column} is {kind(value)}, expected text or nothing")
    return value
