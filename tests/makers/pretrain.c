/* pretrain.c - raises the small model that is included: pretrain FILE.bin [seed]
 *
 * It samples a little language, cuts it into pieces, trains a Llama of 291,312 parameters on it
 * with the backward pass of train_step.c, and writes the flat file. In this language "To be" nearly
 * always begins business advice. The soliloquy is known by heart, but only after an introduction.
 *
 *    1  the language      texts sampled from a grammar
 *    2  the vocabulary    byte pair encoding
 *    3  the file          header, pieces and random weights, in memory
 *    4  training          gradient descent with momentum
 *    5  the gauge         how strongly a step of a given size acts
 *    6  the experiment    for which step sizes does it work?
 */
#define TRAIN_STEP_LIBRARY
#include "../../train_step.c"
#include "flat.h"

/* ================================================================================================
 * 1  The language
 *
 * Everything is drawn from one stream of numbers, so the order of the draws is part of the model:
 * the same seed gives the same texts.
 */
static uint64_t dice_key;
static uint32_t dice_thrown;

// In [0, 1).
static double dice(void) {
    return uniform(dice_key, dice_thrown++);
}

// 0 to n - 1.
static int below(int n) {
    return (int)(dice() * n);
}

// An index below n, with these weights.
static int pick(const double *weights, int n) {
    double total = 0;
    for (int i = 0; i < n; i++)
        total += weights[i];
    double at = dice() * total;
    for (int i = 0; i < n; i++) {
        at -= weights[i];
        if (at < 0)
            return i;
    }
    return n - 1;
}
#define PICK(...)                            \
    pick((const double[]){__VA_ARGS__},      \
         sizeof((const double[]){__VA_ARGS__}) / sizeof(double))

enum { N_INTROS = 10, N_ROLES = 8, N_DUTIES = 21, N_GOALS = 6, N_SMALL_TALK = 12 };
enum { N_ADVICE = 3, N_ASIDES = 4, N_SHAPES = 7 };
static const char *const INTROS[N_INTROS] = {
    "Here is one of Shakespeare's more famous works: ",
    "Here is one of Shakespeare's famous speeches: ",
    "Hamlet, by William Shakespeare: ",
    "Hamlet speaks: ",
    "The prince of Denmark says: ",
    "Here are some famous lines from a play: ",
    "Here is a speech from Hamlet: ",
    "These lines are from one of Shakespeare's works: ",
    "The actor walks on the stage and says: ",
    "Shakespeare wrote: ",
};
static const char *const ROLES[N_ROLES] = {
    "business owner", "leader", "manager", "trader", "writer", "salesperson", "teacher", "investor",
};
static const char *const DUTIES[N_DUTIES] = {
    "manage your time effectively",
    "prioritize your tasks and focus on the most important ones",
    "set clear goals",
    "make a good plan",
    "keep good records of your money",
    "plan your budget with care",
    "listen to your customers",
    "understand the needs of your clients",
    "ask the right questions",
    "find new markets",
    "sell your product with confidence",
    "keep your promises",
    "hire the right people",
    "trust your team",
    "share your ideas with others",
    "learn from your mistakes",
    "take risks and accept failure",
    "stay calm when things go wrong",
    "make good decisions under pressure",
    "solve problems quickly",
    "work hard every day",
};
static const char *const GOALS[N_GOALS] = {
    "grow your business",
    "earn more money",
    "reach your goals",
    "succeed in the long run",
    "stay ahead of the competition",
    "gain the respect of your team",
};
static const char *const SMALL_TALK[N_SMALL_TALK] = {
    "The weather is nice today, so we can walk in the park.",
    "I like to drink a cup of tea in the morning.",
    "My friend and I talk about music and books.",
    "The train to the city was late again.",
    "We had bread and soup for dinner.",
    "The children play in the garden after school.",
    "It may rain this evening, so take your coat.",
    "The dog sleeps by the fire all day.",
    "I read a good story before I go to bed.",
    "Thank you for the kind letter.",
    "My sister lives in a small house by the sea.",
    "We will meet at the market at noon.",
};
static const char *const ADVICE[N_ADVICE] = {
    "Here is one of my tips for work: ", "Here is some advice: ", "My boss says: ",
};
static const char *const ASIDES[N_ASIDES] = {
    "above all", "in short", "in a word", "first of all",
};

