"""A judge: any model that can be sampled. A conversation that does not fit, or is refused, gets the reason for a
verdict."""

from collections.abc import Iterator, Sequence
from typing import Any

from croco.errors import Refused
from croco.models.chat_template import request
from croco.models.protocols import Completion, Decoding, Judged, JudgeRequest, Sampler
from croco.storage.seeds import digest


class SamplerJudge:
    """A judge on any sampler; `tokenizer` is None where the sampler takes messages."""

    def __init__(self, sampler: Sampler, tokenizer: Any, temperature: float = 0.0) -> None:
        self.sampler, self.tokenizer, self.temperature = sampler, tokenizer, temperature
        self.name, self.facts = sampler.name, sampler.facts

    def judge(
        self, requests: Sequence[JudgeRequest], max_new_tokens: int
    ) -> Iterator[tuple[int, Judged | str]]:
        """Yield (key, what the judge wrote, or why there is nothing) once per request, as they finish."""
        asked, limit = {}, self.sampler.max_context
        for one in requests:
            seed = digest("judge", *(message["content"] for message in one.messages))
            try:
                prompt = request(self.tokenizer, one.key, one.messages, [seed], name=f"judgement {one.key}")
            except Refused as error:
                yield one.key, str(error)
                continue
            if (tokens := len(prompt.prompt_ids)) >= limit:
                yield one.key, f"the judge's prompt has {tokens} tokens, the context of {self.name} {limit}"
            else:
                asked[one.key] = prompt
        decoding = Decoding(self.temperature, 1.0, 0, max_new_tokens)
        for key, (drawn,) in self.sampler.sample(list(asked.values()), decoding):
            if isinstance(drawn, str):
                yield key, drawn
            else:
                yield key, self._judged(drawn, len(asked[key].prompt_ids))

    def _judged(self, drawn: Completion, prompt_tokens: int) -> Judged:
        text = (
            self.tokenizer.decode(drawn.ids, skip_special_tokens=True) if drawn.text is None else drawn.text
        )
        counted = prompt_tokens if drawn.num_prompt_tokens is None else drawn.num_prompt_tokens
        return Judged(text, drawn.finish_reason, counted, drawn.completion_tokens)
