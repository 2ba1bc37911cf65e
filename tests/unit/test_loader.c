/* test_loader.c - a file comes from strangers: whatever is in it, drugs.c says in one line what is
 * wrong, or runs it, and never reads beyond the file. Each file is copied into memory of exactly
 * its size, so that under `make debug` AddressSanitizer sees the first byte too far.
 */
#include "testing.h"

// The model of this repository opens, and is what its header says; its piece number 422 is " To".
// A path that leads nowhere is answered with a sentence.
Test(loader, a_model_file_opens) {
    Model model;
    cr_assert(model_open(&model, "tests/hamlet.bin"), "%s", model.error);
    cr_assert_eq(model.config.n_layers, 10);
    cr_assert_eq(model.config.dim, 48);
    cr_assert_eq(model.config.vocab_size, 768);
    cr_assert_eq(model.config.seq_len, 160);
    cr_assert_eq(string_at(&model, 422).length, 3);
    cr_assert(!memcmp(string_at(&model, 422).bytes, " To", 3));
    model_close(&model);

    cr_assert(!model_open(&model, "tests/macbeth.bin"));
    cr_assert_str_eq(model.error, "cannot be opened: No such file or directory");
    model_close(&model);
}

// ---- small files

// Files of three kinds: in the manner of SentencePiece, with an unknown piece or with bytes; and
// byte-level, with an automaton and a further merge for " ab" and for "abab".
enum { WITH_UNKNOWN, WITH_BYTES, BYTE_LEVEL, N_FILES };
enum { N_MERGES = 3, N_SMALL_CLASSES = 3, N_SMALL_STATES = 3 };
static const Range SMALL_CLASSES[] = {{' ', ' ', 1}, {'a', 'z', 2}, {0xC0, 0x24F, 2}};
static const uint32_t SMALL_STEPS[N_SMALL_STATES][N_SMALL_CLASSES + 1] = { // letters, with a space
    {0, 2 * 2, 2 * 3, 0}, {0, 0, 2 * 3, 0}, {1, 1, 2 * 3, 1},
};
static const FurtherMerge MERGES[N_MERGES] = {
    {BEHIND_BYTES + 4, 2, -3}, {BEHIND_BYTES + 5, 1, -5}, {BEHIND_BYTES + 5, 3, -6},
};

// A row of a matrix takes 64 bytes, so no wrong size can hide in the padding after a tensor.
static Bytes small_file(int kind) {
    const char *const words[] = {" ", "a", "b", "ab", " ab", "abab"};
    const int lefts[] = {0, 0, 0, 0, 1, 2};
    const int n_words = kind == BYTE_LEVEL ? 6 : 5;
    Bytes pieces = first_pieces(kind == WITH_BYTES);
    for (int i = 0; kind == BYTE_LEVEL && i < 256; i++) { // its bytes are normal pieces
        const char byte = (char)i;
        append_piece(&pieces, 0, NORMAL, &byte, 1);
    }
    for (int i = 0; i < n_words; i++) {
        const int piece_kind = i == 2 ? USER_DEFINED : NORMAL;
        append_made_piece(&pieces, (float)-i, piece_kind, words[i], (int)strlen(words[i]),
                          kind == BYTE_LEVEL ? lefts[i] : 0);
    }
    FileHeader header = {
        .magic = "drugs.c", .version = 3, .dim = 16, .hidden_dim = 16, .n_layers = 2, .n_heads = 4,
        .n_kv_heads = 2, .head_dim = 4,
        .vocab_size = n_words + (kind == WITH_UNKNOWN ? FIRST_BYTE : BEHIND_BYTES), .seq_len = 16,
        .sliding_window = 3, .norm_eps = 1e-5f, .bos = 1, .rope_theta = 100,
        .text_flags = PREFIX_SPACE,
    };
    give_llama2_chat(&header.vocabulary);
    if (kind == BYTE_LEVEL) {
        header.text_flags = 0;
        header.n_cutters = 1;
        header.n_states = N_SMALL_STATES;
        header.n_classes = N_SMALL_CLASSES;
        header.vocabulary.byte_level = true;
        header.vocabulary.takes_words = true;
        append(&header.vocabulary.classes, SMALL_CLASSES, sizeof SMALL_CLASSES);
        append(&header.vocabulary.steps, SMALL_STEPS, sizeof SMALL_STEPS);
        append(&header.vocabulary.merges, MERGES, sizeof MERGES);
    }
    Bytes file = model_file(header, pieces);
    free(pieces.data);
    free(header.vocabulary.classes.data);
    free(header.vocabulary.steps.data);
    free(header.vocabulary.merges.data);
    return file;
}

