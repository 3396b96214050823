"""`croco merge`: an arm's adapter merged into its base, as a model folder with a card that any library loads.

Before the folder appears it is proven on the arm's own pairs that the adapter changes log-probabilities, and that the
merged weights, and the folder when it is read again, give those of base + adapter. Weights that were all tuned are
copied."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from croco.config.models import Policy
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.models.chat_template import end_id
from croco.models.loading import load_causal
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


def merge(recipe: Recipe, arm: str, to: Path, license: str, say: Callable[[str], None]) -> None:
    """Write an arm's policy to the new folder `to`; raises UserError when it cannot be made or is not proven."""
    files.check_new_folder(to)
    folder = recipe.folder / "train" / arm
    if records.state(folder) != "complete":
        raise UserError(f"{folder} holds no finished training: run `croco run` first")
    for read in (folder, recipe.folder / "pair" / arm):
        shards.check_contents(read)
    weights = tuned_weights(folder)

    def written_policy(place: Path) -> Policy:
        own: dict[str, object] = {
            "model": str(place),
            "revision": None,
            "chat_template": None,
            "chat_template_kwargs": {},
        }
        return recipe.policy.model_copy(update=own)

    partial = to.with_name(f".{to.name}.merging")
    files.begin_folder(partial)
    model, tokenizer = load_causal(recipe.policy, None, recipe.runtime.device)
    examples = _probes(recipe, arm, model, tokenizer)
    before = mean_logps(model, examples)
    if weights.name == "model":
        with files.writing(partial):
            shutil.copytree(weights, partial, dirs_exist_ok=True)
        after = mean_logps(load_causal(written_policy(weights), None, recipe.runtime.device)[0], examples)
        in_memory = after
    else:
        check_adapter(weights, recipe.policy.model, recipe.policy.revision)
        adapted = put_adapter_on(model, weights)
        after = mean_logps(adapted, examples)
        model = merged(adapted)
        in_memory = mean_logps(model, examples)
        with files.writing(partial):
            model.save_pretrained(str(partial))
            tokenizer.save_pretrained(str(partial))
    del model
    again, _ = load_causal(written_policy(partial), None, recipe.runtime.device)
    written = mean_logps(again, examples)
    change, gap, written_gap = (
        (one - other).abs().max().item()
        for one, other in ((after, before), (in_memory, after), (written, after))
    )
    _check(change, {"merged model": gap, "written folder": written_gap}, again.dtype, weights)
    record = records.read_record(folder)
    checked = [
        ("change of mean token log-probabilities, at most", f"{change:.4g}"),
        ("merged against base + adapter, at most", f"{gap:.1e}"),
        ("this folder against base + adapter, at most", f"{written_gap:.1e}"),
    ]
    card = policy_card(
        recipe, arm, record["science"]["settings"]["training"], record["facts"], license, checked
    )
    files.write_text(partial / "README.md", card)
    files.finish_folder(partial, to)
    say(
        f"{to}: mean token log-probabilities changed by up to {change:.3g} and are those of base + adapter "
        f"within {max(gap, written_gap):.1e}, on {len(examples)} pairs of the arm"
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
    means = []
    for example in examples:
        batch = collate([example], rows="single").to(model.device)
        means.append((completion_logps(model, batch) / token_counts(batch)).flatten().float().cpu())
    return torch.cat(means)


def _check(change: float, gaps: Mapping[str, float], dtype: torch.dtype, weights: Path) -> None:
    """Raise UserError where log-probabilities are the base's, or (`gaps`) not those of base + adapter."""
    if not change > LEAST_CHANGE:
        raise UserError(
            f"{weights} changes nothing: log-probabilities are the base's within {change:.1e}, expected others"
        )
    allowed = TOLERANCE.get(dtype, TOLERANCE_HALF)
    for what, gap in gaps.items():
        if not gap <= allowed:
            raise UserError(
                f"{weights}: the {what} differs from base + adapter by {gap:.2g} per token, expected at most "
                f"{allowed:.0e} in {str(dtype).removeprefix('torch.')}"
            )
