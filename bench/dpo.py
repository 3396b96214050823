"""DPO steps against TRL's, side by side on this machine: pairs per second, peak memory, and the work that must be done.

    OMP_NUM_THREADS=1 python bench/dpo.py [--rounds 5] [--shapes 256/256 spread] [--cpu-time]
    python bench/dpo.py --device cuda [--model 9b] [--shapes 1024/1024 4096/1024] [--checkpointing]
    python bench/dpo.py --device cuda --ways eager compiled liger      # ours alone, norms and the like in these ways

Both sides tune the same random Llama with the same LoRA (dropout included: TRL's `disable_dropout` is off unless
--dropout 0) on the same pairs of token ids, in their own loops on transformers' Trainer; the first step of a run is not
counted. TRL is at its best settings, searched one after the other, each with the best of the others so far: its type of
weights on a trial, Liger kernels where they are installed and there is a GPU, `bf16` on (its default) and off, the
sampler (spread lengths), the micro-batch; no gradient checkpointing on a CPU; and its reference cached, which is its
best setting, or on line, which is its default. Ours has the same type and the fastest token budget of those that take
no more memory than TRL at its best. Both then run in turns; printed are medians over the rounds. Against TRL's default
ours is also shown with its table of the reference paid for, as if it were read once and never again. Peak memory is
over what was held before the model was built; on a CPU that of a process of its own. The floor is the arithmetic that
no way around is known for: the prompt once, every completion token once, no gradient of frozen weights, attention to
what may be seen, the head at completion tokens; in pairs per second, at the rate of a large matrix product here. Both
sides must give the same log-probabilities of the reference. On a busy machine --cpu-time counts what the process itself
has used. "Compiled" is every decoder layer by torch.compile for any lengths; its first step is its warm-up, and graphs
that come later are recompilations."""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import torch._dynamo
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback

SHAPES = {"cpu": ("256/256", "256/64", "64/256", "spread"), "cuda": ("1024/1024", "4096/1024")}
# hidden, MLP, layers, heads, key-value heads, vocabulary, tied embeddings
MODELS = {
    "tiny": (256, 704, 6, 4, 4, 4096, True),
    "135m": (576, 1536, 30, 9, 3, 49_152, True),  # SmolLM2's
    "1b": (2048, 5632, 16, 32, 8, 65_536, True),
    "9b": (4096, 12_288, 42, 32, 8, 128_000, False),
}
BATCH_PAIRS = 8  # of one optimizer step
BATCHES = {"cpu": (1, 2, 4, 8), "cuda": (1, 2, 4, 8)}  # pairs of TRL's micro-batch
BUDGETS = {"cpu": (1024, 2048, 4096, 8192), "cuda": (16_384, 24_576, 32_768)}
# how many times TRL's rate is wanted, by model, checkpointing and shape; and of every line
AIMS = {
    ("1b", False, "1024/1024"): 1.5, ("1b", False, "4096/1024"): 2.0, ("1b", False, "spread"): 1.8,
    ("9b", True, "1024/1024"): 1.3, ("9b", True, "4096/1024"): 1.6,
    ("tiny", False, "256/256"): 1.3, ("tiny", False, "256/64"): 2.4, ("tiny", False, "64/256"): 1.15,
    ("tiny", False, "spread"): 1.85,
}  # fmt: skip
MOST_MEMORY, FIRST_STEP_SECONDS, PREFLIGHT = 1.0, 10.0, 0.15
# of the element-wise work of ours: norms, rotary positions, gated activations; Liger stays in a process, so it is last
WAYS = ("eager", "compiled", "liger")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIGER = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # TRL's own head never holds all logits
SEED = 0
CLOCK = time.perf_counter


