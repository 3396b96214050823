"""What smollm2.toml and smollm2-cpu.toml need beside the stages: a reward model of English pairs, and controls.

    python recipes/smollm2.py reward RECIPE      # the folder that reward.model names, and its accuracy on dev
    croco run RECIPE
    python recipes/smollm2.py controls RECIPE    # the base in ways that need no tuning, and how far each arm went
    python recipes/smollm2_page.py RECIPE --to docs/results/smollm2.md

All of it goes on where it was killed. The reward model is a one-logit classifier on the policy's trunk. It learns from
pairs of the policy's own answers to English prompts, labelled by program: a completion that does what was asked, ended
by itself, is English, has no loop and no echo, against one that fails in any.
Beside it stands one that learns from as many pairs, labelled in every tuned language.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import everyday
import numpy as np
import polars as pl
import torch

import croco
from croco.config.load import from_dict, load, merged
from croco.config.models import Reward
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.models.loading import load_causal, resolve_model
from croco.models.open import release, tuned_weights, with_tuned
from croco.pipeline.run import run_stage
from croco.stages.evaluate import stats
from croco.stages.score.policy_logprobs import open_likelihood, score_likelihood
from croco.stages.score.reward import open_reward
from croco.storage import records
from croco.storage.files import write_json
from croco.storage.shards import read_table

# what the labels ask for; the measure asks for more
LABELS = ("constraint", "ended", "in the language", "no loop", "no echo")
PARTS = ("constraint", "in the language", "known words", "no loop", "no echo", "ended")
ROW = ("prompt_id", "language")
# prompts, and completions of each, that reward models learn from, in English and in each other language, and those of
# accuracy on dev: on a CPU, and for pools that want a GPU
SMALL, LARGE = ((96, 8), (32, 8), (16, 8)), ((120, 16), (60, 6), (60, 8))
LAYERS = 8  # the last ones are trained, those below are the policy's
LEARNING_RATE, BATCH_PAIRS = 1e-4, 8
BEST_OF = 4
INSTRUCTIONS = {
    "en": "Answer in English.", "fr": "Réponds en français.", "es": "Responde en español.",
    "de": "Antworte auf Deutsch.", "it": "Rispondi in italiano.", "pt": "Responda em português.",
    "nl": "Antwoord in het Nederlands.", "da": "Svar på dansk.",
}  # fmt: skip


# The reward model -----------------------------------------------------------------------------------------------------


def make_reward(recipe: Recipe) -> None:
    """Sample, label, train two classifiers, and write what they are worth on dev beside them."""
    english, ceiling = Path(recipe.reward.model), Path(f"{recipe.reward.model}-in-language")
    for_english, for_others, for_dev = LARGE if recipe.sampling.completions > 32 else SMALL
    learnt = sampled(recipe, "english", "train", *for_english, ("en",))
    foreign = sampled(recipe, "others", "train", *for_others, recipe.run.languages[1:])
    rows = labelled(pl.concat([learnt, foreign]))
    pairs = english_pairs(rows)
    for folder, examples in ((english, pairs), (ceiling, own_language_pairs(rows, len(pairs)))):
        if not folder.exists():
            train(recipe, examples, folder)
            release()
    dev = labelled(sampled(recipe, "dev", "dev", *for_dev, recipe.run.languages))
    table = accuracies(recipe, dev, {"English pairs": english, "pairs in every language": ceiling})
    table.with_columns(pairs=pl.lit(len(pairs))).write_json(english / "accuracy.json")


def sampled(
    recipe: Recipe, name: str, split: str, count: int, completions: int, languages: Sequence[str]
) -> pl.DataFrame:
    """Completions of a split's last prompts, by the policy; in a folder of their own beside the run's."""
    folder = Path(f"{recipe.folder}-reward") / name
    items = [item.prompt_id for item in everyday.splits()[split][-count:]]
    rows = [row for row in everyday.rows(split) if row["prompt_id"] in items and row["language"] in languages]
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".jsonl")
    pl.DataFrame(rows).write_ndjson(file)
    return croco.sample(
        file,
        recipe.policy.model_dump(mode="json"),
        folder,
        languages=languages,
        sampling=recipe.sampling.model_dump(mode="json") | {"completions": completions},
        runtime=recipe.runtime.model_dump(mode="json"),
        seed=recipe.run.seed + 1,
    )


def labelled(rows: pl.DataFrame) -> pl.DataFrame:
    """Completions with each part of being usable as a column, `good` (what labels ask for) and `usable` (all parts)."""
    columns = ["prompt_id", "language", "completion", "finish_reason"]
    found = pl.DataFrame([everyday.parts(*row) for row in rows.select(columns).iter_rows()])
    return pl.concat([rows, found], how="horizontal").with_columns(
        good=pl.all_horizontal(LABELS), usable=pl.all_horizontal(PARTS)
    )


def contrasts(rows: pl.DataFrame, rng: Random, per_prompt: int = 4) -> list[dict[str, Any]]:
    """Up to so many pairs of each prompt: a good completion and one that is not."""
    pairs = []
    for _, pool in rows.group_by(ROW, maintain_order=True):
        good, bad = (pool.filter(pl.col("good") == one)["completion"].to_list() for one in (True, False))
        both = [(a, b) for a in dict.fromkeys(good) for b in dict.fromkeys(bad) if a != b]
        asked = pool["messages"][0].to_list()
        pairs += [example(asked, *pair) for pair in rng.sample(both, min(per_prompt, len(both)))]
    return pairs


def example(messages: list[dict[str, str]], chosen: str, rejected: str) -> dict[str, Any]:
    """A pair in TRL's form."""
    turns = {"chosen": chosen, "rejected": rejected}
    return {"prompt": messages} | {k: [{"role": "assistant", "content": text}] for k, text in turns.items()}


