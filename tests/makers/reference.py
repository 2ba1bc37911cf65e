#!/usr/bin/env python3
"""reference.py - drugs.c and train_step.c said once more, and where the golden numbers come from.

    make golden                  writes tests/unit/golden.h anew
    python3 tests/makers/reference.py   prints it

A test that compares a program with itself finds nothing. So the same model is written down here a
second time, for one purpose only: to be right. It is a thousand times slower and needs nothing but
Python; every number is a double; and what drugs.c does cleverly is done here as it is defined:

    a glitch        is x cos a + o sin a |x| / |o|, with o written out
    attention       turns each key and each value as a vector, and only then looks at it
    the gradient    nobody derived: a tape notes what was computed and is played backwards
    a step          is subtracted from the weights

Read it beside drugs.c: the sections have the same order, and what has the same name does the same.
Whoever changes what the model computes on purpose changes it here too, runs `make golden`, and
sees in `git diff` which numbers moved. Only the tests of logits and gradients ask golden.h;
tests/unit/test_properties.c knows in words what each part of the noise is for.
"""
import math
import struct
from collections import namedtuple
from operator import add, mul

# =================================================================================================
# The tape
#
# train_step.c goes back through the model with derivatives that somebody derived, block by block.
# Here nobody did. Everything is computed with Vectors; an operation makes a new one, and puts on
# the tape how a gradient goes back from it to what it was made of:
#
#     forward     y = a * b       the tape:  (y, da += dy * b, db += dy * a)
#                 z = dot(y, y)              (z, dy += 2 y dz)
#     go_back     dz = 1, then the tape from its end to its beginning
#
# Whatever uses y stands on the tape behind it, so when the turn comes to y, its gradient is
# complete. That is all of automatic differentiation; the chain rule is the only thing it knows.
#
# What stands on the tape are Vectors and not single numbers, or it would be a hundred times as
# long. A single number is a Vector of one.

TAPE = []


class Vector:
    """Numbers, and how the loss changes with each of them."""

    def __init__(self, numbers):
        self.numbers = numbers
        self.gradient = None            # None: nothing has come back so far

    def receive(self, dy):
        """What comes back on one path; the paths on which a vector was used add up."""
        self.gradient = list(map(add, self.gradient, dy)) if self.gradient else list(dy)

    # The other one may be a plain number, which then stands for a vector full of it.
    def __add__(self, other):
        other = vector(other, len(self.numbers))

        def back(dy):
            self.receive(dy)
            other.receive(dy)
        return made(list(map(add, self.numbers, other.numbers)), back)

    def __mul__(self, other):           # number by number
        other = vector(other, len(self.numbers))

        def back(dy):
            self.receive(map(mul, dy, other.numbers))
            other.receive(map(mul, dy, self.numbers))
        return made(list(map(mul, self.numbers, other.numbers)), back)

    def __truediv__(self, other):
        return self * each(vector(other, len(self.numbers)), lambda x: 1 / x, lambda x, y: -y * y)

    def __sub__(self, other):
        return self + other * -1.0


def made(numbers, back):
    """The result of an operation; back hands its gradient on."""
    y = Vector(numbers)
    TAPE.append((y, back))
    return y


def go_back(loss):
    """Afterwards every Vector has its gradient, and the tape is empty."""
    loss.receive([1.0])
    while TAPE:
        y, back = TAPE.pop()
        if y.gradient:                  # else the loss does not depend on it
            back(y.gradient)


def vector(x, n):
    return x if isinstance(x, Vector) else Vector([x] * n)


def each(x, function, derivative):
    """y = function(x) for each number; the derivative is given x and y."""
    y = [function(z) for z in x.numbers]
    return made(y, lambda dy: x.receive(map(mul, dy, map(derivative, x.numbers, y))))


def sqrt(x):
    return each(x, math.sqrt, lambda x, y: .5 / y)


def exp(x):
    return each(x, math.exp, lambda x, y: y)


def log(x):
    return each(x, math.log, lambda x, y: 1 / x)


def dot(a, b):
    """One number."""
    def back(dy):
        a.receive([dy[0] * z for z in b.numbers])
        b.receive([dy[0] * z for z in a.numbers])
    return made([sum(map(mul, a.numbers, b.numbers))], back)


