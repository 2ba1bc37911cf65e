/* test_lab.c - what the laboratory measures, against plain passes of one row, and what it writes.
 *
 * "observed" is the worst that gcc and clang gave, as an error relative to the value.
 */
#define LAB_LIBRARY
#include "../laboratory/lab.c"
#include "testing.h"
#include <criterion/redirect.h>

enum { LAYERS = 4, LONGEST = 513 };
static const double MOST = 1.5; // the largest angle of all trips here

static const char *const KINDS[N_TRIP_KINDS] = {"window", "stack"};

// Model G, deeper and narrower and with a window.
static void open_deep(Bench *b) {
    FileHeader header = G;
    header.n_layers = LAYERS;
    header.dim = 32;
    header.hidden_dim = 40;
    header.n_heads = 4;
    header.n_kv_heads = 2;
    header.sliding_window = 8;
    bench_open(b, header, 8);
}

// A text of n tokens for it.
static const int *text_for_deep(int n) {
    static int tokens[LONGEST];
    for (int i = 0; i < n; i++)
        tokens[i] = i ? 3 + i * i * 7 % 300 : 1;
    return tokens;
}

// A trip over n tokens of this text.
static Trip trip_over(const Bench *b, int n, int site, int family, int n_seeds) {
    Trip trip = {
        .model = &b->model,
        .tokens = text_for_deep(n),
        .n_tokens = n,
        .site = site,
        .max_theta = MOST,
        .noise = {.seed = SEED, .family = family},
        .n_seeds = n_seeds,
    };
    trip_measure(&trip);
    return trip;
}

// ---- trip

// Layers 1, 2 and 3 of four are dosed, as strongly as possible. Level 1 is what enters layer 1.
Test(trip, moves_what_is_above_the_dose_and_nothing_below) {
    Bench b;
    open_deep(&b);
    Trip trip = trip_over(&b, 12, SITE_V, FAMILY_CENTRED, 1);
    const float *distance = trip_levels(&trip, WINDOW, 2, N_THETAS - 1);
    cr_assert(distance[0] == 0);
    cr_assert(distance[1] == 0);
    cr_assert(distance[2] > 0);
    cr_assert(distance[3] > 0);
    cr_assert(distance[4] > 0);
    trip_free(&trip);
    bench_close(&b);
}

// Three layers around the place, or all up to it.
Test(trip, doses_windows_and_stacks) {
    const char *const windows[LAYERS] = {"##..", "###.", ".###", "..##"};
    const char *const stacks[LAYERS] = {"#...", "##..", "###.", "####"};
    for (int place = 0; place < LAYERS; place++)
        for (int layer = 0; layer < LAYERS; layer++) {
            cr_assert(is_dosed(WINDOW, place, layer) == (windows[place][layer] == '#'));
            cr_assert(is_dosed(STACK, place, layer) == (stacks[place][layer] == '#'));
        }
}

// |a/|a| - b/|b||² of two vectors (n): how far apart they end on the unit sphere, squared.
static double chord2(const float *a, const float *b, int n) {
    double aa = 0, bb = 0, sum = 0;
    for (int i = 0; i < n; i++) {
        aa += pow((double)a[i], 2);
        bb += pow((double)b[i], 2);
    }
    for (int i = 0; i < n; i++)
        sum += pow((double)a[i] / sqrt(aa) - (double)b[i] / sqrt(bb), 2);
    return sum;
}

// Adds 1 - cosine at all levels, from two calls of forward that keep every layer, one of them with
// theta in layers first to last. Half of the squared chord is another way to this number.
static void two_passes(const Trip *trip, Noise noise, double theta, int first, int last,
                       double *distance) {
    static float doses[N_SITES * LAYERS];
    const int n = trip->n_tokens, dim = trip->model->config.dim;
    memset(doses, 0, sizeof doses);
    for (int layer = first; layer <= last; layer++)
        doses[trip->site * LAYERS + layer] = (float)theta;
    noise.theta = doses;
    Run runs[2];
    Row *rows = resize(NULL, n, sizeof *rows);
    for (int drugged = 0; drugged < 2; drugged++) {
        Sequence s = sequence_new(noise);
        for (int r = 0; r < n; r++)
            rows[r] = (Row){trip->tokens[r], r, &s, drugged, false, NULL};
        run_init(&runs[drugged], trip->model, n, LAYERS + 1);
        forward(&runs[drugged], rows, n);
        sequence_free(trip->model, &s);
    }
    for (int level = 0; level <= LAYERS; level++) {
        const float *sober = runs[0].slots[level].x + (n - 1) * dim;
        const float *drugged = runs[1].slots[level].x + (n - 1) * dim;
        distance[level] += chord2(sober, drugged, dim) / 2;
    }
    run_free(&runs[0]);
    run_free(&runs[1]);
    free(rows);
}

// One injection is what two plain passes say, as a mean over the seeds.
static void check_injection(const Trip *trip, int kind, int place, int i_theta) {
    const int first = kind == STACK || !place ? 0 : place - 1;
    const int last = kind == STACK || place == LAYERS - 1 ? place : place + 1;
    const float *got = trip_levels(trip, kind, place, i_theta);
    double want[LAYERS + 1] = {0};
    for (int seed = 0; seed < trip->n_seeds; seed++) {
        const Noise noise = {SEED + (uint64_t)seed, trip->noise.family, NULL};
        two_passes(trip, noise, MOST * i_theta / 15, first, last, want);
    }
    for (int level = 0; level <= LAYERS; level++) { // observed 1e-7
        want[level] /= trip->n_seeds;
        const double error = fabs((double)got[level] - want[level]);
        cr_assert(error <= 1e-6 * want[level], "%c, %s %d, theta %d, level %d: %g, want %g",
                  SITES[trip->site], KINDS[kind], place, i_theta, level, (double)got[level],
                  want[level]);
    }
}

// Without a dose, and below the first dosed layer, all is 0 to the last bit, and nothing else is.
static void check_zeros(const Trip *trip, int kind, int place, int i_theta) {
    const int first = kind == STACK || !place ? 0 : place - 1;
    const float *got = trip_levels(trip, kind, place, i_theta), zero = 0;
    for (int level = 0; level <= LAYERS; level++) {
        const bool is_zero = !memcmp(&got[level], &zero, sizeof zero);
        cr_assert(is_zero == (!i_theta || level <= first), "%c, %s %d, theta %d, level %d",
                  SITES[trip->site], KINDS[kind], place, i_theta, level);
    }
}

// Every injection of a trip has its zeros, and every step-th one is computed anew.
static void check_injections(const Bench *b, int n, int site, int family, int n_seeds, int step) {
    Trip trip = trip_over(b, n, site, family, n_seeds);
    int number = 0;
    for (int kind = 0; kind < N_TRIP_KINDS; kind++)
        for (int place = 0; place < LAYERS; place++)
            for (int i = 0; i < N_THETAS; i++) {
                check_zeros(&trip, kind, place, i);
                if (number++ % step == 0)
                    check_injection(&trip, kind, place, i);
            }
    trip_free(&trip);
}

// At every site; with all thetas in one call, in two batches, and one by one in a text that is
// longer than a batch.
Test(trip, is_what_two_passes_say) {
    Bench b;
    open_deep(&b);
    for (int site = 0; site < N_SITES; site++) {
        check_injections(&b, 12, site, site % 2 ? FAMILY_UPSTREAM : FAMILY_CENTRED, 1, 7);
        check_injections(&b, 40, site, FAMILY_CENTRED, 1, 13);
    }
    check_injections(&b, 14, SITE_A, FAMILY_CENTRED, 3, 5);
    check_injections(&b, LONGEST, SITE_H, FAMILY_CENTRED, 1, 97);
    bench_close(&b);
}

