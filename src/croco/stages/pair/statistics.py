"""What an arm's pairs are made of, for `stage.json`, the report and the warnings: read back from what was written.

The composition asks what a pair teaches besides quality. If the chosen completion can be told from the rejected
one by its language, its length or its finish reason alone, DPO may learn just that; the AUC of such a guess is
the share of pairs in which it is right, ties half. The guess by language or finish reason is scored on other
prompts than those it was fitted on.

Shapes: K pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console

from croco.config.arms import Contrast
from croco.config.rules import Rule, parse_chosen, parse_rejected
from croco.stages.pair.select import expected_share, share_above_minimum
from croco.storage.shards import read_parquet, shards

SHORTCUT_AUC = 0.6  # above this a pair's label can be guessed without looking at quality
SMALL_SHARE = 0.2  # under this the rule is the minimum under another name
_ONE_PAIR = (
    "prompt_id",
    "pair_id",
    "chosen_language",
    "chosen_sample_id",
    "rejected_language",
    "rejected_sample_id",
)
_COLUMNS = (
    *_ONE_PAIR, "chosen_finish_reason", "rejected_finish_reason", "rejected_calibrated", "pool_size",
    "pool_std", "pool_min",
)  # fmt: skip


def facts(folder: Path, rule: Contrast, completions: Mapping[str, int]) -> dict[str, Any]:
    """Counts, composition and shortcuts of a finished folder of pairs; `completions` read per language."""
    pairs = pl.concat([_numbers(shard.path) for shard in shards(folder)])
    left = pl.concat([read_parquet(shard.ledger) for shard in shards(folder) if shard.dropped] or [_NOTHING])
    counts = left.group_by("unit", "language", "reason").len()
    lost = dict(
        counts.filter(pl.col("unit") == "completion").group_by("language").agg(pl.col("len").sum()).rows()
    )
    read = sum(completions.values())
    pools = sum(shard.read["pool"] for shard in shards(folder))
    size = int(np.median(pairs["pool_size"].to_numpy())) if pairs.height else 0
    # a pair that is shown under several prompts is one
    two = pairs.drop_nulls("rejected_calibrated").unique(_ONE_PAIR, maintain_order=True)
    found: dict[str, Any] = {
        "completions": read,
        "candidates": read - sum(lost.values()),
        "pools": pools,
        "pairs": pairs.height,
        "median_pool_size": size,
        "flags": dict(
            counts.filter(pl.col("unit") == "flag")
            .group_by("reason")
            .agg(pl.col("len").sum())
            .sort("reason")
            .rows()
        ),
        "languages": {
            code: {"completions": num, "candidates": num - lost.get(code, 0)}
            | {side: int((pairs[f"{side}_language"] == code).sum()) for side in ("chosen", "rejected")}
            | {
                "uniform": round(pairs.height / len(completions), 1)
            }  # of each side, were no language favoured
            for code, num in completions.items()
        },
    }
    if two.height:
        first = two.filter(pl.col("pair_id") == 0)  # one of each pool
        found["share_other_than_minimum"] = share_above_minimum(
            first["rejected_calibrated"].to_numpy(), first["pool_min"].to_numpy()
        )
        rejected = parse_rejected(rule.rejected)
        if rejected.kind == "gap":  # a distance in scores, of which the simulation has others
            rejected = Rule(
                "gap", rejected.amount / max(float(np.median(first["pool_std"].to_numpy())), 1e-9)
            )
        found["expected_share_other_than_minimum"] = expected_share(parse_chosen(rule.chosen), rejected, size)
        found["shortcuts"] = shortcuts(two)
    return found


_NOTHING = pl.DataFrame(schema={"unit": pl.String, "language": pl.String, "reason": pl.String})


def _numbers(path: Path) -> pl.DataFrame:
    """The columns of a shard of pairs that say what it is made of, its texts as lengths only."""
    lengths = [pl.col(side).str.len_chars().alias(f"{side}_characters") for side in ("chosen", "rejected")]
    return read_parquet(path, [*_COLUMNS, "chosen", "rejected"]).select(*_COLUMNS, *lengths)


def shortcuts(pairs: pl.DataFrame) -> dict[str, float]:
    """How well language, length and finish reason alone tell chosen from rejected: an AUC each, from 0.5 to 1."""
    half = pairs["prompt_id"].hash().to_numpy() % 2
    length = (pairs["chosen_characters"] > pairs["rejected_characters"]).to_numpy()
    even = (pairs["chosen_characters"] == pairs["rejected_characters"]).to_numpy()
    found = {"length": float(np.mean(length + 0.5 * even))}
    for name, column in (("language", "language"), ("finish reason", "finish_reason")):
        one, other = (pairs[f"{side}_{column}"].to_list() for side in ("chosen", "rejected"))
        found[name] = _guessed(one, other, half)
    return {
        name: round(max(auc, 1 - auc) if name == "length" else max(auc, 0.5), 4)
        for name, auc in sorted(found.items())
    }


def _guessed(chosen: list[str], rejected: list[str], half: NDArray[np.integer]) -> float:
    """The AUC of guessing by how often a value was chosen rather than rejected, in the other half of the prompts."""
    names = sorted({*chosen, *rejected})
    places = {name: place for place, name in enumerate(names)}
    one, other = (np.array([places[value] for value in side]) for side in (chosen, rejected))
    right = np.full(len(one), 0.5)
    for part in (0, 1):
        fitted, asked = half != part, half == part
        won, lost = (np.bincount(side[fitted], minlength=len(names)) for side in (one, other))
        liking = (won + 1) / (won + lost + 2)
        first, second = liking[one[asked]], liking[other[asked]]
        right[asked] = (first > second) + 0.5 * (first == second)
    return float(right.mean()) if len(right) else 0.5


def warn(title: str, rule: Contrast, found: Mapping[str, Any]) -> None:
    """Say on the terminal when the rule is the minimum in disguise, or a pair's label has a shortcut."""
    console = Console(stderr=True)

    def say(line: str) -> None:
        console.print(f"{title}: {line}", markup=False, soft_wrap=True)

    expected = found.get("expected_share_other_than_minimum")
    if expected is not None and expected < SMALL_SHARE and parse_rejected(rule.rejected).kind != "min":
        say(
            f'with {found["median_pool_size"]} completions a pool "{rule.rejected}" is expected to pick another than '
            f"the minimum in {expected:.0%} of the pools (here in {found['share_other_than_minimum']:.0%}): in small "
            f"pools this rule is the minimum under another name"
        )
    for name, auc in found.get("shortcuts", {}).items():
        if auc > SHORTCUT_AUC:
            say(
                f"chosen and rejected can be told apart by their {name} alone (AUC {auc:.2f}): pairs may teach "
                f"just that"
            )
