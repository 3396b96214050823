"""Files and folders on disk: written whole or not at all; removed or replaced only where name or mark is ours."""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import IO, Any

from croco.errors import UserError

TEMPORARY = ".tmp-"
RECORD = "stage.json"  # in a stage's folder
OWNER = ".croco"  # in a folder that we fill under another name before it takes its own
OURS = re.compile(r"part-\d{5,}(\.done|(\.dropped)?\.parquet)|dropped\.parquet|scratch|\.tmp-.*")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")  # as safetensors says what the system said
TORCH_WRITER = re.compile(r"PytorchStreamWriter|inline_container|file write failed|I/O error")


def reason(error: OSError | ValueError) -> str:
    """Why the system refused a path, in a few words."""
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around code that writes `path`: what the system refuses is one sentence, which safetensors and torch hide."""
    full = "make room and run the same command again"
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        if error.errno in FULL:
            raise UserError(f"{path} cannot be written ({reason(error)}); {full}") from None
        raise UserError(f"{path} cannot be written: {reason(error)}") from None
    except Exception as error:
        words = " ".join(str(error).split())
        if type(error).__name__ == "SafetensorError" or isinstance(error, RuntimeError):
            if number := SYSTEM_ERROR.search(words):
                raise UserError(
                    f"{path} cannot be written ({os.strerror(int(number[1])).lower()}); {full}"
                ) from None
            if TORCH_WRITER.search(words):
                raise UserError(f"{path} cannot be written ({words[:200]}); {full}") from None
        raise


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Temporary name in the same folder, fsync, rename, fsync of the folder: whole or not there at all."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_for_user(path: Path, text: str) -> None:
    """Write the file that a person named: through a link, and straight into a pipe or device; raises UserError."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected the name of a file")
    device = str(path).startswith(("/dev/std", "/dev/fd", "/proc/"))  # /dev/stdout may lead to a file
    if path.exists() and (device or not path.is_file()):
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(text)
    else:
        write_text(path.resolve(), text)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Make the contents of a folder's files, which others wrote, outlive a power cut."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all; numbers that JSON does not have (nan, inf) are an error."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises UserError naming it when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, found {error}") from None


# Folders that we empty ----------------------------------------------------------------------------------------------


def check_new_folder(folder: Path) -> None:
    """Raise UserError unless a folder that a person named is new or empty, and not the current one."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        kind = "link" if folder.is_symlink() else "file"
        raise UserError(f"{folder} is a {kind}, expected a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty, expected a new folder")
    if folder.resolve() == Path.cwd():
        raise UserError(f"{folder} is the current folder, expected a new one")


def check_own_folder(folder: Path, record: str, keys: Sequence[str], made: re.Pattern[str] = OURS) -> None:
    """Raise UserError unless a folder that a person named is new, or one that a command of ours made before: with the
    JSON file `record` that has these keys, and else only files whose path in it `made` matches."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return check_new_folder(folder)
    if not (folder / record).is_file():
        raise UserError(f"{folder} is not empty and holds no {record} of ours, expected a new folder")
    there = read_json(folder / record)
    if not isinstance(there, dict) or not set(keys) <= there.keys():
        raise UserError(f"{folder / record} is not what croco writes, expected a new folder")
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name != record and not path.is_dir() and not made.fullmatch(name):
            raise UserError(f"{path} was not made by croco, expected a new folder")
    return None


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A folder of ours that becomes `to`, which is new or empty, when all in it is written.

    It stands beside `to`, marked as ours and locked. What a killed process left there is removed; raises UserError for
    what is somebody else's, and where another process is at it.
    """
    check_new_folder(to)
    folder = to.with_name(f".{to.name}.making")
    if os.path.lexists(folder) and not (folder / OWNER).is_file():
        raise UserError(f"{folder} was not made by croco, expected no file or folder of this name")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        owner = (folder / OWNER).open("a")
    with owner:
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{to} is being made by another croco process") from None
        if not (folder / OWNER).is_file():
            raise UserError(f"{to} was made by another croco process meanwhile")
        for path in folder.iterdir():
            if path.name != OWNER:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder)
            raise
        (folder / OWNER).unlink()
        sync_files(folder)
        with writing(to):
            folder.rename(to)
        sync_folder(to.parent)


def remove(path: Path) -> None:
    """Remove a file, a link (never what it leads to), or a folder that is not another stage's."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    elif OURS.fullmatch(path.name) and path.suffix:
        raise UserError(f"{path} is a folder, expected a file")
    elif not (path / RECORD).exists():
        shutil.rmtree(path)


def remove_folder(folder: Path) -> None:
    """Remove a folder that `check_own_folder` has looked into; a link to one is only unlinked."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        shutil.rmtree(folder)


# Digests of files ---------------------------------------------------------------------------------------------------


def check_digest(path: Path, digest: str) -> None:
    """Raise UserError when a file's bytes are not those that were written; a file is read once for each change."""
    try:
        stat = path.stat()
        present = _digest(path.resolve(), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    if present != digest:
        raise UserError(f"{path} is damaged: its bytes are not those that were written")


@lru_cache(maxsize=100_000)
def _digest(path: Path, size: int, time: int) -> str:
    with path.open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


def file_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Digests of some of a folder's files, as `check_digest` takes them."""
    stats = {name: (folder / name).stat() for name in names}
    return {
        name: _digest((folder / name).resolve(), stat.st_size, stat.st_mtime_ns)
        for name, stat in stats.items()
    }