static void to_name(char *name, const char *ending) {
    sprintf(name, "/tmp/trip_%d%s", (int)getpid(), ending);
}

// A prompt of n tokens for a model of single characters, among them BOS and maybe a space in front.
static const char *prompt_of(const Model *m, int n) {
    static char text[128];
    const int length = n - 1 - (m->config.text_flags & PREFIX_SPACE);
    for (int i = 0; i < length; i++)
        text[i] = (char)('A' + i * i % 26);
    text[length] = '\0';
    return text;
}

// The whole of it, quietly, over n tokens, with a dose at V. The caller removes what out names.
static void run_trip(const Bench *b, int n, double theta, const char *out) {
    LabOptions options = {
        .model = "",
        .prompt = prompt_of(&b->model, n),
        .out = out,
        .n_seeds = 2,
        .max_theta = MOST,
        .noise = {.seed = SEED},
    };
    options.noise.doses[SITE_V].theta = theta;
    cr_assert(freopen("/dev/null", "w", stdout));
    trip(&b->model, &options);
}

// The next line of a file begins with `want` and then has this number, to the last bit.
static void check_line(FILE *file, const char *want, float number) {
    char line[128];
    cr_assert(fgets(line, sizeof line, file));
    cr_assert(!strncmp(line, want, strlen(want)), "%s%s", line, want);
    cr_assert(strtof(line + strlen(want), NULL) == number, "%s", line);
}

// The file has a line for every number, which is that number to the last bit.
Test(trip, writes_its_numbers) {
    char name[64], line[128], want[128];
    Bench b;
    open_deep(&b);
    to_name(name, ".csv");
    run_trip(&b, 12, .5, name);
    const char *prompt = prompt_of(&b.model, 12);
    Trip trip = {.model = &b.model, .site = SITE_V, .max_theta = MOST, .noise = {.seed = SEED},
                 .n_seeds = 2};
    int *tokens = tokens_of(&b.model, prompt, &trip.n_tokens);
    cr_assert(trip.n_tokens == 12);
    trip.tokens = tokens;
    trip_measure(&trip);

    FILE *file = fopen(name, "r");
    cr_assert(file && fgets(line, sizeof line, file));
    cr_assert(!strcmp(line, "site,kind,place,theta,level,distance,token,sober,drugged\n"));
    for (int kind = 0; kind < N_TRIP_KINDS; kind++)
        for (int place = 0; place < LAYERS; place++)
            for (int i = 0; i < N_THETAS; i++) {
                const float *levels = trip_levels(&trip, kind, place, i);
                const float *drugged = trip_drugged(&trip, kind, place, i);
                const double theta = MOST * i / 15;
                for (int level = 0; level <= LAYERS; level++) {
                    sprintf(want, "V,%s,%d,%.9g,%d,", KINDS[kind], place, theta, level);
                    check_line(file, want, levels[level]);
                }
                for (int n = 0; n < N_TOP; n++) {
                    char *token = visible(&b.model, trip.top[n].token);
                    sprintf(want, "V,%s,%d,%.9g,,,\"%s\",%.9g,", KINDS[kind], place, theta, token,
                            (double)trip.top[n].p);
                    check_line(file, want, drugged[n]);
                    free(token);
                }
            }
    cr_assert(!fgets(line, sizeof line, file));
    fclose(file);
    remove(name);
    free(tokens);
    trip_free(&trip);
    bench_close(&b);
}

// A trip of four layers whose distances are made up, in hundredths. Dose number 10 has a row for
// each kind and place; the window in the middle grows with the dose, and from number 8 on its
// peak is elsewhere.
static Trip made_up_trip(const Model *m, float *distance) {
    static const double hundredths[N_TRIP_KINDS][LAYERS][LAYERS + 1] = {
        {{0, 2, 5, 10, 17}, {0, .5, 17, 1.5, 4.5}, {0, 0, 9.5, 15.5, 16.5}, {0, 0, 0, 0, 25}},
        {{0, .1, .3, .4, 1}, {0, .5, .6, .8, .9}, {0, .7, .1, .1, .1}, {0, 0, .2, .2, .03}},
    };
    const Trip trip = {.model = m, .n_tokens = 7, .site = SITE_K, .max_theta = MOST, .n_seeds = 3,
                       .noise = {.seed = 420}, .distance = distance};
    for (int kind = 0; kind < N_TRIP_KINDS; kind++)
        for (int place = 0; place < LAYERS; place++)
            for (int level = 0; level <= LAYERS; level++)
                trip_levels(&trip, kind, place, 10)[level] =
                    (float)(hundredths[kind][place][level] / 100);
    for (int i = 1; i < N_THETAS; i++)
        if (i != 10) {
            trip_levels(&trip, WINDOW, 2, i)[i < 8 ? 4 : 2] = (float)i / 500;
            trip_levels(&trip, WINDOW, 2, i)[3] = (float)i / 1500;
        }
    return trip;
}

// The staircase: each line in shades of its own largest distance, whose roots are fifths of its
// root; brackets around what dosed layers leave; the peak, where it is, and how much of it is left.
Test(trip, draws_a_staircase) {
    static float distance[N_TRIP_KINDS * LAYERS * N_THETAS * (LAYERS + 1)];
    const Model m = {.config = {.n_layers = LAYERS}};
    const Trip trip = made_up_trip(&m, distance);
    cr_redirect_stdout();
    print_staircase(&trip, 10);
    fflush(stdout);
    cr_assert_stdout_eq_str(
        "How far the last of 7 tokens strays from its sober twin: 1 - cosine at every\n"
        "level, from left to right. 0 is the embedding, l + 1 what leaves layer l.\n"
        "-K 1 in a window of 3 layers around each, between brackets.\n"
        "Mean of 3 seeds from 420.\n"
        "Each line has shades of its own largest: ░ from 4 %, ▒ 16, ▓ 36, █ 64 % of it.\n\n"
        "around  0   1   2   3   4       largest  level   left\n"
        "     0 │   [░░░ ▒▒▒]▓▓▓ ███ │      0.17      4  100 %\n"
        "     1 │   [    ███ ░░░]▒▒▒ │      0.17      2   26 %\n"
        "     2 │       [▓▓▓ ███ ███]│     0.165      4  100 %\n"
        "     3 │           [    ███]│      0.25      4  100 %\n\n"
        "Of the first window's peak 100 % is left at the end, of the last one's 100 %:\n"
        "here early glitches do not fade.\n");
}

// The sentence below says what the lines say, and no line has more than 80 columns.
Test(trip, says_what_it_shows) {
    static float distance[N_TRIP_KINDS * LAYERS * N_THETAS * (LAYERS + 1)];
    const Model m = {.config = {.n_layers = LAYERS}};
    const Trip trip = made_up_trip(&m, distance);
    trip_levels(&trip, WINDOW, 0, 10)[1] = .34f; // the peak, of which .17 is left
    char *text;
    size_t n;
    FILE *shown = open_memstream(&text, &n);
    FILE *before = stdout;
    stdout = shown;
    print_staircase(&trip, 10);
    stdout = before;
    fclose(shown);
    cr_assert(strstr(text, "Of the first window's peak 50 % is left at the end, of the last one's 100 %:\n"
                           "early glitches fade, late ones have no layers left to fade in.\n"), "%s", text);
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"))
        cr_assert(count_characters(line, (int)strlen(line)) <= 80, "%s", line);
    free(text);
}

