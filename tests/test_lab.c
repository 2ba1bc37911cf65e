/* test_lab.c - what the experiments measure, against plain passes of one row, and what they write.
 *
 * "observed" is the worst that gcc and clang gave, as an error relative to the value.
 */
#include "testing.h"

enum { LAYERS = 4, LONGEST = 513 };
static const double MOST = 1.5;

// Model G, deeper and narrower and with a window, and a text of n tokens.
static void open_deep(Bench *b, int *tokens, int n) {
    FileHeader h = G;
    h.n_layers = LAYERS;
    h.dim = 32, h.hidden_dim = 40, h.n_heads = 4, h.n_kv_heads = 2;
    h.sliding_window = 8;
    bench_open(b, h, 8);
    for (int i = 0; i < n; i++) tokens[i] = i ? 3 + i * i * 7 % 300 : 1;
}

// 1 - cosine at all levels from two calls of forward that keep every layer, with doses in layers
// first to last.
static void two_passes(const Model *m, const int *tokens, int n, int site, Noise noise,
                       double theta, int first, int last, double *distance) {
    static float doses[N_SITES * LAYERS];
    const int dim = m->config.dim;
    const float dose = (float)theta;
    Run runs[2];
    Row *rows = resize(NULL, n, sizeof *rows);
    for (int i = 0; i < N_SITES * LAYERS; i++)
        doses[i] = i / LAYERS == site && i % LAYERS >= first && i % LAYERS <= last ? dose : 0;
    noise.theta = doses;
    for (int i = 0; i < 2; i++) {
        Sequence s = sequence_new(noise);
        run_init(&runs[i], m, n, LAYERS + 1);
        for (int r = 0; r < n; r++) rows[r] = (Row){tokens[r], r, &s, i == 1, false, NULL};
        forward(m, &runs[i], rows, n);
        sequence_free(m, &s);
    }
    for (int level = 0; level <= LAYERS; level++) {
        const float *a = runs[0].slots[level].x + (n - 1) * dim;
        const float *b = runs[1].slots[level].x + (n - 1) * dim;
        double aa = 0, bb = 0, apart = 0; // |a/|a| - b/|b||² / 2 is another way to this number
        for (int i = 0; i < dim; i++) aa += pow((double)a[i], 2), bb += pow((double)b[i], 2);
        for (int i = 0; i < dim; i++)
            apart += pow((double)a[i] / sqrt(aa) - (double)b[i] / sqrt(bb), 2);
        distance[level] = apart / 2;
    }
    run_free(&runs[0]);
    run_free(&runs[1]);
    free(rows);
}

// Some passages of a trip, by kind, place and theta, are what two plain passes say, as a mean over
// the seeds; below the first dosed layer, and without a dose, all is 0 to the last bit.
static void check(const Bench *b, const int *tokens, int n, int site, int family, int k, int step) {
    const Noise noise = {SEED, family, NULL};
    const Trip t = trip_measure(&b->model, tokens, n, site, MOST, noise, k);
    cr_assert(t.n_layers == LAYERS && t.n_thetas == 31);
    for (int i = 0; i < 2 * LAYERS * 31; i++) {
        const int kind = i / 31 / LAYERS, place = i / 31 % LAYERS, theta = i % 31;
        const int first = kind || !place ? 0 : place - 1;
        const int last = kind || place == LAYERS - 1 ? place : place + 1;
        const float *got = t.distance + i * (LAYERS + 1);
        for (int level = 0; level <= LAYERS; level++) {
            const bool zero = !memcmp(&got[level], &(float){0}, sizeof *got);
            cr_assert(zero == (!theta || level <= first), "%d %d %d %d", kind, place, theta, level);
        }
        if (i % step) continue;
        double want[LAYERS + 1] = {0}, one[LAYERS + 1];
        for (int j = 0; j < k; j++) {
            const Noise seeded = {SEED + (uint64_t)j, family, NULL};
            two_passes(&b->model, tokens, n, site, seeded, MOST * theta / 30, first, last, one);
            for (int level = 0; level <= LAYERS; level++) want[level] += one[level] / k;
        }
        for (int level = 0; level <= LAYERS; level++) { // observed 1e-7
            const double error = fabs((double)got[level] - want[level]);
            cr_assert(error <= 1e-6 * want[level], "%d %d %d %d: %g, %g", kind, place, theta, level,
                      (double)got[level], want[level]);
        }
    }
    free(t.distance);
}

