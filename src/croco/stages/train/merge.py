"""`croco merge`: an adapter merged into its base, as a model folder with a card that any library loads.

Before the folder appears it is proven, on the arm's own pairs (on conversations of ours for an adapter without a run),
that the adapter changes log-probabilities, and that the merged weights, and the folder when it is read again, give
those of base + adapter. Weights that were all tuned are copied."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from croco.config.models import Policy
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.models.chat_template import end_id
from croco.models.loading import load_causal, quiet_loading
from croco.models.lora import merged, put_adapter_on
from croco.models.open import policy_of, tuned_weights
from croco.stages.train.batches import collate
from croco.stages.train.choose_rows import TOLERANCE, TOLERANCE_HALF
from croco.stages.train.encode import Example, encode_pairs
from croco.stages.train.forward import completion_logps, token_counts
from croco.stages.train.model_card import Rows, base_name, cell, model_card, policy_card
from croco.storage import files, records, shards
from croco.storage.hashing import check_adapter

PROBES = 8  # pairs on which the merged model is proven
LEAST_CHANGE = 1e-6  # of a completion's mean token log-probability, that an adapter must make on any of them
TALK = {"What is the capital of Denmark?": "Copenhagen.", "Hvad er klokken?": "Klokken er tolv."}


@dataclass(frozen=True)
class Proof:
    """Differences of mean token log-probabilities on the probes, the largest of each."""

    change: float  # base + adapter against the base
    merged: float  # the merged model against base + adapter
    written: float  # the folder, read again, against base + adapter


def merge(recipe: Recipe, arm: str, to: Path, license: str, say: Callable[[str], None]) -> None:
    """Write an arm's policy to the new folder `to`; raises UserError when it cannot be made or is not proven."""
    folder = recipe.folder / "train" / arm
    if records.state(folder) != "complete":
        raise UserError(f"{folder} holds no finished training: run `croco run` first")
    for read in (folder, recipe.folder / "pair" / arm):
        shards.check_contents(read)
    record = records.read_record(folder)

    def card(checked: Rows) -> str:
        training = record["science"]["settings"]["training"]
        return policy_card(recipe, arm, training, record["facts"], license, checked)

    write(
        recipe.policy,
        tuned_weights(folder),
        lambda model, tokenizer: _probes(recipe, arm, model, tokenizer),
        card,
        to,
        say,
        recipe.runtime.device,
    )


def merge_adapter(folder: Path, to: Path, license: str, say: Callable[[str], None]) -> None:
    """Write the policy of an adapter's folder, such as `croco train FILE` makes, to the new folder `to`."""
    policy, adapter = policy_of(folder)
    if adapter is None:
        raise UserError(f"{folder} holds a whole model, expected an adapter")
    cards = [path for path in (folder / "README.md", adapter / "README.md") if path.is_file()]

    def card(checked: Rows) -> str:
        if not cards:
            hub, base = base_name(policy.model, policy.revision)
            made = {"What it was made from": [("policy", base)], "What was checked": checked}
            return model_card(title="A merged adapter", base=hub, languages=(), license=license, tables=made)
        text = (
            cards[0]
            .read_text(encoding="utf-8")
            .replace("library_name: peft", "library_name: transformers", 1)
        )
        if license != "unknown":
            text = re.sub(r"(?m)^license: .*$", lambda _: f"license: {license}", text, count=1)
        rows = "".join(f"| {cell(name)} | {cell(value)} |\n" for name, value in checked)
        return f"{text.rstrip()}\n\n## What was checked\n\n| | |\n|---|---|\n{rows}"

    write(policy, adapter, _talk, card, to, say, "auto")


