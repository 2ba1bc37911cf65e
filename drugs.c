/* drugs.c - run a Llama or Mistral model on DRµGS, Deep Random Micro-Glitch Sampling.
 *
 * A language model is usually made inventive at its very end: it computes a probability for every
 * word and we throw dice. DRµGS does it the other way round. While the network is still thinking,
 * some of its hidden vectors are turned by a small random angle; then we simply take the most
 * probable word. The layers after the glitch may notice it and correct it, which no dice at the
 * end allow. Only activations are touched, and only for the moment: the weights never change.
 *
 * The file reads from top to bottom:
 *
 *   1  the file          one flat file is a whole model; nothing in it is believed
 *   2  the maths         one kernel, RMSNorm, RoPE, softmax
 *   3  the noise         a pure function of (seed, place), and where in the depth it acts
 *   4  the forward pass  over rows: prompts, chats, showers and batches are all the same loop
 *   5  the cold shower   makes a drugged cache sober again
 *   6  the tokenizer     text to tokens and back, as SentencePiece does it
 *   7  talking           generate and chat
 *   8  the laboratory    what a dose does: to one token, to whole texts, to an answer
 *   9  the command line
 *
 * Shapes stand behind declarations as // (n_rows, dim), row-major: the last index runs fastest.
 * A promise the code keeps everywhere: a logit is bitwise the same whether its token came alone or
 * in a block, alone or beside other sequences, on one thread or on many, because every sum has one
 * fixed order. So what differs between two runs is what you changed, never how it was computed.
 */
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <math.h>
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

static const char *program = "drugs";
static const char *unfinished; // a file that is being written, see Output

// Prints one line on stderr and exits: 1 when something failed, 2 when the command line is wrong.
__attribute__((noreturn, format(printf, 2, 3)))
static void die(int status, const char *format, ...) {
    char line[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    for (char *c = line; *c; c++)
        if (*c == '\n' || *c == '\r') *c = ' '; // whatever was quoted
    fflush(stdout); // keep what was said so far in front of the complaint
    if (unfinished) remove(unfinished);
    fprintf(stderr, "%s: %s\n", program, line);
    exit(status);
}

// realloc that does not return without memory; a NULL pointer starts anew.
static void *resize(void *old, ptrdiff_t count, size_t size) {
    size_t most = SIZE_MAX / 2 / size, n = count > 0 ? (size_t)count : 1;
    void *p = n <= most ? realloc(old, n * size) : NULL;
    if (!p) die(1, "out of memory: %zu times %zu bytes were needed", n, size);
    return p;
}

// A file that is being written beside its place and moved there when it is whole, so that a full
// disk or a crash loses nothing.
typedef struct {
    FILE *to;
    const char *path;
    char *beside;
} Output;

static Output output_open(const char *path) {
    Output o = {NULL, path, resize(NULL, (ptrdiff_t)strlen(path) + 5, 1)};
    sprintf(o.beside, "%s.tmp", path);
    o.to = fopen(o.beside, "wb");
    if (!o.to) die(1, "%s cannot be written: %s", path, strerror(errno));
    unfinished = o.beside;
    return o;
}

static void output_close(Output *o) {
    bool failed = ferror(o->to) | fflush(o->to) | fsync(fileno(o->to)), unclosed = fclose(o->to);
    if (failed || unclosed || rename(o->beside, o->path))
        die(1, "%s cannot be written: %s", o->path, strerror(errno));
    unfinished = NULL;
    free(o->beside);
}

// How many bytes a UTF-8 character has that starts with this one; 1 also if none does.
static int character_length(char first) {
    unsigned char c = (unsigned char)first;
    return c < 0xC2 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : c < 0xF5 ? 4 : 1;
}

static bool continues_character(char c) { return ((unsigned char)c & 0xC0) == 0x80; }

// How a table looks: on a terminal (width > 0, cells cut to it), as CSV or as Markdown.
typedef struct { int width; bool markdown; } Style;

// One cell, n bytes long. CSV quotes text and doubles the quotes within, Markdown escapes its bars.
static void print_cell(FILE *out, Style style, const char *text, int n, bool first, bool last) {
    const char *quote = style.width || style.markdown ? "" : "\"";
    if (!style.width) fprintf(out, "%s%s", style.markdown ? "| " : first ? "" : ",", quote);
    int shown = 0; // characters, not bytes
    for (int i = 0; i < n; i++) {
        if (!continues_character(text[i]) && ++shown == style.width) break;
        if (*quote && text[i] == '"') fputc('"', out);
        if (style.markdown && text[i] == '|') fputc('\\', out);
        fputc(text[i], out);
    }
    if (style.width && shown == style.width) shown--;
    if (style.width && !last) fprintf(out, "%*s", style.width - shown, "");
    if (!style.width) fprintf(out, "%s%s", quote, style.markdown ? last ? " |" : " " : "");
    if (last) fputc('\n', out);
}

/* ================================================================================================
 * 1  The file
 *
 * export.py writes it and mmap reads it: the operating system brings in the pages that are used,
 * when they are used, so a model may be larger than memory. Little-endian, in this order:
 *
 *   the header      256 bytes: "drugs.c" and a zero, then Config up to q_dim, the rest zero
 *   the tokenizer   a record for each piece: float score, u8 kind, u8 zero, u16 length, the bytes
 *   the weights     fp32 tensors, each at a multiple of 64 bytes, in the order in which the forward
 *                   pass reads them: embedding, layer after layer, final norm, classifier
 *
 * A file comes from strangers. Every number in it is checked before it is used, with `if` and not
 * with assert, and what is wrong comes back as a sentence.
 */
typedef struct {
    int32_t version;
    int32_t dim;               // length of a hidden vector
    int32_t hidden_dim;        // inner length of the feed-forward block
    int32_t n_layers;
    int32_t n_heads;           // query heads
    int32_t n_kv_heads;        // key and value heads; n_heads / n_kv_heads query heads share one
    int32_t head_dim;
    int32_t vocab_size;
    int32_t seq_len;           // the longest context it was trained for, in tokens
    int32_t shared_classifier; // 1: the embedding serves as the classifier too
    int32_t sliding_window;    // Mistral: a query sees this many keys, itself included; 0: all
    float rope_theta, norm_eps;
    int32_t bos, eos;          // token ids, -1: none
    int32_t tokenizer_flags;   // PREFIX_SPACE | BYTE_PIECES
    int64_t tokenizer_bytes;
    int32_t q_dim, kv_dim;     // not in the file: n_heads * head_dim, n_kv_heads * head_dim
} Config;
enum { HEADER_BYTES = 256, MAGIC_BYTES = 8, CONFIG_BYTES = offsetof(Config, q_dim) };
enum { ALIGNMENT = 64, PREFIX_SPACE = 1, BYTE_PIECES = 2 };

// What a piece of the vocabulary is. Only NORMAL ones take part in merging.
enum { NORMAL, CONTROL, UNKNOWN, BYTE, USER_DEFINED, N_KINDS };
typedef struct {
    const char *bytes;
    int length, kind;
    float score; // merges with a higher score come first
} Piece;

typedef struct {
    Piece *pieces; // (vocab_size)
    int *table;    // (n_slots) hash of the bytes -> id, -1 for an empty slot
    unsigned n_slots;
    int byte_id[256], unknown_id; // -1: none
    int longest_user_defined;     // in bytes, 0 when there are none
    bool prefix_space;            // a space is put before the text
    bool byte_pieces;             // there is a piece for each of the 256 bytes
} Tokenizer;

// The tensors, in the order of the file: nine for each layer, and three that exist once.
enum { ATT_NORM, WQ, WK, WV, WO, FFN_NORM, W1, W3, W2, N_LAYER_TENSORS,
       TOK_EMB = N_LAYER_TENSORS, FINAL_NORM, WCLS };

typedef struct {
    Config config;
    Tokenizer tokenizer;
    const float **tensors; // (n_layers * 9 + 3): see tensor()
    double *rope_freq;     // (head_dim / 2) radians per position
    void *file;
    size_t file_bytes;
    char error[160];
} Model;

// Where the pointer to a tensor is kept. layer is ignored for the three that exist once.
static const float **tensor(const Model *m, int layer, int which) {
    int n = m->config.n_layers;
    return &m->tensors[which < N_LAYER_TENSORS ? layer * N_LAYER_TENSORS + which
                                               : (n - 1) * N_LAYER_TENSORS + which];
}

// The shape of a tensor: n_out rows of n_in floats. A norm gain is one row.
static void tensor_shape(const Config *c, int which, int *n_out, int *n_in) {
    switch (which) {
    case WQ: *n_out = c->q_dim; *n_in = c->dim; break;
    case WK: case WV: *n_out = c->kv_dim; *n_in = c->dim; break;
    case WO: *n_out = c->dim; *n_in = c->q_dim; break;
    case W1: case W3: *n_out = c->hidden_dim; *n_in = c->dim; break;
    case W2: *n_out = c->dim; *n_in = c->hidden_dim; break;
    case TOK_EMB: case WCLS: *n_out = c->vocab_size; *n_in = c->dim; break;
    default: *n_out = 1; *n_in = c->dim; break;
    }
}

// Tensor number i of the file; false if there are no more. layer is 0 for those that exist once.
static bool tensor_at(const Config *c, int i, int *layer, int *which) {
    const int n = c->n_layers * N_LAYER_TENSORS;
    *layer = i > 0 && i <= n ? (i - 1) / N_LAYER_TENSORS : 0;
    *which = i == 0 ? TOK_EMB : i <= n ? (i - 1) % N_LAYER_TENSORS : FINAL_NORM + i - n - 1;
    return i < n + 3 - c->shared_classifier;
}

// Keeps a sentence about what is wrong with the file and returns false, for `return broken(...)`.
__attribute__((format(printf, 2, 3)))
static bool broken(Model *m, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(m->error, sizeof m->error, format, args);
    va_end(args);
    return false;
}

// Reads the header into m->config; n_bytes is the length of the whole file. False: see m->error.
static bool read_header(Model *m, const char *data, size_t n_bytes) {
    Config *c = &m->config;
    if (n_bytes < HEADER_BYTES) return broken(m, "too short for a header, %zu bytes", n_bytes);
    if (memcmp(data, "drugs.c", MAGIC_BYTES))
        return broken(m, "not made by export.py: python3 export.py CHECKPOINT -o FILE");
    memcpy(c, data + MAGIC_BYTES, CONFIG_BYTES);

    // Bounds far above any real model and far below where a product of two could overflow.
    const struct { const char *name; int64_t value, least, most; } fields[] = {
        {"version", c->version, 1, 1},
        {"dim", c->dim, 1, 1 << 20},
        {"hidden_dim", c->hidden_dim, 1, 1 << 20},
        {"n_layers", c->n_layers, 1, 1 << 12},
        {"n_heads", c->n_heads, 1, 1 << 12},
        {"n_kv_heads", c->n_kv_heads, 1, c->n_heads},
        {"n_heads modulo n_kv_heads", c->n_kv_heads > 0 ? c->n_heads % c->n_kv_heads : 0, 0, 0},
        {"head_dim", c->head_dim, 2, 1 << 12},
        {"head_dim modulo 2", c->head_dim % 2, 0, 0}, // RoPE turns pairs
        {"vocab_size", c->vocab_size, 1, 1 << 24},
        {"seq_len", c->seq_len, 1, 1 << 28},
        {"shared_classifier", c->shared_classifier, 0, 1},
        {"sliding_window", c->sliding_window, 0, 1 << 28},
        {"bos", c->bos, -1, (int64_t)c->vocab_size - 1},
        {"eos", c->eos, -1, (int64_t)c->vocab_size - 1},
        {"tokenizer_flags", c->tokenizer_flags, 0, PREFIX_SPACE | BYTE_PIECES},
        // A piece takes 8 bytes at least, so a lie about vocab_size asks for no memory.
        {"tokenizer_bytes", c->tokenizer_bytes, 8 * (int64_t)c->vocab_size,
         (int64_t)n_bytes - HEADER_BYTES},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (fields[i].value < fields[i].least || fields[i].value > fields[i].most)
            return broken(m, "%s is %lld, must be %lld to %lld", fields[i].name,
                          (long long)fields[i].value, (long long)fields[i].least,
                          (long long)fields[i].most);
    if (!(c->rope_theta > 0 && c->rope_theta <= FLT_MAX))
        return broken(m, "rope_theta is %g, must be positive", (double)c->rope_theta);
    if (!(c->norm_eps >= 0 && c->norm_eps < 1))
        return broken(m, "norm_eps is %g, must be 0 to 1", (double)c->norm_eps);
    for (int i = MAGIC_BYTES + CONFIG_BYTES; i < HEADER_BYTES; i++)
        if (data[i]) return broken(m, "header byte %d is not zero", i);
    c->q_dim = c->n_heads * c->head_dim;
    c->kv_dim = c->n_kv_heads * c->head_dim;
    return true;
}

// FNV-1a, a short hash that is good enough for short strings (Fowler, Noll, Vo).
static unsigned hash_bytes(const char *s, int n) {
    unsigned h = 2166136261u;
    for (int i = 0; i < n; i++) h = (h ^ (unsigned char)s[i]) * 16777619u;
    return h;
}

// The slot of the table where these bytes are, or the empty one where they would go.
static unsigned find_slot(const Tokenizer *t, const char *s, int n) {
    unsigned slot = hash_bytes(s, n) & (t->n_slots - 1);
    while (t->table[slot] >= 0) {
        const Piece *p = &t->pieces[t->table[slot]];
        if (p->length == n && !memcmp(p->bytes, s, (size_t)n)) break;
        slot = (slot + 1) & (t->n_slots - 1);
    }
    return slot;
}

// Reads the pieces of [p, end) and fills the hash table. False: see m->error.
static bool read_tokenizer(Model *m, const char *p, const char *end) {
    Tokenizer *t = &m->tokenizer;
    int n_bytes_found = 0, n = m->config.vocab_size;
    t->prefix_space = m->config.tokenizer_flags & PREFIX_SPACE;
    t->byte_pieces = m->config.tokenizer_flags & BYTE_PIECES;
    t->pieces = resize(NULL, n, sizeof *t->pieces);
    for (t->n_slots = 2; t->n_slots < 2 * (unsigned)n; t->n_slots *= 2) {}
    t->table = resize(NULL, t->n_slots, sizeof *t->table);
    memset(t->table, -1, t->n_slots * sizeof *t->table);
    memset(t->byte_id, -1, sizeof t->byte_id);
    t->unknown_id = -1;
    for (int id = 0; id < n; id++) {
        Piece *piece = &t->pieces[id];
        uint16_t length;
        if (end - p < 8) return broken(m, "the tokenizer ends within piece %d of %d", id, n);
        memcpy(&piece->score, p, 4);
        memcpy(&length, p + 6, 2);
        piece->kind = (unsigned char)p[4];
        piece->length = length;
        piece->bytes = p + 8;
        if (piece->kind >= N_KINDS) return broken(m, "piece %d is of kind %d", id, piece->kind);
        if (p[5]) return broken(m, "piece %d has a reserved byte that is not zero", id);
        if (end - p - 8 < length) return broken(m, "piece %d is longer than the tokenizer", id);
        if (!isfinite(piece->score)) return broken(m, "piece %d has a score that is no number", id);
        if (!length && piece->kind != CONTROL) return broken(m, "piece %d is empty", id);
        p += 8 + length;
        if (piece->kind == UNKNOWN) {
            t->unknown_id = id;
        } else if (piece->kind == BYTE) {
            int *to = &t->byte_id[(unsigned char)piece->bytes[0]];
            if (length != 1) return broken(m, "byte piece %d has %d bytes", id, length);
            if (*to >= 0) return broken(m, "pieces %d and %d are the same byte", *to, id);
            *to = id;
            n_bytes_found++;
        } else if (piece->kind != CONTROL) {
            unsigned slot = find_slot(t, piece->bytes, length);
            if (t->table[slot] < 0) t->table[slot] = id;
            if (piece->kind == USER_DEFINED && length > t->longest_user_defined)
                t->longest_user_defined = length;
        }
    }
    if (p != end) return broken(m, "%lld bytes are left over behind the last piece",
                                (long long)(end - p));
    if (t->byte_pieces != (n_bytes_found == 256))
        return broken(m, "tokenizer_flags and the %d byte pieces disagree", n_bytes_found);
    if (!t->byte_pieces && t->unknown_id < 0)
        return broken(m, "the tokenizer has neither byte pieces nor an unknown piece");
    return true;
}

// Finds every tensor and checks that they fill the file exactly. False: see m->error.
static bool find_tensors(Model *m, const char *data, size_t n_bytes) {
    const Config *c = &m->config;
    uint64_t offset = HEADER_BYTES + (uint64_t)c->tokenizer_bytes;
    int layer, which, rows, cols;
    m->tensors = resize(NULL, c->n_layers * N_LAYER_TENSORS + 3, sizeof *m->tensors);
    for (int i = 0; tensor_at(c, i, &layer, &which); i++) {
        tensor_shape(c, which, &rows, &cols);
        offset = (offset + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        if (offset <= n_bytes) // a pointer beyond the file must not even be computed
            *tensor(m, layer, which) = (const float *)(const void *)(data + offset);
        offset += (uint64_t)rows * (uint64_t)cols * sizeof(float);
    }
    if (c->shared_classifier) *tensor(m, 0, WCLS) = *tensor(m, 0, TOK_EMB);
    if (offset == n_bytes) return true;
    return broken(m, "has %zu bytes, the header promises %llu; copy or export it again", n_bytes,
                  (unsigned long long)offset);
}

// Makes a model of the bytes of a file, which stay in use. False: see m->error; close it even so.
static bool model_parse(Model *m, const char *data, size_t n_bytes) {
    const char *pieces = data + HEADER_BYTES;
    memset(m, 0, sizeof *m);
    if (!read_header(m, data, n_bytes)) return false;
    if (!read_tokenizer(m, pieces, pieces + m->config.tokenizer_bytes)) return false;
    if (!find_tensors(m, data, n_bytes)) return false;
    int n_pairs = m->config.head_dim / 2;
    m->rope_freq = resize(NULL, n_pairs, sizeof *m->rope_freq);
    for (int i = 0; i < n_pairs; i++)
        m->rope_freq[i] = pow(m->config.rope_theta, -(double)i / n_pairs);
    return true;
}

// Maps the file at path and parses it. False: m->error says why; close it even so.
static bool model_open(Model *m, const char *path) {
    struct stat info = {0};
    memset(m, 0, sizeof *m);
    int fd = open(path, O_RDONLY);
    if (fd < 0) return broken(m, "cannot be opened; is the path right?");
    bool is_file = !fstat(fd, &info) && S_ISREG(info.st_mode) && info.st_size > 0;
    void *file = MAP_FAILED;
    if (is_file) file = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (!is_file) return broken(m, "is empty or not a regular file");
    if (file == MAP_FAILED) return broken(m, "cannot be mapped into memory");
    bool ok = model_parse(m, file, (size_t)info.st_size);
    m->file = file;
    m->file_bytes = (size_t)info.st_size;
    return ok;
}

static void model_close(Model *m) {
    free(m->tokenizer.pieces);
    free(m->tokenizer.table);
    free(m->tensors);
    free(m->rope_freq);
    if (m->file) munmap(m->file, m->file_bytes);
    memset(m, 0, sizeof *m);
}

/* ================================================================================================
 * 2  The maths
 *
 * Nearly all time goes into dot products of a weight row with an activation row. A processor core
 * multiplies far faster than memory delivers, so the art is to use each number often once it is in
 * a register: a tile of 4 rows by 4 outputs loads 8 vectors and does 16 multiply-adds with them.
 * For a single row there is nothing to reuse, and the speed is that of the memory.
 *
 * `vec` is eight floats. gcc and clang turn it into whatever the machine has (two SSE registers,
 * one AVX register, ...). Eight partial sums on every machine means one order of summation on every
 * machine, and the same order in every tile shape. The bitwise promise rests on that order and on
 * one thing more: a product and a sum must be rounded one after the other wherever they stand. Some
 * compilers fuse them into one instruction (one rounding) in one tile shape and not in another, so
 * build with -ffp-contract=off, as the Makefile does.
 */
enum { LANES = 8, TILE = 4 };
typedef float vec __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)),
                                 may_alias));