// At every site; with all thetas in one call, in three batches, and one by one in a text that is
// longer than a batch.
Test(trip, is_what_two_passes_say) {
    static int tokens[LONGEST];
    Bench b;
    open_deep(&b, tokens, LONGEST);
    for (int site = 0; site < N_SITES; site++) {
        check(&b, tokens, 12, site, site % 2, 1, 7);
        check(&b, tokens, 40, site, FAMILY_CENTRED, 1, 13);
    }
    check(&b, tokens, 14, SITE_A, FAMILY_CENTRED, 3, 5);
    check(&b, tokens, LONGEST, SITE_H, FAMILY_CENTRED, 1, 97);
    bench_close(&b);
}

static void to_name(char *name, const char *ending) {
    sprintf(name, "/tmp/trip_%d%s", (int)getpid(), ending);
}

// A prompt of n tokens for a model of single characters, among them BOS and maybe a space in front.
static const char *prompt_of(const Model *m, int n) {
    static char text[128];
    const int length = n - 1 - (m->config.tokenizer_flags & PREFIX_SPACE);
    for (int i = 0; i < length; i++) text[i] = (char)('A' + i * i % 26);
    text[length] = '\0';
    return text;
}

// The whole of it, quietly, over n tokens. The caller removes what out names.
static void run_trip(const Bench *b, int n, double theta, const char *out) {
    Options o = {.prompt = prompt_of(&b->model, n), .k = 2, .max_theta = MOST, .out = out,
                 .noise = {SEED, FAMILY_CENTRED, NULL}};
    o.doses[SITE_V].theta = theta;
    cr_assert(freopen("/dev/null", "w", stdout));
    trip(&b->model, &o);
}

Test(trip, writes_its_numbers) {
    int i = 0, n;
    char name[64], line[128], want[128];
    Bench b;
    open_deep(&b, NULL, 0);
    to_name(name, ".csv");
    run_trip(&b, 12, .5, name);
    const char *prompt = prompt_of(&b.model, 12);
    int *tokens = encode(&b.model, prompt, strlen(prompt), true, &n);
    cr_assert(n == 12);
    const Trip t = trip_measure(&b.model, tokens, 12, SITE_V, MOST, (Noise){SEED, 0, NULL}, 2);
    FILE *f = fopen(name, "r");
    cr_assert(f && fgets(line, sizeof line, f));
    cr_assert(!strcmp(line, "kind,place,theta,level,distance\n"));
    for (; fgets(line, sizeof line, f); i++) {
        const int level = i % 5, theta = i / 5 % 31, place = i / 5 / 31 % 4, kind = i / 5 / 31 / 4;
        sprintf(want, "%s,%d,%.9g,%d,", kind ? "stack" : "window", place, MOST * theta / 30, level);
        cr_assert(!strncmp(line, want, strlen(want)), "%s%s", line, want);
        cr_assert(strtof(line + strlen(want), NULL) == t.distance[i]);
    }
    cr_assert(i == 2 * 4 * 31 * 5);
    fclose(f);
    remove(name);
    free(tokens);
    free(t.distance);
    bench_close(&b);
}

// A parser takes it for XML, and all cells of all panels are there, white ones and a black one.
Test(trip, draws) {
    int n_cells = 0, n_white = 0, n_black = 0;
    char name[64], command[400];
    Bench b;
    open_deep(&b, NULL, 0);
    to_name(name, ".svg");
    run_trip(&b, 12, 1.5, name);
    sprintf(command, "python3 -c 'from xml.dom.minidom import parse\n"
            "c = [r.getAttribute(\"fill\") for r in parse(\"%s\").getElementsByTagName(\"rect\")"
            " if r.getAttribute(\"class\") == \"cell\"]\n"
            "print(len(c), c.count(\"#ffffff\"), c.count(\"#000000\"))'", name);
    FILE *f = popen(command, "r");
    cr_assert(f && fscanf(f, "%d %d %d", &n_cells, &n_white, &n_black) == 3 && !pclose(f));
    cr_assert(n_cells == 2 * 5 * 4 * 5, "%d", n_cells);
    cr_assert(n_white >= 5 * (1 + 1 + 2 + 3 + 4) && n_black > 0, "%d %d", n_white, n_black);
    remove(name);
    bench_close(&b);
}

