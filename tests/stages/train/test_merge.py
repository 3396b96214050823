"""What comes out of training is a model anyone can load: merged, whole, with its card; and what is refused."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from conftest import TinyModels, write_recipe
from croco.config.load import load
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.models.loading import load_policy
from croco.models.open import tuned_weights
from croco.pipeline import run as stages
from croco.stages.train.merge import merge
from croco.stages.train.model_card import cell, model_card
from croco.storage import files, records, shards
from croco.storage.files import OWNER
from stages.train.pairs import replace
from tiny import make_policy, make_tokenizer, save


@pytest.fixture(scope="module")
def recipe(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run with two arms: one tuned an adapter, one all weights."""
    folder = tmp_path_factory.mktemp("run")
    path = write_recipe(folder, tiny_models)
    text = path.read_text()
    arms = "[arms.monolingual]\n[arms.whole]\ntraining = { full = true, learning_rate = 1e-3 }\n"
    path.write_text(text[: text.index("[arms.")] + arms + text[text.index("[runtime]") :])
    loaded = load(path)
    stages.run(loaded)
    return loaded


@pytest.fixture(scope="module")
def made(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    said: list[str] = []
    folder = tmp_path_factory.mktemp("merged") / "model"
    merge(recipe, "monolingual", folder, "apache-2.0", said.append)
    assert "are those of base + adapter within" in said[0]
    return folder


PROMPT = [{"role": "user", "content": "Which month comes after March?"}]


def logps(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.log_softmax(-1)


def test_the_folder_is_base_and_adapter_for_transformers_alone(recipe: Recipe, made: Path) -> None:
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(made)
    ids = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(recipe.policy.model, dtype=torch.float32).eval()
    bare = logps(base, ids)
    adapted = PeftModel.from_pretrained(base, recipe.folder / "train" / "monolingual" / "adapter").eval()
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).eval()
    torch.testing.assert_close(logps(model, ids), logps(adapted, ids), rtol=0, atol=1e-4)
    assert (logps(model, ids) - bare).abs().max() > 1e-3
    written = pipeline("text-generation", model=str(made), device="cpu")(PROMPT, max_new_tokens=4)
    assert written[0]["generated_text"][-1]["role"] == "assistant"


def test_nothing_beside_the_folder_is_touched(recipe: Recipe, tmp_path: Path) -> None:
    """`X.partial` may be somebody's; the place that merge works in is refused unless a killed merge left it."""
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "thesis.txt").write_text("mine")
    (tmp_path / ".x.making").mkdir()
    (tmp_path / ".x.making" / "data.txt").write_text("mine too")
    with pytest.raises(UserError, match="was not made by croco"):
        merge(recipe, "monolingual", tmp_path / "x", "unknown", print)
    assert (tmp_path / ".x.making" / "data.txt").read_text() == "mine too"
    (tmp_path / ".x.making" / OWNER).touch()
    merge(recipe, "monolingual", tmp_path / "x", "unknown", print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.partial"]
    assert (tmp_path / "x.partial" / "thesis.txt").read_text() == "mine"
    assert OWNER not in {path.name for path in (tmp_path / "x").iterdir()}


def test_template_tokenizer_and_generation_config_come_along(recipe: Recipe, made: Path) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(place) for place in (made, recipe.policy.model))
    assert ours.chat_template == theirs.chat_template is not None
    assert ours.get_vocab() == theirs.get_vocab()
    assert files.read_json(made / "generation_config.json")["eos_token_id"] == 2


