#!/usr/bin/env python3
"""export.py: turn a Llama or Mistral checkpoint into one flat file for drugs.c.

    python3 export.py INPUT [-o model.bin] [--tokenizer FILE] [--chat FORM]
    python3 export.py model.bin --to hf DIR

The second form goes back: it turns a flat file into a new Hugging Face folder, for other tools.
In the first, INPUT is one of these; which one is found by looking:

    a Hugging Face folder       config.json + model.safetensors or pytorch_model.bin,
                                whole or in shards
    a folder of Meta's          params.json + consolidated.00.pth, consolidated.01.pth, ...
    a folder of Mistral's       params.json + consolidated.safetensors
    a llama2.c checkpoint       ckpt.pt
    a llama2.c export, v0       stories15M.bin

The tokenizer is looked for beside the weights (tokenizer.model, then tokenizer.json, then
tokenizer.bin) unless --tokenizer names one.  A chat is written as the checkpoint's own template
has it, or in a form that --chat names.  Weights may be fp32, fp16 or bf16.  The flat file keeps
what the matrices have, so nothing is rounded and little is computed; gains become fp32, and so does
all of a checkpoint whose matrices are mixed.

The flat file, all little-endian.  It says everything that using the model as its makers meant
The flat file, all little-endian, says everything that using the model as its makers meant needs, so
that the C program need not know one family from another.  Struct Config, struct Tokenizer and
section 9 of drugs.c say what each number means:

    header      256 bytes: "drugs.c\\0", i32 version, i32 each of SIZES, f32 norm_eps, i32 storage
                of the matrices (its place in STORAGES), i32 bos and unknown (-1 = none), i32 flags
                of section 6, i32 n_cutters and the other sizes of what follows, then zeros
    RoPE        head_dim / 2 times f64: by how many radians a pair is turned at each position
    tables      of u32: {first, last, class} of characters; the automata that cut a text, a cell
                is 2 * next state (from 1 on, 0 = the walk ends), + 1 if what was read so far is a
                word, and the last column is for the end of the text; {unit, unit, id}, what merging
                begins with; {left, right, merged, rank}, what two ids become; {end, kind} of the
                strings, which are the pieces, six of a chat (section 9) and the patterns that the
                automata were made of; the pieces that are found whole, by first byte, longer ones
                first; the pieces that are taken where they are a word, by their bytes
    text        the strings
    tensors     of KINDS, layer after layer, each from a multiple of 64 bytes on (gains fp32)

A matrix is stored row after row, (out, in).  Rows of wq and wk are in *interleaved* order: RoPE
turns rows 2i and 2i+1 of a head together.

The promise: what the output cannot express exactly is refused, by name, before anything is
written; of what only rare text will ever meet, a warning speaks.  The output appears whole or not
at all.  Memory stays small however large the model is.  Nothing in a checkpoint is ever executed;
its chat template is a program, which section 7 walks through itself.
"""

import argparse
import ast
import collections.abc
import contextlib
import functools
import glob
import io
import itertools
import json
import math
import operator
import os
import pickle
import pickletools
import re
import shutil
import signal
import stat
import struct
import sys
import unicodedata
import zipfile
from dataclasses import dataclass, field

# ------------------------------------------------------------------------------------------------
# 1. Refusing
#
# A checkpoint comes from strangers, and there are more ways to be damaged than one can foresee.
# So code that reads says what it demands, and runs inside `reading(path)`: whatever goes wrong
# there, even something Python stumbles over, becomes one line that names the innermost file.


class Refused(Exception):
    """Input that is damaged, or that the output could not express."""

    def __init__(self, why, path=None):
        super().__init__(why)
        self.path = path


def demand(fine, why):
    if not fine:
        raise Refused(why)


def refuse_settings(settings, *names):
    for name in names:
        demand(not settings.get(name), f"{name} is set, which drugs.c does not know")


def whole(value, first, beyond):
    """Whether value is one of range(first, beyond); True is an int to Python, but not to us."""
    return type(value) is int and first <= value < beyond


@contextlib.contextmanager
def reading(path):
    try:
        yield
    except Refused as error:
        error.path = error.path or path
        raise
    except (OSError, MemoryError):
        raise                           # main() explains it
    except Exception as error:
        found = " ".join(str(error).split())[:200]
        raise Refused(f"is damaged or of an unknown kind ({type(error).__name__}: {found})", path)


@contextlib.contextmanager
def reading_json(path):
    with reading(path):
        file = File(path)
        content = json.loads(file.read(0, file.size).decode("utf-8"))
        demand(isinstance(content, dict), "is damaged: a JSON object was expected")
        yield content


def visible(text):
    """On one line, and nothing that a terminal would obey: names in a checkpoint hold anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def warn(path, what):
    # Python has no sys.stderr if the caller closed it, and print() would take sys.stdout instead.
    if sys.stderr:
        sys.stderr.write(visible(f"export.py: {path}: warning: {what}") + "\n")    # at once


def some(names, most=3):
    """A few of many, for a message of one line."""
    names = list(names)
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")

# ------------------------------------------------------------------------------------------------
# 2. What a model is
#
# A Config, a mapping from (kind, layer) to tensors that can be read row by row, and a Tokenizer.
# Several readers find the first two, for one writer; a reader and a writer more lead back.

Kind = collections.namedtuple("Kind", "shape hf meta")

# The tensors in the order of the flat file, with their names in the files of Hugging Face and of
# Meta, where .weight follows.  # stands for the number of the layer.
KINDS = {
    "tok_emb": Kind("vocab_size dim", "model.embed_tokens", "tok_embeddings"),
    "att_norm": Kind("dim", "model.layers.#.input_layernorm", "layers.#.attention_norm"),
    "wq": Kind("queries dim", "model.layers.#.self_attn.q_proj", "layers.#.attention.wq"),
    "wk": Kind("keys dim", "model.layers.#.self_attn.k_proj", "layers.#.attention.wk"),
    "wv": Kind("keys dim", "model.layers.#.self_attn.v_proj", "layers.#.attention.wv"),
    "wo": Kind("dim queries", "model.layers.#.self_attn.o_proj", "layers.#.attention.wo"),
    "ffn_norm": Kind("dim", "model.layers.#.post_attention_layernorm", "layers.#.ffn_norm"),
    "w1": Kind("hidden_dim dim", "model.layers.#.mlp.gate_proj", "layers.#.feed_forward.w1"),
    "w3": Kind("hidden_dim dim", "model.layers.#.mlp.up_proj", "layers.#.feed_forward.w3"),
    "w2": Kind("dim hidden_dim", "model.layers.#.mlp.down_proj", "layers.#.feed_forward.w2"),
    "final_norm": Kind("dim", "model.norm", "norm"),
    "wcls": Kind("vocab_size dim", "lm_head", "output"),
}
LAYER_KINDS = [kind for kind in KINDS if "#" in KINDS[kind].hf]
# Tables that are computed from the config; some checkpoints hold them all the same.
IGNORED = ("rotary_emb.inv_freq", "rope.freqs", "freqs_cis", "freqs_cos", "freqs_sin")
# What torch.compile() and training on several GPUs leave in front of every name.
PREFIX = re.compile(r"^(_orig_mod\.|module\.)+")


def name_of(kind, layer, family):
    return getattr(KINDS[kind], family).replace("#", str(layer)) + ".weight"


def without_prefix(found):
    names = {PREFIX.sub("", name): tensor for name, tensor in found.items()}
    demand(len(names) == len(found), "has two tensors of one name, but for what is put before it")
    return names


Field = collections.namedtuple("Field", "hf meta least most")

# The numbers of a model: their names in config.json and in params.json, and for those that the
# header of the flat file has in this order the bounds of drugs.c.  What is written must load there.
FIELDS = {
    "dim": Field("hidden_size", "dim", 1, 1 << 20),
    "hidden_dim": Field("intermediate_size", "hidden_dim", 1, 1 << 20),
    "n_layers": Field("num_hidden_layers", "n_layers", 1, 1 << 12),
    "n_heads": Field("num_attention_heads", "n_heads", 1, 1 << 12),
    "n_kv_heads": Field("num_key_value_heads", "n_kv_heads", 1, 1 << 12),
    "head_dim": Field("head_dim", "head_dim", 2, 1 << 12),
    "vocab_size": Field("vocab_size", "vocab_size", 1, 1 << 24),
    "seq_len": Field("max_position_embeddings", "max_seq_len", 1, 1 << 28),
    "shared_classifier": Field("tie_word_embeddings", "tied_embeddings", 0, 1),
    "sliding_window": Field("sliding_window", "sliding_window", 0, 1 << 28),
    "norm_eps": Field("rms_norm_eps", "norm_eps", None, None),
    "rope_theta": Field("rope_theta", "rope_theta", None, None),
    "rope_scaling": Field("rope_scaling", None, None, None)}
SIZES = [name for name, field in FIELDS.items() if field.most]
MOST_RADIANS = float(1 << 20)
MOST_CUTTERS = 16


@dataclass
class Config:
    """The numbers of a model; None is what the checkpoint does not say."""
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    seq_len: int
    shared_classifier: int          # 1: the embedding is also the classifier
    sliding_window: int = None      # how many positions attention looks back, 0: all of them
    norm_eps: float = 1e-5
    rope_theta: float = None
    rope_scaling: dict = None       # as Hugging Face writes it
    frequencies: tuple = None       # what RoPE needs of the two above, see section 3

    def __post_init__(self):
        """Fills the gaps.  Nothing is computed from a stranger's number before it is sane."""
        self.n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        self.sliding_window = self.sliding_window or 0
        self.check_bounds("dim", "n_heads")
        if self.head_dim is None:
            demand(self.dim % self.n_heads == 0, f"{self.n_heads} heads do not cut dim {self.dim}")
            self.head_dim = self.dim // self.n_heads
        self.check_bounds(*SIZES)
        demand(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}: it must be even, for RoPE")
        demand(self.n_heads % self.n_kv_heads == 0,
               f"{self.n_heads} query heads cannot share {self.n_kv_heads} key heads evenly")
        number = type(self.norm_eps) in (int, float) and 0 <= self.norm_eps < 1
        # What is almost 1 may be 1 as an fp32.
        demand(number and struct.unpack("<f", struct.pack("<f", self.norm_eps))[0] < 1,
               f"norm_eps is {self.norm_eps!r}: it must be from 0 to less than 1")
        if self.frequencies is None:
            self.frequencies = rope_frequencies(self.rope_theta, self.rope_scaling, self.head_dim)
        demand(all(0 < radians <= MOST_RADIANS for radians in self.frequencies),
               "RoPE would turn by no angle, or by more than 2^20 radians, at each position")

    def check_bounds(self, *names):
        for name in names:
            value, least, most = getattr(self, name), FIELDS[name].least, FIELDS[name].most
            demand(whole(value, least, most + 1),
                   f"{name} is {value!r}: it must be a whole number from {least} to {most}")

    def shape(self, kind):
        sizes = dict(vars(self), queries=self.n_heads * self.head_dim,
                     keys=self.n_kv_heads * self.head_dim)
        return tuple(sizes[axis] for axis in KINDS[kind].shape.split())

    def layout(self):
        """Every tensor of the flat file, in order: (kind, layer)."""
        yield "tok_emb", 0
        yield from ((kind, layer) for layer in range(self.n_layers) for kind in LAYER_KINDS)
        yield "final_norm", 0
        if not self.shared_classifier:
            yield "wcls", 0


# ------------------------------------------------------------------------------------------------
# 3. How far RoPE turns
#
# RoPE turns pair i of a head by frequencies[i] radians at each position, theta^(-i / n_pairs).
# Models that were stretched to longer texts after training turn some pairs more slowly.  The flat
# file holds the outcome, so only this section knows how it came about.

PLAIN_THETA = 10000.0


