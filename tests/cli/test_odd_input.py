"""Inputs that people have and that once ended in a traceback, or without end: each is one sentence and exit code 2, or
goes to the ledger. Through the program, with real models; what one reader makes of its kind is tested beside it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from conftest import TinyModels, write_prompts, write_recipe
from croco.cli.main import app
from croco.storage.shards import read_dropped

LAB = ("prompts.source=lab", "evaluation.source=lab", "policy.model=lab:policy", "reward.model=lab:reward")
DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5000


def sentence(*words: object) -> str:
    """The one line that the program ends with, at exit code 2."""
    found = CliRunner().invoke(app, [str(word) for word in words])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 2, found.output
    (line,) = [line for line in found.output.splitlines() if line.startswith("croco: ")]
    assert found.output.rstrip().endswith(line)
    return line


@pytest.fixture
def folder(tmp_path: Path, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a recipe, `policy` and `reward` to spoil."""
    write_recipe(tmp_path, tiny_models)
    for name in ("policy", "reward"):
        shutil.copytree(getattr(tiny_models, name), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Recipes --------------------------------------------------------------------------------------------------------------

RECIPES = [
    (["run.languages=['nb','no']", *LAB], "prompts.source = 'lab' has no prompts in 'no'"),
    (["run.languages=['no']", "run.held_out_languages=['nb']", *LAB], "no prompts in 'no'"),
    (["run.languages=['en','en-GB']", *LAB], "no prompts in 'en-GB'"),
    (["arms.monolingual.rounds=100000000000"], "rounds = 100000000000, expected at most"),
    (["training.epochs=100000000000"], "expected at most"),
    (["training.updates=100000000000"], "expected at most"),
    (["sampling.completions=1000000"], "expected at most"),
    (["arms.monolingual.pairs_per_pool=1000000"], "expected at most"),
    (["prompts.limit=1000000000"], "expected at most"),
    (["runtime.shard_prompts=1000000000"], "expected at most"),
    (["runtime.token_budget=1000000000"], "expected less than"),
    (["runtime.micro_batch_tokens=1000000000"], "expected a number of tokens"),
    (["training.lora.rank=1000000"], "expected at most"),
    (["training.sentinel.evaluations=1000000"], "expected at most"),
    (["evaluation.bootstrap=1000000000"], "expected at most"),
    (["evaluation.samples=1000000"], "expected at most"),
    (["sweep.of=monolingual", "sweep.completions=" + str([*range(2, 1003)])], "makes 1,001 arms"),
    (["run.seed=-1"], "run.seed = -1, expected at least 0"),
    (["run.seed=9223372036854775808"], "run.seed"),
    (["training.learning_rate=inf"], "expected a finite number"),
    ([r'run.folder="run\u0000x"'], "null character"),
    ([f"run.folder={'a' * 300}"], "more than 255 bytes"),
    (["runtime.device=tpu"], "'tpu' is no device"),
    (["runtime.servers.sample.url=http://localhost:99999/v1"], "is no address"),
    (["runtime.servers.sample.url=http://a\u0301..x/v1"], "is no address"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "part"), RECIPES, ids=[each[0][0][:40] for each in RECIPES])
def test_a_recipe_that_cannot_be_meant(folder: Path, settings: list[str], part: str) -> None:
    given = [word for setting in settings for word in ("--set", setting)]
    assert part in sentence("plan", "recipe.toml", *given)


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "3",
        '{"arms": {"a": {}}, "sampling": null, "sweep": {"of": "a", "completions": [4]}}',
        DEEP,
        f'{{"run": {DIGITS}}}',
        "",
        '{"run": {"name": "\\ud800"}}',
        "\x00",
    ],
)
def test_a_resolved_recipe_that_is_none(folder: Path, text: str) -> None:
    (folder / "recipe.json").write_text(text)
    assert "recipe.json" in sentence("plan", "recipe.json")


RUNS = [
    (["run.folder=recipe.toml"], "cannot be made or written"),
    (["run.folder=recipe.toml/x"], "cannot be made or written"),
    (["run.folder=/proc/x"], "cannot be made or written"),
    (["policy.model=~no-such-person/x"], "policy.model = '~no-such-person/x': no such directory"),
    ([f"policy.model={'a' * 5000}"], "policy.model = "),
    (["prompts.source=~no-such-person/x.jsonl"], "no such file"),
    ([f"prompts.source={'a' * 5000}"], "no such file"),
    (["reward.max_tokens=1"], "no pair to train on"),
    (["reward.max_tokens=5"], "no pair to train on"),
    (["runtime.device=cuda:99"], "CUDA devices"),
]


