"""drugs.c's tokenizer against a naive one (naive_tokenizer.py), on thousands of random texts over
small made-up vocabularies of every kind that a flat file can describe.

    python3 -m unittest discover tests/unit
    python3 tests/unit/test_tokenizer.py
"""

import itertools
import os
import random
import subprocess
import sys
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
TOKENS = os.path.join(os.path.dirname(HERE), "tokens")
sys.path.insert(0, HERE)
import test_export as made      # noqa: E402  (the folder must be on the path first)
from naive_tokenizer import (       # noqa: E402
    COLLAPSE_SPACES, NEWLINE_SPACE, PREFIX_EACH, PREFIX_SPACE, PREFIX_UNLESS_SPACE,
    encode_like_huggingface, read_file)

# What random texts are made of: whatever a rule for cutting or a flag says something about.
PARTS = [
    *"abchetsdx", "the", " the", "he", "ab", "abab", "THE", "Th",
    *" \t\r\n\v\f", "  ", "   ", "\n\n", "\r\n", " \n", "\u00a0", "\u2003", "\u3000", "\u2028",
    "\u2581", "\u2581a", "\u2581\u2581",
    *"0123456789", "12", "123", "1234567", "\u0663", "\u00b2", "\u00bd", "\u2164",
    *"!?.,'-_", "'s", "'S", "'t", "'re", "'RE", "'Ve", "'m", "'ll", "'lL", "'d", "'\u017f",
    "\u017f",
    "\u00e9", "\u00c9", "e\u0301", "\u0301", "\u4e2d", "\u6587", "\u0416", "\U0001f600",
    "\U00020000", "\ufeff", "\x7f", "\x01", "\x1c", "\u0085", "\u200b", "\u00df", "\u0130",
]


def texts(seed, number, extra=()):
    rng = random.Random(str(seed))
    out = [""] + PARTS + list(extra)
    for _ in range(number):
        few = rng.sample(PARTS, 5) + list(extra)        # so that some meet often
        pool = rng.choice([PARTS + list(extra), few])
        out.append("".join(rng.choice(pool) for _ in range(rng.randrange(1, 13))))
    return out


def ids_in_c(path, texts, *options):
    """The ids that drugs.c gives: a list for each text."""
    done = subprocess.run([TOKENS, path] + list(options), stdout=subprocess.PIPE, check=True,
                          input=b"".join(text.encode() + b"\0" for text in texts))
    return [list(map(int, line.split())) for line in done.stdout.decode().split("\n")[:-1]]


def naive_ids(file, text, control):
    """With a piece that spells BOS in front the program puts no second one."""
    ids = encode_like_huggingface(file, text, control=control)
    return ids[1:] if control and file.bos >= 0 and ids[1:2] == [file.bos] else ids


# Flags that change any text, in every combination.
FLAGS = [sum(flags) for flags in itertools.product(
    (0, PREFIX_SPACE), (0, PREFIX_EACH), (0, PREFIX_UNLESS_SPACE), (0, COLLAPSE_SPACES),
    (0, NEWLINE_SPACE))]


