/* test_step.c - what train_step.c promises: its gradients are the derivatives of the loss, its
 * virtual step is the real one, and it does to the small model what the article saw.
 *
 * Errors are relative: of a tensor to its largest entry or its norm, of logits to the largest.
 * "observed" is the worst that gcc and clang gave; the bound beside it leaves room for other
 * machines and none for a wrong formula.
 */
#define main train_step_main
#include "../train_step.c"
#undef main
#define DRUGS_IS_INCLUDED
#include "testing.h"
#include "golden.h"

enum { N = N_TOKENS, SOBER = -1, ALL = N_SITES, ALL_UPSTREAM, MOST_TENSORS = 64, MOST_VOCAB = 768 };
static const Noise NO_NOISE = {0, FAMILY_CENTRED, NULL};
static const float ETAS[] = {0, 1e-3f, .1f, 1};
enum { N_ETAS = 4 };

// A model that had one lesson, its gradient written down, and the stepped model.
typedef struct {
    Bench bench;
    const Config *c;
    const int *tokens; // the lesson's, NULL if it was a text
    Sequence sequence;
    Step step;
    SteppedRun stepped;
    int n_tensors;
    float *g[MOST_TENSORS];
} Lesson;

// The i-th tensor in the order of golden.h, and its number of floats.
typedef struct { int layer, which, n_out, n_in, size; } Tensor;
static Tensor nth(const Config *c, int i) {
    const int n = c->n_layers * N_LAYER_TENSORS;
    Tensor t = {.layer = i < n ? i / N_LAYER_TENSORS : 0,
                .which = i < n ? i % N_LAYER_TENSORS : TOK_EMB + i - n};
    tensor_shape(c, t.which, &t.n_out, &t.n_in);
    t.size = t.n_out * t.n_in;
    return t;
}

// Where a tensor's weights are; those of a bench may be written.
static float *weights(const Bench *b, Tensor t) {
    return (float *)(uintptr_t)*tensor(&b->model, t.layer, t.which);
}

// Everything but the step itself: G (0) or M (1), read sober, with one site dosed, or with all.
static void prepare(Lesson *l, int model, int dosed) {
    *l = (Lesson){.tokens = model ? M_TOKENS : G_TOKENS, .sequence = sequence_new(NO_NOISE)};
    bench_open(&l->bench, model ? M : G, N);
    l->c = &l->bench.model.config;
    l->n_tensors = model ? M_TENSORS : G_TENSORS;
    if (dosed >= 0)
        l->sequence.noise = noise_of(&l->bench, dosed < N_SITES ? 1 << dosed : ALL_SITES,
                                     dosed == ALL_UPSTREAM ? FAMILY_UPSTREAM : FAMILY_CENTRED);
    step_init(&l->step, &l->bench.model, N, N);
    step_add(&l->step, &l->sequence, l->tokens, N, true, false);
    stepped_init(&l->stepped, &l->step, N);
}

static void write_gradients(Lesson *l) {
    for (int i = 0; i < l->n_tensors; i++) {
        const Tensor t = nth(l->c, i);
        cr_assert_not_null(l->g[i] = calloc((size_t)t.size, sizeof *l->g[i]));
        add_gradient(&l->step, l->g[i], 1, t.layer, t.which, 0, t.n_out);
    }
}

static void teach(Lesson *l, int model, int dosed) {
    prepare(l, model, dosed);
    step_take(&l->step);
    write_gradients(l);
}

static void lesson_free(Lesson *l) {
    for (int i = 0; i < l->n_tensors; i++) free(l->g[i]);
    stepped_free(&l->stepped);
    step_free(&l->step);
    sequence_free(&l->bench.model, &l->sequence);
    bench_close(&l->bench);
}

static bool same(const float *a, const float *b, size_t n) { return !memcmp(a, b, n * sizeof *a); }

static double norm_of(const float *x, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sqrt(sum);
}

// The largest difference, relative to the largest value of b.
static double error_of(const float *a, const float *b, int n) {
    double max = 0, worst = 0;
    for (int i = 0; i < n; i++) {
        max = fmax(max, fabs((double)b[i]));
        worst = fmax(worst, fabs((double)a[i] - (double)b[i]));
    }
    return worst / max;
}

// ---- the gradient

