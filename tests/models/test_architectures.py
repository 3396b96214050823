"""Every architecture of the zoo: nothing crashes, nothing is silently inexact, and docs/architectures.md says which way
each goes.

`make test` takes a tenth of them, another one every day; the slow test takes all. A change is taken over into the page
by `python tests/models/test_architectures.py`.
"""

from __future__ import annotations

import logging
import re
import sys
from datetime import date
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

import pytest
import torch

import tuned_zoo
import zoo
from croco.errors import UserError
from croco.models.attention.support import forget_lengths
from croco.models.loading import load_policy
from croco.models.protocols import Decoding, Request, ScoreRequest
from croco.models.transformers import HFLikelihood, HFSampler
from tiny import make_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEAD = """# Architectures

Tried on a tiny random model of each (`tests/zoo.py`); written by `python tests/models/test_architectures.py`.

## Sampling and scoring

Which way the engine "transformers" goes. "shared" computes a prompt once for all of its
completions; the slower ways leave everything to transformers and give its numbers. In float32 greedy completions equal
`generate` and log-probabilities a plain forward; in bfloat16 they agree within rounding. Which way a model goes is
decided by a trial on the loaded model, and is in `stage.json`.

| architecture | sampling | scoring | in bfloat16 |
|---|---|---|---|
"""
TUNING_HEAD = """
## Tuning

A DPO step in float32, with adapters on the layers that `training.lora.targets = "auto"` means. "shared" rows compute a
prompt once for both completions; the others leave everything to transformers. Loss and the gradient of every adapter
are those of TRL's DPOTrainer with PEFT's own layers (the loss within 1e-4, the gradient within 1e-3). The merged
model, saved and read again, gives the log-probabilities of base and adapter within 1e-4. Which rows a model gets is
decided by a trial on its own pairs, and is in `stage.json`.

| architecture | rows | adapters | loss and gradient | merged |
|---|---|---|---|---|
"""


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(
        7, zoo.VOCABULARY - 20, (count,), generator=torch.Generator().manual_seed(seed)
    ).tolist()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of transformers' own generate."""
    forget_lengths(model)
    asked = torch.tensor([prompt])
    made = model.generate(
        input_ids=asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=count,
        eos_token_id=[2], pad_token_id=0,
    )[0].tolist()[len(prompt) :]  # fmt: skip
    return made[: made.index(2)] if 2 in made else made


def sampled(model: Any, prompts: list[list[int]]) -> tuple[str, list[bool]]:
    """Which way a model is sampled, and which of the prompts are continued as by generate."""
    sampler = HFSampler(model, make_tokenizer(zoo.VOCABULARY), 4000)
    asked = [Request(key, prompt, [1]) for key, prompt in enumerate(prompts)]
    found = dict(sampler.sample(asked, Decoding(0.0, 1.0, 0, 16)))
    way = "shared" if sampler.path == "shared-prefix" else f"prompt by prompt: {sampler.reason}"
    return way, [found[key][0].ids == greedy(model, prompt, 16) for key, prompt in enumerate(prompts)]


