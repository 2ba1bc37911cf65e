#!/usr/bin/env python3
"""Tests of the command line of ./train_step, on the small model tests/hamlet.bin.

    make && python3 -m unittest discover tests
"""

import collections
import csv
import hashlib
import os
import re
import resource
import signal
import subprocess
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
DRUGS, STEP = (os.path.join(os.path.dirname(HERE), name) for name in ("drugs", "train_step"))
MODEL = os.path.join(HERE, "hamlet.bin")
ETAS = ["0", "0.0001", "0.001", "0.002", "0.003", "0.005", "0.01", "0.1"]

Done = collections.namedtuple("Done", "status out err")


def run(*arguments, program=STEP, **more):
    done = subprocess.run([program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=120, **more)
    return Done(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode())


def small_disk():
    """In the child: files cannot grow beyond 100 KB, and writing says so instead of killing."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))


@unittest.skipUnless(os.path.exists(STEP), "./train_step is not built: run make first")
@unittest.skipUnless(os.path.exists(MODEL), "tests/hamlet.bin is not here")
class Case(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.model = self.digest(MODEL)

    def tearDown(self):
        self.assertEqual(self.digest(MODEL), self.model, "the model file was changed")

    @staticmethod
    def digest(path):
        with open(path, "rb") as stream:
            return hashlib.sha256(stream.read()).hexdigest()

    def path(self, name, content=None):
        path = os.path.join(self.folder, name)
        if content is not None:
            with open(path, "w", encoding="utf-8") as stream:
                stream.write(content)
        return path

    def good(self, *arguments):
        done = run(MODEL, *arguments)
        self.assertEqual((done.status, done.err), (0, ""), arguments)
        return done.out

    def bad(self, status, *arguments, words=(), **more):
        """The right status, and one line on stderr that has all the words."""
        done = run(MODEL, *arguments, **more)
        self.assertEqual(done.status, status, (arguments, done))
        self.assertRegex(done.err, r"\Atrain_step: [^\n]+\n\Z", arguments)
        for word in words:
            self.assertIn(word, done.err, arguments)
        return done


def table(out):
    """The table on the terminal: its step sizes, and a row of words for each further line."""
    lines = out.split("goes on like this:\n\n")[1].split("\n\n")[0].splitlines()
    starts = [match.start() for match in re.finditer(r"\S+", lines[0])] + [None]
    return [[line[a:b].strip() for a, b in zip(starts, starts[1:])] for line in lines]


def losses(out):
    """Step size -> lesson, first order, sequel, other text: as printed after the step."""
    rows = out.split("After the step, ")[1].split("\n\n")[1].splitlines()[1:]
    cells = [row.replace("not finite", "not_finite").split() for row in rows]
    return {row[0]: row[1:] for row in cells}


def norm(out):
    return re.search(r"in all: *(\S+)", out).group(1)


class TestExperiment(Case):
    def test_default_run(self):
        out = self.good()
        rows = table(out)
        self.assertEqual(rows[0], ETAS)
        self.assertEqual([row[0] for row in rows[1:6]], "To be a successful business".split())
        self.assertEqual([row[2] for row in rows[1:6]], "To be, or not to".split())
        self.assertGreater(len(rows), 40)
        after = losses(out)
        self.assertEqual(list(after), ETAS)
        self.assertEqual(after["0"][0], after["0"][1])      # no step, and first order agrees
        self.assertIn("loss of " + after["0"][0], out)
        for text in "be, or not to be, that is the question:", "slings and arrows":
            self.assertIn(text, out.split("The other cure")[1])

    def test_tables_in_files(self):
        path, markdown = self.path("table.csv"), self.path("table.md")
        out = self.good("-n", "20", "-t", path)
        with open(path, newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))
        self.assertEqual(rows[0], ETAS)
        self.assertEqual({len(row) for row in rows}, {len(ETAS)})
        shown = table(out)
        self.assertEqual(len(rows), len(shown))
        for row, cells in zip(rows, shown):                 # the terminal may cut long words
            for word, cell in zip(row, cells):
                self.assertTrue(word.startswith(cell) and bool(cell) == bool(word), (word, cell))
        self.good("-n", "20", "-t", markdown)
        with open(markdown, encoding="utf-8") as stream:
            lines = stream.read().splitlines()
        self.assertEqual(lines.pop(1).count("---"), len(ETAS))
        self.assertEqual([[c.strip() for c in line[1:-1].split("|")] for line in lines], rows)

    def test_predictions_that_count(self):
        last = self.good("-e", "0", "-n", "1", "-x", "last")
        self.assertEqual(last.split("rank\n")[1].split("\n\n")[0].split()[0], ":")
        plain = self.good("-e", "0", "-n", "1")
        self.assertEqual(self.good("-e", "0", "-n", "1", "-x", "all"), plain)
        self.assertNotEqual(norm(last), norm(plain))

    def test_doses(self):
        def of(*arguments):
            return norm(self.good("-e", "0", "-n", "1", *arguments))
        sober, drugged = of(), of("-A", ".5", "-s", "1")
        self.assertNotEqual(drugged, sober)
        self.assertEqual(of("-A", ".5", "-s", "1"), drugged)
        self.assertNotEqual(of("-A", ".5", "-s", "2"), drugged)
        self.assertEqual(of("-A", "0", "-s", "2"), sober)

    def test_texts(self):
        text = "be or not to be"
        lesson = self.path("lesson.txt", text)
        one = ["-e", "0,1e-3", "-n", "3"]
        self.assertEqual(self.good(*one, "-l", "@" + lesson), self.good(*one, "-l", text))
        out = self.good(*one, "-l", "be", "-f", lesson, "-y", "")
        self.assertNotIn("cure", out)
        self.assertNotEqual(losses(out)["0"][3], losses(self.good(*one))["0"][3])

    def test_ruin_is_reported(self):
        for eta, row in losses(self.good("-e", "1,1e3", "-n", "5")).items():
            for loss in row[:1] + row[2:]:
                self.assertTrue(loss == "not_finite" or float(loss) > 5, (eta, loss))

    def test_a_model_that_is_not_in_order(self):
        with open(MODEL, "rb") as stream:
            data = bytearray(stream.read())
        data[-4:] = b"\x00\x00\xc0\x7f"                     # the final norm's last gain: NaN
        path = self.path("nan.bin")
        with open(path, "wb") as stream:
            stream.write(data)
        done = run(path)
        self.assertEqual((done.status, done.out), (1, ""))
        self.assertRegex(done.err, r"\Atrain_step: [^\n]*not finite[^\n]*\n\Z")


class TestSteppedFile(Case):
    @unittest.skipUnless(os.path.exists(DRUGS), "./drugs is not built: run make first")
    def test_is_a_model(self):
        for eta in "1e-3", "1e-2":
            path, words = self.path("stepped.bin"), self.path("words.csv")
            self.good("-e", eta, "-n", "40", "-o", path, "-t", words)
            self.assertEqual(os.path.getsize(path), os.path.getsize(MODEL))
            self.assertNotEqual(self.digest(path), self.model)
            with open(words, newline="", encoding="utf-8") as stream:
                column = [row[0] for row in csv.reader(stream)][1:]
            text = run(path, "-i", "To be", "-n", "40", program=DRUGS).out
            self.assertEqual(text.split(), column)
        self.good("-e", "0", "-n", "1", "-o", path)
        self.assertEqual(self.digest(path), self.model)
        self.assertEqual(sorted(os.listdir(self.folder)), ["stepped.bin", "words.csv"])

    def test_nothing_is_left_half_written(self):
        one = ["-e", "1e-3", "-n", "1"]
        nowhere = self.path(os.path.join("missing", "x.bin"))
        self.bad(1, *one, "-o", nowhere, words=[nowhere])
        old = self.path("old.bin", "as it was")
        self.bad(1, *one, "-o", old, words=[old], preexec_fn=small_disk)
        with open(old, encoding="utf-8") as stream:
            self.assertEqual(stream.read(), "as it was")
        new = self.path("new.bin")
        self.bad(1, *one, "-o", new, words=[new], preexec_fn=small_disk)
        self.bad(1, *one, "-t", self.path(os.path.join("missing", "x.csv")), words=["missing"])
        self.assertEqual(os.listdir(self.folder), ["old.bin"])


class TestErrors(Case):
    def test_usage(self):
        for arguments in ["-h"], [MODEL, "-h"], [MODEL, "-n", "5", "-h"]:
            done = run(*arguments)
            self.assertEqual((done.status, done.err), (0, ""))
            self.assertTrue(done.out.startswith("usage: train_step "))
        none = run()
        self.assertEqual((none.status, none.out, none.err), (2, "", done.out))

    def test_bad_options(self):
        for value in ("abc", "", "-1", "inf", "nan", "1e-3,,", "1e-3,", ",1e-3", "1e-3 1e-2",
                      "1e4", "1e-3;", "0" * 40 + "1x", ",".join(["1"] * 65)):
            self.assertFalse(self.bad(2, "-e", value, words=["-e"]).out)
        for option, values in {"-n": ("0", "-1", "x", "1.5", ""), "-x": ("some", "", "Last"),
                               "-A": ("x", "-1", ".3@ceil"), "-r": ("gauss",),
                               "-s": ("x",)}.items():
            for value in values:
                self.assertFalse(self.bad(2, option, value, words=[option]).out)
        for option in "-l", "-i", "-e", "-n", "-x", "-g", "-f", "-y", "-t", "-o", "-A", "-s":
            self.assertFalse(self.bad(2, option, words=[option, "needs a value"]).out)
        for option in "-z", "-m", "-u", "-", "--", "-nn", "--help", "word", "":
            self.assertFalse(self.bad(2, option, "5", words=[option]).out)
        path = self.path("x.bin")
        self.assertFalse(self.bad(2, "-o", path, words=["-o", "-e"]).out)   # eight step sizes
        self.assertFalse(self.bad(2, "-o", path, "-e", "0,1", words=["-o", "-e"]).out)
        self.assertFalse(os.listdir(self.folder))

    def test_bad_texts_and_files(self):
        missing, empty = self.path("missing"), self.path("empty", "")
        for arguments in (["-l", ""], ["-l", "@" + empty], ["-l", "x y " * 99], ["-i", "x y " * 99],
                          ["-l", "@" + missing], ["-g", "@" + missing], ["-f", missing]):
            self.assertFalse(self.bad(1, *arguments, words=arguments[:1]).out, arguments)
        self.assertIn(missing, self.bad(1, "-f", missing).err)
        done = run(missing)
        self.assertEqual((done.status, done.out), (1, ""))
        self.assertRegex(done.err, r"\Atrain_step: [^\n]+\n\Z")

    @unittest.skipUnless(os.path.exists("/dev/full"), "there is no /dev/full")
    def test_a_full_disk(self):
        with open("/dev/full", "wb") as full:
            done = subprocess.run([STEP, MODEL, "-n", "2"], stdout=full, stderr=subprocess.PIPE)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, rb"\Atrain_step: standard output[^\n]*\n\Z")


if __name__ == "__main__":
    unittest.main()
