#!/usr/bin/env python3
"""Says which lines of the two books the tests run: make coverage.

All programs and C tests are built with gcov's counters in a copy of the tree and run there, with
the tests of the command lines. A line counts as covered if one of these programs has run it, as
each of them includes drugs.c anew. Needs gcc with gcov, and takes a few minutes.
"""

import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
BOOKS = "drugs.c", "train_step.c", "tests/laboratory/lab.c"
PROGRAMS = "drugs", "train_step", "tests/lab", "tests/logits", "tests/tokens"
FLAGS = ["-std=gnu11", "-ffp-contract=off", "-O0", "-fopenmp", "-w", "--coverage",
         "-fprofile-update=atomic"]


def measure(folder):
    """Builds and runs everything in this copy of the tree."""
    tests = ["tests/" + os.path.basename(path)[:-2]
             for path in sorted(glob.glob(os.path.join(ROOT, "tests/unit/test_*.c")))]
    for name in [*PROGRAMS, *tests]:
        libraries = ["-lcriterion", "-lm"] if name in tests else ["-lm"]
        # The source of a program lies beside it, or in one of the folders of tests/.
        source, = glob.glob(name + ".c", root_dir=folder) or glob.glob(
            f"tests/*/{os.path.basename(name)}.c", root_dir=folder)
        subprocess.run(["gcc", *FLAGS, source, "-o", name, *libraries], cwd=folder, check=True)
    commands = [[name] for name in tests]
    commands += [[sys.executable, "-m", "unittest", "discover", "tests/unit", name + ".py"]
                 for name in ("test_cli", "test_step_cli", "test_lab_cli", "test_figures",
                              "test_tokenizer")]
    for command in commands:
        done = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
        if done.returncode:
            print("%s fails: what is said below is too little" % command[-1])


def counts(folder):
    """File -> line -> how often it was run, by all programs together."""
    found = {book: {} for book in BOOKS}
    for where, _, names in os.walk(folder):
        for name in names:
            if not name.endswith(".gcda"):
                continue
            told = subprocess.run(["gcov", "--json-format", "--stdout", name], cwd=where,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
            for unit in told.stdout.decode().splitlines():
                for file in json.loads(unit)["files"]:
                    path = os.path.normpath(os.path.join(folder, file["file"]))
                    lines = found.get(os.path.relpath(path, folder))
                    for line in file["lines"] if lines is not None else ():
                        number = line["line_number"]
                        lines[number] = lines.get(number, 0) + line["count"]
    return found


def main():
    with tempfile.TemporaryDirectory() as folder:
        for name in ("drugs.c", "train_step.c", "export.py", "tests"):
            source, to = os.path.join(ROOT, name), os.path.join(folder, name)
            (shutil.copytree if os.path.isdir(source) else shutil.copy)(source, to)
        measure(folder)
        for book, lines in counts(folder).items():
            missed = sorted(number for number, count in lines.items() if not count)
            print("%-14s %d of %d lines run, %.1f %%" % (
                book, len(lines) - len(missed), len(lines),
                100 * (1 - len(missed) / max(1, len(lines)))))
            with open(os.path.join(ROOT, book), encoding="utf-8") as stream:
                text = stream.read().split("\n")
            for number in missed:
                print("    %4d  %s" % (number, text[number - 1].strip()))


if __name__ == "__main__":
    main()
