#!/usr/bin/env python3
"""The half of corpus.sh that needs no network: unpacked packages in, JSON Lines of documents out.

    corpus.py convert PLAN UNPACKED DOCUMENTS     every document, in the plan's order
    corpus.py choose DOCUMENTS PLAN OUT_DIR [--documents N] [--seed N]

PLAN has a line per package and format: package, version, format, then globs (a leading ! leaves out), tab-separated.
UNPACKED/PACKAGE is what the package holds. Each file goes through four steps: a converter makes blocks of it (headings,
paragraphs, list items, table rows, lines to keep as they are); blocks that many files share are boilerplate and go; the
rest is cut at block ends into documents of about 100 to 600 tokens; documents that do not read as English text or code,
or were seen before, are left out.
"""

import argparse
import fnmatch
import gzip
import hashlib
import json
import multiprocessing
import os
import re
import string
import sys
import tarfile
import zlib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

LEAST_TOKENS, MOST_TOKENS = 100, 600
SHARED_FILES = 3  # a block met in more files than this is kept only where it came first
MOST_SHARE = 0.10  # of the corpus, that one package may fill
NEAR_DUPLICATE = 0.4  # of the sampled shingles known already


class CorpusError(Exception):
    """A failure the user can act on; its text is the one line printed."""


class Block(NamedTuple):
    kind: str  # head, text, item, row (of a table), lines (kept as they are)
    text: str


def squeeze(text):
    return " ".join(text.split())


def sentence_case(title):
    """EXIT STATUS reads Exit status; a name such as PERL_PATH stays."""
    return title.capitalize() if re.fullmatch(r"[A-Z][A-Z ,'/&-]*", title) else title


def block(kind, text):
    """A list of the block, or of nothing when its text is empty."""
    text = (
        "\n".join(line.rstrip() for line in text.expandtabs(8).strip("\n").splitlines()).strip("\n")
        if kind == "lines"
        else squeeze(text)
    )
    return [Block(kind, text)] if text.strip() else []


# ---------------------------------------------------------------------------------------------------------------------
# Markup: HTML, DocBook and Mallard


class Markup(HTMLParser):
    """Collects blocks. When a page marks its main part, only that is kept."""

    VOID = set("area base br col embed hr img input link meta source track wbr".split())
    SKIP = set(
        "script style nav footer form select button svg math head title_page template iframe noscript info bookinfo "
        "indexterm shortcut remark prolog credit years copyright legalnotice releaseinfo imageobject media".split()
    )
    HEADS = set("h1 h2 h3 h4 h5 h6 title bridgehead".split())
    LINES = set("pre programlisting screen literallayout synopsis".split())
    BREAKS = set(
        "p para simpara div section article body blockquote table tr ul ol dl dt dd li listitem varlistentry term "
        "main hr sect1 sect2 sect3 note tip warning important caution formalpara steps step item page chapter".split()
    )
    CELLS = ("td", "th", "entry")
    NOISE = re.compile(
        r"(?:^|[\s_-])(?:nav\w*|sidebar|sphinxsidebar\w*|related|footer|header(?!link)|headerlink|anchor|toc\w*|"
        r"breadcrumbs?|genindextable|search\w*|topnav|menu|top|bottom|lang|langs?|toplang|up|pagetop|"
        r"titlepage|index|printindex|copyright|backlink|categories|seealso|linenos|table-of-contents|"
        r"short-contents|element-number|"
        r"viewcode-link|permalink|apache|menubar|desktoponly|mobileonly|nosearch|fancy_toc)(?:$|[\s_-])"
    )
    NOISY_TAGS = set("div ul ol table span a nav section header p h1 h2 h3 td".split())
    MAIN = re.compile(r"(?:^|\s)(?:main|body|document|page-content)(?:$|\s)")
    HEADING_WORDS = re.compile(r"(?:prev(?:ious)?|next|up|home|contents|index|top|table of contents|see also)$", re.I)

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.blocks, self.main_blocks = [], []
        self.text, self.kind = [], "text"
        self.skip_tag, self.skip_depth = None, 0
        self.main_tag, self.main_depth = None, 0
        self.lines_depth = 0
        self.cell_depth = 0

    def flush(self, following="text"):
        text = "".join(self.text)
        if self.lines_depth == 0:
            text = re.sub(r"[\u00b6\u2191\uf0c1]", "", text)
            text = re.sub(r"^(?:\s*\|)+|(?:\s*\|)+\s*$", "", text)
        if self.kind == "head" and self.HEADING_WORDS.match(text.strip()):
            text = ""
        made = block(self.kind, text)
        (self.main_blocks if self.main_tag else self.blocks).extend(made)
        self.text, self.kind = [], following

    def handle_starttag(self, tag, attributes):
        if self.skip_tag:
            self.skip_depth += tag == self.skip_tag
            return
        if tag in self.VOID:
            self.void(tag)
            return
        attributes = dict(attributes)
        names = f"{attributes.get('class') or ''} {attributes.get('id') or ''}".lower()
        if tag in self.SKIP or (tag in self.NOISY_TAGS and self.NOISE.search(names)) or self.hidden(attributes):
            self.skip_tag, self.skip_depth = tag, 1
            return
        if self.main_tag:
            self.main_depth += tag == self.main_tag
        elif tag in ("div", "main", "article", "section") and (
            tag == "main" or attributes.get("role") == "main" or self.MAIN.search(attributes.get("class") or "")
        ):
            self.flush()
            self.main_tag, self.main_depth = tag, 1
        self.open_block(tag)

    @staticmethod
    def hidden(attributes):
        return "display:none" in (attributes.get("style") or "").replace(" ", "")

    def void(self, tag):
        if tag == "br":
            self.text.append("\n")
        elif tag == "hr" and not self.lines_depth:
            self.flush()

    def open_block(self, tag):
        if tag in self.LINES:
            if not self.lines_depth:
                self.flush("lines")
            self.lines_depth += 1
        elif self.lines_depth:
            return
        elif tag in self.CELLS:
            self.cell_depth += 1
        elif tag == "tr" or tag == "row":
            self.cell_depth = 0
            self.flush("row")
        elif self.cell_depth and tag in ("p", "para", "div"):
            self.text.append(" ")
        elif tag in self.HEADS or tag in ("dt", "term"):  # neither may end a document
            self.flush("head")
        elif tag in ("li", "listitem", "item"):
            self.flush("item")
        elif tag in self.BREAKS:
            inside_item = self.kind == "item" and not "".join(self.text).strip()  # <li><p>: the paragraph is the item
            self.flush("item" if inside_item else "text")

    def handle_endtag(self, tag):
        if self.skip_tag:
            self.skip_depth -= tag == self.skip_tag
            if self.skip_depth <= 0:
                self.skip_tag = None
            return
        if tag in self.LINES and self.lines_depth:
            self.lines_depth -= 1
            if not self.lines_depth:
                self.flush()
        elif not self.lines_depth and tag in self.CELLS:
            self.cell_depth = max(0, self.cell_depth - 1)
            self.text.append(" | ")
        elif self.cell_depth and tag in ("p", "para", "div"):
            self.text.append(" ")
        elif not self.lines_depth and (tag in self.BREAKS or tag in self.HEADS):
            self.flush()
        if self.main_tag == tag:
            self.main_depth -= 1
            if not self.main_depth:
                self.flush()
                self.main_tag = None

    def handle_data(self, data):
        if not self.skip_tag:
            self.text.append(data)


