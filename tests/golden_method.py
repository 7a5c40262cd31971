#!/usr/bin/env python3
"""Make tiny random AV/AR pairs, and what PyTorch computes with them for the method itself.

    $NLA_VENV/bin/python tests/golden_method.py        same environment as golden.py; no argument

tests/golden/method_tokenizer/{chatml,gemma}/ are two byte-level tokenizers of some 400 ids: without BOS, and with a BOS
that a TemplateProcessing adds. tests/golden/pair_<family>/ holds av/ and ar/, laid out as released checkpoints are, and
two files for the tests. texts.json: `av_prompt` (the rendered chat), `explanations` (3 texts). golden.safetensors,
float32 and int64, eager attention, T prompt tokens, V ids, L layers of the AV, D wide:

    vectors                  [3, D]     stored raw; their norms are 0.8, 8 and 80
    prompt_ids               [T]        the AV prompt as one user message, rendered and tokenised once
    marker_position          [1]        p
    logits                   [3, V]     of the last prompt position, row p of the embeddings being
                                        v * injection_scale / ||v|| (v itself where injection_scale is null), set
                                        after Gemma's scaling by sqrt(D)
    decoded                  [3, 20]    greedy ids after it, not stopped by any end-of-turn token
    residuals_first_vector   [L, T, D]  the stream after every block, for vector 0
    ar_ids_0 .. ar_ids_2     [T_i]      the AR template filled with explanation i, with BOS where the tokenizer has one
    ar_out                   [3, D]     blocks 0..K, no final norm, then the value head, at the last token
    mse_nrm, cos             [3]        of ar_out[i] against vectors[i]
    var_nrm, meannorm        [1]        over the 3 vectors
    fve_nrm                  [1]        1 - mean(mse_nrm) / var_nrm

With n(x) = s x / ||x||, s = mse_scale or sqrt(D), everything in float64 before the last rounding:
mse_nrm = sum (n(pred) - n(v))^2 / D, which is 2 (1 - cos) when s = sqrt(D) and s^2 / D times that otherwise;
var_nrm = mean over v of sum (n(v) - m)^2 / D, m = mean of n(v);
meannorm = mean over v of the mse_nrm of the constant prediction n(m).

The AV and the AR of a pair have weights of their own, so that a test which mixes the two up fails.
"""

import golden  # first: it sets what PyTorch must see before it is imported

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

N_VECTORS = 3
N_DECODED = 20
NORMS = torch.tensor([0.8, 8.0, 80.0])

# A greedy token must win by this much, or another order of summation could choose another one.
MIN_MARGIN = 5e-3

# ---------------------------------------------------------------------------------------------------------------------
# Texts

MARKER = "\u320e"

AV_TEMPLATE = (
    "A vector was taken from inside a language model while it read a text. It stands below as one mark. Say in plain "
    "words what the model had in mind there: two or three short paragraphs, the most important for the next words "
    "first, the last one on the token just read and what must follow it. Write between <explanation> and "
    "</explanation>.\n\n<concept>{injection_char}</concept>"
)

AR_TEMPLATE = (
    "What a language model had in mind at one point of a text, in words:\n"
    "<explanation>\n{explanation}\n</explanation>\n<vector>"
)

EXPLANATIONS = [
    # Ends in a letter: the newline of the template stays a token of its own.
    "A recipe for bread: flour, water and salt have been named, each with its weight.\n\n"
    "The last token is a comma in that list, so one more thing to weigh out comes next",
    # Ends in a full stop, which takes the template's newline with it into one token.
    "A letter home draws to its close. The writer thanks a friend; a name must follow.",
    # Ends in a character of three bytes, none of them merged.
    "A form in two languages: \u201cGr\u00f6\u00dfe \u2265 3 m\u201d stands by the name Jos\u00e9 N\u00fa\u00f1ez.\n\n"
    "What must follow is a short reply in German: \u201eDanke\u201c",
]

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

