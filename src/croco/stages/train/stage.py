"""The stage `train`: an arm's pairs into weights, in one process or several."""

import sys
from contextlib import ExitStack

from croco.config.load import load
from croco.config.training import Training
from croco.errors import notice
from croco.pipeline.progress import Progress
from croco.pipeline.stage import Work
from croco.stages.train.launch import TrainJob, tune
from croco.stages.train.model_card import policy_card
from croco.stages.train.setup import check_pairs
from croco.storage import files, shards
from croco.storage.schemas import DROPPED


def train(work: Work) -> None:
    """The stage: an arm's pairs into weights and `metrics.jsonl`; pairs left out go to the ledger."""
    check_pairs(work.inputs["pair"])
    job = TrainJob(
        policy=work.settings["policy"],
        runtime=work.runtime,
        training=Training.model_validate(work.settings["training"]),
        folder=work.folder,
        pairs=work.inputs["pair"],
        title=work.title,
        seed=work.settings["seed"],
        limit=work.settings.get("limit"),
        start=work.inputs["train"] / "adapter" if "train" in work.inputs else None,
        reference=work.settings.get("reference", "base"),
        reference_folder=work.folder.parents[1] / "reference" if work.arm else None,  # of every arm
    )
    with ExitStack() as stack:
        bars: list[Progress] = []

        def advance(step: int, num_steps: int) -> None:
            if not bars:
                bars.append(stack.enter_context(work.progress(num_steps, "step", done=step - 1)))
            bars[0].advance()

        result = tune(job, advance)
    work.account(
        read={"pair": min(sum(shard.rows for shard in shards.shards(job.pairs)), job.limit or sys.maxsize)},
        written={"pair": result.pairs + result.validation_pairs},
        dropped=result.dropped.to_arrow().cast(DROPPED.schema),
    )
    facts = {name: value for name, value in vars(result).items() if name not in ("adapter", "dropped")}
    facts["seconds"] = round(result.seconds, 1)
    if work.arm and result.adapter.name == "adapter":
        run = work.folder.parents[1]
        # like the report, the card changes nothing and reads what the run's folder says of itself
        recipe = load(run / "recipe.json", [f'run.folder="{run}"'])
        card = policy_card(recipe, work.arm, work.settings["training"], facts, "unknown", library="peft")
        files.write_text(result.adapter / "README.md", card)
    work.record(**facts)
    if result.stopped:
        step = result.adapter_step
        notice(f"{work.title}: {result.stopped}; the run goes on with the checkpoint of step {step}")
