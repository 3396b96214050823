"""Pairs for the tests: random words, several languages, completions of spread lengths."""

import random

import polars as pl

WORDS = (
    "March",
    "April",
    "maj",
    "juin",
    "comes",
    "after",
    "Which",
    "month",
    "efter",
    "kommer",
    "quel",
    "vient",
)
LANGUAGES = ("en", "da", "fr")


def make_pairs(num_pairs: int, seed: int = 0, longest: int = 9) -> pl.DataFrame:
    """A table with the columns training reads; prompts repeat over languages."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high)))

    rows = [
        {
            "prompt_id": f"p{i // len(LANGUAGES)}",
            "language": LANGUAGES[i % len(LANGUAGES)],
            "messages": [{"role": "user", "content": text(2, 10)}],
            "chosen": text(1, longest),
            "rejected": text(1, longest) + " x",
        }
        for i in range(num_pairs)
    ]
    return pl.DataFrame(rows)
