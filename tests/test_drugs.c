/* test_drugs.c - what drugs.c promises about its numbers, its noise, its showers and its tokens.
 *
 * Errors are relative to the largest value of a row. "observed" is the worst that gcc and clang
 * gave, with AVX-512 or with plain SSE2; the bound beside it leaves room for other machines and
 * none for a wrong formula.
 */
#include "testing.h"
#include "golden.h"

enum { N = N_TOKENS, MOST_VOCAB = 320 };

// Reads n tokens more, in blocks, drugged if the sequence has doses. logits: (n, vocab_size).
static void read_on(Bench *b, Sequence *s, const int *tokens, int n, int block, float *logits) {
    const size_t vocab_size = (size_t)b->model.config.vocab_size;
    for (int done = 0; done < n;) {
        Row rows[64];
        int n_rows = n - done < block ? n - done : block;
        for (int r = 0; r < n_rows; r++)
            rows[r] = (Row){tokens[done + r], s->length + r, s, s->noise.theta, true, NULL};
        forward(&b->model, &b->run, rows, n_rows);
        for (int r = 0; r < n_rows; r++)
            memcpy(logits + (size_t)(done + r) * vocab_size, rows[r].logits, vocab_size * 4);
        done += n_rows;
    }
}

static bool same(const float *a, const float *b, size_t n) { return !memcmp(a, b, n * sizeof *a); }

static bool same_cache(const Bench *b, const Sequence *x, const Sequence *y) {
    const size_t n = (size_t)x->length * (size_t)b->model.config.kv_dim;
    bool ok = x->length == y->length;
    for (int l = 0; ok && l < b->model.config.n_layers; l++)
        ok = same(x->k[l], y->k[l], n) && same(x->v[l], y->v[l], n);
    return ok;
}

// ---- the forward pass against an independent reference

static void check_rows(const Bench *b, const float *logits, const GoldenRow *golden, int first,
                       int n_rows, int dosed) {
    const int n = b->model.config.vocab_size;
    for (int r = first; r < first + n_rows; r++, golden++) {
        const float *z = logits + (size_t)r * (size_t)n;
        double max = 0, worst = 0, squares = 0;
        for (int t = 0; t < n; t++) {
            max = fmax(max, fabs((double)z[t]));
            squares += (double)z[t] * (double)z[t];
        }
        for (int j = 0; j < N_ENTRIES; j++) {
            double value = (double)z[(37 * r + 53 * j + 11) % n];
            worst = fmax(worst, fabs(value - golden->entry[j]) / max);
        }
        worst = fmax(worst, fabs(sqrt(squares) / golden->norm - 1));
        cr_assert(worst < 1e-5, "noise %d row %d: %g", dosed, r, worst); // observed 9e-7
    }
}

static void check_model(FileHeader h, const int *tokens, const GoldenRow *sober,
                        const GoldenRow (*drugged)[N_DRUGGED], double loss, double loss_drugged) {
    static float logits[N * MOST_VOCAB];
    for (int i = -1; i < N_DOSED; i++) {
        Bench b;
        bench_open(&b, h, N);
        Noise noise = {0};
        if (i >= 0) noise = noise_of(&b, i < N_SITES ? 1 << i : ALL_SITES, i == N_DOSED - 1);
        Sequence s = sequence_new(noise);
        read_on(&b, &s, tokens, N, N, logits);
        check_rows(&b, logits, sober, 0, i < 0 ? N : SINK, i);
        if (i >= 0) check_rows(&b, logits, drugged[i], SINK, N_DRUGGED, i);

        double surprise = 0; // mean cross-entropy, for the sober model and for all five sites
        for (int r = 0; r < N - 1; r++) {
            const float *z = logits + r * b.model.config.vocab_size;
            double sum = 0;
            for (int t = 0; t < b.model.config.vocab_size; t++) sum += exp((double)z[t]);
            surprise += (log(sum) - (double)z[tokens[r + 1]]) / (N - 1);
        }
        double want = i < 0 ? loss : i == N_SITES ? loss_drugged : surprise;
        cr_assert(fabs(surprise / want - 1) < 1e-6, "loss %g, %g", surprise, want); // 6e-8
        sequence_free(&b.model, &s);
        bench_close(&b);
    }
}

// Logits and loss are those of an independent float64 implementation, sober and under each noise,
// with grouped queries and a shared classifier, and with a window and odd sizes.
Test(forward, agrees_with_the_reference) {
    check_model(G, G_TOKENS, G_SOBER, G_DRUGGED, G_LOSS, G_LOSS_ALL);
    check_model(M, M_TOKENS, M_SOBER, M_DRUGGED, M_LOSS, M_LOSS_ALL);
}

// ---- the bitwise promise

// However a text is cut into blocks, logits and caches are the same to the last bit; also when the
// activations of all layers are kept, as training does.
Test(bitwise, blocks_of_every_size) {
    static float one_by_one[N * MOST_VOCAB], logits[N * MOST_VOCAB];
    for (int i = 0; i < 4; i++) { // both models, sober and with all sites dosed
        const int *tokens = i % 2 ? M_TOKENS : G_TOKENS;
        Bench b;
        bench_open(&b, i % 2 ? M : G, N);
        Noise noise = noise_of(&b, i < 2 ? 0 : ALL_SITES, FAMILY_CENTRED);
        Sequence a = sequence_new(noise);
        read_on(&b, &a, tokens, N, 1, one_by_one);
        for (int block = 2; block <= N; block += block < 9 ? 1 : N - 9) {
            if (block == N) {
                run_free(&b.run);
                run_init(&b.run, &b.model, N, b.model.config.n_layers + 1);
            }
            Sequence s = sequence_new(noise);
            read_on(&b, &s, tokens, N, block, logits);
            cr_assert(same(logits, one_by_one, N * (size_t)b.model.config.vocab_size), "%d", block);
            cr_assert(same_cache(&b, &a, &s), "%d", block);
            const size_t n_cache = N * (size_t)b.model.config.kv_dim;
            for (int l = 0; l < b.model.config.n_layers && block == N; l++)
                cr_assert(same(b.run.slots[l].k, s.k[l], n_cache)); // each layer has its own slot
            sequence_free(&b.model, &s);
        }
        sequence_free(&b.model, &a);
        bench_close(&b);
    }
}

