"""Scored completions and preference pairs that other tools wrote, as our tables: prompts, sample, score.

Rows are JSON lines or Parquet, in one of four forms, told apart by their columns:

    messages (ending with the assistant's turn), score            one completion a row
    messages or prompt, completion, score                         one completion a row
    prompt or instruction, completions [{completion, score}]      all completions of a prompt a row (UltraFeedback)
    prompt?, chosen, rejected, score_chosen, score_rejected       a pair a row (TRL's preference format)

A prompt is known by its id, never by its text and never by its row: the id is a column, under its own name or one that
the caller maps. Rows are read in batches and written as shards, so a file may be larger than memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from croco.errors import UserError
from croco.stages.prompts.load import file_rows, kind
from croco.storage import shards
from croco.storage.hashing import digest
from croco.storage.schemas import COMPLETIONS, PROMPTS, ROLES, SCORES, Table, ledger

ROWS_PER_SHARD = 4096
# other tools' names for a column of ours, tried in this order
NAMES = {
    "prompt_id": ("prompt_id",),
    "language": ("language",),
    "sample_id": ("sample_id",),
    "prompt": ("messages", "prompt", "instruction"),
    "completion": ("completion", "response", "text", "output"),
    "score": ("score", "reward", "overall_score"),
    "finish_reason": ("finish_reason",),
}
Row = Mapping[str, Any]
Key = tuple[str, str]


def import_scored(
    sources: Sequence[Path],
    folder: Path,
    columns: Mapping[str, str] | None = None,
    language: str | None = None,
) -> dict[str, int]:
    """Write the tables `prompts`, `sample` and `score` under `folder` and say how many completions each language has.

    `columns` maps our names (prompt_id, language, sample_id, prompt, completion, score, finish_reason) to the file's;
    `language` is that of all rows, where no column says it. Without a sample_id completions are numbered as they come.
    Raises UserError naming file and row for what is missing, and for two prompts under one id.
    """
    known: dict[Key, str] = {}
    numbers: dict[Key, int] = {}
    languages: dict[str, int] = {}
    rows = (one for source in sources for one in _completions(source, columns or {}, language))
    parts = iter(lambda: list(islice(rows, ROWS_PER_SHARD)), [])
    for shard, part in enumerate(parts):
        prompts, samples, scores = [], [], []
        for where, key, messages, found in part:
            if known.setdefault(key, digest(messages)) != digest(messages):
                raise UserError(
                    f"{where}: prompt_id '{key[0]}' in '{key[1]}' is another prompt than before, expected one"
                )
            if key not in numbers:
                prompts.append(
                    {
                        "prompt_id": key[0],
                        "language": key[1],
                        "messages": messages,
                        "source": where.partition(", ")[0].rpartition("/")[2],
                    }
                )
            sample = numbers.get(key, 0) if found["sample_id"] is None else found["sample_id"]
            numbers[key] = max(numbers.get(key, 0), sample + 1)
            languages[key[1]] = languages.get(key[1], 0) + 1
            name = {"prompt_id": key[0], "language": key[1], "sample_id": sample}
            samples.append(
                name | {"completion": found["completion"], "completion_tokens": 0, "seed": 0, "policy": "imported",
                        "finish_reason": found["finish_reason"]}
            )  # fmt: skip
            scores.append(name | {"score": found["score"], "scorer": "imported"})
        _write(folder / "prompts", shard, PROMPTS, prompts)
        _write(folder / "sample", shard, COMPLETIONS, samples)
        _write(folder / "score", shard, SCORES, scores)
    if not languages:
        raise UserError(f"{', '.join(map(str, sources))}: no rows, expected scored completions")
    for table in ("prompts", "sample", "score"):
        shards.merge_ledgers(folder / table)
    return languages


def _write(folder: Path, shard: int, table: Table, rows: list[dict[str, Any]]) -> None:
    counts = {table.unit: len(rows)}
    made = pa.Table.from_pylist(rows, schema=table.schema)
    shards.write_shard(folder, shard, made, table.schema, read=counts, written=counts, dropped=ledger([]))


def _completions(
    source: Path, columns: Mapping[str, str], language: str | None
) -> Iterator[tuple[str, Key, list[dict[str, str]], dict[str, Any]]]:
    """(where, key, prompt, {completion, score, sample_id, finish_reason}) of every completion of a file."""
    for where, row in file_rows(source):
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: expected an object, found {kind(row)}")
        said = language is None or _named(row, "language", columns) is not None
        spoken = _text(where, row, "language", columns) if said else str(language)
        key = (_text(where, row, "prompt_id", columns), spoken)
        if "chosen" in row and "rejected" in row:
            yield from _of_pair(where, row, key)
        elif isinstance(row.get("completions"), list):
            prompt = turns_of(where, _needed(where, row, "prompt", columns))
            for number, one in enumerate(row["completions"]):
                here = f"{where}, completion {number + 1}"
                if not isinstance(one, Mapping):
                    raise UserError(
                        f"{here}: expected an object with completion and score, found {kind(one)}"
                    )
                yield here, key, prompt, _found(here, one, columns, one)
        else:
            prompt, inner = _answered(where, row, columns)
            yield where, key, prompt, _found(where, inner, columns, row)


def _answered(where: str, row: Row, columns: Mapping[str, str]) -> tuple[list[dict[str, str]], Row]:
    """The prompt of a row with one completion, and the row with that completion in a column of its own."""
    prompt = turns_of(where, _needed(where, row, "prompt", columns))
    if prompt[-1]["role"] == "assistant" and "completion" not in columns:
        return prompt[:-1], {**row, "completion": prompt[-1]["content"]}
    return prompt, row


def _of_pair(
    where: str, row: Row, key: Key
) -> Iterator[tuple[str, Key, list[dict[str, str]], dict[str, Any]]]:
    """Both sides of a row in TRL's preference format, its prompt given or the part that both conversations share."""
    prompt, sides = sides_of(where, row)
    for side, completion in sides.items():
        column = f"score_{side}" if f"score_{side}" in row else f"{side}_score"
        values = {"completion": completion, "score": row.get(column)}
        yield where, key, prompt, _found(f"{where}, {side}", values, {}, {})


