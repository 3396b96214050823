"""From verdicts to results: what every arm reaches per language and group, and how it differs from the base.

A pure function of tables. Prompts are resampled; a group resamples them jointly over its languages, because prompts are
parallel. All arms of a scope share one set of resamples. Differences, at every temperature of the arm: "difference",
from the base at the same temperature, and "difference-to-best-base", from the base at its best temperature on these
very prompts, which can only flatter the base. Of the first, "difference-p" is McNemar's exact p-value where a prompt is
right or wrong, else that of sign flips; "difference-p-holm" adjusts it for all languages (or groups) and arms of the
benchmark at that temperature; "prompts-to-resolve" says how many prompts would settle it. "right-language" is the share
of completions in their prompt's language among those whose language could be told, the share "language-told"."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from croco.config.recipe import Recipe
from croco.config.study import BASE, GROUPS
from croco.errors import UserError
from croco.languages import RIGHT
from croco.stages.evaluate import stats
from croco.storage.schemas import RESULTS

TOLD = "language-told"
Row = dict[str, Any]
# metric -> (n,) per prompt, the sum over the scope's languages of the mean over samples
Shares = dict[str, NDArray[np.float64]]


def language_groups(
    tuned: Sequence[str], low_resource: Sequence[str], held_out: Sequence[str]
) -> dict[str, list[str]]:
    """The groups every table shows, each with its languages; empty groups stay empty and get no rows."""
    members = (tuned, low_resource, held_out, (*tuned, *low_resource, *held_out))
    return {name: list(languages) for name, languages in zip(GROUPS, members, strict=True)}


def groups_of(recipe: Recipe) -> dict[str, list[str]]:
    run = recipe.run
    return language_groups(run.languages, run.low_resource_languages, run.held_out_languages)


def headline(benchmark: str) -> str:
    """The metric that decides a benchmark: the share of good completions in the lab, the mean score elsewhere."""
    return "good" if benchmark.startswith("lab") else "score"


def summarise(
    verdicts: pl.DataFrame, groups: Mapping[str, Sequence[str]], seed: int, num_resamples: int = 2000
) -> pl.DataFrame:
    """The results table of the verdicts of all arms, sorted by arm, benchmark, temperature, language, metric. `groups`
    maps a group's name to its languages. Raises UserError when arms were not evaluated on the same prompts and
    languages."""
    rows: list[Row] = []
    for (benchmark,), part in verdicts.group_by("benchmark", maintain_order=True):
        per_prompt = _per_prompt(part)
        _check_same_prompts(per_prompt, str(benchmark))
        for scope, languages in scopes_of(per_prompt["language"].unique().to_list(), groups).items():
            for row in _scope_rows(per_prompt, languages, str(benchmark), seed, num_resamples):
                rows.append({**row, "language": scope, "benchmark": benchmark, "seed": seed})
    rows += adjusted(rows, "difference-p", groups)
    return (
        pl.DataFrame(rows, infer_schema_length=None)
        .select(RESULTS.schema.names)
        .sort("arm", "benchmark", "temperature", "language", "metric")
    )


def scopes_of(present: Sequence[str], groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """What gets rows of its own: every language that is there, and every group with those of its languages."""
    scopes = {language: [language] for language in sorted(present)}
    for name, languages in groups.items():
        if members := [language for language in languages if language in present]:
            scopes[name] = members
    return scopes


def on_common_prompts(verdicts: pl.DataFrame) -> pl.DataFrame:
    """The verdicts on those (prompt, language) that every arm has at every temperature: a completion may be missing in
    one arm only. Raises UserError naming the arm and temperature with the fewest when nothing is left."""
    prompt = ["benchmark", "prompt_id", "language"]
    num_settings = verdicts.select("arm", "temperature").n_unique()
    present = verdicts.select(*prompt, "arm", "temperature").unique().group_by(prompt).len("settings")
    common = present.filter(pl.col("settings") == num_settings)
    if common.is_empty():
        each = verdicts.group_by("arm", "temperature").agg(pl.struct(prompt).n_unique().alias("prompts"))
        arm, temperature, count = each.sort("prompts", "arm", "temperature").row(0)
        raise UserError(
            f'no prompt has a verdict in all arms: "{arm}" at temperature {temperature:g} has verdicts on {count}, the '
            f"fewest; expected more prompts, a larger max_tokens of the reward, or evaluation without that"
        )
    return verdicts.join(common, on=prompt, how="semi")


def _per_prompt(verdicts: pl.DataFrame) -> pl.DataFrame:
    """Means over the samples of every (arm, temperature, prompt, language): the headline metric, a share per mode."""
    benchmark = verdicts["benchmark"][0]
    fidelity = {}
    if "found_language" in verdicts.columns:  # else made before languages were kept
        identified = pl.col("found_language")
        right = (identified == pl.col("language")).fill_null(False).mean()
        fidelity = {RIGHT: right, TOLD: identified.is_not_null().mean()}
    modes = verdicts["mode"].unique().sort().to_list()
    return (
        verdicts.group_by("arm", "temperature", "prompt_id", "language")
        .agg(
            pl.col("value").mean().alias(headline(benchmark)),
            *((pl.col("mode") == mode).mean().alias(f"mode:{mode}") for mode in modes),
            **fidelity,
        )
        .sort("arm", "temperature", "prompt_id", "language")
    )


def _check_same_prompts(per_prompt: pl.DataFrame, benchmark: str) -> None:
    expected = per_prompt.select("prompt_id", "language").n_unique()
    for (arm, temperature), part in per_prompt.group_by("arm", "temperature", maintain_order=True):
        if part.height != expected:
            raise UserError(
                f'Arm "{arm}" at temperature {temperature} has verdicts for {part.height} prompts of "{benchmark}"; '
                f"expected the {expected} that were evaluated over all arms."
            )


def _scope_rows(
    per_prompt: pl.DataFrame, languages: Sequence[str], benchmark: str, seed: int, num_resamples: int
) -> list[dict[str, Any]]:
    """Rows of one language or group: every metric of every arm and temperature, then the differences from the base."""
    scope = per_prompt.filter(pl.col("language").is_in(list(languages)))
    metrics = [
        column
        for column in scope.columns
        if column in (headline(benchmark), RIGHT, TOLD) or column.startswith("mode:")
    ]
    settings: dict[tuple[str, float], Shares] = {}
    weights: NDArray[np.float64] = np.empty(0)
    for (arm, temperature), part in scope.group_by("arm", "temperature", maintain_order=True):
        totals = (
            part.group_by("prompt_id")
            .agg(pl.col(metrics).sum(), pl.len().alias("languages"))
            .sort("prompt_id")
        )
        shares = {metric: totals[metric].to_numpy() for metric in metrics}
        if TOLD in shares and not shares[TOLD].any():
            del shares[RIGHT]
        settings[str(arm), float(str(temperature))] = shares
        weights = totals["languages"].cast(pl.Float64).to_numpy()  # the same for all: prompts were checked
    labels: list[tuple[str, float, str]] = []
    columns: list[NDArray[np.float64]] = []
    for (arm, temperature), shares in settings.items():
        differences = _differences(settings, arm, temperature, headline(benchmark))
        for metric, column in (shares | differences).items():
            labels.append((arm, temperature, metric))
            columns.append(column)
    counts = stats.resample_counts(len(weights), seed, num_resamples)
    # a completion whose language cannot be told has no part in the share that is right
    told = [settings[a, t][TOLD] if metric == RIGHT else weights for a, t, metric in labels]
    intervals = stats.bootstrap_ratio(np.stack(columns, axis=1), np.stack(told, axis=1), counts)
    rows = [
        row_of(arm, temperature, metric, interval, int((total > 0).sum()))
        for (arm, temperature, metric), total, interval in zip(labels, told, intervals, strict=True)
    ]
    for (arm, temperature, metric), column in zip(labels, columns, strict=True):
        if metric == "difference":
            tuned, base = (settings[name, temperature][headline(benchmark)] for name in (arm, BASE))
            rows += tests_of(arm, temperature, metric, column, _p_value(tuned, base, len(languages), seed))
    if (best := _best_base(settings, headline(benchmark))) is not None:
        rows.append(row_of(BASE, best, "best-temperature", stats.Interval(best, best, best), len(weights)))
    return rows


def _differences(
    settings: Mapping[tuple[str, float], Shares], arm: str, temperature: float, metric: str
) -> Shares:
    """Per-prompt differences of one arm from the base; none for the base, or where the base was not evaluated."""
    if arm == BASE:
        return {}
    tuned, differences = settings[arm, temperature][metric], {}
    if (BASE, temperature) in settings:
        differences["difference"] = tuned - settings[BASE, temperature][metric]
    if (best := _best_base(settings, metric)) is not None:
        differences["difference-to-best-base"] = tuned - settings[BASE, best][metric]
    return differences


def _best_base(settings: Mapping[tuple[str, float], Shares], metric: str) -> float | None:
    """The base's temperature with the highest value; the lowest of equals."""
    reached = [
        (-float(shares[metric].sum()), temperature)
        for (arm, temperature), shares in settings.items()
        if arm == BASE
    ]
    return min(reached)[1] if reached else None


