"""Adapters of every type of peft, made for the tiny Llama."""

import copy

import pytest
import torch

from spacompiler.models_zoo import load

peft = pytest.importorskip("peft")
FAST = {"target": "body=60%", "importance": "magnitude", "align": 1, "prove": False,
        "latency": False}
LINEARS = ["q_proj", "up_proj", "down_proj"]

# variant -> (type, options); each type that KINDS says merges stands here at least once
VARIANTS = {
    "lora": ("LORA", {"r": 4}),
    "lora-rs": ("LORA", {"r": 4, "use_rslora": True}),
    "lora-bias": ("LORA", {"r": 4, "lora_bias": True}),
    "lora-base-bias": ("LORA", {"r": 4, "bias": "lora_only"}),
    "lora-embedding": ("LORA", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "lora-head": ("LORA", {"r": 4, "target_modules": ["lm_head", "q_proj"]}),
    "lora-saved-module": ("LORA", {"r": 4, "modules_to_save": ["lm_head"]}),
    "lora-tokens": ("LORA", {"r": 4, "trainable_token_indices": [1, 2]}),
    "dora": ("LORA", {"r": 4, "use_dora": True}),
    "pissa": ("LORA", {"r": 4, "init_lora_weights": "pissa"}),
    "olora": ("LORA", {"r": 4, "init_lora_weights": "olora"}),
    "orthogonal": ("LORA", {"r": 4, "init_lora_weights": "orthogonal"}),
    "mica": ("LORA", {"r": 4, "init_lora_weights": "mica"}),
    "adalora": ("ADALORA", {"init_r": 4, "total_step": 10}),
    "adamss": ("ADAMSS", {"r": 4}),
    "beft": ("BEFT", {}),
    "boft": ("BOFT", {"boft_block_size": 4}),
    "c3a": ("C3A", {"block_size": 8}),
    "deft": ("DEFT", {"r": 4}),
    "delora": ("DELORA", {"r": 4}),
    "fourierft": ("FOURIERFT", {"n_frequency": 20, "scaling": 50.0}),
    "frod": ("FROD", {}),
    "glora": ("GLORA", {"r": 4}),
    "gralora": ("GRALORA", {"r": 4, "gralora_k": 2}),
    "hira": ("HIRA", {"r": 4}),
    "hra": ("HRA", {"r": 4}),
    "ia3": ("IA3", {"feedforward_modules": ["down_proj"]}),
    "ln-tuning": ("LN_TUNING", {"target_modules": ["input_layernorm", "norm"]}),
    "loha": ("LOHA", {"r": 4}),
    "lokr": ("LOKR", {"r": 4}),
    "miss": ("MISS", {"r": 4}),
    "miss-bat": ("MISS", {"r": 4, "init_weights": "bat"}),
    "miss-mini": ("MISS", {"r": 4, "mini_r": 4, "init_weights": "mini"}),
    "oft": ("OFT", {"r": 0, "oft_block_size": 4}),
    "osf": ("OSF", {"effective_rank": 4}),
    "peanut": ("PEANUT", {"r": 4}),
    "psoft": ("PSOFT", {"r": 4}),
    "pvera": ("PVERA", {"r": 4}),
    "randlora": ("RANDLORA", {"r": 4}),
    "road": ("ROAD", {"group_size": 8}),
    "shira": ("SHIRA", {"r": 2, "random_seed": 0}),
    "supertuning": ("SUPERTUNING", {}),
    "tinylora": ("TINYLORA", {}),
    "trainable-tokens": ("TRAINABLE_TOKENS", {"token_indices": [1, 2, 3],
                                              "target_modules": ["embed_tokens"]}),
    "unilora": ("UNILORA", {"r": 4, "theta_d_length": 64}),
    "vblora": ("VBLORA", {"r": 4, "num_vectors": 8, "vector_length": 8}),
    "vera": ("VERA", {"r": 4}),
    "waveft": ("WAVEFT", {"n_frequency": 20}),
}


def llama():
    """The tiny Llama with logits below 1, whose float32 rounding is then below 1e-6."""
    module, inputs = load("llama-gqa").build()
    with torch.no_grad():
        module.lm_head.weight.mul_(0.1)
    inputs["input_ids"][0, :3] = torch.tensor([1, 2, 3])  # the tokens that token adapters change
    return module, inputs


def tuned(base, kind, options, seed=1, size=0.03):
    """An adapter whose every trained array is away from its initial value."""
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind]](
        **{"target_modules": LINEARS, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peft.get_peft_model(base, config)
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(torch.randn_like(p) * size)
    return model.eval()


def stored(path, variant="lora", base=None, **kwargs):
    """Save an adapter and return its directory with the adapted model's results."""
    module, inputs = base or llama()
    kind, options = VARIANTS[variant] if isinstance(variant, str) else variant
    model = tuned(copy.deepcopy(module), kind, options, **kwargs)
    model.save_pretrained(path)
    return path, run(model, inputs)


def run(model, inputs):
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return getattr(out, "logits", out)
