"""What a model or file is, by its content, for fingerprints: the same weights in another place are the same model.

A model's directory is the digest of the files that loading reads, a hub id is itself at its revision, a file is its
SHA-256. Digests of large files are kept in the user's cache until the file changes."""

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from croco.errors import UserError
from croco.storage.files import read_json

# of a model's folder: weights, configs, tokenizer, templates; notes, pictures, logs and optimizer states are not read
MODEL_FILES = re.compile(
    r".*\.(safetensors|bin|model|spm|tiktoken|bpe|vocab|jinja)"
    r"|.*(config|token|vocab|index|template|tekken).*\.json"
    r"|(merges|vocab|bpe|sentencepiece|spiece).*\.txt"
)
UNREAD_FILES = re.compile(r"training_args\.bin|(optimizer|scheduler|rng_state|random_states).*")
NOTES = re.compile(
    r"(README|LICEN[CS]E|NOTICE|CHANGELOG).*|.*\.(md|rst|pdf|png|jpe?g|gif|svg|log|pyc)", re.IGNORECASE
)
CACHED_BYTES = 16 * 2**20  # digests of files from this size on are kept between processes
QUIET_SECONDS = 2.0  # a file written less long ago may be written again without another time stamp
HASH_THREADS = 8
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
LAB = Path(__file__).parents[1] / "lab"
LAB_MODELS = LAB / "models"
# the worlds of the lab, each by the source of its prompts
LAB_LANGUAGES = {
    "lab": tuple(sorted(path.stem for path in (LAB / "languages").glob("*.toml"))),
    "lab:lists": ("de", "en", "es", "fr", "it", "nl"),
}
LAB_NAMES = (
    *("policy", "reward", "other", "translator"),
    *(f"lists-{name}" for name in ("policy", "policy-2", "reward", "reward-all", "other", "translator")),
)


def canonical(value: Any) -> str:
    """JSON with one spelling: sorted keys, no spaces, no nan."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """A short stable digest (16 hex digits) of a JSON value."""
    return hashlib.sha256(canonical(value).encode("utf-8")).hexdigest()[:16]


def local_model(name: str, key: str = "model") -> Path | None:
    """The directory of a model's name (package data for `lab:policy` and the other LAB_NAMES), or None for
    a hub id. Raises UserError naming the key for a directory that is not there or holds no model."""
    if name.startswith("lab:"):
        folder = LAB_MODELS / name.removeprefix("lab:")
        if name.removeprefix("lab:") not in LAB_NAMES:
            known = ", ".join(f"'lab:{one}'" for one in LAB_NAMES)
            raise UserError(f"{key} = '{name}', expected {known}, a directory or a hub id")
        if not (folder / "config.json").exists():
            raise UserError(f"{key} = '{name}', but the lab's models are not built: run `make lab-build`")
        return folder
    folder = Path(os.path.expanduser(name))
    if (gguf := gguf_file(name, key)) is not None:
        return _converted(gguf, key)
    if os.path.isdir(folder):
        if not (folder / "config.json").exists():
            raise UserError(
                f"{key} = '{name}' is a directory without config.json, expected a Hugging Face model"
            )
        return folder
    if os.path.exists(folder):
        raise UserError(f"{key} = '{name}' is a file, expected a directory with a Hugging Face model")
    if not HUB_ID.fullmatch(name) or len(name) > 96:
        raise UserError(
            f"{key} = '{name:.100}': no such directory, and not the form of a hub id ('organisation/model')"
        )
    return None


def model_identity(name: str, revision: str | None, key: str = "model") -> str:
    """`sha256:…` of a local model's files, `id@revision` of one on the hub."""
    folder = local_model(name, key)
    if folder is None:
        return f"{name}@{revision or 'main'}"
    return model_folder_identity(folder.resolve())


def gguf_file(name: str, key: str = "model") -> Path | None:
    """The GGUF file that a model's name stands for: the file itself, or the one in a folder without config.json."""
    path = Path(os.path.expanduser(name))
    if path.suffix == ".gguf" and os.path.isfile(path):
        return path
    if not os.path.isdir(path) or os.path.exists(path / "config.json"):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{key} = '{name}' holds {len(files)} GGUF files ({names}), expected the name of one")
    return files[0] if files else None


def _converted(file: Path, key: str) -> Path:
    """The ordinary folder of a GGUF file, in the user's cache under the file's digest; made once, by `croco fetch` in a
    process of its own, for which others wait."""
    digest = _digests([file.resolve()])[0]
    folder = _cache() / "gguf" / f"{file.stem}-{digest[:16]}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            print(f"converting {file}, once, into {folder}", file=sys.stderr, flush=True)
            words = [sys.executable, "-m", "croco", "fetch", str(file), "--to", str(folder)]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
                raise UserError(f"{key} = '{file}': {reason.removeprefix('croco: ')}")
    return folder