@dataclass(frozen=True)
class Case:
    """What both sides do."""

    device: str
    model: str
    dtype: str
    shape: str
    steps: int
    checkpointing: bool
    dropout: float = 0.05

    def build(self) -> LlamaForCausalLM:
        hidden, mlp, layers, heads, kv_heads, vocabulary, tied = MODELS[self.model]
        torch.manual_seed(SEED)
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192,
            tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa",
        )  # fmt: skip
        with torch.device(self.device):
            torch.set_default_dtype(DTYPES[self.dtype])
            model = LlamaForCausalLM(config)
            torch.set_default_dtype(torch.float32)
        return model

    def examples(self) -> list[Any]:
        """Pairs of random ids; "spread" has prompts of 80 to 320 and completions of 100 to 400 tokens."""
        from croco.stages.train.encode import Example

        dice, vocabulary = random.Random(SEED), MODELS[self.model][5]

        def ids(length: int) -> list[int]:
            return [dice.randrange(3, vocabulary) for _ in range(length)]

        def lengths() -> tuple[int, int, int]:
            if self.shape == "spread":
                return dice.randint(80, 320), dice.randint(100, 400), dice.randint(100, 400)
            prompt, completion = map(int, self.shape.split("/"))
            return prompt, completion, completion

        drawn = [lengths() for _ in range(BATCH_PAIRS * self.steps)]
        return [
            Example(f"p{k}", "en", ids(p), ([*ids(c - 1), 2], [*ids(r - 1), 2]))
            for k, (p, c, r) in enumerate(drawn)
        ]


# the two sides ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """Seconds of the counted steps, their pairs, seconds of the reference before them, and its values by pair."""

    seconds: float
    pairs: int
    reference_seconds: float
    reference: list[float]
    first_seconds: float  # to the end of the first step: from the weights on, less the reference; TRL's loop
    memory: int = 0  # on a GPU: peak bytes, by `run` over what was held before the model
    planned: tuple[float, int] | None = None  # on a GPU: bytes of training by the preflight, and measured
    graphs: tuple[int, int, int] | None = None  # compiled by the first step, and by the last; breaks in them

    @property
    def rate(self) -> float:
        return self.pairs / self.seconds

    @property
    def whole_rate(self) -> float:
        """Pairs per second when every pair's reference is computed for it."""
        share = self.pairs / len(self.reference)
        return self.pairs / (self.seconds + self.reference_seconds * share)


@dataclass(frozen=True)
class Try:
    """A side and its settings: tokens of our micro-batches and the way of its layers, or pairs of TRL's micro-batch,
    its sampler, bf16 and Liger."""

    side: str
    size: int
    grouped: bool = False
    mixed: bool = False
    liger: bool = False
    cached: bool = True
    way: str = ""  # Liger where it is

    def __str__(self) -> str:
        words = [f"micro-batch {self.size}"] + ([f"bf16={self.mixed}"] if self.side == "theirs" else [])
        words += [self.way] if self.way else []
        words += [name for name, is_so in (("grouped", self.grouped), ("Liger", self.liger)) if is_so]
        return ", ".join(words)


def settings(case: Case) -> Any:
    from croco.config.training import Lora, Training

    return Training(batch_pairs=BATCH_PAIRS, max_tokens=10**6, lora=Lora(dropout=case.dropout))


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return CLOCK()


