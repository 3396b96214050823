"""The stage `euroeval`: structured tasks, by EuroEval as a program of its own, against a server of an arm's policy.

One shard per dataset, written when EuroEval's results file has its line: a run that was killed goes on with the next
dataset, and inside one EuroEval keeps the completions of finished iterations."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from croco.config.evaluation import VERSION
from croco.config.recipe import Recipe
from croco.config.runtime import EuroEvalRuntime, Runtime
from croco.errors import UserError
from croco.models import vllm_server
from croco.models.children import started
from croco.models.open import tuned_weights
from croco.pipeline.compute import gpu_shares
from croco.pipeline.stage import Work
from croco.stages.euroeval.results_file import Record, read_records, rows_of
from croco.stages.evaluate.results import BASE
from croco.storage import files
from croco.storage.hashing import folder_identity
from croco.storage.schemas import RESULTS, ledger

PROGRAM = Path(__file__).with_name("program.py")
RESULTS_FILE = "euroeval_benchmark_results.jsonl"  # EuroEval's own name for it
FACTS_FILE = "facts.json"
NOT_COVERED = "EuroEval has no dataset in this language"


@dataclass(frozen=True)
class Dataset:
    """One dataset of one language; its number is its shard's."""

    index: int
    language: str
    name: str


def check(recipe: Recipe, say: Callable[[str], None] = print) -> None:
    """Raise UserError when what the stage runs on is not there: before the stages in front of it take days."""
    runtime = recipe.runtime.euroeval
    if not Path(runtime.python).exists():
        raise UserError(
            f"runtime.euroeval.python = '{runtime.python}': no such program, "
            f"expected EuroEval's Python: run `croco euroeval install`"
        )
    _key(runtime)
    if set(runtime.urls) != {BASE, *recipe.evaluated_arms}:
        vllm_server.check(runtime.vllm_python or recipe.runtime.vllm.python, "runtime.euroeval.vllm_python")


def named_server(runtime: EuroEvalRuntime, arm: str) -> vllm_server.Serving:
    """The recipe's server of an arm; raises UserError when it does not answer or does not serve the arm."""
    url, place = runtime.urls[arm].rstrip("/"), f"runtime.euroeval.urls.{arm}"
    context = vllm_server.ask_context(url, model_name(arm), place, runtime.key_variable)
    return vllm_server.Serving(url, context)


def model_name(arm: str) -> str:
    """The name that a server has an arm's policy under, and EuroEval knows it by."""
    return f"openai/croco-{arm}"


def euroeval(work: Work) -> None:
    """Write EuroEval's results of `work.arm`, dataset by dataset; languages without any go to the ledger."""
    names = ((code, name) for code, names in work.settings["datasets"].items() for name in names)
    datasets = [Dataset(index, *name) for index, name in enumerate(names)]
    todo = [datasets[index] for index in work.todo(len(datasets))]
    folder = work_folder(work)
    results = folder / RESULTS_FILE
    drop_unfinished_line(results)
    done = read_records(results, model_name(str(work.arm)))  # killed between EuroEval's line and our shard
    failed: dict[str, str] = {}
    with work.progress(len(datasets), "dataset", len(datasets) - len(todo)) as bar:
        for dataset in [dataset for dataset in todo if dataset.name in done]:
            write(work, dataset, done[dataset.name])
            bar.advance(1)
        for dataset, reason in run(work, folder, [dataset for dataset in todo if dataset.name not in done]):
            if reason is None:
                reason = _write_new(work, dataset, results)
            if reason is not None and work.runtime.euroeval.keep_going:
                drop = ("dataset", dataset.name, dataset.language, None, reason)
                _write_shard(work, dataset, RESULTS.schema.empty_table(), [drop])
            elif reason is not None:
                failed[dataset.name] = reason
            bar.advance(1)
    if failed:
        name, reason = next(iter(failed.items()))
        others = f"; neither could {', '.join(list(failed)[1:])}" if len(failed) > 1 else ""
        raise UserError(
            f"{work.title}: '{name}' could not be evaluated: {reason}{others}. The other datasets are kept: run again, "
            f"or set runtime.euroeval.keep_going = true, which puts it into the ledger (see {folder / 'log.txt'})"
        )
    if todo or results.exists():  # else a kill came when all this was done and its scratch gone
        finish(work, folder)