def write(
    policy: Policy,
    weights: Path,
    probes: Callable[[Any, Any], list[Example]],
    card: Callable[[Rows], str],
    to: Path,
    say: Callable[[str], None],
    device: str,
) -> None:
    """Write a policy with its `weights` (an adapter, or a whole model) to the new folder `to`; raises UserError unless
    it is proven on the `probes` that are made with model and tokenizer."""
    with files.new_folder(to) as partial:
        own: dict[str, object] = {"revision": None, "chat_template": None, "chat_template_kwargs": {}}
        model, tokenizer = load_causal(policy, None, device)
        examples = probes(model, tokenizer)
        before = mean_logps(model, examples)
        if (weights / "config.json").is_file():
            del model  # two at a time may be more than a GPU holds
            with files.writing(partial):
                shutil.copytree(weights, partial, dirs_exist_ok=True)
            whole = policy.model_copy(update={"model": str(weights), **own})
            in_memory = after = mean_logps(load_causal(whole, None, device)[0], examples)
        else:
            check_adapter(weights, policy.model, policy.revision)
            adapted = put_adapter_on(model, weights)
            after = mean_logps(adapted, examples)
            model = merged(adapted)
            in_memory = mean_logps(model, examples)
            with files.writing(partial), quiet_loading():
                model.save_pretrained(str(partial))
                tokenizer.save_pretrained(str(partial))
            del model, adapted
        again, _ = load_causal(policy.model_copy(update={"model": str(partial), **own}), None, device)
        written = mean_logps(again, examples)
        pairs = ((after, before), (in_memory, after), (written, after))
        proof = Proof(*((a - b).abs().max().item() for a, b in pairs))
        _check(proof, again.dtype, weights)
        checked = [
            ("change of mean token log-probabilities, at most", f"{proof.change:.4g}"),
            ("merged against base + adapter, at most", f"{proof.merged:.1e}"),
            ("this folder against base + adapter, at most", f"{proof.written:.1e}"),
        ]
        files.write_text(partial / "README.md", card(checked))
    say(
        f"{to}: mean token log-probabilities changed by up to {proof.change:.3g} and are those of base + adapter "
        f"within {max(proof.merged, proof.written):.1e}, on {len(examples)} conversations"
    )


def _probes(recipe: Recipe, arm: str, model: Any, tokenizer: Any) -> list[Example]:
    """Conversations of the arm's pairs, spread over the table (of the chosen alone, for data without a rejected)."""
    pairs = shards.read_table(recipe.folder / "pair" / arm)
    training = recipe.arms[arm].training
    examples, _ = encode_pairs(
        pairs[:: max(1, pairs.height // (4 * PROBES))],
        tokenizer,
        end=end_id(tokenizer, model.generation_config),
        max_tokens=training.max_tokens,
        chosen_only=training.method == "sft",
        instructions=recipe.policy.instruction,
    )
    if not examples:
        raise UserError(
            f"{recipe.folder / 'pair' / arm} has no pair that fits training.max_tokens, expected one"
        )
    return examples[:: max(1, len(examples) // PROBES)][:PROBES]


def _talk(model: Any, tokenizer: Any) -> list[Example]:
    """Conversations of ours, for an adapter whose pairs are not there."""
    rows = [
        {
            "prompt_id": question,
            "language": "und",
            "messages": [{"role": "user", "content": question}],
            "chosen": answer,
        }
        for question, answer in TALK.items()
    ]
    end = end_id(tokenizer, model.generation_config)
    examples, dropped = encode_pairs(
        pl.DataFrame(rows), tokenizer, end=end, max_tokens=1024, chosen_only=True
    )
    if not examples:
        raise UserError(f"the chat template takes no plain question: {dropped['reason'][0]}")
    return examples


@torch.no_grad()
def mean_logps(model: Any, examples: Sequence[Example]) -> Tensor:
    """The mean token log-probability of every completion, each in a row of its own, float32 on the CPU."""
    means = []
    for example in examples:
        batch = collate([example], rows="single").to(model.device)
        means.append((completion_logps(model, batch) / token_counts(batch)).flatten().float().cpu())
    return torch.cat(means)


def _check(proof: Proof, dtype: torch.dtype, weights: Path) -> None:
    if not proof.change > LEAST_CHANGE:
        raise UserError(
            f"{weights} changes nothing: log-probabilities are the base's within {proof.change:.1e}, expected others"
        )
    allowed = TOLERANCE.get(dtype, TOLERANCE_HALF)
    for what, gap in (("merged model", proof.merged), ("written folder", proof.written)):
        if not gap <= allowed:
            raise UserError(
                f"{weights}: the {what} differs from base + adapter by {gap:.2g} per token, expected at most "
                f"{allowed:.0e} in {str(dtype).removeprefix('torch.')}"
            )
