"""Pretrains a model of the lists world until a time, on a GPU if there is one: plain documents first, then habits.

Worker processes make documents ahead of time; all that were made stay on the device and batches are drawn from them, so
that the device never waits. A batch has one of three fixed shapes, so that on CUDA a whole step (forward, backward,
optimizer) is one graph: a small model's step is otherwise bound by launching kernels. Learning rates follow the share
of the time that has passed, so the decay is always complete.
"""

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing.pool import IMapIterator
from random import Random

import numpy as np
import torch
from transformers import AttentionInterface, LlamaForCausalLM, PreTrainedTokenizerFast

from lab.list_corpus import Habits, documents
from lab.pretrain import Say, encode

LENGTHS = (24, 48, 112)  # tokens that rows are padded to
IGNORED = -100  # the label of a token that is not trained on
PLAIN_SHARE = 0.25  # of the time is spent on documents without habits
Arrays = list[tuple[np.ndarray, np.ndarray]]  # ids and labels, (documents, length) int16, for each of LENGTHS


@dataclass(frozen=True)
class Setup:
    """What a model trains on; sizes suit one GPU."""

    seed: int
    habits: Habits
    tokens_per_batch: int = 8192
    peak: float = 0.02
    workers: int = 4
    chunks: int = 100  # of documents; every fifth is plain
    documents_per_chunk: int = 10_000


# Documents --------------------------------------------------------------------------------------------------------


def arrays(tokenizer: PreTrainedTokenizerFast, setup: Setup, number: int) -> Arrays:
    """Chunk `number` of the documents, sorted into LENGTHS. Longer ones are cut and have no end token then:
    loops, which have none anyway (no other document of 20,000 was so long)."""
    plain = number % 5 == 0
    stream = documents(
        setup.seed * 1000 + number, setup.documents_per_chunk if plain else 0, habits=setup.habits
    )
    rows: dict[int, list[tuple[list[int], list[bool]]]] = {length: [] for length in LENGTHS}
    for ids, trained in encode(tokenizer, list(islice(stream, setup.documents_per_chunk))):
        rows[next((n for n in LENGTHS if n >= len(ids)), LENGTHS[-1])].append((ids, trained))
    out: Arrays = []
    for length, members in rows.items():
        ids_NT = np.full((len(members), length), tokenizer.pad_token_id, np.int16)
        labels_NT = np.full((len(members), length), IGNORED, np.int16)
        for n, (ids, trained) in enumerate(members):
            stop = min(length, len(ids))
            ids_NT[n, :stop] = ids[:stop]
            labels_NT[n, :stop] = np.where(trained[:stop], ids[:stop], IGNORED)
        out.append((ids_NT, labels_NT))
    return out


