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
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(os.path.dirname(HERE))
TABLES = os.path.join(TOP, "lab")
PAGE = os.path.join(TOP, "lab.html")
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


def check_trip(browser):
    """Every kind, place and angle: the curve of distances, and the next tokens."""
    distance, tokens = {}, {}
    for row in table("trip.csv"):
        key = row["kind"], int(row["place"]), float(row["theta"])
        if row["level"]:
            distance.setdefault(key, []).append(float(row["distance"]))
        else:
            one = [row["token"], float(row["sober"]), float(row["drugged"])]
            tokens.setdefault(key, []).append(one)
    thetas = sorted({theta for _, _, theta in distance})
    for number, kind in enumerate(["window", "stack"]):
        browser.click(button("trip", "kind", number))
        for place in browser.stops(slider("trip", "place")):
            for i in browser.stops(slider("trip", "theta")):
                key = kind, place, thetas[i]
                points, bars = browser.run("""
                    return [[...document.querySelectorAll(".trip .point")].map(
                                point => Number(point.dataset.value)),
                            [...document.querySelectorAll(".trip .token")].map(
                                ({dataset: {token, sober, drugged}}) =>
                                [token, Number(sober), Number(drugged)])];""")
                equal(points, distance.pop(key), key)
                equal(bars, tokens.pop(key), key)
    equal((distance, tokens), ({}, {}), "all of the trip")
    check_shades(browser)


def check_shades(browser):
    """The shades of the last map that was drawn: the square root of a share of the largest."""
    rows = [row for row in table("trip.csv") if row["kind"] == "stack" and row["level"]]
    largest = max(float(row["distance"]) for row in rows)
    last = [float(row["distance"]) for row in rows if row["place"] == rows[-1]["place"]]
    want = ["%.3f" % (x / largest) ** .5 for x in last if x]
    got = browser.run("""
        return [...document.querySelectorAll(".by-theta .chart g .cell")].map(
            cell => cell.getAttribute("fill-opacity"));""")
    equal(len(got), len(want), "cells")
    for one, other in zip(got, want):
        equal(abs(float(one) - float(other)) < .0011, True, "shade %s, %s" % (one, other))


TEXTS = """
    const section = document.querySelector(arguments[0]);
    return [".before", ".after"].map(name => {
        const node = section.querySelector(name);
        const kept = node.cloneNode(true);
        kept.querySelectorAll("ins, del").forEach(word => word.remove());
        return [node.textContent, kept.textContent];
    });"""


def check_texts(browser, section, before, after, where):
    """Two texts are shown, and without the marked words both are the same."""
    (left, left_kept), (right, right_kept) = browser.run(TEXTS, section)
    equal([left, right], [shown(before), shown(after)], where)
    equal(left_kept.split(), right_kept.split(), where)


def check_explore(browser):
    """Every text of every method, strength and seed."""
    rows = table("explore.csv")
    sober = [row["text"] for row in rows if row["method"] == "sober"]
    cells = {}
    for row in rows:
        if row["method"] != "sober":
            cells.setdefault(row["method"], {}).setdefault(row["strength"], []).append(row)
    for i, (method, strengths) in enumerate(cells.items()):
        browser.click(button("explore", "method", i))
        for j in browser.stops(slider("explore", "strength")):
            strength = list(strengths)[j]
            for k in browser.stops(slider("explore", "seed")):
                row = strengths[strength][k]
                where = "%s %s, seed %s" % (method, strength, row["seed"])
                check_texts(browser, ".explore", sober[k], row["text"], where)
                caption, readout = browser.run("""
                    return [".what", "p.readout"].map(name =>
                        document.querySelector(".explore " + name).textContent);""")
                equal(caption, where, where)
                equal("%s of %d texts" % (row["distinct"], len(sober)) in readout, True, where)


def check_probe(browser):
    """Every token, its shade, and what is said of it."""
    rows = table("probe.csv")
    spans = browser.run("""
        return [...document.querySelectorAll(".tokens span")].map(
            span => [span.textContent, Number(span.style.getPropertyValue("--doubt"))]);""")
    equal(len(spans), len(rows), "tokens")
    for (text, doubt), row in zip(spans, rows):
        equal(text, shown(row["token"].replace("\\n", "\n")), row)
        equal(abs(1 - doubt - float(row["agreement"])) < 1e-12, True, row)
    for i in browser.stops(slider("probe", "token")):
        readout = browser.run("return document.querySelector('.probe .readout').textContent")
        percent = "position %s: %.1f %%" % (rows[i]["position"], 100 * float(rows[i]["agreement"]))
        equal(percent in readout, True, (readout, percent))


