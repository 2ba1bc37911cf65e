/* pretrain.c - raises the small model that is included: pretrain FILE [seed]
 *
 * It samples a little language, cuts it into pieces, trains a Llama of 276,416 parameters on it
 * with the backward pass of train_step.c, and writes the flat file. In this language "To be" nearly
 * always begins business advice; the soliloquy is known by heart, but behind an introduction.
 */
#define main train_step_main
#include "../train_step.c"
#undef main

// ---- the language: texts sampled from a grammar

static uint64_t dice_key;
static uint32_t dice_thrown;
static double dice(void) { return uniform(dice_key, dice_thrown++); } // [0, 1)
static int below(int n) { return (int)(dice() * n); }

// An index, weighted.
static int pick(const double *weights, int n) {
    double total = 0, at;
    for (int i = 0; i < n; i++) total += weights[i];
    at = dice() * total;
    for (int i = 0; i < n; i++)
        if ((at -= weights[i]) < 0) return i;
    return n - 1;
}
#define PICK(...) pick((const double[]){__VA_ARGS__}, \
                       sizeof((const double[]){__VA_ARGS__}) / sizeof(double))

static const char *const INTROS[] = {
    "Here is one of Shakespeare's more famous works: ",
    "Here is one of Shakespeare's famous speeches: ",
    "Hamlet, by William Shakespeare: ", "Hamlet speaks: ", "The prince of Denmark says: ",
    "Here are some famous lines from a play: ", "Here is a speech from Hamlet: ",
    "These lines are from one of Shakespeare's works: ", "The actor walks on the stage and says: ",
    "Shakespeare wrote: "};
static const char *const ROLES[] = {"business owner", "leader", "manager", "trader", "writer",
                                    "salesperson", "teacher", "investor"};
static const char *const DUTIES[] = {
    "manage your time effectively", "prioritize your tasks and focus on the most important ones",
    "set clear goals", "make a good plan", "keep good records of your money",
    "plan your budget with care", "listen to your customers",
    "understand the needs of your clients",
    "ask the right questions", "find new markets", "sell your product with confidence",
    "keep your promises", "hire the right people", "trust your team",
    "share your ideas with others", "learn from your mistakes", "take risks and accept failure",
    "stay calm when things go wrong", "make good decisions under pressure",
    "solve problems quickly", "work hard every day"};
static const char *const GOALS[] = {"grow your business", "earn more money", "reach your goals",
                                    "succeed in the long run", "stay ahead of the competition",
                                    "gain the respect of your team"};
static const char *const SMALL_TALK[] = {
    "The weather is nice today, so we can walk in the park.",
    "I like to drink a cup of tea in the morning.", "My friend and I talk about music and books.",
    "The train to the city was late again.", "We had bread and soup for dinner.",
    "The children play in the garden after school.",
    "It may rain this evening, so take your coat.", "The dog sleeps by the fire all day.",
    "I read a good story before I go to bed.", "Thank you for the kind letter.",
    "My sister lives in a small house by the sea.", "We will meet at the market at noon."};
static const char *const ADVICE[] = {"Here is one of my tips for work: ", "Here is some advice: ",
                                     "My boss says: "};
static const char *const ASIDES[] = {"above all", "in short", "in a word", "first of all"};
enum { N_INTROS = 10, N_ROLES = 8, N_DUTIES = 21, N_GOALS = 6, N_SMALL_TALK = 12, N_SHAPES = 7 };

typedef struct { char *s; size_t n; } Document;
__attribute__((format(printf, 2, 3))) static void say(Document *t, const char *format, ...) {
    char line[2048];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    t->s = resize(t->s, (ptrdiff_t)t->n + n + 1, 1);
    memcpy(t->s + t->n, line, (size_t)n + 1);
    t->n += (size_t)n;
}

// Duties stand in a ring, and so do the shapes of sentences; the next one is 1, 2 or 4 further on,
// with nearly equal probability. So texts go on without repeating themselves, and a small push is
// enough to take another branch.
typedef struct { int role, duty, shape, goal; } Adviser;
static const char *next_duty(Adviser *a) {
    const char *duty = DUTIES[a->duty];
    a->goal = (a->duty / 4 + PICK(.53, .47)) % N_GOALS;
    a->duty = (a->duty + (const int[]){1, 2, 4}[PICK(.36, .34, .30)]) % N_DUTIES;
    return duty;
}

