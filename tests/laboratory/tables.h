/* tables.h - files that appear whole or not at all, tables, texts and progress on a terminal, for
 * train_step.c and lab.c.
 *
 * A table can be printed in three ways, of the same cells:
 *
 *     terminal     To          be,         or         a word that is too long ends in "…"
 *     CSV          "To","be,","or"            quotes inside a cell are doubled
 *     Markdown     | To | be, | or |          bars inside a cell are escaped
 */

#include <ctype.h>
#include <sys/ioctl.h>

// A file that is being written beside its place and moved there when it is whole.
// So a full disk or a crash loses nothing that was there before.
typedef struct {
    FILE *to;
    const char *path;
    char *place;  // memory of path, if links were followed
    char *beside; // one of unfinished
} Output;

// Of -t, -a and -o: what would be left behind, "" where there is nothing.
static char unfinished[3][PATH_MAX];

// Runs at every exit of the program, also by a signal. A file that was moved to its place no longer
// has such a name.
static void remove_unfinished(void) {
    for (int i = 0; i < 3; i++)
        if (*unfinished[i])
            unlink(unfinished[i]);
}

// Ctrl-C and its kin: first the files, then what the signal does otherwise.
static void interrupted(int number) {
    remove_unfinished();
    signal(number, SIG_DFL);
    raise(number);
}

// Whether a file's name has this ending.
static bool ends_with(const char *path, const char *ending) {
    size_t n_path = strlen(path);
    size_t n_ending = strlen(ending);
    return n_path > n_ending && !strcmp(path + n_path - n_ending, ending);
}

