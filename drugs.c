/* drugs.c - run a Llama or Mistral model on DRµGS, Deep Random Micro-Glitch Sampling.
 *
 * A language model is usually made inventive at its very end: it computes a probability for every
 * token, and we throw dice.
 * DRµGS does it the other way round.
 * While the network is still thinking, some of its hidden vectors are turned by a small random
 * angle; then we simply take the most probable token.
 * The layers after the glitch may notice it and correct it, which no dice at the end allow.
 * Only activations are touched, and only for the moment: the weights never change.
 *
 * Read the file from top to bottom:
 *
 *    1  what a layer does      a drawing, and a sentence for every word
 *    2  a model                its numbers, its tensors, its vocabulary
 *    3  the maths              products, RMSNorm, RoPE, softmax, SwiGLU
 *    4  the noise              a pure function of (seed, place)
 *    5  the forward pass       prompts, chats, showers and batches are all the same loop
 *    6  the cold shower        makes a drugged memory sober again
 *    7  doses                  where in the depth the noise acts
 *    8  the tokenizer          text to tokens and back, by byte pair encoding
 *    9  reading the file       nothing in it is believed
 *   10  talking                generate and chat
 *   11  the command line
 *   12  inside the maths       how a product becomes fast, and how exp is computed
 *   13  memory and messages    what every program needs
 *
 * Sections 1 to 5 tell how a Llama works.
 * Some functions are only declared there; sections 9, 12 and 13 define them.
 * They make sums fast, take memory, or know the shapes of tensors.
 *
 * One promise holds everywhere: the same text gives bitwise the same numbers.
 * A token may be computed alone or in a block, alone or beside other texts, on one thread or many.
 * The numbers are the same because every sum has one fixed order (section 12 says how).
 * So if two runs differ, it is because of something that you changed.
 */
#ifdef _WIN32
#error "a model's file is mapped as POSIX has it: on Windows, build this in WSL"
#endif
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#if defined __AVX2__ && defined __F16C__
#include <immintrin.h> // see section 12
#endif

// train_step.c includes this file.
// It defines DRUGS_LIBRARY first and has a main of its own.
// It does not use every function, and without OpenMP nobody calls worth_threads.
// The compiler need not warn of that.
#if defined DRUGS_LIBRARY || !defined _OPENMP
#pragma GCC diagnostic ignored "-Wunused-function"
#endif

/* ================================================================================================
 * 1  What a layer does
 *
 * Each token of a text travels through the layers as one vector, x.
 * A layer reads x twice and adds something to it twice: first what attention found in the tokens
 * before, then what a small network makes of it.
 * Follow x down the left side.
 * The names are those of the code.
 * The five letters H Q K V A mark the places where DRµGS can turn a vector.
 *
 *      x, at first the embedding's row of a token
 *      |
 *      +-------------- RMSNorm
 *      |                  | xn                        H  turns xn
 *      |       +----------+----------+
 *      |      wq         wk         wv
 *      |       | q        | k        | v              Q  turns q
 *      |     RoPE       RoPE         |
 *      |       |          |          |
 *      |       |     [ the cache of this layer ]      all tokens so far, this one included
 *      |       |          | keys     | values         K  turns the keys that a query reads
 *      |       +-- q.k ---+          |                V  turns the values that it reads
 *      |            | / sqrt(head_dim)                (what the cache holds stays as it is)
 *      |         softmax             |
 *      |            | probabilities  |
 *      |            +-- weighted sum of values
 *      |                   | att                      A  turns att
 *      |                  wo
 *      +  <----------------+
 *      | xm
 *      +-------------- RMSNorm
 *      |                  | fn
 *      |             +----+----+
 *      |            w1        w3
 *      |             | gate    | up
 *      |           silu        |
 *      |             +--- * ---+
 *      |                  | h
 *      |                 w2
 *      +  <---------------+
 *      |
 *      x of the next layer; after the last one: RMSNorm, then the classifier gives the logits
 *
 * xn is x, normed. xm is x in the middle of the layer. fn is xm, normed.
 * RMSNorm, RoPE, softmax and silu are small functions, defined in section 3.
 * wq, wk, wv, wo, w1, w2 and w3 are the layer's matrices.
 * From q to att everything is done for each head separately.
 *
 * vocabulary       the list of all tokens.
 * token            a word or a part of one, as a number: its place in the vocabulary. What it
 *                  spells is its piece.
 * weight           a number of the model. Weights come in matrices and vectors, both called
 *                  tensors. The vector that belongs to a norm is its gain.
 * embedding        the table in which each token has a row of dim numbers: its first x.
 * residual stream  the x on the left. Nothing replaces it, each half of a layer only adds to it:
 *                  so it is the memory that all layers share.
 * activation       any of these vectors. They are computed anew for every text, unlike the weights,
 *                  which are the model. DRµGS touches activations only.
 * head             attention is done several times in parallel, on slices of q, k and v that are
 *                  head_dim long. Each slice is a head and can look for something else. The rows
 *                  i * head_dim to (i + 1) * head_dim - 1 of wq make the query of head i.
 * query            what a token looks for, as a vector.
 * key              what a token offers to be found by. q.k is large when the two fit.
 * value            what a token hands over to those who find it.
 * score            q.k, for a query and each key that it sees.
 * attention        The scores of a query are divided by sqrt(head_dim), and softmax makes
 *                  probabilities of them, which add up to 1. The result is the sum of the values,
 *                  each times its probability.
 * causal           a query sees the keys up to its own position and never looks ahead. So what was
 *                  computed for a token stays valid when the text grows.
 * cache            the keys and values of a text so far, layer by layer: the model's memory of it.
 * FFN              feed-forward network: the second half of a layer. Attention carries something
 *                  from token to token; the FFN works on each token alone, on what was found.
 * BOS              "begin of sequence", the token with which each text begins if the model has one.
 * classifier       the last matrix, with a row for each token of the vocabulary.
 * logit            the last vector's product with a row of the classifier: one number for each
 *                  token of the vocabulary, the larger the more probable. softmax makes
 *                  probabilities out of them.
 * nat              the unit of -log(probability) with the natural logarithm. 0 nats: certain;
 *                  .69 nats: one half; 2.3 nats: one tenth.
 *
 * Shapes stand beside declarations as // (n_rows, dim), row-major: the last index runs fastest.
 * Angles are in radians, lengths of texts in tokens unless bytes are named.
 */

static const char *program = "drugs"; // what error messages begin with

// Prints one line on stderr and exits: 1 when something failed, 2 when the command line is wrong.
__attribute__((noreturn, format(printf, 2, 3))) static void die(int status, const char *format, ...);

static int min(int a, int b) {
    return a < b ? a : b;
}

/* ================================================================================================
 * 2  A model
 *
 * A model is a page of numbers, a few tensors for each layer, and a vocabulary.
 * All of it lies in one file that export.py wrote; section 9 reads it.
 *
 * The numbers were found in training: the model was shown text, and took very many steps like the
 * one of train_step.c.
 * A layer of Llama 2 7B has 4 * 4096² + 3 * 4096 * 11008 = 202 million of them.
 * 32 layers, the embedding and the classifier have 6.7 billion together.
 */

// The members down to n_text lie in the file just like this, one after the other.
typedef struct {
    int32_t version;
    int32_t dim;               // length of x, the residual stream
    int32_t hidden_dim;        // length of gate, up and h
    int32_t n_layers;
    int32_t n_heads;           // query heads
    int32_t n_kv_heads;        // heads of keys and values: each serves n_heads / n_kv_heads query
                               // heads (grouped-query attention)
    int32_t head_dim;
    int32_t vocab_size;
    int32_t seq_len;           // the longest context it was trained for, in tokens
    int32_t shared_classifier; // 1: the embedding serves as the classifier too
    int32_t sliding_window;    // Mistral: a query sees this many keys, itself included; 0: all
    float norm_eps;            // keeps RMSNorm from dividing by zero
    int32_t storage;           // of matrices: FP32, BF16 or FP16
    int32_t bos;               // the token that begins a text, -1: none
    int32_t unknown;           // the token for text that no piece spells, -1: none
    int32_t text_flags;        // PREFIX_SPACE to NEWLINE_SPACE, see section 8
    int32_t n_cutters;         // from here on: sizes of the tokenizer's tables
    int32_t n_states;
    int32_t n_classes;
    int32_t n_ranges;
    int32_t n_units;
    int32_t n_pairs;
    int32_t n_whole;
    int32_t n_words;
    int32_t n_text;            // bytes
    int32_t q_dim;             // from here on not in the file: n_heads * head_dim
    int32_t kv_dim;            // n_kv_heads * head_dim
} Config;

// The tensors of a layer, and then the three that exist only once.
enum {
    ATT_NORM,   // (dim) the gain of the first RMSNorm
    WQ, WK, WV, // (q_dim, dim), (kv_dim, dim), (kv_dim, dim)
    WO,         // (dim, q_dim)
    FFN_NORM,   // (dim) the gain of the second one
    W1, W3,     // (hidden_dim, dim) give gate and up
    W2,         // (dim, hidden_dim)
    N_LAYER_TENSORS,
    TOK_EMB = N_LAYER_TENSORS, // (vocab_size, dim)
    FINAL_NORM,                // (dim)
    WCLS,                      // (vocab_size, dim) the classifier; TOK_EMB once more if shared
    N_TENSORS
};

// How the numbers of a matrix are stored, in two bytes or in four.
// Most checkpoints have two bytes a weight, and the file keeps them:
//
//     FP32    s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm     sign, 8 bits of exponent, 23 of mantissa
//     BF16    s eeeeeeee mmmmmmm                     the upper half of an FP32
//     FP16    s eeeee mmmmmmmmmm                     fewer exponents, more digits
//
// Both become FP32 in a register, when they are used.
// Nothing is rounded, as an FP32 has room for all of their digits and exponents.
// So the results are, to the last bit, those of a file with four bytes a weight.
// But only half as many bytes must come from memory.
// To write one token all weights come from memory once, and that is what takes the time.
// Gains are few and always FP32.
enum { FP32, BF16, FP16, N_STORAGES };
typedef struct {
    const void *data;
    int storage;
} Weights;

// Bytes of a number.
static int bytes_of(int storage) {
    return storage == FP32 ? 4 : 2;
}

// A layer's tensors.
// Layer 0 also has the ones that exist once, so that a layer and a name lead to every tensor.
typedef struct {
    Weights w[N_TENSORS];
} Layer;

typedef struct Tokenizer Tokenizer; // section 8

typedef struct {
    Config config;
    Tokenizer *tokenizer;
    Layer *layers;       // (n_layers)
    const double *rope_freq; // (head_dim / 2) radians per position
    void *file;          // the mapped file, NULL if the caller has the bytes
    size_t file_bytes;
    char error[160];     // what is wrong with the file
} Model;

/* ================================================================================================
 * 3  The maths
 *
 * A weight matrix w (n_out, n_in) maps a vector of n_in numbers to n_out numbers; each of these is
 * the dot product of the vector with one row of w.
 * That is where nearly all of the time goes.
 * How it is made fast can wait until section 12; what it computes is said here.
 */

// "#pragma omp parallel for" (OpenMP) shares a loop out among the cores.
// To wake the threads takes some microseconds, and one core reads about 100,000 bytes in that time.
// So a loop that reads fewer bytes stays on one core.
// Other work is counted as the bytes that could be read in its time.
enum { WORTH_THREADS = 1 << 17 };
// Whether a loop that reads this many bytes is worth all threads, see section 12.
static bool worth_threads(double bytes);
// What a product costs, in bytes that are read: its weights, and half a byte for the time of each
// multiply-add.
static double product_bytes(Weights w, double n_rows, double n_in, double n_out) {
    return n_in * n_out * (bytes_of(w.storage) + .5 * n_rows);
}

// The sum of a[i] * b[i], for i < n.
static float dot(const float *a, const float *b, int n);

// out[o] = x . w[o], for n_out vectors w[o] of length n that lie w_stride floats apart.
static void dots(float *out, const float *x, const float *w, ptrdiff_t w_stride, int n, int n_out);

// out = x wᵀ, for n_rows vectors x at once.
static void matmul(float *out,     // (n_rows, n_out)
                   const float *x, // (n_rows, n_in)
                   Weights w,      // (n_out, n_in)
                   ptrdiff_t n_rows, ptrdiff_t n_in, ptrdiff_t n_out);

// to[i] = w[first + i], for i < n.
static void widen(float *to, Weights w, ptrdiff_t first, ptrdiff_t n);

// y[i] += a * x[i], for i < n.
static void add_scaled(float *y, float a, const float *x, int n);

// The sum of x[i], for i < n.
static float sum_of(const float *x, int n);

// x[i] = exp(x[i]), for i < n, to within 2 units of the last digit.
// Below -87 the result is 0, above 88 it is exp(88).
static void exp_all(float *x, int n);

// The cosine and the sine of an angle of up to 2^28 radians, to within 1e-15.
static void cos_sin_of(double angle, double *cosine, double *sine);

// RMSNorm (Zhang and Sennrich 2019), for one vector:
//
//     y = gain * x / sqrt(eps + mean of x²)
//
// Each layer adds to the stream, so it grows.
// The norm hands every matrix numbers of about size 1, however deep it sits.
//
// Apart from the gain it forgets the length of a vector and keeps its direction.
// Every reader of the residual stream reads it through a norm.
// So it sees where the stream points, and not how long it is.
// But DRµGS turns vectors that come after the norm, and there the length counts.
// So the noise itself must leave lengths alone.
static void rmsnorm(float *y, const float *x, const float *gain, int dim, float eps) {
    float mean_square = dot(x, x, dim) / (float)dim;
    float scale = 1.0f / sqrtf(mean_square + eps);
    for (int i = 0; i < dim; i++)
        y[i] = gain[i] * (x[i] * scale);
}

// RoPE (Su et al. 2021) tells a query or a key at which position it stands.
// The numbers of a head are taken in pairs, x[2i] and x[2i + 1].
// Each pair is turned like the hand of a clock, by
//
//     position * rope_freq[i]   radians,       rope_freq[i] = theta^(-2i / head_dim)
//
// theta is a number of the model: 10,000 in Llama 2, 500,000 in Llama 3.
// So the first pairs are fast hands, which tell neighbours apart but look alike after a full turn.
// The last ones hardly move, and tell far from near.
// (export.py computes rope_freq. Models stretched to longer texts turn some pairs slower.)
//
// If two hands are turned by the same angle, their dot product stays the same.
// So take a key at position n and a query at position m, and turn both back by n * rope_freq[i].
// The key then looks like one at position 0, and the query like one at m - n.
// So q.k depends on how far back the key lies, m - n, and on nothing else of the positions.
// That is why a passage reads alike anywhere in a text.
// (Hugging Face pairs i with i + head_dim / 2; export.py puts the rows of wq and wk in our order.)
static void rope(float *x,             // (head_dim)
                 const float *cos_sin, // (head_dim) the cosine and the sine for each pair
                 int head_dim) {
    for (int i = 0; i < head_dim; i += 2) {
        float a = x[i];
        float b = x[i + 1];
        float cosine = cos_sin[i];
        float sine = cos_sin[i + 1];
        float minus_sine = -sine; // gcc 12 would fuse a * cosine - b * sine: see section 12
        x[i] = a * cosine + b * minus_sine;
        x[i + 1] = a * sine + b * cosine;
    }
}

// The cosines and sines of a position, for rope.
static void rope_angles(const Model *m, int position, float *cos_sin);

// softmax: x[i] = exp(scale * x[i]) / the sum of all exp(scale * x[j]), with a positive scale.
// What comes out adds up to 1.
// The largest x is taken off first: that changes nothing in the quotient, and exp cannot overflow.
//
// It returns the logarithm of that sum, which only train_step.c uses, for a loss:
// -log(probability of i) = log(sum) - scale * x[i].
// (The logarithm of the probability itself would not do, as a small one is rounded to 0.
// A loss is only printed, so this log may be libm's.)
static double softmax(float *x, int n, float scale) {
    float max = x[0];
    for (int i = 1; i < n; i++)
        max = x[i] > max ? x[i] : max;
    for (int i = 0; i < n; i++)
        x[i] = (x[i] - max) * scale;
    exp_all(x, n);
    float sum = sum_of(x, n);
    for (int i = 0; i < n; i++)
        x[i] /= sum;
    return log(sum) + max * (double)scale;
}

// SwiGLU (Shazeer 2020): h = silu(gate) * up, with silu(z) = z / (1 + exp(-z)).
//
// silu is nearly 0 for a very negative z and nearly z for a large one.
// So each gate decides how much of its up gets through.
//
// A layer needs something that is not linear: here silu and the product with up, in attention
// softmax, and the norms.
// Matrices alone, one after the other, could do no more than a single one, their product.
static void swiglu(float *h, const float *gate, const float *up, // (n_rows, hidden_dim) each
                   int n_rows, int hidden_dim) {
    ptrdiff_t size = (ptrdiff_t)n_rows * hidden_dim;
    // An exp takes as long as reading some 8 bytes.
#pragma omp parallel for schedule(static) if (worth_threads(size * 8.0))
    for (ptrdiff_t first = 0; first < size; first += hidden_dim) {
        for (ptrdiff_t i = first; i < first + hidden_dim; i++)
            h[i] = -gate[i];
        exp_all(h + first, hidden_dim);
        for (ptrdiff_t i = first; i < first + hidden_dim; i++)
            h[i] = gate[i] / (1.0f + h[i]) * up[i];
    }
}

// y = a + b, for n numbers.
static void add(float *y, const float *a, const float *b, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++)
        y[i] = a[i] + b[i];
}

