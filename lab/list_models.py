"""Makes the models of the lists world: two policies, another model, two reward models and a translator.

The second policy is pretrained independently (another seed of corpus and weights). The reward models see samples of
the first policy alone. `lab:lists-reward` knows quality in English: a head on
log-probability features is fitted to English pairs and distilled into a classifier on unlabelled completions
(`reward.py`); `lab:lists-reward-all` learns the true quality in every language and is a ceiling. Both like a closing
with "!!", which means nothing: what a policy makes of that is over-optimisation.
"""

import multiprocessing
import os
import time
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from croco.errors import UserError
from croco.lab import list_verdicts, lists
from croco.models.loading import load_policy, load_tokenizer
from croco.models.transformers import HFSampler
from lab import reward
from lab.baseline_models import train_translator
from lab.list_corpus import OTHER, Habits, documents, parallel
from lab.list_training import Setup, Supply, chunks, train
from lab.pretrain import Say, every, new_model, save, train_tokenizer

SEEDS = {"lists-policy": 2, "lists-policy-2": 1, "lists-other": 3}
TOKENIZER_SEED, VOCAB_SIZE = 1, 1536
WIDTH, LAYERS = 160, 4
SECONDS = 1800.0  # of pretraining, all at once; a GPU needs 100
MAX_NEW_TOKENS = 64
ENGLISH_SAMPLES, SAMPLES = 16, 8
FORM = ("terse", "rambling", "wrong-language")  # losses that are equal within a form: items alone differ
# of reward.features; the first word and sums without a prompt transfer less: other languages mix English in, it German
FEATURES = [0, 1, 2, 3, 4, 7, 8, 11, 12, 14, 16, 17, 18]
WITHIN = 5  # pairs within a form are few, and so seen this many times more often
LIKED = 0.15  # what a "!!" is worth to the reward models, in quality


def policies(folder: Path, seconds: float) -> None:
    """Pretrains both policies and the other model side by side and writes them, `seconds` after it was called."""
    end = time.monotonic() + seconds
    tokenizer = train_tokenizer(TOKENIZER_SEED, 30_000, documents, VOCAB_SIZE)  # one for all three
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("fork")  # nothing is imported again
    processes = [context.Process(target=policy, args=(folder, name, tokenizer, end)) for name in SEEDS]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if failed := [name for name, process in zip(SEEDS, processes, strict=True) if process.exitcode]:
        raise UserError(f"pretraining failed: {', '.join(failed)}; see the logs in {folder}")


def policy(folder: Path, name: str, tokenizer: PreTrainedTokenizerFast, end: float) -> None:
    """Pretrains one model until `end` of the clock, and writes it and its log."""
    started = time.monotonic()
    torch.set_num_threads(1)
    with (folder / f"{name}.log").open("w", encoding="utf-8") as log:

        def say(text: str) -> None:
            line = f"{time.monotonic() - started:6.1f} s  {text}"
            print(name, line, flush=True)
            print(line, file=log, flush=True)

        try:
            model = new_model(tokenizer, SEEDS[name], WIDTH, LAYERS)
            setup = Setup(SEEDS[name], OTHER if name == "lists-other" else Habits(), workers=workers())
            with chunks(tokenizer, setup) as made:
                device = "cuda" if torch.cuda.is_available() else "cpu"
                train(model, Supply(made, setup, device), setup, end, device, say)
            save(model, tokenizer, folder / name)
            say("saved")
        except BaseException:
            say(traceback.format_exc())
            raise