// What cannot be measured is refused before any work.
static void refused(FileHeader h, int n, double theta, const char *out) {
    Bench b;
    bench_open(&b, h, 8);
    cr_assert(freopen("/dev/null", "w", stderr));
    run_trip(&b, n, theta, out);
}
Test(trip, refuses_an_unknown_ending, .exit_code = 2) { refused(G, 12, .5, "/nowhere/csv"); }
Test(trip, refuses_a_larger_dose, .exit_code = 2) { refused(G, 12, 1.6, NULL); }
Test(trip, refuses_a_text_within_the_sink, .exit_code = 1) { refused(G, SINK, .5, NULL); }
Test(trip, refuses_a_text_beyond_the_context, .exit_code = 1) { refused(G, 65, .5, NULL); }
Test(trip, refuses_two_layers, .exit_code = 1) { refused(M, 12, .5, NULL); }

// Beside the maps stand the ten most probable tokens: their probabilities, sober and as the mean
// over the seeds, are those of two plain passes each, and the signs are as long as the numbers say.
Test(trip, shows_the_next_token) {
    static float doses[N_SITES * LAYERS];
    static double p[3][320];
    int tokens[12], best = 0;
    char name[64], line[256];
    Bench b;
    open_deep(&b, tokens, 12);
    for (int i = 0; i < 32; i++) ((float *)*tensor(&b.model, 0, FINAL_NORM))[i] *= 10; // surer
    for (int l = 1; l <= 3; l++) doses[SITE_A * LAYERS + l] = 1;
    for (int i = 0; i < 3; i++) { // the sober pass, then two seeds
        Sequence s = sequence_new((Noise){SEED + (uint64_t)(i == 2), 0, doses});
        for (int r = 0; r < 12; r++) {
            Row row = {tokens[r], r, &s, i > 0, true, NULL};
            forward(&b.model, &b.run, &row, 1);
            for (int t = 0; t < 320; t++) p[i][t] = exp(-surprise(row.logits, 320, t));
        }
        sequence_free(&b.model, &s);
    }
    to_name(name, ".txt");
    cr_assert(freopen(name, "w", stdout));
    trip_bars(&b.model, tokens, 12, SITE_A, 1, (Noise){SEED, FAMILY_CENTRED, NULL}, 2);
    fflush(stdout);
    FILE *f = fopen(name, "r");
    for (int i = -3; i < 10; i++) {
        cr_assert(f && fgets(line, sizeof line, f));
        if (i < 0) continue;
        for (int t = 0; t < 320; t++)
            if (p[0][t] > p[0][best]) best = t;
        const double sober = 100 * p[0][best], drugged = 50 * (p[1][best] + p[2][best]);
        double got[2];
        char *word = visible(&b.model, best), signs[99] = "";
        cr_assert(!strncmp(line, word, strlen(word)), "%s%s", word, line);
        sscanf(line + 16, "%lf %% %lf %% %98s", &got[0], &got[1], signs);
        cr_assert(fabs(got[0] - sober) < .0501 && fabs(got[1] - drugged) < .0501, "%s", line);
        const int kept = (int)round(fmin(sober, drugged) / 2);
        const int n = (int)round(fmax(sober, drugged) / 2);
        cr_assert((int)strlen(signs) == n && (int)strspn(signs, "|") == kept, "%s", line);
        cr_assert((int)strspn(signs + kept, drugged > sober ? "+" : "-") == n - kept, "%s", line);
        p[0][best] = 0;
        free(word);
    }
    fclose(f);
    remove(name);
    bench_close(&b);
}

// ---- what the other experiments share

// A token stands in a table on one line, whatever it prints.
Test(lab, makes_tokens_visible) {
    static const int tokens[] = {3 + '\n', 3 + '\r', 3 + 127, 3 + 0xC3, 3 + 'a', 259, 318};
    static const char *const texts[] = {"\\n", "<0D>", "<7F>", "<C3>", "a", " ", "["};
    Bench b;
    bench_open(&b, G, 1);
    for (int i = 0; i < 7; i++) {
        char *text = visible(&b.model, tokens[i]);
        cr_assert(!strcmp(text, texts[i]), "%s, %s", text, texts[i]);
        free(text);
    }
    bench_close(&b);
}

enum { NEW = 16, WIDE = 64, VOCAB = 320 };

// What one row in every call says, in a run that keeps all layers.
typedef struct {
    int tokens[NEW];
    float hidden[NEW * WIDE]; // (NEW, dim) what left the layers
    double log_p[NEW];        // of each token
    bool most[NEW];           // is it the most probable one?
} Alone;