def sum_of(x):
    return dot(x, vector(1.0, len(x.numbers)))


def scaled(x, a):
    """x times the one number a."""
    def back(dy):
        x.receive([d * a.numbers[0] for d in dy])
        a.receive([sum(map(mul, dy, x.numbers))])
    return made([z * a.numbers[0] for z in x.numbers], back)


def pick(x, places):
    """y[i] = x[places[i]]."""
    def back(dy):
        dx = [0.0] * len(x.numbers)
        for place, d in zip(places, dy):
            dx[place] += d
        x.receive(dx)
    return made([x.numbers[place] for place in places], back)


def join(parts):
    """Vectors behind each other, as one."""
    def back(dy):
        done = 0
        for part in parts:
            part.receive(dy[done:done + len(part.numbers)])
            done += len(part.numbers)
    return made([z for part in parts for z in part.numbers], back)


def split(x, size):
    """The other way round: x in parts of this size."""
    return [pick(x, range(at, at + size)) for at in range(0, len(x.numbers), size)]


def matmul(x, w):
    """y = x wᵀ: a dot product with each row of w. dot and join could do it; but it is where the
    time goes, and this way it is one operation. y_o changes with x by the row w[o], and with that
    row by x."""
    def back(dy):
        dx = [0.0] * len(x.numbers)
        for d, row in zip(dy, w):
            dx = [z + d * v for z, v in zip(dx, row.numbers)]
            row.receive([d * z for z in x.numbers])
        x.receive(dx)
    return made([sum(map(mul, x.numbers, row.numbers)) for row in w], back)


# =================================================================================================
# 2  A model

# The layers' tensors come first, as in the enum; their places in it number the streams from which
# the models below draw their weights.

Config = namedtuple("Config", "dim hidden_dim n_layers n_heads n_kv_heads head_dim vocab_size "
                              "sliding_window rope_freq norm_eps")
LAYER_TENSORS = "att_norm wq wk wv wo ffn_norm w1 w3 w2".split()
TENSORS = LAYER_TENSORS + ["tok_emb", "final_norm", "wcls"]      # in the order of the enum


def tensor_shape(c, which):
    """n_out rows of n_in numbers. A norm's gain is one row."""
    q_dim, kv_dim = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    shapes = {
        "wq": (q_dim, c.dim),
        "wk": (kv_dim, c.dim),
        "wv": (kv_dim, c.dim),
        "wo": (c.dim, q_dim),
        "w1": (c.hidden_dim, c.dim),
        "w3": (c.hidden_dim, c.dim),
        "w2": (c.dim, c.hidden_dim),
        "tok_emb": (c.vocab_size, c.dim),
        "wcls": (c.vocab_size, c.dim),
    }
    return shapes.get(which, (1, c.dim))


class Model:
    """weights: {(which, layer): the numbers of a tensor, row by row}, with layer 0 for those that
    exist once. If there is no wcls, the embedding is the classifier too: the same Vectors, so the
    gradients of both uses add up by themselves."""

    def __init__(self, config, weights):
        self.config = config
        self.tensors = {}               # {(which, layer): its rows, as Vectors}
        for which, layer in weights:
            numbers = weights[which, layer]
            n_in = tensor_shape(config, which)[1]
            self.tensors[which, layer] = [Vector(list(numbers[at:at + n_in]))
                                          for at in range(0, len(numbers), n_in)]

    def __getitem__(self, key):
        return self.tensors[key if key in self.tensors else ("tok_emb", 0)]


def rope_frequencies(theta, head_dim):
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


# =================================================================================================
# 3  The maths

# As defined. The tape goes back through all of this, so nothing here has a twin.

def rmsnorm(x, gain, eps):
    mean = dot(x, x) / float(len(x.numbers))
    return gain * scaled(x, Vector([1.0]) / sqrt(mean + eps))


def rope_angles(c, position):
    return [position * freq for freq in c.rope_freq]