def from_html(text, parser=Markup):
    page = parser()
    page.feed(text)
    page.close()
    page.flush()
    blocks = page.main_blocks or page.blocks
    return [each for each in blocks if not is_page_furniture(each.text)]


FURNITURE = re.compile(
    r"(?:^|\W)(?:next|previous|prev|up|home|top)\b.{0,60}\b(?:next|previous|prev|up|home|contents|index|toc)\b"
    r"|^(?:warning! )?the server encountered|^this (?:page|document) was (?:generated|last)"
    r"|^\[? ?(?:prev|next|previous|up|top)\b.{0,40}$|^available languages|^copyright (?:\(c\)|\u00a9|\d)"
    r"|^figure [\d.]+|^all rights reserved|^last (?:modified|updated)|^table of contents",
    re.I,
)


def is_page_furniture(text):
    return len(text) < 200 and bool(FURNITURE.search(squeeze(text)))


class XmlMarkup(Markup):
    """DocBook and Mallard: no class names, and `p` etc. are all there is."""

    LINES = Markup.LINES | {"code_block"}
    MAIN = re.compile(r"(?!)")

    def open_block(self, tag):
        if tag == "menuchoice":
            return
        super().open_block(tag)

    def handle_startendtag(self, tag, attributes):
        if tag in ("link", "xref") and not self.skip_tag:
            self.text.append("that section")  # the reader's program would put its title here


def from_docbook(text):
    text = re.sub(r"<!DOCTYPE[^\[>]*(?:\[.*?\]\s*>|>)", "", text, count=1, flags=re.S)
    text = re.sub(r"<!\[CDATA\[(.*?)\]\]>", lambda found: found[1].replace("&", "&amp;").replace("<", "&lt;"), text, flags=re.S)
    text = re.sub(r"</(guimenu|guisubmenu)>\s*<(?=gui)", r"</\1> &#8594; <", text)
    text = re.sub(r"</keycap>\s*<keycap", "</keycap>+<keycap", text)
    text = re.sub(r"&(?!amp;|lt;|gt;|quot;|apos;|nbsp;|mdash;|ndash;|#)([A-Za-z][\w.-]*);", spoken_entity, text)
    return from_html(text, XmlMarkup)


