/* train_step.c - take ONE step of gradient descent on one phrase, and watch what it does.
 *
 * A model that continues "To be" with business advice is shown "To be, or not to be, that is the
 * question:" once. We compute how the loss of this phrase changes with each of the model's numbers,
 * the gradient, and subtract a little of it: W - eta * dL/dW. One number, eta, decides what becomes
 * of the model: nothing; the whole soliloquy; a stutter; ruin. We print them side by side.
 *
 *   1  the maths of going back   one kernel, and the derivative of each block of the forward pass
 *   2  the backward pass         the mirror of forward in drugs.c: read them next to each other
 *   3  the virtual step          the stepped model without a stepped weight
 *   4  measuring                 losses, probabilities, norms
 *   5  the experiment            before, the table, after
 *   6  the command line
 *
 * The convention of all that follows: the gradient of the loss with respect to something has the
 * shape of that thing and is written with a d in front. If y = f(x), going back means: given dy,
 * find dx. Where x is used twice, the two dx add up.
 */
#pragma push_macro("main") // whoever includes this file may have renamed main too
#undef main
#define main drugs_main
#include "drugs.c"
#pragma pop_macro("main")
#include <sys/ioctl.h>

/* ================================================================================================
 * 1  The maths of going back
 */
enum { COLUMNS = 4 * LANES, STRIP = 512, MANY_ROWS = 32, BLOCK = 32 };

// out (n_rows, n_cols) += a b. a[r][k] stands at a[r * a_row + k * a_k], and b is (n_k, n_cols).
// It goes back through a matrix (dX += dY W: the rows of W, weighted with dY) and forms a matrix's
// gradient (dW = dYᵀ X: the same with dY read the other way round). matmul in drugs.c goes along
// the rows of W; this goes across, in strips of columns and blocks of rows, so that what was
// fetched from memory once serves all rows of out. Where these are many, a block is put together
// first: numbers that lie a power of two apart would push each other out of the cache.
static void add_product(float *out, const float *a, ptrdiff_t a_row, ptrdiff_t a_k, const float *b,
                        ptrdiff_t n_rows, ptrdiff_t n_k, ptrdiff_t n_cols) {
    const ptrdiff_t quarter = (n_cols / 4 + COLUMNS - 1) / COLUMNS * COLUMNS;
    const ptrdiff_t strip = quarter > STRIP ? STRIP : quarter ? quarter : COLUMNS;
#pragma omp parallel for schedule(static) if (n_rows * n_k * n_cols > WORTH_THREADS)
    for (ptrdiff_t first = 0; first < n_cols; first += strip) {
        const ptrdiff_t last = first + strip < n_cols ? first + strip : n_cols;
        for (ptrdiff_t k = 0; k < n_k; k += BLOCK)
            for (ptrdiff_t c = first; c < last; c += COLUMNS) {
                const int n = (int)(n_k - k < BLOCK ? n_k - k : BLOCK);
                const ptrdiff_t left = last - c; // columns
                const float *block = b + k * n_cols + c;
                ptrdiff_t stride = n_cols;
                float packed[BLOCK * COLUMNS];
                if (n_rows > MANY_ROWS && left >= COLUMNS) {
                    for (int q = 0; q < n; q++)
                        memcpy(packed + q * COLUMNS, block + q * n_cols, sizeof packed / BLOCK);
                    block = packed;
                    stride = COLUMNS;
                }
                // three rows of four vectors: their sums, a factor and b fill 16 registers
                for (ptrdiff_t r = 0; r < n_rows; r += 3) {
                    float *to = out + r * n_cols + c;
                    const float *at = a + r * a_row + k * a_k;
                    const ptrdiff_t rows_left = n_rows - r;
                    if (left < COLUMNS)
                        for (int i = 0; i < 3 && i < rows_left; i++)
                            sum_tile(to + i * n_cols, 0, at + i * a_row, 0, a_k, block, stride,
                                     left, n, 1, 4);
                    else if (rows_left == 1)
                        sum_tile(to, n_cols, at, a_row, a_k, block, stride, COLUMNS, n, 1, 4);
                    else if (rows_left == 2)
                        sum_tile(to, n_cols, at, a_row, a_k, block, stride, COLUMNS, n, 2, 4);
                    else
                        sum_tile(to, n_cols, at, a_row, a_k, block, stride, COLUMNS, n, 3, 4);
                }
            }
    }
}

// RMSNorm: y = gain * n with n = x * s, s = 1 / sqrt(mean(x²) + eps). The gain is a plain factor:
// dgain += dy * n, dn = dy * gain. x acts twice, as it is and through s, with ds/dx = -s³ x / dim:
//     dx += s * (dn - n * mean(dn * n))
// The second term takes out what would only change the length of x, which RMSNorm forgets.
static void rmsnorm_backward(float *dx, float *dgain, const float *dy, const float *x,
                             const float *gain, int n, float eps) {
    float s = 1.0f / sqrtf(dot(x, x, n) / (float)n + eps), mean = 0;
    for (int i = 0; i < n; i++) mean += dy[i] * gain[i] * (x[i] * s);
    mean /= (float)n;
    for (int i = 0; i < n; i++) {
        float normed = x[i] * s;
        dgain[i] += dy[i] * normed;
        dx[i] += s * (dy[i] * gain[i] - normed * mean);
    }
}

// RoPE is a rotation, so going back is turning by the same angle the other way.
static void rope_backward(float *dx, const float *cos_sin, int n) {
    for (int i = 0; i < n; i += 2) {
        float a = dx[i], b = dx[i + 1], c = cos_sin[i], s = cos_sin[i + 1];
        dx[i] = a * c + b * s;
        dx[i + 1] = b * c - a * s;
    }
}

