#!/usr/bin/env python3
"""Measure nla beside OpenBLAS, PyTorch and transformers on the CPU: ratios from one run, with the same number of threads.

    ~/.cache/nla/venv/bin/python tests/bench.py [linear|forward|decode|train-av|train-ar|load ...] [--model DIR] [--tokenizers DIR ...]
                                                [--nla ./nla] [--threads 2] [--rounds 5] [--quick] [--json FILE]

    linear    matrix products at the shapes of SmolLM2-135M and Qwen2.5-7B (needs no model)
    forward   2,048 tokens: one document, 8 documents, 20 documents of uneven lengths
    train-av  a step of the AV's warm start on 16 rows, all weights trained
    train-ar  a step of the AR's
    decode    100 tokens for each of 32 rows: an AV reading 32 vectors, samples of one prompt, and 32 different prompts
    load      weights and tokenizer to first use

A measurement is several rounds. In each round ours and theirs run one after the other, first a warm-up, then a few
times; the median counts. The ratio of a round is their time over ours, so more than 1 means that nla is faster. The table
gives the median over the rounds of each time and ratio, and the smallest and largest ratio. Run it on a quiet machine.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Before numpy is imported: these would have OpenBLAS use another kernel than the one it chooses for this processor.
for variable in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(variable, None)

import argparse
import ctypes
import datetime
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import safetensors.torch
import tokenizers
import torch
import transformers
import yaml

ROOT = Path(__file__).resolve().parent.parent

SMOLLM2_SHAPES = [(n, i, o) for n in (32, 512, 2048) for i, o in ((576, 576), (576, 1536), (1536, 576))]
SMOLLM2_SHAPES += [(n, 576, 49152) for n in (32, 512)]
QWEN_7B_SHAPES = [(512, 3584, 3584), (512, 3584, 18944), (512, 18944, 3584), (512, 3584, 512)]

TOTAL_TOKENS = 2048  # what nla bench forward runs
DECODE_ROWS, DECODE_TOKENS, PROMPT_TOKENS = 32, 100, 100  # the last: what nla bench decode has

WORDS = """time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work government number night point home water room mother
area money story fact month lot right study book eye job word business issue side kind head house service friend""".split()


@dataclass
class Goal:
    """A smallest ratio, or a largest time of ours in seconds."""

    ratio: float | None = None
    seconds: float | None = None

    def __str__(self):
        return f">= {self.ratio:g}x" if self.ratio else f"<= {self.seconds:g} s" if self.seconds else ""

    def met(self, ratio, seconds):
        if not (self.ratio or self.seconds):
            return ""
        return "yes" if (ratio >= self.ratio if self.ratio else seconds <= self.seconds) else "NO"


@dataclass
class Result:
    what: str
    against: str
    goal: str
    ours_s: float
    theirs_s: float
    ratio: float
    ratio_min: float
    ratio_max: float
    rate: str  # of ours and theirs, where a rate says more than a time
    met: str


class Bench:
    def __init__(self, given):
        self.nla = given.nla.resolve()
        self.threads = given.threads
        self.rounds = 1 if given.quick else given.rounds
        self.quick = given.quick
        self.results = []

    def run(self, *arguments):
        command = [str(self.nla), *map(str, arguments), "--threads", str(self.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"bench.py: {' '.join(command)}: exit status {done.returncode}: {done.stderr.strip()}")
        return done

    def nla_bench(self, *arguments):
        """Median seconds of each measurement that nla bench prints, in its order."""
        out = self.run("bench", *arguments, "--json", "--quiet").stdout
        return [json.loads(line)["median_s"] for line in out.splitlines()]

    def repeats(self, seconds):
        """How often to repeat within a round what takes about that long."""
        return 1 if self.quick or seconds > 1 else max(3, min(50, round(0.3 / seconds)))

    def alternate(self, measures):
        """Seconds of each measure in each round: {label: [round]}."""
        seconds = {label: [] for label in measures}
        for _ in range(self.rounds):
            for label, measure in measures.items():
                time.sleep(0.3)  # OpenBLAS's threads spin for a while after their last product
                seconds[label].append(measure())
        return seconds

    def add(self, what, against, goal, ours, theirs, work=0.0, unit=""):
        """One row of the table, from the rounds' seconds of ours and theirs. work: of one run, for the rate."""
        ratios = [b / a for a, b in zip(ours, theirs)]
        our_median, their_median, ratio = map(statistics.median, (ours, theirs, ratios))
        rate = f"{work / our_median:.0f} : {work / their_median:.0f} {unit}" if work else ""
        self.results.append(Result(what, against, str(goal), our_median, their_median, ratio, min(ratios), max(ratios),
                                   rate, goal.met(ratio, our_median)))  # fmt: skip
        progress(f"{what}: {ratio:.2f} of {against}")  # long runs get interrupted; this much then stays


