"""Checks data/explain_api.py and data/parquet.py; tests/data_scripts_test.sh runs it.

    python tests/data_scripts.py api|parquet WORK

WORK/acts is a dataset directory that `nla capture` made, WORK/xxh3.txt the XXH3-64 of "It rained." and "It" from C. The last
line says how many checks passed and failed.
"""

import contextlib
import http.server
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
sys.dont_write_bytecode = True
import dataset

DATA = Path(__file__).resolve().parent.parent / "data"
KEY = "sk-secret-0123456789"
passed = failed = 0


def check(claim, good, detail=""):
    global passed, failed
    if good:
        passed += 1
    else:
        failed += 1
        print(f"FAILED: {claim}: {str(detail)[:600]}")


def script(name, *arguments, stdin="", env=None):
    command = [sys.executable, "-B", str(DATA / name), *map(str, arguments)]
    # no_proxy: a proxy of the machine must not get in between
    environment = {**os.environ, "no_proxy": "*", "KEY": KEY, **(env or {})}
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, timeout=60)


def fails(claim, words, result, status=1):
    """The script ends with this status and one line on stderr that holds the words."""
    lines = result.stderr.splitlines()
    good = result.returncode == status and len(lines) == 1 and words in lines[0] and KEY not in result.stderr
    check(claim, good, f"exit {result.returncode}, lacks {words!r}: {result.stderr}")


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# A server that plays both APIs; the model's name says how it behaves


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.requests, self.now, self.most = threading.Lock(), [], 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self):
        with self.lock:
            self.requests, self.most = [], 0

    def texts(self, answered=False):
        """How often each text was asked about, or answered."""
        with self.lock:
            return Counter(request["text"] for request in self.requests if not answered or request["answered"])

    def handle_error(self, *_):
        pass  # a client that was killed, or gave up waiting


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = body["messages"][0]["content"].split("<beginning>\n")[1].rsplit("\n</beginning>")[0]
        server, request = self.server, {
            "path": self.path,
            "body": body,
            "text": text,
            "answered": False,
            "time": time.monotonic(),
        }
        request["headers"] = {name.lower(): value for name, value in self.headers.items()}
        with server.lock:
            self.counted = True
            server.now += 1
            server.most = max(server.most, server.now)
            request["nth"] = sum(other["text"] == text for other in server.requests)
            request["first"] = not server.requests
            request["kind"] = len({other["text"] for other in server.requests})
            server.requests.append(request)
        try:
            self.behave(body["model"], request)
        finally:
            self.leave()

    def leave(self):
        """Before the answer goes out: the client may ask again before this thread runs on."""
        with self.server.lock:
            self.server.now -= self.counted
            self.counted = False

    def behave(self, model, request):
        if model in ("even", "open"):
            time.sleep(0.02)
        elif model == "slow":
            time.sleep(0.05)
        elif model == "rough" and request["nth"] == 0:
            return self.misbehave(request["kind"])
        elif model == "limited" and request["first"]:
            return self.send(429, {"error": {"message": "too fast"}}, {"retry-after": "1"})
        elif model == "down":
            return self.send(503, {"error": {"message": "overloaded\nfor now"}})
        elif model == "page":
            return self.send(200, b"<html>a proxy's page</html>")
        elif model == "denied":
            return self.send(401, {"type": "error", "error": {"message": f"invalid x-api-key {KEY}"}})
        elif model == "wrong":
            return self.send(400, {"error": {"message": "max_tokens:\n  too large"}})
        elif model == "moved":
            return self.send(307, b"", {"location": f"{self.server.url}/elsewhere"})
        self.answer(request, closed=model != "open")

    def misbehave(self, kind):
        """In another way for each new text; only one waits for longer than the client does."""
        if kind == 3:
            time.sleep(2)
        elif kind % 4 == 0:
            self.send(429, {"error": {"message": "too fast"}}, {"retry-after": "0"})
        elif kind % 4 == 1:
            self.send(500, b"oops")
        elif kind % 4 == 2:
            self.send(200, b'{"content": [{"type": "te')
        else:
            self.close_connection = True  # not a word
            self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, request, closed):
        reply = f"<explanation>\nIt ends in “{request['text'][-8:]}”.\n\nMore follows.\n" + (
            "</explanation>" if closed else ""
        )
        if request["path"].endswith("/messages"):
            answer = {
                "type": "message",
                "content": [{"type": "thinking", "thinking": "?"}, {"type": "text", "text": reply}],
            }
        else:
            answer = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
        self.send(200, answer)
        request["answered"] = True

    def send(self, status, body, headers=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.leave()
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


# ---------------------------------------------------------------------------------------------------------------------
# explain_api.py


def check_api(work):
    server, rows = Server(), lines_of(work / "acts/rows.jsonl")
    texts = {row["text"] for row in rows}

    def explain(source, out, model, *more, style="messages", stdin="", key="KEY"):
        server.reset()
        arguments = [source, out, "--model", model, "--style", style, "--url", server.url, "--retry-wait", "0.02"]
        return script("explain_api.py", *arguments, *(["--key-env", key] if key else []), *more, stdin=stdin)

    check_both_styles(server, explain, work, rows, texts)
    check_trouble(server, explain, work, texts)
    check_interruption(server, work, rows, texts)
    check_refusals(server, explain, work)


def check_both_styles(server, explain, work, rows, texts):
    acts, out = work / "acts", work / "even.jsonl"
    result = explain(acts, out, "even", "--yes", "--concurrency", "4", "--price-in", "3", "--price-out", "15")
    check("explains a directory", result.returncode == 0, result.stderr)
    check("asks as often at a time as told", server.most == 4, server.most)
    check("asks about each text once", server.texts() == Counter(texts), len(server.requests))
    seen = server.requests[0]
    check(
        "speaks the Messages API",
        seen["path"] == "/v1/messages" and seen["headers"]["x-api-key"] == KEY,
        seen["headers"],
    )
    check("names the API's version", seen["headers"].get("anthropic-version") == "2023-06-01", seen["headers"])
    check(
        "the cost comes first",
        "; about $0." in result.stderr and f"{len(rows)} rows, {len(texts)} texts" in result.stderr,
        result.stderr,
    )
    written, ids = lines_of(out), dataset.RowIds(acts)
    check(
        "a line a row, in order",
        [row["row_id"] for row in written] == [f"{ids[i]:016x}" for i in range(len(rows))],
        written[:2],
    )
    known = dict(zip(("It rained.", "It"), (work / "xxh3.txt").read_text().split()))
    prefixes = {row["text"]: line["prefix"] for row, line in zip(rows, written)}
    check("prefix is C's XXH3 of the text", all(prefixes[text] == known[text] for text in known), prefixes)
    good = all(
        line["explanation"] == f"<explanation>\nIt ends in “{row['text'][-8:]}”.\n\nMore follows.\n</explanation>"
        and line["by"] == "even"
        for row, line in zip(rows, written)
    )
    check("the raw reply, and who wrote it", good, written[0])

    explain(acts, out, "even", "--yes")
    check(
        "what is in the cache is not asked again",
        not server.requests and lines_of(out) == written,
        len(server.requests),
    )
    explain(acts, out, "even", "--yes", "--cache", work / "other.cache", "--limit", "3")
    check(
        "--limit takes the first rows", len(server.requests) == 3 and lines_of(out) == written[:3], len(server.requests)
    )

    result = explain(acts / "rows.jsonl", work / "open.jsonl", "open", "--yes", style="openai")
    seen, other = server.requests[0], lines_of(work / "open.jsonl")
    check(
        "speaks chat/completions",
        seen["path"] == "/chat/completions" and seen["headers"]["authorization"] == f"Bearer {KEY}",
        result.stderr,
    )
    check(
        "rows.jsonl alone gives the same ids",
        [row["row_id"] for row in other] == [row["row_id"] for row in written],
        other[:2],
    )
    check("a reply without its closing tag is kept", other[0]["explanation"].endswith("More follows.\n"), other[0])
    extra = '{"max_tokens": null, "max_completion_tokens": 9}'
    explain(acts, work / "extra.jsonl", "extra", "--yes", "--limit", "1", "--extra", extra, style="openai", key=None)
    seen = server.requests[0]
    check(
        "--extra changes the request",
        "max_tokens" not in seen["body"] and seen["body"]["max_completion_tokens"] == 9,
        seen["body"],
    )
    check("a server of one's own needs no key", "authorization" not in seen["headers"], seen["headers"])


def check_trouble(server, explain, work, texts):
    result = explain(work / "acts", work / "rough.jsonl", "rough", "--yes", "--timeout", "1.5", "--concurrency", "16")
    check("gets past 429, 500, bad JSON, silence and a hang-up", result.returncode == 0, result.stderr)
    check(
        "each failed once and was answered once",
        server.texts() == Counter({text: 2 for text in texts}),
        server.texts().most_common(2),
    )
    check("none was answered twice", server.texts(answered=True) == Counter(texts), "")

    explain(work / "acts", work / "limited.jsonl", "limited", "--yes", "--concurrency", "1")
    times = [request["time"] for request in server.requests]
    check("Retry-After is honoured", times[1] - times[0] >= 1.0 and len(times) == len(texts) + 1, times[:3])

    down = explain(work / "acts", work / "down.jsonl", "down", "--yes", "--tries", "3", "--concurrency", "1")
    check("tries as often as told", len(server.requests) == 3, len(server.requests))
    ends_with(down, "gives up in the end", "gave up after 3 tries: 503 Service Unavailable: overloaded for now")
    page = explain(work / "acts", work / "page.jsonl", "page", "--yes", "--tries", "2", "--concurrency", "1")
    ends_with(page, "an answer of another kind", "gave up after 2 tries: the answer is not one of this API")
    for model, words in (
        ("denied", "401 Unauthorized: invalid x-api-key [key]"),
        ("wrong", "400 Bad Request: max_tokens: too large"),
        ("moved", "307 Temporary Redirect"),
    ):
        result = explain(work / "acts", work / f"{model}.jsonl", model, "--yes", "--concurrency", "1")
        ends_with(result, f"{model} stops the run", words)
        check(
            f"{model} is not tried again, and nothing is written",
            len(server.requests) == 1 and not (work / f"{model}.jsonl").exists(),
        )


def ends_with(result, claim, words):
    """After the estimate, one line that says why."""
    lines = result.stderr.splitlines()
    check(
        claim,
        result.returncode == 1 and len(lines) == 2 and words in lines[1] and KEY not in result.stderr,
        result.stderr,
    )


def check_interruption(server, work, rows, texts):
    out, concurrency = work / "slow.jsonl", 4
    command = [
        sys.executable,
        "-B",
        DATA / "explain_api.py",
        work / "acts",
        out,
        "--model",
        "slow",
        "--url",
        server.url,
    ]
    command += ["--key-env", "KEY", "--yes", "--concurrency", str(concurrency)]
    environment = {**os.environ, "no_proxy": "*", "KEY": KEY}
    server.reset()
    for how in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, None):
        before = len(server.requests)
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 20
        while how and len(server.requests) < before + 10 and time.monotonic() < deadline:
            time.sleep(0.005)
        if how:
            process.send_signal(how)
        words = process.communicate(timeout=30)[1]
        if how == signal.SIGTERM:
            check(
                "SIGTERM ends it with a word", process.returncode == 1 and "interrupted; run it again" in words, words
            )
            check("and before it is done", not out.exists() and len(server.texts()) < len(texts), len(server.requests))
            waited = server.texts()
    twice = [text for text, count in server.texts().items() if count > 1]
    check("killed twice, it asked again only what was on its way", len(twice) <= 2 * concurrency, len(twice))
    check("after SIGTERM it asked nothing again", all(server.texts()[text] == waited[text] for text in waited), "")
    check("and ended with every row", len(lines_of(out)) == len(rows) and set(server.texts()) == texts, "")
    even = [row["explanation"] for row in lines_of(out)]
    check(
        "in the rows' order",
        [text.split("“")[1].split("”.")[0] for text in even] == [row["text"][-8:] for row in rows],
        even[:2],
    )
    check("nothing lies about", not list(work.glob("slow.jsonl.tmp*")), "")


