#!/usr/bin/env python3
"""Lets one thing after the other fail in every program and mode, and looks at what becomes of it.

    make faults                          all of it, some minutes
    python3 tests/judges/faults.py memory ...   only these: memory writes reads signals pairs model closed names

Whatever fails, a program ends with one line on standard error and status 1 (or, if it could do without,
with exactly what it would have given otherwise), leaves no file that is not whole, and none that is not
the user's. tests/judges/faults.c makes things fail. Linux only. Prints how many were tried, and every one in
which that was not so; then the status is 1.
"""

import concurrent.futures
import contextlib
import errno
import itertools
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.dirname(HERE)
TOP = os.path.dirname(TESTS)
DRUGS, STEP, LAB, TOKENS, LOGITS = (os.path.join(TOP, name) for name in (
    "drugs", "train_step", "tests/lab", "tests/tokens", "tests/logits"))
EXPORT = [sys.executable, os.path.join(TOP, "export.py")]

# Name, command, standard input, files that it writes. It runs in a folder of its own, in which there
# are a model, m.bin, and a text, t.txt.
PROMPT = ["-i", "To be"]
MODES = [
    ("generate", [DRUGS, "m.bin", *PROMPT, "-n", "6"], "", ()),
    ("generate, drugged", [DRUGS, "m.bin", *PROMPT, "-n", "12", "-V", ".7@ceil:0=1,.5=0", "-A", ".3",
                           "-c", "4"], "", ()),
    ("generate with dice", [DRUGS, "m.bin", *PROMPT, "-n", "4", "-t", "1"], "", ()),
    ("generate from stdin", [DRUGS, "m.bin", "-i", "-", "-n", "3"], "To be", ()),
    ("generate from a file", [DRUGS, "m.bin", "-i", "@t.txt", "-n", "3"], "", ()),
    ("chat", [DRUGS, "m.bin", "-m", "chat", "-y", "@t.txt", "-n", "4", "-V", ".3"],
     "hello\nand you?\n", ()),
    ("help", [DRUGS, "-h"], "", ()),
    ("step", [STEP, "m.bin", "-e", "0,1e-3", "-n", "4"], "", ()),
    ("step, a table", [STEP, "m.bin", "-l", "@t.txt", "-g", " Or not", "-y", "", "-f", "t.txt", "-n", "3",
                       "-e", "0,1e-3", "-t", "out.md"], "", ("out.md",)),
    ("step, a model", [STEP, "m.bin", "-l", "To be or", "-y", "", "-e", "1e-3", "-n", "2", "-V", ".3",
                       "-x", "last", "-t", "out.csv", "-o", "out.bin"], "", ("out.csv", "out.bin")),
    ("trip", [LAB, "m.bin", "trip", "-i", "To be a good leader, you must be good", "-V", "1", "-k", "1",
              "-o", "out.csv"], "", ("out.csv",)),
    ("probe", [LAB, "m.bin", "probe", *PROMPT, "-n", "6", "-k", "2", "-V", ".5", "-o", "out.csv"], "",
     ("out.csv",)),
    ("explore", [LAB, "m.bin", "explore", *PROMPT, "-n", "2", "-k", "1", "-o", "out.md"], "",
     ("out.md",)),
    ("shower", [LAB, "m.bin", "shower", *PROMPT, "-n", "4", "-k", "1", "-H", ".8", "-o", "out.csv"], "",
     ("out.csv",)),
    ("pretrain", ["pretrain", "out.bin"], "", ("out.bin",)),
    ("tokens", [TOKENS, "m.bin"], "To be\0or not\0", ()),
    ("logits", [LOGITS, "m.bin", "1", "300"], "", ()),
    ("export to hf", [*EXPORT, "m.bin", "--to", "hf", "hf"], "", ("hf",)),
    ("export", [*EXPORT, "old", "-o", "out.bin"], "", ("out.bin",)),
]
FIGURES = re.compile(rb"^read \d+ tokens at .*|^\d+ texts, .*|^a probe without .*|^(> )+$"
                     rb"|^\d+ seconds, .*|^matrices divided by .*", re.M)


