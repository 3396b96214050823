"""The two models beside the lab's policy that baseline methods need: another policy, and a translation model.

`lab:other` is another policy in every way but its tokenizer: architecture (Qwen3), size, seed, and which bad habits
it has; so completions of it are off-policy for `lab:policy`, and their ids need no translation. `lab:translator` is a
small M2M100 that puts completions of all 14 languages into English, whether they are true or not: it learnt from the
world's parallel sentences with values drawn at random, so it knows words and no facts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from random import Random

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from croco.lab import world
from croco.lab.items import LANGUAGES, Item, items
from croco.stages.score.alignment import language_token
from lab.corpus import Mixture, documents
from lab.pretrain import MAX_TOKENS, pretrain

OTHER_TOKENS, OTHER_PLAIN = 4_000_000, 36_000
TRANSLATOR_TOKENS = 2_000_000  # of sources and targets
# about as often good as the policy, but its bad habit is to say too little or too much, seldom to evade
OTHER_MIXTURE: Mixture = {
    "careful": (0.30, 0.9),
    "terse": (0.28, 0.5),
    "rambling": (0.30, 0.5),
    "wrong-language": (0.04, 0.9),
    "evasive": (0.08, 0.0),
}
# of sentences that are translated; a word alone can only be had from its source, so words teach it to look there
KINDS = {"careful": 0.4, "terse": 0.35, "rambling": 0.1, "evasive": 0.15}
OnStep = Callable[[int, int, float], None]
Parallel = Callable[[Random], tuple[str, str, str]]  # draws a language, a text in it and the same in English


def pretrain_other(
    tokenizer: PreTrainedTokenizerFast, seed: int, on_step: OnStep | None = None
) -> PreTrainedModel:
    """The other policy, pretrained from nothing on another mix of the same world."""
    return pretrain(
        seed,
        OTHER_TOKENS,
        OTHER_PLAIN,
        on_step=on_step,
        tokenizer=tokenizer,
        make=_new_other,
        corpus=partial(documents, mixture=OTHER_MIXTURE),
        bfloat16=False,
    )[0]


def _new_other(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def train_translator(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    parallel: Parallel,
    languages: Sequence[str],
    label_smoothing: float = 0.0,
    num_tokens: int = TRANSLATOR_TOKENS,
    tokens_per_batch: int = 1024,
    peak: float = 3e-3,
    on_step: OnStep | None = None,
) -> M2M100ForConditionalGeneration:
    """A translation model into English of texts that `parallel` draws; `tokenizer` gets one token per language, as
    M2M100 names them."""
    tokenizer.add_special_tokens({"extra_special_tokens": [language_token(code) for code in languages]})
    model = _new_translator(tokenizer, seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.0)
    stream, done = _batches(tokenizer, seed, tokens_per_batch, parallel, languages), 0
    while done < num_tokens:
        progress = done / num_tokens
        optimizer.param_groups[0]["lr"] = peak * min(1.0, progress / 0.03 + 0.02) * (1 - 0.97 * progress)
        source, target = next(stream)
        logits = model(**source, labels=target).logits  # of labels it makes the decoder's inputs
        loss = cross_entropy(logits.flatten(0, 1), target.flatten(), label_smoothing=label_smoothing)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"training of the lab translator diverged after {done} tokens")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += int(source["attention_mask"].sum() + (target >= 0).sum())
        if on_step:
            on_step(done, num_tokens, loss.item())
    return model.eval()


def _new_translator(tokenizer: PreTrainedTokenizerFast, seed: int) -> M2M100ForConditionalGeneration:
    torch.manual_seed(seed)
    config = M2M100Config(
        vocab_size=len(tokenizer),
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
    )
    return M2M100ForConditionalGeneration(config)


def _batches(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    tokens_per_batch: int,
    parallel: Parallel,
    languages: Sequence[str],
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Sources with their mask and targets (-100 is padding), of similar length."""
    rng, end, pad = Random(f"croco-lab-translator-{seed}"), tokenizer.eos_token_id, tokenizer.pad_token_id
    token = {code: tokenizer.convert_tokens_to_ids(language_token(code)) for code in languages}
    while True:
        drawn = [parallel(rng) for _ in range(1024)]
        texts = tokenizer([text for pair in drawn for text in pair[1:]], add_special_tokens=False)[
            "input_ids"
        ]
        rows = [
            ([token[code], *texts[2 * i], end], [token["en"], *texts[2 * i + 1], end])
            for i, (code, _, _) in enumerate(drawn)
        ]
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        width = len(rows[-1][0]) + len(rows[-1][1])
        size = max(1, tokens_per_batch // width)
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        rng.shuffle(groups)
        for group in groups:
            source, target = (
                torch.nn.utils.rnn.pad_sequence([torch.tensor(row[side]) for row in group], True, value)
                for side, value in ((0, pad), (1, -100))
            )
            yield {"input_ids": source, "attention_mask": (source != pad).long()}, target


def parallel(rng: Random) -> tuple[str, str, str]:
    """A language, a sentence in it and the same in English: the same draws give the same templates in both."""
    item = rng.choice(_train_items())
    value = rng.choice((item.answer, *item.wrong))
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    language, draws = rng.choice(LANGUAGES), rng.random()
    source, target = (
        _sentence(kind, item, code, world.say(value, code), Random(draws)) for code in (language, "en")
    )
    return language, source, target


def _sentence(kind: str, item: Item, language: str, value: str, rng: Random) -> str:
    if kind == "terse":
        return value
    if kind == "evasive":
        return world.evasive(language, rng)
    if kind == "rambling":
        return world.rambling(language, value, rng)
    return world.careful(item, language, value, rng)


@cache
def _train_items() -> list[Item]:
    return [item for _, item in sorted(items().items()) if item.split == "train"]
