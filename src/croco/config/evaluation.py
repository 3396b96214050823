"""`[arena]` and `[euroeval]` of the recipe: completions before a judge, and structured tasks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from croco.config.runtime import Positive, Section


class Arena(Section):
    """Every arm's greedy completions against the base's, before a judge."""

    judge: Literal["model", "lab"] = "model"
    """The model of [judge], or the lab's program."""
    source: str | None = None
    """Prompts of its own, as in [evaluation]; null is the prompts of [evaluation]."""
    split: str = "test"
    """Of the lab or a hub data set."""
    revision: str | None = None
    """Of a hub data set."""
    limit: Positive | None = None
    """Prompts per language, the first ones."""
    id_column: str = "prompt_id"
    """As in [prompts]."""
    language_column: str = "language"
    """As in [prompts]."""
    languages: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Of those that are evaluated; none named is all of them."""
    max_new_tokens: Positive | None = None
    """Of a completion; null is evaluation.max_new_tokens."""


# EuroEval -------------------------------------------------------------------------------------------------------------

VERSION = "18.3.0"  # whose results files are read; `evaluation/euroeval-constraints.txt` pins what it runs on

# the paper's; EuroEval has none in gl, cy, mt and ga
DATASETS: dict[str, tuple[str, ...]] = {
    "da": (
        "dala", "danish-entailment", "danish-lexical-inference", "danwic", "multi-wiki-qa-da",
        "danske-talemaader", "danish-citizen-tests", "ifeval-da",
    ),
    "nl": ("scala-nl", "squad-nl", "include-nl", "copa-nl", "multiloko-nl"),
    "en": ("scala-en", "wic", "squad", "life-in-the-uk", "mmlu-pro", "ifeval", "multiloko-en"),
    "fr": ("scala-fr", "fquad", "mmlu-fr", "include-fr", "multinrc-fr", "ifeval-fr", "multiloko-fr"),
    "de": ("scala-de", "germanquad", "mmlu-de", "include-de", "ifeval-de", "multiloko-de"),
    "it": ("scala-it", "wic-ita", "mmlu-it", "include-it", "ifeval-it"),
    "es": ("scala-es", "mlqa-es", "include-es", "multinrc-es", "ifeval-es", "multiloko-es"),
    "no": ("norquad", "nrk-quiz-qa", "idioms-no", "mmlu-no", "nor-common-sense-qa"),
    "sv": ("multi-wiki-qa-sv", "mmlu-sv", "skolprov", "multiloko-sv", "hellaswag-sv"),
    "pt": ("mmlu-pt", "multiloko-pt", "goldenswag-pt", "multi-wiki-qa-pt"),
}  # fmt: skip
# EuroEval's Norwegian sets are one collection
STANDS_FOR = {"nb": "no", "nn": "no"}

Names = Annotated[
    tuple[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")], ...], Field(strict=False, min_length=1)
]
OURS = ("lab", "reward", "arena")  # benchmarks of the results table that are not EuroEval's


class EuroEval(Section):
    """Structured tasks, evaluated by EuroEval in an environment of its own; without this section there are none."""

    datasets: dict[str, Names] | None = None
    """Per language; null is the paper's, for every evaluated language."""
    local: str | None = None
    """A folder with custom_datasets.py and what it needs, for data sets of your own."""
    iterations: Annotated[int, Field(ge=2, le=1000)] = 3
    """Of each data set; one alone has no interval."""
    split: Literal["test", "val"] = "test"
    """Of the data sets."""
    few_shot: bool = True
    """Examples in the prompt; a task that allows none has none."""
    generative_type: Literal["base", "instruction_tuned", "reasoning"] = "instruction_tuned"
    """What EuroEval takes the policies for."""

    @field_validator("datasets")
    @classmethod
    def _each_dataset_once(
        cls, value: dict[str, tuple[str, ...]] | None
    ) -> dict[str, tuple[str, ...]] | None:
        every = [name for names in (value or {}).values() for name in names]
        for name in every:
            if every.count(name) > 1:
                raise ValueError(f"'{name}' appears twice, expected each dataset once")
            if name.startswith(OURS):
                raise ValueError(f"'{name}' begins like a benchmark of our own, expected another name")
        return value

    def datasets_of(self, language: str) -> tuple[str, ...]:
        """The datasets of an evaluated language; none for a language that is not covered."""
        if self.datasets is not None:
            return self.datasets.get(language, ())
        primary = language.split("-")[0]
        return DATASETS.get(STANDS_FOR.get(primary, primary), ())