def rope(x, angles):
    """Turns each pair (a, b) to (a cos - b sin, a sin + b cos): the vector times the cosines, plus
    its pairs swapped times the sines, of which every first one is negative."""
    cosines = [math.cos(angle) for angle in angles for _ in range(2)]
    sines = [sign * math.sin(angle) for angle in angles for sign in (-1, 1)]
    swapped = pick(x, [i ^ 1 for i in range(len(x.numbers))])       # b, a, b, a, ...
    return x * Vector(cosines) + swapped * Vector(sines)


def softmax(x, scale):
    """The probabilities, and the log of the sum. The largest x is taken off, and for the tape it
    is a constant: it changes nothing, so neither does its derivative."""
    largest = max(x.numbers)
    e = exp((x + -largest) * scale)
    total = sum_of(e)
    return scaled(e, Vector([1.0]) / total), log(total) + largest * scale


def swiglu(gate, up):
    return gate / (exp(gate * -1.0) + 1.0) * up


# =================================================================================================
# 4  The noise
#
# The generator is made of whole numbers, so it can only be said as drugs.c says it, bit by bit.
# (Python's numbers have no end; MASK cuts them where those of C end.) But the rotation is done from
# its drawing in section 4: the part o of u that is perpendicular to x is written out, and so is the
# turned vector. drugs.c writes down neither. Where the two agree, its shortcuts are right.
#
# A site of your own gets a letter in SITES, and its turn below where it has it in drugs.c. Its way
# back comes from the tape.

SITES = "HQKVA"
FAMILY_CENTRED, FAMILY_UPSTREAM = range(2)
SINK = 6
Noise = namedtuple("Noise", "seed family theta")        # theta: {site: radians of each layer}
SOBER = Noise(0, FAMILY_CENTRED, {})
Place = namedtuple("Place", "key theta family")

MASK = 2 ** 64 - 1
GOLDEN_RATIO = 0x9E3779B97F4A7C15


def scramble(z):
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def within(key, v):
    """From a place to a smaller one in it."""
    return scramble(key + (v + 1) * GOLDEN_RATIO & MASK)


def uniform(key, j):
    """The j-th draw at a place, in [0, 1)."""
    x = key + j * (GOLDEN_RATIO >> 32) & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x21F0AAAD & 0xFFFFFFFF
    x = (x ^ x >> 15 ^ key >> 32) * 0xD35A2D97 & 0xFFFFFFFF
    return ((x ^ x >> 15) >> 8) / 2 ** 24


def draw_glitch(place, n):
    """The angle and the direction u (n), which do not depend on what will be turned."""
    centre = .5 if place.family == FAMILY_CENTRED else 0
    u = [uniform(place.key, i + 1) - centre for i in range(n)]
    return place.theta * uniform(place.key, 0), Vector(u)


def rotation(x, u, angle):
    xx = dot(x, x)
    if not xx.numbers[0] > 0:
        return x
    o = u - scaled(x, dot(u, x) / xx)                   # what of u is perpendicular to x
    upright = scaled(o, sqrt(xx / dot(o, o)))           # along o, and as long as x
    return x * math.cos(angle) + upright * math.sin(angle)


def turn(place, x):
    if not place.theta > 0:
        return x
    angle, u = draw_glitch(place, len(x.numbers))
    return rotation(x, u, angle)


# =================================================================================================
# 5  The forward pass

class Sequence:
    """A text, and all that the model remembers of it."""

    def __init__(self, model, noise=SOBER):
        self.k = [[] for _ in range(model.config.n_layers)]     # [layer][position][kv_head]
        self.v = [[] for _ in range(model.config.n_layers)]
        self.tokens = []
        self.first_dirty = math.inf     # the first position that may have seen noise
        self.n_drugged = 0              # tokens computed with noise since the last shower
        self.noise = noise


Row = namedtuple("Row", "token position sequence drugged")


def place_of(row, site, layer, head):
    """Of a row that is sober or in the sink, theta is 0: no glitch."""
    noise = row.sequence.noise
    theta = 0
    if row.drugged and site in noise.theta and row.position >= SINK:
        theta = noise.theta[site][layer]
    key = noise.seed
    for v in SITES.index(site), layer, head, row.position:
        key = within(key, v)
    return Place(key, theta, noise.family)


