"""An architecture of the zoo through tuning: rows, default adapters, TRL's loss and gradients, merging.

Everything is asserted here; what comes back are the cells of its line in docs/architectures.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from croco.config.training import Lora, Training
from croco.models.attention.support import depends_on_batch, forget_lengths
from croco.models.loading import load_policy
from croco.models.lora import apply_lora, leaf, lora_config, merged, put_adapter_on
from croco.models.output_layer import unwrapped
from croco.stages.train.batches import collate
from croco.stages.train.choose_rows import choose_rows
from croco.stages.train.encode import Example
from croco.stages.train.forward import completion_logps, noise_of, switched_off, token_counts
from croco.stages.train.losses import pair_losses
from croco.stages.train.merge import mean_logps
from tiny import make_tokenizer

LORA = Lora(rank=4, alpha=8, dropout=0.0)
SETTINGS = Training(lora=LORA)
LENGTHS = ((3, 1, 9), (12, 8, 3), (30, 14, 12), (40, 2, 20))  # of a prompt and its two completions
ROWS = {"segments": "shared", "masked": "shared, under a mask", "plain": "plain", "single": "one by one"}


def ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(7, zoo.VOCABULARY - 20, (count,), generator=generator).tolist()


EXAMPLES = [
    Example(str(n), "en", ids(prompt, n), ([*ids(chosen, n + 10), 2], [*ids(rejected, n + 20), 2]))
    for n, (prompt, chosen, rejected) in enumerate(LENGTHS)
]


def with_noise(adapted: Any) -> Any:
    """The adapters away from the identity."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return adapted


def rows_of(name: str) -> str:
    """The rows that are chosen in float32, and in bfloat16 where they are others."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        rows, reason = choose_rows(zoo.make(name, dtype), EXAMPLES)
        found.append(f"{ROWS[rows]}: {reason}" if rows != "segments" else ROWS[rows])
    return found[0] if found[0] == found[1] else f"{found[0]}; in bfloat16 {found[1]}"


def gradient(adapted: Any, loss: Tensor) -> Tensor:
    """The gradient of all adapters, in the order of their names."""
    adapted.zero_grad()
    loss.backward()
    trained = sorted((name, one) for name, one in adapted.named_parameters() if one.requires_grad)
    assert not [name for name, one in trained if one.grad is None], "an adapter that nothing reads"
    return torch.cat([one.grad.flatten() for _, one in trained])


def ours(name: str, reference: Tensor) -> tuple[Any, float, Tensor]:
    """The adapted model, its loss, and the gradient, in the rows that are chosen for it."""
    adapted = with_noise(apply_lora(zoo.make(name), LORA, 0)).train()
    rows, _ = choose_rows(adapted, EXAMPLES)
    batch = collate(EXAMPLES, rows=rows)
    with switched_off(noise_of(adapted)):
        losses, _ = pair_losses(SETTINGS, completion_logps(adapted, batch), reference, token_counts(batch))
        return adapted, losses.mean().item(), gradient(adapted, losses.mean())


def theirs(name: str, adapted: Any, folder: Path) -> tuple[Any, Any]:
    """TRL's trainer of the same adapted policy, on PEFT's own layers, and the pairs as it takes them."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model = zoo.make(name)
    arguments = DPOConfig(
        output_dir=str(folder), beta=SETTINGS.beta, bf16=False, use_cpu=True, gradient_checkpointing=False,
        report_to="none", max_length=None, disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2),
        processing_class=make_tokenizer(zoo.VOCABULARY),
        peft_config=lora_config(model, LORA),
    )
    trainer.aux_loss_enabled = False  # experts' balance is compared in stages/train/test_adapters.py
    inputs = trainer.data_collator(
        [
            {"prompt_ids": one.prompt, "chosen_ids": one.completions[0], "rejected_ids": one.completions[1]}
            for one in EXAMPLES
        ]
    )
    trainer.model.load_state_dict(adapted.state_dict())
    trainer.model.train()
    return trainer, inputs


def plain_loss(adapted: Any, reference: Tensor) -> Tensor:
    """The loss from a forward of each sequence alone, as anyone would write it."""
    logps = []
    for place in (0, 1):
        for one in EXAMPLES:
            forget_lengths(unwrapped(adapted))
            sequence, start = torch.tensor([[*one.prompt, *one.completions[place]]]), len(one.prompt)
            # the last token predicts nothing, and is not fed
            logits = adapted(input_ids=sequence[:, :-1], use_cache=False).logits[0, start - 1 :]
            logps.append(logits.log_softmax(-1).gather(1, sequence[0, start:, None]).sum())
    counts = torch.tensor([[float(len(one.completions[place])) for one in EXAMPLES] for place in (0, 1)])
    return pair_losses(SETTINGS, torch.stack(logps).view(2, -1), reference, counts)[0].mean()


def merged_exactly(adapted: Any, name: str, folder: Path) -> None:
    """The adapter changes the model; saved, put on again, merged and read again it is the same one."""
    adapted.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    model = zoo.make(name)
    before = mean_logps(model, EXAMPLES)
    put = put_adapter_on(model, folder / "adapter").eval()
    after = mean_logps(put, EXAMPLES)
    assert (after - before).abs().max() > 1e-3, f"{name}: the adapter changes nothing"
    torch.testing.assert_close(after, mean_logps(adapted.eval(), EXAMPLES), rtol=0, atol=1e-4)
    whole = merged(put)
    torch.testing.assert_close(mean_logps(whole, EXAMPLES), after, rtol=0, atol=1e-4)
    whole.save_pretrained(folder / "merged")
    make_tokenizer(zoo.VOCABULARY).save_pretrained(folder / "merged")
    again, _ = load_policy(str(folder / "merged"), dtype="float32", device="cpu")
    torch.testing.assert_close(mean_logps(again, EXAMPLES), after, rtol=0, atol=1e-4)


def tuned(name: str, folder: Path) -> list[str]:
    """Rows, the layers that "auto" adapts, the loss beside TRL's, and the merged model."""
    rows = rows_of(name)
    model = zoo.make(name)
    plain = collate(EXAMPLES, rows="single")
    with torch.no_grad():
        reference = completion_logps(model, plain)
    adapted, loss, grads = ours(name, reference)
    trainer, inputs = theirs(name, adapted, folder)
    whose = "TRL's"
    with switched_off(noise_of(trainer.model)):
        try:
            if depends_on_batch(model.config):
                raise ValueError("its numbers follow from the batch")
            expected = trainer.compute_loss(trainer.model, inputs)
        except (AttributeError, ValueError) as error:  # TRL's code at a model that it does not expect
            whose = f"a plain forward's (TRL: {' '.join(str(error).split())[:100]})"
            expected = plain_loss(trainer.model, reference)
        wanted = gradient(trainer.model, expected)
    assert abs(loss - expected.item()) < 1e-4, f"{name}: loss {loss:.6f}, {whose} {expected.item():.6f}"
    gap = ((grads - wanted).norm() / wanted.norm()).item()
    assert gap < 1e-3, f"{name}: gradient differs from {whose} by {gap:.1e}"
    merged_exactly(adapted, name, folder)
    layers = sorted({leaf(one) for one in lora_config(zoo.make(name), LORA).target_modules})
    return [rows, ", ".join(layers), whose, "exact"]