// A glitch: r = x * mix.x + u * mix.u, where both factors depend on x. With X = x.x, c = u.x,
// O = |o|² = u.u - c²/X and b = mix.u = sin(angle) sqrt(X / O), mix.x = cos(angle) - b c / X:
//     grad b     = b (1/X - c²/(X² O)) x + b c/(X O) u
//     grad mix.x = -(grad b) c/X - b u/X + 2 b c/X² x
//     dx         = mix.x g + (x.g) grad mix.x + (u.g) grad b
// The noise is a function of its place, so u is simply drawn once more. g (n) becomes dx.
static void turn_backward(const Noise *z, uint64_t place, float theta, const float *x, float *g,
                          int n, float *u) {
    if (!(theta > 0)) return;
    const Mix mix = glitch(z, place, theta, x, n, u);
    const double X = dot(x, x, n), c = dot(u, x, n), O = dot(u, u, n) - c * c / X, b = mix.u;
    if (!(X > 0 && O > 0)) return; // it was not turned
    const double xg = dot(x, g, n), ug = dot(u, g, n);
    const double b_x = b * (1 / X - c * c / (X * X * O)), b_u = b * c / (X * O);
    const double a_x = -b_x * c / X + 2 * b * c / (X * X), a_u = -b_u * c / X - b / X;
    const float to_x = (float)(xg * a_x + ug * b_x), to_u = (float)(xg * a_u + ug * b_u);
    for (int i = 0; i < n; i++) g[i] = g[i] * mix.x + x[i] * to_x + u[i] * to_u;
}

/* ================================================================================================
 * 2  The backward pass
 *
 * For n rows the gradient of a matrix, where Y = X Wᵀ, is dW = dYᵀ X: a sum of n products of a
 * column and a row, a matrix of rank n at most. It is as large as W and holds no more than dY and X
 * do. So we keep what the forward pass computed, all the X, and what the backward pass computes,
 * all the dY, and never write dW down. For Llama-2-7B and 13 rows that is 0.2 GB instead of 26.
 */
typedef struct Step {
    const Model *model;
    Run acts, grads; // n_layers + 1 slots each: grads.slots[l].q is the gradient of acts.slots[l].q
    Row *rows;       // (n_rows) each sequence's rows together, from position 0 on
    int *targets;    // (n_rows) the token that should come next; -1: does not count in the loss
    int n_rows, n_loss;
    double loss;         // mean cross entropy in nats, natural logarithm
    float *dgains;       // (2 * n_layers + 1, dim) of the norm gains: attention, FFN, ..., final
    float *scratch;      // (n_kv_heads, 4 * head_dim + 2 * context)
    int *inputs;         // (n_inputs) the distinct tokens of rows
    int n_inputs;
    float *dinputs;      // (n_inputs, dim) the gradient of their embeddings, summed over repeats
    // If set, called with each gradient as soon as the old weight is no longer needed: many steps
    // can be taken in place. For matrices dW = dyᵀ x, else x is NULL and dy the gradient itself.
    void (*update)(struct Step *s, int layer, int which, const float *dy, const float *x, int n);
} Step;

static float *dgain(const Step *s, int layer, int which) {
    int at = which == FINAL_NORM ? 2 * s->model->config.n_layers : 2 * layer + (which == FFN_NORM);
    return s->dgains + (ptrdiff_t)at * s->model->config.dim;
}

// Y = X Wᵀ, so dX += dY W, with the weights that the forward pass used: update comes afterwards.
// dx is emptied first if this is the first of its sources.
static void linear_backward(Step *s, float *dx, bool first, const float *dy, const float *x,
                            int layer, int which, int n_rows) {
    int n_out, n_in;
    tensor_shape(&s->model->config, which, &n_out, &n_in);
    if (first) memset(dx, 0, (size_t)n_rows * (size_t)n_in * sizeof *dx);
    add_product(dx, dy, n_out, 1, *tensor(s->model, layer, which), n_rows, n_out, n_in);
    if (s->update) s->update(s, layer, which, dy, x, n_rows);
}

static void norm_backward(Step *s, float *dx, const float *dy, const float *x, int layer, int which,
                          int n_rows) {
    const Config *c = &s->model->config;
    for (ptrdiff_t r = 0; r < n_rows; r++)
        rmsnorm_backward(dx + r * c->dim, dgain(s, layer, which), dy + r * c->dim, x + r * c->dim,
                         *tensor(s->model, layer, which), c->dim, c->norm_eps);
    if (s->update) s->update(s, layer, which, dgain(s, layer, which), NULL, 1);
}

// One head of one row. Forward was: weight = softmax(q.k / sqrt(n)), out = sum of weight * v.
//     dweight[t] = dout . v[t]          each value was scaled by its weight
//     dv[t]     += weight[t] dout
//     dscore[t]  = weight[t] (dweight[t] - sum of weight * dweight) / sqrt(n)     softmax
//     dq         = sum of dscore[t] k[t],   dk[t] += dscore[t] q
// Weights and turned query are computed anew, which is cheaper than to keep them for all rows.
static void attend_backward(const Step *s, int r, int layer, int head, float *scratch) {
    const Model *m = s->model;
    const Config *c = &m->config;
    const Row *row = &s->rows[r];
    const Noise *noise = &row->sequence->noise;
    const int n = c->head_dim, position = row->position;
    const int kv_head = head / (c->n_heads / c->n_kv_heads);
    const int first = first_key(c, position), n_keys = position - first + 1;
    const float *cos_sin = s->acts.cos_sin + (ptrdiff_t)r * n;
    const ptrdiff_t stride = c->kv_dim, at = (ptrdiff_t)r * c->q_dim + head * n;
    const ptrdiff_t key_at = first * stride + kv_head * n;            // in the caches
    const ptrdiff_t row_at = (r - position) * stride + key_at;        // in the slots
    const float *keys = row->sequence->k[layer] + key_at;
    const float *values = row->sequence->v[layer] + key_at;
    const float *query = s->acts.slots[layer].q + at;
    float *dkeys = s->grads.slots[layer].k + row_at, *dvalues = s->grads.slots[layer].v + row_at;
    float *dout = s->grads.slots[layer].att + at, *dq = s->grads.slots[layer].q + at;
    const float *q = scratch, *weight = scratch + 2 * n; // as attend leaves them
    float *u = scratch + n, *out = scratch + 2 * n + n_keys, *g = out + n, *dscore = g + n;

    attend(m, row, cos_sin, layer, head, query, out, scratch);
    turn_backward(noise, place_of(row, SITE_A, layer, head), dose_of(m, row, SITE_A, layer), out,
                  dout, n, u);

    const float k_theta = dose_of(m, row, SITE_K, layer), v_theta = dose_of(m, row, SITE_V, layer);
    const uint64_t k_place = place_of(row, SITE_K, layer, head);
    const uint64_t v_place = place_of(row, SITE_V, layer, head);
    const int k_sober = untouched_keys(k_theta, first, n_keys);
    const int v_sober = untouched_keys(v_theta, first, n_keys);
    float sum = 0;
    dots(dscore, dout, values, stride, n, n_keys); // dweight
    for (int t = 0; t < n_keys; t++) {
        const bool turned = t >= v_sober;
        const uint64_t place = turned ? within(v_place, first + t) : 0;
        if (turned) { // the value that was read is v * mix.x + u * mix.u
            Mix mix = glitch(noise, place, v_theta, values + t * stride, n, u);
            dscore[t] = dscore[t] * mix.x + dot(dout, u, n) * mix.u;
        }
        sum += weight[t] * dscore[t];
        if (!turned) { add_scaled(dvalues + t * stride, weight[t], dout, n); continue; }
        for (int i = 0; i < n; i++) g[i] = weight[t] * dout[i];
        turn_backward(noise, place, v_theta, values + t * stride, g, n, u);
        add_scaled(dvalues + t * stride, 1, g, n);
    }
    for (int t = 0; t < n_keys; t++) dscore[t] = weight[t] * (dscore[t] - sum) / sqrtf((float)n);
    weighted_sum(dq, dscore, keys, stride, n, k_sober);
    for (int t = 0; t < n_keys; t++) {
        const float *key = keys + t * stride;
        if (t < k_sober) {
            add_scaled(dkeys + t * stride, dscore[t], q, n);
            continue;
        }
        const uint64_t place = within(k_place, first + t); // the key that was read, likewise
        Mix mix = glitch(noise, place, k_theta, key, n, u);
        add_scaled(dq, dscore[t] * mix.x, key, n);
        add_scaled(dq, dscore[t] * mix.u, u, n);
        for (int i = 0; i < n; i++) g[i] = dscore[t] * q[i];
        turn_backward(noise, place, k_theta, key, g, n, u);
        add_scaled(dkeys + t * stride, 1, g, n);
    }
    rope_backward(dq, cos_sin, n);
    turn_backward(noise, place_of(row, SITE_Q, layer, head), dose_of(m, row, SITE_Q, layer), query,
                  dq, n, u);
}