def _p_value(tuned: NDArray[np.float64], base: NDArray[np.float64], num_languages: int, seed: int) -> float:
    """McNemar's where every prompt is right or wrong, sign flips elsewhere."""
    if num_languages == 1 and np.isin(tuned, (0, 1)).all() and np.isin(base, (0, 1)).all():
        return stats.mcnemar(tuned, base)
    return stats.sign_flip(tuned - base, seed)


def tests_of(
    arm: str, temperature: float, metric: str, differences: NDArray[np.float64], p_value: float
) -> list[Row]:
    """Rows of a difference's p-value, and of the number of prompts that would resolve it where there is one."""
    needed = stats.prompts_to_resolve(differences)
    values = {f"{metric}-p": p_value} | ({} if needed is None else {"prompts-to-resolve": float(needed)})
    return [
        row_of(arm, temperature, name, stats.Interval(value, value, value), len(differences))
        for name, value in values.items()
    ]


def adjusted(rows: Sequence[Row], metric: str, groups: Mapping[str, Sequence[str]]) -> list[Row]:
    """Holm's adjusted p-values as rows: of a benchmark and temperature, all arms in all languages, and all arms in all
    groups."""
    families: dict[tuple[str, float, bool], list[Row]] = {}
    for row in rows:
        if row["metric"] == metric:
            family = row["benchmark"], row["temperature"], row["language"] in groups
            families.setdefault(family, []).append(row)
    return [
        {**row, "metric": f"{metric}-holm", "value": value, "ci_low": value, "ci_high": value}
        for family in families.values()
        for row, value in zip(family, stats.holm([row["value"] for row in family]), strict=True)
    ]


def row_of(arm: str, temperature: float, metric: str, interval: stats.Interval, num_prompts: int) -> Row:
    """One row of the results table, but for its language, benchmark and seed."""
    low, high = (interval.low, interval.high) if interval.known else (None, None)
    return {
        "arm": arm,
        "temperature": temperature,
        "metric": metric,
        "value": interval.value,
        "ci_low": low,
        "ci_high": high,
        "n": num_prompts,
    }
