"""What the README shows is what the programs print."""
import os
import re
import subprocess
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def printed(command):
    """In words, as lines are broken anew in the README."""
    done = subprocess.run(command, shell=True, cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.split()


@unittest.skipUnless(os.path.exists(os.path.join(ROOT, "train_step")), "nothing is built: run make first")
class TestReadme(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as stream:
            cls.text = stream.read()
        cls.lesson = printed("./train_step tests/hamlet.bin")

    def holds(self, words, shown, what):
        """Whether the words shown stand one behind the other among those that were printed."""
        places = [i for i in range(len(words)) if words[i:i + len(shown)] == shown]
        self.assertTrue(places, "%s: the README shows %s" % (what, " ".join(shown)))

    def test_demo(self):
        """Each command that is shown under `make demo`, and the text below it, as far as it goes."""
        shown = re.findall(r"^(\./drugs tests/hamlet\.bin [^|\n]*)\n((?:(?!---|\.\.\.|```)[^\n]+\n)+)", self.text,
                           re.M)
        self.assertGreaterEqual(len(shown), 2)
        for command, text in shown:
            self.assertEqual(printed(command)[:len(text.split())], text.split(), command)

    def test_checksum(self):
        """The number by which a class compares."""
        (command, number), = re.findall(r"^(\./drugs [^\n]*cksum)\n```\n```\n([^\n]*)\n", self.text,
                                       re.M)
        self.assertEqual(printed(command), number.split())

    def test_lesson(self):
        """Both tables: the words row by row, and the losses."""
        words, losses = (re.search(r"```\n( *%s.*?)```" % begin, self.text, re.S).group(1).splitlines()
                         for begin in (r"0 +0\.0001 ", "step size +lesson"))
        self.assertGreater(len(words), 15)
        self.assertEqual(len(losses), 9)
        for row in words + losses:
            self.holds(self.lesson, row.split(), "train_step")


    def test_laboratory(self):
        """Rows of the trip and the probe, as make prints them. What takes longer is compared after
        `make page`, in page_in_browser.py."""
        parts = re.findall(r"```\n((?:around|token  ) .*?)```", self.text, re.S)
        self.assertEqual(len(parts), 2)
        for experiment, part in zip(("trip", "probe"), parts):
            done = subprocess.run(["make", "-n", experiment], cwd=ROOT, check=True,
                                  capture_output=True, text=True)
            command, = (line for line in done.stdout.splitlines() if line.startswith("tests/lab "))
            words = printed(command)
            for row in part.splitlines():
                self.holds(words, row.split(), experiment)


if __name__ == "__main__":
    unittest.main()