// The window in the middle at every third dose: largest distance, its level, what is left of it.
Test(trip, draws_doses) {
    static float distance[N_TRIP_KINDS * LAYERS * N_THETAS * (LAYERS + 1)];
    const Model m = {.config = {.n_layers = LAYERS}};
    const Trip trip = made_up_trip(&m, distance);
    cr_redirect_stdout();
    print_doses(&trip);
    fflush(stdout);
    cr_assert_stdout_eq_str(
        "\nThe window around layer 2 at all doses:\n\n"
        "theta   0   1   2   3   4       largest  level   left\n"
        "  0.00 │       [           ]│         0      0      -\n"
        "  0.30 │       [    ▒▒▒ ███]│     0.006      4  100 %\n"
        "  0.60 │       [    ▒▒▒ ███]│     0.012      4  100 %\n"
        "  0.90 │       [███ ▒▒▒    ]│     0.018      2    0 %\n"
        "  1.20 │       [███ ▒▒▒    ]│     0.024      2    0 %\n"
        "  1.50 │       [███ ▒▒▒    ]│      0.03      2    0 %\n");
}

// A map has columns as wide as fit, one for several levels if there are too many, and never more
// than fits.
Test(trip, maps_fit_on_a_terminal) {
    static const int wanted[][4] = { // levels, levels in a column, columns, their width
        {4, 1, 4, 4}, {11, 1, 11, 4}, {12, 1, 12, 3}, {14, 1, 14, 3}, {15, 1, 15, 2}, {22, 1, 22, 2},
        {23, 1, 23, 1}, {33, 1, 33, 1}, {44, 1, 44, 1}, {45, 2, 23, 1}, {81, 2, 41, 1}, {89, 3, 30, 1},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        const Map map = map_of(wanted[i][0]);
        cr_assert(map.each == wanted[i][1] && map.n_columns == wanted[i][2]
                      && map.width == wanted[i][3],
                  "%d levels: %d %d %d", wanted[i][0], map.each, map.n_columns, map.width);
        cr_assert(map.n_columns * map.width <= MAP_WIDTH && map.n_columns * map.each >= map.n_levels);
    }
}

// One seed, but two seeds.
Test(trip, counts) {
    cr_assert_str_eq(plural(1), "");
    cr_assert_str_eq(plural(0), "s");
    cr_assert_str_eq(plural(2), "s");
}

// Seven tokens are enough, and the whole context; three layers, too.
Test(trip, takes_what_fits) {
    const Config c = {.n_layers = 3, .seq_len = 64};
    check_trip(&c, SINK + 1);
    check_trip(&c, 64);
}

// What cannot be measured is refused before any work.
static void refused(FileHeader header, int n, double theta, const char *out) {
    Bench b;
    bench_open(&b, header, 8);
    cr_assert(freopen("/dev/null", "w", stderr));
    run_trip(&b, n, theta, out);
}
Test(trip, refuses_an_unknown_ending, .exit_code = 2) { refused(G, 12, .5, "/nowhere/csv"); }
Test(trip, refuses_a_larger_dose, .exit_code = 2) { refused(G, 12, 1.6, NULL); }
Test(trip, refuses_a_text_within_the_sink, .exit_code = 1) { refused(G, SINK, .5, NULL); }
Test(trip, refuses_a_text_beyond_the_context, .exit_code = 1) { refused(G, 65, .5, NULL); }
Test(trip, refuses_two_layers, .exit_code = 1) { refused(M, 12, .5, NULL); }

enum { NEW = 16, WIDE = 64, VOCAB = 320 };

// Makes a model surer: all logits are ten times as far apart.
static void make_surer(Bench *b) {
    float *gain = (float *)b->model.layers[0].w[FINAL_NORM].data;
    for (int i = 0; i < b->model.config.dim; i++)
        gain[i] *= 10;
}

// p (VOCAB): the probabilities of the token behind the text of a trip, from calls of one row.
static void plain_probabilities(Bench *b, const Trip *trip, Noise noise, double *p) {
    Sequence s = sequence_new(noise);
    for (int i = 0; i < trip->n_tokens; i++) {
        Row row = {trip->tokens[i], i, &s, true, true, NULL};
        forward(&b->run, &row, 1);
        for (int token = 0; token < VOCAB; token++)
            p[token] = exp(-surprise(row.logits, VOCAB, token));
    }
    sequence_free(&b->model, &s);
}

// A line of the table says this word, these probabilities, and as many signs as they want.
static void check_bar(const char *line, const char *word, double sober, double drugged) {
    double got[2];
    char signs[99] = "";
    cr_assert(!strncmp(line, word, strlen(word)), "%s%s", word, line);
    sscanf(line + 16, "%lf %% %lf %% %98s", &got[0], &got[1], signs);
    cr_assert(fabs(got[0] - 100 * sober) < .0501, "%s", line);
    cr_assert(fabs(got[1] - 100 * drugged) < .0501, "%s", line);
    const int kept = (int)round(40 * fmin(sober, drugged));
    const int n = (int)round(40 * fmax(sober, drugged));
    cr_assert((int)strlen(signs) == n && (int)strspn(signs, "|") == kept, "%s", line);
    cr_assert((int)strspn(signs + kept, drugged > sober ? "+" : "-") == n - kept, "%s", line);
}

// Token number n of the ten is this one. Without a dose it has its sober probability after every
// injection; with the largest one in all layers it has another one.
static void check_everywhere(const Trip *trip, int n, int token, double sober) {
    cr_assert(trip->top[n].token == token);
    for (int kind = 0; kind < N_TRIP_KINDS; kind++)
        for (int place = 0; place < LAYERS; place++) {
            const double p = (double)trip_drugged(trip, kind, place, 0)[n];
            cr_assert(fabs(p / sober - 1) < 1e-5, "%s %d: %g, want %g", KINDS[kind], place, p,
                      sober); // observed 2e-7
        }
    const double drugged = (double)trip_drugged(trip, STACK, LAYERS - 1, N_THETAS - 1)[n];
    cr_assert(fabs(drugged / sober - 1) > 1e-4);
}

// Beside the maps stand the ten most probable tokens: their probabilities, sober and as the mean
// over two seeds, are those of plain passes, and the signs are as long as the numbers say.
Test(trip, shows_the_next_token) {
    static float doses[N_SITES * LAYERS];
    static double sober[VOCAB], first[VOCAB], second[VOCAB];
    char name[64], line[256];
    Bench b;
    open_deep(&b);
    make_surer(&b);
    Trip trip = trip_over(&b, 12, SITE_A, FAMILY_CENTRED, 2);
    for (int layer = 1; layer <= 3; layer++)
        doses[SITE_A * LAYERS + layer] = 1;
    plain_probabilities(&b, &trip, (Noise){0}, sober);
    plain_probabilities(&b, &trip, (Noise){SEED, FAMILY_CENTRED, doses}, first);
    plain_probabilities(&b, &trip, (Noise){SEED + 1, FAMILY_CENTRED, doses}, second);

    to_name(name, ".txt");
    cr_assert(freopen(name, "w", stdout));
    print_next_token(&trip, 10); // 10 / 15 of MOST is 1
    fflush(stdout);
    FILE *file = fopen(name, "r");
    for (int i = 0; i < 3; i++) // above the table
        cr_assert(file && fgets(line, sizeof line, file));
    for (int i = 0; i < 10; i++) {
        int best = 0;
        for (int token = 0; token < VOCAB; token++)
            if (sober[token] > sober[best])
                best = token;
        char *word = visible(&b.model, best);
        cr_assert(fgets(line, sizeof line, file));
        check_bar(line, word, sober[best], (first[best] + second[best]) / 2);
        check_everywhere(&trip, i, best, sober[best]);
        sober[best] = 0; // the next one
        free(word);
    }
    trip_free(&trip);
    fclose(file);
    remove(name);
    bench_close(&b);
}

// ---- what the other experiments share

