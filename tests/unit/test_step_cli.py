#!/usr/bin/env python3
"""Tests of the command line of ./train_step, on the small model tests/hamlet.bin.

    make && python3 -m unittest discover tests/unit
"""

import collections
import csv
import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import unittest

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DRUGS, STEP = (os.path.join(os.path.dirname(HERE), name) for name in ("drugs", "train_step"))
MODEL = os.path.join(HERE, "hamlet.bin")
STEP_SIZES = ["0", "0.0001", "0.001", "0.002", "0.003", "0.005", "0.01", "0.1"]
SOURCES = ["lesson", "its sequel", "other text"]    # in files, behind the step sizes

Done = collections.namedtuple("Done", "status out err")


def run(*arguments, program=STEP, **more):
    done = subprocess.run([program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=120, **more)
    return Done(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode())


def small_disk():
    """In the child: files cannot grow beyond 100 KB. The signal that comes of it must not kill."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
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

    @staticmethod
    def content(path):
        with open(path, "rb") as stream:
            return stream.read()

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
    cells = [row.split() for row in rows]
    return {row[0]: row[1:] for row in cells}


def norm(out):
    return re.search(r"in all: *(\S+)", out).group(1)


class TestExperiment(Case):
    def test_one_step_on_one_line(self):
        rows = table(self.good("-e", "0,1e-3", "-n", "20"))
        self.assertEqual(rows[0], ["0", "0.001"])
        self.assertEqual(rows[1], ["To", "To"])
        self.assertEqual(rows[2], ["be", "be,"])
        without, after = zip(*rows[1:])
        self.assertEqual(without[:8], ("To", "be", "a", "successful", "business", "owner,", "you",
                                       "need"))
        self.assertEqual(after[:8], ("To", "be,", "or", "not", "to", "be,", "that", "is"))

    def test_default_run(self):
        out = self.good()
        rows = table(out)
        self.assertEqual(rows[0], STEP_SIZES)
        self.assertEqual([row[0] for row in rows[1:6]], "To be a successful business".split())
        self.assertEqual([row[2] for row in rows[1:6]], "To be, or not to".split())
        self.assertGreater(len(rows), 40)
        after = losses(out)
        self.assertEqual(list(after), STEP_SIZES)
        self.assertEqual(after["0"][0], after["0"][1])      # no step, and first order agrees
        self.assertIn("loss of " + after["0"][0], out)
        for text in "be, or not to be, that is the question:", "slings and arrows":
            self.assertIn(text, out.split("The untouched model, with a prompt")[1])

    def test_sizes_to_look_near(self):
        """One digit of .69 / |g|²: for the default lesson .001, for others what promises as much."""
        for lesson, more in (None, []), ("You need to be", ["-l", "You need to be"]):
            out = self.good("-e", "0", "-n", "1", *more)
            near = re.search(r"^Look near step size (\S+): ", out, re.M).group(1)
            self.assertEqual(near, "%.1g" % (.69 / float(norm(out)) ** 2))
            self.assertEqual(near == "0.001", lesson is None, out)

    def test_tables_in_files(self):
        path, markdown = self.path("table.csv"), self.path("table.md")
        out = self.good("-n", "20", "-t", path)
        with open(path, newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))
        self.assertEqual(rows[0], STEP_SIZES + SOURCES)
        self.assertEqual({len(row) for row in rows}, {len(STEP_SIZES) + 3})
        shown = table(out)
        n_words = max(i for i, row in enumerate(rows) if any(row[:8])) + 1  # sources may be longer
        self.assertEqual(n_words, len(shown))
        for row, cells in zip(rows, shown):                 # the terminal may cut long words
            for word, cell in zip(row, cells):
                whole = cell.endswith("…") and word.startswith(cell[:-1]) or word == cell
                self.assertTrue(whole and bool(cell) == bool(word), (word, cell))
        lesson, sequel, other = ([row[i] for row in rows[1:] if row[i]] for i in (8, 9, 10))
        self.assertEqual(" ".join(lesson), "To be, or not to be, that is the question:")
        self.assertEqual((sequel[:3], sequel[-1], other[:3]),
                         (["Whether", "'tis", "nobler"], "come.", ["You", "need", "to"]))
        self.good("-n", "20", "-t", markdown)
        with open(markdown, encoding="utf-8") as stream:
            lines = stream.read().splitlines()
        self.assertEqual(lines.pop(1).count("---"), len(STEP_SIZES) + 3)
        self.assertEqual([[c.strip() for c in line[1:-1].split("|")] for line in lines], rows)

    def test_losses_in_a_file(self):
        """They are those that are shown, with more digits; of no sequel there is no loss; and all
        three files can be written by one run."""
        path = self.path("losses.csv")
        for lesson in [], ["-l", "To be"], ["-g", ""]:
            out = self.good("-n", "1", "-a", path, *lesson)
            with open(path, newline="", encoding="utf-8") as stream:
                rows = list(csv.reader(stream))
            self.assertEqual(rows.pop(0), ["step size", "lesson", "first order", "its sequel",
                                           "other text"])
            shown = {row[0]: ["%.4f" % float(cell) for cell in row[1:]] for row in rows}
            self.assertEqual({size: ["nan" if cell == "-" else cell for cell in cells]
                              for size, cells in losses(out).items()}, shown)
        self.good("-n", "1", "-e", "1e-3", "-a", path, "-t", self.path("x.md"),
                  "-o", self.path("x.bin"))
        self.assertEqual(sorted(os.listdir(self.folder)), ["losses.csv", "x.bin", "x.md"])
        self.bad(2, "-a", self.path("x.md"), words=["-a", "x.md", ".csv"])

    def test_the_first_order_is_a_straight_line(self):
        out = self.good("-n", "1")
        after = losses(out)
        before, norm2 = float(after["0"][0]), float(norm(out)) ** 2
        for size in STEP_SIZES:
            want = before - float(size) * norm2
            self.assertAlmostEqual(float(after[size][1]) / want, 1, delta=2e-3, msg=size)
        smallest = after["0.0001"]                          # where it is nearly true
        self.assertLess(abs(float(smallest[0]) - float(smallest[1])), .1 * 1e-4 * norm2)

    def test_the_parts_of_the_gradient_make_the_whole(self):
        out = self.good("-e", "0", "-n", "1")
        kinds = dict(re.findall(r"([A-Za-z][\w ]*) ([\d.]+(?:e[+-]\d+)?)(?:,|\n)",
                                re.search(r"by kind:(.*?)in all", out, re.S).group(1)))
        layers = re.search(r"by layer:(.*?)by kind", out, re.S).group(1).split()
        self.assertEqual([name.strip() for name in kinds],
                         ["att norm", "wq", "wk", "wv", "wo", "FFN norm", "w1", "w3", "w2",
                          "embedding", "final norm"])       # which is the classifier, too
        self.assertEqual(len(layers), 10)

        def squares(parts):
            return sum(float(part) ** 2 for part in parts)
        whole = float(norm(out)) ** 2
        once = squares(kinds[name] for name in kinds if name.strip() in ("embedding", "final norm"))
        self.assertAlmostEqual(squares(kinds.values()) / whole, 1, delta=.01)
        self.assertAlmostEqual((squares(layers) + once) / whole, 1, delta=.01)

    def test_the_best_is_of_rank_one(self):
        out = self.good("-e", "0", "-n", "1", "-l", "To be a successful business owner")
        rows = [row.split() for row in out.split("rank\n")[1].split("\n\n")[0].splitlines()]
        self.assertEqual([row[0] for row in rows[:3]], ["To", "be", "a"])
        self.assertEqual({row[2] for row in rows[2:]}, {"1"})   # what it would write itself

    def test_predictions_that_count(self):
        last = self.good("-e", "0", "-n", "1", "-x", "last")
        self.assertEqual(last.split("rank\n")[1].split("\n\n")[0].split()[0], ":")
        plain = self.good("-e", "0", "-n", "1")
        self.assertEqual(self.good("-e", "0", "-n", "1", "-x", "all"), plain)
        self.assertNotEqual(norm(last), norm(plain))
        lesson, first_order = losses(last)["0"][:2]         # no step: the same one prediction
        self.assertEqual(lesson, first_order)
        self.assertNotEqual(lesson, losses(plain)["0"][0])

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
        self.assertNotIn("untouched model, with", out)
        self.assertNotIn("untouched model, with", self.good(*one, "-l", text))   # no lesson has another one's cure
        self.assertIn("untouched model, with", self.good(*one, "-l", text, "-y", text))
        self.assertNotEqual(losses(out)["0"][3], losses(self.good(*one))["0"][3])
        for option in "-i", "-g", "-y":
            self.assertEqual(self.good(*one, option, "@" + lesson), self.good(*one, option, text))
        with open(lesson, "rb") as stream:
            done = run(MODEL, *one, "-l", "-", stdin=stream)
        self.assertEqual(done.out, self.good(*one, "-l", text))
        marked = self.path("marked.txt", "\ufeff" + text)      # as some editors do
        for option in "-l", "-f":
            path = ["@" + marked, "@" + lesson] if option == "-l" else [marked, lesson]
            self.assertEqual(*(self.good(*one, option, name) for name in path))
        zero = self.path("zero.txt", text + "\0" + text)
        for option, name in ("-l", "@" + zero), ("-i", "@" + zero), ("-f", zero):
            self.bad(1, *one, option, name, words=[option, zero, "zero byte"])

    def test_closed_streams(self):
        """A stream that is closed is no place for a file: that is as it always is."""
        one = ["-e", "0,1e-3", "-n", "3"]

        def files(redirections):
            paths = self.path("x.csv"), self.path("x.bin")
            done = subprocess.run(["sh", "-c", '"$0" "$@" ' + redirections, STEP, MODEL, *one,
                                   "-e", "1e-3", "-t", paths[0], "-o", paths[1]], timeout=120,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE)
            self.assertEqual((done.returncode, done.stderr), (0, b""), redirections)
            return [self.content(path) for path in paths]
        want = files("")
        for redirections in ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-":
            self.assertEqual(files(redirections), want, redirections)

    def test_a_text_without_a_prediction_has_a_dash(self):
        empty = self.path("empty.txt", "")
        for size, row in losses(self.good("-e", "0,1e-3", "-n", "2", "-f", empty)).items():
            self.assertEqual(row[3], "-", size)
            self.assertNotIn("-", row[0] + row[2])
        for row in losses(self.good("-e", "0,1e-3", "-n", "2", "-l", "be or not")).values():
            self.assertEqual(row[2], "-")                   # a lesson of one's own has no sequel
            self.assertNotEqual(row[3], "-")
        for row in losses(self.good("-e", "0,1e-3", "-n", "2", "-g", "")).values():
            self.assertEqual(row[2], "-")

    def test_ruin_is_reported(self):
        for size, row in losses(self.good("-e", "1,1e3", "-n", "5")).items():
            for loss in row[:1] + row[2:]:
                self.assertTrue(loss == "not_finite" or float(loss) > 5, (size, loss))

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
        for size in "1e-3", "1e-2":
            path, words = self.path("stepped.bin"), self.path("words.csv")
            self.good("-e", size, "-n", "40", "-o", path, "-t", words)
            self.assertEqual(os.path.getsize(path), os.path.getsize(MODEL))
            self.assertNotEqual(self.digest(path), self.model)
            with open(words, newline="", encoding="utf-8") as stream:
                column = [row[0] for row in csv.reader(stream) if row[0]][1:]
            text = run(path, "-i", "To be", "-n", "40", program=DRUGS).out
            self.assertEqual(text.split(), column)
        self.good("-e", "0", "-n", "1", "-o", path)
        self.assertEqual(self.digest(path), self.model)
        self.assertEqual(sorted(os.listdir(self.folder)), ["stepped.bin", "words.csv"])

    def test_nothing_is_left_half_written(self):
        one = ["-e", "1e-3", "-n", "1"]
        old = self.path("old.bin", "as it was")
        self.bad(1, *one, "-o", old, words=[old], preexec_fn=small_disk)
        self.assertEqual(self.content(old), b"as it was")
        new = self.path("new.bin")
        self.bad(1, *one, "-o", new, words=[new], preexec_fn=small_disk)
        self.assertEqual(os.listdir(self.folder), ["old.bin"])

    def test_a_place_that_cannot_be_written_is_found_at_once(self):
        one = ["-e", "1e-3", "-n", "1"]
        good = self.path("good.csv")
        for option, name in ("-o", "x.bin"), ("-t", "x.csv"), ("-t", "x.md"):
            nowhere = self.path(os.path.join("missing", name))
            self.assertFalse(self.bad(1, *one, option, nowhere, words=[nowhere]).out)
        nowhere = self.path(os.path.join("missing", "x.bin"))
        self.assertFalse(self.bad(1, *one, "-t", good, "-o", nowhere, words=[nowhere]).out)
        self.assertFalse(os.listdir(self.folder))           # nor is the table left

    def test_a_lesson_that_fails_leaves_nothing(self):
        old = self.path("old.csv", "as it was")
        new, model = self.path("new.csv"), self.path("model.bin")
        for wrong in ["-l", ""], ["-l", "x y " * 99], ["-i", "x y " * 99], ["-y", "x y " * 99]:
            self.bad(1, "-e", "0", "-n", "1", "-o", model, *wrong, words=wrong[:1])
            self.assertEqual(os.listdir(self.folder), ["old.csv"], wrong)
        self.bad(1, "-e", "0", "-l", "", "-t", new, "-o", model, words=["-l"])
        self.bad(1, "-e", "0", "-l", "", "-t", old, "-o", model, words=["-l"])
        self.assertEqual(os.listdir(self.folder), ["old.csv"])
        self.assertEqual(self.content(old), b"as it was")
        done = run(self.path("missing.bin"), "-e", "0", "-t", new, "-o", model)
        self.assertEqual((done.status, done.out), (1, ""))
        self.assertEqual(os.listdir(self.folder), ["old.csv"])

    def test_a_file_has_the_ending_of_its_kind(self):
        for name in ("x", "x.", "x.txt", "x.csv.txt", "x.c", "x.cs", "x.m", "x.csvx", "x.bin",
                     "csv", os.path.join("x.csv", "x")):
            path = self.path(name)
            self.assertFalse(self.bad(2, "-t", path, words=["-t", path, ".csv"]).out)
        for name in "x", "x.", "x.b", "x.bi", "x.bins", "x.csv", "x.md", "bin":
            path = self.path(name)
            self.assertFalse(self.bad(2, "-e", "0", "-o", path, words=["-o", path, ".bin"]).out)
        self.assertFalse(os.listdir(self.folder))

    def test_the_model_is_never_overwritten(self):
        """By none of its names, and as it is read or not: it is the same file."""
        model = self.path("model.bin")
        shutil.copyfile(MODEL, model)
        hard, soft, table_name = self.path("hard.bin"), self.path("soft.bin"), self.path("m.csv")
        os.link(model, hard)
        os.symlink(model, soft)
        os.symlink("model.bin", table_name)
        before = sorted(os.listdir(self.folder))
        names = model, hard, soft, os.path.join(self.folder, ".", "model.bin")
        for read in names + (table_name,):
            for written in names:
                done = run(read, "-e", "1e-3", "-n", "1", "-o", written)
                self.assertEqual((done.status, done.out), (2, ""), (read, written))
                self.assertRegex(done.err, r"\Atrain_step: [^\n]*-o[^\n]*\n\Z")
            done = run(read, "-e", "1e-3", "-n", "1", "-t", table_name)
            self.assertEqual((done.status, done.out), (2, ""), read)
            self.assertRegex(done.err, r"\Atrain_step: [^\n]*-t[^\n]*\n\Z")
            done = run(read, "-e", "1e-3", "-n", "1", "-a", table_name)
            self.assertEqual((done.status, done.out), (2, ""), read)
            self.assertRegex(done.err, r"\Atrain_step: [^\n]*-a[^\n]*\n\Z")
        self.assertEqual(run(model, "-e", "0", "-n", "1", "-t", model).status, 2)   # its ending
        self.assertEqual(sorted(os.listdir(self.folder)), before)
        self.assertEqual(self.digest(model), self.model)
        self.assertEqual(os.stat(model).st_nlink, 2)
        self.assertTrue(os.path.islink(soft) and os.path.islink(table_name))

    def test_two_tables_need_two_names(self):
        path = self.path("table.csv")
        self.bad(2, "-e", "0", "-t", path, "-a", path, words=["-a needs another file than -t"])
        self.assertEqual(os.listdir(self.folder), [])

    def test_no_neighbour_is_overwritten(self):
        """What is written beside its place has a name that no file has, not even the model."""
        model = self.path("model.bin.tmp")
        shutil.copyfile(MODEL, model)
        done = run(model, "-e", "0", "-n", "1", "-o", self.path("model.bin"))
        self.assertEqual((done.status, done.err), (0, ""))
        self.assertEqual(self.digest(model), self.model)
        self.assertEqual(self.digest(self.path("model.bin")), self.model)
        self.assertEqual(sorted(os.listdir(self.folder)), ["model.bin", "model.bin.tmp"])

    def test_an_older_file_is_replaced(self):
        path = self.path("table.csv", "old " * 1000)
        self.good("-e", "0", "-n", "3", "-t", path)
        with open(path, newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))
        self.assertEqual([row[0] for row in rows if row[0]],
                         ["0", "To", "be", "a", "successful", "business"])
        self.assertEqual(rows[0][1:], SOURCES)
        self.assertEqual(os.listdir(self.folder), ["table.csv"])


class TestErrors(Case):
    def test_usage(self):
        for arguments in (["-h"], [MODEL, "-h"], [MODEL, "-n", "5", "-h"], ["--help"],
                          [MODEL, "--help"], [MODEL, "-n", "5", "--help"]):
            done = run(*arguments)
            self.assertEqual((done.status, done.err), (0, ""))
            self.assertTrue(done.out.startswith("usage: train_step "))
        none = run()
        self.assertEqual((none.status, none.out, none.err), (2, "", done.out))

    def test_bad_options(self):
        for value in ("abc", "", "-1", "inf", "nan", "1e-3,,", "1e-3,", ",1e-3", "1e-3 1e-2",
                      "1e4", "1e-3;", "0" * 40 + "1x", ",".join(["1"] * 65)):
            self.assertFalse(self.bad(2, "-e", value, words=["-e"]).out)
        for value in "0,001", "0,01", "1e-3,00", "0,1e-3,0,05":     # a decimal comma: no 0 and 1
            self.bad(2, "-e", value, words=["-e", "'%s'" % value, "a point is the decimal sign"])
        self.assertFalse(self.bad(2, "-A", "0,5", words=["'0,5'", "a point is the"]).out)
        for option, values in {"-n": ("0", "-1", "x", "1.5", ""), "-x": ("some", "", "Last"),
                               "-A": ("x", "-1", ".3@ceil", "30"), "-r": ("gauss",),
                               "-s": ("x", "9007199254740993")}.items():
            for value in values:
                self.assertFalse(self.bad(2, option, value, words=[option]).out)
        for option in "-l", "-i", "-e", "-n", "-x", "-g", "-f", "-y", "-t", "-o", "-A", "-s":
            self.assertFalse(self.bad(2, option, words=[option, "needs a value"]).out)

    def test_options_without_effect(self):
        """What would change nothing is refused, and what it needs is named."""
        dose, shape = "a dose, like -V", ".3@ceil:0=1"
        for option, value in ("-r", "upstream"), ("-s", "7"), ("-d", ".5"), ("-w", ".5"):
            needs = dose if option in ("-r", "-s") else "a dose without a shape"
            self.assertFalse(self.bad(2, option, value, words=[option + " needs " + needs]).out)
            done = run(MODEL, "-e", "0", "-n", "1", "-V", "0", option, value)
            self.assertEqual((done.status, done.err), (0, ""), option)
        self.bad(2, "-V", shape, "-d", ".5", words=["-d needs a dose without a shape"])
        self.good("-e", "0", "-n", "1", "-V", shape, "-A", "0", "-d", ".5")
        path = self.path("x.bin")
        self.assertFalse(self.bad(2, "-o", path, words=["-o", "-e"]).out)   # eight step sizes
        self.assertFalse(self.bad(2, "-o", path, "-e", "0,1", words=["-o", "-e"]).out)
        self.assertFalse(os.listdir(self.folder))

    def test_the_help_names_every_option(self):
        help_text = run("-h").out
        for option in "lienxgfytaoHQKVAdwrsh":
            self.assertRegex(help_text, r"(?m)^  .*-%s\b" % option)

    def test_the_model_comes_first(self):
        for first in "-n", "-", "--":
            done = run(first, MODEL)
            self.assertEqual((done.status, done.out), (2, ""), first)
            self.assertRegex(done.err, r"\Atrain_step: [^\n]+\n\Z")

    def test_what_is_no_option(self):
        for word in "-z", "-m", "-u", "-", "word", "":
            for after in [], ["5"]:
                done = self.bad(2, word, *after, words=["is not an option"])
                self.assertFalse(done.out)
            self.bad(2, word, words=["'%s' is not an option" % word])
            self.bad(2, "-n", "5", word, words=["'%s' is not an option" % word])
        self.bad(2, "--", "5", words=["'5' is not an option"])
        self.bad(2, "--", "-n", "5", words=["'-n' is not an option"])
        self.bad(2, "two\nlines", words=["'two?lines' is not an option"])

    def test_options_may_be_written_together(self):
        want = self.good("-e", "0", "-n", "3", "-A", ".5")
        self.assertEqual(self.good("-e0", "-n3", "-A.5"), want)
        self.assertEqual(self.good("-n", "9", "-e0", "-A.5", "-n", "3"), want)  # the last counts
        self.bad(2, "-nn", words=["-n", "'n'"])

    def test_a_value_may_look_like_an_option(self):
        self.assertIn("\"-n\"", self.good("-e", "0", "-n", "1", "-i", "-n"))
        self.bad(2, "-n", "-i", words=["-n", "'-i'"])

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
        """It is noticed before the table, the long part of the work, is begun."""
        with open("/dev/full", "wb") as full:
            done = subprocess.run([STEP, MODEL, "-n", "2", "-t", self.path("x.csv")], stdout=full,
                                  stderr=subprocess.PIPE)
        self.assertFalse(os.listdir(self.folder))
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, rb"\Atrain_step: standard output[^\n]*\n\Z")


if __name__ == "__main__":
    unittest.main()