/* ================================================================================================
 * 4  The noise
 *
 * A glitch turns a vector x by an angle, towards a random direction u.
 *
 * Why turn it, and not simply add something?
 * Adding a vector of a fixed length would be a storm for a short x and nothing for a long one.
 * An angle means the same for every x.
 * And turning leaves the length alone: the glitch changes what a vector says, not how loudly.
 *
 *              r              as long as x
 *             /|
 *            / |              this side has the length |x| sin(angle), and points along o
 *           /  |
 *          +---+-----> x      this one has the length |x| cos(angle)
 *
 *     o = u - (u.x / x.x) x                        the part of u that is perpendicular to x
 *     r = x cos(angle) + o |x| sin(angle) / |o|
 *
 * (In many dimensions a random direction is nearly perpendicular to x anyway, so o is nearly u.)
 *
 * By Pythagoras |r|² = |x|² (cos² + sin²) = |x|².
 * Put o in, and collect what stands before x and before u:
 *
 *     r = a x + b u       with  b = sin(angle) |x| / |o|  and  a = cos(angle) - b u.x / x.x
 *
 * So two numbers, a and b, describe the turned vector: they are struct Glitch.
 * o itself is not needed for |o|, again by Pythagoras: |o|² = u.u - (u.x)² / x.x.
 *
 * The dose is theta, and the angle is theta times a random number, uniform in [0, 1).
 * So a glitch turns by half of theta on average.
 * At pi, half a turn, a vector can come to point the other way. A larger theta goes round again.
 * On V and A of the included model .5 is a light dose and 1 a lot; the other sites, and models with
 * more layers, take less (the original doses A of a 7B model with .1).
 * Five sites can be dosed, the letters of the drawing in section 1:
 *
 *     H  the input of attention, before wq, wk and wv: so its noise enters the cache of its layer
 *     Q  the query of each head, before RoPE
 *     K  a key, while a query head reads it
 *     V  a value, while a query head reads it
 *     A  the output of each head, before wo
 *
 * K and V belong to the reader: each query turns what it reads with glitches of its own, and what
 * the cache holds of the token that is read stays as it is.
 * (But the reader finds something else then, and the next layer makes its keys and values of that.)
 * So K and V act on the prompt's keys and values, too, as soon as a drugged token reads them.
 *
 * No random generator runs along.
 * Each glitch is a pure function of (seed, place), where a place is site, layer, head, query
 * position and, for K and V, key position.
 * So a drugged run can be repeated to the last bit and in any order.
 * If a glitch is needed again, it is simply drawn again:
 *
 *     hash = seed;  for v in site, layer, head, query position (, key position):
 *         hash = scramble(hash + (v + 1) * 0x9E3779B97F4A7C15)
 *     uniform(j) = 24 bits of a hash of (hash, j), / 2^24
 *     angle = theta * uniform(0)       u[i] = uniform(i + 1) - 1/2
 *
 * (scramble mixes the bits of a number, see below.)
 *
 * The original (EGjoni/DRUGS) draws u from [0, 1), without the 1/2.
 * Such numbers are 1/2 on average, so all u lean towards (1, 1, ..., 1): the cosine of two of them
 * is 3/4, and most of the noise is one fixed push.
 * FAMILY_UPSTREAM does that.
 */
enum { SITE_H, SITE_Q, SITE_K, SITE_V, SITE_A, N_SITES };
static const char SITES[] = "HQKVA"; // the letters, in the order of the enum
_Static_assert(sizeof SITES == N_SITES + 1, "each site has a letter");

// The dice of a temperature (section 10) are drawn at a "site" of their own.
enum { SITE_SAMPLE = 1000 }; // far above N_SITES, so that a new site does not change the dice

// How random directions are drawn.
enum { FAMILY_CENTRED, FAMILY_UPSTREAM };

// The probabilities of attention add up to 1, even when no key fits the query.
// Models learn to put them on the first tokens then: a sink (Xiao et al. 2023).
// Large models break when the sink is moved.
// So keys and values of positions 0 to 5 are read as they are.
// In the rows of these positions nothing is turned either: the next layer makes their keys and
// values of what is computed there.
// Six is the original's choice.
enum { SINK = 6 };

typedef struct {
    uint64_t seed;
    int family;
    const float *theta; // (N_SITES, n_layers) radians, NULL: sober
} Noise;

// A place where a glitch can happen, as all that it takes to draw the glitch.
typedef struct {
    uint64_t hash; // of the seed, the site, the layer, the head and the positions
    float theta; // radians, 0: no glitch here
    int family;
} Place;

// A glitch as its two factors: the turned vector is a x + b u.
typedef struct {
    float a, b;
} Glitch;

