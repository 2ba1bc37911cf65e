/* train_step.c - take ONE step of gradient descent on one phrase, and watch what it does.
 *
 * A model that continues "To be" with business advice, as Llama 2 does and the small model in
 * tests/ too, is shown "To be, or not to be, that is the question:" once.
 * A model gives each token of a text a probability.
 * -log of it is the surprise by that token, and the mean surprise over the phrase is its loss.
 * The gradient says how this loss changes with each of the model's numbers.
 * It points uphill, so we subtract a little of it from the weights:
 *
 *     W - step_size * dL/dW
 *
 * One number, the step size, decides what becomes of the model.
 * After a tiny step it talks business as before; after a larger one it recites the whole soliloquy.
 * After one that is too large it stutters, and after a huge one it is ruined.
 * We print these texts side by side.
 *
 *    1  derivatives            of each block of the forward pass, derived one by one
 *    2  the backward pass      the mirror of section 5 of drugs.c: read them next to each other
 *    3  the virtual step       the stepped model without a stepped weight
 *    4  measuring              losses and norms
 *    5  texts side by side     all columns of the table are written at once
 *    6  the experiment         before, the table, after
 *    7  the command line
 *    8  inside the maths       going across a matrix
 *
 * The convention of all that follows: the gradient of the loss with respect to something has the
 * shape of that thing, and is written with a d in front: dx is ∂loss/∂x.
 * A plain derivative of one thing by another is written ∂y/∂x.
 * Going back through y = f(x) means: dy is given, and dx is to be found.
 * Where x is used twice, it reaches the loss on two paths, and the two dx add up.
 * That is why a dx is set to 0 first, and then each function that has read x adds its part.
 *
 * Most functions that go back are named after the one that went forward, with _backward added:
 *
 *     rmsnorm   softmax   attend      layer_forward: layer_backward   norm     classify
 *     rope      swiglu    attention   forward: backward               linear   embed   turn
 *
 * loss_, values_, keys_ and glitch_backward are parts of these.
 * (On the command line -x, -y and -t mean other things than in drugs.)
 */
#define DRUGS_LIBRARY
#include "drugs.c"
#include "tests/laboratory/tables.h" // files that appear whole, tables, progress

/* ================================================================================================
 * 1  Derivatives
 *
 * All of them follow from the chain rule.
 * Say the loss L depends on y, and y on x.
 * If x moves by a little, y moves by ∂y/∂x times that, and L by ∂L/∂y times that.
 * For vectors each number of x may move all numbers of y, so the ways add up:
 *
 *     dx_j = sum over i of dy_i * ∂y_i/∂x_j
 *
 * Each function of the forward pass needs this rule only for itself.
 * Its _backward gets dy from the function that comes after it, and hands dx to the one before.
 *
 * A derivative can be checked without any theory.
 * Move one weight w by a little e, both ways, and compute the loss twice:
 *
 *     (L(w + e) - L(w - e)) / 2e      must be dw
 *
 * The tests do that for every kind of tensor.
 */

// out += a b: each row of out gets a sum of the rows of b, weighted with the numbers of a row of a.
// See section 8.
static void add_product(float *out,     // (n_rows, n_cols)
                        const float *a, // (n_rows, n_k): a[r][k] stands at a[r * a_row + k * a_k]
                        ptrdiff_t a_row, ptrdiff_t a_k,
                        Weights b,      // (n_k, n_cols)
                        ptrdiff_t n_rows, ptrdiff_t n_k, ptrdiff_t n_cols);

// Sets n numbers to zero: before the first of several gradients is added to them.
static void clear(float *x, ptrdiff_t n) {
    memset(x, 0, n * sizeof *x);
}

// rmsnorm: y = gain * z with z = x * scale and scale = 1 / sqrt(eps + mean of x²).
//
// The gain is a plain factor:      dgain += dy * z        dz = dy * gain
//
// x acts twice: directly, and through the scale, which all numbers of x share. By the chain rule
//
//     ∂scale/∂x_j = -1/2 (eps + mean of x²)^(-3/2) * 2 x_j / dim = -scale³ x_j / dim
//
// and by the product rule, as z_i = x_i scale,
//
//     dx_j = dz_j scale + (sum over i of dz_i x_i) ∂scale/∂x_j
//          = dz_j scale - (sum over i of dz_i z_i) scale² x_j / dim
//          = scale (dz_j - z_j * mean of (dz * z))
//
// The second term takes out of dz what would only change the length of x, which the norm forgets
// (but for eps).
static void rmsnorm_backward(float *dx,         // (dim) is added to
                             float *dgain,      // (dim) is added to
                             const float *dy,   // (dim)
                             const float *x,    // (dim) what came in
                             const float *gain, // (dim)
                             int dim, float eps) {
    float scale = 1.0f / sqrtf(dot(x, x, dim) / (float)dim + eps);
    float mean = 0; // of dz * z: the part of dz that points along x
    for (int i = 0; i < dim; i++)
        mean += dy[i] * gain[i] * (x[i] * scale);
    mean /= (float)dim;
    for (int i = 0; i < dim; i++) {
        float z = x[i] * scale; // what the forward pass multiplied with the gain
        dgain[i] += dy[i] * z;
        dx[i] += scale * (dy[i] * gain[i] - z * mean);
    }
}

// rope turns a pair: y_0 = cos x_0 - sin x_1 and y_1 = sin x_0 + cos x_1. So
//
//     dx_0 = cos dy_0 + sin dy_1        dx_1 = -sin dy_0 + cos dy_1
//
// which is turning by the same angle the other way.
static void rope_backward(float *dx,            // (head_dim) dy, becomes dx
                          const float *cos_sin, // (head_dim)
                          int head_dim) {
    for (int i = 0; i < head_dim; i += 2) {
        float a = dx[i];
        float b = dx[i + 1];
        float cosine = cos_sin[i];
        float sine = cos_sin[i + 1];
        float minus_sine = -sine; // for the same reason as in rope
        dx[i] = a * cosine + b * sine;
        dx[i + 1] = a * minus_sine + b * cosine;
    }
}

// softmax: p_i = e_i / E, with e_i = exp(scale x_i) and E the sum of all e.
// As ∂e_j/∂x_j = scale e_j, the quotient rule gives
//
//     ∂p_i/∂x_j = (∂e_i/∂x_j) / E - e_i (∂E/∂x_j) / E²
//               = scale * p_i * ((1 if i = j, else 0) - p_j)
//
// and so
//
//     dx_j = sum over i of dp_i ∂p_i/∂x_j = scale * p_j * (dp_j - sum over i of dp_i p_i)
//
// Only the difference to the average counts, as adding the same number to every x changes no p.
// dp (n) becomes dx.
// The divisor is 1 / scale, in attention sqrt(head_dim).
static void softmax_backward(float *dp,      // (n)
                             const float *p, // (n) what came out
                             int n, float divisor) {
    float average = 0; // of dp, weighted by p: p adds up to 1
    for (int i = 0; i < n; i++)
        average += p[i] * dp[i];
    for (int i = 0; i < n; i++)
        dp[i] = p[i] * (dp[i] - average) / divisor;
}

// swiglu: h = silu(gate) * up, and silu(gate) = gate * sigmoid with sigmoid = 1 / (1 + exp(-gate)).
//
// The derivative of the sigmoid is exp(-gate) sigmoid² = sigmoid (1 - sigmoid).
// So by the product rule that of silu is
//
//     sigmoid + gate sigmoid (1 - sigmoid) = sigmoid (1 + gate (1 - sigmoid))
static void swiglu_backward(float *dgate, float *dup, const float *dh, // (n) each
                            const float *gate, const float *up, ptrdiff_t n) {
#pragma omp parallel for schedule(static) if (worth_threads(n * 8.0))
    for (ptrdiff_t i = 0; i < n; i++) {
        float z = gate[i];
        float sigmoid = 1.0f / (1.0f + exp_of(-z));
        float rest = 1.0f - sigmoid;
        dup[i] = dh[i] * z * sigmoid;
        dgate[i] = dh[i] * up[i] * sigmoid * (1.0f + z * rest);
    }
}