def check_refusals(server, explain, work):
    acts = work / "acts"
    refused = explain(acts, work / "no.jsonl", "even", stdin="")
    check(
        "without a yes nothing is asked",
        refused.returncode == 1 and not server.requests and "give --yes" in refused.stderr,
        refused.stderr,
    )
    result = explain(acts, work / "yes.jsonl", "even", "--limit", "1", stdin="y\n")
    check("a yes will do", result.returncode == 0 and len(server.requests) == 1, result.stderr)
    fails(
        "a key that is not set",
        "set the environment variable NO_SUCH_KEY",
        explain(acts, work / "x", "even", "--yes", key="NO_SUCH_KEY"),
    )
    fails("no such data set", "nowhere", explain(work / "nowhere", work / "x", "even", "--yes"))
    fails("no such place for the output", "no such directory", explain(acts, work / "nowhere/x", "even", "--yes"))
    for claim, line, words in (
        ("a row without text", '{"doc_id": "a", "n_raw_tokens": 3}', "line 1: no text to explain"),
        ("a row that is not JSON", '{"doc_id": ', "line 1: not JSON"),
        (
            "a row with a wrong count",
            '{"doc_id": "a", "n_raw_tokens": 0, "text": "x"}',
            "n_raw_tokens is not a positive whole number",
        ),
        (
            "a row with half a character",
            '{"doc_id": "a", "n_raw_tokens": 1, "text": "\\ud800"}',
            "text holds half of a surrogate pair",
        ),
    ):
        (work / "wrong.jsonl").write_text(line + "\n")
        fails(claim, words, explain(work / "wrong.jsonl", work / "x", "even", "--yes"))
    shutil.copytree(acts, work / "short")
    (work / "short/rows.jsonl").write_text((acts / "rows.jsonl").read_text().split("\n", 1)[1])
    fails(
        "fewer rows than activations", "its rows are not as many", explain(work / "short", work / "x", "even", "--yes")
    )
    (work / "x.cache").write_text("not a data base, but long enough to look at " * 50)
    fails("a cache that is none", "x.cache: cannot be used as a cache", explain(acts, work / "x", "even", "--yes"))
    check("wrong usage", explain(acts, work / "x", "even", "--concurrency", "0").returncode == 2)
    bare = subprocess.run([sys.executable, "-S", str(DATA / "explain_api.py")], capture_output=True, text=True)
    fails("a missing module", "no Python module xxhash; get what it needs with", bare)


