"""A conversation with a model: the person's lines in, the model's answers out, word by word."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from croco.config.models import Causal
from croco.errors import Refused, printable
from croco.models.chat_template import end_ids, prompt_ids
from croco.models.loading import load_causal
from croco.models.model_files import context_of
from croco.models.plain_decoder import own_defaults_off
from croco.models.protocols import Decoding
from croco.models.stop_strings import ends_of

NEW, QUIT = "/new", "/quit"


class _Printer(TextStreamer):
    """Prints whole words as they come, without what could steer the terminal, and keeps them."""

    text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        print(printable(text), end="\n" if stream_end else "", flush=True)


def chat(
    causal: Causal,
    adapter: Path | None,
    *,
    device: str,
    instruction: str | None,
    system: str | None,
    decoding: Decoding,
) -> None:
    """Answer each line of the standard input, every earlier turn in mind, until it ends; raises UserError for a model
    that does not load. `instruction` ends the last turn, as in tuning; nothing but `decoding` says how answers are
    sampled, as there."""
    model, tokenizer = load_causal(causal, adapter, device)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    for text in _lines():
        if text == NEW:
            messages = list(opening)
            continue
        asked = [*messages, {"role": "user", "content": text}]
        try:
            ids = prompt_ids(tokenizer, asked, instruction)
        except Refused as error:
            print(printable(str(error)), file=sys.stderr)
            continue
        context = context_of(model.config)
        room = context - len(ids)
        if room <= 0:
            full = f"the conversation fills the context of {context} tokens; {NEW} begins another"
            print(full, file=sys.stderr)
            continue
        answer = _answer(model, tokenizer, ids, decoding, min(room, decoding.max_new_tokens))
        messages = [*asked, {"role": "assistant", "content": answer}]


def _lines() -> Iterator[str]:
    """What the person writes, line by line, until the input ends or says so; a pipe gets no prompts."""
    person = sys.stdin.isatty()
    if person:
        print(f"{NEW} begins anew, {QUIT} or Ctrl-D ends; Ctrl-C stops an answer", file=sys.stderr)
    while True:
        try:
            line = input("> ") if person else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if (not person and not line) or line.strip() == QUIT:
            return
        if line.strip():
            yield line.strip()


@torch.inference_mode()
def _answer(model: Any, tokenizer: Any, ids: list[int], decoding: Decoding, most: int) -> str:
    """The completion without a stop string, which is printed."""
    printer = _Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ends = sorted(end_ids(tokenizer, model.generation_config) | ends_of(tokenizer, decoding.stop))
    sampled: dict[str, Any] = {}
    if decoding.temperature:
        sampled = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
    config = GenerationConfig(
        max_new_tokens=most,
        do_sample=decoding.temperature > 0,
        eos_token_id=ends,
        pad_token_id=ends[0],
        stop_strings=list(decoding.stop) or None,
        **sampled,
    )
    prompt = torch.tensor([ids], device=model.device)
    try:
        with own_defaults_off(model):
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=config,
                streamer=printer,
                tokenizer=tokenizer,
            )
    except KeyboardInterrupt:
        print()
    stops = [at for stop in decoding.stop if (at := printer.text.find(stop)) >= 0]
    return printer.text[: min(stops, default=None)]
