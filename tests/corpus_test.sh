#!/usr/bin/env bash
# data/corpus.sh and data/corpus.py without a network: invented files of every format go through the converters; the cut,
# what is left out, the shares, the order and the errors are checked.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
if ! command -v python3 >/dev/null 2>&1; then
    echo "no python3: the corpus is not tested"
    exit 77
fi
PYTHONPATH=$PWD/data PYTHONDONTWRITEBYTECODE=1 exec python3 tests/corpus_test.py