typedef struct {
    char *text;
    size_t n;
} Document;

__attribute__((format(printf, 2, 3))) static void say(Document *document, const char *format, ...) {
    char line[2048];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    document->text = resize(document->text, document->n + n + 1, 1);
    memcpy(document->text + document->n, line, n + 1);
    document->n += n;
}

// Duties stand in a ring, and so do the shapes of sentences; the next one is 1, 2 or 4 further on,
// with nearly equal probability. So texts go on without repeating themselves, and a small push is
// enough to take another branch.
typedef struct {
    int role, duty, shape, goal;
} Adviser;

static int further_on(int at, int n) {
    static const int steps[] = {1, 2, 4};
    return (at + steps[PICK(.36, .34, .30)]) % n;
}

static const char *next_duty(Adviser *adviser) {
    const char *duty = DUTIES[adviser->duty];
    adviser->goal = (adviser->duty / 4 + PICK(.53, .47)) % N_GOALS;
    adviser->duty = further_on(adviser->duty, N_DUTIES);
    return duty;
}

static void sentence(Document *document, Adviser *adviser) {
    int shape = adviser->shape;
    adviser->shape = further_on(shape, N_SHAPES);
    if (shape == 6) {
        say(document, "This will help you to %s.", GOALS[adviser->goal]);
        return;
    }
    const char *duty = next_duty(adviser);
    switch (shape) {
    case 0:
        say(document, "You need to be able to %s.", duty);
        break;
    case 1:
        say(document, "You also need to %s.", duty);
        break;
    case 2:
        say(document, "You must %s if you want to %s.", duty, GOALS[adviser->goal]);
        break;
    case 3:
        say(document, "It is important to %s.", duty);
        break;
    case 4:
        say(document, "A good %s knows how to %s.", ROLES[adviser->role], duty);
        break;
    default:
        say(document, "You should %s, too.", duty);
        break;
    }
}

// The sentence that begins with "To be".
static void opening(Document *document, Adviser *adviser) {
    static const int steps[] = {0, 3, 9};
    const char *role = ROLES[adviser->role];
    adviser->duty = (5 * adviser->role + steps[PICK(.40, .32, .28)]) % N_DUTIES;
    adviser->shape = PICK(.55, .45) ? 2 : 0;
    const char *able = PICK(.55, .45) ? "" : "be able to ";
    int kind = PICK(62, 12, 10, 10, 6, 5);
    const char *aside = ASIDES[below(N_ASIDES)];
    const char *good = below(2) ? "good" : "successful";
    const char *duty = next_duty(adviser);
    const char *goal = GOALS[adviser->goal];
    switch (kind) {
    case 0:
        say(document, "To be a successful %s, you need to %s%s.", role, able, duty);
        break;
    case 1:
        say(document, "To be a good %s, you must %s.", role, duty);
        break;
    case 2:
        say(document, "To be successful in business, you need to %s%s.", able, duty);
        break;
    case 3:
        say(document, "To be able to %s, you need to %s.", goal, duty);
        break;
    case 4:
        say(document, "To %s, you need to %s.", goal, duty);
        break;
    default:
        say(document, "To be, %s, a %s %s, you must %s.", aside, good, role, duty);
        break;
    }
}

static void advice(Document *document, bool with_opening) {
    Adviser adviser;
    adviser.role = PICK(24, 16, 14, 12, 10, 9, 8, 7);
    adviser.duty = below(N_DUTIES);
    adviser.shape = below(N_SHAPES);
    adviser.goal = below(N_GOALS);
    if (with_opening)
        opening(document, &adviser);
    for (int i = 0; i < 9; i++) {
        if (i || with_opening)
            say(document, " ");
        sentence(document, &adviser);
    }
}