def sides_of(where: str, row: Row) -> tuple[list[dict[str, str]], dict[str, str]]:
    """The prompt of a row in the preference format, and the text of its chosen and its rejected completion."""
    turns = {side: turns_of(where, row[side], role="assistant") for side in ("chosen", "rejected")}
    shared = turns["chosen"][:-1]
    if turns["rejected"][:-1] != shared:
        raise UserError(f"{where}: chosen and rejected differ before their last turn, expected one prompt")
    for side, said in turns.items():
        if said[-1]["role"] != "assistant":
            raise UserError(
                f"{where}: {side} ends with the {said[-1]['role']}'s turn, expected the assistant's"
            )
    # a column prompt may hold the first turn only: the conversations say more
    given = next((row[name] for name in NAMES["prompt"] if row.get(name)), None)
    prompt = shared or (turns_of(where, given) if given is not None else [])
    if not prompt:
        raise UserError(f"{where}: found no prompt, expected one before the last turns or in a column prompt")
    return prompt, {side: said[-1]["content"] for side, said in turns.items()}


def import_pairs(
    sources: Sequence[Path],
    columns: Mapping[str, str] | None = None,
    language: str | None = None,
    chosen_only: bool = False,
) -> pl.DataFrame:
    """Preference pairs of any tool, chosen and rejected in a row, as a table that training reads.

    With `chosen_only` a row may hold a single completion instead (TRL's forms for supervised tuning), which is chosen.

    Columns: prompt_id, language, messages, chosen, rejected, and where a file has them chosen_ids, rejected_ids, and
    language and finish reason of each side. Without an id a prompt is known by a digest of its messages, since nothing
    is joined here; without a language it is "und". Raises UserError naming file and row for what is missing.
    """
    columns = columns or {}
    found = []
    for source in sources:
        for where, row in file_rows(source):
            if not isinstance(row, Mapping):
                raise UserError(f"{where}: expected an object, found {kind(row)}")
            if row.get("chosen") is not None and row.get("rejected") is not None:
                prompt, sides = sides_of(where, row)
            elif chosen_only:
                prompt, inner = _answered(where, row, columns)
                sides = {"chosen": _completion(where, inner, columns)}
                if not prompt:
                    raise UserError(f"{where}: found no prompt before the assistant's turn")
            else:
                there = ", ".join(map(str, row)) or "none"
                raise UserError(f"{where}: no columns chosen and rejected with values (found: {there})")
            named = {name: _named(row, name, columns) for name in ("prompt_id", "language")}
            for name, column in named.items():
                if name in columns and column is None:
                    raise UserError(f"{where}: no {name} in column {columns[name]}")
            found.append(
                {
                    "prompt_id": _text(where, row, "prompt_id", columns)
                    if named["prompt_id"]
                    else digest(prompt),
                    "language": _text(where, row, "language", columns)
                    if named["language"]
                    else language or "und",
                    "messages": prompt,
                    **sides,
                    **{name: row[name] for name in _BESIDE if row.get(name) is not None},
                }
            )
    if not found:
        raise UserError(f"{', '.join(map(str, sources))}: no rows, expected preference pairs")
    return pl.DataFrame(found, infer_schema_length=None)