// splitmix64's finaliser (Steele, Lea, Flood 2014).
// If one bit of z changes, about half of the bits of the result change.
static uint64_t scramble(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// 2^64 divided by the golden ratio: multiples of it lie far from each other.
static const uint64_t GOLDEN_RATIO = 0x9E3779B97F4A7C15u;

// Descends from a place to a smaller one within it: from a layer to a head, say.
static uint64_t within(uint64_t hash, int v) {
    return scramble(hash + ((uint64_t)v + 1) * GOLDEN_RATIO);
}

// Draw number j at a place, uniform in [0, 1) with 24 bits, which a float holds exactly.
// It has no state and needs 32-bit arithmetic only, so the compiler can draw eight at once.
// (The cast to int32_t is for speed: most processors convert only signed numbers eight at once.)
// The multipliers are from Wellons' hash-prospector.
static inline float uniform(uint64_t hash, uint32_t j) {
    uint32_t x = (uint32_t)hash + j * (uint32_t)(GOLDEN_RATIO >> 32);
    x = (x ^ (x >> 16)) * 0x21F0AAADu;
    x = (x ^ (x >> 15) ^ (uint32_t)(hash >> 32)) * 0xD35A2D97u;
    x = (x ^ (x >> 15)) >> 8;
    return (float)(int32_t)x * 0x1p-24f;
}

// The rotation of x (n) towards u (n), as derived above.
// A vector of zeros has no direction, and one that is parallel to u has nowhere to turn: both stay.
static Glitch rotation(const float *x, const float *u, int n, float angle) {
    double xx = dot(x, x, n);
    double ux = dot(u, x, n);
    double uu = dot(u, u, n);
    double oo = uu - ux * ux / xx;
    if (!(xx > 0 && oo > 1e-6 * uu))
        return (Glitch){1, 0};
    double cosine, sine;
    cos_sin_of(angle, &cosine, &sine);
    double b = sine * sqrt(xx / oo);
    return (Glitch){(float)(cosine - b * ux / xx), (float)b};
}

// Draws the glitch of a place for x (n). u (n) is filled with the direction.
static Glitch draw_glitch(Place place, const float *x, int n, float *u) {
    float centre = place.family == FAMILY_CENTRED ? 0.5f : 0.0f;
    for (int i = 0; i < n; i++)
        u[i] = uniform(place.hash, (uint32_t)i + 1) - centre;
    return rotation(x, u, n, place.theta * uniform(place.hash, 0));
}

// Turns x (n) where it stands, for the sites H, Q and A. u (n) is scratch.
static void turn(Place place, float *x, int n, float *u) {
    if (!(place.theta > 0))
        return;
    Glitch glitch = draw_glitch(place, x, n, u);
    for (int i = 0; i < n; i++)
        x[i] = glitch.a * x[i] + glitch.b * u[i];
}

/* ================================================================================================
 * 5  The forward pass
 *
 * It works on rows. A row is one token at one position of one text, its sequence:
 *
 *     a prompt                   many rows of one sequence
 *     the next token             one row
 *     eight texts side by side   eight rows of eight sequences
 *     a cold shower              many rows of one sequence, once more
 *
 *                     (n_rows, dim)
 *              +----------------------+
 *     row 0    |  x of "To"           |   sequence A, position 7
 *     row 1    |  x of "be"           |   sequence A, position 8: sees row 0 through A's cache
 *     row 2    |  x of "Hamlet"       |   sequence B, position 3: does not know of A
 *              +----------------------+
 *
 * Sober means without noise, drugged means with it.
 * A key or value is dirty if noise took part in it, or if it came from something dirty.
 *
 * A matrix is read once for all rows of a call, and reading matrices is what takes the time.
 * Rows meet nowhere but in attention, and there only through the cache of their own sequence.
 */

// A text in the making, and all that the model remembers of it.
typedef struct {
    float **k;       // (n_layers) keys of each layer: (capacity, kv_dim)
    float **v;       // (n_layers) values, likewise
    int *tokens;     // (capacity)
    int length;      // tokens that are remembered
    int capacity;    // tokens that there is room for
    int first_dirty; // the position from which on keys and values may have seen noise, or CLEAN
    int n_drugged;   // tokens computed with noise since the last shower, those in the sink included
    Noise noise;
    float step_size; // of a virtual step of train_step.c; 0: the weights as they are
} Sequence;
enum { CLEAN = INT_MAX };

typedef struct {
    int token;
    int position;
    Sequence *sequence;
    bool drugged;      // does the sequence's noise act on this row?
    bool wants_logits;
    float *logits;     // out: (vocab_size), valid until the next forward; NULL if not wanted
} Row;

// The buffers of one layer, with the names of the drawing: a row in each for every row of a call.
typedef struct {
    float *x;    // (n_rows, dim) the residual stream as it enters the layer
    float *xn;   // (n_rows, dim) normed, and turned at site H
    float *q;    // (n_rows, q_dim) before noise and RoPE
    float *k;    // (n_rows, kv_dim) on their way into the cache
    float *v;    // (n_rows, kv_dim) likewise
    float *att;  // (n_rows, q_dim) what attention found, turned at site A
    float *xm;   // (n_rows, dim) the residual stream between the two halves
    float *fn;   // (n_rows, dim) normed again
    float *gate; // (n_rows, hidden_dim)
    float *up;   // (n_rows, hidden_dim)
    float *h;    // (n_rows, hidden_dim) silu(gate) * up
} Slot;

// The working memory of forward.
//
// Layer l uses slot number l % n_slots, and there are one or n_layers + 1 slots.
// With one slot all layers share it: each writes its result over its own x, which is used up.
// With n_layers + 1 slots everything that was computed is kept, for the way back of train_step.c.
// Then the x of the last slot is what left the layers.
typedef struct Run {
    const Model *model;
    int max_rows;     // that there is room for
    int n_slots;
    Slot *slots;      // (n_slots)
    const Row *rows;  // (n_rows) what is being computed; in classify only those that want logits
    int n_rows;
    Row *block;       // (max_rows) the rows that read_block makes
    float *added;     // (max_rows, dim) what half a layer adds to the residual stream
    float *cos_sin;   // (max_rows, head_dim) for RoPE
    Row *wanted;      // (max_rows) copies of the rows that want logits, ...
    float *last_x;    // (max_rows, dim) ... what left the layers for these,
    float *last_xn;   // (max_rows, dim) normed,
    float *logits;    // (max_rows, vocab_size) and classified
    float *direction; // (dim) u, for site H
    float **buffers;  // (n_buffers) all that new_buffer made, for run_free
    int n_buffers;
    float *heads;     // (n_heads, head_scratch) of each head, see struct Head
    // If set, called after each use of a tensor (which: ATT_NORM to WCLS) with what went in, x, and
    // what came out, y. train_step.c changes y there, as if the weights had had a step.
    void (*hook)(const struct Run *run, int layer, int which, const float *x, float *y);
    void *owner;      // for the hook
} Run;

// The floats of scratch memory that a head needs, for as many keys as there can be.
// The system brings in memory page by page when it is first touched, so short texts need little.
static ptrdiff_t head_scratch(const Config *c) {
    ptrdiff_t most = c->seq_len;
    if (c->sliding_window)
        most = min(most, c->sliding_window);
    return 2 * c->head_dim + most;
}

// ---- places of glitches

// The place of a row's glitch at a site. Sober rows and rows in the sink have none: theta is 0.
static Place place_of(const Model *m, const Row *row, int site, int layer, int head) {
    const Noise *noise = &row->sequence->noise;
    Place place = {.family = noise->family};
    if (row->drugged && noise->theta && row->position >= SINK)
        place.theta = noise->theta[site * m->config.n_layers + layer];
    place.hash = within(within(within(within(noise->seed, site), layer), head), row->position);
    return place;
}

// ---- attention

// One head of one row: what it sees, and its scratch memory.
//
//     its part of run->heads:    | q (head_dim) | u (head_dim) | prob (n_keys)        ...|
//
// The keys of a kv head lie `stride` floats apart in the cache, because a token's keys of all kv
// heads lie side by side:
//
//     position first       | kv head 0 | kv head 1 | ...
//     position first + 1   | kv head 0 | kv head 1 | ...
typedef struct {
    Place places[N_SITES]; // of its glitches
    int kv_head;           // whose keys and values it reads
    int first;             // the position of the oldest key it sees
    int n_keys;
    ptrdiff_t stride;      // kv_dim
    const float *keys;     // (n_keys, head_dim), stride apart
    const float *values;   // (n_keys, head_dim), stride apart
    const float *cos_sin;  // (head_dim) of the query's position
    float *q;              // (head_dim) the query, turned by noise and by RoPE
    float *u;              // (head_dim) a random direction
    float *prob;           // (n_keys) scores, then what softmax makes of them
} Head;

// What a head of row r sees: the keys from position `first` to the row's own.
// Later keys are never read: that makes attention causal.
// With a sliding window only the last keys are read. The older ones stay in the cache unread.
// Late queries then do not see the sink, as it was when such models were trained.
static Head head_of(const Run *run, ptrdiff_t r, int layer, int head, float *scratch) {
    const Config *c = &run->model->config;
    const Row *row = &run->rows[r];
    int n_seen = row->position + 1;
    if (c->sliding_window)
        n_seen = min(n_seen, c->sliding_window);
    Head h = {
        .kv_head = head / (c->n_heads / c->n_kv_heads),
        .first = row->position + 1 - n_seen,
        .n_keys = n_seen,
        .stride = c->kv_dim,
        .cos_sin = run->cos_sin + r * c->head_dim,
        .q = scratch,
        .u = scratch + c->head_dim,
        .prob = scratch + 2 * c->head_dim,
    };
    ptrdiff_t start = h.first * h.stride + h.kv_head * c->head_dim;
    h.keys = row->sequence->k[layer] + start;
    h.values = row->sequence->v[layer] + start;
    for (int site = 0; site < N_SITES; site++)
        h.places[site] = place_of(run->model, row, site, layer, head);
    return h;
}

// For the sites K and V: the place of key number t, as this head reads it.
static Place place_of_key(const Head *h, int site, int t) {
    Place place = h->places[site];
    place.hash = within(place.hash, h->first + t);
    return place;
}

// How many of the keys are read as they are: those in the sink, or all if the site has no dose.
static int n_untouched_keys(const Head *h, int site) {
    int n = h->places[site].theta > 0 ? SINK - h->first : h->n_keys;
    return n < 0 ? 0 : min(n, h->n_keys);
}

// How well does the query fit each key, and what do the values of those that fit say?
//
//     prob = softmax(q.key / sqrt(head_dim))       out = the sum of prob * value
//
// A sum of head_dim products of either sign grows like the root of head_dim.
// Dividing by that root keeps softmax from choosing a single key.
// Query and probabilities stay in the head's scratch memory, where train_step.c finds them.
static void attend(const Head *h, int head_dim,
                   const float *query, // (head_dim) before noise and RoPE
                   float *out) {       // (head_dim) before noise at A
    memcpy(h->q, query, head_dim * sizeof *query);
    turn(h->places[SITE_Q], h->q, head_dim, h->u);
    rope(h->q, h->cos_sin, head_dim);

    // A turned key is a key + b u, so its product with q is a q.key + b q.u.
    // The turned key is not stored.
    // If it were, each later reader would turn it once more: noise would pile up, and depend on
    // which reader came first.
    dots(h->prob, h->q, h->keys, h->stride, head_dim, h->n_keys);
    for (int t = n_untouched_keys(h, SITE_K); t < h->n_keys; t++) {
        Place place = place_of_key(h, SITE_K, t);
        Glitch glitch = draw_glitch(place, h->keys + t * h->stride, head_dim, h->u);
        h->prob[t] = h->prob[t] * glitch.a + dot(h->q, h->u, head_dim) * glitch.b;
    }
    softmax(h->prob, h->n_keys, 1.0f / sqrtf((float)head_dim));

    // Likewise for values.
    int n_untouched = n_untouched_keys(h, SITE_V);
    memset(out, 0, head_dim * sizeof *out);
    for (int t = 0; t < n_untouched; t++)
        add_scaled(out, h->prob[t], h->values + t * h->stride, head_dim);
    for (int t = n_untouched; t < h->n_keys; t++) {
        const float *value = h->values + t * h->stride;
        Glitch glitch = draw_glitch(place_of_key(h, SITE_V, t), value, head_dim, h->u);
        add_scaled(out, h->prob[t] * glitch.a, value, head_dim);
        add_scaled(out, h->prob[t] * glitch.b, h->u, head_dim);
    }
}

// The bytes of all keys and values that the rows of a call read, once for each query head.
static double attention_bytes(const Run *run, int layer) {
    double n_seen = 0;
    for (ptrdiff_t r = 0; r < run->n_rows; r++)
        n_seen += head_of(run, r, layer, 0, run->heads).n_keys;
    return n_seen * run->model->config.q_dim * 2 * sizeof(float);
}

// att of all rows, head by head, turned at site A.
static void attention(Run *run, int layer) {
    const Config *c = &run->model->config;
    const Slot *slot = &run->slots[layer % run->n_slots];
    const ptrdiff_t n_rows = run->n_rows;
#pragma omp parallel for schedule(static) if (worth_threads(attention_bytes(run, layer)))
    for (int head = 0; head < c->n_heads; head++)
        for (ptrdiff_t r = 0; r < n_rows; r++) {
            float *scratch = run->heads + head * head_scratch(c);
            Head h = head_of(run, r, layer, head, scratch);
            float *att = slot->att + r * c->q_dim + head * c->head_dim;
            attend(&h, c->head_dim, slot->q + r * c->q_dim + head * c->head_dim, att);
            turn(h.places[SITE_A], att, c->head_dim, h.u);
        }
}

// ---- the weights: on the way forward only embed, norm and linear read them

static void call_hook(const Run *run, int layer, int which, const float *x, float *y) {
    if (run->hook)
        run->hook(run, layer, which, x, y);
}

// The rows' tokens -> x (n_rows, dim).
static void embed(const Run *run, float *x) {
    const Model *m = run->model;
    ptrdiff_t dim = m->config.dim;
    for (ptrdiff_t r = 0; r < run->n_rows; r++)
        widen(x + r * dim, m->layers[0].w[TOK_EMB], run->rows[r].token * dim, dim);
    call_hook(run, 0, TOK_EMB, NULL, x);
}

// The gain of a norm, (dim).
static const float *gain_of(const Model *m, int layer, int which) {
    return m->layers[layer].w[which].data;
}

// y = rmsnorm(x) for all rows, both (n_rows, dim).
static void norm(const Run *run, float *y, const float *x, int layer, int which) {
    const Config *c = &run->model->config;
    const float *gain = gain_of(run->model, layer, which);
    for (ptrdiff_t r = 0; r < run->n_rows; r++)
        rmsnorm(y + r * c->dim, x + r * c->dim, gain, c->dim, c->norm_eps);
    call_hook(run, layer, which, x, y);
}

// The shape of a tensor: n_out rows of n_in floats. A norm's gain is one row.
static void tensor_shape(const Config *c, int which, int *n_out, int *n_in);

// y = x wᵀ for all rows, x (n_rows, n_in), y (n_rows, n_out). The classifier is one of these.
static void linear(const Run *run, float *y, const float *x, int layer, int which) {
    int n_out, n_in;
    tensor_shape(&run->model->config, which, &n_out, &n_in);
    matmul(y, x, run->model->layers[layer].w[which], run->n_rows, n_in, n_out);
    call_hook(run, layer, which, x, y);
}

// ---- the layers

// Makes room for exactly `capacity` tokens, if there is less.
static void sequence_reserve(const Model *m, Sequence *s, int capacity);

// Notes a row in its sequence: its token, and whether it makes the cache dirty.
// A row in the sink is never turned, so it leaves no dirt.
// It is counted in n_drugged all the same, as -c counts tokens and not glitches.
static void enter_row(const Model *m, const Row *row) {
    Sequence *s = row->sequence;
    int needed = row->position + 1;
    if (needed > s->capacity) // half as much again, so that growing by one token stays cheap
        sequence_reserve(m, s, needed + needed / 2);
    if (needed > s->length)
        s->length = needed;
    s->tokens[row->position] = row->token;
    if (row->drugged && s->noise.theta) {
        s->n_drugged++;
        if (row->position >= SINK)
            s->first_dirty = min(s->first_dirty, row->position);
    }
}

// Before the layers: the sequences learn of their rows, and RoPE's angles are computed.
static void enter_rows(Run *run, const Row *rows, int n_rows) {
    const Model *m = run->model;
    run->rows = rows;
    run->n_rows = n_rows;
    for (ptrdiff_t r = 0; r < n_rows; r++) {
        enter_row(m, &rows[r]);
        rope_angles(m, rows[r].position, run->cos_sin + r * m->config.head_dim);
    }
}

// Turns the keys by RoPE, and copies keys and values into the caches. K and V noise come later.
static void store_keys_and_values(const Run *run, const Slot *slot, int layer) {
    const Config *c = &run->model->config;
    ptrdiff_t kv_dim = c->kv_dim;
    for (ptrdiff_t r = 0; r < run->n_rows; r++) {
        const Sequence *to = run->rows[r].sequence;
        ptrdiff_t at = run->rows[r].position * kv_dim;
        float *k = slot->k + r * kv_dim;
        for (int i = 0; i < kv_dim; i += c->head_dim)
            rope(k + i, run->cos_sin + r * c->head_dim, c->head_dim);
        memcpy(to->k[layer] + at, k, kv_dim * sizeof *k);
        memcpy(to->v[layer] + at, slot->v + r * kv_dim, kv_dim * sizeof *k);
    }
}

// One layer, as drawn in section 1: from the x of its slot to the x of the next one.
// On the way back: layer_backward in train_step.c.
static void layer_forward(Run *run, int layer) {
    const Config *c = &run->model->config;
    const Slot *slot = &run->slots[layer % run->n_slots];
    const Slot *next = &run->slots[(layer + 1) % run->n_slots];
    ptrdiff_t dim = c->dim;
    ptrdiff_t size = run->n_rows * dim;

    // xn = rmsnorm(x), turned at H
    norm(run, slot->xn, slot->x, layer, ATT_NORM);
    for (ptrdiff_t r = 0; r < run->n_rows; r++) {
        Place place = place_of(run->model, &run->rows[r], SITE_H, layer, 0);
        turn(place, slot->xn + r * dim, c->dim, run->direction);
    }

    // its three readers
    linear(run, slot->q, slot->xn, layer, WQ);
    linear(run, slot->k, slot->xn, layer, WK);
    linear(run, slot->v, slot->xn, layer, WV);
    store_keys_and_values(run, slot, layer);

    // xm = x + wo att
    attention(run, layer);
    linear(run, run->added, slot->att, layer, WO);
    add(slot->xm, slot->x, run->added, size);

    // h = silu(w1 fn) * w3 fn, with fn = rmsnorm(xm)
    norm(run, slot->fn, slot->xm, layer, FFN_NORM);
    linear(run, slot->gate, slot->fn, layer, W1);
    linear(run, slot->up, slot->fn, layer, W3);
    swiglu(slot->h, slot->gate, slot->up, run->n_rows, c->hidden_dim);

    // x of the next layer = xm + w2 h
    linear(run, run->added, slot->h, layer, W2);
    add(next->x, slot->xm, run->added, size);
}

// Calls layer_forward for one layer after the other.
// It stands in section 12, as it also finds out what is faster: all threads or one.
static void all_layers(Run *run);

// What left the layers for row r of the latest call of forward, (dim).
static const float *last_state(const Run *run, ptrdiff_t r) {
    const Config *c = &run->model->config;
    return run->slots[c->n_layers % run->n_slots].x + r * c->dim;
}

// logits = classifier rmsnorm(x), only for the rows that want them: they are gathered first.
static void classify(Run *run, Row *rows) {
    const Config *c = &run->model->config;
    int n_wanted = 0;
    for (ptrdiff_t r = 0; r < run->n_rows; r++) {
        rows[r].logits = NULL;
        if (!rows[r].wants_logits)
            continue;
        ptrdiff_t to = n_wanted++;
        rows[r].logits = run->logits + to * c->vocab_size;
        memcpy(run->last_x + to * c->dim, last_state(run, r), c->dim * sizeof(float));
        run->wanted[to] = rows[r];
    }
    run->rows = run->wanted; // from here on the run has only these rows
    run->n_rows = n_wanted;
    norm(run, run->last_xn, run->last_x, 0, FINAL_NORM);
    linear(run, run->logits, run->last_xn, 0, WCLS);
    for (ptrdiff_t r = 0; r < n_wanted; r++) {
        float sum = sum_of(run->logits + r * c->vocab_size, c->vocab_size);
        if (run->rows[r].sequence->step_size == 0 && !isfinite(sum)) // a step may ruin it
            die(1, "the logits are not finite; is the model in order?");
    }
}

// Computes the keys, the values and the wanted logits of rows (n_rows).
// The caller must see to this:
// Rows of one sequence stand in the order of their positions.
// All positions before a row were computed earlier, or are computed in the same call.
// n_rows <= max_rows, positions < seq_len, and tokens < vocab_size.
static void forward(Run *run, Row *rows, int n_rows) {
    enter_rows(run, rows, n_rows);
    embed(run, run->slots[0].x);
    all_layers(run);
    classify(run, rows);
}

// How a text is read: with its noise, and with the logits of its last token or of every token.
enum { DRUGGED = 1, WANTS_LOGITS = 2, ALL_LOGITS = 4 };

// A sequence is to read n more tokens: this reads as many of them as fit into one call of forward.
// They are the rows run->block[0], [1], ... Returns how many there were.
static int read_block(Run *run, Sequence *s, const int *tokens, int n, int how) {
    int n_blocks = (n + run->max_rows - 1) / run->max_rows;
    int n_rows = n ? (n + n_blocks - 1) / n_blocks : 0; // so that all blocks are about as long
    int start = s->length;
    for (int r = 0; r < n_rows; r++)
        run->block[r] = (Row){
            .token = tokens[r],
            .position = start + r,
            .sequence = s,
            .drugged = how & DRUGGED,
            // n - 1 is the last token of all that is left: only the last block has it.
            .wants_logits = how & ALL_LOGITS || (how & WANTS_LOGITS && r == n - 1),
        };
    forward(run, run->block, n_rows);
    return n_rows;
}

// Lets a sequence read tokens (n), block by block.
// Returns the logits of the last token, NULL if they are not wanted.
// They are valid until the next forward.
static float *feed(Run *run, Sequence *s, const int *tokens, int n, int how) {
    float *logits = NULL;
    for (int done = 0; done < n;) {
        int n_rows = read_block(run, s, tokens + done, n - done, how);
        logits = run->block[n_rows - 1].logits;
        done += n_rows;
    }
    return logits;
}

// realloc for count elements of `size` bytes. If there is no memory, the program ends.
// If old is NULL, all bytes are zero.
static void *resize(void *old, ptrdiff_t count, size_t size);

// An empty text. Memory is taken when it is needed.
static Sequence sequence_new(Noise noise) {
    return (Sequence){.first_dirty = CLEAN, .noise = noise};
}
static void sequence_free(const Model *m, Sequence *s);

// Working memory for up to max_rows rows. n_slots: 1, or n_layers + 1 to keep what was computed.
static void run_init(Run *run, const Model *m, int max_rows, int n_slots);
static void run_free(Run *run);

/* ================================================================================================
 * 6  The cold shower
 *
 * Noise leaves traces in the cache.
 * H turns what a layer's own keys and values are made of.
 * Q, K, V and A show in the layers above: they change att, wo adds that to the residual stream, and
 * the next layer makes its keys and values of the stream (in the last layer they leave no trace).
 * And a sober token that looks back on noisy ones is noisy too.
 * So a shower runs all tokens from the first dirty one on again, soberly, block by block:
 *
 *     position   0   1   2   3   4   5   6   7   8   9
 *                |       sober prompt        | dirty    |
 *                                            ^ first_dirty = 7
 *
 * What stands before first_dirty was computed soberly and looks back on nothing later.
 * A block gives the same bits as its tokens one by one.
 * So afterwards the cache is, to the last bit, that of a sober model that has read this same text.
 * What was written stays written; the model now remembers it soberly.
 */

// Returns the number of tokens that were run again.
static int cold_shower(Run *run, Sequence *s) {
    int length = s->length;
    int n = s->first_dirty < length ? length - s->first_dirty : 0;
    s->length -= n;
    feed(run, s, s->tokens + s->length, n, 0);
    s->first_dirty = CLEAN;
    s->n_drugged = 0;
    return n;
}

/* ================================================================================================
 * 7  Doses
 *
 * A dose need not act everywhere.
 * For each depth a curve gives a ratio, and a layer gets theta times the ratio at its depth.
 * Depth runs from 0 at the first layer towards 1 after the last one: layer l is at l / n_layers.
 * The curve goes through points, and there are three ways to go from one to the next.
 * With the points 0=.2, .4=1, .8=.2 a layer at depth .2, half way between the first two, gets
 *
 *     interpolate    .6     the line from .2 to 1
 *     ceil           1      the larger of the two
 *     floor          .2     the smaller
 *
 * A layer that lies on a point belongs to the stretch that ends there.
 * On the first point it belongs to the first stretch.
 * An option has the curve after the dose: -V .5@ceil:.3=0,.4=1,.5=0 has three points.
 * It looks like a triangle and is a rectangle: layers from .3 to .5 get all of theta, others none.
 */

// Depths are floats. -d .4 -w .1 gives .4 - .1, computed in double and rounded to a float once.
// That is the float of a .3 that is typed. In double the two would differ.
typedef struct {
    float depth, ratio;
} Point;
enum { MODE_CEIL, MODE_FLOOR, MODE_INTERPOLATE, N_MODES, MAX_POINTS = 16 };
typedef struct {
    double theta;             // radians
    int mode;
    int n_points;             // 0: every layer gets theta
    Point points[MAX_POINTS]; // sorted by depth
} Dose;

// The angle, in radians, that a layer at this depth gets.
// Outside the points the nearest one counts.
static double dose_at(const Dose *dose, float depth) {
    if (!dose->n_points)
        return dose->theta;
    const Point *left = dose->points;
    const Point *last = left + dose->n_points - 1;
    if (depth < left->depth)
        return dose->theta * left->ratio;
    if (depth > last->depth || left == last)
        return dose->theta * last->ratio;
    while (depth > left[1].depth)
        left++;
    const Point *right = left + 1;
    if (dose->mode == MODE_CEIL || left->depth == right->depth) // of no length: always the larger
        return dose->theta * fmax(left->ratio, right->ratio);
    if (dose->mode == MODE_FLOOR)
        return dose->theta * fmin(left->ratio, right->ratio);
    double way = (depth - left->depth) / (right->depth - left->depth); // 0 to 1
    return dose->theta * (left->ratio + way * (right->ratio - left->ratio));
}

// Fills theta (N_SITES, n_layers) from one dose a site. Layer l is at depth l / n_layers.
static void dose_layers(float *theta, const Dose *doses, int n_layers) {
    for (int site = 0; site < N_SITES; site++)
        for (int l = 0; l < n_layers; l++) {
            float depth = (float)l / (float)n_layers;
            theta[site * n_layers + l] = (float)dose_at(&doses[site], depth);
        }
}

// To add a site of your own:
//
//     section 1          its place in the drawing
//     section 4          its line in the list, its name in the enum, its letter in SITES
//     section 5          its turn: in layer_forward, as H has it, or in attend or attention, as Q,
//                        K, V and A; and a buffer in Slot for the vector, if there is none yet
//                        (run_init, in section 13, gives it memory)
//     section 11         its letter in NOISE_OPTIONS, and in the help texts of drugs.c,
//                        train_step.c and tests/laboratory/lab.c
//     train_step.c       its way back: the same glitch, drawn for the vector before it was turned.
//                        So that vector must be kept, or computed once more. In `factors`, a matrix
//                        that reads what was turned has the turned vector as its x. A matrix that
//                        made it has as its dy the gradient of the vector before the turn.
//
// Doses, showers and the laboratory follow from SITES.
// The compiler catches a forgotten letter, and the tests catch a forgotten way back.

/* ================================================================================================
 * 8  The tokenizer
 *
 * Text becomes tokens by byte pair encoding (Sennrich et al. 2016).
 * A text is a chain of symbols, at first its characters or bytes.
 * A table lists which two neighbours may be merged into one symbol, and with which rank.
 * Again and again the pair with the smallest rank is merged (of equals the leftmost), until no
 * neighbours are a pair.
 * With ab before bc, and then ab c:
 *
 *     a - b - c - a - b      ab at two places: the left one first
 *     ab - - - c - a - b     the right symbol is swallowed by the left one
 *     ab - - - c - ab        then abc, the only pair that is left
 *     abc - - - - - ab
 *
 * To look for the best pair anew each time would take n² steps.
 * A heap hands it out instead.
 * A merge adds at most two pairs to it, so fewer than 3 n pairs come in for n symbols, and each
 * rises or sinks along one path of a tree that is log n high: n log n steps.
 *
 * Vocabularies differ. export.py has put what differs into tables, which the file contains:
 *
 *     units      which symbol stands for a character at first, or else for each of its bytes.
 *                SentencePiece (Llama 2, Mistral 7B) begins with characters, Llama 3 with bytes.
 *     pairs      which two symbols make which symbol, and with which rank
 *     steps      how a text is cut into words first: nothing is merged across two words
 *     words      words that become one piece at once, whatever merging would give
 *     whole      pieces such as <s> that are looked for first, before a text is cut into words
 *
 * ---- Cutting, and what an automaton is
 *
 * Words are cut by a pattern, such as "letters, perhaps with one space before them, or one digit".
 * export.py turns the pattern into an automaton: a few states, and a table that says for each state
 * and each class of characters which state comes next.
 * For that pattern, with the classes space, letter, digit and any other, the table is
 *
 *                space   letter   digit   other   the end
 *     state 1      2       3        4       -        -       nothing was read so far
 *     state 2      -       3        -       -        -       a space was read
 *     state 3      -*      3        -*      -*       -*      letters were read
 *     state 4      -*      -*       -*      -*       -*      a digit was read
 *
 * To cut, walk: begin in state 1, look at a character, go where the table says.
 * "-" means that no word can go on like this, and the walk ends.
 * "*" says that what lies before this character is a word.
 * The last such place counts.
 * So the walk never has to go back, however odd the pattern is, and a pattern may even look one
 * character ahead ("spaces, unless a letter follows").
 *
 * What no match has taken is a gap, and a gap is a word, too.
 * Here gaps are all other signs, and spaces that no letter follows.
 * Some vocabularies have several patterns: the second one cuts the words of the first one again.
 */

// What a section of text gets before it is cut.
enum { PREFIX_SPACE = 1,        // a space is put before it, at the start of the text
       PREFIX_EACH = 2,         // and also after each piece that was found whole,
       PREFIX_UNLESS_SPACE = 4, // but only where there is none yet
       COLLAPSE_SPACES = 8,     // of several spaces one is left, at the ends none
       NEWLINE_SPACE = 16,      // a space is put after each line feed
       ALL_FLAGS = 31 };

// What a piece of the vocabulary is.
// Users cannot type CONTROL and END pieces (but see -x); an END piece ends a text.
// USER_DEFINED pieces are taken whole wherever a text contains them.
enum { NORMAL, CONTROL, UNKNOWN, BYTE, USER_DEFINED, END, N_KINDS };

// The records of the tables, as they lie in the file.
typedef struct {
    uint32_t first, last; // all numbers from first to last
    uint32_t value;       // have this value
} Range;
typedef struct {
    uint32_t left, right; // two symbols that stand side by side
    uint32_t merged;      // become this one
    uint32_t rank;        // smaller ones come first
} Pair;
typedef struct {
    uint32_t end;         // byte of the text after it; it begins where the string before it ends
    uint32_t kind;        // NORMAL to END
} String;

struct Tokenizer {
    const Range *classes;    // (n_ranges) character -> class, 0 if it is not there
    const uint32_t *steps;   // (n_states, n_classes + 1) 2 * next state, + 1 if a word is complete
    const Range *units;      // (n_units) character, or BYTE_UNIT + byte -> symbol
    const Pair *pairs;       // (n_pairs)
    const String *strings;   // (vocab_size) the pieces; then (N_CHAT_STRINGS), see section 10; then
                             // (n_cutters) the patterns, which only export.py needs
    const uint32_t *whole;   // (n_whole) ids: by first byte, the longer ones first
    const uint32_t *words;   // (n_words) ids, by their bytes
    const char *text;        // (n_text) of the strings
    int first_whole[256];    // where in whole the pieces with this first byte begin, n_whole: none
};

// A symbol is the id of a piece.
// Some symbols are no pieces: they only stand for a character from which pieces are merged.
// Their numbers come after those of the pieces.
enum { MAX_SYMBOLS = 1 << 25, NO_SYMBOL = -1 };

// The strings of a chat come after the pieces, see section 10.
enum { OPENING, BEFORE_SYSTEM, AFTER_SYSTEM, BEFORE_QUESTION, AFTER_QUESTION, AFTER_ANSWER,
       N_CHAT_STRINGS };

// Some bytes of a text.
typedef struct {
    const char *bytes; // (length), no zero after them
    ptrdiff_t length;
} Span;

// The bytes of string i: of piece i, if i < vocab_size.
static Span string_at(const Model *m, int i) {
    const Tokenizer *tokenizer = m->tokenizer;
    uint32_t begin = i ? tokenizer->strings[i - 1].end : 0;
    return (Span){tokenizer->text + begin, tokenizer->strings[i].end - begin};
}

static int kind_of(const Model *m, int id) {
    return (int)m->tokenizer->strings[id].kind;
}

// ---- characters

// How many bytes a UTF-8 character has whose first byte is this one.
// 1 also for bytes with which no character begins: 0x80 to 0xC1, and all above 0xF4.
static int character_length(char first) {
    unsigned char byte = (unsigned char)first;
    if (byte < 0xC2 || byte > 0xF4)
        return 1;
    if (byte < 0xE0) // 110xxxxx
        return 2;
    return byte < 0xF0 ? 3 : 4; // 1110xxxx, 11110xxx
}

// Whether this byte stands inside a character: 10xxxxxx.
static bool continues_character(char byte) {
    return ((unsigned char)byte & 0xC0) == 0x80;
}

// The character at text, of which n bytes are left: its number in Unicode, and its length in bytes.
// NO_CHARACTER, of length 1, if the bytes are no character.
// They may be cut off, more than the character needs, or a number that Unicode does not have.
enum { NO_CHARACTER = -1, LAST_CHARACTER = 0x10FFFF };
static int character_at(const char *text, // (n)
                        ptrdiff_t n,
                        int *length) {    // out
    static const int masks[] = {0, 0xFF, 0x1F, 0x0F, 0x07};   // the digits in the first byte
    static const int least[] = {0, 0, 0x80, 0x800, 0x10000};  // of 1, 2, 3, 4 bytes
    int n_bytes = character_length(*text);
    int point = (unsigned char)*text & masks[n_bytes];
    bool valid = n_bytes <= n && (n_bytes > 1 || point < 0x80);
    for (int i = 1; valid && i < n_bytes; i++) {
        valid = continues_character(text[i]);
        point = point << 6 | (text[i] & 0x3F);
    }
    bool surrogate = point >= 0xD800 && point <= 0xDFFF;
    valid = valid && point >= least[n_bytes] && point <= LAST_CHARACTER && !surrogate;
    *length = valid ? n_bytes : 1;
    return valid ? point : NO_CHARACTER;
}

// ---- looking up

// For bsearch: where a number lies, before (-1), in (0) or after (1) a range.
static int compare_range(const void *number, const void *range) {
    uint32_t x = *(const uint32_t *)number;
    const Range *r = range;
    return x < r->first ? -1 : x > r->last;
}

// The value of a number in a table of n ranges, `otherwise` if it lies in none.
static int look_up(const Range *table, int n, uint32_t number, int otherwise) {
    const Range *range = bsearch(&number, table, n, sizeof *table, compare_range);
    return range ? (int)range->value : otherwise;
}

// The symbol of a character, or of BYTE_UNIT + a byte.
enum { BYTE_UNIT = LAST_CHARACTER + 1 };
static int symbol_of(const Model *m, int unit) {
    return look_up(m->tokenizer->units, m->config.n_units, unit, NO_SYMBOL);
}
static int symbol_of_byte(const Model *m, char byte) {
    return symbol_of(m, BYTE_UNIT + (unsigned char)byte);
}

// For bsearch.
static int compare_pairs(const void *a, const void *b) {
    uint64_t x = (uint64_t)((const Pair *)a)->left << 32 | ((const Pair *)a)->right;
    uint64_t y = (uint64_t)((const Pair *)b)->left << 32 | ((const Pair *)b)->right;
    return (x > y) - (x < y);
}

// For bsearch: a word against the piece with an id.
typedef struct {
    const Model *m;
    Span span;
} WordKey;
static int compare_word(const void *key, const void *id) {
    const WordKey *word = key;
    Span piece = string_at(word->m, (int)*(const uint32_t *)id);
    int order = memcmp(word->span.bytes, piece.bytes, min(word->span.length, piece.length));
    return order ? order : (int)(word->span.length - piece.length);
}

// The id of a word (n) that is taken as it is, NO_SYMBOL if it must be merged.
static int known_word(const Model *m, const char *bytes, int n) {
    const Tokenizer *tokenizer = m->tokenizer;
    const WordKey key = {m, {bytes, n}};
    const uint32_t *id = bsearch(&key, tokenizer->words, m->config.n_words,
                                 sizeof *tokenizer->words, compare_word);
    return id ? (int)*id : NO_SYMBOL;
}

// ---- merging

// A place in the chain. A symbol that was found whole or as a word has no neighbours, so it stays.
typedef struct {
    Span span;    // what it stands for
    int previous; // the neighbours in the chain, -1 at its ends
    int next;
    int id;       // NO_SYMBOL: an unknown byte. SWALLOWED: merged into its left neighbour
} Symbol;
enum { SWALLOWED = -2 };

// Two neighbours that may be merged.
typedef struct {
    const Pair *pair;
    int left, right; // where they stand: numbers of symbols
} Merge;

typedef struct {
    const Model *m;
    Symbol *symbols; // (n_symbols) those of a word are a chain
    int n_symbols;
    Merge *heap;     // (n_merges) the best one on top; the children of i are 2 i + 1 and 2 i + 2
    int n_merges;
} Merger;

// Whether a comes before b.
static bool better(const Merge *a, const Merge *b) {
    if (a->pair->rank != b->pair->rank)
        return a->pair->rank < b->pair->rank;
    return a->left < b->left;
}

// Puts two neighbours into the heap, if they may be merged.
static void push_merge(Merger *merger, int left, int right) {
    if (left < 0 || right < 0)
        return;
    const Model *m = merger->m;
    const Pair key = {.left = merger->symbols[left].id, .right = merger->symbols[right].id};
    Merge merge = {.left = left, .right = right};
    merge.pair = bsearch(&key, m->tokenizer->pairs, m->config.n_pairs, sizeof key, compare_pairs);
    if (!merge.pair)
        return;
    int i = merger->n_merges++; // it begins at the end, and rises past every parent it beats
    while (i > 0 && better(&merge, &merger->heap[(i - 1) / 2])) {
        merger->heap[i] = merger->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    merger->heap[i] = merge;
}

// Takes the best one out of the heap.
static Merge pop_merge(Merger *merger) {
    Merge *heap = merger->heap;
    int n = --merger->n_merges;
    Merge best = heap[0];
    Merge last = heap[n]; // it goes down from the top until no child is better
    int i = 0;
    while (2 * i + 1 < n) {
        int child = 2 * i + 1;
        if (child + 1 < n && better(&heap[child + 1], &heap[child]))
            child++; // the better one of the two
        if (!better(&heap[child], &last))
            break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = last;
    return best;
}

// Merges until nothing is left to merge.
static void merge_symbols(Merger *merger) {
    // At first there are fewer pairs than symbols, and each merge adds two at most.
    merger->heap = resize(NULL, 3 * (ptrdiff_t)merger->n_symbols, sizeof *merger->heap);
    for (int i = 0; i < merger->n_symbols; i++)
        push_merge(merger, i, merger->symbols[i].next);
    while (merger->n_merges) {
        Merge merge = pop_merge(merger);
        const Pair *pair = merge.pair;
        Symbol *a = &merger->symbols[merge.left];
        Symbol *b = &merger->symbols[merge.right];
        // In the meantime one of them may have been merged with its other neighbour.
        if ((uint32_t)a->id != pair->left || (uint32_t)b->id != pair->right)
            continue;
        a->id = pair->merged;
        a->span.length += b->span.length; // they stand side by side, so the union is just longer
        a->next = b->next;
        b->id = SWALLOWED;
        if (b->next >= 0)
            merger->symbols[b->next].previous = merge.left;
        push_merge(merger, a->previous, merge.left);
        push_merge(merger, merge.left, a->next);
    }
}

// Adds a symbol for some bytes (length), which must stay in use. It has no neighbours yet.
static Symbol *add_symbol(Merger *merger, const char *bytes, int length, int id) {
    Symbol *symbol = &merger->symbols[merger->n_symbols++];
    *symbol = (Symbol){{bytes, length}, -1, -1, id};
    return symbol;
}

// Adds a word (n): as one symbol if it is known, else as a chain of its characters, or of the bytes
// of those that are no units.
static void add_word(Merger *merger, const char *bytes, int n) {
    const Model *m = merger->m;
    int id = known_word(m, bytes, n);
    int previous = -1; // symbol
    int character_end = 0;
    if (id >= 0) {
        add_symbol(merger, bytes, n, id);
        return;
    }
    for (int i = 0, length; i < n; i += length) {
        id = NO_SYMBOL;
        if (i >= character_end) { // and not inside a character that is taken byte by byte
            id = symbol_of(m, character_at(bytes + i, n - i, &length));
            character_end = i + length;
        }
        if (id < 0) {
            length = 1;
            id = symbol_of_byte(m, bytes[i]);
        }
        if (id < 0 && m->config.unknown < 0)
            continue; // there is not even a piece for what is unknown: it is left out
        Symbol *symbol = add_symbol(merger, bytes + i, length, id);
        symbol->previous = previous;
        if (previous >= 0)
            merger->symbols[previous].next = merger->n_symbols - 1;
        previous = merger->n_symbols - 1;
    }
}

// ---- cutting into words

// How many bytes of text (n) the pattern of a cutter matches from its start on, 0 if it does not.
static int match(const Model *m, int cutter, const char *text, int n) {
    const Tokenizer *tokenizer = m->tokenizer;
    int n_classes = m->config.n_classes;
    uint32_t state = cutter + 1; // where the automaton of this cutter begins; 0: the walk has ended
    int matched = 0;
    for (int at = 0, length = 0; state && at <= n; at += length) {
        int class = n_classes; // the column for the end of the text
        length = 1;
        if (at < n) {
            int character = character_at(text + at, n - at, &length);
            if (character == NO_CHARACTER)
                character = 0xFFFD; // U+FFFD is written for what is no character
            class = look_up(tokenizer->classes, m->config.n_ranges, character, 0);
        }
        uint32_t step = tokenizer->steps[(ptrdiff_t)(state - 1) * (n_classes + 1) + class];
        if (step & 1)
            matched = at; // up to here, without the character that was looked at
        state = step >> 1;
    }
    return matched;
}

// Adds text (n), cut into words by this cutter and all that follow it.
static void add_words(Merger *merger, const char *text, int n, int cutter) {
    if (cutter == merger->m->config.n_cutters) {
        add_word(merger, text, n);
        return;
    }
    int gap = 0; // where what no match has taken begins
    for (int at = 0, length; at < n; at += length) {
        length = match(merger->m, cutter, text + at, n - at);
        if (!length) { // the gap grows by a character
            character_at(text + at, n - at, &length);
            continue;
        }
        if (at > gap)
            add_words(merger, text + gap, at - gap, cutter + 1);
        add_words(merger, text + at, length, cutter + 1);
        gap = at + length;
    }
    if (n > gap)
        add_words(merger, text + gap, n - gap, cutter + 1);
}

// ---- encoding

// Where a section of a text stands: at its start, after a piece that was found whole, or in the
// middle of other text.
enum { AT_START, AFTER_PIECE, CONTINUED };

// A text that is to become tokens.
typedef struct {
    const char *bytes;
    size_t n;
    int start;         // AT_START, AFTER_PIECE or CONTINUED: where its first section stands
    bool bos;          // BOS comes first, if the model has one
    bool controls;     // "<s>" in it is the control piece, and not three characters, ...
    const char *typed; // (n) ... except where this is 1, as a person typed it; NULL: no exception
} Source;

// The longest piece that is found whole at a place of the source, NO_SYMBOL if there is none.
static int whole_piece(const Model *m, const Source *source, size_t at) {
    const Tokenizer *tokenizer = m->tokenizer;
    const char *bytes = source->bytes + at;
    for (int i = tokenizer->first_whole[(unsigned char)*bytes]; i < m->config.n_whole; i++) {
        int id = (int)tokenizer->whole[i];
        Span piece = string_at(m, id);
        if (!piece.length || *piece.bytes != *bytes)
            break; // from here on they begin with another byte
        if ((size_t)piece.length > source->n - at || memcmp(bytes, piece.bytes, piece.length))
            continue;
        bool was_typed = source->typed && memchr(source->typed + at, 1, piece.length);
        bool meant = source->controls && !was_typed;
        if (meant || kind_of(m, id) == USER_DEFINED)
            return id;
    }
    return NO_SYMBOL;
}

// Whether a text (n) begins with a space, or with U+2581, which SentencePiece writes for one.
static bool begins_with_space(const Model *m, const char *text, int n) {
    enum { METASPACE = 0x2581 };
    int length;
    if (!n || *text == ' ')
        return n;
    return character_at(text, n, &length) == METASPACE && symbol_of(m, METASPACE) >= 0;
}

// Copies a section of the source as the vocabulary wants to see it: spaces added and taken away as
// the flags say. Returns the length.
static int normalise(const Model *m,
                     const char *bytes, // (n)
                     int n, int start,
                     char *to) {        // (2 n + 1) out: each byte may get a space
    int flags = m->config.text_flags;
    int n_to = 1;            // to[0] is kept for the space before it
    bool after_space = true; // at the start spaces are dropped as after another one
    for (int i = 0; i < n; i++) {
        bool space = bytes[i] == ' ';
        if (!(flags & COLLAPSE_SPACES && space && after_space))
            to[n_to++] = bytes[i];
        if (flags & NEWLINE_SPACE && bytes[i] == '\n') {
            to[n_to++] = ' ';
            space = true;
        }
        after_space = space;
    }
    if (flags & COLLAPSE_SPACES && after_space && n_to > 1)
        n_to--;
    bool wanted = flags & PREFIX_SPACE && n_to > 1 && start != CONTINUED;
    if (start == AFTER_PIECE && !(flags & PREFIX_EACH))
        wanted = false;
    if (flags & PREFIX_UNLESS_SPACE && begins_with_space(m, to + 1, n_to - 1))
        wanted = false;
    *to = ' ';
    if (!wanted)
        memmove(to, to + 1, --n_to);
    return n_to;
}

// Adds a section of the source (n) in which no piece is found whole. Its copy goes to text; returns
// the byte after it.
static char *add_section(Merger *merger, const char *bytes, int n, int start, char *text) {
    int n_text = normalise(merger->m, bytes, n, start, text);
    add_words(merger, text, n_text, 0);
    return text + n_text;
}

// Cuts the source at pieces that are found whole, and adds these and what lies between them, which
// is copied to text.
static void add_source(Merger *merger, const Source *source, char *text) {
    const Model *m = merger->m;
    int flags = m->config.text_flags;
    // A user-defined piece at the start comes after the space that space_before_all did not put.
    bool before_all = flags & PREFIX_SPACE && !(flags & (PREFIX_EACH | PREFIX_UNLESS_SPACE));
    size_t first = 0; // byte of the section
    int start = source->start;
    for (size_t at = 0; at < source->n;) {
        int id = whole_piece(m, source, at);
        if (id < 0) {
            at++;
            continue;
        }
        Span piece = string_at(m, id);
        if (!at && before_all && start == AT_START && kind_of(m, id) == USER_DEFINED)
            add_word(merger, " ", 1);
        text = add_section(merger, source->bytes + first, at - first, start, text);
        add_symbol(merger, piece.bytes, piece.length, id);
        at += piece.length;
        first = at;
        start = AFTER_PIECE;
    }
    add_section(merger, source->bytes + first, source->n - first, start, text);
}

// SentencePiece puts the space before the whole text, and only then looks for user-defined pieces:
// it may be a part of one. (Where spaces collapse, no piece has several, and it is put later.)
// The caller frees the bytes that come back in *with_space.
static Source space_before_all(const Model *m, Source source, char **with_space) {
    const int flags = PREFIX_SPACE | PREFIX_EACH | PREFIX_UNLESS_SPACE | COLLAPSE_SPACES;
    int id = source.n ? whole_piece(m, &source, 0) : NO_SYMBOL;
    bool mark = id >= 0 && kind_of(m, id) != USER_DEFINED; // where a text begins with one, no space
    if (!source.n || mark || source.start != AT_START ||
        (m->config.text_flags & flags) != PREFIX_SPACE)
        return source;
    ptrdiff_t n = (ptrdiff_t)source.n + 1;
    *with_space = resize(NULL, 2 * n, 1); // the bytes, and whether they were typed
    **with_space = ' ';
    memcpy(*with_space + 1, source.bytes, source.n);
    memset(*with_space + n, 0, n);
    if (source.typed)
        memcpy(*with_space + n + 1, source.typed, source.n);
    source.bytes = *with_space;
    source.typed = *with_space + n;
    source.n = n;
    source.start = CONTINUED;
    return source;
}

// Adds a token to out (n_out). Several unknown ones in a row are one <unk>.
static int add_token(const Model *m, int *out, int n_out, int id) {
    bool unknown = id < 0 || id >= m->config.vocab_size;
    if (unknown)
        id = m->config.unknown;
    bool again = unknown && n_out && out[n_out - 1] == id;
    if (id >= 0 && !again)
        out[n_out++] = id;
    return n_out;
}

// Writes the tokens of the symbols to out; returns how many there are.
// A symbol that is no piece falls apart into its bytes.
static int write_tokens(const Merger *merger, int *out) {
    const Model *m = merger->m;
    int n_out = 0;
    for (int i = 0; i < merger->n_symbols; i++) {
        const Symbol *symbol = &merger->symbols[i];
        if (symbol->id == SWALLOWED)
            continue;
        if (symbol->id < m->config.vocab_size) {
            n_out = add_token(m, out, n_out, symbol->id);
            continue;
        }
        for (int b = 0; b < symbol->span.length; b++)
            n_out = add_token(m, out, n_out, symbol_of_byte(m, symbol->span.bytes[b]));
    }
    return n_out;
}

// The tokens of a text. The caller frees them; *n_tokens is their number.
static int *encode(const Model *m, Source source, int *n_tokens) {
    if (source.n > INT_MAX / 16)
        die(1, "a text of %zu bytes is too long", source.n);
    // A byte may get a space before or after it, and there is BOS.
    const ptrdiff_t most = 3 * (ptrdiff_t)source.n + 2;
    char *text = resize(NULL, most, 1);
    Merger merger = {.m = m, .symbols = resize(NULL, most, sizeof *merger.symbols)};
    char *with_space = NULL;
    source = space_before_all(m, source, &with_space);
    add_source(&merger, &source, text);
    free(with_space);
    merge_symbols(&merger);
    int *tokens = resize(NULL, most, sizeof *tokens);
    *n_tokens = write_tokens(&merger, tokens);
    // A prompt that spells BOS itself gets no second one.
    bool spelt = source.controls && *n_tokens && tokens[0] == m->config.bos;
    if (source.bos && m->config.bos >= 0 && !spelt) {
        memmove(tokens + 1, tokens, *n_tokens * sizeof *tokens);
        tokens[0] = m->config.bos;
        ++*n_tokens;
    }
    free(text);
    free(merger.symbols);
    free(merger.heap);
    return tokens;
}

// ---- decoding

// Writes n bytes.
// Writing to a stream in memory fails if memory is used up.
// Errors of standard output are reported later, by flush_output.
static void write_bytes(FILE *to, const char *bytes, size_t n) {
    if (fwrite(bytes, 1, n, to) < n && to != stdout)
        die(1, "out of memory");
}

// Tokens on their way to a stream.
// A character may be spread over several tokens; it is printed when it is whole.
typedef struct {
    FILE *to;
    bool terminal;   // control characters are not let through
    char waiting[4]; // the first bytes of a character that is not complete
    int n_waiting;
    bool at_start;   // the space that encoding put in front is still to be left out
    char last;       // the byte before
} Printer;

// Prints what is waiting.
// If it is no character, each of its bytes is printed as U+FFFD, as SentencePiece does.
static void print_rest(Printer *printer) {
    int n = printer->n_waiting;
    int length;
    if (!n)
        return;
    printer->n_waiting = 0;
    int point = character_at(printer->waiting, n, &length);
    if (point == NO_CHARACTER) {
        for (int i = 0; i < n; i++)
            write_bytes(printer->to, "\xEF\xBF\xBD", 3);
        return;
    }
    bool control = (point < ' ' && point != '\n' && point != '\t') || (point >= 127 && point < 160);
    // A terminal would obey a control character: move its cursor, change its title.
    // So it gets the character's number instead.
    if (control && printer->terminal)
        fprintf(printer->to, "<%02X>", point);
    else
        write_bytes(printer->to, printer->waiting, n);
}

static void print_byte(Printer *printer, char byte) {
    if (printer->n_waiting && !continues_character(byte))
        print_rest(printer); // a character that was broken off
    printer->waiting[printer->n_waiting++] = byte;
    if (printer->n_waiting == character_length(printer->waiting[0]))
        print_rest(printer);
    printer->last = byte;
}

// Control pieces print nothing, an unknown one prints " ⁇ ", as in SentencePiece.
// The spaces that encoding adds are left out again.
static void print_token(Printer *printer, const Model *m, int token) {
    Span piece = string_at(m, token);
    int flags = m->config.text_flags;
    int kind = kind_of(m, token);
    if (kind == CONTROL || kind == END)
        return;
    if (kind == UNKNOWN)
        piece = (Span){" \xE2\x81\x87 ", 5};
    for (int i = 0; i < piece.length; i++) {
        bool at_start = !i && printer->at_start && flags & PREFIX_SPACE;
        bool at_line = printer->last == '\n' && flags & NEWLINE_SPACE;
        if (piece.bytes[i] == ' ' && (at_start || at_line))
            printer->last = ' '; // and no further one
        else
            print_byte(printer, piece.bytes[i]);
    }
    printer->at_start = false;
}

/* ================================================================================================
 * 9  Reading the file
 *
 * export.py writes it and mmap reads it: the operating system brings in the pages that are used,
 * when they are used, so a model may be larger than memory.
 * Little-endian, in this order:
 *
 *   the header      256 bytes: "drugs.c" and a zero, then Config down to n_text, then zeros
 *   RoPE            head_dim / 2 doubles, radians per position
 *   tables          of struct Tokenizer, in its order; their records consist of numbers of 32 bits
 *   text            n_text bytes
 *   the weights     tensors, each at a multiple of 64 bytes, in the order in which the forward pass
 *                   reads them: embedding, layer after layer, final norm, classifier
 *
 * A file may come from anybody, so nothing in it is trusted.
 * Each number that is an index or a size is checked before it is used.
 * The checks are `if` and not assert, which a build may leave out.
 * An error does not end the program: m->error says what is wrong.
 * So tests can try thousands of broken files.
 */
// On a big-endian machine the bytes of all weights would have to be swapped.
// That takes a copy of them, for which there may be no memory.
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a model's file is little-endian, and this machine is not"
#endif
_Static_assert(offsetof(Config, q_dim) == 100, "no gaps between its members");
enum { HEADER_BYTES = 256, MAGIC_BYTES = 8, CONFIG_BYTES = offsetof(Config, q_dim) };
enum { VERSION = 3, ALIGNMENT = 64 };

// Keeps a sentence about what is wrong with the file and returns false, for `return broken(...)`.
__attribute__((format(printf, 2, 3)))
static bool broken(Model *m, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(m->error, sizeof m->error, format, args);
    va_end(args);
    return false;
}

// Says whether the numbers of the header can be true.
// The bounds are far above any real model, and a product of two of them fits into 64 bits.
static bool check_config(Model *m) {
    const Config *c = &m->config;
#define FIELD(name) #name, c->name
    const struct {
        const char *name;
        int64_t value, least, most;
    } fields[] = {
        {FIELD(version), VERSION, VERSION}, // this layout
        {FIELD(dim), 1, 1 << 20},
        {FIELD(hidden_dim), 1, 1 << 20},
        {FIELD(n_layers), 1, 1 << 12},
        {FIELD(n_heads), 1, 1 << 12},
        {FIELD(n_kv_heads), 1, c->n_heads}, // each is read by a query head
        {FIELD(head_dim), 2, 1 << 12}, // a pair at least
        {FIELD(vocab_size), 1, 1 << 24},
        {FIELD(seq_len), 1, 1 << 28}, // a context of that many
        {FIELD(shared_classifier), 0, 1}, // no or yes
        {FIELD(sliding_window), 0, 1 << 28}, // 0: none
        {FIELD(storage), FP32, FP16},
        {FIELD(bos), -1, (int64_t)c->vocab_size - 1}, // -1: none
        {FIELD(unknown), -1, (int64_t)c->vocab_size - 1},
        {FIELD(text_flags), 0, ALL_FLAGS},
        {FIELD(n_cutters), 0, 16}, // 0: a text is one word
        {FIELD(n_states), c->n_cutters, 1 << 16}, // each cutter begins in one of its own
        {FIELD(n_classes), 1, 1 << 10},
    };
#undef FIELD
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (fields[i].value < fields[i].least || fields[i].value > fields[i].most)
            return broken(m, "%s is %lld, must be %lld to %lld", fields[i].name,
                          (long long)fields[i].value, (long long)fields[i].least,
                          (long long)fields[i].most);
    if (c->n_heads % c->n_kv_heads) // as many query heads for each
        return broken(m, "n_heads is %d, no multiple of n_kv_heads, which is %d", c->n_heads,
                      c->n_kv_heads);
    if (c->head_dim % 2) // RoPE turns pairs
        return broken(m, "head_dim is %d, must be even", c->head_dim);
    if (!(c->norm_eps >= 0 && c->norm_eps < 1)) // so that nan is wrong, too
        return broken(m, "norm_eps is %g, must be 0 to 1", (double)c->norm_eps);
    return true;
}

// Reads the header into m->config. False: see m->error.
static bool read_header(Model *m,
                        const char *data, // (n_bytes) the file
                        size_t n_bytes) {
    Config *c = &m->config;
    if (n_bytes < HEADER_BYTES)
        return broken(m, "too short for a header, %zu bytes", n_bytes);
    if (memcmp(data, "drugs.c", MAGIC_BYTES)) // with the zero after it
        return broken(m, "not made by export.py: python3 export.py CHECKPOINT -o FILE");
    memcpy(c, data + MAGIC_BYTES, CONFIG_BYTES); // all of Config that lies in the file
    if (c->version > 0 && c->version < VERSION)
        return broken(m, "made by an older export.py: export the checkpoint again");
    if (!check_config(m))
        return false;
    for (int i = MAGIC_BYTES + CONFIG_BYTES; i < HEADER_BYTES; i++)
        if (data[i]) // room for what later versions may want to say
            return broken(m, "header byte %d is not zero", i);
    c->q_dim = c->n_heads * c->head_dim;
    c->kv_dim = c->n_kv_heads * c->head_dim;
    return true;
}

// Checks that RoPE's frequencies are angles and that the strings lie one after the other.
// Fills first_whole.
// Of the other tables read_tables has checked every number.
// If one of them were out of order, a text would become other tokens, and nothing worse.
static bool check_tables(Model *m, int n_strings) {
    Tokenizer *tokenizer = m->tokenizer;
    const double steepest = (double)(1 << 28) / m->config.seq_len; // so that cos_sin_of is exact
    for (int i = 0; i < m->config.head_dim / 2; i++)
        if (!(m->rope_freq[i] > 0 && m->rope_freq[i] <= steepest)) // in this form nan is wrong, too
            return broken(m, "RoPE's frequency %d is no angle", i);
    for (int i = 1; i < n_strings; i++)
        if (tokenizer->strings[i].end < tokenizer->strings[i - 1].end)
            return broken(m, "string %d ends before it begins", i);
    for (int byte = 0; byte < 256; byte++)
        tokenizer->first_whole[byte] = m->config.n_whole;
    for (int i = m->config.n_whole - 1; i >= 0; i--) { // backwards, so that the first one remains
        Span piece = string_at(m, (int)tokenizer->whole[i]);
        if (piece.length)
            tokenizer->first_whole[(unsigned char)*piece.bytes] = i;
    }
    return true;
}

// Finds RoPE's frequencies, the tables and the text, which lie from byte `first` of the file on,
// and checks every number of the tables.
// Returns the byte after them, 0 for nonsense: see m->error.
static size_t read_tables(Model *m,
                          const char *data, // (n_bytes) the file
                          size_t first, size_t n_bytes) {
    enum { ROPE, CLASSES, STEPS, UNITS, PAIRS, STRINGS, WHOLE, WORDS, TEXT, N_TABLES };
    const Config *c = &m->config;
    const uint32_t any = UINT32_MAX; // no index: any number but this one
    const int n_strings = c->vocab_size + N_CHAT_STRINGS + c->n_cutters;
    const struct {
        const char *name;
        uint64_t n_records;
        size_t width;      // of a record, in bytes
        uint32_t below[4]; // what each number of it must be below; all 0: not checked here
    } tables[N_TABLES] = {
        [ROPE] = {"RoPE", c->head_dim / 2, sizeof(double), {0}},
        [CLASSES] = {"range of characters", c->n_ranges, sizeof(Range), {any, any, c->n_classes}},
        [STEPS] = {"step", (uint64_t)c->n_states * (c->n_classes + 1), 4, {2 * (c->n_states + 1)}},
        [UNITS] = {"unit", c->n_units, sizeof(Range), {any, any, MAX_SYMBOLS}},
        [PAIRS] = {"pair", c->n_pairs, sizeof(Pair), {MAX_SYMBOLS, MAX_SYMBOLS, c->vocab_size, any}},
        [STRINGS] = {"string", n_strings, sizeof(String), {(uint32_t)c->n_text + 1, N_KINDS}},
        [WHOLE] = {"whole piece", c->n_whole, 4, {c->vocab_size}},
        [WORDS] = {"word", c->n_words, 4, {c->vocab_size}},
        [TEXT] = {"text", c->n_text, 1, {0}},
    };
    const void *found[N_TABLES];
    for (int i = 0; i < N_TABLES; i++) {
        uint64_t size = tables[i].n_records * tables[i].width; // huge, where a number is negative
        if (size > n_bytes - first)
            return broken(m, "has %zu bytes, too few for its tables", n_bytes);
        found[i] = data + first;
        first += size;
        const uint32_t *numbers = found[i];
        size_t width = tables[i].width / sizeof *numbers; // of a record, in numbers
        for (size_t j = 0; tables[i].below[0] && j < tables[i].n_records * width; j++)
            if (numbers[j] >= tables[i].below[j % width])
                return broken(m, "%s %zu has %u where less than %u must stand", tables[i].name,
                              j / width, numbers[j], tables[i].below[j % width]);
    }
    m->rope_freq = found[ROPE];
    *m->tokenizer = (Tokenizer){
        .classes = found[CLASSES],
        .steps = found[STEPS],
        .units = found[UNITS],
        .pairs = found[PAIRS],
        .strings = found[STRINGS],
        .whole = found[WHOLE],
        .words = found[WORDS],
        .text = found[TEXT],
    };
    return check_tables(m, n_strings) ? first : 0;
}

static void tensor_shape(const Config *c, int which, int *n_out, int *n_in) {
    const int shapes[N_TENSORS][2] = { // as listed in section 2
        [ATT_NORM] = {1, c->dim},
        [WQ] = {c->q_dim, c->dim},
        [WK] = {c->kv_dim, c->dim},
        [WV] = {c->kv_dim, c->dim},
        [WO] = {c->dim, c->q_dim},
        [FFN_NORM] = {1, c->dim},
        [W1] = {c->hidden_dim, c->dim},
        [W3] = {c->hidden_dim, c->dim},
        [W2] = {c->dim, c->hidden_dim},
        [TOK_EMB] = {c->vocab_size, c->dim},
        [FINAL_NORM] = {1, c->dim},
        [WCLS] = {c->vocab_size, c->dim},
    };
    *n_out = shapes[which][0];
    *n_in = shapes[which][1];
}

// Tensor number i in the order of the file: its layer, 0 for those that exist once, and which of
// them it is.
// False if there are no more.
static bool tensor_at(const Config *c, int i, int *layer, int *which) {
    int n_in_layers = c->n_layers * N_LAYER_TENSORS;
    *layer = 0;
    if (i == 0) {
        *which = TOK_EMB;
    } else if (i <= n_in_layers) {
        *layer = (i - 1) / N_LAYER_TENSORS;
        *which = (i - 1) % N_LAYER_TENSORS;
    } else {
        *which = FINAL_NORM + i - n_in_layers - 1;
    }
    return i < n_in_layers + 3 - c->shared_classifier;
}

// How a tensor is stored.
static int storage_of(const Config *c, int which) {
    bool gain = which == ATT_NORM || which == FFN_NORM || which == FINAL_NORM;
    return gain ? FP32 : c->storage;
}

// Finds every tensor, from byte `first` on, and checks that together they fill the file.
// False: see m->error.
static bool find_tensors(Model *m,
                         const char *data, // (n_bytes) the file
                         size_t first,     // byte
                         size_t n_bytes) {
    const Config *c = &m->config;
    uint64_t offset = first;
    int layer, which, n_out, n_in;
    m->layers = resize(NULL, c->n_layers, sizeof *m->layers); // small: pointers only
    for (int i = 0; tensor_at(c, i, &layer, &which); i++) {
        tensor_shape(c, which, &n_out, &n_in);
        int storage = storage_of(c, which);
        offset = (offset + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        // A file that is too short has tensors beyond its end.
        // C does not define what a pointer to there is, so it is not even computed.
        if (offset <= n_bytes)
            m->layers[layer].w[which] = (Weights){data + offset, storage};
        offset += (uint64_t)n_out * (uint64_t)n_in * (uint64_t)bytes_of(storage);
    }
    if (offset != n_bytes) // a download that broke off, most likely
        return broken(m, "has %zu bytes, the header promises %llu; copy or export it again",
                      n_bytes, (unsigned long long)offset);
    if (c->shared_classifier)
        m->layers[0].w[WCLS] = m->layers[0].w[TOK_EMB];
    return true;
}

// Makes a model of the bytes of a file, which must lie at a multiple of 64 and stay in use.
// False: see m->error; close it even so.
static bool model_parse(Model *m,
                        const char *data, // (n_bytes)
                        size_t n_bytes) {
    *m = (Model){0};
    if (!read_header(m, data, n_bytes))
        return false;
    m->tokenizer = resize(NULL, 1, sizeof *m->tokenizer);
    size_t first = read_tables(m, data, HEADER_BYTES, n_bytes); // of the tensors
    return first && find_tensors(m, data, first, n_bytes);
}

#ifdef __APPLE__
#define st_mtim st_mtimespec // its name for when a file was written last
#endif
// The file that model_open mapped last: its name, a descriptor (-1: none), the time of its writing.
static const char *mapped = "";
static int mapped_file = -1;
static struct timespec mapped_time;

// SIGBUS: a page of the file that was mapped is no longer there.
// The signal comes while we read it, and not at any odd moment, so the program may end here as
// it does elsewhere.
static void lost_page(int number) {
    die(1, "%s can be read no longer (signal %d); was it cut short?", mapped, number);
}

// If somebody writes to the mapped file, the model changes while it runs, and nothing looks wrong.
// So before a result is printed, this asks when the file was written last.
// A new file under the old name does no harm: the old one stays mapped.
static void check_mapped(void) {
    struct stat info;
    if (fstat(mapped_file, &info))
        return; // no model, or not from a file
    if (info.st_mtim.tv_sec != mapped_time.tv_sec || info.st_mtim.tv_nsec != mapped_time.tv_nsec)
        die(1, "%s was written to while it was in use", mapped);
}

// Maps the file at path and parses it. False: m->error says why; close it even so.
static bool model_open(Model *m, const char *path) {
    struct stat info;
    *m = (Model){0};
    int fd = open(path, O_RDONLY);
    if (fd < 0)
        return broken(m, "cannot be opened: %s", strerror(errno));
    // A folder can be opened, too, and a pipe cannot be mapped.
    bool regular = !fstat(fd, &info) && S_ISREG(info.st_mode) && info.st_size > 0;
    size_t n_bytes = regular ? (size_t)info.st_size : 0; // and 0 bytes cannot be mapped
    void *file = mmap(NULL, n_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (file == MAP_FAILED) {
        close(fd);
        return broken(m, regular ? "cannot be mapped into memory" : "is empty or not a regular file");
    }
    mapped = path;
    mapped_file = fd;
    mapped_time = info.st_mtim;
    signal(SIGBUS, lost_page);
    bool ok = model_parse(m, file, n_bytes); // which empties m first
    m->file = file;
    m->file_bytes = n_bytes;
    return ok;
}

// Gives back what model_parse and model_open took, even if they failed half way.
static void model_close(Model *m) {
    free(m->tokenizer);
    free(m->layers);
    if (m->file) {
        munmap(m->file, m->file_bytes);
        close(mapped_file);
        mapped_file = -1;
    }
    *m = (Model){0};
}

/* ================================================================================================
 * 10  Talking
 *
 * Read the prompt, then choose a token, read it, choose the next: that is reply.
 * The rest is printing and conversation.
 */

// The index of the largest of n numbers, the first of equals.
static int argmax(const float *x, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (x[i] > x[best])
            best = i;
    return best;
}

// The usual way to vary a text, for comparison: chance comes in at the very end.
// A temperature below 1 makes the probable tokens more probable still, one above 1 evens them out.
typedef struct {
    double temperature; // 0: take the most probable token
    double top_p;       // among the most probable tokens that together have this probability
} Dice;

// A token that may come next.
typedef struct {
    float p; // not normed: only relative to the others
    int token;
} Candidate;

// For qsort: the most probable one first.
static int by_probability(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    if (x->p != y->p)
        return x->p < y->p ? 1 : -1;
    return x->token - y->token;
}

// Draws a token from softmax(logits / temperature).
// Only the most probable tokens take part: the fewest that together have a probability of top_p.
// They lie side by side on a line, each as wide as it is probable.
// u, uniform in [0, 1), is a point of that line, and the token there is drawn.
static int sample(const float *logits, // (n)
                  int n, const Dice *dice,
                  double u) {          // [0, 1)
    Candidate *candidates = resize(NULL, n, sizeof *candidates);
    float max = logits[argmax(logits, n)];
    double total = 0;
    for (int i = 0; i < n; i++) { // relative to the largest, so that exp cannot overflow
        float p = (logits[i] - max) / dice->temperature;
        exp_all(&p, 1); // not libm's exp, so that a seed draws the same on every machine
        candidates[i] = (Candidate){p, i};
        total += p;
    }
    qsort(candidates, n, sizeof *candidates, by_probability);
    // How many tokens it takes to reach top_p; always one.
    double kept = 0;
    int n_kept = 0;
    do
        kept += candidates[n_kept++].p;
    while (n_kept < n && kept < dice->top_p * total);
    double left = u * kept; // how far along the line of the kept ones
    const Candidate *one = candidates;
    while (--n_kept > 0 && one->p <= left)
        left -= one++->p;
    int token = one->token; // u fell on this one
    free(candidates);
    return token;
}

// The token that comes at a position, after these logits (n).
static int choose(const float *logits, // (n)
                  int n, const Dice *dice,
                  uint64_t seed, int position) {
    if (!(dice->temperature > 0))
        return argmax(logits, n);
    uint64_t hash = within(within(seed, SITE_SAMPLE), position);
    return sample(logits, n, dice, uniform(hash, 0));
}

// What the options say about noise: the same letters in all programs.
typedef struct {
    uint64_t seed;
    int family;
    Dose doses[N_SITES];
    bool plain;           // whether there are doses without a shape of their own: ...
    bool somewhere;       // ... whether they act within `spread` of `depth`, or everywhere
    double depth, spread;
} NoiseOptions;

typedef struct {
    const char *prompt;
    const char *system;  // NULL: none
    int n_new;           // tokens to write, 0: until the text ends or the context is full
    int shower_every;    // drugged tokens, 0: never
    bool drugged_prompt;
    bool controls;       // "<s>" in the prompt is the control piece, and not three characters
    bool chat;
    Dice dice;
    NoiseOptions noise;
} Options;

// A text or a conversation, while it goes on.
typedef struct {
    const Options *options;
    Run run;
    Sequence sequence;
    Printer printer;
    int n_prompt;  // tokens read
    int n_new;     // tokens written
    int n_showers;
    double prompt_seconds, new_seconds;
    const char *stopped_at; // why the last answer ended, NULL: it has not
} Talk;

// Flushes standard output.
// The program ends at once if it cannot be written, or if the model's file has changed meanwhile.
static void flush_output(void) {
    check_mapped();
    if (ferror(stdout) || fflush(stdout))
        die(1, "standard output cannot be written; disk full?");
}

// The time in seconds, for differences.
static double now(void) {
    struct timespec time;
    timespec_get(&time, TIME_UTC);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

// Why a text ends with this token, NULL if it does not.
static const char *ending(const Model *m, int token) {
    if (kind_of(m, token) == END)
        return "the end of the text (EOS)";
    return token == m->config.bos ? "the start of another text (BOS)" : NULL;
}

// Reads tokens (n) and answers with up to n_new tokens, printed as they come.
// The prompt is read soberly, unless -u was given.
// So its last token predicts soberly, and the first new token is a sober one, too.
static void reply(Talk *talk, const int *tokens, int n) {
    const Options *options = talk->options;
    const Model *m = talk->run.model;
    Sequence *s = &talk->sequence;
    int room = m->config.seq_len - s->length - n; // in the context, after the prompt
    // The last token that is written need not be read, so there is room for one more.
    int most = options->n_new && options->n_new <= room ? options->n_new : room + 1;
    sequence_reserve(m, s, s->length + n + most - 1);

    double start = now();
    int how = options->drugged_prompt ? DRUGGED | WANTS_LOGITS : WANTS_LOGITS;
    const float *logits = feed(&talk->run, s, tokens, n, how); // of what comes after the prompt
    double prompt_done = now();
    talk->n_prompt += n;
    talk->stopped_at = NULL; // a new answer
    for (int i = 1; !talk->stopped_at; i++) {
        // The loop of every language model: choose a token, let the model read it, choose again.
        int token = choose(logits, m->config.vocab_size, &options->dice, s->noise.seed, s->length);
        talk->stopped_at = ending(m, token);
        if (talk->stopped_at)
            break;
        print_token(&talk->printer, m, token);
        flush_output(); // so that the text appears as it is written
        talk->n_new++; // the token is written, but not read yet
        if (i == most)
            talk->stopped_at = i == options->n_new ? "-n" : "the end of the context";
        // A text ends here and does not read its last token. A chat reads it, if there is room.
        if (talk->stopped_at && (!options->chat || s->length == m->config.seq_len))
            break;
        // A shower runs what was read so far, and comes before the next token is read.
        if (options->shower_every && s->n_drugged >= options->shower_every)
            talk->n_showers += cold_shower(&talk->run, s) > 0;
        logits = feed(&talk->run, s, &token, 1, DRUGGED | WANTS_LOGITS);
    }
    print_rest(&talk->printer); // half a character, if the text broke off there
    talk->prompt_seconds += prompt_done - start;
    talk->new_seconds += now() - prompt_done;
}

// Prints the prompt and what follows it.
static void generate(Talk *talk) {
    const Model *m = talk->run.model;
    const char *prompt = talk->options->prompt;
    Source source = {
        .bytes = prompt,
        .n = strlen(prompt),
        .bos = true,
        .controls = talk->options->controls,
    };
    int n;
    int *tokens = encode(m, source, &n);
    if (!n) // nothing to predict from
        die(1, "this model has no BOS token, so it needs a prompt: -i");
    if (n > m->config.seq_len)
        die(1, "-i has %d tokens, the model's context only %d", n, m->config.seq_len);
    // The prompt is printed from its tokens: so one sees what the model has read.
    for (int i = 0; i < n; i++)
        print_token(&talk->printer, m, tokens[i]);
    flush_output();
    reply(talk, tokens, n);
    puts("");
    free(tokens);
}

// A conversation in the making: its bytes, and for each of them whether a person typed it.
// What is typed never becomes a control piece; what the model's own form spells does.
typedef struct {
    char *bytes, *typed; // (n) each
    ptrdiff_t n;
} Writer;

// Adds some bytes to a conversation.
static void write_span(Writer *writer, Span span, bool typed) {
    ptrdiff_t first = writer->n;
    writer->n += span.length;
    writer->bytes = resize(writer->bytes, writer->n, 1);
    writer->typed = resize(writer->typed, writer->n, 1);
    memcpy(writer->bytes + first, span.bytes, span.length);
    memset(writer->typed + first, typed, span.length);
}

// The strings of the chat, OPENING to AFTER_ANSWER.
static Span chat_string(const Model *m, int which) {
    return string_at(m, m->config.vocab_size + which);
}

// Whether the file says how a chat is written. If it does not, all six strings are empty.
static bool has_chat(const Model *m) {
    const String *strings = m->tokenizer->strings + m->config.vocab_size;
    return strings[N_CHAT_STRINGS - 1].end > strings[-1].end; // vocab_size is 1 at least
}

// The kind of a string of the chat: whether spaces that were typed before it, or after it, are left
// out, as the model's makers had it.
enum { TAKES_SPACES_BEFORE = 1, TAKES_SPACES_AFTER = 2 };

// Adds what was typed between two strings of the chat.
static void write_typed(Writer *writer, const Model *m, int before, Span text, int after) {
    static const char spaces[] = " \t\n\v\f\r";
    if (kind_of(m, m->config.vocab_size + before) & TAKES_SPACES_AFTER)
        for (; text.length && memchr(spaces, *text.bytes, sizeof spaces - 1); text.length--)
            text.bytes++;
    if (kind_of(m, m->config.vocab_size + after) & TAKES_SPACES_BEFORE)
        while (text.length && memchr(spaces, text.bytes[text.length - 1], sizeof spaces - 1))
            text.length--;
    write_span(writer, text, true);
}

// What the model is to read in a round.
// Every family writes conversations in a form of its own. export.py found it out, and the file has
// it as six strings:
//
//     first round      OPENING                            question AFTER_QUESTION
//     with a system
//     prompt           BEFORE_SYSTEM system AFTER_SYSTEM  question AFTER_QUESTION
//     later            AFTER_ANSWER BEFORE_QUESTION       question AFTER_QUESTION
//
// BOS comes before the first round, if the strings do not spell it.
// AFTER_ANSWER has the end piece of the last answer: the program stops there and does not feed it.
// For Llama 2, OPENING is "<s>[INST] " and AFTER_QUESTION " [/INST]".
static void write_round(Writer *writer, const Talk *talk, Span question) {
    const Model *m = talk->run.model;
    const char *system = talk->options->system;
    int before = OPENING;
    if (talk->sequence.length) {
        write_span(writer, chat_string(m, AFTER_ANSWER), false);
        before = BEFORE_QUESTION;
    } else if (system) {
        write_span(writer, chat_string(m, BEFORE_SYSTEM), false);
        write_typed(writer, m, BEFORE_SYSTEM, (Span){system, strlen(system)}, AFTER_SYSTEM);
        before = AFTER_SYSTEM;
    }
    write_span(writer, chat_string(m, before), false);
    write_typed(writer, m, before, question, AFTER_QUESTION);
    write_span(writer, chat_string(m, AFTER_QUESTION), false);
}

// One round of a conversation: a question, which may end a line, and the answer.
// What was said before is in the cache.
static void chat_round(Talk *talk, Span question) {
    const Model *m = talk->run.model;
    int length = talk->sequence.length;
    static const char ends[] = {'\r', '\n'};
    while (question.length && memchr(ends, question.bytes[question.length - 1], sizeof ends))
        question.length--; // the end of the line is not part of what was said
    if (!question.length)
        return;
    Writer writer = {0};
    write_round(&writer, talk, question);
    Source round = {
        .bytes = writer.bytes,
        .n = writer.n,
        .start = length ? CONTINUED : AT_START,
        .bos = !length,
        .controls = true,
        .typed = writer.typed,
    };
    int n;
    int *tokens = encode(m, round, &n);
    // The last answer stopped before its end piece, so the model has not read that yet.
    // It reads it now, soberly, as it is no part of the question.
    int n_closing = 0;
    for (int i = 0; i < n && length && !n_closing; i++)
        if (kind_of(m, tokens[i]) == END)
            n_closing = i + 1;
    int room = m->config.seq_len - length;
    if (n > room) {
        fprintf(stderr, "%s: that is %d tokens, the context has room for %d\n", program, n, room);
    } else {
        feed(&talk->run, &talk->sequence, tokens, n_closing, 0);
        talk->printer.at_start = true;
        reply(talk, tokens + n_closing, n - n_closing);
        puts("");
        flush_output();
    }
    free(tokens);
    free(writer.bytes);
    free(writer.typed);
}

// A conversation with a person who types on standard input; the first question may be the prompt.
// The cold shower is taken before each question, unless -c is 0.
static void chat(Talk *talk) {
    if (!has_chat(talk->run.model))
        die(1, "this file has no form of a chat; give it a prompt with -i, or name the form: "
               "export.py ... --chat FORM");
    int n_around_system = chat_string(talk->run.model, BEFORE_SYSTEM).length +
                          chat_string(talk->run.model, AFTER_SYSTEM).length;
    if (talk->options->system && !n_around_system)
        die(1, "this model's form of a chat has no place for a system prompt: -y");
    char *line = NULL;
    size_t line_size = 0;
    chat_round(talk, (Span){talk->options->prompt, strlen(talk->options->prompt)});
    for (;;) {
        if (talk->sequence.length == talk->run.model->config.seq_len) {
            fprintf(stderr, "%s: the context is full, the conversation ends here\n", program);
            break;
        }
        if (talk->options->shower_every)
            talk->n_showers += cold_shower(&talk->run, &talk->sequence) > 0;
        fputs("> ", stderr); // not stdout: there is nothing but the model's text
        ssize_t n = getline(&line, &line_size, stdin);
        // A disk failed, perhaps half way, or a line is longer than memory.
        if (ferror(stdin) || (n < 0 && !feof(stdin)))
            die(1, "standard input cannot be read");
        if (n < 0) {
            talk->stopped_at = "Ctrl-D";
            break;
        }
        chat_round(talk, (Span){line, n});
    }
    fputs("\n", stderr);
    free(line);
}

/* ================================================================================================
 * 11  The command line
 *
 * The model comes first, then options. getopt of the C library takes the line apart.
 * All programs read the options about noise with the same functions.
 * A value that makes no sense ends the program with status 2, before anything is computed.
 * So does an option that lacks what it needs, such as -d without a dose.
 */

// Reads a number within [least, most] for an option. Exits with 2 on anything else.
static double number(int option,
                     const char *what, // the value is, for the complaint
                     const char *text, // the value
                     double least, double most) {
    char *end;
    double x = strtod(text, &end);
    // Nothing was read, something is left, or it is out of range, as inf and nan are.
    if (end == text || *end || !(x >= least && x <= most))
        die(2, "-%c takes %s from %g to %.10g, got '%s'%s", option, what, least, most, text,
            strchr(text, ',') ? "; a point is the decimal sign" : "");
    return x;
}

static int64_t whole_number(int option, const char *what, const char *text, double least,
                            double most) {
    double x = number(option, what, text, least, most);
    if (x != floor(x)) // 1.5 is no number of tokens
        die(2, "-%c takes %s, a whole number, got '%s'", option, what, text);
    return x;
}

// The whole of a stream that an option named, as a string, which stays until the program ends.
// Files are closed.
static const char *read_stream(int option, const char *name, FILE *stream) {
    size_t size = 1;
    char *text = resize(NULL, 1, size); // "", as an empty stream leaves it
    ssize_t n = stream ? getdelim(&text, &size, '\0', stream) : -1; // up to the first zero byte
    // It could not be opened, a disk failed, or there is more than memory.
    if (!stream || ferror(stream) || (n < 0 && !feof(stream)))
        die(1, "-%c: %s cannot be read: %s", option, name, strerror(errno));
    if (n > 0 && !text[n - 1]) // UTF-16, most likely
        die(1, "-%c: %s has a zero byte in it; save it as UTF-8 text", option, name);
    if (stream != stdin)
        fclose(stream);
    bool marked = !strncmp(text, "\xEF\xBB\xBF", 3); // as some editors do
    return marked ? text + 3 : text;
}

// What an option says: the text itself, @FILE for the text of a file, - for standard input.
static const char *text_of_option(int option, const char *value) {
    if (!strcmp(value, "-")) // the usual sign for it
        return read_stream(option, "standard input", stdin);
    return *value == '@' ? read_stream(option, value + 1, fopen(value + 1, "rb")) : value;
}

// Puts a point among those of a dose: they are sorted by depth.
static void add_point(Dose *dose, Point point) {
    int at = dose->n_points++;
    for (; at > 0 && dose->points[at - 1].depth > point.depth; at--)
        dose->points[at] = dose->points[at - 1];
    dose->points[at] = point;
}

// Reads "mode:depth=ratio,depth=ratio,..." into the dose. False if that is not what it is.
static bool parse_shape(Dose *dose, const char *text) {
    static const char *const modes[N_MODES] = {"ceil:", "floor:", "interpolate:"};
    size_t n = strcspn(text, ":"); // the length of the mode's name
    dose->mode = 0;
    while (strncmp(text, modes[dose->mode], n + 1))
        if (++dose->mode == N_MODES)
            return false;
    text += n;
    do { // at the colon, and then at each comma: a point follows
        Point point;
        int n_read = 0;
        // Its numbers are so small that no theta becomes infinite, and not nan.
        if (dose->n_points == MAX_POINTS ||
            sscanf(text + 1, "%f=%f%n", &point.depth, &point.ratio, &n_read) != 2 ||
            !(fabsf(point.depth) <= 1000 && point.ratio >= 0 && point.ratio <= 1000))
            return false;
        add_point(dose, point);
        text += 1 + n_read;
    } while (*text == ',');
    return !*text; // or something stands after the last point
}

// Reads theta, or theta@shape.
static void parse_dose(Dose *dose, int option, const char *text) {
    size_t n = strcspn(text, "@"); // the length of theta
    char *theta = strndup(text, n);
    if (!theta)
        die(1, "out of memory");
    // More than half a turn was meant in degrees. A shape that was given before is forgotten.
    *dose = (Dose){.theta = number(option, "radians (degrees / 57.3)", theta, 0, 3.1416)};
    free(theta);
    if (text[n] && !parse_shape(dose, text + n + 1))
        die(2, "-%c takes a shape like .3@ceil:.2=0,.4=1,.6=0 (at most %d points), got '%s'",
            option, MAX_POINTS, text);
}

// The options about noise, for getopt: a colon stands after each that takes a value.
#define NOISE_OPTIONS "H:Q:K:V:A:d:w:r:s:"
_Static_assert(sizeof NOISE_OPTIONS == 2 * (N_SITES + 4) + 1, "each site has an option");
static const NoiseOptions NO_NOISE_OPTIONS = {.seed = 420, .depth = .4, .spread = .1};

// Takes an option if it is one about noise; false if it is not.
static bool take_noise_option(NoiseOptions *options, int letter, const char *value) {
    const char *site = strchr(SITES, letter);
    if (site) {
        Dose *dose = &options->doses[site - SITES]; // the letter's place is the site
        parse_dose(dose, letter, value);
        options->plain |= !dose->n_points;
        return true;
    }
    switch (letter) {
    case 'd': // depth
        options->depth = number('d', "a depth", value, 0, 1);
        options->somewhere = true;
        return true;
    case 'w': // width
        options->spread = number('w', "a spread", value, 0, 1);
        options->somewhere = true;
        return true;
    case 'r': // random family
        if (strcmp(value, "centred") && strcmp(value, "upstream"))
            die(2, "-r takes centred or upstream, got '%s'", value);
        options->family = strcmp(value, "upstream") ? FAMILY_CENTRED : FAMILY_UPSTREAM;
        return true;
    case 's': // seed
        // A double holds such a number exactly, and the laboratory's seeds after it.
        options->seed = whole_number('s', "a seed", value, 0, 1e15);
        return true;
    }
    return false;
}

// -d and -w: the layers within `spread` of `depth` get theta, all others nothing.
// It is the shape of the original's examples. A dose with a shape of its own keeps it.
static void give_shape(NoiseOptions *options) {
    char shape[64]; // 9 digits tell all floats apart
    snprintf(shape, sizeof shape, "ceil:%.9g=0,%.9g=1,%.9g=0", options->depth - options->spread,
             options->depth, options->depth + options->spread);
    for (int site = 0; site < N_SITES; site++)
        if (options->somewhere && !options->doses[site].n_points)
            parse_shape(&options->doses[site], shape);
}

// The noise of a model that is dosed like this.
// The caller frees theta, which is NULL if no layer gets anything.
static Noise noise_of(const NoiseOptions *options, const Model *m) {
    int n = N_SITES * m->config.n_layers;
    float *theta = resize(NULL, n, sizeof *theta);
    dose_layers(theta, options->doses, m->config.n_layers);
    if (sum_of(theta, n) == 0) { // none is negative, so no layer gets anything
        free(theta);
        theta = NULL;
    }
    return (Noise){options->seed, options->family, theta};
}

// Prints the help and exits: on stdout with 0 if it was asked for, else on stderr with 2.
__attribute__((noreturn))
static void show_help(const char *usage, bool asked) {
    fputs(usage, asked ? stdout : stderr);
    flush_output();
    exit(asked ? 0 : 2);
}

// A program may be started with standard streams closed.
// Then the next file that it opens would become one of them, and messages would end up in it.
static void open_standard_streams(void) {
    int file;
    do
        file = open("/dev/null", O_RDWR);
    while (file >= 0 && file <= STDERR_FILENO);
    close(file); // one more than was needed
    signal(SIGXFSZ, SIG_IGN); // a file that may not grow is an error like any other
}

// What every main begins with.
// n_words come before the options: the model, and in the laboratory the experiment.
static void begin_program(int argc, char **argv, int n_words, const char *usage) {
    open_standard_streams();
    for (int i = 1; i <= n_words; i++)
        if (i == argc || !strcmp(argv[i], "-h") || !strcmp(argv[i], "--help"))
            show_help(usage, i < argc);
    if (*argv[1] == '-')
        die(2, "the model file comes first; %s -h lists what follows", program);
    optind = n_words + 1; // where getopt begins
}

static char given[CHAR_MAX + 1]; // the letters of all options that next_option has found

// The next option of the command line, read with getopt; its value is in optarg.
// -1 after the last one.
// -h shows the help; what is no option, or lacks its value, ends the program.
static int next_option(int argc, char **argv, const char *letters, const char *usage) {
    int letter = getopt(argc, argv, letters); // ':': no value. '?': no such option, see optopt
    // getopt knows no --help: it stops within this word, at its second character.
    bool long_help = letter == '?' && optind < argc && !strcmp(argv[optind], "--help");
    if (letter == 'h' || long_help)
        show_help(usage, true);
    if (letter == ':')
        die(2, "-%c needs a value; %s -h lists the options", optopt, program);
    if (letter == '?')
        die(2, "'-%c' is not an option; %s -h lists them", optopt, program);
    if (letter < 0 && optind < argc) // a word that belongs to no option
        die(2, "'%s' is not an option; a text of several words goes in quotes", argv[optind]);
    if (letter > 0 && !strchr(given, letter))
        given[strlen(given)] = letter;
    return letter;
}

// What options need in order to have any effect.
typedef struct {
    const char *letters; // of the options; NULL after the last line of a table
    bool met;            // whether this run has what they need, ...
    const char *needs;   // ... in words
} Need;

// Ends the program if an option was given that lacks what it needs.
static void check_needs(const Need *need) {
    for (; need->letters; need++) {
        const char *letter = strpbrk(need->letters, given);
        if (letter && !need->met)
            die(2, "-%c needs %s", *letter, need->needs);
    }
}

#ifndef DRUGS_LIBRARY
static const char USAGE[] =
    "usage: drugs <model.bin> [options]\n"
    "  -i <text>    prompt, or first question; @file: the text of a file, -: standard input\n"
    "  -x           <s> and the like in the prompt are control pieces, and not just characters\n"
    "  -n <tokens>  how many to write, 0: until the text ends or the context is full (256)\n"
    "  -m <mode>    generate (default) or chat\n"
    "  -y <text>    system prompt, for chat\n"
    "  -H -Q -K -V -A <theta>  doses in radians: norm output, query, key, value, attention output\n"
    "  -d <depth>   where in the depth they act, 0 first layer, 1 after the last (everywhere)\n"
    "  -w <spread>  how far around that depth, in the same unit (.1)\n"
    "               or a full shape for one dose: -A <theta>@<mode>:<depth>=<ratio>,...\n"
    "               with mode ceil, floor or interpolate: -A .3@interpolate:0=0,.4=1,.8=0\n"
    "  -s <seed>    of the noise and the sampling (420)\n"
    "  -r <family>  of random directions: centred (default) or upstream\n"
    "  -u           unprotected: the prompt is read drugged too\n"
    "  -c <tokens>  a cold shower after this many drugged tokens, and in a chat before\n"
    "               each question; 0: never (420)\n"
    "  -t <temp>    temperature, 0: take the most probable token (0)\n"
    "  -p <top_p>   keep the most probable tokens up to this probability, with -t (.9)\n"
    "  -h, --help   this help\n"
    "An option that lacks what it needs is an error.\n";

// Which option goes with which.
static void check_drugs(const Options *options) {
    bool dosed = strpbrk(given, SITES);
    check_needs((const Need[]){
        {"dw", options->noise.plain, "a dose without a shape, like -V .3"},
        {"ru", dosed, "a dose, like -V .3"},
        {"c", dosed || !options->shower_every, "a dose, like -V .3"},
        {"s", dosed || strchr(given, 't'), "a dose, like -V .3, or a temperature: -t"},
        {"p", strchr(given, 't'), "a temperature: -t"},
        {"x", strchr(given, 'i') && !options->chat, "a prompt, -i, and no -m chat"},
        {"y", options->chat, "-m chat"},
        {0},
    });
}

static Options parse_options(int argc, char **argv) {
    // What is not said is as the help text has it.
    Options options = {
        .prompt = "",
        .n_new = 256,
        .shower_every = 420,
        .dice = {.top_p = .9},
        .noise = NO_NOISE_OPTIONS,
    };
    int letter;
    while ((letter = next_option(argc, argv, ":huxi:n:m:y:c:t:p:" NOISE_OPTIONS, USAGE)) >= 0) {
        if (take_noise_option(&options.noise, letter, optarg))
            continue;
        switch (letter) {
        case 'u': // unprotected
            options.drugged_prompt = true;
            break;
        case 'x': // exact pieces
            options.controls = true;
            break;
        case 'i': // input
            options.prompt = text_of_option('i', optarg);
            break;
        case 'n': // number
            options.n_new = whole_number('n', "a number of tokens", optarg, 0, 1 << 28);
            break;
        case 'm': // mode
            options.chat = !strcmp(optarg, "chat");
            if (!options.chat && strcmp(optarg, "generate"))
                die(2, "-m takes generate or chat, got '%s'", optarg);
            break;
        case 'y': // system
            options.system = text_of_option('y', optarg);
            break;
        case 'c': // cold shower
            options.shower_every = whole_number('c', "a number of tokens", optarg, 0, 1 << 28);
            break;
        case 't': // temperature
            options.dice.temperature = number('t', "a temperature", optarg, 0, 1000);
            break;
        case 'p': // top_p
            options.dice.top_p = number('p', "a probability", optarg, 0, 1);
            break;
        }
    }
    check_drugs(&options);
    give_shape(&options.noise); // once -d and -w are both known
    return options;
}

int main(int argc, char **argv) {
    enum { BLOCK = 256 }; // rows of a prompt that are computed at once: enough to use
                          // each weight often, and little memory
    begin_program(argc, argv, 1, USAGE);
    const Options options = parse_options(argc, argv);
    Model model;
    if (!model_open(&model, argv[1]))
        die(1, "%s: %s", argv[1], model.error);
    const Noise noise = noise_of(&options.noise, &model);
    Talk talk = {
        .options = &options,
        .sequence = sequence_new(noise),
        .printer = {.to = stdout, .at_start = true, .terminal = isatty(STDOUT_FILENO)},
    };
    run_init(&talk.run, &model, BLOCK, 1);
    if (options.chat)
        chat(&talk);
    else
        generate(&talk);
    flush_output(); // first the text, then the figures
    double read = talk.n_prompt / fmax(talk.prompt_seconds, 1e-9); // tokens a second
    double wrote = talk.n_new / fmax(talk.new_seconds, 1e-9);
    fprintf(stderr,
            "read %d tokens at %.*f/s, wrote %d at %.*f/s until %s; seed %llu; %d cold shower%s\n",
            talk.n_prompt, read < 10, read, talk.n_new, wrote < 10, wrote, talk.stopped_at,
            (unsigned long long)noise.seed, talk.n_showers, talk.n_showers == 1 ? "" : "s");
    run_free(&talk.run);
    sequence_free(&model, &talk.sequence);
    free((float *)noise.theta); // which noise_of made
    model_close(&model);
    return 0;
}
#endif

/* ================================================================================================
 * 12  Inside the maths
 *
 * A core multiplies far faster than memory delivers numbers.
 * So the art of a fast product is to use each number often once it is in a register. matmul works
 * on tiles, of 4 rows of x and 4 rows of w where there are registers enough:
 *
 *                     w[o]   w[o+1]  w[o+2]  w[o+3]        each row of w is an output
 *                   +-------+-------+-------+-------+
 *            x[r]   |  sum  |  sum  |  sum  |  sum  |      sum: 8 floats, partial sums
 *            x[r+1] |  sum  |  sum  |  sum  |  sum  |      of one dot product
 *            x[r+2] |  sum  |  sum  |  sum  |  sum  |
 *            x[r+3] |  sum  |  sum  |  sum  |  sum  |
 *                   +-------+-------+-------+-------+
 *
 * In a tile 8 loads, 4 of x and 4 of w, serve 16 multiplications and additions.
 * A single dot product needs 2 loads for each one.
 * It also has to wait for its one sum after each addition. 16 sums keep the adders busy.
 *
 * So a thread takes 16 rows of w, which its cache can hold, and as many rows of x as fit beside
 * them; it makes all tiles of these, and goes on with the next rows of x.
 * Each w comes from memory once.
 *
 * With a single row of x each weight is used only once, and the speed is that of the memory.
 * Memory is fastest when it is read in order, and four rows at a time take twice as long.
 * So then the rows of w are taken one by one.
 *
 * Why the results are the same everywhere.
 * Floating-point addition depends on its order, so the order is fixed: number i of a dot product
 * always goes to partial sum i mod 8, and in the end the 8 are added as 4 + 4, 2 + 2, 1 + 1.
 * That holds in every shape of tile, so a row that comes alone has the bits it would have in a
 * block, and on every machine: where a register holds 4 floats, two of them are a sum.
 * And a product is always rounded before it is added.
 * Some machines can do both with one rounding, and compilers use that in some places only.
 * -ffp-contract=off in the Makefile forbids it.
 * (gcc 12 fuses a * c - b * s all the same, so rope adds the product with -s.)
 */
#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16 // 16 is 0 for a machine with half floats
#error "this compiler rounds sums to more digits than a float has; for x86 use -msse2 -mfpmath=sse"
#endif

// What the processor has: the floats in a register, and how many rows of x a tile can have before
// the registers, 16 or 32, run out.
#if defined __AVX512VL__
enum { WIDTH = 8, TILE_X = 4 };
#elif defined __AVX__
enum { WIDTH = 8, TILE_X = 2 };
#elif defined __aarch64__
enum { WIDTH = 4, TILE_X = 2 };
#else
enum { WIDTH = 4, TILE_X = 1 };
#endif
enum { LANES = 8, PARTS = LANES / WIDTH, TILE_W = 4 };

// A register of floats that + - * / treat one by one: an extension of gcc and clang. aligned: it
// may lie anywhere; may_alias: also where floats lie.
typedef float vec
    __attribute__((vector_size(WIDTH * sizeof(float)), aligned(sizeof(float)), may_alias));

// The first n floats at p, at most WIDTH. The others are zero and add nothing to a sum of products.
static inline vec load(const float *p, ptrdiff_t n) {
    if (n >= WIDTH)
        return *(const vec *)p;
    vec v = {0};
    for (int i = 0; i < n; i++)
        v[i] = p[i];
    return v;
}

// Widens WIDTH numbers of two bytes each.
//
// The bits of a BF16 are the upper half of an FP32: they are moved there.
// Those of an FP16 without its sign are moved to where an FP32 has exponent and mantissa.
// Its exponent counts from -15 and that of an FP32 from -127, so the number that they mean there is
// too small by 2^112, and a multiplication by that rounds nothing.
// (Subnormal numbers, which have no leading 1, come out right as well.)
// x86 has instructions for the way from memory, which gcc 12 does not find by itself.
typedef uint32_t word_vec __attribute__((vector_size(WIDTH * sizeof(float))));
typedef uint16_t halves
    __attribute__((vector_size(WIDTH * sizeof(uint16_t)), aligned(sizeof(uint16_t)), may_alias));
static inline __attribute__((always_inline)) vec widened(const halves *half, int storage) {
#if defined __AVX2__ && defined __F16C__
    if (storage == FP16)
        return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const void *)half));
    word_vec wide = (word_vec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)half));
#else
    word_vec wide = __builtin_convertvector(*half, word_vec);
#endif
    if (storage == BF16)
        return (vec)(wide << 16);
    vec magnitude = (vec)((wide & 0x7FFF) << 13) * 0x1p112f;
    return (vec)((word_vec)magnitude | (wide & 0x8000) << 16);
}

// n weights from number `first` on, at most WIDTH; the others are zero.
static inline __attribute__((always_inline)) vec
load_weights(Weights w, ptrdiff_t first, ptrdiff_t n) {
    if (w.storage == FP32)
        return load((const float *)w.data + first, n);
    const uint16_t *p = (const uint16_t *)w.data + first;
    if (n >= WIDTH)
        return widened((const halves *)p, w.storage);
    halves rest = {0};
    for (int i = 0; i < n; i++)
        rest[i] = p[i];
    return widened(&rest, w.storage);
}

// The sum of the 8 partial sums, halving them: 8, 4, 2, 1.
static inline float sum_lanes(const vec sum[PARTS]) {
    typedef float four __attribute__((vector_size(4 * sizeof(float))));
    four half[2];
    memcpy(half, sum, sizeof half);
    half[0] += half[1];
    return (half[0][0] + half[0][2]) + (half[0][1] + half[0][3]);
}

// One step of a tile: sum[r][o] += x[r] * w[o] for the first n numbers of n_x rows of x and n_w
// rows of w, n at most 8.
// The first row of w begins at its number w_at.
static inline __attribute__((always_inline)) void
add_products(vec sum[TILE_X][TILE_W][PARTS],
             const float *x, ptrdiff_t x_stride, int n_x,
             Weights w, ptrdiff_t w_at, ptrdiff_t w_stride, int n_w, ptrdiff_t n) {
    for (int part = 0; part < PARTS; part++) {
        ptrdiff_t at = part * WIDTH;
        vec w_part[TILE_W];
        for (int o = 0; o < n_w; o++)
            w_part[o] = load_weights(w, w_at + o * w_stride + at, n - at);
        for (int r = 0; r < n_x; r++) {
            vec x_part = load(x + r * x_stride + at, n - at);
            for (int o = 0; o < n_w; o++)
                sum[r][o][part] += x_part * w_part[o];
        }
    }
}

enum { AHEAD = 1024 }; // bytes: a single row of x asks for weights so far ahead

// A tile: out[r][o] = x[r] . w[o].
// Wherever it is called n_x, n_w and w.storage are constants.
// As it becomes part of its callers (always_inline), the compiler writes the loops over r and o
// out, and each sum gets a register of its own.
static inline __attribute__((always_inline)) void
tile(float *out, ptrdiff_t out_stride, // (n_x, n_w)
     const float *x, int n_x,          // (n_x, n)
     Weights w, ptrdiff_t w_at,        // (n_w, n), rows w_stride apart, from number w_at on
     ptrdiff_t w_stride, int n_w,
     ptrdiff_t n) {
    vec sum[TILE_X][TILE_W][PARTS] = {{{{0}}}};
    ptrdiff_t i = 0;
#pragma GCC unroll 4
    for (; i + LANES <= n; i += LANES) {
        if (n_x * n_w == 1) // the processor itself looks ahead, but stops at every 4,096 bytes
            __builtin_prefetch((const char *)w.data + (w_at + i) * bytes_of(w.storage) + AHEAD);
        add_products(sum, x + i, n, n_x, w, w_at + i, w_stride, n_w, LANES);
    }
    if (i < n) // the rest
        add_products(sum, x + i, n, n_x, w, w_at + i, w_stride, n_w, n - i);
    for (int r = 0; r < n_x; r++)
        for (int o = 0; o < n_w; o++)
            out[r * out_stride + o] = sum_lanes(sum[r][o]);
}

static float dot(const float *a, const float *b, int n) {
    float out;
    tile(&out, 0, a, 1, (Weights){b, FP32}, 0, 0, 1, n);
    return out;
}

static void dots(float *out, const float *x, const float *w, ptrdiff_t w_stride, int n, int n_out) {
    const Weights floats = {w, FP32};
    int o = 0;
    for (; o + TILE_W <= n_out; o += TILE_W)
        tile(out + o, 0, x, 1, floats, o * w_stride, w_stride, TILE_W, n);
    for (; o < n_out; o++)
        out[o] = dot(x, w + o * w_stride, n);
}

// All rows of x times the rows of w from `first` on, up to n_w of them: see above.
enum { CHUNK = 16, X_BYTES = 1 << 17 }; // rows of w; bytes of x that stay in the cache beside them
static inline __attribute__((always_inline)) void
chunk(float *out, const float *x, Weights w, ptrdiff_t first, ptrdiff_t n_w,
      ptrdiff_t n_rows, ptrdiff_t n_in, ptrdiff_t n_out) {
    const ptrdiff_t last = first + n_w;
    // As many rows of x as fill X_BYTES, in whole tiles, one at least.
    const ptrdiff_t n_block = ((X_BYTES - 1) / (TILE_X * n_in * (ptrdiff_t)sizeof *x) + 1) * TILE_X;
    for (ptrdiff_t begin = 0; begin < n_rows; begin += n_block) {
        const ptrdiff_t end = min(begin + n_block, n_rows);
        ptrdiff_t o = first;
        for (; n_rows > 1 && o + TILE_W <= last; o += TILE_W) {
            ptrdiff_t r = begin;
            for (; r + TILE_X <= end; r += TILE_X)
                tile(out + r * n_out + o, n_out, x + r * n_in, TILE_X, w, o * n_in, n_in, TILE_W, n_in);
            for (; r < end; r++) // what fills no tile
                tile(out + r * n_out + o, n_out, x + r * n_in, 1, w, o * n_in, n_in, TILE_W, n_in);
        }
        for (; o < last; o++)
            for (ptrdiff_t r = begin; r < end; r++)
                tile(out + r * n_out + o, 0, x + r * n_in, 1, w, o * n_in, 0, 1, n_in);
    }
}

// The rows of w are shared out among the threads.
// Each storage has its own copy of the loops, as the constants in these calls say.
static void matmul(float *out, const float *x, Weights w, ptrdiff_t n_rows, ptrdiff_t n_in,
                   ptrdiff_t n_out) {
    const ptrdiff_t step = n_rows > 1 ? CHUNK : TILE_W;
#pragma omp parallel for schedule(static) if (worth_threads(product_bytes(w, n_rows, n_in, n_out)))
    for (ptrdiff_t o = 0; o < n_out; o += step) {
        const ptrdiff_t n_w = min(n_out - o, step);
        if (w.storage == FP32)
            chunk(out, x, (Weights){w.data, FP32}, o, n_w, n_rows, n_in, n_out);
        else if (w.storage == BF16)
            chunk(out, x, (Weights){w.data, BF16}, o, n_w, n_rows, n_in, n_out);
        else
            chunk(out, x, (Weights){w.data, FP16}, o, n_w, n_rows, n_in, n_out);
    }
}

static void widen(float *to, Weights w, ptrdiff_t first, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += WIDTH) {
        vec part = load_weights(w, first + i, n - i);
        memcpy(to + i, &part, min(n - i, WIDTH) * sizeof *to);
    }
}

