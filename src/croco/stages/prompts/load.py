"""The stages `prompts`, `eval-prompts` and `arena-prompts`: prompts from the lab, from files, or from the hub.

Every turn is kept; a last one of the assistant's is the reference. A wrong row (no JSON, no id, an unknown role) stops
the stage, because half a data set is not the one that the recipe names; one that cannot be carried (tool calls) goes to
the ledger. Languages that the recipe does not name are counted, not read."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from croco.config.evaluation import Source
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.languages import normal
from croco.pipeline.fingerprint import prompts_settings
from croco.pipeline.node import Settings, settings_values
from croco.pipeline.stage import Work
from croco.stages.prompts.columns import FileRow, warn_of_unread
from croco.stages.prompts.values import Turn, Unusable
from croco.storage.hashing import LAB_LANGUAGES, canonical
from croco.storage.rows import Located, dataset_rows, file_rows, files_of, hub_configs, is_saved_dataset, kind
from croco.storage.schemas import PROMPTS, Drop, ledger
from croco.storage.seeds import digest

# the recipe's section of each stage
SECTIONS = {"prompts": "prompts", "eval-prompts": "evaluation", "arena-prompts": "arena"}


@dataclass(frozen=True)
class Loaded:
    """Prompts in the source's order, the rows left out, and how many rows of other languages there were."""

    prompts: pa.Table
    dropped: pa.Table
    not_asked_for: dict[str, int]
    beyond_limit: int
    unread: dict[str, int] = field(default_factory=dict)  # columns and message keys that are not read


