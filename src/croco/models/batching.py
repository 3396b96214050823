"""Batches of like lengths under a token budget: the only batching there is, for prompts and for conversations."""

from collections.abc import Iterator, Sequence


def buckets(lengths: Sequence[int], token_budget: int) -> Iterator[slice]:
    """Slices of ascending lengths whose padded size stays under the budget and which hold little padding: the longest
    is at most a quarter and 8 tokens longer than the shortest. A length over the budget is a slice of its own."""
    start = 0
    while start < len(lengths):
        end = start + 1
        while (
            end < len(lengths)
            and lengths[end] <= 1.25 * lengths[start] + 8
            and lengths[end] * (end + 1 - start) <= token_budget
        ):
            end += 1
        yield slice(start, end)
        start = end
