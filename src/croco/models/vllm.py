"""vLLM in process: a sampler, with an adapter if there is one, and a scorer of raw logits.

Token ids go in and come out, so the chat template stays in its one place and there is no second BOS. A prompt is one
request for all of its completions, and the engine is fed just so far ahead that it never runs dry: requests are yielded
as they finish, and a shard is written while the next is computed. The engine is a process of vLLM's own that holds the
model; it ends with the sampler or scorer that it belongs to, so the next model finds the memory free.

Seeds: vLLM draws all completions from one stream, which starts from the engine's own seed (another for every stage,
start and replica). What comes out then depends on the batch too, so the table's `seed` is the engine's: it says where a
completion came from and cannot draw it again. `per_request_seeds` gives each completion a seed of its own, which is
slower and still does not make it independent of the batch's rounding.

Leaves out logit processors, structured output, quantisation, and several adapters in one engine.
"""

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

# vLLM reads these when it is imported or started; what the environment already says stands
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its lines are for when it fails
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # Polars and torch do not survive a fork

import torch
import vllm
from transformers import AutoModelForCausalLM
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from croco.config.models import Causal, Model, Reward
from croco.config.runtime import Vllm
from croco.errors import UserError
from croco.models import orphan
from croco.models.chat_template import end_ids
from croco.models.config import load_config, read_part
from croco.models.loading import load_tokenizer, pick_device, pick_dtype, resolve_model
from croco.models.protocols import Decoding, Request, Sampled, ScoreRequest
from croco.models.stop_strings import Stops, finished
from croco.storage.seeds import digest

CPU_CACHE_GIB = "4"  # of keys and values, where there is no GPU and VLLM_CPU_KVCACHE_SPACE does not say
ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM reserves room for one of these
DIED = "vLLM's engine died, of what its own lines say; shards that are done stay, the same command goes on"
TEMPERATURES = (0.01, 2.0)  # below it vLLM quietly takes 0.01, above it refuses
OPEN: WeakSet["_Engine"] = WeakSet()
Prompt = tuple[str, list[int], vllm.SamplingParams]  # with the name that its output has


def open_policy(
    policy: Causal, settings: Vllm, seed: int, replica: int = 0, adapter: Path | None = None
) -> tuple["VLLMSampler", Any]:
    """A causal model in an engine of its own, with an adapter if one is given, and its tokenizer.

    `seed` and `replica` make the engine's seed. Raises UserError for a model, adapter or context that vLLM refuses.
    """
    template = Path(policy.chat_template) if policy.chat_template else None
    tokenizer = load_tokenizer(policy.model, policy.revision, template, policy.trust_remote_code)
    if settings.per_request_seeds and not torch.cuda.is_available():
        raise UserError(
            "runtime.vllm.per_request_seeds is true, but without a GPU vLLM fails with them, expected false"
        )
    engine = _start(
        policy,
        settings,
        seed=digest(seed, "engine", replica) % 2**32,  # numpy is seeded with it too, and takes 32 bits
        max_model_len=settings.max_model_len,
        enable_prefix_caching=True,
        **({} if adapter is None else _room_for(adapter, policy)),
    )
    return VLLMSampler(engine, tokenizer, policy.model, settings.per_request_seeds, adapter), tokenizer


def open_reward(reward: Reward, settings: Vllm) -> tuple["VLLMScorer", Any]:
    """A sequence classifier of one logit in an engine of its own, and its tokenizer.

    The engine's context is `reward.max_tokens`, or the model's own where that is shorter. Raises UserError for a model
    that vLLM refuses or that has another number of logits.
    """
    tokenizer = load_tokenizer(reward.model, reward.revision, None, reward.trust_remote_code)
    config = load_config(reward, "reward")
    if config.num_labels != 1:
        raise UserError(f"reward model {reward.model!r}: found {config.num_labels} logits, expected one")
    context = min(reward.max_tokens, config.get_text_config().max_position_embeddings)
    engine = _start(reward, settings, max_model_len=context, runner="pooling", convert="classify")
    return VLLMScorer(engine, reward.model), tokenizer


