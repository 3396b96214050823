"""The columns of every table: names, types, keys.

Nothing is joined on text or row order: the key is `(prompt_id, language)`, then `sample_id`, and `prompt_id` is the
same in all languages."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
ROLES = ("system", "user", "assistant", "tool")
REFERENCE = -1  # the sample_id of a gold completion
LARGEST_SCORE = 3.4e38  # that 32 bits hold
# what engines and other tools call the end of a completion, in lower case
FINISH_REASONS = {
    **dict.fromkeys(("stop", "eos", "eos_token", "stop_token", "stop_sequence", "end_turn", "end_of_turn", "endoftext",
                     "complete", "completed", "finished"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "max_length", "max_new_tokens", "max_output_tokens", "model_length",
                     "token_limit", "truncated", "incomplete", "model_context_window_exceeded"), "length"),
    **dict.fromkeys(("content_filter", "safety", "refusal", "recitation", "blocklist", "prohibited_content",
                     "tool_calls", "tool_call", "tool_use", "function_call", "pause_turn", "abort", "aborted",
                     "cancelled", "error", "error_toxic", "other"), "unusable"),
}  # fmt: skip


def _schema(*columns: tuple[str, pa.DataType] | tuple[str, pa.DataType, bool]) -> pa.Schema:
    """Columns are required unless a third element says that they may be null."""
    return pa.schema([pa.field(c[0], c[1], nullable=len(c) == 3 and bool(c[2])) for c in columns])


_KEY = (("prompt_id", pa.string()), ("language", pa.string()))


class UnknownFinishReason(ValueError):
    """A finish reason that is none of FINISH_REASONS."""


def finish_reason(value: str) -> str:
    """ "stop", "length" or "unusable" for what any tool calls it; raises UnknownFinishReason."""
    try:
        return FINISH_REASONS[value.strip().lower().replace("-", "_")]
    except KeyError:
        known = ", ".join(name for name, meaning in FINISH_REASONS.items() if meaning != "unusable")
        raise UnknownFinishReason(
            f"the finish reason {value!r} is unknown, expected one of {known}"
        ) from None


@dataclass(frozen=True)
class Table:
    """A kind of table: its schema, its key, and the word for one of its rows in counts and ledgers."""

    name: str
    schema: pa.Schema
    key: tuple[str, ...]
    unit: str


PROMPTS = Table(
    "prompts",
    _schema(
        ("prompt_id", pa.string()),
        ("language", pa.string()),  # BCP-47
        ("messages", MESSAGES),  # every turn; the last is the user's or a tool's
        ("reference", pa.string(), True),  # a gold completion, where there is one
        ("source", pa.string()),
        ("domain", pa.string(), True),
    ),
    ("prompt_id", "language"),
    "prompt",
)

COMPLETIONS = Table(
    "completions",
    _schema(
        *_KEY,
        ("sample_id", pa.int32()),
        ("completion", pa.string()),
        # as sampled, without the end token; null from text-only engines
        ("completion_ids", pa.list_(pa.int32()), True),
        ("completion_tokens", pa.int32()),  # drawn: the end token or the tokens of a stop string counted
        ("prompt_tokens", pa.int32(), True),  # null from engines that apply the chat template themselves
        ("finish_reason", pa.string()),  # "stop" (end token or stop string) or "length"
        ("policy", pa.string()),
        ("seed", pa.int64()),  # 63 bits; the engine's where completions have none of their own (vLLM)
    ),
    ("prompt_id", "language", "sample_id"),
    "completion",
)

SCORES = Table(
    "scores",
    _schema(
        *_KEY,
        ("sample_id", pa.int32()),
        ("score", pa.float32()),  # raw, no sigmoid
        ("scorer", pa.string()),
        # of a sum of rewards
        ("parts", pa.list_(pa.struct([("reward", pa.string()), ("score", pa.float32())])), True),
    ),
    ("prompt_id", "language", "sample_id"),
    "completion",
)

# under the rule "none" (data for SFT) a pair has no rejected completion: its columns are null
PAIRS = Table(
    "pairs",
    _schema(
        ("arm", pa.string()),
        ("prompt_id", pa.string()),
        ("language", pa.string()),  # of the prompt
        ("pair_id", pa.int32()),  # 0, 1, … within a pool
        ("messages", MESSAGES),
        ("chosen", pa.string()),
        ("rejected", pa.string(), True),
        ("chosen_ids", pa.list_(pa.int32()), True),
        ("rejected_ids", pa.list_(pa.int32()), True),
        ("chosen_finish_reason", pa.string()),
        ("rejected_finish_reason", pa.string(), True),
        ("chosen_score", pa.float32(), True),  # raw; null for a gold completion without a score
        ("rejected_score", pa.float32(), True),
        ("chosen_calibrated", pa.float32(), True),  # what was selected on: always above rejected_calibrated
        ("rejected_calibrated", pa.float32(), True),
        ("calibration", pa.string()),
        ("chosen_language", pa.string()),
        ("rejected_language", pa.string(), True),
        ("chosen_sample_id", pa.int32()),  # -1: the gold completion
        ("rejected_sample_id", pa.int32(), True),
        ("pool_size", pa.int32()),  # candidates
        ("pool_mean", pa.float64(), True),  # of calibrated scores
        ("pool_std", pa.float64(), True),  # ddof 0
        ("pool_min", pa.float32(), True),
        ("flags", pa.list_(pa.string())),  # what a guard marked, "chosen: wrong language"
    ),
    ("arm", "prompt_id", "language", "pair_id"),
    "pair",
)

VERDICTS = Table(
    "verdicts",
    _schema(
        ("arm", pa.string()),
        *_KEY,
        ("temperature", pa.float64()),  # 0.0 is greedy
        ("sample_id", pa.int32()),
        ("completion", pa.string()),
        ("finish_reason", pa.string()),
        ("benchmark", pa.string()),
        ("mode", pa.string()),
        ("found_language", pa.string(), True),  # null where the text is too short or too mixed to tell
        ("value", pa.float64()),
    ),
    ("arm", "prompt_id", "language", "temperature", "sample_id", "benchmark"),
    "completion",
)

# an arm's completion against the base's, judged in both orders or one; what lacks a verdict is in the ledger
COMPARISONS = Table(
    "comparisons",
    _schema(
        ("arm", pa.string()),
        *_KEY,
        ("domain", pa.string(), True),
        ("completion", pa.string()),
        ("base_completion", pa.string()),
        ("found_language", pa.string(), True),
        ("base_found_language", pa.string(), True),
        # "arm", "base" or "tie", when the arm's was shown first; null for an order that was not asked about
        ("verdict_arm_first", pa.string(), True),
        ("verdict_base_first", pa.string(), True),
        ("value", pa.float64()),  # 1 the arm's in every order asked about, 0 the base's, else ½
        ("judgement_arm_first", pa.string(), True),  # what the judge wrote; null for the same text twice
        ("judgement_base_first", pa.string(), True),
        ("judge", pa.string()),
        ("judge_prompt_tokens", pa.int64()),  # of all orders
        ("judge_completion_tokens", pa.int64()),
    ),
    ("arm", "prompt_id", "language"),
    "comparison",
)

RESULTS = Table(
    "results",
    _schema(
        ("arm", pa.string()),
        ("language", pa.string()),  # a code, or a group: tuned, low-resource, held-out, all
        ("benchmark", pa.string()),
        ("metric", pa.string()),
        ("temperature", pa.float64()),
        ("value", pa.float64()),
        ("ci_low", pa.float64(), True),  # null where there are too few prompts for an interval
        ("ci_high", pa.float64(), True),
        ("n", pa.int64()),
        ("seed", pa.int64()),
    ),
    ("arm", "language", "benchmark", "metric", "temperature"),
    "result",
)

DROPPED = Table(
    "dropped",
    _schema(
        ("unit", pa.string()),  # what was left out: a prompt, a completion, a pair
        ("prompt_id", pa.string()),
        ("language", pa.string()),
        ("sample_id", pa.int32(), True),
        ("reason", pa.string()),
    ),
    ("unit", "prompt_id", "language", "sample_id"),
    "row",
)

TABLES: dict[str, Table] = {
    table.name: table
    for table in (PROMPTS, COMPLETIONS, SCORES, PAIRS, VERDICTS, COMPARISONS, RESULTS, DROPPED)
}


Drop = tuple[
    str, str, str, int | None, str
]  # of a ledger: unit, prompt_id, language, sample_id or None, reason


def ledger(rows: Sequence[Drop]) -> pa.Table:
    """A drop ledger; may be empty."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * 5
    arrays = [
        pa.array(column, type=field.type) for column, field in zip(columns, DROPPED.schema, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=DROPPED.schema)
