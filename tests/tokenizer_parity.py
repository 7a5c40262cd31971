#!/usr/bin/env python3
"""Compares tokenizer.c and chat.c with Hugging Face `tokenizers`: ids, decoded texts, chat renderings, speed.

  tokenizer_parity.py [--lines N] [DIR...]   compares, for each DIR with a tokenizer.json (by default the ones known to
                                             this project); exit status 1 on a mismatch
  tokenizer_parity.py --golden               writes tests/golden/tokenizer: cut-down tokenizers and what HF makes of them
  tokenizer_parity.py --unicode              prints the two tables of code points in tokenizer.c

Needs the packages `tokenizers` and `jinja2`, and a C compiler: it builds tests/tokenizer_bench.c.
"""

import os

os.environ["RAYON_NUM_THREADS"] = "1"  # before tokenizers is imported: one thread on both sides
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import inspect
import json
import random
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

import jinja2
import jinja2.sandbox
import tokenizers
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden/tokenizer"
SHARED = ROOT.parent / "shared/tokenizers"
MODELS = Path(os.environ.get("NLA_MODELS", Path.home() / "models"))
KNOWN = {
    "smollm2": MODELS / "SmolLM2-135M-Instruct",
    "qwen3": SHARED / "qwen3",
    "llama3": SHARED / "llama3_1",
    "gemma3": SHARED / "gemma3",
}
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]


# ----------------------------------------------------------------------------------------------------- our side


def build(folder):
    program = folder / "tokenizer_bench"
    sources = ["tests/tokenizer_bench.c", "tokenizer.c", "tokenizer_file.c", "chat.c", "safetensors.c"]
    libraries = ["-lpcre2-8", "-lutf8proc", "-lm"]
    command = [os.environ.get("CC", "cc"), "-std=gnu17", "-O3", "-g", "-I.", *sources, "-o", str(program), *libraries]
    subprocess.run(command, cwd=ROOT, check=True)
    return program


def records(data, width):
    """Splits what tokenizer_bench writes: a count in front of each record."""
    at = 0
    while at < len(data):
        (n,) = struct.unpack_from("=I", data, at)
        at += 4
        yield data[at : at + n * width]
        at += n * width