// Reads a prompt soberly, then NEW tokens, drugged if noise has doses. They are thrown with dice,
// or told if that is NULL. What ends a text ends nothing here.
static void alone(Bench *b, const int *prompt, int n, Noise noise, const Dice *dice, Alone *a) {
    const Config *c = &b->model.config;
    const size_t dim = (size_t)c->dim, vocab_size = (size_t)c->vocab_size;
    Sequence s = sequence_new(noise);
    for (int i = 0; i < n + NEW; i++) {
        Row row = {i < n ? prompt[i] : a->tokens[i - n], i, &s, i >= n, true, NULL};
        float z[VOCAB];
        double total = 0, largest = -INFINITY;
        forward(&b->model, &b->run, &row, 1);
        if (i >= n)
            memcpy(a->hidden + (i - n) * c->dim, b->run.slots[c->n_layers].x, 4 * dim);
        const int next = i + 1 - n;
        if (next < 0 || next == NEW) continue;
        memcpy(z, row.logits, sizeof *z * vocab_size);
        if (dice) a->tokens[next] = choose(z, c->vocab_size, dice, noise.seed, i + 1);
        for (size_t t = 0; t < vocab_size; t++) {
            total += exp((double)row.logits[t]);
            largest = fmax(largest, (double)row.logits[t]);
        }
        a->log_p[next] = (double)row.logits[a->tokens[next]] - log(total);
        a->most[next] = (double)row.logits[a->tokens[next]] >= largest;
    }
    sequence_free(&b->model, &s);
}

// How many tokens a text has before one that ends it.
static int ends_at(const Config *c, const int *tokens) {
    int n = 0;
    while (n < NEW && tokens[n] != c->eos && tokens[n] != c->bos) n++;
    return n;
}

// A model with working memory of one row that keeps all layers. Its logits are ten times as far
// apart, so that it is surer.
static void open_keeping(Bench *b, FileHeader h) {
    bench_open(b, h, 1);
    run_free(&b->run);
    run_init(&b->run, &b->model, 1, h.n_layers + 1);
    float *gain = (float *)*tensor(&b->model, 0, FINAL_NORM);
    for (int i = 0; i < h.dim; i++) gain[i] *= 10;
}

// A laboratory around a prompt, of which NEW tokens are wanted.
static void open_lab(Lab *lab, Bench *b, Options *o, FileHeader h, int k, int max_rows) {
    open_keeping(b, h);
    *o = (Options){.prompt = "TO BE, OR NOT TO", .n_new = NEW, .k = k,
                   .noise = noise_of(b, ALL_SITES, FAMILY_CENTRED)};
    lab_open(lab, &b->model, o, max_rows);
}

static void close_lab(Lab *lab, Bench *b) {
    lab_close(lab);
    bench_close(b);
}

// As many tokens are written as are wanted and fit; the prompt's logits are those of a plain pass.
Test(lab, knows_its_room) {
    Options o;
    Bench b;
    Lab lab;
    open_lab(&lab, &b, &o, G, 1, 5);
    cr_assert(lab.n_prompt == 18 && lab.n_new == NEW);
    Sequence s = sequence_new((Noise){0});
    const float *z = feed(&b.model, &b.run, &s, lab.prompt, 18, 0, false, true);
    cr_assert(!memcmp(z, lab.logits, sizeof *z * VOCAB));
    sequence_free(&b.model, &s);
    for (int wanted = 0; wanted < 99; wanted += 46) { // 64 - 18 fit
        lab_close(&lab);
        o.n_new = wanted;
        lab_open(&lab, &b.model, &o, 5);
        cr_assert(lab.n_new == 46);
    }
    close_lab(&lab, &b);
}

// ---- texts side by side

