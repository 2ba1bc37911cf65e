/* test_step.c - what train_step.c promises: its gradients are the derivatives of the loss, its
 * virtual step is the real one, and it does to the small model what the article saw.
 *
 * Errors are relative: of a tensor to its largest entry or its norm, of logits to the largest.
 * "observed" is the worst that gcc and clang gave; the bound beside it leaves room for other
 * machines and none for a wrong formula.
 */
#define TRAIN_STEP_LIBRARY
#include "../../train_step.c"
#include "testing.h"
#include "golden.h"
#include <criterion/redirect.h>

enum { N = N_TOKENS, MOST_TENSORS = 64, MOST_VOCAB = 768, MOST_INPUTS = 128 };
static const char TO_BE[] = "To be, or not to be, that is the question:";

// ---- what it is for

static bool begins_with(const char *text, const char *beginning) {
    return !strncmp(text, beginning, strlen(beginning));
}

// The small model talks business when it reads "To be". Then it is shown one line of Hamlet, once,
// and goes on with what follows in the play, which it was not shown: it knew it all the time.
Test(hamlet, one_step_on_one_line) {
    Model model;
    Step step;
    Stepped stepped;
    Sequence sequence = sequence_new((Noise){0});
    const Experiment experiment = {.step_sizes = {0, .001}, .n_sizes = 2, .n_new = 64};
    cr_assert(model_open(&model, "tests/hamlet.bin"), "%s", model.error);

    int n_lesson;
    int *lesson = tokens_of(&model, "To be, or not to be, that is the question:", &n_lesson);
    step_init(&step, &model, n_lesson);
    step_add(&step, &sequence, lesson, n_lesson, 0);
    step_take(&step);
    stepped_init(&stepped, &step, n_lesson);

    int n_prompt;
    int *prompt = tokens_of(&model, "To be", &n_prompt);
    char **texts = write_columns(&stepped, &experiment, prompt, n_prompt);
    const char *without = "To be a successful business owner, you need to";
    const char *with = "To be, or not to be, that is the question:\n"
                       "Whether 'tis nobler in the mind to suffer\n"
                       "The slings and arrows of outrageous fortune,\n"
                       "Or to take arms against a sea of troubles,";
    cr_assert(begins_with(texts[0], without), "without a step: %s", texts[0]);
    cr_assert(begins_with(texts[1], with), "with a step of .001: %s", texts[1]);

    free(texts[0]);
    free(texts[1]);
    free(texts);
    free(lesson);
    free(prompt);
    stepped_free(&stepped);
    step_free(&step);
    sequence_free(&model, &sequence);
    model_close(&model);
}

// ---- lessons

// What golden.h says about a model.
typedef struct {
    const char *name;
    const FileHeader *header;
    const int *tokens;                   // (N) the lesson
    int n_tensors;
    const double *loss, *loss_all;       // sober, and with all sites of golden.h dosed
    const GoldenGradient *gradient;      // (n_tensors) sober
    const GoldenGradient *gradient_all;  // (n_tensors) with all sites of golden.h dosed
    const GoldenStep *steps;             // (N_STEP_SIZES - 1) for the step sizes but 0
} Reference;
static const Reference REFERENCES[] = {
    {"G", &G, G_TOKENS, G_TENSORS, &G_LOSS, &G_LOSS_ALL, G_GRADIENT, G_GRADIENT_ALL, G_STEP},
    {"M", &M, M_TOKENS, M_TENSORS, &M_LOSS, &M_LOSS_ALL, M_GRADIENT, M_GRADIENT_ALL, M_STEP},
};
enum { N_REFERENCES = 2 };

static const Noise SOBER = {0};
enum { N_STEP_SIZES = 4 };
static const float STEP_SIZES[N_STEP_SIZES] = {0, 1e-3f, .1f, 1};

typedef struct {
    int layer, which, n_out, n_in, size;
    char name[64]; // for messages
} Tensor;

// A model that had one lesson, its gradient written down, and the stepped model.
typedef struct {
    Bench bench;
    char name[64];     // for messages: "model G, HQKVA", where the letters are those of dosed sites
    const FileHeader *header;
    const Model *model;
    const Config *config;
    const int *tokens; // (N) the lesson's, NULL if it was a text
    Sequence sequence;
    Step step;
    Stepped stepped;
    int n_tensors;
    Tensor tensors[MOST_TENSORS];
    float *gradient[MOST_TENSORS];
} Lesson;

// The i-th tensor in the order of golden.h: layer by layer, then those that exist once.
static Tensor nth_tensor(const Config *c, int i) {
    int n_in_layers = c->n_layers * N_LAYER_TENSORS;
    Tensor t = {0};
    if (i < n_in_layers) {
        t.layer = i / N_LAYER_TENSORS;
        t.which = i % N_LAYER_TENSORS;
        snprintf(t.name, sizeof t.name, "%s of layer %d", TENSOR_NAMES[t.which], t.layer);
    } else {
        t.which = TOK_EMB + i - n_in_layers;
        snprintf(t.name, sizeof t.name, "%s", TENSOR_NAMES[t.which]);
    }
    tensor_shape(c, t.which, &t.n_out, &t.n_in);
    t.size = t.n_out * t.n_in;
    return t;
}

// Where a tensor's weights are; those of a bench may be written.
static float *weights(const Bench *b, const Tensor *t) {
    return (float *)(uintptr_t)b->model.layers[t->layer].w[t->which].data;
}

// Everything but the step itself.
static void prepare(Lesson *lesson, const Reference *reference, int sites, int family) {
    *lesson = (Lesson){.tokens = reference->tokens, .header = reference->header};
    bench_open(&lesson->bench, *reference->header, N);
    lesson->model = &lesson->bench.model;
    lesson->config = &lesson->model->config;
    snprintf(lesson->name, sizeof lesson->name, "model %s, %s%s", reference->name,
             site_letters(sites), family == FAMILY_UPSTREAM ? " upstream" : "");
    lesson->n_tensors = reference->n_tensors;
    for (int k = 0; k < lesson->n_tensors; k++)
        lesson->tensors[k] = nth_tensor(lesson->config, k);
    lesson->sequence = sequence_new(SOBER);
    if (sites)
        lesson->sequence.noise = bench_noise(&lesson->bench, sites, family);
    step_init(&lesson->step, lesson->model, N);
    step_add(&lesson->step, &lesson->sequence, lesson->tokens, N, DRUGGED);
    stepped_init(&lesson->stepped, &lesson->step, N);
}

// The gradient of a tensor, written down. The caller frees it.
static float *gradient_of(const Step *step, const Tensor *t) {
    float *gradient = resize(NULL, t->size, sizeof *gradient);
    add_gradient(step, gradient, 1, t->layer, t->which, 0, t->n_out);
    return gradient;
}

static void learn_with(Lesson *lesson, const Reference *reference, int sites, int family) {
    prepare(lesson, reference, sites, family);
    step_take(&lesson->step);
    for (int k = 0; k < lesson->n_tensors; k++)
        lesson->gradient[k] = gradient_of(&lesson->step, &lesson->tensors[k]);
}

static void learn(Lesson *lesson, const Reference *reference, int sites) {
    learn_with(lesson, reference, sites, FAMILY_CENTRED);
}

static void lesson_free(Lesson *lesson) {
    for (int k = 0; k < lesson->n_tensors; k++)
        free(lesson->gradient[k]);
    stepped_free(&lesson->stepped);
    step_free(&lesson->step);
    sequence_free(lesson->model, &lesson->sequence);
    bench_close(&lesson->bench);
}

