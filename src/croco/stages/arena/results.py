"""From comparisons to results: win rates with intervals, plain and length-controlled, and what to think of the judge.

A pure function of tables. Prompts are resampled, jointly over the languages of a group, as in `results`. All metrics
are at the temperature of the completions:

    win-rate, lc-win-rate    the arm against the base, ties ½; the second with lengths taken out (`winrate`)
    win-rate:DOMAIN          of the prompts of one domain
    win-rate-p, -p-holm      sign flips of the preferences about ½; Holm over languages (or groups) and arms
    prompts-to-resolve       how many prompts would tell the win rate from ½
    tie, same-text           shares of comparisons
    self-consistency         share of comparisons judged in both orders that agree; the others count as ties
    position-bias            share of judgements for the first shown minus for the second; 0 is none
    length-difference        mean number of characters that the arm's completions are longer
    right-language           share of completions in the prompt's language, of those long enough to tell; base too
"""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from croco.errors import UserError
from croco.stages.evaluate import stats
from croco.stages.evaluate.results import BASE, Row, adjusted, row_of, scopes_of, tests_of
from croco.stages.evaluate.winrate import Fit, fit, pooled

BENCHMARK = "arena"


def compared_in_all_arms(comparisons: pl.DataFrame, arms: Sequence[str]) -> tuple[pl.DataFrame, int]:
    """The comparisons on those (prompt, language) that every arm has, and how many others there were. Raises UserError
    naming an arm without any, or the arm with the fewest when nothing is left."""
    key = ["prompt_id", "language"]
    if missing := [arm for arm in arms if arm not in comparisons["arm"]]:
        raise UserError(f"arm {missing[0]!r} has no comparisons, expected some of every arm")
    common = comparisons.group_by(key).agg(pl.col("arm").n_unique()).filter(pl.col("arm") == len(arms))
    if common.is_empty():
        arm, count = comparisons.group_by("arm").len().sort("len", "arm").row(0)
        raise UserError(
            f"No prompt was compared in all arms; arm {arm!r} has {count} comparisons, the fewest."
        )
    kept = comparisons.join(common.select(key), on=key, how="semi")
    return kept, comparisons.height - kept.height


def arena_rows(
    comparisons: pl.DataFrame,
    groups: Mapping[str, Sequence[str]],
    seed: int,
    num_resamples: int = 2000,
    temperature: float = 0.0,
) -> pl.DataFrame:
    """The rows of the results table for the comparisons of all arms, which must be on the same prompts."""
    numbers = numbered(comparisons)
    rows: list[Row] = []
    # most of the time goes into fits, and groups are made of languages
    known: dict[tuple[object, ...], Fit] = {}
    for scope, languages in scopes_of(comparisons["language"].unique().to_list(), groups).items():
        part = numbers.filter(pl.col("language").is_in(languages))
        names = part["prompt_id"].unique().sort()
        counts = stats.resample_counts(len(names), seed, num_resamples)
        for index, ((arm,), here) in enumerate(part.group_by("arm", maintain_order=True)):
            places = here.with_columns(place=here["prompt_id"].replace_strict(names, range(len(names))))
            of_scope = _scope_rows(str(arm), places, counts, seed) + _fidelity(
                str(arm), places, counts, "identified"
            )
            fits = []
            for (language,), own in places.group_by("language", maintain_order=True):
                key = arm, language, tuple(names)
                if key not in known:
                    known[key] = fit(own["value"], own["delta"], counts[:, own["place"].to_numpy()])
                fits.append(known[key])
            of_scope.append(
                row_of(str(arm), 0.0, "lc-win-rate", stats.of_enough(pooled(fits), len(names)), len(names))
            )
            if index == 0:  # the base's completions are the same in every arm
                of_scope += _fidelity(BASE, places, counts, "base_identified")
            rows += [{**row, "language": scope, "benchmark": BENCHMARK, "seed": seed} for row in of_scope]
    rows += adjusted(rows, "win-rate-p", groups)
    rows = [{**row, "temperature": temperature} for row in rows]
    return pl.DataFrame(rows, infer_schema_length=None).sort("arm", "language", "metric")


