"""The stages `sample` and `score` on tiny models: what is in the tables, what is in the ledger, and what stops them."""

from pathlib import Path

import polars as pl
import pytest
import torch

from conftest import TinyModels, write_recipe
from croco.config.load import load
from croco.errors import UserError
from croco.models.chat_template import conversation_ids, prompt_ids
from croco.models.loading import load_policy, load_reward
from croco.models.transformers import HFScorer
from croco.pipeline import run as pipeline
from croco.stages.score.score import random_score, tabulate
from croco.storage import shards
from croco.storage.seeds import sample_seed
from tiny import make_reward, make_tokenizer, save

KEY = ["prompt_id", "language", "sample_id"]


def run(folder: Path, models: TinyModels, *overrides: str, until: str = "score") -> Path:
    recipe = load(write_recipe(folder, models), overrides)
    pipeline.run(recipe, until=until)
    return recipe.folder


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, tiny_models: TinyModels) -> Path:
    random_arm = "arms.chance.scorer=random"
    instruction = "policy.instruction.da=Svar på dansk."
    return run(tmp_path_factory.mktemp("scored"), tiny_models, random_arm, instruction)


def test_every_prompt_has_its_completions_with_their_seeds(scored: Path, tiny_models: TinyModels):
    completions = shards.read_table(scored / "sample")
    limit = load(scored / "recipe.json").sampling.max_new_tokens
    assert completions.height == 10 * 2 * 12
    assert not completions.select(KEY).is_duplicated().any()
    for row in completions.iter_rows(named=True):
        assert row["seed"] == sample_seed(7, row["prompt_id"], row["language"], row["sample_id"])
        assert row["completion_tokens"] == len(row["completion_ids"]) + (row["finish_reason"] == "stop")
        assert row["finish_reason"] == "stop" or row["completion_tokens"] == limit
    tokenizer = load_policy(str(tiny_models.policy))[1]
    first = completions.row(0, named=True)
    assert first["completion"] == tokenizer.decode(first["completion_ids"], skip_special_tokens=True)
    assert completions["completion"].n_unique() > 0.9 * completions.height


@pytest.mark.slow
def test_shards_do_not_change_the_rows(scored: Path, tmp_path: Path, tiny_models: TinyModels):
    instruction = "policy.instruction.da=Svar på dansk."
    other = run(
        tmp_path,
        tiny_models,
        instruction,
        "runtime.shard_prompts=7",
        "runtime.token_budget=90",
        until="sample",
    )
    assert len(shards.shards(other / "sample")) == 3
    assert shards.read_table(other / "sample").equals(shards.read_table(scored / "sample"))


def test_reward_scores_are_the_raw_logits_of_the_conversation_without_the_instruction(
    scored: Path, tiny_models: TinyModels
):
    model, tokenizer = load_reward(str(tiny_models.reward))
    messages = {
        (r["prompt_id"], r["language"]): r["messages"]
        for r in shards.read_table(scored / "prompts").to_dicts()
    }
    joined = shards.read_table(scored / "score").join(
        shards.read_table(scored / "sample"), on=KEY, validate="1:1"
    )
    assert joined.height == 240
    for row in joined.sample(30, seed=0).iter_rows(named=True):
        ids = conversation_ids(tokenizer, messages[row["prompt_id"], row["language"]], row["completion"])
        with torch.inference_mode():
            assert row["score"] == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-5)


def test_likelihood_is_of_the_prompt_that_was_sampled_from(scored: Path, tiny_models: TinyModels):
    model, tokenizer = load_policy(str(tiny_models.policy))
    messages = {
        (r["prompt_id"], r["language"]): r["messages"]
        for r in shards.read_table(scored / "prompts").to_dicts()
    }
    scores = shards.read_table(scored / "score" / "likelihood")
    for row in (
        scores.join(shards.read_table(scored / "sample"), on=KEY).sample(30, seed=0).iter_rows(named=True)
    ):
        instruction = "Svar på dansk." if row["language"] == "da" else None
        prompt = prompt_ids(tokenizer, messages[row["prompt_id"], row["language"]], instruction)
        ids = row["completion_ids"] + [2] * (row["finish_reason"] == "stop")
        with torch.inference_mode():
            logps = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        mean = logps.gather(-1, torch.tensor(ids)[:, None]).mean().item()
        assert row["score"] == pytest.approx(mean, abs=1e-5)


def test_random_scores_are_normal_and_follow_from_the_key(scored: Path):
    scores = shards.read_table(scored / "score" / "chance")
    again = [random_score(7, row) for row in scores.to_dicts()]
    assert scores["score"].to_list() == pytest.approx(again)
    assert abs(scores["score"].mean()) < 0.2
    assert scores["score"].std() == pytest.approx(1.0, abs=0.15)