# Qwen's pattern and not GPT-2's: it keeps ".\n" in one piece, so that the merge below can join it.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# In order of rank, in the byte alphabet (G with a dot is the space, C with a dot the newline). The first two make the
# marker's three bytes one token, the third joins a full stop and the newline after it. The rest are the commonest pairs
# of the texts above: without them the prompts, and the files, would be twice as long.
MERGES = """
    ã+Ī ãĪ+İ .+Ċ Ġ+t a+n o+r o+n Ġ+i s+t Ġt+h Ġ+m Ġ+w Ġth+e a+t e+x Ġ+f r+e d+e Ġ+a l+an Ġi+n a+d d+s e+n Ġ+on
    Ġm+o de+l Ġw+h i+n at+i ati+on ex+p exp+lan explan+ation l+o a+g ex+t Ġ+b Ġon+e <+/ lo+w or+ds u+st Ġ+p Ġ+re
    Ġb+e Ġi+t Ġmo+del Ġw+ords an+d k+en l+a or+t Ġ+and a+r c+e c+on ce+p cep+t con+cept s+i st+an Ġre+ad Ġwh+at
    a+s Ġ+h Ġ+n ag+e e+r g+u gu+age lan+guage o+m v+e Ġ+language Ġ+s Ġt+o c+t ct+or i+t in+d l+low o+llow
    ve+ctor Ġf+ollow Ġf+or Ġh+ad Ġm+ind Ġm+ust Ġt+ext h+ort l+e la+st r+a r+it si+de stan+ds w+o Ġ+last Ġ+stands
    Ġf+r Ġn+ext Ġs+hort Ġt+wo Ġto+ken <+concept I+t S+a Sa+y W+rit Writ+e a+ken ag+ra agra+p agrap+h agraph+s
    an+t ar+agraphs ar+k e+en i+le i+r ir+st j+ust la+in m+p mp+ort mport+ant re+e t+w tw+een Ġ+< Ġ+</ Ġ+It
    Ġ+Say Ġ+Write Ġ+just Ġ+or Ġ+vector Ġa+s Ġbe+low Ġbe+tween Ġf+irst Ġfr+om
"""

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Renders as Gemma 3's does, for messages that are plain strings; images and the check of the roles' order are left out.
GEMMA_TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
    {{- first_user_prefix if loop.first else '' }}
    {{- message['content'] | trim }}
    {{- '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""

# Specials come after the vocabulary, as in Qwen's files, or open it, as in Gemma's.
CHATML_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GEMMA_SPECIALS = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
GEMMA_SPECIALS += ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]


def byte_alphabet():
    """The characters that stand for bytes: the visible ones of Latin-1 for themselves, the rest from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) for byte in visible] + [chr(0x100 + i) for i in range(len(hidden))]


def tokenizer_json(kind):
    merges = [tuple(merge.split("+")) for merge in MERGES.split()]
    tokens = byte_alphabet() + [left + right for left, right in merges]
    post_processor = None
    if kind == "gemma":
        tokens = GEMMA_SPECIALS + tokens
        bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
        post_processor = {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [tokens.index("<bos>")], "tokens": ["<bos>"]}},
        }
        specials = {token: i for i, token in enumerate(GEMMA_SPECIALS)}
    else:
        specials = {token: len(tokens) + i for i, token in enumerate(CHATML_SPECIALS)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": post_processor,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            # Both spellings of a merge are in the wild.
            "merges": [" ".join(pair) if kind == "gemma" else list(pair) for pair in merges],
        },
    }


def tokenizer_config(kind):
    # Without the class, transformers would rebuild the tokenizer of config.json's family and drop our pre-tokenizer.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if kind == "gemma":
        config |= {"bos_token": "<bos>", "eos_token": "<end_of_turn>", "pad_token": "<pad>"}
        return config | {"chat_template": GEMMA_TEMPLATE}
    return config | {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}


def write_tokenizer(directory, kind):
    # On few lines: with one token a line the indentation would be half the file.
    text = json.dumps(tokenizer_json(kind), ensure_ascii=False, separators=(",", ":"))
    (directory / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    golden.write_json(directory / "tokenizer_config.json", tokenizer_config(kind))


# ---------------------------------------------------------------------------------------------------------------------
# Pairs

CHATML_VOCABULARY = 256 + len(MERGES.split()) + len(CHATML_SPECIALS)
GEMMA_VOCABULARY = 256 + len(MERGES.split()) + len(GEMMA_SPECIALS)

# Smaller than golden.py's in all but the vocabulary; still no multiples of 16.
SIZES = {
    "vocab_size": CHATML_VOCABULARY,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 512,
    "bos_token_id": CHATML_VOCABULARY - 3,
    "eos_token_id": CHATML_VOCABULARY - 1,
    "torch_dtype": "bfloat16",
}

LLAMA = {**golden.LLAMA, **SIZES, "rope_theta": 10000.0, "tie_word_embeddings": False}
# Qwen2 has no head_dim key: it is hidden_size / num_attention_heads.
QWEN2 = {**golden.QWEN2, **SIZES, "num_attention_heads": 4, "tie_word_embeddings": True}
del QWEN2["head_dim"]
QWEN3 = {**golden.QWEN3, **SIZES, "hidden_size": 48, "num_attention_heads": 3, "head_dim": 8}
QWEN3["tie_word_embeddings"] = True

# Not the released pattern of 6, so that the AR has a global layer too (the fourth) and its list has to be cut.
GEMMA3_TEXT = {
    **golden.GEMMA3,
    **SIZES,
    "vocab_size": GEMMA_VOCABULARY,
    "num_hidden_layers": 7,
    "head_dim": 12,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 3,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "pad_token_id": GEMMA_SPECIALS.index("<pad>"),
    "bos_token_id": GEMMA_SPECIALS.index("<bos>"),
    "eos_token_id": [GEMMA_SPECIALS.index("<eos>"), GEMMA_SPECIALS.index("<end_of_turn>")],
}

GEMMA3_WRAPPER = {
    **golden.GEMMA3_WRAPPER,
    "boi_token_index": GEMMA_SPECIALS.index("<start_of_image>"),
    "eoi_token_index": GEMMA_SPECIALS.index("<end_of_image>"),
    "image_token_index": GEMMA_SPECIALS.index("<image_soft_token>"),
    "eos_token_id": GEMMA3_TEXT["eos_token_id"],
    "text_config": {key: value for key, value in GEMMA3_TEXT.items() if key not in ("architectures", "torch_dtype")},
}


@dataclass(frozen=True)
class Pair:
    av_config: dict
    ar_config: dict  # of all layers: it is cut when the AR is written
    layer: int  # K
    seed: int
    tokenizer: str  # a directory of method_tokenizer
    older_keys: bool  # actor/critic for av/ar
    injection_scale: float | None
    mse_scale: float | str | None  # None: the key is left out
    ar_keeps_norm: bool = False


PAIRS = {
    "llama": Pair(
        av_config=LLAMA,
        # The two checkpoints of a pair need not have one dtype.
        ar_config={**LLAMA, "torch_dtype": "float32"},
        layer=2,
        seed=202,
        tokenizer="chatml",
        older_keys=False,
        injection_scale=4.5,
        mse_scale=None,
        ar_keeps_norm=True,
    ),
    "qwen2": Pair(
        av_config=QWEN2,
        ar_config=QWEN2,
        layer=2,
        seed=210,
        tokenizer="chatml",
        older_keys=True,
        injection_scale=150,
        mse_scale="sqrt_d_model",
    ),
    "qwen3": Pair(
        av_config=QWEN3,
        ar_config=QWEN3,
        layer=2,
        seed=238,
        tokenizer="chatml",
        older_keys=False,
        injection_scale=None,
        mse_scale=5.5,
    ),
    "gemma3": Pair(
        av_config=GEMMA3_WRAPPER,
        ar_config=GEMMA3_TEXT,
        layer=4,
        seed=250,
        tokenizer="gemma",
        older_keys=True,
        injection_scale=12.5,
        mse_scale=6.25,
    ),
}


def generator(seed, purpose):
    """A stream of its own for every purpose, so that one more draw somewhere moves nothing else."""
    return torch.Generator().manual_seed(1000 * purpose + seed)


def cut_config(config, n_layers):
    """The AR's configuration: per-layer lists cut with the number of layers."""
    cut = {**config, "num_hidden_layers": n_layers}
    if "layer_types" in cut:
        cut["layer_types"] = cut["layer_types"][:n_layers]
    return cut


def write_av(directory, pair):
    directory.mkdir(parents=True)
    golden.write_json(directory / "config.json", pair.av_config)
    case = golden.Case(pair.av_config, pair.seed)
    weights = golden.random_weights(case, transformers.AutoConfig.from_pretrained(directory).get_text_config())
    golden.write_weights(directory, golden.wrapped(weights, case) if golden.is_wrapper(case) else weights, 1)
    write_tokenizer(directory, pair.tokenizer)


def write_ar(directory, pair):
    directory.mkdir(parents=True)
    golden.write_json(directory / "config.json", cut_config(pair.ar_config, pair.layer + 1))
    # Never the AV's weights: see the docstring.
    case = golden.Case(pair.ar_config, 50 + pair.seed)
    weights = golden.random_weights(case, transformers.AutoConfig.from_pretrained(directory))
    weights.pop("lm_head.weight", None)
    if not pair.ar_keeps_norm:
        del weights["model.norm.weight"]
    golden.write_weights(directory, weights, 1)
    d = pair.ar_config["hidden_size"]
    # Far enough from the identity, and from symmetry, that leaving it out or transposing it shows.
    head = torch.eye(d) + 0.1 * torch.randn(d, d, generator=generator(pair.seed, 3))
    save_file({"weight": head}, directory / "value_head.safetensors")
    write_tokenizer(directory, pair.tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Sidecars


def block_scalar(text):
    """A YAML literal block without a final newline, to stand under a key two columns in."""
    return "|-\n" + "\n".join("    " + line if line else "" for line in text.split("\n"))


def template_scalar(text, pair):
    # JSON's quoted strings are YAML's: one pair has its templates with escapes.
    return json.dumps(text) if pair.tokenizer == "gemma" else block_scalar(text)


def sidecar_text(pair, av, facts):
    """nla_meta.yaml, by hand: a library would write one spelling of everything. `facts` are the checked token ids."""
    actor, critic = ("actor", "critic") if pair.older_keys else ("av", "ar")
    layer_key = "num_hidden_layers" if pair.older_keys else "extraction_layer_index"
    scale = "null" if pair.injection_scale is None else pair.injection_scale
    lines = [
        "kind: nla_model",
        "schema_version: 1",
        f"role: {actor if av else critic}",
        f"stage: {'rl' if av else 'ar_sft'}",
        "base_checkpoint: random/" + pair.ar_config["model_type"],
        f"d_model: {pair.ar_config['hidden_size']}",
        "extraction:",
        f"  injection_scale: {scale}",
        *([] if pair.mse_scale is None else [f"  mse_scale: {pair.mse_scale}"]),
        "tokens:",
        "  injection_char: " + ('"\\u320E"' if pair.older_keys else MARKER),
        f"  injection_token_id: {facts['marker']}",
        f"  injection_left_neighbor_id: {facts['left']}",
        f"  injection_right_neighbor_id: {facts['right']}",
        f"  critic_suffix_ids: {facts['suffix']}",
        "prompt_templates:",
        f"  {actor}: {template_scalar(AV_TEMPLATE, pair)}",
        f"  {critic}: {template_scalar(AR_TEMPLATE, pair)}",
        f"{critic}:",
        f"  {layer_key}: {pair.layer}",
        *([] if pair.older_keys else ["lab_notes: {by: someone}"]),
    ]
    text = "\n".join(lines) + "\n"
    parsed = yaml.safe_load(text)
    if parsed["prompt_templates"] != {actor: AV_TEMPLATE, critic: AR_TEMPLATE}:
        sys.exit("golden_method.py: the sidecar's templates do not read back")
    if parsed["tokens"]["injection_char"] != MARKER or parsed["tokens"]["critic_suffix_ids"] != facts["suffix"]:
        sys.exit("golden_method.py: the sidecar's tokens do not read back")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def load_tokenizer(directory):
    """The checkpoint's tokenizer as users get it, checked to be the one that was written."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    plain = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in [AV_TEMPLATE, AR_TEMPLATE, MARKER, *EXPLANATIONS]:
        for special in (False, True):
            ids = tokenizer(text, add_special_tokens=special)["input_ids"]
            if ids != plain.encode(text, add_special_tokens=special).ids:
                sys.exit(f"golden_method.py: {directory}: AutoTokenizer and the file's own tokenizer differ")
    return tokenizer


def av_prompt(tokenizer):
    """The rendered chat, and its ids. The template already holds a BOS where there is one: no other is added."""
    messages = [{"role": "user", "content": AV_TEMPLATE.replace("{injection_char}", MARKER)}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    at_once = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    if ids != list(at_once):
        sys.exit("golden_method.py: apply_chat_template tokenises its text in another way")
    return text, ids


def ar_inputs(tokenizer):
    """The ids of the three filled AR templates."""
    return [tokenizer(AR_TEMPLATE.replace("{explanation}", text))["input_ids"] for text in EXPLANATIONS]


def token_facts(tokenizer, prompt_ids, ar_ids):
    """What the sidecar says about ids, and p; each checked as the program must check it at start-up."""
    marker = tokenizer(MARKER, add_special_tokens=False)["input_ids"]
    if len(marker) != 1 or prompt_ids.count(marker[0]) != 1:
        sys.exit("golden_method.py: the marker is not one token that stands once in the prompt")
    p = prompt_ids.index(marker[0])
    suffix = tokenizer(AR_TEMPLATE.split("{explanation}")[1], add_special_tokens=False)["input_ids"][1:]
    if any(ids[-len(suffix) :] != suffix for ids in ar_ids):
        sys.exit("golden_method.py: the AR template's suffix is not the same after every explanation")
    # The reason why its first token is dropped must be among the texts, or the tests would not need the rule.
    if len({ids[-len(suffix) - 1] for ids in ar_ids}) == 1:
        sys.exit("golden_method.py: no explanation merges with the suffix's first token")
    return {
        "marker": marker[0],
        "left": prompt_ids[p - 1],
        "right": prompt_ids[p + 1],
        "suffix": suffix,
        "position": p,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The AV


def last_logits(model, text_model, embeddings):
    return model.lm_head(text_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0, -1])


def check_embeddings(model, text_model, ids):
    """inputs_embeds must mean what the ids mean: Gemma must not scale them again, here or in the whole model."""
    embeddings = text_model.embed_tokens(ids[None])
    from_ids = model(input_ids=ids[None], use_cache=False).logits[0, -1]
    whole = model(inputs_embeds=embeddings, use_cache=False).logits[0, -1]
    # lm_head on one row alone sums in another order, so the last bits may differ; a second scaling would show.
    for logits in (whole, last_logits(model, text_model, embeddings)):
        if not torch.allclose(logits, from_ids, atol=1e-5):
            sys.exit("golden_method.py: inputs_embeds do not give the logits of input_ids")


def injected(text_model, ids, position, vector, injection_scale):
    embeddings = text_model.embed_tokens(ids[None]).clone()  # after Gemma's scaling, which its embedding module does
    scale = 1.0 if injection_scale is None else injection_scale / vector.norm()
    embeddings[0, position] = vector * scale
    return embeddings


def greedy(model, text_model, embeddings, name):
    """The first logits, and N_DECODED ids. The whole sequence is run again for each: no cache to be wrong."""
    first, ids = None, []
    for _ in range(N_DECODED):
        logits = last_logits(model, text_model, embeddings)
        first = logits if first is None else first
        best, second = logits.topk(2).values
        if best - second < MIN_MARGIN:
            sys.exit(f"golden_method.py: {name}: token {len(ids)} wins by {best - second:.1e} only: take another seed")
        ids.append(int(logits.argmax()))
        embeddings = torch.cat([embeddings, text_model.embed_tokens(torch.tensor([ids[-1:]]))], dim=1)
    return first, ids


def block_outputs(text_model, embeddings):
    outputs = []

    def keep(_module, _inputs, output):
        outputs.append((output[0] if isinstance(output, tuple) else output)[0].clone())

    handles = [layer.register_forward_hook(keep) for layer in text_model.layers]
    text_model(inputs_embeds=embeddings, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(outputs)


def run_av(directory, pair, ids, position, vectors):
    case = golden.Case(pair.av_config, pair.seed)
    model = golden.load_reference(directory, case)
    text_model = model.model.language_model if golden.is_wrapper(case) else model.model
    ids = torch.tensor(ids)
    check_embeddings(model, text_model, ids)
    as_causal_lm = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if not torch.allclose(as_causal_lm(input_ids=ids[None]).logits, model(input_ids=ids[None]).logits, atol=1e-4):
        sys.exit(f"golden_method.py: {directory}: AutoModelForCausalLM reads another model")

    prompts = [injected(text_model, ids, position, vector, pair.injection_scale) for vector in vectors]
    runs = [greedy(model, text_model, prompt, f"{directory} vector {i}") for i, prompt in enumerate(prompts)]
    return {
        "logits": torch.stack([logits for logits, _ in runs]),
        "decoded": torch.tensor([decoded for _, decoded in runs]),
        "residuals_first_vector": block_outputs(text_model, prompts[0]),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The AR and the scores


def run_ar(directory, pair, ar_ids):
    """[3, D]: the cut model with the identity for its final norm, then the head."""
    model, report = transformers.AutoModel.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    expected = set() if pair.ar_keeps_norm else {"norm.weight"}
    if set(report["missing_keys"]) != expected or report["unexpected_keys"] or report["mismatched_keys"]:
        sys.exit(f"golden_method.py: {directory}: transformers did not load the AR whole: {report}")
    if len(model.layers) != pair.layer + 1:
        sys.exit(f"golden_method.py: {directory}: {len(model.layers)} blocks, not {pair.layer + 1}")
    model.norm = torch.nn.Identity()
    head = load_file(directory / "value_head.safetensors")["weight"]
    states = [model.eval()(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1] for ids in ar_ids]
    return torch.stack([head @ state for state in states])


def scores(ar_out, vectors, mse_scale):
    d = vectors.shape[1]
    s = mse_scale if isinstance(mse_scale, float) else d**0.5

    def n(x):
        return s * x / x.norm(dim=-1, keepdim=True)

    gold, pred = n(vectors.double()), n(ar_out.double())
    mean = gold.mean(dim=0)
    mse_nrm = (pred - gold).square().mean(dim=1)
    var_nrm = (gold - mean).square().mean(dim=1).mean()
    values = {
        "mse_nrm": mse_nrm,
        "cos": torch.nn.functional.cosine_similarity(ar_out.double(), vectors.double()),
        "var_nrm": var_nrm[None],
        "meannorm": (n(mean) - gold).square().mean()[None],
        "fve_nrm": (1 - mse_nrm.mean() / var_nrm)[None],
    }
    return {name: value.float() for name, value in values.items()}


# ---------------------------------------------------------------------------------------------------------------------


def make_pair(name, pair):
    directory = golden.GOLDEN / f"pair_{name}"
    shutil.rmtree(directory, ignore_errors=True)
    av, ar = directory / "av", directory / "ar"
    write_av(av, pair)
    write_ar(ar, pair)

    tokenizer = load_tokenizer(av)
    prompt_text, prompt_ids = av_prompt(tokenizer)
    ar_ids = ar_inputs(tokenizer)
    facts = token_facts(tokenizer, prompt_ids, ar_ids)
    for role in (av, ar):
        (role / "nla_meta.yaml").write_text(sidecar_text(pair, role == av, facts), encoding="utf-8")

    d = pair.ar_config["hidden_size"]
    directions = torch.randn(N_VECTORS, d, generator=generator(pair.seed, 4))
    vectors = directions / directions.norm(dim=1, keepdim=True) * NORMS[:, None]
    with torch.no_grad():
        ar_out = run_ar(ar, pair, ar_ids)
        tensors = {
            "vectors": vectors,
            "prompt_ids": torch.tensor(prompt_ids),
            "marker_position": torch.tensor([facts["position"]]),
            **run_av(av, pair, prompt_ids, facts["position"], vectors),
            **{f"ar_ids_{i}": torch.tensor(ids) for i, ids in enumerate(ar_ids)},
            "ar_out": ar_out,
            **scores(ar_out, vectors, pair.mse_scale),
        }
    save_file(tensors, directory / "golden.safetensors")
    golden.write_json(directory / "texts.json", {"av_prompt": prompt_text, "explanations": EXPLANATIONS})


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.backends.mkldnn.enabled = False
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    made = [golden.GOLDEN / "method_tokenizer", *(golden.GOLDEN / f"pair_{name}" for name in PAIRS)]
    shutil.rmtree(made[0], ignore_errors=True)
    for kind in ("chatml", "gemma"):
        (made[0] / kind).mkdir(parents=True)
        write_tokenizer(made[0] / kind, kind)
    for name, pair in PAIRS.items():
        make_pair(name, pair)
    size = sum(file.stat().st_size for directory in made for file in directory.rglob("*") if file.is_file())
    print(f"{len(PAIRS)} pairs in {golden.GOLDEN}, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
