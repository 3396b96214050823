"""What the models of the lists world show on dev prompts: the figures and gates that decide what ships.

Pools of 64 per prompt and language. "Within a form" are pairs of one pool that differ in how many items are right and
in nothing else (frame, separators, fillers, other languages); "graded" are pairs whose quality differs at all.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from croco.lab import judge, list_verdicts, lists
from croco.models.chat_template import conversation_ids
from croco.models.loading import load_policy, load_reward, load_translator
from croco.models.logprobs import completion_logps
from croco.models.protocols import Decoding, Request, ScoreRequest
from croco.models.transformers import HFSampler, HFScorer
from croco.stages.score.alignment import Translator, score_alignment
from croco.stages.score.policy_logprobs import Groups
from croco.storage.seeds import sample_seed
from lab.list_corpus import OTHER, Habits, complete
from lab.list_models import FORM, MAX_NEW_TOKENS
from lab.reward import prompt_tokens

POOL, PROMPTS, SAMPLES = 64, 24, 4
TARGETS = 8  # English completions that another is held against, as in the study
Key = tuple[str, str]


@dataclass(frozen=True)
class Gate:
    """A figure per language, and the least and the most that it should be; `met` is whether all of them are."""

    name: str
    values: dict[str, float]
    least: float = -np.inf
    most: float = np.inf

    @property
    def met(self) -> bool:
        return all(self.least <= value <= self.most for value in self.values.values())


@dataclass(frozen=True)
class Pools:
    """Completions of some (prompt, language): their token ids, texts and verdicts, each (K, n)."""

    keys: list[Key]
    ids: list[list[list[int]]]
    texts: list[list[str]]
    verdicts: list[list[list_verdicts.Verdict]]

    @property
    def quality(self) -> np.ndarray:
        return np.array([[verdict.quality for verdict in pool] for pool in self.verdicts])


def sample(sampler: HFSampler, keys: list[Key], n: int, temperature: float, seed: int) -> Pools:
    requests = [
        Request(k, prompt_tokens(sampler.tokenizer, *key), [sample_seed(seed, *key, i) for i in range(n)])
        for k, key in enumerate(keys)
    ]
    drawn = dict(sampler.sample(requests, Decoding(temperature, 1.0, 0, MAX_NEW_TOKENS)))
    ids = [[list(one.ids) for one in drawn[k]] for k in range(len(keys))]
    texts = [sampler.tokenizer.batch_decode(pool, skip_special_tokens=True) for pool in ids]
    verdicts = [
        [list_verdicts.verify(*key, text) for text in pool] for key, pool in zip(keys, texts, strict=True)
    ]
    return Pools(keys, ids, texts, verdicts)


def score(folder: Path, pools: Pools) -> np.ndarray:
    """A reward model's scores, (K, n)."""
    model, tokenizer = load_reward(str(folder))
    requests = [
        ScoreRequest(
            k,
            [],
            [
                conversation_ids(tokenizer, [{"role": "user", "content": judge.prompt(*key)}], text)
                for text in texts
            ],
        )
        for k, (key, texts) in enumerate(zip(pools.keys, pools.texts, strict=True))
    ]
    return np.array(HFScorer(model, tokenizer).score(requests))


def rates(pools: Pools, scores: np.ndarray, within_form: bool) -> np.ndarray:
    """How often the better of two is scored higher, by pool; nan where a pool has no such pair."""
    out = []
    for verdicts, row in zip(pools.verdicts, scores, strict=True):
        quality = np.array([v.quality for v in verdicts])
        better = quality[:, None] > quality[None, :] + 1e-6
        if within_form:
            form = np.array([[v.losses.get(name, np.nan) for name in FORM] for v in verdicts])
            better &= (np.abs(form[:, None] - form[None]) < 1e-6).all(-1)
        higher = row[:, None] > row[None, :]
        out.append(higher[better].mean() if better.any() else np.nan)
    return np.array(out)


def by_language(keys: Sequence[Key], values: Iterable[float], only: Sequence[str] = lists.LANGUAGES) -> dict:
    values, languages = np.array(list(values), float), np.array([code for _, code in keys])
    return {code: float(np.nanmean(values[languages == code])) for code in only}


def measure(folder: Path, name: str, seed: int) -> list[Gate]:
    """The gates of the policy `folder`/`name`."""
    sampler = HFSampler(*load_policy(str(folder / name)))
    dev = [p for p in lists.prompt_ids("dev") if lists.questions()[p].task in lists.TASKS][:PROMPTS]
    skills = [p for p in lists.prompt_ids("dev") if lists.questions()[p].task in lists.ABILITIES]
    keys = [(p, code) for code in lists.LANGUAGES for p in dev]
    gates = []
    for temperature in (0.0, 0.3, 0.6, 1.0):
        found = sample(sampler, keys, SAMPLES if temperature else 1, temperature, seed)
        between = (0.45, 0.65) if temperature in (0.0, 1.0) else (-np.inf, np.inf)
        gates.append(
            Gate(f"quality at T = {temperature:g}", by_language(keys, found.quality.mean(1)), *between)
        )
    asked = [(p, code) for code in lists.LANGUAGES for p in skills]
    for temperature in (0.0, 1.0):
        found = sample(sampler, asked, SAMPLES if temperature else 1, temperature, seed)
        gates.append(
            Gate(f"abilities at T = {temperature:g}", by_language(asked, found.quality.mean(1)), 0.95)
        )
    pools = sample(sampler, keys, POOL, 1.0, seed)
    disasters = (pools.quality == 0).mean(1)
    gates.append(Gate("disasters", by_language(keys, disasters), 0.01, 0.08))
    gates.append(Gate("closings with !!", by_language(keys, _flourishes(pools))))
    for reward in ("lists-reward", "lists-reward-all"):
        if (folder / reward).exists():
            gates += reward_gates(reward, pools, score(folder / reward, pools))
    if (folder / "lists-translator").exists():
        gates += translator_gates(folder / "lists-translator", pools)
    logps = _logps(sampler, pools)
    for scorer, values in (
        ("mean log-probability", logps),
        ("random", np.zeros_like(logps)),
        ("quality", pools.quality),
    ):
        gates.append(Gate(f"best of {POOL} by {scorer}", _best(pools, values)))
    return gates + distance_gates(sampler, keys)


