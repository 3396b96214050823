"""The arena end to end: real tiny policies and judges, the lab's judge, and judges that are no use."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import tiny
from conftest import TinyModels, write_prompts, write_recipe
from croco.config.load import from_dict, load
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.lab import judge, world
from croco.models.chat_template import prompt_ids
from croco.pipeline import run
from croco.pipeline.fingerprint import arena_settings
from croco.pipeline.node import settings_values
from croco.pipeline.stage import Work
from croco.stages.arena import arena, judge_prompt
from croco.stages.arena.arena import HOPELESS, ArenaWorker, account, matches
from croco.stages.arena.results import arena_rows
from croco.storage import shards
from croco.storage.schemas import TABLES, ledger

LANGUAGES = ("da", "en")


def write(folder: Path, name: str, table: Any) -> None:
    counts = {TABLES[name].unit: table.num_rows}
    shards.write_shard(folder, 0, table, TABLES[name].schema, read=counts, written=counts, dropped=ledger([]))


def made_recipe(**sections: Any) -> Recipe:
    return from_dict({
        "run": {"name": "x", "languages": list(LANGUAGES)},
        "arena": {"judge": "lab"}, "arms": {"croco": {}}, "evaluation": {"bootstrap": 50},
        "runtime": {"shard_prompts": 7, "device": "cpu", "token_budget": 4096},
    } | sections)  # fmt: skip


@pytest.fixture
def evaluated(tmp_path: Path) -> dict[str, Path]:
    """Twelve lab prompts, answered greedily: the arm says the gold sentence, the base evades, except where noted."""
    prompts = world.prompts("test", LANGUAGES, 12)
    rows = prompts.to_pylist()
    write(tmp_path / "eval-prompts", "prompts", prompts)
    for arm in ("base", "croco"):
        verdicts = []
        for number, row in enumerate(rows):
            evasive = world.templates(row["language"])["evasive"][0]
            text = row["reference"] if arm == "croco" and number >= 3 else evasive
            if arm == "base" and number == 5:
                continue
            for temperature, said in ((0.0, text), (1.0, "sampled")):
                verdicts.append({
                    "arm": arm, "prompt_id": row["prompt_id"], "language": row["language"], "sample_id": 0,
                    "temperature": temperature, "completion": said, "finish_reason": "stop", "benchmark": "lab",
                    "mode": "good", "value": 1.0, "found_language": None,
                })  # fmt: skip
        table = pl.DataFrame(verdicts).with_columns(pl.col("found_language").cast(pl.String)).to_arrow()
        write(tmp_path / "evaluate" / arm, "verdicts", table)
    return {
        "eval-prompts": tmp_path / "eval-prompts",
        "evaluate": tmp_path / "evaluate" / "croco",
        "evaluate/base": tmp_path / "evaluate" / "base",
    }


def work_of(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> Work:
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings_values(arena_settings(recipe, "croco"))
    return Work(arm="croco", folder=folder, settings=settings, runtime=recipe.runtime, inputs=inputs,
                table=TABLES["comparisons"], title="arena/croco", record_file={"starts": 1})  # fmt: skip


def test_the_labs_judge_prefers_what_is_right(evaluated: dict[str, Path], tmp_path: Path) -> None:
    work = work_of(made_recipe(), tmp_path / "arena", evaluated)
    arena.arena(work)
    table = shards.read_table(work.folder)
    rows = {(r["prompt_id"], r["language"]): r for r in table.to_dicts()}
    order = [(r["prompt_id"], r["language"]) for r in shards.read_table(evaluated["eval-prompts"]).to_dicts()]
    assert [rows[key]["value"] for key in order[:3]] == [0.5] * 3
    assert all(rows[key]["judgement_arm_first"] is None for key in order[:3])
    others = [rows[key] for number, key in enumerate(order) if number > 5]
    assert {row["value"] for row in others} == {1.0}
    assert others[0]["judgement_arm_first"] == "1 is good, 2 is evasive.\nVerdict: 1"
    assert others[0]["judgement_base_first"] == "1 is evasive, 2 is good.\nVerdict: 2"
    dropped = shards.read_dropped(work.folder)
    assert dropped.select("unit", "prompt_id", "language", "reason").rows() == [
        ("comparison", *order[5], "no completion: of base")
    ]
    assert table.height + dropped.height == 24
    facts = work.record_file["facts"]
    assert (facts["same_text"], facts["inconsistent"], facts["judgements"]) == (3, 0, 2 * 20)
    assert facts["without_verdict"] == {"no completion": 1}
    # what was written by a lost process comes back the same
    (work.folder / "part-00001.done").unlink()
    arena.arena(work_of(made_recipe(), work.folder, evaluated))
    assert shards.read_table(work.folder).equals(table)


def test_the_labs_judge_has_three_tiers() -> None:
    row = world.prompts("test", ["da"], 1).to_pylist()[0]
    item, _ = world.split_id(row["prompt_id"])
    terse, evasive = world.say(item.answer, "da"), world.templates("da")["evasive"][0]
    ask = lambda one, two: judge.compare(row["prompt_id"], "da", one, two).splitlines()[-1]  # noqa: E731
    assert ask(row["reference"], terse) == "Verdict: 1"
    assert ask(evasive, terse) == "Verdict: 2"
    assert ask(evasive, "nonsense") == "Verdict: tie"
    assert ask(terse, row["reference"]) == "Verdict: 2"


def test_limit_and_languages_choose_the_prompts(evaluated: dict[str, Path]) -> None:
    recipe = made_recipe(arena={"judge": "lab", "limit": 4, "languages": ["en"]})
    found = matches(work_of(recipe, evaluated["evaluate"] / "arena", evaluated).task)
    first = shards.read_table(evaluated["eval-prompts"])["prompt_id"].unique(maintain_order=True)[:4]
    assert sorted(found["prompt_id"]) == sorted(first)
    assert set(found["language"]) == {"en"}


def test_a_tiny_model_as_judge_writes_garbage_and_that_is_counted(
    evaluated: dict[str, Path], tiny_models: TinyModels, tmp_path: Path
) -> None:
    judge = tiny.save(
        tmp_path / "judge", tiny.make_policy("llama", max_positions=2048), tiny.make_tokenizer()
    )
    recipe = made_recipe(
        arena={"judge": "model", "limit": 3}, judge={"model": str(judge), "max_new_tokens": 12}
    )
    work = work_of(recipe, tmp_path / "arena", evaluated)
    with pytest.raises(UserError, match=r"arena/croco: no comparison got two verdicts"):
        arena.arena(work)
    asked = [
        row
        for row in matches(work_of(recipe, evaluated["evaluate"] / "arena", evaluated).task).to_dicts()
        if arena.is_asked(row)
    ]
    dropped = shards.read_dropped(work.folder)
    reasons = dropped["reason"].str.split(": ").list.first().to_list()
    assert set(reasons) <= {"no verdict in the judgement", "judgement cut off", "no completion"}
    assert sum(reason != "no completion" for reason in reasons) == len(asked)
    facts = work.record_file["facts"]
    assert facts["judgements"] == 2 * len(asked)
    assert facts["judge_prompt_tokens"] > 200 * facts["judgements"]
    assert 0 < facts["judge_completion_tokens"] <= 12 * facts["judgements"]
    # the same text twice is a tie that nobody was asked about
    assert facts["same_text"] == shards.read_table(work.folder).height


def teach(model: Any, tokenizer: Any, questions: list[str], saying: str) -> None:
    """Train a tiny model to end every question in the same words."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    said = tokenizer(saying, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    for step in range(150):
        prompt = prompt_ids(tokenizer, [{"role": "user", "content": questions[step % len(questions)]}])
        logits = model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(said))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()


