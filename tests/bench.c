/* bench.c - whether the promises about speed hold here: bench [dim hidden_dim n_layers n_heads]
 *
 * Seconds differ from machine to machine and from minute to minute, so every line is a ratio of two
 * things that were timed in turn in the same run; the median of five is printed.
 */
#define main train_step_main
#include "../train_step.c"
#undef main

enum { ROUNDS = 5, ROWS = 14, NEW = 8, N_COLUMNS = 8, N_TEXTS = 64, BENCH_VOCAB = 32000 };

// The file of a model of this shape whose weights are a repeated block of small random numbers.
static char *make_file(Config c, size_t *n_bytes) {
    enum { BLOCK_FLOATS = 4099 }; // a prime, so that rows differ
    static float block[BLOCK_FLOATS];
    int layer, which, n_out, n_in;
    size_t at = HEADER_BYTES + (size_t)BENCH_VOCAB * 9;
    c.version = 1;
    c.head_dim = c.dim / c.n_heads;
    c.vocab_size = BENCH_VOCAB;
    c.tokenizer_bytes = BENCH_VOCAB * 9;
    c.q_dim = c.kv_dim = c.dim;
    for (int i = 0; i < BLOCK_FLOATS; i++) block[i] = (uniform(1, (uint32_t)i) - .5f) * .05f;
    for (int pass = 0; pass < 2; pass++) { // measure, then fill
        static char *file;
        size_t end = at;
        for (int i = 0; tensor_at(&c, i, &layer, &which); i++) {
            tensor_shape(&c, which, &n_out, &n_in);
            end = (end + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
            const size_t n = (size_t)n_out * (size_t)n_in;
            for (size_t j = 0; pass && j < n; j += BLOCK_FLOATS)
                memcpy(file + end + j * sizeof(float), block,
                       (n - j < BLOCK_FLOATS ? n - j : BLOCK_FLOATS) * sizeof(float));
            end += n * sizeof(float);
        }
        if (pass) { *n_bytes = end; return file; }
        file = resize(NULL, (ptrdiff_t)end, 1);
        memset(file, 0, at);
        memcpy(file, "drugs.c", MAGIC_BYTES);
        memcpy(file + MAGIC_BYTES, &c, CONFIG_BYTES);
        for (int i = 0; i < BENCH_VOCAB; i++) { // one unknown piece, the others one letter each
            file[HEADER_BYTES + 9 * i + 4] = (char)(i ? NORMAL : UNKNOWN);
            file[HEADER_BYTES + 9 * i + 6] = 1;
            file[HEADER_BYTES + 9 * i + 8] = 'x';
        }
    }
    return NULL;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double median(double *x) {
    qsort(x, ROUNDS, sizeof *x, by_value);
    return x[ROUNDS / 2];
}

// Seconds to write NEW tokens in n columns side by side, prompts not counted. Column i has a step
// size of i * eta.
static double time_columns(const Model *m, const Step *step, int n, float eta) {
    SteppedRun run;
    static Column columns[N_TEXTS];
    Text texts[N_TEXTS];
    int tokens[N_TEXTS][NEW];
    stepped_init(&run, step, MEASURE_ROWS);
    for (int i = 0; i < n; i++) {
        columns[i] = (Column){sequence_new((Noise){0}), eta * (float)i};
        feed(m, &run.run, &columns[i].sequence, &(int){1}, 1, 0, false, false);
        texts[i] = (Text){.sequence = &columns[i].sequence, .next = 2, .tokens = tokens[i]};
    }
    const double start = now();
    write_texts(m, &run.run, texts, n, NEW);
    const double seconds = now() - start;
    for (int i = 0; i < n; i++) sequence_free(m, &columns[i].sequence);
    stepped_free(&run);
    return seconds;
}

int main(int argc, char **argv) {
    Config c = {.dim = 768, .hidden_dim = 2048, .n_layers = 12, .n_heads = 12, .seq_len = 1024,
                .shared_classifier = 1, .rope_theta = 10000, .norm_eps = 1e-5f, .bos = -1,
                .eos = -1};
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
    if (!model_parse(&m, file, n_bytes)) die(1, "%s", m.error);
    printf("a model of %.0f MB, %d layers of %d\n", (double)n_bytes / 1e6, c.n_layers, c.dim);

    Step step;
    Sequence lesson = sequence_new((Noise){0});
    int tokens[ROWS + 1];
    for (int i = 0; i <= ROWS; i++) tokens[i] = i * 97 + 1;
    step_init(&step, &m, ROWS, ROWS);
    step_add(&step, &lesson, tokens, ROWS + 1, false, false);
    double forwards[ROUNDS], steps[ROUNDS], one[ROUNDS], all[ROUNDS], copies[ROUNDS];
    double single[ROUNDS], texts[ROUNDS];
    float sum = 0;
    step_take(&step); // touches everything once
    for (int i = 0; i < ROUNDS; i++) {
        double t = now();
        forward(&m, &step.acts, step.rows, step.n_rows);
        forwards[i] = now() - t;
        t = now();
        step_take(&step);
        steps[i] = (now() - t) / forwards[i];
        one[i] = time_columns(&m, &step, 1, 0);
        all[i] = time_columns(&m, &step, N_COLUMNS, .001f) / one[i];
        texts[i] = N_TEXTS * one[i] / time_columns(&m, &step, N_TEXTS, 0);
        t = now();
        forward(&m, &step.acts, step.rows, 1);
        single[i] = now() - t;
        t = now();
        const float *w = *tensor(&m, 0, TOK_EMB), *end = (const float *)(void *)(file + n_bytes);
        const ptrdiff_t n = (end - w) / LANES;
        vec total = {0};
#pragma omp parallel
        {
            vec part = {0};
#pragma omp for schedule(static)
            for (ptrdiff_t j = 0; j < n; j++) part += load(w + j * LANES, LANES);
#pragma omp critical
            total += part;
        }
        sum += sum_lanes(total);
        copies[i] = (now() - t) / single[i];
    }
    printf("loss and gradient of %d rows: %.2f forward passes over the same rows (promised: 2.5)\n",
           ROWS, median(steps));
    printf("%d columns of the table side by side: %.2f times one column (promised: 2.5)\n",
           N_COLUMNS, median(all));
    printf("%d texts side by side: %.1f times cheaper than one after another (promised: 4)\n",
           N_TEXTS, median(texts));
    printf("decoding one token: %.2f of the speed at which memory delivers the weights\n",
           median(copies));
    printf("a prompt of %d rows: %.2f times the tokens a second of one row\n", ROWS,
           ROWS * median(single) / median(forwards));
    if (!isfinite(sum)) puts("");
    step_free(&step);
    sequence_free(&m, &lesson);
    model_close(&m);
    free(file);
    return 0;
}
