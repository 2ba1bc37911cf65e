/* test_more.c - small promises of the two books that the larger tests pass by: what is printed in
 * cases that the small model never comes to, and what happens at the edges of a function.
 */
#define TRAIN_STEP_LIBRARY
#include "../../train_step.c"
#include "testing.h"
#include <criterion/redirect.h>
#include <sys/resource.h>
#include <sys/wait.h>

// ---- what is printed

// A step may ruin a model so thoroughly that a loss is no number. It is said in words, in the same
// column, and what has no tokens at all has a dash.
Test(table, ruin_has_a_word) {
    const double losses[] = {0, 1, INFINITY, NAN};
    cr_redirect_stdout();
    print_loss(2.5, NULL);
    print_loss(INFINITY, NULL);
    print_loss(mean_loss(losses, 0, 2), NULL);
    print_loss(mean_loss(losses, 1, 3), NULL);
    print_loss(mean_loss(losses, 1, 4), NULL);
    print_loss(mean_loss(losses, 2, 2), NULL);
    fflush(stdout);
    cr_assert_stdout_eq_str("       2.5000   not finite       0.5000   not finite   not finite"
                            "            -");
}

static char *row_of(Table table, const char *a, const char *b) {
    char *text;
    size_t n;
    table.to = open_memstream(&text, &n);
    print_cell(&table, a, (int)strlen(a));
    print_cell(&table, b, (int)strlen(b));
    end_heading(&table);
    print_cell(&table, b, (int)strlen(b));
    print_cell(&table, a, (int)strlen(a));
    end_row(&table);
    fclose(table.to);
    return text;
}

// The three ways to print a table: quotes and bars are escaped where they mean something, and only
// there; a terminal's cell is cut to its width, counted in characters.
Test(table, three_ways) {
    const struct {
        Table table;
        const char *want;
    } cases[] = {
        {{0}, "\"a\"\"b\",\"é|\n\"\n\"é|\n\",\"a\"\"b\"\n"},
        {{.markdown = true}, "| a\"b | é\\|  |\n|---|---|\n| é\\|  | a\"b |\n"},
        {{.width = 6}, "a\"b   é|\n\né|\n   a\"b\n"},
        {{.width = 4}, "a\"b é|\n\né|\n a\"b\n"},
        {{.width = 3}, "a… é…\né… a…\n"}, // what is cut says so
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *row = row_of(cases[i].table, "a\"b", "é|\n");
        cr_assert_str_eq(row, cases[i].want, "case %zu: %s", i, row);
        free(row);
    }
}

// All tokens of a text are in it, from the first to half a character at its end; only the space that
// encoding puts in front is not. What a terminal would obey is spelt.
Test(table, the_text_of_tokens) {
    enum { SPACE_ID = BEHIND_BYTES };
    const int tokens[] = {SPACE_ID, SPACE_ID + 'H' - ' ', 3 + 27, SPACE_ID, 3 + 0xE4};
    Bench b;
    bench_open(&b, G, 1);
    char *text = text_of(&b.model, tokens, 5);
    cr_assert_str_eq(text, "H<1B> \xEF\xBF\xBD");
    free(text);
    text = text_of(&b.model, tokens + 1, 1);
    cr_assert_str_eq(text, "H");
    free(text);
    text = text_of(&b.model, tokens, 0);
    cr_assert_str_eq(text, "");
    free(text);
    bench_close(&b);
}

// ---- messages

// What a function says, on stdout and stderr, before it ends the program, and the status.
typedef struct {
    int status; // -1: it was killed, by this signal
    int signal;
    char said[4096];
} LastWords;

static LastWords last_words(void (*doing)(void)) {
    LastWords last = {.status = -1};
    int ends[2], status;
    cr_assert(!pipe(ends));
    const pid_t child = fork();
    if (!child) {
        dup2(ends[1], STDOUT_FILENO);
        dup2(ends[1], STDERR_FILENO);
        doing();
        _exit(99);
    }
    close(ends[1]);
    size_t n = 0;
    for (ssize_t got = 1; got > 0 && n < sizeof last.said - 1; n += got > 0 ? (size_t)got : 0)
        got = read(ends[0], last.said + n, sizeof last.said - 1 - n);
    close(ends[0]);
    cr_assert(waitpid(child, &status, 0) == child);
    if (WIFEXITED(status))
        last.status = WEXITSTATUS(status);
    else
        last.signal = WTERMSIG(status);
    return last;
}

