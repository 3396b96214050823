"""The stage `score`: a number for every completion, by the reward or by one of the controls.

"reward" is in `reward.py`. Controls: "likelihood" and "likelihood-sum" (`policy_logprobs.py`), "random" (a normal
number from the run's seed and the completion's key), "verified" (the lab's program). Methods to compare with:
"implicit" and "alignment" (`alignment.py`). A shard of scores has the rows of a shard of completions,
or the first ones of each prompt. A completion that does not fit the model goes to the ledger; a score that is not
finite stops the stage, because it would change the mean of its pool."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from croco.config.arms import Alignment
from croco.config.runtime import Runtime
from croco.errors import UserError
from croco.pipeline.compute import compute
from croco.pipeline.node import Settings
from croco.pipeline.stage import Task, Work
from croco.pipeline.workers import Advance, ShardResult
from croco.stages.score.policy_logprobs import (
    Completion,
    Groups,
    Messages,
    Scored,
    grouped,
    messages_of,
    open_likelihood,
    score_implicit,
    score_likelihood,
)
from croco.stages.score.reward import ScoreShard, open_reward
from croco.storage.schemas import REFERENCE, SCORES, ledger
from croco.storage.seeds import digest
from croco.storage.shards import read_arrow, read_table, shard_path, shards

COLUMNS = ["prompt_id", "language", "sample_id", "completion", "completion_ids", "finish_reason"]


def score(work: Work) -> None:
    """Write the scores table, a shard per shard of completions."""
    sizes = [shard.rows for shard in shards(work.inputs["sample"])]
    here = work.settings["scorer"] in ("random", "verified")
    compute(work, partial(ScoreWorker, work.task), sizes, "completion", here=here)


class ScoreWorker:
    """Scores shards of completions with one scorer."""

    def __init__(self, task: Task, replica: int) -> None:
        settings = task.settings
        self.samples, self.first = task.inputs["sample"], settings.get("completions")
        self.prompts = messages_of(read_table(task.inputs["prompts"], ["prompt_id", "language", "messages"]))
        if settings["scorer"] == "implicit":
            made = _implicit(settings, task.runtime, task.adapter, self.prompts)
        elif settings["scorer"] == "alignment":
            made = _alignment(settings["alignment"], task.runtime, self.samples)
        else:
            made = _scorer(settings, task.runtime, replica)
        self.name, self.score_shard, self.facts = made

    def shards(self, indices: Sequence[int], advance: Advance) -> Iterator[ShardResult]:
        for index in indices:
            rows = read_arrow(shard_path(self.samples, index), COLUMNS)
            if self.first is not None:
                rows = rows.filter(pc.field("sample_id") < self.first)
            groups = grouped(pl.DataFrame(pl.from_arrow(rows)), self.prompts)
            scored = self.score_shard(groups)
            table, dropped = tabulate([group for _, group in groups], scored, self.name)
            advance(rows.num_rows)
            counts = {"completion": rows.num_rows}
            yield ShardResult(index, table, dropped, counts, {"completions": rows.num_rows})


def score_references(work: Work) -> None:
    """Write the scores of the prompts' gold completions by the reward model, under the sample_id -1."""
    sizes = [shard.rows for shard in shards(work.inputs["prompts"])]
    compute(work, partial(ReferenceWorker, work.task), sizes, "prompt", role="score")


class ReferenceWorker:
    """Scores gold completions, a shard per shard of prompts; a prompt without one goes to the ledger."""

    def __init__(self, task: Task, replica: int) -> None:
        reward = task.settings["reward"]
        self.prompts, self.name = task.inputs["prompts"], reward.name
        self.score_shard, self.facts = open_reward(reward, task.runtime, replica)

    def shards(self, indices: Sequence[int], advance: Advance) -> Iterator[ShardResult]:
        for index in indices:
            columns = ["prompt_id", "language", "messages", "reference"]
            prompts = read_arrow(shard_path(self.prompts, index), columns).to_pylist()
            gold = [row for row in prompts if row["reference"] and row["reference"].strip()]
            groups = [
                (row["messages"], [{**row, "sample_id": REFERENCE, "completion": row["reference"]}])
                for row in gold
            ]
            table, dropped = tabulate([rows for _, rows in groups], self.score_shard(groups), self.name)
            without = [
                ("prompt", row["prompt_id"], row["language"], None, "the prompt has no gold completion")
                for row in prompts
                if row not in gold
            ]
            # a gold completion that is too long leaves its prompt without one
            drops = [("prompt", *row[1:]) for row in zip(*dropped.to_pydict().values(), strict=True)]
            advance(len(prompts))
            yield ShardResult(index, table, ledger([*without, *drops]), {"prompt": len(prompts)})


