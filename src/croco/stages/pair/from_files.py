"""`croco pairs` and what `croco export` says of a run: files of other tools in, pairs that every trainer reads out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from croco import languages
from croco.config.load import NO_PROMPTS, apply_override, from_dict
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.pipeline.fingerprint import pair_settings
from croco.pipeline.stage import Work
from croco.stages.pair.export_trl import FORMATS, export_pairs
from croco.stages.pair.import_files import import_scored
from croco.stages.pair.pair import pair
from croco.stages.prompts.columns import MAPPED
from croco.storage import files, provenance, shards
from croco.storage.hashing import digest
from croco.storage.rows import files_of
from croco.storage.schemas import TABLES

ARM = "pairs"
MADE = ("prompts", "sample", "score", "pairs", "export")
FILES = re.compile(
    rf"(prompts|sample|score|pairs)/({files.OURS.pattern}|stage\.json)|export/(README\.md|data/[^/]*)"
)
KNOWN = ("en",)


def pairs_of_files(
    sources: Sequence[Path],
    to: Path,
    columns: Sequence[str],
    language: str | None,
    overrides: Sequence[str],
    form: str,
    license: str,
) -> int:
    """Import, pair and export; `to` then holds the tables, the ledger and `export/`. Returns the rows exported.

    Whatever stops it, the folder is made anew by the next call: nothing in it took long to make.
    """
    if form not in FORMATS:
        raise UserError(f"the format '{form}' is unknown, expected one of {', '.join(FORMATS)}")
    mapped = mappings(columns)
    if language is not None:
        languages.check(language)
    _recipe(KNOWN, form, overrides)  # what is wrong in the rules is said before anything is made
    sources = [file for source in sources for file in files_of(source)]
    for source in sources:
        if source.resolve().is_relative_to(to.resolve()):
            raise UserError(f"{source} lies in {to}, which is made anew: expected another folder")
    files.check_own_folder(to, "sources.json", ["sources"], FILES)
    for name in MADE:
        files.remove_folder(to / name)
    files.write_json(to / "sources.json", {"sources": [str(source) for source in sources]})
    found = import_scored(sources, to, mapped, language)
    recipe = _recipe(sorted(found), form, overrides)
    work = Work(
        arm=ARM,
        folder=to / "pairs",
        settings=pair_settings(recipe, ARM),
        runtime=recipe.runtime,
        inputs={name: to / name for name in ("prompts", "sample", "score")},
        table=TABLES["pairs"],
        title="pairs",
    )
    pair(work)
    shards.merge_ledgers(to / "pairs")
    science = {"name": "pair", "version": 0, "arm": ARM, "settings": work.settings, "inputs": {}}
    record = {
        "stage": "pair",
        "arm": ARM,
        "state": "complete",
        "fingerprint": digest(science),
        "science": science,
        "shard_prompts": recipe.runtime.shard_prompts,
        "counts": {},
        "seconds": 0.0,
        "starts": 1,
        **work.record_file,
        **provenance.here(),
    }
    files.write_json(to / "pairs" / "stage.json", record)
    facts = {"source": ", ".join(source.name for source in sources)} | _rule(recipe, ARM)
    return export_pairs(to / "pairs", to / "export", form, license=license, facts=facts)


def _recipe(codes: Sequence[str], form: str, overrides: Sequence[str]) -> Recipe:
    """A recipe whose one arm has the rules asked for; KNOWN stands for languages that are not read yet."""
    arm = {"training": {"method": "sft"}} if form == "prompt-completion" else {}
    values = {"run": {"name": "pairs", "languages": list(codes)}, **NO_PROMPTS, "arms": {ARM: arm}}
    for override in overrides:
        if codes is KNOWN and override.partition("=")[0].startswith("pool."):
            continue
        apply_override(values, f"arms.{ARM}.{override}")
    recipe = from_dict(values, "croco pairs")
    if recipe.arms[ARM].chosen == "reference":
        raise UserError("--set chosen=reference: files of scored completions hold no gold completions")
    return recipe


def mappings(columns: Sequence[str]) -> dict[str, str]:
    """What `--column OURS=THEIRS` says; raises UserError for another form or a column that is none of ours."""
    return dict(_mapping(text) for text in columns)


def _mapping(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not equals or not theirs or ours not in MAPPED:
        raise UserError(f"--column {text}: expected OURS=THEIRS, with one of {', '.join(MAPPED)} for OURS")
    return ours, theirs


def facts_of(recipe: Recipe, arm: str) -> dict[str, str]:
    """What a dataset card says of an arm: models, sampling and rule."""
    sampling = recipe.sampling
    decoding = (
        f"{sampling.completions} a prompt, temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
    )
    scorer = recipe.arms[arm].scorer
    return {
        "policy": _without_folders(recipe.policy.model),
        "scorer": _without_folders(recipe.reward.name) if scorer == "reward" else scorer,
        "completions": decoding,
        "prompts": _without_folders(recipe.prompts.source),
        "seed": str(recipe.run.seed),
    } | _rule(recipe, arm)


def _without_folders(name: str) -> str:
    """A model or data set as a card names it: of a path, which is nobody's business, only its last part."""
    is_path = Path(name).is_absolute() or name.startswith(("~", ".")) or Path(name).exists()
    return Path(name).name if is_path else name


def _rule(recipe: Recipe, arm: str) -> dict[str, str]:
    section = recipe.arms[arm]
    guards = section.guards.model_dump()
    acting = [f"{name} {action}" for name, action in guards.items() if action in ("drop", "flag")]
    return {
        "pool": str(section.pool),
        "chosen": section.chosen,
        "rejected": section.rejected,
        "calibration": section.calibration,
        "prompt in the language of": section.prompt,
        "guards": ", ".join(acting) or "none",
    }