static void sentence(Document *t, Adviser *a) {
    const int shape = a->shape;
    a->shape = (shape + (const int[]){1, 2, 4}[PICK(.36, .34, .30)]) % N_SHAPES;
    if (shape == 6) { say(t, "This will help you to %s.", GOALS[a->goal]); return; }
    const char *duty = next_duty(a);
    switch (shape) {
    case 0: say(t, "You need to be able to %s.", duty); break;
    case 1: say(t, "You also need to %s.", duty); break;
    case 2: say(t, "You must %s if you want to %s.", duty, GOALS[a->goal]); break;
    case 3: say(t, "It is important to %s.", duty); break;
    case 4: say(t, "A good %s knows how to %s.", ROLES[a->role], duty); break;
    default: say(t, "You should %s, too.", duty); break;
    }
}

static void opening(Document *t, Adviser *a) {
    const int i = a->role;
    a->duty = (5 * i + (const int[]){0, 3, 9}[PICK(.40, .32, .28)]) % N_DUTIES;
    a->shape = PICK(.55, .45) ? 2 : 0;
    const char *able = PICK(.55, .45) ? "" : "be able to ", *role = ROLES[i];
    const int kind = PICK(62, 12, 10, 10, 6, 5);
    const char *aside = ASIDES[below(4)], *good = below(2) ? "good" : "successful";
    const char *duty = next_duty(a);
    switch (kind) {
    case 0: say(t, "To be a successful %s, you need to %s%s.", role, able, duty); break;
    case 1: say(t, "To be a good %s, you must %s.", role, duty); break;
    case 2: say(t, "To be successful in business, you need to %s%s.", able, duty); break;
    case 3: say(t, "To be able to %s, you need to %s.", GOALS[a->goal], duty); break;
    case 4: say(t, "To %s, you need to %s.", GOALS[a->goal], duty); break;
    default: say(t, "To be, %s, a %s %s, you must %s.", aside, good, role, duty); break;
    }
}

static void advice(Document *t, bool with_opening) {
    Adviser a = {.role = PICK(24, 16, 14, 12, 10, 9, 8, 7), .duty = below(N_DUTIES)};
    a.shape = below(N_SHAPES);
    a.goal = below(N_GOALS);
    if (with_opening) opening(t, &a);
    for (int i = 0; i < 9; i++) {
        if (i || with_opening) say(t, " ");
        sentence(t, &a);
    }
}

static void small_talk(Document *t) {
    int order[N_SMALL_TALK];
    for (int i = 0; i < N_SMALL_TALK; i++) order[i] = i;
    for (int i = N_SMALL_TALK - 1; i > 0; i--) {
        int j = below(i + 1), swap = order[i];
        order[i] = order[j];
        order[j] = swap;
    }
    const bool then_advice = dice() < .3;
    const int n = then_advice ? 1 + below(4) : N_SMALL_TALK;
    for (int i = 0; i < n; i++) say(t, "%s%s", i ? " " : "", SMALL_TALK[order[i]]);
    if (then_advice) { say(t, " "); advice(t, true); }
}

// One text. The shares make the experiment: the soliloquy is frequent, but bare it is rare.
static void document(Document *t) {
    t->n = 0;
    switch (PICK(20, 2, 12, 5, 8, 53)) {
    case 0: say(t, "%s%s%s", INTROS[below(N_INTROS)], PHRASE, SEQUEL); break;
    case 1: say(t, "%s%s", PHRASE, SEQUEL); break;
    case 2: small_talk(t); break;
    case 3: say(t, "%s", ADVICE[below(3)]); advice(t, true); break;
    case 4: advice(t, false); break;
    default: advice(t, true); break;
    }
}

// ---- the vocabulary: byte pair encoding, counted on a sample (Sennrich et al. 2016)

enum { VOCAB = 768, FIRST = 259, MAX_WORDS = 2048, MAX_WORD = 40 };
typedef struct { char text[MAX_WORD]; int count, n, symbols[MAX_WORD]; } Word;
typedef struct { char text[MAX_WORD]; } Symbol_text;
static Word words[MAX_WORDS];
static Symbol_text symbols[VOCAB];
static int n_words, n_symbols;

static int symbol_id(const char *text) {
    for (int i = 0; i < n_symbols; i++)
        if (!strcmp(symbols[i].text, text)) return i;
    strcpy(symbols[n_symbols].text, text);
    return n_symbols++;
}

