"""Prompts from files: every turn kept, every bad row named, every row accounted for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from croco.config.evaluation import Source
from croco.config.load import from_dict
from croco.errors import UserError
from croco.stages.prompts.load import Loaded, load, overlap

USER = [{"role": "user", "content": "Hvem?"}]


def row(prompt_id: Any = "a", language: Any = "da", messages: Any = USER, **more: Any) -> dict[str, Any]:
    return {"prompt_id": prompt_id, "language": language, "messages": messages, **more}


def write(tmp_path: Path, *rows: Any) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return str(path)


def read(source: str, *codes: str, languages: tuple[str, ...] = (), **options: Any) -> Loaded:
    section = Source(source=source, **options)
    return load(section, "prompts", languages or codes or ("da",), section.limit)


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


def test_the_first_turn_alone_and_the_answer_to_it(tmp_path: Path) -> None:
    def say(*roles: str) -> list[dict[str, str]]:
        return [{"role": role, "content": f"{number} {role}"} for number, role in enumerate(roles)]

    source = write(
        tmp_path,
        row("a", messages=say("system", "user", "assistant", "user", "assistant")),
        row("b", messages=say("user", "assistant", "user"), reference="of the last turn"),
        row("c", reference="gold"),
        row("d", messages=say("user", "user")),
    )
    rows = read(source, turns="first").prompts.to_pylist()
    assert [[turn["content"] for turn in one["messages"]] for one in rows] == [
        ["0 system", "1 user"],
        ["0 user"],
        ["Hvem?"],
        ["0 user"],
    ]
    assert [one["reference"] for one in rows] == ["2 assistant", "1 assistant", "gold", None]
    assert len(read(source).prompts.to_pylist()[0]["messages"]) == 4


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
        ("[1]", "line 2: expected an object with columns, found a list"),
        ({"language": "da", "messages": USER}, "line 2: no column 'prompt_id' (found: language, messages)"),
        ({"prompt_id": "b", "messages": USER}, "name the one to use in prompts.language_column"),
        (row(None), "line 2: no prompt_id in column 'prompt_id'"),
        (row(""), "line 2: prompt_id is empty"),
        (row(1.5), "line 2: prompt_id is a number, expected text or a whole number"),
        (row("b", messages=[]), "line 2: messages is empty"),
        (row("b", messages="Hvem?"), "line 2: messages is text, expected a list"),
        ({"prompt_id": "b", "language": "da"}, "line 2: no prompt in column 'messages'"),
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
            row("b", messages=[{"role": "assistant", "content": "x"}]),
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
    with pytest.raises(
        UserError, match=r"found x\.csv, expected a \.jsonl, \.jsonl\.gz, \.json or \.parquet file"
    ):
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


@pytest.mark.parametrize("code", ["fi", "no", "en-GB"])
def test_a_language_that_the_lab_does_not_have(code):
    with pytest.raises(UserError, match=f"prompts.source = 'lab' has no prompts in '{code}', expected of"):
        read("lab", "en", "nb", code)


def rows_in(code: str, num: int = 3, **more: Any) -> list[dict[str, Any]]:
    return [
        {"prompt_id": f"p{n}", "language": code, "messages": said(f"{code} {n}"), **more} for n in range(num)
    ]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def first_texts(found: Loaded) -> list[str]:
    return [one["messages"][-1]["content"] for one in found.prompts.to_pylist()]


def hub(folder: Path, configs: dict[str, list[dict[str, Any]]], split: str = "train") -> str:
    """A data set as the hub has it: a card that names the configs, and a Parquet file each."""
    card = ["---", "configs:"]
    for config, values in configs.items():
        pq.write_table(pa.Table.from_pylist(values), _file(folder / config / f"{split}.parquet"))
        card += [
            f"- config_name: {config}",
            "  data_files:",
            f"  - split: {split}",
            f"    path: {config}/*.parquet",
        ]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return f"hf:{folder}"


def _file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_config_of_the_hub_for_every_language(tmp_path: Path) -> None:
    arena = [{"question_id": f"q{n}", "category": "hard", "prompt": f"Why {n}?"} for n in range(2)]
    source = hub(
        tmp_path / "arena", {code: [one | {"language": code} for one in arena] for code in ("da", "en", "fr")}
    )
    found = read(source, "da", "en")  # as it is: its configs are languages
    assert [(r["prompt_id"], r["language"], r["domain"]) for r in found.prompts.to_pylist()] == [
        ("q0", "da", "hard"), ("q1", "da", "hard"), ("q0", "en", "hard"), ("q1", "en", "hard")
    ]  # fmt: skip
    assert first_texts(found) == ["Why 0?", "Why 1?"] * 2
    for chosen in ({"source": f"{source}?config={{language}}"}, {"source": source, "config": "{language}"}):
        assert read(**chosen, languages=("da", "en")).prompts.equals(found.prompts)
    only = read(f"{source}?config=fr", "fr")
    assert set(only.prompts.column("language").to_pylist()) == {"fr"}
    with pytest.raises(
        UserError, match=r"prompts\.source = 'hf:.*' \(config 'cy', split 'train'\) cannot be loaded"
    ):
        read(f"{source}?config={{language}}", "cy")
    with pytest.raises(UserError, match=r"split 'test'\) cannot be loaded"):
        read(source, "da", split="test")


def test_columns_are_mapped_and_a_language_may_be_constant(tmp_path: Path) -> None:
    data = [{"id": n, "spørgsmål": f"Hvem {n}?", "svar": f"Mig {n}", "emne": "x"} for n in range(2)]
    source = hub(tmp_path / "q", {"default": data})
    columns = {"prompt": "spørgsmål", "reference": "svar", "domain": "emne"}
    found = read(source, id_column="id", language="da", columns=columns).prompts.to_pylist()
    assert [(r["messages"], r["reference"], r["domain"]) for r in found] == [
        (said(f"Hvem {n}?"), f"Mig {n}", "x") for n in range(2)
    ]
    with pytest.raises(UserError, match=r"no prompt in column frage .*prompts\.columns\.prompt=NAME"):
        read(source, id_column="id", language="da", columns={"prompt": "frage"})


def test_a_system_prompt_for_all_that_have_none(tmp_path: Path) -> None:
    own = {"role": "system", "content": "Own."}
    found = read(write(tmp_path, row("a"), row("b", messages=[own, *USER])), system="Be brief.")
    assert [one["messages"][0]["content"] for one in found.prompts.to_pylist()] == ["Be brief.", "Own."]


def test_the_last_assistants_turn_is_the_reference(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "Mig."}
    found = read(write(tmp_path, row(messages=[*USER, answer]))).prompts.to_pylist()
    assert (found[0]["messages"], found[0]["reference"]) == (USER, "Mig.")
    with pytest.raises(UserError, match="two texts, expected one"):
        read(write(tmp_path, row(messages=[*USER, answer], reference="Dig.")))


def test_several_files_folders_and_saved_datasets(tmp_path: Path) -> None:
    import datasets

    for code in ("da", "en"):
        write(_file(tmp_path / code / "x").parent, *rows_in(code))
        (tmp_path / code / "prompts.jsonl").rename(tmp_path / f"{code}.jsonl")
    wanted = [f"{code} {n}" for code in ("da", "en") for n in range(3)]
    assert first_texts(read(str(tmp_path / "*.jsonl"), "da", "en")) == wanted
    assert first_texts(read(str(tmp_path), "da", "en")) == wanted
    assert first_texts(read(str(tmp_path), data_files=("da.jsonl",))) == wanted[:3]
    assert first_texts(read(str(tmp_path / "{language}.jsonl"), "da", "en")) == wanted
    with gzip.open(tmp_path / "da.jsonl.gz", "wb") as file:
        file.write((tmp_path / "da.jsonl").read_bytes())
    assert first_texts(read(str(tmp_path / "da.jsonl.gz"))) == wanted[:3]
    (tmp_path / "list.json").write_text(json.dumps(rows_in("da")))
    assert first_texts(read(str(tmp_path / "list.json"))) == wanted[:3]
    whole = datasets.Dataset.from_list(rows_in("da"))
    whole.save_to_disk(str(tmp_path / "saved"))
    assert first_texts(read(str(tmp_path / "saved"))) == wanted[:3]
    datasets.DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(str(tmp_path / "splits"))
    assert first_texts(read(str(tmp_path / "splits"), split="test")) == wanted[:1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="found no file in it"):
        read(str(tmp_path / "empty"))


def test_what_is_left_out_and_what_is_not_read_is_said(tmp_path: Path) -> None:
    wild = row(
        messages=[{"role": "user", "content": "Hvem?", "toxic": False, "turn": 7, "name": ""}], topic="x"
    )
    assert read(write(tmp_path, wild)).unread == {"message key toxic": 1, "message key turn": 1, "topic": 1}
    calls = [
        row(str(n), messages=[{"role": "assistant", "content": "", "tool_calls": [1]}, *USER])
        for n in range(3)
    ]
    with pytest.raises(UserError, match=r"none at all; left out: 3, a message has tool_calls"):
        read(write(tmp_path, *calls))


def test_test_prompts_that_are_the_tuning_prompts(tmp_path: Path) -> None:
    tuning, copy = tmp_path / "t.jsonl", tmp_path / "c.parquet"
    tuning.write_text("".join(json.dumps(one) + "\n" for one in rows_in("da", 4)))
    other = [
        {"prompt_id": f"q{n}", "language": "da", "messages": said(f"da {n if n < 3 else 9}")}
        for n in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(other), copy)
    values = {"run": {"name": "x", "languages": ["da"]}, "arms": {"a": {}}, "policy": {"model": "lab:policy"}}
    sources = {"prompts": {"source": str(tuning)}, "evaluation": {"source": str(copy)}}
    assert overlap(from_dict(values | sources)) == (0, 3, 4)