// Loss and its gradient: the loss of a row is -log softmax(logits)[target], whose gradient is the
// probabilities, minus one at the target. acts.logits stays; grads.logits gets the gradient.
static void loss_backward(Step *s) {
    const int n = s->model->config.vocab_size;
    double *losses = resize(NULL, s->n_rows, sizeof *losses);
#pragma omp parallel for schedule(static) if ((ptrdiff_t)s->n_rows * n * 16 > WORTH_THREADS)
    for (int r = 0; r < s->n_rows; r++) {
        losses[r] = 0;
        if (s->targets[r] < 0) continue;
        const float *z = s->rows[r].logits;
        float *dz = s->grads.logits + (z - s->acts.logits);
        memcpy(dz, z, (size_t)n * sizeof *dz);
        losses[r] = softmax(dz, n, 1) - z[s->targets[r]];
        for (int i = 0; i < n; i++) dz[i] /= (float)s->n_loss;
        dz[s->targets[r]] -= 1.0f / (float)s->n_loss;
    }
    s->loss = 0;
    for (int r = 0; r < s->n_rows; r++) s->loss += losses[r] / s->n_loss;
    free(losses);
}

// The mirror of forward: each block below has its twin there, in the opposite order.
static void backward(Step *s) {
    const Model *m = s->model;
    const Config *c = &m->config;
    const int rows = s->n_rows, L = c->n_layers;
    const ptrdiff_t dim = c->dim, n = rows;
    const ptrdiff_t per_head = 4 * c->head_dim + 2 * (ptrdiff_t)s->acts.context;
    memset(s->dgains, 0, (size_t)(2 * L + 1) * (size_t)dim * sizeof(float));
    loss_backward(s);

    // logits = classifier rmsnorm(x). Rows that count stand together and go back to their places
    const Slot *a = &s->acts.slots[L], *g = &s->grads.slots[L];
    linear_backward(s, g->fn, true, s->grads.logits, a->fn, 0, WCLS, s->n_loss);
    memset(g->x, 0, (size_t)(n * dim) * sizeof *g->x);
    norm_backward(s, g->x, g->fn, a->x, 0, FINAL_NORM, s->n_loss);
    for (ptrdiff_t r = n - 1, i = s->n_loss; r >= 0; r--) {
        const size_t bytes = (size_t)dim * sizeof(float);
        if (s->targets[r] >= 0) memmove(g->x + r * dim, g->x + --i * dim, bytes);
        else memset(g->x + r * dim, 0, bytes);
    }

    for (int l = L - 1; l >= 0; l--) {
        const float *dx = s->grads.slots[l + 1].x;
        a = &s->acts.slots[l];
        g = &s->grads.slots[l];

        // x = xm + w2 h: dx goes both ways
        memcpy(g->xm, dx, (size_t)(n * dim) * sizeof(float));
        linear_backward(s, g->h, true, dx, a->h, l, W2, rows);

        // h = silu(gate) * up, silu(z) = z S(z) with S = 1 / (1 + exp(-z)) and S' = S (1 - S); the
        // derivative needs no exp_lanes, which only keeps the forward pass the same everywhere
#pragma omp parallel for schedule(static) if (n * c->hidden_dim * 16 > WORTH_THREADS)
        for (ptrdiff_t i = 0; i < n * c->hidden_dim; i++) {
            float z = a->gate[i], sigmoid = 1.0f / (1.0f + expf(-z));
            g->up[i] = g->h[i] * z * sigmoid;
            g->gate[i] = g->h[i] * a->up[i] * sigmoid * (1.0f + z * (1.0f - sigmoid));
        }
        linear_backward(s, g->fn, true, g->gate, a->fn, l, W1, rows);
        linear_backward(s, g->fn, false, g->up, a->fn, l, W3, rows);
        norm_backward(s, g->xm, g->fn, a->xm, l, FFN_NORM, rows);

        // xm = x + wo att
        memcpy(g->x, g->xm, (size_t)(n * dim) * sizeof(float));
        linear_backward(s, g->att, true, g->xm, a->att, l, WO, rows);

        // attention; the query heads that share a key head add to the same dk and dv
        const int group = c->n_heads / c->n_kv_heads;
        memset(g->q, 0, (size_t)(n * c->q_dim) * sizeof *g->q);
        memset(g->k, 0, (size_t)(n * c->kv_dim) * sizeof *g->k);
        memset(g->v, 0, (size_t)(n * c->kv_dim) * sizeof *g->v);
#pragma omp parallel for schedule(static) if (n * c->q_dim * 64 > WORTH_THREADS)
        for (int kv_head = 0; kv_head < c->n_kv_heads; kv_head++)
            for (int r = 0; r < rows; r++)
                for (int h = kv_head * group; h < (kv_head + 1) * group; h++)
                    attend_backward(s, r, l, h, s->scratch + kv_head * per_head);
        for (ptrdiff_t r = 0; r < n; r++)
            for (int h = 0; h < c->kv_dim; h += c->head_dim)
                rope_backward(g->k + r * c->kv_dim + h, s->acts.cos_sin + r * c->head_dim,
                              c->head_dim);

        // q, k, v = wq, wk, wv of xn; xn = rmsnorm(x) turned at H
        linear_backward(s, g->xn, true, g->q, a->xn, l, WQ, rows);
        linear_backward(s, g->xn, false, g->k, a->xn, l, WK, rows);
        linear_backward(s, g->xn, false, g->v, a->xn, l, WV, rows);
        for (ptrdiff_t r = 0; r < n; r++) {
            float theta = dose_of(m, &s->rows[r], SITE_H, l), *sober = s->acts.y, *u = s->grads.y;
            if (!(theta > 0)) continue;
            rmsnorm(sober, a->x + r * dim, *tensor(m, l, ATT_NORM), c->dim, c->norm_eps);
            turn_backward(&s->rows[r].sequence->noise, place_of(&s->rows[r], SITE_H, l, 0), theta,
                          sober, g->xn + r * dim, c->dim, u);
        }
        norm_backward(s, g->x, g->xn, a->x, l, ATT_NORM, rows);
    }

    // The embedding: only the rows of the tokens that came in.
    const float *dx = s->grads.slots[0].x;
    memset(s->dinputs, 0, (size_t)(n * dim) * sizeof(float));
    s->n_inputs = 0;
    for (ptrdiff_t r = 0; r < n; r++) {
        int i = 0;
        while (i < s->n_inputs && s->inputs[i] != s->rows[r].token) i++;
        s->inputs[i] = s->rows[r].token;
        if (i == s->n_inputs) s->n_inputs++;
        for (ptrdiff_t j = 0; j < dim; j++) s->dinputs[i * dim + j] += dx[r * dim + j];
    }
    if (s->update) s->update(s, 0, TOK_EMB, s->dinputs, NULL, s->n_inputs);
}

