#!/usr/bin/env python3
"""Tests of the experiments that tests/lab runs, on the small model tests/hamlet.bin.

    make test, or: make && make tests/lab && python3 -m unittest discover tests/unit
"""

import csv
import os
import re
import shutil
import subprocess
import tempfile
import unittest

from test_cli import CONTEXT, HERE, MODEL, Done, on_a_terminal, run as run_drugs, without_numbers

LAB = os.path.join(HERE, "lab")
LAYERS = 10                             # of this model
PROMPT = "To be, or not to be"
MODES = {"trip": ["-k", "2"], "probe": ["-n", "12", "-A", "1.6"], "explore": ["-n", "8", "-k", "2"],
         "shower": ["-n", "40", "-k", "4", "-H", ".8"]}


def run(*arguments):
    done = subprocess.run([LAB, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=120)
    return Done(done.returncode, done.stdout, done.stderr.decode())


@unittest.skipUnless(os.path.exists(LAB), "tests/lab is not built: run make tests/lab first")
@unittest.skipUnless(os.path.exists(MODEL), "tests/hamlet.bin is not here")
class LabCase(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def path(self, name):
        return os.path.join(self.folder, name)

    def good(self, *arguments):
        done = run(MODEL, *arguments)
        self.assertEqual(done.status, 0, done.err)
        return done

    def bad(self, status, *arguments, words=()):
        """The right status, nothing on stdout, and one line on stderr that has all the words."""
        done = run(*arguments)
        self.assertEqual(done.status, status, (arguments, done))
        self.assertFalse(done.out, arguments)
        self.assertRegex(done.err, r"\Alab: [^\n]+\n\Z", arguments)
        for word in words:
            self.assertIn(word, done.err, arguments)

    def lab(self, mode, *arguments, out=None):
        """What the terminal shows, as text, and if asked what is in the file."""
        arguments = ["-i", PROMPT, *MODES[mode], *arguments]
        if not out:
            return self.good(mode, *arguments).out.decode("utf-8", "surrogateescape")
        path = self.path(out)
        shown = self.good(mode, *arguments, "-o", path).out.decode("utf-8", "surrogateescape")
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as stream:
            return shown, stream.read()

    def table(self, mode, *arguments):
        shown, saved = self.lab(mode, *arguments, out="x.csv")
        return shown, list(csv.DictReader(saved.splitlines(keepends=True)))


class TestModes(LabCase):
    def test_a_dose_of_nothing_changes_nothing(self):
        _, rows = self.table("trip")
        sober = [row for row in rows if row["theta"] == "0"]
        self.assertEqual({row["distance"] for row in sober if row["level"]}, {"0"})
        for row in sober:
            if row["token"]:
                self.assertAlmostEqual(float(row["drugged"]), float(row["sober"]), 6)

    def test_quiet_and_repeatable(self):
        """Without a terminal there are no colours and no progress; a run can be repeated, and what
        goes to a file does not change what is shown."""
        for mode, more in MODES.items():
            done = self.good(mode, "-i", PROMPT, *more)
            self.assertNotRegex(done.out, b"[\x1b\r]", mode)
            texts = mode in ("explore", "shower")
            pattern = r"(\d+) texts, \1 side by side, \d+ MB .*\n" if texts else ""
            self.assertRegex(done.err, r"\A%s\Z" % pattern, mode)
            again, _ = self.lab(mode, out="x.csv")
            self.assertEqual(again, done.out.decode("utf-8", "surrogateescape"), mode)
            self.assertEqual(os.listdir(self.folder), ["x.csv"])

    def test_seeds(self):
        """Every experiment takes its seeds from -s on, and directions from the family."""
        for mode in MODES:
            first = self.table(mode)
            for other in ("-s", "421"), ("-r", "upstream"), ("-k", "3"):
                self.assertNotEqual(self.table(mode, *other), first, (mode, other))


class TestProbe(LabCase):
    def test_numbers(self):
        """The file has what is shown, agreement is a share of the twins, what they said adds up to
        all of them, and the text is what the sober model writes."""
        shown, rows = self.table("probe", "-k", "7")
        lines = shown.splitlines()
        self.assertEqual(list(rows[0]), "position token agreement probability said share".split())
        self.assertEqual(lines.pop(0).split(), "token agreement probability others said".split())
        self.assertEqual(len(lines), 12)
        places = {}
        for row in rows:
            places.setdefault(int(row["position"]), []).append(row)
        first = int(rows[0]["position"])
        self.assertEqual(list(places), list(range(first, first + 12)))
        for said, line in zip(places.values(), lines):
            row = said[0]
            agreement, probability = float(row["agreement"]), float(row["probability"])
            shares = {one["said"]: float(one["share"]) for one in said}
            others = "".join(" %s%s %.0f%%" % ("" if word[:1] == " " else " ", word, 100 * share)
                             for word, share in shares.items() if word != row["token"])
            start = "%-20s %9.0f%% %12.4f" % (row["token"], 100 * agreement, probability)
            self.assertEqual(line[:44], start)
            if line.endswith(" …"):
                self.assertTrue(others.startswith(line[44:-2]) and len(others) > 33, (line, others))
            else:
                self.assertEqual(line[44:], others)
            self.assertLessEqual(len(line), 80)
            self.assertEqual(len(shares), len(said))
            self.assertAlmostEqual(sum(shares.values()), 1, 6)
            self.assertEqual(shares.get(row["token"], 0), agreement)
            self.assertEqual(list(shares.values()), sorted(shares.values(), reverse=True))
            self.assertAlmostEqual(7 * agreement, round(7 * agreement), 6)
            self.assertTrue(0 < probability <= 1 and 0 <= agreement <= 1, row)
        self.assertTrue(any(0 < float(row["agreement"]) < 1 for row in rows), shown)
        text = "".join(said[0]["token"].replace("\\n", "\n") for said in places.values())
        done = run_drugs(MODEL, "-i", PROMPT, "-n", "12")
        self.assertEqual(done.out.decode(), PROMPT + text + "\n")
        self.assertIn("read %s tokens" % rows[0]["position"], done.err)

    def test_sober(self):
        """Without a dose all agree; twins change nothing about the probability."""
        def each(rows):
            return list(dict.fromkeys((row["position"], row["probability"]) for row in rows))
        _, rows = self.table("probe")
        for sober in (["-A", "0"], ["-A", "0", "-s", "7", "-k", "1"]):
            _, same = self.table("probe", *sober)
            self.assertEqual({row["agreement"] for row in same}, {"1"})
            self.assertEqual(each(same), each(rows))

    def test_terminal(self):
        """On a terminal the numbers are the same; progress comes and goes, and has counted what
        there was to do."""
        plain, _ = self.table("probe")
        status, shown = on_a_terminal(80, LAB, MODEL, "probe", "-i", PROMPT, *MODES["probe"],
                                      stderr=True)
        self.assertEqual(status, 0)
        writing, probing, rest = shown.split("\r\033[K")
        self.assertIn("\rsober text:       0 of 12 tokens", writing)
        self.assertIn("\rprobe:       0 of 72 tokens", probing)      # the sober model, and five twins
        self.assertEqual(rest, plain)


class TestTrip(LabCase):
    def test_numbers(self):
        """The file has every passage; without a dose, and below the first dosed layer, the distance
        is exactly 0, above it is not; the table that is shown is made of it."""
        shown, rows = self.table("trip", "-K", ".6", "-x", "3")
        tokens = [row for row in rows if row["token"]]
        rows = [row for row in rows if row["level"]]
        self.assertEqual({row["site"] for row in rows + tokens}, {"K"})
        self.assertEqual(len(rows), 2 * LAYERS * 16 * (LAYERS + 1))
        self.assertEqual(len(tokens), 2 * LAYERS * 16 * 10)
        here = [row for row in tokens if row["theta"] == "0.6" and row["kind"] == "window"
                and row["place"] == str(LAYERS // 2)]
        bars = re.findall(r"^(.{16}) +(\S+) %  +(\S+) %", shown.split("The next token")[1], re.M)
        self.assertEqual(bars, [("%-16s" % row["token"], "%.1f" % (100 * float(row["sober"])),
                                 "%.1f" % (100 * float(row["drugged"]))) for row in here])
        middle, windows = {}, {}
        for row in rows:
            place, level, theta = int(row["place"]), int(row["level"]), float(row["theta"])
            first = max(place - 1, 0) if row["kind"] == "window" else 0
            self.assertEqual(row["distance"] == "0", theta == 0 or level <= first, row)
            if row["kind"] == "window" and place == LAYERS // 2:
                middle.setdefault("%.2f" % theta, []).append(float(row["distance"]))
            if row["kind"] == "window" and row["theta"] == "0.6":
                windows.setdefault(str(place), []).append(float(row["distance"]))
        lines = re.findall(r"^ *(\S+) │.*│ +(\S+) +(\d+) +(\S+)(?: %)?$", shown, re.M)
        want = [(name, "%.3g" % max(x), str(x.index(max(x))),
                 "%.0f" % (100 * x[-1] / max(x)) if max(x) else "-")
                for name, x in [*windows.items(), *list(middle.items())[::3]]]
        self.assertEqual(lines, want)
        ends = [want[0][3], want[LAYERS - 1][3]]
        self.assertIn("Of the first window's peak %s %% is left at the end, of the last one's %s %%:"
                      % tuple(ends), shown)
        self.assertIn("-K 0.6 in a window of 3 layers around each, between brackets.\n"
                      "Mean of 2 seeds from 420.\n", shown)
        self.assertLessEqual(max(map(len, shown.splitlines())), 80)

    def test_default_dose(self):
        """Without a dose it is the attention output's, half the largest angle; one of 0 is none."""
        self.assertEqual(self.lab("trip", "-x", "1"), self.lab("trip", "-x", "1", "-A", ".5"))
        self.assertEqual(self.lab("trip", "-Q", "1"), self.lab("trip", "-Q", "1", "-H", "0"))


class TestExplore(LabCase):
    def test_numbers(self):
        """The file has every text with the numbers of its cell, as they are shown; the likelihoods
        against temperature follow from them."""
        shown, rows = self.table("explore")
        methods = list(dict.fromkeys(row["method"] for row in rows))
        self.assertEqual(methods[:5] + methods[-3:],
                         ["H", "Q", "K", "V", "A", "temperature", "logit noise", "sober"])
        self.assertEqual(len(rows), ((len(methods) - 1) * 9 + 1) * 2)   # strengths, seeds
        sober, table, verdict = re.fullmatch(
            r"The sober text:\n\n(.*?)\n\nmethod [^\n]*\n(.*)\n\nAt the [^:]*:\n\n(.*)\n",
            shown, re.S).groups()
        self.assertLessEqual(max(map(len, table.splitlines())), 80)
        cells = {}
        for i, row in enumerate(rows):
            numbers = [float(row[name]) for name in ("strength", "prefix", "angle", "diversity",
                                                     "log-probability")]
            both = rows[i - i % 2:][:2]
            line = "%-11s %8g %5d/2   %5d %6.0f %6.3f %9.3f %8.4f +- %.4f" % (
                row["method"], numbers[0], int(row["differ"]),
                sum(one["ended"] == "1" for one in both), *numbers[1:], float(row["error"]))
            self.assertEqual(line, table.splitlines()[i // 2])
            self.assertEqual(int(row["seed"]), 420 + i % 2)
            cells.setdefault(row["method"], {})[numbers[0]] = numbers[3:]
            texts = [one["text"] for one in both]
            self.assertEqual(sum(text != sober for text in texts), int(row["differ"]), row)
            prefix = sum(len(os.path.commonprefix([sober, text])) for text in texts) / 2
            self.assertAlmostEqual(numbers[1], prefix)
        self.assertEqual({row["text"] for row in rows if row["strength"] in ("0.01", "0.1")
                          and row["method"] != "H"}, {sober})
        self.assertEqual({row["text"] for row in rows if row["method"] == "sober"}, {sober})
        in_file = {row["method"]: row["gain"] for row in rows}
        self.assertEqual((in_file.pop("sober"), in_file.pop("temperature")), ("nan", "nan"))
        del cells["sober"]
        chance = list(cells.pop("temperature").values())
        want = []
        for method, doses in cells.items():
            gains = []
            for diversity, likelihood in doses.values():
                there = [y + (diversity - x) / (x2 - x) * (y2 - y)
                         for (x, y), (x2, y2) in zip(chance, chance[1:])
                         if x != x2 and min(x, x2) <= diversity <= max(x, x2)]
                gains += [likelihood - max(there)] if there else []
            if gains:
                want.append((method, "%+.4f" % (sum(gains) / len(gains)), str(len(gains))))
        self.assertEqual(re.findall(r"^(\S.*?) +([-+]\S+)  \((\d+) doses?\)$", verdict, re.M), want)
        self.assertEqual([(name, "%+.4f" % float(gain)) for name, gain in in_file.items()
                          if gain != "nan"], [row[:2] for row in want])
        self.assertGreater(len(want), 3)

    def test_markdown(self):
        """Markdown has the cells of the CSV, one text a line."""
        _, rows = self.table("explore")
        _, saved = self.lab("explore", out="x.md")
        lines = [re.split(r"(?<!\\) ?\| ?", line)[1:-1] for line in saved.splitlines()]
        self.assertEqual(lines.pop(0), list(rows[0]))
        self.assertEqual(set(lines.pop(0)), {"---"})
        self.assertEqual([[cell.replace("\\|", "|") for cell in line] for line in lines],
                         [[cell.replace("\n", " ") for cell in row.values()] for row in rows])

    def test_shape(self):
        """A site's shape is kept, its dose is not; what a shape keeps out has no angle."""
        _, rows = self.table("explore", "-V", ".1@ceil:0=0")
        _, plain = self.table("explore")
        for row, other in zip(rows, plain):
            sober = row["method"] in ("V", "temperature", "logit noise", "sober")
            self.assertEqual(row["angle"] == "0", sober, row)
            self.assertTrue(row["method"] == "V" or row == other, row)


class TestShower(LabCase):
    def test_numbers(self):
        """Means, errors and gains follow from the costs of the texts; the texts are what drugs writes
        with the same seed and showers; and what is shown is what is in the file."""
        shown, rows = self.table("shower", "-s", "2")
        cells = {}
        for row in rows:
            cells.setdefault(row["every"], []).append(row)
        self.assertEqual(list(cells), ["0", "30", "10", "3"])
        never = [float(row["cost"]) for row in cells["0"]]
        lines = dict(re.findall(r"^(never|every \d+) +(\d.*)$", shown, re.M))
        for every, mine in cells.items():
            self.assertEqual([row["seed"] for row in mine], ["2", "3", "4", "5"])
            costs = [float(row["cost"]) for row in mine]
            gains = [a - b for a, b in zip(never, costs)]
            mean, error, gain, gain_error = (float(mine[0][name]) for name in
                                             ("mean", "error", "gain", "gain error"))
            for got, numbers in ((mean, error), costs), ((gain, gain_error), gains):
                want = sum(numbers) / 4
                self.assertAlmostEqual(got[0], want, 7)
                self.assertAlmostEqual(got[1], (sum((x - want) ** 2 for x in numbers) / 12) ** .5, 7)
            better = sum(x > 0 for x in gains)
            self.assertEqual(int(mine[0]["better"]), better)
            line = "%.2f +- %.2f" % (mean, error)
            if every != "0":
                line += " %.2f +- %.2f %d of 4" % (gain, gain_error, better)
            name = "every " + every if every != "0" else "never"
            self.assertEqual(lines[name].split(), line.split(), shown)
            for row in mine:
                done = run_drugs(MODEL, "-i", PROMPT, "-n", "40", "-H", ".8", "-s", row["seed"], "-c",
                                 every)
                self.assertEqual(done.out.decode(), "%s%s\n" % (PROMPT, row["text"]))
                self.assertEqual("until -n" not in done.err, row["ended"] == "1")
        self.assertGreater(len({row["text"] for row in rows}), 8)
        typical, = {row["seed"] for row in rows if row["typical"] == "1"}
        self.assertIn("\nSeed %s, " % typical, shown)
        self.assertIn("the sober text itself costs %.2f" % float(rows[0]["sober"]), shown)

    def test_a_dose_is_needed(self):
        self.bad(2, MODEL, "shower", "-i", PROMPT, words=["a shower needs", "-H .8"])


class TestErrors(LabCase):
    def test_help(self):
        """It names every experiment and option; without an experiment it is shown as an error."""
        done = run("-h")
        self.assertEqual((done.status, done.err), (0, ""))
        for word in *MODES, *("-" + letter for letter in "HQKVAdwsrinkxoh"):
            self.assertRegex(done.out.decode(), r"(?m)^  (.* )?%s\b" % word)
        for help in "-h", "--help":
            for words in [], [MODEL], [MODEL, "trip"], [MODEL, "probe", "-k", "2"]:
                self.assertEqual(run(*words, help), done, words)
        for none in [], [MODEL]:
            self.assertEqual(run(*none), Done(2, b"", done.out.decode()), none)

    def test_experiments(self):
        for word in "trips", "", "-V", "Trip":
            self.bad(2, MODEL, word, "-i", PROMPT, words=["'%s'" % word])
        self.bad(2, "-V", MODEL, "trip", words=["the model file comes first"])
        self.bad(1, self.path("none.bin"), "trip", words=["none.bin"])

    def test_options_of_drugs(self):
        """What would change nothing here is refused."""
        for mode in MODES:
            for option in "-m", "-c", "-t", "-p", "-y", "-u", "-z":
                self.bad(2, MODEL, mode, option, "0", words=["'%s'" % option, "not an option"])
        self.bad(2, MODEL, "trip", "-i", PROMPT, "word", words=["'word'", "not an option"])
        for option in "inkxoHQKVAdwrs":
            self.bad(2, MODEL, "trip", "-" + option, words=["-" + option, "needs a value"])

    def test_options_without_effect(self):
        """Nor is an option taken in an experiment that makes nothing of it."""
        shape = ".1@ceil:0=0"
        for mode, needs, *options in (
                ("trip", "-n needs another experiment", "-n", "4"),
                ("trip", "-d needs another experiment", "-V", "1", "-d", ".5"),
                ("trip", "-w needs another experiment", "-V", "1", "-w", ".5"),
                ("trip", "-V needs no shape", "-V", shape),
                ("probe", "-x needs trip", "-x", "1"),
                ("explore", "-x needs trip", "-x", "1"),
                ("probe", "-d needs a dose without a shape", "-V", shape, "-d", ".5"),
                ("probe", "-w needs a dose without a shape", "-w", ".5"),
                ("probe", "-k needs a dose", "-k", "2"), ("probe", "-s needs a dose", "-s", "2"),
                ("probe", "-r needs a dose", "-r", "upstream"),
                ("explore", "-A needs a shape", "-A", ".7")):
            self.bad(2, MODEL, mode, "-i", PROMPT, *options, words=[needs])
        self.good("explore", "-i", PROMPT, "-n", "2", "-k", "1", "-d", ".5")    # of all its doses
        self.good("probe", "-i", PROMPT, "-n", "2")

    def test_values(self):
        """What is wrong is named on one line, and nothing is left behind."""
        trip = [MODEL, "trip", "-i", PROMPT, "-o", self.path("x.csv")]
        wrong = {"-k": ("0", "x", "1.5", "1001", "-1", "nan", ""), "-V": ("nan",),
                 "-x": ("0", "nan", "inf", "-1", "90", "x"), "-n": ("-1", "1.5", "x")}
        for option, values in wrong.items():
            for value in values:
                self.bad(2, *trip, option, value, words=[option, "'%s'" % value])
        self.bad(2, *trip, "-V", ".1", "-A", ".1", words=["-V", "only dose", "trip"])
        self.bad(2, *trip, "-V", "1.6", words=["-V 1.6", "-x 1.5"])
        self.bad(1, MODEL, "trip", "-o", self.path("x.csv"), "-i", "ab",
                 words=["-i", "nothing can be dosed"])
        self.assertEqual(os.listdir(self.folder), [])

    def test_endings(self):
        """Each experiment writes its own kinds of files."""
        for mode, endings in {"trip": (".svg", ".md", ""), "probe": (".svg", ".md", ""),
                              "explore": (".svg", ".txt", ""), "shower": (".md", "")}.items():
            for name in *("x" + ending for ending in endings), "csv":
                path = self.path(name)
                self.bad(2, MODEL, mode, "-i", PROMPT, *MODES[mode], "-o", path,
                         words=["-o", path, ".csv"])
        self.assertEqual(os.listdir(self.folder), [])

    def test_the_model_is_not_overwritten(self):
        """Not even if it is called like a table."""
        model = self.path("model.csv")
        shutil.copy(MODEL, model)
        for mode, more in MODES.items():
            self.bad(2, model, mode, "-i", PROMPT, *more, "-o", model, words=["-o", model])
        with open(model, "rb") as ours, open(MODEL, "rb") as theirs:
            self.assertEqual(ours.read(), theirs.read())
        self.assertEqual(os.listdir(self.folder), ["model.csv"])

    def test_a_prompt_that_does_not_fit(self):
        """It is refused, and no part of a file is left behind."""
        for mode in MODES:
            with self.subTest(mode):
                path = self.path(mode + ".csv")
                dose = [] if mode == "explore" else ["-H", ".8"]
                self.bad(1, MODEL, mode, "-o", path, *dose, "-i", "x y " * CONTEXT, words=["-i"])
                self.assertEqual([name for name in os.listdir(self.folder) if mode in name], [])

    def test_a_model_that_is_not_in_order(self):
        """What is no number ends every experiment with one line, and leaves no file."""
        path = self.path("nan.bin")
        with open(path, "wb") as stream:
            stream.write(without_numbers(.5))
        for mode, more in MODES.items():
            with self.subTest(mode):
                self.bad(1, path, mode, "-i", PROMPT, *more, "-o", self.path("x.csv"),
                         words=["not finite"])
                self.assertEqual(os.listdir(self.folder), ["nan.bin"])

    def test_closed_streams(self):
        """A stream that is closed is no place for a table: its file is as it always is."""
        for mode, more in MODES.items():
            _, want = self.lab(mode, out="x.csv")
            for redirections in ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-":
                path = self.path("y.csv")
                subprocess.run(["sh", "-c", '"$0" "$@" ' + redirections, LAB, MODEL, mode, "-i",
                                PROMPT, *more, "-o", path], stdin=subprocess.DEVNULL, check=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
                with open(path, newline="", encoding="utf-8", errors="surrogateescape") as stream:
                    self.assertEqual(stream.read(), want, (mode, redirections))
                os.remove(path)

    def test_prompts_from_files(self):
        """-i @file and -i - are what they are for drugs."""
        path = self.path("prompt.txt")
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(PROMPT)
        want = self.good("probe", "-i", PROMPT, *MODES["probe"])
        self.assertEqual(self.good("probe", "-i", "@" + path, *MODES["probe"]), want)
        with open(path, "rb") as stream:
            done = subprocess.run([LAB, MODEL, "probe", "-i", "-", *MODES["probe"]], stdin=stream,
                                  stdout=subprocess.PIPE, check=True, timeout=120)
        self.assertEqual(done.stdout, want.out)
        self.bad(1, MODEL, "probe", "-i", "@" + path + "x", words=["-i", path, "cannot be read"])

    def test_nowhere(self):
        """A file that cannot be written is refused before any work."""
        path = os.path.join(self.folder, "missing", "x.csv")
        for mode, more in MODES.items():
            self.bad(1, MODEL, mode, "-i", PROMPT, *more, "-o", path, words=[path])
        self.assertEqual(os.listdir(self.folder), [])


if __name__ == "__main__":
    unittest.main()