def check_step(browser):
    """Every step size: its text and its losses."""
    with open(os.path.join(TABLES, "words.csv"), newline="", encoding="utf-8") as stream:
        sizes, *words = csv.reader(stream)
    losses = table("losses.csv")
    columns = [" ".join(row[i] for row in words if row[i]) for i in range(len(sizes))]
    for i in browser.stops(slider("step", "size")):
        check_texts(browser, ".step", columns[0], columns[i], sizes[i])
        cells = browser.run("""
            return [...document.querySelectorAll(".step tbody td:last-child")].map(
                cell => cell.dataset.value);""")
        want = list(losses[i].values())[1:]
        equal([float(cell) for cell in cells], [float(loss) for loss in want], sizes[i])


def draw(tables, page, note=""):
    subprocess.run([sys.executable, os.path.join(HERE, "page.py"), *tables, "-o", page, "-n", note],
                   check=True)


def check_alone(browser, folder):
    """A page may have only one of the tables, or several of a kind; ruin is drawn, too."""
    page, ruin = os.path.join(folder, "alone.html"), os.path.join(folder, "ruin.csv")
    tables = [os.path.join(TABLES, name + ".csv")
              for name in ("trip", "explore", "probe", "words", "losses")]
    with open(ruin, "w", encoding="utf-8") as stream:
        stream.write("step size,lesson,first order,its sequel,other text\n"
                     "0.1,0.5,0.5,nan,2\n1,inf,-9,nan,7\n")
    for some in [[table] for table in tables] + [tables * 2, [ruin]]:
        draw(some, page)
        browser.open(page)
        pictures = browser.run("""
            return [...document.querySelectorAll("section")].every(
                section => section.querySelector(".chart, ins"));""")
        equal(pictures, True, some)
        check_quiet(browser)
    shown = browser.run("return [...document.querySelectorAll('td')].map(td => td.textContent)")
    equal(shown, ["0.5", "0.5", "0.5", "0.5", "–", "–", "2", "2"], "losses")
    browser.press(slider("step", "size"), RIGHT)
    shown = browser.run("return [...document.querySelectorAll('td')].map(td => td.textContent)")
    equal(shown, ["0.5", "infinite", "0.5", "−9", "–", "–", "2", "7"], "losses")


def check_hostile(browser, folder):
    """Text that looks like markup, or cannot be seen, is shown as it is, and nothing of it runs."""
    words = ["</script><script>document.title = 'broken'</script>", "<img src=x onerror=alert(1)>",
             "&lt;b&gt; \"quotes\" 'all' `${1}` @KIND@ \\u003c", "<!-- <script>", "]]>",
             "\x1b[31mred", "\x01\x7f", "\u202eturned", "\U0001f600", "half \ufffd"]
    names = "position token agreement probability".split()
    rows = [[str(i), word, "0.5", "0.25"] for i, word in enumerate(words)]
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
    check_trip(browser)
    check_explore(browser)
    check_probe(browser)
    check_step(browser)
    check_quiet(browser)
    for width, theme in (360, "dark"), (800, "light"), (1600, "dark"):
        browser.media(width, 900, color_scheme=theme)
        browser.open(PAGE)
        check_quiet(browser)
    check_alone(browser, folder)
    check_hostile(browser, folder)
    print("page_in_browser: %d comparisons, all equal" % n_compared)


def pictures(browser):
    """The two of the README: the trip and the step, as they look at first."""
    browser.media(860, 3000, color_scheme="light")
    browser.open(PAGE)
    for section, part in ("trip", ".figures"), ("step", ".losses"):
        browser.run("""                 // a margin, and a drawing that fits into it
            const section = document.querySelector("." + arguments[0]);
            section.querySelector(arguments[1]).style.padding = "12px";
            section.querySelector("input").dispatchEvent(new Event("input"));""", section, part)
        browser.picture(".%s %s" % (section, part), os.path.join(HERE, "page_%s.png" % section))


def main():
    missing = [name for name in ("trip", "explore", "probe", "words", "losses")
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
