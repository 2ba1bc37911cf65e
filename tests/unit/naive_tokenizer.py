"""A tokenizer that does what a flat file says, slowly and plainly: the reference for the tests.

    file = read_file(data)                      # the bytes of a flat file, version 3
    ids = encode_like_huggingface(file, text)

It shares nothing with export.py, and knows nothing but what the file holds.  Where drugs.c walks
the automata of the file, here Python's own regular expressions match the patterns they were made of.
"""

import collections
import functools
import itertools
import re
import struct
import sys
import unicodedata

NORMAL, CONTROL, UNKNOWN, BYTE, USER_DEFINED, END = range(6)
PREFIX_SPACE, PREFIX_EACH, PREFIX_UNLESS_SPACE, COLLAPSE_SPACES, NEWLINE_SPACE = 1, 2, 4, 8, 16
BYTE_UNIT = 0x110000

NAMES = ("version dim hidden layers heads kv head vocab seq shared window eps storage bos unknown "
         "flags n_cutters n_states n_classes n_ranges n_units n_pairs n_whole n_words n_text").split()
Piece = collections.namedtuple("Piece", "kind text")


class File:
    """The parts of a flat file that come before the tensors, which begin at `end`."""


def read_file(data):
    assert data[:8] == b"drugs.c\0" and not any(data[108:256])
    file = File()
    file.__dict__.update(zip(NAMES, struct.unpack("<11if13i", data[8:108])))
    assert file.version == 3 and file.storage in (0, 1, 2)
    file.end = 256

    def records(kind, width, count):
        size = count * struct.calcsize("<%d%s" % (width, kind))
        file.end += size
        return list(struct.iter_unpack("<%d%s" % (width, kind), data[file.end - size:file.end]))
    file.frequencies = tuple(itertools.chain(*records("d", 1, file.head // 2)))
    file.ranges = records("I", 3, file.n_ranges)
    file.steps = records("I", file.n_classes + 1, file.n_states)
    units = records("I", 3, file.n_units)
    pairs = records("I", 4, file.n_pairs)
    strings = records("I", 2, file.vocab + 6 + file.n_cutters)
    file.whole = [token for token, in records("I", 1, file.n_whole)]
    words = [token for token, in records("I", 1, file.n_words)]
    text = data[file.end:file.end + file.n_text]
    file.end += file.n_text
    ends = [0] + [end for end, _ in strings]
    assert ends == sorted(ends) and ends[-1] == file.n_text == len(text)
    texts = [text[first:end] for first, end in zip(ends, ends[1:])]
    file.pieces = [Piece(kind, texts[token]) for token, (_, kind) in enumerate(strings[:file.vocab])]
    file.chat = [string.decode() for string in texts[file.vocab:file.vocab + 6]]
    file.takes = [kind for _, kind in strings[file.vocab:file.vocab + 6]]
    file.chat = file.chat if any(file.chat) else []
    file.patterns = [string.decode() for string in texts[file.vocab + 6:]]
    file.units = {first: token for first, last, token in units}
    assert units == sorted(units) and all(first == last for first, last, _ in units)
    assert pairs == sorted(pairs)
    file.pairs = {(left, right): (rank, merged) for left, right, merged, rank in pairs}
    assert len(file.pairs) == len(pairs)
    file.words = {file.pieces[token].text: token for token in words}
    assert [file.pieces[token].text for token in words] == sorted(file.words)
    check_whole(file)
    return file


def check_whole(file):
    wanted = [token for token, piece in enumerate(file.pieces)
              if piece.kind in (CONTROL, USER_DEFINED, END) and piece.text]
    texts = [file.pieces[token].text for token in file.whole]
    assert sorted(file.whole) == wanted
    assert file.whole == sorted(wanted, key=lambda token: (
        file.pieces[token].text[0], -len(file.pieces[token].text), token))
    file.found_whole = {}
    for text, token in zip(texts, file.whole):
        file.found_whole.setdefault(text.decode(), token)


def encode_like_huggingface(file, text, begin=True, control=False):
    """The ids of a text; `control`: whether control pieces that are spelt in it are meant."""
    ids = [file.bos] if begin and file.bos >= 0 else []
    always = file.flags & PREFIX_SPACE and not file.flags & (PREFIX_EACH | PREFIX_UNLESS_SPACE)
    cut = sections(file, text, control)
    if always and cut and not file.flags & COLLAPSE_SPACES and not (
            control and is_control(file, cut[0][1])):
        # The space comes first, and a user-defined piece may begin with it.
        cut, always = [(1, section) for _, section in sections(file, " " + text, control)], False
    for at, section in cut:
        if section in file.found_whole and (control or not is_control(file, section)):
            if at == 0 and always and not is_control(file, section):
                ids += encode_section(file, " ")
            ids.append(file.found_whole[section])
        else:
            ids += encode_section(file, normalise(file, section, at == 0))
    return fused(file, ids)


def fused(file, ids):
    """A run of unknown tokens is one; None stands for what is not there at all."""
    ids = [token for before, token in zip([None] + ids, ids)
           if (before, token) != (file.unknown,) * 2]
    return [token for token in ids if token is not None]


def is_control(file, section):
    token = file.found_whole.get(section)
    return token is not None and file.pieces[token].kind != USER_DEFINED


def sections(file, text, control):
    """(where it begins, the section): cut at the pieces that are found whole, longest first."""
    names = [name for name, token in file.found_whole.items()
             if control or file.pieces[token].kind == USER_DEFINED]
    if not names:
        return [(0, text)] if text else []
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    out, at = [], 0
    for section in re.split("(%s)" % pattern, text):
        if section:
            out.append((at, section))
        at += len(section)
    return out


def normalise(file, text, is_first):
    if file.flags & NEWLINE_SPACE:
        text = text.replace("\n", "\n ")
    if file.flags & COLLAPSE_SPACES:
        text = re.sub(" {2,}", " ", text.strip(" "))
    if file.flags & PREFIX_SPACE and text:
        spaces = " \u2581" if 0x2581 in file.units else " "
        wanted = file.flags & PREFIX_EACH or is_first
        if wanted and not (file.flags & PREFIX_UNLESS_SPACE and text[0] in spaces):
            text = " " + text
    return text


def encode_section(file, text):
    ids, words = [], [text]
    for pattern in file.patterns:
        words = [part for word in words for part in isolated(pattern, word)]
    for word in words:
        if word.encode() in file.words:
            ids.append(file.words[word.encode()])
            continue
        for symbol, data in merge(file, list(units(file, word))):
            ids += symbol_ids(file, symbol, data)
    return ids


def units(file, word):
    """(id or None, bytes) of what merging begins with."""
    for character in word:
        data = character.encode()
        if ord(character) in file.units:
            yield file.units[ord(character)], data
            continue
        for byte in data:
            token = file.units.get(BYTE_UNIT + byte)
            if token is not None or file.unknown >= 0:
                yield token, bytes([byte])


def symbol_ids(file, symbol, data):
    if symbol is not None and symbol < file.vocab:
        return [symbol]
    found = [file.units.get(BYTE_UNIT + byte) for byte in data] if symbol is not None else [None]
    unknown = file.unknown if file.unknown >= 0 else None
    return [unknown if token is None else token for token in found]


def merge(file, symbols):
    while True:
        ranks = [file.pairs.get((a, b)) for (a, _), (b, _) in zip(symbols, symbols[1:])]
        best = min((pair[0] for pair in ranks if pair), default=None)
        if best is None:
            return symbols
        at = [pair and pair[0] for pair in ranks].index(best)
        symbols[at:at + 2] = [(ranks[at][1], symbols[at][1] + symbols[at + 1][1])]


# ------------------------------------------------------------------------------------------------
# Cutting.  Python's re knows neither \p{..} nor the White_Space of Unicode, so these are written
# out as ranges of characters.

WHITE_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")


def isolated(pattern, text):
    out, at = [], 0
    for match in compiled(pattern).finditer(text):
        out += [text[at:match.start()], match.group()]
        at = match.end()
    return [part for part in out + [text[at:]] if part]


@functools.lru_cache(maxsize=None)
def compiled(pattern):
    out, inside, at = [], False, 0
    special = re.compile(r"\\([pP])\{(\w+)\}|\\([sSdD])|\\.|.", re.S)
    while at < len(pattern):
        found = special.match(pattern, at)
        at = found.end()
        if found[1] or found[3]:
            ranges = written_out(found[2] or found[3].lower(), (found[1] or found[3]).isupper())
            out.append(ranges if inside else "[%s]" % ranges)
            continue
        inside = found[0] == "[" or inside and found[0] != "]"
        out.append(found[0])
    return re.compile("".join(out))


@functools.lru_cache(maxsize=None)
def written_out(name, negated):
    def has(code):
        if name == "s":
            return bool(WHITE_SPACE.match(chr(code)))
        return unicodedata.category(chr(code)).startswith("Nd" if name == "d" else name)
    out, at = [], 0
    for kind, run in itertools.groupby(range(sys.maxunicode + 1), has):
        length = sum(1 for _ in run)
        if kind != negated:
            out.append("\\U%08x-\\U%08x" % (at, at + length - 1))
        at += length
    return "".join(out)
