"""What the recipe says of any model: which weights, and how they are read."""

from __future__ import annotations

from typing import Literal

from croco.recipe_runtime import Section

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Model(Section):
    model: str  # "lab:policy", a directory, or a hub id
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Dtype = "auto"


class Causal(Model):
    """A model that completes conversations."""

    chat_template: str | None = None  # a Jinja file that replaces the tokenizer's own