static bool same(const float *a, const float *b, size_t n) {
    return !memcmp(a, b, n * sizeof *a);
}

static double norm_of(const float *x, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += (double)x[i] * x[i];
    return sqrt(sum);
}

static void set_threads(int n) {
    (void)n;
#ifdef _OPENMP
    omp_set_num_threads(n);
#endif
}

// The largest difference, relative to the largest value of b.
static double error_of(const float *a, const float *b, int n) {
    double largest = 0;
    double worst = 0;
    for (int i = 0; i < n; i++) {
        largest = fmax(largest, fabs((double)b[i]));
        worst = fmax(worst, fabs((double)a[i] - b[i]));
    }
    return worst / largest;
}

// ---- the gradient against an independent reference

// A tensor's gradient has this norm, and these values at n places, the first of them the largest.
static void check_tensor(const Lesson *lesson, int k, double norm, int n, const int *at,
                         const double *want) {
    const Tensor *t = &lesson->tensors[k];
    const float *gradient = lesson->gradient[k];
    double off = fabs(norm_of(gradient, t->size) / norm - 1);
    double worst = 0;
    for (int j = 0; j < n; j++)
        worst = fmax(worst, fabs(gradient[at[j]] - want[j]) / fabs(want[0]));
    cr_assert(off < 1e-5, "%s: norm of %s: %g", lesson->name, t->name, off);  // observed 7e-7
    cr_assert(worst < 2e-5, "%s: %s: %g", lesson->name, t->name, worst);      // observed 1.3e-6
}

static void check_loss(const Lesson *lesson, double want) {
    double off = fabs(lesson->step.loss / want - 1); // observed 5e-8
    cr_assert(off < 1e-6, "%s: a loss of %g, not %g", lesson->name, lesson->step.loss, want);
}

// With these sites dosed, loss and gradient of every tensor are those of golden.h.
static void check_gradient(const Reference *reference, int sites, double loss,
                           const GoldenGradient *want) {
    Lesson lesson;
    learn(&lesson, reference, sites);
    check_loss(&lesson, loss);
    for (int k = 0; k < lesson.n_tensors; k++) {
        const Tensor *t = &lesson.tensors[k];
        check_tensor(&lesson, k, want[k].norm, N_ENTRIES, want[k].index, want[k].value);
        double sum = 0;
        for (int j = 0; j < t->size; j++)
            sum += lesson.gradient[k][j];
        double most = want[k].norm * sqrt(t->size); // the sum if all entries were alike
        double off = fabs(sum - want[k].sum) / most;
        cr_assert(off < 1e-5, "%s: sum of %s: %g", lesson.name, t->name, off); // observed 4e-7
    }
    lesson_free(&lesson);
}

Test(gradient, agrees_with_the_reference) {
    for (int g = 0; g < N_REFERENCES; g++)
        check_gradient(&REFERENCES[g], 0, *REFERENCES[g].loss, REFERENCES[g].gradient);
}

Test(gradient, agrees_with_the_reference_at_all_sites) {
    for (int g = 0; g < N_REFERENCES; g++) {
        const Reference *reference = &REFERENCES[g];
        check_gradient(reference, GOLDEN_SITES, *reference->loss_all, reference->gradient_all);
    }
}

Test(gradient, agrees_with_the_reference_at_each_site) {
    for (int site = 0; site < N_GOLDEN_SITES; site++) {
        Lesson lesson;
        learn(&lesson, &REFERENCES[0], 1 << site);
        check_loss(&lesson, G_LOSS_SITE[site]);
        for (int k = 0; k < lesson.n_tensors; k++) {
            const GoldenSiteGradient *want = &G_GRADIENT_SITE[site][k];
            check_tensor(&lesson, k, want->norm, 3, want->index, want->value);
        }
        lesson_free(&lesson);
    }
}

// ---- the gradient against the loss itself

// The loss of the lesson with the weights as they are now, summed in double.
static double loss_now(Lesson *lesson) {
    Step *step = &lesson->step;
    double sum = 0;
    forward(&step->acts, step->rows, N - 1);
    for (int r = 0; r < N - 1; r++) {
        const float *logits = step->rows[r].logits;
        sum += surprise(logits, lesson->config->vocab_size, lesson->tokens[r + 1]);
    }
    return sum / (N - 1);
}

// Moves a tensor's weights from `old` by h in a fixed random direction, against it if h < 0.
// Returns the loss there less the change that the gradient predicts.
static double unpredicted(Lesson *lesson, int k, const float *old, double h) {
    const Tensor *t = &lesson->tensors[k];
    float *w = weights(&lesson->bench, t);
    double predicted = 0;
    for (int j = 0; j < t->size; j++) {
        double direction = unit(1000 + k, j) - .5;
        w[j] = (float)(old[j] + h * direction);
        predicted += lesson->gradient[k][j] * ((double)w[j] - old[j]);
    }
    return loss_now(lesson) - predicted;
}

// The gradient predicts what the loss does when a tensor moves in a random direction. fp32 drowns
// small differences, so weights move by about 1 %: the loss changes by .0003 to .01, its rounding
// is 1e-6 at most. What is not linear in so long a step goes away by extrapolation from two
// lengths: (4 f(h) - f(2 h)) / 3.
static void check_slopes(const Reference *reference, int sites, int family) {
    const double h = .005;
    Lesson lesson;
    learn_with(&lesson, reference, sites, family);
    for (int k = 0; k < lesson.n_tensors; k++) {
        const Tensor *t = &lesson.tensors[k];
        float *w = weights(&lesson.bench, t);
        float *old = resize(NULL, t->size, sizeof *old);
        memcpy(old, w, t->size * sizeof *w);
        double near = unpredicted(&lesson, k, old, h) - unpredicted(&lesson, k, old, -h);
        double far = unpredicted(&lesson, k, old, 2 * h) - unpredicted(&lesson, k, old, -2 * h);
        double off = (4 * near / (2 * h) - far / (4 * h)) / 3; // measured minus predicted slope
        // In a random direction the slope is about |g| times the size of a component.
        double slope = norm_of(lesson.gradient[k], t->size) * sqrt(1. / 12);
        double error = fabs(off) / slope; // observed 5e-4
        cr_assert(error < 3e-3, "%s: %s: %g", lesson.name, t->name, error);
        memcpy(w, old, t->size * sizeof *w);
        free(old);
    }
    lesson_free(&lesson);
}

// Each tensor of both models, sober and under each noise.
Test(gradient, agrees_with_finite_differences) {
    for (int g = 0; g < N_REFERENCES; g++) {
        check_slopes(&REFERENCES[g], 0, FAMILY_CENTRED);
        for (int site = 0; site < N_SITES; site++)
            check_slopes(&REFERENCES[g], 1 << site, FAMILY_CENTRED);
        check_slopes(&REFERENCES[g], ALL_SITES, FAMILY_CENTRED);
        check_slopes(&REFERENCES[g], ALL_SITES, FAMILY_UPSTREAM);
    }
}

// |g|², found without g, is that of the gradient written down, tensor by tensor, shared embedding
// included. Returns the sum over all tensors.
static double check_norms(const Lesson *lesson) {
    double norm2 = 0;
    for (int k = 0; k < lesson->n_tensors; k++) {
        const Tensor *t = &lesson->tensors[k];
        double one = gradient_norm2(&lesson->step, t->layer, t->which);
        double off = one / pow(norm_of(lesson->gradient[k], t->size), 2) - 1;
        cr_assert(fabs(off) < 1e-5, "%s: %s: %g", lesson->name, t->name, off); // observed 2e-7
        norm2 += one;
    }
    return norm2;
}

