"""Pairs for every trainer: TRL's conversational formats as Parquet, with a dataset card.

"preference" has prompt, chosen and rejected, each a list of messages; "prompt-completion" has prompt and completion,
for SFT. The prompt is what the policy read, a language's instruction in its last user turn. Scores, languages and keys
have columns of their own."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from croco.errors import UserError
from croco.models.chat_template import with_instruction
from croco.pipeline.node import Given, Node, Stage
from croco.pipeline.stage import Work
from croco.storage import files, records
from croco.storage import shards as store
from croco.storage.provenance import table_cell
from croco.storage.schemas import MESSAGES

FORMATS = ("preference", "prompt-completion")
_KEYS = [("prompt_id", pa.string()), ("language", pa.string())]
_SCHEMAS = {
    "preference": pa.schema(
        [("prompt", MESSAGES), ("chosen", MESSAGES), ("rejected", MESSAGES), ("score_chosen", pa.float32()),
         ("score_rejected", pa.float32()), *_KEYS, ("chosen_language", pa.string()), ("rejected_language", pa.string())]
    ),
    "prompt-completion": pa.schema([("prompt", MESSAGES), ("completion", MESSAGES), ("score", pa.float32()), *_KEYS]),
}  # fmt: skip


EXPORT = Stage("export", 1, "croco.stages.pair.export_trl:exported", "", makes=("data", "README.md"))


def export_node(
    pairs: Path,
    to: Path,
    form: str = "preference",
    license: str = "unknown",
    facts: Mapping[str, str] | None = None,
    instructions: Mapping[str, str] | None = None,
) -> Node:
    """The node that writes a folder of finished pairs to `to` as `write_trl` does; raises UserError without any."""
    check_format(form)
    if records.state(pairs) != "complete":
        raise UserError(f"{pairs} holds no finished pairs: run `croco run` first")
    read = Given(str(pairs), records.read_record(pairs)["fingerprint"])
    more = {"license": license, "facts": dict(facts or {}), "instructions": dict(instructions or {})}
    return Node(EXPORT, None, to, {"pairs": read, "format": form, **more}, {})


def exported(work: Work) -> None:
    """The stage `export`: pairs as every trainer reads them, with a card."""
    settings, pairs = work.settings, Path(work.settings["pairs"])
    store.check_contents(pairs)
    tables = (store.read_parquet(shard.path) for shard in store.shards(pairs))
    given = {name: settings[name] for name in ("license", "facts", "instructions")}
    rows = write_trl(
        tables, store.read_dropped(pairs), work.folder, settings["format"], source=str(pairs), **given
    )
    work.account({"pair": rows}, {"pair": rows})


def export(
    pairs: pl.DataFrame,
    folder: str | Path,
    format: str = "preference",
    *,
    dropped: pl.DataFrame | None = None,
    license: str = "unknown",
) -> int:
    """Write what `croco.pairs` made as `folder/data/*.parquet` with a dataset card; returns the number of rows.
    `format` is "preference" or "prompt-completion" (TRL's names); the scores given to `croco.pairs` need a column
    `messages` or `prompt`. Raises UserError for a folder that is not new or empty."""
    missing = [name for name in ("messages", "chosen") if name not in pairs.columns]
    if missing:
        source = {"messages": "`messages` or `prompt`", "chosen": "`completion`"}[missing[0]]
        raise UserError(
            f"the pairs have no column '{missing[0]}': give croco.pairs scores with a column {source}"
        )
    if "rejected" not in pairs.columns:
        pairs = pairs.with_columns(rejected=pl.lit(None, pl.String))
    with files.new_folder(Path(folder)) as made:
        return write_trl([pairs], dropped, made, format, license=license, source="the table")


def write_trl(
    tables: Iterable[pl.DataFrame],
    dropped: pl.DataFrame | None,
    folder: Path,
    form: str = "preference",
    *,
    instructions: Mapping[str, str] | None = None,
    license: str = "unknown",
    facts: Mapping[str, str] | None = None,
    source: str = "",
) -> int:
    """Write tables of pairs as `folder/data/*.parquet` with a card; returns the number of rows. `instructions` maps a
    language to the sentence in its prompts; `facts` go into the card. Raises UserError for an unknown form, and for
    "preference" without a rejected completion."""
    check_format(form)
    languages = Counter[str]()
    for number, table in enumerate(tables):
        if form == "preference" and table["rejected"].null_count():
            raise UserError(
                f"{source} has data for SFT (no rejected completion), expected --format prompt-completion"
            )
        made = pa.Table.from_pylist(list(_rows(table, form, instructions or {})), schema=_SCHEMAS[form])
        store.write_parquet(folder / "data" / f"train-{number:05d}.parquet", made, _SCHEMAS[form])
        languages.update(table["language"])
    left = [] if dropped is None else sorted(store.reasons(dropped))
    text = card(form, languages.total(), dict(sorted(languages.items())), left, license, facts or {})
    files.write_text(folder / "README.md", text)
    return languages.total()


def check_format(form: str) -> None:
    if form not in FORMATS:
        raise UserError(f"the format '{form}' is unknown, expected one of {', '.join(FORMATS)}")


def _rows(table: pl.DataFrame, form: str, instructions: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for row in table.iter_rows(named=True):
        prompt = with_instruction(row["messages"], instructions.get(row["language"]))
        keys = {"prompt": prompt, "prompt_id": row["prompt_id"], "language": row["language"]}
        sides = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        if form == "prompt-completion":
            yield keys | {"completion": sides["chosen"], "score": row["chosen_score"]}
        else:
            more = {f"{side}_language": row[f"{side}_language"] for side in sides}
            yield keys | sides | more | {f"score_{side}": row[f"{side}_score"] for side in sides}


def card(
    form: str,
    rows: int,
    languages: Mapping[str, int],
    left: list[tuple[str, str, int]],
    license: str,
    facts: Mapping[str, str],
) -> str:
    """The dataset card: front matter that the Hub reads, then counts, how it was made, and what was left out."""
    lines = ["---", f"license: {json.dumps(license)}", "language:"]
    lines += [f"- {json.dumps(code.split('-')[0])}" for code in languages]
    lines += ["tags:", "- croco", f"- {form}", "configs:", "- config_name: default", "  data_files:"]
    lines += ["  - split: train", "    path: data/train-*.parquet", "---", "", "# Pairs made by CroCo", ""]
    lines += [
        f"{rows:,} rows in TRL's conversational {form} format.",
        "",
        "| language | rows |",
        "|---|---:|",
    ]
    lines += [f"| {code} | {count:,} |" for code, count in languages.items()]
    lines += ["", "## How they were made", "", "| | |", "|---|---|"]
    lines += [f"| {table_cell(name)} | {table_cell(value)} |" for name, value in facts.items()]
    lines += ["", "## What was left out", ""]
    if left:
        lines += ["| what | reason | how many |", "|---|---|---:|"]
        lines += [f"| {unit} | {table_cell(reason)} | {count:,} |" for unit, reason, count in left]
    else:
        lines += ["Nothing."]
    return "\n".join(lines) + "\n"
