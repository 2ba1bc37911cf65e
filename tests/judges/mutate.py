#!/usr/bin/env python3
"""Changes one thing in the code at a time and asks whether the tests notice.

    make mutate                     40 changes, seed 1
    make mutate N=400 SEED=2
    python3 tests/judges/mutate.py --file train_step.c --lines 600-700 -n 20
    python3 tests/judges/mutate.py --survivors         once more those that no test noticed, after new tests

A mutant is the code with one operator, constant, index, statement or argument changed. It is
killed if a test fails, does not end in time, or does not build against it; otherwise it survived,
and a test is missing. Or the change changes nothing: the compiler has made the same programs of it,
or it stands in tests/judges/equivalent.txt, with the reason. Lines are drawn at random, and one of the
changes that a line offers; the seed says which. What is known already stands in mutants.tsv and is
not tried again, so a run may be stopped at any time. Two mutants are tried at once, each in a copy
of the tree of its own.
"""

import argparse
import concurrent.futures
import glob
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
RESULTS = os.path.join(ROOT, "mutants.tsv")
EQUIVALENT = os.path.join(HERE, "equivalent.txt")

# What a compiler complains about needs no test.
FLAGS = ["-std=gnu11", "-ffp-contract=off", "-O2", "-march=native", "-fopenmp", "-Wall",
         "-Werror=int-conversion", "-Werror=incompatible-pointer-types",
         "-Werror=discarded-qualifiers", "-Werror=format"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

# The steps, in the order of what they find in a second, and the programs that each runs. digest
# finds any other bit in what small models compute.
STEPS = {
    "digest": ["tests/digest"],
    "C:test_more": ["tests/test_more"],
    "C:test_loader": ["tests/test_loader"],
    "C:test_step": ["tests/test_step"],
    "C:test_drugs": ["tests/test_drugs"],
    "C:test_properties": ["tests/test_properties"],
    "line:test_cli": ["drugs"],
    "C:test_lab": ["tests/test_lab"],
    "line:test_step_cli": ["train_step", "drugs"],
    "line:test_figures": ["drugs", "train_step", "tests/lab", "tests/logits", "tests/tokens"],
    "line:test_lab_cli": ["tests/lab", "drugs"],
    "line:test_tokenizer": ["tests/tokens"],
}
# The programs that a file is part of.
WITH_STEP = ["train_step", "tests/digest", "tests/test_more", "tests/test_properties",
             "tests/test_step"]
WITH_LAB = ["tests/lab", "tests/test_lab"]
PROGRAMS = {
    "drugs.c": WITH_LAB + WITH_STEP + ["drugs", "tests/logits", "tests/tokens", "tests/test_loader",
                                       "tests/test_drugs"],
    "train_step.c": WITH_LAB + WITH_STEP,
    "tests/laboratory/lab.c": WITH_LAB,
}
# What is run last, with sanitizers and leak detection: everything here ends well and gives all
# back. A file that is there already is replaced.
SMALL = "tests/hamlet.bin -i 'To be' -n 9 -H .7 "
WITH_SANITIZERS = {
    "drugs.c": ("./drugs " + SMALL + "-c 3 -u", "./drugs " + SMALL + "-t 1",
                "printf 'hello\\nyou\\n' | ./drugs " + SMALL + "-m chat -y be",
                "./train_step " + SMALL + "-e 0,1e-3"),
    "train_step.c": ("./train_step " + SMALL + "-e 1e-3 -o s.bin -t s.csv -K .5 -V .5",
                     "./train_step " + SMALL + "-x last -t s.csv -Q .5 -A .5"),
    "tests/laboratory/lab.c": ("tests/lab tests/hamlet.bin trip -i 'To be, or not to be' -k 1 -o s.csv",
                    "tests/lab tests/hamlet.bin probe " + SMALL[17:] + "-k 2 -o s.csv",
                    "tests/lab tests/hamlet.bin explore -i 'To be' -n 9 -k 2 -o s.md",
                    "tests/lab tests/hamlet.bin shower " + SMALL[17:] + "-k 2 -o s.csv"),
}


# ---- what can be changed

def blank(text):
    """The code with comments, strings and preprocessor lines as spaces, everything in its place."""
    pattern = re.compile(r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'"""
                         r"""|^[ \t]*\#(?:\\\n|[^\n])*""", re.S | re.M)

    def spaces(match):
        # A literal leaves its quotes, so that an argument stays one.
        keep = match.group()[0] if match.group()[0] in "\"'" else " "
        inner = "".join(c if c == "\n" else " " for c in match.group()[1:-1])
        return keep + inner + (keep if len(match.group()) > 1 else "")
    return pattern.sub(spaces, text)


OPERATORS = {
    "+": "-", "-": "+", "*": "/", "/": "*", "%": "*", "<": "<=", "<=": "<", ">": ">=", ">=": ">",
    "==": "!=", "!=": "==", "&&": "||", "||": "&&", "<<": ">>", ">>": "<<", "&": "|", "|": "&",
    "^": "|", "+=": "-=", "-=": "+=", "*=": "/=", "/=": "*=", "|=": "&=", "<<=": ">>=",
}
# Binary operators stand between spaces in these files, pointers and signs do not.
OPERATOR = re.compile(r"(?<=[\w)\]\"'] )(%s)(?= [\w(\-*&!.~\"'{])" % "|".join(
    re.escape(one) for one in sorted(OPERATORS, key=len, reverse=True)))
NUMBER = re.compile(r"(?<![\w.])(0[xX][\da-fA-F.]+(?:p\d+)?|\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+)([uUlLfF]*)"
                    r"(?![\w.])")
INDEX = re.compile(r"(?<=[\w)\]])\[([^][]+)\]")
DECLARATION = re.compile(r"^\s*(?:(?:static|const|unsigned|struct|enum|extern|inline)\s+)*"
                         r"(?:\w+\s+|\w+\s*\*+\s*)(?:const\s+)?\**\w+\s*(?:[=;,\[]|\()")
KEYWORD = re.compile(r"^\s*(?:return|goto|else|case|do|typedef|sizeof|if|for|while|switch)\b")
STATEMENT = re.compile(r"^(\s+)([^{}]*[^{};]);\s*$")
CALL = re.compile(r"\b([a-z_]\w*)\(")


def other_number(number, suffix):
    """The numbers that a number is changed to."""
    if "." in number or "e" in number.lower() and not number.lower().startswith("0x"):
        if number.lower().startswith("0x"):
            value = float.fromhex(number)
        else:
            value = float(number)
        return ["%r%s" % (value * 2 if value else 1., suffix)]
    if "p" in number:
        return ["%r%s" % (float.fromhex(number) * 2, suffix)]
    value = int(number, 0) if number.lower().startswith("0x") or number == "0" else int(number)
    return [str(value + 1) + suffix] + ([str(value - 1) + suffix] if value > 0 else [])


def arguments_of(line, start):
    """The places (from, to) of a call's arguments, if it ends on this line."""
    depth, places, begin = 0, [], start
    for i in range(start, len(line)):
        if line[i] in "([{":
            depth += 1
        elif line[i] in ")]}" and depth:
            depth -= 1
        elif line[i] == ")" or line[i] == "," and not depth:
            places.append((begin, i))
            begin = i + 1
            if line[i] == ")":
                return places
    return []


def changes_of(line, code, before):
    """All changed forms of a line, by kind. code: the line with blanks; before: the code above."""
    forms = []

    def put(kind, start, end, new):
        forms.append((kind, line[:start] + new + line[end:]))
    declares = bool(DECLARATION.match(code)) and not KEYWORD.match(code)
    for match in OPERATOR.finditer(code):
        put("operator", *match.span(), OPERATORS[match.group()])
    for match in re.finditer(r"!(?=[\w(*])", code):
        put("operator", *match.span(), "")
    for match in re.finditer(r"\b(true|false)\b", code):
        put("constant", *match.span(), "false" if match.group() == "true" else "true")
    for match in re.finditer(r"(\w)(\+\+|--)", code):
        if "for (" not in code and "while (" not in code:
            put("operator", *match.span(2), "--" if match.group(2) == "++" else "++")
    arrays = declares and [m.span() for m in INDEX.finditer(code)] or []
    for match in NUMBER.finditer(code):
        if any(a <= match.start() < b for a, b in arrays):
            continue                                # the length of an array
        for other in other_number(*match.groups()):
            put("constant", *match.span(), other)
    if not declares or "=" in code:
        for match in INDEX.finditer(code):
            if not (declares and match.start() < code.find("=")):
                put("index", *match.span(1), match.group(1) + " + 1")
    match = STATEMENT.match(code)
    whole = before.rstrip()[-1:] in ";{}:)" or before.rstrip().endswith("else")
    if match and whole and not declares and not KEYWORD.match(code):
        put("statement", len(match.group(1)), match.end(), ";")
    if not declares or "=" in code:
        for match in CALL.finditer(code):
            if match.group(1) in ("if", "for", "while", "switch", "sizeof", "return"):
                continue
            places = arguments_of(code, match.end())
            for (a, b), (c, d) in zip(places, places[1:]):
                left, right = line[a:b].strip(), line[c:d].strip()
                if left != right and not {left[:1], right[:1]} & {'"', "'"} and left and right:
                    put("argument", a, d, "%s%s, %s" % (" " if line[a] == " " else "", right, left))
    return [form for form in dict.fromkeys(forms) if form[1] != line]


def all_changes(path):
    """Line number (from 1) -> what it offers. Only what stands in functions and in enums."""
    with open(os.path.join(ROOT, path), encoding="utf-8") as stream:
        text = stream.read()
    lines, code = text.split("\n"), blank(text).split("\n")
    depth, inside, before, found = 0, False, "", {}
    for i, (line, plain) in enumerate(zip(lines, code)):
        starts = not depth and plain.strip()
        if starts and not plain[:1].isspace():      # what begins here, at the margin?
            inside = not re.match(r"(typedef|struct|union)\b", plain)
        body = depth > 0 or re.match(r"enum\b", plain)
        if inside and body and plain.strip() and "_Static_assert" not in plain:
            forms = changes_of(line, plain, before)
            if forms:
                found[i + 1] = (line, forms)
        depth += plain.count("{") - plain.count("}")
        if plain.strip():
            before = plain
    return found


class Mutant:
    def __init__(self, path, number, kind, before, after):
        self.path, self.number, self.kind = path, number, kind
        self.before, self.after = before, after

    def key(self):
        return self.path, self.before.strip(), self.after.strip()

    def __str__(self):
        return "%s:%d  %s  ->  %s" % (self.path, self.number, self.before.strip(),
                                      self.after.strip())


def sample(files, n, seed, lines):
    """n mutants, each of another line as long as there are enough."""
    dice = random.Random(seed)
    places = [(path, number, *what) for path in files for number, what in all_changes(path).items()
              if not lines or lines[0] <= number <= lines[1]]
    dice.shuffle(places)
    mutants = []
    for path, number, line, forms in places[:n]:
        # First the kind, so that constants, of which there are most, do not crowd out the others.
        kind = dice.choice(sorted({kind for kind, _ in forms}))
        mutants.append(Mutant(path, number, kind, line,
                              dice.choice([new for one, new in forms if one == kind])))
    return mutants


# ---- trying one

class Tree:
    """A copy of the tree that mutants are built in."""
    limits = {}                                     # seconds, for each step; measured beforehand
    broken = {}                                     # steps that fail without any change, and how

    def __init__(self):
        self.good = {}                              # programs without any change, bytes
        self.built = {}                             # programs with the change: what became of them
        self.seen = False                           # whether one of them is another one
        self.folder = tempfile.mkdtemp(prefix="mutants")
        for name in ("drugs.c", "train_step.c", "export.py", "tests"):
            source, to = os.path.join(ROOT, name), os.path.join(self.folder, name)
            if os.path.isdir(source):
                shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, to)

    def write(self, path, lines):
        with open(os.path.join(self.folder, path), "w", encoding="utf-8") as stream:
            stream.write("\n".join(lines))

    def run(self, command, limit, **more):
        """Whether a command succeeds in time. Whatever it started ends with it."""
        environment = dict(os.environ, OMP_NUM_THREADS="1", TMPDIR=self.folder + "/tmp", **more)
        os.makedirs(self.folder + "/tmp", exist_ok=True)
        child = subprocess.Popen(command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                 start_new_session=True)
        try:
            return "" if child.wait(limit) == 0 else "fails"
        except subprocess.TimeoutExpired:
            return "does not end"
        finally:
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            child.wait()

    def step(self, name, path=None):
        """Builds and runs one step for a change in the file `path`: a C test, tests of a command
        line, or commands with sanitizers. Returns what went wrong."""
        kind, test = name.split(":", 1) if ":" in name else (name, "")
        more = {}
        if kind == "sanitized":
            for program in ("drugs", "train_step", "tests/lab"):
                if program in "\n".join(WITH_SANITIZERS[test]) and self.build(program, SANITIZE):
                    return "does not build"
            command = ["sh", "-e", "-c", "\n".join(WITH_SANITIZERS[test])]
            more = {"ASAN_OPTIONS": "detect_leaks=1"}
        else:
            states = [self.program(program, path) for program in STEPS[name]]
            if "does not build" in states:
                return "does not build"
            if path and "other" not in states:
                return ""                           # the same programs give the same results
            self.seen = True
            command = {"digest": ["sh", "-c", "tests/digest | cmp -s - tests/makers/digest.txt"],
                       "C": ["tests/" + test, "-j1", "--fail-fast"],
                       "line": [sys.executable, "-m", "unittest", "discover", "-f", "tests/unit",
                                test + ".py"]}[kind]
        return self.run(command, self.limits.get(name, 600), **more)

    def build(self, name, flags=()):
        libraries = ["-lcriterion"] if "/test_" in name else []
        # The source of a program lies beside it, or in one of the folders of tests/.
        source, = glob.glob(name + ".c", root_dir=self.folder) or glob.glob(
            f"tests/*/{os.path.basename(name)}.c", root_dir=self.folder)
        wrong = self.run(["gcc", *FLAGS, *flags, source, "-o", name, *libraries, "-lm"], 120)
        return wrong and "does not build"

    def program(self, name, path):
        """Sees to it that a program is there. Returns whether the change in `path` has made it
        another one: most changes are in functions that some programs leave out."""
        if name not in self.good:                   # the first time: without any change
            if self.build(name):
                return "does not build"
            self.good[name] = self.content(name)
        if path and name in PROGRAMS[path] and name not in self.built:
            state = self.build(name)
            self.built[name] = state or ("same" if self.content(name) == self.good[name] else "other")
        return self.built.get(name, "same")

    def content(self, name):
        with open(os.path.join(self.folder, name), "rb") as stream:
            return stream.read()

    def restore(self):
        """After a change: the good programs once more."""
        self.built, self.seen = {}, False
        for name, content in self.good.items():
            path = os.path.join(self.folder, name)
            if os.path.exists(path):
                os.remove(path)
            with open(path, "wb") as stream:
                stream.write(content)
            os.chmod(path, 0o755)


