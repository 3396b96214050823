"""The stages `evaluate` and `results`: what an arm's policy answers to test prompts, and what that adds up
to.

Every arm answers the same prompts with the same seeds (common random numbers), which are not the seeds of the
tuning samples; so arms differ by their weights alone and can be compared prompt by prompt. First all
completions are drawn, then they are judged: policy and reward model need not fit in memory together. What
counts as good is `lab`'s or the reward model's business, statistics are `results`'.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from croco.engines import open_sampler, open_scorer, release
from croco.engines.base import Decoding
from croco.evaluation.fidelity import language_mode
from croco.evaluation.results import BASE, language_groups, on_common_prompts, summarise
from croco.records import COMPLETIONS, RESULTS, ledger
from croco.sampling.sample import sample_shards
from croco.sampling.seeds import digest
from croco.stage import Work
from croco.store import read_table, write_parquet

TOO_LONG = "prompt leaves no room for a completion"
PROMPT = ("prompt_id", "language")
REWARD_BENCHMARK = "reward"


@dataclass(frozen=True)
class Batch:
    """One shard of the evaluation: some prompts at one temperature."""

    index: int
    temperature: float
    samples: int
    prompts: pl.DataFrame


def evaluate(work: Work) -> None:
    """Write the verdicts of `work.arm`: every test prompt, at every temperature, answered and judged."""
    recipe, prompts = work.recipe, read_table(work.inputs["eval-prompts"])
    temperatures = sorted(work.settings["temperatures"])
    batches = plan_batches(prompts, temperatures, recipe.evaluation.samples, work.runtime.shard_prompts)
    todo = set(work.todo(len(batches)))
    drafts = {b.index: work.scratch() / f"draft-{b.index:05d}.parquet" for b in batches if b.index in todo}
    missing = [batch for batch in batches if batch.index in todo and not drafts[batch.index].exists()]
    if missing:
        _draw(work, missing, drafts)
    judge = _judge_lab if recipe.evaluation.source == "lab" else _judge_by_reward
    judge(work, [batch for batch in batches if batch.index in todo], drafts)


def plan_batches(
    prompts: pl.DataFrame, temperatures: Sequence[float], samples: int, shard_prompts: int
) -> list[Batch]:
    """Shards of `shard_prompts` parallel prompts in all their languages, temperature by temperature; greedy
    needs one sample.
    """
    names = prompts["prompt_id"].unique(maintain_order=True)
    blocks = [
        prompts.filter(pl.col("prompt_id").is_in(names[start : start + shard_prompts].implode()))
        for start in range(0, len(names), shard_prompts)
    ]
    settings = [(t, block) for t in temperatures for block in blocks]
    return [Batch(i, t, samples if t > 0 else 1, block) for i, (t, block) in enumerate(settings)]


def evaluation_seed(run_seed: int) -> int:
    """The run seed that evaluated completions are drawn with: the same for every arm and temperature, and not
    the tuning samples'.
    """
    return digest("evaluation", run_seed)


def _draw(work: Work, batches: Sequence[Batch], drafts: Mapping[int, Path]) -> None:
    """Answer the batches and keep each as a draft in the stage's scratch folder, whole or not at all."""
    adapter = None if work.arm == BASE else work.inputs["train"] / "adapter"
    sampler, tokenizer = open_sampler("evaluate", work.recipe, work.engine_seed, adapter=adapter)
    tokens, start = 0, time.monotonic()
    with work.progress(sum(batch.prompts.height for batch in batches), "prompt") as progress:
        for temperature in sorted({batch.temperature for batch in batches}):
            same = [batch for batch in batches if batch.temperature == temperature]
            for index, table, _ in sample_shards(
                sampler,
                tokenizer,
                {batch.index: batch.prompts.to_dicts() for batch in same},
                Decoding(
                    temperature, top_p=1.0, top_k=0, max_new_tokens=work.recipe.evaluation.max_new_tokens
                ),
                num_completions=same[0].samples,
                run_seed=evaluation_seed(work.seed),
                instructions=work.recipe.policy.instruction,
                on_prompt=progress.advance,
            ):
                write_parquet(drafts[index], table, COMPLETIONS.schema)
                tokens += sum(table.column("completion_tokens").to_pylist())
    seconds = time.monotonic() - start
    work.record(**sampler.facts, tokens=tokens, tokens_per_second=round(tokens / max(seconds, 1e-9), 1))
    release()