// A token stands in a table on one line, whatever it prints.
Test(lab, makes_tokens_visible) {
    const struct {
        int token;
        const char *text;
    } cases[] = {
        {FIRST_BYTE + '\n', "\\n"}, {FIRST_BYTE + '\r', "<0D>"}, {FIRST_BYTE + 127, "<7F>"},
        {FIRST_BYTE + 0xC3, "<C3>"}, {FIRST_BYTE + 'a', "a"}, {BEHIND_BYTES, " "}, {318, "["},
    };
    Bench b;
    bench_open(&b, G, 1);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *text = visible(&b.model, cases[i].token);
        cr_assert(!strcmp(text, cases[i].text), "%s, want %s", text, cases[i].text);
        free(text);
    }
    bench_close(&b);
}

// How tokens are chosen: dice, behind noise on the logits of this width, nats.
typedef struct {
    Dice dice;
    double width;
} Chance;

static const Chance NO_CHANCE = {{0, 1}, 0};

// What one row in every call says, in a run that keeps all layers.
typedef struct {
    int tokens[NEW];
    float states[NEW * WIDE]; // (NEW, dim) what left the layers
    double log_p[NEW];        // of each token
    bool most[NEW];           // is it the most probable one?
} Alone;

// Notes in a what logits (n) say of its token number i.
static void note_logits(Alone *a, int i, const float *logits, int n) {
    double total = 0, largest = -INFINITY;
    const double mine = (double)logits[a->tokens[i]];
    for (int token = 0; token < n; token++) {
        total += exp((double)logits[token]);
        largest = fmax(largest, (double)logits[token]);
    }
    a->log_p[i] = mine - log(total);
    a->most[i] = mine >= largest;
}

// Reads a prompt (n) soberly, then NEW tokens, drugged if noise has doses. They are chosen by
// chance, or told by a->tokens if that is NULL. What ends a text ends nothing here.
static void alone(Bench *b, const int *prompt, int n, Noise noise, const Chance *chance, Alone *a) {
    const Config *c = &b->model.config;
    Sequence s = sequence_new(noise);
    for (int i = 0; i < n + NEW; i++) {
        const int token = i < n ? prompt[i] : a->tokens[i - n];
        Row row = {token, i, &s, i >= n, true, NULL};
        forward(&b->run, &row, 1);
        if (i >= n) {
            const float *state = b->run.slots[c->n_layers].x;
            memcpy(a->states + (i - n) * c->dim, state, (size_t)c->dim * sizeof *state);
        }
        const int next = i + 1 - n;
        if (next < 0 || next == NEW)
            continue;
        if (chance) {
            float logits[VOCAB];
            memcpy(logits, row.logits, sizeof *logits * (size_t)c->vocab_size);
            if (chance->width > 0)
                add_logit_noise(logits, c->vocab_size, chance->width, noise.seed, i + 1);
            a->tokens[next] = choose(logits, c->vocab_size, &chance->dice, noise.seed, i + 1);
        }
        note_logits(a, next, row.logits, c->vocab_size);
    }
    sequence_free(&b->model, &s);
}

// How many tokens a text has before one that ends it.
static int ends_at(const Model *m, const int *tokens) {
    int n = 0;
    while (n < NEW && !ending(m, tokens[n]))
        n++;
    return n;
}

// A model that is surer, with working memory of one row that keeps all layers.
static void open_keeping(Bench *b, FileHeader header) {
    bench_open(b, header, 1);
    run_free(&b->run);
    run_init(&b->run, &b->model, 1, header.n_layers + 1);
    make_surer(b);
}

// A laboratory around a prompt, of which NEW tokens are wanted.
static void open_lab(Lab *lab, Bench *b, LabOptions *options, FileHeader header, int max_rows) {
    open_keeping(b, header);
    options->prompt = "TO BE, OR NOT TO";
    options->n_new = NEW;
    options->noise = (NoiseOptions){.seed = SEED};
    lab_open(lab, &b->model, options, max_rows);
}

static void close_lab(Lab *lab, Bench *b) {
    lab_close(lab);
    bench_close(b);
}

// As many tokens are written as are wanted and fit; the prompt's logits are those of a plain pass.
Test(lab, knows_its_room) {
    LabOptions options = {.n_seeds = 1};
    Bench b;
    Lab lab;
    open_lab(&lab, &b, &options, G, 5);
    cr_assert(lab.n_prompt == 18 && lab.n_new == NEW);
    Sequence s = sequence_new((Noise){0});
    const float *logits = feed(&b.run, &s, lab.prompt, 18, WANTS_LOGITS);
    cr_assert(!memcmp(logits, lab.logits, sizeof *logits * VOCAB));
    sequence_free(&b.model, &s);
    for (int wanted = 0; wanted < 99; wanted += 46) { // 64 - 18 fit
        lab_close(&lab);
        options.n_new = wanted;
        lab_open(&lab, &b.model, &options, 5);
        cr_assert(lab.n_new == 46);
    }
    close_lab(&lab, &b);
}

// Each text begins with all that the prompt has left: tokens, keys and values, and so a shower of it
// has the bits of the prompt that was read.
Test(lab, begins_behind_the_prompt) {
    LabOptions options = {.n_seeds = 1};
    Bench b;
    Lab lab;
    open_lab(&lab, &b, &options, G, 5);
    Sequence s = after_prompt(&lab, (Noise){.seed = 7});
    cr_assert(s.length == lab.n_prompt && s.noise.seed == 7 && s.first_dirty == CLEAN);
    cr_assert(s.capacity >= lab.n_prompt + lab.n_new);
    cr_assert(!memcmp(s.tokens, lab.prompt, (size_t)lab.n_prompt * sizeof *s.tokens));
    const size_t size = (size_t)(lab.n_prompt * lab.config->kv_dim) * sizeof(float);
    for (int layer = 0; layer < lab.config->n_layers; layer++) {
        cr_assert(!memcmp(s.k[layer], lab.sequence.k[layer], size));
        cr_assert(!memcmp(s.v[layer], lab.sequence.v[layer], size));
    }
    s.first_dirty = 0;
    cr_assert_eq(cold_shower(&lab.run, &s), lab.n_prompt);
    for (int layer = 0; layer < lab.config->n_layers; layer++)
        cr_assert(!memcmp(s.v[layer], lab.sequence.v[layer], size));
    sequence_free(&b.model, &s);
    close_lab(&lab, &b);
}

// ---- texts side by side

enum { N_TEXTS = 7, N_PROMPT = 14 };

// Seven texts that begin with shorter and shorter parts of one prompt, each with its own noise and
// chance.
typedef struct {
    Bench b;
    int prompt[N_PROMPT];
    Noise noise[N_TEXTS];
    Chance chance[N_TEXTS];
    Alone want[N_TEXTS];
} Seven;

// What watch_one is told, and what it has seen.
typedef struct {
    int dim, vocab_size;
    double width;           // of the noise on the logits
    float seen[NEW * WIDE]; // (NEW, dim) what left the layers
} Watched;

static void watch_one(Text *text, const float *state, float *logits) {
    Watched *watched = text->owner;
    const Sequence *s = text->sequence;
    float *to = watched->seen + (text->n_tokens - 1) * watched->dim;
    memcpy(to, state, (size_t)watched->dim * sizeof *state);
    if (watched->width > 0)
        add_logit_noise(logits, watched->vocab_size, watched->width, s->noise.seed, s->length);
}

static void open_seven(Seven *seven, FileHeader header) {
    const int sites[N_TEXTS] = {0, ALL_SITES, 1 << SITE_V, 0, 0, 1 << SITE_H, 0};
    const Chance chance[N_TEXTS] = {{{0, 0}, 0}, {{0, 0}, 0},  {{5, 1}, 0}, {{9, .9}, 0},
                                    {{0, 1}, 15}, {{2, 1}, 9}, {{0, 0}, 0}};
    open_keeping(&seven->b, header);
    memcpy(seven->chance, chance, sizeof chance);
    for (int i = 0; i < N_PROMPT; i++)
        seven->prompt[i] = i ? 3 + 11 * i * i % (header.vocab_size - 3) : 1;
    for (int i = 0; i < N_TEXTS; i++) {
        seven->noise[i] = bench_noise(&seven->b, sites[i], i % 2);
        seven->noise[i].seed += (uint64_t)i;
        alone(&seven->b, seven->prompt, N_PROMPT - i, seven->noise[i], &chance[i],
              &seven->want[i]);
    }
}