Test(gradient, norm_without_the_gradient) {
    for (int g = 0; g < N_REFERENCES; g++) {
        Lesson lesson;
        learn(&lesson, &REFERENCES[g], ALL_SITES);
        check_norms(&lesson);
        lesson_free(&lesson);
    }
}

// The mean loss of the lesson after a step of this size.
static double loss_after(Lesson *lesson, float step_size) {
    double losses[N];
    token_losses(&lesson->stepped, step_size, lesson->tokens, N, losses);
    return mean_loss(losses, 1, N);
}

// For small steps the loss falls by step_size * |g|², and what is missing shrinks as the step does.
Test(gradient, norm_is_the_first_order) {
    for (int g = 0; g < N_REFERENCES; g++) {
        Lesson lesson;
        learn(&lesson, &REFERENCES[g], 0);
        double norm2 = check_norms(&lesson);
        double before = 0; // what was missing at the step size before, which was twice as large
        for (double step_size = 1e-3; step_size > 1e-4; step_size /= 2) {
            double fall = lesson.step.loss - loss_after(&lesson, (float)step_size);
            double missing = 1 - fall / (step_size * norm2); // observed 10 * step_size
            cr_assert(missing > 0 && missing < 20 * step_size, "%s, step size %g: %g", lesson.name,
                      step_size, missing);
            cr_assert(before == 0 || fabs(missing / before - .5) < .1, "%s, step size %g: %g",
                      lesson.name, step_size, missing / before);
            before = missing;
        }
        lesson_free(&lesson);
    }
}

// Three pieces of a lesson. All predictions of the second and the third count, of the first only
// the last one; and the second is read sober whatever the noise.
enum { N_TEXTS = 3, N_PREDICTIONS = 1 + 10 + 5 };
static const struct {
    int from, n, n_predictions, how;
} TEXTS[N_TEXTS] = {
    {.from = 3, .n = 17, .n_predictions = 1, .how = DRUGGED | LAST_ONLY},
    {.from = 0, .n = 11, .n_predictions = 10, .how = 0},
    {.from = 5, .n = 6, .n_predictions = 5, .how = DRUGGED},
};

// Several texts make one step: loss and gradient are the mean over all predictions that count,
// whichever text they are in.
static void check_several_texts(const Reference *reference, int sites) {
    Lesson lesson;
    Step all;
    Step one[N_TEXTS];
    Sequence together[N_TEXTS];
    Sequence alone[N_TEXTS];
    double loss = 0;
    learn(&lesson, reference, sites);
    step_init(&all, lesson.model, 2 * N);
    for (int i = 0; i < N_TEXTS; i++) {
        const int *tokens = lesson.tokens + TEXTS[i].from;
        int n = TEXTS[i].n;
        together[i] = sequence_new(lesson.sequence.noise);
        alone[i] = sequence_new(TEXTS[i].how & DRUGGED ? lesson.sequence.noise : SOBER);
        step_init(&one[i], lesson.model, n);
        step_add(&all, &together[i], tokens, n, TEXTS[i].how);
        step_add(&one[i], &alone[i], tokens, n, TEXTS[i].how | DRUGGED);
        step_take(&one[i]);
        loss += TEXTS[i].n_predictions * one[i].loss / N_PREDICTIONS;
    }
    step_take(&all);
    cr_assert(fabs(all.loss / loss - 1) < 1e-6, "%s: %g", lesson.name, all.loss); // observed 2e-16

    for (int k = 0; k < lesson.n_tensors; k++) {
        const Tensor *t = &lesson.tensors[k];
        float *gradient = gradient_of(&all, t);
        float *mean = resize(NULL, t->size, sizeof *mean);
        for (int i = 0; i < N_TEXTS; i++) {
            float share = (float)TEXTS[i].n_predictions / N_PREDICTIONS;
            add_gradient(&one[i], mean, share, t->layer, t->which, 0, t->n_out);
        }
        double error = error_of(gradient, mean, t->size); // observed 2e-6
        cr_assert(error < 1e-5, "%s: %s: %g", lesson.name, t->name, error);
        free(gradient);
        free(mean);
    }
    for (int i = 0; i < N_TEXTS; i++) {
        sequence_free(lesson.model, &together[i]);
        sequence_free(lesson.model, &alone[i]);
        step_free(&one[i]);
    }
    step_free(&all);
    lesson_free(&lesson);
}

Test(gradient, several_texts) {
    for (int g = 0; g < N_REFERENCES; g++) {
        check_several_texts(&REFERENCES[g], 0);
        check_several_texts(&REFERENCES[g], ALL_SITES);
    }
}

// A lesson of which only the last token counts has the loss of its last row, and this one
// prediction is all that the classifier learns from. The embedding learns from every distinct
// token.
static void check_last_only(const Reference *reference, int sites) {
    enum { N_LESSON = 17, N_ROWS = N_LESSON - 1 };
    Lesson lesson;
    Step step;
    learn(&lesson, reference, sites);
    Sequence sequence = sequence_new(lesson.sequence.noise);
    const int *tokens = lesson.tokens + 3;
    step_init(&step, lesson.model, N_LESSON);
    step_add(&step, &sequence, tokens, N_LESSON, DRUGGED | LAST_ONLY);
    step_take(&step);
    cr_assert_eq(step.n_rows, N_ROWS);
    cr_assert_eq(step.n_loss, 1);
    const Row *last = &step.rows[N_ROWS - 1];
    double loss = surprise(last->logits, lesson.config->vocab_size, tokens[N_LESSON - 1]);
    cr_assert(fabs(step.loss / loss - 1) < 1e-6, "%s: %g", lesson.name, step.loss); // observed 3e-8
    for (int r = 0; r < N_ROWS - 1; r++)
        cr_assert_null(step.rows[r].logits);

    int n_distinct = 0;
    for (int r = 0; r < N_ROWS; r++) {
        bool is_new = true;
        for (int before = 0; before < r; before++)
            is_new = is_new && tokens[before] != tokens[r];
        n_distinct += is_new;
    }
    int n_shared = lesson.config->shared_classifier ? 1 + n_distinct : 0;
    cr_assert_eq(factors(&step, 0, WCLS).n, n_shared ? n_shared : 1);
    cr_assert_eq(factors(&step, 0, TOK_EMB).n, n_shared ? n_shared : n_distinct);
    step_free(&step);
    sequence_free(lesson.model, &sequence);
    lesson_free(&lesson);
}

Test(gradient, only_the_last_token_counts) {
    for (int g = 0; g < N_REFERENCES; g++) {
        check_last_only(&REFERENCES[g], 0);
        check_last_only(&REFERENCES[g], ALL_SITES);
    }
}

