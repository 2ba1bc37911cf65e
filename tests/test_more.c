/* test_more.c - small promises of the two books that the larger tests pass by: what is printed in
 * cases that the small model never comes to, and what happens at the edges of a function.
 */
#define TRAIN_STEP_LIBRARY
#include "../train_step.c"
#include "testing.h"
#include <criterion/redirect.h>

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
        {{.width = 3}, "a\" é|\né| a\"\n"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *row = row_of(cases[i].table, "a\"b", "é|\n");
        cr_assert_str_eq(row, cases[i].want, "case %zu: %s", i, row);
        free(row);
    }
}

// ---- messages

static void complain(const char *line) {
    printf("said before");
    die(3, "%s", line);
}

// What was said so far comes out, the complaint has one line, and the status is the one given.
Test(messages, one_line, .exit_code = 3) {
    complain("two\nlines\r");
}

// A name may be longer than the line that a message has room for.
Test(messages, cut_where_the_room_ends, .exit_code = 3) {
    char long_line[5000];
    memset(long_line, 'x', sizeof long_line);
    long_line[sizeof long_line - 1] = '\0';
    complain(long_line);
}

// Memory that cannot be had is said, and nothing goes on with NULL: neither where the product is
// too large for a size_t, nor where the system has not that much. (What comes back is kept, or the
// compiler might leave the call out.)
static void *volatile taken;
Test(memory, too_much, .exit_code = 1) { taken = resize(NULL, PTRDIFF_MAX, 8); }
Test(memory, more_than_there_is, .exit_code = 1) { taken = resize(NULL, PTRDIFF_MAX / 16, 8); }

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
