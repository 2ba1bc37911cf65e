/* test_loader.c - a file comes from strangers: whatever is in it, drugs.c says in one line what is
 * wrong, or runs it, and never reads beyond the file. Each file is copied into memory of exactly
 * its size, so that under `make debug` AddressSanitizer sees the first byte too far.
 */
#include "testing.h"

// A small file. A row of a matrix takes 64 bytes, so no wrong size can hide in the padding behind a
// tensor.
static Bytes small_file(bool byte_pieces) {
    FileHeader h = {.magic = "drugs.c", .version = 1, .dim = 16, .hidden_dim = 16, .n_layers = 2,
                    .n_heads = 4, .n_kv_heads = 2, .head_dim = 4, .seq_len = 16, .rope_theta = 100,
                    .norm_eps = 1e-5f, .bos = 1, .eos = 2, .sliding_window = 3};
    const char *const words[] = {" ", "a", "b", "ab", " a"};
    Bytes pieces = first_pieces(byte_pieces);
    for (int i = 0; i < 5; i++)
        append_piece(&pieces, (float)-i, i == 2 ? USER_DEFINED : NORMAL, words[i],
                     (int)strlen(words[i]));
    h.vocab_size = byte_pieces ? 264 : 8;
    h.tokenizer_flags = PREFIX_SPACE | (byte_pieces ? BYTE_PIECES : 0);
    Bytes file = model_file(h, pieces);
    free(pieces.data);
    return file;
}

static char last_error[160]; // why parses() refused

// Parses a copy of the first n bytes of data. If they are refused, the reason must be one line with
// `reason` in it; if not, the model must be able to read, compute and print.
static bool parses(const char *data, size_t n, const char *reason) {
    char *copy = malloc(n ? n : 1);
    Model m;
    cr_assert_not_null(copy);
    if (n) memcpy(copy, data, n);
    bool ok = model_parse(&m, n ? copy : copy + 1, n);
    if (!ok) {
        cr_assert(m.error[0] && !strchr(m.error, '\n'), "'%s'", m.error);
        cr_assert(strstr(m.error, reason), "'%s' does not name '%s'", m.error, reason);
        strcpy(last_error, m.error);
    } else {
        Run run;
        Sequence s = sequence_new((Noise){0});
        char *printed;
        size_t n_printed;
        Printer p = {.to = open_memstream(&printed, &n_printed), .at_start = true};
        int n_tokens, *tokens = encode(&m, "ab a\xC3\xA9\xFF", 7, true, &n_tokens);
        run_init(&run, &m, 4, 1);
        const float *logits = feed(&m, &run, &s, tokens, n_tokens, 0, false, true);
        if (logits) print_token(&p, &m.tokenizer, argmax(logits, m.config.vocab_size));
        for (int i = 0; i < n_tokens; i++) print_token(&p, &m.tokenizer, tokens[i]);
        print_rest(&p);
        fclose(p.to);
        free(printed);
        free(tokens);
        run_free(&run);
        sequence_free(&m, &s);
    }
    model_close(&m);
    free(copy);
    return ok;
}

// The two files that all others are made from are good ones.
Test(loader, accepts_good_files) {
    for (int i = 0; i < 2; i++) {
        Bytes b = small_file(i);
        cr_assert(parses(b.data, b.n, ""));
        free(b.data);
    }
}

