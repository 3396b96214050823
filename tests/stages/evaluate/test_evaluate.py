import shutil
from pathlib import Path

import polars as pl
import pytest
import torch

from croco.config.load import from_dict
from croco.config.recipe import Recipe
from croco.config.training import Lora
from croco.errors import UserError
from croco.lab import world
from croco.models.chat_template import conversation_ids, prompt_ids, with_instruction
from croco.models.loading import load_policy, load_reward
from croco.models.lora import apply_lora
from croco.pipeline.fingerprint import evaluate_settings, results_settings
from croco.pipeline.graph import known_stage
from croco.pipeline.node import Node, new_record, settings_values
from croco.pipeline.stage import Work
from croco.report.scores import scorer_of
from croco.report.sentences import left_out
from croco.stages.evaluate.evaluate import evaluate, evaluation_seed, plan_batches
from croco.stages.results import results
from croco.storage import shards
from croco.storage.schemas import PROMPTS, TABLES
from croco.storage.seeds import sample_seed
from served import Served, serve
from tiny import make_policy, make_reward, make_tokenizer, save


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    """A tiny policy, an adapter of it, and eight lab prompts in three languages."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = make_tokenizer()
    policy = make_policy("llama")
    save(folder / "policy", policy, tokenizer)
    adapted = apply_lora(policy, Lora(rank=2, dropout=0.0), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2)
    (folder / "train" / "arm").mkdir(parents=True)
    adapted.save_pretrained(folder / "train" / "arm" / "adapter")
    table = world.prompts("dev", ["da", "en", "sv"], 8)
    counts = {"prompt": table.num_rows}
    shards.write_shard(
        folder / "eval-prompts", 0, table, PROMPTS.schema, read=counts, written=counts, dropped=None
    )
    recipe = from_dict({
        "run": {"name": "test", "languages": ["da", "en"], "held_out_languages": ["sv"], "seed": 3},
        "policy": {"model": str(folder / "policy"), "instruction": {"da": "Svar på dansk."}},
        "prompts": {"source": "lab"},
        "evaluation": {"source": "lab", "base_temperatures": [0.7], "samples": 2,
                       "max_new_tokens": 6, "bootstrap": 50, "split": "dev"},
        "arms": {"arm": {}},
        "runtime": {"device": "cpu", "shard_prompts": 5},
    })  # fmt: skip
    return folder, recipe


def work_of(
    run: tuple[Path, Recipe], stage: str, arm: str | None, inputs: dict[str, Path], table: str
) -> Work:
    folder, recipe = run
    out = folder / stage / (arm or "")
    out.mkdir(parents=True, exist_ok=True)
    settings = (results_settings if stage == "results" else evaluate_settings)(recipe, arm)
    record = dict(new_record(Node(known_stage(stage), arm, out, settings, {})))
    return Work(arm=arm, folder=out, settings=settings_values(settings), runtime=recipe.runtime,
                inputs=inputs, table=TABLES[table], title=stage, record_file=record)  # fmt: skip


def evaluated(run: tuple[Path, Recipe], arm: str) -> pl.DataFrame:
    inputs = {"eval-prompts": run[0] / "eval-prompts"}
    if arm != "base":
        inputs["train"] = run[0] / "train" / arm
    work = work_of(run, "evaluate", arm, inputs, "verdicts")
    evaluate(work)
    return shards.read_table(work.folder)


def test_every_prompt_is_answered_at_every_temperature(run):
    verdicts = evaluated(run, "base")
    counts = dict(verdicts.group_by("temperature").len().rows())
    assert counts == {0.0: 8 * 3, 0.7: 8 * 3 * 2, 1.0: 8 * 3 * 2}
    assert verdicts.select(TABLES["verdicts"].key).is_duplicated().sum() == 0
    assert set(verdicts["mode"]) <= set(world.MODES)
    assert ((verdicts["value"] == 1.0) == (verdicts["mode"] == "good")).all()
    tasks = {row["prompt_id"]: row["domain"] for row in world.prompts("dev", ["da"], 8).to_pylist()}
    held_out = verdicts["prompt_id"].replace_strict(tasks).is_in(list(world.HELD_OUT_TASKS))
    assert ((verdicts["benchmark"] == "lab-held-out-task") == held_out).all()


def test_arms_share_seeds_and_differ_by_weights(run):
    base, tuned = evaluated(run, "base"), evaluated(run, "arm")
    seeds = [
        pl.read_parquet(path)["seed"]
        for path in sorted((run[0] / "evaluate").glob("*/scratch/drawn-00000.parquet"))
    ]
    assert len(seeds) == 2
    assert seeds[0].equals(seeds[1])
    greedy = [table.filter(pl.col("temperature") == 0.0)["completion"] for table in (base, tuned)]
    assert not greedy[0].equals(greedy[1])
    assert seeds[0][0] != sample_seed(3, *base.select("prompt_id", "language").row(0), 0)
    assert evaluation_seed(3) != 3


def test_kl_is_the_mean_log_ratio_of_an_arms_own_samples(run):
    """Against one plain forward pass per completion, with the arm's weights and with the base's."""
    folder, recipe = run
    evaluated(run, "arm")
    asked = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"kl": True})})
    inputs = {"eval-prompts": folder / "eval-prompts", "train": folder / "train" / "arm"}
    work = work_of((folder, asked), "evaluate", "arm", inputs, "verdicts")
    evaluate(work)
    prompts = {tuple(row[:2]): row[2] for row in
               shards.read_table(folder / "eval-prompts", ["prompt_id", "language", "messages"]).rows()}  # fmt: skip
    drafts = [work.folder / "scratch" / f"drawn-{index:05d}.parquet" for index in (2, 3)]  # at temperature 1
    models = [load_policy(recipe.policy.model, device="cpu", adapter=adapter)
              for adapter in (folder / "train" / "arm" / "adapter", None)]  # fmt: skip
    ratios: dict[str, list[float]] = {}
    for row in pl.concat(pl.read_parquet(path) for path in drafts).iter_rows(named=True):
        messages = with_instruction(
            prompts[row["prompt_id"], row["language"]], recipe.policy.instruction.get(row["language"])
        )
        logps = []
        for model, tokenizer in models:
            prompt = prompt_ids(tokenizer, messages)
            ids = [*row["completion_ids"], *([tokenizer.eos_token_id] * (row["finish_reason"] == "stop"))]
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
            logps.append(float(logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].sum()))
        ratios.setdefault(row["language"], []).append(logps[0] - logps[1])
    assert work.record_file["facts"]["kl"] == {
        language: pytest.approx(sum(of) / len(of), abs=1e-3) for language, of in ratios.items()
    }
    assert all(value > 0.01 for value in work.record_file["facts"]["kl"].values())


def test_a_lost_shard_comes_back_the_same(run):
    before = evaluated(run, "arm")
    folder = run[0] / "evaluate" / "arm"
    for path in [*folder.glob("part-00002*"), folder / "scratch" / "drawn-00002.parquet"]:
        path.unlink()
    assert shards.read_table(folder).height < before.height
    assert evaluated(run, "arm").equals(before)


def test_results_compare_the_arm_with_the_base(run):
    for arm in ("base", "arm"):
        evaluated(run, arm)
    inputs = {f"evaluate/{arm}": run[0] / "evaluate" / arm for arm in ("base", "arm")}
    inputs["eval-prompts"] = run[0] / "eval-prompts"
    results(work := work_of(run, "results", None, inputs, "results"))
    table = shards.read_table(work.folder)
    assert {"good", "difference", "difference-to-best-base", "best-temperature"} <= set(table["metric"])
    assert set(table["language"]) == {"da", "en", "sv", "tuned", "held-out", "all"}
    assert table.filter(pl.col("metric").str.starts_with("mode:")).group_by(
        "arm", "language", "benchmark", "temperature"
    ).agg(pl.col("value").sum())["value"].to_list() == pytest.approx([1.0] * table.select(
        "arm", "language", "benchmark", "temperature").unique().height)  # fmt: skip


def test_what_has_no_verdict_is_said_and_counted(run, tmp_path):
    """The base's answers at T = 0.7, and all to two of eight prompts, got none."""
    inputs = {"eval-prompts": run[0] / "eval-prompts"}
    for arm in ("base", "arm"):
        rows = evaluated(run, arm).filter(~((pl.col("arm") == "base") & (pl.col("temperature") == 0.7)))
        gone = rows["prompt_id"].unique().sort()[:2]
        kept = rows.filter(~pl.col("prompt_id").is_in(gone.implode())).to_arrow()
        inputs[f"evaluate/{arm}"] = shutil.copytree(run[0] / "evaluate" / arm, tmp_path / arm)
        for path in (tmp_path / arm).glob("part-*"):
            path.unlink()
        counts = {"completion": kept.num_rows}
        schema = TABLES["verdicts"].schema
        shards.write_shard(tmp_path / arm, 0, kept, schema, read=counts, written=counts, dropped=None)
    results(work := work_of((tmp_path, run[1]), "results", None, inputs, "results"))
    assert left_out(work.record_file["facts"]) == (
        "No completion of base at T = 0.7 has a verdict, so it is in no table. "
        "6 prompts that some arm has no verdict on are left out of all."
    )


