"""Loading models and tokenizers of transformers, strictly.

A directory that is no model, weights that do not fit the architecture or the memory, an adapter of another base, or a
reward model of several logits is a UserError before anything runs. Leaves out several devices."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from croco.config.models import Causal, Model, Template
from croco.errors import UserError, notice, one_line
from croco.models.memory import give_back, out_of_memory
from croco.models.model_files import check_weights, load_config, read_generation_config, refusing
from croco.storage.hashing import check_adapter, local_model

DRIVER = Path("/proc/driver/nvidia/version")
INSTALL = "pip install --force-reinstall 'torch>=2.6,<2.14'"  # as pyproject.toml has it; plain pip brings CUDA's build
COMPUTED = re.compile(r"rotary_emb\.|\.attn\.(masked_)?bias$|position_ids$|\.mtp\.|(^|\.)mtp")
HEAD = re.compile(r"(^|\.)(score|classif\w*|\w*head|regression\w*|qa_outputs)\.")
KINDS = {  # of networks: transformers' class that loads it, and what it is
    "causal": ("AutoModelForCausalLM", "causal language model"),
    "classifier": ("AutoModelForSequenceClassification", "sequence classifier"),
    "translator": ("AutoModelForSeq2SeqLM", "translation model"),
}


def resolve_model(name: str) -> str | Path:
    """The directory of a model's name, or the hub id itself; UserError for a path that is no model."""
    return local_model(name) or name


