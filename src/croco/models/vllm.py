"""The engine "vllm": a sampler or scorer on a vLLM server of ours, which ends with it.

vLLM draws all completions from one stream, from the engine's own seed (another for every stage, start and replica), so
the table's `seed` says where a completion came from and cannot draw it again. `per_request_seeds` is slower and still
does not make completions independent of the batch's rounding. Leaves out quantisation, and several adapters in one
server."""

import json
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from croco.config.models import Causal, Model, RewardPart
from croco.config.runtime import Server, Vllm
from croco.errors import UserError
from croco.models.http_client import Call
from croco.models.model_files import context_of, load_config
from croco.models.openai_scorer import ServerScorer
from croco.models.openai_server import Connection, ServerSampler, token_sampler
from croco.models.vllm_server import model_words, reason, serve
from croco.storage.seeds import digest

START_SECONDS = 3600.0  # that it has to load a model
ROWS_AHEAD = 512  # completions asked for at once: twice what vLLM computes together by default
ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM reserves room for one of these
TEMPERATURES = (0.01, 2.0)  # below it vLLM quietly takes 0.01, above it refuses
TUNED = "tuned"  # the name that an adapter is served under
_servers: list[weakref.finalize] = []  # each ends one, with its sampler or scorer at the latest


def release() -> None:
    """End the servers of this process, which hold a GPU's memory."""
    while _servers:
        _servers.pop()()


def open_policy(
    policy: Causal, settings: Vllm, seed: int, replica: int = 0, adapter: Path | None = None
) -> tuple[ServerSampler, Any]:
    """A causal model in a server of its own, with an adapter if one is given, and its tokenizer. `seed` and `replica`
    make the engine's seed. Raises UserError for a model, adapter or context that vLLM refuses."""
    from croco.models.loading import load_tokenizer, pick_device

    template = policy.template
    tokenizer = load_tokenizer(policy.model, policy.revision, template, policy.trust_remote_code)
    if settings.per_request_seeds and pick_device().type == "cpu":
        raise UserError(
            "runtime.vllm.per_request_seeds is true, but without a GPU vLLM fails with them, expected false"
        )
    engine_seed = digest(seed, "engine", replica) % 2**32  # numpy is seeded with it too, and takes 32 bits
    words = ["--enable-prefix-caching", "--seed", str(engine_seed)]
    if settings.max_model_len is not None:
        words += ["--max-model-len", str(settings.max_model_len)]
    if adapter is not None:
        words += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(_room_for(adapter, policy))]
        words += ["--lora-modules", f"{TUNED}={adapter.resolve()}"]
    with ExitStack() as stack:
        connection = stack.enter_context(_connected(policy, settings, words, settings.per_request_seeds))
        if adapter is not None:
            base, connection.served = connection.served, TUNED
            _check_it_counts(connection, base, adapter)
        connection.facts |= {"engine_seed": engine_seed, "per_request_seeds": settings.per_request_seeds}
        sampler = token_sampler(connection, policy, tokenizer)
        sampler.seed = None if settings.per_request_seeds else engine_seed
        sampler.rows_ahead, sampler.temperatures = ROWS_AHEAD, TEMPERATURES
        _servers.append(weakref.finalize(sampler, stack.pop_all().close))
        return sampler, tokenizer


def open_reward(reward: RewardPart, settings: Vllm) -> tuple[ServerScorer, Any]:
    """A sequence classifier of one logit in a server of its own, and its tokenizer; the context is `reward.max_tokens`,
    or the model's. Raises UserError for a model that vLLM refuses or that has another number of logits."""
    from croco.models.loading import load_tokenizer

    tokenizer = load_tokenizer(reward.model, reward.revision, None, reward.trust_remote_code)
    config = load_config(reward, "reward")
    if config.num_labels != 1:
        raise UserError(f"reward model {reward.model!r}: found {config.num_labels} logits, expected one")
    context = min(reward.max_tokens, context_of(config))
    words = ["--runner", "pooling", "--convert", "classify", "--max-model-len", str(context)]
    with ExitStack() as stack:
        connection = stack.enter_context(_connected(reward, settings, words))
        probe = tokenizer("Ja.", add_special_tokens=False)["input_ids"]
        pad = config.get_text_config().pad_token_id
        scorer = ServerScorer(connection, reward.model, probe, pad)
        _servers.append(weakref.finalize(scorer, stack.pop_all().close))
        return scorer, tokenizer


@contextmanager
def _connected(
    model: Model, settings: Vllm, words: Sequence[str], seeds: bool = False
) -> Iterator[Connection]:
    """A running server of this model, and the connection to it; its log is kept only where it ends badly."""
    from croco.models.loading import pick_device, pick_dtype

    device = pick_device()
    dtype = str(pick_dtype(model.dtype, device)).removeprefix("torch.")
    log = Path(tempfile.mkdtemp(prefix="croco-vllm-")) / "log.txt"
    serving = serve(
        model_words(model) + list(words), model.model, dtype,
        vllm=settings, python=settings.python, seconds=START_SECONDS, log=log,
    )  # fmt: skip
    try:
        with serving as server:

            def gone() -> str | None:
                return None if server.alive else f"vLLM's server ended: {reason(log)} (see {log})"

            asked = Server(
                url=server.url, seeds=seeds, retries=3, concurrency=ROWS_AHEAD, timeout_seconds=1e6
            )
            connection = Connection(asked, "vllm", model.model, place="vLLM", gone=gone)
            connection.facts |= {
                "engine": "vllm",
                "device": device.type,
                "dtype": f"torch.{dtype}",
                "max_model_len": server.max_context,
                "tensor_parallel": settings.tensor_parallel,
            }
            yield connection
    except UserError as error:
        raise UserError(f"model {model.model!r}: {error} (see {log})") from None
    shutil.rmtree(log.parent, ignore_errors=True)


def _room_for(adapter: Path, policy: Causal) -> int:
    """The rank to reserve room for, once the adapter is known to fit: vLLM takes one of another base's shapes."""
    import torch
    from transformers import AutoModelForCausalLM

    from croco.models.lora import load_adapter

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that weights copied to nowhere are not there
        config = load_config(policy, "policy")
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=policy.trust_remote_code)
        load_adapter(model, adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max([settings["r"], *settings.get("rank_pattern", {}).values()])
    room = next((room for room in ADAPTER_RANKS if room >= rank), None)
    if room is None:
        raise UserError(f"the adapter in {adapter} has rank {rank}, vLLM takes at most {ADAPTER_RANKS[-1]}")
    return room


def _check_it_counts(connection: Connection, base: str, adapter: Path) -> None:
    """Raise UserError for an adapter that changes no probability of a few tokens."""

    def logprobs(name: str) -> Any:
        body = {
            "model": name,
            "prompt": list(range(8)),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
        }
        read = lambda answer: answer["choices"][0]["prompt_logprobs"]  # noqa: E731
        return connection.client.one(
            Call(None, f"{connection.url}/completions", body, read, "a trial prompt")
        )

    if logprobs(base) == logprobs(TUNED):
        raise UserError(f"the adapter in {adapter} changes nothing in vLLM, expected other probabilities")
