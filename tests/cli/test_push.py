"""`croco push`: adapters, models and pairs into a hub, a real server on loopback that huggingface_hub talks to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

import croco
from hub import KEY, Hub, hub
from stages.train.pairs import make_pairs


@pytest.fixture
def served() -> Iterator[Hub]:
    with hub() as found:
        yield found


def push(served: Hub | None, folder: Path, *words: str, key: str | None = KEY, code: int = 0) -> str:
    """What the program says, in a process of its own: the client reads the environment when it is imported."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))
    }
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"HF_ENDPOINT": served.url if served else "http://127.0.0.1:9"} | (
        {"HF_TOKEN": key} if key else {}
    )
    found = subprocess.run(
        [sys.executable, "-m", "croco", "push", str(folder), *words],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert found.returncode == code, found.stdout + found.stderr
    assert KEY not in found.stdout + found.stderr
    if code:
        assert len(found.stderr.strip().splitlines()) == 1, found.stderr
    return found.stdout + found.stderr


def adapter(folder: Path, base: str) -> Path:
    """The folder that `croco train FILE` leaves: its card, the adapter, and the form that PEFT puts beside it."""
    inside = folder / "adapter"
    inside.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tuned\n")
    (inside / "README.md").write_text("---\n---\n# [More Information Needed]\n")
    (inside / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "r": 4}))
    (inside / "adapter_model.safetensors").write_bytes(b"w" * 1000)
    (inside / ".lock").write_text("")
    return folder


def test_an_adapter_with_its_card_and_its_bases_name(served: Hub, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "tuned", "some/base")
    said = push(served, folder, "--to", "me/tuned")
    assert f"3 files, 0.0 MB: {served.url}/me/tuned/commit/" in said
    files = served.repositories["model", "me/tuned"]
    assert files.keys() == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert files["README.md"].startswith(b"---\nlicense: apache-2.0")
    assert files["adapter_model.safetensors"] == b"w" * 1000
    assert served.private["model", "me/tuned"]
    assert served.commits == ["me/tuned"]


def test_an_adapter_of_a_folder_here_needs_a_name_that_others_know(served: Hub, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    folder = adapter(tmp_path / "tuned", str(base))
    assert "expected --base NAME" in push(served, folder, "--to", "me/tuned", code=2)
    assert not served.repositories
    push(served, folder, "--to", "me/tuned", "--base", "some/base", "--public")
    config = served.repositories["model", "me/tuned"]["adapter_config.json"]
    assert json.loads(config) == {"base_model_name_or_path": "some/base", "r": 4}
    assert str(base).encode() not in b"".join(served.repositories["model", "me/tuned"].values())
    assert not served.private["model", "me/tuned"]


def test_pairs_become_a_data_set_and_replace_what_is_there_only_when_asked(
    served: Hub, tmp_path: Path
) -> None:
    scored = make_pairs(6).with_columns(
        chosen_score=pl.lit(1.0),
        rejected_score=pl.lit(0.0),
        chosen_language="language",
        rejected_language="language",
    )
    croco.export(scored, tmp_path / "pairs", license="cc-by-4.0")
    for name in ("stage.json", "dropped.parquet", ".lock"):  # what `croco export` leaves beside
        (tmp_path / "pairs" / name).write_text("{}")
    push(served, tmp_path / "pairs", "--to", "me/pairs")
    files = served.repositories["dataset", "me/pairs"]
    assert b'license: "cc-by-4.0"' in files["README.md"]
    assert "data/train-00000.parquet" in files
    files["data/train-00009.parquet"] = b"old"
    said = push(served, tmp_path / "pairs", "--to", "me/pairs", code=2)
    assert "holds 3 files already: expected --update to replace them, or another name" in said
    assert "data/train-00009.parquet" in files
    push(served, tmp_path / "pairs", "--to", "me/pairs", "--update")
    assert files.keys() == {".gitattributes", "README.md", "data/train-00000.parquet"}


def test_a_whole_model(served: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    assert "has no README.md" in push(served, folder, "--to", "me/merged", code=2)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    push(served, folder, "--to", "me/merged")
    assert served.repositories["model", "me/merged"]["config.json"] == b"{}"


def test_what_is_wrong_is_one_sentence(served: Hub, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "tuned", "some/base")
    to = ("--to", "me/tuned")
    assert "HF_TOKEN is not set" in push(served, folder, *to, key=None, code=2)
    assert "the key in HF_TOKEN is refused" in push(served, folder, *to, key="hf_wrong", code=2)
    assert "the key in HF_TOKEN may not write there" in push(served, folder, "--to", "forbidden/x", code=2)
    assert "expected the name of a repository" in push(served, folder, "--to", "tuned", code=2)
    assert "no such folder" in push(served, tmp_path / "nowhere", *to, code=2)
    assert "holds no adapter_config.json" in push(served, tmp_path, *to, code=2)
    assert not served.repositories
    assert "me/tuned cannot be written on the hub" in push(None, folder, *to, code=2)


def test_a_push_that_broke_leaves_nothing_and_can_be_repeated(served: Hub, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "tuned", "some/base")
    served.fails = "/commit/"
    assert "me/tuned cannot be written on the hub" in push(served, folder, "--to", "me/tuned", code=2)
    assert served.repositories["model", "me/tuned"].keys() == {".gitattributes"}
    served.fails = "never"
    push(served, folder, "--to", "me/tuned")
    assert len(served.repositories["model", "me/tuned"]) == 4
