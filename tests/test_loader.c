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
    cr_assert_eq(model.config.n_layers, 5);
    cr_assert_eq(model.config.dim, 64);
    cr_assert_eq(model.config.vocab_size, 768);
    cr_assert_eq(model.config.seq_len, 160);
    cr_assert_eq(model.tokenizer.pieces[422].length, 3);
    cr_assert(!memcmp(model.tokenizer.pieces[422].bytes, " To", 3));
    model_close(&model);

    cr_assert(!model_open(&model, "tests/macbeth.bin"));
    cr_assert_str_eq(model.error, "cannot be opened; is the path right?");
    model_close(&model);
}

// ---- small files

// A row of a matrix takes 64 bytes, so no wrong size can hide in the padding behind a tensor.
static Bytes small_file(bool byte_pieces) {
    const char *const words[] = {" ", "a", "b", "ab", " a"};
    Bytes pieces = first_pieces(byte_pieces);
    for (int i = 0; i < 5; i++) {
        const int kind = i == 2 ? USER_DEFINED : NORMAL;
        append_piece(&pieces, (float)-i, kind, words[i], (int)strlen(words[i]));
    }
    const FileHeader header = {
        .magic = "drugs.c", .version = 1, .dim = 16, .hidden_dim = 16, .n_layers = 2, .n_heads = 4,
        .n_kv_heads = 2, .head_dim = 4, .vocab_size = 5 + (byte_pieces ? BEHIND_BYTES : FIRST_BYTE),
        .seq_len = 16, .sliding_window = 3, .rope_theta = 100, .norm_eps = 1e-5f, .bos = 1,
        .eos = 2, .tokenizer_flags = PREFIX_SPACE | (byte_pieces ? BYTE_PIECES : 0),
    };
    Bytes file = model_file(header, pieces);
    free(pieces.data);
    return file;
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
    int *tokens = encode(m, "ab a\xC3\xA9\xFF", 7, true, &n_tokens);
    run_init(&run, m, 4, 1);
    const int n_read = min(n_tokens, m->config.seq_len);
    const float *logits = feed(&run, &sequence, tokens, n_read, WANTS_LOGITS);
    if (logits)
        print_token(&printer, &m->tokenizer, argmax(logits, m->config.vocab_size));
    for (int i = 0; i < n_tokens; i++)
        print_token(&printer, &m->tokenizer, tokens[i]);
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

// The two files that all others are made from are good ones.
Test(loader, accepts_good_files) {
    for (int byte_pieces = 0; byte_pieces < 2; byte_pieces++) {
        Bytes file = small_file(byte_pieces);
        cr_assert(parses(file.data, file.n, ""), "%s", last_error);
        free(file.data);
    }
}

// ---- the header

// A field of the header, values that it cannot have, and the words that the reason must have;
// where they are "", it must begin with the field's name.
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
    const Lie lies[] = {
#define FIELD(name) offsetof(FileHeader, name), #name
        {FIELD(version), {0, 2, -1, INT32_MIN}, ""},
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
        {FIELD(head_dim), {2, 6, 1 << 12}, size},
        {FIELD(vocab_size), {0, -1, (1 << 24) + 1, INT32_MAX, INT32_MIN}, ""},
        {FIELD(vocab_size), {9, 1 << 24}, "tokenizer"},
        {FIELD(vocab_size), {7, 6, 5, 3}, "left over"},
        {FIELD(seq_len), {0, -1, (1 << 28) + 1, INT32_MAX, INT32_MIN}, ""},
        {FIELD(shared_classifier), {2, -1, INT32_MAX, INT32_MIN, 256}, ""},
        {FIELD(shared_classifier), {1}, size},
        {FIELD(sliding_window), {-1, (1 << 28) + 1, INT32_MAX, INT32_MIN}, ""},
        {FIELD(bos), {-2, 8, INT32_MAX, INT32_MIN}, ""},
        {FIELD(eos), {-2, 8, INT32_MAX, INT32_MIN}, ""},
        {FIELD(tokenizer_flags), {4, 7, -1, BYTE_PIECES, INT32_MIN}, ""},
        // as bits of a float: 0, -1, infinity, -infinity, NaN, another NaN, -0
        {FIELD(rope_theta),
         {0, (int)0xBF800000, 0x7F800000, (int)0xFF800000, 0x7FC00000, (int)0xFFC00001, INT32_MIN},
         ""},
        // -1, 1, infinity, NaN, hardly below 0
        {FIELD(norm_eps),
         {(int)0xBF800000, 0x3F800000, 0x7F800000, 0x7FC00000, (int)0x80000001},
         ""},
#undef FIELD
    };
    Bytes file = small_file(false);
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        check_lie(file, &lies[i], lies[i].values[0]);
        for (int v = 1; v < MOST_VALUES && lies[i].values[v]; v++)
            check_lie(file, &lies[i], lies[i].values[v]);
    }
    free(file.data);
}

