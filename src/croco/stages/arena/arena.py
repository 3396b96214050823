"""The stages `arena-sample` and `arena`: an arm's completions against the base's, before a judge.

Every comparison is judged twice, each completion once in the first place, so a judge's preference for a place is
measured and cancels; or once, in an order that a digest of its prompt decides. Verdicts that do not agree are a tie,
and so is the same text twice, without asking. A comparison without a verdict in an order goes to the ledger."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pyarrow as pa

from croco.config.models import Judge
from croco.config.runtime import Runtime
from croco.errors import UserError
from croco.languages import identify_completions
from croco.models.open import open_judge
from croco.models.protocols import Judged, JudgeRequest
from croco.pipeline.compute import compute
from croco.pipeline.stage import Task, Work
from croco.pipeline.workers import Advance, ShardResult, shard_sizes
from croco.stages.arena import judge_prompt
from croco.stages.evaluate.evaluate import evaluation_seed
from croco.stages.evaluate.results import BASE
from croco.stages.sample import SampleWorker
from croco.storage.schemas import COMPARISONS, Drop, ledger
from croco.storage.seeds import digest
from croco.storage.shards import merge_ledgers, read_dropped, read_table

KEY = ["prompt_id", "language"]
ABSENT = "no completion"
HOPELESS = 64  # judgements without a single verdict, after which a judge is not asked any more
Match = dict[str, Any]  # a prompt with the completions of both
# (key, match, whether the arm's completion is first) -> (key, judgement) as they come; a reason where there is none
Question = tuple[int, Match, bool]
Judgements = Mapping[tuple[int, bool], Judged | str]  # by a match's place in its shard, and the order
Ask = Callable[[Sequence[Question]], Iterator[tuple[int, Judged | str]]]


# Completions, where `evaluate` has not drawn them already --------------------------------------------------------


def sample(work: Work) -> None:
    """Write completions of `work.arm` to the arena's prompts, with the same seeds in every arm."""
    drawn = {"temperature": work.settings.get("temperature", 0.0), "top_p": 1.0, "top_k": 0, "stop": ()}
    drawn |= {"completions": 1, "max_new_tokens": work.settings["max_new_tokens"]}
    task = replace(work.task, settings=work.settings | {"sampling": drawn, "seed": evaluation_seed(0)})
    sizes = shard_sizes(arena_prompts(task).height, work.runtime.shard_prompts)
    worker = partial(SampleWorker, "evaluate", arena_prompts, task)
    compute(work, worker, sizes, "completion", role="evaluate")


def arena_prompts(task: Task) -> pl.DataFrame:
    """The prompts that are compared on: in the arena's languages, at most `arena.limit` of each."""
    prompts = read_table(task.inputs.get("arena-prompts") or task.inputs["eval-prompts"])
    prompts = prompts.filter(pl.col("language").is_in(list(task.settings["languages"])))
    first = prompts["prompt_id"].unique(maintain_order=True)[: task.settings["limit"]]
    return prompts.filter(pl.col("prompt_id").is_in(first.implode())).sort(KEY)


# Comparisons -----------------------------------------------------------------------------------------------------


def arena(work: Work) -> None:
    """Write the comparisons of `work.arm` with the base."""
    sizes = shard_sizes(matches(work.task).height, work.runtime.shard_prompts)
    here = work.settings["judge"] == "lab"
    compute(work, partial(ArenaWorker, work.task), sizes, "comparison", role="judge", here=here)
    facts = account(work.folder)
    work.record(**facts)
    unjudged = {reason: count for reason, count in facts["without_verdict"].items() if reason != ABSENT}
    if unjudged and facts["comparisons"] == facts["same_text"]:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in sorted(unjudged.items()))
        raise UserError(
            f"{work.title}: no comparison got two verdicts ({reasons}); the ledger in {work.folder} says more"
        )


def account(folder: Path) -> dict[str, Any]:
    """How the comparisons of a stage came out, and what became of the others."""
    merge_ledgers(folder)
    table, reasons = read_table(folder), read_dropped(folder)["reason"].str.split(": ").list.first()
    asked = table.filter(pl.any_horizontal(pl.col("^judgement_.*$").is_not_null()))
    return {
        "comparisons": table.height,
        "same_text": table.height - asked.height,
        "inconsistent": asked.filter(pl.col("verdict_arm_first") != pl.col("verdict_base_first")).height,
        "without_verdict": dict(Counter(reasons)),
    }