def _judge_lab(work: Work, batches: Sequence[Batch], drafts: Mapping[int, Path]) -> None:
    """Verdicts by the lab's program."""
    from croco.evaluation import lab

    for batch in batches:
        answered = _read(drafts[batch.index])
        modes, values = lab.judge(
            *(answered[name].to_list() for name in ("prompt_id", "language", "completion"))
        )
        domains = {row[0]: row[1] for row in batch.prompts.select("prompt_id", "domain").iter_rows()}
        benchmarks = [lab.benchmark(domains[prompt_id]) for prompt_id in answered["prompt_id"]]
        _write(work, batch, answered, benchmarks, modes, values)


def _judge_by_reward(work: Work, batches: Sequence[Batch], drafts: Mapping[int, Path]) -> None:
    """Verdicts of the reward model: the value is its score, the mode whether the language is the prompt's."""
    if not batches:
        return
    from croco.scoring.score import score_conversations

    scorer, tokenizer = open_scorer(work.recipe)
    with work.progress(len(batches), "shard") as progress:
        for batch in batches:
            answered = _read(drafts[batch.index])
            modes = [
                language_mode(completion, language, work.recipe.run.evaluated)
                for completion, language in answered.select("completion", "language").iter_rows()
            ]
            messages = {
                tuple(row[:2]): row[2] for row in batch.prompts.select(*PROMPT, "messages").iter_rows()
            }
            groups = [
                (messages[prompt_id, language], rows.to_dicts())
                for (prompt_id, language), rows in answered.group_by(PROMPT, maintain_order=True)
            ]
            scored = score_conversations(scorer, tokenizer, groups, work.recipe.reward.max_tokens)
            _write(
                work,
                batch,
                answered,
                [REWARD_BENCHMARK] * answered.height,
                modes,
                list(chain.from_iterable(scored)),
            )
            progress.advance()


def _read(draft: Path) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(pq.ParquetFile(draft).read()))


def _write(
    work: Work,
    batch: Batch,
    answered: pl.DataFrame,
    benchmarks: Sequence[str],
    modes: Sequence[str],
    values: Sequence[float | str],
) -> None:
    """One finished shard of verdicts; a reason in place of a value, and a prompt without completions, go to
    the ledger.
    """
    table = answered.select(*PROMPT, "sample_id", "completion", "finish_reason").with_columns(
        arm=pl.lit(work.arm, pl.String),
        temperature=pl.lit(batch.temperature, pl.Float64),
        benchmark=pl.Series(benchmarks, dtype=pl.String),
        mode=pl.Series(modes, dtype=pl.String),
        value=pl.Series([None if isinstance(value, str) else value for value in values], dtype=pl.Float64),
    )
    key = answered.select(*PROMPT, "sample_id").iter_rows()
    drops = [
        ("completion", *row, value) for row, value in zip(key, values, strict=True) if isinstance(value, str)
    ]
    silent = batch.prompts.join(answered, on=PROMPT, how="anti")
    drops += [
        ("completion", prompt_id, language, sample, TOO_LONG)
        for prompt_id, language in silent.select(*PROMPT).iter_rows()
        for sample in range(batch.samples)
    ]
    kept = table.filter(pl.col("value").is_not_null())
    read = {"completion": batch.prompts.height * batch.samples}
    work.write(batch.index, kept.to_arrow(), read=read, dropped=ledger(drops))


def results(work: Work) -> None:
    """Write the results table over all arms: shares or scores, mode shares, and differences from the base."""
    run = work.recipe.run
    arms = [BASE, *work.recipe.arms]
    columns = ["arm", "prompt_id", "language", "temperature", "sample_id", "benchmark", "mode", "value"]
    todo = work.todo(1)
    if todo:
        verdicts = pl.concat([read_table(work.inputs[f"evaluate/{arm}"], columns) for arm in arms])
        groups = language_groups(run.languages, run.low_resource_languages, run.held_out_languages)
        verdicts, num_left_out = on_common_prompts(verdicts)
        work.record(prompts_left_out=num_left_out)
        table = summarise(verdicts, groups, work.seed, work.recipe.evaluation.bootstrap)
        work.write(0, table.to_arrow().select(RESULTS.schema.names))
