"""The stage on real models: a tiny Llama that knows a phrasebook by heart, faults and all, and one that knows nothing.

The phrasebook model translates nine sentences into Danish and German as it was taught in seconds, some of them wrongly
on purpose, so that rows survive and rows fail through the real tokenizer, engine, worker and checks.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import killed
import tiny
from conftest import TinyModels
from croco.cli.main import app
from croco.config.load import load
from croco.errors import UserError
from croco.models.chat_template import prompt_ids
from croco.models.open import open_sampler
from croco.pipeline import run as pipeline
from croco.pipeline.stage import Task
from croco.stages.translate.translate import FORMATS, TranslateWorker
from croco.storage import shards
from croco.storage.files import read_json
from croco.storage.shards import read_dropped, read_table
from served import Served, serve

LIMIT = 40  # new tokens
PHRASES = {  # English: Danish, German
    "Answer in one sentence.": ("Svar i én sætning.", "Antworte in einem Satz."),
    "Name a month.": ("Nævn en måned.", "Nenne einen Monat."),
    "March.": ("Marts.", "März."),
    "And the next?": ("Og den næste?", "Und der nächste?"),
    "What does this print?": ("Hvad skriver dette?", "Was gibt das aus?"),
    "Greet {name}.": ("Hils på {navn}.", "Grüße {name}."),
    "It began in 1914.": ("Det begyndte da.", "Es begann 1914."),
    "Write one short sentence about April.": (
        "Write one short sentence about April.",
        "Schreibe einen kurzen Satz über April.",
    ),
    "Go on and on.": ("ja " * 20, "Immer weiter."),
}
CODE = "```python\nprint('March')  # a comment\n```"
CALL = '{"month": "March"}'
PROMPTS: dict[str, list[tuple[str, str]]] = {
    "turns": [
        ("system", "Answer in one sentence."),
        ("user", "Name a month."),
        ("assistant", "March."),
        ("tool", CALL),
        ("user", "And the next?"),
    ],
    "code": [("user", f"What does this print?\n{CODE}\n\n  Answer in one sentence.\n")],
    "placeholder": [("user", "Name a month."), ("assistant", "March."), ("user", "Greet {name}.")],
    "number": [("user", "It began in 1914.")],
    "copy": [("user", "Write one short sentence about April.")],
    "loop": [("user", "Go on and on.")],
    "long": [("user", "Why " + "and why " * 200 + "?")],
    "nothing": [("user", "42 `x`")],
}
# what each prompt of PROMPTS ends as in Danish: its last turn, or the kind of its reason
DANISH = {
    "turns": "Og den næste?",
    "code": f"Hvad skriver dette?\n{CODE}\n\n  Svar i én sætning.\n",
    "nothing": "42 `x`",
}
FAULTS = {
    "placeholder": "placeholder changed: turn 3 (user), {name} occurs 1, then 0 times",
    "number": "number lost: turn 1 (user), 1914 occurs 1, then 0 times",
    "copy": "untranslated copy: turn 1 (user), the translation is the source",
    "loop": f"cut: turn 1 (user), the translation has not ended after {LIMIT} tokens",
    "long": "too long: turn 1 (user), its prompt has",
}


@pytest.fixture(scope="module")
def phrasebook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama trained on every phrase in both languages until it knows them by heart."""
    tokenizer, model = (
        tiny.make_tokenizer(),
        tiny.make_policy("llama", hidden=64, layers=1, spread=0.02).train(),
    )
    rows = []
    for english, phrases in PHRASES.items():
        for language, phrase in zip(("da", "de"), phrases, strict=True):
            prompt = prompt_ids(tokenizer, FORMATS["tower"](english, "en", language))
            rows.append((prompt, [*tokenizer(phrase)["input_ids"], tokenizer.eos_token_id]))
    longest = max(len(prompt) + len(phrase) for prompt, phrase in rows)
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
    for row, (prompt, phrase) in enumerate(rows):
        ids[row, : len(prompt) + len(phrase)] = torch.tensor(prompt + phrase)
        labels[row, len(prompt) : len(prompt) + len(phrase)] = torch.tensor(phrase)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if loss.item() < 0.02:
            break
    return tiny.save(tmp_path_factory.mktemp("phrasebook"), model.eval(), tokenizer)


