"""vLLM asked as a server of ours against vLLM in process: tokens a second and scores a second, in turns.

    VLLM_CPU_KVCACHE_SPACE=1 PYTHON_OF_VLLM -m bench vllm_server

Both sides load the same random model, take the same prompts in token ids with the same settings, and run in turns. The
in-process side is vLLM's own `LLM`, fed whole. Start-up is not counted. Needs an environment with vLLM.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import psutil

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 64, 64
SHAPE = {
    "vocab_size": 3000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 8, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def model_in(folder: Path) -> Path:
    """A random Llama and a tokenizer of its size."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SHAPE["vocab_size"])}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w2", pad_token="w0", unk_token="w0")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    return folder


def in_process(folder: Path, prompts: list[list[int]], completions: int) -> Any:
    """A function that samples in process and says how many tokens there were."""
    import vllm
    from vllm.sampling_params import RequestOutputKind

    llm = vllm.LLM(str(folder), dtype="float32", enforce_eager=True, enable_prefix_caching=True, seed=1)
    params = vllm.SamplingParams(
        n=completions, max_tokens=NEW_TOKENS, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    asked = [{"prompt_token_ids": ids} for ids in prompts]

    def run() -> int:
        outputs = llm.generate(asked, params, use_tqdm=False)
        return sum(len(one.token_ids) for output in outputs for one in output.outputs)

    return run


def as_server(folder: Path, prompts: list[list[int]], completions: int) -> Any:
    """The same through the engine "vllm"."""
    from croco.config.models import Policy
    from croco.config.runtime import Vllm
    from croco.models.protocols import Decoding, Request
    from croco.models.vllm import open_policy

    sampler, _ = open_policy(Policy(model=str(folder), dtype="float32"), Vllm(enforce_eager=True), 1)
    asked = [Request(key, ids, list(range(completions))) for key, ids in enumerate(prompts)]

    def run() -> int:
        found = sampler.sample(asked, Decoding(1.0, 1.0, 0, NEW_TOKENS))
        return sum(one.completion_tokens for _, drawn in found for one in drawn if not isinstance(one, str))

    return run


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--completions", type=int, default=16)
    given = options.parse_args()
    if find_spec("vllm") is None:
        print("skipped: vLLM is not installed here, see docs/guide/engines.md")
        sys.exit(75)
    dice = random.Random(0)
    prompts = [[dice.randrange(3, 3000) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]
    with tempfile.TemporaryDirectory() as folder:
        model_in(Path(folder))
        sides = {
            "server": as_server(Path(folder), prompts, given.completions),
            "in process": in_process(Path(folder), prompts, given.completions),
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        costs: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(given.rounds + 1):
            for name, run in sides.items():
                start, busy = time.perf_counter(), processor_seconds()
                tokens = run()
                if turn:  # the first warms up
                    rates[name].append(tokens / (time.perf_counter() - start))
                    costs[name].append(1000 * (processor_seconds() - busy) / tokens)
        for name in sides:
            print(f"{name:<11} {median(rates[name]):>8,.0f} tokens/s  ({listed(rates[name], ',.0f')})")
            print(
                f"{'':<11} {median(costs[name]):>8.3f} ms of processor time a token  ({listed(costs[name], '.3f')})"
            )
        for what, figures in (("tokens/s", rates), ("processor time", costs)):
            ratios = [
                one / other for one, other in zip(figures["server"], figures["in process"], strict=True)
            ]
            print(f"server / in process, {what}, by round: {median(ratios):.3f}  ({listed(ratios, '.2f')})")


def processor_seconds() -> float:
    """Processor time of this process and all that it started, which another job on the machine does not change."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def listed(figures: list[float], form: str) -> str:
    return ", ".join(f"{one:{form}}" for one in figures)


if __name__ == "__main__":
    main()