static const FileHeader *header_of(const Bytes *file) {
    return (const void *)file->data;
}

// Where the tables of a file lie, in their order, and where they end.
enum { AT_CLASSES, AT_STEPS, AT_UNITS, AT_PAIRS, AT_STRINGS, AT_WHOLE, AT_WORDS, AT_TEXT, AT_END };
static size_t table_at(const Bytes *file, int table) {
    const FileHeader *h = header_of(file);
    const size_t n_strings = (size_t)(h->vocab_size + N_CHAT_STRINGS + h->n_cutters);
    const size_t sizes[] = {
        (size_t)h->n_ranges * 12, (size_t)h->n_states * ((size_t)h->n_classes + 1) * 4,
        (size_t)h->n_units * 12, (size_t)h->n_pairs * 16, n_strings * 8, (size_t)h->n_whole * 4,
        (size_t)h->n_words * 4, (size_t)h->n_text,
    };
    size_t at = 256 + (size_t)h->head_dim / 2 * 8;
    for (int i = 0; i < table; i++)
        at += sizes[i];
    return at;
}

// Lets a model read, compute and print. A context of 2^28 tokens is possible, but not every machine
// has scratch memory for that many, so it is made shorter.
static void use(Model *m) {
    m->config.seq_len = min(m->config.seq_len, 1 << 20);
    Run run;
    Sequence sequence = sequence_new((Noise){0});
    char *printed;
    size_t n_printed;
    Printer printer = {.to = open_memstream(&printed, &n_printed), .at_start = true};
    int n_tokens;
    const char text[] = "ab a\xC3\xA9\xFF 's12345\n  <s>abab</s>b \0";
    const Source source = {.bytes = text, .n = sizeof text - 1, .bos = true, .controls = true};
    int *tokens = encode(m, source, &n_tokens);
    for (int i = 0; i < N_CHAT_STRINGS; i++) {
        const Span span = chat_string(m, i);
        int n;
        Source part = {.n = (size_t)span.length, .controls = true};
        part.bytes = span.length ? span.bytes : "";
        free(encode(m, part, &n));
    }
    run_init(&run, m, 4, 1);
    const int n_read = min(n_tokens, m->config.seq_len);
    const float *logits = feed(&run, &sequence, tokens, n_read, WANTS_LOGITS);
    if (logits)
        print_token(&printer, m, argmax(logits, m->config.vocab_size));
    for (int i = 0; i < n_tokens; i++)
        print_token(&printer, m, tokens[i]);
    print_rest(&printer);
    fclose(printer.to);
    free(printed);
    free(tokens);
    run_free(&run);
    sequence_free(m, &sequence);
}

static char last_error[160]; // why parses() refused

// Parses a copy of the first n bytes of data. If they are refused, the reason must be one line with
// `reason` in it; if not, the model must be usable.
static bool parses(const char *data, size_t n, const char *reason) {
    Model m;
    char *copy = malloc(n ? n : 1);
    cr_assert_not_null(copy);
    if (n)
        memcpy(copy, data, n);
    bool ok = model_parse(&m, n ? copy : copy + 1, n);
    if (ok) {
        use(&m);
    } else {
        cr_assert(m.error[0] && !strchr(m.error, '\n'), "'%s'", m.error);
        cr_assert(strstr(m.error, reason), "'%s' does not name '%s'", m.error, reason);
        strcpy(last_error, m.error);
    }
    model_close(&m);
    free(copy);
    return ok;
}

