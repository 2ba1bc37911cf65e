/* exercises.c - the judges of tests/classroom/EXERCISES.md. `make exercise N=4` builds those of exercise 4 and
 * runs them; nothing else does.
 *
 * They ask for properties, as test_properties.c does, and never for numbers that somebody's own
 * solution gave. What an exercise leaves alone is judged too. Answers to questions come from the
 * command line: make hands A="3 4" on in the environment.
 */
#if EXERCISE < 1 || EXERCISE > 12
#error "There are exercises 1 to 12: make exercise N=4"
#endif
#if EXERCISE == 10
#define main pretrain_main
#include "../makers/pretrain.c"
#undef main
#pragma GCC diagnostic ignored "-Wshadow" // what testing.h calls a file is not pretrain's
#include "../unit/testing.h"
#include "../unit/golden.h"
#else
#include "../unit/properties.h"
#endif

/* ------------------------------------------------------------------------------------------------
 * Questions: what is asked is not looked up, the program is run.
 */
#if EXERCISE <= 2
enum { MOST_NUMBERS = 32 };
typedef struct {
    int n;
    int number[MOST_NUMBERS];
} Answer;

static Answer answer(const char *name) {
    Answer a = {0};
    const char *text = getenv(name);
    cr_assert(text && *text, "no answer to question %s: make exercise N=%d %s=\"...\"", name, EXERCISE,
              name);
    while (a.n < MOST_NUMBERS) {
        char *end;
        text += strspn(text, " ,");
        long number = strtol(text, &end, 10);
        if (end == text)
            break;
        a.number[a.n++] = (int)number;
        text = end;
    }
    cr_assert(!*text, "%s should be numbers with spaces between them, and there is \"%s\"", name, text);
    return a;
}

static void expect_number(const char *name, int place, int truth, const char *hint) {
    Answer a = answer(name);
    cr_expect(a.n == 2 && a.number[place] == truth, "%s: two numbers are asked for, and number %d is "
              "not right. %s", name, place + 1, hint);
}
#endif

#if EXERCISE == 1
enum { FAR = 10 }; // layers of the included model

// The layers, as numbers, in which a dose of V turns anything.
static void expect_layers(const char *name, const char *dose) {
    Dose doses[N_SITES] = {0};
    float theta[N_SITES * FAR];
    Answer a = answer(name);
    int n_wrong = 0, first = 0;
    parse_dose(&doses[SITE_V], 'V', dose);
    dose_layers(theta, doses, FAR);
    for (int layer = FAR - 1; layer >= 0; layer--) {
        bool said = false;
        for (int i = 0; i < a.n; i++)
            said |= a.number[i] == layer;
        if (said != (theta[SITE_V * FAR + layer] > 0)) {
            n_wrong++;
            first = layer;
        }
    }
    cr_expect(!n_wrong, "%s: %d of the layers are not as you say, the first of them at depth .%d: what "
              "does dose_at in section 7 make of that depth?", name, n_wrong, first);
}

// The first layer in whose cache anything differs with a dose at a site in layer 3, and the first
// position there.
static void first_difference(int site, int *first_layer, int *first_position) {
    Model m;
    Run run;
    float theta[N_SITES * FAR] = {0};
    int tokens[20];
    for (int i = 0; i < 20; i++)
        tokens[i] = 300 + i;
    cr_assert(model_open(&m, "tests/hamlet.bin") && m.config.n_layers == FAR);
    theta[site * FAR + 3] = 1;
    run_init(&run, &m, 20, 1);
    Sequence sober = sequence_new((Noise){0});
    Sequence drugged = sequence_new((Noise){.seed = 1, .theta = theta});
    feed(&run, &sober, tokens, 20, 0);
    feed(&run, &drugged, tokens, 20, DRUGGED);
    *first_layer = -1;
    for (int layer = 0; layer < FAR && *first_layer < 0; layer++)
        for (int position = 0; position < 20 && *first_layer < 0; position++) {
            const ptrdiff_t at = position * m.config.kv_dim;
            if (!same(sober.k[layer] + at, drugged.k[layer] + at, (size_t)m.config.kv_dim)) {
                *first_layer = layer;
                *first_position = position;
            }
        }
    sequence_free(&m, &sober);
    sequence_free(&m, &drugged);
    run_free(&run);
    model_close(&m);
}

Test(exercise_1, a_shape_with_ceil) {
    expect_layers("A", "1@ceil:.25=0,.45=1,.6=0");
}

