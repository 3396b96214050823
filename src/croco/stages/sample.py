"""The stage `sample`: N completions of every prompt in every language, by the policy.

An arm may have completions of its own: by the policy that another arm tuned, or by another model (off-policy). A shard
is a fixed number of (prompt, language) rows in the order of their keys, and a sample's seed follows from its key, so
neither device nor batch nor resumption changes a row. Several shards are one stream, so the batch stays full."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from croco.config.models import Policy
from croco.errors import Refused, UserError
from croco.models.chat_template import prompt_ids, request, same_ids
from croco.models.open import open_sampler
from croco.models.protocols import Completion, Decoding, Request, Sampler
from croco.pipeline.compute import compute
from croco.pipeline.stage import Task, Work
from croco.pipeline.workers import Advance, ShardResult, shard_sizes
from croco.storage.lookup import read_prompts
from croco.storage.schemas import COMPLETIONS, Drop, ledger
from croco.storage.seeds import sample_seed

Prompt = dict[str, Any]  # a row of the prompts table
Drawn = tuple[Request, Sequence[Completion | str]]  # what was asked, and what came of it


def sample(work: Work) -> None:
    """Write the completions table, shard by shard; prompts that leave no room in the context go to the ledger."""
    rows, each = tuning_prompts(work.task).height, work.settings["sampling"]["completions"]
    worker = partial(SampleWorker, "sample", tuning_prompts, work.task)
    compute(work, worker, shard_sizes(rows, work.runtime.shard_prompts, each), "completion")


def tuning_prompts(task: Task) -> pl.DataFrame:
    """The prompts that are sampled: those of the arm's languages and part."""
    settings = task.settings
    return read_prompts(task.inputs["prompts"], settings.get("languages"), settings.get("part"), ["messages"])


class SampleWorker:
    """Samples shards of `runtime.shard_prompts` prompts, in the order of their keys.

    Token ids of another model are kept only if they mean the same to the policy that is tuned.
    """

    def __init__(self, role: str, prompts: Callable[[Task], pl.DataFrame], task: Task, replica: int) -> None:
        self.settings, self.policy = task.settings, task.settings["policy"]
        rows, size = prompts(task), task.runtime.shard_prompts
        self.every = lambda: rows.iter_rows(named=True)
        self.shard = lambda index: rows.slice(index * size, size).to_dicts()
        self.sampler, self.tokenizer = open_sampler(
            role, self.policy, task.runtime, task.engine_seed, replica, task.adapter
        )
        self.facts = self.sampler.facts  # the same dict: a server's counts grow in it
        tuned, self.keep_ids = self.settings.get("ids_of"), True
        if tuned is not None and (tuned.model, tuned.revision) != (self.policy.model, self.policy.revision):
            self.facts["ids_kept"] = self.keep_ids = _means_the_same(self.tokenizer, tuned)

    def shards(self, indices: Sequence[int], advance: Advance) -> Iterator[ShardResult]:
        """Several shards in one stream, so that the batch does not run empty at every shard's end."""
        sampling, wanted = self.settings["sampling"], {index: self.shard(index) for index in indices}
        asked = {name: sampling[name] for name in ("temperature", "top_p", "top_k", "max_new_tokens")}
        decoding = Decoding(**asked, stop=tuple(sampling["stop"]))
        for index, table, dropped in sample_shards(
            self.sampler,
            self.tokenizer,
            wanted,
            decoding,
            num_completions=sampling["completions"],
            run_seed=self.settings["seed"],
            instructions=self.policy.instruction,
            every=self.every,
            on_prompt=lambda: advance(sampling["completions"]),
        ):
            if not self.keep_ids:
                place = table.schema.get_field_index("completion_ids")
                field = table.schema.field(place)
                table = table.set_column(place, field, pa.nulls(table.num_rows, field.type))
            read = {"completion": len(wanted[index]) * sampling["completions"]}
            yield ShardResult(
                index, table, dropped, read, {"tokens": pc.sum(table["completion_tokens"]).as_py() or 0}
            )


def _means_the_same(tokenizer: Any, tuned: Policy) -> bool:
    """Whether ids of this tokenizer are ids of the policy's."""
    from croco.models.loading import load_tokenizer

    policy_tokenizer = load_tokenizer(tuned.model, tuned.revision, trust_remote_code=tuned.trust_remote_code)
    return tokenizer is not None and same_ids(tokenizer, policy_tokenizer)


