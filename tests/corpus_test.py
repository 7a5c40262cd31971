"""The checks of tests/corpus_test.sh."""

import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import corpus

passed = failed = 0


def check(claim, holds, shown=""):
    global passed, failed
    passed, failed = passed + bool(holds), failed + (not holds)
    if not holds:
        print(f"FAILED: {claim}: {shown!r}")


def same(claim, blocks, *expected):
    got = [(each.kind, each.text) for each in blocks]
    check(claim, got == list(expected), got)


WORDS = (
    "river mountain letter candle winter harbour engine garden village stone bridge market teacher sailor forest window "
    "captain kitchen music shadow"
).split()


def prose(seed, sentences):
    """Invented English: the filters want common words, the duplicates' filter wants texts that differ."""
    draw = random.Random(seed)
    pick = lambda: draw.choice(WORDS) + draw.choice(["", "s"])
    return " ".join(
        f"The {pick()} of the {pick()} was in a {pick()} when {pick()} and {pick()} had been at the {pick()} with her {pick()}."
        for _ in range(sentences)
    )


def test_converters():
    same(
        "HTML: the main part, without navigation, scripts and table of contents; code keeps its lines",
        corpus.from_html("""<html><head><title>T</title><style>p{}</style></head><body><div class="navheader"><a>Next</a></div>
         <div role="main"><h1>Cats<a class="headerlink">&para;</a></h1><p>A cat
         is &amp; <b>was</b>.</p><div class="toc"><ul><li>One</li></ul></div><ul><li><p>soft</p></li><li>warm</li></ul>
         <pre>if x:

    y &lt; 1</pre><table><tr><td><p>a</p></td><td>b</td></tr></table><script>var x</script></div><p>outside</p></body></html>"""),
        ("head", "Cats"),
        ("text", "A cat is & was."),
        ("item", "soft"),
        ("item", "warm"),
        ("lines", "if x:\n\n    y < 1"),
        ("row", "a | b"),
    )
    same(
        "HTML: an element left open does not swallow the rest",
        corpus.from_html("<p>One<p>Two<ul><li>three<li>four</ul><p>Five"),
        ("text", "One"),
        ("text", "Two"),
        ("item", "three"),
        ("item", "four"),
        ("text", "Five"),
    )
    same(
        "DocBook: entities are spoken, shortcuts and credits go",
        corpus.from_docbook("""<!DOCTYPE book [ <!ENTITY x "<y>"> ]><book>
         <bookinfo><author>A</author></bookinfo><sect1><title>Play</title>
         <para>Start &kpat; from <link xref="z"/>.</para><shortcut>X</shortcut>
         <screen><![CDATA[a <b>]]></screen></sect1></book>"""),
        ("head", "Play"),
        ("text", "Start Kpat from that section."),
        ("lines", "a <b>"),
    )
    same(
        "manual page: macros, fonts and escapes go; tags and examples stay; authors, tables and comments go",
        corpus.from_man(
            '.\\" comment\n.de XX\nhidden\n..\n.TH CAT 1\n.SH NAME\ncat \\- read \\fIfiles\\fP\n'
            '.SH "THE OPTIONS"\n.TP\n.BR \\-a ", " \\-\\-all\n'
            "Show \\(lqall\\(rq.\n.PP\n.nf\ncat  x\n  y\n.fi\n.TS\nl l.\n.TE\n.SH AUTHORS\nSomebody.\n"
        ),
        ("text", "cat - read files"),
        ("head", "The options"),
        ("text", '-a, --all: Show "all".'),
        ("lines", "cat  x\n  y"),
    )
    same(
        "POD: commands and nested marks",
        corpus.from_pod(
            "=head1 NAME\n\nUse C<< a->b >> or B<I<it>>, see L<the FAQ|perlfaq>, E<lt>.\n\n"
            "=over 4\n\n=item * one\n\n=back\n\n  my $x;\n\n=begin html\n\nno\n\n=end html\n\n=cut\n\ncode"
        ),
        ("head", "Name"),
        ("text", "Use a->b or it, see the FAQ, <."),
        ("item", "one"),
        ("lines", "  my $x;"),
    )
    same(
        "Info: node lines, menus and references go",
        corpus.from_info(
            "head\x1f\nFile: a.info,  Node: Top,  Up: (dir)\n\n1.2 Shell Words\n===============\n\n"
            "A word (*note Quoting::) is what it is, says the shell that reads it.\n\n"
            "* Menu:\n\n* Quoting::  how\n"
            "* More::\n\x1f\nTag Table:\nx\n"
        ),
        ("head", "Shell Words"),
        ("text", "A word (Quoting) is what it is, says the shell that reads it."),
    )
    same(
        "reStructuredText: titles, roles, literal blocks; directives without prose go",
        corpus.from_rst(
            ".. SPDX-License-Identifier: GPL-2.0\n\n=====\nTitle\n=====\n\n"
            ":Author: X\n\nSee :ref:`the page <p>` and ``int x``::\n\n"
            "  if (a)\n    b();\n\n  c();\n\n"
            ".. toctree::\n\n   one\n\n.. note:: Take *care*.\n\n* first\n* second\n"
        ),
        ("head", "Title"),
        ("text", "See the page and int x:"),
        ("lines", "if (a)\n  b();\n\nc();"),
        ("text", "Take care."),
        ("item", "first"),
        ("item", "second"),
    )
    long = "This line is about as long as the one that comes after it here,\nand so both of them are put into one para-\ngraph."
    same(
        "plain text: paragraphs are joined, verse keeps its lines, rules and page numbers go",
        corpus.from_text(f"{long}\n\n------------\n\nRoses\n  are   red\n\n   Page 3\n"),
        (
            "text",
            "This line is about as long as the one that comes after it here, and so both of them are put into one paragraph.",
        ),
        ("lines", "Roses\n  are   red"),
    )
    same(
        "fortunes: entries between % signs",
        corpus.from_fortunes("One.\n\t-- A\n%\nTwo\n%\n"),
        ("lines", "One.\n        -- A"),
        ("lines", "Two"),
    )
    same(
        "descriptions: name and text",
        corpus.from_descriptions("# note\n%%%%\nElf\n\nA <b>tall</b> one.\n%%%%\nCode\n\n{{ return }}\n"),
        ("text", "Elf: A tall one."),
    )
    data = b"HEADER\nABBEY, n.\n   A {house} of\n   monks.\n\n   (1999-01-01)\nZEAL\n   Heat.\n"
    first, second = data.index(b"ABBEY"), data.index(b"ZEAL")
    letters = list(corpus.DICT_DIGITS)
    digits = lambda number: "".join(letters[digit] for digit in divmod(number, 64))
    index = "00databaseinfo\tA\tH\n"
    index += f"abbey\t{digits(first)}\t{digits(second - first)}\nzeal\t{digits(second)}\t{digits(len(data) - second)}\n"
    same(
        "dictionary: entries by the index, without cross-reference braces",
        corpus.from_dict(data, index),
        ("lines", "ABBEY, n.\nA house of monks."),
        ("lines", "ZEAL\nHeat."),
    )
    same(
        "Wesnoth: story and dialogue in order, markup and other languages' marks gone",
        corpus.from_wml(
            '[scenario]\nname=_ "The Ford"\n#story=_"no"\n[story]\n'
            '[part]\nstory=_ "Long <i>ago</i>, ""he"" said."\n[/part]\n[/story]\n[message]\nspeaker=Delfador\n'
            'message= _ "Hail, $unit.name|!"\n[/message]\n[unit]\nname=_ "Bob"\n[/unit]\n'
            '[message]\nspeaker=narrator\nmessage=_"It "+_"rains."\n[/message]\n'
        ),
        ("head", "The Ford"),
        ("text", 'Long ago, "he" said.'),
        ("text", "Delfador: Hail, unit!"),
        ("text", "It rains."),
    )
    same(
        "Endless Sky: conversations, with names filled in",
        corpus.from_sky('mission "x"\n\tdescription "Go to <planet>."\n\t\t\t`"Captain <last>?"`\n\tname "No"\n'),
        ("text", "Go to the planet."),
        ("text", '"Captain Hale?"'),
    )
    same(
        "code: whole functions, without the licence",
        corpus.from_code("/* Copyright (C) 1 X\n   License: GPL */\n\nint f(void)\n{\n\tint x;\n\n\treturn 1;\n}\n\nint y;\n"),
        ("lines", "int f(void)\n{\n        int x;\n\n        return 1;\n}"),
        ("lines", "int y;"),
    )