// A sequence does not notice seven others in its rows, which began earlier or later, have other
// tokens and seeds, and are sober in part.
Test(bitwise, beside_seven_other_sequences) {
    static float alone[N * MOST_VOCAB];
    for (int i = 0; i < 4; i++) {
        const int *tokens = i % 2 ? M_TOKENS : G_TOKENS;
        Bench b;
        bench_open(&b, i % 2 ? M : G, N);
        const size_t vocab_size = (size_t)b.model.config.vocab_size;
        Noise noise = noise_of(&b, i < 2 ? 0 : ALL_SITES, FAMILY_CENTRED);
        Noise other = noise_of(&b, ALL_SITES - 1, FAMILY_UPSTREAM);
        Sequence a = sequence_new(noise), s[8];
        read_on(&b, &a, tokens, N, N, alone);
        for (int k = 0; k < 8; k++) {
            s[k] = sequence_new(k == 3 ? noise : other);
            s[k].noise.seed += k == 3 ? 0 : (uint64_t)k;
        }
        for (int step = 0; step < N + 3; step++) { // sequence k joins in at step k
            Row rows[8];
            int n_rows = 0, mine = -1;
            for (int k = 0; k < 8 && k <= step; k++) {
                int token = (tokens[step % N] * 7 + k) % (int)vocab_size;
                if (k == 3) token = tokens[mine = step - 3], mine = n_rows;
                rows[n_rows++] = (Row){token, step - k, &s[k], k == 3 || k % 2, k != 1, NULL};
            }
            forward(&b.model, &b.run, rows, n_rows);
            const float *want = alone + (size_t)(step - 3) * vocab_size;
            if (mine >= 0) cr_assert(same(rows[mine].logits, want, vocab_size), "step %d", step);
            cr_assert(step < 1 || !rows[1].logits); // it did not ask for any
        }
        cr_assert(same_cache(&b, &a, &s[3]));
        for (int k = 0; k < 8; k++) sequence_free(&b.model, &s[k]);
        sequence_free(&b.model, &a);
        bench_close(&b);
    }
}

// One thread or five, one row or a block large enough to be shared out: the same bits.
Test(bitwise, any_number_of_threads) {
    static float one_by_one[64 * MOST_VOCAB], logits[64 * MOST_VOCAB];
    int tokens[64];
    Bench b;
    bench_open(&b, BIG, 64);
    const Config *c = &b.model.config;
    for (int i = 0; i < 64; i++) tokens[i] = (i * 29 + 7) % c->vocab_size;
    cr_assert(64 * c->q_dim * 64 > WORTH_THREADS); // or threads would stay asleep
    for (int drugged = 0; drugged < 2; drugged++) {
        Sequence a = sequence_new(noise_of(&b, drugged ? ALL_SITES : 0, FAMILY_CENTRED));
        read_on(&b, &a, tokens, 64, 1, one_by_one);
        for (int i = 0; i < 3; i++) {
            Sequence s = sequence_new(a.noise);
#ifdef _OPENMP
            omp_set_num_threads((int[]){1, 2, 5}[i]);
#endif
            read_on(&b, &s, tokens, 64, 64, logits);
            cr_assert(same(logits, one_by_one, 64 * (size_t)c->vocab_size));
            cr_assert(same_cache(&b, &a, &s));
            sequence_free(&b.model, &s);
        }
        sequence_free(&b.model, &a);
    }
    bench_close(&b);
}

// ---- the maths

// The kernel's sums are right for every remainder of 8 floats, 4 rows and 4 outputs, and each
// element has the bits that it has alone.
Test(maths, kernel) {
    const int ins[] = {1, 2, 3, 7, 8, 9, 15, 16, 31, 52, 64, 129};
    const int outs[] = {1, 2, 3, 4, 5, 7, 8, 13};
    for (int i = 0; i < 12 * 8 * 10; i++) {
        int n_in = ins[i % 12], n_out = outs[i / 12 % 8], n_rows = i / 96 + 1;
        float *x = resize(NULL, n_rows * n_in, sizeof *x);
        float *w = resize(NULL, n_out * n_in, sizeof *w);
        float *y = resize(NULL, n_rows * n_out, sizeof *y), alone[13], single;
        for (int j = 0; j < n_rows * n_in; j++) x[j] = unit(1, (uint64_t)j) - .5f;
        for (int j = 0; j < n_out * n_in; j++) w[j] = unit(2, (uint64_t)j) - .5f;
        matmul(y, x, w, n_rows, n_in, n_out);
        for (int r = 0; r < n_rows; r++) {
            dots(alone, x + r * n_in, w, (size_t)n_in, n_in, n_out);
            cr_assert(same(alone, y + r * n_out, (size_t)n_out), "%d %d %d", n_rows, n_in, n_out);
            for (int o = 0; o < n_out; o++) {
                double sum = 0, size = 0;
                for (int j = 0; j < n_in; j++) {
                    double product = (double)x[r * n_in + j] * (double)w[o * n_in + j];
                    sum += product;
                    size += fabs(product);
                }
                double error = fabs((double)y[r * n_out + o] - sum) / size;
                cr_assert(error < 1e-6, "%d %d %d: %g", n_rows, n_in, n_out, error); // 1e-7
                dots(&single, x + r * n_in, w + o * n_in, 0, n_in, 1);
                cr_assert(same(&single, &alone[o], 1));
            }
        }
        free(x);
        free(w);
        free(y);
    }
}