static void expect_words(void (*doing)(void), int status, const char *words) {
    const LastWords last = last_words(doing);
    cr_assert_str_eq(last.said, words, "%s", last.said);
    cr_assert_eq(last.status, status, "%d: %s", last.status, last.said);
}

static char long_line[5000];
static void say_two_lines(void) { die(3, "%s", "two\nlines\r"); }
static void say_what_a_terminal_obeys(void) { die(2, "%s", "\033[2J\x7F\xC2\x9B é\xC2\xA0"); }
static void say_much(void) { die(1, "%s", long_line); }
static void say_it_last(void) {
    printf("said before, ");
    die(1, "and behind it");
}

// A complaint is one line, whatever it quotes, with the status given; what was said so far comes
// before it. A name may be longer than the line that there is room for.
Test(messages, one_line) {
    char most[1100];
    memset(long_line, 'x', sizeof long_line - 1);
    sprintf(most, "drugs: %.1023s\n", long_line);
    expect_words(say_two_lines, 3, "drugs: two?lines?\n");
    expect_words(say_what_a_terminal_obeys, 2, "drugs: ?[2J??\x9B é\xC2\xA0\n");
    expect_words(say_it_last, 1, "said before, drugs: and behind it\n");
    expect_words(say_much, 1, most);
}

// Memory that cannot be had is said, and nothing goes on with NULL: neither where the product is
// too large for a size_t, nor where the system has not that much. (What comes back is kept, or the
// compiler might leave the call out.)
static void *volatile taken;
static void take_too_much(void) { taken = resize(NULL, PTRDIFF_MAX, 8); }
Test(memory, too_much) {
    char words[100];
    sprintf(words, "drugs: out of memory: %td times 8 bytes were needed\n", PTRDIFF_MAX);
    expect_words(take_too_much, 1, words);
}
Test(memory, more_than_there_is, .exit_code = 1) { taken = resize(NULL, PTRDIFF_MAX / 16, 8); }

// The tokens of a text that is so long are not even begun with.
static void encode_too_much(void) {
    int n;
    taken = encode(NULL, (Source){.bytes = "", .n = INT_MAX / 16 + 1}, &n);
}
Test(messages, a_text_that_is_too_long) {
    expect_words(encode_too_much, 1, "drugs: a text of 134217728 bytes is too long\n");
}

// A file that finds no room in the address space is no model.
Test(messages, a_file_that_cannot_be_mapped) {
    char path[] = "/tmp/drugs-test-XXXXXX";
    const int file = mkstemp(path);
    struct rlimit limit;
    Model m;
    cr_assert(file >= 0 && !ftruncate(file, 1 << 20) && !getrlimit(RLIMIT_AS, &limit));
    const struct rlimit none = {0, limit.rlim_max};
    setrlimit(RLIMIT_AS, &none);
    const bool ok = model_open(&m, path);
    setrlimit(RLIMIT_AS, &limit);
    unlink(path);
    close(file);
    cr_assert(!ok);
    cr_assert_str_eq(m.error, "cannot be mapped into memory");
    model_close(&m);
}

// A file that is cut short while it is read ends the program with a sentence, and not with SIGBUS.
static void lose_the_file(void) {
    static char name[] = "/tmp/drugs-test-XXXXXX";
    const int file = mkstemp(name);
    Bench b;
    Model m;
    bench_open(&b, M, 1);
    const bool written = write(file, b.file.data, b.file.n) == (ssize_t)b.file.n;
    if (!written || !model_open(&m, name) || ftruncate(file, 0))
        _exit(9);
    unlink(name);
    strcpy(name, "model.bin"); // which is quoted
    taken = resize(NULL, (ptrdiff_t)*(const float *)m.layers[1].w[W2].data, 1);
}
Test(messages, a_file_that_is_cut_short) {
    char words[100];
    sprintf(words, "drugs: model.bin can be read no longer (signal %d); was it cut short?\n",
            SIGBUS);
    expect_words(lose_the_file, 1, words);
}

