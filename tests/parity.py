#!/usr/bin/env python3
"""Compare nla with PyTorch: the same model files, in float32, module by module and token by token.

    ~/.cache/nla/venv/bin/python tests/parity.py [--nla ./nla] [--models DIR ...] [--markdown]

Without --models only the golden checkpoints are compared. Four parts (docs/parity.md says more):

    golden        every module's output on the checkpoints of tests/golden, on every instruction set
    greedy        64-token replies to chat prompts: the same token ids as `transformers`
    capture       the residual stream after five blocks, and the dataset around it
    determinism   the same bytes whatever the number of threads and the batch

Prints a table for each and ends with exit status 1 when something is outside its bound. --markdown prints the tables for
docs/parity.md.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Threads that wait by spinning take the processor from others; on a busy machine this comparison would take hours.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import tokenizers
import torch
import transformers
import yaml
from safetensors.numpy import load_file

TESTS = Path(__file__).resolve().parent

# Golden models are small and float32 all through: two orders of summation differ by 1e-6 or 2e-6 in them.
GOLDEN_BOUND = 1e-5
# Real models sum over 20 to 30 blocks, some rows after a "massive activation" a thousand times their size.
CAPTURE_BOUND = 1e-4
# Two tokens whose PyTorch logits are this close are a tie as far as float32 can tell. Logits are of the order of 10.
TIE_BOUND = 1e-4

INSTRUCTION_SETS = ("any", "avx2", "avx512", "default")  # values of NLA_CPU; default: not set

REPLY_TOKENS = 64
PROMPTS = (
    "What is the capital of Portugal, and on which river does it lie?",
    "Write a haiku about a lighthouse in winter.",
    "Explain to a ten-year-old why the sky is blue.",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take? Show your work.",
    "Write a Python function that returns the n-th Fibonacci number without recursion.",
    "Translate into French: \"The library closes at six, but the garden stays open all night.\"",
    "List three differences between a lake and a sea:\n1.\n2.\n3.",
    "请用一句话介绍一下长城。",
    "Summarize: The committee met on Tuesday. Nobody agreed on the budget; the vote was postponed until May 🗓️.",
    "ok so umm... whats the BEST way 2 learn guitar??? be honest!!",
)

ENGLISH = """The harbour at Vell was built for ships that no longer come. Its northern wall, begun in 1841 and finished \
eleven years later, runs 620 metres into the bay and ends in a tower of grey stone, where a keeper and his family lived \
until the lamp was made electric. Today the tower holds a small museum (open from May to September, admission 4.50) and \
a café whose windows look straight out to sea.

What visitors notice first is the silence. There are no cranes, no containers, no trucks; only ropes that creak, and \
gulls, and now and then the engine of a fishing boat. "We kept the noise out on purpose," says Ida Marsh, who has run the \
harbour office since 2009. "In 1998 a company offered to turn half of the basin into a marina with 400 berths. The town \
voted, and 71% said no." She laughs. "My own brother voted yes. He still hasn't forgiven me."

The figures are modest: 38 registered boats, about 210 tonnes of fish a year, most of it mackerel and crab. But the \
harbour pays for itself, which cannot be said of its neighbours. Three things explain it. First, the co-operative owns \
the ice plant and sells directly to restaurants. Second, repairs are done in winter by the crews themselves. Third, \
nobody borrowed money when interest rates were low.

