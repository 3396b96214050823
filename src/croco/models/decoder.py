"""Sampling N continuations of many prompts in one batch, each prompt computed and stored once.

Continuations decode as rows of one batch together with those of other prompts; a row that ends gives its slot to a
waiting one. The number of rows follows from a token budget; on running out of memory it is halved and what was not
finished starts again with the same seeds. Exact for decoder-only models with full or sliding-window attention over
rotary or no positions (`support`, tried by `proofs`); others are sampled by `plain_decoder`. Leaves out preemption: a
row's whole length is reserved when it enters.

Shapes: R rows (slots), G prompts in the store, N most rows of one prompt, H key-value heads, P prompt tokens, C own
tokens, D head dimension, V vocabulary."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from croco.models.attention.decode import Layout, OwnKeys, plugged_in
from croco.models.memory import buckets
from croco.models.protocols import Completion, Decoding, Request
from croco.models.stop_strings import LOOK_EVERY, Stops, finished
from croco.models.token_sampling import draw, tokens_drawn

_CHUNK = 16  # own-token columns are added in chunks


class ContinuousBatchDecoder:
    """Rows in slots, prompts in a store. `run` is the loop; everything below it is one step of it."""

    def __init__(
        self,
        model: Any,
        end_tokens: set[int],
        decoding: Decoding,
        requests: Sequence[Request],
        max_context: int,
        token_budget: int,
        stops: Stops | None = None,
    ) -> None:
        self.model, self.ends, self.decoding, self.stops = model, end_tokens, decoding, stops
        self.device = model.device
        self.waiting = deque(range(len(requests)))
        self.requests, self.max_context, self.token_budget = requests, max_context, token_budget
        self.finished: dict[int, list[Completion | None]] = {}
        # rows whose prompt is in the store: request, continuation, first token
        self.ready: deque[tuple[int, int, int]] = deque()
        self.store: list[int] = []  # the requests whose prompts are in the store
        self.prefix_keys: list[torch.Tensor] = []
        self.prefix_values: list[torch.Tensor] = []
        self.open_rows = np.zeros(len(requests), dtype=np.int64)  # continuations not finished, per request
        self._make_slots(self._num_slots())

    def _num_slots(self) -> int:
        """Rows that fit the budget when each grows to its limit and a prompt is stored once for its rows."""
        longest = max(len(r.prompt_ids) for r in self.requests)
        fewest = min(len(r.seeds) for r in self.requests)
        row_tokens = self.decoding.max_new_tokens + -(-longest // fewest)
        return min(max(1, self.token_budget // row_tokens), sum(len(r.seeds) for r in self.requests))

    def _make_slots(self, num: int) -> None:
        self.row_of = np.full((num, 2), -1, dtype=np.int64)  # request, continuation; −1 when the slot is free
        self.written = np.zeros((num, self.decoding.max_new_tokens), dtype=np.int32)
        self.count = np.zeros(num, dtype=np.int64)  # tokens drawn so far
        self.limit = np.full(num, self.decoding.max_new_tokens, dtype=np.int64)
        self.prompt_tokens = np.ones(num, dtype=np.int64)
        self.seeds = np.zeros(num, dtype=np.int64)
        self.own = OwnKeys(num, min(_CHUNK, self.decoding.max_new_tokens))

    def run(self) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (index of the request, its completions) as requests finish."""
        while self.waiting or self.ready or (self.row_of[:, 0] >= 0).any():
            self._refill()
            yield from self._hand_over()
            if (self.row_of[:, 0] >= 0).any():
                self._step()
                yield from self._hand_over()

    def _hand_over(self) -> Iterator[tuple[int, list[Completion]]]:
        done = [i for i in self.finished if self.open_rows[i] == 0]
        for index in done:
            yield index, [sample for sample in self.finished.pop(index) if sample is not None]

    # -- prompts ------------------------------------------------------------------------------------------------

    def _refill(self) -> None:
        """Give free slots to waiting rows once enough are free, and prefill more prompts when rows run short."""
        free = np.flatnonzero(self.row_of[:, 0] < 0)
        if len(free) < max(1, len(self.row_of) // 16) and len(free) < len(self.row_of):
            return
        if len(self.ready) < len(free) and self.waiting:
            self._prefill(max(len(free) - len(self.ready), len(self.row_of) // 4))
        if self.ready:
            self._seat(free[: len(self.ready)])
        elif len(free) > len(self.row_of) // 4 and len(free) < len(self.row_of):
            self._compact(np.flatnonzero(self.row_of[:, 0] >= 0))

    def _prefill(self, rows: int) -> None:
        """Compute the next prompts, at least `rows` continuations' worth, and draw every first token."""
        batch: list[int] = []
        while self.waiting and rows > 0:
            batch.append(self.waiting.popleft())
            rows -= len(self.requests[batch[-1]].seeds)
        batch.sort(key=lambda i: len(self.requests[i].prompt_ids))
        self._drop_dead_prompts()
        for bucket in buckets([len(self.requests[i].prompt_ids) for i in batch], self.token_budget):
            self._prefill_bucket(batch[bucket])

    def _prefill_bucket(self, bucket: list[int]) -> None:
        """One forward over prompts of similar length. Padding is on the right, where causal attention never looks."""
        lengths = [len(self.requests[i].prompt_ids) for i in bucket]
        ids = torch.zeros(len(bucket), max(lengths), dtype=torch.long)
        for line, i in enumerate(bucket):
            ids[line, : lengths[line]] = torch.tensor(self.requests[i].prompt_ids)
        last, which = torch.tensor(lengths, device=self.device).sub(1).unique(return_inverse=True)
        cache = DynamicCache()  # without the config: every layer keeps all tokens, the mask does the sliding
        logits = self.model(
            input_ids=ids.to(self.device), past_key_values=cache, use_cache=True, logits_to_keep=last
        ).logits
        first = logits[torch.arange(len(bucket), device=self.device), which]
        self._store([layer.keys for layer in cache.layers], [layer.values for layer in cache.layers], bucket)
        self._first_tokens(first, bucket)

    def _store(self, keys: list[torch.Tensor], values: list[torch.Tensor], bucket: list[int]) -> None:
        if self.store:
            width = max(keys[0].shape[2], self.prefix_values[0].shape[2])
            keys = [
                torch.cat([_widen(old, width, 3), _widen(new.transpose(2, 3), width, 3)])
                for old, new in zip(self.prefix_keys, keys, strict=True)
            ]
            values = [
                torch.cat([_widen(old, width, 2), _widen(new, width, 2)])
                for old, new in zip(self.prefix_values, values, strict=True)
            ]
        else:
            keys = [new.transpose(2, 3).contiguous() for new in keys]
        self.prefix_keys, self.prefix_values, self.store = keys, values, self.store + bucket
        self.layout: Layout | None = None

    def _first_tokens(self, first_GV: torch.Tensor, bucket: list[int]) -> None:
        counts = torch.tensor([len(self.requests[i].seeds) for i in bucket], device=self.device)
        seeds = torch.tensor([seed for i in bucket for seed in self.requests[i].seeds], device=self.device)
        tokens: list[int] = []
        rows = torch.arange(len(bucket), device=self.device).repeat_interleave(counts)
        for part in rows.split(4096):  # the logits of one prompt are repeated for its rows
            here = slice(len(tokens), len(tokens) + len(part))
            drawn = draw(
                first_GV.index_select(0, part), seeds[here], torch.zeros_like(seeds[here]), self.decoding
            )
            tokens += tokens_drawn(self.model, drawn).tolist()
        row = 0
        for i in bucket:
            request = self.requests[i]
            self.finished[i], self.open_rows[i] = [None] * len(request.seeds), len(request.seeds)
            room = min(self.decoding.max_new_tokens, self.max_context - len(request.prompt_ids))
            for j in range(len(request.seeds)):
                if tokens[row] in self.ends:
                    self._finish(i, j, [], "stop")
                elif room == 1:
                    self._finish(i, j, [tokens[row]], "length")
                else:
                    self.ready.append((i, j, tokens[row]))
                row += 1

    def _drop_dead_prompts(self) -> None:
        alive = [g for g, i in enumerate(self.store) if self.open_rows[i]]
        if len(alive) == len(self.store):
            return
        keep = torch.tensor(alive, dtype=torch.long, device=self.device)
        longest = max((len(self.requests[self.store[g]].prompt_ids) for g in alive), default=0)
        self.prefix_keys = [k.index_select(0, keep)[..., :longest].contiguous() for k in self.prefix_keys]
        self.prefix_values = [
            v.index_select(0, keep)[:, :, :longest].contiguous() for v in self.prefix_values
        ]
        self.store = [self.store[g] for g in alive]
        self.layout = None

    # -- rows ---------------------------------------------------------------------------------------------------

    def _seat(self, slots: np.ndarray) -> None:
        """Put ready rows into free slots; what an earlier row left there is never looked at."""
        for slot in slots:
            i, j, token = self.ready.popleft()
            request = self.requests[i]
            self.row_of[slot] = i, j
            self.written[slot, 0], self.count[slot] = token, 1
            self.limit[slot] = min(self.decoding.max_new_tokens, self.max_context - len(request.prompt_ids))
            self.prompt_tokens[slot], self.seeds[slot] = len(request.prompt_ids), request.seeds[j]
        self.layout = None

    def _compact(self, rows: np.ndarray) -> None:
        """Leave only the rows still running: no row waits for the free slots."""
        for name in ("row_of", "written", "count", "limit", "prompt_tokens", "seeds"):
            setattr(self, name, getattr(self, name)[rows])
        self.own.keep(torch.from_numpy(rows).to(self.device))
        self._drop_dead_prompts()
        self.layout = None

    def _place(self) -> Layout:
        """The place of each row among the rows of its prompt; the slots' state goes to the device."""
        number = {i: g for g, i in enumerate(self.store)}
        active = self.row_of[:, 0] >= 0
        prompt = np.array([number.get(i, 0) if i >= 0 else 0 for i in self.row_of[:, 0].tolist()])
        order = np.argsort(prompt[active], kind="stable")
        rows = np.flatnonzero(active)[order]
        counts = np.bincount(prompt[rows], minlength=len(self.store))
        start = np.repeat(np.cumsum(counts) - counts, counts)
        place = np.zeros(len(prompt), dtype=np.int64)
        place[rows] = prompt[rows] * counts.max() + np.arange(len(rows)) - start
        gather = np.zeros(len(self.store) * counts.max(), dtype=np.int64)
        gather[place[rows]] = rows
        self.count[~active], self.prompt_tokens[~active] = 1, 1  # free slots compute something harmless
        here = lambda array: torch.from_numpy(array).to(self.device)  # noqa: E731
        age = here(self.count - 1)
        self.tokens = here(self.written[np.arange(len(age)), self.count - 1].astype(np.int64))
        self.seeds_R = here(self.seeds)
        return Layout(
            self.prefix_keys, self.prefix_values, here(gather), here(place), here(self.prompt_tokens), age, 0
        )

    def _step(self) -> torch.Tensor:
        """One token for every row; returns the logits (R, V) that they were drawn from."""
        logits_RV = self._forward()
        layout = self.layout
        assert layout is not None
        layout.age_R = layout.age_R + 1
        self.tokens = draw(logits_RV, self.seeds_R, layout.age_R, self.decoding)
        self._take(tokens_drawn(self.model, self.tokens))
        return logits_RV

    def _forward(self) -> torch.Tensor:
        """The model on every row's last token: logits (R, V)."""
        if self.layout is None:
            self.layout = self._place()
        layout = self.layout
        longest = int(self.count.max())
        if longest > self.own.capacity:
            self.own.grow(min(longest + _CHUNK - 1, self.decoding.max_new_tokens))
        layout.capacity, layout.biases = self.own.capacity, {}
        self.own.begin(layout.age_R)
        with plugged_in(self.model):
            logits: torch.Tensor = self.model(
                input_ids=self.tokens[:, None],
                position_ids=(layout.prompt_tokens_R + layout.age_R)[:, None],
                past_key_values=self.own,
                use_cache=True,
                shared_prefix=layout,
            ).logits[:, -1]
        return logits

    def _take(self, tokens: np.ndarray) -> None:
        """Write the drawn tokens down and finish the rows that ended."""
        active = self.row_of[:, 0] >= 0
        stopped = active & np.isin(tokens, list(self.ends))
        rows = np.arange(len(tokens))
        self.written[rows, np.minimum(self.count, self.decoding.max_new_tokens - 1)] = tokens
        self.count += 1
        over = stopped | (active & (self.count >= self.limit))
        if self.stops is not None:
            for slot in np.flatnonzero(active & ~over & (self.count % LOOK_EVERY == 0)):
                over[slot] = self.stops.near_end(self.written[slot, : self.count[slot]].tolist())
        for slot in np.flatnonzero(over):
            i, j = self.row_of[slot].tolist()
            drawn = int(self.count[slot]) - int(stopped[slot])
            self._finish(i, j, self.written[slot, :drawn].tolist(), "stop" if stopped[slot] else "length")
            self.row_of[slot] = -1
        self.count[~active] = 1

    def _finish(self, i: int, j: int, ids: list[int], reason: str) -> None:
        self.finished[i][j] = finished(ids, reason, self.requests[i].seeds[j], self.stops)
        self.open_rows[i] -= 1


def _widen(x: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    missing = width - x.shape[dim]
    return F.pad(x, (0, missing) if dim == 3 else (0, 0, 0, missing)) if missing else x
