#!/usr/bin/env bash
# corpus.sh - makes a corpus of free English text from Debian's (or Ubuntu's) packages: manuals, stories and dialogue,
# argument, definitions, how-tos, jokes, code. The packages are fetched with `apt-get download` and unpacked beside the
# corpus, never installed.
#
# Licences: the texts stay under the licences of the packages they come from. OUT_DIR/sources.tsv names these as far as
# each package's copyright file does (unpacked/PACKAGE/usr/share/doc/PACKAGE/copyright has the whole); who passes the
# corpus on must heed them.
#
# OUT_DIR/packages and OUT_DIR/unpacked are kept: a run that was cut short, or another size or seed, starts from there.
set -euo pipefail
export LC_ALL=C.UTF-8
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
    cat <<'END'
usage: data/corpus.sh OUT_DIR [--documents N] [--seed N] [--again]
writes OUT_DIR/corpus.jsonl   {"doc_id": ..., "text": ..., "source": package} in each line, about 100 to 600 tokens, shuffled
       OUT_DIR/sources.tsv    each package's version, licence, documents, words and tokens
--documents N  the first N documents of the shuffled order (default: all)
--seed N       the order (default 0)
--again        convert the unpacked packages again
END
}

say() { printf 'corpus.sh: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }
wrong() { say "error: $*"; usage >&2; exit 2; }

# What is taken: a pattern of package names (the newest that matches), the format, and globs of the files (! leaves out).
recipe() {
    cat <<'END'
anarchism                       html        */html/sec*.html */html/app*.html
python3\.[0-9]+-doc             html        *.html !*genindex* !*modindex* !*whatsnew/changelog* !*search.html !*contents.html
linux-doc(-[0-9.]+)?            rst         */_sources/*.rst.txt !*/translations/*
perl-doc                        pod         *.pod
perl-doc                        man         */man3/*.gz
manpages                        man         */man/man*
manpages-dev                    man         */man/man*
postgresql-doc-[0-9]+           html        *.html !*bookindex* !*release-*
dict-foldoc                     dict        *.dict.dz
dict-gcide                      dict        *.dict.dz
dict-devil                      dict        *.dict.dz
git-doc                         html        *.html !*RelNotes*
gimp-help-en                    html        */en/*.html !*/bibliography* !*index.html
fortunes                        fortunes    usr/share/games/fortunes/* !*.dat !*.u8 !*off/*
fortunes-min                    fortunes    usr/share/games/fortunes/* !*.dat !*.u8 !*off/*
fortune-anarchism               fortunes    usr/share/games/fortunes/* !*.dat !*.u8
jargon-text                     text        */jargon.txt.gz
miscfiles                       text        usr/share/state/*.gz
installation-guide-amd64        html        */en/*.html !*/index.html
debian-handbook                 html        */en-US/*.html !*/index.html
harden-doc                      html        */en-US/*.html !*/index.html
debian-faq                      html        *.en.html !*/index*
debian-policy                   html        *.html !*genindex*
debian-history                  html        *.en.html !*/index*
debian-reference-en             html        *.en.html !*/index*
debian-kernel-handbook          html        *.html !*/index*
developers-reference            html        *.html !*genindex*
doc-debian                      text        */debian/*.txt.gz
aptitude-doc-en                 html        *.html !*/index*
apache2-doc                     html        */manual/en/*.html !*/index.html !*quickreference*
sqlite3-doc                     html        *.html !*changes.html !*releaselog* !*/c3ref/objlist*
c\+\+-annotations-html          html        *.html
exim4-doc-html                  html        *.html !*index*
postfix-doc                     html        */html/*_README.html
zsh-doc                         info        */info/*.gz
bash-doc                        info        */info/*.gz
python-django-doc               html        *.html !*genindex* !*modindex* !*/releases/*
python-scipy-doc                html        */tutorial/*.html */dev/*.html
python-sympy-doc                html        *.html !*genindex* !*modindex* !*/_modules/*
renpy-doc                       html        *.html !*genindex* !*changelog*
nethack-common                  text        */Guidebook.txt.gz
crawl-common                    descriptions */dat/descript/*.txt !*/descript/??/* !*/tutorial.txt !*/hints.txt
crawl-common                    text        */docs/crawl_manual.txt */docs/options_guide.txt
endless-sky-data                sky         */data/*.txt
gnome-user-docs                 docbook     */help/C/*.page
kate5-data                      docbook     */HTML/en/*.docbook*
konsole                         docbook     */HTML/en/*.docbook*
okular                          docbook     */HTML/en/*.docbook*
kpat                            docbook     */HTML/en/*.docbook*
kmymoney-common                 docbook     */HTML/en/*.docbook*
libpython3\.[0-9]+-stdlib       code        *.py !*/encodings/* !*/pydoc_data/*
libstdc\+\+-[0-9]+-dev          code        */bits/*.h */bits/*.tcc
glibc-source                    code-tar    *.tar.xz
END
    local campaign
    for campaign in httt tsg trow utbs low did dm ei nr sotbe sof sota thot dw l ttb; do
        echo "wesnoth-1\.[0-9]+-$campaign wml *.cfg"
    done
}

# ------------------------------------------------------------------------------------------------- arguments

whole() { [[ $1 =~ ^[0-9]{1,15}$ ]]; }
out="" documents="" seed=0 again=0
while [ $# -gt 0 ]; do
    case $1 in
    --documents | --seed)
        if [ $# -lt 2 ] || ! whole "$2"; then wrong "$1 wants a whole number, got '${2:-}'"; fi
        if [ "$1" = --seed ]; then seed=$2; else documents=$2; fi
        shift
        ;;
    --again) again=1 ;;
    -h | --help) usage; exit 0 ;;
    -*) wrong "no option '$1'" ;;
    *)
        if [ -n "$out" ]; then wrong "one OUT_DIR wanted, got '$out' and '$1'"; fi
        out=$1
        ;;
    esac
    shift
done
if [ -z "$out" ]; then wrong "no OUT_DIR given"; fi
if [ "$documents" = 0 ]; then wrong "--documents wants at least 1"; fi

mkdir -p "$out/packages" "$out/unpacked" 2>/dev/null || die "$out: cannot make this directory or write in it"
out=$(cd "$out" && pwd)
for place in "$out" "$out/packages" "$out/unpacked"; do [ -w "$place" ] || die "$place: not writable"; done
for tool in apt-get apt-cache dpkg-deb; do
    command -v "$tool" >/dev/null || die "no $tool: the texts come as Debian packages, so this needs Debian or Ubuntu"
done
command -v python3 >/dev/null || die "no python3; as root: apt-get install python3-minimal"
exec 9>"$out/.lock"
flock -n 9 || die "$out: another corpus.sh is at work there"

# ------------------------------------------------------------------------------------------------- packages

apt_options=(-qq -o Dpkg::Use-Pty=0 -o Acquire::Retries=2)
if [ "$(id -u)" = 0 ]; then apt_options+=(-o APT::Sandbox::User=root); fi # the user _apt may not write in OUT_DIR

# resolve: lines PACKAGE VERSION FORMAT GLOB..., tab-separated, for what apt knows of the recipe.
resolve() {
    local names pattern format globs package version list
    names=$(apt-cache pkgnames | sort -V)
    while read -r pattern format globs; do
        package=$(grep -xE -- "$pattern" <<<"$names" | tail -n 1) || package=""
        version=""
        if [ -n "$package" ]; then version=$(apt-cache policy "$package" | sed -n 's/^  Candidate: //p'); fi
        if [ -z "$version" ] || [ "$version" = "(none)" ]; then
            say "left out: no package '$pattern' here"
            continue
        fi
        read -ra list <<<"$globs"
        printf '%s\t%s\t%s' "$package" "$version" "$format"
        printf '\t%s' "${list[@]}"
        printf '\n'
    done < <(recipe)
}

deb_of() { compgen -G "$out/packages/$1_${2//:/%3a}_*.deb" | head -n 1; } # deb_of PACKAGE VERSION
unpacked_is() { [ "$(cat "$out/unpacked/$1/.version" 2>/dev/null)" = "$2" ]; }

# fetch: downloads what is neither unpacked nor here, having said what it takes.
fetch() {
    local package version wanted=() bytes need free
    while read -r package version; do
        if ! unpacked_is "$package" "$version" && [ -z "$(deb_of "$package" "$version")" ]; then wanted+=("$package=$version"); fi
    done < <(cut -f 1,2 "$out/plan.new" | sort -u)
    if [ ${#wanted[@]} = 0 ]; then return 0; fi
    bytes=$(apt-get "${apt_options[@]}" --print-uris download "${wanted[@]}" | awk '{n += $3} END {printf "%d", n / 1e6}')
    free=$(df -Pm "$out" | awk 'NR == 2 {print $4}')
    need=$((bytes * 3 + 500)) # measured: 636 MB of packages make 950 MB of text and 280 MB of documents
    say "${#wanted[@]} packages, $bytes MB, to download; $need MB of disk with all that is made of them ($free MB free)"
    if [ "$free" -lt "$need" ]; then die "$out: the disk has $free MB free and $need MB are needed"; fi
    if ! (cd "$out/packages" && apt-get "${apt_options[@]}" download "${wanted[@]}" >"$out/apt.log" 2>&1); then
        say "apt-get download: $(grep -m 1 -E '^[EW]:' "$out/apt.log" || tail -n 1 "$out/apt.log")"
    fi
}

pictures=(png jpg jpeg gif svg svgz ogg oga mp3 wav pdf ps mo js css woff woff2 ttf eot epub so a flac xcf)

# unpack PACKAGE VERSION: only text; under another name until whole. A damaged package is removed, so that the next run
# fetches it.
unpack() {
    local deb into=$out/unpacked/$1 picture exclude=()
    unpacked_is "$1" "$2" && return 0
    deb=$(deb_of "$1" "$2")
    if [ -z "$deb" ]; then
        say "left out: $1 $2 could not be downloaded"
        return 1
    fi
    for picture in "${pictures[@]}"; do exclude+=(--exclude="*.$picture"); done
    rm -rf "$into" "$into.new"
    mkdir "$into.new"
    if ! dpkg-deb --fsys-tarfile "$deb" 2>"$out/apt.log" |
        tar -x --no-same-owner -C "$into.new" --wildcards "${exclude[@]}" 2>>"$out/apt.log"; then
        rm -rf "$into.new"
        if grep -q 'No space left' "$out/apt.log"; then die "$out: the disk is full (unpacking $1)"; fi
        rm -f "$deb"
        say "left out: $deb was damaged and is removed; run again to fetch it"
        return 1
    fi
    chmod -R u+rwX "$into.new"
    printf '%s\n' "$2" >"$into.new/.version"
    mv "$into.new" "$into"
}

resolve >"$out/plan.new" || die "$out: cannot write there (disk full?)"
if [ ! -s "$out/plan.new" ] && [ "$(id -u)" = 0 ]; then
    say "apt has no package lists yet: apt-get update"
    apt-get -qq update || die "apt-get update failed: no network?"
    resolve >"$out/plan.new" 2>/dev/null
fi
[ -s "$out/plan.new" ] || die "apt knows none of the packages; as root: apt-get update"
fetch
say "unpacking into $out/unpacked"
while read -r package version; do
    if ! unpack "$package" "$version"; then
        awk -F '\t' -v package="$package" '$1 != package' "$out/plan.new" >"$out/plan.less"
        mv "$out/plan.less" "$out/plan.new"
    fi
done < <(cut -f 1,2 "$out/plan.new" | sort -u)
[ -s "$out/plan.new" ] || die "no package could be fetched: no network? (apt's words are in $out/apt.log)"

# ------------------------------------------------------------------------------------------------- corpus

if [ $again = 1 ] || [ ! -s "$out/documents.jsonl" ] || ! cmp -s "$out/plan.new" "$out/plan.tsv"; then
    say "converting (some minutes)"
    rm -f "$out/plan.tsv" # until the documents are whole
    python3 "$here/corpus.py" convert "$out/plan.new" "$out/unpacked" "$out/documents.jsonl" || exit 1
    mv "$out/plan.new" "$out/plan.tsv"
else
    rm -f "$out/plan.new"
    say "the packages are the same: $out/documents.jsonl is kept (--again converts again)"
fi
python3 "$here/corpus.py" choose "$out/documents.jsonl" "$out/plan.tsv" "$out" \
    --seed "$seed" ${documents:+--documents "$documents"} || exit 1
say "wrote $out/corpus.jsonl and $out/sources.tsv"