// Logits that are no numbers are noticed in every row that wants some, and only in these.
static void read_two(int ruined, bool wanted) {
    Bench b;
    bench_open(&b, M, 2);
    const int dim = b.model.config.dim;
    float *embedding = (float *)b.model.layers[0].w[TOK_EMB].data;
    embedding[(3 + ruined) * dim] = NAN;
    Sequence one = sequence_new((Noise){0}), other = sequence_new((Noise){0});
    Row rows[] = {{3, 0, &one, false, wanted || ruined != 0, NULL},
                  {4, 0, &other, false, wanted || ruined != 1, NULL}};
    forward(&b.run, rows, 2);
    _exit(0);
}
static void ruin_the_first(void) { read_two(0, true); }
static void ruin_the_second(void) { read_two(1, true); }
static void ruin_what_is_not_wanted(void) { read_two(1, false); }
Test(messages, logits_that_are_not_finite) {
    const char *words = "drugs: the logits are not finite; is the model in order?\n";
    expect_words(ruin_the_first, 1, words);
    expect_words(ruin_the_second, 1, words);
    expect_words(ruin_what_is_not_wanted, 0, "");
}

// New memory is zero, memory that grows keeps what it had, and nothing is asked for 0.
Test(memory, resize) {
    char *bytes = resize(NULL, 100, 1);
    for (int i = 0; i < 100; i++)
        cr_assert_eq(bytes[i], 0);
    memset(bytes, 7, 100);
    bytes = resize(bytes, 100000, 1);
    for (int i = 0; i < 100; i++)
        cr_assert_eq(bytes[i], 7);
    free(bytes);
    void *nothing = resize(NULL, 0, 8);
    cr_assert_not_null(nothing);
    free(nothing);
}

// ---- edges

// A file's ending needs a name before it.
Test(files, endings) {
    cr_assert(ends_with("x.md", ".md") && ends_with("a/b.c.md", ".md"));
    cr_assert(!ends_with(".md", ".md") && !ends_with("x.md.csv", ".md") && !ends_with("", ".md"));
}

// ---- what is given back

// The number that the next file gets: the lowest that is free.
static int next_descriptor(void) {
    const int file = open("/dev/null", O_RDONLY);
    close(file);
    return file;
}

// Files are closed once they are read, good or not, and a model that is closed is mapped no longer.
Test(files, are_given_back) {
    char name[] = "/tmp/drugs-test-XXXXXX", at_name[64];
    const int file = mkstemp(name), next = next_descriptor();
    Bench b;
    Model m;
    bench_open(&b, M, 1);
    sprintf(at_name, "@%s", name);
    cr_assert(!model_open(&m, "/tmp"));
    cr_assert(!model_open(&m, name)); // empty
    cr_assert_eq(next_descriptor(), next);
    cr_assert_eq(write(file, "To be", 5), 5);
    cr_assert(!model_open(&m, name)); // no model
    model_close(&m);
    char *text = (char *)text_of_option('i', at_name);
    cr_assert_str_eq(text, "To be");
    free(text);
    cr_assert_eq(next_descriptor(), next);
    cr_assert_eq(pwrite(file, b.file.data, b.file.n, 0), (ssize_t)b.file.n);
    cr_assert(model_open(&m, name));
    void *mapping = m.file;
    cr_assert(!msync(mapping, 1, MS_ASYNC));
    model_close(&m);
    cr_assert_eq(next_descriptor(), next);
    cr_assert(msync(mapping, b.file.n, MS_ASYNC), "it is mapped still");
    unlink(name);
    close(file);
    bench_close(&b);
}

// What was given back once may be given back once more.
Test(memory, is_given_back_once) {
    Bench b;
    bench_open(&b, M, 2);
    Sequence s = sequence_new((Noise){0});
    sequence_free(&b.model, &s); // nothing was reserved
    feed(&b.run, &s, (const int[]){3, 4}, 2, 0);
    for (int i = 0; i < 2; i++) {
        sequence_free(&b.model, &s);
        run_free(&b.run);
        model_close(&b.model);
    }
    free(b.file.data);
}

// ---- files that are not finished

// A file that is begun beside its place, and then this signal comes, which was ignored or not.
static char folder[] = "/tmp/drugs-test-XXXXXX";
static char path[64];
static int coming;
static bool ignored;
static void be_interrupted(void) {
    signal(coming, ignored ? SIG_IGN : SIG_DFL);
    Output output = output_open('o', path, ".csv .md", "no model");
    fputs("whole", output.to);
    raise(coming);
    output_close(&output);
    _exit(7);
}

static void be_refused(void) {
    output_open('o', path, ".csv .md", "no model");
    die(1, "later");
}