Will it last? The water in the bay has warmed by 1.3 °C in thirty years; cod are gone, and octopus, once a curiosity, \
now fill the pots. Marsh shrugs. "We learned to cook octopus," she says."""

CJK_AND_EMOJI = "今天的天气很好,我们去公园散步吧!🌳🚶‍♀️ 東京タワーは夜になると光ります✨。서울은 지금 비가 와요 ☔️ 👨‍👩‍👧"

DOCUMENTS = {
    "english": ENGLISH,
    "cjk and emoji": CJK_AND_EMOJI,
    "english, three times": "\n\n".join([ENGLISH] * 3),  # longer than Gemma's window of 512
}


class NlaFailed(Exception):
    """An nla command ended with another exit status than 0."""


@dataclass
class Table:
    title: str
    head: tuple
    rows: list = field(default_factory=list)

    def print(self, markdown):
        lines = [self.head, *self.rows]
        lines = [[str(cell) for cell in line] for line in lines]
        width = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        print(f"\n{'### ' if markdown else ''}{self.title}\n")
        for number, line in enumerate(lines):
            cells = [cell.ljust(width[i]) for i, cell in enumerate(line)]
            print("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells).rstrip())
            if number == 0:
                print("|" + "|".join("-" * (w + 2) for w in width) + "|" if markdown else "  ".join("-" * w for w in width))


class Parity:
    """What has been compared so far, and what was outside its bound."""

    def __init__(self, nla):
        self.nla = nla
        self.tables = []
        self.failures = []

    def table(self, title, head):
        self.tables.append(Table(title, head))
        return self.tables[-1]

    def check(self, good, what):
        """Records a failure; returns the word for the table."""
        if not good:
            self.failures.append(what)
            print(f"FAIL: {what}", file=sys.stderr)
        return "yes" if good else "NO"

    def run(self, *arguments, cpu="default"):
        """Runs nla; cpu is the instruction set. Returns its standard output and standard error."""
        environment = {key: value for key, value in os.environ.items() if key != "NLA_CPU"}
        if cpu != "default":
            environment["NLA_CPU"] = cpu
        command = [str(self.nla), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise NlaFailed(f"{' '.join(command)[:300]}: exit status {done.returncode}: {said[-1] if said else ''}")
        return done.stdout.decode(), done.stderr.decode()


def progress(text):
    print(f"parity.py: {text}", file=sys.stderr)


def relative_error(ours, theirs):
    """|ours - theirs| / |theirs| in the Euclidean norm, over the last axis or all: NaN and wrong shapes are infinite."""
    if ours.shape != theirs.shape:
        return numpy.inf
    ours, theirs = ours.astype(numpy.float64), theirs.astype(numpy.float64)
    error = float(numpy.linalg.norm(ours - theirs) / numpy.linalg.norm(theirs))
    return error if numpy.isfinite(error) else numpy.inf


def write_documents(path, texts):
    """JSONL as --in takes it: {id: text}."""
    rows = [json.dumps({"doc_id": name, "text": text}) for name, text in texts.items()]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The oracle


class Oracle:
    """A model directory as transformers reads it."""

    def __init__(self, directory):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        # nla stops at the ids of both files; generate is told to do so, too.
        self.eos = set()
        for source in (self.model.config, self.model.generation_config):
            eos = source.eos_token_id
            self.eos.update(eos if isinstance(eos, list) else [] if eos is None else [eos])

    def chat_ids(self, text):
        message = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]

    @torch.inference_mode()
    def greedy(self, prompt_ids):
        """The reply's ids, its end token included."""
        ids = torch.tensor([prompt_ids])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=REPLY_TOKENS,
            eos_token_id=sorted(self.eos),
            pad_token_id=min(self.eos),
        )
        return out[0, len(prompt_ids) :].tolist()

    @torch.inference_mode()
    def next_logits(self, ids):
        return self.model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]

    @torch.inference_mode()
    def residual_streams(self, ids, layers):
        """What each of the blocks hands on, [tokens, D]. From hooks: the last of hidden_states is after the final norm."""
        streams = {}

        def keep(layer):
            def hook(_module, _inputs, output):
                streams[layer] = (output[0] if isinstance(output, tuple) else output).squeeze(0).numpy()

            return hook

        handles = [self.model.model.layers[layer].register_forward_hook(keep(layer)) for layer in layers]
        self.model(torch.tensor([ids]), use_cache=False, logits_to_keep=1)
        for handle in handles:
            handle.remove()
        return streams


# ---------------------------------------------------------------------------------------------------------------------
# a. Golden checkpoints