// turn: r = a x + b u (section 4 of drugs.c).
// The angle and u come from the place, so they do not change with x, but a and b do.
// With
//
//     xx = x.x     ux = u.x     oo = u.u - ux²/xx
//     b = sin(angle) sqrt(xx / oo)     a = cos(angle) - b ux/xx
//
// x reaches the loss on three paths: a multiplies it, a is made of it, and b is made of it.
// Write g for dr, and grad a for the vector of all ∂a/∂x_j, and likewise for b, xx, ux and oo:
//
//     dx = a g  +  (x.g) grad a  +  (u.g) grad b
//
// To find grad b, square its definition, b² oo = sin²(angle) xx, and take the gradient of both
// sides, with sin²(angle) = b² oo / xx put in again:
//
//     2 b oo grad b + b² grad oo = b² (oo / xx) grad xx
//     grad b = b/2 (grad xx / xx - grad oo / oo)
//
// From grad xx = 2 x and grad ux = u follows grad oo = -2 ux/xx u + 2 ux²/xx² x.
// So both gradients are mixes of x and u. b_x, b_u, a_x and a_u are the numbers of these mixes:
//
//     grad b = b_x x + b_u u     b_x = b (1/xx - ux²/(xx² oo))       b_u = b ux/(xx oo)
//     grad a = a_x x + a_u u     a_x = -b_x ux/xx + 2 b ux/xx²       a_u = -b_u ux/xx - b/xx
//
// An example to check by hand: x = (1, 0), u = (1, 1), and an angle with sine .6 and cosine .8.
// Then xx = 1, ux = 1, oo = 1, b = .6, a = .2, and r = (.8, .6), as long as x. b_x = 0, b_u = .6,
// a_x = 1.2, a_u = -1.2, so grad b = (.6, .6) and grad a = (0, -1.2).
// For g = (1, 0) that gives dx = .2 (1, 0) + (0, -1.2) + (.6, .6) = (.8, -.6).
// And indeed: in two dimensions the glitch is a plain rotation, r_0 = .8 x_0 - .6 x_1.
//
// The noise is a function of its place, so u is simply drawn once more. g (n) becomes dx; x is the
// vector before it was turned, u (n) is scratch.
static void turn_backward(Place place,
                          const float *x, // (n) before it was turned
                          float *g,       // (n) dr, becomes dx
                          int n,
                          float *u) {     // (n) scratch
    if (!(place.theta > 0))
        return;
    Glitch glitch = draw_glitch(place, x, n, u);
    if (glitch.b == 0)
        return; // it was not turned
    double xx = dot(x, x, n);
    double ux = dot(u, x, n);
    double oo = dot(u, u, n) - ux * ux / xx;
    // How b and a change with x, each in its part along x and its part along u.
    double b = glitch.b;
    double b_x = b * (1 / xx - ux * ux / (xx * xx * oo));
    double b_u = b * ux / (xx * oo);
    double a_x = -b_x * ux / xx + 2 * b * ux / (xx * xx);
    double a_u = -b_u * ux / xx - b / xx;
    // How much the loss cares about a and about b.
    double xg = dot(x, g, n);
    double ug = dot(u, g, n);
    float to_x = (float)(xg * a_x + ug * b_x);
    float to_u = (float)(xg * a_u + ug * b_u);
    for (int i = 0; i < n; i++)
        g[i] = g[i] * glitch.a + x[i] * to_x + u[i] * to_u;
}

/* ================================================================================================
 * 2  The backward pass
 *
 * A matrix gives y_o = sum over i of w[o][i] x_i, so ∂y_o/∂w[o][i] = x_i.
 * For one row the gradient of each weight is therefore dw[o][i] = dy_o x_i, and n rows add up:
 *
 *     dW[o][i] = sum over r of dY[r][o] X[r][i]        dW = dYᵀ X
 *
 *                n_in                  n             n_in
 *              +------+              +---+         +------+
 *              |      |              |   |       n |  X   |
 *       n_out  |  dW  |   =   n_out  |dYᵀ|    x    +------+
 *              |      |              |   |
 *              +------+              +---+
 *
 * dW is as large as W, but it says nothing that dY and X do not say.
 * (Its rank is n at most: dW times any vector is a mix of n vectors, the rows of dY.)
 * So we keep X, which the forward pass computed, and dY, which the backward pass computes.
 * dW is never written down.
 * For Llama-2-7B and the phrase above (14 tokens with BOS; the last one is only predicted, so 13
 * rows) that is 0.2 GB instead of 27.
 *
 * Below, acts are the buffers that forward filled, and grads are the same buffers for gradients.
 * So the dY of a matrix stands where its Y stood, with three exceptions.
 * What wo and w2 give is added to the residual stream, and its dY is the gradient of the sum.
 * The dY of the classifier, dlogits, stands in vocab_dy:
 *
 *     matrix            X               dY
 *     wq, wk, wv        acts xn         grads q, k, v
 *     wo                acts att        grads xm
 *     w1, w3            acts fn         grads gate, up
 *     w2                acts h          grads x of the next layer
 *     classifier        acts last_xn    dlogits
 *     embedding         grads x of      one-hot rows: 1 at the token of a row, 0 elsewhere
 *                       layer 0
 *
 * The embedding E is read in another way: x is the row of E that belongs to the token.
 * With a one-hot row for each token, O, that is x = O E, and so dE = Oᵀ dx.
 * This is dYᵀ X if O takes the place of dY and dx that of X (see embed_backward).
 * The factors of the last two matrices are kept in vocab_dy and vocab_x.
 *
 * The way back through a layer is the drawing of drugs.c, turned upside down.
 * Where x went two ways, two gradients come together:
 *
 *      dx of the next layer
 *      |
 *      +-----> w2 --> dh --> swiglu --> dgate, dup --> w1, w3 --> dfn --> RMSNorm
 *      |                                                                     |
 *      +  <------------------------------------------------------------------+
 *      | dxm
 *      +-----> wo --> datt --> A --> values, softmax, keys --> dq, dk, dv
 *      |                                                           |
 *      |       RMSNorm <-- H <-- dxn <-- wq, wk, wv <-- Q, RoPE <--+
 *      |          |
 *      +  <-------+
 *      |
 *      dx
 *
 * (dq goes back through RoPE and Q, dk only through RoPE, dv through neither.)
 * Look at the left side: the gradient also runs straight along the residual stream, unchanged.
 * y = x + f(x) has the derivative 1 + f'(x).
 * A product of many small f' is nearly 0, but a product of many 1 + f' is not.
 * That is why networks of many layers can learn.
 */
typedef struct {
    const Model *model;
    Run acts;       // activations: what forward computed; n_layers + 1 slots
    Run grads;      // the same buffers for gradients: grads.slots[l].q is that of acts.slots[l].q
    Row *rows;      // (n_rows) each sequence's rows together, from position 0 on; the
                    // sequences must live until step_take is done
    int n_rows;
    int *targets;   // (n_loss) the tokens that the rows which want logits should predict
    int n_loss;
    double loss;    // the mean of -log p(target), in nats: the cross entropy
    float *dgains;  // (2 * n_layers + 1, dim) of the norms: attention, FFN, ..., final
    float *scratch; // (n_kv_heads, 2 * head_scratch) see struct HeadBackward
    int *inputs;    // (n_inputs) the distinct tokens of the rows
    int n_inputs;
    float *vocab_dy; // (n_loss + n_inputs, vocab_size), see embed_backward
    float *vocab_x;  // (n_loss + n_inputs, dim)
} Step;

// The gradient of a matrix as its two factors.
typedef struct {
    const float *dy; // (n, n_out)
    const float *x;  // (n, n_in)
    int n;           // 0: the tensor has no factors, it is a norm's gain
    int n_out, n_in;
} Factors;

// The factors of a tensor.
// If one matrix is both the embedding and the classifier, the rows of both are its factors.
static Factors factors(const Step *step, int layer, int which) {
    const Slot *acts = &step->acts.slots[layer];
    const Slot *grads = &step->grads.slots[layer];
    const Config *c = &step->model->config;
    bool shared = c->shared_classifier;
    const struct {
        const float *x, *dy;
    } of_layer[N_LAYER_TENSORS] = {
        [WQ] = {acts->xn, grads->q}, // three readers of one x
        [WK] = {acts->xn, grads->k},
        [WV] = {acts->xn, grads->v},
        [WO] = {acts->att, grads->xm}, // what wo gave was added to x: its gradient is the sum's
        [W1] = {acts->fn, grads->gate},
        [W3] = {acts->fn, grads->up},
        [W2] = {acts->h, step->grads.slots[layer + 1].x}, // likewise
    };
    Factors f = {.n = step->n_rows};
    tensor_shape(c, which, &f.n_out, &f.n_in);
    if (which < N_LAYER_TENSORS) {
        f.x = of_layer[which].x;
        f.dy = of_layer[which].dy;
    } else if (which != FINAL_NORM) { // rows of vocab_dy and vocab_x, from first on
        ptrdiff_t first = shared || which == WCLS ? 0 : step->n_loss;
        ptrdiff_t last = shared || which == TOK_EMB ? step->n_loss + step->n_inputs : step->n_loss;
        f.n = (int)(last - first);
        f.x = step->vocab_x + first * f.n_in;
        f.dy = step->vocab_dy + first * f.n_out;
    }
    if (!f.x) // ATT_NORM, FFN_NORM, FINAL_NORM
        f.n = 0;
    return f;
}

// The gradient of a norm's gain, (dim).
static float *dgain(const Step *step, int layer, int which) {
    const Config *c = &step->model->config;
    ptrdiff_t index = which == FINAL_NORM ? 2 * c->n_layers : 2 * layer + (which == FFN_NORM);
    return step->dgains + index * c->dim;
}

// linear: y = x wᵀ, that is y_o = sum over i of w[o][i] x_i.
// So y_o changes with x_i by w[o][i], and dx_i += sum over o of dy_o w[o][i]: dx += dy w.
static void linear_backward(Step *step,
                            float *dx,       // (n_rows, n_in) is added to
                            const float *dy, // (n_rows, n_out)
                            int layer, int which) {
    int n_out, n_in;
    tensor_shape(&step->model->config, which, &n_out, &n_in);
    Weights w = step->model->layers[layer].w[which];
    // dy is read as it stands: rows n_out apart, neighbours 1 apart.
    // (acts has only the rows with logits while the classifier is gone back through.)
    add_product(dx, dy, n_out, 1, w, step->acts.n_rows, n_out, n_in);
}

// norm: row by row; the gain's gradient is the sum over the rows.
static void norm_backward(Step *step,
                          float *dx,       // (n_rows, dim) is added to
                          const float *dy, // (n_rows, dim)
                          const float *x,  // (n_rows, dim) what came in
                          int layer, int which) {
    const Config *c = &step->model->config;
    const float *gain = gain_of(step->model, layer, which);
    float *to = dgain(step, layer, which); // all rows add to it
    for (int r = 0; r < step->acts.n_rows; r++) {
        rmsnorm_backward(dx, to, dy, x, gain, c->dim, c->norm_eps);
        dx += c->dim;
        dy += c->dim;
        x += c->dim;
    }
}

// ---- attention

