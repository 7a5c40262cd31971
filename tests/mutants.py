"""Bugs for the tests of the kernels to find (tests/cuda_test.sh): writes a copy of kernels.cu with all of them in it, each switched on by
its number in the environment's NLA_MUTANT, and prints a line for each: number, the tests that must fail, what it is.

    tests/mutants.py OUT
"""
import re
import sys

BARRIER = "__syncthreads();"
MAYBE = "if (MUTANT != %d) { __syncthreads(); }"

# what it is, the tests that must find it, what stands in kernels.cu with its parts (once), what takes its place (%d: the mutant's number)
MUTANTS = [
    ("off by one: a row's end", "kernels/rows",
     "for (int d = (int)threadIdx.x * W; d < D; d +=", "for (int d = (int)threadIdx.x * W; d < D + (MUTANT == %d ? W : 0); d +="),
    ("missing barrier before a sum is read", "kernels/rmsnorm", BARRIER + "\n    S sum = 0;", MAYBE + "\n    S sum = 0;"),
    ("missing barrier before a sum's place is used again", "kernels/rmsnorm",
     BARRIER + " /* before the next sum writes partial */", MAYBE),
    ("missing barrier between loading keys and using them", "kernels/attention",
     BARRIER + "\n    tile_product<false, true>(t.score, t.queries, t.keys, TileShape{R, C, W,",
     MAYBE + "\n    tile_product<false, true>(t.score, t.queries, t.keys, TileShape{R, C, W,"),
    ("missing barrier before the next keys are loaded", "kernels/attention",
     "tile_product<false, false>(t.o, t.weight, t.keys, TileShape{R, W, C, padded(C), ld, ld}, true);\n    " + BARRIER,
     "tile_product<false, false>(t.o, t.weight, t.keys, TileShape{R, W, C, padded(C), ld, ld}, true);\n    " + MAYBE),
    ("uninitialised shared memory", "kernels/attention", "        t.o[i] = 0;", "        if (MUTANT != %d) { t.o[i] = 0; }"),
    ("missing barrier where a window hides all keys that are shared", "kernels/attention_of_single", BARRIER + " /* when no tile was worth it */",
     MAYBE),
    ("missing barrier between joining parts and writing the result", "kernels/attention_of_single",
     "parts, row_of(r), known, a.E);\n    }\n    " + BARRIER, "parts, row_of(r), known, a.E);\n    }\n    " + MAYBE),
    ("off by one: which part a chunk is", "kernels/attention_of_single", "from = 0, part = parts_above(segment, s);",
     "from = 0, part = parts_above(segment, s) + (MUTANT == %d);"),
    ("off by one: which rows share a segment's keys", "kernels/attention_of_single", "below[item.first + (item.pair + r) / group]",
     "below[item.first + (item.pair + r) / group + (MUTANT == %d && r > 0)]"),
    ("uninitialised device memory", "kernels/rmsnorm", "    if (threadIdx.x == 0) {\n        r[blockIdx.x] =",
     "    if (threadIdx.x == 0 && (MUTANT != %d || blockIdx.x != 2)) {\n        r[blockIdx.x] ="),
    ("a product that adds to what was never written", "kernels/linear", "dtype_of(c, dx, DTYPE<T>), 1, add ? 1.0f : 0.0f",
     "dtype_of(c, dx, DTYPE<T>), 1, add || MUTANT == %d ? 1.0f : 0.0f"),
    ("off by one: the window", "kernels/attention", "? query - window + 1 - position : 0;", "? query - window + 1 - position + (MUTANT == %d) : 0;"),
    ("off by one: the causal mask", "kernels/attention", "*to = own && query - position + 1 < n_keys ? query - position + 1 : n_keys;",
     "*to = own && query - position + 1 < n_keys ? query - position + 1 + (MUTANT == %d) : n_keys;"),
    ("a barrier that some threads pass by", "kernels/losses", "largest = block_max(largest);",
     "largest = MUTANT == %d && threadIdx.x >= 32 ? largest : block_max(largest);"),
    ("off by one: a chunk's end", "kernels/linear", "int to = from + chunk < rows ? from + chunk : rows;",
     "int to = from + chunk < rows ? from + chunk - (MUTANT == %d) : rows;"),
    ("off by one: where a gradient goes", "kernels/attention", "dq[row * (size_t)a.E + (size_t)x] =",
     "dq[row * (size_t)a.E + (size_t)x + (MUTANT == %d)] ="),
    ("off by one: reading behind a list", "kernels/embed", "i < first[blockIdx.x + 1]; i++", "i < first[blockIdx.x + 1] + (MUTANT == %d); i++"),
    ("off by one: top-k", "kernels/sample", "count_from(*d, border | bit) >= top_k", "count_from(*d, border | bit) >= top_k + (MUTANT == %d)"),
    ("a copy of weights that does not follow the optimizer", "kernels/copies", "touch_copies(c, w, count * dtype_size(weights), false);",
     "if (MUTANT != %d) { touch_copies(c, w, count * dtype_size(weights), false); }"),
    ("a number that no thread updates", "kernels/adamw", "i < count && i < from + 1024; i += blockDim.x) {\n        float gradient",
     "i < count && i < from + 1024 - (MUTANT == %d); i += blockDim.x) {\n        float gradient"),
    ("an exchange left out", "kernels/attention", "    sum = warp_sum(sum);\n    if (pair < pairs", "    sum = MUTANT == %d ? sum : warp_sum(sum);\n    if (pair < pairs"),
    ("a recorded step that goes on with what its arrays held", "kernels/recorded_steps", "if (s.host && memcmp(s.content.data(), s.host,",
     "if (MUTANT != %d && s.host && memcmp(s.content.data(), s.host,"),
    ("a recorded step taken for another of the same size", "kernels/recorded_steps", "|| memcmp(s->shape.data(), shape, bytes) != 0",
     "|| (MUTANT != %d && memcmp(s->shape.data(), shape, bytes) != 0)"),
    ("a recorded step that reads a weight's old copy", "kernels/a_step_is_recorded_anew", "if (inside) {\n            drop_step(c);",
     "if (inside && MUTANT != %d) {\n            drop_step(c);"),
    ("a recorded step that writes to memory that was freed", "kernels/a_step_is_recorded_anew", "        drop_step(c);\n        c->piece.erase(it);",
     "        if (MUTANT != %d) { drop_step(c); }\n        c->piece.erase(it);"),
    ("missing barrier before the next codes are loaded", "kernels/weights_of_one_byte", BARRIER + " /* before the next tile is loaded, and", MAYBE + " /* before the next tile is loaded, and"),
    ("off by one: a row's scale", "kernels/weights_of_one_byte", "narrow<Y>(sum * scale[o]", "narrow<Y>(sum * scale[o > 0 ? o - (MUTANT == %d) : o]"),
    ("sums of a chunk that begin with what was there", "kernels/weights_of_one_byte", "ld, ld, lds}, k > from);", "ld, ld, lds}, k > from || MUTANT == %d);"),
    ("the norm of a sum that was never written", "kernels/rmsnorm", "        store<W>(sum + at + i, a);", "        if (MUTANT != %d || i > 0) { store<W>(sum + at + i, a); }"),
    ("the gradient of a vector that is zero", "kernels/scores", "against = both > 0 ?", "against = both > 0 || MUTANT == %d ?"),
    ("a good prediction's error in fp32", "kernels/scores", "double both = sqrt(squares) * sqrt(gold_squares), cos = both > 0 ? dot / both : 0",
     "double both = sqrt(squares) * sqrt(gold_squares), cos = both > 0 ? MUTANT == %d ? (double)(float)(dot / both) : dot / both : 0"),
    ("a bias that nobody adds", "kernels/linear", "bool behind = b && !g.bias;", "bool behind = b && !g.bias && MUTANT != %d;"),
    ("off by one: a bias", "kernels/linear", "narrow<Y>(widen(row[o]) + widen(b[o]))", "narrow<Y>(widen(row[o]) + widen(b[o > 0 ? o - (MUTANT == %d) : o]))"),
    ("a band's bias that begins with the first's", "kernels/weights_of_one_byte", "bias ? bias + o : NULL", "bias ? bias + (MUTANT == %d ? 0 : o) : NULL"),
    ("a buffer that is filled before the copy out of it has left", "kernels/weights_reach",
     "at < bytes && good(c, cudaEventSynchronize(u->left[u->next]),", "at < bytes && good(c, MUTANT == %d ? cudaSuccess : cudaEventSynchronize(u->left[u->next]),"),
    ("bf16 weights rounded down", "kernels/adamw", "*w = round_stochastically(x, element_random(~key, i));",
     "*w = round_stochastically(x, MUTANT == %d ? 0 : element_random(~key, i));"),
]

text = re.sub(r'#include "(\w+\.cuh)"', lambda part: open(part[1]).read(), open("kernels.cu").read())
for number, (what, suite, old, new) in enumerate(MUTANTS, 1):
    if text.count(old) != 1:
        sys.exit("tests/mutants.py: %r must stand once in kernels.cu with its parts, it stands %d times" % (old, text.count(old)))
    text = text.replace(old, new % number)
    print(number, suite, what)
text = text.replace('#include "quantise.h"', '#include "quantise.h"\n#include <cstdlib>\nstatic const int MUTANT = atoi(getenv("NLA_MUTANT"));', 1)
open(sys.argv[1], "w").write(text)