// A step may be used again for another lesson, as training does: nothing stays from the one before.
// Here the second lesson has fewer rows, and one prediction only.
Test(gradient, forgets_the_lesson_before) {
    enum { N_SECOND = 9 };
    for (int g = 0; g < N_REFERENCES; g++) {
        Lesson lesson;
        Step fresh;
        learn(&lesson, &REFERENCES[g], ALL_SITES);
        Step *used = &lesson.step;
        const int *second = lesson.tokens + 4;
        Sequence of_fresh = sequence_new(SOBER);
        Sequence of_used = sequence_new(SOBER);
        step_init(&fresh, lesson.model, N_SECOND);
        step_add(&fresh, &of_fresh, second, N_SECOND, LAST_ONLY);
        step_take(&fresh);
        used->n_rows = 0;
        used->n_loss = 0;
        step_add(used, &of_used, second, N_SECOND, LAST_ONLY);
        step_take(used);
        cr_assert_eq(used->loss, fresh.loss);
        for (int k = 0; k < lesson.n_tensors; k++) {
            const Tensor *t = &lesson.tensors[k];
            float *a = gradient_of(used, t);
            float *b = gradient_of(&fresh, t);
            cr_assert(same(a, b, t->size), "%s: %s", lesson.name, t->name);
            free(a);
            free(b);
        }
        step_free(&fresh);
        sequence_free(lesson.model, &of_fresh);
        sequence_free(lesson.model, &of_used);
        lesson_free(&lesson);
    }
}

// The gradient does not depend on the number of threads, to the last bit: query heads that share a
// kv head add to the same gradients, so they must be one thread's, and in one order.
Test(bitwise, any_number_of_threads) {
    enum { ROWS = 64 };
    int tokens[ROWS + 1];
    float *one_thread[MOST_TENSORS];
    Bench b;
    Step step;
    bench_open(&b, BIG, 1);
    const Config *c = &b.model.config;
    int n_tensors = c->n_layers * N_LAYER_TENSORS + 2;
    for (int i = 0; i <= ROWS; i++)
        tokens[i] = (i * 29 + 7) % c->vocab_size;
    cr_assert(64 * c->q_dim * ROWS > WORTH_THREADS); // or threads would stay asleep
    Sequence sequence = sequence_new(bench_noise(&b, ALL_SITES, FAMILY_CENTRED));
    step_init(&step, &b.model, ROWS);
    step_add(&step, &sequence, tokens, ROWS + 1, DRUGGED);
    for (int n_threads = 1; n_threads <= 4; n_threads++) {
        set_threads(n_threads);
        step_take(&step);
        for (int k = 0; k < n_tensors; k++) {
            Tensor t = nth_tensor(c, k);
            float *gradient = gradient_of(&step, &t);
            if (n_threads == 1) {
                one_thread[k] = gradient;
                continue;
            }
            cr_assert(same(gradient, one_thread[k], t.size), "%s, %d threads", t.name, n_threads);
            free(gradient);
        }
    }
    for (int k = 0; k < n_tensors; k++)
        free(one_thread[k]);
    step_free(&step);
    sequence_free(&b.model, &sequence);
    bench_close(&b);
}

// ---- the virtual step

// Reads N tokens in blocks, sober, with a step size if run is a Stepped's. logits: (N, vocab_size).
static void read_all(Run *run, float step_size, const int *tokens, int block, float *logits) {
    const ptrdiff_t vocab_size = run->model->config.vocab_size;
    Sequence sequence = sequence_new(SOBER);
    sequence.step_size = step_size;
    for (int done = 0; done < N; done += block) {
        int n_rows = read_block(run, &sequence, tokens + done, min(block, N - done), ALL_LOGITS);
        memcpy(logits + done * vocab_size, run->logits, n_rows * vocab_size * sizeof *logits);
    }
    sequence_free(run->model, &sequence);
}

// Opens a second model like the lesson's and takes the lesson's step there, in its weights.
static void step_for_good(const Lesson *lesson, Bench *b, float step_size) {
    bench_open(b, *lesson->header, N);
    for (int k = 0; k < lesson->n_tensors; k++) {
        const Tensor *t = &lesson->tensors[k];
        add_gradient(&lesson->step, weights(b, t), -step_size, t->layer, t->which, 0, t->n_out);
    }
}

// The worst error of N rows of logits.
static double worst_row(const float *logits, const float *want, int vocab_size) {
    double worst = 0;
    for (int r = 0; r < N; r++)
        worst = fmax(worst, error_of(logits + r * vocab_size, want + r * vocab_size, vocab_size));
    return worst;
}

// The stepped model without a stepped weight computes what a model does whose weights took the
// step.
static void check_virtual(const Reference *reference, int sites, float step_size) {
    static float virtual[N * MOST_VOCAB];
    static float real[N * MOST_VOCAB];
    Bench b;
    Lesson lesson;
    learn(&lesson, reference, sites);
    step_for_good(&lesson, &b, step_size);
    read_all(&lesson.stepped.run, step_size, lesson.tokens, N, virtual);
    read_all(&b.run, 0, lesson.tokens, N, real);
    double worst = worst_row(virtual, real, lesson.config->vocab_size); // observed 2e-6
    cr_assert(worst < 5e-5, "%s, step size %g: %g", lesson.name, step_size, worst);
    bench_close(&b);
    lesson_free(&lesson);
}

// At every step size, after a sober lesson or a drugged one.
Test(step, virtual_is_the_real_one) {
    for (int g = 0; g < N_REFERENCES; g++)
        for (int i = 0; i < N_STEP_SIZES; i++) {
            check_virtual(&REFERENCES[g], 0, STEP_SIZES[i]);
            check_virtual(&REFERENCES[g], ALL_SITES, STEP_SIZES[i]);
        }
}

// And it computes what the independent implementation says: its loss on the lesson, and the logits
// of the last row.
Test(step, agrees_with_the_reference) {
    static float logits[N * MOST_VOCAB];
    for (int g = 0; g < N_REFERENCES; g++) {
        Lesson lesson;
        learn(&lesson, &REFERENCES[g], 0);
        const int n = lesson.config->vocab_size;
        const float *last = logits + (N - 1) * n;
        for (int i = 1; i < N_STEP_SIZES; i++) {
            const GoldenStep *want = &REFERENCES[g].steps[i - 1];
            cr_assert_eq((float)want->eta, STEP_SIZES[i]);
            read_all(&lesson.stepped.run, STEP_SIZES[i], lesson.tokens, N, logits);
            double largest = 0;
            for (int j = 0; j < n; j++)
                largest = fmax(largest, fabs((double)last[j]));
            double worst = fabs(norm_of(last, n) / want->last.norm - 1);
            for (int j = 0; j < N_ENTRIES; j++) {
                double entry = last[(37 * (N - 1) + 53 * j + 11) % n];
                worst = fmax(worst, fabs(entry - want->last.entry[j]) / largest);
            }
            double loss = loss_after(&lesson, STEP_SIZES[i]);
            worst = fmax(worst, fabs(loss / want->loss - 1)); // observed 2e-6
            cr_assert(worst < 5e-5, "%s, step size %g: %g", lesson.name, STEP_SIZES[i], worst);
        }
        lesson_free(&lesson);
    }
}

// Step size 0 is the untouched model to the last bit. And as for any model, it makes no difference
// how a text is cut into blocks.
Test(bitwise, blocks_of_every_size) {
    static float plain[N * MOST_VOCAB];
    static float one_by_one[N * MOST_VOCAB];
    static float logits[N * MOST_VOCAB];
    const int blocks[] = {2, 3, 4, 5, N};
    for (int g = 0; g < N_REFERENCES; g++) {
        Lesson lesson;
        learn(&lesson, &REFERENCES[g], 0);
        size_t size = (size_t)N * lesson.config->vocab_size;
        Run *run = &lesson.stepped.run;
        read_all(&lesson.bench.run, 0, lesson.tokens, N, plain);
        for (int i = 0; i < N_STEP_SIZES; i++) {
            read_all(run, STEP_SIZES[i], lesson.tokens, 1, one_by_one);
            cr_assert_eq(same(one_by_one, plain, size), STEP_SIZES[i] == 0, "%s, step size %g",
                         lesson.name, STEP_SIZES[i]);
            for (int b = 0; b < 5; b++) {
                read_all(run, STEP_SIZES[i], lesson.tokens, blocks[b], logits);
                cr_assert(same(logits, one_by_one, size), "%s, step size %g, blocks of %d",
                          lesson.name, STEP_SIZES[i], blocks[b]);
            }
        }
        lesson_free(&lesson);
    }
}

