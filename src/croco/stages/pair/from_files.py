"""`croco pairs` and what `croco export` says of a run: files of other tools in, pairs that every trainer reads out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from croco import languages
from croco.config.load import NO_PROMPTS, apply_override, from_dict
from croco.config.recipe import Recipe
from croco.config.runtime import Runtime
from croco.errors import UserError
from croco.pipeline import status
from croco.pipeline.fingerprint import pair_settings
from croco.pipeline.graph import known_stage
from croco.pipeline.node import Given, Node, Stage
from croco.pipeline.stage import execute, lock
from croco.stages.pair.export_trl import FORMATS, export_pairs
from croco.stages.pair.import_files import FILE, LINE
from croco.stages.prompts.columns import MAPPED
from croco.storage import files
from croco.storage.hashing import file_identity
from croco.storage.provenance import without_folders
from croco.storage.records import Record
from croco.storage.rows import files_of

ARM = "pairs"
IMPORT = Stage(
    "import", 1, "croco.stages.pair.import_files:imported", "",
    settings=lambda recipe, arm: {}, inputs=lambda recipe, arm: [],
    gives=("prompts", "sample", "score"), makes=("prompts", "sample", "score"),
)  # fmt: skip
TABLES = rf"((prompts|sample|score|pairs)/)?({files.OURS.pattern}|stage\.json)"
EXPORT = r"(export|\.export\.making)/(\.croco|\.tmp-[^/]*|README\.md|data/[^/]*)"
FILES = re.compile(rf"{TABLES}|\.lock|{EXPORT}")  # that these commands write
KNOWN = ("en",)


def pairs_of_files(
    sources: Sequence[Path],
    to: Path,
    columns: Sequence[str],
    language: str | None,
    overrides: Sequence[str],
    form: str,
    license: str,
    ids: str | None = None,
    rebuild: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Import, pair and export; `to` then holds the tables, the ledger and `export/`. Returns the rows exported.

    `language` is that of all rows, or "file": the name of each file. `ids` is the column of the prompts' ids, or
    "line": the languages are parallel by line. What the same files and rules have made there is not made again; raises
    StaleStage for what others have made, unless `rebuild` makes it anew.
    """
    if form not in FORMATS:
        raise UserError(f"the format '{form}' is unknown, expected one of {', '.join(FORMATS)}")
    mapped = mappings(columns) | ({"prompt_id": ids} if ids and ids != LINE else {})
    if language is not None and language != FILE:
        languages.check(language)
    _recipe(KNOWN, form, overrides)  # what is wrong in the rules is said before anything is made
    sources = [file for source in sources for file in files_of(source)]
    for source in sources:
        if source.resolve().is_relative_to(to.resolve()):
            raise UserError(f"{source} lies in {to}, where the pairs are made: expected another folder")
    files.check_own_folder(to, "stage.json", ["stage", "science"], FILES)
    sources_read = Given(
        [str(source) for source in sources], [file_identity(str(source)) for source in sources]
    )
    settings = {"sources": sources_read, "columns": mapped, "language": language, "ids": ids}
    imported = Node(IMPORT, None, to, settings, {})

    def make(node: Node) -> Record:
        known = {node: status.status_of(node, contents=True)}
        known = status.clear_wrong(known, [node], say) if rebuild else known
        status.stop_if_wrong(known)
        return execute(node, Runtime(), known[node])

    with lock(to):
        recipe = _recipe(sorted(make(imported)["facts"]["languages"]), form, overrides)
        rules = pair_settings(recipe, ARM)
        make(Node(known_stage("pair"), ARM, to / "pairs", rules, {"import": imported}))
        files.remove_folder(to / "export")
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
        "policy": without_folders(recipe.policy.model),
        "scorer": without_folders(recipe.reward.name) if scorer == "reward" else scorer,
        "completions": decoding,
        "prompts": without_folders(recipe.prompts.source),
        "seed": str(recipe.run.seed),
    } | _rule(recipe, arm)


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