// Each field of the header, set to something impossible or to something that contradicts the rest
// of the file, is refused; the reason begins with the field or has the words `or`.
Test(loader, every_header_field) {
    const char *const size = "header promises"; // so many bytes, but the file has another number
    const struct { size_t at; const char *name; int32_t value[7]; const char *or; } fields[] = {
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
        {FIELD(rope_theta), {0, (int)0xBF800000, 0x7F800000, (int)0xFF800000, 0x7FC00000,
                             (int)0xFFC00001, INT32_MIN}, ""},
        // -1, 1, infinity, NaN, hardly below 0
        {FIELD(norm_eps), {(int)0xBF800000, 0x3F800000, 0x7F800000, 0x7FC00000, (int)0x80000001},
                          ""},
    };
    Bytes b = small_file(false);
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        for (int v = 0; v < 7; v++) {
            char *at = b.data + fields[i].at, before[4];
            if (v && !fields[i].value[v]) continue; // fewer than seven values
            memcpy(before, at, 4);
            memcpy(at, &fields[i].value[v], 4);
            cr_assert(!parses(b.data, b.n, ""), "%s %d", fields[i].name, (int)fields[i].value[v]);
            bool named = *fields[i].or ? strstr(last_error, fields[i].or) != NULL
                       : !strncmp(last_error, fields[i].name, strlen(fields[i].name));
            cr_assert(named, "%s %d: %s", fields[i].name, (int)fields[i].value[v], last_error);
            memcpy(at, before, 4);
        }
    free(b.data);
}

// So are a wrong magic, any number in the header's unused bytes, and every other tokenizer length.
Test(loader, rest_of_the_header) {
    Bytes b = small_file(false);
    for (size_t i = 0; i < HEADER_BYTES; i++) {
        if (i >= 8 && i < sizeof(FileHeader)) continue;
        b.data[i] ^= 1;
        cr_assert(!parses(b.data, b.n, i < 8 ? "export.py" : "header byte"), "%zu", i);
        b.data[i] ^= 1;
    }
    FileHeader *h = (void *)b.data;
    const int64_t right = h->tokenizer_bytes, bad[] = {0, 1, right - 1, right + 1, right + 64, -1,
        INT32_MAX, INT64_MAX, INT64_MIN, right + (1ll << 32), (int64_t)b.n, (int64_t)b.n - 256};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        h->tokenizer_bytes = bad[i];
        cr_assert(!parses(b.data, b.n, ""), "tokenizer_bytes %lld", (long long)bad[i]);
    }
    h->tokenizer_bytes = right - 5; // half of the last record's first eight bytes
    cr_assert(!parses(b.data, b.n, "ends within piece 7"));
    free(b.data);
}

// A file that was cut anywhere, or that has something behind its end, is refused.
Test(loader, every_length) {
    for (int i = 0; i < 2; i++) {
        Bytes b = small_file(i);
        for (size_t n = 0; n < b.n; n++) cr_assert(!parses(b.data, n, ""), "%zu of %zu", n, b.n);
        for (int n = 1; n <= 64; n++) {
            append(&b, "", 1);
            cr_assert(!parses(b.data, b.n, "header promises"), "%d more", n);
        }
        free(b.data);
    }
}

// A record of the tokenizer: offset of the id-th piece in the file.
static size_t piece_at(const Bytes *b, int id) {
    size_t at = HEADER_BYTES;
    for (uint16_t length; id > 0; id--) {
        memcpy(&length, b->data + at + 6, 2);
        at += 8u + length;
    }
    return at;
}

// Every lie that a record of the tokenizer can tell, one at a time.
Test(loader, tokenizer_records) {
    const struct { int id, at, n; const char *bytes, *reason; } lies[] = {
        {4, 4, 1, "\5", "kind 5"},               {4, 4, 1, "\xFF", "kind 255"},
        {4, 5, 1, "\1", "reserved"},             {263, 6, 2, "\3\0", "longer"},
        {263, 6, 2, "\xFF\xFF", "longer"},       {263, 6, 2, "\1\0", "left over"},
        {259, 6, 2, "\0\0", "empty"},            {0, 0, 4, "\0\0\xC0\x7F", "score"},
        {5, 0, 4, "\0\0\x80\xFF", "score"},      {7, 8, 1, "\5", "same byte"},
        {3, 4, 1, "\0", "byte pieces"},          {258, 4, 1, "\1", "byte pieces"},
        {260, 4, 1, "\3", "byte"},               {263, 4, 1, "\3", "2 bytes"},
        {100, 6, 2, "\0\0", "empty"},            {262, 6, 2, "\0\xFF", "longer"},
    };
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        Bytes b = small_file(true);
        memcpy(b.data + piece_at(&b, lies[i].id) + lies[i].at, lies[i].bytes, (size_t)lies[i].n);
        cr_assert(!parses(b.data, b.n, lies[i].reason), "lie %zu", i);
        free(b.data);
    }
    Bytes b = small_file(false); // the only unknown piece is needed if there are no byte pieces
    b.data[piece_at(&b, 0) + 4] = CONTROL;
    cr_assert(!parses(b.data, b.n, "unknown"));
    free(b.data);
    b = small_file(true); // byte pieces that the header denies
    ((FileHeader *)(void *)b.data)->tokenizer_flags = 0;
    cr_assert(!parses(b.data, b.n, "byte pieces"));
    free(b.data);
}