def compile_layers(model: Any) -> None:
    """Every decoder layer compiled in place; what torch makes of one serves the next where it can."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in model.get_decoder().layers:
        layer.compile(dynamic=True)


def graphs() -> int:
    """Graphs that torch has compiled since `compile_layers`."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def ours(case: Case, one: Try) -> Timed:
    from polars import DataFrame

    from croco.models.lora import apply_lora
    from croco.stages.train.batches import Layout, TrainingData, cut, plan_steps
    from croco.stages.train.choose_rows import choose_rows
    from croco.stages.train.memory_plan import count
    from croco.stages.train.reference import reference_logps
    from croco.stages.train.setup import use_fused_kernels
    from croco.stages.train.trainer import PairTrainer, training_arguments

    model, examples, wanted, budget = case.build(), case.examples(), settings(case), one.size
    ends, made = list[float](), list[int]()

    def step_ended(*_: int) -> None:
        ends.append(now(case.device))
        made.append(graphs())

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        built = now(case.device)
        if case.device == "cuda" and one.way in ("", "liger"):
            use_fused_kernels(model)
        rows, slower = choose_rows(model, examples[:4])
        if slower:
            print(f"  ours in {rows} rows: {slower}", flush=True)
        needs = count(model, wanted, examples[:4], rows)
        began = now(case.device)
        reference = reference_logps(
            model, examples, folder=folder / "reference", rows=rows, micro_batch_tokens=budget
        )
        reference_seconds = now(case.device) - began
        if case.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        steps = plan_steps(len(examples), BATCH_PAIRS, 1, SEED)
        arguments = training_arguments(
            wanted, folder, num_steps=len(steps), seed=SEED, device=model.device, evaluate=False
        )
        arguments.save_strategy = "no"
        sizes = [example.num_tokens for example in examples]
        most = max(
            sum(sizes[i] for i in part) for step in steps for part in cut(step, sizes, budget, packed=True)
        )
        earlier = _memory(False, case.device) if case.device == "cuda" else 0  # by the trial of the rows, say
        held = _memory(True, case.device) if case.device == "cuda" else 0
        adapted = apply_lora(model, wanted.lora, SEED)
        if one.way == "compiled":
            compile_layers(model)
        PairTrainer(
            adapted, arguments, wanted,
            TrainingData(examples, len(examples), steps, DataFrame(), {}), Layout(rows, budget), reference,
            pad_id=0, metrics_file=folder / "metrics.jsonl", on_step=step_ended,
        ).train()  # fmt: skip
        planned = None
        if case.device == "cuda":
            planned = (needs.of(most, case.checkpointing), _memory(False, case.device) - held)
    pairs, first = BATCH_PAIRS * (len(steps) - 1), ends[0] - built - reference_seconds
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    counted = (made[0], made[-1], breaks) if one.way == "compiled" else None
    return Timed(
        ends[-1] - ends[0], pairs, reference_seconds, reference[0].tolist(), first, memory=earlier, planned=planned,
        graphs=counted,
    )  # fmt: skip


class Stamps(TrainerCallback):
    """When each step of TRL's trainer ended."""

    def __init__(self, device: str) -> None:
        self.device, self.ends = device, list[float]()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(now(self.device))