// Room for a step over at most max_rows rows of contexts up to `context` tokens.
static void step_init(Step *s, const Model *m, int max_rows, int context) {
    const Config *c = &m->config;
    *s = (Step){.model = m};
    run_init(&s->acts, m, max_rows, c->n_layers + 1);
    run_init(&s->grads, m, max_rows, c->n_layers + 1);
    s->acts.context = context; // so that forward and backward agree on the size of scratch
    const ptrdiff_t per_head = 2 * c->head_dim + (ptrdiff_t)context;
    s->acts.scratch = resize(NULL, c->n_heads * per_head, sizeof(float));
    s->scratch = resize(NULL, c->n_kv_heads * 2 * per_head, sizeof(float));
    s->rows = resize(NULL, max_rows, sizeof *s->rows);
    s->targets = resize(NULL, max_rows, sizeof *s->targets);
    s->inputs = resize(NULL, max_rows, sizeof *s->inputs);
    s->dinputs = resize(NULL, (ptrdiff_t)max_rows * c->dim, sizeof(float));
    s->dgains = resize(NULL, (2 * (ptrdiff_t)c->n_layers + 1) * c->dim, sizeof(float));
}

static void step_free(Step *s) {
    run_free(&s->acts);
    run_free(&s->grads);
    free(s->scratch);
    free(s->rows);
    free(s->targets);
    free(s->inputs);
    free(s->dinputs);
    free(s->dgains);
}

// Adds a text of n tokens to the rows: token i is to be followed by token i + 1. Only the last of
// these predictions counts in the loss if last_only, else all do.
static void step_add(Step *s, Sequence *sequence, const int *tokens, int n, bool drugged,
                     bool last_only) {
    for (int i = 0; i + 1 < n; i++) {
        bool counts = !last_only || i + 2 == n;
        s->rows[s->n_rows] = (Row){tokens[i], i, sequence, drugged, counts, NULL};
        s->targets[s->n_rows++] = counts ? tokens[i + 1] : -1;
        s->n_loss += counts;
    }
}

// Forward and backward over the rows that were added: loss and all gradients.
static void step_take(Step *s) {
    forward(s->model, &s->acts, s->rows, s->n_rows);
    backward(s);
}

// The two factors of a matrix's gradient dW = dyᵀ x. Returns their number of rows, 0 for a tensor
// that has none (norm gains, and an embedding that is not the classifier as well).
static int factors(const Step *s, int layer, int which, const float **dy, const float **x) {
    const Slot *a = &s->acts.slots[layer], *g = &s->grads.slots[layer];
    const int L = s->model->config.n_layers;
    switch (which) {
    case WQ: *dy = g->q; *x = a->xn; return s->n_rows;
    case WK: *dy = g->k; *x = a->xn; return s->n_rows;
    case WV: *dy = g->v; *x = a->xn; return s->n_rows;
    case WO: *dy = g->xm; *x = a->att; return s->n_rows;
    case W1: *dy = g->gate; *x = a->fn; return s->n_rows;
    case W3: *dy = g->up; *x = a->fn; return s->n_rows;
    case W2: *dy = s->grads.slots[layer + 1].x; *x = a->h; return s->n_rows;
    case TOK_EMB: if (!s->model->config.shared_classifier) return 0; // fall through
    case WCLS: *dy = s->grads.logits; *x = s->acts.slots[L].fn; return s->n_loss;
    default: return 0;
    }
}

/* ================================================================================================
 * 3  The virtual step
 *
 * The stepped matrix is W - eta dYᵀX, and what it does to a vector needs no such matrix:
 *
 *     (W - eta dYᵀX) x = W x - eta dYᵀ (X x)
 *
 * n dot products with the lesson's inputs, and n vectors to add: half a percent more work for
 * Llama-2-7B and 13 rows. It also shows what a step can do at most: an x that is perpendicular to
 * all n inputs of the lesson is not affected at all. And since eta is only a factor at the end,
 * each sequence can have its own, and all columns of the table are written side by side.
 */
typedef struct {
    Sequence sequence; // comes first: forward knows only this, behind_door finds eta behind it
    float eta;
} Column;

