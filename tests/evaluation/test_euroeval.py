"""EuroEval's file read strictly (what it wrote once, and what is wrong with others), and the stage around it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from conftest import TinyModels, write_recipe
from croco import pipeline, store
from croco.engines import serving
from croco.engines.loading import load_policy
from croco.errors import UserError
from croco.evaluation import euroeval, euroeval_install
from croco.evaluation.euroeval_records import read_records, rows_of
from croco.recipe import Recipe, from_dict, load
from croco.recipe_euroeval import VERSION
from croco.report.tables import results_markdown
from croco.store import read_dropped, read_json, read_table
from croco.training.lora import apply_lora, save_adapter
from croco.training.settings import LoraSettings
from served import Handler, listening
from tiny import make_policy, make_tokenizer, save

WROTE = (
    Path(__file__).parent / "data" / "euroeval_benchmark_results.jsonl"
)  # by EuroEval, in `make test-euroeval`
MODEL = "openai/croco-base"
ASKED = {"iterations": 3, "split": "test", "few_shot": False}
DA, DE = "croco-category-da", "croco-category-de"


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in WROTE.read_text(encoding="utf-8").splitlines()]


def written(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# The file ------------------------------------------------------------------------------------------------------------


def test_every_metric_keeps_its_name_value_and_interval() -> None:
    records = read_records(WROTE, MODEL)
    assert sorted(records) == [DA, DE]
    for line in lines():
        dataset = line["evaluation_results"][0]["source_data"]["dataset_name"]
        rows = rows_of(records[dataset], "base", dataset[-2:], ASKED)
        assert [row["metric"] for row in rows] == ["test_mcc", "test_macro_f1"]
        raw = json.loads(line["eval_library"]["additional_details"]["raw_results"])
        for row, metric in zip(rows, line["evaluation_results"], strict=True):
            values = torch.tensor(
                [one[row["metric"].removeprefix("test_")] for one in raw], dtype=torch.float64
            )
            half = 1.96 * values.std() / len(values) ** 0.5
            assert row["value"] == metric["score_details"]["score"]
            # in percent, as EuroEval shows them
            assert row["value"] == pytest.approx(100 * float(values.mean()))
            assert (row["ci_high"] - row["ci_low"]) / 2 == pytest.approx(100 * float(half))
            assert (row["n"], row["temperature"], row["benchmark"]) == (3, 0.0, dataset)


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    line = lines()[0]
    change(line)
    return line


def set_raw(line: dict[str, Any], change: Callable[[list[dict[str, Any]]], Any]) -> None:
    details = line["eval_library"]["additional_details"]
    raw = json.loads(details["raw_results"])
    change(raw)
    details["raw_results"] = json.dumps(raw)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda line: line["eval_library"].update(version="17.0.1"), f"written by EuroEval 17.0.1, expected {VERSION}"),
        (lambda line: line.pop("eval_library"), r"line 1: written by EuroEval \(unknown\)"),
        (lambda line: line["model_info"].update(name="openai/other"), "results of 'openai/other', expected"),
        (lambda line: line.update(evaluation_results=[]), "no result of EuroEval .*evaluation_results"),
        (lambda line: line["evaluation_results"][0].pop("score_details"), "evaluation_results.0.score_details"),
        (lambda line: line["evaluation_results"][1].update(evaluation_name="test_mcc"), "'test_mcc' 2 times"),
        (lambda line: set_raw(line, list.pop), "has 2 iterations, expected 3"),
        (lambda line: set_raw(line, lambda raw: raw[1].update(mcc=None)), "'test_mcc' is a mean over 2 of 3"),
        (lambda line: set_raw(line, lambda raw: raw[1].pop("macro_f1")), "'test_macro_f1' is a mean over 2 of 3"),
        (lambda line: line["eval_library"]["additional_details"].update(few_shot="true"), "few_shot = true"),
        (lambda line: line["eval_library"]["additional_details"].update(validation_split="true"), "other split"),
        (lambda line: line["eval_library"]["additional_details"].update(languages='["fr"]'), "is in fr, expected da"),
        (
            lambda line: line["evaluation_results"][0]["score_details"].update(score=float("nan")),
            "'test_mcc' is nan without an interval",
        ),
        (
            lambda line: line["evaluation_results"][0]["score_details"]["uncertainty"].pop("confidence_interval"),
            "without an interval",
        ),
    ],
)  # fmt: skip
def test_what_does_not_belong_is_one_sentence(
    change: Callable[[dict[str, Any]], Any], sentence: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "results.jsonl", changed(change))
    with pytest.raises(UserError, match=sentence):
        rows_of(read_records(path, MODEL)[DA], "base", "da", ASKED)


def test_results_of_before_17_a_second_line_and_a_cut_line_are_refused(tmp_path: Path) -> None:
    old = {
        "dataset": "dala",
        "model": MODEL,
        "results": {"total": {"test_mcc": 1.0}},
        "euroeval_version": "15.16.0",
    }
    with pytest.raises(UserError, match=f"written by EuroEval 15.16.0, expected {VERSION}"):
        read_records(written(tmp_path / "old.jsonl", old), MODEL)
    with pytest.raises(UserError, match=f"line 2: '{DA}' a second time"):
        read_records(written(tmp_path / "twice.jsonl", lines()[0], lines()[0]), MODEL)
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(WROTE.read_bytes()[:-40])
    with pytest.raises(UserError, match="line 2: expected JSON"):
        read_records(cut, MODEL)
    euroeval.drop_unfinished_line(cut)
    assert list(read_records(cut, MODEL)) == [DA]


def test_norwegian_is_one_collection(tmp_path: Path) -> None:
    line = changed(
        lambda line: line["eval_library"]["additional_details"].update(languages='["nb", "nn", "no"]')
    )
    record = read_records(written(tmp_path / "no.jsonl", line), MODEL)[DA]
    assert {row["language"] for row in rows_of(record, "base", "nb", ASKED)} == {"nb"}


# The recipe ----------------------------------------------------------------------------------------------------------


def recipe_with(**section: Any) -> Recipe:
    run = {
        "name": "x",
        "languages": ["en", "da"],
        "low_resource_languages": ["gl"],
        "held_out_languages": ["nb"],
    }
    return from_dict({"run": run, "arms": {"a": {}}, "euroeval": section})


def test_the_papers_datasets_are_the_default_and_some_languages_have_none() -> None:
    section = recipe_with().euroeval
    assert section is not None
    assert [len(section.datasets_of(code)) for code in ("en", "da", "nb", "pt-BR", "gl", "cy", "mt", "ga")] == [
        7, 8, 5, 4, 0, 0, 0, 0
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"datasets": {"fr": ["fquad"]}}, "euroeval.datasets.fr: not evaluated"),
        ({"datasets": {"en": ["squad"], "da": ["squad"]}}, "'squad' appears twice"),
        ({"datasets": {"en": ["lab-own"]}}, "begins like a benchmark of our own"),
        ({"datasets": {"en": ["../x"]}}, "euroeval.datasets.en"),
        ({"datasets": {}}, "euroeval has no dataset in en, da, gl, nb"),
        ({"iterations": 1}, "expected at least 2"),
    ],
)
def test_a_recipe_that_cannot_be_meant(section: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        recipe_with(**section)


# The stage -----------------------------------------------------------------------------------------------------------


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
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{said_once}" "{folder}"\n', encoding="utf-8")
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
        written(folder / "test.jsonl", *rows.values())
        text = text.replace(str(models.test_prompts), str(folder / "test.jsonl"))
        text += f'\n[euroeval]\nfew_shot = false\ndatasets = {{ da = ["{DA}"], de = ["{DE}"] }}\n'
        text += f'[runtime.euroeval]\npython = "{python}"\n[runtime.euroeval.urls]\n'
        text += "".join(f'{arm} = "{url}"\n' for arm in ("base", "monolingual", "likelihood"))
        self.recipe = folder / "recipe.toml"
        self.recipe.write_text(text, encoding="utf-8")

    def habits(self, **habits: str) -> None:
        (self.folder / "habits.json").write_text(json.dumps(habits), encoding="utf-8")

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
    ("habit", "sentence"),
    [
        ({"fails_at": DA}, f"'{DA}' could not be evaluated: Failed to generate text, after 10 attempts"),
        ({"dies_at": DE}, "EuroEval ended with exit code 3: Killed by something"),
    ],
)
def test_what_failed_is_tried_again_and_what_is_finished_is_not(
    habit: dict[str, str], sentence: str, place: Place
) -> None:
    place.habits(**habit)
    with pytest.raises(UserError, match=sentence):
        place.run()
    place.habits()
    assert read_table(place.run()).height == 4
    (failed,) = habit.values()
    assert [asked["datasets"] for asked in place.asked] == [[DA, DE], [failed]]


def test_a_line_that_has_no_shard_yet_is_taken_as_it_is(place: Place) -> None:
    """Killed between EuroEval's line and our shard, and inside EuroEval's next line."""
    place.habits(dies_at=DA)
    with pytest.raises(UserError):
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
    store.write_json(folder / "stage.json", made | {"state": "running"})  # killed once more, scratch gone
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


@pytest.mark.slow
def test_all_arms_are_in_the_results_and_in_the_tables(place: Place) -> None:
    recipe = load(place.recipe)
    pipeline.run(recipe, until="results")
    results = read_table(recipe.folder / "results").filter(pl.col("benchmark").str.starts_with("croco-"))
    assert results["arm"].unique().sort().to_list() == ["base", "likelihood", "monolingual"]
    assert results.height == 12
    text = results_markdown(recipe.folder)
    assert "Not covered by EuroEval: English, Irish" in text
    assert f"| da | {DA} | test_mcc |" in text


def test_nothing_is_compared_over_unequal_sets() -> None:
    rows = [
        (arm, "da", dataset, metric, 3)
        for arm in ("base", "a")
        for dataset in ("whole", "one-arm", "one-metric")
        for metric in ("test_em", "test_f1")
        if (arm, dataset) != ("a", "one-arm") and (arm, dataset, metric) != ("a", "one-metric", "test_f1")
    ]
    frame = pl.DataFrame(rows, schema=["arm", "language", "benchmark", "metric", "n"], orient="row")
    kept, left_out = euroeval.in_all_arms(frame, num_arms=2)
    assert kept["benchmark"].unique().to_list() == ["whole"]
    assert left_out == ["one-arm", "one-metric"]
    assert euroeval.in_all_arms(frame.filter(pl.col("arm") == "base"), num_arms=2)[0].is_empty()


# What serves, and the environment -----------------------------------------------------------------------------------


def test_a_merged_model_is_the_policy_with_its_adapter_and_template(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}!", encoding="utf-8")
    policy = make_policy("llama")
    base = save(tmp_path / "policy", policy, make_tokenizer())
    adapted = apply_lora(policy, LoraSettings(rank=2, dropout=0.0), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2)
    save_adapter(adapted, tmp_path / "adapter")
    section = from_dict({
        "run": {"name": "x", "languages": ["en"]},
        "arms": {"a": {}},
        "policy": {"model": str(base), "chat_template": str(template)},
    }).policy  # fmt: skip
    folder = serving.merge(section, "float32", tmp_path / "adapter", tmp_path / "merged")
    merged, tokenizer = load_policy(str(folder))
    wanted, _ = load_policy(str(base), adapter=tmp_path / "adapter")
    ids = torch.tensor([tokenizer("Hej med dig")["input_ids"]])
    with torch.inference_mode():
        assert torch.equal(merged(ids).logits, wanted(ids).logits)
        assert not torch.allclose(merged(ids).logits, load_policy(str(base))[0](ids).logits)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x!"


def test_the_server_is_told_what_the_recipe_says(tmp_path: Path) -> None:
    recipe = from_dict({
        "run": {"name": "x", "languages": ["en"]},
        "arms": {"a": {}},
        "policy": {"model": "org/model", "revision": "abc", "chat_template": "t.jinja"},
        "runtime": {"vllm": {"max_model_len": 2048}},
    })  # fmt: skip
    words = serving.model_words(recipe.policy, None) + serving.vllm_words(recipe.runtime.vllm)
    assert words[:6] == ["--model", "org/model", "--revision", "abc", "--chat-template", "t.jinja"]
    assert words[words.index("--max-model-len") + 1] == "2048"
    assert "--gpu-memory-utilization" not in words  # vLLM's own, which is another one on a CPU
    assert serving.model_words(recipe.policy, tmp_path)[:2] == ["--model", str(tmp_path)]


def test_a_server_that_does_not_start_or_serve_is_one_sentence(tmp_path: Path, server: str) -> None:
    policy = recipe_with().policy
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no weights found; exit 1\n", encoding="utf-8")
    python.chmod(0o755)
    with (
        pytest.raises(UserError, match="vLLM's server did not start: no weights found"),
        serving.serve(policy, tmp_path, "x", "float32", vllm=recipe_with().runtime.vllm, python=str(python),
                      seconds=60, log=tmp_path / "log.txt"),
    ):  # fmt: skip
        pass
    with pytest.raises(UserError, match=r"serves openai/croco-base, .* expected 'openai/croco-x'"):
        serving.served_context(server, "openai/croco-x")


def test_versions_are_pinned_and_an_old_python_is_refused(tmp_path: Path) -> None:
    pins = euroeval_install.CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    assert {"litellm", "torch", "datasets", "evaluate", "scikit-learn"} <= {
        pin.split("==")[0] for pin in pins
    }
    assert pins[0].startswith(f"# what EuroEval {VERSION}")
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    old.chmod(0o755)
    with pytest.raises(UserError, match=r"expected a Python of 3\.12 or later"):
        euroeval_install.install(tmp_path / "new", str(old), print)
    with pytest.raises(UserError, match="expected another --to"):
        euroeval_install.install(tmp_path, None, print)
