"""The Trainer: transformers' loop, optimizer, schedule and checkpoints around our batches and losses.

An item of the data loader is an optimizer step. `training_step` cuts it into micro-batches and divides every loss by
what the whole step holds, so the gradient depends neither on the cut nor on the number of processes. All epochs are one
pass over a fixed plan of steps, so resuming means skipping items. Every line of metrics passes by the sentinel.

Shapes: P pairs of a micro-batch, C completions of a pair, N examples."""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerControl, TrainingArguments

from croco.config.training import Training
from croco.models.output_layer import unwrapped
from croco.stages.train import forward
from croco.stages.train.batches import Batch, Layout, TrainingData, collate, cut, row_tokens
from croco.stages.train.checkpoints import ByTheClock, readable, seal
from croco.stages.train.distributed import name_own_layers, shares
from croco.stages.train.early_stopping import Stopped, alarm
from croco.stages.train.losses import pair_losses
from croco.stages.train.reference import on_line
from croco.storage.files import writing


class PairTrainer(Trainer):
    """`transformers.Trainer` on pairs: `steps` are the indices of `examples` that make each optimizer step."""

    control: TrainerControl

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        settings: Training,
        data: TrainingData,
        layout: Layout,
        reference_logps_CN: Tensor | None,
        *,
        reference_on_line: bool = False,
        pad_id: int,
        metrics_file: Path,
        lines: Sequence[dict[str, Any]] = (),
        checkpoint_minutes: float | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> None:
        self.settings, self.data, self.layout = settings, data, layout
        self.reference_logps_CN = reference_logps_CN
        self.reference_on_line = reference_on_line  # instead of what is in the table
        self.pad_id, self.metrics_file, self.on_step = pad_id, metrics_file, on_step
        self.lines = list(lines)  # of the metrics file, which the sentinel reads
        self.lengths = [row_tokens(example, layout.rows) for example in data.examples]
        self.step_metrics: dict[str, float] = {}
        self.own_noise = forward.noise_of(model)
        name_own_layers(unwrapped(model))
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=[{"pairs": list(step)} for step in data.steps],
            eval_dataset=list(data.held_out),
        )
        self.remove_callback(PrinterCallback)
        if checkpoint_minutes is not None:
            self.add_callback(ByTheClock(checkpoint_minutes))

    def get_train_dataloader(self) -> DataLoader:
        """One item per optimizer step, in the planned order; every process sees them all."""
        return DataLoader(self.train_dataset, batch_size=1, shuffle=False, collate_fn=lambda items: items[0])

    def _micro_batches(self, pairs: Sequence[int]) -> Iterator[tuple[Batch, Tensor | None, float, bool]]:
        """This process's share of the pairs: batches, reference values, weight, and whether it is the last. Processes
        wait for each other at every micro-batch, so all have equally many: one with none left takes a pair again at
        weight 0."""
        cuts = [
            cut(share, self.lengths, self.layout.micro_batch_tokens, packed=self.layout.rows == "packed")
            for share in shares(pairs, self.lengths, self.args.world_size)
        ]
        own, most = cuts[self.args.process_index], max(map(len, cuts))
        idle = [min(pairs, key=lambda i: self.lengths[i])]
        for number, pairs_here in enumerate([*own, *[idle] * (most - len(own))]):
            examples = [self.data.examples[i] for i in pairs_here]
            batch = collate(examples, rows=self.layout.rows, pad_id=self.pad_id)
            reference = self.reference_logps_CN
            yield (
                batch.to(self.args.device),
                None if reference is None else reference[:, pairs_here].to(self.args.device),
                float(number < len(own)),
                number == most - 1,
            )

    def _divisor(self, pairs: Sequence[int]) -> int:
        """What the sum of losses is divided by: pairs, or for supervised tuning the tokens that are learnt."""
        if self.reference_logps_CN is not None:
            return len(pairs)
        return sum(self.data.examples[i].num_learnt for i in pairs)

    def _over(self, model: nn.Module, pairs: Sequence[int], backward: bool) -> dict[str, float]:
        """Loss and what is watched over some pairs of all processes, the loss by its divisor, the rest by pairs."""
        sums: dict[str, Tensor] = {}
        for batch, reference_CP, weight, last in self._micro_batches(pairs):
            if self.reference_on_line:
                reference_CP = on_line(model, batch)
            with (
                self._in_step(model, last) if backward else nullcontext(),
                nullcontext() if batch.singles else forward.prepared(model, batch) as inputs,
                forward.routing(model) as routed,
            ):
                with self.accelerator.autocast():  # for the head, which is not within the model's forward
                    logps_CP = forward.completion_logps(model, batch, inputs)
                losses_P, watched = pair_losses(
                    self.settings, logps_CP, reference_CP, forward.token_counts(batch)
                )
                loss = losses_P.sum() * weight / self._divisor(pairs)
                if routed and not batch.singles:  # of micro-batches, as their losses, by pairs
                    balance = forward.balance_loss(model, routed, batch)
                    loss = loss + balance * batch.num_pairs * weight / len(pairs)
                    watched["aux_loss"] = balance.detach().expand(batch.num_pairs)
                if backward:  # processes take the mean of their gradients, and a sum is wanted
                    self.accelerator.backward(loss * self.args.world_size)
            watched = {name: value_P.sum() * weight / len(pairs) for name, value_P in watched.items()}
            for name, value in ({"loss": loss.detach()} | watched).items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value
        values = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum")
        return dict(zip(sums, values.tolist(), strict=True))

    @contextmanager
    def _in_step(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Processes exchange gradients, and DeepSpeed takes its step, at the last micro-batch only."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        with nullcontext() if last else self.accelerator.no_sync(model):
            yield

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward over all micro-batches of a step; returns the step's loss, the mean over its pairs."""
        model.train()
        with forward.switched_off(self.own_noise):
            metrics = self._over(model, inputs["pairs"], backward=True)
        loss = metrics.pop("loss")
        self.step_metrics = {**metrics, "pairs": len(inputs["pairs"])}
        if not math.isfinite(loss):  # before the optimizer sees the gradients
            self._watch({"step": self.state.global_step + 1, "split": "train", "loss": loss})
        return torch.tensor(loss, device=self.args.device)

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss and metrics on the held-out pairs, dropout off, for callbacks (as `eval_…`) and the metrics file."""
        self.model.eval()
        metrics = self._over(self.model, self.data.held_out, backward=False)
        self._watch({"step": self.state.global_step, "split": "validation", **metrics})
        prefixed = {f"eval_{name}": value for name, value in metrics.items()}
        self.log(prefixed)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, prefixed)
        return prefixed

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's numbers of a step together with ours: to the callbacks, and one line of the metrics file."""
        if "grad_norm" in logs:
            logs = {**logs, **self.step_metrics}
            self._watch({"step": self.state.global_step, "split": "train", **logs})
        super().log(logs, start_time)

    def _watch(self, line: dict[str, Any]) -> None:
        """Write a line of metrics, and raise `Stopped` when the sentinel says so."""
        self.lines.append(line)
        reason = alarm(self.settings.sentinel, self.lines, self.data.shortcuts, self.settings.learning_rate)
        if all(math.isfinite(value) for value in line.values() if isinstance(value, float)):
            self._write(line)
        if reason:
            self._write({"step": line["step"], "split": "stopped", "reason": reason})
            raise Stopped(f"training stopped at step {line['step']} of {self.state.max_steps}: {reason}")

    def _write(self, line: dict[str, Any]) -> None:
        if self.is_world_process_zero():
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self.on_step and line["split"] == "train":
            self.on_step(line["step"], len(self.data.steps))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with writing(folder):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process has written its part
        if self.is_world_process_zero():
            seal(folder, self.metrics_file)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with readable(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            super()._load_rng_state(checkpoint)


def training_arguments(
    settings: Training,
    folder: Path,
    *,
    num_steps: int,
    seed: int,
    device: torch.device,
    evaluate: bool,
    trackers: Sequence[str] = (),
    bfloat16: bool = False,
) -> TrainingArguments:
    """transformers' arguments: a loader item per step, a checkpoint at each evaluation. `bfloat16` is what float32
    weights compute in."""
    every, cpu = max(1, math.ceil(num_steps / settings.sentinel.evaluations)), device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=(math.ceil if settings.warmup_rounding == "up" else int)(
            settings.warmup_ratio * num_steps
        ),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=bfloat16,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=every if evaluate else None,
        save_strategy="steps",
        save_steps=every,
        seed=seed % 2**32,
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and "RANK" in os.environ else None,  # beside other processes
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        disable_tqdm=True,
        report_to=list(trackers) or "none",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs in one process would mean nn.DataParallel
    if device.type == "cuda" and arguments.world_size == 1:  # else it would be the first GPU
        torch.cuda.set_device(device)
        vars(arguments)["_setup_devices"] = device  # transformers' cached property
    return arguments
