"""`croco doctor RECIPE`: what a recipe's models, templates and prompts come to, before anything expensive runs.

Loads configs and tokenizers, not weights: architectures are counted on the meta device. With `measure` the engines are
opened too and asked for a little, which finds weights that do not load and gives the rate that hours follow from.
Everything is looked at before the first thing that is wrong ends it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from croco import engines, planning
from croco.errors import UserError
from croco.executor import examined
from croco.identity import check_adapter, model_identity
from croco.recipe import Recipe
from croco.recipe_models import Model, Translate

PER_LANGUAGE = 3  # prompts looked at, besides the first of several turns and the longest
LENGTHS = 1000  # prompts whose length is counted
MEASURED_PROMPTS, MEASURED_COMPLETIONS, MEASURED_TOKENS = 8, 16, 64

Prompt = dict[str, Any]  # a row of the prompts table


def examine(recipe: Recipe, measure: bool = False) -> Iterator[str]:
    """Lines for a person; raises UserError with the first thing that would stop the run, and how many there are."""
    rows = _prompts(recipe)
    rates = planning.rates(recipe)
    wrong: list[str] = []
    for check in (
        lambda: _engines(recipe),
        lambda: servers(recipe),
        lambda: _euroeval(recipe) if recipe.euroeval else (),
        lambda: _policy(recipe, rows),
        lambda: _translation(recipe, recipe.translate, rows[0]["messages"]) if recipe.translate else (),
        lambda: _reward(recipe, rows),
        lambda: _samplers(recipe, rows),
        lambda: _alignment(recipe),
        lambda: _judge(recipe),
        lambda: _tuning(recipe),
        lambda: _adapters(recipe),
        lambda: _measured(recipe, rows, rates) if measure else (),
        lambda: planning.cost(recipe, rates),
    ):
        try:
            for line in check():
                yield line
                if planning.MISFIT in line:
                    wrong.append(" ".join(line.split()))
        except UserError as error:
            yield f"WRONG         {error}"
            wrong.append(str(error))
    if wrong:
        more = f" (and {len(wrong) - 1} more, see above)" if len(wrong) > 1 else ""
        raise UserError(wrong[0] + more)


def _prompts(recipe: Recipe) -> list[Prompt]:
    """The prompts to tune on, as the recipe names them (of a hub dataset without a limit, the first)."""
    from croco.prompts.load import load

    section = recipe.prompts
    hub = section.source.startswith("hf:")
    return load(
        section.source,
        split=section.split,
        languages=recipe.prompts_languages,
        limit=section.limit or (LENGTHS if hub else None),
        id_column=section.id_column,
        language_column=section.language_column,
    ).prompts.to_pylist()


def _looked_at(rows: Sequence[Prompt]) -> list[Prompt]:
    """Of each language the first prompts, the first of several turns, and the longest."""
    chosen: list[Prompt] = []
    for language in dict.fromkeys(row["language"] for row in rows):
        own = [row for row in rows if row["language"] == language]
        several = [row for row in own if len(row["messages"]) > 1][:1]
        longest = max(own, key=lambda row: sum(len(message["content"]) for message in row["messages"]))
        named = {row["prompt_id"]: row for row in (*own[:PER_LANGUAGE], *several, longest)}
        chosen += named.values()
    return chosen


def _engines(recipe: Recipe) -> Iterator[str]:
    engines.check(recipe)
    yield f"engines       {', '.join(f'{role}: {engine}' for role, engine in recipe.runtime.engines)}"
    for line in examined(recipe.runtime):
        yield f"workers       {line}"


def servers(recipe: Recipe) -> Iterator[str]:
    """Whether each server of the recipe is there and serves its model; raises UserError at one that does not."""
    models: dict[str, Model | None] = {
        "translate": recipe.translate,
        "sample": recipe.policy,
        "evaluate": recipe.policy,
        "score": recipe.reward,
        "judge": recipe.judge,
    }
    for role, section in models.items():
        if section is None or getattr(recipe.runtime.engines, role) != "server":
            continue
        from croco.engines.server import Connection

        found = Connection(getattr(recipe.runtime.servers, role), role, section.model)
        context = f", context {found.max_context} tokens" if found.max_context else ""
        yield f"server        {role}: {found.url} serves {found.served}{context}"


def _euroeval(recipe: Recipe) -> Iterator[str]:
    """EuroEval's environment, and what serves the policies that it asks."""
    from croco.evaluation import euroeval

    euroeval.check(recipe)
    yield f"euroeval      {recipe.runtime.euroeval.python}"
    for arm in recipe.runtime.euroeval.urls:
        found = euroeval.named_server(recipe.runtime.euroeval, arm)
        yield f"  {found.url} serves '{euroeval.model_name(arm)}', {found.max_context or 'unknown'} tokens at most"


