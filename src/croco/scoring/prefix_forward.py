"""One forward over many sequences that share prefixes: each prefix is computed once, the rest in batches by length.

Completions of one prompt begin with the same tokens. Their keys and values are computed once and copied to the rows
that need them; rows are sorted by the length of what is left, across prompts, so that little is padding. Where sharing
saves no tokens, or the architecture is not known to allow it, whole sequences are batched by length: the same numbers.

All padding is on the right of what is computed, where causal attention never looks, and rows of unlike prefixes get an
explicit mask: transformers would read their positions as packed sequences otherwise.

Shapes: B rows, P prefix tokens, T tokens after it, D width of a head, G prefixes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from croco.sampling.architecture import unsupported
from croco.sampling.buckets import buckets

CPU_TOKENS = 2048  # computed at once: larger batches leave a CPU's caches and are up to a third slower
Row = tuple[int, int]  # (group, sequence within it)


@dataclass(frozen=True)
class Group:
    """Sequences `prefix + rest`, one per rest; every rest has a token, the prefix may be empty."""

    prefix: list[int]
    rests: list[list[int]]


def forward(
    network: Any, groups: Sequence[Group], token_budget: int, share: bool = True
) -> Iterator[tuple[list[Row], Any]]:
    """Yield (rows, the network's output over their rests, right-padded to (B, T, …)) until every rest is done.

    `token_budget` bounds the tokens of a batch, prefixes included (a longer single row is a batch of its own).
    """
    if share and can_share(network) and _saves(groups):
        yield from _shared(network, groups, token_budget)
        return
    if network.device.type == "cpu":
        token_budget = min(token_budget, CPU_TOKENS)
    rows = [
        ((g, i), len(group.prefix), group.prefix + rest)
        for g, group in enumerate(groups)
        for i, rest in enumerate(group.rests)
    ]
    rows.sort(key=lambda row: len(row[2]))
    for batch in buckets([len(ids) for _, _, ids in rows], token_budget):
        part = rows[batch]
        output = network(input_ids=_padded([ids for _, _, ids in part], network.device), use_cache=False)
        yield from _without_prefix(part, output)


def can_share(network: Any) -> bool:
    """Whether explicit masks mean what they say: known attention layers, computed by SDPA."""
    return unsupported(network) is None and network.config._attn_implementation == "sdpa"


def _saves(groups: Sequence[Group]) -> bool:
    """Whether sharing leaves out more than an eighth of all tokens; below that its copies cost more than it saves."""
    whole = sum(len(group.prefix) * len(group.rests) + sum(map(len, group.rests)) for group in groups)
    spared = sum(len(group.prefix) * (len(group.rests) - 1) for group in groups)
    return spared > whole / 8


def _shared(network: Any, groups: Sequence[Group], token_budget: int) -> Iterator[tuple[list[Row], Any]]:
    order = sorted(range(len(groups)), key=lambda g: len(groups[g].prefix))
    for bucket in buckets([len(groups[g].prefix) for g in order], token_budget):
        members = order[bucket]
        if not groups[members[-1]].prefix:
            plain = [Group([], groups[g].rests) for g in members]
            for rows, output in forward(network, plain, token_budget, share=False):
                yield [(members[g], i) for g, i in rows], output
            continue
        cache = DynamicCache()  # without the config: all tokens are kept, the masks do the sliding
        prefixes = _padded([groups[g].prefix for g in members], network.device)
        getattr(network, network.base_model_prefix, network)(
            input_ids=prefixes, past_key_values=cache, use_cache=True
        )  # without the head: nothing is read here
        longest = len(groups[members[-1]].prefix)
        rests = sorted(
            ((place, i) for place, g in enumerate(members) for i in range(len(groups[g].rests))),
            key=lambda row: len(groups[members[row[0]]].rests[row[1]]),
        )
        lengths = [longest + len(groups[members[place]].rests[i]) for place, i in rests]
        budget = token_budget
        if network.device.type == "cpu":  # the copied prefix takes memory, but is not computed
            budget = min(budget, CPU_TOKENS * sum(lengths) // (sum(lengths) - longest * len(lengths)))
        for batch in buckets(lengths, budget):
            rows = [(members[place], i) for place, i in rests[batch]]
            places = torch.tensor([place for place, _ in rests[batch]], device=network.device)
            yield rows, _continue(network, groups, rows, cache, places, longest)


def _continue(
    network: Any,
    groups: Sequence[Group],
    rows: list[Row],
    cache: DynamicCache,
    places: torch.Tensor,
    longest: int,
) -> Any:
    """The network over the rows' rests, each after its own prefix."""
    copied = DynamicCache()
    for layer, stored in enumerate(cache.layers):
        copied.update(stored.keys.index_select(0, places), stored.values.index_select(0, places), layer)
    ids_BT = _padded([groups[g].rests[i] for g, i in rows], network.device)
    prefix_B = torch.tensor([len(groups[g].prefix) for g, _ in rows], device=network.device)
    own_T = torch.arange(ids_BT.shape[1], device=network.device)
    position_BT = prefix_B[:, None] + own_T
    stored_P = torch.arange(longest, device=network.device)
    at_BK = torch.cat([stored_P.expand(len(rows), -1), position_BT], dim=1)  # position of every key
    real_BK = torch.cat([stored_P < prefix_B[:, None], torch.ones_like(position_BT, dtype=torch.bool)], dim=1)
    see_BTK = real_BK[:, None, :] & (at_BK[:, None, :] <= position_BT[:, :, None])
    config = network.config.get_text_config()
    mask: Any = see_BTK[:, None]
    if "sliding_attention" in set(getattr(config, "layer_types", None) or ()):
        near_BTK = at_BK[:, None, :] > position_BT[:, :, None] - config.sliding_window
        mask = {"full_attention": mask, "sliding_attention": (see_BTK & near_BTK)[:, None]}
    return network(
        input_ids=ids_BT,
        position_ids=position_BT,
        attention_mask=mask,
        past_key_values=copied,
        use_cache=True,
    )


def _without_prefix(part: list[tuple[Row, int, list[int]]], output: Any) -> Iterator[tuple[list[Row], Any]]:
    """Whole sequences were computed: hand out what stands after each prefix, rows of like prefixes together."""
    by_prefix: dict[int, list[int]] = {}
    for line, (_, prefix, _) in enumerate(part):
        by_prefix.setdefault(prefix, []).append(line)
    for prefix, lines in by_prefix.items():
        yield (
            [part[line][0] for line in lines],
            type(output)(
                **{name: value[lines, prefix:] for name, value in output.items() if torch.is_tensor(value)}
            ),
        )


def _padded(rows: Sequence[list[int]], device: torch.device) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.stack(
        [F.pad(torch.tensor(row, dtype=torch.long), (0, width - len(row))) for row in rows]
    ).to(device)