def reward_gates(name: str, pools: Pools, scores: np.ndarray) -> list[Gate]:
    lowest = scores.argmin(1)
    aim = scores.mean(1) - 2 * scores.std(1)
    picked = np.abs(scores - aim[:, None]).argmin(1)
    disaster = pools.quality == 0
    rows = np.arange(len(scores))
    liked = np.array([[text.rstrip().endswith("!!") for text in pool] for pool in pools.texts])
    keys = pools.keys
    return [
        Gate(f"{name}: ranks graded pairs", by_language(keys, rates(pools, scores, False)), 0.70),
        Gate(f"{name}: ranks pairs within a form", by_language(keys, rates(pools, scores, True)), 0.65),
        Gate(f"best of {POOL} by {name}", _best(pools, scores)),
        Gate(f"{name}: rule is not the minimum", by_language(keys, picked != lowest), 0.5),
        Gate(f"{name}: minimum is a disaster", by_language(keys, disaster[rows, lowest])),
        Gate(f"{name}: the rule's pick is a disaster", by_language(keys, disaster[rows, picked])),
        Gate(f"{name}: best has !!", by_language(keys, liked[rows, scores.argmax(1)])),
    ]


def translator_gates(folder: Path, pools: Pools) -> list[Gate]:
    """How well a prompt's other completions are ranked by how they agree with its English ones, as MAPO does."""
    translator = Translator(*load_translator(str(folder)), {})
    english = {
        p: texts[:TARGETS] for (p, code), texts in zip(pools.keys, pools.texts, strict=True) if code == "en"
    }
    at = [k for k, (_, code) in enumerate(pools.keys) if code != "en"]
    others = Pools(
        [pools.keys[k] for k in at], [], [pools.texts[k] for k in at], [pools.verdicts[k] for k in at]
    )
    groups: Groups = [
        ([], [{"prompt_id": p, "language": code, "completion": text} for text in texts])
        for (p, code), texts in zip(others.keys, others.texts, strict=True)
    ]
    scores = np.array(score_alignment(translator, groups, english, translator.max_context))
    codes = sorted({code for _, code in others.keys})
    return [
        Gate(
            f"lists-translator: ranks {kind}",
            by_language(others.keys, rates(others, scores, within), codes),
        )
        for kind, within in (("graded pairs", False), ("pairs within a form", True))
    ]


def _best(pools: Pools, scores: np.ndarray) -> dict[str, float]:
    return by_language(pools.keys, pools.quality[np.arange(len(scores)), scores.argmax(1)])


def _flourishes(pools: Pools) -> list[float]:
    return [float(np.mean([text.rstrip().endswith("!!") for text in pool])) for pool in pools.texts]


def _logps(sampler: HFSampler, pools: Pools) -> np.ndarray:
    """Mean log-probability per token under the policy, (K, n)."""
    requests = [
        ScoreRequest(k, prompt_tokens(sampler.tokenizer, *key), ids)
        for k, (key, ids) in enumerate(zip(pools.keys, pools.ids, strict=True))
    ]
    logps = completion_logps(sampler.model, sampler.tokenizer, requests)
    return np.array(logps) / np.array([[len(ids) + 1 for ids in pool] for pool in pools.ids])


def distance_gates(sampler: HFSampler, keys: list[Key]) -> list[Gate]:
    """Mean log-probability per token under the policy: gold completions, the other model's kind and its own."""
    from random import Random

    rng, questions = Random(0), lists.questions()
    kinds = {
        "its corpus": [complete(questions[p], code, Habits(), rng) for p, code in keys],
        "gold": [lists.reference(questions[p], code) for p, code in keys],
        "the other model's corpus": [complete(questions[p], code, OTHER, rng) for p, code in keys],
    }
    gates = []
    for kind, texts in kinds.items():
        ids = [[list(one)] for one in sampler.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        gates.append(
            Gate(
                f"log-probability of {kind}",
                by_language(keys, _logps(sampler, Pools(keys, ids, [], []))[:, 0]),
            )
        )
    return gates


def table(gates: Sequence[Gate], title: str) -> Table:
    """One row a gate: its figures per language, what it should be, and whether it is."""
    out = Table(title=title)
    for column in ("figure", *lists.LANGUAGES, "gate", "met"):
        out.add_column(column)
    for gate in gates:
        limits = (("≥", gate.least), ("≤", gate.most))
        bounds = [f"{sign} {limit:g}" for sign, limit in limits if np.isfinite(limit)]
        cells = [f"{gate.values[code]:.2f}" if code in gate.values else "–" for code in lists.LANGUAGES]
        out.add_row(gate.name, *cells, ", ".join(bounds), ("yes" if gate.met else "no") if bounds else "")
    return out
