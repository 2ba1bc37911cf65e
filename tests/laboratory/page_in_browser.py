#!/usr/bin/env python3
"""Opens the page of `make page` in a real browser, moves everything that can be moved, and compares
what is shown with the tables. It needs chromium and chromedriver (Debian: apt-get install chromium
chromium-driver), so it is no part of `make test`.

    make page && python3 tests/laboratory/page_in_browser.py
    make page && python3 tests/laboratory/page_in_browser.py pictures     makes the two of the README anew

chromedriver is a small server on this machine, which is asked over HTTP to press keys and to run
scripts in the page (https://www.w3.org/TR/webdriver2).
"""

import base64
import contextlib
import csv
import glob
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(os.path.dirname(HERE))
TABLES = os.path.join(TOP, "lab")
PAGE = os.path.join(TOP, "lab.html")
NAMES = "trip", "explore", "probe", "shower", "words", "losses"
RIGHT, HOME = "\ue014", "\ue011"        # how the protocol spells these keys
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"     # and what it calls an element
SWITCHES = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
            "disable-background-networking", "disable-component-update", "disable-sync",
            "hide-scrollbars", "window-size=1200,1000"]


class Browser:
    """A browser without a window. A new one has a new, empty folder for all it remembers."""

    def __init__(self, folder):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL, universal_newlines=True)
        for line in self.driver.stdout:
            if "started successfully on port" in line:
                port = line.split()[-1].rstrip(".")
                break
        else:
            raise SystemExit("chromedriver did not start")
        # whatever proxy this machine has is not for this machine itself
        self.http = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.url = "http://127.0.0.1:%s/session" % port
        options = {"args": ["--" + switch for switch in SWITCHES] + ["--user-data-dir=" + folder]}
        answer = self.ask("", capabilities={"alwaysMatch": {
            "browserName": "chrome", "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"}}})
        self.url += "/" + answer["sessionId"]

    def ask(self, what, **values):
        request = urllib.request.Request(self.url + what, json.dumps(values).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with self.http.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            why = json.load(error)["value"]["message"]
            raise SystemExit("page_in_browser: %s: %s" % (what, why.split("\n")[0]))

    def close(self):
        with contextlib.suppress(OSError):
            self.http.open(urllib.request.Request(self.url, method="DELETE"), timeout=60)
        self.driver.terminate()
        self.driver.wait()
        self.driver.stdout.close()

    def open(self, path):
        self.ask("/url", url="file://" + os.path.abspath(path))

    def run(self, script, *arguments):
        """What a script in the page returns."""
        return self.ask("/execute/sync", script=script, args=arguments)

    def element(self, selector):
        return self.ask("/element", using="css selector", value=selector)[ELEMENT]

    def press(self, selector, keys):
        """Keys on the keyboard, when this element has the focus."""
        self.ask("/element/%s/value" % self.element(selector), text=keys)

    def click(self, selector):
        self.ask("/element/%s/click" % self.element(selector))

    def stops(self, selector):
        """Moves a slider by the keyboard, from its first stop to its last; yields their numbers."""
        count = int(self.run("return document.querySelector(arguments[0]).max", selector)) + 1
        for i in range(count):
            self.press(selector, RIGHT if i else HOME)
            here = self.run("return document.querySelector(arguments[0]).value", selector)
            equal(here, str(i), selector)
            yield i

    def media(self, width, height, **features):
        """A screen of this size, on which one pixel is one dot, and what its user prefers."""
        def command(name, **parameters):
            self.ask("/goog/cdp/execute", cmd="Emulation." + name, params=parameters)
        command("setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                mobile=False)
        command("setEmulatedMedia", media="", features=[
            {"name": "prefers-" + name.replace("_", "-"), "value": value}
            for name, value in features.items()])

    def picture(self, selector, path):
        """A picture of one element, as PNG."""
        url = self.url + "/element/%s/screenshot" % self.element(selector)
        with self.http.open(url, timeout=60) as answer, open(path, "wb") as stream:
            stream.write(base64.b64decode(json.load(answer)["value"]))


n_compared = 0


def equal(got, want, where):
    global n_compared
    n_compared += 1
    if got != want:
        raise SystemExit("page_in_browser: %s: the page has %r, the table %r" % (where, got, want))


def table(name):
    path = os.path.join(TABLES, name)
    with open(path, newline="", encoding="utf-8", errors="replace") as stream:
        return list(csv.DictReader(stream))


def shown(text):
    """Text as the page shows it: control characters have signs of their own."""
    return "".join(chr(0x2421) if sign == "\x7f" else
                   chr(0x2400 + ord(sign)) if sign < " " and sign != "\n" else sign
                   for sign in text)


# ---- the sections

def slider(section, name):
    return '.%s [data-control="%s"] input' % (section, name)


def button(section, name, i):
    return '.%s [data-control="%s"] label:nth-of-type(%d) input' % (section, name, i + 1)


def row(section, table, i):
    return ".%s .%s tbody tr:nth-child(%d) th" % (section, table, i + 1)


def answer(browser, section):
    return browser.run("return document.querySelector(arguments[0]).textContent",
                       ".%s .answer" % section)


def whole_percent(share):
    """As the page rounds it."""
    return "%d %%" % math.floor(100 * share + .5)


def check_trip(browser):
    """Every kind, angle and place: shades and what is left of each row's own peak, the curve of
    distances, the dosed cells, and the next tokens."""
    distance, tokens = {}, {}
    for line in table("trip.csv"):
        key = line["kind"], int(line["place"]), float(line["theta"])
        if line["level"]:
            distance.setdefault(key, []).append(float(line["distance"]))
        else:
            one = [line["token"], float(line["sober"]), float(line["drugged"])]
            tokens.setdefault(key, []).append(one)
    thetas = sorted({theta for _, _, theta in distance})
    n = 1 + max(place for _, place, _ in distance)
    for number, kind in enumerate(["window", "stack"]):
        browser.click(button("trip", "kind", number))
        for i in browser.stops(slider("trip", "theta")):
            check_stairs(browser, kind, [distance[kind, place, thetas[i]] for place in range(n)])
            for place in range(n):
                key = kind, place, thetas[i]
                browser.run("document.querySelector(arguments[0]).click()",
                            row("trip", "stairs", place))
                points, bars = browser.run("""
                    return [[...document.querySelectorAll(".trip .point")].map(
                                point => Number(point.dataset.value)),
                            [...document.querySelectorAll(".next tbody tr")].map(one =>
                                [...one.children].slice(0, 3).map(cell =>
                                cell.dataset.value ? Number(cell.dataset.value)
                                                   : cell.textContent.replace(/␣/g, " ")))];""")
                equal(points, distance.pop(key), key)
                equal(bars, tokens.pop(key), key)
    equal((distance, tokens), ({}, {}), "all of the trip")
    check_keys(browser)


def check_stairs(browser, kind, distances):
    """A row for each place: the square root of a share of its own peak, and what is left of that."""
    rows = browser.run("""
        return [...document.querySelectorAll(".stairs tbody tr")].map(row =>
            [[...row.querySelectorAll(".cell")].map(cell =>
                [Number(cell.style.getPropertyValue("--shade")), cell.classList.contains("dosed")]),
             row.lastChild.textContent]);""")
    equal(len(rows), len(distances), "rows")
    for place, ((cells, left), want) in enumerate(zip(rows, distances)):
        peak = max(want)
        equal(left, whole_percent(want[-1] / peak) if peak else "–", ("left", kind, place))
        for level, ((shade, dosed), x) in enumerate(zip(cells, want)):
            equal(abs(shade - (x / peak if peak else 0) ** .5) < .0006, True, (kind, place, level))
            layer = level - 1
            equal(dosed, 0 <= layer <= place if kind == "stack" else
                  layer >= 0 and abs(layer - place) <= 1, ("dosed", kind, place, level))
    if max(distances[0]):
        ends = [whole_percent(want[-1] / max(want)) for want in (distances[0], distances[-1])]
        said = answer(browser, "trip")
        equal([end in said for end in ends], [True, True], said)


def check_keys(browser):
    """A cell can be reached and read without a pointer, and so can a row be chosen."""
    browser.press(".stairs .cell[tabindex='0']", RIGHT)
    read = browser.run("return document.querySelector('.status').textContent")
    equal("level 1: " in read, True, read)
    browser.press(".stairs tbody tr:nth-child(1) input", "\ue015")       # arrow down
    equal(browser.run("return document.querySelector('.stairs .chosen th').textContent"), "1",
          "the row below")


def words_after(text, base):
    """The words of a text from the first on that is not the one of base."""
    words, others = text.split(), base.split()
    first = len(os.path.commonprefix([words, others]))
    return words[first:]


def longest(a, b):
    """How many words the longest list has that is in a and in b, in this order."""
    row = [0] * (len(b) + 1)
    for one in a:
        corner = 0                      # what stood above and to the left
        for j, other in enumerate(b):
            above = row[j + 1]
            row[j + 1] = corner + 1 if one == other else max(above, row[j])
            corner = above
    return row[-1]


LADDER = """
    return [...document.querySelectorAll(arguments[0] + " .ladder tbody tr")].map(row => {
        const cell = row.lastChild.cloneNode(true);
        const all = cell.textContent;
        cell.querySelectorAll("ins").forEach(word => word.remove());
        return [row.firstChild.textContent, row.children[1].textContent, cell.dataset.text || "",
                all, cell.textContent];
    });"""


def check_ladder(shown, text, base, ended, where):
    """A text stands there from its first word that differs; an early end is said. Words that are not
    marked are in the text it is compared with, in the same order, and as many as can be."""
    whole, visible, kept = shown
    equal(whole, text, where)
    if text == base:
        equal(visible, "the same", where)
        return
    equal(visible.endswith("† it ended here"), ended, where)
    def words_of(text):
        return [word for word in text.replace("† it ended here", "").split() if word != "…"]
    equal(words_of(visible), words_after(text, base), where)
    left = iter(words_after(base, text))
    equal(all(word in left for word in words_of(kept)), True, where)
    equal(len(words_of(kept)), longest(words_after(text, base), words_after(base, text)), where)


def check_explore(browser):
    """Every method, strength and seed: what differs from the sober text is counted from the texts
    themselves, and each of them is shown from there on."""
    rows = table("explore.csv")
    sober = [line["text"] for line in rows if line["method"] == "sober"]
    equal(len(set(sober)), 1, "one sober text")
    cells = {}
    for line in rows:
        if line["method"] != "sober":
            cells.setdefault(line["method"], {}).setdefault(line["strength"], []).append(line)
    gains = {}
    for i, (method, strengths) in enumerate(cells.items()):
        browser.click(button("explore", "method", i))
        lines = list(strengths.values())
        gains[method] = float(lines[0][0]["gain"])
        for k in browser.stops(slider("explore", "seed")):
            shown = browser.run(LADDER, ".explore")
            equal(len(shown), len(lines), method)
            for (name, differ, *rest), texts in zip(shown, lines):
                where = "%s %s, seed %s" % (method, name, texts[k]["seed"])
                n = sum(one["text"] != sober[0] for one in texts)
                equal(differ, "%d of %d" % (n, len(sober)), where)
                ended = [one["ended"] == "1" for one in texts]
                equal(name, texts[0]["strength"] + ("†" if any(ended) else ""), where)
                check_ladder(rest, texts[k]["text"], sober[0], ended[k], where)
        for j, texts in enumerate(lines):
            browser.run("document.querySelector(arguments[0]).click()", row("explore", "ladder", j))
            n = sum(one["text"] != sober[0] for one in texts)
            said = answer(browser, "explore")
            equal("%s %s: %d of %d texts differ" % (method, texts[0]["strength"], n, len(sober))
                  in said, True, said)
    marks, table_of_gains = browser.run("""
        return [document.querySelectorAll(".curves .hit").length,
                [...document.querySelectorAll(".gains tbody tr")].map(row =>
                    [row.firstChild.textContent, Number(row.lastChild.dataset.value)])];""")
    equal(marks, sum(map(len, cells.values())), "marks that can be picked")
    equal(table_of_gains, [[name, gain] for name, gain in gains.items() if not math.isnan(gain)],
          "gains")


def check_probe(browser):
    """Every token and its shade; and in the table what the twins said that would have written
    something else."""
    tokens = {}
    for line in table("probe.csv"):
        tokens.setdefault(line["position"], []).append(line)
    spans, doubts = browser.run("""
        return [[...document.querySelectorAll(".tokens span")].map(
                    span => [span.textContent, Number(span.style.getPropertyValue("--doubt"))]),
                [...document.querySelectorAll(".doubts tbody tr")].map(row =>
                    [...row.children].map(cell => cell.textContent))];""")
    equal(len(spans), len(tokens), "tokens")
    want = []
    for (text, doubt), lines in zip(spans, tokens.values()):
        token, agreement = lines[0]["token"], float(lines[0]["agreement"])
        equal(text, shown(token.replace("\\n", "\n")), token)
        equal(abs(1 - doubt - agreement) < 1e-12, True, token)
        named = [(one["said"].replace(" ", "␣"), float(one["share"])) for one in lines
                 if one["said"] != token]
        equal(abs(agreement + sum(share for _, share in named) - 1) < 1e-6, True, token)
        if agreement < 1:
            want.append((lines[0]["position"], ", ".join("%s %s" % (word, whole_percent(share))
                                                         for word, share in named)))
    equal([(cells[1], cells[-1]) for cells in doubts], want, "what others said")
    firm = "%d of %d tokens" % (len(tokens) - len(want), len(tokens))
    equal(firm in answer(browser, "probe"), True, firm)


def check_shower(browser):
    """The curve and its error bars, a dot for each seed, the gains, and the texts of one seed."""
    cells = {}
    for line in table("shower.csv"):
        cells.setdefault(line["every"], []).append(line)
    points, bars, n_dots = browser.run("""
        const numbers = text => text.match(/-?[\\d.]+/g).map(Number);
        const shown = [...document.querySelectorAll(".shower .point")];
        return [shown.map(({dataset}) => [Number(dataset.value), Number(dataset.error)]),
                shown.map(point => {
                    const bar = numbers(point.previousSibling.getAttribute("d"));
                    return [numbers(point.getAttribute("transform"))[1], bar[1], bar[5]];
                }),
                document.querySelectorAll(".shower .seed").length];""")
    equal(points, [[float(lines[0]["mean"]), float(lines[0]["error"])] for lines in cells.values()],
          "means and errors")
    equal(n_dots, sum(map(len, cells.values())), "dots")
    scale = (bars[-1][0] - bars[0][0]) / (points[0][0] - points[-1][0])     # dots for a nat
    for (_, error), (middle, low, high) in zip(points, bars):
        equal([abs(low - middle - scale * error) < .1, abs(middle - high - scale * error) < .1],
              [True, True], ("error bar", error, middle, low, high))
    ladder = browser.run(LADDER, ".shower")
    base = None
    for (name, cost, *rest), (every, lines) in zip(ladder, cells.items()):
        costs = [float(line["cost"]) for line in lines]
        equal(abs(sum(costs) / len(costs) - float(lines[0]["mean"])) < 1e-6, True, name)
        one, = (line for line in lines if line["typical"] == "1")
        equal((name, cost), ("every " + every if every != "0" else "never",
                             "%.2f" % float(one["cost"])), name)
        if base is None:
            base = one["text"]
            equal(rest[1].replace(" † it ended here", ""), base, name)
        else:
            check_ladder(rest, one["text"], base, one["ended"] == "1", name)
            gain = "%.2f ± %.2f, in %s of %d seeds" % (
                float(lines[0]["gain"]), float(lines[0]["gain error"]), lines[0]["better"], len(lines))
            equal(gain in answer(browser, "shower"), True, gain)


def check_step(browser):
    """Every step size: its text, which words are marked as the lesson's, and its losses. The page
    opens where lesson, sequel and other text are best together."""
    with open(os.path.join(TABLES, "words.csv"), newline="", encoding="utf-8") as stream:
        names, *words = csv.reader(stream)
    losses = table("losses.csv")
    columns = [[line[i] for line in words if line[i]] for i in range(len(names))]
    *texts, lesson, sequel, _ = columns
    rows = browser.run("""
        return [...document.querySelectorAll(".step .ladder tbody tr")].map(row => {
            const text = row.lastChild.cloneNode(true);
            text.querySelector("small").remove();
            return [row.firstChild.textContent, text.textContent,
                    ["lesson", "sequel"].map(kind =>
                        [...text.querySelectorAll("." + kind)].map(word => word.textContent)),
                    [...row.querySelectorAll(".loss")].map(loss => loss.dataset.value)];
        });""")
    equal([one[0] for one in rows], names[:-3], "step sizes")
    for (name, text, (from_lesson, from_sequel), numbers), words_here, line in zip(rows, texts, losses):
        equal(text.split(), shown(" ".join(words_here)).split(), name)
        equal([float(x) for x in numbers], [float(x) for x in list(line.values())[1:]], name)
        equal(set(from_lesson) <= set(lesson) and set(from_sequel) <= set(sequel), True, name)
        if words_here[:len(lesson)] == lesson:      # learned: then all of it is marked, in order
            equal(from_lesson[:len(lesson)], lesson, name)
    total = [sum(float(line[name]) for name in ("lesson", "its sequel", "other text"))
             for line in losses]
    best = losses[total.index(min(total))]["step size"]
    equal(browser.run("return document.querySelector('.step .chosen th').textContent"), best, "opens")
    for i, line in enumerate(losses):
        browser.run("document.querySelector(arguments[0]).click()", row("step", "ladder", i))
        equal("a step of %s " % line["step size"] in answer(browser, "step"), True, line)


def check_readme():
    """The README's gains over temperature and its table of showers are those of these tables. (Of
    another model they are not.)"""
    with open(os.path.join(TOP, "README.md"), encoding="utf-8") as stream:
        text = stream.read()
    gains = {line["method"]: float(line["gain"]) for line in table("explore.csv")}
    rows = re.findall(r"^\| (noise on the logits|[HQKVA]) \| ([-+]\.\d\d) \|", text, re.M)
    equal(len(rows), 6, "gains in the README")
    for name, gain in rows:
        want = "%+.2f" % gains["logit noise" if " " in name else name]
        equal(gain, want.replace("0.", "."), "the README's gain of " + name)
    with open(os.path.join(TABLES, "shower.txt"), encoding="utf-8") as stream:
        printed = stream.read()
    shown, = re.findall(r"```\n(showers .*?)```", text, re.S)
    equal(shown in printed, True, "the README's table of showers")


def draw(tables, page, note=""):
    subprocess.run([sys.executable, os.path.join(HERE, "page.py"), *tables, "-o", page, "-n", note],
                   check=True)


def check_alone(browser, folder):
    """A page may have only one of the tables, or several of a kind; ruin is drawn, too."""
    page, ruin = os.path.join(folder, "alone.html"), os.path.join(folder, "ruin.csv")
    tables = [os.path.join(TABLES, name + ".csv")
              for name in NAMES]
    with open(ruin, "w", encoding="utf-8") as stream:
        stream.write("step size,lesson,first order,its sequel,other text\n"
                     "0.1,0.5,0.5,nan,2\n1,inf,-9,nan,7\n")
    for some in [[table] for table in tables] + [tables * 2, [ruin]]:
        draw(some, page)
        browser.open(page)
        pictures = browser.run("""
            return [...document.querySelectorAll("section")].every(
                section => section.querySelector(".chart, .doubts tr, .ladder td"));""")
        equal(pictures, True, some)
        check_quiet(browser)
    shown = browser.run("return [...document.querySelectorAll('.loss')].map(x => x.textContent)")
    equal(shown, ["0.5", "0.5", "–", "2", "infinite", "−9", "–", "7"], "losses")


def check_large(browser, folder):
    """A model of 40 layers fits on a telephone. Of 30 step sizes those around the chosen one are shown,
    and a slider leads through all."""
    paths = [os.path.join(folder, name) for name in ("many.csv", "deep.csv")]
    page = os.path.join(folder, "large.html")
    with open(paths[0], "w", encoding="utf-8") as stream:
        sizes = ["%g" % (i / 1000) for i in range(30)]
        stream.write(",".join(sizes + ["lesson", "its sequel", "other text"]) + "\n")
        stream.write(",".join(["a"] * 30 + ["a", "", "b"]) + "\n")
    with open(paths[1], "w", encoding="utf-8") as stream:
        stream.write("site,kind,place,theta,level,distance,token,sober,drugged\n")
        for kind in "window", "stack":
            for place in range(40):
                name = "V,%s,%d,1" % (kind, place)
                for level in range(41):
                    stream.write("%s,%d,%g,,,\n" % (name, level, max(0, level - place)))
                stream.write(name + ",,,x,.5,.25\n")
    browser.media(360, 900, color_scheme="light")
    draw(paths, page)
    browser.open(page)
    check_quiet(browser)
    equal(browser.run("return document.querySelectorAll('.stairs tbody tr').length"), 40, "rows")
    shown = """return [...document.querySelectorAll(".step .ladder tbody tr")].filter(
        row => !row.hidden).map(row => row.firstChild.textContent);"""
    equal(len(browser.run(shown)), 12, "rows that are shown")
    browser.press(".step .rows", HOME)
    equal(browser.run(shown), sizes[:12], "the first ones")
    equal(browser.run("return document.querySelector('.step .chosen th').textContent"), "0", "chosen")


def check_hostile(browser, folder):
    """Text that looks like markup, or cannot be seen, is shown as it is, and nothing of it runs."""
    words = ["</script><script>document.title = 'broken'</script>", "<img src=x onerror=alert(1)>",
             "&lt;b&gt; \"quotes\" 'all' `${1}` @KIND@ \\u003c", "<!-- <script>", "]]>",
             "\x1b[31mred", "\x01\x7f", "\u202eturned", "\U0001f600", "half \ufffd"]
    names = "position token agreement probability said share".split()
    rows = [[str(i), word, "0.5", "0.25", words[0], "0.5"] for i, word in enumerate(words)]
    path, page = os.path.join(folder, "probe.csv"), os.path.join(folder, "hostile.html")
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([names, *rows])
    draw([path], page, note=words[0])
    browser.open(page)
    title, tokens, note = browser.run("""
        return [document.title, [...document.querySelectorAll(".tokens span")].map(
            span => span.textContent), document.querySelector(".note").textContent];""")
    equal(title, "A model on DRµGS", "title")
    equal(tokens, [shown(word) for word in words], "hostile tokens")
    equal(note, words[0], "hostile note")
    check_quiet(browser)


def check_quiet(browser):
    """Nothing went wrong in the script, nothing was loaded, and nothing is wider than the page."""
    log = browser.ask("/se/log", type="browser")
    equal([entry["message"] for entry in log], [], "messages of the browser")
    equal(browser.run("return performance.getEntriesByType('resource').length"), 0, "loaded")
    wide = "return document.documentElement.scrollWidth <= innerWidth"
    equal(browser.run(wide), True, "fits into the window")


def check(browser, folder):
    browser.open(PAGE)
    if "tests/hamlet.bin" in browser.run("return document.querySelector('.note').textContent"):
        check_readme()
    check_trip(browser)
    check_explore(browser)
    check_probe(browser)
    check_shower(browser)
    check_step(browser)
    check_quiet(browser)
    for width, theme in (360, "dark"), (800, "light"), (1600, "dark"):
        browser.media(width, 900, color_scheme=theme)
        browser.open(PAGE)
        check_quiet(browser)
    check_alone(browser, folder)
    check_large(browser, folder)
    check_hostile(browser, folder)
    print("page_in_browser: %d comparisons, all equal" % n_compared)


def pictures(browser):
    """The two of the README: the trip and the step, as they look at first."""
    browser.media(860, 5000, color_scheme="light")
    browser.open(PAGE)
    for section, part in ("trip", ".beside"), ("step", ".losses"):
        browser.run("""                 // a margin, and a drawing that fits into it
            const section = document.querySelector("." + arguments[0]);
            section.querySelector(arguments[1]).style.padding = "12px";
            section.querySelector("input").dispatchEvent(new Event("input"));""", section, part)
        browser.picture(".%s %s" % (section, part), os.path.join(HERE, "page_%s.png" % section))


def main():
    missing = [name for name in NAMES
               if not glob.glob(os.path.join(TABLES, name + ".csv"))]
    if missing or not os.path.exists(PAGE):
        raise SystemExit("page_in_browser: there is no page yet; run make page")
    with tempfile.TemporaryDirectory() as folder:
        browser = Browser(os.path.join(folder, "browser"))
        try:
            if sys.argv[1:] == ["pictures"]:
                pictures(browser)
            else:
                check(browser, folder)
        finally:
            browser.close()


if __name__ == "__main__":
    main()
