"""Makes the lab's reward model: a teacher that knows English preferences only, distilled into a classifier.

The teacher is a small Bradley–Terry head on log-probability features of the policy (conditional, unconditional, given
another prompt), trained on pairs of English completions in three tiers of quality. Its features mean the same in every
language, so it ranks completions in all of them; a plain one-logit sequence classifier learns its scores on unlabelled
completions of all 14 languages. No quality label outside English is used anywhere. Fine-tuning a classifier on the
English pairs alone does not transfer; `docs/log.md` has the figures.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from croco.lab import judge, world
from croco.models.chat_template import prompt_ids as chat_prompt_ids
from croco.models.protocols import Decoding, Request
from croco.models.transformers import HFSampler
from croco.storage.seeds import sample_seed
from lab import corpus

CLIP = 3.0  # standardised teacher scores beyond it tell the student nothing more


@dataclass(frozen=True)
class Row:
    """An unlabelled completion: which prompt, which language, its ids without the end token."""

    prompt_id: str
    language: str
    ids: tuple[int, ...]


def prompt_tokens(tokenizer: PreTrainedTokenizerFast, prompt_id: str, language: str) -> list[int]:
    messages = [{"role": "user", "content": judge.prompt(prompt_id, language)}]
    return chat_prompt_ids(tokenizer, messages, None)


def draw(
    sampler: HFSampler,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[tuple[str, str]],
    num_samples: int,
    seed: int,
    cut: bool = False,
) -> list[Row]:
    """`num_samples` completions at temperature 1 of each (prompt_id, language); cut ones only if `cut`."""
    requests = [
        Request(k, prompt_tokens(tokenizer, *key), [sample_seed(seed, *key, i) for i in range(num_samples)])
        for k, key in enumerate(prompts)
    ]
    rows: list[Row] = []
    for k, samples in sampler.sample(requests, Decoding(1.0, 1.0, 0, 64)):
        prompt_id, language = prompts[k]
        whole = [s for s in samples if s.ids and (cut or s.finish_reason == "stop")]
        rows += [Row(prompt_id, language, tuple(s.ids)) for s in whole]
    return sorted(rows, key=lambda r: (r.prompt_id, r.language, r.ids))


def corpus_rows(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[tuple[str, str]], seed: int
) -> list[Row]:
    """One unlabelled corpus completion per (prompt_id, language), in a mode drawn as the corpus draws it."""
    rng = Random(f"croco-lab-reward-{seed}")
    modes, shares = list(corpus.MIXTURE), [share for share, _ in corpus.MIXTURE.values()]
    texts = [
        corpus.complete(world.split_id(p)[0], lang, rng.choices(modes, shares)[0], rng) for p, lang in prompts
    ]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [Row(p, lang, tuple(row)) for (p, lang), row in zip(prompts, ids, strict=True)]


@torch.inference_mode()
def _logps(
    model: LlamaForCausalLM,
    end: int,
    prefixes: Sequence[list[int]],
    rows: Sequence[Row],
    batch_tokens: int = 12_000,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per row: log-probability and entropy at each completion token (end token included), given its prefix."""
    sequences = [[*prefix, *row.ids, end] for prefix, row in zip(prefixes, rows, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: len(sequences[i]))
    out: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0), np.empty(0))] * len(rows)
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop - start + 1) * len(sequences[order[stop]]) <= batch_tokens:
            stop += 1
        batch = order[start:stop]
        width = len(sequences[batch[-1]])
        ids_BT = torch.full((len(batch), width), end)
        at_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
        for b, i in enumerate(batch):
            ids_BT[b, : len(sequences[i])] = torch.tensor(sequences[i])
            at_BT[b, len(prefixes[i]) - 1 : len(sequences[i]) - 1] = True
        hidden_BTD = model.model(
            input_ids=ids_BT
        ).last_hidden_state  # causal: padding on the right changes nothing
        logps_PV = model.lm_head(hidden_BTD[at_BT]).float().log_softmax(-1)
        entropy_P = -(logps_PV.exp() * logps_PV).sum(-1).numpy()
        target_P = ids_BT[:, 1:][at_BT[:, :-1]]
        logp_P = logps_PV.gather(1, target_P[:, None])[:, 0].numpy()
        sizes = np.cumsum([len(rows[i].ids) + 1 for i in batch])[:-1]
        for i, logp, entropy in zip(batch, np.split(logp_P, sizes), np.split(entropy_P, sizes), strict=True):
            out[i] = (logp, entropy)
        start = stop
    return out


