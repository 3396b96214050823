"""`[runtime]` of the recipe: on which engines, devices and machines a run computes, never what."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, model_validator

from croco import languages
from croco.errors import UserError

Positive = Annotated[int, Field(gt=0, le=10**8)]
Count = Annotated[int, Field(gt=0, le=4096)]  # of processes, threads, GPUs
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(gt=0, le=10**8)]
# "auto": vLLM on a GPU where it is, else transformers
EngineName = Literal["auto", "transformers", "vllm", "server"]


def _or_auto(kind: type[int], most: int, expected: str) -> PlainValidator:
    """A number from 1 to `most` (or a truth value), or "auto"; one message for all that it is not."""

    def check(value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most
        if value == "auto" or (isinstance(value, bool) if kind is bool else number):
            return value
        raise ValueError(f"found {value!r}, expected {expected} or 'auto'")

    return PlainValidator(check, json_schema_input_type=kind | Literal["auto"])


Replicas = Annotated[int | Literal["auto"], _or_auto(int, 4096, "a number of workers (at most 4096)")]
Tokens = Annotated[int | Literal["auto"], _or_auto(int, 10**8, "a number of tokens")]
Switch = Annotated[bool | Literal["auto"], _or_auto(bool, 1, "true, false")]


def _check_language(code: str) -> str:
    try:
        return languages.check(code)
    except UserError as error:
        raise ValueError(str(error)) from None


Language = Annotated[str, AfterValidator(_check_language)]


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
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,  # the text under a key is its description
    )


class Engines(Section):
    """Which engine each generating stage runs on."""

    translate: EngineName = "auto"
    """Of the translation model."""
    sample: EngineName = "auto"
    """Of the policy."""
    score: EngineName = "auto"
    """Of the reward model."""
    evaluate: EngineName = "auto"
    """Of the tuned policies."""
    judge: EngineName = "auto"
    """Of the judge."""


class VllmRole(Section):
    """What one role has otherwise; null is the value of `[runtime.vllm]`."""

    tensor_parallel: Count | None = None
    """GPUs that one engine takes."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of each GPU, weights included."""
    max_model_len: Positive | None = None
    """Tokens of prompt and completion."""


class Vllm(Section):
    """vLLM, started as a server of ours for every role that runs on it."""

    python: str | None = None
    """Of an environment with vLLM; null is this one."""
    tensor_parallel: Count = 1
    """GPUs that one engine takes."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Of each GPU, weights included."""
    max_model_len: Positive | None = None
    """Tokens of prompt and completion: a longer prompt goes to the ledger, a longer completion is cut."""
    enforce_eager: bool = False
    """Starts faster and runs slower."""
    per_request_seeds: bool = False
    """Each completion from a seed of its own; slower, and not on a CPU."""
    roles: dict[Literal["translate", "sample", "score", "evaluate", "judge"], VllmRole] = {}
    """What a role has otherwise: a large judge takes more GPUs than the policy."""

    def of(self, role: str) -> Vllm:
        own = next((settings for name, settings in self.roles.items() if name == role), VllmRole())
        return self.model_copy(update=own.model_dump(exclude_none=True))


class Server(Section):
    """An OpenAI-compatible server for one role. Its key is in the environment; the recipe has the variable's name."""

    url: Address = ""
    """With what it ends in, as in "http://localhost:8000/v1"."""
    model: str | None = None
    """The name it is served under; null is the recipe's own."""
    adapters: dict[str, str] = {}
    """Arm and the name that its adapter is served under (evaluate)."""
    api: Literal["completions", "chat"] = "completions"
    """Token ids, or messages (no tokenizer needed here)."""
    dialect: Literal["vllm", "openai"] = "vllm"
    """"openai" sends no field that OpenAI's own API lacks."""
    completions_per_request: Positive | None = None
    """Null is all of a prompt's; 1 where n > 1 is refused."""
    seeds: bool = True
    """Send a seed with every request."""
    concurrency: Count = 16
    """Requests at once, each for all completions of a prompt."""
    timeout_seconds: Seconds = 1800.0
    """Of one request, waiting in the server included."""
    retries: Annotated[int, Field(ge=0, le=1000)] = 8
    """Of one request, before the stage stops."""
    retry_seconds: Seconds = 1.0
    """Before the first retry; doubles, up to a minute."""
    key_variable: str | None = None
    """The environment variable that holds the key."""
    max_context: Positive | None = None
    """Tokens; null is what the server says."""
    trust_scores: bool = False
    """Take scores from a server that cannot show that they are raw logits."""