# ---------------------------------------------------------------------------------------------------------------------
# parquet.py

AV, AR = "Say it: <concept>{injection_char}</concept>.", "In words:\n{explanation}\nThe vector: <v>"
TOKENS = {
    "injection_char": "\u320e",
    "injection_token_id": 257,
    "injection_left_neighbor_id": 29,
    "injection_right_neighbor_id": 295,
    "critic_suffix_ids": [295, 289, 29],
}


def convert(*arguments):
    """parquet.py in this process: starting pyarrow anew takes half a second."""
    import parquet

    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["parquet.py", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = parquet.main()
    except SystemExit as exit_:
        status = exit_.code
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def staged(work, stage, name=None, explained=None):
    """A copy of WORK/acts as a data set of that stage, with explanations where `explained(row number)`."""
    import yaml

    directory = work / (name or stage)
    shutil.copytree(work / "acts", directory)
    meta = yaml.safe_load((directory / "nla_meta.yaml").read_text())
    meta |= {"stage": stage, "tokens": TOKENS, "prompt_templates": {"av": AV, "ar": AR}, "lab_notes": {"by": "someone"}}
    meta["extraction"] |= {"injection_scale": 4.5}
    (directory / "nla_meta.yaml").write_text(yaml.safe_dump(meta, allow_unicode=True))
    lines = (directory / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    for i in range(len(lines)):
        if explained and explained(i):
            words = "\\n Odd \\u0007\u201cwords\u201d </explanation> {}\\n\\nThe end.\\n" if i % 2 else "Plain."
            lines[i] = lines[i][:-1] + f', "explanation": "{words}"}}'
    (directory / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def same_files(one, other):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in (dataset.VECTORS, dataset.ROWS))


def check_nla_opens(directory):
    seen = subprocess.run([os.environ["NLA"], "inspect", directory], capture_output=True, text=True)
    check(f"nla opens {directory.name}", seen.returncode == 0 and "row_count" in seen.stdout, seen.stderr)


def check_parquet(work):
    check_round_trips(work)
    check_bf16(work)
    check_theirs(work)
    check_reading_back(work)
    check_bad_columns(work)
    check_bad_sidecars(work)
    check_places(work)


def check_round_trips(work):
    import pyarrow as pa
    import pyarrow.parquet as pq
    import yaml

    vectors, text = ("activation_vector", pa.list_(pa.float32(), 40)), ("detokenized_text_truncated", pa.string())
    count, layer, doc = ("n_raw_tokens", pa.int64()), ("activation_layer", pa.int64()), ("doc_id", pa.string())
    messages = ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))
    response, words, filled = (("response", pa.string()), ("api_explanation", pa.string()), ("prompt", pa.string()))
    shapes = {
        "base": (None, [count, text, vectors, layer, doc]),
        "base, some explained": (lambda i: i % 3, [count, text, vectors, layer, doc, words]),
        "rl": (None, [messages, vectors, count, layer, doc, text]),
        "av_sft": (lambda i: True, [messages, response, vectors, count, layer, doc, text]),
        "ar_sft": (lambda i: True, [filled, vectors, count, layer, doc, text]),
    }
    for name, (explained, columns) in shapes.items():
        ours, file, back = (
            staged(work, name.split(",")[0], name, explained),
            work / f"{name}.parquet",
            work / f"{name} back",
        )
        there, again = convert("to", file, ours), convert("from", file, back)
        check(f"{name}: there and back", there.returncode == 0 == again.returncode, there.stderr + again.stderr)
        check(f"{name}: the same bytes", same_files(ours, back))
        check(
            f"{name}: the reference's columns and types",
            pq.read_schema(file).equals(pa.schema(columns)),
            pq.read_schema(file),
        )
        before, beside, after = (
            yaml.safe_load(path.read_text())
            for path in (ours / "nla_meta.yaml", Path(f"{file}.nla_meta.yaml"), back / "nla_meta.yaml")
        )
        check(f"{name}: the sidecar comes back", before == after, f"{before} {after}")
        check(f"{name}: the ids are carried over", beside["tokens"] == TOKENS, beside)
        templates = beside["prompt_templates"]
        check(f"{name}: its older names are there", templates["actor"] == AV and templates["critic"] == AR, templates)
    known = {"base_model", "d_model", "layer_index", "norm", "corpus", "corpus_slice", "positions_per_doc"}
    beside = yaml.safe_load((work / "base.parquet.nla_meta.yaml").read_text())
    check("a base sidecar has the reference's keys of extraction", set(beside["extraction"]) == known, beside)
    rows = [
        table.to_pylist() for table in (pq.read_table(work / "av_sft.parquet"), pq.read_table(work / "ar_sft.parquet"))
    ]
    check(
        "the AV's prompt",
        rows[0][0]["prompt"] == [{"role": "user", "content": "Say it: <concept><INJECT></concept>."}],
        rows[0][0],
    )
    check("the response", rows[0][0]["response"] == "<explanation>\nPlain.\n</explanation>", rows[0][0]["response"])
    check("the AR's prompt", rows[1][0]["prompt"] == "In words:\nPlain.\nThe vector: <v>", rows[1][0]["prompt"])


