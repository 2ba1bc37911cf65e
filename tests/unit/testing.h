/* testing.h - what the tests in C share: drugs.c itself and small made-up models, built in memory.
 *
 * Weights come from a formula, so that no weight files are needed and the reference that golden.h
 * was made with can draw the same ones.
 */
#ifdef NO_CRITERION // for a program that is no test, on machines that lack this library
#include <stdbool.h>
#include <stdlib.h>
static inline void cr_assert(bool condition, ...) {
    if (!condition)
        abort();
}
#else
#include <criterion/criterion.h>
#endif
#ifndef DRUGS_LIBRARY // else another program was included, and drugs.c with it
#define DRUGS_LIBRARY
#include "../../drugs.c"
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

// The i-th number of a stream, in [0, 1) with 24 bits. Not drugs.c's generator, on purpose.
static float unit(uint64_t stream, uint64_t i) {
    uint64_t z = ((stream << 32) + i + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (float)((z ^ (z >> 31)) >> 40) * 0x1p-24f;
}

// For messages, in the order of the enum.
static const char *const TENSOR_NAMES[] = {
    "gain of the attention norm", "wq", "wk", "wv", "wo", "gain of the FFN norm", "w1", "w3", "w2",
    "embedding", "gain of the final norm", "classifier",
};
_Static_assert(sizeof TENSOR_NAMES / sizeof *TENSOR_NAMES == N_TENSORS, "each tensor has a name");

// ---- the file of a model

#include "../makers/flat.h"

// The header as it lies in the file. The layout is stated once more here, so that drugs.c cannot
// change it unnoticed. What follows the 256 bytes is for model_file, which puts it after them.
typedef struct {
    char magic[8];
    int32_t version, dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, seq_len,
            shared_classifier, sliding_window;
    float norm_eps;
    int32_t storage, bos, unknown, text_flags, n_cutters, n_states, n_classes, n_ranges, n_units,
            n_pairs, n_whole, n_words, n_text;
    char zeros[148];
    double rope_theta; // RoPE's frequencies are rope_theta^(-2 i / head_dim)
    Vocabulary vocabulary; // but for the pieces
    bool narrow; // whether the weights have few digits, so that any storage holds them
} FileHeader;
_Static_assert(offsetof(FileHeader, zeros) == 108, "no gaps between its members");
_Static_assert(offsetof(FileHeader, rope_theta) == 256, "the length of a header");

// Stands in text_flags for a vocabulary with a piece for each byte; it does not get into the file.
enum { BYTE_PIECES = 1 << 10 };

// The chat of Llama 2.
static inline void give_llama2_chat(Vocabulary *vocabulary) {
    static const char *const strings[] = {
        "[INST] ", "[INST] <<SYS>>\n", "\n<</SYS>>\n\n", "<s>[INST] ", " [/INST]", " </s>",
    };
    memcpy(vocabulary->chat, strings, sizeof strings);
}

// A piece of a test's list. A length of 0 is that of the string.
typedef struct {
    const char *bytes;
    int length, kind, left;
    float score;
} TestPiece;

// Every vocabulary begins with <unk> 0, <s> 1, </s> 2 and, if it has byte pieces, those: 3 to 258.
enum { FIRST_BYTE = 3, BEHIND_BYTES = FIRST_BYTE + 256 };
static Bytes first_pieces(bool byte_pieces) {
    Bytes pieces = {0};
    append_piece(&pieces, 0, UNKNOWN, "<unk>", 5);
    append_piece(&pieces, 0, CONTROL, "<s>", 3);
    append_piece(&pieces, 0, END, "</s>", 4);
    for (int i = 0; byte_pieces && i < 256; i++) {
        const char byte = (char)i;
        append_piece(&pieces, 0, BYTE, &byte, 1);
    }
    return pieces;
}

// A tensor of weights from the formula: gains .5 + U, embedding and classifier (U - .5) / 2,
// matrices (U - .5) * 4 / sqrt(n_in), with U from the stream 16 * layer + which. In files of two bytes
// a weight, and where `narrow` is set, these are cut to 8 digits and a few exponents, which any storage
// holds exactly.
static void append_tensor(Bytes *file, const Config *c, bool narrow, int layer, int which) {
    int n_out, n_in;
    tensor_shape(c, which, &n_out, &n_in);
    const bool gain = n_out == 1;
    const float width = which >= TOK_EMB ? .5f : 4 / sqrtf((float)n_in);
    const size_t n = (size_t)n_out * (size_t)n_in;
    append_zeros(file, (64 - file->n % 64) % 64);
    for (size_t i = 0; i < n; i++) {
        float u = unit((uint64_t)(16 * layer + which), i);
        float weight = gain ? u + .5f : (u - .5f) * width;
        if (narrow && !gain)
            weight = roundf(weight * 0x1p8f) * 0x1p-8f; // below 1/2: 7 digits
        uint32_t bits;
        memcpy(&bits, &weight, sizeof bits);
        const uint16_t upper = (uint16_t)(bits >> 16);
        // exponent and mantissa moved to where an FP16 has them; 0 stays 0
        const uint32_t magnitude = bits & 0x7FFFFFFF;
        const uint32_t moved = magnitude ? (magnitude >> 13) - (112 << 10) : 0;
        const uint16_t half = (uint16_t)((bits >> 16 & 0x8000) | moved);
        switch (storage_of(c, which)) {
        case FP32:
            append(file, &weight, sizeof weight);
            break;
        case BF16:
            append(file, &upper, sizeof upper);
            break;
        case FP16:
            append(file, &half, sizeof half);
            break;
        }
    }
}

// The whole file: the header (the sizes of what follows are filled in), RoPE's frequencies, the
// tokenizer, the weights.
static Bytes model_file(FileHeader header, Bytes pieces) {
    const Config c = {
        .dim = header.dim,
        .hidden_dim = header.hidden_dim,
        .vocab_size = header.vocab_size,
        .q_dim = header.n_heads * header.head_dim,
        .kv_dim = header.n_kv_heads * header.head_dim,
        .storage = header.storage,
    };
    const bool narrow = header.narrow || header.storage != FP32;
    Bytes file = {0};
    header.text_flags &= ~BYTE_PIECES;
    append(&file, &header, offsetof(FileHeader, rope_theta));
    for (int i = 0; i < header.head_dim / 2; i++) {
        const double frequency = pow(header.rope_theta, -2. * i / header.head_dim);
        append(&file, &frequency, sizeof frequency);
    }
    // Then the tables, whose sizes become known here.
    Config said;
    memcpy(&said, file.data + MAGIC_BYTES, CONFIG_BYTES);
    header.vocabulary.pieces = pieces;
    append_tokenizer(&file, &said, &header.vocabulary);
    memcpy(file.data + MAGIC_BYTES, &said, CONFIG_BYTES);
    append_tensor(&file, &c, narrow, 0, TOK_EMB);
    for (int layer = 0; layer < header.n_layers; layer++)
        for (int which = 0; which < N_LAYER_TENSORS; which++)
            append_tensor(&file, &c, narrow, layer, which);
    append_tensor(&file, &c, narrow, 0, FINAL_NORM);
    if (!header.shared_classifier)
        append_tensor(&file, &c, narrow, 0, WCLS);
    return file;
}

// ---- three models

// Grouped queries, shared classifier.
static const FileHeader G = {
    .magic = "drugs.c", .version = 3, .dim = 64, .hidden_dim = 172, .n_layers = 3,
    .n_heads = 8, .n_kv_heads = 4, .head_dim = 8, .vocab_size = 320, .seq_len = 64,
    .shared_classifier = 1, .rope_theta = 10000, .norm_eps = 1e-5f, .bos = 1,
    .text_flags = PREFIX_SPACE | BYTE_PIECES,
};

// A key head for each query head, a window shorter than the text, a classifier of its own,
// n_heads * head_dim != dim, sizes that are no multiples of 8.
static const FileHeader M = {
    .magic = "drugs.c", .version = 3, .dim = 52, .hidden_dim = 90, .n_layers = 2,
    .n_heads = 3, .n_kv_heads = 3, .head_dim = 10, .vocab_size = 93, .seq_len = 64,
    .sliding_window = 5, .rope_theta = 500, .norm_eps = 1e-3f, .bos = 1,
};

// In a block of 64 rows every loop that can use threads does.
static const FileHeader BIG = {
    .magic = "drugs.c", .version = 3, .dim = 128, .hidden_dim = 640, .n_layers = 2,
    .n_heads = 8, .n_kv_heads = 4, .head_dim = 32, .vocab_size = 300, .seq_len = 64,
    .shared_classifier = 1, .rope_theta = 10000, .norm_eps = 1e-5f, .bos = 1,
    .text_flags = BYTE_PIECES,
};

// A set of sites is a number with the bit 1 << site for each. golden.h knows the first five, HQKVA;
// what does not ask golden.h is tested with all that there are.
enum { N_GOLDEN_SITES = 5, GOLDEN_SITES = (1 << N_GOLDEN_SITES) - 1 };
enum { N_SITE_SETS = 1 << N_SITES, ALL_SITES = N_SITE_SETS - 1 };
_Static_assert((int)N_SITES >= (int)N_GOLDEN_SITES, "golden.h has numbers for sites that are gone");

// Says that a piece is of another kind. A mapped file becomes this process's own copy first.
static inline void set_kind(Model *m, int id, int kind) {
    if (m->file)
        cr_assert(!mprotect(m->file, m->file_bytes, PROT_READ | PROT_WRITE));
    ((String *)(uintptr_t)m->tokenizer->strings)[id].kind = (uint32_t)kind;
}

// No text of this model ends before it has as many tokens as were asked for.
static inline void never_end(Model *m) {
    m->config.bos = -1;
    for (int id = 0; id < m->config.vocab_size; id++)
        if (kind_of(m, id) == END)
            set_kind(m, id, CONTROL);
}

// Now this token ends a text, too; none if it is negative.
static inline void let_end(Model *m, int token) {
    if (token >= 0)
        set_kind(m, token, END);
}

// A model on the bench, with working memory for max_rows rows.
enum { MOST_LAYERS = 4 };
typedef struct {
    Bytes file;
    Model model;
    Run run;
    float theta[N_SITE_SETS][N_SITES * MOST_LAYERS]; // for each set of sites, see bench_noise
} Bench;

static inline void bench_close(Bench *b) {
    run_free(&b->run);
    model_close(&b->model);
    free(b->file.data);
}

// Takes over the pieces.
static inline void bench_open_with(Bench *b, FileHeader header, Bytes pieces, int max_rows) {
    memset(b, 0, sizeof *b);
    b->file = model_file(header, pieces);
    free(pieces.data);
    cr_assert(model_parse(&b->model, b->file.data, b->file.n), "%s", b->model.error);
    run_init(&b->run, &b->model, max_rows, 1);
}

// Pieces behind the first ones are single characters, from the space on.
static inline void bench_open(Bench *b, FileHeader header, int max_rows) {
    const bool byte_pieces = header.text_flags & BYTE_PIECES;
    const int n_first = byte_pieces ? BEHIND_BYTES : FIRST_BYTE;
    Bytes pieces = first_pieces(byte_pieces);
    for (int id = n_first; id < header.vocab_size; id++) {
        const char character = (char)(' ' + id - n_first);
        append_piece(&pieces, 0, NORMAL, &character, 1);
    }
    bench_open_with(b, header, pieces, max_rows);
}

static const uint64_t SEED = 0x9876543210;

// The dose of a site in a layer of the bench; deeper layers get less, so that mixing them up shows.
// golden.h was made with the first five. A new site gets .3 until it has a number of its own.
static inline float bench_dose(int site, int layer) {
    static const double first_layer[N_GOLDEN_SITES] = {.3, .5, .4, .35, .25};
    const double dose = site < N_GOLDEN_SITES ? first_layer[site] : .3;
    return (float)(dose * (1 - .25 * layer));
}

// Noise at a set of sites. The doses belong to the bench.
static inline Noise bench_noise(Bench *b, int sites, int family) {
    const int n_layers = b->model.config.n_layers;
    float *theta = b->theta[sites];
    cr_assert(n_layers <= MOST_LAYERS && sites <= ALL_SITES);
    for (int site = 0; site < N_SITES; site++)
        for (int layer = 0; layer < n_layers; layer++) {
            const bool dosed = sites >> site & 1;
            theta[site * n_layers + layer] = dosed ? bench_dose(site, layer) : 0;
        }
    return (Noise){SEED, family, theta};
}

// A set of sites in words: "sober", or its letters. Valid until the next call.
static inline const char *site_letters(int sites) {
    static char letters[N_SITES + 1];
    int n = 0;
    for (int site = 0; site < N_SITES; site++)
        if (sites >> site & 1)
            letters[n++] = SITES[site];
    letters[n] = '\0';
    return n ? letters : "sober";
}