def progress(text):
    print(f"bench.py: {text}", file=sys.stderr)


def median_seconds(action, repeat):
    """Of `repeat` runs, after a warm-up."""
    seconds = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


# ---------------------------------------------------------------------------------------------------------------------
# OpenBLAS inside numpy


def openblas_function(name, result):
    """A function of the library that numpy has loaded, whose names carry a prefix and suffix in numpy's own builds."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    library = re.search(r"\S*/[^/\s]*openblas[^/\s]*\.so\S*", maps)
    if not library:
        sys.exit("bench.py: this numpy does not use OpenBLAS")
    loaded = ctypes.CDLL(library.group())
    for full in (f"scipy_openblas_{name}64_", f"scipy_openblas_{name}", f"openblas_{name}64_", f"openblas_{name}"):
        if hasattr(loaded, full):
            function = getattr(loaded, full)
            function.restype = result
            return function
    sys.exit(f"bench.py: {library.group()} has no openblas_{name}")


def limit_threads(threads):
    openblas_function("set_num_threads", None)(threads)
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# linear


def has_bf16_dot():
    return "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def bench_linear(bench):
    shapes = SMOLLM2_SHAPES[:4] if bench.quick else SMOLLM2_SHAPES + QWEN_7B_SHAPES
    random = numpy.random.default_rng(0)
    for rows, width_in, width_out in shapes:
        shape = f"{rows},{width_in},{width_out}"
        progress(f"linear {shape}")
        flop = 2e-9 * rows * width_in * width_out
        repeat = bench.repeats(flop / 150)
        x = 2 * random.random((rows, width_in), numpy.float32) - 1
        w = 2 * random.random((width_out, width_in), numpy.float32) - 1
        y = numpy.empty((rows, width_out), numpy.float32)
        tx, tw, ty = torch.from_numpy(x), torch.from_numpy(w), torch.from_numpy(y)
        ours = ("linear", "--shape", shape, "--repeat", repeat)
        # Results go to memory that is there already, as in nla: fresh pages would cost the others a fault each.
        measures = {
            "nla": lambda: bench.nla_bench(*ours)[0],
            "OpenBLAS": lambda: median_seconds(lambda: numpy.matmul(x, w.T, out=y), repeat),
            "PyTorch": lambda: median_seconds(lambda: torch.mm(tx, tw.T, out=ty), repeat),
        }
        if has_bf16_dot():
            measures["nla bf16"] = lambda: bench.nla_bench(*ours, "--bf16")[0]
        seconds = bench.alternate(measures)
        name = f"linear {shape}"
        bench.add(name, "OpenBLAS", Goal(ratio=0.85), seconds["nla"], seconds["OpenBLAS"], flop, "GFLOP/s")
        bench.add(name, "PyTorch", Goal(), seconds["nla"], seconds["PyTorch"], flop, "GFLOP/s")
        if has_bf16_dot():
            bench.add(f"{name} --bf16", "nla fp32", Goal(ratio=1.5), seconds["nla bf16"], seconds["nla"], flop, "GFLOP/s")


# ---------------------------------------------------------------------------------------------------------------------
# forward


def uneven_lengths(count, total, random):
    """`count` lengths from half to one and a half times their mean, with this sum."""
    lengths = random.integers(total // count // 2, 3 * total // count // 2, count)
    while lengths.sum() != total:
        i = random.integers(count)
        lengths[i] += numpy.sign(total - lengths.sum())
    return lengths.tolist()


def padded(lengths, vocab_size, random):
    """Random documents as a batch for transformers, padded on the left so that every last token is in the last column."""
    longest = max(lengths)
    ids = torch.from_numpy(random.integers(0, vocab_size, (len(lengths), longest)))
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        mask[i, longest - length :] = 1
    # A batch without padding is given without mask, which lets PyTorch use its faster causal attention.
    return {"input_ids": ids, "attention_mask": mask} if min(lengths) < longest else {"input_ids": ids}


def bench_forward(bench, directory, model):
    random = numpy.random.default_rng(1)
    # nla bench forward knows documents of one length. 103 makes 20 documents, too; where attention costs as little as at
    # these lengths, uneven ones of the same sum take the same time in a packed batch, while PyTorch has to pad them.
    cases = (
        ("one document", [TOTAL_TOKENS], TOTAL_TOKENS),
        ("8 documents of 256", [256] * 8, 256),
        ("20 documents, 51 to 153 (nla: 103)", uneven_lengths(20, TOTAL_TOKENS, random), 103),
    )
    repeat = 1  # after a warm-up; the rounds repeat
    for name, lengths, max_length in cases:
        progress(f"forward of {name}")
        batch = padded(lengths, model.config.vocab_size, random)

        def forward():
            with torch.inference_mode():
                model(**batch, use_cache=False, logits_to_keep=1)

        # PyTorch's two ways to compute attention; the faster one is compared.
        trial = {}
        for way in ("sdpa", "eager"):
            model.set_attn_implementation(way)
            trial[way] = median_seconds(forward, 1)
        way = min(trial, key=trial.get)
        model.set_attn_implementation(way)
        seconds = bench.alternate({
            "nla": lambda: bench.nla_bench("forward", "--model", directory, "--max-length", max_length, "--repeat", repeat)[0],
            "PyTorch": lambda: median_seconds(forward, repeat),
        })  # fmt: skip
        bench.add(f"forward, {name}", f"PyTorch fp32, {way}", Goal(ratio=1.2), seconds["nla"], seconds["PyTorch"],
                  TOTAL_TOKENS, "tokens/s")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# decode


def hf_generate(model, batch, returned):
    """Seconds of one transformers generate of DECODE_TOKENS tokens, with its key/value cache, plain sampling."""
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=returned, use_cache=True,
            min_new_tokens=DECODE_TOKENS, max_new_tokens=DECODE_TOKENS,
            pad_token_id=model.generation_config.pad_token_id,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    given = batch["input_ids"].shape[1] if "input_ids" in batch else 0  # given as embeddings, the prompt is not repeated
    if out.shape != (DECODE_ROWS, given + DECODE_TOKENS):
        sys.exit(f"bench.py: generate made {tuple(out.shape)}")
    return seconds


def nla_generate_seconds(bench, directory, prompts):
    """As nla says it: prompts included, loading left out."""
    said = bench.run("generate", "--model", directory, "--in", prompts, "--batch", DECODE_ROWS, "--ignore-eos", "--json",
                     "--max-tokens", DECODE_TOKENS, "--temperature", 1).stderr  # fmt: skip
    return float(re.search(r"tokens in ([\d.]+) s", said).group(1))


def bench_av_decode(bench, directory, model, goal):
    """An untrained AV reads 32 vectors. transformers is given the rows of embeddings, vectors put in, and decodes those."""
    progress("decode of an AV")
    embed = model.get_input_embeddings().weight
    with tempfile.TemporaryDirectory(prefix="nla-bench-") as folder:
        av, acts, out = (str(Path(folder) / name) for name in ("av", "acts.safetensors", "out.jsonl"))
        vectors = torch.randn(DECODE_ROWS, embed.shape[1], generator=torch.Generator().manual_seed(3))
        safetensors.torch.save_file({"activation_vector": vectors}, acts)
        bench.run("init", "--model", directory, "--av", av, "--injection-scale", 100)
        meta = (Path(av) / "nla_meta.yaml").read_text(encoding="utf-8")
        marker = int(re.search(r"injection_token_id: (\d+)", meta).group(1))
        template = yaml.safe_load(meta)["prompt_templates"]["av"].replace("{injection_char}", yaml.safe_load(meta)["tokens"]["injection_char"])
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        ids = tokenizer.apply_chat_template([{"role": "user", "content": template}], add_generation_prompt=True, return_dict=False)
        rows = embed[torch.tensor(ids)].detach().repeat(DECODE_ROWS, 1, 1)
        rows[:, ids.index(marker)] = 100 * vectors / vectors.norm(dim=1, keepdim=True)
        batch = {"inputs_embeds": rows, "attention_mask": torch.ones(rows.shape[:2], dtype=torch.long)}

        def ours():
            """Scaled to all 3,200 tokens: a few of our samples end before their hundredth."""
            said = bench.run("verbalize", "--av", av, "--acts", acts, "--out", out, "--batch", DECODE_ROWS, "--json",
                             "--max-tokens", DECODE_TOKENS, "--temperature", 1).stderr  # fmt: skip
            drawn = sum(json.loads(line)["tokens"] for line in Path(out).read_text(encoding="utf-8").splitlines())
            return float(re.search(r"in ([\d.]+) s", said).group(1)) * DECODE_ROWS * DECODE_TOKENS / drawn

        seconds = bench.alternate({"nla": ours, "HF": lambda: hf_generate(model, batch, 1)})
    bench.add(f"decode, an AV reading {DECODE_ROWS} vectors", "HF generate", goal, seconds["nla"], seconds["HF"],
              DECODE_ROWS * DECODE_TOKENS, "tokens/s")  # fmt: skip


def bench_decode(bench, directory, model, tokenizer):
    random = numpy.random.default_rng(2)
    model.set_attn_implementation("sdpa")
    tokens = DECODE_ROWS * DECODE_TOKENS
    goal = Goal(ratio=3)
    bench_av_decode(bench, directory, model, goal)

    progress("decode of samples of one prompt")
    ids = torch.from_numpy(random.integers(0, model.config.vocab_size, (1, PROMPT_TOKENS)))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ours = ("decode", "--model", directory, "--samples", DECODE_ROWS, "--max-tokens", DECODE_TOKENS, "--temperature", 1)
    seconds = bench.alternate({
        "nla": lambda: bench.nla_bench(*ours, "--repeat", 1)[0],
        "HF": lambda: hf_generate(model, batch, DECODE_ROWS),
    })  # fmt: skip
    bench.add(f"decode, {DECODE_ROWS} samples of one prompt", "HF generate", goal, seconds["nla"], seconds["HF"], tokens,
              "tokens/s")  # fmt: skip

    progress("decode of different prompts")
    texts = [" ".join(random.choice(WORDS, n)) for n in random.integers(20, 120, DECODE_ROWS)]
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with tempfile.TemporaryDirectory(prefix="nla-bench-") as folder:
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        seconds = bench.alternate({
            "nla": lambda: nla_generate_seconds(bench, directory, prompts),
            "HF": lambda: hf_generate(model, batch, 1),
        })  # fmt: skip
    bench.add(f"decode, {DECODE_ROWS} different prompts", "HF generate", Goal(), seconds["nla"], seconds["HF"], tokens,
              "tokens/s")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# train

TRAIN_ROWS, TRAIN_STEPS = 16, 4


def training_rows(bench, directory, folder, rows):
    """An AV, an AR and a dataset of `rows` rows with explanations of 60 to 110 words, over random vectors."""
    random = numpy.random.default_rng(4)
    width = json.loads((directory / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    vectors = torch.randn(rows, width, generator=torch.Generator().manual_seed(5))
    acts = folder / "acts"
    acts.mkdir()
    safetensors.torch.save_file({"activation_vector": vectors, "n_raw_tokens": torch.full((rows,), 60), "row_id": torch.arange(rows).to(torch.uint64)},
                                acts / "activations.safetensors")  # fmt: skip
    texts = [" ".join(random.choice(WORDS, n)) + "." for n in random.integers(60, 110, rows)]
    (acts / "rows.jsonl").write_text("".join(json.dumps({"doc_id": str(i), "n_raw_tokens": 60, "text": "", "explanation": text}) + "\n"
                                             for i, text in enumerate(texts)), encoding="utf-8")  # fmt: skip
    (acts / "nla_meta.yaml").write_text(f"kind: nla_dataset\nstage: av_sft\nrow_count: {rows}\nextraction: {{d_model: {width}}}\n",
                                        encoding="utf-8")  # fmt: skip
    bench.run("init", "--model", directory, "--av", folder / "av", "--ar", folder / "ar", "--injection-scale", 100)
    return acts, vectors, texts


def nla_step_seconds(bench, stage, folder, acts, rows, *more):
    """Median seconds of a step, the first left out."""
    out = folder / f"run-{time.time_ns()}"
    bench.run("train", stage, f"out={out}", f"{stage}={folder / stage}", f"data={acts}", f"steps={TRAIN_STEPS}", f"batch={rows}",
              "micro=16", "save_every=1000", *more)  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.rmtree(out)
    return statistics.median(line["seconds"] for line in lines[1:])


def torch_av_step(directory, folder, vectors, texts):
    """A plain step on the same rows: padded on the right, the response's tokens alone in the loss, clipping, AdamW, fp32."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    meta = yaml.safe_load((folder / "av/nla_meta.yaml").read_text(encoding="utf-8"))
    template = meta["prompt_templates"]["av"].replace("{injection_char}", meta["tokens"]["injection_char"])
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": template}], add_generation_prompt=True, return_dict=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    responses = [tokenizer(f"<explanation>\n{text}\n</explanation>", add_special_tokens=False)["input_ids"] + [end] for text in texts]
    longest = len(prompt) + max(map(len, responses))
    ids, labels, mask = (torch.full((len(texts), longest), fill) for fill in (end, -100, 0))
    for i, response in enumerate(responses):
        n = len(prompt) + len(response)
        ids[i, :n], mask[i, :n], labels[i, len(prompt) : n] = torch.tensor(prompt + response), 1, torch.tensor(response)
    at = prompt.index(meta["tokens"]["injection_token_id"])
    injected = 100 * vectors / vectors.norm(dim=1, keepdim=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, betas=(0.9, 0.95), weight_decay=0)

    def step():
        embeddings = model.get_input_embeddings()(ids).clone()
        embeddings[:, at] = injected
        loss = model(inputs_embeds=embeddings, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def torch_ar_step(folder, vectors, texts):
    directory = folder / "ar"
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32)
    model.norm = torch.nn.Identity()
    head = torch.nn.Linear(vectors.shape[1], vectors.shape[1], bias=False)
    torch.nn.init.eye_(head.weight)
    template = yaml.safe_load((directory / "nla_meta.yaml").read_text(encoding="utf-8"))["prompt_templates"]["ar"]
    batch = tokenizer([template.replace("{explanation}", text) for text in texts], padding=True, padding_side="left", return_tensors="pt")
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, betas=(0.9, 0.95), weight_decay=0)

    def step():
        out = head(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, -1])
        loss = (2 * (1 - torch.nn.functional.cosine_similarity(out, vectors))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench_train(bench, directory, stages):
    with tempfile.TemporaryDirectory(prefix="nla-bench-") as name:
        folder = Path(name)
        acts, vectors, texts = training_rows(bench, directory, folder, TRAIN_ROWS)
        for stage, goal, step in (("av", 1.6, torch_av_step(directory, folder, vectors, texts)),
                                  ("ar", 1.2, torch_ar_step(folder, vectors, texts))):  # fmt: skip
            if stage not in stages:
                continue
            progress(f"training, {stage}")
            seconds = bench.alternate({
                "nla": lambda: nla_step_seconds(bench, stage, folder, acts, TRAIN_ROWS),
                "recomputed": lambda: nla_step_seconds(bench, stage, folder, acts, TRAIN_ROWS, "recompute=true"),
                "torch": lambda: median_seconds(step, 2),
            })  # fmt: skip
            bench.add(f"{stage.upper()} step, {TRAIN_ROWS} rows", "PyTorch", Goal(ratio=goal), seconds["nla"], seconds["torch"])
            bench.add(f"{stage.upper()} step, {TRAIN_ROWS} rows, recomputed", "PyTorch", Goal(), seconds["recomputed"], seconds["torch"])


# ---------------------------------------------------------------------------------------------------------------------
# load


def bench_load(bench, directory):
    progress("loading")
    repeat = bench.repeats(0.06)
    seconds = bench.alternate({
        "nla": lambda: bench.nla_bench("load", "--model", directory, "--repeat", repeat),
        "from_pretrained": lambda: median_seconds(lambda: transformers.AutoModelForCausalLM.from_pretrained(directory), 1),
        "from_file": lambda: median_seconds(lambda: tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")), 1),
        "AutoTokenizer": lambda: median_seconds(lambda: transformers.AutoTokenizer.from_pretrained(directory), 1),
    })  # fmt: skip
    weights, tokenizer = map(list, zip(*seconds["nla"]))
    bench.add("load weights", "AutoModelForCausalLM", Goal(seconds=0.1), weights, seconds["from_pretrained"])
    bench.add("load tokenizer", "tokenizers from_file", Goal(), tokenizer, seconds["from_file"])
    bench.add("load tokenizer", "AutoTokenizer", Goal(), tokenizer, seconds["AutoTokenizer"])


def tokenizer_goal(directory):
    """The goals that performance.md sets: by family."""
    name = directory.name.lower()
    return Goal(seconds=0.4 if "gemma" in name else 0.15 if "qwen" in name else None)


def bench_tokenizer(bench, directory):
    """A tokenizer without a model: nla's whole process, from its start to the ids of one word."""
    progress(f"loading {directory}")
    repeat = bench.repeats(0.1)
    seconds = bench.alternate({
        "nla": lambda: median_seconds(lambda: bench.run("tokenize", "--model", directory, "--json", "word"), repeat),
        "from_file": lambda: median_seconds(lambda: tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")), 1),
    })  # fmt: skip
    bench.add(f"nla tokenize, {directory.name}, whole process", "tokenizers from_file", tokenizer_goal(directory),
              seconds["nla"], seconds["from_file"])  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------


def machine_facts(bench):
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    engine = bench.run("bench", "forward", "--model", ROOT / "tests/golden/llama3", "--max-length", 100, "--repeat", 1)
    return {
        "date": str(datetime.date.today()),
        "processor": re.search(r"model name\s*: (.*)", info).group(1),
        "cores": os.cpu_count(),
        "threads": bench.threads,
        "load average": os.getloadavg()[0],
        "nla engine": re.search(r"parameters on (.*?),", engine.stderr).group(1),
        "OpenBLAS kernel": openblas_function("get_corename", ctypes.c_char_p)().decode(),
        "numpy": numpy.__version__,
        "PyTorch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, MKL {torch.backends.mkl.is_available()}",
        "transformers": transformers.__version__,
    }


def short_time(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def print_table(results):
    head = ("what", "against", "goal", "ours", "theirs", "ratio", "min-max", "ours : theirs", "met")
    lines = [head]
    for r in results:
        lines.append((r.what, r.against, r.goal, short_time(r.ours_s), short_time(r.theirs_s), f"{r.ratio:.2f}",
                      f"{r.ratio_min:.2f}-{r.ratio_max:.2f}", r.rate, r.met))  # fmt: skip
    width = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for number, line in enumerate(lines):
        print("| " + " | ".join(cell.ljust(width[i]) for i, cell in enumerate(line)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (w + 2) for w in width) + "|")


def parse_arguments():
    parts = ("linear", "forward", "decode", "train-av", "train-ar", "load")
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)} (default: all that can be run)")
    options.add_argument("--nla", type=Path, default=ROOT / "nla", help="the program (default: ./nla)")
    options.add_argument("--model", type=Path, metavar="DIR", help="a Hugging Face directory, for all but linear")
    options.add_argument("--tokenizers", type=Path, nargs="+", default=[], metavar="DIR",
                         help="directories with a tokenizer.json, to be loaded")  # fmt: skip
    options.add_argument("--threads", type=int, default=os.cpu_count(), help="of ours and theirs (default: all cores)")
    options.add_argument("--rounds", type=int, default=5, help="of ours and theirs in turn (default: 5)")
    options.add_argument("--quick", action="store_true", help="one round: shows that everything runs, measures nothing")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write facts and results here")
    given = options.parse_args()
    unknown = set(given.parts) - set(parts)
    if unknown:
        options.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    if set(given.parts) - {"linear"} and not given.model:
        options.error(f"{', '.join(given.parts)} needs --model DIR")
    if not given.parts:
        given.parts = list(parts if given.model else parts[:1])
    return given


def main():
    given = parse_arguments()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    limit_threads(given.threads)
    bench = Bench(given)
    facts = machine_facts(bench)
    if "linear" in given.parts:
        bench_linear(bench)
    if "forward" in given.parts or "decode" in given.parts:
        model = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
        if "forward" in given.parts:
            bench_forward(bench, given.model, model)
        if "decode" in given.parts:
            bench_decode(bench, given.model, model, transformers.AutoTokenizer.from_pretrained(given.model))
    stages = [part.removeprefix("train-") for part in given.parts if part.startswith("train-")]
    if stages:
        bench_train(bench, given.model, stages)
    if "load" in given.parts:
        bench_load(bench, given.model)
    for directory in given.tokenizers:
        bench_tokenizer(bench, directory)

    print("; ".join(f"{key} {value}" for key, value in facts.items()))
    print("quick: one round, nothing to conclude from\n" if given.quick else f"{bench.rounds} rounds\n")
    print_table(bench.results)
    if given.json:
        rows = [asdict(result) for result in bench.results]
        given.json.write_text(json.dumps({"facts": facts, "results": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