def test_cut():
    text = corpus.Block
    blocks = []
    for chapter in range(12):
        blocks += [text("head", f"Chapter {chapter}")] + [text("text", prose(chapter * 10 + at, 4)) for at in range(5)]
    blocks.append(text("text", prose(999, 90)))  # a paragraph that is too long for one document
    pieces = corpus.cut(blocks, "a/b")
    sizes = [corpus.count_tokens(corpus.joined(piece)) for piece in pieces]
    check("documents have 100 to 600 tokens", min(sizes) >= 100 and max(sizes) <= 600, sizes)
    check("their lengths vary", max(sizes) > 1.5 * min(sizes), sizes)
    check("no document ends in a heading", all(piece[-1].kind != "head" for piece in pieces))
    whole = " ".join(each.text for each in blocks).split()
    check("nothing is lost in the cut", " ".join(each.text for piece in pieces for each in piece).split() == whole)
    check("what is shorter than a document makes none", corpus.cut([text("text", "Too short.")], "x") == [])
    check(
        "list items follow each other, a numbered one without a dash",
        corpus.joined([text("text", "A:"), text("item", "b"), text("item", "2. c"), text("text", "D")]) == "A:\n\n- b\n2. c\n\nD",
    )


def test_filters():
    check("English prose reads well", corpus.reads_well(prose(1, 8), False))
    check("an index does not", not corpus.reads_well("\n".join(f"{a}, {b}" for a in WORDS for b in WORDS[:8]), False))
    check("numbers do not", not corpus.reads_well("the 1234 of 5678 and 9012 " * 20, False))
    check(
        "another language does not",
        not corpus.reads_well("Der Fluss und die Stadt liegen nicht weit von dem alten Haus. " * 12, False),
    )
    check("text that is not ASCII does not", not corpus.reads_well(prose(1, 6) + " \u0436" * 80, False))
    known = {"CPU": 500, "a": 50, "b": 40}
    check("one package's share is cut", corpus.share_cap({**known, **{str(n): 60 for n in range(12)}}, 0.10) < 100)
    check("few packages are left whole", corpus.share_cap(known, 0.10) == 500)