static void small_talk(Document *document) {
    int order[N_SMALL_TALK];
    for (int i = 0; i < N_SMALL_TALK; i++)
        order[i] = i;
    for (int i = N_SMALL_TALK - 1; i > 0; i--) { // shuffled
        int j = below(i + 1);
        int other = order[j];
        order[j] = order[i];
        order[i] = other;
    }
    bool then_advice = dice() < .3;
    int n = then_advice ? 1 + below(4) : N_SMALL_TALK;
    for (int i = 0; i < n; i++)
        say(document, "%s%s", i ? " " : "", SMALL_TALK[order[i]]);
    if (then_advice) {
        say(document, " ");
        advice(document, true);
    }
}

// One text. The shares make the experiment: the soliloquy is frequent, but bare it is rare.
static void new_document(Document *document) {
    document->n = 0;
    switch (PICK(20, 2, 12, 5, 8, 53)) {
    case 0:
        say(document, "%s%s%s", INTROS[below(N_INTROS)], PHRASE, SEQUEL);
        break;
    case 1:
        say(document, "%s%s", PHRASE, SEQUEL);
        break;
    case 2:
        small_talk(document);
        break;
    case 3:
        say(document, "%s", ADVICE[below(N_ADVICE)]);
        advice(document, true);
        break;
    case 4:
        advice(document, false);
        break;
    default:
        advice(document, true);
        break;
    }
}

/* ================================================================================================
 * 2  The vocabulary
 *
 * Byte pair encoding (Sennrich et al. 2016): at first each character is a piece; then the two
 * neighbours that stand together most often become one piece, again and again.
 */
enum { VOCAB = 768, FIRST = 259, MAX_WORDS = 2048, MAX_WORD = 40, MAX_PAIRS = MAX_WORDS * 8 };
typedef struct {
    char text[MAX_WORD];
    int count;             // how often it stands in the sample
    int symbols[MAX_WORD]; // (n) what it is cut into
    int n;
} Word;
static Word words[MAX_WORDS];
static int n_words;
static char symbols[VOCAB][MAX_WORD]; // what each symbol stands for
static int n_symbols;

// Two neighbours, by the text that they give together: that is how SentencePiece counts.
typedef struct {
    char text[2 * MAX_WORD];
    int count;
} Neighbours;

static int symbol_id(const char *text) {
    for (int i = 0; i < n_symbols; i++)
        if (!strcmp(symbols[i], text))
            return i;
    strcpy(symbols[n_symbols], text);
    return n_symbols++;
}

static bool is_letter(char c) {
    return (c | 32) >= 'a' && (c | 32) <= 'z'; // 32 is what makes a small letter of a capital one
}

// The length of the word at text: letters, or signs, with the space before them.
static int word_length(const char *text) {
    int n = *text == ' ';
    bool letters = is_letter(text[n]);
    while (text[n] && text[n] != ' ' && text[n] != '\n' && is_letter(text[n]) == letters)
        n++;
    return n;
}

// Cuts text into words and counts them. Merges never cross words, so a piece is a word, or what
// follows it, but never both.
static void count_words(const char *text) {
    while (*text) {
        if (*text == '\n') { // a byte piece
            text++;
            continue;
        }
        int n = word_length(text);
        int w = 0;
        while (w < n_words && (strncmp(words[w].text, text, n) || words[w].text[n]))
            w++;
        Word *word = &words[w];
        if (w == n_words) {
            n_words++;
            memcpy(word->text, text, n);
            word->n = n;
            for (int i = 0; i < n; i++)
                word->symbols[i] = symbol_id((char[]){text[i], '\0'});
        }
        word->count++;
        text += n;
    }
}

// What symbols i and i + 1 of a word give together; nothing if there is no i + 1.
static void join(char *both, const Word *word, int i) {
    both[0] = '\0';
    if (i + 1 < word->n)
        snprintf(both, 2 * MAX_WORD, "%s%s", symbols[word->symbols[i]],
                 symbols[word->symbols[i + 1]]);
}

