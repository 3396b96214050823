"""What an arm's pairs are made of, for `stage.json`, the report and the warnings, read back from what was written.

If the chosen completion can be told from the rejected one by its language, length or finish reason alone, DPO may learn
just that. The AUC of such a guess is the share of pairs in which it is right, ties half; by language or finish reason
it is scored on other prompts than those it was fitted on.

Shapes: K pairs."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from croco.config.arms import Contrast
from croco.config.rules import Rule, parse_chosen, parse_rejected
from croco.errors import notice
from croco.pipeline.progress import count_of
from croco.stages.pair.select import expected_share, share_above_minimum
from croco.storage.shards import read_parquet, reasons, shards

SHORTCUT_AUC = 0.6  # above this a pair's label can be guessed without looking at quality
SMALL_SHARE = 0.2  # under this the rule picks the minimum nearly always
SIDES = ("chosen", "rejected")
_SIDE_KEY = [f"{side}_{name}" for side in SIDES for name in ("language", "sample_id")]
_COLUMNS = (
    "prompt_id", "pair_id", *_SIDE_KEY, "chosen_finish_reason", "rejected_finish_reason", "rejected_calibrated",
    "pool_size", "pool_std", "pool_min",
)  # fmt: skip
_NO_LEDGER = pl.DataFrame(schema={"unit": pl.String, "language": pl.String, "reason": pl.String})


def facts(folder: Path, rule: Contrast, completions: Mapping[str, int]) -> dict[str, Any]:
    """Counts, composition and shortcuts of a finished folder of pairs; `completions` read per language."""
    finished = shards(folder)
    pairs = pl.concat([_numbers(shard.path) for shard in finished])
    ledger = pl.concat([read_parquet(shard.ledger) for shard in finished if shard.dropped] or [_NO_LEDGER])
    flags = ledger.filter(unit="flag").group_by("reason").len().sort("reason")
    lost = dict(ledger.filter(unit="completion").group_by("language").len().rows())
    uniform = round(pairs.height / max(len(completions), 1), 1)  # of each side, were no language favoured
    size = int(np.median(pairs["pool_size"].to_numpy())) if pairs.height else 0
    counts: dict[str, Any] = {
        "completions": sum(completions.values()),
        "candidates": sum(completions.values()) - sum(lost.values()),
        "pools": sum(shard.read["pool"] for shard in finished),
        "pairs": pairs.height,
        "median_pool_size": size,
        "flags": dict(flags.rows()),
        "languages": {
            code: {"completions": num, "candidates": num - lost.get(code, 0)}
            | {side: int((pairs[f"{side}_language"] == code).sum()) for side in SIDES}
            | {"uniform": uniform}
            for code, num in completions.items()
        },
    }
    # a pair that is shown under several prompts is one
    two = pairs.drop_nulls("rejected_calibrated").unique(
        ["prompt_id", "pair_id", *_SIDE_KEY], maintain_order=True
    )
    return counts | (_of_the_rule(two, rule, size) if two.height else {})


def _of_the_rule(pairs: pl.DataFrame, rule: Contrast, size: int) -> dict[str, Any]:
    """How often the rule rejects another than the minimum, here and expected in pools of this size; the shortcuts."""
    first = pairs.filter(pair_id=0)  # one of each pool
    rejected = parse_rejected(rule.rejected)
    if rejected.kind == "gap":  # a distance in scores, of which the simulation has others
        std = float(np.median(first["pool_std"].to_numpy()))
        rejected = Rule("gap", rejected.amount / max(std, 1e-9))
    share = share_above_minimum(first["rejected_calibrated"].to_numpy(), first["pool_min"].to_numpy())
    return {
        "share_other_than_minimum": share,
        "expected_share_other_than_minimum": expected_share(parse_chosen(rule.chosen), rejected, size),
        "shortcuts": shortcuts(pairs),
    }


def _numbers(path: Path) -> pl.DataFrame:
    """The columns of a shard of pairs that say what it is made of, its texts as lengths only."""
    lengths = [pl.col(side).str.len_chars().alias(f"{side}_characters") for side in SIDES]
    return read_parquet(path, [*_COLUMNS, *SIDES]).select(*_COLUMNS, *lengths)


def shortcuts(pairs: pl.DataFrame) -> dict[str, float]:
    """How well language, length and finish reason alone tell chosen from rejected: an AUC each, from 0.5 to 1."""
    one, other = (pairs[f"{side}_characters"].to_numpy() for side in SIDES)
    length = float(np.mean((one > other) + 0.5 * (one == other)))
    half = pairs["prompt_id"].hash().to_numpy() % 2
    guessed = {
        name.replace("_", " "): _guessed(
            pairs[f"chosen_{name}"].to_list(), pairs[f"rejected_{name}"].to_list(), half
        )
        for name in ("finish_reason", "language")
    }
    guessed = {name: max(auc, 0.5) for name, auc in guessed.items()} | {"length": max(length, 1 - length)}
    return {name: round(auc, 4) for name, auc in sorted(guessed.items())}


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


def warn(title: str, rule: Contrast, facts: Mapping[str, Any], folder: Path) -> None:
    """Say on the terminal why there are no pairs, that the rule is the minimum, or that a label can be guessed."""

    def say(line: str) -> None:
        notice(f"{title}: {line}")

    if not facts["pairs"]:
        ledgers = [read_parquet(shard.ledger) for shard in shards(folder) if shard.dropped] or [_NO_LEDGER]
        left_out = reasons(pl.concat(ledgers))[:3]
        why = "; ".join(f"{count_of(count, unit)}: {reason}" for unit, reason, count in left_out)
        say(f"no pairs of {facts['completions']:,} scored completions" + (f" ({why})" if why else ""))
    expected = facts.get("expected_share_other_than_minimum")
    if expected is not None and expected < SMALL_SHARE and parse_rejected(rule.rejected).kind != "min":
        say(
            f'with {facts["median_pool_size"]} completions a pool "{rule.rejected}" is expected to pick another than '
            f"the minimum in {expected:.0%} of the pools (here in {facts['share_other_than_minimum']:.0%}): in small "
            f'pools this rule is nearly the same as "min"'
        )
    for name, auc in facts.get("shortcuts", {}).items():
        guess = 0.5 + 1 / math.sqrt(facts["pairs"])  # and two of its standard errors
        if auc > max(SHORTCUT_AUC, guess):
            say(
                f"chosen and rejected can be told apart by their {name} alone (AUC {auc:.2f}): pairs may teach "
                "just that"
            )
