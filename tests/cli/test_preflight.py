"""What `croco doctor RECIPE` finds before anything expensive runs: everything wrong, one sentence, exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import tiny
from conftest import TinyModels, write_recipe
from croco.cli.main import app
from croco.cli.preflight import examine
from croco.config import load as recipes
from croco.config.training import Lora
from croco.errors import UserError
from croco.models.loading import load_policy
from croco.models.lora import apply_lora
from croco.storage.hashing import check_adapter

Doctor = Callable[..., Result]


@pytest.fixture
def doctor(tmp_path: Path, tiny_models: TinyModels) -> Doctor:
    recipe = write_recipe(tmp_path, tiny_models)

    def ask(*overrides: str, flags: tuple[str, ...] = ()) -> Result:
        words = [word for override in overrides for word in ("--set", override)]
        return CliRunner().invoke(app, ["doctor", str(recipe), *flags, *words])

    return ask


def wrong(found: Result) -> str:
    """The one sentence at the end."""
    assert found.exit_code == 2, found.output
    assert isinstance(found.exception, SystemExit), found.exception
    (line,) = [line for line in found.output.splitlines() if line.startswith("croco: ")]
    return line


def with_template(folder: Path, template: str | None, kind: str = "policy") -> Path:
    made = tiny.make_policy("llama") if kind == "policy" else tiny.make_reward("qwen3")
    return tiny.save(folder, made, tiny.make_tokenizer(chat_template=template))


def test_a_recipe_that_works(doctor: Doctor) -> None:
    found = doctor(flags=("--measure",))
    assert found.exit_code == 0, found.output
    for part in (
        "LlamaForCausalLM",
        "chat template: 6 prompts of at most",
        "of 20 prompts 0 leave no room in it",
        "Qwen3ForSequenceClassification",
        "free: fits",
        "tokens sampled in",
        "72 completions scored in",
        "hours: at most",
        "disk: at most",
    ):
        assert part in found.output, part
    assert "WRONG" not in found.output


def test_everything_wrong_is_shown_and_the_first_ends_it(doctor: Doctor, tmp_path: Path) -> None:
    policy = with_template(tmp_path / "policy", None)
    reward = with_template(tmp_path / "reward", "{{ bos_token }}{{ messages[0]['content'] }}", "reward")
    found = doctor(f"policy.model={policy}", f"reward.model={reward}")
    line = wrong(found)
    assert "prompt 'p0' in en" in line
    assert "found no chat template" in line
    assert line.endswith("(and 1 more, see above)")
    assert "shows two completions as the same conversation" in found.output
    assert "disk: at most" in found.output


def test_prompts_that_cannot_be_read_do_not_hide_what_else_is_wrong(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt_id": "p", "language": "en"}\n')
    policy = with_template(tmp_path / "policy", None)
    found = doctor(
        f"policy.model={policy}", f"prompts.source={tmp_path / 'bad.jsonl'}", "evaluation.source=no.jsonl"
    )
    line = wrong(found)
    assert "bad.jsonl" in line
    assert line.endswith("(and 2 more, see above)")
    said = [line for line in found.output.splitlines() if line.startswith("WRONG")]
    for part, one in zip(("bad.jsonl", "no.jsonl", "found no chat template"), said, strict=True):
        assert part in one
    assert "Qwen3ForSequenceClassification" in found.output


def test_two_bos_and_a_turn_that_nothing_ends(doctor: Doctor, tmp_path: Path) -> None:
    twice = with_template(tmp_path / "twice", "{{ bos_token }}" + tiny.CHAT_TEMPLATE)
    assert "found two '<|bos|>' at the beginning" in wrong(doctor(f"policy.model={twice}"))
    opened = "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}"
    assert (
        "closes no assistant turn with an end token"
        in doctor(f"policy.model={with_template(tmp_path / 'open', opened)}").output
    )


def test_a_template_that_changes_an_earlier_turn_when_a_completion_follows(
    doctor: Doctor, tmp_path: Path
) -> None:
    shifting = tiny.CHAT_TEMPLATE.replace(
        "<|{{ message['role'] }}|>", "<|{{ message['role'] }}|>{{ messages | length }}"
    )
    line = wrong(doctor(f"policy.model={with_template(tmp_path / 'shifting', shifting)}"))
    assert "prompt 'p0' in en" in line
    assert "no prefix of prompt + completion" in line


def test_models_beside_the_policy(doctor: Doctor, tmp_path: Path) -> None:
    plain = with_template(tmp_path / "plain", tiny.CHAT_TEMPLATE)
    mute = with_template(tmp_path / "mute", None)
    judged = ("arena.judge=model", f"judge.model={plain}")
    found = doctor(f"arms.monolingual.sampler={{model='{plain}'}}", *judged, "judge.max_new_tokens=100")
    assert found.exit_code == 0, found.output
    assert "sampler       monolingual:" in found.output
    assert "judge  " in found.output
    assert "found no chat template" in wrong(doctor(f"arms.monolingual.sampler={{model='{mute}'}}"))
    assert "found no chat template" in wrong(doctor("arena.judge=model", f"judge.model={mute}"))
    assert "leaves no room in the judge's context" in wrong(doctor(*judged, "judge.max_new_tokens=100000"))
    mapo = ("arms.mapo.scorer=alignment", "arms.mapo.rejected=min", "alignment.model=lab:translator")
    found = doctor(*mapo)
    assert found.exit_code == 0, found.output
    assert "it has a token for en" in found.output
    line = wrong(doctor(*mapo, "alignment.codes={da='__xx__'}"))
    assert "has no token '__xx__' for 'da'" in line


def test_what_does_not_fit(doctor: Doctor, tmp_path: Path) -> None:
    line = wrong(doctor("runtime.token_budget=999999999"))
    assert "memory on cpu: weights" in line
    assert "DOES NOT FIT, a budget of" in line
    assert line.endswith("(and 1 more, see above)")  # the reward model's
    line = wrong(doctor("sampling.completions=100000", "sampling.max_new_tokens=100000000"))
    assert "disk: at most" in line
    short = tiny.save(tmp_path / "short", tiny.make_policy("llama", max_positions=8), tiny.make_tokenizer())
    assert "no prompt fits its context of 8 tokens" in wrong(doctor(f"policy.model={short}"))
    assert "no prompt leaves room for a completion in 10 tokens" in wrong(doctor("reward.max_tokens=10"))


def test_completions_that_do_not_end_are_said(doctor: Doctor) -> None:
    few = doctor("sampling.max_new_tokens=2", flags=("--measure",)).output
    assert "had not ended after 2 tokens: raise sampling.max_new_tokens, or nothing is left to pair" in few
    assert (
        "raise sampling.max_new_tokens"
        not in doctor("sampling.max_new_tokens=90", flags=("--measure",)).output
    )


def test_measuring_finds_broken_weights(doctor: Doctor, tmp_path: Path) -> None:
    for key, model in (("policy", tiny.make_policy("llama")), ("reward", tiny.make_reward("qwen3"))):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0] = float("nan")
        broken = tiny.save(tmp_path / key, model, tiny.make_tokenizer())
        assert doctor(f"{key}.model={broken}").exit_code == 0
        line = wrong(doctor(f"{key}.model={broken}", flags=("--measure",)))
        assert "finite number" in line


def test_an_adapter_of_another_base_of_the_same_shape(
    doctor: Doctor, tmp_path: Path, tiny_models: TinyModels
) -> None:
    other = tiny.save(tmp_path / "other", tiny.make_policy("llama", seed=5), tiny.make_tokenizer())
    adapted = apply_lora(
        load_policy(str(other))[0], Lora(rank=4, alpha=8, dropout=0.0, targets=("q_proj",)), seed=0
    )
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.01)
    folder = tmp_path / "run" / "train" / "monolingual" / "adapter"
    adapted.save_pretrained(folder)
    assert f"was trained on {other}, expected one of '{tiny_models.policy}'" in wrong(doctor())
    with pytest.raises(UserError, match="was trained on"):
        load_policy(str(tiny_models.policy), adapter=folder)
    # the same weights elsewhere are the same base, and one that is gone cannot be compared
    load_policy(
        str(tiny.save(tmp_path / "copy", tiny.make_policy("llama", seed=5), tiny.make_tokenizer())),
        adapter=folder,
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "no/such"}))
    check_adapter(folder, str(tiny_models.policy), None)
    with pytest.raises(UserError, match="trained on no/such"):
        check_adapter(folder, "some/other", None)


def test_every_prompt_is_shown_to_the_templates(doctor: Doctor, tmp_path: Path) -> None:
    refusing = (
        "{% if '7' in messages[0]['content'] %}{{ raise_exception('no sevens') }}{% endif %}"
        + tiny.CHAT_TEMPLATE
    )
    found = doctor(f"policy.model={with_template(tmp_path / 'policy', refusing)}")
    assert found.exit_code == 0, found.output
    assert (
        "2 of 20 prompts go to the ledger: prompt 'p7' in en: refused by the chat template: no sevens"
        in found.output
    )
    nothing = with_template(tmp_path / "reward", "{{ raise_exception('nothing') }}", "reward")
    assert "all 20 prompts are refused, prompt 'p0' in en: " in wrong(doctor(f"reward.model={nothing}"))


def test_doctor_says_what_tuning_takes(tiny_models: TinyModels) -> None:
    values = {
        "run": {"name": "x", "languages": ["en", "da"]},
        "prompts": {"source": str(tiny_models.prompts)},
        "evaluation": {"source": str(tiny_models.test_prompts)},
        "policy": {"model": str(tiny_models.policy)},
        "reward": {"model": str(tiny_models.reward)},
        "arms": {"lora": {}, "whole": {"training": {"full": True}}},
    }
    small = values | {"policy": {"model": str(tiny_models.policy), "quantization": "nf4"}}
    four = [line for line in examine(recipes.from_dict(small)) if line.startswith("tuning")]
    assert "adapters of rank 16 on weights in nf4: 0.0 M trained" in four[0]
    assert "nf4" not in four[1]
    said = [line for line in examine(recipes.from_dict(values)) if line.startswith("tuning")]
    assert said[0].startswith("tuning        adapters of rank 16: 0.0 M trained")
    assert said[1].startswith("tuning        all weights: 0.0 M trained")
    assert all(line.endswith("fits") for line in said)