Test(exercise_1, the_same_interpolated) {
    expect_layers("B", "1@interpolate:.25=0,.45=1,.6=0");
}

Test(exercise_1, noise_at_H_in_a_cache) {
    int layer, position;
    first_difference(SITE_H, &layer, &position);
    expect_number("C", 0, layer, "Who reads xn? Follow the drawing in section 1 of drugs.c.");
    expect_number("C", 1, position, "What is never turned?");
}

Test(exercise_1, noise_at_V_in_a_cache) {
    int layer, position;
    first_difference(SITE_V, &layer, &position);
    expect_number("D", 0, layer, "When are values turned, and what lies in the cache by then?");
    expect_number("D", 1, position, "What is never turned?");
}
#endif

#if EXERCISE == 2
// Model M has two layers, and a query sees five keys, its own included.
Test(exercise_2, forward) {
    static float logits[N_TOKENS][93];
    int first = -1, last = -1;
    Bench b;
    bench_open(&b, M, N_TOKENS);
    for (int changed = 0; changed < 2; changed++) {
        int tokens[N_TOKENS];
        memcpy(tokens, M_TOKENS, sizeof tokens);
        tokens[4] += changed; // token 4 is another one now
        Sequence s = sequence_new((Noise){0});
        for (int i = 0; i < N_TOKENS; i++) {
            const float *now = feed(&b.run, &s, tokens + i, 1, WANTS_LOGITS);
            if (changed && !same(logits[i], now, 93)) {
                first = first < 0 ? i : first;
                last = i;
            }
            memcpy(logits[i], now, sizeof logits[i]);
        }
        sequence_free(&b.model, &s);
    }
    expect_number("A", 0, first, "Can a query look ahead?");
    expect_number("A", 1, last, "Who sees key 4 itself? And in the next layer, who sees those that did?");
    bench_close(&b);
}

Test(exercise_2, backward) {
    int first = -1, last = -1;
    Bench b;
    Step step;
    bench_open(&b, M, N_TOKENS);
    Sequence s = sequence_new((Noise){0});
    step_init(&step, &b.model, N_TOKENS);
    step_add(&step, &s, M_TOKENS, 17, LAST_ONLY); // rows 0 to 15, and only row 15 predicts
    step_take(&step);
    for (int r = 0; r < step.n_rows; r++) {
        const float *dk = step.grads.slots[0].k + r * b.model.config.kv_dim;
        if (dot(dk, dk, b.model.config.kv_dim) > 0) {
            first = first < 0 ? r : first;
            last = r;
        }
    }
    expect_number("B", 0, first, "What did row 15 see in layer 1, and what had those rows seen in layer 0?");
    expect_number("B", 1, last, "Can a row learn from a prediction that was made before it?");
    step_free(&step);
    sequence_free(&b.model, &s);
    bench_close(&b);
}

Test(exercise_2, shower) {
    float theta[N_SITES * MOST_LAYERS];
    for (int i = 0; i < N_SITES * MOST_LAYERS; i++)
        theta[i] = 1;
    Bench b;
    bench_open(&b, G, N_TOKENS);
    const int n_prompt[] = {3, 9};
    for (int i = 0; i < 2; i++) {
        Sequence s = sequence_new((Noise){.seed = SEED, .theta = theta});
        feed(&b.run, &s, G_TOKENS, n_prompt[i], 0);
        feed(&b.run, &s, G_TOKENS + n_prompt[i], 16 - n_prompt[i], DRUGGED);
        expect_number("C", i, cold_shower(&b.run, &s), "Which is the first token that saw noise? All "
                      "that look back on it are dirty, too.");
        sequence_free(&b.model, &s);
    }
    bench_close(&b);
}
#endif

/* ------------------------------------------------------------------------------------------------
 * Changes: what each of them leaves alone.
 */
#if EXERCISE >= 3 && EXERCISE <= 9
// Sober stays sober; rows do not know of each other; the way back is that of the way forward. Sites
// that are not among the changed ones (a set) do what they did, to the last digits.
static void expect_the_rest(int changed) {
    expect_sober();
    for (int i = 0; i < N_JUDGED; i++) {
        const int site = JUDGED[i];
        expect_block(site);
        expect_gradient(site);
        expect_zeros_survive(site);
        if (!(changed >> site & 1))
            expect_golden(site);
    }
}