// One head of one row on the way back, with what is needed beside struct Head.
//
//     scratch of a kv head:   | q | u | prob (n_keys)  ...| out | g | dprob (n_keys)  ...|
//                               q and prob: as attend leaves them
//
// Query heads that share a kv head add to the same dkeys and dvalues, so they take turns.
typedef struct {
    Head head;
    int head_dim;
    float *dkeys;   // (n_keys, head_dim), head.stride apart, in grads' slot
    float *dvalues; // (n_keys, head_dim), likewise
    float *dout;    // (head_dim)
    float *dq;      // (head_dim)
    float *g;       // (head_dim) a gradient on its way back through a glitch
    float *dprob;   // (n_keys) of prob, and after softmax_backward of the scores
} HeadBackward;

// A key or value x that was read turned: the gradient of what was read, a * dy, goes back through
// the glitch, which is drawn again, and is added to dx.
static void glitch_backward(const HeadBackward *b, Place place,
                            const float *x,           // (head_dim) the key or value
                            float a, const float *dy, // (head_dim)
                            float *dx) {              // (head_dim)
    for (int i = 0; i < b->head_dim; i++)
        b->g[i] = a * dy[i];
    turn_backward(place, x, b->g, b->head_dim, b->head.u);
    add_scaled(dx, 1, b->g, b->head_dim);
}

// Back from what the head found to its probabilities and values.
//
// out = the sum of prob * value, where value is what was read, turned or not. So
//
//     dprob[t] = dout . value[t]        dvalue[t] += prob[t] dout, back through the glitch
static void values_backward(const HeadBackward *b) {
    const Head *h = &b->head;
    int n = b->head_dim;
    int n_untouched = n_untouched_keys(h, SITE_V);
    dots(b->dprob, b->dout, h->values, h->stride, n, h->n_keys);
    // The untouched keys come first, then those that were turned.
    for (int t = 0; t < h->n_keys; t++) {
        const float *value = h->values + t * h->stride;
        float *dvalue = b->dvalues + t * h->stride;
        if (t < n_untouched) { // read as it was: no glitch to go back through
            add_scaled(dvalue, h->prob[t], b->dout, n);
            continue;
        }
        // dout . (value * glitch.a + u * glitch.b), in its two parts
        Place place = place_of_key(h, SITE_V, t);
        Glitch glitch = draw_glitch(place, value, n, h->u);
        float from_u = dot(b->dout, h->u, n) * glitch.b;
        b->dprob[t] = b->dprob[t] * glitch.a + from_u;
        glitch_backward(b, place, value, h->prob[t], b->dout, dvalue);
    }
}

// Back from the scores to the query and the keys.
//
// score[t] = q . key[t], where key is what was read, turned or not. So
//
//     dq += dscore[t] key[t]        dkey[t] += dscore[t] q, back through the glitch
static void keys_backward(const HeadBackward *b) {
    const Head *h = &b->head;
    int n = b->head_dim;
    int n_untouched = n_untouched_keys(h, SITE_K);
    for (int t = 0; t < h->n_keys; t++) {
        const float *key = h->keys + t * h->stride;
        float *dkey = b->dkeys + t * h->stride;
        float dscore = b->dprob[t];
        if (t < n_untouched) {
            add_scaled(b->dq, dscore, key, n);
            add_scaled(dkey, dscore, h->q, n);
            continue;
        }
        Place place = place_of_key(h, SITE_K, t);
        Glitch glitch = draw_glitch(place, key, n, h->u);
        // dscore * (key * glitch.a + u * glitch.b), likewise
        add_scaled(b->dq, dscore * glitch.a, key, n);
        add_scaled(b->dq, dscore * glitch.b, h->u, n);
        glitch_backward(b, place, key, dscore, h->q, dkey);
    }
}

// attend, and site A after it: dout is given, dq, dkeys and dvalues are added to.
// prob and the turned query are computed anew: to keep them for all rows would take much memory.
static void attend_backward(const Step *step, ptrdiff_t r, int layer, int head,
                            float *scratch) { // (2 * head_scratch)
    const Config *c = &step->model->config;
    const Slot *grads = &step->grads.slots[layer];
    int head_dim = c->head_dim;
    ptrdiff_t at = r * c->q_dim + head * head_dim;
    const float *query = step->acts.slots[layer].q + at;
    float *out = scratch + head_scratch(c);
    // The same head as on the way forward, and where its gradients are.
    HeadBackward b = {
        .head = head_of(&step->acts, r, layer, head, scratch),
        .head_dim = head_dim,
        .dout = grads->att + at,
        .dq = grads->q + at,
        .g = out + head_dim,
        .dprob = out + 2 * head_dim,
    };
    const Head *h = &b.head;
    // The rows of a sequence stand together, in order, and begin at position 0.
    // So this is the row of the oldest key.
    ptrdiff_t first_row = r + 1 - h->n_keys;
    b.dkeys = grads->k + first_row * c->kv_dim + h->kv_head * head_dim;
    b.dvalues = grads->v + first_row * c->kv_dim + h->kv_head * head_dim;

    attend(h, head_dim, query, out); // fills the scratch
    // From here on attend is read from its last line to its first.
    turn_backward(h->places[SITE_A], out, b.dout, head_dim, h->u);
    values_backward(&b);
    softmax_backward(b.dprob, h->prob, h->n_keys, sqrtf((float)head_dim));
    keys_backward(&b);
    rope_backward(b.dq, h->cos_sin, head_dim);
    turn_backward(h->places[SITE_Q], query, b.dq, head_dim, h->u);
}

// attention: all heads of all rows, then RoPE of the keys.
static void attention_backward(const Step *step, int layer) {
    const Config *c = &step->model->config;
    const Slot *grads = &step->grads.slots[layer];
    ptrdiff_t n_rows = step->n_rows;
    int n_sharing = c->n_heads / c->n_kv_heads; // query heads that read one kv head
    // Keys and values get gradients from all queries that saw them: they are summed up.
    clear(grads->q, n_rows * c->q_dim);
    clear(grads->k, n_rows * c->kv_dim);
    clear(grads->v, n_rows * c->kv_dim);
    // Going forward once more and then back takes about four times as long as going forward.
#pragma omp parallel for schedule(static) if (worth_threads(4 * attention_bytes(&step->acts, layer)))
    for (int kv_head = 0; kv_head < c->n_kv_heads; kv_head++) {
        // One thread does all that adds to this kv head, so nobody else writes there.
        float *scratch = step->scratch + 2 * kv_head * head_scratch(c);
        for (ptrdiff_t r = 0; r < n_rows; r++)
            for (int i = 0; i < n_sharing; i++)
                attend_backward(step, r, layer, kv_head * n_sharing + i, scratch);
    }
    // A key is turned by RoPE once, before it goes into the cache, so it is turned back once, when
    // all of its gradient is there.
    for (ptrdiff_t r = 0; r < n_rows; r++) {
        const float *cos_sin = step->acts.cos_sin + r * c->head_dim;
        float *dkeys = grads->k + r * c->kv_dim; // of all kv heads
        for (int i = 0; i < c->kv_dim; i += c->head_dim)
            rope_backward(dkeys + i, cos_sin, c->head_dim);
    }
}

// ---- the layers, last things first

// The loss of a prediction is -log softmax(logits)[target] = log(sum) - logits[target].
// Here sum is the sum of all exp(logits).
// The derivative of log(sum) by a logit is exp(logit) / sum, the token's probability.
// So the derivative of the loss is the probability, and for the target the probability minus 1.
// The step subtracts it: the target's logit rises, and all others fall.
// Fills step->loss and the first n_loss rows of vocab_dy.
static void loss_backward(Step *step) {
    const ptrdiff_t vocab_size = step->model->config.vocab_size;
    double *losses = resize(NULL, step->n_loss, sizeof *losses);
#pragma omp parallel for schedule(static) if (worth_threads(step->n_loss * vocab_size * 8.0))
    for (int i = 0; i < step->n_loss; i++) {
        const float *logits = step->acts.logits + i * vocab_size;
        float *dlogits = step->vocab_dy + i * vocab_size;
        memcpy(dlogits, logits, vocab_size * sizeof *logits);
        // softmax returns log(sum of exp(logits)); minus the target's logit that is -log p.
        losses[i] = softmax(dlogits, vocab_size, 1) - logits[step->targets[i]];
        // The loss is the mean over n_loss predictions, so each counts one n_loss-th.
        for (ptrdiff_t j = 0; j < vocab_size; j++)
            dlogits[j] /= (float)step->n_loss;
        dlogits[step->targets[i]] -= 1.0f / (float)step->n_loss;
    }
    step->loss = 0; // summed up in one order, however many threads there were
    for (int i = 0; i < step->n_loss; i++)
        step->loss += losses[i] / step->n_loss;
    free(losses);
}

// classify: logits = classifier rmsnorm(x) of the rows that wanted logits.
// Their dx go back to the places from which they were gathered; the other rows get 0.
static void classify_backward(Step *step) {
    const ptrdiff_t dim = step->model->config.dim;
    float *dx = step->grads.slots[step->model->config.n_layers].x;
    float *dlast_x = step->grads.last_x;   // (n_loss, dim)
    float *dlast_xn = step->grads.last_xn; // (n_loss, dim)
    ptrdiff_t size = step->n_loss * dim;
    memcpy(step->vocab_x, step->acts.last_xn, size * sizeof *dx);
    clear(dlast_xn, size);
    clear(dlast_x, size);
    linear_backward(step, dlast_xn, step->vocab_dy, 0, WCLS);
    norm_backward(step, dlast_x, dlast_xn, step->acts.last_x, 0, FINAL_NORM);
    // So far acts had only the rows that want logits, as classify left them.
    step->acts.rows = step->rows;
    step->acts.n_rows = step->n_rows;
    clear(dx, step->n_rows * dim);
    for (ptrdiff_t r = 0; r < step->n_rows; r++)
        if (step->rows[r].wants_logits) {
            memcpy(dx + r * dim, dlast_x, dim * sizeof *dx);
            dlast_x += dim; // the next one that was gathered
        }
}

