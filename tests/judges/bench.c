/* bench.c - how fast it is here: bench [LLAMA2C TOKENIZER]
 *
 * Seconds differ from machine to machine and from minute to minute.
 * So the first table has ratios of two things that were timed in turn in the same run: the median
 * of five, the least and the largest.
 * The second table has speeds, for 1, 2, 4 ... all threads, each the median of five rounds.
 * With LLAMA2C, a program built from llama2.c's run.c, and its tokenizer.bin, every round times that
 * one, too.
 */
#define TRAIN_STEP_LIBRARY
#include "../../train_step.c"
#include "../makers/flat.h"
#include <signal.h>
#include <sys/wait.h>
#ifdef _OPENMP
#include <omp.h>
#endif

enum {
    ROUNDS = 5,
    ROWS = 14,     // of the lesson
    MANY = 256,    // of a long one, and of a long prompt
    NEW = 8,       // tokens that each text writes
    TOKENS = 120,  // that are written for the table of threads
    N_COLUMNS = 8, // of the table
    N_TEXTS = 64,  // without a step
    BENCH_VOCAB = 32000,
};

// ---- a model of any shape, whose weights are a repeated block of small random numbers

// Where a tensor that follows `offset` begins.
static size_t align(size_t offset) {
    return (offset + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static size_t tensor_numbers(const Config *c, int which) {
    int n_out, n_in;
    tensor_shape(c, which, &n_out, &n_in);
    return (size_t)n_out * n_in;
}

static size_t tensor_bytes(const Config *c, int which) {
    return tensor_numbers(c, which) * bytes_of(storage_of(c, which));
}

// The header's room, RoPE's frequencies, and a tokenizer of 32,000 pieces: one unknown piece, the
// others the same letter each.
static Bytes start_of_file(Config *c) {
    Bytes file = {0};
    Vocabulary vocabulary = {0};
    append_zeros(&file, HEADER_BYTES);
    for (int i = 0; i < c->head_dim / 2; i++) {
        double frequency = pow(10000, -2. * i / c->head_dim);
        append(&file, &frequency, sizeof frequency);
    }
    for (int i = 0; i < c->vocab_size; i++)
        append_piece(&vocabulary.pieces, 0, i ? NORMAL : UNKNOWN, "x", 1);
    append_tokenizer(&file, c, &vocabulary);
    free(vocabulary.pieces.data);
    return file;
}

static size_t size_of_file(const Config *c, size_t offset) {
    int layer, which;
    for (int i = 0; tensor_at(c, i, &layer, &which); i++)
        offset = align(offset) + tensor_bytes(c, which);
    return offset;
}

static void fill_weights(char *file, size_t offset, const Config *c) {
    enum { BLOCK_NUMBERS = 4099 }; // a prime, so that rows differ
    static float floats[BLOCK_NUMBERS];
    static uint16_t halves_of[N_STORAGES][BLOCK_NUMBERS];
    int layer, which;
    for (int i = 0; i < BLOCK_NUMBERS; i++) {
        uint32_t bits;
        floats[i] = (uniform(1, i) - .5f) * .05f;
        memcpy(&bits, &floats[i], sizeof bits);
        halves_of[BF16][i] = (uint16_t)(bits >> 16);
        halves_of[FP16][i] = (uint16_t)((bits >> 13 & 0x3FF) | (bits >> 16 & 0x8000) | 0x2000);
    }
    for (int i = 0; tensor_at(c, i, &layer, &which); i++) {
        const int storage = storage_of(c, which);
        const char *block = storage == FP32 ? (char *)floats : (char *)halves_of[storage];
        const size_t block_bytes = (size_t)BLOCK_NUMBERS * bytes_of(storage);
        offset = align(offset);
        for (size_t left = tensor_bytes(c, which); left;) {
            size_t n = left < block_bytes ? left : block_bytes;
            memcpy(file + offset, block, n);
            offset += n;
            left -= n;
        }
    }
}

// Bytes that are to lie in a file, whose name is kept in path. False if that failed.
static bool write_file(char path[32], const char *data, size_t n_bytes) {
    strcpy(path, "/tmp/bench-XXXXXX");
    const int fd = mkstemp(path);
    FILE *file = fd < 0 ? NULL : fdopen(fd, "wb");
    if (!file)
        return false;
    const bool whole = fwrite(data, 1, n_bytes, file) == n_bytes;
    return !fclose(file) && whole;
}

// Opens a model of this shape. Like every other one it is mapped from a file.
static void make_model(Model *m, Config c) {
    c.version = VERSION;
    c.head_dim = c.dim / c.n_heads;
    c.vocab_size = BENCH_VOCAB;
    c.q_dim = c.dim;
    c.kv_dim = c.dim;
    Bytes start = start_of_file(&c);
    const size_t n_bytes = size_of_file(&c, start.n);
    char *file = resize(start.data, n_bytes, 1);
    memcpy(file, "drugs.c", MAGIC_BYTES);
    memcpy(file + MAGIC_BYTES, &c, CONFIG_BYTES);
    fill_weights(file, start.n, &c);
    char path[32];
    if (!write_file(path, file, n_bytes))
        die(1, "%s cannot be written", path);
    free(file);
    if (!model_open(m, path))
        die(1, "%s", m->error);
    unlink(path);
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

// The seconds in which a prompt of MANY tokens is read.
static double time_prompt(Run *run, Sequence *s) {
    static const int tokens[MANY];
    s->length = 0;
    double start = now();
    feed(run, s, tokens, MANY, WANTS_LOGITS);
    return now() - start;
}

// The seconds in which TOKENS tokens are written, one after the other from an empty cache on.
static double time_decoding(Run *run, Sequence *s) {
    s->length = 0;
    double start = now();
    for (int i = 0; i < TOKENS; i++) {
        const int token = i;
        feed(run, s, &token, 1, WANTS_LOGITS);
    }
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
    const ptrdiff_t n = (end - w) / WIDTH;
    double start = now();
    vec total = {0};
#pragma omp parallel
    {
        vec part = {0};
#pragma omp for schedule(static)
        for (ptrdiff_t i = 0; i < n; i++)
            part += load(w + i * WIDTH, WIDTH);
#pragma omp critical
        total += part;
    }
    *sum += total[0];
    return now() - start;
}

// Multiplications and additions a second, in registers and nowhere else, of all threads.
static double peak(float *sink) {
    enum { SUMS = 12, TIMES = 4000000 };
    int n_threads = 0;
    double start = now();
#pragma omp parallel reduction(+ : n_threads)
    {
        vec sum[SUMS] = {{0}};
        vec factor = {0};
        for (int i = 0; i < WIDTH; i++)
            factor[i] = .5f + (float)(start > 0) / 4;
        for (int i = 0; i < TIMES; i++)
            for (int k = 0; k < SUMS; k++)
                sum[k] = sum[k] * factor + factor;
        for (int k = 0; k < SUMS; k++)
#pragma omp critical
            *sink += sum[k][0];
        n_threads++;
    }
    return 2. * SUMS * TIMES * WIDTH * n_threads / (now() - start);
}

// Multiplications and additions of a pass over n_rows rows, the last one's logits among them; those
// of attention, which are few, left out.
static double work(const Config *c, int n_rows) {
    double layer = 2. * c->dim * (c->q_dim + c->kv_dim) + 3. * c->dim * c->hidden_dim;
    return 2 * (layer * c->n_layers * n_rows + (double)c->dim * c->vocab_size);
}

// The seconds of one token after MANY - 1 others, dosed at a site or (-1) sober.
static double time_token(Run *run, Sequence *s, int site) {
    const int n_layers = run->model->config.n_layers;
    float *theta = resize(NULL, N_SITES * n_layers, sizeof *theta);
    for (int l = 0; site >= 0 && l < n_layers; l++)
        theta[site * n_layers + l] = .3f;
    s->noise = (Noise){1, FAMILY_CENTRED, site < 0 ? NULL : theta};
    Row row = {.token = 5, .position = MANY - 1, .sequence = s, .drugged = true, .wants_logits = true};
    double start = now();
    for (int i = 0; i < NEW; i++)
        forward(run, &row, 1);
    s->noise = (Noise){0};
    free(theta);
    return (now() - start) / NEW;
}

static int most_threads(void) {
#ifdef _OPENMP
    return omp_get_num_procs();
#else
    return 1;
#endif
}

static void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

// Tokens of all threads in the time of one token of a single thread.
static double gain(Run *run, Sequence *s) {
    set_threads(1);
    double one = time_token(run, s, -1);
    set_threads(most_threads());
    for (int i = 0; i < 4; i++)
        time_token(run, s, -1); // the way to work is found again
    return one / time_token(run, s, -1);
}

// The same while another program keeps one of the cores busy.
static double gain_beside(Run *run, Sequence *s) {
    pid_t busy = fork();
    if (busy == 0)
        for (;;) {
        }
    double ratio = gain(run, s);
    if (busy > 0) {
        kill(busy, SIGKILL);
        waitpid(busy, NULL, 0);
    }
    return ratio;
}

// ---- the ratios

enum { MEMORY, PROMPT, STEP, LONG_STEP, COLUMNS_8, TEXTS_64, DOSED_K, DOSED_V, IDLE, BUSY, N_RATIOS };
static const char *const NAMES[N_RATIOS] = {
    [MEMORY] = "decoding: of the speed at which memory delivers the weights (.85)",
    [PROMPT] = "a prompt of 256 tokens: of what the registers can multiply and add (.75)",
    [STEP] = "loss and gradient of 14 rows, in forward passes (at most 2.3)",
    [LONG_STEP] = "the same of 256 rows (at most 2.3)",
    [COLUMNS_8] = "8 columns of the table, in single ones (at most 1.6)",
    [TEXTS_64] = "64 texts side by side: so many times cheaper than one by one (10)",
    [DOSED_K] = "decoding at 256 keys with a dose at K: of sober speed (.85)",
    [DOSED_V] = "the same at V (.85)",
    [IDLE] = "decoding with all threads: of the speed of one (1.25)",
    [BUSY] = "the same while another program has one of the cores (.9)",
};

static void measure(double ratios[N_RATIOS][ROUNDS], Step *lesson, Step *many, const float *weights,
                    const float *end) {
    const Config *c = &lesson->model->config;
    float sum = 0;
    Run run;
    Sequence s = sequence_new((Noise){0});
    run_init(&run, lesson->model, MANY, 1);
    time_prompt(&run, &s); // touches everything once, as the steps do
    step_take(lesson);
    step_take(many);
    for (int i = 0; i < ROUNDS; i++) {
        double speed = peak(&sum);
        ratios[PROMPT][i] = work(c, MANY) / time_prompt(&run, &s) / speed;
        double passing = time_forward(lesson, ROWS);
        ratios[STEP][i] = time_step(lesson) / passing;
        passing = time_forward(many, MANY);
        ratios[LONG_STEP][i] = time_step(many) / passing;
        double one = time_columns(lesson, 1, 0);
        ratios[COLUMNS_8][i] = time_columns(lesson, N_COLUMNS, .001f) / one;
        ratios[TEXTS_64][i] = N_TEXTS * one / time_columns(lesson, N_TEXTS, 0);
        double reading = time_reading(weights, end, &sum);
        double sober = time_token(&run, &s, -1);
        ratios[MEMORY][i] = reading / sober;
        ratios[DOSED_K][i] = sober / time_token(&run, &s, SITE_K);
        ratios[DOSED_V][i] = sober / time_token(&run, &s, SITE_V);
        ratios[IDLE][i] = gain(&run, &s);
        ratios[BUSY][i] = gain_beside(&run, &s);
    }
    if (!isfinite(sum))
        puts("the weights are not finite");
    run_free(&run);
    sequence_free(lesson->model, &s);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a;
    double y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_ratios(double ratios[N_RATIOS][ROUNDS]) {
    puts("median (least - largest)");
    for (int i = 0; i < N_RATIOS; i++) {
        double *x = ratios[i];
        qsort(x, ROUNDS, sizeof *x, by_value);
        printf("%5.2f (%5.2f - %5.2f)  %s\n", x[ROUNDS / 2], x[0], x[ROUNDS - 1], NAMES[i]);
    }
}

// ---- the table of threads

// Writes the model as llama2.c reads it: seven numbers, each kind of tensor for all layers, and a
// table of angles that it skips. False if that failed.
static bool write_for_llama2c(const Model *m, char path[32]) {
    static const int order[] = {TOK_EMB,  ATT_NORM, WQ, WK, WV,        WO,
                                FFN_NORM, W1,       W2, W3, FINAL_NORM};
    const Config *c = &m->config;
    const int32_t header[] = {c->dim,        c->hidden_dim, c->n_layers, c->n_heads,
                              c->n_kv_heads, c->vocab_size, c->seq_len};
    Bytes file = {0};
    append(&file, header, sizeof header);
    for (size_t i = 0; i < sizeof order / sizeof *order; i++) {
        const int n_layers = order[i] < N_LAYER_TENSORS ? c->n_layers : 1;
        for (int l = 0; l < n_layers; l++)
            append(&file, m->layers[l].w[order[i]].data, tensor_bytes(c, order[i]));
    }
    append_zeros(&file, sizeof(float) * c->seq_len * c->head_dim);
    const bool ok = write_file(path, file.data, file.n);
    free(file.data);
    return ok;
}

// Tokens a second of llama2.c, as it says so itself; nan if it did not.
static double llama2c(const char *const *peer, const char *model, int n_threads) {
    char command[1024];
    double speed = NAN;
    snprintf(command, sizeof command,
             "OMP_NUM_THREADS=%d '%s' '%s' -z '%s' -t 0 -n %d 2>&1 >/dev/null | sed 's/.*: //'",
             n_threads, peer[0], model, peer[1], TOKENS);
    FILE *pipe = popen(command, "r");
    if (pipe && fscanf(pipe, "%lf", &speed) != 1)
        speed = NAN;
    if (pipe)
        pclose(pipe);
    return speed;
}

enum { DECODING, PEER = N_STORAGES, READING, STEP_OF_14, STEP_OF_256, N_SPEEDS };

static void print_threads(const Model models[N_STORAGES], Step *lesson, Step *many,
                          const char *const *peer, const char *peer_model) {
    const int most = most_threads();
    printf("\n%7s | %-31s | %6s | %s\n%7s | %7s %7s %7s %7s | %6s | %6s %6s\n", "",
           "decoding, tokens/s", "prompt", "step, seconds", "threads", "fp32", "bf16", "fp16",
           "llama2", "tok/s", "14", "256");
    for (int n = 1, last = 0; !last; n *= 2) {
        double speeds[N_SPEEDS][ROUNDS];
        last = n >= most;
        n = last ? most : n;
        set_threads(n);
        for (int i = 0; i < ROUNDS; i++) {
            for (int storage = 0; storage < N_STORAGES; storage++) {
                Run run;
                Sequence s = sequence_new((Noise){0});
                run_init(&run, &models[storage], MANY, 1);
                time_token(&run, &s, -1); // so that the way to work is found
                speeds[DECODING + storage][i] = TOKENS / time_decoding(&run, &s);
                if (storage == FP32)
                    speeds[READING][i] = MANY / time_prompt(&run, &s);
                run_free(&run);
                sequence_free(&models[storage], &s);
            }
            speeds[PEER][i] = peer ? llama2c(peer, peer_model, n) : NAN;
            speeds[STEP_OF_14][i] = time_step(lesson);
            speeds[STEP_OF_256][i] = time_step(many);
        }
        double median[N_SPEEDS];
        for (int k = 0; k < N_SPEEDS; k++) {
            qsort(speeds[k], ROUNDS, sizeof **speeds, by_value);
            median[k] = speeds[k][ROUNDS / 2];
        }
        printf("%7d | %7.1f %7.1f %7.1f %7.1f | %6.0f | %6.3f %6.3f\n", n, median[FP32], median[BF16],
               median[FP16], median[PEER], median[READING], median[STEP_OF_14], median[STEP_OF_256]);
        fflush(stdout);
    }
}

// A step over this many rows of a made-up text.
static void prepare(Step *step, Sequence *s, const Model *m, int n_rows) {
    int tokens[MANY + 1];
    for (int i = 0; i <= n_rows; i++)
        tokens[i] = i * 97 + 1;
    *s = sequence_new((Noise){0});
    step_init(step, m, n_rows);
    step_add(step, s, tokens, n_rows + 1, 0);
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
    if (argc != 1 && argc != 3)
        die(2, "usage: bench [LLAMA2C TOKENIZER]");
    c.n_kv_heads = c.n_heads;
    Model models[N_STORAGES];
    for (c.storage = 0; c.storage < N_STORAGES; c.storage++)
        make_model(&models[c.storage], c);
    const Model *m = &models[FP32];
    printf("a model of %.0f MB, %d layers of %d\n", (double)m->file_bytes / 1e6, c.n_layers, c.dim);
    fflush(stdout);

    static double ratios[N_RATIOS][ROUNDS];
    Step lesson, many;
    Sequence sequences[2];
    prepare(&lesson, &sequences[0], m, ROWS);
    prepare(&many, &sequences[1], m, MANY);
    const float *end = (const float *)((const char *)m->file + m->file_bytes);
    measure(ratios, &lesson, &many, m->layers[0].w[TOK_EMB].data, end);
    print_ratios(ratios);

    char peer_model[32];
    const char *const *peer = argc == 3 ? (const char *const *)argv + 1 : NULL;
    if (peer && !write_for_llama2c(m, peer_model))
        die(1, "%s cannot be written", peer_model);
    print_threads(models, &lesson, &many, peer, peer_model);
    if (peer)
        unlink(peer_model);
    step_free(&lesson);
    step_free(&many);
    for (int i = 0; i < 2; i++)
        sequence_free(m, &sequences[i]);
    for (int i = 0; i < N_STORAGES; i++)
        model_close(&models[i]);
    return 0;
}
