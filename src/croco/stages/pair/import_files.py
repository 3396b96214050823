"""Scored completions and preference pairs that other tools wrote, as our tables: prompts, sample, score.

Rows are JSON lines or Parquet, in one of four forms, told apart by their columns (`stages/prompts/columns.py`):

    messages (ending with the assistant's turn), score            one completion a row
    messages or prompt, completion, score                         one completion a row
    prompt or instruction, completions [{completion, score}]      all completions of a prompt a row (UltraFeedback)
    prompt?, chosen, rejected, score_chosen, score_rejected       a pair a row (TRL's preference format)

A prompt is known by its id, never by its text or its row. Files may be larger than memory. A row that cannot be used
goes to the ledger."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from croco.errors import UserError
from croco.languages import check
from croco.pipeline.stage import Work
from croco.stages.prompts.columns import FileRow, warn_of_unread
from croco.stages.prompts.values import (
    Turn,
    Unusable,
    read_finish_reason,
    read_ids,
    read_sample_id,
    read_score,
)
from croco.storage import files, shards
from croco.storage.hashing import digest
from croco.storage.rows import file_rows, kind
from croco.storage.schemas import COMPLETIONS, PROMPTS, SCORES, Drop, Table, ledger

ROWS_PER_SHARD = 4096
LINE, FILE = "line", "file"  # where the id of a prompt, or the language of a row, is its place
SIDES = ("chosen", "rejected")
Key = tuple[str, str]


@dataclass(frozen=True)
class Completion:
    """A scored completion of a file, or (with a `reason`) a row of one that cannot be used."""

    where: str
    key: Key
    messages: list[Turn]
    text: str = ""
    score: float = 0.0
    sample_id: int | None = None
    finish_reason: str = "stop"
    reason: str = ""


def imported(work: Work) -> None:
    """The stage `import` of scored completions."""
    for name in ("prompts", "sample", "score"):
        files.remove_folder(work.folder / name)  # of a start that was killed
    settings = work.settings
    sources = [Path(source) for source in settings["sources"]]
    by_line = settings["ids"] == LINE
    counts = import_scored(sources, work.folder, settings["columns"], settings["language"], by_line)
    work.record(languages=counts)


def imported_pairs(work: Work) -> None:
    """The stage `import` of preference pairs: a table `pair` of the columns that training reads."""
    settings = work.settings
    sources = [Path(source) for source in settings["sources"]]
    pairs, drops = import_pairs(sources, settings["columns"], settings["language"], settings["chosen_only"])
    table, count = pairs.to_arrow(), {"pair": pairs.height}
    shards.write_shard(work.folder / "pair", 0, table, table.schema, read=count, written=count, dropped=None)
    work.account({"pair": pairs.height + len(drops)}, count, ledger(drops))


def import_scored(
    sources: Sequence[Path],
    folder: Path,
    columns: Mapping[str, str] | None = None,
    language: str | None = None,
    by_line: bool = False,
) -> dict[str, int]:
    """Write the tables `prompts`, `sample` and `score` under `folder`; returns how many completions each language has.

    `columns` maps our names (the keys of `columns.NAMES`) to the file's; `language` is that of rows without one, or
    "file": each file's name up to its first dot. With `by_line` the first rows of all languages are one prompt, and so
    on. Raises UserError naming file and row for what is missing, two prompts under one id, and languages of unequally
    many lines."""
    known: dict[Key, str] = {}
    numbers: dict[Key, int] = {}
    languages, unread, reasons = Counter[str](), Counter[str](), Counter[str]()
    lines = Counter[str]() if by_line else None
    rows = (
        one
        for source in sources
        for one in _completions(source, columns or {}, _language_of(source, language), unread, lines)
    )
    parts = iter(lambda: list(islice(rows, ROWS_PER_SHARD)), [])
    for shard, part in enumerate(parts):
        prompts, samples, scores = (list[dict[str, Any]]() for _ in range(3))
        drops: list[Drop] = []
        for one in part:
            if one.reason:
                drops.append(("completion", *one.key, None, one.reason))
                reasons[one.reason] += 1
                continue
            if known.setdefault(one.key, digest(one.messages)) != digest(one.messages):
                raise UserError(
                    f"{one.where}: prompt_id '{one.key[0]}' in '{one.key[1]}' is another prompt than before"
                )
            name: dict[str, Any] = {"prompt_id": one.key[0], "language": one.key[1]}
            if one.key not in numbers:
                source = one.where.partition(", ")[0].rpartition("/")[2]
                prompts.append(name | {"messages": one.messages, "source": source})
            name["sample_id"] = numbers.get(one.key, 0) if one.sample_id is None else one.sample_id
            numbers[one.key] = max(numbers.get(one.key, 0), name["sample_id"] + 1)
            languages[one.key[1]] += 1
            samples.append(
                name | {"completion": one.text, "completion_tokens": 0, "seed": 0, "policy": "imported",
                        "finish_reason": one.finish_reason}
            )  # fmt: skip
            scores.append(name | {"score": one.score, "scorer": "imported"})
        _write(folder / "prompts", shard, PROMPTS, prompts)
        _write(folder / "sample", shard, COMPLETIONS, samples, drops)
        _write(folder / "score", shard, SCORES, scores)
    if not languages:
        raise UserError(f"{', '.join(map(str, sources))}: {_no_rows(reasons, 'scored completions')}")
    if lines and len(set(lines.values())) > 1:
        counts = ", ".join(f"{num:,} in {code}" for code, num in lines.items())
        raise UserError(f"the languages are parallel by line, and there are {counts}: expected equally many")
    warn_of_unread("pairs", unread)
    for table in ("prompts", "sample", "score"):
        shards.merge_ledgers(folder / table)
    return dict(languages)


def _language_of(source: Path, language: str | None) -> str | None:
    """The language of a file's rows, where no column says it."""
    if language != FILE:
        return language
    try:
        return check(source.name.partition(".")[0])
    except UserError as error:
        raise UserError(f"{source}: {error}, expected a language as the file's name") from None


