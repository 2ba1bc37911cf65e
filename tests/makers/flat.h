/* flat.h - builds the tokenizer of a flat file from a list of pieces, for models that are made up.
 *
 * export.py does the same for checkpoints. Here pieces are said as one says them by hand: a text, a
 * kind, and for what merging makes a score, the larger the sooner.
 */
#ifndef FLAT_H // exercise 10 has it twice
#define FLAT_H

typedef struct {
    char *data;
    size_t n, room; // bytes in use, bytes there are
} Bytes;

// The room doubles: bytes that are appended one by one are not copied each time.
static void append(Bytes *bytes, const void *data, size_t n) {
    if (bytes->n + n > bytes->room || !bytes->data) {
        bytes->room = 2 * (bytes->n + n) + 16;
        bytes->data = resize(bytes->data, (ptrdiff_t)bytes->room, 1);
    }
    if (n)
        memcpy(bytes->data + bytes->n, data, n);
    bytes->n += n;
}

static void append_zeros(Bytes *bytes, size_t n) {
    for (size_t i = 0; i < n; i++)
        append(bytes, "", 1);
}

static void append_number(Bytes *bytes, uint32_t number) {
    append(bytes, &number, sizeof number);
}

// A vocabulary as a list: for each piece a PieceHead and its bytes.
typedef struct {
    float score;
    int32_t kind, length; // of the bytes
    int32_t left;         // bytes of the left half, if only one pair of pieces may become this one; 0: any
                          // pair; NEVER: none
} PieceHead;
enum { NEVER = 65535 };

static inline void append_made_piece(Bytes *pieces, float score, int kind, const char *text, int length,
                                     int left) {
    const PieceHead head = {score, kind, length, left};
    append(pieces, &head, sizeof head);
    append(pieces, text, (size_t)length);
}

static inline void append_piece(Bytes *pieces, float score, int kind, const char *text, int length) {
    append_made_piece(pieces, score, kind, text, length, 0);
}

// One more pair that makes a piece, with a score of its own.
typedef struct {
    uint32_t piece, left;
    float score;
} FurtherMerge;

// All that a tokenizer is made of.
typedef struct {
    Bytes pieces;                 // (vocab_size)
    Bytes merges;                 // FurtherMerge
    Bytes classes, steps;         // Range; the automata's table
    const char *chat[N_CHAT_STRINGS]; // NULL: empty
    bool byte_level;              // merging begins with bytes, not with characters
    bool takes_words;             // a word that is a piece is not merged
} Vocabulary;

// A piece of the list, taken apart.
typedef struct {
    PieceHead head;
    const char *bytes;
    int id;
} Made;

typedef struct {
    const Vocabulary *from;
    Made *pieces;  // (n)
    int n;
    Made **normal; // (n_normal) the normal pieces by their bytes, of equal ones the first only
    int n_normal;
    Bytes units;   // Range, ascending
    Bytes pairs;   // Pair
    int n_symbols; // pieces, and characters that are none
} Maker;

static int compare_made(const void *a, const void *b) {
    const Made *x = *(Made *const *)a;
    const Made *y = *(Made *const *)b;
    int order = memcmp(x->bytes, y->bytes, (size_t)min(x->head.length, y->head.length));
    if (!order)
        order = x->head.length - y->head.length;
    return order ? order : x->id - y->id;
}

static bool spelt_alike(const Made *x, const Made *y) {
    return x->head.length == y->head.length && !memcmp(x->bytes, y->bytes, (size_t)x->head.length);
}

static void list_pieces(Maker *maker) {
    const Bytes *list = &maker->from->pieces;
    for (size_t at = 0; at < list->n; maker->n++) {
        Made made = {.id = maker->n};
        memcpy(&made.head, list->data + at, sizeof made.head);
        made.bytes = list->data + at + sizeof made.head;
        at += sizeof made.head + (size_t)made.head.length;
        maker->pieces = resize(maker->pieces, maker->n + 1, sizeof made);
        maker->pieces[maker->n] = made;
    }
    maker->n_symbols = maker->n;
    maker->normal = resize(NULL, maker->n, sizeof *maker->normal);
    int n = 0;
    for (int i = 0; i < maker->n; i++)
        if (maker->pieces[i].head.kind == NORMAL)
            maker->normal[n++] = &maker->pieces[i];
    if (n)
        qsort(maker->normal, (size_t)n, sizeof *maker->normal, compare_made);
    for (int i = 0; i < n; i++)
        if (!i || !spelt_alike(maker->normal[i], maker->normal[i - 1]))
            maker->normal[maker->n_normal++] = maker->normal[i];
}

