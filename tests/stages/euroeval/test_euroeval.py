"""The stage `euroeval`, with what EuroEval said once in EuroEval's place, and the making of its environment."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from conftest import TinyModels, write_recipe
from croco.cli import preflight
from croco.config.evaluation import VERSION
from croco.config.load import load
from croco.errors import UserError
from croco.pipeline import run as pipeline
from croco.report.exports import results_markdown
from croco.stages.euroeval import euroeval, install
from croco.stages.euroeval.results_file import read_records
from croco.storage import files
from croco.storage.files import read_json
from croco.storage.shards import read_dropped, read_table
from served import Handler, listening

WROTE = (
    Path(__file__).parent / "data" / "euroeval_benchmark_results.jsonl"
)  # by EuroEval, in `make test-euroeval`
MODEL = "openai/croco-base"
DA, DE = "croco-category-da", "croco-category-de"


@pytest.fixture
def server() -> Iterator[str]:
    """A server that says which names it serves: EuroEval's place asks it nothing more."""

    class Names(Handler):
        def do_GET(self) -> None:
            cards = [
                {"id": f"openai/croco-{arm}", "max_model_len": 512}
                for arm in ("base", "monolingual", "likelihood")
            ]
            self.reply(200, json.dumps({"data": cards}).encode())

    with listening(Names) as address:
        yield f"{address}/v1"


class Place:
    """What stands in EuroEval's place, and a recipe that uses it."""

    def __init__(self, folder: Path, models: TinyModels, url: str) -> None:
        self.folder = folder
        shutil.copy(WROTE, folder / "results.jsonl")
        python = folder / "python"
        said_once = Path(__file__).with_name("said_once.py")
        python.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" "{said_once}" "{folder}" "$@"\n', encoding="utf-8"
        )
        python.chmod(0o755)
        self.habits()
        text = write_recipe(folder, models).read_text(encoding="utf-8")
        text = text.replace(
            'languages = ["en", "da"]', 'languages = ["en", "da"]\nheld_out_languages = ["de", "ga"]'
        )
        prompts = models.test_prompts.read_text(encoding="utf-8")
        for code in ("de", "ga"):
            prompts += models.test_prompts.read_text(encoding="utf-8").replace('"en"', f'"{code}"')
        rows = {(row["prompt_id"], row["language"]): row for row in map(json.loads, prompts.splitlines())}
        text_of_rows = "".join(json.dumps(row) + "\n" for row in rows.values())
        (folder / "test.jsonl").write_text(text_of_rows, encoding="utf-8")
        text = text.replace(str(models.test_prompts), str(folder / "test.jsonl"))
        text += f'\n[euroeval]\ndatasets = {{ da = ["{DA}"], de = ["{DE}"] }}\n'
        text += f'[runtime.euroeval]\npython = "{python}"\n[runtime.euroeval.urls]\n'
        text += "".join(f'{arm} = "{url}"\n' for arm in ("base", "monolingual", "likelihood"))
        self.recipe = folder / "recipe.toml"
        self.recipe.write_text(text, encoding="utf-8")

    def habits(self, **habits: str) -> None:
        (self.folder / "habits.json").write_text(json.dumps(habits), encoding="utf-8")

    @property
    def own_server(self) -> list[str]:
        """Overrides by which a stand-in for vLLM is started."""
        return ["runtime.euroeval.urls={}", f"runtime.euroeval.vllm_python='{self.folder / 'python'}'"]

    @property
    def asked(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "asked.jsonl").read_text().splitlines()]

    def run(self, *overrides: str) -> Path:
        pipeline.run_stage(load(self.recipe, overrides), "euroeval", arm="base")
        return self.folder / "run" / "euroeval" / "base"


@pytest.fixture
def place(tmp_path: Path, tiny_models: TinyModels, server: str) -> Place:
    return Place(tmp_path, tiny_models, server)