static void check_tensor(const Lesson *l, int i, double norm, int n, const int *at,
                         const double *want) {
    double off = fabs(norm_of(l->g[i], nth(l->c, i).size) / norm - 1), worst = 0;
    for (int j = 0; j < n; j++)
        worst = fmax(worst, fabs((double)l->g[i][at[j]] - want[j]) / fabs(want[0]));
    cr_assert(off < 1e-5, "tensor %d: %g", i, off);     // observed 7e-7
    cr_assert(worst < 2e-5, "tensor %d: %g", i, worst); // observed 1.3e-6
}

// Loss and gradient of every tensor are those of an independent float64 implementation: sober and
// with all sites dosed for both models, with each site alone for the first.
Test(gradient, agrees_with_the_reference) {
    for (int i = 0; i < 4; i++) {
        const double loss = (double[]){G_LOSS, M_LOSS, G_LOSS_ALL, M_LOSS_ALL}[i];
        const GoldenGradient *golden = (const GoldenGradient *[]){
            G_GRADIENT, M_GRADIENT, G_GRADIENT_ALL, M_GRADIENT_ALL}[i];
        Lesson l;
        teach(&l, i % 2, i < 2 ? SOBER : ALL);
        cr_assert(fabs(l.step.loss / loss - 1) < 1e-6, "%g, %g", l.step.loss, loss); // 5e-8
        for (int k = 0; k < l.n_tensors; k++) {
            double sum = 0, size = nth(l.c, k).size;
            check_tensor(&l, k, golden[k].norm, N_ENTRIES, golden[k].index, golden[k].value);
            for (int j = 0; j < (int)size; j++) sum += (double)l.g[k][j];
            sum -= golden[k].sum; // which is as large as norm * sqrt(size) if all are alike
            cr_assert(fabs(sum) / (golden[k].norm * sqrt(size)) < 1e-5, "%d", k); // observed 4e-7
        }
        lesson_free(&l);
    }
    for (int site = 0; site < N_SITES; site++) {
        Lesson l;
        teach(&l, 0, site);
        cr_assert(fabs(l.step.loss / G_LOSS_SITE[site] - 1) < 1e-6, "%g", l.step.loss); // 5e-8
        for (int k = 0; k < l.n_tensors; k++) {
            const GoldenSiteGradient *want = &G_GRADIENT_SITE[site][k];
            check_tensor(&l, k, want->norm, 3, want->index, want->value);
        }
        lesson_free(&l);
    }
}

// The loss of the lesson with the weights as they are now, summed in double.
static double loss_now(Lesson *l) {
    double sum = 0;
    forward(&l->bench.model, &l->step.acts, l->step.rows, N - 1);
    for (int r = 0; r < N - 1; r++)
        sum += surprise(l->step.rows[r].logits, l->c->vocab_size, l->tokens[r + 1]);
    return sum / (N - 1);
}

// The gradient predicts what the loss does when a tensor moves in a random direction: each tensor
// of both models, sober and under each noise. fp32 drowns small differences, so weights move by
// about 1 %: the loss changes by .0003 to .01, its rounding is 1e-6 at most. What is not linear in
// so long a step goes away by extrapolation from two lengths: (4 f(h) - f(2 h)) / 3.
Test(gradient, agrees_with_finite_differences) {
    for (int i = 0; i < 2 * (ALL_UPSTREAM + 2); i++) {
        Lesson l;
        teach(&l, i % 2, i / 2 - 1);
        for (int k = 0; k < l.n_tensors; k++) {
            const Tensor t = nth(l.c, k);
            float *w = weights(&l.bench, t), *old = resize(NULL, t.size, sizeof *old);
            double off[2] = {0}; // measured minus predicted slope, at h and 2 h
            memcpy(old, w, (size_t)t.size * sizeof *w);
            for (int side = 0; side < 4; side++) { // -h, h, -2 h, 2 h
                const double h = side < 2 ? .005 : .01, sign = side % 2 ? 1 : -1;
                double predicted = 0;
                for (int j = 0; j < t.size; j++) {
                    double d = (double)unit((uint64_t)(1000 + k), (uint64_t)j) - .5;
                    w[j] = (float)((double)old[j] + sign * h * d);
                    predicted += (double)l.g[k][j] * ((double)w[j] - (double)old[j]);
                }
                off[side / 2] += sign * (loss_now(&l) - predicted) / (2 * h);
            }
            // In a random direction the slope is about |g| times the size of a component.
            const double slope = norm_of(l.g[k], t.size) * sqrt(1. / 12);
            const double error = fabs(4 * off[0] - off[1]) / 3 / slope; // observed 5e-4
            cr_assert(error < 3e-3, "model and noise %d, tensor %d: %g", i, k, error);
            memcpy(w, old, (size_t)t.size * sizeof *w);
            free(old);
        }
        lesson_free(&l);
    }
}