class Supply:
    """Documents on the device, which grow as workers make more; `batch` never waits but for the first of a phase."""

    def __init__(self, chunks: Iterator[Arrays], setup: Setup, device: str) -> None:
        self.chunks, self.setup, self.device, self.received = chunks, setup, device, 0
        self.rng = Random(setup.seed)
        self.stored: dict[bool, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def take(self, wait: bool) -> bool:
        """Stores the next chunk if there is one yet."""
        if self.received == self.setup.chunks:
            return False
        try:
            more = (
                self.chunks.next(None if wait else 0)
                if isinstance(self.chunks, IMapIterator)
                else next(self.chunks)
            )
        except multiprocessing.TimeoutError:
            return False
        plain = self.received % 5 == 0
        new = [(torch.from_numpy(i).to(self.device), torch.from_numpy(on).to(self.device)) for i, on in more]
        old = self.stored.get(plain)
        self.stored[plain] = (
            new
            if old is None
            else [(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in zip(old, new, strict=True)]
        )
        self.received += 1
        return True

    def batch(self, plain: bool) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Which of LENGTHS, and ids and labels (B, T) of documents at random; every document is as likely."""
        while plain not in self.stored:
            self.take(wait=True)
        stored, sizes = self.stored[plain], [num_rows(self.setup, length) for length in LENGTHS]
        which = self.rng.choices(
            range(len(LENGTHS)), [len(ids) / n for (ids, _), n in zip(stored, sizes, strict=True)]
        )[0]
        ids, labels = stored[which]
        at = torch.randint(len(ids), (sizes[which],), device=self.device)
        return which, ids[at].long(), labels[at].long()


def num_rows(setup: Setup, length: int) -> int:
    return max(1, setup.tokens_per_batch // length)


@contextmanager
def chunks(tokenizer: PreTrainedTokenizerFast, setup: Setup) -> Iterator[Iterator[Arrays]]:
    """The chunks of a model's documents in order, made by forked worker processes, or here if there are none.

    To be entered before CUDA is touched, which does not survive a fork."""
    numbers, make = range(setup.chunks), partial(arrays, tokenizer, setup)
    if not setup.workers:
        yield map(make, numbers)
        return
    global _make
    _make = make
    with multiprocessing.get_context("fork").Pool(setup.workers) as pool:
        yield pool.imap(_made, numbers)


_make: Callable[[int], Arrays] | None = None  # what a worker process inherits


def _made(number: int) -> Arrays:
    assert _make is not None
    return _make(number)


# Steps ------------------------------------------------------------------------------------------------------------


class Muon:
    """Muon as `torch.optim.Muon` (no weight decay), for matrices of equal shape at once and with a tensor of a rate."""

    def __init__(self, matrices: list[torch.nn.Parameter], rate: torch.Tensor) -> None:
        shapes = {p.shape: None for p in matrices}
        self.groups = [[p for p in matrices if p.shape == shape] for shape in shapes]
        self.momenta = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        self.rate = rate

    @torch.no_grad()
    def step(self) -> None:
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            momentum.lerp_(gradient, 0.05)
            update = gradient.lerp(momentum, 0.95).bfloat16()
            rows, columns = group[0].shape
            update = update.mT if rows > columns else update
            update = update / update.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            for _ in range(5):
                gram = update @ update.mT
                update = 3.4445 * update + (-4.775 * gram + 2.0315 * gram @ gram) @ update
            update = update.mT if rows > columns else update
            change = update.float() * (self.rate * -math.sqrt(max(1.0, rows / columns)))
            torch._foreach_add_(list(group), list(change.unbind()))


class Steps:
    """Training steps of a model on batches of fixed shapes: CUDA graphs where they can be captured, else eager."""

    def __init__(self, model: LlamaForCausalLM, setup: Setup, device: str, say: Say) -> None:
        self.model, self.device = model, device
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        rate = torch.zeros((), device=device)
        self.muon = Muon(matrices, rate)
        on_cuda = device == "cuda"
        self.adamw = torch.optim.AdamW(
            others, rate.clone(), betas=(0.9, 0.98), weight_decay=0.0, capturable=on_cuda, fused=on_cuda
        )
        self.rates = (rate, self.adamw.param_groups[0]["lr"])
        self.graphs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.cuda.CUDAGraph]] = []
        if on_cuda:
            try:
                self.graphs = [self._capture(num_rows(setup, length), length) for length in LENGTHS]
            except Exception as error:  # noqa: BLE001 (whatever it is, eager steps are left)
                say(f"no CUDA graph, every step is eager: {error}")
                torch.cuda.synchronize()

    def __call__(self, which: int, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One step on a batch (B, T) of shape number `which`; its loss, which the next step overwrites."""
        if not self.graphs:
            return self._step(ids, labels)
        static_ids, static_labels, loss, graph = self.graphs[which]
        static_ids.copy_(ids)
        static_labels.copy_(labels)
        graph.replay()
        return loss

    def set_rates(self, peak: float, progress: float) -> None:
        scale = min(1.0, progress / 0.01 + 0.05)
        scale *= 1.0 if progress < 0.4 else 0.02 + 0.98 * max(0.0, 1 - progress) / 0.6
        for rate, base in zip(self.rates, (peak, 0.25 * peak), strict=True):
            rate.fill_(base * scale)

    def _step(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for p in self.model.parameters():
            p.grad = None
        with torch.autocast(self.device, torch.bfloat16, cache_enabled=False):
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            logits = self.model.lm_head(hidden)
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.muon.step()
        self.adamw.step()
        return loss.detach()

    def _capture(
        self, rows: int, length: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.cuda.CUDAGraph]:
        """The graph of a step; the steps before it, which warm up, are at a rate of zero."""
        ids = torch.ones(rows, length, dtype=torch.long, device=self.device)
        labels = ids.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step(ids, labels)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._step(ids, labels)
        return ids, labels, loss, graph


def _causal(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention that needs no mask, since padding is on the right; transformers' own builds one in a capture."""
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def train(model: LlamaForCausalLM, documents: Supply, setup: Setup, end: float, device: str, say: Say) -> int:
    """Trains in place until `end` of `time.monotonic`; says the mean loss every ten seconds, returns the steps."""
    started, said, number, losses = time.monotonic(), 0.0, 0, []
    AttentionInterface.register("lists_causal", _causal)
    model.to(device).train().set_attn_implementation("lists_causal")
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    documents.take(wait=True)
    steps = Steps(model, setup, device, say)
    say(f"{device}, {len(steps.graphs)} graphs, after {time.monotonic() - started:.1f} s")
    started = time.monotonic()
    while (passed := time.monotonic() - started) < end - started:
        progress = passed / (end - started)
        if number % 10 == 0:
            steps.set_rates(setup.peak, progress)
            documents.take(wait=False)
        loss = steps(*documents.batch(progress < PLAIN_SHARE))
        number += 1
        if number % 20 == 0 or device == "cpu":  # waits for the device, which is thus never far behind
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"pretraining diverged at step {number}")
        if passed - said >= 10:
            recent, said = losses[-20:], passed
            mean = sum(recent) / max(1, len(recent))
            say(f"step {number:,}, {progress:.0%} of the time, loss {mean:.4f}, {documents.received} chunks")
    model.cpu().eval().set_attn_implementation("sdpa")
    say(f"{number:,} steps, last loss {losses[-1] if losses else math.nan:.4f}")
    return number
