#!/usr/bin/env python3
"""Tests of the command line of ./drugs, on the small model tests/hamlet.bin.

    make && python3 -m unittest discover tests/unit
"""

import collections
import fcntl
import os
import pty
import re
import struct
import subprocess
import tempfile
import termios
import unittest

from naive_tokenizer import read_file

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))      # tests/, with the programs
DRUGS = os.path.join(os.path.dirname(HERE), "drugs")
MODEL = os.path.join(HERE, "hamlet.bin")
CONTEXT = 160                           # of this model, in tokens

Done = collections.namedtuple("Done", "status out err")
NAN = b"\x00\x00\xc0\x7f"


def content(path=MODEL):
    with open(path, "rb") as stream:
        return stream.read()


def without_numbers(share=1):
    """The small model with a NaN for one of its weights, the last gain of the final norm or one
    that lies at this share of the file."""
    data = content()
    behind = int(share * len(data)) // 4 * 4
    return data[:behind - 4] + NAN + data[behind:]


def with_chat(*strings):
    """The small model with another form of a chat: six strings, or none."""
    data, file = content(), read_file(content())
    at = file.end - file.n_text - 4 * (file.n_words + file.n_whole)     # where the strings' ends end
    ends = at - 8 * (6 + file.n_cutters)        # of the chat; its text is the last one
    first, = struct.unpack_from("<i", data, ends - 8)
    lengths = [len(string) for string in strings or 6 * [b""]]
    table = b"".join(struct.pack("<ii", first + sum(lengths[:n + 1]), 0) for n in range(6))
    tables = data[:ends] + table + data[at:file.end - file.n_text + first] + b"".join(strings)
    tables = tables[:104] + struct.pack("<i", first + sum(lengths)) + tables[108:]
    return tables + bytes(-len(tables) % 64) + data[-(-file.end // 64) * 64:]


def run(*arguments, stdin=b"", stdout=subprocess.PIPE):
    done = subprocess.run([DRUGS, *arguments], input=stdin, stdout=stdout, stderr=subprocess.PIPE,
                          timeout=60)
    return Done(done.returncode, done.stdout, done.stderr.decode())


def on_a_terminal(width, *command, stderr=False):
    """What a program prints on a terminal of so many columns, 0 if that does not say, with what it
    says on stderr or not."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, width, 0, 0))
    errors = theirs if stderr else subprocess.DEVNULL
    with subprocess.Popen(command, stdout=theirs, stderr=errors) as child:
        os.close(theirs)
        got = b""
        try:
            while True:
                got += os.read(ours, 4096)
        except OSError:                             # the other end is closed
            os.close(ours)
    return child.returncode, got.decode().replace("\r\n", "\n")


@unittest.skipUnless(os.path.exists(DRUGS), "./drugs is not built: run make first")
@unittest.skipUnless(os.path.exists(MODEL), "tests/hamlet.bin is not here")
class Case(unittest.TestCase):
    def path(self, name, data=None):
        """In a folder of this test alone; with these bytes, if there are any."""
        if not hasattr(self, "folder"):
            folder = tempfile.TemporaryDirectory()
            self.addCleanup(folder.cleanup)
            self.folder = folder.name
        path = os.path.join(self.folder, name)
        if data is not None:
            with open(path, "wb") as stream:
                stream.write(data)
        return path

    def good(self, *arguments, **more):
        done = run(MODEL, *arguments, **more)
        self.assertEqual(done.status, 0, done.err)
        return done

    def text(self, *arguments):
        return self.good("-i", "To be", *arguments).out

    def bad(self, status, *arguments, words=(), **more):
        """The right status, nothing on stdout, and one line on stderr that has all the words."""
        done = run(*arguments, **more)
        self.assertEqual(done.status, status, (arguments, done))
        self.assertFalse(done.out, arguments)
        self.assertRegex(done.err, r"\Adrugs: [^\n]+\n\Z", arguments)
        for word in words:
            self.assertIn(word, done.err, arguments)


class TestGenerate(Case):
    def test_a_sober_model_always_says_the_same(self):
        self.assertEqual(self.text("-n", "10"),
                         b"To be a successful business owner, you need to be able\n")

    def test_a_drugged_model_says_something_else(self):
        self.assertNotEqual(self.text("-n", "48", "-V", ".7"), self.text("-n", "48"))
        self.assertEqual(self.text("-n", "48", "-V", ".7"), self.text("-n", "48", "-V", ".7"))

    def test_text_and_figures(self):
        done = self.good("-i", "To be", "-n", "5")
        self.assertTrue(done.out.startswith(b"To be"), done.out)
        self.assertTrue(done.out.endswith(b"\n"), done.out)
        self.assertRegex(done.err, r"\Aread \d+ tokens at \d+/s, wrote 5 at \d+/s until -n; "
                         r"seed 420; 0 cold showers\n\Z")

    def test_the_text_comes_before_the_figures(self):
        """Also where both go the same way, and with the end of its line."""
        for arguments in ["-i", "To be"], ["-m", "chat"]:
            done = subprocess.run([DRUGS, MODEL, "-n", "3", *arguments], stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
            self.assertRegex(done.stdout.decode(), r"\A(To be [^\n]*|> )\nread \d+ [^\n]*\n\Z")

    def test_limits(self):
        lengths = []
        for limit in 1, 10, 50:
            done = self.good("-i", "To be", "-n", str(limit))
            self.assertIn("wrote %d at" % limit, done.err)
            lengths.append(len(done.out))
        self.assertEqual(lengths, sorted(set(lengths)))
        long = "Hamlet speaks: " * 9 + "To be, or not to be, that is the question:"
        done = self.good("-i", long, "-n", "0")
        read, wrote = map(int, re.search(r"read (\d+) .* wrote (\d+) ", done.err).groups())
        self.assertEqual(read + wrote, CONTEXT + 1)         # the last one needs no room
        self.assertIn("until the end of the context", done.err)
        self.assertEqual(self.good("-i", long, "-n", "9999").out, done.out)

    def test_seeds(self):
        for drug in (["-V", ".7"], ["-t", "1"], ["-t", ".8", "-p", "1"], ["-H", ".7", "-u"]):
            first = self.text(*drug, "-s", "1")
            self.assertEqual(self.text(*drug, "-s", "1"), first, drug)
            self.assertNotEqual(self.text(*drug, "-s", "2"), first, drug)
        self.assertEqual(self.text("-t", "0", "-s", "1"), self.text("-V", "0", "-s", "2"))
        self.assertEqual(self.text("-t", "1", "-p", "0"), self.text())

    def test_unprotected(self):
        def text(*more):
            return self.good("-i", "To be, or not to be, that is the question:", "-n", "20",
                             "-V", "1.5", *more).out
        self.assertNotEqual(text("-u"), text())

    def test_no_dose_is_sober(self):
        zeros = [word for site in "HQKVA" for word in ("-" + site, "0")]
        sober = self.text()
        for more in ([], ["-u"], ["-s", "7"], ["-d", ".4"], ["-c", "3"], ["-r", "upstream"]):
            self.assertEqual(self.text(*zeros, *more), sober, more)
        self.assertEqual(self.text("-V", ".7@ceil:0=0"), sober)
        for site in "HQKVA":
            self.assertNotEqual(self.text("-" + site, "1.5"), sober, site)
        self.assertNotEqual(self.text("-V", ".7", "-r", "upstream"), self.text("-V", ".7"))

    def test_depth_and_spread_are_short_for_a_shape(self):
        for short, shape in ((["-d", ".5", "-w", ".25"], "ceil:.25=0,.5=1,.75=0"),
                             (["-d", ".3", "-w", ".1"], "ceil:.2=0,.3=1,.4=0"),
                             (["-d", ".5"], "ceil:.4=0,.5=1,.6=0"),
                             (["-w", ".2"], "ceil:.2=0,.4=1,.6=0")):
            self.assertEqual(self.text("-V", "1", *short), self.text("-V", "1@" + shape), shape)
        full = "1@floor:0=1,.5=0"                           # a shape of its own goes before both
        self.assertEqual(self.text("-V", full, "-A", "0", "-d", ".9"), self.text("-V", full))
        self.assertEqual(self.text("-V", "1@interpolate:.8=0,0=1"),
                         self.text("-V", "1@interpolate:0=1,.8=0"))

    def test_cold_showers(self):
        def showers(*arguments):
            done = self.good("-i", "To be", "-n", "60", *arguments)
            return int(re.search(r"(\d+) cold shower", done.err).group(1))
        self.assertEqual(showers("-V", ".7", "-c", "10"), 5)
        self.assertEqual(showers("-V", ".7", "-c", "7"), 8)     # the 59 tokens that are read
        self.assertEqual(showers("-V", ".7", "-c", "0"), 0)
        self.assertEqual(showers("-V", "0", "-c", "10"), 0)     # nothing to wash off
        self.assertNotEqual(self.text("-H", ".7", "-c", "1"), self.text("-H", ".7", "-c", "0"))


class TestTexts(Case):
    """Where a prompt comes from, and what is meant in it."""

    def read(self, *arguments, **more):
        """How many tokens of prompt are read, and what is printed."""
        done = self.good("-n", "5", *arguments, **more)
        return int(re.search(r"read (\d+) ", done.err).group(1)), done.out

    def test_files(self):
        want = self.read("-i", "To be")
        for data in b"To be", b"\xef\xbb\xbfTo be":        # which some editors put in front
            self.assertEqual(self.read("-i", "@" + self.path("x.txt", data)), want, data)
        for data in (b"To be\n", b" To be", b"To\n\nbe", b"To\xef\xbb\xbf be",
                     "\u00e9\u4e2d".encode()):
            file = self.path("x.txt", data)
            self.assertEqual(self.read("-i", "@" + file), self.read("-i", data), data)
        self.assertEqual(self.read("-i", "@" + self.path("x.txt", b"")), self.read())
        self.assertEqual(self.read("-i", "@" + self.path("x.txt", b"\xef\xbb\xbf")), self.read())

    def test_standard_input(self):
        self.assertEqual(self.read("-i", "-", stdin=b"To be"), self.read("-i", "To be"))
        self.assertEqual(self.read("-i", "-", stdin=b"To be\n"), self.read("-i", "To be\n"))
        self.assertEqual(self.read("-i", "-", stdin=b"\xef\xbb\xbfTo be"), self.read("-i", "To be"))
        self.assertEqual(self.read("-i", "-"), self.read())
        self.bad(1, MODEL, "-i", "-", stdin=b"To\0be", words=["-i", "standard input", "zero byte"])

    def test_files_that_are_none(self):
        for name in self.path("missing.txt"), self.path(""), "":
            self.bad(1, MODEL, "-i", "@" + name, words=["-i", name, "cannot be read"])
            self.bad(1, MODEL, "-y", "@" + name, words=["-y", name, "cannot be read"])
        for data in b"\0", b"To be\0", "To be".encode("utf-16"), b"x" * 5000 + b"\0" + b"y" * 5000:
            path = self.path("x.txt", data)
            self.bad(1, MODEL, "-i", "@" + path, words=["-i", path, "zero byte"])

    def test_long_files(self):
        for length in 4095, 4096, 4097, 300000:             # blocks of reading
            path = self.path("x.txt", b"x" * length)
            self.bad(1, MODEL, "-i", "@" + path, words=["-i has %d tokens" % (length + 2)])

    def test_control_pieces(self):
        """They are text, unless -x says that they are meant. A BOS that is spelt is the one."""
        number, want = self.read("-i", "To be")
        self.assertEqual(self.read("-x", "-i", "To be"), (number, want))
        self.assertEqual(self.read("-x", "-i", "<s> To be"), (number, want))
        self.assertEqual(self.read("-x", "-i", "@" + self.path("x", b"<s> To be")), (number, want))
        plain = self.read("-i", "<s> To be")
        self.assertGreater(plain[0], number + 2)
        self.assertTrue(plain[1].startswith(b"<s> To be"), plain)
        closed = self.read("-x", "-i", "To be</s>")
        self.assertEqual(closed[0], number + 1)
        self.assertTrue(closed[1].startswith(b"To be"), closed)
        self.assertNotIn(b"<", closed[1])
        self.assertTrue(self.read("-i", "To be</s>")[1].startswith(b"To be</s>"))


class TestChat(Case):
    def chat(self, *arguments, said):
        return self.good("-m", "chat", "-n", "5", *arguments, stdin=said)

    def test_the_form_of_the_file(self):
        """Whatever the form is, an answer is what follows the same text as a prompt."""
        one, two, three = b"Here is one of ", b"Shakespeare's more famous", b" works: "
        prompt = (one + two + three).decode()
        want = self.good("-i", prompt, "-n", "5").out[len(prompt):]
        for model, arguments, said in (
                (with_chat(b"", b"?", b"?", b"?", b"", b"?"), [], one + two + three),
                (with_chat(one, b"?", b"?", b"?", three, b"?"), [], two),
                (with_chat(b"?", one[:4], one[8:], b"?", three, b"?"), ["-y", "%s"], two),
                (with_chat(b"<s> " + one, b"?", b"?", b"?", three, b"?"), [], two)):
            system = self.path("system.txt", one[4:8])
            arguments = [word % ("@" + system) if word == "%s" else word for word in arguments]
            path = self.path("chat.bin", model)
            done = run(path, "-m", "chat", "-n", "5", *arguments, stdin=said + b"\n")
            self.assertEqual((done.status, done.out), (0, want), done)
            self.assertIn("read %d " % len(self.ids(prompt)), done.err)

    def ids(self, prompt):
        done = self.good("-i", prompt, "-n", "1")
        return range(int(re.search(r"read (\d+) ", done.err).group(1)))

    def test_control_pieces_are_those_of_the_form(self):
        """The same text typed and in the form is not the same."""
        def read(opening, said):
            path = self.path("chat.bin", with_chat(opening, b"", b"", b"", b"", b""))
            done = run(path, "-m", "chat", "-n", "1", stdin=said + b"\n")
            self.assertEqual(done.status, 0, done)
            return int(re.search(r"read (\d+) ", done.err).group(1))
        self.assertEqual(read(b"x</s>", b"y"), read(b"x", b"y") + 1)
        self.assertGreater(read(b"x", b"</s>y"), read(b"x</s>", b"y"))
        self.assertGreater(read(b"x</", b"s>y"), read(b"x</s>", b"y"))      # not even half of one
        self.assertGreater(read(b"<s></s", b">y"), read(b"<s></s>", b"y"))

    def test_what_closes_an_answer(self):
        """It is fed before the next question, and that gets no BOS but the form's own."""
        def chat(after, before, said=b"x\nx\n"):
            path = self.path("chat.bin", with_chat(b"", b"", b"?", before, b"", after))
            done = run(path, "-m", "chat", "-n", "9", stdin=said)
            self.assertEqual(done.status, 0, done)
            return int(re.search(r"read (\d+) ", done.err).group(1)), done.out
        number, plain = chat(b"", b"")
        self.assertEqual(chat(b"</s>", b"", said=b"x\n"), chat(b"", b"", said=b"x\n"))
        self.assertEqual(chat(b"", b"<s>")[0], number + 1)
        self.assertEqual(chat(b"", b"<s><s>")[0], number + 2)
        closed = chat(b" or not to be</s>", b"")[1]
        first, second = plain.splitlines(), closed.splitlines()
        self.assertEqual(first[0], second[0])
        self.assertNotEqual(first[1], second[1])

    def test_no_form(self):
        path = self.path("chat.bin", with_chat())
        self.bad(1, path, "-m", "chat", stdin=b"hello\n", words=["no form of a chat", "-i"])
        self.assertEqual(run(path, "-i", "To be", "-n", "10").out, self.text("-n", "10"))

    def test_turns(self):
        one, two = self.chat(said=b"hello\n"), self.chat(said=b"hello\nand you?\n")
        self.assertEqual((one.err.count("> "), two.err.count("> ")), (2, 3))
        self.assertNotIn(b"> ", two.out)
        self.assertEqual((one.out.count(b"\n"), two.out.count(b"\n")), (1, 2))
        self.assertTrue(two.out.startswith(one.out))
        self.assertIn("wrote 10 ", two.err)
        self.assertNotRegex(two.out, rb"(?m)^ ")            # no space in front of an answer
        # Nothing is said by empty lines, nor by how lines end.
        for said in b"\nhello\n\n\nand you?", b"hello\r\nand you?\r\n\r\n":
            self.assertEqual(self.chat(said=said).out, two.out, said)
        # A zero byte before the end of a line is no end of a line: it was typed, and is read.
        read = [int(re.search(r"read (\d+) ", self.chat(said=said).err).group(1))
                for said in (b"hello\n", b"hello\0\n")]
        self.assertGreater(read[1], read[0])
        # The second turn remembers the first.
        self.assertNotEqual(self.chat(said=b"and you?\n").out, two.out[len(one.out):])

    def test_a_prompt_is_the_first_question(self):
        """Whatever its lines end with; the next ones are typed."""
        want = self.chat(said=b"hello\nand you?\n")
        for first in "hello", "hello\r\n", "@" + self.path("x.txt", b"\xef\xbb\xbfhello\n"):
            done = self.chat("-i", first, said=b"and you?\n")
            self.assertEqual((done.out, done.err.count("> ")), (want.out, 2), first)
        self.assertEqual(self.chat("-i", "", said=b"hello\nand you?\n").out, want.out)
        lines = self.path("x.txt", b"hello\nand you?\n")      # one question of two lines
        self.assertEqual(self.chat("-i", "-", said=b"hello\nand you?\n").out,
                         self.chat("-i", "@" + lines, said=b"").out)

    def test_system_prompt(self):
        def read(done):
            return int(re.search(r"read (\d+) ", done.err).group(1))
        plain, system = self.chat(said=b"hello\n"), self.chat("-y", "Be brief.", said=b"hello\n")
        self.assertGreater(read(system), read(plain))
        both = self.chat("-y", "Be brief.", said=b"hello\nhello\n")     # but it is told only once
        self.assertLess(read(both), 2 * read(system))

    def test_a_line_that_does_not_fit(self):
        done = self.chat(said=b"x y " * 25000 + b"\nhello\n")
        self.assertRegex(done.err, r"drugs: that is \d+ tokens, the context has room for 160\n")
        self.assertEqual(done.out, self.chat(said=b"hello\n").out)

    def test_the_end_of_the_context(self):
        done = self.chat("-n", "0", said=b"Hamlet speaks: " * 9 + b"To be, or not to be\n" * 2)
        self.assertIn("until the end of the context", done.err)
        self.assertEqual(done.err.count("drugs: the context is full"), 1)

    def test_the_last_places_of_the_context(self):
        """A question that finds no place at all is told from one that finds too few."""
        first = "Hamlet speaks: " * 9
        used = int(re.search(r"read (\d+) ", self.chat("-n", "1", said=first.encode()).err).group(1))
        full = few = 0
        for more in range(CONTEXT - used - 8, CONTEXT - used):
            said = first + " be" * more + "\nhello\n"
            err = self.chat("-n", "1", said=said.encode()).err
            full += err.count("drugs: the context is full, the conversation ends here\n")
            few += len(re.findall(r"drugs: that is \d+ tokens, the context has room for [1-9]\d*\n",
                                  err))
        self.assertEqual(full + few, 8)
        self.assertTrue(full and few)

    def test_showers_between_turns(self):
        said = b"hello\nand you?\n"
        self.assertIn("2 cold showers", self.chat("-V", ".7", said=said).err)
        self.assertIn("0 cold showers", self.chat("-V", ".7", "-c", "0", said=said).err)

    def test_nothing_said(self):
        self.assertEqual(self.chat(said=b"").out, b"")


class TestErrors(Case):
    def test_usage(self):
        for arguments in (["-h"], [MODEL, "-h"], [MODEL, "-n", "5", "-h"], ["--help"],
                          [MODEL, "--help"], [MODEL, "-un", "5", "--help"]):
            done = run(*arguments)
            self.assertEqual((done.status, done.err), (0, ""))
            self.assertTrue(done.out.startswith(b"usage: drugs "))
            self.assertLessEqual(max(map(len, done.out.splitlines())), 100)
        none = run()
        self.assertEqual((none.status, none.out, none.err), (2, b"", done.out.decode()))

    def test_the_help_names_every_option(self):
        help_text = run("-h").out.decode()
        for option in "ixnmyHQKVAdwsructph":
            self.assertRegex(help_text, r"(?m)^  .*-%s\b" % option)

    def test_the_model_comes_first(self):
        for first in "-n", "-", "--":
            self.bad(2, first, MODEL, words=["the model file comes first"])

    def test_bad_options(self):
        shapes = ("@", ".3@", ".3@ceil", ".3@ceil:", ".3@round:0=1", ".3@ceil:0", ".3@ceil:0=",
                  ".3@ceil:=1", ".3@ceil:0=1;1=0", ".3@ceil:0=-1", ".3@ceil:nan=1", ".3@ceil:0=inf",
                  ".3@ceil:0=x", ".3@ceil:" + ",".join(["0=1"] * 17), "x@ceil:0=1")
        numbers = ("abc", "", "1x", "nan", "inf", "-inf", "-1", "1e99", "1,5")
        table = {
            "-n": numbers + ("1.5", "268435457"), "-c": numbers + ("1.5", "268435457"),
            "-s": numbers + ("1.5", "1000000000000001", "9007199254740993"),
            "-t": numbers + ("1001",),
            "-p": numbers + ("1.1",), "-d": numbers + ("1.1",), "-w": numbers + ("1.1",),
            "-m": ("talk", "", "Chat", "trip", "explore", "probe"), "-r": ("gauss", "", "centered")}
        for site in "HQKVA":
            table["-" + site] = numbers + ("3.15", "30", "1001") + shapes
        for option, values in table.items():
            for value in values:
                # Of a dose whose angle is wrong already, no more than that is quoted.
                quoted = value if value.startswith(".3@") else value.split("@")[0]
                self.bad(2, MODEL, option, value, words=[option, "'%s'" % quoted])
            self.bad(2, MODEL, option, words=[option, "needs a value"])
        for option in "-i", "-y":
            self.bad(2, MODEL, option, words=[option, "needs a value"])

    def test_advice(self):
        """The usual slips: degrees, a decimal comma, a text without quotes."""
        self.bad(2, MODEL, "-V", "30", words=["radians (degrees / 57.3)", "3.1416", "'30'"])
        for option in "-V", "-t", "-p", "-d":
            self.bad(2, MODEL, option, "0,5", words=["'0,5'; a point is the decimal sign"])
        self.bad(2, MODEL, "-i", "To", "be", "-n", "5", words=["'be'", "goes in quotes"])

    def test_options_without_effect(self):
        """What would change nothing is refused, and what it needs is named."""
        dose, plain = "needs a dose", "needs a dose without a shape"
        for needs, *options in (
                (dose, "-u"), (dose, "-c", "5"), (dose, "-r", "upstream"), (dose, "-s", "1"),
                (dose, "-t", "1", "-r", "upstream"), (plain, "-d", ".5"), (plain, "-w", ".5"),
                (plain, "-d", ".5", "-V", ".3@ceil:0=1"), ("needs a temperature", "-p", ".5"),
                ("needs a temperature", "-p", ".5", "-V", "1"),
                ("needs -m chat", "-y", "Be brief."),
                ("needs -m chat", "-y", "Be brief.", "-m", "generate")):
            option = options[-2 if len(options) > 1 and options[0] == "-t" else 0]
            self.bad(2, MODEL, "-i", "To be", *options, words=[option + " " + needs])
            if "-y" not in options:
                self.bad(2, MODEL, "-m", "chat", *options, words=[option + " " + needs])
        self.bad(2, MODEL, "-x", words=["-x needs a prompt"])
        self.bad(2, MODEL, "-m", "chat", "-i", "To be", "-x", words=["-x needs a prompt"])

    def test_what_is_no_option(self):
        for word in "-z", "-o", "-k", "-", "word", "":
            self.bad(2, MODEL, word, words=["'%s' is not an option" % word])
            self.bad(2, MODEL, word, "5", words=["is not an option"])
            self.bad(2, MODEL, "-n", "5", word, words=["'%s' is not an option" % word])
        self.bad(2, MODEL, "--", "5", words=["'5' is not an option"])
        self.bad(2, MODEL, "--", "-n", "5", words=["'-n' is not an option"])
        self.bad(2, MODEL, "--helps", words=["is not an option"])
        self.bad(2, MODEL, "-uz", words=["'-z' is not an option"])
        self.bad(2, MODEL, "two\nlines", words=["'two?lines' is not an option"])

    def test_options_may_be_written_together(self):
        want = self.text("-n", "5", "-V", ".7", "-u")
        self.assertEqual(self.text("-n5", "-V.7", "-u"), want)
        self.assertEqual(self.text("-un5", "-V", ".7"), want)
        self.bad(2, MODEL, "-nn", words=["-n", "'n'"])

    def test_a_value_may_look_like_an_option(self):
        self.assertEqual(self.good("-i", "-n", "-n", "1").out[:2], b"-n")
        self.assertEqual(self.good("-i", "--", "-n", "1").out[:2], b"--")
        self.bad(2, MODEL, "-n", "-i", words=["-n", "'-i'"])

    def test_the_last_of_two_counts(self):
        self.assertEqual(self.text("-n", "5", "-n", "7"), self.text("-n", "7"))
        everywhere = self.text("-n", "20", "-V", "1")      # whatever the shape of the first was
        self.assertEqual(self.text("-n", "20", "-V", ".3@ceil:0=0", "-V", "1"), everywhere)
        self.assertNotEqual(self.text("-n", "20"), everywhere)

    def test_good_values(self):
        for option, values in {"-s": ("0", "1e15"), "-t": ("0", "1000"),
                               "-p": ("0", "1"), "-d": ("0", "1"), "-w": ("0", "1"),
                               "-c": ("0", "268435456"), "-m": ("generate",), "-r": ("centred",),
                               "-A": ("0", "3.14159265", ".3@ceil:" + ",".join(["0=1"] * 16),
                                      ".3@floor:-1=0,.5=2", "1e-3@interpolate:0=0,2=1")}.items():
            for value in values:
                self.good("-i", "To be", "-n", "2", "-V", "0", "-t", "0", option, value)

    def test_no_output_is_written(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.bin")
            with open(path, "wb") as stream:
                stream.write(b"precious")
            for mode in "generate", "chat":
                self.bad(2, MODEL, "-m", mode, "-V", ".3", "-i", "To be, or not to be", "-o", path,
                         words=["'-o' is not an option"])
            with open(path, "rb") as stream:
                self.assertEqual(stream.read(), b"precious")

    def test_files(self):
        with tempfile.TemporaryDirectory() as folder:
            self.bad(1, folder, words=[folder])
            path = os.path.join(folder, "model.bin")
            self.bad(1, path, words=[path, "No such file"])
            self.bad(1, os.path.join(MODEL, "x"), words=["Not a directory"])    # errno's words
            with open(MODEL, "rb") as stream:
                good = stream.read()
            for content in b"", b"garbage" * 999, good[:99], good[:9999], good[:-1], good + b"x":
                with open(path, "wb") as stream:
                    stream.write(content)
                self.bad(1, path, words=[path])

    def test_a_model_that_is_not_in_order(self):
        """Logits that are no numbers end everything with one line."""
        for share, more in ((1, []), (.5, []), (1, ["-t", "1"]), (1, ["-V", "1", "-c", "1"]),
                            (.5, ["-H", "1", "-u"])):
            path = self.path("nan.bin", without_numbers(share))
            done = run(path, "-i", "To be", *more)
            self.assertEqual((done.status, done.out), (1, b"To be"), more)  # it was read by then
            self.assertRegex(done.err, r"\Adrugs: [^\n]*not finite[^\n]*\n\Z")
            done = run(path, "-m", "chat", *more, stdin=b"hello\nhello\n")
            self.assertEqual((done.status, done.out), (1, b""), more)
            self.assertRegex(done.err, r"\A> drugs: [^\n]*not finite[^\n]*\n\Z")

    def test_a_model_that_is_written_to(self):
        """Good numbers of another model, over those that are in use: between two questions."""
        for how, status in (("over it", 1), ("beside it", 0), ("touched", 1), ("read", 0)):
            path = self.path("model.bin", content())
            with subprocess.Popen([DRUGS, path, "-m", "chat", "-n", "4"], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) as chat:
                chat.stdin.write(b"hello\n")
                chat.stdin.flush()
                chat.stdout.readline()                      # now it waits for the next one
                if how == "beside it":
                    os.replace(self.path("other.bin", content()[:-4] + bytes(4)), path)
                elif how == "over it":
                    self.path("model.bin", content()[:-4] + bytes(4))
                elif how == "touched":
                    os.utime(path)
                else:
                    os.utime(path, ns=(0, os.stat(path).st_mtime_ns))
                _, err = chat.communicate(b"and you?\n", timeout=60)
            self.assertEqual(chat.returncode, status, (how, err))
            last = err.decode().replace("> ", "").strip()
            self.assertRegex(last, r"\A(drugs: \S*/model.bin was written to|read \d)[^\n]*\Z", how)

    def test_an_older_file(self):
        old = b"drugs.c\0" + struct.pack("<i", 2) + content()[12:]
        self.bad(1, self.path("old.bin", old), words=["older", "export the checkpoint again"])

    def test_closed_streams(self):
        """A stream that is closed is no place for anything else."""
        def shell(redirections, *arguments):
            line = '"$0" "$@" ' + redirections
            done = subprocess.run(["sh", "-c", line, DRUGS, MODEL, *arguments], timeout=60,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE)
            return Done(done.returncode, done.stdout, done.stderr.decode())
        before, want = content(), self.text("-n", "5")
        for redirections in ">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-":
            done = shell(redirections, "-i", "To be", "-n", "5")
            self.assertEqual(done.out, b"" if ">&-" in redirections.split() else want, redirections)
            self.assertEqual(bool(done.err), "2>&-" not in redirections, redirections)
            self.assertEqual(done.status, 0, redirections)
        done = shell("<&-", "-i", "-", "-n", "5")
        self.assertEqual((done.status, done.out), (0, self.good("-n", "5").out))
        self.assertEqual(content(), before)

    def test_a_prompt_that_does_not_fit(self):
        self.bad(1, MODEL, "-i", "x y " * 9999, words=["-i", str(CONTEXT)])
        just_fits = "To" + " be" * (CONTEXT - 2)            # and a BOS in front
        self.assertRegex(self.good("-i", just_fits).err, r"read %d .* wrote 1 " % CONTEXT)
        self.bad(1, MODEL, "-i", just_fits + " be", words=["-i", str(CONTEXT + 1)])

    @unittest.skipUnless(os.path.exists("/dev/full"), "there is no /dev/full")
    def test_a_full_disk(self):
        for arguments in [], ["-m", "chat"]:
            with open("/dev/full", "wb") as full:
                done = run(MODEL, "-n", "5", *arguments, stdin=b"hello\n", stdout=full)
            self.assertEqual(done.status, 1)
            self.assertRegex(done.err, r"drugs: standard output cannot be written[^\n]*\n\Z")


if __name__ == "__main__":
    unittest.main()