// Softmax is right to single precision in every element, from the likeliest down to e^-60, at every
// length, and does not mind numbers whose exp would overflow.
Test(maths, softmax) {
    float x[20], y[20];
    for (int n = 1; n <= 20; n++) {
        double sum = 0;
        for (int i = 0; i < n; i++) {
            x[i] = y[i] = 2000 - 120 * unit(1, (uint64_t)(20 * n + i));
            sum += exp(((double)x[i] - 2000) / 2);
        }
        softmax(y, n, .5f);
        for (int i = 0; i < n; i++) {
            double error = fabs((double)y[i] / (exp(((double)x[i] - 2000) / 2) / sum) - 1);
            cr_assert(error < 1e-5, "%d of %d: %g", i, n, error); // 2e-7
        }
    }
}

// ---- the noise

// The generator is the documented one: these values were computed from the description in Python;
// the first two are well-known outputs of splitmix64.
Test(noise, generator) {
    const struct { uint64_t key; uint32_t j, bits; } draws[] = {
        {0, 0, 0}, {0, 1, 0xc46310}, {1, 0, 0x6d3fa}, {1ull << 32, 0, 0xd35b8b}, {420, 1, 0x364567},
        {0xdeadbeefcafef00d, 0, 0x8df90b}, {0xdeadbeefcafef00d, 4096, 0xdd5171},
        {UINT64_MAX, UINT32_MAX, 0xba3e55}};
    cr_assert_eq(within(1234567, 0), 6457827717110365317u);
    cr_assert_eq(within(1234567, 1), 3203168211198807973u);
    for (int i = 0; i < 8; i++)
        cr_assert_eq(uniform(draws[i].key, draws[i].j), (float)draws[i].bits * 0x1p-24f, "%d", i);
    Sequence s = sequence_new((Noise){.seed = 420});
    Row row = {.position = 17, .sequence = &s};
    cr_assert_eq(within(place_of(&row, SITE_K, 11, 3), 9), 0xd948a38d34ba32c3u);
}