// Seven texts, in one call or in several, are to the last bit what each is alone, and so is what
// left the layers: sober and dosed, with temperature and noise on the logits. A text that comes to
// its end, be it at once, drops out, and the others go on.
Test(write_texts, is_as_each_alone) {
    enum { N_TEXTS = 7 };
    static Alone want[N_TEXTS];
    static float hidden[N_TEXTS][NEW * WIDE], blank[WIDE];
    const Dice dice[N_TEXTS] = {{0, 0, 0}, {0, 0, 0}, {5, 1, 0}, {9, .9, 0}, {0, 1, 15}, {2, 1, 9}};
    const int sites[N_TEXTS] = {0, ALL_SITES, 1 << SITE_V, 0, 0, 1 << SITE_H, 0};
    memset(blank, -1, sizeof blank);
    for (int model = 0; model < 2; model++) {
        int prompt[14] = {1};
        Noise noise[N_TEXTS];
        Bench b;
        open_keeping(&b, model ? M : G);
        Config *c = &b.model.config;
        for (int i = 1; i < 14; i++) prompt[i] = 3 + 11 * i * i % (c->vocab_size - 3);
        for (int i = 0; i < N_TEXTS; i++) {
            noise[i] = noise_of(&b, sites[i], i % 2);
            noise[i].seed += (uint64_t)i;
            alone(&b, prompt, 14 - i, noise[i], &dice[i], &want[i]);
        }
        const int ends[4][2] = {{-1, -1}, {want[3].tokens[5], -1},
                                {want[2].tokens[0], want[5].tokens[9]},
                                {want[6].tokens[NEW - 1], want[4].tokens[NEW - 2]}};
        for (int i = 0; i < 4 * 3; i++) {
            int tokens[N_TEXTS][NEW];
            Text texts[N_TEXTS];
            Sequence s[N_TEXTS];
            Run run;
            c->eos = ends[i / 3][0], c->bos = ends[i / 3][1];
            run_init(&run, &b.model, (const int[]){1, 3, 64}[i % 3], 1);
            memset(hidden, -1, sizeof hidden);
            for (int j = 0; j < N_TEXTS; j++) {
                s[j] = sequence_new(noise[j]);
                feed(&b.model, &run, &s[j], prompt, 14 - j, 0, false, false);
                texts[j] = (Text){&s[j], dice[j], want[j].tokens[0], tokens[j], 0,
                                  j == i % 4 ? NULL : hidden[j]};
            }
            write_texts(&b.model, &run, texts, N_TEXTS, NEW);
            for (int j = 0; j < N_TEXTS; j++) {
                const int n = ends_at(c, want[j].tokens), n_read = n < NEW ? n : NEW - 1;
                const int n_hidden = texts[j].hidden ? n_read * c->dim : 0;
                cr_assert(texts[j].n_tokens == n && s[j].length == 14 - j + n_read, "%d %d", i, j);
                cr_assert(!memcmp(tokens[j], want[j].tokens, 4 * (size_t)n), "%d %d", i, j);
                cr_assert(!memcmp(hidden[j], want[j].hidden, 4 * (size_t)n_hidden), "%d %d", i, j);
                cr_assert(!memcmp(hidden[j] + n_hidden, blank, 4 * (size_t)c->dim), "%d %d", i, j);
                sequence_free(&b.model, &s[j]);
            }
            run_free(&run);
        }
        bench_close(&b);
    }
}

// Without noise on the logits the most probable token is taken, the first of equals; the same seed
// and position choose the same again, and another one of them chooses anew.
Test(choose, is_a_function_of_the_place) {
    const float z[8] = {0, 1, -2, 1.5f, 1.5f, 0, .5f, 1};
    int n_other_seed = 0, n_other_position = 0;
    cr_assert(choose((float[]){0, 1, 7, 2, 7}, 5, &(Dice){0, 1, 0}, SEED, 3) == 2);
    for (int i = 0; i < 1000; i++) {
        const Dice dice = {i % 2, 1, 1 - .5 * (i % 2)};
        float a[4][8];
        for (int j = 0; j < 4; j++) memcpy(a[j], z, sizeof z);
        const int first = choose(a[0], 8, &dice, SEED, i);
        cr_assert(choose(a[1], 8, &dice, SEED, i) == first && !memcmp(a[0], a[1], sizeof z));
        n_other_seed += choose(a[2], 8, &dice, SEED + 1, i) != first;
        n_other_position += choose(a[3], 8, &dice, SEED, i + 1) != first;
    }
    cr_assert(n_other_seed > 700 && n_other_position > 700, "%d %d", n_other_seed,
              n_other_position); // observed 817 and 796
}

// The noise on the logits is normal, as wide as was asked for, and each token has its own: of two
// equal logits each wins as often, one that is 1 behind with the probability of that difference.
Test(choose, throws_normal_noise) {
    enum { THROWS = 40000 };
    const double width = 1.5, behind = .5 * erfc(1 / (2 * width));
    double n_first[2] = {0}, moment[5] = {0}, together[2] = {0};
    for (int i = 0; i < THROWS; i++)
        for (int ahead = 0; ahead < 2; ahead++) {
            float z[2] = {0, (float)ahead};
            n_first[ahead] += !choose(z, 2, &(Dice){0, 1, width}, SEED, i);
            const double x = (double)z[0] / width, y = ((double)z[1] - ahead) / width;
            for (int j = 1; j < 5; j++) moment[j] += (pow(x, j) + pow(y, j)) / THROWS / 4;
            together[0] += x * y / THROWS / 2, together[1] += x * x * y * y / THROWS / 2;
        }
    cr_assert(fabs(n_first[0] / THROWS - .5) < .01, "%g", n_first[0] / THROWS); // observed .002
    cr_assert(fabs(n_first[1] / THROWS - behind) < .01, "%g", n_first[1] / THROWS); // 7e-5
    cr_assert(fabs(moment[1]) < .02 && fabs(moment[3]) < .05, "%g %g", moment[1], moment[3]);
    cr_assert(fabs(moment[2] - 1) < .02 && fabs(moment[4] - 3) < .1, "%g %g", moment[2], moment[4]);
    cr_assert(fabs(together[0]) < .02 && fabs(together[1] - 1) < .06, "%g", together[1]);
}