def _room_for(adapter: Path, policy: Causal) -> dict[str, Any]:
    """What an engine must reserve for an adapter, once it is known to fit: vLLM takes one of another base's shapes."""
    from croco.models.lora import load_adapter

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that weights copied to nowhere are not there
        config = load_config(policy, "policy")
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=policy.trust_remote_code)
        load_adapter(model, adapter)
    found = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max([found["r"], *found.get("rank_pattern", {}).values()])
    room = next((room for room in ADAPTER_RANKS if room >= rank), None)
    if room is None:
        raise UserError(f"the adapter in {adapter} has rank {rank}, vLLM takes at most {ADAPTER_RANKS[-1]}")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}


def _start(model: Model, settings: Vllm, **options: Any) -> vllm.LLM:
    """An engine in a process of its own, on as many GPUs as it is told to take, or on the CPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
    os.environ[orphan.PARENT] = str(os.getpid())
    dtype = pick_dtype(model.dtype, pick_device())
    try:
        return vllm.LLM(
            str(resolve_model(model.model)),
            revision=model.revision,
            tokenizer_revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=str(dtype).removeprefix("torch."),
            tensor_parallel_size=settings.tensor_parallel,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            enforce_eager=settings.enforce_eager,
            use_tqdm_on_load=False,
            **options,
        )
    except Exception as error:  # bad weights alone come as ValueError, RuntimeError or MemoryError
        raise UserError(f"model {model.model!r}: vLLM does not start with it: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """An error of vLLM's on one line."""
    return f"{type(error).__name__} {' '.join(str(error).split())[:300]}".strip()


class _Engine:
    """What sampler and scorer share: the engine's process, which ends with this object."""

    def __init__(self, llm: vllm.LLM, name: str) -> None:
        self.llm, self.engine, self.name = llm, llm.llm_engine, name
        OPEN.add(self)
        config = self.engine.vllm_config
        self.max_context: int = config.model_config.max_model_len
        self.facts: dict[str, Any] = {
            "engine": "vllm",
            "vllm": vllm.__version__,
            "device": config.device_config.device_type,
            "dtype": str(config.model_config.dtype),
            "max_model_len": self.max_context,
            "tensor_parallel": config.parallel_config.tensor_parallel_size,
        }

    def close(self) -> None:
        """End the engine's process; harmless a second time."""
        self.engine.engine_core.shutdown()

    def __del__(self) -> None:
        self.close()