def test_a_conversation_that_is_too_long_goes_to_the_ledger(tmp_path: Path, tiny_models: TinyModels):
    folder = run(tmp_path, tiny_models, "reward.max_tokens=38")
    scores, dropped = shards.read_table(folder / "score"), shards.read_dropped(folder / "score")
    assert scores.height + dropped.height == 240
    assert 0 < dropped.height < 240
    assert dropped["reason"].str.contains(r"^the conversation is longer than 38 tokens: it has \d+$").all()
    assert scores.join(dropped, on=KEY).is_empty()


def test_a_prompt_longer_than_the_context_goes_to_the_ledger(tmp_path: Path, tiny_models: TinyModels):
    prompts = tmp_path / "prompts.jsonl"
    long = '{"prompt_id": "long", "language": "en", "messages": [{"role": "user", "content": "%s"}]}' % (
        "Hej " * 600
    )
    short = '{"prompt_id": "s", "language": "da", "messages": [{"role": "user", "content": "Hej"}]}'
    other = '{"prompt_id": "s", "language": "en", "messages": [{"role": "user", "content": "Hi"}]}'
    prompts.write_text("\n".join([long, short, other]), encoding="utf-8")
    overrides = [f"prompts.source={prompts}", "runtime.shard_prompts=1"]
    folder = run(tmp_path, tiny_models, *overrides)
    dropped = shards.read_dropped(folder / "sample")
    assert dropped.select("unit", "prompt_id", "language").unique().rows() == [("completion", "long", "en")]
    assert dropped["sample_id"].sort().to_list() == list(range(12))
    assert "the context of" in dropped["reason"][0]
    assert shards.read_table(folder / "score").height == 24


def test_a_score_that_is_no_number_stops_with_its_row():
    row = {"prompt_id": "p1", "language": "da", "sample_id": 3}
    with pytest.raises(UserError, match=r"completion 3 of prompt 'p1' in da: judge gave the score nan"):
        tabulate([[row]], [[float("nan")]], "judge")
    table, dropped = tabulate([[row], [row | {"sample_id": 4}]], [[1.5], ["too long"]], "judge")
    assert pl.from_arrow(table).rows() == [("p1", "da", 3, 1.5, "judge", None)]
    assert pl.from_arrow(dropped).rows() == [("completion", "p1", "da", 4, "too long")]


def test_a_reward_model_whose_weights_are_spoilt_stops(tmp_path: Path, tiny_models: TinyModels):
    model = make_reward("qwen3")
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    folder = save(tmp_path / "spoilt", model, make_tokenizer())
    with pytest.raises(UserError, match=r"completion 0 of prompt 'p0' in da: .* gave the score nan"):
        run(tmp_path, tiny_models, f"reward.model={folder}")


def test_what_a_reward_template_refuses_is_in_the_ledger_and_the_others_are_scored(
    tmp_path: Path, tiny_models: TinyModels
):
    own = make_tokenizer().chat_template
    refusing = "{% if ' 1?' in messages[0]['content'] %}{{ raise_exception('not this') }}{% endif %}" + own
    folder = save(tmp_path / "refusing", make_reward("qwen3"), make_tokenizer(chat_template=refusing))
    run_folder = run(tmp_path, tiny_models, f"reward.model={folder}")
    dropped = shards.read_dropped(run_folder / "score")
    assert dropped["reason"].unique().to_list() == [
        "refused by the chat template: not this (roles user, assistant)"
    ]
    assert dropped["prompt_id"].unique().to_list() == ["p1"]
    scores = shards.read_table(run_folder / "score")
    assert scores.height + dropped.height == shards.read_table(run_folder / "sample").height
    assert scores["prompt_id"].n_unique() == 9


def test_a_prompt_that_the_policys_template_refuses_is_in_the_ledger(tmp_path: Path, tiny_models: TinyModels):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% if 'number 9?' in messages[0]['content'] %}{{ raise_exception('not this') }}{% endif %}"
        + make_tokenizer().chat_template
    )
    # the last shard holds that prompt alone: not every prompt of the stage is refused
    found = run(
        tmp_path, tiny_models, f"policy.chat_template={template}", "runtime.shard_prompts=1", until="sample"
    )
    dropped = shards.read_dropped(found / "sample")
    assert dropped.select("prompt_id", "language").unique().rows() == [("p9", "en")]
    assert dropped["reason"][0] == "refused by the chat template: not this (roles user)"
    assert shards.read_table(found / "sample").height == 19 * 12


def test_a_faulty_reward_template_names_the_prompt(tmp_path: Path, tiny_models: TinyModels):
    faulty = make_tokenizer(chat_template="{{ messages[0]['content'] + 1 }}")
    folder = save(tmp_path / "faulty", make_reward("qwen3"), faulty)
    with pytest.raises(UserError, match=r"prompt 'p0' in da: .*refuses the conversation"):
        run(tmp_path, tiny_models, f"reward.model={folder}")


def test_hfscorer_is_named_after_its_model(tiny_models: TinyModels):
    model, tokenizer = load_reward(str(tiny_models.reward))
    assert HFScorer(model, tokenizer).name == str(tiny_models.reward)
