"""Pairs for every trainer: TRL's conversational formats as Parquet, with a dataset card that says what they are.

"preference" has prompt, chosen and rejected, each a list of messages; "prompt-completion" has prompt and
completion, for SFT. The prompt is what the policy read: a language's instruction stands in its last user turn. Scores,
languages and the keys go along in columns of their own. Rows pass through shard by shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from croco.errors import UserError
from croco.models.chat_template import with_instruction
from croco.storage import files, records
from croco.storage import shards as store
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


def export_pairs(
    pairs: Path,
    folder: Path,
    form: str = "preference",
    *,
    instructions: Mapping[str, str] | None = None,
    license: str = "unknown",
    facts: Mapping[str, str] | None = None,
) -> int:
    """Write a folder of pairs as `folder/data/*.parquet` with a card, and say how many rows there are.

    `instructions` maps a language to the sentence that stood in its prompts; `facts` (policy, reward model, rule, …) go
    into the card. Raises UserError for an unknown form, a folder that is not empty, pairs that were not finished, and
    pairs without a rejected completion in the form "preference".
    """
    if form not in FORMATS:
        raise UserError(f"the format '{form}' is unknown, expected one of {', '.join(FORMATS)}")
    files.check_new_folder(folder)
    if records.state(pairs) != "complete":
        raise UserError(f"{pairs} holds no finished pairs: run `croco run` first")
    rows, languages = 0, pl.DataFrame(schema={"language": pl.String, "len": pl.UInt32})
    shards = store.shards(pairs)
    for number, shard in enumerate(shards):
        table = store.read_parquet(shard.path)
        if form == "preference" and table["rejected"].null_count():
            raise UserError(
                f"{shard.path} has data for SFT (no rejected completion), expected --format prompt-completion"
            )
        made = pa.Table.from_pylist(list(_rows(table, form, instructions or {})), schema=_SCHEMAS[form])
        name = f"train-{number:05d}-of-{len(shards):05d}.parquet"
        store.write_parquet(folder / "data" / name, made, _SCHEMAS[form])
        rows += made.num_rows
        languages = pl.concat([languages, table.group_by("language").len()])
    counts = dict(languages.group_by("language").agg(pl.col("len").sum()).sort("language").rows())
    left = store.read_dropped(pairs).group_by("unit", "reason").len().sort("unit", "reason").rows()
    files.write_text(folder / "README.md", card(form, rows, counts, left, license, facts or {}))
    return rows


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
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items()]
    lines += ["", "## What was left out", ""]
    if left:
        lines += ["| what | reason | how many |", "|---|---|---:|"]
        lines += [f"| {unit} | {_cell(reason)} | {count:,} |" for unit, reason, count in left]
    else:
        lines += ["Nothing."]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A text that cannot break out of its table cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