# A head of a row, and what it sees: keys and values from position `first` to its own. That they
# end at its own is the causal mask, and `first` is the sliding window.
Head = namedtuple("Head", "places first keys values angles")


def head_of(c, row, layer, head):
    n_seen = row.position + 1
    if c.sliding_window:
        n_seen = min(n_seen, c.sliding_window)
    first = row.position + 1 - n_seen
    kv_head = head // (c.n_heads // c.n_kv_heads)
    s = row.sequence
    return Head({site: place_of(row, site, layer, head) for site in SITES}, first,
                [k[kv_head] for k in s.k[layer][first:row.position + 1]],
                [v[kv_head] for v in s.v[layer][first:row.position + 1]],
                rope_angles(c, row.position))


def place_of_key(h, site, t):
    """Where this head reads key (or value) number t. So a place has the position of the query and
    that of the key; keys in the sink are read as they are."""
    place, position = h.places[site], h.first + t
    theta = place.theta if position >= SINK else 0
    return place._replace(key=within(place.key, position), theta=theta)


def attend(h, query):
    """Each key and each value that is read turned is turned here, as a vector of its own. What lies
    in the cache stays as it is, and its gradient comes back from all who read it."""
    q = rope(turn(h.places["Q"], query), h.angles)
    keys = [turn(place_of_key(h, "K", t), key) for t, key in enumerate(h.keys)]
    scale = 1 / math.sqrt(len(query.numbers))
    weight, _ = softmax(join([dot(q, key) for key in keys]), scale)
    values = [turn(place_of_key(h, "V", t), value) for t, value in enumerate(h.values)]
    out = scaled(values[0], pick(weight, [0]))
    for t in range(1, len(values)):
        out += scaled(values[t], pick(weight, [t]))
    return out


def attention(c, row, layer, q):
    """All heads, behind each other."""
    out = []
    for head, query in enumerate(split(q, c.head_dim)):
        h = head_of(c, row, layer, head)
        out.append(turn(h.places["A"], attend(h, query)))
    return join(out)


def store_keys_and_values(c, row, layer, k, v):
    """Before any K or V noise, and with RoPE: the cache knows nothing of those who read it."""
    angles = rope_angles(c, row.position)
    row.sequence.k[layer].append([rope(key, angles) for key in split(k, c.head_dim)])
    row.sequence.v[layer].append(split(v, c.head_dim))


def layer_forward(m, row, layer, x):
    """One layer for one row. drugs.c takes many rows through a layer at once, to read the weights
    only once. Here they go through the whole model one after the other, which gives the same:
    what a row sees of others was computed before it, and lies in the cache."""
    c = m.config
    # xn = rmsnorm(x), turned at H: its three readers see it turned
    xn = rmsnorm(x, m["att_norm", layer][0], c.norm_eps)
    xn = turn(place_of(row, "H", layer, 0), xn)
    q = matmul(xn, m["wq", layer])
    k = matmul(xn, m["wk", layer])
    v = matmul(xn, m["wv", layer])
    store_keys_and_values(c, row, layer, k, v)
    # xm = x + wo att
    att = attention(c, row, layer, q)
    xm = x + matmul(att, m["wo", layer])
    # x of the next layer = xm + w2 h, with h = silu(w1 fn) * w3 fn
    fn = rmsnorm(xm, m["ffn_norm", layer][0], c.norm_eps)
    gate = matmul(fn, m["w1", layer])
    up = matmul(fn, m["w3", layer])
    return xm + matmul(swiglu(gate, up), m["w2", layer])


def enter_row(row):
    """Rows in the sink are never turned, so they leave no dirt; but they count as drugged."""
    s = row.sequence
    s.tokens.append(row.token)
    if row.drugged and s.noise.theta:
        s.n_drugged += 1
        if row.position >= SINK:
            s.first_dirty = min(s.first_dirty, row.position)


def forward(m, row):
    """The logits of a row."""
    c = m.config
    enter_row(row)
    x = m["tok_emb", 0][row.token]
    for layer in range(c.n_layers):
        x = layer_forward(m, row, layer, x)
    return matmul(rmsnorm(x, m["final_norm", 0][0], c.norm_eps), m["wcls", 0])


