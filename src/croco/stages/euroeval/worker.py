"""A worker of the stage `euroeval`: a server of the arm's policy, and EuroEval, which asks it dataset by dataset.

Workers have working directories of their own, since EuroEval appends its results to a file there; the completions it
keeps of finished iterations are in one place, so that any worker goes on with a dataset that another one began."""

import json
import os
import shutil
import subprocess
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from croco.config.evaluation import VERSION
from croco.config.runtime import EuroEvalRuntime
from croco.errors import UserError
from croco.models import vllm_server
from croco.models.children import started
from croco.pipeline.stage import Task
from croco.pipeline.workers import Advance, ShardResult
from croco.stages.euroeval.results_file import Record, read_records, rows_of
from croco.storage import files
from croco.storage.schemas import RESULTS, ledger

PROGRAM = Path(__file__).with_name("program.py")
RESULTS_FILE = "euroeval_benchmark_results.jsonl"  # EuroEval's own name for it
FACTS_FILE = "facts.json"
FAILED = "failed"  # folder of the scratch: a file per dataset that could not be evaluated, with the reason
NOT_COVERED = "EuroEval has no dataset in this language"


@dataclass(frozen=True)
class Dataset:
    """One dataset of one language; its number is its shard's."""

    index: int
    language: str
    name: str


@dataclass(frozen=True)
class Serving:
    """How a server of ours is started, and what `stage.json` says of it."""

    words: list[str]
    dtype: str
    facts: dict[str, Any]


def datasets_of(settings: Mapping[str, Any]) -> list[Dataset]:
    """Every dataset of the stage."""
    names = ((code, name) for code, names in settings["datasets"].items() for name in names)
    return [Dataset(index, *name) for index, name in enumerate(names)]


def model_name(arm: str) -> str:
    """The name that a server has an arm's policy under, and EuroEval knows it by."""
    return f"openai/croco-{arm}"


def named_server(runtime: EuroEvalRuntime, arm: str) -> vllm_server.Serving:
    """The recipe's server of an arm; raises UserError when it does not answer or does not serve the arm."""
    url, place = runtime.urls[arm].rstrip("/"), f"runtime.euroeval.urls.{arm}"
    context = vllm_server.ask_context(url, model_name(arm), place, runtime.key_variable)
    return vllm_server.Serving(url, context)


def results_files(folder: Path) -> list[Path]:
    """EuroEval's results files in the scratch of a stage's folder, one per worker."""
    return sorted(folder.glob(f"scratch/work*/{RESULTS_FILE}"))


def finished_datasets(folder: Path, arm: str) -> dict[str, Record]:
    """The datasets that EuroEval is done with, whichever worker asked it."""
    every = [read_records(path, model_name(arm), growing=True) for path in results_files(folder)]
    return {name: record for records in every for name, record in records.items()}


