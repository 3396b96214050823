"""`croco doctor RECIPE`: what a recipe's models, templates and prompts come to, before anything expensive runs.

Loads configs and tokenizers, not weights: architectures are counted on the meta device. With `measure` the engines are
opened too and asked for a little, which finds weights that do not load and gives the rate that hours follow from.
Everything is looked at before the first thing that is wrong ends it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import polars as pl

from croco.cli import plan
from croco.cli import preflight_models as models
from croco.cli.preflight_models import LENGTHS, Prompt
from croco.config.models import Model
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.models import memory, open
from croco.models.loading import pick_device, pick_dtype, weightless
from croco.models.openai_server import Connection
from croco.models.protocols import Decoding
from croco.pipeline.compute import examined
from croco.stages.euroeval import euroeval, worker
from croco.stages.prompts.load import load
from croco.stages.sample import sample_shards
from croco.stages.score.policy_logprobs import grouped
from croco.stages.score.reward import load_function, open_reward
from croco.stages.score.score import tabulate
from croco.stages.train.memory_plan import STATE_BYTES, trained_parameters
from croco.storage.hashing import check_adapter

MEASURED_PROMPTS, MEASURED_COMPLETIONS, MEASURED_TOKENS = 8, 16, 64


def examine(recipe: Recipe, measure: bool = False) -> Iterator[str]:
    """Lines for a person; raises UserError with the first thing that would stop the run, and how many there are."""
    rows: list[Prompt] = []
    rates: dict[str, float] = {}
    wrong: list[str] = []
    tests = {
        "evaluation": recipe.evaluation_languages,
        "arena": recipe.arena_languages if recipe.arena else (),
    }
    checks: list[Iterable[str]] = [  # generators: each begins when its turn comes
        _prompts(recipe, rows),
        *(_test_prompts(recipe, key, languages) for key, languages in tests.items() if languages),
        _rates(recipe, rates),
        _engines(recipe),
        servers(recipe),
        _euroeval(recipe) if recipe.euroeval else (),
        _reward_functions(recipe),
        *(models.examine_role(recipe, role, rows) for role in models.roles(recipe)),
        _tuning(recipe),
        _adapters(recipe),
        _measured(recipe, rows, rates) if measure else (),
        plan.cost(recipe, rates),
    ]
    for check in checks:
        try:
            for line in check:
                yield line
                if plan.MISFIT in line:
                    wrong.append(" ".join(line.split()))
        except UserError as error:
            if str(error) not in wrong:  # what it costs is counted in the prompts, which were read before
                yield f"WRONG         {error}"
                wrong.append(str(error))
    if wrong:
        more = f" (and {len(wrong) - 1} more, see above)" if len(wrong) > 1 else ""
        raise UserError(wrong[0] + more)


def _prompts(recipe: Recipe, rows: list[Prompt]) -> Iterator[str]:
    """Put into `rows` the prompts to tune on, as the recipe names them (of a hub dataset without a limit, the first);
    where they cannot be read, a prompt of ours in every language, that models are looked at all the same."""
    section, languages = recipe.prompts, recipe.prompts_languages
    hub = section.source.startswith("hf:")
    try:
        limit = section.limit or (LENGTHS if hub else None)
        rows += load(section, "prompts", languages, limit).prompts.to_pylist()
    except UserError:
        yield "prompts       cannot be read: below, models are shown a prompt of ours"
        asked = [{"role": "user", "content": "What comes after Monday?"}]
        rows += [{"prompt_id": "ours", "language": code, "messages": asked} for code in languages]
        raise


def _test_prompts(recipe: Recipe, key: str, languages: tuple[str, ...]) -> Iterator[str]:
    """Nothing, but UserError where the prompts to evaluate on, or the arena's own, cannot be read."""
    section = getattr(recipe, key)
    if section.source:
        plan.num_prompts(section, key, languages)
    yield from ()


def _rates(recipe: Recipe, rates: dict[str, float]) -> Iterator[str]:
    rates |= plan.rates(recipe)
    yield from ()


def _engines(recipe: Recipe) -> Iterator[str]:
    open.check(recipe)
    for line in open.engines(recipe):
        yield f"engines       {line}"
    for line in examined(recipe.runtime):
        yield f"workers       {line}"


