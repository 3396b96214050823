"""Recipes are strict: every mistake is one sentence that names the file and the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from croco.config.load import from_dict, load, merged
from croco.errors import UserError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
LEAST: dict[str, Any] = {"run": {"name": "x", "languages": ["en", "da"]}, "arms": {"mono": {}}}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    recipe = load(path)
    assert recipe.run.name == path.stem
    assert from_dict(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"sampling": {"completion": 3}},
            "unknown key 'sampling.completion'; did you mean 'sampling.completions'?",
        ),
        ({"run": {"temperature": 1}}, "unknown key 'run.temperature'; did you mean 'sampling.temperature'?"),
        ({"samplng": {}}, "unknown key 'samplng'; did you mean 'sampling'?"),
        ({"arms": {"mono": {"pol": "all"}}}, "unknown key 'arms.mono.pol'; did you mean 'arms.mono.pool'?"),
        ({"arms": {"a": {"pool": {"en": ["da"]}}}}, "arms.a.pool: the group en has the name of a language"),
        ({"arms": {"a": {"pool": {}}}}, "arms.a.pool: the pool has no groups"),
        (
            {"training": {"lora": {"rnk": 3}}},
            "unknown key 'training.lora.rnk'; did you mean 'training.lora.rank'?",
        ),
        ({"sampling": {"completions": "many"}}, "sampling.completions = 'many', expected a whole number"),
        ({"sampling": {"completions": 2.5}}, "sampling.completions = 2.5, expected a whole number"),
        ({"sampling": {"completions": 1}}, "sampling.completions = 1, expected at least 2"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature = 0, expected more than 0"),
        ({"training": {"beta": True}}, "training.beta = true, expected a number"),
        ({"training": {"loss": "kto"}}, "training.loss = 'kto', expected one of 'sigmoid', 'ipo', 'hinge'"),
        ({"training": {"label_smoothing": 0.5}}, "training.label_smoothing = 0.5, expected less than 0.5"),
        (
            {"training": {"over_length": "cut"}},
            "training.over_length = 'cut', expected one of 'drop' or 'truncate'",
        ),
        ({"sampling": 3}, "sampling = 3, expected a table"),
        ({"run": {"languages": "en"}}, "run.languages = 'en', expected a list"),
        ({"run": {"languages": []}}, "run.languages is empty"),
        ({"run": {"languages": ["english"]}}, "'english' is no BCP-47 language code"),
        ({"run": {"languages": ["en", "xx"]}}, "'xx' is no language that CLDR knows"),
        ({"run": {"languages": ["en", "en"]}}, "'en' appears twice"),
        ({"run": {"held_out_languages": ["da"]}}, "'da' appears twice"),
        ({"run": {"name": "../x"}}, "run.name = '../x', expected small letters, digits and hyphens"),
        ({"judge": {"modl": "x"}}, "unknown key 'judge.modl'; did you mean 'judge.model'?"),
        (
            {"runtime": {"engines": {"sample": "server"}}},
            "runtime: engines.sample = 'server', but servers.sample.url is missing",
        ),
        ({"runtime": {"servers": {"sample": {"url": "localhost:8000"}}}}, "'localhost:8000' is no address"),
        (
            {"runtime": {"servers": {"sample": {"url": "http://me:secret@host/v1"}}}},
            "runtime.servers.sample.url: expected an address without user",
        ),
        (
            {"runtime": {"servers": {"sample": {"key": "x"}}}},
            "unknown key 'runtime.servers.sample.key'; did you mean",
        ),
        ({"arms": {"base": {}}}, "'base' is the untuned policy"),
        ({"arms": {"a/b": {}}}, "expected small letters, digits and hyphens"),
        ({"prompts": {"source": "x.jsonl", "split": "dev"}}, "'x.jsonl' is a file"),
        ({"evaluation": {"split": "train"}}, "the prompts tuned on"),
        ({"run": {"seed": -1}}, "run.seed = -1, expected at least 0"),
        ({"run": {"seed": 2**63}}, "run.seed = 9223372036854775808, expected less than 9223372036854775808"),
        ({"study": {"seeds": [0, -1]}}, "study.seeds.1 = -1, expected at least 0"),
        (
            {"training": {"learning_rate": float("inf")}},
            "training.learning_rate = inf, expected a finite number",
        ),
        (
            {"training": {"sentinel": {"max_kl": float("nan")}}},
            "training.sentinel.max_kl = nan, expected a finite",
        ),
        (
            {"guards": {"max_length_ratio": float("inf")}},
            "guards.max_length_ratio = inf, expected a finite number",
        ),
        (
            {"runtime": {"checkpoint_minutes": float("inf")}},
            "runtime.checkpoint_minutes = inf, expected a finite",
        ),
        ({"training": {"epochs": 10**9}}, "training.epochs = 1000000000, expected at most 1000"),
        ({"training": {"updates": 10**11}}, "training.updates = 100000000000, expected at most 500000"),
        ({"sampling": {"completions": 10**6}}, "sampling.completions = 1000000, expected at most 100000"),
        ({"arms": {"mono": {"rounds": 10**6}}}, "arms.mono.rounds = 1000000, expected at most 100"),
        ({"runtime": {"replicas": 10**6}}, "expected a number of workers (at most 4096) or 'auto'"),
        (
            {"run": {"languages": ["en", "fi"]}},
            "prompts.source = 'lab' has no prompts in 'fi', expected of cy, da",
        ),
        ({"run": {"languages": ["nb", "no"]}}, "prompts.source = 'lab' has no prompts in 'no'"),
        ({"run": {"held_out_languages": ["en-GB"]}}, "evaluation.source = 'lab' has no prompts in 'en-GB'"),
        (
            {"runtime": {"device": "tpu"}},
            "runtime.device: 'tpu' is no device, expected 'auto', 'cpu', 'cuda'",
        ),
        (
            {"runtime": {"servers": {"judge": {"url": "http://h:99999/v1"}}}},
            "'http://h:99999/v1' is no address",
        ),
        (
            {"arms": {"mono": {"pool": {"x": ["en"], "y": ["en"]}}}},
            "arms.mono.pool: 'en' is in the groups x and y",
        ),
        ({"arms": {"mono": {"pool": {"x": []}}}}, "arms.mono.pool: the group x is empty"),
        ({"arms": {"mono": {"pool": {}}}}, "arms.mono.pool: the pool has no groups"),
        (
            {"arms": {"mono": {"pool": {"en": ["da"]}}}},
            "arms.mono.pool: the group en has the name of a language",
        ),
        *(
            ({"runtime": {"device": "cuda:1"} | several}, "runtime: device = 'cuda:1' is one GPU, and ")
            for several in (
                {"executor": "ray"},
                {"replicas": 2},
                {"train_processes": 2},
                {"accelerate_config": "fsdp.yaml"},
            )
        ),
        (
            {"policy": {"dtype": "float16"}, "arms": {"mono": {"training": {"full": True}}}},
            "arms.mono.training.full tunes all weights, whose gradients overflow in policy.dtype = 'float16'",
        ),
        ({"run": {"folder": "a" * 300}}, "has more than 255 bytes"),
        ({"run": {"folder": "a\0b"}}, "holds a null character"),
    ],
)
def test_a_mistake_is_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        from_dict(merged(LEAST, change), "recipes/x.toml")
    message = str(error.value)
    assert message.startswith("recipes/x.toml: ")
    assert sentence in message
    assert "\n" not in message


def test_a_policy_of_ones_own_gets_nothing_of_the_lab_unasked() -> None:
    own = merged(LEAST, {"policy": {"model": "org/model"}})
    files = {"prompts": {"source": "p.jsonl"}, "evaluation": {"source": "t.jsonl"}}
    with pytest.raises(
        UserError, match=r"prompts\.source is missing: policy\.model = 'org/model' is not the lab's"
    ):
        from_dict(merged(own, {"prompts": {"limit": 3}}))
    with pytest.raises(UserError, match=r"reward\.model is missing"):
        from_dict(merged(own, files))
    with pytest.raises(UserError, match=r"evaluation\.source is missing"):
        from_dict(merged(own, {"prompts": files["prompts"], "reward": {"model": "org/reward"}}))
    whole = from_dict(merged(own, files | {"reward": {"model": "org/reward"}}))
    assert from_dict(whole.model_dump(mode="json")) == whole
    from_dict(merged(own, files | {"reward": {"function": "module:name"}}))
    # an experiment in the lab, said so
    from_dict(merged(own, {"prompts": {"source": "lab"}, "evaluation": {"source": "lab"}}))


def test_a_recipe_without_arms_or_run() -> None:
    with pytest.raises(UserError, match=r"missing key 'run'"):
        from_dict({"arms": {"a": {}}})
    with pytest.raises(UserError, match=r"arms is empty"):
        from_dict({"run": LEAST["run"]})


def test_overrides_are_toml_values_or_text(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('[run]\nname = "x"\nlanguages = ["en", "da"]\n[arms.mono]\n')
    recipe = load(
        path,
        [
            "sampling.completions=8",
            "run.languages=['nb', 'en']",
            "run.name=other",
            "policy.instruction.nb=Svar på norsk.",
            "arms.extra.pool=all",
        ],
    )
    assert recipe.sampling.completions == 8
    assert recipe.run.languages == ("nb", "en")
    assert str(recipe.folder) == "runs/other"
    assert recipe.policy.instruction == {"nb": "Svar på norsk."}
    assert set(recipe.arms) == {"mono", "extra"}
    with pytest.raises(UserError, match=r"did you mean 'sampling.completions'"):
        load(path, ["sampling.completion=8"])
    with pytest.raises(UserError, match=r"expected section\.key=value"):
        load(path, ["sampling"])
    with pytest.raises(UserError, match="is a value, expected a table"):
        load(path, ["run.name.x=1"])


def test_an_arm_has_the_training_section_with_its_own_values_over_it() -> None:
    recipe = from_dict(
        merged(
            LEAST,
            {
                "training": {"beta": 0.3, "lora": {"rank": 8}},
                "arms": {"sft": {"training": {"method": "sft", "lora": {"alpha": 9}}}},
            },
        )
    )
    training = recipe.arms["sft"].training
    assert (training.method, training.beta, training.lora.rank, training.lora.alpha) == ("sft", 0.3, 8, 9)
    assert recipe.arms["mono"].training == recipe.training


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such recipe"):
        load(tmp_path / "none.toml")
    path = tmp_path / "x.toml"
    path.write_text("[run\n")
    with pytest.raises(UserError, match=r"x\.toml: not valid TOML: .*line 1"):
        load(path)
    for text in ("null", "[" * 100_000, '{"run": {"seed": ' + "9" * 5000 + "}}"):
        (tmp_path / "recipe.json").write_text(text)
        with pytest.raises(UserError, match=r"recipe\.json: expected"):
            load(tmp_path / "recipe.json")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"x\.toml: expected a recipe in TOML"):
        load(path)