def pick_device(device: str = "auto") -> torch.device:
    """The device named, or for "auto" a CUDA device when there is one, else the CPU; UserError for one not here."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if reason := idle_gpu():
            _say_once(f"everything runs on the CPU: {reason}")
        return torch.device("cpu")
    wanted = torch.device(device)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted.type == "cuda" and (wanted.index or 0) >= num_gpus:
        raise UserError(
            f"runtime.device = '{device}', but {idle_gpu() or f'torch has {num_gpus} CUDA devices'}"
        )
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"runtime.device = '{device}', but torch finds no such device here")
    return wanted


_say_once = cache(notice)  # what is just slow would not be seen otherwise


def idle_gpu() -> str | None:
    """Why torch uses no GPU though this machine has a driver for one, or None."""
    if torch.cuda.is_available() or not DRIVER.exists():
        return None
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a build without CUDA: {INSTALL}"
    else:
        reason = f"torch for CUDA {torch.version.cuda} finds none: is the driver too old, CUDA_VISIBLE_DEVICES empty?"
    return f"this machine has an NVIDIA driver, and {reason}"


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype named; for "auto" bfloat16 on a GPU that has it, else float32: on a CPU exactness costs little."""
    lacks = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto":
        if lacks:
            _say_once("this GPU has no bfloat16: weights are loaded in float32 (or set dtype = 'float16')")
        return torch.float32 if lacks or device.type != "cuda" else torch.bfloat16
    chosen = getattr(torch, dtype, None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise UserError(
            f"dtype {dtype!r}: found no such floating point type, expected auto, float32 or bfloat16"
        )
    if lacks and chosen == torch.bfloat16:
        _say_once("this GPU imitates bfloat16, slowly: expected dtype = 'float16', or 'auto' (float32)")
    return chosen


def load_tokenizer(
    model: str,
    revision: str | None = None,
    chat_template: Template | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The model's tokenizer, with another chat template or values for it if they are given."""
    from transformers import AutoTokenizer

    place = resolve_model(model)
    with refusing(f"model {model!r}: its tokenizer does not load", place):
        tokenizer = AutoTokenizer.from_pretrained(
            place, revision=revision, trust_remote_code=trust_remote_code
        )
    if chat_template is not None:
        if chat_template.file is not None:
            try:
                tokenizer.chat_template = Path(chat_template.file).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise UserError(
                    f"chat template {chat_template.file!r}: cannot be read: {one_line(error)}"
                ) from error
        if chat_template.values:
            set_values(tokenizer, chat_template.values)
    return tokenizer


def set_values(tokenizer: Any, values: Mapping[str, Any]) -> None:
    """Put values for the chat template at its beginning, where a tuned model keeps them; UserError without one."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path}: chat_template_kwargs is given, and there is no chat template"
        )
    own = tokenizer.get_chat_template()
    # JSON's true, false, numbers and strings are jinja's; "+" keeps a line break that the template begins with
    set_all = "".join(f"{{% set {name} = {json.dumps(value)} +%}}" for name, value in values.items())
    tokenizer.chat_template = set_all + own


def load_policy(
    model: str,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    adapter: Path | None = None,
    chat_template: Template | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
) -> tuple[Any, Any]:
    """A causal model in eval mode and its tokenizer; an adapter folder, if given, is merged in memory. `quantization`
    "nf4" keeps the weights of linear layers in four bits, for adapters to be trained on them."""
    if adapter is not None:
        check_adapter(adapter, model, revision)
    tokenizer = load_tokenizer(model, revision, chat_template, trust_remote_code)
    policy = _load("causal", model, revision, dtype, device, trust_remote_code, quantization)
    if adapter is not None:
        from croco.models.lora import load_adapter

        policy = load_adapter(policy, adapter)
    return policy.eval(), tokenizer


def load_causal(
    section: Causal, adapter: Path | None, device: str, quantization: str | None = None
) -> tuple[Any, Any]:
    """`load_policy` of a model of a recipe."""
    return load_policy(
        section.model, section.revision, section.dtype, device, adapter, section.template,
        section.trust_remote_code, quantization,
    )  # fmt: skip


def load_reward(
    model: str,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A sequence classifier with exactly one logit, in eval mode, and its tokenizer."""
    tokenizer = load_tokenizer(model, revision, None, trust_remote_code)
    reward = _load("classifier", model, revision, dtype, device, trust_remote_code)
    if reward.config.num_labels != 1:
        raise UserError(f"reward model {model!r}: found {reward.config.num_labels} logits, expected one")
    return reward.eval(), tokenizer


def load_translator(
    model: str,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A sequence-to-sequence model in eval mode and its tokenizer."""
    tokenizer = load_tokenizer(model, revision, None, trust_remote_code)
    translator = _load("translator", model, revision, dtype, device, trust_remote_code)
    return translator.eval(), tokenizer


def _auto(kind: str) -> Any:
    return getattr(import_module("transformers"), KINDS[kind][0])


def _load(
    kind: str,
    model: str,
    revision: str | None,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    quantization: str | None = None,
) -> Any:
    """The model on its device; raises UserError where its files lack weights, of which transformers only warns."""
    place, target, auto = resolve_model(model), pick_device(device), _auto(kind)
    give_back()  # what an earlier model has left
    check_weights(model, place)
    read_generation_config(place, revision)  # transformers goes on without one that is cut off
    with refusing(f"model {model!r}: does not load as {auto.__name__}", place):
        try:
            with quiet_loading():
                loaded, report = auto.from_pretrained(
                    place,
                    revision=revision,
                    dtype=pick_dtype(dtype, target),
                    trust_remote_code=trust_remote_code,
                    output_loading_info=True,
                    use_safetensors=True,
                    **_quantized(quantization, dtype, target),
                )
                loaded = loaded if quantization else loaded.to(target)
                for module in loaded.modules() if quantization else ():
                    module.support_avx512bf16_for_cpu = False  # bitsandbytes' packing there loses gradients
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                raise UserError(
                    f"model {model!r}: its weights do not fit in the memory of {target} ({one_line(error)}): "
                    f"expected no other process there, or a smaller model"
                ) from error
            raise
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"model {model!r}: found no weights for {missing[0]}, expected a whole {KINDS[kind][1]}"
        )
    if extra := left_over(report["unexpected_keys"], loaded):
        raise UserError(
            f"model {model!r}: its files hold {len(extra)} weights that its config.json has no place for, such as "
            f"{extra[0]}: expected those of a {type(loaded).__name__} alone"
        )
    return loaded


def _quantized(quantization: str | None, dtype: str, device: torch.device) -> dict[str, Any]:
    """What transformers is asked for beside; raises UserError without the package that does it."""
    if quantization is None:
        return {}
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f'policy.quantization = "{quantization}" needs bitsandbytes, which is not installed: expected the extra gpu'
        )
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_compute_dtype=pick_dtype(dtype, device),
        bnb_4bit_use_double_quant=True,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def left_over(names: Iterable[str], network: Any) -> list[str]:
    """Weights in a model's files that are another network's: layers beyond its own, or the head of another kind. Tables
    that are computed anew count for nothing, nor does a language model's head beside a classifier's."""
    own = {name for name, _ in network.named_children()}
    kept = [name for name in names if not COMPUTED.search(name)]
    heads = [name for name in kept if HEAD.search(name) and not name.startswith(("lm_head", "mtp"))]
    return sorted({*heads, *(name for name in kept if name.partition(".")[0] in own)})


def weightless(section: Model, key: str, kind: str) -> Any:
    """The model without its weights; raises UserError for one that transformers does not know, or of several logits."""
    config = load_config(section, key)
    with refusing(f"{key}.model = '{section.model}' does not load", section.model), torch.device("meta"):
        network = _auto(kind).from_config(config, trust_remote_code=section.trust_remote_code)
    if kind == "classifier" and config.num_labels != 1:
        causal = any(name.endswith("ForCausalLM") for name in config.architectures or ())
        fault = "is a causal language model" if causal else f"has {config.num_labels} logits"
        raise UserError(
            f"{key}.model = '{section.model}' {fault}, expected a sequence classifier with one logit"
        )
    return network


@contextmanager
def quiet_loading() -> Iterator[None]:
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