// All threads, or one alone?
// On an idle machine all are faster.
// But when another program has one of the cores, the thread there stands still half of the time,
// and all others wait for it after each product.
// That can cost far more than is gained, above all where products are short.
//
// All layers do the same work, so they can be compared.
// Now and then two layers are computed the other way, layers 1 and 3.
// If they take less than .8 of the time of layers 2 and 4, they have won, and the way is changed.
// One thread must win once, but all threads three times in a row: on a busy machine they may be
// lucky for a while.
// A trial that was lost cost some time, and the next one comes after a hundred times as long.
// Single rows and many rows are decided upon separately, as their products differ in length.
typedef struct {
    bool one_thread;   // the way now
    int n_won;         // trials in a row that the other way has won
    double next_trial; // the time, in seconds
} Team;
static Team teams[2]; // for one row, for many rows
static bool solo;     // whether what is computed now has one thread

static bool worth_threads(double bytes) {
    return bytes > WORTH_THREADS && !solo;
}

static void all_layers(Run *run) {
    const int n_layers = run->model->config.n_layers;
    const int last = n_layers > 4 ? 4 : (n_layers - 1) / 2 * 2; // layers 1 to last are compared
    Team *team = &teams[run->n_rows > 1];
    const bool trial = last > 0 && now() >= team->next_trial;
    double seconds[] = {0, 0}; // of the layers that are compared: the way now, the other way
    for (int layer = 0; layer < n_layers; layer++) {
        const bool other = trial && layer % 2 && layer < last;
        solo = team->one_thread != other;
        double start = trial ? now() : 0;
        layer_forward(run, layer);
        if (trial && layer > 0 && layer <= last)
            seconds[other] += now() - start;
    }
    if (trial) {
        const double lost = seconds[true] - seconds[false];
        team->n_won = seconds[true] < .8 * seconds[false] ? team->n_won + 1 : 0;
        team->next_trial = now() + 100 * fmax(lost, 0);
    }
    if (team->n_won > (team->one_thread ? 2 : 0)) {
        team->one_thread = !team->one_thread;
        team->n_won = 0;
    }
    solo = team->one_thread;
}

