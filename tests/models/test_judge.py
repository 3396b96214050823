"""A judge: greedy or sampled, and what it writes hangs on the question alone."""

from __future__ import annotations

from conftest import TinyModels
from croco.config.models import Judge
from croco.config.runtime import Runtime
from croco.models.open import open_judge
from croco.models.protocols import JudgeRequest


def test_a_sampled_verdict_depends_on_the_question_alone(tiny_models: TinyModels) -> None:
    runtime = Runtime.model_validate({"device": "cpu", "engines": {"judge": "transformers"}})
    questions = [f"Which is better, {number} or {number + 1}?" for number in range(6)]
    asked = [JudgeRequest(key, ({"role": "user", "content": text},)) for key, text in enumerate(questions)]

    def texts(temperature: float, requests: list[JudgeRequest]) -> dict[str, str]:
        judge = open_judge(Judge(model=str(tiny_models.policy), temperature=temperature), runtime)
        return {requests_by_key(requests)[key]: said.text for key, said in judge.judge(requests, 8)}

    def requests_by_key(requests: list[JudgeRequest]) -> dict[int, str]:
        return {one.key: one.messages[0]["content"] for one in requests}

    sampled = texts(2.0, asked)
    assert sampled != texts(0.0, asked)
    other_order = [JudgeRequest(7 + one.key, one.messages) for one in reversed(asked[2:])]
    assert texts(2.0, other_order) == {text: sampled[text] for text in questions[2:]}
