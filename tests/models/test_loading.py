"""Loading is strict: what is no model, or not the one asked for, is one sentence before anything runs."""

from pathlib import Path

import pytest
import torch

from conftest import TinyModels
from croco.errors import UserError
from croco.models.loading import (
    load_policy,
    load_reward,
    load_tokenizer,
    max_context,
    pick_device,
    pick_dtype,
)
from tiny import make_policy, make_reward, make_tokenizer, save


@pytest.mark.parametrize("arch", ["llama", "cohere2", "qwen3"])
def test_a_saved_policy_computes_the_same(arch: str, tmp_path: Path):
    made = make_policy(arch)
    model, tokenizer = load_policy(str(save(tmp_path / arch, made, make_tokenizer())))
    ids = torch.tensor([tokenizer("Hej med dig")["input_ids"]])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, made(ids).logits)
    assert not model.training
    assert max_context(model) == 512


def test_dtype_and_device_are_chosen_or_named():
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="dtype 'int8'"):
        pick_dtype("int8", torch.device("cpu"))


def test_a_chat_template_can_be_given_in_a_file(tmp_path: Path, tiny_models: TinyModels):
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    tokenizer = load_tokenizer(str(tiny_models.policy), chat_template=file)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    with pytest.raises(UserError, match=r"chat template .*missing"):
        load_tokenizer(str(tiny_models.policy), chat_template=tmp_path / "missing.jinja")


def test_what_is_no_model_is_named(tmp_path: Path, tiny_models: TinyModels):
    with pytest.raises(UserError, match=r"without config\.json"):
        load_policy(str(tmp_path))
    with pytest.raises(UserError, match="no such directory"):
        load_policy(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="'lab:judge'"):
        load_policy("lab:judge")
    with pytest.raises(UserError, match="'nobody/nothing': its tokenizer does not load"):
        load_policy("nobody/nothing")
    broken = save(tmp_path / "broken", make_policy(), make_tokenizer())
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="does not load as AutoModelForCausalLM"):
        load_policy(str(broken))


def test_models_of_the_other_kind_are_told_apart(tmp_path: Path, tiny_models: TinyModels):
    with pytest.raises(UserError, match=r"no weights for score.weight, expected a whole sequence classifier"):
        load_reward(str(tiny_models.policy))
    with pytest.raises(
        UserError, match=r"no weights for lm_head.weight, expected a whole causal language model"
    ):
        load_policy(str(tiny_models.reward))
    two = save(tmp_path / "two", make_reward(num_labels=2), make_tokenizer())
    with pytest.raises(UserError, match="found 2 logits, expected one"):
        load_reward(str(two))
