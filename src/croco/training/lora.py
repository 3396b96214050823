"""Low-rank adapters: the one room that knows PEFT.

An adapter is put on, saved, and merged into the weights it was trained on; one that changes nothing is an
error, because nothing after it would notice. Left out: full fine-tuning, and any other kind of adapter.
"""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from croco.errors import UserError
from croco.ops.dropout import Dropout
from croco.store import sync_files, sync_folder
from croco.training.settings import LoraSettings


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's warnings about names that transformers will retire: no reader can act on them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def apply_lora(model: PreTrainedModel, settings: LoraSettings, seed: int) -> PeftModel:
    """The model with trainable adapters on the layers named by `settings.targets`, everything else frozen.

    The adapters start as the identity; their random half depends on the seed alone. Raises `UserError` when
    the model has no layer of one of the names.
    """
    linear = {
        name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    if missing := [target for target in settings.targets if target not in linear]:
        raise UserError(
            f"training.lora.targets names {', '.join(missing)}, which {type(model).__name__} does not have; "
            f"its linear layers are {', '.join(sorted(linear))}"
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), _quiet():
        torch.manual_seed(seed)
        return with_quick_dropout(get_peft_model(model, config))


def with_quick_dropout(model: PeftModel) -> PeftModel:
    """The model, the dropout of its adapters replaced by ours, which is the same and quicker on a CPU."""
    for module in model.modules():
        for name, layer in getattr(module, "lora_dropout", {}).items():
            if type(layer) is nn.Dropout:
                module.lora_dropout[name] = Dropout(layer.p)
    return model


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter (safetensors and its configuration) to `folder`, whole or not at all; replaces an
    older one.

    Raises `UserError` when the adapter is still the identity.
    """
    if not any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name):
        raise UserError("training changed nothing: every adapter is zero (is the learning rate 0?)")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(str(partial), save_embedding_layers=False)
    sync_files(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    sync_folder(folder.parent)


def load_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the adapter in `folder` merged into its weights, in the model's type.

    Raises `UserError` when the folder holds no adapter or the adapter was made for another architecture or
    size.
    """
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter: found no adapter_config.json")
    try:
        with _quiet():
            adapted = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the adapter in {folder} does not fit this {type(model).__name__}: {reason}"
        ) from error
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged.eval()