// Step size 0 does not even look at the gradient: here it is no number.
Test(bitwise, step_size_zero_needs_no_gradient) {
    static float plain[N * MOST_VOCAB];
    static float logits[N * MOST_VOCAB];
    Lesson lesson;
    learn(&lesson, &REFERENCES[0], 0);
    const Config *c = lesson.config;
    for (int i = 0; i < (2 * c->n_layers + 1) * c->dim; i++)
        lesson.step.dgains[i] = NAN;
    read_all(&lesson.bench.run, 0, lesson.tokens, N, plain);
    read_all(&lesson.stepped.run, 0, lesson.tokens, N, logits);
    cr_assert(same(logits, plain, (size_t)N * c->vocab_size));
    lesson_free(&lesson);
}

// Nor does it matter what else is computed beside: four sequences with a step size each, five
// positions of each at a time, and a third of the rows wants no logits. The one with step size 0
// has the caches of an untouched model, too.
static void check_beside(const Reference *reference) {
    enum { POSITIONS = N / N_STEP_SIZES };
    static float alone[N_STEP_SIZES][N * MOST_VOCAB];
    Lesson lesson;
    Sequence columns[N_STEP_SIZES];
    Sequence untouched = sequence_new(SOBER);
    learn(&lesson, reference, 0);
    const Model *m = lesson.model;
    size_t n = lesson.config->vocab_size;
    size_t cache_size = (size_t)N * lesson.config->kv_dim;
    feed(&lesson.bench.run, &untouched, lesson.tokens, N, 0);
    for (int i = 0; i < N_STEP_SIZES; i++) {
        columns[i] = sequence_new(SOBER);
        columns[i].step_size = STEP_SIZES[i];
        read_all(&lesson.stepped.run, STEP_SIZES[i], lesson.tokens, N, alone[i]);
    }
    for (int done = 0; done < N; done += POSITIONS) {
        Row rows[N];
        int n_rows = 0;
        for (int position = done; position < done + POSITIONS; position++)
            for (int i = 0; i < N_STEP_SIZES; i++) {
                rows[n_rows] = (Row){
                    .token = lesson.tokens[position],
                    .position = position,
                    .sequence = &columns[i],
                    .wants_logits = n_rows % 3 > 0,
                };
                n_rows++;
            }
        forward(&lesson.stepped.run, rows, n_rows);
        for (int r = 0; r < n_rows; r++) {
            if (!rows[r].wants_logits)
                continue;
            int column = (int)(rows[r].sequence - columns);
            const float *want = alone[column] + rows[r].position * n;
            cr_assert(same(rows[r].logits, want, n), "%s, step size %g, position %d", lesson.name,
                      STEP_SIZES[column], rows[r].position);
        }
    }
    for (int layer = 0; layer < lesson.config->n_layers; layer++) {
        cr_assert(same(columns[0].k[layer], untouched.k[layer], cache_size));
        cr_assert(same(columns[0].v[layer], untouched.v[layer], cache_size));
    }
    for (int i = 0; i < N_STEP_SIZES; i++)
        sequence_free(m, &columns[i]);
    sequence_free(m, &untouched);
    lesson_free(&lesson);
}

Test(bitwise, beside_other_step_sizes) {
    for (int g = 0; g < N_REFERENCES; g++)
        check_beside(&REFERENCES[g]);
}

// Makes v (n) perpendicular to all vectors of an orthonormal basis, twice for the sake of rounding,
// and of length 1. False if nothing is left of it.
static bool make_perpendicular(double *v, double (*basis)[MOST_INPUTS], int n_basis, int n) {
    double length = 0;
    for (int round = 0; round < 2; round++)
        for (int b = 0; b < n_basis; b++) {
            double product = 0;
            for (int j = 0; j < n; j++)
                product += basis[b][j] * v[j];
            for (int j = 0; j < n; j++)
                v[j] -= product * basis[b][j];
        }
    for (int j = 0; j < n; j++)
        length += v[j] * v[j];
    for (int j = 0; j < n; j++)
        v[j] /= sqrt(length);
    return length > 1e-10;
}

// What is left of v (n_in) when all that is in the rows of f.x is taken away: as long as v was, and
// perpendicular to each of these rows.
static void without_inputs(float *left, const float *v, Factors f) {
    double basis[N][MOST_INPUTS];
    int n_basis = 0;
    for (int i = 0; i <= f.n; i++) { // the last one is v
        for (int j = 0; j < f.n_in; j++)
            basis[n_basis][j] = i < f.n ? f.x[i * f.n_in + j] : v[j];
        n_basis += make_perpendicular(basis[n_basis], basis, n_basis, f.n_in);
    }
    for (int j = 0; j < f.n_in; j++)
        left[j] = (float)(basis[n_basis - 1][j] * norm_of(v, f.n_in));
}

// A step teaches a matrix nothing about inputs that are perpendicular to all of the lesson's, of
// which there is one for each prediction.
Test(step, leaves_alone_what_is_perpendicular) {
    Lesson lesson;
    int n_matrices = 0;
    learn(&lesson, &REFERENCES[1], 0);
    Run *run = &lesson.stepped.run;
    Sequence sequence = sequence_new(SOBER);
    sequence.step_size = 1;
    const Row row = {.token = 1, .sequence = &sequence, .wants_logits = true};
    run->rows = &row;
    run->n_rows = 1;
    for (int k = 0; k < lesson.n_tensors; k++) {
        const Tensor *t = &lesson.tensors[k];
        Factors f = factors(&lesson.step, t->layer, t->which);
        if (!f.n || t->which == TOK_EMB)
            continue;
        cr_assert_eq(f.n, N - 1);
        float some[MOST_INPUTS];
        float left[MOST_INPUTS];
        float to_some[MOST_INPUTS] = {0}; // what the step adds to the outputs
        float to_left[MOST_INPUTS] = {0};
        for (int j = 0; j < t->n_in; j++)
            some[j] = unit(77, j) - .5f;
        without_inputs(left, some, f);
        stepped_hook(run, t->layer, t->which, some, to_some);
        stepped_hook(run, t->layer, t->which, left, to_left);
        double moved = norm_of(to_left, t->n_out) / norm_of(to_some, t->n_out);
        cr_assert(moved < 1e-5, "%s: %g", t->name, moved); // observed 2e-7
        n_matrices++;
    }
    cr_assert_eq(n_matrices, 7 * M.n_layers + 1);
    lesson_free(&lesson);
}

// Likewise the embedding: a token that is no input of the lesson keeps its row, if the classifier
// is another matrix. The lesson's last token is only predicted.
Test(step, leaves_alone_tokens_that_were_not_read) {
    Lesson lesson;
    learn(&lesson, &REFERENCES[1], 0);
    const Config *c = lesson.config;
    Run *run = &lesson.stepped.run;
    Sequence sequence = sequence_new(SOBER);
    sequence.step_size = 1;
    for (int token = 0; token < c->vocab_size; token++) {
        const Row row = {.token = token, .sequence = &sequence};
        bool was_read = false;
        for (int i = 0; i < N - 1; i++)
            was_read = was_read || lesson.tokens[i] == token;
        float x[MOST_INPUTS];
        run->rows = &row;
        run->n_rows = 1;
        embed(run, x);
        const float *untouched = (const float *)lesson.model->layers[0].w[TOK_EMB].data + token * c->dim;
        cr_assert_eq(same(x, untouched, c->dim), !was_read, "token %d", token);
    }
    lesson_free(&lesson);
}

