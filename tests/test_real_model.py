"""SmolLM2 itself, where it is here (`croco fetch smollm2 --to models/smollm2`): tuned on what it said, its adapter
loads in PEFT, and its pairs train in TRL."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch

import croco
import real
from croco.models.chat_template import end_ids, prompt_ids
from croco.models.loading import load_policy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight exported pairs of its own completions: the longer one is chosen."""
    table = real.completions().with_columns(score=pl.col("completion").str.len_chars().cast(pl.Float32))
    made, dropped = croco.pairs(table, rejected="min", guards={"cut": "off"})
    folder = tmp_path_factory.mktemp("real") / "pairs"
    assert croco.export(made.head(8), folder, dropped=dropped, license="apache-2.0") == 8
    return folder


def test_tokens_template_and_ends() -> None:
    model, tokenizer = load_policy(str(real.smollm2()), dtype="float32", device="cpu")
    asked = real.completions()["messages"][0].to_list()
    ids = prompt_ids(tokenizer, asked)
    assert tokenizer.decode(ids).endswith(
        f"<|im_start|>user\n{asked[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert {tokenizer.decode(end) for end in end_ids(tokenizer, model.generation_config)} == {"<|im_end|>"}


def test_its_adapter_loads_in_peft(pairs: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy = str(real.smollm2())
    training = {"updates": 2, "batch_pairs": 4, "learning_rate": 1e-3, "validation_fraction": 0.0}
    adapter = croco.train(pairs / "data", policy, tmp_path / "tuned", training=training)
    ours, tokenizer = load_policy(policy, dtype="float32", device="cpu", adapter=adapter)
    base = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    ids = tokenizer("It is a fine day.", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        plain = base(ids).logits
        theirs = PeftModel.from_pretrained(base, adapter).eval()(ids).logits
        assert torch.allclose(ours(ids).logits, theirs, atol=1e-3)
    assert not torch.allclose(plain, theirs, atol=1e-2)


def test_its_pairs_train_in_trl(pairs: Path, tmp_path: Path) -> None:
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    rows = load_dataset(
        "parquet", data_files=str(pairs / "data" / "*.parquet"), split="train", cache_dir=tmp_path
    )
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=2, bf16=False, use_cpu=True,
        report_to="none", save_strategy="no", gradient_checkpointing=False, logging_steps=1,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = DPOTrainer(model=str(real.smollm2()), args=arguments, train_dataset=rows, peft_config=lora)
    assert trainer.train().training_loss == pytest.approx(0.693, abs=0.01)