def test_who_scores_the_answers_is_said(run):
    values = run[1].model_dump(mode="json")
    assert scorer_of(from_dict(values)) == ""  # the lab's program
    values["evaluation"] |= {"source": "prompts.jsonl", "split": "test"}
    same = from_dict(values)
    assert evaluate_settings(same, "arm")["reward"].value == same.reward
    assert scorer_of(same) == "lab:reward, which picked the pairs too"
    values["evaluation"] |= {"reward": {"model": "lab:reward"}}
    assert scorer_of(from_dict(values)) == scorer_of(same)
    values["reward"] |= {"model": "lab:other-reward"}
    assert scorer_of(from_dict(values)) == "lab:reward"


def test_real_prompts_are_scored_by_the_reward_model(run, tmp_path):
    folder, recipe = run
    save(tmp_path / "reward", make_reward("qwen3"), make_tokenizer())
    values = recipe.model_dump(mode="json")
    # another one than [reward], which picks the pairs
    independent = {"model": str(tmp_path / "reward"), "max_tokens": 70}
    values["evaluation"] |= {"source": "prompts.jsonl", "split": "test", "reward": independent}
    other = from_dict(values)
    assert scorer_of(other) == "reward"
    inputs = {"eval-prompts": folder / "eval-prompts"}
    work = work_of((tmp_path, other), "evaluate", "base", inputs, "verdicts")
    evaluate(work)
    verdicts = shards.read_table(work.folder)
    shards.merge_ledgers(work.folder)
    dropped = shards.read_dropped(work.folder)
    assert 0 < dropped.height == 8 * 3 * 5 - verdicts.height
    assert dropped["reason"].str.contains("conversation").all()
    model, tokenizer = load_reward(str(tmp_path / "reward"), device="cpu")
    prompts = {
        row[:2]: row[2]
        for row in shards.read_table(folder / "eval-prompts")
        .select("prompt_id", "language", "messages")
        .iter_rows()
    }
    for row in verdicts.sample(5, seed=1).to_dicts():
        ids = conversation_ids(tokenizer, prompts[row["prompt_id"], row["language"]], row["completion"])
        with torch.no_grad():
            assert row["value"] == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-5)
    assert set(verdicts["mode"]) <= {"right-language", "wrong-language", "unknown"}
    assert set(verdicts["benchmark"]) == {"reward"}