# The kinds of scaling, and the numbers that each of them has.
SCALINGS = {
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings")}


def rope_frequencies(theta, scaling, head_dim):
    theta, scaling = PLAIN_THETA if theta is None else theta, scaling or {}
    demand(type(theta) in (int, float) and 0 < theta < math.inf and float(theta) == theta,
           f"rope_theta is {theta!r}: it must be a positive number that a double can hold")
    n_pairs = head_dim // 2
    plain = [float(theta) ** (-pair / n_pairs) for pair in range(n_pairs)]
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    demand(kind in SCALINGS, f"rope_scaling is of type {kind}; only {', '.join(SCALINGS)} can be "
           "exported")
    demand(kind != "default" or "factor" not in scaling,
           "rope_scaling has a factor, but no type that says what to do with it")
    numbers = [scaling.get(name) for name in SCALINGS[kind]]
    for name, number in zip(SCALINGS[kind], numbers):
        demand(type(number) in (int, float) and 0 < number < math.inf,
               f"rope_scaling: {name} is {number!r}: it must be a positive number")
    if kind == "linear":                # as if positions lay closer to each other
        return tuple(radians / numbers[0] for radians in plain)
    return tuple(scale_llama3(plain, *map(float, numbers)) if numbers else plain)


def scale_llama3(plain, factor, low, high, trained_length):
    """Llama 3.1: pairs that turn often within the trained length know what is near: they stay.

    Those that turn less than `low` times in it are slowed down, and between `low` and `high`
    turns one passes smoothly into the other.
    """
    demand(low < high, f"rope_scaling: low_freq_factor {low} is not below high_freq_factor {high}")
    scaled = []
    for radians in plain:
        turns = trained_length * radians / (2 * math.pi)
        if turns > high:
            scaled.append(radians)
        elif turns < low:
            scaled.append(radians / factor)
        else:
            share = (turns - low) / (high - low)
            scaled.append((1 - share) * radians / factor + share * radians)
    return scaled


def explain_frequencies(frequencies):
    """(theta, scaling) from which exactly these frequencies come: the way back."""
    for theta, scaling in explanations(frequencies):
        with contextlib.suppress(Refused, OverflowError):
            if rope_frequencies(theta, scaling, 2 * len(frequencies)) == frequencies:
                return theta, scaling
    raise Refused("RoPE's frequencies are neither plain nor those of a scaling that can be named")


def explanations(frequencies):
    """(theta, scaling) that may be the right ones.

    The first frequency is 1 before scaling, and only a linear scaling changes it.  The slowest
    unscaled pair shows theta best; with llama3 only the first ones are unscaled.  The last pair
    then shows the factor.  Of llama3's other numbers the file shows only the outcome: so the usual
    ones are tried.
    """
    first, last, n_pairs = frequencies[0], frequencies[-1], len(frequencies)

    def thetas(radians, pair):
        with contextlib.suppress(OverflowError, ZeroDivisionError):
            return near(radians ** (-n_pairs / pair))
        return [PLAIN_THETA]            # a single pair turns by 1 radian, whatever theta is
    for theta in thetas(last, n_pairs - 1):
        yield theta, None
    for factor in near(1 / first):
        for theta in thetas(last * factor, n_pairs - 1):
            yield theta, {"rope_type": "linear", "factor": factor}
    if n_pairs < 3 or not 0 < frequencies[1] < first == 1:
        return
    factor = float(f"{frequencies[1] ** (n_pairs - 1) / last:.4g}")
    lengths = [2 ** power for power in range(8, 21)]
    for low, high, length in itertools.product((1.0, 2.0, 0.5), (4.0, 2.0, 8.0, 16.0), lengths):
        for theta in thetas(frequencies[1], 1):
            yield theta, dict(zip(("rope_type",) + SCALINGS["llama3"],
                                  ("llama3", factor, low, high, length)))


def near(number):
    """Numbers close to this one, those with the fewest digits first."""
    if not 0 < number < math.inf:
        return []
    short = [float(f"{number:.{digits}g}") for digits in range(1, 18)]
    pattern, = struct.unpack("<q", struct.pack("<d", number))
    close = [struct.unpack("<d", struct.pack("<q", pattern + step))[0] for step in range(-8, 9)]
    return [value for value in dict.fromkeys(short + close) if 0 < value < math.inf]


# ------------------------------------------------------------------------------------------------
# 4. Tensors: a name for some bytes of a file, until somebody asks for rows
#
# A tensor has a shape, a dtype, rows(first, last) that reads those rows as they are, and a problem:
# None, or why it cannot be used.  The problem is told only when the tensor turns out to be needed,
# because only then is its name known, and because the unused ones may have as many problems as they
# like.


def from_f16(data):
    count = len(data) // 2
    return struct.pack(f"<{count}f", *struct.unpack(f"<{count}e", data))


def from_bf16(data):
    """A bf16 is the upper half of an fp32."""
    out = bytearray(2 * len(data))
    out[2::4], out[3::4] = data[0::2], data[1::2]
    return out


# Bytes per number, and what makes fp32 of them.
DTYPES = {"F32": (4, bytes), "F16": (2, from_f16), "BF16": (2, from_bf16)}


class File:
    """A file open for reading that knows its name and its size."""

    def __init__(self, path):
        self.path, self.stream = path, open(path, "rb")
        self.size = os.fstat(self.stream.fileno()).st_size
        self.start = self.stream.read(64)
        # A clone without Git LFS has a note of 130 bytes in the place of every large file.
        demand(not self.start.startswith(b"version https://git-lfs"), "is not the file itself but "
               "a Git LFS pointer to it; fetch the file with: git lfs pull")

    def read(self, offset, length):
        # The size comes first, so that a file cannot make us reserve memory it does not fill.
        if 0 <= offset <= offset + length <= self.size:
            self.stream.seek(offset)
            data = self.stream.read(length)
            if len(data) == length:
                return data
        raise Refused(f"is truncated: no byte {offset + length}; fetch it again", self.path)


@dataclass
class Stored:
    """A tensor as it lies in a file, row after row."""
    file: File
    offset: int
    dtype: str
    shape: tuple
    problem: str = None

    def __post_init__(self):
        if self.dtype not in DTYPES:
            self.problem = f"holds {self.dtype} numbers: only {', '.join(DTYPES)} can be exported"

    def rows(self, first, last):
        width = math.prod(self.shape[1:]) * DTYPES[self.dtype][0]
        return self.file.read(self.offset + first * width, (last - first) * width)


@dataclass
class View:
    """A matrix made of rows of others: origin(row) lists the (tensor, row) that make one."""
    shape: tuple
    origin: object
    dtype: str
    problem: str = None

    def rows(self, first, last):
        return b"".join(tensor.rows(source, source + 1)
                        for row in range(first, last) for tensor, source in self.origin(row))


def reorder(tensors, head_dim, group):
    """Puts the rows of wq and wk into the flat file's order (group = 2) or back (head_dim / 2).

    RoPE turns pairs of numbers.  Hugging Face keeps the two halves of every pair half a head
    apart, rows i and i + head_dim/2; the original Llama and the flat file keep them side by
    side, rows 2i and 2i+1.  Either way is the transpose of the other, if a head is seen as a
    table whose lines are `group` long.  Heads follow each other, so wk, which under
    grouped-query attention has fewer of them, needs no care of its own.
    """
    def view(tensor):
        def origin(row):
            head, within = divmod(row, head_dim)
            line, column = divmod(within, group)
            return [(tensor, head * head_dim + column * (head_dim // group) + line)]
        return View(tensor.shape, origin, tensor.dtype)
    return {key: view(tensor) if key[0] in ("wq", "wk") else tensor
            for key, tensor in tensors.items()}


def place(file, at, layout, alignment=1):
    """Nameless tensors that fill a file from `at` to its end; layout is (key, shape, dtype)s."""
    tensors = {}
    for key, shape, dtype in layout:
        at += -at % alignment
        tensors[key] = Stored(file, at, dtype, shape)
        at += DTYPES[dtype][0] * math.prod(shape)
        if at > file.size:              # the layout may be as long as a header lies
            break
    demand(at == file.size, f"is {file.size} bytes long, which is not what its header says: it is "
           "truncated or something else")
    return tensors


def gather(config, found, family):
    """The tensors of the flat file, out of all those `found`; none may be missing or left over.

    A left-over tensor means that the model computes something the C program does not.
    """
    tensors, unused = {}, dict(found)
    for kind, layer in config.layout():
        name, shape = name_of(kind, layer, family), config.shape(kind)
        demand(name in unused, f"tensor {name} is missing (expected shape {shape})")
        tensor = tensors[kind, layer] = unused.pop(name)
        demand(not tensor.problem, f"tensor {name} {tensor.problem}")
        demand(tensor.shape == shape,
               f"tensor {name} has shape {tensor.shape}, but {shape} was expected")
    for name in sorted(unused):
        demand(name.endswith(IGNORED), f"tensor {name} has no place in a plain Llama model")
    return tensors


# ------------------------------------------------------------------------------------------------
# 5. Cutting: a pattern becomes an automaton
#
# Before pieces are merged, some tokenizers cut a text into words, by a regular expression: each
# match is a word, and so is what lies between two.  To try the alternatives of an expression one
# after the other takes a long program.  An automaton is a table, and walking it is a loop.
#
#     expression --parse--> tree --determinise--> table
#
# A state of the table is the list of all that may be ahead, the most wanted first: the order is the
# one in which a regular expression tries its ways.  To be ahead is to be a row of trees, and the
# empty row is a match.  (It is Thompson's machine of 1968, with the order as in RE2.)
# The expressions are those of Oniguruma, as far as tokenizers use them: characters, classes,
# groups, alternatives, greedy repeats, a look-ahead of one character.  All else is refused.

MOST_STATES, MOST_CLASSES, MOST_SIZE = 1 << 16, 1 << 10, 1 << 14

# A set of characters: whether it is what is not in it, and of what it is made, which is a range
# (first, last), a general category ("Lu", or "L" for all of them) or another set.
Chars = collections.namedtuple("Chars", "negated items")
WHITE = "white"                     # the property White_Space, which str.isspace() is not
WHITE_SPACE = {*range(9, 14), 0x20, 0x85, 0xa0, 0x1680, *range(0x2000, 0x200b), 0x2028, 0x2029,
               0x202f, 0x205f, 0x3000}
ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}
SHORT = {"s": (False, WHITE), "S": (True, WHITE), "d": (False, "Nd"), "D": (True, "Nd")}


def has(chars, code):
    """Whether a character is in a set."""
    def of(item):
        if isinstance(item, Chars):
            return has(item, code)
        if item == WHITE:
            return code in WHITE_SPACE
        if isinstance(item, str):
            return unicodedata.category(chr(code)).startswith(item)
        return item[0] <= code <= item[1]
    return chars.negated != any(map(of, chars.items))


@functools.lru_cache(maxsize=None)
def foldings():
    """({what a character folds to: all that do}, what becomes several characters by folding)."""
    alike, longer = collections.defaultdict(list), set()
    for code in range(sys.maxunicode + 1):
        folded = chr(code).casefold()
        if len(folded) > 1:
            longer.add(folded)
        elif folded != chr(code):
            alike[folded].append(code)
    return alike, longer


class Expression:
    """Parses a regular expression: .tree is ("set", Chars), ("ahead", wanted, Chars),
    ("row", trees), ("or", trees) or ("repeat", tree, least, most), most None for any number;
    .sets are all the sets in it, and .bounds are where their ranges begin and end."""

    def __init__(self, text):
        self.text, self.at, self.fold, self.sets, self.bounds = text, 0, False, set(), set()
        self.tree = self.alternatives()
        self.check(self.at == len(text), "a ) without its (")
        fewest, size = measure(self.tree)
        self.check(fewest, "it can match nothing at all")
        demand(size < MOST_SIZE, "cuts text by a pattern that is too long")
    def check(self, fine, what):
        demand(fine, f"cuts text by {self.text[:200]!r}, which drugs.c does not know: {what}")

    def peek(self, n=1):
        return self.text[self.at:self.at + n]

    def take(self, n=1):
        found = self.peek(n)
        self.check(len(found) == n, "it ends too early")
        self.at += n
        return found

    def skip(self, text):
        found = self.text.startswith(text, self.at)
        self.at += len(text) * found
        return found

    def alternatives(self):
        rows = [self.row()]
        while self.skip("|"):
            rows.append(self.row())
        return ("or", tuple(rows)) if len(rows) > 1 else rows[0]

    def row(self):
        parts, spelt = [], ""           # spelt: the characters that the last parts spell
        while self.peek() not in ("", "|", ")"):
            first = self.at
            part = self.repeated(self.part())
            single = self.at - first == 1 and part[0] == "set"
            spelt = spelt + self.text[first] if single else ""
            if self.fold and spelt:
                odd = [text for text in foldings()[1] if text in spelt.casefold()]
                self.check(not odd, f"in any case, {some(odd)} may be one character")
            parts.append(part)
        return parts[0] if len(parts) == 1 else ("row", tuple(parts))

    def repeated(self, part):
        repeat = re.compile(r"([?*+])|\{(\d+)(,?)(\d*)\}").match(self.text, self.at)
        if not repeat:
            self.check(self.peek() != "{", "a { that counts nothing")
            return part
        self.at = repeat.end()
        if repeat[1]:
            least, most = {"?": (0, 1), "*": (0, None), "+": (1, None)}[repeat[1]]
        else:
            least, most = int(repeat[2]), int(repeat[4]) if repeat[4] else None
            most = most if repeat[3] else least
        self.check(self.peek() not in tuple("?+*{"), f"a repeat that is followed by {self.peek()}")
        self.check(max(least, most or 0) <= 1000 and (most is None or max(least, 1) <= most),
                   "a repeat of a wrong number")
        self.check(measure(part)[0], "a repeat of what can be empty")
        return ("repeat", part, least, most)

    def part(self):
        if not self.skip("("):
            chars = self.chars()
            self.sets.add(chars)
            return ("set", chars)
        ahead = next((sign for sign in ("?=", "?!") if self.skip(sign)), None)
        fold = self.fold
        if not ahead and not self.skip("?:"):
            self.fold = self.skip("?i:") or fold
            self.check(self.peek() != "?", f"the group ({self.peek(3)}")
        tree = self.alternatives()
        self.check(self.skip(")"), "a ( without its )")
        self.fold = fold
        self.check(not ahead or tree[0] == "set", "a look-ahead of more than one character")
        return ("ahead", ahead == "?=", tree[1]) if ahead else tree

    def chars(self):
        if self.peek() == "[":
            return self.bracket()
        character = self.take()
        self.check(character not in ".^$*+?{", f"{character} at byte {self.at - 1}")
        if character == "\\":
            character = self.escape()
        return character if isinstance(character, Chars) else self.only(ord(character))

    def only(self, first, last=None):
        """The set of these characters, in any case where that is asked for."""
        last = first if last is None else last
        items = [(first, last)]
        if self.fold:
            self.check(last - first < 1000, "a long range of characters in any case")
            for code in range(first, last + 1):
                folded = chr(code).casefold()
                items += [(alike, alike) for alike in foldings()[0][folded]]
                items += [(ord(folded), ord(folded))] if len(folded) == 1 else []
        self.bounds.update(bound for item in items for bound in (item[0], item[1] + 1))
        return Chars(False, tuple(sorted(set(items))))

    def escape(self):
        """What follows a backslash: a character, or a set."""
        letter = self.take()
        if letter in SHORT:
            negated, item = SHORT[letter]
            return Chars(negated, (item,))
        if letter in "pP":
            name = re.compile(r"\{(\^?)([A-Z][a-z]?)\}").match(self.text, self.at)
            self.check(name, f"\\{letter}{self.peek(12)}, which is no general category")
            known = {unicodedata.category(chr(code)) for code in range(0x3000)} | {"Cs", "Co", "Cn"}
            self.check(any(category.startswith(name[2]) for category in known),
                       f"the category {name[2]}")
            self.check(not self.fold, f"\\{letter} in any case")
            self.at = name.end()
            return Chars((letter == "P") != bool(name[1]), (name[2],))
        self.check(letter in ESCAPES or not letter.isalnum(), f"\\{letter}")
        return ESCAPES.get(letter, letter)

    def bracket(self):
        self.take()
        negated, items = self.skip("^"), []
        while not self.skip("]") or not items:
            self.check(self.peek(2) not in ("[:", "&&"), f"{self.peek(2)} in a class")
            if self.peek() == "[":
                items.append(self.bracket())
                continue
            first = self.in_bracket()
            if isinstance(first, Chars):
                items.append(first)
                continue
            last = first
            if self.peek() == "-" and self.peek(2)[1:] not in ("]", ""):
                self.take()
                last = self.in_bracket()
                self.check(isinstance(last, str) and first <= last, "a range that is none")
            items.append(self.only(ord(first), ord(last)))
        return Chars(negated, tuple(items))

    def in_bracket(self):
        character = self.take()
        return self.escape() if character == "\\" else character


def measure(tree):
    """(the fewest characters that a tree matches, its size with all repeats written out)."""
    kind, *rest = tree
    if kind in ("row", "or"):
        fewest, sizes = zip(*map(measure, rest[0])) if rest[0] else ((), ())
        return (sum if kind == "row" else min)(fewest), 1 + sum(sizes)
    if kind == "repeat":
        part, least, most = rest
        fewest, size = measure(part)
        return fewest * least, 1 + size * max(least, most or 1)
    return int(kind == "set"), 1


def advance(state, within):
    """(the state after a character, whether what was read before it is a match).

    `within` says whether the character that comes is in a set; at the end of a text it is in none.
    """
    after, seen, waiting = {}, set(), list(reversed(state))
    while waiting:
        row = waiting.pop()
        if row in seen:
            continue
        seen.add(row)
        if not row:                     # what is wanted less is not tried any more
            return tuple(after), True
        kind, *rest = row[0]
        following = row[1:]
        if kind == "row":
            waiting.append(rest[0] + following)
        elif kind == "or":
            waiting += [(way, *following) for way in reversed(rest[0])]
        elif kind == "repeat":          # once more if that may be, or else on
            part, least, most = rest
            more = () if most == 1 else (("repeat", part, max(least - 1, 0), most and most - 1),)
            waiting += [following] if least == 0 else []
            waiting.append((part, *more, *following))
        elif kind == "ahead":
            waiting += [following] if within(rest[1]) == rest[0] else []
        elif within(rest[0]):
            after[following] = True     # a dict keeps the order
    return tuple(after), False


def classes_of(sets, bounds):
    """([(first, last, class)], [for each class the sets that have its characters]).

    Characters are of one class if every set has all of them or none.  Class 0, that of most
    characters, has no ranges.  `bounds` are where the ranges of the sets begin and end.
    """
    runs = collections.defaultdict(list)        # the sets that have them -> [(first, last)]
    starts = sorted(code for code in {0, *bounds, *category_runs()} if code <= sys.maxunicode)
    for first, beyond in zip(starts, starts[1:] + [sys.maxunicode + 1]):
        owners = frozenset(chars for chars in sets if has(chars, first))
        if runs[owners] and runs[owners][-1][1] == first - 1:
            first = runs[owners].pop()[0]
        runs[owners].append((first, beyond - 1))
    order = sorted(runs, key=lambda owners: (-len(runs[owners]), runs[owners]))
    ranges = sorted((first, last, number) for number, owners in enumerate(order) if number
                    for first, last in runs[owners])
    return ranges, order


@functools.lru_cache(maxsize=None)
def category_runs():
    """Where the general category changes, or White_Space."""
    kinds = ((unicodedata.category(chr(code)), code in WHITE_SPACE)
             for code in range(sys.maxunicode + 1))
    return list(itertools.accumulate(len(list(run)) for _, run in itertools.groupby(kinds)))


def build_automata(patterns):
    """(ranges, n_classes, rows of the table) for patterns that cut one after the other."""
    if not patterns:
        return (), 1, ()
    expressions = list(map(Expression, patterns))
    ranges, owners = classes_of({chars for each in expressions for chars in each.sets},
                                {bound for each in expressions for bound in each.bounds})
    demand(len(owners) <= MOST_CLASSES and len(ranges) <= 1 << 16,
           "cuts text by patterns with too many classes of characters")
    numbers, rows, states = {}, [], [((each.tree,),) for each in expressions]
    for number, state in enumerate(states, 1):
        numbers.setdefault(state, number)
    while len(rows) < len(states):
        row = []
        for owned in owners + [frozenset()]:
            after, matched = advance(states[len(rows)], owned.__contains__)
            if after and after not in numbers:
                states.append(after)
                numbers[after] = len(states)
                demand(len(states) <= MOST_STATES, "cuts text by patterns with too many states")
            row.append(2 * numbers.get(after, 0) + matched)
        rows.append(tuple(row))
    return tuple(ranges), len(owners), tuple(rows)


SPACE = "\u2581"                    # how SentencePiece writes one
NORMAL, CONTROL, UNKNOWN, BYTE, USER_DEFINED, END = range(6)
BYTE_UNIT = 0x110000                # + a byte: beyond all characters

# The flags: what is done to a text before it is cut into pieces.
PREFIX_SPACE = 1            # a space is put before it,
PREFIX_EACH = 2             # ... and also after each control or user-defined piece,
PREFIX_UNLESS_SPACE = 4     # ... but only where there is none yet
COLLAPSE_SPACES = 8         # runs of spaces become one, those at both ends none
NEWLINE_SPACE = 16          # a space is put after every newline, and not printed there
ALL_FLAGS = 31

Piece = collections.namedtuple("Piece", "kind text")
EMPTY = Piece(CONTROL, b"")


@dataclass
class Tokenizer:
    pieces: dict                    # token id -> Piece
    flags: int = 0
    byte_level: bool = False        # merging begins with bytes, not with characters
    patterns: tuple = ()            # that cut a text, one after the other
    scores: dict = None             # token id -> score, of SentencePiece
    merges: list = field(default_factory=list)  # else (left, right, merged), the best first
    takes_words: bool = False       # a word that is a piece is taken, whatever the merges say
    begins: int = -1                # the piece that begins every text, or -1
    bos: int = -1                   # the same, or the one that would
    eos: int = -1                   # the piece that ends a text, as far as the tokenizer knows
    chat: tuple = ("",) * 6
    takes: tuple = (0,) * 6         # the spaces that the strings of the chat take, see section 9
    by_sentencepiece: bool = False  # it was read from tokenizer.model
    added: set = field(default_factory=set)             # ids of tokens that came after training
    # What all this comes to, see settle_tables().
    automata: tuple = None          # see section 5
    units: dict = None              # unit -> id
    pairs: list = None              # (left, right, merged, rank)
    words: list = field(default_factory=list)

    def id_of(self, text):
        """A piece that is never made from text, by its name: -1 if there is none."""
        return next((token for token, piece in self.pieces.items()
                     if piece.text == text and self.may_be_control(token)), -1)

    def text_of(self, token):
        return self.pieces[token].text.decode("utf-8", "replace") if token in self.pieces else None

    def may_be_control(self, token):
        """Whether no text has this piece; it may have been forgotten to mark it as control."""
        kind, text = self.pieces.get(token, EMPTY)
        if kind == NORMAL:              # a text has what merges begin with and what they make
            single = len(text if self.byte_level else text.decode()) == 1
            return self.scores is None and not single and all(
                token != merged for _, _, merged in self.merges)
        return bool(text) and kind != BYTE

    def of_kind(self, *kinds):
        return [token for token, piece in sorted(self.pieces.items()) if piece.kind in kinds]


def settle_tables(tokenizer, vocab_size):
    """Makes the tables of the flat file, when nothing about the pieces changes any more."""
    first, scores = first_of_text(tokenizer), tokenizer.scores
    tokenizer.automata = build_automata(tokenizer.patterns)
    tokenizer.words = sorted(first.values(), key=lambda token: tokenizer.pieces[token].text) \
        if tokenizer.takes_words else []
    tokenizer.units = units_of(tokenizer, first, None if scores is None else vocab_size)
    if scores is None:
        normal = set(tokenizer.of_kind(NORMAL))
        known = [merge for merge in tokenizer.merges if normal.issuperset(merge)]
        tokenizer.pairs = sorted((*merge, rank) for rank, merge in enumerate(known))
    else:
        tokenizer.pairs = pairs_of(scores, first, tokenizer.units)


def first_of_text(tokenizer):
    """{text: id} of normal pieces, of equal ones the first."""
    return {tokenizer.pieces[token].text: token for token in reversed(tokenizer.of_kind(NORMAL))}


def units_of(tokenizer, first, unnamed):
    """What merging begins with: {unit: id}.

    SentencePiece also joins characters that are no pieces.  `unnamed` is the first of their ids, or
    None if such are not joined.
    """
    if tokenizer.byte_level:
        return {BYTE_UNIT + text[0]: token for text, token in first.items() if len(text) == 1}
    texts = {}
    for text, token in first.items():
        with contextlib.suppress(UnicodeDecodeError):       # no characters make what is no UTF-8
            texts[text.decode()] = token
    units = {ord(text): token for text, token in texts.items() if len(text) == 1}
    if unnamed is not None:
        others = sorted(set(map(ord, "".join(texts))) - units.keys())
        units.update(zip(others, itertools.count(unnamed)))
    if ord(" ") in units:
        units[ord(SPACE)] = units[ord(" ")]
    raw = tokenizer.of_kind(BYTE)
    if len(raw) == 256:
        units.update((BYTE_UNIT + tokenizer.pieces[token].text[0], token) for token in raw)
    return units


def pairs_of(scores, first, units):
    """All ways to make a piece of two: (left, right, merged, rank), the rank by the scores."""
    symbols = {chr(unit).encode(): token for unit, token in units.items()
               if unit < BYTE_UNIT and unit != ord(SPACE)}
    symbols.update(first)
    found = [(symbols[text[:cut]], symbols[text[cut:]], merged)
             for text, merged in first.items() for cut in range(1, len(text))
             if text[:cut] in symbols and text[cut:] in symbols]
    best = sorted({scores[merged] for _, _, merged in found}, reverse=True)
    ranks = {score: rank for rank, score in enumerate(best)}
    return sorted((*pair, ranks[scores[pair[2]]]) for pair in found)


def found_whole(tokenizer):
    """The pieces that are found whole, in the order of the flat file."""
    pieces = tokenizer.pieces
    named = [token for token in tokenizer.of_kind(CONTROL, END, USER_DEFINED) if pieces[token].text]
    return sorted(named, key=lambda token: (pieces[token].text[0], -len(pieces[token].text), token))


def find_tokenizer(folder, named, rows):
    """`rows` is how many ids the embedding knows.

    If the folder has tokenizer.model *and* tokenizer.json, both are right and neither is all.
    tokenizer.model is what the model was trained with: it has true scores and settings, of which
    tokenizer.json is a translation.  But tokens added later, as for chats, are only found in the
    latter, or in smaller files.  So take the pieces from the one and the added tokens from the
    others.
    """
    if named:
        return read_tokenizer(named, rows)
    versions = sorted(glob.glob(os.path.join(glob.escape(folder), "tokenizer.model.v*")))
    model, older, translated = (os.path.join(folder, "tokenizer." + kind)
                                for kind in ("model", "bin", "json"))
    model = versions[-1] if versions and not os.path.exists(model) else model
    has_model, has_json = os.path.exists(model), os.path.exists(translated)
    demand(has_model or has_json or os.path.exists(older), "comes without tokenizer.model, "
           "tokenizer.json or tokenizer.bin; name one with --tokenizer FILE")
    if not has_json:
        return read_tokenizer(model, rows, added_beside(folder, {})) if has_model \
            else read_tokenizer(older, rows)
    with reading_json(translated) as content:
        if not has_model or is_tiktoken(model) or is_stale(model, content):
            return read_tokenizer(translated, rows, added_beside(folder, content))
        tokenizer = read_tokenizer(model, rows, added_beside(folder, content))
        template = begin_of_template(translated, content)
        tokenizer.begins = template if template >= 0 else tokenizer.begins
        return tokenizer


def added_beside(folder, translated):
    """The added tokens of tokenizer.json, and those that only the files beside it have."""
    added = {entry["id"]: entry for entry in translated.get("added_tokens") or []}
    for name in "tokenizer_config.json", "added_tokens.json":
        path = os.path.join(folder, name)
        if os.path.exists(path):
            with reading_json(path) as content:
                if name == "added_tokens.json":
                    found = {token: {"content": text} for text, token in content.items()}
                else:
                    found = content.get("added_tokens_decoder") or {}
                for token, entry in found.items():
                    added.setdefault(int(token), dict(entry, id=int(token)))
    return list(added.values())


def is_tiktoken(path):
    """Meta's Llama 3 calls a list of base64 words tokenizer.model, too."""
    with open(path, "rb") as stream:
        return bool(re.match(rb"[A-Za-z0-9+/]+=* \d+\n", stream.read(400)))


def is_stale(model, content):
    """Whether tokenizer.json has pieces that the tokenizer.model beside it does not have so."""
    if content["model"].get("type", "BPE") != "BPE":
        return False
    with reading(model):
        known = read_sentencepiece(model, quiet=True).pieces
    added = {entry["id"] for entry in content.get("added_tokens") or []}
    strange = 0
    for name, token in content["model"].get("vocab", {}).items():
        kind, text = known.get(token, (NORMAL, None))
        strange += token not in added and kind == NORMAL \
            and text != name.replace(SPACE, " ").encode()
    if strange:
        warn(model, f"lacks {strange} pieces that tokenizer.json beside it has; "
             "tokenizer.json was taken instead")
    return strange > 0


def read_tokenizer(path, rows, added=()):
    with reading(path):
        if path.endswith(".json"):
            tokenizer = read_tokenizer_json(path, added)
        else:
            tokenizer = (read_tokenizer_bin if path.endswith(".bin") else read_sentencepiece)(path)
            add_tokens(path, tokenizer, added)
        # No text of the model ever has a token that its embedding has no row for.
        beyond = sorted(token for token in tokenizer.added if token >= rows)
        if beyond:
            warn(path, f"added tokens have ids after the model's last, {rows - 1}: "
                 f"{some(map(tokenizer.text_of, beyond))}; they were dropped")
        for token in beyond:
            del tokenizer.pieces[token]
        check_tokenizer(tokenizer, rows)
        doubt_tokenizer(path, tokenizer, rows)
    return tokenizer


def check_tokenizer(tokenizer, rows):
    """What drugs.c demands of a tokenizer."""
    seen, scores = {}, tokenizer.scores or {}
    for token, (kind, text) in tokenizer.pieces.items():
        demand(whole(token, 0, rows), f"piece {text!r} has id {token!r}, but the model knows "
               f"only {rows}: the tokenizer belongs to another model")
        demand(math.isfinite(scores.get(token, 0)),
               f"is damaged: piece {token} has the score {scores.get(token)}")
        demand(kind <= END and (kind != BYTE or len(text) == 1) and (text or kind == CONTROL),
               f"is damaged: piece {token}, {text!r}, is of kind {kind}")
        if kind in (BYTE, UNKNOWN):
            name = "unknown" if kind == UNKNOWN else text
            demand(name not in seen, f"pieces {seen.get(name)} and {token} are both {name!r}: "
                   "there can be only one")
            seen[name] = token
    demand(tokenizer.byte_level or len(tokenizer.of_kind(BYTE)) == 256 or "unknown" in seen,
           "has no pieces for all bytes and none for what is unknown")


def doubt_tokenizer(path, tokenizer, rows):
    """What is possible, but more likely a mistake."""
    n_known = sum(bool(piece.text) for piece in tokenizer.pieces.values())
    if 10 * (rows - n_known) > rows:
        warn(path, f"knows only {n_known} of the {rows} ids of the model; the others print nothing."
             "  Is it the tokenizer of this model?")
    texts = [tokenizer.pieces[token].text for token in tokenizer.of_kind(NORMAL)]
    n_doubled = len(texts) - len(set(texts))
    if n_doubled >= 100:
        warn(path, f"has {n_doubled} pieces that spell the same as others; is it of a known kind?")
    # These bytes never occur in UTF-8: no text needs a piece for them.
    needed = {bytes([byte]) for byte in range(256)} - {
        bytes([byte]) for byte in (0xc0, 0xc1, *range(0xf5, 0x100))}
    missing = len(needed.difference(texts))     # an added token may have taken the id of one
    if tokenizer.byte_level and missing:
        warn(path, f"has no pieces for {missing} bytes; like Hugging Face, drugs.c leaves "
             "them out of a text")


def byte_piece(name):
    """b"A" for "<0x41>", None for any other name."""
    match = re.match(r"<0x([0-9A-F]{2})>\Z", name)
    return match and bytes([int(match.group(1), 16)])


def add_tokens(path, tokenizer, added):
    """Tokens added after training: special ones are control, the others are found in the text."""
    odd = []
    for entry in added:
        token, text = entry["id"], entry["content"]
        demand(type(token) is int, f"is damaged: added token {text!r} has the id {token!r}")
        old = tokenizer.pieces.get(token, Piece(NORMAL, b""))
        kind = CONTROL if entry.get("special") else USER_DEFINED
        if old.kind != UNKNOWN and (old.kind, old.text) != (kind, text.encode()):
            name = text if tokenizer.byte_level else text.replace(SPACE, " ")
            tokenizer.pieces[token] = Piece(kind, name.encode())
        tokenizer.added.add(token)
        spaces = entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word")
        moved = entry.get("normalized") and tokenizer.flags & PREFIX_SPACE
        if spaces or moved and kind == USER_DEFINED:
            odd.append(text)
    if odd:
        warn(path, f"wants spaces or words around added tokens ({some(odd)}) to be heeded; "
             "drugs.c takes these tokens wherever they stand, and leaves what is around them")


# SentencePiece's tokenizer.model is a protocol buffer: a sequence of fields, each a number that
# holds (field << 3 | wire type) followed by a value.  Numbers are cut into groups of seven bits,
# lowest first; the eighth bit of a byte says that another one follows.


def proto_number(data, at):
    """The number that begins at `at`, and where it ends."""
    value = shift = 0
    while data[at] > 127:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        demand(shift < 64, "is damaged: a number of more than 64 bits")
    value |= data[at] << shift
    # A negative number is written as its 64-bit two's complement.
    return (value - 2 ** 64 if value >> 63 else value), at + 1


def proto_fields(data):
    """All (field, value) of a message; a value is an int, or bytes for everything else."""
    at = 0
    while at < len(data):
        key, at = proto_number(data, at)
        demand(key > 7, "is damaged: a field without a number")
        if key & 7 == 0:
            value, at = proto_number(data, at)
        else:
            length, at = proto_number(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            demand(0 <= length <= len(data) - at, "is truncated; fetch it again")
            value, at = data[at:at + length], at + length
        yield key >> 3, value


# The kinds of SentencePiece.  A piece that is marked as unused is kept as a nameless id.
UNUSED = 5
SP_KINDS = {1: NORMAL, 2: UNKNOWN, 3: CONTROL, 4: USER_DEFINED, 6: BYTE, UNUSED: CONTROL}


def read_sentencepiece(path, quiet=False):
    demand(not is_tiktoken(path), "is a tiktoken list of Llama 3, which does not say how text is "
           "cut; put tokenizer.json of the same model beside it")
    pieces, scores, trainer, normaliser, file, seen = {}, {}, {}, {}, File(path), set()
    for number, value in proto_fields(file.read(0, file.size)):
        if number == 1:
            piece, token = dict(proto_fields(value)), len(pieces)
            name, kind = piece[1].decode(), SP_KINDS[piece.get(3, 1)]
            demand(name and name not in seen, f"is damaged: piece {token} is "
                   + (f"{name!r}, as another one" if name else "empty"))
            seen.add(name)
            demand(kind != BYTE or byte_piece(name),
                   f"is damaged: byte piece {token} names no byte")
            scores[token], = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces[token] = EMPTY if piece.get(3) == UNUSED else Piece(
                kind, byte_piece(name) if kind == BYTE else name.replace(SPACE, " ").encode())
        elif number in (2, 3):
            (trainer if number == 2 else normaliser).update(proto_fields(value))
    demand(pieces, "is damaged, or no SentencePiece model: it has no pieces")
    demand(trainer.get(3, 1) == 2, f"is not a BPE tokenizer (SentencePiece model_type "
           f"{trainer.get(3, 1)}); only BPE can be exported")
    demand(not trainer.get(24, 0), "puts spaces after words (treat_whitespace_as_suffix), which "
           "drugs.c does not know")
    demand(normaliser.get(5, 1), "keeps spaces as they are (escape_whitespaces is off), which "
           "drugs.c does not know")
    if normaliser.get(2) and not quiet:
        warn(path, "its normaliser replaces some characters (wide and joined letters, and perhaps "
             "line feeds by spaces); drugs.c takes text as it is")
    flags = PREFIX_SPACE if normaliser.get(3, 1) else 0
    # Hugging Face cuts a text at control pieces before SentencePiece sees it, section by section.
    # (At user-defined pieces it is SentencePiece itself that cuts, and puts no further space.)
    if flags and all(piece.kind != USER_DEFINED for piece in pieces.values()):
        flags |= PREFIX_EACH
    flags |= COLLAPSE_SPACES if normaliser.get(4, 1) else 0
    bos, eos = trainer.get(41, 1), trainer.get(42, 2)
    return Tokenizer(pieces, flags, scores=scores, begins=bos, bos=bos, eos=eos,
                     by_sentencepiece=True)


def read_tokenizer_bin(path):
    """llama2.c: the longest length, then {f32 score, i32 length, bytes} up to the end of the file.

    Kinds are not stored.  Byte pieces are known by their names; ids 0, 1 and 2 are <unk>, the
    begin and the end of a text, always.
    """
    file, at, pieces, scores = File(path), 4, {}, {}
    while at < file.size or len(pieces) < 3:
        score, length = struct.unpack("<fi", file.read(at, 8))
        text, at = file.read(at + 8, length), at + 8 + length
        if len(pieces) < 3:
            # Line feeds stand around <s> and </s> so that they look well when printed.
            piece = Piece(CONTROL if pieces else UNKNOWN, text.strip(b"\n"))
        else:
            byte = byte_piece(text.decode("utf-8", "replace"))
            piece = Piece(BYTE if byte else NORMAL, byte or text)
        scores[len(pieces)], pieces[len(pieces)] = score, piece
    # Until August 2023, byte pieces were written as the characters 0 to 255 instead.
    if all(token + 3 in pieces and pieces[token + 3].text == chr(token).encode()
           for token in range(256)):
        for token in range(256):
            pieces[token + 3] = Piece(BYTE, bytes([token]))
    return Tokenizer(pieces, PREFIX_SPACE | PREFIX_EACH, scores=scores, begins=1, bos=1, eos=2)


# tokenizer.json is a pipeline of many possible steps.  Each of those below is done exactly, or
# refused, or warned about; what is not mentioned is refused.

GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ENDS_REGEX = r"\A +| +\z"


def read_tokenizer_json(path, added):
    with reading_json(path) as content:
        model = content["model"]
        demand(model.get("type", "BPE") == "BPE",
               f"is a {model.get('type')} tokenizer; only BPE can be exported")
        refuse_settings(model, "dropout", "continuing_subword_prefix", "end_of_word_suffix")
        plan = Plan(path, content)
        tokenizer = Tokenizer({}, plan.flags, plan.byte_level, tuple(plan.patterns),
                              takes_words=bool(model.get("ignore_merges")))
        read_vocabulary(model, plan, tokenizer)
        add_tokens(path, tokenizer, added or content.get("added_tokens") or [])
        read_merges(path, model, plan, tokenizer)
        one_by_one = model.get("unk_token") and not model.get("fuse_unk") and not plan.byte_level
        demand(not one_by_one or len(tokenizer.of_kind(BYTE)) == 256,
               "makes each unknown character a token of its own (fuse_unk is off), which drugs.c "
               "does not know")
        tokenizer.begins = begin_of_template(path, content)
        tokenizer.bos = tokenizer.begins if tokenizer.begins >= 0 else tokenizer.id_of(b"<s>")
        tokenizer.eos = tokenizer.id_of(b"</s>")
        return tokenizer


class Plan:
    """What a tokenizer.json does to a text before merging: flags, byte_level, patterns."""

    def __init__(self, path, content):
        self.flags, self.byte_level, self.patterns = 0, False, []
        self.doubts = []            # warnings, for when nothing is refused
        self.spaces = False         # whether a space is written as U+2581
        self.split = False          # whether Metaspace cuts before every space
        self.stripped = self.prepended = False
        for part in "normalizer", "pre_tokenizer", "decoder":
            for step in steps(content.get(part)):
                # Most of these are one word; what follows says which of its settings are known.
                known, kind = getattr(self, part)(step["type"], step), step.pop("type")
                text = json.dumps(step, ensure_ascii=False) if step else ""
                demand(known, f"has a {part} {kind} {text[:200]}, which drugs.c does not know")
        cut, unknown = self.byte_level, "which drugs.c does not know"
        demand(self.spaces or not self.prepended,
               "has a normalizer that puts U+2581 before a text, but none that makes it of spaces")
        demand(not self.stripped or self.flags & COLLAPSE_SPACES,
               f"has a normalizer that strips spaces, but none that joins them, {unknown}")
        demand(cut or not self.patterns,
               f"has a pre_tokenizer Digits or Split without ByteLevel, {unknown}")
        demand(len(self.patterns) <= MOST_CUTTERS,
               f"cuts text by {len(self.patterns)} patterns; {MOST_CUTTERS} are the most")
        demand(cut or not content["model"].get("ignore_merges"),
               f"sets ignore_merges for text that is not cut, {unknown}")
        for doubt in self.doubts:
            warn(path, doubt)

    def normalizer(self, kind, step):
        if kind in ("NFC", "NFKC", "Nmt", "Precompiled"):
            self.doubts.append(f"its normalizer {kind} replaces some characters (accents written "
                               "apart, wide letters and the like); drugs.c takes text as it is")
            return True
        if kind == "Prepend":
            self.flags |= PREFIX_SPACE | PREFIX_EACH
            self.prepended = True
            return step["prepend"] == SPACE
        as_typed = not self.spaces and not self.prepended       # spaces are still spaces
        if kind == "Strip" and as_typed:
            self.doubts.append("its normalizer Strip also takes line feeds from both ends of a "
                               "text; drugs.c takes only spaces")
            self.stripped = step["strip_left"] and step["strip_right"]
            return self.stripped
        rule = kind == "Replace" and (*step["pattern"].items(), step["content"])
        if rule == (("String", " "), SPACE):
            self.spaces = True
        elif rule == (("Regex", ENDS_REGEX), "") and as_typed:
            self.stripped = True
        elif rule == (("Regex", " {2,}"), " ") and as_typed and self.stripped:
            self.flags |= COLLAPSE_SPACES
        elif rule == (("String", "\n"), "\n ") and as_typed and not self.stripped:
            self.flags |= NEWLINE_SPACE
            self.doubts.append("its normalizer puts a space after every newline; so will drugs.c, "
                               "which does not print it")
        else:
            return False
        return True

    def pre_tokenizer(self, kind, step):
        if self.byte_level:
            return False                # its bytes are no characters any more
        if kind == "Metaspace" and not self.patterns and not self.spaces:
            # Two generations of one setting; "always" unless it says otherwise.
            scheme = step.get("prepend_scheme", "always")
            if scheme != "never" and step.get("add_prefix_space", True):
                if self.prepended:
                    return False        # two steps that put a space
                self.flags |= PREFIX_SPACE | PREFIX_UNLESS_SPACE
                self.flags |= PREFIX_EACH if scheme == "always" else 0
            self.spaces, self.split = True, step.get("split", True)
            known = scheme in ("always", "first", "never")
            return known and step.get("replacement", SPACE) == SPACE
        if self.spaces:
            return False
        if kind == "Digits":
            self.patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
            return True
        if kind == "Split":
            (of, pattern), = step["pattern"].items()
            self.patterns.append(pattern if of == "Regex" else re.sub(r"(\W)", r"\\\1", pattern))
            return step["behavior"] == "Isolated" and not step.get("invert")
        if kind != "ByteLevel":
            return False
        self.byte_level = True
        if step.get("use_regex", True):
            self.patterns.append(GPT2_REGEX)
        if step.get("add_prefix_space", True):
            self.flags |= PREFIX_SPACE | PREFIX_EACH | PREFIX_UNLESS_SPACE
            # It would be put before each part that other steps cut.
            return self.patterns in ([], [GPT2_REGEX])
        return True

    def decoder(self, kind, step):
        """The way back to text is implied by the pieces; but is it this one?"""
        if kind == "Replace":
            undone = step["pattern"].get("String"), step["content"]
            return undone == (SPACE, " ") or (self.flags & NEWLINE_SPACE
                                              and undone == ("\n ", "\n"))
        if kind == "ByteLevel":
            return self.byte_level
        if kind == "Strip":
            return step.get("content") == " "
        return kind in ("ByteFallback", "Fuse", "Metaspace")


def steps(node):
    """A pipeline is None, a step, or a sequence of pipelines."""
    if node and node["type"] != "Sequence":
        yield node
    elif node:
        inner, = [node[key] for key in node if key != "type"]
        for pipeline in inner:
            yield from steps(pipeline)


def begin_of_template(path, content):
    """The token that the last step of tokenizer.json puts before a text, or -1."""
    begin = -1
    for step in steps(content.get("post_processor")):
        if step["type"] == "ByteLevel":
            continue                    # it is about offsets only
        demand(step["type"] == "TemplateProcessing",
               f"has a post_processor {step['type']}, which drugs.c does not know")
        parts = [part.get("SpecialToken", {}).get("id") for part in step["single"]]
        text = parts.index(None)        # the one that is no special token
        demand(text < 2, f"puts {text} tokens before every text: drugs.c knows one at most")
        if text:
            begin, = step["special_tokens"][parts[0]]["ids"]
        if parts[text + 1:]:
            warn(path, f"appends {some(parts[text + 1:])} to every text; drugs.c does not")
    return begin


def byte_alphabet():
    """How GPT-2 writes a byte as a character that can be seen: {character: byte}."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {**{chr(byte): byte for byte in shown},
            **{chr(256 + place): byte for place, byte in enumerate(hidden)}}


def read_vocabulary(model, plan, tokenizer):
    pieces, alphabet = tokenizer.pieces, byte_alphabet()
    for name, token in model["vocab"].items():
        demand(token not in pieces, f"pieces {name!r} and {tokenizer.text_of(token)!r} "
               f"have one id, {token!r}")
        kind, text = NORMAL, (name.replace(SPACE, " ") if plan.spaces else name).encode()
        if plan.byte_level and alphabet.keys() >= set(name):
            text = bytes(alphabet[character] for character in name)
        if name == model.get("unk_token"):
            kind = UNKNOWN
        elif model.get("byte_fallback") and not plan.byte_level and byte_piece(name):
            kind, text = BYTE, byte_piece(name)
        pieces[token] = Piece(kind, text)
    demand(plan.spaces or plan.byte_level or all(SPACE not in name for name in model["vocab"]),
           "has pieces with U+2581, but no normalizer or pre_tokenizer that makes it of spaces")


def read_merges(path, model, plan, tokenizer):
    """The pairs that may be joined, the best first."""
    ids, pieces, ranked, strangers = model["vocab"], tokenizer.pieces, {}, 0
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        for name in left, right, left + right:
            demand(name in ids, f"merges {left!r} and {right!r}, but {name!r} is no piece")
        merge = ids[left], ids[right], ids[left + right]
        normal = all(pieces[token].kind == NORMAL for token in merge)
        strangers += not normal
        # Metaspace cuts before every space, so that nothing is ever joined across it.
        crosses = plan.split and SPACE in (left + right)[1:]
        if normal and not crosses:
            ranked[merge] = rank        # of a pair that stands there twice, the later one counts
    if strangers:
        warn(path, f"has {strangers} merges of control pieces and the like, which are never made "
             "from text; they were dropped")
    tokenizer.merges = sorted(ranked, key=ranked.get)


# ------------------------------------------------------------------------------------------------
# 7. The language of chat templates
#
# A chat template is a small program in the language Jinja, and only running it says what it writes.
# It is run here: cut into tags, its expressions parsed by Python's `ast` and walked node by node.
# Python itself never runs any of it.  Work is counted, a unit for each step and for each character
# that is made, and is bounded: so loops end and texts stay small.
#
# What follows knows the statements of STATEMENTS below, constants, names, lists, tuples,
# dictionaries, a.b, a[b], a[b:c:d], calls, arithmetic, a ~ b (joined as texts), comparisons, in,
# and, or, not, a if b [else c], a | FILTER [(...)], a is [not] TEST [argument].
#
# A tag with a - at an end takes all white space there.  As Hugging Face sets it, a tag with % or #
# also takes the line feed after it (trim_blocks), and the spaces before it if nothing else stands
# before it on its line (lstrip_blocks); a + at an end says not to.

MOST_WORK, MOST_NESTED = 1 << 20, 50
QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
TAGS = {opening: re.compile(r"""([-+]?)((?:%s|[^'"])*?)([-+]?)%s""" % (QUOTED, closing), re.S)
        for opening, closing in (("{{", "}}"), ("{%", "%}"))}
TAGS["{#"] = re.compile(r"([-+]?)(.*?)([-+]?)#}", re.S)
TOKEN = re.compile(r"\s*(?:(?P<text>%s)|(?P<number>\d+\.\d+|\d+)|(?P<name>[^\W\d]\w*)|"
                   r"(?P<sign>==|!=|<=|>=|//|[-+*/%%~<>=()\[\]{},:.|]))" % QUOTED, re.S)
WORDS = {"and", "or", "not", "in", "if", "else"}        # that mean to Python what they mean here
CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "none": None, "None": None}
# The value of what has none is false and prints nothing.
UNDEFINED = type("Undefined", (), {"__bool__": lambda _: False, "__str__": lambda _: ""})()


class Namespace(dict):
    """What namespace() makes: {% set a.b = ... %} changes it, from within a loop, too."""


class Raised(Refused):
    """The template itself refuses a conversation."""

class Jump(Exception):
    """{% break %} or {% continue %}."""


def cut_tags(text):
    """(opening, content) for each tag, and ("", text) for what lies between."""
    text, at = re.sub("\r\n?", "\n", text), 0
    text = text[:-1] if text.endswith("\n") else text
    for found in iter(lambda: re.compile(r"\{[{%#]").search(text, at), None):
        opening, between = found.group(), text[at:found.start()]
        tag = TAGS[opening].match(text, found.end())
        demand(tag, f"a tag does not end: {text[found.start():][:40]!r}")
        before, line_feed, line = between.rpartition("\n")
        if tag[1] == "-":
            between = between.rstrip()
        elif opening != "{{" and tag[1] != "+" and not line.strip() and (
                line_feed or text[max(at - 1, 0):at] in ("", "\n")):
            between = before + line_feed
        yield "", between
        yield opening, tag[2].strip()
        taken = r"\s*" if tag[3] == "-" else "\n?" if opening != "{{" and tag[3] != "+" else ""
        at = re.compile(taken).match(text, tag.end()).end()
    yield "", text[at:]


# What Python has in the place of a statement, and the words that end it or a part of it.
STATEMENTS = {
    "if": ("if (%s): 0", "elif else endif"), "for": ("for %s: 0", "else endfor"),
    "macro": ("def %s: 0", "endmacro"), "set": ("%s", ""), "set block": ("with %s: 0", "endset"),
    "generation": ("if 1: 0", "endgeneration"),
    "break": ("break", ""), "continue": ("continue", "")}
STATEMENTS["elif"] = STATEMENTS["if"]


def parse_python(text, form="(%s)"):
    """The tree of an expression, or of the head of a statement, as Python's ast has it.

    A name gets a prefix, so that it is no keyword of Python's and says what it is: v_ for most, f_
    for a filter, t_ for a test, n_ for a test that is negated.  a | b becomes a.f_b(), a is b
    becomes a.t_b(), and a ~ b becomes a @ b, which nothing else means.
    """
    text, tokens, at, out, depth, row = text.strip(), [], 0, [], 0, 0
    while at < len(text):
        found = TOKEN.match(text, at)
        demand(found, f"{text[at:][:40]!r} is not understood")
        tokens.append(found)
        at = found.end()
    signs = {token["sign"] for token in tokens}
    demand("~" not in signs or not signs & {"*", "/", "//", "%"}, "it has a ~ beside a product")
    waiting = iter(zip(tokens, tokens[1:] + [TOKEN.match(")")]))
    for token, following in waiting:
        sign, name = token["sign"], token["name"]
        depth += (sign in ("(", "[", "{")) - (sign in (")", "]", "}"))
        row = row + 1 if sign in ("-", "+") or name == "not" else 0
        demand(max(depth, row) <= MOST_NESTED and len(out) < 10000, "an expression is too long")
        if sign != "|" and name != "is":
            out.append(python_of(token))
            continue
        kind = "f" if sign else "t"
        if kind == "t" and following["name"] == "not":
            kind, _ = "n", next(waiting)
        token, following = next(waiting, (token, following))
        out.append(f".{kind}_{token['name']}")
        if following["sign"] == "(":
            continue
        # A test may have one argument without brackets.
        if kind != "f" and not following["sign"] and following["name"] not in WORDS | {"is"}:
            token, following = next(waiting)
            demand(following["sign"] not in (".", "[", "("), "a test has a long argument")
            out.append(f"({python_of(token)})")
        else:
            out.append("()")
    for ending in "", " else v_undefined":      # Jinja needs no else
        with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            return ast.parse(form.replace("%s", " ".join(out) + ending)).body[0]
    raise Refused(f"{text[:80]!r} is not understood")


def python_of(token):
    if token["text"]:       # where a line feed may stand as itself
        inner = token["text"][1:-1].encode("ascii", "backslashreplace")
        return repr(inner.decode("unicode_escape"))
    if token["name"]:
        return token["name"] if token["name"] in WORDS else "v_" + token["name"]
    return token["number"] or token["sign"].replace("~", "@")


def attribute_of(value, path):
    for name in path.split("."):
        value = value.get(name, UNDEFINED) if isinstance(value, dict) else UNDEFINED
    return value


def chosen(wanted, by_attribute):
    """The filters select and selectattr, reject and rejectattr."""
    def choose(values, *rest):
        path, *rest = rest if by_attribute else (None, *rest)
        check = TESTS[rest[0]] if rest else bool
        return [value for value in values or () if wanted == bool(
            check(attribute_of(value, path) if by_attribute else value, *rest[1:]))]
    return choose


def mapped(values, *rest, attribute=None):
    if attribute:
        return [attribute_of(value, attribute) for value in values or ()]
    return [FILTERS[rest[0]](value, *rest[1:]) for value in values or ()]


def numbers_to(*ends):
    demand(all(abs(end) <= MOST_WORK for end in ends), "it counts too far")
    return list(range(*ends))


def refuse(why=""):
    raise Raised(f"it says: {why}")


TESTS = {
    "defined": lambda x: x is not UNDEFINED, "undefined": lambda x: x is UNDEFINED,
    "none": lambda x: x is None, "true": lambda x: x is True, "false": lambda x: x is False,
    "string": lambda x: isinstance(x, str), "mapping": lambda x: isinstance(x, dict),
    "iterable": lambda x: isinstance(x, (str, list, tuple, dict, type(UNDEFINED))),
    "number": lambda x: isinstance(x, (int, float)), "boolean": lambda x: isinstance(x, bool),
    "integer": lambda x: type(x) is int, "float": lambda x: isinstance(x, float),
    "odd": lambda x: x % 2 == 1, "even": lambda x: x % 2 == 0, "in": lambda x, y: x in y,
    "equalto": operator.eq, "eq": operator.eq, "ne": operator.ne}
TESTS["sequence"] = TESTS["iterable"]
FILTERS = {
    "trim": lambda x, *chars: str(x).strip(*chars), "string": str, "safe": lambda x: x,
    "lower": lambda x: str(x).lower(), "upper": lambda x: str(x).upper(),
    "capitalize": lambda x: str(x).capitalize(), "title": lambda x: str(x).title(),
    "length": len, "count": len, "list": lambda x: list(x or ()), "int": int,
    "first": lambda x: next(iter(x), UNDEFINED), "last": lambda x: x[-1] if x else UNDEFINED,
    "join": lambda x, by="": by.join(map(str, x)), "map": mapped, "reverse": lambda x: x[::-1],
    "replace": lambda x, old, new: str(x).replace(old, new),
    "items": lambda x: list((x or {}).items()),
    "default": lambda x, other="", falsy=False: other if x is UNDEFINED or falsy and not x else x,
    "tojson": lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent),
    "select": chosen(True, False), "selectattr": chosen(True, True),
    "reject": chosen(False, False), "rejectattr": chosen(False, True)}
METHODS = {
    str: "strip lstrip rstrip startswith endswith split rsplit splitlines upper lower title "
         "capitalize replace find rfind index count join isdigit".split(),
    dict: "get items keys values".split()}
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}
COMPARISONS = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.In: lambda x, y: x in (y or ()), ast.NotIn: lambda x, y: x not in (y or ())}


class Template:
    """A template as a list of trees, one for each tag and each text, which are walked."""

    def __init__(self, text):
        demand(isinstance(text, str) and len(text) <= 200000, "it is too long, or no text")
        self.tags = cut_tags(text)
        self.asked = set()              # the names that were looked up
        self.body, _, _ = self.parse()

    def parse(self, *ends):
        """(what stands before a statement of one of these words, that word, what follows it)."""
        body = []
        for opening, content in self.tags:
            word, rest = re.match(r"(\w*)(.*)", content, re.S).groups()
            if opening == "{%" and word in ends:
                return body, word, rest
            if opening == "{%":
                demand(word in STATEMENTS,
                       f"it has {{% {content[:40]} %}}, which is not known here")
                body.append(self.statement(word, rest))
            elif opening == "{{":
                body.append(parse_python(content))
            elif not opening:
                body.append(ast.Expr(ast.Constant(content)))
        demand(not ends, f"it has no {{% {ends and ends[-1]} %}}")
        return body, "", ""

    def statement(self, word, rest):
        form, ends = STATEMENTS["set block" if word == "set" and "=" not in rest else word]
        tree = parse_python(rest, form)
        if ends:
            tree.body, end, rest = self.parse(*ends.split())
            if end == "elif":
                tree.orelse = [self.statement(end, rest)]
            elif end == "else":
                tree.orelse, _, _ = self.parse(ends.split()[-1])
        return tree

    def render(self, **variables):
        """What the template writes.  Raises Refused if it cannot, Raised if it does not want to."""
        self.work, self.out = 0, []
        scope = collections.ChainMap({}, dict(
            CONSTANTS, namespace=Namespace, dict=dict, range=numbers_to, raise_exception=refuse,
            **variables))
        try:
            self.run(scope, self.body)
            return "".join(self.out).encode().decode()      # no half of a surrogate pair
        except Refused:
            raise
        except Exception as error:
            raise Refused(f"it fails: {error}")

    def run(self, scope, body):
        for tree in body:
            self.value(scope, tree)

    def spend(self, amount):
        self.work += amount
        demand(self.work <= MOST_WORK, "it takes too long")

    def weigh(self, *values):
        """Spends as much as there is in them, and gives back the last one."""
        for value in values:
            self.spend(len(value) if isinstance(value, str) else 1)
            if isinstance(value, dict):
                self.weigh(*value.keys(), *value.values())
            elif isinstance(value, (list, tuple)):
                self.weigh(*value)
            demand(type(value) is not int or abs(value) < 1 << 63, "it makes too large a number")
        return values[-1] if values else None

    # ---- statements

    def captured(self, scope, body):
        """What is written meanwhile."""
        out, self.out = self.out, []
        try:
            self.run(scope, body)
            return "".join(self.out)
        finally:
            self.out = out

    def bind(self, scope, target, value):
        """Gives a value to a name, to an attribute of a namespace, or values to several."""
        if isinstance(target, ast.Tuple):
            values = list(value)
            demand(len(values) == len(target.elts),
                   f"it gives {len(values)} values to {len(target.elts)} names")
            for part, value in zip(target.elts, values):
                self.bind(scope, part, value)
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
            space = scope.get(target.value.id[2:])
            demand(isinstance(space, Namespace), f"{target.value.id[2:]} is no namespace")
            space[target.attr[2:]] = value
        else:
            demand(isinstance(target, ast.Name), "it gives a value to what is no name")
            scope[target.id[2:]] = value

    def on_Expr(self, scope, tree):
        self.out.append(self.weigh(str(self.weigh(self.value(scope, tree.value)))))

    def on_Assign(self, scope, tree):
        self.bind(scope, tree.targets[0], self.value(scope, tree.value))

    def on_With(self, scope, tree):
        self.bind(scope, tree.items[0].context_expr, self.captured(scope, tree.body))

    def on_If(self, scope, tree):
        self.run(scope, tree.body if self.value(scope, tree.test) else tree.orelse)

    def on_For(self, scope, tree):
        values, wanted = tree.iter, None
        if isinstance(values, ast.IfExp):       # the if is the loop's own: an else never follows
            values, wanted = values.body, values.test
        items = self.value(scope, values)
        demand(items is UNDEFINED or isinstance(items, (str, list, tuple, dict)),
               f"it loops over {items!r}")
        rounds = []
        for item in self.weigh(list(items or ())):
            inner = scope.new_child()
            self.bind(inner, tree.target, item)
            if not wanted or self.value(inner, wanted):
                rounds.append((inner, item))
        around = [UNDEFINED, *(item for _, item in rounds), UNDEFINED]
        for at, (inner, _) in enumerate(rounds):
            left = len(rounds) - at
            inner["loop"] = dict(
                index0=at, index=at + 1, first=at == 0, last=left == 1, length=len(rounds),
                revindex=left, revindex0=left - 1, previtem=around[at], nextitem=around[at + 2])
            try:
                self.run(inner, tree.body)
            except Jump as jump:
                if str(jump) == "Break":
                    break
        self.run(scope, [] if rounds else tree.orelse)

    def on_Break(self, _, tree):
        raise Jump(type(tree).__name__)

    on_Continue = on_Break

    def on_FunctionDef(self, scope, tree):
        names = [argument.arg[2:] for argument in tree.args.args]
        defaults = list(zip(reversed(names), reversed(tree.args.defaults)))

        def call(*arguments, **named):
            inner = scope.new_child(dict.fromkeys(names, UNDEFINED))
            inner.update((name, self.value(scope, default)) for name, default in defaults)
            inner.update(zip(names, arguments), **named)
            return self.captured(inner, tree.body)
        scope[tree.name[2:]] = call

    # ---- expressions

    def value(self, scope, tree):
        self.spend(1)
        walk = getattr(self, "on_" + type(tree).__name__, None)
        demand(walk, f"it has a {type(tree).__name__}, which is not known here")
        return walk(scope, tree)

    def on_Constant(self, _, tree):
        return tree.value

    def on_Name(self, scope, tree):
        self.asked.add(tree.id[2:])
        return scope.get(tree.id[2:], UNDEFINED)

    def on_List(self, scope, tree):
        return [self.value(scope, part) for part in tree.elts]

    def on_Tuple(self, scope, tree):
        return tuple(self.on_List(scope, tree))

    def on_Dict(self, scope, tree):
        return {self.value(scope, key): self.value(scope, part)
                for key, part in zip(tree.keys, tree.values)}

    def on_IfExp(self, scope, tree):
        return self.value(scope, tree.body if self.value(scope, tree.test) else tree.orelse)

    def on_BoolOp(self, scope, tree):
        for part in tree.values:
            value = self.value(scope, part)
            if bool(value) == isinstance(tree.op, ast.Or):
                break
        return value

    def on_UnaryOp(self, scope, tree):
        value = self.value(scope, tree.operand)
        if isinstance(tree.op, ast.Not):
            return not value
        demand(isinstance(value, (int, float)), "it has a sign before what is no number")
        return -value if isinstance(tree.op, ast.USub) else value

    def on_BinOp(self, scope, tree):
        left, right = self.value(scope, tree.left), self.value(scope, tree.right)
        kind, numbers, rows = type(tree.op), (int, float), (str, list, tuple)
        if kind is ast.MatMult:
            return self.weigh(str(self.weigh(left)) + str(self.weigh(right)))
        joined = kind is ast.Add and type(left) is type(right) and isinstance(left, rows)
        demand(joined or kind in ARITHMETIC and isinstance(left, numbers)
               and isinstance(right, numbers),
               f"it has {kind.__name__} of {type(left).__name__} and {type(right).__name__}")
        return self.weigh(ARITHMETIC[kind](left, right))

    def on_Compare(self, scope, tree):
        left = self.value(scope, tree.left)
        for kind, part in zip(map(type, tree.ops), tree.comparators):
            right = self.value(scope, part)
            self.weigh(left, right)
            demand(kind in COMPARISONS, f"it has {kind.__name__}")
            if not COMPARISONS[kind](left, right):
                return False
            left = right
        return True

    def on_Attribute(self, scope, tree):
        value = self.value(scope, tree.value)
        demand(value is not UNDEFINED, f"it asks what is not there for its {tree.attr[2:]}")
        return attribute_of(value, tree.attr[2:])

    def on_Subscript(self, scope, tree):
        value, at = self.value(scope, tree.value), tree.slice
        demand(value is not UNDEFINED, "it asks what is not there for a part")
        if isinstance(at, ast.Slice):
            parts = [part and self.value(scope, part) for part in (at.lower, at.upper, at.step)]
            return self.weigh(value[slice(*parts)])
        at = self.value(scope, at.value if type(at).__name__ == "Index" else at)    # Python 3.8
        with contextlib.suppress(KeyError, IndexError, TypeError):
            return value[at]
        return UNDEFINED

    def on_Call(self, scope, tree):
        arguments = [self.value(scope, part) for part in tree.args]
        demand(all(part.arg for part in tree.keywords), "it has a call with **")
        named = {part.arg[2:]: self.value(scope, part.value) for part in tree.keywords}
        kind, name = "v_", getattr(tree.func, "id", "v_")[2:]
        if not isinstance(tree.func, ast.Attribute):
            call = self.value(scope, tree.func)
        else:
            kind, name = tree.func.attr[:2], tree.func.attr[2:]
            value = self.value(scope, tree.func.value)
            if kind == "v_" and name not in METHODS.get(type(value), ()):
                call = attribute_of(value, name)
            else:
                arguments = [value, *arguments]
                call = getattr(type(value), name) if kind == "v_" else \
                    (FILTERS if kind == "f_" else TESTS).get(name)
        demand(callable(call), f"it calls {name}, which is not known here")
        self.weigh(*arguments, *named.values())
        if name in ("replace", "join"):         # which may make much of little
            self.spend(math.prod(len(part) for part in arguments if isinstance(part, (str, list))))
        found = call(*arguments, **named)
        found = list(found) if isinstance(found, collections.abc.MappingView) else found
        return self.weigh(not found if kind == "n_" else found)


# ------------------------------------------------------------------------------------------------
# 8. What stands beside: how a text begins, and what ends it
#
# config.json, generation_config.json, tokenizer_config.json and special_tokens_map.json all have
# their say, and often contradict each other.  The rule: what begins a text is the tokenizer's
# business, and everything that anybody names as an end is one.

BESIDE = "tokenizer_config", "generation_config", "special_tokens_map", "chat_template"


def read_beside(folder):
    """{name: content} of these files, {} for those that are not there."""
    found = dict.fromkeys(BESIDE, {})
    for name in BESIDE:
        path = os.path.join(folder, name + ".json")
        if os.path.exists(path):
            with reading_json(path) as found[name]:
                pass
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.exists(path):
        with reading(path), open(path, encoding="utf-8", newline="") as stream:
            found["chat_template"] = {"chat_template": stream.read()}
    return found


def special_tokens(beside):
    """The texts of bos_token, eos_token and their like, and of additional ones."""
    found = {}
    for file in "special_tokens_map", "tokenizer_config":
        for name, token in beside[file].items():
            several = isinstance(token, list) and name.endswith("_special_tokens")
            for token in token if several else [token]:
                token = token.get("content") if isinstance(token, dict) else token
                if name.endswith(("_token", "_tokens")) and token and isinstance(token, str):
                    found[f"{name} {token}" if several else name] = token
    return found


def settle(path, config, tokenizer, says, beside, form):
    """Makes one out of all opinions.  `says` is config.json, `form` is what --chat names."""
    settings = beside["tokenizer_config"]
    if tokenizer.by_sentencepiece and settings.get("legacy") is False:
        # Hugging Face's newer reading of tokenizer.model: no space after control pieces.
        tokenizer.flags &= ~PREFIX_EACH
        if settings.get("add_prefix_space") is False:
            tokenizer.flags &= ~PREFIX_SPACE
    if settings.get("eos_token", "") is None:
        tokenizer.eos = -1              # a tokenizer.json does not say, but here it is said
    for name, text in special_tokens(beside).items():
        token, end = tokenizer.id_of(text.encode()), name[:-len("_token")]
        if end in ("bos", "eos") and token >= 0:
            setattr(tokenizer, end, token)
        elif end in ("bos", "eos"):
            warn(path, f"{name} is {text!r}, which is no control piece; it was not believed")
        if token >= 0 and tokenizer.pieces[token].kind == USER_DEFINED:
            tokenizer.pieces[token] = Piece(CONTROL, text.encode())
    settle_begin(path, config, tokenizer, says, settings)
    chat_ends = settle_chat(path, tokenizer, beside, form)
    settle_ends(path, config, tokenizer, says, beside, chat_ends)


def settle_begin(path, config, tokenizer, says, settings):
    """Puts the piece that begins every text into tokenizer.begins, or -1."""
    adds = tokenizer.begins >= 0
    # Only some of Hugging Face's classes look at this setting.
    by_setting = "Llama" in settings.get("tokenizer_class", "Llama")
    if by_setting and type(settings.get("add_bos_token")) is bool:
        adds = settings["add_bos_token"]
    if by_setting and settings.get("add_eos_token") is True:
        warn(path, "its tokenizer appends the end to every text (add_eos_token); drugs.c does not")
    tokenizer.begins = tokenizer.bos if adds else -1
    if adds and tokenizer.begins < 0:
        warn(path, "its tokenizer wants a piece before every text (add_bos_token), but says not "
             "which; none is put")
    demand(whole(tokenizer.begins, -1, config.vocab_size),
           f"bos is {tokenizer.begins}, but there are {config.vocab_size} tokens")
    begin = tokenizer.pieces.get(tokenizer.begins, EMPTY)
    if begin.kind == NORMAL:
        tokenizer.pieces[tokenizer.begins] = Piece(CONTROL, begin.text)
    said = says.get("bos_token_id")
    if tokenizer.begins >= 0 and type(said) is int and said not in (-1, tokenizer.begins):
        warn(path, f"config.json says that token {said} begins a text (bos_token_id), the tokenizer"
             f" says {tokenizer.begins}; the tokenizer was believed")


def settle_ends(path, config, tokenizer, says, beside, chat_ends):
    """Marks the pieces that end a text."""
    named = {}                      # token -> who says so
    for file, settings in (("config.json", says),
                           ("generation_config.json", beside["generation_config"])):
        tokens = settings.get("eos_token_id")
        for token in tokens if isinstance(tokens, list) else [tokens]:
            if token not in (None, -1):
                demand(whole(token, 0, config.vocab_size), f"eos_token_id is {token!r} in {file}, "
                       f"but there are {config.vocab_size} tokens")
                named[token] = file
    fitting = {token for token in {tokenizer.eos, *chat_ends, *named}
               if tokenizer.may_be_control(token) and tokenizer.pieces[token].kind != UNKNOWN}
    # What begins a text ends one only where nothing else does.
    ends = fitting - {tokenizer.begins} or fitting
    for token in ends:
        tokenizer.pieces[token] = Piece(END, tokenizer.pieces[token].text)
    for token in sorted(named.keys() - ends):
        warn(path, f"{named[token]} says that token {token} ends a text (eos_token_id), but the "
             f"tokenizer knows it as {tokenizer.text_of(token)!r}; it was not believed")


# ------------------------------------------------------------------------------------------------
# 9. How a chat is written
#
# A chat is six strings, with control pieces spelt by their names:
#
#     opening          before the first question, if there is no system prompt
#     before_system    before the system prompt, and
#     after_system     between it and the first question; both empty: it has no place
#     before_question  before every later question
#     after_question   between a question and its answer
#     after_answer     after an answer, up to the control piece that ends it, if there is one
#
# They are what a chat template writes around texts that it is given.  The kind of a string says
# whether the template takes the spaces that were typed before it (1), after it (2), or both (3).
#
# Not every template is six strings.  So the proof is a conversation of five rounds: what drugs.c
# would read must be what the template writes, cut at the pieces that are found whole and with the
# spaces that the tokenizer puts there: then the ids are the same.  (The piece that begins every
# text comes first where the template does not spell it, for the tokenizer says so.)

OPENING, BEFORE_SYSTEM, AFTER_SYSTEM, BEFORE_QUESTION, AFTER_QUESTION, AFTER_ANSWER = range(6)
LEFT, RIGHT, MARK, SPACES = "\n \t", "\t \n", "\ue000", " \t\n\v\f\r"
QUESTIONS = "Who\nare you?", "  why 2 + 2?\n", "no. [x]  Yes\t", "\u00e4", "\n\tlast "
ANSWERS = "I am A.", "<think>b</think>B!", "c  d", "E"

# The forms that --chat knows, as templates, and the marks that are set in them.
MARKED = r"""
{%- for message in messages %}
  {{- before + message.role + after + message.content | trim + (end or eos_token + '\n') }}
{%- endfor %}
{{- before + 'assistant' + after if add_generation_prompt }}
"""
INST = r"""
{{- '' if each else bos_token }}
{%- set system = namespace(text='') %}
{%- for message in messages %}
  {%- if message.role == 'system' %}
    {%- set system.text = before + message.content + after %}
  {%- elif message.role == 'user' %}
    {{- each + open + (system.text + message.content) | trim + close }}
    {%- set system.text = '' %}
  {%- else %}
    {{- end + message.content | trim + end + eos_token }}
  {%- endif %}
{%- endfor %}
"""
PLAIN = r"""
{%- for message in messages %}
  {{- {'system': '', 'user': 'User: ', 'assistant': 'Assistant: '}[message.role]
      + message.content | trim + '\n' }}
{%- endfor %}
{{- 'Assistant:' if add_generation_prompt }}
"""
FORMS = {
    "llama2": (INST, dict(before="<<SYS>>\n", after="\n<</SYS>>\n\n", end=" ", open="[INST] ",
                          close=" [/INST]")),
    "llama3": (MARKED, dict(before="<|start_header_id|>", after="<|end_header_id|>\n\n",
                            end="<|eot_id|>")),
    "mistral": (INST, dict(before="", after="\n\n", end="", each="")),
    "zephyr": (MARKED, dict(before="<|", after="|>\n", end="")),
    "chatml": (MARKED, dict(before="<|im_start|>", after="\n", end="<|im_end|>\n")),
    "plain": (PLAIN, {})}


def settle_chat(path, tokenizer, beside, form):
    """Puts the chat into the tokenizer; returns the pieces that end an answer."""
    names = special_tokens(beside)
    for name, token in ("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos):
        names.setdefault(name, tokenizer.text_of(token) or "")
    settings = beside["tokenizer_config"]
    template = beside["chat_template"].get("chat_template", settings.get("chat_template"))
    if isinstance(template, list):      # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if form:
        template, marks = FORMS[form]
        names.update(inst_marks(tokenizer, names["bos_token"]), **marks)
    if not template:
        return ()
    try:
        program = Template(template)
        render = functools.partial(render_talk, program, names)
        chat, takes, ends, no_system = six_strings(tokenizer, render)
        parted = where_they_part(tokenizer, render, chat, takes, None)
        demand(not parted, parted)
    except Refused as why:
        warn(path, f"there will be no -m chat, as its chat template cannot be kept: {why}")
        return ()
    try:
        no_system = no_system or where_they_part(tokenizer, render, chat, takes, "\n Be A.\t")
    except Refused as why:
        no_system = why
    if no_system:
        warn(path, "what its chat template makes of a system prompt, drugs.c follows for one "
             f"round: {no_system}" if chat[1] + chat[2] else
             f"its chat template has no place for a system prompt{no_system}")
    if "strftime_now" in program.asked:
        warn(path, "its chat template wants today's date; its own default is written, so that a "
             "chat can be repeated")
    tokenizer.chat, tokenizer.takes = tuple(chat), tuple(takes)
    for token in tokenizer.of_kind(USER_DEFINED):
        # What a person types is never one of the marks of the chat.
        text = tokenizer.pieces[token].text
        if re.match(rb"[^\w\s].*\w.*[^\w\s]\Z", text) and text in "\n".join(chat).encode():
            tokenizer.pieces[token] = Piece(CONTROL, text)
    return ends


def inst_marks(tokenizer, bos):
    """How [INST] is spelt: as a piece, or in letters; and who puts the spaces around it."""
    piece, spaced = tokenizer.id_of(b"[INST]") >= 0, tokenizer.flags & PREFIX_EACH
    return {"each": bos, "close": "[/INST]" if piece else " [/INST]",
            "open": ("" if piece or spaced else " ") + "[INST]" + ("" if piece and spaced else " ")}


def render_talk(program, names, texts, system=None, prompt=True):
    """What a template writes for questions and answers by turns."""
    talk = [{"role": "system", "content": system}] * (system is not None)
    talk += [{"role": "user assistant".split()[n % 2], "content": text}
             for n, text in enumerate(texts)]
    return program.render(**{"messages": talk, "add_generation_prompt": prompt, "tools": None,
                             "documents": None, **names})


def around(written, *texts):
    """What stands before, between and after these texts."""
    found = []
    for text in texts:
        demand(written.count(text) == 1, "it does not write each text once, and in order")
        before, _, written = written.partition(text)
        found.append(before)
    return (*found, written)


def takes_spaces(plain, spaced, before, after):
    """Which of the spaces typed before and after a string are not written."""
    for kind in range(4):
        if spaced == before * (not kind & 1) + plain + after * (not kind & 2):
            return kind
    raise Refused("it neither writes nor takes the spaces around what is typed")


def six_strings(tokenizer, render):
    """(strings, kinds, ids of what ends an answer, why there is no system prompt) of a template."""
    question, answer, later, system = (MARK + letter + MARK for letter in "qals")
    typed = LEFT + question + RIGHT
    opening, after_question = around(render([question]), question)
    spaced_opening, spaced_after = around(render([typed]), question)
    turn, spaced_turn = (
        around(render([question, answer, spaces + later]), question, answer, later)[2]
        for spaces in ("", LEFT))
    demand(opening + turn + after_question, "it writes nothing around what is said")
    space, end = re.match(r"(\s*)(.*)", turn, re.S).groups()
    ends = sorted((token for token, piece in tokenizer.pieces.items() if piece.text
                   and end.encode().startswith(piece.text) and tokenizer.may_be_control(token)),
                  key=lambda token: len(tokenizer.pieces[token].text))[-1:]
    after_answer = space + tokenizer.text_of(ends[0]) if ends else ""
    chat = [opening, "", "", turn[len(after_answer):], after_question, after_answer]
    takes = [takes_spaces(opening, spaced_opening, "", LEFT), 0, 0,
             takes_spaces(turn, spaced_turn, "", LEFT),
             takes_spaces(after_question, spaced_after, RIGHT, ""), 0]
    try:
        written = render([question], system)
    except Raised as why:
        return chat, takes, ends, f": {why}"
    if system not in written:
        return chat, takes, ends, " and ignores it"
    chat[1:3] = around(written, system, question)[:2]
    spaced = around(render([typed], LEFT + system + RIGHT), system, question)
    takes[1:3] = (takes_spaces(chat[1], spaced[0], "", LEFT),
                  takes_spaces(chat[2], spaced[1], RIGHT, LEFT))
    return chat, takes, ends, None


def where_they_part(tokenizer, render, chat, takes, system):
    """Where a chat of five rounds is not what the template writes; None if it is."""
    def typed(before, text, after):
        text = text.lstrip(SPACES) if takes[before] & 2 else text
        return chat[before] + (text.rstrip(SPACES) if takes[after] & 1 else text)
    talk = [text for pair in zip(QUESTIONS, [MARK + answer for answer in ANSWERS] + [""])
            for text in pair][:-1]
    found = b""
    for at in range(0, len(talk), 2):
        before, text = (BEFORE_QUESTION if at else OPENING), chat[AFTER_ANSWER] if at else ""
        if system and not at:
            before, text = AFTER_SYSTEM, typed(BEFORE_SYSTEM, system, AFTER_SYSTEM)
        text += typed(before, talk[at], AFTER_QUESTION) + chat[AFTER_QUESTION]
        found += sections(tokenizer, text, CONTINUED if at else AT_START)
        found += sections(tokenizer, "".join(talk[at + 1:at + 2]), CONTINUED)
    # The space before an answer is the model's to write.
    wanted, found = (re.sub(rb"\s+(?=%s)" % MARK.encode(), b"", text) for text in (
        sections(tokenizer, render(talk, system), AT_START), found))
    if wanted == found:
        return None
    same = os.path.commonprefix([wanted, found])
    wanted, found = (text[len(same):].replace(b"\0", b"").replace(MARK.encode(), b"")[:40].decode(
        "utf-8", "replace") for text in (wanted, found))
    return (f"in round {1 + same.count(MARK.encode())} of five it writes {wanted!r} where drugs.c "
            f"would read {found!r}")


AT_START, AFTER_PIECE, CONTINUED = range(3)


def sections(tokenizer, text, start):
    """A text as drugs.c sees it before anything is merged, which is then the same for the same.

    Pieces that are found whole have a zero on each side; what is between them has the spaces that
    the flags put.
    """
    flags = tokenizer.flags
    whole_texts = {tokenizer.pieces[token].text for token in found_whole(tokenizer)}
    pattern = b"|".join(map(re.escape, sorted(whole_texts, key=len, reverse=True))) or rb"(?!)"
    parts = re.split(b"(" + pattern + b")", text.encode())
    for place in range(0, len(parts), 2):
        part = parts[place].replace(b"\n", b"\n ") if flags & NEWLINE_SPACE else parts[place]
        if flags & COLLAPSE_SPACES:
            part = re.sub(b" +", b" ", part).strip(b" ")
        wanted = start == AT_START or start == AFTER_PIECE and flags & PREFIX_EACH
        spaced = flags & PREFIX_UNLESS_SPACE and part.startswith((b" ", SPACE.encode()))
        if part and flags & PREFIX_SPACE and wanted and not spaced:
            part = b" " + part
        parts[place], start = part, AFTER_PIECE
    return b"\0".join(parts)


# The template of a folder that export.py wrote: any six strings.
OWN_TEMPLATE = """\
{%- for message in messages %}
  {%- if message.role == 'system' %}
    {{- #system }}
  {%- elif message.role == 'user' and loop.first %}
    {{- #0 + #first + #4 }}
  {%- elif message.role == 'user' and loop.index0 == 1 and messages[0].role == 'system' %}
    {{- #second + #4 }}
  {%- elif message.role == 'user' %}
    {{- #3 + #later + #4 }}
  {%- else %}
    {{- message.content + #5 }}
  {%- endif %}
{%- endfor %}
"""


def own_template(chat, takes):
    def typed(before, after):
        left, right = ".lstrip()" * (takes[before] >> 1), ".rstrip()" * (takes[after] & 1)
        return "message.content" + left + right
    spelt = {str(place): "'" + string.encode("unicode_escape").decode().replace("'", "\\x27") + "'"
             for place, string in enumerate(chat)}
    spelt.update(first=typed(OPENING, AFTER_QUESTION), second=typed(AFTER_SYSTEM, AFTER_QUESTION),
                 later=typed(BEFORE_QUESTION, AFTER_QUESTION))
    spelt["system"] = f"{spelt['1']} + {typed(BEFORE_SYSTEM, AFTER_SYSTEM)} + {spelt['2']}" \
        if chat[1] + chat[2] else "raise_exception('a system prompt has no place')"
    return re.sub(r"#(\w+)", lambda place: spelt[place[1]], OWN_TEMPLATE)


# ------------------------------------------------------------------------------------------------
# 10. Reader: a Hugging Face folder

READ_ELSEWHERE = ("architectures model_type hidden_act attention_bias mlp_bias rope_parameters "
                  "partial_rotary_factor bos_token_id eos_token_id").split()
# Settings of training, of other programs and of how a model is run.
HARMLESS = re.compile(
    r"_name_or_path|_commit_hash|_attn.*|.*(dropout|_pdrop|dtype|_version|token_id|_fixed|"
    r"_implementation)|id2label|label2id|initializer_range|pretraining_tp|use_cache|auto_map|"
    r"tokenizer_class|gradient_checkpointing|multiple_of|ffn_dim_multiplier|max_batch_size|"
    r"return_dict|output_.*|transformers.*")
# What config.json calls the two, as the class of a model and as its type.
ARCHITECTURES = {"LlamaForCausalLM": "llama", "LLaMAForCausalLM": "llama", "llama": "llama",
                 "MistralForCausalLM": "mistral", "mistral": "mistral"}


def read_hf(folder):
    path = os.path.join(folder, "config.json")
    with reading_json(path) as settings:
        config = hf_config(settings)
    read = {field.hf for field in FIELDS.values()}.union(READ_ELSEWHERE)
    # A window that a Llama has is read by nobody.
    warn_of_unread(path, settings, read - {"" if config.sliding_window else "sliding_window"})
    found = without_prefix(hf_tensors(folder))
    tie(folder, config, found, "hf")
    tensors = reorder(gather(config, found, "hf"), config.head_dim, 2)
    return config, tensors, settings


def warn_of_unread(path, settings, read):
    """What nobody reads is no secret; a setting of nothing, 0 or false asks for nothing."""
    unread = [name for name, value in settings.items()
              if value and name not in read and not HARMLESS.fullmatch(name)]
    if unread:
        warn(path, f"nothing here reads {some(unread, 8)}; if that changes what the model "
             "computes, the file is another model")


def tie(path, config, found, family):
    """One matrix under two names: the file may hold it under either, or both."""
    embedding, classifier = (name_of(kind, 0, family) for kind in ("tok_emb", "wcls"))
    if not config.shared_classifier or classifier not in found:
        return
    if same_numbers(found.setdefault(embedding, found[classifier]), found[classifier]):
        del found[classifier]
        return
    config.shared_classifier = 0
    warn(path, f"says that its two matrices of the vocabulary are one, but {classifier} is not "
         f"{embedding}; it was taken")


def same_numbers(a, b):
    if a == b or a.problem or b.problem or (a.shape, a.dtype) != (b.shape, b.dtype):
        return a == b
    return all(map(operator.eq, chunks(a), chunks(b)))


def hf_config(s):
    # Hugging Face chooses by the type, and without one by the class.
    names = [name for name in (*(s.get("architectures") or [])[:1], s.get("model_type")) if name]
    demand(names and ARCHITECTURES.keys() >= set(names), f"the architecture is {some(names)}; only "
           "those of Llama and Mistral can be exported")
    family = ARCHITECTURES[names[-1]]
    refuse_settings(s, "attention_bias", "mlp_bias", "quantization_config")
    act = s.get("hidden_act", "silu")
    demand(act == "silu", f"hidden_act is {act}; only silu can be exported")
    s = {"max_position_embeddings": {"llama": 2048, "mistral": 1 << 17}[family],
         "rms_norm_eps": 1e-6, **s}
    fields = {name: s.get(field.hf) for name, field in FIELDS.items()}
    fields["shared_classifier"] = int(bool(fields["shared_classifier"]))
    # Null means no window; to say nothing at all means 4096, for Hugging Face as well.
    fields["sliding_window"] = s.get("sliding_window", 4096) if family == "mistral" else 0
    fields["rope_theta"], fields["rope_scaling"] = hf_rope(s)
    return Config(**fields)


def hf_rope(s):
    """(theta, scaling), from either of the places where they are kept."""
    theta, scaling = s.get("rope_theta"), None
    for key in "rope_scaling", "rope_parameters":       # the older name and the newer
        rope = s.get(key) or {}
        said = rope.get("rope_theta", theta)
        demand(theta in (None, said), f"rope_theta is both {theta} and {said}")
        demand({**s, **rope}.get("partial_rotary_factor", 1) == 1,
               "partial_rotary_factor is set; only a RoPE over whole heads can be exported")
        theta, scaling = said, rope or scaling
    return theta, scaling


def hf_tensors(folder):
    """{name: tensor}, from one file or, if there is an index, from all that it names."""
    for name, reader in ("model.safetensors", safetensors), ("pytorch_model.bin", torch_tensors):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return reader(path)
        if os.path.exists(path + ".index.json"):
            return sharded_tensors(folder, path + ".index.json", reader)
    shards = glob.glob(os.path.join(glob.escape(folder), "*-of-*"))
    demand(not shards, f"model.safetensors.index.json is missing, which says what is in "
           f"{some(sorted(map(os.path.basename, shards)), 1)}; fetch it, too")
    raise Refused("model.safetensors is missing, and pytorch_model.bin, too: fetch one of them")


def sharded_tensors(folder, index, reader):
    shards, found = {}, {}
    with reading_json(index) as content:
        for name, shard in sorted(content["weight_map"].items()):
            demand(os.path.basename(shard) == shard, f"shard {shard} is not in this folder")
            if shard not in shards:
                path = os.path.join(folder, shard)
                demand(os.path.exists(path), f"shard {shard} is missing; fetch it, too")
                shards[shard] = reader(path)
            demand(name in shards[shard], f"tensor {name} is missing from {shard}")
            found[name] = shards[shard][name]
    # Others that a shard has are not hidden; but where two have one, it is the index that counts.
    return {**collections.ChainMap(*shards.values()), **found}


def safetensors(path):
    """A .safetensors file: a length (u64), that many bytes of JSON, then the data."""
    with reading(path):
        file, found, end = File(path), {}, 0
        start = struct.unpack("<Q", file.read(0, 8))[0] + 8
        demand(start <= 10 ** 8, f"is damaged: its header would have {start} bytes")
        header = json.loads(file.read(8, start - 8).decode(), object_pairs_hook=without_doubles)
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
            for number in shape + [first, last]:
                demand(whole(number, 0, 2 ** 63), f"tensor {name}: {number!r} is no size or offset")
            demand(first <= last <= file.size - start,
                   f"tensor {name} lies outside the file, which is truncated; fetch it again")
            demand(first >= end, f"tensor {name} and the one before it overlap")
            demand(first == end, f"is damaged: nothing is said of the bytes before tensor {name}")
            demand(dtype not in DTYPES or math.prod(shape) * DTYPES[dtype][0] == last - first,
                   f"tensor {name}: {shape} of {dtype} does not fill its {last - first} bytes")
            found[name], end = Stored(file, start + first, dtype, tuple(shape)), last
        demand(start + end == file.size, f"is damaged: {file.size - start - end} bytes are left "
               "over after the last tensor")
    return found


def without_doubles(pairs):
    """An object of JSON in which no name may stand twice."""
    names = dict(pairs)
    demand(len(names) == len(pairs), "is damaged: a name stands twice in its header")
    return names


# ------------------------------------------------------------------------------------------------
# 11. Readers: what PyTorch wrote, and the folders of Meta and Mistral
#
# A file of PyTorch's is a zip.  NAME/data.pkl is a pickle, the tree of Python objects that was
# saved; NAME/data/0, NAME/data/1, ... are the bytes of the tensors.  A pickle is a program: it may
# name any function of any module and have it called.  Here those that rebuild tensors have
# stand-ins; in the place of all others an Inert comes, which does nothing whatever is asked of it.
# That is no harm to a training run's notes, which nobody needs; where something is needed and
# only an Inert was found, the file is refused.


OLD_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9\x20"
OLD_TORCH_ADVICE = "is in PyTorch's old format; save it with 1.6 or later"


class Inert:
    """Stands in for what the pickle of a stranger wants to have made, or run."""

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __init__(self, *_, **__):
        pass

    def nothing(self, *_, **__):
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = add = nothing


def refuse_inert(*things):
    for thing in things:
        kind = thing if isinstance(thing, type) else type(thing)
        demand(not issubclass(kind, Inert),
               f"refuses to run {kind.__module__}.{kind.__name__} found in the pickle")


class TorchFile(pickle.Unpickler):
    """load() returns what torch.save() was given, with Stored for tensors."""

    DTYPES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}
    # Plain data: not worth a word.
    NOTES = re.compile(r"(numpy|torch|argparse|collections|pathlib|datetime|types|builtins"
                       r"|__builtin__|__main__|_codecs|omegaconf|transformers)(\.|\Z)")
    DEEDS = re.compile(r"eval|exec|getattr|compile|__import__|open|load|.*wrapper|breakpoint")

    def __init__(self, path):
        self.file, self.strangers = File(path), {}
        demand(not self.file.start.startswith(OLD_TORCH), OLD_TORCH_ADVICE)
        self.zip = zipfile.ZipFile(self.file.stream)
        pickles = [name for name in self.zip.namelist() if name.endswith("/data.pkl")]
        demand(len(pickles) == 1, "is a zip, but not one that torch.save() wrote")
        self.prefix = pickles[0][:-len("data.pkl")]
        if self.prefix + "byteorder" in self.zip.namelist():
            demand(self.file.read(*self.record("byteorder")) == b"little",
                   "was saved on a machine of another byte order; save it on a common one")
        program = self.file.read(*self.record("data.pkl"))
        # Unpickling reserves memory for whatever count or place in its memo is named, gigabytes if
        # need be, and only then notices a lie.  Looking through the program first is safe: genops
        # refuses counts beyond its end.  And it cannot need more places than it has bytes.
        for opcode, argument, _ in pickletools.genops(program):
            demand("PUT" not in opcode.name or argument < len(program), "is damaged: the pickle "
                   f"keeps something in place {argument}, which is further than it needs")
        super().__init__(io.BytesIO(program))

    def record(self, name):
        """Where a record of the zip lies in the file, and its length."""
        entry = self.zip.getinfo(self.prefix + name)
        demand(entry.compress_type == zipfile.ZIP_STORED,
               f"record {name} is compressed, which torch.save() never does")
        # The data follows a local header of 30 bytes, the name and an extra field.
        local = self.file.read(entry.header_offset, 30)
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
        demand(start + entry.file_size <= self.file.size,
               f"record {name} is truncated; fetch the file again")
        return start, entry.file_size

    def find_class(self, module, name):
        if module == "torch" and re.match(r"[A-Z][A-Za-z0-9]*Storage\Z", name):
            # A mere string.  An optimizer's state may be of any type: it is not needed.
            return self.DTYPES.get(name, name)
        known = {("collections", "OrderedDict"): collections.OrderedDict,
                 ("torch._utils", "_rebuild_tensor_v2"): self.rebuild_tensor,
                 ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor}
        if (module, name) in known:
            return known[module, name]
        if not self.NOTES.match(module) or self.DEEDS.match(name):
            self.strangers[f"{module}.{name}"] = True
        return type(name, (Inert,), {"__module__": module})

    def persistent_load(self, reference):
        """The pickle's name for the bytes of a tensor."""
        what, dtype, key = reference[:3]
        demand(what == "storage", f"is damaged: unknown reference {what!r}")
        return (dtype, *self.record(f"data/{key}"))

    def rebuild_tensor(self, storage, offset, shape, stride, *_):
        """Stands in for the function of the same purpose in PyTorch."""
        dtype, start, length = storage
        demand(all(whole(n, 0, 2 ** 63) for n in (offset, *shape, *stride)),
               f"is damaged: a tensor of shape {shape}, stride {stride}, offset {offset}")
        size, problem = DTYPES.get(dtype, (0, None))[0], None
        contiguous = [math.prod(shape[axis + 1:]) for axis in range(len(shape))]
        # The stride along an axis of length 1 is never used and may be anything.
        if any(n != 1 and a != b for n, a, b in zip(shape, stride, contiguous)):
            problem = "is not contiguous: save it as .contiguous() first"
        elif (offset + math.prod(shape)) * size > length:
            problem = "is longer than its record in the file, which must be damaged"
        return Stored(self.file, start + offset * size, dtype, tuple(shape), problem)


def read_torch(path):
    with reading(path):
        file = TorchFile(path)
        content = file.load()
        refuse_inert(content)
        if file.strangers:
            warn(path, f"asks to run {some(file.strangers)}; nothing was run")
        return content


def torch_tensors(path):
    """A file that holds nothing but tensors, by their names."""
    content = read_torch(path)
    with reading(path):
        demand(isinstance(content, dict), "holds no dictionary of tensors")
        refuse_inert(*content.values())
        demand(all(isinstance(tensor, Stored) for tensor in content.values()),
               "is damaged: it holds something else than tensors")
    return dict(content)


def read_meta(folder):
    with reading_json(os.path.join(folder, "params.json")) as params:
        pass
    single = os.path.join(folder, "consolidated.safetensors")
    if os.path.exists(single):
        with reading(single):
            config, tensors = meta_model(folder, {"max_seq_len": 32768, **params},
                                         without_prefix(safetensors(single)))
        return config, tensors, {}
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "consolidated.*.pth")))
    demand(paths, "has params.json, but neither consolidated.00.pth nor consolidated.safetensors")
    shards = [without_prefix(torch_tensors(path)) for path in paths]
    found = {}
    for name in sorted(set().union(*shards)):
        parts = [shard[name] for shard in shards if name in shard]
        demand(len(parts) == len(shards) or name.endswith(IGNORED),
               f"tensor {name} is missing from some of the consolidated.*.pth")
        found[name] = join_shards(name, parts)
    return (*meta_model(folder, params, found), {})