// layer_forward, read from its last line to its first.
static void layer_backward(Step *step, int layer) {
    const Model *m = step->model;
    const Config *c = &m->config;
    const Slot *acts = &step->acts.slots[layer];
    const Slot *grads = &step->grads.slots[layer];
    const float *dx = step->grads.slots[layer + 1].x; // (n_rows, dim)
    const ptrdiff_t dim = c->dim;
    ptrdiff_t size = step->n_rows * dim;
    ptrdiff_t hidden_size = (ptrdiff_t)step->n_rows * c->hidden_dim;

    // x of the next layer = xm + w2 h: dx goes both ways
    memcpy(grads->xm, dx, size * sizeof *dx);
    clear(grads->h, hidden_size);
    linear_backward(step, grads->h, dx, layer, W2);

    // h = silu(w1 fn) * w3 fn, with fn = rmsnorm(xm)
    swiglu_backward(grads->gate, grads->up, grads->h, acts->gate, acts->up, hidden_size);
    clear(grads->fn, size);
    linear_backward(step, grads->fn, grads->gate, layer, W1);
    linear_backward(step, grads->fn, grads->up, layer, W3);
    norm_backward(step, grads->xm, grads->fn, acts->xm, layer, FFN_NORM);

    // xm = x + wo att
    memcpy(grads->x, grads->xm, size * sizeof *dx);
    clear(grads->att, (ptrdiff_t)step->n_rows * c->q_dim);
    linear_backward(step, grads->att, grads->xm, layer, WO);
    attention_backward(step, layer);

    // the three readers of xn
    clear(grads->xn, size);
    linear_backward(step, grads->xn, grads->q, layer, WQ);
    linear_backward(step, grads->xn, grads->k, layer, WK);
    linear_backward(step, grads->xn, grads->v, layer, WV);

    // xn = rmsnorm(x), turned at H. What was turned is the sober xn, computed once more
    const float *gain = gain_of(m, layer, ATT_NORM);
    float *sober = step->grads.direction; // which is free: grads draws no glitches
    for (ptrdiff_t r = 0; r < step->n_rows; r++) {
        Place place = place_of(m, &step->rows[r], SITE_H, layer, 0);
        rmsnorm(sober, acts->x + r * dim, gain, c->dim, c->norm_eps);
        turn_backward(place, sober, grads->xn + r * dim, c->dim, step->acts.direction);
    }
    norm_backward(step, grads->x, grads->xn, acts->x, layer, ATT_NORM);
}

// embed: x = O E, where E is the embedding and O has a one-hot row for each row of x: 1 at the
// token, 0 elsewhere.
// Here E itself stands, and not its transpose as in a linear layer, so O takes the part of dY and
// dx that of X:
//
//     dE = Oᵀ dx
//
// The dx of rows with the same token are added up first.
// These factors stand after those of the classifier:
//
//     vocab_dy                        vocab_x
//     | dlogits (n_loss)   |          | last_xn (n_loss)  |     the classifier's
//     | one-hot (n_inputs) |          | dx (n_inputs)     |     the embedding's
//
// A model that uses one matrix for both simply has all of these rows as its factors.
static void embed_backward(Step *step) {
    const Config *c = &step->model->config;
    const ptrdiff_t dim = c->dim;
    const ptrdiff_t vocab_size = c->vocab_size;
    const float *dx = step->grads.slots[0].x;                 // (n_rows, dim)
    float *one_hot = step->vocab_dy + step->n_loss * vocab_size; // (n_inputs, vocab_size)
    float *dinputs = step->vocab_x + step->n_loss * dim;         // (n_inputs, dim)
    step->n_inputs = 0;
    for (ptrdiff_t r = 0; r < step->n_rows; r++) {
        int token = step->rows[r].token;
        int i = 0; // has this token come in before?
        while (i < step->n_inputs && step->inputs[i] != token)
            i++;
        if (i == step->n_inputs) {
            step->inputs[step->n_inputs++] = token;
            clear(one_hot + i * vocab_size, vocab_size);
            clear(dinputs + i * dim, dim);
            one_hot[i * vocab_size + token] = 1;
        }
        add_scaled(dinputs + i * dim, 1, dx + r * dim, c->dim);
    }
}

// forward, backwards.
// Afterwards every gradient is known: gains as they are, matrices as their factors.
static void backward(Step *step) {
    const Config *c = &step->model->config;
    // Gains are added to by every row; all else is overwritten or cleared on the way.
    clear(step->dgains, (2 * c->n_layers + 1) * (ptrdiff_t)c->dim);
    loss_backward(step);
    classify_backward(step);
    for (int layer = c->n_layers - 1; layer >= 0; layer--)
        layer_backward(step, layer);
    embed_backward(step);
}

// Room for a step over at most max_rows rows.
static void step_init(Step *step, const Model *m, int max_rows) {
    const Config *c = &m->config;
    *step = (Step){.model = m};
    run_init(&step->acts, m, max_rows, c->n_layers + 1);
    run_init(&step->grads, m, max_rows, c->n_layers + 1);
    step->rows = resize(NULL, max_rows, sizeof *step->rows);
    step->targets = resize(NULL, max_rows, sizeof *step->targets);
    step->inputs = resize(NULL, max_rows, sizeof *step->inputs);
    // Two norms a layer, and the final one.
    ptrdiff_t n_gains = (2 * c->n_layers + 1) * (ptrdiff_t)c->dim;
    ptrdiff_t n_scratch = 2 * c->n_kv_heads * head_scratch(c);
    step->dgains = resize(NULL, n_gains, sizeof(float));
    step->scratch = resize(NULL, n_scratch, sizeof(float));
    // Twice max_rows rows, for n_loss and n_inputs; freed with the buffers of acts.
    step->vocab_dy = new_buffer(&step->acts, 2 * (ptrdiff_t)c->vocab_size);
    step->vocab_x = new_buffer(&step->acts, 2 * c->dim);
}

// Gives back what step_init took.
static void step_free(Step *step) {
    run_free(&step->acts);
    run_free(&step->grads);
    free(step->rows);
    free(step->targets);
    free(step->inputs);
    free(step->dgains);
    free(step->scratch);
}

// Adds a text of n tokens to the rows: token i has to predict token i + 1.
// All predictions count in the loss, or only the last one.
// how: 0, DRUGGED, LAST_ONLY, or both.
enum { LAST_ONLY = 8 }; // a bit that DRUGGED, WANTS_LOGITS and ALL_LOGITS leave free
static void step_add(Step *step,
                     Sequence *sequence, // a new one
                     const int *tokens,  // (n)
                     int n, int how) {
    for (int i = 0; i + 1 < n; i++) {
        bool counts = !(how & LAST_ONLY) || i + 2 == n; // i + 1 is the last token
        step->rows[step->n_rows++] = (Row){
            .token = tokens[i],
            .position = i,
            .sequence = sequence,
            .drugged = how & DRUGGED,
            .wants_logits = counts,
        };
        if (counts)
            step->targets[step->n_loss++] = tokens[i + 1];
    }
}

// Forward and backward over the rows that were added: the loss, and the gradient of everything.
static void step_take(Step *step) {
    forward(&step->acts, step->rows, step->n_rows);
    backward(step);
}

/* ================================================================================================
 * 3  The virtual step
 *
 * The stepped matrix is W - step_size dYᵀX. What it does to a vector needs no such matrix:
 *
 *     (W - step_size dYᵀX) x  =  W x - step_size dYᵀ (X x)
 *
 *     X x           n dot products: how much is x like each of the lesson's inputs?
 *     dYᵀ (X x)     n vectors, each added as strongly as its product says
 *
 * So one step is a memory, and this is how it is read.
 * If x resembles what this matrix was given at the lesson's third token, the third product is
 * large, and dY's third row is subtracted as strongly: the output moves as the lesson wanted it
 * to move there.
 * If x resembles none of the lesson's inputs, nothing moves: that is the stability.
 * With a large step even a slight likeness moves much.
 *
 * That is half a percent more work for Llama-2-7B and 13 rows.
 * It also shows what a step cannot do: if x is perpendicular to all rows of X, nothing changes.
 * (The gains of the norms change for every x, but they are few.)
 *
 * Every matrix and every norm is corrected where it is used, so the next one already gets what the
 * stepped model would give it.
 * And as the step size is only a factor of the correction, each sequence can have its own.
 * So one pass over the unchanged weights writes a token of every column of the table.
 */
// The model after a step of any size.
typedef struct {
    Run run;         // its hook is stepped_hook
    const Step *step;
    float *products; // (rows of the largest factor) X x
    float *normed;   // (dim)
} Stepped;

// y (n_out) -= step_size dyᵀ (X x), for one vector x (n_in).
static void subtract_step(const Stepped *stepped,
                    float *y,       // (n_out) what w gave
                    const float *x, // (n_in)
                    float step_size, Factors f) {
    dots(stepped->products, x, f.x, f.n_in, f.n_in, f.n);
    for (int i = 0; i < f.n; i++)
        stepped->products[i] *= -step_size;
    // The dy are the rows, and the products say how much of each is added.
    add_product(y, stepped->products, f.n, 1, (Weights){f.dy, FP32}, 1, f.n, f.n_out);
}