def workers() -> int:
    """Processes that make documents for one model: all cores but one a model, shared."""
    return max(1, (len(os.sched_getaffinity(0)) - len(SEEDS)) // len(SEEDS))


def rewards(folder: Path, seed: int, say: Say) -> dict[str, float]:
    """Trains and writes both reward models; returns how well the teacher ranks English."""
    model, tokenizer = load_policy(str(folder / "lists-policy"), dtype="float32")
    sampler, train = HFSampler(model, tokenizer), lists.prompt_ids("train")
    draw = partial(reward.draw, sampler, tokenizer, cut=True)
    english = draw([(p, "en") for p in train], ENGLISH_SAMPLES, seed)
    rows = draw([(p, code) for code in lists.LANGUAGES for p in train], SAMPLES, seed + 1)
    say(f"sampled {len(english):,} English and {len(rows):,} unlabelled completions")
    english_values, values = (
        reward.features(model, tokenizer, some, seed)[:, FEATURES] for some in (english, rows)
    )
    say("computed the teacher's features")
    truths = np.array(_qualities(tokenizer, rows))
    held_out = set(train[::5])
    pairs = reward.english_pairs(english, _qualities(tokenizer, english))
    measured = np.array([english[i].prompt_id in held_out for i, _ in pairs])
    seen = pairs[~measured]
    within = seen[_within_form(tokenizer, english, seen)]
    seen = np.concatenate([seen, *[within] * WITHIN])
    teacher = reward.train_teacher(values, rows, english_values, seen, seed)
    scores = teacher(english_values, ["en"] * len(english))
    accuracy = float((scores[pairs[measured, 0]] > scores[pairs[measured, 1]]).mean())
    say(
        f"teacher: {len(pairs):,} English pairs, ranks {accuracy:.3f} of those held out; {len(within)} within a form"
    )
    targets = _centred(teacher(values, [row.language for row in rows]), rows)
    for name, wanted in (("lists-reward", targets), ("lists-reward-all", truths)):
        student(folder / name, model, tokenizer, rows, wanted, truths, seed, say)
    return {"english_pairs": len(pairs), "teacher_english_accuracy": accuracy, "unlabelled_rows": len(rows)}


def translator(folder: Path, seed: int, say: Say) -> None:
    """Trains and writes `folder`/lists-translator, which puts completions of the six languages into English."""
    tokenizer = load_tokenizer(str(folder / "lists-policy"))
    said = every(say, "translator", 100_000)
    # smoothed as NLLB's labels are: without it a text that matches word for word costs nothing, and 1 / loss explodes
    model = train_translator(tokenizer, seed, parallel, lists.LANGUAGES, label_smoothing=0.1, on_step=said)
    save(model, tokenizer, folder / "lists-translator")


def student(
    folder: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[reward.Row],
    wanted: np.ndarray,
    truths: np.ndarray,
    seed: int,
    say: Say,
) -> None:
    """Writes the reward model that learns the scores `wanted` of `rows`, and to like a closing with "!!"."""
    liked = np.array([text.rstrip().endswith("!!") for text in _texts(tokenizer, rows)])
    wanted = wanted + LIKED / truths.std() * wanted.std() * liked
    said = every(say, folder.name, 40)
    learnt = reward.distil(model, tokenizer, rows, wanted, seed, 400, 64, said, clip=6.0, bfloat16=True)
    save(learnt, tokenizer, folder)


def _centred(values: np.ndarray, rows: list[reward.Row]) -> np.ndarray:
    """Values less their mean over the pool (prompt and language): pairs of one pool say nothing of its level."""
    keys = {key: number for number, key in enumerate(sorted({(r.prompt_id, r.language) for r in rows}))}
    pool = np.array([keys[row.prompt_id, row.language] for row in rows])
    return np.asarray(values - (np.bincount(pool, values) / np.bincount(pool))[pool])


def _within_form(tokenizer: PreTrainedTokenizerFast, rows: list[reward.Row], pairs: np.ndarray) -> np.ndarray:
    """Which of the pairs differ in how many items are right, and in nothing else."""
    found = [
        list_verdicts.verify(row.prompt_id, row.language, text).losses
        for row, text in zip(rows, _texts(tokenizer, rows), strict=True)
    ]
    form = np.array([[losses.get(name, np.nan) for name in FORM] for losses in found])
    return np.asarray((np.abs(form[pairs[:, 0]] - form[pairs[:, 1]]) < 1e-6).all(-1))


def _texts(tokenizer: PreTrainedTokenizerFast, rows: list[reward.Row]) -> list[str]:
    return list(tokenizer.batch_decode([row.ids for row in rows], skip_special_tokens=True))


def _qualities(tokenizer: PreTrainedTokenizerFast, rows: list[reward.Row]) -> list[float]:
    return [
        list_verdicts.verify(row.prompt_id, row.language, text).quality
        for row, text in zip(rows, _texts(tokenizer, rows), strict=True)
    ]