def prompts(work: Work) -> None:
    """The prompts to tune on, to evaluate on, or the arena's own, in the languages that the settings name."""
    loaded = load_settings(work.settings, SECTIONS[work.title])
    warn_of_unread(work.title, loaded.unread)
    ids = loaded.prompts.column("prompt_id")
    work.record(
        num_prompt_ids=len(ids.unique()),
        prompts_per_language=dict(Counter(loaded.prompts.column("language").to_pylist())),
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
    source, codes, limit = settings["source"], settings["languages"], settings["limit"]
    if "order" not in settings:
        return load(source, key, codes, limit)
    return first_of_shuffled(load(source, key, codes, None), limit, settings["order"][1])


def check_overlap(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Raise UserError when most test prompts are rows tuned on, say when some are or have the text of one."""
    same_rows, same, num = overlap(recipe)
    sentence = (
        f"{same:,} of {num:,} test prompts of evaluation.source = '{recipe.evaluation.source}' are prompts"
    )
    if 2 * same_rows > num:
        raise UserError(f"{sentence} of prompts.source = '{recipe.prompts.source}' too: expected others")
    if same:
        say(f"{'eval-prompts':<24} {sentence} tuned on too")


def overlap(recipe: Recipe) -> tuple[int, int, int]:
    """How many test prompts are rows to tune on, how many have the text of one, and how many test prompts there are."""
    tuning, test = (
        load_settings(settings_values(prompts_settings(recipe, key)), key).prompts
        for key in ("prompts", "evaluation")
    )
    ids, texts = (
        [table.column(name).to_pylist() for table in (tuning, test)] for name in ("prompt_id", "messages")
    )
    tuned_on, tested = (
        [(name, canonical(messages)) for name, messages in zip(*rows, strict=True)]
        for rows in zip(ids, texts, strict=True)
    )
    rows, words = set(tuned_on), {text for _, text in tuned_on}
    return sum(row in rows for row in tested), sum(text in words for _, text in tested), test.num_rows


def first_of_shuffled(loaded: Loaded, limit: int | None, seed: int) -> Loaded:
    """The first prompts, in all their languages, of an order that the seed and each prompt_id decide."""
    ids = loaded.prompts.column("prompt_id")
    order = sorted(ids.unique().to_pylist(), key=lambda prompt_id: digest("order", seed, prompt_id))[:limit]
    place = pc.index_in(ids, pa.array(order))
    kept = loaded.prompts.append_column("place", place).filter(pc.is_valid(place)).sort_by("place")
    beyond = loaded.beyond_limit + loaded.prompts.num_rows - kept.num_rows
    return replace(loaded, prompts=kept.drop_columns("place"), beyond_limit=beyond)


def load(section: Source, key: str, languages: Sequence[str], limit: int | None) -> Loaded:
    """Read and check prompts; `limit` counts prompt ids, in order of first appearance. Raises UserError naming the file
    and row (or `key.source`) for a malformed row, a duplicate key, and a language without prompts."""
    if known := LAB_LANGUAGES.get(str(section.source)):
        from croco.lab import lists, world

        if unknown := [code for code in languages if code not in known]:
            raise UserError(
                f"{key}.source = '{section.source}' has no prompts in '{unknown[0]}', expected of {', '.join(known)}"
            )
        rows = (world if section.source == "lab" else lists).prompts(section.split, languages, limit)
        loaded = Loaded(rows, ledger([]), {}, 0)
    else:
        loaded = _Reading(section, key, languages, limit).all()
    there = Counter(loaded.prompts.column("language").to_pylist())
    for code in languages:
        if code not in there:
            languages_there = ", ".join(sorted(there.keys() | loaded.not_asked_for.keys())) or "none at all"
            raise UserError(
                f"{key}.source = '{section.source}' has no prompts in '{code}' (languages found: {languages_there}"
                f"{_reasons(loaded.dropped, code)})"
            )
    return loaded


def _reasons(dropped: pa.Table, language: str) -> str:
    """Why rows in a language were left out, the most frequent reasons first."""
    rows = dropped.filter(pc.field("language") == language).column("reason").to_pylist()
    return "".join(f"; left out: {count:,}, {reason}" for reason, count in Counter(rows).most_common(3))


class _Reading:
    """Rows of a source, checked one by one."""

    def __init__(self, section: Source, key: str, languages: Sequence[str], limit: int | None) -> None:
        self.section, self.key, self.languages, self.limit = section, key, languages, limit
        self.kept: list[dict[str, Any]] = []
        self.drops: list[Drop] = []
        self.places: dict[tuple[str, str], str] = {}
        self.ids: set[str] = set()
        self.others, self.unread = Counter[str](), Counter[str]()
        self.beyond = 0
        self.columns = {str(name): column for name, column in section.columns.items()}
        for name, default in (("prompt_id", "id_column"), ("language", "language_column")):
            if getattr(section, default) != Source.model_fields[default].default:
                self.columns[name] = getattr(section, default)

    def all(self) -> Loaded:
        for language in self._sources():
            for where, values in self._rows(language):
                self._read(FileRow(where, values, self.columns, self.unread, self.key), language)
        table = pa.Table.from_pylist(self.kept, schema=PROMPTS.schema)
        return Loaded(table, ledger(self.drops), dict(self.others), self.beyond, dict(self.unread))

    def _sources(self) -> Sequence[str | None]:
        """The languages that have a source of their own, else None for the one source of all."""
        of = self.section.of(None)
        if self.section.by_language:
            return self.languages
        if of["source"].startswith("hf:") and of["config"] is None and not of["data_files"]:
            configs = hub_configs(of["source"], of["revision"])
            if len(configs) > 1 and set(self.languages) <= set(configs):
                return self.languages  # a config for every language, as m-ArenaHard has them
        return [None]

    def _rows(self, language: str | None) -> Iterator[Located]:
        of = self.section.of(language)
        source = of["source"]
        if source.startswith("hf:") or is_saved_dataset(source):
            if source.startswith("hf:") and not self.section.by_language:
                of["config"] = of["config"] or language
            return dataset_rows(**of, key=self.key)
        files = files_of(source, of["data_files"], f"{self.key}.source")
        return (one for file in files for one in file_rows(file))

    def _read(self, row: FileRow, language: str | None) -> None:
        prompt_id, language = self._identity(row, language)
        if (prompt_id, language) in self.places:
            first = self.places[prompt_id, language]
            raise UserError(f"{row.where}: prompt_id '{prompt_id}' in '{language}' is a duplicate of {first}")
        self.places[prompt_id, language] = row.where
        if language not in self.languages:
            self.others[language] += 1
            return
        if self.limit is not None and prompt_id not in self.ids and len(self.ids) >= self.limit:
            self.beyond += 1
            return
        self.ids.add(prompt_id)
        try:
            messages, reference = _prompt(row)
        except Unusable as reason:
            self.drops.append(("prompt", prompt_id, language, None, str(reason)))
            return
        if self.section.turns == "first":
            messages, reference = _first_turn(messages, reference)
        if self.section.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.section.system}, *messages]
        key = {"prompt_id": prompt_id, "language": language, "messages": messages, "reference": reference}
        source = _optional_text(row, "source") or row.where.partition(", ")[0].rpartition("/")[2]
        self.kept.append(key | {"source": source, "domain": _optional_text(row, "domain")})

    def _identity(self, row: FileRow, language: str | None) -> tuple[str, str]:
        """The key of a row. Never its text, never its number: both shift when a row is edited or lost."""
        for name, option in (("prompt_id", "id_column"), ("language", "language_column")):
            column = self.columns.get(name, name)
            constant = name == "language" and (language or self.section.language)
            if row.column(name) is None and column not in row.values and not constant:
                there = ", ".join(map(str, row.values)) or "none"
                raise UserError(
                    f"{row.where}: no column '{column}' (found: {there}); name the one to use in {self.key}.{option}"
                )
        prompt_id = row.text("prompt_id")
        code = row.text("language") if row.column("language") else str(language or self.section.language)
        if code not in self.languages:
            with suppress(UserError):
                code = normal(code)
        if language is not None and code != language:
            raise UserError(f"{row.where}: language is '{code}' in the source of '{language}'")
        return prompt_id, code


def _prompt(row: FileRow) -> tuple[list[Turn], str | None]:
    """The conversation and its reference; raises Unusable when it cannot be carried."""
    column = row.column("prompt")
    if column == "messages" and (not isinstance(row.values[column], list) or not row.values[column]):
        raise UserError(
            f"{row.where}: messages is {kind(row.values[column])}, expected a list of {{role, content}}"
        )
    row.can_carry()
    turns, reference = row.prompt(), _optional_text(row, "reference")
    if turns[-1]["role"] == "assistant" and len(turns) > 1:
        *turns, last = turns
        if reference is not None and reference.strip() != last["content"].strip():
            raise UserError(
                f"{row.where}: the reference and the assistant's last message are two texts, expected one"
            )
        reference = last["content"]
    if turns[-1]["role"] not in ("user", "tool"):
        raise UserError(
            f"{row.where}: the last message is the {turns[-1]['role']}'s, expected the user's or a tool's"
        )
    if not turns[-1]["content"].strip():
        raise UserError(f"{row.where}: the prompt is empty, expected text in its last message")
    row.check_unread(turns, [], ("prompt", "system"))
    return turns, reference


def _first_turn(messages: list[Turn], reference: str | None) -> tuple[list[Turn], str | None]:
    """The conversation up to its first user turn, and the assistant's answer to that."""
    end = next((i for i, turn in enumerate(messages, start=1) if turn["role"] == "user"), len(messages))
    after = messages[end : end + 1]
    if after:
        reference = after[0]["content"] if after[0]["role"] == "assistant" else None
    return messages[:end], reference


def _optional_text(row: FileRow, name: str) -> str | None:
    column = row.column(name)
    value = None if column is None else row.need(name)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{row.where}: {column} is {kind(value)}, expected text or nothing")
    return value