typedef struct {
    Run run; // comes first, likewise
    const Step *step;
    float *products; // (n_rows of the step) X x
    float *y;        // (dim) a row normed with the gradient of a gain
} SteppedRun;

// y (n_out) -= eta dyᵀ (X x) for one row x; dy and X have n rows.
static void correct(const SteppedRun *t, float *y, const float *x, float eta, const float *dy,
                    const float *X, int n, int n_out, int n_in) {
    matmul(t->products, x, X, 1, n_in, n);
    for (int i = 0; i < n; i++) t->products[i] *= -eta;
    add_product(y, t->products, n, 1, dy, 1, n, n_out);
}

// The stepped embedding of a token: its own row moved if it came in, and where it is the classifier
// as well, by how much each row of the lesson wanted to predict it: column `token` of dy, times x.
static void correct_embedding(const Step *s, float *out, float eta, int token) {
    const Config *c = &s->model->config;
    const float *dy = NULL, *x = NULL;
    const int n = factors(s, 0, TOK_EMB, &dy, &x);
    for (ptrdiff_t i = 0; i < s->n_inputs; i++)
        if (s->inputs[i] == token) add_scaled(out, -eta, s->dinputs + i * c->dim, c->dim);
    for (ptrdiff_t i = 0; i < n; i++)
        add_scaled(out, -eta * dy[i * c->vocab_size + token], x + i * c->dim, c->dim);
}

// Behind the doors of forward: turns what the weights gave into what the stepped ones give.
static void stepped_door(const Run *run, int layer, int which, const float *x, float *y,
                         int n_rows) {
    const SteppedRun *t = (const SteppedRun *)run;
    const Step *s = t->step;
    const Config *c = &s->model->config;
    const bool last = which == FINAL_NORM || which == WCLS; // only rows that want logits come here
    const float *dy = NULL, *factor = NULL;
    const int n = factors(s, layer, which, &dy, &factor);
    int n_out, n_in;
    tensor_shape(c, which, &n_out, &n_in);
    const Row *row = run->rows;
    for (ptrdiff_t r = 0; r < n_rows; r++, row++) {
        while (last && !row->wants_logits) row++;
        const float eta = ((const Column *)row->sequence)->eta;
        if (eta == 0) continue; // bitwise the untouched model
        if (which == TOK_EMB) {
            correct_embedding(s, y + r * n_in, eta, row->token);
        } else if (!n) { // a norm: linear in its gain, too
            rmsnorm(t->y, x + r * n_in, dgain(s, layer, which), n_in, c->norm_eps);
            add_scaled(y + r * n_in, -eta, t->y, n_in);
        } else {
            correct(t, y + r * n_out, x + r * n_in, eta, dy, factor, n, n_out, n_in);
            // a shared embedding also moved where the lesson's tokens came in
            for (ptrdiff_t i = 0; which == WCLS && c->shared_classifier && i < s->n_inputs; i++)
                y[r * n_out + s->inputs[i]] -= eta * dot(s->dinputs + i * n_in, x + r * n_in, n_in);
        }
    }
}

static void stepped_init(SteppedRun *t, const Step *s, int max_rows) {
    run_init(&t->run, s->model, max_rows, 1);
    t->run.behind_door = stepped_door;
    t->step = s;
    t->products = resize(NULL, s->n_rows, sizeof(float));
    t->y = resize(NULL, s->model->config.dim, sizeof(float));
}

static void stepped_free(SteppedRun *t) {
    run_free(&t->run);
    free(t->products);
    free(t->y);
}

// Adds `factor` times the gradient of a tensor to n of its rows, from row `first` on: w (n, n_in).
// This is the step written down, for -o and for those who want to compare.
static void add_gradient(const Step *s, float *w, float factor, int layer, int which, int first,
                         int n) {
    int n_out, n_in;
    const float *dy = NULL, *x = NULL;
    tensor_shape(&s->model->config, which, &n_out, &n_in);
    const int n_factors = factors(s, layer, which, &dy, &x);
    float *scaled = resize(NULL, (ptrdiff_t)n_factors * n_in, sizeof *scaled);
    for (ptrdiff_t i = 0; i < (ptrdiff_t)n_factors * n_in; i++) scaled[i] = factor * x[i];
    if (n_factors) add_product(w, dy + first, 1, n_out, scaled, n, n_factors, n_in);
    free(scaled);
    if (which == TOK_EMB) {
        for (ptrdiff_t i = 0; i < s->n_inputs; i++)
            if (s->inputs[i] >= first && s->inputs[i] < first + n)
                add_scaled(w + (s->inputs[i] - first) * (ptrdiff_t)n_in, factor,
                           s->dinputs + i * n_in, n_in);
    } else if (!n_factors) {
        add_scaled(w, factor, dgain(s, layer, which), n_in);
    }
}

// Writes the model with the step taken. Tensors pass through a few rows at a time, so there is
// never a second model in memory.
static void write_stepped(const Step *s, float eta, const char *path) {
    enum { ROWS = 64 };
    const Model *m = s->model;
    Output out = output_open(path);
    const char *done = m->file; // up to here the file is written
    int layer, which, n_out, n_in;
    for (int i = 0; tensor_at(&m->config, i, &layer, &which) && !ferror(out.to); i++) {
        tensor_shape(&m->config, which, &n_out, &n_in);
        const float *w = *tensor(m, layer, which);
        fwrite(done, 1, (size_t)((const char *)w - done), out.to); // header, pieces, padding
        float *rows = resize(NULL, (ptrdiff_t)ROWS * n_in, sizeof *rows);
        for (int r = 0; r < n_out; r += ROWS) {
            const int n_rows = n_out - r < ROWS ? n_out - r : ROWS;
            const size_t n = (size_t)n_rows * (size_t)n_in;
            memcpy(rows, w + (ptrdiff_t)r * n_in, n * sizeof *rows);
            add_gradient(s, rows, -eta, layer, which, r, n_rows);
            fwrite(rows, sizeof *rows, n, out.to);
        }
        free(rows);
        done = (const char *)(w + (ptrdiff_t)n_out * n_in);
    }
    output_close(&out);
}

/* ================================================================================================
 * 4  Measuring
 */