// |g|², found without g, is that of the gradient written down, tensor by tensor, shared embedding
// included. For small steps the loss falls by eta |g|², and what is missing shrinks as eta does.
Test(gradient, norm_and_first_order) {
    for (int i = 0; i < 4; i++) {
        double norm2 = 0, before = 0, loss[2];
        Lesson l;
        teach(&l, i % 2, i < 2 ? SOBER : ALL);
        for (int k = 0; k < l.n_tensors; k++) {
            const Tensor t = nth(l.c, k);
            const double one = gradient_norm2(&l.step, t.layer, t.which);
            const double off = one / pow(norm_of(l.g[k], t.size), 2) - 1;
            cr_assert(fabs(off) < 1e-5, "tensor %d: %g", k, off); // observed 2e-7
            norm2 += one;
        }
        for (double eta = 1e-3; eta > 1e-4 && i < 2; eta /= 2) {
            text_loss(&l.stepped, (float)eta, l.tokens, N, 1, N, loss);
            const double missing = 1 - (l.step.loss - loss[0]) / (eta * norm2); // observed 10 * eta
            cr_assert(missing > 0 && missing < 20 * eta, "%g: %g", eta, missing);
            cr_assert(!(before > 0) || fabs(missing / before - .5) < .1, "%g", missing / before);
            before = missing;
        }
        lesson_free(&l);
    }
}

// Several texts make one lesson: loss and gradient are the mean over all predictions that count,
// whichever text they are in. Of the first text only the last token counts, so alone it has the
// loss of its last row.
Test(gradient, several_texts) {
    const int from[3] = {3, 0, 5}, n[3] = {17, 11, 6}, weight[3] = {1, 10, 5};
    for (int i = 0; i < 4; i++) {
        Lesson l;
        Step all, one[3];
        Sequence s[3], alone[3];
        double loss = 0;
        teach(&l, i % 2, i < 2 ? SOBER : ALL);
        step_init(&all, &l.bench.model, 2 * N, N);
        for (int j = 0; j < 3; j++) {
            s[j] = sequence_new(l.sequence.noise);
            alone[j] = sequence_new(j == 1 ? NO_NOISE : l.sequence.noise); // sober
            step_init(&one[j], &l.bench.model, n[j], n[j]);
            step_add(&all, &s[j], l.tokens + from[j], n[j], j != 1, j == 0);
            step_add(&one[j], &alone[j], l.tokens + from[j], n[j], true, j == 0);
            step_take(&one[j]);
            loss += weight[j] * one[j].loss / 16;
        }
        step_take(&all);
        cr_assert(fabs(all.loss / loss - 1) < 1e-6, "%g", all.loss); // observed 2e-16
        const Row *last = &one[0].rows[one[0].n_rows - 1];
        loss = surprise(last->logits, l.c->vocab_size, l.tokens[from[0] + n[0] - 1]);
        cr_assert(fabs(one[0].loss / loss - 1) < 1e-6 && !last[-1].logits); // observed 3e-8
        const float *dy, *x; // of the classifier: the one prediction is all it learns from
        cr_assert_eq(factors(&one[0], 0, WCLS, &dy, &x), 1);
        for (int k = 0; k < l.n_tensors; k++) {
            const Tensor t = nth(l.c, k);
            float *g = calloc((size_t)t.size, sizeof *g);
            float *mean = calloc((size_t)t.size, sizeof *mean);
            add_gradient(&all, g, 1, t.layer, t.which, 0, t.n_out);
            for (int j = 0; j < 3; j++)
                add_gradient(&one[j], mean, (float)weight[j] / 16, t.layer, t.which, 0, t.n_out);
            const double error = error_of(g, mean, t.size);
            cr_assert(error < 1e-5, "tensor %d: %g", k, error); // observed 2e-6
            free(g);
            free(mean);
        }
        for (int j = 0; j < 3; j++) {
            sequence_free(&l.bench.model, &s[j]);
            sequence_free(&l.bench.model, &alone[j]);
            step_free(&one[j]);
        }
        step_free(&all);
        lesson_free(&l);
    }
}

// ---- the virtual step

