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
    cr_assert_eq(model.tokenizer->pieces[422].length, 3);
    cr_assert(!memcmp(model.tokenizer->pieces[422].bytes, " To", 3));
    model_close(&model);

    cr_assert(!model_open(&model, "tests/macbeth.bin"));
    cr_assert_str_eq(model.error, "cannot be opened; is the path right?");
    model_close(&model);
}

// ---- small files

// Files of three kinds: in the manner of SentencePiece, with an unknown piece or with bytes; and
// byte-level, with ranges of characters and a further merge for " ab" and for "abab".
enum { WITH_UNKNOWN, WITH_BYTES, BYTE_LEVEL, N_FILES };
enum { N_RANGES = 4, N_MERGES = 3 };
static const uint32_t RANGES[N_RANGES][3] = {
    {' ', ' ', WHITE}, {'0', '9', NUMBER}, {'a', 'z', LETTER}, {0xC0, 0x24F, LETTER},
};
typedef struct {
    uint32_t piece, left;
    float score;
} FurtherMerge;
static const FurtherMerge MERGES[N_MERGES] = {
    {BEHIND_BYTES + 4, 2, -3}, {BEHIND_BYTES + 5, 1, -5}, {BEHIND_BYTES + 5, 3, -6},
};

// A row of a matrix takes 64 bytes, so no wrong size can hide in the padding behind a tensor.
static Bytes small_file(int kind) {
    const char *const words[] = {" ", "a", "b", "ab", " ab", "abab"};
    const int lefts[] = {0, 0, 0, 0, 1, 2};
    const int n_words = kind == BYTE_LEVEL ? 6 : 5;
    Bytes pieces = first_pieces(kind != WITH_UNKNOWN);
    for (int i = 0; kind == BYTE_LEVEL && i < 256; i++) { // its bytes are normal pieces
        const size_t at = pieces.n - (size_t)(256 - i) * 11;
        pieces.data[at + 4] = NORMAL;
    }
    for (int i = 0; i < n_words; i++) {
        const int piece_kind = i == 2 ? USER_DEFINED : NORMAL;
        append_made_piece(&pieces, (float)-i, piece_kind, words[i], (int)strlen(words[i]),
                          kind == BYTE_LEVEL ? lefts[i] : 0);
    }
    FileHeader header = {
        .magic = "drugs.c", .version = 2, .dim = 16, .hidden_dim = 16, .n_layers = 2, .n_heads = 4,
        .n_kv_heads = 2, .head_dim = 4,
        .vocab_size = n_words + (kind == WITH_UNKNOWN ? FIRST_BYTE : BEHIND_BYTES), .seq_len = 16,
        .sliding_window = 3, .norm_eps = 1e-5f, .bos = 1, .rope_theta = 100, .chat = llama2_chat(),
        .tokenizer_flags = PREFIX_SPACE | (kind == WITH_UNKNOWN ? 0 : BYTE_PIECES),
    };
    if (kind == BYTE_LEVEL) {
        header.tokenizer_flags = BYTE_PIECES | IGNORE_MERGES;
        header.cut_rule = CUT_LLAMA3;
        header.most_digits = 3;
        append(&header.ranges, RANGES, sizeof RANGES);
        append(&header.merges, MERGES, sizeof MERGES);
    }
    Bytes file = model_file(header, pieces);
    free(pieces.data);
    free(header.ranges.data);
    free(header.merges.data);
    free(header.chat.data);
    return file;
}

static const FileHeader *header_of(const Bytes *file) {
    return (const void *)file->data;
}

// Where the tables of a file lie.
static size_t ranges_at(const Bytes *file) {
    return 256 + (size_t)header_of(file)->head_dim / 2 * 8;
}

static size_t merges_at(const Bytes *file) {
    return ranges_at(file) + 12 * (size_t)header_of(file)->n_ranges;
}

static size_t chat_at(const Bytes *file) {
    return merges_at(file) + 12 * (size_t)header_of(file)->n_merges;
}