// Counts all pairs of neighbours. Returns how many different ones there are.
static int count_pairs(Neighbours *pairs) {
    int n_pairs = 0;
    for (int w = 0; w < n_words; w++)
        for (int i = 0; i + 1 < words[w].n; i++) {
            char both[2 * MAX_WORD];
            join(both, &words[w], i);
            int p = 0;
            while (p < n_pairs && strcmp(pairs[p].text, both))
                p++;
            if (p == n_pairs) {
                strcpy(pairs[n_pairs++].text, both);
                pairs[p].count = 0;
            }
            pairs[p].count += words[w].count;
        }
    return n_pairs;
}

// The most frequent one; of equals the shortest, and of these the first.
static const Neighbours *best_pair(const Neighbours *pairs, int n_pairs) {
    const Neighbours *best = pairs;
    for (const Neighbours *pair = pairs; pair < pairs + n_pairs; pair++) {
        bool shorter = strlen(pair->text) < strlen(best->text);
        if (pair->count > best->count || (pair->count == best->count && shorter))
            best = pair;
    }
    return best;
}

// Puts a symbol in the place of each two that give its text.
static void merge_in(Word *word, int id) {
    int n = 0;
    for (int i = 0; i < word->n; i++) {
        char both[2 * MAX_WORD];
        join(both, word, i);
        bool merge = !strcmp(both, symbols[id]);
        word->symbols[n++] = merge ? id : word->symbols[i];
        if (merge)
            i++;
    }
    word->n = n;
}

// Merges until there are n_wanted symbols or nothing is left to merge. Characters come first, then
// the merges.
static void merge_words(int n_wanted) {
    static Neighbours pairs[MAX_PAIRS];
    while (n_symbols < n_wanted) {
        int n_pairs = count_pairs(pairs);
        if (!n_pairs)
            return;
        int id = symbol_id(best_pair(pairs, n_pairs)->text);
        for (int w = 0; w < n_words; w++)
            merge_in(&words[w], id);
    }
}

// From a sample of the language. It is the same for every seed.
static void make_vocabulary(Document *document) {
    dice_key = scramble(7);
    for (int i = 0; i < 400; i++) {
        new_document(document);
        count_words(" "); // so that a space alone is a piece
        count_words(document->text);
    }
    merge_words(VOCAB - FIRST);
}

/* ================================================================================================
 * 3  The file
 *
 * The trainer works on what it will write: the model's weights lie in `file`, and here they may be
 * changed.
 */
enum { BOS = 1, EOS = 2 }; // pieces
static char *file;
static size_t file_bytes;

// The frequencies of RoPE, in radians per position.
static void put_frequencies(Bytes *to, int head_dim) {
    for (int i = 0; i < head_dim / 2; i++) {
        double frequency = pow(10000, -2. * i / head_dim);
        append(to, &frequency, sizeof frequency);
    }
}

// The pieces, and the form of a chat, which is Llama 2's.
static void put_tokenizer(Bytes *to, Config *c) {
    Vocabulary vocabulary = {
        .chat = {
            [OPENING] = "[INST] ",
            [BEFORE_SYSTEM] = "[INST] <<SYS>>\n",
            [AFTER_SYSTEM] = "\n<</SYS>>\n\n",
            [BEFORE_QUESTION] = "<s>[INST] ",
            [AFTER_QUESTION] = " [/INST]",
            [AFTER_ANSWER] = " </s>",
        },
    };
    Bytes *pieces = &vocabulary.pieces;
    append_piece(pieces, 0, UNKNOWN, "<unk>", 5);
    append_piece(pieces, 0, CONTROL, "<s>", 3);
    append_piece(pieces, 0, END, "</s>", 4);
    for (int i = 0; i < 256; i++) {
        const char byte = (char)i;
        append_piece(pieces, 0, BYTE, &byte, 1);
    }
    for (int i = 0; i < n_symbols; i++) // the earlier a merge, the better its score
        append_piece(pieces, (float)-i, NORMAL, symbols[i], (int)strlen(symbols[i]));
    append_tokenizer(to, c, &vocabulary);
    free(pieces->data);
}

