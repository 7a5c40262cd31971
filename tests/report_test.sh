#!/usr/bin/env bash
# The pages of report.c and charts.c in a browser: tests/report_page.c writes them (under the sanitizers), tests/report_browser.py uses them
# in headless Chromium as a reader would. Exit status 77, a skip, without Debian's chromium, chromium-driver and python3.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
for tool in python3 chromium chromedriver; do
    if ! command -v "$tool" >/dev/null 2>&1; then
        echo "no $tool: the pages are not opened in a browser"
        exit 77
    fi
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# shellcheck disable=SC2086 # CC may hold flags
if ! ${CC:-gcc} -std=gnu17 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -I. \
    tests/report_page.c report.c charts.c safetensors.c yaml.c -lyaml -lm -o "$work/report_page"; then
    echo "0 passed, 1 failed"
    exit 1
fi
for kind in sample hostile large bare eval eval_hostile eval_bare run run_hostile run_bare run_large; do
    if ! "$work/report_page" "$kind" "$work/$kind.html"; then
        echo "0 passed, 1 failed"
        exit 1
    fi
done
HOME=$work python3 tests/report_browser.py "$work" # a HOME of its own: the browser writes there
