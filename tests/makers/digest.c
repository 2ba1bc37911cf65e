/* digest.c - what the models of testing.h and hamlet.bin compute, as one hash a line: digest
 *
 * A hash is FNV-1a of the raw bytes, 64 bits. As every sum has one order and every rounding is
 * that of a float, the lines are the same with every compiler, on every processor, on any number of
 * threads: those of digest.txt. After a change that is meant to change numbers, `make digest` writes
 * them anew; portability.sh compares them on all machines that it can have.
 */
#define NO_CRITERION
#define TRAIN_STEP_LIBRARY
#include "../../train_step.c"
#include "../unit/testing.h"

enum { N_READ = 24, N_WRITTEN = 48 };

typedef struct {
    const char *name;
    const FileHeader *header;
    int n_rows; // of BIG as many as make every loop use its threads
} Subject;
static const Subject SUBJECTS[] = {{"G", &G, N_READ}, {"M", &M, N_READ}, {"BIG", &BIG, 64}};
enum { N_SUBJECTS = 3, MOST_READ = 64 };

static uint64_t hash(uint64_t before, const void *data, size_t n) {
    const unsigned char *bytes = data;
    for (size_t i = 0; i < n; i++)
        before = (before ^ bytes[i]) * 0x100000001B3u;
    return before;
}
static const uint64_t NOTHING = 0xCBF29CE484222325u; // the hash of no bytes

__attribute__((format(printf, 2, 3))) static void line(uint64_t hash, const char *format, ...) {
    va_list args;
    va_start(args, format);
    printf("%016llx  ", (unsigned long long)hash);
    vprintf(format, args);
    puts("");
    va_end(args);
}

// The tokens that are read, (n_rows).
static const int *tokens_to_read(const Subject *subject) {
    static int tokens[MOST_READ];
    for (int i = 0; i < subject->n_rows; i++)
        tokens[i] = (i * i * 29 + i + 7) % subject->header->vocab_size;
    return tokens;
}

// Reads a text as one block, and prints what became of it.
static void digest_reading(const char *name, Bench *b, const Subject *subject, Sequence *s,
                           Run *run) {
    const Config *c = &b->model.config;
    uint64_t cache = NOTHING;
    read_block(run, s, tokens_to_read(subject), subject->n_rows, DRUGGED | ALL_LOGITS);
    size_t n_cache = (size_t)s->length * (size_t)c->kv_dim * sizeof(float);
    size_t n_logits = (size_t)s->length * (size_t)c->vocab_size * sizeof(float);
    for (int l = 0; l < c->n_layers; l++) {
        cache = hash(cache, s->k[l], n_cache);
        cache = hash(cache, s->v[l], n_cache);
    }
    line(hash(NOTHING, run->logits, n_logits), "%s, logits", name);
    line(cache, "%s, cache", name);
}

// Goes on with sampled tokens until the context is full.
static void digest_sampling(const char *name, Bench *b, Sequence *s, Run *run, const float *logits) {
    const Dice dice = {.temperature = 1.5, .top_p = .9};
    const Config *c = &b->model.config;
    uint64_t tokens = NOTHING;
    while (s->length < c->seq_len) {
        int token = choose(logits, c->vocab_size, &dice, SEED, s->length - 1);
        tokens = hash(tokens, &token, sizeof token);
        logits = feed(run, s, &token, 1, DRUGGED | WANTS_LOGITS);
    }
    line(tokens, "%s, sampled tokens", name);
}

// A step on the text: the gradients of all tensors, and the logits after steps.
static void digest_step(const char *name, Bench *b, const Subject *subject, Noise noise) {
    static const float sizes[] = {1e-3f, .1f};
    const Config *c = &b->model.config;
    Step step;
    Stepped stepped;
    Sequence s = sequence_new(noise);
    step_init(&step, &b->model, subject->n_rows);
    step_add(&step, &s, tokens_to_read(subject), subject->n_rows, DRUGGED);
    step_take(&step);
    uint64_t gradients = NOTHING;
    int layer, which, n_out, n_in;
    for (int i = 0; tensor_at(c, i, &layer, &which); i++) {
        tensor_shape(c, which, &n_out, &n_in);
        float *gradient = resize(NULL, (ptrdiff_t)n_out * n_in, sizeof *gradient);
        add_gradient(&step, gradient, 1, layer, which, 0, n_out);
        gradients = hash(gradients, gradient, (size_t)n_out * (size_t)n_in * sizeof *gradient);
        free(gradient);
    }
    line(gradients, "%s, gradients of all tensors", name);
    stepped_init(&stepped, &step, subject->n_rows);
    for (int i = 0; i < 2; i++) {
        char after[96];
        Sequence read = sequence_new(noise);
        read.step_size = sizes[i];
        snprintf(after, sizeof after, "%s, after a step of %g", name, (double)sizes[i]);
        digest_reading(after, b, subject, &read, &stepped.run);
        sequence_free(&b->model, &read);
    }
    stepped_free(&stepped);
    step_free(&step);
    sequence_free(&b->model, &s);
}

// Sober, each of the first five sites alone, and all five: what is read and what is written. Sober and
// with all five also a step. (A site that is added changes no line of this.)
static void digest_model(const Subject *subject, int family) {
    Bench b;
    bench_open(&b, *subject->header, subject->n_rows);
    const Config *c = &b.model.config;
    for (int sites = 0; sites <= GOLDEN_SITES; sites++) {
        char name[64];
        bool alone = sites && !(sites & (sites - 1));
        if (!(alone || sites == GOLDEN_SITES || (sites == 0 && family == FAMILY_CENTRED)))
            continue;
        snprintf(name, sizeof name, "%s, %s%s", subject->name, site_letters(sites),
                 family == FAMILY_UPSTREAM ? " upstream" : "");
        Noise noise = bench_noise(&b, sites, family);
        Sequence s = sequence_new(noise);
        digest_reading(name, &b, subject, &s, &b.run);
        const float *last = b.run.logits + (ptrdiff_t)(subject->n_rows - 1) * c->vocab_size;
        if (s.length < c->seq_len)
            digest_sampling(name, &b, &s, &b.run, last);
        if (!alone)
            digest_step(name, &b, subject, noise);
        sequence_free(&b.model, &s);
    }
    bench_close(&b);
}

// The text that the embedded model writes behind "To be".
static void digest_hamlet(const char *path) {
    Model m;
    Run run;
    Sequence s = sequence_new((Noise){0});
    int n;
    if (!model_open(&m, path))
        die(1, "%s: %s", path, m.error);
    int *prompt = tokens_of(&m, "To be", &n);
    run_init(&run, &m, n, 1);
    uint64_t text = NOTHING;
    const float *logits = feed(&run, &s, prompt, n, WANTS_LOGITS);
    for (int i = 0; i < N_WRITTEN; i++) {
        int token = argmax(logits, m.config.vocab_size);
        text = hash(text, string_at(&m, token).bytes, (size_t)string_at(&m, token).length);
        logits = feed(&run, &s, &token, 1, WANTS_LOGITS);
    }
    line(text, "what %s writes behind \"To be\"", path);
    line(hash(NOTHING, logits, (size_t)m.config.vocab_size * sizeof *logits), "its logits then");
    free(prompt);
    run_free(&run);
    sequence_free(&m, &s);
    model_close(&m);
}

int main(void) {
    program = "digest";
    for (int i = 0; i < N_SUBJECTS; i++)
        for (int family = FAMILY_CENTRED; family <= FAMILY_UPSTREAM; family++)
            digest_model(&SUBJECTS[i], family);
    digest_hamlet("tests/hamlet.bin");
    return 0;
}