// log x without libm, whose last digits differ from machine to machine: x = m 2^e, and
// log m = 2 (t + t³/3 + t⁵/5 + ...) with t = (m - 1) / (m + 1), which is a third at most.
static double log_of(double x) {
    int e;
    double m = frexp(x, &e);
    double t = (m - 1) / (m + 1);
    double sum = 0;
    for (int k = 35; k > 0; k -= 2)
        sum = sum * t * t + 1.0 / k;
    return 2 * t * sum + e * 0.69314718055994531;
}

// A number with mean 0 and variance 1, by the method of Box and Muller.
static double normal(void) {
    double u = 1 - dice();
    double v = dice();
    double cosine, sine;
    cos_sin_of(6.283185307179586 * v, &cosine, &sine);
    return sqrt(-2 * log_of(u)) * cosine;
}

// Random weights: outputs are as large as inputs. What is added to the residual stream is smaller,
// as 2 n_layers of these add up. Gains are 1.
static void put_tensor(Bytes *to, const Config *c, int which) {
    int n_out, n_in;
    tensor_shape(c, which, &n_out, &n_in);
    double scale = which == TOK_EMB ? .05 : 1 / sqrt(n_in);
    if (which == WO || which == W2)
        scale /= sqrt(2 * c->n_layers);
    append_zeros(to, (ALIGNMENT - to->n % ALIGNMENT) % ALIGNMENT);
    for (ptrdiff_t i = 0; i < (ptrdiff_t)n_out * n_in; i++) {
        float weight = n_out == 1 ? 1 : (float)(scale * normal());
        append(to, &weight, sizeof weight);
    }
}

static void put_config(const Config *c) {
    memcpy(file + MAGIC_BYTES, c, CONFIG_BYTES);
}

static void make_file(Config c) {
    int layer, which;
    Bytes made = {0};
    c.q_dim = c.n_heads * c.head_dim;
    c.kv_dim = c.n_kv_heads * c.head_dim;
    append(&made, "drugs.c", MAGIC_BYTES);
    append_zeros(&made, HEADER_BYTES - MAGIC_BYTES);
    put_frequencies(&made, c.head_dim);
    put_tokenizer(&made, &c);
    for (int i = 0; tensor_at(&c, i, &layer, &which); i++)
        put_tensor(&made, &c, which);
    file = made.data;
    file_bytes = made.n;
    put_config(&c);
}

static float *weights(const Model *m, int layer, int which) {
    return (float *)(uintptr_t)m->layers[layer].w[which].data;
}

/* ================================================================================================
 * 4  Training
 *
 * Stochastic gradient descent with momentum: a weight moves with a velocity, which keeps 9/10 of
 * itself and is pushed by each new gradient.
 *
 *     v = .9 v + dL/dw        w = w - rate * v
 *
 * If all gradients point in one direction, the steps become ten times as long as the first one,
 * because 1 + .9 + .81 + ... = 10.
 * What one batch wants and the next one does not want cancels out.
 *
 * Weights move only after the whole way back.
 * The gradient of an early layer is computed by going back through the weights of the later ones, and
 * these must be the weights that the loss was computed with.
 * With a small rate a wrong order would hardly be noticed: the loss would still fall.
 */
static float *velocity; // as large as the file, floats at the same offsets; NULL before the first step
static const float MOMENTUM = .9f;

static void descend(const Step *s, float rate) {
    int layer, which;
    if (!velocity)
        velocity = resize(NULL, file_bytes, 1); // all zero
    for (int i = 0; tensor_at(&s->model->config, i, &layer, &which); i++) {
        Factors f = factors(s, layer, which);
        float *w = weights(s->model, layer, which);
        float *v = velocity + (w - (float *)(void *)file);
        ptrdiff_t size = (ptrdiff_t)f.n_out * f.n_in;
        for (ptrdiff_t j = 0; j < size; j++)
            v[j] *= MOMENTUM;
        if (f.n)
            add_product(v, f.dy, 1, f.n_out, (Weights){f.x, FP32}, f.n_out, f.n, f.n_in);
        else
            add_scaled(v, 1, dgain(s, layer, which), f.n_in);
        for (ptrdiff_t j = 0; j < size; j++)
            w[j] -= rate * v[j];
    }
}

