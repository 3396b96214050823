"""The models of a recipe as `croco doctor RECIPE` finds them: architecture, template, memory, room in their context.

Configs and tokenizers are loaded, no weights. Each function gives lines for a person and raises UserError with what
would stop the run. Left out: whether weights load, which `cli/preflight.py` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from croco.cli import plan
from croco.config.models import Model, RewardPart, Translate
from croco.config.recipe import Recipe
from croco.errors import Refused, UserError
from croco.models.loading import weightless
from croco.models.model_files import context_of
from croco.models.open import engine_of
from croco.storage.hashing import model_identity

PER_LANGUAGE = 3  # prompts looked at, besides the first of several turns and the longest
LENGTHS = 1000  # prompts whose length is counted

Prompt = dict[str, Any]  # a row of the prompts table


def looked_at(rows: Sequence[Prompt]) -> list[Prompt]:
    """Of each language the first prompts, the first of several turns, and the longest."""
    chosen: list[Prompt] = []
    for language in dict.fromkeys(row["language"] for row in rows):
        own = [row for row in rows if row["language"] == language]
        several = [row for row in own if len(row["messages"]) > 1][:1]
        longest = max(own, key=lambda row: sum(len(message["content"]) for message in row["messages"]))
        named = {row["prompt_id"]: row for row in (*own[:PER_LANGUAGE], *several, longest)}
        chosen += named.values()
    return chosen


def accepted(rows: Sequence[Prompt], encode: Callable[[Prompt], Any]) -> tuple[list[Prompt], list[str]]:
    """The prompts that a chat template takes, of all of them, and a line about the others; UserError without any."""
    kept, refusals = [], []
    for row in rows:
        try:
            encode(row)
            kept.append(row)
        except UserError as error:
            refusals.append(f"prompt {row['prompt_id']!r} in {row['language']}: {error}")
            if not isinstance(error, Refused):
                raise UserError(refusals[-1]) from error
    if not kept:
        raise UserError(f"all {len(rows):,} prompts are refused, {refusals[0]}")
    line = f"  {len(refusals):,} of {len(rows):,} prompts go to the ledger: {(refusals or [''])[0]}"
    return kept, [line] if refusals else []


def policy(recipe: Recipe, rows: Sequence[Prompt]) -> Iterator[str]:
    from croco.models.chat_template import end_ids, prompt_ids
    from croco.models.model_files import generation_config
    from croco.models.template_checks import examine_policy

    policy, sampling = recipe.policy, recipe.sampling
    tokenizer = _tokenizer(policy)
    network = weightless(policy, "policy", "causal")
    yield f"policy        {_what(policy, 'policy', network)}"
    yield from _memory(recipe, policy, network, "sample")
    ends = end_ids(tokenizer, generation_config(policy))
    yield f"  a completion ends at {sorted(ends)}" + (f" or {list(sampling.stop)}" if sampling.stop else "")
    rows, refused = accepted(
        rows, lambda row: prompt_ids(tokenizer, row["messages"], policy.instruction.get(row["language"]))
    )
    yield from refused
    yield from examine_policy(tokenizer, ends, looked_at(rows), policy.instruction)
    some = rows[:: -(-len(rows) // LENGTHS)]
    lengths = [len(prompt_ids(tokenizer, r["messages"], policy.instruction.get(r["language"]))) for r in some]
    context, wanted = context_of(network.config), sampling.max_new_tokens
    none, less = sum(n >= context for n in lengths), sum(context - wanted < n < context for n in lengths)
    yield (
        f"  context {context:,} tokens: of {len(some):,} prompts {none:,} leave no room in it (they go to the ledger), "
        f"{less:,} less than sampling.max_new_tokens = {wanted:,}"
    )
    if none == len(some):
        raise UserError(f"policy.model = '{policy.model}': no prompt fits its context of {context} tokens")


def reward(recipe: Recipe, rows: Sequence[Prompt]) -> Iterator[str]:
    keys = {"reward": recipe.reward, "evaluation.reward": recipe.evaluation.reward}
    for key, part in [(key, part) for key, section in keys.items() if section for part in section.parts]:
        if part.function is None:
            yield from _reward_model(recipe, part, rows, key)
        else:
            from croco.stages.score.reward import load_function

            load_function(part.function)
            yield f"reward        {part.function}"


def _reward_model(recipe: Recipe, reward: RewardPart, rows: Sequence[Prompt], key: str) -> Iterator[str]:
    from croco.models.chat_template import conversation_ids
    from croco.models.template_checks import examine_reward

    tokenizer = _tokenizer(reward)
    network = weightless(reward, key, "classifier")
    yield f"reward model  {_what(reward, key, network)}"
    yield from _memory(recipe, reward, network, "score")
    limit = min(reward.max_tokens, context_of(network.config))
    rows, refused = accepted(rows, lambda row: conversation_ids(tokenizer, row["messages"], ""))
    yield from refused
    yield from examine_reward(tokenizer, looked_at(rows), limit)
    some = rows[:: -(-len(rows) // LENGTHS)]
    lengths = [len(conversation_ids(tokenizer, row["messages"], "")) for row in some]
    over = sum(length + recipe.sampling.max_new_tokens > limit for length in lengths)
    yield (
        f"  of {len(some):,} prompts {over:,} have longer conversations when a completion is as long as allowed "
        f"(those go to the ledger)"
    )
    if min(lengths) >= limit:
        raise UserError(
            f"{key}.model = '{reward.model}': no prompt leaves room for a completion in {limit} tokens"
        )


def translation(recipe: Recipe, section: Translate, messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """The translation model, and the first stretch of text of a prompt as it is asked for in every language."""
    from croco.models.chat_template import prompt_ids
    from croco.stages.translate.formats import FORMATS
    from croco.stages.translate.protect import pieces

    tokenizer = _tokenizer(section)
    texts = [text for message in messages for text, sent in pieces(message["content"]) if sent]
    targets = recipe.run.evaluated if section.evaluation else recipe.run.languages
    asked = [FORMATS[section.format](texts[0] if texts else "Yes.", section.source, code) for code in targets]
    longest = max(len(prompt_ids(tokenizer, each)) for each in asked)
    network = weightless(section, "translate", "causal")
    yield f"translation   {_what(section, 'translate', network)}"
    yield from _memory(recipe, section, network, "translate")
    yield f"  format {section.format}: the first text of the first prompt takes at most {longest} tokens"


def samplers(recipe: Recipe, rows: Sequence[Prompt]) -> Iterator[str]:
    """The models that sample in the policy's place, each asked as the policy would be."""
    from croco.models.chat_template import end_ids
    from croco.models.model_files import generation_config
    from croco.models.template_checks import examine_policy

    for name, arm in recipe.arms.items():
        if (sampler := arm.sampler) is None:
            continue
        key, tokenizer = f"arms.{name}.sampler", _tokenizer(sampler)
        network = weightless(sampler, key, "causal")
        yield f"sampler       {name}: {_what(sampler, key, network)}"
        yield from _memory(recipe, sampler, network, "sample")
        ends = end_ids(tokenizer, generation_config(sampler))
        yield from examine_policy(tokenizer, ends, looked_at(rows), recipe.policy.instruction)