def test_datasets_are_rows_and_languages_without_any_are_in_the_ledger(place: Place) -> None:
    folder = place.run()
    (asked,) = place.asked
    assert (asked["model"], asked["datasets"], asked["max_context"], asked["key"]) == (
        MODEL,
        [DA, DE],
        512,
        "none",
    )
    assert read_table(folder).select("arm", "language", "benchmark", "metric").rows() == [
        ("base", "da", DA, "test_mcc"),
        ("base", "da", DA, "test_macro_f1"),
        ("base", "de", DE, "test_mcc"),
        ("base", "de", DE, "test_macro_f1"),
    ]
    made = read_json(folder / "stage.json")
    assert made["counts"]["read"] == {"dataset": 2, "language": 4}
    assert made["counts"]["dropped"] == {"language": 2}
    assert made["facts"]["euroeval"]["euroeval"] == VERSION
    assert made["facts"]["failed_instances"] == {
        name: record.failed_instances
        for name, record in read_records(WROTE, MODEL).items()
        if record.failed_instances
    }
    assert read_dropped(folder)["language"].to_list() == ["en", "ga"]
    assert list(read_records(folder / euroeval.RESULTS_FILE, MODEL)) == [DA, DE]


@pytest.mark.parametrize(
    ("habit", "reason", "asked"),
    [
        ({"fails_at": DA}, "Failed to generate text, after 10 attempts", [[DA, DE], [DA]]),
        ({"dies_at": DA}, "EuroEval ended with exit code 3: Killed by something", [[DA, DE], [DE], [DA]]),
        ({"dies_at": DE}, "EuroEval ended with exit code 3: Killed by something", [[DA, DE], [DE]]),
    ],
)
def test_what_failed_is_tried_again_and_what_is_finished_is_not(
    habit: dict[str, str], reason: str, asked: list[list[str]], place: Place
) -> None:
    """Also where EuroEval itself ended: another one does the other datasets."""
    place.habits(**habit)
    (failed,) = habit.values()
    with pytest.raises(UserError, match=f"'{failed}' could not be evaluated: {reason}"):
        place.run()
    place.habits()
    assert read_table(place.run()).height == 4
    assert [one["datasets"] for one in place.asked] == asked


def test_each_gpu_has_a_server_and_a_euroeval_of_its_own_and_they_run_at_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two real processes of each, which wait for each other; the dataset that one of them fails at is named, and the
    other's is kept."""
    monkeypatch.setattr("croco.pipeline.compute.visible_gpus", lambda: list("4567"))
    several = [
        *place.own_server,
        "runtime.replicas='auto'",
        "runtime.vllm.tensor_parallel=2",
        "runtime.device='auto'",
    ]
    place.habits(together="2", fails_at=DA)
    with pytest.raises(UserError, match=f"'{DA}' could not be evaluated: Failed to generate text") as caught:
        place.run(*several)
    assert DE not in str(caught.value)
    assert {(*one["datasets"], one["gpus"]) for one in place.asked} in (
        {(DA, "4,5"), (DE, "6,7")}, {(DA, "6,7"), (DE, "4,5")},
    )  # fmt: skip
    for gpus in ("4,5", "6,7"):
        assert "--tensor-parallel-size 2" in (place.folder / f"server-{gpus}").read_text()
    place.habits()
    folder = place.run(*several)
    assert place.asked[-1]["datasets"] == [DA]
    assert len(place.asked) == 3
    assert read_table(folder).height == 4
    assert sorted(read_records(folder / euroeval.RESULTS_FILE, MODEL)) == [DA, DE]
    facts = read_json(folder / "stage.json")["facts"]
    assert (facts["served_dtype"], facts["max_context"]) == ("float32", 512)
    with pytest.raises(UserError, match="replicas = 3 with 2 GPUs a worker: found 4 GPUs, expected 6"):
        euroeval.check(load(place.recipe, [*several, "runtime.replicas=3"]))


def test_a_server_that_ends_is_named_and_another_one_serves_the_rest(place: Place) -> None:
    place.habits(server_ends_at=DA)
    with pytest.raises(UserError, match=f"'{DA}' could not be evaluated: the server ended: The GPU fell off"):
        place.run(*place.own_server)
    place.habits()
    assert read_table(place.run(*place.own_server)).height == 4
    assert [one["datasets"] for one in place.asked] == [[DA, DE], [DE], [DA]]


def test_a_line_that_has_no_shard_yet_is_taken_as_it_is(place: Place) -> None:
    """Killed between EuroEval's line and our shard, and inside EuroEval's next line."""
    place.habits(dies_at="start")
    with pytest.raises(UserError, match="EuroEval ended with exit code 1: Killed by something"):
        place.run()
    results = place.folder / "run/euroeval/base/scratch/work" / euroeval.RESULTS_FILE
    results.write_bytes(WROTE.read_bytes()[:-40])
    place.habits()
    assert read_table(place.run()).height == 4
    assert place.asked[-1]["datasets"] == [DE]


