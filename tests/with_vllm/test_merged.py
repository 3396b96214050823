"""A merged model in vLLM: it loads by its folder alone and says what base + adapter say."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from conftest import TinyModels, write_recipe
from croco.config.load import load
from croco.config.models import Policy
from croco.config.runtime import Vllm
from croco.models.chat_template import prompt_ids
from croco.models.loading import load_policy
from croco.models.protocols import Decoding, Request
from croco.models.transformers import HFSampler
from croco.models.vllm import open_policy
from croco.pipeline import run
from croco.stages.train.merge import merge

GREEDY = Decoding(0.0, 1.0, 0, 24)


def test_a_merged_model_says_what_base_and_adapter_say(wide_models: TinyModels, tmp_path: Path) -> None:
    recipe = load(write_recipe(tmp_path, wide_models), ["training.learning_rate=1e-2"])
    run.run(recipe, until="train")
    merge(recipe, "monolingual", tmp_path / "merged", "unknown", lambda line: None)
    adapter = recipe.folder / "train" / "monolingual" / "adapter"
    sampler, tokenizer = open_policy(Policy(model=str(tmp_path / "merged")), Vllm(enforce_eager=True), seed=7)
    texts = ["Which month is it?", "Hvilken måned er det?", "Ja", "Write one short sentence."]
    asked = [
        Request(key, prompt_ids(tokenizer, [{"role": "user", "content": text}]), [0])
        for key, text in enumerate(texts)
    ]
    ours = {key: one.ids for key, (one,) in sampler.sample(asked, GREEDY)}
    said = {}
    for name, its_adapter in (("base", None), ("tuned", adapter)):
        engine = HFSampler(*load_policy(str(wide_models.policy), adapter=its_adapter))
        said[name] = {key: one.ids for key, (one,) in engine.sample(asked, GREEDY)}
    assert ours == said["tuned"] != said["base"]