def check_bf16(work):
    """Vectors kept in 16 bits, and a width that leaves the 8-byte columns unaligned unless they come first."""
    import numpy as np
    import pyarrow as pa

    ours = staged(work, "base", "bf16")
    rows, width = len(lines_of(ours / "rows.jsonl")), 40
    header, at = {"__metadata__": {"format": "pt"}}, 0
    old = (work / "acts/activations.safetensors").read_bytes()
    columns = old[len(old) - 16 * rows :]
    vectors = (np.frombuffer(old, "<u4", rows * width, 1024) >> 16).astype("<u2").tobytes()
    for name, dtype, shape, size in (
        ("activation_vector", "BF16", [rows, width], len(vectors)),
        ("n_raw_tokens", "I64", [rows], 8 * rows),
        ("row_id", "U64", [rows], 8 * rows),
    ):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header, separators=(",", ":")).encode().ljust(1016)
    (ours / "activations.safetensors").write_bytes((1016).to_bytes(8, "little") + head + vectors + columns)
    there, again = convert("to", work / "bf16.parquet", ours), convert(
        "from", work / "bf16.parquet", work / "bf16 back"
    )
    check(
        "bf16 there and back",
        there.returncode == 0 == again.returncode and same_files(ours, work / "bf16 back"),
        again.stderr,
    )
    halves = np.arange(7 * 6, dtype=np.float32).reshape(7, 6) / 2
    for name, values in (("odd", halves), ("fine", halves + np.float32(1e-3))):
        change = {"activation_vector": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 6)}
        their_file(work / f"{name}.parquet", change, {"vector_dtype": "BF16"})
    result = convert("from", work / "odd.parquet", work / "odd")
    header = dataset.read_header(work / "odd/activations.safetensors")
    check(
        "7 rows of 6 bf16 leave the columns aligned",
        all(header[name].begin % 8 == 0 for name in ("n_raw_tokens", "row_id")),
        header,
    )
    check_nla_opens(work / "odd")
    again = [convert("to", work / "odd2.parquet", work / "odd"), convert("from", work / "odd2.parquet", work / "odd2")]
    check("and come back", same_files(work / "odd", work / "odd2"), result.stderr + again[0].stderr + again[1].stderr)
    fails(
        "values that need float32",
        "row 0: the sidecar says vector_dtype BF16",
        convert("from", work / "fine.parquet", work / "fine"),
    )