// A signal ends the program as it always does, and nothing is left of the file; one that is
// ignored, as nohup wants it, does no harm. Nor is anything left where the program gives up.
Test(files, leave_nothing_behind) {
    static const int signals[] = {SIGHUP, SIGINT, SIGPIPE, SIGTERM};
    cr_assert_not_null(mkdtemp(folder));
    sprintf(path, "%s/x.csv", folder);
    for (int i = 0; i < 4; i++)
        for (int to_ignore = 0; to_ignore < 2; to_ignore++) {
            coming = signals[i];
            ignored = to_ignore;
            const LastWords last = last_words(be_interrupted);
            cr_assert_eq(last.status, ignored ? 7 : -1, "signal %d", coming);
            cr_assert_eq(last.signal, ignored ? 0 : coming, "signal %d", coming);
            cr_assert_eq(unlink(path), ignored ? 0 : -1, "signal %d", coming);
        }
    expect_words(be_refused, 1, "drugs: later\n");
    cr_assert(!rmdir(folder), "something is left in it");
}

// Which pieces are found whole is known; normal, unknown and empty ones are not among them.
Test(tokenizer, knows_what_is_found_whole) {
    Bytes pieces = {0};
    append_piece(&pieces, 0, CONTROL, "<|end|>", 7); // as GPT-2's is, number 0
    append_piece(&pieces, 0, UNKNOWN, "<unknown>", 9);
    append_piece(&pieces, 0, NORMAL, "a normal one", 12);
    append_piece(&pieces, 0, USER_DEFINED, "user", 4);
    append_piece(&pieces, 0, CONTROL, "", 0);
    FileHeader header = M;
    header.vocab_size = 5;
    Bench b;
    bench_open_with(&b, header, pieces, 1);
    const int *first_whole = b.model.tokenizer->first_whole;
    cr_assert_eq(b.model.config.n_whole, 2);
    for (int byte = 0; byte < 256; byte++)
        cr_assert_eq(first_whole[byte], byte == '<' ? 0 : byte == 'u' ? 1 : 2, "%d", byte);
    int n;
    int *tokens = encode(&b.model, (Source){"<|end|>user", 11, .controls = true}, &n);
    cr_assert(n == 2 && tokens[0] == 0 && tokens[1] == 3);
    free(tokens);
    bench_close(&b);
}

// Where a vector or the upright is zero there is nowhere to turn: forwards it stays, backwards its
// gradient does.
Test(noise, a_vector_of_zeros_is_left_alone) {
    const Place place = {.hash = 42, .theta = 1};
    float x[8] = {0};
    float g[8] = {1, -2, 3, -4, 5, -6, 7, -8};
    float u[8];
    turn(place, x, 8, u);
    turn_backward(place, x, g, 8, u);
    for (int i = 0; i < 8; i++) {
        cr_assert_eq(x[i], 0);
        cr_assert_eq(g[i], (float)((i + 1) * (i % 2 ? -1 : 1)));
    }
}

// The clock goes in seconds.
Test(measuring, now) {
    for (int i = 0; i < 1000; i++) {
        struct timespec before, after;
        timespec_get(&before, TIME_UTC);
        const double time = now();
        timespec_get(&after, TIME_UTC);
        cr_assert_geq(time, (double)before.tv_sec + (double)before.tv_nsec / 1e9 - 1e-6);
        cr_assert_leq(time, (double)after.tv_sec + (double)after.tv_nsec / 1e9 + 1e-6);
    }
}

// All threads work on what is large, unless one alone is faster.
Test(speed, one_thread_or_all) {
    cr_assert(worth_threads(WORTH_THREADS + 1) && !worth_threads(WORTH_THREADS));
    solo = true;
    cr_assert(!worth_threads(WORTH_THREADS + 1));
}