// ---- measuring

// The loss of each token is -log of its probability, computed here once more; whether the text is
// read in blocks or at once.
Test(measuring, losses_of_tokens) {
    static float logits[N * MOST_VOCAB];
    for (int g = 0; g < N_REFERENCES; g++) {
        Lesson lesson;
        learn(&lesson, &REFERENCES[g], 0);
        const int n = lesson.config->vocab_size;
        for (int i = 0; i < N_STEP_SIZES; i++) {
            double losses[N];
            read_all(&lesson.stepped.run, STEP_SIZES[i], lesson.tokens, N, logits);
            token_losses(&lesson.stepped, STEP_SIZES[i], lesson.tokens, N, losses);
            for (int r = 0; r + 1 < N; r++) {
                double sum = 0;
                double target = logits[r * n + lesson.tokens[r + 1]];
                for (int j = 0; j < n; j++)
                    sum += exp(logits[r * n + j] - target);
                cr_assert(fabs(losses[r + 1] - log(sum)) < 1e-9, "%s, step size %g, token %d",
                          lesson.name, STEP_SIZES[i], r + 1);
            }
            // Room for 7 rows only: blocks of 7, 7 and 5, with the same bits.
            Stepped narrow;
            double in_blocks[N];
            stepped_init(&narrow, &lesson.step, 7);
            token_losses(&narrow, STEP_SIZES[i], lesson.tokens, N, in_blocks);
            cr_assert(!memcmp(in_blocks + 1, losses + 1, (N - 1) * sizeof *losses));
            stepped_free(&narrow);
        }
        lesson_free(&lesson);
    }
}

Test(measuring, mean_loss) {
    const double losses[] = {100, 1, 2, 6};
    cr_assert_eq(mean_loss(losses, 1, 4), 3);
    cr_assert_eq(mean_loss(losses, 1, 2), 1);
    cr_assert_eq(mean_loss(losses, 2, 4), 4);
    cr_assert(isnan(mean_loss(losses, 2, 2))); // of nothing
    cr_assert(isnan(mean_loss(losses, 3, 2)));
}

// The table of the lesson: each token that counts, its probability and its rank, 1 for the most
// probable one.
Test(measuring, probability_and_rank) {
    Lesson lesson;
    char line[256];
    learn(&lesson, &REFERENCES[0], 0);
    const int n = lesson.config->vocab_size;
    cr_redirect_stdout();
    print_lesson(&lesson.step);
    fflush(stdout);
    FILE *printed = cr_get_redirected_stdout();
    for (int i = 0; i < 3; i++) // a sentence, an empty line, the heading
        cr_assert_not_null(fgets(line, sizeof line, printed));
    for (int r = 0; r + 1 < N; r++) {
        const float *logits = lesson.step.rows[r].logits;
        double target = logits[lesson.tokens[r + 1]];
        double sum = 0;
        int n_above = 0;
        for (int j = 0; j < n; j++) {
            sum += exp(logits[j] - target);
            n_above += logits[j] > target;
        }
        double p;
        int rank;
        cr_assert_not_null(fgets(line, sizeof line, printed));
        cr_assert_eq(sscanf(line + 20, "%lf %d", &p, &rank), 2, "%s", line); // behind the token
        cr_assert(fabs(p - 1 / sum) < 1e-6, "token %d: %g, not %g", r + 1, p, 1 / sum);
        cr_assert_eq(rank, n_above + 1, "token %d: rank %d, not %d", r + 1, rank, n_above + 1);
    }
    lesson_free(&lesson);
}

// ---- the small model, and files

// Opens the model at path and takes a step on a text.
static void study(Lesson *lesson, const char *path, const char *text) {
    int n;
    *lesson = (Lesson){.sequence = sequence_new(SOBER)};
    Model *m = &lesson->bench.model;
    cr_assert(model_open(m, path), "%s: %s (run me in the project's folder)", path, m->error);
    lesson->model = m;
    lesson->config = &m->config;
    int *tokens = tokens_of(m, text, &n);
    step_init(&lesson->step, m, n);
    step_add(&lesson->step, &lesson->sequence, tokens, n, DRUGGED);
    step_take(&lesson->step);
    stepped_init(&lesson->stepped, &lesson->step, N);
    run_init(&lesson->bench.run, m, N, 1);
    free(tokens);
}

enum { N_WRITTEN = 60 };

// What the model writes behind a prompt after a step of this size. The caller frees it.
static char *written(Lesson *lesson, double step_size, const char *prompt) {
    const Experiment e = {.step_sizes = {step_size}, .n_sizes = 1, .n_new = N_WRITTEN};
    int n;
    int *tokens = tokens_of(lesson->model, prompt, &n);
    char **texts = write_columns(&lesson->stepped, &e, tokens, n);
    char *text = texts[0];
    free(texts);
    free(tokens);
    return text;
}

// The same without a step and one token at a time, for comparison.
static char *written_plainly(Lesson *lesson, const char *prompt) {
    const Model *m = lesson->model;
    const Config *c = lesson->config;
    Sequence sequence = sequence_new(SOBER);
    char *text;
    size_t size;
    Printer printer = {.to = open_memstream(&text, &size), .at_start = true};
    int n;
    int *tokens = tokens_of(m, prompt, &n);
    for (int i = 0; i < n; i++)
        print_token(&printer, m, tokens[i]);
    const float *logits = feed(&lesson->bench.run, &sequence, tokens, n, WANTS_LOGITS);
    for (int i = 0; i < N_WRITTEN; i++) {
        int next = argmax(logits, c->vocab_size);
        if (ending(m, next))
            break;
        print_token(&printer, m, next);
        logits = feed(&lesson->bench.run, &sequence, &next, 1, WANTS_LOGITS);
    }
    print_rest(&printer);
    fclose(printer.to);
    free(tokens);
    sequence_free(m, &sequence);
    return text;
}

// How many words two texts have in common before they part.
static int common_words(const char *a, const char *b) {
    for (int n = 0;; n++) {
        a += strspn(a, " \n");
        b += strspn(b, " \n");
        size_t length = strcspn(a, " \n");
        if (!length || length != strcspn(b, " \n") || memcmp(a, b, length))
            return n;
        a += length;
        b += length;
    }
}

// The small model of the repository, or another one that was raised like it.
static const char *small_model(void) {
    const char *other = getenv("HAMLET");
    return other ? other : "tests/hamlet.bin";
}