def their_table(change=None, rows=7, width=6):
    """A base table in the reference's shape, made without our code; `change` maps a column to another array."""
    import numpy as np
    import pyarrow as pa

    vectors = np.random.default_rng(1).standard_normal((rows, width), dtype=np.float32)
    columns = {
        "n_raw_tokens": pa.array(range(51, 51 + rows), pa.int64()),
        "detokenized_text_truncated": pa.array([f"text {i}\r\n\u00fc" for i in range(rows)]),
        "activation_vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width),
        "activation_layer": pa.array([20] * rows, pa.int64()),
        "doc_id": pa.array([f"org/corpus:train:{i // 2}" for i in range(rows)]),
    }
    columns |= change or {}
    return vectors, pa.table({name: column for name, column in columns.items() if column is not None})


def their_file(path, change=None, meta=None, rows=7, group=3):
    import pyarrow.parquet as pq
    import yaml

    vectors, table = their_table(change, rows)
    pq.write_table(table, path, row_group_size=group)
    slice_ = {"start": 0, "length": 100}
    extraction = {"base_model": "org/model", "d_model": 6, "layer_index": 20, "norm": "none", "corpus": "org/corpus"}
    extraction |= {"corpus_slice": slice_, "positions_per_doc": 10}
    sidecar = {"kind": "nla_dataset", "schema_version": 1, "dataset_id": "base_x", "stage": "base", "row_count": rows}
    sidecar |= {
        "extraction": extraction,
        "keep_debug_metadata": True,
        "prompt_templates": {},
        "git_commit": "0a1b",
        **(meta or {}),
    }
    Path(f"{path}.nla_meta.yaml").write_text(yaml.safe_dump(sidecar, sort_keys=False))
    return vectors


