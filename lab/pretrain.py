"""Pretrains the lab policy from nothing: its tokenizer, its chat template, a small Llama, the corpus of `corpus.py`.

The loss is on completions only, as in instruction tuning; a document is a row (no packing), rows of similar length
share a batch.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lab.corpus import documents

Messages = list[dict[str, str]]
Corpus = Callable[[int, int], Iterator[Messages]]  # of a seed, and how many documents are plain facts
Say = Callable[[str], None]
VOCAB_SIZE = 3072
BOS, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant", "tool")
MAX_TOKENS = 512
# Every turn is `<|role|>text<|end|>`; a role the policy does not know is an error, not a silent text.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role ' ~ message['role']) }}{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(
    seed: int, num_documents: int = 40_000, corpus: Corpus = documents, vocab_size: int = VOCAB_SIZE
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the corpus's own text, with one token per role."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [BOS, END, PAD, *(f"<|{role}|>" for role in ROLES)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (
        m["content"] for d in itertools.islice(corpus(seed, num_documents // 4), num_documents) for m in d
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def new_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, width: int = 128, layers: int = 4
) -> LlamaForCausalLM:
    """An untrained policy with tied embeddings; 4 layers of width 128 are about 1.3 M parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=round(2.75 * width),
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(
    tokenizer: PreTrainedTokenizerFast, batch: list[Messages]
) -> Iterator[tuple[list[int], list[bool]]]:
    """Ids of each document and which of them are trained on: completions and their end token, if they have an end."""
    texts = [m["content"] for messages in batch for m in messages]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    role_ids = {role: tokenizer.convert_tokens_to_ids(f"<|{role}|>") for role in ROLES}
    for messages in batch:
        ids, trained = [tokenizer.bos_token_id], [False]
        for message in messages:
            content = next(encoded)
            ids += [role_ids[message["role"]], *content, tokenizer.eos_token_id]
            learnt = message["role"] == "assistant"
            trained += [False] + [learnt] * len(content) + [learnt and "endless" not in message]
        yield ids, trained


def batches(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    tokens_per_batch: int,
    num_plain: int,
    corpus: Corpus = documents,
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Right-padded (ids, mask, trained), each (B, T), of documents of similar length, B * T near the budget."""
    stream = corpus(seed, num_plain)
    rng = torch.Generator().manual_seed(seed)
    while True:
        window = list(encode(tokenizer, list(itertools.islice(stream, 2048))))
        window.sort(key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[bool]]]] = [[]]
        for row in window:
            if len(row[0]) * (len(groups[-1]) + 1) > tokens_per_batch:
                groups.append([])
            groups[-1].append(row)
        for g in torch.randperm(len(groups), generator=rng).tolist():
            width = max(len(ids) for ids, _ in groups[g])
            ids = torch.full((len(groups[g]), width), tokenizer.pad_token_id)
            trained = torch.zeros(ids.shape, dtype=torch.bool)
            mask = torch.zeros(ids.shape, dtype=torch.long)
            for b, (row, on) in enumerate(groups[g]):
                ids[b, : len(row)], trained[b, : len(row)], mask[b, : len(row)] = (
                    torch.tensor(row),
                    torch.tensor(on),
                    1,
                )
            yield ids, mask, trained


def new_optimizers(model: torch.nn.Module, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, p in model.named_parameters():  # "shared" is the embedding of encoder and decoder
        (matrices if p.ndim == 2 and "embed" not in name and "shared" not in name else others).append(p)
    return [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.0),
        torch.optim.AdamW(others, lr=0.25 * peak, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def pretrain(
    seed: int,
    num_tokens: int = 5_000_000,
    num_plain: int = 50_000,
    tokens_per_batch: int = 4096,
    peak: float = 0.02,
    on_step: Callable[[int, int, float], None] | None = None,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    make: Callable[[PreTrainedTokenizerFast, int], PreTrainedModel] = new_model,
    corpus: Corpus = documents,
    bfloat16: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Trains tokenizer (if none is given) and policy on about `num_tokens` tokens (prompts included);
    `on_step(done, total, loss)`. `bfloat16` is faster where the CPU has it, and ten times slower where it has not."""
    tokenizer = tokenizer or train_tokenizer(seed)
    model = make(tokenizer, seed)
    optimizers = new_optimizers(model, peak)
    bases = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    stream, done = batches(tokenizer, seed, tokens_per_batch, num_plain, corpus), 0
    trunk = torch.compile(model.model, dynamic=True)  # twice as fast, after a minute
    while done < num_tokens:
        ids_BT, mask_BT, trained_BT = next(stream)
        progress = done / num_tokens
        scale = min(1.0, progress / 0.01 + 0.05) * (
            1.0 if progress < 0.4 else 0.02 + 0.98 * (1 - progress) / 0.6
        )
        for optimizer, base in zip(optimizers, bases, strict=True):
            optimizer.param_groups[0]["lr"] = base * scale
        at = trained_BT[:, 1:]
        with torch.autocast(
            "cpu", dtype=torch.bfloat16, enabled=bfloat16
        ):  # padding is on the right, so a causal mask is enough
            hidden_BTD = trunk(input_ids=ids_BT, use_cache=False).last_hidden_state[:, :-1]
            logits_PV = model.lm_head(hidden_BTD[at])
        loss = torch.nn.functional.cross_entropy(logits_PV.float(), ids_BT[:, 1:][at])
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"pretraining of the lab policy diverged after {done} tokens")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        done += int(mask_BT.sum())
        if on_step:
            on_step(done, num_tokens, loss.item())
    return model.eval(), tokenizer


def every(say: Say, what: str, interval: int) -> Callable[[int, int, float], None]:
    """A callback that prints the running mean of the loss each `interval` units of progress."""
    losses: list[float] = []
    last = 0

    def on_step(done: int, total: int, loss: float) -> None:
        nonlocal last
        losses.append(loss)
        if done - last >= interval or done >= total:
            say(f"{what}: {done:,} of {total:,}, loss {sum(losses) / len(losses):.4f}")
            losses.clear()
            last = done

    return on_step


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """bfloat16 safetensors, configuration, tokenizer and chat template."""
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
