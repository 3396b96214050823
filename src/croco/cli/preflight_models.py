"""The models of a recipe as `croco doctor RECIPE` finds them: architecture, template, memory, room in their context.

Configs and tokenizers are loaded, no weights. `roles` lists the models, `examine_role` looks at one: lines for a
person, and UserError with what would stop the run. Left out: whether weights load, which `cli/preflight.py` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from croco.cli import plan
from croco.config.arms import Alignment
from croco.config.models import Judge, Model, RewardPart, Translate
from croco.config.recipe import Recipe
from croco.errors import Refused, UserError
from croco.models import memory
from croco.models.chat_template import conversation_ids, end_ids, prompt_ids
from croco.models.loading import load_tokenizer, pick_device, pick_dtype, weightless
from croco.models.memory import gib
from croco.models.model_files import context_of, generation_config
from croco.models.open import engine_of
from croco.models.template_checks import examine_policy, examine_reward
from croco.stages.score.alignment import Translator
from croco.stages.translate.protect import pieces
from croco.stages.translate.translate import FORMATS
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


@dataclass(frozen=True)
class Role:
    """A model of the recipe, and what is looked at beside its config, its size and its memory."""

    title: str
    key: str
    section: Model
    kind: str  # as `weightless` names kinds of networks
    engine: str | None  # the role of [runtime.engines] that runs it
    check: Callable[[Recipe, Role, Any, Any, Sequence[Prompt]], Iterator[str]]


def roles(recipe: Recipe) -> list[Role]:
    """Every model that the recipe names and uses."""
    roles = [Role("policy", "policy", recipe.policy, "causal", "sample", _policy)]
    if recipe.translate:
        roles.append(Role("translation", "translate", recipe.translate, "causal", "translate", _translation))
    rewards = {"reward": recipe.reward, "evaluation.reward": recipe.evaluation.reward}
    rewards |= {f"arms.{name}.reward": arm.reward for name, arm in recipe.arms.items()}
    for key, reward in rewards.items():
        models = [part for part in reward.parts if part.function is None] if reward else []
        roles += [Role("reward model", key, part, "classifier", "score", _reward) for part in models]
    for name, arm in recipe.arms.items():
        if arm.sampler:
            key = f"arms.{name}.sampler"
            roles.append(Role(f"sampler       {name}:", key, arm.sampler, "causal", "sample", _sampler))
    if recipe.alignment and any(arm.scorer == "alignment" for arm in recipe.arms.values()):
        roles.append(Role("alignment", "alignment", recipe.alignment, "translator", None, _alignment))
    if recipe.judge and recipe.arena and recipe.arena.judge == "model":
        roles.append(Role("judge", "judge", recipe.judge, "causal", "judge", _judge))
    return roles


def examine_role(recipe: Recipe, role: Role, rows: Sequence[Prompt]) -> Iterator[str]:
    """Lines about a model: what it is, whether it fits, and what its role asks of it."""
    section = role.section
    template = getattr(section, "template", None)
    tokenizer = load_tokenizer(section.model, section.revision, template, section.trust_remote_code)
    network = weightless(section, role.key, role.kind)
    identity = model_identity(section.model, section.revision, f"{role.key}.model")
    size = f"{network.num_parameters() / 1e6:,.1f} M parameters"
    yield f"{role.title:<13} {section.model} ({identity}), {type(network).__name__}, {size}"
    if role.engine:
        yield from _memory(recipe, section, network, role.engine)
    yield from role.check(recipe, role, tokenizer, network, rows)


def _policy_ids(recipe: Recipe, tokenizer: Any) -> Callable[[Prompt], list[int]]:
    """What encodes a prompt as the policy is asked, under its instruction."""
    instruction = recipe.policy.instruction
    return lambda row: prompt_ids(tokenizer, row["messages"], instruction.get(row["language"]))


def _policy(
    recipe: Recipe, role: Role, tokenizer: Any, network: Any, rows: Sequence[Prompt]
) -> Iterator[str]:
    ids = _policy_ids(recipe, tokenizer)
    yield from _sampler(recipe, role, tokenizer, network, rows)
    rows, _ = accepted(rows, ids)
    some = rows[:: -(-len(rows) // LENGTHS)]
    lengths = [len(ids(row)) for row in some]
    context, wanted = context_of(network.config), recipe.sampling.max_new_tokens
    none, less = sum(n >= context for n in lengths), sum(context - wanted < n < context for n in lengths)
    yield (
        f"  context {context:,} tokens: of {len(some):,} prompts {none:,} leave no room in it (they go to the ledger), "
        f"{less:,} less than sampling.max_new_tokens = {wanted:,}"
    )
    if none == len(some):
        raise UserError(
            f"policy.model = '{role.section.model}': no prompt fits its context of {context} tokens"
        )


def _sampler(
    recipe: Recipe, role: Role, tokenizer: Any, network: Any, rows: Sequence[Prompt]
) -> Iterator[str]:
    """Whoever samples is asked as the policy is, under its instruction."""
    stop, instruction = recipe.sampling.stop, recipe.policy.instruction
    ends = end_ids(tokenizer, generation_config(role.section))
    yield f"  a completion ends at {sorted(ends)}" + (f" or {list(stop)}" if stop else "")
    rows, refused = accepted(rows, _policy_ids(recipe, tokenizer))
    yield from refused
    yield from examine_policy(tokenizer, ends, looked_at(rows), instruction)


def _reward(
    recipe: Recipe, role: Role, tokenizer: Any, network: Any, rows: Sequence[Prompt]
) -> Iterator[str]:
    section = role.section
    assert isinstance(section, RewardPart)
    limit = min(section.max_tokens, context_of(network.config))
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
            f"{role.key}.model = '{section.model}': no prompt leaves room for a completion in {limit} tokens"
        )


def _translation(
    recipe: Recipe, role: Role, tokenizer: Any, network: Any, rows: Sequence[Prompt]
) -> Iterator[str]:
    """The first stretch of text of a prompt, as it is asked for in every language."""
    section = role.section
    assert isinstance(section, Translate)
    texts = [text for message in rows[0]["messages"] for text, sent in pieces(message["content"]) if sent]
    targets = recipe.run.evaluated if section.evaluation else recipe.run.languages
    asked = [FORMATS[section.format](texts[0] if texts else "Yes.", section.source, code) for code in targets]
    longest = max(len(prompt_ids(tokenizer, each)) for each in asked)
    yield f"  format {section.format}: the first text of the first prompt takes at most {longest} tokens"


def _alignment(
    recipe: Recipe, role: Role, tokenizer: Any, network: Any, rows: Sequence[Prompt]
) -> Iterator[str]:
    """A token for every language that an arm wants scored."""
    section = role.section
    assert isinstance(section, Alignment)
    translator = Translator(network, tokenizer, section.codes, name=section.model)
    arms = [arm for arm in recipe.arms.values() if arm.scorer == "alignment"]
    wanted = dict.fromkeys(["en", *(code for arm in arms for code in recipe.languages_of(arm))])
    for code in wanted:
        translator.encode([], code)
    yield f"  it has a token for {', '.join(wanted)}"


def _judge(recipe: Recipe, role: Role, tokenizer: Any, network: Any, rows: Sequence[Prompt]) -> Iterator[str]:
    """A template that takes a question, and room for two completions."""
    section = role.section
    assert isinstance(section, Judge)
    prompt_ids(tokenizer, [{"role": "user", "content": "Which is better?"}])
    context = context_of(network.config)
    yield f"  context {context:,} tokens for a prompt, two completions and a verdict of {section.max_new_tokens:,}"
    if section.max_new_tokens >= context:
        raise UserError(
            f"judge.max_new_tokens = {section.max_new_tokens} leaves no room in the judge's context of {context} tokens"
        )


def _memory(recipe: Recipe, section: Model, network: Any, role: str) -> Iterator[str]:
    """Weights, and what the token budget takes beside them, against what is free; other engines see to their own."""
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