// Threads cost some microseconds to wake; below this many multiply-adds one core is faster.
static const ptrdiff_t WORTH_THREADS = 1000000;

// The first n <= LANES floats at p; the others are zero and add nothing to a sum of products.
static inline vec load(const float *p, ptrdiff_t n) {
    vec v = {0};
    if (n >= LANES) return *(const vec *)p;
    for (int i = 0; i < n; i++) v[i] = p[i];
    return v;
}

static inline void store(float *p, vec v, ptrdiff_t n) {
    if (n >= LANES) *(vec *)p = v;
    else for (int i = 0; i < n; i++) p[i] = v[i];
}

// The sum of the lanes, halving them: 8, 4, 2, 1.
static inline float sum_lanes(vec v) {
    typedef float half __attribute__((vector_size(16)));
    typedef float quarter __attribute__((vector_size(8)));
    half h[2];
    quarter q[2];
    memcpy(h, &v, sizeof h);
    h[0] += h[1];
    memcpy(q, &h[0], sizeof q);
    q[0] += q[1];
    return q[0][0] + q[0][1];
}

// y += a x, for vectors that may be as short as 8 floats.
static inline void add_scaled(float *y, float a, const float *x, int n) {
    for (int i = 0; i < n; i += LANES)
        store(y + i, load(y + i, n - i) + a * load(x + i, n - i), n - i);
}

// R x O dot products of length n: out[r][o] = x[r] . w[o]. Strides are in floats, from row to row.
// R and O are constants wherever it is inlined, so that `sum` lives in registers.
__attribute__((always_inline)) static inline void
dot_tile(float *out, ptrdiff_t out_stride, const float *x, ptrdiff_t x_stride, const float *w,
         ptrdiff_t w_stride, int n, const int R, const int O) {
    vec sum[TILE][TILE] = {{{0}}};
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int r = 0; r < R; r++)
            for (int o = 0; o < O; o++)
                sum[r][o] += *(const vec *)(x + r * x_stride + i)
                           * *(const vec *)(w + o * w_stride + i);
    if (i < n)
        for (int r = 0; r < R; r++)
            for (int o = 0; o < O; o++)
                sum[r][o] += load(x + r * x_stride + i, n - i) * load(w + o * w_stride + i, n - i);
    for (int r = 0; r < R; r++)
        for (int o = 0; o < O; o++) out[r * out_stride + o] = sum_lanes(sum[r][o]);
}

// out[o] = x . w[o] for n_out vectors of length n that lie w_stride floats apart.
static void dots(float *out, const float *x, const float *w, ptrdiff_t w_stride, int n, int n_out) {
    int o = 0;
    for (; o + TILE <= n_out; o += TILE)
        dot_tile(out + o, 0, x, 0, w + o * w_stride, w_stride, n, 1, TILE);
    for (; o < n_out; o++) dot_tile(out + o, 0, x, 0, w + o * w_stride, w_stride, n, 1, 1);
}

static float dot(const float *a, const float *b, int n) {
    float sum;
    dots(&sum, a, b, 0, n, 1);
    return sum;
}

// out = x wᵀ. The rows of weights are shared out among the threads, and each is read once.
static void matmul(float *out,       // (n_rows, n_out)
                   const float *x,   // (n_rows, n_in)
                   const float *w,   // (n_out, n_in)
                   ptrdiff_t n_rows, ptrdiff_t n_in, ptrdiff_t n_out) {
#pragma omp parallel for schedule(static) if (n_rows * n_in * n_out > WORTH_THREADS)
    for (ptrdiff_t o = 0; o < n_out; o += TILE) {
        const float *rows = w + o * n_in, *from = x;
        float *to = out + o;
        const int n = (int)n_in, n_left = (int)(n_out - o);
        for (ptrdiff_t r = 0; r < n_rows; r += TILE, from += TILE * n_in, to += TILE * n_out) {
            const ptrdiff_t rows_left = n_rows - r;
            if (n_left < TILE) // the last outputs, if n_out is no multiple of 4
                for (int i = 0; i < TILE && i < rows_left; i++)
                    dots(to + i * n_out, from + i * n_in, rows, n_in, n, n_left);
            else if (rows_left == 1) dot_tile(to, n_out, from, n_in, rows, n_in, n, 1, TILE);
            else if (rows_left == 2) dot_tile(to, n_out, from, n_in, rows, n_in, n, 2, TILE);
            else if (rows_left == 3) dot_tile(to, n_out, from, n_in, rows, n_in, n, 3, TILE);
            else dot_tile(to, n_out, from, n_in, rows, n_in, n, TILE, TILE);
        }
    }
}

// The other way through a matrix: rows are not multiplied with, but weighted and added up.
// out[r] += sum over k of a[r][k] * x[k], R rows and n <= 32 columns of it; a[r][k] stands at
// a[r * a_row + k * a_k]. R and V, the number of vectors in n columns, are constants.
__attribute__((always_inline)) static inline void
sum_tile(float *out, ptrdiff_t out_stride, const float *a, ptrdiff_t a_row, ptrdiff_t a_k,
         const float *x, ptrdiff_t x_stride, ptrdiff_t n, int n_k, const int R, const int V) {
    vec sum[TILE][TILE];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++)
            sum[r][v] = load(out + r * out_stride + v * LANES, n - v * LANES);
    for (int k = 0; k < n_k; k++)
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++)
                sum[r][v] += a[r * a_row + k * a_k]
                           * load(x + k * x_stride + v * LANES, n - v * LANES);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++)
            store(out + r * out_stride + v * LANES, sum[r][v], n - v * LANES);
}

// out (n) += sum over k of a[k] * x[k], of n_k vectors that lie x_stride floats apart.
static void weighted_sum(float *out, const float *a, const float *x, ptrdiff_t x_stride, int n,
                         int n_k) {
    int i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        sum_tile(out + i, 0, a, 0, 1, x + i, x_stride, 2 * LANES, n_k, 1, 2);
    for (; i < n; i += LANES) sum_tile(out + i, 0, a, 0, 1, x + i, x_stride, n - i, n_k, 1, 1);
}

// RMSNorm (Zhang and Sennrich 2019): y = gain * x / sqrt(mean(x²) + eps). It forgets the length of
// a vector and keeps its direction: everything a layer reads is a direction.
static void rmsnorm(float *y, const float *x, const float *gain, int n, float eps) {
    float scale = 1.0f / sqrtf(dot(x, x, n) / (float)n + eps);
    for (int i = 0; i < n; i++) y[i] = gain[i] * (x[i] * scale);
}

// RoPE (Su et al. 2021): tells a query or a key where it stands by turning each pair of its numbers
// like the hand of a clock; pair i moves rope_freq[i] radians a position, the first ones fast, the
// last ones hardly. The dot product of a query and a key then depends on the angle between their
// hands, that is on the distance of the two tokens and not on where in the text they stand.
static void rope(float *x, const float *cos_sin, int n) { // (n), (n): cosine and sine of each pair
    for (int i = 0; i < n; i += 2) {
        float a = x[i], b = x[i + 1], c = cos_sin[i], s = cos_sin[i + 1];
        x[i] = a * c - b * s;
        x[i + 1] = a * s + b * c;
    }
}

// exp of eight numbers, to within 2 units of the last digit, whatever the libm. x = n ln 2 + r with
// a whole n, so exp(x) = 2^n exp(r), and |r| < .35 makes the series short. Beyond 88 it overflows.
static inline vec exp_lanes(vec x) {
    typedef uint32_t bits __attribute__((vector_size(sizeof(vec)), may_alias));
    const float round = 0x1.8p23f; // a float this large has no digits behind the point
    const bits tiny = (bits)(x < -87.0f), huge = (bits)(x > 88.0f); // masks, all ones where true
    x = (vec)(((bits)x & ~huge) | ((bits)((vec){0} + 88.0f) & huge));
    const vec shifted = x * 1.44269504f + round, n = shifted - round; // times 1 / ln 2, rounded
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f; // ln 2 in two parts: all digits
    vec e = 1.0f / 5040 * r + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 1.0f / 2;
    e = e * r + 1;
    e = e * r + 1;
    return (vec)(((bits)e + ((bits)shifted << 23)) & ~tiny); // n is in the low digits of shifted
}

// x = exp(x * scale) / sum. The largest is taken off first, or exp would overflow. Returns the log
// of that sum, as if nothing had been taken off.
static double softmax(float *x, int n, float scale) {
    float max = x[0];
    vec sum = {0};
    for (int i = 1; i < n; i++) max = x[i] > max ? x[i] : max;
    for (int i = 0; i < n; i += LANES) {
        const vec e = exp_lanes((load(x + i, n - i) - max) * scale);
        store(x + i, e, n - i);
        sum += load(x + i, n - i); // what lies behind the end counts as zero
    }
    const float total = sum_lanes(sum);
    for (int i = 0; i < n; i++) x[i] /= total;
    return log(total) + max * (double)scale;
}

// SwiGLU (Shazeer 2020): h = silu(gate) * up, where silu(z) = z / (1 + exp(-z)) runs from nearly 0
// to nearly z and decides how much of up gets through.
static void swiglu(float *h, const float *gate, const float *up, ptrdiff_t n) {
#pragma omp parallel for schedule(static) if (n * 16 > WORTH_THREADS)
    for (ptrdiff_t i = 0; i < n; i += LANES) {
        const vec z = load(gate + i, n - i);
        store(h + i, z / (1.0f + exp_lanes(-z)) * load(up + i, n - i), n - i);
    }
}