def check_adapter(folder: Path, model: str, revision: str | None) -> None:
    """Raise UserError when an adapter says that it was trained on another model: a base of the same shape would take it
    without a word. Bases that cannot be compared pass: one that is gone, or a directory against a hub id."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no adapter: found no adapter_config.json")
    config = read_json(path)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else config
    if not isinstance(config, dict) or not isinstance(base, str | None):
        raise UserError(f"{path} is no configuration of an adapter: found {str(base)[:60]!r}")
    if not base:
        return
    ours = local_model(model)
    if Path(base).is_dir() and ours is not None:
        other = model_folder_identity(Path(base).resolve()) != model_folder_identity(ours.resolve())
    else:
        other = ours is None and HUB_ID.fullmatch(base) is not None and base != model
    if other:
        raise UserError(f"the adapter in {folder} was trained on {base}, expected one of '{model}'")


def folder_identity(folder: Path) -> str:
    """Digest of the names and contents of all files of a folder; hidden files do not count."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return _identity_of(folder, [path for path in files if not _hidden(path.relative_to(folder))])


def model_folder_identity(folder: Path) -> str:
    """Digest of the files that loading a model reads: a note beside the weights makes no other model of it."""
    return _identity_of(folder, model_files(folder))


def model_files(folder: Path) -> list[Path]:
    """The files of a model's folder that loading it reads; all but notes where it brings its own code."""
    if any(folder.glob("*.py")):
        inside = [
            path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder))
        ]
        return [path for path in inside if not NOTES.fullmatch(path.name)]
    inside = [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]
    files = [path for path in inside if path.is_file() and MODEL_FILES.fullmatch(path.name)]
    safe = any(path.suffix == ".safetensors" for path in files)  # then weights in .bin are not read
    return [
        path
        for path in files
        if not UNREAD_FILES.fullmatch(path.name) and not (safe and path.suffix == ".bin")
    ]


def file_identity(name: str, key: str = "file") -> str:
    """`sha256:…` of a file; raises UserError naming the key when it is not there."""
    path = Path(os.path.expanduser(name))
    if not os.path.isfile(path):
        raise UserError(f"{key} = '{name:.200}': no such file")
    return f"sha256:{_digests([path.resolve()])[0][:16]}"


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _identity_of(folder: Path, files: Iterable[Path]) -> str:
    files = sorted(files)
    total = hashlib.sha256()
    for path, content in zip(files, _digests(files), strict=True):
        total.update(f"{path.relative_to(folder).as_posix()}\0{content}\0".encode())
    return f"sha256:{total.hexdigest()[:16]}"


# Digests of files -----------------------------------------------------------------------------------------------------

_KNOWN: dict[str, list[Any]] = {}  # path -> what `stat` said of the file, and its digest


def _digests(files: Iterable[Path]) -> list[str]:
    """SHA-256 of each file, whole. A digest is used again as long as `stat` says that the file is the same."""
    files = list(files)
    seen = {str(path): _stat(path) for path in files}
    known = {name: _KNOWN[name] for name in seen if name in _KNOWN}
    if any(seen[name][2] >= CACHED_BYTES and name not in known for name in seen):
        known = _kept() | known
    result = {name: str(entry[1]) for name, entry in known.items() if entry[0] == seen.get(name)}
    new = [Path(name) for name in seen if name not in result]
    if len(new) > 1:
        with ThreadPoolExecutor(HASH_THREADS) as threads:
            hashed = list(threads.map(_hash, new))
    else:
        hashed = [_hash(path) for path in new]
    for path, content in zip(new, hashed, strict=True):
        name = str(path)
        result[name], changed = content, max(seen[name][3:])
        if seen[name] == _stat(path) and time.time_ns() - changed > QUIET_SECONDS * 1e9:
            _KNOWN[name] = [seen[name], content]
    if any(seen[str(path)][2] >= CACHED_BYTES and str(path) in _KNOWN for path in new):
        _keep()
    return [result[str(path)] for path in files]


def _stat(path: Path) -> list[int]:
    seen = path.stat()
    return [seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "croco"


def _cache_file() -> Path:
    return _cache() / "digests.json"


def _kept() -> dict[str, list[Any]]:
    """Digests that earlier processes kept; a file that is not of this shape holds none."""
    with suppress(OSError, ValueError, RecursionError):
        kept = json.loads(_cache_file().read_text(encoding="utf-8"))
        if isinstance(kept, dict):
            return {
                path: entry
                for path, entry in kept.items()
                if isinstance(entry, list)
                and len(entry) == 2
                and re.fullmatch(r"[0-9a-f]{64}", str(entry[1]))
            }
    return {}


def _keep() -> None:
    """Add the digests of large files to the user's cache, where it can be written."""
    path = _cache_file()
    large = {name: entry for name, entry in _KNOWN.items() if entry[0][2] >= CACHED_BYTES}
    kept = {name: entry for name, entry in _kept().items() if os.path.isfile(name)} | large
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(kept), encoding="utf-8")
        partial.replace(path)


def function_file(name: str) -> Path:
    """The file of "module:name" or "file.py:name", which is not loaded; modules of the current folder are seen. Raises
    UserError when there is no such file."""
    module = name.rpartition(":")[0]
    if module.endswith(".py"):
        path = Path(os.path.expanduser(module))
        if not path.is_file():
            raise UserError(f"reward.function = '{name}': no such file")
        return path.resolve()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None or spec.origin is None or not os.path.isfile(spec.origin):
        raise UserError(
            f"reward.function = '{name}': no module '{module}', expected 'module:name' or 'file.py:name'"
        )
    return Path(spec.origin)
