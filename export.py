#!/usr/bin/env python3
"""export.py: turn a Llama or Mistral checkpoint into one flat file for drugs.c.

    python3 export.py INPUT [-o model.bin] [--tokenizer FILE]
    python3 export.py model.bin --to hf DIR

The second form goes back: it turns a flat file into a new Hugging Face folder, for other tools.
In the first, INPUT is one of these; which one is found by looking:

    a Hugging Face folder       config.json + model.safetensors, whole or in shards
    a Meta folder               params.json + consolidated.00.pth, consolidated.01.pth, ...
    a llama2.c checkpoint       ckpt.pt
    a llama2.c export, v0       stories15M.bin

The tokenizer is looked for beside the weights (tokenizer.model, then tokenizer.json, then
tokenizer.bin) unless --tokenizer names one.  Weights may be fp32, fp16 or bf16; the flat file is
always fp32, so that the C program can use it where it lies, in the mapped file.

The flat file, all little-endian:

    byte 0     char[8] magic "drugs.c\\0"
         8     u32 version = 1
        12     u32 dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, seq_len
        44     u32 shared_classifier: 1 = the embedding is also the classifier
        48     u32 sliding_window: how many positions attention looks back, 0 = all of them
        52     f32 rope_theta, norm_eps
        60     i32 bos_id, eos_id: -1 = none
        68     u32 tokenizer_flags: bit 0 = a space goes before the text, bit 1 = all 256 bytes
               have a piece
        72     u64 tokenizer_bytes: the length of the tokenizer
        80     zeros
       256     the tokenizer: vocab_size times {f32 score, u8 kind, u8 zero, u16 length, bytes};
               a space is a space.  kind 0 normal, 1 control (never made from text, prints
               nothing), 2 unknown, 3 one raw byte, 4 user-defined (found whole, before merging)
       ...     the tensors, fp32, each from a multiple of 64 bytes on, in the order of use:

    tok_emb   (vocab_size, dim)
    then for every layer
      att_norm  (dim)
      wq        (n_heads * head_dim, dim)       wk, wv  (n_kv_heads * head_dim, dim)
      wo        (dim, n_heads * head_dim)
      ffn_norm  (dim)
      w1, w3    (hidden_dim, dim): gate, up     w2      (dim, hidden_dim): down
    final_norm  (dim)
    wcls        (vocab_size, dim), only if the classifier is not shared

A matrix is stored row after row, (out, in).  Rows of wq and wk are in *interleaved* order: RoPE
turns rows 2i and 2i+1 of a head together.

The promise: what the output cannot express exactly is refused, by name, before anything is
written; of what only rare text will ever meet, a warning speaks.  The output appears whole or not
at all.  Memory stays small however large the model is.
Nothing in a checkpoint is ever executed.
"""

import argparse
import collections
import contextlib
import glob
import io
import json
import math
import os
import pickle
import pickletools
import re
import shutil
import struct
import sys
import zipfile
from dataclasses import astuple, dataclass

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
    except OSError:
        raise                           # main() explains it
    except Exception as error:
        found = " ".join(str(error).split())[:200]
        raise Refused(f"is damaged or of an unknown kind ({type(error).__name__}: {found})", path)


@contextlib.contextmanager
def reading_json(path):
    with reading(path):
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
        demand(isinstance(content, dict), "is damaged: a JSON object was expected")
        yield content


