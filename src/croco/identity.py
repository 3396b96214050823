"""What a model or file is, by its content, for fingerprints: the same weights in another place are the same model.

A directory is the digest of its files, a hub id is itself at its revision, a file is its SHA-256. Library versions are
recorded by `provenance.py` but are no part of an identity. Loads no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from croco.errors import UserError

LARGE_BYTES = 256 * 2**20  # above this a file is known by its size and a block of every stretch
STRETCH_BYTES, BLOCK_BYTES = 4 * 2**20, 4096  # tuning that moves a tensor of some megabytes moves a block
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
LAB_MODELS = Path(__file__).parent / "lab" / "models"
LAB_NAMES = ("policy", "reward", "other", "translator")


def canonical(value: Any) -> str:
    """JSON with one spelling: sorted keys, no spaces, no nan."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """A short stable digest (16 hex digits) of a JSON value."""
    return hashlib.sha256(canonical(value).encode("utf-8")).hexdigest()[:16]


def local_model(name: str, key: str = "model") -> Path | None:
    """The directory that a model's name stands for, or None for a hub id.

    Those of LAB_NAMES are package data, as in `lab:policy`. Raises UserError naming the key for a directory that is not
    there or holds no model.
    """
    if name.startswith("lab:"):
        folder = LAB_MODELS / name.removeprefix("lab:")
        if name.removeprefix("lab:") not in LAB_NAMES:
            known = ", ".join(f"'lab:{one}'" for one in LAB_NAMES)
            raise UserError(f"{key} = '{name}', expected {known}, a directory or a hub id")
        if not (folder / "config.json").exists():
            raise UserError(f"{key} = '{name}', but the lab's models are not built: run `croco lab build`")
        return folder
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(
                f"{key} = '{name}' is a directory without config.json, expected a Hugging Face model"
            )
        return folder
    if folder.exists():
        raise UserError(f"{key} = '{name}' is a file, expected a directory with a Hugging Face model")
    if not HUB_ID.fullmatch(name):
        raise UserError(
            f"{key} = '{name}': no such directory, and not the form of a hub id ('organisation/model')"
        )
    return None


def model_identity(name: str, revision: str | None, key: str = "model") -> str:
    """`sha256:…` of a local model's files, `id@revision` of one on the hub."""
    folder = local_model(name, key)
    if folder is None:
        return f"{name}@{revision or 'main'}"
    return folder_identity(folder.resolve())


def check_adapter(folder: Path, model: str, revision: str | None) -> None:
    """Raise UserError when an adapter says that it was trained on another model than this one.

    A base of the same shape would take it without a word. Bases that cannot be compared pass: one that is gone, or a
    directory against a hub id.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no adapter: found no adapter_config.json")
    base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        return
    ours = local_model(model)
    if Path(base).is_dir() and ours is not None:
        other = folder_identity(Path(base).resolve()) != folder_identity(ours.resolve())
    else:
        other = ours is None and HUB_ID.fullmatch(base) is not None and base != model
    if other:
        raise UserError(f"the adapter in {folder} was trained on {base}, expected one of '{model}'")


@lru_cache(maxsize=64)
def folder_identity(folder: Path) -> str:
    """Digest of the names and contents of a folder's files; hidden files do not count."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            total.update(f"{relative.as_posix()}\0{_file_digest(path)}\0".encode())
    return f"sha256:{total.hexdigest()[:16]}"


def file_identity(name: str, key: str = "file") -> str:
    """`sha256:…` of a file; raises UserError naming the key when it is not there."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"{key} = '{name}': no such file")
    return f"sha256:{_file_digest(path.resolve(), whole=True)[:16]}"


def _file_digest(path: Path, whole: bool = False) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if whole or size <= LARGE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        sample = hashlib.sha256(str(size).encode())
        for start in (*range(0, size - BLOCK_BYTES, STRETCH_BYTES), size - BLOCK_BYTES):
            file.seek(start)
            sample.update(file.read(BLOCK_BYTES))
        return sample.hexdigest()
