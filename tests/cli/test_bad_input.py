"""Bad input through the real command line: one sentence with names, exit code 2, nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from conftest import TinyModels, write_prompts, write_recipe
from croco.cli.main import app
from croco.storage.shards import read_dropped


@dataclass(frozen=True)
class Bench:
    """A recipe that works, its folder, and the means to spoil it with `--set`."""

    folder: Path
    recipe: Path
    models: TinyModels

    def run(self, *overrides: str, command: str = "run") -> Result:
        words = [word for override in overrides for word in ("--set", override)]
        return CliRunner().invoke(app, [command, str(self.recipe), *words])


@pytest.fixture
def bench(tmp_path: Path, tiny_models: TinyModels) -> Bench:
    return Bench(tmp_path, write_recipe(tmp_path, tiny_models), tiny_models)


def assert_one_sentence(found: Result, *parts: str) -> None:
    """Exit code 2, no traceback, one line that holds each part."""
    assert found.exit_code == 2, found.output
    assert isinstance(found.exception, SystemExit), found.exception
    (line,) = [line for line in found.output.splitlines() if line.startswith("croco: ")]
    assert found.output.rstrip().endswith(line), found.output
    assert "Traceback" not in found.output
    for part in parts:
        assert part in line, line


def complete_stages(folder: Path) -> list[str]:
    """Stages of a run that a later one would take for whole."""
    files = sorted((folder / "run").rglob("stage.json"))
    return [file.parent.name for file in files if json.loads(file.read_text())["state"] == "complete"]


def test_unknown_key_wrong_type_and_missing_files(bench: Bench) -> None:
    name = str(bench.recipe)
    assert_one_sentence(bench.run("sampling.completion=3"), name, "'sampling.completions'")
    assert_one_sentence(
        bench.run("sampling.completions=many"), name, "sampling.completions = 'many'", "whole number"
    )
    assert_one_sentence(
        bench.run("prompts.source=none.jsonl"), "prompts.source = 'none.jsonl'", "no such file"
    )
    assert_one_sentence(
        bench.run("policy.chat_template=no.jinja"), "policy.chat_template = 'no.jinja'", "no such file"
    )
    assert_one_sentence(CliRunner().invoke(app, ["run", "none.toml"]), "none.toml: no such recipe")
    assert_one_sentence(CliRunner().invoke(app, ["report", str(bench.folder)]), "recipe.json")
    assert_one_sentence(
        bench.run("run.languages=['en','da','cy']"), "has no prompts in 'cy'", "found: da, en"
    )
    assert complete_stages(bench.folder) == []


def test_a_directory_that_is_no_model(bench: Bench) -> None:
    empty = bench.folder / "empty"
    empty.mkdir()
    for key in ("policy.model", "reward.model"):
        assert_one_sentence(bench.run(f"{key}={empty}"), key, "empty", "config.json")
        assert_one_sentence(bench.run(f"{key}=/no/such/place"), key, "/no/such/place", "no such directory")
        assert_one_sentence(bench.run(f"{key}={bench.recipe}"), key, "is a file")
    assert not (bench.folder / "run").exists()


def test_a_directory_whose_weights_are_gone_or_cut(bench: Bench) -> None:
    import tiny

    gone = tiny.save(bench.folder / "gone", tiny.make_policy("llama"), tiny.make_tokenizer())
    (gone / "model.safetensors").unlink()
    assert_one_sentence(bench.run(f"policy.model={gone}"), str(gone))
    cut = tiny.save(bench.folder / "cut", tiny.make_policy("llama"), tiny.make_tokenizer())
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_one_sentence(bench.run(f"policy.model={cut}"), str(cut))
    assert complete_stages(bench.folder) == ["prompts"]


def test_weights_of_another_network_in_a_models_folder(bench: Bench) -> None:
    import tiny

    deep = tiny.save(bench.folder / "deep", tiny.make_policy("llama"), tiny.make_tokenizer())
    config = json.loads((deep / "config.json").read_text())
    (deep / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert_one_sentence(bench.run(f"policy.model={deep}"), str(deep), "model.layers.1.", "no place for")
    assert_one_sentence(bench.run("policy.model=lab:reward"), "lab:reward", "score.weight", "no place for")


def test_folders_that_cannot_be_made_and_devices_that_are_not_there(bench: Bench) -> None:
    for folder in (bench.recipe, bench.recipe / "under", "/proc/run"):
        assert_one_sentence(bench.run(f"run.folder={folder}"), "this folder cannot be made or written")
    for name in ("~nobody-of-this-name/x", "a" * 5000):
        assert_one_sentence(bench.run(f"policy.model={name}"), "policy.model = ", "no such directory")
        assert_one_sentence(bench.run(f"prompts.source={name}"), "prompts.source = ", "no such file")
    assert_one_sentence(bench.run("runtime.device=cuda:99"), "runtime.device = 'cuda:99'", "CUDA devices")
    assert not (bench.folder / "run").exists()


def test_a_reward_model_with_two_logits(bench: Bench) -> None:
    import tiny

    two = tiny.save(bench.folder / "two", tiny.make_reward("qwen3", num_labels=2), tiny.make_tokenizer())
    assert_one_sentence(bench.run(f"reward.model={two}"), "reward.model", str(two), "2 logits", "one")
    assert_one_sentence(bench.run(f"reward.model={two}", command="doctor"), "2 logits", "one")
    causal = bench.run(f"reward.model={bench.models.policy}")
    assert_one_sentence(causal, "reward.model", "is a causal language model, expected a sequence classifier")
    assert not (bench.folder / "run").exists()


def test_data_sets_that_are_not_there_or_empty(bench: Bench) -> None:
    import datasets

    hub = "prompts.source=hf:nobody/nothing"
    assert_one_sentence(
        bench.run(hub), "prompts.source = 'hf:nobody/nothing' (split 'train') cannot be loaded"
    )
    columns = {name: datasets.Value("string") for name in ("prompt_id", "language", "prompt")}
    empty = datasets.Dataset.from_dict({name: [] for name in columns}, datasets.Features(columns))
    datasets.DatasetDict({"train": empty}).save_to_disk(bench.folder / "saved")
    saved = f"prompts.source={bench.folder / 'saved'}"
    assert_one_sentence(bench.run(saved), "(split 'train') cannot be loaded: it has no rows")
    assert_one_sentence(bench.run(saved, "prompts.split=dev"), "(split 'dev') cannot be loaded")
    assert complete_stages(bench.folder) == []


def test_a_stage_before_what_it_reads_names_the_command(bench: Bench) -> None:
    assert_one_sentence(
        bench.run(command="sample"),
        "sample reads prompts, which is missing: run `croco prompts` or `croco run`",
    )


def test_a_chat_template_that_cannot_take_the_conversation(bench: Bench) -> None:
    refusing = bench.folder / "refusing.jinja"
    refusing.write_text("{{ raise_exception('only the system may speak') }}")
    found = bench.run(f"policy.chat_template={refusing}")
    assert_one_sentence(found, "chat template", "only the system may speak")
    assert complete_stages(bench.folder) == ["prompts"]
    # nothing was made with it, so the same folder goes on with the model's own template
    assert bench.run(command="sample").exit_code == 0


def test_a_chat_template_whose_prompt_is_no_prefix(bench: Bench) -> None:
    shifting = bench.folder / "shifting.jinja"
    shifting.write_text(
        "{% if add_generation_prompt %}<|user|>{% else %}<|system|>{% endif %}"
        "{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}"
    )
    found = bench.run(f"policy.chat_template={shifting}", command="doctor")
    assert_one_sentence(found, "no prefix", "Which month")


def duplicate(lines: list[str]) -> None:
    lines.append(lines[2])


def empty_prompt(lines: list[str]) -> None:
    row = json.loads(lines[3])
    row["messages"][-1]["content"] = "  "
    lines[3] = json.dumps(row)


def malformed(lines: list[str]) -> None:
    lines[1] = lines[1][:-5]


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (duplicate, ("line 21", "'p1' in 'en'", "duplicate", "line 3")),
        (empty_prompt, ("line 4", "the prompt is empty")),
        (malformed, ("line 2", "expected a JSON object")),
    ],
)
def test_bad_rows(bench: Bench, spoil: Callable[[list[str]], None], parts: tuple[str, ...]) -> None:
    path = write_prompts(bench.folder / "spoilt.jsonl", 10)
    lines = path.read_text(encoding="utf-8").splitlines()
    spoil(lines)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert_one_sentence(bench.run(f"prompts.source={path}"), str(path), *parts)
    assert complete_stages(bench.folder) == []
    # mended, the very same command goes on and takes nothing of the failed attempt
    write_prompts(path, 10)
    found = bench.run(f"prompts.source={path}", command="prompts")
    assert found.exit_code == 0, found.output
    assert "20 prompts" in found.output


def test_a_prompt_longer_than_the_context_is_in_the_ledger_once_per_completion(bench: Bench) -> None:
    path = write_prompts(bench.folder / "long.jsonl", 3)
    lines = path.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[2])
    row["messages"][0]["content"] *= 100
    lines[2] = json.dumps(row)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert bench.run(f"prompts.source={path}", command="prompts").exit_code == 0
    found = bench.run(f"prompts.source={path}", command="sample")
    assert "60 completions, 12 completions dropped" in found.output
    dropped = read_dropped(bench.folder / "run" / "sample")
    assert dropped.select("prompt_id", "language").unique().rows() == [("p1", "en")]
    assert (
        dropped["reason"].str.contains(r"^the prompt fills the context of .*, 512 tokens: it has \d+$").all()
    )


def test_weights_that_are_no_numbers(bench: Bench) -> None:
    import torch

    import tiny

    for key, model in (("policy", tiny.make_policy("llama")), ("reward", tiny.make_reward("qwen3"))):
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
        broken = tiny.save(bench.folder / key, model, tiny.make_tokenizer())
        assert_one_sentence(bench.run(f"{key}.model={broken}"), "expected", str(broken), "finite")
    assert complete_stages(bench.folder) == ["prompts", "sample"]
