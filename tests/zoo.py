"""Tiny random models of the architectures that people tune, by the names of their configs in transformers.

Every entry is a config class and what it needs beside SHAPE; sequences of a few dozen tokens reach past every window
and every change of positions. Weights are wide enough that probabilities are far from ties.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tiny import make_tokenizer

VOCABULARY = 320
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.12,
}  # fmt: skip
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"head_dim": 8}
WINDOW = HEADS | {"sliding_window": 10, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
          "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
FALCON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "max_position_embeddings": 256}  # fmt: skip
SCALES = {
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return HEADS | {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | more}


# name -> (config class, settings), SHAPE included unless the settings bring a shape of their own
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", SHAPE | HEADS),
    "Llama, biases, tied": ("LlamaConfig", SHAPE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "Llama, llama3 positions": ("LlamaConfig", SHAPE | rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)),
    "Llama, linear positions": ("LlamaConfig", SHAPE | rope("linear", factor=2.0)),
    "Llama, dynamic positions": ("LlamaConfig", SHAPE | rope("dynamic", factor=4.0) | {"max_position_embeddings": 32}),
    "Arcee": ("ArceeConfig", SHAPE | HEADS),
    "Apertus": ("ApertusConfig", SHAPE),
    "Bamba": ("BambaConfig", SHAPE | MAMBA | {"mamba_expand": 2, "attn_layer_indices": [1]}),
    "Bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.12}),
    "Cohere": ("CohereConfig", SHAPE | {"logit_scale": 0.25}),
    "Cohere 2": ("Cohere2Config", SHAPE | WINDOW | {"logit_scale": 0.25}),
    "DeepSeek-V3": ("DeepseekV3Config", SHAPE | {
        "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}),
    "ERNIE 4.5": ("Ernie4_5Config", SHAPE | HEADS),
    "EXAONE 4": ("Exaone4Config", SHAPE | WINDOW),
    "Falcon, rotary": ("FalconConfig", FALCON | {"initializer_range": 0.12, "alibi": False, "bias": True, "new_decoder_architecture": False}),
    "Falcon, ALiBi": ("FalconConfig", FALCON | {"initializer_range": 0.12, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "Falcon-H1": ("FalconH1Config", SHAPE | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}),
    "Gemma": ("GemmaConfig", SHAPE | HEADS),
    "Gemma 2": ("Gemma2Config", SHAPE | WINDOW | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "Gemma 2, no cap": ("Gemma2Config", SHAPE | WINDOW | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": None, "final_logit_softcapping": 3.0}),
    "Gemma 3, text": ("Gemma3TextConfig", SHAPE | WINDOW | {"query_pre_attn_scalar": 8}),
    "Gemma 3n, text": ("Gemma3nTextConfig", SHAPE | WINDOW | {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": [48] * 4,
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "altup_num_inputs": 2,
        "num_kv_shared_layers": 2, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4}),
    "GLM": ("GlmConfig", SHAPE | HEADS),
    "GLM 4": ("Glm4Config", SHAPE | HEADS),
    "GLM 4 MoE": ("Glm4MoeConfig", SHAPE | HEADS | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "GPT-2": ("GPT2Config", GPT | {"initializer_range": 0.12}),
    "GPT-J": ("GPTJConfig", GPT | {"rotary_dim": 4, "initializer_range": 0.12}),
    "GPT-Neo": ("GPTNeoConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 256, "window_size": 10, "attention_types": [[["global", "local"], 1]], "initializer_range": 0.12}),
    "GPT-NeoX": ("GPTNeoXConfig", SHAPE),
    "GPT-OSS": ("GptOssConfig", SHAPE | WINDOW | LOCAL | {"rope_parameters": YARN}),
    "Granite": ("GraniteConfig", SHAPE | SCALES),
    "Granite MoE": ("GraniteMoeConfig", SHAPE | SCALES | LOCAL),
    "Granite MoE, hybrid": ("GraniteMoeHybridConfig", SHAPE | SCALES | LOCAL | MAMBA | {"mamba_expand": 2, "shared_intermediate_size": 16, "layer_types": ["mamba", "attention"]}),
    "Helium": ("HeliumConfig", SHAPE | HEADS),
    "Hunyuan": ("HunYuanDenseV1Config", SHAPE | HEADS),
    "LFM2": ("Lfm2Config", SHAPE | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "Llama 4, text": ("Llama4TextConfig", SHAPE | HEADS | LOCAL | {"num_experts_per_tok": 1, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "attention_chunk_size": 10, "no_rope_layers": [1, 0]}),
    "Mamba 2": ("Mamba2Config", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "expand": 2, "state_size": 8, "n_groups": 1, "chunk_size": 16}),
    "MiniMax": ("MiniMaxConfig", SHAPE | HEADS | LOCAL | {"layer_types": ["linear_attention", "full_attention"], "block_size": 16}),
    "Ministral": ("MinistralConfig", SHAPE | WINDOW),
    "Ministral 3": ("Ministral3Config", SHAPE | HEADS | {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}}),
    "Mistral, window": ("MistralConfig", SHAPE | HEADS | {"sliding_window": 10}),
    "Mixtral": ("MixtralConfig", SHAPE | LOCAL | {"sliding_window": None}),
    "MPT": ("MptConfig", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256, "expansion_ratio": 2, "initializer_range": 0.12}),
    "Nemotron": ("NemotronConfig", SHAPE),
    "OLMo": ("OlmoConfig", SHAPE),
    "OLMo 2": ("Olmo2Config", SHAPE),
    "OLMo 3": ("Olmo3Config", SHAPE | WINDOW),
    "OLMoE": ("OlmoeConfig", SHAPE | {"num_experts": 4, "num_experts_per_tok": 2}),
    "OPT": ("OPTConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256, "word_embed_proj_dim": 32, "init_std": 0.12}),
    "Phi": ("PhiConfig", SHAPE | {"partial_rotary_factor": 0.5}),
    "Phi 3": ("Phi3Config", SHAPE | {"sliding_window": None}),
    "Phi 3, window": ("Phi3Config", SHAPE | {"sliding_window": 10}),
    "Phi 4, longrope": ("Phi3Config", SHAPE | {"sliding_window": None, "original_max_position_embeddings": 24, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 24}}),
    "PhiMoE": ("PhimoeConfig", SHAPE | {"sliding_window": 10, "num_local_experts": 2}),
    "Qwen 2.5": ("Qwen2Config", SHAPE | {"tie_word_embeddings": True}),
    "Qwen 2, window": ("Qwen2Config", SHAPE | {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1}),
    "Qwen 2 MoE": ("Qwen2MoeConfig", SHAPE | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "Qwen 3": ("Qwen3Config", SHAPE | HEADS),
    "Qwen 3 MoE": ("Qwen3MoeConfig", SHAPE | HEADS | EXPERTS),
    "Qwen3-Next": ("Qwen3NextConfig", SHAPE | HEADS | EXPERTS | LINEAR | {"shared_expert_intermediate_size": 16}),
    "Qwen 3.5, text": ("Qwen3_5TextConfig", SHAPE | HEADS | LINEAR),
    "Seed-OSS": ("SeedOssConfig", SHAPE | HEADS),
    "SmolLM 3": ("SmolLM3Config", SHAPE | {"no_rope_layers": [1, 0]}),
    "StableLM": ("StableLmConfig", SHAPE | {"partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "StarCoder 2": ("Starcoder2Config", SHAPE | {"sliding_window": 10}),
    "T5": ("T5Config", {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}),
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The model of a name in eval mode; biases, norms and the like are not trivial."""
    kind, settings = MODELS[name]
    config = getattr(transformers, kind)(**(settings | IDS))
    auto = (
        transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    )
    torch.manual_seed(seed)
    model = auto.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.generation_config.eos_token_id = 2
    return model.to(dtype)


def save(folder: Path, name: str) -> Path:
    """A model and a tokenizer as a user has them."""
    make(name).save_pretrained(folder)
    make_tokenizer(VOCABULARY).save_pretrained(folder)
    return folder
