#!/usr/bin/env python3
"""Tests of export.py.  Every input is built here, from random numbers, in a temporary folder.

    python3 -m unittest discover tests/unit
    python3 tests/unit/test_export.py

The main idea: write the same small model down in every format that export.py reads, by code that
shares nothing with it, and demand the same flat file every time.  The way back must lead to the
same tensors, and from there to the same flat file.
"""

import collections
import contextlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import types
import unittest
import warnings
import zipfile

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EXPORT = os.path.join(os.path.dirname(HERE), "export.py")
LOGITS = os.path.join(HERE, "logits")
DRUGS = os.path.join(os.path.dirname(HERE), "drugs")
sys.path[:0] = [os.path.dirname(EXPORT), os.path.join(HERE, "makers"), os.path.join(HERE, "unit")]
import export       # noqa: E402  (the folders must be on the path first)
import reference    # noqa: E402
from naive_tokenizer import encode_like_huggingface, read_file      # noqa: E402


Done = collections.namedtuple("Done", "returncode stdout stderr")


def run(*arguments):
    """export.py with these arguments, inside this process: hundreds of new ones take long."""
    out, err, status, argv = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = [EXPORT] + list(arguments)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            export.main()
    except SystemExit as stop:
        status = stop.code
        if isinstance(status, str):             # Python prints it and exits with status 1
            err.write(status + "\n")
            status = 1
    finally:
        sys.argv = argv
    return Done(status, out.getvalue(), err.getvalue())


