#!/usr/bin/env bash
# build.sh - builds, tests and measures nla. `./build.sh help` lists what it does.
#
# For each variant (release, test, asan, fuzz) it writes build/VARIANT/Makefile and calls make. Every object depends on
# that file, which is rewritten only when its text changes: other flags or another compiler rebuild everything, and
# otherwise only what changed is compiled.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'END'
usage: ./build.sh             build ./nla (and install the distribution's packages it lacks)
       ./build.sh test        everything CI checks: tests, sanitizers, fuzzing, linters
       ./build.sh fuzzers     build build/fuzz/fuzz_*; tests/fuzz.sh [SECONDS] runs them
       ./build.sh unit ...    the Criterion tests alone, arguments to Criterion (--filter 'suite/name')
       ./build.sh bench ...   measure against PyTorch and OpenBLAS (tests/bench.py ...); without the venv of `golden`, nla alone
       ./build.sh golden      make the expected values again from PyTorch (tests/golden*.py, in $NLA_VENV)
       ./build.sh demo [TEXT] what SmolLM2-135M holds at each token of a text, read by the trained pair; writes report.html
       ./build.sh reproduce   train that pair from nothing (data/reproduce.sh); --small: in about an hour; --check: evaluate it
       ./build.sh install [PREFIX]  build, and put nla, its man page and its completions under PREFIX (default: /usr/local)
       ./build.sh clean       remove build/ and ./nla
environment: CC=gcc|clang|...           the compiler
             NLA_CUDA=0|1               0: without CUDA; 1: fail when it cannot be with CUDA
             NLA_ARCH=90                for this GPU alone (default: 80 90 100, and PTX)
             NLA_INSTALL=0              install no packages, only say what is missing
             NLA_VENV=~/.cache/nla/venv PyTorch's place
END
}

say() { printf 'build.sh: %s\n' "$*"; }
die() { say "$@" >&2; exit 1; }
exists() { command -v "$1" >/dev/null 2>&1; }

CC=${CC:-gcc}
jobs=$(nproc 2>/dev/null || echo 2)
venv=${NLA_VENV:-$HOME/.cache/nla/venv}
warnings="-Wall -Wextra -Wshadow -Wconversion"
cflags="-std=gnu17 -O3 -g -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math $warnings"
libs="-lpcre2-8 -lutf8proc -lyaml -lm"
case $CC in clang*) cxx=clang++ ;; *) cxx=g++ ;; esac # for kernels.cu on the CPU, in the tests
cxxflags="-std=c++17 -O2 -g -fno-strict-aliasing -Wall -Wextra -Wshadow -Werror -I. -DNLA_SHIM -DNLA_CUDA=1"

# ------------------------------------------------------------------------------------------------- packages

# What each Debian package is needed for: a header, a command, a file, or one of the two others that `lacks` knows.
to_build=(libc6-dev:stdio.h libpcre2-dev:pcre2.h libutf8proc-dev:utf8proc.h libyaml-dev:yaml.h
    libstb-dev:stb/stb_ds.h libjsmn-dev:jsmn.h libxxhash-dev:xxhash.h)

fuzzer='int LLVMFuzzerTestOneInput(const char *data, unsigned long len) { return len ? data[0] & 0 : 0; }'