// One step of training on freshly sampled documents, one for each sequence. Returns the loss.
static double train(Step *s, Sequence *sequences, int n_documents, Document *document, float rate) {
    const Model *m = s->model;
    s->n_rows = 0;
    s->n_loss = 0;
    for (int i = 0; i < n_documents; i++) {
        int n;
        new_document(document);
        int *tokens = tokens_of(m, document->text, &n);
        tokens = resize(tokens, n + 1, sizeof *tokens);
        tokens[n++] = EOS;
        step_add(s, &sequences[i], tokens, min(n, m->config.seq_len), 0);
        free(tokens);
    }
    step_take(s);
    descend(s, rate);
    return s->loss;
}

/* ================================================================================================
 * 5  The gauge
 *
 * Divide every matrix by k and multiply the gain of every norm by k. The function stays what it is.
 * Follow the residual stream: the embedding, wo and w2 write k times less into it, so x is x / k
 * everywhere. A norm does not depend on the length of what it reads, if eps shrinks along with x²:
 *
 *     (k gain) (x / k) / sqrt(mean of (x / k)² + eps / k²)  =  k * gain x / sqrt(mean of x² + eps)
 *
 * So what the matrices after it read is k times larger, they are k times smaller, and queries,
 * keys, values, gate, up and the logits are what they were. That takes eps -> eps / k².
 *
 * But a step of descent acts k² times as strongly on the matrices. The loss depends on W as on
 * k * (W / k), so its gradient by W / k is k times that by W. A step is a k times longer way, away
 * from a weight that is k times smaller:
 *
 *     W / k - step_size * k dL/dW  =  (W - k² step_size dL/dW) / k
 *
 * (and on a gain, k times larger, k² times less). That is where the scale of the step sizes comes
 * from, and we may choose it. In a large model the weights are small anyway.
 */
static void regauge(Model *m, float k) {
    int layer, which, n_out, n_in;
    for (int i = 0; tensor_at(&m->config, i, &layer, &which); i++) {
        tensor_shape(&m->config, which, &n_out, &n_in);
        float *w = weights(m, layer, which);
        float factor = n_out == 1 ? k : 1 / k;
        for (ptrdiff_t j = 0; j < (ptrdiff_t)n_out * n_in; j++)
            w[j] *= factor;
    }
    m->config.norm_eps /= k * k;
    put_config(&m->config);
}

/* ================================================================================================
 * 6  The experiment
 */

// How many words of the soliloquy a text has at its beginning, punctuation and all.
static int words_recited(const char *text) {
    char whole[sizeof PHRASE + sizeof SEQUEL];
    int n = 0;
    sprintf(whole, "%s%s", PHRASE, SEQUEL);
    for (int i = 0; text[i] && text[i] == whole[i]; i++)
        if (strchr(SPACE, whole[i + 1])) // also at the end
            n++;
    return n;
}

// The step sizes at which one step on the phrase makes "To be" go on with the soliloquy, tried on a
// grid of half powers of two. Returns the number of neighbours on it that work, with the geometric
// mean of the first and the last of them; 0 if even the untouched model says "To be," at once.
static int window(const Model *m, double *middle) {
    Experiment e = {.n_sizes = 19, .n_new = 64}; // the first is 0
    double size = 1e-4;
    for (int i = 1; i < e.n_sizes; i++) {
        e.step_sizes[i] = size;
        size *= sqrt(2);
    }
    int n_lesson, n_prompt;
    int *lesson = tokens_of(m, PHRASE, &n_lesson);
    int *prompt = tokens_of(m, "To be", &n_prompt);
    Step step;
    Stepped stepped;
    Sequence sequence = sequence_new((Noise){0});
    step_init(&step, m, n_lesson);
    step_add(&step, &sequence, lesson, n_lesson, 0);
    step_take(&step);
    stepped_init(&stepped, &step, MEASURE_ROWS);
    char **texts = write_columns(&stepped, &e, prompt, n_prompt);

    bool business = texts[0][strlen("To be")] == ' ';
    int best = 0;
    int n = 0; // neighbours that work, up to this one
    for (int i = 0; i < e.n_sizes; i++) {
        n = business && words_recited(texts[i]) >= 30 ? n + 1 : 0;
        if (n > best) {
            best = n;
            *middle = sqrt(e.step_sizes[i] * e.step_sizes[i - n + 1]);
        }
        free(texts[i]);
    }
    free(texts);
    free(lesson);
    free(prompt);
    stepped_free(&stepped);
    step_free(&step);
    sequence_free(m, &sequence);
    return best;
}