class VLLMSampler(_Engine):
    """Samples with a causal model in vLLM."""

    def __init__(
        self,
        llm: vllm.LLM,
        tokenizer: Any,
        name: str,
        per_request_seeds: bool = False,
        adapter: Path | None = None,
    ) -> None:
        super().__init__(llm, name)
        model = self.engine.model_config
        self.tokenizer, self.seed, self.per_request_seeds = tokenizer, model.seed, per_request_seeds
        self.end_tokens = end_ids(tokenizer, SimpleNamespace(**model.try_get_generation_config()))
        self.rows_ahead = 2 * self.engine.vllm_config.scheduler_config.max_num_seqs
        self.adapter: LoRARequest | None = None
        self.facts |= {"engine_seed": self.seed, "per_request_seeds": per_request_seeds}
        if adapter is not None:
            self._put_on(adapter)

    def sample(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[tuple[int, list[Sampled]]]:
        """Yield (key, completions) as requests finish. Raises UserError where the engine dies or a prompt fills it."""
        low, high = TEMPERATURES
        if decoding.temperature != 0 and not low <= decoding.temperature <= high:
            raise UserError(f"temperature {decoding.temperature}: vLLM takes 0 and {low} to {high}")
        for request in requests:
            if not 0 < len(request.prompt_ids) < self.max_context:
                raise UserError(
                    f"request {request.key}: found a prompt of {len(request.prompt_ids)} tokens, "
                    f"expected 1 to {self.max_context - 1}, the context of {self.name} in vLLM"
                )
        asked = {str(index): request for index, request in enumerate(requests) if request.seeds}
        prompts = ((name, one.prompt_ids, self._params(one, decoding)) for name, one in asked.items())
        for output in self._stream(prompts, self.adapter):
            request = asked[output.request_id]
            drawn = output.outputs
            if decoding.temperature == 0:  # greedy completions of one prompt are one
                drawn = drawn * len(request.seeds)
            yield request.key, [self._sampled(i, one, request, decoding) for i, one in enumerate(drawn)]

    def _params(self, request: Request, decoding: Decoding) -> vllm.SamplingParams:
        return vllm.SamplingParams(
            n=len(request.seeds) if decoding.temperature > 0 else 1,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k,
            max_tokens=min(decoding.max_new_tokens, self.max_context - len(request.prompt_ids)),
            stop=list(decoding.stop),
            stop_token_ids=sorted(self.end_tokens),
            seed=request.seeds[0] if self.per_request_seeds else None,  # vLLM adds each one's number
            detokenize=bool(decoding.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _stream(self, prompts: Iterable[Prompt], adapter: LoRARequest | None) -> Iterator[Any]:
        """Outputs of prompts as they finish, with the engine fed `rows_ahead` rows."""
        waiting = iter(prompts)
        open_rows: dict[str, int] = {}
        try:
            while True:
                while sum(open_rows.values()) < self.rows_ahead and (prompt := next(waiting, None)):
                    name, ids, params = prompt
                    self.engine.add_request(name, tokens_input(ids), params, lora_request=adapter)
                    open_rows[name] = params.n
                if not open_rows:
                    return
                for output in self.engine.step():
                    if output.finished:
                        del open_rows[output.request_id]
                        yield output
        except EngineDeadError as error:
            open_rows = {}
            raise UserError(f"{self.name}: {DIED}") from error
        finally:
            if open_rows:  # the caller has stopped listening
                self.engine.abort_request(list(open_rows))

    def _sampled(self, number: int, output: Any, request: Request, decoding: Decoding) -> Sampled:
        seed = request.seeds[0] + number if self.per_request_seeds else self.seed
        ids, reason = list(output.token_ids), output.finish_reason
        if reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a completion with {reason!r}")
        if reason == "length":
            return Sampled(ids, reason, seed)
        if isinstance(output.stop_reason, str):
            return finished(ids, reason, seed, Stops(self.tokenizer, decoding.stop))
        return Sampled(ids[:-1], reason, seed)

    def _put_on(self, adapter: Path) -> None:
        """Sample with this adapter from now on. Raises UserError when vLLM refuses it or it changes nothing there."""
        place = str(adapter.resolve())
        request = LoRARequest(place, 1 + digest(place) % 2**31, place)
        try:
            self.engine.add_lora(request)
        except Exception as error:  # what the engine's process raised comes as this
            raise UserError(f"the adapter in {adapter}: vLLM refuses it: {_reason(error)}") from error
        if self._logps(request) == self._logps(None):
            raise UserError(f"the adapter in {adapter} changes nothing in vLLM, expected other probabilities")
        self.adapter = request

    def _logps(self, adapter: LoRARequest | None) -> list[float]:
        """Log-probabilities of a few tokens, by which a model is told from the same model with an adapter."""
        ids = list(range(min(32, self.engine.model_config.get_vocab_size(), self.max_context - 1)))
        params = vllm.SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY
        )
        (output,) = self._stream([("probe", ids, params)], adapter)
        return [at[token].logprob for at, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]


class VLLMScorer(_Engine):
    """Scores with a sequence classifier of one logit in vLLM: the raw logit of each conversation."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        """Raw logits in the order of the requests and their completions."""
        config = self.engine.model_config.hf_config.get_text_config()
        prompts = [
            {"prompt_token_ids": read_part(request.prompt_ids + completion, config.pad_token_id)}
            for request in requests
            for completion in request.completions
        ]
        if not prompts:
            return [[] for _ in requests]
        try:
            outputs = self.llm.classify(
                prompts, pooling_params=vllm.PoolingParams(use_activation=False), use_tqdm=False
            )
        except EngineDeadError as error:
            raise UserError(f"{self.name}: {DIED}") from error
        scores = iter([output.outputs.probs[0] for output in outputs])
        return [[next(scores) for _ in request.completions] for request in requests]