class Run:
    """What became of a command."""

    def __init__(self, folder, command, said="", fault=None, before=None):
        log = folder + ".log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "LD_PRELOAD": SHIM, "FAULT_LOG": log}
        if fault:
            environment["FAULT"] = fault
        done = subprocess.run(command, cwd=folder, input=said.encode(), capture_output=True,
                              env=environment, timeout=120, preexec_fn=before)
        self.status, self.out, self.err = done.returncode, done.stdout, done.stderr
        self.events = []
        if os.path.exists(log):
            with open(log) as stream:
                self.events = [line.split() for line in stream]
            os.remove(log)

    def count(self, which):
        return next(int(event[which]) for event in self.events if event[0] == "end")

    def fired(self):
        """The descriptor whose turn it was; None if nothing failed."""
        return next((int(event[1]) for event in self.events if event[0] == "fault"), None)


def content(path):
    """All that a folder or a file has."""
    if not os.path.isdir(path):
        with open(path, "rb") as stream:
            return stream.read()
    return {name: content(os.path.join(path, name)) for name in sorted(os.listdir(path))}


@contextlib.contextmanager
def playground():
    """A copy of the folder in which commands run."""
    with tempfile.TemporaryDirectory() as top:
        folder = os.path.join(top, "here")
        shutil.copytree(GROUND, folder, symlinks=True)
        yield folder


SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGQUIT

tried, faults, counting = {}, [], threading.Lock()


def judge(kind, what, problems):
    with counting:
        tried[kind] = tried.get(kind, 0) + 1
    for problem in problems:
        faults.append(f"{kind}: {what}: {problem}")
        print("FAULT", faults[-1], flush=True)


def last_words(run):
    """What is wrong with what a program said at its end."""
    err = FIGURES.sub(b"", run.err).replace(b"> ", b"")
    lines = [line for line in err.splitlines() if line.strip() and b"warning: " not in line]
    if len(lines) != 1 or not re.match(rb"(drugs|train_step|lab|pretrain|tokens|logits|export\.py|libgomp): .", lines[0]):
        yield f"status {run.status} and not one line but {run.err[-600:]}"
    if b"(null)" in err:
        yield f"says {run.err[-300:]}"


def left_behind(folder, files, right):
    """What is wrong with the files."""
    found = content(folder)
    for name in sorted(set(found) | set(GROUND_CONTENT)):
        if name in files and name in found and name not in GROUND_CONTENT:
            if right and found[name] != right[name]:
                yield f"{name} is not whole"
        elif found.get(name) != GROUND_CONTENT.get(name):
            yield f"{name} is left behind or changed"


def compare(run, folder, files, right):
    """What is wrong, where right is the undisturbed run and the files that it wrote."""
    good, its_files = right
    if run.status == 0:
        found = content(folder)
        if run.out != good.out:
            yield f"status 0, but it printed {run.out[-200:]}"
        yield from (f"status 0, but no {name}" for name in files if name not in found)
    elif run.status == 1:
        yield from last_words(run)
    else:
        yield f"status {run.status}: {run.err[-300:]}"
    yield from left_behind(folder, files, its_files)


def undisturbed(mode, fault=None):
    name, command, said, files = mode
    with playground() as folder:
        run = Run(folder, command, said, fault)
        assert run.status == 0, (name, run.err)
        found = content(folder)
        return run, {file: found[file] for file in files}


def disturbed(kind, mode, right, fault):
    name, command, said, files = mode
    with playground() as folder:
        run = Run(folder, command, said, fault)
        judge(kind, f"{name}, {fault}",
              ["nothing failed"] if run.fired() is None else compare(run, folder, files, right))


