#!/usr/bin/env python3
"""Make the golden checkpoints: tiny random models, and what PyTorch computes with them.

    ./build.sh golden           makes the environment of tests/requirements.txt and runs this; no other argument

Each tests/golden/<case>/ is a Hugging Face directory (config.json, model.safetensors or shards with their index) plus
golden.safetensors: what `transformers` computes from it in float32 with eager attention, for T = 40 tokens. All tensors
are float32 under the names of HF's modules, whatever prefix the checkpoint's tensors have:

    input_ids                    [T] int64
    model.embed_tokens           [T, D]  after Gemma's scaling by sqrt(D)
    model.layers.N.self_attn     [T, D]  the module's output: after o_proj, before any norm and the residual add
    model.layers.N.mlp           [T, D]  the module's output: after down_proj, before any norm and the residual add
    model.layers.N               [T, D]  the residual stream after block N
    model.norm                   [T, D]
    lm_head                      [T, V]

The configurations are written out by hand, because both spellings of the RoPE keys must be covered and a library
writes only one. Sizes are awkward on purpose (no multiples of 16), so that every vector tail is used. Each case's
numbers come from its own seed, so a run gives the same bytes every time.
"""

import os

# Before PyTorch is imported: the plainest code paths, so that another x86-64 processor gives the same bytes.
os.environ["ATEN_CPU_CAPABILITY"] = "default"
os.environ["MKL_CBWR"] = "COMPATIBLE"
os.environ["HF_HUB_OFFLINE"] = "1"

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parent / "golden"
N_TOKENS = 40

# ---------------------------------------------------------------------------------------------------------------------
# Configurations

SIZES = {
    "vocab_size": 151,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# With head_dim 10 and theta 50 the wavelengths are 6, 14, 30, 66 and 144 positions: the first is kept (below 32/4), the
# next two lie in the smooth part, the last two (above 32/1) are divided by the factor. 40 tokens go past the 32.
LLAMA3_THETA = 50.0
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **SIZES,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

LLAMA3 = {**LLAMA, "rope_theta": LLAMA3_THETA, "rope_scaling": LLAMA3_SCALING, "torch_dtype": "float32"}

LLAMA_NEW_ROPE = {**LLAMA, "rope_parameters": {"rope_theta": LLAMA3_THETA, **LLAMA3_SCALING}, "dtype": "bfloat16"}

# head_dim and num_key_value_heads are left out: they default to hidden / heads and to the number of heads.
LLAMA_TIED = {
    **{key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}

LLAMA_F16 = {**LLAMA, "rope_theta": 10000.0, "torch_dtype": "float16"}

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    **SIZES,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    # As the released files have it: a window is named, and switched off.
    "sliding_window": 8,
    "use_sliding_window": False,
    "max_window_layers": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    **SIZES,
    "head_dim": 16,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}

QWEN3_SHARDED = {**QWEN3, "torch_dtype": "bfloat16"}

# Seven layers, so that one global layer (the sixth) stands between sliding ones.
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    **SIZES,
    "num_hidden_layers": 7,
    "head_dim": 12,
    "query_pre_attn_scalar": 20,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rms_norm_eps": 1e-6,
    "sliding_window": 8,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}

GEMMA3_TEXT = {
    **GEMMA3,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window_pattern": 6,
    "torch_dtype": "float32",
}

GEMMA3_NEW_ROPE = {
    **GEMMA3,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
    "dtype": "bfloat16",
}

# Like Google's 12B file, text_config says only what differs from the class: 8 heads over 4, query_pre_attn_scalar 256,
# rms_norm_eps, both RoPE bases, the pattern of 6 and the tied head are left to the defaults.
GEMMA3_WRAPPER = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "image_token_index": 150,
    "boi_token_index": 148,
    "eoi_token_index": 149,
    "mm_tokens_per_image": 4,
    "text_config": {
        "model_type": "gemma3_text",
        "vocab_size": 151,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 7,
        "head_dim": 6,
        "sliding_window": 8,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "vision_use_head": False,
    },
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True)
class Case:
    config: dict
    seed: int
    n_shards: int = 1
    # Mean of the q/k norm weights' distance from neutral. Scores that are divided by sqrt(256) need larger q and k, or
    # every softmax would be uniform and would test nothing.
    qk_norm_shift: float = 0.0
    # Another case whose config.json means the same in the other spelling.
    same_rope_as: str | None = None


CASES = {
    "llama3": Case(LLAMA3, seed=1),
    "llama_new_rope": Case(LLAMA_NEW_ROPE, seed=2, same_rope_as="llama3"),
    "llama_tied": Case(LLAMA_TIED, seed=3),
    "llama_f16": Case(LLAMA_F16, seed=4),
    "qwen2": Case(QWEN2, seed=5),
    "qwen3": Case(QWEN3, seed=6),
    "qwen3_sharded": Case(QWEN3_SHARDED, seed=7, n_shards=3),
    "gemma3_text": Case(GEMMA3_TEXT, seed=8),
    "gemma3_new_rope": Case(GEMMA3_NEW_ROPE, seed=9, same_rope_as="gemma3_text"),
    "gemma3_wrapper": Case(GEMMA3_WRAPPER, seed=10, qk_norm_shift=2.0),
}

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def is_wrapper(case):
    return case.config["model_type"] == "gemma3"


def checkpoint_dtype(config):
    return getattr(torch, config.get("dtype") or config["torch_dtype"])