_BESIDE = tuple(
    f"{side}_{name}" for side in ("chosen", "rejected") for name in ("ids", "language", "finish_reason")
)


def _found(where: str, values: Row, columns: Mapping[str, str], row: Row) -> dict[str, Any]:
    """Completion, score, sample number and finish reason ("stop" where nothing is said)."""
    completion, score = _completion(where, values, columns), _needed(where, values, "score", columns)
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise UserError(f"{where}: score is {kind(score)}, expected a number")
    number = _named(values, "sample_id", columns)
    sample = None if number is None else values[number]
    if sample is not None and (isinstance(sample, bool) or not isinstance(sample, int) or sample < 0):
        raise UserError(f"{where}: sample_id is {kind(sample)}, expected a whole number from 0 on")
    reason = _named(values, "finish_reason", columns) or ""
    return {
        "completion": completion,
        "score": float(score) if math.isfinite(score) else math.nan,
        "sample_id": sample,
        "finish_reason": values.get(reason) or "stop",
    }


def _completion(where: str, values: Row, columns: Mapping[str, str]) -> str:
    """The completion of a row, a text or a single turn."""
    completion = _needed(where, values, "completion", columns)
    if isinstance(completion, list):
        turns = turns_of(where, completion, role="assistant")
        completion = turns[0]["content"] if len(turns) == 1 else None
    if not isinstance(completion, str):
        raise UserError(f"{where}: completion is {kind(completion)}, expected text")
    return completion


def _named(row: Row, name: str, columns: Mapping[str, str]) -> str | None:
    """The column of a row that holds one of ours."""
    names = (columns[name],) if name in columns else NAMES[name]
    return next((column for column in names if row.get(column) is not None), None)


def _needed(where: str, row: Row, name: str, columns: Mapping[str, str]) -> Any:
    column = _named(row, name, columns)
    if column is None:
        wanted = columns.get(name) or " or ".join(f"'{one}'" for one in NAMES[name])
        there = ", ".join(map(str, row)) or "none"
        raise UserError(
            f"{where}: no {name} in column {wanted} (found: {there}); map it with --column {name}=NAME"
        )
    return row[column]


def _text(where: str, row: Row, name: str, columns: Mapping[str, str]) -> str:
    value = _needed(where, row, name, columns)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise UserError(f"{where}: {name} is {kind(value)}, expected text or a whole number")
    return str(value)


def turns_of(where: str, value: Any, role: str = "user") -> list[dict[str, str]]:
    """Messages as they are, or a text as one turn."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: the prompt is {kind(value)}, expected text or messages")
    for turn in value:
        if (
            not isinstance(turn, Mapping)
            or turn.get("role") not in ROLES
            or not isinstance(turn.get("content"), str)
        ):
            raise UserError(
                f"{where}: found the turn {json.dumps(turn, default=str)[:80]}, expected {{role, content}}"
            )
        extra = [name for name in turn if name not in ("role", "content") and turn[name]]
        if extra:
            raise UserError(f"{where}: a turn has {', '.join(extra)}, which a prompt cannot carry")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]
