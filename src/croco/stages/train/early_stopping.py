"""The sentinel: what is watched while a policy is tuned, and when tuning stops before it ruins the policy.

Pure functions of the lines of the metrics file, so that a run that goes on after a kill decides as before.
Log-probabilities are per token and against the reference (without one, against the beginning), so one bound serves all
lengths."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from croco.config.training import Sentinel
from croco.errors import UserError
from croco.stages.pair.statistics import shortcuts

WINDOW = 3  # steps in a row that must be past a bound: one odd batch is none
SURE_PAIRS = 24  # pairs in a window from which an accuracy of 1.0 is no chance
SHOWN = {"loss": "the loss", "grad_norm": "the gradient norm"}
SETTLED = 10  # steps that say what gradient norm is usual

Line = Mapping[str, Any]


class Stopped(UserError):
    """Tuning was stopped, and why."""


def alarm(
    settings: Sentinel, lines: Sequence[Line], shortcut_aucs: Mapping[str, float], learning_rate: float
) -> str | None:
    """Why tuning must stop after the last line, in one sentence, or None. Numbers that are not finite stop it too."""
    line = lines[-1]
    for name, value in line.items():
        if isinstance(value, float) and not math.isfinite(value):
            return f"{SHOWN.get(name, name)} is {value} (learning rate {learning_rate:g}), expected a finite number"
    if not settings.enabled:
        return None
    if line["split"] == "validation":
        evaluations = [each for each in lines if each["split"] == "validation"]
        return _too_far(settings, [line], evaluations[0], "held-out")
    steps = [each for each in lines if each["split"] == "train"]
    if len(steps) < WINDOW:
        return None
    window = steps[-WINDOW:]
    return (
        _too_far(settings, window, steps[0], "training")
        or _gradient(settings, steps)
        or _shortcut(settings, window, shortcut_aucs)
    )


def _too_far(settings: Sentinel, lines: Sequence[Line], first: Line, where: str) -> str | None:
    """Whether the policy has left the neighbourhood of the reference, in every one of the lines."""
    if "logratios/chosen" not in lines[-1]:  # no reference: compared with the beginning
        rise = min(line["nll"] for line in lines) - first["nll"]
        if rise > settings.max_chosen_drop:
            return (
                f"the log-probability of the chosen {where} completions fell by {rise:.3g} nats per token since the "
                f"beginning, more than training.sentinel.max_chosen_drop = {settings.max_chosen_drop:g}"
            )
        return None
    drop = min(-line["logratios/chosen"] for line in lines)
    if drop > settings.max_chosen_drop:
        return (
            f"the log-probability of the chosen {where} completions fell by {drop:.3g} nats per token under the "
            f"reference's, more than training.sentinel.max_chosen_drop = {settings.max_chosen_drop:g}"
        )
    kl = min(line["kl"] for line in lines)
    if kl > settings.max_kl:
        return (
            f"the KL divergence to the reference on the {where} pairs is {kl:.3g} nats per token, more than "
            f"training.sentinel.max_kl = {settings.max_kl:g}"
        )
    return None


def _gradient(settings: Sentinel, steps: Sequence[Line]) -> str | None:
    if len(steps) < SETTLED + WINDOW:
        return None
    usual = sorted(line["grad_norm"] for line in steps[:SETTLED])[SETTLED // 2]
    least = min(line["grad_norm"] for line in steps[-WINDOW:])
    if least > settings.max_grad_norm_factor * usual:
        return (
            f"the gradient norm is {least:.3g}, more than training.sentinel.max_grad_norm_factor = "
            f"{settings.max_grad_norm_factor:g} times the {usual:.3g} of the first steps"
        )
    return None


def _shortcut(settings: Sentinel, window: Sequence[Line], aucs: Mapping[str, float]) -> str | None:
    """Every pair right within the first steps, where something plain tells chosen from rejected."""
    name = max(aucs, key=lambda each: aucs[each], default=None)
    if name is None or aucs[name] <= settings.shortcut_auc or window[-1]["step"] > settings.early_steps:
        return None
    right = all(line.get("rewards/accuracies", 0.0) == 1.0 for line in window)
    if not right or sum(line["pairs"] for line in window) < SURE_PAIRS:
        return None
    return (
        f"every pair is told right after {window[-1]['step']} steps, and {name} alone tells chosen from rejected "
        f"(AUC {aucs[name]:.2f}): the policy learns {name}, not quality (see training.sentinel.shortcut_auc)"
    )


def shortcuts_of(pairs: pl.DataFrame) -> dict[str, float]:
    """How well language, length and finish reason alone tell chosen from rejected (AUC, 0.5 to 1), of any pairs; a
    column that a file lacks is the same on both sides."""
    if "rejected" not in pairs.columns or pairs.is_empty():
        return {}
    both = pairs.drop_nulls("rejected")
    known = both.select(
        pl.col("prompt_id"),
        *(pl.col(side).str.len_chars().alias(f"{side}_characters") for side in ("chosen", "rejected")),
        *(
            (pl.col(name) if name in both.columns else pl.lit("")).fill_null("").alias(name)
            for side in ("chosen", "rejected")
            for name in (f"{side}_language", f"{side}_finish_reason")
        ),
    )
    return shortcuts(known) if known.height else {}


def best_step(lines: Sequence[Line]) -> int | None:
    """The step with the lowest held-out loss, of those after the first step; None without evaluations."""
    evaluated = [line for line in lines if line["split"] == "validation" and line["step"] > 0]
    if not evaluated:
        return None
    return int(min(evaluated, key=lambda line: (line["loss"], line["step"]))["step"])
