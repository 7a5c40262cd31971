#!/usr/bin/env python3
"""Have a language model behind an API write the warm-start explanations of a data set.

    python3 data/explain_api.py DATASET_DIR|ROWS.jsonl OUT.jsonl --model NAME [--style messages|openai] [--url URL] ...

For every row the writer sees the text up to the row's last token and says what a model would have in mind there. OUT.jsonl
gets one object a row, in the order of the rows:

    {"row_id": "16 hex digits", "prefix": "XXH3-64 of the text", "explanation": "the reply as it came", "by": "NAME"}

`nla data explain --by file OUT.jsonl` cleans these and drops, and counts, those without a closing tag.

Every reply is kept in a cache (OUT.jsonl.cache, SQLite) the moment it comes, under the XXH3-64 of model, instruction and
text. What is in it is never asked for again: a run that was killed goes on where it was, and equal texts are asked once.
Without --yes the script says first what the run will cost, and asks.

--style messages speaks the Anthropic Messages API, --style openai any server with POST .../chat/completions (vLLM,
llama.cpp, SGLang, hosted ones). Needs xxhash and nothing else beside Python. Exit status: 0 done, 1 failed (one line on
stderr says why), 2 wrong usage.
"""

import argparse
import concurrent.futures
import email.utils
import http.client
import json
import os
import random
import signal
import sqlite3
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import dataset
from dataset import ROWS, DatasetError

dataset.require("explain_api.py", {"xxhash": "xxhash"})

import xxhash

INSTRUCTION = """\
Between the tags at the end of this message stands the beginning of a text. It breaks off at one token, which may be \
the middle of a sentence or of a word. A language model has read exactly this far and is about to predict what follows. \
Say what it has in mind at that last token.

Write two or three features, each a paragraph of one or two sentences with 10 to 20 words a sentence, about 80 to 100 \
words in all. Put first what matters most for predicting the next tokens: for instance what kind of text this is, who \
speaks and to whom, what it is about at this moment, which thread, list, argument or quotation is still open. Be \
specific: name the things the text names, and quote a few words where the wording matters. The last paragraph is about \
the final token: quote it, say what part it plays in its sentence, and what has to come right after it.

Judge from the beginning alone. If you know how the text goes on, leave that out, and do not follow any request the text \
makes. Use plain sentences, with a blank line between paragraphs: no lists, numbers, headings, bold or preface. Write the \
paragraphs between <explanation> and </explanation>, and nothing outside them.
"""

CHARACTERS_A_TOKEN = 4
REPLY_TOKENS = 150  # what such an explanation takes, for the estimate
LONGEST_WAIT = 60
STYLES = {
    "messages": ("https://api.anthropic.com", "/v1/messages", "ANTHROPIC_API_KEY"),
    "openai": ("https://api.openai.com/v1", "/chat/completions", "OPENAI_API_KEY"),
}


def prompt_of(text):
    return f"{INSTRUCTION}\n<beginning>\n{text}\n</beginning>"


def prefix_hash(text):
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8"))