def test_a_real_judge_that_always_takes_the_first(evaluated: dict[str, Path], tmp_path: Path) -> None:
    model, tokenizer = tiny.make_policy("llama", max_positions=2048), tiny.make_tokenizer()
    rows = matches(work_of(made_recipe(), evaluated["evaluate"] / "arena", evaluated).task).to_dicts()
    questions = [
        judge_prompt.question(row["messages"], row["language"], *arena.shown(row, first))
        for row in rows if arena.is_asked(row) for first in (True, False)
    ]  # fmt: skip
    teach(model, tokenizer, questions, "Verdict: 1")
    tiny.save(tmp_path / "judge", model, tokenizer)
    recipe = made_recipe(arena={}, judge={"model": str(tmp_path / "judge"), "max_new_tokens": 30})
    work = work_of(recipe, tmp_path / "arena", evaluated)
    arena.arena(work)
    table = shards.read_table(work.folder)
    asked = table.filter(pl.col("judgement_arm_first").is_not_null())
    assert asked.height == 20
    assert set(asked["judgement_arm_first"]) == {"Verdict: 1"}
    assert set(asked.select("verdict_arm_first", "verdict_base_first", "value").iter_rows()) == {
        ("arm", "base", 0.5)
    }
    assert (asked["judge_completion_tokens"] > 2 * 3).all()
    assert work.record_file["facts"]["inconsistent"] == 20
    found = {
        row["metric"]: row["value"]
        for row in arena_rows(table, {"all": list(LANGUAGES)}, seed=0, num_resamples=50).to_dicts()
        if row["language"] == "all"
    }
    assert (found["position-bias"], found["self-consistency"], found["win-rate"]) == (1.0, 0.0, 0.5)


