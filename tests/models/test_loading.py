"""Loading is strict: what is no model, or not the one asked for, is one sentence before anything runs."""

import json
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

import zoo
from conftest import TinyModels
from croco.cli.doctor import machine
from croco.config.models import Template
from croco.errors import UserError
from croco.models import loading
from croco.models.chat_template import end_ids, prompt_ids
from croco.models.loading import (
    load_policy,
    load_reward,
    load_tokenizer,
    pick_device,
    pick_dtype,
)
from croco.models.model_files import UNKNOWN_CONTEXT, context_of
from croco.models.protocols import Decoding, Request
from croco.models.transformers import HFSampler
from tiny import make_policy, make_reward, make_tokenizer, save


@pytest.mark.parametrize("arch", ["llama", "cohere2", "qwen3"])
def test_a_saved_policy_computes_the_same(arch: str, tmp_path: Path):
    made = make_policy(arch)
    model, tokenizer = load_policy(str(save(tmp_path / arch, made, make_tokenizer())))
    ids = torch.tensor([tokenizer("Hej med dig")["input_ids"]])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, made(ids).logits)
    assert not model.training
    assert context_of(model.config) == 512


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_dtype_and_device_are_chosen_or_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], has_bfloat16: bool
):
    loading._say_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == (torch.bfloat16 if has_bfloat16 else torch.float32)
    assert pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    said = capsys.readouterr().err
    assert said == "" if has_bfloat16 else "loaded in float32" in said
    assert [pick_dtype("bfloat16", torch.device("cuda")) for _ in range(2)] == [torch.bfloat16] * 2
    assert capsys.readouterr().err.count("imitates bfloat16, slowly") == (not has_bfloat16)
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="dtype 'int8'"):
        pick_dtype("int8", torch.device("cpu"))


def test_a_chat_template_can_be_given_in_a_file(tmp_path: Path, tiny_models: TinyModels):
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    tokenizer = load_tokenizer(str(tiny_models.policy), chat_template=Template(str(file), {}))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    with pytest.raises(UserError, match=r"chat template .*missing"):
        load_tokenizer(str(tiny_models.policy), chat_template=Template(str(tmp_path / "missing.jinja"), {}))


def test_values_for_the_chat_template_stay_with_the_tokenizer(tmp_path: Path, tiny_models: TinyModels):
    file = tmp_path / "template.jinja"
    shown = "\n{{ messages[0]['content'] }} {% if not deep %}shallow{% endif %}{{ depth }}{{ name }}"
    file.write_text(shown, encoding="utf-8")
    values = {"deep": False, "depth": 2, "name": 'a "b" {{'}
    tokenizer = load_tokenizer(str(tiny_models.policy), chat_template=Template(str(file), values))
    said = [{"role": "user", "content": "x"}]
    assert tokenizer.decode(prompt_ids(tokenizer, said)) == '\nx shallow2a "b" {{'
    tokenizer.save_pretrained(tmp_path / "tuned")
    again = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    assert prompt_ids(again, said) == prompt_ids(tokenizer, said)


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


def change(name: str, **values: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | values))

    return edit


def write(name: str, text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_text(text)

    return edit


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


QUANTISED = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (write("tokenizer.json", "{}"), "tokenizer does not load"),
        (write("tokenizer_config.json", "[]"), r"tokenizer_config.json holds a list, expected an object"),
        (write("tokenizer.json", '{"model": {'), r"tokenizer.json is no JSON"),
        (change("tokenizer_config.json", extra_special_tokens=["<a>", 3]), "tokenizer does not load"),
        (write("config.json", "[1]"), r"config.json holds a list, expected an object"),
        (change("config.json", hidden_size="big"), r"config.json is refused .*hidden_size"),
        (change("config.json", num_attention_heads=0), r"config.json is refused .ZeroDivisionError"),
        (change("config.json", quantization_config=QUANTISED), "does not load as AutoModelForCausalLM: .*(gptq|GPTQ)"),
        (write("generation_config.json", '{"eos_token_id": [2, 6'), r"generation_config.json is no JSON .*end tokens"),
        (pickled, r"pytorch_model.bin is a pickle, which could run any code"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_load_is_one_sentence(
    spoil: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "model", make_policy("llama"), make_tokenizer())
    spoil(folder)
    with pytest.raises(UserError, match=reason) as error:
        load_policy(str(folder))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


def test_what_a_config_says_of_positions_and_ends(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", make_policy("llama"), make_tokenizer())
    change("config.json", max_position_embeddings=0)(folder)
    model, tokenizer = load_policy(str(folder))
    with pytest.raises(UserError, match=r"max_position_embeddings = 0, expected a number of tokens above 0"):
        context_of(model.config)
    config = make_policy("llama").config
    assert context_of(config) == config.max_position_embeddings
    config.rope_parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    assert context_of(config) == 4 * config.max_position_embeddings
    assert context_of(zoo.make("Bloom").config) == UNKNOWN_CONTEXT
    with pytest.raises(UserError, match=r"has the end token 'x', expected an id"):
        end_ids(tokenizer, SimpleNamespace(eos_token_id=["x"]))


def test_a_token_without_an_embedding_is_named(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>", "<|new|>")
    folder = save(tmp_path / "model", make_policy("llama"), tokenizer)
    model, loaded = load_policy(str(folder))
    prompt = prompt_ids(loaded, [{"role": "user", "content": "Hej"}])
    sampler = HFSampler(model, loaded)
    with pytest.raises(UserError, match=r"prompt 'p' has the token 320, .* embeddings for 320 tokens only"):
        list(sampler.sample([Request(0, prompt, [1], (), "prompt 'p'")], Decoding(0.0, 1.0, 0, 4)))


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantised_weights_without_their_package_are_one_sentence(tiny_models: TinyModels) -> None:
    with pytest.raises(UserError, match=r'policy.quantization = "nf4" needs bitsandbytes, .* the extra gpu'):
        load_policy(str(tiny_models.policy), quantization="nf4")


FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 80.00 GiB of which 1.00 GiB is free"


def test_weights_that_meet_a_full_gpu_are_one_sentence(monkeypatch, tiny_models):
    """Too small, or filled by another process: torch's own words say how much is free."""

    def full(*_):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(torch.nn.Module, "to", full)
    said = r"do not fit in the memory of cpu \(CUDA .* 1.00 GiB is free.*\): expected no other process there, or a smal"
    for load, model in ((load_policy, tiny_models.policy), (load_reward, tiny_models.reward)):
        with pytest.raises(UserError, match=said):
            load(str(model))


def test_a_gpu_that_torch_does_not_use_is_said_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loading._say_once.cache_clear()
    assert pick_device().type == "cpu"
    monkeypatch.setattr(loading, "DRIVER", tmp_path)  # there is one
    assert [pick_device().type for _ in range(2)] == ["cpu", "cpu"]
    said = capsys.readouterr().err
    assert said.count("NVIDIA driver") == 1
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        UserError, match=r"'cuda', but .* is a build without CUDA: pip install --force-reinstall 'torch"
    ):
        pick_device("cuda")
    assert any("GPU           none: this machine has an NVIDIA driver" in line for line in machine())
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (wanted,) = (each for each in project["dependencies"] if each.startswith("torch>"))
    assert loading.INSTALL.endswith(f"'{wanted}'")
