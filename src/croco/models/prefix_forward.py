"""One forward over many sequences that share prefixes: each prefix is computed once, the rest in batches by length.

Keys and values of a prefix are stored once, and the rows behind it look at them there (`attention/prefill`). Where a
group saves too few tokens, or an architecture does not allow it, whole sequences are computed: the same numbers.
Padding is on the right, where causal attention never looks. On a GPU in half precision groups follow one another in one
row, for flash attention of variable lengths, without padding (`attention/rows`).

Shapes: B rows, P prefix tokens, T tokens after it."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from croco.models.attention.decode import plugged_in
from croco.models.attention.last_layer import finished_at
from croco.models.attention.prefill import NAME, Batch, Prefix
from croco.models.attention.rows import NAME as ROWS
from croco.models.attention.rows import PackedSegments
from croco.models.attention.support import depends_on_batch, forget_lengths, unsupported
from croco.models.memory import buckets

CPU_TOKENS = 2048  # computed at once: larger batches leave a CPU's caches and are up to a third slower
# a prefix's keys and values: in the same row, kept, computed again
Way = Literal["packed", "stored", "whole"]
Row = tuple[int, int]  # (group, sequence within it)
# of one prefix, (1, key-value heads, P, D) per layer
KeysValues = tuple[list[torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True)
class Group:
    """Sequences `prefix + rest`, one per rest; every rest has a token, the prefix may be empty."""

    prefix: list[int]
    rests: list[list[int]]


def forward(
    network: Any,
    groups: Sequence[Group],
    token_budget: int,
    way: Way = "stored",
    read_at: Sequence[Sequence[int]] | None = None,
) -> Iterator[tuple[list[Row], Any]]:
    """Yield (rows, the network's output over their rests, right-padded to (B, T, …)) until every rest is done.

    `token_budget` bounds the tokens of a batch, and those of the prefixes stored at a time. With `read_at`, the one
    place in each rest that is wanted, the others' output is arbitrary. The way "whole" is that of transformers."""
    share = way != "whole" and can_share(network)
    if share and way == "packed":
        yield from _packed(network, groups, token_budget, read_at)
        return
    read_at = read_at if way != "whole" else None
    ours = [g for g, group in enumerate(groups) if share and not _slides(network, group)]
    shared = sorted((g for g in ours if _saves(groups[g])), key=lambda g: len(groups[g].prefix))
    for number, pool in enumerate(_pools([len(groups[g].prefix) for g in shared], token_budget)):
        stored = _store(network, groups, shared[pool], token_budget)
        alone = set(ours) - set(shared) if number == 0 else set()
        yield from _rests(network, groups, [*stored, *alone], stored, token_budget, read_at)
    others = sorted(set(range(len(groups))) - set(ours))
    yield from _rests(network, groups, others, None, token_budget, read_at)


def can_share(network: Any) -> bool:
    """Whether our attention computes what the network's does: known layers, computed by SDPA."""
    return unsupported(network) is None and network.config._attn_implementation == "sdpa"


def _slides(network: Any, group: Group) -> bool:
    """Whether a sliding window ends within one of the sequences."""
    config = network.config.get_text_config()
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if window is None or (kinds and "sliding_attention" not in kinds):
        return False
    return len(group.prefix) + max(map(len, group.rests), default=0) > window


def _saves(group: Group) -> bool:
    """Whether sharing leaves out more than an eighth of a group's tokens."""
    whole = len(group.prefix) * len(group.rests) + sum(map(len, group.rests))
    return len(group.prefix) * (len(group.rests) - 1) > whole / 8


def _pools(lengths: Sequence[int], token_budget: int) -> Iterator[slice]:
    """Slices of lengths that together stay under the budget; one empty slice of none."""
    start = total = 0
    for place, length in enumerate(lengths):
        if place > start and total + length > token_budget:
            yield slice(start, place)
            start, total = place, 0
        total += length
    yield slice(start, len(lengths))


def _packed(
    network: Any, groups: Sequence[Group], token_budget: int, read_at: Sequence[Sequence[int]] | None
) -> Iterator[tuple[list[Row], Any]]:
    """Prefixes and rests one after the other in rows of at most `token_budget` tokens, a longer sequence alone; a group
    that is larger takes several rows, its prefix in each."""
    pieces = [
        (g, range(part.start, part.stop), len(group.prefix) + sum(map(len, group.rests[part])))
        for g, group in enumerate(groups)
        for part in _pools([*map(len, group.rests)], max(1, token_budget - len(group.prefix)))
        if part.start < part.stop
    ]
    for row in _pools([tokens for _, _, tokens in pieces], token_budget):
        ids: list[int] = []
        positions: list[int] = []
        lengths: list[tuple[int, ...]] = []
        places: list[tuple[Row, int, int]] = []  # with where its rest begins and how long it is
        for g, members, _ in pieces[row]:
            prefix, rests = groups[g].prefix, groups[g].rests
            ids += prefix
            positions += range(len(prefix))
            own = [len(rests[i]) for i in members]
            lengths += [(len(prefix), *own)] if prefix else [(length,) for length in own]
            for i in members:
                places.append(((g, i), len(ids), len(rests[i])))
                ids += rests[i]
                positions += range(len(prefix), len(prefix) + len(rests[i]))
        if places:
            yield from _one_row(network, ids, positions, lengths, places, read_at)


def _one_row(
    network: Any,
    ids: list[int],
    positions: list[int],
    lengths: list[tuple[int, ...]],
    places: list[tuple[Row, int, int]],
    read_at: Sequence[Sequence[int]] | None,
) -> Iterator[tuple[list[Row], Any]]:
    ids_1T = torch.tensor([ids], device=network.device)
    finished: AbstractContextManager[None] = nullcontext()
    if read_at is not None:
        at = [start + read_at[g][i] for (g, i), start, _ in places]
        finished = finished_at(network, torch.tensor(at, device=network.device), ids_1T.numel())
    with plugged_in(network, ROWS), finished:
        output = network(
            input_ids=ids_1T,
            position_ids=torch.tensor([positions], device=network.device),
            attention_mask=ids_1T.new_ones(
                1, 1, 1, 1
            ),  # not read, but transformers makes one where none is given
            use_cache=False,
            segments=PackedSegments.of(lengths, network.device),
        )
    for g in sorted({g for (g, _), _, _ in places}):  # the rests of one prefix at a time, padded
        its = [(row, start, length) for row, start, length in places if row[0] == g]
        starts = torch.tensor([start for _, start, _ in its], device=network.device)
        longest = max(length for _, _, length in its)
        where = (starts[:, None] + torch.arange(longest, device=network.device)).clamp_max(len(ids) - 1)
        yield (
            [row for row, _, _ in its],
            type(output)(
                **{name: value[0][where] for name, value in output.items() if torch.is_tensor(value)}
            ),
        )


def _store(
    network: Any, groups: Sequence[Group], members: Sequence[int], token_budget: int
) -> dict[int, KeysValues]:
    """Keys and values of each group's prefix, computed in batches of like length (members come sorted by it)."""
    stored: dict[int, KeysValues] = {}
    for batch in buckets([len(groups[g].prefix) for g in members], _at_once(network, token_budget)):
        cache = DynamicCache()
        prefixes = _padded([groups[g].prefix for g in members[batch]], network.device)
        getattr(network, network.base_model_prefix, network)(
            input_ids=prefixes, past_key_values=cache, use_cache=True
        )  # without the head: nothing is read here
        for line, g in enumerate(members[batch]):
            here = slice(line, line + 1), slice(None), slice(len(groups[g].prefix))
            stored[g] = (
                [layer.keys[here].contiguous() for layer in cache.layers],
                [layer.values[here].contiguous() for layer in cache.layers],
            )
    return stored


def _rests(
    network: Any,
    groups: Sequence[Group],
    members: Sequence[int],
    stored: dict[int, KeysValues] | None,
    token_budget: int,
    read_at: Sequence[Sequence[int]] | None,
) -> Iterator[tuple[list[Row], Any]]:
    """The rows of these groups by length, those behind a stored prefix without it; None is transformers' attention."""
    alone = depends_on_batch(network.config)
    skips = {g: 0 if stored and g in stored else len(groups[g].prefix) for g in members}
    rows = [
        ((g, i), (groups[g].prefix if skips[g] else []) + rest)
        for g in members
        for i, rest in enumerate(groups[g].rests)
    ]
    rows.sort(key=lambda row: len(row[1]))
    for batch in buckets([len(ids) for _, ids in rows], 1 if alone else _at_once(network, token_budget)):
        part = sorted(rows[batch], key=lambda row: row[0])  # rows of one prefix are neighbours
        places = [place for place, _ in part]
        ids_BT = _padded([ids for _, ids in part], network.device)
        at_B: torch.Tensor | None = None
        finished: AbstractContextManager[None] = nullcontext()
        if read_at is not None:
            at_B = torch.tensor([skips[g] + read_at[g][i] for g, i in places], device=network.device)
            rows_B = torch.arange(len(at_B), device=network.device)
            finished = finished_at(network, rows_B * ids_BT.shape[1] + at_B, ids_BT.numel())
        if alone:
            forget_lengths(network)
        with finished:
            if stored is None:
                output = network(input_ids=ids_BT, use_cache=False)
            else:
                output = _behind(network, ids_BT, groups, [g for g, _ in places], stored, at_B)
        yield from _without_prefix(places, [skips[g] for g, _ in places], output)


def _behind(
    network: Any,
    ids_BT: torch.Tensor,
    groups: Sequence[Group],
    owners: list[int],
    stored: dict[int, KeysValues],
    at_B: torch.Tensor | None,
) -> Any:
    """The network over rows, of which row b follows the stored prefix of group `owners[b]`, if there is one."""
    start_B = torch.tensor(
        [len(groups[g].prefix) if g in stored else 0 for g in owners], device=network.device
    )
    prefixes = [
        Prefix(slice(owners.index(g), owners.index(g) + owners.count(g)), *stored[g])
        for g in sorted(set(owners) & stored.keys())
    ]
    with plugged_in(network, NAME):
        return network(
            input_ids=ids_BT,
            position_ids=start_B[:, None] + torch.arange(ids_BT.shape[1], device=network.device),
            use_cache=False,
            batch=Batch(prefixes, at_B, network.config.get_text_config().num_hidden_layers - 1),
        )


def _at_once(network: Any, token_budget: int) -> int:
    return min(token_budget, CPU_TOKENS) if network.device.type == "cpu" else token_budget


def _without_prefix(rows: list[Row], skips: list[int], output: Any) -> Iterator[tuple[list[Row], Any]]:
    """Where whole sequences were computed: give out what comes after each prefix, rows of like prefixes together."""
    for skip in sorted(set(skips)):
        lines = [line for line, its in enumerate(skips) if its == skip]
        yield (
            [rows[line] for line in lines],
            type(output)(
                **{name: value[lines, skip:] for name, value in output.items() if torch.is_tensor(value)}
            ),
        )


def _padded(rows: Sequence[list[int]], device: torch.device) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.stack(
        [F.pad(torch.tensor(row, dtype=torch.long), (0, width - len(row))) for row in rows]
    ).to(device)