def spoken_entity(found):
    """DocBook's own entities are mostly program names: &kde; reads KDE; those that pull in files or credits go."""
    name = found[1]
    if name in ("hellip", "rarr", "copy", "reg", "trade", "ldquo", "rdquo", "lsquo", "rsquo", "euro", "eacute"):
        return found[0]
    if re.match(r"(?:reporting|documentation|underF|underG|install|kappname|chapter|[\w-]+-\w+-)", name) or "." in name:
        return ""
    return {
        "kde": "KDE",
        "ie": "i.e.",
        "eg": "e.g.",
        "etc": "etc.",
        "LMB": "left mouse button",
        "RMB": "right mouse button",
        "MMB": "middle mouse button",
        "Ctrl": "Ctrl",
        "Qt": "Qt",
    }.get(name, name[0].upper() + name[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Manual pages

ROFF_NAMES = {
    "aq": "'",
    "dq": '"',
    "em": "-",
    "en": "-",
    "hy": "-",
    "bu": "-",
    "lq": '"',
    "rq": '"',
    "oq": "'",
    "cq": "'",
    "co": "(C)",
    "rs": "\\",
    "ti": "~",
    "ha": "^",
    "mu": "x",
    "mc": "u",
    "<=": "<=",
    ">=": ">=",
    "->": "->",
    "at": "@",
    "ga": "`",
    "ge": ">=",
    "le": "<=",
    "la": "<",
    "ra": ">",
    "if": "infinity",
    "+-": "+-",
    "+": "+",
    "-": "-",
}
DROPPED_SECTIONS = re.compile(
    r"(?:see also|authors?|copyright|colophon|reporting bugs|bugs report|attributes|notes? on license|"
    r"copyright and licen[cs]e|licen[cs]e|history of|acknowledge?ments?|support)\b",
    re.I,
)


def unescape_roff(text):
    text = re.sub(r'\\".*', "", text)
    text = re.sub(r"\\s[+-]?\d{1,2}|\\f(?:\[\w*\]|\(\w\w|.)|\\m\[\w*\]|\\[hvwk]'[^']*'", "", text)
    text = re.sub(r"\\\*\((..)", lambda found: {"lq": '"', "rq": '"', 'L"': '"', 'R"': '"'}.get(found[1], ""), text)
    text = re.sub(r"\\\*(?:\[\w+\]|.)", "", text)
    text = re.sub(
        r"\\\[(?:u([0-9A-F]{4,5})|([^\]]+))\]",
        lambda found: chr(int(found[1], 16)) if found[1] else ROFF_NAMES.get(found[2], ""),
        text,
    )
    text = re.sub(r"\\\((..)", lambda found: ROFF_NAMES.get(found[1], ""), text)
    text = re.sub(r"\\([&|^:%)/,!c])", "", text)
    return (
        text.replace("\\-", "-")
        .replace("\\ ", " ")
        .replace("\\~", " ")
        .replace("\\0", " ")
        .replace("\\'", "'")
        .replace("\\`", "`")
        .replace("\\.", ".")
        .replace("\\e", "\\")
        .replace("\\\\", "\\")
    )


def roff_words(text):
    return [
        unescape_roff(quoted.replace('""', '"') if plain == "" else plain)
        for quoted, plain in re.findall(r'"((?:[^"]|"")*)"?|((?:\\ |\S)+)', text)
    ]


class Manual:
    """Reads the man macros; what it does not know of roff (tables, definitions, conditions) it leaves out."""

    PARAGRAPH = {"PP", "P", "LP", "HP", "TP", "TQ", "IP", "sp", "RS", "RE", "br", "Sp", "Vb", "Ve"}
    FONTS = {"B", "I", "SM", "SB"}
    ALTERNATING = {"BR", "RB", "BI", "IB", "IR", "RI", "SY", "OP"}

    def __init__(self):
        self.blocks, self.words, self.kind = [], [], "text"
        self.skip_until, self.dropped, self.braces, self.tag = None, False, 0, None

    def flush(self, following="text"):
        text = ("\n" if self.kind == "lines" else " ").join(self.words)
        if not self.dropped:
            self.blocks += block(self.kind, text)
        self.words, self.kind = [], following

    def line(self, line):
        if self.skip_until:
            if self.skip_until.match(line):
                self.skip_until = None
            return
        if self.braces:
            self.braces += line.count("\\{") - line.count("\\}")
            return
        if line[:1] in (".", "'") and self.kind != "raw":
            self.request(line[1:].strip())
        elif line.strip() or self.kind == "lines":
            self.say(unescape_roff(line))
        else:
            self.flush()

    def say(self, text):
        if self.tag == "wanted":  # the line after .TP is the tag of the paragraph that follows
            self.words.append(text.strip() + ":" if text.strip() not in ("-", "*", "o") else "-")
            self.tag = None
        else:
            self.words.append(text if self.kind == "lines" else text.strip())

    def request(self, request):
        name, _, rest = request.partition(" ")
        if name.startswith('\\"') or not name:
            return
        if name in ("de", "ig", "am", "de1"):
            self.skip_until = re.compile(r"\.\.")
        elif name == "TS":
            self.flush()
            self.skip_until = re.compile(r"\.TE")
        elif name in ("if", "ie", "el"):
            self.braces = max(0, request.count("\\{") - request.count("\\}"))
        elif name in ("SH", "SS"):
            self.heading(name, rest)
        elif name in ("nf", "EX", "Vb"):
            self.flush("lines")
        elif name in ("fi", "EE", "Ve"):
            self.flush()
        elif name in self.PARAGRAPH:
            self.paragraph(name, rest)
        elif name in self.FONTS:
            self.say(" ".join(roff_words(rest)))
        elif name in self.ALTERNATING:
            self.say("".join(roff_words(rest)))
        elif name in ("UR", "MT", "URL"):
            self.say(unescape_roff(rest))

    def heading(self, name, rest):
        self.flush()
        title = " ".join(roff_words(rest))
        if name == "SH":
            self.dropped = bool(DROPPED_SECTIONS.match(title))
        if not self.dropped:
            self.blocks += block("head", sentence_case(title))

    def paragraph(self, name, rest):
        if self.kind == "lines":
            if name in ("sp", "PP", "P", "IP"):
                self.words.append("")
            return
        if name == "br":
            return
        self.flush()
        self.tag = "wanted" if name in ("TP", "TQ") else None
        if name == "IP" and rest:
            tag = roff_words(rest)[0]
            self.words.append(
                "-" if tag in ("*", "-", "o", "\u2022") else tag + ("" if re.match(r"\W*\w{1,2}[.)]$", tag) else ":")
            )


def from_man(text):
    if re.search(r"^\.(?:Dd|so)\b", text, flags=re.M):
        return []  # mdoc is another language; .so names another page
    manual = Manual()
    for line in text.replace("\\\n", "").splitlines():
        manual.line(line)
    manual.flush()
    return man_title(manual.blocks)


def man_title(blocks):
    """The section NAME as a sentence: `close - close a file` needs no heading of its own."""
    if blocks and blocks[0] == Block("head", "Name"):
        blocks = blocks[1:]
    return [
        each._replace(text=re.sub(r"^- ", "", each.text), kind="item")
        if each.kind == "text" and each.text.startswith("- ")
        else each
        for each in blocks
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Plain Old Documentation, Info, reStructuredText, plain text


def unmark_pod(text):
    names = {"lt": "<", "gt": ">", "verbar": "|", "sol": "/", "eacute": "\u00e9", "amp": "&", "quot": '"'}
    for _ in range(5):  # innermost first
        text, changed = re.subn(r"([A-Z])(?:<<+\s+(.*?)\s+>>+|<([^<>]*)>)", lambda found: one_pod(found, names), text, flags=re.S)
        if not changed:
            break
    return text.replace("\x01", "<").replace("\x02", ">")


def one_pod(found, names):
    letter, inner = found[1], found[2] if found[2] is not None else found[3]
    if letter == "E":
        inner = names.get(inner, chr(int(inner, 0)) if re.fullmatch(r"\d+|0x[0-9a-fA-F]+", inner) else "")
    elif letter == "L":
        shown, bar, page = inner.partition("|")
        inner = (
            shown
            if bar
            else page or shown.replace("/", " in section ")
            if not inner.startswith(("http", "/"))
            else inner.lstrip("/")
        )
    elif letter in "XZ":
        inner = ""
    return inner.replace("<", "\x01").replace(">", "\x02")


def from_pod(text):
    blocks, reading, dropped = [], text.startswith("="), False
    for part in re.split(r"\n\s*\n", text):
        part = part.strip("\n")
        command = re.match(r"=(\w+)\s*(.*)", part, flags=re.S)
        if command:
            name, rest = command[1], unmark_pod(command[2])
            reading = name not in ("cut", "begin", "for")
            if name.startswith("head"):
                if name == "head1":
                    dropped = bool(DROPPED_SECTIONS.match(rest.strip()))
                blocks += [] if dropped else block("head", sentence_case(rest))
            elif name == "item" and not dropped:
                blocks += block("item", re.sub(r"^[*\u2022]\s*", "", rest))
        elif reading and not dropped:
            blocks += block("lines", part) if part[:1] in (" ", "\t") else block("text", unmark_pod(part))
    return blocks


def from_info(text):
    text = re.sub(r"\x1f\nTag Table:.*", "", text, flags=re.S)
    text = re.sub(r"\x00\x08\[(?:image|index).*?\x00\x08\]", "", text, flags=re.S)
    blocks = []
    for node in text.split("\x1f")[1:]:
        _, _, body = node.lstrip("\n").partition("\n")  # the line File: ... Node: ...
        body = re.sub(r"^\* Menu:.*?(?=\n\S(?<!\*)|\Z)", "", body, flags=re.M | re.S)
        body = re.sub(r"^\* .*(?:\n +.*)*", "", body, flags=re.M)
        body = re.sub(r"\*note ([^:]*)::", r"\1", body, flags=re.I)
        body = re.sub(r"\*note ([^:]*): [^.,]*(?=[.,])", r"\1", body, flags=re.I)
        body = re.sub(r"^(\S.*)\n[*=.-]{3,}$", "\n\x03\\1\n", body, flags=re.M)
        for each in from_text(body):
            blocks += (
                block("head", re.sub(r"^[\dA-Z.]+ (?=[A-Z])", "", each.text[1:])) if each.text.startswith("\x03") else [each]
            )
    return blocks


TEXT_FURNITURE = re.compile(r"^.*\[Page \d+\].*$|^\s*Page \d+\s*$|\f", re.M)


TEXT_RULE = re.compile(r"\s*(?:[+|=_*~-]{8,}|\+-{3,}.*-{3,}\+)\s*")


def from_text(text):
    """Paragraphs by blank lines; one whose lines are uneven (tables, code, verse) keeps them."""
    blocks = []
    for part in re.split(r"\n[ \t]*\n", TEXT_FURNITURE.sub("", text.expandtabs(8))):
        lines = [line.rstrip() for line in part.splitlines() if line.strip() and not TEXT_RULE.fullmatch(line)]
        if lines and not re.fullmatch(r"[\W_]*", part):
            blocks += text_part(lines)
    return blocks


def text_part(lines):
    margins = [len(line) - len(line.lstrip()) for line in lines]
    least = min(margins)
    lines = [line[least:] for line in lines]
    if len(lines) > 1 and min(margins[1:]) > least == margins[0] and len(lines[0]) < 50 and not re.search(r"[{};=]$", lines[0]):
        body = text_part(lines[1:])  # a term, and what it means set in
        if body and body[0].kind == "text":
            return block("text", lines[0]) + body
    bullet = re.match(r"(?:[*o-]|\(?\d+[.)])\s+", lines[0])
    if bullet and all(len(line) - len(line.lstrip()) in (bullet.end(), 0) for line in lines[1:]):
        items = re.split(r"\n(?=(?:[*o-]|\(?\d+[.)])\s)", "\n".join(lines))
        return [made for item in items for made in block("item", re.sub(r"^[*o-]\s+", "", item))]
    even = len({margin for margin in margins[1:]}) <= 1 and max(margins) - least <= 5
    # Prose is even, without columns, and its lines but the last are about as long as each other.
    columns = any(re.search(r"\S {3,}\S", line) for line in lines)
    full = all(len(line) > 0.6 * max(map(len, lines)) for line in lines[:-1]) and (len(lines) < 2 or max(map(len, lines)) > 45)
    if even and not columns and full:
        return block("text", re.sub(r"(?<=[a-z])-\n\s*(?=[a-z])", "", "\n".join(lines)))
    return block("lines", "\n".join(lines))


RST_SHOWN = {"note", "warning", "tip", "important", "caution", "hint", "attention", "admonition", "topic", "versionadded"}
RST_CODE = {"code-block", "code", "sourcecode", "parsed-literal", "literalinclude", "highlight"}


def unmark_rst(text):
    text = re.sub(r":[\w:+-]+:`~?([^`<]*?)\s*(?:<[^`>]*>)?`", r"\1", text)
    text = re.sub(r"``(.+?)``", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", text)
    text = re.sub(r"`([^`]+)`_{0,2}", r"\1", text)
    text = re.sub(r"\[(?:#\w*|\d+)\]_", "", text)
    text = re.sub(r"(?<!\w)\*{1,2}(\S(?:.*?\S)?)\*{1,2}(?!\w)", r"\1", text)
    text = re.sub(r"\|(\w[\w -]*)\|", r"\1", text)
    return re.sub(r"(\w)_(?=[\s.,;)]|$)", r"\1", text).replace("\\ ", "").replace("\\*", "*")


def from_rst(text):
    blocks, literal = [], None  # literal: the margin that a following block must exceed to be one
    skipped = None  # the same for a directive whose body is left out
    for part in re.split(r"\n[ \t]*\n", text.expandtabs(8)):
        lines = [line.rstrip() for line in part.splitlines() if line.strip()]
        if not lines:
            continue
        margin = len(lines[0]) - len(lines[0].lstrip())
        if skipped is not None and margin > skipped:
            continue
        skipped = None
        if literal is not None and margin > literal:
            if blocks and blocks[-1].kind == "lines":
                blocks[-1] = Block("lines", blocks[-1].text + "\n\n" + "\n".join(line[margin:] for line in lines))
            else:
                blocks += block("lines", "\n".join(line[min(margin, len(line) - len(line.lstrip())) :] for line in lines))
            continue
        literal = None
        directive = re.match(r"\s*\.\. (?:([\w:-]+)::\s*(.*)|.*)", lines[0])
        if directive:
            name = (directive[1] or "").split(":")[-1]
            if name in RST_CODE:
                literal = margin
                body = [line for line in lines[1:] if not re.match(r"\s+:[\w-]+:", line)]
                blocks += block("lines", "\n".join(line[margin + 4 :] for line in body))
            elif name in RST_SHOWN:
                blocks += block("text", unmark_rst(" ".join([directive[2], *(each.strip() for each in lines[1:])])))
            else:
                skipped = margin
            continue
        made, opens = rst_part(lines)
        blocks += made
        literal = margin if opens else None
    return blocks


def rst_part(lines):
    """The blocks of one paragraph of reStructuredText, and whether it ends in `::`."""
    rule = re.compile(r"\s*([=\-~^\"'#*+.`_:])\1{2,}\s*$")
    if len(lines) >= 2 and rule.match(lines[0]) and len(lines) >= 3 and rule.match(lines[2]):
        lines = lines[1:]
    if len(lines) >= 2 and rule.match(lines[1]) and not rule.match(lines[0]):
        head = block("head", unmark_rst(lines[0]))
        more, opens = rst_part(lines[2:]) if lines[2:] else ([], False)
        return head + more, opens
    if any(re.match(r"\s*(?:\+[-=+]{5,}|=+\s+=+|\|.*\|$)", line) for line in lines) or re.match(r"\s*:[\w -]+:", lines[0]):
        return [], False
    text = "\n".join(lines)
    opens = text.endswith("::")
    if opens:
        text = re.sub(r"\s*::$", "", text) if text.endswith(" ::") else text[:-1]
    bullet = re.match(r"\s*(?:[*+-]|#[.)]|\(?\w[.)])\s+", text)
    if bullet:
        items = re.split(r"\n\s*(?=(?:[*+-]|#[.)])\s)", text)
        return [made for item in items for made in block("item", unmark_rst(re.sub(r"^\s*(?:[*+-]|#[.)])\s+", "", item)))], opens
    if re.match(r"\s*(?:>>> |\.\. )", text):
        return block("lines", text), False
    return block("text", unmark_rst(squeeze(text))), opens


# ---------------------------------------------------------------------------------------------------------------------
# Small things in one file: fortunes, definitions, game texts, code


def from_fortunes(text):
    """Entries between lines of % signs; lines are kept, as they are verses, dialogue and signatures."""
    entries = re.split(r"^%+$", text.expandtabs(8), flags=re.M)
    return [made for entry in entries for made in block("lines", re.sub(r"^#.*$\n?", "", entry, flags=re.M))]


def from_descriptions(text):
    """Crawl's descriptions: between lines of % signs, a name, an empty line, then the text."""
    blocks = []
    for entry in re.split(r"^%+$", text, flags=re.M):
        entry = re.sub(r"^#.*$\n?", "", entry, flags=re.M).strip()
        name, _, body = entry.partition("\n\n")
        if body and not re.search(r"\{\{|@\w+@|^w:\d", body, flags=re.M):
            body = re.sub(r"</?[a-z]+>", "", " ".join(made.text for made in from_text(body)))
            blocks += block("text", f"{name}: {body}" if len(name) < 50 else body)
    return blocks


DICT_DIGITS = {
    letter: value for value, letter in enumerate(string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/")
}


def dict_number(text):
    value = 0
    for letter in text:
        value = value * 64 + DICT_DIGITS[letter]
    return value


def from_dict(data, index):
    """dictd: INDEX has lines of headword, offset and length (base 64) into the data."""
    spans = set()
    for line in index.splitlines():
        fields = line.split("\t")
        if len(fields) >= 3 and not fields[0].startswith("00"):
            spans.add((dict_number(fields[1]), dict_number(fields[2])))
    blocks = []
    for offset, length in sorted(spans):
        entry = data[offset : offset + length].decode("utf-8", "replace")
        blocks += block("lines", tidy_definition(entry))
    return blocks


def tidy_definition(entry):
    entry = re.sub(
        r"\[(?:1913 Webster|PJC|WordNet [\d.]+|Webster 1913 Suppl\.|[\w .+-]*PJC[\w .+-]*|1913 Webster [^\]]*)\]", "", entry
    )
    entry = re.sub(r"\\[^\\\n]{1,60}\\", "", entry)  # the pronunciation
    entry = re.sub(r"\s*\((?=[^()]*[\[\"`*=])[^()]{1,60}\)(?=,\s+(?:n|v|a|adv|imp|prep|conj|p)\b)", "", entry)
    entry = re.sub(r"[ \t]+,", ",", entry)
    entry = re.sub(r"\{([^{}]*)\}", lambda found: squeeze(found[1]), entry)
    paragraphs = []
    for part in re.split(r"\n[ \t]*\n", entry):
        lines = [line for line in part.splitlines() if line.strip()]
        if not lines:
            continue
        if not re.match(r"\s", lines[0]) and len(lines) > 1 and re.match(r"\s", lines[1]):
            paragraphs += [squeeze(lines[0])] if squeeze(lines[0]).count(" ") < 3 else []
            lines = lines if squeeze(lines[0]).count(" ") >= 3 else lines[1:]
        paragraphs.append(squeeze(" ".join(lines)))
    return "\n".join(part for part in paragraphs if part and not re.fullmatch(r"\(\d{4}-\d\d-\d\d\)|\(https?://\S*\)", part))


WML = re.compile(
    r"\[(?P<tag>/?\w+)\]|(?P<speaker>\bspeaker|\bid)\s*=\s*\"?(?P<who>[^\n\"]*)|"
    r"(?P<key>\b(?:story|message|description|name|note|summary|objective|help_text|description_text))\s*=\s*"
    r"(?P<text>(?:_\s*)\"(?:[^\"]|\"\")*\"(?:\s*\+\s*(?:_\s*)?\"(?:[^\"]|\"\")*\")*)|"
    r"\{NARRATOR:?\s*(?P<told>_\s*\"(?:[^\"]|\"\")*\")"
)


def from_wml(text):
    """Wesnoth's scenarios in the order they are told: story parts, and messages with who speaks."""
    text = re.sub(r"^\s*#.*$", "", text, flags=re.M)
    blocks, tag, speaker = [], "", ""
    for found in WML.finditer(text):
        if found["tag"]:
            if not found["tag"].startswith("/"):
                tag, speaker = found["tag"], ""
        elif found["speaker"]:
            speaker = found["who"].strip() if tag == "message" else ""
        else:
            said = wml_text(found["text"] or found["told"])
            key = found["key"] or "story"
            if key in ("name", "description") and tag not in ("scenario", "campaign", "unit_type"):
                continue
            if key == "name":
                blocks += block("head", said)
            elif key == "message" and tag == "message" and re.fullmatch(r"[A-Z][\w' -]*", speaker):
                blocks += [made for part in said.split("\n\n") for made in block("text", f"{speaker}: {part}")]
            else:
                blocks += [made for part in said.split("\n\n") for made in block("text", part)]
    return blocks


def wml_text(quoted):
    text = "".join(part.replace('""', '"') for part in re.findall(r"\"((?:[^\"]|\"\")*)\"", quoted))
    text = re.sub(r"<[^<>]{1,80}>|^\s*\w+\^", "", text)
    return re.sub(r"\$\|?([a-z_]+)(?:\.\w+)*\|?", lambda found: found[1].replace("_", " "), text)


def from_sky(text):
    """Endless Sky: conversations and descriptions stand in backquotes (or in quotes after a key)."""
    names = {"first": "Robin", "last": "Hale", "ship": "Swallow"}
    blocks = []
    for quoted, described in re.findall(r"^\s*(?:\w+ )?`([^`]*)`|^\s*description \"([^\"]*)\"", text, flags=re.M):
        said = re.sub(r"<([^<>]+)>", lambda found: names.get(found[1], "the " + found[1]), quoted or described)
        said = re.sub(r"\$\{[^}]*\}|&\[[^\]]*\]", "", said)
        blocks += block("text", said)
    return blocks


def from_code(text):
    """Top-level pieces of a source file. The head comment with the licence goes."""
    text = text.replace("\f", "")
    text = re.sub(
        r"\A(?:#!.*\n)?\s*(?:/\*.*?\*/|(?:(?://|#(?!include|if|define)|\"\"\"|dnl).*\n)+)",
        lambda found: "" if re.search(r"licen[sc]e|copyright", found[0], re.I) else found[0],
        text,
        flags=re.S if text.lstrip().startswith("/*") else 0,
    )
    blocks = []
    for part in re.split(r"\n[ \t]*\n(?=\S)", text):
        if part.strip() and not re.search(r"copyright \(c\)|gnu (?:lesser )?general public", part, re.I):
            blocks += block("lines", part)
    return blocks


CONVERTERS = {
    "html": from_html,
    "docbook": from_docbook,
    "man": from_man,
    "pod": from_pod,
    "info": from_info,
    "rst": from_rst,
    "text": from_text,
    "fortunes": from_fortunes,
    "descriptions": from_descriptions,
    "wml": from_wml,
    "sky": from_sky,
    "code": from_code,
    "code-tar": from_code,
}


# ---------------------------------------------------------------------------------------------------------------------
# Documents


# A subword tokenizer gives a common word one token, a long one several, and each digit and sign one of its own.
PIECES = re.compile(r"[A-Za-z]{1,8}|\d|[^\sA-Za-z\d]|\n+| {2,}")
WORDS = re.compile(r"[A-Za-z0-9']+")


def count_tokens(text):
    return len(PIECES.findall(text))


def split_long(blocks):
    """Blocks over the limit in parts: sentences of a paragraph, lines of what is kept in lines."""
    for each in blocks:
        if count_tokens(each.text) <= MOST_TOKENS // 2:
            yield each
            continue
        glue = "\n" if each.kind == "lines" else " "
        units = each.text.split("\n") if glue == "\n" else re.split(r"(?<=[.!?:;])\s+(?=\S)", each.text)
        part, size = [], 0
        for unit in units:
            tokens = count_tokens(unit) + 1
            wide = size + tokens > MOST_TOKENS // 2 or (glue == "\n" and not unit.strip() and size > LEAST_TOKENS)
            if part and wide:
                yield from block(each.kind, glue.join(part))
                part, size = [], 0
            part.append(unit)
            size += tokens
        yield from block(each.kind, glue.join(part))


def cut(blocks, name):
    """Lists of blocks of 100 to 600 tokens. How long each wants to be is drawn from its name, so that lengths vary."""
    pieces, current, size = [], [], 0
    for each in split_long(blocks):
        tokens = count_tokens(each.text) + 2
        wanted = LEAST_TOKENS + 40 + zlib.crc32(f"{name}#{len(pieces)}".encode()) % 340
        ends = size >= wanted or size + tokens > MOST_TOKENS or (each.kind == "head" and size > wanted // 2 + LEAST_TOKENS // 2)
        if ends and size >= LEAST_TOKENS:
            heads = []
            while current and current[-1].kind == "head":  # a heading belongs to what follows
                heads.insert(0, current.pop())
            pieces.append(current)
            current, size = heads, sum(count_tokens(head.text) + 2 for head in heads)
        current.append(each)
        size += tokens
    if size >= LEAST_TOKENS:
        pieces.append(current)
    elif pieces and size + sum(count_tokens(each.text) + 2 for each in pieces[-1]) <= MOST_TOKENS:
        pieces[-1] += current
    return pieces


def joined(blocks):
    text = ""
    for at, each in enumerate(blocks):
        if at:
            text += "\n" if each.kind == blocks[at - 1].kind and each.kind in ("item", "row") else "\n\n"
        bare = each.kind == "item" and not re.match(r"\(?\w{1,2}[.)] ", each.text)
        text += ("- " if bare else "") + each.text
    text = text.replace("\xa0", " ").replace("\xad", "").replace("\u200b", "").replace("\r", "")
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


COMMON = set(
    "the of and to a in is that for it as be on with by this are or an not from at if which can you will was have "
    "but has all when its he his they their one no there more i we so what my she her your do who them were had would".split()
)


def reads_well(text, is_code):
    """Whether a document is English text (or code) rather than a table, an index, data or another language."""
    if not LEAST_TOKENS * 0.9 <= count_tokens(text) <= MOST_TOKENS * 1.1:
        return False
    solid = re.sub(r"\s+", "", text)
    if sum(letter < "\x80" for letter in text) < 0.95 * len(text) or "\ufffd" in text:
        return False
    letters = sum(map(str.isalpha, solid)) / len(solid)
    digits = sum(map(str.isdigit, solid)) / len(solid)
    if is_code:
        return letters > 0.5 and digits < 0.15
    words = [word.lower() for word in WORDS.findall(text)]
    common = sum(word in COMMON for word in words) / max(1, len(words))
    return letters > 0.72 and common > 0.17 and digits < 0.08 and mostly_sentences(text)


def mostly_sentences(text):
    """Not a list of names: lines average more than four words."""
    lines = [line for line in text.splitlines() if line.strip()]
    return len(WORDS.findall(text)) > 4.5 * len(lines)


def digest(text):
    return int.from_bytes(hashlib.blake2b(" ".join(WORDS.findall(text.lower())).encode(), digest_size=8).digest(), "big")


def shingles(text):
    """About one in eight of the text's runs of eight words, hashed; which, the words themselves decide."""
    words = [zlib.crc32(word.encode()) for word in WORDS.findall(text.lower())]
    chosen = set()
    for at in range(len(words) - 7):
        if (words[at] ^ (words[at + 1] >> 7)) % 8 == 0:
            chosen.add(zlib.crc32(repr(words[at : at + 8]).encode()) | words[at + 7] << 32)
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# From the plan to the documents


class Source(NamedTuple):
    package: str
    version: str
    format: str
    globs: tuple


def read_plan(path):
    sources = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 4 or (fields[2] not in CONVERTERS and fields[2] != "dict"):
            raise CorpusError(f"{path}:{number}: not 'package, version, format, glob...' with a known format: {line!r}")
        sources.append(Source(fields[0], fields[1], fields[2], tuple(fields[3:])))
    return sources


def source_files(source, unpacked):
    """The package's files that match a glob and no !glob, sorted. Links are left out: what they name is there as well."""
    root = Path(unpacked, source.package)
    taken = [glob for glob in source.globs if not glob.startswith("!")]
    left = [glob[1:] for glob in source.globs if glob.startswith("!")]
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if any(fnmatch.fnmatchcase(name, glob) for glob in taken) and not any(fnmatch.fnmatchcase(name, glob) for glob in left):
            if path.is_file() and not path.is_symlink():
                yield name, path


def read_bytes(path):
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix in (".gz", ".dz") else data


def decode(data):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def file_blocks(task):
    """(name, blocks, digests of the long ones) for each text in a file: a worker's first job."""
    source, name, path = task
    made = []
    try:
        if source.format == "dict":
            index = Path(re.sub(r"\.dict\.dz$", ".index", str(path))).read_text(errors="replace")
            made.append((name, from_dict(read_bytes(path), index)))
        elif source.format == "code-tar":
            for member, text in tar_texts(path):
                made.append((member, from_code(text)))
        else:
            made.append((name, CONVERTERS[source.format](decode(read_bytes(path)).replace("\r\n", "\n"))))
    except (OSError, EOFError, ValueError, KeyError, zlib.error, tarfile.TarError) as error:
        return source, [], f"{source.package}: {name}: {error}"
    return (
        source,
        [(label, blocks, [digest(each.text) if len(each.text) > 40 else 0 for each in blocks]) for label, blocks in made],
        None,
    )


def tar_texts(path):
    with tarfile.open(path) as archive:
        for member in sorted((each for each in archive if each.isfile()), key=lambda each: each.name):
            if re.search(r"\.[ch]$", member.name) and not re.search(r"/(?:sysdeps|localedata|iconvdata)/", member.name):
                yield member.name, decode(archive.extractfile(member).read())


def file_documents(task):
    """(doc_id, text, digest, shingles) for each document of a file: a worker's second job."""
    source, name, blocks = task
    made = []
    for number, piece in enumerate(cut(blocks, f"{source.package}/{name}")):
        text = joined(piece)
        if reads_well(text, source.format.startswith("code")):
            made.append((f"{source.package}/{name}#{number}", text, digest(text), shingles(text)))
    return source.package, made


def without_boilerplate(texts):
    """Drops the blocks that more than SHARED_FILES files have, but where they come first."""
    files = Counter(key for _, _, _, keys in texts for key in set(keys))
    seen = set()
    for source, name, blocks, keys in texts:
        kept = []
        for each, key in zip(blocks, keys):
            if key and files[key] > SHARED_FILES:
                if key in seen:
                    continue
                seen.add(key)
            kept.append(each)
        yield source, name, kept


def convert(plan, unpacked, out):
    sources = read_plan(plan)
    tasks = [(source, name, path) for source in sources for name, path in source_files(source, unpacked)]
    if not tasks:
        raise CorpusError(f"{unpacked}: none of the plan's files is there; remove {unpacked} to unpack the packages again")
    exact, known, kept = set(), set(), 0
    temporary = f"{out}.tmp"
    with multiprocessing.Pool(min(2, os.cpu_count() or 1)) as pool, open(temporary, "w", encoding="utf-8") as file:
        texts = []
        for source, made, problem in pool.imap(file_blocks, tasks, chunksize=8):
            if problem:
                print(f"corpus.py: left out: {problem}", file=sys.stderr)
            texts += [(source, name, blocks, keys) for name, blocks, keys in made]
        for package, documents in pool.imap(file_documents, without_boilerplate(texts), chunksize=16):
            for doc_id, text, key, parts in documents:
                if key in exact or (len(parts) >= 4 and len(parts & known) > NEAR_DUPLICATE * len(parts)):
                    continue
                exact.add(key)
                known |= parts
                kept += 1
                json.dump({"doc_id": doc_id, "text": text, "source": package}, file, ensure_ascii=False)
                file.write("\n")
    os.replace(temporary, out)
    print(f"corpus.py: {len(tasks)} files, {kept} documents", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# From the documents to the corpus


def share_cap(counts, share):
    """The most documents a package may have so that none fills more than `share` of what remains (if there are enough)."""
    if len(counts) * share < 1:
        return max(counts.values())  # too few packages: each fills more than that whatever is left out
    cap = max(counts.values())
    while cap > 1 and cap > share * sum(min(count, cap) for count in counts.values()):
        cap = int(share * sum(min(count, cap) for count in counts.values()))
    return cap


def rank(seed, doc_id):
    return hashlib.blake2b(f"{seed}:{doc_id}".encode(), digest_size=16).digest()


def choose(documents, plan, out, wanted, seed):
    """corpus.jsonl and sources.tsv: shuffled by seed, no package over its share, the first `wanted`."""
    with open(documents, "rb") as file:
        lines, at = [], 0
        for line in file:
            record = json.loads(line)
            lines.append((rank(seed, record["doc_id"]), record["source"], at))
            at += len(line)
        lines.sort()
        cap = share_cap(Counter(source for _, source, _ in lines), MOST_SHARE)
        taken, chosen = Counter(), []
        for _, source, offset in lines:
            if taken[source] < cap and (wanted is None or len(chosen) < wanted):
                taken[source] += 1
                chosen.append(offset)
        if wanted is not None and len(chosen) < wanted:
            print(f"corpus.py: {wanted} documents wanted, {len(chosen)} there are", file=sys.stderr)
        totals = {}
        with open(f"{out}/corpus.jsonl.tmp", "wb") as result:
            for offset in chosen:
                file.seek(offset)
                line = file.readline()
                result.write(line)
                record = json.loads(line)
                total = totals.setdefault(record["source"], [0, 0, 0])
                total[0] += 1
                total[1] += len(record["text"].split())
                total[2] += count_tokens(record["text"])
            result.flush()
            os.fsync(result.fileno())
    write_sources(read_plan(plan), totals, out)
    os.replace(f"{out}/corpus.jsonl.tmp", f"{out}/corpus.jsonl")


def licence(package, out):
    """The licences that /usr/share/doc/PACKAGE/copyright names: its License: fields, or else well-known names in it."""
    place = Path(out, "unpacked", package, "usr/share/doc", package)
    if place.is_symlink():  # the package shares another's directory
        other = os.path.basename(os.readlink(place))
        return licence(other, out) if Path(out, "unpacked", other).is_dir() else f"see the copyright file of {other}"
    try:
        text = (place / "copyright").read_text(errors="replace")
    except OSError:
        return "no copyright file"
    names = list(dict.fromkeys(name.strip() for name in re.findall(r"^License:[ \t]*(\S.*)$", text, flags=re.M)))
    if not names:
        known = {
            "GPL": r"GNU (?:Library |Lesser )?General Public License|common-licenses/L?GPL",
            "GFDL": r"Free Documentation License",
            "BSD": r"\bBSD\b|Redistribution and use in source",
            "Apache-2.0": r"Apache License",
            "Artistic": r"Artistic",
            "public-domain": r"public domain",
            "CC-BY-SA": r"Attribution-?\s*ShareAlike|CC[- ]BY-SA",
            "MIT": r"\bMIT\b|without restriction",
            "PostgreSQL": r"PostgreSQL License",
            "PSF": r"Python Software Foundation|PSF",
        }
        names = [name for name, pattern in known.items() if re.search(pattern, text, flags=re.I)]
    return "; ".join(names[:8]) + ("; ..." if len(names) > 8 else "") if names else "see its copyright file"


def write_sources(sources, totals, out):
    versions = {source.package: source.version for source in sources}
    rows = sorted(
        ((package, versions[package], licence(package, out), *totals[package]) for package in totals), key=lambda row: -row[3]
    )
    header = ("package", "version", "licence", "documents", "words", "tokens_estimated")
    with open(f"{out}/sources.tsv.tmp", "w", encoding="utf-8") as file:
        for row in (header, *rows):
            file.write("\t".join(map(str, row)) + "\n")
    os.replace(f"{out}/sources.tsv.tmp", f"{out}/sources.tsv")
    print_table(rows)


def print_table(rows):
    documents, tokens = sum(row[3] for row in rows), sum(row[5] for row in rows)
    print(f"{'package':<28} {'documents':>9} {'share':>6} {'tokens':>10}  licence", file=sys.stderr)
    for package, _, terms, count, _, size in rows:
        print(f"{package:<28} {count:>9} {count / documents:>6.1%} {size:>10}  {shortened(terms, 50)}", file=sys.stderr)
    print(f"{'all':<28} {documents:>9} {'':>6} {tokens:>10}  tokens are estimated", file=sys.stderr)


def shortened(text, width):
    return text if len(text) <= width else text[: width - 3] + "..."


def main():
    parser = argparse.ArgumentParser(prog="corpus.py")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("convert")
    for name in ("plan", "unpacked", "documents"):
        one.add_argument(name)
    two = commands.add_parser("choose")
    for name in ("documents_file", "plan", "out"):
        two.add_argument(name)
    two.add_argument("--documents", type=int)
    two.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        if arguments.command == "convert":
            convert(arguments.plan, arguments.unpacked, arguments.documents)
        else:
            choose(arguments.documents_file, arguments.plan, arguments.out, arguments.documents, arguments.seed)
    except (CorpusError, OSError) as error:
        sys.exit(f"corpus.py: error: {error}")


if __name__ == "__main__":
    main()
