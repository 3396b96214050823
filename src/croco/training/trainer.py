"""The Trainer: transformers' loop, optimizer, schedule and checkpoints around our batches and losses.

One item of the data loader is one optimizer step: the pairs of an effective batch. `training_step` cuts it
into micro-batches by the token budget and divides every loss by what the whole step holds, so the gradient
does not depend on the cut. All epochs are one pass over a fixed plan of steps, so that resuming means
skipping items. Left out: several devices, stopping early (what to watch is in the metrics).

Shapes: P pairs of a micro-batch, C completions of a pair, N examples.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerControl, TrainingArguments

from croco.errors import UserError
from croco.ops.losses import PairLogps, nll, preference_losses
from croco.store import sync_files, sync_folder, write_text
from croco.training.batches import Batch, collate, cut
from croco.training.encode import Example
from croco.training.forward import completion_logps, token_counts
from croco.training.settings import TrainSettings

SEAL = "complete"  # marker of a checkpoint written to its end
KEPT = 2  # checkpoints that stay, this one and the one before
CHECKPOINTS = 4  # evaluations and checkpoints of a run


def pair_losses(
    settings: TrainSettings, policy_logps_CP: Tensor, reference_logps_CP: Tensor | None, tokens_CP: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of every pair, (P,), and what is worth watching of it, each (P,) and detached.

    Method "sft" (no reference): the negative log-likelihood of the chosen completion, summed over its tokens.
    Method "dpo": the preference loss, plus `nll_weight` times the chosen's mean negative log-likelihood.
    """
    if reference_logps_CP is None:
        return -policy_logps_CP[0], {"logps/chosen": policy_logps_CP[0].detach()}
    pairs = PairLogps(*policy_logps_CP, *reference_logps_CP, *tokens_CP)
    losses_P = preference_losses(
        settings.loss,
        pairs,
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        simpo_gamma=settings.simpo_gamma,
    )
    if settings.nll_weight:
        losses_P = losses_P + settings.nll_weight * nll(pairs.policy_chosen_logps, pairs.chosen_tokens)
    chosen, rejected = (
        settings.beta * pairs.chosen_logratios.detach(),
        settings.beta * pairs.rejected_logratios.detach(),
    )
    return losses_P, {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": pairs.policy_chosen_logps.detach(),
        "logps/rejected": pairs.policy_rejected_logps.detach(),
    }


