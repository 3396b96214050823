"""The stage `evaluate`: what an arm's policy answers to test prompts, and how each answer is judged.

Every arm answers the same prompts with the same seeds, which are not those of the tuning samples, so arms differ by
their weights alone and can be compared prompt by prompt. First all completions are drawn, then they are judged: policy
and reward model need not fit in memory together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from croco.languages import identify_completions, language_mode
from croco.models.open import open_sampler
from croco.models.protocols import Decoding
from croco.pipeline.compute import compute
from croco.pipeline.stage import Task, Work
from croco.pipeline.workers import Advance, ShardResult
from croco.stages.sample import sample_shards
from croco.stages.score.policy_logprobs import grouped, messages_of, open_likelihood, score_likelihood
from croco.stages.score.reward import ScoreShard, open_reward
from croco.stages.score.score import check_finite
from croco.storage.schemas import ledger
from croco.storage.seeds import digest
from croco.storage.shards import read_parquet, read_table

PROMPT = ("prompt_id", "language")
REWARD_BENCHMARK = "reward"
# of each completion: its benchmark, its mode, and its value or the reason why there is none
Judgement = tuple[Sequence[str], Sequence[str], Sequence[float | str]]


@dataclass(frozen=True)
class Batch:
    """One shard of the evaluation: some prompts at one temperature."""

    index: int
    temperature: float
    samples: int
    prompts: pl.DataFrame


def evaluate(work: Work) -> None:
    """Write the verdicts of `work.arm`: every test prompt, at every temperature, answered and judged."""
    work.scratch()
    sizes = [batch.prompts.height * batch.samples for batch in batches_of(work.task)]
    compute(
        work, partial(DrawWorker, work.task), sizes, "completion", drafts=partial(draft_path, work.folder)
    )
    if work.settings.get("kl") and "kl" not in work.record_file.get("facts", {}):
        work.record(kl=divergence(work.task))
    here = work.settings["reward"] is None
    judge = partial(JudgeWorker, work.task)
    compute(work, judge, sizes, "completion", role="score", under="judge", here=here)


def draft_path(folder: Path, index: int) -> Path:
    return folder / "scratch" / f"drawn-{index:05d}.parquet"


def batches_of(task: Task) -> list[Batch]:
    """The shards of an arm's evaluation, in the order of their numbers."""
    settings, prompts = task.settings, read_table(task.inputs["eval-prompts"])
    temperatures = sorted(settings["temperatures"])
    return plan_batches(prompts, temperatures, settings["samples"], task.runtime.shard_prompts)


def plan_batches(
    prompts: pl.DataFrame, temperatures: Sequence[float], samples: int, shard_prompts: int
) -> list[Batch]:
    """Shards of `shard_prompts` parallel prompts in all their languages, temperature by temperature; greedy needs one
    sample."""
    names = prompts["prompt_id"].unique(maintain_order=True)
    blocks = [
        prompts.filter(pl.col("prompt_id").is_in(names[start : start + shard_prompts].implode()))
        for start in range(0, len(names), shard_prompts)
    ]
    settings = [(t, block) for t in temperatures for block in blocks]
    return [Batch(i, t, samples if t > 0 else 1, block) for i, (t, block) in enumerate(settings)]


def evaluation_seed(run_seed: int) -> int:
    """The run seed of evaluated completions: the same for every arm and temperature, and not that of the tuning
    samples."""
    return digest("evaluation", run_seed)


class DrawWorker:
    """Answers the prompts of shards: drafts, which are not judged yet, with a reason where there is no completion."""

    def __init__(self, task: Task, replica: int) -> None:
        self.settings, self.policy, self.batches = task.settings, task.settings["policy"], batches_of(task)
        self.sampler, self.tokenizer = open_sampler(
            "evaluate", self.policy, task.runtime, task.engine_seed, replica, task.adapter
        )
        self.facts = self.sampler.facts

    def shards(self, indices: Sequence[int], advance: Advance) -> Iterator[ShardResult]:
        """Temperature by temperature, the shards of each in one stream."""
        asked = [self.batches[index] for index in indices]
        for temperature in sorted({batch.temperature for batch in asked}):
            same = [batch for batch in asked if batch.temperature == temperature]
            for index, table, dropped in sample_shards(
                self.sampler,
                self.tokenizer,
                {batch.index: batch.prompts.to_dicts() for batch in same},
                Decoding(temperature, top_p=1.0, top_k=0, max_new_tokens=self.settings["max_new_tokens"]),
                num_completions=same[0].samples,
                run_seed=evaluation_seed(self.settings["seed"]),
                instructions=self.policy.instruction,
                every=lambda: chain.from_iterable(
                    batch.prompts.iter_rows(named=True) for batch in self.batches
                ),
                on_prompt=partial(advance, same[0].samples),
            ):
                tokens = sum(table["completion_tokens"].to_pylist())
                # in the same file, the rows of those that were not drawn, each with its reason
                parts = [
                    pl.DataFrame(pl.from_arrow(part)) for part in (table, dropped.drop_columns(["unit"]))
                ]
                draft = pl.concat(parts, how="diagonal").to_arrow()
                yield ShardResult(index, draft, dropped, {}, {"tokens": tokens})


