"""The stages `prompts` and `eval-prompts`: parallel prompts from the lab, a JSONL or Parquet file, or a hub dataset.

Every turn of a conversation is kept. A row that is wrong (no JSON, no id, an unknown role, nothing to answer) stops the
stage with the file and the row, because half a data set is not the data set the recipe names; a row that is right but
cannot be carried (a message with tool calls) goes to the ledger. Languages that nobody asked for are counted, not read.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from croco.config.arena import Arena
from croco.config.recipe import Evaluation, Prompts
from croco.errors import UserError
from croco.pipeline.stage import Work
from croco.storage.schemas import PROMPTS, ROLES, ledger
from croco.storage.seeds import digest


@dataclass(frozen=True)
class Loaded:
    """Prompts in the source's order, the rows left out, and how many rows of each language nobody asked for."""

    prompts: pa.Table
    dropped: pa.Table
    not_asked_for: dict[str, int]
    beyond_limit: int


def prompts(work: Work) -> None:
    """The prompts to tune on, in the tuned languages or the one they are translated from."""
    shuffled = work.seed if work.recipe.prompts.order == "seed" else None
    _stage(work, work.recipe.prompts, "prompts", work.recipe.prompts_languages, shuffled)


def eval_prompts(work: Work) -> None:
    """The prompts to evaluate on, in all languages or the one they are translated from."""
    _stage(work, work.recipe.evaluation, "evaluation", work.recipe.evaluation_languages)


def arena_prompts(work: Work) -> None:
    """The arena's own prompts, in the languages it compares in."""
    assert work.recipe.arena is not None
    _stage(work, work.recipe.arena, "arena", work.recipe.arena_languages)


def _stage(
    work: Work,
    section: Prompts | Evaluation | Arena,
    key: str,
    languages: Sequence[str],
    shuffled: int | None = None,
) -> None:
    assert section.source is not None
    loaded = load(
        section.source,
        split=section.split,
        revision=section.revision,
        languages=languages,
        limit=section.limit if shuffled is None else None,
        id_column=section.id_column,
        language_column=section.language_column,
        key=key,
    )
    if shuffled is not None:
        loaded = first_of_shuffled(loaded, section.limit, shuffled)
    ids = loaded.prompts.column("prompt_id")
    work.record(
        num_prompt_ids=len(ids.unique()),
        prompts_per_language=_counts(loaded.prompts),
        rows_of_other_languages=loaded.not_asked_for,
        rows_beyond_limit=loaded.beyond_limit,
    )
    size, rows = work.runtime.shard_prompts, loaded.prompts.num_rows
    for index in work.todo(-(-rows // size)):
        part = loaded.prompts.slice(index * size, size)
        dropped = loaded.dropped if index == 0 else None
        read = part.num_rows + (dropped.num_rows if dropped is not None else 0)
        work.write(index, part, read={"prompt": read}, dropped=dropped)


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
    split: str,
    languages: Sequence[str],
    limit: int | None,
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
                f"{key}.source = '{source}' has no prompts in '{code}' (languages found: {found})"
            )
    return loaded


def _rows(source: str, split: str, key: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    """(where, row) of each row of a source; where is "FILE, line 3"."""
    if source.startswith("hf:"):
        yield from _hub_rows(source.removeprefix("hf:"), split, key, revision)
        return
    path = Path(os.path.expanduser(source))
    if not os.path.isfile(path):
        raise UserError(f"{key}.source = '{source:.200}': no such file")
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{key}.source = '{source}', expected 'lab', a .jsonl or .parquet file, or 'hf:NAME'")
    yield from file_rows(path)


def file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of each row of a JSON lines or Parquet file; raises UserError naming what cannot be read."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{path}: expected a .jsonl or .parquet file")
    yield from _jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{where}: expected a JSON object, found {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: expected a Parquet file, found {error}") from None
    number = 0
    for batch in file.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", row


def _hub_rows(name: str, split: str, key: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # the library raises many kinds for one thing: not there
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{key}.source = 'hf:{name}' (split '{split}') cannot be loaded: {reason}") from error
    for number, row in enumerate(rows, start=1):
        yield f"hf:{name}, row {number}", row


def _checked(
    rows: Iterable[tuple[str, Any]],
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
    others: Counter[str] = Counter()
    beyond = 0
    for where, row in rows:
        prompt_id, language = _identity(where, row, id_column, language_column, key)
        if (prompt_id, language) in seen:
            first = seen[prompt_id, language]
            raise UserError(f"{where}: prompt_id '{prompt_id}' in '{language}' is a duplicate of {first}")
        seen[prompt_id, language] = where
        if language not in languages:
            others[language] += 1
        elif limit is not None and prompt_id not in ids and len(ids) >= limit:
            beyond += 1
        else:
            ids.add(prompt_id)
            messages, obstacle = _messages(where, row)
            if obstacle is not None:
                drops.append(("prompt", prompt_id, language, None, obstacle))
                continue
            kept.append(
                {
                    "prompt_id": prompt_id,
                    "language": language,
                    "messages": messages,
                    "reference": _optional_text(where, row, "reference"),
                    "source": _optional_text(where, row, "source")
                    or where.partition(", ")[0].rpartition("/")[2],
                    "domain": _optional_text(where, row, "domain"),
                }
            )
    return Loaded(pa.Table.from_pylist(kept, schema=PROMPTS.schema), ledger(drops), dict(others), beyond)


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


def _messages(where: str, row: Mapping[str, Any]) -> tuple[list[dict[str, str]], str | None]:
    """The conversation, and why it cannot be carried (or None)."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages is {kind(messages)}, expected a list of {{role, content}}")
    kept = []
    for number, message in enumerate(messages, start=1):
        here = f"{where}, message {number}"
        if not isinstance(message, Mapping):
            raise UserError(f"{here}: expected {{role, content}}, found {kind(message)}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"{here}: role is {role!r}, expected one of {', '.join(ROLES)}")
        extra = sorted(
            name
            for name in message
            if name not in ("role", "content") and message[name] not in (None, [], {})
        )
        if extra:
            return [], f"a message has {', '.join(extra)}, which a prompt cannot carry"
        if not isinstance(content, str):
            raise UserError(f"{here}: content is {kind(content)}, expected text")
        kept.append({"role": role, "content": content})
    last = kept[-1]
    if last["role"] not in ("user", "tool"):
        raise UserError(f"{where}: the last message is the {last['role']}'s, expected the user's or a tool's")
    if not last["content"].strip():
        raise UserError(f"{where}: the prompt is empty, expected text in its last message")
    return kept, None


def _optional_text(where: str, row: Mapping[str, Any], column: str) -> str | None:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: {column} is {kind(value)}, expected text or nothing")
    return value


def kind(value: Any) -> str:
    """What a value is, in a person's words."""
    if value is None:
        return "missing"
    if value in ("", [], {}):
        return "empty"
    names = {
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