def tabulate(
    groups: Sequence[Sequence[Completion]], scored: Sequence[Scored], scorer: str
) -> tuple[pa.Table, pa.Table]:
    """The scores table and the ledger of completions, each with its score or the reason why it has none. Raises
    UserError naming the first completion whose score is not finite."""
    kept, drops = [], []
    for group, values in zip(groups, scored, strict=True):
        for row, value in zip(group, values, strict=True):
            key = (row["prompt_id"], row["language"], row["sample_id"])
            if isinstance(value, str):
                drops.append(("completion", *key, value))
            else:
                check_finite(value, key, scorer)
                kept.append((*key, float(value), scorer, getattr(value, "parts", None)))
    columns = list(zip(*kept, strict=True)) if kept else [()] * len(SCORES.schema)
    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, SCORES.schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SCORES.schema), ledger(drops)


def check_finite(value: float, key: tuple[str, str, int], scorer: str) -> None:
    """Raise UserError naming the completion whose score is no number: it would poison every mean it enters."""
    if not math.isfinite(value):
        raise UserError(
            f"completion {key[2]} of prompt {key[0]!r} in {key[1]}: {scorer} gave the score {value}, "
            f"expected a finite number"
        )


def _scorer(settings: Settings, runtime: Runtime, replica: int) -> tuple[str, ScoreShard, dict[str, Any]]:
    """The scorer's name in the table, the function that scores a shard, and what `stage.json` records."""
    kind = settings["scorer"]
    if kind == "reward":
        return settings["reward"].name, *open_reward(settings["reward"], runtime, replica)
    if kind in ("likelihood", "likelihood-sum"):
        policy = settings["policy"]
        own, tokenizer = open_likelihood(policy, runtime, mean=kind == "likelihood")
        score = partial(score_likelihood, own, tokenizer, instructions=policy.instruction)
        return f"{kind} of {policy.model}", score, own.facts
    if kind == "verified":
        name, one = "the lab's program", verified_score
    else:
        name, one = "random", partial(random_score, settings["seed"])
    return name, lambda groups: [[one(row) for row in rows] for _, rows in groups], {}


def _implicit(
    settings: Settings, runtime: Runtime, adapter: Path | None, prompts: Mapping[tuple[str, str], Messages]
) -> tuple[str, ScoreShard, dict[str, Any]]:
    policy = settings["policy"]
    dpo, tokenizer = open_likelihood(policy, runtime, False, adapter)
    before, _ = open_likelihood(policy, runtime, False)
    score = partial(
        score_implicit, dpo, before, tokenizer, prompts=prompts, instruction=settings["instruction"]
    )
    return f"implicit reward of {policy.model}", score, dpo.facts


def _alignment(section: Alignment, runtime: Runtime, samples: Path) -> tuple[str, ScoreShard, dict[str, Any]]:
    from croco.models.loading import load_translator
    from croco.stages.score.alignment import Translator, english_completions, score_alignment

    model, tokenizer = load_translator(
        section.model, section.revision, section.dtype, runtime.device, section.trust_remote_code
    )
    translator = Translator(model, tokenizer, section.codes, runtime.token_budget, section.model)

    def score_shard(groups: Groups) -> list[Scored]:
        names = sorted({rows[0]["prompt_id"] for _, rows in groups})
        english = english_completions(samples, names, section.targets)
        return score_alignment(translator, groups, english, section.max_tokens)

    return f"alignment by {section.model}", score_shard, translator.facts


def verified_score(row: Completion) -> float:
    """What the lab's program says: the quality where it grades, else 3 good, 0.5 half good, 0 neither."""
    from croco.lab import judge, list_verdicts

    verdict = judge.verify(row["prompt_id"], row["language"], row["completion"])
    if isinstance(verdict, list_verdicts.Verdict):
        return verdict.quality
    if verdict.good:
        return 3.0
    half = verdict.mode == "careful-wrong" or (verdict.correct and verdict.mode in ("terse", "rambling"))
    return 0.5 if half else 0.0


def random_score(seed: int, row: Completion) -> float:
    """A standard normal number from the run's seed and the completion's key."""
    uniform = digest("random score", seed, row["prompt_id"], row["language"], row["sample_id"]) / 2**63
    return NormalDist().inv_cdf(min(max(uniform, 2**-60), 1 - 2**-53))