class EuroEvalWorker:
    """Evaluates datasets; a shard is one. The server starts with the first that EuroEval is asked for."""

    def __init__(self, task: Task, serving: Serving | None, replica: int) -> None:
        self.task, self.serving, self.facts = task, serving, dict[str, Any]()
        self.title, self.model = f"euroeval/{task.arm}", model_name(str(task.arm))
        self.every = datasets_of(task.settings)
        scratch = task.folder / "scratch"
        self.cache = (scratch / "work" / "cache").absolute()
        self.folder = scratch / (f"work-{replica}" if replica else "work")
        self.folder.mkdir(exist_ok=True)
        if (local := task.settings["local"]) is not None:
            ignored = shutil.ignore_patterns(RESULTS_FILE)
            shutil.copytree(Path(local).expanduser(), self.folder, ignore=ignored, dirs_exist_ok=True)
        self.results, self.log = self.folder / RESULTS_FILE, self.folder / "log.txt"
        drop_unfinished_line(self.results)
        self.server: vllm_server.Serving | None = None
        self.running = ExitStack()
        weakref.finalize(self, self.running.close)

    def shards(self, indices: Sequence[int], advance: Advance) -> Iterator[ShardResult]:
        """A shard for each dataset that EuroEval could do, or (with `keep_going`) could not; why not is in a file."""
        left = [self.every[index] for index in indices]
        try:
            while left:
                done = finished_datasets(self.task.folder, str(self.task.arm))  # also by one that ended since
                for dataset in [dataset for dataset in left if dataset.name in done]:
                    left.remove(dataset)
                    advance(1)
                    yield self._shard(dataset, done[dataset.name])
                for dataset, reason in self._evaluated(left) if left else ():
                    left = [other for other in left if other != dataset]
                    advance(1)
                    yield from self._finished(dataset, reason)
        except BaseException:  # a traceback would keep the server, and its GPU
            self.running.close()
            raise

    def _finished(self, dataset: Dataset, reason: str | None) -> Iterator[ShardResult]:
        """The shard of a dataset that EuroEval is through with, or a note of why it could not be done."""
        if reason is None:
            record = read_records(self.results, self.model).get(dataset.name)
            if record is not None:
                yield self._shard(dataset, record)
                return
            reason = "EuroEval skipped it"
        if self.task.runtime.euroeval.keep_going:
            yield self._shard(dataset, reason)
        else:
            files.write_text(self.task.folder / "scratch" / FAILED / str(dataset.index), reason)

    def _shard(self, dataset: Dataset, done: Record | str) -> ShardResult:
        """A dataset's results, or the reason why it has none; the first shard accounts for all languages too."""
        settings, rows, drops = self.task.settings, [], []
        if isinstance(done, Record):
            rows = rows_of(done, str(self.task.arm), dataset.language, settings)
        else:
            drops = [("dataset", dataset.name, dataset.language, None, done)]
        read, written = {"dataset": 1}, {"dataset": 1 - len(drops)}
        if dataset.index == 0:
            none = [language for language, names in settings["datasets"].items() if not names]
            read["language"] = len(settings["datasets"])
            written["language"] = read["language"] - len(none)
            drops += [("language", "", language, None, NOT_COVERED) for language in none]
        table = pa.Table.from_pylist(rows, schema=RESULTS.schema)
        return ShardResult(dataset.index, table, ledger(drops), read, written=written)

    def _evaluated(self, datasets: Sequence[Dataset]) -> Iterator[tuple[Dataset, str | None]]:
        """One EuroEval: each dataset when it is through with it, with the reason why it could not do it, if so. It may
        end before the last: after the dataset that ended it or the server."""
        server, facts = self._served()
        names = ("version", "iterations", "split", "few_shot", "generative_type")
        asked = {name: self.task.settings[name] for name in names}
        asked |= {"model": self.model, "url": server.url, "max_context": server.max_context}
        asked |= {"cache": str(self.cache), "known": [dataset.name for dataset in self.every]}
        asked["datasets"] = [dataset.name for dataset in datasets]
        runtime, pipe, waiting = self.task.runtime.euroeval, subprocess.PIPE, list(datasets)
        # -P: beside the program lie modules of ours, one called euroeval
        words = [str(Path(runtime.python).absolute()), "-P", str(PROGRAM)]
        with (
            self.log.open("ab") as log,
            started(words, _environment(runtime), log, stdin=pipe, stdout=pipe, cwd=self.folder) as process,
        ):
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(asked).encode())
            process.stdin.close()
            knows_them = False
            for message in self._messages(process.stdout, facts):
                if "dataset" not in message:
                    knows_them = True
                    continue
                dataset, error = waiting.pop(0), message.get("error")
                assert message["dataset"] == dataset.name
                if error is not None and not server.alive:
                    self.running.close()
                    self.server = None
                    yield dataset, f"the server ended: {vllm_server.reason(self.folder / 'server.txt')}"
                    return
                yield dataset, None if error is None else " ".join(error.split())[:500]
            code = process.wait()
        why = f"EuroEval ended with exit code {code}: {vllm_server.reason(self.log)}"
        if not knows_them or (code and not waiting):
            raise UserError(f"{self.title}: {why} (see {self.log}); what is finished is kept")
        if waiting:
            yield waiting[0], why

    def _messages(self, lines: IO[bytes], facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """What the program says: its libraries, which datasets it does not know, then a message per dataset."""
        for line in lines:
            message: dict[str, Any] = json.loads(line)
            if libraries := message.get("libraries"):
                files.write_json(self.folder / FACTS_FILE, {"euroeval": libraries, **facts})
                if libraries["euroeval"] != VERSION:
                    raise UserError(
                        f"runtime.euroeval.python has EuroEval {libraries['euroeval']}, expected {VERSION}: "
                        f"run `croco euroeval install`"
                    )
                continue
            if message.get("unknown"):
                raise UserError(
                    f"euroeval.datasets: EuroEval {VERSION} has no {', '.join(message['unknown'])}, "
                    f"and neither has euroeval.local"
                )
            yield message

    def _served(self) -> tuple[vllm_server.Serving, dict[str, Any]]:
        """The server that the recipe names for the arm, or one of ours; and what `stage.json` says of it."""
        runtime, vllm = self.task.runtime.euroeval, self.task.runtime.vllm
        if self.serving is None:
            server = named_server(runtime, str(self.task.arm))
            return server, {"server": server.url, "max_context": server.max_context}
        if self.server is None:
            self.server = self.running.enter_context(
                vllm_server.serve(
                    self.serving.words,
                    self.model,
                    self.serving.dtype,
                    vllm=vllm,
                    python=runtime.vllm_python or vllm.python,
                    seconds=runtime.start_seconds,
                    log=self.folder / "server.txt",
                )
            )
        return self.server, self.serving.facts | {"max_context": self.server.max_context}


def drop_unfinished_line(path: Path) -> None:
    """Cut what a killed EuroEval had only half written."""
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            path.write_bytes(whole)


def _environment(runtime: EuroEvalRuntime) -> dict[str, str]:
    """What EuroEval's process sees: nothing of our Python, and LiteLLM's list of models as it is installed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    key = key_of(runtime) or "none"  # the client wants one, a vLLM of ours does not
    direct = ["localhost", "127.0.0.1", "::1"]  # through no proxy: the key goes along
    direct += [environment[name] for name in ("NO_PROXY", "no_proxy") if environment.get(name)]
    environment |= dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join(direct))
    return environment | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_API_KEY": key}


def key_of(runtime: EuroEvalRuntime) -> str | None:
    """The key of the recipe's servers, if they have one; raises UserError where the environment lacks it."""
    if runtime.key_variable is None:
        return None
    if not (key := os.environ.get(runtime.key_variable)):
        raise UserError(
            f"runtime.euroeval.key_variable: the environment has no {runtime.key_variable}, expected the key in it"
        )
    return key
