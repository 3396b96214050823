"""The engine "server" against a real server over our own sampler, through a proxy that breaks what can break."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from conftest import TinyModels, write_prompts, write_recipe
from croco.cli import preflight
from croco.config.load import load
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.models.open import open_judge, open_sampler, open_scorer
from croco.models.protocols import JudgeRequest, ScoreRequest
from croco.pipeline import run
from croco.storage import files, shards
from faulty import FAULTS, in_front_of
from served import Served, serve

KEY = "sk-croco-test-4711"
SHORT = "sampling.max_new_tokens=16"
Setting = str | int | float | bool


@pytest.fixture(scope="module")
def patience() -> float:
    """Seconds that a client waits: more than a good answer takes here."""
    return 3.0


@pytest.fixture(scope="module")
def scoring(served: Served) -> str:
    """The address of the server with the reward model, which is the same here."""
    return served.url


@pytest.fixture(scope="module")
def served(tiny_models: TinyModels) -> Iterator[Served]:
    with serve(Served(tiny_models.policy, tiny_models.reward)) as found:
        yield found


def server_recipe(folder: Path, models: TinyModels, url: str, *more: str, **settings: Setting) -> Recipe:
    """The tiny recipe with every role on a server; `settings` are those of `[runtime.servers.sample]` and the rest."""
    settings = {"url": url, "retry_seconds": 0.05, "timeout_seconds": 60} | settings
    overrides = []
    for role in ("sample", "score", "evaluate", "judge"):
        overrides.append(f"runtime.engines.{role}=server")
        overrides += [f"runtime.servers.{role}.{key}={json.dumps(value)}" for key, value in settings.items()]
    return load(write_recipe(folder, models), [SHORT, *overrides, *more])


def sampled(recipe: Recipe) -> pl.DataFrame:
    run.run(recipe, until="sample")
    return shards.read_table(recipe.folder / "sample").sort("prompt_id", "language", "sample_id")


def facts(recipe: Recipe, stage: str = "sample") -> dict:
    return files.read_json(recipe.folder / stage / "stage.json")["facts"]


@pytest.fixture(scope="module")
def calm(served: Served, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """What a server gives that nothing disturbs, twelve completions a request."""
    return sampled(server_recipe(tmp_path_factory.mktemp("calm"), tiny_models, served.url))


def test_one_completion_per_request_gives_the_table_of_the_engine_in_process(
    served: Served, tiny_models: TinyModels, tmp_path: Path
) -> None:
    instruction = "policy.instruction.da=Svar på dansk."
    few = "prompts.limit=2"
    ours = sampled(load(write_recipe(tmp_path / "here", tiny_models), [instruction, few, SHORT]))
    recipe = server_recipe(
        tmp_path / "there", tiny_models, served.url, instruction, few, completions_per_request=1
    )
    assert sampled(recipe).equals(ours)
    assert set(ours["finish_reason"]) == {"stop", "length"}
    found = facts(recipe)
    assert found["requests"] == ours.height + 1 == 48 + 1  # the list of models
    assert found["retries"] == 0
    assert found["completion_tokens"] == found["tokens"]
    assert (found["engine"], found["url"]) == ("server", served.url)


def test_no_fault_loses_or_doubles_a_row(
    served: Served, calm: pl.DataFrame, patience: float, tiny_models: TinyModels, tmp_path: Path
) -> None:
    with in_front_of(served.url, patience, seed=1) as proxy:
        recipe = server_recipe(tmp_path, tiny_models, proxy.url, timeout_seconds=patience, concurrency=5)
        found = sampled(recipe)
    assert found.equals(calm)
    assert set(proxy.met) == {"", *FAULTS}
    assert (
        proxy.most_at_once <= 5 + proxy.met["slow"] + proxy.met["trickle"]
    )  # those live on without the client
    counted = facts(recipe)
    assert counted["requests"] == proxy.met.total() + 1
    assert counted["retries"] == proxy.met.total() - proxy.met[""] > 0
    for tries in proxy.times.values():
        for (when, fault), (then, _) in pairwise(tries):
            least = {"429 later": 1.0, "429 date": 1.0, "slow": patience, "trickle": patience}.get(
                fault, 0.02
            )
            # the proxy may meet a request a little after the client began to wait
            assert then - when >= 0.9 * least, fault


@pytest.mark.slow
def test_killed_again_and_again_it_goes_on(
    served: Served, calm: pl.DataFrame, tiny_models: TinyModels, tmp_path: Path
) -> None:
    with in_front_of(served.url, delay=0.25) as proxy:
        recipe = server_recipe(tmp_path, tiny_models, proxy.url, "runtime.shard_prompts=2", concurrency=2)
        files.write_json(tmp_path / "given.json", recipe.model_dump(mode="json"))
        command = [sys.executable, "-m", "croco", "run", str(tmp_path / "given.json"), "--until", "sample"]
        folder = recipe.folder / "sample"
        for wanted in (2, 4, 6):  # killed three times
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            end = time.monotonic() + 120
            while len(shards.shards(folder)) < wanted and time.monotonic() < end:
                time.sleep(0.01)
            process.kill()
            assert process.wait() == -9
        finished = {shard.index: shard_state(folder, shard.index) for shard in shards.shards(folder)}
        assert 6 <= len(finished) < 10
        asked = proxy.met.total()
        proxy.delay = 0.0
        subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
        again = proxy.met.total() - asked
    found = shards.read_table(folder).sort("prompt_id", "language", "sample_id")
    assert found.equals(calm)
    assert {index: shard_state(folder, index) for index in finished} == finished
    assert again == 20 - 2 * len(finished)  # nothing that was paid for is asked for again


@pytest.mark.slow
def test_two_processes_share_a_server(
    served: Served, calm: pl.DataFrame, tiny_models: TinyModels, tmp_path: Path
) -> None:
    recipe = server_recipe(tmp_path, tiny_models, served.url, "runtime.replicas=2", "runtime.shard_prompts=2")
    assert sampled(recipe).equals(calm)
    found = facts(recipe)
    assert found["workers"] == 2
    asked = found["requests"] if isinstance(found["requests"], list) else [found["requests"]] * 2
    assert sum(asked) == 20 + 2  # each asks for the models first


def shard_state(folder: Path, index: int) -> tuple[int, int, bytes]:
    path = shards.shard_path(folder, index)
    return path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()


def test_a_server_that_keeps_failing_stops_the_stage_which_goes_on_later(
    served: Served, calm: pl.DataFrame, tiny_models: TinyModels, tmp_path: Path
) -> None:
    with in_front_of(served.url, good=9, always="500") as proxy:
        recipe = server_recipe(tmp_path, tiny_models, proxy.url, concurrency=1, retries=2)
        with pytest.raises(UserError) as error:
            sampled(recipe)
        for part in (proxy.url, "prompt 'p4' in en", "in 3 attempts", "status 500 'worker died'"):
            assert part in str(error.value)
        assert proxy.met == {"": 9, "500": 3}
        assert len(shards.shards(recipe.folder / "sample")) == 2
        assert facts(recipe)["requests"] == 9 + 3 + 1
        proxy.always = ""
        assert sampled(recipe).equals(calm)
        assert proxy.met[""] == 9 + 20 - 8
        proxy.always = "429 hour"
        with pytest.raises(UserError, match="asks to wait 3600 s"):
            sampled(server_recipe(tmp_path / "hour", tiny_models, proxy.url))


def test_the_chat_api_needs_no_tokenizer_and_draws_the_same(
    served: Served, calm: pl.DataFrame, tiny_models: TinyModels, tmp_path: Path
) -> None:
    name = "nobody/only-served"
    served.names = (*served.names, name)
    recipe = server_recipe(tmp_path, tiny_models, served.url, f"policy.model={name}", api="chat")
    found = sampled(recipe)
    assert found["completion_ids"].null_count() == found.height
    assert set(found["policy"]) == {name}
    same = ["prompt_id", "language", "sample_id", "completion", "completion_tokens", "finish_reason", "seed"]
    assert found.select(same).equals(calm.select(same))


def test_a_strict_server_is_asked_in_openais_own_words(tiny_models: TinyModels, tmp_path: Path) -> None:
    with serve(Served(tiny_models.policy, strict=True)) as strict:
        for more, reason in (
            ({}, "with status 400 .Unrecognized request argument supplied: min_p."),
            (
                {"dialect": "openai"},
                "does not count the tokens of each of 12 completions; expected runtime.servers",
            ),
        ):
            before = len(strict.seen)
            with pytest.raises(UserError, match=reason):
                sampled(server_recipe(tmp_path, tiny_models, strict.url, concurrency=1, **more))
            assert len(strict.seen) == before + 1  # never asked again
        words = {"dialect": "openai", "completions_per_request": 1}
        with pytest.raises(UserError, match=r"top_k = 5, which .* cannot ask for"):
            sampled(server_recipe(tmp_path / "k", tiny_models, strict.url, "sampling.top_k=5", **words))
        few = "prompts.limit=2"
        found = sampled(server_recipe(tmp_path / "few", tiny_models, strict.url, few, **words))
        assert found.height == 48
        assert found["completion"].n_unique() > 40
        assert found["completion_ids"].null_count() == 48  # it gave text
        stopped = found.filter(finish_reason="stop")["completion_tokens"]
        assert (
            stopped.max() <= 16 == found.filter(finish_reason="length")["completion_tokens"].unique().item()
        )


def test_what_is_wrong_is_said_before_anything_is_asked(
    served: Served, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CROCO_KEY", raising=False)
    asked = len(served.seen)
    for name, reason, settings in (
        (
            "model",
            r"serves .*, not 'gpt-17'; expected .* runtime\.servers\.sample\.model",
            {"model": "gpt-17"},
        ),
        (
            "variable",
            r"key_variable = 'CROCO_KEY', but \$CROCO_KEY is not set",
            {"key_variable": "CROCO_KEY"},
        ),
        ("url", r"status 404 .*mostly ends in /v1", {"url": served.url.removesuffix("/v1")}),
        ("nobody", "no proper answer to the list of its models", {"url": "http://127.0.0.1:9/v1"}),
    ):
        with pytest.raises(UserError, match=reason):
            sampled(server_recipe(tmp_path / name, tiny_models, **{"url": served.url} | settings))
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    recipe = server_recipe(tmp_path, tiny_models, served.url, f"policy.chat_template={template}", api="chat")
    with pytest.raises(UserError, match=r"which runtime\.servers\.sample\.api = 'chat' leaves to the server"):
        sampled(recipe)
    adapter = tmp_path / "train" / "monolingual" / "adapter"
    recipe = server_recipe(tmp_path, tiny_models, served.url)
    with pytest.raises(UserError, match=r"runtime\.servers\.evaluate\.adapters\.monolingual is missing"):
        open_sampler("evaluate", recipe.policy, recipe.runtime, 0, adapter=adapter)
    named = "runtime.servers.evaluate.adapters.monolingual=tuned"
    recipe = server_recipe(tmp_path, tiny_models, served.url, named)
    with pytest.raises(UserError, match=r"not 'tuned'; expected .*evaluate\.adapters\.monolingual"):
        open_sampler("evaluate", recipe.policy, recipe.runtime, 0, adapter=adapter)
    assert len(served.seen) == asked


def test_the_key_is_sent_and_is_in_no_file_and_no_error(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(Served(tiny_models.policy, key=KEY)) as closed:
        recipe = server_recipe(tmp_path / "run", tiny_models, closed.url, key_variable="CROCO_KEY")
        monkeypatch.setenv("CROCO_KEY", KEY[::-1])
        with pytest.raises(UserError, match=r"status 401 .*Bearer \[the key\].*in \$CROCO_KEY") as error:
            sampled(recipe)  # this server, like some, repeats the key it was given
        assert KEY[::-1] not in str(error.value)
        with pytest.raises(UserError, match="key_variable is not set"):
            sampled(server_recipe(tmp_path / "none", tiny_models, closed.url))
        monkeypatch.setenv("CROCO_KEY", KEY + "\n")
        assert sampled(recipe).height == 240
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_a_prompt_longer_than_the_context_goes_to_the_ledger(
    served: Served, tiny_models: TinyModels, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    row = {"prompt_id": "long", "language": "en", "messages": [{"role": "user", "content": "Hej " * 600}]}
    prompts.write_text(prompts.read_text() + json.dumps(row) + "\n", encoding="utf-8")
    for api, reason in (
        ("chat", "the server refuses the prompt: .*maximum"),
        ("completions", "the context of"),
    ):
        recipe = server_recipe(tmp_path / api, tiny_models, served.url, f"prompts.source={prompts}", api=api)
        assert sampled(recipe).height == 6 * 12
        dropped = shards.read_dropped(recipe.folder / "sample")
        assert dropped.select("prompt_id", "language").unique().rows() == [("long", "en")]
        assert dropped["sample_id"].sort().to_list() == list(range(12))
        assert dropped["reason"].str.contains(reason).all()


def scorer_of(recipe: Recipe) -> tuple[Any, Any]:
    return open_scorer(recipe.reward, recipe.runtime)


def test_scores_are_the_raw_logits_whatever_the_network_does(
    scoring: str, patience: float, tiny_models: TinyModels, tmp_path: Path
) -> None:
    ours, _ = scorer_of(load(write_recipe(tmp_path / "here", tiny_models)))
    # token 0 is padding, also where it is the last
    requests = [ScoreRequest(k, [1, 5, k], [[7, i, k] for i in range(9)]) for k in range(12)]
    with in_front_of(scoring, patience, seed=2) as proxy:
        settings = {"timeout_seconds": patience, "completions_per_request": 4}
        scorer, _ = scorer_of(server_recipe(tmp_path, tiny_models, proxy.url, **settings))
        found = scorer.score(requests)
    assert sum(proxy.met[fault] for fault in FAULTS) > 10
    for theirs, mine in zip(found, ours.score(requests), strict=True):
        assert theirs == pytest.approx(mine, abs=1e-5)


def test_activated_scores_are_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    with serve(Served(tiny_models.policy, tiny_models.reward, switch=False)) as activated:
        with pytest.raises(UserError, match=r"gives 0\.\d+ with and without activation, expected raw logits"):
            scorer_of(server_recipe(tmp_path, tiny_models, activated.url))
        scorer, _ = scorer_of(server_recipe(tmp_path, tiny_models, activated.url, trust_scores=True))
        assert 0 < scorer.score([ScoreRequest(0, [], [[5, 6, 7]])])[0][0] < 1


def test_a_judge_says_the_same_here_and_there(
    served: Served, tiny_models: TinyModels, tmp_path: Path
) -> None:
    judge = f"judge.model={tiny_models.policy}"
    asked = [
        JudgeRequest(key, ({"role": "user", "content": f"Which is better, {key} or {text}?"},))
        for key, text in enumerate(("A", "B", "word " * 600))
    ]
    recipe = load(write_recipe(tmp_path, tiny_models), [judge])
    here = dict(open_judge(recipe.judge, recipe.runtime).judge(asked, 9))
    assert here[0].text != here[1].text
    assert "the context of" in here[2]
    for api in ("completions", "chat"):
        recipe = server_recipe(tmp_path, tiny_models, served.url, judge, api=api)
        there = dict(open_judge(recipe.judge, recipe.runtime).judge(asked, 9))
        assert [there[key] for key in (0, 1)] == [here[key] for key in (0, 1)]
        assert isinstance(there[2], str)


def test_the_doctor_asks_the_servers(served: Served, tiny_models: TinyModels, tmp_path: Path) -> None:
    recipe = server_recipe(tmp_path, tiny_models, served.url)
    assert list(preflight.servers(recipe)) == [
        f"server        {role}: {served.url} serves {model}, context 512 tokens"
        for role, model in (
            ("sample", tiny_models.policy),
            ("evaluate", tiny_models.policy),
            ("score", tiny_models.reward),
        )
    ]
    with pytest.raises(UserError, match="not 'gpt-17'"):
        list(preflight.servers(server_recipe(tmp_path, tiny_models, served.url, model="gpt-17")))