def test_a_score_that_is_no_number_stops_and_names_the_prompt(run, tmp_path):
    folder, recipe = run
    model = make_reward("qwen3")
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    save(tmp_path / "reward", model, make_tokenizer())
    values = recipe.model_dump(mode="json")
    values["reward"] = {"model": str(tmp_path / "reward")}
    values["evaluation"] |= {"source": "prompts.jsonl", "split": "test"}
    inputs = {"eval-prompts": folder / "eval-prompts"}
    work = work_of((tmp_path, from_dict(values)), "evaluate", "base", inputs, "verdicts")
    with pytest.raises(UserError, match=r"completion 0 of prompt '.*' in da: .*reward gave the score nan"):
        evaluate(work)
    assert not shards.shards(work.folder)


def test_a_server_that_ends_one_of_two_completions_leaves_the_other(run, tmp_path):
    folder, recipe = run
    with serve(Served(folder / "policy", end_every=3)) as server:
        values = recipe.model_dump(mode="json")
        values["runtime"] |= {
            "engines": {"evaluate": "server"},
            "servers": {"evaluate": {"url": server.url, "api": "chat", "completions_per_request": 1}},
        }
        inputs = {"eval-prompts": folder / "eval-prompts"}
        work = work_of((tmp_path, from_dict(values)), "evaluate", "base", inputs, "verdicts")
        evaluate(work)
    verdicts = shards.read_table(work.folder)
    shards.merge_ledgers(work.folder)
    dropped = shards.read_dropped(work.folder)
    assert dropped["reason"].unique().to_list() == ["the server ended the completion with 'content_filter'"]
    assert verdicts.height + dropped.height == 8 * 3 * 5
    by_prompt = dropped.group_by("prompt_id", "language", "sample_id").len()
    assert by_prompt.height > 20  # of many prompts one sample, the others stay
    assert verdicts.select("prompt_id", "language").n_unique() == 8 * 3


@pytest.mark.slow
def test_two_workers_draw_and_judge_as_one_does(run, tmp_path):
    folder, recipe = run
    save(tmp_path / "reward", make_reward("qwen3"), make_tokenizer())
    values = recipe.model_dump(mode="json")
    values["reward"] = {"model": str(tmp_path / "reward")}
    values["evaluation"] |= {"source": "prompts.jsonl", "split": "test"}
    verdicts = []
    for replicas in (1, 2):
        values["runtime"]["replicas"] = replicas
        inputs = {"eval-prompts": folder / "eval-prompts", "train": folder / "train" / "arm"}
        work = work_of((tmp_path / str(replicas), from_dict(values)), "evaluate", "arm", inputs, "verdicts")
        evaluate(work)
        verdicts.append(shards.read_table(work.folder))
        facts = work.record_file["facts"]
        assert (facts["workers"], facts["judge"]["workers"]) == (replicas, replicas)
    assert verdicts[0].equals(verdicts[1])


def test_batches_hold_parallel_prompts_together():
    prompts = pl.DataFrame(
        {"prompt_id": ["a", "b", "a", "b", "c"], "language": ["da", "da", "nl", "nl", "da"]}
    )
    batches = plan_batches(prompts, [0.0, 1.0], samples=3, shard_prompts=2)
    assert [(b.index, b.temperature, b.samples, b.prompts.height) for b in batches] == [
        (0, 0.0, 1, 4), (1, 0.0, 1, 1), (2, 1.0, 3, 4), (3, 1.0, 3, 1),
    ]  # fmt: skip
