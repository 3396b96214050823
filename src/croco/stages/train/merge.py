"""`croco merge`: an arm's adapter merged into its base, as a model folder that any library loads.

It is proven on conversations of the arm's own pairs before the folder appears: the adapter changes log-probabilities,
the merged weights give what base + adapter give, and so does the folder when it is read again. Chat template,
tokenizer and generation config come along, and a card that says what it was made from. An arm whose weights were all
tuned is copied and held against its base.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.models.chat_template import end_id
from croco.models.loading import load_policy
from croco.models.lora import merged, put_adapter_on
from croco.models.open import tuned_weights
from croco.stages.train.batches import collate
from croco.stages.train.choose_rows import TOLERANCE, TOLERANCE_HALF
from croco.stages.train.encode import Example, encode_pairs
from croco.stages.train.forward import completion_logps, token_counts
from croco.stages.train.model_card import policy_card
from croco.storage import files, records, shards
from croco.storage.hashing import check_adapter

PROBES = 8  # pairs on which the merged model is proven
LEAST_CHANGE = 1e-6  # of a completion's mean token log-probability, that an adapter must make on any of them


@dataclass(frozen=True)
class Proof:
    """Differences of mean token log-probabilities on the probes, the largest of each."""

    change: float  # base + adapter against the base
    merged: float  # the merged model against base + adapter
    written: float  # the folder, read again, against base + adapter


def merge(recipe: Recipe, arm: str, to: Path, license: str, say: Callable[[str], None]) -> None:
    """Write an arm's policy to the new folder `to`; raises UserError when it cannot be made or is not proven."""
    files.check_new_folder(to)
    folder = recipe.folder / "train" / arm
    if records.state(folder) != "complete":
        raise UserError(f"{folder} holds no finished training: run `croco run` first")
    for read in (folder, recipe.folder / "pair" / arm):
        shards.check_contents(read)
    with files.new_folder(to) as partial:
        proof, probes = _written(recipe, arm, folder, partial, license)
    say(
        f"{to}: mean token log-probabilities changed by up to {proof.change:.3g} and are those of base + adapter "
        f"within {max(proof.merged, proof.written):.1e}, on {probes} pairs of the arm"
    )


def _written(recipe: Recipe, arm: str, folder: Path, to: Path, license: str) -> tuple[Proof, int]:
    """Write the policy of a finished training and its card into `to`; the proof, and on how many pairs it rests."""
    weights = tuned_weights(folder)
    model, tokenizer = _base(recipe)
    examples = _probes(recipe, arm, model, tokenizer)
    before = mean_logps(model, examples)
    if weights.name == "model":
        with files.writing(to):
            shutil.copytree(weights, to, dirs_exist_ok=True)
        after = mean_logps(
            load_policy(str(weights), dtype=recipe.policy.dtype, device=recipe.runtime.device)[0], examples
        )
        in_memory = after
    else:
        check_adapter(weights, recipe.policy.model, recipe.policy.revision)
        adapted = put_adapter_on(model, weights)
        after = mean_logps(adapted, examples)
        model = merged(adapted)
        in_memory = mean_logps(model, examples)
        with files.writing(to):
            model.save_pretrained(str(to))
            tokenizer.save_pretrained(str(to))
    del model
    again, _ = load_policy(
        str(to), dtype=recipe.policy.dtype, device=recipe.runtime.device,
        trust_remote_code=recipe.policy.trust_remote_code,
    )  # fmt: skip
    written = mean_logps(again, examples)
    proof = Proof(*(_largest(a, b) for a, b in ((after, before), (in_memory, after), (written, after))))
    _check(proof, again.dtype, weights)
    found = records.read_record(folder)
    checked = [
        ("change of mean token log-probabilities, at most", f"{proof.change:.4g}"),
        ("merged against base + adapter, at most", f"{proof.merged:.1e}"),
        ("this folder against base + adapter, at most", f"{proof.written:.1e}"),
    ]
    card = policy_card(
        recipe, arm, found["science"]["settings"]["training"], found["facts"], license, checked
    )
    files.write_text(to / "README.md", card)
    return proof, len(examples)


def _base(recipe: Recipe) -> tuple[Any, Any]:
    policy = recipe.policy
    return load_policy(
        policy.model,
        policy.revision,
        dtype=policy.dtype,
        device=recipe.runtime.device,
        chat_template=policy.template,
        trust_remote_code=policy.trust_remote_code,
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


@torch.no_grad()
def mean_logps(model: Any, examples: Sequence[Example]) -> Tensor:
    """The mean token log-probability of every completion, each in a row of its own, float32 on the CPU."""
    found = []
    for example in examples:
        batch = collate([example], rows="single").to(model.device)
        found.append((completion_logps(model, batch) / token_counts(batch)).flatten().float().cpu())
    return torch.cat(found)


def _largest(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


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
