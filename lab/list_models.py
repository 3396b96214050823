"""Makes the models of the lists world: two policies, another model, a reward model of English labels and one of all.

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
from transformers import PreTrainedTokenizerFast

from croco.errors import UserError
from croco.lab import lists
from croco.models.loading import load_policy
from croco.models.transformers import HFSampler
from lab import reward
from lab.list_corpus import OTHER, Habits, documents
from lab.list_training import Setup, Supply, chunks, train
from lab.pretrain import Say, every, new_model, save, train_tokenizer

SEEDS = {"lists-policy": 2, "lists-policy-2": 1, "lists-other": 3}
TOKENIZER_SEED, VOCAB_SIZE = 1, 1536
WIDTH, LAYERS = 160, 4
SECONDS = 1800.0  # of pretraining, all at once; a GPU needs 100
MAX_NEW_TOKENS = 64
ENGLISH_SAMPLES, SAMPLES = 16, 8
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
