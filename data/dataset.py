"""A dataset directory of nla, read from Python: what parquet.py and explain_api.py share.

activations.safetensors holds activation_vector [N, d] (F32 or BF16), n_raw_tokens [N] (I64) and row_id [N] (U64); rows.jsonl
has one object a row: doc_id, n_raw_tokens, text, and explanation where there is one; nla_meta.yaml says where they are from.
Nothing here holds more than a row and the row ids in memory, and nothing but xxhash is needed beside Python's own library.
"""

import importlib.util
import json
import math
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

VECTORS, ROWS, SIDECAR = "activations.safetensors", "rows.jsonl", "nla_meta.yaml"
BYTES_OF = {"F32": 4, "BF16": 2, "I64": 8, "U64": 8}
HEADER_LIMIT = 100 << 20  # of the safetensors format


class DatasetError(Exception):
    """A failure the user can act on; its text is the one line printed."""


def require(script, modules):
    """Stop with one line unless each module can be imported; `modules` maps its name to the package that has it."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(modules.values())
        sys.exit(
            f"{script}: no Python module {', '.join(missing)}; get what it needs with: python3 -m venv VENV && "
            f"VENV/bin/pip install {packages}, then run VENV/bin/python data/{script}"
        )


def row_id(doc_id, n_raw_tokens):
    """The id `nla capture` gives a row: XXH3-64 of the document's id, seeded with the length of the prefix in tokens."""
    import xxhash

    return xxhash.xxh3_64_intdigest(f"{doc_id}#{n_raw_tokens}".encode("utf-8"))


def sync_directory(path):
    """A rename survives a power cut only when the directory it happened in is synced."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------------------------------
# activations.safetensors


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple
    begin: int  # in the file
    end: int


def read_header(path):
    """Map each tensor's name to its place in the file, checked against the file's size."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise DatasetError(f"{path}: not a safetensors file: its header says {length} bytes, the file has {size}")
        try:
            header = json.loads(file.read(length))
            return {
                name: checked_tensor(path, name, entry, 8 + length, size)
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DatasetError(f"{path}: not a safetensors file: its header cannot be read ({error})") from error


def checked_tensor(path, name, entry, data_begins, size):
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name}: shape or offsets are not whole numbers")
    if begin > end or data_begins + end > size:
        raise DatasetError(f"{path}: {name} lies at {begin}..{end}, outside the file; is it complete?")
    if entry["dtype"] in BYTES_OF and math.prod(shape) * BYTES_OF[entry["dtype"]] != end - begin:
        raise DatasetError(f"{path}: {name}: its shape {list(shape)} and its {end - begin} bytes disagree")
    return Tensor(entry["dtype"], shape, data_begins + begin, data_begins + end)


def find_tensor(path, header, name, dtypes, dimensions):
    tensor = header.get(name)
    if tensor is None or tensor.dtype not in dtypes or len(tensor.shape) != dimensions:
        raise DatasetError(f"{path}: must hold {name} with {dimensions} dimension(s) as {' or '.join(dtypes)}")
    return tensor


class RowIds:
    """The row ids of a dataset directory, by row."""

    def __init__(self, directory):
        path = Path(directory) / VECTORS
        tensor = find_tensor(path, read_header(path), "row_id", ["U64"], 1)
        with open(path, "rb") as file:
            file.seek(tensor.begin)
            self.data = file.read(tensor.end - tensor.begin)

    def __len__(self):
        return len(self.data) // 8

    def __getitem__(self, row):
        return struct.unpack_from("<Q", self.data, 8 * row)[0]


# ---------------------------------------------------------------------------------------------------------------------
# rows.jsonl


def read_rows(path):
    """Yield the rows as dicts, in order. Every row has doc_id and n_raw_tokens; text and explanation may be missing or None."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                reason = wrong_in(row)
            except (ValueError, RecursionError) as error:
                reason = f"not JSON in UTF-8: {error}"
            if reason:
                raise DatasetError(f"{path}: line {number}: {reason}")
            yield row


def wrong_in(row):
    """What is wrong with a row, or None."""
    if not isinstance(row, dict):
        return "not a JSON object"
    count = row.get("n_raw_tokens")
    if not isinstance(row.get("doc_id"), str):
        return "doc_id is not a string"
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count < 1 << 63:
        return "n_raw_tokens is not a positive whole number"
    for key in ("doc_id", "text", "explanation"):
        value = row.get(key)
        if value is not None and not isinstance(value, str):
            return f"{key} is not a string"
        try:
            (value or "").encode("utf-8")
        except UnicodeEncodeError:
            return f"{key} holds half of a surrogate pair, which is no character"
    return None