// ---- explore

static double sum(const double *x, int n) { return n ? x[0] + sum(x + 1, n - 1) : 0; }

// The angle between a and b (n), by the chord from one to the other on the unit sphere.
static double angle_between(const float *a, const float *b, int n) {
    double aa = 0, bb = 0, chord = 0;
    for (int i = 0; i < n; i++) aa += pow((double)a[i], 2), bb += pow((double)b[i], 2);
    for (int i = 0; i < n; i++)
        chord += pow((double)a[i] / sqrt(aa) - (double)b[i] / sqrt(bb), 2);
    return 2 * asin(sqrt(chord) / 2);
}

// The sober continuation is the most probable text of a plain pass. Judged, its log-probability is
// the sum of that pass's, and it has no angle; what is written drugged is read soberly for the one,
// and for the other compared with what its writer had in mind. However many rows fit at once.
Test(explore, judges_like_plain_passes) {
    static Alone want, told;
    for (int i = 0; i < 6; i++) {
        double log_p, angle;
        int tokens[NEW];
        Options o;
        Bench b;
        Lab lab;
        open_lab(&lab, &b, &o, i % 2 ? M : G, 1, (const int[]){64, 5, 1}[i / 2]);
        const int dim = b.model.config.dim;
        alone(&b, lab.prompt, lab.n_prompt, (Noise){0}, &(Dice){0, 0, 0}, &want);
        const int n = ends_at(&b.model.config, want.tokens);
        cr_assert(n > 3 && sober_continuation(&lab, tokens) == n);
        cr_assert(!memcmp(tokens, want.tokens, sizeof *tokens * (size_t)n));
        const Text sober = {.tokens = tokens, .n_tokens = n, .hidden = want.hidden};
        judge(&lab, &sober, &log_p, &angle);
        cr_assert(fabs(log_p / sum(want.log_p, n) - 1) < 1e-12, "%g", log_p); // observed 5e-15
        cr_assert(angle < 1e-9, "%g", angle); // observed 0

        alone(&b, lab.prompt, lab.n_prompt, o.noise, &(Dice){5, 1, 0}, &want);
        told = want;
        alone(&b, lab.prompt, lab.n_prompt, (Noise){0}, NULL, &told);
        for (int length = 0; length <= NEW; length += length < 2 ? 1 : 7) {
            double apart = 0;
            for (int j = 0; j < length - 1; j++)
                apart += angle_between(want.hidden + j * dim, told.hidden + j * dim, dim);
            judge(&lab, &(Text){.tokens = want.tokens, .n_tokens = length, .hidden = want.hidden},
                  &log_p, &angle);
            cr_assert(fabs(log_p - sum(told.log_p, length)) <= -1e-12 * log_p, "%g", log_p);
            cr_assert(fabs(angle - apart) <= 1e-5 * apart, "%g %g", angle, apart); // observed 1e-7
        }
        close_lab(&lab, &b);
    }
}