def test_one_order_asks_once_and_half_of_them_in_either(evaluated: dict[str, Path], tmp_path: Path) -> None:
    both, once = made_recipe(), made_recipe(arena={"judge": "lab", "orders": "one"})
    assert arena_settings(both, "croco")["languages"] == ["da", "en"]
    assert "orders" not in arena_settings(both, "croco")
    work = work_of(once, tmp_path / "arena", evaluated)
    arena.arena(work)
    table = shards.read_table(work.folder)
    asked = table.filter(pl.any_horizontal(pl.col("^judgement_.*$").is_not_null()))
    assert work.record_file["facts"]["judgements"] == asked.height == 20
    assert work.record_file["facts"]["inconsistent"] == 0
    first = asked.filter(pl.col("judgement_arm_first").is_not_null())
    assert 4 < first.height < 16
    assert (
        first["verdict_base_first"].null_count() == first["judgement_base_first"].null_count() == first.height
    )
    assert first["judgement_arm_first"].to_list()[0].endswith("Verdict: 1")
    assert set(asked["value"]) == {1.0}
    (work.folder / "part-00001.done").unlink()
    arena.arena(work_of(once, work.folder, evaluated))
    assert shards.read_table(work.folder).equals(table)


def test_a_conversation_that_does_not_fit_the_judge_is_in_the_ledger(
    evaluated: dict[str, Path], tiny_models: TinyModels, tmp_path: Path
) -> None:
    recipe = made_recipe(arena={"judge": "model", "limit": 6}, judge={"model": str(tiny_models.policy)})
    work = work_of(recipe, tmp_path / "arena", evaluated)
    with pytest.raises(
        UserError, match=r"arena/croco: no comparison got two verdicts \(8 × not judged\); the ledger"
    ):
        arena.arena(work)
    reasons = shards.read_dropped(work.folder)["reason"].to_list()
    assert sum(reason.startswith("not judged: arm first, the judge's prompt has") for reason in reasons) == 8
    assert account(work.folder)["without_verdict"] == {"not judged": 8, "no completion": 1}