static double dot_in_double(const float *a, const float *b, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

// A glitch keeps the length of a vector and turns it by theta * U(0), half of theta on average.
Test(noise, turns_by_the_angle_it_draws) {
    const int sizes[] = {8, 10, 16, 64, 333};
    double sum = 0, worst_length = 0, worst_angle = 0;
    for (uint64_t i = 0; i < 20000; i++) {
        const int n = sizes[i % 5];
        const float theta = i % 2 ? .3f : 3.1f;
        const Noise noise = {.family = i % 4 < 2 ? FAMILY_CENTRED : FAMILY_UPSTREAM};
        float x[333], u[333], r[333];
        for (int j = 0; j < n; j++) x[j] = 8 * unit(i, (uint64_t)j) - 3;
        Mix mix = glitch(&noise, mix64(i), theta, x, n, u);
        for (int j = 0; j < n; j++) r[j] = x[j] * mix.x + u[j] * mix.u;
        double xx = dot_in_double(x, x, n), rr = dot_in_double(r, r, n);
        double angle = acos(fmin(1, dot_in_double(r, x, n) / sqrt(xx * rr)));
        double drawn = (double)theta * (double)uniform(mix64(i), 0);
        worst_length = fmax(worst_length, fabs(sqrt(rr / xx) - 1));
        // acos is steep near 1: an error e of the cosine is one of e / sin(a) in the angle
        worst_angle = fmax(worst_angle, fabs(angle - drawn) * sin(drawn));
        sum += angle / (double)theta;
    }
    cr_assert(worst_length < 1e-5, "%g", worst_length); // observed 5e-7
    cr_assert(worst_angle < 1e-5, "%g", worst_angle);   // 3e-7
    cr_assert_float_eq(sum / 20000, .5, .01);           // scatters by .002
}

// Centred directions prefer none. The original's lean towards (1, ..., 1): they have a cosine of
// sqrt(3)/2 with it and .75 with each other.
Test(noise, families) {
    enum { DIM = 256, DRAWS = 2000 };
    const float ones[DIM] = {[0 ... DIM - 1] = 1};
    for (int family = 0; family < 2; family++) {
        float u[2][DIM], x[DIM];
        double with_ones = 0, with_last = 0;
        memcpy(x, ones, sizeof x);
        for (uint64_t i = 0; i < DRAWS; i++) {
            float *now_u = u[i % 2], *last = u[(i + 1) % 2];
            glitch(&(Noise){.family = family}, mix64(i), 1, x, DIM, now_u);
            double uu = dot_in_double(now_u, now_u, DIM);
            with_ones += dot_in_double(now_u, ones, DIM) / sqrt(uu * DIM) / DRAWS;
            if (i) with_last += dot_in_double(now_u, last, DIM)
                              / sqrt(uu * dot_in_double(last, last, DIM)) / (DRAWS - 1);
        }
        // one draw scatters by .06 or less, so the mean of 2000 by .0014
        cr_assert_float_eq(with_ones, family ? sqrt(.75) : 0, .006, "%g", with_ones);
        cr_assert_float_eq(with_last, family ? .75 : 0, .006, "%g", with_last);
    }
}

// A vector of zeros has no direction to turn from, and stays.
Test(noise, zero_stays_zero) {
    float x[10] = {0}, u[10];
    Mix mix = glitch(&(Noise){0}, 1, 1, x, 10, u);
    cr_assert(mix.x == 1 && mix.u == 0);
}

// No dose, no change: with every theta 0 all bits are those of the sober model. The same holds for
// the first six positions at any dose, because the attention sink is left alone.
Test(noise, none_without_a_dose_or_in_the_sink) {
    static float sober[N * MOST_VOCAB], logits[N * MOST_VOCAB];
    Bench b;
    bench_open(&b, G, N);
    for (int i = 0; i < 2; i++) {
        const int n = i ? SINK : N;
        float theta[N_SITES * 3];
        for (int j = 0; j < N_SITES * 3; j++) theta[j] = i ? 3 : 0;
        Sequence a = sequence_new((Noise){0}), s = sequence_new((Noise){.theta = theta});
        read_on(&b, &a, G_TOKENS, n, n, sober);
        read_on(&b, &s, G_TOKENS, n, n, logits);
        cr_assert(same(logits, sober, (size_t)(n * G.vocab_size)));
        cr_assert(same_cache(&b, &a, &s));
        feed(&b.model, &b.run, &a, G_TOKENS, 8, n, true, false); // drugged, but with nothing
        cr_assert_eq(cold_shower(&b.model, &b.run, &a), 0);
        sequence_free(&b.model, &a);
        sequence_free(&b.model, &s);
    }
    bench_close(&b);
}

// A glitch in layer 1 changes nothing before it. H enters the cache of its own layer; K and V are
// turned on reading only, Q and A behind it, so these four show in the layer above first.
Test(noise, each_site_changes_what_comes_after_it) {
    static float sober[N * MOST_VOCAB], logits[N * MOST_VOCAB];
    Bench b;
    bench_open(&b, G, N);
    const size_t kv_dim = (size_t)b.model.config.kv_dim;
    Sequence a = sequence_new((Noise){0});
    read_on(&b, &a, G_TOKENS, N, N, sober);
    for (int site = 0; site < N_SITES; site++) {
        float theta[N_SITES * 3] = {0};
        theta[site * 3 + 1] = .5f;
        Sequence s = sequence_new((Noise){.seed = SEED, .theta = theta});
        read_on(&b, &s, G_TOKENS, N, 4, logits);
        for (size_t r = 0; r < N; r++) {
            for (int l = 0; l < 3; l++) {
                bool as_before = r < SINK || l < 1 || (l == 1 && site != SITE_H);
                cr_assert_eq(same(s.k[l] + r * kv_dim, a.k[l] + r * kv_dim, kv_dim), as_before);
                cr_assert_eq(same(s.v[l] + r * kv_dim, a.v[l] + r * kv_dim, kv_dim), as_before);
            }
            cr_assert_eq(same(logits + r * G.vocab_size, sober + r * G.vocab_size, G.vocab_size),
                         r < SINK, "site %d row %zu", site, r);
        }
        sequence_free(&b.model, &s);
    }
    sequence_free(&b.model, &a);
    bench_close(&b);
}

// Writes n tokens behind a sober prompt, always the most probable one, as drugs does.
static void write_on(Bench *b, Sequence *s, int n, int *tokens, float *logits) {
    const float *z = feed(&b->model, &b->run, s, G_TOKENS, N, 0, false, true);
    for (int i = 0; i < n; i++) {
        tokens[i] = argmax(z, b->model.config.vocab_size);
        z = feed(&b->model, &b->run, s, &tokens[i], 1, s->length, true, true);
    }
    memcpy(logits, z, (size_t)b->model.config.vocab_size * sizeof *z);
}

// The same seed writes the same text and ends with the same logits; another seed and the other
// family do not.
Test(noise, repeats_itself) {
    static float logits[4][MOST_VOCAB];
    int tokens[4][30];
    Bench b;
    bench_open(&b, G, N);
    for (int i = 0; i < 4; i++) {
        Sequence s = sequence_new(noise_of(&b, ALL_SITES, FAMILY_CENTRED));
        if (i == 2) s.noise.seed++;
        if (i == 3) s.noise.family = FAMILY_UPSTREAM;
        write_on(&b, &s, 30, tokens[i], logits[i]);
        sequence_free(&b.model, &s);
    }
    cr_assert(!memcmp(tokens[0], tokens[1], sizeof *tokens));
    cr_assert(same(logits[0], logits[1], G.vocab_size));
    for (int i = 2; i < 4; i++) {
        cr_assert(memcmp(tokens[0], tokens[i], sizeof *tokens), "%d", i);
        cr_assert(tokens[0][0] == tokens[i][0]); // the first word is chosen by a sober row
    }
    bench_close(&b);
}

// ---- doses over the depth

static void expect_layers(const Dose *d, int n_layers, int first, int last) {
    float theta[N_SITES * 60];
    Dose doses[N_SITES] = {{0}};
    doses[SITE_V] = *d;
    dose_layers(theta, doses, n_layers);
    for (int i = 0; i < N_SITES * n_layers; i++) {
        int l = i - SITE_V * n_layers;
        cr_assert_eq(theta[i], l >= first && l <= last ? (float)d->theta : 0, "layer %d", l);
    }
}

// The layers that upstream's documents name for depth .4 and two spreads.
Test(doses, ceil_reaches_the_known_layers) {
    Dose d = {.3, MODE_CEIL, 3, {{.4 - 5. / 32, 0}, {.4, 1}, {.4 + 5. / 32, 0}}};
    expect_layers(&d, 32, 8, 17);
    expect_layers(&d, 60, 15, 33);
    d = (Dose){.3, MODE_CEIL, 3, {{.4 - .1, 0}, {.4, 1}, {.4 + .1, 0}}};
    expect_layers(&d, 32, 10, 16);
    d = (Dose){.theta = .3};
    expect_layers(&d, 32, 0, 31);
}

// The three modes between points; the nearest point outside; the larger of two ratios at one depth
// with ceil and interpolate (a step, not a division by 0); points in any order on the command line.
Test(doses, modes) {
    Dose d;
    for (int mode = 0; mode < 3; mode++) {
        const char *const texts[] = {"2@ceil:.5=1,.75=2,.25=.5", "2@floor:.75=2,.25=.5,.5=1",
                                     "2@interpolate:.5=1,.25=.5,.75=2"};
        const double between[] = {2, 1, 1.5}, higher[] = {4, 2, 3};
        memset(&d, 0, sizeof d);
        parse_dose(&d, 'A', texts[mode]);
        cr_assert(dose_at(&d, 0) == 1 && dose_at(&d, .24) == 1);
        cr_assert(dose_at(&d, .76) == 4 && dose_at(&d, 1) == 4);
        cr_assert_float_eq(dose_at(&d, .375), between[mode], 1e-12);
        cr_assert_float_eq(dose_at(&d, .625), higher[mode], 1e-12);
        cr_assert(dose_at(&d, .25) == (mode == MODE_CEIL ? 2 : 1)); // the ends are still between
        cr_assert(dose_at(&d, .75) == (mode == MODE_FLOOR ? 2 : 4));

        d = (Dose){1, mode, 4, {{.2, 1}, {.5, 1}, {.5, 3}, {.8, 3}}};
        cr_assert(dose_at(&d, .4) == 1 && dose_at(&d, .6) == 3);
        double step = dose_at(&d, .5);
        cr_assert(step == 1 || step == 3, "%g", step);

        d = (Dose){1, mode, 1, {{.5, .25}}};
        cr_assert(dose_at(&d, .1) == .25 && dose_at(&d, .5) == .25 && dose_at(&d, .9) == .25);
    }
}

// ---- the cold shower

// Checks that the cache is that of a model which has read the same tokens and never was drugged,
// and that both go on alike.
static void expect_sober(Bench *b, Sequence *s) {
    static float logits[MOST_VOCAB];
    const Model *m = &b->model;
    Sequence a = sequence_new((Noise){0});
    int next = 5;
    feed(m, &b->run, &a, s->tokens, s->length, 0, false, false);
    cr_assert(same_cache(b, &a, s), "length %d", s->length);
    cr_assert(s->first_dirty == CLEAN && s->n_drugged == 0);
    memcpy(logits, feed(m, &b->run, &a, &next, 1, a.length, false, true),
           (size_t)m->config.vocab_size * sizeof *logits);
    cr_assert(same(logits, feed(m, &b->run, s, &next, 1, s->length, false, true),
                   (size_t)m->config.vocab_size));
    s->length--;
    sequence_free(m, &a);
}

// Whenever it is taken, a shower leaves nothing behind: after prompts of any length, sober or
// drugged, and a few drugged tokens, with sober ones after them (as in a chat without showers) or
// none. A second one finds nothing to do, and life goes on: drugged again, clean again.
Test(shower, leaves_a_sober_cache) {
    for (int i = 0; i < 2 * 2 * 2 * N; i++) {
        const bool odd = i & 1, drugged_prompt = i & 2, small_blocks = i & 4;
        const int prompt = i / 8, *tokens = odd ? M_TOKENS : G_TOKENS;
        Bench b;
        bench_open(&b, odd ? M : G, small_blocks ? 3 : N);
        const Model *m = &b.model;
        Sequence s = sequence_new(noise_of(&b, ALL_SITES, FAMILY_CENTRED)), clean = s;
        feed(m, &b.run, &s, tokens, prompt, 0, drugged_prompt, false);
        for (int round = 0; round < 3; round++) {
            const int start = s.length, sober_tail = round == 2 ? 2 : 0;
            for (int k = 0; k < 4; k++)
                feed(m, &b.run, &s, &tokens[k], 1, s.length, true, false);
            cr_assert_eq(s.n_drugged, 4 + (round == 0 && drugged_prompt ? prompt : 0));
            feed(m, &b.run, &s, tokens, sober_tail, s.length, false, false);
            int first = round == 0 && drugged_prompt ? SINK : start > SINK ? start : SINK;
            int dirty = s.length > first ? s.length - first : 0;
            if (dirty > 0 && round == 0) { // else there was nothing to wash off
                clean = sequence_new((Noise){0});
                feed(m, &b.run, &clean, s.tokens, s.length, 0, false, false);
                cr_assert(!same_cache(&b, &clean, &s));
                sequence_free(m, &clean);
            }
            cr_assert_eq(cold_shower(m, &b.run, &s), dirty, "%d tokens", s.length);
            expect_sober(&b, &s);
            cr_assert_eq(cold_shower(m, &b.run, &s), 0);
            expect_sober(&b, &s);
        }
        sequence_free(m, &s);
        bench_close(&b);
    }
}

// Taken after every five drugged tokens while text is being written, showers leave a sober cache
// too, and what is written until the first one is what is written without.
Test(shower, every_few_tokens) {
    static float unused[MOST_VOCAB];
    int without[30], with[30];
    Bench b;
    bench_open(&b, G, N);
    Sequence a = sequence_new(noise_of(&b, ALL_SITES, FAMILY_CENTRED)), s = sequence_new(a.noise);
    write_on(&b, &a, 30, without, unused);
    const float *z = feed(&b.model, &b.run, &s, G_TOKENS, N, 0, false, true);
    int n_run_again = 0;
    for (int i = 0; i < 30; i++) {
        with[i] = argmax(z, b.model.config.vocab_size);
        if (s.n_drugged >= 5) {
            n_run_again += cold_shower(&b.model, &b.run, &s);
            expect_sober(&b, &s);
        }
        z = feed(&b.model, &b.run, &s, &with[i], 1, s.length, true, true);
    }
    cr_assert_eq(n_run_again, 25);
    cr_assert(!memcmp(with, without, 6 * sizeof *with));
    cr_assert(!same_cache(&b, &a, &s));
    sequence_free(&b.model, &a);
    sequence_free(&b.model, &s);
    bench_close(&b);
}

// ---- the tokenizer

// A tiny model with a vocabulary of its own: the first pieces, then these.
static void vocabulary(Bench *b, uint32_t flags, const Piece *list, int n) {
    Bytes pieces = first_pieces(flags & BYTE_PIECES);
    for (int i = 0; i < n; i++)
        append_piece(&pieces, list[i].score, list[i].kind, list[i].bytes,
                     list[i].length ? list[i].length : (int)strlen(list[i].bytes));
    FileHeader h = {.magic = "drugs.c", .version = 1, .dim = 1, .hidden_dim = 1, .n_layers = 1,
                .n_heads = 1, .n_kv_heads = 1, .head_dim = 2, .seq_len = 8, .shared_classifier = 1,
                .rope_theta = 1, .bos = 1, .eos = 2, .tokenizer_flags = flags};
    h.vocab_size = (n + (flags & BYTE_PIECES ? 259 : 3));
    bench_open_with(b, h, pieces, 1);
}

// Checks the tokens of a text (without BOS). Numbers count from the first piece of the list, which
// is `base`; a negative one stands for a piece before it: -1 - id.
static void expect_tokens(const Bench *b, int base, const char *text, int n, const int *want) {
    int n_tokens, *tokens = encode(&b->model, text, strlen(text), false, &n_tokens);
    cr_assert_eq(n_tokens, n, "'%s': %d tokens", text, n_tokens);
    for (int i = 0; i < n; i++)
        cr_assert_eq(tokens[i], want[i] < 0 ? -1 - want[i] : base + want[i], "'%s' %d", text, i);
    free(tokens);
}
#define EXPECT_TOKENS(b, base, text, ...) \
    expect_tokens(b, base, text, sizeof (int[]){__VA_ARGS__} / sizeof(int), (int[]){__VA_ARGS__})

// Prints tokens as drugs does and returns the text; the caller frees it.
static char *decode(const Bench *b, const int *tokens, int n, size_t *n_text) {
    char *text;
    Printer p = {.to = open_memstream(&text, n_text), .at_start = true};
    for (int i = 0; i < n; i++) print_token(&p, &b->model.tokenizer, tokens[i]);
    print_rest(&p);
    fclose(p.to);
    return text;
}

// Merging by hand: the best score first, the leftmost of equals, over several levels, and only
// neighbours whose union is a piece.
Test(tokenizer, merges_in_the_order_of_scores) {
    enum { a, b_, c, d, ab, bc, abc, aa, cd, abcd, sp, sp_a };
    const Piece list[] = {{"a", 0, NORMAL, 0}, {"b", 0, NORMAL, 0}, {"c", 0, NORMAL, 0},
        {"d", 0, NORMAL, 0}, {"ab", 0, NORMAL, -2}, {"bc", 0, NORMAL, -1}, {"abc", 0, NORMAL, -5},
        {"aa", 0, NORMAL, -3}, {"cd", 0, NORMAL, -1}, {"abcd", 0, NORMAL, -9}, {" ", 0, NORMAL, 0},
        {" a", 0, NORMAL, -4}};
    for (int prefix = 0; prefix < 2; prefix++) {
        Bench b;
        vocabulary(&b, BYTE_PIECES | (prefix ? PREFIX_SPACE : 0), list, 12);
        if (prefix) {
            EXPECT_TOKENS(&b, 259, "a", sp_a);
            EXPECT_TOKENS(&b, 259, "ab", sp, ab);    // ab (-2) before " a" (-4)
            EXPECT_TOKENS(&b, 259, "aab", sp_a, ab); // ab, then " a"; aa came too late
        } else {
            EXPECT_TOKENS(&b, 259, "ab", ab);
            EXPECT_TOKENS(&b, 259, "abc", abc);      // bc first, then a + bc
            EXPECT_TOKENS(&b, 259, "aaa", aa, a);    // leftmost of two equal pairs
            EXPECT_TOKENS(&b, 259, "bcd", bc, d);    // bc and cd are equal: leftmost
            EXPECT_TOKENS(&b, 259, "abcd", abcd);    // bc, abc, abcd
            EXPECT_TOKENS(&b, 259, "acd", a, cd);
            EXPECT_TOKENS(&b, 259, "ba a\xE2\x96\x81" "a", b_, a, sp_a, sp_a);
            EXPECT_TOKENS(&b, 259, "d\xC3\xA9", d, -1 - 3 - 0xC3, -1 - 3 - 0xA9);
        }
        size_t n_text; // the space that encode put in front is not printed
        char *text = decode(&b, (int[]){1, 259 + sp_a, 259 + sp_a}, 3, &n_text);
        cr_assert_str_eq(text, prefix ? "a a" : " a a");
        free(text);
        int n, *bos = encode(&b.model, "", 0, true, &n); // no space before nothing
        cr_assert(n == 1 && bos[0] == 1);
        free(bos);
        bench_close(&b);
    }
}

// Without byte pieces a run of unknown characters is one <unk>, printed as SentencePiece does.
// Control pieces come from no text and print nothing; user-defined ones are found whole, the
// longest first, before any merging, and nothing merges with them.
Test(tokenizer, special_pieces) {
    enum { a, b_, ab, user, longer, lt, s, gt, aba, control, aa };
    const Piece list[] = {{"a", 0, NORMAL, 0}, {"b", 0, NORMAL, 0}, {"ab", 0, NORMAL, -1},
        {"ba", 0, USER_DEFINED, 0}, {"bab", 0, USER_DEFINED, 0}, {"<", 0, NORMAL, 0},
        {"s", 0, NORMAL, 0}, {">", 0, NORMAL, 0}, {"aba", 0, NORMAL, 9}, {"ss", 0, CONTROL, 9},
        {"aa", 0, NORMAL, 5}};
    Bench b;
    vocabulary(&b, 0, list, 11);
    EXPECT_TOKENS(&b, 3, "aXYb", a, -1, b_);
    EXPECT_TOKENS(&b, 3, "XaX\xC3\xA9\xFF", -1, a, -1);
    EXPECT_TOKENS(&b, 3, "<s>", lt, s, gt);
    EXPECT_TOKENS(&b, 3, "ss", s, s);
    EXPECT_TOKENS(&b, 3, "aba", a, user);    // not ab + a, and not the piece aba
    EXPECT_TOKENS(&b, 3, "abab", a, longer);
    EXPECT_TOKENS(&b, 3, "baaa", user, aa);  // not b, aa, a
    EXPECT_TOKENS(&b, 3, "bb", b_, b_);
    size_t n;
    char *text = decode(&b, (int[]){1, 3, 0, 3 + control, 2, 3 + user}, 6, &n);
    cr_assert_str_eq(text, "a \xE2\x81\x87 ba");
    free(text);
    bench_close(&b);
}

// The first piece of these bytes, -1 if there is none.
static int piece_of(const Piece *list, int n_list, const char *bytes, int n) {
    for (int p = 0; p < n_list; p++)
        if ((int)strlen(list[p].bytes) == n && !memcmp(list[p].bytes, bytes, (size_t)n)) return p;
    return -1;
}

// Merges the leftmost best pair, again and again, and searches everything every time.
static int merge_naively(const Piece *list, int n_list, const char *text, int *tokens) {
    int starts[128], n = (int)strlen(text); // single characters are single bytes here
    for (int i = 0; i <= n; i++) starts[i] = i;
    for (;;) {
        int best = -1, best_at = -1;
        for (int i = 0; i + 1 < n; i++) {
            int p = piece_of(list, n_list, text + starts[i], starts[i + 2] - starts[i]);
            if (p >= 0 && (best < 0 || list[p].score > list[best].score)) best = p, best_at = i;
        }
        if (best < 0) break;
        n--;
        for (int i = best_at + 1; i <= n; i++) starts[i] = starts[i + 1];
    }
    for (int i = 0; i < n; i++) {
        int p = piece_of(list, n_list, text + starts[i], starts[i + 1] - starts[i]);
        tokens[i] = p < 0 ? 3 + text[starts[i]] : 259 + p;
    }
    return n;
}

// The heap finds what the naive search finds, on random texts over random vocabularies with many
// equal scores.
Test(tokenizer, merges_like_a_naive_search) {
    for (uint64_t v = 0; v < 40; v++) {
        enum { N_LIST = 60 };
        char bytes[N_LIST][8] = {{0}}, text[101];
        Piece list[N_LIST];
        Bench b;
        for (uint64_t p = 0; p < N_LIST; p++) {
            int length = 1 + (int)(unit(v, p) * 6);
            for (int i = 0; i < length; i++)
                bytes[p][i] = "abcd"[(int)(unit(v, 1000 + 8 * p + (uint64_t)i) * 4)];
            list[p] = (Piece){bytes[p], 0, NORMAL, (float)(int)(-6 * unit(v, 2000 + p))};
        }
        vocabulary(&b, BYTE_PIECES, list, N_LIST);
        for (uint64_t k = 0; k < 100; k++) {
            int n = 1 + (int)(unit(v, 3000 + k) * 100), want[128], n_tokens;
            for (int i = 0; i < n; i++)
                text[i] = "abcd"[(int)(unit(100 + v, 128 * k + (uint64_t)i) * 4)];
            text[n] = '\0';
            int n_want = merge_naively(list, N_LIST, text, want);
            int *tokens = encode(&b.model, text, (size_t)n, false, &n_tokens);
            cr_assert(n_tokens == n_want && !memcmp(tokens, want, (size_t)n_want * sizeof *want),
                      "vocabulary %d, '%s'", (int)v, text);
            free(tokens);
        }
        bench_close(&b);
    }
}

// What is encoded can be printed again: random bytes, spaces in front, broken UTF-8, zeros. Only
// U+2581, SentencePiece's sign for a space, comes back as the space it stands for.
Test(tokenizer, round_trip) {
    const Piece list[] = {{" ", 0, NORMAL, 0}, {"  ", 0, NORMAL, -1}, {"\xC3\xA9", 0, NORMAL, -1},
                          {" \xC3\xA9", 0, NORMAL, -2}, {"\xA9 ", 0, NORMAL, -1},
                          {"\x96\x81", 0, NORMAL, 1}, {"\xF0\x9F\x98\x80", 0, NORMAL, 1}};
    const char *const parts[] = {" ", "a", "\xC3\xA9", "\xE2\x96\x81", "\xF0\x9F\x98\x80",
                                 "\xE2\x96"};
    Bench b;
    vocabulary(&b, BYTE_PIECES | PREFIX_SPACE, list, 7);
    for (uint64_t k = 0; k < 3000; k++) {
        Bytes text = {0}, want = {0};
        for (uint64_t i = 0, n = (uint64_t)(unit(7, k) * 40); i < n; i++) {
            int pick = (int)(unit(8, 64 * k + i) * 12);
            char byte = (char)(int)(unit(9, 64 * k + i) * 256);
            append(&text, pick < 6 ? parts[pick] : &byte, pick < 6 ? strlen(parts[pick]) : 1);
        }
        for (size_t i = 0; i < text.n; i++) {
            bool is_space = i + 3 <= text.n && !memcmp(text.data + i, "\xE2\x96\x81", 3);
            append(&want, is_space ? " " : &text.data[i], 1);
            i += is_space ? 2 : 0;
        }
        int n_tokens, *tokens = encode(&b.model, text.data, text.n, true, &n_tokens);
        size_t n_back;
        char *back = decode(&b, tokens, n_tokens, &n_back);
        cr_assert_eq(n_back, want.n, "text %d", (int)k);
        cr_assert(!n_back || !memcmp(back, want.data, n_back), "text %d", (int)k);
        free(tokens);
        free(back);
        free(text.data);
        free(want.data);
    }
    bench_close(&b);
}

// 300 KB in one go: a chain of doublings ends in as many of the longest piece as fit.
Test(tokenizer, long_text) {
    enum { LENGTH = 300000 };
    char *text = memset(resize(NULL, LENGTH, 1), 'a', LENGTH);
    Piece list[7]; // a, aa, aaaa, ... 64 times a
    for (int i = 0; i < 7; i++) list[i] = (Piece){text, 1 << i, NORMAL, (float)-i};
    Bench b;
    vocabulary(&b, BYTE_PIECES, list, 7);
    int n, *tokens = encode(&b.model, text, LENGTH, false, &n);
    cr_assert_eq(n, LENGTH / 64 + 1);
    for (int i = 0; i < n - 1; i++) cr_assert_eq(tokens[i], 259 + 6);
    cr_assert_eq(tokens[n - 1], 259 + 5); // 300000 = 4687 * 64 + 32
    free(tokens);
    free(text);
    bench_close(&b);
}

// A character that is spread over tokens is printed when it is complete; what turns out to be
// broken is printed as it is.
Test(tokenizer, prints_whole_characters) {
    const int e_acute[] = {3 + 0xC3, 3 + 0xA9}, face[] = {3 + 0xF0, 3 + 0x9F, 3 + 0x98, 3 + 0x80};
    Bench b;
    vocabulary(&b, BYTE_PIECES, NULL, 0);
    char *text;
    size_t n;
    Printer p = {.to = open_memstream(&text, &n), .at_start = true};
    print_token(&p, &b.model.tokenizer, e_acute[0]);
    cr_assert_eq(n, 0);
    print_token(&p, &b.model.tokenizer, e_acute[1]);
    cr_assert_eq(n, 2);
    for (int i = 0; i < 4; i++) {
        print_token(&p, &b.model.tokenizer, face[i]);
        cr_assert_eq(n, i < 3 ? 2 : 6);
    }
    print_token(&p, &b.model.tokenizer, face[0]);
    print_token(&p, &b.model.tokenizer, 3 + 'x');
    cr_assert_eq(n, 8);
    print_token(&p, &b.model.tokenizer, face[0]);
    print_rest(&p);
    fclose(p.to);
    cr_assert_str_eq(text, "\xC3\xA9\xF0\x9F\x98\x80\xF0x\xF0");
    free(text);
    bench_close(&b);
}

// ---- dice

// Sampling draws each token as often as softmax(logits / temperature) says, among the fewest tokens
// that have top_p together; of one token only, that is argmax.
Test(sampling, follows_the_probabilities) {
    const float logits[6] = {.5f, 2, -1, 1.5f, 0, -3};
    for (int i = 0; i < 4; i++) {
        enum { DRAWS = 10000 };
        const double temperature = i % 2 ? .7 : 1.6, top_p = i < 2 ? 1 : .8;
        const int order[6] = {1, 3, 0, 4, 2, 5}; // from the most probable on
        double p[6], sum = 0, kept = 0;
        int counts[6] = {0}, n_kept = 0;
        for (int t = 0; t < 6; t++) sum += p[t] = exp((double)logits[t] / temperature);
        while (n_kept < 6 && kept < top_p * sum * (1 - 1e-12)) kept += p[order[n_kept++]];
        cr_assert(i < 2 ? n_kept == 6 : n_kept > 1 && n_kept < 6);
        for (int k = 0; k < DRAWS; k++)
            counts[sample(logits, 6, temperature, top_p, (k + .5) / DRAWS)]++;
        for (int t = 0; t < 6; t++) {
            double want = t < n_kept ? p[order[t]] / kept : 0;
            cr_assert_float_eq((double)counts[order[t]] / DRAWS, want, 2. / DRAWS, "%d %d", i, t);
        }
        for (int k = 0; k < 100; k++)
            cr_assert_eq(sample(logits, 6, temperature, 1e-6, k / 100.), argmax(logits, 6));
    }
    cr_assert_eq(argmax((float[]){1, 3, 3}, 3), 1); // the first of equals
}

// ---- talking

// An answer that -n cuts off is remembered whole in a chat, or the next question would follow a
// sentence without its last word. A single text needs no more than it printed.
Test(talking, a_chat_remembers_its_last_token) {
    Bench b;
    bench_open(&b, G, 8);
    b.model.config.eos = b.model.config.bos = -1; // nothing else ends the answer
    for (int i = 0; i < 2; i++) {
        const Options o = {.n_new = 7, .mode = i ? CHAT : GENERATE};
        FILE *nowhere = fopen("/dev/null", "w");
        cr_assert_not_null(nowhere);
        Talk t = {.model = &b.model, .options = &o, .sequence = sequence_new((Noise){0}),
                  .printer = {.to = nowhere}};
        run_init(&t.run, &b.model, 8, 1);
        reply(&t, (int[]){1, 40, 41}, 3);
        cr_assert_eq(t.n_new, 7);
        cr_assert_eq(t.sequence.length, 3 + 7 - !i);
        sequence_free(&b.model, &t.sequence);
        run_free(&t.run);
        fclose(nowhere);
    }
    bench_close(&b);
}