def words(vocabulary: int) -> Any:
    """A tokenizer whose every word is one token, so that TRL, which wants text, gets the very ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word(i): i for i in range(vocabulary)}, unk_token=word(1)))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=word(0), unk_token=word(1), eos_token=word(2)
    )


def word(i: int) -> str:
    return f"<{i}>" if i < 3 else f"w{i}"


def text(ids: Sequence[int]) -> str:
    return " ".join(map(word, ids))


def theirs(case: Case, one: Try) -> Timed:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import dpo_trainer

    from croco.config.training import USUAL_TARGETS

    lora, examples, stamps = settings(case).lora, case.examples(), Stamps(case.device)
    batch, grouped, cached = one.size, one.grouped, one.cached
    rows = [
        {
            "prompt": text(e.prompt), "chosen": " " + text(e.completions[0]), "rejected": " " + text(e.completions[1]),
            "length": len(e.prompt) + max(map(len, e.completions)),
        }
        for e in examples
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        arguments = DPOConfig(
            output_dir=scratch, per_device_train_batch_size=batch, gradient_accumulation_steps=BATCH_PAIRS // batch,
            num_train_epochs=1, learning_rate=5e-6, lr_scheduler_type="cosine", bf16=one.mixed, beta=0.1,
            disable_dropout=case.dropout == 0, use_liger_kernel=one.liger,
            liger_kernel_config=LIGER if one.liger else None,
            use_cpu=case.device == "cpu", gradient_checkpointing=case.checkpointing, max_length=None,
            precompute_ref_log_probs=cached, precompute_ref_batch_size=batch, report_to="none", disable_tqdm=True,
            save_strategy="no", logging_strategy="no", seed=SEED, length_column_name="length",
            remove_unused_columns=not grouped,  # or the lengths go before the sampler reads them
            train_sampling_strategy="group_by_length" if grouped else "random", dataloader_pin_memory=False,
        )  # fmt: skip
        dpo_trainer.hash_module = lambda _: "the same"  # names the reference's table; half a minute at 9 B
        began = now(case.device)
        trainer = DPOTrainer(
            model=case.build(), args=arguments, train_dataset=Dataset.from_list(rows), callbacks=[stamps],
            processing_class=words(MODELS[case.model][5]),
            peft_config=LoraConfig(
                r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(USUAL_TARGETS),
                task_type="CAUSAL_LM",
            ),
        )  # fmt: skip
        made = now(case.device)
        trainer.remove_callback(PrinterCallback)
        started = now(case.device)
        trainer.train()
        table = trainer.train_dataset
        for example, row in zip(examples, table, strict=True):
            assert [row["prompt_ids"], row["chosen_ids"]] == [example.prompt, example.completions[0]]
    reference = list(table["ref_chosen_logps"]) if cached else [0.0] * len(examples)
    ends = stamps.ends
    pairs = BATCH_PAIRS * (len(ends) - 1)
    return Timed(ends[-1] - ends[0], pairs, made - began, reference, ends[0] - started)


# the floor, memory and the table ----------------------------------------------------------------------------


def floor_flops(case: Case) -> float:
    """Operations per pair that a step must do, at the mean over the pairs."""
    hidden, mlp, layers, heads, kv_heads, vocabulary, _ = MODELS[case.model]
    rank = settings(case).lora.rank
    width = hidden // heads * kv_heads
    projections = [(hidden, hidden)] * 2 + [(hidden, width)] * 2 + [(hidden, mlp)] * 3
    # Forward and the gradient of the input; an adapter has that of its own weights besides.
    per_token = layers * sum(2 * 2 * a * b + 3 * 2 * rank * (a + b) for a, b in projections)
    total = 0.0
    for example in case.examples():
        prompt = len(example.prompt)
        seen = prompt * (prompt + 1) / 2
        for completion in example.completions:
            own = len(completion) - 1
            seen += own * prompt + own * (own + 1) / 2
            total += len(completion) * 2 * 2 * hidden * vocabulary
        # Scores and values forward (2 products), and backward the gradients of queries, keys, values and weights (4).
        total += example.num_tokens * per_token + seen * layers * 6 * 2 * hidden
    return total / len(case.examples())


def matmul_rate(case: Case) -> float:
    """Operations per second of a large product in the case's type on its device, the best of five."""
    size = 8192 if case.device == "cuda" else 1024
    a = torch.randn(size, size, device=case.device, dtype=DTYPES[case.dtype])
    best = 0.0
    for _ in range(5):
        began = now(case.device)
        a @ a
        best = max(best, 2 * size**3 / (now(case.device) - began))
    return best


