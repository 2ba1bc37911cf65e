#!/usr/bin/env python3
"""Feeds the programs with inputs that nobody would write.

    make fuzz SECONDS=120                        every target for two minutes, one after the other
    python3 tests/judges/fuzz.py 120 file text ...      only these: file text drugs step export

The first four are in tests/judges/fuzz.c and need clang with libFuzzer. What they begin with is made here and
not kept as files, so that it follows the format: small models with each kind of vocabulary. export
changes a few bytes of small checkpoints; a run of export.py counts as a success if drugs.c loads what
came of it, and else it must end with one line.
Whatever breaks something is kept in the working folder, which is printed.
"""

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.dirname(HERE)
sys.path.insert(0, os.path.join(TESTS, "unit"))
import test_export as small              # noqa: E402  (the folder must be on the path first)

FLAGS = ("-std=gnu11 -O1 -g -ffp-contract=off -fsanitize=fuzzer,address,undefined "
         "-fno-sanitize-recover=undefined -Wno-psabi -Wno-unknown-pragmas").split()
TINY = dict(dim=4, hidden=3, layers=2, heads=2, kv=1, head=2, seq=24)
CHAT = ["[INST] ", "<<SYS>>\n", "\n<</SYS>>\n", "<s>[INST] ", " [/INST]", "</s>"]


def models():
    """Flat files, as small as they can be: with byte pieces, without, byte-level, and with a chat."""
    whole = small.ENDS + small.BYTES + small.LEARNED + [(0, 1, b"")] * 3
    bare = small.ENDS + small.LEARNED + [(0, 4, b"<u>"), (-1, 0, "a\u6f22".encode())]
    level = [(0, 1, b"<s>"), (0, 5, b"</s>"), *((0, 0, bytes([b])) for b in range(256)),
             *((-rank, 0, text.encode()) for rank, text in enumerate(small.WORDS) if len(text) > 1)]
    digits = r"\p{N}"
    def make(pieces, **more):
        sized = small.Small(True, vocab=len(pieces), **TINY)
        return small.flat(pieces, sized, **more)

    return [make(whole, chat=CHAT), make(bare),
            make(level, bos=0, flags=0, byte_level=True, patterns=[digits, small.GPT2]),
            make(level, bos=0, flags=0, byte_level=True, patterns=[small.LLAMA3_PATTERN],
                 takes_words=True),
            make(whole, flags=0, window=4)]


# Plain ones, and of the kinds that once came out wrong: broken characters, a terminal's, zeros.
TEXTS = [b"To be ab abc", "the 12345 th's\n\n  \u00e9".encode(), b"<s>[INST] ab </s>",
         b"ab \xc3 \xe2\x82 \xff\xed\xa0\x80", b"\x1b[31m\xc2\x9b\x7f ab\0ab"]
LINES = {
    "drugs": ["-i\nTo be\n-n\n4", "-V\n.3@ceil:0=1,.5=0\n-u\n-c\n2", "-m\nchat\n-y\nab", "-i\n-\n-x", "-h",
              "-t\n1\n-p\n.5\n-s\n7", "-H\n.1\n-Q\n.2\n-K\n.3\n-A\n.4@interpolate:0=0,1=2\n-d\n.4\n-w\n.1",
              "-r\nupstream\n-i\n@0.bin", "-H\n1@floor:-1=3,.5=1e38"],
    "step": ["-l\nab ab\n-n\n2\n-e\n0,1e-3", "-l\nab a\n-x\nlast\n-e\n.1\n-o\nx.bin", "-h", "-g\n b\n-y\n\n-f\nt",
             "-l\nabc\n-t\nx.csv\n-V\n.3\n-s\n3", "-t\nx.md\n-e\n1e-3\n-i\nab\n-H\n.1"],
}
WORDS = ["-" + letter for letter in "iunmyctphxlegfoHQKVAdwrs"] + [
    "@ceil:", "@floor:", "@interpolate:", "chat", "generate", "centred", "upstream", "last", "all",
    "1e-3", "1e38", "nan", "inf", ".bin", ".csv", ".md"]


def prepare(folder):
    files = models()
    for name in "file", "text", "drugs", "step":
        os.mkdir(os.path.join(folder, name))
    for number, data in enumerate(files):
        small.save(os.path.join(folder, f"{number}.bin"), data)
        small.save(os.path.join(folder, f"file/{number}"), data)
    for number, text in enumerate(TEXTS):
        for model in range(len(files)):
            small.save(os.path.join(folder, f"text/{number}{model}"), bytes([model, 0]) + text)
    for target, lines in LINES.items():
        for number, line in enumerate(lines):
            for model in 0, 2:
                small.save(os.path.join(folder, target, f"{number}{model}"), f"{model}\n{line}")
    with open(os.path.join(folder, "words"), "w") as stream:
        stream.writelines(f'"{word}"\n' for word in WORDS)


