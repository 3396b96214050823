"""Shared rows, plain rows and TRL against the obvious twin: one completion at a time, no padding, no mask."""

import pytest
import torch

from croco.ops.losses import PairLogps, ipo, sigmoid
from croco.training.batches import collate
from croco.training.encode import Example, encode_pairs
from croco.training.forward import completion_logps, shared_rows_differ, token_counts
from croco.training.settings import TrainSettings
from croco.training.trainer import pair_losses
from tiny import make_policy, make_tokenizer
from training.pairs import make_pairs

ARCHITECTURES = ("llama", "cohere2", "qwen3")
TOKENIZER = make_tokenizer()
EXAMPLES, _ = encode_pairs(make_pairs(5), TOKENIZER, end=2, max_tokens=200)


def policy(arch, seed=0):
    model = make_policy(arch, seed=seed)
    if arch == "cohere2":
        model.logit_scale = 0.25  # Cohere2 scales its logits, and so must every path
    return model


def twin_logps(model, examples):
    """(C, P): the sum over a completion's tokens of log softmax, from a forward of that sequence alone."""
    rows = []
    for c in range(len(examples[0].completions)):
        sums = []
        for example in examples:
            ids = torch.tensor([example.prompt + example.completions[c]])
            logps = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
            picked = logps[len(example.prompt) - 1 : -1].gather(1, ids[0, len(example.prompt) :, None])
            sums.append(picked.sum())
        rows.append(torch.stack(sums))
    return torch.stack(rows)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close(found, expected, relative):
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / (gradient.norm() + 1e-8)
        assert error < relative, f"{name}: {error:.2g}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("shared", [True, False])
def test_logps_loss_and_gradients_equal_the_twin(arch, shared):
    model = policy(arch)
    batch = collate(EXAMPLES, shared=shared)
    with torch.no_grad():
        reference = twin_logps(policy(arch, seed=1), EXAMPLES)

    logps, expected_logps = completion_logps(model, batch), twin_logps(model, EXAMPLES)
    torch.testing.assert_close(logps, expected_logps, rtol=1e-5, atol=0)

    def loss(logps_CP):
        return pair_losses(TrainSettings(), logps_CP, reference, token_counts(batch))[0].mean()

    torch.testing.assert_close(loss(logps), loss(expected_logps), rtol=1e-5, atol=0)
    assert_close(gradients(model, loss(logps)), gradients(model, loss(expected_logps)), 1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_completions_do_not_see_each_other_and_see_the_prompt(arch):
    model = policy(arch)
    example = EXAMPLES[0]
    chosen = [(token + 7) % 300 + 10 for token in example.completions[0][:-1]] + [2]
    prompt = [*example.prompt[:-2], 42, example.prompt[-1]]
    variants = [
        example,
        Example("p", "en", example.prompt, (chosen, example.completions[1])),
        Example("p", "en", prompt, example.completions),
    ]
    with torch.no_grad():
        base, new_chosen, new_prompt = (completion_logps(model, collate([v], shared=True)) for v in variants)
    assert (new_chosen[1] - base[1]).abs().item() < 1e-6
    assert (new_chosen[0] - base[0]).abs().item() > 1e-2
    assert (new_prompt - base).abs().min().item() > 1e-3


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_self_check_accepts_what_is_exact(arch, attention):
    model = policy(arch)
    model.set_attn_implementation(attention)
    assert shared_rows_differ(model, EXAMPLES, torch.device("cpu")) is None


def test_the_self_check_sees_a_lost_prompt(monkeypatch):
    # What transformers makes of restarting positions without a mask: packed sequences.
    monkeypatch.setattr("croco.training.forward.attention_masks", lambda model, batch: None)
    assert "differ" in shared_rows_differ(policy("llama"), EXAMPLES, torch.device("cpu"))


def test_the_self_check_refuses_unknown_layers():
    model = policy("cohere2")
    model.config.layer_types = ["linear_attention", "full_attention"]
    assert "linear_attention" in shared_rows_differ(model, EXAMPLES, torch.device("cpu"))


def test_bfloat16_passes_the_self_check_and_stays_near():
    model = policy("llama").to(torch.bfloat16)
    assert shared_rows_differ(model, EXAMPLES, torch.device("cpu")) is None


@pytest.mark.parametrize(("loss_type", "loss"), [("sigmoid", sigmoid), ("ipo", ipo)])
def test_loss_and_gradients_equal_trl(loss_type, loss, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, reference = policy("llama"), policy("llama", seed=1)
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"}  # replaced below by the very ids we train on
        for _ in EXAMPLES
    ]
    config = DPOConfig(
        output_dir=str(tmp_path),
        beta=0.1,
        loss_type=[loss_type],
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        max_length=None,
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=TOKENIZER,
    )
    inputs = trainer.data_collator(
        [
            {"prompt_ids": e.prompt, "chosen_ids": e.completions[0], "rejected_ids": e.completions[1]}
            for e in EXAMPLES
        ]
    )
    theirs = trainer.compute_loss(model, inputs)
    their_gradients = gradients(model, theirs)

    batch = collate(EXAMPLES, shared=True)
    with torch.no_grad():
        reference_logps = completion_logps(reference, batch)
    ours = loss(
        PairLogps(*completion_logps(model, batch), *reference_logps, *token_counts(batch)), 0.1
    ).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert_close(gradients(model, ours), their_gradients, 1e-4)