def check_theirs(work):
    import numpy as np
    import pyarrow as pa
    import yaml

    vectors = their_file(work / "theirs.parquet")
    result = convert("from", work / "theirs.parquet", work / "theirs")
    check(
        "theirs comes in",
        result.returncode == 0 and "7 rows of width 6, layer 20, stage base" in result.stdout,
        result.stderr,
    )
    stored = (work / "theirs/activations.safetensors").read_bytes()
    check("row for row, to the bit", stored[1024 : 1024 + 7 * 24] == vectors.tobytes())
    rows, ids = lines_of(work / "theirs/rows.jsonl"), dataset.RowIds(work / "theirs")
    check(
        "with its texts",
        rows[3] == {"doc_id": "org/corpus:train:1", "n_raw_tokens": 54, "text": "text 3\r\n\u00fc"},
        rows[3],
    )
    check(
        "and ids of ours",
        all(ids[i] == dataset.row_id(row["doc_id"], row["n_raw_tokens"]) for i, row in enumerate(rows)),
    )
    c_ids, c_rows = dataset.RowIds(work / "acts"), lines_of(work / "acts/rows.jsonl")
    check(
        "which are capture.c's",
        all(c_ids[i] == dataset.row_id(r["doc_id"], r["n_raw_tokens"]) for i, r in enumerate(c_rows)),
    )
    meta = yaml.safe_load((work / "theirs/nla_meta.yaml").read_text())
    check(
        "the sidecar keeps what it does not know",
        meta["git_commit"] == "0a1b" and meta["extraction"]["positions_per_doc"] == 10,
        meta,
    )
    check_nla_opens(work / "theirs")

    doubles = pa.array(vectors.astype(np.float64).tolist(), pa.list_(pa.float64()))
    their_file(work / "lists.parquet", {"activation_vector": doubles, "uuid": pa.array(["x"] * 7)})
    result = convert("from", work / "lists.parquet", work / "lists")
    check(
        "lists of doubles that are floats",
        result.returncode == 0 and same_files(work / "theirs", work / "lists"),
        result.stderr,
    )
    check("says which columns it leaves out", "left out: uuid" in result.stderr, result.stderr)

    second = {"doc_id": pa.array([f"other:{i}" for i in range(5)])}
    their_file(work / "second.parquet", second, {"dataset_id": "base_y"}, rows=5)
    result = convert("from", work / "theirs.parquet", work / "second.parquet", work / "both")
    check("two files", result.returncode == 0, result.stderr)
    both = yaml.safe_load((work / "both/nla_meta.yaml").read_text())
    check(
        "two files become one data set",
        both["row_count"] == 12 == len(lines_of(work / "both/rows.jsonl")),
        result.stderr,
    )
    check(
        "and it says of which", both["parent_datasets"] == ["base_x", "base_y"] and both["dataset_id"] == "both", both
    )
    their_file(work / "bare.parquet", {"detokenized_text_truncated": None})
    result = convert("from", work / "bare.parquet", work / "bare")
    check(
        "texts may be missing",
        result.returncode == 0 and "text" not in lines_of(work / "bare/rows.jsonl")[0],
        result.stderr,
    )


def check_reading_back(work):
    """A disk that gives back another byte than it was given."""
    import parquet

    class BadDisk(parquet.DirectoryWriter):
        def finish(self, meta):
            super().finish(meta)
            path = self.temporary / dataset.VECTORS
            data = bytearray(path.read_bytes())
            data[1024] ^= 1
            path.write_bytes(data)

    theirs = parquet.Parquets([work / "theirs.parquet"], None)
    try:
        parquet.convert(theirs, BadDisk(work / "flipped", theirs.rows, theirs.width, False), theirs.metas[0])
        said = "nothing"
    except dataset.DatasetError as error:
        said = str(error)
    check("a flipped bit is seen when reading back", "differs from what was written" in said, said)
    check("and the data set gets no name", not list(work.glob("flipped*")))