static void add_scaled(float *y, float a, const float *x, int n) {
    for (int i = 0; i < n; i++)
        y[i] += a * x[i];
}

static float sum_of(const float *x, int n) {
    vec sum[PARTS] = {{0}};
    for (int i = 0; i < n; i += WIDTH)
        sum[i / WIDTH % PARTS] += load(x + i, n - i);
    return sum_lanes(sum);
}

// exp without libm, whose expf may differ in the last digit from system to system.
// A compiler can also do eight of these at a time, which it cannot with calls of libm.
//
//     x = n ln 2 + r,   n a whole number,   |r| <= ln 2 / 2 = .35
//     exp(x) = 2^n exp(r)
//
// For so small an r the series 1 + r + r²/2 + ... + r⁷/5040 is enough: the next term is below 1e-8.
// To multiply by 2^n, n is added to the exponent, which begins at bit 23 of a float.
//
// x / ln 2 is rounded to a whole n by adding 1.5 * 2^23: a float as large as that has no digits
// after the point, so the sum is rounded, and its lowest bits hold n.
// (1.5, so that a negative n stays in the same range.)
//
// Its two ?: become selections and not branches, so the compiler can compute several at once.
static inline float exp_of(float x) {
    float shift = 0x1.8p23f;
    float limited = x > 88.0f ? 88.0f : x; // beyond, a float would overflow
    float shifted = limited * 1.44269504f + shift; // 1.44... = 1 / ln 2
    float n = shifted - shift;
    // ln 2 = .693359375 - .00021219444. n times the first part is exact, so r has all its digits.
    float r = (limited - n * 0.693359375f) + n * 2.12194440e-4f;
    float e = 1.0f / 5040 * r + 1.0f / 720; // Horner's rule, from 1/7! to 1/0!
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 1.0f / 2;
    e = e * r + 1;
    e = e * r + 1;
    uint32_t bits, n_bits;
    memcpy(&bits, &e, sizeof bits);
    memcpy(&n_bits, &shifted, sizeof n_bits);
    bits += n_bits << 23; // what stood above n is pushed out
    memcpy(&e, &bits, sizeof e);
    return x < -87.0f ? 0 : e;
}