def matches(task: Task) -> pl.DataFrame:
    """Prompts with the completions of the arm and of the base, in key order; null where there is none."""
    table = arena_prompts(task).select(*KEY, "domain", "messages")
    for column, side in (("completion", ""), ("base_completion", f"/{BASE}")):
        table = table.join(greedy(task.inputs, side).rename({"completion": column}), on=KEY, how="left")
    return table.sort(KEY)


def greedy(inputs: Mapping[str, Path], side: str) -> pl.DataFrame:
    """Greedy completions by key, from `arena-sample` or from the verdicts of `evaluate`."""
    drawn = inputs.get(f"arena-sample{side}")
    if drawn is not None:
        return read_table(drawn, [*KEY, "completion"])
    columns = [*KEY, "completion", "temperature", "sample_id"]
    table = read_table(inputs[f"evaluate{side}"], columns)
    return table.filter((pl.col("temperature") == 0) & (pl.col("sample_id") == 0)).select(columns[:3])


class ArenaWorker:
    """Has shards of comparisons judged."""

    def __init__(self, task: Task, replica: int) -> None:
        self.languages, self.orders = task.settings["evaluated"], task.settings.get("orders", "both")
        self.arm, self.size, self.matches = str(task.arm), task.runtime.shard_prompts, matches(task)
        self.name, self.ask, self.facts = open_asker(task.settings["judge"], task.runtime, replica)
        self.heard = self.understood = 0

    def shards(self, indices: Sequence[int], advance: Advance) -> Iterator[ShardResult]:
        """Several shards in one stream, each written when its last judgement is there."""
        rows = {index: self.matches.slice(index * self.size, self.size).to_dicts() for index in indices}
        questions: list[Question] = []
        owners: list[tuple[int, int, bool]] = []
        judgements: dict[int, dict[tuple[int, bool], Judged | str]] = {index: {} for index in indices}
        left = Counter[int]()
        for index, part in rows.items():
            for place, match in enumerate(part):
                for arm_first in orders_of(match, self.orders) if is_asked(match) else ():
                    questions.append((len(questions), match, arm_first))
                    owners.append((index, place, arm_first))
                    left[index] += 1
        for index in [index for index in indices if not left[index]]:
            yield self._finish(index, rows[index], {}, advance)
        for key, judged in self.ask(questions):
            index, place, arm_first = owners[key]
            self._listen(judged, arm_first)
            judgements[index][place, arm_first] = judged
            left[index] -= 1
            if not left[index]:
                yield self._finish(index, rows[index], judgements.pop(index), advance)

    def _listen(self, judged: Judged | str, arm_first: bool) -> None:
        """Stop before a judge that never says a verdict has cost a whole run."""
        reading = judge_prompt.read(judged, arm_first)
        self.heard, self.understood = self.heard + 1, self.understood + (reading.verdict is not None)
        if self.heard == HOPELESS and not self.understood:
            raise UserError(
                f"the judge {self.name} gave no verdict in its first {HOPELESS} judgements, expected a last line "
                f"such as 'Verdict: 1' or '[[1]]' ({reading.reason})"
            )

    def _finish(self, index: int, rows: list[Match], judgements: Judgements, advance: Advance) -> ShardResult:
        table, dropped = tabulate(self.arm, self.name, rows, judgements, self.languages, self.orders)
        judged = [one for one in judgements.values() if not isinstance(one, str)]
        sums = {
            "judgements": len(judged),
            "judge_prompt_tokens": sum(one.prompt_tokens for one in judged),
            "judge_completion_tokens": sum(one.completion_tokens for one in judged),
        }
        advance(len(rows))
        return ShardResult(index, table, dropped, {"comparison": len(rows)}, sums)


def is_asked(match: Match) -> bool:
    """Whether a judge has anything to decide: two completions that are not the same."""
    tuned, base = match["completion"], match["base_completion"]
    return tuned is not None and base is not None and tuned != base