// Each seed, layer, head, reader and key has a glitch of its own, and one layer's dose is its own.
static inline void expect_places(int site) {
    Spot seed = HERE, layer = HERE, head = HERE, query = HERE, key = HERE;
    seed.seed++;
    layer.layer++;
    head.head++;
    query.query++;
    key.key++;
    expect_alike(site, HERE, HERE, "readings of the same");
    expect_different(site, HERE, seed, "seeds");
    expect_different(site, HERE, layer, "layers");
    expect_different(site, HERE, query, "positions of the reader");
    if (size_at(site) == HEAD_DIM)
        expect_different(site, HERE, head, "heads");
    if (site == SITE_K || site == SITE_V)
        expect_different(site, HERE, key, "positions of what is read");
    expect_own_dose(site);
}
#endif

#if EXERCISE == 3
Test(exercise_3, every_position_is_turned) {
    for (int i = 0; i < N_JUDGED; i++)
        expect_sink(JUDGED[i], 0);
}

// A shower has to know of the dirt, wherever it is.
Test(exercise_3, a_shower_still_cleans_everything) {
    static float logits[320];
    const size_t n = (size_t)N_TOKENS * KV_DIM;
    float theta[N_SITES * MOST_LAYERS];
    for (int i = 0; i < N_SITES * MOST_LAYERS; i++)
        theta[i] = 1;
    Bench b;
    bench_open(&b, G, N_TOKENS);
    Sequence sober = read_all(&b, (Noise){0}, 0, logits);
    Sequence s = read_all(&b, (Noise){.seed = SEED, .theta = theta}, DRUGGED, logits);
    cold_shower(&b.run, &s);
    for (int layer = 0; layer < G.n_layers; layer++)
        cr_expect(same(s.k[layer], sober.k[layer], n) && same(s.v[layer], sober.v[layer], n),
                  "CACHE: after a cold shower the cache of layer %d still has traces of noise: who "
                  "notes where the first dirty token stands?", layer);
    sequence_free(&b.model, &s);
    sequence_free(&b.model, &sober);
    bench_close(&b);
}

Test(exercise_3, all_else_is_as_it_was) {
    expect_the_rest(ALL_SITES);
    for (int i = 0; i < N_JUDGED; i++) {
        expect_places(JUDGED[i]);
        expect_length_kept(JUDGED[i]);
    }
}
#endif

#if EXERCISE == 4
static const Law NORMAL_LAWS[] = {
    {FAMILY_CENTRED, "centred", 0, 1, 0},
    {FAMILY_UPSTREAM, "upstream", 0, 1, .866},
};

Test(exercise_4, angles_are_normal) {
    static Angles a;
    int n_beyond[3] = {0}; // 1, 2 and 3 times theta
    const double share[3] = {.3173, .0455, .0027};
    for (int l = 0; l < 2; l++)
        expect_law(&NORMAL_LAWS[l]);
    draw_angles(&a, &NORMAL_LAWS[0], .3f, LONG, DRAWS);
    for (int i = 0; i < DRAWS; i++)
        for (int k = 0; k < 3; k++)
            n_beyond[k] += fabs(a.angle[i]) > k + 1;
    for (int k = 0; k < 3; k++) {
        double seen = (double)n_beyond[k] / DRAWS;
        double scatter = sqrt(share[k] / DRAWS);
        cr_expect(fabs(seen - share[k]) < 5 * scatter, // observed up to 1
                  "ANGLES: %.4f of them are beyond %d theta; of a normal law it is %.4f", seen, k + 1,
                  share[k]);
    }
}

Test(exercise_4, angles_know_nothing_of_the_direction) {
    for (int l = 0; l < 2; l++)
        expect_angles_know_nothing(&NORMAL_LAWS[l]);
}

Test(exercise_4, all_else_is_as_it_was) {
    expect_the_rest(ALL_SITES);
    for (int l = 0; l < 2; l++) {
        expect_lean(&NORMAL_LAWS[l]);
        expect_turn_backward(&NORMAL_LAWS[l]);
    }
    for (int i = 0; i < N_JUDGED; i++) {
        expect_places(JUDGED[i]);
        expect_length_kept(JUDGED[i]);
        expect_sink(JUDGED[i], 6);
    }
}
#endif