// Reads N tokens in blocks, sober, with a step size if run is a SteppedRun's. logits: (N, vocab).
static void read_all(const Model *m, Run *run, float eta, const int *tokens, int block,
                     float *logits) {
    const ptrdiff_t n = m->config.vocab_size;
    Column column = {sequence_new(NO_NOISE), eta};
    for (int done = 0; done < N; done += block) {
        Row rows[N];
        int n_rows = N - done < block ? N - done : block;
        for (int r = 0; r < n_rows; r++)
            rows[r] = (Row){tokens[done + r], done + r, &column.sequence, false, true, NULL};
        forward(m, run, rows, n_rows);
        memcpy(logits + done * n, run->logits, (size_t)(n_rows * n) * sizeof(float));
    }
    sequence_free(m, &column.sequence);
}

// Opens a second model like the lesson's and takes the lesson's step there, in its weights.
static void step_for_good(const Lesson *l, Bench *b, float eta) {
    bench_open(b, l->n_tensors == M_TENSORS ? M : G, N);
    for (int k = 0; k < l->n_tensors; k++) {
        const Tensor t = nth(l->c, k);
        add_gradient(&l->step, weights(b, t), -eta, t.layer, t.which, 0, t.n_out);
    }
}

// The stepped model without a stepped weight computes what a model does whose weights took the
// step, at every step size, after a sober lesson or a drugged one; and after the sober one what
// the independent implementation says.
Test(step, virtual_is_the_real_one) {
    static float virtual[N * MOST_VOCAB], real[N * MOST_VOCAB];
    for (int i = 0; i < 4 * N_ETAS; i++) {
        const float eta = ETAS[i / 4];
        double loss[2], worst = 0;
        Bench b;
        Lesson l;
        teach(&l, i % 2, i / 2 % 2 ? ALL : SOBER);
        step_for_good(&l, &b, eta);
        read_all(&l.bench.model, &l.stepped.run, eta, l.tokens, N, virtual);
        read_all(&b.model, &b.run, 0, l.tokens, N, real);
        const int n = l.c->vocab_size;
        for (int r = 0; r < N; r++) worst = fmax(worst, error_of(virtual + r * n, real + r * n, n));
        cr_assert(worst < 5e-5, "eta %g: %g", (double)eta, worst); // observed 2e-6
        if (i >= 4 && i / 2 % 2 == 0) {
            const GoldenStep *want = i % 2 ? &M_STEP[i / 4 - 1] : &G_STEP[i / 4 - 1];
            const float *last = virtual + (N - 1) * n;
            double max = 0;
            for (int j = 0; j < n; j++) max = fmax(max, fabs((double)last[j]));
            for (int j = 0; j < N_ENTRIES; j++)
                worst = fmax(worst, fabs((double)last[(37 * (N - 1) + 53 * j + 11) % n]
                                         - want->last.entry[j]) / max);
            worst = fmax(worst, fabs(norm_of(last, n) / want->last.norm - 1));
            text_loss(&l.stepped, eta, l.tokens, N, 1, N, loss);
            worst = fmax(worst, fabs(loss[0] / want->loss - 1));
            cr_assert(worst < 5e-5, "eta %g: %g", (double)eta, worst); // observed 2e-6
        }
        bench_close(&b);
        lesson_free(&l);
    }
}

// Step size 0 is the untouched model to the last bit, caches too. And as for any model, it makes
// no difference how a text is cut into blocks, and what else is computed beside.
Test(step, bitwise) {
    static float plain[N * MOST_VOCAB], alone[N_ETAS][N * MOST_VOCAB], logits[N * MOST_VOCAB];
    for (int i = 0; i < 2; i++) {
        Lesson l;
        teach(&l, i, SOBER);
        const Model *m = &l.bench.model;
        const size_t n = (size_t)l.c->vocab_size, n_cache = N * (size_t)l.c->kv_dim;
        Column columns[N_ETAS], *untouched = &(Column){sequence_new(NO_NOISE), 0};
        feed(m, &l.bench.run, &untouched->sequence, l.tokens, N, 0, false, false);
        read_all(m, &l.bench.run, 0, l.tokens, N, plain);
        for (int k = 0; k < N_ETAS; k++) {
            columns[k] = (Column){sequence_new(NO_NOISE), ETAS[k]};
            for (int block = 1; block <= N; block += block < 5 ? 1 : N - 5) {
                read_all(m, &l.stepped.run, ETAS[k], l.tokens, block, logits);
                if (block == 1) memcpy(alone[k], logits, sizeof logits);
                cr_assert(same(logits, alone[k], N * n), "%g", (double)ETAS[k]);
                cr_assert_eq(same(logits, plain, N * n), k == 0);
            }
        }
        for (int done = 0; done < N; done += N / N_ETAS) { // five positions of each at a time,
            Row rows[N];
            for (int r = 0; r < N; r++) {                  // and a third of them wants no logits
                const int position = done + r / N_ETAS;
                rows[r] = (Row){l.tokens[position], position, &columns[r % N_ETAS].sequence, false,
                                r % 3 > 0, NULL};
            }
            forward(m, &l.stepped.run, rows, N);
            for (int r = 0; r < N; r++)
                cr_assert(!rows[r].logits || same(rows[r].logits, &alone[r % N_ETAS][
                                                  (size_t)rows[r].position * n], n), "row %d", r);
        }
        for (int layer = 0; layer < l.c->n_layers; layer++) {
            cr_assert(same(columns[0].sequence.k[layer], untouched->sequence.k[layer], n_cache));
            cr_assert(same(columns[0].sequence.v[layer], untouched->sequence.v[layer], n_cache));
        }
        for (int k = 0; k < N_ETAS; k++) sequence_free(m, &columns[k].sequence);
        sequence_free(m, &untouched->sequence);
        lesson_free(&l);
    }
}

