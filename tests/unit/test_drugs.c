/* test_drugs.c - what drugs.c promises about its numbers, its noise, its showers and its tokens.
 *
 * Errors are relative to the largest value of a row. "observed" is the worst that gcc and clang
 * gave, with AVX-512 or with plain SSE2; the bound beside it leaves room for other machines and
 * none for a wrong formula.
 */
#include "testing.h"
#include "golden.h"
#include <criterion/redirect.h>

enum { N = N_TOKENS, MOST_VOCAB = 320 };
static const char *const FAMILIES[] = {
    [FAMILY_CENTRED] = "centred",
    [FAMILY_UPSTREAM] = "upstream",
};
_Static_assert(N_DOSED == N_GOLDEN_SITES + 2, "golden.h: a site each, all, all and upstream");

// The tokens of n bytes, in which no control piece is meant. The caller frees them.
static int *plain_tokens(const Model *m, const char *bytes, size_t n, bool bos, int *n_tokens) {
    return encode(m, (Source){.bytes = bytes, .n = n, .bos = bos}, n_tokens);
}

// ---- what it is for

// "To be, or not to be" is seven tokens for the small model of this repository, and one in front
// that begins a text. It knows these words with a space before them.
Test(hamlet, this_prompt_gives_these_tokens) {
    const char *const prompt = "To be, or not to be";
    const char *const pieces[] = {"<s>", " To", " be", ",", " or", " not", " to", " be"};
    const int numbers[] = {1, 422, 333, 269, 667, 678, 304, 333};
    Model model;
    int n;
    cr_assert(model_open(&model, "tests/hamlet.bin"), "%s", model.error);
    int *tokens = plain_tokens(&model, prompt, strlen(prompt), true, &n);
    cr_assert_eq(n, 8);
    for (int i = 0; i < n; i++) {
        const Span piece = string_at(&model, tokens[i]);
        cr_assert_eq(tokens[i], numbers[i], "token %d is %d", i, tokens[i]);
        cr_assert_eq(piece.length, (int)strlen(pieces[i]), "token %d", i);
        cr_assert(!memcmp(piece.bytes, pieces[i], (size_t)piece.length), "token %d", i);
    }
    free(tokens);
    model_close(&model);
}

// The model reads "To be". Ten times the token with the largest logit is written, and is read in
// its turn. The text that this gives is always the same one.
Test(hamlet, this_prompt_is_continued_like_this) {
    Model model;
    Run run;
    Sequence sequence = sequence_new((Noise){0});
    char *text;
    size_t n_text;
    Printer printer = {.to = open_memstream(&text, &n_text), .at_start = true};
    cr_assert(model_open(&model, "tests/hamlet.bin"), "%s", model.error);
    run_init(&run, &model, 8, 1);

    const int to_be[] = {1, 422, 333};
    const float *logits = feed(&run, &sequence, to_be, 3, WANTS_LOGITS);
    for (int i = 0; i < 10; i++) {
        int next = argmax(logits, model.config.vocab_size);
        print_token(&printer, &model, next);
        logits = feed(&run, &sequence, &next, 1, WANTS_LOGITS);
    }
    fclose(printer.to);
    cr_assert_str_eq(text, "a successful business owner, you need to be able");
    cr_assert_eq(sequence.length, 3 + 10);

    free(text);
    sequence_free(&model, &sequence);
    run_free(&run);
    model_close(&model);
}

// ---- what the tests below share

// Reads n tokens more, in blocks, drugged if the sequence has doses. logits: (n, vocab_size).
static void read_on(Bench *b, Sequence *s, const int *tokens, int n, int block, float *logits) {
    const size_t vocab_size = (size_t)b->model.config.vocab_size;
    for (int done = 0; done < n;) {
        const int most = min(n - done, block);
        const int n_rows = read_block(&b->run, s, tokens + done, most, DRUGGED | ALL_LOGITS);
        for (int r = 0; r < n_rows; r++) {
            memcpy(logits, b->run.block[r].logits, vocab_size * sizeof *logits);
            logits += vocab_size;
        }
        done += n_rows;
    }
}

static bool same(const float *a, const float *b, size_t n) {
    return !memcmp(a, b, n * sizeof *a);
}

static bool same_cache(const Bench *b, const Sequence *x, const Sequence *y) {
    const size_t n = (size_t)x->length * (size_t)b->model.config.kv_dim;
    if (x->length != y->length || memcmp(x->tokens, y->tokens, x->length * sizeof *x->tokens))
        return false;
    for (int l = 0; l < b->model.config.n_layers; l++)
        if (!same(x->k[l], y->k[l], n) || !same(x->v[l], y->v[l], n))
            return false;
    return true;
}

// ---- the forward pass against an independent reference

// What golden.h says about a model.
typedef struct {
    const char *name;
    const FileHeader *header;
    const int *tokens;
    const GoldenRow *sober;
    const GoldenRow (*drugged)[N_DRUGGED]; // (N_DOSED) each site alone, all, all and upstream
    double loss, loss_all;                 // sober, and with all sites dosed
} Golden;
static const Golden GOLDEN[] = {
    {"G", &G, G_TOKENS, G_SOBER, G_DRUGGED, G_LOSS, G_LOSS_ALL},
    {"M", &M, M_TOKENS, M_SOBER, M_DRUGGED, M_LOSS, M_LOSS_ALL},
};
enum { N_GOLDEN = 2 };

// How far the logits of row r are from a golden row: in its entries, and in its norm.
static double row_error(const float *logits, int n, int r, const GoldenRow *golden) {
    double largest = 0;
    double squares = 0;
    double worst = 0;
    for (int t = 0; t < n; t++) {
        double logit = logits[t];
        largest = fmax(largest, fabs(logit));
        squares += logit * logit;
    }
    for (int j = 0; j < N_ENTRIES; j++) {
        double entry = logits[(37 * r + 53 * j + 11) % n];
        worst = fmax(worst, fabs(entry - golden->entry[j]) / largest);
    }
    return fmax(worst, fabs(sqrt(squares) / golden->norm - 1));
}

// -log(probability) of the tokens from the second on, on average.
static double mean_surprise(const float *logits, int n_vocab, const int *tokens) {
    double total = 0;
    for (int r = 0; r < N - 1; r++) {
        const float *row = logits + r * n_vocab;
        double sum = 0;
        for (int t = 0; t < n_vocab; t++)
            sum += exp((double)row[t]);
        total += log(sum) - (double)row[tokens[r + 1]];
    }
    return total / (N - 1);
}

// Reads the text with noise at these sites. Logits must be those of golden.h: the sober ones, but
// from position 6 on those of `drugged`, if it is not NULL. want_loss: NAN if none is known.
static void check_logits(const Golden *golden, int sites, int family, const GoldenRow *drugged,
                         double want_loss) {
    static float logits[N * MOST_VOCAB];
    const int n_vocab = golden->header->vocab_size;
    Bench b;
    bench_open(&b, *golden->header, N);
    Noise noise = bench_noise(&b, sites, family);
    Sequence s = sequence_new(drugged ? noise : (Noise){0});
    read_on(&b, &s, golden->tokens, N, N, logits);
    for (int r = 0; r < N; r++) {
        const bool turned = drugged && r >= 6;
        const GoldenRow *want = turned ? &drugged[r - 6] : &golden->sober[r];
        double error = row_error(logits + r * n_vocab, n_vocab, r, want);
        cr_assert(error < 1e-5, "model %s, %s noise at %s, row %d: %g", golden->name,
                  FAMILIES[family], site_letters(sites), r, error); // observed 9e-7
    }
    double loss = mean_surprise(logits, n_vocab, golden->tokens);
    double loss_error = isnan(want_loss) ? 0 : fabs(loss / want_loss - 1);
    cr_assert(loss_error < 1e-6, "model %s, noise at %s: a loss of %.9g, must be %.9g",
              golden->name, site_letters(sites), loss, want_loss); // 6e-8
    sequence_free(&b.model, &s);
    bench_close(&b);
}

// Logits and loss are those of an independent float64 implementation, with grouped queries and a
// shared classifier (G), and with a window and odd sizes (M): sober, ...
Test(forward, agrees_with_the_reference) {
    for (int i = 0; i < N_GOLDEN; i++)
        check_logits(&GOLDEN[i], 0, FAMILY_CENTRED, NULL, GOLDEN[i].loss);
}

// ... with noise at one site, ...
Test(forward, agrees_with_the_reference_at_each_site) {
    for (int i = 0; i < N_GOLDEN; i++)
        for (int site = 0; site < N_GOLDEN_SITES; site++)
            check_logits(&GOLDEN[i], 1 << site, FAMILY_CENTRED, GOLDEN[i].drugged[site], NAN);
}

// ... and at all five.
Test(forward, agrees_with_the_reference_at_all_sites) {
    for (int i = 0; i < N_GOLDEN; i++) {
        const Golden *golden = &GOLDEN[i];
        const GoldenRow *centred = golden->drugged[N_GOLDEN_SITES];
        const GoldenRow *upstream = golden->drugged[N_GOLDEN_SITES + 1];
        check_logits(golden, GOLDEN_SITES, FAMILY_CENTRED, centred, golden->loss_all);
        check_logits(golden, GOLDEN_SITES, FAMILY_UPSTREAM, upstream, NAN);
    }
}

// The number of keys that a query at a position sees, and the position of the first of them.
static void expect_keys(FileHeader header, int position, int first, int n_keys) {
    float scratch[128];
    Bench b;
    bench_open(&b, header, N);
    Sequence s = sequence_new((Noise){0});
    feed(&b.run, &s, G_TOKENS, 1, 0);
    sequence_reserve(&b.model, &s, position + 1);
    const Row row = {.position = position, .sequence = &s};
    b.run.rows = &row;
    const Head head = head_of(&b.run, 0, 0, 1, scratch);
    cr_assert_eq(head.first, first, "at %d: the first is %d", position, head.first);
    cr_assert_eq(head.n_keys, n_keys, "at %d: %d keys", position, head.n_keys);
    sequence_free(&b.model, &s);
    bench_close(&b);
}

// A query sees its own key and those before it, and none behind it. In a window of five it sees
// itself and four more.
Test(forward, a_query_sees_what_was_before_it) {
    expect_keys(G, 0, 0, 1);
    expect_keys(G, 7, 0, 8);
    expect_keys(M, 0, 0, 1);
    expect_keys(M, 4, 0, 5);
    expect_keys(M, 5, 1, 5);
    expect_keys(M, 20, 16, 5);
}

// ---- the bitwise promise

// Reads a text in blocks of this many rows, and checks that all is as it was in `a`, which read it
// token by token with these logits.
static void check_block(Bench *b, const Sequence *a, const float *one_by_one, int block) {
    static float logits[N * MOST_VOCAB];
    Sequence s = sequence_new(a->noise);
    read_on(b, &s, a->tokens, N, block, logits);
    cr_assert(same(logits, one_by_one, N * (size_t)b->model.config.vocab_size),
              "blocks of %d: other logits", block);
    cr_assert(same_cache(b, a, &s), "blocks of %d: another cache", block);
    sequence_free(&b->model, &s);
}

// However a text is cut into blocks, logits and caches are the same to the last bit; also when the
// activations of all layers are kept, as training does.
static void check_blocks(const Golden *golden, int sites) {
    static float one_by_one[N * MOST_VOCAB];
    Bench b;
    bench_open(&b, *golden->header, N);
    const Config *c = &b.model.config;
    Sequence a = sequence_new(bench_noise(&b, sites, FAMILY_CENTRED));
    read_on(&b, &a, golden->tokens, N, 1, one_by_one);
    for (int block = 2; block <= 9; block++)
        check_block(&b, &a, one_by_one, block);
    check_block(&b, &a, one_by_one, N);

    const size_t n_state = (size_t)(N * c->dim);
    float *state = resize(NULL, (ptrdiff_t)n_state, sizeof *state);
    memcpy(state, last_state(&b.run, 0), n_state * sizeof *state);
    run_free(&b.run);
    run_init(&b.run, &b.model, N, c->n_layers + 1);
    check_block(&b, &a, one_by_one, N);
    cr_assert(same(last_state(&b.run, 0), state, n_state), "what left the layers");
    for (int l = 0; l < c->n_layers; l++) // each layer has its own slot
        cr_assert(same(b.run.slots[l].k, a.k[l], N * (size_t)c->kv_dim), "slot of layer %d", l);
    free(state);
    sequence_free(&b.model, &a);
    bench_close(&b);
}

Test(bitwise, blocks_of_every_size) {
    for (int i = 0; i < N_GOLDEN; i++) {
        check_blocks(&GOLDEN[i], 0);
        check_blocks(&GOLDEN[i], ALL_SITES);
    }
}