// Diversity is the share of different ones among all pairs of neighbours, within texts only.
Test(explore, counts_pairs) {
    int a[] = {1, 2, 3, 4, 5}, c[] = {6, 7, 8, 9}, same[] = {7, 7, 7, 7}, back[] = {2, 1, 1 << 30};
    const Text texts[] = {{.tokens = a, .n_tokens = 5}, {.tokens = a, .n_tokens = 5},
                          {.tokens = a, .n_tokens = 5}, {.tokens = c, .n_tokens = 4},
                          {.tokens = back, .n_tokens = 3}, {.tokens = same, .n_tokens = 4},
                          {.tokens = a, .n_tokens = 1}, {.n_tokens = 0}};
    const struct { int first, n; double want; } cases[] = {
        {0, 1, 1}, {0, 3, 1. / 3}, {2, 3, 1}, {5, 1, 1. / 3}, {6, 1, 0}, {7, 1, 0}, {6, 2, 0},
        {5, 3, 1. / 3}, {0, 8, 10. / 20}, {0, 0, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const double got = diversity(texts + cases[i].first, cases[i].n);
        cr_assert(fabs(got - cases[i].want) < 1e-15, "%zu: %g", i, got);
    }
}

// Between two cells the curve is a straight line, whichever way it runs; where there are several
// the best counts, where there is none it is NAN, and cells of the same diversity draw none.
Test(explore, reads_a_curve) {
    const double fold[] = {.2, .6, .4, .4, .8, .8, .8, .8, .8};
    const struct { double diversity, likelihood; } up[] = {
        {.1, 0}, {.25, -2.5}, {.825, -52.75}, {.9, -64}, {.0999, NAN}, {.9001, NAN}}, folded[] = {
        {.5, -.75}, {.7, -3.75}, {.8, -4}, {.4, -.5}, {.2, 0}, {.81, NAN}};
    Cell cells[4][N_STRENGTHS]; // a curve, drawn from either end; a folded one; a single point
    for (int i = 0; i < N_STRENGTHS; i++) {
        cells[0][i] = cells[1][8 - i] = (Cell){.diversity = .1 * (i + 1), .likelihood = -i * i};
        cells[2][i] = (Cell){.diversity = fold[i], .likelihood = -i};
        cells[3][i] = (Cell){.diversity = .5, .likelihood = -i};
    }
    for (int i = 0; i < 3 * 6; i++) {
        const double got = curve_at(cells[i / 6], (i < 12 ? up : folded)[i % 6].diversity);
        const double want = (i < 12 ? up : folded)[i % 6].likelihood;
        cr_assert(isnan(want) ? isnan(got) : fabs(got - want) < 1e-12, "%d: %g, %g", i, got, want);
    }
    cr_assert(isnan(curve_at(cells[3], .5)));
}

// Every cell holds the texts that are written alone, and their numbers. The lowest temperature
// writes the sober text, and all is the same to the last bit however many cells stand side by side
// and however many rows fit.
Test(explore, fills_its_cells) {
    enum { K = 3, N_CELLS = N_METHODS * N_STRENGTHS };
    static Alone one;
    static float theta[N_CELLS][N_SITES * 3];
    static Cell cells[2][N_CELLS];
    static Text texts[2][N_CELLS * K];
    int tokens[NEW], n_short = 0;
    Options o;
    Bench b;
    Lab lab;
    open_lab(&lab, &b, &o, G, K, 64);
    sober_continuation(&lab, tokens);
    b.model.config.eos = tokens[11];
    const int n_sober = sober_continuation(&lab, tokens);
    char *sober = text_of(&b.model.tokenizer, tokens, n_sober);
    for (int i = 0; i < N_SITES * N_STRENGTHS * 3; i++)
        theta[i / 3][i / 3 / N_STRENGTHS * 3 + i % 3] = (float)STRENGTHS[0][i / 3 % N_STRENGTHS];
    explore_cells(&lab, theta[0], 0, N_CELLS, cells[0], texts[0], sober);
    run_free(&lab.run);
    run_init(&lab.run, &b.model, 5, 1);
    for (int i = 0; i < N_CELLS; i += 4)
        explore_cells(&lab, theta[0], i, i + 4 < N_CELLS ? 4 : N_CELLS - i, cells[1], texts[1],
                      sober);
    for (int i = 0; i < N_CELLS; i++) {
        const int method = i / N_STRENGTHS;
        const double strength = STRENGTHS[method][i % N_STRENGTHS];
        const Dice dice = {method == TEMPERATURE ? strength : 0, 1,
                           method == LOGIT_NOISE ? strength : 0};
        const Cell *got = &cells[0][i], *again = &cells[1][i];
        char *written[K];
        double log_p = 0, angle = 0, prefix = 0, n = 0, n_pairs = 0;
        int distinct = 0;
        for (int j = 0; j < K; j++) {
            const Noise noise = {SEED + (uint64_t)j, 0, method < N_SITES ? theta[i] : NULL};
            alone(&b, lab.prompt, lab.n_prompt, noise, &dice, &one);
            const Text t = {.tokens = one.tokens, .hidden = one.hidden,
                            .n_tokens = ends_at(&b.model.config, one.tokens)};
            for (int e = 0; e < 2; e++) {
                const Text *is = &texts[e][i * K + j];
                cr_assert(is->n_tokens == t.n_tokens, "%d %d: %d", e, i, is->n_tokens);
                cr_assert(!memcmp(is->tokens, t.tokens, sizeof(int) * (size_t)t.n_tokens));
            }
            double more[2];
            judge(&lab, &t, &more[0], &more[1]);
            log_p += more[0], angle += more[1];
            n += t.n_tokens, n_pairs += t.n_tokens ? t.n_tokens - 1 : 0;
            n_short += t.n_tokens < n_sober;
            written[j] = text_of(&b.model.tokenizer, t.tokens, t.n_tokens);
            int same = 0, new = 1;
            for (int e = 0; e < j; e++) new &= strcmp(written[e], written[j]) != 0;
            while (sober[same] && written[j][same] == sober[same]) same++;
            prefix += (double)same / K, distinct += new;
        }
        cr_assert(got->distinct == distinct && fabs(got->prefix - prefix) < 1e-9, "%d", i);
        cr_assert(fabs(got->likelihood - log_p / n) <= -1e-12 * got->likelihood, "%d", i);
        cr_assert(fabs(got->angle - angle / n_pairs) <= 1e-12 * got->angle, "%d", i);
        cr_assert((method < N_SITES) == (got->angle > 0), "%d", i);
        cr_assert(fabs(got->diversity - diversity(&texts[0][i * K], K)) < 1e-12, "%d", i);
        cr_assert(again->distinct == distinct && !memcmp(&again->prefix, &got->prefix,
                  sizeof *got - offsetof(Cell, prefix)), "%d", i);
        for (int j = 0; j < K; j++) free(written[j]);
    }
    const Cell *coldest = &cells[0][TEMPERATURE * N_STRENGTHS];
    cr_assert(coldest->distinct == 1 && coldest->prefix == (double)strlen(sober), "%d %g of %s",
              coldest->distinct, coldest->prefix, sober);
    cr_assert(n_sober > 3 && n_sober < 12 && n_short > 0, "%d %d", n_sober, n_short);
    for (int i = 0; i < 2 * N_CELLS * K; i++) free(texts[i % 2][i / 2].tokens);
    free(sober);
    close_lab(&lab, &b);
}

// ---- probe

// Twins without a dose agree everywhere; a twin with one says at each token what a sequence of its
// own says, and takes its own seed. The probability is always the sober one.
Test(probe, asks_twins) {
    enum { TWINS = 4 };
    static Alone text, twin;
    static float strong[N_SITES * 3], zero[N_SITES * 3];
    for (int j = 0; j < N_SITES * 3; j++) strong[j] = 1.5f;
    for (int i = 0; i < 8; i++) {
        double want[3][NEW] = {{0}}, agrees[NEW], p[NEW]; // want: sober, of two seeds
        int n_torn = 0;
        Options o;
        Bench b;
        Lab lab;
        open_lab(&lab, &b, &o, i % 2 ? M : G, TWINS, i / 4 ? 64 : 5);
        alone(&b, lab.prompt, lab.n_prompt, (Noise){0}, &(Dice){0, 0, 0}, &text);
        for (int kind = 0; kind < 3; kind++) {
            o.noise = (Noise){SEED + 9 * (kind == 2), i / 2 % 2,
                              kind ? strong : i / 2 % 2 ? NULL : zero};
            for (int j = 0; j < TWINS; j++) {
                Noise noise = o.noise;
                noise.seed += (uint64_t)j;
                twin = text;
                alone(&b, lab.prompt, lab.n_prompt, noise, NULL, &twin);
                for (int t = 0; t < NEW; t++) want[kind][t] += twin.most[t];
            }
            for (int n = 1; n <= NEW; n += NEW - 1) {
                probe_measure(&lab, text.tokens, n, TWINS, agrees, p);
                for (int t = 0; t < n; t++) {
                    const double off = fabs(p[t] / exp(text.log_p[t]) - 1);
                    cr_assert(off < 1e-12, "%g", off); // observed 7e-15
                    cr_assert(agrees[t] == want[kind][t] / TWINS, "%d: %g", t, agrees[t]);
                    cr_assert(agrees[t] == 1. || (kind && t), "%d: %g", t, agrees[t]);
                    n_torn += agrees[t] > 0 && agrees[t] < 1;
                }
            }
        }
        cr_assert(n_torn > 0 && memcmp(want[1], want[2], sizeof *want)); // they are not of one mind
        close_lab(&lab, &b);
    }
}