def test_a_hopeless_judge_is_not_asked_for_ever(evaluated: dict[str, Path], tiny_models: TinyModels) -> None:
    recipe = made_recipe(judge={"model": str(tiny_models.policy)})
    worker = ArenaWorker(work_of(recipe, evaluated["evaluate"] / "arena", evaluated).task, 0)
    for _ in range(HOPELESS - 1):
        worker._listen("refused", True)
    with pytest.raises(
        UserError,
        match="gave no verdict in its first 64 judgements, expected a last line such as 'Verdict: 1'",
    ):
        worker._listen("refused", True)


@pytest.mark.slow
def test_a_whole_run_with_prompts_of_its_own(tiny_models: TinyModels, tmp_path: Path) -> None:
    """Samples for the arena, judges with a model that could be read, and puts rows into the results."""
    own = write_prompts(tmp_path / "own.jsonl", 3, start=200)
    path = write_recipe(tmp_path, tiny_models)
    given = ["arena.judge=model", f"arena.source={own}", "arena.max_new_tokens=8", "arena.languages=['da']",
             f"judge.model={tiny_models.policy}", "sampling.completions=6", "training.epochs=1"]  # fmt: skip
    nodes = {node.title: node for node in run.nodes(load(path, given))}
    assert set(nodes["arena/monolingual"].inputs) == {"arena-prompts", "arena-sample/base", "arena-sample"}
    assert "arena/likelihood" in nodes["results"].inputs
    run.run(load(path, given), until="arena-sample")
    base = shards.read_table(tmp_path / "run" / "arena-sample" / "base")
    assert base.height == 3
    assert base["completion_tokens"].max() <= 8
    # the fixture's reused path: greedy completions are those of `evaluate`
    again = {node.title: node for node in run.nodes(load(path, [given[0], given[4]]))}
    assert set(again["arena/monolingual"].inputs) == {"eval-prompts", "evaluate/base", "evaluate"}
    assert not any(title.startswith("arena-sample") for title in again)
    assert any(
        node.title == "arena-sample/base"
        for node in run.nodes(load(path, [given[0], given[4], "evaluation.temperatures=[1.0]"]))
    )


def test_the_judge_enters_the_fingerprint(tiny_models: TinyModels, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tiny_models)
    given = ["arena.judge=model", f"judge.model={tiny_models.policy}"]

    def prints(*more: str) -> dict[str, str]:
        return {node.title: node.fingerprint for node in run.nodes(load(path, [*given, *more]))}

    before = prints()
    changed = {title for title, value in prints("judge.max_new_tokens=99").items() if value != before[title]}
    assert changed == {"arena/monolingual", "arena/likelihood", "results", "report"}
    assert prints("runtime.engines.judge=server", "runtime.servers.judge.url=http://localhost:9/v1") == before
    assert prints("arena.limit=2") != before
    assert prints("arena.orders=both", "judge.labels=words", "arena.temperature=0") == before
    for key in ("arena.orders=one", "judge.labels=brackets"):
        assert {title for title, value in prints(key).items() if value != before[title]} == changed
    drawn = {title for title in prints("arena.temperature=0.1") if title.startswith("arena-sample")}
    assert drawn == {"arena-sample/base", "arena-sample/monolingual", "arena-sample/likelihood"}


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"arena": {}}, r"arena.judge = 'model' is the model of \[judge\], which is missing"),
        (
            {"arena": {"judge": "lab", "source": "x.jsonl"}},
            "judges prompts of the lab, and they are of 'x.jsonl'",
        ),
        ({"arena": {"judge": "lab", "languages": ["fr"]}}, "arena.languages: 'fr' is not evaluated"),
        ({"arena": {"judge": "lab", "source": "lab", "split": "train"}}, "the prompts tuned on"),
        ({"arena": {"juge": "lab"}}, "did you mean 'arena.judge'"),
    ],
)
def test_bad_recipes(sections: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        made_recipe(**sections)