def _policy(recipe: Recipe, rows: Sequence[Prompt]) -> Iterator[str]:
    from croco.engines.config import generation_config
    from croco.sampling.chat import end_ids, prompt_ids
    from croco.sampling.exactness import examine_policy

    policy, sampling = recipe.policy, recipe.sampling
    tokenizer = _tokenizer(policy)
    network = weightless(policy, "policy", "causal")
    yield f"policy        {_what(policy, 'policy', network)}"
    yield from _memory(recipe, policy, network, "sample")
    ends = end_ids(tokenizer, generation_config(policy))
    yield f"  a completion ends at {sorted(ends)}" + (f" or {list(sampling.stop)}" if sampling.stop else "")
    yield from examine_policy(tokenizer, ends, _looked_at(rows), policy.instruction)
    some = rows[:: -(-len(rows) // LENGTHS)]
    lengths = [len(prompt_ids(tokenizer, r["messages"], policy.instruction.get(r["language"]))) for r in some]
    context, wanted = network.config.get_text_config().max_position_embeddings, sampling.max_new_tokens
    none, less = sum(n >= context for n in lengths), sum(context - wanted < n < context for n in lengths)
    yield (
        f"  context {context:,} tokens: of {len(some):,} prompts {none:,} leave no room in it (they go to the ledger), "
        f"{less:,} less than sampling.max_new_tokens = {wanted:,}"
    )
    if none == len(some):
        raise UserError(f"policy.model = '{policy.model}': no prompt fits its context of {context} tokens")


def _reward(recipe: Recipe, rows: Sequence[Prompt]) -> Iterator[str]:
    from croco.sampling.chat import conversation_ids
    from croco.sampling.exactness import examine_reward

    reward = recipe.reward
    tokenizer = _tokenizer(reward)
    network = weightless(reward, "reward", "classifier")
    yield f"reward model  {_what(reward, 'reward', network)}"
    yield from _memory(recipe, reward, network, "score")
    limit = min(reward.max_tokens, network.config.get_text_config().max_position_embeddings)
    yield from examine_reward(tokenizer, _looked_at(rows), limit)
    some = rows[:: -(-len(rows) // LENGTHS)]
    lengths = [len(conversation_ids(tokenizer, row["messages"], "")) for row in some]
    over = sum(length + recipe.sampling.max_new_tokens > limit for length in lengths)
    yield (
        f"  of {len(some):,} prompts {over:,} have longer conversations when a completion is as long as allowed "
        f"(those go to the ledger)"
    )
    if min(lengths) >= limit:
        raise UserError(
            f"reward.model = '{reward.model}': no prompt leaves room for a completion in {limit} tokens"
        )


def _translation(recipe: Recipe, section: Translate, messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """The translation model, and the first stretch of text of a prompt as it is asked for in every language."""
    from croco.prompts.formats import FORMATS
    from croco.prompts.protect import pieces
    from croco.sampling.chat import prompt_ids

    tokenizer = _tokenizer(section)
    texts = [text for message in messages for text, sent in pieces(message["content"]) if sent]
    targets = recipe.run.evaluated if section.evaluation else recipe.run.languages
    asked = [FORMATS[section.format](texts[0] if texts else "Yes.", section.source, code) for code in targets]
    longest = max(len(prompt_ids(tokenizer, each)) for each in asked)
    network = weightless(section, "translate", "causal")
    yield f"translation   {_what(section, 'translate', network)}"
    yield from _memory(recipe, section, network, "translate")
    yield f"  format {section.format}: the first text of the first prompt takes at most {longest} tokens"


def _samplers(recipe: Recipe, rows: Sequence[Prompt]) -> Iterator[str]:
    """The models that sample in the policy's place, each asked as the policy would be."""
    from croco.engines.config import generation_config
    from croco.sampling.chat import end_ids
    from croco.sampling.exactness import examine_policy

    for name, arm in recipe.arms.items():
        if (sampler := arm.sampler) is None:
            continue
        key, tokenizer = f"arms.{name}.sampler", _tokenizer(sampler)
        network = weightless(sampler, key, "causal")
        yield f"sampler       {name}: {_what(sampler, key, network)}"
        yield from _memory(recipe, sampler, network, "sample")
        ends = end_ids(tokenizer, generation_config(sampler))
        yield from examine_policy(tokenizer, ends, _looked_at(rows), recipe.policy.instruction)


def _alignment(recipe: Recipe) -> Iterator[str]:
    """The translation model that scores, and its token for every language that an arm wants scored."""
    from croco.scoring.alignment import Translator

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


def _judge(recipe: Recipe) -> Iterator[str]:
    """The model that is asked for verdicts, and that its template takes a question."""
    from croco.sampling.chat import prompt_ids

    section = recipe.judge
    if section is None or recipe.arena is None or recipe.arena.judge != "model":
        return
    tokenizer = _tokenizer(section)
    network = weightless(section, "judge", "causal")
    yield f"judge         {_what(section, 'judge', network)}"
    yield from _memory(recipe, section, network, "judge")
    prompt_ids(tokenizer, [{"role": "user", "content": "Which is better?"}])
    context = network.config.get_text_config().max_position_embeddings
    yield f"  context {context:,} tokens for a prompt, two completions and a verdict of {section.max_new_tokens:,}"
    if section.max_new_tokens >= context:
        raise UserError(
            f"judge.max_new_tokens = {section.max_new_tokens} leaves no room in the judge's context of {context} tokens"
        )


def _tuning(recipe: Recipe) -> Iterator[str]:
    """The policy's weights and what is trained of them, with gradients and AdamW's moments, against what is free."""
    from croco.engines import memory
    from croco.engines.loading import pick_device, pick_dtype
    from croco.training.preflight import STATE_BYTES, trained_parameters

    device = pick_device(recipe.runtime.device)
    itemsize, free = pick_dtype(recipe.policy.dtype, device).itemsize, memory.free_bytes(device)
    for whole in sorted({arm.training.full for arm in recipe.arms.values()}):
        model = weightless(recipe.policy, "policy", "causal")
        ranks = [arm.training.lora.rank for arm in recipe.arms.values() if arm.training.full == whole]
        targets = next(
            arm.training.lora.targets for arm in recipe.arms.values() if arm.training.full == whole
        )
        trained = trained_parameters(model, None if whole else (max(ranks), targets))
        needed = model.num_parameters() * (4 if whole else itemsize)
        needed += trained * (STATE_BYTES + (0 if whole else 4))
        what = "all weights" if whole else f"adapters of rank {max(ranks)}"
        fits = "fits" if needed <= free else planning.MISFIT
        yield (
            f"tuning        {what}: {trained / 1e6:,.1f} M trained, {_gib(needed)} before activations; "
            f"{_gib(free)} are free: {fits}"
        )


def _adapters(recipe: Recipe) -> Iterator[str]:
    """The adapters that are there, each of this very base."""
    for arm in recipe.arms:
        folder = recipe.folder / "train" / arm / "adapter"
        if folder.is_dir():
            check_adapter(folder, recipe.policy.model, recipe.policy.revision)
            yield f"adapter       {arm}: trained on this policy"


def _measured(recipe: Recipe, rows: Sequence[Prompt], rates: dict[str, float]) -> Iterator[str]:
    """A few short completions sampled and scored by the recipe's engines; their rates are put into `rates`."""
    from croco.engines.base import Decoding
    from croco.sampling.sample import sample_shards
    from croco.scoring.score import score_conversations, tabulate

    sampling, some = recipe.sampling, _looked_at(rows)[:MEASURED_PROMPTS]
    most = min(sampling.max_new_tokens, MEASURED_TOKENS)
    sampler, tokenizer = engines.open_sampler("sample", recipe, recipe.run.seed)
    start = time.monotonic()
    ((_, table, _),) = sample_shards(
        sampler,
        tokenizer,
        {0: some},
        Decoding(sampling.temperature, sampling.top_p, sampling.top_k, most, sampling.stop),
        num_completions=min(sampling.completions, MEASURED_COMPLETIONS),
        run_seed=recipe.run.seed,
        instructions=recipe.policy.instruction,
    )
    seconds, tokens = time.monotonic() - start, sum(table["completion_tokens"].to_pylist())
    rates["sample"] = tokens / seconds
    yield f"measured      {tokens:,} tokens sampled in {seconds:.1f} s, {rates['sample']:,.0f} a second"
    del sampler
    scorer, tokenizer = engines.open_scorer(recipe)
    messages = {(row["prompt_id"], row["language"]): row["messages"] for row in some}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        groups.setdefault((row["prompt_id"], row["language"]), []).append(row)
    start = time.monotonic()
    scored = score_conversations(
        scorer, tokenizer, [(messages[key], group) for key, group in groups.items()], recipe.reward.max_tokens
    )
    seconds = time.monotonic() - start
    tabulate(list(groups.values()), scored, recipe.reward.model)  # names a score that is no number
    rates["score"] = table.num_rows / seconds
    yield f"  {table.num_rows:,} completions scored in {seconds:.1f} s, {rates['score']:,.0f} a second"


def _tokenizer(section: Model) -> Any:
    from croco.engines.loading import load_tokenizer

    template = getattr(section, "chat_template", None)
    return load_tokenizer(
        section.model, section.revision, Path(template) if template else None, section.trust_remote_code
    )


def _what(section: Model, key: str, network: Any) -> str:
    """Identity, architecture and parameters of a model."""
    identity = model_identity(section.model, section.revision, f"{key}.model")
    return f"{section.model} ({identity}), {type(network).__name__}, {network.num_parameters() / 1e6:,.1f} M parameters"


def _memory(recipe: Recipe, section: Model, network: Any, role: str) -> Iterator[str]:
    """Weights, and what the token budget takes beside them, against what is free; other engines see to their own."""
    from croco.engines import memory
    from croco.engines.loading import pick_device, pick_dtype

    if getattr(recipe.runtime.engines, role) != "transformers":
        return
    device = pick_device(recipe.runtime.device)
    size, budget = pick_dtype(section.dtype, device).itemsize, recipe.runtime.token_budget
    weights, free = network.num_parameters() * size, memory.free_bytes(device)
    if role == "score":
        beside = memory.scoring_bytes(network.config, size, budget)
    else:
        beside = memory.sampling_bytes(network.config, size, budget, recipe.sampling.max_new_tokens)
    line = (
        f"  memory on {device.type}: weights {_gib(weights)} and {_gib(beside)} for runtime.token_budget = {budget:,}; "
        f"{_gib(free)} are free: "
    )
    if weights + beside <= free:
        yield line + "fits"
    elif weights >= free:
        yield line + planning.MISFIT
    else:
        yield (
            line + f"{planning.MISFIT}, a budget of {int(budget * (free - weights) / beside):,} tokens would"
        )


def weightless(section: Model, key: str, kind: str) -> Any:
    """The model without its weights; raises UserError for one that transformers does not know, or of several logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    from croco.engines.config import load_config

    kinds: dict[str, Any] = {
        "causal": AutoModelForCausalLM,
        "classifier": AutoModelForSequenceClassification,
        "translator": AutoModelForSeq2SeqLM,
    }
    config = load_config(section, key)
    try:
        with torch.device("meta"):
            network = kinds[kind].from_config(config, trust_remote_code=section.trust_remote_code)
    except ValueError as error:
        raise UserError(
            f"{key}.model = '{section.model}' does not load: {str(error).splitlines()[0]}"
        ) from None
    if kind == "classifier" and config.num_labels != 1:
        raise UserError(f"{key}.model = '{section.model}' has {config.num_labels} logits, expected one")
    return network


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
