"""From the checkpoint that was chosen to the folder that the pipeline goes on with: an adapter, or a whole model.

Written whole or not at all. Weights that training left as they were are an error, because nothing after it would
notice.
"""

import shutil
from collections.abc import Iterable, Set
from hashlib import blake2b
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from croco.errors import UserError
from croco.storage.files import sync_files, sync_folder, writing

SAMPLED = 4096  # numbers of each tensor that are compared
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
MODEL = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")


def samples(parameters: Iterable[Tensor]) -> set[bytes]:
    """A digest of a sample of every tensor that is trained: without names, which may be others on disk."""
    return {_digest(parameter.detach()) for parameter in parameters if parameter.requires_grad}


def _digest(tensor: Tensor) -> bytes:
    flat = tensor.flatten()
    sample = flat[:: max(1, flat.numel() // SAMPLED)].float().cpu().numpy()
    return blake2b(repr(tuple(tensor.shape)).encode() + sample.tobytes(), digest_size=16).digest()


def adopt(checkpoint: Path, folder: Path, before: Set[bytes], tokenizer: Any = None) -> None:
    """Copy the weights of a checkpoint to `folder`, which they replace; with the tokenizer for a whole model.

    `before` are samples of the weights as training found them. Raises `UserError` when none has changed.
    """
    names = ADAPTER if tokenizer is None else MODEL
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in names:
        for path in checkpoint.glob(name):
            shutil.copyfile(path, partial / path.name)
    _check_changed(partial, before)
    if tokenizer is not None:
        with writing(partial):
            tokenizer.save_pretrained(str(partial))
    sync_files(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    sync_folder(folder.parent)


def _check_changed(folder: Path, before: Set[bytes]) -> None:
    left = set(before)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            left -= {_digest(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    if left:
        return
    raise UserError("training changed nothing: every weight is what it was (is the learning rate 0?)")