/* ================================================================================================
 * 3  The noise
 *
 * A glitch turns a vector x by an angle a, towards a random direction u:
 *
 *     o = u - (u.x / x.x) x              the part of u that is perpendicular to x
 *     r = x cos a + |x| (o / |o|) sin a  so |r| = |x|, and the angle between x and r is a
 *
 * with a = theta * U[0, 1), so half of theta on average. Five sites can be dosed:
 *
 *     H  the attention's input, after the norm and before wq, wk, wv (so it enters the cache)
 *     Q  the query of each head, before RoPE
 *     K  a key while a query head reads it: every reader sees another glitch, the cache stays clean
 *     V  a value while a query head reads it, likewise
 *     A  the attention's output of each head, before wo
 *
 * No random generator runs along. Each glitch is a pure function of (seed, place), where a place is
 * site, layer, head, query position and, for K and V, key position. So a drugged run can be
 * repeated to the last bit, in any order, and whoever needs a glitch again draws it again.
 *
 *     key = seed;  for v in site, layer, head, query position (, key position):
 *         key = mix64(key + (v + 1) * 0x9E3779B97F4A7C15)
 *     U(j) = hash(key, j) / 2^24;  a = theta * U(0);  u[i] = U(i + 1) - 1/2
 *
 * The original (EGjoni/DRUGS) draws u from [0, 1) without the 1/2. Then every u leans the same way:
 * the vector of all ones has a cosine of sqrt(3)/2 = .866 with each of them, and two of them have
 * .75 with each other, so three quarters of "random" is one fixed push. FAMILY_UPSTREAM does that.
 */
enum { SITE_H, SITE_Q, SITE_K, SITE_V, SITE_A, N_SITES, SITE_SAMPLE = N_SITES };
enum { FAMILY_CENTRED, FAMILY_UPSTREAM };

// The first tokens are where attention rests when it has nothing to look for, a sink (Xiao et al.
// 2023). Models break when it moves, so positions 0 to 5 are never turned, as query or as key.
enum { SINK = 6 };

typedef struct {
    uint64_t seed;
    int family;
    const float *theta; // (N_SITES, n_layers) radians, NULL for a sober sequence
} Noise;

