"""Transformers in process, on a CPU or one GPU: the sampler and the scorers that run on a loaded model."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from croco.errors import UserError
from croco.models import logprobs, plain_decoder, prefix_forward, reward_logits
from croco.models.attention.support import disagreement, unsupported
from croco.models.chat_template import end_ids
from croco.models.decoder import Decoder
from croco.models.loading import max_context
from croco.models.memory import halve_budget, with_less_memory
from croco.models.protocols import Decoding, Request, Sampled, ScoreRequest
from croco.models.stop_strings import Stops

logger = logging.getLogger(__name__)


def _facts(model: Any) -> dict[str, Any]:
    return {"engine": "transformers", "device": str(model.device), "dtype": str(model.dtype)}


class HFSampler:
    """Samples with a loaded causal model: shared prompts where the architecture allows it, else prompt by prompt.

    `path` says which way it goes ("shared-prefix" or "plain") and `reason` why, when it is not the fast one.
    """

    def __init__(self, model: Any, tokenizer: Any, token_budget: int = 32768, name: str = "") -> None:
        self.model, self.tokenizer, self.token_budget = model, tokenizer, token_budget
        self.name = name or str(tokenizer.name_or_path)
        self.max_context = max_context(model)
        self.end_tokens = end_ids(tokenizer, model.generation_config)
        self.reason = unsupported(model) or disagreement(model)
        self.path = "plain" if self.reason else "shared-prefix"
        self.facts = _facts(model) | {"sampler": self.path, "reason": self.reason}
        if self.reason:
            logger.warning(
                "%s is sampled prompt by prompt, which is slower, because %s", self.name, self.reason
            )

    @torch.inference_mode()
    def sample(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[tuple[int, list[Sampled]]]:
        """Yield (key, completions) as requests finish; the token budget is halved whenever memory runs out."""
        for request in requests:
            if not 0 < len(request.prompt_ids) < self.max_context:
                raise UserError(
                    f"request {request.key}: found a prompt of {len(request.prompt_ids)} tokens, "
                    f"expected 1 to {self.max_context - 1}, the context of {self.name}"
                )
        left = [request for request in requests if request.seeds]
        while left:
            done: set[int] = set()
            try:
                for index, samples in self._run(left, decoding):
                    done.add(index)
                    yield left[index].key, samples
            except (torch.OutOfMemoryError, RuntimeError) as error:
                halve_budget(self, error, least=decoding.max_new_tokens)
            left = [request for index, request in enumerate(left) if index not in done]

    def _run(self, requests: list[Request], decoding: Decoding) -> Iterator[tuple[int, list[Sampled]]]:
        stops = Stops(self.tokenizer, decoding.stop) if decoding.stop else None
        if self.path == "plain":
            longest = max(len(request.prompt_ids) for request in requests) + decoding.max_new_tokens
            rows = max(1, self.token_budget // longest)
            return plain_decoder.sample(
                self.model, self.end_tokens, decoding, requests, self.max_context, rows, stops
            )
        decoder = Decoder(
            self.model, self.end_tokens, decoding, requests, self.max_context, self.token_budget, stops
        )
        return decoder.run()


def _sharing(network: Any, name: str) -> tuple[bool, dict[str, Any]]:
    """Whether a network scores with shared prefixes, tried on it, and the facts that say so."""
    reason = unsupported(network) or prefix_forward.disagreement(network)
    if reason:
        logger.warning("%s scores without sharing prompts, which is slower, because %s", name, reason)
    scorer = "whole sequences" if reason else "shared-prefix"
    return reason is None, _facts(network) | {"scorer": scorer, "reason": reason}


class HFScorer:
    """Scores with a loaded sequence classifier of one logit: the raw logit of each conversation."""

    def __init__(self, model: Any, tokenizer: Any, token_budget: int = 16384, name: str = "") -> None:
        self.model, self.token_budget = model, token_budget
        self.name = name or str(tokenizer.name_or_path)
        self.max_context = max_context(model)
        self.share, self.facts = _sharing(getattr(model, model.base_model_prefix, model), self.name)

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        """Raw logits in the order of the requests; what they share is found here, `prompt_ids` may be empty."""
        return with_less_memory(
            self, lambda budget: reward_logits.logits(self.model, requests, budget, self.share)
        )


class HFLikelihood:
    """Scores with the policy itself: the log-probability of a completion, its end token included, as the mean over its
    tokens or summed."""

    def __init__(
        self, model: Any, tokenizer: Any, token_budget: int = 16384, name: str = "", mean: bool = True
    ) -> None:
        self.model, self.tokenizer, self.token_budget, self.mean = model, tokenizer, token_budget, mean
        self.name = name or str(tokenizer.name_or_path)
        self.max_context = max_context(model)
        self.share, self.facts = _sharing(model, self.name)

    def score(
        self, requests: Sequence[ScoreRequest], ended: Sequence[Sequence[bool]] | None = None
    ) -> list[list[float]]:
        """Log-probabilities in the order of the requests; `ended` False marks completions without an end token."""
        sums = with_less_memory(
            self,
            lambda budget: logprobs.completion_logps(
                self.model, self.tokenizer, requests, ended, budget, self.share
            ),
        )
        if not self.mean:
            return sums
        return [
            [
                total / (len(request.completions[i]) + (ended is None or ended[k][i]))
                for i, total in enumerate(sums[k])
            ]
            for k, request in enumerate(requests)
        ]
