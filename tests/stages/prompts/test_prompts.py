"""Prompts from files: every turn kept, every bad row named, every row accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from croco.errors import UserError
from croco.stages.prompts.load import Loaded, load

USER = [{"role": "user", "content": "Hvem?"}]


def row(prompt_id: Any = "a", language: Any = "da", messages: Any = USER, **more: Any) -> dict[str, Any]:
    return {"prompt_id": prompt_id, "language": language, "messages": messages, **more}


def write(tmp_path: Path, *rows: Any) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return str(path)


def read(source: str, *languages: str, **options: Any) -> Loaded:
    return load(source, split="train", languages=languages or ("da",), **{"limit": None, **options})


def test_every_turn_and_the_optional_columns_are_kept(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Vejret?"},
        {"role": "assistant", "content": "Et øjeblik."},
        {"role": "tool", "content": "sol"},
    ]
    source = write(tmp_path, row(7, messages=turns, reference="Sol.", domain="vejr"), "", row("b"))
    first, second = read(source).prompts.to_pylist()
    assert first == {
        "prompt_id": "7",
        "language": "da",
        "messages": turns,
        "reference": "Sol.",
        "source": "prompts.jsonl",
        "domain": "vejr",
    }
    assert second["reference"] is None


def test_limit_counts_prompts_and_keeps_them_parallel(tmp_path: Path) -> None:
    rows = [row(str(n), code) for n in range(4) for code in ("en", "da", "fr")]
    found = read(write(tmp_path, *rows), "en", "da", limit=2)
    keys = [(r["prompt_id"], r["language"]) for r in found.prompts.to_pylist()]
    assert keys == [("0", "en"), ("0", "da"), ("1", "en"), ("1", "da")]
    assert found.not_asked_for == {"fr": 4}
    assert found.beyond_limit == 4


def test_what_cannot_be_carried_goes_to_the_ledger(tmp_path: Path) -> None:
    call = [
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": "1"},
    ]
    found = read(write(tmp_path, row("a", messages=USER + call), row("b")))
    assert found.prompts.column("prompt_id").to_pylist() == ["b"]
    (dropped,) = found.dropped.to_pylist()
    assert (dropped["unit"], dropped["prompt_id"], dropped["language"]) == ("prompt", "a", "da")
    assert "tool_calls" in dropped["reason"]


def test_parquet_and_other_column_names(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    messages = [{"role": "user", "content": "Who?", "tool_calls": None}]
    pq.write_table(pa.Table.from_pylist([{"id": 3, "lang": "en", "messages": messages}]), path)
    found = read(str(path), "en", id_column="id", language_column="lang")
    assert found.prompts.to_pylist()[0]["messages"] == [{"role": "user", "content": "Who?"}]
    path.write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"prompts\.parquet: expected a Parquet file"):
        read(str(path))


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ('{"prompt_id": ', "line 2: expected a JSON object"),
        ("[1]", "line 2: expected an object with messages, found a list"),
        ({"language": "da", "messages": USER}, "line 2: no column 'prompt_id' (found: language, messages)"),
        ({"prompt_id": "b", "messages": USER}, "name the one to use in prompts.language_column"),
        (row(None), "line 2: prompt_id is missing, expected text"),
        (row(""), "line 2: prompt_id is empty"),
        (row(1.5), "line 2: prompt_id is a number, expected text or a whole number"),
        (row("b", messages=[]), "line 2: messages is empty"),
        (row("b", messages="Hvem?"), "line 2: messages is text, expected a list"),
        ({"prompt_id": "b", "language": "da"}, "line 2: messages is missing"),
        (row("b", messages=["Hvem?"]), "line 2, message 1: expected {role, content}, found text"),
        (
            row("b", messages=[{"role": "human", "content": "x"}]),
            "message 1: role is 'human', expected one of",
        ),
        (
            row("b", messages=[{"role": "user", "content": 3}]),
            "message 1: content is a number, expected text",
        ),
        (row("b", messages=[{"role": "user"}]), "message 1: content is missing, expected text"),
        (row("b", messages=[{"role": "user", "content": " \n"}]), "line 2: the prompt is empty"),
        (
            row("b", messages=[*USER, {"role": "assistant", "content": "x"}]),
            "the last message is the assistant's",
        ),
        (row("b", reference=3), "line 2: reference is a number"),
        (row("a"), "line 2: prompt_id 'a' in 'da' is a duplicate of"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, bad: Any, sentence: str) -> None:
    source = write(tmp_path, row("a"), bad)
    with pytest.raises(UserError) as error:
        read(source)
    assert sentence in str(error.value)
    assert source in str(error.value)


def test_a_number_and_its_text_are_the_same_id(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="duplicate"):
        read(write(tmp_path, row("1"), row(1)))


def test_sources_that_do_not_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no prompts in 'cy' \(languages found: da\)"):
        read(write(tmp_path, row()), "da", "cy")
    with pytest.raises(UserError, match="no such file"):
        read(str(tmp_path / "none.jsonl"))
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(UserError, match=r"expected 'lab', a \.jsonl, \.jsonl\.gz, \.json or \.parquet file"):
        read(str(tmp_path / "x.csv"))
    with pytest.raises(UserError, match=r"hf:nobody/nothing' \(split 'train'\) cannot be loaded"):
        read("hf:nobody/nothing")


def test_the_lab_gives_parallel_prompts() -> None:
    found = read("lab", "en", "da", limit=5).prompts
    ids = {
        code: [r["prompt_id"] for r in found.to_pylist() if r["language"] == code] for code in ("en", "da")
    }
    assert len(ids["en"]) == 5
    assert ids["en"] == ids["da"]