def write(path: Path, prompts: dict[str, list[tuple[str, str]]]) -> Path:
    rows = [
        {
            "prompt_id": name,
            "language": "en",
            "messages": [{"role": role, "content": content} for role, content in turns],
            "reference": "A completion in English.",
            "domain": "months",
        }
        for name, turns in prompts.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(folder: Path, models: TinyModels, translator: Path, run: str = "run") -> Path:
    tuning, test = (
        write(folder / "prompts.jsonl", PROMPTS),
        write(folder / "test.jsonl", {"t": PROMPTS["turns"][1:]}),
    )
    path = folder / f"{run}.toml"
    path.write_text(RECIPE.format(**locals()), encoding="utf-8")
    return path


RECIPE = """
[run]
name = "tiny"
folder = "{folder}/{run}"
languages = ["en", "da", "de"]

[prompts]
source = "{tuning}"

[translate]
model = "{translator}"
format = "tower"
evaluation = true
max_new_tokens = 40

[policy]
model = "{models.policy}"

[reward]
model = "{models.reward}"

[sampling]
completions = 2
max_new_tokens = 4

[evaluation]
source = "{test}"

[arms.monolingual]

[runtime]
device = "cpu"
shard_prompts = 3
token_budget = 512
threads = 1
"""


def rows_of(table: Any) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["prompt_id"], row["language"]): row for row in table.to_dicts()}


def test_every_prompt_is_translated_or_in_the_ledger(
    tmp_path: Path, tiny_models: TinyModels, phrasebook: Path
) -> None:
    pipeline.run(load(write_recipe(tmp_path, tiny_models, phrasebook)), until="score")
    stage = tmp_path / "run" / "translate"
    source, made = rows_of(read_table(tmp_path / "run" / "prompts")), rows_of(read_table(stage))
    reasons = {(row["prompt_id"], row["language"]): row["reason"] for row in read_dropped(stage).to_dicts()}
    assert {key: row for key, row in made.items() if key[1] == "en"} == source
    assert {
        name: row["messages"][-1]["content"] for (name, code), row in made.items() if code == "da"
    } == DANISH
    assert {name for name, code in reasons if code == "da"} == FAULTS.keys()
    for name, reason in FAULTS.items():
        assert reasons[name, "da"].startswith(reason)
    # German was taught well: only what cannot be asked for is missing, and nothing has shifted
    assert [key for key in reasons if key[1] == "de"] == [("long", "de")]
    assert made["number", "de"]["messages"] == [{"role": "user", "content": "Es begann 1914."}]
    turns = [(turn["role"], turn["content"]) for turn in made["turns", "da"]["messages"]]
    assert turns[:4] == [
        ("system", "Svar i én sætning."),
        ("user", "Nævn en måned."),
        ("assistant", "Marts."),
        ("tool", CALL),
    ]
    assert made["turns", "da"]["reference"] is None
    assert made["turns", "da"]["domain"] == "months"
    found = read_json(stage / "stage.json")
    assert found["counts"]["read"] == {"prompt": 3 * len(PROMPTS)}
    assert found["facts"]["engine"] == "transformers"
    assert found["facts"]["tokens"] > 0
    # what follows reads the translated prompts; the policy's context is too short for one of them
    sampled = set(read_table(tmp_path / "run" / "sample").select("prompt_id", "language").iter_rows())
    assert sampled == made.keys() - {("long", "en")}


def test_a_server_translates_the_same(tmp_path: Path, tiny_models: TinyModels, phrasebook: Path) -> None:
    found = {}
    with serve(Served(phrasebook)) as served:
        there = ["runtime.engines.translate=server", f"runtime.servers.translate.url={served.url}"]
        for way, more in {
            "here": [],
            "completions": there,
            "chat": [*there, "runtime.servers.translate.api=chat"],
        }.items():
            path = write_recipe(tmp_path, tiny_models, phrasebook, run=way)
            pipeline.run(load(path, more), until="translate")
            found[way] = [read(tmp_path / way / "translate") for read in (read_table, read_dropped)]
    assert found["completions"][0].equals(found["here"][0])
    assert found["completions"][1].equals(found["here"][1])
    # without a tokenizer here it is the server that finds a prompt too long
    assert found["chat"][0].equals(found["here"][0])
    long = found["chat"][1].filter(prompt_id="long")
    assert long["reason"].str.starts_with("engine: turn 1 (user), the server refuses the prompt").all()
    assert long.height == 2


