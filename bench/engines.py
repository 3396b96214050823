"""Sampling against `model.generate`, and scoring against padded batches, side by side on this machine.

    OMP_NUM_THREADS=1 python bench/engines.py [--rounds 3] [--completions 64] [--model FOLDER] [--cpu-time]
    python bench/engines.py --device cuda         # scoring with a classifier of 0.6 B in bfloat16

Both sides take the same prompts and rows in turns, each with the batch size that is best for it on a first part.
Printed are medians over the rounds and their ratio. The policy is the lab's when it is built, else a random one of its
shape whose end tokens make lengths geometric with mean 20; completions to score are 0.5 to 1.5 times their mean length.
Padded batches are of rows in random order, as they come, and of rows sorted by length, which is the best one can do.
With --model it is that model on the everyday prompts, and a classifier on its trunk scores; --cpu-time counts processor
seconds, for a busy machine.
"""

import argparse
import gzip
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from croco.errors import UserError
from croco.models.chat_template import end_ids, prompt_ids
from croco.models.decoder import ContinuousBatchDecoder
from croco.models.loading import load_policy
from croco.models.protocols import Decoding, Request, ScoreRequest
from croco.models.transformers import HFScorer

VOCABULARY, MAX_NEW_TOKENS = 3000, 48
BUDGETS = (8192, 16384, 32768)
BATCHES = {"cpu": (4, 8, 16, 32), "cuda": (16, 32, 64, 128)}  # rows of the other side's
SHAPES = {"cpu": ["128/128", "256/64", "64/256"], "cuda": ["512/256", "128/512", "2048/256"]}
AIM = 1.5  # times the rate of batches sorted by length, on a GPU
CLOCK = time.perf_counter


def policy(folder: Path | None) -> tuple[Any, set[int], list[list[int]], str]:
    """The model, its end tokens, 48 prompts (of a given one 12), and what it is."""
    if folder is not None:
        model, tokenizer = load_policy(str(folder), device="cpu", dtype="float32")
        everyday = Path(__file__).parents[1] / "recipes" / "everyday-dev.jsonl.gz"
        with gzip.open(everyday, "rt", encoding="utf-8") as lines:
            asked = [json.loads(line)["messages"] for line, _ in zip(lines, range(12), strict=False)]
        prompts = [prompt_ids(tokenizer, messages) for messages in asked]
        return model, end_ids(tokenizer, model.generation_config), prompts, folder.name
    try:
        from croco.lab import world

        model, tokenizer = load_policy("lab:policy", device="cpu")
        rows = world.prompts("dev", ["en", "da", "fr"], 16).to_pylist()
        prompts = [prompt_ids(tokenizer, row["messages"]) for row in rows]
        return model, end_ids(tokenizer, model.generation_config), prompts, "lab:policy"
    except (UserError, ImportError):
        pass
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    dice = random.Random(1)
    prompts = [[dice.randrange(500, VOCABULARY) for _ in range(dice.randint(12, 28))] for _ in range(48)]
    return LlamaForCausalLM(shape).eval(), set(range(2, 152)), prompts, "random weights, lab shape"


def ours(model: Any, ends: set[int], prompts: Sequence[list[int]], completions: int, budget: int) -> int:
    """Tokens sampled with shared prefixes, end tokens included."""
    decoding = Decoding(1.0, 1.0, 0, MAX_NEW_TOKENS)
    requests = [
        Request(k, ids, [completions * k + i for i in range(completions)]) for k, ids in enumerate(prompts)
    ]
    with torch.inference_mode():
        found = ContinuousBatchDecoder(
            model, ends, decoding, requests, model.config.max_position_embeddings, budget
        ).run()
        return sum(len(s.ids) + (s.finish_reason == "stop") for _, samples in found for s in samples)


def generate(model: Any, ends: set[int], prompts: Sequence[list[int]], completions: int, batch: int) -> int:
    """Tokens sampled by `model.generate` with left-padded batches of that many prompts, end tokens included."""
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS,
        num_return_sequences=completions, eos_token_id=sorted(ends), pad_token_id=0,
    )  # fmt: skip
    tokens, ends_E = 0, torch.tensor(sorted(ends))
    with torch.inference_mode():
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in part])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            drawn = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:]
            ended = torch.isin(drawn, ends_E)
            tokens += int(torch.where(ended.any(1), ended.int().argmax(1) + 1, drawn.shape[1]).sum())
    return tokens


def padded(model: Any, rows: Sequence[list[int]], batch: int) -> list[float]:
    """Scores by the model's own forward on right-padded batches in the order given."""
    scores: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            width = max(map(len, part))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in part], device=model.device)
            mask = torch.tensor(
                [[1] * len(row) + [0] * (width - len(row)) for row in part], device=model.device
            )
            scores += model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
    return scores


def rate(work: Callable[[], int]) -> float:
    start = CLOCK()
    return work() / (CLOCK() - start)


