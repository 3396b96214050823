"""What only a GPU can show: packed rows by flash attention, adapters as autocast computes them, fused kernels, memory.

On a machine without one these are skipped; `tests/models/attention/varlen_twin.py` stands for the kernel there.
"""

from importlib.util import find_spec

import pytest
import torch
from peft.tuners import lora

from croco.config.training import Lora, Training
from croco.models.logprobs import completion_logps as likelihoods
from croco.models.lora import OneStepLinear, apply_lora
from croco.models.proofs import decoder_disagrees, scoring_way
from croco.models.protocols import ScoreRequest
from croco.stages.train.batches import collate
from croco.stages.train.choose_rows import choose_rows, rows_differ
from croco.stages.train.encode import Example, encode_pairs
from croco.stages.train.forward import completion_logps, token_counts
from croco.stages.train.memory_plan import count
from croco.stages.train.setup import use_fused_kernels
from stages.train.pairs import make_pairs, replace
from stages.train.test_train import SETTINGS, metrics, run
from tiny import make_policy, make_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
ARCHITECTURES = ("llama", "cohere2", "qwen3", "gemma3", "mistral")
SHAPE = {"hidden": 128, "layers": 3}  # heads of 32: the smallest that flash attention takes
EXAMPLES, _ = encode_pairs(make_pairs(8, longest=20), make_tokenizer(), end=2, max_tokens=400)


def policy(arch: str, dtype: torch.dtype = torch.bfloat16, **shape: int):
    return make_policy(arch, **{**SHAPE, **shape}).to("cuda", dtype)


def adapter_gradients(model, batch) -> torch.Tensor:
    model.zero_grad()
    completion_logps(model, batch).sum().backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_are_packed_in_half_precision_and_exact(arch):
    model = policy(arch)
    assert choose_rows(model, EXAMPLES) == ("packed", None)
    assert choose_rows(policy(arch, torch.float16), EXAMPLES) == ("packed", None)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_is_exact_too(arch, dtype):
    model = policy(arch, dtype)
    assert rows_differ(model, EXAMPLES, "masked") is None
    if dtype == torch.float32:
        rows, reason = choose_rows(model, EXAMPLES)
        assert rows == "masked"
        assert "bfloat16 or float16" in reason


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_and_scoring_share_prompts(arch, dtype):
    model = policy(arch, dtype)
    assert decoder_disagrees(model) is None
    assert scoring_way(model.model)[0] == ("packed" if dtype == torch.bfloat16 else "stored")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_packed_rows_are_those_of_plain_ones(arch, checkpointing):
    model = apply_lora(policy(arch), Lora(dropout=0.0), 0).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    plain, packed = (
        adapter_gradients(model, collate(EXAMPLES, rows=rows).to("cuda")) for rows in ("plain", "packed")
    )
    assert ((packed - plain).norm() / plain.norm()).item() < 5e-2  # of bfloat16, as in test_exact.py


def test_an_adapter_computes_as_peft_under_autocast():
    model = apply_lora(policy("llama"), Lora(dropout=0.0), 0).train()
    batch = collate(EXAMPLES, rows="plain").to("cuda")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    ours = adapter_gradients(model, batch)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    for module in model.modules():
        if type(module) is OneStepLinear:
            module.__class__ = lora.Linear
    with torch.autocast("cuda", torch.bfloat16):
        theirs = adapter_gradients(model, batch)
    assert ((ours - theirs).norm() / theirs.norm()).item() < 5e-2


def test_all_weights_are_tuned_in_packed_rows(tmp_path):
    settings = replace(SETTINGS, full=True, learning_rate=1e-3)
    result = run(tmp_path, settings, model=policy("llama"))
    assert result.plain_rows is None
    lines = metrics(tmp_path, "train")
    assert lines[0]["loss"] == pytest.approx(0.693, abs=0.05)
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_likelihoods_in_packed_rows_are_those_of_whole_sequences(arch):
    """Read at the output layer from hidden states, a few tokens at a time."""
    model, tokenizer = policy(arch), make_tokenizer()
    asked = [ScoreRequest(k, [5 + k] * 20, [[7, 8, 9 + i] * 4 for i in range(6)]) for k in range(3)]
    packed, whole = (
        torch.tensor(likelihoods(model, tokenizer, asked, way=way)) for way in ("packed", "whole")
    )
    assert ((packed - whole).abs() / 13).max().item() < 3e-2  # tokens, and their end


def test_a_run_learns_in_packed_rows_and_goes_on_after_a_break(tmp_path):
    settings = replace(SETTINGS, learning_rate=1e-3, epochs=2)
    result = run(tmp_path, settings, model=policy("llama"))
    assert result.plain_rows is None
    lines = metrics(tmp_path, "train")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["loss"] == pytest.approx(0.693, abs=0.02)


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
def test_fused_kernels_change_nothing_but_rounding(arch):
    model, batch = policy(arch), collate(EXAMPLES, rows="plain").to("cuda")
    with torch.no_grad():
        before = completion_logps(model, batch)
        assert use_fused_kernels(model) is None
        after = completion_logps(model, batch)
    assert ((after - before).abs() / token_counts(batch)).max().item() < 2e-2
    assert choose_rows(model, EXAMPLES) == ("packed", None)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_plan_is_within_15_percent(checkpointing):
    """Of a micro-batch's peak, for a shape of some hundred MB."""
    model = policy("llama", hidden=1024, layers=8, max_positions=4096)
    examples = [Example(str(i), "en", [7] * 900, ([8] * 700, [9] * 700)) for i in range(4)]
    settings = Training(lora=Lora(dropout=0.0))
    rows, _ = choose_rows(model, examples[:2])
    needs = count(model, settings, examples, rows)
    adapted = apply_lora(model, settings.lora, 0).train()
    if checkpointing:
        adapted.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])
    batch = collate(examples, rows=rows).to("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        completion_logps(adapted, batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated() - before
    planned = needs.of(batch.input_ids_BT.numel(), checkpointing)
    assert planned == pytest.approx(peak, rel=0.15)
