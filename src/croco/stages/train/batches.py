"""Which pairs make a step, which of them a micro-batch, and how a micro-batch is laid out as tensors.

The pairs of a step (one optimizer update) follow from the seed alone. How a step is cut into micro-batches depends on
the machine's token budget and changes no gradient (dropout apart): losses are summed over pairs and divided by the
pairs of the step.

Shapes: B rows, T tokens of a row (padded), M completion tokens of the batch, N places that predict one, P pairs, C
completions of a pair."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor

from croco.models.attention.mask import PADDING, PROMPT
from croco.stages.train.encode import Example

# Running a micro-batch costs about this many tokens before its first token: small models are bound by launches, and for
# large ones it is small beside any row.
MICRO_BATCH_OVERHEAD = 128
# Tokens in a group of equally long rows below which a call of attention per segment costs more than a mask saves.
SEGMENT_TOKENS = 256
# Ways to lay pairs out. Shared rows hold a prompt once, with all its completions: "packed", all pairs in a single row
# for one call of attention (GPUs); "segments", a row per pair and a call per segment (CPUs); "masked", a row per pair
# under a mask. "plain": a row per completion. "single": such rows computed one by one.
Rows = Literal["packed", "segments", "masked", "plain", "single"]


@dataclass(frozen=True)
class TrainingData:
    """Examples, those to train on before those held out; which of them make each step; the ledger of pairs left out;
    and how well a plain trait tells chosen from rejected (AUC)."""

    examples: Sequence[Example]
    num_training: int
    steps: Sequence[Sequence[int]]
    dropped: pl.DataFrame
    shortcuts: Mapping[str, float]

    @property
    def held_out(self) -> range:
        return range(self.num_training, len(self.examples))

    @property
    def used(self) -> list[int]:
        """The examples that are looked at: few updates need not reach all."""
        return sorted({i for step in self.steps for i in step} | set(self.held_out))

    def counts(self) -> dict[str, int]:
        """What a training is made of, for its record; tokens are those of all steps."""
        return {
            "steps": len(self.steps),
            "pairs": self.num_training,
            "validation_pairs": len(self.held_out),
            "tokens": sum(self.examples[i].num_tokens for step in self.steps for i in step),
            "cut_pairs": sum(example.cut_tokens > 0 for example in self.examples),
            "cut_tokens": sum(example.cut_tokens for example in self.examples),
        }


@dataclass(frozen=True)
class Layout:
    """How pairs go through the model on this machine; `plain_rows` is why prompts are not shared, or None."""

    rows: Rows
    micro_batch_tokens: int
    gradient_checkpointing: bool = False
    plain_rows: str | None = None


@dataclass(frozen=True)
class Batch:
    """P pairs with C completions each; completion c of pair p is sequence c * P + p.

    `branch_BT` is as in `models/attention/mask.py`; `pair_BT` is the pair, −1 in padding. Target m is predicted from
    column `source_M[m]` of the flattened (B * T) grid and belongs to sequence `sequence_M[m]`; `read_N` are those
    columns, each once. `lengths` are those of prompt and completions, per row (packed: per pair). `singles` are batches
    of one row each."""

    rows: Rows
    num_pairs: int
    num_completions: int
    input_ids_BT: Tensor
    branch_BT: Tensor
    position_BT: Tensor
    pair_BT: Tensor
    source_M: Tensor
    read_N: Tensor
    target_M: Tensor
    sequence_M: Tensor
    lengths: tuple[tuple[int, ...], ...]
    singles: "tuple[Batch, ...]" = ()

    @property
    def shared(self) -> bool:
        """Whether a row holds a prompt with all its completions."""
        return self.rows not in ("plain", "single")

    def to(self, device: torch.device | str) -> "Batch":
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved, singles=tuple(single.to(device) for single in self.singles))


def collate(examples: Sequence[Example], *, rows: Rows, pad_id: int = 0) -> Batch:
    """Lay examples out in right-padded rows, the chosen completions first. Segments of few tokens go by a mask after
    all."""
    num_pairs, num_completions = len(examples), len(examples[0].completions)
    every = list(range(num_completions))
    if rows == "packed":
        layout = [[(p, every) for p in range(num_pairs)]]
    elif rows in ("segments", "masked"):
        layout = [[(p, every)] for p in range(num_pairs)]
    else:
        layout = [[(p, [c])] for c in every for p in range(num_pairs)]
    width = max(sum(_tokens(examples[p], branches) for p, branches in members) for members in layout)
    shape = (len(layout), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    branch, pair = np.full(shape, PADDING, dtype=np.int64), np.full(shape, PADDING, dtype=np.int64)
    position = np.zeros(shape, dtype=np.int64)
    source, target, sequence = [], [], []
    for row, members in enumerate(layout):
        start = 0
        for p, branches in members:
            prompt = examples[p].prompt
            stop = start + len(prompt)
            last = stop - 1
            pair[row, start : start + _tokens(examples[p], branches)] = p
            input_ids[row, start:stop], branch[row, start:stop] = prompt, PROMPT
            position[row, start:stop] = np.arange(len(prompt))
            for number, c in enumerate(branches, start=1):
                completion = examples[p].completions[c]
                start, stop = stop, stop + len(completion) - 1
                input_ids[row, start:stop], branch[row, start:stop] = completion[:-1], number
                position[row, start:stop] = len(prompt) + np.arange(stop - start)
                # The first token of a completion is predicted by the prompt's last position, the others by their own.
                learnt = np.flatnonzero(examples[p].learnt or np.ones(len(completion)))
                source.append(row * width + np.concatenate([[last], np.arange(start, stop)])[learnt])
                target.append(np.asarray(completion)[learnt])
                sequence.append(np.full(len(learnt), c * num_pairs + p))
            start = stop
    arrays = {"input_ids_BT": input_ids, "branch_BT": branch, "position_BT": position, "pair_BT": pair}
    for name, parts in (("source_M", source), ("target_M", target), ("sequence_M", sequence)):
        arrays[name] = np.concatenate(parts)
    arrays["read_N"] = np.unique(arrays["source_M"])
    tensors = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
    lengths = tuple(
        (len(examples[p].prompt), *(len(examples[p].completions[c]) - 1 for c in branches))
        for members in layout
        for p, branches in members
    )
    singles: tuple[Batch, ...] = ()
    if rows == "single":
        alone = (replace(examples[p], completions=(examples[p].completions[c],)) for [(p, [c])] in layout)
        singles = tuple(collate([example], rows="plain", pad_id=pad_id) for example in alone)
    if rows == "segments" and input_ids.size < SEGMENT_TOKENS * len(list(groupby(lengths))):
        rows = "masked"
    return Batch(rows, num_pairs, num_completions, **tensors, lengths=lengths, singles=singles)


def _tokens(example: Example, branches: Sequence[int]) -> int:
    return len(example.prompt) + sum(len(example.completions[c]) - 1 for c in branches)


def row_tokens(example: Example, rows: Rows) -> int:
    """Tokens that a pair takes in rows: a shared prompt once, plain rows as wide as the longer of them."""
    own = [len(example.prompt) + len(completion) - 1 for completion in example.completions]
    return {"plain": len(own) * max(own), "single": sum(own)}.get(rows, example.num_tokens)


def plan_steps(
    num_pairs: int, batch_pairs: int, epochs: int, seed: int, updates: int | None = None
) -> list[list[int]]:
    """The pairs of every step: each epoch is a permutation of all pairs, by seed and epoch alone, cut as equally as can
    be, because a step's loss is a mean and pairs of a short step would weigh more. `updates` is the number of steps, if
    given."""
    steps: list[list[int]] = []
    per_epoch = -(-num_pairs // batch_pairs)
    for epoch in range(epochs if updates is None else -(-updates // per_epoch)):
        order = np.random.default_rng([seed, epoch]).permutation(num_pairs)
        steps.extend(part.tolist() for part in np.array_split(order, per_epoch))
    return steps[:updates]


def cut(indices: Sequence[int], lengths: Sequence[int], budget: int, packed: bool = False) -> list[list[int]]:
    """Micro-batches of a step, sorted by length and cut where padding and overhead are least; the longest first, since
    what does not fit into memory should show at once.

    `lengths[i]` are the `row_tokens` of example i. A micro-batch holds at most `budget` tokens, padding included, or
    one row. `packed` rows have no padding and are only filled up."""
    order = sorted(indices, key=lambda i: (-lengths[i], i))
    if packed:
        return _fill(order, lengths, budget)
    best: list[float] = [0.0] + [np.inf] * len(order)
    came_from = [0] * (len(order) + 1)
    for start in range(len(order)):
        width = lengths[order[start]]
        for stop in range(start + 1, len(order) + 1):
            tokens = width * (stop - start)
            if tokens > budget and stop > start + 1:
                break
            if best[start] + tokens + MICRO_BATCH_OVERHEAD < best[stop]:
                best[stop], came_from[stop] = best[start] + tokens + MICRO_BATCH_OVERHEAD, start
    cuts, stop = [], len(order)
    while stop:
        cuts.append(order[came_from[stop] : stop])
        stop = came_from[stop]
    return cuts[::-1]


def _fill(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    cuts: list[list[int]] = []
    tokens = budget
    for i in order:
        if not cuts or tokens + lengths[i] > budget:
            cuts.append([])
            tokens = 0
        cuts[-1].append(i)
        tokens += lengths[i]
    return cuts