// The record of the id-th piece.
static size_t piece_at(const Bytes *file, int id) {
    size_t at = chat_at(file) + (size_t)header_of(file)->chat_bytes;
    for (int i = 0; i < id; i++) {
        uint16_t length;
        memcpy(&length, file->data + at + 6, 2);
        at += 10u + length;
    }
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
    for (int i = 0; i < N_CHAT_SPANS; i++) {
        const Span span = m->tokenizer->chat[i];
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
    const int chat_bytes = header_of(&file)->chat_bytes;
    const Lie lies[] = {
#define FIELD(name) offsetof(FileHeader, name), #name
        {FIELD(version), {0, 3, -1, INT32_MIN}, ""},
        {FIELD(version), {1}, "export the checkpoint again"}, // which was the format before
        {FIELD(version), {2 << 24}, "byte order"},
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
        {FIELD(vocab_size), {9, 1 << 24}, "tokenizer"},
        {FIELD(vocab_size), {7, 6, 5, 3}, "left over"},
        {FIELD(seq_len), {0, -1, (1 << 28) + 1, INT32_MAX, INT32_MIN}, ""},
        {FIELD(shared_classifier), {2, -1, INT32_MAX, INT32_MIN, 256}, ""},
        {FIELD(shared_classifier), {1}, size},
        {FIELD(sliding_window), {-1, (1 << 28) + 1, INT32_MAX, INT32_MIN}, ""},
        {FIELD(bos), {-2, 8, INT32_MAX, INT32_MIN}, ""},
        {FIELD(tokenizer_flags), {256, -1, BYTE_PIECES, BYTE_PIECES | PREFIX_SPACE, INT32_MIN}, ""},
        {FIELD(cut_rule), {-1, 3, INT32_MAX, INT32_MIN}, ""},
        {FIELD(most_digits), {-1, 256, INT32_MAX, INT32_MIN}, ""},
        {FIELD(n_ranges), {-1, (1 << 16) + 1, INT32_MAX, INT32_MIN}, ""},
        {FIELD(n_ranges), {1, 2, 1 << 16}, " "},
        {FIELD(chat_bytes), {-1, (1 << 16) + 1, INT32_MAX, INT32_MIN}, ""},
        {FIELD(chat_bytes), {1, 11, chat_bytes - 1, chat_bytes + 1}, "chat"},
        {FIELD(chat_bytes), {0, 1 << 16}, " "},
        {FIELD(n_merges), {-1, (1 << 24) + 1, INT32_MAX, INT32_MIN}, ""},
        {FIELD(n_merges), {1, 2, 1 << 24}, " "},
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

// So are a wrong magic, any number in the header's unused bytes, ...
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

// ... and every other tokenizer length.
Test(loader, tokenizer_length) {
    Bytes file = small_file(WITH_UNKNOWN);
    FileHeader *header = (void *)file.data;
    const int64_t n = (int64_t)file.n;
    const int64_t right = header->tokenizer_bytes;
    const int64_t wrong[] = {
        0, 1, right - 1, right + 1, right + 64, -1, INT32_MAX, INT64_MAX, INT64_MIN,
        right + (1ll << 32), n, n - 256,
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        header->tokenizer_bytes = wrong[i];
        cr_assert(!parses(file.data, file.n, ""), "tokenizer_bytes %lld", (long long)wrong[i]);
    }
    header->tokenizer_bytes = right - 5; // half of the last record's first eight bytes
    cr_assert(!parses(file.data, file.n, "ends within piece 7"));
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

// Ranges of characters ascend, none touches another, all are letters, numbers or spaces of Unicode.
Test(loader, ranges) {
    const struct {
        int i;
        uint32_t range[3];
        const char *reason;
    } lies[] = {
        {0, {' ', '0', WHITE}, "range 1"},     // reaches into the next one
        {0, {' ', 'b', WHITE}, "range 1"},
        {1, {' ', '9', NUMBER}, "range 1"},
        {1, {'9', '0', NUMBER}, "range 1"},    // backwards
        {2, {'0', '9', LETTER}, "range 2"},    // the one before once more
        {2, {0, 1, LETTER}, "range 2"},
        {3, {0xC0, 0x110000, LETTER}, "range 3"},
        {3, {0xC0, UINT32_MAX, LETTER}, "range 3"},
        {3, {UINT32_MAX, UINT32_MAX, LETTER}, "range 3"},
        {3, {0xC0, 0x24F, 0}, "class 0"},
        {0, {' ', ' ', 4}, "class 4"},
        {3, {0xC0, 0x24F, UINT32_MAX}, "class"},
    };
    Bytes file = small_file(BYTE_LEVEL);
    const size_t first = ranges_at(&file);
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++)
        check_bytes(BYTE_LEVEL, first + 12 * (size_t)lies[i].i, lies[i].range, 12, lies[i].reason);
    const uint32_t last[3] = {0xC0, 0x10FFFF, LETTER};
    memcpy(file.data + first + 12 * 3, last, 12);
    cr_assert(parses(file.data, file.n, ""), "%s", last_error);
    free(file.data);
}

// Further merges ascend, make a normal piece of two halves that are not empty, and have a score.
Test(loader, merges) {
    enum { AB = BEHIND_BYTES + 4, ABAB = BEHIND_BYTES + 5 };
    const struct {
        int i;
        FurtherMerge merge;
        const char *reason;
    } lies[] = {
        {0, {ABAB, 1, 0}, "merge 1"}, // is there twice
        {0, {ABAB, 2, 0}, "merge 1"}, // the next one has fewer bytes on the left
        {1, {ABAB, 3, 0}, "merge 2"},
        {2, {AB, 1, 0}, "merge 2"},
        {2, {ABAB + 1, 1, 0}, "merge 2"}, // no piece
        {2, {UINT32_MAX, 1, 0}, "merge 2"},
        {2, {ABAB, 4, 0}, "merge 2"}, // the right half is empty
        {2, {ABAB, 65535, 0}, "merge 2"},
        {2, {ABAB, UINT32_MAX, 0}, "merge 2"},
        {0, {AB, 0, 0}, "merge 0"}, // the left one
        {0, {2, 1, 0}, "merge 0"},  // makes </s>
        {0, {BEHIND_BYTES + 2, 1, 0}, "merge 0"}, // user-defined
        {0, {FIRST_BYTE, 1, 0}, "merge 0"}, // a byte
        {0, {AB, 2, NAN}, "merge 0"},
        {0, {AB, 2, INFINITY}, "merge 0"},
        {0, {AB, 2, -INFINITY}, "merge 0"},
    };
    Bytes file = small_file(BYTE_LEVEL);
    const size_t first = merges_at(&file);
    free(file.data);
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++)
        check_bytes(BYTE_LEVEL, first + 12 * (size_t)lies[i].i, &lies[i].merge, 12, lies[i].reason);
}

// The six strings of a chat fill it.
Test(loader, chat) {
    for (int kind = 0; kind < N_FILES; kind++) {
        Bytes file = small_file(kind);
        size_t at = chat_at(&file);
        for (int i = 0; i < 6; i++) {
            uint16_t length;
            memcpy(&length, file.data + at, 2);
            const uint16_t wrong[] = {length + 1, length - 1, 0, 255, 65535};
            for (int w = 0; w < 5; w++)
                check_bytes(kind, at, &wrong[w], 2, "chat");
            at += 2u + length;
        }
        free(file.data);
    }
    // Without a form there is nothing; and strings may be empty.
    const int n_bytes[] = {0, 12, 11, 10, 2, 1, 13};
    for (int i = 0; i < 7; i++) {
        FileHeader header = G;
        append_zeros(&header.chat, (size_t)n_bytes[i]);
        Bytes pieces = first_pieces(true);
        header.vocab_size = BEHIND_BYTES;
        Bytes file = model_file(header, pieces);
        cr_assert_eq(parses(file.data, file.n, "chat"), i < 2, "%d bytes", n_bytes[i]);
        free(file.data);
        free(pieces.data);
        free(header.chat.data);
    }
}

// Every lie that a record of the tokenizer can tell, one at a time: other bytes (n) at byte `at` of
// piece `id`. Score, kind, a reserved byte, length, left half and text are at 0, 4, 5, 6, 8 and 10.
Test(loader, tokenizer_records) {
    const struct {
        int id, at, n;
        const char *bytes;
        const char *reason;
    } lies[] = {
        {4, 4, 1, "\6", "kind 6"},
        {4, 4, 1, "\xFF", "kind 255"},
        {4, 5, 1, "\1", "reserved"},
        {263, 6, 2, "\4\0", "longer"},
        {263, 6, 2, "\xFF\xFF", "longer"},
        {263, 6, 2, "\1\0", "left over"},
        {259, 6, 2, "\0\0", "empty"},
        {0, 0, 4, "\0\0\xC0\x7F", "score"},
        {5, 0, 4, "\0\0\x80\xFF", "score"},
        {7, 10, 1, "\5", "same byte"},
        {2, 6, 2, "\0\0", "empty"}, // an END piece
        {3, 4, 1, "\0", "byte pieces"},
        {258, 4, 1, "\1", "byte pieces"},
        {260, 4, 1, "\3", "byte"},
        {263, 4, 1, "\3", "3 bytes"},
        {100, 6, 2, "\0\0", "empty"},
        {262, 6, 2, "\0\xFF", "longer"},
    };
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        Bytes file = small_file(WITH_BYTES);
        size_t at = piece_at(&file, lies[i].id) + (size_t)lies[i].at;
        memcpy(file.data + at, lies[i].bytes, (size_t)lies[i].n);
        cr_assert(!parses(file.data, file.n, lies[i].reason), "piece %d, byte %d: accepted",
                  lies[i].id, lies[i].at);
        free(file.data);
    }
}

// What is wrong is said with the right names and numbers: other bytes (n) at a place of a file, and
// the sentence.
static void check_sentence(int kind, size_t at, const void *bytes, size_t n, const char *sentence) {
    check_bytes(kind, at, bytes, n, "");
    cr_assert_str_eq(last_error, sentence, "'%s' is not '%s'", last_error, sentence);
}

Test(loader, sentences) {
    const int32_t numbers[] = {0, 1, 3, 8};
    const float one = 1;
    char sentence[160];
    Bytes file = small_file(WITH_BYTES);
    Bytes cut = small_file(BYTE_LEVEL);
#define FIELD(name, i, sentence) \
    check_sentence(WITH_BYTES, offsetof(FileHeader, name), &numbers[i], 4, sentence)
    FIELD(version, 2, "version is 3, must be 2 to 2");
    FIELD(dim, 0, "dim is 0, must be 1 to 1048576");
    FIELD(n_heads, 2, "n_heads is 3, no multiple of n_kv_heads, which is 2");
    FIELD(n_kv_heads, 3, "n_kv_heads is 8, must be 1 to 4");
    FIELD(head_dim, 2, "head_dim is 3, must be even");
    FIELD(shared_classifier, 2, "shared_classifier is 3, must be 0 to 1");
#undef FIELD
    check_sentence(WITH_BYTES, offsetof(FileHeader, norm_eps), &one, 4,
                   "norm_eps is 1, must be 0 to 1");
    check_sentence(WITH_BYTES, 200, "\1", 1, "header byte 200 is not zero");
    snprintf(sentence, sizeof sentence, "tokenizer_bytes is 8, must be %d to %zu",
             10 * header_of(&file)->vocab_size, file.n - 256);
    const int64_t eight = 8;
    check_sentence(WITH_BYTES, offsetof(FileHeader, tokenizer_bytes), &eight, 8, sentence);

    // the tables and the chat
    check_sentence(WITH_BYTES, 264, "\0\0\0\0\0\0\0", 8, "RoPE's frequency 1 is no angle");
    const size_t range = ranges_at(&cut) + 12 * 2, merge = merges_at(&cut) + 12 * 1;
    check_sentence(BYTE_LEVEL, range, "\0\0\0", 4, "range 2 of characters does not ascend");
    check_sentence(BYTE_LEVEL, range + 8, "\7\0\0", 4, "range 2 of characters has class 7");
    check_sentence(BYTE_LEVEL, merge + 4, "\0\0\0", 4, "merge 1 does not make piece 264");
    check_sentence(BYTE_LEVEL, merge, "\377\377\377", 4,
                   "merge 1 does not ascend, or makes no piece");
    check_sentence(WITH_BYTES, chat_at(&file), "\377\377", 2, "the chat ends within its string 0");
    const size_t last_string = piece_at(&file, 0) - 7; // " </s>"
    check_sentence(WITH_BYTES, last_string, "\6", 2, "the chat ends within its string 5");
    check_sentence(WITH_BYTES, last_string, "\3", 2, "2 bytes are left over behind the chat");

    // the pieces
    check_sentence(WITH_BYTES, piece_at(&file, 261) + 4, "\6", 1, "piece 261 is of kind 6");
    check_sentence(WITH_BYTES, piece_at(&file, 261) + 5, "\1", 1,
                   "piece 261 has a reserved byte that is not zero");
    check_sentence(WITH_BYTES, piece_at(&file, 263) + 6, "\4", 2,
                   "piece 263 is longer than the tokenizer");
    check_sentence(WITH_BYTES, piece_at(&file, 263) + 6, "\2", 2,
                   "1 bytes are left over behind the last piece");
    check_sentence(WITH_BYTES, piece_at(&file, 261), "\0\0\300\177", 4,
                   "piece 261 has a score that is no number");
    check_sentence(WITH_BYTES, piece_at(&file, 259) + 6, "\0", 2, "piece 259 is empty");
    check_sentence(WITH_BYTES, piece_at(&file, 262) + 4, "\3", 1, "byte piece 262 has 2 bytes");
    check_sentence(WITH_BYTES, piece_at(&file, 7) + 10, "\0", 1,
                   "pieces 3 and 7 are the same byte, or both unknown");
    check_sentence(WITH_BYTES, piece_at(&file, 9) + 4, "\2", 1,
                   "pieces 0 and 9 are the same byte, or both unknown");

    // the length
    cr_assert(!parses(file.data, 255, ""));
    cr_assert_str_eq(last_error, "too short for a header, 255 bytes");
    cr_assert(!parses(file.data, file.n - 4, ""));
    snprintf(sentence, sizeof sentence,
             "has %zu bytes, the header promises %zu; copy or export it again", file.n - 4, file.n);
    cr_assert_str_eq(last_error, sentence);
    const size_t pieces_end = piece_at(&file, header_of(&file)->vocab_size);
    cr_assert(!parses(file.data, pieces_end - 1, ""));
    snprintf(sentence, sizeof sentence, "has %zu bytes, too few for its tokenizer", pieces_end - 1);
    cr_assert_str_eq(last_error, sentence);
    free(file.data);
    free(cut.data);
}

// Without byte pieces an unknown piece is needed, unless the text is cut; and the header must know
// of byte pieces.
Test(loader, tokenizer_as_a_whole) {
    Bytes file = small_file(WITH_UNKNOWN);
    file.data[piece_at(&file, 0) + 4] = CONTROL; // it was the only unknown one
    cr_assert(!parses(file.data, file.n, "unknown"));
    ((FileHeader *)(void *)file.data)->cut_rule = CUT_GPT2;
    cr_assert(parses(file.data, file.n, ""), "%s", last_error);
    free(file.data);

    file = small_file(WITH_BYTES);
    FileHeader *header = (void *)file.data;
    header->tokenizer_flags = 0;
    cr_assert(!parses(file.data, file.n, "byte pieces"));
    header->tokenizer_flags = BYTE_PIECES;
    header->cut_rule = CUT_GPT2; // then bytes must be normal pieces
    cr_assert(!parses(file.data, file.n, "byte pieces"));
    free(file.data);

    file = small_file(BYTE_LEVEL);
    header = (void *)file.data;
    header->cut_rule = CUT_NOWHERE; // then they must not be
    cr_assert(!parses(file.data, file.n, "byte pieces"));
    header->cut_rule = CUT_LLAMA3;
    file.data[piece_at(&file, FIRST_BYTE + 'x') + 4] = CONTROL; // one byte is no piece
    cr_assert(!parses(file.data, file.n, "byte pieces"));
    header->tokenizer_flags = 0; // and that may be
    cr_assert(parses(file.data, file.n, ""), "%s", last_error);
    free(file.data);
}

// Changes n_changed random bytes of a copy of the file, half of them in the fields of the header,
// the others up to the end of the tokenizer. k: the number of the file, which draws them.
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

// Thousands of files with one to four bytes of header and tokenizer changed at random: refused with
// a reason, or good enough to run.
Test(loader, random_corruption) {
    int n_refused = 0;
    int n_accepted = 0;
    for (int kind = 0; kind < N_FILES; kind++) {
        Bytes good = small_file(kind);
        const size_t end = piece_at(&good, header_of(&good)->vocab_size);
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
    const size_t embedding = (piece_at(&file, 8) + 63) / 64 * 64;
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
    const float *gain = m.layers[1].w[ATT_NORM];
    const float *w2 = m.layers[1].w[W2];
    const float *classifier = m.layers[0].w[WCLS];
    cr_assert_eq(gain[7], unit(16 + ATT_NORM, 7) + .5f);
    cr_assert_eq(w2[255], (unit(16 + W2, 255) - .5f) * (4 / sqrtf(16)));
    cr_assert_eq(classifier[264 * 16 - 1], (unit(WCLS, 264 * 16 - 1) - .5f) * .5f);
    model_close(&m);
    remove(path);
    rmdir(directory);
    free(file.data);
}