def run_bench(program, mode, tokenizer, packed, width):
    """The records of both outputs, and the seconds of both."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "first", Path(folder) / "second"]
        run = subprocess.run([program, mode, tokenizer, *files], input=packed, stdout=subprocess.PIPE, check=True)
        return [list(records(f.read_bytes(), width)) for f in files], [float(s) for s in run.stdout.split()]


def our_ids(program, tokenizer, lines):
    packed = b"".join(struct.pack("=I", len(line)) + line for line in lines)
    outputs, seconds = run_bench(program, "encode", tokenizer, packed, 4)
    return [[list(memoryview(r).cast("i")) for r in output] for output in outputs], seconds


def our_texts(program, tokenizer, id_lists):
    packed = b"".join(struct.pack(f"=I{len(ids)}i", len(ids), *ids) for ids in id_lists)
    return run_bench(program, "decode", tokenizer, packed, 1)


# ----------------------------------------------------------------------------------------------------- lines

WORDS = """the of and to in a is that for it as was with be by on not he his but at are this have from or had an they
which one you were all her she there would their we him been has when who will no more if out so up said what its about
than into them can only other time new some could these two may first then do any like my now over such our man even
most made after also did many off before must well back through years where much your way down should because long
each just state those people too mr how little good world make very year still see own work men day get here old
tokenizer activation explanation residual stream internationalization Straße naïve façade coöperate résumé Ångström
HTTPServer getElementById snake_case_name kebab-case CamelCase __init__ 0xDEADBEEF 3.14159 1e-9 v2.0.1 don't we'll I'd
they're it's you've I'm DON'T WE'LL I'D THEY'RE IT'S YOU'VE I'M DoN'T 'tis o'clock rock'n'roll it’s don’t ſ it'ſ 'ſ""".split()
SENTENCES = """The quick brown fox jumps over the lazy dog.|Natural language autoencoders explain activations in words.
敏捷的棕色狐狸跳过了懒狗。人工智能正在改变世界|私はガラスを食べられます。それは私を傷つけません。トークナイザー|나는 유리를 먹을 수 있어요. 그래도 아프지 않아요
أنا قادر على أكل الزجاج و هذا لا يؤلمني|אני יכול לאכול זכוכית וזה לא מזיק לי|मैं काँच खा सकता हूँ और मुझे उससे कोई चोट नहीं पहुंचती
ฉันกินกระจกได้ แต่มันไม่ทำให้ฉันเจ็บ|Я могу есть стекло, оно мне не вредит.|Μπορώ να φάω σπασμένα γυαλιά χωρίς να πάθω τίποτα
Tôi có thể ăn thủy tinh mà không hại gì.|মই কাচ খাব পাৰোঁ|நான் கண்ணாடி சாப்பிடுவேன்|ខ្ញុំអាចញុំកញ្ចក់បាន|ကျွန်တော် မှန်စားနိုင်တယ်
👩‍👩‍👧‍👦👍🏽🇩🇪🏳️‍🌈❤️‍🔥🧑🏿‍🚀1️⃣|𝕳𝖊𝖑𝖑𝖔 𝒲ℴ𝓇𝓁𝒹 ①②③ ⅷ Ⅻ ½ ¾ ²³ ٣٤٥ ५६७ 一二三|zA̡͊͠͝LGO Ḩ̵̘͕͔́̄ȇ̶͇ C̷̙̲̝͖ͭ̏ͥͮ͟Oͮ͏̮̪̝͍M̲̖͊̒ͪͩͬ̚̚͜Ȇ̴̟̟͙̞ͩ͌͝S̨̥̫͎̭ͯ̿̔̀ͅ
e\u0301 E\u0301 a\u0308\u0323 a\u0323\u0308 \u1100\u1161\u11a8 \uac00\u11a8 \u0915\u093c \ufb2a \u2126 \u212b \u1e9b\u0323 \u0344|for (int i = 0; i < n; i++) { sum += a[i]*b[i]; }
\tif x == None:\n\t\treturn {"a": [1, 2.5, -3e10], 'b': f"{y!r}"}  # comment|<html><body class="x">&nbsp;</body></html>
SELECT * FROM t WHERE id=42 AND name LIKE '%foo%';|https://example.org/a/b?c=d&e=%20f#frag user@mail.example""".replace(
    "\n", "|"
).split("|")
SPACES = [" ", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\r\n", "\r", "\v", "\f", "\u00a0", "\u0085", "\u180e", "\u200b"]
SPACES += ["\u200c", "\u200d", "\u2028", "\u2029", "\u202f", "\u205f", "\u2060", "\u3000", "\ufeff", "\x1c", "\x1f", "\x00"]
SPACES += ["\u2003", "\u1680", "\u2581", "\u2581\u2581", " \n", "\n ", " \t "]


def code_lines():
    """Source lines of this Python's standard library: code, and English in comments."""
    for module in (argparse, inspect, json, random, subprocess, tempfile, unicodedata):
        if hasattr(module, "__file__") and module.__file__.endswith(".py"):
            yield from Path(module.__file__).read_text(encoding="utf-8").splitlines()


def every_code_point():
    """Every code point once between letters, digits, spaces, apostrophes, marks and newlines: 48 to a line."""
    for i in range(0, len(CODE_POINTS), 48):
        chars = map(chr, CODE_POINTS[i : i + 48])
        yield "".join(f"a{c}b {c}1'{c}e '{c} {c}{c}\u0301\n{c}\n" for c in chars)


def random_line(rng, added, code):
    """One line of words, scripts, spaces, digits, marks, control characters and added tokens, at random."""
    parts = []
    for _ in range(rng.randrange(1, 14)):
        kind = rng.random()
        if kind < 0.45:
            parts.append(rng.choice((" ", "", " ")) + rng.choice(WORDS))
        elif kind < 0.55:
            sentence = rng.choice(SENTENCES)
            start = rng.randrange(len(sentence))
            parts.append(sentence[start : start + rng.randrange(1, 30)])
        elif kind < 0.63:
            parts.append(rng.choice(SPACES) * rng.choice((1, 1, 1, 2, 3, 7, 31, 40)))
        elif kind < 0.68:
            parts.append(str(rng.randrange(10 ** rng.randrange(1, 15))))
        elif kind < 0.74:
            parts.append(rng.choice(code))
        elif kind < 0.80:
            token = rng.choice(added)
            parts.append(rng.choice((token, token, token[:-1], token + token, " " + token + " ", "x" + token + "y")))
        elif kind < 0.84:
            parts.append("'" + "".join(rng.choice("sStTrReEvVmMlLdD\u017f\u212a\u0130\u0131") for _ in range(2)))
        elif kind < 0.90:
            parts.append("".join(chr(rng.choice(CODE_POINTS)) for _ in range(rng.randrange(1, 6))))
        elif kind < 0.95:
            parts.append("".join(chr(rng.randrange(0x300, 0x3100)) for _ in range(rng.randrange(1, 8))))
        else:
            parts.append("".join(rng.choice("aeiouAEO\u1100\u1161\u0915") + chr(rng.randrange(0x300, 0x370)) * 2))
    return "".join(parts)


def make_lines(count, added, seed=1):
    """`count` lines or a few more, as bytes; about one in thirty is not UTF-8."""
    rng = random.Random(seed)
    code = [line for line in code_lines() if line.strip()]
    lines = [line.encode() for line in every_code_point()]
    lines += [line.encode() for line in SENTENCES + code]
    lines += [(c * n).encode() for c in SPACES + list("a0.'-_=#*<\u00e9\u4e2d\U0001f600") for n in (2, 5, 50, 300, 5000)]
    while len(lines) < count:
        line = random_line(rng, added, code).encode()
        if rng.random() < 0.05:
            broken = bytearray(line)
            for _ in range(rng.randrange(1, 5)):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            line = bytes(broken)
        lines.append(line)
    return lines


# ----------------------------------------------------------------------------------------------------- compare


def in_batches(call, items):
    """call() over slices of the items, joined, and the seconds: all of HF's encodings at once would take gigabytes."""
    results, seconds = [], 0.0
    for i in range(0, len(items), 2000):
        start = time.perf_counter()
        made = call(items[i : i + 2000])
        seconds += time.perf_counter() - start
        results += [getattr(item, "ids", item) for item in made]
    return results, seconds


def show(title, text, ours, theirs):
    print(f"  MISMATCH {title}\n    text   {text!r:.400}\n    ours   {ours!r:.400}\n    theirs {theirs!r:.400}")


def compare(title, texts, ours, theirs):
    wrong = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    for i in wrong[:5]:
        show(title, texts[i], ours[i], theirs[i])
    return len(wrong)


def random_ids(hf, rng, count):
    """Lists of ids as no text gives them: halves of characters, special tokens, ids that no token has."""
    size = hf.get_vocab_size()
    some = [i for i in (hf.token_to_id(f"<0x{b:02X}>") for b in range(256)) if i is not None]
    some = some or [i for i in range(size) if (t := hf.id_to_token(i)) and len(t) == 1]
    for _ in range(count):
        yield [
            rng.choice(some) if rng.random() < 0.5 else rng.randrange(size + 50) for _ in range(rng.randrange(1, 12))
        ]


def compare_tokenizer(program, name, folder, count):
    path = str(folder / "tokenizer.json")
    hf = Tokenizer.from_file(path)
    hf.no_truncation()
    hf.no_padding()
    added = [t.content for t in hf.get_added_tokens_decoder().values()]
    lines = make_lines(count, added)
    texts = [line.decode(errors="replace") for line in lines]

    (plain, special), seconds = our_ids(program, path, lines)
    hf_plain, hf_seconds = in_batches(lambda part: hf.encode_batch_fast(part, add_special_tokens=False), texts)
    wrong = compare("ids", texts, plain, hf_plain)
    hf_special, _ = in_batches(lambda part: hf.encode_batch_fast(part, add_special_tokens=True), texts)
    wrong += compare("ids with special tokens", texts, special, hf_special)

    id_lists = hf_special + list(random_ids(hf, random.Random(2), count // 10))
    (everything, shown), decode_seconds = our_texts(program, path, id_lists)
    hf_all, hf_decode_seconds = in_batches(lambda part: hf.decode_batch(part, skip_special_tokens=False), id_lists)
    hf_shown, _ = in_batches(lambda part: hf.decode_batch(part, skip_special_tokens=True), id_lists)
    wrong += compare("decoded", id_lists, everything, [t.encode() for t in hf_all])
    wrong += compare("decoded without special tokens", id_lists, shown, [t.encode() for t in hf_shown])

    load = float(subprocess.run([program, "load", path, "3"], stdout=subprocess.PIPE, check=True).stdout)
    megabytes = sum(map(len, lines)) / 1e6
    print(
        f"{name:10} {len(lines):8,} {wrong:10,} {megabytes / seconds[0]:9.1f} {megabytes / hf_seconds:8.1f} "
        f"{hf_seconds / seconds[0]:7.1f} {hf_decode_seconds / decode_seconds[0]:9.1f} {load:8.3f}",
        flush=True,
    )
    return wrong


# ----------------------------------------------------------------------------------------------------- chat


def read_config(folder):
    """tokenizer_config.json, of several chat templates the default one."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if isinstance(config.get("chat_template"), list):
        config["chat_template"] = next(t["template"] for t in config["chat_template"] if t["name"] == "default")
    return config


def render(config, messages, generate, date):
    """apply_chat_template, as transformers sets Jinja up for it."""

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    values = {k: v for k, v in config.items() if k.endswith("_token") and isinstance(v, str)}
    if date:
        values["date_string"] = date
    template = environment.from_string(config["chat_template"])
    return template.render(messages=messages, add_generation_prompt=generate, **values)


CONVERSATIONS = [
    [("user", "Hi")],
    [("user", "  two\n words \u3000\x1f ")],
    [("system", "Be brief."), ("user", "Hi")],
    [("system", " spaces \n"), ("user", "\tHi\n\n")],
    [("user", "Hi"), ("assistant", "Hello.")],
    [("user", "Hi"), ("assistant", " Hello. "), ("user", "And?\n")],
    [("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D")],
    [("user", "A"), ("assistant", "<think>\nwhy\n</think>\n\nB"), ("user", "C")],
    [("user", "A"), ("assistant", "<think>\nwhy\n</think>\n\nB")],
    [("user", "A"), ("assistant", "<think>x<think>\n\ny</think>z</think>\nB"), ("assistant", "no </think> C")],
    [("user", "A"), ("assistant", "</think>"), ("assistant", "<think></think>\n\n\nE"), ("assistant", "\nF")],
    [("user", "A"), ("assistant", "\n<think>\n</think>"), ("user", "<tool_response>r</tool_response>")],
    [("user", "<tool_response></tool_response>"), ("assistant", "B<think>")],
    [("user", "A"), ("system", "late"), ("user", "B")],
    [("system", "only")],
    [("assistant", "first")],
    [("user", "A"), ("user", "B")],
    [("system", ""), ("user", "")],
    [("user", "<|im_end|>{{ 1 }}{% x %}'\"\\n\u00e9\u4e2d\U0001f600")],
]


def our_chat(program, folder, conversation, generate, date):
    fields = [part.encode() for message in conversation for part in message]
    packed = b"".join(struct.pack("=I", len(f)) + f for f in fields)
    command = [program, "chat", folder, str(int(generate)), date]
    run = subprocess.run(command, input=packed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
    if run.returncode:
        return "ERROR " + run.stderr.decode().removeprefix("tokenizer_bench: ").strip()
    return run.stdout.decode()


def expected_chats(config):
    """(conversation, generation prompt, date, text or ERROR and the message) for all conversations."""
    for conversation in CONVERSATIONS:
        for generate, date in ((False, ""), (True, ""), (True, "01 Feb 2025")):
            messages = [{"role": role, "content": content} for role, content in conversation]
            try:
                text = render(config, messages, generate, date)
            except jinja2.exceptions.TemplateError as error:
                text = f"ERROR {error}"
            yield conversation, generate, date, text


def compare_chats(program, name, folder):
    config = read_config(folder)
    chats = list(expected_chats(config))
    ours = [our_chat(program, folder, conversation, generate, date) for conversation, generate, date, _ in chats]
    wrong = compare(f"chat of {name}", [c[:3] for c in chats], ours, [c[3] for c in chats])
    print(f"{name:10} {len(chats):8,} {wrong:10,}  (chat renderings)", flush=True)
    return wrong


# ----------------------------------------------------------------------------------------------------- golden files

GOLDEN_TEXTS = [
    "", " ", "  ", "\n", "a", "Hello world", " Hello  world ", "The quick brown fox jumps over the lazy dog.",
    "don't DON'T we'll WE'LL it'\u017f 'S '\u017f I'd you'RE", "1 12 123 1234 12345 3.14 \u00bd \u0663\u0664 \u2167 \u4e00",
    "tabs\t\tand\n\nnewlines\r\n \n  x", " \u00a0\u3000\u2003x\u0085y\u180ez\u200bw", "e\u0301 E\u0301 \u1100\u1161\u11a8 \u212b",
    "\u4eba\u5de5\u667a\u80fd\uff0c\u4f60\u597d", "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd", "\x00\x01\x7f",
    "for (int i = 0; i < n; i++) { x += i; }", "\u2581a \u2581\u2581b", "\ufffd \ufffe \U0010ffff", "a\u0897b \u2ffc1 \U00010d40",
    "<|im_start|>user\nHi<|im_end|>", "x<|begin_of_text|>y<|eot_id|>", "<bos><start_of_turn>user\nHi<end_of_turn>\n",
    "<|im_start|", "<think>a</think>", "</table><unused7>", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    " " * 70 + "x", "\n" * 40, "q\u0301\u0323 q\u0898\u0323", "\U00011935\U00011930", "the the the\u00e9the", "<0x41><unk>",
]  # fmt: skip


def cut_down(source, merges_kept):
    """The tokenizer with its first merges only, ids counted anew."""
    data = json.loads((source / "tokenizer.json").read_text())
    model = data["model"]
    single = {t for t in model["vocab"] if len(t) == 1}
    byte_level = "Regex" in json.dumps(data["pre_tokenizer"]) or "ByteLevel" in json.dumps(data["pre_tokenizer"])
    if not byte_level:  # of Gemma's characters, some: its bytes stand for the others
        single = {t for t in single if ord(t) < 0x100 or t in "▁\u4eba\u4f60\u5de5\u0301\u2003"}
    kept = single | {f"<0x{b:02X}>" for b in range(256)} & set(model["vocab"])
    merges = []
    for merge in model["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        if len(merges) < merges_kept and left in kept and right in kept and len(left + right) < 12:
            merges.append(merge)
            kept.add(left + right)
    model["merges"] = merges
    wanted = set("".join(GOLDEN_TEXTS).split()) | {"<unk>", "<pad>", "<eos>", "<bos>", "</table>", "<unused7>", "\n\n"}
    text = " ".join(GOLDEN_TEXTS)
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] in text or t["content"] in wanted]
    kept |= {t["content"] for t in data["added_tokens"]} & set(model["vocab"])
    order = sorted(kept, key=model["vocab"].get)
    model["vocab"] = {t: i for i, t in enumerate(order)}
    ids = dict(model["vocab"])
    for token in data["added_tokens"]:
        token["id"] = ids.setdefault(token["content"], len(ids))
    for processor in (data["post_processor"] or {}).get("processors", [data["post_processor"] or {}]):
        for special in processor.get("special_tokens", {}).values():
            special["ids"] = [ids[t] for t in special["tokens"]]
    return data


def write_golden():
    for name, source in KNOWN.items():
        folder = GOLDEN / name
        folder.mkdir(parents=True, exist_ok=True)
        data = cut_down(source, 500)
        (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n")
        config = json.loads((source / "tokenizer_config.json").read_text())
        config = {k: config.get(k) for k in ("bos_token", "eos_token", "chat_template")}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    for folder in [GOLDEN / name for name in KNOWN] + sorted(GOLDEN.glob("odd_*")):
        hf = Tokenizer.from_file(str(folder / "tokenizer.json"))
        with (folder / "expected.jsonl").open("w") as out:
            for text in GOLDEN_TEXTS if folder.name in KNOWN else ODD_TEXTS:
                ids = hf.encode(text, add_special_tokens=True).ids
                row = {"text": text, "ids": ids, "plain": hf.encode(text, add_special_tokens=False).ids}
                row |= {"decoded": hf.decode(ids, skip_special_tokens=True), "all": hf.decode(ids, skip_special_tokens=False)}
                out.write(json.dumps(row) + "\n")
    for folder in sorted(p.parent for p in GOLDEN.glob("*/tokenizer_config.json")):
        config = read_config(folder)
        with (folder / "chat.jsonl").open("w") as out:
            for conversation, generate, date, text in expected_chats(config):
                row = {"messages": conversation, "generate": generate, "date": date, "text": text}
                out.write(json.dumps(row) + "\n")


ODD_TEXTS = [
    "", " ", "abc", "a b c", "<tag> x <tag>", "x<tag>", "x <word> y", "x<word>y", "<word>", "\u00e9<word>", "a  <left>  b", "a <right>   b",
    " <both> <both> ", "  <left><left>  ", "12 34.5 \u0663", "a,b,,c", "NORM norm", "E\u0301X", "\u00c9X e\u0301", "\n<both>\u3000\u0085x", "zzz",
]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- Unicode tables


def members(pattern):
    """The code points that HF's regular expressions see in a class."""
    split = pre_tokenizers.Split(Regex(pattern), "removed")
    found = set()
    for i in range(0, len(CODE_POINTS), 4096):
        chars = CODE_POINTS[i : i + 4096]
        found |= set(chars) - {ord(c) for piece, _ in split.pre_tokenize_str("".join(map(chr, chars))) for c in piece}
    return found


def print_ranges(points, value):
    ranges = []
    for c in sorted(points):
        if ranges and ranges[-1][1] == c - 1 and value(c) == ranges[-1][2]:
            ranges[-1][1] = c
        else:
            ranges.append([c, c, value(c)])
    print("\n".join("{0x%X, 0x%X, %s}," % tuple(r) for r in ranges))


def print_unicode(program):
    """`newer`: what PCRE2 does not know, U+180E, and U+1171E, which Unicode 15 moved. `inert`: marks that utf8proc lets
    change places with marks of the lowest or the highest class, or joins to what stands before them, and HF does not."""
    unassigned = subprocess.run([program, "unassigned"], stdout=subprocess.PIPE, check=True).stdout
    newer = (set(map(int, unassigned.split())) - members(r"\p{Cn}") - set(range(0xD800, 0xE000))) | {0x180E, 0x1171E}
    names = ["LU", "LL", "LT", "LM", "LO", "MN", "MC", "ME", "ND", "NL", "NO", "PC", "PD", "PS", "PE", "PI", "PF", "PO"]
    names += ["SM", "SC", "SK", "SO", "ZS", "ZL", "ZP", "CF"]
    category = {c: name for name in names for c in members(r"\p{%s}" % name.capitalize()) & newer}
    print("newer:")
    print_ranges(newer, category.get)
    tests = {}  # text -> the code point that it tries
    for c in CODE_POINTS:
        pair = unicodedata.normalize("NFD", chr(c))
        tests |= {f"q{chr(c)}\u0334": c, f"q\u0345{chr(c)}": c}
        tests |= {pair: ord(pair[1])} if len(pair) == 2 else {}
    packed = b"".join(struct.pack("=I", len(t.encode())) + t.encode() for t in tests)
    run = subprocess.run([program, "nfc"], input=packed, stdout=subprocess.PIPE, check=True)
    nfc = normalizers.NFC()
    pairs = zip(tests.items(), records(run.stdout, 1), strict=True)
    inert = {c for (text, c), theirs in pairs if nfc.normalize_str(text) != theirs.decode()}
    print("inert:")
    print_ranges(inert, lambda c: 0)


# ----------------------------------------------------------------------------------------------------- main


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=200_000, help="lines for each tokenizer (at least 40,000)")
    parser.add_argument("--golden", action="store_true")
    parser.add_argument("--unicode", action="store_true")
    parser.add_argument("dirs", nargs="*", type=Path)
    args = parser.parse_args()
    if args.golden:
        write_golden()
        return 0
    folders = {d.name: d for d in args.dirs} or {n: d for n, d in KNOWN.items() if (d / "tokenizer.json").exists()}
    if not args.dirs:
        folders |= {f"{d.name} (cut)": d for d in sorted(GOLDEN.glob("*")) if (d / "tokenizer.json").exists()}
    with tempfile.TemporaryDirectory() as temporary:
        program = build(Path(temporary))
        if args.unicode:
            print_unicode(program)
            return 0
        print(f"tokenizers {tokenizers.__version__}, one thread each; MB/s and ratio of encoding, ratio of decoding", flush=True)
        print(f"{'':10} {'lines':>8} {'mismatches':>10} {'nla MB/s':>9} {'HF MB/s':>8} {'ratio':>7} {'decoding':>9} {'load s':>8}")
        wrong = sum(compare_tokenizer(program, name, folder, args.lines) for name, folder in folders.items())
        wrong += sum(compare_chats(program, n, d) for n, d in folders.items() if (d / "tokenizer_config.json").exists())
    print("equal" if wrong == 0 else f"{wrong} mismatches")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