// The same for the embedding's row of a token.
// That row of dYᵀX is the sum over i of dY[i][token] X[i].
static void subtract_row(float *row, // (dim) of the token
                        float step_size, Factors f, int token) {
    for (ptrdiff_t i = 0; i < f.n; i++) {
        float product = f.dy[i * f.n_out + token];
        add_scaled(row, -step_size * product, f.x + i * f.n_in, f.n_in);
    }
}

// Called after each use of a tensor: turns what it gave into what the stepped one gives.
static void stepped_hook(const Run *run, int layer, int which,
                         const float *x, // (n_rows, n_in) what went in
                         float *y) {     // (n_rows, n_out) what came out
    const Stepped *stepped = run->owner;
    const Config *c = &run->model->config;
    Factors f = factors(stepped->step, layer, which);
    for (ptrdiff_t r = 0; r < run->n_rows; r++) {
        const Row *row = &run->rows[r];
        float step_size = row->sequence->step_size;
        if (step_size == 0)
            continue; // bitwise the untouched model
        if (which == TOK_EMB) { // which has no x
            subtract_row(y + r * c->dim, step_size, f, row->token);
        } else if (f.n) {
            subtract_step(stepped, y + r * f.n_out, x + r * f.n_in, step_size, f);
        } else { // a norm is linear in its gain
            const float *gain = dgain(stepped->step, layer, which);
            rmsnorm(stepped->normed, x + r * c->dim, gain, c->dim, c->norm_eps);
            add_scaled(y + r * c->dim, -step_size, stepped->normed, c->dim);
        }
    }
}

// Working memory of the stepped model for up to max_rows rows.
// *stepped must not be moved, as the run points at it.
static void stepped_init(Stepped *stepped, const Step *step, int max_rows) {
    run_init(&stepped->run, step->model, max_rows, 1);
    stepped->run.hook = stepped_hook; // from now on every use of weights comes by
    stepped->run.owner = stepped;
    stepped->step = step;
    stepped->products = resize(NULL, 2 * (ptrdiff_t)step->n_rows, sizeof(float));
    stepped->normed = resize(NULL, step->model->config.dim, sizeof(float));
}

static void stepped_free(Stepped *stepped) {
    run_free(&stepped->run);
    free(stepped->products);
    free(stepped->normed);
}

// Adds `factor` times the gradient of a tensor to n_rows of its rows, from row `first` on:
// w (n_rows, n_in).
// This is the step written down, for -o and for those who want to compare.
static void add_gradient(const Step *step,
                         float *w, // (n_rows, n_in) rows of the tensor
                         float factor, int layer, int which,
                         int first, int n_rows) {
    Factors f = factors(step, layer, which);
    ptrdiff_t size = f.n * (ptrdiff_t)f.n_in;
    if (!f.n) { // a gain is one row
        add_scaled(w, factor, dgain(step, layer, which), f.n_in);
        return;
    }
    float *scaled = resize(NULL, size, sizeof *scaled);
    for (ptrdiff_t i = 0; i < size; i++)
        scaled[i] = factor * f.x[i];
    // dyᵀ: dy read the other way round, its columns as rows, from column `first` on.
    add_product(w, f.dy + first, 1, f.n_out, (Weights){scaled, FP32}, n_rows, f.n, f.n_in);
    free(scaled);
}

/* ================================================================================================
 * 4  Measuring
 *
 * Surprise is -log of the probability that a model gave to the token that really came.
 * A model that guesses among 32,000 tokens has a surprise of log 32,000 = 10.4 nats each time.
 * A model that is certain, and right, has 0.
 * The mean surprise over a text is its loss.
 */

// -log softmax(logits)[token], in nats: how surprising the token is.
// (softmax itself would overwrite the logits.)
static double surprise(const float *logits, int n, int token) {
    double max = logits[argmax(logits, n)]; // taken off, so that exp cannot overflow
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += exp(logits[i] - max);
    return log(sum) + max - logits[token];
}

// losses[i] = the surprise of tokens[i] after those before it, for the model with a step of this
// size. losses (n); there is none for tokens[0].
static void token_losses(Stepped *stepped, float step_size,
                         const int *tokens, int n, // (n)
                         double *losses) {         // (n)
    const Config *c = &stepped->run.model->config;
    Sequence sequence = sequence_new((Noise){0}); // sober: the step alone is measured
    sequence.step_size = step_size;
    int i = 0; // the last token needs no reading, as nothing comes after it
    while (i + 1 < n) {
        int left = n - 1 - i;
        int n_rows = read_block(&stepped->run, &sequence, tokens + i, left, ALL_LOGITS);
        for (int r = 0; r < n_rows; r++) {
            const float *logits = stepped->run.block[r].logits;
            losses[i + r + 1] = surprise(logits, c->vocab_size, tokens[i + r + 1]);
        }
        i += n_rows;
    }
    sequence_free(stepped->run.model, &sequence);
}

// The mean of losses[from] to losses[to - 1], NAN if there are none, INFINITY if one of them
// is no number.
static double mean_loss(const double *losses, int from, int to) {
    double sum = 0;
    for (int i = from; i < to; i++)
        sum += losses[i];
    // a ruined model may give NAN, which counts as infinite
    return from < to ? fmin(sum / (to - from), INFINITY) : NAN;
}

// |dW|², the sum of the squares of a tensor's gradient, without writing dW down.
// dW is a sum over rows i of dy_i x_iᵀ, so |dW|² is a sum over all pairs of rows:
//
//     |dW|² = sum over o and k of (sum over i of dy_i[o] x_i[k]) (sum over j of dy_j[o] x_j[k])
//           = sum over i and j of (dy_i . dy_j) (x_i . x_j)
//
// So two n x n tables of dot products are enough. They are called Gram matrices.
static double gradient_norm2(const Step *step, int layer, int which) {
    Factors f = factors(step, layer, which);
    const ptrdiff_t size = (ptrdiff_t)f.n * f.n;
    if (!f.n) { // a gain's gradient is there as it is
        const float *gradient = dgain(step, layer, which);
        return dot(gradient, gradient, f.n_in);
    }
    float *gram_dy = resize(NULL, 2 * size, sizeof *gram_dy);
    float *gram_x = gram_dy + size; // both (n, n)
    matmul(gram_dy, f.dy, (Weights){f.dy, FP32}, f.n, f.n_out, f.n);
    matmul(gram_x, f.x, (Weights){f.x, FP32}, f.n, f.n_in, f.n);
    double sum = 0;
    for (ptrdiff_t i = 0; i < size; i++)
        sum += (double)gram_dy[i] * gram_x[i];
    free(gram_dy);
    return sum;
}

/* ================================================================================================
 * 5  Texts side by side
 *
 * Eight columns are eight sequences, each with a step size of its own (three of them here).
 * In every call of forward each of them has one row, the token that it wrote last:
 *
 *     step size    0             .001     .1
 *     call 1       "a"           ","      ","       three rows, one pass over the weights
 *     call 2       "successful"  "or"     "To"
 *     call 3       "business"    "not"    "be"
 *
 * As reading the weights is what takes most of the time, eight texts cost far less than
 * eight times one.
 */

// One of several texts that are written at once.
typedef struct Text {
    Sequence *sequence; // the prompt is in its cache
    Dice dice;          // all 0: always the most probable token
    int next;           // the token that comes now
    int *tokens;        // (n_new) what was written; the caller makes room
    int n_tokens;
    // For the laboratory.
    int shower_every;   // a cold shower after this many drugged tokens, 0: never
    // If set, called for each token but the last, before the next one is chosen: with what left the
    // layers (dim) and with the logits (vocab_size), which it may change.
    void (*watch)(struct Text *text, const float *state, float *logits);
    void *owner;        // for watch
} Text;

// Each text that goes on writes its next token and gets a row. active is narrowed to these texts;
// returns their number.
// A shower comes before the row, as in drugs: it runs what was read so far.
static int write_next(Run *run, Text **active, int n, Row *rows) {
    int n_active = 0;
    for (int i = 0; i < n; i++) {
        Text *text = active[i];
        if (ending(run->model, text->next))
            continue; // it is complete and drops out
        text->tokens[text->n_tokens++] = text->next;
        if (text->shower_every && text->sequence->n_drugged >= text->shower_every)
            cold_shower(run, text->sequence);
        rows[n_active] = (Row){
            .token = text->next,
            .position = text->sequence->length,
            .sequence = text->sequence,
            .drugged = true,
            .wants_logits = true,
        };
        active[n_active++] = text;
    }
    return n_active;
}

// Writes up to n_new tokens of each text (n): one row of each in every call of forward, so that
// weights are read once for all.
// Progress goes on by n * n_new tokens: a text that has ended counts as if it went on.
static void write_texts(Run *run, Text *texts, int n, int n_new) {
    const Config *c = &run->model->config;
    Row *rows = resize(NULL, n, sizeof *rows);
    Text **active = resize(NULL, n, sizeof *active);
    int n_texts = n;
    for (int i = 0; i < n; i++)
        active[i] = &texts[i];
    // n is the number of texts that still go on.
    for (int written = 0; written < n_new; written++) {
        n = write_next(run, active, n, rows);
        progress(n_texts - n);
        if (written + 1 == n_new)
            break; // what would come then is not asked
        for (int first = 0; first < n; first += run->max_rows) {
            int n_rows = min(n - first, run->max_rows);
            forward(run, rows + first, n_rows);
            progress(n_rows);
            for (int r = 0; r < n_rows; r++) {
                Text *text = active[first + r];
                const Sequence *s = text->sequence;
                float *logits = rows[first + r].logits;
                if (text->watch)
                    text->watch(text, last_state(run, r), logits);
                text->next = choose(logits, c->vocab_size, &text->dice,
                                    s->noise.seed, s->length);
            }
        }
    }
    free(rows);
    free(active);
}