def test_prompts_to_evaluate_on_are_translated_too(
    tmp_path: Path, tiny_models: TinyModels, phrasebook: Path
) -> None:
    path = str(write_recipe(tmp_path, tiny_models, phrasebook))
    for command in ("eval-prompts", "eval-translate"):
        found = CliRunner().invoke(app, [command, path])
        assert found.exit_code == 0, found.output
    assert "3 prompts" in found.output
    assert set(rows_of(read_table(tmp_path / "run" / "eval-translate"))) == {
        ("t", c) for c in ("da", "de", "en")
    }
    by_title = {node.title: node for node in pipeline.nodes(load(path))}
    assert by_title["evaluate/base"].inputs["eval-prompts"].title == "eval-translate"


def test_a_model_that_cannot_translate_fills_the_ledger(tmp_path: Path, tiny_models: TinyModels) -> None:
    overrides = ["translate.format=instruct", "runtime.shard_prompts=100"]
    path = write_recipe(tmp_path, tiny_models, tiny_models.policy)
    pipeline.run(load(path, overrides), until="translate")
    stage = tmp_path / "run" / "translate"
    kept = rows_of(read_table(stage)).keys()
    # nothing is asked for a prompt without words
    assert kept == {(name, "en") for name in PROMPTS} | {("nothing", "da"), ("nothing", "de")}
    assert read_dropped(stage).height == 2 * (len(PROMPTS) - 1)
    assert {reason.partition(":")[0] for reason in read_dropped(stage)["reason"]} >= {"cut", "too long"}