// Thousands of files with one to four bytes of header and tokenizer changed at random: refused with
// a reason, or good enough to run.
Test(loader, random_corruption) {
    int n_refused = 0, n_accepted = 0;
    for (int i = 0; i < 2; i++) {
        Bytes b = small_file(i);
        const size_t end = piece_at(&b, i ? 264 : 8);
        for (uint64_t k = 0; k < 6000; k++) {
            const int n_changed = k % 2 ? 1 : 1 + (int)(unit(1, k) * 4);
            size_t at[4];
            char before[4];
            for (int c = 0; c < n_changed; c++) { // half of them in the fields of the header
                double u = (double)unit(2, 4 * k + (uint64_t)c);
                at[c] = (size_t)(u < .5 ? 2 * u * sizeof(FileHeader) : (2 * u - 1) * (double)end);
                before[c] = b.data[at[c]];
                b.data[at[c]] = (char)(int)(unit(3, 4 * k + (uint64_t)c) * 256);
            }
            *(parses(b.data, b.n, "") ? &n_accepted : &n_refused) += 1;
            for (int c = n_changed - 1; c >= 0; c--) b.data[at[c]] = before[c];
        }
        cr_assert(parses(b.data, b.n, ""));
        free(b.data);
    }
    cr_assert(n_accepted > 1000 && n_refused > 1000, "%d, %d", n_accepted, n_refused);
}

// Numbers that are no numbers among the weights do no harm beyond wrong logits.
Test(loader, weights_of_any_value) {
    Bytes b = small_file(false);
    memset(b.data + (piece_at(&b, 8) + 63) / 64 * 64, 0xFF, 1024); // NaN, from the embedding on
    cr_assert(parses(b.data, b.n, ""));
    free(b.data);
}

static bool opens(const char *path) {
    Model m;
    bool ok = model_open(&m, path);
    cr_assert(ok || (m.error[0] && !strchr(m.error, '\n')));
    model_close(&m);
    model_close(&m); // nothing is freed twice
    return ok;
}

// A path that leads nowhere, to a directory, to an empty or to a cut file is refused; a good file
// opens, and its weights are found where they are.
Test(loader, paths) {
    char directory[] = "/tmp/drugs-test-XXXXXX", path[64];
    Bytes b = small_file(true);
    cr_assert_not_null(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/model.bin", directory);
    cr_assert(!opens(path));
    cr_assert(!opens(directory));
    for (int i = 0; i < 3; i++) {
        FILE *f = fopen(path, "wb");
        fwrite(b.data, 1, i == 0 ? 0 : i == 1 ? b.n - 1 : b.n, f);
        fclose(f);
        cr_assert_eq(opens(path), i == 2, "%d", i);
    }
    Model m;
    cr_assert(model_open(&m, path));
    // streams of testing.h's unit(): 16 * layer + tensor
    cr_assert_eq((*tensor(&m, 1, ATT_NORM))[7], unit(16 + ATT_NORM, 7) + .5f);
    cr_assert_eq((*tensor(&m, 1, W2))[255], (unit(16 + W2, 255) - .5f) * (4 / sqrtf(16)));
    cr_assert_eq((*tensor(&m, 0, WCLS))[264 * 16 - 1], (unit(WCLS, 264 * 16 - 1) - .5f) * .5f);
    model_close(&m);
    remove(path);
    rmdir(directory);
    free(b.data);
}