def english_pairs(rows: pl.DataFrame) -> list[dict[str, Any]]:
    """Pairs of the completions to English prompts."""
    rng = Random("english pairs")
    pairs = contrasts(rows.filter(language="en"), rng)
    rng.shuffle(pairs)
    return pairs


def own_language_pairs(rows: pl.DataFrame, count: int) -> list[dict[str, Any]]:
    """As many pairs, labelled in each language."""
    rng = Random("pairs in every language")
    return rng.sample(pairs := contrasts(rows, rng, 8), min(count, len(pairs)))


def train(recipe: Recipe, pairs: Sequence[dict[str, Any]], to: Path) -> None:
    """A classifier of one logit that begins at the policy's weights, trained by TRL on the pairs, once through."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(recipe.run.seed)
    policy = resolve_model(recipe.policy.model)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForSequenceClassification.from_pretrained(
        policy, num_labels=1, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id
    )
    torch.nn.init.zeros_(model.score.weight)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[:-LAYERS].requires_grad_(False)
    draft = to.with_name(f".{to.name}.partial")
    settings = RewardConfig(
        output_dir=str(draft), num_train_epochs=1, per_device_train_batch_size=BATCH_PAIRS, learning_rate=LEARNING_RATE,
        warmup_steps=5, lr_scheduler_type="cosine", logging_steps=5, save_strategy="no", report_to="none",
        gradient_checkpointing=False, max_length=512, seed=recipe.run.seed, bf16=False,
    )  # fmt: skip
    trainer = RewardTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(list(pairs)), processing_class=tokenizer
    )
    trainer.train()
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    draft.rename(to)


def accuracies(recipe: Recipe, dev: pl.DataFrame, models: dict[str, Path]) -> pl.DataFrame:
    """How often each reward ranks a good completion above one that is not, within each language, of all completions and
    of those that ended, with intervals over prompts; the likelihood is the policy's own, mean over tokens."""
    groups = by_prompt(dev)
    scores = {}
    for name, folder in models.items():
        reward = Reward(model=str(folder), dtype=recipe.reward.dtype)
        scores[name] = open_reward(reward, recipe.runtime)[0](groups)  # one model in memory at a time
    for _, pool in groups:
        for row in pool:
            row["completion_ids"] = None
    scores["likelihood"] = score_likelihood(*open_likelihood(recipe.policy, recipe.runtime, True), groups, {})
    table = []
    for ended in (False, True):
        for name, scored in scores.items():
            shares: dict[str, list[float]] = {}
            for (_, pool), values in zip(groups, scored, strict=True):
                won = wins(pool, values, ended)
                if won:
                    shares.setdefault(pool[0]["language"], []).append(float(np.mean(won)))
            row = {"reward": name + ", among those that ended" * ended}
            table.append(row | {code: interval(each) for code, each in shares.items()})
    return pl.DataFrame(table)