// One of the texts came out as it should: its tokens, and what left the layers. What lies behind is
// untouched.
static void check_one(const Seven *seven, int i, const Text *text) {
    static float blank[WIDE];
    const Config *c = &seven->b.model.config;
    const Alone *want = &seven->want[i];
    const int n = ends_at(&seven->b.model, want->tokens), n_read = min(n, NEW - 1);
    const size_t n_bytes = (size_t)n * sizeof *want->tokens;
    cr_assert(text->n_tokens == n && text->sequence->length == N_PROMPT - i + n_read, "text %d", i);
    cr_assert(!memcmp(text->tokens, want->tokens, n_bytes), "text %d", i);
    if (!text->owner)
        return;
    const Watched *watched = text->owner;
    const size_t n_seen = (size_t)(n_read * c->dim);
    memset(blank, -1, sizeof blank);
    cr_assert(!memcmp(watched->seen, want->states, n_seen * sizeof(float)), "text %d", i);
    cr_assert(!memcmp(watched->seen + n_seen, blank, (size_t)c->dim * sizeof(float)), "text %d", i);
}

// Writes all seven at once, in calls of max_rows rows. One of those that have no noise on the
// logits is not watched.
static void check_seven(Seven *seven, int max_rows, int unwatched) {
    static Watched watched[N_TEXTS];
    const Model *m = &seven->b.model;
    int tokens[N_TEXTS][NEW];
    Text texts[N_TEXTS];
    Sequence s[N_TEXTS];
    Run run;
    run_init(&run, m, max_rows, 1);
    memset(watched, -1, sizeof watched);
    for (int i = 0; i < N_TEXTS; i++) {
        s[i] = sequence_new(seven->noise[i]);
        feed(&run, &s[i], seven->prompt, N_PROMPT - i, 0);
        watched[i].dim = m->config.dim;
        watched[i].vocab_size = m->config.vocab_size;
        watched[i].width = seven->chance[i].width;
        texts[i] = (Text){
            .sequence = &s[i],
            .dice = seven->chance[i].dice,
            .next = seven->want[i].tokens[0],
            .tokens = tokens[i],
        };
        if (i != unwatched) {
            texts[i].watch = watch_one;
            texts[i].owner = &watched[i];
        }
    }
    write_texts(&run, texts, N_TEXTS, NEW);
    for (int i = 0; i < N_TEXTS; i++) {
        check_one(seven, i, &texts[i]);
        sequence_free(m, &s[i]);
    }
    run_free(&run);
}

// Seven texts, in one call or in several, are to the last bit what each is alone, and so is what
// left the layers: sober and dosed, with temperature and noise on the logits. A text that comes to
// its end, be it at once, drops out, and the others go on.
Test(write_texts, is_as_each_alone) {
    static Seven seven;
    const FileHeader headers[] = {G, M};
    for (int model = 0; model < 2; model++) {
        open_seven(&seven, headers[model]);
        Model *m = &seven.b.model;
        const Alone *want = seven.want;
        const struct {
            int end, bos;
        } ends[] = {
            {-1, -1},
            {want[3].tokens[5], -1},
            {want[2].tokens[0], want[5].tokens[9]},
            {want[6].tokens[NEW - 1], want[4].tokens[NEW - 2]},
        };
        for (int i = 0; i < 4; i++) {
            never_end(m);
            let_end(m, ends[i].end);
            m->config.bos = ends[i].bos;
            check_seven(&seven, 1, i);
            check_seven(&seven, 3, i);
            check_seven(&seven, 64, i);
        }
        bench_close(&seven.b);
    }
}

// ---- chance

static int throw(const Chance *chance, const float *logits, int n, uint64_t seed, int position) {
    float noisy[VOCAB];
    memcpy(noisy, logits, sizeof *noisy * (size_t)n);
    if (chance->width > 0)
        add_logit_noise(noisy, n, chance->width, seed, position);
    return choose(noisy, n, &chance->dice, seed, position);
}

// Without chance the most probable token is taken, the first of equals.
Test(choose, takes_the_most_probable) {
    const float logits[5] = {0, 1, 7, 2, 7};
    cr_assert(throw(&NO_CHANCE, logits, 5, SEED, 3) == 2);
}

// With temperature or noise on the logits, the same seed and position choose the same again, and
// another one of them chooses anew.
Test(choose, is_a_function_of_the_place) {
    const float logits[8] = {0, 1, -2, 1.5f, 1.5f, 0, .5f, 1};
    const Chance noise = {{0, 1}, 1}, both = {{1, 1}, .5};
    int n_other_seed = 0, n_other_position = 0;
    for (int i = 0; i < 1000; i++) {
        const Chance *chance = i % 2 ? &both : &noise;
        const int first = throw(chance, logits, 8, SEED, i);
        cr_assert(throw(chance, logits, 8, SEED, i) == first);
        n_other_seed += throw(chance, logits, 8, SEED + 1, i) != first;
        n_other_position += throw(chance, logits, 8, SEED, i + 1) != first;
    }
    cr_assert(n_other_seed > 700, "%d", n_other_seed);         // observed 817
    cr_assert(n_other_position > 700, "%d", n_other_position); // observed 796
}

// The noise on the logits is normal, as wide as was asked for, and each token has its own: of two
// equal logits each wins as often, one that is 1 behind with the probability of that difference.
Test(logit_noise, is_normal) {
    enum { THROWS = 40000 };
    const double width = 1.5, behind = .5 * erfc(1 / (2 * width));
    double n_equal = 0, n_behind = 0, moment[5] = {0}, product = 0, squares = 0;
    for (int i = 0; i < THROWS; i++) {
        float logits[2] = {0, 0};
        add_logit_noise(logits, 2, width, SEED, i);
        const double x = (double)logits[0] / width, y = (double)logits[1] / width;
        n_equal += x >= y;
        n_behind += x >= y + 1 / width;
        for (int power = 1; power < 5; power++)
            moment[power] += (pow(x, power) + pow(y, power)) / THROWS / 2;
        product += x * y / THROWS;
        squares += x * x * y * y / THROWS;
    }
    cr_assert(fabs(n_equal / THROWS - .5) < .01, "%g", n_equal / THROWS);      // observed .002
    cr_assert(fabs(n_behind / THROWS - behind) < .01, "%g", n_behind / THROWS); // observed 7e-5
    cr_assert(fabs(moment[1]) < .02 && fabs(moment[3]) < .05, "%g %g", moment[1], moment[3]);
    cr_assert(fabs(moment[2] - 1) < .02 && fabs(moment[4] - 3) < .1, "%g %g", moment[2], moment[4]);
    cr_assert(fabs(product) < .02 && fabs(squares - 1) < .06, "%g %g", product, squares);
}

// ---- explore

static double sum(const double *x, int n) {
    double total = 0;
    for (int i = n - 1; i >= 0; i--)
        total += x[i];
    return total;
}

// The sum of the angles between two lists of n vectors (n, dim), each by its chord.
static double sum_of_angles(const float *a, const float *b, int n, int dim) {
    double total = 0;
    for (int i = 0; i < n; i++)
        total += 2 * asin(sqrt(chord2(a + i * dim, b + i * dim, dim)) / 2);
    return total;
}