def numbered(comparisons: pl.DataFrame) -> pl.DataFrame:
    """What the metrics need of each comparison, as numbers."""
    for_first = [  # 1 for the completion shown first, −1 for the other; null for an order that was not asked about
        pl.when(pl.col(column) == winner)
        .then(1.0)
        .when(pl.col(column) == "tie")
        .then(0.0)
        .when(pl.col(column).is_not_null())
        .then(-1.0)
        for column, winner in (("verdict_arm_first", "arm"), ("verdict_base_first", "base"))
    ]
    orders = [pl.col(f"judgement_{order}_first").is_not_null() for order in ("arm", "base")]
    asked, twice = orders[0] | orders[1], orders[0] & orders[1]
    length = pl.col("completion").str.len_chars().cast(pl.Float64)
    return comparisons.sort("arm", "prompt_id", "language").select(
        "arm",
        "prompt_id",
        "language",
        "domain",
        "value",
        asked=asked.cast(pl.Float64),
        same=(~asked).cast(pl.Float64),
        tie=(pl.col("value") == 0.5).cast(pl.Float64),
        twice=twice.cast(pl.Float64),
        agree=(twice & (pl.col("verdict_arm_first") == pl.col("verdict_base_first"))).cast(pl.Float64),
        bias=pl.when(asked).then(pl.mean_horizontal(for_first)).otherwise(0.0),
        delta=length - pl.col("base_completion").str.len_chars().cast(pl.Float64),
        identified=(pl.col("found_language") == pl.col("language")).cast(pl.Float64),
        base_identified=(pl.col("base_found_language") == pl.col("language")).cast(pl.Float64),
    )


def _scope_rows(arm: str, part: pl.DataFrame, counts: Any, seed: int) -> list[Row]:
    """Every metric of one arm in one language or group."""
    one = pl.lit(1.0)
    columns: dict[str, tuple[pl.Expr, pl.Expr]] = {
        "win-rate": (pl.col("value"), one),
        "tie": (pl.col("tie"), one),
        "same-text": (pl.col("same"), one),
        "self-consistency": (pl.col("agree"), pl.col("twice")),
        "position-bias": (pl.col("bias"), pl.col("asked")),
        "length-difference": (pl.col("delta"), one),
    }
    for domain in part["domain"].drop_nulls().unique().sort():
        inside = (pl.col("domain") == domain).fill_null(False).cast(pl.Float64)
        columns[f"win-rate:{domain}"] = (pl.col("value") * inside, inside)
    rows = _ratios(arm, part, columns, counts)
    leaning = part.group_by("place").agg((pl.col("value") - 0.5).sum()).sort("place")["value"].to_numpy()
    return rows + tests_of(arm, 0.0, "win-rate", leaning, stats.sign_flip(leaning, seed))


def _fidelity(arm: str, part: pl.DataFrame, counts: Any, column: str) -> list[Row]:
    known = pl.col(column).is_not_null().cast(pl.Float64)
    return _ratios(arm, part, {"right-language": (pl.col(column).fill_null(0.0), known)}, counts)


def _ratios(
    arm: str, part: pl.DataFrame, columns: Mapping[str, tuple[pl.Expr, pl.Expr]], counts: Any
) -> list[Row]:
    """Means of values over weights, each with its interval; one without any weight has no row."""
    numbers = part.select(
        "place",
        **{f"value {name}": value for name, (value, _) in columns.items()},
        **{f"weight {name}": weight for name, (_, weight) in columns.items()},
    )
    sums = numbers.group_by("place").sum().sort("place")
    names = [name for name in columns if sums[f"weight {name}"].sum() > 0]
    if not names:
        return []
    values, weights = (
        sums.select(f"{kind} {name}" for name in names).to_numpy() for kind in ("value", "weight")
    )
    intervals = stats.bootstrap_ratio(values, weights, counts)
    return [
        row_of(arm, 0.0, name, interval, int((weights[:, i] > 0).sum()))
        for i, (name, interval) in enumerate(zip(names, intervals, strict=True))
    ]