#if EXERCISE == 5
// What is added at A: its length, its cosine with x and with (1, ..., 1), and whether its length knows
// of its direction, for many seeds.
Test(exercise_5, a_push_of_so_many_lengths_of_x) {
    enum { SEEDS = 4000 };
    static double length[SEEDS];
    static float push[SEEDS][HEAD_DIM]; // of length 1
    const float dose = .8f;
    float x[DIM], sober[DIM], seen[DIM];
    double mean = 0, squares = 0, most = 0, cosine = 0, cosine2 = 0;
    Observer o;
    observer_open(&o);
    some_vector(14, x, DIM);
    see(&o, SITE_A, 0, HERE, x, sober);
    for (int seed = 0; seed < SEEDS; seed++) {
        Spot at = HERE;
        at.seed = (uint64_t)seed;
        see(&o, SITE_A, dose, at, x, seen);
        for (int i = 0; i < HEAD_DIM; i++)
            seen[i] -= sober[i];
        double whole = length_of(seen, HEAD_DIM);
        for (int i = 0; i < HEAD_DIM; i++)
            push[seed][i] = seen[i] / (float)whole;
        length[seed] = whole / length_of(sober, HEAD_DIM) / (double)dose;
        double along = dot_in_double(push[seed], sober, HEAD_DIM) / length_of(sober, HEAD_DIM);
        mean += length[seed] / SEEDS;
        squares += length[seed] * length[seed] / SEEDS;
        most = fmax(most, length[seed]);
        cosine += along / SEEDS;
        cosine2 += along * along / SEEDS;
    }
    observer_close(&o);
    double spread = sqrt(squares - mean * mean);
    cr_expect(fabs(mean - .5) < .03 && fabs(spread - .2887) < .02, // they scatter by .005
              "LENGTH: a push at A is %.3f theta |x| long on average, with a spread of %.3f; it should "
              "be .5 and .289, uniform in [0, theta |x|)", mean, spread);
    cr_expect(most < 1 + 1e-4, "LENGTH: a push at A is up to %.3f theta |x| long", most);
    cr_expect(fabs(cosine) < .03, // it scatters by .006
              "DIRECTIONS: pushes at A lean towards x: their mean cosine with it is %.3f", cosine);
    cr_expect(fabs(cosine2 - 1. / HEAD_DIM) < .02, // it scatters by .003
              "DIRECTIONS: a push should have any direction, along x too: the mean of its squared "
              "cosine with x is %.3f, and should be 1 / %d", cosine2, HEAD_DIM);
    for (int i = 0; i < HEAD_DIM; i++) {
        double with = 0, with_size = 0; // numbers of a push have a spread of 1 / sqrt(HEAD_DIM)
        for (int seed = 0; seed < SEEDS; seed++) {
            double deviation = (length[seed] - mean) / spread / SEEDS * sqrt(HEAD_DIM);
            with += deviation * (double)push[seed][i];
            with_size += deviation * fabs((double)push[seed][i]);
        }
        cr_expect(fabs(with) < .12 && fabs(with_size) < .12, // they scatter by .016
                  "LENGTH: a push's length and number %d of its direction come from the same draw: "
                  "their correlation is %.2f, that with its size %.2f", i, with, with_size);
    }
}

Test(exercise_5, as_its_family_draws) {
    enum { SEEDS = 1000 };
    float x[DIM], sober[DIM], seen[DIM], ones[DIM];
    double lean = 0;
    Observer o;
    observer_open(&o);
    o.family = FAMILY_UPSTREAM;
    some_vector(14, x, DIM);
    see(&o, SITE_A, 0, HERE, x, sober);
    for (int i = 0; i < DIM; i++)
        ones[i] = 1;
    for (int seed = 0; seed < SEEDS; seed++) {
        Spot at = HERE;
        at.seed = (uint64_t)seed;
        see(&o, SITE_A, 1, at, x, seen);
        for (int i = 0; i < HEAD_DIM; i++)
            seen[i] -= sober[i];
        lean += cos(angle_between(seen, ones, HEAD_DIM)) / SEEDS;
    }
    cr_expect(lean > .8, // observed .87; of a centred family it would be 0
              "DIRECTIONS: with -r upstream pushes have a cosine of %.2f with (1, ..., 1)", lean);
    observer_close(&o);
}

Test(exercise_5, all_else_is_as_it_was) {
    expect_the_rest(1 << SITE_A); // and its way back
    expect_length_ignored(SITE_A);
    expect_sink(SITE_A, 6);
    expect_places(SITE_A);
    expect_cache(SITE_A, false);
}
#endif

