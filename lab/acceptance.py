"""What the lab's models must show on dev prompts before they ship: is the reward model better than likelihood?

Best of 16 per dev prompt by the reward model, by the policy's own log-probability (mean, summed, lowest) and at random;
and what the untuned policy says greedily. What needs tuning is measured by `recipes/lab-check.toml`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from croco.lab import world
from croco.lab.items import LANGUAGES
from croco.models.chat_template import conversation_ids
from croco.models.loading import load_policy, load_reward
from croco.models.logprobs import completion_logps
from croco.models.protocols import Completion, Decoding, Request, ScoreRequest
from croco.models.transformers import HFSampler, HFScorer
from croco.stages.evaluate.stats import bootstrap_mean
from croco.storage.seeds import sample_seed
from lab.reward import prompt_tokens

POOL = 16
MAX_NEW_TOKENS = 64


def measure(
    policy: Path, reward: Path, seed: int, languages: Sequence[str] = LANGUAGES
) -> tuple[Table, dict]:
    """The table to print and the same figures as {pick: {language: [share good, low, high]}}, on the dev prompts."""
    keys = [(p, code) for code in languages for p in world.prompt_ids("dev")]
    keys = [key for key in keys if world.split_id(key[0])[0].task not in world.HELD_OUT_TASKS]
    good, picks = _pools(policy, reward, keys, seed)
    figures: dict[str, dict[str, list[float]]] = {}
    for name, values in (("random pick", good["sampled"].mean(1)), ("greedy", good["greedy"][:, 0])):
        figures[name] = _by_language(values, keys, seed)
    for name, scores in picks.items():
        best = np.take_along_axis(good["sampled"], scores.argmax(1)[:, None], 1)[:, 0]
        figures[f"best of {POOL} by {name}"] = _by_language(best, keys, seed)
    return _table(figures, languages), figures


def _pools(
    policy: Path, reward: Path, keys: Sequence[tuple[str, str]], seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """good: whether each sampled (K, 16) or greedy (K, 1) completion is good; picks: a score (K, 16) per scorer."""
    model, tokenizer = load_policy(str(policy))
    sampler = HFSampler(model, tokenizer)
    prompts = [prompt_tokens(tokenizer, *key) for key in keys]
    pools = _sample(
        sampler, prompts, [[sample_seed(seed, *key, i) for i in range(POOL)] for key in keys], 1.0
    )
    greedy = _sample(sampler, prompts, [[0]] * len(keys), 0.0)
    texts = [tokenizer.batch_decode([s.ids for s in pool], skip_special_tokens=True) for pool in pools]
    said = [tokenizer.batch_decode([s.ids for s in pool], skip_special_tokens=True) for pool in greedy]
    good = {
        "sampled": np.array(
            [[world.verify(*key, t).good for t in ts] for key, ts in zip(keys, texts, strict=True)]
        ),
        "greedy": np.array(
            [[world.verify(*key, t).good for t in ts] for key, ts in zip(keys, said, strict=True)]
        ),
    }
    requests = [ScoreRequest(k, prompts[k], [s.ids for s in pool]) for k, pool in enumerate(pools)]
    logps = completion_logps(model, tokenizer, requests)
    lengths = np.array([[len(s.ids) + 1 for s in pool] for pool in pools])
    scorer = HFScorer(*load_reward(str(reward)))
    scores = scorer.score(
        [_conversations(tokenizer, k, *key, ts) for k, (key, ts) in enumerate(zip(keys, texts, strict=True))]
    )
    summed = np.array(logps)
    return good, {
        "reward": np.array(scores),
        "mean log-probability": summed / lengths,
        "summed log-probability": summed,
        "lowest mean log-probability": -summed / lengths,  # is the reward model only unlikelihood?
    }


def _sample(
    sampler: HFSampler, prompts: Sequence[list[int]], seeds: Sequence[list[int]], temperature: float
) -> list[list[Completion]]:
    requests = [Request(k, ids, wanted) for k, (ids, wanted) in enumerate(zip(prompts, seeds, strict=True))]
    found = dict(sampler.sample(requests, Decoding(temperature, 1.0, 0, MAX_NEW_TOKENS)))
    return [found[k] for k in range(len(prompts))]


def _conversations(
    tokenizer: object, key: int, prompt_id: str, language: str, texts: Sequence[str]
) -> ScoreRequest:
    item, phrasing = world.split_id(prompt_id)
    messages = [{"role": "user", "content": world.question(item, language, phrasing)}]
    return ScoreRequest(key, [], [conversation_ids(tokenizer, messages, text) for text in texts])


def _by_language(values: np.ndarray, keys: Sequence[tuple[str, str]], seed: int) -> dict[str, list[float]]:
    languages = np.array([language for _, language in keys])
    return {
        str(code): [
            round(float(x), 4) for x in bootstrap_mean(values[languages == code].astype(float), seed=seed)
        ]
        for code in dict.fromkeys(languages)
    }


def _table(figures: Mapping[str, Mapping[str, Sequence[float]]], languages: Sequence[str]) -> Table:
    table = Table(title="share good on dev prompts, % (95 % interval)")
    table.add_column("language")
    for name in figures:
        table.add_column(name, justify="right", max_width=16)
    for code in languages:
        cells = [tuple(100 * x for x in row[code]) for row in figures.values()]
        table.add_row(code, *(f"{value:.0f} ({low:.0f}–{high:.0f})" for value, low, high in cells))
    return table
