"""Sampling one prompt at a time with transformers' own `generate`, which is given the tokens that we draw.

For architectures that the shared-prefix decoder does not handle exactly, and its slow twin in tests: same seeds, same
draws, no padding, no joining of prompts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from croco.models.attention.support import depends_on_batch, forget_lengths
from croco.models.protocols import Completion, Decoding, Request
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
) -> Iterator[tuple[int, list[Completion]]]:
    """Yield (index of the request, its completions), at most `rows` continuations computed at once."""
    for index, request in enumerate(requests):
        samples: list[Completion] = []
        for start in range(0, len(request.seeds), rows):
            samples += _continue(
                model, end_tokens, decoding, request, request.seeds[start : start + rows], max_context, stops
            )
        yield index, samples


class _Draw(transformers.LogitsProcessor):
    """Leaves one token per row: the one drawn. (`generate` then takes the largest logit.)"""

    def __init__(self, model: Any, seeds_R: torch.Tensor, prompt_tokens: int, decoding: Decoding) -> None:
        self.model, self.seeds_R, self.prompt_tokens, self.decoding = model, seeds_R, prompt_tokens, decoding

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_tokens
        token_R = draw(scores, self.seeds_R, torch.full_like(self.seeds_R, step), self.decoding)
        tokens_drawn(self.model, token_R)  # raises where there is none
        return torch.full_like(scores, float("-inf")).scatter(1, token_R[:, None], 0.0)


class _StopStrings(transformers.StoppingCriteria):
    """Rows whose latest tokens hold a stop string have ended."""

    def __init__(self, stops: Stops, prompt_tokens: int) -> None:
        self.stops, self.prompt_tokens = stops, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        drawn = input_ids[:, self.prompt_tokens :]
        look = drawn.shape[1] % LOOK_EVERY == 0
        return torch.tensor(
            [look and self.stops.near_end(row) for row in drawn.tolist()], device=input_ids.device
        )


def _continue(
    model: Any,
    end_tokens: set[int],
    decoding: Decoding,
    request: Request,
    seeds: list[int],
    max_context: int,
    stops: Stops | None,
) -> list[Completion]:
    prompt = torch.tensor([request.prompt_ids], device=model.device).expand(len(seeds), -1)
    processor = _Draw(model, torch.tensor(seeds, device=model.device), prompt.shape[1], decoding)
    criteria = [_StopStrings(stops, prompt.shape[1])] if stops is not None else []
    limit = min(decoding.max_new_tokens, max_context - len(request.prompt_ids))
    ends = sorted(end_tokens)
    config = transformers.GenerationConfig(
        max_new_tokens=limit, do_sample=False, eos_token_id=ends or None, pad_token_id=0
    )
    if depends_on_batch(model.config):
        forget_lengths(model)
    with own_defaults_off(model):
        whole = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=config,
            logits_processor=transformers.LogitsProcessorList([processor]),
            stopping_criteria=transformers.StoppingCriteriaList(criteria),
        )
    samples = []
    for ids, seed in zip(whole[:, prompt.shape[1] :].tolist(), seeds, strict=True):
        end = next((place for place, token in enumerate(ids) if token in end_tokens), None)
        samples.append(finished(ids[:end], "length" if end is None else "stop", seed, stops))
    return samples


@contextmanager
def own_defaults_off(model: Any) -> Iterator[None]:
    """Within it, `generate` adds nothing of the model's generation config, such as a repetition penalty."""
    before = model.generation_config
    model.generation_config = transformers.GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before
