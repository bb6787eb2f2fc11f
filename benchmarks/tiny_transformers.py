"""Tiny seeded `transformers` models by type: two layers, random weights, widths that differ.

`MODELS[type]()` returns (module, keyword inputs). One row per model says what its configuration
needs beyond the defaults of its family; defaults that a configuration does not know are dropped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from spacompiler.models_zoo._seeded import images, randomise_all, seeded, tokens

Inputs = dict[str, Any]
Built = tuple[nn.Module, Inputs]
Config = dict[str, Any]

VOCABULARY = 64


@dataclass(frozen=True)
class Family:
    """Models that are built alike: class, defaults of the configuration, inputs, rows."""

    cls: str
    defaults: Config
    inputs: Callable[[], Inputs]
    rows: Mapping[str, Config]


# --- inputs -----------------------------------------------------------------------------------


def _ids(length: int = 9) -> torch.Tensor:
    return tokens(VOCABULARY, length)


def text(length: int = 9) -> Inputs:
    """Two rows of tokens."""
    return {"input_ids": _ids(length)}


def pair(length: int = 9) -> Inputs:
    """Tokens for an encoder and for a decoder."""
    return {"input_ids": _ids(length), "decoder_input_ids": _ids(7)}


def masked_pair() -> Inputs:
    """Like `pair`, with the attention masks that some decoders need when they are traced."""
    inputs = pair()
    return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"]),
            "decoder_attention_mask": torch.ones_like(inputs["decoder_input_ids"])}


def noisy_picture() -> Inputs:
    """Images for a masked autoencoder, with the noise that orders its patches."""
    return {**picture(), "noise": torch.rand(2, 16)}


def picture(size: int = 32) -> Inputs:
    """Two small images."""
    return {"pixel_values": images(size=size)}


def video() -> Inputs:
    """Two clips of four frames."""
    return {"pixel_values": torch.stack([images() for _ in range(4)], 1)}


def wave(length: int = 800) -> Inputs:
    """Two stretches of sound."""
    return {"input_values": torch.randn(2, length)}


def spectrum(name: str = "input_features", bins: int = 16, frames: int = 24) -> Inputs:
    """Two log-mel spectrograms, time first."""
    return {name: torch.randn(2, frames, bins)}


def speech(bins: int = 16, frames: int = 24, turned: bool = False) -> Inputs:
    """Two spectrograms and decoder tokens; `turned` puts the bins first."""
    shape = (2, bins, frames) if turned else (2, frames, bins)
    return {"input_features": torch.randn(shape), "decoder_input_ids": _ids(7)}


def both(size: int = 32) -> Inputs:
    """Tokens and images."""
    return {"input_ids": _ids(), "pixel_values": images(size=size)}


# --- defaults of the families -----------------------------------------------------------------

TEXT: Config = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40, "num_hidden_layers": 2,
    "max_position_embeddings": 32, "type_vocab_size": 2, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 7,
}
CACHELESS: Config = {**TEXT, "use_cache": False}
MOE: Config = {
    **CACHELESS, "num_local_experts": 5, "num_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 28, "shared_expert_intermediate_size": 20, "n_routed_experts": 6,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
}
MLA: Config = {
    **MOE, "num_key_value_heads": 6, "q_lora_rank": 20, "kv_lora_rank": 16,
    "qk_rope_head_dim": 4, "head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 10,
    "first_k_dense_replace": 1,
}
SEQ2SEQ: Config = {
    "vocab_size": VOCABULARY, "d_model": 36, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 6, "decoder_attention_heads": 6, "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 44, "max_position_embeddings": 32, "init_std": 0.2, "use_cache": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5: Config = {
    "vocab_size": VOCABULARY, "d_model": 36, "d_kv": 8, "d_ff": 40, "num_layers": 2,
    "num_decoder_layers": 2, "num_heads": 6, "use_cache": False, "decoder_start_token_id": 0,
}
IMAGE: Config = {
    "hidden_size": 36, "num_attention_heads": 6, "intermediate_size": 40, "num_hidden_layers": 2,
    "image_size": 32, "patch_size": 8, "initializer_range": 0.2, "num_labels": 7,
}
STAGES: Config = {"num_labels": 7, "image_size": 32, "initializer_range": 0.2}
SOUND: Config = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "num_attention_heads": 6,
    "intermediate_size": 40, "num_hidden_layers": 2, "conv_dim": (20, 24, 28),
    "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 2), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "num_labels": 7,
    "classifier_proj_size": 20, "initializer_range": 0.2, "num_codevectors_per_group": 8,
    "codevector_dim": 16, "proj_codevector_dim": 16, "apply_spec_augment": False,
}
SSM: Config = {
    "vocab_size": VOCABULARY, "hidden_size": 36, "state_size": 6, "num_hidden_layers": 2,
    "intermediate_size": 72, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2, "time_step_rank": 5,
}
CLIP_TEXT: Config = {
    "vocab_size": VOCABULARY, "hidden_size": 36, "num_attention_heads": 6,
    "intermediate_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
CLIP_IMAGE: Config = {
    "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 56, "num_hidden_layers": 2,
    "image_size": 32, "patch_size": 8, "num_labels": 7,
}
TOWERS: Config = {
    "text_config": CLIP_TEXT, "vision_config": CLIP_IMAGE, "projection_dim": 24, "num_labels": 7,
}

_MAMBA2 = {"num_heads": 6, "head_dim": 12, "n_groups": 2, "expand": 2, "chunk_size": 4}
_HYBRID = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 6,
           "mamba_d_conv": 3, "mamba_expand": 2, "mamba_chunk_size": 4}
_SWIN = {"embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
_LINEAR_ATTENTION = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 6,
    "linear_value_head_dim": 10, "linear_conv_kernel_dim": 3,
    "layer_types": ["linear_attention", "full_attention"],
}

FAMILIES = (
    # Decoders: rotary, learned and ALiBi positions, shared and split heads, parallel blocks.
    Family("AutoModelForCausalLM", CACHELESS, text, {
        "llama": {}, "mistral": {"sliding_window": 6}, "ministral": {}, "ministral3": {},
        "arcee": {}, "apertus": {}, "cwm": {"sliding_window": 6}, "seed_oss": {},
        "qwen2": {}, "qwen3": {}, "gemma": {}, "gemma2": {}, "gemma3_text": {},
        "vaultgemma": {}, "gemma3n_text": {"vocab_size_per_layer_input": VOCABULARY,
                                            "hidden_size_per_layer_input": 12,
                                            "laurel_rank": 8, "num_kv_shared_layers": 0,
                                            "activation_sparsity_pattern": None},
        "phi": {}, "phi3": {}, "stablelm": {}, "starcoder2": {},
        "gpt2": {}, "gpt_bigcode": {}, "openai-gpt": {},
        "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
        "gpt_neox": {}, "gpt_neox_japanese": {"intermediate_multiple_size": 2},
        "gptj": {"rotary_dim": 4}, "codegen": {"num_attention_heads": 4, "rotary_dim": 4},
        "opt": {"ffn_dim": 40, "word_embed_proj_dim": 48}, "xglm": {"ffn_dim": 40},
        "bloom": {}, "falcon": {}, "mpt": {"expansion_ratio": 2}, "ctrl": {"dff": 40},
        "olmo": {}, "olmo2": {}, "olmo3": {}, "cohere": {}, "cohere2": {}, "granite": {},
        "glm": {}, "glm4": {}, "persimmon": {}, "biogpt": {}, "smollm3": {}, "nemotron": {},
        "helium": {}, "ernie4_5": {}, "exaone4": {}, "hunyuan_v1_dense": {}, "bitnet": {},
        "diffllama": {}, "doge": {}, "nanochat": {}, "jais2": {}, "hyperclovax": {},
        "internlm3": {}, "modernbert-decoder": {}, "youtu": MLA, "minicpm3": MLA,
        "megatron-bert": {"is_decoder": True}, "trocr": {"decoder_layers": 2,
                                                            "decoder_ffn_dim": 40},
        "xlnet": {"n_layer": 2, "d_inner": 40}, "xlm": {"n_layers": 2, "emb_dim": 48},
        "reformer": {"attention_head_size": 8, "axial_pos_embds": False,
                     "attn_layers": ["local", "local"], "is_decoder": True,
                     "local_attn_chunk_length": 4, "feed_forward_size": 40},
    }),
    # Mixtures of experts.
    Family("AutoModelForCausalLM", MOE, text, {
        "mixtral": {}, "qwen2_moe": {}, "qwen3_moe": {}, "olmoe": {}, "flex_olmo": {},
        "granitemoe": {}, "granitemoeshared": {"shared_intermediate_size": 20},
        "jetmoe": {"kv_channels": 8, "num_key_value_heads": 3}, "phimoe": {},
        "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
                 "ffn_config": {"ffn_hidden_size": 28, "moe_num_experts": 5, "moe_top_k": 2}},
        "deepseek_v2": {**MLA, "topk_method": "greedy"}, "deepseek_v3": MLA, "dots1": MLA,
        "glm4_moe": {"first_k_dense_replace": 1}, "glm4_moe_lite": MLA,
        "ernie4_5_moe": {"moe_num_experts": 5, "moe_k": 2, "moe_layer_start_index": 1},
        "gpt_oss": {"sliding_window": 6}, "minimax_m2": {}, "afmoe": {"num_dense_layers": 1},
        "hunyuan_v1_moe": {"moe_topk": 2}, "minimax": {"block_size": 4},
    }),
    # State spaces and other recurrences, alone and beside attention.
    Family("AutoModelForCausalLM", SSM, text, {
        "mamba": {}, "falcon_mamba": {}, "mamba2": _MAMBA2,
        "rwkv": {"attention_hidden_size": 36, "intermediate_size": 40},
    }),
    Family("AutoModelForCausalLM", {**MOE, **_HYBRID}, text, {
        "bamba": {"attn_layer_indices": [1]},
        "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                  "expert_layer_offset": 1, "mamba_dt_rank": 5, "use_mamba_kernels": False},
        "zamba": {"n_mamba_heads": 2, "attention_head_dim": 16, "attention_hidden_size": 96,
                  "num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1,
                  "mamba_dt_rank": 5, "use_mamba_kernels": False},
        "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"],
                   "use_mamba_kernels": False, "mamba_ngroups": 2, "mamba_headdim": 16,
                   "n_mamba_heads": 6, "chunk_size": 4, "adapter_rank": 8,
                   "attention_head_dim": 16, "attention_hidden_size": 96},
        "falcon_h1": {"mamba_d_ssm": 96},
        "granitemoehybrid": {"layer_types": ["mamba", "attention"],
                             "shared_intermediate_size": 20},
        "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp"],
                       "mamba_num_heads": 6, "mamba_head_dim": 16, "n_groups": 2,
                       "ssm_state_size": 6, "chunk_size": 4},
        "recurrent_gemma": {"lru_width": 48, "num_hidden_layers": 3, "attention_window_size": 16},
        "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 40},
        "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        "qwen3_next": _LINEAR_ATTENTION, "qwen3_5_text": _LINEAR_ATTENTION,
        "olmo_hybrid": _LINEAR_ATTENTION,
    }),
    # Encoders.
    Family("AutoModelForMaskedLM", TEXT, text, {
        "bert": {}, "roberta": {}, "roberta-prelayernorm": {}, "albert": {"embedding_size": 20},
        "distilbert": {"hidden_dim": 40}, "electra": {"embedding_size": 20}, "ernie": {},
        "camembert": {}, "xlm-roberta": {}, "xlm-roberta-xl": {}, "data2vec-text": {},
        "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"],
                       "position_buckets": 8, "norm_rel_ebd": "layer_norm",
                       "share_att_key": True},
        "mpnet": {}, "modernbert": {"local_attention": 4, "global_attn_every_n_layers": 2},
        "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 48, "n_head": 6,
                   "d_head": 8, "d_inner": 40},
        "longformer": {"attention_window": 4}, "big_bird": {"attention_type": "original_full"},
        "nystromformer": {"num_landmarks": 9, "segment_means_seq_len": 9},
        "convbert": {"embedding_size": 20, "head_ratio": 2, "conv_kernel_size": 3},
        "squeezebert": {"embedding_size": 48, "q_groups": 2, "k_groups": 2, "v_groups": 2,
                        "post_attention_groups": 1, "intermediate_groups": 2,
                        "output_groups": 2},
        "fnet": {}, "layoutlm": {}, "roformer": {"embedding_size": 20},
        "rembert": {"input_embedding_size": 20, "output_embedding_size": 28},
        "mobilebert": {"embedding_size": 20, "intra_bottleneck_size": 24, "true_hidden_size": 24,
                       "num_feedforward_networks": 2},
        "ibert": {}, "esm": {"mask_token_id": 3, "position_embedding_type": "rotary",
                             "token_dropout": False},
        "flaubert": {"n_layers": 2, "emb_dim": 48}, "yoso": {"use_expectation": True},
        "luke": {"entity_vocab_size": 10, "entity_emb_size": 12},
        "xmod": {"default_language": "en_XX"},
        "nomic_bert": {}, "eurobert": {}, "mra": {}, "tapas": {},
        "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20,
                     "pronunciation_embed_dim": 8, "shape_embed_dim": 12},
    }),
    Family("AutoModel", TEXT, text, {
        "canine": {"num_hash_buckets": 16, "local_transformer_stride": 4}, "splinter": {},
        "gte": {}, "bert-generation": {},
    }),
    # Encoder-decoders.
    Family("AutoModelForSeq2SeqLM", SEQ2SEQ, pair, {
        "bart": {}, "mbart": {}, "pegasus": {}, "marian": {}, "blenderbot": {},
        "blenderbot-small": {}, "m2m_100": {}, "plbart": {},
        "led": {"attention_window": 4, "max_encoder_position_embeddings": 32,
                "max_decoder_position_embeddings": 16},
        "mvp": {}, "pegasus_x": {"block_size": 4, "num_global_tokens": 4},
        "bigbird_pegasus": {"attention_type": "original_full"},
        "nllb-moe": {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
        "fsmt": {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY,
                 "langs": ["en", "de"]},
        "prophetnet": {"hidden_size": 36, "num_encoder_layers": 2, "num_decoder_layers": 2,
                       "num_encoder_attention_heads": 6, "num_decoder_attention_heads": 6},
    }),
    Family("AutoModelForSeq2SeqLM", T5, pair, {
        "t5": {}, "mt5": {}, "umt5": {}, "t5gemma": {"encoder": CACHELESS, "decoder": CACHELESS},
    }),
    Family("AutoModelForSeq2SeqLM", T5, masked_pair, {
        "longt5": {"local_radius": 3},
        "switch_transformers": {"num_experts": 4, "num_sparse_encoder_layers": 1,
                                "num_sparse_decoder_layers": 1},
    }),
    Family("AutoModelForSpeechSeq2Seq", {**SEQ2SEQ, "num_mel_bins": 16}, speech, {
        "speech_to_text": {"max_source_positions": 24, "max_target_positions": 16,
                           "input_feat_per_channel": 16, "conv_channels": 20},
    }),
    Family("AutoModelForSpeechSeq2Seq", {**SEQ2SEQ, "num_mel_bins": 16},
           partial(speech, turned=True), {
        "whisper": {"max_source_positions": 12, "max_target_positions": 16},
    }),
    # Vision transformers.
    Family("AutoModelForImageClassification", IMAGE, picture, {
        "vit": {}, "beit": {}, "data2vec-vision": {"use_relative_position_bias": True},
        "dinov2": {"mlp_ratio": 2}, "dinov2_with_registers": {"mlp_ratio": 2}, "vit_msn": {},
        "ijepa": {},
    }),
    Family("DeiTForImageClassification", IMAGE, picture, {"deit": {}}),
    Family("AutoModelForImageClassification", STAGES, partial(picture, size=64), {
        "mobilevitv2": {"width_multiplier": 0.5},
    }),
    Family("LevitForImageClassification", IMAGE, partial(picture, size=64), {
        "levit": {"hidden_sizes": [24, 32, 48], "num_attention_heads": [2, 3, 4],
                  "depths": [1, 1, 1], "key_dim": [8, 8, 8], "patch_size": 16,
                  "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2], "image_size": 64},
    }),
    Family("AutoModel", IMAGE, picture, {
        "vitdet": {"mlp_ratio": 2, "num_channels": 3, "window_size": 2,
                   "pretrain_image_size": 32, "window_block_indices": [0]},
        "dinov3_vit": {"num_register_tokens": 2, "hidden_size": 48},
        "yolos": {"image_size": [32, 32], "num_detection_tokens": 5},
    }),
    Family("AutoModel", IMAGE, noisy_picture, {
        "vit_mae": {"mask_ratio": 0.0, "decoder_num_attention_heads": 4},
    }),
    # Hierarchical and convolutional vision.
    Family("AutoModelForImageClassification", STAGES, picture, {
        "swin": _SWIN, "swinv2": _SWIN, "donut-swin": _SWIN,
        "convnext": {"hidden_sizes": [20, 24, 32, 36], "depths": [1, 1, 1, 1]},
        "convnextv2": {"hidden_sizes": [20, 24, 32, 36], "depths": [1, 1, 1, 1]},
        "resnet": {"embedding_size": 20, "hidden_sizes": [24, 32, 40, 48],
                   "depths": [1, 1, 2, 1]},
        "regnet": {"embedding_size": 16, "hidden_sizes": [24, 32, 40, 48],
                   "depths": [1, 1, 2, 1], "groups_width": 8},
        "bit": {"embedding_size": 16, "hidden_sizes": [32, 48, 64, 96], "depths": [1, 1, 1, 1],
                "num_groups": 4},
        "mobilenet_v1": {"depth_multiplier": 0.5}, "mobilenet_v2": {"depth_multiplier": 0.5},
        "mobilevit": {"hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48,
                                                                           64],
                      "num_attention_heads": 4, "expand_ratio": 2.0},
        "segformer": {"hidden_sizes": [16, 24, 32, 48], "num_attention_heads": [1, 2, 4, 6],
                      "depths": [1, 1, 1, 1], "mlp_ratios": [2, 2, 2, 2]},
        "poolformer": {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]},
        "cvt": {"embed_dim": [12, 24, 36], "num_heads": [1, 2, 3], "depth": [1, 2, 3]},
        "pvt": {"hidden_sizes": [16, 24, 32, 48], "num_attention_heads": [1, 2, 4, 6],
                "depths": [1, 1, 1, 1], "mlp_ratios": [2, 2, 2, 2]},
        "pvt_v2": {"hidden_sizes": [16, 24, 32, 48], "num_attention_heads": [1, 2, 4, 6],
                   "depths": [1, 1, 1, 1], "mlp_ratios": [2, 2, 2, 2]},
        "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320,
                         "depthwise_padding": []},
        "focalnet": {"embed_dim": 24, "depths": [1, 1], "focal_levels": [2, 2],
                     "focal_windows": [3, 3], "hidden_sizes": [24, 48], "patch_size": 4},
        "hiera": {"embed_dim": 24, "image_size": [32, 32], "patch_stride": [4, 4],
                  "patch_size": [7, 7], "patch_padding": [3, 3], "depths": [1, 1, 1],
                  "num_heads": [2, 4, 8], "num_query_pool": 1, "masked_unit_size": [4, 4],
                  "embed_dim_multiplier": 2.0},
        "swiftformer": {"embed_dims": [16, 24, 32, 48], "depths": [1, 1, 1, 1]},
        "hgnet_v2": {"stem_channels": [3, 8, 16], "stage_in_channels": [16, 24, 32, 40],
                     "stage_mid_channels": [8, 12, 16, 20], "stage_out_channels": [24, 32, 40,
                                                                                   48],
                     "stage_num_blocks": [1, 1, 1, 1], "hidden_sizes": [24, 32, 40, 48],
                     "embedding_size": 16, "depths": [1, 1, 1, 1]},
        "textnet": {}, "pp_lcnet": {},
    }),
    # Segmentation, depth and detection.
    Family("AutoModelForDepthEstimation", IMAGE, picture, {
        "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
                "neck_hidden_sizes": [16, 20, 24, 28], "fusion_hidden_size": 16,
                "is_hybrid": False},
        "glpn": {"hidden_sizes": [16, 24, 32, 48], "num_attention_heads": [1, 2, 4, 6],
                 "depths": [1, 1, 1, 1], "mlp_ratios": [2, 2, 2, 2],
                 "decoder_hidden_size": 24},
    }),
    Family("AutoModelForSemanticSegmentation", STAGES, picture, {
        "upernet": {"hidden_size": 24, "pool_scales": [1, 2], "auxiliary_in_channels": 32,
                    "auxiliary_channels": 20,
                    "backbone_config": {"model_type": "convnext", "hidden_sizes": [20, 24, 32, 36],
                                        "depths": [1, 1, 1, 1],
                                        "out_features": ["stage1", "stage2", "stage3",
                                                         "stage4"]}},
    }),
    Family("AutoModelForObjectDetection", SEQ2SEQ, picture, {
        "detr": {"num_queries": 5, "use_timm_backbone": False, "use_pretrained_backbone": False,
                 "backbone": None,
                 "backbone_config": {"model_type": "resnet", "embedding_size": 20,
                                     "hidden_sizes": [24, 32, 40, 48], "depths": [1, 1, 1, 1],
                                     "out_features": ["stage4"]}},
    }),
    Family("AutoModelForVideoClassification", IMAGE, video, {
        "timesformer": {"num_frames": 4},
        "videomae": {"num_frames": 4}, "vivit": {"num_frames": 4, "tubelet_size": [2, 8, 8]},
    }),
    # Sound.
    Family("AutoModelForCTC", SOUND, wave, {
        "wav2vec2": {}, "hubert": {}, "wavlm": {}, "unispeech": {}, "unispeech-sat": {},
        "sew": {"squeeze_factor": 2}, "data2vec-audio": {"num_conv_pos_embeddings": 2},
        "sew-d": {"squeeze_factor": 2, "position_buckets": 8, "max_position_embeddings": 64},
        "wav2vec2-conformer": {},
    }),
    Family("AutoModelForAudioClassification", IMAGE, partial(spectrum, name="input_values"), {
        "audio-spectrogram-transformer": {"max_length": 24, "num_mel_bins": 16},
    }),
    Family("AutoModelForCTC", SOUND, spectrum, {
        "wav2vec2-bert": {"feature_projection_input_dim": 16},
    }),
    # Images and text.
    Family("AutoModel", TOWERS, both, {
        "clip": {}, "chinese_clip": {},
        "siglip": {"text_config": {**CLIP_TEXT, "projection_size": 48}},
        "clipseg": {}, "metaclip_2": {},
        "altclip": {"text_config": {**CLIP_TEXT, "project_dim": 24}},
        "align": {"text_config": CLIP_TEXT, "vision_config": {
            "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320,
            "image_size": 32}, "projection_dim": 80},
        "blip": {"text_config": {**CLIP_TEXT, "encoder_hidden_size": 48}}, "git": CLIP_TEXT,
        "vilt": {**CLIP_TEXT, "image_size": 32, "patch_size": 8},
        "groupvit": {}, "owlvit": {},
    }),
)


def _config(kind: str, given: Config, defaults: Config) -> Any:
    """A configuration of a type: its own rows, and those defaults that it knows."""
    cls = transformers.CONFIG_MAPPING[kind]
    known = cls()
    names = getattr(cls, "attribute_map", {})
    merged = {names.get(k, k): v for k, v in defaults.items()
              if k in names or (hasattr(known, k) and not _computed(cls, k))}
    return cls(**{**merged, **{names.get(k, k): v for k, v in given.items()}})


def _computed(cls: type, name: str) -> bool:
    return isinstance(inspect.getattr_static(cls, name, None), property)


def build(family: Family, kind: str, seed: int = 0) -> Built:
    """Return the model in eval mode and its keyword inputs."""
    config = _config(kind, family.rows[kind], family.defaults)
    with seeded(seed):
        cls = getattr(transformers, family.cls)
        make = cls.from_config if family.cls.startswith("Auto") else cls._from_config
        module = randomise_all(make(config, dtype=torch.float32))
        inputs = family.inputs()
    if "use_cache" in inspect.signature(module.forward).parameters:
        inputs["use_cache"] = False
    return module, inputs


MODELS: dict[str, Callable[[], Built]] = {
    kind: partial(build, family, kind) for family in FAMILIES for kind in family.rows}
