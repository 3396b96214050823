"""The stages `arena-sample` and `arena`: an arm's greedy completions against the base's, before a judge.

Every comparison is judged twice, each completion once in the first place, so a judge's preference for a place is
measured and cancels. Verdicts that do not agree are a tie, and so is the same text twice, without asking. A comparison
without a verdict in one of the orders goes to the ledger."""

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
from croco.storage.schemas import COMPARISONS, ledger
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
    """Write greedy completions of `work.arm` to the arena's prompts."""
    greedy = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "stop": (), "completions": 1}
    greedy["max_new_tokens"] = work.settings["max_new_tokens"]
    # no seed makes another completion
    task = replace(work.task, settings=work.settings | {"sampling": greedy, "seed": evaluation_seed(0)})
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
    asked = table.filter(pl.col("judgement_arm_first").is_not_null())
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
        self.languages, self.matches = task.settings["evaluated"], matches(task)
        self.arm, self.size = str(task.arm), task.runtime.shard_prompts
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
                for arm_first in (True, False) if is_asked(match) else ():
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
                f"'Verdict: 1', 'Verdict: 2' or 'Verdict: tie' ({reading.reason})"
            )

    def _finish(self, index: int, rows: list[Match], judgements: Judgements, advance: Advance) -> ShardResult:
        table, dropped = tabulate(self.arm, self.name, rows, judgements, self.languages)
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
            text = judge_prompt.question(match["messages"], match["language"], *shown(match, arm_first))
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
) -> tuple[pa.Table, pa.Table]:
    """One shard of comparisons and its ledger; `judgements` are by place and order."""
    kept: list[dict[str, Any]] = []
    drops: list[tuple[str, str, str, int | None, str]] = []
    for place, match in enumerate(rows):
        missing = [
            name
            for name, text in ((arm, match["completion"]), (BASE, match["base_completion"]))
            if text is None
        ]
        both = [judgements.get((place, arm_first)) for arm_first in (True, False)]
        reads = [
            judge_prompt.Reading(judge_prompt.TIE) if one is None else judge_prompt.read(one, arm_first)
            for one, arm_first in zip(both, (True, False), strict=True)
        ]
        reason = next((reading.reason for reading in reads if reading.verdict is None), None)
        if missing:
            reason = f"{ABSENT}: of {' and '.join(missing)}"
        if reason is not None:
            drops.append(("comparison", match["prompt_id"], match["language"], None, reason))
            continue
        first, second = (str(reading.verdict) for reading in reads)
        judged = [one for one in both if isinstance(one, Judged)]
        kept.append(
            {name: match[name] for name in (*KEY, "domain", "completion", "base_completion")}
            | {
                "arm": arm,
                "verdict_arm_first": first,
                "verdict_base_first": second,
                "value": judge_prompt.value_of(first, second),
                "judgement_arm_first": judged[0].text if judged else None,
                "judgement_base_first": judged[1].text if judged else None,
                "judge": judge,
                "judge_prompt_tokens": sum(one.prompt_tokens for one in judged),
                "judge_completion_tokens": sum(one.completion_tokens for one in judged),
            }
        )
    for column, text in (("found_language", "completion"), ("base_found_language", "base_completion")):
        spoken = identify_completions((r[text] for r in kept), evaluated, (r["language"] for r in kept))
        for row, language in zip(kept, spoken, strict=True):
            row[column] = language
    return pa.Table.from_pylist(kept, schema=COMPARISONS.schema), ledger(drops)