lacks() { # lacks HEADER|libFuzzer|ensurepip|COMMAND
    case $1 in
    libFuzzer) ! clang -fsanitize=fuzzer,address -x c - -o /dev/null <<<"$fuzzer" 2>/dev/null ;;
    ensurepip) ! python3 -c 'import ensurepip' 2>/dev/null ;;
    /*) [ ! -e "$1" ] ;;
    *.h) ! printf '#if !__has_include(<%s>)\n#error\n#endif\n' "$1" | $CC -E -x c - >/dev/null 2>&1 ;;
    *) ! exists "$1" ;;
    esac
}

# need PACKAGE:THING...: installs the packages whose thing is not there. Fails, having said why, when one still is not.
need() {
    local entry lacking=() things=() root=() why=""
    for entry; do
        if lacks "${entry#*:}"; then
            lacking+=("${entry%%:*}")
            things+=("${entry#*:}")
        fi
    done
    [ ${#lacking[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ]; then
        root=(sudo)
        [ -t 0 ] || root=(sudo -n) # nobody is there to type a password
    fi

    if [ "${NLA_INSTALL:-1}" = 0 ]; then
        why="NLA_INSTALL=0"
    elif ! exists apt-get; then
        why="this system has no apt-get; its packages have other names"
    elif [ ${#root[@]} -gt 0 ] && ! exists sudo; then
        why="not root, and there is no sudo"
    else
        say "installing ${lacking[*]}"
        if [ -z "${apt_updated:-}" ]; then
            "${root[@]}" apt-get -qq update || say "apt-get update failed; trying with the lists there are" >&2
            apt_updated=1
        fi
        "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
            -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 install "${lacking[@]}" >/dev/null || why="apt-get failed"
        for entry in "${things[@]}"; do
            if [ -z "$why" ] && lacks "$entry"; then why="$entry is still not found after installing"; fi
        done
    fi
    [ -n "$why" ] || return 0
    say "missing: ${things[*]}, and cannot install them ($why). On Debian or Ubuntu, as root:" >&2
    say "    apt-get install ${lacking[*]}" >&2
    return 1
}

need_to_build() {
    local packages=()
    case $CC in
    gcc) packages=(gcc:gcc) ;;
    clang) packages=(clang:clang libomp-dev:omp.h) ;;
    *) if lacks "${CC%% *}"; then die "CC=$CC: no such command"; fi ;;
    esac
    need "${packages[@]}" make:make "${to_build[@]}" || exit 1
}

need_to_test() { # Criterion, and a C++ compiler for the shim that runs kernels.cu on the CPU
    need libcriterion-dev:criterion/criterion.h "$cxx:$cxx"
}

make_venv() { # make_venv DIR REQUIREMENTS: makes the environment where there is none, and installs into it
    if ! [ -x "$1/bin/pip" ]; then
        say "making $1"
        need python3:python3 python3-venv:ensurepip || return 1
        python3 -m venv "$1" || return 1
    fi
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$2"
}

# Python with what the tests of data/'s scripts import, of which Debian packages only a part: that of `golden`, or a small one.
need_pyarrow() {
    local dir small=$HOME/.cache/nla/data-venv
    for dir in "$venv" "$small"; do
        if "$dir/bin/python" -c 'import numpy, pyarrow, xxhash, yaml' 2>/dev/null; then
            export NLA_VENV=$dir # for tests/data_scripts_test.sh
            return 0
        fi
    done
    [ "${NLA_INSTALL:-1}" != 0 ] || return 1
    make_venv "$small" <(grep -E '^(numpy|pyarrow|xxhash|PyYAML)==' tests/requirements.txt) && export NLA_VENV=$small
}

# ------------------------------------------------------------------------------------------------- CUDA

# Sets nvcc (empty: build without) and cuda_says, the reason in words.
find_cuda() {
    nvcc=$(command -v nvcc || true)
    if [ -z "$nvcc" ] && [ -x /usr/local/cuda/bin/nvcc ]; then nvcc=/usr/local/cuda/bin/nvcc; fi
    if [ "${NLA_CUDA:-}" = 0 ]; then
        cuda_says="NLA_CUDA=0"
        nvcc=""
    elif [ ! -f kernels.cu ]; then
        cuda_says="kernels.cu: not in this tree yet"
        nvcc=""
    elif [ -z "$nvcc" ]; then
        cuda_says="no nvcc (CUDA toolkit) found"
    else
        cuda_says="building the CPU and CUDA engines ($nvcc)"
    fi
    if [ -z "$nvcc" ]; then
        if [ "${NLA_CUDA:-}" = 1 ]; then die "NLA_CUDA=1, but $cuda_says"; fi
        say "$cuda_says, building the CPU engine only"
        return 0
    fi
    say "$cuda_says"

    local arch known
    known=$("$nvcc" --list-gpu-arch)
    gencode=""
    for arch in ${NLA_ARCH:-80 90 100}; do # A100, H100/H200, B200; the last one's PTX serves what comes after
        grep -qx "compute_$arch" <<<"$known" || continue
        gencode+=" -gencode arch=compute_$arch,code=sm_$arch"
        newest=$arch
    done
    gencode+=" -gencode arch=compute_$newest,code=compute_$newest"
    cuda_libs="-lcudart_static -ldl -lrt -lpthread -lstdc++" # cuBLASLt is loaded when the engine is opened
    cuda_home=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
    if [ -d "$cuda_home/lib64" ]; then cuda_libs="-L$cuda_home/lib64 -Wl,-rpath,$cuda_home/lib64 $cuda_libs"; fi
}

# ------------------------------------------------------------------------------------------------- make

is_x86() { [[ $($1 -dumpmachine) == x86_64* ]]; }
avx2="-mavx2 -mfma -mf16c"
avx512="$avx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
avx512bf16="$avx512 -mavx512bf16"

# write_makefile VARIANT COMPILER FLAGS NVCC: build/VARIANT/Makefile with the targets O/nla (./nla in release), O/run
# (the Criterion tests) and O/fuzz_*. NVCC empty: without CUDA; "shim": kernels.cu for the CPU (tests/cuda_shim.h).
write_makefile() {
    local O=build/$1 cc=$2 flags="$3 -I." nvcc=$4 nla=build/$1/nla all_libs=$libs
    local source objects="" tests="" fuzzers="" engines="any" gencode=${gencode:-}
    if [ "$nvcc" = shim ]; then gencode=""; fi
    if [ "$1" = release ]; then nla=nla; fi
    if is_x86 "$cc"; then engines="any avx2 avx512 avx512bf16"; else flags+=" -DNLA_ONLY_ANY"; fi
    for source in *.c; do
        case $source in cpu.c | cpu_backward.c | nla.c) ;; *) objects+=" $O/${source%.c}.o" ;; esac
    done
    for source in $engines; do objects+=" $O/cpu_$source.o $O/cpu_backward_$source.o"; done
    for source in tests/test_*.c; do
        if [ "$source" = tests/test_kernels.c ] && [ "$nvcc" != shim ]; then continue; fi
        [ ! -f "$source" ] || tests+=" $O/${source%.c}.o"
    done
    for source in tests/fuzz_*.c; do [ ! -f "$source" ] || fuzzers+=" $O/$(basename "$source" .c)"; done
    if [ "$nvcc" = shim ]; then # the tests against PyTorch once more, on that engine
        flags+=" -DNLA_CUDA=1"
        objects+=" $O/kernels_shim.o $O/cuda_shim.o"
        tests+=" $O/tests/shim_model.o $O/tests/shim_method.o $O/tests/shim_train.o"
        all_libs+=" -lstdc++"
    elif [ -n "$nvcc" ]; then
        flags+=" -DNLA_CUDA=1"
        objects+=" $O/kernels.o"
        all_libs+=" $cuda_libs"
    fi

    mkdir -p "$O/tests"
    cat >"$O/Makefile.$$" <<END
# Written by build.sh. $($cc --version | head -1)
CC = $cc
CFLAGS = $flags
LIBS = $all_libs
OBJECTS =$objects
.DELETE_ON_ERROR:

$nla: \$(OBJECTS) $O/nla.o
	@echo "  link  \$@"
	\$(CC) \$(CFLAGS) \$^ \$(LIBS) -o \$@
$O/run: \$(OBJECTS) $O/nla_no_main.o$tests
	@echo "  link  \$@"
	\$(CC) \$(CFLAGS) \$^ \$(LIBS) -lcriterion -o \$@
.PHONY: fuzzers
fuzzers:$fuzzers
.SECONDARY:
$O/fuzz_%: \$(OBJECTS) $O/nla_no_main.o $O/tests/fuzz_%.o
	@echo "  link  \$@"
	\$(CC) \$(CFLAGS) -fsanitize=fuzzer \$^ \$(LIBS) -o \$@

$O/%.o: %.c $O/Makefile
	@echo "  cc    \$@"
	\$(CC) \$(CFLAGS) -MMD -MP -c \$< -o \$@
$O/nla_no_main.o: nla.c $O/Makefile
	@echo "  cc    \$@"
	\$(CC) \$(CFLAGS) -DNLA_NO_MAIN -MMD -MP -c \$< -o \$@
# cpu.c, once for each instruction set
$O/cpu_avx2.o $O/cpu_backward_avx2.o: ISA = $avx2
$O/cpu_avx512.o $O/cpu_backward_avx512.o: ISA = $avx512
$O/cpu_avx512bf16.o $O/cpu_backward_avx512bf16.o: ISA = $avx512bf16
$O/cpu_backward_%.o: cpu_backward.c $O/Makefile
	@echo "  cc    \$@"
	\$(CC) \$(CFLAGS) \$(ISA) -DCPU_BACKWARD=cpu_backward_\$* -MMD -MP -c \$< -o \$@
$O/cpu_%.o: cpu.c $O/Makefile
	@echo "  cc    \$@"
	\$(CC) \$(CFLAGS) \$(ISA) -DCPU_ENGINE=cpu_engine_\$* -DCPU_BACKWARD=cpu_backward_\$* -MMD -MP -c \$< -o \$@
$O/tests/shim_%.o: tests/test_%.c $O/Makefile
	@echo "  cc    \$@"
	\$(CC) \$(CFLAGS) -Dengine_open=shim_engine -D\$*=shim_\$* -MMD -MP -c \$< -o \$@
$O/kernels_shim.o: kernels.cu $O/Makefile
	@echo "  c++   \$@"
	$cxx $cxxflags -fsanitize=alignment,bounds,shift -fsanitize-undefined-trap-on-error -x c++ -MMD -MP -c \$< -o \$@
$O/cuda_shim.o: tests/cuda_shim.cpp $O/Makefile
	@echo "  c++   \$@"
	$cxx $cxxflags -MMD -MP -c \$< -o \$@
$O/kernels.o: kernels.cu $O/Makefile
	@echo "  nvcc  \$@"
	$nvcc -std=c++17 -O3 -lineinfo --threads $jobs${gencode:-} -I. -DNLA_CUDA=1 \\
	    -Xcompiler -Wall,-Wextra${ptxas:-} -MMD -MP -MF $O/kernels.d -c \$< -o \$@
-include \$(wildcard $O/*.d $O/tests/*.d)
END
    if cmp -s "$O/Makefile.$$" "$O/Makefile"; then rm "$O/Makefile.$$"; else mv "$O/Makefile.$$" "$O/Makefile"; fi
}

# run_make VARIANT TARGET...; the lock keeps two build.sh in one tree from writing the same objects
run_make() {
    local variant=$1
    shift
    flock "build/$variant" make -rR -s -Oline -j "$jobs" -f "build/$variant/Makefile" "$@" || return 1
}

build_release() {
    need_to_build
    find_cuda
    write_makefile release "$CC" "$cflags" "$nvcc"
    run_make release nla
    say "built ./nla"
}

sanitize="-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"

need_to_fuzz() { # clang's libFuzzer
    local CC=clang version
    need clang:clang make:make libomp-dev:omp.h "${to_build[@]}" || return 1
    version=$(clang -dumpversion)
    need "libclang-rt-${version%%.*}-dev:libFuzzer"
}

build_fuzzers() {
    need_to_fuzz || return 1
    write_makefile fuzz clang "$cflags $sanitize -fsanitize=fuzzer-no-link" ""
    run_make fuzz fuzzers
}

# ------------------------------------------------------------------------------------------------- test

passed=0 failed=0 skipped=0
part() { printf '\n== %s (at %d s)\n' "$1" "$SECONDS"; }
ok() { passed=$((passed + ${2:-1})); printf 'ok    %s\n' "$1"; }
not_ok() { failed=$((failed + ${2:-1})); printf 'FAIL  %s\n' "$1"; }
skip() { skipped=$((skipped + ${2:-1})); printf 'skip  %s\n' "$1"; }
check() { # check NAME COMMAND...
    local name=$1
    shift
    if "$@"; then ok "$name"; else not_ok "$name"; fi
}

# Criterion runs each test in a process of its own: half as many at a time as there are cores, of two threads each.
run_criterion() { # run_criterion VARIANT
    local log=build/$1/run.log tested passing bad leaks status=0
    run_make "$1" "build/$1/run" || { not_ok "build/$1/run does not build"; return; }
    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
        "build/$1/run" --jobs=$(((jobs + 1) / 2)) --timeout=300 --color=never 2>&1 | tee "$log" || status=$?
    read -r tested passing < <(sed -nE 's/.*Synthesis: Tested: ([0-9]+) \| Passing: ([0-9]+) .*/\1 \2/p' "$log") || true
    if [ -z "${tested:-}" ]; then not_ok "build/$1/run ended without a summary (exit status $status)"; return; fi
    bad=$((tested - passing))
    leaks=$(grep -c 'ERROR: LeakSanitizer' "$log") || true # comes after Criterion has heard that the test passed
    if [ "$passing" -gt 0 ]; then ok "$passing tests" "$passing"; fi
    if [ "$bad" -gt 0 ]; then not_ok "$bad tests" "$bad"; fi # one that stops at a failed assertion may leak
    if [ "$bad" = 0 ] && [ "$leaks" -gt 0 ]; then not_ok "$leaks of the passing tests leak" "$leaks"; fi
    if [ "$bad" = 0 ] && [ "$status" != 0 ]; then not_ok "build/$1/run: exit status $status"; fi
    if [ "$tested" = 0 ]; then not_ok "build/$1/run holds no test"; fi
}