def feed(m, s, tokens, drugged):
    """Lets a sequence read tokens. Returns the logits of each."""
    return [forward(m, Row(token, len(s.tokens), s, drugged)) for token in tokens]


def logits_of(m, tokens, noise=SOBER):
    """The logits of each token of a text, as lists of numbers, for those who want no more. What is
    on the tape is thrown away."""
    logits = [row.numbers for row in feed(m, Sequence(m, noise), tokens, True)]
    TAPE.clear()
    return logits


# =================================================================================================
# 6  The cold shower, and 10  talking

def cold_shower(m, s):
    """All from the first dirty token on is forgotten, and read again soberly."""
    again = s.tokens[min(s.first_dirty, len(s.tokens)):]
    kept = len(s.tokens) - len(again)
    for of_all in [s.tokens] + s.k + s.v:
        del of_all[kept:]
    feed(m, s, again, False)
    s.first_dirty, s.n_drugged = math.inf, 0


def write(m, noise, prompt, n_new, shower_every=0):
    """The n_new tokens that `reply` in drugs.c writes, if none of them ends the text: the prompt is
    read soberly, so the first new token is a sober one; then the most probable token is taken each
    time, and read drugged."""
    s = Sequence(m, noise)
    logits = feed(m, s, prompt, False)[-1].numbers
    written = [logits.index(max(logits))]
    while len(written) < n_new:
        if shower_every and s.n_drugged >= shower_every:
            cold_shower(m, s)
        logits = feed(m, s, written[-1:], True)[-1].numbers
        written.append(logits.index(max(logits)))
        TAPE.clear()
    return written


# =================================================================================================
# The step
#
# train_step.c never writes a gradient down, and never a stepped weight. Here both are simply made.

def loss_of(m, tokens, noise=SOBER):
    """The mean surprise at each token, after those before it."""
    rows = feed(m, Sequence(m, noise), tokens[:-1], True)
    loss = Vector([0.0])
    for logits, target in zip(rows, tokens[1:]):
        loss += softmax(logits, 1.0)[1] - pick(logits, [target])
    return loss / float(len(rows))


def backward(m, tokens, noise=SOBER):
    """The loss, and the gradient of every tensor: {(which, layer): numbers, row by row}."""
    for rows in m.tensors.values():
        for row in rows:
            row.gradient = None         # of an earlier loss
    loss = loss_of(m, tokens, noise)
    go_back(loss)
    gradient = {key: [d for row in rows for d in row.gradient or [0.0] * len(row.numbers)]
                for key, rows in m.tensors.items()}
    return loss.numbers[0], gradient


def stepped(m, gradient, step_size):
    """The model after W - step_size * dL/dW."""
    weights = {}
    for key, rows in m.tensors.items():
        numbers = [z for row in rows for z in row.numbers]
        weights[key] = [z - step_size * d for z, d in zip(numbers, gradient[key])]
    return Model(m.config, weights)


# =================================================================================================
# The models of testing.h, from the same formula

def f32(x):
    """The float that is nearest to x."""
    return struct.unpack("f", struct.pack("f", x))[0]


def unit(stream, i):
    """testing.h's own numbers in [0, 1), which are not those of the noise."""
    return (scramble(((stream << 32) + i + 1) * GOLDEN_RATIO & MASK) >> 40) / 2 ** 24


def make_tensor(c, layer, which):
    """The weights in the file are floats, so these must be the very same ones."""
    n_out, n_in = tensor_shape(c, which)
    stream = 16 * layer + TENSORS.index(which)
    u = [unit(stream, i) for i in range(n_out * n_in)]
    if n_out == 1:
        return [f32(z + .5) for z in u]
    width = f32(4 / f32(math.sqrt(n_in))) if which in LAYER_TENSORS else .5
    return [f32((z - .5) * width) for z in u]


def make_model(c, shared_classifier):
    keys = [(which, layer) for layer in range(c.n_layers) for which in LAYER_TENSORS]
    keys += [("tok_emb", 0), ("final_norm", 0)] + ([] if shared_classifier else [("wcls", 0)])
    return Model(c, {(which, layer): make_tensor(c, layer, which) for which, layer in keys})