// The three files that all others are made from are good ones.
Test(loader, accepts_good_files) {
    for (int kind = 0; kind < N_FILES; kind++) {
        Bytes file = small_file(kind);
        cr_assert(parses(file.data, file.n, ""), "%s", last_error);
        free(file.data);
    }
}

// ---- the header

// A field of the header, values that it cannot have, and the words that the reason must have;
// where they are "", it must begin with the field's name; where they are " ", it may say anything.
enum { MOST_VALUES = 7 };
typedef struct {
    size_t at;
    const char *name;
    int32_t values[MOST_VALUES]; // a 0 behind the first ends them
    const char *words;
} Lie;

static void check_lie(Bytes file, const Lie *lie, int32_t value) {
    char *at = file.data + lie->at;
    char before[4];
    memcpy(before, at, 4);
    memcpy(at, &value, 4);
    cr_assert(!parses(file.data, file.n, lie->words), "%s %d is accepted", lie->name, (int)value);
    if (!*lie->words) {
        const bool named = !strncmp(last_error, lie->name, strlen(lie->name));
        cr_assert(named, "%s %d: %s", lie->name, (int)value, last_error);
    }
    memcpy(at, before, 4);
}

// Each field of the header, set to something impossible or to something that contradicts the rest
// of the file, is refused.
Test(loader, every_header_field) {
    const char *const size = "header promises"; // so many bytes, but the file has another number
    Bytes file = small_file(WITH_UNKNOWN);
    const Lie lies[] = {
#define FIELD(name) offsetof(FileHeader, name), #name
        {FIELD(version), {0, 4, -1, INT32_MIN, 3 << 24}, ""},
        {FIELD(version), {1, 2}, "export the checkpoint again"}, // which were the formats before
        {FIELD(dim), {0, -1, (1 << 20) + 1, INT32_MAX, INT32_MIN}, ""},
        {FIELD(dim), {15, 17, 32, 1 << 20}, size},
        {FIELD(hidden_dim), {0, -1, (1 << 20) + 1, INT32_MAX, INT32_MIN}, ""},
        {FIELD(hidden_dim), {15, 17, 32, 1 << 20}, size},
        {FIELD(n_layers), {0, -1, (1 << 12) + 1, INT32_MAX, INT32_MIN}, ""},
        {FIELD(n_layers), {1, 3, 1 << 12}, size},
        {FIELD(n_heads), {0, -1, (1 << 12) + 2, INT32_MAX, INT32_MIN}, ""},
        {FIELD(n_heads), {1, 3, 5, 7}, "n_kv_heads"},
        {FIELD(n_heads), {2, 6, 1 << 12}, size},
        {FIELD(n_kv_heads), {0, -1, 3, 8, INT32_MAX, INT32_MIN}, "n_kv_heads"},
        {FIELD(n_kv_heads), {1, 4}, size},
        {FIELD(head_dim), {0, 1, 3, 5, -2, INT32_MAX, INT32_MIN}, ""},
        {FIELD(head_dim), {2, 6, 1 << 12}, " "}, // what follows is looked for elsewhere
        {FIELD(vocab_size), {0, -1, (1 << 24) + 1, INT32_MAX, INT32_MIN}, ""},
        {FIELD(vocab_size), {9, 7, 1 << 24}, " "}, // what follows is looked for elsewhere
        {FIELD(seq_len), {0, -1, (1 << 28) + 1, INT32_MAX, INT32_MIN}, ""},
        {FIELD(shared_classifier), {2, -1, INT32_MAX, INT32_MIN, 256}, ""},
        {FIELD(shared_classifier), {1}, size},
        {FIELD(sliding_window), {-1, (1 << 28) + 1, INT32_MAX, INT32_MIN}, ""},
        {FIELD(bos), {-2, 8, INT32_MAX, INT32_MIN}, ""},
        {FIELD(storage), {3, -1, INT32_MAX, INT32_MIN}, ""},
        {FIELD(storage), {1, 2}, size},
        {FIELD(unknown), {-2, 8, INT32_MAX, INT32_MIN}, ""},
        {FIELD(text_flags), {32, 64, -1, INT32_MIN}, ""},
        {FIELD(n_cutters), {-1, 17, INT32_MAX, INT32_MIN}, ""},
        {FIELD(n_cutters), {1}, "n_states"}, // for which there is no state
        {FIELD(n_states), {-1, (1 << 16) + 1, INT32_MAX, INT32_MIN}, ""},
        {FIELD(n_states), {1, 1 << 16}, " "},
        {FIELD(n_classes), {0, -1, (1 << 10) + 1, INT32_MAX, INT32_MIN}, ""},
        {FIELD(n_ranges), {-1, (1 << 16) + 1, INT32_MAX, INT32_MIN}, " "},
        {FIELD(n_ranges), {1, 2, 1 << 16}, " "},
        {FIELD(n_units), {-1, (1 << 21) + 1, INT32_MAX, INT32_MIN}, " "},
        {FIELD(n_units), {1, 2, 1 << 21}, " "},
        {FIELD(n_pairs), {-1, (1 << 24) + 1, INT32_MAX, INT32_MIN}, " "},
        {FIELD(n_pairs), {7, 9, 1 << 24}, " "},
        {FIELD(n_whole), {-1, 9, INT32_MAX, INT32_MIN}, " "},
        {FIELD(n_whole), {8}, " "},
        {FIELD(n_words), {-1, 9, INT32_MAX, INT32_MIN}, " "},
        {FIELD(n_words), {8}, " "},
        {FIELD(n_text), {-1, (1 << 30) + 1, INT32_MAX, INT32_MIN}, "tables"},
        {FIELD(n_text), {1, 70}, "string"}, // which ends after the text
        {FIELD(n_text), {1 << 30}, "tables"},
        // as bits of a float: -1, 1, infinity, NaN, hardly below 0
        {FIELD(norm_eps),
         {(int)0xBF800000, 0x3F800000, 0x7F800000, 0x7FC00000, (int)0x80000001},
         ""},
#undef FIELD
    };
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        check_lie(file, &lies[i], lies[i].values[0]);
        for (int v = 1; v < MOST_VALUES && lies[i].values[v]; v++)
            check_lie(file, &lies[i], lies[i].values[v]);
    }
    free(file.data);
}