// A sequence does not notice seven others in its rows, which began earlier or later, have other
// tokens and seeds, and are sober in part. Sequence k joins in at step k; ours is number 3.
static void check_beside_others(const Golden *golden, int sites) {
    enum { N_SEQUENCES = 8, OURS = 3, MUTE = 1 };
    static float alone[N * MOST_VOCAB];
    const int *tokens = golden->tokens;
    Bench b;
    bench_open(&b, *golden->header, N);
    const int vocab_size = b.model.config.vocab_size;
    const Noise noise = bench_noise(&b, sites, FAMILY_CENTRED);
    const Noise other = bench_noise(&b, ALL_SITES & ~(1 << SITE_H), FAMILY_UPSTREAM);
    Sequence a = sequence_new(noise);
    Sequence s[N_SEQUENCES];
    read_on(&b, &a, tokens, N, N, alone);
    for (int k = 0; k < N_SEQUENCES; k++) {
        s[k] = sequence_new(k == OURS ? noise : other);
        if (k != OURS)
            s[k].noise.seed += (uint64_t)k;
    }
    for (int step = 0; step < N + OURS; step++) {
        Row rows[N_SEQUENCES];
        const int n_rows = min(step + 1, N_SEQUENCES);
        for (int k = 0; k < n_rows; k++) {
            const int other_token = (tokens[step % N] * 7 + k) % vocab_size;
            rows[k] = (Row){
                .token = k == OURS ? tokens[step - OURS] : other_token,
                .position = step - k,
                .sequence = &s[k],
                .drugged = k % 2, // ours is
                .wants_logits = k != MUTE,
            };
        }
        forward(&b.run, rows, n_rows);
        if (step >= OURS) {
            const float *want = alone + (step - OURS) * vocab_size;
            cr_assert(same(rows[OURS].logits, want, (size_t)vocab_size), "step %d", step);
        }
        if (step >= MUTE)
            cr_assert_null(rows[MUTE].logits, "it did not ask for any");
    }
    cr_assert(same_cache(&b, &a, &s[OURS]));
    for (int k = 0; k < N_SEQUENCES; k++)
        sequence_free(&b.model, &s[k]);
    sequence_free(&b.model, &a);
    bench_close(&b);
}

Test(bitwise, beside_seven_other_sequences) {
    for (int i = 0; i < N_GOLDEN; i++) {
        check_beside_others(&GOLDEN[i], 0);
        check_beside_others(&GOLDEN[i], ALL_SITES);
    }
}

static void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

// One thread or five, one row or a block large enough to be shared out: the same bits.
Test(bitwise, any_number_of_threads) {
    enum { ROWS = 64 };
    static float one_by_one[ROWS * MOST_VOCAB];
    static float logits[ROWS * MOST_VOCAB];
    const int threads[] = {1, 2, 5};
    const int sites[] = {0, ALL_SITES};
    int tokens[ROWS];
    Bench b;
    bench_open(&b, BIG, ROWS);
    const Config *c = &b.model.config;
    for (int i = 0; i < ROWS; i++)
        tokens[i] = (i * 29 + 7) % c->vocab_size;
    cr_assert(64 * c->q_dim * ROWS > WORTH_THREADS); // or threads would stay asleep
    for (int i = 0; i < 2; i++) {
        Sequence a = sequence_new(bench_noise(&b, sites[i], FAMILY_CENTRED));
        read_on(&b, &a, tokens, ROWS, 1, one_by_one);
        for (int j = 0; j < 3; j++) {
            Sequence s = sequence_new(a.noise);
            set_threads(threads[j]);
            read_on(&b, &s, tokens, ROWS, ROWS, logits);
            cr_assert(same(logits, one_by_one, (size_t)(ROWS * c->vocab_size)),
                      "noise at %s, %d threads", site_letters(sites[i]), threads[j]);
            cr_assert(same_cache(&b, &a, &s), "noise at %s, %d threads", site_letters(sites[i]),
                      threads[j]);
            sequence_free(&b.model, &s);
        }
        sequence_free(&b.model, &a);
    }
    bench_close(&b);
}

// ---- the maths

// n numbers from -.5 to .5; the caller frees them.
static float *some_numbers(uint64_t stream, int n) {
    float *x = resize(NULL, n, sizeof *x);
    for (int i = 0; i < n; i++)
        x[i] = unit(stream, (uint64_t)i) - .5f;
    return x;
}

// The error of a . b (n), relative to the sum of what was added, without signs.
static double dot_error(float result, const float *a, const float *b, int n) {
    double sum = 0;
    double size = 0;
    for (int i = 0; i < n; i++) {
        double product = (double)a[i] * (double)b[i];
        sum += product;
        size += fabs(product);
    }
    return fabs((double)result - sum) / size;
}

// A product is right, and each element has the bits that it has alone.
static void check_product(int n_rows, int n_in, int n_out) {
    float *x = some_numbers(1, n_rows * n_in);
    float *w = some_numbers(2, n_out * n_in);
    float *y = resize(NULL, n_rows * n_out, sizeof *y);
    float *row_alone = resize(NULL, n_out, sizeof *row_alone);
    matmul(y, x, (Weights){w, FP32}, n_rows, n_in, n_out);
    for (int r = 0; r < n_rows; r++) {
        const float *x_row = x + r * n_in;
        const float *y_row = y + r * n_out;
        dots(row_alone, x_row, w, n_in, n_in, n_out);
        cr_assert(same(row_alone, y_row, (size_t)n_out), "%d x %d x %d", n_rows, n_in, n_out);
        for (int o = 0; o < n_out; o++) {
            const float *w_row = w + o * n_in;
            double error = dot_error(y_row[o], x_row, w_row, n_in);
            cr_assert(error < 1e-6, "%d x %d x %d: %g", n_rows, n_in, n_out, error); // 1e-7
            float alone = dot(x_row, w_row, n_in);
            cr_assert(same(&alone, &y_row[o], 1), "%d x %d x %d", n_rows, n_in, n_out);
        }
    }
    free(x);
    free(w);
    free(y);
    free(row_alone);
}

// The kernel's sums are right for every remainder of 8 floats, 4 rows and 4 outputs.
Test(maths, kernel) {
    const int n_in[] = {1, 2, 3, 7, 8, 9, 15, 16, 31, 52, 64, 129};
    const int n_out[] = {1, 2, 3, 4, 5, 7, 8, 13};
    for (int n_rows = 1; n_rows <= 10; n_rows++)
        for (int i = 0; i < 12; i++)
            for (int o = 0; o < 8; o++)
                check_product(n_rows, n_in[i], n_out[o]);
}

// The order of a sum is the documented one: number i goes to partial sum i mod 8; then 4 and 4 of
// these are added, 2 and 2, 1 and 1.
Test(maths, order_of_a_sum) {
    for (int n = 1; n <= 100; n++) {
        float *a = some_numbers(5, n);
        float *b = some_numbers(6, n);
        float sum[8] = {0};
        for (int i = 0; i < n; i++)
            sum[i % 8] += a[i] * b[i];
        for (int half = 4; half > 0; half /= 2)
            for (int i = 0; i < half; i++)
                sum[i] += sum[i + half];
        float got = dot(a, b, n);
        cr_assert(same(&got, sum, 1), "%d: %.9g, must be %.9g", n, (double)got, (double)sum[0]);
        free(a);
        free(b);
    }
}

// What works on all numbers of a vector leaves none out, and touches none behind them.
Test(maths, every_length) {
    enum { MOST = 20 };
    for (int n = 1; n <= MOST; n++) {
        float *x = some_numbers(3, MOST + 1);
        float *y = some_numbers(4, MOST + 1);
        float *result = some_numbers(4, MOST + 1);
        double sum = 0;
        add_scaled(result, -3, x, n);
        for (int i = 0; i <= MOST; i++) {
            const float want = i < n ? y[i] + -3 * x[i] : y[i];
            cr_assert_eq(result[i], want, "add_scaled: %d of %d", i, n);
        }
        for (int i = 0; i < n; i++)
            sum += (double)x[i];
        cr_assert_float_eq(sum_of(x, n), sum, 1e-5, "sum_of: %d", n); // 2e-7
        free(x);
        free(y);
        free(result);
    }
}

// exp over all that softmax and silu may ask for.
Test(maths, exp) {
    double worst = 0;
    for (int i = -87 * 64; i <= 88 * 64; i++) {
        const double x = i / 64.;
        float y = (float)x;
        exp_all(&y, 1);
        worst = fmax(worst, fabs((double)y / exp(x) - 1));
    }
    cr_assert(worst < 2.4e-7, "%g", worst); // two units of the last digit; observed 1e-7
    float limits[] = {-88, -1000, -INFINITY, 0};
    exp_all(limits, 4);
    cr_assert(limits[0] == 0 && limits[1] == 0 && limits[2] == 0);
    cr_assert_eq(limits[3], 1);
}

// Softmax is right to single precision in every element, from the likeliest down to e^-60, at every
// length, and does not mind numbers whose exp would overflow. It returns the log of the sum.
Test(maths, softmax) {
    enum { MOST = 20 };
    const double scale = .5;
    for (int n = 1; n <= MOST; n++) {
        float x[MOST];
        float y[MOST];
        double sum = 0; // of e^(scale * (x - 2000))
        for (int i = 0; i < n; i++) {
            x[i] = 2000 - 120 * unit(1, (uint64_t)(20 * n + i));
            y[i] = x[i];
            sum += exp(scale * ((double)x[i] - 2000));
        }
        double log_sum = softmax(y, n, (float)scale);
        for (int i = 0; i < n; i++) {
            double want = exp(scale * ((double)x[i] - 2000)) / sum;
            double error = fabs((double)y[i] / want - 1);
            cr_assert(error < 1e-5, "%d of %d: %g", i, n, error); // 2e-7
        }
        cr_assert_float_eq(log_sum, log(sum) + scale * 2000, 1e-6, "%d: %.9g", n, log_sum);
    }
}

// RoPE's hands stand right far into a long text, where a float has too few digits for the angle.
Test(maths, rope_far_away) {
    const int position = 100000;
    float cos_sin[8];
    Bench b;
    bench_open(&b, G, 1);
    rope_angles(&b.model, position, cos_sin);
    for (int pair = 0; pair < 4; pair++) {
        const double angle = position * pow(10000, -pair / 4.);
        const float *hand = cos_sin + 2 * pair;
        cr_assert_float_eq(hand[0], cos(angle), 1e-6, "cosine %d: %g", pair, (double)hand[0]);
        cr_assert_float_eq(hand[1], sin(angle), 1e-6, "sine %d: %g", pair, (double)hand[1]);
    }
    bench_close(&b);
}

// A float made of our cosine or sine is the one that is made of libm's, or its neighbour; next to
// multiples of pi / 2, where little is left of either, and for angles as large as positions get.
Test(maths, cosines_and_sines) {
    for (int i = 0; i < 200000; i++) {
        const double u = unit(7, (uint64_t)i) + unit(8, (uint64_t)i) * 0x1p-24;
        const double angle[] = {
            u * 7 - 3.5, u * 10000, u * 0x1p28, -u * 0x1p28,
            i * 1.5707963267948966, i * 1342 * 1.5707963267948966,
        };
        for (int k = 0; k < 6; k++) {
            double hand[2];
            cos_sin_of(angle[k], &hand[0], &hand[1]);
            for (int j = 0; j < 2; j++) {
                const float got = (float)hand[j];
                const float want = (float)(j ? sin(angle[k]) : cos(angle[k]));
                cr_assert(got == want || nextafterf(got, want) == want, "%s of %.17g: %.9g, not %.9g",
                          j ? "sine" : "cosine", angle[k], (double)got, (double)want);
            }
        }
    }
}

// ---- the noise

// The generator is the documented one: these values were computed from the description in Python;
// the first two are well-known outputs of splitmix64.
Test(noise, generator) {
    cr_assert_eq(within(1234567, 0), 6457827717110365317u);
    cr_assert_eq(within(1234567, 1), 3203168211198807973u);

    const struct {
        uint64_t key;
        uint32_t j, bits;
    } draws[] = {
        {0, 0, 0},
        {0, 1, 0xc46310},
        {1, 0, 0x6d3fa},
        {1ull << 32, 0, 0xd35b8b},
        {420, 1, 0x364567},
        {0xdeadbeefcafef00d, 0, 0x8df90b},
        {0xdeadbeefcafef00d, 4096, 0xdd5171},
        {UINT64_MAX, UINT32_MAX, 0xba3e55},
    };
    for (int i = 0; i < 8; i++)
        cr_assert_eq(uniform(draws[i].key, draws[i].j), (float)draws[i].bits * 0x1p-24f, "%d", i);

    Model model = {.config.n_layers = 12};
    Sequence s = sequence_new((Noise){.seed = 420});
    Row row = {.position = 17, .sequence = &s};
    const uint64_t query = place_of(&model, &row, SITE_K, 11, 3).hash;
    cr_assert_eq(within(query, 9), 0xd948a38d34ba32c3u); // as it reads the key at position 9
}

// A place has the dose of its site and layer, and none where the row is sober, where the sequence
// is, or in the sink.
Test(noise, the_dose_of_a_place) {
    Bench b;
    bench_open(&b, G, 1);
    Sequence s = sequence_new(bench_noise(&b, ALL_SITES, FAMILY_UPSTREAM));
    Sequence sober = sequence_new((Noise){0});
    for (int site = 0; site < N_SITES; site++)
        for (int layer = 0; layer < 3; layer++) {
            const float dose = bench_dose(site, layer);
            Row row = {.position = 6, .sequence = &s, .drugged = true};
            Place place = place_of(&b.model, &row, site, layer, 0);
            cr_assert_eq(place.theta, dose, "%c, layer %d: %g", SITES[site], layer, place.theta);
            cr_assert_eq(place.family, FAMILY_UPSTREAM);
            row.position = 5;
            cr_assert_eq(place_of(&b.model, &row, site, layer, 0).theta, 0, "in the sink");
            row = (Row){.position = 6, .sequence = &s};
            cr_assert_eq(place_of(&b.model, &row, site, layer, 0).theta, 0, "a sober row");
            row = (Row){.position = 6, .sequence = &sober, .drugged = true};
            cr_assert_eq(place_of(&b.model, &row, site, layer, 0).theta, 0, "a sober sequence");
        }
    bench_close(&b);
}