G = Config(64, 172, 3, 8, 4, 8, 320, 0, rope_frequencies(10000, 8), f32(1e-5))
M = Config(52, 90, 2, 3, 3, 10, 93, 5, rope_frequencies(500, 10), f32(1e-3))
G_TOKENS = [1, 17, 301, 42, 42, 7, 266, 17, 130, 301, 5, 260, 99, 42, 313, 7, 7, 200, 17, 64]
M_TOKENS = [1, 60, 3, 17, 92, 60, 60, 8, 33, 3, 71, 45, 17, 92, 5, 12, 60, 88, 29, 3]
SEED = 0x9876543210
FIRST_LAYER = dict(H=.3, Q=.5, K=.4, V=.35, A=.25)
GOLDEN_SITES = "HQKVA"          # a site that comes later has no golden numbers, until you want some


def noise_at(c, sites, family=FAMILY_CENTRED):
    """Deeper layers get less."""
    theta = {site: [f32(FIRST_LAYER[site] * (1 - .25 * layer)) for layer in range(c.n_layers)]
             for site in sites}
    return Noise(SEED, family, theta)


# =================================================================================================
# golden.h

def in_braces(numbers, digits="%.8g"):
    return "{%s}" % ", ".join(digits % z for z in numbers)


def logits_row(logits, r):
    """Of row r: the norm, and some entries, other ones in each row."""
    entries = [logits[(37 * r + 53 * j + 11) % len(logits)] for j in range(6)]
    return "{%.8g, %s}" % (math.hypot(*logits), in_braces(entries))


