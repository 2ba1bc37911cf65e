#!/usr/bin/env python3
"""Tests of tests/laboratory/page.py: what is in the page is what the tables say, and nothing else can be.

    make test, or: make && make tests/lab && python3 -m unittest discover tests/unit

Whether it is drawn as it should be, tests/laboratory/page_in_browser.py looks at in a browser.
"""

import csv
import html.parser
import json
import os
import re
import subprocess
import sys
import tempfile
import unittest

from test_cli import HERE, MODEL

LAB = os.path.join(HERE, "lab")
STEP = os.path.join(os.path.dirname(HERE), "train_step")
PROMPT = "Here is some advice: To be a good leader"
VOID = {"meta", "input", "br", "img", "link"}      # elements that have no end
HOSTILE = [
    "</script><script>alert(1)</script>", "</SCRIPT >", "<!--", "]]>", "&amp; &lt;", "'\"`", "\\",
    "@KIND@", "${x}", "\x01\x1b[0m\x7f", "two\nlines\r\n", "\u2028\u2029", "\u202eback",
    "\U0001f600", "\ud7ff\ue000", "", " ", ",", "=1+1", "__proto__",
]


class Page(html.parser.HTMLParser):
    """A page taken apart. That every element ends where it should is checked on the way."""

    def __init__(self, text):
        super().__init__()
        self.open = []                  # the elements that have begun and not ended
        self.attributes = []            # (name, value) of all elements
        self.sections = []              # (kind, data)
        self.texts = []                 # what can be read
        self.errors = []
        self.feed(text)
        self.close()
        if self.open:
            self.errors.append("no end of %s" % self.open)

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        if len(dict(attributes)) != len(attributes):
            self.errors.append("an attribute of %s is there twice" % tag)
        if tag == "section":
            self.sections.append([dict(attributes)["class"], ""])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append("%s ends in %s" % (tag, self.open))

    def handle_data(self, data):
        if self.open[-2:] == ["section", "script"]:
            self.sections[-1][1] += data
        elif self.open[-1:] not in (["script"], ["style"]):
            self.texts.append(data)


class PageCase(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def path(self, name, content=None):
        path = os.path.join(self.folder, name)
        if content is not None:
            with open(path, "wb") as stream:
                stream.write(content)
        return path

    def table(self, name, rows):
        path = self.path(name)
        with open(path, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(rows)
        return path

    def draw(self, *arguments):
        return subprocess.run([sys.executable, os.path.join(HERE, "laboratory", "page.py"), *arguments],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)

    def page(self, *arguments):
        """The text of a page, and its parts."""
        out = self.path("x.html")
        done = self.draw(*arguments, "-o", out)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, b"", b""))
        with open(out, encoding="utf-8", newline="") as stream:
            text = stream.read()
        page = Page(text)
        self.assertEqual(page.errors, [])
        return text, page

    def sections(self, *arguments):
        """(kind, data) of every section."""
        def no_constant(name):
            self.fail("%s is no JSON" % name)
        return [(kind, json.loads(data, parse_constant=no_constant))
                for kind, data in self.page(*arguments)[1].sections]


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def numbers(rows, *names):
    return [[float(row[name]) for name in names] for row in rows]


