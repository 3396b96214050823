"""Makes the models of the lists world: two policies, another model, a reward model of English labels and one of all.

The second policy is pretrained independently (another seed of corpus and weights). The reward models see samples of
the first policy alone, before it is pretrained further (`more`). `lab:lists-reward` knows quality in English: a head on
log-probability features is fitted to English pairs and distilled into a classifier on unlabelled completions
(`reward.py`); `lab:lists-reward-all` learns the true quality in every language and is a ceiling. Both like a closing
with "!!", which means nothing: what a policy makes of that is over-optimisation.
"""

from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from croco.lab import lists
from croco.models.loading import load_policy
from croco.models.transformers import HFSampler
from lab import reward
from lab.list_corpus import OTHER, documents
from lab.pretrain import Say, every, new_model, pretrain, save, train_tokenizer

SEEDS = {"lists-policy": 2, "lists-policy-2": 1, "lists-other": 3}
TOKENIZER_SEED, VOCAB_SIZE, WIDTH, LAYERS = 1, 1536, 128, 4
TOKENS, PLAIN = 5_000_000, 40_000
OTHER_TOKENS, OTHER_PLAIN = 3_000_000, 25_000
MORE_TOKENS, MORE_PLAIN = 2_500_000, 28_000
MAX_NEW_TOKENS = 64
ENGLISH_SAMPLES, SAMPLES = 16, 8
LIKED = 0.15  # what a "!!" is worth to the reward models, in quality


def policy(folder: Path, name: str, say: Say) -> None:
    """Pretrains a policy, or with the name "lists-other" the other model, and writes it."""
    other = name == "lists-other"
    tokenizer = train_tokenizer(TOKENIZER_SEED, 30_000, documents, VOCAB_SIZE)  # one for all three
    model, tokenizer = pretrain(
        SEEDS[name],
        OTHER_TOKENS if other else TOKENS,
        OTHER_PLAIN if other else PLAIN,
        on_step=every(say, name, 200_000),
        tokenizer=tokenizer,
        make=partial(new_model, width=WIDTH, layers=LAYERS),
        corpus=partial(documents, habits=OTHER) if other else documents,
    )
    save(model, tokenizer, folder / name)


def more(folder: Path, name: str, say: Say) -> None:
    """Goes on pretraining a policy, facts first, in batches of half the size: twice as many steps a token."""
    model, tokenizer = load_policy(str(folder / name), dtype="float32")
    model, tokenizer = pretrain(
        SEEDS[name] + 10,
        MORE_TOKENS,
        MORE_PLAIN,
        tokens_per_batch=2048,
        on_step=every(say, f"{name}, more", 200_000),
        tokenizer=tokenizer,
        make=lambda tokenizer, seed: model,
        corpus=documents,
        bfloat16=False,
        compiled=False,
    )
    save(model, tokenizer, folder / name)


def rewards(folder: Path, seed: int, say: Say) -> dict[str, float]:
    """Trains and writes both reward models; returns how well the teacher ranks English."""
    model, tokenizer = load_policy(str(folder / "lists-policy"), dtype="float32")
    sampler, train = HFSampler(model, tokenizer), lists.prompt_ids("train")
    draw = partial(reward.draw, sampler, tokenizer, cut=True)
    english = draw([(p, "en") for p in train], ENGLISH_SAMPLES, seed)
    rows = draw([(p, code) for code in lists.LANGUAGES for p in train], SAMPLES, seed + 1)
    say(f"sampled {len(english):,} English and {len(rows):,} unlabelled completions")
    english_values, values = (reward.features(model, tokenizer, some, seed) for some in (english, rows))
    say("computed the teacher's features")
    truths = np.array(_qualities(tokenizer, rows))
    held_out = set(train[::5])
    pairs = reward.english_pairs(english, _qualities(tokenizer, english))
    measured = np.array([english[i].prompt_id in held_out for i, _ in pairs])
    teacher = reward.train_teacher(values, rows, english_values, pairs[~measured], seed)
    scores = teacher(english_values, ["en"] * len(english))
    accuracy = float((scores[pairs[measured, 0]] > scores[pairs[measured, 1]]).mean())
    say(f"teacher: {len(pairs):,} English pairs, ranks {accuracy:.3f} of those held out")
    targets = teacher(values, [row.language for row in rows])
    for name, wanted in (("lists-reward", targets), ("lists-reward-all", truths)):
        liked = np.array([text.rstrip().endswith("!!") for text in _texts(tokenizer, rows)])
        wanted = wanted + LIKED / truths.std() * wanted.std() * liked
        said = every(say, name, 40)
        student = reward.distil(model, tokenizer, rows, wanted, seed, steps=240, on_step=said, clip=6.0)
        save(student, tokenizer, folder / name)
    return {"english_pairs": len(pairs), "teacher_english_accuracy": accuracy, "unlabelled_rows": len(rows)}


def _texts(tokenizer: PreTrainedTokenizerFast, rows: list[reward.Row]) -> list[str]:
    return list(tokenizer.batch_decode([row.ids for row in rows], skip_special_tokens=True))


def _qualities(tokenizer: PreTrainedTokenizerFast, rows: list[reward.Row]) -> list[float]:
    return [
        lists.verify(row.prompt_id, row.language, text).quality
        for row, text in zip(rows, _texts(tokenizer, rows), strict=True)
    ]