#if EXERCISE == 6
// Also where a query does not see the first keys, and with directions of the other kind.
Test(exercise_6, a_key_is_turned_before_rope) {
    expect_key_turned(false, 0, FAMILY_CENTRED);
    expect_key_turned(false, 5, FAMILY_CENTRED);
    expect_key_turned(false, 0, FAMILY_UPSTREAM);
    expect_length_kept(SITE_K);
}

Test(exercise_6, all_else_is_as_it_was) {
    expect_the_rest(1 << SITE_K); // and its way back
    expect_places(SITE_K);
    expect_sink(SITE_K, 6);
    expect_cache(SITE_K, false);
}
#endif

#if EXERCISE == 7
// The nearest, the farthest that can be asked, and where the first keys are out of sight.
Test(exercise_7, a_position_does_not_matter) {
    Spot next = HERE, last = HERE, first = HERE;
    next.query++;
    last.query = MOST_KEYS - 1;
    first.query = 6;
    first.key = 6;
    for (int i = 0; i < N_JUDGED; i++) {
        expect_alike(JUDGED[i], HERE, next, "positions of the reader");
        expect_alike(JUDGED[i], HERE, last, "positions of the reader, far apart,");
        Spot same_key = last;
        same_key.key = 6;
        expect_alike(JUDGED[i], first, same_key, "positions of the reader, far apart,");
    }
    Observer o;
    observer_open(&o);
    o.bench.model.config.sliding_window = 6;
    for (int i = 0; i < N_JUDGED; i++)
        cr_expect(difference(&o, JUDGED[i], HERE, next) < 1e-5,
                  "PLACE: at site %c two positions of the reader get different glitches if there is a "
                  "sliding window", SITES[JUDGED[i]]);
    observer_close(&o);
}

Test(exercise_7, all_else_still_does) {
    Spot seed = HERE, layer = HERE, head = HERE, key = HERE;
    seed.seed++;
    layer.layer++;
    head.head++;
    key.key++;
    for (int i = 0; i < N_JUDGED; i++) {
        expect_different(JUDGED[i], HERE, seed, "seeds");
        expect_different(JUDGED[i], HERE, layer, "layers");
        if (JUDGED[i] != SITE_H)
            expect_different(JUDGED[i], HERE, head, "heads");
    }
    expect_different(SITE_K, HERE, key, "positions of the key");
    expect_different(SITE_V, HERE, key, "positions of the value");
}

Test(exercise_7, all_else_is_as_it_was) {
    expect_the_rest(ALL_SITES);
    for (int i = 0; i < N_JUDGED; i++) {
        expect_own_dose(JUDGED[i]);
        expect_sink(JUDGED[i], 6);
        expect_length_kept(JUDGED[i]);
    }
}
#endif

#if EXERCISE == 8
Test(exercise_8, it_has_a_letter) {
    cr_expect(SITES[SITE_M] == 'M', "SITES has '%c' where SITE_M is", SITES[SITE_M]);
    cr_expect(strstr(NOISE_OPTIONS, "M:"), "-M <theta> is no option: see NOISE_OPTIONS");
}

// It turns what the feed-forward half adds, by theta / 2 on average.
Test(exercise_8, it_turns_what_is_added) {
    enum { SEEDS = 400 };
    float x[DIM], sober[DIM], seen[DIM];
    double mean = 0;
    Observer o;
    observer_open(&o);
    some_vector(15, x, DIM);
    see(&o, SITE_M, 0, HERE, x, sober);
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        Spot at = HERE;
        at.seed = seed;
        see(&o, SITE_M, 1, at, x, seen);
        mean += angle_between(sober, seen, DIM) / SEEDS;
    }
    cr_expect(fabs(mean - .5) < .07, // it scatters by .015
              "ANGLES: with a dose of 1, what the FFN adds to the residual stream is turned by %.3f on "
              "average; it should be .5", mean);
    observer_close(&o);
    expect_length_kept(SITE_M);
}

Test(exercise_8, its_place) {
    expect_places(SITE_M);
    expect_sink(SITE_M, 6);
    expect_cache(SITE_M, false);
    expect_block(SITE_M);
}

Test(exercise_8, its_way_back) {
    expect_gradient(SITE_M);
    expect_zeros_survive(SITE_M);
}

Test(exercise_8, all_else_is_as_it_was) {
    expect_the_rest(0);
}
#endif

#if EXERCISE == 9
// The mean cosine of the angles that a dose draws, by adding up.
static double mean_cosine(double theta) {
    enum { STEPS = 1000 };
    double sum = 0;
    for (int i = 0; i < STEPS; i++)
        sum += cos((i + .5) / STEPS * theta) / STEPS;
    return sum;
}