// Whether two names lead to one file, through links as well.
static bool is_same_file(const char *path, const char *other) {
    struct stat a, b;
    if (stat(path, &a) || stat(other, &b))
        return false; // one of them is not there
    return a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

// Opens the file that an option names.
// That is done before the work, so that none is lost.
// It must end in one of the endings, ".csv .md" say, and it must not be the model itself.
// Without a path there is nothing to open or close.
static Output output_open(int option, const char *path, const char *endings,
                          const char *model_path) {
    Output output = {.path = path};
    if (!path)
        return output;
    const char *ending = strrchr(path, '.');
    const char *found = ending ? strstr(endings, ending) : NULL;
    if (!found || strchr(ending, ' ') || isalpha(found[strlen(ending)]))
        die(2, "-%c takes a file that ends in one of: %s; got '%s'", option, endings, path);
    if (is_same_file(path, model_path))
        die(2, "-%c would overwrite the model, %s", option, path);
    mode_t mask = umask(0); // what the user does not want others to do
    umask(mask);
    struct stat info = {.st_mode = S_IFREG | (0666 & ~mask)}; // of a new file
    // A link stays, and what it leads to is replaced.
    output.place = realpath(path, NULL);
    if (output.place)
        output.path = output.place;
    if (!lstat(output.path, &info) && !output.place) // a link to nowhere
        die(1, "%s cannot be written: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode)) // a folder, a device
        die(1, "%s cannot be written: it is not a regular file", path);
    static const int signals[] = {SIGHUP, SIGINT, SIGPIPE, SIGQUIT, SIGTERM, SIGXCPU, 0};
    atexit(remove_unfinished);
    for (const int *one = signals; *one; one++)
        if (signal(*one, interrupted) == SIG_IGN)
            signal(*one, SIG_IGN); // as nohup wants it
    // mkstemp makes a name that no file has, and opens it for the owner alone.
    int free_one = 0;
    while (*unfinished[free_one])
        free_one++;
    output.beside = unfinished[free_one];
    snprintf(output.beside, PATH_MAX, "%s.XXXXXX", output.path);
    int file = mkstemp(output.beside);
    if (file >= 0)
        output.to = fdopen(file, "wb");
    if (!output.to || fchmod(file, info.st_mode & 0777))
        die(1, "%s cannot be written: %s", path, strerror(errno));
    return output;
}

// Moves the file to its place.
// Each of these calls may be the one that finds the disk full; none is left out because an
// earlier one failed.
static void output_close(Output *output) {
    if (!output->path)
        return;
    check_mapped();
    bool failed = ferror(output->to);
    failed = fflush(output->to) || failed;
    failed = fsync(fileno(output->to)) || failed;
    failed = fclose(output->to) || failed;
    if (failed || rename(output->beside, output->path))
        die(1, "%s cannot be written: %s", output->path, strerror(errno));
    *output->beside = '\0';
    free(output->place);
}

// A table in the making: for a terminal, as CSV, or as Markdown.
typedef struct {
    FILE *to;
    int width;     // of a column of a terminal, 0: no terminal
    bool markdown; // else CSV
    int n_cells;   // of this row so far
    int padding;   // spaces that the last cell still lacks
} Table;

// How a byte of a cell is written: CSV doubles quotes, Markdown escapes its bars and knows
// no line feeds.
static void print_cell_byte(const Table *table, char byte) {
    if (table->markdown && byte == '|')
        fputs("\\|", table->to);
    else if (table->markdown && byte == '\n')
        fputc(' ', table->to);
    else if (!table->width && !table->markdown && byte == '"')
        fputs("\"\"", table->to);
    else
        fputc(byte, table->to);
}

// How many characters there are in n bytes of text. A byte that begins a character counts, the
// others of it do not.
static int count_characters(const char *text, int n) {
    int n_characters = 0;
    for (int i = 0; i < n; i++)
        n_characters += !continues_character(text[i]);
    return n_characters;
}

// The next cell of a row, n bytes of text.
// A terminal's cell has its width, counted in characters, with a space at least between two of
// them: what is longer is cut, and ends in "…" to say so.
static void print_cell(Table *table, const char *text, int n) {
    bool csv = !table->width && !table->markdown;
    const char *quote = csv ? "\"" : "";
    const char *before = table->markdown ? "| " : "";
    if (csv && table->n_cells)
        before = ",";
    fprintf(table->to, "%*s%s%s", table->padding, "", before, quote);
    int room = table->width ? table->width - 1 : INT_MAX; // for characters
    bool cut = count_characters(text, n) > room;
    int n_shown = 0;
    for (int i = 0; i < n; i++) {
        if (!continues_character(text[i])) {
            if (cut && n_shown == room - 1) {
                fputs("…", table->to);
                n_shown++;
                break;
            }
            n_shown++;
        }
        print_cell_byte(table, text[i]);
    }
    fputs(table->markdown ? " " : quote, table->to);
    if (table->width)
        table->padding = table->width - n_shown;
    table->n_cells++;
}

// Ends a row. The last cell of a terminal's row needs no padding.
static void end_row(Table *table) {
    fputs(table->markdown ? "|\n" : "\n", table->to);
    table->n_cells = 0;
    table->padding = 0;
}

// The line that Markdown wants below the names of the columns.
static void end_heading(Table *table) {
    int n = table->n_cells;
    end_row(table);
    for (int i = 0; table->markdown && i < n; i++)
        fputs(i + 1 < n ? "|---" : "|---|\n", table->to);
}

// A token as a word of a table: what it prints, on one line, with <0A> and the like for what
// cannot be seen.
// The caller frees it.
static char *visible(const Model *m, int token) {
    const Span piece = string_at(m, token);
    char *text = resize(NULL, 4 * (ptrdiff_t)piece.length + 1, 1); // <0A> takes four
    char *to = text;
    for (int i = 0; i < piece.length; i++) {
        unsigned char byte = (unsigned char)piece.bytes[i];
        bool plain = byte >= ' ' && byte != 127;
        if (kind_of(m, token) == BYTE && byte > 127)
            plain = false; // a part of a character
        if (plain)
            *to++ = (char)byte;
        else if (byte == '\n')
            to += sprintf(to, "\\n");
        else
            to += sprintf(to, "<%02X>", byte);
    }
    return text;
}

// Prints a text in a column of this many characters, at least 2, on stdout: what is longer is cut as
// in a table, what is shorter is padded with spaces.
static void print_column(const char *text, int width) {
    Table table = {.to = stdout, .width = width + 1};
    print_cell(&table, text, (int)strlen(text));
    printf("%*s", table.padding - 1, "");
}

// How many columns the terminal has on which stdout is shown; `otherwise` where there is none, or
// one that does not say.
static int terminal_width(int otherwise) {
    struct winsize window;
    bool known = !ioctl(STDOUT_FILENO, TIOCGWINSZ, &window) && window.ws_col;
    return known ? window.ws_col : otherwise;
}

// Prints a text and a line feed. On a terminal no word is broken: a line ends where the next word
// does not fit. Elsewhere, and where a word is longer than a line, the text is left as it is.
static void print_text(const char *text) {
    int width = terminal_width(0); // 0: no line is too long
    int column = 0;
    while (*text) {
        // up to the next word: line feeds begin a line, spaces may become one
        int n_space = (int)strspn(text, " \n");
        int n_word = (int)strcspn(text + n_space, " \n");
        int n_characters = count_characters(text + n_space, n_word);
        for (int i = 0; i < n_space; i++)
            column = text[i] == '\n' ? 0 : column + 1;
        if (width && column > n_space && column + n_characters > width) {
            puts("");
            column = 0;
        } else {
            printf("%.*s", n_space, text);
        }
        printf("%.*s", n_word, text + n_space);
        column += n_characters;
        text += n_space + n_word;
    }
    puts("");
}

// "s" after the name of n things, unless it is one.
static const char *plural(int n) {
    return n == 1 ? "" : "s";
}

// Work that takes a while, counted in tokens. On a terminal one line of stderr says how far it is
// and how long it will take, at most five times a second. Elsewhere nothing is said.
static struct {
    const char *what;    // the name of the work, NULL: none is going on, or nobody looks
    double done, of;     // tokens
    double began, shown; // seconds: when the work began, when it was shown last
} task;

// Says how far the work is. The numbers have fixed widths, so that each line covers the one before.
static void show_progress(double time) {
    double left = task.done > 0 ? (time - task.began) * (task.of - task.done) / task.done : 0;
    fprintf(stderr, "\r%s: %7.0f of %.0f tokens", task.what, task.done, task.of);
    if (task.done > 0)
        fprintf(stderr, ", %4.0f s left", left);
    fflush(stderr);
    task.shown = time;
}

// This many tokens are to be computed.
static void progress_begin(const char *what, double of) {
    if (!isatty(STDERR_FILENO))
        return;
    task.what = what;
    task.done = 0;
    task.of = of;
    task.began = now();
    show_progress(task.began);
}

// This many of them are done.
static void progress(double n) {
    task.done += n;
    if (!task.what)
        return;
    double time = now();
    if (time - task.shown >= .2)
        show_progress(time);
}

// All is done: the line is wiped.
static void progress_end(void) {
    if (task.what)
        fputs("\r\033[K", stderr);
    fflush(stderr);
    task.what = NULL;
}