def wins(pool: Sequence[dict[str, Any]], values: Sequence[Any], ended: bool) -> list[float]:
    """1 for each good completion and another one of a prompt that are ranked right, 0.5 for a tie, else 0."""
    told = [
        (row["good"], float(value)) for row, value in zip(pool, values, strict=True) if row["ended"] >= ended
    ]
    good, bad = ([value for label, value in told if label == wanted] for wanted in (True, False))
    return [(a > b) + 0.5 * (a == b) for a in good for b in bad]


def by_prompt(rows: pl.DataFrame) -> list[tuple[list[dict[str, str]], list[dict[str, Any]]]]:
    """Each prompt's messages and its completions."""
    pools = (pool for _, pool in rows.group_by(ROW, maintain_order=True))
    return [(pool["messages"][0].to_list(), pool.to_dicts()) for pool in pools]


def interval(values: Sequence[float]) -> dict[str, Any]:
    """The mean over prompts, and its interval where there are enough of them."""
    value, low, high = (None if end != end else end for end in stats.bootstrap_mean(values, 0))
    return {"value": value, "ci_low": low, "ci_high": high, "prompts": len(values)}


# The controls ---------------------------------------------------------------------------------------------------------


def controls(recipe: Recipe) -> None:
    """Verdicts of the base in ways that need no tuning: asked to answer in the language, and the best of several."""
    spoken = {code: INSTRUCTIONS[code] for code in recipe.run.evaluated}
    reward = recipe.reward.model_dump(mode="json")
    changes: dict[str, dict[str, Any]] = {
        "instruction": {"policy": {"instruction": spoken}, "evaluation": {"temperatures": [0.0, 0.5]}},
        "best-of": {"evaluation": {"samples": BEST_OF, "temperatures": [1.0], "reward": reward}},
    }
    values = recipe.model_dump(mode="json", exclude={"study", "sweep"})
    values["evaluation"]["base_temperatures"] = []
    for name, changed in changes.items():
        folder = {"run": {"folder": str(controls_folder(recipe) / name)}}
        other = from_dict(merged(merged(values, changed), folder))
        run_stage(other, "eval-prompts", say=print)
        run_stage(other, "evaluate", arm="base", say=print)


def controls_folder(recipe: Recipe) -> Path:
    return Path(f"{recipe.folder}-controls")


# How far an arm went --------------------------------------------------------------------------------------------------


def measure_distance(recipe: Recipe, arm: str) -> None:
    """Write how likely a text that nobody asked for is under an arm, and its KL from the base on its own samples."""
    file = controls_folder(recipe) / "distance" / f"{arm}.json"
    needed = [] if arm == "base" else [recipe.folder / stage / arm for stage in ("train", "evaluate")]
    if file.exists() or any(records.state(folder) != "complete" for folder in needed):
        return
    adapter = tuned_weights(needed[0]) if needed else None
    kl = divergence(recipe, needed[1], adapter) if adapter else None
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"nll": text_nlls(recipe, adapter), "kl": kl})


def text_nlls(recipe: Recipe, adapter: Path | None) -> dict[str, float]:
    model, tokenizer = load_causal(*with_tuned(recipe.policy, adapter), recipe.runtime.device)
    nlls = {}
    for code in recipe.run.evaluated:
        ids = tokenizer(everyday.TEXT[code], return_tensors="pt")["input_ids"].to(model.device)
        with torch.inference_mode():
            nlls[code] = model(input_ids=ids, labels=ids).loss.item()
    return nlls


def divergence(recipe: Recipe, evaluated: Path, adapter: Path) -> dict[str, Any]:
    prompts = read_table(recipe.folder / "eval-prompts", [*ROW, "messages"])
    rows = read_table(evaluated).filter(pl.col("language").is_in(recipe.run.languages), temperature=1.0)
    rows = rows.filter(pl.col("completion") != "").join(prompts, on=ROW).with_columns(completion_ids=None)
    groups = by_prompt(rows)
    own, base = (
        score_likelihood(*open_likelihood(recipe.policy, recipe.runtime, True, weights), groups, {})
        for weights in (adapter, None)
    )
    return interval([float(np.mean(np.subtract(a, b))) for a, b in zip(own, base, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("reward", "controls"))
    parser.add_argument("recipe", type=Path)
    asked = parser.parse_args()
    recipe = load(asked.recipe)
    if asked.what == "reward":
        make_reward(recipe)
    else:
        controls(recipe)
        for arm in ("base", *recipe.arms):
            measure_distance(recipe, arm)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