def finish(work: Work, folder: Path) -> None:
    """Keep EuroEval's own file, and what is to be said of the whole, whichever start of the stage saw it."""
    results = folder / RESULTS_FILE
    text = results.read_text(encoding="utf-8") if results.exists() else ""
    files.write_text(work.folder / RESULTS_FILE, text)
    records = read_records(results, model_name(str(work.arm)))
    counts = {name: record.failed_instances for name, record in sorted(records.items())}
    facts = files.read_json(folder / FACTS_FILE)
    work.record(failed_instances={name: count for name, count in counts.items() if count}, **facts)


def work_folder(work: Work) -> Path:
    """Where EuroEval runs: it finds its results so far and local datasets in its working directory."""
    folder = work.scratch() / "work"
    folder.mkdir(exist_ok=True)
    if (local := work.settings["local"]) is not None:
        ignored = shutil.ignore_patterns(RESULTS_FILE)
        shutil.copytree(Path(local).expanduser(), folder, ignore=ignored, dirs_exist_ok=True)
    return folder


def drop_unfinished_line(path: Path) -> None:
    """Cut what a killed EuroEval had only half written."""
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            path.write_bytes(whole)


def _write_new(work: Work, dataset: Dataset, results: Path) -> str | None:
    """The shard of a dataset that EuroEval says is done; the reason why not when its file does not have it."""
    record = read_records(results, model_name(str(work.arm))).get(dataset.name)
    if record is None:
        return "EuroEval skipped it"
    write(work, dataset, record)
    return None


def write(work: Work, dataset: Dataset, record: Record) -> None:
    """The shard of a dataset."""
    rows = rows_of(record, str(work.arm), dataset.language, work.settings)
    _write_shard(work, dataset, pa.Table.from_pylist(rows, schema=RESULTS.schema), [])


def _write_shard(
    work: Work, dataset: Dataset, table: pa.Table, drops: list[tuple[str, str, str, int | None, str]]
) -> None:
    """A shard accounts for its dataset, the first one for all languages."""
    read, written = {"dataset": 1}, {"dataset": 1 - len(drops)}
    if dataset.index == 0:
        datasets = work.settings["datasets"]
        none = [language for language, names in datasets.items() if not names]
        read["language"], written["language"] = len(datasets), len(datasets) - len(none)
        drops = drops + [("language", "", language, None, NOT_COVERED) for language in none]
    work.write(dataset.index, table, read=read, written=written, dropped=ledger(drops) if drops else None)


# The program ---------------------------------------------------------------------------------------------------------


def run(work: Work, folder: Path, datasets: Sequence[Dataset]) -> Iterator[tuple[Dataset, str | None]]:
    """Yield every dataset when EuroEval is through with it, with the reason why it could not do it, if so."""
    if not datasets:
        return
    runtime, log = work.runtime.euroeval, folder / "log.txt"
    with served(work, folder) as (server, facts):
        asked = {
            key: work.settings[key]
            for key in ("version", "iterations", "split", "few_shot", "generative_type")
        }
        asked |= {"model": model_name(str(work.arm)), "url": server.url, "max_context": server.max_context}
        asked["datasets"] = [dataset.name for dataset in datasets]
        # -P: beside the program lie modules of ours, one called euroeval
        words = [str(Path(runtime.python).absolute()), "-P", str(PROGRAM)]
        pipe = subprocess.PIPE
        with (
            log.open("ab") as file,
            started(words, _environment(runtime), file, stdin=pipe, stdout=pipe, cwd=folder) as process,
        ):
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(asked).encode())
            process.stdin.close()
            for dataset, reason in _messages(folder, process.stdout, list(datasets), facts):
                if not server.alive:
                    why = vllm_server.reason(folder / "server.txt")
                    raise UserError(f"{work.title}: the server ended at '{dataset.name}': {why}")
                yield dataset, reason
            if process.wait():
                raise UserError(
                    f"{work.title}: EuroEval ended with exit code {process.returncode}: {vllm_server.reason(log)} "
                    f"(see {log}); what is finished is kept"
                )


