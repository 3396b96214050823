"""Where prompts come from, and `[arena]` and `[euroeval]`: completions before a judge, and structured tasks."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from croco.config.runtime import Language, Positive, Section

LANGUAGE = "{language}"
Strings = Annotated[tuple[str, ...], Field(strict=False)]


class Source(Section):
    """Prompts of the lab, of files, or of a data set of the hub.

    `{language}` in source, config, split or data_files stands for each language in turn.
    """

    source: str | None = None
    """"lab", "lab:lists", a file (.jsonl, .jsonl.gz, .json, .parquet), a pattern, a folder, "hf:NAME?config=NAME"."""
    split: str = "train"
    """Of the lab or a hub data set; files have none."""
    config: str | None = None
    """Of a hub data set; null is its only one, or one per language where they are called as the languages."""
    revision: str | None = None
    """Of a hub data set: a commit, tag or branch."""
    data_files: Strings = ()
    """Of a folder or a hub data set: which of its files."""
    limit: Positive | None = None
    """Prompts per language, the first ones; null is all."""
    id_column: str = "prompt_id"
    """The column that names a prompt, the same in all languages."""
    language_column: str = "language"
    """The column with the language's code."""
    language: Language | None = None
    """Of all rows that say none."""
    system: str | None = None
    """A system prompt for conversations that have none."""
    turns: Literal["all", "first"] = "all"
    """"first": the first user turn alone; the assistant's answer to it is the reference."""
    columns: dict[Literal["prompt", "system", "reference", "source", "domain"], str] = Field(
        default_factory=dict
    )
    """Our names for columns, and those of the file where they differ."""

    @property
    def by_language(self) -> bool:
        """Whether every language has a source of its own."""
        parts = (self.source, self.config, self.split, *self.data_files)
        return any(LANGUAGE in str(part) for part in parts)

    def of(self, language: str | None) -> dict[str, Any]:
        """source, config, split, revision and data_files, for one language where every language has its own."""
        name, config = str(self.source), self.config
        if name.startswith("hf:") and "?config=" in name:
            name, _, config = name.partition("?config=")
        values = {"source": name, "config": config, "split": self.split, "revision": self.revision}
        code = language or LANGUAGE
        return {key: value and value.replace(LANGUAGE, code) for key, value in values.items()} | {
            "data_files": [one.replace(LANGUAGE, code) for one in self.data_files]
        }


class Arena(Source):
    """Every arm's completions against the base's, before a judge."""

    judge: Literal["model", "lab"] = "model"
    """The model of [judge], or the lab's program."""
    source: str | None = None
    """Prompts of its own, as in [evaluation]; null is the prompts of [evaluation]."""
    split: str = "test"
    """Of the lab or a hub data set."""
    languages: Strings = ()
    """Of those that are evaluated; none named is all of them."""
    max_new_tokens: Positive | None = None
    """Of a completion; null is evaluation.max_new_tokens."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    """At which all are answered; 0 is greedy."""
    orders: Literal["both", "one"] = "both"
    """Each comparison judged twice, with either completion first, or once, in an order that its prompt decides."""


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