def bench_sampling(rounds: int, completions: int, folder: Path | None) -> None:
    model, ends, prompts, name = policy(folder)
    trial = prompts[: len(prompts) // 3]
    budget = max(BUDGETS, key=lambda b: rate(lambda: ours(model, ends, trial, completions, b)))
    batch = max((1, 2, 4, 8, 16), key=lambda b: rate(lambda: generate(model, ends, trial, completions, b)))
    figures = [
        (
            rate(lambda: ours(model, ends, prompts, completions, budget)),
            rate(lambda: generate(model, ends, prompts, completions, batch)),
        )
        for _ in range(rounds)
    ]
    mine, theirs = (median(side) for side in zip(*figures, strict=True))
    print(
        f"sampling ({name}, N = {completions}): {mine:,.0f} tokens/s (budget {budget:,}) against {theirs:,.0f} of "
        f"generate (batches of {batch} prompts): {mine / theirs:.2f} ×"
    )


def classifier(folder: Path | None, device: str) -> Any:
    """A classifier with one logit and a random head: on a given model's trunk, else of random weights, with four small
    layers on a CPU and the shape of Qwen3-0.6B on a GPU."""
    torch.manual_seed(0)
    if folder is not None:
        return AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=torch.float32, pad_token_id=0
        ).eval()
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096}
    if device == "cuda":
        shape |= {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
        shape |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    config = Qwen3Config(vocab_size=VOCABULARY, num_labels=1, pad_token_id=0, **shape)
    with torch.device(device):
        model = Qwen3ForSequenceClassification(config)
    return model.to(torch.bfloat16 if device == "cuda" else torch.float32).eval()


def bench_scoring(
    model: Any, rounds: int, completions: int, prompt_tokens: int, completion_tokens: int
) -> None:
    dice = random.Random(0)

    def ids(length: int) -> list[int]:
        return [dice.randrange(3, VOCABULARY) for _ in range(length)]

    spread = (completion_tokens // 2, completion_tokens * 3 // 2)
    requests = [
        ScoreRequest(k, ids(prompt_tokens), [ids(dice.randint(*spread)) for _ in range(completions)])
        for k in range(4)
    ]
    whole = [request.prompt_ids + c for request in requests for c in request.completions]
    by_length = sorted(whole, key=len)
    shuffled = dice.sample(whole, len(whole))
    scorer = HFScorer(model, None, BUDGETS[1], "random weights")

    def best_size(rows: list[list[int]]) -> int:
        sizes = BATCHES[model.device.type]
        part = rows[:: max(1, len(rows) // (2 * sizes[-1]))]
        return max(sizes, key=lambda size: rate(lambda: len(padded(model, part, size))))

    best = [best_size(rows) for rows in (shuffled, by_length)]

    def ours_once() -> int:
        return sum(map(len, scorer.score(requests)))

    ours_once()
    figures = [
        (
            rate(ours_once),
            rate(lambda: len(padded(model, shuffled, best[0]))),
            rate(lambda: len(padded(model, by_length, best[1]))),
        )
        for _ in range(rounds)
    ]
    scores = [score for row in scorer.score(requests) for score in row]
    gap = max(abs(mine - theirs) for mine, theirs in zip(scores, padded(model, whole, best[0]), strict=True))
    mine, random_order, sorted_order = (median(side) for side in zip(*figures, strict=True))
    met = "met" if mine >= AIM * sorted_order else "MISSED"
    wanted = f" (aim {AIM} ×: {met})" if model.device.type == "cuda" else ""
    print(
        f"scoring ({prompt_tokens}/{completion_tokens} tokens, N = {completions}, {scorer.facts['scorer']}): "
        f"{mine:,.1f} rows/s against {random_order:,.1f} of padded batches of {best[0]} in random order: "
        f"{mine / random_order:.2f} ×; {sorted_order:,.1f} of batches of {best[1]} sorted by length: "
        f"{mine / sorted_order:.2f} ×{wanted}; scores within {gap:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--completions", type=int, default=64)
    parser.add_argument("--device", choices=sorted(SHAPES), default="cpu")
    parser.add_argument("--model", type=Path, help="a folder of a causal model")
    parser.add_argument("--shapes", nargs="+", help=f"of scoring, default {SHAPES}")
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine")
    asked = parser.parse_args()
    if asked.cpu_time:
        global CLOCK
        CLOCK = time.process_time
    print(f"torch {torch.__version__}, {asked.device}, {torch.get_num_threads()} thread(s)")
    if asked.device == "cpu":
        bench_sampling(asked.rounds, asked.completions, asked.model)
    model = classifier(asked.model, asked.device)
    for shape in asked.shapes or SHAPES[asked.device]:
        prompt_tokens, completion_tokens = map(int, shape.split("/"))
        bench_scoring(model, asked.rounds, asked.completions, prompt_tokens, completion_tokens)


if __name__ == "__main__":
    main()