def check_bad_columns(work):
    import numpy as np
    import pyarrow as pa

    vectors, _ = their_table()

    def spoiled(row, value):
        bad = vectors.copy()
        bad[row, 2] = value
        return pa.FixedSizeListArray.from_arrays(pa.array(bad.reshape(-1)), 6)

    lists = vectors.tolist()
    ragged = pa.array([*lists[:5], lists[5][:-1], lists[6]], pa.list_(pa.float32()))
    holed = pa.array([*lists[:4], [None, *lists[4][1:]], *lists[5:]], pa.list_(pa.float32(), 6))
    precise = vectors.astype(np.float64)
    precise[6, 0] += 1e-12
    prompt = pa.array(
        [[{"role": "user", "content": AV.replace("{injection_char}", "<INJECT>")}]] * 6
        + [[{"role": "user", "content": "?"}]]
    )
    av = {"stage": "av_sft", "tokens": TOKENS, "prompt_templates": {"actor": AV, "critic": AR}}
    good_prompt = pa.array(prompt.to_pylist()[:6] + prompt.to_pylist()[:1])
    cases = (
        ("NaN", {"activation_vector": spoiled(4, np.nan)}, {}, "bad.parquet: activation_vector, row 4: is not finite"),
        ("infinity", {"activation_vector": spoiled(0, -np.inf)}, {}, "activation_vector, row 0: is not finite"),
        (
            "widths that differ between row groups",
            {"activation_vector": ragged},
            {},
            "activation_vector, row 5: has width 5, the sidecar says 6",
        ),
        ("a null in a vector", {"activation_vector": holed}, {}, "activation_vector, row 4: holds a null"),
        (
            "doubles that do not fit",
            {"activation_vector": pa.array(precise.tolist())},
            {},
            "activation_vector, row 6: float64 values",
        ),
        ("another width", {}, {"extraction": {"d_model": 8}}, "activation_vector has width 6, its sidecar says 8"),
        (
            "vectors of strings",
            {"activation_vector": pa.array(["x"] * 7)},
            {},
            "column activation_vector is string, not a list of floats",
        ),
        ("a null doc_id", {"doc_id": pa.array(["a", "b", None, *"defg"])}, {}, "doc_id, row 2: is null"),
        ("a doc_id that is a number", {"doc_id": pa.array(range(7))}, {}, "column doc_id is int64, not a string"),
        (
            "a count that is a float",
            {"n_raw_tokens": pa.array([1.5] * 7)},
            {},
            "column n_raw_tokens is double, not an integer",
        ),
        (
            "a count of zero",
            {"n_raw_tokens": pa.array([9, 8, 7, 6, 5, 4, 0])},
            {},
            "n_raw_tokens, row 6: is not positive",
        ),
        (
            "another layer",
            {"activation_layer": pa.array([20] * 6 + [21])},
            {},
            "activation_layer, row 6: is 21, the sidecar says 20",
        ),
        ("no layer", {"activation_layer": None}, {}, "column activation_layer is missing; stage base needs it"),
        (
            "the same row twice",
            {"doc_id": pa.array(["a"] * 7), "n_raw_tokens": pa.array([51, 52, 53, 54, 52, 56, 57])},
            {},
            "bad.parquet: row 4: ",
        ),
        ("another count of rows", {}, {"row_count": 8}, "row_count is 8, the parquet has 7 rows"),
        ("a stage whose columns are not there", {}, av, "column prompt is missing; stage av_sft needs it"),
        (
            "a prompt of another template",
            {"prompt": prompt, "response": pa.array(["<explanation>x</explanation>"] * 7)},
            av,
            "prompt, row 6: is not one user",
        ),
        (
            "a response without tags",
            {"prompt": good_prompt, "response": pa.array(["<explanation>x</explanation>"] * 3 + ["x"] * 4)},
            av,
            "response, row 3: ",
        ),
    )
    for claim, change, meta, words in cases:
        extraction = {"base_model": "m", "d_model": 6, "layer_index": 20, "norm": "none", **meta.get("extraction", {})}
        their_file(work / "bad.parquet", change, {**meta, "extraction": extraction})
        fails(claim, words, convert("from", work / "bad.parquet", work / "bad"))
    left = sorted(path.name for path in work.glob("bad*"))
    check("nothing is left of any", left == ["bad.parquet", "bad.parquet.nla_meta.yaml"], left)
    whole = (work / "theirs.parquet").read_bytes()
    for claim, content in (
        ("a file cut short", whole[:-20]),
        ("a file of something else", b"PAR1 but not really PAR1"),
    ):
        (work / "bad.parquet").write_bytes(content)
        fails(claim, "bad.parquet: not a parquet file", convert("from", work / "bad.parquet", work / "bad"))
    their_file(work / "bad.parquet")
    damaged = bytearray((work / "bad.parquet").read_bytes())
    damaged[40:400] = bytes(360)
    (work / "bad.parquet").write_bytes(damaged)
    result = convert("from", work / "bad.parquet", work / "bad")
    check(
        "damaged pages",
        result.returncode == 1 and len(result.stderr.splitlines()) == 1 and not (work / "bad").exists(),
        result.stderr,
    )