// The tokens of a string, BOS first.
static int *tokens_of(const Model *m, const char *text, int *n_tokens) {
    return encode(m, (Source){text, strlen(text), AT_START, .bos = true}, n_tokens);
}

// The text of tokens (n), with <1B> and the like for what a terminal would obey.
// The caller frees it.
static char *text_of(const Model *m, const int *tokens, int n) {
    char *text;
    size_t size;
    Printer printer = {.to = open_memstream(&text, &size), .at_start = true, .terminal = true};
    if (!printer.to)
        die(1, "out of memory");
    for (int i = 0; i < n; i++)
        print_token(&printer, m, tokens[i]);
    print_rest(&printer);
    if (fclose(printer.to) || !text) // which sets text
        die(1, "out of memory");
    return text;
}

/* ================================================================================================
 * 6  The experiment
 *
 *     before     how the untouched model sees the lesson, and where the gradient lies
 *     table      what "To be" becomes with each step size
 *     after      what was learned, and what it cost
 *     cure       what a prompt does that names Shakespeare, without a step
 *
 * The theme is plasticity against stability.
 * A model that learns from one sentence is plastic, one that keeps what it knew is stable, and the
 * step size trades the one for the other.
 * Some step sizes give both, which was not to be expected.
 * After a lesson on its first line the model recites the whole soliloquy.
 * Other texts go on as before.
 * The model knew the soliloquy all along; the step only makes it more probable after "To be".
 */
enum { MAX_STEP_SIZES = 64, MEASURE_ROWS = 128 }; // 128 rows of 32,000 logits: 16 MB
typedef struct {
    const char *prompt; // is completed with each step
    const char *cure;   // a prompt for the untouched model that says what is wanted
    const char *lesson; // what is taught
    const char *sequel; // how it goes on: measured, not taught
    const char *other;  // something else, measured too
    const char *table_path, *loss_path, *model_path; // of files to write, NULL: none
    double step_sizes[MAX_STEP_SIZES];
    int n_sizes;
    int n_new;          // tokens to write
    int counting;       // LAST_ONLY: only the lesson's last prediction counts; else 0
    NoiseOptions noise;
} Experiment;

// The lesson as the model sees it before the step; drugged, if there are doses.
static void print_lesson(const Step *step) {
    const Config *c = &step->model->config;
    printf("Before the step, the lesson has a loss of %.4f:\n\n", step->loss);
    printf("    %-16s %11s %6s\n", "token", "probability", "rank");
    for (ptrdiff_t i = 0; i < step->n_loss; i++) {
        const float *logits = step->acts.logits + i * c->vocab_size;
        int target = step->targets[i];
        int rank = 1; // 1: the model would have said so itself
        for (int token = 0; token < c->vocab_size; token++)
            rank += logits[token] > logits[target];
        char *text = visible(step->model, target);
        double p = exp(-surprise(logits, c->vocab_size, target));
        printf("    ");
        print_column(text, 16);
        printf(" %11.6f %6d\n", p, rank);
        free(text);
    }
}

// How the gradient is spread over the model: its length by layer and by kind of tensor, a few
// on each line.
// Returns the square of the whole length.
static double print_gradient(const Step *step) {
    static const char *const names[] = {
        "att norm", "wq", "wk", "wv", "wo", "FFN norm", "w1", "w3", "w2",
        "embedding", "final norm", "classifier",
    };
    _Static_assert(sizeof names / sizeof *names == N_TENSORS, "each tensor has a name");
    static const char indent[] = "\n                             ";
    const Config *c = &step->model->config;
    const int n_kinds = N_TENSORS - c->shared_classifier; // WCLS, the last, may be TOK_EMB
    // Squares of lengths add up, over layers and over kinds. All sums here are squares.
    double kinds[N_TENSORS] = {0};
    double total = 0;
    printf("\nIts gradient, |g| by layer:  ");
    for (int layer = 0; layer < c->n_layers; layer++) {
        double norm2 = 0;
        for (int which = 0; which < N_LAYER_TENSORS; which++) {
            double one = gradient_norm2(step, layer, which);
            kinds[which] += one;
            norm2 += one;
        }
        total += norm2;
        printf("%s %.3g", layer && layer % 8 == 0 ? indent : "", sqrt(norm2));
    }
    for (int which = TOK_EMB; which < n_kinds; which++) {
        kinds[which] = gradient_norm2(step, 0, which);
        total += kinds[which];
    }
    printf("\n                  by kind:   ");
    for (int which = 0; which < n_kinds; which++) {
        fputs(which ? "," : "", stdout);
        printf("%s %s %.3g", which && which % 4 == 0 ? indent : "", names[which],
               sqrt(kinds[which]));
    }
    printf("\n                  in all:     %.4g\n", sqrt(total));
    // A step of size s promises to lower the loss by s |g|² (see print_after). With the default
    // lesson and model, where .001 is a good size, that is .69 nats.
    if (total > 0)
        printf("\nLook near step size %.1g: it promises .69 nats, size * |g|², as .001 does\n"
               "with the lesson and the model that are included.\n", .69 / total);
    return total;
}

// Writes up to n_new tokens after the prompt for each step size, always the most probable one.
// On a terminal stderr shows how far the writing is.
// Returns the texts, prompts included; the caller frees them.
static char **write_columns(Stepped *stepped, const Experiment *e,
                            const int *prompt, // (n_prompt)
                            int n_prompt) {
    const Model *m = stepped->run.model;
    const int n = e->n_sizes;
    const int n_new = min(e->n_new, m->config.seq_len - n_prompt);
    const ptrdiff_t length = n_prompt + n_new; // of a whole text, in tokens
    Sequence *sequences = resize(NULL, n, sizeof *sequences);
    Text *texts = resize(NULL, n, sizeof *texts);
    int *tokens = resize(NULL, n * length, sizeof *tokens); // (n, length)
    char **written = resize(NULL, n, sizeof *written);                 // (n) strings
    // Each column reads the prompt by itself: with its own step, no two remember it alike.
    for (int i = 0; i < n; i++) {
        sequences[i] = sequence_new((Noise){0});
        sequences[i].step_size = (float)e->step_sizes[i];
        sequence_reserve(m, &sequences[i], length);
        memcpy(tokens + i * length, prompt, n_prompt * sizeof *prompt);
        const float *logits = feed(&stepped->run, &sequences[i], prompt, n_prompt, WANTS_LOGITS);
        texts[i] = (Text){
            .sequence = &sequences[i],
            .next = argmax(logits, m->config.vocab_size),
            .tokens = tokens + i * length + n_prompt,
        };
    }
    progress_begin("texts", (double)n * n_new);
    write_texts(&stepped->run, texts, n, n_new);
    progress_end();
    for (int i = 0; i < n; i++) {
        int n_written = n_prompt + texts[i].n_tokens;
        written[i] = text_of(m, tokens + i * length, n_written);
        sequence_free(m, &sequences[i]);
    }
    free(sequences);
    free(texts);
    free(tokens);
    return written;
}

static const char SPACE[] = " \n\t\r"; // what words stand between

enum { N_SOURCES = 3 }; // where a word may come from, see save_table

// One word a row, one column a step size; in a file three more, with the texts that are measured.
static void print_table(Table *table, const Experiment *e, char *const *texts) {
    const char *at[MAX_STEP_SIZES + N_SOURCES]; // where each text goes on
    int n_columns = e->n_sizes;
    for (int i = 0; i < e->n_sizes; i++) {
        char name[32];
        snprintf(name, sizeof name, "%g", e->step_sizes[i]);
        print_cell(table, name, strlen(name));
        at[i] = texts[i] + strspn(texts[i], SPACE);
    }
    if (!table->width) {
        static const char *const names[N_SOURCES] = {"lesson", "its sequel", "other text"};
        const char *const sources[N_SOURCES] = {e->lesson, e->sequel, e->other};
        for (int i = 0; i < N_SOURCES; i++) {
            print_cell(table, names[i], strlen(names[i]));
            at[n_columns++] = sources[i] + strspn(sources[i], SPACE);
        }
    }
    end_heading(table);
    for (bool more = true; more;) { // row by row, until the longest text is used up
        more = false;
        for (int i = 0; i < n_columns; i++) { // a text that is used up gives empty cells
            int n = (int)strcspn(at[i], SPACE);
            print_cell(table, at[i], n);
            at[i] += n;
            at[i] += strspn(at[i], SPACE);
            more = more || *at[i];
        }
        end_row(table);
    }
}

// The table as wide as the terminal, or 100 characters where there is none.
static void show_table(const Experiment *e, char *const *texts) {
    int width = min(terminal_width(100) / e->n_sizes, 16); // of a column: few words are longer
    Table table = {.to = stdout, .width = width < 6 ? 6 : width};
    printf("\nAfter one step of each size, \"%s\" goes on like this:\n\n", e->prompt);
    print_table(&table, e, texts);
}

// The table as a file, if one is wanted.
// There the lesson, its sequel and the other text stand beside the columns, word by word, so that
// one sees which words come from where; the page needs them, too.
static void save_table(Output *output, const Experiment *e, char *const *texts) {
    Table table = {.to = output->to};
    if (!output->path)
        return;
    table.markdown = ends_with(output->path, ".md");
    print_table(&table, e, texts);
    output_close(output);
}

// A loss in a column of its own, and in a cell of a file if there is one, with nine digits.
// NAN is the mean of nothing; ruin is infinite.
static void print_loss(double loss, FILE *to) {
    if (isnan(loss))
        printf(" %12s", "-");
    else if (isinf(loss))
        printf(" %12s", "not finite");
    else
        printf(" %12.4f", loss);
    if (to)
        fprintf(to, ",%.9g", loss);
}

