"""`croco push`: an adapter, a model or pairs into a repository of the hub, with their card, in one commit.

One commit, so that a repository has all of the files or none. The key is HF_TOKEN of the environment, the hub that of
HF_ENDPOINT; neither is written anywhere. Nothing is overwritten unless asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from croco.errors import UserError
from croco.storage.files import RECORD, read_json
from croco.storage.hashing import HUB_ID

CONFIG = "adapter_config.json"
BASE = "base_model_name_or_path"
CARD = "README.md"


@dataclass(frozen=True)
class Contents:
    """What a folder holds for the hub: "model" or "dataset", and its files by their names there."""

    kind: str
    files: dict[str, Path]


def contents(folder: Path) -> Contents:
    """The adapter, model or pairs of a folder; raises UserError for one that holds none, or no card."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    places = [folder, *(folder / name for name in ("adapter", "model", "export"))]
    for place in places:
        marks = {CONFIG: "model", "config.json": "model", "data": "dataset"}
        kind = next((kind for mark, kind in marks.items() if (place / mark).exists()), None)
        if kind is None:
            continue
        files = {
            path.relative_to(place).as_posix(): path for path in sorted(place.rglob("*")) if path.is_file()
        }
        files = {name: path for name, path in files.items() if not name.startswith(".") and "/." not in name}
        for ours in (RECORD, "dropped.parquet"):  # of the stage that wrote a folder of pairs
            files.pop(ours, None)
        if (folder / CARD).is_file():  # PEFT puts a form to fill in beside an adapter
            files[CARD] = folder / CARD
        if CARD not in files:
            raise UserError(f"{place} has no {CARD}: expected the card that croco writes")
        return Contents(kind, files)
    raise UserError(
        f"{folder} holds no {CONFIG}, config.json or data/: expected an adapter, a model of `croco merge` or pairs of "
        f"`croco export`"
    )


def push(
    folder: Path, name: str, public: bool, update: bool, base: str | None, say: Callable[[str], None]
) -> None:
    """Make the repository `name`, private unless `public`, and commit the folder's files; raises UserError.

    `update` replaces the files of a repository that has some. `base` is the hub's name of an adapter's base that is a
    folder here, which nobody else has.
    """
    local = contents(folder)
    key = os.environ.get("HF_TOKEN")
    if not key:
        raise UserError(
            "HF_TOKEN is not set: expected the environment to hold a key that may write to the hub"
        )
    if not HUB_ID.fullmatch(name) or "/" not in name:
        raise UserError(f"--to {name}: expected the name of a repository, such as my-organisation/my-model")
    replaced = {CONFIG: _with_base(local.files[CONFIG], base)} if CONFIG in local.files else {}
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=key)
    with _one_sentence(name, key):
        url = api.create_repo(name, repo_type=local.kind, private=not public, exist_ok=True)
        there = set(api.list_repo_files(name, repo_type=local.kind)) - {".gitattributes"}
        if there and not update:
            raise UserError(
                f"{url} holds {len(there)} files already: expected --update to replace them, or another name"
            )
        commit = api.create_commit(
            name,
            [
                *(CommitOperationDelete(path) for path in sorted(there - local.files.keys())),
                *(
                    CommitOperationAdd(path, replaced.get(path, str(file)))
                    for path, file in local.files.items()
                ),
            ],
            commit_message=f"{local.kind} made by croco",
            repo_type=local.kind,
        )
    size = sum(file.stat().st_size for file in local.files.values())
    say(f"{len(local.files)} files, {size / 1e6:,.1f} MB: {commit.commit_url}")


def _with_base(path: Path, base: str | None) -> bytes:
    """An adapter's configuration that names its base as the hub does; raises UserError for one of this machine."""
    config = read_json(path)
    named = base or config.get(BASE) or ""
    if not HUB_ID.fullmatch(named) or Path(named).exists():
        raise UserError(
            f"{path}: the adapter's base is a folder of this machine, which nobody else has: expected --base NAME "
            f"with its name on the hub, or the merged model (`croco merge`)"
        )
    return json.dumps(config | {BASE: named}, indent=2).encode()


@contextmanager
def _one_sentence(name: str, key: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (the library's own kinds, and whatever its transport raises)
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        refused = {401: "the key in HF_TOKEN is refused", 403: "the key in HF_TOKEN may not write there"}
        words = " ".join(str(error).replace(key, "HF_TOKEN").split())[:300]
        why = refused.get(int(status), words) if status else words or type(error).__name__
        raise UserError(f"{name} cannot be written on the hub: {why}") from None
