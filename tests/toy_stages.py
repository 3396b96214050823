"""Toy stages that `test_stage.py` runs by their import path: numbered prompts, and a completion for the even ones."""

from __future__ import annotations

import pyarrow as pa

from croco.pipeline.stage import Work
from croco.storage import files, shards
from croco.storage.schemas import COMPLETIONS, PROMPTS, ledger

CALLS: list[int] = []
FAIL_AT: set[int] = set()


def numbered(work: Work) -> None:
    """`settings["count"]` prompts in English."""
    count, size = work.settings["count"], work.runtime.shard_prompts
    for index in work.todo(-(-count // size)):
        if index in FAIL_AT:
            raise RuntimeError("the power went")
        CALLS.append(index)
        rows = [prompt(number) for number in range(index * size, min(count, (index + 1) * size))]
        work.write(index, pa.Table.from_pylist(rows, schema=PROMPTS.schema), read={"prompt": len(rows)})
    work.record(device="none")


def prompt(number: int) -> dict[str, object]:
    return {
        "prompt_id": str(number),
        "language": "en",
        "messages": [{"role": "user", "content": f"{number}?"}],
        "reference": None,
        "source": "toy",
        "domain": None,
    }


def even(work: Work) -> None:
    """One completion for each even prompt; the odd ones go to the ledger."""
    rows = shards.read_table(work.inputs["numbered"]).to_dicts()
    size = work.runtime.shard_prompts
    for index in work.todo(-(-len(rows) // size)):
        part = rows[index * size : (index + 1) * size]
        kept = [row for row in part if int(row["prompt_id"]) % 2 == 0]
        odd = [row for row in part if int(row["prompt_id"]) % 2 == 1]
        table = pa.Table.from_pylist(
            [completion(row["prompt_id"]) for row in kept], schema=COMPLETIONS.schema
        )
        dropped = ledger([("prompt", row["prompt_id"], "en", None, "odd") for row in odd])
        work.write(index, table, read={"prompt": len(part)}, dropped=dropped)


def completion(prompt_id: str) -> dict[str, object]:
    return {
        "prompt_id": prompt_id,
        "language": "en",
        "sample_id": 0,
        "completion": "yes",
        "completion_ids": None,
        "completion_tokens": 1,
        "finish_reason": "stop",
        "policy": "toy",
        "seed": 1,
    }


def silent_loss(work: Work) -> None:
    """Loses a row without saying so."""
    work.todo(1)
    table = pa.Table.from_pylist([completion("0")], schema=COMPLETIONS.schema)
    work.write(0, table, read={"prompt": 2})


def unfinished(work: Work) -> None:
    """Returns before its shards are done."""
    work.todo(2)
    work.write(0, pa.Table.from_pylist([completion("0")], schema=COMPLETIONS.schema))


def first_half(work: Work) -> None:
    """Forgets the second half of what it should read."""
    rows = shards.read_table(work.inputs["numbered"]).head(5).to_dicts()
    work.todo(1)
    table = pa.Table.from_pylist([completion(row["prompt_id"]) for row in rows], schema=COMPLETIONS.schema)
    work.write(0, table, read={"prompt": len(rows)})


def page(work: Work) -> None:
    """Writes a file that is no table."""
    files.write_text(work.folder / "page.html", "hi")
