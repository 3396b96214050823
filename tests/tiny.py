"""Tiny real models of the real architectures, built in seconds from a seed, where a user has a model of the hub.

Plain functions, so that any test file may import them (`from tiny import make_policy`).
Weights are random but wide (`spread`), so that argmax and probabilities are far from ties.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

SPECIALS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

TEXT = [
    "Which month comes after March? April comes after March.",
    "Hvilken måned kommer efter marts? Efter marts kommer april.",
    "Quel mois vient après mars ? Après mars, c'est avril.",
    "Welcher Monat folgt auf März? Auf den März folgt der April.",
    "¿Qué mes viene después de marzo? Después de marzo viene abril.",
    "Write one short sentence. Svar på dansk. Antworte auf Deutsch.",
]


def make_tokenizer(
    vocab_size: int = 320, chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few sentences, with a chat template; it can encode any text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        extra_special_tokens=SPECIALS[3:],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def _shape(vocab_size: int, hidden: int, layers: int, max_positions: int, spread: float) -> dict:
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": max_positions,
        "initializer_range": spread,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "sdpa",
        "dtype": torch.float32,
    }


def make_policy(
    arch: str = "llama",
    vocab_size: int = 320,
    hidden: int = 32,
    layers: int = 2,
    max_positions: int = 512,
    spread: float = 0.15,
    sliding_window: int = 8,
    seed: int = 0,
) -> PreTrainedModel:
    """A causal model in float32 and eval mode; `arch` is "llama", "qwen3", "cohere2" or "gemma3" (every other layer
    slides), "gemma3 with images" (a vision tower beside it) or "mistral" (every layer slides)."""
    torch.manual_seed(seed)
    shape = _shape(vocab_size, hidden, layers, max_positions, spread)
    kinds = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers)]
    model: PreTrainedModel
    if arch == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    elif arch == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True))
    elif arch == "mistral":
        model = MistralForCausalLM(MistralConfig(**shape, sliding_window=sliding_window))
    elif arch == "gemma3":
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(
                **shape, sliding_window=sliding_window, layer_types=kinds, final_logit_softcapping=5.0
            )
        )
    elif arch == "gemma3 with images":
        text = Gemma3TextConfig(**shape, sliding_window=sliding_window, layer_types=kinds)
        vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 28, "patch_size": 14}  # fmt: skip
        ids = {
            f"{name}_token_index": vocab_size - place for place, name in enumerate(("image", "eoi", "boi"), 1)
        }
        model = Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=text, vision_config=vision, mm_tokens_per_image=1, dtype="float32", **ids
            )
        )
    elif arch == "cohere2":
        model = Cohere2ForCausalLM(
            Cohere2Config(**shape, sliding_window=sliding_window, layer_types=kinds, logit_scale=1.0)
        )
    else:
        raise ValueError(f"unknown architecture {arch!r}: expected one of those above")
    return model.eval()


def make_reward(
    arch: str = "qwen3",
    vocab_size: int = 320,
    hidden: int = 32,
    layers: int = 2,
    max_positions: int = 512,
    spread: float = 0.15,
    num_labels: int = 1,
    seed: int = 1,
) -> PreTrainedModel:
    """A sequence classifier in float32 and eval mode; `arch` is "qwen3" or "llama"."""
    torch.manual_seed(seed)
    shape = _shape(vocab_size, hidden, layers, max_positions, spread)
    model: PreTrainedModel
    if arch == "qwen3":
        model = Qwen3ForSequenceClassification(Qwen3Config(**shape, num_labels=num_labels))
    elif arch == "llama":
        model = LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=num_labels))
    else:
        raise ValueError(f"unknown architecture {arch!r}: expected qwen3 or llama")
    return model.eval()


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write model and tokenizer as a Hugging Face directory and return it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
