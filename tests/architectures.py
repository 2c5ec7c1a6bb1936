"""Tiny random models of many architectures: two layers, a vocabulary of 96, nothing downloaded."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
OPTIONS = {"experts_implementation": "eager"}
ALL_HEADS = {"num_key_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
RECURRENT = {
    "lru_width": 32,
    "attention_window_size": 8,
    "block_types": ("recurrent", "attention"),
    "w_init_variance_scale": 0.2,
}

# name: (model type, options on top of SIZES)
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "mistral_window": ("mistral", {"sliding_window": 4}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "sliding_window": 4}),
    "gemma3": ("gemma3_text", {"sliding_window": 4, "final_logit_softcapping": 3.0}),
    "phi": ("phi", ALL_HEADS),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", GPT2),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    "gpt_neox": ("gpt_neox", {}),
    "gptj": ("gptj", GPT2 | {"rotary_dim": 4}),
    "gpt_bigcode": ("gpt_bigcode", GPT2),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "falcon": ("falcon", {"alibi": False, "new_decoder_architecture": False, "multi_query": True, "head_dim": None}),
    "falcon_alibi": ("falcon", {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None}),
    "stablelm": ("stablelm", {"qk_layernorm": True, "use_qkv_bias": True}),
    "olmo": ("olmo", ALL_HEADS | {"clip_qkv": 2.0}),
    "olmo2": ("olmo2", {}),
    "cohere": ("cohere", {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, "sliding_window": 4}),
    "granite": (
        "granite",
        {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "attention_multiplier": 0.3},
    ),
    "starcoder2": ("starcoder2", {}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2}),
    "biogpt": ("biogpt", {}),
    "recurrent_gemma": ("recurrent_gemma", RECURRENT | {"logits_soft_cap": 2.0}),
    "glm4": ("glm4", {}),
    "smollm3": ("smollm3", {}),
    "nemotron": ("nemotron", {}),
    "codegen": ("codegen", GPT2 | {"rotary_dim": 4}),
    "mamba": ("mamba", {"state_size": 4, "time_step_rank": 4}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("olmoe", EXPERTS | {"intermediate_size": 24}),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"decoder_sparse_step": 1}),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 4.0}),
    "phimoe": ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "lm_head_bias": True}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "n_shared_experts": 1,
            "head_dim": 4,
        },
    ),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    "falcon_h1": (
        "falcon_h1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8, "lm_head_multiplier": 0.5, "mamba_chunk_size": 8},
    ),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 0.5}),
    "llama+lora": ("llama", {}),
    "llama+dora": ("llama", {}),
    "gpt2+lora": ("gpt2", GPT2),
    "olmoe+lora": ("olmoe", EXPERTS | {"intermediate_size": 24}),
    "minicpm3": (
        "minicpm3",
        {
            "dim_model_base": 16,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "head_dim": 4,
        },
    ),
}


def tiny(name: str, seed: int = 0, attn_implementation: str | None = None, **changes):
    """A model of ARCHITECTURES in evaluation mode, float32; weights drawn from `seed`, biases and norms moved as well.

    "+lora" and "+dora" in a name put adapters that do something on its linear layers.
    """
    kind, options = ARCHITECTURES[name]
    torch.manual_seed(seed)
    chosen = {key: value for key, value in (SIZES | options | changes).items() if value is not None}
    config = AutoConfig.for_model(kind, **chosen)
    more = {"attn_implementation": attn_implementation} if attn_implementation else {}
    model = AutoModelForCausalLM.from_config(config, **OPTIONS, **more).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    return _adapted(model, name).eval() if "+" in name else model


def _adapted(model, name: str):
    from peft import LoraConfig, get_peft_model

    targets = {"gpt2": ["c_attn", "c_fc"], "olmoe": ["q_proj", "v_proj", "o_proj"]}
    config = LoraConfig(
        r=2,
        target_modules=targets.get(name.partition("+")[0], "all-linear"),
        use_dora=name.endswith("+dora"),
        init_lora_weights=False,
        fan_in_fan_out=name.startswith("gpt2"),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)
