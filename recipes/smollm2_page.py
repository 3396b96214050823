"""The page of a run of smollm2.toml or smollm2-cpu.toml: what counts as usable, arms and controls beside each other.

    python recipes/smollm2_page.py RECIPE --to docs/results/smollm2.md

The tables are written below the line MARK of the page, whose text above it is kept; the run's own page is copied beside
it. It needs the run's tables only: no model, and no part of a run that is not finished.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from everyday import WORD
from smollm2 import BEST_OF, PARTS, ROW, controls_folder, labelled

from croco.config.load import load
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.stages.evaluate.results import language_groups, on_common_prompts, summarise
from croco.storage import records
from croco.storage.files import read_json
from croco.storage.shards import read_table

MARK = "<!-- the tables below are written by recipes/smollm2_page.py -->"


def page(recipe: Recipe, to: Path) -> None:
    """Write the tables below the line MARK of the page, whose text above it is kept; beside it the run's own page. What
    is not finished is left out, and named."""
    verdicts, missing = judged(recipe)
    every = verdicts.height
    verdicts = on_common_prompts(verdicts)
    groups = language_groups(recipe.run.languages, (), recipe.run.held_out_languages)
    groups = {"tuned but English": list(recipe.run.languages[1:]), **groups}
    results = summarise(verdicts, groups, recipe.run.seed)
    accuracy = pl.read_json(Path(recipe.reward.model) / "accuracy.json")
    text = to.read_text(encoding="utf-8").partition(MARK)[0] if to.exists() else "# A real model\n\n"
    parts = [text.rstrip(), MARK, *tables(recipe, results, accuracy), *picked(recipe)]
    parts += [f"Not finished: {', '.join(missing)}."] if missing else []
    each = verdicts["prompt_id"].n_unique()
    parts += (
        [f"On the {each} prompts that all have answered; others were left out."]
        if verdicts.height < every
        else []
    )
    to.write_text("\n\n".join([*parts, *drift(recipe)]) + "\n", encoding="utf-8")
    if (made := recipe.folder / "report" / "report.html").exists():
        shutil.copyfile(made, to.with_suffix(".html"))


def judged(recipe: Recipe) -> tuple[pl.DataFrame, list[str]]:
    """The verdicts of the run and of the controls, each part of being usable as a benchmark of its own, and the arms
    and controls that are not there."""
    folders = {arm: recipe.folder / "evaluate" / arm for arm in ("base", *recipe.evaluated_arms)}
    instructed, best_of = "base, told the language", f"base, best of {BEST_OF}"
    folders |= {instructed: controls_folder(recipe) / "instruction" / "evaluate" / "base"}
    folders |= {best_of: controls_folder(recipe) / "best-of" / "evaluate" / "base"}
    read = {arm: read_table(each) for arm, each in folders.items() if records.state(each) == "complete"}
    if best_of in read:
        ranked = read[best_of].sort(*ROW, "value", descending=[False, False, True])
        read[best_of] = ranked.unique(ROW, keep="first", maintain_order=True)
    named = [table.with_columns(arm=pl.lit(arm)) for arm, table in read.items()]
    return by_part(pl.concat(named, how="diagonal")), [arm for arm in folders if arm not in read]


def by_part(rows: pl.DataFrame) -> pl.DataFrame:
    """Verdicts of completions, with "usable" and each part of it as a benchmark of its own."""
    keys = ["arm", "temperature", *ROW, "sample_id", "found_language", "completion", "finish_reason"]
    wide = labelled(rows).select(*keys, "usable", *PARTS)
    long = wide.unpivot(["usable", *PARTS], index=keys, variable_name="benchmark")
    return long.with_columns(pl.col("value").cast(pl.Float64), mode=pl.lit(""))


def shown(row: dict[str, Any], sign: str = "") -> str:
    """A share in percent with its interval."""
    value, *ends = (100 * row[name] for name in ("value", "ci_low", "ci_high") if row[name] is not None)
    return f"{value:{sign}.0f}" + (f" [{ends[0]:{sign}.0f}, {ends[1]:{sign}.0f}]" if ends else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(recipe: Recipe, results: pl.DataFrame, accuracy: pl.DataFrame) -> Iterator[str]:
    """The reward models, usable completions, and their parts."""
    codes = [code for code in recipe.run.languages if code in accuracy.columns]
    yield "## The reward model on dev"
    yield (
        "Share of pairs of completions to one prompt, one good and one not, that are ranked right, in percent with "
        "95 % intervals over prompts (none where they are fewer than six); chance is 50."
    )
    rows = accuracy.to_dicts()
    head = [f"{code} ({rows[0][code]['prompts']} prompts)" for code in codes]
    yield table(
        ["ranked by", *head],
        [[row["reward"], *(shown(row[code]) if row[code] else "" for code in codes)] for row in rows],
    )
    found = {
        tuple(row[name] for name in ("arm", "temperature", "language", "benchmark", "metric")): row
        for row in results.to_dicts()
    }
    settings = sorted({key[:2] for key in found}, key=lambda one: (one[1], one[0]))

    def cell(setting: tuple[Any, ...], scope: str, part: str = "usable", metric: str = "score") -> str:
        row = found.get((*setting, scope, part, metric))
        return shown(row, "+" if metric != "score" else "") if row else ""

    def lines(*columns: tuple[str, ...]) -> list[list[str]]:
        return [[one[0], f"{one[1]:g}", *(cell(one, *column) for column in columns)] for one in settings]

    yield "## Usable completions"
    yield "In percent, with 95 % intervals over prompts; differences in points, paired by prompt."
    for scope in ("tuned", "tuned but English", "held-out"):
        yield f"### Languages: {scope}"
        against = [(scope, "usable", metric) for metric in ("difference", "difference-to-best-base")]
        head = [
            "arm",
            "temperature",
            "usable",
            "against the base at the same",
            "against the base at its best",
        ]
        yield table(head, lines((scope,), *against))
    every = recipe.run.evaluated
    yield "### Language by language"
    yield table(["arm", "temperature", *every], lines(*((code,) for code in every)))
    yield "### Each part by itself, tuned languages"
    yield table(["arm", "temperature", *PARTS], lines(*(("tuned", part) for part in PARTS)))


def picked(recipe: Recipe) -> Iterator[str]:
    """What the chosen and the rejected completions of every arm's pairs are worth."""
    codes, lines = recipe.run.languages, []
    for arm in recipe.arms:
        folder = recipe.folder / "pair" / arm
        pairs = read_table(folder) if records.state(folder) == "complete" else pl.DataFrame()
        for side in ("chosen", "rejected"):
            if pairs.height and not pairs[side].null_count():
                lines.append([f"{arm}, {side}", str(pairs.height), *side_cells(pairs, side, codes)])
    yield "## What the pairs hold"
    yield "Usable completions in percent, language by language; the percentage that is in its language, and its words."
    yield table(["arm, side", "rows", *codes, "in the language", "words"], lines)