// |dW|² of a tensor. For two factors it is the sum over all pairs of rows of (dy_i.dy_j)(x_i.x_j):
// the n x n tables of dot products (Gram matrices) say it all, and dW is not needed.
static double gradient_norm2(const Step *s, int layer, int which) {
    const Config *c = &s->model->config;
    const float *dy = NULL, *x = NULL;
    const int n = factors(s, layer, which, &dy, &x), dim = c->dim;
    double sum = 0;
    int n_out, n_in;
    tensor_shape(c, which, &n_out, &n_in);
    if (n) {
        float *gram = resize(NULL, 2 * (ptrdiff_t)n * n, sizeof *gram), *gram_x = gram + n * n;
        matmul(gram, dy, dy, n, n_out, n);
        matmul(gram_x, x, x, n, n_in, n);
        for (int i = 0; i < n * n; i++) sum += (double)gram[i] * gram_x[i];
        free(gram);
    } else if (which != TOK_EMB) {
        sum = dot(dgain(s, layer, which), dgain(s, layer, which), dim);
    }
    for (int i = 0; which == TOK_EMB && i < s->n_inputs; i++) {
        const float *input = s->dinputs + (ptrdiff_t)i * dim;
        sum += dot(input, input, dim);
        for (int j = 0; j < n; j++) // a shared embedding's two halves meet in the lesson's tokens
            sum += 2.0 * dot(input, x + (ptrdiff_t)j * dim, dim)
                 * dy[(ptrdiff_t)j * c->vocab_size + s->inputs[i]];
    }
    return sum;
}

// Mean loss of the stepped model on tokens (n), in two parts: predictions of the tokens from
// `first` up to before `split`, and of those from there on. A part without predictions is -1.
static void text_loss(SteppedRun *t, float eta, const int *tokens, int n, int first, int split,
                      double loss[2]) {
    const Model *m = t->step->model;
    Column column = {sequence_new((Noise){0}), eta};
    Row *rows = resize(NULL, t->run.max_rows, sizeof *rows);
    double sums[2] = {0};
    int counts[2] = {0};
    for (int done = 0; done < n - 1;) {
        int n_rows = n - 1 - done < t->run.max_rows ? n - 1 - done : t->run.max_rows;
        for (int r = 0; r < n_rows; r++)
            rows[r] = (Row){tokens[done + r], done + r, &column.sequence, false, true, NULL};
        forward(m, &t->run, rows, n_rows);
        for (int r = 0; r < n_rows; r++) {
            const int next = ++done, part = next >= split;
            if (next < first) continue;
            sums[part] += surprise(rows[r].logits, m->config.vocab_size, tokens[next]);
            counts[part]++;
        }
    }
    for (int i = 0; i < 2; i++) loss[i] = counts[i] ? sums[i] / counts[i] : -1;
    sequence_free(m, &column.sequence);
    free(rows);
}

/* ================================================================================================
 * 5  The experiment
 */
enum { MAX_STEP_SIZES = 64, MEASURE_ROWS = 128 };
typedef struct {
    const char *prompt, *cure;         // what is completed with a step, and without
    const char *lesson, *rest, *other; // what is taught, how it goes on, and something else
    const char *table, *out;           // files for the table and the stepped model, or NULL
    double eta[MAX_STEP_SIZES];
    int n_etas, n_new;
    bool last_only; // only the lesson's last prediction counts
    Options doses;
} Experiment;

// The lesson as the untouched model sees it, and how the gradient is spread over the model. Returns
// |g|², the square of its norm.
static double print_before(const Step *s) {
    static const char *const names[] = {"att norm", "wq", "wk", "wv", "wo", "FFN norm", "w1", "w3",
                                        "w2", "embedding", "final norm", "classifier"};
    const Config *c = &s->model->config;
    printf("Before the step, the lesson has a loss of %.4f:\n\n", s->loss);
    printf("    %-16s %11s %6s\n", "token", "probability", "rank");
    for (int r = 0; r < s->n_rows; r++) {
        if (s->targets[r] < 0) continue;
        const float *z = s->rows[r].logits, at = z[s->targets[r]];
        int rank = 1;
        for (int i = 0; i < c->vocab_size; i++) rank += z[i] > at;
        char *text = visible(s->model, s->targets[r]);
        printf("    %-16s %11.6f %6d\n", text, exp(-surprise(z, c->vocab_size, s->targets[r])),
               rank);
        free(text);
    }
    double kinds[WCLS + 1] = {0}, total = 0;
    printf("\nIts gradient, |g| by layer:  ");
    for (int l = 0; l < c->n_layers; l++) {
        double layer = 0;
        for (int w = 0; w < N_LAYER_TENSORS; w++) {
            double norm2 = gradient_norm2(s, l, w);
            kinds[w] += norm2;
            layer += norm2;
        }
        total += layer;
        printf(" %.3g", sqrt(layer));
    }
    for (int w = TOK_EMB; w <= WCLS - c->shared_classifier; w++)
        total += kinds[w] = gradient_norm2(s, 0, w);
    printf("\n                  by kind:   ");
    for (int w = 0; w <= WCLS - c->shared_classifier; w++)
        printf("%s %s %.3g", w ? "," : "", names[w], sqrt(kinds[w]));
    printf("\n                  in all:     %.4g\n", sqrt(total));
    return total;
}

// Writes up to n_new greedy tokens behind the prompt for each step size. Returns the texts, prompts
// included; the caller frees them.
static char **write_columns(SteppedRun *t, const Experiment *e, const int *prompt, int n_prompt) {
    const Model *m = t->step->model;
    const int n = e->n_etas, room = m->config.seq_len - n_prompt;
    const int n_new = e->n_new < room ? e->n_new : room;
    Column columns[MAX_STEP_SIZES];
    Text texts[MAX_STEP_SIZES];
    char **written = resize(NULL, n, sizeof *written);
    // Short prompts are read by all columns at once, long ones by one column after the other.
    const bool together = (ptrdiff_t)n * n_prompt <= t->run.max_rows;
    Row *rows = resize(NULL, together ? n * n_prompt : 0, sizeof *rows);
    for (int i = 0; i < n; i++) {
        columns[i] = (Column){sequence_new((Noise){0}), (float)e->eta[i]};
        sequence_reserve(m, &columns[i].sequence, n_prompt + n_new);
        for (int k = 0; together && k < n_prompt; k++)
            rows[i * n_prompt + k] = (Row){prompt[k], k, &columns[i].sequence, false,
                                           k + 1 == n_prompt, NULL};
    }
    if (together) forward(m, &t->run, rows, n * n_prompt);
    for (int i = 0; i < n; i++) {
        Sequence *s = &columns[i].sequence;
        const float *logits = together ? rows[(i + 1) * n_prompt - 1].logits
                            : feed(m, &t->run, s, prompt, n_prompt, 0, false, true);
        texts[i] = (Text){.sequence = s, .next = argmax(logits, m->config.vocab_size),
                          .tokens = (int *)resize(NULL, n_prompt + n_new, sizeof(int)) + n_prompt};
    }
    free(rows);
    write_texts(m, &t->run, texts, n, n_new);
    for (int i = 0; i < n; i++) {
        int *whole = texts[i].tokens - n_prompt;
        memcpy(whole, prompt, (size_t)n_prompt * sizeof *prompt);
        written[i] = text_of(&m->tokenizer, whole, n_prompt + texts[i].n_tokens);
        free(whole);
        sequence_free(m, &columns[i].sequence);
    }
    return written;
}

