"""Scores from a reward model behind vLLM's `/classify`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from pydantic import BaseModel

from croco.config.models import RewardPart
from croco.config.runtime import Server
from croco.errors import UserError
from croco.models.http_client import Call
from croco.models.model_files import load_config, read_part
from croco.models.openai_server import OPENING_RETRIES, Connection, Usage
from croco.models.protocols import ScoreRequest
from croco.storage.schemas import LARGEST_SCORE

SCORES_PER_REQUEST = 64


class _Class(BaseModel):
    index: int
    probs: list[float]  # vLLM's word, also for logits


class _Classes(BaseModel):
    data: list[_Class]
    usage: Usage


def scorer(server: Server, reward: RewardPart) -> tuple[ServerScorer, Any]:
    """The scorer of the role "score", and its tokenizer: conversations are sent as token ids."""
    connection = Connection(server, "score", reward.model)
    from croco.models.loading import load_tokenizer

    tokenizer = load_tokenizer(reward.model, reward.revision, None, reward.trust_remote_code)
    pad = load_config(reward, "reward").get_text_config().pad_token_id
    probe = tokenizer("Ja.", add_special_tokens=False)["input_ids"]
    return ServerScorer(connection, reward.model, probe, pad), tokenizer


class ServerScorer:
    """Scores with a reward model behind vLLM's /classify: raw logits, which its answers are not unless asked for.

    vLLM reads a score at the last token, transformers at the last that is not `pad`: what comes after that is not sent.
    """

    def __init__(self, connection: Connection, name: str, probe: list[int], pad: int | None) -> None:
        """`probe` is any short text in tokens, scored with and without activation to see that this is a choice."""
        self.pad = pad
        self.connection, self.name, self.facts = connection, name, connection.facts
        self.max_context = connection.known_context()
        self.url = f"{connection.url.removesuffix('/v1')}/classify"
        if not connection.server.trust_scores:
            calls = [self._call(None, [probe], activation) for activation in (False, True)]
            raw, activated = (connection.client.one(call, OPENING_RETRIES)[0] for call in calls)
            if raw == activated:
                raise UserError(
                    f"{connection.place}: {self.url} gives {raw} with and without activation, expected raw logits; "
                    f"set {connection.place}.trust_scores = true if they are"
                )

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        scores = [[0.0] * len(request.completions) for request in requests]
        most = self.connection.server.completions_per_request or SCORES_PER_REQUEST
        calls = (
            self._call(
                (number, start),
                [request.prompt_ids + ids for ids in request.completions[start : start + most]],
            )
            for number, request in enumerate(requests)
            for start in range(0, len(request.completions), most)
        )
        for (number, start), answer in self.connection.client.ask(calls):
            scores[number][start : start + len(answer)] = answer
        return scores

    def _call(self, key: Any, sequences: list[list[int]], activation: bool = False) -> Call[list[float]]:
        body = {
            "model": self.connection.served,
            "input": [read_part(ids, self.pad) for ids in sequences],
            "use_activation": activation,
        }
        return Call(
            key, self.url, body, partial(self._read, len(sequences)), f"{len(sequences)} conversations"
        )

    def _read(self, expected: int, content: Any) -> list[float]:
        answer = _Classes.model_validate(content)
        classes = sorted(answer.data, key=lambda one: one.index)
        if [one.index for one in classes] != list(range(expected)):
            raise ValueError(f"{len(classes)} scores, expected {expected}")
        labels = max(len(one.probs) for one in classes)
        if labels != 1 or any(len(one.probs) != 1 for one in classes):
            raise UserError(
                f"{self.connection.place}: '{self.connection.served}' has {labels} logits, expected one"
            )
        if large := [one.probs[0] for one in classes if not abs(one.probs[0]) <= LARGEST_SCORE]:
            raise ValueError(f"a score of {large[0]:g}")
        self.connection.count(answer.usage)
        return [one.probs[0] for one in classes]