def _memory(reset: bool, device: str) -> int:
    """Bytes held now (after which the peak counts anew), or at the peak since."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats() if reset else None
        return torch.cuda.memory_allocated() if reset else torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    name = "VmRSS:" if reset else "VmHWM:"
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def run(case: Case, one: Try) -> Timed:
    if case.device == "cpu":
        return ours(case, one) if one.side == "ours" else theirs(case, one)
    gc.collect()
    torch.cuda.empty_cache()
    before = _memory(True, case.device)
    timed = ours(case, one) if one.side == "ours" else theirs(case, one)
    return replace(timed, memory=max(timed.memory, _memory(False, case.device)) - before)


def peak(case: Case, one: Try) -> int:
    """Peak bytes of one side in a process of its own, over what it held with everything imported."""
    job = json.dumps([vars(case), vars(one)])
    done = subprocess.run(
        [sys.executable, __file__, "--peak", job], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout.splitlines()[-1])


def peak_here(job: str) -> int:
    import trl  # noqa: F401

    import croco.stages.train.trainer  # noqa: F401

    values, settings_of_side = json.loads(job)
    case = Case(**values)
    before = _memory(True, case.device)
    run(case, Try(**settings_of_side))
    return _memory(False, case.device) - before


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def tried(case: Case, one: Try) -> Timed | None:
    """A first run of a setting, said at once; none where memory runs out or torch cannot compile the layers."""
    try:
        timed = run(case, one)
    except torch.OutOfMemoryError:
        print(f"    {one.side}, {one}: out of memory", flush=True)
        return None
    except Exception as error:
        if one.way != "compiled":
            raise
        reason = " ".join(str(error).split())[:200]
        print(f"    {one.side}, {one}: {type(error).__name__}: {reason}", flush=True)
        return None
    memory = f", {timed.memory / 2**30:.1f} GiB" if timed.memory else ""
    if timed.planned:
        planned, measured = timed.planned
        memory += f" (preflight: {planned / measured:.0%} of what training took"
        memory += f", aim within {PREFLIGHT:.0%}: {verdict(abs(planned / measured - 1) <= PREFLIGHT)})"
    if timed.graphs:
        first, last, breaks = timed.graphs
        memory += f", {first} graphs by the first step, {last - first} later, {breaks} breaks"
    print(
        f"    {one.side}, {one}: {timed.rate:.2f}{memory}, first step after {timed.first_seconds:.1f} s",
        flush=True,
    )
    return timed


def searched(case: Case) -> tuple[Try, Timed]:
    """TRL's best setting: one after the other, each with the best of the others so far."""
    gpu = case.device == "cuda"
    start = Try("theirs", 2 if gpu else 4, mixed=gpu)
    axes: list[tuple[str, Sequence[Any]]] = [
        ("liger", (True,) if gpu and find_spec("liger_kernel") else ()),  # cannot be taken back in a process
        ("mixed", (False, True) if gpu or case.dtype == "bfloat16" else ()),
        ("grouped", (False, True) if case.shape == "spread" else ()),
        ("size", BATCHES[case.device]),
    ]
    found = {start: tried(case, start)}
    best = start
    for name, values in axes:
        for each in (replace(best, **{name: value}) for value in values):
            if each not in found:
                found[each] = tried(case, each)
        best = max(found, key=lambda each: timed.rate if (timed := found[each]) else 0.0)
    timed = found[best]
    if timed is None:
        raise SystemExit(f"TRL does not fit into memory at {case.shape}")
    return best, timed


def compare(case: Case, rounds: int) -> None:
    print(
        f"{case.shape} ({case.model}, {case.dtype}{', checkpointing' if case.checkpointing else ''}):",
        flush=True,
    )
    trl, theirs_first = searched(case)
    allowed = theirs_first.memory or peak(case, trl)
    budgets = [Try("ours", budget) for budget in BUDGETS[case.device]]
    fitting = {one: timed for one in budgets if (timed := tried(case, one))}
    if not fitting:
        raise SystemExit(f"ours does not fit into memory at {case.shape}")
    for mine in sorted(fitting, key=lambda one: -fitting[one].rate):
        held = fitting[mine].memory or peak(case, mine)
        if held <= allowed:
            break
    on_line = replace(trl, cached=False)
    timed = {mine: [fitting[mine]], trl: [theirs_first], on_line: []}
    for _ in range(max(1, rounds - 1)):
        for one in (mine, trl, on_line):
            try:
                timed[one].append(run(case, one))
            except torch.OutOfMemoryError:
                if one is not on_line:  # which was not tried
                    raise
    pairs = zip(timed[mine][0].reference, timed[trl][0].reference, strict=True)
    gap = max(abs(a - b) / abs(b) for a, b in pairs)
    assert gap < (1e-5 if case.dtype == "float32" else 1e-2), f"the references differ by {gap:.1e}"
    rate, best = (median(t.rate for t in timed[one]) for one in (mine, trl))
    whole = median(t.whole_rate for t in timed[mine])
    online = "out of memory"
    if timed[on_line]:
        plain = median(t.rate for t in timed[on_line])
        online = f"{plain:.2f}: {rate / plain:.2f} ×, {whole / plain:.2f} × with our table's making"
    flops = floor_flops(case)
    floor = matmul_rate(case) / flops
    aim = AIMS.get((case.model, case.checkpointing, case.shape))
    wanted = f" (aim {aim} ×: {verdict(rate / best >= aim)})" if aim else ""
    first, its_first = (median(t.first_seconds for t in timed[one]) for one in (mine, trl))
    print(
        f"  ours: {rate:.2f} pairs/s (budget {mine.size:,} tokens), first step after {first:.1f} s "
        f"(aim {FIRST_STEP_SECONDS:.0f} s: {verdict(first < FIRST_STEP_SECONDS)})\n"
        f"  TRL, reference cached: {best:.2f} ({trl}), first step after {its_first:.1f} s: {rate / best:.2f} ×"
        f"{wanted}\n"
        f"  TRL, reference on line: {online}\n"
        f"  floor: {flops / 1e9:.1f} GFLOP a pair = {floor:.2f} pairs/s; ours at {rate / floor:.0%}, TRL's cached at "
        f"{best / floor:.0%}\n"
        f"  peak memory: {held / 1e6:,.0f} MB against {allowed / 1e6:,.0f} MB: {held / allowed:.0%} "
        f"(aim {MOST_MEMORY:.0%}: {verdict(held <= MOST_MEMORY * allowed)})\n"
        f"  references within {gap:.0e}",
        flush=True,
    )


