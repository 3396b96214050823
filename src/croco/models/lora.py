"""Low-rank adapters: the one room that knows PEFT.

An adapter is put on, taken up again, saved, and merged into the weights it was trained on. Left out: any other kind of
adapter.
"""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners import lora
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from croco.errors import UserError
from croco.models.lora_layer import lora_linear
from croco.stages.train.settings import LoraSettings
from croco.storage.files import sync_files, sync_folder, writing
from croco.storage.hashing import check_adapter


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
        return _in_one_step(get_peft_model(model, config))


class OneStepLinear(lora.Linear):
    """PEFT's layer, computed as in `ops/lora.py` wherever that is the same: one plain adapter beside a plain layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, (..., outputs)."""
        if args or kwargs or not self._plain(x):
            whole: Tensor = super().forward(x, *args, **kwargs)
            return whole
        (name,) = self.active_adapters
        dropout = self.lora_dropout[name]
        return lora_linear(
            x, self.base_layer.weight, self.base_layer.bias, self.lora_A[name].weight, self.lora_B[name].weight,
            self.scaling[name], getattr(dropout, "p", 0.0) if dropout.training else 0.0,
        )  # fmt: skip

    def _plain(self, x: Tensor) -> bool:
        if (
            self.disable_adapters
            or self.merged
            or len(self.active_adapters) != 1
            or type(self.base_layer) is not nn.Linear
        ):
            return False
        name = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return False
        if torch.is_autocast_enabled(x.device.type) or getattr(self.lora_dropout[name], "p", 0.0) == 1:
            return False
        # Weights that are spread over processes come together in the forward of their own modules only.
        weights = [self.base_layer.weight, self.lora_A[name].weight, self.lora_B[name].weight]
        whole = [
            (self.out_features, x.shape[-1]),
            (self.r[name], x.shape[-1]),
            (self.out_features, self.r[name]),
        ]
        return all(
            tuple(w.shape) == shape and not isinstance(w, DTensor) and not hasattr(w, "ds_id")
            for w, shape in zip(weights, whole, strict=True)
        )


def _in_one_step(model: PeftModel) -> PeftModel:
    for module in model.modules():
        if type(module) is lora.Linear:
            module.__class__ = OneStepLinear
    return model


def continue_lora(model: PreTrainedModel, folder: Path, settings: LoraSettings) -> PeftModel:
    """The model with the adapter in `folder` on it, trainable from where it stands; dropout is that of the settings.

    Raises `UserError` for an adapter of another base, size or form than the settings say.
    """
    config = _adapter_config(folder)
    if model.name_or_path:
        check_adapter(folder, model.name_or_path, None)
    found = {"rank": config.r, "alpha": config.lora_alpha, "targets": sorted(config.target_modules)}
    wanted = {"rank": settings.rank, "alpha": settings.alpha, "targets": sorted(settings.targets)}
    for name, value in wanted.items():
        if found[name] != value:
            raise UserError(
                f"the adapter in {folder} has {name} {found[name]}, expected training.lora.{name} = {value}"
            )
    config.lora_dropout = settings.dropout
    return _in_one_step(_put_on(model, folder, config, trainable=True))


def _adapter_config(folder: Path) -> Any:
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter: found no adapter_config.json")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder} holds no adapter: found no adapter_model.safetensors")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{folder / 'adapter_config.json'}: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"{folder} holds an adapter of type {config.peft_type}, expected LoRA")
    return config


def _put_on(model: PreTrainedModel, folder: Path, config: Any, trainable: bool = False) -> PeftModel:
    """The adapter on the model, every tensor of it a finite number and in its place."""
    path = folder / "adapter_model.safetensors"
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds numbers that are not finite, expected a sound adapter")
    try:
        with _quiet(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            adapted = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=trainable)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the adapter in {folder} does not fit this {type(model).__name__}: {reason}"
        ) from error
    for warning in said:
        if "missing adapter keys" in str(warning.message):
            reason = " ".join(str(warning.message).split())[:300]
            raise UserError(f"the adapter in {folder} does not fit this {type(model).__name__}: {reason}")
    layers = sum(".lora_" in name for name, _ in adapted.named_parameters())
    if len(weights) > layers:
        raise UserError(
            f"the adapter in {folder} does not fit this {type(model).__name__}: it has {len(weights)} tensors, "
            f"of which the model has a place for {layers}"
        )
    return adapted


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter (safetensors and its configuration) to `folder`, whole or not at all; replaces an older one."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with writing(partial):
        model.save_pretrained(str(partial), save_embedding_layers=False)
    sync_files(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    sync_folder(folder.parent)


def without_adapter(adapted: PeftModel) -> PreTrainedModel:
    """The model as it was before the adapter was put on."""
    model: Any = adapted.unload()
    vars(model).pop("peft_config", None)  # or PEFT warns of a second adapter
    model.requires_grad_(True)
    return model


def put_adapter_on(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with the adapter in `folder` beside its weights.

    Raises `UserError` when the folder holds no adapter, or one of another architecture or size, or numbers that are not
    finite.
    """
    return _put_on(model, folder, _adapter_config(folder))


def merged(adapted: PeftModel) -> PreTrainedModel:
    """The adapter added to the weights, in the model's type."""
    model: PreTrainedModel = adapted.merge_and_unload()
    return model.eval()


def load_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the adapter in `folder` merged into its weights; raises as `put_adapter_on`."""
    return merged(put_adapter_on(model, folder))