// So are a wrong magic and any number in the header's unused bytes.
Test(loader, rest_of_the_header) {
    Bytes file = small_file(WITH_UNKNOWN);
    for (size_t i = 0; i < 256; i++) {
        const bool magic = i < 8;
        if (!magic && i < offsetof(FileHeader, zeros))
            continue;
        file.data[i] ^= 1;
        cr_assert(!parses(file.data, file.n, magic ? "export.py" : "header byte"), "%zu", i);
        file.data[i] ^= 1;
    }
    free(file.data);
}

// ---- the rest of the file

// A file that was cut anywhere, or that has something behind its end, is refused.
Test(loader, every_length) {
    for (int kind = 0; kind < N_FILES; kind++) {
        Bytes file = small_file(kind);
        for (size_t n = 0; n < file.n; n++)
            cr_assert(!parses(file.data, n, ""), "%zu of %zu bytes", n, file.n);
        for (int n = 1; n <= 64; n++) {
            append(&file, "", 1);
            cr_assert(!parses(file.data, file.n, "header promises"), "%d bytes more", n);
        }
        free(file.data);
    }
}

// Files of any kind with n other bytes at `at` are refused.
static void check_bytes(int kind, size_t at, const void *bytes, size_t n, const char *reason) {
    Bytes file = small_file(kind);
    memcpy(file.data + at, bytes, n);
    cr_assert(!parses(file.data, file.n, reason), "byte %zu, %s: accepted", at, reason);
    free(file.data);
}

