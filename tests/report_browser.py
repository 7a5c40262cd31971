"""Opens pages of report.c and charts.c in headless Chromium (WebDriver, standard library alone) and uses them as a reader would.

usage: report_browser.py DIR [SHOTS]      DIR holds KIND.html of every KIND of tests/report_page.c
SHOTS: a directory for screenshots. Called by tests/report_test.sh; the last line is 'N passed, N failed'.
"""

import base64
import json
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

LEFT, RIGHT, HOME, END, TAB, ENTER, ESCAPE, SPACE = "\ue012", "\ue014", "\ue011", "\ue010", "\ue004", "\ue007", "\ue00c", " "
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One ChromeDriver and one session; every method is one WebDriver call."""

    def __init__(self):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.base = f"http://127.0.0.1:{port}"
        for _ in range(100):
            try:
                if self.call("GET", "/status")["ready"]:
                    break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        options = {
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"],
            "perfLoggingPrefs": {"enableNetwork": True, "enablePage": False},
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.base += "/session/" + session["sessionId"]

    def call(self, method, path, body=None):
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()[:500]) from None

    def close(self):
        try:
            self.call("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait()

    def open(self, url):
        self.call("POST", "/url", {"url": "about:blank"})  # so that another #fragment loads anew
        self.call("POST", "/url", {"url": url})

    def js(self, code, *args):
        return self.call("POST", "/execute/sync", {"script": "const $ = id => document.getElementById(id); " + code, "args": args})

    def find(self, selector):
        return self.call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector):
        self.call("POST", f"/element/{self.find(selector)}/click", {})

    def keys(self, *keys):
        """Presses and releases keys wherever the focus is."""
        actions = [{"type": kind, "value": k} for k in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "k", "actions": actions}]})

    def hover(self, selector, nth, across):
        """Moves the pointer over the nth element, `across` (0 to 1) from its left, at half its height."""
        at = self.js("const r = document.querySelectorAll(arguments[0])[arguments[1]]; r.scrollIntoView({block: 'center'}); "
                     "const b = r.getBoundingClientRect(); return [b.left + b.width * arguments[2], b.top + b.height / 2]",
                     selector, nth, across)
        move = [{"type": "pointerMove", "x": round(at[0]), "y": round(at[1]), "duration": 0}]
        self.call("POST", "/actions", {"actions": [{"type": "pointer", "id": "p", "actions": move}]})

    def cdp(self, cmd, **params):
        return self.call("POST", "/goog/cdp/execute", {"cmd": cmd, "params": params})

    def screen(self, width, height, dark=False, scale=1):
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=width < 600)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[feature])

    def log(self, kind):
        return self.call("POST", "/se/log", {"type": kind})

    def shot(self, path):
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))


# Text whose contrast with what is behind it is below 4.5, as [contrast, text, class]. A hatched background is measured
# against each of its colours.
CONTRAST = """
const parse = c => { const v = (c.match(/[\\d.]+/g) || []).map(Number); return v.length < 4 ? [...v, 1] : v; };
const lin = c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
const lum = c => .2126 * lin(c[0]) + .7152 * lin(c[1]) + .0722 * lin(c[2]);
const ratio = (a, b) => { const [x, y] = [lum(a), lum(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
function behind(e) {
  for (; e; e = e.parentElement) {
    const s = getComputedStyle(e);
    if (s.backgroundImage !== 'none') return s.backgroundImage.match(/rgba?\\([^)]*\\)/g).map(parse);
    const c = parse(s.backgroundColor);
    if (c[3] === 1) return [c];
  }
  return [[255, 255, 255]];
}
const bad = [];
let n = 0;
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const e = walk.currentNode.parentElement;
  if (!walk.currentNode.data.trim() || !e.checkVisibility() || ['SCRIPT', 'NOSCRIPT', 'OPTION'].includes(e.tagName)) continue;
  if (e.closest(':disabled')) continue;
  n++;
  const ink = parse(getComputedStyle(e).color);
  const worst = Math.min(...behind(e).map(c => ratio(ink, c)));
  if (worst < 4.5) bad.push([worst.toFixed(2), walk.currentNode.data.slice(0, 20), e.className]);
}
return {n, bad: bad.slice(0, 8)};
"""

passed = failed = 0


def check(claim, good, seen=""):
    global passed, failed
    if good:
        passed += 1
    else:
        failed += 1
        print(f"FAILED: {claim}" + (f": {seen!r}" if seen != "" else ""))


def equal(claim, seen, wanted):
    check(f"{claim} (expected {wanted!r})", seen == wanted, seen)


def selected(b):
    return b.js("return document.querySelector('#tokens [aria-selected=true]').id.slice(1) | 0")


def panel(b):
    return b.js("return $('panel').innerText")


def use(b, url):
    b.screen(1280, 900)
    b.open(url)
    equal("all tokens are there", b.js("return document.querySelectorAll('#tokens [role=option]').length"), 80)
    check("the title is the data's", "lighthouse" in b.call("GET", "/title"))
    equal("first selected: the first that is not early", selected(b), 10)

    # mouse
    b.click("#t41")
    equal("a click selects", selected(b), 41)
    check("the address keeps it", b.call("GET", "/url").endswith("#token=41&layer=10"), b.call("GET", "/url"))
    check("failed and truncated said in words", "Failed" in panel(b) and "length limit" in panel(b), panel(b))
    check("failed is hatched", "gradient" in b.js("return getComputedStyle(t41).backgroundImage"))
    check("its raw text is folded", "<explanation>" not in panel(b))
    b.click("#reading details summary")
    check("its raw text unfolds", "<explanation>" in panel(b))
    check("the other samples are offered", "2 other samples" in panel(b))
    b.click("#t3")
    check("early positions carry a warning", "first ten positions" in panel(b))
    b.click("#t0")
    check("outlier norms carry a warning", "outlier" in panel(b))
    b.click("#t31")
    check("a position without reading says so", "Not read" in panel(b), panel(b))
    b.click("#t20")
    equal("not scored is dashed", b.js("return getComputedStyle(t20).borderBottomStyle"), "dashed")
    check("a missing score is a dash", "FVE\n\u2013" in panel(b), panel(b))
    b.click("#t28")
    check("scores have two and three decimals", b.js(r"return /^0\.\d\d 0\.\d{3} 0\.\d{3} \d+\.\d\d$/.test("
          "[...document.querySelectorAll('.scores dd')].map(e => e.textContent).join(' '))"), panel(b))
    equal("paragraphs are kept", b.js("return document.querySelectorAll('.words')[0].querySelectorAll('p').length"), 3)

    # keyboard
    b.keys(RIGHT)
    equal("right", selected(b), 29)
    b.keys("j")
    equal("j", selected(b), 30)
    b.keys(RIGHT)
    equal("right steps over what was not read", selected(b), 32)
    b.keys(LEFT, "k")
    equal("left and k", selected(b), 29)
    b.keys(HOME)
    equal("home", selected(b), 0)
    b.keys(LEFT)
    equal("left at the first stays", selected(b), 0)
    b.keys(END)
    equal("end", selected(b), 79)
    equal("aria-activedescendant follows", b.js("return $('tokens').getAttribute('aria-activedescendant')"), "t79")
    check("the panel is a live region", b.js("return $('reading').getAttribute('aria-live')") == "polite")

    # layers
    colour = "return getComputedStyle($('t50')).backgroundColor"
    before = b.js(colour)
    b.click("#layers input[value='2']")
    check("another layer, other colours", b.js(colour) != before)
    check("the panel shows that layer", "layer 30" in panel(b), panel(b))
    check("its mean is said", "Layer 30: mean FVE 0.68" in b.js("return $('summary').textContent"))
    b.keys(LEFT)
    check("arrow keys on the switch change the layer, not the token", "layer 20" in panel(b) and selected(b) == 79)
    b.click("#ladder")
    equal("all layers: one under the other", b.js("return document.querySelectorAll('.reading h3').length"), 3)
    check("the address keeps that", "&ladder=1" in b.call("GET", "/url"))
    b.click("#ladder")

    # search
    b.keys(HOME, "/")
    equal("/ goes to the search", b.js("return document.activeElement.id"), "query")
    b.keys(*"FOUND")
    equal("typing n or j there is typing", b.js("return $('query').value"), "FOUND")
    hits = b.js("return [...document.querySelectorAll('#tokens .hit')].map(e => +e.id.slice(1))")
    check("search marks the tokens whose explanation matches", hits == [45, 46, 47], hits)
    equal("and counts them", b.js("return $('count').textContent"), "3 matches")
    b.keys(ENTER)
    equal("enter goes to the first", selected(b), 45)
    check("the words found are marked", b.js("return document.querySelector('mark').textContent") == "found")
    b.click("#t46")
    b.keys("n")
    equal("n: the next", selected(b), 47)
    b.keys("n")
    equal("n at the last: the first", selected(b), 45)
    b.keys("N")
    equal("N at the first: the last", selected(b), 47)
    equal("where among them", b.js("return $('count').textContent"), "3 of 3")
    contrast(b, "searching, light")
    b.keys(ESCAPE)
    equal("escape ends the search", b.js("return document.querySelectorAll('.hit, mark').length"), 0)

    # table
    b.click("#table")
    rows = "return [...document.querySelectorAll('#rows tbody tr')].filter(e => e.checkVisibility()).length"
    equal("the table has a row for every reading", b.js(rows), 78)
    equal("its columns are headed", b.js("return [...document.querySelectorAll('#rows thead th[scope=col]')].map("
                                         "e => e.textContent).join()"), "Token,Position,Layer,FVE,Cosine,Explanation")
    check("the tokens have made way", not b.js("return $('tokens').checkVisibility()"))
    b.click("#rows tr[data-token='5'] button")
    equal("a row selects", b.js("return document.querySelector('tr[aria-current]').dataset.token"), "5")
    b.click("#query")
    b.keys(*"found")
    equal("search filters the rows", b.js(rows), 3)
    b.keys(ESCAPE)
    b.click("#ladder")
    equal("all layers in the table", b.js(rows), 3 * 78)
    b.click("#ladder")
    contrast(b, "table, light")
    b.click("#table")

    # by keyboard alone: everything that can be used can be reached and shows the focus
    b.open(url)
    seen = []
    for _ in range(14):
        b.keys(TAB)
        seen.append(b.js("const e = document.activeElement; return e.id || e.name || e.tagName.toLowerCase()"))
    wanted = ["layer", "ladder", "table", "query", "tokens", "panel", "left", "right", "summary"]
    equal("the focus goes through the page in reading order", [x for x in seen if x in wanted][:9], wanted)
    b.js("$('ladder').focus()")
    b.keys(SPACE)
    check("space works a button", b.js("return document.querySelectorAll('.reading h3').length") == 3)

    b.open(url + "#token=52&layer=30")
    check("an address opens its place", selected(b) == 52 and "layer 30" in panel(b), panel(b))
    b.open(url + "#token=99999999&layer=%3Cb%3E")
    equal("a wrong address opens the first place", selected(b), 10)


def contrast(b, what):
    result = b.js(CONTRAST)
    check(f"contrast of all text is 4.5 or more: {what}", result["n"] > 50 and not result["bad"], result)


def fits(b, what):
    wide = b.js("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    equal(f"no horizontal scroll: {what}", wide, 0)


def looks(b, folder):
    for name in ("sample", "hostile", "bare"):
        for width in (360, 768, 1280):
            for dark in (False, True):
                b.screen(width, 800, dark)
                b.open(f"{folder}/{name}.html#token=41")
                what = f"{name}, {width} px, {'dark' if dark else 'light'}"
                fits(b, what)
                contrast(b, what)
                if name != "bare" and not dark:
                    b.open(f"{folder}/{name}.html#token=36&layer=20&ladder=1&table=1")
                    fits(b, what + ", table")
    b.screen(360, 740)
    b.open(f"{folder}/sample.html")
    b.keys(END)
    check("on a phone the selected token stays above the panel", b.js(
        "return $('t79').getBoundingClientRect().bottom <= "
        "$('panel').getBoundingClientRect().top"))
    b.open(f"{folder}/bare.html")
    check("without an AR the page says so", "Not scored" in b.js("return $('about').innerText"))
    check("without an AR there is no scale, with one layer no switch",
          b.js("return $('scale').hidden && $('layers').hidden"))


def hostile(b, url):
    b.screen(1280, 900)
    b.open(url)
    for i in range(32, 48):
        b.js("$(arguments[0]).click()", f"t{i}")
    b.click("#ladder")
    b.click("#table")
    b.click("#query")
    b.keys(*"<script>")
    check("hostile text is text", "</script><script>window.ran" in b.js("return $('rows').innerText"))
    equal("hostile text did not run", b.js("return typeof window.ran"), "undefined")
    equal("it made no elements", b.js("return document.querySelectorAll('img, script:not(#data)').length"), 1)
    check("direction characters are spelt out", "U+202E" in b.js("return $('t37').textContent"))
    equal("the title is text", b.js("return $('title').children.length"), 0)
    blocked = b.js("try { document.body.innerHTML = '<b>x</b>'; return false; } catch (e) { return e.name; }")
    equal("markup from strings is refused by the page's policy", blocked, "TypeError")


def large(b, url):
    b.screen(1280, 900)
    start = time.monotonic()
    b.open(url)
    loaded = time.monotonic() - start
    check("2,000 tokens at three layers open within 3 s", loaded < 3, loaded)
    timed = """const start = performance.now(); %s; document.body.offsetHeight; return (performance.now() - start)"""
    click = "document.querySelector('%s').click()"
    for what, code, limit in (
        ("layer switch", click % "#layers input[value=\"2\"]", 300),
        ("selection", click % "#t1500", 150),
        ("search", "const q = $('query'); q.value = 'lamp'; q.dispatchEvent(new Event('input'))", 400),
        ("table", click % "#table", 1500),
    ):
        took = b.js(timed % code)
        print(f"2,000 tokens, {what}: {took:.0f} ms")
        check(f"2,000 tokens: {what} within {limit} ms", took < limit, took)


# Of every chart: its title, and of each series how many points its line has, how many marks and intervals.
CHARTS = """
const n = (e, s) => e ? e.getAttribute('d').split(s).length - 1 : 0;
return Object.fromEntries([...document.querySelectorAll('figure')].map(f => [f.querySelector('figcaption').textContent,
  [...f.querySelectorAll('.series')].map(g => [n(g.querySelector('.line'), ','), g.querySelectorAll('.mark').length,
    n(g.querySelector('.range'), 'M'), g.querySelectorAll('.band').length])]));
"""


def readout(b, title):
    return b.js("return [...document.querySelectorAll('figure')].find(f => f.querySelector('figcaption').textContent === "
                "arguments[0]).querySelector('.readout').innerText.replace(/\\s+/g, ' ')", title)


def reads_charts(b):
    """What holds for every chart: a slider with a name, a text alternative and a value in words."""
    return b.js("""return [...document.querySelectorAll('.plot')].filter(p => p.getAttribute('role') !== 'slider' || p.tabIndex !== 0 ||
      !p.getAttribute('aria-label') || !p.getAttribute('aria-valuetext') ||
      !$(p.getAttribute('aria-describedby')).textContent || /NaN|undefined|Infinity/.test(p.parentElement.outerHTML)).length""")


def evaluation(b, url):
    b.screen(1280, 900)
    b.open(url)
    equal("the evaluation has its charts, series and points", b.js(CHARTS), {
        "FVE of every condition": [[0, 1, 1, 0], [0, 11, 11, 0]],
        "Share of rows at or below an FVE": [[201, 0, 0, 0]] * 4,
        "FVE against token position": [[10, 10, 10, 0]] * 2,
        "FVE against explanation length": [[10, 10, 10, 0]] * 2})
    equal("every chart can be read without seeing it", reads_charts(b), 0)
    check("the headline is the AV's own FVE with its interval", "0.520\n95%: 0.498 to 0.540" in b.js("return $('headline').innerText"))
    counts = b.js("return [...document.querySelectorAll('.plot')].map(p => [...p.querySelectorAll('text')].map(t => "
                  "t.textContent).filter(t => /^n /.test(t)).map(t => +t.slice(2)).reduce((a, b) => a + b, 0))")
    equal("the bins hold every row once", counts, [0, 0, 400, 400])
    dots = "FVE of every condition"
    check("the readout starts with the AV's own", readout(b, dots).strip().startswith("explained 0.520 (0.498 to 0.540)"), readout(b, dots))
    b.js("document.querySelector('.plot').focus()")
    b.keys(RIGHT)
    check("right: the next condition", "permuted-v 0.030" in readout(b, dots), readout(b, dots))
    b.keys(END)
    check("end: the last", "nearest 0.310" in readout(b, dots), readout(b, dots))
    b.keys(RIGHT)
    equal("right at the last stays", b.js("return document.querySelector('.plot').getAttribute('aria-valuenow')"), "11")
    check("the value is said in words", b.js("return document.querySelector('.plot').getAttribute('aria-valuetext')").startswith(
        "nearest; 0.310 (0.288 to 0.330)"))
    b.keys(HOME)
    check("home: the first", "explained 0.520" in readout(b, dots), readout(b, dots))
    equal("the focus is seen", b.js("return getComputedStyle(document.activeElement).outlineStyle"), "solid")
    b.keys(TAB)
    b.keys(END)
    check("the distribution ends at 1", "explained 1.00 permuted-v 1.00 prefix 1.00 nearest 1.00" in
          readout(b, "Share of rows at or below an FVE"), readout(b, "Share of rows at or below an FVE"))
    position = "FVE against token position"
    before = readout(b, position)
    b.hover(".plot", 2, .95)
    check("the pointer reads too", "position 738 to 945, 38 rows" in readout(b, position), readout(b, position))
    b.hover("h1", 0, .5)
    equal("without it the first place is read again", readout(b, position), before)
    equal("the table has every condition", b.js("return document.querySelectorAll('#table tbody tr').length"), 12)
    equal("ten explanations, the one that failed said to have", b.js("return ['.sample .words', '.sample .prefix', '.sample .warning'].map(s => "
          "document.querySelectorAll(s).length).join()"), "9,10,1")
    equal("and heads its columns", b.js("return [...document.querySelectorAll('#table thead th[scope=col]')].map(e => "
          "e.textContent).join()"), "Condition,FVE,low,high,of mean,mse_nrm,cosine,centred,The AR reads")
    equal("series are told apart by dashes too", b.js("return new Set([...document.querySelectorAll('figure')[1].querySelectorAll("
          "'.series .line')].map(e => getComputedStyle(e).strokeDasharray)).size"), 4)
    b.open(url.replace("eval", "eval_bare"))
    check("two rows, no positions: the charts that can be drawn", "FVE against token position" not in b.js(CHARTS) and
          b.js(CHARTS)["FVE against explanation length"] == [[1, 1, 1, 0]] * 2, b.js(CHARTS))
    check("no explanations, no list of them", b.js("return $('samples').hidden"))
    equal("bare, every chart can be read", reads_charts(b), 0)


def training(b, url):
    b.screen(1280, 900)
    b.open(url)
    seen = b.js(CHARTS)
    titles = b.js("return [...document.querySelectorAll('figcaption')].map(e => e.textContent)")
    equal("one chart for every figure, known ones first", titles, ["Loss", "FVE", "Reward", "KL to the starting AV",
          "Tokens of an explanation", "Failed", "Skipped updates", "Gradient norm", "Learning rate", "Tokens per second", "Group std"])
    train = [[1000, 0, 0, 0]] * 2
    equal("loss: steps, their mean, held-out, permuted", seen["Loss"], [*train, [11, 11, 0, 0], [11, 11, 0, 0]])
    equal("FVE: the same, with a band", seen["FVE"], [*train, [11, 11, 0, 1], [11, 11, 0, 0]])
    equal("what has no held-out value has none", seen["Reward"], [[999, 0, 0, 0]] * 2)  # step 400's later line has no reward
    equal("what does not jump is drawn as it is", [seen["Learning rate"], seen["Skipped updates"]], [[[999, 0, 0, 0]]] * 2)
    equal("every chart can be read without seeing it", reads_charts(b), 0)
    check("steps that leave the picture are owned up to", b.js("return [...document.querySelectorAll('figure')].filter(f => "
          "f.innerText.includes('outside the picture')).map(f => f.querySelector('figcaption').textContent).join()") == "Gradient norm")
    check("the last values stand there at once", "step 1,000" in readout(b, "FVE") and
          "held-out 0.57 (0.54 to 0.6)" in readout(b, "FVE"), readout(b, "FVE"))
    b.js("document.querySelectorAll('.plot')[1].focus()")
    b.keys(LEFT)
    check("one step back, the evaluation before it", "step 999" in readout(b, "FVE") and "at 900" in readout(b, "FVE"),
          readout(b, "FVE"))
    check("a step that was written twice has its later value", b.js("return data.steps.find(s => s.step === 400).loss") == 2)
    check("a line cut short is left out", b.js("return data.steps.at(-1).step") == 1000)

    # the samples
    words = "return [...document.querySelectorAll('.sample')].map(e => e.innerText)"
    equal("every row's sample is there", len(b.js(words)), 4)
    equal("the last evaluation first", b.js("return $('place').textContent"), "evaluation 11 of 11")
    late = b.js(words)
    b.keys("k")
    equal("k: the one before", b.js("return $('place').textContent"), "evaluation 10 of 11")
    check("the address keeps it", b.call("GET", "/url").endswith("#step=900"), b.call("GET", "/url"))
    b.keys("j", "j")
    equal("j at the last stays", b.js("return $('place').textContent"), "evaluation 11 of 11")
    check("the change of FVE is said", "FVE 0.542 (+0.088)" in late[0], late[0])
    for _ in range(10):
        b.click("#before")
    early = b.js(words)
    check("the same rows, other words", [t.split()[1] for t in early] == [t.split()[1] for t in late] and early != late)
    check("a failed explanation says so", "Failed" in early[2], early[2])
    check("at the first there is nothing before", b.js("return $('before').disabled && $('changes').disabled"))
    for _ in range(3):
        b.click("#after")
    b.keys("c")
    check("c marks what changed", b.js("return [...document.querySelectorAll('mark')].length") > 0)
    marked = [t.split() for t in b.js(words)]
    b.click("#changes")
    equal("nothing is lost by marking", marked, [t.split() for t in b.js(words)])
    b.js("const s = $('step'); s.value = 5; s.dispatchEvent(new Event('change'))")
    equal("the list of evaluations goes there", b.js("return $('place').textContent"), "evaluation 6 of 11")
    b.open(url + "#step=300&changes=1")
    check("an address opens its place", b.js("return $('place').textContent") == "evaluation 4 of 11" and
          b.js("return $('changes').getAttribute('aria-pressed')") == "true")
    b.open(url.replace("run.html", "run_bare.html"))
    check("two steps and no evaluation make a page", b.js(CHARTS)["Loss"] == [[2, 0, 0, 0]] and
          b.js("return $('samples').hidden"), b.js(CHARTS))
    equal("bare, every chart can be read", reads_charts(b), 0)
    start = time.monotonic()
    b.open(url.replace("run.html", "run_large.html"))
    took = time.monotonic() - start
    print(f"20,000 steps: {took:.1f} s")
    check("20,000 steps open within 5 s", took < 5, took)
    check("and are drawn as what can be seen", max(c[0][0] for c in b.js(CHARTS).values()) < 1000, b.js(CHARTS))


def looks_charts(b, folder):
    for name in ("eval", "eval_hostile", "run", "run_hostile"):
        for width in (390, 1280):
            for dark in (False, True):
                b.screen(width, 900, dark)
                b.open(f"{folder}/{name}.html")
                what = f"{name}, {width} px, {'dark' if dark else 'light'}"
                fits(b, what)
                contrast(b, what)
                check(f"charts keep inside the page: {what}", b.js(
                    "return [...document.querySelectorAll('.plot')].every(p => { const r = p.getBoundingClientRect(); "
                    "return r.width > 250 && r.left >= 0 && r.right <= document.documentElement.clientWidth; })"))
    b.screen(1280, 900)
    b.open(f"{folder}/run.html")
    b.screen(500, 900)
    b.js("window.dispatchEvent(new Event('resize'))")
    check("charts follow the width of the window", b.js("return document.querySelector('.plot').viewBox.baseVal.width") < 500)
    for name in ("eval_hostile", "run_hostile"):
        b.screen(1280, 900)
        b.open(f"{folder}/{name}.html")
        b.js("for (const p of document.querySelectorAll('.plot')) for (let i = 0; i < 12; i++) "
             "p.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))")
        if name == "run_hostile":
            b.keys("c", "k", "k", "j")
        check(f"{name}: text is text", "</script><script>window.ran" in b.js("return document.body.innerText"))
        equal(f"{name}: it did not run", b.js("return typeof window.ran"), "undefined")
        equal(f"{name}: it made no elements", b.js("return document.querySelectorAll('img, script:not(#data)').length"), 1)
        equal(f"{name}: numbers out of bounds draw nothing odd", reads_charts(b), 0)
        blocked = b.js("try { document.body.innerHTML = '<b>x</b>'; return false; } catch (e) { return e.name; }")
        equal(f"{name}: markup from strings is refused", blocked, "TypeError")


def shots(b, folder, into):
    """Pictures to look at while changing the page."""
    for name, width, height, dark, where in (
        ("light", 1120, 740, False, "#token=47&layer=30"), ("dark", 1120, 740, True, "#token=5&layer=20"),
        ("phone", 360, 740, False, ""), ("phone-dark", 360, 740, True, "#token=41&layer=10"),
        ("ladder", 1280, 860, False, "#token=47&ladder=1"), ("table", 1280, 860, True, "#token=3&layer=30&table=1"),
    ):  # fmt: skip
        b.screen(width, height, dark)
        b.open(f"{folder}/sample.html{where}")
        b.shot(into / f"{name}.png")
    for name in ("eval", "run"):
        for width in (1280, 390):
            for dark in (False, True):
                b.screen(width, 900, dark)
                b.open(f"{folder}/{name}.html")
                b.screen(width, min(6000, b.js("return document.documentElement.scrollHeight")), dark)
                b.shot(into / f"{name}-{width}-{'dark' if dark else 'light'}.png")


def main():
    folder = pathlib.Path(sys.argv[1]).resolve()
    b = Browser()
    try:
        pages = folder.as_uri()
        if len(sys.argv) > 2:
            shots(b, pages, pathlib.Path(sys.argv[2]))
        else:
            use(b, pages + "/sample.html")
            looks(b, pages)
            noise = [m["message"] for m in b.log("browser") if m["level"] in ("SEVERE", "WARNING")]
            equal("nothing on the console", noise, [])
            large(b, pages + "/large.html")
            hostile(b, pages + "/hostile.html")
            b.log("browser")  # what that page was refused
            evaluation(b, pages + "/eval.html")
            training(b, pages + "/run.html")
            looks_charts(b, pages)
            noise = [m["message"] for m in b.log("browser") if m["level"] in ("SEVERE", "WARNING")]
            refused = [m for m in noise if "TrustedHTML" in m or "trusted" in m.lower()]
            equal("nothing on the console but the markup that was refused", [m for m in noise if m not in refused], [])
            events = [json.loads(m["message"])["message"] for m in b.log("performance")]
            asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
            other = {u for u in asked if not u.startswith((pages, "data:,"))}
            check("the browser asked for the pages alone", pages + "/sample.html" in asked and not other, sorted(other))
    except RuntimeError as error:  # of WebDriver: the page lacks what was to be used
        check("the page can be used to the end", False, str(error))
    finally:
        b.close()
    print(f"{passed} passed, {failed} failed")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
