"""Transformers in process, on a CPU or one GPU: loading models, and the sampler and scorers that run on them.

Loading is strict: a directory that is no model, weights that do not fit the architecture or a reward model with
another number of logits than one is a UserError before anything runs. Leaves out several devices and quantisation.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from croco.engines.base import Decoding, Request, Sampled, ScoreRequest
from croco.engines.memory import halve_budget, out_of_memory, with_less_memory
from croco.errors import UserError
from croco.identity import check_adapter, local_model
from croco.sampling import plain
from croco.sampling.architecture import disagreement, unsupported
from croco.sampling.chat import end_ids
from croco.sampling.shared_prefix import Decoder
from croco.sampling.stops import Stops
from croco.scoring import classifier, likelihood, prefix_forward

logger = logging.getLogger(__name__)


def resolve_model(name: str, key: str = "model") -> str | Path:
    """The place a model's name stands for: a directory (of the package for "lab:policy" and "lab:reward"), or the hub
    id itself. Raises UserError naming the key for a path that is no model directory."""
    return local_model(name, key) or name


def pick_device(device: str = "auto") -> torch.device:
    """The device named, or for "auto" a CUDA device when there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype named; for "auto" bfloat16 on a GPU and float32 on a CPU, where exactness costs little."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(
            f"dtype {dtype!r}: found no such floating point type, expected auto, float32 or bfloat16"
        )
    return found


def load_tokenizer(
    model: str,
    revision: str | None = None,
    chat_template: Path | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The model's tokenizer, its chat template replaced by the file's if one is given."""
    from transformers import AutoTokenizer

    place = resolve_model(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model {model!r}: its tokenizer does not load: {_first_line(error)}") from error
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"chat template {str(chat_template)!r}: cannot be read: {_first_line(error)}"
            ) from error
    return tokenizer


def load_policy(
    model: str,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    adapter: Path | None = None,
    chat_template: Path | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A causal model in eval mode and its tokenizer; an adapter folder, if given, is merged in memory."""
    from transformers import AutoModelForCausalLM

    if adapter is not None:
        check_adapter(adapter, model, revision)
    tokenizer = load_tokenizer(model, revision, chat_template, trust_remote_code)
    policy, missing = _load(AutoModelForCausalLM, model, revision, dtype, device, trust_remote_code)
    if missing:
        raise UserError(
            f"model {model!r}: found no weights for {missing[0]}, expected a whole causal language model"
        )
    if adapter is not None:
        from croco.training.lora import load_adapter

        policy = load_adapter(policy, adapter)
    return policy.eval(), tokenizer


def load_reward(
    model: str,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A sequence classifier with exactly one logit, in eval mode, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(model, revision, None, trust_remote_code)
    reward, missing = _load(
        AutoModelForSequenceClassification, model, revision, dtype, device, trust_remote_code
    )
    if missing:
        raise UserError(
            f"reward model {model!r}: found no weights for {missing[0]}, expected a sequence classifier"
        )
    if reward.config.num_labels != 1:
        raise UserError(f"reward model {model!r}: found {reward.config.num_labels} logits, expected one")
    return reward.eval(), tokenizer


def max_context(model: Any) -> int:
    """The number of positions the model was made for."""
    positions: int = model.config.get_text_config().max_position_embeddings
    return positions


def _load(
    auto: Any, model: str, revision: str | None, dtype: str, device: str, trust_remote_code: bool
) -> tuple[Any, list[str]]:
    """The model on its device and the parameters its files had no weights for (transformers only warns)."""
    place, where = resolve_model(model), pick_device(device)
    try:
        with _quiet_loading():
            loaded, report = auto.from_pretrained(
                place,
                revision=revision,
                dtype=pick_dtype(dtype, where),
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
            loaded = loaded.to(where)
    except (OSError, ValueError, KeyError, RuntimeError, MemoryError, SafetensorError) as error:
        if out_of_memory(error):
            raise UserError(f"model {model!r}: its weights do not fit in the memory of {where}") from error
        raise UserError(f"model {model!r}: does not load as {auto.__name__}: {_first_line(error)}") from error
    return loaded, sorted(report["missing_keys"])


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without transformers' bars and tables: what is wrong with a model is said in our one sentence."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


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
            return plain.sample(
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
            self, lambda budget: classifier.logits(self.model, requests, budget, self.share)
        )


class HFLikelihood:
    """Scores with the policy itself: the mean log-probability of a completion's tokens, its end token included."""

    def __init__(self, model: Any, tokenizer: Any, token_budget: int = 16384, name: str = "") -> None:
        self.model, self.tokenizer, self.token_budget = model, tokenizer, token_budget
        self.name = name or str(tokenizer.name_or_path)
        self.max_context = max_context(model)
        self.share, self.facts = _sharing(model, self.name)

    def score(
        self, requests: Sequence[ScoreRequest], ended: Sequence[Sequence[bool]] | None = None
    ) -> list[list[float]]:
        """Mean log-probabilities in the order of the requests; `ended` False marks completions without an end token."""
        sums = with_less_memory(
            self,
            lambda budget: likelihood.completion_logps(
                self.model, self.tokenizer, requests, ended, budget, self.share
            ),
        )
        return [
            [
                total / (len(request.completions[i]) + (ended is None or ended[k][i]))
                for i, total in enumerate(sums[k])
            ]
            for k, request in enumerate(requests)
        ]