def test_a_kill_behind_the_last_dataset_loses_nothing(place: Place) -> None:
    place.habits(dies_at="end")
    with pytest.raises(UserError, match="exit code 3"):
        place.run()
    folder = place.run()
    made = read_json(folder / "stage.json")
    assert made["facts"]["euroeval"]["euroeval"] == VERSION
    assert made["facts"]["failed_instances"]
    files.write_json(folder / "stage.json", made | {"state": "running"})  # killed once more, scratch gone
    again = read_json(place.run() / "stage.json")
    assert (again["state"], again["facts"]) == ("complete", made["facts"])
    assert list(read_records(folder / euroeval.RESULTS_FILE, MODEL)) == [DA, DE]
    assert len(place.asked) == 1


def test_keep_going_puts_what_failed_into_the_ledger(place: Place) -> None:
    place.habits(fails_at=DA)
    folder = place.run("runtime.euroeval.keep_going=true")
    assert read_table(folder)["benchmark"].unique().to_list() == [DE]
    dropped = read_dropped(folder).filter(pl.col("unit") == "dataset")
    assert dropped.select("prompt_id", "language", "reason").rows() == [
        (DA, "da", "Failed to generate text, after 10 attempts.")
    ]


@pytest.mark.parametrize(
    ("override", "habit", "sentence"),
    [
        ("", {"version": "17.0.1"}, "has EuroEval 17.0.1, expected 18.3.0: run `croco euroeval install`"),
        ('euroeval.datasets={da=["dala"]}', {}, "euroeval.datasets: EuroEval 18.3.0 has no dala"),
        ('euroeval.local="nowhere"', {}, "euroeval.local = 'nowhere': expected a folder with custom_datasets.py"),
        ("runtime.euroeval.python=nothing", {}, "runtime.euroeval.python = 'nothing': no such program"),
        ("runtime.euroeval.key_variable=NO_SUCH_KEY", {}, "the environment has no NO_SUCH_KEY"),
        ("runtime.euroeval.urls={base='http://127.0.0.1:9/v1'}", {}, "vLLM is not installed|gives no list of models"),
        ("runtime.euroeval.urls={bse='http://127.0.0.1:9/v1'}", {}, "urls.bse: no such arm, expected of base, mono"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(override: str, habit: dict[str, str], sentence: str, place: Place) -> None:
    place.habits(**habit)
    with pytest.raises(UserError, match=sentence):
        place.run(*filter(None, [override]))


def test_doctor_looks_at_the_environment_and_the_servers(place: Place) -> None:
    recipe = load(place.recipe)
    assert f"/v1 serves '{MODEL}', 512 tokens at most" in "\n".join(preflight._euroeval(recipe))
    away = load(place.recipe, ["runtime.euroeval.urls={base='http://127.0.0.1:9/v1'}"])
    with pytest.raises(UserError, match=r"vLLM is not installed|gives no list of models"):
        list(preflight._euroeval(away))


@pytest.mark.slow
def test_all_arms_are_in_the_results_and_in_the_tables(place: Place) -> None:
    recipe = load(place.recipe)
    pipeline.run(recipe, until="results")
    results = read_table(recipe.folder / "results").filter(pl.col("benchmark").str.starts_with("croco-"))
    assert results["arm"].unique().sort().to_list() == ["base", "likelihood", "monolingual"]
    assert results.height == 12
    text = results_markdown(recipe.folder)
    assert "Not covered by EuroEval: English, Irish" in text
    assert f"| Danish | {DA} | test_mcc |" in text


def test_versions_are_pinned_and_an_old_python_is_refused(tmp_path: Path) -> None:
    pins = install.CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    assert {"litellm", "torch", "datasets", "evaluate", "scikit-learn"} <= {
        pin.split("==")[0] for pin in pins
    }
    assert pins[0].startswith(f"# what EuroEval {VERSION}")
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    old.chmod(0o755)
    with pytest.raises(UserError, match=r"expected a Python of 3\.12 or later"):
        install.install(tmp_path / "new", str(old), print)
    with pytest.raises(UserError, match="expected another --to"):
        install.install(tmp_path, None, print)