def features(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], seed: int
) -> np.ndarray:
    """(rows, features) float64: how likely a completion is given its prompt, given none, given another prompt of its
    language, and how those differ. No feature names a token or a language."""
    rng = Random(f"croco-lab-features-{seed}")
    end, pool = tokenizer.eos_token_id, sorted({row.prompt_id for row in rows})
    own = {key: prompt_tokens(tokenizer, *key) for key in {(row.prompt_id, row.language) for row in rows}}
    others = [prompt_tokens(tokenizer, rng.choice(pool), row.language) for row in rows]
    none = [tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<|assistant|>")]
    given = _logps(model, end, [own[row.prompt_id, row.language] for row in rows], rows)
    alone = _logps(model, end, [none] * len(rows), rows)
    other = _logps(model, end, others, rows)
    return np.array(
        [_row_features(c, h, u, s) for (c, h), (u, _), (s, _) in zip(given, alone, other, strict=True)]
    )


def _row_features(c: np.ndarray, h: np.ndarray, u: np.ndarray, s: np.ndarray) -> list[float]:
    """Of log-probabilities given the prompt (c, entropy h), given nothing (u), given another prompt (s)."""
    per_token = [
        np.log(len(c)),
        c.mean(),
        c.min(),
        u.mean(),
        h.mean(),
        (c - u).mean(),
        (c - u).max(),
        (c - s).mean(),
    ]
    start = [c[0], u[0], c[0] - u[0], h[0], c[:3].sum(), (c - u)[:3].sum()]
    total = [c.sum(), (c - u).sum(), (c - s).sum(), (c - s).max(), (c - s).min()]
    return [*per_token, *start, *total]


def tier(prompt_id: str, language: str, completion: str) -> float:
    """The label of an English completion: 1 good, 0.3 right but badly said or well said but wrong, else 0."""
    verdict = world.verify(prompt_id, language, completion)
    if verdict.good:
        return 1.0
    half = verdict.mode == "careful-wrong" or (verdict.correct and verdict.mode in ("terse", "rambling"))
    return 0.3 if half else 0.0


@dataclass(frozen=True)
class Teacher:
    """A Bradley–Terry head on features standardised within each language (which needs no label)."""

    center: dict[str, np.ndarray]
    scale: dict[str, np.ndarray]
    head: torch.nn.Module

    def __call__(self, values: np.ndarray, languages: Sequence[str]) -> np.ndarray:
        with torch.inference_mode():
            return self.head(torch.tensor(self.standardise(values, languages)).float())[:, 0].numpy()

    def standardise(self, values: np.ndarray, languages: Sequence[str]) -> np.ndarray:
        center = np.array([self.center[code] for code in languages])
        return np.clip((values - center) / np.array([self.scale[code] for code in languages]), -5, 5)


def english_pairs(rows: Sequence[Row], tiers: Sequence[float]) -> np.ndarray:
    """(pairs, 2) indices of rows of one English prompt, the better first; equal tiers make no pair."""
    by_prompt: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if row.language == "en":
            by_prompt.setdefault(row.prompt_id, []).append(i)
    pairs = [
        (i, j) for members in by_prompt.values() for i in members for j in members if tiers[i] > tiers[j]
    ]
    return np.array(pairs)


def train_teacher(
    values: np.ndarray,
    rows: Sequence[Row],
    english: np.ndarray,
    pairs: np.ndarray,
    seed: int,
    steps: int = 600,
) -> Teacher:
    """Fits the head on English `pairs` (indices into the English feature rows `english`), −log σ(better − worse)."""
    languages = np.array([row.language for row in rows])
    center = {code: values[languages == code].mean(0) for code in sorted(set(languages))}
    scale = {code: values[languages == code].std(0) + 1e-6 for code in sorted(set(languages))}
    torch.manual_seed(seed)
    head = torch.nn.Sequential(torch.nn.Linear(values.shape[1], 24), torch.nn.Tanh(), torch.nn.Linear(24, 1))
    teacher = Teacher(center, scale, head)
    inputs = torch.tensor(teacher.standardise(english, ["en"] * len(english))).float()
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.tensor(pairs[torch.randint(len(pairs), (2048,), generator=generator).numpy()])
        scores = head(inputs)[:, 0]
        loss = -torch.nn.functional.logsigmoid(scores[batch[:, 0]] - scores[batch[:, 1]]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return teacher


def distil(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row],
    targets: np.ndarray,
    seed: int,
    steps: int = 300,
    batch: int = 128,
    on_step: Callable[[int, int, float], None] | None = None,
    clip: float = CLIP,
    bfloat16: bool = False,
) -> LlamaForSequenceClassification:
    """A one-logit classifier that begins at the policy's weights and learns `targets` (standardised, clipped).

    Rows of similar length share a batch; `bfloat16` is for a CPU that has it, as in pretraining."""
    torch.manual_seed(seed)
    config = copy.deepcopy(policy.config)
    config.num_labels, config.architectures = 1, None
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(policy.model.state_dict())
    torch.nn.init.zeros_(model.score.weight)
    trunk = model.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    end = tokenizer.eos_token_id
    sequences = [[*prompt_tokens(tokenizer, r.prompt_id, r.language), *r.ids, end] for r in rows]
    target = torch.tensor(np.clip((targets - targets.mean()) / targets.std(), -clip, clip)).float()
    groups: list[list[int]] = []
    for step in range(steps):
        scale = min(1.0, (step + 1) / 20) * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = 1e-3 * scale
        if not groups:
            drawn = sorted(
                torch.randperm(len(rows), generator=generator).tolist()[: 10 * batch],
                key=lambda i: len(sequences[i]),
            )
            groups = [drawn[start : start + batch] for start in range(0, len(drawn), batch)]
        chosen = groups.pop(int(torch.randint(len(groups), (), generator=generator)))
        width = max(len(sequences[i]) for i in chosen)
        ids_BT = torch.full((len(chosen), width), end)
        for b, i in enumerate(chosen):
            ids_BT[b, : len(sequences[i])] = torch.tensor(sequences[i])
        last_B = torch.tensor([len(sequences[i]) - 1 for i in chosen])
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            hidden_BTD = trunk(input_ids=ids_BT, use_cache=False).last_hidden_state
        score_B = model.score(hidden_BTD[torch.arange(len(chosen)), last_B].float())[:, 0]
        loss = torch.nn.functional.mse_loss(score_B, target[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if on_step:
            on_step(step + 1, steps, loss.item())
    return model.eval()
