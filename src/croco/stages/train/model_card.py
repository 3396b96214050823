"""The model card of a tuned policy: what it was made from and how, what it reached, and what was checked.

Markdown with front matter for the Hub. Text from files is escaped; a base that is a directory is not named by its path.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from croco.config.recipe import Recipe
from croco.stages.evaluate.results import BASE, GROUPS, headline
from croco.storage import provenance, records, shards
from croco.storage.hashing import HUB_ID, local_model, model_identity

Rows = Sequence[tuple[str, str]]
LINEAGE = ("prompts", "translate", "sample", "score", "score-references", "pair", "train")


def model_card(
    *,
    title: str,
    base: str | None,
    languages: Sequence[str],
    license: str,
    tables: Mapping[str, Rows],
    results: Sequence[Sequence[str]] = (),
    library: str = "transformers",
) -> str:
    """The card: front matter, one table per heading of `tables`, then the results (their first row is the head)."""
    lines = ["---", f"license: {json.dumps(license)}", f"library_name: {library}"]
    lines += ["pipeline_tag: text-generation"] + ([f"base_model: {json.dumps(base)}"] if base else [])
    codes = [f"- {json.dumps(code)}" for code in dict.fromkeys(c.split("-")[0] for c in languages)]
    lines += ["language:", *codes] if codes else []
    lines += ["tags:", "- croco", "- preference-tuning", "---", "", f"# {cell(title)}", ""]
    for heading, rows in tables.items():
        if rows:
            lines += [f"## {heading}", "", "| | |", "|---|---|"]
            lines += [f"| {cell(name)} | {cell(value)} |" for name, value in rows] + [""]
    if results:
        head, *body = results
        lines += ["## Results", "", f"| {' | '.join(map(cell, head))} |", f"|{'---|' * len(head)}"]
        lines += [f"| {' | '.join(map(cell, row))} |" for row in body] + [""]
    return "\n".join(lines)


def policy_card(
    recipe: Recipe,
    arm: str,
    training: Mapping[str, Any],
    facts: Mapping[str, Any],
    license: str,
    checked: Rows = (),
    library: str = "transformers",
) -> str:
    """The card of an arm's policy; `facts` are those of its training, `checked` what was proven of its weights."""
    policy, reward = recipe.policy, recipe.reward
    hub, base = base_name(policy.model, policy.revision)
    alone = reward.name == reward.model
    scored_by = base_name(reward.model, reward.revision)[1] if alone else reward.name
    made = [
        ("policy", base),
        ("reward", scored_by),
        ("prompts", Path(recipe.prompts.source).name),
        ("languages tuned", ", ".join(recipe.run.languages)),
        ("run, arm", f"{recipe.run.name}, {arm}"),
        ("seed", str(recipe.run.seed)),
        ("pairs trained on, held out", f"{facts['pairs']:,}, {facts['validation_pairs']:,}"),
        ("steps, step of these weights", f"{facts['steps']:,}, {facts['adapter_step']:,}"),
        ("stopped early", facts["stopped"] or "no"),
        ("libraries", ", ".join(f"{name} {version}" for name, version in provenance.libraries().items())),
    ]
    return model_card(
        title=f"{recipe.run.name}: {arm}",
        base=hub,
        languages=recipe.run.languages,
        license=license,
        tables={
            "What it was made from": made,
            "Lineage of its data": lineage(recipe, arm),
            "How its pairs were chosen": settings_rows(
                recipe.arms[arm].model_dump(mode="json", exclude={"training", "guards"})
            ),
            "How it was tuned": settings_rows(training),
            "What was checked": checked,
        },
        results=results_rows(recipe.folder / "results", arm),
        library=library,
    )


def cell(text: str) -> str:
    """A text that cannot break out of its table cell, nor become a tag, a link or a picture."""
    kept = " ".join(str(text).split())
    for mark, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("[", "\\["), ("`", "\\`")):
        kept = kept.replace(mark, escaped)
    return kept


def base_name(model: str, revision: str | None) -> tuple[str | None, str]:
    """The base's hub id for the front matter, if it has one, and what the card says of it: never a path."""
    identity = model_identity(model, revision)
    if local_model(model) is None:
        return (model if HUB_ID.fullmatch(model) else None), identity
    return None, f"{model if model.startswith('lab:') else Path(model).name} ({identity})"


def settings_rows(settings: Mapping[str, Any], prefix: str = "") -> Rows:
    """Nested settings as dotted names and values."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += settings_rows(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", json.dumps(value, ensure_ascii=False)))
    return rows


def lineage(recipe: Recipe, arm: str) -> Rows:
    """Each stage that led to an arm's policy: its fingerprint, what it wrote and what it left out."""
    rows = []
    for name in LINEAGE:
        for folder in (recipe.folder / name, recipe.folder / name / arm):
            if records.state(folder) == "complete":
                title = folder.relative_to(recipe.folder).as_posix()
                rows.append((title, _counted(records.read_record(folder))))
    return rows


def _counted(record: Mapping[str, Any]) -> str:
    counts, parts = record["counts"], [f"fingerprint {record['fingerprint']}"]
    parts += [f"{count:,} {unit}s" for unit, count in counts.get("written", {}).items()]
    parts += [
        f"{count:,} {unit}s " + ("flagged" if unit == "flag" else "left out")
        for unit, count in counts.get("dropped", {}).items()
    ]
    return ", ".join(parts)


def results_rows(folder: Path, arm: str) -> list[list[str]]:
    """What the arm reached beside the untuned policy, per benchmark, group and temperature; empty without results."""
    if records.state(folder) != "complete":
        return []
    table = shards.read_table(folder).filter(pl.col("language").is_in(GROUPS))
    key = ["benchmark", "language", "metric", "temperature"]
    rows = [["benchmark", "languages", "temperature", "value [95 %]", "prompts", "untuned"]]
    untuned = {
        tuple(row[k] for k in key): row for row in table.filter(pl.col("arm") == BASE).iter_rows(named=True)
    }
    for row in table.filter(pl.col("arm") == arm).iter_rows(named=True):
        if row["metric"] == headline(row["benchmark"]):
            before = untuned.get(tuple(row[k] for k in key))
            ends = (
                "too few prompts" if row["ci_low"] is None else f"{row['ci_low']:.3f}, {row['ci_high']:.3f}"
            )
            value = f"{row['value']:.3f} [{ends}]"
            rows.append(
                [row["benchmark"], row["language"], f"{row['temperature']:g}", value, f"{row['n']:,}",
                 f"{before['value']:.3f}" if before else "–"]
            )  # fmt: skip
    return rows if len(rows) > 1 else []
