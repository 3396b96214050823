"""Alignment scores against transformers' own loss, one pair at a time, on a tiny model of NLLB's architecture."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from transformers import M2M100Config, M2M100ForConditionalGeneration

from croco.errors import UserError
from croco.models.loading import load_translator
from croco.stages.score.alignment import (
    IS_ENGLISH,
    NO_TARGET,
    Translator,
    english_completions,
    score_alignment,
)
from croco.storage.schemas import COMPLETIONS
from croco.storage.shards import write_shard
from models.test_output_layer import Largest
from tiny import make_tokenizer

CODES = {"en": "eng_Latn", "da": "dan_Latn"}
TEXTS = ["Efter marts kommer april.", "April", "Nej, det kan jeg ikke svare på.", ""]
ENGLISH = ["April comes after March.", "No.", "Write one short sentence."]


def tiny_translator(codes: dict[str, str] = CODES, token_budget: int = 90) -> Translator:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [*codes.values(), "__de__"]})
    torch.manual_seed(0)
    config = M2M100Config(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        max_position_embeddings=128,
        init_std=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    return Translator(M2M100ForConditionalGeneration(config).eval(), tokenizer, codes, token_budget)


def plain_loss(translator: Translator, source: list[int], target: list[int]) -> float:
    """transformers' own mean loss of one pair, without a batch."""
    with torch.inference_mode():
        return float(translator.model(torch.tensor([source]), labels=torch.tensor([target])).loss)


def row(text: str, language: str = "da", prompt_id: str = "p") -> dict:
    return {"prompt_id": prompt_id, "language": language, "completion": text}


def test_losses_equal_transformers_own_whatever_the_batch() -> None:
    for budget in (40, 90, 4096):
        translator = tiny_translator(token_budget=budget)
        sources, targets = translator.encode(TEXTS, "da"), translator.encode(ENGLISH, "en")
        assert sources[3] == [sources[0][0], 2]
        assert sources[0][0] == translator.tokenizer.convert_tokens_to_ids("dan_Latn")
        found = translator.losses(sources, [targets, targets[:1], [], targets])
        assert found[2] == []
        for i, j in [(0, 0), (0, 1), (0, 2), (1, 0), (3, 2)]:
            assert found[i][j] == pytest.approx(plain_loss(translator, sources[i], targets[j]), rel=1e-4)


def test_logits_of_many_targets_never_exist_at_once() -> None:
    translator = tiny_translator(token_budget=8192)
    translator.model.resize_token_embeddings(50_000)
    sources, targets = translator.encode(TEXTS[:2], "da"), translator.encode(ENGLISH * 20, "en")
    with Largest() as largest:
        found = translator.losses(sources, [targets, targets])
    assert (
        largest.most <= 2 * 50_000 * 32
    )  # the head itself has as many; 60 targets of 8 tokens had 15 times that
    assert found[1][0] == pytest.approx(plain_loss(translator, sources[1], targets[0]), rel=1e-4)


def test_a_score_is_the_mean_of_one_over_the_loss_and_english_has_none() -> None:
    translator = tiny_translator()
    groups = [
        ([], [row(text) for text in TEXTS]),
        ([], [row("April.", "en")]),
        ([], [row("April.", "da", "q")]),
        ([], [row("Zyx, " * 40)]),
    ]
    scored = score_alignment(translator, groups, {"p": ENGLISH}, max_tokens=64)
    sources, targets = translator.encode(TEXTS, "da"), translator.encode(ENGLISH, "en")
    for i, source in enumerate(sources):
        expected = sum(1 / plain_loss(translator, source, target) for target in targets) / len(targets)
        assert scored[0][i] == pytest.approx(expected, rel=1e-4)
    assert scored[1:3] == [[IS_ENGLISH], [NO_TARGET]]
    assert "longer than 64 tokens" in str(scored[3][0])


def test_a_language_without_a_token_is_one_sentence() -> None:
    translator = tiny_translator()
    assert translator.encode(["Ja."], "de")[0][0] == translator.tokenizer.convert_tokens_to_ids("__de__")
    with pytest.raises(UserError, match=r"has no token '__fr__' for 'fr', expected one in alignment\.codes"):
        translator.encode(["Oui."], "fr")


def test_english_completions_come_in_the_order_of_their_samples(tmp_path) -> None:
    rows = [
        {
            "prompt_id": prompt_id,
            "language": language,
            "sample_id": sample,
            "completion": f"{prompt_id} {language} {sample}",
            "completion_ids": None,
            "completion_tokens": 3,
            "prompt_tokens": None,
            "finish_reason": "stop",
            "policy": "x",
            "seed": 0,
        }
        for prompt_id in "pq"
        for language in ("da", "en")
        for sample in (2, 0, 1)
    ]
    for index, part in enumerate((rows[:5], rows[5:])):
        found = pl.DataFrame(part).to_arrow().cast(COMPLETIONS.schema)
        write_shard(tmp_path, index, found, COMPLETIONS.schema, read={}, written={}, dropped=None)
    assert english_completions(tmp_path, ["q"], 2) == {"q": ["q en 0", "q en 1"]}
    assert english_completions(tmp_path, ["p"], None) == {"p": ["p en 0", "p en 1", "p en 2"]}


def test_the_labs_translator_knows_a_translation_from_another_sentence() -> None:
    model, tokenizer = load_translator("lab:translator")
    translator = Translator(model, tokenizer, {})
    sources = translator.encode(["Måneden efter maj er juni.", "Ingen kommentarer."], "da")
    targets = translator.encode(["The month after May is June.", "No comment."], "en")
    losses = translator.losses(sources, [targets, targets])
    assert losses[0][0] < losses[1][0] - 0.5
    assert losses[1][1] < losses[0][1] - 0.5