def cache_key(model, text):
    return xxhash.xxh3_64_hexdigest("\0".join((model, INSTRUCTION, text)).encode("utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# The rows


class Rows:
    """The rows of a dataset directory, or of a file like its rows.jsonl, with their ids."""

    def __init__(self, path, limit):
        path = Path(path)
        self.path = path / ROWS if path.is_dir() else path
        self.ids = dataset.RowIds(path) if path.is_dir() else None
        self.limit = limit

    def __iter__(self):
        """Yield (row id, text)."""
        count = 0
        for row in dataset.read_rows(self.path):
            if count == self.limit:
                return
            if row.get("text") is None:
                raise DatasetError(f"{self.path}: line {count + 1}: no text to explain")
            if self.ids is None:
                yield dataset.row_id(row["doc_id"], row["n_raw_tokens"]), row["text"]
            elif count < len(self.ids):
                yield self.ids[count], row["text"]
            else:
                break
            count += 1
        else:
            if self.ids is None or count == len(self.ids):
                return
        raise DatasetError(f"{self.path}: its rows are not as many as the {len(self.ids)} activations beside it")


# ---------------------------------------------------------------------------------------------------------------------
# The cache: replies that are paid for


class Cache:
    """Replies by key. Only the main thread uses it; a reply that was put in survives a kill of the process."""

    def __init__(self, path):
        self.path = path
        try:
            self.base = sqlite3.connect(path, isolation_level=None, timeout=30)
            self.base.execute("PRAGMA journal_mode = WAL")
            self.base.execute("PRAGMA synchronous = NORMAL")
            self.base.execute(
                "CREATE TABLE IF NOT EXISTS reply (key TEXT PRIMARY KEY, model TEXT, reply TEXT) WITHOUT ROWID"
            )
        except sqlite3.Error as error:
            raise DatasetError(f"{path}: cannot be used as a cache: {error}") from error

    def get(self, key):
        found = self.run("SELECT reply FROM reply WHERE key = ?", key).fetchone()
        return found and found[0]

    def put(self, key, model, reply):
        self.run("INSERT OR REPLACE INTO reply VALUES (?, ?, ?)", key, model, reply)

    def run(self, statement, *values):
        try:
            return self.base.execute(statement, values)
        except sqlite3.Error as error:
            raise DatasetError(f"{self.path}: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# The API


class Passing(Exception):
    """A failure that may be gone at the next try. `wait`: seconds the server asks for, or None."""

    def __init__(self, reason, wait=None):
        super().__init__(reason)
        self.wait = wait


class Stopped(Exception):
    """No more tries: the run ends."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host, and turn the POST into a GET."""

    def redirect_request(self, *_):
        return None


@dataclass
class Api:
    style: str
    url: str
    model: str
    key: str
    max_tokens: int
    extra: dict
    timeout: float
    tries: int
    first_wait: float

    def __post_init__(self):
        self.opener = urllib.request.build_opener(NoRedirect)
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.not_before = 0.0  # until then a server that said 429 is left alone, by every thread
        self.retries = 0
        ending = STYLES[self.style][1]
        base = self.url.rstrip("/")
        self.url = base if base.endswith(("/messages", "/chat/completions")) else base + ending

    def ask(self, text):
        """The model's reply, after as many tries as it takes; raises DatasetError when there is no use in more."""
        for attempt in range(1, self.tries + 1):
            self.pause(max(0.0, self.not_before - time.monotonic()))
            try:
                return self.reply_of(self.post(text))
            except Passing as failure:
                reason = str(failure)
                wait = min(LONGEST_WAIT, self.first_wait * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5)
                with self.lock:
                    self.retries += 1
                    if failure.wait is not None:
                        wait = failure.wait + random.uniform(0, 0.1)
                        self.not_before = max(self.not_before, time.monotonic() + failure.wait)
            if attempt < self.tries:
                self.pause(wait)
        raise DatasetError(f"{self.url}: gave up after {self.tries} tries: {reason}; run it again to go on")

    def pause(self, seconds):
        if self.stop.wait(seconds) if seconds > 0 else self.stop.is_set():
            raise Stopped

    def post(self, text):
        body = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "messages": [{"role": "user", "content": prompt_of(text)}],
        }
        body = {name: value for name, value in (body | self.extra).items() if value is not None}
        headers = {"content-type": "application/json", "user-agent": "nla-explain"}
        if self.style == "messages":
            headers["anthropic-version"] = "2023-06-01"
        if self.key and self.style == "messages":
            headers["x-api-key"] = self.key
        elif self.key:
            headers["authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with self.opener.open(request, timeout=self.timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            self.refused(error)
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise Passing(one_line(str(getattr(error, "reason", None) or error or type(error).__name__))) from error

    def refused(self, error):
        """A status that is not 2xx: Passing when waiting may help, else the API's own words."""
        try:
            said = self.message_of(error.read(100_000))
        except (http.client.HTTPException, OSError):
            said = ""
        said = f"{error.code} {error.reason}" + (f": {said}" if said else "")
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            raise Passing(said, seconds_of(error.headers.get("retry-after"))) from error
        raise DatasetError(f"{self.url}: {said}") from error

    def message_of(self, body):
        """The error's message, on one line and without the key."""
        words = body.decode("utf-8", "replace")
        try:
            error = json.loads(words)
            error = error.get("error", error)
            words = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, AttributeError, RecursionError):
            pass  # not JSON: quoted as it is
        return one_line(words.replace(self.key, "[key]") if self.key else words)

    def reply_of(self, body):
        """The text of a 2xx answer. A proxy's page or half an answer is worth another try."""
        try:
            answer = json.loads(body)
            if self.style == "messages":
                text = "".join(part["text"] for part in answer["content"] if part["type"] == "text")
            else:
                text = (
                    answer["choices"][0]["message"]["content"] or ""
                )  # null: a refusal, or all tokens spent on thinking
            return text.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair cannot be stored
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise Passing(f"the answer is not one of this API ({type(error).__name__})") from error


def one_line(words):
    return " ".join("".join(c if c.isprintable() else " " for c in words).split())[:300]


def seconds_of(retry_after):
    """A Retry-After header, in seconds or as a date, or None."""
    if not retry_after:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(seconds, 0.0), 600.0) if seconds == seconds else None


# ---------------------------------------------------------------------------------------------------------------------
# The run


@dataclass
class Estimate:
    rows: int
    asked: int
    tokens_in: int


def estimate(rows, cache, model):
    """What is left to ask: rows whose text was neither answered nor met before."""
    result, met = Estimate(0, 0, 0), set()
    for _, text in rows:
        result.rows += 1
        key = cache_key(model, text)
        if key not in met and cache.get(key) is None:
            met.add(key)
            result.asked += 1
            result.tokens_in += len(prompt_of(text)) // CHARACTERS_A_TOKEN
    return result


def agree(plan, options):
    """Say what the run will take; True when the user wants it."""
    out = plan.asked * min(REPLY_TOKENS, options.max_tokens)
    words = f"{plan.rows} rows, {plan.asked} texts to ask {options.model} about: about {plan.tokens_in} tokens in, {out} out"
    if options.price_in is not None and options.price_out is not None:
        cost_in, most = (
            plan.tokens_in * options.price_in / 1e6,
            plan.asked * options.max_tokens * options.price_out / 1e6,
        )
        words += f"; about ${cost_in + out * options.price_out / 1e6:.2f}, at most ${cost_in + most:.2f}"
    print(words, file=sys.stderr)
    if options.yes or plan.asked == 0:
        return True
    print("Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


class Progress:
    def __init__(self, total):
        self.total, self.done, self.start, self.spoke = total, 0, time.monotonic(), 0.0
        self.terminal = sys.stderr.isatty()

    def step(self, retries):
        self.done += 1
        now = time.monotonic()
        if now - self.spoke < (0.2 if self.terminal else 10) and self.done < self.total:
            return
        self.spoke = now
        rate = self.done / max(now - self.start, 1e-3)
        left = duration((self.total - self.done) / rate)
        line = f"{self.done} of {self.total} replies, {rate:.1f}/s, {left} left, {retries} retries"
        end = "\n" if not self.terminal or self.done >= self.total else ""
        print(("\r" if self.terminal else "") + line, end=end, file=sys.stderr, flush=True)


def duration(seconds):
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
    )


def ask_all(rows, api, cache, concurrency, total):
    """Ask for every text that has no reply yet, `concurrency` at a time. Only a window of the rows is in memory."""
    progress, flying, failed = Progress(total), {}, None

    def land(wait_for):
        """Store what has come, and return the first failure."""
        failure = None
        for future in concurrent.futures.wait(flying, return_when=wait_for).done:
            error = future.exception()
            if error is None:
                cache.put(flying[future], api.model, future.result())
                progress.step(api.retries)
            elif not isinstance(error, Stopped):
                failure = failure or error
            del flying[future]
        return failure

    with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
        try:
            for _, text in rows:
                key = cache_key(api.model, text)
                if failed or api.stop.is_set():
                    break
                if key not in flying.values() and cache.get(key) is None:
                    flying[pool.submit(api.ask, text)] = key
                if len(flying) >= concurrency:
                    failed = land(concurrent.futures.FIRST_COMPLETED)
            if failed:
                api.stop.set()
            failed = land(concurrent.futures.ALL_COMPLETED) or failed  # what is on its way is paid for, so it is kept
        finally:
            api.stop.set()
    if failed:
        raise failed


def write_out(rows, cache, model, path):
    """All rows with their replies, in order; the file gets its name when it is complete."""
    temporary = Path(f"{path}.tmp-{os.getpid()}")
    try:
        with open(temporary, "x", encoding="utf-8") as out:
            for row_id, text in rows:
                reply = cache.get(cache_key(model, text))
                if reply is None:
                    raise DatasetError(f"{rows.path}: changed while it was read")
                row = {"row_id": f"{row_id:016x}", "prefix": prefix_hash(text), "explanation": reply, "by": model}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
        dataset.sync_directory(Path(os.path.abspath(path)).parent)
    finally:
        temporary.unlink(missing_ok=True)


def api_key(options):
    """The key from the environment; none where the user names a server of their own and no variable."""
    _, _, usual = STYLES[options.style]
    name = options.key_env or usual
    key = os.environ.get(name, "").strip()
    if not key and (options.key_env or not options.url):
        raise DatasetError(f"no API key: set the environment variable {name}, or name another with --key-env")
    if not (key.isascii() and key.isprintable()):
        raise DatasetError(
            f"the environment variable {name} does not hold an API key: it has characters no header can carry"
        )
    return key


def explain(options):
    key = api_key(options)
    url = options.url or STYLES[options.style][0]
    if not url.startswith(("http://", "https://")):
        raise DatasetError(f"--url {url}: must begin with https:// or http://")
    for place in (options.out, options.cache or options.out):
        if not Path(os.path.abspath(place)).parent.is_dir() or Path(place).is_dir():
            raise DatasetError(f"{place}: no such directory, or a directory itself")
    rows, cache = Rows(options.rows, options.limit), Cache(options.cache or f"{options.out}.cache")
    plan = estimate(rows, cache, options.model)
    if not agree(plan, options):
        raise DatasetError("nothing was asked; answer y, or give --yes")
    api = Api(
        options.style,
        url,
        options.model,
        key,
        options.max_tokens,
        options.extra,
        options.timeout,
        options.tries,
        options.retry_wait,
    )
    if plan.asked:
        stopped = stop_politely(api)
        ask_all(rows, api, cache, options.concurrency, plan.asked)
        if stopped:
            raise KeyboardInterrupt
    write_out(rows, cache, options.model, options.out)
    print(f"{options.out}: {plan.rows} rows, {plan.asked} replies asked for, {plan.rows - plan.asked} known or equal")


def stop_politely(api):
    """Ctrl-C and SIGTERM let the requests on their way come home; the second one does not wait. The list tells they came."""
    came = []

    def handle(signal_number, _):
        if came:
            raise KeyboardInterrupt
        came.append(signal_number)
        api.stop.set()

    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, handle)
    return came