def scored(model: Any, prompts: list[list[int]]) -> tuple[str, float]:
    """Which way a model scores, and the largest difference of a log-probability from a plain forward's."""
    scorer = HFLikelihood(model, make_tokenizer(zoo.VOCABULARY), 300, mean=False)
    completions = [ids(count, count) for count in (1, 6, 11)]
    found = scorer.score([ScoreRequest(key, prompt, completions) for key, prompt in enumerate(prompts)])
    largest = 0.0
    for prompt, scores in zip(prompts, found, strict=True):
        for completion, score in zip(completions, scores, strict=True):
            forget_lengths(model)
            whole = torch.tensor([[*prompt, *completion, 2]])
            with torch.inference_mode():  # the last token predicts nothing: it is not fed here either
                logits = model(input_ids=whole[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :]
            logps = logits.float().log_softmax(-1)
            plain = logps.gather(-1, whole[0, len(prompt) :, None]).sum().item()
            largest = max(largest, abs(score - plain))
    ways = {"shared-prefix": "shared"}
    way = ways.get(scorer.facts["scorer"], f"{scorer.facts['scorer']}: {scorer.facts['reason']}")
    return way, largest


def row(name: str) -> str:
    """The page's line of an architecture; fails where a way is not exact."""
    prompts = [ids(count, seed) for seed, count in enumerate((4, 9, 21, 40))]
    ways = {}
    for kind, dtype in TYPES.items():
        try:
            model = zoo.make(name, dtype)
        except ImportError as error:
            return f"| {name} | needs a package | {error} | |"
        how, same = sampled(model, prompts)
        scoring, gap = scored(model, prompts)
        ways[kind] = (how, scoring)
        if dtype == torch.float32:
            assert all(same), f"{name} is sampled otherwise than by generate: {same}, {how}"
            assert gap < 1e-4, f"{name}: {gap:.1e}, {scoring}"
        else:
            assert gap < 0.5, f"{name} in bfloat16: {gap:.1e}, {scoring}"
    same_way = "the same" if ways["float32"] == ways["bfloat16"] else "; ".join(ways["bfloat16"])
    return short(f"| {name} | {ways['float32'][0]} | {ways['float32'][1]} | {same_way} |")


def short(line: str) -> str:
    """A line without what differs between machines: measured numbers."""
    return re.sub(r"by [\d.e+-]+", "by a measured gap", line)


def in_float32(line: str) -> list[str]:
    """Which way bfloat16 goes may hang on a machine's rounding: it is compared with transformers only."""
    return line.split(" | ")[:3]


def refusal(name: str, folder: Path) -> str:
    zoo.save(folder, name)
    with pytest.raises(UserError) as error:
        load_policy(str(folder))
    said = str(error.value).replace(f"model '{folder}': ", "").replace("|", "/")
    return f"| {name} | refused: {said[:120]} | refused | refused |"


def line_of(name: str, folder: Path) -> str:
    return refusal(name, folder) if name == "T5" else row(name)


def tuning_line_of(name: str, folder: Path) -> str:
    if name == "T5":
        return "| T5 | refused | | | |"
    try:
        return short(f"| {name} | {' | '.join(tuned_zoo.tuned(name, folder))} |")
    except ImportError as error:
        return f"| {name} | needs a package: {error} | | | |"


def page_lines(table: int = 0) -> dict[str, str]:
    """The lines of the page's first table, or the second one, by architecture."""
    part = PAGE.read_text(encoding="utf-8").split("\n## ")[1 + table]
    lines = [line for line in part.splitlines() if line.startswith("| ")][1:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def test_the_page_has_every_architecture() -> None:
    assert list(page_lines(0)) == list(page_lines(1)) == list(zoo.MODELS)


TURN = date.today().toordinal() % 10


@pytest.mark.parametrize("name", list(zoo.MODELS)[TURN::10])
def test_a_tenth_of_the_architectures_is_as_the_page_says(name: str, tmp_path: Path) -> None:
    assert in_float32(line_of(name, tmp_path)) == in_float32(page_lines()[name])


@pytest.mark.parametrize("name", list(zoo.MODELS)[TURN::10])
def test_a_tenth_of_the_architectures_is_tuned_as_the_page_says(name: str, tmp_path: Path) -> None:
    assert tuning_line_of(name, tmp_path) == page_lines(1)[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(zoo.MODELS))
def test_every_architecture_is_tuned_as_the_page_says(name: str, tmp_path: Path) -> None:
    assert tuning_line_of(name, tmp_path) == page_lines(1)[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(zoo.MODELS))
def test_every_architecture_is_as_the_page_says(name: str, tmp_path: Path) -> None:
    assert in_float32(line_of(name, tmp_path)) == in_float32(page_lines()[name])


if __name__ == "__main__":
    import tempfile

    logging.disable(logging.WARNING)
    asked = sys.argv[1:] or list(zoo.MODELS)
    tables = []
    for number, line in enumerate((line_of, tuning_line_of)):
        known = page_lines(number) if TUNING_HEAD.strip() in PAGE.read_text() else {}
        for each in [name for name in zoo.MODELS if name in asked]:
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    known[each] = line(each, Path(scratch))
                    print(known[each], flush=True)
                except Exception as error:  # noqa: BLE001 (all of them, then the failures)
                    print(f"{each}: {type(error).__name__} {error}", file=sys.stderr)
        tables.append("\n".join(known.get(name, f"| {name} | not known") for name in zoo.MODELS) + "\n")
    PAGE.write_text(HEAD + tables[0] + TUNING_HEAD + tables[1], encoding="utf-8")