def servers(recipe: Recipe) -> Iterator[str]:
    """Whether each server of the recipe is there and serves its model; raises UserError at one that does not."""
    served: dict[str, Model | None] = {
        "translate": recipe.translate,
        "sample": recipe.policy,
        "evaluate": recipe.policy,
        "score": None if recipe.reward.function else recipe.reward,
        "judge": recipe.judge,
    }
    for role, section in served.items():
        if section is None or getattr(recipe.runtime.engines, role) != "server":
            continue
        server = Connection(getattr(recipe.runtime.servers, role), role, section.model)
        context = f", context {server.max_context} tokens" if server.max_context else ""
        yield f"server        {role}: {server.url} serves {server.served}{context}"


def _reward_functions(recipe: Recipe) -> Iterator[str]:
    sections = (recipe.reward, recipe.evaluation.reward, *(arm.reward for arm in recipe.arms.values()))
    for section in filter(None, sections):
        for part in section.parts:
            if part.function:
                load_function(part.function)
                yield f"reward        {part.function}"


def _euroeval(recipe: Recipe) -> Iterator[str]:
    """EuroEval's environment, and what serves the policies that it asks."""
    euroeval.check(recipe)
    yield f"euroeval      {recipe.runtime.euroeval.python}"
    for arm in recipe.runtime.euroeval.urls:
        server = worker.named_server(recipe.runtime.euroeval, arm)
        yield f"  {server.url} serves '{worker.model_name(arm)}', {server.max_context or 'unknown'} tokens at most"


def _tuning(recipe: Recipe) -> Iterator[str]:
    """The policy's weights and what is trained of them, with gradients and AdamW's moments, against what is free."""
    device = pick_device(recipe.runtime.device)
    itemsize, free = pick_dtype(recipe.policy.dtype, device).itemsize, memory.free_bytes(device)
    tunings = {(arm.training.full, arm.training.lora): arm.training for arm in recipe.arms.values()}
    for (whole, lora), training in tunings.items():
        model = weightless(recipe.policy, "policy", "causal")
        trained = trained_parameters(model, training)
        quantization = None if whole else recipe.policy.quantization
        needed = memory.weights_bytes(model, 4 if whole else itemsize, quantization)
        needed += trained * (STATE_BYTES + (0 if whole else 4))
        what = "all weights" if whole else f"adapters of rank {lora.rank}"
        what += f" on weights in {quantization}" if quantization else ""
        fits = "fits" if needed <= free else plan.MISFIT
        yield (
            f"tuning        {what}: {trained / 1e6:,.1f} M trained, {memory.gib(needed)} before activations; "
            f"{memory.gib(free)} are free: {fits}"
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
    sampling, some = recipe.sampling, models.looked_at(rows)[:MEASURED_PROMPTS]
    most = min(sampling.max_new_tokens, MEASURED_TOKENS)
    sampler, tokenizer = open.open_sampler("sample", recipe.policy, recipe.runtime, recipe.run.seed)
    start = time.monotonic()
    ((_, table, _),) = sample_shards(
        sampler,
        tokenizer,
        {0: some},
        Decoding(sampling.temperature, sampling.top_p, sampling.top_k, most, sampling.stop),
        num_completions=min(sampling.completions, MEASURED_COMPLETIONS),
        run_seed=recipe.run.seed,
        instructions=recipe.policy.instruction,
        every=lambda: some,
    )
    seconds, tokens = time.monotonic() - start, sum(table["completion_tokens"].to_pylist())
    rates["sample"] = tokens / seconds
    yield f"measured      {tokens:,} tokens sampled in {seconds:.1f} s, {rates['sample']:,.0f} a second"
    cut = sum(reason == "length" for reason in table["finish_reason"].to_pylist())
    if cut * 2 > table.num_rows:
        limit, advice = f"the {most} tokens of this measurement", ""
        if most == sampling.max_new_tokens:
            limit, advice = f"{most} tokens", ": raise sampling.max_new_tokens, or nothing is left to pair"
        yield f"  {cut:,} of {table.num_rows:,} completions had not ended after {limit}{advice}"
    del sampler
    score, _ = open_reward(recipe.reward, recipe.runtime)
    messages = {(row["prompt_id"], row["language"]): row["messages"] for row in some}
    groups = grouped(pl.DataFrame(pl.from_arrow(table)), messages)
    start = time.monotonic()
    scored = score(groups)
    seconds = time.monotonic() - start
    tabulate([rows for _, rows in groups], scored, recipe.reward.name)  # names a score that is no number
    rates["score"] = table.num_rows / seconds
    yield f"  {table.num_rows:,} completions scored in {seconds:.1f} s, {rates['score']:,.0f} a second"