def warn(path, what):
    print(f"export.py: {path}: warning: {what}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------
# 2. What a model is
#
# A Config, a mapping from (kind, layer) to tensors that can be read row by row, and a Tokenizer.
# Four readers find the first two, for one writer; a reader and a writer more lead back.

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


def name_of(kind, layer, family):
    return getattr(KINDS[kind], family).replace("#", str(layer)) + ".weight"


@dataclass
class Config:
    """The numbers of the header, in its order; None is what the checkpoint does not say."""
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    seq_len: int
    shared_classifier: bool
    sliding_window: int = None
    rope_theta: float = None
    norm_eps: float = 1e-5
    bos_id: int = None              # None: the tokenizer will know
    eos_id: int = None

    def __post_init__(self):
        """Fills the gaps.  Nothing is computed from a stranger's number before it is sane."""
        self.n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        self.rope_theta = 10000.0 if self.rope_theta is None else self.rope_theta
        self.sliding_window = self.sliding_window or 0
        self.check_whole(0, "sliding_window")
        self.check_whole(1, "dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size",
                         "seq_len")
        if self.head_dim is None:
            demand(self.dim % self.n_heads == 0, f"{self.n_heads} heads do not cut dim {self.dim}")
            self.head_dim = self.dim // self.n_heads
        self.check_whole(1, "head_dim")
        demand(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}: it must be even, for RoPE")
        demand(self.n_heads % self.n_kv_heads == 0,
               f"{self.n_heads} query heads cannot share {self.n_kv_heads} key heads evenly")
        for name in "rope_theta", "norm_eps":
            value = getattr(self, name)
            # The bounds are those of a normal fp32, which is what the header has room for.
            demand(type(value) in (int, float) and 1.2e-38 < value < 3.4e38,
                   f"{name} is {value!r}: it must be a positive number")

    def check_whole(self, least, *names):
        for name in names:
            demand(whole(getattr(self, name), least, 2 ** 31), f"{name} is "
                   f"{getattr(self, name)!r}: it must be a whole number from {least} to 2^31 - 1")

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
# 3. Tensors: a name for some bytes of a file, until somebody asks for rows
#
# A tensor has a shape, rows(first, last) that reads those rows as fp32, and a problem: None, or
# why it cannot be used.  The problem is told only when the tensor turns out to be needed, because
# only then is its name known, and because the unused ones may have as many problems as they like.


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
        size, to_fp32 = DTYPES[self.dtype]
        width = math.prod(self.shape[1:]) * size
        return to_fp32(self.file.read(self.offset + first * width, (last - first) * width))


@dataclass
class View:
    """A matrix made of rows of others: origin(row) lists the (tensor, row) that make one."""
    shape: tuple
    origin: object
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
        return View(tensor.shape, origin)
    return {key: view(tensor) if key[0] in ("wq", "wk") else tensor
            for key, tensor in tensors.items()}


def place(file, at, layout, alignment=1):
    """Nameless fp32 tensors that fill a file from `at` to its end; layout is (key, shape)s."""
    tensors = {}
    for key, shape in layout:
        at += -at % alignment
        tensors[key] = Stored(file, at, "F32", shape)
        at += 4 * math.prod(shape)
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
# 4. Tokenizers
#
# The C program knows one algorithm, that of SentencePiece's BPE: start from single characters,
# and as long as two neighbours together are a piece, join the two whose piece scores best.

SPACE = "\u2581"                    # how SentencePiece writes one
NORMAL, CONTROL, UNKNOWN, BYTE, USER_DEFINED = range(5)
# The pieces are a dict: token id -> (score, kind, UTF-8 text).
Tokenizer = collections.namedtuple("Tokenizer", "pieces dummy_prefix bos_id eos_id")


def find_tokenizer(folder, named, rows):
    """`rows` is how many ids the embedding knows.

    If the folder has tokenizer.model *and* tokenizer.json, both are right and neither is all.
    tokenizer.model is what the model was trained with: it has true scores and settings, of which
    tokenizer.json is a translation.  But tokens added later, as for chats, are only found in the
    latter (or, in older folders, in added_tokens.json).  So take the pieces from the one and the
    added tokens from the other.
    """
    if named:
        return read_tokenizer(named, rows)
    paths = [os.path.join(folder, "tokenizer." + kind) for kind in ("model", "json", "bin")]
    present = [path for path in paths if os.path.exists(path)]
    demand(present, "comes without tokenizer.model, .json or .bin; name one with --tokenizer FILE")
    added, older = [], os.path.join(folder, "added_tokens.json")
    if present[:2] == paths[:2]:
        with reading_json(paths[1]) as content:
            added = content.get("added_tokens", [])
    elif present[0] == paths[0] and os.path.exists(older):
        with reading_json(older) as content:
            added = [{"content": text, "id": token} for text, token in content.items()]
    return read_tokenizer(present[0], rows, added)


def read_tokenizer(path, rows, added=()):
    readers = {".json": read_tokenizer_json, ".bin": read_tokenizer_bin}
    with reading(path):
        tokenizer = readers.get(os.path.splitext(path)[1], read_sentencepiece)(path)
        add_tokens(tokenizer.pieces, added)
        check_pieces(tokenizer.pieces, rows)
    return tokenizer


def check_pieces(pieces, rows):
    for token, (score, kind, text) in pieces.items():
        demand(whole(token, 0, rows), f"piece {text!r} has id {token!r}, but the model knows "
               f"only {rows}: the tokenizer belongs to another model")
        demand(math.isfinite(score), f"is damaged: piece {token} has the score {score}")
        demand(len(text) < 2 ** 16, f"piece {token} is {len(text)} bytes long, more than 65535")
        demand(kind <= USER_DEFINED and (kind != BYTE or len(text) == 1),
               f"is damaged: piece {token}, {text!r}, is of kind {kind}")
    unknown = [token for token, piece in pieces.items() if piece[1] == UNKNOWN]
    demand(len(unknown) < 2, f"pieces {unknown} are all unknown pieces: there can be only one")


def byte_piece(name):
    """b"A" for "<0x41>", None for any other name."""
    match = re.match(r"<0x([0-9A-F]{2})>\Z", name)
    return match and bytes([int(match.group(1), 16)])


def add_tokens(pieces, added):
    """Tokens added after training: special ones are control, the others are found in the text."""
    for entry in added:
        if pieces.get(entry["id"], (0, NORMAL, b""))[1] != UNKNOWN:
            kind = CONTROL if entry.get("special") else USER_DEFINED
            pieces[entry["id"]] = 0, kind, entry["content"].encode()


# SentencePiece's tokenizer.model is a protocol buffer: a sequence of fields, each a number that
# holds (field << 3 | wire type) followed by a value.  Numbers are cut into groups of seven bits,
# lowest first; the eighth bit of a byte says that another one follows.


def proto_number(data, at):
    """The number that begins at `at`, and where it ends."""
    value = shift = 0
    while data[at] > 127:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    value |= data[at] << shift
    # A negative number is written as its 64-bit two's complement.
    return (value - 2 ** 64 if value >> 63 else value), at + 1


def proto_fields(data):
    """All (field, value) of a message; a value is an int, or bytes for everything else."""
    at = 0
    while at < len(data):
        key, at = proto_number(data, at)
        if key & 7 == 0:
            value, at = proto_number(data, at)
        else:
            length, at = proto_number(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            demand(0 <= length <= len(data) - at, "is truncated; fetch it again")
            value, at = data[at:at + length], at + length
        yield key >> 3, value


def read_sentencepiece(path):
    kinds = {1: NORMAL, 2: UNKNOWN, 3: CONTROL, 4: USER_DEFINED, 5: CONTROL, 6: BYTE}
    pieces, settings, file = {}, {2: {}, 3: {}}, File(path)
    for field, value in proto_fields(file.read(0, file.size)):
        if field == 1:
            piece = dict(proto_fields(value))
            score, text, kind = piece.get(2, bytes(4)), piece[1], kinds[piece.get(3, 1)]
            text = byte_piece(text.decode()) if kind == BYTE else text
            demand(text is not None, f"is damaged: byte piece {len(pieces)} names no byte")
            pieces[len(pieces)] = struct.unpack("<f", score)[0], kind, text
        elif field in settings:
            settings[field] = dict(proto_fields(value))
    trainer, normaliser = settings[2], settings[3]
    demand(pieces, "is damaged, or no SentencePiece model: it has no pieces")
    demand(trainer.get(3, 1) == 2, f"is not a BPE tokenizer (SentencePiece model_type "
           f"{trainer.get(3, 1)}); only BPE can be exported")
    # These change text before it is cut into pieces.  Ordinary text hardly ever meets either:
    # worth a word, not a refusal.
    changes = ["replaces some characters"] if normaliser.get(2) else []
    changes += ["removes extra spaces"] if normaliser.get(4, 1) else []
    if changes:
        warn(path, f"its normaliser {' and '.join(changes)}; drugs.c takes text as it is")
    return Tokenizer(pieces, bool(normaliser.get(3, 1)), trainer.get(41, 1), trainer.get(42, 2))


def read_tokenizer_bin(path):
    """llama2.c: the longest length, then {f32 score, i32 length, bytes} up to the end of the file.

    Kinds are not stored.  Byte pieces are known by their names; ids 0, 1 and 2 are <unk>, the
    begin and the end of a text, always.
    """
    file, at, pieces = File(path), 4, {}
    while at < file.size or len(pieces) < 3:
        score, length = struct.unpack("<fi", file.read(at, 8))
        text, at = file.read(at + 8, length), at + 8 + length
        if len(pieces) < 3:
            # Line feeds stand around <s> and </s> so that they look well when printed.
            piece = score, CONTROL if pieces else UNKNOWN, text.strip(b"\n")
        else:
            byte = byte_piece(text.decode("utf-8", "replace"))
            piece = score, BYTE if byte else NORMAL, byte or text
        pieces[len(pieces)] = piece
    return Tokenizer(pieces, True, 1, 2)


def read_tokenizer_json(path):
    """Hugging Face's tokenizer.json, if it describes what SentencePiece would do."""
    with reading_json(path) as content:
        model = content["model"]
        demand(model.get("type", "BPE") == "BPE",
               f"is a {model.get('type')} tokenizer; only BPE can be exported")
        refuse_settings(model, "dropout", "continuing_subword_prefix", "end_of_word_suffix",
                        "ignore_merges")
        dummy_prefix = check_steps(path, content)

        # Hugging Face orders merges by rank, SentencePiece by the score of the result.  Of
        # several merges with the same result the first one counts.
        scores = {}
        for rank, merge in enumerate(model["merges"]):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            scores.setdefault(left + right, -rank)
        pieces = {}
        for text, token in model["vocab"].items():
            # What no merge makes is a single character, found without a score.
            pieces[token] = scores.get(text, -1e9), NORMAL, text.encode()
            if text == model.get("unk_token"):
                pieces[token] = 0, UNKNOWN, text.encode()
            elif model.get("byte_fallback") and byte_piece(text):
                pieces[token] = 0, BYTE, byte_piece(text)
        add_tokens(pieces, content.get("added_tokens", []))
        ids = {text: token for token, (_, _, text) in pieces.items()}
        return Tokenizer(pieces, dummy_prefix, ids.get(b"<s>", -1), ids.get(b"</s>", -1))


def check_steps(path, content):
    """What happens before and after BPE; returns whether a space is put before the text."""
    dummy_prefix = False
    for part in "normalizer", "pre_tokenizer", "decoder":
        for step in steps(content.get(part)):
            kind = step["type"]
            if part == "normalizer" and kind == "Prepend" and step["prepend"] == SPACE:
                dummy_prefix = True
            elif part == "pre_tokenizer" and kind == "Metaspace":
                # Two generations of one setting; true unless it says otherwise.
                dummy_prefix = (step.get("prepend_scheme", "always") != "never"
                                and step.get("add_prefix_space", True))
            elif part == "pre_tokenizer" or kind == "ByteLevel":
                raise Refused(f"cuts text with a {kind} {part}, which drugs.c does not know")
            elif part == "normalizer" and kind != "Replace":
                warn(path, f"its normaliser {kind} rewrites text; drugs.c takes text as it is")
    return dummy_prefix


def steps(node):
    """A pipeline is None, a step, or a sequence of pipelines."""
    if node and node["type"] != "Sequence":
        yield node
    elif node:
        inner, = [node[key] for key in node if key != "type"]
        for pipeline in inner:
            yield from steps(pipeline)


# ------------------------------------------------------------------------------------------------
# 5. Reader: a Hugging Face folder

# What config.json calls the fields of a Config.
SETTINGS = dict(
    dim="hidden_size", hidden_dim="intermediate_size", n_layers="num_hidden_layers",
    n_heads="num_attention_heads", n_kv_heads="num_key_value_heads", head_dim="head_dim",
    vocab_size="vocab_size", seq_len="max_position_embeddings",
    shared_classifier="tie_word_embeddings", sliding_window="sliding_window",
    rope_theta="rope_theta", norm_eps="rms_norm_eps", bos_id="bos_token_id", eos_id="eos_token_id")


def read_hf(folder):
    with reading_json(os.path.join(folder, "config.json")) as settings:
        config = hf_config(settings)
    found = hf_tensors(folder)
    if config.shared_classifier:
        # One matrix under two names: the file may hold either of them, or both.
        embedding, classifier = name_of("tok_emb", 0, "hf"), name_of("wcls", 0, "hf")
        if classifier in found:
            found.setdefault(embedding, found.pop(classifier))
    return config, reorder(gather(config, found, "hf"), config.head_dim, 2)


def hf_config(s):
    architecture = (s.get("architectures") or [s.get("model_type")])[0]
    demand(architecture in ("LlamaForCausalLM", "MistralForCausalLM", "llama", "mistral"),
           f"the architecture is {architecture}; only those of Llama and Mistral can be exported")
    refuse_settings(s, "attention_bias", "mlp_bias", "quantization_config")
    act, theta = s.get("hidden_act", "silu"), s.get("rope_theta")
    demand(act == "silu", f"hidden_act is {act}; only silu can be exported")
    for key in "rope_scaling", "rope_parameters":       # the older name and the newer
        rope = s.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        demand(kind == "default", f"{key} is of type {kind}; only unscaled RoPE can be exported")
        demand({**s, **rope}.get("partial_rotary_factor", 1) == 1,
               "partial_rotary_factor is set; only a RoPE over whole heads can be exported")
        theta = rope.get("rope_theta", theta)
    # Null means no window; to say nothing at all means 4096, for Hugging Face as well.
    window = s.get("sliding_window", 4096) if architecture.lower().startswith("mistral") else 0
    s = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, **s}
    fields = {ours: s.get(theirs) for ours, theirs in SETTINGS.items()}
    if isinstance(fields["eos_id"], list):
        fields["eos_id"] = fields["eos_id"][0]
    return Config(**{**fields, "rope_theta": theta, "sliding_window": window,
                     "shared_classifier": bool(fields["shared_classifier"])})


def hf_tensors(folder):
    single = os.path.join(folder, "model.safetensors")
    index = single + ".index.json"
    if os.path.exists(single) or not os.path.exists(index):
        return safetensors(single)
    shards = {}
    with reading_json(index) as content:
        for name, shard in sorted(content["weight_map"].items()):
            demand(os.path.basename(shard) == shard, f"shard {shard} is not in this folder")
            if shard not in shards:
                shards[shard] = safetensors(os.path.join(folder, shard))
            demand(name in shards[shard], f"tensor {name} is missing from {shard}")
    return {name: tensor for found in shards.values() for name, tensor in found.items()}


def safetensors(path):
    """A .safetensors file: a length (u64), that many bytes of JSON, then the data."""
    with reading(path):
        demand(os.path.exists(path), "is missing; weights must be in safetensors format")
        file, found, end = File(path), {}, 0
        start = struct.unpack("<Q", file.read(0, 8))[0] + 8
        header = json.loads(file.read(8, start - 8).decode())
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
            for number in shape + [first, last]:
                demand(whole(number, 0, 2 ** 63), f"tensor {name}: {number!r} is no size or offset")
            demand(first <= last <= file.size - start,
                   f"tensor {name} lies outside the file, which is truncated; fetch it again")
            demand(first >= end, f"tensor {name} and the one before it overlap")
            demand(dtype not in DTYPES or math.prod(shape) * DTYPES[dtype][0] == last - first,
                   f"tensor {name}: {shape} of {dtype} does not fill its {last - first} bytes")
            found[name], end = Stored(file, start + first, dtype, tuple(shape)), last
    return found


# ------------------------------------------------------------------------------------------------
# 6. Readers: Meta's folder and llama2.c's checkpoint, which PyTorch wrote
#
# Such a file is a zip.  NAME/data.pkl is a pickle, the tree of Python objects that was saved;
# NAME/data/0, NAME/data/1, ... are the bytes of the tensors.  A pickle is a program: it may name
# any function of any module and have it called.  This one may name what rebuilds tensors, and
# nothing else.


class TorchFile(pickle.Unpickler):
    """load() returns what torch.save() was given, with Stored for tensors."""

    DTYPES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}

    def __init__(self, path):
        self.file = File(path)
        self.zip = zipfile.ZipFile(self.file.stream)
        pickles = [name for name in self.zip.namelist() if name.endswith("/data.pkl")]
        demand(len(pickles) == 1, "is a zip, but not one that torch.save() wrote")
        self.prefix = pickles[0][:-len("data.pkl")]
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
        harmless = {("collections", "OrderedDict"): collections.OrderedDict,
                    ("torch._utils", "_rebuild_tensor_v2"): self.rebuild_tensor,
                    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor}
        demand((module, name) in harmless, f"refuses to run {module}.{name} found in the pickle")
        return harmless[module, name]

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
        return Stored(self.file, start + offset * size, dtype, shape, problem)