def sample_shards(
    sampler: Sampler,
    tokenizer: Any,
    shards: Mapping[int, Sequence[Prompt]],
    decoding: Decoding,
    *,
    num_completions: int,
    run_seed: int,
    instructions: Mapping[str, str],
    every: Callable[[], Iterable[Prompt]],
    on_prompt: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, pa.Table, pa.Table]]:
    """Yield (shard, completions, ledger) as shards finish, rows in the order of the prompts and their samples.

    `shards` maps a shard's index to rows with prompt_id, language and messages, `instructions` a language to the
    sentence after the last user turn; `tokenizer` is None where the sampler takes messages. A prompt that is too long
    or refused by the chat template goes to the ledger. Raises UserError for a template that refuses `every` prompt of
    the stage."""
    requests: list[Request] = []
    owner: list[tuple[int, int]] = []  # of a request: its shard and its place there
    drawn: dict[int, dict[int, Drawn]] = {index: {} for index in shards}
    drops: dict[int, list[Drop]] = {index: [] for index in shards}
    for index, rows in shards.items():
        for place, row in enumerate(rows):
            seeds = [
                sample_seed(run_seed, row["prompt_id"], row["language"], i) for i in range(num_completions)
            ]
            asked, reason = _request(tokenizer, len(requests), row, seeds, instructions, sampler)
            if asked is None:
                drops[index] += [
                    ("completion", row["prompt_id"], row["language"], i, reason)
                    for i in range(num_completions)
                ]
                on_prompt()
                continue
            requests.append(asked)
            owner.append((index, place))
    if not requests and (refusal := _refusal_of_all(tokenizer, every(), instructions)):
        raise UserError(refusal)
    left = Counter(index for index, _ in owner)
    for index in [index for index in shards if not left[index]]:
        yield index, COMPLETIONS.schema.empty_table(), ledger(drops[index])
    for key, samples in sampler.sample(requests, decoding):
        index, place = owner[key]
        drawn[index][place] = requests[key], samples
        row = shards[index][place]
        drops[index] += [
            ("completion", row["prompt_id"], row["language"], i, one)
            for i, one in enumerate(samples)
            if isinstance(one, str)
        ]
        left[index] -= 1
        on_prompt()
        if left[index] == 0:
            table = _table(tokenizer, shards[index], drawn.pop(index), sampler.name)
            yield index, table, ledger(drops[index])


def _refusal_of_all(tokenizer: Any, prompts: Iterable[Prompt], instructions: Mapping[str, str]) -> str | None:
    """The refusal of the first prompt when the chat template refuses every one."""
    first = None
    for row in prompts if tokenizer is not None else ():
        try:
            prompt_ids(tokenizer, row["messages"], instructions.get(row["language"]))
        except Refused as error:
            first = first or f"prompt {row['prompt_id']!r} in {row['language']}: {error}"
        else:
            return None
    return first


def _request(
    tokenizer: Any, key: int, row: Prompt, seeds: list[int], instructions: Mapping[str, str], sampler: Sampler
) -> tuple[Request | None, str]:
    """What to ask for a prompt; None and the reason where it cannot be asked."""
    name = f"prompt {row['prompt_id']!r} in {row['language']}"
    try:
        asked = request(tokenizer, key, row["messages"], seeds, instructions.get(row["language"]), name)
        if (tokens := len(asked.prompt_ids)) < sampler.max_context:
            return asked, ""
        return (
            None,
            f"the prompt fills the context of {sampler.name}, {sampler.max_context} tokens: it has {tokens}",
        )
    except Refused as error:
        return None, str(error)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _table(tokenizer: Any, rows: Sequence[Prompt], drawn: Mapping[int, Drawn], policy: str) -> pa.Table:
    """The completions of a shard's prompts, by their place in it."""
    kept = [
        (rows[place], request, i, one)
        for place, (request, samples) in sorted(drawn.items(), key=lambda item: item[0])
        for i, one in enumerate(samples)
        if not isinstance(one, str)
    ]
    ids = [one.ids for *_, one in kept if one.text is None]
    decoded = iter(
        tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if ids
        else []
    )
    made = [
        {
            "prompt_id": row["prompt_id"],
            "language": row["language"],
            "sample_id": i,
            "completion": next(decoded) if one.text is None else one.text,
            "completion_ids": one.ids if one.text is None else None,
            "completion_tokens": one.completion_tokens,
            "prompt_tokens": len(request.prompt_ids) or None,
            "finish_reason": one.finish_reason,
            "policy": policy,
            "seed": one.seed,
        }
        for row, request, i, one in kept
    ]
    return pa.Table.from_pylist(made, schema=COMPLETIONS.schema)