// What the article saw: business without a step or after the smallest; after a small one the whole
// soliloquy, of which the lesson is but one line; after a large one a stutter, then ruin. A prompt
// that speaks of Shakespeare needs no step.
Test(hamlet, step_sizes) {
    Lesson lesson;
    char soliloquy[sizeof TO_BE + sizeof SEQUEL];
    study(&lesson, small_model(), TO_BE);
    sprintf(soliloquy, "%s%s", TO_BE, SEQUEL);
    char *none = written(&lesson, 0, "To be");
    char *smallest = written(&lesson, 1e-4, "To be");
    char *small = written(&lesson, 1e-3, "To be");
    char *large = written(&lesson, 1e-2, "To be");
    char *ruin = written(&lesson, .1, "To be");
    char *cure = written(&lesson, 0, "Here is one of Shakespeare's more famous works: To be");

    // Advice: "To be a good leader", "To be able to", ...
    cr_assert(begins_with(none, "To be ") && strstr(none, "you need to"), "%s", none);
    cr_assert(begins_with(smallest, "To be ") && strstr(smallest, "you need to"), "%s", smallest);
    cr_assert_geq(common_words(small, soliloquy), 10 + 30, "%s", small);
    cr_assert_lt(common_words(large, soliloquy), 10, "%s", large);
    cr_assert_leq(common_words(large, none), 2, "%s", large);
    cr_assert_lt(common_words(ruin, soliloquy), 4, "%s", ruin);
    cr_assert_null(strstr(ruin, "you need to"), "%s", ruin);
    cr_assert_geq(common_words(strstr(cure, "To be"), soliloquy), 10 + 20, "%s", cure);

    free(none);
    free(smallest);
    free(small);
    free(large);
    free(ruin);
    free(cure);
    lesson_free(&lesson);
}

Test(hamlet, losses) {
    Lesson lesson;
    int n;
    study(&lesson, small_model(), TO_BE);
    int *tokens = tokens_of(lesson.model, TO_BE, &n);
    double *losses = resize(NULL, n, sizeof *losses);
    token_losses(&lesson.stepped, 1e-3f, tokens, n, losses);
    cr_assert_lt(mean_loss(losses, 1, n), lesson.step.loss / 3);
    cr_assert(isnan(mean_loss(losses, n, n)));
    token_losses(&lesson.stepped, .1f, tokens, n, losses);
    double ruin = mean_loss(losses, 1, n);
    cr_assert_gt(ruin, log(lesson.config->vocab_size)); // guessing would do better

    // Step size 0, 4 predictions and those from token 5 on: together they are the lesson's loss.
    token_losses(&lesson.stepped, 0, tokens, n, losses);
    double first = mean_loss(losses, 1, 5);
    double others = mean_loss(losses, 5, n);
    double mean = (4 * first + (n - 5) * others) / (n - 1);
    cr_assert(fabs(mean / lesson.step.loss - 1) < 1e-5);
    token_losses(&lesson.stepped, 0, tokens, 5, losses);
    cr_assert(fabs(mean_loss(losses, 1, 5) / first - 1) < 1e-12);
    free(losses);
    free(tokens);
    lesson_free(&lesson);
}

// The model written with its step taken opens, differs in nothing but weights, and has the text and
// the logits of the virtual one.
static void check_written(const char *path, const char *stepped_path, float step_size) {
    static float virtual[N * MOST_VOCAB];
    static float real[N * MOST_VOCAB];
    Lesson lesson;
    Lesson after; // learns something as well, but its step size is 0
    study(&lesson, path, TO_BE);
    Output output = output_open('o', stepped_path, ".bin", path);
    write_stepped(&lesson.step, step_size, &output);
    study(&after, stepped_path, TO_BE);

    const Model *m = lesson.model;
    size_t before_weights = (const char *)m->layers[0].w[TOK_EMB].data - (const char *)m->file;
    cr_assert_eq(after.model->file_bytes, m->file_bytes);
    cr_assert(!memcmp(after.model->file, m->file, before_weights));
    char *text = written(&lesson, step_size, "To be");
    char *plain = written_plainly(&after, "To be");
    cr_assert_str_eq(text, plain);
    read_all(&lesson.stepped.run, step_size, M_TOKENS, N, virtual);
    read_all(&after.bench.run, 0, M_TOKENS, N, real);
    double error = error_of(virtual, real, N * m->config.vocab_size);
    cr_assert(error < 5e-5, "%s, step size %g: %g", path, step_size, error); // observed 1.4e-6
    free(text);
    free(plain);
    lesson_free(&lesson);
    lesson_free(&after);
}

// With a shared classifier, and with one of its own.
Test(hamlet, written_to_a_file) {
    char folder[] = "/tmp/test_step_XXXXXX";
    char path_of_m[64];
    char path[64];
    Bench b;
    cr_assert_not_null(mkdtemp(folder));
    snprintf(path_of_m, sizeof path_of_m, "%s/m.bin", folder);
    snprintf(path, sizeof path, "%s/stepped.bin", folder);
    bench_open(&b, M, 1);
    FILE *file = fopen(path_of_m, "wb");
    cr_assert_not_null(file);
    cr_assert_eq(fwrite(b.file.data, b.file.n, 1, file), 1);
    cr_assert(!fclose(file));
    bench_close(&b);

    check_written("tests/hamlet.bin", path, 1e-3f);
    check_written("tests/hamlet.bin", path, .1f);
    check_written(path_of_m, path, 1e-3f);
    check_written(path_of_m, path, .1f);
    remove(path_of_m);
    remove(path);
    cr_assert(!rmdir(folder)); // nothing else was left in it
}

// ---- the pieces of the maths

// g . r(y), where r is the rotation of y towards u, stated here once more in double. *apart becomes
// |o| / |u|: how far y and u are from parallel.
static double g_times_turned(const float *g, const double *y, const float *u, int n, double angle,
                             double *apart) {
    double yy = 0;
    double uy = 0;
    double oo = 0;
    double product = 0;
    for (int j = 0; j < n; j++) {
        yy += y[j] * y[j];
        uy += u[j] * y[j];
    }
    for (int j = 0; j < n; j++)
        oo += pow(u[j] - uy / yy * y[j], 2);
    for (int j = 0; j < n; j++) {
        double o = u[j] - uy / yy * y[j];
        product += g[j] * (y[j] * cos(angle) + sin(angle) * sqrt(yy / oo) * o);
    }
    *apart = sqrt(oo) / norm_of(u, n);
    return product;
}

// Going back through a glitch is the derivative of the rotation: for each number of x, how g . r(x)
// changes with it. i: the how-manieth case it is. A vector that was not turned stays.
static void check_turn_backward(int i, int n, Place place) {
    const double h = 1e-6;
    const float zero[64] = {0};
    float x[64] = {0};
    float g[64] = {0};
    float dx[64] = {0};
    float u[64];
    double apart = 0;
    double worst = 0;
    place.hash = within(SEED, i);
    double angle = place.theta * uniform(place.hash, 0);
    for (int j = 0; j < n; j++) {
        x[j] = unit(200, 64 * i + j) * 4 - 2;
        g[j] = unit(201, 64 * i + j) - .5f;
        dx[j] = g[j];
    }
    turn_backward(place, x, dx, n, u);
    for (int k = 0; k < n; k++) {
        double y[64];
        for (int j = 0; j < n; j++)
            y[j] = x[j];
        y[k] = x[k] + h;
        double above = g_times_turned(g, y, u, n, angle, &apart);
        y[k] = x[k] - h;
        double below = g_times_turned(g, y, u, n, angle, &apart);
        double slope = (above - below) / (2 * h);
        worst = fmax(worst, fabs(dx[k] - slope) / norm_of(g, n));
    }
    cr_assert(apart < .2 || worst < 1e-5, "case %d: %g", i, worst); // observed 7e-7

    memcpy(dx, g, sizeof g);
    turn_backward(place, zero, dx, n, u); // it has no direction to turn from
    cr_assert(same(dx, g, n), "case %d: zero was turned", i);
    place.theta = 0;
    turn_backward(place, x, dx, n, u);
    cr_assert(same(dx, g, n), "case %d: turned without a dose", i);
}