def join_shards(name, parts):
    """Large models were saved as several files, one from each GPU, each with its slice.

    A GPU holds some of the heads and some of the hidden units.  These are the rows of the
    matrices that make them, and the columns of those that use them.  Norms are held by all.
    """
    if len(parts) == 1 or len(parts[0].shape) < 2:
        return parts[0]
    rows, columns = parts[0].shape
    problem = next((part.problem for part in parts if part.problem), None)
    if any((part.shape, part.dtype) != (parts[0].shape, parts[0].dtype) for part in parts):
        problem = "is cut into parts of different shapes or types"
    if name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight")):
        shape, origin = (rows, columns * len(parts)), lambda row: [(part, row) for part in parts]
    else:
        shape, origin = (rows * len(parts), columns), lambda row: [(parts[row // rows], row % rows)]
    return View(shape, origin, parts[0].dtype, problem)


def read_checkpoint(path):
    """llama2.c's training checkpoint: Meta's names, in a dict among other things."""
    content = read_torch(path)
    demand(isinstance(content, dict) and {"model", "model_args"} <= set(content),
           "is not a llama2.c checkpoint: it lacks model or model_args")
    model, params = content["model"], content["model_args"]
    refuse_inert(model, params)
    refuse_inert(*model.values())
    return (*meta_model(path, params, without_prefix(model)), {})


def meta_model(path, params, found):
    """Of some settings Meta says nothing; tensors and other settings give them away."""
    demand(not params.get("use_scaled_rope"), "use_scaled_rope is set, but not said by how much; "
           "export the Hugging Face folder of the same model")
    refuse_settings(params, "moe", "quantization_args", "quantization")
    warn_of_unread(path, params, {field.meta for field in FIELDS.values()} | {"model_type"})
    embedding, classifier, w1 = (name_of(kind, 0, "meta") for kind in ("tok_emb", "wcls", "w1"))
    for name in embedding, w1:
        demand(name in found, f"tensor {name} is missing")
    params = {"norm_eps": 1e-5, "vocab_size": -1, **params}
    fields = {name: params.get(field.meta) for name, field in FIELDS.items()}
    fields["hidden_dim"] = found[w1].shape[0]
    if fields["vocab_size"] == -1:
        fields["vocab_size"] = found[embedding].shape[0]
    if not fields["seq_len"]:           # Code Llama and Llama 3; else Llama 2 and Llama 1
        fields["seq_len"] = {1e6: 16384, 5e5: 8192}.get(
            fields["rope_theta"], 4096 if fields["norm_eps"] == 1e-5 else 2048)
    # Tied weights are saved once and referred to twice.
    fields["shared_classifier"] = int(
        bool(fields["shared_classifier"]) or found[embedding] == found.get(classifier))
    config = Config(**fields)
    tie(path, config, found, "meta")
    return config, gather(config, found, "meta")

# ------------------------------------------------------------------------------------------------
# 12. Reader: llama2.c's export, version 0
#
# Seven int32, then fp32 tensors without names: one kind after the other, each for all layers.

V0_ORDER = "tok_emb att_norm wq wk wv wo ffn_norm w1 w2 w3 final_norm RoPE wcls".split()


def read_v0(path):
    file = File(path)
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len = struct.unpack(
        "<7i", file.read(0, 28))
    # The sign of vocab_size is a flag: negative if the classifier has a matrix of its own.
    config = Config(dim, hidden_dim, n_layers, n_heads, n_kv_heads, None, abs(vocab_size), seq_len,
                    shared_classifier=int(vocab_size > 0))
    # RoPE is a table of cosines and sines; the flat file has frequencies.
    keys = ((kind, layer) for kind in (V0_ORDER[:-1] if config.shared_classifier else V0_ORDER)
            for layer in range(n_layers if kind in LAYER_KINDS else 1))
    tensors = place(file, 28, (
        (key, (seq_len, config.head_dim) if key[0] == "RoPE" else config.shape(key[0]), "F32")
        for key in keys))
    return config, tensors, {}


# ------------------------------------------------------------------------------------------------
# 13. Which reader

MAGIC, VERSION = b"drugs.c\0", 3
STRANGERS = {
    MAGIC: "is a flat file already; --to hf DIR turns it back into a Hugging Face folder",
    b"GGUF": "is a GGUF file; export the checkpoint that it was made from",
    b"24ka": "is a llama2.c export of version 1 or 2; export it with version 0, or its checkpoint",
    OLD_TORCH: OLD_TORCH_ADVICE,
}
# Files that people name instead of the folder that they are in.
INNER = re.compile(r".*\.(safetensors|json|model|model\.v\d+)\Z"
                   r"|(pytorch_model|consolidated|tokenizer)\b.*\Z")


def reader_of(path):
    if os.path.isdir(path):
        demand(not os.path.exists(os.path.join(path, "adapter_config.json")), "holds an adapter "
               "(LoRA), which is no model: merge it into its base model, and export that")
        inner = sorted(glob.glob(os.path.join(glob.escape(path), "snapshots", "*")))
        demand(not inner, "is a folder of the hub's cache; name the one in it that is the model: "
               + some(inner, 1))
        for name, reader in ("config.json", read_hf), ("params.json", read_meta):
            if os.path.exists(os.path.join(path, name)):
                return reader
        raise Refused("holds neither config.json (Hugging Face) nor params.json (Meta)")
    start = File(path).start
    for magic, why in STRANGERS.items():
        demand(not start.startswith(magic), why)
    demand(not INNER.match(os.path.basename(path)),
           "is a part of a checkpoint; name the folder that it is in")
    is_torch = start.startswith(b"PK") or path.endswith((".pt", ".pth"))
    return read_checkpoint if is_torch else read_v0


def read_model(path, named_tokenizer, form):
    config, tensors, says = reader_of(path)(path)
    is_folder = os.path.isdir(path)
    folder = path if is_folder else os.path.dirname(path)
    tokenizer = find_tokenizer(folder, named_tokenizer, config.vocab_size)
    # What lies beside a single file may belong to anything.
    beside = read_beside(folder) if is_folder else dict.fromkeys(BESIDE, {})
    settle(path, config, tokenizer, says, beside, form)
    with reading(path):
        settle_tables(tokenizer, config.vocab_size)
    return config, tensors, tokenizer


# ------------------------------------------------------------------------------------------------
# 14. The writer of the flat file

# magic, version, ten sizes, norm_eps, storage, bos, unknown, text_flags, nine sizes of tables
HEADER, HEADER_BYTES, ALIGNMENT = "<8s11if13i", 256, 64
STORAGES = "F32", "BF16", "F16"
CHUNK_BYTES = 1 << 18               # at a time: what stays in the caches is fastest


def dtype_of(kind, storage):
    """Of a tensor in a file that stores its matrices so."""
    return "F32" if kind.endswith("norm") else storage


def size_in(c, kind, storage):
    return DTYPES[dtype_of(kind, storage)][0] * math.prod(c.shape(kind))


def storage_of(tensors):
    """The dtype that all matrices have, F32 if they differ."""
    found = {tensor.dtype for (kind, _), tensor in tensors.items() if not kind.endswith("norm")}
    return found.pop() if len(found) == 1 else "F32"


def write_flat(config, tensors, tokenizer, output):
    begin = front(config, tokenizer, storage_of(tensors))
    with replacing(output) as temporary, open(temporary, "xb") as stream:
        stream.write(begin)
        return write_tensors(stream, config, tensors, ALIGNMENT)


def front(c, tokenizer, storage):
    """All that comes before the tensors."""
    ranges, n_classes, rows = tokenizer.automata
    # An embedding is often padded to a round number of rows; the rest gets empty pieces.
    pieces = [tokenizer.pieces.get(token, EMPTY) for token in range(c.vocab_size)]
    texts = [piece.text for piece in pieces]
    texts += [text.encode() for text in (*tokenizer.chat, *tokenizer.patterns)]
    kinds = [piece.kind for piece in pieces]
    kinds += [*tokenizer.takes] + [NORMAL] * len(tokenizer.patterns)
    units = [(unit, unit, token) for unit, token in sorted(tokenizer.units.items())]
    unknown, = tokenizer.of_kind(UNKNOWN) or [-1]
    whole_pieces, n_text = found_whole(tokenizer), sum(map(len, texts))
    demand(n_text <= 1 << 30, "its pieces are longer than 2^30 bytes in all")
    tables = ranges, rows, units, tokenizer.pairs, whole_pieces, tokenizer.words
    header = struct.pack(
        HEADER, MAGIC, VERSION, *(getattr(c, name) for name in SIZES), c.norm_eps,
        STORAGES.index(storage), tokenizer.begins, unknown, tokenizer.flags,
        len(tokenizer.patterns), len(rows), n_classes, len(ranges), *map(len, tables[2:]), n_text)
    rope = struct.pack(f"<{len(c.frequencies)}d", *c.frequencies)
    strings = zip(itertools.accumulate(map(len, texts)), kinds)
    return b"".join((header.ljust(HEADER_BYTES, b"\0"), rope, *map(numbers, tables[:4]),
                     numbers(strings), numbers(tables[4:]), *texts))


def numbers(records):
    """Records of u32, one after the other."""
    flat = list(itertools.chain.from_iterable(records))
    return struct.pack(f"<{len(flat)}I", *flat)


def chunks(tensor):
    """The rows of a tensor, as many at a time as are little."""
    width = DTYPES[tensor.dtype][0] * math.prod(tensor.shape[1:])
    step = max(1, CHUNK_BYTES // width)
    for first in range(0, tensor.shape[0], step):
        yield tensor.rows(first, min(first + step, tensor.shape[0]))


def write_tensors(stream, c, tensors, alignment=1):
    storage, done = storage_of(tensors), 0
    total = sum(size_in(c, kind, storage) for kind, _ in c.layout())
    for kind, layer in c.layout():
        tensor = tensors[kind, layer]
        convert = bytes if tensor.dtype == dtype_of(kind, storage) else DTYPES[tensor.dtype][1]
        stream.write(bytes(-stream.tell() % alignment))
        for rows in chunks(tensor):
            done += stream.write(convert(rows))
            if sys.stderr and sys.stderr.isatty():
                print(f"\r{done / 1e6:.0f} of {total / 1e6:.0f} MB", end="\r", file=sys.stderr)
    return stream.tell()


@contextlib.contextmanager
def replacing(output, folder=False):
    """The name of a file, or a folder, that takes the place of `output` once it is complete."""
    output = os.path.realpath(output)   # a link stays one, and what it points to is replaced
    temporary = f"{output}.{os.urandom(4).hex()}"   # a name of our own: another run has another one
    try:
        if folder:
            os.mkdir(temporary)
        yield temporary
        if os.path.exists(output):      # who may read it remains as it was
            os.chmod(temporary, stat.S_IMODE(os.stat(output).st_mode))
        os.replace(temporary, output)
    except BaseException as error:      # even if someone presses ^C
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if folder else os.remove(temporary)
        if isinstance(error, OSError) and str(error.filename).startswith(temporary):
            error.filename = output     # the name that the user knows
        raise


# ------------------------------------------------------------------------------------------------
# 15. The way back: from a flat file to a Hugging Face folder


def read_flat(path):
    demand(not os.path.isdir(path), "is a folder; --to needs a flat file")
    file = File(path)
    demand(file.start.startswith(MAGIC), "is no flat file, which --to needs")
    said = struct.unpack_from(HEADER, file.read(0, HEADER_BYTES))
    demand(said[1] == VERSION, f"is a flat file of version {said[1]}; this export.py knows "
           f"version {VERSION}: export the checkpoint again")
    norm_eps, storage, begins, _, flags, n_cutters, *counts = said[12:]
    n_states, n_classes, n_ranges, n_units, n_pairs, n_whole, n_words, n_text = counts
    demand(0 <= storage < len(STORAGES), "is damaged: its matrices are stored in an unknown way")
    demand(0 <= flags <= ALL_FLAGS and 0 <= n_cutters <= MOST_CUTTERS and min(counts) >= 0
           and 0 < n_classes <= MOST_CLASSES,
           "is damaged: its header says impossible things of its tokenizer")
    config, at = Config(*said[2:12], norm_eps=norm_eps), HEADER_BYTES
    demand(-1 <= begins < config.vocab_size,
           f"bos is {begins}, but there are {config.vocab_size} tokens")

    def take(length):
        nonlocal at
        at += length
        return file.read(at - length, length)

    def records(kind, width, count):
        record = struct.Struct(f"<{width}{kind}")
        return list(record.iter_unpack(take(record.size * count)))
    config.frequencies = tuple(radians for radians, in records("d", 1, config.head_dim // 2))
    config.__post_init__()              # are they sane?
    ranges, rows = records("I", 3, n_ranges), records("I", n_classes + 1, n_states)
    units = {unit: token for unit, _, token in records("I", 3, n_units)}
    pairs = records("I", 4, n_pairs)
    ends, kinds = zip(*records("I", 2, config.vocab_size + 6 + n_cutters))
    take(4 * n_whole)                   # which follow from the pieces
    words, text = [token for token, in records("I", 1, n_words)], take(n_text)
    demand([*ends] == sorted(ends) and ends[-1] == n_text,
           "is damaged: its strings do not fill its text")
    texts = [text[first:end] for first, end in zip((0, *ends), ends)]
    pieces = dict(enumerate(map(Piece, kinds[:config.vocab_size], texts)))
    strings = [text.decode() for text in texts[config.vocab_size:]]
    # Both schools know bytes.  Where no piece is a raw one, they are all that merging begins with.
    byte_level = max(units, default=0) >= BYTE_UNIT and not any(
        piece.kind == BYTE for piece in pieces.values())
    # The automata stay as they are: another Python knows another Unicode.
    tokenizer = Tokenizer(
        pieces, flags, byte_level, tuple(strings[6:]), takes_words=bool(words), begins=begins,
        chat=tuple(strings[:6]), takes=kinds[config.vocab_size:][:6],
        automata=(ranges, n_classes, rows), units=units, pairs=pairs, words=words)
    check_tokenizer(tokenizer, config.vocab_size)
    dtype = STORAGES[storage]
    demand(front(config, tokenizer, dtype) == file.read(0, at),
           "is damaged: its header or its tokenizer is not as export.py writes them")
    layout = ((key, config.shape(key[0]), dtype_of(key[0], dtype)) for key in config.layout())
    return config, place(file, at, layout, ALIGNMENT), tokenizer


def write_hf(c, tensors, tokenizer, folder):
    header, end, storage = {"__metadata__": {"format": "pt"}}, 0, storage_of(tensors)
    for kind, layer in c.layout():
        first, end = end, end + size_in(c, kind, storage)
        header[name_of(kind, layer, "hf")] = {
            "dtype": dtype_of(kind, storage), "shape": c.shape(kind), "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)     # the data shall begin at a multiple of 8 bytes
    ends = tokenizer.of_kind(END)
    ids = {"bos_token_id": tokenizer.begins if tokenizer.begins >= 0 else None,
           "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None}
    files = {"config.json": {**hf_settings(c, storage), **ids},
             "generation_config.json": {"_from_model_config": True, **ids},
             "tokenizer.json": hf_tokenizer(tokenizer, folder),
             "tokenizer_config.json": hf_tokenizer_settings(tokenizer)}
    with replacing(folder, folder=True) as temporary:
        for name in files:
            with open(os.path.join(temporary, name), "w") as stream:
                json.dump(files[name], stream, indent=2)
        if is_sentencepiece(tokenizer):
            with open(os.path.join(temporary, "tokenizer.model"), "wb") as stream:
                stream.write(hf_sentencepiece(tokenizer))
        with open(os.path.join(temporary, "model.safetensors"), "wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            return write_tensors(stream, c, reorder(tensors, c.head_dim, c.head_dim // 2))


def hf_settings(c, storage):
    """config.json; hf_config() is the way back."""
    family = "mistral" if c.sliding_window else "llama"
    theta, scaling = explain_frequencies(c.frequencies)
    fields = dict(vars(c), shared_classifier=bool(c.shared_classifier), rope_theta=theta,
                  norm_eps=shortest(c.norm_eps), sliding_window=c.sliding_window or None,
                  rope_scaling=scaling)
    return {"architectures": [family.capitalize() + "ForCausalLM"], "model_type": family,
            "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
            "torch_dtype": {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[storage],
            **{field.hf: fields[name] for name, field in FIELDS.items()}}


def shortest(number):
    """The number with the fewest digits that is this fp32: 1e-05, not 9.999999747378752e-06."""
    texts = (f"{number:.{digits}g}" for digits in range(1, 10))
    return next(float(text) for text in texts
                if struct.pack("<f", float(text)) == struct.pack("<f", number))


def is_sentencepiece(tokenizer):
    """Whether pieces are joined as SentencePiece does; then tokenizer.model says it best."""
    if tokenizer.byte_level or tokenizer.flags & ~(PREFIX_SPACE | PREFIX_EACH | COLLAPSE_SPACES):
        return False
    first = first_of_text(tokenizer)
    units = units_of(tokenizer, first, len(tokenizer.pieces))
    return tokenizer.units == units and tokenizer.pairs == pairs_of(
        ranks_of(tokenizer), first, units)


def ranks_of(tokenizer):
    """A score for each piece: the sooner it is merged the higher."""
    scores = dict.fromkeys(tokenizer.pieces, 0.0)
    scores.update((merged, float(-rank)) for _, _, merged, rank in tokenizer.pairs)
    return scores


def hf_sentencepiece(tokenizer):
    """tokenizer.model; read_sentencepiece() is the way back."""
    numbers = {kind: number for number, kind in SP_KINDS.items() if number != UNUSED}
    numbers[END] = numbers[CONTROL]
    flags, scores, data = tokenizer.flags, ranks_of(tokenizer), bytearray()
    last = max(token for token, piece in tokenizer.pieces.items()
               if piece.kind != CONTROL and piece.kind != USER_DEFINED)
    for token in range(last + 1):
        kind, text = tokenizer.pieces[token]
        number, name = numbers[kind], b"<0x%02X>" % text[0] if kind == BYTE else text
        # User-defined pieces that Hugging Face looks for, before SentencePiece, are in
        # tokenizer.json; here, as for nameless ones, something must keep their place.
        if not text or kind == USER_DEFINED and flags & PREFIX_EACH:
            number, name = UNUSED, b"<unused %d>" % token
        name = name.replace(b" ", SPACE.encode())
        data += proto(1, proto(1, name) + proto(2, scores[token]) + proto(3, number))
    data += proto(2, proto(3, 2) + proto(41, tokenizer.begins)
                  + proto(42, (tokenizer.of_kind(END) + [-1])[0]))
    return data + proto(3, proto(1, b"identity") + proto(3, flags & PREFIX_SPACE)
                        + proto(4, int(bool(flags & COLLAPSE_SPACES))))


def proto(number, value):
    """One field of a protocol buffer."""
    if isinstance(value, float):
        return proto_varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return proto_varint(number << 3) + proto_varint(value)
    return proto_varint(number << 3 | 2) + proto_varint(len(value)) + value


def proto_varint(value):
    value, groups = value % 2 ** 64, []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes(groups + [value])


def hf_tokenizer(tokenizer, folder):
    """tokenizer.json; read_tokenizer_json() is the way back."""
    names, added, vocab, unknown = hf_names(tokenizer), [], {}, None
    n_bytes, bos = len(tokenizer.of_kind(BYTE)), names.get(tokenizer.begins)
    demand(n_bytes in (0, 256), f"has {n_bytes} byte pieces: tokenizer.json needs all 256, or none")
    demand(bos is not None or tokenizer.begins < 0, f"begins a text with piece {tokenizer.begins}, "
           "which has no name: tokenizer.json needs one")
    for token, name in names.items():
        kind = tokenizer.pieces[token].kind
        demand(name not in vocab, f"pieces {vocab.get(name)} and {token} would both be {name!r}, "
               "which tokenizer.json cannot express")
        vocab[name] = token
        unknown = name if kind == UNKNOWN else unknown
        if kind not in (NORMAL, BYTE):
            # These are looked for before the normaliser has turned spaces into anything.
            added.append(dict(id=token, content=name, single_word=False, lstrip=False, rstrip=False,
                              normalized=False, special=kind != USER_DEFINED))
    # What puts the begin before a text, and before two.
    first, second = ([{"SpecialToken": {"id": bos, "type_id": n}},
                      {"Sequence": {"id": "AB"[n], "type_id": n}}] for n in (0, 1))
    begin = step("TemplateProcessing", single=first, pair=first + second, special_tokens={
        bos: {"id": bos, "ids": [tokenizer.begins], "tokens": [bos]}})
    normalizer, pre_tokenizer, decoder = hf_steps(tokenizer, folder)
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "post_processor": begin if bos else None, "decoder": decoder,
        "model": {"type": "BPE", "dropout": None, "unk_token": unknown,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": not tokenizer.byte_level, "byte_fallback": n_bytes > 0,
                  "ignore_merges": tokenizer.takes_words, "vocab": vocab,
                  "merges": hf_merges(tokenizer, names, folder)}}


def hf_names(tokenizer):
    """{token: its name in tokenizer.json}, without those that have none."""
    spaced = uses_spaces(tokenizer)
    alphabet = {byte: character for character, byte in byte_alphabet().items()}
    names = {}
    for token, (kind, text) in tokenizer.pieces.items():
        if kind == BYTE:
            names[token] = f"<0x{text[0]:02X}>"
        elif kind == NORMAL and tokenizer.byte_level:
            names[token] = "".join(alphabet[byte] for byte in text)
        elif text:
            names[token] = text.decode()
            if kind == NORMAL and spaced:
                demand(SPACE not in names[token], f"is damaged: piece {token}, {text!r}, has a "
                       "U+2581 where a space is expected")
                names[token] = names[token].replace(" ", SPACE)
    return names


def uses_spaces(tokenizer):
    """Whether a space may be a part of a piece, for which tokenizer.json writes U+2581."""
    return not tokenizer.byte_level and (bool(tokenizer.flags & PREFIX_SPACE) or any(
        b" " in tokenizer.pieces[token].text for token in tokenizer.of_kind(NORMAL)))


def step(kind, **settings):
    return {"type": kind, **settings}


def sequence(name, inner):
    return step("Sequence", **{name: inner}) if inner else None


def hf_steps(tokenizer, folder):
    """(normalizer, pre_tokenizer, decoder); class Plan is the way back."""
    flags, before, cut, undo = tokenizer.flags, [], None, []
    prefix, each = bool(flags & PREFIX_SPACE), flags & PREFIX_EACH
    if flags & NEWLINE_SPACE:
        before.append(step("Replace", pattern={"String": "\n"}, content="\n "))
        undo.append(step("Replace", pattern={"String": "\n "}, content="\n"))
    if flags & COLLAPSE_SPACES:
        before += [step("Replace", pattern={"Regex": ENDS_REGEX}, content=""),
                   step("Replace", pattern={"Regex": " {2,}"}, content=" ")]
    if tokenizer.byte_level:
        gpt2 = tokenizer.patterns == (GPT2_REGEX,)
        level = step("ByteLevel", add_prefix_space=prefix, trim_offsets=True, use_regex=gpt2)
        cut = sequence("pretokenizers", [
            step("Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)
            for pattern in tokenizer.patterns if not gpt2] + [level])
        undo.insert(0, dict(level, add_prefix_space=False, use_regex=True))
        return sequence("normalizers", before), cut, sequence("decoders", undo)
    fuse = [step("ByteFallback"), step("Fuse")]
    if not uses_spaces(tokenizer):
        return sequence("normalizers", before), None, sequence("decoders", fuse + undo)
    if prefix and (flags & PREFIX_UNLESS_SPACE or not each):
        if not flags & PREFIX_UNLESS_SPACE:
            warn(folder, "other tools will put no space before a text that begins with one; "
                 "drugs.c does")
        cut = step("Metaspace", replacement=SPACE, prepend_scheme="always" if each else "first",
                   split=False)
    else:
        before += [step("Prepend", prepend=SPACE)] if prefix else []
        before.append(step("Replace", pattern={"String": " "}, content=SPACE))
    undo = [step("Replace", pattern={"String": SPACE}, content=" "), *fuse, *undo]
    if prefix:
        undo.append(step("Strip", content=" ", start=1, stop=0))
    return sequence("normalizers", before), cut, sequence("decoders", undo)


def hf_merges(tokenizer, names, folder):
    """The pairs that may be joined, the best first."""
    pieces, pairs = tokenizer.pieces, sorted(tokenizer.pairs, key=lambda pair: pair[3])
    named = [pair for pair in pairs if pair[0] in pieces and pair[1] in pieces]
    merged = dict((rank, merged) for _, _, merged, rank in pairs)
    if len(named) < len(pairs) or any(merged[rank] != piece for _, _, piece, rank in pairs):
        # SentencePiece also joins characters that are no pieces, and of equals the leftmost first.
        warn(folder, "some pieces have equal scores, or characters that are no pieces; "
             "other tools may cut text that has them in another way")
    return [f"{names[left]} {names[right]}" for left, right, _, _ in named]


def hf_tokenizer_settings(tokenizer):
    """tokenizer_config.json, without which Hugging Face would add tokens that it thinks usual."""
    bos, eos, unknown = (tokenizer.text_of(tokens[0]) for tokens in (
        [tokenizer.begins], *(tokenizer.of_kind(kind) + [-1] for kind in (END, UNKNOWN))))
    return {"tokenizer_class": "LlamaTokenizer" if is_sentencepiece(tokenizer)
            else "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "add_bos_token": tokenizer.begins >= 0, "add_eos_token": False,
            "legacy": bool(tokenizer.flags & PREFIX_EACH),
            "bos_token": bos, "eos_token": eos, "unk_token": unknown,
            # Null says that there is no form, where silence would mean an old one.
            "chat_template": own_template(tokenizer.chat, tokenizer.takes)
            if any(tokenizer.chat) else None}

# ------------------------------------------------------------------------------------------------
# 16. The command line


def main():
    parser = argparse.ArgumentParser(prog="export.py", description="Turn a Llama or Mistral "
                                     "checkpoint into one flat file, or a flat file back into one.")
    parser.add_argument("input", help="Hugging Face, Meta or Mistral folder, llama2.c .pt or v0 "
                        ".bin; for --to a flat file")
    outputs = parser.add_mutually_exclusive_group()
    outputs.add_argument("-o", "--output", default="model.bin", help="default: model.bin")
    outputs.add_argument("--to", nargs=2, metavar=("hf", "DIR"),
                         help="write a Hugging Face folder; DIR is new or empty")
    parser.add_argument("--tokenizer", help="default: the one beside the weights")
    parser.add_argument("--chat", choices=FORMS, metavar="FORM", help="how a chat is written, "
                        f"where no template says it: {', '.join(FORMS)}")
    arguments = parser.parse_args()
    path, output = arguments.input, arguments.to[1] if arguments.to else arguments.output
    if arguments.to and (arguments.to[0] != "hf" or arguments.tokenizer or arguments.chat):
        parser.error("--to knows only hf, and neither --tokenizer nor --chat has a place beside it")
    for stream in sys.stdout, sys.stderr:
        if stream and hasattr(stream, "reconfigure"):
            # A name of a file may have characters that the terminal cannot show.
            stream.reconfigure(errors="backslashreplace")
    for name in "SIGTERM", "SIGHUP", "SIGQUIT":     # like ^C, so that what was begun is removed
        number = getattr(signal, name, None)            # Windows lacks two
        if number and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        with reading(output):
            check_output(output, path, folder=bool(arguments.to))
        with reading(path):
            model = read_flat(path) if arguments.to else read_model(path, arguments.tokenizer,
                                                                           arguments.chat)
            size = (write_hf if arguments.to else write_flat)(*model, output)
    except Refused as error:
        stop(f"{error.path}: {error}")
    except OSError as error:
        stop(f"{error.filename or output}: {error.strerror}{ADVICE.get(type(error), '')}")
    except MemoryError:
        stop("out of memory; nothing was written")
    except KeyboardInterrupt:
        stop("interrupted; nothing was written")
    c = model[0]
    report(output, f"{output}: {c.n_layers} layers, dim {c.dim}, {c.n_heads} heads ({c.n_kv_heads} "
           f"for keys), {c.vocab_size} pieces, {size / 1e6:.1f} MB")


ADVICE = {PermissionError: "; ask for the right to it, or copy it to where you have it",
          FileNotFoundError: "; is the path right?",
          IsADirectoryError: "; a file was expected",
          NotADirectoryError: "; is the path right?"}


def check_output(output, path, folder):
    exists = os.path.lexists(output)
    if folder:
        demand(not exists or os.path.isdir(output) and not os.listdir(output),
               "exists; name a new or empty folder after --to")
        return
    demand(not os.path.isdir(output), "is a folder; name a file after -o")
    demand(os.path.realpath(output) != os.path.realpath(path),
           "is the input; name another file after -o")
    # A device or a pipe would be replaced by a file.
    demand(not os.path.exists(output) or stat.S_ISREG(os.stat(output).st_mode),
           "is a device or a pipe; name a file after -o")


def stop(why):
    sys.exit(visible(f"export.py: {why}"))


def report(output, line):
    """The last line.  If it cannot be shown, that is no fault of the model."""
    try:
        print(visible(line))
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        # Python would try once more at its end, and complain in its own words.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        stop(f"standard output: {error.strerror}; but {output} was written whole")
    except KeyboardInterrupt:
        stop(f"interrupted; but {output} was written whole")


if __name__ == "__main__":
    main()