def run_target(target, seconds, folder):
    program, work = os.path.join(folder, "fuzz_" + target), os.path.join(folder, "work_" + target)
    subprocess.run([os.environ.get("FUZZ_CC", "clang"), *FLAGS, f"-DTARGET_{target.upper()}",
                    os.path.join(HERE, "fuzz.c"), "-o", program, "-lm"], check=True)
    os.makedirs(work)
    done = subprocess.run(
        [program, os.path.join(folder, target), f"-max_total_time={seconds}", "-timeout=20",
         "-rss_limit_mb=4096", "-detect_leaks=0", "-close_fd_mask=3", "-print_final_stats=1",
         "-max_len=6000" if target == "file" else "-max_len=400",
         *(["-dict=../words"] if target in LINES else [])],
        cwd=work, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "FUZZ_MODELS": folder})
    text = done.stderr.decode(errors="replace")
    runs = re.search(r"number_of_executed_units: *(\d+)", text)
    cover = re.findall(r"cov: (\d+)", text)
    print(f"{target}: {runs.group(1) if runs else '?'} inputs, {cover[-1] if cover else '?'} places reached, "
          f"status {done.returncode}", flush=True)
    if done.returncode:
        print(text[-3000:])
    return done.returncode != 0


def change(data, rng):
    """One to four changes, most of them small."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not data:
            break
        at = rng.randrange(min(len(data), rng.choice((64, 1024, len(data)))))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 1, 9, 34, 48, 57, 92, 127, 128, 255))
        elif kind == 2:
            del data[at:at + rng.choice((1, 2, 8, 100))]
        elif kind == 3:
            data[at:at] = rng.choice((b"0", b"-", b"null", b"[]", b"{}", b"\\u0000", b"9" * 20, b"\xff\xfe"))
        elif kind == 4:
            other = rng.randrange(len(data))
            data[at:at + 4] = data[other:other + 4]
        elif numbers := list(re.finditer(rb"-?\d+(\.\d+)?(e-?\d+)?|true|false|null", data)):
            found = rng.choice(numbers)
            data[found.start():found.end()] = rng.choice(
                (b"0", b"-1", b"1", b"2", b"7", b"1e308", b"NaN", b"true", b"null", b'""', b"[1]", b"65536",
                 b"4294967296"))
    return bytes(data)


def run_export(seconds, folder):
    """Checkpoints of every family, and all kinds of files."""
    top = os.path.join(folder, "checkpoints")
    for name, family in small.FAMILIES.items():
        small.write_family(os.path.join(top, name), family)
    os.makedirs(os.path.join(top, "v0"))
    for number, data in enumerate(models()):
        os.makedirs(os.path.join(top, f"{number}.flat"))
        small.save(os.path.join(top, f"{number}.flat/m.bin"), data)
    sized = small.Small(True)
    small.write_meta(os.path.join(top, "meta"), sized)
    small.save(os.path.join(top, "v0/m.v0"), small.v0(small.Small(True)))
    small.save(os.path.join(top, "v0/tokenizer.bin"), small.tokenizer_bin())
    tokens = os.path.join(TESTS, "tokens")
    rng, tried, written, bad, end = random.Random(420), 0, 0, 0, time.monotonic() + seconds
    while time.monotonic() < end and bad < 10:
        tried += 1
        case = os.path.join(folder, "case")
        shutil.rmtree(case, ignore_errors=True)
        name = rng.choice(sorted(os.listdir(top)))
        shutil.copytree(os.path.join(top, name), case)
        files = [os.path.join(at, file) for at, _, names in os.walk(case) for file in names]
        for path in rng.sample(files, min(len(files), rng.choice((1, 1, 2)))):
            small.save(path, change(small.load(path), rng))
        out = os.path.join(folder, "out.bin")
        single = [path for path in files if path.endswith((".bin", ".v0")) and "m." in path]
        command = [case, "-o", out]
        if name.endswith(".flat"):
            command = [*single, "--to", "hf", os.path.join(folder, "hf")]
        elif name == "v0":
            command[0] = single[0]
        problem = None
        try:
            done = small.run(*command)
            if done.returncode not in (0, 1) or (done.returncode == 1 and not re.search(
                    r"\A(export.py: [^\n]* warning: [^\n]*\n)*export.py: [^\n]*\n\Z", done.stderr)):
                problem = f"status {done.returncode}: {done.stderr[-500:]}"
        except Exception as error:      # what it did not expect
            done, problem = None, f"{type(error).__name__}: {error}"
        if done and done.returncode == 0 and not name.endswith(".flat"):
            written += 1
            load = subprocess.run([tokens, out], input=b"To be ab\0", capture_output=True)
            if load.returncode:
                problem = load.stderr.decode(errors="replace")
        for path in out, os.path.join(folder, "hf"):
            shutil.rmtree(path) if os.path.isdir(path) else os.path.exists(path) and os.remove(path)
        if problem:
            bad += 1
            kept = os.path.join(folder, f"bad{bad}")
            shutil.copytree(case, kept)
            print(f"export: {kept} ({name}): {problem}", flush=True)
    print(f"export: {tried} checkpoints, {written} written and loaded, {bad} bad", flush=True)
    return bad


def main():
    seconds, *targets = sys.argv[1:] or ["120"]
    folder, bad = tempfile.mkdtemp(prefix="fuzz"), 0
    prepare(folder)
    for target in targets or ["file", "text", "drugs", "step", "export"]:
        bad += (run_export(int(seconds), folder) if target == "export"
                else run_target(target, int(seconds), folder))
    if bad:
        sys.exit(f"what was found is in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
