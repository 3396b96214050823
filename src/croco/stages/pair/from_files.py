"""`croco pairs`: scored completions of other tools in, pairs that every trainer reads out.

A pipeline of three nodes in a folder of its own: `import` (the files as our tables), `pairs` (the stage `pair`) and
`export`. Each is skipped when it is complete, goes on when it was stopped, and is stale when files or settings changed.
Beside it is what a dataset card says of a run's arm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from croco import languages
from croco.config.load import NO_PROMPTS, apply_override, from_dict
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.pipeline import graph, status
from croco.pipeline.fingerprint import pair_settings
from croco.pipeline.node import Given, Node, Stage
from croco.pipeline.run import run_node
from croco.pipeline.stage import Work, lock
from croco.stages.pair.export_trl import FORMATS, write_trl
from croco.stages.pair.import_files import FILE, LINE, import_scored
from croco.stages.prompts.columns import MAPPED
from croco.storage import files, records, shards
from croco.storage.hashing import file_identity

ARM = "pairs"
KNOWN = ("en",)
_MODULE = "croco.stages.pair.from_files"
_OWN: dict[str, Any] = {
    "settings": lambda recipe, arm: {},
    "inputs": lambda recipe, arm: [],
}  # nodes are made below
IMPORT = Stage("import", 1, f"{_MODULE}:import_stage", "", makes=("prompts", "sample", "score"), **_OWN)
EXPORT = Stage("export", 1, f"{_MODULE}:export_stage", "", makes=("README.md", "data"), **_OWN)


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

    `language` is that of all rows, or "file" for the name of each file; `ids` "line" numbers the prompts of a language
    in their order, and the languages must have equally many. Raises StaleStage when `to` was made from other files or
    with other settings, unless `rebuild` makes it anew.
    """
    if form not in FORMATS:
        raise UserError(f"the format '{form}' is unknown, expected one of {', '.join(FORMATS)}")
    mapped = mappings(columns)
    if language is not None and language != FILE:
        languages.check(language)
    if ids is not None and ids != LINE:
        mapped["prompt_id"] = ids
    _recipe(KNOWN, form, overrides)  # what is wrong in the rules is said before anything is made
    for source in sources:
        if not source.is_file():
            raise UserError(f"{source}: no such file")
        if source.resolve().is_relative_to(to.resolve()):
            raise UserError(f"{source} lies in {to}, where the pairs are made: expected another folder")
    names = [source.name for source in sources]
    identity = {str(n): [source.name, file_identity(str(source))] for n, source in enumerate(sources)}
    imported = Node(IMPORT, None, to / "import", {
        "sources": Given([str(source) for source in sources], identity), "columns": mapped, "language": language,
        "ids": LINE if ids == LINE else None,
    }, {})  # fmt: skip

    def make(node: Node) -> dict[str, Any]:
        known = {node: status.status_of(node, contents=rebuild)}
        known = status.clear_wrong(known, [node], say) if rebuild else known
        status.stop_if_wrong(known)
        run_node(node, recipe.runtime, say, known[node])
        return records.read_record(node.folder)["facts"]

    recipe = _recipe(KNOWN, form, overrides)
    with lock(to):
        recipe = _recipe(make(imported)["languages"], form, overrides)
        stage = next(stage for stage in graph.STAGES if stage.name == "pair")
        paired = Node(stage, ARM, to / "pairs", pair_settings(recipe, ARM), {"import": imported})
        make(paired)
        card = {"source": ", ".join(names)} | _rule(recipe, ARM)
        settings = {"form": form, "license": license, "facts": card}
        return int(make(Node(EXPORT, None, to / "export", settings, {"pairs": paired}))["rows"])


def import_stage(work: Work) -> None:
    """Read the files into the tables `prompts`, `sample` and `score`."""
    settings = work.settings
    sources = [Path(source) for source in settings["sources"]]
    counts = import_scored(
        sources, work.folder, settings["columns"], settings["language"], settings["ids"] == LINE
    )
    dropped = shards.read_dropped(work.folder / "sample").to_arrow()
    num = sum(counts.values())
    work.account({"completion": num + dropped.num_rows}, {"completion": num}, dropped)
    work.record(languages=counts)


def export_stage(work: Work) -> None:
    """Write the pairs in TRL's format, with a card."""
    for name in EXPORT.makes:  # of an attempt that was stopped
        files.remove(work.folder / name)
    settings = work.settings
    pairs, form = work.inputs["pairs"], settings["form"]
    tables = (shards.read_parquet(shard.path) for shard in shards.shards(pairs))
    card = {"license": settings["license"], "facts": settings["facts"], "source": str(pairs)}
    rows = write_trl(tables, shards.read_dropped(pairs), work.folder, form, **card)
    work.account({"pair": rows}, {"pair": rows})
    work.record(rows=rows)


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
        "scorer": _without_folders(recipe.reward.model) if scorer == "reward" else scorer,
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