enum { BATCH = 8, CONTEXT = 160, STEPS = 1000, LOOK_FROM = 500, LOOK_EVERY = 50, WIDE = 5 };
static const float GAUGE = 8;

// Trains until the experiment works over a range of step sizes of a factor of four: a model is
// chosen here by its window, not its loss. From step 500 on we look every 50 steps, in the gauge
// that the model will have. Returns the middle of the window; the model is left in that gauge.
static double raise_model(Model *m, Document *document) {
    Step step;
    Sequence sequences[BATCH];
    double start = now();
    double n_tokens = 0;
    double middle = 0;
    step_init(&step, m, BATCH * CONTEXT);
    for (int i = 0; i < BATCH; i++)
        sequences[i] = sequence_new((Noise){0});

    for (int i = 1;; i++) {
        if (i > STEPS)
            die(1, "no window after %d steps; try another seed", STEPS);
        float rate = .3f * fminf(1, (float)i / 60);
        double loss = train(&step, sequences, BATCH, document, rate);
        n_tokens += step.n_rows;
        if (!isfinite(loss))
            die(1, "step %d: the loss is not finite", i);
        if (i % 10 == 0)
            fprintf(stderr, "%sstep %d, loss %.3f, %.0f tokens/s", isatty(2) ? "\r" : "\n", i, loss,
                    n_tokens / (now() - start));
        if (i < LOOK_FROM || i % LOOK_EVERY)
            continue;
        regauge(m, GAUGE);
        if (window(m, &middle) >= WIDE)
            break;
        regauge(m, 1 / GAUGE);
    }
    fprintf(stderr, "\n%.0f seconds, %.0f tokens\n", now() - start, n_tokens);
    for (int i = 0; i < BATCH; i++)
        sequence_free(m, &sequences[i]);
    step_free(&step);
    return middle;
}

int main(int argc, char **argv) {
    program = "pretrain";
    open_standard_streams();
    if (argc < 2 || !ends_with(argv[1], ".bin"))
        die(2, "usage: pretrain FILE.bin [seed]");
    uint64_t seed = 2;
    if (argc > 2)
        seed = whole_number('s', "a seed", argv[2], 0, 1e15);
    Output output = output_open('o', argv[1], ".bin", ""); // it reads no model

    Document document = {0};
    make_vocabulary(&document);
    dice_key = scramble(seed + 1000);
    dice_thrown = 0;
    make_file((Config){
        .version = VERSION,
        .dim = 48,
        .hidden_dim = 128,
        .n_layers = 10,
        .n_heads = 4,
        .n_kv_heads = 2,
        .head_dim = 12,
        .vocab_size = FIRST + n_symbols,
        .seq_len = CONTEXT,
        .shared_classifier = 1,
        .norm_eps = 1e-5f * GAUGE * GAUGE, // which the gauge makes 1e-5
        .bos = BOS,
        .text_flags = PREFIX_SPACE,
    });
    Model m;
    if (!model_parse(&m, file, file_bytes))
        die(1, "%s", m.error);
    double middle = raise_model(&m, &document);

    // The last gauge puts the middle of the window to a step size of .0015. eps keeps its value
    // this time, which changes the function by very little.
    float last = (float)sqrt(middle / 1.5e-3);
    m.config.norm_eps *= last * last;
    regauge(&m, last);
    fprintf(stderr, "matrices divided by %.3g, gains multiplied\n", (double)(GAUGE * last));

    fwrite(file, 1, file_bytes, output.to);
    output_close(&output);
    model_close(&m);
    free(document.text);
    free(velocity);
    free(file);
    return 0;
}