class PairTrainer(Trainer):
    """`transformers.Trainer` on pairs: `steps` are the indices of `examples` that make each optimizer step."""

    control: TrainerControl

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        settings: TrainSettings,
        *,
        examples: Sequence[Example],
        reference_logps_CN: Tensor | None,
        steps: Sequence[Sequence[int]],
        validation: Sequence[int],
        shared: bool,
        micro_batch_tokens: int,
        pad_id: int,
        metrics_file: Path,
        on_metrics: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.settings = settings
        self.examples = examples
        self.reference_logps_CN = reference_logps_CN
        self.validation = validation
        self.shared = shared
        self.micro_batch_tokens = micro_batch_tokens
        self.pad_id = pad_id
        self.metrics_file = metrics_file
        self.on_metrics = on_metrics
        self.lengths = [example.num_tokens for example in examples]
        self.step_metrics: dict[str, float] = {}
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=[{"pairs": list(step)} for step in steps],
            eval_dataset=list(validation),
        )
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader:
        """One item per optimizer step, in the planned order."""
        return DataLoader(self.train_dataset, batch_size=1, shuffle=False, collate_fn=lambda items: items[0])

    def _micro_batches(self, pairs: Sequence[int]) -> Iterator[tuple[Batch, Tensor | None]]:
        for rows in cut(pairs, self.lengths, self.micro_batch_tokens):
            batch = collate([self.examples[i] for i in rows], shared=self.shared, pad_id=self.pad_id)
            reference = self.reference_logps_CN
            yield (
                batch.to(self.args.device),
                None if reference is None else reference[:, rows].to(self.args.device),
            )

    def _divisor(self, pairs: Sequence[int]) -> int:
        """What the sum of losses is divided by: pairs, or for supervised tuning completion tokens."""
        if self.reference_logps_CN is not None:
            return len(pairs)
        return sum(len(self.examples[i].completions[0]) for i in pairs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward over all micro-batches of a step; returns the step's loss, the mean over its
        pairs.
        """
        model.train()
        pairs, divisor = inputs["pairs"], self._divisor(inputs["pairs"])
        total = torch.zeros((), device=self.args.device)
        sums: dict[str, Tensor] = {}
        for batch, reference_CP in self._micro_batches(pairs):
            logps_CP = completion_logps(model, batch)
            losses_P, watched = pair_losses(self.settings, logps_CP, reference_CP, token_counts(batch))
            loss = losses_P.sum() / divisor
            self.accelerator.backward(loss)
            total += loss.detach()
            _accumulate(sums, watched)
        self._stop_unless_finite("loss", total.item())
        self.step_metrics = {name: value.item() / len(pairs) for name, value in sums.items()}
        return total

    def _stop_unless_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"training stopped: the {name} is {value} at step {self.state.global_step + 1} of "
                f"{self.state.max_steps} (learning rate {self.settings.learning_rate:g}); expected a finite number"
            )

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss and metrics on the held-out pairs, dropout off; names carry `eval_`. Also written to the
        metrics file.
        """
        self.model.eval()
        sums: dict[str, Tensor] = {}
        total = 0.0
        for batch, reference_CP in self._micro_batches(self.validation):
            logps_CP = completion_logps(self.model, batch)
            losses_P, watched = pair_losses(self.settings, logps_CP, reference_CP, token_counts(batch))
            total += losses_P.sum().item()
            _accumulate(sums, watched)
        metrics = {"loss": total / self._divisor(self.validation)}
        metrics |= {name: value.item() / len(self.validation) for name, value in sums.items()}
        self._write({"step": self.state.global_step, "split": "validation", **metrics})
        prefixed = {f"eval_{name}": value for name, value in metrics.items()}
        self.log(prefixed)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, prefixed)
        return prefixed

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's numbers of a step together with ours: to the callbacks, and one line of the metrics file."""
        if "grad_norm" in logs:
            self._stop_unless_finite("gradient norm", logs["grad_norm"])
            logs = {**logs, **self.step_metrics}
            self._write({"step": self.state.global_step, "split": "train", **logs})
        super().log(logs, start_time)

    def _write(self, metrics: dict[str, Any]) -> None:
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        if self.on_metrics:
            self.on_metrics(metrics)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        sync_files(folder)
        with self.metrics_file.open("rb") as metrics:  # its lines up to here will not be written again
            os.fsync(metrics.fileno())
        write_text(folder / SEAL, "")
        for older in sorted(folder.parent.glob("checkpoint-*"), key=_step)[:-KEPT]:
            shutil.rmtree(older)


def _accumulate(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value_P in values.items():
        sums[name] = sums.get(name, torch.zeros((), device=value_P.device)) + value_P.sum()


def training_arguments(
    settings: TrainSettings, folder: Path, *, num_steps: int, seed: int, cpu: bool, evaluate: bool
) -> TrainingArguments:
    """transformers' arguments of a run: one item of the loader per step, a checkpoint and an evaluation every
    quarter.
    """
    every = max(1, math.ceil(num_steps / CHECKPOINTS))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=int(settings.warmup_ratio * num_steps),  # rounded down: a run of one step must learn
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=every if evaluate else None,
        save_strategy="steps",
        save_steps=every,
        seed=seed % 2**32,
        use_cpu=cpu,
        disable_tqdm=True,
        report_to="none",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs in one process would mean nn.DataParallel
    return arguments


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; ones that were not are removed."""
    sealed = []
    for path in folder.glob("checkpoint-*"):
        if (path / SEAL).is_file():
            sealed.append(path)
        else:
            shutil.rmtree(path)
    return max(sealed, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def rewind_metrics(path: Path, step: int) -> None:
    """Keep the lines of a metrics file up to a step; later ones will be written again. A torn last line goes
    too.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    write_text(path, "".join(kept))
    sync_folder(path.parent)


def last_metrics(path: Path) -> dict[str, dict[str, float]]:
    """The last line of each split in a metrics file."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line.pop("split"): line for line in lines}
