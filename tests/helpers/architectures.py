"""Every causal language model of transformers as a random model of two small layers, as far as that can be built.

The sizes are one table of common names, of which each configuration takes those that it knows.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES


VOCABULARY, EOS, PAD = 97, 1, 2

_WIDTH = ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "attention_hidden_size")
_INNER = ("intermediate_size", "ffn_hidden_size", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
_HEADS = (
    "num_attention_heads",
    "num_heads",
    "n_head",
    "n_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
)
_POSITIONS = ("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx", "context_length")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_COMMON: dict[str, Any] = {
    **dict.fromkeys(_WIDTH, 32),
    **dict.fromkeys(_INNER, 48),
    **dict.fromkeys(_LAYERS, 2),
    **dict.fromkeys((*_HEADS, "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(_POSITIONS, 512),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "mamba_expand"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim", "state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    "vocab_size": VOCABULARY,
    "mamba_d_conv": 4,
    "use_mamba_kernels": False,
}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": PAD, "is_decoder": True}

_LATENT = {
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "num_key_value_heads"), 4),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
}
_EXPERT_GROUPS = dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1)
_STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_DECODER = {"is_encoder_decoder": False}
# What the common table does not say, or says wrongly, of an architecture.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {**_STATES, "attn_layer_indices": [1]},
    "bart": _DECODER,
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": _DECODER,
    "blenderbot": _DECODER,
    "blenderbot-small": _DECODER,
    "cohere2": _WINDOW,
    "ctrl": {"dff": 48},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": None, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "dots1": _EXPERT_GROUPS,
    "exaone4": _WINDOW,
    "falcon_h1": {**_STATES, "mamba_d_ssm": 64},
    "gemma2": _WINDOW,
    "gemma3_text": _WINDOW,
    "gemma3n_text": {
        **_WINDOW,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "glm4_moe": _EXPERT_GROUPS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gpt_oss": _WINDOW,
    "granitemoehybrid": {**_STATES, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": 16,
        "intermediate_size_mlp": 48,
        "moe_layers": [1],
        "interleave_moe_layer_step": 2,
    },
    "longcat_flash": {
        **_LATENT,
        "head_dim": 4,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "marian": _DECODER,
    "mbart": _DECODER,
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "ministral": _WINDOW,
    "mistral": {"sliding_window": None},
    "modernbert-decoder": {"local_attention": 16, "global_attn_every_n_layers": 2},
    "mvp": _DECODER,
    "olmo3": _WINDOW,
    "pegasus": _DECODER,
    "phimoe": {"sliding_window": None},
    "plbart": _DECODER,
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "lru_width": 32,
        "attention_window_size": 32,
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
    "roc_bert": {
        **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 20),
        **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 8),
        **dict.fromkeys(("concat_input", "enable_pronunciation", "enable_shape"), False),
    },
    "starcoder2": {"sliding_window": None},
    "trocr": _DECODER,
    "vaultgemma": _WINDOW,
    "whisper": _DECODER,
    "xglm": {"attention_heads": 4},
    "xlm": {"causal": True, "n_langs": 1},
    "xlnet": {"d_inner": 48},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "layers_block_type": ["mamba", "hybrid"],
    },
    "zamba2": {
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "chunk_size": 16,
        "layers_block_type": ["mamba", "hybrid"],
        "num_mem_blocks": 1,
        "adapter_rank": 4,
        "hybrid_layer_ids": [1],
        "num_key_value_heads": 4,
    },
}

# Why there is no tiny model of these.
NOT_BUILT = {
    "blt": "a model of bytes with a model of patches inside, of its own sizes",
    "cpmant": "its embeddings are of segments, not of tokens alone",
    "emu3": "images: its text model is of its own sizes",
    "gemma3": "images: its text model is `gemma3_text`",
    "gemma3n": "images and sound: its text model is `gemma3n_text`",
    "git": "images, with a vision model of its own sizes",
    "got_ocr2": "images, with a vision model of its own sizes",
    "llama4": "images: its text model is `llama4_text`",
    "mega": "transformers cannot call it step by step",
    "mllama": "images, with a vision model of its own sizes",
    "musicgen": "sound: built of three models",
    "musicgen_melody": "sound: built of three models",
    "open-llama": "transformers cannot generate with it",
    "phi4_multimodal": "images and sound, of its own sizes",
    "prophetnet": "predicts several tokens at a position",
    "qdqbert": "needs a library for quantization",
    "reformer": "hashes with random numbers: two calls of the same model differ",
    "speech_to_text_2": "sound: its positions cannot be built",
    "transfo-xl": "transformers cannot generate with it",
    "xlm-prophetnet": "predicts several tokens at a position",
    "xlstm": "its small sizes fail in its own code",
}
BUILT = [name for name in NAMES if name not in NOT_BUILT]


def build(name: str, seed: int = 0) -> Any:
    """Return a random model of an architecture, in evaluation mode, float32."""
    config_class = CONFIG_MAPPING[name]
    known = inspect.signature(config_class.__init__).parameters
    sizes = {key: value for key, value in _COMMON.items() if key in known}
    config = config_class(**{**sizes, **_SPECIAL, **_OWN.get(name, {})})
    torch.manual_seed(seed)
    model = getattr(transformers, NAMES[name])(config)
    for parameter in model.parameters():  # far enough from uniform that no two tokens tie
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()