def profile(case: Case, one: Try) -> None:
    """Where a run of ours spends the GPU's time."""
    from torch.profiler import ProfilerActivity

    run(case, one)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run(case, one)
    print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=70))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of a round, the first of which is not counted")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--dtype", choices=DTYPES, help="default: what is faster for TRL (cuda: bfloat16)")
    parser.add_argument("--checkpointing", action="store_true", help="of activations, on both sides")
    parser.add_argument("--dropout", type=float, default=0.05, help="of the adapters, on both sides")
    parser.add_argument("--budgets", nargs="+", type=int, help=f"of our micro-batches, default {BUDGETS}")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="ours alone, at one budget, in these ways")
    parser.add_argument("--profile", action="store_true", help="of ours alone: where the GPU's time goes")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine")
    asked = parser.parse_args()
    if asked.cpu_time:
        global CLOCK
        CLOCK = time.process_time
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    if asked.peak:
        print(peak_here(asked.peak))
        return
    model = asked.model or ("tiny" if asked.device == "cpu" else "1b")
    shapes = asked.shapes or SHAPES[asked.device]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {asked.device}, {BATCH_PAIRS} pairs a step"
    )
    dtype = asked.dtype or "bfloat16"
    if asked.dtype is None and asked.device == "cpu" and not asked.ways:
        trials = {d: run(Case("cpu", model, d, shapes[0], 3, False), Try("theirs", 2)).rate for d in DTYPES}
        dtype = max(trials, key=lambda d: trials[d])
        print(f"TRL on a trial: {', '.join(f'{rate:.2f} pairs/s in {d}' for d, rate in trials.items())}")
    if asked.device == "cuda" and len(shapes) > 1:  # Liger, once applied, stays in a process
        one = [sys.executable, *sys.argv, "--shapes"]
        codes = [subprocess.run([*one, shape], check=False).returncode for shape in shapes]
        sys.exit(any(codes))
    if asked.budgets:
        BUDGETS[asked.device] = tuple(asked.budgets)
    for shape in shapes:
        case = Case(asked.device, model, dtype, shape, asked.steps, asked.checkpointing, asked.dropout)
        if asked.ways:
            print(
                f"{shape} ({model}, {dtype}{', checkpointing' if asked.checkpointing else ''}):", flush=True
            )
            for way in sorted(asked.ways, key=WAYS.index):
                tried(case, Try("ours", BUDGETS[asked.device][0], way=way))
        elif asked.profile:
            profile(case, Try("ours", BUDGETS[asked.device][-1]))
        else:
            compare(case, asked.rounds)


if __name__ == "__main__":
    main()