Test(exercise_9, a_key_shrinks_to_its_mean) {
    const float doses[] = {.3f, 1, 2, 4};
    float x[DIM], mean[DIM], seen[DIM];
    Observer o;
    observer_open(&o);
    some_vector(16, x, DIM);
    for (int k = 0; k < 4; k++) {
        double want = mean_cosine((double)doses[k]);
        for (int i = 0; i < HEAD_DIM; i++)
            mean[i] = x[i] * (float)want;
        see(&o, SITE_K, doses[k], HERE, x, seen);
        double along = dot_in_double(seen, x, HEAD_DIM) / dot_in_double(x, x, HEAD_DIM);
        cr_expect(distance(mean, seen) < 1e-5, // observed 2e-6
                  "MEAN: with a dose of %.1f a key is read %.4f times as long, %.3f off its direction; "
                  "the mean of all that K noise could make of it is another vector",
                  (double)doses[k], along, angle_between(x, seen, HEAD_DIM));
    }
    observer_close(&o);
}

Test(exercise_9, without_luck) {
    Spot seed = HERE, query = HERE, key = HERE;
    seed.seed++;
    query.query++;
    key.key++;
    expect_alike(SITE_K, HERE, seed, "seeds");
    expect_alike(SITE_K, HERE, query, "readers of the same key");
    expect_alike(SITE_K, HERE, key, "positions of the key");
}

Test(exercise_9, all_else_is_as_it_was) {
    expect_the_rest(1 << SITE_K); // and its way back
    expect_own_dose(SITE_K);
    expect_sink(SITE_K, 6);
    expect_cache(SITE_K, false);
}
#endif

#if EXERCISE == 10
static void scale(float *x, ptrdiff_t n, float by) {
    for (ptrdiff_t i = 0; i < n; i++)
        x[i] *= by;
}

// The gradient of every tensor, times `by`: one factor of each, and the gains.
static void scale_gradient(Step *s, float by) {
    const Config *c = &s->model->config;
    const ptrdiff_t n_rows = s->n_rows;
    for (int layer = 0; layer < c->n_layers; layer++) {
        Slot *g = &s->grads.slots[layer];
        scale(g->q, n_rows * c->q_dim, by);
        scale(g->k, n_rows * c->kv_dim, by);
        scale(g->v, n_rows * c->kv_dim, by);
        scale(g->xm, n_rows * c->dim, by);
        scale(g->gate, n_rows * c->hidden_dim, by);
        scale(g->up, n_rows * c->hidden_dim, by);
        scale(s->grads.slots[layer + 1].x, n_rows * c->dim, by);
    }
    scale(s->vocab_dy, (ptrdiff_t)(s->n_loss + s->n_inputs) * c->vocab_size, by);
    scale(s->dgains, (2 * c->n_layers + 1) * (ptrdiff_t)c->dim, by);
}

// Whether a tensor (n) moved by so many rates, downhill. Adam moves all of its weights alike.
static void expect_move(const char *name, const float *gradient, const float *before,
                        const float *after, int n, float rate, double want, const char *hint) {
    double mean = 0, off = 0;
    int n_counted = 0;
    bool finite = true;
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < n; i++) {
            double down = ((double)before[i] - (double)after[i]) / (double)rate;
            finite = finite && isfinite(after[i]);
            if (fabsf(gradient[i]) < 1e-4f) // then Adam's eps of 1e-8 may show
                continue;
            down = gradient[i] < 0 ? -down : down;
            n_counted += !pass;
            mean += pass ? 0 : down;
            off = pass ? fmax(off, fabs(down - mean / n_counted)) : 0;
        }
    mean /= n_counted;
    cr_expect(finite, "ADAM: after it some weights of %s are no numbers: what if a gradient is 0?", name);
    cr_expect(fabs(mean - want) < 5e-4 && off < .01, // observed 3e-5 and 3e-4
              "ADAM: %s moves by %.4f rates on average, single weights up to %.4f off that, and "
              "should move by %.4f: %s", name, mean, off, want, hint);
}

