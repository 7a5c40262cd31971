#!/usr/bin/env python3
"""Compares rows of `nla data extract` with PyTorch: each sampled row's vector against a forward pass of exactly its prefix.

    python3 tests/data_parity.py DATASET_DIR CORPUS.jsonl [--rows 200] [--seed 0]

The prefix is the document's first n_raw_tokens tokens as HF's tokenizer makes them, run alone in fp32; the vector is
hidden_states[layer + 1] at its last token. Exit status 1 when the largest relative difference is above 1e-4.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
import transformers
import yaml
from safetensors import safe_open

BOUND = 1e-4


def documents(path, wanted):
    texts = {}
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["doc_id"] in wanted:
                texts.setdefault(row["doc_id"], row["text"])
    return texts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    meta = yaml.safe_load((args.dataset / "nla_meta.yaml").read_text())["extraction"]
    with open(args.dataset / "rows.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    sample = sorted(random.Random(args.seed).sample(range(len(rows)), min(args.rows, len(rows))))
    texts = documents(args.corpus, {rows[i]["doc_id"] for i in sample})
    tokenizer = transformers.AutoTokenizer.from_pretrained(meta["base_model"])
    model = transformers.AutoModel.from_pretrained(meta["base_model"], dtype=torch.float32).eval()

    worst, worst_row, texts_equal = 0.0, None, 0
    with safe_open(args.dataset / "activations.safetensors", "pt") as file, torch.no_grad():
        vectors = file.get_slice("activation_vector")
        for i in sample:
            ids = tokenizer(texts[rows[i]["doc_id"]])["input_ids"][: rows[i]["n_raw_tokens"]]
            seen = []
            hook = model.layers[meta["layer_index"]].register_forward_hook(lambda module, inputs, output: seen.append(output))
            model(torch.tensor([ids]))
            hook.remove()
            out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
            theirs, ours = out.reshape(-1, out.shape[-1])[-1], vectors[i : i + 1][0]
            difference = ((ours - theirs).norm() / theirs.norm()).item()
            texts_equal += tokenizer.decode(ids, skip_special_tokens=True) == rows[i]["text"]
            if not difference <= worst:
                worst, worst_row = difference, i
    print(f"{len(sample)} rows of {len(rows)}: largest relative difference {worst:.2e} (row {worst_row}), bound {BOUND:g}; "
          f"{texts_equal} prefixes as HF's decode gives them")
    return 0 if worst <= BOUND and texts_equal == len(sample) else 1


if __name__ == "__main__":
    sys.exit(main())