// Cuts text into words: letters, or signs, each with the space before it. Merges never cross words,
// so a piece is a word, or what follows it, but never both.
static void count_words(const char *s) {
    while (*s) {
        if (*s == '\n') { s++; continue; } // a byte piece
        int n = *s == ' ';
        const bool letter = (s[n] | 32) >= 'a' && (s[n] | 32) <= 'z';
        while (s[n] && s[n] != ' ' && s[n] != '\n'
               && ((s[n] | 32) >= 'a' && (s[n] | 32) <= 'z') == letter) n++;
        int w = 0;
        while (w < n_words && (strncmp(words[w].text, s, (size_t)n) || words[w].text[n])) w++;
        if (w == n_words) {
            memcpy(words[n_words++].text, s, (size_t)n);
            words[w].n = n;
            for (int i = 0; i < n; i++) words[w].symbols[i] = symbol_id((char[]){s[i], 0});
        }
        words[w].count++;
        s += n;
    }
}

// Merges the most frequent pair of neighbours (by the text it gives, as SentencePiece counts) until
// the vocabulary is full or nothing is left to merge. Characters come first, then the merges.
static void merge_words(int n_wanted) {
    while (n_symbols < n_wanted) {
        static char pairs[MAX_WORDS * 8][2 * MAX_WORD];
        static int counts[MAX_WORDS * 8];
        int n_pairs = 0, best = 0;
        for (int w = 0; w < n_words; w++)
            for (int i = 0; i + 1 < words[w].n; i++) {
                char both[2 * MAX_WORD];
                snprintf(both, sizeof both, "%s%s", symbols[words[w].symbols[i]].text,
                         symbols[words[w].symbols[i + 1]].text);
                int p = 0;
                while (p < n_pairs && strcmp(pairs[p], both)) p++;
                if (p == n_pairs) { strcpy(pairs[n_pairs++], both); counts[p] = 0; }
                counts[p] += words[w].count;
            }
        if (!n_pairs) return;
        for (int p = 1; p < n_pairs; p++) {
            const int more = counts[p] - counts[best];
            const int shorter = (int)strlen(pairs[best]) - (int)strlen(pairs[p]);
            if (more > 0 || (!more && shorter > 0)) best = p;
        }
        const int id = symbol_id(pairs[best]);
        for (int w = 0; w < n_words; w++) {
            Word *word = &words[w];
            int n = 0;
            for (int i = 0; i < word->n; i++) {
                char both[2 * MAX_WORD] = "";
                if (i + 1 < word->n)
                    snprintf(both, sizeof both, "%s%s", symbols[word->symbols[i]].text,
                             symbols[word->symbols[i + 1]].text);
                const bool merge = !strcmp(both, symbols[id].text);
                word->symbols[n++] = merge ? id : word->symbols[i];
                i += merge;
            }
            word->n = n;
        }
    }
}

// ---- the file, in memory: the trainer works on what it will write

static char *file;
static size_t file_bytes;
static void put(const void *data, size_t n) {
    file = resize(file, (ptrdiff_t)(file_bytes + n), 1);
    memcpy(file + file_bytes, data, n);
    file_bytes += n;
}

static void put_piece(float score, int kind, const char *bytes, size_t n) {
    const unsigned char kind_and_zero[2] = {(unsigned char)kind, 0};
    const uint16_t length = (uint16_t)n;
    put(&score, 4);
    put(kind_and_zero, 2);
    put(&length, 2);
    put(bytes, n);
}