def _messages(
    folder: Path, lines: IO[bytes], datasets: Sequence[Dataset], facts: Mapping[str, Any]
) -> Iterator[tuple[Dataset, str | None]]:
    """What the program says: its libraries, the datasets it does not know, then one line per dataset."""
    by_name = {dataset.name: dataset for dataset in datasets}
    for line in lines:
        message: dict[str, Any] = json.loads(line)
        if "libraries" in message:
            files.write_json(folder / FACTS_FILE, {"euroeval": message["libraries"], **facts})
            if message["libraries"]["euroeval"] != VERSION:
                raise UserError(
                    f"runtime.euroeval.python has EuroEval {message['libraries']['euroeval']}, expected {VERSION}: "
                    f"run `croco euroeval install`"
                )
        elif "unknown" in message:
            if message["unknown"]:
                raise UserError(
                    f"euroeval.datasets: EuroEval {VERSION} has no {', '.join(message['unknown'])}, "
                    f"and neither has euroeval.local"
                )
        else:
            reason = message.get("error")
            yield by_name[message["dataset"]], None if reason is None else " ".join(reason.split())[:500]


def _environment(runtime: EuroEvalRuntime) -> dict[str, str]:
    """What EuroEval's process sees: nothing of our Python, and LiteLLM's list of models as it is installed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    key = _key(runtime) or "none"  # the client wants one, a vLLM of ours does not
    direct = ["localhost", "127.0.0.1", "::1"]  # through no proxy: the key goes along
    direct += [environment[name] for name in ("NO_PROXY", "no_proxy") if environment.get(name)]
    environment |= dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join(direct))
    return environment | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_API_KEY": key}


def _key(runtime: EuroEvalRuntime) -> str | None:
    if runtime.key_variable is None:
        return None
    if not (key := os.environ.get(runtime.key_variable)):
        raise UserError(
            f"runtime.euroeval.key_variable: the environment has no {runtime.key_variable}, expected the key in it"
        )
    return key


def several_gpus(runtime: Runtime) -> list[str]:
    """As many copies of the policy behind the one server as `runtime.replicas` gives GPUs to."""
    gpus = 0 if runtime.device == "cpu" else runtime.vllm.tensor_parallel
    copies = [share for share in gpu_shares(runtime, gpus) if share]
    return ["--data-parallel-size", str(len(copies))] if len(copies) > 1 else []


@contextmanager
def served(work: Work, folder: Path) -> Iterator[tuple[vllm_server.Serving, dict[str, Any]]]:
    """The server that the recipe names for the arm, or one of ours; and what `stage.json` says of it."""
    arm, runtime = str(work.arm), work.runtime.euroeval
    if arm in runtime.urls:
        server = named_server(runtime, arm)
        yield server, {"server": server.url, "max_context": server.max_context}
        return
    from croco.models.loading import pick_device, pick_dtype

    policy = work.settings["policy"]
    dtype = str(pick_dtype(policy.dtype, pick_device(work.runtime.device))).removeprefix("torch.")
    merged, identity = None, work.record_file["science"]["settings"]["policy"]["model"]
    if arm != BASE:
        weights = tuned_weights(work.inputs["train"])
        if weights.name == "model":  # all of them were tuned
            policy = policy.model_copy(update={"model": str(weights), "revision": None})
        else:
            merged = vllm_server.merge(policy, dtype, weights, work.scratch() / "merged")
        identity = folder_identity(merged or weights)
    words = vllm_server.policy_words(policy, merged)
    if work.runtime.vllm.max_model_len is not None:
        words += ["--max-model-len", str(work.runtime.vllm.max_model_len)]
    words += several_gpus(work.runtime)
    with vllm_server.serve(
        words,
        model_name(arm),
        dtype,
        vllm=work.runtime.vllm,
        python=runtime.vllm_python or work.runtime.vllm.python,
        seconds=runtime.start_seconds,
        log=folder / "server.txt",
    ) as server:
        yield server, {"served_model": identity, "served_dtype": dtype, "max_context": server.max_context}