// The sober continuation is the most probable text of a plain pass. Judged, its log-probability is
// the sum of that pass's, and it has no angle.
static void check_sober(Lab *lab, Bench *b) {
    static Alone want;
    int tokens[NEW];
    double log_p, angle;
    alone(b, lab->prompt, lab->n_prompt, (Noise){0}, &NO_CHANCE, &want);
    const int n = ends_at(&b->model, want.tokens);
    cr_assert(n > 3 && sober_continuation(lab, tokens) == n);
    cr_assert(!memcmp(tokens, want.tokens, sizeof *tokens * (size_t)n));
    const Text text = {.tokens = tokens, .n_tokens = n};
    judge(lab, &text, want.states, &log_p, &angle);
    cr_assert(fabs(log_p / sum(want.log_p, n) - 1) < 1e-12, "%g", log_p); // observed 5e-15
    cr_assert(angle < 1e-9, "%g", angle);                                 // observed 0
}

// What was written drugged is read soberly for its log-probability, and for the angle compared with
// what left the layers when it was written. A text may be short, or empty.
static void check_drugged(Lab *lab, Bench *b) {
    static Alone written, told;
    const Chance chance = {{5, 1}, 0};
    const int lengths[] = {0, 1, 2, 9, 16}, dim = b->model.config.dim;
    alone(b, lab->prompt, lab->n_prompt, bench_noise(b, ALL_SITES, FAMILY_CENTRED), &chance,
          &written);
    told = written;
    alone(b, lab->prompt, lab->n_prompt, (Noise){0}, NULL, &told);
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        const int n = lengths[i];
        const Text text = {.tokens = written.tokens, .n_tokens = n};
        double log_p, angle;
        judge(lab, &text, written.states, &log_p, &angle);
        cr_assert(fabs(log_p - sum(told.log_p, n)) <= -1e-12 * log_p, "%d: %g", n, log_p);
        const double want = sum_of_angles(written.states, told.states, n - 1, dim);
        cr_assert(fabs(angle - want) <= 1e-5 * want, "%d: %g %g", n, angle, want); // observed 1e-7
    }
}

// However many rows fit at once.
Test(explore, judges_like_plain_passes) {
    const FileHeader headers[] = {G, M};
    const int max_rows[] = {64, 5, 1};
    for (int model = 0; model < 2; model++)
        for (int i = 0; i < 3; i++) {
            LabOptions options = {.n_seeds = 1};
            static Bench b;
            Lab lab;
            open_lab(&lab, &b, &options, headers[model], max_rows[i]);
            check_sober(&lab, &b);
            check_drugged(&lab, &b);
            close_lab(&lab, &b);
        }
}