// Plasticity against stability: what the lesson gained, and what everything else lost.
// norm2 is |g|², the square of the gradient's length.
// A small move of the weights changes the loss by gradient . move.
// The step moves them by -step_size * gradient, so a straight line would fall by step_size * |g|².
// That is the column "first order". It starts from the loss of the lesson, which may be drugged.
// All other losses are sober ones. So with doses the first two columns differ at step size 0.
// A file, if there is one, gets all that is shown, as CSV.
static void print_after(Stepped *stepped, const Experiment *e, double norm2, FILE *to) {
    const Model *m = stepped->run.model;
    size_t n_bytes = strlen(e->lesson) + strlen(e->sequel);
    char *whole = resize(NULL, n_bytes + 1, 1);
    sprintf(whole, "%s%s", e->lesson, e->sequel);
    int n_lesson, n_whole, n_other;
    // The lesson's tokens are only counted: that is where the sequel begins.
    int *lesson = tokens_of(m, e->lesson, &n_lesson);
    int *passage = tokens_of(m, whole, &n_whole);
    int *other = tokens_of(m, e->other, &n_other);
    // What goes beyond the context is not measured. The last token is not read.
    n_whole = min(n_whole, m->config.seq_len + 1);
    n_other = min(n_other, m->config.seq_len + 1);
    double *of_passage = resize(NULL, n_whole, sizeof *of_passage);
    double *of_other = resize(NULL, n_other, sizeof *of_other);
    // Both texts are read anew with each step size.
    printf("\nAfter the step, losses in nats a token:\n\n");
    printf("    %-10s %12s %12s %12s %12s\n", "step size", "lesson", "first order", "its sequel",
           "other text");
    if (to)
        fputs("step size,lesson,first order,its sequel,other text\n", to);
    for (int i = 0; i < e->n_sizes; i++) {
        float step_size = (float)e->step_sizes[i];
        token_losses(stepped, step_size, passage, n_whole, of_passage);
        token_losses(stepped, step_size, other, n_other, of_other);
        printf("    %-10g", step_size);
        if (to)
            fprintf(to, "%g", step_size);
        int first = e->counting ? n_lesson - 1 : 1; // LAST_ONLY, or all
        // the lesson, as far as it counted; the straight line; what follows; all else
        print_loss(mean_loss(of_passage, first, min(n_lesson, n_whole)), to);
        print_loss(stepped->step->loss - step_size * norm2, to);
        print_loss(mean_loss(of_passage, n_lesson, n_whole), to);
        print_loss(mean_loss(of_other, 1, n_other), to);
        puts("");
        if (to)
            fputs("\n", to);
    }
    free(whole);
    free(lesson);
    free(passage);
    free(other);
    free(of_passage);
    free(of_other);
}

// How the untouched model goes on after a prompt (n) that says what is wanted.
static void print_cure(Stepped *stepped, const Experiment *e, const int *prompt, int n) {
    Experiment untouched = {.n_sizes = 1, .n_new = e->n_new}; // of step size 0
    char **text = write_columns(stepped, &untouched, prompt, n); // a table of one column
    printf("\nThe untouched model, with a prompt that says what is wanted:\n\n");
    print_text(*text);
    free(*text);
    free(text);
}

// Writes the model with the step taken, if that is wanted.
// A step needs all digits of a float, so this file is fp32, however the model was stored.
// What comes before the tensors is copied but for the storage, and the tensors pass through a few
// rows at a time, so there is never a second model in memory.
static void write_stepped(const Step *step, float step_size, Output *output) {
    enum { ROWS = 64 };
    static const char zeros[ALIGNMENT];
    const Model *m = step->model;
    const char *data = m->file;
    Config config = m->config;
    size_t n_written = (const char *)m->layers[0].w[TOK_EMB].data - data; // a multiple of 64
    int layer, which, n_out, n_in;
    if (!output->path)
        return;
    config.storage = FP32;
    fwrite(data, 1, MAGIC_BYTES, output->to);
    fwrite(&config, 1, CONFIG_BYTES, output->to);
    fwrite(data + MAGIC_BYTES + CONFIG_BYTES, 1, n_written - MAGIC_BYTES - CONFIG_BYTES, output->to);
    for (int i = 0; tensor_at(&m->config, i, &layer, &which); i++) {
        tensor_shape(&m->config, which, &n_out, &n_in);
        n_written += fwrite(zeros, 1, -n_written % ALIGNMENT, output->to);
        float *rows = resize(NULL, (ptrdiff_t)ROWS * n_in, sizeof *rows);
        for (int r = 0; r < n_out; r += ROWS) {
            int n_rows = min(n_out - r, ROWS);
            ptrdiff_t size = (ptrdiff_t)n_rows * n_in;
            widen(rows, m->layers[layer].w[which], (ptrdiff_t)r * n_in, size);
            add_gradient(step, rows, -step_size, layer, which, r, n_rows);
            n_written += fwrite(rows, sizeof *rows, size, output->to) * sizeof *rows;
        }
        free(rows);
    }
    output_close(output);
}

/* ================================================================================================
 * 7  The command line
 *
 * It is built like that of drugs: the same function reads the options about noise.
 * Doses make the lesson a drugged one; the gradient then goes back through the very same glitches,
 * as if they were part of the model.
 */
static const char STEP_USAGE[] =
    "usage: train_step <model.bin> [options]\n"
    "  -l <text>    the lesson, or @file (To be, or not to be, that is the question:)\n"
    "  -i <text>    prompt, @file, or - for standard input (To be)\n"
    "  -e <sizes>   step sizes (0,1e-4,1e-3,2e-3,3e-3,5e-3,1e-2,1e-1)\n"
    "  -n <tokens>  how many to write (64)\n"
    "  -x <which>   predictions that count in the loss: all (default) or last\n"
    "  -g <text>    how the lesson goes on, or @file: measured, not taught (the soliloquy);\n"
    "               begin it with a space or a new line, as it follows the lesson\n"
    "  -f <file>    other text, measured too (a built-in paragraph)\n"
    "  -y <text>    a better prompt, for the untouched model (Here is one of ...;\n"
    "               none if -l is given)\n"
    "  -t <file>    the whole table as .csv or .md\n"
    "  -a <file>    the losses after the step as .csv; tests/laboratory/page.py draws both\n"
    "  -o <file>    the stepped model, a .bin, for one step size\n"
    "  -H -Q -K -V -A <theta>, -d, -w, -r, -s  doses for the lesson, as in drugs\n"
    "  -h, --help   this help\n"
    "An option that lacks what it needs is an error.\n";

// What is taught if nothing else is asked for, and how it goes on (Hamlet, act 3).
static const char PHRASE[] = "To be, or not to be, that is the question:";
static const char SEQUEL[] =
    "\nWhether 'tis nobler in the mind to suffer\n"
    "The slings and arrows of outrageous fortune,\nOr to take arms against a sea of troubles,\n"
    "And by opposing end them. To die, to sleep,\nNo more; and by a sleep to say we end\n"
    "The heart-ache and the thousand natural shocks\nThat flesh is heir to: 'tis a consummation\n"
    "Devoutly to be wish'd. To die, to sleep;\nTo sleep, perchance to dream. Ay, there's the rub,\n"
    "For in that sleep of death what dreams may come.";
// What a prompt can do instead: say where we are.
static const char CURE[] = "Here is one of Shakespeare's more famous works: To be";
// What the lesson should leave alone.
static const char OTHER[] =
    "You need to be able to set clear goals. You must make a good plan if you want to earn more "
    "money. It is important to listen to your customers. You should keep your promises, too. The "
    "weather is nice today, so we can walk in the park. I like to drink a cup of tea in the "
    "morning.";

// Reads step sizes, separated by commas.
static void parse_step_sizes(Experiment *e, const char *list) {
    char *copy = strdup(list); // in which commas become ends of strings
    if (!copy)
        die(1, "out of memory");
    e->n_sizes = 0; // what was the default, or said before, is forgotten
    for (char *rest = copy, *one; (one = strsep(&rest, ","));) {
        if (e->n_sizes == MAX_STEP_SIZES)
            die(2, "-e takes at most %d step sizes", MAX_STEP_SIZES);
        if (*one == '0' && isdigit((unsigned char)one[1])) // 0,001 is not meant as 0 and 1
            die(2, "-e takes step sizes like 0,1e-3, got '%s'; a point is the decimal sign", list);
        e->step_sizes[e->n_sizes++] = number('e', "step sizes like 0,1e-3", one, 0, 1000);
    }
    free(copy);
}

// Takes an option that is not about noise.
static void take_option(Experiment *e, int letter, const char *value) {
    switch (letter) {
    case 'l':
        e->lesson = text_of_option('l', value);
        break;
    case 'i':
        e->prompt = text_of_option('i', value);
        break;
    case 'e':
        parse_step_sizes(e, value);
        break;
    case 'n':
        e->n_new = whole_number('n', "a number of tokens", value, 1, 1 << 20);
        break;
    case 'x':
        if (strcmp(value, "last") && strcmp(value, "all"))
            die(2, "-x takes all or last, got '%s'", value);
        e->counting = strcmp(value, "last") ? 0 : LAST_ONLY;
        break;
    case 'g':
        e->sequel = text_of_option('g', value);
        break;
    case 'f':
        e->other = read_stream('f', value, fopen(value, "rb"));
        break;
    case 'y':
        e->cure = text_of_option('y', value);
        break;
    case 't':
        e->table_path = value;
        break;
    case 'a':
        e->loss_path = value;
        break;
    case 'o':
        e->model_path = value;
        break;
    }
}