class EuroEvalRuntime(Section):
    """Where EuroEval runs, and what serves the policies that it asks."""

    python: str = ".venv-euroeval/bin/python"
    """Of its environment (`croco euroeval install`)."""
    urls: dict[str, Address] = {}
    """Arm and the address of a server of its policy, named "openai/croco-ARM"; a vLLM of ours serves the others."""
    key_variable: str | None = None
    """The environment variable that holds the key of those servers."""
    vllm_python: str | None = None
    """Of an environment with vLLM; null is this one."""
    start_seconds: Annotated[int, Field(gt=0, le=10**8)] = 1800
    """That our server may take to load."""
    keep_going: bool = False
    """A data set that EuroEval cannot finish goes to the ledger and does not stop the stage."""


class Servers(Section):
    """OpenAI-compatible servers, one per role."""

    translate: Server = Server()
    """Of the translation model."""
    sample: Server = Server()
    """Of the policy."""
    score: Server = Server()
    """Of the reward model."""
    evaluate: Server = Server()
    """Of the tuned policies."""
    judge: Server = Server()
    """Of the judge."""


class Ray(Section):
    """What each worker takes of a Ray cluster."""

    address: str | None = None
    """Of a running cluster, "auto" for this machine's; null starts one on this machine."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """Cores that a worker reserves."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """Null is what the engine needs."""
    memory_gib_per_worker: Annotated[float, Field(gt=0)] | None = None
    """Null reserves none."""


class Runtime(Section):
    """How, never what: nothing here changes the tables, so nothing here enters a fingerprint."""

    engines: Engines = Engines()
    """Which engine each role runs on."""
    vllm: Vllm = Vllm()
    """vLLM, for every role that runs on it."""
    euroeval: EuroEvalRuntime = EuroEvalRuntime()
    """Where EuroEval runs."""
    servers: Servers = Servers()
    """Addresses of roles on the engine "server"."""
    executor: Literal["local", "ray"] = "local"
    """Processes on this machine, or a Ray cluster."""
    replicas: Replicas = 1
    """Workers, each with an engine of its own; "auto" is one per GPU (or group of GPUs)."""
    ray: Ray = Ray()
    """What each worker takes of a cluster."""
    seeds_at_once: Count = 1
    """Of a study, each in a process of its own."""
    device: Annotated[str, AfterValidator(_check_device)] = "auto"
    """"auto", "cpu", "cuda", "cuda:1" or "mps"."""
    token_budget: Annotated[int, Field(gt=0, lt=10**9)] = 16384
    """Tokens per sampling or scoring batch."""
    micro_batch_tokens: Tokens = 4096
    """Per training forward; "auto" is what the free memory holds, of 16384 at most (a GPU 32768)."""
    shard_prompts: Annotated[int, Field(gt=0, le=10**6)] = 64
    """Prompts of a shard, the unit that is finished or redone."""
    threads: Count | None = None
    """Of torch; null leaves torch's own choice."""
    gradient_checkpointing: Switch = False
    """"auto" is where it is needed to fit."""
    reference_table: bool = True
    """Reference values kept for all arms; false: at every step, with the adapter switched off."""
    train_processes: Replicas = 1
    """That tune one policy together; "auto" is one per GPU."""
    accelerate_config: str | None = None
    """A file of `accelerate config`: FSDP, DeepSpeed, several machines."""
    trackers: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """"tensorboard", "wandb", "trackio", …"""
    checkpoint_minutes: Annotated[float, Field(gt=0, le=10**6)] = 15.0
    """Of tuning that a kill may cost."""

    @model_validator(mode="after")
    def _servers_have_addresses(self) -> Runtime:
        for role, engine in self.engines:
            if engine == "server" and not getattr(self.servers, role).url:
                raise ValueError(f"engines.{role} = 'server', but servers.{role}.url is missing")
        return self

    @model_validator(mode="after")
    def _one_gpu_is_for_one_process(self) -> Runtime:
        """A GPU that is named by its number is not shared out: each of several processes would load its model there."""
        alone = {
            "executor": ("local",),
            "replicas": (1,),
            "train_processes": (1, "auto"),
            "accelerate_config": (None,),
        }
        for key, values in alone.items() if ":" in self.device else ():
            if (value := getattr(self, key)) not in values:
                raise ValueError(
                    f"device = '{self.device}' is one GPU, and {key} = {value!r} is for several processes: expected "
                    f"device = 'auto' or 'cuda' (the environment's CUDA_VISIBLE_DEVICES says which they see)"
                )
        return self
