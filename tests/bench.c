/* bench.c - whether the promises about speed hold here: bench [dim hidden_dim n_layers n_heads]
 *
 * Seconds differ from machine to machine and from minute to minute, so every line is a ratio of two
 * things that were timed in turn in the same run; the median of five is printed.
 */
#define TRAIN_STEP_LIBRARY
#include "../train_step.c"

enum {
    ROUNDS = 5,
    ROWS = 14,     // of the lesson
    NEW = 8,       // tokens that each text writes
    N_COLUMNS = 8, // of the table
    N_TEXTS = 64,  // without a step
    BENCH_VOCAB = 32000,
    BENCH_PIECE_BYTES = PIECE_BYTES + 1, // every piece is one letter
};

// ---- a model of any shape, whose weights are a repeated block of small random numbers

// Where a tensor that follows `offset` begins.
static size_t align(size_t offset) {
    return (offset + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static size_t tensor_floats(const Config *c, int which) {
    int n_out, n_in;
    tensor_shape(c, which, &n_out, &n_in);
    return (size_t)n_out * n_in;
}

static size_t pieces_at(const Config *c) {
    return HEADER_BYTES + c->head_dim / 2 * sizeof(double); // behind RoPE's frequencies
}

static size_t size_of_file(const Config *c) {
    size_t offset = pieces_at(c) + c->tokenizer_bytes;
    int layer, which;
    for (int i = 0; tensor_at(c, i, &layer, &which); i++)
        offset = align(offset) + tensor_floats(c, which) * sizeof(float);
    return offset;
}

static void fill_frequencies(char *file, int head_dim) {
    for (int i = 0; i < head_dim / 2; i++) {
        double frequency = pow(10000, -2. * i / head_dim);
        memcpy(file + HEADER_BYTES + i * sizeof frequency, &frequency, sizeof frequency);
    }
}

// One unknown piece, the others the same letter each.
static void fill_pieces(char *pieces) {
    for (int i = 0; i < BENCH_VOCAB; i++) {
        char *piece = pieces + i * BENCH_PIECE_BYTES;
        piece[4] = i ? NORMAL : UNKNOWN;
        piece[6] = 1; // byte long
        piece[PIECE_BYTES] = 'x';
    }
}

static void fill_weights(char *file, const Config *c) {
    enum { BLOCK_FLOATS = 4099 }; // a prime, so that rows differ
    static float block[BLOCK_FLOATS];
    size_t offset = pieces_at(c) + c->tokenizer_bytes;
    int layer, which;
    for (int i = 0; i < BLOCK_FLOATS; i++)
        block[i] = (uniform(1, i) - .5f) * .05f;
    for (int i = 0; tensor_at(c, i, &layer, &which); i++) {
        offset = align(offset);
        for (size_t left = tensor_floats(c, which); left;) {
            size_t n = left < BLOCK_FLOATS ? left : BLOCK_FLOATS;
            memcpy(file + offset, block, n * sizeof *block);
            offset += n * sizeof *block;
            left -= n;
        }
    }
}

// The file of a model of this shape.
static char *make_file(Config c, size_t *n_bytes) {
    c.version = 2;
    c.head_dim = c.dim / c.n_heads;
    c.vocab_size = BENCH_VOCAB;
    c.tokenizer_bytes = BENCH_VOCAB * BENCH_PIECE_BYTES;
    c.q_dim = c.dim;
    c.kv_dim = c.dim;
    *n_bytes = size_of_file(&c);
    char *file = resize(NULL, *n_bytes, 1);
    memcpy(file, "drugs.c", MAGIC_BYTES);
    memcpy(file + MAGIC_BYTES, &c, CONFIG_BYTES);
    fill_frequencies(file, c.head_dim);
    fill_pieces(file + pieces_at(&c));
    fill_weights(file, &c);
    return file;
}

// ---- what is timed

// The seconds of a pass over some of the lesson's rows.
static double time_forward(Step *step, int n_rows) {
    double start = now();
    forward(&step->acts, step->rows, n_rows);
    return now() - start;
}

static double time_step(Step *step) {
    double start = now();
    step_take(step);
    return now() - start;
}

// Seconds to write NEW tokens in n columns side by side, prompts not counted. Column i has a step
// size of i * step_size.
static double time_columns(const Step *step, int n, float step_size) {
    const Model *m = step->model;
    const int prompt = 1;
    static Sequence sequences[N_TEXTS];
    static int tokens[N_TEXTS][NEW];
    Text texts[N_TEXTS];
    Stepped stepped;
    stepped_init(&stepped, step, MEASURE_ROWS);
    for (int i = 0; i < n; i++) {
        sequences[i] = sequence_new((Noise){0});
        sequences[i].step_size = step_size * (float)i;
        feed(&stepped.run, &sequences[i], &prompt, 1, 0);
        texts[i] = (Text){.sequence = &sequences[i], .next = 2, .tokens = tokens[i]};
    }
    double start = now();
    write_texts(&stepped.run, texts, n, NEW);
    double seconds = now() - start;
    for (int i = 0; i < n; i++)
        sequence_free(m, &sequences[i]);
    stepped_free(&stepped);
    return seconds;
}

// The seconds in which memory delivers all weights, from w to end, when nothing else is done with
// them than adding them up. The sum goes to *sum, so that the compiler cannot leave it out.
static double time_reading(const float *w, const float *end, float *sum) {
    const ptrdiff_t n = (end - w) / LANES;
    double start = now();
    vec total = {0};
#pragma omp parallel
    {
        vec part = {0};
#pragma omp for schedule(static)
        for (ptrdiff_t i = 0; i < n; i++)
            part += load(w + i * LANES, LANES);
#pragma omp critical
        total += part;
    }
    *sum += sum_lanes(total);
    return now() - start;
}

// ---- the ratios

typedef struct {
    double steps[ROUNDS];   // loss and gradient, in forward passes
    double columns[ROUNDS]; // all columns, in single ones
    double texts[ROUNDS];   // single texts, in all side by side
    double memory[ROUNDS];  // reading the weights, in single tokens
    double prompt[ROUNDS];  // tokens a second of a prompt, in those of one row
} Ratios;

static void measure(Ratios *ratios, Step *step, const float *weights, const float *end) {
    float sum = 0;
    step_take(step); // touches everything once
    for (int i = 0; i < ROUNDS; i++) {
        double passing = time_forward(step, ROWS);
        ratios->steps[i] = time_step(step) / passing;
        double one = time_columns(step, 1, 0);
        ratios->columns[i] = time_columns(step, N_COLUMNS, .001f) / one;
        ratios->texts[i] = N_TEXTS * one / time_columns(step, N_TEXTS, 0);
        double single = time_forward(step, 1);
        ratios->memory[i] = time_reading(weights, end, &sum) / single;
        ratios->prompt[i] = ROWS * single / passing;
    }
    if (!isfinite(sum))
        puts("the weights are not finite");
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a;
    double y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x) {
    qsort(x, ROUNDS, sizeof *x, by_value);
    return x[ROUNDS / 2];
}

static void print_ratios(Ratios *ratios) {
    printf("loss and gradient of %d rows: %.2f forward passes over the same rows (promised: 2.5)\n",
           ROWS, median(ratios->steps));
    printf("%d columns of the table side by side: %.2f times one column (promised: 2.5)\n",
           N_COLUMNS, median(ratios->columns));
    printf("%d texts side by side: %.1f times cheaper than one after another (promised: 4)\n",
           N_TEXTS, median(ratios->texts));
    printf("decoding one token: %.2f of the speed at which memory delivers the weights\n",
           median(ratios->memory));
    printf("a prompt of %d rows: %.2f times the tokens a second of one row\n", ROWS,
           median(ratios->prompt));
}

int main(int argc, char **argv) {
    Config c = {
        .dim = 768,
        .hidden_dim = 2048,
        .n_layers = 12,
        .n_heads = 12,
        .seq_len = 1024,
        .shared_classifier = 1,
        .norm_eps = 1e-5f,
        .bos = -1,
    };
    program = "bench";
    if (argc == 5) {
        c.dim = atoi(argv[1]);
        c.hidden_dim = atoi(argv[2]);
        c.n_layers = atoi(argv[3]);
        c.n_heads = atoi(argv[4]);
    }
    c.n_kv_heads = c.n_heads;
    Model m;
    size_t n_bytes;
    char *file = make_file(c, &n_bytes);
    if (!model_parse(&m, file, n_bytes))
        die(1, "%s", m.error);
    printf("a model of %.0f MB, %d layers of %d\n", (double)n_bytes / 1e6, c.n_layers, c.dim);

    Step step;
    Ratios ratios;
    Sequence lesson = sequence_new((Noise){0});
    int tokens[ROWS + 1];
    for (int i = 0; i <= ROWS; i++)
        tokens[i] = i * 97 + 1;
    step_init(&step, &m, ROWS);
    step_add(&step, &lesson, tokens, ROWS + 1, 0);
    const float *end = (const float *)(void *)(file + n_bytes);
    measure(&ratios, &step, m.layers[0].w[TOK_EMB], end);
    print_ratios(&ratios);
    step_free(&step);
    sequence_free(&m, &lesson);
    model_close(&m);
    free(file);
    return 0;
}