// Which option goes with which.
static void check_step(const Experiment *e) {
    bool same = e->table_path && e->loss_path && !strcmp(e->table_path, e->loss_path);
    check_needs((const Need[]){
        {"dw", e->noise.plain, "a dose without a shape, like -V .3"},
        {"rs", strpbrk(given, SITES), "a dose, like -V .3"},
        {"o", e->n_sizes == 1, "one step size, -e, as it writes one model"},
        {"a", !same, "another file than -t"},
        {0},
    });
}

static Experiment parse_experiment(int argc, char **argv) {
    Experiment e = {
        .prompt = "To be",
        .other = OTHER,
        .n_new = 64,
        .noise = NO_NOISE_OPTIONS,
    };
    int letter;
    parse_step_sizes(&e, "0,1e-4,1e-3,2e-3,3e-3,5e-3,1e-2,1e-1");
    while ((letter = next_option(argc, argv, ":hl:i:e:n:x:g:f:y:t:a:o:" NOISE_OPTIONS,
                                 STEP_USAGE)) >= 0)
        if (!take_noise_option(&e.noise, letter, optarg))
            take_option(&e, letter, optarg);
    check_step(&e);
    give_shape(&e.noise);
    if (!e.sequel) // a lesson of one's own has no sequel unless one is given
        e.sequel = e.lesson ? "" : SEQUEL;
    if (!e.cure) // and no prompt of ours says what such a lesson wants
        e.cure = e.lesson ? "" : CURE;
    if (!e.lesson) // unless it was given
        e.lesson = PHRASE;
    return e;
}

// The tokens of a prompt that an option gave. The caller frees them.
static int *read_prompt(const Model *m, int option, const char *text, int *n) {
    int *prompt = tokens_of(m, text, n);
    if (*n < 1 || *n >= m->config.seq_len)
        die(1, "-%c has %d token%s, it needs 1 to %d for this model", option, *n, plural(*n),
            m->config.seq_len - 1);
    return prompt;
}

// Teaches the lesson: everything that the step needs to know.
static void teach(Step *step, const Model *m, const Experiment *e) {
    int n;
    int *lesson = tokens_of(m, e->lesson, &n);
    if (!*e->lesson || n < 2)
        die(1, "-l: a lesson needs two tokens, one to predict the other");
    if (n - 1 > m->config.seq_len) // the last token is only predicted, not read
        die(1, "-l has %d tokens, the model's context only %d", n, m->config.seq_len);
    progress_begin("lesson", n - 1);
    Noise noise = noise_of(&e->noise, m);
    Sequence sequence = sequence_new(noise);
    step_init(step, m, n - 1); // a lesson of n tokens is n - 1 predictions
    step_add(step, &sequence, lesson, n, DRUGGED | e->counting);
    step_take(step);
    progress_end();
    sequence_free(m, &sequence);
    free((float *)noise.theta);
    free(lesson);
}

#ifndef TRAIN_STEP_LIBRARY
int main(int argc, char **argv) {
    program = "train_step";
    begin_program(argc, argv, 1, STEP_USAGE);
    Experiment e = parse_experiment(argc, argv);
    // First whatever can fail without any work: the files to be written, the model to be read.
    Output table_file = output_open('t', e.table_path, ".csv .md", argv[1]);
    Output loss_file = output_open('a', e.loss_path, ".csv", argv[1]);
    Output model_file = output_open('o', e.model_path, ".bin", argv[1]);
    Model model;
    if (!model_open(&model, argv[1]))
        die(1, "%s: %s", argv[1], model.error);
    int n_prompt, n_cure;
    int *prompt = read_prompt(&model, 'i', e.prompt, &n_prompt);
    int *cure = NULL;
    if (*e.cure) // "": none is wanted
        cure = read_prompt(&model, 'y', e.cure, &n_cure);

    // Then the lesson, and what became of the model.
    Step step;
    Stepped stepped;
    teach(&step, &model, &e);
    stepped_init(&stepped, &step, MEASURE_ROWS);
    print_lesson(&step);
    double norm2 = print_gradient(&step);
    flush_output();
    char **texts = write_columns(&stepped, &e, prompt, n_prompt);
    show_table(&e, texts);
    save_table(&table_file, &e, texts);
    print_after(&stepped, &e, norm2, loss_file.to);
    output_close(&loss_file);
    if (cure)
        print_cure(&stepped, &e, cure, n_cure);
    write_stepped(&step, e.step_sizes[0], &model_file);
    flush_output();

    for (int i = 0; i < e.n_sizes; i++)
        free(texts[i]);
    free(texts);
    free(prompt);
    free(cure);
    stepped_free(&stepped);
    step_free(&step);
    model_close(&model);
    return 0;
}
#endif

/* ================================================================================================
 * 8  Inside the maths
 *
 * matmul in drugs.c goes along the rows of a matrix.
 * Going back through a matrix (dX += dY W) and forming a gradient (dW = dYᵀ X) go across: rows of b
 * are weighted and added up.
 * a has two strides, because dY is read as it stands for dX and transposed for dW.
 *
 *                        columns of b and out
 *                   | strip | strip | strip | strip |     a thread takes a strip of b,
 *       block of    |-|-|-|-|                             32 rows of it, and 32 columns of these:
 *       rows of b   | | | | |                             4 KB, which stay in the cache while
 *                   |-|-|-|-|                             all rows of out use them
 *
 * Within a block the tile is 3 rows of out by 4 vecs: 12 sums in registers, and each vec of b that
 * is loaded serves three of them.
 * Whatever the tile, each number of out gets its terms in the order of k, one after the other.
 * So its bits do not depend on the shapes.
 */
enum {
    TILE_ROWS = 3, // with 4 vecs: 12 sums, so that of AVX2's 16 registers some are left for the rest
    VECS = 4,
    COLUMNS = VECS * WIDTH,
    STRIP = 4 * COLUMNS,
    BLOCK = 32,     // rows of b: with 32 columns 4 KB, which the first-level cache holds
    MANY_ROWS = 32, // of out
};

// out[r] += the sum over k of a[r][k] * b[k], for COLUMNS columns and n_rows rows: TILE_ROWS or 1,
// a constant wherever this is inlined.
static inline __attribute__((always_inline)) void
sum_tile(float *out, ptrdiff_t out_stride, // (n_rows, COLUMNS)
         int n_rows,
         const float *a, ptrdiff_t a_row, ptrdiff_t a_k, // (n_rows, n_k)
         const float *b, ptrdiff_t b_stride,             // (n_k, COLUMNS)
         int n_k) {
    vec sum[TILE_ROWS][VECS]; // they begin with what is in out, and go back there
    for (int r = 0; r < n_rows; r++)
        for (int v = 0; v < VECS; v++)
            sum[r][v] = load(out + r * out_stride + v * WIDTH, WIDTH);
    for (int k = 0; k < n_k; k++)
        for (int r = 0; r < n_rows; r++)
            for (int v = 0; v < VECS; v++) {
                vec part = load(b + k * b_stride + v * WIDTH, WIDTH);
                sum[r][v] += a[r * a_row + k * a_k] * part;
            }
    for (int r = 0; r < n_rows; r++)
        for (int v = 0; v < VECS; v++)
            *(vec *)(out + r * out_stride + v * WIDTH) = sum[r][v];
}

// A block of n_k rows of b, and n of their columns, for all rows of out.
static void add_block(float *out,     // (n_rows, n), rows n_cols apart
                      const float *a, // (n_rows, n_k)
                      ptrdiff_t a_row, ptrdiff_t a_k,
                      Weights weights, ptrdiff_t at, // (n_k, n), rows n_cols apart, from number `at` on
                      ptrdiff_t n_rows, int n_k, ptrdiff_t n_cols, int n) {
    float packed[BLOCK * COLUMNS];
    const float *b = packed;
    ptrdiff_t stride = COLUMNS;
    ptrdiff_t r = 0;
    // Rows that lie a power of two apart share the same few places of the processor's cache, and so
    // push each other out of it.
    // Where they are used by many rows of out, it pays to put them together first; and numbers of
    // two bytes are widened so.
    if (n_rows > MANY_ROWS || weights.storage != FP32) {
        for (int k = 0; k < n_k; k++)
            widen(packed + k * COLUMNS, weights, at + k * n_cols, n);
    } else {
        b = (const float *)weights.data + at;
        stride = n_cols;
    }
    if (n == COLUMNS) {
        for (; r + TILE_ROWS <= n_rows; r += TILE_ROWS)
            sum_tile(out + r * n_cols, n_cols, TILE_ROWS, a + r * a_row, a_row, a_k, b, stride, n_k);
        for (; r < n_rows; r++) // the rest of the rows
            sum_tile(out + r * n_cols, n_cols, 1, a + r * a_row, a_row, a_k, b, stride, n_k);
    }
    for (; r < n_rows; r++) // columns that fill no tile
        for (int k = 0; k < n_k; k++)
            add_scaled(out + r * n_cols, a[r * a_row + k * a_k], b + k * stride, n);
}

static void add_product(float *out,
                        const float *a, ptrdiff_t a_row, ptrdiff_t a_k,
                        Weights b,
                        ptrdiff_t n_rows, ptrdiff_t n_k, ptrdiff_t n_cols) {
#pragma omp parallel for schedule(static) if (worth_threads(product_bytes(b, n_rows, n_k, n_cols)))
    for (ptrdiff_t first = 0; first < n_cols; first += STRIP)
        for (ptrdiff_t k = 0; k < n_k; k += BLOCK)
            for (ptrdiff_t c = first; c < min(first + STRIP, n_cols); c += COLUMNS)
                add_block(out + c, a + k * a_k, a_row, a_k, b, k * n_cols + c, n_rows,
                          min(n_k - k, BLOCK), n_cols, min(n_cols - c, COLUMNS));
}