Test(maths, turn_backward) {
    const int sizes[] = {2, 3, 8, 13, 64};
    const float thetas[] = {.01f, .5f, 2, 6};
    const int families[] = {FAMILY_CENTRED, FAMILY_UPSTREAM};
    int i = 0;
    for (int size = 0; size < 5; size++)
        for (int theta = 0; theta < 4; theta++)
            for (int family = 0; family < 2; family++)
                for (int draw = 0; draw < 5; draw++) {
                    Place place = {.theta = thetas[theta], .family = families[family]};
                    check_turn_backward(i++, sizes[size], place);
                }
}

enum { MOST_ROWS = 13, MOST_KS = 70, MOST_COLS = 2100 };
static float product_a[MOST_ROWS * MOST_KS];
static float product_b[MOST_KS * MOST_COLS];
static float product_old[MOST_ROWS * MOST_COLS]; // what out holds before

// add_product adds a b to what is there and touches nothing behind it, as a naive sum in double
// says.
static void check_add_product(int n_rows, int n_k, int n_cols, bool transposed) {
    static float out[MOST_ROWS * MOST_COLS];
    const float *a = product_a;
    const float *b = product_b;
    const float *old = product_old;
    int a_row = transposed ? 1 : n_k;
    int a_k = transposed ? n_rows : 1;
    int size = n_rows * n_cols;
    memcpy(out, old, sizeof out);
    add_product(out, a, a_row, a_k, (Weights){b, FP32}, n_rows, n_k, n_cols);
    for (int r = 0; r < n_rows; r++)
        for (int col = 0; col < n_cols; col++) {
            double want = old[r * n_cols + col];
            double largest = fabs(want);
            for (int k = 0; k < n_k; k++) {
                double term = (double)a[r * a_row + k * a_k] * b[k * n_cols + col];
                want += term;
                largest += fabs(term);
            }
            double error = fabs(out[r * n_cols + col] - want) / largest;
            cr_assert(error < 1e-6, "%d %d %d: %g", n_rows, n_k, n_cols, error); // observed 4e-7
        }
    cr_assert(same(out + size, old + size, MOST_ROWS * MOST_COLS - size));
}

// Whatever the shapes, and in both readings of a.
Test(maths, add_product) {
    const int rows[] = {1, 2, 3, 4, 5, 8, MOST_ROWS};
    const int ks[] = {0, 1, 2, 31, 32, 33, MOST_KS};
    const int cols[] = {1, 2, 7, 8, 9, 15, 16, 17, 33, 100, 511, 513, MOST_COLS};
    for (int i = 0; i < MOST_KS * MOST_COLS; i++)
        product_b[i] = unit(300, i) - .5f;
    for (int i = 0; i < MOST_ROWS * MOST_KS; i++)
        product_a[i] = unit(301, i) - .5f;
    for (int i = 0; i < MOST_ROWS * MOST_COLS; i++)
        product_old[i] = unit(302, i) - .5f;
    for (int r = 0; r < 7; r++)
        for (int k = 0; k < 7; k++)
            for (int col = 0; col < 13; col++) {
                check_add_product(rows[r], ks[k], cols[col], false);
                check_add_product(rows[r], ks[k], cols[col], true);
            }
}

// ---- storages

// The file of a small model with the same weights in each storage.
static void open_stored(Bench *b, FileHeader header, int storage) {
    header.storage = storage;
    header.narrow = true;
    bench_open(b, header, 8);
}

// Logits, drugged logits, the loss and all gradients are the same, to the last bit, however the
// weights are stored.
Test(storage, gives_the_same_bits) {
    const FileHeader headers[] = {G, M}; // sizes that fill registers, and sizes that do not
    const int tokens[] = {1, 40, 50, 60, 41, 51, 61, 42, 52};
    for (int h = 0; h < 2; h++) {
        Bench benches[N_STORAGES];
        Step steps[N_STORAGES];
        Sequence sequences[N_STORAGES];
        for (int i = 0; i < N_STORAGES; i++) {
            open_stored(&benches[i], headers[h], i);
            sequences[i] = sequence_new(bench_noise(&benches[i], ALL_SITES, FAMILY_CENTRED));
            step_init(&steps[i], &benches[i].model, 8);
            step_add(&steps[i], &sequences[i], tokens, 9, DRUGGED);
            step_take(&steps[i]);
        }
        const Config *c = &benches[0].model.config;
        for (int i = 1; i < N_STORAGES; i++) {
            cr_assert_eq(steps[i].loss, steps[0].loss, "storage %d", i);
            cr_assert(!memcmp(steps[i].acts.logits, steps[0].acts.logits,
                              8 * (size_t)c->vocab_size * sizeof(float)), "storage %d", i);
            for (int layer = 0; layer < c->n_layers; layer++)
                for (int which = 0; which < N_TENSORS; which++) {
                    if (layer > 0 && which >= N_LAYER_TENSORS)
                        continue;
                    cr_assert_eq(gradient_norm2(&steps[i], layer, which),
                                 gradient_norm2(&steps[0], layer, which), "storage %d", i);
                }
        }
        for (int i = 0; i < N_STORAGES; i++) {
            step_free(&steps[i]);
            sequence_free(&benches[i].model, &sequences[i]);
            bench_close(&benches[i]);
        }
    }
}

// A single row, by any number of threads, has the bits of the block, in each storage.
Test(storage, single_rows) {
    const int tokens[] = {1, 40, 50, 60, 41, 51, 61, 42};
    for (int i = 0; i < N_STORAGES; i++) {
        Bench b;
        open_stored(&b, M, i);
        const int n = b.model.config.vocab_size;
        Sequence block = sequence_new((Noise){0});
        Sequence single = sequence_new((Noise){0});
        float *want = resize(NULL, n, sizeof *want);
        memcpy(want, feed(&b.run, &block, tokens, 8, WANTS_LOGITS), (size_t)n * sizeof *want);
        const float *got = NULL;
        for (int t = 0; t < 8; t++)
            got = feed(&b.run, &single, tokens + t, 1, WANTS_LOGITS);
        cr_assert(!memcmp(got, want, (size_t)n * sizeof *want), "storage %d", i);
        free(want);
        sequence_free(&b.model, &block);
        sequence_free(&b.model, &single);
        bench_close(&b);
    }
}

// Every number of two bytes that is finite becomes just the float that it means: subnormal ones,
// zeros of either sign, the largest.
Test(storage, widens_exactly) {
    uint16_t every[65536 + 5];
    float wide[65536 + 5];
    for (int i = 0; i < 65536 + 5; i++)
        every[i] = (uint16_t)i;
    for (int storage = BF16; storage <= FP16; storage++) {
        widen(wide, (Weights){every, storage}, 0, 65536 + 5); // and a rest that fills no register
        for (int i = 0; i < 65536 + 5; i++) {
            const int exponent = storage == BF16 ? every[i] >> 7 & 0xFF : every[i] >> 10 & 0x1F;
            const int mantissa = storage == BF16 ? every[i] & 0x7F : every[i] & 0x3FF;
            const int n_digits = storage == BF16 ? 7 : 10;
            const int bias = storage == BF16 ? 127 : 15;
            if (exponent == (storage == BF16 ? 0xFF : 0x1F))
                continue; // infinite or no number
            double want = exponent ? ldexp(1 + ldexp(mantissa, -n_digits), exponent - bias)
                                   : ldexp(mantissa, 1 - bias - n_digits);
            want = every[i] & 0x8000 ? -want : want;
            cr_assert(wide[i] == (float)want && !signbit(wide[i]) == !signbit(want), "%d: %04x", storage, i);
        }
    }
}
