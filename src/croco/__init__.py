"""CroCo: cross-lingual contrastive preference tuning on self-generations.

What a user imports: `load` a recipe, `run` or `plan` it, `read_table` of a finished stage; or one stage after the other
with plain arguments, `sample`, `score`, `pairs`, `export`, `train`. Names are loaded when first
used, so that importing the package (and `croco --help`) loads neither torch nor Polars.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "load": "croco.config.load",
    "Recipe": "croco.config.recipe",
    "export": "croco.stages.pair.export_trl",
    "pairs": "croco.stages.pair.api",
    "plan": "croco.pipeline.run",
    "run": "croco.pipeline.run",
    "read_table": "croco.storage.shards",
    "sample": "croco.stages.api",
    "score": "croco.stages.api",
    "train": "croco.stages.api",
    "UserError": "croco.errors",
}

__all__ = [
    "Recipe", "UserError", "__version__", "export", "load", "pairs", "plan", "read_table", "run", "sample", "score",
    "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'croco' has no attribute '{name}'")
    return getattr(import_module(_WHERE[name]), name)