// descend is called n_steps times, with a gradient that is history[0], history[1], ... times that of
// a lesson. want: how far it should move all weights the last time, in rates, downhill as seen from
// the lesson's own gradient.
static void expect_moves(const float *history, int n_steps, double want, const char *hint) {
    const float rate = .001f;
    int layer, which, n_out, n_in;
    Bench b;
    Step step;
    bench_open(&b, M, 1);
    file = (void *)b.file.data;
    file_bytes = b.file.n;
    Sequence s = sequence_new((Noise){0});
    step_init(&step, &b.model, N_TOKENS);
    step_add(&step, &s, M_TOKENS, N_TOKENS, 0);
    step_take(&step);
    char *gradients = resize(NULL, (ptrdiff_t)file_bytes, 1); // each where its tensor is in the file
    char *before = resize(NULL, (ptrdiff_t)file_bytes, 1);
    for (int i = 0; tensor_at(&b.model.config, i, &layer, &which); i++) {
        tensor_shape(&b.model.config, which, &n_out, &n_in);
        ptrdiff_t at = (const char *)b.model.layers[layer].w[which].data - b.file.data;
        add_gradient(&step, (float *)(void *)(gradients + at), 1, layer, which, 0, n_out);
    }
    for (int i = 0; i < n_steps; i++) {
        scale_gradient(&step, history[i] / (i ? history[i - 1] : 1));
        memcpy(before, b.file.data, b.file.n);
        descend(&step, rate);
    }
    for (int i = 0; tensor_at(&b.model.config, i, &layer, &which); i++) {
        tensor_shape(&b.model.config, which, &n_out, &n_in);
        const float *w = b.model.layers[layer].w[which].data;
        ptrdiff_t at = (const char *)w - b.file.data;
        expect_move(TENSOR_NAMES[which], (float *)(void *)(gradients + at),
                    (float *)(void *)(before + at), w, n_out * n_in, rate, want, hint);
    }
    free(gradients);
    free(before);
    step_free(&step);
    sequence_free(&b.model, &s);
    bench_close(&b);
}

// With the constants of the paper: .9, .999 and 1e-8. The numbers are worked out by hand. Each test
// is a process of its own, so what descend remembers begins anew.
Test(exercise_10, the_first_step) {
    expect_moves((float[]){1}, 1, 1, "the first step goes one rate far, whatever the gradient's size: "
                 "is the bias of the averages, which begin at 0, corrected?");
}

Test(exercise_10, a_large_gradient) {
    expect_moves((float[]){100}, 1, 1, "a gradient a hundred times as large makes the very same step");
}

Test(exercise_10, a_gradient_that_stays) {
    expect_moves((float[]){1, 1, 1, 1}, 4, 1, "a gradient that never changes is followed one rate a "
                 "step");
}

Test(exercise_10, a_gradient_that_turns_round) {
    expect_moves((float[]){1, -1}, 2, -.05263, "a gradient that turns round is hardly followed: .9 of "
                 "what was, .1 of what is");
}

Test(exercise_10, a_gradient_that_grows) {
    expect_moves((float[]){1, 10}, 2, .8071, "of the square, .999 of what was and .001 of what is, and "
                 "then the root");
}
#endif

#if EXERCISE == 11
// The model after a step, its weights written.
static void write_step(const Step *s, float step_size) {
    int layer, which, n_out, n_in;
    for (int i = 0; tensor_at(&s->model->config, i, &layer, &which); i++) {
        tensor_shape(&s->model->config, which, &n_out, &n_in);
        float *w = (float *)(uintptr_t)s->model->layers[layer].w[which].data; // of a bench: may be written
        add_gradient(s, w, -step_size, layer, which, 0, n_out);
    }
}