def module_kind(name):
    """model.layers.3.mlp -> mlp, model.layers.3 -> block, model.norm -> norm."""
    last = name.split(".")[-1]
    return "block" if last.isdigit() else last


def compare_golden(parity, case, cpu, folder):
    """Relative error of every tensor of one case, by name."""
    golden = load_file(case / "golden.safetensors")
    ids = golden.pop("input_ids")
    out = folder / "dump.safetensors"
    _, said = parity.run("dump", "--model", case, "--ids", ",".join(map(str, ids)), "--out", out, cpu=cpu)
    if cpu not in ("default", said.split(" parameters on cpu ")[1].split(",")[0]):
        raise NlaFailed(f"this processor has no {cpu}")
    ours = load_file(out)
    parity.check(numpy.array_equal(ours.pop("input_ids"), ids), f"golden {case.name}: input_ids differ")
    parity.check(set(ours) == set(golden), f"golden {case.name}: other tensors than PyTorch's: {set(ours) ^ set(golden)}")
    return {name: relative_error(ours[name], golden[name]) for name in golden if name in ours}


def golden_part(parity, folder):
    # tests/golden also holds tokenizers, and AV and AR pairs, whose golden.safetensors have no single model beside them.
    cases = sorted(path.parent for path in (TESTS / "golden").glob("*/golden.safetensors")
                   if (path.parent / "config.json").exists())  # fmt: skip
    parity.check(cases, f"{TESTS / 'golden'}: no golden checkpoints")
    by_set = parity.table(
        f"Golden checkpoints: worst relative error of any module's output (bound {GOLDEN_BOUND:.0e})",
        ("checkpoint", *INSTRUCTION_SETS, "worst module"),
    )
    by_kind = {}
    for case in cases:
        progress(f"golden {case.name}")
        row, worst_module, worst_error = [case.name], "", -1.0
        for cpu in INSTRUCTION_SETS:
            try:
                errors = compare_golden(parity, case, cpu, folder)
            except NlaFailed as failed:
                parity.check(False, f"golden {case.name}, {cpu}: {failed}")
                row.append("failed")
                continue
            for name, error in errors.items():
                kind = by_kind.setdefault(module_kind(name), {})
                kind[case.name] = max(kind.get(case.name, 0.0), error)
                parity.check(error <= GOLDEN_BOUND, f"golden {case.name}, {cpu}: {name} is off by {error:.1e}")
            name = max(errors, key=errors.get)
            row.append(f"{errors[name]:.1e}")
            if errors[name] > worst_error:
                worst_module, worst_error = name, errors[name]
        by_set.rows.append((*row, worst_module))
    kinds = [kind for kind in ("embed_tokens", "self_attn", "mlp", "block", "norm", "lm_head") if kind in by_kind]
    table = parity.table("The same by kind of module, worst of all instruction sets", ("checkpoint", *kinds))
    for case in cases:
        table.rows.append((case.name, *(f"{by_kind[kind].get(case.name, numpy.nan):.1e}" for kind in kinds)))


# ---------------------------------------------------------------------------------------------------------------------
# b. Greedy replies


END = -1  # stands for whichever end token was drawn: nla says that a reply ended, not with which


def compare_reply(oracle, prompt_ids, ours, theirs):
    """The first step at which two replies differ, and how far apart PyTorch's logits of the two tokens are there."""
    step = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
    if step == len(ours) or step == len(theirs):
        return step, numpy.inf  # one is a part of the other: a length cap went wrong, not a logit
    logits = oracle.next_logits(prompt_ids + ours[:step])
    ends = logits[sorted(oracle.eos)].max()
    first, second = (ends if token == END else logits[token] for token in (ours[step], theirs[step]))
    return step, abs(float(first - second))


