"""`[runtime]` of the recipe: on which engines, devices and machines a run computes, never what."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, model_validator

Positive = Annotated[int, Field(gt=0, le=10**12)]
Count = Annotated[int, Field(gt=0, le=4096)]  # of processes, threads, GPUs
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(gt=0, le=10**8)]
EngineName = Literal["transformers", "vllm", "server"]


def _check_replicas(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 4096):
        return value
    raise ValueError(f"found {value!r}, expected a number of workers (at most 4096) or 'auto'")


Replicas = Annotated[int | Literal["auto"], PlainValidator(_check_replicas)]


def _check_tokens(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 10**9):
        return value
    raise ValueError(f"found {value!r}, expected a number of tokens or 'auto'")


def _check_switch(value: Any) -> Any:
    if value == "auto" or isinstance(value, bool):
        return value
    raise ValueError(f"found {value!r}, expected true, false or 'auto'")


Tokens = Annotated[int | Literal["auto"], PlainValidator(_check_tokens)]
Switch = Annotated[bool | Literal["auto"], PlainValidator(_check_switch)]


def _check_address(url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for what is no number, or above 65,535
        (parts.hostname or "").encode("idna")
    except ValueError as error:
        raise ValueError(f"'{url}' is no address: {error}") from None
    if url and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise ValueError(f"'{url}' is no address, expected one like 'http://localhost:8000/v1'")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("expected an address without user, query or fragment (see key_variable)")
    return url


def _check_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", device):
        raise ValueError(f"'{device}' is no device, expected 'auto', 'cpu', 'cuda', 'cuda:0' or 'mps'")
    return device


Address = Annotated[str, AfterValidator(_check_address)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class Engines(Section):
    """Which engine each generating stage runs on."""

    translate: EngineName = "transformers"
    sample: EngineName = "transformers"
    score: EngineName = "transformers"
    evaluate: EngineName = "transformers"
    judge: EngineName = "transformers"


class Vllm(Section):
    """vLLM in process, for every role that runs on it."""

    tensor_parallel: Count = 1  # GPUs that one engine takes
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9  # of each GPU, weights included
    # of prompt and completion, null is the model's own: a longer prompt goes to the ledger, a longer completion is cut
    max_model_len: Positive | None = None
    enforce_eager: bool = False  # starts faster and runs slower
    per_request_seeds: bool = False  # each completion from a seed of its own; slower, and not on a CPU


class Server(Section):
    """An OpenAI-compatible server for one role. Its key is in the environment; the recipe has the variable's name."""

    url: Address = ""  # with what it ends in, as in "http://localhost:8000/v1"
    model: str | None = None  # the name it is served under; null is the recipe's own
    adapters: dict[str, str] = {}  # arm -> the name that its adapter is served under (evaluate)
    api: Literal["completions", "chat"] = "completions"  # token ids, or messages (no tokenizer needed here)
    dialect: Literal["vllm", "openai"] = "vllm"  # "openai" sends no field that OpenAI's own API lacks
    completions_per_request: Positive | None = None  # null is all of a prompt's; 1 where n > 1 is refused
    seeds: bool = True  # send a seed with every request
    concurrency: Count = 16  # requests at once, each for all completions of a prompt
    timeout_seconds: Seconds = 1800.0  # of one request, waiting in the server included
    retries: Annotated[int, Field(ge=0, le=1000)] = 8  # of one request, before the stage stops
    retry_seconds: Seconds = 1.0  # before the first retry; doubles, up to a minute
    key_variable: str | None = None  # the environment variable that holds the key
    max_context: Positive | None = None  # tokens; null is what the server says
    trust_scores: bool = False  # take scores from a server that cannot show that they are raw logits


class EuroEvalRuntime(Section):
    """Where EuroEval runs, and what serves the policies that it asks."""

    python: str = ".venv-euroeval/bin/python"  # of its environment (`croco euroeval install`)
    # arm -> the address of a server of its policy under the name "openai/croco-ARM"; a vLLM of ours serves the others
    urls: dict[str, Address] = {}
    key_variable: str | None = None  # the environment variable that holds the key of those servers
    vllm_python: str | None = None  # of an environment with vLLM; null is this one
    start_seconds: Annotated[int, Field(gt=0, le=10**8)] = 1800  # that our server may take to load
    keep_going: bool = (
        False  # a dataset that EuroEval cannot finish goes to the ledger and does not stop the stage
    )


class Servers(Section):
    translate: Server = Server()
    sample: Server = Server()
    score: Server = Server()
    evaluate: Server = Server()
    judge: Server = Server()


class Ray(Section):
    """What each worker takes of a Ray cluster."""

    address: str | None = (
        None  # of a running cluster, "auto" for this machine's; null starts one on this machine
    )
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None  # null is what the engine needs
    memory_gib_per_worker: Annotated[float, Field(gt=0)] | None = None  # null reserves none


class Runtime(Section):
    """How, never what: nothing here changes the tables, so nothing here enters a fingerprint."""

    engines: Engines = Engines()
    vllm: Vllm = Vllm()
    euroeval: EuroEvalRuntime = EuroEvalRuntime()
    servers: Servers = Servers()
    executor: Literal["local", "ray"] = "local"  # processes on this machine, or a Ray cluster
    replicas: Replicas = (
        1  # workers, each with an engine of its own; "auto" is one per GPU (or group of GPUs)
    )
    ray: Ray = Ray()
    seeds_at_once: Count = 1  # of a study, each in a process of its own
    device: Annotated[str, AfterValidator(_check_device)] = "auto"  # "cpu", "cuda", "cuda:1", "mps"
    token_budget: Positive = 16384  # tokens per sampling or scoring batch
    # tokens per training forward; "auto" is what the free memory holds, of 16384 at most
    micro_batch_tokens: Tokens = 4096
    shard_prompts: Positive = 64
    threads: Count | None = None  # of torch; null leaves torch's own choice
    gradient_checkpointing: Switch = False  # "auto" is where it is needed to fit
    reference_table: bool = True  # kept for all arms; false: at every step, with the adapter switched off
    train_processes: Replicas = 1  # that tune one policy together; "auto" is one per GPU
    accelerate_config: str | None = None  # a file of `accelerate config`: FSDP, DeepSpeed, several machines
    trackers: Annotated[tuple[str, ...], Field(strict=False)] = ()  # "tensorboard", "wandb", "trackio", …
    checkpoint_minutes: Annotated[float, Field(gt=0, le=10**6)] = 15.0  # of tuning that a kill may cost

    @model_validator(mode="after")
    def _servers_have_addresses(self) -> Runtime:
        for role, engine in self.engines:
            if engine == "server" and not getattr(self.servers, role).url:
                raise ValueError(f"engines.{role} = 'server', but servers.{role}.url is missing")
        return self