static void exp_all(float *x, int n) {
    for (int i = 0; i < n; i++)
        x[i] = exp_of(x[i]);
}

// cos and sin, likewise without libm.
// With n quarter turns taken off, |r| <= pi/4 is left, and the first terms of the series are
// enough: the next ones are below 1e-16.
//
//     angle = n pi/2 + r      cos r = 1 - r²/2! + r⁴/4! - ...      sin r = r (1 - r²/3! + ...)
//
// If the angle is large, n pi/2 is nearly as large, and r is the small difference of the two.
// So pi/2 must be known with more digits than a double has: it comes in three pieces.
// The first two have only 25 bits each, so their products with an n of up to 28 bits are exact.
static void cos_sin_of(double angle, double *cosine, double *sine) {
    double shift = 0x1.8p52; // as above, for a double
    double n = (angle * 0x1.45f306dc9c883p-1 + shift) - shift; // 2 / pi
    double r = angle - n * 0x1.921fb5p0 - n * 0x1.110b46p-26 - n * 0x1.1a62633145c07p-54;
    double c = 1;
    double s = 1;
    for (int k = 16; k > 0; k -= 2) { // Horner's rule
        c = 1 - r * r * (1.0 / (k * (k - 1))) * c;
        s = 1 - r * r * (1.0 / (k * (k + 1))) * s;
    }
    s *= r;
    for (int quarter = (int)n & 3; quarter > 0; quarter--) { // each makes (-s, c) of (c, s)
        double old = c;
        c = -s;
        s = old;
    }
    *cosine = c;
    *sine = s;
}

