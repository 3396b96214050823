"""What holds for the whole source: who may import what, what loads with the command line, what is never written."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "src" / "croco").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


def test_imports_keep_the_contracts() -> None:
    linter = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))",
    ]
    found = subprocess.run(linter, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_recipe_and_the_command_line_load_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "polars", "pyarrow", "numpy", "datasets", "peft")
    code = (
        "import sys, croco.cli.main, croco.config.load, croco.storage.hashing; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_no_drawers_for_odds_and_ends() -> None:
    assert not {path.name for path in FILES} & {"utils.py", "helpers.py", "common.py", "misc.py"}


def test_nothing_unpickles_or_swallows() -> None:
    for path in FILES:
        assert "pickle" not in imports(path), path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), (
                f"{path}: a bare except in line {node.lineno}"
            )
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{path}, line {node.lineno}"
