#!/usr/bin/env python3
"""Tests of the figures that the programs print: each is computed once more, from other outputs.

The logits of a model come from tests/logits, its tokens from tests/tokens, and what a step changed
from the file that -o writes. So a printed number that means something else than it says is found.
"""

import array
import math
import os
import re
import shutil
import struct
import subprocess
import tempfile
import unittest

import test_cli
from naive_tokenizer import read_file
import test_step_cli
from test_cli import CONTEXT, HERE, MODEL, on_a_terminal
from test_step_cli import losses, norm, table

LAB, LOGITS, TOKENS = (os.path.join(HERE, name) for name in ("lab", "logits", "tokens"))
LESSON = "To be, or not to be, that is the question:"
SEQUEL = "\nWhether 'tis nobler in the mind to suffer\nThe slings and arrows"
OTHER = "You need to be able to set clear goals. The weather is nice today."
KINDS = ["att norm", "wq", "wk", "wv", "wo", "FFN norm", "w1", "w3", "w2", "embedding", "final norm"]

# -d and -w, and the shape that they are short for. All of these dose layer 0: the layers above it
# correct so much that this small model writes the same with doses in its middle.
SHAPES = ((["-d", "0"], "ceil:-.1=0,0=1,.1=0"), (["-d", ".1"], "ceil:0=0,.1=1,.2=0"),
          (["-w", ".4"], "ceil:0=0,.4=1,.8=0"), (["-d", ".3", "-w", ".3"], "ceil:0=0,.3=1,.6=0"))


def output(*command, **more):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True,
                          timeout=120, **more).stdout.decode("utf-8", "surrogateescape")


def tokens_of(text):
    return [int(one) for one in output(TOKENS, MODEL, input=text.encode()).split()]


class Known:
    """What a model thinks of each token of a text: probability, rank, and surprise in nats."""

    def __init__(self, model, text):
        self.tokens = tokens_of(text)
        rows = output(LOGITS, model, *map(str, self.tokens[:CONTEXT])).splitlines()
        self.rows = [list(map(float, row.split())) for row in rows]
        self.surprise = []
        for row, token in zip(self.rows, self.tokens[1:]):
            largest = max(row)
            total = math.log(sum(math.exp(x - largest) for x in row)) + largest
            self.surprise.append(total - row[token])

    def rank(self, i):
        return 1 + sum(x > self.rows[i][self.tokens[i + 1]] for x in self.rows[i])

    def mean(self, first=0, last=None):
        part = self.surprise[first:last]
        return sum(part) / len(part)


def tensors(path):
    """Name of a kind, layer -> the floats of hamlet.bin or of what a step made of it."""
    with open(path, "rb") as stream:
        data = stream.read()
    _, dim, hidden, layers, heads, kv_heads, head_dim, vocab = struct.unpack_from("<8i", data, 8)
    q_dim, kv_dim = heads * head_dim, kv_heads * head_dim
    sizes = [vocab * dim] + layers * [
        dim, q_dim * dim, kv_dim * dim, kv_dim * dim, dim * q_dim, dim, hidden * dim, hidden * dim,
        dim * hidden] + [dim]
    names = [("embedding", 0)] + [(kind, layer) for layer in range(layers) for kind in KINDS[:9]]
    found, end = {}, len(data)
    for name, size in zip(reversed(names + [("final norm", 0)]), reversed(sizes)):
        start = (end - 4 * size) // 64 * 64         # each begins at a multiple of 64
        found[name] = array.array("f", data[start:start + 4 * size])
        end = start
    return found