def test_the_card_says_what_it_was_made_from(recipe: Recipe, made: Path) -> None:
    text = (made / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["license"] == "apache-2.0"
    assert head["language"] == ["en", "da"]
    assert "base_model" not in head  # it is a directory here, and its path is nobody's business
    assert str(recipe.folder.parent) not in text
    for stage in ("prompts", "sample", "score", "pair/monolingual", "train/monolingual"):
        fingerprint = files.read_json(recipe.folder / stage / "stage.json")["fingerprint"]
        assert f"| {stage} | fingerprint {fingerprint}, " in body
    assert "| learning_rate | 0.001 |" in body
    assert "| lora.rank | 4 |" in body
    assert "## Results" in body
    assert "| reward | tuned | 0 | " in body


def test_an_adapter_has_its_card_beside_it(recipe: Recipe) -> None:
    text = (recipe.folder / "train" / "monolingual" / "adapter" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "peft"
    assert str(recipe.folder.parent) not in text
    for stage in ("prompts", "sample", "score", "pair/monolingual"):
        assert f"| {stage} | fingerprint " in body
    assert "| learning_rate | 0.001 |" in body
    assert "| steps, step of these weights | " in body


def test_text_of_others_cannot_break_out_of_a_card() -> None:
    text = "a|b\n## no heading <script> [x](y) `z`"
    assert cell(text) == "a\\|b ## no heading &lt;script> \\[x](y) \\`z\\`"
    card = model_card(
        title=text,
        base='a"\nb: c',
        languages=["nb-NO", "nb"],
        license="x\ny: z",
        tables={"A": [(text, text)]},
    )
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "x\ny: z"
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == 'a"\nb: c'
    assert yaml.safe_load(card.split("---\n")[1])["language"] == ["nb"]
    assert [line for line in card.splitlines() if line.startswith("#")][1:] == ["## A"]


def test_trl_takes_it(made: Path, tmp_path: Path) -> None:
    """Its DPOTrainer goes on from the folder, named as anyone would name it."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    said = {
        side: [{"role": "assistant", "content": text}]
        for side, text in (("chosen", "April"), ("rejected", "maj"))
    }
    rows = [{"prompt": PROMPT, **said}] * 2
    arguments = DPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, use_cpu=True, bf16=False,
        report_to="none", gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(model=str(made), args=arguments, train_dataset=Dataset.from_list(rows))
    assert trainer.train().training_loss == pytest.approx(0.693, abs=1e-3)


def test_an_arm_of_all_weights_is_evaluated_as_itself_and_merges(recipe: Recipe, tmp_path: Path) -> None:
    folder = recipe.folder / "train" / "whole"
    assert tuned_weights(folder) == folder / "model"
    assert not (folder / "adapter").exists()
    said = {
        arm: shards.read_table(recipe.folder / "evaluate" / arm).sort("prompt_id", "language", "temperature")
        for arm in ("base", "whole")
    }
    assert said["base"]["completion"].to_list() != said["whole"]["completion"].to_list()
    merge(recipe, "whole", tmp_path / "model", "unknown", lambda line: None)
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "model", folder / "model"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    base = load_file(Path(recipe.policy.model) / "model.safetensors")
    assert not all(base[name].equal(theirs[name]) for name in theirs)
    assert "| full | true |" in (tmp_path / "model" / "README.md").read_text()


def other_run(recipe: Recipe, tmp_path: Path) -> Recipe:
    """The run again, to be broken."""
    shutil.copytree(recipe.folder, tmp_path / "run")
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"folder": str(tmp_path / "run")})})


def fails(recipe: Recipe, to: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        merge(recipe, "monolingual", to, "unknown", lambda line: None)
    assert not to.exists()


@pytest.mark.parametrize("arm", ["monolingual", "whole"])
def test_one_model_is_in_memory_at_a_time(recipe: Recipe, tmp_path: Path, monkeypatch, arm: str) -> None:
    from croco.stages.train import merge as module

    loaded, load_causal = [], module.load_causal

    def alone(*args):
        assert not any(model() for model in loaded)
        model, tokenizer = load_causal(*args)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(module, "load_causal", alone)
    merge(recipe, arm, tmp_path / "model", "unknown", lambda _: None)
    assert len(loaded) == {"monolingual": 2, "whole": 3}[arm]


def test_what_cannot_be_merged_is_refused(recipe: Recipe, made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not empty, expected a new folder"):
        merge(recipe, "monolingual", made, "unknown", lambda line: None)
    broken = other_run(recipe, tmp_path)
    adapter = broken.folder / "train" / "monolingual" / "adapter"
    weights = load_file(adapter / "adapter_model.safetensors")

    nothing = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in weights.items()}
    save_file(nothing, adapter / "adapter_model.safetensors")
    fails(broken, tmp_path / "to", "is damaged: its bytes are not those that were written")
    record = records.read_record(adapter.parent)
    record.pop("digests")  # as an earlier version wrote it
    records.write_record(adapter.parent, record)
    fails(broken, tmp_path / "to", "changes nothing: log-probabilities are the base's")

    name = next(iter(weights))
    save_file({**weights, name: weights[name] * float("nan")}, adapter / "adapter_model.safetensors")
    fails(broken, tmp_path / "to", "holds numbers that are not finite")

    save_file({k: v for k, v in weights.items() if k != name}, adapter / "adapter_model.safetensors")
    fails(broken, tmp_path / "to", "does not fit this LlamaForCausalLM: Found missing adapter keys")

    (adapter / "adapter_model.safetensors").write_bytes(b"no weights")
    fails(broken, tmp_path / "to", "cannot be read")

    config = json.loads((adapter / "adapter_config.json").read_text())
    other = save(tmp_path / "other", make_policy("llama", seed=5), make_tokenizer())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(other)})
    )
    fails(broken, tmp_path / "to", "was trained on .*other, expected one of")

    (broken.folder / "train" / "monolingual" / "stage.json").unlink()
    fails(broken, tmp_path / "to", "holds no finished training")


def test_a_policy_with_broken_weights_is_named(recipe: Recipe, tmp_path: Path) -> None:
    model, tokenizer = load_policy(recipe.policy.model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    save(tmp_path / "broken", model, tokenizer)
    from stages.train.test_train import SETTINGS, run

    with pytest.raises(UserError, match="not a finite number: are its weights broken"):
        run(tmp_path / "out", replace(SETTINGS, epochs=1), model=load_policy(str(tmp_path / "broken"))[0])
