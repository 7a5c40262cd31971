#!/usr/bin/env python3
"""Convert between dataset directories of nla and the parquet files of the reference implementation.

    python3 data/parquet.py to FILE.parquet DATASET_DIR
    python3 data/parquet.py from FILE.parquet... DATASET_DIR [--sidecar FILE.nla_meta.yaml]

The reference keeps a data set as one parquet file with its sidecar beside it, named FILE.parquet.nla_meta.yaml. The
sidecar's stage decides the columns:

    base     n_raw_tokens detokenized_text_truncated activation_vector activation_layer doc_id [api_explanation]
    av_sft   prompt response activation_vector n_raw_tokens activation_layer doc_id [detokenized_text_truncated]
    rl       the same without response
    ar_sft   prompt activation_vector n_raw_tokens activation_layer doc_id [detokenized_text_truncated]

activation_vector is a fixed-size list of float32, the two numbers are int64, the rest strings, but for the prompt of
av_sft and rl: a list of messages {role, content} with one user message, the AV template with <INJECT> where the marker
goes. The prompt of ar_sft is the AR template, filled. `response` is the explanation between its tags, on lines of its own.

Both ways the rows keep their order, vectors and words stay as they are to the bit, token ids in the sidecar are carried
over untouched, and what was written is read back and compared before it gets its name. Rows are counted from 0. Memory
does not grow with the file but for 8 bytes a row.

Needs pyarrow, numpy, xxhash and PyYAML. Exit status: 0 done, 1 failed (one line on stderr says why), 2 wrong usage.
"""

import argparse
import copy
import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import dataset
from dataset import ROWS, SIDECAR, VECTORS, DatasetError

dataset.require("parquet.py", {"pyarrow": "pyarrow", "numpy": "numpy", "xxhash": "xxhash", "yaml": "pyyaml"})

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
import yaml

STAGES = ("base", "av_sft", "ar_sft", "rl")
PLACEHOLDER = "<INJECT>"  # stands for the marker in the reference's prompts; it knows the character from the sidecar
EXPLANATION = re.compile(r"<explanation>\n?(.*?)\n?</explanation>", re.DOTALL)
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
ROWS_AT_ONCE, BYTES_AT_ONCE = 4096, 32 << 20
HEADER_BYTES = 1024  # as data.c writes it


@dataclass
class Batch:
    """Consecutive rows, in the form both sides are read into."""

    vectors: np.ndarray  # [rows, d] float32
    n_raw_tokens: np.ndarray  # [rows] int64
    doc_id: list
    text: list  # None where there is none
    explanation: list  # None where there is none

    def row_ids(self):
        return np.array([dataset.row_id(*row) for row in zip(self.doc_id, self.n_raw_tokens.tolist())], dtype="<u8")

    def identities(self):
        """Hashes that differ where document or position do; row ids may not, for documents named in 8 bytes or fewer."""
        pairs = zip(self.n_raw_tokens.tolist(), self.doc_id)
        return np.array(
            [xxhash.xxh3_64_intdigest(f"{count} {doc_id}".encode("utf-8")) for count, doc_id in pairs], dtype="<u8"
        )


def rows_at_once(width):
    return max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // (4 * width)))


def first_true(mask):
    return int(np.argmax(mask))


# ---------------------------------------------------------------------------------------------------------------------
# Sidecars


class SidecarLoader(yaml.SafeLoader):
    """Dates stay the words they are, and 1e-5 is a number, as for nla's own reader."""


SidecarLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
SidecarLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_sidecar(path):
    """The sidecar of a data set, with all that a conversion relies on checked."""
    try:
        meta = yaml.load(Path(path).read_text(encoding="utf-8"), SidecarLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DatasetError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(meta, dict) or meta.get("kind") != "nla_dataset":
        raise DatasetError(f"{path}: kind is not nla_dataset")
    for key in ("extraction", "tokens", "prompt_templates"):
        if not isinstance(meta.get(key) or {}, dict):
            raise DatasetError(f"{path}: {key} is not a mapping")
    checks = {
        "dataset_id": isinstance(meta.get("dataset_id"), str),
        "stage": meta.get("stage") in STAGES,
        "row_count": is_count(meta.get("row_count")),
        "extraction.base_model": isinstance(field(meta, "extraction", "base_model"), str),
        "extraction.d_model": is_count(field(meta, "extraction", "d_model"))
        and field(meta, "extraction", "d_model") > 0,
        "extraction.layer_index": is_count(field(meta, "extraction", "layer_index")),
        "extraction.norm": field(meta, "extraction", "norm") == "none",  # vectors are stored raw, or are something else
    }
    for key, good in checks.items():
        if not good:
            value = field(meta, *key.split("."))
            raise DatasetError(f"{path}: {key} is {'missing' if value is None else f'{value!r}, which cannot be'}")
    return meta


def is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def field(meta, *keys):
    for key in keys:
        meta = meta.get(key) if isinstance(meta, dict) else None
    return meta


def template_of(meta, role, path):
    """The template of the av or the ar, split at its hole."""
    older = {"av": "actor", "ar": "critic"}[role]
    hole = {"av": "{injection_char}", "ar": "{explanation}"}[role]
    text = field(meta, "prompt_templates", role) or field(meta, "prompt_templates", older)
    if not isinstance(text, str) or text.count(hole) != 1:
        raise DatasetError(f"{path}: stage {meta['stage']} needs prompt_templates.{role} with {hole} in it once")
    return text.split(hole)


def for_reference(meta, has_text, vector_dtype):
    """Our sidecar as the reference reads it: `actor` and `critic`, and in stage base no key of extraction that it lacks."""
    meta = copy.deepcopy(meta)
    templates = meta.get("prompt_templates") or {}
    for ours, theirs in (("av", "actor"), ("ar", "critic")):
        if ours in templates:
            templates.setdefault(theirs, templates[ours])
    for key in ("corpus", "corpus_slice", "positions_per_doc"):
        meta["extraction"].setdefault(key, None)
    if meta["stage"] == "base":
        known = {"base_model", "d_model", "layer_index", "norm", "corpus", "corpus_slice", "positions_per_doc"}
        more = {key: meta["extraction"].pop(key) for key in set(meta["extraction"]) - known}
        if more:
            meta["extraction_more"] = dict(sorted(more.items()))
    meta["keep_debug_metadata"] = has_text
    if vector_dtype == "BF16":
        meta["vector_dtype"] = "BF16"
    return meta


def for_us(metas, files, rows, directory):
    """The sidecars of the files as one of ours. What the files disagree in is left out, or stops the conversion."""
    meta = copy.deepcopy(metas[0])
    for other, path in zip(metas[1:], files[1:]):
        for keys in (
            ("stage",),
            ("extraction", "base_model"),
            ("extraction", "layer_index"),
            ("tokens",),
            ("prompt_templates",),
        ):
            if field(other, *keys) != field(meta, *keys):
                raise DatasetError(f"{path}: its sidecar's {'.'.join(keys)} is not that of {files[0]}")
    ids = list(dict.fromkeys(other["dataset_id"] for other in metas))
    if len(ids) > 1:
        meta |= {"dataset_id": directory.name, "parent_datasets": ids}
    if any(field(other, "extraction", "corpus_slice") != field(meta, "extraction", "corpus_slice") for other in metas):
        meta["extraction"]["corpus_slice"] = None
    meta["extraction"] = {key: value for key, value in meta["extraction"].items() if value is not None}
    meta["extraction"] |= meta.pop("extraction_more", None) or {}
    templates = meta.get("prompt_templates") or {}
    for ours, theirs in (("av", "actor"), ("ar", "critic")):
        older = templates.pop(theirs, None)
        if older is not None:
            templates.setdefault(ours, older)
    meta["row_count"] = rows
    meta.pop("keep_debug_metadata", None)
    meta.pop("vector_dtype", None)
    return meta


def save_sidecar(meta, path):
    text = yaml.safe_dump(meta, sort_keys=False, allow_unicode=True, width=10000)
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# Reading: the two sides, each as batches


class Directory:
    """A dataset directory of ours."""

    def __init__(self, directory):
        self.rows_path, self.path = Path(directory) / ROWS, Path(directory) / VECTORS
        self.meta = load_sidecar(Path(directory) / SIDECAR)
        header = dataset.read_header(self.path)
        self.vectors = dataset.find_tensor(self.path, header, "activation_vector", ["F32", "BF16"], 2)
        self.rows, self.width = self.vectors.shape
        self.n_raw_tokens = self.load(dataset.find_tensor(self.path, header, "n_raw_tokens", ["I64"], 1), "<i8")
        self.row_id = self.load(dataset.find_tensor(self.path, header, "row_id", ["U64"], 1), "<u8")
        for what, count in (("n_raw_tokens", len(self.n_raw_tokens)), ("row_id", len(self.row_id))):
            if count != self.rows:
                raise DatasetError(f"{self.path}: {what} has {count} rows, activation_vector {self.rows}")
        for key, value in (("row_count", self.rows), ("extraction.d_model", self.width)):
            if field(self.meta, *key.split(".")) != value:
                raise DatasetError(
                    f"{directory}/{SIDECAR}: {key} is {field(self.meta, *key.split('.'))}, {VECTORS} says {value}"
                )

    def load(self, tensor, dtype):
        return np.fromfile(self.path, dtype, tensor.shape[0], offset=tensor.begin)

    def place(self, row):
        return f"{self.path.parent}: row {row}"

    def batches(self):
        rows = dataset.read_rows(self.rows_path)
        with open(self.path, "rb") as file:
            file.seek(self.vectors.begin)
            for first in range(0, self.rows, rows_at_once(self.width)):
                count = min(rows_at_once(self.width), self.rows - first)
                yield self.batch(first, self.read_vectors(file, count), [row for _, row in zip(range(count), rows)])
        if next(rows, None) is not None:
            raise DatasetError(f"{self.rows_path}: holds more rows than the {self.rows} of {VECTORS}")

    def read_vectors(self, file, count):
        if self.vectors.dtype == "F32":
            data = np.fromfile(file, "<f4", count * self.width)
        else:
            data = (np.fromfile(file, "<u2", count * self.width).astype("<u4") << 16).view("<f4")
        return data.reshape(count, self.width)

    def batch(self, first, vectors, rows):
        if len(rows) != len(vectors):
            raise DatasetError(f"{self.rows_path}: holds {first + len(rows)} rows, {VECTORS} {self.rows}")
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise DatasetError(f"{self.path}: activation_vector, row {first + first_true(~finite)}: is not finite")
        batch = Batch(
            vectors,
            np.array([row["n_raw_tokens"] for row in rows], "<i8"),
            [row["doc_id"] for row in rows],
            [row.get("text") for row in rows],
            [row.get("explanation") for row in rows],
        )
        differs = batch.n_raw_tokens != self.n_raw_tokens[first : first + len(rows)]
        if differs.any():
            raise DatasetError(
                f"{self.path}: n_raw_tokens, row {first + first_true(differs)}: {ROWS} says something else"
            )
        ids = batch.row_ids()
        differs = ids != self.row_id[first : first + len(rows)]
        if differs.any():
            row = first_true(differs)
            raise DatasetError(
                f"{self.path}: row_id, row {first + row}: is {self.row_id[first + row]:016x}, "
                f"doc_id and n_raw_tokens make it {ids[row]:016x}"
            )
        return batch


class Parquet:
    """One parquet file of the reference's, with its sidecar's word on what must be in it."""

    def __init__(self, path, meta, meta_path):
        self.path, self.meta, self.stage = Path(path), meta, meta["stage"]
        self.width, self.layer = meta["extraction"]["d_model"], meta["extraction"]["layer_index"]
        with self.arrow_errors():
            self.file = pq.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False)
        self.rows, self.names = self.file.metadata.num_rows, self.file.schema_arrow.names
        if self.stage in ("av_sft", "rl"):
            before, after = template_of(meta, "av", meta_path)
            marker = field(meta, "tokens", "injection_char") or PLACEHOLDER
            self.prompts = {before + mark + after for mark in (PLACEHOLDER, marker)}
        if self.stage == "ar_sft":
            self.before, self.after = template_of(meta, "ar", meta_path)
        self.columns = self.check_columns()

    def arrow_errors(self):
        return ArrowErrors(self.path)

    def fail(self, column, row, why):
        raise DatasetError(f"{self.path}: {column}, row {row}: {why}")

    def check_columns(self):
        """The columns there must be, each of a type that can be read; says which others are left out."""
        required = ["activation_vector", "n_raw_tokens", "activation_layer", "doc_id"]
        required += {"base": [], "av_sft": ["prompt", "response"], "ar_sft": ["prompt"], "rl": ["prompt"]}[self.stage]
        optional = ["detokenized_text_truncated"] + (["api_explanation"] if self.stage in ("base", "rl") else [])
        for name in required:
            if self.names.count(name) != 1:
                there = "is there twice" if name in self.names else f"is missing; stage {self.stage} needs it"
                raise DatasetError(f"{self.path}: column {name} {there}")
        wanted = required + [name for name in optional if name in self.names]
        for name in wanted:
            self.check_type(name, self.file.schema_arrow.field(name).type)
        others = sorted(set(self.names) - set(wanted))
        if others:
            print(f"{self.path}: left out: {', '.join(others)}", file=sys.stderr)
        return wanted

    def check_type(self, name, type_):
        kinds = pa.types
        a_list = kinds.is_list(type_) or kinds.is_large_list(type_) or kinds.is_fixed_size_list(type_)
        if name == "activation_vector":
            good, want = a_list and kinds.is_floating(type_.value_type), "a list of floats"
            if good and kinds.is_fixed_size_list(type_) and type_.list_size != self.width:
                raise DatasetError(
                    f"{self.path}: activation_vector has width {type_.list_size}, its sidecar says {self.width}"
                )
        elif name in ("n_raw_tokens", "activation_layer"):
            good, want = kinds.is_integer(type_), "an integer"
        elif name == "prompt" and self.stage != "ar_sft":
            good = (
                a_list
                and kinds.is_struct(type_.value_type)
                and {"role", "content"} <= {part.name for part in type_.value_type}
            )
            want = "a list of messages {role, content}"
        else:
            good, want = kinds.is_string(type_) or kinds.is_large_string(type_), "a string"
        if not good:
            raise DatasetError(f"{self.path}: column {name} is {type_}, not {want}")

    def batches(self):
        first = 0
        with self.arrow_errors():
            for arrow in self.file.iter_batches(rows_at_once(self.width), columns=self.columns):
                yield self.batch(first, arrow)
                first += len(arrow)
        if first != self.rows:
            raise DatasetError(f"{self.path}: holds {first} rows, its footer says {self.rows}")

    def batch(self, first, arrow):
        column = {}
        for name in self.columns:
            column[name] = arrow.column(name)
            if column[name].null_count and name != "api_explanation":
                self.fail(name, first + pc.index(column[name].is_null(), True).as_py(), "is null")
        counts = self.integers(first, column, "n_raw_tokens")
        if (counts < 1).any():
            self.fail("n_raw_tokens", first + first_true(counts < 1), "is not positive")
        layers = self.integers(first, column, "activation_layer")
        if (layers != self.layer).any():
            row = first_true(layers != self.layer)
            self.fail("activation_layer", first + row, f"is {layers[row]}, the sidecar says {self.layer}")
        rows = len(arrow)
        text = column.get("detokenized_text_truncated")
        return Batch(
            self.floats(first, column["activation_vector"]),
            counts,
            column["doc_id"].to_pylist(),
            text.to_pylist() if text is not None else [None] * rows,
            self.explanations(first, column, rows),
        )

    def integers(self, first, column, name):
        values = column[name].to_numpy(zero_copy_only=False)
        if values.dtype == np.uint64 and (values >> np.uint64(63)).any():
            self.fail(name, first + first_true(values >> np.uint64(63)), "does not fit in 64 bits with a sign")
        return values.astype("<i8")

    def floats(self, first, lists):
        if not pa.types.is_fixed_size_list(lists.type):
            widths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
            if (widths != self.width).any():
                row = first_true(widths != self.width)
                self.fail("activation_vector", first + row, f"has width {widths[row]}, the sidecar says {self.width}")
        flat = lists.flatten()
        if flat.null_count:
            self.fail("activation_vector", first + pc.index(flat.is_null(), True).as_py() // self.width, "holds a null")
        stored = flat.to_numpy(zero_copy_only=False).reshape(len(lists), self.width)
        finite = np.isfinite(stored).all(axis=1)
        if not finite.all():
            self.fail("activation_vector", first + first_true(~finite), "is not finite")
        with np.errstate(over="ignore"):
            vectors = stored.astype("<f4", copy=False)
        same = (vectors == stored).all(axis=1)
        if not same.all():
            self.fail("activation_vector", first + first_true(~same), f"{stored.dtype} values do not fit in float32")
        return vectors

    def explanations(self, first, column, rows):
        if self.stage in ("av_sft", "rl"):
            for row, prompt in enumerate(column["prompt"].to_pylist()):
                one = len(prompt) == 1 and prompt[0]["role"] == "user"
                if not one or prompt[0]["content"] not in self.prompts:
                    self.fail("prompt", first + row, "is not one user message with the sidecar's AV template")
        if self.stage == "av_sft":
            return [self.response(first + row, text) for row, text in enumerate(column["response"].to_pylist())]
        if self.stage == "ar_sft":
            return [self.unfilled(first + row, text) for row, text in enumerate(column["prompt"].to_pylist())]
        return column["api_explanation"].to_pylist() if "api_explanation" in column else [None] * rows

    def response(self, row, text):
        found = EXPLANATION.fullmatch(text)
        if not found:
            self.fail("response", row, "is not <explanation>, a text, </explanation>")
        return found[1]

    def unfilled(self, row, text):
        inner = len(text) - len(self.after)
        if not (text.startswith(self.before) and text.endswith(self.after) and inner >= len(self.before)):
            self.fail("prompt", row, "is not the sidecar's AR template filled")
        return text[len(self.before) : inner]


class ArrowErrors:
    """What pyarrow says of a file, as one line of ours."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        damaged = isinstance(error, (pa.ArrowException, UnicodeDecodeError)) or (
            isinstance(error, OSError) and not error.errno
        )
        if damaged:
            raise DatasetError(
                f"{self.path}: not a parquet file that can be read: {' '.join(str(error).split())[:300]}"
            ) from error


class Parquets:
    """Several parquet files one after the other."""

    def __init__(self, paths, sidecar):
        sidecars = [sidecar or f"{path}.{SIDECAR}" for path in paths]
        for path, beside in zip(paths, sidecars):
            if not Path(beside).exists():
                raise DatasetError(f"{beside}: no such file; name the sidecar of {path} with --sidecar")
        self.metas = [load_sidecar(beside) for beside in sidecars]
        self.files = [Parquet(*file) for file in zip(paths, self.metas, sidecars)]
        self.rows, self.width = sum(file.rows for file in self.files), self.files[0].width
        counted = (
            [(sidecar, self.rows)] if sidecar else [(beside, file.rows) for beside, file in zip(sidecars, self.files)]
        )
        for (beside, rows), meta in zip(counted, self.metas):
            if meta["row_count"] != rows:
                raise DatasetError(f"{beside}: row_count is {meta['row_count']}, the parquet has {rows} rows")
        for file in self.files:
            if file.width != self.width:
                raise DatasetError(f"{file.path}: width {file.width}, {self.files[0].path} has {self.width}")

    def batches(self):
        for file in self.files:
            yield from file.batches()

    def place(self, row):
        for file in self.files:
            if row < file.rows:
                return f"{file.path}: row {row}"
            row -= file.rows
        raise IndexError(row)


# ---------------------------------------------------------------------------------------------------------------------
# Writing: under a temporary name until all is there, read back and synced


class DirectoryWriter:
    """Writes what DatasetWriter in data.c writes, to the byte."""

    def __init__(self, directory, rows, width, bf16):
        self.directory, self.rows, self.width, self.dtype = (
            Path(os.path.abspath(directory)),
            rows,
            width,
            "BF16" if bf16 else "F32",
        )
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise DatasetError(f"{directory}: exists and is not empty; remove it or name another directory")
        vectors = rows * width * dataset.BYTES_OF[self.dtype]
        shapes = {"activation_vector": (self.dtype, [rows, width], vectors), "n_raw_tokens": ("I64", [rows], 8 * rows)}
        shapes["row_id"] = ("U64", [rows], 8 * rows)
        if vectors % 8:  # the 8-byte columns must stay aligned, and safetensors allows no gap
            shapes["activation_vector"] = shapes.pop("activation_vector")
        header, self.at, end = {"__metadata__": {"format": "pt"}}, {}, 0
        for name, (dtype, shape, size) in shapes.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            self.at[name] = HEADER_BYTES + end
            end += size
        text = json.dumps(header, separators=(",", ":")).encode().ljust(HEADER_BYTES - 8)
        self.temporary = self.directory.with_name(f"{self.directory.name}.tmp-{os.getpid()}")
        self.temporary.mkdir()
        self.vectors = open(self.temporary / VECTORS, "xb")
        self.words = open(self.temporary / ROWS, "x", encoding="utf-8", newline="\n")
        self.vectors.write(len(text).to_bytes(8, "little") + text)
        self.done = 0

    def append(self, batch):
        self.vectors.seek(self.at["activation_vector"] + self.done * self.width * dataset.BYTES_OF[self.dtype])
        self.vectors.write(self.to_bf16(batch) if self.dtype == "BF16" else batch.vectors.tobytes())
        for name, column in (("n_raw_tokens", batch.n_raw_tokens), ("row_id", batch.row_ids())):
            self.vectors.seek(self.at[name] + 8 * self.done)
            self.vectors.write(column.tobytes())
        for row in zip(batch.doc_id, batch.n_raw_tokens.tolist(), batch.text, batch.explanation):
            self.words.write(json_line(*row))
        self.done += len(batch.doc_id)

    def to_bf16(self, batch):
        bits = batch.vectors.view("<u4")
        lost = (bits & 0xFFFF).any(axis=1)
        if lost.any():
            raise DatasetError(
                f"row {self.done + first_true(lost)}: the sidecar says vector_dtype BF16, the values need float32"
            )
        return (bits >> 16).astype("<u2").tobytes()

    def finish(self, meta):
        for file in (self.vectors, self.words):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        save_sidecar(meta, self.temporary / SIDECAR)
        dataset.sync_directory(self.temporary)

    def written(self):
        return Directory(self.temporary)

    def publish(self):
        os.rename(self.temporary, self.directory)  # takes the place of an empty directory, of nothing else
        dataset.sync_directory(self.directory.parent)

    def abandon(self):
        self.vectors.close()
        self.words.close()
        shutil.rmtree(self.temporary, ignore_errors=True)


JSON_ESCAPES = (
    {code: f"\\u{code:04x}" for code in range(0x20)} | {ord(c): f"\\{c}" for c in '"\\'} | {10: "\\n", 9: "\\t"}
)


def json_line(doc_id, n_raw_tokens, text, explanation):
    """A row as json_write_string in safetensors.c spells it."""
    line = f'{{"doc_id": "{doc_id.translate(JSON_ESCAPES)}", "n_raw_tokens": {n_raw_tokens}'
    for key, value in (("text", text), ("explanation", explanation)):
        if value is not None:
            line += f', "{key}": "{value.translate(JSON_ESCAPES)}"'
    return line + "}\n"


class ParquetWriter:
    def __init__(self, path, ours):
        self.path, self.ours, self.stage = Path(os.path.abspath(path)), ours, ours.meta["stage"]
        self.sidecar = self.path.with_name(f"{self.path.name}.{SIDECAR}")
        for there in (self.path, self.sidecar):
            if there.exists():
                raise DatasetError(f"{there}: exists; remove it or name another file")
        first = next(dataset.read_rows(ours.rows_path), {})
        self.has_text = first.get("text") is not None
        self.schema = self.make_schema()
        self.temporary = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}")
        self.temporary_sidecar = Path(f"{self.temporary}.{SIDECAR}")
        words = [name for name in self.schema.names if name != "activation_vector"]
        self.writer = pq.ParquetWriter(
            self.temporary, self.schema, use_dictionary=words + ["prompt.list.element.content"]
        )
        self.done = 0

    def make_schema(self):
        """The reference's columns in its order; api_explanation where a stage without a place for words has some."""
        vectors, text = ("activation_vector", pa.list_(pa.float32(), self.ours.width)), (
            "detokenized_text_truncated",
            pa.string(),
        )
        provenance = [("n_raw_tokens", pa.int64()), ("activation_layer", pa.int64()), ("doc_id", pa.string())]
        meta_path = self.ours.path.with_name(SIDECAR)
        if self.stage == "base":
            columns = [provenance[0], *([text] if self.has_text else []), vectors, *provenance[1:]]
        else:
            columns = [("prompt", pa.string() if self.stage == "ar_sft" else MESSAGES), vectors, *provenance]
            columns += [text] if self.has_text else []
        if self.stage == "av_sft":
            columns.insert(1, ("response", pa.string()))
        if self.stage in ("base", "rl") and has_explanations(self.ours.rows_path):
            columns.append(("api_explanation", pa.string()))
        if self.stage in ("av_sft", "rl"):
            before, after = template_of(self.ours.meta, "av", meta_path)
            if field(self.ours.meta, "tokens", "injection_token_id") is None:
                raise DatasetError(f"{meta_path}: stage {self.stage} needs tokens.injection_token_id")
            self.prompt = [{"role": "user", "content": before + PLACEHOLDER + after}]
        if self.stage == "ar_sft":
            self.before, self.after = template_of(self.ours.meta, "ar", meta_path)
        return pa.schema(columns)

    def append(self, batch):
        rows = len(batch.doc_id)
        self.check_words(batch)
        column = {
            "activation_vector": pa.FixedSizeListArray.from_arrays(
                pa.array(batch.vectors.reshape(-1)), self.ours.width
            ),
            "n_raw_tokens": batch.n_raw_tokens,
            "activation_layer": np.full(rows, self.ours.meta["extraction"]["layer_index"]),
            "doc_id": batch.doc_id,
            "detokenized_text_truncated": batch.text,
            "api_explanation": batch.explanation,
        }
        if self.stage in ("av_sft", "rl"):
            column["prompt"] = [self.prompt] * rows
        if self.stage == "av_sft":
            column["response"] = [f"<explanation>\n{text}\n</explanation>" for text in batch.explanation]
        if self.stage == "ar_sft":
            column["prompt"] = [self.before + text + self.after for text in batch.explanation]
        self.writer.write_table(
            pa.table([pa.array(column[part.name], part.type) for part in self.schema], schema=self.schema)
        )
        self.done += rows

    def check_words(self, batch):
        for row, (text, explanation) in enumerate(zip(batch.text, batch.explanation), self.done):
            if (text is not None) != self.has_text:
                raise DatasetError(f"{self.ours.rows_path}: line {row + 1}: some rows have a text and this one differs")
            if explanation is None and self.stage in ("av_sft", "ar_sft"):
                raise DatasetError(
                    f"{self.ours.rows_path}: line {row + 1}: no explanation; stage {self.stage} needs one"
                )

    def finish(self, meta):
        self.writer.close()
        with open(self.temporary, "rb+") as file:
            os.fsync(file.fileno())
        save_sidecar(meta, self.temporary_sidecar)

    def written(self):
        return Parquets([self.temporary], self.temporary_sidecar)

    def publish(self):
        os.rename(self.temporary_sidecar, self.sidecar)
        os.rename(self.temporary, self.path)
        dataset.sync_directory(self.path.parent)

    def abandon(self):
        try:
            self.writer.close()
        except (OSError, pa.ArrowException):
            pass  # it goes anyway
        for path in (self.temporary, self.temporary_sidecar):
            path.unlink(missing_ok=True)


def has_explanations(path):
    with open(path, "rb") as file:
        return any(b'"explanation"' in line and isinstance(json.loads(line).get("explanation"), str) for line in file)


# ---------------------------------------------------------------------------------------------------------------------
# Converting


class Digest:
    """What must be the same on both sides however the rows are cut into batches: the vectors' bytes, and the rest."""

    def __init__(self):
        self.rows, self.vectors, self.rest = 0, xxhash.xxh3_64(), xxhash.xxh3_64()

    def update(self, batch):
        self.rows += len(batch.doc_id)
        self.vectors.update(np.ascontiguousarray(batch.vectors))
        for row in zip(batch.doc_id, batch.n_raw_tokens.tolist(), batch.text, batch.explanation):
            self.rest.update(json.dumps(row).encode())

    def value(self):
        return self.rows, self.vectors.hexdigest(), self.rest.hexdigest()


def convert(reader, writer, meta):
    try:
        digest, identities = Digest(), np.empty(reader.rows, "<u8")
        for batch in progress(reader):
            writer.append(batch)
            identities[digest.rows : digest.rows + len(batch.doc_id)] = batch.identities()
            digest.update(batch)
        check_duplicates(reader, identities)
        writer.finish(meta)
        again = Digest()
        for batch in writer.written().batches():
            again.update(batch)
        if again.value() != digest.value():
            raise DatasetError(f"{writer.temporary}: read back, it differs from what was written; is the disk sound?")
        writer.publish()
        return digest
    except BaseException:
        writer.abandon()
        raise


def progress(reader):
    """The batches, with a line on a terminal that says how far they are."""
    start, done = time.monotonic(), 0
    for batch in reader.batches():
        yield batch
        done += len(batch.doc_id)
        if sys.stderr.isatty():
            rate = done / max(time.monotonic() - start, 1e-3)
            print(f"\r{done} of {reader.rows} rows, {rate:.0f} rows/s ", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)


def check_duplicates(reader, identities):
    order = np.argsort(identities, kind="stable")
    twice = identities[order][1:] == identities[order][:-1]
    if twice.any():
        row, again = (int(order[first_true(twice) + i]) for i in (0, 1))
        raise DatasetError(f"{reader.place(again)}: doc_id and n_raw_tokens are those of {reader.place(row)}")


def to_parquet(path, directory):
    ours = Directory(directory)
    writer = ParquetWriter(path, ours)
    digest = convert(ours, writer, for_reference(ours.meta, writer.has_text, ours.vectors.dtype))
    report(path, ours, digest, ours.meta)


def from_parquet(paths, directory, sidecar):
    theirs = Parquets(paths, sidecar)
    dtypes = {meta.get("vector_dtype", "F32") for meta in theirs.metas}
    meta = for_us(theirs.metas, paths, theirs.rows, Path(os.path.abspath(directory)))
    digest = convert(theirs, DirectoryWriter(directory, theirs.rows, theirs.width, dtypes == {"BF16"}), meta)
    report(directory, theirs, digest, meta)


def report(path, reader, digest, meta):
    print(
        f"{path}: {digest.rows} rows of width {reader.width}, layer {meta['extraction']['layer_index']}, stage {meta['stage']}; "
        f"XXH3 of the vectors {digest.vectors.hexdigest()}, read back and equal"
    )


def main():
    parser = argparse.ArgumentParser(
        prog="parquet.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    parser.add_argument("way", choices=["to", "from"])
    parser.add_argument("paths", nargs="+", metavar="PATH")
    parser.add_argument("--sidecar")
    options = parser.parse_intermixed_args()
    if len(options.paths) < 2 or (options.way == "to" and (len(options.paths) > 2 or options.sidecar)):
        parser.error("parquet.py to FILE.parquet DIR, or parquet.py from FILE.parquet... DIR [--sidecar FILE]")
    *files, directory = options.paths
    try:
        if options.way == "to":
            to_parquet(files[0], directory)
        else:
            from_parquet(files, directory, options.sidecar)
    except DatasetError as error:
        print(f"parquet.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"parquet.py: {error.filename or options.paths[-1]}: {error.strerror or ' '.join(str(error).split())}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("parquet.py: interrupted; nothing was left behind", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
