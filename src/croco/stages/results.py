"""The stage `results`: one table over all arms, of the evaluation, the structured tasks and the arena."""

import polars as pl

from croco.pipeline.stage import Work
from croco.stages.arena.results import arena_rows, compared_in_all_arms
from croco.stages.euroeval.results_file import in_all_arms
from croco.stages.evaluate.results import BASE, language_groups, on_common_prompts, summarise
from croco.storage.records import read_record
from croco.storage.schemas import RESULTS, VERDICTS
from croco.storage.shards import read_table, shards


def results(work: Work) -> None:
    """Write the results table over all arms: shares or scores, mode shares, and differences from the base."""
    settings = work.settings
    arms = [name.removeprefix("evaluate/") for name in work.inputs if name.startswith("evaluate/")]
    columns = [name for name in VERDICTS.schema.names if name not in ("completion", "finish_reason")]
    todo = work.todo(1)
    if todo:
        verdicts = pl.concat([read_table(work.inputs[f"evaluate/{arm}"], columns) for arm in arms])
        groups = language_groups(
            settings["languages"], settings["low_resource_languages"], settings["held_out_languages"]
        )
        judged = set(verdicts.select("arm", "temperature").unique().rows())
        settings_of = {
            arm: read_record(work.inputs[f"evaluate/{arm}"])["science"]["settings"] for arm in arms
        }
        evaluated = [(arm, float(t)) for arm in arms for t in settings_of[arm]["temperatures"]]
        verdicts = on_common_prompts(verdicts)
        asked = sum(shard.rows for shard in shards(work.inputs["eval-prompts"]))
        work.record(
            prompts_left_out=asked - verdicts.select("prompt_id", "language").n_unique(),
            without_verdict=[one for one in evaluated if one not in judged],
        )
        table = summarise(verdicts, groups, settings["seed"], settings["bootstrap"])
        if f"euroeval/{BASE}" in work.inputs:
            tables = [read_table(work.inputs[f"euroeval/{arm}"]) for arm in arms]
            tasks, left_out = in_all_arms(pl.concat(tables), len(arms))
            work.record(datasets_left_out=left_out)
            table = pl.concat([table, tasks.select(table.columns)], how="vertical_relaxed")
        if any(name.startswith("arena/") for name in work.inputs):
            compared = pl.concat([read_table(work.inputs[f"arena/{arm}"]) for arm in arms[1:]])
            compared, num_left_out = compared_in_all_arms(compared, arms[1:])
            work.record(comparisons_left_out=num_left_out)
            temperature = settings.get("arena_temperature", 0.0)
            rows = arena_rows(compared, groups, settings["seed"], settings["bootstrap"], temperature)
            table = pl.concat([table, rows.select(table.columns)], how="vertical_relaxed")
        work.write(0, table.to_arrow().select(RESULTS.schema.names))