@pytest.mark.parametrize(("settings", "part"), RUNS, ids=[each[0][0][:40] for each in RUNS])
def test_a_run_that_cannot_be(folder: Path, settings: list[str], part: str) -> None:
    given = [word for setting in settings for word in ("--set", setting)]
    assert part in sentence("run", "recipe.toml", *given)


# Prompts --------------------------------------------------------------------------------------------------------------


def line(prompt_id: str = '"a"', content: str = "Hej", extra: str = "0") -> str:
    messages = f'[{{"role": "user", "content": "{content}"}}]'
    return f'{{"prompt_id": {prompt_id}, "language": "en", "messages": {messages}, "extra": {extra}}}\n'


PROMPTS = [
    (line(DIGITS), "line 1"),
    (line('"a\\ud800"'), "half a surrogate pair"),
    (line(content="a\\ud800b"), "half a surrogate pair"),
    (line()[:-30], "line 1"),
    (DEEP, "nested too deep"),
    (line(extra=DEEP), "nested too deep"),
]


@pytest.mark.parametrize(
    ("text", "part"), PROMPTS, ids=["digits", "id", "text", "cut", "deep", "deep column"]
)
def test_prompts_that_are_no_text(folder: Path, text: str, part: str) -> None:
    (folder / "p.jsonl").write_text(text)
    said = sentence("run", "recipe.toml", "--set", "prompts.source=p.jsonl", "--until", "prompts")
    assert "p.jsonl, line 1" in said
    assert part in said


@pytest.mark.parametrize("codec", ["snappy", "zstd"])
def test_prompts_in_damaged_pages(folder: Path, codec: str) -> None:
    rows = [json.loads(row) for row in write_prompts(folder / "p.jsonl", 500).read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), folder / "p.parquet", compression=codec)
    content = bytearray((folder / "p.parquet").read_bytes())
    content[600:900] = bytes(byte ^ 0x55 for byte in content[600:900])
    (folder / "p.parquet").write_bytes(content)
    said = sentence("run", "recipe.toml", "--set", "prompts.source=p.parquet", "--until", "prompts")
    assert "p.parquet: expected a Parquet file" in said


def test_parquet_whose_text_is_no_unicode(folder: Path) -> None:
    text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"prompt_id": ["a"], "language": ["en"], "prompt": text}), folder / "p.parquet")
    said = sentence("run", "recipe.toml", "--set", "prompts.source=p.parquet", "--until", "prompts")
    assert "p.parquet: expected a Parquet file" in said


def test_the_only_prompt_is_longer_than_any_context(folder: Path) -> None:
    write_prompts(folder / "p.jsonl", 1)
    text = (
        (folder / "p.jsonl").read_text().replace("Which", "Which " * 50_000).replace("Hvilken", "æ" * 300_000)
    )
    (folder / "p.jsonl").write_text(text)
    assert "no pair to train on" in sentence("run", "recipe.toml", "--set", "prompts.source=p.jsonl")
    dropped = read_dropped(folder / "run" / "sample")
    assert dropped.height == 24
    assert dropped["reason"].str.contains("the context of").all()


# Models, tokenizers, templates ----------------------------------------------------------------------------------------


def change(name: str, **values: object) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        path = model / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | values))

    return spoil


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_text(content) and None


def pickle(name: str) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / name).write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")

    return spoil


