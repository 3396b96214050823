"""Every layout of rows, and TRL, against the obvious twin: one completion at a time, no padding, no mask."""

from types import SimpleNamespace

import pytest
import torch
from peft.tuners import lora

from croco.config.training import Lora, Training
from croco.errors import UserError
from croco.models.lora import OneStepLinear, apply_lora
from croco.stages.train import setup
from croco.stages.train.batches import collate
from croco.stages.train.choose_rows import GRADIENT_TOKENS, choose_rows, rows_differ, why_not
from croco.stages.train.encode import Example, encode_pairs
from croco.stages.train.forward import completion_logps, token_counts
from croco.stages.train.losses import LOSSES, REFERENCE_FREE, PairLogps, pair_losses, preference_losses
from models.attention.varlen_twin import varlen_twin
from stages.train.pairs import make_pairs, replace
from tiny import make_policy, make_tokenizer

ARCHITECTURES = ("llama", "cohere2", "qwen3", "gemma3", "mistral")
LAYOUTS = ("plain", "masked", "segments", "packed", "single")
TOKENIZER = make_tokenizer()
EXAMPLES, _ = encode_pairs(make_pairs(5), TOKENIZER, end=2, max_tokens=200)


@pytest.fixture(autouse=True)
def _varlen_on_a_cpu(monkeypatch):
    monkeypatch.setattr("croco.models.attention.rows.varlen_attn", varlen_twin)


def policy(arch, seed=0):
    model = make_policy(arch, seed=seed)
    if arch == "cohere2":  # Cohere2 scales its logits, and so must every path
        model.logit_scale = model.config.logit_scale = 0.25
    return model


def laid_out(layout, examples=EXAMPLES):
    """The examples as a batch, in segments though they are short."""
    return replace(collate(examples, rows=layout), rows=layout)


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
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def assert_close(found, expected, relative):
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / (gradient.norm() + 1e-8)
        assert error < relative, f"{name}: {error:.2g}"


def loss_of(logps_CP, reference_CP):
    counts_CP = token_counts(laid_out("plain"))
    return pair_losses(Training(), logps_CP, reference_CP, counts_CP)[0].mean()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logps_loss_and_gradients_of_all_weights_equal_the_twin(arch):
    model = policy(arch)
    with torch.no_grad():
        reference = twin_logps(policy(arch, seed=1), EXAMPLES)
    expected_logps = twin_logps(model, EXAMPLES)
    expected = gradients(model, loss_of(expected_logps, reference))
    for layout in LAYOUTS:
        logps = completion_logps(model, laid_out(layout))
        torch.testing.assert_close(logps, expected_logps, rtol=1e-5, atol=0)
        loss = loss_of(logps, reference)
        torch.testing.assert_close(loss, loss_of(expected_logps, reference), rtol=1e-5, atol=0)
        assert_close(gradients(model, loss), expected, 1e-4)