run_shell_tests() { # each tests/*_test.sh may end with 'N passed, N failed[, N skipped]'; exit status 77 is a skip
    local script log=build/asan/shell.log status sum
    for script in tests/*_test.sh; do
        [ -x "$script" ] || continue
        status=0
        NLA=$PWD/build/asan/nla OMP_NUM_THREADS=2 "$script" </dev/null 2>&1 |
            tee "$log" | sed 's/^/      /' || status=$?
        if [ "$status" = 77 ]; then skip "$script"; continue; fi
        sum=$(tail -n 1 "$log" | grep -E '^[0-9]+ passed, [0-9]+ failed(, [0-9]+ skipped)?$') || sum=""
        if [ -n "$sum" ]; then
            # shellcheck disable=SC2086 # words wanted
            set -- $sum
            if [ "$1" -gt 0 ]; then ok "$script: $1 checks" "$1"; fi
            if [ "$3" -gt 0 ]; then not_ok "$script: $3 checks" "$3"; status=0; fi
            if [ "${5:-0}" -gt 0 ]; then skip "$script: $5 checks" "$5"; fi
            if [ "$status" != 0 ]; then not_ok "$script: exit status $status"; fi
        else
            check "$script" test "$status" = 0
        fi
    done
}

run_fuzzers() { # run_fuzzers SECONDS
    local log=build/fuzz.log good bad status=0
    tests/fuzz.sh "$1" 2>&1 | tee "$log" || status=$?
    good=$(grep -c '^ok ' "$log") || true
    bad=$(grep -c '^FAIL ' "$log") || true
    passed=$((passed + good)) failed=$((failed + bad))
    if [ "$status" != 0 ] && [ "$bad" = 0 ]; then not_ok "tests/fuzz.sh: exit status $status"; fi
}

# The linters read cpu.c and cpu_backward.c twice: plain, and as their widest build.
lint_files() {
    printf '%s\n' *.c
    if is_x86 "$CC"; then printf '%s\n' cpu.c:widest cpu_backward.c:widest; fi
}
lint_one() { # lint_one cppcheck|clang-tidy FILE[:widest]
    local file=${2%:widest} flags=(-DCPU_ENGINE=cpu_engine_any -DCPU_BACKWARD=cpu_backward_any -I.)
    if [ "$file" != "$2" ]; then flags=(-DCPU_ENGINE=cpu_engine_avx512bf16 -DCPU_BACKWARD=cpu_backward_avx512bf16 -I.); fi
    if [ "$1" = cppcheck ]; then # readdir is thread-safe for streams of one's own; readdir_r is deprecated
        if [ "$file" != "$2" ]; then
            flags+=(-D__AVX2__ -D__FMA__ -D__F16C__ -D__AVX512F__ -D__AVX512BW__ -D__AVX512DQ__ -D__AVX512VL__)
            flags+=(-D__AVX512BF16__)
        fi
        cppcheck --quiet --enable=warning,performance,portability --error-exitcode=1 --inline-suppr --std=c11 \
            --library=posix,gnu --suppress=readdirCalled -D__x86_64__ "${flags[@]}" "$file"
    else
        # shellcheck disable=SC2206 # words wanted
        if [ "$file" != "$2" ]; then flags+=($avx512bf16); fi
        # shellcheck disable=SC2086
        clang-tidy --quiet "$file" -- -std=gnu17 -fopenmp $warnings "${flags[@]}" 2>&1 |
            { grep -vE '^[0-9]+ warnings? (generated|treated)|^Suppressed|^Use -header-filter' || true; }
    fi
}
lint() { # lint TOOL
    export -f lint_one
    export avx512bf16 warnings
    lint_files | xargs -P "$jobs" -I{} bash -c 'set -euo pipefail; lint_one "$@"' lint "$1" {}
}

# The real compiler: no warning, no register spilled, and a program that starts where there is no GPU.
check_cuda() {
    local log=build/cuda/nvcc.log ptxas=" -Xptxas -v"
    write_makefile cuda "$CC" "$cflags" "$nvcc"
    rm -f build/cuda/kernels.o
    if ! run_make cuda build/cuda/nla >"$log" 2>&1; then
        tail -n 40 "$log"
        not_ok "kernels.cu compiles and links"
        return
    fi
    ok "kernels.cu compiles for$(sed -E 's/-gencode arch=compute_[0-9]+,code=/ /g' <<<"$gencode" | tr -s ' ')"
    check "nvcc warns of nothing" test "$(grep -ci warning "$log")" = 0
    grep -B 2 -E '[1-9][0-9]* bytes spill' "$log" || true
    check "no register is spilled" test "$(grep -cE '[1-9][0-9]* bytes spill' "$log")" = 0
    check "the program with CUDA starts" sh -c 'build/cuda/nla help >/dev/null'
    if [ -e /dev/nvidiactl ]; then return; fi
    check "without a driver --device cuda says so" grep -q -- '--device cuda: ' \
        <(build/cuda/nla inspect --device cuda tests/golden/qwen2 2>&1 >/dev/null)
}

summary() { # the last line is what CI reads
    printf '\nin %d s\n%d passed, %d failed' "$SECONDS" $passed $failed
    if [ $skipped -gt 0 ]; then printf ', %d skipped' $skipped; fi
    printf '\n'
}

run_tests() {
    exec 2>&1 # one order of lines, also in a log
    need_to_build
    find_cuda
    mkdir -p build

    part "1. build with $CC, warnings are errors"
    local criterion=1
    need_to_test || criterion=0
    write_makefile test "$CC" "$cflags -Werror" "$([ $criterion = 0 ] || echo shim)"
    check "build/test/nla" run_make test build/test/nla
    if [ $failed -gt 0 ]; then summary; return 1; fi # the rest would say the same at greater length

    part "2. Criterion tests"
    if [ $criterion = 1 ]; then run_criterion test; else not_ok "no Criterion or no C++ compiler, no tests"; fi

    part "3. Criterion tests under AddressSanitizer and UndefinedBehaviorSanitizer"
    write_makefile asan "$CC" "$cflags $sanitize" "" # the sanitizers and CUDA's driver do not share an address space
    export ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=1:strict_string_checks=1
    export UBSAN_OPTIONS=print_stacktrace=1
    if [ $criterion = 1 ]; then run_criterion asan; else not_ok "no Criterion, no tests"; fi

    part "4. shell tests, on the sanitized binary"
    check "build/asan/nla" run_make asan build/asan/nla
    need chromium:chromium chromium-driver:chromedriver python3:python3 fonts-dejavu-core:/usr/share/fonts/truetype/dejavu ||
        say "the page's test in a browser will be skipped"
    need zsh:zsh || say "the test of zsh's completion will be skipped"
    need_pyarrow || say "the tests of the scripts in data/ will be skipped where no Python has pyarrow and xxhash"
    run_shell_tests

    part "5. fuzzing: the corpus again, then 20 s of new inputs"
    if need_to_fuzz; then run_fuzzers 20; else skip "fuzzing: no clang with libFuzzer"; fi

    part "6. CUDA kernels"
    if [ -n "$nvcc" ]; then check_cuda; else skip "$cuda_says"; fi

    part "7. linters"
    local tool
    for tool in cppcheck clang-tidy; do
        if need "$tool:$tool"; then check "$tool finds nothing" lint "$tool"; else skip "$tool: cannot be installed"; fi
    done

    summary
    [ $failed = 0 ]
}

# ------------------------------------------------------------------------------------------------- unit, bench, golden

unit() {
    need_to_build
    need_to_test || exit 1
    write_makefile test "$CC" "$cflags -Werror" shim
    run_make test build/test/run
    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive build/test/run --jobs=1 "$@"
}

bench() {
    build_release
    if [ -x "$venv/bin/python" ]; then
        "$venv/bin/python" tests/bench.py "$@"
    else
        say "no PyTorch in $venv (./build.sh golden makes it): measuring nla alone"
        ./nla bench "$@"
    fi
}

golden() {
    [ -f tests/golden.py ] || die "tests/golden.py: not in this tree"
    if ! cmp -s tests/requirements.txt "$venv/nla-requirements.txt"; then
        make_venv "$venv" tests/requirements.txt || exit 1
        cp tests/requirements.txt "$venv/nla-requirements.txt"
    fi
    "$venv/bin/python" tests/golden.py
    "$venv/bin/python" tests/golden_method.py
    "$venv/bin/python" tests/golden_train.py
}

# ------------------------------------------------------------------------------------------------- demo, reproduce

target=SmolLM2-135M-Instruct

need_for_data() { # Python with venv, for the scripts in data/
    need python3:python3 python3-venv:ensurepip || exit 1
}

demo() {
    local text=${1:-The old captain looked at the sky, folded the map and said that by morning} pair dir
    for dir in data/smollm2-l20 reproduce/pair reproduce-small/pair; do
        if [ -f "$dir/ar/nla_meta.yaml" ]; then pair=$dir; break; fi
    done
    [ -n "${pair:-}" ] || die "no trained pair is in this tree; ./build.sh reproduce --small trains one in about an hour"
    build_release
    if [ ! -f "models/$target/model.safetensors" ]; then need_for_data; fi
    python3 data/get_model.py "$target" "models/$target"
    # At temperature 0 this pair's AV repeats itself in one text of eight (docs/results.md).
    ./nla explain --model "models/$target" --av "$pair/av" --ar "$pair/ar" --temperature 0.7 --html report.html -- "$text"
    say "report.html has the same to look at. Next: ./build.sh demo \"your own text\"; ./nla help explain; README.md"
}

reproduce() {
    build_release
    need_for_data
    data/reproduce.sh "$@"
}

# The program, its man page and completions, and the script that `nla data explain --by api` runs.
install_under() { # install_under [PREFIX]
    local to=${1:-/usr/local} file
    case $to in /*) ;; *) to=$OLDPWD/$to ;; esac
    build_release
    install -D -m 755 nla "$to/bin/nla"
    ./nla help --man | install -D -m 644 /dev/stdin "$to/share/man/man1/nla.1"
    ./nla help --completion bash | install -D -m 644 /dev/stdin "$to/share/bash-completion/completions/nla"
    ./nla help --completion zsh | install -D -m 644 /dev/stdin "$to/share/zsh/site-functions/_nla"
    for file in explain_api.py dataset.py; do install -D -m 644 "data/$file" "$to/share/nla/$file"; done
    say "installed under $to: bin/nla, the man page nla(1), completions for bash and zsh"
}

command=${1:-build}
[ $# = 0 ] || shift
case $command in
build) build_release ;;
test) run_tests ;;
fuzzers) build_fuzzers ;;
bench) bench "$@" ;;
unit) unit "$@" ;;
golden) golden ;;
demo) demo "$@" ;;
reproduce) reproduce "$@" ;;
install) install_under "$@" ;;
clean) rm -rf build nla ;;
help | -h | --help) usage ;;
*)
    say "no command '$command'" >&2
    usage >&2
    exit 2
    ;;
esac
