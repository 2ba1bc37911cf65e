/* testing.h - what the tests in C share: drugs.c itself and small made-up models, built in memory.
 *
 * Weights come from a formula, so that no weight files are needed and the reference that golden.h
 * was made with can draw the same ones.
 */
#include <criterion/criterion.h>
#ifndef DRUGS_IS_INCLUDED // by a test that has included another program, and drugs.c with it
#define main drugs_main
#include "../drugs.c"
#undef main
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

// The header as it lies in the file. The layout is stated once more here, so that drugs.c cannot
// change it unnoticed.
typedef struct {
    char magic[8];
    int32_t version, dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, seq_len,
            shared_classifier, sliding_window;
    float rope_theta, norm_eps;
    int32_t bos, eos, tokenizer_flags;
    int64_t tokenizer_bytes;
} FileHeader;

typedef struct { char *data; size_t n; } Bytes;

static void append(Bytes *b, const void *data, size_t n) {
    b->data = resize(b->data, (ptrdiff_t)(b->n + n), 1);
    if (n) memcpy(b->data + b->n, data, n);
    b->n += n;
}

static void append_piece(Bytes *b, float score, int kind, const char *bytes, int length) {
    const uint8_t kind_and_zero[2] = {(uint8_t)kind, 0};
    const uint16_t n = (uint16_t)length;
    append(b, &score, 4);
    append(b, kind_and_zero, 2);
    append(b, &n, 2);
    append(b, bytes, (size_t)length);
}

// Every vocabulary begins with <unk> 0, <s> 1, </s> 2 and, if it has byte pieces, those: 3 to 258.
static Bytes first_pieces(bool byte_pieces) {
    Bytes b = {0};
    append_piece(&b, 0, UNKNOWN, "<unk>", 5);
    append_piece(&b, 0, CONTROL, "<s>", 3);
    append_piece(&b, 0, CONTROL, "</s>", 4);
    for (int i = 0; byte_pieces && i < 256; i++) append_piece(&b, 0, BYTE, &(char){(char)i}, 1);
    return b;
}

// The file of a model: h (tokenizer_bytes is filled in), the pieces, and weights from the formula:
// gains .5 + U, embedding and classifier (U - .5) / 2, matrices (U - .5) * 4 / sqrt(n_in).
static Bytes model_file(FileHeader h, Bytes pieces) {
    const Config c = {.dim = h.dim, .hidden_dim = h.hidden_dim, .vocab_size = h.vocab_size,
                      .q_dim = h.n_heads * h.head_dim, .kv_dim = h.n_kv_heads * h.head_dim};
    const int n_in_layers = h.n_layers * N_LAYER_TENSORS;
    static const char zeros[HEADER_BYTES];
    Bytes b = {0};
    h.tokenizer_bytes = (int64_t)pieces.n;
    append(&b, &h, sizeof h);
    append(&b, zeros, HEADER_BYTES - sizeof h);
    append(&b, pieces.data, pieces.n);
    for (int i = -1; i < n_in_layers + 2 - h.shared_classifier; i++) {
        int which = i < 0 ? TOK_EMB : i < n_in_layers ? i % N_LAYER_TENSORS
                                                      : FINAL_NORM + i - n_in_layers;
        int layer = which < N_LAYER_TENSORS ? i / N_LAYER_TENSORS : 0, rows, cols;
        tensor_shape(&c, which, &rows, &cols);
        size_t n = (size_t)rows * (size_t)cols;
        float *w = resize(NULL, (ptrdiff_t)n, sizeof *w), scale = 4 / sqrtf((float)cols);
        for (size_t j = 0; j < n; j++) {
            float u = unit((uint64_t)(16 * layer + which), j);
            w[j] = rows == 1 ? u + .5f : (u - .5f) * (which >= TOK_EMB ? .5f : scale);
        }
        append(&b, zeros, (ALIGNMENT - b.n % ALIGNMENT) % ALIGNMENT);
        append(&b, w, n * sizeof *w);
        free(w);
    }
    return b;
}

// Three models. G: grouped queries, shared classifier. M: a key head for each query head, a window
// shorter than the text, a classifier of its own, n_heads * head_dim != dim, sizes that are no
// multiples of 8. BIG: in a block of 64 rows every loop that can use threads does.
static const FileHeader
    G = {.magic = "drugs.c", .version = 1, .dim = 64, .hidden_dim = 172, .n_layers = 3,
         .n_heads = 8, .n_kv_heads = 4, .head_dim = 8, .vocab_size = 320, .seq_len = 64,
         .shared_classifier = 1, .rope_theta = 10000, .norm_eps = 1e-5f, .bos = 1, .eos = 2,
         .tokenizer_flags = PREFIX_SPACE | BYTE_PIECES},
    M = {.magic = "drugs.c", .version = 1, .dim = 52, .hidden_dim = 90, .n_layers = 2,
         .n_heads = 3, .n_kv_heads = 3, .head_dim = 10, .vocab_size = 93, .seq_len = 64,
         .sliding_window = 5, .rope_theta = 500, .norm_eps = 1e-3f, .bos = 1, .eos = 2},
    BIG = {.magic = "drugs.c", .version = 1, .dim = 128, .hidden_dim = 640, .n_layers = 2,
           .n_heads = 8, .n_kv_heads = 4, .head_dim = 32, .vocab_size = 300, .seq_len = 64,
           .shared_classifier = 1, .rope_theta = 10000, .norm_eps = 1e-5f, .bos = 1, .eos = 2,
           .tokenizer_flags = BYTE_PIECES};

// A model on the bench, with working memory for max_rows rows.
typedef struct {
    Bytes file;
    Model model;
    Run run;
    float theta[32][N_SITES * 4]; // for each set of dosed sites, see noise_of
} Bench;

static inline void bench_close(Bench *b) {
    run_free(&b->run);
    model_close(&b->model);
    free(b->file.data);
}

// Takes over the pieces.
static inline void bench_open_with(Bench *b, FileHeader h, Bytes pieces, int max_rows) {
    memset(b, 0, sizeof *b);
    b->file = model_file(h, pieces);
    free(pieces.data);
    cr_assert(model_parse(&b->model, b->file.data, b->file.n), "%s", b->model.error);
    run_init(&b->run, &b->model, max_rows, 1);
}

// Pieces behind the first ones are single characters, from the space on.
static inline void bench_open(Bench *b, FileHeader h, int max_rows) {
    bool byte_pieces = h.tokenizer_flags & BYTE_PIECES;
    Bytes pieces = first_pieces(byte_pieces);
    for (int i = byte_pieces ? 259 : 3, c = ' '; i < h.vocab_size; i++, c++)
        append_piece(&pieces, 0, NORMAL, &(char){(char)c}, 1);
    bench_open_with(b, h, pieces, max_rows);
}

enum { ALL_SITES = (1 << N_SITES) - 1 };
static const uint64_t SEED = 0x9876543210;

// Noise at a set of sites (1 << site each); deeper layers get less, so that mixing them up shows.
static inline Noise noise_of(Bench *b, int sites, int family) {
    const double base[N_SITES] = {.3, .5, .4, .35, .25};
    const int n = b->model.config.n_layers;
    for (int i = 0; i < N_SITES * n; i++)
        b->theta[sites][i] = sites >> (i / n) & 1 ? (float)(base[i / n] * (1 - .25 * (i % n))) : 0;
    return (Noise){SEED, family, b->theta[sites]};
}