// Makes v (n) perpendicular to all vectors of an orthonormal basis, twice for the sake of rounding,
// and of length 1. False if nothing is left of it.
static bool make_perpendicular(double *v, double (*basis)[128], int n_basis, int n) {
    double length = 0;
    for (int b = 0; b < 2 * n_basis; b++) {
        double product = 0;
        for (int j = 0; j < n; j++) product += basis[b % n_basis][j] * v[j];
        for (int j = 0; j < n; j++) v[j] -= product * basis[b % n_basis][j];
    }
    for (int j = 0; j < n; j++) length += v[j] * v[j];
    for (int j = 0; j < n; j++) v[j] /= sqrt(length);
    return length > 1e-10;
}

// A step teaches a matrix nothing about inputs that are perpendicular to all of the lesson's, of
// which there is one for each prediction.
Test(step, leaves_alone_what_is_perpendicular) {
    Lesson l;
    teach(&l, 1, SOBER);
    Column column = {sequence_new(NO_NOISE), 1};
    l.stepped.run.rows = &(Row){1, 0, &column.sequence, false, true, NULL};
    int n_matrices = 0;
    for (int k = 0; k < l.n_tensors; k++) {
        const Tensor t = nth(l.c, k);
        const float *dy, *x;
        double basis[N][128];
        float in[2][128], out[2][128] = {{0}};
        int n = factors(&l.step, t.layer, t.which, &dy, &x), n_basis = 0;
        if (!n) continue;
        cr_assert_eq(n, N - 1);
        for (int j = 0; j < t.n_in; j++) in[0][j] = unit(77, (uint64_t)j) - .5f;
        for (int v = 0; v <= n; v++) { // the last one is what is left of in[0]
            for (int j = 0; j < t.n_in; j++)
                basis[n_basis][j] = (double)(v < n ? x[v * t.n_in + j] : in[0][j]);
            n_basis += make_perpendicular(basis[n_basis], basis, n_basis, t.n_in);
        }
        for (int j = 0; j < t.n_in; j++)
            in[1][j] = (float)(basis[n_basis - 1][j] * norm_of(in[0], t.n_in));
        for (int j = 0; j < 2; j++)
            stepped_door(&l.stepped.run, t.layer, t.which, in[j], out[j], 1);
        const double moved = norm_of(out[1], t.n_out) / norm_of(out[0], t.n_out);
        cr_assert(moved < 1e-5, "tensor %d: %g", k, moved); // observed 2e-7
        n_matrices++;
    }
    cr_assert_eq(n_matrices, 7 * M.n_layers + 1);
    lesson_free(&l);
}

// ---- steps in place

enum { TENTH = 10 };
static void learn_at_once(Step *s, int layer, int which, const float *dy, const float *x, int n) {
    float *w = (float *)(uintptr_t)*tensor(s->model, layer, which);
    int n_out, n_in;
    tensor_shape(&s->model->config, which, &n_out, &n_in);
    for (int r = 0; r < n; r++)
        for (int o = 0; o < (x ? n_out : 1); o++)
            if (x) add_scaled(w + o * n_in, -dy[r * n_out + o] / TENTH, x + r * n_in, n_in);
            else add_scaled(w + (which == TOK_EMB ? s->inputs[r] : 0) * n_in, -1.f / TENTH,
                            dy + r * n_in, n_in);
}