@unittest.skipUnless(os.path.exists(LOGITS) and os.path.exists(TOKENS), "run make test")
class TestStep(test_step_cli.Case):
    def close(self, printed, want, places=4):
        """Printed with four digits behind the point; logits were printed with nine."""
        self.assertAlmostEqual(float(printed), want, delta=.6 * 10 ** -places)

    def test_the_lesson_token_by_token(self):
        """Loss, and token, probability and rank in every row, the first included."""
        out = self.good("-e", "0", "-n", "1")
        known = Known(MODEL, LESSON)
        self.close(re.search(r"loss of (\S+):", out).group(1), known.mean())
        rows = re.findall(r"^ {4}(.{16}) +(\S+) +(\d+)$", out.split("rank\n")[1].split("\n\n")[0],
                          re.M)
        self.assertEqual(len(rows), len(known.tokens) - 1)
        self.assertEqual("".join(row[0].rstrip(" ") for row in rows), " " + LESSON)
        for i, (_, probability, rank) in enumerate(rows):
            self.close(probability, math.exp(-known.surprise[i]), 6)
            self.assertEqual(int(rank), known.rank(i))

    def test_the_gradient_is_what_the_step_changes(self):
        """|g| by layer, by kind and in all: the file of -o differs from the model by size * g."""
        size, path = 1e-2, self.path("stepped.bin")
        out = self.good("-e", str(size), "-n", "1", "-o", path)
        before, after = tensors(MODEL), tensors(path)
        squares = {name: sum((x - y) ** 2 for x, y in zip(before[name], after[name])) / size ** 2
                   for name in before}
        layers = re.search(r"by layer:(.*?)by kind", out, re.S).group(1).split()
        kinds = re.search(r"by kind:(.*?)in all", out, re.S).group(1).split(",")
        self.assertLessEqual(max(map(len, out.split("After one step")[0].splitlines())), 80)
        self.assertEqual(len(layers), 10)
        for layer, printed in enumerate(layers):
            want = sum(squares[kind, layer] for kind in KINDS[:9])
            self.assertAlmostEqual(float(printed) / want ** .5, 1, delta=6e-3)
        self.assertEqual([kind.split()[:-1] for kind in kinds], [kind.split() for kind in KINDS])
        for kind, printed in zip(KINDS, kinds):
            want = sum(square for name, square in squares.items() if name[0] == kind)
            self.assertAlmostEqual(float(printed.split()[-1]) / want ** .5, 1, delta=6e-3)
        self.assertAlmostEqual(float(norm(out)) / sum(squares.values()) ** .5, 1, delta=1e-3)

    def test_losses_after_the_step(self):
        """Lesson, sequel and other text are what the written model thinks of them; first order is
        a straight line."""
        size, path, other = 2e-3, self.path("stepped.bin"), self.path("other.txt", OTHER)
        out = self.good("-e", str(size), "-n", "1", "-o", path, "-g", SEQUEL, "-f", other)
        row = losses(out)["0.002"]
        n_lesson = len(tokens_of(LESSON)) - 1       # BOS is not predicted
        whole = Known(path, LESSON + SEQUEL)
        self.close(row[0], whole.mean(0, n_lesson), 3)
        self.close(row[1], Known(MODEL, LESSON).mean() - size * float(norm(out)) ** 2, 2)
        self.close(row[2], whole.mean(n_lesson), 3)
        self.close(row[3], Known(path, OTHER).mean(), 3)

    def test_only_the_last_prediction(self):
        """-x last: the loss, the only row and the lesson's column are those of the last token."""
        out = self.good("-e", "0", "-n", "1", "-x", "last")
        want = Known(MODEL, LESSON).surprise[-1]
        self.close(re.search(r"loss of (\S+):", out).group(1), want)
        self.close(losses(out)["0"][0], want)
        self.assertEqual(len(out.split("rank\n")[1].split("\n\n")[0].splitlines()), 1)

    def test_a_text_beyond_the_context(self):
        """Of a longer one as much is measured as the context holds, and a token to predict."""
        text = "You must make a good plan. " * 40
        known = Known(MODEL, text)
        self.assertGreater(len(known.tokens), CONTEXT + 1)
        row = losses(self.good("-e", "0", "-n", "1", "-g", text, "-f", self.path("x", text)))["0"]
        self.assertEqual(len(known.surprise), CONTEXT)
        self.close(row[3], known.mean(), 3)
        n_lesson = len(tokens_of(LESSON)) - 1
        self.close(row[2], Known(MODEL, LESSON + text).mean(n_lesson), 3)

    def test_doses_reach_the_lesson_and_nothing_else(self):
        """-d, -w and their defaults change the lesson's loss; what is measured later is sober."""
        def lesson(*arguments):
            out = self.good("-e", "0", "-n", "1", "-H", "1.6", *arguments)
            return out.split("After")[0], losses(out)["0"]
        sober = losses(self.good("-e", "0", "-n", "1"))["0"]
        shown = set()
        for short, shape in SHAPES:
            before, after = lesson(*short)
            self.assertEqual((before, after), lesson("-H", "1.6@" + shape), short)
            self.assertEqual(after[:1] + after[2:], sober[:1] + sober[2:])
            self.assertIn("loss of " + after[1], before)
            shown.add(after[1])
        self.assertEqual(len(shown | {sober[0]}), len(SHAPES) + 1)
        self.assertNotEqual(lesson("-r", "upstream"), lesson())

    def test_every_site_reaches_the_lesson(self):
        shown = {self.good("-e", "0", "-n", "1", "-" + site, ".8").split("After")[0]
                 for site in "HQKVA"}
        self.assertEqual(len(shown), 5)

    def test_the_table_and_the_cure_are_what_drugs_writes(self):
        """A column of no step, and the text of the other prompt, in full length and with -n."""
        for n in "64", "9":
            out = self.good("-e", "0", "-n", n, "-i", "The weather", "-y", "You need")
            self.assertIn('"The weather" goes on like this', out)
            words = [row[0] for row in table(out)[1:]]
            self.assertEqual(words, output(test_cli.DRUGS, MODEL, "-i", "The weather", "-n",
                                           n).split())
            cure = out.split("with a prompt that says what is wanted:\n\n")[1]
            self.assertEqual(cure, output(test_cli.DRUGS, MODEL, "-i", "You need", "-n", n))

    def test_who_may_read_the_files(self):
        """What is written has the rights that every new file of its owner gets, no more and no less."""
        files = [self.path("x.bin"), self.path("x.csv")]
        for mask, rights in (0o022, 0o644), (0o077, 0o600), (0, 0o666):
            old = os.umask(mask)
            self.addCleanup(os.umask, old)
            self.good("-e", "0", "-n", "1", "-o", files[0], "-t", files[1])
            for path in files:
                self.assertEqual(os.stat(path).st_mode & 0o777, rights)
                os.remove(path)

    def test_the_default_texts(self):
        """What is not given is what the help says."""
        plain = self.good("-n", "5")
        self.assertEqual(plain, self.good(
            "-n", "5", "-l", LESSON, "-i", "To be", "-e", "0,1e-4,1e-3,2e-3,3e-3,5e-3,1e-2,1e-1",
            "-x", "all", "-y", "Here is one of Shakespeare's more famous works: To be", "-g",
            "\nWhether 'tis nobler in the mind to suffer\nThe slings and arrows of outrageous "
            "fortune,\nOr to take arms against a sea of troubles,\nAnd by opposing end them. To "
            "die, to sleep,\nNo more; and by a sleep to say we end\nThe heart-ache and the thousand"
            " natural shocks\nThat flesh is heir to: 'tis a consummation\nDevoutly to be wish'd. "
            "To die, to sleep;\nTo sleep, perchance to dream. Ay, there's the rub,\nFor in that "
            "sleep of death what dreams may come."))
        self.assertEqual(self.good("-e", "0"), self.good("-e", "0", "-n", "64"))

    def test_an_option_changes_nothing_else(self):
        """-x only says what counts, -f only what is measured at last."""
        def cure_and_sequel(*more):
            out = self.good("-e", "0", "-n", "5", *more)
            return out.split("The untouched model, with a prompt")[1], losses(out)["0"][2]
        plain = cure_and_sequel()
        self.assertEqual(plain, cure_and_sequel("-x", "all"))
        self.assertEqual(plain, cure_and_sequel("-x", "last"))
        self.assertEqual(plain, cure_and_sequel("-f", self.path("other.txt", OTHER)))

    def test_the_table_fits_the_terminal(self):
        """Columns are as wide as the terminal allows, 6 at least and 16 at most, with a space
        between two of them; the last one is not padded."""
        for window, sizes, width in (80, 4, 16), (40, 4, 10), (20, 4, 6), (0, 8, 12), (0, 3, 16):
            listed = ",".join(str(size) for size in range(sizes))
            status, shown = on_a_terminal(window, test_step_cli.STEP, MODEL, "-n", "12", "-e",
                                          listed)
            self.assertEqual(status, 0)
            lines = shown.split("goes on like this:\n\n")[1].split("\n\n")[0].split("\n")
            self.assertEqual(lines[0], (" " * (width - 1)).join(map(str, range(sizes))))
            for line in lines[1:]:
                for at in range(width, len(line), width):
                    self.assertEqual(line[at - 1], " ", (window, line))
                self.assertEqual(line[:width].strip(), line[:width - 1].strip())
            words = [line[:width].strip() for line in lines[1:]]
            full = output(test_cli.DRUGS, MODEL, "-i", "To be", "-n", "12").split()
            self.assertEqual(words[:len(full)], [
                word if len(word) < width else word[:width - 2] + "…" for word in full])