// In double precision: at thousands of radians a float has only three digits after the point.
static void rope_angles(const Model *m, int position, float *cos_sin) {
    for (int i = 0; i < m->config.head_dim / 2; i++) {
        double cosine, sine;
        cos_sin_of(position * m->rope_freq[i], &cosine, &sine);
        cos_sin[2 * i] = cosine;
        cos_sin[2 * i + 1] = sine;
    }
}

/* ================================================================================================
 * 13  Memory and messages
 *
 * These functions were declared above.
 * They take memory and give it back, and they end a program that cannot go on.
 */

static void die(int status, const char *format, ...) {
    char line[1024];
    va_list args; // what the caller wants to have printed
    flockfile(stderr); // for good: of several threads only one may print a line
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    // What is quoted of a file or an option may hold line feeds, or what a terminal would obey:
    // control characters, of one byte or of two.
    for (unsigned char *c = (unsigned char *)line; *c; c++)
        if (*c < ' ' || *c == 127 || (*c == 0xC2 && c[1] < 160))
            *c = '?';
    fflush(stdout); // what was said so far comes before the complaint
    fprintf(stderr, "%s: %s\n", program, line);
    exit(status);
}

static void *resize(void *old, ptrdiff_t count, size_t size) {
    size_t n = count > 0 ? (size_t)count : 1; // so that something comes back for 0, too
    void *memory = NULL;
    if (n <= SIZE_MAX / 2 / size) // no object may be larger than half of what a size_t counts
        memory = old ? realloc(old, n * size) : calloc(n, size);
    if (!memory)
        die(1, "out of memory: %zu times %zu bytes were needed", n, size);
    return memory;
}