// A step that changes each weight as soon as backward is done with it ends where the ordinary one
// does. At this step size a wrong order would show: with weights that changed before backward used
// them, gradients are far off.
Test(step, in_place) {
    for (int i = 0; i < 4; i++) {
        Lesson ordinary, fused, early;
        Bench after;
        double worst = 0;
        teach(&ordinary, i % 2, i < 2 ? SOBER : ALL);
        step_for_good(&ordinary, &after, 1.f / TENTH);
        prepare(&fused, i % 2, i < 2 ? SOBER : ALL);
        fused.step.update = learn_at_once;
        step_take(&fused.step);
        prepare(&early, i % 2, i < 2 ? SOBER : ALL);
        forward(&early.bench.model, &early.step.acts, early.step.rows, early.step.n_rows);
        memcpy(early.bench.file.data, after.file.data, after.file.n);
        backward(&early.step);
        write_gradients(&early);
        for (int k = 0; k < ordinary.n_tensors; k++) {
            const Tensor t = nth(ordinary.c, k);
            float *off = weights(&fused.bench, t);
            add_scaled(off, -1, weights(&after, t), t.size);
            const double error = TENTH * norm_of(off, t.size) / norm_of(ordinary.g[k], t.size);
            cr_assert(error < 5e-5, "tensor %d: %g", k, error); // observed 1.3e-6
            worst = fmax(worst, error_of(early.g[k], ordinary.g[k], t.size));
        }
        cr_assert(worst > .1, "%g", worst); // observed .5 at least
        lesson_free(&ordinary);
        lesson_free(&fused);
        lesson_free(&early);
        bench_close(&after);
    }
}

// ---- the small model, and files

static const char TO_BE[] = "To be, or not to be, that is the question:";

// Opens the model at path and takes a step on a text.
static void study(Lesson *l, const char *path, const char *text) {
    *l = (Lesson){.sequence = sequence_new(NO_NOISE)};
    Model *m = &l->bench.model;
    cr_assert(model_open(m, path), "%s: %s (run me in the project's folder)", path, m->error);
    l->c = &m->config;
    int n, *tokens = encode(m, text, strlen(text), true, &n);
    step_init(&l->step, m, n, n);
    step_add(&l->step, &l->sequence, tokens, n, true, false);
    step_take(&l->step);
    stepped_init(&l->stepped, &l->step, N);
    run_init(&l->bench.run, m, N, 1);
    free(tokens);
}

// What the model writes behind a prompt after a step of this size. The caller frees it.
static char *written(Lesson *l, double eta, const char *prompt) {
    const Experiment e = {.eta = {eta}, .n_etas = 1, .n_new = 60};
    int n, *tokens = encode(&l->bench.model, prompt, strlen(prompt), true, &n);
    char **texts = write_columns(&l->stepped, &e, tokens, n), *text = texts[0];
    free(texts);
    free(tokens);
    return text;
}

// The same without a step and one token at a time, for comparison.
static char *written_plainly(Lesson *l, const char *prompt) {
    const Model *m = &l->bench.model;
    char *text;
    size_t size;
    Printer p = {.to = open_memstream(&text, &size), .at_start = true};
    Sequence s = sequence_new(NO_NOISE);
    int n, *tokens = encode(m, prompt, strlen(prompt), true, &n);
    for (int i = 0; i < n; i++) print_token(&p, &m->tokenizer, tokens[i]);
    const float *z = feed(m, &l->bench.run, &s, tokens, n, 0, false, true);
    for (int i = 0; i < 60; i++) {
        const int next = argmax(z, l->c->vocab_size);
        if (next == l->c->eos || next == l->c->bos) break;
        print_token(&p, &m->tokenizer, next);
        z = feed(m, &l->bench.run, &s, &next, 1, s.length, false, true);
    }
    print_rest(&p);
    fclose(p.to);
    free(tokens);
    sequence_free(m, &s);
    return text;
}

// How many words two texts have in common before they part.
static int common_words(const char *a, const char *b) {
    const char *const space = " \n";
    for (int n = 0;; n++) {
        a += strspn(a, space);
        b += strspn(b, space);
        const size_t length = strcspn(a, space);
        if (!length || length != strcspn(b, space) || memcmp(a, b, length)) return n;
        a += length;
        b += length;
    }
}