def some(n):
    """1 to n; of a great many the first ones, the last ones, and between them ever fewer."""
    chosen, k = set(range(1, min(n, 5000) + 1)), 1
    if n > 5000:
        chosen = set()
        while k <= n:
            chosen |= {k, n + 1 - k}
            k = max(k + 1, k * 11 // 10)
    return sorted(chosen)


def memory(pool):
    """Every allocation finds no memory once."""
    for mode in MODES:
        if mode[1][0] == EXPORT[0]:
            continue
        right = undisturbed(mode)
        n = right[0].count(1)
        print(f"memory: {mode[0]}, {n} allocations", flush=True)
        list(pool.map(lambda k: disturbed("memory", mode, right, f"alloc:{k}"), some(n)))
    # Python itself does not survive the loss of any odd allocation. But there may be little in all.
    for mode in MODES:
        if mode[1][0] == EXPORT[0]:
            right = undisturbed(mode)
            list(pool.map(lambda megabytes: little(mode, right, megabytes), range(24, 120, 4)))


def little(mode, right, megabytes):
    name, command, said, files = mode
    limit = megabytes << 20
    with playground() as folder:
        run = Run(folder, command, said,
                  before=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
        started = b"export.py: " in run.err or run.status == 0
        judge("memory", f"{name}, {megabytes} MB",
              compare(run, folder, files, right) if started else left_behind(folder, files, right[1]))


def writes(pool):
    """Every system call that writes fails once, in three ways."""
    for mode in MODES:
        right = undisturbed(mode)
        n = right[0].count(2)
        print(f"writes: {mode[0]}, {n} calls", flush=True)
        list(pool.map(lambda one: broken_write(mode, right, *one),
                      itertools.product(range(1, n + 1), (errno.EIO, errno.ENOSPC, errno.EPIPE))))


def noticed(run, folder, files, right):
    """What is wrong where a call has failed: that nobody noticed, or what compare says."""
    problems = [*compare(run, folder, files, right)]
    if run.fired() is None or run.status == 0:
        problems.append("nobody noticed")
    return problems


def broken_write(mode, right, k, number):
    name, command, said, files = mode
    with playground() as folder:
        run = Run(folder, command, said, f"write:{k}:error:{number}")
        if run.fired() == 2:        # nobody can be told; but all else is as it should be
            problems = [*left_behind(folder, files, right[1])]
            if run.status not in (0, 1) or run.out != right[0].out[:len(run.out)]:
                problems.append(f"status {run.status}")
        else:
            problems = noticed(run, folder, files, right)
        judge("writes", f"{name}, call {k}, {errno.errorcode[number]}", problems)


def reads(pool):
    """What shall be read is a folder, is missing or breaks off: every call that reads fails once."""
    for mode in MODES:
        right = undisturbed(mode, "read:0:error:0")     # none fails, but each gives little
        n = right[0].count(3)
        print(f"reads: {mode[0]}, {n} calls", flush=True)
        list(pool.map(lambda k: broken_read(mode, right, k), some(n)))
    for command, said in (([DRUGS, "m.bin", "-i", "@."], ""), ([DRUGS, "m.bin", "-i", "@none"], ""),
                          ([STEP, "m.bin", "-f", "."], ""), ([STEP, "m.bin", "-f", "none"], ""),
                          ([DRUGS, "none"], ""), ([DRUGS, "."], ""), ([DRUGS, "t.txt"], ""),
                          ([LAB, ".", "trip", "-i", "To be"], ""), ([*EXPORT, "none"], "")):
        with playground() as folder:
            run = Run(folder, command, said)
            judge("reads", " ".join(command[-3:]), [*last_words(run), *left_behind(folder, (), {})])
    for command in ([DRUGS, "m.bin", "-m", "chat"], [DRUGS, "m.bin", "-i", "-"], [TOKENS, "m.bin"]):
        with playground() as folder:
            stream = os.open(folder, os.O_RDONLY)
            done = subprocess.run(command, cwd=folder, stdin=stream, capture_output=True)
            os.close(stream)
            done.status, done.err = done.returncode, done.stderr
            problems = [*last_words(done)]
            judge("reads", f"{command[0]}: stdin is a folder", problems or [
                f"status {done.returncode}"] * (done.returncode != 1))


def broken_read(mode, right, k):
    name, command, said, files = mode
    with playground() as folder:
        run = Run(folder, command, said, f"read:{k}:error:{errno.EIO}")
        judge("reads", f"{name}, call {k}", noticed(run, folder, files, right))


def signals(pool):
    """A signal comes before each call that writes."""
    for mode in MODES:
        right = undisturbed(mode)
        n = right[0].count(2)
        print(f"signals: {mode[0]}, {n} calls", flush=True)
        list(pool.map(lambda one: interrupted(mode, right, *one),
                      itertools.product(range(1, n + 1), SIGNALS)))


def interrupted(mode, right, k, number):
    name, command, said, files = mode
    with playground() as folder:
        run = Run(folder, command, said, f"write:{k}:signal:{int(number)}")
        problems = [*left_behind(folder, files, right[1])]
        python = command[0] == EXPORT[0]
        if python and number == signal.SIGPIPE:
            problems += compare(run, folder, files, right)      # Python ignores it
        elif not python and run.status != -number:
            problems.append(f"status {run.status}, {run.err[-300:]}")
        elif python and run.status != 1:
            problems.append(f"status {run.status}, {run.err[-300:]}")
        elif python:
            problems += last_words(run)
        judge("signals", f"{name}, call {k}, {number.name}", problems)


def pairs(pool):
    """Two write to one name at the same time: one of them wins, and its file is whole."""
    def command(tool, size):
        if tool is EXPORT:
            return [*EXPORT, "old" if size == "1e-3" else "other", "-o", "out.bin"]
        return [STEP, "m.bin", "-l", "To be or", "-y", "", "-e", size, "-n", "2", "-o", "out.bin"]

    for tool in STEP, EXPORT:
        whole = []
        for size in "1e-3", "1e-2":
            with playground() as folder:
                Run(folder, command(tool, size))
                whole.append(content(os.path.join(folder, "out.bin")))
        for _ in range(20):
            with playground() as folder:
                both = [subprocess.Popen(command(tool, size), cwd=folder, stdout=subprocess.DEVNULL,
                                         stderr=subprocess.DEVNULL) for size in ("1e-3", "1e-2")]
                statuses = [one.wait() for one in both]
                problems = [*left_behind(folder, ("out.bin",), {})]
                if statuses != [0, 0]:
                    problems.append(f"statuses {statuses}")
                if content(os.path.join(folder, "out.bin")) not in whole:
                    problems.append("a mixture")
                judge("pairs", os.path.basename(tool[-1]) if tool is EXPORT else "train_step", problems)


def model(pool):
    """The model's file is cut, overwritten or replaced while it is used."""
    for mode in MODES:
        name, command, said, files = mode
        if "m.bin" not in command or command[0] == EXPORT[0] or command[0] == TOKENS:
            continue
        right = undisturbed(mode)
        n = right[0].count(2)
        print(f"model: {name}, {n} calls", flush=True)
        list(pool.map(lambda one: harmed(mode, right, *one),
                      itertools.product(range(1, n + 1), ("cut", "spoil", "paste"))))
    for harm in "cut", "spoil", "paste", "replace":
        for threads in "1", "4":
            between_two_lines(harm, threads)


def harmed(mode, right, k, harm):
    name, command, said, files = mode
    with playground() as folder:
        path = os.path.join(folder, "m.bin")
        run = Run(folder, command, said, f"write:{k}:{harm}:{path}")
        shutil.copy(os.path.join(GROUND, "m.bin"), path)
        problems = [*compare(run, folder, files, right)]
        if run.status == 1 and b"m.bin" not in run.err and b"not finite" not in run.err:
            problems.append(f"which file? {run.err}")
        judge("model", f"{name}, call {k}, {harm}", problems)


def between_two_lines(harm, threads):
    with playground() as folder:
        path, other = os.path.join(folder, "m.bin"), os.path.join(folder, "other.bin")
        chat = subprocess.Popen([DRUGS, path, "-m", "chat", "-n", "8"], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env={**os.environ, "OMP_NUM_THREADS": threads})
        chat.stdin.write(b"hello\n")
        chat.stdin.flush()
        chat.stdout.readline()           # then it waits for the next one
        if harm == "replace":
            with open(other, "wb") as stream:
                stream.write(b"something else")
            os.replace(other, path)
        else:
            with open(path, "r+b") as stream:
                size = os.path.getsize(path)
                if harm == "cut":
                    stream.truncate(0)
                else:
                    stream.write(b"\xff" * size if harm == "spoil" else GROUND_CONTENT["m.bin.other"])
        out, err = chat.communicate(b"and you?\n")
        run = type("", (), {"status": chat.returncode, "out": out, "err": err})
        if harm == "replace":
            problems = [] if run.status == 0 and len(out) > 1 else [f"status {run.status}: {err}"]
        else:
            problems = [*last_words(run)]
            if run.status != 1:
                problems.append(f"status {run.status}")
        judge("model", f"chat, {threads} threads, {harm} between two questions", problems)


def closed(pool):
    """Standard streams are closed when a program starts, or lead to a disk that is full."""
    for mode in MODES:
        name, command, said, files = mode
        right = undisturbed(mode)
        for which in itertools.chain(*(itertools.combinations(range(3), n) for n in (1, 2, 3))):
            if 0 in which and said:
                continue
            with playground() as folder:
                quoted = " ".join(f"{number}{'<' if not number else '>'}&-" for number in which)
                done = subprocess.run(["sh", "-c", f'exec "$@" {quoted}', "-", *command], cwd=folder,
                                      input=said.encode(), capture_output=True)
                problems = [*left_behind(folder, files, right[1])]
                if done.returncode not in (0, 1):
                    problems.append(f"status {done.returncode}")
                if done.returncode == 0 and 1 not in which and done.stdout != right[0].out:
                    problems.append(f"printed {done.stdout[-200:]}")
                if done.returncode == 0 and any(file not in content(folder) for file in files):
                    problems.append("a file is missing")
                judge("closed", f"{name}, without {which}", problems)
        with playground() as folder, open("/dev/full", "w") as full:
            done = subprocess.run(command, cwd=folder, input=said.encode(), stdout=full,
                                  stderr=subprocess.PIPE)
            done.status, done.err = done.returncode, done.stderr
            prints = bool(right[0].out)         # else it does not notice
            judge("closed", f"{name}, > /dev/full",
                  [*(last_words(done) if prints else ()), *left_behind(folder, files, right[1])]
                  + [f"status {done.status}"] * (done.status != prints))


def names(pool):
    """What -t, -o and --to lead to: devices, pipes, links, and files that only the owner may read."""
    writers = {"step": [STEP, "m.bin", "-l", "To be or", "-y", "", "-e", "1e-3", "-n", "2", "-o"],
               "export": [*EXPORT, "old", "-o"]}
    for name, command in writers.items():
        for kind in "fifo", "device", "folder", "link to nowhere", "link", "mode":
            with playground() as folder:
                path, far = os.path.join(folder, "out.bin"), os.path.join(folder, "far")
                os.mkdir(far)
                target = os.path.join(far, "away.bin")
                if kind == "fifo":
                    os.mkfifo(path)
                elif kind == "device":
                    try:
                        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
                    except PermissionError:
                        continue
                elif kind == "folder":
                    os.mkdir(path)
                elif kind.startswith("link"):
                    os.symlink("far/away.bin", path)
                if kind in ("link", "mode"):
                    with open(target if kind == "link" else path, "w") as stream:
                        stream.write("old")
                    os.chmod(path, 0o600)
                before = os.lstat(path)
                run = Run(folder, [*command, "out.bin"])
                after = os.lstat(path)
                problems = []
                if (stat.S_IFMT(before.st_mode), kind == "mode" or before.st_ino) != \
                        (stat.S_IFMT(after.st_mode), kind == "mode" or after.st_ino):
                    problems.append("it became something else")
                if kind in ("link", "mode"):
                    if run.status or os.path.getsize(path) < 100000 or os.stat(path).st_mode & 0o777 != 0o600:
                        problems.append(f"status {run.status}, {os.stat(path)}, {run.err}")
                elif run.status == 0 and kind == "link to nowhere":
                    if not os.path.exists(target):
                        problems.append("not written")
                elif run.status != 1:
                    problems.append(f"status {run.status}")
                else:
                    problems += last_words(run)
                extra = set(os.listdir(folder)) - set(GROUND_CONTENT) - {"out.bin", "far"}
                extra |= set(os.listdir(far)) - {"away.bin"}
                judge("names", f"{name} -o, {kind}", problems + [f"left behind: {extra}"] * bool(extra))
    with playground() as folder:
        os.makedirs(os.path.join(folder, "hf.tmp"))
        run = Run(folder, [*EXPORT, "m.bin", "--to", "hf", "hf"])
        judge("names", "hf.tmp is there", [] if run.status == 0 else [run.err])
    for text in "\x1b]0;title\x07", "two\nlines", "\x9b31m", "del\x7f":
        for command in ([DRUGS, "m.bin", text], [DRUGS, text], [STEP, "m.bin", "-f", text],
                        [LAB, "m.bin", text], [*EXPORT, text]):
            with playground() as folder:
                run = Run(folder, command)
                said = run.err.decode(errors="replace")
                problems = [] if run.status in (1, 2) and said.count("\n") == 1 else [said]
                if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in said[:-1]):
                    problems.append(f"a terminal would obey {run.err}")
                judge("names", f"{os.path.basename(command[-2])} {text!r}", problems)


KINDS = {"memory": memory, "writes": writes, "reads": reads, "signals": signals, "pairs": pairs,
         "model": model, "closed": closed, "names": names}


def build_pretrain(folder):
    """tests/pretrain in a hurry: one step, and then it is content."""
    with open(os.path.join(TESTS, "makers", "pretrain.c")) as stream:
        text = stream.read()
    patient, hasty = "LOOK_FROM = 500, LOOK_EVERY = 50, WIDE = 5", "LOOK_FROM = 1, LOOK_EVERY = 1, WIDE = 0"
    assert patient in text
    path = os.path.join(folder, "pretrain")
    with open(path + ".c", "w") as stream:
        stream.write(text.replace(patient, hasty))
    subprocess.run([os.environ.get("CC", "cc"), "-std=gnu11", "-ffp-contract=off", "-O3", "-w", "-I", os.path.join(TESTS, "makers"),
                    path + ".c", "-o", path, "-lm"], check=True)


def main():
    global SHIM, GROUND, GROUND_CONTENT
    wanted = sys.argv[1:] or list(KINDS)
    start = time.monotonic()
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN and number != signal.SIGPIPE:
            # As nohup leaves it, and programs heed that. (SIGPIPE is Python's own, and not handed on.)
            signal.signal(number, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as folder, \
            concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        SHIM, GROUND = os.path.join(folder, "faults.so"), os.path.join(folder, "ground")
        subprocess.run([os.environ.get("CC", "cc"), "-std=gnu11", "-O1", "-shared", "-fPIC",
                        os.path.join(HERE, "faults.c"), "-o", SHIM], check=True)
        build_pretrain(folder)
        os.environ["PATH"] = folder + os.pathsep + os.environ["PATH"]
        os.mkdir(GROUND)
        model_path = os.path.join(GROUND, "m.bin")
        shutil.copy(os.path.join(TESTS, "hamlet.bin"), model_path)
        with open(os.path.join(GROUND, "t.txt"), "w") as stream:
            stream.write("To be, or not to be")
        stepped = os.path.join(folder, "stepped.bin")
        subprocess.run([STEP, model_path, "-e", "1e-3", "-o", stepped], check=True, stdout=subprocess.DEVNULL)
        shutil.copy(stepped, model_path + ".other")
        for path, name in (model_path, "old"), (stepped, "other"):
            subprocess.run([*EXPORT, path, "--to", "hf", os.path.join(GROUND, name)], check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        GROUND_CONTENT = content(GROUND)
        for kind in wanted:
            KINDS[kind](pool)
    figures = ", ".join(f"{kind} {number}" for kind, number in tried.items())
    print(f"{sum(tried.values())} faults tried ({figures}) in {time.monotonic() - start:.0f} s, "
          f"{len(faults)} not met as they should be")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