// splitmix64's finaliser (Steele, Lea, Flood 2014): every bit of z moves every bit of the result.
static uint64_t mix64(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// Descends from a place to a smaller one within it.
static uint64_t within(uint64_t key, int v) {
    return mix64(key + ((uint64_t)v + 1) * 0x9E3779B97F4A7C15u);
}

// The j-th draw at a place, uniform in [0, 1) with 24 bits, exact in a float. 32-bit arithmetic and
// no state, so that the compiler can draw eight at once. Multipliers: Wellons, hash-prospector.
static inline float uniform(uint64_t key, uint32_t j) {
    uint32_t x = (uint32_t)key + j * 0x9E3779B9u;
    x = (x ^ (x >> 16)) * 0x21F0AAADu;
    x = (x ^ (x >> 15) ^ (uint32_t)(key >> 32)) * 0xD35A2D97u;
    return (float)(int32_t)((x ^ (x >> 15)) >> 8) * 0x1p-24f;
}

// A turned vector needs not be written down: it is r = x * mix.x + u * mix.u.
typedef struct { float x, u; } Mix;

// Turning x (n) by angle towards u (n). A zero vector has no direction and stays what it is.
static Mix rotation(const float *x, const float *u, int n, float angle) {
    double xx = dot(x, x, n), ux = dot(u, x, n), uu = dot(u, u, n);
    double oo = uu - ux * ux / xx; // |o|²
    if (!(xx > 0 && oo > 0)) return (Mix){1, 0};
    double to_u = sin(angle) * sqrt(xx / oo);
    return (Mix){(float)(cos(angle) - to_u * ux / xx), (float)to_u};
}

// Draws the glitch of one place: u (n) is filled, the return value says how to apply it to x (n).
static Mix glitch(const Noise *z, uint64_t key, float theta, const float *x, int n, float *u) {
    float centre = z->family == FAMILY_CENTRED ? 0.5f : 0.0f;
    for (int i = 0; i < n; i++) u[i] = uniform(key, (uint32_t)i + 1) - centre;
    return rotation(x, u, n, theta * uniform(key, 0));
}

// ---- doses: how theta is spread over the depth

// A curve through points (depth, ratio), depth running from 0 at the first layer towards 1.
enum { MODE_CEIL, MODE_FLOOR, MODE_INTERPOLATE, MAX_POINTS = 16 };
typedef struct { float depth, ratio; } Point; // in float .4 - .1 is .3, in double it is not
typedef struct {
    double theta; // radians
    int mode, n_points;
    Point points[MAX_POINTS]; // sorted by depth; none: every layer gets theta
} Dose;

// For qsort.
static int by_depth(const void *a, const void *b) {
    float x = ((const Point *)a)->depth, y = ((const Point *)b)->depth;
    return (x > y) - (x < y);
}

// The angle, in radians, that a layer at this depth gets. Outside the points the nearest one is
// meant; between two of them `ceil` takes the larger ratio, `floor` the smaller, `interpolate` the
// line from one to the other.
static double dose_at(const Dose *d, float depth) {
    const Point *p = d->points, *last = p + d->n_points - 1;
    if (!d->n_points) return d->theta;
    if (depth < p->depth) return d->theta * p->ratio;
    if (depth > last->depth || p == last) return d->theta * last->ratio;
    while (depth > p[1].depth) p++;
    double low = fmin(p[0].ratio, p[1].ratio), high = fmax(p[0].ratio, p[1].ratio);
    if (d->mode == MODE_CEIL || p[0].depth == p[1].depth) return d->theta * high;
    if (d->mode == MODE_FLOOR) return d->theta * low;
    double t = (depth - p[0].depth) / (p[1].depth - p[0].depth);
    return d->theta * (p[0].ratio + t * (p[1].ratio - p[0].ratio));
}

// theta (N_SITES, n_layers) of five doses: layer l is at depth l / n_layers.
static void dose_layers(float *theta, const Dose *doses, int n_layers) {
    for (int site = 0; site < N_SITES; site++)
        for (int l = 0; l < n_layers; l++)
            theta[site * n_layers + l] = (float)dose_at(&doses[site], (float)l / (float)n_layers);
}

/* ================================================================================================
 * 4  The forward pass
 *
 * It works on rows. A row is one token at one position of one sequence. A prompt is many rows of
 * one sequence, the next word is one row, eight completions side by side are eight rows of eight
 * sequences. Weights are read once for all rows of a call, and reading weights is what takes time.
 */

// A text in the making, with all that the model remembers of it: the keys and values of each layer.
typedef struct {
    float **k, **v;  // (n_layers) pointers to (capacity, kv_dim)
    int *tokens;     // (capacity)
    int length, capacity;
    int first_dirty; // from here on keys and values may have seen noise; CLEAN when none has
    int n_drugged;   // tokens computed under noise since the last shower
    Noise noise;
} Sequence;
enum { CLEAN = INT_MAX };

typedef struct {
    int token, position;
    Sequence *sequence;
    bool drugged;      // apply the sequence's noise to this row?
    bool wants_logits;
    float *logits;     // (vocab_size) out, valid until the next forward; NULL if not wanted
} Row;

// What one layer computes, a row of each for each row of the call.
typedef struct {
    float *x;     // (n_rows, dim) the residual stream as it enters the layer
    float *xn;    // (n_rows, dim) normed, and turned at site H
    float *q;     // (n_rows, q_dim) before noise and RoPE
    float *k, *v; // (n_rows, kv_dim) on their way into the caches
    float *att;   // (n_rows, q_dim) attention's output, turned at site A
    float *xm;    // (n_rows, dim) the residual stream between the layer's two halves
    float *fn;    // (n_rows, dim) normed again
    float *gate, *up, *h; // (n_rows, hidden_dim) w1 fn, w3 fn, and silu(gate) * up
} Slot;

// Working memory of forward. One slot serves all layers in turn; n_layers + 1 of them keep all that
// was computed, the last one's x being what leaves the layers.
typedef struct Run {
    int max_rows, n_slots;
    const Row *rows; // of the present call
    // If set, called behind each door to the weights (see embed) with what went in and came out.
    void (*behind_door)(const struct Run *run, int layer, int which, const float *x, float *y,
                        int n_rows);
    Slot *slots;     // (n_slots)
    float *y;        // (max_rows, dim) what a half of a layer adds to the residual stream
    float *cos_sin;  // (max_rows, head_dim) for RoPE
    float *logits;   // (max_rows, vocab_size)
    float *scratch;  // (n_heads, 2 * head_dim + context): a query, a direction u, attention weights
    int context;     // longest context that scratch has room for
    float *memory;   // what the buffers are cut out of
} Run;

// Makes room for length tokens in all caches of a sequence. Nothing is made larger than needed.
static void sequence_reserve(const Model *m, Sequence *s, int length) {
    const Config *c = &m->config;
    if (length <= s->capacity) return;
    for (int l = 0; l < c->n_layers; l++) {
        if (!s->k) s->k = calloc((size_t)c->n_layers, sizeof *s->k);
        if (!s->v) s->v = calloc((size_t)c->n_layers, sizeof *s->v);
        if (!s->k || !s->v) die(1, "out of memory");
        s->k[l] = resize(s->k[l], (ptrdiff_t)length * c->kv_dim, sizeof(float));
        s->v[l] = resize(s->v[l], (ptrdiff_t)length * c->kv_dim, sizeof(float));
    }
    s->tokens = resize(s->tokens, length, sizeof *s->tokens);
    s->capacity = length;
}

static Sequence sequence_new(Noise noise) {
    return (Sequence){.first_dirty = CLEAN, .noise = noise};
}

static void sequence_free(const Model *m, Sequence *s) {
    for (int l = 0; s->k && l < m->config.n_layers; l++) {
        free(s->k[l]);
        free(s->v[l]);
    }
    free(s->k);
    free(s->v);
    free(s->tokens);
    *s = (Sequence){0};
}

static void run_init(Run *run, const Model *m, int max_rows, int n_slots) {
    const Config *c = &m->config;
    *run = (Run){.max_rows = max_rows, .n_slots = n_slots};
    run->slots = resize(NULL, n_slots, sizeof *run->slots);
    ptrdiff_t per_row = 5 * (ptrdiff_t)c->dim + 2 * c->q_dim + 2 * c->kv_dim + 3 * c->hidden_dim;
    per_row = per_row * n_slots + c->dim + c->head_dim + c->vocab_size;
    float *next = run->memory = resize(NULL, per_row * max_rows, sizeof(float));
    for (int i = 0; i <= n_slots; i++) { // each slot, and at last what exists once
        Slot *s = &run->slots[i % n_slots];
        const struct { float **buffer; int width; } parts[] = {
            {&s->x, c->dim}, {&s->xn, c->dim}, {&s->q, c->q_dim}, {&s->k, c->kv_dim},
            {&s->v, c->kv_dim}, {&s->att, c->q_dim}, {&s->xm, c->dim}, {&s->fn, c->dim},
            {&s->gate, c->hidden_dim}, {&s->up, c->hidden_dim}, {&s->h, c->hidden_dim},
            {&run->y, c->dim}, {&run->cos_sin, c->head_dim}, {&run->logits, c->vocab_size},
        };
        for (int p = i < n_slots ? 0 : 11; p < (i < n_slots ? 11 : 14); p++) {
            *parts[p].buffer = next;
            next += max_rows * (ptrdiff_t)parts[p].width;
        }
    }
}

static void run_free(Run *run) {
    free(run->slots);
    free(run->scratch);
    free(run->memory);
    *run = (Run){0};
}

// The angle that a row gets at a site of a layer, 0 for none.
static float dose_of(const Model *m, const Row *row, int site, int layer) {
    const float *theta = row->sequence->noise.theta;
    if (!row->drugged || !theta || row->position < SINK) return 0;
    return theta[site * m->config.n_layers + layer];
}

// The place of a row's glitch.
static uint64_t place_of(const Row *row, int site, int layer, int head) {
    return within(within(within(within(row->sequence->noise.seed, site), layer), head),
                  row->position);
}

// Turns x (n) where it stands. u (n) is scratch. For the sites H, Q and A.
static void turn(const Model *m, const Row *row, int site, int layer, int head, float *x, int n,
                 float *u) {
    float theta = dose_of(m, row, site, layer);
    if (!(theta > 0)) return;
    Mix mix = glitch(&row->sequence->noise, place_of(row, site, layer, head), theta, x, n, u);
    for (int i = 0; i < n; i++) x[i] = x[i] * mix.x + u[i] * mix.u;
}

// The oldest key that a query at this position sees: 0, or where its window begins.
static int first_key(const Config *c, int position) {
    return c->sliding_window && position >= c->sliding_window ? position - c->sliding_window + 1 : 0;
}

// How many of the n_keys keys from position `first` on a dose of theta leaves alone: those in the
// sink, or all of them.
static int untouched_keys(float theta, int first, int n_keys) {
    const int in_sink = first < SINK ? SINK - first : 0;
    return theta > 0 && in_sink < n_keys ? in_sink : n_keys;
}

// One head of one row: how much does the query like each key, and what do the liked values say? The
// turned query and the attention weights stay in scratch: q (head_dim), u (head_dim), weights.
static void attend(const Model *m, const Row *row, const float *cos_sin, int layer, int head,
                   const float *query,  // (head_dim) before noise and RoPE
                   float *out,          // (head_dim)
                   float *scratch) {    // (2 * head_dim + context)
    const Config *c = &m->config;
    const Noise *noise = &row->sequence->noise;
    const int n = c->head_dim, position = row->position;
    const int first = first_key(c, position), n_keys = position - first + 1;
    const int kv_head = head / (c->n_heads / c->n_kv_heads);
    const ptrdiff_t stride = c->kv_dim, start = first * stride + kv_head * n;
    const float *keys = row->sequence->k[layer] + start;   // (n_keys, head_dim), stride apart
    const float *values = row->sequence->v[layer] + start; // likewise
    float *q = scratch, *u = q + n, *weight = u + n;       // (n), (n), (n_keys)

    memcpy(q, query, (size_t)n * sizeof *q);
    turn(m, row, SITE_Q, layer, head, q, n, u);
    rope(q, cos_sin, n);

    // weight[t] = q . key[t]. A turned key is k * mix.x + u * mix.u, and so is its dot product.
    dots(weight, q, keys, stride, n, n_keys);
    float theta = dose_of(m, row, SITE_K, layer);
    uint64_t place = place_of(row, SITE_K, layer, head);
    for (int t = untouched_keys(theta, first, n_keys); t < n_keys; t++) {
        Mix mix = glitch(noise, within(place, first + t), theta, keys + t * stride, n, u);
        weight[t] = weight[t] * mix.x + dot(q, u, n) * mix.u;
    }
    softmax(weight, n_keys, 1.0f / sqrtf((float)n));

    // out = sum of weight[t] * value[t]
    memset(out, 0, (size_t)n * sizeof *out);
    theta = dose_of(m, row, SITE_V, layer);
    place = place_of(row, SITE_V, layer, head);
    const int n_sober = untouched_keys(theta, first, n_keys);
    weighted_sum(out, weight, values, stride, n, n_sober);
    for (int t = n_sober; t < n_keys; t++) {
        const float *value = values + t * stride;
        Mix mix = glitch(noise, within(place, first + t), theta, value, n, u);
        add_scaled(out, weight[t] * mix.x, value, n);
        add_scaled(out, weight[t] * mix.u, u, n);
    }
}

// The four doors to the weights; nothing else in the forward pass reads them. Behind each of them a
// program that includes this file may add something of its own.
static void passed(const Run *run, int layer, int which, const float *x, float *y, int n_rows) {
    if (run->behind_door) run->behind_door(run, layer, which, x, y, n_rows);
}

static void embed(const Model *m, const Run *run, float *x, int n_rows) {
    const ptrdiff_t n = m->config.dim;
    for (ptrdiff_t r = 0; r < n_rows; r++)
        memcpy(x + r * n, *tensor(m, 0, TOK_EMB) + run->rows[r].token * n, (size_t)n * sizeof *x);
    passed(run, 0, TOK_EMB, NULL, x, n_rows);
}

static void norm(const Model *m, const Run *run, float *y, const float *x, int layer, int which,
                 int n_rows) {
    const int n = m->config.dim;
    for (ptrdiff_t r = 0; r < n_rows; r++)
        rmsnorm(y + r * n, x + r * n, *tensor(m, layer, which), n, m->config.norm_eps);
    passed(run, layer, which, x, y, n_rows);
}

static void linear(const Model *m, const Run *run, float *y, const float *x, int layer, int which,
                   int n_rows) { // the classifier is one of these
    int n_out, n_in;
    tensor_shape(&m->config, which, &n_out, &n_in);
    matmul(y, x, *tensor(m, layer, which), n_rows, n_in, n_out);
    passed(run, layer, which, x, y, n_rows);
}

// Before the layers: room in the caches, the sequences' length, tokens and dirt, RoPE's angles.
static void enter_rows(const Model *m, Run *run, Row *rows, int n_rows) {
    const Config *c = &m->config;
    int longest = 0;
    run->rows = rows;
    for (ptrdiff_t r = 0; r < n_rows; r++) {
        Sequence *s = rows[r].sequence;
        int position = rows[r].position, needed = position + 1;
        sequence_reserve(m, s, needed);
        if (needed > longest) longest = needed;
        if (needed > s->length) s->length = needed;
        s->tokens[position] = rows[r].token;
        if (rows[r].drugged && s->noise.theta) {
            s->n_drugged++;
            if (position >= SINK && position < s->first_dirty) s->first_dirty = position;
        }
        float *cos_sin = run->cos_sin + r * c->head_dim;
        for (int i = 0; i < c->head_dim / 2; i++) { // 4000 radians leave a float three digits
            double angle = position * m->rope_freq[i];
            cos_sin[2 * i] = (float)cos(angle);
            cos_sin[2 * i + 1] = (float)sin(angle);
        }
    }
    if (longest > run->context) { // half as much again, so that growing by one stays cheap
        run->context = longest + longest / 2;
        ptrdiff_t per_head = 2 * c->head_dim + (ptrdiff_t)run->context;
        run->scratch = resize(run->scratch, c->n_heads * per_head, sizeof(float));
    }
}

// One layer, from the x of its slot to the x of the next one.
static void layer_forward(const Model *m, Run *run, int l, int n_rows) {
    const Config *c = &m->config;
    const Row *rows = run->rows;
    const ptrdiff_t n = n_rows, dim = c->dim, kv_dim = c->kv_dim, head_dim = c->head_dim;
    const Slot *s = &run->slots[l % run->n_slots], *next = &run->slots[(l + 1) % run->n_slots];

    // xn = rmsnorm(x), turned at H; its three readers are the query, the key and the value
    norm(m, run, s->xn, s->x, l, ATT_NORM, n_rows);
    for (ptrdiff_t r = 0; r < n; r++)
        turn(m, &rows[r], SITE_H, l, 0, s->xn + r * dim, c->dim, run->y);
    linear(m, run, s->q, s->xn, l, WQ, n_rows);
    linear(m, run, s->k, s->xn, l, WK, n_rows);
    linear(m, run, s->v, s->xn, l, WV, n_rows);

    // keys get their position and go into the cache, clean of K and V noise
    for (ptrdiff_t r = 0; r < n; r++) {
        const ptrdiff_t at = rows[r].position * kv_dim;
        float *k = s->k + r * kv_dim;
        for (ptrdiff_t h = 0; h < kv_dim; h += head_dim)
            rope(k + h, run->cos_sin + r * head_dim, c->head_dim);
        memcpy(rows[r].sequence->k[l] + at, k, (size_t)kv_dim * sizeof *k);
        memcpy(rows[r].sequence->v[l] + at, s->v + r * kv_dim, (size_t)kv_dim * sizeof *k);
    }

    // att = softmax(q.k / sqrt(head_dim)) v, head by head, turned at A
    const ptrdiff_t per_head = 2 * head_dim + run->context;
#pragma omp parallel for schedule(static) if (n * c->q_dim * 64 > WORTH_THREADS)
    for (int h = 0; h < c->n_heads; h++)
        for (ptrdiff_t r = 0; r < n; r++) {
            const ptrdiff_t at = r * c->q_dim + h * head_dim;
            float *scratch = run->scratch + h * per_head;
            attend(m, &rows[r], run->cos_sin + r * head_dim, l, h, s->q + at, s->att + at,
                   scratch);
            turn(m, &rows[r], SITE_A, l, h, s->att + at, c->head_dim, scratch);
        }

    // xm = x + wo att: what attention found is added to the residual stream
    linear(m, run, run->y, s->att, l, WO, n_rows);
    for (ptrdiff_t i = 0; i < n * dim; i++) s->xm[i] = s->x[i] + run->y[i];

    // h = silu(w1 fn) * w3 fn
    norm(m, run, s->fn, s->xm, l, FFN_NORM, n_rows);
    linear(m, run, s->gate, s->fn, l, W1, n_rows);
    linear(m, run, s->up, s->fn, l, W3, n_rows);
    swiglu(s->h, s->gate, s->up, n * c->hidden_dim);

    // x = xm + w2 h enters the next layer
    linear(m, run, run->y, s->h, l, W2, n_rows);
    for (ptrdiff_t i = 0; i < n * dim; i++) next->x[i] = s->xm[i] + run->y[i];
}

// logits = classifier rmsnorm(x), only for the rows that want them, which are moved together first.
static void classify(const Model *m, Run *run, Row *rows, int n_rows) {
    const Config *c = &m->config;
    const Slot *s = &run->slots[c->n_layers % run->n_slots];
    ptrdiff_t n_wanted = 0;
    for (ptrdiff_t r = 0; r < n_rows; r++) {
        rows[r].logits = NULL;
        if (!rows[r].wants_logits) continue;
        rows[r].logits = run->logits + n_wanted * c->vocab_size;
        memmove(s->x + n_wanted++ * c->dim, s->x + r * c->dim, (size_t)c->dim * sizeof(float));
    }
    norm(m, run, s->fn, s->x, 0, FINAL_NORM, (int)n_wanted);
    linear(m, run, run->logits, s->fn, 0, WCLS, (int)n_wanted);
}

// Computes n_rows rows; rows of one sequence stand in the order of their positions, and all that
// they look back on is computed before or with them. Keys, values and wanted logits are the result.
// The caller sees to n_rows <= run->max_rows, positions < seq_len and tokens < vocab_size.
static void forward(const Model *m, Run *run, Row *rows, int n_rows) {
    enter_rows(m, run, rows, n_rows);
    embed(m, run, run->slots[0].x, n_rows);
    for (int l = 0; l < m->config.n_layers; l++) layer_forward(m, run, l, n_rows);
    classify(m, run, rows, n_rows);
}

// Runs tokens (n) of a sequence from position start on, in blocks that fit. The logits of the last
// one come back, or NULL when they are not wanted. Valid until the next forward.
static float *feed(const Model *m, Run *run, Sequence *s, const int *tokens, int n, int start,
                         bool drugged, bool wants_logits) {
    Row *rows = resize(NULL, run->max_rows, sizeof *rows);
    float *logits = NULL;
    for (int done = 0; done < n;) {
        int n_rows = n - done < run->max_rows ? n - done : run->max_rows;
        for (int r = 0; r < n_rows; r++, done++)
            rows[r] = (Row){tokens[done], start + done, s, drugged,
                            wants_logits && done == n - 1, NULL};
        forward(m, run, rows, n_rows);
        logits = rows[n_rows - 1].logits;
    }
    free(rows);
    return logits;
}

/* ================================================================================================
 * 5  The cold shower
 *
 * Of the five sites only H reaches the keys and values of its own layer; the others show in those
 * of the layers above. A sober token that looks back on noisy ones is noisy too. So a shower takes
 * all tokens from the first dirty one on and runs them again, sober, as one block. Then the cache
 * is, to the last bit, that of a model that never was on drugs; what it wrote meanwhile stays.
 */

// Returns the number of tokens that were run again.
static int cold_shower(const Model *m, Run *run, Sequence *s) {
    int first = s->first_dirty, n = first < s->length ? s->length - first : 0;
    if (n) feed(m, run, s, s->tokens + first, n, first, false, false);
    s->first_dirty = CLEAN;
    s->n_drugged = 0;
    return n;
}

/* ================================================================================================
 * 6  The tokenizer
 *
 * SentencePiece BPE. The text becomes a chain of characters; again and again the two neighbours are
 * merged whose union is the piece with the best score (the leftmost of equals), until no union is a
 * piece. A heap hands out the best pair, so n characters take n log n steps. A character that is no
 * piece becomes its bytes, or <unk> if the vocabulary has no byte pieces. A space is written as
 * U+2581 inside SentencePiece; here it is a space, and a U+2581 in the text counts as one.
 */
typedef struct {
    int start, length; // where in the text; length 0 once it is swallowed by its left neighbour
    int previous, next; // neighbours in the chain, -1 at the ends
    bool frozen;       // user-defined: never merged
} Symbol;

typedef struct {
    float score;
    int left, right, length; // symbols, and the length of their union when the pair was found
} Pair;

typedef struct {
    const Tokenizer *t;
    const char *text;
    Symbol *symbols;
    Pair *heap;
    int n_pairs;
} Merger;

static bool better(const Pair *a, const Pair *b) {
    return a->score > b->score || (a->score == b->score && a->left < b->left);
}

// Puts the pair of two neighbours into the heap if their union is a piece.
static void push_pair(Merger *g, int left, int right) {
    if (left < 0 || right < 0) return;
    const Symbol *a = &g->symbols[left], *b = &g->symbols[right];
    if (a->frozen || b->frozen) return;
    int id = g->t->table[find_slot(g->t, g->text + a->start, a->length + b->length)];
    if (id < 0) return;
    Pair pair = {g->t->pieces[id].score, left, right, a->length + b->length};
    int i = g->n_pairs++;
    for (; i > 0 && better(&pair, &g->heap[(i - 1) / 2]); i = (i - 1) / 2)
        g->heap[i] = g->heap[(i - 1) / 2];
    g->heap[i] = pair;
}

// Takes the best pair out of the heap.
static Pair pop_pair(Merger *g) {
    Pair best = g->heap[0], last = g->heap[--g->n_pairs];
    int i = 0;
    for (int child; (child = 2 * i + 1) < g->n_pairs; i = child) {
        if (child + 1 < g->n_pairs && better(&g->heap[child + 1], &g->heap[child])) child++;
        if (!better(&g->heap[child], &last)) break;
        g->heap[i] = g->heap[child];
    }
    g->heap[i] = last;
    return best;
}

// The length of the character at s, of which n bytes are left; 1 for a broken one.
static int whole_character(const char *s, int n) {
    int length = character_length(*s);
    if (length > n) return 1;
    for (int i = 1; i < length; i++)
        if (!continues_character(s[i])) return 1;
    return length;
}

// The longest user-defined piece that the n bytes at s begin with, 0 if none.
static int user_defined_length(const Tokenizer *t, const char *s, int n) {
    for (int length = n < t->longest_user_defined ? n : t->longest_user_defined; length; length--) {
        int id = t->table[find_slot(t, s, length)];
        if (id >= 0 && t->pieces[id].kind == USER_DEFINED) return length;
    }
    return 0;
}

// Text of n_text bytes to tokens, BOS first if the model has one and it is wanted. The caller frees
// what comes back; *n_tokens is its length.
static int *encode(const Model *m, const char *text, size_t n_text, bool bos, int *n_tokens) {
    const Tokenizer *t = &m->tokenizer;
    if (n_text > INT_MAX / 8) die(1, "a text of %zu bytes is too long", n_text);
    int n = 0, n_symbols = 0, n_out = 0;
    char *copy = resize(NULL, (ptrdiff_t)n_text + 1, 1);
    if (t->prefix_space && n_text) copy[n++] = ' ';
    for (size_t i = 0; i < n_text; i++) {
        bool is_space = n_text - i >= 3 && !memcmp(text + i, "\xE2\x96\x81", 3);
        copy[n++] = is_space ? ' ' : text[i];
        if (is_space) i += 2;
    }

    // The heap never holds more than n pairs to begin with and two more for each merge.
    Merger g = {t, copy, resize(NULL, n, sizeof *g.symbols),
                resize(NULL, 3 * (ptrdiff_t)n, sizeof *g.heap), 0};
    for (int i = 0; i < n; n_symbols++) {
        int frozen = user_defined_length(t, copy + i, n - i);
        int length = frozen ? frozen : whole_character(copy + i, n - i);
        g.symbols[n_symbols] = (Symbol){i, length, n_symbols - 1, n_symbols + 1, frozen > 0};
        i += length;
    }
    if (n_symbols) g.symbols[n_symbols - 1].next = -1;
    for (int i = 0; i + 1 < n_symbols; i++) push_pair(&g, i, i + 1);
    while (g.n_pairs) {
        Pair pair = pop_pair(&g);
        Symbol *a = &g.symbols[pair.left], *b = &g.symbols[pair.right];
        if (!a->length || !b->length || a->length + b->length != pair.length) continue; // outdated
        a->length += b->length;
        b->length = 0;
        a->next = b->next;
        if (b->next >= 0) g.symbols[b->next].previous = pair.left;
        push_pair(&g, a->previous, pair.left);
        push_pair(&g, pair.left, a->next);
    }

    int *out = resize(NULL, n + 1, sizeof *out);
    bool was_unknown = false; // a run of unknown characters is one <unk>
    if (bos && m->config.bos >= 0) out[n_out++] = m->config.bos;
    for (int i = n_symbols ? 0 : -1; i >= 0; i = g.symbols[i].next) {
        const char *s = copy + g.symbols[i].start;
        int id = t->table[find_slot(t, s, g.symbols[i].length)];
        bool unknown = id < 0 && !t->byte_pieces;
        if (id >= 0) out[n_out++] = id;
        else if (unknown && !was_unknown) out[n_out++] = t->unknown_id;
        for (int b = 0; id < 0 && !unknown && b < g.symbols[i].length; b++)
            out[n_out++] = t->byte_id[(unsigned char)s[b]];
        was_unknown = unknown;
    }
    free(copy);
    free(g.symbols);
    free(g.heap);
    *n_tokens = n_out;
    return out;
}

// Tokens on their way to a stream: characters may be split over tokens and are printed whole.
typedef struct {
    FILE *to;
    char waiting[4]; // the first bytes of a character that is not complete
    int n_waiting;
    bool at_start;   // the space that encoding put in front is still to be left out
} Printer;

// Prints what is waiting, as it is.
static void print_rest(Printer *p) {
    fwrite(p->waiting, 1, (size_t)p->n_waiting, p->to);
    p->n_waiting = 0;
}

static void print_token(Printer *p, const Tokenizer *t, int token) {
    const Piece *piece = &t->pieces[token];
    const char *s = piece->kind == UNKNOWN ? " \xE2\x81\x87 " : piece->bytes; // as SentencePiece
    int n = piece->kind == UNKNOWN ? 5 : piece->kind == CONTROL ? 0 : piece->length;
    if (n && p->at_start && t->prefix_space && *s == ' ') s++, n--;
    if (piece->kind != CONTROL) p->at_start = false;
    for (int i = 0; i < n; i++) {
        if (p->n_waiting && !continues_character(s[i])) print_rest(p);
        p->waiting[p->n_waiting++] = s[i];
        if (p->n_waiting == character_length(p->waiting[0])) print_rest(p);
    }
    fflush(p->to);
}

// The text of n tokens. The caller frees it.
static char *text_of(const Tokenizer *t, const int *tokens, int n) {
    char *text;
    size_t size;
    Printer p = {.to = open_memstream(&text, &size), .at_start = true};
    if (!p.to) die(1, "out of memory");
    for (int i = 0; i < n; i++) print_token(&p, t, tokens[i]);
    print_rest(&p);
    fclose(p.to);
    return text;
}

/* ================================================================================================
 * 7  Talking
 */

// The usual way, for comparison: chance at the very end.
typedef struct {
    double temperature; // 0: take the most probable token
    double top_p;       // among the most probable tokens that together have this probability
    double logit_noise; // standard deviation of normal noise on the logits, before all that
} Dice;

enum { GENERATE, CHAT, TRIP, EXPLORE, PROBE, N_MODES };
typedef struct {
    const char *prompt, *system;
    int n_new;          // tokens to write, 0: until the text ends or the context is full
    int shower_every;   // drugged tokens, 0: never
    Dice dice;
    bool drugged_prompt;
    int mode;           // GENERATE, ...
    int k;              // seeds, twins: how often an experiment is repeated
    double max_theta;   // of a trip, radians
    const char *out;    // where an experiment's numbers go, NULL: nowhere
    Noise noise;
    Dose doses[N_SITES];
} Options;

typedef struct {
    const Model *model;
    Run run;
    Sequence sequence;
    const Options *options;
    Printer printer;
    int n_prompt, n_new, n_showers; // tokens read, tokens written, showers taken
    double prompt_seconds, new_seconds;
    const char *stopped_at;
} Talk;

static double now(void) { // seconds
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int argmax(const float *x, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

typedef struct { float p; int token; } Candidate;
static int by_probability(const void *a, const void *b) { // for qsort, largest first
    const Candidate *x = a, *y = b;
    return x->p != y->p ? (x->p < y->p) - (x->p > y->p) : x->token - y->token;
}

// Draws from softmax(logits / temperature) among the fewest tokens that together have a probability
// of top_p. u is uniform in [0, 1).
static int sample(const float *logits, int n, double temperature, double top_p, double u) {
    Candidate *c = resize(NULL, n, sizeof *c);
    float max = logits[argmax(logits, n)];
    double total = 0, kept = 0, sum = 0;
    for (int i = 0; i < n; i++) {
        c[i] = (Candidate){(float)exp((logits[i] - max) / temperature), i};
        total += c[i].p;
    }
    qsort(c, (size_t)n, sizeof *c, by_probability);
    int n_kept = 0, i = 0;
    while (n_kept < n && (n_kept == 0 || kept < top_p * total)) kept += c[n_kept++].p;
    while (i < n_kept - 1 && (sum += c[i].p) <= u * kept) i++;
    int token = c[i].token;
    free(c);
    return token;
}

// The token that follows at a position. logits (n) are changed if there is to be noise on them.
static int choose(float *logits, int n, const Dice *dice, uint64_t seed, int position) {
    const uint64_t key = within(within(seed, SITE_SAMPLE), position);
    for (int i = 0; dice->logit_noise > 0 && i < n; i++) { // Box-Muller: two uniforms, one normal
        double u = 1 - uniform(key, 2 * (uint32_t)i + 1), v = uniform(key, 2 * (uint32_t)i + 2);
        logits[i] += (float)(dice->logit_noise * sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
    }
    if (!(dice->temperature > 0)) return argmax(logits, n);
    return sample(logits, n, dice->temperature, dice->top_p, uniform(key, 0));
}

// -log softmax(z)[token], in nats: how surprising the token is. z (n) are logits.
static double surprise(const float *z, int n, int token) {
    const double max = z[argmax(z, n)];
    double sum = 0;
    for (int i = 0; i < n; i++) sum += exp(z[i] - max);
    return log(sum) + max - z[token];
}

// One of several texts that are written side by side.
typedef struct {
    Sequence *sequence; // the prompt is in its cache
    Dice dice;
    int next;           // the token that comes now
    int *tokens;        // (n_tokens) what was written; the caller makes room for n_new
    int n_tokens;
    float *hidden;      // (n_new, dim) what left the layers for each but the last, or NULL
} Text;

// Writes up to n_new tokens of each text, one row of each in every call of forward, so that weights
// are read once for all. A text that comes to its end drops out.
static void write_texts(const Model *m, Run *run, Text *texts, int n, int n_new) {
    const Config *c = &m->config;
    Row *rows = resize(NULL, n, sizeof *rows);
    Text **active = resize(NULL, n, sizeof *active);
    for (int i = 0; i < n; i++) active[i] = &texts[i];
    for (int done = 0; done < n_new; done++) {
        int kept = 0;
        for (int i = 0; i < n; i++) {
            Text *t = active[i];
            if (t->next == c->eos || t->next == c->bos) continue;
            t->tokens[t->n_tokens++] = t->next;
            rows[kept] = (Row){t->next, t->sequence->length, t->sequence, true, true, NULL};
            active[kept++] = t;
        }
        n = done + 1 < n_new ? kept : 0;
        for (int first = 0; first < n; first += run->max_rows) {
            const int n_rows = n - first < run->max_rows ? n - first : run->max_rows;
            forward(m, run, rows + first, n_rows);
            for (int i = first; i < first + n_rows; i++) {
                Text *t = active[i];
                t->next = choose(rows[i].logits, c->vocab_size, &t->dice, t->sequence->noise.seed,
                                 t->sequence->length);
                if (t->hidden)
                    memcpy(t->hidden + (t->n_tokens - 1) * (ptrdiff_t)c->dim,
                           run->slots[0].x + (ptrdiff_t)(i - first) * c->dim,
                           (size_t)c->dim * sizeof(float));
            }
        }
    }
    free(rows);
    free(active);
}

// Reads tokens (n) and answers with up to n_new tokens, printed as they come. The prompt is read
// sober unless asked otherwise, so its last token's prediction, the first new token, is sober too.
static void reply(Talk *t, const int *tokens, int n) {
    const Options *o = t->options;
    const Config *c = &t->model->config;
    Sequence *s = &t->sequence;
    int room = c->seq_len - s->length - n;
    int most = o->n_new && o->n_new <= room ? o->n_new : room + 1; // the last needs no room
    sequence_reserve(t->model, s, s->length + n + most - 1);

    double start = now();
    float *logits = feed(t->model, &t->run, s, tokens, n, s->length, o->drugged_prompt, true);
    double prompt_done = now();
    t->n_prompt += n;
    for (int i = 1;; i++) {
        int next = choose(logits, c->vocab_size, &o->dice, o->noise.seed, s->length);
        t->stopped_at = next == c->eos ? "the end of the text (EOS)"
                      : next == c->bos ? "the start of another text (BOS)" : NULL;
        if (t->stopped_at) break;
        print_token(&t->printer, &t->model->tokenizer, next);
        t->n_new++;
        t->stopped_at = i == o->n_new ? "-n" : i == most ? "the end of the context" : NULL;
        if (t->stopped_at && (o->mode != CHAT || s->length == c->seq_len)) break;
        if (o->shower_every && s->n_drugged >= o->shower_every)
            t->n_showers += cold_shower(t->model, &t->run, s) > 0;
        logits = feed(t->model, &t->run, s, &next, 1, s->length, true, !t->stopped_at);
        if (t->stopped_at) break; // a chat remembers its last token too
    }
    print_rest(&t->printer);
    fflush(stdout);
    t->prompt_seconds += prompt_done - start;
    t->new_seconds += now() - prompt_done;
}

static void generate(Talk *t) {
    int n;
    int *tokens = encode(t->model, t->options->prompt, strlen(t->options->prompt), true, &n);
    if (!n) die(1, "this model has no BOS token, so it needs a prompt: -i");
    if (n > t->model->config.seq_len)
        die(1, "-i has %d tokens, the model's context only %d", n, t->model->config.seq_len);
    for (int i = 0; i < n; i++) print_token(&t->printer, &t->model->tokenizer, tokens[i]);
    reply(t, tokens, n);
    puts("");
    free(tokens);
}

// A conversation in the form of Llama 2 and Mistral: BOS [INST] question [/INST] answer EOS, and so
// on. The history stays in the cache; the shower is taken while the person types.
static void chat(Talk *t) {
    const Config *c = &t->model->config;
    Sequence *s = &t->sequence;
    const char *system = t->options->system;
    char *line = NULL;
    size_t line_size = 0;
    for (;;) {
        fputs("> ", stderr);
        fflush(stderr);
        if (t->options->shower_every)
            t->n_showers += cold_shower(t->model, &t->run, s) > 0;
        ssize_t n_line = getline(&line, &line_size, stdin);
        if (n_line < 0) { // Ctrl-D
            t->stopped_at = NULL;
            break;
        }
        while (n_line > 0 && (line[n_line - 1] == '\n' || line[n_line - 1] == '\r')) n_line--;
        if (!n_line) continue;

        bool first = !s->length;
        const char *before = first && system ? "[INST] <<SYS>>\n" : "[INST] ";
        const char *middle = first && system ? "\n<</SYS>>\n\n" : "", *after = " [/INST]";
        const char *said = first && system ? system : "";
        size_t n_text = strlen(before) + strlen(said) + strlen(middle), n_said = (size_t)n_line;
        char *text = resize(NULL, (ptrdiff_t)(n_text + n_said + strlen(after) + 1), 1);
        sprintf(text, "%s%s%s", before, said, middle);
        memcpy(text + n_text, line, n_said);
        strcpy(text + n_text + n_said, after);

        int n, n_eos = !first && c->eos >= 0; // the last answer is closed first
        int *tokens = encode(t->model, text, n_text + n_said + strlen(after), true, &n);
        int room = c->seq_len - s->length - n_eos;
        bool full = room < 1;
        if (full) {
            fprintf(stderr, "%s: the context is full, the conversation ends here\n", program);
        } else if (n <= room) {
            if (n_eos)
                feed(t->model, &t->run, s, &c->eos, 1, s->length, false, false);
            t->printer.at_start = true;
            reply(t, tokens, n);
            puts("");
        } else {
            fprintf(stderr, "%s: that is %d tokens, the context has room for %d\n", program, n,
                    room);
        }
        free(text);
        free(tokens);
        if (full) break;
    }
    fputs("\n", stderr);
    free(line);
}

static void talk(const Model *m, const Options *o) {
    Talk t = {.model = m, .options = o, .printer = {.to = stdout, .at_start = true},
              .sequence = sequence_new(o->noise)};
    run_init(&t.run, m, 64, 1);
    if (o->mode == CHAT) chat(&t);
    else generate(&t);
    fflush(stdout);
    fprintf(stderr,
            "read %d tokens at %.0f/s, wrote %d at %.0f/s until %s; seed %llu; %d cold shower%s\n",
            t.n_prompt, t.n_prompt / fmax(t.prompt_seconds, 1e-9), t.n_new,
            t.n_new / fmax(t.new_seconds, 1e-9), t.stopped_at ? t.stopped_at : "Ctrl-D",
            (unsigned long long)o->noise.seed, t.n_showers, t.n_showers == 1 ? "" : "s");
    run_free(&t.run);
    sequence_free(m, &t.sequence);
}

/* ================================================================================================
 * 8  The laboratory
 */

// A prompt that was read once, soberly: what probe and explore begin with.
typedef struct {
    const Model *model;
    Run run;
    const Options *options;
    int *prompt, n_prompt, n_new; // n_new: how many tokens fit and are wanted
    Sequence sequence;            // the prompt's
    float *logits;                // (vocab_size) what comes after it
} Lab;

static void lab_open(Lab *lab, const Model *m, const Options *o, int max_rows) {
    *lab = (Lab){.model = m, .options = o, .sequence = sequence_new((Noise){0})};
    lab->prompt = encode(m, o->prompt, strlen(o->prompt), true, &lab->n_prompt);
    const int room = m->config.seq_len - lab->n_prompt;
    if (!lab->n_prompt || room < 1)
        die(1, "-i has %d tokens, it needs 1 to %d for this model", lab->n_prompt,
            m->config.seq_len - 1);
    lab->n_new = o->n_new && o->n_new < room ? o->n_new : room;
    run_init(&lab->run, m, max_rows, 1);
    const float *z = feed(m, &lab->run, &lab->sequence, lab->prompt, lab->n_prompt, 0, false, true);
    const size_t bytes = (size_t)m->config.vocab_size * sizeof *z;
    lab->logits = memcpy(resize(NULL, (ptrdiff_t)bytes, 1), z, bytes);
}

static void lab_close(Lab *lab) {
    sequence_free(lab->model, &lab->sequence);
    run_free(&lab->run);
    free(lab->prompt);
    free(lab->logits);
}

// A sequence of its own that remembers the prompt, with room for what is written behind it.
static Sequence after_prompt(const Lab *lab, Noise noise) {
    const Config *c = &lab->model->config;
    const size_t bytes = (size_t)lab->n_prompt * (size_t)c->kv_dim * sizeof(float);
    Sequence s = sequence_new(noise);
    sequence_reserve(lab->model, &s, lab->n_prompt + lab->n_new);
    for (int l = 0; l < c->n_layers; l++) {
        memcpy(s.k[l], lab->sequence.k[l], bytes);
        memcpy(s.v[l], lab->sequence.v[l], bytes);
    }
    memcpy(s.tokens, lab->prompt, (size_t)lab->n_prompt * sizeof *s.tokens);
    s.length = lab->n_prompt;
    return s;
}

// The sober model's most probable continuation. tokens (n_new); returns how many there are.
static int sober_continuation(Lab *lab, int *tokens) {
    const Config *c = &lab->model->config;
    Sequence s = after_prompt(lab, (Noise){0});
    Text t = {.sequence = &s, .tokens = tokens, .next = argmax(lab->logits, c->vocab_size)};
    write_texts(lab->model, &lab->run, &t, 1, lab->n_new);
    sequence_free(lab->model, &s);
    return t.n_tokens;
}

// Opens what -o names, before the work, so that none is lost. It must end in .csv or in `other`;
// nobody wants a model overwritten with a table.
static Output lab_output(const Options *o, const char *other) {
    if (!o->out) return (Output){0};
    const char *ending = strrchr(o->out, '.');
    if (!ending || (strcmp(ending, ".csv") && strcmp(ending, other)))
        die(2, "-o takes a file that ends in .csv%s%s here, got '%s'",
            strcmp(other, ".csv") ? " or " : "", strcmp(other, ".csv") ? other : "", o->out);
    return output_open(o->out);
}

static void progress(const char *what, int done, int of) {
    if (!isatty(STDERR_FILENO)) return;
    if (done < of) fprintf(stderr, "\r%s %d of %d", what, done, of);
    else fputs("\r\033[K", stderr);
}

// The token as a word of a table: what it prints, on one line. The caller frees it.
static char *visible(const Model *m, int token) {
    const Piece *p = &m->tokenizer.pieces[token];
    char *text = resize(NULL, 4 * (ptrdiff_t)p->length + 1, 1);
    int n = 0;
    for (int i = 0; i < p->length; i++) {
        const unsigned char c = (unsigned char)p->bytes[i];
        const bool plain = c >= 32 && c != 127 && (p->kind != BYTE || c < 127);
        if (plain) text[n++] = (char)c;
        else n += sprintf(text + n, c == '\n' ? "\\n" : "<%02X>", c);
    }
    text[n] = '\0';
    return text;
}

// ---- trip: how far does a glitch carry?
//
// One pass over a prompt with a few dosed layers, beside its sober twin. At every level (level 0 is
// the embedding, level l + 1 what leaves layer l) the two hidden states of the last token are
// compared by 1 - cosine: 0 when they point the same way, 1 at a right angle, 2 when opposed. Why
// the cosine? Whatever reads the residual stream norms it first: only the direction is left.
//
// A place c is dosed in two ways: a window of three layers centred on c, clipped to the model, and
// the full stack, layers 0 to c. Nothing is protected but the sink. What to look for: a spike
// behind the window; whether the sober layers above then correct the glitch (it fades) or pass it
// on (it grows); and how little room a late window leaves for either.
enum { WINDOW, STACK, N_THETAS = 31, TRIP_ROWS = 512 };

typedef struct {
    int n_layers, n_thetas; // the thetas run from 0 to max_theta in equal steps
    double max_theta;
    float *distance;        // (2 kinds, n_layers places, n_thetas, n_layers + 1 levels)
    int site, n_tokens, k;  // what was measured, and over how many seeds, from noise.seed on
    Noise noise;
} Trip;

// The n_layers + 1 levels of one passage.
static float *trip_levels(const Trip *t, int kind, int place, int i_theta) {
    const ptrdiff_t passage = ((ptrdiff_t)kind * t->n_layers + place) * t->n_thetas + i_theta;
    return t->distance + passage * (t->n_layers + 1);
}

static double trip_theta(const Trip *t, int i) { return t->max_theta * i / (t->n_thetas - 1); }

// 1 - cosine of a and b (n), exactly 0 if they are the same to the last bit.
static double cosine_distance(const float *a, const float *b, int n) {
    double aa = 0, bb = 0, ab = 0;
    for (int i = 0; i < n; i++) {
        aa += (double)a[i] * (double)a[i];
        bb += (double)b[i] * (double)b[i];
        ab += (double)a[i] * (double)b[i];
    }
    if (!isfinite(aa + bb)) die(1, "a hidden state is not finite: this model overflows fp32");
    return memcmp(a, b, (size_t)n * sizeof *a) ? fmax(0, 1 - ab / sqrt(aa * bb)) : 0;
}

// What a measurement works with: thetas side by side, a sequence for each.
typedef struct {
    const Model *m;
    Run run;          // of one slot, whose x all layers read and write
    Row *rows;        // (count, n)
    float *sober;     // (n_layers + 1 levels, n, dim) the twin
    float *chain;     // (count, n, dim) what enters the next layer if all before it are dosed
    int start, count; // thetas number start to start + count - 1
} Tour;

// Takes them through the network, one place dosed. Below the first dosed layer they are sober and
// equal, so they start from the twin's state right there. A stack is the stack before and one
// dosed layer more: it starts where the chain is, and what is below has been measured. No layer
// looks back on the keys and values of another, so those of an earlier passage do no harm.
static void trip_pass(Trip *t, Tour *w, int kind, int place) {
    const int dim = w->m->config.dim, n_rows = w->count * t->n_tokens;
    const int first = kind == STACK ? place : place > 0 ? place - 1 : 0;
    const int last = kind == WINDOW && place < t->n_layers - 1 ? place + 1 : place;
    const ptrdiff_t size = (ptrdiff_t)t->n_tokens * dim; // of a state
    const size_t bytes = (size_t)size * sizeof(float);
    const bool on_chain = kind == STACK && place > 0;
    float *x = w->run.slots[0].x;
    for (int b = 0; b < w->count; b++) {
        float *levels = trip_levels(t, kind, place, w->start + b);
        if (on_chain)
            memcpy(levels, trip_levels(t, kind, place - 1, w->start + b),
                   (size_t)(place + 1) * sizeof *levels);
        memcpy(x + b * size, on_chain ? w->chain + b * size : w->sober + first * size, bytes);
    }
    for (int l = first; l < t->n_layers; l++) {
        for (int r = 0; r < n_rows; r++) w->rows[r].drugged = l <= last;
        layer_forward(w->m, &w->run, l, n_rows);
        if (kind == STACK && l == place) memcpy(w->chain, x, (size_t)w->count * bytes);
        const float *twin = w->sober + (l + 2) * size - dim; // its last token
        for (int b = 0; b < w->count; b++)
            trip_levels(t, kind, place, w->start + b)[l + 1] +=
                (float)(cosine_distance(x + (b + 1) * size - dim, twin, dim) / t->k);
    }
}

// Measures tokens (n) at one site for every kind, place and theta, as the mean over k seeds. The
// caller frees distance. Memory grows with TRIP_ROWS or n, whichever is more.
static Trip trip_measure(const Model *m, const int *tokens, int n, int site, double max_theta,
                         Noise noise, int k) {
    const int n_layers = m->config.n_layers, n_dose = N_SITES * n_layers, fit = TRIP_ROWS / n;
    const int beside = fit < 1 ? 1 : fit < N_THETAS ? fit : N_THETAS;
    const ptrdiff_t size = (ptrdiff_t)n * m->config.dim;
    const ptrdiff_t n_distances = (ptrdiff_t)2 * n_layers * N_THETAS * (n_layers + 1);
    Trip t = {n_layers, N_THETAS, max_theta, NULL, site, n, k, noise};
    t.distance = resize(NULL, n_distances, sizeof(float));
    memset(t.distance, 0, (size_t)n_distances * sizeof(float));

    Tour w = {.m = m, .rows = resize(NULL, (ptrdiff_t)beside * n, sizeof(Row))};
    Sequence *s = resize(NULL, beside, sizeof *s);
    float *memory = resize(NULL, (n_layers + 1 + beside) * size + beside * n_dose, sizeof *memory);
    w.sober = memory;
    w.chain = w.sober + (n_layers + 1) * size;
    float *doses = w.chain + beside * size; // (beside, N_SITES, n_layers)
    run_init(&w.run, m, beside * n, 1);
    for (int b = 0; b < beside; b++) s[b] = sequence_new((Noise){0});
    for (int r = 0; r < beside * n; r++)
        w.rows[r] = (Row){tokens[r % n], r % n, &s[r / n], false, false, NULL};

    enter_rows(m, &w.run, w.rows, n);
    embed(m, &w.run, w.run.slots[0].x, n);
    for (int l = 0; l <= n_layers; l++) {
        memcpy(w.sober + l * size, w.run.slots[0].x, (size_t)size * sizeof(float));
        if (l < n_layers) layer_forward(m, &w.run, l, n);
    }
    for (int i = 0; i < k; i++)
        for (w.start = 0; w.start < N_THETAS; w.start += w.count) {
            w.count = N_THETAS - w.start < beside ? N_THETAS - w.start : beside;
            for (int b = 0; b < w.count; b++) { // in all layers; Row.drugged says in which it acts
                float *dose = doses + (ptrdiff_t)b * n_dose;
                for (int j = 0; j < n_dose; j++)
                    dose[j] = j / n_layers == site ? (float)trip_theta(&t, w.start + b) : 0;
                s[b].noise = (Noise){noise.seed + (uint64_t)i, noise.family, dose};
            }
            enter_rows(m, &w.run, w.rows, w.count * n);
            for (int p = 0; p < 2 * n_layers; p++) {
                progress("theta", i * N_THETAS + w.start, k * N_THETAS);
                trip_pass(&t, &w, p / n_layers, p % n_layers);
            }
        }
    progress("theta", k * N_THETAS, k * N_THETAS);
    for (int b = 0; b < beside; b++) sequence_free(m, &s[b]);
    run_free(&w.run);
    free(w.rows);
    free(s);
    free(memory);
    return t;
}

// The largest of n distances.
static float trip_peak(const float *x, ptrdiff_t n) {
    float peak = 0;
    for (ptrdiff_t i = 0; i < n; i++) peak = x[i] > peak ? x[i] : peak;
    return peak;
}

// n distances in five shades from 0 to the peak, each `width` wide. They follow the square root: as
// 1 - cos a is about a² / 2, twice the shade is twice the angle, and small glitches show as well.
static const char *const SHADES[] = {" ", "░", "▒", "▓", "█"};
static void print_shades(const float *x, int n, int width, float peak) {
    fputs("│", stdout);
    for (int i = 0; i < n * width; i++) {
        const int shade = peak > 0 ? (int)(5 * sqrtf(x[i / width] / peak)) : 0;
        fputs(SHADES[shade < 4 ? shade : 4], stdout);
    }
    fputs("│", stdout);
}

// Maps of both kinds at theta number `shown`, then all doses in the window in the middle.
static void trip_print(const Trip *t, int shown) {
    const int n = t->n_layers, levels = n + 1, fit = 40 / levels, middle = n / 2;
    const int width = fit < 1 ? 1 : fit < 4 ? fit : 4, end = levels * width - 7;
    float peak[2] = {0};
    printf("How far the last of %d tokens strays from its sober twin, 1 - cosine, at every level:\n"
           "0 is the embedding, l + 1 what leaves layer l. -%c %.4g, mean of %d seed%s from %llu.\n"
           "\n%-*sfull stack up to\nlayer  level 0%*d   layer  level 0%*d\n", t->n_tokens,
           "HQKVA"[t->site], trip_theta(t, shown), t->k, t->k == 1 ? "" : "s",
           (unsigned long long)t->noise.seed, end + 17, "window of 3 around", end, n, end, n);
    for (int i = 0; i < 2 * n; i++)
        peak[i / n] = fmaxf(peak[i / n], trip_peak(trip_levels(t, i / n, i % n, shown), levels));
    for (int i = 0; i < 2 * n; i++) {
        printf("%s%5d ", i % 2 ? "  " : "", i / 2);
        print_shades(trip_levels(t, i % 2, i / 2, shown), levels, width, peak[i % 2]);
        if (i % 2) puts("");
    }
    printf("\nshades begin at         ░         ▒         ▓         █   largest\n");
    for (int kind = 0; kind < 2; kind++) {
        printf("%-15s", kind == WINDOW ? "window" : "full stack");
        for (int shade = 1; shade <= 5; shade++)
            printf(" %9.3g", shade * shade * (double)peak[kind] / 25);
        puts("");
    }
    printf("\nThe window around layer %d at all doses, each line in shades of its own largest\n"
           "theta  level 0%*d   largest  at level  in the end\n", middle, end, n);
    for (int i = 0; i < t->n_thetas; i += 3) {
        const float *x = trip_levels(t, WINDOW, middle, i), most = trip_peak(x, levels);
        int at = 0;
        while (x[at] < most) at++;
        printf("%5.2f ", trip_theta(t, i));
        print_shades(x, levels, width, most);
        printf("  %8.3g  %8d  %10.3g\n", (double)most, at, (double)x[n]);
    }
}

// What becomes of the next word, theta in the middle window: the ten most probable tokens of the
// sober model, a sign for every 2 %. `|` and `-` are the sober probability, `|` and `+` the mean
// drugged one; so `-` is what a token loses and `+` what it wins.
static void trip_bars(const Model *m, const int *tokens, int n, int site, double theta, Noise noise,
                      int k) {
    const int n_layers = m->config.n_layers, vocab_size = m->config.vocab_size;
    float *doses = resize(NULL, N_SITES * n_layers, sizeof *doses);
    double *drugged = resize(NULL, vocab_size, sizeof *drugged);
    Candidate *sober = resize(NULL, vocab_size, sizeof *sober);
    Run run;
    run_init(&run, m, n < 64 ? n : 64, 1);
    for (int i = 0; i < N_SITES * n_layers; i++)
        doses[i] = i / n_layers == site && abs(i % n_layers - n_layers / 2) <= 1 ? (float)theta : 0;
    for (int i = 0; i <= k; i++) { // the sober pass, then one for each seed
        Sequence s = sequence_new((Noise){noise.seed + (uint64_t)i - 1, noise.family, doses});
        float *p = feed(m, &run, &s, tokens, n, 0, i > 0, true);
        softmax(p, vocab_size, 1);
        for (int token = 0; token < vocab_size; token++) {
            if (!i) sober[token] = (Candidate){p[token], token};
            drugged[token] = i ? drugged[token] + (double)p[token] / k : 0;
        }
        sequence_free(m, &s);
    }
    qsort(sober, (size_t)vocab_size, sizeof *sober, by_probability);
    printf("\nThe next token, theta %.4g in that window: | kept, - lost, + won, 2 %% each\n"
           "                   sober  drugged\n", theta);
    for (int i = 0; i < 10 && i < vocab_size; i++) {
        const double p = (double)sober[i].p, q = drugged[sober[i].token];
        char *text = visible(m, sober[i].token);
        printf("%-16s %5.1f %%  %5.1f %%  ", text, 100 * p, 100 * q);
        free(text);
        for (double percent = 1; percent < 100 * fmax(p, q); percent += 2)
            putchar(percent > 100 * p ? '+' : percent > 100 * q ? '-' : '|');
        puts("");
    }
    run_free(&run);
    free(doses);
    free(drugged);
    free(sober);
}

static void trip_csv(FILE *to, const Trip *t) {
    fputs("kind,place,theta,level,distance\n", to);
    for (int i = 0; i < 2 * t->n_layers * t->n_thetas; i++)
        for (int level = 0; level <= t->n_layers; level++) {
            const int passage = i / t->n_thetas, kind = passage / t->n_layers;
            fprintf(to, "%s,%d,%.9g,%d,%.9g\n", kind == WINDOW ? "window" : "stack",
                    passage % t->n_layers, trip_theta(t, i % t->n_thetas), level,
                    (double)trip_levels(t, 0, 0, i)[level]);
        }
}

// A drawing that stands on its own: for each kind a row of panels, one for each of five thetas, in
// it place down and level across. The gray is the root of the distance: as 1 - cos a is about
// a² / 2, twice as dark is twice the angle, and one picture shows small doses and large ones.
static void trip_svg(FILE *to, const Trip *t) {
    const int n = t->n_layers;
    const double wide = 150. / (n + 1), high = 150. / n; // of a cell
    fprintf(to, "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 1000 550' "
                "font-family='sans-serif' font-size='12'>\n<rect width='1000' height='550' "
                "fill='#fff'/>\n<text x='20' y='26' font-size='17'>How far does a glitch carry? "
                "1 − cosine between the last token and its sober twin</text>\n<text x='20' y='46'>"
                "Site %c, %s directions, a prompt of %d tokens, mean of %d seed%s from %llu. Level "
                "0 is the embedding, level l + 1 what leaves layer l.</text>\n<text x='20' y='540'>"
                "The gray is the square root of 1 − cosine: twice as dark is about twice the angle."
                " Each row has its own scale.</text>\n", "HQKVA"[t->site],
            t->noise.family == FAMILY_CENTRED ? "centred" : "upstream", t->n_tokens, t->k,
            t->k == 1 ? "" : "s", (unsigned long long)t->noise.seed);
    for (int kind = 0; kind < 2; kind++) {
        const float *all = trip_levels(t, kind, 0, 0);
        const float peak = trip_peak(all, (ptrdiff_t)n * t->n_thetas * (n + 1));
        fprintf(to, "<g transform='translate(62 %d)'><text x='-42' y='-26' font-size='14'>%s</text>"
                    "<text transform='translate(-30 75) rotate(-90)' text-anchor='middle'>layer of "
                    "injection</text><text x='838' y='-7'>1 − cosine</text>\n", 105 + 230 * kind,
                kind == WINDOW ? "Windows of 3 layers, centred on the layer of injection"
                               : "Full stack, from layer 0 to the layer of injection");
        for (int j = 0; j <= 5; j++) // the legend, largest on top
            fprintf(to, "<rect x='838' y='%d' width='20' height='25' stroke='#000' fill='#%06x'/>"
                        "<text x='864' y='%d'>%.3g</text>\n", 25 * j, 51 * j * 0x10101, 25 * j + 17,
                    (double)peak * (5 - j) * (5 - j) / 25);
        for (int i = 0; i < 5; i++) {
            const int theta = (i + 1) * (t->n_thetas - 1) / 5;
            fprintf(to, "<g transform='translate(%d)' text-anchor='middle'><text x='75' y='-7'>θ = "
                        "%.3g rad</text><text x='75' y='178'>level</text>\n", 168 * i,
                    trip_theta(t, theta));
            for (int j = 0; j < 3; j++) { // the first, the middle and the last
                const int level = j * n / 2, layer = j * (n - 1) / 2;
                const double x = (level + .5) * wide, y = (layer + .5) * high + 4;
                fprintf(to, "<text x='%.1f' y='164'>%d</text>\n", x, level);
                if (!i) fprintf(to, "<text x='-12' y='%.1f'>%d</text>\n", y, layer);
            }
            fprintf(to, "<g transform='scale(%.6f %.6f)' shape-rendering='crispEdges'>\n", wide,
                    high);
            for (int c = 0; c < n * (n + 1); c++) {
                const float d = trip_levels(t, kind, c / (n + 1), theta)[c % (n + 1)];
                const int gray = 255 - (int)(peak > 0 ? 255 * sqrtf(d / peak) + .5f : 0);
                fprintf(to, "<rect class='cell' x='%d' y='%d' width='1' height='1' "
                            "fill='#%06x'/>\n", c % (n + 1), c / (n + 1), gray * 0x10101);
            }
            fputs("</g><rect width='150' height='150' fill='none' stroke='#000'/></g>\n", to);
        }
        fputs("</g>\n", to);
    }
    fputs("</svg>\n", to);
}

static void trip(const Model *m, const Options *o) {
    int site = SITE_A, n_dosed = 0, n;
    for (int i = 0; i < N_SITES; i++)
        if (o->doses[i].theta > 0) site = i, n_dosed++;
    const double theta = n_dosed ? o->doses[site].theta : o->max_theta / 2;
    if (n_dosed > 1) die(2, "-m trip looks at one site, so give one dose");
    if (theta > o->max_theta)
        die(2, "-%c %g is beyond the trip's largest angle, -x %g", "HQKVA"[site], theta,
            o->max_theta);
    int *tokens = encode(m, o->prompt, strlen(o->prompt), true, &n);
    if (n <= SINK)
        die(1, "-i: %d tokens, and the first %d are never turned, so nothing can be dosed; use a "
            "longer prompt", n, SINK);
    if (n > m->config.seq_len)
        die(1, "-i has %d tokens, the model's context only %d", n, m->config.seq_len);
    if (m->config.n_layers < 3)
        die(1, "a trip doses windows of 3 layers, this model has %d", m->config.n_layers);
    Output out = lab_output(o, ".svg");
    const Trip t = trip_measure(m, tokens, n, site, o->max_theta, o->noise, o->k);
    const int nearest = (int)lround(theta / o->max_theta * (t.n_thetas - 1));
    const int shown = nearest < 1 ? 1 : nearest; // 0 would show nothing
    trip_print(&t, shown);
    trip_bars(m, tokens, n, site, trip_theta(&t, shown), o->noise, o->k);
    if (o->out && strcmp(strrchr(o->out, '.'), ".csv")) trip_svg(out.to, &t);
    else if (o->out) trip_csv(out.to, &t);
    if (o->out) output_close(&out);
    free(tokens);
    free(t.distance);
}

// ---- probe: does the answer survive the noise?
//
// The sober model writes; then drugged twins are fed the same tokens and asked at each of them what
// they would have said. Where they agree, the answer stands firm; where they do not, it hung by a
// thread. The probability that the sober model gave to its token is printed beside it: noise inside
// the network asks another question than the height of the last peak.

// agrees (n): the share of k twins that would have written each token. probability (n): the sober
// model's. Both 0 to 1.
static void probe_measure(Lab *lab, const int *tokens, int n, int k, double *agrees,
                          double *probability) {
    const Model *m = lab->model;
    const int vocab = m->config.vocab_size, max = lab->run.max_rows;
    Row *rows = resize(NULL, max, sizeof *rows);
    for (int twin = -1; twin < k; twin++) { // -1: the sober one
        Noise noise = lab->options->noise;
        noise.seed += (uint64_t)twin;
        Sequence s = after_prompt(lab, noise);
        for (int i = 0; i < n; i++) agrees[i] = twin < 0 ? 0 : agrees[i];
        agrees[0] += twin >= 0; // the first token follows from the prompt, which is read soberly
        probability[0] = exp(-surprise(lab->logits, vocab, tokens[0]));
        for (int done = 0; done < n - 1;) {
            const int n_rows = n - 1 - done < max ? n - 1 - done : max;
            for (int r = 0; r < n_rows; r++)
                rows[r] = (Row){tokens[done + r], s.length + r, &s, twin >= 0, true, NULL};
            forward(m, &lab->run, rows, n_rows);
            for (int r = 0; r < n_rows; r++) {
                const int next = ++done;
                const float *z = rows[r].logits;
                if (twin < 0) probability[next] = exp(-surprise(z, vocab, tokens[next]));
                else agrees[next] += argmax(z, vocab) == tokens[next];
            }
        }
        sequence_free(m, &s);
        progress("twin", twin + 1, k);
    }
    for (int i = 0; i < n; i++) agrees[i] /= k;
    free(rows);
}

static void probe(const Model *m, const Options *o) {
    Lab lab;
    Output out = lab_output(o, ".csv");
    lab_open(&lab, m, o, 64);
    if (!o->noise.theta) fputs("a probe without a dose agrees with itself; try -V .3\n", stderr);
    int *tokens = resize(NULL, lab.n_new, sizeof *tokens);
    const int n = sober_continuation(&lab, tokens);
    double *agrees = resize(NULL, n, sizeof *agrees);
    double *probability = resize(NULL, n, sizeof *probability);
    if (n) probe_measure(&lab, tokens, n, o->k, agrees, probability);

    for (int i = 0; i < n && isatty(STDOUT_FILENO); i++) { // the darker, the less agreement
        const Piece *p = &m->tokenizer.pieces[tokens[i]];
        printf("\033[38;5;%dm%.*s", 236 + (int)(19 * agrees[i]), p->length, p->bytes);
        if (i + 1 == n) puts("\033[0m\n");
    }
    printf("%-20s %10s %12s\n", "token", "agreement", "probability");
    for (int i = 0; i < n; i++) {
        char *text = visible(m, tokens[i]);
        printf("%-20s %9.0f%% %12.4f\n", text, 100 * agrees[i], probability[i]);
        free(text);
    }
    if (o->out) {
        fputs("position,token,agreement,probability\n", out.to);
        for (int i = 0; i < n; i++) {
            char *text = visible(m, tokens[i]);
            fprintf(out.to, "%d", lab.n_prompt + i);
            print_cell(out.to, (Style){0}, text, (int)strlen(text), false, false);
            fprintf(out.to, ",%.9g,%.9g\n", agrees[i], probability[i]);
            free(text);
        }
        output_close(&out);
    }
    free(tokens);
    free(agrees);
    free(probability);
    lab_close(&lab);
}

// ---- explore: what does a dose do to whole texts, and is it better than throwing dice?
//
// Every method of making a text different is tried at several strengths with several seeds: the
// five sites of DRµGS, temperature, and noise on the logits. What makes texts more various also
// makes them less likely, so the honest question is: at the same diversity, whose texts does the
// sober model find likelier? Diversity is the share of different ones among all pairs of neighbouring
// tokens in a cell's texts (distinct-2, Li et al. 2016).
enum { TEMPERATURE = N_SITES, LOGIT_NOISE, N_METHODS, N_STRENGTHS = 9 };
static const char *const METHODS[N_METHODS] = {"H", "Q", "K", "V", "A", "temperature",
                                               "logit noise"};
static const double STRENGTHS[N_METHODS][N_STRENGTHS] = { // radians; -; standard deviation in nats
    {.01, .05, .1, .15, .2, .35, .5, .8, 1}, {.01, .05, .1, .15, .2, .35, .5, .8, 1},
    {.01, .05, .1, .15, .2, .35, .5, .8, 1}, {.01, .05, .1, .15, .2, .35, .5, .8, 1},
    {.01, .05, .1, .15, .2, .35, .5, .8, 1}, {.1, .2, .35, .5, .65, .8, 1, 1.25, 1.5},
    {.1, .25, .5, .75, 1, 1.5, 2, 3, 4}};

// One method at one strength, k texts.
typedef struct {
    int distinct;     // different texts
    double prefix;    // bytes in common with the sober text, from the beginning, on average
    double angle;     // radians between what left the layers, drugged, and sober on the same tokens
    double diversity; // distinct-2, 0 to 1
    double likelihood; // log-probability a token, nats, under the sober model
} Cell;

// Reads a text soberly: *log_p is its log-probability, *angle the sum of the angles to what the one
// who wrote it had in mind. Both are sums over its tokens; angles over all but the last.
static void judge(Lab *lab, const Text *t, double *log_p, double *angle) {
    const Config *c = &lab->model->config;
    const int max = lab->run.max_rows, n = t->n_tokens;
    Row *rows = resize(NULL, max, sizeof *rows);
    Sequence s = after_prompt(lab, (Noise){0});
    *angle = 0;
    *log_p = n ? -surprise(lab->logits, c->vocab_size, t->tokens[0]) : 0;
    for (int done = 0; done < n - 1;) {
        const int n_rows = n - 1 - done < max ? n - 1 - done : max;
        for (int r = 0; r < n_rows; r++)
            rows[r] = (Row){t->tokens[done + r], s.length + r, &s, false, true, NULL};
        forward(lab->model, &lab->run, rows, n_rows);
        for (ptrdiff_t r = 0; r < n_rows; r++, done++) {
            const float *a = lab->run.slots[0].x + r * c->dim;
            const float *b = t->hidden + (ptrdiff_t)done * c->dim;
            *log_p -= surprise(rows[r].logits, c->vocab_size, t->tokens[done + 1]);
            *angle += acos(fmax(-1, 1 - cosine_distance(a, b, c->dim)));
        }
    }
    sequence_free(lab->model, &s);
    free(rows);
}

// The share of different pairs among all pairs of neighbours in k texts.
static double diversity(const Text *texts, int k) {
    int n = 0, n_different = 0, most = 0;
    for (int i = 0; i < k; i++) most += texts[i].n_tokens;
    int64_t *seen = resize(NULL, most, sizeof *seen);
    for (int i = 0; i < k; i++)
        for (int j = 0; j + 1 < texts[i].n_tokens; j++, n++) {
            const int64_t pair = (int64_t)texts[i].tokens[j] << 32 | texts[i].tokens[j + 1];
            int p = 0;
            while (p < n_different && seen[p] != pair) p++;
            if (p == n_different) seen[n_different++] = pair;
        }
    free(seen);
    return n ? (double)n_different / n : 0;
}

// The likelihood that a method's curve over diversity has at d, a straight line between its cells,
// or NAN where it does not reach.
static double curve_at(const Cell *cells, double d) {
    double best = NAN;
    for (int i = 0; i + 1 < N_STRENGTHS; i++) {
        const Cell *a = &cells[i], *b = &cells[i + 1];
        if (a->diversity > b->diversity) { const Cell *swap = a; a = b; b = swap; }
        if (d < a->diversity || d > b->diversity || a->diversity == b->diversity) continue;
        const double t = (d - a->diversity) / (b->diversity - a->diversity);
        const double y = a->likelihood + t * (b->likelihood - a->likelihood);
        if (isnan(best) || y > best) best = y;
    }
    return best;
}

// Writes all texts of the cells [first, first + n) side by side and measures them.
static void explore_cells(Lab *lab, const float *theta, int first, int n, Cell *cells, Text *texts,
                          const char *sober) {
    const Model *m = lab->model;
    const Options *o = lab->options;
    const int k = o->k, L = m->config.n_layers;
    Sequence *sequences = resize(NULL, n * k, sizeof *sequences);
    for (int i = 0; i < n * k; i++) {
        const int cell = first + i / k, method = cell / N_STRENGTHS;
        const double strength = STRENGTHS[method][cell % N_STRENGTHS];
        const bool drug = method < N_SITES;
        sequences[i] = after_prompt(lab, (Noise){o->noise.seed + (uint64_t)(i % k), o->noise.family,
                                                 drug ? theta + cell * N_SITES * L : NULL});
        const Dice dice = {method == TEMPERATURE ? strength : 0, 1,
                           method == LOGIT_NOISE ? strength : 0};
        Text *t = &texts[first * k + i];
        *t = (Text){.sequence = &sequences[i], .dice = dice,
                    .tokens = resize(NULL, lab->n_new, sizeof(int)),
                    .hidden = resize(NULL, (ptrdiff_t)lab->n_new * m->config.dim, sizeof(float))};
        const size_t bytes = (size_t)m->config.vocab_size * sizeof(float);
        float *z = memcpy(resize(NULL, (ptrdiff_t)bytes, 1), lab->logits, bytes);
        t->next = choose(z, m->config.vocab_size, &t->dice, sequences[i].noise.seed, lab->n_prompt);
        free(z);
    }
    write_texts(m, &lab->run, texts + first * k, n * k, lab->n_new);
    for (int cell = first; cell < first + n; cell++) {
        Cell *to = &cells[cell];
        double n_tokens = 0, n_angles = 0;
        *to = (Cell){.diversity = diversity(texts + cell * k, k)};
        for (int i = 0; i < k; i++) {
            Text *t = &texts[cell * k + i];
            double log_p, angle;
            judge(lab, t, &log_p, &angle);
            to->likelihood += log_p;
            to->angle += angle;
            n_tokens += t->n_tokens;
            n_angles += t->n_tokens > 0 ? t->n_tokens - 1 : 0;
            char *text = text_of(&m->tokenizer, t->tokens, t->n_tokens);
            int same = 0, new = 1;
            while (text[same] && text[same] == sober[same]) same++;
            to->prefix += (double)same / k;
            for (int j = 0; j < i; j++) {
                const Text *other = &texts[cell * k + j];
                new &= other->n_tokens != t->n_tokens
                    || memcmp(other->tokens, t->tokens, (size_t)t->n_tokens * sizeof(int)) != 0;
            }
            to->distinct += new;
            free(text);
            free(t->hidden);
        }
        to->likelihood /= fmax(n_tokens, 1);
        to->angle /= fmax(n_angles, 1);
    }
    for (int i = 0; i < n * k; i++) sequence_free(m, &sequences[i]);
    free(sequences);
}

// Every text with its cell, as CSV, or as Markdown if the name ends in .md.
static void explore_save(const Lab *lab, Output *out, const Cell *cells, const Text *texts) {
    const Style style = {0, !strcmp(strrchr(out->path, '.'), ".md")};
    static const char *const columns[] = {"method", "strength", "seed", "distinct", "prefix",
                                          "angle", "diversity", "log-probability", "text"};
    for (int i = 0; i < 9; i++)
        print_cell(out->to, style, columns[i], (int)strlen(columns[i]), !i, i == 8);
    if (style.markdown) fputs("|---|---|---|---|---|---|---|---|---|\n", out->to);
    for (int i = 0; i < N_METHODS * N_STRENGTHS * lab->options->k; i++) {
        const int cell = i / lab->options->k, method = cell / N_STRENGTHS;
        const Cell *c = &cells[cell];
        const double numbers[] = {STRENGTHS[method][cell % N_STRENGTHS],
                                  (double)lab->options->noise.seed + i % lab->options->k,
                                  c->distinct, c->prefix, c->angle, c->diversity, c->likelihood};
        print_cell(out->to, style, METHODS[method], (int)strlen(METHODS[method]), true, false);
        for (int j = 0; j < 7; j++) {
            char number[32];
            const int n = snprintf(number, sizeof number, j == 1 ? "%.16g" : "%.9g", numbers[j]);
            print_cell(out->to, style, number, n, false, false);
        }
        char *text = text_of(&lab->model->tokenizer, texts[i].tokens, texts[i].n_tokens);
        for (char *b = text; style.markdown && *b; b++) *b = *b == '\n' ? ' ' : *b;
        print_cell(out->to, style, text, (int)strlen(text), false, true);
        free(text);
    }
    output_close(out);
}

static void explore(const Model *m, const Options *o) {
    enum { N_CELLS = N_METHODS * N_STRENGTHS };
    const Config *c = &m->config;
    Lab lab;
    Output out = lab_output(o, ".md");
    lab_open(&lab, m, o, 256);
    // Side by side as many texts as 1 GB of keys, values and hidden states hold, but whole cells.
    const double per_text = ((double)(lab.n_prompt + lab.n_new) * 2 * c->n_layers * c->kv_dim
                             + (double)lab.n_new * c->dim) * sizeof(float);
    const int fit = (int)fmin(N_CELLS, 1e9 / per_text / o->k), batch = fit < 1 ? 1 : fit;
    fprintf(stderr, "%d texts, %d side by side, %.0f MB for each batch\n", N_CELLS * o->k,
            batch * o->k, per_text * batch * o->k / 1e6);

    float *theta = resize(NULL, (ptrdiff_t)N_CELLS * N_SITES * c->n_layers, sizeof *theta);
    for (int cell = 0; cell < N_CELLS; cell++) { // the site's shape, if one was asked for, else all
        Dose doses[N_SITES] = {{0}};
        const int method = cell / N_STRENGTHS;
        if (method < N_SITES) {
            doses[method] = o->doses[method];
            doses[method].theta = STRENGTHS[method][cell % N_STRENGTHS];
        }
        dose_layers(theta + cell * N_SITES * c->n_layers, doses, c->n_layers);
    }
    int *tokens = resize(NULL, lab.n_new, sizeof *tokens);
    const int n_sober = sober_continuation(&lab, tokens);
    char *sober = text_of(&m->tokenizer, tokens, n_sober);
    Cell cells[N_CELLS];
    Text *texts = resize(NULL, N_CELLS * o->k, sizeof *texts);
    for (int first = 0; first < N_CELLS; first += batch) {
        progress("cell", first, N_CELLS);
        explore_cells(&lab, theta, first, first + batch < N_CELLS ? batch : N_CELLS - first, cells,
                      texts, sober);
    }
    progress("cell", N_CELLS, N_CELLS);

    printf("sober: %s\n\n%-12s %8s %8s %8s %8s %10s %16s\n", sober, "method", "strength",
           "distinct", "prefix", "angle", "diversity", "log-probability");
    for (int i = 0; i < N_CELLS; i++)
        printf("%-12s %8g %5d/%-2d %8.0f %8.3f %10.3f %16.4f\n", METHODS[i / N_STRENGTHS],
               STRENGTHS[i / N_STRENGTHS][i % N_STRENGTHS], cells[i].distinct, o->k,
               cells[i].prefix, cells[i].angle, cells[i].diversity, cells[i].likelihood);
    puts("\nAt the same diversity, nats a token by which the sober model finds a text likelier\n"
         "than one made with temperature (mean over the doses whose diversity that reaches):\n");
    for (int method = 0; method < N_METHODS; method++) {
        double sum = 0;
        int n = 0;
        for (int i = 0; i < N_STRENGTHS && method != TEMPERATURE; i++) {
            const Cell *cell = &cells[method * N_STRENGTHS + i];
            const double there = curve_at(&cells[TEMPERATURE * N_STRENGTHS], cell->diversity);
            if (!isnan(there)) { sum += cell->likelihood - there; n++; }
        }
        if (n) printf("%-12s %+.4f  (%d doses)\n", METHODS[method], sum / n, n);
    }
    if (o->out) explore_save(&lab, &out, cells, texts);
    for (int i = 0; i < N_CELLS * o->k; i++) free(texts[i].tokens);
    free(texts);
    free(tokens);
    free(sober);
    free(theta);
    lab_close(&lab);
}

/* ================================================================================================
 * 9  The command line
 */
static const char USAGE[] =
    "usage: drugs <model.bin> [options]\n"
    "  -m <mode>    generate (default), chat, or an experiment: trip, explore, probe\n"
    "  -i <text>    prompt\n"
    "  -y <text>    system prompt, for chat\n"
    "  -n <tokens>  how many to write, 0: until the text ends or the context is full (256)\n"
    "  -s <seed>    of the noise and the sampling (420)\n"
    "  -H -Q -K -V -A <theta>  doses in radians: norm output, query, key, value, attention output\n"
    "  -d <depth>   where in the depth they act, 0 first layer, 1 behind the last (everywhere)\n"
    "  -w <spread>  how far around that depth, in the same unit (.1)\n"
    "               or a full shape for one dose: -A <theta>@<mode>:<depth>=<ratio>,...\n"
    "               with mode ceil, floor or interpolate: -A .3@interpolate:0=0,.4=1,.8=0\n"
    "  -r <family>  of random directions: centred (default) or upstream\n"
    "  -u           unprotected: the prompt is read drugged too\n"
    "  -c <tokens>  a cold shower after so many drugged tokens, 0: never (420)\n"
    "  -t <temp>    temperature, 0: take the most probable token (0)\n"
    "  -p <top_p>   keep the most probable tokens up to this probability, with -t (.9)\n"
    "  -k <seeds>   experiments: how often each is repeated (5)\n"
    "  -x <theta>   trip: the largest angle, in radians (1.5)\n"
    "  -o <file>    experiments: the numbers as .csv (explore also .md, trip also .svg);\n"
    "               a trip sets the depth itself, of a dose only the angle counts\n"
    "  -h           this help\n";

// Reads a number within [least, most]; whole ones only if asked. Exits with 2 on anything else.
static double number(char option, const char *what, const char *text, double least, double most,
                     bool whole) {
    char *end;
    double x = strtod(text, &end);
    if (end == text || *end || !isfinite(x) || (whole && x != floor(x)))
        die(2, "-%c takes %s, got '%s'", option, what, text);
    if (x < least || x > most)
        die(2, "-%c takes %s from %.15g to %.15g, got '%s'", option, what, least, most, text);
    return x;
}

// theta, or theta@mode:depth=ratio,depth=ratio,...
static void parse_dose(Dose *d, char option, const char *text) {
    static const char *const modes[] = {"ceil:", "floor:", "interpolate:"};
    size_t n_theta = strcspn(text, "@");
    char *theta = resize(NULL, (ptrdiff_t)n_theta + 1, 1);
    memcpy(theta, text, n_theta);
    theta[n_theta] = '\0';
    d->theta = number(option, "an angle in radians", theta, 0, 1000, false);
    free(theta);
    if (!text[n_theta]) return;

    const char *p = text + n_theta + 1;
    bool ok = false;
    for (int mode = 0; mode < 3 && !ok; mode++)
        if ((ok = !strncmp(p, modes[mode], strlen(modes[mode])))) {
            d->mode = mode;
            p += strlen(modes[mode]);
        }
    for (d->n_points = 0; ok && *p && d->n_points < MAX_POINTS; d->n_points++) {
        Point *at = &d->points[d->n_points];
        char *end;
        at->depth = strtof(p, &end);
        ok = end > p && *end == '=' && isfinite(at->depth);
        if (!ok) break;
        at->ratio = strtof(p = end + 1, &end);
        ok = end > p && (!*end || (*end == ',' && end[1])) && isfinite(at->ratio) && at->ratio >= 0;
        p = end + (*end == ',');
    }
    if (!ok || *p || !d->n_points)
        die(2, "-%c takes a shape like .3@ceil:.2=0,.4=1,.6=0 (at most %d points), got '%s'",
            option, MAX_POINTS, text);
    qsort(d->points, (size_t)d->n_points, sizeof *d->points, by_depth);
}

// Prints the help and exits, if that is what is asked for or nothing is asked at all.
static void help(const char *usage, int argc, char **argv) {
    const bool asked = argc > 1 && !strcmp(argv[1], "-h");
    if (argc > 1 && !asked) return;
    fputs(usage, asked ? stdout : stderr);
    exit(asked ? 0 : 2);
}

static void parse_options(Options *o, int argc, char **argv) {
    static const char *const modes[] = {"generate", "chat", "trip", "explore", "probe"};
    double depth = -1, spread = -1;
    if (argv[1][0] == '-')
        die(2, "the model file comes first, then the options; %s -h lists them", program);
    *o = (Options){.prompt = "", .n_new = 256, .shower_every = 420, .dice = {.top_p = .9},
                   .k = 5, .max_theta = 1.5, .noise = {420, FAMILY_CENTRED, NULL}};
    for (int i = 2; i < argc; i++) {
        const char *flag = argv[i], *site = NULL;
        if (flag[0] != '-' || !flag[1] || flag[2])
            die(2, "'%s' is not an option; %s -h lists them", flag, program);
        if (flag[1] == 'h') help(USAGE, 2, &argv[i - 1]);
        if (flag[1] == 'u') { o->drugged_prompt = true; continue; }
        if (!strchr("HQKVAminsytpdwcrkxo", flag[1]))
            die(2, "'%s' is not an option; %s -h lists them", flag, program);
        if (++i == argc) die(2, "%s needs a value; %s -h lists them", flag, program);
        const char *text = argv[i];
        if ((site = strchr("HQKVA", flag[1]))) parse_dose(&o->doses[site - "HQKVA"], flag[1], text);
        switch (flag[1]) {
        case 'i': o->prompt = text; break;
        case 'y': o->system = text; break;
        case 'n': o->n_new = (int)number('n', "a number of tokens", text, 0, 1 << 28, true); break;
        case 's':
            o->noise.seed = (uint64_t)number('s', "a whole number", text, 0, 0x1p53, true);
            break;
        case 't': o->dice.temperature = number('t', "a temperature", text, 0, 1000, false); break;
        case 'p': o->dice.top_p = number('p', "a probability", text, 0, 1, false); break;
        case 'd': depth = number('d', "a depth", text, 0, 1, false); break;
        case 'w': spread = number('w', "a spread", text, 0, 1, false); break;
        case 'c':
            o->shower_every = (int)number('c', "a number of tokens", text, 0, 1 << 28, true);
            break;
        case 'm':
            for (o->mode = 0; o->mode < N_MODES && strcmp(text, modes[o->mode]);) o->mode++;
            if (o->mode == N_MODES)
                die(2, "-m takes generate, chat, trip, explore or probe, got '%s'", text);
            break;
        case 'k': o->k = (int)number('k', "a number of seeds", text, 1, 1000, true); break;
        case 'x': o->max_theta = number('x', "an angle in radians", text, 1e-6, 1000, false); break;
        case 'o': o->out = text; break;
        case 'r':
            o->noise.family = strcmp(text, "upstream") ? FAMILY_CENTRED : FAMILY_UPSTREAM;
            if (strcmp(text, "centred") && strcmp(text, "upstream"))
                die(2, "-r takes centred or upstream, got '%s'", text);
            break;
        }
    }
    if (depth < 0 && spread < 0) return;
    if (depth < 0) depth = .4;
    if (spread < 0) spread = .1;
    for (int site = 0; site < N_SITES; site++) {
        Dose *d = &o->doses[site];
        if (d->n_points) continue;
        d->n_points = 3; // the bump of upstream's README
        d->mode = MODE_CEIL;
        d->points[0] = (Point){(float)depth - (float)spread, 0};
        d->points[1] = (Point){(float)depth, 1};
        d->points[2] = (Point){(float)depth + (float)spread, 0};
    }
}

int main(int argc, char **argv) {
    Model model;
    Options options;
    help(USAGE, argc, argv);
    parse_options(&options, argc, argv);
    if (!model_open(&model, argv[1])) die(1, "%s: %s", argv[1], model.error);

    int n_layers = model.config.n_layers;
    float *theta = resize(NULL, n_layers * N_SITES, sizeof *theta);
    dose_layers(theta, options.doses, n_layers);
    for (int i = 0; i < n_layers * N_SITES; i++)
        if (theta[i] > 0) options.noise.theta = theta;

    if (options.out && (options.mode == GENERATE || options.mode == CHAT))
        die(2, "-o goes with an experiment: -m trip, explore or probe");
    if (options.mode == TRIP) trip(&model, &options);
    else if (options.mode == EXPLORE) explore(&model, &options);
    else if (options.mode == PROBE) probe(&model, &options);
    else talk(&model, &options);
    if (ferror(stdout) || fflush(stdout)) die(1, "standard output cannot be written; disk full?");
    free(theta);
    model_close(&model);
    return 0;
}
