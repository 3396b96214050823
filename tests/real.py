"""A real model that some tests run, SmolLM2-135M-Instruct, and completions of it that others read."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from croco.errors import UserError
from croco.models import gguf

ROOT = Path(__file__).parents[1]
TEXT = Path(__file__).parent / "data" / "smollm2.parquet"


def smollm2(fetched: bool = False) -> Path:
    """Its folder, `models/smollm2` of this clone; what needs it is skipped where it is not, and cannot be fetched."""
    folder = ROOT / "models" / "smollm2"
    if not folder.is_dir():
        if not fetched:
            pytest.skip("SmolLM2 is not here: croco fetch smollm2 --to models/smollm2")
        try:
            gguf.fetch("smollm2", folder, print)
        except UserError as error:
            pytest.skip(f"SmolLM2 is not here and cannot be fetched: {error}")
    return folder


def completions() -> pl.DataFrame:
    """Completions at temperature 1 of 12 everyday prompts in eight languages, four each: prompt_id, language,
    sample_id, messages, completion, completion_tokens, finish_reason."""
    return pl.read_parquet(TEXT)