@unittest.skipUnless(os.path.exists(LAB) and os.path.exists(STEP), "the programs are not built")
@unittest.skipUnless(os.path.exists(MODEL), "tests/hamlet.bin is not here")
class TestData(PageCase):
    """What the programs write is in the page to the last digit: float() of a cell is the number."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.files = {name: os.path.join(folder.name, name + ".csv")
                     for name in ("trip", "explore", "probe", "shower", "words", "losses")}
        for arguments in (
                [LAB, MODEL, "trip", "-k", "2", "-K", "1", "-i", PROMPT, "-o", cls.files["trip"]],
                [LAB, MODEL, "explore", "-k", "7", "-n", "8", "-i", PROMPT, "-o",
                 cls.files["explore"]],
                [LAB, MODEL, "probe", "-n", "12", "-A", "1.6", "-o", cls.files["probe"]],
                [LAB, MODEL, "shower", "-k", "3", "-n", "30", "-H", ".8", "-o",
                 cls.files["shower"]],
                [STEP, MODEL, "-n", "12", "-t", cls.files["words"], "-a", cls.files["losses"]]):
            subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, timeout=120)

    def only(self, name):
        (_, data), = self.sections(self.files[name])
        return data, rows_of(self.files[name])

    def test_trip(self):
        data, rows = self.only("trip")
        self.assertEqual({row["site"] for row in rows}, {data["site"]})
        self.assertEqual(data["thetas"], sorted({float(row["theta"]) for row in rows}))
        for kind in "window", "stack":
            mine = [row for row in rows if row["kind"] == kind]     # in the order of the file
            levels = [row for row in mine if row["level"]]
            tokens = [row for row in mine if row["token"]]
            self.assertEqual([[x] for x in data["distance"][kind]], numbers(levels, "distance"))
            self.assertEqual([[x] for x in data["drugged"][kind]], numbers(tokens, "drugged"))
            n = len(data["tokens"])
            for i, row in enumerate(tokens):
                self.assertEqual((row["token"], float(row["sober"])),
                                 (data["tokens"][i % n], data["sober"][i % n]))
            places = [(int(row["place"]), float(row["theta"])) for row in tokens[::n]]
            self.assertEqual(places, [(place, theta) for place in range(data["layers"])
                                      for theta in data["thetas"]])

    def test_explore(self):
        data, rows = self.only("explore")
        seeds = data["seeds"]
        self.assertEqual(seeds, [row["seed"] for row in rows[:7]])
        cells = [(method["name"], cell) for method in data["methods"] for cell in method["cells"]]
        cells.append(("sober", data["sober"]))
        self.assertEqual(len(cells) * len(seeds), len(rows))
        for i, (name, cell) in enumerate(cells):
            mine = rows[7 * i:7 * i + 7]
            self.assertEqual(cell["ended"], [int(row["ended"]) for row in mine])
            self.assertEqual([data["texts"][text] for text in cell["texts"]],
                             [row["text"] for row in mine[:5]])
            for seed, row in zip(seeds, mine):
                self.assertEqual((name, seed), (row["method"], row["seed"]))
                self.assertEqual([cell[key] for key in ("strength", "differ", "prefix", "angle",
                                                        "diversity", "likelihood", "error")],
                                 numbers([row], "strength", "differ", "prefix", "angle",
                                         "diversity", "log-probability", "error")[0])
        for method in data["methods"]:
            gain, = {row["gain"] for row in rows if row["method"] == method["name"]}
            self.assertEqual(method["gain"], None if gain == "nan" else float(gain))
        self.assertEqual([method["name"] for method in data["methods"] if method["gain"] is None],
                         ["temperature"])

    def test_probe(self):
        data, rows = self.only("probe")
        said = [(one["position"], one["token"], one["agreement"], one["probability"], *other)
                for one in data for other in one["said"]]
        self.assertEqual(said, [(int(row["position"]), row["token"], float(row["agreement"]),
                                 float(row["probability"]), row["said"], float(row["share"]))
                                for row in rows])
        self.assertGreater(len(said), len(data))
        self.assertEqual(len(data), 12)

    def test_shower(self):
        """All costs, and the text of one seed."""
        data, rows = self.only("shower")
        self.assertEqual([cell["every"] for cell in data["cells"]], [0, 30, 10, 3])
        for i, cell in enumerate(data["cells"]):
            mine = rows[3 * i:3 * i + 3]
            self.assertEqual([[cost] for cost in cell["costs"]], numbers(mine, "cost"))
            self.assertEqual([cell[key] for key in ("every", "mean", "error", "gain", "gainError",
                                                    "better")],
                             numbers(mine, "every", "mean", "error", "gain", "gain error",
                                     "better")[0])
            one, = (row for row in mine if row["typical"] == "1")
            self.assertEqual((cell["text"], cell["seed"], cell["cost"]),
                             (one["text"], one["seed"], float(one["cost"])))
        self.assertEqual({float(row["sober"]) for row in rows}, {data["sober"]})

    def test_step(self):
        """Words and losses of the same step sizes are one section, in whatever order they come."""
        words, losses = self.files["words"], self.files["losses"]
        (kind, data), = self.sections(words, losses)
        self.assertEqual([(kind, data)], self.sections(losses, words))
        with open(words, newline="", encoding="utf-8") as stream:
            sizes, *rows = csv.reader(stream)
        self.assertEqual(sizes[-3:], ["lesson", "its sequel", "other text"])
        self.assertEqual(data["sizes"], [float(size) for size in sizes[:-3]])
        self.assertEqual(data["words"] + data["sources"],
                         [[row[i] for row in rows if row[i]] for i in range(len(sizes))])
        self.assertEqual(" ".join(data["sources"][0]), "To be, or not to be, that is the question:")
        self.assertEqual([list(x) for x in zip(*data["losses"])],
                         numbers(rows_of(losses), "lesson", "first order", "its sequel",
                                 "other text"))
        self.assertEqual(len(self.sections(words, words, losses)), 2)
        for alone in words, losses:
            (kind, part), = self.sections(alone)
            self.assertEqual(kind, "step")
            self.assertTrue(part.items() < data.items())

    def test_all_together(self):
        """The order of the sections is the page's. Nothing in it leads outside, and a browser is
        told to load nothing."""
        text, page = self.page(*reversed(list(self.files.values())))
        self.assertEqual([kind for kind, _ in page.sections],
                         ["trip", "probe", "explore", "shower", "step"])
        self.assertFalse(re.search(r"https?:|\bsrc=|@import|\bfetch\b|\bimport\b|url\((?!#)", text))
        self.assertIn("default-src 'none'", text)
        names = [value for name, value in page.attributes if name == "id"]
        self.assertEqual(len(set(names)), len(names))
        for name, value in page.attributes:
            if name == "href":
                self.assertIn(value[1:], names)
                self.assertEqual(value[0], "#")
            self.assertFalse(name.startswith("on"), name)
        for name in self.files:
            self.assertTrue(any(name + ".csv" in one for one in page.texts), name)


def explore_rows(texts):
    """A table of explore with these texts, of one method and of the sober model."""
    header = ("method strength seed differ prefix angle diversity log-probability error gain ended "
              "text").split()
    return [header] + [[method, "0.5", str(seed), "2", "3", ".25", ".5", "-1.5", "nan", "-.5", "0",
                        text]
                       for method in ("V", "sober") for seed, text in enumerate(texts)]


class TestTexts(PageCase):
    def test_hostile_text_is_text(self):
        """In a table, in a note, and in the name of a file."""
        name = "<b onclick='x'>&amp;\"@NOTE@.csv"
        table = self.table(name, explore_rows(HOSTILE))
        note = "".join(HOSTILE)
        text, page = self.page(table, "-n", note, "-c", "explore=" + note)
        (_, data), = page.sections
        self.assertEqual(json.loads(data)["texts"], HOSTILE[:5])     # of the first seeds
        self.assertNotRegex(data, r"[<>&]|[^\x20-\x7e]")
        self.assertEqual(len(re.findall("<script", text)), 2)       # of the section, of the page
        self.assertEqual(len(re.findall("</script", text, re.I)), 2)
        rows = ["position token agreement probability said share".split()]
        rows += [[str(i), text, ".5", ".5", text, ".5"] for i, text in enumerate(HOSTILE)]
        (_, data), = self.sections(self.table("x.csv", rows))
        self.assertEqual([one["token"] for one in data], HOSTILE)
        self.assertEqual([one["said"] for one in data], [[[text, .5]] for text in HOSTILE])
        self.assertIn(name, page.texts)
        self.assertEqual("".join(page.texts).count(note), 2)

    def test_half_characters(self):
        """Bytes that are no text become the sign for that, each where it was."""
        path = self.path("probe.csv", b"position,token,agreement,probability,said,share\n"
                                      b'7,"a\xc3",1,0.5,"a\xc3",1\n'
                                      b'8,"\xff\x00b",0.25,1e-09,"\xc3",.75\n')
        (kind, data), = self.sections(path)
        self.assertEqual((kind, [one["token"] for one in data]),
                         ("probe", ["a\ufffd", "\ufffd\ufffdb"]))
        self.assertEqual(data[1]["said"], [["\ufffd", .75]])
        self.assertEqual([one["probability"] for one in data], [.5, 1e-9])

    def test_ruin(self):
        """A loss may be infinite, or missing."""
        path = self.table("x.csv", [["step size", "lesson", "first order", "its sequel",
                                     "other text"],
                                    ["0", "0.5", "0.5", "nan", "2"],
                                    ["1", "inf", "-9", "nan", "7"]])
        (_, data), = self.sections(path)
        self.assertEqual(data["losses"], [[.5, "infinite"], [.5, -9], [None, None], [2, 7]])


class TestErrors(PageCase):
    def bad(self, path, *words):
        """One line that names the file, status 1, and no page."""
        out = self.path("x.html")
        done = self.draw(path, "-o", out)
        self.assertEqual((done.returncode, done.stdout), (1, b""), done)
        self.assertRegex(done.stderr.decode(), r"\Apage: [^\n]+\n\Z")
        for word in (os.path.basename(path), *words):
            self.assertIn(word, done.stderr.decode())
        self.assertFalse(os.path.exists(out))

    def test_files(self):
        self.bad(self.path("missing.csv"), "cannot be read")
        self.bad(self.folder, "cannot be read")
        self.bad(self.path("empty.csv", b""), "no rows")
        self.bad(self.path("head.csv", b"position,token,agreement,probability,said,share\n"), "no rows")
        self.bad(self.path("open.csv", b'a,b\n1,"2\n'), "not a CSV file")
        self.bad(self.path("model.csv", bytes(range(256)) * 9))

    def test_foreign_tables(self):
        for rows in ([["a", "b"], ["1", "2"]], [["kind", "place"], ["x", "1"]],
                     [["position", "token"], ["0", "x"]], [["0", "0.001"], ["To", "To"]],
                     [["lesson", "its sequel", "other text"], ["a", "b", "c"]]):
            self.bad(self.table("x.csv", rows), "tests/lab or train_step")

    def test_tables_from_a_spreadsheet(self):
        """With a mark in front and other ends of lines they are drawn as they were; semicolons are
        named."""
        text = "position,token,agreement,probability,said,share\n0,a,1,.5,a,1\n1,b,1,.25,b,1\n"
        marked = b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()
        self.assertEqual(self.sections(self.path("x.csv", marked)),
                         self.sections(self.path("x.csv", text.encode())))
        os.remove(self.path("x.html"))
        german = text.replace(",", ";").replace(".", "0,")
        self.bad(self.path("x.csv", german.encode()), "semicolons", "decimal sign")

    def test_tables_that_are_not_whole(self):
        """A row that is cut off, one that is missing, and a cell without its number."""
        cut = b"position,token,agreement,probability,said,share\n0,a,1,1,a,1\n1,b\n"
        self.bad(self.path("x.csv", cut), "row 2")
        self.bad(self.table("x.csv", explore_rows("ab")[:-1]), "cannot be drawn")
        self.bad(self.table("x.csv", explore_rows("ab")[:3]), "cannot be drawn")
        for number in "", "x", "nan", "inf":
            self.bad(self.table("x.csv", [
                "position token agreement probability said share".split(),
                ["0", "a", number, "1", "b", "1"]]), "cannot be drawn")
        trip = ["site kind place theta level distance token sober drugged".split()]
        for kind in "window", "stack":
            for level in "0", "1":
                trip.append(["V", kind, "0", "1", level, ".5", "", "", ""])
            for token in "a", "b":
                trip.append(["V", kind, "0", "1", "", "", token, ".5", ".25"])
        self.assertEqual([kind for kind, _ in self.sections(self.table("x.csv", trip))], ["trip"])
        os.remove(self.path("x.html"))
        for i in range(1, len(trip)):
            self.bad(self.table("x.csv", trip[:i] + trip[i + 1:]), "cannot be drawn")

    def test_the_page_goes_nowhere(self):
        table = self.table("x.csv", explore_rows("ab"))
        done = self.draw(table, "-o", self.path("none/x.html"))
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr.decode(), r"\Apage: [^\n]*x.html cannot be written[^\n]*\n\Z")
        self.assertEqual(self.draw(table, "-o", table).returncode, 2)
        self.assertEqual(self.draw(table).returncode, 2)
        for command in "explore", "nothing=x":
            self.assertEqual(self.draw(table, "-o", self.path("x.html"), "-c", command).returncode, 2)


if __name__ == "__main__":
    unittest.main()
