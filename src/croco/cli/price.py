"""What the stages of a recipe may take in GPU hours on a machine: an estimate, from parameters and the device's peak.

A measured rate is always better: `croco doctor RECIPE --measure` gives one, and stages that ran have recorded theirs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from croco.config.models import Model
from croco.errors import UserError
from croco.storage.hashing import local_model

# peak TFLOP/s of dense bfloat16 products, and GiB of memory, as the vendors give them
DEVICES = {
    "h200": (989.0, 141),
    "h100": (989.0, 80),
    "a100": (312.0, 80),
    "l40s": (362.0, 48),
    "rtx4090": (165.0, 24),
}
# shares of the peak. Measured on an H100: transformers generates 14,800 tokens a second of a 0.6 B model, scoring reads
# 140,000 of one, and tuning takes 22.5 pairs of 1,024 + 2 × 1,024 tokens a second of a 1 B model. "generate" (vLLM) is
# a guess.
SHARES = {"generate, transformers": 0.018, "generate": 0.15, "read": 0.17, "train": 0.42}
# floating point operations per parameter and token: forward 2; with adapters backward 2, reference 2, recomputation 2
READ_FLOPS, TRAIN_FLOPS = 2, 8
EUROEVAL_TOKENS = 2000 * 1500  # examples of a data set and iteration, tokens of each: a guess
SIZES = {"CohereLabs/tiny-aya-global": 3.35e9}  # models whose names do not say it


@dataclass(frozen=True)
class Load:
    """What a stage does with a model: `tokens` generated, read or trained on."""

    stage: str
    kind: str  # "generate", "read" or "train"
    model: Model
    tokens: float
    engine: str = "transformers"


def machine(text: str) -> tuple[int, str]:
    """ "8xh100" → (8, "h100"); raises UserError for a device that is not in the table."""
    match = re.fullmatch(r"(?:(\d{1,4})x)?([a-z0-9]+)", text.lower())
    if not match or match[2] not in DEVICES or match[1] == "0":
        raise UserError(f"--machine {text}: expected such as 8xh100, with one of {', '.join(DEVICES)}")
    return int(match[1] or 1), match[2]


def parameters(model: Model) -> tuple[float, float] | None:
    """All parameters and those that a token passes through, of a local model's files or a hub model's name."""
    folder = local_model(model.model)
    if folder is not None:
        total = sum(_weights(path) for path in folder.glob("*.safetensors"))
        return (total, total) if total else None
    if model.model in SIZES:
        return SIZES[model.model], SIZES[model.model]
    sizes = re.findall(r"(?i)(?<![a-z0-9.])(a?)(\d+(?:\.\d+)?)(b|m)(?![a-z0-9])", model.model)
    by_kind = {bool(active): float(number) * (1e9 if unit in "bB" else 1e6) for active, number, unit in sizes}
    return (by_kind[False], by_kind.get(True, by_kind[False])) if False in by_kind else None


def _weights(path: Path) -> int:
    """The numbers in a safetensors file, by its header."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes = [tensor["shape"] for name, tensor in header.items() if name != "__metadata__"]
        return sum(math.prod(int(length) for length in shape) for shape in shapes)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        MemoryError,
        OverflowError,
        RecursionError,
    ):
        return 0


def prices(
    loads: Sequence[Load], tensor_parallel: int, where: tuple[int, str], rates: Mapping[str, float]
) -> Iterator[str]:
    """Lines with the hours of each stage and of all, if every completion is as long as allowed."""
    count, device = where
    peak, memory = DEVICES[device]
    yield (
        f"on {count} × {device}, estimated from parameters and the device's peak, every completion as long as allowed:"
    )
    total, unknown = 0.0, []
    stages: dict[tuple[str, str, str], list[Load]] = {}
    for load in loads:
        if load.tokens:
            stages.setdefault((load.stage, load.model.model, load.kind), []).append(load)
    width = max([20, *(len(stage) for stage, _, _ in stages)])
    for same in stages.values():
        load = replace(same[0], tokens=sum(each.tokens for each in same))
        size = parameters(load.model)
        if size is None:
            unknown.append(load.model.model)
            continue
        share = SHARES.get(f"{load.kind}, {load.engine}", SHARES.get(load.kind, 1.0))
        flops = TRAIN_FLOPS if load.kind == "train" else READ_FLOPS
        hours = load.tokens * flops * size[1] / (peak * 1e12 * share) / 3600
        measured = ""
        if load.stage == "sample" and "sample" in rates:
            hours, measured = load.tokens / rates["sample"] / 3600, ", at the rate measured"
        total += hours
        fits = size[0] * 2 / 2**30 / tensor_parallel < memory * 0.9
        misfit = "" if fits else f" (its weights in bfloat16 do not fit in {memory} GiB: see tensor_parallel)"
        yield f"  {load.stage:<{width}} {hours:>9,.2f} GPU hours{measured}{misfit}"
    together = total / count
    shown = f"{together:,.1f} hours" if together < 48 else f"{together / 24:,.1f} days"
    yield f"  {'together':<{width}} {total:>9,.2f} GPU hours, {shown} where all are busy"
    if unknown:
        yield f"  not priced, since the name does not say how large it is: {', '.join(dict.fromkeys(unknown))}"
