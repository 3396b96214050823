"""The command line: quick to help, and in step with the pipeline."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import TinyModels, write_recipe
from croco.cli.app import one_sentence
from croco.cli.main import STAGE_COMMANDS, app
from croco.config import load
from croco.pipeline import graph, run, status
from croco.pipeline.node import Node

HEAVY = ("torch", "transformers", "polars", "pyarrow", "numpy", "pandas", "datasets", "babel")


def croco(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "croco", *words], capture_output=True, text=True, timeout=120
    )


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        found = croco("--help")
        seconds.append(time.monotonic() - start)
    assert found.returncode == 0
    for name in ("run", "plan", "report", "doctor", "init", "fetch", "schema", *STAGE_COMMANDS):
        assert name in found.stdout
    assert min(seconds) < 0.5 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), seconds
    code = f"import sys, croco.cli.main; print([m for m in {HEAVY} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]", loaded.stderr


def test_a_command_per_stage_and_a_function_behind_each() -> None:
    assert [stage.name for stage in graph.STAGES] == [*STAGE_COMMANDS, "report"]
    for stage in graph.STAGES:
        module, _, name = stage.function.partition(":")
        assert callable(getattr(import_module(module), name))


def test_the_order_can_be_run_and_arms_share_what_they_have_in_common(
    tmp_path: Path, tiny_models: TinyModels
) -> None:
    nodes = graph.nodes(load.load(write_recipe(tmp_path, tiny_models)))
    titles = [node.title for node in nodes]
    for node in nodes:
        assert all(titles.index(before.title) < titles.index(node.title) for before in node.inputs.values())
    assert [title for title in titles if title.startswith(("sample", "score"))] == [
        "sample",
        "score",
        "score/likelihood",
    ]
    by_title = {node.title: node for node in nodes}
    assert by_title["pair/monolingual"].inputs["score"].title == "score"
    assert by_title["pair/likelihood"].inputs["score"].title == "score/likelihood"
    assert set(by_title["evaluate/base"].inputs) == {"eval-prompts"}
    assert set(by_title["results"].inputs) == {
        "eval-prompts",
        "evaluate/base",
        "evaluate/monolingual",
        "evaluate/likelihood",
    }


def test_what_enters_a_fingerprint_and_what_does_not(tmp_path: Path, tiny_models: TinyModels) -> None:
    path = write_recipe(tmp_path, tiny_models)

    def changed(*overrides: str) -> set[str]:
        before = {node.title: node.fingerprint for node in graph.nodes(load.load(path))}
        after = {node.title: node.fingerprint for node in graph.nodes(load.load(path, list(overrides)))}
        return {title for title in before if before[title] != after.get(title)}

    assert (
        changed("runtime.token_budget=99", "runtime.shard_prompts=3", f"run.folder={tmp_path / 'x'}") == set()
    )
    after_training = {"evaluate/monolingual", "results", "report"}
    assert changed("arms.monolingual.training.beta=0.5") == {"train/monolingual", *after_training}
    assert changed("sampling.temperature=0.9") >= {"sample", "score", "score/likelihood", "train/likelihood"}
    assert not changed("sampling.temperature=0.9") & {"prompts", "eval-prompts", "evaluate/base"}
    assert changed("evaluation.base_temperatures=[0.5]") == {"evaluate/base", "results", "report"}
    # the same weights in another place are the same model
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(tiny_models.policy), str(copy)], check=True)
    assert changed(f"policy.model={copy}") == set()
    (copy / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert "sample" in changed(f"policy.model={copy}")


def test_plan_says_what_would_run_and_what_it_may_cost(tmp_path: Path, tiny_models: TinyModels) -> None:
    path = write_recipe(tmp_path, tiny_models)
    found = CliRunner().invoke(app, ["plan", str(path)])
    assert found.exit_code == 0
    assert "prompts                      would run" in found.output
    assert "20 prompts in 2 languages × 12 completions = 240, at most 9,600 tokens" in found.output
    # 8 prompts, greedy and sampled, for the base and two arms
    assert "8 prompts in 2 languages, 2 arms and the base: 48 completions" in found.output
    assert not (tmp_path / "run").exists()
    judge = [
        "--set",
        "arena.judge=model",
        "--set",
        f"judge.model={tiny_models.policy}",
        "--set",
        "arena.limit=3",
    ]
    found = CliRunner().invoke(app, ["plan", str(path), *judge])
    assert (
        f"6 prompts in 2 languages, 2 arms, both orders, by {tiny_models.policy}: at most 24" in found.output
    )
    assert "24 judgements of at most 24,576 tokens" in found.output
    assert "arena-sample" not in found.output  # what `evaluate` draws greedily serves
    found = CliRunner().invoke(app, ["plan", str(path), *judge, "--set", "arena.max_new_tokens=30"])
    assert "arena-sample: 18 completions, at most 540 tokens" in found.output
    assert CliRunner().invoke(app, ["prompts", str(path)]).exit_code == 0
    found = CliRunner().invoke(app, ["plan", str(path), "--set", "prompts.limit=3"])
    assert "stale, would need --rebuild" in found.output
    assert "limit: None → 3" in found.output


def test_long_names_of_arms_leave_the_plan_in_columns(tmp_path: Path, tiny_models: TinyModels) -> None:
    long = "an-arm-whose-name-is-longer-than-most-of-them-are"
    path = write_recipe(tmp_path, tiny_models)
    sets = [f"arms.{long}.sampler={{model='{tiny_models.policy}'}}", f"arms.{long}.rejected=min"]
    words = [word for each in sets for word in ("--set", each)]
    found = CliRunner().invoke(app, ["plan", str(path), "--machine=8xh100", *words])
    assert found.exit_code == 0, found.output
    lines = found.output.splitlines()
    assert len({line.index(" would run") for line in lines if line.endswith(" would run")}) == 1
    assert len({line.index(" GPU hours") for line in lines if " GPU hours" in line}) == 1
    assert any(f"sample/{long}" in line for line in lines if " GPU hours" in line)


def test_a_trial_is_on_the_first_prompts_in_a_folder_of_its_own(
    tmp_path: Path, tiny_models: TinyModels
) -> None:
    path = str(write_recipe(tmp_path, tiny_models))
    found = CliRunner().invoke(app, ["run", path, "--limit", "3", "--until", "prompts"])
    assert found.exit_code == 0
    assert "6 prompts" in found.output
    assert [folder.name for folder in tmp_path.iterdir() if folder.is_dir()] == ["run-limit-3"]
    found = CliRunner().invoke(app, ["plan", path, "--limit", "3", "--set", "evaluation.limit=2"])
    assert "6 prompts in 2 languages × 12" in found.output
    assert "4 prompts in 2 languages, 2 arms" in found.output
    assert CliRunner().invoke(app, ["run", path, "--limit", "0"]).exit_code == 2


def test_stages_one_by_one_then_stale_then_rebuilt(tmp_path: Path, tiny_models: TinyModels) -> None:
    path = str(write_recipe(tmp_path, tiny_models))
    cli = CliRunner()
    early = cli.invoke(app, ["sample", path])
    assert early.exit_code == 2
    assert "sample reads prompts, which is missing" in early.output
    assert "20 prompts" in cli.invoke(app, ["prompts", path]).output
    assert "complete, skipped" in cli.invoke(app, ["prompts", path]).output
    stale = cli.invoke(app, ["prompts", path, "--set", "prompts.limit=3"])
    assert stale.exit_code == 2
    assert "limit: None → 3" in stale.output
    assert "--rebuild" in stale.output
    rebuilt = cli.invoke(app, ["prompts", path, "--set", "prompts.limit=3", "--rebuild"])
    assert rebuilt.exit_code == 0
    assert "6 prompts" in rebuilt.output
    assert cli.invoke(app, ["prompts", path, "--arm", "none"]).exit_code == 2


def test_a_rebuild_removes_the_last_stage_first(
    tmp_path: Path, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in between, a rebuild leaves nothing that counts as complete on top of what is gone."""
    path = write_recipe(tmp_path, tiny_models)
    run.run(load.load(path), until="score")
    (tmp_path / "run" / "prompts" / "part-00000.parquet").unlink()
    removed: list[str] = []
    clear = status.clear

    def noted(node: Node) -> None:
        if (node.folder / "stage.json").exists():
            removed.append(node.folder.name)
        clear(node)

    monkeypatch.setattr(status, "clear", noted)
    run.run(load.load(path), until="prompts", rebuild=True)
    assert removed == ["prompts"]
    (tmp_path / "run" / "prompts" / "part-00000.parquet").unlink()
    removed.clear()
    run.run(load.load(path), until="score", rebuild=True)
    assert removed == ["likelihood", "score", "sample", "prompts"]


def test_interruption_and_a_full_disk_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    import errno

    for error, code, words in (
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to go on"),
        (OSError(errno.ENOSPC, "No space left", "runs/x"), 2, "runs/x cannot be written (no space left)"),
    ):
        with pytest.raises(SystemExit) as end, one_sentence():
            raise error
        assert end.value.code == code
        assert words in capsys.readouterr().err
    with pytest.raises(OSError, match="other"), one_sentence():
        raise OSError(errno.EPERM, "other")


def test_doctor_looks_at_machine_and_models(tmp_path: Path, tiny_models: TinyModels) -> None:
    found = CliRunner().invoke(app, ["doctor", str(write_recipe(tmp_path, tiny_models))])
    assert found.exit_code == 0, found.output
    assert "torch" in found.output
    assert "LlamaForCausalLM" in found.output
    assert "Qwen3ForSequenceClassification" in found.output
    assert "a prefix of prompt + completion" in found.output