def steps_of(path):
    steps = [step for step, programs in STEPS.items() if set(programs) & set(PROGRAMS[path])]
    steps.append("sanitized:" + path)
    return [step for step in steps if step not in Tree.broken]


def measure(tree, step):
    """Runs a step without any change: how long may it take, and does it succeed?"""
    start = time.monotonic()
    wrong = tree.step(step)
    Tree.limits[step] = 5 + 4 * (time.monotonic() - start)
    if wrong:
        Tree.broken[step] = wrong
        print("%s %s without any change: left out" % (step, wrong), flush=True)
    if step.startswith("sanitized"):
        tree.restore()


def attempt(tree, mutant):
    """Returns "killed", "survived", "equivalent" or "stillborn", and by what."""
    with open(os.path.join(tree.folder, mutant.path), encoding="utf-8") as stream:
        good = stream.read().split("\n")            # as it was when the run began
    lines = list(good)
    lines[mutant.number - 1] = mutant.after
    try:
        steps = steps_of(mutant.path)
        for step in steps:                          # before anything is changed
            for program in STEPS.get(step, []):
                tree.program(program, None)
        tree.write(mutant.path, lines)
        if tree.run(["gcc", *FLAGS, "-fsyntax-only", mutant.path], 120):
            return "stillborn", "does not build"
        for step in steps:
            if step.startswith("sanitized") and not tree.seen:
                continue
            wrong = tree.step(step, mutant.path)
            if wrong:
                return "killed", "%s %s" % (step, wrong)
        if not tree.seen:                           # for instance min(n, m), for min(m, n)
            return "equivalent", "the compiler makes the same of it"
        return "survived", ""
    finally:
        tree.write(mutant.path, good)
        tree.restore()


