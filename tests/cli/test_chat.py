"""`croco chat`: a real tiny policy answers what is piped into it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from conftest import TinyModels, write_recipe
from croco.cli.main import app
from croco.config.load import load
from croco.config.training import Lora
from croco.errors import printable
from croco.models.chat_template import prompt_ids
from croco.models.loading import load_policy
from croco.models.lora import apply_lora
from croco.models.protocols import Decoding, Request
from croco.models.transformers import HFSampler

FIRST, SECOND = "Which month comes after March?", "And after April?"


def chat(folder: Path, *words: str, said: str, code: int = 0) -> str:
    found = CliRunner().invoke(app, ["chat", str(folder), "--max-new-tokens=8", *words], input=said)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == code, found.output
    return found.stderr if code else found.stdout


def answers(model: Path, adapter: Path | None, *turns: str, instruction: str | None = None) -> str:
    """What the sampler of the pipeline says to the same turns, greedily."""
    policy, tokenizer = load_policy(str(model), adapter=adapter)
    sampler = HFSampler(policy, tokenizer)
    messages, lines = [], []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ask = Request(0, prompt_ids(tokenizer, messages, instruction), [1])
        ((_, (drawn,)),) = sampler.sample([ask], Decoding(0.0, 1.0, 0, 8))
        text = tokenizer.decode(drawn.ids, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text})
        lines.append(printable(text))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def adapter(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    adapted = apply_lora(
        load_policy(str(tiny_models.policy))[0],
        Lora(rank=4, alpha=8, dropout=0.0, targets=("q_proj", "v_proj")),
        seed=0,
    )
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.5)
    adapted.save_pretrained(folder)
    return folder


def test_a_conversation_keeps_its_turns_until_it_begins_anew(tiny_models: TinyModels) -> None:
    said = chat(tiny_models.policy, said=f"{FIRST}\n\n{SECOND}\n/new\n{SECOND}\n/quit\n{FIRST}\n")
    both, alone = answers(tiny_models.policy, None, FIRST, SECOND), answers(tiny_models.policy, None, SECOND)
    assert said == both + alone


def test_an_adapter_and_the_folder_that_croco_train_leaves(tiny_models: TinyModels, adapter: Path) -> None:
    tuned = answers(tiny_models.policy, adapter, FIRST)
    assert tuned != answers(tiny_models.policy, None, FIRST)
    assert chat(adapter, said=FIRST) == tuned  # the last line need not end
    assert chat(adapter.parent, said=FIRST) == tuned


def test_an_arm_of_a_run_and_its_base(tiny_models: TinyModels, adapter: Path, tmp_path: Path) -> None:
    recipe = load(write_recipe(tmp_path, tiny_models), ["policy.instruction.da=Svar på dansk."])
    run = recipe.folder
    (run / "train" / "monolingual").mkdir(parents=True)
    (run / "train" / "monolingual" / "adapter").symlink_to(adapter)
    (run / "recipe.json").write_text(recipe.model_dump_json())
    assert chat(run, "--arm=monolingual", said=FIRST) == answers(tiny_models.policy, adapter, FIRST)
    danish = answers(tiny_models.policy, None, FIRST, instruction="Svar på dansk.")
    assert chat(run, "--arm=base", "--language=da", said=FIRST) == danish
    assert "expected --arm with one of its arms" in chat(run, said="", code=2)
    assert "no such arm, expected one of monolingual, likelihood, base" in chat(
        run, "--arm=x", said="", code=2
    )
    assert "holds no tuned policy: run `croco run` first" in chat(run, "--arm=likelihood", said="", code=2)
    assert "policy.instruction has nothing for 'fr'" in chat(
        run, "--arm=base", "--language=fr", said="", code=2
    )


def test_nothing_of_the_models_generation_config_changes_an_answer(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    own = answers(tiny_models.policy, None, FIRST)
    tokenizer = load_policy(str(tiny_models.policy))[1]
    first = tokenizer(own, add_special_tokens=False)["input_ids"][0]
    model = tmp_path / "model"
    shutil.copytree(tiny_models.policy, model)
    config = json.loads((model / "generation_config.json").read_text())
    config |= {"suppress_tokens": [first], "no_repeat_ngram_size": 1, "repetition_penalty": 5.0}
    (model / "generation_config.json").write_text(json.dumps(config))
    assert chat(model, said=FIRST) == own


def test_a_runs_truncation_and_stop_strings_are_kept_to(tiny_models: TinyModels, tmp_path: Path) -> None:
    greedy = answers(tiny_models.policy, None, FIRST)
    stop = next(letter for letter in greedy[1:] if letter.isalpha())
    recipe = load(
        write_recipe(tmp_path, tiny_models), ["sampling.top_k=1", f"sampling.stop={json.dumps([stop])}"]
    )
    recipe.folder.mkdir(parents=True)
    (recipe.folder / "recipe.json").write_text(recipe.model_dump_json())
    said = chat(recipe.folder, "--arm=base", "--temperature=3", said=FIRST)  # of one token each, however hot
    assert stop in said
    assert greedy.startswith(said.rstrip("\n"))
    assert len(said) < len(greedy)


def test_sampling_and_what_is_too_long(tiny_models: TinyModels) -> None:
    found = CliRunner().invoke(
        app,
        ["chat", str(tiny_models.policy), "--temperature=2", "--system=Be brief."],
        input="x " * 5000 + f"\n{FIRST}\n",
    )
    assert found.exit_code == 0, found.output
    assert "the conversation fills the context of" in found.stderr
    assert found.stdout.strip()


def test_bad_folders_are_one_sentence(tiny_models: TinyModels, tmp_path: Path) -> None:
    assert "no such folder" in chat(tmp_path / "x", said="", code=2)
    assert "holds no recipe.json, config.json or adapter_config.json" in chat(tmp_path, said="", code=2)
    assert "--arm x is for a run" in chat(tiny_models.policy, "--arm=x", said="", code=2)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4}))
    assert "names no base model" in chat(tmp_path, said="", code=2)


def test_a_reader_that_goes_away_is_no_traceback(tiny_models: TinyModels) -> None:
    words = [sys.executable, "-m", "croco", "chat", str(tiny_models.policy)]
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdin
    assert process.stderr
    process.stdout.close()
    process.stdin.write(f"{FIRST}\n{SECOND}\n")
    process.stdin.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(timeout=120) in (0, 1, 141)