def check_bad_sidecars(work):
    extraction = {"base_model": "m", "d_model": 6, "layer_index": 20, "norm": "none"}
    for claim, meta, words in (
        ("a sidecar of a model", {"kind": "nla_model"}, "kind is not nla_dataset"),
        (
            "vectors that were normalised",
            {"extraction": {**extraction, "norm": "l2"}},
            "extraction.norm is 'l2', which cannot be",
        ),
        (
            "no layer in the sidecar",
            {"extraction": {**extraction, "layer_index": None}},
            "extraction.layer_index is missing",
        ),
        ("a stage that is none", {"stage": "warm"}, "stage is 'warm', which cannot be"),
        (
            "a template with no hole",
            {"stage": "rl", "prompt_templates": {"av": "x"}},
            "stage rl needs prompt_templates.av with {injection_char}",
        ),
    ):
        their_file(work / "side.parquet", None, meta)
        fails(claim, words, convert("from", work / "side.parquet", work / "side"))
    Path(f"{work}/side.parquet.nla_meta.yaml").write_text("kind: [\n")
    fails(
        "a sidecar that is not YAML",
        "side.parquet.nla_meta.yaml: not YAML",
        convert("from", work / "side.parquet", work / "side"),
    )
    os.remove(work / "side.parquet.nla_meta.yaml")
    fails("no sidecar", "name the sidecar of", convert("from", work / "side.parquet", work / "side"))
    result = convert("from", work / "side.parquet", work / "side", "--sidecar", work / "theirs.parquet.nla_meta.yaml")
    check("--sidecar names one", result.returncode == 0, result.stderr)
    their_file(work / "side.parquet", None, {"extraction": {**extraction, "base_model": "another"}})
    result = convert("from", work / "theirs.parquet", work / "side.parquet", work / "side2")
    fails("files of two models", "its sidecar's extraction.base_model is not that of", result)


def check_places(work):
    fails(
        "a directory that holds something",
        "exists and is not empty",
        convert("from", work / "theirs.parquet", work / "acts"),
    )
    fails("a file that is there", "theirs.parquet: exists", convert("to", work / "theirs.parquet", work / "acts"))
    fails("no such data set", "nowhere", convert("to", work / "new.parquet", work / "nowhere"))
    check("wrong usage", script("parquet.py", "to", "x").returncode == 2)
    (work / "empty").mkdir()
    check("an empty directory will do", convert("from", work / "theirs.parquet", work / "empty").returncode == 0)
    for claim, line, change, words in (
        (
            "rows and vectors that disagree",
            1,
            ('"n_raw_tokens": 2', '"n_raw_tokens": 9'),
            "n_raw_tokens, row 1: rows.jsonl says something else",
        ),
        ("a row id that is not its row's", 0, ('"doc_id": "a"', '"doc_id": "z"'), "row_id, row 0: is "),
    ):
        shutil.rmtree(work / "spoiled", ignore_errors=True)
        shutil.copytree(work / "acts", work / "spoiled")
        lines = (work / "acts/rows.jsonl").read_text(encoding="utf-8").splitlines()
        lines[line] = lines[line].replace(*change)
        (work / "spoiled/rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        fails(claim, words, convert("to", work / "new.parquet", work / "spoiled"))
    (work / "spoiled/activations.safetensors").write_bytes((work / "acts/activations.safetensors").read_bytes()[:-8])
    fails("vectors cut short", "row_id lies at", convert("to", work / "new.parquet", work / "spoiled"))
    silent = staged(work, "av_sft", "silent", lambda i: i != 5)
    fails(
        "a row without its explanation",
        "rows.jsonl: line 6: no explanation",
        convert("to", work / "new.parquet", silent),
    )
    check("a failure leaves nothing", not list(work.glob("new.parquet*")), list(work.glob("new.parquet*")))
    bare = subprocess.run([sys.executable, "-S", str(DATA / "parquet.py")], capture_output=True, text=True)
    fails("missing modules", "no Python module pyarrow, numpy", bare)


def main():
    part, work = sys.argv[1], Path(sys.argv[2])
    {"api": check_api, "parquet": check_parquet}[part](work)
    print(f"{passed} passed, {failed} failed")


if __name__ == "__main__":
    main()
