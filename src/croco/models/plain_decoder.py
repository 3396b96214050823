"""Sampling by the obvious loop, one prompt at a time, on transformers' own cache and masks.

For architectures that the shared-prefix decoder does not handle exactly, and its slow twin in tests: same seeds, same
draws, no padding, no joining of prompts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from croco.models.protocols import Decoding, Request, Sampled
from croco.models.stop_strings import LOOK_EVERY, Stops, finished
from croco.models.token_sampling import draw, tokens_drawn


def sample(
    model: Any,
    end_tokens: set[int],
    decoding: Decoding,
    requests: Sequence[Request],
    max_context: int,
    rows: int,
    stops: Stops | None = None,
) -> Iterator[tuple[int, list[Sampled]]]:
    """Yield (index of the request, its completions), at most `rows` continuations computed at once."""
    for index, request in enumerate(requests):
        samples: list[Sampled] = []
        for start in range(0, len(request.seeds), rows):
            samples += _continue(
                model, end_tokens, decoding, request, request.seeds[start : start + rows], max_context, stops
            )
        yield index, samples


def _continue(
    model: Any,
    end_tokens: set[int],
    decoding: Decoding,
    request: Request,
    seeds: list[int],
    max_context: int,
    stops: Stops | None,
) -> list[Sampled]:
    device = model.device
    limit = min(decoding.max_new_tokens, max_context - len(request.prompt_ids))
    cache = DynamicCache(config=model.config)
    seeds_R = torch.tensor(seeds, device=device)
    fed = torch.tensor([request.prompt_ids], device=device).expand(len(seeds), -1)
    columns: list[list[int]] = []
    ended: set[int] = set()
    while len(columns) < limit and len(ended) < len(seeds):
        logits = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        token_R = draw(logits, seeds_R, torch.full_like(seeds_R, len(columns)), decoding)
        columns.append(tokens_drawn(model, token_R).tolist())
        ended |= {row for row, token in enumerate(columns[-1]) if token in end_tokens}
        if stops is not None and len(columns) % LOOK_EVERY == 0:
            running = [row for row in range(len(seeds)) if row not in ended]
            ended |= {row for row in running if stops.near_end([column[row] for column in columns])}
        fed = token_R[:, None]
    samples = []
    for row, seed in enumerate(seeds):
        ids = [column[row] for column in columns]
        end = next((place for place, token in enumerate(ids) if token in end_tokens), None)
        samples.append(finished(ids[:end], "length" if end is None else "stop", seed, stops))
    return samples