def run(*command, **more):
    return subprocess.run(command, capture_output=True, text=True, **more)


def make_packages(work):
    """Three packages: two share a boilerplate paragraph and near-duplicate texts, one has a licence list."""
    boiler = "This paragraph about the terms of use is in each and every page of the book, and nobody wants to read it again."
    for number in range(8):
        place = work / "unpacked/pages/usr/share/doc/pages"
        place.mkdir(parents=True, exist_ok=True)
        place.joinpath(f"{number}.html").write_text(
            f"<h1>Page</h1><p>{boiler}</p>" + "".join(f"<p>{prose(number * 100 + at, 3)}</p>" for at in range(40))
        )
    place.joinpath("copy.html").write_text(
        place.joinpath("0.html").read_text().replace("Page", "Leaf").replace("river", "stream")
    )
    place.joinpath("copyright").write_text("License: GPL-2+\n text\nLicense: MIT\nLicense: MIT\n")
    other = work / "unpacked/texts/usr/share/doc/texts"
    other.mkdir(parents=True)
    with gzip.open(other / "story.txt.gz", "wt") as file:
        file.write("\n\n".join(prose(5000 + at, 3) for at in range(60)))
    other.joinpath("copyright").write_text("This is free under the GNU General Public License.\n")
    work.joinpath("plan.tsv").write_text("pages\t1.0\thtml\t*.html\t!*index*\ntexts\t2:3-1\ttext\t*.gz\n")
    return boiler


def build(work, name, *options):
    script = corpus.__file__
    out = work / name
    out.mkdir()
    os.symlink(work / "unpacked", out / "unpacked")
    first = run(sys.executable, script, "convert", work / "plan.tsv", work / "unpacked", out / "documents.jsonl")
    second = run(sys.executable, script, "choose", out / "documents.jsonl", work / "plan.tsv", out, *options)
    check(f"{name} is built", first.returncode == second.returncode == 0, first.stderr + second.stderr)
    return out.joinpath("corpus.jsonl").read_bytes(), out, second.stderr