def run_apart(*arguments):
    """The same in a process of its own, as a user has it."""
    done = subprocess.run([sys.executable, EXPORT] + list(arguments), universal_newlines=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return Done(done.returncode, done.stdout, done.stderr)


def load(path):
    with open(path, "rb") as stream:
        return stream.read()


def save(path, data):
    with open(path, "wb") as stream:
        stream.write(data if isinstance(data, bytes) else json.dumps(data).encode())


def f32(numbers):
    return struct.pack("<%df" % len(numbers), *numbers)


def floats(data):
    return struct.unpack("<%df" % (len(data) // 4), data)


def bf16(numbers):
    return b"".join(f32([number])[2:] for number in numbers)


def f16(numbers):
    return struct.pack("<%de" % len(numbers), *numbers)


# ------------------------------------------------------------------------------------------------
# A small model, in the order of the flat file

SIZES = dict(dim=32, hidden=24, layers=2, heads=4, kv=2, head=8, vocab=280, seq=64)


def shapes_of(dim, hidden, layers, heads, kv, head, vocab, **_):
    """{(kind, layer): shape}, in the order of the flat file, with a classifier."""
    kinds = dict(att_norm=(dim,), wq=(heads * head, dim), wk=(kv * head, dim), wv=(kv * head, dim),
                 wo=(dim, heads * head), ffn_norm=(dim,), w1=(hidden, dim), w3=(hidden, dim),
                 w2=(dim, hidden))
    out = {("tok_emb", 0): (vocab, dim)}
    out.update(((kind, layer), kinds[kind]) for layer in range(layers) for kind in kinds)
    out.update({("final_norm", 0): (dim,), ("wcls", 0): (vocab, dim)})
    return out


class Small:
    """Random weights: {(kind, layer): (shape, numbers)}, every number exact in fp16 and bf16."""

    def __init__(self, tied, **sizes):
        self.tied, sizes = tied, dict(SIZES, **sizes)
        self.__dict__.update(sizes)
        rng = random.Random(1)
        self.weights = {
            key: (shape, [rng.randrange(-128, 129) / 256 for _ in range(math.prod(shape))])
            for key, shape in shapes_of(**sizes).items() if not (tied and key[0] == "wcls")}


HF = {"tok_emb": "model.embed_tokens.weight", "final_norm": "model.norm.weight",
      "wcls": "lm_head.weight"}
for _kind, _name in dict(att_norm="input_layernorm", wq="self_attn.q_proj", wk="self_attn.k_proj",
                         wv="self_attn.v_proj", wo="self_attn.o_proj", w1="mlp.gate_proj",
                         ffn_norm="post_attention_layernorm", w3="mlp.up_proj",
                         w2="mlp.down_proj").items():
    HF[_kind] = "model.layers.%d." + _name + ".weight"
META = {"tok_emb": "tok_embeddings.weight", "final_norm": "norm.weight", "wcls": "output.weight",
        "att_norm": "layers.%d.attention_norm.weight", "ffn_norm": "layers.%d.ffn_norm.weight"}
META.update((kind, "layers.%d.attention." + kind + ".weight") for kind in ("wq", "wk", "wv", "wo"))
META.update((kind, "layers.%d.feed_forward." + kind + ".weight") for kind in ("w1", "w2", "w3"))


def named(names, kind, layer):
    return names[kind] % layer if "%" in names[kind] else names[kind]


# ------------------------------------------------------------------------------------------------
# Writers: tokenizers

LETTERS = ["\u2581", "a", "b", "c", "\u00e9"]
MERGES = [("a", "b"), ("\u2581", "a"), ("\u2581a", "b"), ("\u2581", "ab"), ("ab", "c")]
RANKS = {"ab": 0, "\u2581a": 1, "\u2581ab": 2, "abc": 4}
NAMES = (["<unk>", "<s>", "</s>"] + ["<0x%02X>" % byte for byte in range(256)] + LETTERS
         + list(RANKS))


def score(name):
    if name in RANKS:
        return float(-RANKS[name])
    return -1e9 if name in LETTERS else 0.0


def varint(number):
    number %= 2 ** 64
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece(names=None, model_type=2, prefix=1, eos=2):
    out = b""
    for token, name in enumerate(names or NAMES):
        piece = field(1, name.encode()) + field(2, score(name))
        kind = 2 if token == 0 else 3 if token < 3 else 6 if name.startswith("<0x") else 1
        out += field(1, piece + (field(3, kind) if kind != 1 else b""))
    out += field(2, field(3, model_type) + field(40, 0) + field(41, 1) + field(42, eos))
    return out + field(3, field(1, b"identity") + field(3, prefix) + field(4, 0))


def tokenizer_bin(old=False):
    """`old`: as llama2.c wrote it until August 2023, bytes as the characters 0 to 255."""
    out = struct.pack("<I", 7)
    for token, name in enumerate(NAMES):
        text = "\n%s\n" % name if token in (1, 2) else name.replace("\u2581", " ")
        text = chr(int(name[3:5], 16)) if old and name.startswith("<0x") else text
        out += struct.pack("<fi", score(name), len(text.encode())) + text.encode()
    return out


BEGIN = {"type": "TemplateProcessing", "pair": [],
         "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
         "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}


def tokenizer_json(**changes):
    model = {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True,
             "vocab": {name: token for token, name in enumerate(NAMES)},
             "merges": [" ".join(merge) for merge in MERGES]}
    model.update(changes.pop("model", {}))
    out = {"added_tokens": [{"id": token, "content": name, "special": True}
                            for token, name in enumerate(NAMES[:3])],
           "normalizer": {"type": "Sequence", "normalizers": [
               {"type": "Prepend", "prepend": "\u2581"},
               {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
           "pre_tokenizer": None, "decoder": None, "post_processor": BEGIN, "model": model}
    out.update(changes)
    return out


# ------------------------------------------------------------------------------------------------
# Writers: Hugging Face


def split_halves(shape, numbers, head):
    """From interleaved pairs to Hugging Face's half-split order."""
    width = shape[1]
    rows = [numbers[at:at + width] for at in range(0, len(numbers), width)]
    out = []
    for start in range(0, len(rows), head):
        out += rows[start:start + head:2] + rows[start + 1:start + head:2]
    return [number for row in out for number in row]


def hf_weights(small):
    """{name: [dtype, shape, bytes]}, fp32."""
    out = {}
    for (kind, layer), (shape, numbers) in small.weights.items():
        if kind in ("wq", "wk"):
            numbers = split_halves(shape, numbers, small.head)
        out[named(HF, kind, layer)] = ["F32", list(shape), f32(numbers)]
    return out


def hf_config(small, **changes):
    out = {"architectures": ["LlamaForCausalLM"], "hidden_size": small.dim, "hidden_act": "silu",
           "intermediate_size": small.hidden, "num_hidden_layers": small.layers,
           "num_attention_heads": small.heads, "num_key_value_heads": small.kv,
           "vocab_size": small.vocab, "max_position_embeddings": small.seq,
           "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": small.tied,
           "bos_token_id": 1, "eos_token_id": 2}
    if small.head * small.heads != small.dim:
        out["head_dim"] = small.head
    out.update(changes)
    return out


def safetensors(weights):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, content) in weights.items():
        header[name] = {"dtype": dtype, "shape": shape,
                        "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_hf(folder, small, weights=None, config=None, shards=1):
    os.makedirs(folder)
    weights = hf_weights(small) if weights is None else weights
    save(os.path.join(folder, "config.json"), config or hf_config(small))
    save(os.path.join(folder, "tokenizer.model"), sentencepiece())
    if shards == 1:
        save(os.path.join(folder, "model.safetensors"), safetensors(weights))
        return folder
    index = {}
    for shard in range(shards):
        name = "model-%05d-of-%05d.safetensors" % (shard + 1, shards)
        part = {key: weights[key] for key in sorted(weights)[shard::shards]}
        save(os.path.join(folder, name), safetensors(part))
        index.update(dict.fromkeys(part, name))
    save(os.path.join(folder, "model.safetensors.index.json"), {"weight_map": index})
    return folder


# ------------------------------------------------------------------------------------------------
# Writers: PyTorch's zips, without PyTorch
#
# The pickle must name functions of a module torch, so for the time of writing there is one.


class Tensor:
    def __init__(self, shape, data, kind="FloatStorage", stride=None, key=None):
        self.shape, self.data, self.kind, self.key = tuple(shape), data, kind, key
        self.stride = stride or tuple(math.prod(shape[axis + 1:]) for axis in range(len(shape)))

    def __reduce__(self):
        module = sys.modules["torch._utils"]
        return module._rebuild_tensor_v2, (StorageReference(self), 0, self.shape, self.stride,
                                           False, collections.OrderedDict())


class StorageReference:
    def __init__(self, tensor):
        self.tensor = tensor


class TorchPickler(pickle._Pickler):
    def __init__(self, stream):
        super().__init__(stream, 2)
        self.records = []

    def save(self, thing, *rest, **more):
        if not isinstance(thing, Call):
            return super().save(thing, *rest, **more)
        self.write(b"c" + ("%s\n%s\n" % (thing.module, thing.name)).encode())
        super().save(thing.arguments)
        self.write(b"R")

    def persistent_id(self, thing):
        if not isinstance(thing, StorageReference):
            return None
        data = thing.tensor.data
        if not any(data is record for record in self.records):
            self.records.append(data)
        key = [data is record for record in self.records].index(True)
        return ("storage", getattr(sys.modules["torch"], thing.tensor.kind), str(key), "cpu",
                len(data))


class Call:
    """What a pickle asks to be made by calling module.name(*arguments)."""

    def __init__(self, module, name, *arguments):
        self.module, self.name, self.arguments = module, name, arguments


def fake_torch():
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("FloatStorage", "HalfStorage", "BFloat16Storage", "LongStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    torch._utils = utils
    utils._rebuild_tensor_v2 = type("_rebuild_tensor_v2", (), {"__module__": "torch._utils"})
    return {"torch": torch, "torch._utils": utils}


def torch_save(path, content, compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    pickler = TorchPickler(stream)
    sys.modules.update(fake_torch())
    try:
        pickler.dump(content)
    finally:
        del sys.modules["torch"], sys.modules["torch._utils"]
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", stream.getvalue(), zipfile.ZIP_STORED)
        for key, data in enumerate(pickler.records):
            archive.writestr("archive/data/%d" % key, data)


def meta_weights(small):
    return collections.OrderedDict((named(META, *key), Tensor(shape, f32(numbers)))
                                   for key, (shape, numbers) in small.weights.items())


def model_args(small, **changes):
    out = {"dim": small.dim, "n_layers": small.layers, "n_heads": small.heads,
           "n_kv_heads": small.kv, "vocab_size": small.vocab, "norm_eps": 1e-5,
           "max_seq_len": small.seq, "multiple_of": 8}
    out.update(changes)
    return out


def write_meta(folder, small, shards=1, **params):
    os.makedirs(folder)
    save(os.path.join(folder, "params.json"), model_args(small, **params))
    save(os.path.join(folder, "tokenizer.model"), sentencepiece())
    for shard in range(shards):
        part = collections.OrderedDict()
        for (kind, layer), (shape, numbers) in small.weights.items():
            if len(shape) == 2:
                rows, columns = shape
                if kind in ("wo", "w2", "tok_emb"):
                    width = columns // shards
                    numbers = [numbers[row * columns + shard * width + column]
                               for row in range(rows) for column in range(width)]
                    shape = rows, width
                else:
                    count = rows // shards
                    numbers = numbers[shard * count * columns:(shard + 1) * count * columns]
                    shape = count, columns
            part[named(META, kind, layer)] = Tensor(shape, f32(numbers))
        part["rope.freqs"] = Tensor((2,), f32([1, 2]))
        torch_save(os.path.join(folder, "consolidated.%02d.pth" % shard), part)
    return folder


def checkpoint(small, prefix="", **more):
    weights = meta_weights(small)
    if small.tied:
        tied = weights["tok_embeddings.weight"]
        weights["output.weight"] = Tensor(tied.shape, tied.data)
    weights["freqs_cos"] = Tensor((2,), f32([1, 2]))
    out = {"model": collections.OrderedDict((prefix + k, v) for k, v in weights.items()),
           "model_args": model_args(small), "iter_num": 7, "config": {"device": "cpu"},
           "optimizer": {"state": {0: {"step": Tensor((1,), bytes(8), "LongStorage")}}}}
    out.update(more)
    return out


def v0(small):
    def stacked(kind):
        return b"".join(f32(small.weights[kind, layer][1]) for layer in range(small.layers))
    out = struct.pack("<7i", small.dim, small.hidden, small.layers, small.heads, small.kv,
                      small.vocab if small.tied else -small.vocab, small.seq)
    out += f32(small.weights["tok_emb", 0][1])
    out += b"".join(map(stacked, ("att_norm", "wq", "wk", "wv", "wo", "ffn_norm",
                                  "w1", "w2", "w3")))
    out += f32(small.weights["final_norm", 0][1]) + bytes(4 * small.seq * small.head)
    return out if small.tied else out + f32(small.weights["wcls", 0][1])


# ------------------------------------------------------------------------------------------------
# A reader of the flat file

NORMAL, CONTROL, UNKNOWN, BYTE, USER_DEFINED, END = range(6)


def parse(data, small):
    """(what the front says, pieces as (kind, text), {(kind, layer): bytes})."""
    file, tensors = read_file(data), {}
    at = file.end
    for key, (shape, _) in small.weights.items():
        while at % 64:
            assert data[at] == 0
            at += 1
        width = 4 if file.storage == 0 or len(shape) == 1 else 2        # gains are always fp32
        tensors[key] = data[at:at + width * math.prod(shape)]
        at += len(tensors[key])
    assert at == len(data)
    header = dict(vars(file), ends=[n for n, p in enumerate(file.pieces) if p.kind == END])
    return header, file.pieces, tensors


def frequencies(head, theta=10000.0):
    return tuple(theta ** (-pair / (head // 2)) for pair in range(head // 2))


def pairs_by_rank(groups):
    """{(left, right): (rank, merged)}, of the names of pairs; those of a group have one rank."""
    return {(NAMES.index(left), NAMES.index(right)): (rank, NAMES.index(left + right))
            for rank, group in enumerate(groups) for left, right in zip(group[::2], group[1::2])}


class Case(unittest.TestCase):
    def setUp(self):
        # A program may leave it to its end to close the files it read.
        warnings.simplefilter("ignore", ResourceWarning)
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        self.count = 0

    def path(self, name=None):
        self.count += 1
        return os.path.join(self.folder, name or "n%d" % self.count)

    def export(self, path, *more, quiet=True):
        out = self.path()
        done = run(path, "-o", out, *more)
        self.assertEqual(done.returncode, 0, done.stderr)
        if quiet:
            self.assertEqual(done.stderr, "")
        self.assertFalse(os.path.exists(out + ".tmp"))
        return load(out)

    def refused(self, path, *words, more=(), to=("-o",)):
        """Exit status 1, one line with all the words, and nothing touched."""
        folder = self.path()
        os.makedirs(folder)
        out = os.path.join(folder, "model.bin")
        save(out, b"precious")
        done = run(path, *to, out + "/../new" * (len(to) > 1), *more)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.assertTrue(done.stderr.startswith("export.py: "), done.stderr)
        for word in words:
            self.assertIn(word, done.stderr)
        self.assertEqual(os.listdir(folder), ["model.bin"])
        self.assertEqual(load(out), b"precious")


# ------------------------------------------------------------------------------------------------
# What must work


class TestKinds(Case):
    """One model, every format, the same bytes."""

    def check(self, small):
        want = self.export(write_hf(self.path(), small))
        header, pieces, tensors = parse(want, small)
        for key, (_, numbers) in small.weights.items():
            self.assertEqual(tensors[key], f32(numbers), key)
        names = "dim hidden layers heads kv head vocab seq shared window".split()
        self.assertEqual([header[key] for key in names],
                         [small.dim, small.hidden, small.layers, small.heads, small.kv, small.head,
                          small.vocab, small.seq, int(small.tied), 0])
        self.assertEqual((header["bos"], header["ends"], header["flags"]), (1, [2], 3))
        self.assertEqual((header["patterns"], header["ranges"], header["steps"]), ([], [], []))
        self.assertEqual((header["unknown"], header["words"]), (0, {}))
        self.assertEqual(header["frequencies"], frequencies(small.head))
        self.assertEqual((header["chat"], header["takes"]), ([], [0] * 6))
        self.assertEqual(struct.pack("<f", header["eps"]), struct.pack("<f", 1e-5))
        self.assertEqual(pieces[:3], [(2, b"<unk>"), (1, b"<s>"), (5, b"</s>")])
        self.assertEqual(pieces[3 + 10], (3, b"\n"))
        self.assertEqual(pieces[259], (0, b" "))
        self.assertEqual(pieces[NAMES.index("\u2581ab")], (0, b" ab"))
        self.assertEqual(pieces[-1], (1, b""))
        self.assertEqual(header["units"], {
            **{ord(name): NAMES.index(name) for name in LETTERS}, 32: 259,
            **{0x110000 + byte: 3 + byte for byte in range(256)}})
        self.assertEqual(header["pairs"], pairs_by_rank(
            [("a", "b"), ("\u2581", "a"), ("\u2581a", "b", "\u2581", "ab"), ("ab", "c")]))
        self.assertEqual(self.export(write_hf(self.path(), small, shards=3)), want)

        folder = self.path()
        os.makedirs(folder)
        for name, content in (("tokenizer.model", sentencepiece()),
                              ("tokenizer.bin", tokenizer_bin(old=True)),
                              ("tokenizer.bin", tokenizer_bin())):
            tokenizer = os.path.join(folder, "other-" + name)
            save(tokenizer, content)
            path = os.path.join(folder, "stories.bin")
            save(path, v0(small))
            self.assertEqual(self.export(path, "--tokenizer", tokenizer), want)
        os.rename(tokenizer, os.path.join(folder, "tokenizer.bin"))
        for prefix in ("", "_orig_mod.", "module.", "module._orig_mod."):
            path = os.path.join(folder, "ckpt.pt")
            torch_save(path, checkpoint(small, prefix))
            self.assertEqual(self.export(path), want)
        return want

    def test_tied(self):
        self.check(Small(True))

    def test_untied_and_meta(self):
        small = Small(False)
        want = self.check(small)
        self.assertEqual(self.export(write_meta(self.path(), small)), want)
        self.assertEqual(self.export(write_meta(self.path(), small, shards=2)), want)
        self.assertEqual(self.export(write_meta(self.path(), small, vocab_size=-1)), want)

    def test_meta_seq_len(self):
        folder = write_meta(self.path(), Small(False))
        for changes, seq in (({}, 4096), ({"norm_eps": 1e-6}, 2048), ({"rope_theta": 1e6}, 16384),
                             ({"rope_theta": 5e5}, 8192)):
            params = model_args(Small(False), **changes)
            del params["max_seq_len"]
            save(os.path.join(folder, "params.json"), params)
            header, _, _ = parse(self.export(folder), Small(False))
            self.assertEqual(header["seq"], seq)


class TestHuggingFace(Case):
    def header(self, small, quiet=True, **changes):
        config = {k: v for k, v in hf_config(small, **changes).items() if v != "absent"}
        data = self.export(write_hf(self.path(), small, config=config), quiet=quiet)
        header, _, tensors = parse(data, small)
        for key, (_, numbers) in small.weights.items():
            self.assertEqual(tensors[key], f32(numbers), key)
        return header

    def test_tied_under_either_name(self):
        small = Small(True)
        weights = hf_weights(small)
        want = self.export(write_hf(self.path(), small))
        other = dict(weights)
        other["lm_head.weight"] = other.pop("model.embed_tokens.weight")
        self.assertEqual(self.export(write_hf(self.path(), small, other)), want)
        both = dict(weights)
        dtype, shape, data = both["model.embed_tokens.weight"]
        both["lm_head.weight"] = [dtype, shape, data]
        self.assertEqual(self.export(write_hf(self.path(), small, both)), want)

    def test_two_heads_that_should_be_one(self):
        """The one that was trained apart is used, whatever the settings say; and it is told."""
        small = Small(False)
        want = self.export(write_hf(self.path(), small))
        for folder in (write_hf(self.path(), small, config=hf_config(small, tie_word_embeddings=True)),
                       write_meta(self.path(), small, tied_embeddings=True)):
            out = self.path()
            done = run(folder, "-o", out)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (0, 1), done.stderr)
            self.assertIn("two matrices", done.stderr)
            self.assertEqual(load(out), want)

    def test_what_nobody_reads(self):
        """A setting that asks for something is obeyed or named."""
        small = Small(False)
        for folder in (write_hf(self.path(), small, config=hf_config(
                small, sliding_window=16, logit_scale=.5, use_cache=True, quiet_one=None,
                _name_or_path="x", transformers_version="4.4")),
                       write_meta(self.path(), small, sliding_window=0, logit_scale=.5, window_x=1)):
            done = run(folder, "-o", self.path())
            self.assertEqual((done.returncode, done.stderr.count("\n")), (0, 1), done.stderr)
            for word, said in (("logit_scale", True), ("use_cache", False), ("_name_or_path", False),
                               ("quiet_one", False), ("sliding_window", "params.json" not in
                                                      os.listdir(folder))):
                self.assertEqual(word in done.stderr, said, done.stderr)
        for name in "bos_token", "eos_token":
            folder = write_hf(self.path(), small)
            save(os.path.join(folder, "tokenizer_config.json"), {name: "<nobody>"})
            done = run(folder, "-o", self.path())
            self.assertEqual((done.returncode, done.stderr.count("\n")), (0, 1), done.stderr)
            self.assertIn(name + " is '<nobody>'", done.stderr)

    def test_shapes(self):
        self.assertEqual(self.header(Small(False, head=6))["head"], 6)
        self.assertEqual(self.header(Small(True, kv=1))["kv"], 1)
        self.assertEqual(self.header(Small(True, kv=4), num_key_value_heads="absent")["kv"], 4)

    def test_settings(self):
        small = Small(True)
        mistral = dict(architectures=["MistralForCausalLM"])
        self.assertEqual(self.header(small, sliding_window=16, **mistral)["window"], 16)
        self.assertEqual(self.header(small, sliding_window=None, **mistral)["window"], 0)
        self.assertEqual(self.header(small, architectures=["LLaMAForCausalLM"])["dim"], small.dim)
        # What a config.json does not say; and its type counts more than its class.
        absent = {"max_position_embeddings": "absent", "sliding_window": None}
        self.assertEqual(self.header(small, **absent)["seq"], 2048)
        self.assertEqual(self.header(small, **absent, **mistral)["seq"], 131072)
        self.assertEqual(self.header(small, model_type="mistral", sliding_window=16)["window"], 16)

    def test_rope(self):
        small = Small(True)
        for theta, changes in (
                (5e5, {"rope_theta": 5e5}), (1e4, {"rope_theta": "absent"}),
                (1e6, {"rope_theta": "absent", "rope_parameters": {
                    "rope_type": "default", "rope_theta": 1e6}})):
            self.assertEqual(self.header(small, **changes)["frequencies"], frequencies(8, theta))
        plain = frequencies(8)
        for name in "type", "rope_type":
            header = self.header(small, rope_scaling={name: "linear", "factor": 4.0})
            self.assertEqual(header["frequencies"], tuple(f / 4 for f in plain))
        # The four pairs turn 1303, 130.3, 13.03 and 1.303 times in 8192 positions.
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0,
                   "high_freq_factor": 20.0, "original_max_position_embeddings": 8192}
        got = self.header(small, rope_scaling=scaling)["frequencies"]
        self.assertEqual(got[:2], plain[:2])
        self.assertEqual(got[3], plain[3] / 8)
        share = (8192 * plain[2] / (2 * math.pi) - 2) / 18
        self.assertAlmostEqual(got[2], plain[2] * ((1 - share) / 8 + share), delta=1e-15)

    def test_pytorch_bin(self):
        """Whole and in shards; parameters keep their prefixes after a training on many GPUs."""
        for small in Small(True), Small(False):
            want = self.export(write_hf(self.path(), small))
            for shards, prefix in (1, ""), (1, "module."), (3, ""):
                folder = write_hf(self.path(), small)
                os.remove(os.path.join(folder, "model.safetensors"))
                weights = {prefix + name: Tensor(shape, data)
                           for name, (_, shape, data) in hf_weights(small).items()}
                index = {}
                for shard in range(shards):
                    name = "pytorch_model-%d.bin" % shard if shards > 1 else "pytorch_model.bin"
                    part = {key: weights[key] for key in sorted(weights)[shard::shards]}
                    torch_save(os.path.join(folder, name), part)
                    index.update(dict.fromkeys(part, name))
                if shards > 1:
                    save(os.path.join(folder, "pytorch_model.bin.index.json"),
                         {"weight_map": index})
                self.assertEqual(self.export(folder), want)

    def test_a_tensor_in_two_shards(self):
        """It is the one in the shard that the index names."""
        small = Small(True)
        folder = write_hf(self.path(), small, shards=2)
        want, name = self.export(folder), "model.norm.weight"
        first, second = (os.path.join(folder, "model-0000%d-of-00002.safetensors" % n) for n in (1, 2))
        weights = hf_weights(small)
        parts = [{key: weights[key] for key in sorted(weights)[n::2]} for n in (0, 1)]
        other = ["F32", [small.dim], f32([9] * small.dim)]
        for path, part in zip((first, second), parts):
            save(path, safetensors({name: other, **part}))
        self.assertEqual(self.export(folder), want)

    def test_mistral_consolidated(self):
        small = Small(False)
        folder = self.path()
        os.makedirs(folder)
        save(os.path.join(folder, "tokenizer.model.v1"), b"an older one")
        save(os.path.join(folder, "tokenizer.model.v3"), sentencepiece())
        save(os.path.join(folder, "params.json"), model_args(small, head_dim=8, rope_theta=1e6))
        save(os.path.join(folder, "consolidated.safetensors"), safetensors(
            {named(META, *key): ["BF16", list(shape), bf16(numbers)]
             for key, (shape, numbers) in small.weights.items()}))
        header, _, tensors = parse(self.export(folder), small)
        for key, (shape, numbers) in small.weights.items():
            self.assertEqual(tensors[key], (f32 if len(shape) == 1 else bf16)(numbers), key)
        self.assertEqual(header["frequencies"], frequencies(8, 1e6))
        self.assertEqual(header["chat"], [])

    def test_stray_tables_are_ignored(self):
        small = Small(True)
        weights = hf_weights(small)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = ["F32", [4], bytes(16)]
        self.assertEqual(self.export(write_hf(self.path(), small, weights)),
                         self.export(write_hf(self.path(), small)))

    def test_two_bytes_a_weight(self):
        """They stay as they are, there and back, and give the logits that four bytes give."""
        small, logits = Small(False), set()
        for storage, (dtype, torch, write) in enumerate((
                ("F32", "float32", f32), ("BF16", "bfloat16", bf16), ("F16", "float16", f16))):
            weights = {name: [dtype, shape, write(floats(data))]
                       for name, (_, shape, data) in hf_weights(small).items()}
            data = self.export(write_hf(self.path(), small, weights))
            header, _, tensors = parse(data, small)
            self.assertEqual(header["storage"], storage)
            for key, (shape, numbers) in small.weights.items():
                self.assertEqual(tensors[key], (f32 if len(shape) == 1 else write)(numbers), key)
            flat, back = self.path(), self.path()
            save(flat, data)
            self.assertEqual(run(flat, "--to", "hf", back).returncode, 0)
            self.assertEqual(self.export(back), data)
            self.assertEqual(json.loads(load(os.path.join(back, "config.json")))["torch_dtype"], torch)
            if os.path.exists(LOGITS):
                logits.add(subprocess.check_output([LOGITS, flat, "1", "260", "261", "262"]))
        self.assertLessEqual(len(logits), 1)

    def test_mixed_types(self):
        small = Small(False)
        weights = hf_weights(small)
        for at, name in enumerate(sorted(weights)):
            _, shape, data = weights[name]
            weights[name] = [["F32", shape, data], ["BF16", shape, bf16(floats(data))],
                             ["F16", shape, f16(floats(data))]][at % 3]
        self.assertEqual(self.export(write_hf(self.path(), small, weights)),
                         self.export(write_hf(self.path(), small)))


class TestNumbers(unittest.TestCase):
    def test_every_f16(self):
        data = struct.pack("<65536H", *range(65536))
        # Once in order, where special numbers come in long runs, and once with every run cut up.
        shuffled = list(range(65536))
        random.Random(2).shuffle(shuffled)
        for patterns in range(65536), shuffled:
            data = struct.pack("<65536H", *patterns)
            out = bytes(export.from_f16(data))
            for at, pattern in enumerate(patterns):
                value, = struct.unpack_from("<e", data, 2 * at)
                got = out[4 * at:4 * at + 4]
                if math.isnan(value):
                    self.assertTrue(math.isnan(struct.unpack("<f", got)[0]), hex(pattern))
                else:
                    self.assertEqual(got, struct.pack("<f", value), hex(pattern))

    def test_every_bf16(self):
        data = struct.pack("<65536H", *range(65536))
        self.assertEqual(bytes(export.from_bf16(data)),
                         struct.pack("<65536I", *(n << 16 for n in range(65536))))


class TestTokenizers(Case):
    def pieces(self, content, name="tokenizer.json", words=(), n_warnings=1, config={}, **files):
        """What is read from this tokenizer, and files beside it, with these words in warnings."""
        small = Small(True)
        folder = write_hf(self.path(), small, config=hf_config(small, **config))
        os.remove(os.path.join(folder, "tokenizer.model"))
        save(os.path.join(folder, name), content)
        for key, other in files.items():
            save(os.path.join(folder, key + ".json"), other)
        out = self.path()
        done = run(folder, "-o", out)
        self.assertEqual((done.returncode, done.stderr.count("\n")),
                         (0, n_warnings if words else 0), done.stderr)
        for word in words:
            self.assertIn(word, done.stderr)
        header, pieces, _ = parse(load(out), small)
        return header, pieces

    def test_merges_as_lists(self):
        self.assertEqual(self.pieces(tokenizer_json(model={"merges": list(map(list, MERGES))})),
                         self.pieces(tokenizer_json()))

    def test_merges(self):
        """Pairs have ranks from 0 on, and what none makes is never made."""
        changed = tokenizer_json(model={"merges": [" ".join(pair) for pair in MERGES[:4]]})
        header, _ = self.pieces(changed)
        self.assertEqual(header["pairs"], pairs_by_rank(MERGES[:4]))

    def test_merges_that_cannot_be(self):
        for merges, words in (([("a", "x")], ("'x' is no piece",)),
                              ([("a", "c")], ("'ac' is no piece",))):
            self.refused_json(tokenizer_json(model={"merges": list(map(list, merges))}), *words)
        control = dict(tokenizer_json()["model"]["vocab"], **{"<s>a": 268})
        changed = tokenizer_json(model={"vocab": control, "merges": [["<s>", "a"], ["a", "b"]]})
        header, _ = self.pieces(changed, words=("warning", "1 merges of control pieces"))
        self.assertEqual(header["pairs"], pairs_by_rank(MERGES[:1]))

    def refused_json(self, content, *words):
        folder = write_hf(self.path(), Small(True))
        os.remove(os.path.join(folder, "tokenizer.model"))
        save(os.path.join(folder, "tokenizer.json"), content)
        self.refused(folder, "tokenizer.json", *words)

    def test_flags(self):
        def metaspace(**settings):
            return {"normalizer": None, "pre_tokenizer": dict(type="Metaspace", **settings)}
        collapse = [{"type": "Strip", "strip_left": True, "strip_right": True},
                    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]
        normalizers = tokenizer_json()["normalizer"]["normalizers"]
        for changes, flags in (
                ({}, 1 | 2), ({"normalizer": normalizers[1]}, 0),
                (metaspace(), 1 | 2 | 4), (metaspace(prepend_scheme="first"), 1 | 4),
                ({"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                    {"type": "Metaspace", "prepend_scheme": "first"}]}}, 1 | 4),
                (metaspace(prepend_scheme="never"), 0), (metaspace(add_prefix_space=False), 0),
                ({"model": {"fuse_unk": False}}, 1 | 2)):
            self.assertEqual(self.pieces(tokenizer_json(**changes))[0]["flags"], flags, changes)
        for steps, flags, word in ((collapse, 1 | 2 | 8, "Strip"), (
                [{"type": "Replace", "pattern": {"String": "\n"}, "content": "\n "}],
                1 | 2 | 16, "newline")):
            content = tokenizer_json(normalizer={"type": "Sequence",
                                                 "normalizers": steps + normalizers})
            self.assertEqual(self.pieces(content, words=("warning", word))[0]["flags"], flags)
        for content, flags in ((sentencepiece(prefix=0), 0), (sentencepiece(), 3),
                               (sentencepiece() + field(3, field(4, 1)), 3 | 8)):
            header, _ = self.pieces(content, "tokenizer.model")
            self.assertEqual(header["flags"], flags)
        for legacy, flags in ((True, 3), (False, 1)):
            header, _ = self.pieces(sentencepiece(), "tokenizer.model",
                                    tokenizer_config={"legacy": legacy})
            self.assertEqual(header["flags"], flags)

        header, _ = self.pieces(sentencepiece(), "tokenizer.model", tokenizer_config={
            "legacy": False, "add_prefix_space": False})
        self.assertEqual(header["flags"], 0)

    @unittest.skipUnless(os.path.exists(DRUGS), "drugs is not built: run make first")
    def test_a_space_that_becomes_a_part_of_a_piece(self):
        """SentencePiece puts its space before the text and then looks for user-defined pieces."""
        path = self.path()
        save(path, flat(PADDED[:-1] + [(0, 4, b"  ")], Small(True), flags=1))
        a, spaced = ([piece[1:] for piece in PADDED].index((NORMAL, text)) for text in (b"a", b" a"))
        want = [[1, spaced], [1, 279, a], [1, 279, spaced]]
        done = subprocess.check_output([os.path.join(HERE, "tokens"), path],
                                       input=b"a\0 a\0  a\0")
        self.assertEqual([list(map(int, line.split())) for line in done.splitlines()], want)

    def test_metaspace_that_cuts(self):
        """It cuts before every space: then no piece with a space further in is ever made."""
        names = NAMES + ["a\u2581", "a\u2581b", "\u2581\u2581"]
        content = tokenizer_json(
            normalizer=None, pre_tokenizer={"type": "Metaspace", "split": True},
            model={"vocab": {name: token for token, name in enumerate(names)},
                   "merges": [["a", "\u2581"], ["a\u2581", "b"], ["\u2581", "\u2581"], ["a", "b"]]})
        header, _ = self.pieces(content)
        self.assertEqual(header["pairs"], pairs_by_rank(MERGES[:1]))

    def test_steps_that_are_refused(self):
        replace = {"type": "Replace", "pattern": {"String": "x"}, "content": "y"}
        space = tokenizer_json()["normalizer"]["normalizers"][1]
        for changes, word in (
                ({"normalizer": replace}, "Replace"), ({"normalizer": {"type": "Lowercase"}},
                                                       "Lowercase"),
                ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": False}},
                 "Strip"),
                ({"normalizer": {"type": "Prepend", "prepend": "x"}}, "Prepend"),
                ({"normalizer": {"type": "Prepend", "prepend": "\u2581"}}, "U+2581"),
                ({"normalizer": None}, "U+2581"),
                ({"normalizer": {"type": "Sequence", "normalizers": [
                    {"type": "Strip", "strip_left": True, "strip_right": True}, space]}}, "joins"),
                ({"normalizer": {"type": "Sequence", "normalizers": [
                    space, {"type": "Strip", "strip_left": True, "strip_right": True}]}}, "Strip"),
                ({"normalizer": {"type": "Sequence", "normalizers": [space, {
                    "type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]}},
                 "Replace"),
                ({"normalizer": {"type": "Prepend", "prepend": "\u2581"},
                  "pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"),
                ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
                ({"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "_"}},
                 "Metaspace"),
                ({"normalizer": None, "pre_tokenizer": {"type": "Metaspace",
                                                        "prepend_scheme": "last"}}, "last"),
                ({"decoder": {"type": "WordPiece"}}, "WordPiece"),
                ({"decoder": replace}, "Replace"),
                ({"post_processor": {"type": "BertProcessing"}}, "BertProcessing"),
                ({"post_processor": dict(BEGIN, single=BEGIN["single"][:1] + BEGIN["single"])},
                 "2 tokens before")):
            self.refused_json(tokenizer_json(**changes), word)

    def test_steps_that_are_told(self):
        space = tokenizer_json()["normalizer"]["normalizers"]
        ending = dict(BEGIN, single=BEGIN["single"] + [{"SpecialToken": {"id": "</s>"}}])
        added = [{"id": 270, "content": "xy", "special": False}]
        for content, word in (
                (tokenizer_json(normalizer={"type": "Sequence",
                                            "normalizers": [{"type": "NFC"}] + space}), "NFC"),
                (tokenizer_json(post_processor=ending), "appends </s>"),
                (tokenizer_json(added_tokens=[dict(added[0], lstrip=True)]), "(xy)"),
                (tokenizer_json(added_tokens=[dict(added[0], single_word=True)]), "(xy)"),
                (tokenizer_json(added_tokens=[dict(added[0], normalized=True)]), "(xy)")):
            self.pieces(content, words=("warning", word))

    def test_begin(self):
        """Whether a piece begins a text is the tokenizer's business, and which one."""
        without = tokenizer_json(post_processor=None)
        for content, name, settings, bos in (
                (tokenizer_json(), "json", {}, 1), (without, "json", {}, -1),
                (without, "json", {"add_bos_token": True}, 1),
                (without, "json", {"add_bos_token": True,
                                   "tokenizer_class": "PreTrainedTokenizerFast"}, -1),
                (tokenizer_json(), "json", {"add_bos_token": False}, -1),
                (sentencepiece(), "model", {}, 1),
                (sentencepiece(), "model", {"add_bos_token": False}, -1),
                (sentencepiece(), "model", {"bos_token": "</s>"}, 2),
                (sentencepiece(), "model", {"bos_token": {"content": "</s>"}}, 2)):
            header, _ = self.pieces(content, "tokenizer." + name, tokenizer_config=settings,
                                    words=("bos_token_id",) if bos == 2 else ())
            self.assertEqual(header["bos"], bos, settings)
        header, _ = self.pieces(sentencepiece(), "tokenizer.model", words=("bos_token_id",),
                                special_tokens_map={"bos_token": "</s>"})
        self.assertEqual(header["bos"], 2)
        self.pieces(tokenizer_json(post_processor=None, added_tokens=special(*"ab c".split()),
                                   model={"vocab": {"a": 0, "b": 1, "c": 2, "\u2581": 3},
                                          "merges": [], "byte_fallback": False, "unk_token": "c"}),
                    words=("says not which", "knows only", "token 2 ends"), n_warnings=3,
                    tokenizer_config={"add_bos_token": True})
        self.pieces(sentencepiece(), "tokenizer.model", words=("add_eos_token",),
                    tokenizer_config={"add_eos_token": True})

    def test_the_first_llama(self):
        """Its config.json names other ids than its tokenizer does."""
        header, _ = self.pieces(sentencepiece(), "tokenizer.model",
                                words=("token 0 begins", "token 1 ends"), n_warnings=2,
                                config={"bos_token_id": 0, "eos_token_id": 1})
        self.assertEqual((header["bos"], header["ends"]), (1, [2]))

    def test_ends(self):
        """Whatever is named as an end is one, if the tokenizer knows it as a piece of its own."""
        added = tokenizer_json(added_tokens=[
            {"id": token, "content": name, "special": special} for token, name, special in
            ((1, "<s>", True), (2, "</s>", True), (270, "<|x|>", True), (271, "<|y|>", False))])
        for config, files, ends in (
                ({"eos_token_id": [2, 270]}, {}, [2, 270]),
                ({}, {"generation_config": {"eos_token_id": [270, 271]}}, [2, 270, 271]),
                ({}, {"generation_config": {"eos_token_id": 270}}, [2, 270]),
                ({"eos_token_id": None}, {"tokenizer_config": {"eos_token": "<|x|>"}}, [270]),
                ({"eos_token_id": None},
                 {"special_tokens_map": {"eos_token": {"content": "<|y|>"}}}, [271]),
                ({"eos_token_id": -1}, {}, [2])):
            header, pieces = self.pieces(added, config=config, **files)
            self.assertEqual(header["ends"], ends)
            self.assertEqual(pieces[ends[-1]].kind, END)
        header, _ = self.pieces(added, config={"eos_token_id": [2, 10, 275]}, n_warnings=2,
                                words=("token 10", "token 275", "not believed"))
        self.assertEqual(header["ends"], [2])

    def test_without_an_end(self):
        small = Small(True)
        folder = write_hf(self.path(), small, config=hf_config(
            small, bos_token_id=None, eos_token_id=None))
        save(os.path.join(folder, "tokenizer.model"), sentencepiece(eos=-1))
        header, _, _ = parse(self.export(folder), small)
        self.assertEqual((header["bos"], header["ends"], header["chat"]), (1, [], []))

    def test_added_tokens(self):
        added = [{"id": 270, "content": "<|im|>", "special": True},
                 {"id": 271, "content": "x\u2581y", "special": False}]
        want = [(1, b"<|im|>"), (4, b"x y")]
        both = tokenizer_json(added_tokens=added)
        self.assertEqual(self.pieces(both)[1][270:272], want)
        _, pieces = self.pieces(sentencepiece(), "tokenizer.model", tokenizer=both)
        self.assertEqual(pieces[270:272], want)
        self.assertEqual(pieces[:3], [(2, b"<unk>"), (1, b"<s>"), (5, b"</s>")])
        _, pieces = self.pieces(sentencepiece(), "tokenizer.model", added_tokens={"x\u2581y": 271})
        self.assertEqual(pieces[270:272], [(1, b""), (4, b"x y")])
        decoder = {str(entry["id"]): {"content": entry["content"], "special": entry["special"]}
                   for entry in added}
        _, pieces = self.pieces(sentencepiece(), "tokenizer.model",
                                tokenizer_config={"added_tokens_decoder": decoder})
        self.assertEqual(pieces[270:272], want)
        # A tokenizer.json may lack them; and what a map names as special is no text.
        for name, content in ("tokenizer.json", tokenizer_json()), ("tokenizer.model", sentencepiece()):
            _, pieces = self.pieces(content, name, added_tokens={"<|im|>": 270, "x\u2581y": 271},
                                    special_tokens_map={"additional_special_tokens": ["<|im|>"]})
            self.assertEqual(pieces[270:272], want)

    def test_added_tokens_behind_the_last_row(self):
        want = self.pieces(sentencepiece(), "tokenizer.model")[1]
        _, pieces = self.pieces(sentencepiece(), "tokenizer.model", added_tokens={"[PAD]": 280},
                                words=("warning", "[PAD]", "dropped"))
        self.assertEqual(pieces, want)
        added = tokenizer_json()["added_tokens"] + [{"id": 999, "content": "[PAD]"}]
        self.pieces(tokenizer_json(added_tokens=added), words=("warning", "[PAD]", "dropped"))

    def test_a_tokenizer_that_knows_a_fraction(self):
        small = Small(True, vocab=320)
        folder = write_hf(self.path(), small)
        done = run(folder, "-o", self.path())
        self.assertEqual((done.returncode, done.stderr.count("\n")), (0, 1), done.stderr)
        self.assertIn("268 of the 320 ids", done.stderr)
        # tokenizer.json beside it knows more: then the other is an old one.
        names = NAMES + ["w%d" % n for n in range(50)]
        content = tokenizer_json(model={"vocab": {name: n for n, name in enumerate(names)}})
        save(os.path.join(folder, "tokenizer.json"), content)
        out = self.path()
        done = run(folder, "-o", out)
        self.assertEqual((done.returncode, done.stderr.count("\n")), (0, 1), done.stderr)
        self.assertIn("lacks 50 pieces", done.stderr)
        _, pieces, _ = parse(load(out), small)
        self.assertEqual(pieces[317], (0, b"w49"))

    def test_doubled_pieces(self):
        """A tokenizer of an unknown kind, say."""
        small = Small(True, vocab=400)
        folder = write_hf(self.path(), small)
        save(os.path.join(folder, "t.bin"), tokenizer_bin()
             + 120 * (struct.pack("<fi", -1, 1) + b"a"))
        done = run(folder, "-o", self.path(), "--tokenizer", os.path.join(folder, "t.bin"))
        self.assertEqual((done.returncode, done.stderr.count("\n")), (0, 1), done.stderr)
        self.assertIn("120 pieces that spell the same", done.stderr)

    def test_no_bytes(self):
        header, pieces = self.pieces(tokenizer_json(model={"byte_fallback": False}))
        self.assertEqual((header["flags"], pieces[3]), (3, (0, b"<0x00>")))
        self.assertEqual(set(header["units"]), {*map(ord, LETTERS), 32})

    def test_unknown_characters_one_by_one(self):
        """Without bytes, and not fused: no published Llama has it, and drugs.c neither."""
        self.refused_json(tokenizer_json(model={"byte_fallback": False, "fuse_unk": False}), "fuse_unk")
        self.pieces(tokenizer_json(model={"fuse_unk": False}))

    def test_a_normaliser_is_worth_a_warning(self):
        self.pieces(sentencepiece() + field(3, field(2, b"map")), "tokenizer.model",
                    words=("warning", "normaliser"))


    def test_ids(self):
        """What the file says, done naively, gives the ids that Hugging Face gave for these."""
        for changes, text, want in UNCUT_IDS:
            content = tokenizer_json(**changes)
            content["added_tokens"].append({"id": 268, "content": "xy", "special": False})
            header, _ = self.pieces(content)
            file = types.SimpleNamespace(**header)
            self.assertEqual(encode_like_huggingface(file, text, begin=False), want, text)


# What Hugging Face's own library makes of these texts, if xy is an added token.
LEGACY = {}
FIRST = {"normalizer": None, "pre_tokenizer": {
    "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}}
ALWAYS = {"normalizer": None, "pre_tokenizer": {
    "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}}
FUSED = {"model": {"byte_fallback": False}}
UNCUT_IDS = [
    (LEGACY, 'ab', [266]),
    (LEGACY, ' ab', [259, 266]),
    (LEGACY, 'a  abc\u00e9 ab', [265, 259, 266, 262, 263, 266]),
    (LEGACY, 'x\u6f22\u6f22 ab', [259, 123, 233, 191, 165, 233, 191, 165, 266]),
    (LEGACY, '\u2581ab xyab', [259, 266, 259, 268, 266]),
    (FIRST, 'ab', [266]),
    (FIRST, ' ab', [266]),
    (FIRST, 'a  abc\u00e9 ab', [265, 259, 266, 262, 263, 266]),
    (FIRST, 'x\u6f22\u6f22 ab', [259, 123, 233, 191, 165, 233, 191, 165, 266]),
    (FIRST, '\u2581ab xyab', [266, 259, 268, 264]),
    (ALWAYS, 'ab', [266]),
    (ALWAYS, ' ab', [266]),
    (ALWAYS, 'a  abc\u00e9 ab', [265, 259, 266, 262, 263, 266]),
    (ALWAYS, 'x\u6f22\u6f22 ab', [259, 123, 233, 191, 165, 233, 191, 165, 266]),
    (ALWAYS, '\u2581ab xyab', [266, 259, 268, 266]),
    (FUSED, 'ab', [266]),
    (FUSED, ' ab', [259, 266]),
    (FUSED, 'a  abc\u00e9 ab', [265, 259, 266, 262, 263, 266]),
    (FUSED, 'x\u6f22\u6f22 ab', [259, 0, 266]),
    (FUSED, '\u2581ab xyab', [259, 266, 259, 268, 266]),
]


# ------------------------------------------------------------------------------------------------
# Byte-level vocabularies


def shown(data):
    """Bytes as GPT-2 writes them: those that cannot be seen become characters from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in plain]
    return "".join(chr(byte if byte in plain else 256 + hidden.index(byte)) for byte in data)


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = ["th", "he", "the", " the", "\n\n", "  ", "12", "123", "\u00e9", "ab", "aba", "abab", "'s"]
PAIRS = ["h e", "t he", "t h", "\u0120 the", "\u010a \u010a", "\u0120 \u0120", "1 2", "12 3",
         "\u00c3 \u00a9", "a b", "ab a", "a ba", "aba b", "ab ab", "' s"]
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
GPT2_STEPS = LEVEL
SMOLLM_STEPS = {"type": "Sequence", "pretokenizers": [
    {"type": "Digits", "individual_digits": True}, LEVEL]}


def split_steps(*patterns):
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in patterns] + [dict(LEVEL, use_regex=False)]}


def llama3(digits):
    return (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits +
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def llama3_steps(digits):
    return split_steps(llama3(digits))


LLAMA3_PATTERN = llama3(r"\p{N}{1,3}")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_STEPS = split_steps(
    r"[^\r\n\p{L}\p{N}]?" + UPPER + "*" + LOWER + r"+|[^\r\n\p{L}\p{N}]?" + UPPER + "+" + LOWER +
    r"*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK_STEPS = split_steps(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+",
                             "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")
DEEPSEEK_STEPS["pretokenizers"][-1:-1] = [{"type": "Digits", "individual_digits": True}]


def byte_level(steps, special=SPECIAL, absent=(), words=(), **model):
    """`words`: more pieces, which no merge makes."""
    names = [shown([byte]) for byte in range(256) if byte not in absent]
    names += [shown(word.encode()) for word in WORDS + ["ba"]]
    names += [name for name in dict.fromkeys(shown(word.encode()) for word in words)
              if len(name) > 1 and name not in names]
    vocab = {name: token for token, name in enumerate(special + names)}
    return {"added_tokens": [{"id": token, "content": name, "special": True}
                             for token, name in enumerate(special)],
            "normalizer": None, "pre_tokenizer": steps, "post_processor": None,
            "decoder": dict(LEVEL, add_prefix_space=True),
            "model": dict({"type": "BPE", "unk_token": None, "fuse_unk": False, "vocab": vocab,
                           "byte_fallback": False, "merges": PAIRS + ["b a"]}, **model)}


LLAMA3_STEPS = llama3_steps(r"\p{N}{1,3}")
# What Hugging Face's own library makes of these texts with these vocabularies.
BYTE_LEVEL_IDS = [
    (GPT2_STEPS, 'the the', [261, 262]),
    (GPT2_STEPS, "'s'S", [271, 42, 86]),
    (GPT2_STEPS, '  the\n\n12345 6', [35, 262, 13, 13, 266, 55, 56, 35, 57]),
    (GPT2_STEPS, '\xe9\u0663\xb2 !?\r\n\n x',
     [267, 220, 166, 197, 181, 35, 36, 66, 16, 263, 35, 123]),
    (GPT2_STEPS, 'a\u00a0 b \t ', [100, 197, 163, 35, 101, 35, 12, 35]),
    (GPT2_STEPS, "\u017f'\u017f\u2028\u3000\U0001f600",
     [200, 194, 42, 200, 194, 229, 131, 171, 230, 131, 131, 243, 162, 155, 131]),
    (SMOLLM_STEPS, 'the the', [261, 262]),
    (SMOLLM_STEPS, "'s'S", [271, 42, 86]),
    (SMOLLM_STEPS, '  the\n\n12345 6', [35, 262, 263, 52, 53, 54, 55, 56, 35, 57]),
    (SMOLLM_STEPS, '\xe9\u0663\xb2 !?\r\n\n x',
     [267, 220, 166, 197, 181, 35, 36, 66, 16, 263, 35, 123]),
    (SMOLLM_STEPS, 'a\u00a0 b \t ', [100, 197, 163, 35, 101, 35, 12, 35]),
    (SMOLLM_STEPS, "\u017f'\u017f\u2028\u3000\U0001f600",
     [200, 194, 42, 200, 194, 229, 131, 171, 230, 131, 131, 243, 162, 155, 131]),
    (LLAMA3_STEPS, 'the the', [261, 262]),
    (LLAMA3_STEPS, "'s'S", [271, 42, 86]),
    (LLAMA3_STEPS, '  the\n\n12345 6', [35, 262, 263, 266, 55, 56, 35, 57]),
    (LLAMA3_STEPS, '\xe9\u0663\xb2 !?\r\n\n x',
     [267, 220, 166, 197, 181, 35, 36, 66, 16, 263, 35, 123]),
    (LLAMA3_STEPS, 'a\u00a0 b \t ', [100, 197, 163, 35, 101, 35, 12, 35]),
    (LLAMA3_STEPS, "\u017f'\u017f\u2028\u3000\U0001f600",
     [200, 194, 42, 200, 194, 229, 131, 171, 230, 131, 131, 243, 162, 155, 131]),
]


class TestByteLevel(Case):
    def read(self, content, quiet=True, vocab=280):
        small = Small(True, vocab=vocab)
        folder = write_hf(self.path(), small, config=hf_config(
            small, bos_token_id=None, eos_token_id=None))
        os.remove(os.path.join(folder, "tokenizer.model"))
        save(os.path.join(folder, "tokenizer.json"), content)
        data = self.export(folder, quiet=quiet)
        back = self.path()
        save(self.path("m.bin"), data)
        self.assertEqual(run(os.path.join(self.folder, "m.bin"), "--to", "hf", back).returncode, 0)
        self.assertEqual(self.export(back, quiet=quiet), data)
        return read_file(data)

    def test_patterns(self):
        digits = r"\p{N}"
        for steps, patterns in (
                (GPT2_STEPS, [GPT2]), (SMOLLM_STEPS, [digits, GPT2]), (LLAMA3_STEPS, [LLAMA3_PATTERN]),
                (dict(LEVEL, use_regex=False), []), (split_steps(digits, r"\s+"), [digits, r"\s+"]),
                ({"type": "Sequence", "pretokenizers": [
                    {"type": "Digits", "individual_digits": False}, LEVEL]}, [digits + "+", GPT2]),
                ({"type": "Sequence", "pretokenizers": [
                    {"type": "Split", "pattern": {"String": "a.b|c"}, "behavior": "Isolated"},
                    LEVEL]}, [r"a\.b\|c", GPT2])):
            file = self.read(byte_level(steps))
            self.assertEqual((file.patterns, file.flags, file.words), (patterns, 0, {}))
            self.assertEqual(set(file.units), {0x110000 + byte for byte in range(256)})
        self.assertEqual(len(self.read(byte_level(steps, ignore_merges=True)).words), 256 + 14)
        for prefixed in dict(LEVEL, add_prefix_space=True), dict(LEVEL, add_prefix_space=True,
                                                                 use_regex=False):
            self.assertEqual(self.read(byte_level(prefixed)).flags, 1 | 2 | 4)

    def test_pieces(self):
        file = self.read(byte_level(GPT2_STEPS))
        self.assertEqual([piece.text for piece in file.pieces[:3]],
                         [name.encode() for name in SPECIAL])
        self.assertEqual([piece.text for piece in file.pieces[3:259]],
                         [bytes([byte]) for byte in range(256)])
        self.assertEqual([piece.text for piece in file.pieces[259:272]],
                         [word.encode() for word in WORDS])
        of_text = {piece.text: token for token, piece in reversed([*enumerate(file.pieces)][3:])}
        self.assertEqual(file.pairs, {
            (of_text[left], of_text[right]): (rank, of_text[left + right]) for rank, (left, right)
            in enumerate([(b"h", b"e"), (b"t", b"he"), (b"t", b"h"), (b" ", b"the"), (b"\n", b"\n"),
                          (b" ", b" "), (b"1", b"2"), (b"12", b"3"), (b"\xc3", b"\xa9"), (b"a", b"b"),
                          (b"ab", b"a"), (b"a", b"ba"), (b"aba", b"b"), (b"ab", b"ab"), (b"'", b"s"),
                          (b"b", b"a")])})

    def test_classes(self):
        """Characters of one class are those that no set of a pattern tells apart."""
        file = self.read(byte_level(GPT2_STEPS))
        self.assertLessEqual(len(file.ranges), 1 << 16)
        for before, after in zip(file.ranges, file.ranges[1:]):
            self.assertLess(before[1], after[0])
        kinds = {code: kind for first, last, kind in file.ranges for code in range(first, last + 1)}
        groups = ["azAZ\u00aa\u00b5\u00df\u03c0\u0436\u4e2d\U00020000\u02b0".replace("a", "b", 1),
                  "059\u00b2\u00bd\u0663\u2164\u2460\U0001d7d8",
                  "\t\n\v\f\r\u0085\u00a0\u1680\u2003\u2028\u2029\u202f\u205f\u3000",
                  "!_\u0301\u200b\x1c\x1f\0\U0001f600\ufeff\ud800", " ", "'", "s", "t", "r", "e", "v",
                  "m", "l", "d"]
        found = [{kinds.get(ord(character), 0) for character in group} for group in groups]
        self.assertEqual([len(group) for group in found], [1] * len(groups))
        self.assertEqual(sorted(map(max, found)), list(range(file.n_classes)))

    def test_bytes_that_have_no_piece(self):
        never = [0xc0, 0xc1, *range(0xf5, 0x100)]
        self.assertEqual(len(self.read(byte_level(SMOLLM_STEPS, absent=never)).units), 243)
        small = Small(True)
        folder = write_hf(self.path(), small)
        os.remove(os.path.join(folder, "tokenizer.model"))
        save(os.path.join(folder, "tokenizer.json"), byte_level(SMOLLM_STEPS, absent=[1, 2]))
        done = run(folder, "-o", self.path())
        self.assertEqual((done.returncode, done.stderr.count("\n")), (0, 1))
        self.assertIn("no pieces for 2 bytes", done.stderr)

    def test_what_is_refused(self):
        folder = write_hf(self.path(), Small(True))
        os.remove(os.path.join(folder, "tokenizer.model"))
        digits = SMOLLM_STEPS["pretokenizers"][0]
        split, level = llama3_steps(r"\p{N}")["pretokenizers"]

        def row(*steps):
            return {"type": "Sequence", "pretokenizers": list(steps)}
        for steps, word in (
                (digits, "ByteLevel"), (split, "ByteLevel"), (row(level, split), "Split"),
                (row(dict(split, behavior="Removed"), level), "Removed"),
                (row(dict(split, invert=True), level), "invert"),
                (row(level, digits), "Digits"), (row(level, level), "ByteLevel"),
                (row(*17 * [digits], level), "17 patterns"),
                (row(digits, dict(LEVEL, add_prefix_space=True)), "ByteLevel")):
            save(os.path.join(folder, "tokenizer.json"), byte_level(steps))
            self.refused(folder, "tokenizer.json", word)
        for pattern, word in (
                ("a*?", "followed by ?"), ("a++", "followed by +"), (r"(a)\1", r"\1"), ("^a", "^"),
                ("a$", "$"), ("a.b", "."), (r"\bx", r"\b"), ("(?<=a)b", "(?<="), ("(?=ab)c", "look-ahead"),
                ("a*", "nothing at all"), ("a|", "nothing at all"), ("(?!a)", "nothing at all"),
                ("(a*)+b", "can be empty"), ("[[:alpha:]]", "[:"), ("[a&&b]", "&&"), ("[b-a]", "range"),
                ("(?i:ss)", "ss"), ("(?i:x|fi)", "fi"), (r"(?i:\p{L})", "any case"),
                (r"\p{Greek}", "Greek"), (r"\p{Xx}", "Xx"), ("a{2,1}", "wrong number"),
                ("a{5000}", "wrong number"), ("a{,3}", "{"), ("(", "("), ("a)", ")"), ("[a", "too early"),
                ("(?>a)", "(?>"), ("(?P<n>a)", "(?P"), ("(?:" * 40 + "a" + "{1,9})" * 40, "too long")):
            save(os.path.join(folder, "tokenizer.json"), byte_level(split_steps(pattern)))
            self.refused(folder, word)

    def test_ids(self):
        """What the file says, done naively, gives the ids that Hugging Face gave for these."""
        for steps, text, want in BYTE_LEVEL_IDS:
            file = self.read(byte_level(steps))
            got = encode_like_huggingface(file, text)
            self.assertEqual(got, want, (text, [file.pieces[token].text for token in got]))


# ------------------------------------------------------------------------------------------------
# Chats



def loop(body):
    return "{% for message in messages %}" + body + "{% endfor %}"


CHATML = (loop("{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
               "'<|im_end|>\\n'}}")
          + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SMOLLM = ("{% if messages[0]['role'] != 'system' %}"
          "{{ '<|im_start|>system\\nBe small.<|im_end|>\\n' }}{% endif %}" + CHATML)
LLAMA3 = (loop("{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message"
               "['content'] | trim + '<|eot_id|>' }}")
          + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}")
LLAMA31 = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{#- The system prompt is always there. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set text = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set text = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" ~ "Today Date: " ~ date_string + "\\n\\n" }}
{{- text + "<|eot_id|>" -}}
""" + LLAMA3
ZEPHYR = loop("\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
              "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + "
              "message['content'] + eos_token }}\n{% else %}\n{{ '<|assistant|>\n' + "
              "message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and "
              "add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n")
LLAMA2 = ("{% if messages[0].role == 'system' %}{% set said = messages[0].content %}"
          "{% set messages = messages[1:] %}{% else %}{% set said = false %}{% endif %}"
          + loop("{% if loop.first and said != false %}{% set content = '<<SYS>>\\n' + said + "
                 "'\\n<</SYS>>\\n\\n' + message.content %}{% else %}{% set content = message.content %}"
                 "{% endif %}{% if message.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() "
                 "+ ' [/INST]' }}{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"))
ALTERNATE = ("{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
             "{{ raise_exception('roles must alternate') }}{% endif %}")
MISTRAL_OLD = "{{ bos_token }}" + loop(
    ALTERNATE + "{% if message.role == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token + ' ' }}{% endif %}")
MISTRAL_V1 = "{{- bos_token }}" + loop(
    """{% if message.role == 'user' %}{{- " [INST] " + message["content"] + " [/INST]" }}"""
    """{% elif message.role == 'assistant' %}{{- " " + message["content"] + eos_token }}{% endif %}""")
# It moves the system prompt to the last question.
MISTRAL_V3 = """
{%- set ns = namespace(system='', questions=messages | selectattr('role', 'equalto', 'user') | list) %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.system = message.content + '\\n\\n' %}
    {%- elif message.role == 'user' and message == ns.questions[-1] %}
        {{- '[INST] ' + ns.system + message.content + '[/INST]' }}
    {%- elif message.role == 'user' %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
YI = ("{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}" + loop(
    "{% if message.role == 'user' %}{{ '<|im_start|>user\\n' + message.content + '<|im_end|>\\n"
    "<|im_start|>assistant\\n' }}{% elif message.role == 'assistant' %}{{ message.content + "
    "'<|im_end|>\\n' }}{% endif %}"))
TULU = loop("{{ '<|' + message.role + '|>\\n' + message.content + (eos_token if message.role == "
            "'assistant' else '') }}{{ '\\n' if message.role != 'assistant' or not loop.last }}"
            "{{ '<|assistant|>\\n' if loop.last and add_generation_prompt }}")
VICUNA = ("{{ (messages[0].content if messages[0].role == 'system' else 'A chat.') + ' ' }}"
          + loop("{% if message.role == 'user' %}USER: {{ message.content | trim }} "
                 "{% elif message.role == 'assistant' %}ASSISTANT: {{ message.content }}{{ eos_token }}"
                 "{% endif %}") + "{% if add_generation_prompt %}ASSISTANT:{% endif %}")


def heads(before, after):
    return {role: before + role + after for role in ("system", "user", "assistant")}


IM, ID = heads("<|im_start|>", "\n"), heads("<|start_header_id|>", "<|end_header_id|>\n\n")
CHATML_CHAT = [IM["user"], IM["system"], "<|im_end|>\n" + IM["user"], "\n" + IM["user"],
               "<|im_end|>\n" + IM["assistant"], "<|im_end|>"]
SMOLLM_CHAT = ["<|im_start|>system\nBe small.<|im_end|>\n" + IM["user"]] + CHATML_CHAT[1:]
LLAMA3_CHAT = [ID["user"], ID["system"], "<|eot_id|>" + ID["user"], ID["user"],
               "<|eot_id|>" + ID["assistant"], "<|eot_id|>"]
DATES = ID["system"] + "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA31_CHAT = [DATES + "<|eot_id|>" + ID["user"], DATES] + LLAMA3_CHAT[2:]
ZEPHYR_CHAT = ["<|user|>\n", "<|system|>\n", "</s>\n<|user|>\n", "\n<|user|>\n",
               "</s>\n<|assistant|>\n", "</s>"]
LLAMA2_CHAT = ["<s>[INST] ", "<s>[INST] <<SYS>>\n", "\n<</SYS>>\n\n", "<s>[INST] ", " [/INST]",
               " </s>"]
MISTRAL_V1_CHAT = ["<s> [INST] ", "", "", " [INST] ", " [/INST]", "</s>"]
MISTRAL_V3_CHAT = ["<s>[INST] ", "<s>[INST] ", "\n\n", "[INST] ", "[/INST]", "</s>"]
# What each string takes of the spaces that were typed before it (1) and after it (2).
TRIMMED = [2, 2, 3, 2, 1, 0]
CONTROLS = ("<|im_start|> <|im_end|> <|eot_id|> <|eom_id|> <|start_header_id|> <|end_header_id|> "
            "[INST] [/INST]").split()


def with_begin(chat):
    return ["<s>" + text for text in chat[:2]] + chat[2:]


class TestChats(Case):
    def chat(self, template, words=(), controls=(), beside={}, files={}, more=(), special=True,
             **config):
        """(the six strings, what they take, the pieces that end a text)."""
        small = Small(True)
        folder = write_hf(self.path(), small, config=hf_config(small, **config))
        settings = {"chat_template": template} if template else {}
        save(os.path.join(folder, "tokenizer_config.json"), dict(settings, **beside))
        added = [{"id": 268 + n, "content": name, "special": special}
                 for n, name in enumerate(controls)]
        added = tokenizer_json()["added_tokens"] + added
        save(os.path.join(folder, "tokenizer.json"), tokenizer_json(added_tokens=added))
        for name, content in files.items():
            save(os.path.join(folder, name), content)
        self.out, again = self.path(), self.path()
        done = run(folder, "-o", self.out, *more)
        self.assertEqual((done.returncode, done.stderr.count("\n")), (0, bool(words)), done.stderr)
        for word in words:
            self.assertIn(word, done.stderr)
        back = run(self.out, "--to", "hf", again)
        self.assertEqual(back.returncode, 0, back.stderr)
        self.assertEqual(self.export(again, quiet=not words), load(self.out), template)
        file = read_file(load(self.out))
        return file.chat, file.takes, [piece.text.decode() for piece in file.pieces
                                       if piece.kind == END]

    def test_forms(self):
        """Whatever a template writes around what is said, and whatever it takes of the spaces."""
        as_typed, system = [0] * 6, ("no place for a system prompt",)
        for template, chat, takes, end, words in (
                (CHATML, CHATML_CHAT, as_typed, "<|im_end|>", ()),
                (SMOLLM, SMOLLM_CHAT, as_typed, "<|im_end|>", ()),
                (LLAMA3, LLAMA3_CHAT, TRIMMED, "<|eot_id|>", ()),
                (LLAMA31, with_begin(LLAMA31_CHAT), TRIMMED, "<|eot_id|>", ()),
                (ZEPHYR, ZEPHYR_CHAT, as_typed, "</s>", ()),
                (LLAMA2, LLAMA2_CHAT, [2, 0, 0, 2, 1, 0], "</s>", ()),
                (MISTRAL_OLD, ["<s>[INST] ", "", "", " [INST] ", " [/INST]", "</s>"], as_typed, "</s>",
                 system + ("roles must alternate",)),
                (MISTRAL_V1, MISTRAL_V1_CHAT, as_typed, "</s>", system),
                (MISTRAL_V3, MISTRAL_V3_CHAT, as_typed, "</s>",
                 ("system prompt", "in round 1 of five it writes 'Who")),
                (YI, [IM["user"], "", IM["user"], "\n" + IM["user"], CHATML_CHAT[4], "<|im_end|>"],
                 as_typed, "<|im_end|>", ()),
                (TULU, ["<|user|>\n", "<|system|>\n", "\n<|user|>\n", "\n<|user|>\n",
                        "\n<|assistant|>\n", "</s>"], as_typed, "</s>", ()),
                (VICUNA, ["A chat. USER: ", "", " USER: ", "USER: ", " ASSISTANT:", "</s>"],
                 [2, 0, 2, 2, 1, 0], "</s>", ())):
            got = self.chat(template, controls=CONTROLS, words=words)
            self.assertEqual(got[:2], (chat, takes), template)
            self.assertIn(end, got[2])

    def test_a_date(self):
        """Today's is never written: the same model writes the same text tomorrow."""
        asking = LLAMA31.replace('{%- set date_string = "26 Jul 2024" %}', """
            {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
            {%- else %}{%- set date_string = "1 Jan 2030" %}{%- endif %}""")
        chat, _, _ = self.chat(asking, controls=CONTROLS, words=("today's date",))
        self.assertIn("Today Date: 1 Jan 2030\n", chat[0])
        self.assertEqual(self.chat("{{ strftime_now('%Y') }}" + CHATML, controls=CONTROLS,
                                   words=("no -m chat", "calls strftime_now"))[0], [])

    def test_named_forms(self):
        mistral = ["<s>[INST] ", "<s>[INST] ", "\n\n", "[INST] ", " [/INST]", "</s>"]
        modern = {"beside": {"legacy": False}}
        from_inst = [2, 2, 0, 2, 1, 0]
        for form, chat, takes, controls, config in (
                ("llama2", LLAMA2_CHAT, [2, 0, 0, 2, 1, 0], (), {}),
                ("mistral", mistral, from_inst, (), {}),
                ("mistral", ["<s> [INST] "] * 2 + ["\n\n", " [INST] "] + mistral[4:], from_inst, (),
                 modern),
                # A text behind [INST] begins with one space, whoever puts it.
                ("mistral", ["<s>[INST]"] * 2 + ["\n\n", "[INST]", "[/INST]", "</s>"], from_inst,
                 CONTROLS, {}),
                ("mistral", MISTRAL_V3_CHAT, from_inst, CONTROLS, modern),
                ("llama3", LLAMA3_CHAT, TRIMMED, CONTROLS, {}),
                ("chatml", CHATML_CHAT, TRIMMED, CONTROLS, {}), ("zephyr", ZEPHYR_CHAT, TRIMMED, (), {}),
                ("plain", ["User: ", "", "\nUser: ", "\nUser: ", "\nAssistant:", ""], TRIMMED, (), {})):
            got = self.chat(None, more=("--chat", form), controls=controls, **config)
            self.assertEqual(got[:2], (chat, takes), form)
        # It is what the user says that counts, not the template.
        got = self.chat(CHATML, more=("--chat", "llama2"), controls=CONTROLS)
        self.assertEqual(got[0], LLAMA2_CHAT)
        for beside in {}, {"chat_template": None}:
            self.assertEqual(self.chat(None, beside=beside)[0], [])

    def test_what_is_no_six_strings(self):
        for template, word in (
                ("{{ messages }}", "once, and in order"), ("{{ messages[0].content }}" * 2, "once"),
                (loop("{{ message.content }}"), "nothing around"),
                ("{% for tool in tools %}{{ tool }}{% endfor %}" + CHATML, "loops over None"),
                ("{{ raise_exception('needs functions') }}", "it says: needs functions"),
                (CHATML + "{{ '<think>\\n' if add_generation_prompt }}", "in round 1 of five"),
                (CHATML.replace("message['content']", "message['content'].split('</think>')[-1]"),
                 "in round 2 of five it writes"),
                (CHATML.replace("message['content']", "message['content'] | truncate(9)"), "truncate"),
                (CHATML.replace("message['content']", "message['content'].strip('\\n')"), "spaces"),
                (CHATML.replace("message['content']", "message['content'] | tojson"), "spaces"),
                ("{% include 'x' %}" + CHATML, "{% include 'x' %}"),
                (CHATML + "{{ messages | length if messages | length > 4 }}", "in round 5 of five"),
                ("{% if x %}", "no {% endif %}"), ("{{ 1 +", "does not end"), ("{{ 1 + }}", "1 +"),
                ("{{ a.b.c }}", "its c"), (7, "no text")):
            got, _, ends = self.chat(template, words=("warning", "no -m chat", word), controls=CONTROLS)
            self.assertEqual((got, ends), ([], ["</s>"]), template)

    def test_hostile_templates(self):
        """Nothing is run, and everything ends."""
        many = "{% for a in range(9999) %}" * 3 + "x" + "{% endfor %}" * 3
        for text in (
                many, "{{ range(99999999999) }}", "{% set a = namespace(t='xx') %}{% for i in range(99) "
                "%}{% set a.t = a.t + a.t %}{% endfor %}", "{{ 'x' * 99 }}", "{{ 9 ** 9 }}",
                "{% set a = namespace(n=9) %}{% for i in range(99) %}{% set a.n = a.n * a.n %}"
                "{% endfor %}", "{% set a = namespace(l=[1]) %}{% for i in range(99) %}{% set a.l = "
                "[a.l, a.l] %}{% endfor %}{{ a.l }}", "{% set a = namespace() %}{% set a.a = a %}{{ a }}",
                "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ " + "(" * 999 + " }}",
                "{{ " + "not " * 9000 + "1 }}", "{{ " + "-" * 5000 + "1 }}", "{{ 1 / 0 }}",
                "{% set a = 'a'.join(range(999) | map('string')) %}{{ a.replace('', a) }}",
                "{{ ''.__class__() }}", "{{ messages.__class__.__bases__[0]() }}", "{{ 'x'.format() }}",
                "{{ (lambda: 1)() }}", "{{ [x for x in messages] }}", "{{ cycler.__init__.__globals__() }}",
                "{{ namespace.__init__() }}", "{% break %}", "{{ `x` }}", "{{ f(**a) }}", "{{ a := 1 }}",
                "{% set raise_exception.x = 1 %}", "{{ 'a' ~ 2 * 3 }}", "{% for x in 1 %}{% endfor %}"):
            with self.assertRaises(export.Refused, msg=text[:80]):
                export.Template(text).render(messages=[], tools=None)

    def test_the_language(self):
        """What Jinja makes of these, as Hugging Face sets it."""
        talk = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b"}]
        for text, want in (
                ("a\n{% if true %}\n  b\n  {% endif %}\nc\n", "a\n  b\nc"),
                ("  {%- if 1 %} x {%- endif -%}  y", " xy"), ("  {%+ if 1 %}x{% endif +%}\n", "  x"),
                ("a {# b #}\n c", "a  c"), ("a {#- b -#}\n c", "ac"), ("{{ 'a' -}}  b", "ab"),
                ("{{ 'a\nb' }}\r\nc", "a\nb\nc"), (r"{{ 'a\n\'\u00e9' + " + '"b%}{}" }}', "a\n'\u00e9b%}{}"),
                ("{{ 1 + 2 * 3 // 2 % 4 - 1 / 2 }}", "3.5"), ("{{ 'a' ~ 1 ~ none ~ x }}", "a1None"),
                ("{{ 'a' if x }}{{ 'b' if not x else 'c' }}", "b"), ("{{ 1 < 2 < 3 and 'y' or 'n' }}", "y"),
                ("{{ ' A ' | trim | lower + 'B' }}", "aB"), ("{{ -1 | string | length }}", "-1"),
                ("{{ x is defined or x is not none }}{{ 3 is odd }}", "TrueTrue"),
                ("{{ 'a' is equalto 'a' and 1 is in([1]) }}", "True"), ("{{ 'x' in 'axb' }}", "True"),
                ("{{ messages[0].content.strip() + messages[-1]['content'] }}", "ab"),
                ("{{ messages[1:] | map(attribute='role') | join(', ') }}", "assistant"),
                ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
                ("{{ (messages | rejectattr('nothing') | first).role }}{{ x[0] if x else y }}", "user"),
                ("{{ {'a': [1, (2, 3)]}['a'][1][0] }}{{ [1, 2, 3][::-1] | tojson }}", "2[3, 2, 1]"),
                ("{{ x | default('d') + '' | default('e', true) }}", "de"),
                ("{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ loop.last }}{% endfor %}",
                 "1True"),
                ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% else %}none{% endfor %}", "a1"),
                ("{% for a in [] %}{% else %}none{% endfor %}", "none"),
                ("{% for a in [1, 2, 3] %}{% if a == 2 %}{% continue %}{% endif %}{{ a }}{{ loop.revindex0 }}"
                 "{{ loop.previtem }}{{ loop.nextitem }}{% endfor %}", "122302"),
                ("{% for a in [1, 2] %}{% set b = a %}{% break %}{% endfor %}{{ b is defined }}", "False"),
                ("{% set a, b = 1, 2 %}{{ b - a }}{% set c %}x{{ a }}{% endset %}{{ c }}",
                 "1x1"),
                ("{% set n = namespace(a=1) %}{% for i in range(2, 4) %}{% set n.a = n.a + i %}{% endfor %}"
                 "{{ n.a }}", "6"),
                ("{% macro m(a, b='c') %}[{{ a }}{{ b }}]{% endmacro %}{{ m(1) + m(2, b=3) }}", "[1c][23]"),
                ("{% generation %}x{% endgeneration %}{{ true }}{{ 'a|b' | replace('|', '-') }}", "xTruea-b"),
                ("{% if x %}1{% elif none %}2{% elif 1 %}3{% else %}4{% endif %}", "3"),
                ("{{ messages[0].return is defined }}{{ messages[0].class }}", "False")):
            self.assertEqual(export.Template(text).render(messages=talk), want, text)

    def test_where_a_template_is_kept(self):
        several = [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}]
        for beside, files in (({"chat_template": several}, {}),
                              ({}, {"chat_template.jinja": CHATML.encode()}),
                              ({}, {"chat_template.json": {"chat_template": CHATML}})):
            got = self.chat(None, beside=beside, files=files, controls=CONTROLS)
            self.assertEqual(got[0], CHATML_CHAT)

    def test_a_begin_that_only_the_template_puts(self):
        for template, chat in (LLAMA31, with_begin(LLAMA31_CHAT)), (CHATML, CHATML_CHAT):
            got = self.chat(template, controls=CONTROLS, beside={"add_bos_token": False})
            self.assertEqual(got[0], chat)

    def test_what_is_typed_is_no_mark(self):
        """Nor is it where the vocabulary says that any text may have the piece."""
        self.chat(CHATML, controls=CONTROLS + ["<x>", "  "], special=False)
        kinds = {piece.text: piece.kind for piece in read_file(load(self.out)).pieces}
        self.assertEqual([kinds[name.encode()] for name in ("<|im_start|>", "<|im_end|>", "<x>", "  ")],
                         [CONTROL, END, USER_DEFINED, USER_DEFINED])

    def test_any_six_strings_come_back(self):
        small, path, folder = Small(True), self.path(), self.path()
        chat = ["#2 'a' \"b\" \\", "\u00e9\U0001f600\n", "{{ x }}", "", "BOS#1", "\t</s>"]
        for takes in itertools.product((0, 2), (0, 2), range(4), (0, 2), (0, 1), (0,)):
            data = flat(PADDED, small, chat=chat, takes=takes)
            save(path, data)
            done = run(path, "--to", "hf", folder)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertEqual(self.export(folder), data)
            shutil.rmtree(folder)

    @unittest.skipUnless(os.path.exists(DRUGS), "drugs is not built: run make first")
    def test_what_drugs_reads(self):
        """As many tokens as the template has it, whatever spaces are typed; and no system prompt where
        none has a place."""
        def read(*more, said):
            done = subprocess.run([DRUGS, self.out, "-m", "chat", "-n", "1", *more], input=said,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            return done.returncode, done.stderr.decode()

        def count(*more, said):
            return int(read(*more, said=said)[1].split("read ")[1].split()[0])
        self.chat(LLAMA3, controls=CONTROLS)
        plain = count(said=b"ab\n")
        self.assertEqual([count(said=said) for said in (b" ab\n", b"ab \t\n", b"\v ab\r\n")], [plain] * 3)
        self.assertEqual(count("-y", " a\n", said=b"b\n"), count("-y", "a", said=b"b\n"))
        self.chat(CHATML, controls=CONTROLS)
        self.assertEqual(count(said=b"ab \n"), count(said=b"ab\n") + 1)
        self.chat(MISTRAL_V1, words=("system",))
        status, said = read("-y", "a", said=b"b\n")
        self.assertEqual((status, "no place for a system prompt" in said), (1, True), said)
        self.chat(None)
        status, said = read(said=b"b\n")
        self.assertEqual((status, "--chat FORM" in said), (1, True), said)

    def test_ids_of_a_chat(self):
        """[INST] is one piece, and what stands around it is cut as in any text."""
        for beside in {}, {"legacy": False}:
            # The newer reading puts no space behind a control piece: then the form does.
            self.chat(None, more=("--chat", "mistral"), controls=("[INST]", "[/INST]"), beside=beside)
            file = read_file(load(self.out))
            text = file.chat[0] + "ab" + file.chat[4]
            self.assertEqual(encode_like_huggingface(file, text, begin=False, control=True),
                             [1, 268, NAMES.index("\u2581ab"), 269])


# ------------------------------------------------------------------------------------------------
# The families, each as its makers ship it, in small


def special(*names, start=0):
    return [{"id": start + n, "content": name, "special": True} for n, name in enumerate(names)]


def begin_with(name, token):
    text = json.dumps(BEGIN).replace('"<s>"', json.dumps(name)).replace("[1]", "[%d]" % token)
    return json.loads(text)


def spaced(start, **changes):
    """A tokenizer.json as of Llama 2, with [INST] and [/INST] from `start` on."""
    return tokenizer_json(added_tokens=special(*NAMES[:3])
                          + special("[INST]", "[/INST]", start=start), **changes)


LLAMA32_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                   "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
LLAMA32_ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# head_dim 16 and theta 500000: the eight pairs turn between 1304 times and .014 times.
LLAMA32_FREQUENCIES = tuple(
    [f for f in frequencies(16, 5e5)[:4]]
    + [f * ((1 - share) / 32 + share) for f in frequencies(16, 5e5)[4:5]
       for share in [(8192 * f / (2 * math.pi) - 1) / 3]]
    + [f / 32 for f in frequencies(16, 5e5)[5:]])

FAMILIES = {
    "Llama 2": {
        "small": Small(False), "config": {}, "frequencies": frequencies(8), "ends": ["</s>"],
        "files": {"tokenizer.model": sentencepiece(), "tokenizer.json": tokenizer_json(),
                  "generation_config.json": {"eos_token_id": 2},
                  "tokenizer_config.json": {"add_bos_token": True, "bos_token": "<s>",
                                            "eos_token": "</s>", "chat_template": LLAMA2}},
        "bos": 1, "patterns": [], "flags": 3, "chat": LLAMA2_CHAT},
    "Mistral v1": {
        "small": Small(False, kv=1), "frequencies": frequencies(8), "ends": ["</s>"],
        "config": {"architectures": ["MistralForCausalLM"], "sliding_window": 4},
        "files": {"tokenizer.model": sentencepiece(),
                  "tokenizer_config.json": {"legacy": False, "chat_template": MISTRAL_V1}},
        "bos": 1, "patterns": [], "flags": 1,
        "chat": MISTRAL_V1_CHAT, "said": ("no place for a system prompt",)},
    "Mistral v3": {
        "small": Small(False), "frequencies": frequencies(8, 1e6), "ends": ["</s>"],
        "config": {"architectures": ["MistralForCausalLM"], "sliding_window": None,
                   "rope_theta": 1e6},
        "files": {"tokenizer.json": spaced(268, normalizer=None, pre_tokenizer={
            "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first",
            "split": False}),
                  "tokenizer_config.json": {"legacy": False, "chat_template": MISTRAL_V3}},
        "bos": 1, "patterns": [], "flags": 1 | 4, "chat": MISTRAL_V3_CHAT, "said": ("system",)},
    "TinyLlama-Chat": {
        "small": Small(False), "config": {}, "frequencies": frequencies(8), "ends": ["</s>"],
        "files": {"tokenizer.model": sentencepiece(), "tokenizer.json": tokenizer_json(),
                  "tokenizer_config.json": {"eos_token": "</s>", "chat_template": ZEPHYR}},
        "bos": 1, "patterns": [], "flags": 3, "chat": ZEPHYR_CHAT},
    "SmolLM2": {
        "small": Small(True, layers=3, heads=3, kv=1), "frequencies": frequencies(8, 1e5),
        "ends": ["<|im_end|>"],
        "config": {"rope_theta": 1e5, "bos_token_id": 1, "eos_token_id": 2},
        "files": {"tokenizer.json": byte_level(SMOLLM_STEPS, absent=[0xc0, 0xc1, 0xff]),
                  "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
                  "tokenizer_config.json": {
                      "tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>",
                      "eos_token": "<|im_end|>", "chat_template": SMOLLM}},
        "bos": -1, "patterns": [r"\p{N}", GPT2], "flags": 0, "chat": SMOLLM_CHAT},
    "Llama 3.2": {
        "small": Small(True, head=16, heads=2, kv=1), "frequencies": LLAMA32_FREQUENCIES,
        "ends": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
        "config": {"rope_theta": 5e5, "rope_scaling": LLAMA32_ROPE, "bos_token_id": 0,
                   "eos_token_id": [1, 4, 5]},
        "files": {"tokenizer.json": dict(
            byte_level(LLAMA3_STEPS, special=LLAMA32_SPECIAL, ignore_merges=True),
            post_processor={"type": "Sequence", "processors": [
                {"type": "ByteLevel"}, begin_with("<|begin_of_text|>", 0)]}),
                  "generation_config.json": {"eos_token_id": [1, 4, 5]},
                  "tokenizer_config.json": {
                      "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot_id|>",
                      "bos_token": "<|begin_of_text|>", "chat_template": LLAMA31}},
        "bos": 0, "patterns": [LLAMA3_PATTERN], "flags": 0,
        "chat": ["<|begin_of_text|>" + text for text in LLAMA31_CHAT[:2]] + LLAMA31_CHAT[2:]}}
# What Hugging Face's own library makes of the conversation in test_ids_of_a_conversation.
for _name, _ids in {
        "Llama 2": [
            1, 259, 94, 76, 81, 86, 87, 96, 266, 259, 119, 107, 104, 259, 94, 50, 76, 81, 86, 87,
            96, 267, 259, 2, 1, 259, 94, 76, 81, 86, 87, 96, 259, 262, 259, 94, 50, 76, 81, 86,
            87, 96],
        "Mistral v1": [
            1, 259, 94, 76, 81, 86, 87, 96, 266, 259, 119, 107, 104, 259, 94, 50, 76, 81, 86, 87,
            96, 267, 2, 259, 94, 76, 81, 86, 87, 96, 259, 262, 259, 94, 50, 76, 81, 86, 87, 96],
        "Mistral v3": [
            1, 268, 266, 259, 119, 107, 104, 269, 267, 2, 268, 259, 262, 269],
        "TinyLlama-Chat": [
            1, 259, 63, 127, 120, 118, 104, 117, 127, 65, 13, 264, 259, 119, 107, 104, 2, 259, 13,
            63, 127, 260, 118, 118, 108, 118, 119, 260, 113, 119, 127, 65, 13, 267, 2, 259, 13,
            63, 127, 120, 118, 104, 117, 127, 65, 13, 262, 2, 259, 13, 63, 127, 260, 118, 118,
            108, 118, 119, 260, 113, 119, 127, 65, 13],
        "SmolLM2": [
            1, 118, 124, 118, 119, 104, 112, 13, 69, 104, 35, 118, 112, 100, 111, 111, 49, 2, 13,
            1, 120, 118, 104, 117, 13, 265, 259, 2, 13, 1, 100, 118, 118, 108, 118, 119, 100, 113,
            119, 13, 265, 102, 2, 13, 1, 120, 118, 104, 117, 13, 102, 2, 13, 1, 100, 118, 118,
            108, 118, 119, 100, 113, 119, 13],
        "Llama 3.2": [
            0, 2, 121, 127, 121, 122, 107, 115, 3, 266, 73, 123, 122, 122, 111, 116, 109, 38, 81,
            116, 117, 125, 114, 107, 106, 109, 107, 38, 74, 103, 122, 107, 64, 38, 74, 107, 105,
            107, 115, 104, 107, 120, 38, 56, 54, 56, 57, 16, 90, 117, 106, 103, 127, 38, 74, 103,
            122, 107, 64, 38, 56, 60, 38, 80, 123, 114, 38, 56, 54, 56, 58, 266, 5, 2, 123, 121,
            107, 120, 3, 266, 271, 265, 5, 2, 103, 121, 121, 111, 121, 122, 103, 116, 122, 3, 266,
            271, 105, 5, 2, 123, 121, 107, 120, 3, 266, 105, 5, 2, 103, 121, 121, 111, 121, 122,
            103, 116, 122, 3, 266]}.items():
    FAMILIES[_name]["ids"] = _ids


def write_family(folder, family):
    write_hf(folder, family["small"], config=hf_config(family["small"], **family["config"]))
    os.remove(os.path.join(folder, "tokenizer.model"))
    for name, content in family["files"].items():
        save(os.path.join(folder, name), content)
    return folder


class TestFamilies(Case):
    def test_an_added_token_takes_the_id_of_a_byte(self):
        folder, out = write_family(self.path(), FAMILIES["Llama 3.2"]), self.path()
        name = os.path.join(folder, "tokenizer.json")
        content = json.loads(load(name))
        content["added_tokens"].append({"id": content["model"]["vocab"]["a"], "content": "<more>",
                                        "special": True})
        save(name, content)
        done = run(folder, "-o", out)
        self.assertEqual(done.returncode, 0)
        self.assertIn("no pieces for 1 bytes", done.stderr)
        ids = subprocess.check_output([os.path.join(HERE, "tokens"), out], input=b"ba\0")
        self.assertEqual(len(ids.split()), 2)      # BOS and b

    def test_families(self):
        for name, family in FAMILIES.items():
            folder, back = write_family(self.path(), family), self.path()
            data = self.export(folder, quiet=not family.get("said"))
            header, _, tensors = parse(data, family["small"])
            for key, (_, numbers) in family["small"].weights.items():
                self.assertEqual(tensors[key], f32(numbers), (name, key))
            for key in "bos", "patterns", "flags", "chat":
                self.assertEqual(header[key], family[key], (name, key))
            for got, want in zip(header["frequencies"], family["frequencies"]):
                self.assertAlmostEqual(got, want, delta=4e-16 * want)
            ends = [header["pieces"][token].text.decode() for token in header["ends"]]
            self.assertEqual(ends, family["ends"], name)
            save(self.path("flat"), data)
            done = run(os.path.join(self.folder, "flat"), "--to", "hf", back)
            # Only tokenizer.model can say that SentencePiece puts a space before a space.
            self.assertEqual((done.returncode, "other tools" in done.stderr),
                             (0, name == "Mistral v1"), done.stderr)
            self.assertEqual(self.export(back, quiet=not family.get("said")), data, name)

    def test_ids_of_a_conversation(self):
        """Two questions and an answer, as Hugging Face's library reads what the template writes."""
        for name, family in FAMILIES.items():
            file = read_file(self.export(write_family(self.path(), family), quiet=False))
            one, _, _, two, middle, after = file.chat
            text = one + "ab the" + middle + "abc" + after + two + "c" + middle
            begin = not text.startswith(file.pieces[file.bos].text.decode())
            self.assertEqual(encode_like_huggingface(file, text, begin, control=True), family["ids"],
                             name)


# ------------------------------------------------------------------------------------------------
# The way back


def flat(pieces, small, frequency=None, chat=("",) * 6, patterns=(), byte_level=False,
         takes_words=False, takes=(0,) * 6, **changes):
    """A flat file, written by code that shares nothing with export.py but the automata.

    Pieces are (score, kind, text).
    """
    of_text = {}
    for token, (score, kind, text) in enumerate(pieces):
        if kind == NORMAL:
            of_text.setdefault(text, token)
    units, halves, pairs = {}, dict(of_text), []
    for text in of_text:
        for character in [] if byte_level else text.decode(errors="ignore"):
            data = character.encode()
            token = of_text.get(data, len(pieces) + ord(character))
            halves[data] = units[ord(character)] = token
    virtual = sorted(unit for unit, token in units.items() if token >= len(pieces))
    for place, unit in enumerate(virtual):
        halves[chr(unit).encode()] = units[unit] = len(pieces) + place
    if 32 in units:
        units.setdefault(0x2581, units[32])
    raw = [(piece[2], token) for token, piece in enumerate(pieces) if piece[1] == BYTE]
    if byte_level:
        raw = [(text, token) for text, token in of_text.items() if len(text) == 1]
    if byte_level or len(raw) == 256:
        units.update((0x110000 + text[0], token) for text, token in raw)
    for text, token in of_text.items():
        for at in range(1, len(text)):
            left, right = halves.get(text[:at]), halves.get(text[at:])
            if left is not None and right is not None:
                pairs.append((left, right, token, pieces[token][0]))
    scores = sorted({pair[3] for pair in pairs}, reverse=True)
    pairs = sorted((*pair[:3], scores.index(pair[3])) for pair in pairs)
    ranges, n_classes, steps = export.build_automata(patterns)
    found = sorted((text[0], -len(text), token) for token, (_, kind, text) in enumerate(pieces)
                   if kind in (CONTROL, USER_DEFINED, END) and text)
    words = [token for _, token in sorted(of_text.items())] if takes_words else []
    texts = [piece[2] for piece in pieces] + [string.encode() for string in (*chat, *patterns)]
    kinds = [piece[1] for piece in pieces] + [*takes] + [0] * len(patterns)
    unknown = [token for token, piece in enumerate(pieces) if piece[1] == UNKNOWN] + [-1]
    header = dict(version=3, dim=small.dim, hidden=small.hidden, layers=small.layers,
                  heads=small.heads, kv=small.kv, head=small.head, vocab=small.vocab, seq=small.seq,
                  shared=small.tied, window=0, eps=1e-5, storage=0, bos=1, unknown=unknown[0],
                  flags=3, n_cutters=len(patterns), n_states=len(steps), n_classes=n_classes,
                  n_ranges=len(ranges), n_units=len(units), n_pairs=len(pairs), n_whole=len(found),
                  n_words=len(words), n_text=len(b"".join(texts)))
    header.update(changes)
    out = (b"drugs.c\0" + struct.pack("<11if13i", *header.values())).ljust(256, b"\0")
    frequency = frequencies(small.head) if frequency is None else frequency
    out += struct.pack("<%dd" % len(frequency), *frequency)
    ends = [sum(map(len, texts[:token + 1])) for token in range(len(texts))]
    for table in (ranges, steps, [(unit, unit, token) for unit, token in sorted(units.items())], pairs,
                  zip(ends, kinds), [(token,) for _, _, token in found], [(token,) for token in words]):
        out += b"".join(struct.pack("<%dI" % len(record), *record) for record in table)
    out += b"".join(texts)
    for _, numbers in small.weights.values():
        out += bytes(-len(out) % 64) + f32(numbers)
    return out


def joined(chain, rank):
    """Joins neighbours, the pair of the lowest rank first, the leftmost of equals."""
    while True:
        ranks = [rank(a, b) for a, b in zip(chain, chain[1:])]
        if min(ranks, default=math.inf) == math.inf:
            return chain
        at = ranks.index(min(ranks))
        chain[at:at + 2] = [chain[at] + chain[at + 1]]


def fused(ids, unknown):
    """A run of unknown characters is one token."""
    return [token for before, token in zip([None] + ids, ids) if (before, token) != (unknown,) * 2]


def sentencepiece_ids(pieces, text, prefix):
    """What drugs.c does, naively."""
    of_byte = {text: token for token, (_, kind, text) in enumerate(pieces) if kind == 3}
    of_text = {text.decode(): token for token, (_, kind, text) in enumerate(pieces)
               if kind in (0, 4)}
    unknown, = [token for token, piece in enumerate(pieces) if piece[1] == 2]
    user = sorted((p[2].decode() for p in pieces if p[1] == 4), key=len, reverse=True)
    values = {p[2].decode(): p[0] for p in pieces if p[1] == 0}
    text, out = " " * prefix + text, []
    for part in re.split("(%s)" % "|".join(map(re.escape, user)), text) if user else [text]:
        chain = [part] if part in user else joined(
            list(part), lambda a, b: -values.get(a + b, -math.inf))
        for piece in chain:
            data = [piece.encode()[at:at + 1] for at in range(len(piece.encode()))]
            out += ([of_text[piece]] if piece in of_text else
                    [of_byte[byte] for byte in data] if of_byte else [unknown])
    return fused(out, unknown)


def hugging_face_ids(content, text):
    """The same by the merges of tokenizer.json."""
    model, steps = content["model"], content["normalizer"]["normalizers"]
    ids, unknown, chain = model["vocab"], model["vocab"][model["unk_token"]], []
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(model["merges"])}
    for step in steps:
        text = step["prepend"] + text if step["type"] == "Prepend" else text.replace(" ", "\u2581")
    for letter in text:
        as_bytes = letter not in ids and model["byte_fallback"]
        chain += ["<0x%02X>" % byte for byte in letter.encode()] if as_bytes else [letter]
    chain = joined(chain, lambda a, b: ranks.get((a, b), math.inf))
    return fused([ids.get(piece, unknown) for piece in chain], unknown)


BYTES = [(0, 3, bytes([byte])) for byte in range(256)]
ENDS = [(0, 2, b"<unk>"), (0, 1, b"<s>"), (0, 5, b"</s>")]
LEARNED = [(0, 0, letter.encode()) for letter in " abcd\u00e9"] + [
    (-.5 - 2 * rank, 0, text.encode()) for rank, text in enumerate(
        "ab| a|  |bc|abc| ab|cd|abcd|aa|aaaa|\u00e9a|bcd".split("|"))]
PADDED = ENDS + BYTES + LEARNED + [(0, 1, b"")] * 3


class TestBack(Case):
    def back(self, data, *words):
        """A flat file as a folder, with these words in a warning."""
        path, folder = self.path(), self.path()
        save(path, data)
        done = run(path, "--to", "hf", folder)
        self.assertEqual((done.returncode, done.stderr.count("\n")), (0, bool(words)), done.stderr)
        for word in words:
            self.assertIn(word, done.stderr)
        self.assertEqual(sorted(set(os.listdir(folder)) - {"tokenizer.model"}), [
            "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json"])
        self.assertFalse(os.path.exists(folder + ".tmp"))
        return folder

    def json(self, folder, name="tokenizer.json"):
        return json.loads(load(os.path.join(folder, name)).decode())

    def there_and_back(self, data, small, *words):
        """Every byte survives."""
        folder = self.back(data, *words)
        self.assertEqual(self.export(folder), data)
        header, pieces, _ = parse(data, small)
        ranks = {merged: rank for rank, merged in header["pairs"].values()}
        pieces = [(-ranks.get(token, 0), *piece) for token, piece in enumerate(pieces)]
        return folder, pieces, pieces

    def test_models(self):
        for sizes in (dict(tied=True), dict(tied=False, kv=4, head=6), dict(tied=False, kv=1),
                      dict(tied=True, head=2, layers=1), dict(tied=False, dim=24)):
            small = Small(**sizes)
            data = self.export(write_hf(self.path(), small))
            folder, _, _ = self.there_and_back(data, small)
            content = load(os.path.join(folder, "model.safetensors"))
            length, = struct.unpack("<Q", content[:8])
            self.assertEqual(length % 8, 0)
            header = json.loads(content[8:8 + length].decode())
            self.assertEqual(header.pop("__metadata__"), {"format": "pt"})
            want = hf_weights(small)
            self.assertEqual(set(header), set(want))
            for name, entry in header.items():
                first, last = entry["data_offsets"]
                self.assertEqual([entry["dtype"], entry["shape"],
                                  content[8 + length + first:8 + length + last]], want[name], name)
            config = self.json(folder, "config.json")
            for key, value in hf_config(small).items():
                self.assertEqual(config[key], value, key)
            self.assertEqual(config["head_dim"], small.head)

    def test_settings(self):
        small = Small(True)
        for eps in 1e-5, 1e-6, 3.2e-7, 1.00000001e-5, 2 ** -20 + 2 ** -40:
            pieces = [(0, 1, b"</s>") if piece == ENDS[2] else piece for piece in PADDED]
            pieces[-1] = 0, 5, b"<end>"
            data = flat(pieces, small, window=16, eps=eps, seq=77, bos=-1)
            folder, _, _ = self.there_and_back(data, small)
            config = self.json(folder, "config.json")
            self.assertEqual(struct.pack("<f", config["rms_norm_eps"]), struct.pack("<f", eps))
            self.assertLessEqual(len(str(config["rms_norm_eps"])), 14)
        self.assertEqual(config["architectures"], ["MistralForCausalLM"])
        self.assertEqual((config["model_type"], config["sliding_window"], config["rope_theta"],
                          config["max_position_embeddings"], config["eos_token_id"]),
                         ("mistral", 16, 1e4, 77, 279))
        # Nothing begins a text: but a reader told nothing would take <s>.
        self.assertEqual(config["bos_token_id"], None)
        self.assertIsNone(self.json(folder)["post_processor"])
        names = self.json(folder, "tokenizer_config.json")
        self.assertEqual([names[end + "_token"] for end in ("bos", "eos", "unk")],
                         [None, "<end>", "<unk>"])
        self.assertEqual((names["add_bos_token"], names["chat_template"]), (False, None))

    def test_several_ends(self):
        small = Small(True)
        pieces = PADDED[:-1] + [(0, 5, b"<end>")]
        folder, _, _ = self.there_and_back(flat(pieces, small), small)
        for name in "config.json", "generation_config.json":
            self.assertEqual(self.json(folder, name)["eos_token_id"], [2, 279])

    def test_no_end(self):
        """Where </s> ends nothing, it does not do so after the way back."""
        small = Small(True)
        folder = write_hf(self.path(), small, config=hf_config(small, eos_token_id=None))
        os.remove(os.path.join(folder, "tokenizer.model"))
        save(os.path.join(folder, "tokenizer.json"), tokenizer_json(
            normalizer=None, pre_tokenizer={"type": "Metaspace", "prepend_scheme": "first"}))
        save(os.path.join(folder, "tokenizer_config.json"), {"eos_token": None})
        data = self.export(folder)
        self.assertEqual(parse(data, small)[0]["ends"], [])
        self.there_and_back(data, small)

    def test_merges_that_scores_cannot_say(self):
        """SentencePiece would join ab even where neither a nor b is a piece."""
        small, names = Small(True), NAMES[:259] + ["\u2581", "c", "ab", "abc"]
        content = tokenizer_json(model={"vocab": {name: n for n, name in enumerate(names)},
                                        "merges": [["ab", "c"]], "byte_fallback": False})
        folder = write_hf(self.path(), small)
        os.remove(os.path.join(folder, "tokenizer.model"))
        save(os.path.join(folder, "tokenizer.json"), content)
        data = self.export(folder)
        self.assertEqual(self.export(self.back(data)), data)

    def test_newlines_of_bytes(self):
        """The space after a newline is taken back by other tools, too."""
        small = Small(True)
        folder = write_hf(self.path(), small)
        os.remove(os.path.join(folder, "tokenizer.model"))
        content = dict(byte_level(GPT2_STEPS), normalizer={
            "type": "Replace", "pattern": {"String": "\n"}, "content": "\n "})
        save(os.path.join(folder, "tokenizer.json"), content)
        back = self.back(self.export(folder, quiet=False))
        self.assertEqual([step["type"] for step in self.json(back)["decoder"]["decoders"]],
                         ["ByteLevel", "Replace"])

    def test_rope(self):
        """From the frequencies back to the settings that they came from."""
        small = Small(True, head=64, heads=1, kv=1, layers=1)
        for theta in 1e4, 5e5, 1e6, 10000.5, 1234567.8901234567, 2.5, 0.5:
            plain = frequencies(64, theta)
            folder, _, _ = self.there_and_back(flat(PADDED, small, plain), small)
            config = self.json(folder, "config.json")
            self.assertEqual((config["rope_theta"], config["rope_scaling"]), (theta, None))
            for factor in 2.0, 4.0, 1.5, 0.25:
                data = flat(PADDED, small, tuple(f / factor for f in plain))
                folder, _, _ = self.there_and_back(data, small)
                config = self.json(folder, "config.json")
                self.assertEqual((config["rope_theta"], config["rope_scaling"]),
                                 (theta, {"rope_type": "linear", "factor": factor}))
        for factor, length in (8.0, 8192), (32.0, 8192), (4.0, 16384):
            settings = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": length}
            data = self.export(write_hf(self.path(), small, config=hf_config(
                small, rope_theta=5e5, rope_scaling=settings)))
            folder, _, _ = self.there_and_back(data, small)
            config = self.json(folder, "config.json")
            self.assertEqual((config["rope_theta"], config["rope_scaling"]), (5e5, settings))
        odd = tuple(f * (1 + pair / 100) for pair, f in enumerate(frequencies(64)))
        path = self.path()
        save(path, flat(PADDED, small, odd))
        self.refused(path, "neither plain nor", to=("--to", "hf"))

    def test_byte_level(self):
        """Byte by byte in TestByteLevel; here what Hugging Face is told."""
        small = Small(True)
        folder = write_hf(self.path(), small)
        os.remove(os.path.join(folder, "tokenizer.model"))
        content = byte_level(SMOLLM_STEPS)
        save(os.path.join(folder, "tokenizer.json"), content)
        folder, _, _ = self.there_and_back(self.export(folder), small)
        back = self.json(folder)
        self.assertFalse(os.path.exists(os.path.join(folder, "tokenizer.model")))
        self.assertEqual(back["model"]["merges"], content["model"]["merges"])
        self.assertEqual(back["model"]["vocab"], content["model"]["vocab"])
        for part in "normalizer", "post_processor":
            self.assertEqual(back[part], content[part])
        self.assertEqual(back["pre_tokenizer"], split_steps(r"\p{N}", GPT2))

    def same_encodings(self, folder, pieces, pieces2, prefix=True, others=True):
        rng = random.Random(3)
        for length in list(range(1, 12)) * 12:
            text = "".join(rng.choice("  aaabbbccd\u00e9x\u6f22") for _ in range(length))
            want = sentencepiece_ids(pieces, text, prefix)
            self.assertEqual(sentencepiece_ids(pieces2, text, prefix), want, text)
            if others:
                self.assertEqual(hugging_face_ids(self.json(folder), text), want, text)

    def test_tokenizers(self):
        small = Small(True)
        self.same_encodings(*self.there_and_back(flat(PADDED, small), small))
        folder, pieces, again = self.there_and_back(flat(PADDED, small, flags=0), small)
        self.same_encodings(folder, pieces, again, prefix=False)
        content = self.json(folder)
        self.assertEqual(content["model"]["merges"][:7], [
            "a b", "\u2581 a", "\u2581 \u2581", "b c", "a bc", "ab c", "\u2581 ab"])
        self.assertEqual([entry["id"] for entry in content["added_tokens"]], [0, 1, 2])
        bos, = content["post_processor"]["single"][:1]
        self.assertEqual(bos, {"SpecialToken": {"id": "<s>", "type_id": 0}})

        # Without bytes, their names are pieces like others.
        pieces = ENDS + [(0, 0, b"<0x41>")] + LEARNED
        pieces += [(0, 1, b"<%d>" % token) for token in range(len(pieces), 280)]
        folder, pieces, again = self.there_and_back(flat(pieces, small), small)
        self.same_encodings(folder, pieces, again)
        self.assertFalse(self.json(folder)["model"]["byte_fallback"])

        # User-defined pieces and special ones keep their spaces.
        pieces = PADDED[:-3] + [(0, 4, b"b c"), (0, 4, b"dd"), (0, 1, b"<a b>")]
        folder, pieces, again = self.there_and_back(flat(pieces, small), small)
        self.same_encodings(folder, pieces, again, others=False)
        self.assertEqual([(entry["content"], entry["special"])
                          for entry in self.json(folder)["added_tokens"]][3:],
                         [("b c", False), ("dd", False), ("<a b>", True)])

    def test_what_others_do_otherwise_is_worth_a_warning(self):
        for piece in (-.5, 0, b"ca"), (-9.5, 0, b"az"):
            self.back(flat(PADDED[:-1] + [piece], Small(True)), "warning", "equal scores")

    def test_an_empty_folder_will_do(self):
        path, folder = self.path(), self.path()
        save(path, flat(PADDED, Small(True)))
        os.makedirs(folder)
        for ending in "", "/":
            self.assertEqual(run(path, "--to", "hf", folder + ending).returncode, 0)
            before = {name: load(os.path.join(folder, name)) for name in os.listdir(folder)}
            self.assertEqual(len(before), 6)
            done = run(path, "--to", "hf", folder + ending)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1))
            self.assertIn("exists", done.stderr)
            self.assertEqual(before, {name: load(os.path.join(folder, name)) for name in before})
            shutil.rmtree(folder)
        os.makedirs(folder + ".tmp/precious")           # not ours, and not in the way
        self.assertEqual(run(path, "--to", "hf", folder).returncode, 0)
        self.assertEqual(os.listdir(folder + ".tmp"), ["precious"])
        self.assertEqual(len(os.listdir(folder)), 6)

    def test_a_full_disk(self):
        path, folder = self.path(), self.path()
        save(path, flat(PADDED, Small(True)))
        done = subprocess.run(["sh", "-c", 'ulimit -f 30; trap "" XFSZ; "$@"', "-", sys.executable,
                               EXPORT, path, "--to", "hf", folder], stderr=subprocess.PIPE)
        self.assertEqual((done.returncode, done.stderr.count(b"\n")), (1, 1), done.stderr)
        self.assertEqual(os.listdir(self.folder), [os.path.basename(path)])

    def test_refusals(self):
        small, path = Small(True), self.path("model.bin")

        def refused(data, *words):
            save(path, data)
            self.refused(path, *words, to=("--to", "hf"))

        good = flat(PADDED, small)
        for cut in 8, 100, 255, 256, 300, 2600, len(good) // 2, len(good) - 1:
            refused(good[:cut], "truncated")
        refused(good + bytes(4), "its header says")
        for data in b"", b"drugs", v0(small), b"GGUF" + good[4:]:
            refused(data, "is no flat file")
        for version in b"\1", b"\2":
            refused(good[:8] + version + good[9:], "version %d" % version[0], "export the checkpoint again")
        for at in 108, 255:
            refused(good[:at] + b"\1" + good[at + 1:], "damaged")
        for name, value, word in (
                ("dim", 0, "dim"), ("layers", 4096, "its header says"),
                ("layers", 4097, "n_layers"), ("heads", 3, "3 query heads"), ("head", 7, "even"),
                ("vocab", 1 << 24, "truncated"), ("shared", 2, "shared"), ("flags", 32, "header"),
                ("n_cutters", 17, "header"), ("n_ranges", -1, "header"), ("n_pairs", -1, "header"),
                ("n_classes", 0, "header"), ("n_text", -1, "header"), ("n_states", 1 << 28, "truncated"),
                ("n_text", 1 << 30, "truncated"), ("n_text", 5, "strings"), ("n_units", 3, "damaged"),
                ("unknown", 3, "damaged"), ("eps", math.nan, "norm_eps"),
                ("eps", -1, "norm_eps"), ("eps", 1, "norm_eps"), ("bos", 280, "bos")):
            refused(flat(PADDED, small, **{name: value}), word)
        for frequency in 0.0, -1.0, math.nan, math.inf, 1e7:
            refused(flat(PADDED, small, (1.0, frequency, .1, .1)), "RoPE")
        for piece, word in (
                ((0, 6, b"x"), "kind 6"), ((0, 3, b"xy"), "kind 3"),
                ((0, 0, b""), "damaged"), ((0, 0, b"\xff"), "damaged"), ((0, 2, b"x"), "unknown"),
                ((0, 0, "x\u2581".encode()), "damaged"), ((0, 0, b"ab"), "both be 'ab'"),
                ((0, 0, b"<0x41>"), "both be '<0x41>'"), ((0, 1, b"<s>"), "both be '<s>'")):
            refused(flat(PADDED[:-1] + [piece], small), word)
        refused(flat(PADDED, small, bos=279), "piece 279, which has no name")
        pieces = [(0, 0, b"?") if piece == (0, 3, b"A") else piece for piece in PADDED]
        refused(flat(pieces, small), "255 byte pieces")
        self.refused(self.folder, "folder", to=("--to", "hf"))
        self.refused(self.path("absent"), "absent", to=("--to", "hf"))
        save(path, good)
        self.refused(path, "flat file already", "--to hf")

    def test_usage(self):
        path = self.path()
        save(path, flat(PADDED, Small(True)))
        for words in (["--to", "hf"], ["--to", "gguf", "x"], ["--to", "hf", "x", "-o", "y"],
                      ["--to", "hf", "x", "--tokenizer", "z"], ["--chat", "x"],
                      ["--to", "hf", "x", "--chat", "plain"]):
            self.assertEqual(run(path, *words).returncode, 2)


# ------------------------------------------------------------------------------------------------
# Logits by reference.py, to compare with what the C program makes of the flat file


def rows_in_our_order(rows, head):
    """Of a head, Hugging Face's RoPE turns row i together with row i + head/2; ours, neighbours."""
    heads = [rows[at:at + head] for at in range(0, len(rows), head)]
    return [one[i // 2 + i % 2 * (head // 2)] for one in heads for i in range(head)]


def reference_logits(small, weights, ids, radians=None, window=0):
    """At every position. RoPE turns pair i by radians[i]."""
    c = reference.Config(small.dim, small.hidden, small.layers, small.heads, small.kv, small.head,
                         small.vocab, window, radians or frequencies(small.head), 1e-5)
    tensors = {}
    for kind, layer in small.weights:
        numbers = list(floats(weights[named(HF, kind, layer)][2]))
        if kind in ("wq", "wk"):
            rows = [numbers[at:at + small.dim] for at in range(0, len(numbers), small.dim)]
            numbers = sum(rows_in_our_order(rows, small.head), [])
        tensors[kind, layer] = numbers
    return reference.logits_of(reference.Model(c, tensors), ids)


@unittest.skipUnless(os.path.exists(LOGITS), "tests/logits is not built: run make first")
class TestLogits(Case):
    def test_against_hugging_face(self):
        ids = [1, 260, 261, 7, 279, 260]
        for small in Small(True), Small(False, kv=1), Small(False, kv=4), Small(True, head=6):
            weights = hf_weights(small)
            out = self.path()
            self.assertEqual(run(write_hf(self.path(), small), "-o", out).returncode, 0)
            text = subprocess.check_output([LOGITS, out] + list(map(str, ids)))
            rows = [list(map(float, line.split())) for line in text.splitlines()]
            want = reference_logits(small, weights, ids)
            self.assertEqual([len(row) for row in rows], [small.vocab] * len(ids))
            for row, right in zip(rows, want):
                worst = max(abs(a - b) for a, b in zip(row, right))
                self.assertLess(worst / max(map(abs, right)), 1e-5)

    def test_families(self):
        for family in FAMILIES.values():
            out = self.path()
            self.assertEqual(run(write_family(self.path(), family), "-o", out).returncode, 0)
            ids = family["ids"][:12]
            text = subprocess.check_output([LOGITS, out] + list(map(str, ids)))
            rows = [list(map(float, line.split())) for line in text.splitlines()]
            want = reference_logits(family["small"], hf_weights(family["small"]), ids,
                                    family["frequencies"], family["config"].get("sliding_window"))
            for row, right in zip(rows, want):
                worst = max(abs(a - b) for a, b in zip(row, right))
                self.assertLess(worst / max(map(abs, right)), 1e-6)


# ------------------------------------------------------------------------------------------------
# What must be refused


class TestRefusals(Case):
    def hf(self, *words, weights=None, **changes):
        small = Small(True)
        self.refused(write_hf(self.path(), small, weights, hf_config(small, **changes)), *words)

    def test_configs(self):
        self.hf("config.json", "GemmaForCausalLM", architectures=["GemmaForCausalLM"])
        self.hf("attention_bias", attention_bias=True)
        self.hf("mlp_bias", mlp_bias=True)
        self.hf("rope_scaling", "low_freq_factor",
                rope_scaling={"rope_type": "llama3", "factor": 8})
        self.hf("rope_scaling", "factor is 0", rope_scaling={"type": "linear", "factor": 0})
        self.hf("rope_scaling", "dynamic", rope_scaling={"type": "dynamic", "factor": 2})
        self.hf("rope_scaling", "yarn", rope_parameters={"rope_type": "yarn"})
        self.hf("rope_scaling", "no type", rope_scaling={"factor": 2.0})
        self.hf("granite", model_type="granite")
        self.hf("partial_rotary_factor", partial_rotary_factor=.5)
        self.hf("quantization_config", quantization_config={"bits": 4})
        self.hf("hidden_act", "gelu", hidden_act="gelu")

    def test_sizes(self):
        self.hf("n_heads", num_attention_heads=0)
        self.hf("n_layers", num_hidden_layers=-1)
        self.hf("dim", hidden_size="32")
        self.hf("hidden_dim", intermediate_size=24.0)
        self.hf("vocab_size", vocab_size=2 ** 40)
        self.hf("4 query heads", "3 key", num_key_value_heads=3)
        self.hf("head_dim", "even", head_dim=5)
        self.hf("30", num_attention_heads=30)
        self.hf("rope_theta", rope_theta=float("inf"))
        self.hf("rope_theta is 9007199254740993", rope_theta=9007199254740993)
        self.hf("both 10000.0 and 5", rope_parameters={"rope_theta": 5})
        self.hf("norm_eps", rms_norm_eps=float("nan"))
        self.hf("rope_theta", rope_theta=-1)
        self.hf("RoPE", rope_theta=1e-300)
        self.hf("norm_eps", rms_norm_eps=-1e-5)
        self.hf("norm_eps", rms_norm_eps=1)
        self.hf("norm_eps", rms_norm_eps=1 - 2 ** -40)
        self.hf("missing", num_hidden_layers=4096)
        for name, most in (("hidden_size", 1 << 20), ("intermediate_size", 1 << 20),
                           ("num_hidden_layers", 1 << 12), ("num_attention_heads", 1 << 12),
                           ("head_dim", 1 << 12), ("vocab_size", 1 << 24),
                           ("max_position_embeddings", 1 << 28)):
            self.hf("from", "to %d" % most, **{name: most + 1})
        self.hf("eos", "config.json", eos_token_id=280)

    def test_tensors(self):
        name = "model.layers.1.self_attn.k_proj.weight"
        extra = {"model.layers.0.self_attn.q_norm.weight": ["F32", [8], bytes(32)],
                 "model.layers.0.self_attn.q_proj.bias": ["F32", [32], bytes(128)]}
        for more in extra:
            self.hf(more, weights=dict(hf_weights(Small(True)), **{more: extra[more]}))
        weights = hf_weights(Small(True))
        for dtype in ("I8", "F8_E4M3", "F64"):
            size = {"I8": 1, "F8_E4M3": 1, "F64": 8}[dtype]
            self.hf(name, dtype, weights=dict(weights, **{
                name: [dtype, [16, 32], bytes(512 * size)]}))
        self.hf(name, "(16, 32)", "(32, 16)", weights=dict(weights, **{
            name: ["F32", [32, 16], bytes(2048)]}))
        self.hf("two tensors of one name", weights=dict(weights, **{"module." + name: weights[name]}))
        del weights[name]
        self.hf(name, "missing", "(16, 32)", weights=weights)
        self.hf("lm_head.weight", "missing", tie_word_embeddings=False)

    def test_safetensors(self):
        small = Small(True)
        folder = write_hf(self.path(), small)
        path = os.path.join(folder, "model.safetensors")
        good = load(path)
        length, = struct.unpack("<Q", good[:8])
        header = json.loads(good[8:8 + length].decode())
        for cut in 0, 5, 8, 100, len(good) // 2, len(good) - 1:
            save(path, good[:cut])
            self.refused(folder, "model.safetensors")
        for size in 2 ** 63, 2 ** 64 - 1, len(good):
            save(path, struct.pack("<Q", size) + good[8:])
            self.refused(folder, "model.safetensors")

        name, last = "model.norm.weight", len(good) - 8 - length
        before, after = header[name]["data_offsets"]
        for entry, word in (
                ({"data_offsets": [last, last + 128]}, "outside"),
                ({"data_offsets": [-128, 0]}, "-128"),
                ({"data_offsets": [after, before]}, "outside"),
                ({"data_offsets": [0, 128]}, "overlap"),
                ({"data_offsets": [before, after - 4]}, "124 bytes"),
                ({"data_offsets": [before]}, "damaged"),
                ({"dtype": "BF16"}, "128 bytes"),
                ({"shape": [2 ** 70]}, "no size"),
                ({"shape": [True]}, "no size"),
                ({"shape": "32"}, "damaged"),
                ({"shape": None}, "damaged")):
            text = json.dumps(dict(header, **{name: dict(header[name], **entry)})).encode()
            save(path, struct.pack("<Q", len(text)) + text + good[8 + length:])
            self.refused(folder, "model.safetensors", word)
        save(path, good + b"x")
        self.refused(folder, "model.safetensors", "1 bytes are left over")
        text = '{"model.norm.weight": %s, %s' % (json.dumps(header[name]), json.dumps(header)[1:])
        text = text.encode()
        save(path, struct.pack("<Q", len(text)) + text + good[8 + length:])
        self.refused(folder, "model.safetensors", "twice")
        del header["model.layers.0.input_layernorm.weight"]
        text = json.dumps(header).encode()
        save(path, struct.pack("<Q", len(text)) + text + good[8 + length:])
        self.refused(folder, "model.safetensors", "nothing is said of the bytes")
        for text in b"[]", b"null", b"{", b"\xff", b"[" * 100000:
            save(path, struct.pack("<Q", len(text)) + text + good[8 + length:])
            self.refused(folder, "model.safetensors")
        os.remove(path)
        self.refused(folder, "safetensors", "missing")

    def test_shards(self):
        folder = write_hf(self.path(), Small(True), shards=2)
        index = os.path.join(folder, "model.safetensors.index.json")
        weight_map = json.loads(load(index).decode())["weight_map"]
        name = "model.norm.weight"
        other, = set(weight_map.values()) - {weight_map[name]}
        save(index, {"weight_map": dict(weight_map, **{name: other})})
        self.refused(folder, name, other)
        save(index, {"weight_map": dict(weight_map, **{name: "../secret"})})
        self.refused(folder, "../secret")
        save(index, {"weight_map": dict(weight_map, **{name: "absent"})})
        self.refused(folder, "absent")
        save(index, {})
        self.refused(folder, "index.json")

    def test_tokenizers(self):
        folder = write_hf(self.path(), Small(True))
        path = os.path.join(folder, "tokenizer.model")
        good = sentencepiece()
        for content in (b"", b"\x0a", b"\x0a" + varint(-11), good[:len(good) // 2],
                        bytes(100), b"\x08" + b"\x80" * 20 + b"\1",
                        good.replace(b"<0x0A>", b"<0x0Z>"),
                        good.replace(struct.pack("<f", -1e9), struct.pack("<f", math.nan))):
            save(path, content)
            self.refused(folder, "tokenizer.model")
        save(path, b"IQ== 0\nIg== 1\n" * 20)
        self.refused(folder, "tokenizer.model", "tiktoken", "tokenizer.json")
        save(path, good + field(2, field(24, 1)))
        self.refused(folder, "tokenizer.model", "treat_whitespace_as_suffix")
        save(path, good + field(3, field(5, 0)))
        self.refused(folder, "tokenizer.model", "escape_whitespaces")
        save(path, sentencepiece(model_type=1))
        self.refused(folder, "tokenizer.model", "BPE")
        for names in NAMES + ["ab"], NAMES + [""]:
            save(path, sentencepiece(names))
            self.refused(folder, "tokenizer.model", "piece 268 is")
        save(path, sentencepiece(NAMES + ["x%d" % n for n in range(20)]))
        self.refused(folder, "tokenizer.model", "id 280", "knows only 280")
        os.remove(path)
        self.refused(folder, "tokenizer.model", "--tokenizer")

        path = os.path.join(folder, "tokenizer.json")
        level = {"type": "ByteLevel"}
        for content, word in (
                (tokenizer_json(pre_tokenizer=level), "ByteLevel"),
                (tokenizer_json(decoder={"type": "Sequence", "decoders": [level]}), "ByteLevel"),
                (tokenizer_json(model={"type": "WordPiece"}), "WordPiece"),
                (tokenizer_json(model={"ignore_merges": True}), "ignore_merges"),
                (tokenizer_json(pre_tokenizer={"type": "Digits"}), "Digits"),
                (tokenizer_json(model={"vocab": {"a": 2 ** 60}, "merges": []}), "280"),
                (tokenizer_json(model={"vocab": {"a": -1}, "merges": []}), "280"),
                (tokenizer_json(model={"vocab": ["a"]}), "damaged"),
                (tokenizer_json(model={"merges": ["a b c"]}), "damaged"),
                ({}, "damaged"), (b"{", "damaged")):
            save(path, content)
            self.refused(folder, "tokenizer.json", word)
        os.remove(path)

        path = os.path.join(folder, "tokenizer.bin")
        for content in b"", tokenizer_bin()[:-1], tokenizer_bin() + b"x":
            save(path, content)
            self.refused(folder, "tokenizer.bin")
        self.refused(folder, "nowhere", more=("--tokenizer", "nowhere"))

    def test_v0(self):
        path = self.path("v0.bin")
        tokenizer = self.path("tokenizer.bin")
        good = v0(Small(True))
        save(path, good)
        self.refused(path, "--tokenizer")
        save(tokenizer, tokenizer_bin())
        for content in (good[:-1], good + bytes(4), good[:20], b"", bytes(28),
                        struct.pack("<7i", *[2 ** 31 - 1] * 7), b"x" * 1000):
            save(path, content)
            self.refused(path, "v0.bin")
        for content, word in (
                (b"GGUF" + bytes(99), "GGUF"), (b"drugs.c\0" + bytes(99), "already"),
                (struct.pack("<I", 0x616b3432) + bytes(300), "version 0"),
                (pickle.dumps(0x1950a86a20f9469cfc6c, 2), "old format")):
            save(path, content)
            self.refused(path, word)
        self.refused(self.folder, "config.json")
        self.refused(self.path("absent"), "absent")

    def test_lfs_pointers(self):
        pointer = b"version https://git-lfs.example/spec/v1\noid sha256:00\nsize 22001\n"
        for name in ("model.safetensors", "tokenizer.model", "tokenizer.json", "config.json",
                     "generation_config.json", "tokenizer_config.json"):
            folder = write_hf(self.path(), Small(True))
            save(os.path.join(folder, name), pointer)
            self.refused(folder, name, "Git LFS", "git lfs pull")
        path = self.path("m.bin")
        save(path, pointer)
        self.refused(path, "m.bin", "git lfs pull")
        self.refused(path, "m.bin", "git lfs pull", to=("--to", "hf"))

    def test_folders_that_are_no_model(self):
        folder = write_hf(self.path(), Small(True))
        os.makedirs(os.path.join(folder, "hub", "snapshots", "0a1b"))
        self.refused(os.path.join(folder, "hub"), "snapshots/0a1b")
        os.rename(os.path.join(folder, "model.safetensors"),
                  os.path.join(folder, "model-00001-of-00001.safetensors"))
        self.refused(folder, "index.json is missing", "model-00001-of-00001.safetensors")
        save(os.path.join(folder, "adapter_config.json"), {})
        self.refused(folder, "adapter", "merge")

    def test_a_part_named_instead_of_the_folder(self):
        folder = write_hf(self.path(), Small(True), shards=2)
        save(os.path.join(folder, "pytorch_model.bin"), b"PK")
        for name in os.listdir(folder):
            self.refused(os.path.join(folder, name), "name the folder")

    def test_what_cannot_be_read(self):
        folder = write_hf(self.path(), Small(True))
        os.remove(os.path.join(folder, "model.safetensors"))
        self.refused(folder, "model.safetensors", "pytorch_model.bin", "fetch")
        os.mkdir(os.path.join(folder, "model.safetensors"))
        self.refused(folder, "model.safetensors", "a file was expected")
        if os.geteuid():
            os.chmod(os.path.join(folder, "config.json"), 0)
            self.refused(folder, "config.json", "ask for the right")

    def test_the_old_format_of_pytorch(self):
        folder = write_hf(self.path(), Small(True))
        os.remove(os.path.join(folder, "model.safetensors"))
        path = os.path.join(folder, "pytorch_model.bin")
        save(path, pickle.dumps(0x1950a86a20f9469cfc6c, 2) + pickle.dumps({}, 2))
        self.refused(folder, "pytorch_model.bin", "old format")
        for content in b"", b"x", {"not": "a zip"}:
            save(path, content)
            self.refused(folder, "pytorch_model.bin")
        torch_save(path, {"model.norm.weight": 5})
        self.refused(folder, "pytorch_model.bin", "something else than tensors")
        torch_save(path, [1, 2])
        self.refused(folder, "pytorch_model.bin", "no dictionary")

    def test_outputs_that_are_no_files(self):
        folder, fifo, link = write_hf(self.path(), Small(True)), self.path(), self.path()
        os.mkfifo(fifo)
        for output in fifo, "/dev/null":
            done = run(folder, "-o", output)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1))
            self.assertIn("device or a pipe", done.stderr)
        self.assertFalse(os.path.isfile(fifo))
        os.mkdir(self.path("far"))
        target = os.path.join(self.folder, "far", "model.bin")
        save(target, b"old")
        os.symlink("far/model.bin", link)
        self.assertEqual(run(folder, "-o", link).returncode, 0)
        self.assertTrue(os.path.islink(link))
        self.assertEqual(load(target), self.export(folder))
        self.assertEqual(os.listdir(os.path.dirname(target)), ["model.bin"])

    def test_streams_that_are_closed(self):
        folder, want = write_hf(self.path(), Small(True, vocab=320)), None
        for redirection, status, words in ((">/dev/null", 0, ["warning"]), ("2>&-", 0, []),
                                           (">&-", 0, ["warning"]), (">&- 2>&-", 0, []),
                                           (">/dev/full", 1, ["warning", "standard output"])):
            out = self.path()
            command = "\"$@\" " + redirection
            if "full" in redirection and not os.path.exists("/dev/full"):
                continue
            done = subprocess.run(["sh", "-c", command, "-", sys.executable, EXPORT, folder, "-o",
                                   out], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                  universal_newlines=True)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (status, len(words)),
                             (redirection, done.stderr))
            for word in words:
                self.assertIn(word, done.stderr)
            want = want or load(out)
            self.assertEqual(load(out), want)

    def test_names_that_cannot_be_shown(self):
        folder, out = write_hf(self.path(), Small(True)), os.path.join(self.folder, "mod\u00e8le")
        for encoding in "ascii", "utf-8:strict", "cp1252":
            done = subprocess.run(
                [sys.executable, EXPORT, folder, "-o", out], stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, env=dict(os.environ, PYTHONIOENCODING=encoding))
            self.assertEqual((done.returncode, done.stderr), (0, b""))
            self.assertIn(b"layers", done.stdout)

    def test_the_output_is_not_the_input(self):
        path = self.path("v0.bin")
        save(path, v0(Small(True)))
        self.assertEqual(run(path, "-o", path).returncode, 1)
        self.assertEqual(load(path), v0(Small(True)))

    def test_as_a_program(self):
        folder, out = write_hf(self.path(), Small(True)), self.path()
        self.assertEqual(run_apart().returncode, 2)
        done = run_apart(self.folder, "-o", out)
        self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (1, "", 1))
        self.assertFalse(os.path.exists(out))
        done = run_apart(folder, "-o", out)
        self.assertEqual((done.returncode, done.stdout.count("\n"), done.stderr), (0, 1, ""))
        self.assertEqual(load(out), self.export(folder))

    def test_a_full_disk(self):
        """An error in the middle of writing leaves what was there."""
        folder, out = write_hf(self.path(), Small(True)), self.path()
        save(out, b"precious")
        done = subprocess.run(["sh", "-c", 'ulimit -f 20; trap "" XFSZ; "$@"', "-", sys.executable,
                               EXPORT, folder, "-o", out], stderr=subprocess.PIPE)
        self.assertEqual((done.returncode, done.stderr.count(b"\n")), (1, 1), done.stderr)
        self.assertEqual(load(out), b"precious")
        self.assertFalse(os.path.exists(out + ".tmp"))

    def test_torch(self):
        small = Small(False)
        path = self.path("ckpt.pt")
        save(self.path("tokenizer.model"), sentencepiece())

        def changed(name, tensor, *words, kind="model"):
            content = checkpoint(small)
            content[kind][name] = tensor
            torch_save(path, content)
            self.refused(path, *words)

        torch_save(path, checkpoint(small))
        good = load(path)
        for cut in 0, 10, len(good) // 2, len(good) - 1:
            save(path, good[:cut])
            self.refused(path, "ckpt.pt")
        torch_save(path, checkpoint(small), zipfile.ZIP_DEFLATED)
        self.refused(path, "compressed")
        # The directory at the end of the zip says how long a record is; it must lie in the file.
        at = good.rindex(b"PK\1\2")
        save(path, good[:at + 20] + struct.pack("<II", 10 ** 9, 10 ** 9) + good[at + 28:])
        self.refused(path, "truncated")
        for order in b"little", b"big":
            torch_save(path, checkpoint(small))
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr("archive/byteorder", order)
            if order == b"little":
                self.export(path)
        self.refused(path, "byte order")
        torch_save(path, {"model": {}})
        self.refused(path, "model_args")
        name, data = "layers.0.attention.wk.weight", f32([0] * 512)
        changed(name, Tensor((16, 32), data, stride=(1, 16)), name, "contiguous")
        changed(name, Tensor((16, 32), data[:-4]), name, "longer than its record")
        changed(name, Tensor((16, 32), data + data, "LongStorage"), name, "LongStorage")
        changed(name, Tensor((32, 16), data), name, "(16, 32)")
        changed(name, Tensor((-16, -32), data), "damaged")
        changed(name, 5, "damaged")
        changed("layers.0.attention.wq.bias", Tensor((32,), data[:128]), "wq.bias")
        changed("n_heads", 3, "32", "3 heads", kind="model_args")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("hello", "world")
        self.refused(path, "torch.save")

    def test_pickles_that_ask_for_memory(self):
        """One wrong byte may make a count or a place for which Python would reserve gigabytes."""
        path, size = self.path("ckpt.pt"), struct.pack("<I", 2 ** 31 - 1)
        for program, word in (
                (b"\x80\2]r" + size + b".", "in place 2147483647"),
                (b"\x80\2]p2000000000\n.", "in place 2000000000"),
                (b"\x80\2B" + size + b"x.", "bytes4"),
                (b"\x80\5\x96" + size + bytes(4) + b"x.", "bytearray8"),
                (b"\x80\2\x8b" + size + b"x.", "long4")):
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", program)
            start = time.perf_counter()
            self.refused(path, "damaged", word)
            self.assertLess(time.perf_counter() - start, 1)

    def test_meta(self):
        small = Small(False)
        folder = write_meta(self.path(), small, shards=2, use_scaled_rope=True)
        self.refused(folder, "use_scaled_rope")
        save(os.path.join(folder, "params.json"), model_args(small))
        second = os.path.join(folder, "consolidated.01.pth")
        save(second, load(second)[:-100])
        self.refused(folder, "consolidated.01.pth")
        os.remove(second)
        self.refused(folder, "has shape")
        os.remove(os.path.join(folder, "consolidated.00.pth"))
        self.refused(folder, "consolidated.00.pth")

    def test_hostile_pickles(self):
        """A pickle that wants to run something is refused by name, and runs nothing."""
        path, marker = self.path("ckpt.pt"), self.path("marker")
        for module, name, argument in (
                ("os", "system", "touch " + marker),
                ("posix", "system", "touch " + marker),
                ("builtins", "eval", "open(%r, 'w')" % marker),
                ("builtins", "getattr", marker),
                ("torch", "load", marker),
                ("torch._utils", "_rebuild_wrapper", marker),
                ("subprocess", "getoutput", "touch " + marker)):
            text = argument.encode()
            program = (b"\x80\x02c" + module.encode() + b"\n" + name.encode() + b"\nX"
                       + struct.pack("<I", len(text)) + text + b"\x85R.")
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", program)
            self.refused(path, "refuses to run %s.%s" % (module, name))
            self.assertFalse(os.path.exists(marker))

    def test_notes_of_a_training(self):
        """Objects beside the weights that nobody needs are not made, and do not stop an export."""
        small, path, marker = Small(False), self.path("ckpt.pt"), self.path("marker")
        save(self.path("tokenizer.model"), sentencepiece())
        torch_save(path, checkpoint(small))
        want = self.export(path)
        dtype = Call("numpy", "dtype", "f8", False, True)
        for note, word in (
                (Call("numpy.core.multiarray", "scalar", dtype, bytes(8)), ""),
                (Call("argparse", "Namespace"), ""), (Call("torch", "Size", (1, 2)), ""),
                (Call("builtins", "set", [1]), ""), (Call("pathlib", "PosixPath", "a", "b"), ""),
                ({Call("torch", "device", "cuda"): [Call("collections", "Counter", {})]}, ""),
                (Call("os", "system", "touch " + marker), "os.system"),
                (Call("builtins", "eval", "open(%r, 'w')" % marker), "builtins.eval"),
                (Call("some.where", "Thing"), "some.where.Thing")):
            torch_save(path, checkpoint(small, note=note))
            out = self.path()
            done = run(path, "-o", out)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (0, bool(word)),
                             done.stderr)
            self.assertIn(word, done.stderr)
            self.assertEqual(load(out), want)
            self.assertFalse(os.path.exists(marker))
        for name in "model", "model_args":
            torch_save(path, dict(checkpoint(small), **{name: Call("argparse", "Namespace")}))
            self.refused(path, "refuses to run argparse.Namespace")
        content = checkpoint(small)
        content["model"]["norm.weight"] = Call("numpy", "array")
        torch_save(path, content)
        self.refused(path, "refuses to run numpy.array")




# ------------------------------------------------------------------------------------------------
# Memory

MEASURE = """
import resource, subprocess, sys
subprocess.check_call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


class TestMemory(Case):
    def peak(self, layers):
        """The peak, in bytes, of exporting a bf16 model full of zeros, and back; and its size."""
        folder = self.path()
        sizes = dict(SIZES, dim=512, hidden=1536, heads=8, head=64, layers=layers)
        weights = {named(HF, *key): list(shape) for key, shape in shapes_of(**sizes).items()}
        header, at = {}, 0
        for name, shape in weights.items():
            header[name] = {"dtype": "BF16", "shape": shape,
                            "data_offsets": [at, at + 2 * math.prod(shape)]}
            at += 2 * math.prod(shape)
        small = Small(False, **dict(sizes, layers=0))
        write_hf(folder, small, {}, hf_config(small, num_hidden_layers=layers))
        text = json.dumps(header).encode()
        with open(os.path.join(folder, "model.safetensors"), "wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + at)         # a hole: it takes no room on the disk
        out, peak = self.path(), 0
        for command in [folder, "-o", out], [out, "--to", "hf", self.path()]:
            peak = max(peak, int(subprocess.check_output(
                [sys.executable, "-c", MEASURE, sys.executable, EXPORT] + command)))
        unit = 1 if sys.platform == "darwin" else 1024
        return peak * unit, at

    def test_memory_stays_flat(self):
        (peak, size), (larger_peak, larger_size) = self.peak(5), self.peak(20)
        self.assertGreater(larger_size, 100e6)
        self.assertLess(larger_peak, 60e6)
        self.assertLess(larger_peak - peak, (larger_size - size) / 20)


if __name__ == "__main__":
    unittest.main()