// k and v are the two halves of one list.
static void sequence_reserve(const Model *m, Sequence *s, int capacity) {
    int n_layers = m->config.n_layers;
    if (capacity <= s->capacity)
        return;
    // Of a new sequence: NULL for each layer, which resize takes for a new beginning.
    s->k = resize(s->k, 2 * n_layers, sizeof *s->k);
    s->v = s->k + n_layers;
    for (int l = 0; l < 2 * n_layers; l++)
        s->k[l] = resize(s->k[l], (ptrdiff_t)capacity * m->config.kv_dim, sizeof(float));
    s->tokens = resize(s->tokens, capacity, sizeof *s->tokens);
    s->capacity = capacity;
}

static void sequence_free(const Model *m, Sequence *s) {
    // If nothing was reserved there is nothing to free.
    for (int l = 0; s->k && l < 2 * m->config.n_layers; l++)
        free(s->k[l]);
    free(s->k);
    free(s->tokens);
    *s = (Sequence){0};
}

// A buffer with a row of `width` floats for each row of a run, which notes it for run_free.
static float *new_buffer(Run *run, ptrdiff_t width) {
    float *buffer = resize(NULL, run->max_rows * width, sizeof(float));
    run->buffers = resize(run->buffers, run->n_buffers + 1, sizeof *run->buffers);
    run->buffers[run->n_buffers++] = buffer;
    return buffer;
}

static void run_init(Run *run, const Model *m, int max_rows, int n_slots) {
    const Config *c = &m->config;
    // All other members begin as 0 and NULL.
    *run = (Run){.model = m, .max_rows = max_rows, .n_slots = n_slots};
    run->slots = resize(NULL, n_slots, sizeof *run->slots);
    for (int i = 0; i < n_slots; i++)
        run->slots[i] = (Slot){
            .x = new_buffer(run, c->dim),
            .xn = new_buffer(run, c->dim),
            .q = new_buffer(run, c->q_dim),
            .k = new_buffer(run, c->kv_dim),
            .v = new_buffer(run, c->kv_dim),
            .att = new_buffer(run, c->q_dim),
            .xm = new_buffer(run, c->dim),
            .fn = new_buffer(run, c->dim),
            .gate = new_buffer(run, c->hidden_dim),
            .up = new_buffer(run, c->hidden_dim),
            .h = new_buffer(run, c->hidden_dim),
        };
    // what all layers share
    run->added = new_buffer(run, c->dim);
    run->cos_sin = new_buffer(run, c->head_dim);
    run->direction = new_buffer(run, c->dim); // of which it takes a row
    run->last_x = new_buffer(run, c->dim);
    run->last_xn = new_buffer(run, c->dim);
    run->logits = new_buffer(run, c->vocab_size);
    run->block = resize(NULL, 2 * (ptrdiff_t)max_rows, sizeof *run->block);
    run->wanted = run->block + max_rows; // the second half
    run->heads = resize(NULL, c->n_heads * head_scratch(c), sizeof(float));
}

static void run_free(Run *run) {
    for (int i = 0; i < run->n_buffers; i++)
        free(run->buffers[i]);
    free(run->buffers);
    free(run->slots);
    free(run->block);
    free(run->heads);
    *run = (Run){0};
}