# Texts, cut at each | by the five rules of CUT_STEPS; None: as by the rule before.  From Perl, whose
# regular expressions know letters and numbers as those of the tokenizers do.
CUT_WORDS = [
    ("Hello| world|,| it|'s| 2024|!",
     "Hello| world|,| it|'s| |2|0|2|4|!",
     "Hello| world|,| it|'s| |202|4|!",
     "Hello| world|,| it|'s| |2|0|2|4|!",
     "Hello| world|,| it|'s| |2024|!"),
    ("I|'|LL| we|'|Ve| '|S|'|T| DON|'|T", None, "I|'LL| we|'Ve| '|S|'T| DON|'T", None, None),
    ("''|s| '|\u017f| x|'|\u017fy", None, "''|s| '|\u017f| x|'\u017f|y", None, None),
    ("'|\u0141x", None, "'\u0141x", None, None),
    ('a| | b|  | c|    ', None, None, None, None),
    ('  | lead', None, None, None, None),
    ('one|\n|two|\n\n | three| \n', None, 'one|\n|two|\n\n| | three| \n', None, None),
    ('x|\r\n\r|\n|y|  \n| z', None, 'x|\r\n\r\n|y|  \n| z', None, None),
    ('1234567| 12| x|7| 7|x',
     '1|2|3|4|5|6|7| |1|2| x|7| |7|x',
     '123|456|7| |12| x|7| |7|x',
     '1|2|3|4|5|6|7| |1|2| x|7| |7|x',
     '1234567| |12| x|7| |7|x'),
    (' | 12| | 3|\n|4',
     '  |1|2|  |3|\n|4',
     ' | |12| | |3|\n|4',
     ' | |1|2| | |3|\n|4',
     ' | |12| | |3|\n|4'),
    ('\xe9| \xc9| na\xefve| \xdfx', None, None, None, None),
    ('\u4e2d\u6587| \u5b57', None, None, None, None),
    ('a|\U0001f600\U0001f600| b| \U0001f600!', None, None, None, None),
    ('a|\u3000|b| |\u3000|c', None, 'a|\u3000b| |\u3000c', None, None),
    ('!!|\n|\n|??| .|\r\n', None, '!!\n\n|??| .\r\n', None, None),
    ('$|abc| #|1| -|x', None, '$abc| #|1| -|x', None, None),
    ('\xb2\xbd\u2163|X| \u0663\u0663',
     '\xb2|\xbd|\u2163|X| |\u0663|\u0663',
     '\xb2\xbd\u2163|X| |\u0663\u0663',
     '\xb2|\xbd|\u2163|X| |\u0663|\u0663',
     '\xb2\xbd\u2163|X| |\u0663\u0663'),
    ('a|_|b|__|c', None, 'a|_b|__|c', None, None),
    ('\t|\t|x|\t| y', None, '\t|\tx|\t| y', None, None),
    ('e|\u0301|x', None, 'e|\u0301x', None, None),
    ('\xa0|\xa0|x', None, '\xa0|\xa0x', None, None),
    (' \n\n| a', None, None, None, None),
    ("'", None, None, None, None),
    ("1|'|S|2|'s", None, "1|'S|2|'s", None, None),
]
CUT_STEPS = [made.GPT2_STEPS, made.SMOLLM_STEPS, made.LLAMA3_STEPS, made.llama3_steps(r"\p{N}"),
             made.llama3_steps(r"\p{N}+")]