// What the article saw: business without a step or after the smallest; after a small one the whole
// soliloquy, of which the lesson is but one line; after a large one a stutter, then ruin. A prompt
// that speaks of Shakespeare needs no step.
Test(hamlet, one_step) {
    const char *other = getenv("HAMLET"), *model = other ? other : "tests/hamlet.bin";
    Lesson l;
    char soliloquy[1024], *text[6];
    double loss[2];
    int n;
    study(&l, model, TO_BE);
    snprintf(soliloquy, sizeof soliloquy, "%s%s", TO_BE, SEQUEL);
    for (int i = 0; i < 5; i++)
        text[i] = written(&l, (double[]){0, 1e-4, 1e-3, 1e-2, .1}[i], "To be");
    text[5] = written(&l, 0, "Here is one of Shakespeare's more famous works: To be");
    for (int i = 0; i < 2; i++) // advice: "To be a good leader", "To be able to", ...
        cr_assert(!strncmp(text[i], "To be ", 6) && strstr(text[i], "you need to"), "%s", text[i]);
    cr_assert_geq(common_words(text[2], soliloquy), 10 + 30, "%s", text[2]);
    cr_assert_lt(common_words(text[3], soliloquy), 10, "%s", text[3]);
    cr_assert_leq(common_words(text[3], text[0]), 2, "%s", text[3]);
    cr_assert_lt(common_words(text[4], soliloquy), 4, "%s", text[4]);
    cr_assert_null(strstr(text[4], "you need to"), "%s", text[4]);
    cr_assert_geq(common_words(strstr(text[5], "To be"), soliloquy), 10 + 20, "%s", text[5]);

    int *tokens = encode(&l.bench.model, TO_BE, strlen(TO_BE), true, &n);
    text_loss(&l.stepped, 1e-3f, tokens, n, 1, n, loss);
    cr_assert_lt(loss[0], l.step.loss / 3);
    cr_assert_eq(loss[1], -1);                   // of nothing
    text_loss(&l.stepped, .1f, tokens, n, 1, n, loss);
    cr_assert_gt(loss[0], log(l.c->vocab_size)); // ruin: guessing would do better
    text_loss(&l.stepped, 0, tokens, n, 1, 5, loss); // 4 predictions, and those from token 5 on
    cr_assert(fabs((4 * loss[0] + (n - 5) * loss[1]) / (n - 1) / l.step.loss - 1) < 1e-5);
    double beginning[2];
    text_loss(&l.stepped, 0, tokens, 5, 1, 5, beginning);
    cr_assert(fabs(beginning[0] / loss[0] - 1) < 1e-12);
    for (int i = 0; i < 6; i++) free(text[i]);
    free(tokens);
    lesson_free(&l);
}

// The model written with its step taken opens, differs in nothing but weights, and has the text and
// the logits of the virtual one. With a shared classifier, and with one of its own.
Test(hamlet, written_to_a_file) {
    static float virtual[N * MOST_VOCAB], real[N * MOST_VOCAB];
    char folder[] = "/tmp/test_step_XXXXXX", path[2][64]; // of M, and of the stepped model
    Bench b;
    bench_open(&b, M, 1);
    cr_assert_not_null(mkdtemp(folder));
    for (int i = 0; i < 2; i++) snprintf(path[i], sizeof path[i], "%s/%d.bin", folder, i);
    FILE *f = fopen(path[0], "wb");
    cr_assert(f && fwrite(b.file.data, b.file.n, 1, f) && !fclose(f));
    bench_close(&b);
    for (int i = 0; i < 4; i++) {
        const float eta = i < 2 ? 1e-3f : .1f;
        Lesson l, after; // `after` learns something as well, but its step size is 0
        study(&l, i % 2 ? path[0] : "tests/hamlet.bin", TO_BE);
        write_stepped(&l.step, eta, path[1]);
        study(&after, path[1], TO_BE);
        const Model *m = &l.bench.model, *n = &after.bench.model;
        cr_assert_eq(n->file_bytes, m->file_bytes);
        cr_assert(!memcmp(n->file, m->file, (size_t)(HEADER_BYTES + m->config.tokenizer_bytes)));
        char *a = written(&l, (double)eta, "To be"), *z = written_plainly(&after, "To be");
        cr_assert_str_eq(a, z);
        read_all(m, &l.stepped.run, eta, M_TOKENS, N, virtual);
        read_all(n, &after.bench.run, 0, M_TOKENS, N, real);
        const double error = error_of(virtual, real, N * l.c->vocab_size);
        cr_assert(error < 5e-5, "eta %g: %g", (double)eta, error); // observed 1.4e-6
        free(a);
        free(z);
        lesson_free(&l);
        lesson_free(&after);
    }
    for (int i = 0; i < 2; i++) remove(path[i]);
    cr_assert(!rmdir(folder)); // nothing else was left in it
}

// ---- the pieces of the maths

