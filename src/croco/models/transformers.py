"""Transformers in process, on a CPU or one GPU: the sampler and the scorers that run on a loaded model."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from croco.errors import UserError
from croco.models import logprobs, plain_decoder, reward_logits
from croco.models.attention.support import boundaries, depends_on_batch, unsupported
from croco.models.chat_template import end_ids
from croco.models.decoder import ContinuousBatchDecoder
from croco.models.memory import halve_budget, with_less_memory
from croco.models.model_files import context_of
from croco.models.prefix_forward import Way
from croco.models.proofs import TRIAL_TOKENS, decoder_disagrees, scoring_way
from croco.models.protocols import Completion, Decoding, Request, ScoreRequest
from croco.models.stop_strings import Stops, ends_of

logger = logging.getLogger(__name__)


def _facts(model: Any) -> dict[str, Any]:
    return {"engine": "transformers", "device": str(model.device), "dtype": str(model.dtype)}


def check_ids(model: Any, ids: Sequence[int], what: str) -> None:
    """Raise UserError for a token that the model has no embedding for: a tokenizer may have more of them."""
    rows = model.get_input_embeddings().num_embeddings
    if ids and max(ids) >= rows:
        raise UserError(
            f"{what} has the token {max(ids)}, but {model.name_or_path!r} has embeddings for {rows} tokens only, "
            f"expected the tokenizer and template that it was trained with"
        )


class HFSampler:
    """Samples with a loaded causal model: shared prompts where the architecture allows it, else prompt by prompt.
    `path` is "shared-prefix" or "plain", and `reason` why, when it is not the fast one."""

    def __init__(self, model: Any, tokenizer: Any, token_budget: int = 32768, name: str = "") -> None:
        self.model, self.tokenizer, self.token_budget = model, tokenizer, token_budget
        self.name = name or str(tokenizer.name_or_path)
        self.max_context = context_of(model.config)
        self.end_tokens = end_ids(tokenizer, model.generation_config)
        self.facts = _facts(model)
        self.proven_tokens = TRIAL_TOKENS
        self._choose(unsupported(model) or decoder_disagrees(model))

    def _choose(self, reason: str | None) -> None:
        self.reason, self.path = reason, "plain" if reason else "shared-prefix"
        self.facts |= {"sampler": self.path, "reason": reason}
        if reason:
            logger.warning("%s is sampled prompt by prompt, which is slower, because %s", self.name, reason)

    def _prove(self, tokens: int) -> None:
        """Try the fast path past every boundary that sequences of so many tokens meet, if that was not done."""
        if any(self.proven_tokens < length <= tokens for length in boundaries(self.model.config)):
            self.proven_tokens = tokens
            if self.path == "shared-prefix":
                self._choose(decoder_disagrees(self.model, tokens))

    @torch.inference_mode()
    def sample(
        self, requests: Sequence[Request], decoding: Decoding
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (key, completions) as requests finish; the token budget is halved whenever memory runs out."""
        for request in requests:
            if not 0 < len(request.prompt_ids) < self.max_context:
                raise UserError(
                    f"request {request.key}: found a prompt of {len(request.prompt_ids)} tokens, "
                    f"expected 1 to {self.max_context - 1}, the context of {self.name}"
                )
            check_ids(self.model, request.prompt_ids, request.name or f"request {request.key}")
        left = [request for request in requests if request.seeds]
        self._prove(max((len(request.prompt_ids) for request in left), default=0) + decoding.max_new_tokens)
        while left:
            done: set[int] = set()
            try:
                for index, samples in self._run(left, decoding):
                    done.add(index)
                    yield left[index].key, samples
            except (torch.OutOfMemoryError, RuntimeError) as error:
                halve_budget(self, error, least=decoding.max_new_tokens)
            left = [request for index, request in enumerate(left) if index not in done]

    def _run(self, requests: list[Request], decoding: Decoding) -> Iterator[tuple[int, list[Completion]]]:
        stops = Stops(self.tokenizer, decoding.stop) if decoding.stop else None
        ends = self.end_tokens | ends_of(self.tokenizer, decoding.stop)
        if self.path == "plain":
            longest = max(len(request.prompt_ids) for request in requests) + decoding.max_new_tokens
            rows = max(1, self.token_budget // longest)
            return plain_decoder.sample(self.model, ends, decoding, requests, self.max_context, rows, stops)
        decoder = ContinuousBatchDecoder(
            self.model, ends, decoding, requests, self.max_context, self.token_budget, stops
        )
        return decoder.run()


class _Scoring:
    """How a network computes many sequences: with shared prefixes, whole in batches, or whole and one by one."""

    def __init__(self, model: Any, network: Any, name: str, token_budget: int) -> None:
        self.model, self.network, self.name, self.token_budget = model, network, name, token_budget
        self.max_context = context_of(model.config)
        self.facts, self.proven_tokens = _facts(network), TRIAL_TOKENS
        self._choose(*scoring_way(network))

    def _choose(self, way: Way, reason: str | None) -> None:
        self.way, self.reason = way, reason
        alone = depends_on_batch(self.network.config)
        whole = "one by one" if alone else "whole sequences"
        names = {"packed": "packed rows", "stored": "shared-prefix", "whole": whole}
        self.facts |= {"scorer": names[way], "reason": reason}
        if reason:
            how = "without sharing prompts" if way == "whole" else "not in packed rows"
            logger.warning("%s scores %s, which is slower, because %s", self.name, how, reason)

    def _prove(self, requests: Sequence[ScoreRequest]) -> None:
        """Try shared prefixes past every boundary that these sequences meet, if that was not done."""
        longest = max(
            (len(one.prompt_ids) + len(ids) for one in requests for ids in one.completions), default=0
        )
        for one in requests:
            for ids in (one.prompt_ids, *one.completions):
                check_ids(self.network, ids, "a conversation")
        if any(self.proven_tokens < length <= longest for length in boundaries(self.network.config)):
            self.proven_tokens = longest
            if self.way != "whole":
                self._choose(*scoring_way(self.network, longest))


class HFScorer(_Scoring):
    """Scores with a loaded sequence classifier of one logit: the raw logit of each conversation."""

    def __init__(self, model: Any, tokenizer: Any, token_budget: int = 16384, name: str = "") -> None:
        network = getattr(model, model.base_model_prefix, model)
        super().__init__(model, network, name or str(tokenizer.name_or_path), token_budget)

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        """Raw logits in the order of the requests; what they share is found here, `prompt_ids` may be empty."""
        self._prove(requests)
        return with_less_memory(
            self, lambda budget: reward_logits.logits(self.model, requests, budget, self.way)
        )


class HFLikelihood(_Scoring):
    """Scores with the policy itself: the log-probability of a completion, its end token included, mean or sum over
    tokens."""

    def __init__(
        self, model: Any, tokenizer: Any, token_budget: int = 16384, name: str = "", mean: bool = True
    ) -> None:
        self.tokenizer, self.mean = tokenizer, mean
        super().__init__(model, model, name or str(tokenizer.name_or_path), token_budget)

    def score(
        self, requests: Sequence[ScoreRequest], ended: Sequence[Sequence[bool]] | None = None
    ) -> list[list[float]]:
        """Log-probabilities in the order of the requests; `ended` False marks completions without an end token."""
        self._prove(requests)
        sums = with_less_memory(
            self,
            lambda budget: logprobs.completion_logps(
                self.model, self.tokenizer, requests, ended, budget, self.way
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