def index_outside(model: Path) -> None:
    """Weights that an index says lie in another folder."""
    (model / "model.safetensors").rename(model.parent / "elsewhere.safetensors")
    names = ["model.embed_tokens.weight"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


MODELS = [
    ("policy", text("tokenizer.json", "{}"), "tokenizer does not load"),
    ("policy", text("tokenizer_config.json", "[1]"), "tokenizer_config.json holds a list"),
    ("policy", text("tokenizer.json", ""), "tokenizer.json is no JSON"),
    ("policy", text("config.json", "[1]"), "config.json holds a list"),
    ("policy", text("config.json", DEEP), "config.json"),
    ("policy", change("config.json", hidden_size="big"), "hidden_size"),
    ("policy", change("config.json", hidden_size=-32), "policy"),
    ("policy", change("config.json", num_attention_heads=0), "config.json"),
    ("policy", change("config.json", max_position_embeddings=0), "max_position_embeddings = 0"),
    ("policy", change("config.json", max_position_embeddings="long"), "max_position_embeddings"),
    ("policy", change("config.json", vocab_size=10**12), "policy"),
    ("policy", change("config.json", num_hidden_layers=10**6), "num_hidden_layers = 1000000"),
    ("policy", change("config.json", model_type="no-such-type"), "no-such-type"),
    ("policy", change("generation_config.json", eos_token_id="x"), "end token 'x'"),
    ("policy", text("generation_config.json", '{"eos_token_id": [2'), "generation_config.json is no JSON"),
    ("policy", pickle("pytorch_model.bin"), "pytorch_model.bin is a pickle"),
    ("policy", index_outside, "policy"),
    ("policy", text("model.safetensors", ""), "policy"),
    ("reward", change("config.json", num_labels="x"), "reward"),
    ("reward", change("config.json", id2label=[1, 2]), "reward"),
    ("reward", text("tokenizer.json", "{}"), "tokenizer does not load"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("role", "spoil", "part"),
    MODELS,
    ids=[f"{place} {each[0]}: {each[2]}" for place, each in enumerate(MODELS)],
)
def test_a_model_that_is_none(
    folder: Path, role: str, spoil: Callable[[Path], None], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(folder / role)
    assert part in sentence(
        "run", "recipe.toml", "--set", f"{role}.model={folder / role}", "--until", "score"
    )
    assert not (folder / "run" / "score" / "part-00000.done").exists()


TEMPLATES = [
    "{{ 1/0 }}",
    "{% for i in range(1000000000) %}x{% endfor %}",
    "{{ 'a'.encode('nope') }}",
    "{{ 'x' * 1000000000 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages[0]['nothing']['at all'] }}",
    "{{ messages | map(attribute='content') | list | first + 3 }}",
    "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "{% include 'other' %}",
    "{% if %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_that_cannot_be_run(folder: Path, template: str) -> None:
    (folder / "t.jinja").write_text(template)
    for role, until in (("policy", "sample"),):
        said = sentence("run", "recipe.toml", "--set", f"{role}.chat_template=t.jinja", "--until", until)
        assert "the chat template refuses" in said
    assert not list((folder / "run" / "sample").glob("*.done"))


# Preference and scored files ------------------------------------------------------------------------------------------

PAIR = {"prompt_id": "a", "language": "en", "prompt": "Which month?", "chosen": "April.", "rejected": "No."}
SCORED = [
    {"prompt_id": "a", "language": "en", "prompt": "Which?", "completion": f"April {n}.", "score": n}
    for n in (1, 2)
]
FILES = [
    ("train", [PAIR | {"chosen": "a\ud800"}], "half a surrogate pair"),
    ("train", [{name: value for name, value in PAIR.items() if name != "prompt_id"} | {"chosen": "\ud800"}], "half a"),
    ("train", [PAIR | {"chosen_ids": [5, 10**6], "rejected_ids": [5]}], "has the ids 0 to"),
    ("train", [PAIR | {"chosen_ids": [-5], "rejected_ids": [5]}], "expected token ids"),
    ("train", [PAIR | {"chosen_ids": ["a"], "rejected_ids": [5]}], "expected token ids"),
    ("train", [PAIR | {"chosen_ids": 5, "rejected_ids": 5}], "expected token ids"),
    ("train", [PAIR | {"chosen_finish_reason": "because"}], "finish reason 'because' is unknown"),
    ("train", [PAIR | {"chosen_finish_reason": 7}], "expected text"),
    ("train --set run.seed=-1", [PAIR], "seed"),
    ("train --set training.lora.rank=40000000000", [PAIR], "expected at most"),
    ("train", [PAIR | {"chosen": {}}], "role is None"),
    ("train", [[PAIR]], "expected an object"),
    ("train", [], "no rows"),
    ("pairs", [SCORED[0] | {"score": 10**400}, SCORED[1]], "more digits than"),
    ("pairs", [SCORED[0] | {"score": "high"}, SCORED[1]], "score is text"),
    ("pairs", [SCORED[0] | {"sample_id": 3_000_000_000}, SCORED[1]], "sample_id is 3000000000"),
    ("pairs", [SCORED[0] | {"finish_reason": 3}, SCORED[1]], "finish_reason is a number"),
    ("pairs", [SCORED[0] | {"completion": "\ud800"}, SCORED[1]], "half a surrogate pair"),
    ("pairs", [SCORED[0] | {"language": "no such language"}, SCORED[1]], "no such language"),
    ("pairs", [], "no rows"),
    ("score --diagnose --reward REWARD", [PAIR | {"rejected": "\ud800"}], "half a surrogate pair"),
    ("score --diagnose --reward REWARD", [PAIR | {"rejected": 3}], "rejected"),
    ("score --diagnose --reward REWARD", [], "no pairs"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "rows", "part"), FILES, ids=[f"{n} {each[0][:5]}" for n, each in enumerate(FILES)]
)
def test_files_of_other_tools(folder: Path, command: str, rows: list[dict], part: str) -> None:
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    verb, *words = command.replace("REWARD", "reward").split()
    model = ["--model", "policy"] if verb == "train" else []
    said = sentence(verb, "x.jsonl", *words, *model, "--to", "out")
    assert part in said
    assert not list((folder / "out").rglob("*.safetensors"))
    assert not list((folder / "out").rglob("export/**/*.parquet"))


# Words and folders ----------------------------------------------------------------------------------------------------

COMMANDS = [
    ("train x.jsonl --model policy --to /proc/x", "cannot be made or written"),
    ("pairs x.jsonl --to /proc/x", "cannot be made or written"),
    ("score x.jsonl --diagnose --reward reward --to /proc/x", "/proc/x cannot be written"),
    ("train x.jsonl --model policy --to x.jsonl", "x.jsonl is a file"),
    ("pairs x.jsonl --to x.jsonl/y", "cannot be made or written"),
    ("train notes.txt --model policy --to out", "expected a .jsonl"),
    ("train x.jsonl x.jsonl --model policy --to out", "is the same file as"),
    ("train none.jsonl --model policy --to out", "none.jsonl: no such file"),
    ("train x.jsonl --model policy --to out --column x=y", "expected OURS=THEIRS"),
    ("train x.jsonl --model policy --to out --language zz", "no language that CLDR knows"),
    ("train x.jsonl --model policy --to out --set sampling.top_k=1", "expected a key of training"),
    ("train x.jsonl --to out", "pairs need --model"),
    ("pairs x.jsonl --to out --format zip", "the format 'zip' is unknown"),
    ("pairs x.jsonl --to out --set chosen=best", 'the rule "best" for chosen is unknown'),
    ("export none --arm a --to out", "none holds no recipe.json"),
    ("merge none --arm a --to out", "none: no such folder"),
    ("report none", "none is no run"),
    ("compare none none", "none is no run"),
    ("plan recipe.toml --set x", "expected section.key=value"),
    ("plan recipe.toml --set a..b=1", "expected section.key=value"),
    ("plan recipe.toml --set run=3", "run = 3, expected a table"),
    ("plan recipe.toml --machine 0xh100", "expected such as 8xh100"),
    ("sample recipe.toml --arm nobody", "no such arm"),
    ("run recipe.toml --until nothing", "is no stage"),
    ("run .", "expected a recipe in TOML"),
    ("run x.jsonl", "not valid TOML"),
    ("fetch none.gguf --to out", "no such file"),
    ("fetch notes.txt --to out", "is no GGUF file"),
]


@pytest.mark.parametrize(("words", "part"), COMMANDS, ids=[each[0] for each in COMMANDS])
def test_words_that_do_not_go_together(folder: Path, words: str, part: str) -> None:
    (folder / "x.jsonl").write_text(json.dumps(PAIR) + "\n")
    (folder / "notes.txt").write_text("mine")
    assert part in sentence(*words.split())
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_name_that_is_no_unicode(folder: Path) -> None:
    name = os.fsdecode(b"x\xff.jsonl")
    (folder / name).write_text(json.dumps(PAIR) + "\n")
    assert "is no Unicode text" in sentence("train", name, "--model", "policy", "--to", "out")
    for key in ("run.folder", "prompts.source"):
        assert "surrogates not allowed" in sentence("plan", "recipe.toml", "--set", f"{key}={name}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(folder: Path) -> None:
    (folder / "shut").mkdir(mode=0o500)
    assert "cannot be made or written" in sentence("run", "recipe.toml", "--set", "run.folder=shut/run")