// Now and then half of the layers are computed the other way, if there are two to compare. What is
// found for single rows says nothing about many, and the other way round.
Test(speed, the_other_way_is_tried) {
    for (int n_layers = 2; n_layers <= 4; n_layers++) {
        FileHeader header = G;
        header.n_layers = n_layers;
        Bench b;
        bench_open(&b, header, 4);
        const int tokens[] = {1, 40, 50, 60, 70};
        Sequence s = sequence_new((Noise){0});
        for (int many = 0; many < 2; many++) {
            const int n = many ? 4 : 1;
            memset(teams, 0, sizeof teams);
            teams[many].one_thread = true;
            const double before = now();
            feed(&b.run, &s, tokens, n, WANTS_LOGITS);
            cr_assert_eq(teams[many].next_trial > before, n_layers > 2, "%d layers", n_layers);
            cr_assert(solo && teams[many].one_thread, "all threads have not won three times");
            cr_assert(teams[!many].next_trial == 0 && !teams[!many].one_thread, "%d rows", n);
            teams[many].next_trial = INFINITY;
            teams[many].one_thread = true;
            feed(&b.run, &s, tokens, n, WANTS_LOGITS);
            cr_assert(solo && teams[many].one_thread, "no trial is due");
        }
        sequence_free(&b.model, &s);
        bench_close(&b);
    }
}

// Of equals the first is taken, by argmax and by the order of candidates.
Test(sampling, the_first_of_equals) {
    const float logits[] = {1, 3, 3, 2};
    const Candidate a = {.5f, 1}, b = {.5f, 2}, c = {.6f, 3};
    cr_assert_eq(argmax(logits, 4), 1);
    cr_assert(by_probability(&a, &b) < 0 && by_probability(&b, &a) > 0);
    cr_assert(by_probability(&c, &a) < 0 && by_probability(&a, &c) > 0);
}

// Rank and surprise do not mind how large logits are.
Test(measuring, surprise_of_large_logits) {
    const float logits[] = {1000, 999, -1000};
    cr_assert_float_eq(surprise(logits, 3, 0), log1p(exp(-1)), 1e-12);
    cr_assert_float_eq(surprise(logits, 3, 1), log1p(exp(-1)) + 1, 1e-12);
    cr_assert_float_eq(surprise(logits, 3, 2), log1p(exp(-1)) + 2000, 1e-9);
}

// A dose without points acts in every layer; one point counts everywhere; outside its points the
// nearest one counts; two points of one depth give the larger.
Test(doses, edges_of_a_shape) {
    Dose dose = {.theta = 2, .mode = MODE_INTERPOLATE};
    cr_assert_eq(dose_at(&dose, .7f), 2);
    dose.n_points = 1;
    dose.points[0] = (Point){.5f, .25f};
    cr_assert(dose_at(&dose, 0) == .5 && dose_at(&dose, .5f) == .5 && dose_at(&dose, 1) == .5);
    dose.n_points = 3;
    dose.points[1] = (Point){.5f, 1};
    dose.points[2] = (Point){.75f, 0};
    cr_assert_eq(dose_at(&dose, .25f), .5);
    cr_assert_eq(dose_at(&dose, .625f), 1);
    cr_assert_eq(dose_at(&dose, .75f), 0);
    cr_assert_eq(dose_at(&dose, 1), 0);
}

// Where -d or -w says where a dose acts, all layers in reach get the full angle, whatever the way
// was to go from point to point.
Test(doses, a_depth_has_a_mode_of_its_own) {
    NoiseOptions options = NO_NOISE_OPTIONS;
    options.somewhere = true;
    options.depth = .5;
    for (int site = 0; site < N_SITES; site++)
        options.doses[site] = (Dose){.theta = 2, .mode = MODE_FLOOR};
    give_shape(&options);
    for (int site = 0; site < N_SITES; site++) {
        cr_assert_eq(dose_at(&options.doses[site], .45f), 2);
        cr_assert_eq(dose_at(&options.doses[site], .3f), 0);
    }
}

// Each option about noise is taken, with its value; no other one is.
Test(doses, options_that_are_taken) {
    NoiseOptions options = NO_NOISE_OPTIONS;
    for (const char *site = SITES; *site; site++)
        cr_assert(take_noise_option(&options, *site, ".5"));
    cr_assert(take_noise_option(&options, 'd', ".25") && options.depth == .25);
    cr_assert(take_noise_option(&options, 'w', ".75") && options.spread == .75);
    cr_assert(take_noise_option(&options, 'r', "upstream") && options.family == FAMILY_UPSTREAM);
    cr_assert(take_noise_option(&options, 'r', "centred") && options.family == FAMILY_CENTRED);
    cr_assert(take_noise_option(&options, 's', "7") && options.seed == 7);
    for (const char *other = "inxctpmyegkoatfluh"; *other; other++)
        cr_assert(!take_noise_option(&options, *other, "1"), "-%c", *other);
    for (int site = 0; site < N_SITES; site++)
        cr_assert_eq(options.doses[site].theta, .5);
}