def side_cells(pairs: pl.DataFrame, side: str, codes: Sequence[str]) -> Iterator[str]:
    names = {"completion": side, "language": f"{side}_language", "finish_reason": f"{side}_finish_reason"}
    rows = labelled(pairs.select("prompt_id", **{name: pl.col(of) for name, of in names.items()}))
    shares = rows.group_by("language").agg(100 * pl.col("usable").mean())
    share: dict[str, float] = dict(shares.iter_rows())
    yield from (f"{share[code]:.0f}" if code in share else "" for code in codes)
    yield f"{100 * rows['in the language'].sum() / rows.height:.0f}"
    yield f"{rows['completion'].str.count_matches(WORD.pattern).sum() / rows.height:.0f}"


def drift(recipe: Recipe) -> Iterator[str]:
    """How far each arm went from the base, as `smollm2.py controls` measured it."""
    files = {arm: controls_folder(recipe) / "distance" / f"{arm}.json" for arm in ("base", *recipe.arms)}
    lines = []
    for arm, measured in ((arm, read_json(file)) for arm, file in files.items() if file.exists()):
        kl = measured["kl"]
        shown_kl = f"{kl['value']:.3f} [{kl['ci_low']:.3f}, {kl['ci_high']:.3f}]" if kl else ""
        lines.append([arm, *(f"{measured['nll'][code]:.3f}" for code in recipe.run.evaluated), shown_kl])
    if not lines:
        return
    yield "## Distance from the base"
    yield (
        "Negative log-likelihood in nats per token of a short human text in each language (`everyday.TEXT`), and the "
        "KL divergence from the base in nats per token, estimated on the arm's own samples (T = 1) of the tuned "
        "languages' test prompts."
    )
    yield table(["arm", *recipe.run.evaluated, "KL"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--to", type=Path, default=Path("docs/results/smollm2.md"))
    asked = parser.parse_args()
    page(load(asked.recipe), asked.to)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