def some_indices(gradient, n):
    """Where it is largest, and places all over the tensor, 7/41 of it apart. Where a gradient is
    next to nothing, nothing is tested: those are left out."""
    sizes = [abs(d) for d in gradient]
    largest = max(sizes)
    worth = [i for i, size in enumerate(sizes) if size > 1e-3 * largest]
    indices, j = [sizes.index(largest)], 0
    while len(indices) < n:
        j += 1
        index = worth[j * 7 * len(worth) // 41 % len(worth)]
        if index not in indices:
            indices.append(index)
    return indices


def gradient_rows(gradient):
    """Norm, sum, indices and values of each tensor."""
    for numbers in gradient.values():
        indices = some_indices(numbers, 6)
        norm, total = math.hypot(*numbers), sum(numbers)
        if abs(total) < 1e-12 * norm:       # it is 0, but for rounding, which nobody can repeat
            total = 0
        yield "    {%.8g, %.8g, %s," % (norm, total, in_braces(indices, "%d"))
        yield "     %s}," % in_braces([numbers[i] for i in indices])


def site_gradient_rows(gradient):
    """Shorter."""
    for numbers in gradient.values():
        indices = some_indices(numbers, 3)
        yield "    {%.8g, %s, %s}," % (math.hypot(*numbers), in_braces(indices, "%d"),
                                       in_braces([numbers[i] for i in indices], "%.7g"))


def print_array(declaration, lines):
    print("static const %s = {" % declaration)
    for line in lines:
        print(line)
    print("};")


def print_logits(name, m, tokens):
    logits = logits_of(m, tokens)
    print_array("GoldenRow %s_SOBER[N_TOKENS]" % name,
                ["    %s," % logits_row(row, r) for r, row in enumerate(logits)])


def print_drugged(name, m, tokens):
    noises = [noise_at(m.config, site) for site in GOLDEN_SITES]
    noises += [noise_at(m.config, GOLDEN_SITES, family)
               for family in (FAMILY_CENTRED, FAMILY_UPSTREAM)]
    lines = []
    for noise in noises:
        logits = logits_of(m, tokens, noise)
        lines.append("  {")
        lines += ["    %s," % logits_row(logits[r], r) for r in range(SINK, len(logits))]
        lines.append("  },")
    print_array("GoldenRow %s_DRUGGED[N_DOSED][N_DRUGGED]" % name, lines)


def print_gradients(name, m, tokens):
    """Returns the sober one."""
    loss, gradient = backward(m, tokens)
    loss_all, gradient_all = backward(m, tokens, noise_at(m.config, GOLDEN_SITES))
    print("// Sober, and with all five sites dosed, centred.")
    print("static const double %s_LOSS = %.10g, %s_LOSS_ALL = %.10g;"
          % (name, loss, name, loss_all))
    print_array("GoldenGradient %s_GRADIENT[%s_TENSORS]" % (name, name), gradient_rows(gradient))
    print_array("GoldenGradient %s_GRADIENT_ALL[%s_TENSORS]" % (name, name),
                gradient_rows(gradient_all))
    return gradient


def print_site_gradients(name, m, tokens):
    losses, lines = [], []
    for site in GOLDEN_SITES:
        loss, gradient = backward(m, tokens, noise_at(m.config, site))
        losses.append("%.10g," % loss)
        lines += ["  {", *site_gradient_rows(gradient), "  },"]
    print("// One site alone: H, Q, K, V, A, centred.")
    print_array("double %s_LOSS_SITE[5]" % name, ["    " + " ".join(losses)])
    print_array("GoldenSiteGradient %s_GRADIENT_SITE[5][%s_TENSORS]" % (name, name), lines)


def print_steps(name, m, tokens, gradient):
    lines = []
    for eta in .001, .1, 1:
        after = stepped(m, gradient, eta)
        logits = logits_of(after, tokens)
        loss = loss_of(after, tokens).numbers[0]
        TAPE.clear()
        lines.append("    {%g, %.10g," % (eta, loss))
        lines.append("     %s}," % logits_row(logits[-1], len(logits) - 1))
    print_array("GoldenStep %s_STEP[3]" % name, lines)


HEAD = """\
/* golden.h - what reference.py says about logits and gradients, in double precision. `make golden`
 * writes it.
 *
 * The two models, their weights and the doses are in testing.h. Tokens are read as one text, row r
 * at position r; where noise is on, every row is drugged and so each position from 6 on is turned.
 */
enum { N_TOKENS = 20, N_ENTRIES = 6, N_DRUGGED = 14, N_DOSED = 7 };"""
LOGITS = """
// Logits of row r: their L2 norm, and entries (37 r + 53 j + 11) % vocab_size for j = 0 to 5.
typedef struct { double norm, entry[N_ENTRIES]; } GoldenRow;"""
DRUGGED = """\
// The same under noise, rows 6 to 19: only H, Q, K, V, A dosed, all five, all five upstream's way.\
"""
GRADIENTS = """
// The step: loss is the mean cross-entropy (natural logarithm) of tokens[1:] given tokens[:-1], the
// gradient that of the loss. Tensors are in the order of the enum in drugs.c: ATT_NORM, WQ, WK, WV,
// WO, FFN_NORM, W1, W3, W2 of layer 0, the same of layer 1 and so on, then TOK_EMB, FINAL_NORM and,
// for M, WCLS. G's classifier is its embedding: one gradient holds both. Indices count row by row;
// the first one is where the gradient is largest.
typedef struct { double norm, sum; int index[N_ENTRIES]; double value[N_ENTRIES]; } GoldenGradient;
typedef struct { double norm; int index[3]; double value[3]; } GoldenSiteGradient;"""
STEPS = """
// After W -= eta dW on every tensor, once, with the sober gradient: the sober loss of the same
// tokens, and the logits of row 19, as above.
typedef struct { double eta, loss; GoldenRow last; } GoldenStep;"""


def print_golden():
    g = "G", make_model(G, True), G_TOKENS
    m = "M", make_model(M, False), M_TOKENS
    print(HEAD)
    for name, _, tokens in g, m:
        print_array("int %s_TOKENS[N_TOKENS]" % name, ["    %s," % ", ".join(map(str, tokens))])
    print(LOGITS)
    print_logits(*g)
    print_logits(*m)
    print(DRUGGED)
    print_drugged(*g)
    print_drugged(*m)
    print(GRADIENTS)
    print("enum { G_TENSORS = %d, M_TENSORS = %d };" % (len(g[1].tensors), len(m[1].tensors)))
    g_gradient = print_gradients(*g)
    m_gradient = print_gradients(*m)
    print_site_gradients(*g)
    print(STEPS)
    print_steps(*g, g_gradient)
    print_steps(*m, m_gradient)


if __name__ == "__main__":
    print_golden()