class TestDrugs(test_cli.Case):
    def figures(self, *arguments, **more):
        return self.good(*arguments, **more).err.splitlines()[-1]

    def test_counts(self):
        """Tokens read and written, seed, showers and reason, with plural."""
        read = len(tokens_of(LESSON))
        for seed, every, showers in ("7", "100", "0 cold showers"), ("8", "6", "1 cold shower"):
            self.assertRegex(
                self.figures("-i", LESSON, "-n", "9", "-s", seed, "-V", ".5", "-c", every),
                r"\Aread %d tokens at [1-9]\d*/s, wrote 9 at [1-9]\d*/s until -n; seed %s; %s\Z"
                % (read, seed, showers))
        for said in b"", b"hello\n":
            figures = self.figures("-m", "chat", "-n", "3", stdin=said)
            self.assertIn("until Ctrl-D; seed 420", figures)

    def test_the_default_length(self):
        """256 tokens, or what the context holds; -c after 420 is never reached here."""
        plain = self.good("-i", "To be")
        self.assertEqual(plain.out, self.good("-i", "To be", "-n", "256", "-V", "0", "-c",
                                              "420").out)
        self.assertRegex(plain.err, r"until (the end of the context|the end of the text \(EOS\)|"
                         r"the start of another text \(BOS\));")

    def test_the_default_top_p(self):
        """-p is .9 if nothing else is said, and matters only with -t."""
        for seed in "1", "2", "3":
            hot = ["-t", "1.5", "-s", seed]
            self.assertEqual(self.text(*hot), self.text(*hot, "-p", ".9"))
        self.assertNotEqual(self.text(*hot), self.text(*hot, "-p", "1"))
        self.assertEqual(self.text("-p", ".1", "-t", "0"), self.text())

    def test_depths_reach_drugged_texts(self):
        """Where a dose acts changes what is written, as does the spread, each with its default."""
        def text(*more):
            return self.good("-i", LESSON[:12], "-n", "40", "-H", *more).out
        texts = [text("1.6", *short) for short, _ in SHAPES]
        self.assertEqual(len(set(texts)), len(texts))
        self.assertEqual(texts, [text("1.6@" + shape) for _, shape in SHAPES])

    def test_texts_from_files(self):
        """-i and -y take @FILE and -, a byte order mark is left out, a zero byte refused."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "prompt.txt")
            with open(path, "wb") as stream:
                stream.write(b"\xef\xbb\xbfTo be")
            want = self.text("-n", "5")
            self.assertEqual(self.good("-i", "@" + path, "-n", "5").out, want)
            self.assertEqual(self.good("-i", "-", "-n", "5", stdin=b"To be").out, want)
            said = b"hello\n"
            self.assertEqual(self.good("-m", "chat", "-n", "5", "-y", "@" + path, stdin=said).out,
                             self.good("-m", "chat", "-n", "5", "-y", "To be", stdin=said).out)
            with open(path, "wb") as stream:
                stream.write(b"To\0be")
            self.bad(1, MODEL, "-i", "@" + path, words=["-i", path, "zero byte"])
            self.bad(1, MODEL, "-i", "@" + folder + "/none", words=["-i", "none", "cannot be read"])

    def test_an_answer_comes_before_the_next_question(self):
        """A program that talks through pipes has the answer as soon as the prompt sign is there."""
        said = self.good("-m", "chat", "-n", "4", stdin=b"hello\n").out
        with subprocess.Popen([test_cli.DRUGS, MODEL, "-m", "chat", "-n", "4"], bufsize=0,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE) as child:
            self.assertEqual(child.stderr.read(2), b"> ")
            child.stdin.write(b"hello\n")
            self.assertEqual(child.stderr.read(2), b"> ")
            os.set_blocking(child.stdout.fileno(), False)
            self.assertEqual((child.stdout.read(4096) or b"").strip(), said.strip())
            child.stdin.close()
            child.stderr.read()

    def test_where_an_answer_is_given(self):
        """The prompt sign and nothing else goes to stderr while one chats."""
        done = self.good("-m", "chat", "-n", "4", stdin=b"hello\nhello\n")
        self.assertRegex(done.err, r"\A> > > \nread \d+ tokens [^\n]*\n\Z")


@unittest.skipUnless(os.path.exists(LAB), "tests/lab is not built: run make tests/lab first")
class TestLab(unittest.TestCase):
    def test_depths_reach_drugged_twins(self):
        """-d, -w and their defaults reach the twins of a probe."""
        def probe(*more):
            return output(LAB, MODEL, "probe", "-i", LESSON[:11], "-n", "40", "-k", "7", "-H", *more)
        shown = [probe("1", *short) for short, _ in SHAPES]
        self.assertEqual(len(set(shown)), len(shown))
        self.assertEqual(shown, [probe("1@" + shape) for _, shape in SHAPES])

    def test_the_map_stands_below_its_heading(self):
        """Every level has its columns: the heading ends where the shades do."""
        lines = output(LAB, MODEL, "trip", "-i", LESSON, "-k", "1", "-V", "1").splitlines()
        heading = lines[6]
        self.assertEqual(heading.split(), ["around", *map(str, range(11)), "largest", "level", "left"])
        for line in lines[7:17]:
            self.assertEqual((line.index("│"), line.rindex("│")), (7, 52))
        at = [match.start() for match in re.finditer(r"\d+", heading)]
        self.assertEqual(at, [8 + 4 * level for level in range(11)])
        for place, line in enumerate(lines[7:17]):          # brackets stand beside dosed levels
            self.assertEqual(line.index("["), 7 + 4 * max(1, place))
            self.assertEqual(line.index("]"), 11 + 4 * min(10, place + 2))

    def test_the_nearest_dose_is_shown(self):
        """Of 0.1, 0.2 ... 1.5 the one that is nearest to what was asked for."""
        for asked, shown in ((1, "1"), (1.5, "1.5"), (.64, "0.6"), (.66, "0.7"), (.01, "0.1")):
            out = output(LAB, MODEL, "trip", "-i", LESSON[:18], "-k", "1", "-V",
                         str(asked))
            self.assertIn("-V %s in a window of 3 layers around each, between brackets.\n"
                          "Mean of 1 seed from 420.\n" % shown, out)
            self.assertIn("\nThe next token, theta %s in that window" % shown, out)

    def test_progress_on_a_terminal(self):
        """It comes on one line, is wiped when all is done, and the rest is as without a terminal but
        for lines that end between words. Tokens are counted to the end."""
        for mode, n, more in (("trip", None, ["-V", "1"]), ("probe", 8, ["-n", "4", "-V", "1"]),
                              ("explore", 512, ["-n", "4"]), ("shower", 40, ["-n", "4", "-V", "1"])):
            command = [LAB, MODEL, mode, "-i", LESSON, "-k", "1", *more]
            shown = on_a_terminal(80, *command, stderr=True)[1]
            *progress, rest = shown.split("\r\033[K")
            lines = re.findall(r"\r(%s|sober text): +(\d+) of (\d+) tokens(?:, +\d+ s left)?" % mode,
                               "".join(progress))
            self.assertEqual(lines[-1][0], mode)
            self.assertEqual([int(line[1]) for line in lines if line[0] == mode][0], 0)
            if n:
                self.assertEqual(int(lines[-1][2]), n)
            self.assertEqual(rest.split(), output(*command).split())
            self.assertLessEqual(max(map(len, rest.splitlines())), 80)

    def test_strengths(self):
        """Those of the sites, of temperature and of noise on the logits; above them stands what the
        sober model writes."""
        out = output(LAB, MODEL, "explore", "-i", "To be", "-k", "1", "-n", "2")
        written = output(test_cli.DRUGS, MODEL, "-i", "To be", "-n", "2")[len("To be "):]
        self.assertTrue(out.startswith("The sober text:\n\n%s\n" % written))
        found = {}
        for line in out.split("log-probability\n")[1].split("\n\n")[0].splitlines():
            found.setdefault(line[:12].strip(), []).append(float(line[12:21]))
        angles = [.01, .05, .1, .15, .2, .35, .5, .8, 1]
        self.assertEqual(found.pop("temperature"), [.1, .2, .35, .5, .65, .8, 1, 1.25, 1.5])
        self.assertEqual(found.pop("sober"), [0])
        self.assertEqual(found.pop("logit noise"), [.1, .25, .5, .75, 1, 1.5, 2, 3, 4])
        self.assertLessEqual(set("HQKVA"), set(found))
        for site, strengths in found.items():
            self.assertEqual(strengths, angles, site)

    def test_defaults(self):
        """Five seeds from 420 on, angles up to 1.5."""
        for mode, more in ("probe", ["-n", "8", "-V", "1"]), ("trip", []):
            command = [LAB, MODEL, mode, "-i", "To be, or not to be", *more]
            widest = ["-x", "1.5"] if mode == "trip" else []
            self.assertEqual(output(*command), output(*command, "-k", "5", "-s", "420", *widest))
            self.assertEqual(output(*command), output(*command, "-r", "centred"))


class TestOddModels(test_step_cli.Case):
    """Models that are in order but lack something, and places where nothing can be written."""

    def model_with(self, place, value):
        """hamlet.bin with a number of its header changed."""
        data = bytearray(self.content(MODEL))
        struct.pack_into("<i", data, place, value)
        with open(self.path("odd.bin"), "wb") as stream:
            stream.write(data)
        return self.path("odd.bin")

    def refused(self, program, *arguments, words=(), out=""):
        done = test_step_cli.run(*arguments, program=program)
        self.assertEqual((done.status, done.out), (1, out), done)
        self.assertRegex(done.err, r"\A[a-z_]+: [^\n]+\n\Z")
        for word in words:
            self.assertIn(word, done.err)

    def test_a_model_without_bos(self):
        """It writes behind a prompt, and without one says why it cannot."""
        model = self.model_with(60, -1)
        self.refused(test_cli.DRUGS, model, "-n", "5", words=["no BOS", "-i"])
        text = output(test_cli.DRUGS, model, "-n", "5", "-i", "To be")
        self.assertTrue(text.startswith("To be") and len(text) > 6, text)

    def test_a_model_that_does_not_chat(self):
        """Its file has no form of a chat; it writes texts as before."""
        model = self.path("odd.bin")
        with open(model, "wb") as stream:
            stream.write(test_cli.with_chat())
        self.refused(test_cli.DRUGS, model, "-m", "chat", words=["chat", "-i"])
        command = ["-i", "To be", "-n", "20"]
        self.assertEqual(output(test_cli.DRUGS, model, *command),
                         output(test_cli.DRUGS, MODEL, *command))

    def test_control_pieces_of_a_prompt(self):
        """With -x they are meant, without it they are text like any other."""
        def read(*more):
            done = test_step_cli.run(MODEL, "-i", "be</s>", "-n", "1", *more,
                                     program=test_cli.DRUGS)
            return int(re.search(r"read (\d+) tokens", done.err).group(1))
        self.assertEqual(read("-x"), len(tokens_of("be")) + 1)
        self.assertEqual(read(), len(tokens_of("be</s>")))
        self.assertGreater(read(), read("-x"))
        self.assertEqual(read(), read("-u", "-V", "0"))     # another matter

    def test_the_default_length_in_a_long_context(self):
        """256 tokens, where the context holds more and nothing ends the text."""
        data, model = self.content(self.model_with(40, 600)), self.path("endless.bin")
        file, end = read_file(data), 5
        kind = file.end - file.n_text - 4 * (file.n_words + file.n_whole) - 8 * (file.vocab + 6) + 20
        self.assertEqual((file.pieces[2], data[kind]), ((end, b"</s>"), end))
        with open(model, "wb") as stream:
            stream.write(data[:kind] + b"\1" + data[kind + 1:])         # a control piece like others
        done = test_step_cli.run(model, "-i", "To be", program=test_cli.DRUGS)
        self.assertRegex(done.err, "wrote 256 at .* until -n")
        probe = output(LAB, model, "probe", "-i", "To be", "-V", "0", "-k", "1")
        self.assertEqual(len(probe.splitlines()), 256 + 1)      # and a heading

    def test_a_model_that_overflows(self):
        """A weight that is not a number is found by every program."""
        data = bytearray(self.content(MODEL))
        place = len(data) - 64 * 12                 # in the last layer's w2
        data[place:place + 4] = b"\x00\x00\xc0\x7f"
        with open(self.path("nan.bin"), "wb") as stream:
            stream.write(data)
        text = [self.path("nan.bin"), "-i", LESSON, "-n", "4"]
        self.refused(test_cli.DRUGS, *text, words=["not finite"], out=LESSON)
        self.refused(test_step_cli.STEP, *text, words=["not finite"])
        for mode in "trip", "probe", "explore":
            self.refused(LAB, *text[:1], mode, *text[1:3 if mode == "trip" else 5],
                         words=["not finite"])

    def test_a_place_that_is_no_file(self):
        """A folder and a pipe are no places for a model or a table."""
        os.mkdir(self.path("x.bin"))
        os.mkfifo(self.path("x.csv"))
        for option, name in ("-o", "x.bin"), ("-t", "x.csv"):
            self.refused(test_step_cli.STEP, MODEL, "-e", "0", "-n", "1", option, self.path(name),
                         words=[name, "not a regular file"])
        self.assertEqual(sorted(os.listdir(self.folder)), ["x.bin", "x.csv"])

    def test_closed_standard_streams(self):
        """What is written to a file is the same when nobody listens, and nothing else gets into it."""
        step = [test_step_cli.STEP, MODEL, "-e", "1e-3", "-n", "2", "-o"]
        lab = [LAB, MODEL, "explore", "-i", "To be", "-n", "2", "-k", "1", "-o"]    # it says much
        for command, ending in (step, ".bin"), (lab, ".csv"):
            one, other = self.path("a" + ending), self.path("b" + ending)
            subprocess.run([*command, one], check=True, timeout=60, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
            subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command, other],
                           check=True, timeout=60)
            self.assertEqual(self.content(one), self.content(other))

    @unittest.skipUnless(os.path.exists("/dev/full"), "there is no /dev/full")
    def test_a_full_disk(self):
        with open("/dev/full", "wb") as full:
            done = subprocess.run([LAB, MODEL, "trip", "-i", LESSON, "-k", "1"], stdout=full,
                                  stderr=subprocess.PIPE, timeout=60)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, rb"\Alab: standard output[^\n]*\n\Z")


class TestSentences(test_step_cli.Case):
    """A request for what cannot be is answered in one line, with the right names and numbers."""

    def said(self, status, sentence, program, *arguments, **more):
        done = test_step_cli.run(*arguments, program=program, **more)
        name = os.path.basename(program)
        self.assertEqual((done.status, done.err), (status, "%s: %s\n" % (name, sentence)), arguments)

    def test_values_of_options(self):
        """Of all programs alike; bounds are named where there are some."""
        wide, angle = "from 0 to 268435456", "radians (degrees / 57.3)"
        shape = "-V takes a shape like .3@ceil:.2=0,.4=1,.6=0 (at most 16 points), got "
        for sentence, *arguments in (
                ("-n takes a number of tokens %s, got '-1'" % wide, "-n", "-1"),
                ("-n takes a number of tokens, a whole number, got '1.5'", "-n", "1.5"),
                ("-n takes a number of tokens %s, got 'many'" % wide, "-n", "many"),
                ("-c takes a number of tokens %s, got '268435457'" % wide, "-c", "268435457"),
                ("-t takes a temperature from 0 to 1000, got '-.1'", "-t", "-.1"),
                ("-p takes a probability from 0 to 1, got '1.1'", "-p", "1.1"),
                ("-d takes a depth from 0 to 1, got '2'", "-d", "2"),
                ("-w takes a spread from 0 to 1, got '-1'", "-w", "-1"),
                ("-s takes a seed from 0 to 1e+15, got 'inf'", "-s", "inf"),
                ("-H takes %s from 0 to 3.1416, got '30'" % angle, "-H", "30"),
                ("-H takes %s from 0 to 3.1416, got '0,3'; a point is the decimal sign" % angle,
                 "-H", "0,3"),
                ("-A takes %s from 0 to 3.1416, got 'x'" % angle, "-A", "x@ceil:0=1"),
                (shape + "'.3@flat:0=1'", "-V", ".3@flat:0=1"),
                ("-r takes centred or upstream, got 'left'", "-r", "left"),
                ("-m takes generate or chat, got 'talk'", "-m", "talk"),
                ("-n needs a value; drugs -h lists the options", "-n"),
                ("'-z' is not an option; drugs -h lists them", "-z"),
                ("'be' is not an option; a text of several words goes in quotes", "-i", "To", "be"),
                ("-y needs -m chat", "-y", "Be brief.")):
            self.said(2, sentence, test_cli.DRUGS, MODEL, *arguments)
        self.said(2, "the model file comes first; drugs -h lists what follows",
                  test_cli.DRUGS, "-n", "5")
        for sentence, *arguments in (
                ("-e takes step sizes like 0,1e-3 from 0 to 1000, got '1001'", "-e", "0,1001"),
                ("-e takes step sizes like 0,1e-3 from 0 to 1000, got 'x'", "-e", "0,x,1"),
                ("-e takes step sizes like 0,1e-3, got '0,001'; a point is the decimal sign", "-e",
                 "0,001"),
                ("-e takes at most 64 step sizes", "-e", ",".join(["0"] * 65)),
                ("-n takes a number of tokens from 1 to 1048576, got '0'", "-n", "0"),
                ("-x takes all or last, got 'first'", "-x", "first"),
                ("-o needs one step size, -e, as it writes one model", "-o", self.path("x.bin"))):
            self.said(2, sentence, test_step_cli.STEP, MODEL, *arguments)
        for sentence, *arguments in (
                ("-k takes a number of seeds from 1 to 1000, got '0'", "-k", "0"),
                ("-x takes %s from 1e-06 to 3.1416, got '0'" % angle, "-x", "0"),
                ("-n takes a number of tokens %s, got '-1'" % wide, "-n", "-1"),
                ("-n needs another experiment: a trip writes nothing", "-n", "1"),
                ("-V needs to be the only dose: a trip looks at one site", "-V", "1", "-A", "1"),
                ("-K 2 is beyond the trip's largest angle, -x 1.5", "-K", "2"),
                ("-o takes a file that ends in one of: .csv; got 'x.svg'", "-o", "x.svg")):
            self.said(2, sentence, LAB, MODEL, "trip", "-i", LESSON, *arguments)
        self.said(2, "after the model comes trip, probe, explore or shower, got 'trap'", LAB, MODEL, "trap")
        self.said(2, "the model file comes first; lab -h lists what follows",
                  LAB, "-k", "trip")

    def test_texts_that_do_not_fit(self):
        """Too short or too long, for what is asked."""
        long = "To" + " be" * CONTEXT
        n = len(tokens_of(long))
        self.assertEqual(n, CONTEXT + 2)
        step, needs = [test_step_cli.STEP, MODEL, "-e", "0"], "it needs 1 to %d for this model"
        for sentence, *command in (
                ("-i has %d tokens, the model's context only %d" % (n, CONTEXT),
                 test_cli.DRUGS, MODEL, "-i", long),
                ("-i has %d tokens, " % n + needs % (CONTEXT - 1), *step, "-i", long),
                ("-y has %d tokens, " % n + needs % (CONTEXT - 1), *step, "-y", long),
                ("-l has %d tokens, the model's context only %d" % (n, CONTEXT), *step, "-l", long),
                ("-l: a lesson needs two tokens, one to predict the other", *step, "-l", ""),
                ("-i: 2 tokens, and the first 6 are never turned, so nothing can be dosed; use a "
                 "longer prompt", LAB, MODEL, "trip", "-i", "be"),
                ("-i has %d tokens, the model's context only %d" % (n, CONTEXT),
                 LAB, MODEL, "trip", "-i", long),
                ("-i has %d tokens, " % n + needs % (CONTEXT - 1), LAB, MODEL, "probe", "-i", long)):
            self.said(1, sentence, *command)
        # As many as fit are taken, and no more.
        self.assertIn("loss of", output(*step, "-n", "1", "-l", long[:-3]))
        probe = [MODEL, "probe", "-n", "1", "-V", "0", "-k", "1", "-i"]
        self.assertTrue(output(LAB, *probe, long[:-9]))
        self.assertEqual(test_step_cli.run(*probe, long[:-6], program=LAB).status, 1)

    def test_files(self):
        """What cannot be read or written, and why."""
        none, folder = self.path("none"), self.path("folder.csv")
        model, link = self.path("model.csv"), self.path("link.csv")
        shutil.copy(MODEL, model)
        os.symlink(none, link)
        os.mkdir(folder)
        zero = self.path("zero", "a\0b")
        step, missing = [test_step_cli.STEP, MODEL, "-e", "0"], "No such file or directory"
        for status, sentence, *command in (
                (1, none + ": cannot be opened: No such file or directory", test_cli.DRUGS, none),
                (1, none + ": cannot be opened: No such file or directory", test_step_cli.STEP, none),
                (1, none + ": cannot be opened: No such file or directory", LAB, none, "trip"),
                (1, folder + ": is empty or not a regular file", test_cli.DRUGS, folder),
                (1, "-i: %s cannot be read: %s" % (none, missing), test_cli.DRUGS, MODEL, "-i",
                 "@" + none),
                (1, "-f: %s cannot be read: %s" % (none, missing), *step, "-f", none),
                (1, "-g: %s has a zero byte in it; save it as UTF-8 text" % zero, *step, "-g",
                 "@" + zero),
                (2, "-t takes a file that ends in one of: .csv .md; got 'x'", *step, "-t", "x"),
                (2, "-a would overwrite the model, " + model, test_step_cli.STEP, model, "-a", model),
                (1, folder + " cannot be written: it is not a regular file", *step, "-t", folder),
                (1, link + " cannot be written: " + missing, *step, "-t", link),
                (1, none + "/x.csv cannot be written: " + missing, *step, "-a", none + "/x.csv")):
            self.said(status, sentence, *command)
        place = os.open(self.folder, os.O_RDONLY)
        self.addCleanup(os.close, place)
        done = subprocess.run([test_cli.DRUGS, MODEL, "-m", "chat"], stdin=place,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
        self.assertEqual((done.returncode, done.stderr.decode()),
                         (1, "> drugs: standard input cannot be read\n"))


if __name__ == "__main__":
    unittest.main()