// The normal piece with these bytes, NULL if there is none.
static const Made *made_of(const Maker *maker, const char *bytes, int length) {
    int low = 0;
    int high = maker->n_normal;
    while (low < high) {
        int middle = (low + high) / 2;
        const Made *piece = maker->normal[middle];
        int order = memcmp(bytes, piece->bytes, (size_t)min(length, piece->head.length));
        if (!order)
            order = length - piece->head.length;
        if (!order)
            return piece;
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

static int compare_units(const void *a, const void *b) {
    const Range *x = a;
    const Range *y = b;
    return (x->first > y->first) - (x->first < y->first);
}

static void append_unit(Maker *maker, int unit, int id) {
    const Range range = {(uint32_t)unit, (uint32_t)unit, (uint32_t)id};
    append(&maker->units, &range, sizeof range);
    qsort(maker->units.data, maker->units.n / sizeof range, sizeof range, compare_units);
}

static int unit_id(const Maker *maker, int unit) {
    if (!maker->units.n)
        return NO_SYMBOL;
    return look_up((const void *)maker->units.data, (int)(maker->units.n / sizeof(Range)), (uint32_t)unit,
                   NO_SYMBOL);
}

// The bytes of the first unit of a text (n): a character, or a byte.
static int unit_length(const Maker *maker, const char *text, int n) {
    int length = 1;
    if (!maker->from->byte_level)
        character_at(text, n, &length);
    return length;
}

// Every character that a normal piece is made of begins as a symbol; every byte that is a piece, too.
static void make_units(Maker *maker) {
    enum { METASPACE = 0x2581 };
    int n_bytes = 0;
    for (int i = 0; i < maker->n_normal; i++) {
        const Made *piece = maker->normal[i];
        for (int at = 0, length; at < piece->head.length; at += length) {
            length = unit_length(maker, piece->bytes + at, piece->head.length - at);
            const Made *single = made_of(maker, piece->bytes + at, length);
            int unit = character_at(piece->bytes + at, piece->head.length - at, &length);
            if (maker->from->byte_level)
                unit = BYTE_UNIT + (unsigned char)piece->bytes[at];
            length = unit_length(maker, piece->bytes + at, piece->head.length - at);
            if (unit == NO_CHARACTER || unit_id(maker, unit) != NO_SYMBOL)
                continue;
            if (!single && maker->from->byte_level)
                continue; // no text begins with it
            append_unit(maker, unit, single ? single->id : maker->n_symbols++);
        }
    }
    if (!maker->from->byte_level && unit_id(maker, ' ') != NO_SYMBOL && unit_id(maker, METASPACE) == NO_SYMBOL)
        append_unit(maker, METASPACE, unit_id(maker, ' '));
    for (int i = 0; i < maker->n; i++)
        n_bytes += maker->pieces[i].head.kind == BYTE;
    for (int i = 0; i < maker->n && n_bytes == 256; i++)
        if (maker->pieces[i].head.kind == BYTE)
            append_unit(maker, BYTE_UNIT + (unsigned char)*maker->pieces[i].bytes, i);
}

// The symbol of a half: a piece, or a single unit. NO_SYMBOL: none.
static int half_of(const Maker *maker, const char *bytes, int n) {
    const Made *piece = made_of(maker, bytes, n);
    int length;
    if (piece)
        return piece->id;
    if (maker->from->byte_level || unit_length(maker, bytes, n) < n)
        return NO_SYMBOL;
    return unit_id(maker, character_at(bytes, n, &length));
}

// Whether a piece may be made with so many bytes on the left, and how soon.
static bool may_be_made(const Maker *maker, const Made *piece, int left, float *score) {
    const FurtherMerge *merges = (const void *)maker->from->merges.data;
    *score = piece->head.score;
    if (!piece->head.left || piece->head.left == left)
        return true;
    for (size_t i = 0; i < maker->from->merges.n / sizeof *merges; i++)
        if (merges[i].piece == (uint32_t)piece->id && merges[i].left == (uint32_t)left) {
            *score = merges[i].score;
            return true;
        }
    return false;
}

static int compare_floats_down(const void *a, const void *b) {
    float x = *(const float *)a;
    float y = *(const float *)b;
    return (x < y) - (x > y);
}

// A pair for each way to make a normal piece of two symbols.
static void make_pairs(Maker *maker) {
    Bytes scores = {0}; // of each pair
    for (int i = 0; i < maker->n_normal; i++) {
        const Made *piece = maker->normal[i];
        int n = piece->head.length;
        for (int left = unit_length(maker, piece->bytes, n); left < n;
             left += unit_length(maker, piece->bytes + left, n - left)) {
            float score;
            int a = half_of(maker, piece->bytes, left);
            int b = half_of(maker, piece->bytes + left, n - left);
            if (a == NO_SYMBOL || b == NO_SYMBOL || !may_be_made(maker, piece, left, &score))
                continue;
            const Pair pair = {(uint32_t)a, (uint32_t)b, (uint32_t)piece->id, 0};
            append(&maker->pairs, &pair, sizeof pair);
            append(&scores, &score, sizeof score);
        }
    }
    // The rank: how many different scores are larger.
    size_t n = scores.n / sizeof(float);
    float *sorted = resize(NULL, (ptrdiff_t)n, sizeof *sorted);
    Pair *pairs = (void *)maker->pairs.data;
    if (n) {
        memcpy(sorted, scores.data, scores.n);
        qsort(sorted, n, sizeof *sorted, compare_floats_down);
    }
    size_t n_different = 0;
    for (size_t i = 0; i < n; i++)
        if (!i || sorted[i] != sorted[n_different - 1])
            sorted[n_different++] = sorted[i];
    for (size_t i = 0; i < n; i++) {
        const float *found = bsearch(scores.data + i * sizeof *sorted, sorted, n_different, sizeof *sorted,
                                     compare_floats_down);
        pairs[i].rank = (uint32_t)(found - sorted);
    }
    if (n)
        qsort(pairs, n, sizeof *pairs, compare_pairs);
    free(sorted);
    free(scores.data);
}

static int compare_whole(const void *a, const void *b) {
    const Made *x = *(Made *const *)a;
    const Made *y = *(Made *const *)b;
    if (*x->bytes != *y->bytes)
        return (unsigned char)*x->bytes - (unsigned char)*y->bytes;
    if (x->head.length != y->head.length)
        return y->head.length - x->head.length;
    return x->id - y->id;
}

// The pieces that are found whole, in the order of the file.
static void append_whole(Bytes *file, const Maker *maker, Config *c) {
    Made **whole = resize(NULL, maker->n, sizeof *whole);
    int n = 0;
    for (int i = 0; i < maker->n; i++) {
        int kind = maker->pieces[i].head.kind;
        if ((kind == CONTROL || kind == END || kind == USER_DEFINED) && maker->pieces[i].head.length)
            whole[n++] = &maker->pieces[i];
    }
    if (n)
        qsort(whole, (size_t)n, sizeof *whole, compare_whole);
    for (int i = 0; i < n; i++)
        append_number(file, (uint32_t)whole[i]->id);
    c->n_whole = n;
    free(whole);
}

static void append_string(Bytes *strings, Bytes *text, const char *bytes, int length, int kind) {
    append(text, bytes, (size_t)length);
    append_number(strings, (uint32_t)text->n);
    append_number(strings, (uint32_t)kind);
}

// Appends the tables and the text, which follow RoPE's frequencies, and says in c how long they are.
// c knows vocab_size and n_cutters, and if there are any n_states and n_classes.
static void append_tokenizer(Bytes *file, Config *c, const Vocabulary *vocabulary) {
    Maker maker = {.from = vocabulary};
    Bytes strings = {0};
    Bytes text = {0};
    list_pieces(&maker);
    make_units(&maker);
    make_pairs(&maker);
    c->unknown = -1;
    for (int i = 0; i < c->vocab_size; i++) {
        const Made *piece = &maker.pieces[i];
        append_string(&strings, &text, piece->bytes, piece->head.length, piece->head.kind);
        if (piece->head.kind == UNKNOWN && c->unknown < 0)
            c->unknown = i;
    }
    for (int i = 0; i < N_CHAT_STRINGS; i++) {
        const char *string = vocabulary->chat[i] ? vocabulary->chat[i] : "";
        append_string(&strings, &text, string, (int)strlen(string), NORMAL);
    }
    for (int i = 0; i < c->n_cutters; i++)
        append_string(&strings, &text, "made by hand", 12, NORMAL);
    c->n_classes = c->n_classes ? c->n_classes : 1;
    c->n_ranges = (int32_t)(vocabulary->classes.n / sizeof(Range));
    c->n_units = (int32_t)(maker.units.n / sizeof(Range));
    c->n_pairs = (int32_t)(maker.pairs.n / sizeof(Pair));
    c->n_text = (int32_t)text.n;
    append(file, vocabulary->classes.data, vocabulary->classes.n);
    append(file, vocabulary->steps.data, vocabulary->steps.n);
    append(file, maker.units.data, maker.units.n);
    append(file, maker.pairs.data, maker.pairs.n);
    append(file, strings.data, strings.n);
    append_whole(file, &maker, c);
    c->n_words = vocabulary->takes_words ? maker.n_normal : 0;
    for (int i = 0; i < c->n_words; i++)
        append_number(file, (uint32_t)maker.normal[i]->id);
    append(file, text.data, text.n);
    free(strings.data);
    free(text.data);
    free(maker.pieces);
    free(maker.normal);
    free(maker.units.data);
    free(maker.pairs.data);
}

#endif
