"""The scorer "reward": a reward model, a function of the user's, or a weighted sum of several of them.

A model's score is the raw logit of the whole conversation. A function takes lists of equal length, `messages`,
`completions` and `languages`, and returns a number for each completion, or None for one that goes to the ledger."""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from croco.config.models import Reward, RewardPart
from croco.config.runtime import Runtime
from croco.errors import Refused, UserError, one_line
from croco.models.chat_template import conversations_ids
from croco.models.open import open_scorer
from croco.models.protocols import Scorer, ScoreRequest
from croco.stages.score.policy_logprobs import Completion, Groups, Messages, Scored, too_long
from croco.storage.hashing import function_file
from croco.storage.schemas import LARGEST_SCORE

ScoreShard = Callable[[Groups], list[Scored]]
BATCH = 256  # completions that a function is called with
NO_SCORE = "the reward function gave no score"


class WeightedSum(float):
    """A score of several parts, which the scores table keeps."""

    parts: list[dict[str, Any]]


def open_reward(reward: Reward, runtime: Runtime, replica: int = 0) -> tuple[ScoreShard, dict[str, Any]]:
    """What scores groups of completions, and what `stage.json` records of it."""
    opened = [_open_part(part, runtime, replica) for part in reward.parts]
    if len(opened) == 1 and reward.weight == 1:
        return opened[0]

    def score(groups: Groups) -> list[Scored]:
        by_part = [score_part(groups) for score_part, _ in opened]
        return [
            [_sum(reward, values) for values in zip(*scored, strict=True)]
            for scored in zip(*by_part, strict=True)
        ]

    return score, {"parts": [facts for _, facts in opened]} if len(opened) > 1 else opened[0][1]


def _sum(reward: Reward, values: Sequence[float | str]) -> float | str:
    total = 0.0
    for part, value in zip(reward.parts, values, strict=True):
        if isinstance(value, str):
            return f"{part.label}: {value}"
        total += part.weight * value
    weighted = WeightedSum(total)
    weighted.parts = [
        {"reward": part.label, "score": value} for part, value in zip(reward.parts, values, strict=True)
    ]
    return weighted


def _open_part(part: RewardPart, runtime: Runtime, replica: int) -> tuple[ScoreShard, dict[str, Any]]:
    if part.function is not None:
        return partial(score_by_function, load_function(part.function), part.function), {"engine": "function"}
    scorer, tokenizer = open_scorer(part, runtime, replica)
    limit = part.max_tokens
    return lambda groups: score_conversations(scorer, tokenizer, groups, limit), scorer.facts


def score_conversations(scorer: Scorer, tokenizer: Any, groups: Groups, max_tokens: int) -> list[Scored]:
    """Scores of whole conversations, or the reason where one is too long or the chat template refuses it. Equal
    conversations get the same score: in another batch the last bits of a logit differ."""
    limit = min(max_tokens, scorer.max_context)
    requests, places = [], []
    scored: list[Scored] = []
    first: dict[tuple[int, ...], float] = {}  # the score of a conversation where it occurs first
    for number, (messages, rows) in enumerate(groups):
        try:
            sequences = conversations_ids(tokenizer, messages, [row["completion"] for row in rows])
        except Refused as error:
            scored.append([str(error)] * len(rows))
            continue
        except UserError as error:
            raise UserError(f"prompt {rows[0]['prompt_id']!r} in {rows[0]['language']}: {error}") from error
        scored.append([too_long("conversation", len(ids), limit) for ids in sequences])
        fits = [i for i, ids in enumerate(sequences) if len(ids) <= limit]
        if fits:
            requests.append(ScoreRequest(number, [], [sequences[i] for i in fits]))
            places.append(fits)
    for request, fits, values in zip(
        requests, places, scorer.score(requests) if requests else (), strict=True
    ):
        for i, ids, value in zip(fits, request.completions, values, strict=True):
            scored[request.key][i] = first.setdefault(tuple(ids), value)
    return scored


# Functions -----------------------------------------------------------------------------------------------------------


def load_function(name: str) -> Callable[..., Any]:
    """The function of "module:name" or "file.py:name"; raises UserError when it is not there."""
    path, attribute = function_file(name), name.rpartition(":")[2]
    module = name.rpartition(":")[0]
    try:
        if module.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"croco reward {path.stem}", path)
            assert spec is not None
            assert spec.loader is not None
            loaded = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = loaded  # dataclasses look themselves up there
            spec.loader.exec_module(loaded)
        else:
            loaded = importlib.import_module(module)
    except Exception as error:
        raise UserError(
            f"reward.function = '{name}': {path} cannot be loaded: {type(error).__name__}: {one_line(error)}"
        ) from error
    function = getattr(loaded, attribute, None)
    if not callable(function):
        raise UserError(f"reward.function = '{name}': {path} has no function '{attribute}'")
    return function


def score_by_function(function: Callable[..., Any], name: str, groups: Groups) -> list[Scored]:
    """Scores of all completions, in batches; raises UserError naming the row that the function fails on."""
    rows = [(messages, row) for messages, group in groups for row in group]
    values = [
        value
        for start in range(0, len(rows), BATCH)
        for value in _called(function, name, rows[start : start + BATCH])
    ]
    scores = iter(values)
    return [[next(scores) for _ in group] for _, group in groups]


def _called(
    function: Callable[..., Any], name: str, rows: Sequence[tuple[Messages, Completion]]
) -> list[float | str]:
    place = f"reward.function = '{name}'"
    try:
        values = function(
            messages=[messages for messages, _ in rows],
            completions=[row["completion"] for _, row in rows],
            languages=[row["language"] for _, row in rows],
        )
    except Exception as error:
        if len(rows) > 1:  # which row it is
            return [value for row in rows for value in _called(function, name, [row])]
        raise UserError(
            f"{place} raised {type(error).__name__}: {one_line(error)} for {_named(rows[0][1])}"
        ) from error
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple) or len(values) != len(rows):
        number = f"{len(values)} scores" if isinstance(values, list | tuple) else type(values).__name__
        raise UserError(
            f"{place} gave {number} for {len(rows)} completions, expected a list of a number each"
        )
    return [_number(place, value, row) for value, (_, row) in zip(values, rows, strict=True)]


def _number(place: str, value: Any, row: Completion) -> float | str:
    if value is None:
        return NO_SCORE
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST_SCORE:
        raise UserError(f"{place} gave {value!r} for {_named(row)}, expected a finite number or None")
    return number


def _named(row: Completion) -> str:
    return f"completion {row.get('sample_id', 0)} of prompt {row['prompt_id']!r} in {row['language']}"