// Going back through a glitch is the derivative of the rotation, stated here once more in double:
// for each number of x, how g . r(x) changes with it. A vector that was not turned stays.
Test(maths, turn_backward) {
    for (int i = 0; i < 200; i++) {
        const int n = (int[]){2, 3, 8, 13, 64}[i % 5];
        const float theta = (float[]){.01f, .5f, 2, 6}[i % 4], zero[64] = {0};
        const Noise noise = {SEED, i / 2 % 2 ? FAMILY_CENTRED : FAMILY_UPSTREAM, NULL};
        const uint64_t place = within(noise.seed, i);
        const double angle = (double)(theta * uniform(place, 0)), h = 1e-6;
        float x[64], g[64], dx[64], u[64];
        double worst = 0, apart = 0; // apart: |o| / |u|, how far x and u are from parallel
        for (int j = 0; j < n; j++) {
            x[j] = unit(200, (uint64_t)(64 * i + j)) * 4 - 2;
            g[j] = dx[j] = unit(201, (uint64_t)(64 * i + j)) - .5f;
        }
        turn_backward(&noise, place, theta, x, dx, n, u);
        for (int k = 0; k < n; k++) {
            double slope = 0;
            for (int sign = -1; sign <= 1; sign += 2) {
                double y[64], xx = 0, ux = 0, oo = 0;
                for (int j = 0; j < n; j++) {
                    y[j] = (double)x[j] + (j == k) * sign * h;
                    xx += y[j] * y[j];
                    ux += (double)u[j] * y[j];
                }
                for (int j = 0; j < n; j++) oo += pow((double)u[j] - ux / xx * y[j], 2);
                for (int j = 0; j < n; j++)
                    slope += sign * (double)g[j] * (y[j] * cos(angle) + sin(angle) * sqrt(xx / oo)
                                                    * ((double)u[j] - ux / xx * y[j])) / (2 * h);
                apart = sqrt(oo) / norm_of(u, n);
            }
            worst = fmax(worst, fabs((double)dx[k] - slope) / norm_of(g, n));
        }
        cr_assert(apart < .2 || worst < 1e-5, "%d: %g", i, worst); // observed 7e-7
        memcpy(dx, g, sizeof g);
        turn_backward(&noise, place, 0, x, dx, n, u);
        turn_backward(&noise, place, theta, zero, dx, n, u); // it has no direction to turn from
        cr_assert(same(dx, g, (size_t)n));
    }
}

// add_product adds a b to what is there and touches nothing behind it, whatever the shapes and in
// both readings of a, as a naive sum in double says.
Test(maths, add_product) {
    enum { ROWS = 13, KS = 70, COLS = 2100 };
    const int rows[] = {1, 2, 3, 4, 5, 8, ROWS}, ks[] = {0, 1, 2, 31, 32, 33, KS};
    const int cols[] = {1, 2, 7, 8, 9, 15, 16, 17, 33, 100, 511, 513, COLS};
    static float a[ROWS * KS], b[KS * COLS], out[ROWS * COLS], old[ROWS * COLS];
    for (int i = 0; i < KS * COLS; i++) b[i] = unit(300, (uint64_t)i) - .5f;
    for (int i = 0; i < ROWS * KS; i++) a[i] = unit(301, (uint64_t)i) - .5f;
    for (int i = 0; i < ROWS * COLS; i++) old[i] = unit(302, (uint64_t)i) - .5f;
    for (int i = 0; i < 2 * 7 * 7 * 13; i++) {
        const int n = rows[i / 2 % 7], n_k = ks[i / 14 % 7], n_cols = cols[i / 98];
        const int a_row = i % 2 ? 1 : n_k, a_k = i % 2 ? n : 1;
        memcpy(out, old, sizeof out);
        add_product(out, a, a_row, a_k, b, n, n_k, n_cols);
        for (int j = 0; j < n * n_cols; j++) {
            double want = (double)old[j], size = fabs(want);
            for (int k = 0; k < n_k; k++) {
                const float *at = &b[k * n_cols + j % n_cols];
                const double term = (double)a[j / n_cols * a_row + k * a_k] * (double)*at;
                want += term;
                size += fabs(term);
            }
            const double error = fabs((double)out[j] - want) / size;
            cr_assert(error < 1e-6, "%d %d %d: %g", n, n_k, n_cols, error); // observed 4e-7
        }
        cr_assert(same(out + n * n_cols, old + n * n_cols, (size_t)(ROWS * COLS - n * n_cols)));
    }
}