def _no_rows(reasons: Counter[str], expected: str) -> str:
    why = "; ".join(f"{count:,} left out, {reason}" for reason, count in reasons.most_common(3))
    return f"no rows that can be used ({why})" if why else f"no rows, expected {expected}"


def _write(
    folder: Path, shard: int, table: Table, rows: list[dict[str, Any]], drops: Sequence[Drop] = ()
) -> None:
    made = pa.Table.from_pylist(rows, schema=table.schema)
    written = {table.unit: len(rows)}
    read = {table.unit: len(rows) + len(drops)}
    shards.write_shard(
        folder, shard, made, table.schema, read=read, written=written, dropped=ledger(list(drops))
    )


def _completions(
    source: Path,
    columns: Mapping[str, str],
    language: str | None,
    unread: Counter[str],
    lines: Counter[str] | None = None,
) -> Iterator[Completion]:
    """Every completion of a file; where `lines` are counted, per language, their number is the id of the prompt."""
    for where, values in file_rows(source):
        row = FileRow(where, values, columns, unread)
        spoken = str(language) if language and row.column("language") is None else row.text("language")
        if lines is None:
            key = (row.text("prompt_id"), spoken)
        else:
            lines[spoken] += 1
            key = (f"{lines[spoken]:07d}", spoken)
        try:
            if row.is_pair():
                yield from _of_pair(row, key)
            elif isinstance(row.values.get("completions"), list):
                yield from _of_list(row, key)
            else:
                prompt, text = row.answered()
                yield _scored(row, key, prompt, text)
        except Unusable as reason:
            yield Completion(where, key, [], reason=str(reason))


def _scored(row: FileRow, key: Key, prompt: list[Turn], text: str) -> Completion:
    finish = row.column("finish_reason")
    reason = read_finish_reason(row.where, None if finish is None else row.values[finish])
    sample = read_sample_id(row.where, row.need("sample_id")) if row.column("sample_id") else None
    score = math.nan if row.is_null("score") else read_score(row.where, row.need("score"))
    return Completion(row.where, key, prompt, text, score, sample, reason)