def test_a_shard_does_not_depend_on_the_others_and_a_text_is_sent_once(
    tmp_path: Path, tiny_models: TinyModels, phrasebook: Path
) -> None:
    recipe = load(write_recipe(tmp_path, tiny_models, phrasebook))
    pipeline.run(recipe, until="prompts")
    tables, sent = [], []
    for size in (2, 5, 100):
        cut = recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"shard_prompts": size})})
        settings = {"model": cut.translate, "languages": ("da", "de", "en")}
        inputs = {"prompts": tmp_path / "run" / "prompts"}
        worker = TranslateWorker(Task(None, tmp_path, settings, cut.runtime, inputs), 0)
        sample = worker.sampler.sample
        worker.sampler.sample = lambda requests, decoding, sample=sample: (
            sent.append(len(requests)) or sample(requests, decoding)
        )
        finished = sorted(
            worker.shards(range(-(-24 // size)), lambda rows: None), key=lambda shard: shard.index
        )
        tables.append([row for shard in finished for row in shard.table.to_pylist()])
        assert sum(shard.read["prompt"] for shard in finished) == 24
        assert sum(shard.dropped.num_rows for shard in finished) == 24 - len(tables[-1])
    assert tables[0] == tables[1] == tables[2]
    assert sent == [2 * len(PHRASES)] * 3  # "Name a month." stands in two prompts


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_to_the_same_table(
    tmp_path: Path, tiny_models: TinyModels, phrasebook: Path
) -> None:
    calm = write_recipe(tmp_path, tiny_models, phrasebook, "calm")
    pipeline.run(load(calm, ["runtime.shard_prompts=1"]), until="translate")
    again = write_recipe(tmp_path, tiny_models, phrasebook, "killed")
    stage, log = tmp_path / "killed" / "translate", tmp_path / "log.txt"
    words = ["run", str(again), "--until", "translate", "--set", "runtime.shard_prompts=1"]
    process = multiprocessing.get_context("forkserver").Process(target=killed.croco, args=(words, str(log)))
    process.start()
    end = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < end and len(shards.shards(stage)) < 3:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    finished = len(shards.shards(stage))
    assert 3 <= finished < 24
    pipeline.run(load(again, ["runtime.shard_prompts=1"]), until="translate")
    assert read_json(stage / "stage.json")["starts"] == 2
    for read in (read_table, read_dropped):
        assert read(stage).equals(read(tmp_path / "calm" / "translate"))


STRICT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['content'] is string or (message['content'] | length) != 1 %}"
    "{{ raise_exception('content must be a list with one entry') }}{% endif %}"
    "{% set part = message['content'][0] %}<|user|>{{ part['source_lang_code'] }} > {{ part['target_lang_code'] }}: "
    "{{ part['text'] | trim }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_gemma_3_with_a_template_like_translategemmas_is_asked_in_its_form(
    tmp_path: Path, tiny_models: TinyModels
) -> None:
    model = tiny.make_policy("gemma3 with images")
    model.generation_config.eos_token_id = 2
    folder = tiny.save(tmp_path / "gemma", model, tiny.make_tokenizer(chat_template=STRICT))
    recipe = load(write_recipe(tmp_path, tiny_models, folder), ["translate.format=translategemma"])
    pipeline.run(recipe, until="translate")
    assert read_json(tmp_path / "run" / "translate" / "stage.json")["state"] == "complete"
    _, tokenizer = open_sampler("translate", recipe.translate, recipe.runtime, 0)
    asked = tokenizer.decode(prompt_ids(tokenizer, FORMATS["translategemma"](" März? ", "de", "da")))
    assert asked == "<|bos|><|user|>de > da: März?<|end|><|assistant|>"
    with pytest.raises(UserError, match="content must be a list with one entry"):
        prompt_ids(tokenizer, FORMATS["tower"]("März?", "de", "da"))


def test_what_cannot_be_translated_is_said_before_anything_runs(
    tmp_path: Path, tiny_models: TinyModels
) -> None:
    path = write_recipe(tmp_path, tiny_models, tiny_models.policy)
    for override, sentence in (
        ("translate.source=xx", "'xx' is no language that CLDR knows"),
        ("run.languages=['en']", "translate.source = 'en' is the only language of run.languages"),
        ("translate.modle=x", "unknown key 'translate.modle'; did you mean 'translate.model'?"),
        ("translate.checks=['lenght']", "translate.checks.0 = 'lenght', expected one of 'items', 'numbers'"),
        ("translate.model=/no/such/place", "translate.model = '/no/such/place': no such directory"),
        ("translate.source=da", "has no prompts in 'da' (languages found: en)"),
    ):
        found = CliRunner().invoke(app, ["run", str(path), "--set", override])
        assert found.exit_code == 2, found.output
        assert sentence in found.output
    without = tmp_path / "without.toml"
    text = path.read_text(encoding="utf-8")
    section = text[text.index("[translate]") : text.index("[policy]")]
    without.write_text(text.replace(section, ""), encoding="utf-8")
    for words in (["translate", str(without)], ["run", str(without), "--until", "eval-translate"]):
        found = CliRunner().invoke(app, words)
        assert found.exit_code == 2, found.output
        assert "the recipe does not ask for it" in found.output


def test_plan_and_doctor_know_the_translation(tmp_path: Path, tiny_models: TinyModels) -> None:
    path = str(write_recipe(tmp_path, tiny_models, tiny_models.policy))
    found = CliRunner().invoke(app, ["plan", path])
    assert "translate: 8 prompts from en into 2 languages = 16 translations" in found.output, found.output
    assert "24 prompts in 3 languages × 2 completions = 48" in found.output
    found = CliRunner().invoke(app, ["doctor", path])
    assert found.exit_code == 0, found.output
    assert "translation   " in found.output
    assert "format tower: the first text of the first prompt takes at most" in found.output


def test_how_it_is_translated_changes_its_fingerprint_and_where_does_not(
    tmp_path: Path, tiny_models: TinyModels
) -> None:
    path = write_recipe(tmp_path, tiny_models, tiny_models.policy)

    def fingerprints(*overrides: str) -> dict[str, str]:
        return {node.title: node.fingerprint for node in pipeline.nodes(load(path, overrides))}

    before = fingerprints()
    assert fingerprints("runtime.engines.translate=vllm", "runtime.token_budget=9") == before
    for override in ("translate.format=instruct", "translate.checks=[]", "translate.max_length_ratio=3.0"):
        after = fingerprints(override)
        changed = {title for title in before if before[title] != after[title]}
        assert changed == before.keys() - {"prompts", "eval-prompts"}
    # a language that is only evaluated does not make the translation of the tuned ones stale
    more = fingerprints("run.held_out_languages=['sv']")
    assert more["translate"] == before["translate"]
    assert more["eval-translate"] != before["eval-translate"]
