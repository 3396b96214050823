"""What a model or file is, by its content: every byte counts, a note does not, and a changed file is read again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from conftest import TinyModels, write_prompts, write_recipe
from croco.config import load as recipe
from croco.errors import UserError
from croco.pipeline import run
from croco.stages.train.from_files import labelled
from croco.storage import hashing
from croco.storage.hashing import file_identity, folder_identity, model_identity


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and files of some kilobytes large enough for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "CACHED_BYTES", 1000)
    monkeypatch.setattr(hashing, "_KNOWN", {})
    return tmp_path / "cache" / "croco" / "digests.json"


def model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(100_000))
    return folder


def aged(path: Path, seconds: int = 60) -> None:
    seen = path.stat()
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns - seconds * 10**9))


def test_one_bit_anywhere_makes_another_model(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    seen = {model_identity(str(folder), None)}
    for place in (0, 4095, 50_000, 99_999):
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(place)
            file.write(b"\x01")
        seen.add(model_identity(str(folder), None))
    assert len(seen) == 5


def test_a_kept_digest_holds_until_the_file_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "QUIET_SECONDS", -1.0)
    folder = model(tmp_path / "m")
    before, read = model_identity(str(folder), None), []
    assert cache.is_file()
    real = hashing._hash
    monkeypatch.setattr(hashing, "_hash", lambda path: read.append(path.name) or real(path))
    monkeypatch.setattr(hashing, "_KNOWN", {})  # as in another process
    assert model_identity(str(folder), None) == before
    assert read == ["config.json"]
    # the same size and the same time stamp: the time of the change cannot be set back
    weights = folder / "model.safetensors"
    seen = weights.stat()
    weights.write_bytes(b"\x01" * 100_000)
    os.utime(weights, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert model_identity(str(folder), None) != before
    for text in ("", "[]", '{"x": 3}', "{"):
        cache.write_text(text)
        monkeypatch.setattr(hashing, "_KNOWN", {})
        assert model_identity(str(folder), None) != before


def test_a_file_just_written_is_not_kept(tmp_path: Path, cache: Path) -> None:
    model_identity(str(model(tmp_path / "m")), None)
    assert not cache.exists()


def test_only_what_loading_reads_makes_a_model(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    before = model_identity(str(folder), None)
    for name in (
        "NOTES.md", "README", "LICENSE.txt", "notes.txt", "logo.png", ".gitattributes", "trainer_state.json",
        "training_args.bin", "optimizer.bin", "eval_results.json", "pytorch_model.bin",
    ):  # fmt: skip
        (folder / name).write_text("a note")
        assert model_identity(str(folder), None) == before, name
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "model.safetensors").write_bytes(b"x")
    assert model_identity(str(folder), None) == before
    (folder / "additional_chat_templates").mkdir()
    for name in (
        "generation_config.json", "tokenizer.json", "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja",
        "adapter_model.safetensors", "additional_chat_templates/tool.jinja", "modeling_own.py",
    ):  # fmt: skip
        (folder / name).write_text("something")
        after = model_identity(str(folder), None)
        assert after != before, name
        before = after
    (folder / "table.dat").write_text("code of its own may read anything")
    assert model_identity(str(folder), None) != before


def test_two_plans_of_one_process_see_that_weights_changed(tmp_path: Path, tiny_models: TinyModels) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(tiny_models.policy, policy)
    loaded = recipe.load(write_recipe(tmp_path, tiny_models), [f"policy.model={policy}"])

    def samples() -> str:
        return next(node for node in run.nodes(loaded) if node.stage.name == "sample").fingerprint

    before = samples()
    assert samples() == before
    weights = bytearray((policy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (policy / "model.safetensors").write_bytes(weights)
    assert samples() != before


def test_a_local_data_set_is_known_by_its_content_and_one_of_the_hub_by_its_revision(
    tmp_path: Path, tiny_models: TinyModels
) -> None:
    def settings(*overrides: str) -> dict:
        path = write_recipe(tmp_path, tiny_models)
        (node,) = [n for n in run.nodes(recipe.load(path, overrides)) if n.title == "prompts"]
        return node.science["settings"]

    data = tmp_path / "data"
    data.mkdir()
    write_prompts(data / "train.jsonl", 3)
    before = settings(f"prompts.source=hf:{data}")
    shutil.copytree(data, tmp_path / "copy")
    assert settings(f"prompts.source=hf:{tmp_path / 'copy'}") == before
    write_prompts(data / "train.jsonl", 4)
    assert settings(f"prompts.source=hf:{data}") != before
    hub = settings("prompts.source=hf:org/prompts")
    assert hub["source"] == "hf:org/prompts"
    assert "revision" not in hub
    assert settings("prompts.source=hf:org/prompts", "prompts.revision=abc")["revision"] == "abc"


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/x/p.jsonl", "b/x/p.jsonl", "q.jsonl")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(path))
    assert list(labelled(paths)) == ["a/x/p.jsonl", "b/x/p.jsonl", "q.jsonl"]
    assert list(labelled(paths[:1])) == ["p.jsonl"]
    assert len({file_identity(str(path)) for path in paths}) == 3
    with pytest.raises(UserError, match="is the same file as"):
        labelled([paths[0], tmp_path / "a" / "x" / ".." / "x" / "p.jsonl"])


def test_a_folder_counts_whole(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    before = folder_identity(folder)
    (folder / "README.md").write_text("a note")
    assert folder_identity(folder) != before