def greedy_part(parity, directory, oracle, folder, table):
    prompts = folder / "prompts.jsonl"
    write_documents(prompts, {f"prompt {i}": text for i, text in enumerate(PROMPTS)})
    out, _ = parity.run("generate", "--model", directory, "--chat", "--json", "--quiet", "--temperature", 0,
                        "--max-tokens", REPLY_TOKENS, "--in", prompts)  # fmt: skip
    replies = [json.loads(line) for line in out.splitlines()]
    parity.check([reply["row"] for reply in replies] == list(range(len(PROMPTS))), f"{directory.name}: replies are missing")
    same_prompt = identical = ties = tokens = 0
    text_differs = []
    for i, (text, reply) in enumerate(zip(PROMPTS, replies)):
        progress(f"{directory.name}: greedy reply {i + 1} of {len(PROMPTS)}")
        prompt_ids = oracle.chat_ids(text)
        our_prompt = json.loads(parity.run("tokenize", "--model", directory, "--chat", "--json", "--", text)[0])
        good = our_prompt == prompt_ids and reply["prompt_tokens"] == len(prompt_ids)
        same_prompt += good
        parity.check(good, f"{directory.name}: prompt {i} has other token ids")
        theirs = [END if id in oracle.eos else id for id in oracle.greedy(prompt_ids)]
        ours = reply["ids"] + [END] * (reply["stop"] == "end")
        tokens += len(theirs)
        if ours == theirs:
            identical += 1
            expected = oracle.tokenizer.decode(reply["ids"], skip_special_tokens=True)
            if reply["text"] != expected:
                text_differs.append(i)
            continue
        step, gap = compare_reply(oracle, prompt_ids, ours, theirs)
        ties += gap < TIE_BOUND
        what = f"{directory.name}: the reply to prompt {i} differs at token {step}, where logits are {gap:.1e} apart"
        parity.check(gap < TIE_BOUND, what)
        progress(what)
    parity.check(not text_differs, f"{directory.name}: the same ids became other text: prompts {text_differs}")
    n = len(PROMPTS)
    ended = sum(reply["stop"] == "end" for reply in replies)
    table.rows.append((directory.name, f"{same_prompt} of {n}", f"{identical} of {n}", ties, tokens, ended))


# ---------------------------------------------------------------------------------------------------------------------
# c. Captured residual streams


@dataclass
class ExpectedRow:
    doc_id: str
    n_raw_tokens: int
    text: str
    position: int


def expected_rows(oracle, doc_id, ids):
    """What capture writes of a document with --positions all: every token but the special ones."""
    special = {id for id, token in oracle.tokenizer.added_tokens_decoder.items() if token.special}
    rows = []
    for position, id in enumerate(ids):
        if id not in special:
            text = oracle.tokenizer.decode(ids[: position + 1], skip_special_tokens=True)
            rows.append(ExpectedRow(doc_id, position + 1, text, position))
    return rows


