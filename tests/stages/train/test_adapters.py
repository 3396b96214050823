"""Adapters on the architectures that people have: which layers get one, and what is refused before anything runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from croco.config.training import USUAL_TARGETS, Lora, Training
from croco.errors import UserError
from croco.models.lora import apply_lora, put_adapter_on, without_adapter
from croco.stages.train.batches import collate
from croco.stages.train.encode import encode_pairs
from croco.stages.train.forward import balance_loss, completion_logps, routing
from croco.stages.train.memory_plan import trained_parameters
from stages.train.pairs import make_pairs, replace
from stages.train.test_train import SETTINGS, metrics, run
from tiny import make_policy, make_tokenizer

SHAPE = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.15,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT = {"vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}


def mistral3_wrapper() -> Any:
    vision = tf.PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        head_dim=8,
    )
    text = tf.MistralConfig(**SHAPE, head_dim=8, sliding_window=None)
    return tf.Mistral3ForConditionalGeneration(
        tf.Mistral3Config(text_config=text, vision_config=vision, image_token_index=319)
    )


USUAL = set(USUAL_TARGETS)
NEOX = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
# the model, and the names of the layers that "auto" adapts
MODELS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "llama": (lambda: make_policy("llama"), USUAL),
    "gemma3 with images": (lambda: make_policy("gemma3 with images"), USUAL),
    "mistral3 with images": (mistral3_wrapper, USUAL),
    "phi3": (
        lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SHAPE)), {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    ),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT)), {"c_attn", "c_proj", "c_fc"}),
    "neox": (lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**GPT, intermediate_size=64)), NEOX),
    "falcon": (lambda: tf.FalconForCausalLM(tf.FalconConfig(**GPT)), NEOX),
    "qwen3 moe": (
        lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=8)),
        {"q_proj", "k_proj", "v_proj", "o_proj"},
    ),
    "qwen2 moe": (
        lambda: tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**SHAPE, **EXPERTS, shared_expert_intermediate_size=32)),
        USUAL,
    ),
    "mamba2": (
        lambda: tf.Mamba2ForCausalLM(
            tf.Mamba2Config(
                vocab_size=320, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=1
            )
        ),
        {"in_proj"},
    ),
}  # fmt: skip


def made(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def adapted(policy: Any) -> set[str]:
    """Full names of the layers that have an adapter."""
    names = (
        name.removeprefix("base_model.model.") for name, _ in policy.named_parameters() if ".lora_A" in name
    )
    return {name.split(".lora_A")[0] for name in names}


@pytest.mark.parametrize("name", MODELS)
def test_auto_is_every_linear_layer_of_the_language_model(name: str, tmp_path: Path) -> None:
    model, (_, wanted) = made(name), MODELS[name]
    policy = apply_lora(model, Lora(rank=4), 0)
    layers = adapted(policy)
    assert {layer.rpartition(".")[2] for layer in layers} == wanted
    assert not [layer for layer in layers if "vision" in layer]
    ids = torch.arange(7, 27).view(2, 10)
    policy(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
    ).logits.square().sum().backward()
    for parameter_name, parameter in policy.named_parameters():
        if "lora_B" in parameter_name:  # none is out of reach, or several processes wait for it forever
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.abs().sum() > 0, parameter_name
    policy.save_pretrained(tmp_path / "adapter")
    again = put_adapter_on(without_adapter(policy), tmp_path / "adapter")
    assert adapted(again) == layers


@pytest.mark.parametrize("name", MODELS)
def test_the_doctor_puts_adapters_on_a_model_without_weights(name: str) -> None:
    with torch.device("meta"):
        weightless = MODELS[name][0]()
    settings = Training(lora=Lora(rank=4))
    real = apply_lora(made(name), settings.lora, 0)
    assert trained_parameters(weightless, settings) == sum(
        p.numel() for p in real.parameters() if p.requires_grad
    )
    assert not adapted(weightless)


def test_fused_experts_are_adapted_where_they_are_named_and_without_dropout() -> None:
    experts = ("experts.gate_up_proj", "experts.down_proj")
    with pytest.raises(
        UserError, match=r"experts.down_proj, experts.gate_up_proj: expected training.lora.dropout = 0"
    ):
        apply_lora(made("qwen3 moe"), Lora(targets=("q_proj", *experts), dropout=0.1), 0)
    policy = apply_lora(made("qwen3 moe"), Lora(targets=("q_proj", *experts), dropout=0.0), 0)
    names = {layer.rpartition("layers.0.")[2] for layer in adapted(policy) if "layers.0." in layer}
    assert names == {"self_attn.q_proj", "mlp.experts", "mlp.experts.base_layer"}


def test_a_name_that_the_language_model_lacks_is_refused_with_those_it_has() -> None:
    for name, target in (("gemma3 with images", "fc1"), ("qwen3 moe", "experts.w1"), ("gpt2", "q_proj")):
        with pytest.raises(
            UserError, match=rf"names {target}, which \w+ does not have; its linear layers are "
        ):
            apply_lora(made(name), Lora(targets=(target,)), 0)
    with pytest.raises(UserError, match=r"its fused experts experts.down_proj, experts.gate_up_proj"):
        apply_lora(made("qwen3 moe"), Lora(targets=("w1",)), 0)


def test_a_recipe_says_auto_as_its_fingerprints_always_did() -> None:
    """The usual seven names were the default before there was "auto": finished runs of then stay complete."""
    assert Lora().targets == "auto"
    assert Lora().model_dump(mode="json")["targets"] == list(USUAL_TARGETS)
    assert Lora.model_validate(Lora().model_dump(mode="json")).targets == "auto"
    assert Lora(targets=("q_proj",)).model_dump(mode="json")["targets"] == ["q_proj"]


def test_full_tuning_of_a_model_with_images_is_of_its_language_model(tmp_path: Path) -> None:
    """Its tensors have other names on disk than in memory."""
    model = made("gemma3 with images")
    tower = {name: value.clone() for name, value in model.state_dict().items() if "vision" in name}
    settings = replace(SETTINGS, full=True, learning_rate=1e-3)
    result = run(tmp_path, settings, model=model, num_pairs=24)
    assert metrics(tmp_path, "train")[-1]["loss"] < metrics(tmp_path, "train")[0]["loss"]
    again = tf.Gemma3ForConditionalGeneration.from_pretrained(result.adapter)
    for name, value in again.state_dict().items():
        if name in tower:
            assert value.equal(tower[name]), name
    assert json.loads((result.adapter / "config.json").read_text())["model_type"] == "gemma3"
    assert load_file(result.adapter / "model.safetensors")


def test_the_balance_of_experts_is_the_models_own_and_is_trained_on(tmp_path: Path) -> None:
    """TRL adds it too: the model's own loss on the same tokens, weighed by its config."""
    model = made("qwen3 moe")
    examples, _ = encode_pairs(make_pairs(4), make_tokenizer(), end=2, max_tokens=200)
    batch = collate(examples, rows="plain")
    with torch.no_grad():
        with routing(model) as logits:
            completion_logps(model, batch)
        ours = balance_loss(model, logits, batch)
        mask = (batch.branch_BT >= 0).long()
        own = model(input_ids=batch.input_ids_BT, attention_mask=mask, output_router_logits=True)
    torch.testing.assert_close(ours, own.aux_loss * model.config.router_aux_loss_coef)
    run(tmp_path, replace(SETTINGS, epochs=1), model=model, num_pairs=12)
    first = metrics(tmp_path, "train")[0]
    assert first["aux_loss"] > 0
    assert first["loss"] == pytest.approx(math.log(2) + first["aux_loss"], abs=1e-4)