def random_weights(case, text_config):
    """The text model's weights under HF's plain names, in the checkpoint's dtype."""
    with torch.device("meta"):  # names and shapes only
        model = transformers.AutoModelForCausalLM.from_config(text_config)
    generator = torch.Generator().manual_seed(case.seed)
    neutral_norm = 0.0 if text_config.model_type == "gemma3_text" else 1.0
    weights = {}
    for name, parameter in sorted(model.named_parameters()):  # a tied lm_head is not listed twice
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            value = neutral_norm + case.qk_norm_shift + 0.3 * noise
        elif name.endswith("norm.weight"):
            value = neutral_norm + 0.3 * noise
        elif name.endswith(".bias"):
            value = 0.3 * noise
        else:
            # 0.2 * sqrt(40) > 1: activations keep their size from layer to layer, and softmaxes are far from uniform.
            value = 0.2 * noise
        weights[name] = value.to(checkpoint_dtype(case.config))
    return weights


def wrapped(weights, case):
    """The names of a released Gemma 3 checkpoint: a prefix, and vision tensors that a text model must pass over."""
    named = {f"language_model.{name}": weight for name, weight in weights.items()}
    vision = case.config["vision_config"]
    generator = torch.Generator().manual_seed(1000 + case.seed)
    dtype = checkpoint_dtype(case.config)
    layer = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    for name, shape in (
        ("multi_modal_projector.mm_input_projection_weight", (vision["hidden_size"], 40)),
        (f"{layer}.weight", (vision["hidden_size"], vision["hidden_size"])),
        (f"{layer}.bias", (vision["hidden_size"],)),
    ):
        named[name] = torch.randn(shape, generator=generator).to(dtype)
    return named


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_weights(directory, weights, n_shards):
    if n_shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    weight_map = {}
    for shard in range(n_shards):
        file = f"model-{shard + 1:05d}-of-{n_shards:05d}.safetensors"
        # Dealt out in turn, so that every layer needs more than one shard.
        members = names[shard::n_shards]
        save_file({name: weights[name] for name in members}, directory / file, metadata={"format": "pt"})
        weight_map |= {name: file for name in members}
    total_size = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / "model.safetensors.index.json", index)


# ---------------------------------------------------------------------------------------------------------------------
# Golden tensors


def load_reference(directory, case):
    """The checkpoint as transformers reads it from disk, in float32; every text weight must come from the file."""
    auto = transformers.AutoModelForImageTextToText if is_wrapper(case) else transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    missing = [name for name in report["missing_keys"] if "vision_tower" not in name and "multi_modal" not in name]
    if missing or report["unexpected_keys"] or report["mismatched_keys"] or report["error_msgs"]:
        sys.exit(f"golden.py: {directory.name}: transformers did not load the checkpoint whole: {report}")
    return model.eval()


def record_outputs(model, text_model, input_ids):
    """Run the model once and return each module's output under its plain HF name."""
    modules = {"model.embed_tokens": text_model.embed_tokens, "model.norm": text_model.norm, "lm_head": model.lm_head}
    for i, layer in enumerate(text_model.layers):
        modules[f"model.layers.{i}"] = layer
        modules[f"model.layers.{i}.self_attn"] = layer.self_attn
        modules[f"model.layers.{i}.mlp"] = layer.mlp

    outputs = {}

    def keep(name):
        def hook(_module, _inputs, output):
            tensor = output[0] if isinstance(output, tuple) else output
            outputs[name] = tensor.squeeze(0).clone()  # without the batch axis

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    with torch.no_grad():
        logits = model(input_ids=input_ids.unsqueeze(0), use_cache=False).logits.squeeze(0)
    for handle in handles:
        handle.remove()
    if not torch.equal(logits, outputs["lm_head"]):
        sys.exit("golden.py: the model changes its logits after lm_head; the golden tensors would not show it")
    return outputs


def make_case(name, case):
    directory = GOLDEN / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_json(directory / "config.json", case.config)

    text_config = transformers.AutoConfig.from_pretrained(directory).get_text_config()
    weights = random_weights(case, text_config)
    write_weights(directory, wrapped(weights, case) if is_wrapper(case) else weights, case.n_shards)

    model = load_reference(directory, case)
    text_model = model.model.language_model if is_wrapper(case) else model.model
    generator = torch.Generator().manual_seed(2000 + case.seed)
    # Not the last three ids, which the wrapper's config gives to images.
    input_ids = torch.randint(0, text_config.vocab_size - 3, (N_TOKENS,), generator=generator)
    golden = {"input_ids": input_ids, **record_outputs(model, text_model, input_ids)}
    save_file(golden, directory / "golden.safetensors")


def check_spellings():
    """Both spellings of a configuration must mean the same to transformers, or a golden case proves nothing."""
    for name, case in CASES.items():
        if case.same_rope_as is None:
            continue
        old = transformers.AutoConfig.from_pretrained(GOLDEN / case.same_rope_as)
        new = transformers.AutoConfig.from_pretrained(GOLDEN / name)
        for key in ("rope_parameters", "layer_types"):
            if getattr(old, key, None) != getattr(new, key, None):
                sys.exit(f"golden.py: {key} differs between {case.same_rope_as} and {name}")


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.backends.mkldnn.enabled = False
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name, case in CASES.items():
        make_case(name, case)
    check_spellings()
    size = sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file())
    print(f"{len(CASES)} golden cases in {GOLDEN}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
