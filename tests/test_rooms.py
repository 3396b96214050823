"""The rules of the rooms: which part of the house may import what."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent / "src" / "croco"
FILES = sorted(HOUSE.rglob("*.py"))

# a package → the only places in the house that may import it
ONLY_IN = {
    "vllm": (),
    "ray": ("pipeline/ray.py",),
    "peft": ("models/lora.py",),
    "httpx2": ("models/http_client.py",),
    "euroeval": ("stages/euroeval/program.py",),
    "trl": (),
}
# rooms of pure numbers: no engine, no model library
PURE = ("stages/train/losses.py", "stages/evaluate/stats.py", "stages/evaluate/winrate.py")
ENGINES = ("croco.models", "transformers", "vllm", "ray", "peft", "openai", "accelerate")
# the house loads with the command line, before anything heavy
LIGHT = (
    "__init__.py",
    "__main__.py",
    "cli/main.py",
    "cli/files.py",
    "cli/app.py",
    "errors.py",
    "config/arms.py",
    "config/errors.py",
    "config/checks.py",
    "config/evaluation.py",
    "config/load.py",
    "config/models.py",
    "config/recipe.py",
    "config/rules.py",
    "config/runtime.py",
    "config/study.py",
    "config/sweep.py",
    "languages.py",
)
HEAVY = ("torch", "transformers", "polars", "pyarrow", "numpy", "datasets", "peft", "matplotlib")


def place(path: Path) -> str:
    return path.relative_to(HOUSE).as_posix()


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Modules that a file imports, `from a.b import c` as a.b and a.b.c."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def touches(modules: set[str], package: str) -> bool:
    return any(module == package or module.startswith(package + ".") for module in modules)


@pytest.mark.parametrize("path", FILES, ids=place)
def test_a_file_imports_only_what_its_room_may(path: Path) -> None:
    modules = imports(path)
    for package, rooms in ONLY_IN.items():
        assert not touches(modules, package) or place(path) in rooms, f"{place(path)} imports {package}"
    if place(path).startswith(PURE):
        for package in ENGINES:
            assert not touches(modules, package), f"{place(path)} imports {package}"
    if place(path) in LIGHT:
        for package in HEAVY:
            assert not touches(imports(path, top_level_only=True), package), f"{place(path)} loads {package}"


def test_no_drawers_for_odds_and_ends() -> None:
    names = {path.name for path in FILES}
    assert not names & {"utils.py", "helpers.py", "common.py", "misc.py"}


def test_nothing_unpickles_or_swallows() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not touches(imports(path), "pickle"), place(path)
        bare = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type is None]
        assert not bare, f"{place(path)} has a bare except in line {bare[0].lineno}"
        called = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & {"eval", "exec"}, place(path)