static const char SPACE[] = " \n\t\r"; // what words stand between

// One word a row, one column a step size.
static void print_table(FILE *out, Style style, const Experiment *e, char *const *texts) {
    const char *at[MAX_STEP_SIZES];
    const int n = e->n_etas;
    for (int i = 0; i < n; i++) {
        char eta[32];
        at[i] = texts[i];
        print_cell(out, style, eta, snprintf(eta, sizeof eta, "%g", e->eta[i]), !i, i + 1 == n);
    }
    for (int i = 0; style.markdown && i < n; i++) fputs(i + 1 < n ? "|---" : "|---|\n", out);
    for (;;) {
        bool more = false;
        for (int i = 0; i < n; i++) more |= at[i][strspn(at[i], SPACE)] != '\0';
        if (!more) break;
        for (int i = 0; i < n; i++) {
            at[i] += strspn(at[i], SPACE);
            const int n_word = (int)strcspn(at[i], SPACE);
            print_cell(out, style, at[i], n_word, !i, i + 1 == n);
            at[i] += n_word;
        }
    }
}

static void print_loss(double loss) {
    if (isfinite(loss)) printf(" %12.4f", loss);
    else printf(" %12s", "not finite");
}

// Plasticity against stability: what the lesson gained, and what everything else paid for it.
static void print_after(SteppedRun *t, const Experiment *e, double norm2) {
    const Model *m = t->step->model;
    char *whole = resize(NULL, (ptrdiff_t)(strlen(e->lesson) + strlen(e->rest)) + 1, 1);
    sprintf(whole, "%s%s", e->lesson, e->rest);
    int n_lesson, n_whole, n_other;
    int *lesson = encode(m, e->lesson, strlen(e->lesson), true, &n_lesson);
    int *passage = encode(m, whole, strlen(whole), true, &n_whole);
    int *other = encode(m, e->other, strlen(e->other), true, &n_other);
    if (n_whole > m->config.seq_len) n_whole = m->config.seq_len;
    if (n_other > m->config.seq_len) n_other = m->config.seq_len;
    printf("\nAfter the step, losses in nats a token:\n\n    %-10s %12s %12s %12s %12s\n",
           "step size", "lesson", "first order", "its sequel", "other text");
    for (int i = 0; i < e->n_etas; i++) {
        double parts[2], others[2];
        const float eta = (float)e->eta[i];
        text_loss(t, eta, passage, n_whole, e->last_only ? n_lesson - 1 : 1, n_lesson, parts);
        text_loss(t, eta, other, n_other, 1, n_other, others);
        printf("    %-10g", e->eta[i]);
        print_loss(parts[0]);
        print_loss(t->step->loss - e->eta[i] * norm2);
        if (parts[1] < 0) printf(" %12s", "-");
        else print_loss(parts[1]);
        print_loss(others[0]);
        puts("");
    }
    free(whole);
    free(lesson);
    free(passage);
    free(other);
}

/* ================================================================================================
 * 6  The command line
 */
static const char STEP_USAGE[] =
    "usage: train_step <model.bin> [options]\n"
    "  -l <text>    the lesson, or @file (To be, or not to be, that is the question:)\n"
    "  -i <text>    prompt (To be)\n"
    "  -e <etas>    step sizes (0,1e-4,1e-3,2e-3,3e-3,5e-3,1e-2,1e-1)\n"
    "  -n <tokens>  how many to write (64)\n"
    "  -x <which>   predictions that count in the loss: all (default) or last\n"
    "  -g <text>    how the lesson goes on, or @file: measured, not taught (the soliloquy);\n"
    "               begin it with a space or a new line, as it follows the lesson\n"
    "  -f <file>    other text, measured too (a built-in paragraph)\n"
    "  -y <text>    the other cure: a prompt for the untouched model (Here is one of ...)\n"
    "  -t <file>    the whole table as CSV, or as Markdown if it ends in .md\n"
    "  -o <file>    the stepped model, for one step size\n"
    "  -H -Q -K -V -A <theta>, -d, -w, -r, -s  doses for the lesson, as in drugs\n"
    "  -h           this help\n";

static const char PHRASE[] = "To be, or not to be, that is the question:";
static const char SEQUEL[] =
    "\nWhether 'tis nobler in the mind to suffer\n"
    "The slings and arrows of outrageous fortune,\nOr to take arms against a sea of troubles,\n"
    "And by opposing end them. To die, to sleep,\nNo more; and by a sleep to say we end\n"
    "The heart-ache and the thousand natural shocks\nThat flesh is heir to: 'tis a consummation\n"
    "Devoutly to be wish'd. To die, to sleep;\nTo sleep, perchance to dream. Ay, there's the rub,\n"
    "For in that sleep of death what dreams may come.";
static const char OTHER[] =
    "You need to be able to set clear goals. You must make a good plan if you want to earn more "
    "money. It is important to listen to your customers. You should keep your promises, too. The "
    "weather is nice today, so we can walk in the park. I like to drink a cup of tea in the "
    "morning.";

// The whole of a file, with a zero behind it. The caller frees it.
static char *read_file(char option, const char *path) {
    FILE *f = fopen(path, "rb");
    char *all = NULL;
    size_t n = 0, got = 1;
    for (; f && got; n += got) {
        all = resize(all, (ptrdiff_t)n + 65537, 1);
        got = fread(all + n, 1, 65536, f);
    }
    if (!f || ferror(f)) die(1, "-%c: %s cannot be read: %s", option, path, strerror(errno));
    fclose(f);
    all[n] = '\0';
    return all;
}

