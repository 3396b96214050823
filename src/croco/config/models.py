"""The models of a recipe: policy, translator, reward model and judge; which weights, and how they are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator

from croco.config.runtime import Language, Positive, Section

VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TranslationFormat = Literal["instruct", "translategemma", "tower", "tower-instruct"]
TranslationCheck = Literal["items", "numbers", "repetition", "length", "copy", "language"]
TranslationChecks = Annotated[tuple[TranslationCheck, ...], Field(strict=False)]


@dataclass(frozen=True)
class Template:
    """What replaces a tokenizer's own chat template: another file (or None), and values that it sees."""

    file: str | None
    values: Mapping[str, bool | int | float | str]


class Model(Section):
    """Weights, and how they are read."""

    model: str
    """A directory, a hub id, or one of the lab's ("lab:policy")."""
    revision: str | None = None
    """Of a hub id: a commit, tag or branch."""
    trust_remote_code: bool = False
    """Run code that the model brings."""
    dtype: Dtype = "auto"
    """Of the weights; "auto" is bfloat16 on a GPU and float32 on a CPU."""


class Causal(Model):
    """A model that completes conversations."""

    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's own template."""
    chat_template_kwargs: dict[VariableName, bool | int | float | str] = Field(default_factory=dict)
    """Values that the template asks for, such as enable_thinking = false."""

    @property
    def template(self) -> Template | None:
        if self.chat_template is None and not self.chat_template_kwargs:
            return None
        return Template(self.chat_template, self.chat_template_kwargs)


class Policy(Causal):
    """The model that samples and is tuned."""

    model: str = "lab:policy"
    """The model that is tuned."""
    quantization: Literal["nf4"] | None = None
    """Adapters are tuned on weights in four bits (QLoRA, the extra `gpu`); sampling and merging take the whole ones."""
    instruction: dict[Language, str] = Field(default_factory=dict)
    """Per language, appended to the last user turn after a blank line."""


class Translate(Causal):
    """Prompts are read in one language and translated into the others; without this section they are there already."""

    source: Language = "en"
    """The language that [prompts] is read in."""
    evaluation: bool = False
    """The prompts of [evaluation] are translated likewise."""
    format: TranslationFormat = "instruct"
    """How the model is asked."""
    max_new_tokens: Positive = 8192
    """Per stretch of text; one that has not ended by then goes to the ledger."""
    checks: TranslationChecks = get_args(TranslationCheck)
    """Those that a translation must pass."""
    min_length_ratio: Annotated[float, Field(ge=0)] = 0.5
    """Translated characters per character, at least; for Chinese or Japanese another value is right."""
    max_length_ratio: Annotated[float, Field(gt=0)] = 2.5
    """At most."""


class RewardPart(Model):
    """A model or a function that scores completions."""

    model: str = "lab:reward"
    """A sequence classifier with one logit."""
    function: str | None = None
    """"module:name" or "file.py:name" in the model's place: (messages, completions, languages) → scores, in lists."""
    weight: float = 1.0
    """The score is multiplied by it."""
    max_tokens: Positive = 8192
    """A longer conversation goes to the ledger."""

    @property
    def label(self) -> str:
        return self.function or self.model

    @field_validator("function")
    @classmethod
    def _check_function(cls, value: str | None) -> str | None:
        if value is not None and not all(value.rpartition(":")):
            raise ValueError(f"'{value}', expected 'module:name' or 'file.py:name'")
        return value


class Reward(RewardPart):
    """What scores completions: a model, a function, or the weighted sum of several."""

    also: Annotated[tuple[RewardPart, ...], Field(strict=False)] = ()
    """Further rewards, [[reward.also]], each with its weight; the scores table keeps every part."""

    @field_validator("also")
    @classmethod
    def _check_also(cls, value: tuple[RewardPart, ...]) -> tuple[RewardPart, ...]:
        for number, part in enumerate(value, start=1):
            if not {"model", "function"} & part.model_fields_set:
                raise ValueError(f"part {number} has no model and no function, expected one")
        return value

    @property
    def parts(self) -> tuple[RewardPart, ...]:
        return (self, *self.also)

    @property
    def name(self) -> str:
        names = [part.label for part in self.parts]
        weights = [part.weight for part in self.parts]
        if weights == [1.0]:
            return names[0]
        return " + ".join(f"{weight:g} × {name}" for weight, name in zip(weights, names, strict=True))


class Judge(Causal):
    """A model that is asked for verdicts."""

    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Of its sampling; 0 is greedy."""
    max_new_tokens: Positive = 1024
    """Of a verdict."""
    labels: Literal["words", "brackets"] = "words"
    """How it is asked to end: "Verdict: 1", or "[[1]]", "[[2]]" or "[[T]]"; either is read."""
