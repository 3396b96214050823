"""`croco train FILE...`: any file of preference pairs in, a tuned policy out, without a recipe.

Two stages, `import` and `train`. Scored completions (UltraFeedback's form) are paired in between, as by `croco pairs`;
with training.method = "sft" a row may hold a prompt and one completion."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from croco import languages
from croco.config.load import NO_PROMPTS, apply_override, from_dict
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.models.model_files import load_config
from croco.models.open import POLICY, tuned_weights
from croco.pipeline.fingerprint import given_policy, train_settings
from croco.pipeline.graph import known_stage
from croco.pipeline.node import Given, Node, Stage
from croco.pipeline.run import running_in
from croco.pipeline.stage import input_tables
from croco.pipeline.status import status_of
from croco.stages.pair.from_files import mappings, scored_pairs
from croco.stages.train.model_card import base_name, model_card, settings_rows
from croco.storage import files, shards
from croco.storage.hashing import file_identity
from croco.storage.records import Record
from croco.storage.rows import file_rows, files_of

ARM = "train"
SECTIONS = ("training", "policy", "runtime")  # of a recipe, that --set may change; and run.seed
IMPORT = Stage(
    "import", 1, "croco.stages.pair.import_files:imported_pairs", "", gives=("pair",), makes=("pair",)
)


def train_on_files(
    sources: Sequence[Path],
    model: str,
    to: Path,
    columns: Sequence[str],
    language: str | None,
    overrides: Sequence[str],
    license: str,
    say: Callable[[str], None],
    rebuild: bool = False,
    limit: int | None = None,
) -> None:
    """Tune `model` on the (first `limit`) pairs of the files and write the adapter (or the model) into `to`; raises
    UserError, and StaleStage for what other files or settings have made there, unless `rebuild` makes it anew."""
    recipe = _recipe(model, overrides)
    mapped, method = mappings(columns), recipe.arms[ARM].training.method
    if language is not None:
        languages.check(language)
    named = labelled([file for source in sources for file in files_of(source)])
    load_config(recipe.policy, "policy")  # a model that is not there is said before anything is made
    identities = {name: file_identity(str(source)) for name, source in named.items()}
    settings = train_settings(recipe, ARM)
    settings["policy"] = given_policy(recipe.policy, list(recipe.policy.instruction))
    settings |= {"limit": limit} if limit else {}
    status_of(Node(known_stage("train"), None, to, settings, {}))  # a folder of others stays as it is
    for source in named.values():
        if source.resolve().is_relative_to(to.resolve()):
            raise UserError(f"{source} lies in {to}, where the policy is tuned: expected another folder")
    with running_in(to, recipe.runtime, rebuild, say) as make:
        if _is_scored(named.values()):
            files_, place = list(named.values()), (to / "import", to / "pairs")
            paired = scored_pairs(make, files_, *place, mapped, language, None, [], "preference")[0]
        else:
            given = {
                "sources": Given([str(source) for source in named.values()], identities),
                "columns": mapped,
                "language": language,
                "chosen_only": method == "sft",
            }
            paired = Node(IMPORT, None, to / "import", given, {})
        imported = make(paired)
        tuned = Node(known_stage("train"), None, to, settings, {"pair": paired})
        record = make(tuned)
        codes = shards.read_table(input_tables(tuned)["pair"], ["language"])["language"].unique().sort()
        # how the policy is read, for `croco chat` and `croco merge`; whose code may run, only a person says
        files.write_json(to / POLICY, recipe.policy.model_dump(mode="json", exclude={"trust_remote_code"}))
        files.write_text(
            to / "README.md", _card(recipe, identities, codes.to_list(), (imported, record), license)
        )
    facts = record["facts"]
    pairs = facts["pairs"] + facts["validation_pairs"]
    left = [
        f"{count:,} left out ({node.folder / 'dropped.parquet'})"
        for node, made in ((paired, imported), (tuned, record))
        if (count := made["counts"]["dropped"].get("pair", 0))
    ]
    say(", ".join([f"{pairs:,} pairs", *left, f"{facts['steps']:,} steps: {tuned_weights(to)}"]))


def labelled(sources: Sequence[Path]) -> dict[str, Path]:
    """The files by name, with as much of their paths as tells them apart; raises UserError for one given twice."""
    places: dict[Path, Path] = {}
    for source in sources:
        if (first := places.setdefault(source.resolve(), source)) is not source:
            raise UserError(f"{source} is the same file as {first}, expected each once")
    labels = {}
    for place, source in places.items():
        others = [other.parts for other in places if other != place]
        length = next(
            n for n in range(1, len(place.parts) + 1) if all(o[-n:] != place.parts[-n:] for o in others)
        )
        labels["/".join(place.parts[-length:])] = source
    return labels


def _recipe(model: str, overrides: Sequence[str]) -> Recipe:
    values: dict[str, Any] = {
        "run": {"name": "train", "languages": ["en"]},
        "policy": {"model": model},
        **NO_PROMPTS,
        "arms": {ARM: {}},
    }
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key.partition(".")[0] not in SECTIONS and key != "run.seed":
            raise UserError(f"--set {override}: expected a key of {', '.join(SECTIONS)}, or run.seed")
        if key == "policy.model":
            raise UserError(f"--set {override}: expected --model")
        apply_override(values, override)
    return from_dict(values, "croco train")


def _is_scored(sources: Iterable[Path]) -> bool:
    """Whether the first row has a list of completions instead of a chosen and a rejected one."""
    first = next((row for source in sources for _, row in file_rows(source)), None)
    return isinstance(first, Mapping) and "chosen" not in first and "completions" in first


def _card(
    recipe: Recipe, identities: Mapping[str, str], codes: Sequence[str], made: Sequence[Record], license: str
) -> str:
    """The card; `made` are the records of the pairs and of the training."""
    hub, base = base_name(recipe.policy.model, recipe.policy.revision)
    facts, training = made[-1]["facts"], recipe.arms[ARM].training
    left_out = sum(record["counts"]["dropped"].get("pair", 0) for record in made)
    last = facts["metrics"].get("validation", facts["metrics"]["train"])
    made_from = [
        ("policy", base),
        *((f"pairs: {name}", identity) for name, identity in identities.items()),
        ("pairs trained on, held out", f"{facts['pairs']:,}, {facts['validation_pairs']:,}"),
        ("pairs left out", f"{left_out:,}"),
        ("steps, step of these weights", f"{facts['steps']:,}, {facts['adapter_step']:,}"),
        ("stopped early", facts["stopped"] or "no"),
    ]
    return model_card(
        title=f"Tuned on {', '.join(identities)}",
        base=hub,
        languages=[code for code in codes if code != "und"],
        license=license,
        tables={
            "What it was made from": made_from,
            "How it was tuned": settings_rows(training.model_dump(mode="json")),
            "Last metrics": [(name, f"{value:.4g}") for name, value in last.items()],
        },
        library="transformers" if training.full else "peft",
    )
