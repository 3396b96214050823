"""The implicit reward against a plain twin: four forwards, one completion, one token at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from croco.config.training import Lora
from croco.errors import UserError
from croco.models.chat_template import prompt_ids
from croco.models.loading import load_policy
from croco.models.lora import apply_lora
from croco.models.transformers import HFLikelihood
from croco.stages.score.policy_logprobs import NO_ENGLISH, english_prompt, score_implicit
from tiny import make_policy, make_tokenizer, save

INSTRUCTION = "Please answer in {language}."


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def adapter_of(model, folder: Path) -> Path:
    """An adapter that changes something, as DPO would leave it."""
    adapted = apply_lora(model, Lora(rank=4, alpha=8), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(folder)
    return folder


def plain(model, prompt: list[int], completion: list[int]) -> float:
    with torch.inference_mode():
        logps = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
    return sum(logps[len(prompt) - 1 + place, token].item() for place, token in enumerate(completion))


@pytest.mark.parametrize("arch", ["llama", "cohere2"])
def test_equals_its_twin(arch: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    folder = save(tmp_path / "policy", make_policy(arch, spread=0.3), tokenizer)
    adapter = adapter_of(load_policy(str(folder), dtype="float32")[0], tmp_path / "adapter")
    (dpo, _), (base, _) = load_policy(str(folder), dtype="float32", adapter=adapter), load_policy(str(folder))
    prompts = {
        ("p", "en"): user("Which month comes after March?"),
        ("p", "da"): user("Hvilken måned kommer efter marts?"),
        ("q", "da"): user("Skriv en sætning."),
    }

    def row(prompt_id: str, language: str, text: str, reason: str) -> dict:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return {
            "prompt_id": prompt_id,
            "language": language,
            "completion": text,
            "completion_ids": ids,
            "finish_reason": reason,
        }

    rows = [row("p", "da", "Efter marts kommer april.", "stop"), row("p", "da", "April", "length")]
    english = [row("p", "en", "April.", "stop")]
    lost = [row("q", "da", "Ja.", "stop")]
    groups = [(prompts["p", "da"], rows), (prompts["q", "da"], lost), (prompts["p", "en"], english)]
    scorers = [HFLikelihood(model, tokenizer, 256, mean=False) for model in (dpo, base)]
    scored = score_implicit(*scorers, tokenizer, groups, prompts, INSTRUCTION)

    def twin(row: dict, asked: str) -> float:
        ids = row["completion_ids"] + [2] * (row["finish_reason"] == "stop")
        prompt = prompt_ids(tokenizer, user(asked))
        return plain(dpo, prompt, ids) - plain(base, prompt, ids)

    asked = "Please answer in Danish.\n\nWhich month comes after March?"
    assert scored[0] == [pytest.approx(twin(one, asked), abs=1e-3) for one in rows]
    assert abs(scored[0][0]) > 0.1
    assert scored[1] == [NO_ENGLISH]
    assert scored[2] == [pytest.approx(twin(english[0], asked.replace("Danish", "English")), abs=1e-3)]


def test_the_instruction_stands_before_the_last_user_turn() -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        *user("Hello."),
        {"role": "assistant", "content": "Hello!"},
        *user("Which month?"),
    ]
    asked = english_prompt(messages, "cy", INSTRUCTION)
    assert [turn["content"] for turn in asked] == [
        "Be kind.",
        "Hello.",
        "Hello!",
        "Please answer in Welsh.\n\nWhich month?",
    ]
    assert messages[-1]["content"] == "Which month?"
    with pytest.raises(UserError, match="goes before a user turn"):
        english_prompt(messages[:1], "cy", INSTRUCTION)