def _of_list(row: FileRow, key: Key) -> Iterator[Completion]:
    """The completions of a row that has all of a prompt's."""
    row.can_carry()
    prompt = row.prompt()
    row.check_unread(prompt, [], ("prompt", "system"))
    for number, values in enumerate(row.values["completions"], start=1):
        where = f"{row.where}, completion {number}"
        if not isinstance(values, Mapping):
            raise UserError(f"{where}: expected an object with completion and score, found {kind(values)}")
        one = FileRow(where, values, row.columns)
        try:
            yield _scored(one, key, prompt, one.completion())
        except Unusable as reason:
            yield Completion(where, key, [], reason=str(reason))


def _of_pair(row: FileRow, key: Key) -> Iterator[Completion]:
    """Both sides of a row in TRL's preference format, its prompt given or the part that both conversations share."""
    prompt, sides = row.sides()
    for side, text in sides.items():
        column = f"score_{side}" if f"score_{side}" in row.values else f"{side}_score"
        where = f"{row.where}, {side}"
        own = {"score": column, "finish_reason": f"{side}_finish_reason"}
        one = FileRow(
            where, {name: row.values[theirs] for name, theirs in own.items() if theirs in row.values}
        )
        try:
            yield _scored(one, key, prompt, text)
        except Unusable as reason:
            yield Completion(where, key, [], reason=str(reason))


def import_pairs(
    sources: Sequence[Path],
    columns: Mapping[str, str] | None = None,
    language: str | None = None,
    chosen_only: bool = False,
) -> tuple[pl.DataFrame, list[Drop]]:
    """Preference pairs of any tool as a table that training reads, and a ledger. With `chosen_only` a row may hold a
    single completion instead (TRL's forms for supervised tuning).

    Columns: where (file and row), prompt_id (else a digest of the messages), language (else "und"), messages, chosen,
    rejected, and where a file has them ids, language and finish reason of each side. Raises UserError naming file and
    row."""
    rows: list[dict[str, Any]] = []
    drops: list[Drop] = []
    unread = Counter[str]()
    for where, values in (one for source in sources for one in file_rows(source)):
        row = FileRow(where, values, columns, unread)
        for name in ("prompt_id", "language"):
            if name in row.columns and row.column(name) is None:
                raise UserError(f"{where}: no {name} in column {row.columns[name]}")
        prompt_id = row.text("prompt_id") if row.column("prompt_id") else ""
        spoken = row.text("language") if row.column("language") else language or "und"
        try:
            prompt, sides, more = _pair(row, chosen_only)
        except Unusable as reason:
            drops.append(("pair", prompt_id or where, spoken, None, str(reason)))
            continue
        key = {"where": where, "prompt_id": prompt_id or digest(prompt), "language": spoken}
        rows.append({**key, "messages": prompt, **sides, **more})
    if not rows:
        reasons = Counter(drop[4] for drop in drops)
        raise UserError(f"{', '.join(map(str, sources))}: {_no_rows(reasons, 'preference pairs')}")
    warn_of_unread("train", unread)
    return pl.DataFrame(rows, infer_schema_length=None), drops


def _pair(row: FileRow, chosen_only: bool) -> tuple[list[Turn], dict[str, str], dict[str, Any]]:
    if row.is_pair():
        prompt, sides = row.sides()
    elif chosen_only:
        for label in ("label", "kto_tag"):
            if row.values.get(label) is False:
                raise Unusable(f"{label} is false: the completion is not to be learnt")
        prompt, text = row.answered()
        sides = {"chosen": text}
    else:
        there = ", ".join(map(str, row.values)) or "none"
        raise UserError(f"{row.where}: no columns chosen and rejected with values (found: {there})")
    more: dict[str, Any] = {}
    for side in sides:
        more[f"{side}_ids"] = read_ids(row.where, row.values.get(f"{side}_ids"), f"{side}_ids")
        if (reason := row.values.get(f"{side}_finish_reason")) is not None:
            more[f"{side}_finish_reason"] = read_finish_reason(row.where, reason, f"{side}_finish_reason")
        spoken = row.values.get(f"{side}_language")
        if spoken is not None and not isinstance(spoken, str):
            raise UserError(f"{row.where}: {side}_language is {kind(spoken)}, expected text")
        more[f"{side}_language"] = spoken
    return prompt, sides, {name: value for name, value in more.items() if value is not None}
