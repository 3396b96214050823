"""Makes the lab's shipped models again from nothing: `python -m lab build`, `baselines` or `acceptance`; of the second
world `lists`, some of them with `--what`.

The policy is pretrained from scratch; its samples give English preferences for a teacher; the teacher is distilled into
the reward model; then the acceptance figures are measured. Baseline methods need another policy and a translator, which
have the policy's tokenizer (`baseline_models.py`). The policy is rounded to bfloat16 before anything is derived from
it, since that is what ships.
"""

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from croco.errors import UserError
from croco.lab import world
from croco.lab.items import LANGUAGES
from croco.models.loading import load_policy, load_tokenizer
from croco.models.transformers import HFSampler
from croco.storage.files import write_json
from croco.storage.provenance import here
from lab import baseline_models, list_gates, list_models, reward
from lab.acceptance import measure
from lab.pretrain import Say, every, pretrain, save

MODELS = Path(world.__file__).parent / "models"  # those that ship
SEED = 1
PRETRAINING_TOKENS = 5_000_000
ENGLISH_SAMPLES = 16  # per English train prompt, for the preference pairs
UNLABELLED_PROMPTS, UNLABELLED_SAMPLES = 160, 6  # per language, for the student


class Lists(StrEnum):
    """What `python -m lab lists` makes."""

    all = "all"
    policies = "policies"
    rewards = "rewards"
    translator = "translator"
    gates = "gates"


def build(folder: Path | None = None, seed: int = SEED) -> None:
    """Trains and writes `folder`/policy and `folder`/reward (that of the package when None), printing what it does."""
    folder = folder or MODELS
    torch.set_num_threads(1)  # the same sums in the same order on every machine, and no contention
    console = Console()
    started = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:6.0f} s[/dim]  {text}")

    policy, tokenizer = pretrain(seed, PRETRAINING_TOKENS, on_step=every(say, "pretraining", 200_000))
    save(policy, tokenizer, folder / "policy")
    policy, tokenizer = load_policy(str(folder / "policy"), dtype="float32")
    facts: dict[str, Any] = build_reward(policy, tokenizer, folder / "reward", seed, say)
    facts |= {"seed": seed, "pretraining_tokens": PRETRAINING_TOKENS}
    table, shares = measure(folder / "policy", folder / "reward", seed)
    console.print(table)
    facts |= {"gates_on_dev": shares, "seconds": round(time.monotonic() - started)}
    write_json(folder / "build.json", facts | here())
    build_baselines(folder, seed)
    say(f"wrote {folder}")


def build_baselines(folder: Path | None = None, seed: int = SEED) -> None:
    """Trains and writes `folder`/other and `folder`/translator, with the tokenizer of `folder`/policy."""
    folder = folder or MODELS
    torch.set_num_threads(1)
    started, console = time.monotonic(), Console()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:6.0f} s[/dim]  {text}")

    tokenizer = load_tokenizer(str(folder / "policy"))
    other = baseline_models.pretrain_other(tokenizer, seed + 1, every(say, "pretraining the other", 100_000))
    save(other, tokenizer, folder / "other")
    translator = baseline_models.train_translator(
        tokenizer, seed + 2, baseline_models.parallel, LANGUAGES, on_step=every(say, "translator", 100_000)
    )
    save(translator, tokenizer, folder / "translator")
    tokens = {
        "other_tokens": baseline_models.OTHER_TOKENS,
        "translator_tokens": baseline_models.TRANSLATOR_TOKENS,
    }
    facts = {"seed": seed, **tokens, "seconds": round(time.monotonic() - started)}
    write_json(folder / "rivals.json", facts | here())


def build_reward(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    seed: int,
    say: Say,
) -> dict[str, float]:
    """Teacher and student on the policy's samples; returns how well the teacher ranks English and how it was made."""
    sampler = HFSampler(policy, tokenizer)
    train = world.prompt_ids("train")
    english = reward.draw(sampler, tokenizer, [(p, "en") for p in train], ENGLISH_SAMPLES, seed)
    say(f"sampled {len(english):,} English completions")
    keys = [(p, language) for language in LANGUAGES for p in train[:UNLABELLED_PROMPTS]]
    rows = reward.draw(sampler, tokenizer, keys, UNLABELLED_SAMPLES, seed + 1)
    rows += reward.corpus_rows(tokenizer, keys, seed)
    say(f"sampled {len(rows):,} unlabelled completions in {len(LANGUAGES)} languages")
    english_values = reward.features(policy, tokenizer, english, seed)
    values = reward.features(policy, tokenizer, rows, seed)
    say("computed the teacher's features")

    texts = tokenizer.batch_decode([row.ids for row in english], skip_special_tokens=True)
    tiers = [reward.tier(row.prompt_id, "en", text) for row, text in zip(english, texts, strict=True)]
    held_out = {
        p for i, p in enumerate(train) if i % 5 == 0
    }  # a fifth of the English prompts measures the teacher
    pairs = reward.english_pairs(english, tiers)
    if not len(pairs):
        raise UserError("the policy gave no English completion that is better than another one")
    measured = np.array([english[i].prompt_id in held_out for i, _ in pairs])
    teacher = reward.train_teacher(values, rows, english_values, pairs[~measured], seed)
    scores = teacher(english_values, ["en"] * len(english))
    accuracy = float((scores[pairs[measured, 0]] > scores[pairs[measured, 1]]).mean())
    say(f"teacher: {len(pairs):,} English pairs, ranks {accuracy:.3f} of those held out")

    targets = teacher(values, [row.language for row in rows])
    student = reward.distil(policy, tokenizer, rows, targets, seed, on_step=every(say, "distilling", 50))
    save(student, tokenizer, folder)
    return {"english_pairs": len(pairs), "teacher_english_accuracy": accuracy, "unlabelled_rows": len(rows)}


def acceptance(folder: Path | None = None, seed: int = SEED) -> None:
    """Prints what the reward model picks on dev prompts, beside random and likelihood."""
    folder = folder or MODELS
    Console().print(measure(folder / "policy", folder / "reward", seed)[0])


def lists(
    what: Lists = Lists.all,
    folder: Annotated[Path | None, typer.Option("--to")] = None,
    seed: int = SEED,
    seconds: float = list_models.SECONDS,
) -> None:
    """Makes the models of the lists world into `folder` (the package when None), or some of them; prints the gates."""
    folder, console, started = folder or MODELS, Console(width=110), time.monotonic()
    torch.set_num_threads(1)

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:6.0f} s[/dim]  {text}")

    if what in (Lists.all, Lists.policies):
        list_models.policies(folder, seconds)
    if what in (Lists.all, Lists.rewards):
        console.print(list_models.rewards(folder, seed, say))
    if what in (Lists.all, Lists.translator):
        list_models.translator(folder, seed, say)
    if what in (Lists.all, Lists.gates):
        for name in policies(folder):
            gates = list_gates.measure(folder, name, seed)
            console.print(list_gates.table(gates, f"{name}, dev prompts"))


def policies(folder: Path) -> list[str]:
    """The policies of the lists world that are built."""
    return [name for name in ("lists-policy", "lists-policy-2") if (folder / name).exists()]


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command("build")(build)
    app.command("baselines")(build_baselines)
    app.command("acceptance")(acceptance)
    app.command("lists")(lists)
    app()