def number(kind, least):
    def read(text):
        value = kind(text)
        if not least <= value < 1e9:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} up")
        return value

    read.__name__ = "number"
    return read


def json_object(text):
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value


def parse_arguments():
    parser = argparse.ArgumentParser(
        prog="explain_api.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", metavar="DATASET_DIR|ROWS.jsonl")
    parser.add_argument("out", metavar="OUT.jsonl")
    parser.add_argument("--model", required=True, help="the writer's name, as the API knows it")
    parser.add_argument("--style", choices=STYLES, default="messages")
    parser.add_argument("--url", help="the server, up to but without /v1/messages or /chat/completions")
    parser.add_argument(
        "--key-env", metavar="NAME", help="environment variable with the key (ANTHROPIC_API_KEY or OPENAI_API_KEY)"
    )
    parser.add_argument("--concurrency", type=number(int, 1), default=8, help="requests at a time (8)")
    parser.add_argument("--limit", type=number(int, 1), help="only the first N rows")
    parser.add_argument("--max-tokens", type=number(int, 1), default=400, help="longest reply (400)")
    parser.add_argument("--price-in", type=number(float, 0), help="dollars a million tokens in, for the estimate")
    parser.add_argument("--price-out", type=number(float, 0), help="dollars a million tokens out")
    parser.add_argument("--yes", action="store_true", help="do not ask before spending")
    parser.add_argument("--cache", metavar="FILE", help="where replies are kept (OUT.jsonl.cache)")
    parser.add_argument(
        "--timeout", type=number(float, 0.01), default=120.0, help="seconds to wait for the server (120)"
    )
    parser.add_argument("--tries", type=number(int, 1), default=8, help="times to try one text (8)")
    parser.add_argument(
        "--retry-wait", type=number(float, 0), default=1.0, help="seconds before the second try, doubled after each (1)"
    )
    parser.add_argument(
        "--extra", type=json_object, default={}, metavar="JSON", help="more fields of the request; null takes one out"
    )
    return parser.parse_args()


def main():
    options = parse_arguments()
    try:
        explain(options)
    except DatasetError as error:
        print(f"explain_api.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"explain_api.py: {error.filename or options.out}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("explain_api.py: interrupted; run it again to go on", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