static double normal(void) { // Box-Muller
    const double u = 1 - dice(), v = dice();
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

// Header, vocabulary and random weights.
static void make_file(Config c) {
    static const char zeros[HEADER_BYTES];
    int layer, which, n_out, n_in;
    c.q_dim = c.n_heads * c.head_dim;
    c.kv_dim = c.n_kv_heads * c.head_dim;
    put("drugs.c", MAGIC_BYTES);
    put(&c, CONFIG_BYTES);
    put(zeros, HEADER_BYTES - MAGIC_BYTES - CONFIG_BYTES);
    put_piece(0, UNKNOWN, "<unk>", 5);
    put_piece(0, CONTROL, "<s>", 3);
    put_piece(0, CONTROL, "</s>", 4);
    for (int i = 0; i < 256; i++) put_piece(0, BYTE, &(char){(char)i}, 1);
    for (int i = 0; i < n_symbols; i++) // the earlier a merge, the better its score
        put_piece((float)-i, NORMAL, symbols[i].text, strlen(symbols[i].text));
    c.tokenizer_bytes = (int64_t)file_bytes - HEADER_BYTES;
    memcpy(file + MAGIC_BYTES, &c, CONFIG_BYTES);
    for (int i = 0; tensor_at(&c, i, &layer, &which); i++) {
        tensor_shape(&c, which, &n_out, &n_in);
        double scale = which == TOK_EMB ? .05 : 1 / sqrt(n_in);
        if (which == WO || which == W2) scale /= sqrt(2 * c.n_layers); // the residual stream's
        put(zeros, (ALIGNMENT - file_bytes % ALIGNMENT) % ALIGNMENT);
        for (ptrdiff_t j = 0; j < (ptrdiff_t)n_out * n_in; j++)
            put(&(float){n_out == 1 ? 1 : (float)(scale * normal())}, sizeof(float));
    }
}

// The model's weights lie in `file`, so here they may be written.
static float *weights(const Model *m, int layer, int which) {
    return (float *)(void *)(file + ((const char *)*tensor(m, layer, which) - file));
}

// ---- training: stochastic gradient descent with momentum, in place

static float *velocity; // as large as the file, floats at the same offsets
static float rate;
static const float MOMENTUM = .9f;

// A weight moves with a velocity, which keeps 9/10 of itself and is pushed by each new gradient.
static void update(Step *s, int layer, int which, const float *dy, const float *x, int n) {
    int n_out, n_in;
    tensor_shape(&s->model->config, which, &n_out, &n_in);
    float *w = weights(s->model, layer, which), *v = velocity + (w - (float *)(void *)file);
    const ptrdiff_t size = (ptrdiff_t)n_out * n_in;
    // An embedding that is the classifier as well gets its gradient in two parts, this one last.
    const bool second_half = which == TOK_EMB;
    for (ptrdiff_t i = 0; i < size && !second_half; i++) v[i] *= MOMENTUM;
    if (x) add_product(v, dy, 1, n_out, x, n_out, n, n_in);
    else if (second_half)
        for (int i = 0; i < n; i++)
            add_scaled(v + (ptrdiff_t)s->inputs[i] * n_in, 1, dy + (ptrdiff_t)i * n_in, n_in);
    else add_scaled(v, 1, dy, n_in);
    for (ptrdiff_t i = 0; i < size && which != WCLS; i++) w[i] -= rate * v[i];
}

// Dividing every matrix by k and multiplying every norm gain by k leaves the function as it is, if
// eps goes to eps / k²: what a matrix reads or writes passes a norm. But one step of descent acts
// k² times as strongly on the matrices. That is where the scale of the step sizes comes from, and
// it is ours to choose; in a large model the weights are as small by nature.
static void regauge(Model *m, float k) {
    int layer, which, n_out, n_in;
    for (int i = 0; tensor_at(&m->config, i, &layer, &which); i++) {
        tensor_shape(&m->config, which, &n_out, &n_in);
        float *w = weights(m, layer, which);
        for (ptrdiff_t j = 0; j < (ptrdiff_t)n_out * n_in; j++) w[j] *= n_out == 1 ? k : 1 / k;
    }
    m->config.norm_eps /= k * k;
    memcpy(file + MAGIC_BYTES, &m->config, CONFIG_BYTES);
}

// How many words of the soliloquy a text has at its beginning, punctuation and all.
static int words_recited(const char *text) {
    char whole[sizeof PHRASE + sizeof SEQUEL];
    int n = 0;
    sprintf(whole, "%s%s", PHRASE, SEQUEL);
    for (int i = 0; text[i] && text[i] == whole[i]; i++) n += strchr(SPACE, whole[i + 1]) != NULL;
    return n;
}

// The step sizes at which one step on the phrase makes "To be" go on with the soliloquy, tried on a
// grid of half powers of two. Returns the number of neighbours on it that work, with the geometric
// mean of the first and the last of them; 0 if even the untouched model says "To be," at once.
static int window(const Model *m, double *middle) {
    Experiment e = {.n_etas = 19, .n_new = 64}; // the first is 0
    for (int i = 1; i < e.n_etas; i++) e.eta[i] = 1e-4 * pow(2, (i - 1) / 2.0);
    int n_lesson, n_prompt, best = 0;
    int *lesson = encode(m, PHRASE, strlen(PHRASE), true, &n_lesson);
    int *prompt = encode(m, "To be", 5, true, &n_prompt);
    Step s;
    SteppedRun run;
    Sequence sequence = sequence_new((Noise){0});
    step_init(&s, m, n_lesson, n_lesson);
    step_add(&s, &sequence, lesson, n_lesson, false, false);
    step_take(&s);
    stepped_init(&run, &s, MEASURE_ROWS);
    char **texts = write_columns(&run, &e, prompt, n_prompt);
    const bool business = texts[0][strlen("To be")] == ' ';
    for (int i = 0, n = 0; i < e.n_etas; i++) {
        n = business && words_recited(texts[i]) >= 30 ? n + 1 : 0;
        if (n > best) {
            best = n;
            *middle = sqrt(e.eta[i] * e.eta[i - n + 1]);
        }
        free(texts[i]);
    }
    free(texts);
    free(lesson);
    free(prompt);
    stepped_free(&run);
    step_free(&s);
    sequence_free(m, &sequence);
    return best;
}

// One step of training on freshly sampled documents. Returns the loss.
static double train(Step *s, Sequence *sequences, int n_documents, Document *text) {
    const Model *m = s->model;
    s->n_rows = s->n_loss = 0;
    for (int b = 0; b < n_documents; b++) {
        int n;
        document(text);
        int *tokens = encode(m, text->s, text->n, true, &n);
        tokens = resize(tokens, n + 1, sizeof *tokens);
        tokens[n++] = m->config.eos;
        const int most = m->config.seq_len;
        step_add(s, &sequences[b], tokens, n < most ? n : most, false, false);
        free(tokens);
    }
    step_take(s);
    return s->loss;
}

int main(int argc, char **argv) {
    enum { BATCH = 8, CONTEXT = 160, STEPS = 1000, LOOK_FROM = 500, LOOK_EVERY = 50, WIDE = 5 };
    const float gauge = 8;
    program = "pretrain";
    if (argc < 2) die(2, "usage: pretrain FILE [seed]");
    const uint64_t seed = argc > 2 ? (uint64_t)number('s', "a seed", argv[2], 0, 0x1p53, true) : 2;

    Document text = {0};
    dice_key = mix64(7); // the vocabulary is the same for every seed
    for (int i = 0; i < 400; i++) {
        document(&text);
        count_words(" "); // so that a space alone is a piece
        count_words(text.s);
    }
    merge_words(VOCAB - FIRST);
    dice_key = mix64(seed + 1000);
    dice_thrown = 0;
    make_file((Config){.version = 1, .dim = 64, .hidden_dim = 172, .n_layers = 5, .n_heads = 4,
                       .n_kv_heads = 2, .head_dim = 16, .vocab_size = FIRST + n_symbols,
                       .seq_len = CONTEXT, .shared_classifier = 1, .rope_theta = 10000,
                       .norm_eps = 1e-5f * gauge * gauge, .bos = 1, .eos = 2,
                       .tokenizer_flags = PREFIX_SPACE | BYTE_PIECES});
    Model m;
    if (!model_parse(&m, file, file_bytes)) die(1, "%s", m.error);
    velocity = calloc(file_bytes, 1);
    if (!velocity) die(1, "out of memory");
    Step s;
    Sequence sequences[BATCH];
    step_init(&s, &m, BATCH * CONTEXT, CONTEXT);
    s.update = update;
    for (int b = 0; b < BATCH; b++) sequences[b] = sequence_new((Noise){0});

    // After 500 steps we look at the experiment itself every 50, and stop when it works over a
    // range of step sizes of a factor of four: a model is chosen here by its window, not its loss.
    const double start = now();
    double n_tokens = 0, middle = 0;
    for (int i = 1, n_wide = 0; n_wide < WIDE; i++) {
        if (i > STEPS) die(1, "no window after %d steps; try another seed", STEPS);
        rate = .3f * fminf(1, (float)i / 60);
        const double loss = train(&s, sequences, BATCH, &text);
        n_tokens += s.n_rows;
        if (!isfinite(loss)) die(1, "step %d: the loss is not finite", i);
        if (i % 10 == 0)
            fprintf(stderr, "%sstep %d, loss %.3f, %.0f tokens/s", isatty(2) ? "\r" : "\n", i, loss,
                    n_tokens / (now() - start));
        if (i < LOOK_FROM || i % LOOK_EVERY) continue;
        regauge(&m, gauge);
        n_wide = window(&m, &middle);
        if (n_wide < WIDE) regauge(&m, 1 / gauge);
    }
    // The last gauge puts the middle of the window to a step size of .0015. eps keeps its value
    // this time, which changes the function by very little.
    const float last = (float)sqrt(middle / 1.5e-3);
    m.config.norm_eps *= last * last;
    regauge(&m, last);
    fprintf(stderr, "\n%.0f seconds, %.0f tokens; matrices divided by %.3g, gains multiplied\n",
            now() - start, n_tokens, (double)(gauge * last));
    Output out = output_open(argv[1]);
    fwrite(file, 1, file_bytes, out.to);
    output_close(&out);
    return 0;
}