static double dot_in_double(const float *a, const float *b, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

static double cosine(const float *a, const float *b, int n) {
    double lengths = sqrt(dot_in_double(a, a, n) * dot_in_double(b, b, n));
    return dot_in_double(a, b, n) / lengths;
}

// A glitch keeps the length of a vector and turns it by theta * U(0): by any angle from 0 to theta,
// as often by each; and towards u, not away from it. turn() does the same in place.
Test(noise, turns_by_the_angle_it_draws) {
    enum { DRAWS = 20000 };
    const int sizes[] = {8, 10, 16, 64, 333};
    const float thetas[] = {3.1f, .3f};
    double sum = 0; // of angle / theta, and of its square
    double squares = 0;
    double worst_length = 0;
    double worst_angle = 0;
    for (uint64_t i = 0; i < DRAWS; i++) {
        float x[333], u[333], r[333], turned[333];
        const int n = sizes[i % 5];
        const float theta = thetas[i % 2];
        const int family = i / 2 % 2 ? FAMILY_UPSTREAM : FAMILY_CENTRED;
        const Place place = {scramble(i), theta, family};
        for (int j = 0; j < n; j++)
            x[j] = 8 * unit(i, (uint64_t)j) - 3;
        Glitch glitch = draw_glitch(place, x, n, u);
        for (int j = 0; j < n; j++)
            r[j] = x[j] * glitch.a + u[j] * glitch.b;
        double angle = acos(fmin(1, cosine(r, x, n)));
        double drawn = (double)theta * (double)uniform(place.hash, 0);
        double stretch = sqrt(dot_in_double(r, r, n) / dot_in_double(x, x, n));
        worst_length = fmax(worst_length, fabs(stretch - 1));
        // acos is steep near 1: an error e of the cosine is one of e / sin(a) in the angle
        worst_angle = fmax(worst_angle, fabs(angle - drawn) * sin(drawn));
        sum += angle / (double)theta;
        squares += pow(angle / (double)theta, 2);
        cr_assert(glitch.b >= 0, "away from u: %g", glitch.b);
        memcpy(turned, x, sizeof x);
        turn(place, turned, n, u);
        cr_assert(same(turned, r, (size_t)n), "turn()");
    }
    cr_assert(worst_length < 1e-5, "%g", worst_length); // observed 5e-7
    cr_assert(worst_angle < 1e-5, "%g", worst_angle);   // 3e-7
    cr_assert_float_eq(sum / DRAWS, .5, .01);           // scatters by .002
    cr_assert_float_eq(squares / DRAWS, 1. / 3, .01);   // as for any number uniform in [0, 1)
}

// Centred directions prefer none. The original's lean towards (1, ..., 1): they have a cosine of
// sqrt(3)/2 with it and .75 with each other.
static void check_family(int family, double want_with_ones, double want_with_last) {
    enum { DIM = 256, DRAWS = 2000 };
    float ones[DIM], u[DIM], last[DIM];
    double with_ones = 0;
    double with_last = 0;
    for (int i = 0; i < DIM; i++)
        ones[i] = 1;
    for (uint64_t i = 0; i < DRAWS; i++) {
        draw_glitch((Place){scramble(i), 1, family}, ones, DIM, u);
        with_ones += cosine(u, ones, DIM) / DRAWS;
        if (i)
            with_last += cosine(u, last, DIM) / (DRAWS - 1);
        memcpy(last, u, sizeof u);
    }
    // one draw scatters by .06 or less, so the mean of 2000 by .0014
    cr_assert_float_eq(with_ones, want_with_ones, .006, "%s: %g", FAMILIES[family], with_ones);
    cr_assert_float_eq(with_last, want_with_last, .006, "%s: %g", FAMILIES[family], with_last);
}

Test(noise, families) {
    check_family(FAMILY_CENTRED, 0, 0);
    check_family(FAMILY_UPSTREAM, sqrt(.75), .75);
}

// A vector of zeros has no direction to turn from, and stays. So does one that points where u does.
Test(noise, zero_stays_zero) {
    float x[10] = {0}, u[10];
    Glitch glitch = draw_glitch((Place){1, 1, FAMILY_CENTRED}, x, 10, u);
    cr_assert(glitch.a == 1 && glitch.b == 0, "x %g, u %g", glitch.a, glitch.b);
    // Parallel, as far as floats can be: what is left of u across x is rounding.
    for (uint64_t i = 0; i < 2000; i++) {
        const float a[2] = {unit(30, i) - .5f, unit(31, i) - .5f};
        const float by = 4 * unit(32, i) - 2;
        const float b[2] = {a[0] * by, a[1] * by};
        glitch = rotation(a, b, 2, 1);
        cr_assert(glitch.a == 1 && glitch.b == 0, "case %d: x %g, u %g", (int)i, glitch.a, glitch.b);
    }
}

// Reads n tokens soberly and with these angles: the bits must be the same.
static void expect_no_noise(const float *theta, int n) {
    static float sober[N * MOST_VOCAB], logits[N * MOST_VOCAB];
    Bench b;
    bench_open(&b, G, N);
    Sequence a = sequence_new((Noise){0});
    Sequence s = sequence_new((Noise){.theta = theta});
    read_on(&b, &a, G_TOKENS, n, n, sober);
    read_on(&b, &s, G_TOKENS, n, n, logits);
    cr_assert(same(logits, sober, (size_t)(n * G.vocab_size)), "%d tokens: other logits", n);
    cr_assert(same_cache(&b, &a, &s), "%d tokens: another cache", n);
    feed(&b.run, &a, G_TOKENS, 8, DRUGGED); // drugged, but with nothing
    cr_assert_eq(cold_shower(&b.run, &a), 0);
    sequence_free(&b.model, &a);
    sequence_free(&b.model, &s);
    bench_close(&b);
}

// No dose, no change: with every theta 0 all bits are those of the sober model. The same holds for
// the first six positions at any dose, because the attention sink is left alone.
Test(noise, none_without_a_dose_or_in_the_sink) {
    float nothing[N_SITES * 3] = {0};
    float much[N_SITES * 3];
    for (int i = 0; i < N_SITES * 3; i++)
        much[i] = 3;
    expect_no_noise(nothing, N);
    expect_no_noise(much, 6);
}

// A glitch in layer 1 changes nothing before it. H enters the cache of its own layer; K and V are
// turned on reading only, Q and A behind it, so these four show in the layer above first.
Test(noise, each_site_changes_what_comes_after_it) {
    static float sober[N * MOST_VOCAB], logits[N * MOST_VOCAB];
    Bench b;
    bench_open(&b, G, N);
    const ptrdiff_t kv_dim = b.model.config.kv_dim;
    const size_t n = (size_t)kv_dim;
    Sequence a = sequence_new((Noise){0});
    read_on(&b, &a, G_TOKENS, N, N, sober);
    for (int site = 0; site < N_SITES; site++) {
        const int first_changed = site == SITE_H ? 1 : 2; // layer
        float theta[N_SITES * 3] = {0};
        theta[site * 3 + 1] = .5f;
        Sequence s = sequence_new((Noise){.seed = SEED, .theta = theta});
        read_on(&b, &s, G_TOKENS, N, 4, logits);
        for (int r = 0; r < N; r++) {
            const ptrdiff_t at = r * kv_dim;
            for (int l = 0; l < 3; l++) {
                const bool untouched = r < 6 || l < first_changed;
                cr_assert_eq(same(s.k[l] + at, a.k[l] + at, n), untouched,
                             "noise at %c: key %d of layer %d", SITES[site], r, l);
                cr_assert_eq(same(s.v[l] + at, a.v[l] + at, n), untouched,
                             "noise at %c: value %d of layer %d", SITES[site], r, l);
            }
            const ptrdiff_t row = (ptrdiff_t)r * G.vocab_size;
            cr_assert_eq(same(logits + row, sober + row, (size_t)G.vocab_size), r < 6,
                         "noise at %c: logits of row %d", SITES[site], r);
        }
        sequence_free(&b.model, &s);
    }
    sequence_free(&b.model, &a);
    bench_close(&b);
}

// Writes n tokens behind a sober prompt, always the most probable one, as drugs does. logits: those
// after the last one.
static void write_on(Bench *b, Sequence *s, int n, int *tokens, float *logits) {
    const int vocab_size = b->model.config.vocab_size;
    const float *next = feed(&b->run, s, G_TOKENS, N, WANTS_LOGITS);
    for (int i = 0; i < n; i++) {
        tokens[i] = argmax(next, vocab_size);
        next = feed(&b->run, s, &tokens[i], 1, DRUGGED | WANTS_LOGITS);
    }
    memcpy(logits, next, (size_t)vocab_size * sizeof *next);
}

// The same seed writes the same text and ends with the same logits; another seed and the other
// family do not.
Test(noise, repeats_itself) {
    enum { ONCE, AGAIN, OTHER_SEED, OTHER_FAMILY, N_TEXTS };
    static float logits[N_TEXTS][MOST_VOCAB];
    int tokens[N_TEXTS][30];
    Bench b;
    bench_open(&b, G, N);
    for (int i = 0; i < N_TEXTS; i++) {
        Sequence s = sequence_new(bench_noise(&b, ALL_SITES, FAMILY_CENTRED));
        if (i == OTHER_SEED)
            s.noise.seed++;
        if (i == OTHER_FAMILY)
            s.noise.family = FAMILY_UPSTREAM;
        write_on(&b, &s, 30, tokens[i], logits[i]);
        sequence_free(&b.model, &s);
    }
    cr_assert(!memcmp(tokens[ONCE], tokens[AGAIN], sizeof *tokens));
    cr_assert(same(logits[ONCE], logits[AGAIN], G.vocab_size));
    for (int i = OTHER_SEED; i < N_TEXTS; i++) {
        cr_assert(memcmp(tokens[ONCE], tokens[i], sizeof *tokens), "text %d is the same", i);
        // the first word is chosen by a sober row
        cr_assert_eq(tokens[ONCE][0], tokens[i][0], "text %d begins otherwise", i);
    }
    bench_close(&b);
}

// ---- doses over the depth

// At site V, layers first to last get the whole dose, all others none.
static void expect_layers(const Dose *dose, int n_layers, int first, int last) {
    float theta[N_SITES * 60];
    Dose doses[N_SITES] = {{0}};
    doses[SITE_V] = *dose;
    dose_layers(theta, doses, n_layers);
    for (int site = 0; site < N_SITES; site++)
        for (int layer = 0; layer < n_layers; layer++) {
            const bool dosed = site == SITE_V && layer >= first && layer <= last;
            const float want = dosed ? (float)dose->theta : 0;
            const float got = theta[site * n_layers + layer];
            cr_assert_eq(got, want, "%c, layer %d of %d: %g", SITES[site], layer, n_layers, got);
        }
}

// The layers that upstream's documents name for depth .4 and two spreads.
Test(doses, ceil_reaches_the_known_layers) {
    Dose dose = {.3, MODE_CEIL, 3, {{.4 - 5. / 32, 0}, {.4, 1}, {.4 + 5. / 32, 0}}};
    expect_layers(&dose, 32, 8, 17);
    expect_layers(&dose, 60, 15, 33);
    dose = (Dose){.3, MODE_CEIL, 3, {{.4 - .1, 0}, {.4, 1}, {.4 + .1, 0}}};
    expect_layers(&dose, 32, 10, 16);
    dose = (Dose){.theta = .3};
    expect_layers(&dose, 32, 0, 31);
}

static void expect_dose(const Dose *dose, double depth, double want) {
    double got = dose_at(dose, (float)depth);
    cr_assert_float_eq(got, want, 1e-12, "mode %d at depth %g: %g", dose->mode, depth, got);
}

// The three modes between points; the nearest point outside; the larger of two ratios at one depth
// with ceil and interpolate (a step, not a division by 0); points in any order on the command line.
Test(doses, modes) {
    const char *const texts[N_MODES] = {
        [MODE_CEIL] = "2@ceil:.5=1,.75=2,.25=.5",
        [MODE_FLOOR] = "2@floor:.75=2,.25=.5,.5=1",
        [MODE_INTERPOLATE] = "2@interpolate:.5=1,.25=.5,.75=2",
    };
    const double between[N_MODES] = {2, 1, 1.5};
    const double higher[N_MODES] = {4, 2, 3};
    for (int mode = 0; mode < N_MODES; mode++) {
        Dose dose = {0};
        parse_dose(&dose, 'A', texts[mode]);
        cr_assert_eq(dose.mode, mode);
        cr_assert(dose_at(&dose, 0) == 1 && dose_at(&dose, .24f) == 1);
        cr_assert(dose_at(&dose, .76f) == 4 && dose_at(&dose, 1) == 4);
        expect_dose(&dose, .375, between[mode]);
        expect_dose(&dose, .625, higher[mode]);
        // the ends are still between
        cr_assert_eq(dose_at(&dose, .25f), mode == MODE_CEIL ? 2 : 1);
        cr_assert_eq(dose_at(&dose, .75f), mode == MODE_FLOOR ? 2 : 4);

        dose = (Dose){1, mode, 4, {{.2f, 1}, {.5f, 1}, {.5f, 3}, {.8f, 3}}};
        cr_assert(dose_at(&dose, .4f) == 1 && dose_at(&dose, .6f) == 3);
        double step = dose_at(&dose, .5f);
        cr_assert(step == 1 || step == 3, "%g", step);

        dose = (Dose){1, mode, 1, {{.5f, .25f}}};
        cr_assert_eq(dose_at(&dose, .1f), .25);
        cr_assert_eq(dose_at(&dose, .5f), .25);
        cr_assert_eq(dose_at(&dose, .9f), .25);
    }
}

static void expect_points(double depth, double spread, float left, float middle, float right) {
    NoiseOptions options = {.somewhere = true, .depth = (float)depth, .spread = (float)spread};
    give_shape(&options);
    for (int site = 0; site < N_SITES; site++) {
        const Dose *dose = &options.doses[site];
        const Point *points = dose->points;
        cr_assert(dose->mode == MODE_CEIL && dose->n_points == 3, "%c", SITES[site]);
        cr_assert(points[0].depth == left && points[0].ratio == 0, "left: %g", points[0].depth);
        cr_assert(points[1].depth == middle && points[1].ratio == 1, "at %g", points[1].depth);
        cr_assert(points[2].depth == right && points[2].ratio == 0, "right: %g", points[2].depth);
    }
}

// -d and -w make a shape of three points; one without the other takes .4 or .1; without both there
// is none, and a dose that has a shape keeps it.
Test(doses, depth_and_spread_make_a_shape) {
    expect_points(.5, .25, .25f, .5f, .75f);
    expect_points(.5, NO_NOISE_OPTIONS.spread, .4f, .5f, .6f);
    expect_points(NO_NOISE_OPTIONS.depth, .2, .2f, .4f, .6f);
    expect_points(.4, .1, .3f, .4f, .5f); // the .3 that -V .5@ceil:.3=0,... has
    NoiseOptions options = NO_NOISE_OPTIONS;
    give_shape(&options);
    cr_assert_eq(options.doses[SITE_V].n_points, 0);
    options.somewhere = true;
    parse_dose(&options.doses[SITE_V], 'V', "1@floor:0=1,.9=0");
    give_shape(&options);
    cr_assert_eq(options.doses[SITE_V].n_points, 2);
    cr_assert_eq(options.doses[SITE_K].n_points, 3);
}

// What the options say about noise, over the layers of the model. Nothing: theta is NULL.
Test(doses, options_make_noise) {
    Bench b;
    bench_open(&b, G, 1);
    NoiseOptions options = NO_NOISE_OPTIONS;
    Noise noise = noise_of(&options, &b.model);
    cr_assert_null(noise.theta);
    cr_assert_eq(noise.seed, 420);
    cr_assert_eq(noise.family, FAMILY_CENTRED);

    cr_assert(take_noise_option(&options, 'K', ".5"));
    cr_assert(take_noise_option(&options, 'V', "0"));
    cr_assert(take_noise_option(&options, 'A', "2@floor:0=1,.5=0"));
    cr_assert(take_noise_option(&options, 'd', ".3"));
    cr_assert(take_noise_option(&options, 's', "7"));
    cr_assert(take_noise_option(&options, 'r', "upstream"));
    cr_assert(!take_noise_option(&options, 'i', "a prompt"));
    give_shape(&options);
    noise = noise_of(&options, &b.model);
    cr_assert_eq(noise.seed, 7);
    cr_assert_eq(noise.family, FAMILY_UPSTREAM);
    for (int site = 0; site < N_SITES; site++)
        for (int layer = 0; layer < 3; layer++) { // at the depths 0, 1/3, 2/3
            const bool k_dosed = site == SITE_K && layer == 1; // .3 +- .1
            const float got = noise.theta[site * 3 + layer];
            cr_assert_eq(got, k_dosed ? .5f : 0, "%c, layer %d: %g", SITES[site], layer, got);
        }
    free((float *)noise.theta);
    cr_assert(take_noise_option(&options, 's', "999999999999999")); // a seed keeps all its bits
    cr_assert_eq(options.seed, 999999999999999);
    bench_close(&b);
}

// ---- the cold shower

enum { MOST_WRITTEN = 64 };

// Checks that the cache is that of a model which has read the same tokens and never was drugged,
// and that both go on alike.
static void expect_sober(Bench *b, Sequence *s) {
    static float logits[MOST_VOCAB];
    const size_t vocab_size = (size_t)b->model.config.vocab_size;
    const int next = 5;
    Sequence a = sequence_new((Noise){0});
    feed(&b->run, &a, s->tokens, s->length, 0);
    cr_assert(same_cache(b, &a, s), "length %d", s->length);
    cr_assert_eq(s->first_dirty, CLEAN);
    cr_assert_eq(s->n_drugged, 0);
    memcpy(logits, feed(&b->run, &a, &next, 1, WANTS_LOGITS), vocab_size * sizeof *logits);
    cr_assert(same(logits, feed(&b->run, s, &next, 1, WANTS_LOGITS), vocab_size));
    s->length--;
    sequence_free(&b->model, &a);
}

// Checks that the cache is not that of a model which was never drugged.
static void expect_dirt(Bench *b, const Sequence *s) {
    Sequence clean = sequence_new((Noise){0});
    feed(&b->run, &clean, s->tokens, s->length, 0);
    cr_assert(!same_cache(b, &clean, s), "length %d: no trace of noise", s->length);
    sequence_free(&b->model, &clean);
}

// A shower that is to run n tokens again. What was written stays written.
static void shower_of(Bench *b, Sequence *s, int n) {
    static int tokens[MOST_WRITTEN];
    const int length = s->length;
    cr_assert_leq(length, MOST_WRITTEN);
    if (length)
        memcpy(tokens, s->tokens, (size_t)length * sizeof *tokens);
    cr_assert_eq(cold_shower(&b->run, s), n, "%d tokens", length);
    cr_assert_eq(s->length, length, "%d tokens are left of %d", s->length, length);
    cr_assert(!length || !memcmp(tokens, s->tokens, (size_t)length * sizeof *tokens));
    expect_sober(b, s);
}

// A prompt of n_prompt tokens; then three times: four drugged tokens, and a shower. The third time
// two sober tokens come between. how: DRUGGED, if the prompt is read so.
static void take_showers(const Golden *golden, int n_prompt, int how, int max_rows) {
    const int *tokens = golden->tokens;
    Bench b;
    bench_open(&b, *golden->header, max_rows);
    Sequence s = sequence_new(bench_noise(&b, ALL_SITES, FAMILY_CENTRED));
    feed(&b.run, &s, tokens, n_prompt, how);
    for (int round = 0; round < 3; round++) {
        const bool drugged_from_the_start = round == 0 && how == DRUGGED;
        const int start = drugged_from_the_start ? 0 : s.length;
        for (int k = 0; k < 4; k++)
            feed(&b.run, &s, &tokens[k], 1, DRUGGED);
        cr_assert_eq(s.n_drugged, s.length - start);
        if (round == 2)
            feed(&b.run, &s, tokens, 2, 0);
        const int first = start > 6 ? start : 6; // the sink stays clean
        const int n_dirty = s.length > first ? s.length - first : 0;
        if (n_dirty && round == 0) // else there was nothing to wash off
            expect_dirt(&b, &s);
        shower_of(&b, &s, n_dirty);
        shower_of(&b, &s, 0);
    }
    sequence_free(&b.model, &s);
    bench_close(&b);
}

// Whenever it is taken, a shower leaves nothing behind: after prompts of any length, sober or
// drugged, and a few drugged tokens, with sober ones after them (as in a chat without showers) or
// none. A second one finds nothing to do, and life goes on: drugged again, clean again.
Test(shower, leaves_a_sober_cache) {
    const int small_blocks = 3;
    for (int i = 0; i < N_GOLDEN; i++)
        for (int n_prompt = 0; n_prompt < N; n_prompt++) {
            take_showers(&GOLDEN[i], n_prompt, 0, N);
            take_showers(&GOLDEN[i], n_prompt, 0, small_blocks);
            take_showers(&GOLDEN[i], n_prompt, DRUGGED, N);
            take_showers(&GOLDEN[i], n_prompt, DRUGGED, small_blocks);
        }
}

// Taken after every five drugged tokens while text is being written, showers leave a sober cache
// too, and what is written until the first one is what is written without.
Test(shower, every_few_tokens) {
    static float unused[MOST_VOCAB];
    int without[30], with[30];
    int n_run_again = 0;
    Bench b;
    bench_open(&b, G, N);
    Sequence a = sequence_new(bench_noise(&b, ALL_SITES, FAMILY_CENTRED));
    Sequence s = sequence_new(a.noise);
    write_on(&b, &a, 30, without, unused);
    const float *logits = feed(&b.run, &s, G_TOKENS, N, WANTS_LOGITS);
    for (int i = 0; i < 30; i++) {
        with[i] = argmax(logits, b.model.config.vocab_size);
        if (s.n_drugged >= 5) {
            shower_of(&b, &s, 5);
            n_run_again += 5;
        }
        logits = feed(&b.run, &s, &with[i], 1, DRUGGED | WANTS_LOGITS);
    }
    cr_assert_eq(n_run_again, 25);
    cr_assert(!memcmp(with, without, 6 * sizeof *with));
    cr_assert(!same_cache(&b, &a, &s));
    sequence_free(&b.model, &a);
    sequence_free(&b.model, &s);
    bench_close(&b);
}

// ---- the tokenizer

// A tiny model.
static const FileHeader TINY = {
    .magic = "drugs.c", .version = 3, .dim = 1, .hidden_dim = 1, .n_layers = 1, .n_heads = 1,
    .n_kv_heads = 1, .head_dim = 2, .seq_len = 8, .shared_classifier = 1, .rope_theta = 1, .bos = 1,
};

// It gets these pieces, and the list behind them. A length of 0 is that of the string.
static void open_tiny(Bench *b, FileHeader header, Bytes pieces, int n_first, const TestPiece *list,
                      int n) {
    for (int i = 0; i < n; i++) {
        const TestPiece *piece = &list[i];
        int length = piece->length ? piece->length : (int)strlen(piece->bytes);
        append_made_piece(&pieces, piece->score, piece->kind, piece->bytes, length, piece->left);
    }
    header.vocab_size = n_first + n;
    bench_open_with(b, header, pieces, 1);
}

// A vocabulary in the manner of SentencePiece: the first pieces, then these.
static void vocabulary(Bench *b, int flags, const TestPiece *list, int n) {
    const bool byte_pieces = flags & BYTE_PIECES;
    FileHeader header = TINY;
    header.text_flags = flags;
    open_tiny(b, header, first_pieces(byte_pieces), byte_pieces ? BEHIND_BYTES : FIRST_BYTE, list,
              n);
}

// Checks the tokens of a text (without BOS). Numbers count from the first piece of the list, which
// is `base`; a negative one stands for a piece before it: -1 - id.
static void expect_tokens(const Bench *b, int base, const char *text, int n, const int *want) {
    int n_tokens;
    int *tokens = plain_tokens(&b->model, text, strlen(text), false, &n_tokens);
    cr_assert_eq(n_tokens, n, "'%s': %d tokens", text, n_tokens);
    for (int i = 0; i < n; i++) {
        const int id = want[i] < 0 ? -1 - want[i] : base + want[i];
        cr_assert_eq(tokens[i], id, "'%s': token %d is %d", text, i, tokens[i]);
    }
    free(tokens);
}
#define EXPECT_TOKENS(b, base, text, ...) \
    expect_tokens(b, base, text, sizeof (int[]){__VA_ARGS__} / sizeof(int), (int[]){__VA_ARGS__})

// Prints tokens as drugs does and returns the text; the caller frees it.
static char *decode(const Bench *b, const int *tokens, int n, size_t *n_text) {
    char *text;
    Printer printer = {.to = open_memstream(&text, n_text), .at_start = true};
    for (int i = 0; i < n; i++)
        print_token(&printer, &b->model, tokens[i]);
    print_rest(&printer);
    fclose(printer.to);
    return text;
}

enum { TOK_A, TOK_B, TOK_C, TOK_D, TOK_AB, TOK_BC, TOK_ABC, TOK_AA, TOK_CD, TOK_ABCD, TOK_SPACE,
       TOK_SPACE_A, N_ABC };
static const TestPiece ABC[N_ABC] = {
    [TOK_A] = {"a", 0, NORMAL, 0, 0},
    [TOK_B] = {"b", 0, NORMAL, 0, 0},
    [TOK_C] = {"c", 0, NORMAL, 0, 0},
    [TOK_D] = {"d", 0, NORMAL, 0, 0},
    [TOK_AB] = {"ab", 0, NORMAL, 0, -2},
    [TOK_BC] = {"bc", 0, NORMAL, 0, -1},
    [TOK_ABC] = {"abc", 0, NORMAL, 0, -5},
    [TOK_AA] = {"aa", 0, NORMAL, 0, -3},
    [TOK_CD] = {"cd", 0, NORMAL, 0, -1},
    [TOK_ABCD] = {"abcd", 0, NORMAL, 0, -9},
    [TOK_SPACE] = {" ", 0, NORMAL, 0, 0},
    [TOK_SPACE_A] = {" a", 0, NORMAL, 0, -4},
};

// Merging by hand: the best score first, the leftmost of equals, over several levels, and only
// neighbours whose union is a piece.
Test(tokenizer, merges_in_the_order_of_scores) {
    const int base = BEHIND_BYTES;
    Bench b;
    vocabulary(&b, BYTE_PIECES, ABC, N_ABC);
    EXPECT_TOKENS(&b, base, "ab", TOK_AB);
    EXPECT_TOKENS(&b, base, "abc", TOK_ABC);        // bc first, then a + bc
    EXPECT_TOKENS(&b, base, "aaa", TOK_AA, TOK_A);  // leftmost of two equal pairs
    EXPECT_TOKENS(&b, base, "bcd", TOK_BC, TOK_D);  // bc and cd are equal: leftmost
    EXPECT_TOKENS(&b, base, "abcd", TOK_ABCD);      // bc, abc, abcd
    EXPECT_TOKENS(&b, base, "acd", TOK_A, TOK_CD);
    EXPECT_TOKENS(&b, base, "ba a\xE2\x96\x81" "a", TOK_B, TOK_A, TOK_SPACE_A, TOK_SPACE_A);
    EXPECT_TOKENS(&b, base, "d\xC3\xA9", TOK_D, -1 - (FIRST_BYTE + 0xC3), -1 - (FIRST_BYTE + 0xA9));
    bench_close(&b);
}

// With a space in front, if the vocabulary wants one; not printed again, and none before nothing.
Test(tokenizer, puts_a_space_in_front) {
    const int base = BEHIND_BYTES;
    const int two[] = {1, base + TOK_SPACE_A, base + TOK_SPACE_A};
    size_t n_text;
    Bench b;
    vocabulary(&b, BYTE_PIECES | PREFIX_SPACE, ABC, N_ABC);
    EXPECT_TOKENS(&b, base, "a", TOK_SPACE_A);
    EXPECT_TOKENS(&b, base, "ab", TOK_SPACE, TOK_AB);    // ab (-2) before " a" (-4)
    EXPECT_TOKENS(&b, base, "aab", TOK_SPACE_A, TOK_AB); // ab, then " a"; aa came too late
    char *text = decode(&b, two, 3, &n_text);
    cr_assert_str_eq(text, "a a");
    free(text);
    bench_close(&b);

    vocabulary(&b, BYTE_PIECES, ABC, N_ABC);
    text = decode(&b, two, 3, &n_text);
    cr_assert_str_eq(text, " a a");
    free(text);
    bench_close(&b);
}

// BOS stands in front, if it is wanted and if the model has one; also of an empty text.
Test(tokenizer, begins_with_bos) {
    const int flags[] = {BYTE_PIECES, BYTE_PIECES | PREFIX_SPACE};
    for (int i = 0; i < 2; i++) {
        int n;
        Bench b;
        vocabulary(&b, flags[i], ABC, N_ABC);
        int *tokens = plain_tokens(&b.model, "", 0, true, &n);
        cr_assert_eq(n, 1);
        cr_assert_eq(tokens[0], 1);
        free(tokens);
        tokens = plain_tokens(&b.model, "c", 1, true, &n);
        cr_assert_eq(tokens[0], 1);
        cr_assert_eq(tokens[n - 1], BEHIND_BYTES + TOK_C);
        free(tokens);
        b.model.config.bos = -1;
        free(plain_tokens(&b.model, "", 0, true, &n));
        cr_assert_eq(n, 0);
        bench_close(&b);
    }
}

// A character that is broken off does not take a byte of the next one with it.
Test(tokenizer, broken_characters) {
    const TestPiece list[] = {{"\xC3\xA9", 0, NORMAL, 0, 0}};
    const int c3 = -1 - (FIRST_BYTE + 0xC3);
    const int f0 = -1 - (FIRST_BYTE + 0xF0);
    Bench b;
    vocabulary(&b, BYTE_PIECES, list, 1);
    EXPECT_TOKENS(&b, BEHIND_BYTES, "\xC3\xA9", 0);
    EXPECT_TOKENS(&b, BEHIND_BYTES, "\xC3\xC3\xA9", c3, 0);
    EXPECT_TOKENS(&b, BEHIND_BYTES, "\xF0\xC3\xA9", f0, 0);
    EXPECT_TOKENS(&b, BEHIND_BYTES, "\xC3\xA9\xF0", 0, f0);
    bench_close(&b);
}

// Without byte pieces a run of unknown characters is one <unk>, printed as SentencePiece does.
// Control pieces come from no text and print nothing; user-defined ones are found whole, the
// longest first, before any merging, and nothing merges with them.
Test(tokenizer, special_pieces) {
    enum { a, b_, ab, ba, bab, lt, s, gt, aba, ss, aa, N_LIST };
    const int base = FIRST_BYTE; // there are no byte pieces
    const int unk = -1 - 0;
    const TestPiece list[N_LIST] = {
        [a] = {"a", 0, NORMAL, 0, 0},
        [b_] = {"b", 0, NORMAL, 0, 0},
        [ab] = {"ab", 0, NORMAL, 0, -1},
        [ba] = {"ba", 0, USER_DEFINED, 0, 0},
        [bab] = {"bab", 0, USER_DEFINED, 0, 0},
        [lt] = {"<", 0, NORMAL, 0, 0},
        [s] = {"s", 0, NORMAL, 0, 0},
        [gt] = {">", 0, NORMAL, 0, 0},
        [aba] = {"aba", 0, NORMAL, 0, 9},
        [ss] = {"ss", 0, CONTROL, 0, 9},
        [aa] = {"aa", 0, NORMAL, 0, 5},
    };
    Bench b;
    vocabulary(&b, 0, list, N_LIST);
    EXPECT_TOKENS(&b, base, "aXYb", a, unk, b_);
    EXPECT_TOKENS(&b, base, "XaX\xC3\xA9\xFF", unk, a, unk);
    EXPECT_TOKENS(&b, base, "<s>", lt, s, gt);
    EXPECT_TOKENS(&b, base, "ss", s, s);
    EXPECT_TOKENS(&b, base, "aba", a, ba); // not ab + a, and not the piece aba
    EXPECT_TOKENS(&b, base, "abab", a, bab);
    EXPECT_TOKENS(&b, base, "baaa", ba, aa); // not b, aa, a
    EXPECT_TOKENS(&b, base, "bb", b_, b_);
    size_t n;
    char *text = decode(&b, (int[]){1, base + a, 0, base + ss, 2, base + ba}, 6, &n);
    cr_assert_str_eq(text, "a \xE2\x81\x87 ba");
    free(text);
    bench_close(&b);
}

// The first piece of these bytes, -1 if there is none.
static int piece_of(const TestPiece *list, int n_list, const char *bytes, int n) {
    for (int i = 0; i < n_list; i++)
        if ((int)strlen(list[i].bytes) == n && !memcmp(list[i].bytes, bytes, (size_t)n))
            return i;
    return -1;
}

// Merges the leftmost best pair, again and again, and searches everything every time. Single
// characters are single bytes here. Returns the number of tokens.
static int merge_naively(const TestPiece *list, int n_list, const char *text, int *tokens) {
    int starts[128]; // (n + 1) where the symbols begin, and where the text ends
    int n = (int)strlen(text);
    for (int i = 0; i <= n; i++)
        starts[i] = i;
    for (;;) {
        int best = -1;
        int best_at = -1;
        for (int i = 0; i + 1 < n; i++) {
            int piece = piece_of(list, n_list, text + starts[i], starts[i + 2] - starts[i]);
            if (piece >= 0 && (best < 0 || list[piece].score > list[best].score)) {
                best = piece;
                best_at = i;
            }
        }
        if (best < 0)
            break;
        n--;
        for (int i = best_at + 1; i <= n; i++)
            starts[i] = starts[i + 1];
    }
    for (int i = 0; i < n; i++) {
        int piece = piece_of(list, n_list, text + starts[i], starts[i + 1] - starts[i]);
        tokens[i] = piece < 0 ? FIRST_BYTE + text[starts[i]] : BEHIND_BYTES + piece;
    }
    return n;
}

// n letters from a to d, and a zero behind them.
static void random_letters(uint64_t stream, uint64_t first, int n, char *text) {
    for (int i = 0; i < n; i++)
        text[i] = "abcd"[(int)(unit(stream, first + (uint64_t)i) * 4)];
    text[n] = '\0';
}

// The heap finds what the naive search finds, on random texts over random vocabularies with many
// equal scores.
Test(tokenizer, merges_like_a_naive_search) {
    enum { N_LIST = 60 };
    for (uint64_t v = 0; v < 40; v++) {
        char bytes[N_LIST][8];
        TestPiece list[N_LIST];
        Bench b;
        for (uint64_t p = 0; p < N_LIST; p++) {
            const int length = 1 + (int)(unit(v, p) * 6);
            const int score = (int)(-6 * unit(v, 2000 + p));
            random_letters(v, 1000 + 8 * p, length, bytes[p]);
            list[p] = (TestPiece){bytes[p], 0, NORMAL, 0, (float)score};
        }
        vocabulary(&b, BYTE_PIECES, list, N_LIST);
        for (uint64_t k = 0; k < 100; k++) {
            char text[101];
            int want[128], n_tokens;
            const int n = 1 + (int)(unit(v, 3000 + k) * 100);
            random_letters(100 + v, 128 * k, n, text);
            const int n_want = merge_naively(list, N_LIST, text, want);
            int *tokens = plain_tokens(&b.model, text, (size_t)n, false, &n_tokens);
            cr_assert_eq(n_tokens, n_want, "vocabulary %d, '%s': %d", (int)v, text, n_tokens);
            cr_assert(!memcmp(tokens, want, (size_t)n_want * sizeof *want),
                      "vocabulary %d, '%s'", (int)v, text);
            free(tokens);
        }
        bench_close(&b);
    }
}

// A text of up to 39 parts: half of them spaces and characters whole or broken, half random bytes.
static Bytes random_text(uint64_t k) {
    static const char *const parts[] = {
        " ", "a", "\xC3\xA9", "\xE2\x96\x81", "\xF0\x9F\x98\x80", "\xE2\x96",
    };
    Bytes text = {0};
    const uint64_t n = (uint64_t)(unit(7, k) * 40);
    for (uint64_t i = 0; i < n; i++) {
        const int pick = (int)(unit(8, 64 * k + i) * 12);
        const char byte = (char)(int)(unit(9, 64 * k + i) * 256);
        if (pick < 6)
            append(&text, parts[pick], strlen(parts[pick]));
        else
            append(&text, &byte, 1);
    }
    return text;
}

// The text with a space in place of each U+2581.
static Bytes with_spaces(Bytes text) {
    Bytes result = {0};
    for (size_t i = 0; i < text.n; i++) {
        const bool is_space = i + 3 <= text.n && !memcmp(text.data + i, "\xE2\x96\x81", 3);
        append(&result, is_space ? " " : &text.data[i], 1);
        if (is_space)
            i += 2;
    }
    return result;
}

// How many bytes the character at text has, of which n are left; 0 if there is none. By the table
// in Unicode's chapter 3: first and last of the first byte, first and last of the second one.
static size_t naive_character_at(const char *text, size_t n) {
    static const unsigned char table[][5] = {
        {0x00, 0x7F, 0, 0, 1},          {0xC2, 0xDF, 0x80, 0xBF, 2}, {0xE0, 0xE0, 0xA0, 0xBF, 3},
        {0xE1, 0xEC, 0x80, 0xBF, 3},    {0xED, 0xED, 0x80, 0x9F, 3}, {0xEE, 0xEF, 0x80, 0xBF, 3},
        {0xF0, 0xF0, 0x90, 0xBF, 4},    {0xF1, 0xF3, 0x80, 0xBF, 4}, {0xF4, 0xF4, 0x80, 0x8F, 4},
    };
    const unsigned char *byte = (const unsigned char *)text;
    for (int i = 0; i < 9; i++) {
        const size_t length = table[i][4];
        if (byte[0] < table[i][0] || byte[0] > table[i][1])
            continue;
        bool whole = length <= n;
        whole = whole && (length < 2 || (byte[1] >= table[i][2] && byte[1] <= table[i][3]));
        for (size_t k = 2; k < length; k++)
            whole = whole && byte[k] >= 0x80 && byte[k] <= 0xBF;
        return whole ? length : 0;
    }
    return 0;
}

// The text with U+FFFD in place of every byte that belongs to no character.
static Bytes mended(Bytes text) {
    Bytes result = {0};
    for (size_t i = 0; i < text.n;) {
        const size_t length = naive_character_at(text.data + i, text.n - i);
        append(&result, length ? &text.data[i] : "\xEF\xBF\xBD", length ? length : 3);
        i += length ? length : 1;
    }
    return result;
}

// The bytes of tokens, one piece behind the other.
static Bytes bytes_of_tokens(const Model *m, const int *tokens, int n) {
    Bytes bytes = {0};
    for (int i = 0; i < n; i++) {
        const Span piece = string_at(m, tokens[i]);
        append(&bytes, piece.bytes, (size_t)piece.length);
    }
    return bytes;
}

static bool same_bytes(Bytes a, const char *data, size_t n) {
    return a.n == n && (!n || !memcmp(a.data, data, n));
}

// Tokens have all the bytes of their text, and print it: random bytes, spaces in front, broken
// UTF-8, zeros. Only U+2581, SentencePiece's sign for a space, comes back as the space it stands
// for, and what is no character is printed as U+FFFD.
Test(tokenizer, round_trip) {
    const TestPiece list[] = {
        {" ", 0, NORMAL, 0, 0},
        {"  ", 0, NORMAL, 0, -1},
        {"\xC3\xA9", 0, NORMAL, 0, -1},
        {" \xC3\xA9", 0, NORMAL, 0, -2},
        {"\xA9 ", 0, NORMAL, 0, -1},
        {"\x96\x81", 0, NORMAL, 0, 1},
        {"\xF0\x9F\x98\x80", 0, NORMAL, 0, 1},
    };
    Bench b;
    vocabulary(&b, BYTE_PIECES | PREFIX_SPACE, list, 7);
    for (uint64_t k = 0; k < 3000; k++) {
        Bytes text = random_text(k);
        Bytes want = with_spaces(text);
        Bytes printed = mended(want);
        int n_tokens;
        int *tokens = plain_tokens(&b.model, text.data, text.n, false, &n_tokens);
        Bytes bytes = bytes_of_tokens(&b.model, tokens, n_tokens);
        size_t n_back;
        char *back = decode(&b, tokens, n_tokens, &n_back);
        const size_t prefix = text.n > 0; // the space in front
        cr_assert(same_bytes(want, bytes.data + prefix, bytes.n - prefix), "text %d", (int)k);
        cr_assert(same_bytes(printed, back, n_back), "text %d: %s", (int)k, back);
        free(tokens);
        free(back);
        free(bytes.data);
        free(text.data);
        free(want.data);
        free(printed.data);
    }
    bench_close(&b);
}

// 300 KB in one go: a chain of doublings ends in as many of the longest piece as fit.
Test(tokenizer, long_text) {
    enum { LENGTH = 300000 };
    char *text = memset(resize(NULL, LENGTH, 1), 'a', LENGTH);
    TestPiece list[7]; // a, aa, aaaa, ... 64 times a
    for (int i = 0; i < 7; i++)
        list[i] = (TestPiece){text, 1 << i, NORMAL, 0, (float)-i};
    Bench b;
    vocabulary(&b, BYTE_PIECES, list, 7);
    int n;
    int *tokens = plain_tokens(&b.model, text, LENGTH, false, &n);
    cr_assert_eq(n, LENGTH / 64 + 1);
    for (int i = 0; i < n - 1; i++)
        cr_assert_eq(tokens[i], BEHIND_BYTES + 6);
    cr_assert_eq(tokens[n - 1], BEHIND_BYTES + 5); // 300000 = 4687 * 64 + 32
    free(tokens);
    free(text);
    bench_close(&b);
}

// Prints a token all the way, so that the stream's length tells how much came out.
static void print_now(Printer *printer, const Model *m, int token) {
    print_token(printer, m, token);
    fflush(printer->to);
}

// A character that is spread over tokens is printed when it is complete; what turns out to be
// broken, as soon as that is clear.
Test(tokenizer, prints_whole_characters) {
    const int e_acute[] = {FIRST_BYTE + 0xC3, FIRST_BYTE + 0xA9};
    const int face[] = {FIRST_BYTE + 0xF0, FIRST_BYTE + 0x9F, FIRST_BYTE + 0x98, FIRST_BYTE + 0x80};
    const int letter_x = FIRST_BYTE + 'x';
    Bench b;
    vocabulary(&b, BYTE_PIECES, NULL, 0);
    const Model *m = &b.model;
    char *text;
    size_t n;
    Printer printer = {.to = open_memstream(&text, &n), .at_start = true};
    print_now(&printer, m, e_acute[0]);
    cr_assert_eq(n, 0);
    print_now(&printer, m, e_acute[1]);
    cr_assert_eq(n, 2);
    for (int i = 0; i < 4; i++) {
        print_now(&printer, m, face[i]);
        cr_assert_eq(n, i < 3 ? 2 : 6);
    }
    print_now(&printer, m, face[0]);
    print_now(&printer, m, letter_x);
    cr_assert_eq(n, 6 + 3 + 1);
    print_now(&printer, m, face[0]);
    print_rest(&printer);
    fflush(printer.to);
    cr_assert_eq(n, 13);
    print_now(&printer, m, e_acute[0]);
    print_now(&printer, m, e_acute[0]); // the one before was broken off, this one waits
    fflush(printer.to);
    cr_assert_eq(n, 16);
    print_now(&printer, m, e_acute[1]);
    cr_assert_eq(n, 18);
    const int no_lead[] = {0x80, 0xBF, 0xC0, 0xC1, 0xF5, 0xFF}; // no character begins with these
    for (int i = 0; i < 6; i++) {
        print_now(&printer, m, FIRST_BYTE + no_lead[i]);
        cr_assert_eq((int)n, 18 + 3 * (i + 1), "byte %x waits", no_lead[i]);
    }
    fclose(printer.to);
    free(text);
    bench_close(&b);
}

// Each byte that belongs to no character is printed as U+FFFD, here #.
Test(tokenizer, prints_no_broken_characters) {
    const struct {
        const char *bytes, *printed;
    } cases[] = {
        {"\x80", "#"}, {"a\xBF" "b", "a#b"},             // nothing before it
        {"\xC3", "#"}, {"\xC3" "a", "#a"},              // broken off, by the end and by a letter
        {"\xE2\x82", "##"}, {"\xE2\x82" "a", "##a"}, {"\xE2\x82\xC3\xA9", "##\xC3\xA9"},
        {"\xF0\x9F\x98", "###"}, {"\xF0\x9F\x98\xE2\x82\xAC", "###\xE2\x82\xAC"},
        {"\xC0\x80", "##"}, {"\xC1\xBF", "##"},        // longer than need be
        {"\xE0\x80\x80", "###"}, {"\xE0\x9F\xBF", "###"}, {"\xE0\xA0\x80", "\xE0\xA0\x80"},
        {"\xF0\x80\x80\x80", "####"}, {"\xF0\x8F\xBF\xBF", "####"},
        {"\xF0\x90\x80\x80", "\xF0\x90\x80\x80"},
        {"\xED\x9F\xBF", "\xED\x9F\xBF"},            // surrogates lie behind it
        {"\xED\xA0\x80", "###"}, {"\xED\xBF\xBF", "###"}, {"\xEE\x80\x80", "\xEE\x80\x80"},
        {"\xF4\x8F\xBF\xBF", "\xF4\x8F\xBF\xBF"},   // the last character of all
        {"\xF4\x90\x80\x80", "####"}, {"\xF5\x80\x80\x80", "####"}, {"\xFE\xFF", "##"},
        {"\xEF\xBF\xBD", "\xEF\xBF\xBD"},            // U+FFFD itself
    };
    Bench b;
    vocabulary(&b, BYTE_PIECES, NULL, 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int n;
        int *tokens = plain_tokens(&b.model, cases[i].bytes, strlen(cases[i].bytes), false, &n);
        size_t n_text;
        char *text = decode(&b, tokens, n, &n_text);
        Bytes want = {0};
        for (const char *c = cases[i].printed; *c; c++)
            append(&want, *c == '#' ? "\xEF\xBF\xBD" : c, *c == '#' ? 3 : 1);
        cr_assert(same_bytes(want, text, n_text), "case %zu: %s", i, text);
        free(want.data);
        free(text);
        free(tokens);
    }
    bench_close(&b);
}

// A terminal is not given what it would obey; a file gets every character as it is.
Test(tokenizer, prints_control_characters) {
    const char text[] = "\x1B[2J\a\b\r\t\n\x7F\xC2\x9B\xC2\xA0!\0z";
    const char shown[] = "<1B>[2J<07><08><0D>\t\n<7F><9B>\xC2\xA0!<00>z";
    Bench b;
    vocabulary(&b, BYTE_PIECES, NULL, 0);
    for (int terminal = 0; terminal < 2; terminal++) {
        char *printed;
        size_t n_printed;
        int n;
        int *tokens = plain_tokens(&b.model, text, sizeof text - 1, false, &n);
        Printer printer = {.to = open_memstream(&printed, &n_printed), .terminal = terminal};
        for (int i = 0; i < n; i++)
            print_token(&printer, &b.model, tokens[i]);
        fclose(printer.to);
        const char *want = terminal ? shown : text;
        cr_assert_eq(n_printed, (terminal ? sizeof shown : sizeof text) - 1, "%s", printed);
        cr_assert(!memcmp(printed, want, n_printed), "%s", printed);
        free(printed);
        free(tokens);
    }
    bench_close(&b);
}

// ---- what a vocabulary may ask for

// Checks the pieces of a source, which are spelt with a | between them.
static void expect_pieces(const Bench *b, Source source, const char *want) {
    int n;
    int *tokens = encode(&b->model, source, &n);
    Bytes spelt = {0};
    for (int i = 0; i < n; i++) {
        const Span piece = string_at(&b->model, tokens[i]);
        append(&spelt, "|", i > 0);
        append(&spelt, piece.bytes, (size_t)piece.length);
    }
    append(&spelt, "", 1);
    cr_assert_str_eq(spelt.data, want, "'%s': %s, want %s", source.bytes, spelt.data, want);
    free(spelt.data);
    free(tokens);
}

static Source source_of(const char *text) {
    return (Source){.bytes = text, .n = strlen(text)};
}

// Where spaces are put in front and taken away, and how they are printed again. In the texts
// control pieces are meant.
Test(tokenizer, spaces) {
    enum { EACH = PREFIX_SPACE | PREFIX_EACH, UNLESS = PREFIX_SPACE | PREFIX_UNLESS_SPACE };
    const TestPiece list[] = {
        {" ", 0, NORMAL, 0, 0}, {"a", 0, NORMAL, 0, 0}, {"b", 0, NORMAL, 0, 0},
        {" a", 0, NORMAL, 0, -1}, {"\n", 0, NORMAL, 0, 0}, {"<u>", 0, USER_DEFINED, 0, 0},
    };
    const struct {
        int flags;
        const char *text, *pieces, *printed; // NULL: the text
    } cases[] = {
        {0, "a a", "a| a", NULL},
        {0, " a", " a", NULL},
        {0, "\xE2\x96\x81" "a", " a", " a"},
        {PREFIX_SPACE, "", "", NULL},
        {PREFIX_SPACE, "a", " a", NULL},
        {PREFIX_SPACE, " a", " | a", NULL},
        {PREFIX_SPACE, "a<u>b", " a|<u>|b", NULL},
        {PREFIX_SPACE, "<u>a", " |<u>|a", NULL},
        {PREFIX_SPACE, "<s>a</s>a", "<s>|a|</s>|a", "aa"},
        {EACH, "a<u>b", " a|<u>| |b", "a<u> b"},
        {EACH, "<u>a", "<u>| a", "<u> a"},
        {EACH, "<s>a</s>a", "<s>| a|</s>| a", "a a"},
        {EACH, "<s></s>", "<s>|</s>", ""},
        {UNLESS, "a", " a", NULL},
        {UNLESS, " a", " a", "a"},
        {UNLESS, "<u>a", "<u>|a", NULL},
        {UNLESS, "a<u>a", " a|<u>|a", NULL},
        {EACH | UNLESS, "<u>a<u> a", "<u>| a|<u>| a", "<u> a<u> a"},
        {COLLAPSE_SPACES, "  a  b   ", "a| |b", "a b"},
        {COLLAPSE_SPACES, "   ", "", ""},
        {COLLAPSE_SPACES | PREFIX_SPACE, "  a  b   ", " a| |b", "a b"},
        {COLLAPSE_SPACES | PREFIX_SPACE, "   ", "", ""},
        {COLLAPSE_SPACES | PREFIX_SPACE, "a", " a", NULL},
        {NEWLINE_SPACE, "b\nb", "b|\n| |b", NULL},
        {NEWLINE_SPACE, "\na", "\n| a", NULL},
        {NEWLINE_SPACE, "b\n a\n", "b|\n| | a|\n| ", NULL},
        {NEWLINE_SPACE | PREFIX_SPACE, "a\n\na", " a|\n| |\n| a", NULL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Bench b;
        vocabulary(&b, BYTE_PIECES | cases[i].flags, list, 6);
        Source source = source_of(cases[i].text);
        source.controls = true;
        expect_pieces(&b, source, cases[i].pieces);
        int n;
        int *tokens = encode(&b.model, source, &n);
        size_t n_text;
        char *text = decode(&b, tokens, n, &n_text);
        const char *want = cases[i].printed ? cases[i].printed : cases[i].text;
        cr_assert_str_eq(text, want, "flags %d: '%s', want '%s'", cases[i].flags, text, want);
        free(text);
        free(tokens);
        bench_close(&b);
    }
}

// A run of unknown characters is one piece.
Test(tokenizer, unknown_characters) {
    const TestPiece list[] = {{"a", 0, NORMAL, 0, 0}, {"<u>", 0, USER_DEFINED, 0, 0}};
    Bench b;
    vocabulary(&b, 0, list, 2);
    expect_pieces(&b, source_of("axy\xC3\xA9" "az"), "a|<unk>|a|<unk>");
    expect_pieces(&b, source_of("x<u>y"), "<unk>|<u>|<unk>");
    bench_close(&b);
}

// Control pieces that are spelt in a text are found only where they are meant, and never where they
// were typed, not even in part. A user-defined piece is found everywhere; of several, the longest.
Test(tokenizer, control_pieces_that_are_meant) {
    const TestPiece list[] = {
        {"<s>x", 0, CONTROL, 0, 0}, {"<u>", 0, USER_DEFINED, 0, 0}, {"x<s", 0, END, 0, 0},
    };
    Bench b;
    vocabulary(&b, BYTE_PIECES, list, 3);
    Source source = source_of("<s>a<u></s>");
    expect_pieces(&b, source, "<|s|>|a|<u>|<|/|s|>");
    source.controls = true;
    expect_pieces(&b, source, "<s>|a|<u>|</s>");
    source.typed = (const char[11]){0};
    expect_pieces(&b, source, "<s>|a|<u>|</s>");
    source.typed = (const char[11]){1, 1, 1, 1, 1, 1, 1};
    expect_pieces(&b, source, "<|s|>|a|<u>|</s>");
    source.typed = (const char[11]){[2] = 1, [5] = 1, [7] = 1};
    expect_pieces(&b, source, "<|s|>|a|<u>|<|/|s|>");
    source.controls = false; // then typed says nothing
    expect_pieces(&b, source, "<|s|>|a|<u>|<|/|s|>");
    source = (Source){.bytes = "a<s>x<s>", .n = 8, .controls = true};
    expect_pieces(&b, source, "a|<s>x|<s>");
    source.typed = (const char[8]){[4] = 1}; // then the shorter one is meant
    expect_pieces(&b, source, "a|<s>|x|<s>");
    source.n = 7; // what lies behind the text is not seen
    expect_pieces(&b, source, "a|<s>|x|<|s");
    bench_close(&b);
}

// A text that spells BOS where it is meant gets no second one in front.
Test(tokenizer, bos_is_not_doubled) {
    const TestPiece list[] = {{" ", 0, NORMAL, 0, 0}};
    Bench b;
    vocabulary(&b, BYTE_PIECES | PREFIX_SPACE, list, 1);
    expect_pieces(&b, (Source){.bytes = "<s>a", .n = 4, .bos = true}, "<s>| |<|s|>|a");
    Source source = {.bytes = "<s>a", .n = 4, .bos = true, .controls = true};
    expect_pieces(&b, source, "<s>|a");
    source.typed = (const char[4]){1, 1, 1, 1};
    expect_pieces(&b, source, "<s>| |<|s|>|a");
    source = (Source){.bytes = "</s>a", .n = 5, .bos = true, .controls = true};
    expect_pieces(&b, source, "<s>|</s>|a");
    source = (Source){.bytes = "<s><s>", .n = 6, .bos = true, .controls = true};
    expect_pieces(&b, source, "<s>|<s>");
    b.model.config.bos = -1;
    expect_pieces(&b, source, "<s>|<s>");
    bench_close(&b);
}

// ---- byte-level vocabularies

// The automaton that section 8 of drugs.c draws: letters with one space before them, or one digit.
// Its second one finds a space: it cuts it off the words of the first.
enum { OTHER, SPACES, LETTERS, DIGITS, N_CLASSES };
enum { MATCHED = 1, TO_2 = 2 * 2, TO_3 = 2 * 3, TO_4 = 2 * 4, TO_6 = 2 * 6 };
static const Range CLASSES[] = {
    {' ', ' ', SPACES}, {'0', '9', DIGITS}, {'A', 'Z', LETTERS}, {'a', 'z', LETTERS},
    {0xC0, 0x24F, LETTERS}, {0x4E00, 0x9FFF, LETTERS}, {0xFFFD, 0xFFFD, LETTERS},
};
static const uint32_t STEPS[6][N_CLASSES + 1] = {
    {0, TO_2, TO_3, TO_4, 0},
    {0, 0, TO_3, 0, 0},
    {MATCHED, MATCHED, TO_3, MATCHED, MATCHED},
    {MATCHED, MATCHED, MATCHED, MATCHED, MATCHED},
    {0, TO_6, 0, 0, 0},
    {MATCHED, MATCHED, MATCHED, MATCHED, MATCHED},
};

// A header whose text is cut by the first automaton, or by both. The second one has its states after
// those of the first, but automaton 1 begins in state 2: so both tables change places there.
static FileHeader cut_header(int n_cutters) {
    FileHeader header = TINY;
    static const int order[6] = {0, 4, 1, 2, 3, 5}; // state i + 1 was this one
    uint32_t steps[6][N_CLASSES + 1];
    for (int state = 0; state < 6; state++)
        for (int class = 0; class <= N_CLASSES; class++) {
            uint32_t step = STEPS[order[state]][class];
            uint32_t next = 0;
            for (uint32_t i = 0; i < 6; i++)
                if (step >> 1 == (uint32_t)order[i] + 1)
                    next = i + 1;
            steps[state][class] = next * 2 + (step & 1);
        }
    header.n_cutters = n_cutters;
    header.n_states = 6;
    header.n_classes = N_CLASSES;
    append(&header.vocabulary.classes, CLASSES, sizeof CLASSES);
    append(&header.vocabulary.steps, steps, sizeof steps);
    header.vocabulary.byte_level = true;
    return header;
}

// <pad>, <s>, </s>, the 256 bytes but for those that are absent, then the list. Frees what
// cut_header took.
static void byte_level(Bench *b, FileHeader header, const char *absent, const TestPiece *list, int n) {
    Bytes pieces = {0};
    int n_first = FIRST_BYTE;
    append_piece(&pieces, 0, CONTROL, "<pad>", 5);
    append_piece(&pieces, 0, CONTROL, "<s>", 3);
    append_piece(&pieces, 0, END, "</s>", 4);
    for (int i = 0; i < 256; i++) {
        const char byte = (char)i;
        if (i && strchr(absent, byte))
            continue;
        append_piece(&pieces, 0, NORMAL, &byte, 1);
        n_first++;
    }
    open_tiny(b, header, pieces, n_first, list, n);
    free(header.vocabulary.classes.data);
    free(header.vocabulary.steps.data);
}

// Text is cut by the first cutter, and its words by the second one. What no pattern takes is a word,
// too, up to the next match. Every word here is a piece that merging cannot make, but that is taken
// whole: so there are as many tokens as words, if the words are those.
Test(cutting, words) {
    const struct {
        int n_cutters;
        const char *words; // with a | between them
    } cases[] = {
        {1, ""}, {1, "abc"}, {1, "ab| cd|1|2|3| x"}, {1, "ab| | cd"}, {1, "    "}, {1, "   | x"},
        {1, "a| !?|b|1|?? |2"}, {1, "?"}, {1, "\xC3\xA9t\xC3\xA9| \xE4\xB8\xAD"},
        {1, "ab|\xF0\x9F\x98\x80\xF0\x9F\x98\x80|cd"},
        {1, "ab\xFFzz"}, // a byte that is no character counts as U+FFFD, here a letter
        {1, "ab\xE4\xB8|?"}, {1, "\xED\xA0\x80|1"},
        {2, "ab| |cd|1|2|3| |x"}, {2, "ab| | |cd"}, {2, " | | "}, {2, "a| |!?|b"},
        {0, "ab cd 12 !?"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        TestPiece list[16];
        int n = 0;
        Bytes text = {0};
        FileHeader header = cut_header(cases[i].n_cutters);
        header.vocabulary.takes_words = true;
        for (const char *word = cases[i].words; *word; word += strcspn(word, "|")) {
            word += *word == '|';
            const int length = (int)strcspn(word, "|");
            append(&text, word, (size_t)length);
            if (length > 1) // else it is a byte
                list[n++] = (TestPiece){word, length, NORMAL, NEVER, 0};
        }
        Bench b;
        byte_level(&b, header, "", list, n);
        expect_pieces(&b, (Source){.bytes = text.data, .n = text.n}, cases[i].words);
        free(text.data);
        bench_close(&b);
    }
}

// What a cutter matches in n bytes of text is the same whatever lies after them.
Test(cutting, sees_only_its_text) {
    static const char *const parts[] = {
        "", " ", "\n", "a", "1", "'", "!", "\xC5", "\xC5\xBF", "\xE4\xB8", "\xE4\xB8\xAD", "\xF0\x9F\x98",
    };
    static const char *const after[] = {"", "\x80\x80\x80", "s", "  ", "11", "..", "\xBF"};
    enum { N_PARTS = sizeof parts / sizeof *parts, N_AFTER = sizeof after / sizeof *after };
    Bench b;
    byte_level(&b, cut_header(2), "", NULL, 0);
    for (int i = 1; i < N_PARTS * N_PARTS * N_PARTS; i++) {
        char text[16];
        const int n = sprintf(text, "%s%s%s", parts[i % N_PARTS], parts[i / N_PARTS % N_PARTS],
                              parts[i / N_PARTS / N_PARTS]);
        const int want = match(&b.model, 0, text, n);
        cr_assert(want >= 0 && want <= n, "'%s': %d", text, want);
        for (int k = 0; k < N_AFTER; k++) {
            strcpy(text + n, after[k]);
            cr_assert_eq(match(&b.model, 0, text, n), want, "%d bytes of '%s'", n, text);
        }
    }
    bench_close(&b);
}

// Merges stay within words, and a prefix is cut with the text.
Test(cutting, merges_stay_within_words) {
    const TestPiece list[] = {
        {" a", 0, NORMAL, 0, -1}, {"a ", 0, NORMAL, 0, 9}, {"ab", 0, NORMAL, 0, -2},
        {"b1", 0, NORMAL, 0, 9}, {"12", 0, NORMAL, 0, -1}, {" 1", 0, NORMAL, 0, -3},
    };
    FileHeader header = cut_header(1);
    Bench b;
    byte_level(&b, header, "", list, 6);
    expect_pieces(&b, source_of("a ab12 1"), "a| a|b|1|2| |1");
    bench_close(&b);
    header = cut_header(1);
    header.text_flags = PREFIX_SPACE | PREFIX_UNLESS_SPACE;
    byte_level(&b, header, "", list, 6);
    expect_pieces(&b, source_of("a a"), " a| a");
    expect_pieces(&b, source_of(" a"), " a");
    expect_pieces(&b, source_of("\xE2\x96\x81"), " |\xE2|\x96|\x81"); // only a space is a space
    bench_close(&b);
    header = cut_header(2);
    byte_level(&b, header, "", list, 6);
    expect_pieces(&b, source_of("a ab12 1"), "a| |ab|1|2| |1");
    bench_close(&b);
}

// A piece may say of which two halves it is made, and a table may name more of them, each with a
// score of its own. What no halves make does not come out of merging, but may be taken whole.
Test(tokenizer, halves) {
    const struct {
        int left;            // of "the", with "he" before "th"
        int more_left;       // of a further merge, 0: none
        float more_score;
        const char *the, *rest; // the pieces of "the" and of "bather"
    } cases[] = {
        {0, 0, 0, "the", "b|a|the|r"},  // t + he
        {1, 0, 0, "the", "b|a|the|r"},
        {2, 0, 0, "t|he", "b|a|t|he|r"}, // th + e: never, for he is there first
        {2, 1, -5, "the", "b|a|t|her"}, // her (-4) before the (-5)
        {2, 1, -3, "the", "b|a|the|r"},
        {NEVER, 0, 0, "t|he", "b|a|t|her"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (int is_byte_level = 0; is_byte_level < 2; is_byte_level++) {
            const bool has_her = i == 3 || i == 4 || i == 5;
            const TestPiece list[] = {
                {"he", 0, NORMAL, 1, 0}, {"th", 0, NORMAL, 1, -2},
                {"the", 0, NORMAL, cases[i].left, -1}, {"her", 0, NORMAL, has_her ? 2 : NEVER, -4},
            };
            FileHeader header = is_byte_level ? cut_header(1) : TINY;
            const FurtherMerge more = {BEHIND_BYTES + 2, (uint32_t)cases[i].more_left,
                                       cases[i].more_score};
            append(&header.vocabulary.merges, &more, cases[i].more_left ? sizeof more : 0);
            header.text_flags = is_byte_level ? 0 : BYTE_PIECES;
            Bench b;
            if (is_byte_level)
                byte_level(&b, header, "", list, 4);
            else
                open_tiny(&b, header, first_pieces(true), BEHIND_BYTES, list, 4);
            expect_pieces(&b, source_of("the"), cases[i].the);
            expect_pieces(&b, source_of("bather"), cases[i].rest);
            free(header.vocabulary.merges.data);
            bench_close(&b);
        }
    }
}

// A word that is a piece is taken whole where the vocabulary says so.
Test(tokenizer, a_word_is_taken_whole) {
    const TestPiece list[] = {
        {"ab", 0, NORMAL, 1, 0}, {"abc", 0, NORMAL, NEVER, 9}, {" abc", 0, NORMAL, NEVER, 9},
        {"bc", 0, NORMAL, 1, -1},
    };
    for (int takes_words = 0; takes_words < 2; takes_words++) {
        FileHeader header = cut_header(1);
        header.vocabulary.takes_words = takes_words;
        Bench b;
        byte_level(&b, header, "", list, 4);
        expect_pieces(&b, source_of("abc abc abcd"),
                      takes_words ? "abc| abc| |ab|c|d" : "ab|c| |ab|c| |ab|c|d");
        bench_close(&b);
    }
}

// A byte that is no piece is left out, and its neighbours become neighbours.
Test(tokenizer, bytes_without_a_piece) {
    const TestPiece list[] = {{"ab", 0, NORMAL, 0, 0}};
    Bench b;
    byte_level(&b, cut_header(1), "\xC3x", list, 1);
    expect_pieces(&b, source_of("axb"), "ab");
    expect_pieces(&b, source_of("x"), "");
    expect_pieces(&b, source_of("\xC3\xA9" "a"), "\xA9|a");
    b.model.config.unknown = 0; // then it is the unknown piece, once in a row
    expect_pieces(&b, source_of("axxb"), "a|<pad>|b");
    bench_close(&b);
}

// A character that is no piece, but that pieces are made of, takes part in merging. If it is left
// over, it becomes its bytes, or what is unknown.
Test(tokenizer, characters_that_only_merge) {
    const TestPiece list[] = {{"a", 0, NORMAL, 0, 0}, {"a\xC3\xA9", 0, NORMAL, 0, 0}};
    for (int has_bytes = 0; has_bytes < 2; has_bytes++) {
        Bench b;
        vocabulary(&b, has_bytes ? BYTE_PIECES : 0, list, 2);
        expect_pieces(&b, source_of("a\xC3\xA9" "a"), "a\xC3\xA9|a");
        expect_pieces(&b, source_of("\xC3\xA9" "a"), has_bytes ? "\xC3|\xA9|a" : "<unk>|a");
        bench_close(&b);
    }
}

// Text of a megabyte: words in several languages; one letter; digits; spaces; line feeds; random
// bytes.
enum { N_LONG = 6, LONG = 1000000 };
static char *long_text(int kind) {
    static const char *const words[] = {
        "the ", "theory", " 1234", "'s", "\xC3\xA9t\xC3\xA9 ", "\xE4\xB8\xAD", " \n\n", "!?",
        "\xF0\x9F\x98\x80", "\xE3\x80\x80",
    };
    char *text = resize(NULL, LONG + 16, 1);
    for (int at = 0; at < LONG;) {
        const double u = (double)unit(11, (uint64_t)at);
        const char byte = kind == 5 ? (char)(int)(u * 256) : "?a1 \n"[kind];
        const char *word = words[(int)(u * 10)];
        const int length = kind ? 1 : (int)strlen(word);
        memcpy(text + at, kind ? &byte : word, (size_t)length);
        at += length;
    }
    return text;
}

// With any number of cutters a long text is done in reasonable time, and comes back whole.
Test(cutting, a_megabyte) {
    const TestPiece list[] = {
        {"the", 0, NORMAL, 1, -1}, {"he", 0, NORMAL, 1, 0}, {"aa", 0, NORMAL, 1, 0},
        {"aaaa", 0, NORMAL, 2, -1}, {"  ", 0, NORMAL, 1, 0}, {"\n\n", 0, NORMAL, 1, 0},
        {"12", 0, NORMAL, 0, 0}, {" ", 0, NORMAL, 0, 0},
    };
    for (int n_cutters = 0; n_cutters <= 2; n_cutters++) {
        Bench b;
        if (n_cutters)
            byte_level(&b, cut_header(n_cutters), "", list, 8);
        else
            vocabulary(&b, BYTE_PIECES, list, 8);
        for (int kind = 0; kind < N_LONG; kind++) {
            char *text = long_text(kind);
            int n;
            int *tokens = plain_tokens(&b.model, text, LONG, false, &n);
            size_t at = 0;
            for (int i = 0; i < n; i++) {
                const Span piece = string_at(&b.model, tokens[i]);
                const bool same = !memcmp(text + at, piece.bytes, (size_t)piece.length);
                cr_assert(same, "%d cutters, text %d, byte %zu", n_cutters, kind, at);
                at += (size_t)piece.length;
            }
            cr_assert_eq(at, LONG);
            free(tokens);
            free(text);
        }
        bench_close(&b);
    }
}

// ---- dice

// Draws 10000 times, evenly. Each token must come as often as softmax(logits / temperature) says,
// among the fewest tokens that have top_p together.
static void check_dice(double temperature, double top_p, int want_kept) {
    enum { DRAWS = 10000 };
    const float logits[6] = {.5f, 2, -1, 1.5f, 0, -3};
    const int order[6] = {1, 3, 0, 4, 2, 5}; // from the most probable on
    const Dice dice = {temperature, top_p};
    double p[6];
    double sum = 0;
    double kept = 0;
    int n_kept = 0;
    int counts[6] = {0};
    for (int t = 0; t < 6; t++) {
        p[t] = exp((double)logits[t] / temperature);
        sum += p[t];
    }
    while (n_kept < 6 && kept < top_p * sum * (1 - 1e-12))
        kept += p[order[n_kept++]];
    cr_assert_eq(n_kept, want_kept, "temperature %g, top_p %g: %d", temperature, top_p, n_kept);
    for (int k = 0; k < DRAWS; k++)
        counts[sample(logits, 6, &dice, (k + .5) / DRAWS)]++;
    for (int i = 0; i < 6; i++) {
        const int token = order[i];
        const double want = i < n_kept ? p[token] / kept : 0;
        cr_assert_float_eq((double)counts[token] / DRAWS, want, 2. / DRAWS,
                           "temperature %g, top_p %g: token %d %d times", temperature, top_p, token,
                           counts[token]);
    }
    const Dice first_only = {temperature, 1e-6};
    for (int k = 0; k < 100; k++)
        cr_assert_eq(sample(logits, 6, &first_only, k / 100.), argmax(logits, 6));
}

// Of one token only, sampling is argmax.
Test(sampling, follows_the_probabilities) {
    check_dice(1.6, 1, 6);
    check_dice(.7, 1, 6);
    check_dice(1.6, .8, 3);
    check_dice(.7, .8, 2);
    cr_assert_eq(argmax((float[]){1, 3, 3}, 3), 1); // the first of equals
}

// A draw depends on seed and position alone. It has a site of its own, far from those of the noise:
// when one is added there, -t still writes the texts that it wrote.
Test(sampling, draws_at_a_place_of_its_own) {
    enum { EQUALS = 100 };
    const float logits[EQUALS] = {0}; // so the token says what was drawn
    const Dice dice = {1, 1};
    const Dice no_dice = {0, 1};
    const int first_tokens[] = {98, 22, 11, 72, 14};
    for (int position = 0; position < 5; position++) {
        int token = choose(logits, EQUALS, &dice, 420, position);
        cr_assert_eq(token, first_tokens[position], "position %d: %d", position, token);
        uint64_t key = within(within(420, SITE_SAMPLE), position);
        cr_assert_eq(token, (int)(uniform(key, 0) * EQUALS));
        cr_assert_eq(choose(logits, EQUALS, &no_dice, 420, position), 0);
    }
}

// ---- talking

// Answers to three tokens with up to n_new, printed nowhere. The caller frees run and sequence.
static Talk talk_silently(Bench *b, const Options *options, FILE *nowhere) {
    Talk talk = {
        .options = options,
        .sequence = sequence_new((Noise){0}),
        .printer = {.to = nowhere},
    };
    cr_assert_not_null(nowhere);
    run_init(&talk.run, &b->model, 8, 1);
    return talk;
}

static void stop_talking(Talk *talk, FILE *nowhere) {
    sequence_free(talk->run.model, &talk->sequence);
    run_free(&talk->run);
    fclose(nowhere);
}

// An answer that -n cuts off is remembered whole in a chat, or the next question would follow a
// sentence without its last word. A single text needs no more than it printed.
Test(talking, a_chat_remembers_its_last_token) {
    const int tokens[] = {1, 40, 41};
    Bench b;
    bench_open(&b, G, 8);
    never_end(&b.model); // but for -n
    for (int is_chat = 0; is_chat < 2; is_chat++) {
        const Options options = {.n_new = 7, .chat = is_chat};
        FILE *nowhere = fopen("/dev/null", "w");
        Talk talk = talk_silently(&b, &options, nowhere);
        reply(&talk, tokens, 3);
        cr_assert_eq(talk.n_new, 7);
        cr_assert_str_eq(talk.stopped_at, "-n");
        cr_assert_eq(talk.sequence.length, is_chat ? 3 + 7 : 3 + 7 - 1);
        stop_talking(&talk, nowhere);
    }
    bench_close(&b);
}

// A text ends with a piece of kind END, of which there may be several, with BOS (another text would
// begin), or after -n tokens. The token that ends it is not written.
Test(talking, what_ends_a_text) {
    const int tokens[] = {1, 38, 49};
    const Options options = {.n_new = 4};
    Bench b;
    bench_open(&b, G, 8);
    const char *const eos = "the end of the text (EOS)";
    const char *const why[] = {"-n", eos, eos, eos, "the start of another text (BOS)"};
    int words[4]; // that the model writes
    for (int i = 0; i < 5; i++) {
        never_end(&b.model);
        if (i > 0 && i < 4) // the first word, the third, both
            let_end(&b.model, words[i == 2 ? 2 : 0]);
        if (i == 3)
            let_end(&b.model, words[2]);
        if (i == 4)
            b.model.config.bos = words[0];
        FILE *nowhere = fopen("/dev/null", "w");
        Talk talk = talk_silently(&b, &options, nowhere);
        reply(&talk, tokens, 3);
        cr_assert_str_eq(talk.stopped_at, why[i], "%s", talk.stopped_at);
        const int n_new = i == 0 ? 4 : i == 2 ? 2 : 0;
        cr_assert_eq(talk.n_new, n_new, "%d, %s: %d tokens", i, why[i], talk.n_new);
        if (i == 0) {
            memcpy(words, talk.sequence.tokens + 3, 3 * sizeof *words);
            cr_assert(words[2] != words[0] && words[2] != words[1], "choose another prompt");
        }
        stop_talking(&talk, nowhere);
    }
    bench_close(&b);
}

// The prompt is read soberly, unless the options say otherwise.
Test(talking, a_prompt_is_read_soberly) {
    Bench b;
    bench_open(&b, G, 8);
    never_end(&b.model);
    for (int drugged = 0; drugged < 2; drugged++) {
        const Options options = {.n_new = 1, .drugged_prompt = drugged};
        FILE *nowhere = fopen("/dev/null", "w");
        Talk talk = talk_silently(&b, &options, nowhere);
        talk.sequence.noise = bench_noise(&b, ALL_SITES, FAMILY_CENTRED);
        reply(&talk, G_TOKENS, N);
        cr_assert_eq(talk.sequence.n_drugged, drugged ? N : 0);
        cr_assert_eq(talk.sequence.first_dirty, drugged ? 6 : CLEAN);
        stop_talking(&talk, nowhere);
    }
    bench_close(&b);
}

// Checks that from `start` on, the sequence has read these characters, each a token of its own; \1
// is <s> and \2 is </s>. Returns where they end.
static int expect_read(const Talk *talk, int start, const char *text) {
    const int n_pieces = talk->run.model->config.vocab_size - BEHIND_BYTES;
    for (int at = start; *text; at = ++start, text++) {
        const int byte = (unsigned char)*text;
        const bool is_piece = byte >= ' ' && byte < ' ' + n_pieces;
        int want = is_piece ? BEHIND_BYTES + byte - ' ' : FIRST_BYTE + byte;
        if (byte < 3)
            want = byte;
        cr_assert_lt(at, talk->sequence.length, "...%s", text);
        cr_assert_eq(talk->sequence.tokens[at], want, "...%s: %d", text,
                     talk->sequence.tokens[at]);
    }
    return start;
}

// A model that knows the chat of Llama 2, and may go on for long.
static void open_chatting(Bench *b, int flags) {
    FileHeader header = G;
    header.text_flags = flags;
    give_llama2_chat(&header.vocabulary);
    bench_open(b, header, 8);
    b->model.config.seq_len = 300;
}

static Span span_of(const char *text) {
    return (Span){text, (int)strlen(text)};
}

// A conversation is written in the form that the file has: here as Llama 2 was taught it, each
// question after a BOS and between [INST] and [/INST], each answer ended by an EOS, the system
// prompt within the first. Control pieces are those of the form alone.
Test(talking, a_chat_has_the_form_of_its_file) {
    cr_redirect_stdout();
    const int flags[] = {BYTE_PIECES, BYTE_PIECES | PREFIX_SPACE,
                         BYTE_PIECES | PREFIX_SPACE | PREFIX_EACH};
    for (int i = 0; i < 3; i++) {
        for (int has_system = 0; has_system < 2; has_system++) {
            Bench b;
            open_chatting(&b, flags[i]);
            const Options options = {
                .n_new = 4, .chat = true, .system = has_system ? "BE <s> BRIEF." : NULL,
            };
            FILE *nowhere = fopen("/dev/null", "w");
            Talk talk = talk_silently(&b, &options, nowhere);
            chat_round(&talk, span_of("HI</s>"));
            const int first = expect_read(&talk, 0, i ? "\1 [INST] " : "\1[INST] ");
            const char *system = has_system ? "<<SYS>>\nBE <s> BRIEF.\n<</SYS>>\n\n" : "";
            const int question = expect_read(&talk, first, system);
            const int answer = expect_read(&talk, question, "HI</s> [/INST]");
            const int end = talk.sequence.length;
            cr_assert_leq(end, answer + 4);
            chat_round(&talk, span_of("AND <s>?"));
            const char *later = i == 2 ? " \2\1 [INST] " : " \2\1[INST] ";
            expect_read(&talk, expect_read(&talk, end, later), "AND <s>? [/INST]");
            stop_talking(&talk, nowhere);
            bench_close(&b);
        }
    }
}

// What closes an answer and what begins the next question are one text: no space comes between them
// where the form has none. (TinyLlama-Chat is such a model.)
Test(talking, a_chat_goes_on_within_a_section) {
    cr_redirect_stdout();
    static const char *const form[] = {"<U>\n", "", "", "<U>\n", "</s>\n<A>\n", "</s>\n"};
    FileHeader header = G;
    header.text_flags = BYTE_PIECES | PREFIX_SPACE | PREFIX_EACH;
    for (int i = 0; i < 6; i++)
        header.vocabulary.chat[i] = form[i];
    Bench b;
    bench_open(&b, header, 8);
    b.model.config.seq_len = 300;
    const Options options = {.n_new = 4, .chat = true};
    FILE *nowhere = fopen("/dev/null", "w");
    Talk talk = talk_silently(&b, &options, nowhere);
    chat_round(&talk, span_of("HI"));
    expect_read(&talk, 0, "\1 <U>\nHI\2 \n<A>\n");
    for (int i = 0; i < 2; i++) {
        const int end = talk.sequence.length;
        chat_round(&talk, span_of("AND?"));
        expect_read(&talk, end, "\2 \n<U>\nAND?\2 \n<A>\n");
    }
    stop_talking(&talk, nowhere);
    bench_close(&b);
}

// A question must fit into the context, with the end of the last answer before it. If it does not,
// nothing is read.
Test(talking, a_chat_within_its_context) {
    cr_redirect_stdout();
    cr_redirect_stderr();
    Bench b;
    Config *c = &b.model.config;
    open_chatting(&b, BYTE_PIECES | PREFIX_SPACE);
    const Options options = {.n_new = 4, .chat = true};
    FILE *nowhere = fopen("/dev/null", "w");
    Talk talk = talk_silently(&b, &options, nowhere);
    const int n_closing = 2;           // " " and </s>
    const int n_question = 1 + 7 + 4 + 8; // <s>, then "[INST] ", "and?" and " [/INST]"
    chat_round(&talk, span_of("hi"));
    const int end = talk.sequence.length;

    c->seq_len = end + n_closing + n_question - 1;
    chat_round(&talk, span_of("and?\n")); // a shorter question would fit
    cr_assert_eq(talk.sequence.length, end);

    c->seq_len = end + n_closing + n_question;
    chat_round(&talk, span_of("\r\n")); // nothing was said
    cr_assert_eq(talk.sequence.length, end);
    chat_round(&talk, span_of("and?\r\n"));
    cr_assert_eq(talk.sequence.length, c->seq_len);
    cr_assert_str_eq(talk.stopped_at, "the end of the context");
    stop_talking(&talk, nowhere);
    bench_close(&b);
}
