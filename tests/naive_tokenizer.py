"""A tokenizer that does what a flat file says, slowly and plainly: the reference for the tests.

    file = read_file(data)                      # the bytes of a flat file, version 2
    ids = encode_like_huggingface(file, text)

It shares nothing with export.py, and knows nothing but what the file holds.
"""

import bisect
import collections
import re
import struct

NORMAL, CONTROL, UNKNOWN, BYTE, USER_DEFINED, END = range(6)
PREFIX_SPACE, BYTE_PIECES, PREFIX_EACH, COLLAPSE_SPACES = 1, 2, 4, 8
IGNORE_MERGES, SEPARATE_UNKNOWN, PREFIX_UNLESS_SPACE, NEWLINE_SPACE = 16, 32, 64, 128
LETTER, NUMBER, WHITE = 1, 2, 3

NAMES = ("version dim hidden layers heads kv head vocab seq shared window bos flags cut_rule "
         "most_digits n_ranges chat_bytes eps tokenizer_bytes n_more").split()
Piece = collections.namedtuple("Piece", "score kind text left")


class File:
    """The parts of a flat file that come before the tensors, which begin behind `end`."""


def read_file(data):
    assert data[:8] == b"drugs.c\0" and not any(data[92:256])
    file = File()
    file.__dict__.update(zip(NAMES, struct.unpack("<17ifqi", data[8:92])))
    assert file.version == 2
    at = 256
    file.frequencies = struct.unpack_from("<%dd" % (file.head // 2), data, at)
    at += 8 * len(file.frequencies)
    file.ranges = [struct.unpack_from("<III", data, at + 12 * n) for n in range(file.n_ranges)]
    at += 12 * file.n_ranges
    file.more = [struct.unpack_from("<IIf", data, at + 12 * n) for n in range(file.n_more)]
    at += 12 * file.n_more
    file.chat, chat_end = [], at + file.chat_bytes
    while at < chat_end:
        length, = struct.unpack_from("<H", data, at)
        file.chat.append(data[at + 2:at + 2 + length].decode())
        at += 2 + length
    assert at == chat_end and len(file.chat) in (0, 6)
    file.pieces, pieces_end = [], at + file.tokenizer_bytes
    for _ in range(file.vocab):
        score, kind, zero, length, left = struct.unpack_from("<fBBHH", data, at)
        file.pieces.append(Piece(score, kind, data[at + 10:at + 10 + length], left))
        assert zero == 0 and (length or kind == CONTROL)
        at += 10 + length
    assert at == pieces_end
    file.end = at
    prepare(file)
    return file


def prepare(file):
    """Tables that look things up by what they are."""
    file.of_text, file.of_byte, file.unknown, file.found_whole = {}, {}, None, {}
    for token, piece in enumerate(file.pieces):
        if piece.kind == NORMAL:
            file.of_text.setdefault(piece.text, token)
        elif piece.kind == BYTE:
            file.of_byte[piece.text] = token
        elif piece.kind == UNKNOWN:
            file.unknown = token
        elif piece.text:
            file.found_whole[piece.text.decode()] = token
    file.scores = {(token, left): score for token, left, score in file.more}
    file.firsts = [first for first, _, _ in file.ranges]


def encode_like_huggingface(file, text, begin=True, control=False):
    """The ids of a text; `control`: whether control pieces that are spelt in it are meant."""
    ids = [file.bos] if begin and file.bos >= 0 else []
    always = file.flags & PREFIX_SPACE and not file.flags & (PREFIX_EACH | PREFIX_UNLESS_SPACE)
    for at, section in sections(file, text, control):
        if section in file.found_whole and (control or not is_control(file, section)):
            if at == 0 and always and not is_control(file, section):
                ids += encode_section(file, " ")
            ids.append(file.found_whole[section])
        else:
            ids += encode_section(file, normalise(file, section, at == 0))
    return ids


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
    if not file.cut_rule:
        text = text.replace("\u2581", " ")         # SentencePiece writes a space so
    if file.flags & PREFIX_SPACE and text:
        wanted = file.flags & PREFIX_EACH or is_first
        if wanted and not (file.flags & PREFIX_UNLESS_SPACE and text[0] == " "):
            text = " " + text
    return text


def encode_section(file, text):
    ids = []
    for part in cut(file, text):
        data = part.encode()
        if file.flags & IGNORE_MERGES and data in file.of_text:
            ids.append(file.of_text[data])
            continue
        units = [bytes([byte]) for byte in data] if file.cut_rule else [c.encode() for c in part]
        if file.cut_rule and file.unknown is None:
            units = [unit for unit in units if unit in file.of_text]
        for symbol in merge(file, units):
            ids += symbol_ids(file, symbol)
    if file.flags & SEPARATE_UNKNOWN or file.unknown is None:
        return ids
    return [token for before, token in zip([None] + ids, ids)
            if (before, token) != (file.unknown,) * 2]


def symbol_ids(file, symbol):
    if symbol in file.of_text:
        return [file.of_text[symbol]]
    if file.flags & BYTE_PIECES:
        return [file.of_byte[symbol[at:at + 1]] for at in range(len(symbol))]
    return [file.unknown]


def score_of(file, left, right):
    """How good it is to join these two; None: they must not be joined."""
    token = file.of_text.get(left + right)
    if token is None:
        return None
    piece = file.pieces[token]
    if piece.left in (0, len(left)):
        return piece.score
    return file.scores.get((token, len(left)))


def merge(file, units):
    units = list(units)
    while True:
        scores = [score_of(file, a, b) for a, b in zip(units, units[1:])]
        best = max((score for score in scores if score is not None), default=None)
        if best is None:
            return units
        at = scores.index(best)
        units[at:at + 2] = [units[at] + units[at + 1]]


# ------------------------------------------------------------------------------------------------
# The rules by which text is cut.  Each alternative of the regular expression is a function that
# says where a match that begins at `at` ends, or returns `at` if there is none.


def class_of(file, character):
    place = bisect.bisect_right(file.firsts, ord(character)) - 1
    if place >= 0 and ord(character) <= file.ranges[place][1]:
        return file.ranges[place][2]
    return 0


def run(kinds, at, wanted, most=None):
    """The end of the run of characters of these classes."""
    end = at
    while end < len(kinds) and kinds[end] in wanted and (not most or end - at < most):
        end += 1
    return end


def cut(file, text):
    if not file.cut_rule:
        return [text]
    kinds = [class_of(file, character) for character in text]
    if file.cut_rule == 1 and file.most_digits == 1:
        out, at = [], 0
        for place, kind in enumerate(kinds + [NUMBER]):
            if kind == NUMBER:
                out += cut_by(text[at:place], kinds[at:place], gpt2_end, 0)
                out += [text[place]] if place < len(text) else []
                at = place + 1
        return out
    return cut_by(text, kinds, gpt2_end if file.cut_rule == 1 else llama3_end, file.most_digits)


def cut_by(text, kinds, end_of, most_digits):
    out, at = [], 0
    while at < len(text):
        end = end_of(text, kinds, at, most_digits)
        out.append(text[at:end])
        at = end
    return out


CONTRACTIONS = "'s", "'t", "'re", "'ve", "'m", "'ll", "'d"


def white_end(text, kinds, at):
    r"""\s+(?!\S)|\s+"""
    end = run(kinds, at, {WHITE})
    return end if end == len(text) or end - at == 1 else end - 1


def gpt2_end(text, kinds, at, _):
    for word in CONTRACTIONS:
        if text.startswith(word, at):
            return at + len(word)
    start = at + (text[at] == " ")
    for wanted in {LETTER}, {NUMBER}, {0}:
        end = run(kinds, start, wanted)
        if end > start:
            return end
    return white_end(text, kinds, at)


def llama3_end(text, kinds, at, most_digits):
    for word in CONTRACTIONS:
        if text[at:at + len(word)].casefold() == word:
            return at + len(word)
    start = at + (kinds[at] not in (LETTER, NUMBER) and text[at] not in "\r\n")
    end = run(kinds, start, {LETTER})
    if end > start:
        return end
    end = run(kinds, at, {NUMBER}, most_digits)
    if end > at:
        return end
    start = at + (text[at] == " ")
    end = run(kinds, start, {0})
    if end > start:
        while end < len(text) and text[end] in "\r\n":
            end += 1
        return end
    end = run(kinds, at, {WHITE})
    while end > at and text[end - 1] not in "\r\n":
        end -= 1
    return end if end > at else white_end(text, kinds, at)
