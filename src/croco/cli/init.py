"""`croco init`: a commented recipe into the current folder, to be made one's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from croco.errors import UserError
from croco.storage.files import writing

RECIPES = Path(__file__).parents[1] / "config" / "recipes"
# name → the file, and what a person does before running it
KINDS = {
    "lab": ("quickstart.toml", "nothing to prepare: minutes on two cores"),
    "one-gpu": ("one-gpu.toml", "put your prompts into data/, see docs/guide/your-data.md"),
    "eight-gpus": ("eight-gpus.toml", "put your prompts into data/, see docs/guide/your-data.md"),
    "paper-eurollm": ("paper-eurollm-9b.toml", "the first lines of the recipe say which files it reads"),
    "paper-tiny-aya": ("paper-tiny-aya.toml", "the first lines of the recipe say which files it reads"),
}


def write(kind: str, to: Path) -> Iterator[str]:
    """Write the recipe into `to`; yields what to do next. Nothing is overwritten."""
    if kind not in KINDS:
        raise UserError(f"croco init {kind}: no such recipe, expected one of {', '.join(KINDS)}")
    name, todo = KINDS[kind]
    text = (RECIPES / name).read_text(encoding="utf-8")
    if (to / name).exists() or (to / name).is_symlink():
        raise UserError(f"{to / name} is there already: move it away, or begin in another folder")
    with writing(to / name), (to / name).open("x", encoding="utf-8") as file:
        file.write(text)
    yield f"{name} written"
    yield f"first: {todo}"
    yield from (f"then:  croco {command} {name}" for command in ("doctor", "plan", "run"))