def adapted(arch):
    """A policy with an adapter that is not the identity, without dropout."""
    model = apply_lora(policy(arch), Lora(dropout=0.0), 0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_an_adapter_equal_the_twin(arch, checkpointing):
    with torch.no_grad():
        reference = twin_logps(policy(arch), EXAMPLES)
    twin = adapted(arch)
    for module in twin.modules():  # PEFT's own layers
        if type(module) is OneStepLinear:
            module.__class__ = lora.Linear
    expected_logps = twin_logps(twin, EXAMPLES)
    expected = gradients(twin, loss_of(expected_logps, reference))
    assert all(gradient.norm() > 0 for gradient in expected.values())
    model = adapted(arch).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layout in LAYOUTS:
        logps = completion_logps(model, laid_out(layout))
        torch.testing.assert_close(logps, expected_logps, rtol=1e-5, atol=0)
        assert_close(gradients(model, loss_of(logps, reference)), expected, 1e-4)


def test_what_dropout_drops_is_dropped_again_where_a_layer_is_computed_twice():
    # plain rows: in shared ones the last layer of a forward that is kept meets fewer tokens, and draws other places
    found = []
    for checkpointing in (False, True):
        model = apply_lora(policy("llama"), Lora(dropout=0.5), 0).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.ones_(parameter)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        found.append(gradients(model, completion_logps(model, laid_out("plain")).sum()))
    assert_close(found[1], found[0], 1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_completions_do_not_see_each_other_and_see_the_prompt(arch, layout):
    model = policy(arch)
    example, beside = EXAMPLES[:2]
    chosen = [(token + 7) % 300 + 10 for token in example.completions[0][:-1]] + [2]
    prompt = [*example.prompt[:-2], 42, example.prompt[-1]]
    variants = [
        example,
        Example("p", "en", example.prompt, (chosen, example.completions[1])),
        Example("p", "en", prompt, example.completions),
    ]
    with torch.no_grad():
        base, new_chosen, new_prompt = (
            completion_logps(model, laid_out(layout, [variant, beside])) for variant in variants
        )
    assert (new_chosen[1, 0] - base[1, 0]).abs().item() < 1e-6 * base[1, 0].abs().item()
    assert (new_chosen[0, 0] - base[0, 0]).abs().item() > 1e-2
    assert (new_prompt[:, 0] - base[:, 0]).abs().min().item() > 1e-3
    for moved in (new_chosen, new_prompt):  # the pair beside it does not move
        torch.testing.assert_close(moved[:, 1], base[:, 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_stays_within_its_rounding(arch, layout):
    # Stated: 2e-2 per token from the twin in the same type, 5e-2 of an adapter's whole gradient.
    model = adapted(arch).to(torch.bfloat16)
    expected = twin_logps(model, EXAMPLES)
    reference = expected.detach() + torch.linspace(-1, 1, 10).view(2, 5)
    batch = laid_out(layout)
    logps = completion_logps(model, batch)
    assert ((logps - expected).abs() / token_counts(batch)).max().item() < 2e-2
    found, wanted = (
        torch.cat([g.flatten().float() for g in gradients(model, loss_of(each, reference)).values()])
        for each in (logps, expected)
    )
    assert ((found - wanted).norm() / wanted.norm()).item() < 5e-2


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rows", ["packed", "segments", "masked"])
def test_the_proof_accepts_what_is_exact(arch, rows):
    assert rows_differ(policy(arch), EXAMPLES, rows) is None


@pytest.mark.parametrize("learnt", [None, (False,) * 499 + (True,)])
def test_the_trial_of_a_gradient_is_of_few_tokens(learnt):
    """Activations of long pairs, all kept, may take more memory than tuning with checkpointing."""
    model, tokens = make_policy("llama", max_positions=2048), []
    completions = ([6] * 500,) if learnt else ([6] * 500, [7] * 490)
    long = [Example(str(i), "en", [5] * (1 if learnt else 700), completions, 0, learnt) for i in range(2)]

    def see(_module, _args, inputs):
        if torch.is_grad_enabled():
            tokens.append(inputs["input_ids"].numel())

    model.register_forward_pre_hook(see, with_kwargs=True)
    assert rows_differ(model, long, "segments") is None
    assert len(tokens) == 1
    assert tokens[0] <= 2 * 3 * GRADIENT_TOKENS


def test_the_quickest_exact_rows_are_chosen():
    model = policy("llama")
    assert choose_rows(model, EXAMPLES) == ("segments", None)
    assert why_not(model, "packed") == "it needs a GPU"
    model.set_attn_implementation("eager")
    assert choose_rows(model, EXAMPLES) == ("masked", "attention is eager, expected sdpa")
    model.config.rope_parameters["rope_type"] = "dynamic"
    assert choose_rows(model, EXAMPLES)[0] == "single"


def test_a_model_whose_code_fails_at_shared_rows_gets_slower_ones(monkeypatch):
    def broken(*args, **kwargs):
        raise TypeError("forward() got an unexpected keyword argument 'segments'")

    model = policy("llama")
    monkeypatch.setattr("croco.models.attention.rows.Segments.attend", broken)
    rows, reason = choose_rows(model, EXAMPLES)
    assert rows == "masked"
    assert "LlamaForCausalLM does not run them: TypeError" in reason
    monkeypatch.setattr("croco.stages.train.forward.attention_masks", broken)
    assert choose_rows(model, EXAMPLES)[0] == "plain"
    assert model.config._attn_implementation == "sdpa"


def test_the_proof_sees_a_lost_prompt(monkeypatch):
    # What transformers makes of restarting positions without a mask: packed sequences.
    monkeypatch.setattr("croco.stages.train.forward.attention_masks", lambda model, batch: None)
    assert "differ" in rows_differ(policy("llama"), EXAMPLES, "masked")


def test_the_proof_sees_causality_that_is_aligned_at_the_start(monkeypatch):
    def start_aligned(*tensors, window_size, scale, enable_gqa=False):
        return varlen_twin(*tensors, window_size=(-1, 10**6), scale=scale, enable_gqa=enable_gqa)

    monkeypatch.setattr("croco.models.attention.rows.varlen_attn", start_aligned)
    assert "differ" in rows_differ(policy("llama"), EXAMPLES, "packed")


def test_a_torch_whose_varlen_groups_heads_unasked_is_exact_too(monkeypatch):
    def of_torch_2_11(*tensors, scale=None, window_size=(-1, -1)):
        return varlen_twin(*tensors, scale=scale, window_size=window_size, enable_gqa=True)

    monkeypatch.setattr("croco.models.attention.rows.varlen_attn", of_torch_2_11)
    model = policy("llama")
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert rows_differ(model, EXAMPLES, "packed") is None


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_rows_are_exact_under_autocast(arch):
    """Tuning all weights keeps them in float32, where rotary positions leave queries and keys but no values."""
    model = policy(arch)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    packed, plain = (completion_logps(model, collate(EXAMPLES, rows=rows)) for rows in ("packed", "plain"))
    assert ((packed - plain).abs() / token_counts(laid_out("plain"))).max() < 3e-2


def test_what_the_kernel_refuses_is_a_reason(monkeypatch):
    def refuses(*tensors, **options):
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")

    monkeypatch.setattr("croco.models.attention.rows.varlen_attn", refuses)
    reason = rows_differ(policy("llama"), EXAMPLES, "packed")
    assert reason.startswith(
        "LlamaForCausalLM does not run them: RuntimeError: FlashAttention forward only supports"
    )


@pytest.mark.parametrize(
    ("found", "said"), [("0.4.0", "liger-kernel>=0.6 is required"), ("0.8.5", "no rope")]
)
def test_fused_kernels_that_do_not_fit_are_left_out_and_said(monkeypatch, found, said):
    def apply(model, config):
        assert found == "0.8.5"
        raise ValueError("no rope")

    model = on_a_gpu(monkeypatch, found, apply)
    assert setup.use_fused_kernels(model, EXAMPLES[:1]).startswith(f"liger-kernel does not fit: {said}")
    completion_logps(model, collate(EXAMPLES, rows="plain"))


def test_fused_kernels_that_do_not_run_are_one_sentence(monkeypatch):
    def apply(model, config):
        model.model.layers[0].mlp.forward = lambda x: x.no_such_kernel()

    model = on_a_gpu(monkeypatch, "0.8.5", apply)
    with pytest.raises(
        UserError, match=r"liger-kernel does not run here \(AttributeError: .*pip uninstall liger"
    ):
        setup.use_fused_kernels(model, EXAMPLES[:1])


def on_a_gpu(monkeypatch, version, apply):
    """A model of which it is believed that it is on a GPU, beside a liger-kernel of that version."""
    model = policy("llama")
    monkeypatch.setattr(type(model), "device", property(lambda _: SimpleNamespace(type="cuda")))
    monkeypatch.setattr(setup, "find_spec", lambda name: name)
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", apply)
    return model


def test_unknown_layers_get_plain_rows():
    model = policy("cohere2")
    model.config.layer_types = ["linear_attention", "full_attention"]
    rows, reason = choose_rows(model, EXAMPLES)
    assert rows == "plain"
    assert "linear_attention" in reason


def test_bfloat16_passes_the_self_check_and_stays_near():
    model = policy("llama").to(torch.bfloat16)
    assert rows_differ(model, EXAMPLES, "segments") is None


def test_the_self_check_sees_a_head_that_does_more(monkeypatch):
    # An architecture that is taken for a known one, and bends its logits.
    model = policy("llama")
    model.config.final_logit_softcapping = 2.0
    assert "differ" in rows_differ(model, EXAMPLES, "segments")


def trl_trainer(model, reference, folder):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"}  # replaced below by the very ids we train on
        for _ in EXAMPLES
    ]
    config = DPOConfig(
        output_dir=str(folder),
        beta=0.1,
        label_smoothing=0.1,
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
    return trainer, inputs


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_losses_and_gradients_equal_trl(arch, tmp_path):
    model, reference = policy(arch), policy(arch, seed=1)
    trainer, inputs = trl_trainer(model, reference, tmp_path)
    batch = laid_out("segments")
    with torch.no_grad():
        reference_logps = completion_logps(reference, batch)
        theirs = torch.stack(trainer.compute_ref_log_probs(reference, inputs))
    torch.testing.assert_close(reference_logps, theirs, rtol=1e-5, atol=0)
    for loss in set(LOSSES) - REFERENCE_FREE:
        trainer.loss_types = [loss]
        expected = trainer.compute_loss(model, inputs)
        pairs = PairLogps(*completion_logps(model, batch), *reference_logps, *token_counts(batch))
        ours = preference_losses(loss, pairs, beta=0.1, label_smoothing=0.1).mean()
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
        assert_close(gradients(model, ours), gradients(model, expected), 1e-4)


def test_simpo_equals_trl(tmp_path):
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    trainer = CPOTrainer(
        model=policy("llama"),
        args=CPOConfig(
            output_dir=str(tmp_path), loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=1.0, bf16=False,
            use_cpu=True, report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2),
        processing_class=TOKENIZER,
    )  # fmt: skip
    chosen, rejected = -torch.rand(2, 5) * 50
    counts = torch.tensor([[3.0, 4, 5, 6, 7], [7, 3, 9, 1, 2]])
    theirs, *rewards = trainer.cpo_loss(chosen / counts[0], rejected / counts[1])
    pairs = PairLogps(chosen, rejected, torch.zeros(5), torch.zeros(5), *counts)
    ours = preference_losses("simpo", pairs, beta=2.0, simpo_gamma=1.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    settings = Training(loss="simpo", beta=2.0, simpo_gamma=1.0)
    _, watched = pair_losses(settings, torch.stack([chosen, rejected]), torch.zeros(2, 5), counts)
    torch.testing.assert_close(watched["rewards/chosen"], rewards[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(watched["rewards/rejected"], rewards[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(watched["rewards/margins"], rewards[0] - rewards[1], rtol=1e-5, atol=1e-6)
