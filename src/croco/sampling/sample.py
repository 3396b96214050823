"""The stage `sample`: N completions of every prompt in every language, by the policy.

A shard is a fixed number of (prompt, language) rows in sorted order, so what a shard holds follows from the data alone,
and a sample's seed from its key: neither device nor batch nor resumption changes a row. Several shards are sampled in
one stream, so that the batch does not run empty at every shard's end; each is written when its last row is there.

Leaves out other engines than transformers in process.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from croco.engines.base import Decoding, Request, Sampled, Sampler
from croco.errors import UserError
from croco.records import COMPLETIONS, ledger
from croco.sampling.chat import prompt_ids
from croco.sampling.seeds import sample_seed
from croco.stage import Work
from croco.store import read_table

Prompt = dict[str, Any]  # a row of the prompts table
STREAM_SHARDS = 16  # shards sampled in one stream: those in flight are what a kill costs


def sample(work: Work) -> None:
    """Write the completions table, shard by shard; prompts that leave no room in the context go to the ledger."""
    from croco.engines.hf import HFSampler, load_policy

    policy, sampling, size = work.recipe.policy, work.recipe.sampling, work.runtime.shard_prompts
    prompts = read_table(work.inputs["prompts"], ["prompt_id", "language", "messages"])
    rows = prompts.sort("prompt_id", "language").to_dicts()
    shards = [rows[start : start + size] for start in range(0, len(rows), size)]
    todo = work.todo(len(shards))
    if not todo:
        return
    model, tokenizer = load_policy(
        policy.model,
        policy.revision,
        policy.dtype,
        work.runtime.device,
        chat_template=Path(policy.chat_template) if policy.chat_template else None,
        trust_remote_code=policy.trust_remote_code,
    )
    sampler = HFSampler(model, tokenizer, work.runtime.token_budget, name=policy.model)
    decoding = Decoding(sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_new_tokens)
    per_prompt = sampling.completions
    tokens, began = 0, time.monotonic()
    done = len(rows) - sum(len(shards[index]) for index in todo)
    with work.progress(len(rows) * per_prompt, "completion", done * per_prompt) as bar:
        for start in range(0, len(todo), STREAM_SHARDS):
            stream = {index: shards[index] for index in todo[start : start + STREAM_SHARDS]}
            for index, table, dropped in sample_shards(
                sampler,
                tokenizer,
                stream,
                decoding,
                num_completions=per_prompt,
                run_seed=work.seed,
                instructions=policy.instruction,
                on_prompt=lambda: bar.advance(per_prompt),
            ):
                work.write(
                    index, table, read={"completion": len(stream[index]) * per_prompt}, dropped=dropped
                )
                tokens += sum(table.column("completion_tokens").to_pylist())
    seconds = time.monotonic() - began
    work.record(
        device=str(model.device),
        sampler=sampler.path,
        reason=sampler.reason,
        tokens=tokens,
        tokens_per_second=round(tokens / max(seconds, 1e-9), 1),
    )


def sample_shards(
    sampler: Sampler,
    tokenizer: Any,
    shards: Mapping[int, Sequence[Prompt]],
    decoding: Decoding,
    *,
    num_completions: int,
    run_seed: int,
    instructions: Mapping[str, str],
    on_prompt: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, pa.Table, pa.Table]]:
    """Yield (shard, completions, ledger) as shards finish, rows in the order of the prompts and their samples.

    `shards` maps a shard's index to rows with prompt_id, language and messages; `instructions` a language to the
    sentence appended to the last user turn. Raises UserError naming the prompt that the chat template refuses.
    """
    requests: list[Request] = []
    owner: list[tuple[int, int]] = []  # of a request: its shard and its place there
    found: dict[int, dict[int, list[Sampled]]] = {index: {} for index in shards}
    drops: dict[int, list[tuple[str, str, str, int | None, str]]] = {index: [] for index in shards}
    left = {index: len(rows) for index, rows in shards.items()}
    for index, rows in shards.items():
        for place, row in enumerate(rows):
            ids = _prompt_ids(tokenizer, row, instructions)
            if len(ids) >= sampler.max_context:
                reason = (
                    f"the prompt has {len(ids)} tokens, the context of {sampler.name} {sampler.max_context}"
                )
                drops[index] += [
                    ("completion", row["prompt_id"], row["language"], i, reason)
                    for i in range(num_completions)
                ]
                left[index] -= 1
                on_prompt()
                continue
            seeds = [
                sample_seed(run_seed, row["prompt_id"], row["language"], i) for i in range(num_completions)
            ]
            requests.append(Request(len(requests), ids, seeds))
            owner.append((index, place))
    for index in [index for index, count in left.items() if count == 0]:
        yield index, COMPLETIONS.schema.empty_table(), ledger(drops[index])
    for key, samples in sampler.sample(requests, decoding):
        index, place = owner[key]
        found[index][place] = samples
        left[index] -= 1
        on_prompt()
        if left[index] == 0:
            table = _table(tokenizer, shards[index], found.pop(index), sampler.name)
            yield index, table, ledger(drops[index])


def _prompt_ids(tokenizer: Any, row: Prompt, instructions: Mapping[str, str]) -> list[int]:
    try:
        return prompt_ids(tokenizer, row["messages"], instructions.get(row["language"]))
    except UserError as error:
        raise UserError(f"prompt {row['prompt_id']!r} in {row['language']}: {error}") from error


def _table(
    tokenizer: Any, rows: Sequence[Prompt], found: Mapping[int, list[Sampled]], policy: str
) -> pa.Table:
    """The completions table of one shard."""
    order = [(rows[place], i, one) for place in sorted(found) for i, one in enumerate(found[place])]
    texts = tokenizer.batch_decode(
        [one.ids for _, _, one in order], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    columns = {
        "prompt_id": [row["prompt_id"] for row, _, _ in order],
        "language": [row["language"] for row, _, _ in order],
        "sample_id": [i for _, i, _ in order],
        "completion": texts,
        "completion_ids": [one.ids for _, _, one in order],
        "completion_tokens": [len(one.ids) + (one.finish_reason == "stop") for _, _, one in order],
        "finish_reason": [one.finish_reason for _, _, one in order],
        "policy": [policy] * len(order),
        "seed": [one.seed for _, _, one in order],
    }
    return pa.table(columns, schema=COMPLETIONS.schema)