def check_layout(parity, dataset, layer, expected, oracle, directory):
    """The three files of one layer's dataset against docs/formats.md. Returns its activations."""
    where = f"{directory.name} layer {layer}"
    names = sorted(path.name for path in dataset.iterdir())
    parity.check(names == ["activations.safetensors", "nla_meta.yaml", "rows.jsonl"], f"{where}: files are {names}")
    tensors = load_file(dataset / "activations.safetensors")
    n, width = len(expected), oracle.model.config.hidden_size
    layout = {name: (str(tensor.dtype), tensor.shape) for name, tensor in tensors.items()}
    wanted = {"activation_vector": ("float32", (n, width)), "n_raw_tokens": ("int64", (n,)), "row_id": ("uint64", (n,))}
    parity.check(layout == wanted, f"{where}: tensors are {layout}, not {wanted}")
    parity.check(len(set(tensors["row_id"].tolist())) == n, f"{where}: row_id repeats")
    parity.check(tensors["n_raw_tokens"].tolist() == [row.n_raw_tokens for row in expected], f"{where}: n_raw_tokens differ")

    rows = [json.loads(line) for line in (dataset / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    parity.check(len(rows) == n, f"{where}: rows.jsonl has {len(rows)} rows, not {n}")
    for key in ("doc_id", "n_raw_tokens", "text"):
        wrong = [i for i, (row, right) in enumerate(zip(rows, expected)) if row[key] != getattr(right, key)]
        parity.check(not wrong, f"{where}: rows.jsonl: {key} differs in {len(wrong)} rows, first {wrong[:1]}")

    meta = yaml.safe_load((dataset / "nla_meta.yaml").read_text(encoding="utf-8"))
    extraction = meta["extraction"]
    said = (meta["kind"], meta["schema_version"], meta["stage"], meta["row_count"], extraction["base_model"],
            extraction["d_model"], extraction["layer_index"], extraction["norm"], extraction["positions_per_doc"])  # fmt: skip
    right = ("nla_dataset", 1, "base", n, str(directory), width, layer, "none", "all")
    parity.check(said == right, f"{where}: nla_meta.yaml says {said}, not {right}")
    return tensors["activation_vector"]


def capture_part(parity, directory, oracle, folder, table):
    n_layers = oracle.model.config.num_hidden_layers
    layers = sorted({0, n_layers // 4, n_layers // 2, 3 * n_layers // 4, n_layers - 1})
    documents, out = folder / "documents.jsonl", folder / f"capture {directory.name}"
    write_documents(documents, DOCUMENTS)
    parity.run("capture", "--model", directory, "--in", documents, "--out", out, "--positions", "all",
               "--layer", ",".join(map(str, layers)))  # fmt: skip
    expected, streams = {}, {}
    for doc_id, text in DOCUMENTS.items():
        progress(f"{directory.name}: residual streams of '{doc_id}'")
        ids = oracle.tokenizer(text).input_ids
        expected[doc_id] = expected_rows(oracle, doc_id, ids)
        streams[doc_id] = oracle.residual_streams(ids, layers)
    all_rows = [row for rows in expected.values() for row in rows]
    for layer in layers:
        activations = check_layout(parity, out / f"layer_{layer}", layer, all_rows, oracle, directory)
        start = 0
        for doc_id, rows in expected.items():
            ours = activations[start : start + len(rows)]
            theirs = streams[doc_id][layer][[row.position for row in rows]]
            start += len(rows)
            total = relative_error(ours, theirs)
            worst = max(map(relative_error, ours, theirs))
            where = f"{directory.name}, layer {layer}, '{doc_id}'"
            parity.check(max(total, worst) <= CAPTURE_BOUND, f"{where}: off by {total:.1e}, a row by {worst:.1e}")
            table.rows.append((directory.name, layer, doc_id, len(rows), f"{total:.1e}", f"{worst:.1e}"))


# ---------------------------------------------------------------------------------------------------------------------
# d. Determinism


def dump_bytes(parity, directory, folder, threads, *options):
    out = folder / f"dump {threads}.safetensors"
    parity.run("dump", "--model", directory, "--threads", threads, "--out", out, *options)
    return out.read_bytes()


def sampled(parity, directory, prompts, *options):
    command = ("generate", "--model", directory, "--chat", "--json", "--quiet", "--in", prompts, "--max-tokens", 24)
    return parity.run(*command, *options)[0]


def greedy_replies(parity, directory, *options):
    out, _ = parity.run("generate", "--model", directory, "--chat", "--json", "--quiet", "--max-tokens", 24, *options)
    # Without the row: a prompt alone is row 0. Greedy replies draw no random numbers, which the row would be a key of.
    return [{key: value for key, value in json.loads(line).items() if key != "row"} for line in out.splitlines()]


def determinism_part(parity, directory, folder, table):
    name = directory.name

    def claim(what, good):
        table.rows.append((name, what, parity.check(good, f"{name}: not true: {what}")))

    progress(f"{name}: dumps with 1 and 2 threads")
    # The logits of a short text, and of a longer one all but the logits, which for Gemma would be 300 MB.
    for label, options in (
        ("every module and the logits of the CJK text", ("--", CJK_AND_EMOJI)),
        ("every module of the English text", ("--only", "model.", "--", ENGLISH)),
    ):
        one, two = (dump_bytes(parity, directory, folder, threads, *options) for threads in (1, 2))
        claim(f"dump, {label}: same bytes with 1 and 2 threads", one == two)

    progress(f"{name}: samples with several batches and threads")
    prompts = folder / "three prompts.jsonl"
    write_documents(prompts, {str(i): text for i, text in enumerate(PROMPTS[:3])})
    options = ("--samples", 8, "--temperature", 1)
    runs = [
        sampled(parity, directory, prompts, *options, "--batch", batch, "--threads", threads)
        for batch, threads in ((1, 1), (8, 2), (16, 1), (32, 2))
    ]
    claim("3 prompts x 8 samples at temperature 1: same ids and log-probabilities with --batch 1, 8, 16, 32 and 1 or 2 threads",
          len(set(runs)) == 1)  # fmt: skip
    texts = {json.loads(line)["text"] for line in runs[0].splitlines()}
    claim("the 24 samples are not all alike, and another --seed gives others",
          len(texts) > 12 and sampled(parity, directory, prompts, *options, "--seed", 1) != runs[0])  # fmt: skip

    progress(f"{name}: prompts together and alone")
    many = folder / "prompts.jsonl"
    write_documents(many, {str(i): text for i, text in enumerate(PROMPTS)})
    together = greedy_replies(parity, directory, "--in", many)
    alone = [greedy_replies(parity, directory, "--", text)[0] for text in PROMPTS]
    claim("greedy replies to 10 prompts: same ids and log-probabilities in one batch and alone", together == alone)


# ---------------------------------------------------------------------------------------------------------------------


def processor():
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            flags = "AVX512-BF16" if "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8") else "no AVX512-BF16"
            return f"{line.split(':')[1].strip()}, {os.cpu_count()} cores, {flags}"
    return platform.processor()


def facts():
    versions = f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, PyTorch {torch.__version__}"
    return f"{datetime.date.today()}; {processor()}; Python {platform.python_version()}, {versions}"


def compare_model(parity, directory, folder, tables):
    """Parts b, c, d for one model. A part that cannot run is a failure, and the next goes on."""
    oracle = Oracle(directory)
    for part, arguments in (
        (greedy_part, (directory, oracle, folder, tables["greedy"])),
        (capture_part, (directory, oracle, folder, tables["capture"])),
        (determinism_part, (directory, folder, tables["determinism"])),
    ):
        try:
            part(parity, *arguments)
        except NlaFailed as failed:
            parity.check(False, str(failed))


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--nla", type=Path, default=TESTS.parent / "nla", help="the program (default: ./nla)")
    options.add_argument("--models", type=Path, nargs="+", default=[], metavar="DIR", help="Hugging Face directories")
    options.add_argument("--markdown", action="store_true", help="print the tables as docs/parity.md has them")
    given = options.parse_args()

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    parity = Parity(given.nla.resolve())
    with tempfile.TemporaryDirectory(prefix="nla-parity-") as name:
        folder = Path(name)
        golden_part(parity, folder)
        if given.models:
            tables = {
                "greedy": parity.table(
                    f"Greedy replies of up to {REPLY_TOKENS} tokens to {len(PROMPTS)} chat prompts",
                    ("model", "prompt ids identical", "replies identical",
                     f"differ at a tie (< {TIE_BOUND:.0e})", "tokens compared", "ended by themselves"),  # fmt: skip
                ),
                "capture": parity.table(
                    f"Captured residual streams: relative error (bound {CAPTURE_BOUND:.0e})",
                    ("model", "layer", "document", "rows", "total", "worst row"),
                ),
                "determinism": parity.table("Determinism", ("model", "claim", "holds")),
            }
        for directory in given.models:
            compare_model(parity, directory.resolve(), folder, tables)

    print(facts())
    for table in parity.tables:
        table.print(given.markdown)
    print(f"\n{len(parity.failures)} outside their bounds" if parity.failures else "\nEverything is within its bound.")
    for failure in parity.failures:
        print(f"{'- ' if given.markdown else ''}{failure}")
    return 1 if parity.failures else 0


if __name__ == "__main__":
    sys.exit(main())
