"""The stage `euroeval`: structured tasks, by EuroEval as a program of its own, against a server of an arm's policy.

One shard per dataset, written when EuroEval's results file has its line: a run that was killed goes on with the next
dataset, and inside one EuroEval keeps the completions of finished iterations. Workers (`worker.py`), one for every GPU
or group of GPUs, each have a server and an EuroEval of their own, and take datasets as they come to them."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from croco.config.recipe import Recipe
from croco.config.runtime import Runtime
from croco.errors import UserError
from croco.models import vllm_server
from croco.models.open import tuned_weights
from croco.pipeline.compute import compute, gpu_shares
from croco.pipeline.stage import Work
from croco.stages.euroeval.results_file import read_records
from croco.stages.euroeval.worker import (
    FACTS_FILE,
    FAILED,
    RESULTS_FILE,
    EuroEvalWorker,
    Serving,
    datasets_of,
    finished_datasets,
    key_of,
    model_name,
    results_files,
)
from croco.stages.evaluate.results import BASE
from croco.storage import files
from croco.storage.hashing import folder_identity


def check(recipe: Recipe, say: Callable[[str], None] = print) -> None:
    """Raise UserError when what the stage runs on is not there: before the stages in front of it take days."""
    runtime = recipe.runtime.euroeval
    if not Path(runtime.python).exists():
        raise UserError(
            f"runtime.euroeval.python = '{runtime.python}': no such program, "
            f"expected EuroEval's Python: run `croco euroeval install`"
        )
    key_of(runtime)
    if set(runtime.urls) != {BASE, *recipe.evaluated_arms}:
        vllm_server.check(runtime.vllm_python or recipe.runtime.vllm.python, "runtime.euroeval.vllm_python")
        gpu_shares(_on_this_machine(recipe.runtime), _gpus(recipe.runtime))


def euroeval(work: Work) -> None:
    """Write EuroEval's results of `work.arm`, dataset by dataset; languages without any go to the ledger."""
    every, scratch, arm = datasets_of(work.settings), work.scratch(), str(work.arm)
    todo = [every[index] for index in work.todo(len(every))]
    failed = scratch / FAILED
    shutil.rmtree(failed, ignore_errors=True)  # of an earlier start
    done = finished_datasets(work.folder, arm)  # killed between EuroEval's line and our shard
    named, serving = arm in work.runtime.euroeval.urls, None
    if not named and any(dataset.name not in done for dataset in todo):
        serving = _serving(work)
    compute(
        replace(work, runtime=_on_this_machine(work.runtime)),
        partial(EuroEvalWorker, work.task, serving),
        [1] * len(every),
        "dataset",
        gpus=0 if named else _gpus(work.runtime),
    )
    reasons = {dataset.name: failed / str(dataset.index) for dataset in every}
    reasons = {name: path for name, path in reasons.items() if path.exists()}
    if reasons:
        name, path = next(iter(reasons.items()))
        others = f"; neither could {', '.join(list(reasons)[1:])}" if len(reasons) > 1 else ""
        raise UserError(
            f"{work.title}: '{name}' could not be evaluated: {path.read_text(encoding='utf-8')}{others}. The other "
            f"datasets are kept: run again, or set runtime.euroeval.keep_going = true, which puts it into the ledger "
            f"(see {scratch}/work*/log.txt)"
        )
    if todo or results_files(work.folder):  # else a kill came when all this was done and its scratch gone
        _finish(work)


def _finish(work: Work) -> None:
    """Keep EuroEval's own lines, and what is to be said of the whole, whichever start of the stage saw it."""
    written = results_files(work.folder)
    files.write_text(
        work.folder / RESULTS_FILE, "".join(path.read_text(encoding="utf-8") for path in written)
    )
    records = read_records(work.folder / RESULTS_FILE, model_name(str(work.arm)))
    counts = {name: record.failed_instances for name, record in sorted(records.items())}
    facts = dict[str, Any]()
    for path in work.scratch().glob(f"work*/{FACTS_FILE}"):
        facts |= files.read_json(path)
    work.record(failed_instances={name: count for name, count in counts.items() if count}, **facts)


# What serves the policy ----------------------------------------------------------------------------------------------


def _on_this_machine(runtime: Runtime) -> Runtime:
    """EuroEval's environment is here, and a cluster's other machines have none."""
    local = {"executor": "local", "replicas": "auto"}
    return runtime.model_copy(update=local) if runtime.executor == "ray" else runtime


def _gpus(runtime: Runtime) -> int:
    """GPUs that one server of ours takes."""
    return 0 if runtime.device == "cpu" else runtime.vllm.tensor_parallel


def _serving(work: Work) -> Serving:
    """How each worker starts a server of the arm's policy, merged where an adapter was tuned."""
    from croco.models.loading import pick_device, pick_dtype

    policy = work.settings["policy"]
    dtype = str(pick_dtype(policy.dtype, pick_device(work.runtime.device))).removeprefix("torch.")
    merged, identity = None, work.record_file["science"]["settings"]["policy"]["model"]
    if work.arm != BASE:
        weights = tuned_weights(work.inputs["train"])
        if weights.name == "model":  # all of them were tuned
            policy = policy.model_copy(update={"model": str(weights), "revision": None})
        else:
            merged = vllm_server.merge(policy, dtype, weights, work.scratch() / "merged")
        identity = folder_identity(merged or weights)
    words = vllm_server.policy_words(policy, merged)
    if work.runtime.vllm.max_model_len is not None:
        words += ["--max-model-len", str(work.runtime.vllm.max_model_len)]
    return Serving(words, dtype, {"served_model": identity, "served_dtype": dtype})