def divergence(task: Task) -> dict[str, float]:
    """KL of an arm from the base in every language, nats per completion: the mean of log(arm / base) over its own
    completions at temperature 1, in this process."""
    policy, batches = task.settings["policy"], batches_of(task)
    drawn = pl.concat(
        [read_parquet(draft_path(task.folder, batch.index)) for batch in batches if batch.temperature == 1]
    )
    drawn = drawn.filter(pl.col("reason").is_null())
    groups = grouped(drawn, messages_of(read_table(task.inputs["eval-prompts"])))
    logps = [  # one policy in memory at a time
        score_likelihood(*open_likelihood(policy, task.runtime, False, weights), groups, policy.instruction)
        for weights in (task.adapter, None)
    ]
    ratios: dict[str, list[float]] = {}
    for (_, rows), tuned, base in zip(groups, *logps, strict=True):
        both = [
            a - b
            for a, b in zip(tuned, base, strict=True)
            if not isinstance(a, str) and not isinstance(b, str)
        ]
        ratios.setdefault(rows[0]["language"], []).extend(both)
    return {language: sum(of) / len(of) for language, of in ratios.items() if of}


class JudgeWorker:
    """Judges drafts: by the reward model (its score is the value; the mode says whether the language is the prompt's),
    or without one by the lab's program."""

    def __init__(self, task: Task, replica: int) -> None:
        self.arm, self.batches, self.folder = str(task.arm), batches_of(task), task.folder
        prompts = pl.concat([batch.prompts.select("language") for batch in self.batches])
        self.languages = prompts["language"].unique().sort().to_list()
        self.facts: dict[str, Any] = {}
        self.judge, reward = _judge_lab, task.settings["reward"]
        if reward is not None:
            score, self.facts = open_reward(reward, task.runtime, replica)
            self.judge = partial(_judge_by_reward, score, reward.name)

    def shards(self, indices: Sequence[int], advance: Advance) -> Iterator[ShardResult]:
        """Shard by shard, each as it was drawn."""
        for index in indices:
            batch = self.batches[index]
            drawn = read_parquet(draft_path(self.folder, index))
            answered = drawn.filter(pl.col("reason").is_null())
            missing = drawn.filter(pl.col("reason").is_not_null())
            spoken = identify_completions(answered["completion"], self.languages, answered["language"])
            answered = answered.with_columns(found_language=pl.Series(spoken, dtype=pl.String))
            table, dropped = tabulate(self.arm, batch, answered, missing, *self.judge(batch, answered))
            size = batch.prompts.height * batch.samples
            advance(size)
            yield ShardResult(index, table, dropped, {"completion": size}, {"completions": answered.height})


def _judge_lab(batch: Batch, answered: pl.DataFrame) -> Judgement:
    from croco.lab import judge

    modes, values = judge.judge(
        *(answered[name].to_list() for name in ("prompt_id", "language", "completion"))
    )
    domains = {row[0]: row[1] for row in batch.prompts.select("prompt_id", "domain").iter_rows()}
    return [judge.benchmark(domains[prompt_id]) for prompt_id in answered["prompt_id"]], modes, values


def _judge_by_reward(score: ScoreShard, name: str, batch: Batch, answered: pl.DataFrame) -> Judgement:
    """Verdicts of the reward model; a reason in place of a score where there is none."""
    modes = [
        language_mode(identified, language)
        for identified, language in answered.select("found_language", "language").iter_rows()
    ]
    values = list(chain.from_iterable(score(grouped(answered, messages_of(batch.prompts)))))
    for key, value in zip(answered.select(*PROMPT, "sample_id").iter_rows(), values, strict=True):
        if not isinstance(value, str):
            check_finite(value, key, name)
    return [REWARD_BENCHMARK] * answered.height, modes, values


def tabulate(
    arm: str,
    batch: Batch,
    answered: pl.DataFrame,
    missing: pl.DataFrame,
    benchmarks: Sequence[str],
    modes: Sequence[str],
    values: Sequence[float | str],
) -> tuple[pa.Table, pa.Table]:
    """One shard of verdicts and its ledger: what was not drawn (`missing`), and what got a reason for a value."""
    columns = (*PROMPT, "sample_id", "completion", "finish_reason", "found_language")
    table = answered.select(columns).with_columns(
        arm=pl.lit(arm, pl.String),
        temperature=pl.lit(batch.temperature, pl.Float64),
        benchmark=pl.Series(benchmarks, dtype=pl.String),
        mode=pl.Series(modes, dtype=pl.String),
        value=pl.Series([None if isinstance(value, str) else value for value in values], dtype=pl.Float64),
    )
    key = answered.select(*PROMPT, "sample_id").iter_rows()
    drops = [
        ("completion", *row, value) for row, value in zip(key, values, strict=True) if isinstance(value, str)
    ]
    drops += [("completion", *row) for row in missing.select(*PROMPT, "sample_id", "reason").iter_rows()]
    return table.filter(pl.col("value").is_not_null()).to_arrow(), ledger(drops)
