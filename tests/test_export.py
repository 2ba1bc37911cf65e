#!/usr/bin/env python3
"""Tests of export.py.  Every input is built here, from random numbers, in a temporary folder.

    python3 -m unittest discover tests
    python3 tests/test_export.py

The main idea: write the same small model down in every format that export.py reads, by code that
shares nothing with it, and demand the same flat file every time.  The way back must lead to the
same tensors, and from there to the same flat file.
"""

import collections
import contextlib
import io
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

HERE = os.path.dirname(os.path.abspath(__file__))
EXPORT = os.path.join(os.path.dirname(HERE), "export.py")
LOGITS = os.path.join(HERE, "logits")
sys.path.insert(0, os.path.dirname(EXPORT))
import export       # noqa: E402  (the folder above must be on the path first)


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


def tokenizer_bin():
    out = struct.pack("<I", 7)
    for token, name in enumerate(NAMES):
        text = "\n%s\n" % name if token in (1, 2) else name.replace("\u2581", " ")
        out += struct.pack("<fi", score(name), len(text.encode())) + text.encode()
    return out


def tokenizer_json(**changes):
    model = {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True,
             "vocab": {name: token for token, name in enumerate(NAMES)},
             "merges": [" ".join(merge) for merge in MERGES]}
    model.update(changes.pop("model", {}))
    out = {"added_tokens": [{"id": token, "content": name, "special": True}
                            for token, name in enumerate(NAMES[:3])],
           "normalizer": {"type": "Sequence", "normalizers": [
               {"type": "Prepend", "prepend": "\u2581"},
               {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
           "pre_tokenizer": None, "decoder": None, "model": model}
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

    def persistent_id(self, thing):
        if not isinstance(thing, StorageReference):
            return None
        data = thing.tensor.data
        if not any(data is record for record in self.records):
            self.records.append(data)
        key = [data is record for record in self.records].index(True)
        return ("storage", getattr(sys.modules["torch"], thing.tensor.kind), str(key), "cpu",
                len(data))


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

FIELDS = ("dim hidden layers heads kv head vocab seq shared window theta eps bos eos flags "
          "tokenizer").split()


def parse(data, small):
    """(header, pieces, {(kind, layer): bytes})."""
    assert data[:12] == b"drugs.c\0\1\0\0\0" and not any(data[80:256])
    header = dict(zip(FIELDS, struct.unpack("<10I2f2iIQ", data[12:80])))
    pieces, at = [], 256
    for _ in range(header["vocab"]):
        value, kind, zero, length = struct.unpack_from("<fBBH", data, at)
        pieces.append((value, kind, data[at + 8:at + 8 + length]))
        assert zero == 0 and (length or kind == 1)
        at += 8 + length
    assert at == 256 + header["tokenizer"]
    tensors = {}
    for key, (shape, _) in small.weights.items():
        while at % 64:
            assert data[at] == 0
            at += 1
        tensors[key] = data[at:at + 4 * math.prod(shape)]
        at += len(tensors[key])
    assert at == len(data)
    return header, pieces, tensors


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
        self.assertEqual([header[key] for key in FIELDS[:10]],
                         [small.dim, small.hidden, small.layers, small.heads, small.kv, small.head,
                          small.vocab, small.seq, int(small.tied), 0])
        self.assertEqual((header["bos"], header["eos"], header["flags"]), (1, 2, 3))
        self.assertEqual(header["theta"], 10000)
        self.assertEqual(struct.pack("<f", header["eps"]), struct.pack("<f", 1e-5))
        self.assertEqual(pieces[:3], [(0, 2, b"<unk>"), (0, 1, b"<s>"), (0, 1, b"</s>")])
        self.assertEqual(pieces[3 + 10], (0, 3, b"\n"))
        self.assertEqual(pieces[259], (-1e9, 0, b" "))
        self.assertEqual(pieces[NAMES.index("\u2581ab")], (-2, 0, b" ab"))
        self.assertEqual(pieces[-1], (0, 1, b""))
        self.assertEqual(self.export(write_hf(self.path(), small, shards=3)), want)

        folder = self.path()
        os.makedirs(folder)
        for name, content in (("tokenizer.model", sentencepiece()),
                              ("tokenizer.json", tokenizer_json()),
                              ("tokenizer.bin", tokenizer_bin())):
            tokenizer = os.path.join(folder, "other-" + name)
            save(tokenizer, content)
            path = os.path.join(folder, "stories.bin")
            save(path, v0(small))
            self.assertEqual(self.export(path, "--tokenizer", tokenizer), want)
        os.rename(tokenizer, os.path.join(folder, "tokenizer.bin"))
        for prefix in ("", "_orig_mod."):
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
        for changes, seq in (({}, 4096), ({"norm_eps": 1e-6}, 2048), ({"rope_theta": 1e6}, 16384)):
            params = model_args(Small(False), **changes)
            del params["max_seq_len"]
            save(os.path.join(folder, "params.json"), params)
            header, _, _ = parse(self.export(folder), Small(False))
            self.assertEqual(header["seq"], seq)


class TestHuggingFace(Case):
    def header(self, small, **changes):
        config = {k: v for k, v in hf_config(small, **changes).items() if v != "absent"}
        data = self.export(write_hf(self.path(), small, config=config))
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
        both["lm_head.weight"] = [dtype, shape, bytes(len(data))]
        self.assertEqual(self.export(write_hf(self.path(), small, both)), want)

    def test_shapes(self):
        self.assertEqual(self.header(Small(False, head=6))["head"], 6)
        self.assertEqual(self.header(Small(True, kv=1))["kv"], 1)
        self.assertEqual(self.header(Small(True, kv=4), num_key_value_heads="absent")["kv"], 4)

    def test_settings(self):
        small = Small(True)
        mistral = dict(architectures=["MistralForCausalLM"])
        self.assertEqual(self.header(small, sliding_window=16, **mistral)["window"], 16)
        self.assertEqual(self.header(small, sliding_window=None, **mistral)["window"], 0)
        self.assertEqual(self.header(small, sliding_window=16)["window"], 0)
        self.assertEqual(self.header(small, rope_theta=5e5)["theta"], 5e5)
        self.assertEqual(self.header(small, rope_theta="absent")["theta"], 1e4)
        self.assertEqual(self.header(small, rope_theta="absent", rope_parameters={
            "rope_type": "default", "rope_theta": 1e6})["theta"], 1e6)
        header = self.header(small, bos_token_id=None, eos_token_id=[7, 8])
        self.assertEqual((header["bos"], header["eos"]), (1, 7))

    def test_stray_tables_are_ignored(self):
        small = Small(True)
        weights = hf_weights(small)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = ["F32", [4], bytes(16)]
        self.assertEqual(self.export(write_hf(self.path(), small, weights)),
                         self.export(write_hf(self.path(), small)))

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
    def pieces(self, content, name="tokenizer.json", quiet=True, **files):
        small = Small(True)
        folder = write_hf(self.path(), small)
        os.remove(os.path.join(folder, "tokenizer.model"))
        save(os.path.join(folder, name), content)
        for key, other in files.items():
            save(os.path.join(folder, key + ".json"), other)
        header, pieces, _ = parse(self.export(folder, quiet=quiet), small)
        return header, pieces

    def test_merges_as_lists(self):
        self.assertEqual(self.pieces(tokenizer_json(model={"merges": list(map(list, MERGES))})),
                         self.pieces(tokenizer_json()))

    def test_dummy_prefix(self):
        for changes, flag in (
                ({}, 1), ({"normalizer": None}, 0),
                ({"normalizer": None, "pre_tokenizer": {"type": "Metaspace"}}, 1),
                ({"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                    {"type": "Metaspace", "prepend_scheme": "first"}]}}, 1),
                ({"normalizer": None, "pre_tokenizer": {
                    "type": "Metaspace", "prepend_scheme": "never"}}, 0),
                ({"normalizer": None, "pre_tokenizer": {
                    "type": "Metaspace", "add_prefix_space": False}}, 0)):
            self.assertEqual(self.pieces(tokenizer_json(**changes))[0]["flags"] & 1, flag, changes)
        header, _ = self.pieces(sentencepiece(prefix=0), "tokenizer.model")
        self.assertEqual(header["flags"], 2)

    def test_ids_of_the_ends(self):
        small = Small(True)
        folder = write_hf(self.path(), small, config=hf_config(
            small, bos_token_id=None, eos_token_id=None))
        save(os.path.join(folder, "tokenizer.model"), sentencepiece(eos=-1))
        header, _, _ = parse(self.export(folder), small)
        self.assertEqual((header["bos"], header["eos"]), (1, -1))

    def test_added_tokens(self):
        added = [{"id": 270, "content": "<|im|>", "special": True},
                 {"id": 271, "content": "x\u2581y", "special": False}]
        want = [(0, 1, b"<|im|>"), (0, 4, b"x y")]
        both = tokenizer_json(added_tokens=added)
        self.assertEqual(self.pieces(both)[1][270:272], want)
        _, pieces = self.pieces(sentencepiece(), "tokenizer.model", tokenizer=both)
        self.assertEqual(pieces[270:272], want)
        self.assertEqual(pieces[:3], [(0, 2, b"<unk>"), (0, 1, b"<s>"), (0, 1, b"</s>")])
        _, pieces = self.pieces(sentencepiece(), "tokenizer.model", added_tokens={"x\u2581y": 271})
        self.assertEqual(pieces[270:272], [(0, 1, b""), (0, 4, b"x y")])

    def test_no_bytes(self):
        header, pieces = self.pieces(tokenizer_json(model={"byte_fallback": False}))
        self.assertEqual((header["flags"], pieces[3]), (1, (-1e9, 0, b"<0x00>")))

    def test_a_normaliser_is_worth_a_warning(self):
        small = Small(True)
        folder = write_hf(self.path(), small)
        save(os.path.join(folder, "tokenizer.model"), sentencepiece() + field(3, field(2, b"map")))
        done = run(folder, "-o", self.path())
        self.assertEqual((done.returncode, done.stderr.count("\n")), (0, 1))
        self.assertIn("warning", done.stderr)


# ------------------------------------------------------------------------------------------------
# The way back


def flat(pieces, small, bos=1, eos=2, prefix=1, **changes):
    """A flat file, written by code that shares nothing with export.py."""
    section = b"".join(struct.pack("<fBBH", value, kind, 0, len(text)) + text
                       for value, kind, text in pieces)
    flags = prefix | 2 * (sum(kind == 3 for _, kind, _ in pieces) == 256)
    header = dict(zip(FIELDS, (small.dim, small.hidden, small.layers, small.heads, small.kv,
                               small.head, small.vocab, small.seq, small.tied, 0, 1e4, 1e-5,
                               bos, eos, flags, len(section))), **changes)
    out = b"drugs.c\0" + struct.pack("<I", 1)
    out = (out + struct.pack("<10I2f2iIQ", *header.values())).ljust(256, b"\0") + section
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
ENDS = [(0, 2, b"<unk>"), (0, 1, b"<s>"), (0, 1, b"</s>")]
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
        self.assertEqual(sorted(os.listdir(folder)), [
            "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
        self.assertFalse(os.path.exists(folder + ".tmp"))
        return folder

    def json(self, folder, name="tokenizer.json"):
        return json.loads(load(os.path.join(folder, name)).decode())

    def there_and_back(self, data, small, *words):
        """Everything but scores survives, and those do from the second time on."""
        folder = self.back(data, *words)
        second = self.export(folder)
        third = self.export(self.back(second))
        self.assertEqual(second, third)
        (header, pieces, tensors), (header2, pieces2, tensors2) = (
            parse(data, small), parse(second, small))
        self.assertEqual((header, tensors), (header2, tensors2))
        self.assertEqual([piece[1:] for piece in pieces], [piece[1:] for piece in pieces2])
        return folder, pieces, pieces2

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
            data = flat(PADDED, small, window=16, theta=5e5, eps=eps, seq=77, bos=-1, eos=7)
            folder, _, _ = self.there_and_back(data, small)
            config = self.json(folder, "config.json")
            self.assertEqual(struct.pack("<f", config["rms_norm_eps"]), struct.pack("<f", eps))
            self.assertLessEqual(len(str(config["rms_norm_eps"])), 14)
        self.assertEqual(config["architectures"], ["MistralForCausalLM"])
        self.assertEqual((config["model_type"], config["sliding_window"], config["rope_theta"],
                          config["max_position_embeddings"], config["eos_token_id"]),
                         ("mistral", 16, 5e5, 77, 7))
        # No begin: but a reader told nothing would take <s>.
        self.assertEqual(config["bos_token_id"], -1)
        self.assertIsNone(self.json(folder)["post_processor"])
        pieces = [(0, 1, b"<end>") if piece == ENDS[1] else piece for piece in PADDED]
        folder, _, _ = self.there_and_back(flat(pieces, small, bos=-1, eos=1), small)
        config = self.json(folder, "config.json")
        self.assertEqual((config["bos_token_id"], config["eos_token_id"]), (None, 1))
        names = self.json(folder, "tokenizer_config.json")
        self.assertEqual([names[end + "_token"] for end in ("bos", "eos", "unk")],
                         [None, "<end>", "<unk>"])

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
        folder, pieces, again = self.there_and_back(flat(PADDED, small, prefix=0), small)
        self.same_encodings(folder, pieces, again, prefix=False)
        content = self.json(folder)
        self.assertEqual(content["model"]["merges"][:7], [
            "a b", "\u2581 a", "\u2581 \u2581", "b c", "a bc", "ab c", "\u2581 ab"])
        self.assertEqual([entry["id"] for entry in content["added_tokens"]], [0, 1, 2])
        bos, = content["post_processor"]["single"][:1]
        self.assertEqual(bos, {"SpecialToken": {"id": "<s>", "type_id": 0}})

        # Without bytes, their names are pieces like others.
        pieces = ENDS + [(0, 0, b"<0x41>")] + LEARNED + [(0, 1, b"")] * (280 - 22)
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
            self.assertEqual(len(before), 4)
            done = run(path, "--to", "hf", folder + ending)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1))
            self.assertIn("exists", done.stderr)
            self.assertEqual(before, {name: load(os.path.join(folder, name)) for name in before})
            shutil.rmtree(folder)
        os.makedirs(folder + ".tmp/precious")
        self.assertEqual(run(path, "--to", "hf", folder).returncode, 1)
        self.assertEqual(os.listdir(folder + ".tmp"), ["precious"])
        self.assertFalse(os.path.exists(folder))

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
        refused(good[:8] + b"\2" + good[9:], "version 2")
        for at in 80, 255:
            refused(good[:at] + b"\1" + good[at + 1:], "damaged")
        for name, value, word in (
                ("dim", 0, "dim"), ("layers", 2 ** 31 - 1, "its header says"),
                ("layers", 2 ** 31, "n_layers"), ("heads", 3, "3 query heads"), ("head", 7, "even"),
                ("vocab", 2 ** 31 - 1, "truncated"), ("shared", 2, "shared"),
                ("flags", 1, "damaged"), ("flags", 7, "damaged"), ("tokenizer", 2 ** 63, "damaged"),
                ("theta", math.nan, "rope_theta"), ("eps", -1, "norm_eps"),
                ("bos", 280, "bos_id"), ("eos", -2, "eos_id")):
            refused(flat(PADDED, small, **{name: value}), word)
        for piece, word in (
                ((math.inf, 0, b"x"), "score"), ((0, 5, b"x"), "kind 5"), ((0, 3, b"xy"), "kind 3"),
                ((0, 0, b""), "damaged"), ((0, 0, b"\xff"), "damaged"), ((0, 2, b"x"), "unknown"),
                ((0, 0, "x\u2581".encode()), "damaged"), ((0, 0, b"ab"), "both be 'ab'"),
                ((0, 0, b"<0x41>"), "both be '<0x41>'"), ((0, 1, b"<s>"), "both be '<s>'")):
            refused(flat(PADDED[:-1] + [piece], small), word)
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
                      ["--to", "hf", "x", "--tokenizer", "z"]):
            self.assertEqual(run(path, *words).returncode, 2)


# ------------------------------------------------------------------------------------------------
# Hugging Face's arithmetic, to compare with what the C program makes of the flat file


def hf_logits(small, weights, ids, theta=10000.0, eps=1e-5):
    """The logits at every position; RoPE turns i and i + head/2 together."""
    def matrix(kind, layer=0):
        _, shape, data = weights[named(HF, kind, layer)]
        numbers = floats(data)
        return [numbers[at:at + shape[-1]] for at in range(0, len(numbers), shape[-1])]

    def times(rows, x):
        return [sum(map(float.__mul__, row, x)) for row in rows]

    def norm(x, kind, layer=0):
        scale = 1 / math.sqrt(sum(v * v for v in x) / len(x) + eps)
        return [v * scale * w for v, w in zip(x, matrix(kind, layer)[0])]

    def heads(x, position, turned):
        out = [x[at:at + small.head] for at in range(0, len(x), small.head)]
        half = small.head // 2
        for head in out if turned else []:
            for i in range(half):
                angle = position * theta ** (-2 * i / small.head)
                a, b = head[i], head[i + half]
                head[i] = a * math.cos(angle) - b * math.sin(angle)
                head[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    embedding = matrix("tok_emb")
    states = [list(embedding[token]) for token in ids]
    for layer in range(small.layers):
        w = {kind: matrix(kind, layer) for kind in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")}
        keys, values = [], []
        for position, x in enumerate(states):
            h = norm(x, "att_norm", layer)
            queries = heads(times(w["wq"], h), position, True)
            keys.append(heads(times(w["wk"], h), position, True))
            values.append(heads(times(w["wv"], h), position, False))
            joined = []
            for number, query in enumerate(queries):
                group = number * small.kv // small.heads
                marks = [math.exp(sum(map(float.__mul__, query, key[group]))
                                  / math.sqrt(small.head)) for key in keys]
                joined += [sum(m * v[group][i] for m, v in zip(marks, values)) / sum(marks)
                           for i in range(small.head)]
            x = [a + b for a, b in zip(x, times(w["wo"], joined))]
            h = norm(x, "ffn_norm", layer)
            gate = [g / (1 + math.exp(-g)) for g in times(w["w1"], h)]
            hidden = list(map(float.__mul__, gate, times(w["w3"], h)))
            states[position] = [a + b for a, b in zip(x, times(w["w2"], hidden))]
    classifier = embedding if small.tied else matrix("wcls")
    return [times(classifier, norm(x, "final_norm")) for x in states]


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
            want = hf_logits(small, weights, ids)
            self.assertEqual([len(row) for row in rows], [small.vocab] * len(ids))
            for row, right in zip(rows, want):
                worst = max(abs(a - b) for a, b in zip(row, right))
                self.assertLess(worst / max(map(abs, right)), 1e-5)


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
        self.hf("rope_scaling", "llama3", rope_scaling={"rope_type": "llama3", "factor": 8})
        self.hf("rope_scaling", "linear", rope_scaling={"type": "linear", "factor": 2})
        self.hf("rope_parameters", "yarn", rope_parameters={"rope_type": "yarn"})
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
        self.hf("norm_eps", rms_norm_eps=float("nan"))
        self.hf("norm_eps", rms_norm_eps=0)
        self.hf("missing", num_hidden_layers=2 ** 31 - 1)
        self.hf("eos", eos_token_id=280)

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
                        b"IQ== 0\n" * 20, bytes(100), good.replace(b"<0x0A>", b"<0x0Z>"),
                        good.replace(struct.pack("<f", -1e9), struct.pack("<f", math.nan))):
            save(path, content)
            self.refused(folder, "tokenizer.model")
        save(path, sentencepiece(model_type=1))
        self.refused(folder, "tokenizer.model", "BPE")
        save(path, sentencepiece(NAMES + ["x"] * 20))
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
                (tokenizer_json(model={"vocab": {"a": 2 ** 60}}), "280"),
                (tokenizer_json(model={"vocab": {"a": -1}}), "280"),
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