static void parse_experiment(Experiment *e, int argc, char **argv) {
    const char *etas = "0,1e-4,1e-3,2e-3,3e-3,5e-3,1e-2,1e-1", *lesson = NULL, *rest = NULL;
    char **doses = resize(NULL, argc + 1, sizeof *doses); // what drugs knows how to read
    int n_doses = 2;
    doses[0] = argv[0];
    doses[1] = argv[1];
    *e = (Experiment){.prompt = "To be", .other = OTHER, .n_new = 64,
                      .cure = "Here is one of Shakespeare's more famous works: To be"};
    for (int i = 2; i < argc; i++) {
        const char *flag = argv[i], *text = argv[i + 1]; // argv ends with a NULL
        if (!strcmp(flag, "-h")) help(STEP_USAGE, 2, &argv[i - 1]);
        if (flag[0] != '-' || !flag[1] || flag[2] || !strchr("lienxgfytoHQKVAdwrs", flag[1]))
            die(2, "'%s' is not an option; train_step -h lists them", flag);
        if (!text) die(2, "%s needs a value; train_step -h lists them", flag);
        i++;
        switch (flag[1]) {
        case 'l': lesson = text; break;
        case 'i': e->prompt = text; break;
        case 'e': etas = text; break;
        case 'n': e->n_new = (int)number('n', "a number of tokens", text, 1, 1 << 20, true); break;
        case 'g': rest = text; break;
        case 'f': e->other = read_file('f', text); break;
        case 'y': e->cure = text; break;
        case 't': e->table = text; break;
        case 'o': e->out = text; break;
        case 'x':
            e->last_only = !strcmp(text, "last");
            if (!e->last_only && strcmp(text, "all"))
                die(2, "-x takes all or last, got '%s'", text);
            break;
        default:
            doses[n_doses++] = argv[i - 1];
            doses[n_doses++] = argv[i];
        }
    }
    parse_options(&e->doses, n_doses, doses);
    free(doses);
    e->rest = rest ? *rest == '@' ? read_file('g', rest + 1) : rest : lesson ? "" : SEQUEL;
    e->lesson = !lesson ? PHRASE : *lesson == '@' ? read_file('l', lesson + 1) : lesson;

    const char *at = etas;
    do { // a list of numbers
        char one[32];
        const int n = (int)strcspn(at, ",");
        if (n >= (int)sizeof one) die(2, "-e: '%.*s' is too long for a number", n, at);
        sprintf(one, "%.*s", n, at);
        if (e->n_etas == MAX_STEP_SIZES) die(2, "-e takes at most %d step sizes", MAX_STEP_SIZES);
        e->eta[e->n_etas++] = number('e', "step sizes like 0,1e-3", one, 0, 1000, false);
        at += n;
    } while (*at++);
    if (e->out && e->n_etas != 1) die(2, "-o writes one model, so -e must be one step size");
}

// The table, on the terminal and in a file if one is wanted.
static void show_table(const Experiment *e, char *const *texts) {
    struct winsize window = {0};
    const bool known = !ioctl(STDOUT_FILENO, TIOCGWINSZ, &window) && window.ws_col;
    const int each = (known ? window.ws_col : 100) / e->n_etas;
    const Style terminal = {each < 6 ? 6 : each > 16 ? 16 : each, false};
    printf("\nAfter one step of each size, \"%s\" goes on like this:\n\n", e->prompt);
    print_table(stdout, terminal, e, texts);
    if (!e->table) return;
    const char *ending = strrchr(e->table, '.');
    Output out = output_open(e->table);
    print_table(out.to, (Style){0, ending && !strcmp(ending, ".md")}, e, texts);
    output_close(&out);
}

// What a prompt that says where we are does to the untouched model.
static void show_other_cure(SteppedRun *run, const Experiment *e) {
    int n;
    int *prompt = encode(run->step->model, e->cure, strlen(e->cure), true, &n);
    if (n < 1 || n >= run->step->model->config.seq_len)
        die(1, "-y has %d tokens, too many for this model", n);
    const Experiment untouched = {.eta = {0}, .n_etas = 1, .n_new = e->n_new};
    char **text = write_columns(run, &untouched, prompt, n);
    printf("\nThe other cure, without any step:\n\n%s\n", *text);
    free(*text);
    free(text);
    free(prompt);
}

int main(int argc, char **argv) {
    Model model;
    Experiment e;
    program = "train_step";
    help(STEP_USAGE, argc, argv);
    parse_experiment(&e, argc, argv);
    if (!model_open(&model, argv[1])) die(1, "%s: %s", argv[1], model.error);

    const int context = model.config.seq_len;
    int n_lesson, n_prompt;
    int *lesson = encode(&model, e.lesson, strlen(e.lesson), true, &n_lesson);
    int *prompt = encode(&model, e.prompt, strlen(e.prompt), true, &n_prompt);
    if (!*e.lesson || n_lesson < 2)
        die(1, "-l: a lesson needs two tokens, one to predict the other");
    if (n_lesson - 1 > context)
        die(1, "-l has %d tokens, the model's context only %d", n_lesson, context);
    if (n_prompt < 1 || n_prompt >= context)
        die(1, "-i has %d tokens, it needs 1 to %d for this model", n_prompt, context - 1);

    float *theta = resize(NULL, model.config.n_layers * N_SITES, sizeof *theta);
    dose_layers(theta, e.doses.doses, model.config.n_layers);
    e.doses.noise.theta = theta;
    Sequence sequence = sequence_new(e.doses.noise);
    Step step;
    step_init(&step, &model, n_lesson, n_lesson);
    step_add(&step, &sequence, lesson, n_lesson, true, e.last_only);
    step_take(&step);
    sequence_free(&model, &sequence);
    if (!isfinite(step.loss))
        die(1, "the loss of the lesson is not finite; is the model in order?");
    const double norm2 = print_before(&step);

    SteppedRun run;
    stepped_init(&run, &step, MEASURE_ROWS);
    char **texts = write_columns(&run, &e, prompt, n_prompt);
    show_table(&e, texts);
    print_after(&run, &e, norm2);
    if (*e.cure) show_other_cure(&run, &e);
    if (e.out) write_stepped(&step, (float)e.eta[0], e.out);
    if (ferror(stdout) || fflush(stdout)) die(1, "standard output cannot be written; disk full?");

    for (int i = 0; i < e.n_etas; i++) free(texts[i]);
    free(texts);
    free(lesson);
    free(prompt);
    free(theta);
    stepped_free(&run);
    step_free(&step);
    model_close(&model);
    return 0;
}