// So are a wrong magic, any number in the header's unused bytes, ...
Test(loader, rest_of_the_header) {
    Bytes file = small_file(false);
    for (size_t i = 0; i < 256; i++) {
        const bool magic = i < 8;
        if (!magic && i < sizeof(FileHeader))
            continue;
        file.data[i] ^= 1;
        cr_assert(!parses(file.data, file.n, magic ? "export.py" : "header byte"), "%zu", i);
        file.data[i] ^= 1;
    }
    free(file.data);
}

// ... and every other tokenizer length.
Test(loader, tokenizer_length) {
    Bytes file = small_file(false);
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
    for (int byte_pieces = 0; byte_pieces < 2; byte_pieces++) {
        Bytes file = small_file(byte_pieces);
        for (size_t n = 0; n < file.n; n++)
            cr_assert(!parses(file.data, n, ""), "%zu of %zu bytes", n, file.n);
        for (int n = 1; n <= 64; n++) {
            append(&file, "", 1);
            cr_assert(!parses(file.data, file.n, "header promises"), "%d bytes more", n);
        }
        free(file.data);
    }
}

// A record of the tokenizer: offset of the id-th piece in the file.
static size_t piece_at(const Bytes *file, int id) {
    size_t at = 256;
    for (int i = 0; i < id; i++) {
        uint16_t length;
        memcpy(&length, file->data + at + 6, 2);
        at += 8u + length;
    }
    return at;
}

// Every lie that a record of the tokenizer can tell, one at a time: other bytes (n) at byte `at` of
// piece `id`. Score, kind, a reserved byte, length and text are at 0, 4, 5, 6 and 8.
Test(loader, tokenizer_records) {
    const struct {
        int id, at, n;
        const char *bytes;
        const char *reason;
    } lies[] = {
        {4, 4, 1, "\5", "kind 5"},
        {4, 4, 1, "\xFF", "kind 255"},
        {4, 5, 1, "\1", "reserved"},
        {263, 6, 2, "\3\0", "longer"},
        {263, 6, 2, "\xFF\xFF", "longer"},
        {263, 6, 2, "\1\0", "left over"},
        {259, 6, 2, "\0\0", "empty"},
        {0, 0, 4, "\0\0\xC0\x7F", "score"},
        {5, 0, 4, "\0\0\x80\xFF", "score"},
        {7, 8, 1, "\5", "same byte"},
        {3, 4, 1, "\0", "byte pieces"},
        {258, 4, 1, "\1", "byte pieces"},
        {260, 4, 1, "\3", "byte"},
        {263, 4, 1, "\3", "2 bytes"},
        {100, 6, 2, "\0\0", "empty"},
        {262, 6, 2, "\0\xFF", "longer"},
    };
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        Bytes file = small_file(true);
        size_t at = piece_at(&file, lies[i].id) + (size_t)lies[i].at;
        memcpy(file.data + at, lies[i].bytes, (size_t)lies[i].n);
        cr_assert(!parses(file.data, file.n, lies[i].reason), "piece %d, byte %d: accepted",
                  lies[i].id, lies[i].at);
        free(file.data);
    }
}

// Without byte pieces an unknown piece is needed; and the header must know of byte pieces.
Test(loader, tokenizer_as_a_whole) {
    Bytes file = small_file(false);
    file.data[piece_at(&file, 0) + 4] = CONTROL; // it was the only unknown one
    cr_assert(!parses(file.data, file.n, "unknown"));
    free(file.data);

    file = small_file(true);
    FileHeader *header = (void *)file.data;
    header->tokenizer_flags = 0;
    cr_assert(!parses(file.data, file.n, "byte pieces"));
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
        const size_t at = (size_t)(way * (double)(in_header ? sizeof(FileHeader) : end));
        copy.data[at] = (char)(int)(unit(3, 4 * k + c) * 256);
    }
    return copy;
}

// Thousands of files with one to four bytes of header and tokenizer changed at random: refused with
// a reason, or good enough to run.
Test(loader, random_corruption) {
    int n_refused = 0;
    int n_accepted = 0;
    for (int byte_pieces = 0; byte_pieces < 2; byte_pieces++) {
        Bytes good = small_file(byte_pieces);
        const size_t end = piece_at(&good, byte_pieces ? 264 : 8);
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

// Numbers that are no numbers among the weights do no harm beyond wrong logits.
Test(loader, weights_of_any_value) {
    Bytes file = small_file(false);
    const size_t embedding = (piece_at(&file, 8) + 63) / 64 * 64;
    memset(file.data + embedding, 0xFF, 1024); // NaN
    cr_assert(parses(file.data, file.n, ""));
    free(file.data);
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
    Bytes file = small_file(true);
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
