"""One of several processes of a torchrun: the gradients of one step, and a whole run, into a folder."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from croco.config.training import Lora
from croco.stages.train.distributed import rank
from stages.train.pairs import replace
from stages.train.test_train import SETTINGS, run, trainer_of

UNEVEN = [150, 1]  # token budgets: a few micro-batches, one pair each


def gradients(folder: Path, budget: int) -> dict[str, torch.Tensor]:
    """The loss and every gradient of one step of nine pairs, as the optimizer would see them."""
    trainer = trainer_of(folder, budget)
    model = trainer.accelerator.prepare(trainer.model)
    loss = trainer.training_step(model, {"pairs": list(range(9))})
    bare = getattr(model, "module", model)
    found = {n: p.grad for n, p in bare.named_parameters() if p.requires_grad and "lora_B" in n}
    return {"loss": loss, **found}


def whole_run(folder: Path, **options):
    """A run without dropout, whose masks would be drawn by other processes."""
    return run(folder, replace(SETTINGS, lora=Lora(rank=4, alpha=8, dropout=0.0)), **options)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    PartialState(cpu=True, backend="gloo")
    for size in UNEVEN:
        torch.save(gradients(where / f"scratch-{rank()}", size), where / f"gradients-{size}-{rank()}.pt")
    whole_run(where / "run")