// Diversity is the share of different ones among all pairs of neighbours, within texts only. A text
// that ended early counts as long as the others.
Test(explore, counts_pairs) {
    int up[] = {1, 2, 3, 4, 5}, on[] = {6, 7, 8, 9};
    int same[] = {7, 7, 7, 7}, back[] = {2, 1, 1 << 30};
    const Text texts[] = {
        {.tokens = up, .n_tokens = 5},   {.tokens = up, .n_tokens = 5},
        {.tokens = up, .n_tokens = 5},   {.tokens = on, .n_tokens = 4},
        {.tokens = back, .n_tokens = 3}, {.tokens = same, .n_tokens = 4},
        {.tokens = up, .n_tokens = 1},   {.tokens = up, .n_tokens = 0},
    };
    const struct {
        int first, n, at_least;
        double want;
    } cases[] = {
        {0, 1, 0, 1}, {0, 3, 0, 1. / 3}, {2, 3, 0, 1}, {5, 1, 0, 1. / 3}, {6, 1, 0, 0}, {7, 1, 0, 0},
        {6, 2, 0, 0}, {5, 3, 0, 1. / 3}, {0, 8, 0, 10. / 20}, {0, 0, 0, 0},
        // what a text lacks is counted as repeated
        {0, 1, 5, 1}, {0, 1, 9, 4. / 8}, {2, 3, 5, 9. / 12}, {7, 1, 3, 0}, {6, 2, 6, 0}, {7, 1, 1, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const double got = diversity(texts + cases[i].first, cases[i].n, cases[i].at_least);
        cr_assert(fabs(got - cases[i].want) < 1e-15, "case %zu: %g", i, got);
    }
}

// A curve has this likelihood at this diversity, or none if it is NAN.
static void check_curve(const Cell *curve, double at, double want) {
    const double got = best_likelihood(curve, at);
    if (isnan(want))
        cr_assert(isnan(got), "at %g: %g", at, got);
    else
        cr_assert(fabs(got - want) < 1e-12, "at %g: %g, want %g", at, got, want);
}

// Between two cells the curve is a straight line, whichever way it runs; where there are several
// the best counts, where there is none it is NAN, and cells of the same diversity draw none.
Test(explore, reads_a_curve) {
    const double fold[N_STRENGTHS] = {.2, .6, .4, .4, .8, .8, .8, .8, .8};
    Cell rising[N_STRENGTHS], falling[N_STRENGTHS], folded[N_STRENGTHS], point[N_STRENGTHS];
    for (int i = 0; i < N_STRENGTHS; i++) {
        rising[i] = (Cell){.diversity = .1 * (i + 1), .likelihood = -i * i};
        falling[N_STRENGTHS - 1 - i] = rising[i];
        folded[i] = (Cell){.diversity = fold[i], .likelihood = -i};
        point[i] = (Cell){.diversity = .5, .likelihood = -i};
    }
    const struct {
        double diversity, likelihood;
    } on_rising[] = {{.1, 0}, {.25, -2.5}, {.825, -52.75}, {.9, -64}, {.0999, NAN}, {.9001, NAN}},
      on_folded[] = {{.5, -.75}, {.7, -3.75}, {.8, -4}, {.4, -.5}, {.2, 0}, {.81, NAN}};
    for (int i = 0; i < 6; i++) {
        check_curve(rising, on_rising[i].diversity, on_rising[i].likelihood);
        check_curve(falling, on_rising[i].diversity, on_rising[i].likelihood);
        check_curve(folded, on_folded[i].diversity, on_folded[i].likelihood);
    }
    check_curve(point, .5, NAN);
}

enum { K = 3 }; // texts in each cell

// Do two texts consist of the same tokens?
static bool same_tokens(const Text *a, const Text *b) {
    return a->n_tokens == b->n_tokens
        && !memcmp(a->tokens, b->tokens, a->n_tokens * sizeof *a->tokens);
}

// How a cell's method throws.
static Chance chance_of(const Cell *cell) {
    Chance chance = NO_CHANCE;
    if (cell->method == TEMPERATURE)
        chance.dice.temperature = cell->strength;
    if (cell->method == LOGIT_NOISE)
        chance.width = cell->strength;
    return chance;
}

// A cell holds the texts that are written alone, and their numbers. Returns how many of them are
// shorter than the sober one, of n_sober tokens.
static int check_cell(Lab *lab, Bench *b, const Cell *cell, const Sober *sober) {
    static Alone one;
    char *written[K];
    double log_p = 0, angle = 0, prefix = 0, n = 0, n_pairs = 0, log_ps[K], lengths[K], squares = 0;
    int n_differ = 0, n_short = 0, n_ended = 0;
    const Chance chance = chance_of(cell);
    for (int i = 0; i < K; i++) {
        const Noise noise = {SEED + (uint64_t)i, FAMILY_CENTRED, cell->theta};
        alone(b, lab->prompt, lab->n_prompt, noise, &chance, &one);
        const Text text = {.tokens = one.tokens, .n_tokens = ends_at(&b->model, one.tokens)};
        cr_assert(same_tokens(&cell->texts[i], &text), "%s %g, text %d: %d tokens, want %d",
                  cell->name, cell->strength, i, cell->texts[i].n_tokens, text.n_tokens);
        double more_log_p, more_angle;
        judge(lab, &text, one.states, &more_log_p, &more_angle);
        log_p += log_ps[i] = more_log_p;
        lengths[i] = text.n_tokens;
        cr_assert(fabs(cell->costs[i] * text.n_tokens + more_log_p) <= -1e-12 * more_log_p);
        angle += more_angle;
        n += text.n_tokens;
        n_pairs += text.n_tokens ? text.n_tokens - 1 : 0;
        n_short += text.n_tokens < sober->n_tokens;
        n_ended += text.n_tokens < NEW;
        written[i] = text_of(&b->model, text.tokens, text.n_tokens);
        int same = 0;
        while (sober->written[same] && written[i][same] == sober->written[same])
            same++;
        prefix += (double)same / K;
        n_differ += sober->written[same] || written[i][same];
    }
    for (int i = 0; i < K; i++)
        squares += pow(log_ps[i] - log_p / n * lengths[i], 2);
    char where[64];
    snprintf(where, sizeof where, "%s %g", cell->name, cell->strength);
    cr_assert(cell->differ == n_differ && cell->ended == n_ended, "%s", where);
    cr_assert(fabs(cell->error - sqrt(K * squares / (K - 1)) / n) < 1e-12, "%s", where);
    cr_assert(fabs(cell->prefix - prefix) < 1e-9, "%s", where);
    cr_assert(fabs(cell->likelihood - log_p / n) <= -1e-12 * cell->likelihood, "%s", where);
    cr_assert(fabs(cell->angle - angle / n_pairs) <= 1e-12 * cell->angle, "%s", where);
    cr_assert((cell->theta != NULL) == (cell->angle > 0), "%s", where);
    cr_assert(fabs(cell->diversity - diversity(cell->texts, K, sober->n_tokens)) < 1e-12, "%s", where);
    for (int i = 0; i < K; i++)
        free(written[i]);
    return n_short;
}

// Two cells are the same to the last bit.
static void check_same(const Cell *a, const Cell *b) {
    const size_t n_bytes = sizeof *a - offsetof(Cell, prefix); // all that are doubles
    for (int i = 0; i < K; i++)
        cr_assert(same_tokens(&a->texts[i], &b->texts[i]), "%s %g", a->name, a->strength);
    cr_assert(a->differ == b->differ && a->ended == b->ended, "%s %g", a->name, a->strength);
    cr_assert(!memcmp(&a->prefix, &b->prefix, n_bytes), "%s %g", a->name, a->strength);
}

// Each site is a method, named by its letter, and has the angles; a dose in its table acts there
// and nowhere else.
Test(explore, tries_every_site) {
    static Cell cells[N_CELLS];
    static Text texts[N_CELLS];
    static Bench b;
    LabOptions options = {.n_seeds = 1};
    Lab lab;
    open_lab(&lab, &b, &options, G, 64);
    cells_init(cells, &lab, texts);
    for (int site = 0; site < N_SITES; site++)
        for (int i = 0; i < N_STRENGTHS; i++) {
            const Cell *cell = &cells[site * N_STRENGTHS + i];
            const int n_layers = b.model.config.n_layers;
            cr_assert(cell->name[0] == SITES[site] && !cell->name[1], "%s", cell->name);
            cr_assert(cell->strength == ANGLES[i]);
            for (int other = 0; other < N_SITES; other++)
                for (int layer = 0; layer < n_layers; layer++) {
                    const float want = other == site ? (float)ANGLES[i] : 0;
                    cr_assert(cell->theta[other * n_layers + layer] == want, "%s at %c, layer %d",
                              cell->name, SITES[other], layer);
                }
        }
    for (int i = 0; i < N_CELLS; i++)
        cell_free(&cells[i]);
    close_lab(&lab, &b);
}

// As many cells are written at once as a gigabyte holds of keys, values and states, one at least, and
// that is said: here a text needs 60 * 2 * 4 * 500 + 50 * 1000 = 290,000 floats, 3 seeds 3.48 MB.
static void check_room(int more, const char *said, int n) {
    const Config c = {.n_layers = 4, .kv_dim = 500 * more, .dim = 1000 * more};
    const LabOptions options = {.n_seeds = 3};
    const Lab lab = {.options = &options, .config = &c, .n_prompt = 10, .n_new = 50};
    char name[64], line[128];
    to_name(name, ".err");
    cr_assert(freopen(name, "w", stderr));
    cr_assert_eq(cells_at_once(&lab, N_CELLS), n);
    fflush(stderr);
    FILE *file = fopen(name, "r");
    cr_assert(file && fgets(line, sizeof line, file));
    cr_assert_str_eq(line, said);
    fclose(file);
    remove(name);
}

Test(explore, says_how_much_memory_it_takes) {
    cr_assert_eq(N_CELLS, 64);
    check_room(1, "192 texts, 192 side by side, 223 MB for each batch\n", 64);
    check_room(10, "192 texts, 84 side by side, 974 MB for each batch\n", 28);
    check_room(1000, "192 texts, 3 side by side, 3480 MB for each batch\n", 1);
}

// Every cell holds the texts that are written alone, and their numbers. The lowest temperature
// writes the sober text, and all is the same to the last bit however many cells stand side by side
// and however many rows fit.
Test(explore, fills_its_cells) {
    static Cell cells[N_CELLS], again[N_CELLS];
    static Text texts[N_CELLS * K], texts_again[N_CELLS * K];
    static Bench b;
    int tokens[NEW], n_short = 0, n_differ = 0;
    LabOptions options = {.n_seeds = K};
    Lab lab;
    open_lab(&lab, &b, &options, G, 64);
    sober_continuation(&lab, tokens);
    let_end(&b.model, tokens[11]);
    Sober sober = sober_of(&lab);
    cells_init(cells, &lab, texts);
    run_cells(&lab, cells, N_CELLS, &sober);

    run_free(&lab.run);
    run_init(&lab.run, &b.model, 5, 1);
    cells_init(again, &lab, texts_again);
    for (int i = 0; i < N_CELLS; i += 4)
        run_cells(&lab, &again[i], min(4, N_CELLS - i), &sober);

    for (int i = 0; i < N_CELLS; i++) {
        n_short += check_cell(&lab, &b, &cells[i], &sober);
        n_differ += cells[i].differ;
        check_same(&cells[i], &again[i]);
    }
    const Cell *coldest = &cells[TEMPERATURE * N_STRENGTHS];
    cr_assert(coldest->differ == 0 && cells[SOBER_CELL].differ == 0, "%d", coldest->differ);
    cr_assert(coldest->ended == K, "the sober text ends early");
    cr_assert(coldest->prefix == (double)strlen(sober.written), "%g of %s", coldest->prefix,
              sober.written);
    cr_assert(sober.n_tokens > 3 && sober.n_tokens < 12 && n_short > 0 && n_differ > 0, "%d %d %d",
              sober.n_tokens, n_short, n_differ);
    for (int i = 0; i < N_CELLS; i++) {
        cell_free(&cells[i]);
        cell_free(&again[i]);
    }
    sober_free(&sober);
    close_lab(&lab, &b);
}

// ---- shower

// A text with showers is what a loop of single rows writes that takes them in the same places, and
// each text has its own; they change what is written.
Test(shower, comes_in_time) {
    static Bench b;
    static float doses[N_SITES * MOST_LAYERS];
    enum { N = 4, LONG = 24 };
    static const int every[N] = {0, 7, 3, 1};
    static int tokens[N][LONG]; // 0 where a text has ended
    int want[LONG + 1], n_different = 0;
    Sequence sequences[N];
    Text texts[N];
    LabOptions options = {.n_seeds = 1};
    Lab lab;
    open_lab(&lab, &b, &options, G, 64);
    lab.n_new = LONG;
    for (int i = 0; i < N_SITES * G.n_layers; i++)
        doses[i] = i / G.n_layers == SITE_H ? 1.5f : 0;
    const Noise noise = {SEED, FAMILY_CENTRED, doses};
    for (int i = 0; i < N; i++) {
        sequences[i] = after_prompt(&lab, noise);
        texts[i] = (Text){.sequence = &sequences[i], .next = argmax(lab.logits, VOCAB),
                          .tokens = tokens[i], .shower_every = every[i]};
    }
    write_texts(&lab.run, texts, N, LONG);
    for (int i = 0; i < N; i++) {
        Sequence s = after_prompt(&lab, noise);
        want[0] = argmax(lab.logits, VOCAB);
        const int n = texts[i].n_tokens;
        for (int t = 0; t < n; t++) {
            if (every[i] && s.n_drugged >= every[i])
                cold_shower(&b.run, &s);
            want[t + 1] = argmax(feed(&b.run, &s, &want[t], 1, DRUGGED | WANTS_LOGITS), VOCAB);
        }
        cr_assert(n == LONG || (n > 6 && ending(&b.model, want[n])), "every %d: %d", every[i], n);
        cr_assert(!memcmp(want, tokens[i], n * sizeof *want), "every %d", every[i]);
        n_different += memcmp(tokens[0], tokens[i], sizeof tokens[i]) != 0;
        sequence_free(&b.model, &s);
        sequence_free(&b.model, &sequences[i]);
    }
    cr_assert(n_different == N - 1, "%d", n_different);
    close_lab(&lab, &b);
}

// Mean and error of a few numbers: their squared deviations 4, 0, 4, divided by 3 * 2.
Test(shower, means) {
    const double x[] = {1, 3, 5};
    const Mean mean = mean_of(x, 3), single = mean_of(x, 1);
    cr_assert(mean.mean == 3 && fabs(mean.error - sqrt(8. / 6)) < 1e-15, "%g", mean.error);
    cr_assert(single.mean == 1 && isnan(single.error));
}

// Gains are taken seed by seed: 1, -1, 3 and 0. The typical seed is the one nearest to their mean,
// .75, but for one whose text ended early.
Test(shower, gains) {
    const LabOptions options = {.n_seeds = 4};
    const Lab lab = {.options = &options, .n_new = 9};
    double before[] = {2, 2, 5, 1}, after[] = {1, 3, 2, 1};
    Text whole[4] = {{.n_tokens = 9}, {.n_tokens = 9}, {.n_tokens = 9}, {.n_tokens = 9}};
    Text broken[4] = {{.n_tokens = 8}, {.n_tokens = 9}, {.n_tokens = 9}, {.n_tokens = 9}};
    const Cell never = {.lab = &lab, .costs = before, .texts = whole};
    Cell often = {.lab = &lab, .costs = after, .texts = whole};
    int n_better;
    const Mean gain = shower_gain(&often, &never, 4, &n_better);
    cr_assert(gain.mean == .75 && n_better == 2);
    cr_assert(fabs(gain.error - sqrt((.0625 + 3.0625 + 5.0625 + .5625) / 12)) < 1e-15);
    cr_assert_eq(typical_seed(&often, &never, 4), 0);
    often.texts = broken;
    cr_assert_eq(typical_seed(&often, &never, 4), 3);
}

// ---- probe

enum { TWINS = 4 };

// agrees (NEW): how many of the twins with this noise would write each token of a sober text, from
// calls of one row.
static void ask_alone(Bench *b, const Lab *lab, const Alone *text, Noise noise, double *agrees) {
    static Alone twin;
    for (int i = 0; i < NEW; i++)
        agrees[i] = 0;
    for (int i = 0; i < TWINS; i++) {
        twin = *text;
        alone(b, lab->prompt, lab->n_prompt, noise, NULL, &twin);
        for (int j = 0; j < NEW; j++)
            agrees[j] += twin.most[j];
        noise.seed++;
    }
}

// Probes the first n tokens of a sober text, of which so many twins agree. Returns at how many they
// are not of one mind.
static int check_probe(Lab *lab, const Alone *text, int n, Noise noise, const double *agrees) {
    int tokens[NEW], said[NEW * TWINS], n_torn = 0;
    double agreement[NEW], probability[NEW];
    Probe probe = {tokens, n, probability, agreement, said};
    memcpy(tokens, text->tokens, sizeof tokens);
    probe_measure(lab, noise, &probe);
    for (int i = 0; i < n; i++) {
        const double off = fabs(probability[i] / exp(text->log_p[i]) - 1);
        cr_assert(off < 1e-12, "token %d: %g", i, off); // observed 7e-15
        cr_assert(agreement[i] == agrees[i] / TWINS, "token %d: %g", i, agreement[i]);
        n_torn += agreement[i] > 0 && agreement[i] < 1;
        Said list[TWINS];
        int n_said = count_said(&probe, i, TWINS, list), n_twins = 0, n_agree = 0;
        for (int j = 0; j < n_said; j++) {
            n_twins += list[j].n;
            n_agree += list[j].token == tokens[i] ? list[j].n : 0;
            cr_assert(!j || by_twins(&list[j - 1], &list[j]) < 0, "each once, most first");
        }
        cr_assert(n_twins == TWINS && n_agree == agrees[i], "token %d: %d %d", i, n_twins, n_agree);
    }
    cr_assert(agreement[0] == 1, "the first token follows from the sober prompt");
    return n_torn;
}

// Twins without a dose agree everywhere; twins with one say at each token what sequences of their
// own say, with seeds of their own. The probability is always the sober one.
static void check_twins(FileHeader header, int family, int max_rows) {
    static Alone text;
    static Bench b;
    float strong[N_SITES * MOST_LAYERS] = {0}, zero[N_SITES * MOST_LAYERS] = {0};
    double sober[NEW], drugged[NEW], other[NEW];
    LabOptions options = {.n_seeds = TWINS};
    Lab lab;
    open_lab(&lab, &b, &options, header, max_rows);
    // Not all sites there may be: so much noise that no twin agrees would show nothing.
    for (int site = 0; site < N_GOLDEN_SITES; site++)
        for (int layer = 0; layer < header.n_layers; layer++)
            strong[site * header.n_layers + layer] = 1.5f;
    alone(&b, lab.prompt, lab.n_prompt, (Noise){0}, &NO_CHANCE, &text);
    const Noise noise = {SEED, family, strong}, other_noise = {SEED + 9, family, strong};
    ask_alone(&b, &lab, &text, noise, drugged);
    ask_alone(&b, &lab, &text, other_noise, other);
    for (int i = 0; i < NEW; i++)
        sober[i] = TWINS;

    check_probe(&lab, &text, NEW, (Noise){SEED, family, NULL}, sober);
    check_probe(&lab, &text, NEW, (Noise){SEED, family, zero}, sober);
    check_probe(&lab, &text, 1, noise, drugged);
    int n_torn = check_probe(&lab, &text, NEW, noise, drugged);
    n_torn += check_probe(&lab, &text, NEW, other_noise, other);
    cr_assert(n_torn > 0, "the twins are always of one mind");
    cr_assert(memcmp(drugged, other, sizeof other), "another seed changes nothing");
    close_lab(&lab, &b);
}

Test(probe, asks_twins) {
    const FileHeader headers[] = {G, M};
    for (int model = 0; model < 2; model++)
        for (int family = 0; family < 2; family++) {
            check_twins(headers[model], family, 5);
            check_twins(headers[model], family, 64);
        }
}

// A bar is kept up to the smaller of the two probabilities, and lost or won up to the larger.
Test(next_token, signs_of_a_bar) {
    cr_assert_eq(bar_sign(49.8, .5, .6), '|');
    cr_assert_eq(bar_sign(50.2, .5, .6), '+');
    cr_assert_eq(bar_sign(29.8, .5, .3), '|');
    cr_assert_eq(bar_sign(30.2, .5, .3), '-');
    cr_assert_eq(bar_sign(49.8, .5, .3), '-');
}