def test_pipeline(work):
    boiler = make_packages(work)
    lines, out, table = build(work, "one", "--seed", "7")
    records = [json.loads(line) for line in lines.splitlines()]
    check("the same packages give the same bytes", lines == build(work, "two", "--seed", "7")[0])
    check(
        "another seed gives another order of the same documents",
        sorted(lines.splitlines()) == sorted((shuffled := build(work, "three", "--seed", "8")[0]).splitlines())
        and shuffled != lines,
    )
    check(
        "the first N are the start of the whole",
        lines.startswith((few := build(work, "four", "--seed", "7", "--documents", "5")[0])) and few.count(b"\n") == 5,
    )
    check(
        "a record has an id, a text and its package",
        set(records[0]) == {"doc_id", "text", "source"}
        and all(each["doc_id"].startswith(each["source"] + "/usr/share/doc/") and "#" in each["doc_id"] for each in records),
    )
    check("ids are unique", len({each["doc_id"] for each in records}) == len(records))
    check("both packages are there", {each["source"] for each in records} == {"pages", "texts"})
    check(
        "boilerplate stays once",
        sum(boiler in each["text"] for each in records) == 1,
        sum(boiler in each["text"] for each in records),
    )
    copies = sum("copy.html" in each["doc_id"] for each in records)
    originals = sum("/0.html" in each["doc_id"] for each in records)
    check("a page that differs in a word here and there is left out", copies <= originals // 4, (copies, originals))
    rows = [line.split("\t") for line in out.joinpath("sources.tsv").read_text().splitlines()]
    found = {row[0]: row for row in rows[1:]}
    check(
        "sources.tsv names versions and licences",
        found["pages"][1:3] == ["1.0", "GPL-2+; MIT"] and found["texts"][1:3] == ["2:3-1", "GPL"],
        rows,
    )
    alone = work / "unpacked/alone/usr/share/doc"
    alone.mkdir(parents=True)
    alone.joinpath("alone").symlink_to("texts")
    check("a package that shares another's directory has its licence", corpus.licence("alone", work) == "GPL")
    alone.joinpath("alone").unlink()
    alone.joinpath("alone").symlink_to("elsewhere")
    check("or names the other when it is not there", corpus.licence("alone", work) == "see the copyright file of elsewhere")
    check("sources.tsv counts documents", sum(int(row[3]) for row in rows[1:]) == len(records))
    check("the table shows each package", all(name in table for name in ("pages", "texts", "documents")))
    check("nothing half-written stays", not list(out.glob("*.tmp")))


def test_errors(work):
    script = Path(corpus.__file__).with_name("corpus.sh")
    place = work / "errors"
    for claim, status, words, arguments in (
        ("no directory", 2, "no OUT_DIR", []),
        ("unknown option", 2, "no option '--tokens'", [place, "--tokens"]),
        ("two directories", 2, "one OUT_DIR", [place, place]),
        ("a size that is no number", 2, "whole number", [place, "--documents", "many"]),
        ("size nought", 2, "at least 1", [place, "--documents", "0"]),
        ("an option without its value", 2, "whole number", [place, "--seed"]),
    ):
        got = run(script, *arguments)
        check(claim, got.returncode == status and words in got.stderr, got.stderr)
    work.joinpath("file").write_text("")
    got = run(script, work / "file" / "out")
    check("a place that cannot be made", got.returncode == 1 and "cannot make" in got.stderr, got.stderr)
    tools = work / "bin"
    tools.mkdir()
    for tool in ("bash", "env", "dirname", "mkdir"):
        tools.joinpath(tool).symlink_to(run("bash", "-c", f"command -v {tool}").stdout.strip())
    got = run(tools / "bash", script, place, env={"PATH": str(tools)})
    check("a system without apt", got.returncode == 1 and "no apt-get" in got.stderr and got.stderr.count("\n") == 1, got.stderr)
    work.joinpath("bad.tsv").write_text("pages\t1.0\tcuneiform\t*\n")
    got = run(sys.executable, corpus.__file__, "convert", work / "bad.tsv", work / "unpacked", work / "bad.jsonl")
    check(
        "a plan with an unknown format",
        got.returncode == 1 and "bad.tsv:1" in got.stderr and got.stderr.count("\n") == 1,
        got.stderr,
    )
    broken = work / "unpacked/texts/usr/share/doc/texts/broken.gz"
    broken.write_bytes(b"\x1f\x8b not a gzip file")
    got = run(sys.executable, corpus.__file__, "convert", work / "plan.tsv", work / "unpacked", work / "rest.jsonl")
    check(
        "a damaged file is named and left out",
        got.returncode == 0 and "left out: texts: " in got.stderr and "broken.gz" in got.stderr,
        got.stderr,
    )


def stub_apt(work):
    """apt-get and apt-cache that know two packages and give one, and fail on the other as without a network."""
    tools = work / "apt"
    tools.mkdir()
    package = work / "deb"
    (package / "DEBIAN").mkdir(parents=True)
    package.joinpath("DEBIAN/control").write_text(
        "Package: anarchism\nVersion: 1:2\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    )
    place = package / "usr/share/doc/anarchism/html"
    place.mkdir(parents=True)
    place.joinpath("secA.html").write_text("".join(f"<p>{prose(at, 3)}</p>" for at in range(60)))
    run("dpkg-deb", "--build", "--root-owner-group", package, work / "made.deb")
    tools.joinpath("apt-cache").write_text(
        "#!/bin/sh\ncase $1 in pkgnames) printf 'anarchism\\nperl-doc\\n';; *) echo '  Candidate: 1:2';; esac\n"
    )
    tools.joinpath("apt-get").write_text(f"""#!/bin/sh
echo run >>{work}/calls
case "$*" in *--print-uris*) exit 0;; esac
[ -z "$OFFLINE" ] && cp {work}/made.deb anarchism_1%3a2_all.deb
echo 'E: Failed to fetch perl-doc' >&2
exit 100
""")
    for tool in ("apt-cache", "apt-get"):
        tools.joinpath(tool).chmod(0o755)
    return {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}


def test_fetch(work):
    if run("sh", "-c", "command -v dpkg-deb apt-get").returncode:
        return
    script, out = Path(corpus.__file__).with_name("corpus.sh"), work / "fetched"
    env = stub_apt(work)
    got = run(script, out, env={**env, "OFFLINE": "1"})
    check(
        "without a network: said, and no corpus",
        got.returncode == 1 and "no network?" in got.stderr and not (out / "corpus.jsonl").exists(),
        got.stderr,
    )
    out.joinpath("packages").mkdir(exist_ok=True)
    out.joinpath("packages/anarchism_1%3a2_all.deb").write_bytes(work.joinpath("made.deb").read_bytes()[:3000])
    got = run(script, out, env={**env, "OFFLINE": "1"})
    check("a damaged package is removed", "damaged" in got.stderr and not list(out.glob("packages/*.deb")), got.stderr)
    got = run(script, out, env=env)
    check(
        "a package that cannot be had is left out",
        got.returncode == 0
        and "left out: perl-doc 1:2" in got.stderr
        and {json.loads(line)["source"] for line in out.joinpath("corpus.jsonl").open()} == {"anarchism"},
        got.stderr,
    )
    before = out.joinpath("documents.jsonl").stat().st_mtime_ns
    got = run(script, out, "--documents", "3", env=env)
    check(
        "a second run converts nothing again",
        got.returncode == 0
        and out.joinpath("documents.jsonl").stat().st_mtime_ns == before
        and out.joinpath("corpus.jsonl").read_text().count("\n") == 3,
        got.stderr,
    )
    got = run(script, out, "--again", env=env)
    check("--again does", got.returncode == 0 and out.joinpath("documents.jsonl").stat().st_mtime_ns != before, got.stderr)


with tempfile.TemporaryDirectory() as directory:
    test_converters()
    test_cut()
    test_filters()
    test_pipeline(Path(directory))
    test_errors(Path(directory))
    test_fetch(Path(directory))
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)
