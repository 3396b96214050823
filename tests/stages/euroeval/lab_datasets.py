"""A folder of EuroEval datasets made from the lab's prompts: which kind of thing a word names, in one of four labels.

The metric scripts are here because EuroEval gets its own from a hub: `evaluate` looks into the working directory first.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from croco.lab import world

DATASETS = '''"""Made from the lab's prompts."""

from euroeval import languages
from euroeval.data_models import DatasetConfig
from euroeval.tasks import TEXT_CLASSIFICATION

'''
DATASET = """
{variable} = DatasetConfig(
    name="{name}",
    pretty_name="the lab's categories ({code})",
    source=dict(train="{code}-train.csv", val="{code}-val.csv", test="{code}-test.csv"),
    task=TEXT_CLASSIFICATION,
    languages=[languages.{language}],
    labels={labels!r},
    prompt_label_mapping="auto",
    prompt_prefix="",
    prompt_template="{{text}} {{label}}",
    instruction_prompt="{{text}}",
    num_few_shot_examples=2,
    max_generated_tokens=48,
)
"""
METRIC = '''"""scikit-learn's {name}, for `evaluate.load`."""

import datasets
import evaluate
from sklearn.metrics import {function}


class Metric(evaluate.Metric):
    def _info(self):
        whole = datasets.Features(predictions=datasets.Value("int32"), references=datasets.Value("int32"))
        return evaluate.MetricInfo(description="", citation="", features=whole)

    def _compute(self, predictions, references, **settings):
        return {{"{name}": float({function}(references, predictions, **settings))}}
'''
LANGUAGES = {"da": "DANISH", "de": "GERMAN"}


def name_of(code: str) -> str:
    return f"croco-category-{code}"


def make(folder: Path, codes: Sequence[str] = ("da", "de"), limit: int | None = None) -> Path:
    """The folder, with the lab's test prompts as test splits; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = DATASETS
    for code in codes:
        labels: set[str] = set()
        for split, theirs in (("train", "train"), ("dev", "val"), ("test", "test")):
            rows = [row for row in world.prompts(split, [code]).to_pylist() if row["domain"] == "category"]
            with (folder / f"{code}-{theirs}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["text", "label"])
                for row in rows[:limit]:
                    item, _ = world.split_id(row["prompt_id"])
                    label = world.say(item.answer, code).lower()  # EuroEval's labels have no capitals
                    labels.add(label)
                    writer.writerow([row["messages"][0]["content"], label])
        text += DATASET.format(
            variable=f"CATEGORY_{code.upper()}",
            name=name_of(code),
            code=code,
            language=LANGUAGES[code],
            labels=sorted(labels),
        )
    (folder / "custom_datasets.py").write_text(text, encoding="utf-8")
    for name, function in (("matthews_correlation", "matthews_corrcoef"), ("f1", "f1_score")):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"{name}.py").write_text(
            METRIC.format(name=name, function=function), encoding="utf-8"
        )
    return folder