def orders_of(match: Match, orders: str) -> tuple[bool, ...]:
    """Whether the arm's completion is shown first, for each time that a comparison is judged."""
    both = (True, False)
    return both if orders == "both" else both[:1] if digest("order", *map(match.get, KEY)) % 2 else both[1:]


def open_asker(
    judge: Judge | Literal["lab"], runtime: Runtime, replica: int
) -> tuple[str, Ask, dict[str, Any]]:
    """The judge's name, the function that asks it, and what `stage.json` records."""
    if judge == "lab":
        return "lab", ask_lab, {"engine": "lab"}
    opened = open_judge(judge, runtime, replica=replica)

    def ask(questions: Sequence[Question]) -> Iterator[tuple[int, Judged | str]]:
        requests = []
        for key, match, arm_first in questions:
            both = shown(match, arm_first)
            text = judge_prompt.question(match["messages"], match["language"], *both, judge.labels)
            requests.append(JudgeRequest(key, ({"role": "user", "content": text},)))
        yield from opened.judge(requests, judge.max_new_tokens)

    return opened.name, ask, opened.facts


def ask_lab(questions: Sequence[Question]) -> Iterator[tuple[int, Judged | str]]:
    """The lab's judge, which checks by program."""
    from croco.lab import judge

    for key, match, arm_first in questions:
        text = judge.compare(match["prompt_id"], match["language"], *shown(match, arm_first))
        yield key, Judged(text, "stop", prompt_tokens=0, completion_tokens=0)


def shown(match: Match, arm_first: bool) -> tuple[str, str]:
    """The two completions in the order that the judge sees them in."""
    tuned, base = match["completion"], match["base_completion"]
    return (tuned, base) if arm_first else (base, tuned)


def tabulate(
    arm: str,
    judge: str,
    rows: Sequence[Match],
    judgements: Judgements,
    evaluated: Sequence[str],
    orders: str = "both",
) -> tuple[pa.Table, pa.Table]:
    """One shard of comparisons and its ledger; `judgements` are by place and order."""
    kept: list[dict[str, Any]] = []
    drops: list[Drop] = []
    for place, match in enumerate(rows):
        missing = [
            name
            for name, text in ((arm, match["completion"]), (BASE, match["base_completion"]))
            if text is None
        ]
        given = {arm_first: judgements.get((place, arm_first)) for arm_first in orders_of(match, orders)}
        reads = {
            arm_first: judge_prompt.Reading(judge_prompt.TIE)
            if one is None
            else judge_prompt.read(one, arm_first)
            for arm_first, one in given.items()
        }
        reason = next((reading.reason for reading in reads.values() if reading.verdict is None), None)
        if missing:
            reason = f"{ABSENT}: of {' and '.join(missing)}"
        if reason is not None:
            drops.append(("comparison", match["prompt_id"], match["language"], None, reason))
            continue
        verdicts = {arm_first: str(reading.verdict) for arm_first, reading in reads.items()}
        judged = {arm_first: one for arm_first, one in given.items() if isinstance(one, Judged)}
        texts = {arm_first: one.text for arm_first, one in judged.items()}
        kept.append(
            {name: match[name] for name in (*KEY, "domain", "completion", "base_completion")}
            | {
                "arm": arm,
                "verdict_arm_first": verdicts.get(True),
                "verdict_base_first": verdicts.get(False),
                "value": judge_prompt.value_of([*verdicts.values()]),
                "judgement_arm_first": texts.get(True),
                "judgement_base_first": texts.get(False),
                "judge": judge,
                "judge_prompt_tokens": sum(one.prompt_tokens for one in judged.values()),
                "judge_completion_tokens": sum(one.completion_tokens for one in judged.values()),
            }
        )
    for column, text in (("found_language", "completion"), ("base_found_language", "base_completion")):
        spoken = identify_completions((r[text] for r in kept), evaluated, (r["language"] for r in kept))
        for row, language in zip(kept, spoken, strict=True):
            row[column] = language
    return pa.Table.from_pylist(kept, schema=COMPARISONS.schema), ledger(drops)