// A frequency of RoPE that no angle can be made of. At 16 positions angles of up to 2^28 radians are
// good for the cosine.
Test(loader, frequencies) {
    const double wrong[] = {0, -.0, -1, (1 << 24) * 1.001, INFINITY, -INFINITY, NAN, -NAN};
    const double right[] = {1e-300, 1 << 24};
    for (size_t pair = 0; pair < 2; pair++) {
        const size_t at = 256 + 8 * pair;
        for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
            for (int kind = 0; kind < N_FILES; kind++)
                check_bytes(kind, at, &wrong[i], 8, "RoPE's frequency");
        for (size_t i = 0; i < 2; i++) {
            Bytes file = small_file(WITH_BYTES);
            memcpy(file.data + at, &right[i], 8);
            cr_assert(parses(file.data, file.n, ""), "%g: %s", right[i], last_error);
            free(file.data);
        }
    }
}

// Every number of a table that leads somewhere, one too large: the record and the number in it, and
// the largest value that is right.
Test(loader, numbers_of_the_tables) {
    Bytes file = small_file(BYTE_LEVEL);
    const FileHeader *h = header_of(&file);
    const uint32_t vocab_size = (uint32_t)h->vocab_size;
    const struct {
        int table, record, width, number; // width: numbers of a record
        uint32_t most;
        const char *name;
    } lies[] = {
        {AT_CLASSES, 0, 3, 2, N_SMALL_CLASSES - 1, "range of characters 0"},
        {AT_CLASSES, 2, 3, 2, N_SMALL_CLASSES - 1, "range of characters 2"},
        {AT_STEPS, 5, 1, 0, 2 * N_SMALL_STATES + 1, "step 5"},
        {AT_STEPS, 0, 1, 0, 2 * N_SMALL_STATES + 1, "step 0"},
        {AT_UNITS, 17, 3, 2, MAX_SYMBOLS - 1, "unit 17"},
        {AT_PAIRS, 1, 4, 0, MAX_SYMBOLS - 1, "pair 1"},
        {AT_PAIRS, 1, 4, 1, MAX_SYMBOLS - 1, "pair 1"},
        {AT_PAIRS, 1, 4, 2, vocab_size - 1, "pair 1"},
        {AT_STRINGS, 7, 2, 1, N_KINDS - 1, "string 7"},
        {AT_STRINGS, h->vocab_size + 6, 2, 0, (uint32_t)h->n_text, "string 271"},
        {AT_WHOLE, 1, 1, 0, vocab_size - 1, "whole piece 1"},
        {AT_WORDS, 3, 1, 0, vocab_size - 1, "word 3"},
    };
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        const size_t at = table_at(&file, lies[i].table)
                        + 4 * (size_t)(lies[i].record * lies[i].width + lies[i].number);
        const uint32_t wrong[] = {lies[i].most + 1, UINT32_MAX};
        for (int w = 0; w < 2; w++)
            check_bytes(BYTE_LEVEL, at, &wrong[w], 4, lies[i].name);
        Bytes other = small_file(BYTE_LEVEL);
        memcpy(other.data + at, &lies[i].most, 4);
        cr_assert(parses(other.data, other.n, ""), "%s: %s", lies[i].name, last_error);
        free(other.data);
    }
    free(file.data);
}

// Strings lie one after the other, or some are empty.
Test(loader, strings) {
    Bytes file = small_file(WITH_BYTES);
    const size_t at = table_at(&file, AT_STRINGS) + 8 * 262;
    uint32_t before, after;
    memcpy(&before, file.data + at - 8, 4);
    memcpy(&after, file.data + at + 8, 4);
    const uint32_t wrong[] = {before - 1, 0, after + 1, (uint32_t)header_of(&file)->n_text};
    for (int i = 0; i < 4; i++)
        check_bytes(WITH_BYTES, at, &wrong[i], 4, "ends before it begins");
    const uint32_t right[] = {before, after};
    for (int i = 0; i < 2; i++) {
        memcpy(file.data + at, &right[i], 4);
        cr_assert(parses(file.data, file.n, ""), "%s", last_error);
    }
    free(file.data);
}

