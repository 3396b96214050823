"""One of several processes of a torchrun: the gradients of a step, and a whole run, into a folder."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from croco.config.training import Lora
from croco.stages.train import memory_plan, train
from croco.stages.train.distributed import rank
from stages.train.pairs import replace
from stages.train.test_train import SETTINGS, run, trainer_of

# architecture, and a token budget for a few micro-batches or one pair each
STEPS = [("llama", 150), ("llama", 1), ("gemma3 with images", 150)]
FREE_BYTES = (
    2**40,
    2_500_000,
)  # of the two ranks, for both: what "auto" takes is 16,384 tokens, and some 200


def gradients(folder: Path, arch: str, budget: int) -> dict[str, torch.Tensor]:
    """The loss and every gradient of a step of nine pairs, as the optimizer would see them. It is done twice, for what
    DistributedDataParallel has to say of parameters without a gradient it says at the next step."""
    trainer = trainer_of(folder, budget, arch=arch)
    model, _ = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
    assert isinstance(model, FSDPModule) == ("ACCELERATE_USE_FSDP" in os.environ)
    for _ in range(2):
        model.zero_grad()
        loss = trainer.training_step(model, {"pairs": list(range(9))})
    bare: Any = getattr(model, "module", model)
    found = {n: p.grad for n, p in bare.named_parameters() if p.requires_grad and "lora_B" in n}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}
    return {"loss": loss, **whole}


def whole_run(folder: Path, full: bool = False, **options):
    """A run without dropout, whose masks would be drawn by other processes."""
    return run(folder, replace(SETTINGS, full=full, lora=Lora(rank=4, alpha=8, dropout=0.0)), **options)


class Noted(train.PairTrainer):
    """Writes down by which plan this rank works."""

    def __init__(self, *given, **options) -> None:
        super().__init__(*given, **options)
        (where / f"tokens-{rank()}").write_text(str(self.layout.micro_batch_tokens))


if __name__ == "__main__":
    where, spread = Path(sys.argv[1]), "ACCELERATE_USE_FSDP" in os.environ
    torch.distributed.init_process_group("gloo")
    if spread:  # accelerate spreads weights only over what it takes for GPUs
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    for arch, budget in STEPS:
        found = gradients(where / f"scratch-{arch}-{budget}-{rank()}", arch, budget)
        torch.save(found, where / f"gradients-{arch}-{budget}-{rank()}.pt")
    memory_plan.free_bytes = lambda device: FREE_BYTES[rank()]
    train.PairTrainer = Noted
    whole_run(where / "run", micro_batch_tokens="auto", gradient_checkpointing="auto")
    if spread:
        whole_run(where / "full", full=True)
