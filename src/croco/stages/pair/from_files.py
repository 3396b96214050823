"""`croco pairs` and what `croco export` says of a run: files of other tools in, pairs that every trainer reads out."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from croco import languages
from croco.config.load import NO_PROMPTS, apply_override, from_dict
from croco.config.recipe import Recipe
from croco.config.runtime import Runtime
from croco.errors import UserError
from croco.pipeline.fingerprint import pair_settings
from croco.pipeline.graph import known_stage
from croco.pipeline.node import Given, Node, Stage
from croco.pipeline.run import running_in
from croco.pipeline.status import status_of
from croco.stages.pair.export_trl import check_format, export_node
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
    gives=("prompts", "sample", "score"), makes=("prompts", "sample", "score"),
)  # fmt: skip
TABLES = rf"((prompts|sample|score|pairs)/)?({files.OURS.pattern}|stage\.json)"
# that these commands write
FILES = re.compile(rf"{TABLES}|\.lock|export/(README\.md|data/[^/]*|stage\.json|dropped\.parquet|\.tmp-.*)")
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
    "line": languages are parallel by line. Raises StaleStage for what other files or rules have made there, unless
    `rebuild`."""
    check_format(form)
    mapped = mappings(columns) | ({"prompt_id": ids} if ids and ids != LINE else {})
    if language is not None and language != FILE:
        languages.check(language)
    _recipe(KNOWN, form, overrides)  # what is wrong in the rules is said before anything is made
    sources = [file for source in sources for file in files_of(source)]
    for source in sources:
        if source.resolve().is_relative_to(to.resolve()):
            raise UserError(f"{source} lies in {to}, where the pairs are made: expected another folder")
    files.check_own_folder(to, "stage.json", ["stage", "science"], FILES)
    with running_in(to, Runtime(), rebuild, say) as make:
        if not (to / "export" / "stage.json").exists():
            files.remove_folder(to / "export")  # of a version whose exports had no record
        paired, recipe = scored_pairs(make, sources, to, to / "pairs", mapped, language, ids, overrides, form)
        make(paired)
        facts = {"source": ", ".join(source.name for source in sources)} | _rule(recipe, ARM)
        record = make(export_node(paired.folder, to / "export", form, license, facts))
        return record["counts"]["written"]["pair"]


def scored_pairs(
    make: Callable[[Node], Record],
    sources: Sequence[Path],
    to: Path,
    pairs: Path,
    columns: Mapping[str, str],
    language: str | None,
    ids: str | None,
    overrides: Sequence[str],
    form: str,
) -> tuple[Node, Recipe]:
    """Import scored completions into `to`; returns the node that pairs them in the folder `pairs`, and its recipe."""
    given = Given([str(source) for source in sources], [file_identity(str(source)) for source in sources])
    settings = {"sources": given, "columns": columns, "language": language, "ids": ids}
    imported = Node(IMPORT, None, to, settings, {})
    recipe = _recipe(sorted(make(imported)["facts"]["languages"]), form, overrides)
    return Node(known_stage("pair"), ARM, pairs, pair_settings(recipe, ARM), {"import": imported}), recipe


def _recipe(codes: Sequence[str], form: str, overrides: Sequence[str]) -> Recipe:
    """A recipe whose one arm has the rules asked for; KNOWN is given for languages that are not read yet."""
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
    mapped = {}
    for text in columns:
        ours, _, theirs = text.partition("=")
        if not theirs or ours not in MAPPED:
            raise UserError(
                f"--column {text}: expected OURS=THEIRS, with one of {', '.join(MAPPED)} for OURS"
            )
        mapped[ours] = theirs
    return mapped


def export_arm(recipe: Recipe, arm: str, to: Path, form: str, license: str, rebuild: bool = False) -> int:
    """Export the pairs of a run's arm into the folder `to`; returns the rows. Raises as `pairs_of_files`."""
    pairs, facts = recipe.folder / "pair" / arm, facts_of(recipe, arm)
    node = export_node(pairs, to, form, license, facts, recipe.policy.instruction)
    status_of(node)  # a folder of others stays as it is
    with running_in(to, Runtime(), rebuild) as make:
        return make(node)["counts"]["written"]["pair"]


def facts_of(recipe: Recipe, arm: str) -> dict[str, str]:
    """What a dataset card says of an arm: models, sampling and rule."""
    sampling = recipe.sampling
    decoding = (
        f"{sampling.completions} a prompt, temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
    )
    scorer, reward = recipe.arms[arm].scorer, recipe.arms[arm].reward or recipe.reward
    return {
        "policy": without_folders(recipe.policy.model),
        "scorer": without_folders(reward.name) if scorer == "reward" else scorer,
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
