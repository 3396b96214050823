"""Low-rank adapters: put on, taken up again, and merged into the weights they were trained on. Only this file knows
PEFT."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from croco.config.training import Lora, Training
from croco.errors import UserError, one_line
from croco.models.lora_layer import lora_linear
from croco.storage.hashing import check_adapter

# linear layers that "auto" leaves as they are: routers, and what reads its weight without calling the layer
ROUTERS = ("gate", "router", "shared_expert_gate", "modality_router", "correction_coefs", "prediction_coefs")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's warnings about names that transformers will retire: no reader can act on them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def language_model(model: PreTrainedModel) -> nn.Module:
    """The part of a model that reads and writes text, without towers for images and sound."""
    decoder: nn.Module | None = model.get_decoder()
    return model if decoder is None else decoder


def trainable(model: PreTrainedModel, settings: Training, seed: int) -> Any:
    """The policy with what is trained of it open to gradients, and nothing else: new adapters, or all weights of the
    language model. Raises `UserError` as `apply_lora`."""
    if not settings.full:
        return apply_lora(model, settings.lora, seed)
    model.requires_grad_(False)
    language_model(model).requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)
    return model


def apply_lora(model: PreTrainedModel, settings: Lora, seed: int) -> PeftModel:
    """The model with trainable adapters on the layers named by `settings.targets`, everything else frozen.

    The adapters start as the identity; their random half depends on the seed alone. The model may be weightless. Raises
    `UserError` as `lora_config`, and when PEFT refuses a layer."""
    config = lora_config(model, settings)
    with torch.random.fork_rng(), _quiet():
        torch.manual_seed(seed)
        try:
            return _in_one_step(get_peft_model(model, config))
        except ValueError as error:
            raise UserError(
                f"training.lora cannot be put on {type(model).__name__}: {one_line(error, 300)}"
            ) from error


def lora_config(model: PreTrainedModel, settings: Lora) -> LoraConfig:
    """PEFT's configuration for the layers that `settings.targets` means on this model.

    "auto" is every linear layer of the language model but its head and its routers. Fused experts are parameters, not
    layers: they are adapted where their names are listed. Raises `UserError` for a name that the model does not have,
    and for fused experts with dropout, which PEFT does not do."""
    layers = _linear_layers(model)
    automatic = settings.targets == "auto"
    targets = [name for name in layers if _adapts_well(model, name)] if automatic else list(settings.targets)
    names = {leaf(name) for name in layers}
    known = [name for name in targets if name in layers or name in names]
    experts = [name for name in targets if name not in known and name in _fused_experts(model)]
    chosen = [name for name in layers if name in known or leaf(name) in known]
    # by their last names where those mean no other module, as everyone writes it
    short = {leaf(name) for name in chosen}
    if {name for name, _ in model.named_modules() if leaf(name) in short} == set(chosen):
        chosen = sorted(short)
    others = [name for name in targets if name not in known and name not in experts]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=[*chosen, *others],
        target_parameters=experts or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in layers.values()),
        task_type="CAUSAL_LM",
    )
    # PEFT takes some names of layers for those of experts that transformers has fused since, and so do its readers
    convert_peft_config_for_transformers(config, model, None)
    if automatic:
        config.target_parameters, config.rank_pattern, config.alpha_pattern = None, {}, {}
    if missing := [name for name in others if name in (config.target_modules or ())]:
        fused = f", its fused experts {', '.join(_fused_experts(model))}" if _fused_experts(model) else ""
        raise UserError(
            f"training.lora.targets names {', '.join(missing)}, which {type(model).__name__} does not have; "
            f'its linear layers are {", ".join(sorted(names))}{fused} (or "auto")'
        )
    if config.target_parameters and settings.dropout:
        raise UserError(
            f"training.lora.targets means fused experts of {type(model).__name__}, which take no dropout, "
            f"{', '.join(sorted(config.target_parameters))}: expected training.lora.dropout = 0, or targets = "
            '"auto", which leaves them as they are'
        )
    return config


def leaf(name: str) -> str:
    """The last part of a module's name."""
    return name.rpartition(".")[2]


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    inside = {id(module) for module in language_model(model).modules()} | {id(model.get_output_embeddings())}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) in inside
    }