// The first step is taken twice: virtually by `one`, and really in the weights of `other`. Then the
// same lesson is read again by both.
static void expect_second_step(FileHeader header, const int *tokens, int sites, float step_size) {
    Bench one, other;
    Step first, real, virtual;
    Stepped stepped;
    bench_open(&one, header, 1);
    bench_open(&other, header, 1);
    Noise noise = bench_noise(&one, sites, FAMILY_CENTRED);
    Sequence a = sequence_new(noise), b = sequence_new(noise), c = sequence_new(noise);

    step_init(&first, &other.model, N_TOKENS);
    step_add(&first, &a, tokens, N_TOKENS, DRUGGED);
    step_take(&first);
    write_step(&first, step_size);
    step_init(&real, &other.model, N_TOKENS);
    step_add(&real, &b, tokens, N_TOKENS, DRUGGED);
    step_take(&real);

    sequence_free(&one.model, &a);
    a = sequence_new(noise);
    Step again;
    step_init(&again, &one.model, N_TOKENS);
    step_add(&again, &a, tokens, N_TOKENS, DRUGGED);
    step_take(&again);
    stepped_init(&stepped, &again, N_TOKENS);
    step_init(&virtual, &one.model, N_TOKENS);
    virtual.acts.hook = stepped_hook;
    virtual.acts.owner = &stepped;
    c.step_size = step_size;
    step_add(&virtual, &c, tokens, N_TOKENS, DRUGGED);
    step_take(&virtual);

    cr_expect(fabs(virtual.loss / real.loss - 1) < 1e-6, // observed 5e-8
              "LOSS: after the first step it is %.6f with its weights written and %.6f with the hook",
              real.loss, virtual.loss);
    int layer, which, n;
    for (int i = 0; tensor_at(&one.model.config, i, &layer, &which); i++) {
        float *want = gradient_of(&real, layer, which, &n);
        float *got = gradient_of(&virtual, layer, which, &n);
        for (int j = 0; j < n; j++)
            got[j] -= want[j];
        double off = length_of(got, n) / length_of(want, n);
        cr_expect(off < 2e-5, // observed 3e-6
                  "BACKWARD: %s: the second gradient of %s, layer %d, is off by %.2g of its length: did it "
                  "come back through weights, and gains, that have no step in them?",
                  site_letters(sites), TENSOR_NAMES[which], layer, off);
        free(want);
        free(got);
    }
    step_free(&first);
    step_free(&real);
    step_free(&again);
    step_free(&virtual);
    stepped_free(&stepped);
    sequence_free(&one.model, &a);
    sequence_free(&other.model, &b);
    sequence_free(&one.model, &c);
    bench_close(&one);
    bench_close(&other);
}

Test(exercise_11, shared_classifier) {
    expect_second_step(G, G_TOKENS, 0, .1f);
}

Test(exercise_11, classifier_of_its_own) {
    expect_second_step(M, M_TOKENS, 0, .05f);
}

Test(exercise_11, drugged) {
    expect_second_step(G, G_TOKENS, GOLDEN_SITES, .1f);
}

Test(exercise_11, all_else_is_as_it_was) {
    for (int i = 0; i < N_JUDGED; i++)
        expect_gradient(JUDGED[i]);
}
#endif

#if EXERCISE == 12
// What explore says at its end about a site: nats a token that the sober model finds a text likelier
// than one of the same diversity that temperature made.
static double nats_of(const char *site, const char *shape, int first_seed, int *n_doses) {
    char command[1000], line[1000];
    double nats = NAN;
    *n_doses = 0;
    snprintf(command, sizeof command, "tests/lab tests/hamlet.bin explore -i 'To be' -n 64 -k 20 -s %d "
             "-%s '1%s%s' 2> /dev/null", first_seed, site, *shape ? "@" : "", shape);
    FILE *lines = popen(command, "r");
    cr_assert(lines);
    bool at_end = false;
    while (fgets(line, sizeof line, lines)) {
        at_end |= !strncmp(line, "At the same diversity", 21);
        if (at_end && line[0] == *site && line[1] == ' ')
            sscanf(line + 1, "%lf (%d", &nats, n_doses);
    }
    cr_assert(pclose(lines) == 0, "this does not run: %s", command);
    cr_assert(*n_doses >= 2, "with the shape \"%s\" fewer than two doses at %s reach the diversity of "
              "temperature: too weak to compare", shape, site);
    return nats;
}

// The claim, on seeds that nobody has looked at.
Test(exercise_12, the_claim_holds_for_other_seeds) {
    const char *site = getenv("A");
    const char *shape = getenv("B");
    cr_assert(site && shape && strlen(site) == 1 && strchr(SITES, *site) && !strpbrk(shape, "'\\"),
              "what do you claim? make exercise N=12 A=V B=\"ceil:0=0,.1=1\"");
    for (int i = 1; i <= 3; i++) {
        int n_everywhere, n_shaped;
        double everywhere = nats_of(site, "", 10000 * i, &n_everywhere);
        double shaped = nats_of(site, shape, 10000 * i, &n_shaped);
        cr_assert(n_shaped == n_everywhere, "seeds %d to %d: with your shape %d doses reach the diversity "
                  "of temperature, everywhere %d: that cannot be compared", 10000 * i, 10000 * i + 19,
                  n_shaped, n_everywhere);
        cr_expect(shaped > everywhere, "seeds %d to %d: %s costs %.3f nats with your shape, and %.3f "
                  "everywhere", 10000 * i, 10000 * i + 19, site, -shaped, -everywhere);
    }
}
#endif