# ---- what is known

def known_results():
    """Key of a mutant -> (verdict, by what, number of the line); the last word counts."""
    known = {}
    if os.path.exists(RESULTS):
        with open(RESULTS, encoding="utf-8") as stream:
            for row in stream:
                verdict, path, number, kind, before, after, why = row.rstrip("\n").split("\t")
                known[path, before, after] = verdict, why, int(number), kind
    return known


def equivalent_mutants():
    """From blocks of four lines: file, "- before", "+ after", reason."""
    found = {}
    if os.path.exists(EQUIVALENT):
        with open(EQUIVALENT, encoding="utf-8") as stream:
            for block in stream.read().split("\n\n"):
                lines = [line for line in block.strip().split("\n") if not line.startswith("#")]
                if len(lines) >= 4:
                    found[lines[0], lines[1][2:].strip(), lines[2][2:].strip()] = lines[3]
    return found


def find(path, before, after, number):
    """The mutant once more, though its line may have moved."""
    places = [(abs(at - number), at, line, kind) for at, (line, forms) in all_changes(path).items()
              for kind, new in forms if line.strip() == before and new.strip() == after]
    if not places:
        return None
    _, at, line, kind = min(places)
    indent = line[:len(line) - len(line.lstrip())]
    return Mutant(path, at, kind, line, indent + after)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-n", type=int, default=40, help="how many (40)")
    parser.add_argument("--seed", type=int, default=1, help="which ones (1)")
    parser.add_argument("--file", action="append", choices=sorted(PROGRAMS), help="of this file only")
    parser.add_argument("--lines", help="of these lines only, as 10-20")
    parser.add_argument("--survivors", action="store_true", help="those that survived, once more")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once (2)")
    parser.add_argument("--list", action="store_true", help="only say which they would be")
    options = parser.parse_args()
    files = options.file or list(PROGRAMS)
    lines = [int(one) for one in options.lines.split("-")] if options.lines else None
    known, equivalent = known_results(), equivalent_mutants()
    # In the background it would be ignored, also by the programs that are tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))   # tidies up, too
    if options.survivors:
        mutants = [find(*key, known[key][2]) for key in known
                   if known[key][0] == "survived" and key not in equivalent and key[0] in files]
        mutants = [mutant for mutant in mutants if mutant]
    else:
        mutants = sample(files, options.n, options.seed, lines)
    todo = [mutant for mutant in mutants if mutant.key() not in equivalent
            and (options.survivors or mutant.key() not in known)]
    if options.list:
        for mutant in mutants:
            print("%-10s %s" % (mutant.kind, mutant))
        return 0

    copies = [Tree() for _ in range(options.jobs if todo else 0)]   # all of the same moment
    trees = queue.Queue()
    lock = threading.Lock()

    def with_a_tree(what, of):
        tree = trees.get()
        try:
            return what(tree, of)
        finally:
            trees.put(tree)

    def one(mutant):
        verdict, why = with_a_tree(attempt, mutant)
        with lock:
            with open(RESULTS, "a", encoding="utf-8") as stream:
                stream.write("\t".join([verdict, mutant.path, str(mutant.number), mutant.kind,
                                        mutant.before.strip(), mutant.after.strip(), why]) + "\n")
            print("%-9s %s  (%s)" % (verdict, mutant, why or mutant.kind), flush=True)
    try:
        for tree in copies:
            trees.put(tree)
        wanted = dict.fromkeys(step for mutant in todo for step in steps_of(mutant.path))
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda step: with_a_tree(measure, step), wanted))
            list(pool.map(one, todo))
    finally:
        for tree in copies:
            shutil.rmtree(tree.folder, ignore_errors=True)

    # How many of those that were asked for, in all, with those known before.
    known, total = known_results(), {}
    for mutant in mutants:
        verdict = "equivalent" if mutant.key() in equivalent else known[mutant.key()][0]
        total.setdefault(mutant.path, []).append(verdict)
    for path, verdicts in sorted(total.items()):
        killed, survived = verdicts.count("killed"), verdicts.count("survived")
        print("%-14s %3d killed, %3d survived: %.0f %%; %d equivalent, %d do not compile" % (
            path, killed, survived, 100 * killed / max(1, killed + survived),
            verdicts.count("equivalent"), verdicts.count("stillborn")))
    return int(any("survived" in verdicts for verdicts in total.values()))


if __name__ == "__main__":
    sys.exit(main())
