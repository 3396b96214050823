"""The agreement of a completion with the English completions of its prompt (MAPO, arXiv 2401.06838).

The score is 1 / (a translation model's mean token loss of an English completion, given this one), averaged over the
English completions of the prompt; those have no score themselves. Source and target are laid out as M2M100 and NLLB do:
language token, text, end token.

Shapes: B pairs, S source tokens, T target tokens, M target tokens of a batch, X hidden width or vocabulary."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from croco.config.arms import ENGLISH
from croco.errors import UserError
from croco.models.chat_template import text_ids
from croco.models.memory import buckets, with_less_memory
from croco.models.model_files import context_of
from croco.models.output_layer import bounded, read_out
from croco.stages.score.policy_logprobs import Groups, Scored, too_long
from croco.storage.shards import read_parquet, shards

IS_ENGLISH = "English completions are what the others are aligned with"
NO_TARGET = "the prompt has no English completion to align with"


def language_token(language: str) -> str:
    """The token of a language in M2M100's form."""
    return f"__{language}__"


class Translator:
    """A loaded translation model that says how likely one text is as the translation of another."""

    def __init__(
        self, model: Any, tokenizer: Any, codes: Mapping[str, str], token_budget: int = 16384, name: str = ""
    ) -> None:
        self.model, self.tokenizer, self.codes, self.token_budget = model, tokenizer, codes, token_budget
        self.name = name or str(tokenizer.name_or_path)
        self.max_context = context_of(model.config)
        self.end = int(tokenizer.eos_token_id)
        self.facts = {"engine": "transformers", "device": str(model.device), "dtype": str(model.dtype)}

    def encode(self, texts: Sequence[str], language: str) -> list[list[int]]:
        """Language token, text, end token; raises UserError for a language that the model has no token for."""
        token = self.codes.get(language) or language_token(language)
        code = self.tokenizer.convert_tokens_to_ids(token)
        if code is None or code == self.tokenizer.unk_token_id:
            raise UserError(
                f"alignment.model = '{self.name}' has no token '{token}' for '{language}', expected one in "
                f"alignment.codes (NLLB's is such as 'dan_Latn')"
            )
        return [[int(code), *ids, self.end] for ids in text_ids(self.tokenizer, texts)]

    def losses(
        self, sources: Sequence[list[int]], targets: Sequence[Sequence[list[int]]]
    ) -> list[list[float]]:
        """Mean token losses: entry [i][j] of translating sources[i] into targets[i][j]."""
        return with_less_memory(self, lambda budget: self._losses(sources, targets, budget))

    @torch.inference_mode()
    def _losses(
        self, sources: Sequence[list[int]], targets: Sequence[Sequence[list[int]]], budget: int
    ) -> list[list[float]]:
        means = [[0.0] * len(row) for row in targets]
        order = sorted((i for i, row in enumerate(targets) if row), key=lambda i: len(sources[i]))
        for places in buckets([len(sources[i]) for i in order], budget):
            part = order[places]
            source_BS, mask_BS = self._padded([sources[i] for i in part])
            hidden_BSD = self.model.get_encoder()(input_ids=source_BS, attention_mask=mask_BS)[0]
            pairs = [(row, i, j) for row, i in enumerate(part) for j in range(len(targets[i]))]
            pairs.sort(key=lambda pair: len(targets[pair[1]][pair[2]]))
            lengths = [source_BS.shape[1] + len(targets[i][j]) for _, i, j in pairs]
            for batch in buckets(lengths, bounded(budget, self.model)):
                rows = torch.tensor([row for row, _, _ in pairs[batch]], device=self.model.device)
                wanted = [targets[i][j] for _, i, j in pairs[batch]]
                losses = self._batch(hidden_BSD[rows], mask_BS[rows], wanted)
                for (_, i, j), loss in zip(pairs[batch], losses, strict=True):
                    means[i][j] = loss
        return means

    def _batch(
        self, hidden_BSD: torch.Tensor, mask_BS: torch.Tensor, targets: Sequence[list[int]]
    ) -> list[float]:
        start = int(self.model.config.decoder_start_token_id)
        given_BT, _ = self._padded([[start, *ids[:-1]] for ids in targets])
        wanted_BT, real_BT = self._padded(targets)
        with read_out(self.model) as token_logps:
            states_BTX = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=hidden_BSD),
                attention_mask=mask_BS,
                decoder_input_ids=given_BT,
                use_cache=False,
            ).logits
            there_BT = real_BT.bool()
            logps_M = token_logps(states_BTX[there_BT], wanted_BT[there_BT])
        means = torch.stack([part.mean() for part in logps_M.split(real_BT.sum(-1).tolist())])
        losses: list[float] = (-means).tolist()
        return losses

    def _padded(self, rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids padded on the right, and where they are real; the padding token may occur within a text."""
        pad = int(self.tokenizer.pad_token_id or 0)
        ids = pad_sequence([torch.tensor(row) for row in rows], True, pad)
        real = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True)
        return ids.to(self.model.device), real.to(self.model.device)


def score_alignment(
    translator: Translator, groups: Groups, english: Mapping[str, Sequence[str]], max_tokens: int
) -> list[Scored]:
    """The mean of 1 / loss over a prompt's English completions, or a reason where there is no score. `english` are the
    texts by prompt_id; one longer than `max_tokens` is no target."""
    limit = min(max_tokens, translator.max_context)
    targets = {
        prompt_id: [ids for ids in translator.encode(texts, ENGLISH) if len(ids) <= limit]
        for prompt_id, texts in english.items()
    }
    scored: list[Scored] = []
    sources, targets_of, places = [], [], []
    for number, (_, rows) in enumerate(groups):
        language, wanted = rows[0]["language"], targets.get(rows[0]["prompt_id"], [])
        if language == ENGLISH or not wanted:
            scored.append([IS_ENGLISH if language == ENGLISH else NO_TARGET] * len(rows))
            continue
        encoded = translator.encode([row["completion"] for row in rows], language)
        scored.append([too_long("completion", len(ids), limit) for ids in encoded])
        for i, ids in enumerate(encoded):
            if len(ids) <= limit:
                sources.append(ids)
                targets_of.append(wanted)
                places.append((number, i))
    for (number, i), losses in zip(places, translator.losses(sources, targets_of), strict=True):
        scored[number][i] = sum(1 / loss for loss in losses) / len(losses)
    return scored


def english_completions(samples: Path, prompt_ids: Sequence[str], first: int | None) -> dict[str, list[str]]:
    """The English completions of some prompts by sample_id, the first ones if so wanted."""
    columns = ["prompt_id", "language", "sample_id", "completion"]
    wanted = (pl.col("language") == ENGLISH) & pl.col("prompt_id").is_in(list(prompt_ids))
    if first is not None:
        wanted &= pl.col("sample_id") < first
    parts = [read_parquet(shard.path, columns).filter(wanted) for shard in shards(samples)]
    rows = pl.concat(parts).drop("language")
    grouped: dict[str, list[str]] = {}
    for prompt_id, _, text in rows.sort("prompt_id", "sample_id").iter_rows():
        grouped.setdefault(prompt_id, []).append(text)
    return grouped