// A file knows how a chat is written, or has six empty strings.
Test(loader, chat) {
    Model m;
    Bytes file = small_file(WITH_BYTES);
    cr_assert(model_parse(&m, file.data, file.n));
    cr_assert(has_chat(&m));
    cr_assert_eq(chat_string(&m, OPENING).length, 7);
    cr_assert(!memcmp(chat_string(&m, AFTER_ANSWER).bytes, " </s>", 5));
    model_close(&m);
    free(file.data);
    Bench b;
    bench_open(&b, G, 1);
    cr_assert(!has_chat(&b.model));
    bench_close(&b);
}

// What is wrong is said with the right names and numbers: other bytes (n) at a place of a file, and
// the sentence.
static void check_sentence(int kind, size_t at, const void *bytes, size_t n, const char *sentence) {
    check_bytes(kind, at, bytes, n, "");
    cr_assert_str_eq(last_error, sentence, "'%s' is not '%s'", last_error, sentence);
}

Test(loader, sentences) {
    const int32_t numbers[] = {0, 1, 4, 8, 3};
    const float one = 1;
    const uint32_t many = 1000000;
    char sentence[160];
    Bytes file = small_file(WITH_BYTES);
    Bytes cut = small_file(BYTE_LEVEL);
#define FIELD(name, i, sentence) \
    check_sentence(WITH_BYTES, offsetof(FileHeader, name), &numbers[i], 4, sentence)
    FIELD(version, 2, "version is 4, must be 3 to 3");
    FIELD(version, 1, "made by an older export.py: export the checkpoint again");
    FIELD(dim, 0, "dim is 0, must be 1 to 1048576");
    FIELD(n_heads, 4, "n_heads is 3, no multiple of n_kv_heads, which is 2");
    FIELD(n_kv_heads, 3, "n_kv_heads is 8, must be 1 to 4");
    FIELD(head_dim, 4, "head_dim is 3, must be even");
    FIELD(shared_classifier, 4, "shared_classifier is 3, must be 0 to 1");
#undef FIELD
    check_sentence(WITH_BYTES, offsetof(FileHeader, norm_eps), &one, 4,
                   "norm_eps is 1, must be 0 to 1");
    check_sentence(WITH_BYTES, 200, "\1", 1, "header byte 200 is not zero");

    // the tables
    check_sentence(WITH_BYTES, 264, "\0\0\0\0\0\0\0", 8, "RoPE's frequency 1 is no angle");
    check_sentence(BYTE_LEVEL, table_at(&cut, AT_CLASSES) + 8, &many, 4,
                   "range of characters 0 has 1000000 where less than 3 must stand");
    check_sentence(WITH_BYTES, table_at(&file, AT_STRINGS) + 8 * 261 + 4, "\6", 1,
                   "string 261 has 6 where less than 6 must stand");
    check_sentence(WITH_BYTES, table_at(&file, AT_STRINGS) + 8 * 261, "\0\0", 2,
                   "string 261 ends before it begins");

    // the length
    cr_assert(!parses(file.data, 255, ""));
    cr_assert_str_eq(last_error, "too short for a header, 255 bytes");
    cr_assert(!parses(file.data, file.n - 4, ""));
    snprintf(sentence, sizeof sentence,
             "has %zu bytes, the header promises %zu; copy or export it again", file.n - 4, file.n);
    cr_assert_str_eq(last_error, sentence);
    const size_t end = table_at(&file, AT_END);
    cr_assert(!parses(file.data, end - 1, ""));
    snprintf(sentence, sizeof sentence, "has %zu bytes, too few for its tables", end - 1);
    cr_assert_str_eq(last_error, sentence);
    free(file.data);
    free(cut.data);
}