def _adapts_well(model: PreTrainedModel, name: str) -> bool:
    """Whether "auto" means this linear layer: not the head, a router, or the output of a state space, whose kernels
    read its weight past any adapter."""
    module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    if module is model.get_output_embeddings() or leaf(name) in ROUTERS:
        return False
    return not (leaf(name) == "out_proj" and hasattr(parent, "A_log") and hasattr(parent, "D"))


def _fused_experts(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that hold all experts of a layer, as in "experts.down_proj"."""
    whole = (name for name, parameter in language_model(model).named_parameters() if parameter.dim() == 3)
    return sorted({".".join(name.rsplit(".", 2)[1:]) for name in whole if name.split(".")[-2] == "experts"})


class OneStepLinear(lora.Linear):
    """PEFT's layer, computed as in `lora_layer` wherever that is the same: one plain adapter beside a plain layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
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


def continue_lora(model: PreTrainedModel, folder: Path, settings: Lora) -> PeftModel:
    """The model with the adapter in `folder` on it, trainable from there; dropout is that of the settings. Raises
    `UserError` for an adapter of another base, size or form than the settings say."""
    config = _adapter_config(folder)
    if model.name_or_path:
        check_adapter(folder, model.name_or_path, None)
    for name, is_so, wanted in (
        ("rank", config.r, settings.rank),
        ("alpha", config.lora_alpha, settings.alpha),
    ):
        if is_so != wanted:
            raise UserError(
                f"the adapter in {folder} has {name} {is_so}, expected training.lora.{name} = {wanted}"
            )
    fresh = apply_lora(model, settings, 0)
    wanted_layers = _adapted_layers(fresh)
    config.lora_dropout = settings.dropout
    adapted = _put_on(without_adapter(fresh), folder, config, trainable=True)
    if (layers := _adapted_layers(adapted)) != wanted_layers:
        there, wanted_names = (sorted({leaf(name) for name in names}) for names in (layers, wanted_layers))
        raise UserError(
            f"the adapter in {folder} has targets {', '.join(there)} on {len(layers)} layers, expected those of "
            f"training.lora.targets: {', '.join(wanted_names)} on {len(wanted_layers)} layers"
        )
    return _in_one_step(adapted)


def _adapted_layers(adapted: PeftModel) -> set[str]:
    return {name for name, module in adapted.named_modules() if isinstance(module, lora.LoraLayer)}


def _adapter_config(folder: Path) -> Any:
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter: found no adapter_config.json")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder} holds no adapter: found no adapter_model.safetensors")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{folder / 'adapter_config.json'}: {one_line(error, 300)}") from error
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
        with _quiet(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            adapted = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=trainable)
        for warning in caught:
            if "missing adapter keys" in str(warning.message):
                raise ValueError(warning.message)
        places = sum(".lora_" in name for name, _ in adapted.named_parameters())
        if len(weights) > places:
            raise ValueError(f"it has {len(weights)} tensors, of which the model has a place for {places}")
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the adapter in {folder} does not fit this {type(model).__name__}: {one_line(error, 300)}"
        ) from error
    return adapted


def without_adapter(adapted: PeftModel) -> PreTrainedModel:
    """The model as it was before the adapter was put on."""
    model: Any = adapted.unload()
    vars(model).pop("peft_config", None)  # or PEFT warns of a second adapter
    for parameter in model.parameters():  # weights in four bits are whole numbers
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def put_adapter_on(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with the adapter in `folder` beside its weights. Raises `UserError` when the folder holds no adapter,
    one of another architecture or size, or numbers that are not finite."""
    return _put_on(model, folder, _adapter_config(folder))


def merged(adapted: PeftModel) -> PreTrainedModel:
    """The adapter added to the weights, in the model's type."""
    model: PreTrainedModel = adapted.merge_and_unload()
    return model.eval()


def load_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the adapter in `folder` merged into its weights; raises as `put_adapter_on`."""
    return merged(put_adapter_on(model, folder))
