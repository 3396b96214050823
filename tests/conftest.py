"""What tests share: no network, one thread, and tiny real models with prompts in two languages."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

HOUSE = Path(__file__).parent.parent / "src"

# for the processes that tests start, whether or not the package is installed
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HOUSE), os.environ.get("PYTHONPATH")]))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # after the environment is set


@dataclass(frozen=True)
class TinyModels:
    """Folders of a tiny Llama policy and a tiny Qwen3 reward model, and prompt files in English and Danish."""

    policy: Path
    reward: Path
    prompts: Path
    test_prompts: Path


def write_prompts(path: Path, num_prompts: int, start: int = 0) -> Path:
    """Parallel prompts in English and Danish, one JSON line each."""
    lines = []
    for number in range(start, start + num_prompts):
        for language, text in (
            ("en", f"Which month is number {number}?"),
            ("da", f"Hvilken måned er nummer {number}?"),
        ):
            messages = [{"role": "user", "content": text}]
            lines.append(json.dumps({"prompt_id": f"p{number}", "language": language, "messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    import tiny

    folder = tmp_path_factory.mktemp("tiny-models")
    tokenizer = tiny.make_tokenizer()
    return TinyModels(
        policy=tiny.save(folder / "policy", tiny.make_policy("llama"), tokenizer),
        reward=tiny.save(folder / "reward", tiny.make_reward("qwen3"), tokenizer),
        prompts=write_prompts(folder / "prompts.jsonl", 10),
        test_prompts=write_prompts(folder / "test.jsonl", 4, start=100),
    )


TINY_RECIPE = """
[run]
name = "tiny"
folder = "{folder}"
seed = 7
languages = ["en", "da"]

[prompts]
source = "{models.prompts}"

[policy]
model = "{models.policy}"

[reward]
model = "{models.reward}"

[sampling]
completions = 12
max_new_tokens = 40

[training]
learning_rate = 1e-3
batch_pairs = 2
epochs = 3
max_tokens = 128
lora = {{ rank = 4, alpha = 8 }}

[evaluation]
source = "{models.test_prompts}"
temperatures = [0.0, 1.0]
max_new_tokens = 12
bootstrap = 50

[arms.monolingual]
pool = "language"

[arms.likelihood]
pool = "all"
scorer = "likelihood"

[runtime]
device = "cpu"
shard_prompts = 4
token_budget = 512
threads = 1
"""


def write_recipe(folder: Path, models: TinyModels, name: str = "recipe.toml", run: str = "run") -> Path:
    """A recipe of a whole tiny run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(TINY_RECIPE.format(folder=folder / run, models=models), encoding="utf-8")
    return path
