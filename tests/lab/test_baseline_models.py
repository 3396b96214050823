"""The two models of the baseline methods: small, of other architectures, and what they are said to be."""

from __future__ import annotations

import json
from random import Random

from croco.lab import world
from croco.models.chat_template import same_ids
from croco.models.loading import load_policy, load_tokenizer, resolve_model
from croco.models.protocols import Decoding, Request
from croco.models.transformers import HFSampler
from lab import baseline_models
from lab.reward import prompt_tokens


def test_they_are_small_and_of_other_architectures() -> None:
    found = {}
    for name in ("other", "translator"):
        folder = resolve_model(f"lab:{name}")
        assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000
        found[name] = json.loads((folder / "config.json").read_text())["architectures"]
    assert found == {"other": ["Qwen3ForCausalLM"], "translator": ["M2M100ForConditionalGeneration"]}


def test_the_other_policy_has_the_policys_ids_and_its_own_habits() -> None:
    assert same_ids(load_tokenizer("lab:other"), load_tokenizer("lab:policy"))
    prompts = world.prompt_ids("dev")[:4]
    shares = {}
    for name in ("policy", "other"):
        model, tokenizer = load_policy(f"lab:{name}")
        requests = [
            Request(k, prompt_tokens(tokenizer, p, "en"), list(range(48))) for k, p in enumerate(prompts)
        ]
        sampled = dict(HFSampler(model, tokenizer).sample(requests, Decoding(1.0, 1.0, 0, 48)))
        modes = [
            world.verify(prompts[k], "en", text).mode
            for k, drawn in sampled.items()
            for text in tokenizer.batch_decode([one.ids for one in drawn], skip_special_tokens=True)
        ]
        shares[name] = {mode: modes.count(mode) / len(modes) for mode in world.MODES}
    assert shares["policy"]["evasive"] > 2 * shares["other"]["evasive"]
    assert (
        shares["other"]["terse"] + shares["other"]["rambling"]
        > shares["policy"]["terse"] + shares["policy"]["rambling"]
    )


def test_a_sentence_and_its_translation_are_the_same_draws() -> None:
    rng = Random(0)
    pairs = [baseline_models.parallel(rng) for _ in range(300)]
    danish = {source: target for language, source, target in pairs if language == "da"}
    assert len(danish) > 5
    assert all(source == target for language, source, target in pairs if language == "en")
    assert danish.get("Ingen kommentarer.", "No comment.") == "No comment."