def alignment(recipe: Recipe) -> Iterator[str]:
    """The translation model that scores, and its token for every language that an arm wants scored."""
    from croco.stages.score.alignment import Translator

    arms = [arm for arm in recipe.arms.values() if arm.scorer == "alignment"]
    if (section := recipe.alignment) is None or not arms:
        return
    tokenizer = _tokenizer(section)
    network = weightless(section, "alignment", "translator")
    yield f"alignment     {_what(section, 'alignment', network)}"
    translator = Translator(network, tokenizer, section.codes, name=section.model)
    wanted = dict.fromkeys(["en", *(code for arm in arms for code in arm.languages or recipe.run.languages)])
    for code in wanted:
        translator.encode([], code)
    yield f"  it has a token for {', '.join(wanted)}"


def judge(recipe: Recipe) -> Iterator[str]:
    """The model that is asked for verdicts, and that its template takes a question."""
    from croco.models.chat_template import prompt_ids

    section = recipe.judge
    if section is None or recipe.arena is None or recipe.arena.judge != "model":
        return
    tokenizer = _tokenizer(section)
    network = weightless(section, "judge", "causal")
    yield f"judge         {_what(section, 'judge', network)}"
    yield from _memory(recipe, section, network, "judge")
    prompt_ids(tokenizer, [{"role": "user", "content": "Which is better?"}])
    context = context_of(network.config)
    yield f"  context {context:,} tokens for a prompt, two completions and a verdict of {section.max_new_tokens:,}"
    if section.max_new_tokens >= context:
        raise UserError(
            f"judge.max_new_tokens = {section.max_new_tokens} leaves no room in the judge's context of {context} tokens"
        )


def _tokenizer(section: Model) -> Any:
    from croco.models.loading import load_tokenizer

    template = getattr(section, "template", None)
    return load_tokenizer(section.model, section.revision, template, section.trust_remote_code)


def _what(section: Model, key: str, network: Any) -> str:
    """Identity, architecture and parameters of a model."""
    identity = model_identity(section.model, section.revision, f"{key}.model")
    return f"{section.model} ({identity}), {type(network).__name__}, {network.num_parameters() / 1e6:,.1f} M parameters"


def _memory(recipe: Recipe, section: Model, network: Any, role: str) -> Iterator[str]:
    """Weights, and what the token budget takes beside them, against what is free; other engines see to their own."""
    from croco.models import memory
    from croco.models.loading import pick_device, pick_dtype

    if engine_of(recipe.runtime, role)[0] != "transformers":
        return
    device = pick_device(recipe.runtime.device)
    size, budget = pick_dtype(section.dtype, device).itemsize, recipe.runtime.token_budget
    weights, free = network.num_parameters() * size, memory.free_bytes(device)
    if role == "score":
        beside = memory.scoring_bytes(network.config, size, budget)
    else:
        beside = memory.sampling_bytes(network.config, size, budget, recipe.sampling.max_new_tokens)
    line = (
        f"  memory on {device.type}: weights {gib(weights)} and {gib(beside)} for runtime.token_budget = {budget:,}; "
        f"{gib(free)} are free: "
    )
    if weights + beside <= free:
        yield line + "fits"
    elif weights >= free:
        yield line + plan.MISFIT
    else:
        yield (line + f"{plan.MISFIT}, a budget of {int(budget * (free - weights) / beside):,} tokens would")


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