// Changes n_changed random bytes of a copy of the file, half of them in the fields of the header,
// the others up to the end of the tables. k: the number of the file, which draws them.
static Bytes corrupted(Bytes file, size_t end, uint64_t k, int n_changed) {
    Bytes copy = {0};
    append(&copy, file.data, file.n);
    for (uint64_t c = 0; c < (uint64_t)n_changed; c++) {
        const double u = (double)unit(2, 4 * k + c);
        const bool in_header = u < .5;
        const double way = in_header ? 2 * u : 2 * u - 1; // 0 to 1
        const size_t at = (size_t)(way * (double)(in_header ? offsetof(FileHeader, zeros) : end));
        copy.data[at] = (char)(int)(unit(3, 4 * k + c) * 256);
    }
    return copy;
}

// Thousands of files with one to four bytes of header and tables changed at random: refused with
// a reason, or good enough to run.
Test(loader, random_corruption) {
    int n_refused = 0;
    int n_accepted = 0;
    for (int kind = 0; kind < N_FILES; kind++) {
        Bytes good = small_file(kind);
        const size_t end = table_at(&good, AT_END);
        for (uint64_t k = 0; k < 6000; k++) {
            const int n_changed = k % 2 ? 1 : 1 + (int)(unit(1, k) * 4);
            Bytes file = corrupted(good, end, k, n_changed);
            if (parses(file.data, file.n, ""))
                n_accepted++;
            else
                n_refused++;
            free(file.data);
        }
        cr_assert(parses(good.data, good.n, ""));
        free(good.data);
    }
    cr_assert(n_accepted > 1000 && n_refused > 1000, "%d, %d", n_accepted, n_refused);
}

// Numbers that are no numbers among the weights do no harm: the file opens, and computing with it
// ends the program with a sentence and status 1.
Test(loader, weights_that_are_no_numbers, .exit_code = 1) {
    Bytes file = small_file(WITH_UNKNOWN);
    const size_t embedding = (table_at(&file, AT_END) + 63) / 64 * 64;
    memset(file.data + embedding, 0xFF, 1024); // NaN
    parses(file.data, file.n, "");
    cr_assert_fail("it was used without a complaint");
}

// ---- files on a disk

static bool opens(const char *path) {
    Model m;
    bool ok = model_open(&m, path);
    cr_assert(ok || (m.error[0] && !strchr(m.error, '\n')), "%s: '%s'", path, m.error);
    model_close(&m);
    model_close(&m); // nothing is freed twice
    return ok;
}

static void write_file(const char *path, const char *data, size_t n) {
    FILE *to = fopen(path, "wb");
    cr_assert_not_null(to);
    fwrite(data, 1, n, to);
    fclose(to);
}

// A path that leads nowhere, to a directory, to an empty or to a cut file is refused; a good file
// opens, and its weights are found where they are.
Test(loader, paths) {
    char directory[] = "/tmp/drugs-test-XXXXXX";
    char path[64];
    Bytes file = small_file(WITH_BYTES);
    cr_assert_not_null(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/model.bin", directory);
    cr_assert(!opens(path), "there is no such file");
    cr_assert(!opens(directory), "a directory");
    write_file(path, file.data, 0);
    cr_assert(!opens(path), "an empty file");
    write_file(path, file.data, file.n - 1);
    cr_assert(!opens(path), "a cut file");
    write_file(path, file.data, file.n);
    cr_assert(opens(path), "a good file");

    // weights: streams of testing.h's unit(), 16 * layer + which
    Model m;
    cr_assert(model_open(&m, path));
    const float *gain = m.layers[1].w[ATT_NORM].data;
    const float *w2 = m.layers[1].w[W2].data;
    const float *classifier = m.layers[0].w[WCLS].data;
    cr_assert_eq(gain[7], unit(16 + ATT_NORM, 7) + .5f);
    cr_assert_eq(w2[255], (unit(16 + W2, 255) - .5f) * (4 / sqrtf(16)));
    cr_assert_eq(classifier[264 * 16 - 1], (unit(WCLS, 264 * 16 - 1) - .5f) * .5f);
    model_close(&m);
    remove(path);
    rmdir(directory);
    free(file.data);
}