class TestTokenizer(made.Case):
    maxDiff = None

    def check(self, data, what, number=300, extra=()):
        """No text is encoded differently by the two; one that is is made as short as can be."""
        path, file = self.path(), read_file(data)
        made.save(path, data)
        for control in False, True:
            options = ["-x"] * control
            few = texts(what, number, extra)
            for text, got in zip(few, ids_in_c(path, few, *options)):
                if got == naive_ids(file, text, control):
                    continue
                at = 0
                while at < len(text):
                    less = text[:at] + text[at + 1:]
                    if ids_in_c(path, [less], *options)[0] == naive_ids(file, less, control):
                        at += 1         # this character is needed
                    else:
                        text, at = less, 0
                self.assertEqual(ids_in_c(path, [text], *options)[0],
                                 naive_ids(file, text, control), (what, text, control))

    def exported(self, content):
        small = made.Small(True)
        folder = made.write_hf(self.path(), small, config=made.hf_config(
            small, bos_token_id=None, eos_token_id=None))
        os.remove(os.path.join(folder, "tokenizer.model"))
        made.save(os.path.join(folder, "tokenizer.json"), content)
        out = self.path()
        done = made.run(folder, "-o", out)
        self.assertEqual(done.returncode, 0, done.stderr)
        return made.load(out)

    def test_byte_level(self):
        never = [0xc0, 0xc1, 0xe4, *range(0xf0, 0x100)]
        for name, steps in (
                ("GPT-2", made.GPT2_STEPS), ("SmolLM", made.SMOLLM_STEPS),
                ("GPT-2, prefix", dict(made.LEVEL, add_prefix_space=True)),
                ("uncut", dict(made.LEVEL, use_regex=False)),
                ("Llama 3", made.LLAMA3_STEPS), ("Llama 3, 2", made.llama3_steps(r"\p{N}{1,2}")),
                ("Qwen 2", made.llama3_steps(r"\p{N}")), ("any", made.llama3_steps(r"\p{N}+")),
                ("Tekken", made.TEKKEN_STEPS), ("DeepSeek", made.DEEPSEEK_STEPS),
                ("odd", made.split_steps(r"(?:ab|a)(?=[b-d])|[^\S\n]{2,3}|\d{2}|(?i:s)x?|\P{L}\D"))):
            for absent in (), never:
                for ignore in False, True:
                    content = made.byte_level(steps, absent=absent, ignore_merges=ignore)
                    extra = made.SPECIAL + made.WORDS
                    self.check(self.exported(content), (name, len(absent), ignore), extra=extra)

    def test_words(self):
        for row in map(list, CUT_WORDS):
            for words, steps in zip(row, CUT_STEPS):
                words = row[0] = words or row[0]
                path = self.path()
                made.save(path, self.exported(made.byte_level(
                    steps, ignore_merges=True, words=words.split("|"))))
                file = read_file(made.load(path))
                ids, = ids_in_c(path, [words.replace("|", "")])
                self.assertEqual([file.pieces[token].text.decode() for token in ids],
                                 words.split("|"), (words, steps))

    def test_families(self):
        for name, family in made.FAMILIES.items():
            data = self.export(made.write_family(self.path(), family), quiet=False)
            file = read_file(data)
            names = [text for text in file.found_whole if text]
            self.check(data, name, extra=names + [text for text in file.chat if text])

    # Some pieces with a score, and some that are found whole.
    LEARNED = made.LEARNED + [
        (-1.25, 0, b"the"), (-2.25, 0, b"th"), (-1.125, 0, b"he"), (-9, 0, b"t"), (-9, 0, b"h"),
        (-9, 0, b"e"), (-4, 0, b"aca"), (-4.5, 0, b"ac"), (-4.75, 0, b"ca"), (-2, 0, b"12"),
        (-1, 0, b"\n\n"), (-1.5, 0, "e\u0301".encode())]
    WHOLE = [(0, 4, b"b c"), (0, 4, b"dd"), (0, 4, b"\n\n"), (0, 4, b" e"), (0, 5, b"<end>"),
             (0, 1, b"<a b>"), (0, 1, b"<a b>c")]
    NAMES = ["b c", "dd", " e", "<end>", "<a b>", "<a b>c", "<s>", "</s>", "the", "aca", "e\u0301"]

    def check_flags(self, pieces, flags, what, **changes):
        pieces = pieces + self.LEARNED + self.WHOLE
        pieces += [(0, 1, b"")] * (280 - len(pieces))
        small = made.Small(True, vocab=len(pieces))
        self.check(made.flat(pieces, small, flags=flags, **changes), (what, flags), number=100,
                   extra=self.NAMES)

    def test_over_characters(self):
        for flags in FLAGS:
            self.check_flags(made.ENDS + made.BYTES, flags, "bytes")
            self.check_flags(made.ENDS, flags, "unknown")

    def test_over_bytes(self):
        every = [(0, 0, bytes([byte])) for byte in range(256)]
        few = [piece for piece in every if piece[2] not in b"\xe4\xc3xz!"]
        no_unknown = [(0, 1, b"<unk>")] + made.ENDS[1:]
        for flags in FLAGS[::5]:
            for patterns in (made.GPT2,), (r"\p{N}", made.GPT2), (made.LLAMA3_PATTERN,), ():
                changes = dict(byte_level=True, patterns=patterns)
                self.check_flags(no_unknown + every, flags, changes, **changes)
                self.check_flags(no_unknown + few, flags, changes, takes_words=True, **changes)
                self.check_flags(made.ENDS + few, flags, changes, **changes)


if __name__ == "__main__":
    unittest.main()