def read_torch(path):
    with reading(path):
        return TorchFile(path).load()


def read_meta(folder):
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "consolidated.*.pth")))
    demand(paths, "has params.json, but no consolidated.00.pth")
    shards = [read_torch(path) for path in paths]
    found = {}
    for name in sorted(set().union(*shards)):
        parts = [shard[name] for shard in shards if name in shard]
        demand(len(parts) == len(shards) or name.endswith(IGNORED),
               f"tensor {name} is missing from some of the consolidated.*.pth")
        found[name] = join_shards(name, parts)
    with reading_json(os.path.join(folder, "params.json")) as params:
        return meta_model(params, found)


def join_shards(name, parts):
    """Large models were saved as several files, one from each GPU, each with its slice.

    A GPU holds some of the heads and some of the hidden units.  These are the rows of the
    matrices that make them, and the columns of those that use them.  Norms are held by all.
    """
    if len(parts) == 1 or len(parts[0].shape) < 2:
        return parts[0]
    rows, columns = parts[0].shape
    problem = next((part.problem for part in parts if part.problem), None)
    if any(part.shape != parts[0].shape for part in parts):
        problem = "is cut into parts of different shapes"
    if name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight")):
        shape, origin = (rows, columns * len(parts)), lambda row: [(part, row) for part in parts]
    else:
        shape, origin = (rows * len(parts), columns), lambda row: [(parts[row // rows], row % rows)]
    return View(shape, origin, problem)


def read_checkpoint(path):
    """llama2.c's training checkpoint: Meta's names, in a dict among other things."""
    content = read_torch(path)
    demand({"model", "model_args"} <= set(content),
           "is not a llama2.c checkpoint: it lacks model or model_args")
    # torch.compile() leaves a prefix on every name.
    found = {re.sub(r"^_orig_mod\.", "", name): tensor for name, tensor in content["model"].items()}
    return meta_model(content["model_args"], found)


def meta_model(params, found):
    """Of some settings Meta says nothing; tensors and other settings give them away."""
    refuse_settings(params, "use_scaled_rope", "moe", "quantization_args")
    embedding, classifier, w1 = (name_of(kind, 0, "meta") for kind in ("tok_emb", "wcls", "w1"))
    for name in embedding, w1:
        demand(name in found, f"tensor {name} is missing")
    # Tied weights are saved once and referred to twice.
    shared = found[embedding] == found.get(classifier)
    if shared:
        del found[classifier]
    pieces, seq_len = params.get("vocab_size", -1), params.get("max_seq_len")
    if not seq_len and params.get("rope_theta") == 1e6:
        seq_len = 16384                                                 # Code Llama
    elif not seq_len:
        seq_len = 4096 if params.get("norm_eps") == 1e-5 else 2048      # Llama 2; Llama 1
    config = Config(
        dim=params["dim"], hidden_dim=found[w1].shape[0], n_layers=params["n_layers"],
        n_heads=params["n_heads"], n_kv_heads=params.get("n_kv_heads"),
        head_dim=params.get("head_dim"),
        vocab_size=found[embedding].shape[0] if pieces == -1 else pieces, seq_len=seq_len,
        shared_classifier=shared, sliding_window=params.get("sliding_window"),
        rope_theta=params.get("rope_theta"), norm_eps=params.get("norm_eps", 1e-5))
    return config, gather(config, found, "meta")


# ------------------------------------------------------------------------------------------------
# 7. Reader: llama2.c's export, version 0
#
# Seven int32, then fp32 tensors without names: one kind after the other, each for all layers.

V0_ORDER = "tok_emb att_norm wq wk wv wo ffn_norm w1 w2 w3 final_norm RoPE wcls".split()


def read_v0(path):
    file = File(path)
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len = struct.unpack(
        "<7i", file.read(0, 28))
    # The sign of vocab_size is a flag: negative if the classifier has a matrix of its own.
    config = Config(dim, hidden_dim, n_layers, n_heads, n_kv_heads, None, abs(vocab_size), seq_len,
                    shared_classifier=vocab_size > 0)
    # RoPE is a table of cosines and sines; drugs.c computes them.
    keys = ((kind, layer) for kind in (V0_ORDER[:-1] if config.shared_classifier else V0_ORDER)
            for layer in range(n_layers if kind in LAYER_KINDS else 1))
    return config, place(file, 28, (
        (key, (seq_len, config.head_dim) if key[0] == "RoPE" else config.shape(key[0]))
        for key in keys))


# ------------------------------------------------------------------------------------------------
# 8. Which reader

MAGIC, VERSION = b"drugs.c\0", 1
STRANGERS = {
    MAGIC: "is a flat file already; --to hf DIR turns it back into a Hugging Face folder",
    b"GGUF": "is a GGUF file; export the checkpoint that it was made from",
    b"24ka": "is a llama2.c export of version 1 or 2; export it with version 0, or its checkpoint",
    b"\x80\x02\x8a\x0al\xfc\x9cF\xf9": "is in PyTorch's old format; save it with 1.6 or later",
}


def reader_of(path):
    if os.path.isdir(path):
        for name, reader in ("config.json", read_hf), ("params.json", read_meta):
            if os.path.exists(os.path.join(path, name)):
                return reader
        raise Refused("holds neither config.json (Hugging Face) nor params.json (Meta)")
    with open(path, "rb") as stream:
        start = stream.read(16)
    for magic, why in STRANGERS.items():
        demand(not start.startswith(magic), why)
    demand(not path.endswith(".safetensors"), "has no config; name the folder that it is in")
    is_torch = start.startswith(b"PK") or path.endswith((".pt", ".pth"))
    return read_checkpoint if is_torch else read_v0


def read_model(path, named_tokenizer):
    config, tensors = reader_of(path)(path)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    tokenizer = find_tokenizer(folder, named_tokenizer, config.vocab_size)
    for name in "bos_id", "eos_id":
        if getattr(config, name) is None:
            setattr(config, name, getattr(tokenizer, name))
    check_ends(config)
    return config, tensors, tokenizer


def check_ends(config):
    for name in "bos_id", "eos_id":
        demand(whole(getattr(config, name), -1, config.vocab_size),
               f"{name} is {getattr(config, name)!r}, but there are {config.vocab_size} tokens")


# ------------------------------------------------------------------------------------------------
# 9. The writer of the flat file

HEADER, HEADER_BYTES, ALIGNMENT = "<8s11I2f2iIQ", 256, 64
CHUNK_BYTES = 1 << 16               # of fp32, at a time: what stays in the caches is fastest


def write_flat(c, tensors, tokenizer, output):
    begin = front(c, tokenizer)
    with replacing(output) as temporary, open(temporary, "wb") as stream:
        stream.write(begin)
        return write_tensors(stream, c, tensors, ALIGNMENT)


def front(c, tokenizer):
    """The header and the tokenizer, all that comes before the tensors."""
    section, byte_values = [], set()
    for token in range(c.vocab_size):
        # An embedding is often padded to a round number of rows; the rest gets empty pieces.
        score, kind, text = tokenizer.pieces.get(token, (0, CONTROL, b""))
        if kind == BYTE:
            byte_values.add(text)
        else:
            text = text.replace(SPACE.encode(), b" ")
        section.append(struct.pack("<fBBH", score, kind if text else CONTROL, 0, len(text)) + text)
    section, flags = b"".join(section), tokenizer.dummy_prefix | (len(byte_values) == 256) << 1
    header = struct.pack(HEADER, MAGIC, VERSION, *astuple(c), flags, len(section))
    return header.ljust(HEADER_BYTES, b"\0") + section


def write_tensors(stream, c, tensors, alignment=1):
    done, total = 0, sum(4 * math.prod(c.shape(kind)) for kind, _ in c.layout())
    for kind, layer in c.layout():
        rows, *columns = c.shape(kind)
        step = max(1, CHUNK_BYTES // (4 * math.prod(columns)))
        stream.write(bytes(-stream.tell() % alignment))
        for first in range(0, rows, step):
            done += stream.write(tensors[kind, layer].rows(first, min(first + step, rows)))
            if sys.stderr.isatty():
                print(f"\r{done / 1e6:.0f} of {total / 1e6:.0f} MB", end="\r", file=sys.stderr)
    return stream.tell()


@contextlib.contextmanager
def replacing(output, folder=False):
    """The name of a file, or a folder, that takes the place of `output` once it is complete."""
    temporary = os.path.abspath(output) + ".tmp"
    if folder:
        os.mkdir(temporary)             # if it exists already, it is not ours to remove
    try:
        yield temporary
        os.replace(temporary, output)
    except BaseException:               # even if someone presses ^C
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if folder else os.remove(temporary)
        raise


# ------------------------------------------------------------------------------------------------
# 10. The way back: from a flat file to a Hugging Face folder


def read_flat(path):
    demand(not os.path.isdir(path), "is a folder; --to needs a flat file")
    file, pieces, at = File(path), {}, HEADER_BYTES
    demand(file.stream.read(len(MAGIC)) == MAGIC, "is no flat file, which --to needs")
    _, version, *numbers, flags, _ = struct.unpack_from(HEADER, file.read(0, HEADER_BYTES))
    demand(version == VERSION, f"is a flat file of version {version}; only {VERSION} is known")
    config = Config(*numbers)
    demand(config.shared_classifier < 2, "is damaged: shared_classifier is neither 0 nor 1")
    check_ends(config)
    for token in range(config.vocab_size):
        score, kind, _, length = struct.unpack("<fBBH", file.read(at, 8))
        pieces[token] = score, kind, file.read(at + 8, length)
        at += 8 + length
    check_pieces(pieces, config.vocab_size)
    tokenizer = Tokenizer(pieces, flags & 1, config.bos_id, config.eos_id)
    demand(front(config, tokenizer) == file.read(0, at),
           "is damaged: its header or its tokenizer is not as export.py writes them")
    layout = ((key, config.shape(key[0])) for key in config.layout())
    return config, place(file, at, layout, ALIGNMENT), tokenizer


def write_hf(c, tensors, tokenizer, folder):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for kind, layer in c.layout():
        first, end = end, end + 4 * math.prod(c.shape(kind))
        header[name_of(kind, layer, "hf")] = {"dtype": "F32", "shape": c.shape(kind),
                                              "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)     # the data shall begin at a multiple of 8 bytes
    content = hf_tokenizer(tokenizer, folder)
    files = {"config.json": hf_settings(c, content), "tokenizer.json": content,
             "tokenizer_config.json": hf_tokenizer_settings(c, content)}
    with replacing(folder, folder=True) as temporary:
        for name in files:
            with open(os.path.join(temporary, name), "w") as stream:
                json.dump(files[name], stream, indent=2)
        with open(os.path.join(temporary, "model.safetensors"), "wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            return write_tensors(stream, c, reorder(tensors, c.head_dim, c.head_dim // 2))


def hf_settings(c, tokenizer):
    """config.json; hf_config() is the way back."""
    family = "mistral" if c.sliding_window else "llama"
    fields = dict(vars(c), shared_classifier=bool(c.shared_classifier),
                  sliding_window=c.sliding_window or None)
    for field in "rope_theta", "norm_eps":
        fields[field] = shortest(fields[field])
    for field, name in ("bos_id", "<s>"), ("eos_id", "</s>"):
        # Where nothing is said, readers think of these names: then -1 has to say that it is none.
        if fields[field] == -1 and name not in tokenizer["model"]["vocab"]:
            fields[field] = None
    return {"architectures": [family.capitalize() + "ForCausalLM"], "model_type": family,
            "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None,
            "torch_dtype": "float32", **{SETTINGS[field]: fields[field] for field in fields}}


def shortest(number):
    """The number with the fewest digits that is this fp32: 1e-05, not 9.999999747378752e-06."""
    texts = (f"{number:.{digits}g}" for digits in range(1, 10))
    return next(float(text) for text in texts
                if struct.pack("<f", float(text)) == struct.pack("<f", number))


def hf_tokenizer(tokenizer, folder):
    """tokenizer.json; read_tokenizer_json() is the way back."""
    vocab, scores, added, unknown = {}, {}, [], None
    n_bytes = sum(kind == BYTE for _, kind, _ in tokenizer.pieces.values())
    demand(n_bytes in (0, 256), f"has {n_bytes} byte pieces: tokenizer.json needs all 256, or none")
    for token, (score, kind, text) in tokenizer.pieces.items():
        name = f"<0x{text[0]:02X}>" if kind == BYTE else text.decode()
        if not name:
            continue                    # padding
        if kind == NORMAL:
            name = name.replace(" ", SPACE)
            scores[name] = score
        elif kind != BYTE:
            # These are looked for before the normaliser has turned spaces into anything.
            added.append(dict(id=token, content=name, single_word=False, lstrip=False, rstrip=False,
                              normalized=False, special=kind != USER_DEFINED))
            unknown = name if kind == UNKNOWN else unknown
        demand(name not in vocab, f"pieces {vocab.get(name)} and {token} would both be {name!r}, "
               "which tokenizer.json cannot express")
        vocab[name] = token
    steps = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    undo = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]
    if tokenizer.dummy_prefix:
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
        undo.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    post = None
    for bos in [name for name in vocab if vocab[name] == tokenizer.bos_id]:
        first, second = ([{"SpecialToken": {"id": bos, "type_id": n}},
                          {"Sequence": {"id": "AB"[n], "type_id": n}}] for n in (0, 1))
        post = {"type": "TemplateProcessing", "single": first, "pair": first + second,
                "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}}}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None,
        "post_processor": post, "decoder": {"type": "Sequence", "decoders": undo},
        "model": {"type": "BPE", "dropout": None, "unk_token": unknown,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                  "byte_fallback": n_bytes > 0, "ignore_merges": False, "vocab": vocab,
                  "merges": merges_of(scores, folder)}}


def merges_of(scores, folder):
    """All ways to join two pieces into one, the best first; scores are those of normal pieces."""
    merges, ranked, inexact = [], set(), False
    for name in sorted(scores, key=scores.get, reverse=True):
        known = len(merges)
        for cut in range(1, len(name)):
            left, right = name[:cut], name[cut:]
            if left in scores and right in scores:
                merges.append(f"{left} {right}")
            # SentencePiece also joins characters that are no pieces ...
            elif (left in scores or cut == 1) and (right in scores or len(right) == 1):
                inexact = True
        if len(merges) > known:
            # ... and of equals the leftmost first.
            inexact |= scores[name] in ranked
            ranked.add(scores[name])
    if inexact:
        warn(folder, "some pieces have equal scores, or characters that are no pieces; "
             "other tools may cut text that has them in another way")
    return merges


def hf_tokenizer_settings(c, tokenizer):
    """tokenizer_config.json, without which Hugging Face would add tokens that it thinks usual."""
    names = {token: name for name, token in tokenizer["model"]["vocab"].items()}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "bos_token": names.get(c.bos_id), "eos_token": names.get(c.eos_id),
            "unk_token": tokenizer["model"]["unk_token"]}


# ------------------------------------------------------------------------------------------------
# 11. The command line


def main():
    parser = argparse.ArgumentParser(prog="export.py", description="Turn a Llama or Mistral "
                                     "checkpoint into one flat file, or a flat file back into one.")
    parser.add_argument("input", help="Hugging Face or Meta folder, llama2.c .pt or v0 .bin; for "
                        "--to a flat file")
    outputs = parser.add_mutually_exclusive_group()
    outputs.add_argument("-o", "--output", default="model.bin", help="default: model.bin")
    outputs.add_argument("--to", nargs=2, metavar=("hf", "DIR"),
                         help="write a Hugging Face folder; DIR is new or empty")
    parser.add_argument("--tokenizer", help="default: the one beside the weights")
    arguments = parser.parse_args()
    path, output = arguments.input, arguments.to[1] if arguments.to else arguments.output
    if arguments.to and (arguments.to[0] != "hf" or arguments.tokenizer):
        parser.error("--to knows only hf, and --tokenizer has no place beside it")
    try:
        with reading(output):
            if arguments.to:
                demand(not os.path.lexists(output) or os.path.isdir(output)
                       and not os.listdir(output), "exists; name a new or empty folder after --to")
            else:
                demand(not os.path.isdir(output), "is a folder; name a file after -o")
                demand(os.path.realpath(output) != os.path.realpath(path),
                       "is the input; name another file after -o")
        with reading(path):
            model = read_flat(path) if arguments.to else read_model(path, arguments.tokenizer)
            size = (write_hf if arguments.to else write_flat)(*model, output)
            c = model[0]
            print(f"{output}: {c.n_layers} layers, dim {c.dim}, {c.n_heads} heads ({c.n_kv_heads} "
                  f"for keys), {c.vocab_size} pieces, {size / 1e6:.1f} MB")
    except Refused as error:
        sys.exit(f"export.py: {error.path}: {error}")
    except OSError as error:
        sys.exit(f"export.py: {error.filename or output}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit("export.py: interrupted; nothing was written")


if __name__ == "__main__":
    main()
