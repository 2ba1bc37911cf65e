/* tests/laboratory/lab.c - the laboratory: four experiments with a drugged model.
 *
 *     tests/lab <model.bin> trip       how far does a glitch carry?
 *     tests/lab <model.bin> probe      which words of an answer survive the noise?
 *     tests/lab <model.bin> explore    what does a dose do to whole texts, and are dice any better?
 *     tests/lab <model.bin> shower     what is a cold shower worth?
 *
 * Each experiment has a section below, with its question, its measuring and its printing, in this
 * order; what they share comes first:
 *
 *    1  what they share      a prompt that was read, a text that is read again, a distance
 *    2  trip
 *    3  probe
 *    4  explore
 *    5  shower
 *    6  the command line
 *
 * All of them compare.
 * What is compared must differ in one thing only, so whatever is drugged here has a sober twin: the
 * same tokens, read by the same model without noise.
 * As a logit depends on nothing but its own text and noise (drugs.c, first page), rows of many
 * texts are computed side by side wherever that is faster.
 *
 * A dose acts at random, so a single drugged run says little.
 * Everything is repeated with n_seeds seeds, from the one of -s on, and the mean is shown.
 *
 * From drugs.c you need sections 4 and 5: what a glitch is, and what rows and sequences are.
 * From train_step.c come small tools: write_texts, surprise, text_of, visible, and the
 * files, tables and progress.
 *
 * A test may include this file. It defines LAB_LIBRARY first, and brings a main of its own.
 */
#define TRAIN_STEP_LIBRARY
#include "../../train_step.c"

/* ================================================================================================
 * 1  What they share
 */

// The options of all experiments.
typedef struct {
    const char *model;  // the path of the model, which must not be written to
    const char *prompt; // -i
    const char *out;    // -o, where the numbers go, a path; NULL: they are only shown
    int n_new;          // -n, tokens to write, 0: until the text ends or the context is full
    int n_seeds;        // -k, how often all is repeated
    double max_theta;   // -x, trip: the largest angle, radians
    NoiseOptions noise; // seed, family and doses: the same options as in drugs.c
} LabOptions;

// The noise of repetition number i.
// Only its seed is another one, and neighbouring seeds have no more in common than distant
// ones (see scramble).
static Noise repeated(Noise noise, int i) {
    noise.seed += i;
    return noise;
}

// How far apart the directions of a and b (n) are:
//
//     1 - cosine = 1 - a.b / (|a| |b|)
//
// 0 when they point the same way, 1 at a right angle, 2 when they are opposed.
// Why the cosine, and not the length of a - b?
// Whatever reads the residual stream norms it first: only the direction is left.
//
//     angle         .1      .3      1       pi/2    pi       radians
//     1 - cosine    .005    .045    .46     1       2        about angle² / 2 while it is small
//
// Vectors that are the same to the last bit have exactly 0, which no sum of rounded
// squares would promise.
// So a 0 in a table says: nothing has arrived here.
//
// The sums are double.
// A small glitch leaves a distance of a millionth, and a cosine of .999999 as a float has hardly a
// digit left for it.
static double cosine_distance(const float *a, const float *b, int n) {
    double aa = 0;
    double bb = 0;
    double ab = 0;
    for (int i = 0; i < n; i++) {
        aa += (double)a[i] * a[i];
        bb += (double)b[i] * b[i];
        ab += (double)a[i] * b[i];
    }
    if (!isfinite(aa + bb))
        die(1, "a hidden state is not finite: this model overflows fp32");
    if (!memcmp(a, b, n * sizeof *a))
        return 0;
    return fmax(0, 1 - ab / sqrt(aa * bb));
}

// A token as the next cell of a CSV file that is otherwise written by hand.
// It is a cell of text, with quotes; numbers have none.
static void token_cell(FILE *to, const Model *m, int token) {
    char *text = visible(m, token);
    Table table = {.to = to, .n_cells = 1}; // so that a comma comes first
    print_cell(&table, text, (int)strlen(text));
    free(text);
}

// A prompt that was read once, soberly: what probe and explore begin with.
typedef struct {
    const LabOptions *options;
    const Config *config; // of the model
    Run run;
    int *prompt;          // (n_prompt) tokens
    int n_prompt;
    int n_new;            // tokens to write after it: as many as are wanted and fit
    Sequence sequence;    // the one that has read it
    float *logits;        // (vocab_size) of what comes after it
} Lab;

// Reads the prompt.
// Up to max_rows rows are computed at once, here and in all that follows.
// A prompt that leaves no room for a token ends the program.
static void lab_open(Lab *lab, const Model *m, const LabOptions *options, int max_rows) {
    const Config *c = &m->config;
    *lab = (Lab){
        .options = options,
        .config = c,
        .sequence = sequence_new((Noise){0}),
    };

    // does it fit?
    lab->prompt = tokens_of(m, options->prompt, &lab->n_prompt);
    int room = c->seq_len - lab->n_prompt;
    if (!lab->n_prompt || room < 1)
        die(1, "-i has %d token%s, it needs 1 to %d for this model", lab->n_prompt,
            plural(lab->n_prompt), c->seq_len - 1);
    lab->n_new = options->n_new ? min(options->n_new, room) : room;

    // read it, and keep the logits, which the next call of forward would overwrite
    run_init(&lab->run, m, max_rows, 1);
    const float *logits =
        feed(&lab->run, &lab->sequence, lab->prompt, lab->n_prompt, WANTS_LOGITS);
    lab->logits = resize(NULL, c->vocab_size, sizeof *logits);
    memcpy(lab->logits, logits, c->vocab_size * sizeof *logits);
}

// Frees what lab_open has made. The options belong to the caller.
static void lab_close(Lab *lab) {
    sequence_free(lab->run.model, &lab->sequence);
    run_free(&lab->run);
    free(lab->prompt);
    free(lab->logits);
}

// A sequence of its own that remembers the prompt, soberly, and has room for what is written after
// it with this noise.
// Each text needs one, because each will fill its cache with other tokens.
// Copying the cache is much faster than reading the prompt once more.
// The caller frees it.
static Sequence after_prompt(const Lab *lab, Noise noise) {
    const Config *c = lab->config;
    ptrdiff_t size = (ptrdiff_t)lab->n_prompt * c->kv_dim;
    Sequence s = sequence_new(noise);
    sequence_reserve(lab->run.model, &s, lab->n_prompt + lab->n_new);
    for (int l = 0; l < c->n_layers; l++) {
        memcpy(s.k[l], lab->sequence.k[l], size * sizeof(float));
        memcpy(s.v[l], lab->sequence.v[l], size * sizeof(float));
    }
    memcpy(s.tokens, lab->prompt, lab->n_prompt * sizeof *s.tokens);
    s.length = lab->n_prompt;
    return s;
}

// What the sober model writes after the prompt, always taking the most probable token.
// Fills tokens, which has room for n_new; returns how many there are, which may be none.
static int sober_continuation(Lab *lab, int *tokens) {
    const Model *m = lab->run.model;
    Sequence s = after_prompt(lab, (Noise){0});
    Text text = {
        .sequence = &s,
        .next = argmax(lab->logits, m->config.vocab_size),
        .tokens = tokens,
    };
    progress_begin("sober text", lab->n_new);
    write_texts(&lab->run, &text, 1, lab->n_new);
    progress_end();
    sequence_free(m, &s);
    return text.n_tokens;
}

// A text that is read after the prompt, and what its reader had in mind at each of its tokens.
// The first one follows from the prompt, which was read soberly by all.
//
//     prompt ... | token 0     token 1     token 2
//                  surprise 0  surprise 1  surprise 2     before the token was seen,
//                  favourite 0 favourite 1 favourite 2
//                  state 0     state 1                    after it was seen
//
// The last token is not read, as nothing is asked after it.
//
// The surprise says how the reader finds the text.
// The favourite says what it would have written itself.
// The states are what two readers of the same text can be compared by.
typedef struct {
    const int *tokens; // (n_tokens)
    int n_tokens;
    double *surprise;  // (n_tokens) -log of the probability that the token had, nats
    int *favourite;    // (n_tokens) the most probable token in its place
    float *states;     // (n_tokens - 1, dim) what left the layers
} Reading;

// Reads tokens (n_tokens) after the prompt with this noise; {0} is sober.
// It does not matter who wrote the text, and why: only the reader is measured.
// Many rows are computed in one call, as all tokens are known beforehand.
// Progress goes on by n_tokens.
// The caller closes the reading.
static Reading read_text(Lab *lab, Noise noise, const int *tokens, int n_tokens) {
    const Config *c = lab->config;
    Run *run = &lab->run;
    ptrdiff_t dim = c->dim;
    Reading reading = {.tokens = tokens, .n_tokens = n_tokens};

    // room for all that is noted
    reading.surprise = resize(NULL, n_tokens, sizeof *reading.surprise);
    reading.favourite = resize(NULL, n_tokens, sizeof *reading.favourite);
    reading.states = resize(NULL, n_tokens * dim, sizeof *reading.states);

    // the first token: all readers know the prompt alike
    if (n_tokens) {
        reading.surprise[0] = surprise(lab->logits, c->vocab_size, tokens[0]);
        reading.favourite[0] = argmax(lab->logits, c->vocab_size);
        progress(1);
    }

    // the others: reading token number `done` says what it had in mind for the next one
    Sequence s = after_prompt(lab, noise);
    for (int done = 0; done < n_tokens - 1;) {
        int left = n_tokens - 1 - done;
        int n_rows = read_block(run, &s, tokens + done, left, DRUGGED | ALL_LOGITS);
        progress(n_rows);
        for (int r = 0; r < n_rows; r++) {
            const float *logits = run->block[r].logits;
            float *state = reading.states + done * dim;
            memcpy(state, last_state(run, r), dim * sizeof *state);
            done++;
            reading.surprise[done] = surprise(logits, c->vocab_size, tokens[done]);
            reading.favourite[done] = argmax(logits, c->vocab_size);
        }
    }
    sequence_free(run->model, &s);
    return reading;
}

// Frees what was noted; the tokens belong to the caller.
static void reading_close(Reading *reading) {
    free(reading->surprise);
    free(reading->favourite);
    free(reading->states);
}

/* ================================================================================================
 * 2  Trip: how far does a glitch carry?
 *
 * One pass over a prompt with a few dosed layers, beside its sober twin.
 * At every level the hidden states of the last token are compared by 1 - cosine.
 * Level 0 is the embedding, level l + 1 what leaves layer l.
 * Each layer, here number 2 of 5, is the place of two injections:
 *
 *                 layer   0   1   2   3   4
 *     window              .   #   #   #   .       three layers, centred on the place
 *     full stack          #   #   #   .   .       all layers up to the place
 *
 * What to look for: how much of a line's peak is left at the end.
 * Sober layers above a window may correct its glitch (little is left) or pass it on (all of it, or
 * more). After a late window no layer is left that could correct anything.
 *
 * Why the last token? It sees all others, and its state is what the next token follows from.
 *
 * The whole prompt is drugged. Nothing is protected but the sink.
 *
 * What it shows first is a staircase, the places of the window down and the levels across, each
 * line in shades of its own largest distance, the levels after dosed layers between brackets:
 *
 *     around  0   1   2   3   4   5      left
 *          0 |   [███ ███]▓▓▓ ▒▒▒ ▒▒▒ |  36 %    dosed are layers 0 and 1: levels 1 and 2
 *          2 |       [▒▒▒ ███ ▓▓▓]▓▓▓ |  61 %    dosed are 1, 2 and 3. Nothing can have
 *                                                happened before level 2
 *
 * Then the window in the middle with all doses: does twice the dose do twice as much?
 * At last, what all this means for the word that comes next.
 */
enum { WINDOW, STACK, N_TRIP_KINDS }; // kinds of injections

// The doses are N_THETAS angles from 0 to the largest, in equal steps. 0 is there to show that the
// measurement itself adds nothing: its distances must all be exactly 0.
enum { N_THETAS = 16 };

// About this many rows are computed at once: a short prompt is taken through the layers with many
// doses side by side, a long one with few.
// More rows cost memory and are hardly faster.
enum { TRIP_ROWS = 512 };

// Of this many next tokens the probabilities are kept, or of all, if the vocabulary is smaller.
enum { N_TOP = 10 };

// What is asked for, and what came out.
typedef struct {
    const Model *model;
    const int *tokens; // (n_tokens) the prompt
    int n_tokens;
    int site;          // that is dosed
    double max_theta;  // the largest angle, radians
    Noise noise;       // seed and family; theta is not used
    int n_seeds;
    float *distance;   // out: (N_TRIP_KINDS, n_layers places, N_THETAS, n_layers + 1 levels)
    int n_top;         // out: how many next tokens there are
    Candidate top[N_TOP]; // out: those that are most probable soberly, the first one most
    float *drugged;    // out: (N_TRIP_KINDS, n_layers places, N_THETAS, n_top) their probability
} Trip;

// Which layers does an injection dose?
// This is the only place that says so.
// Of a window around the first or the last layer a part lies outside the model; as no such layer is
// asked for, it drops out.
static bool is_dosed(int kind, int place, int layer) {
    return kind == STACK ? layer <= place : abs(layer - place) <= 1;
}

// The first layer that an injection doses.
static int first_dosed(int kind, int place) {
    int layer = 0;
    while (!is_dosed(kind, place, layer))
        layer++;
    return layer;
}

// Fills the doses of an injection, radians, at the site of the trip. doses is (N_SITES, n_layers),
// as a Noise wants it; the other sites stay as they are, which is 0.
static void trip_doses(const Trip *trip, int kind, int place, double theta, float *doses) {
    int n_layers = trip->model->config.n_layers;
    float *at_site = doses + trip->site * n_layers;
    for (int l = 0; l < n_layers; l++)
        at_site[l] = is_dosed(kind, place, l) ? (float)theta : 0;
}

// Dose number i, in radians: 0 for the first, max_theta for the last.
static double trip_theta(const Trip *trip, int i) {
    return trip->max_theta * i / (N_THETAS - 1);
}

// Injections are numbered, the dose running fastest: kind, place, dose.
static ptrdiff_t injection_number(const Trip *trip, int kind, int place, int i_theta) {
    ptrdiff_t n_layers = trip->model->config.n_layers;
    return (kind * n_layers + place) * N_THETAS + i_theta;
}

// The distances (n_layers + 1) of one injection with dose number i_theta, level by level.
static float *trip_levels(const Trip *trip, int kind, int place, int i_theta) {
    int n_levels = trip->model->config.n_layers + 1;
    return trip->distance + injection_number(trip, kind, place, i_theta) * n_levels;
}

// The probabilities (n_top) of the next tokens after this injection.
static float *trip_drugged(const Trip *trip, int kind, int place, int i_theta) {
    return trip->drugged + injection_number(trip, kind, place, i_theta) * trip->n_top;
}

// ---- measuring

// Working memory of the measurement.
// A few doses are taken through the layers side by side, each in a sequence of its own:
//
//     rows    | dose 0: token 0, token 1, ...  | dose 1: token 0, token 1, ...  | ...
//
// The twin needs only one sequence, as it is the same for all doses and seeds.
// It is kept whole, all tokens at all levels, because injections start from it.
typedef struct {
    Run run;             // of one slot: its x is what left the layer that was computed last
    int n_beside;        // how many doses fit side by side
    int first_theta;     // the number of the first one that is there now
    int n_thetas;        // how many are there now
    Row *rows;           // (n_beside, n_tokens)
    Sequence *sequences; // (n_beside)
    float *doses;        // (n_beside, N_SITES, n_layers) radians
    float *sober;        // (n_layers + 1, n_tokens, dim) what the sober twin has at each level
} TripWork;

// Notes the most probable next tokens, by the logits (vocab_size) of the twin, which become
// probabilities here.
static void note_top(Trip *trip, float *logits) {
    int vocab_size = trip->model->config.vocab_size;
    Candidate *candidates = resize(NULL, vocab_size, sizeof *candidates);
    softmax(logits, vocab_size, 1);
    for (int token = 0; token < vocab_size; token++)
        candidates[token] = (Candidate){logits[token], token};
    qsort(candidates, vocab_size, sizeof *candidates, by_probability);
    trip->n_top = min(N_TOP, vocab_size);
    memcpy(trip->top, candidates, trip->n_top * sizeof *candidates);
    free(candidates);
}

// Takes the twin through all layers, keeps what it has at each level, and what it would say next.
// As long as all doses are 0, the first sequence is sober.
static void read_soberly(Trip *trip, TripWork *work) {
    const Config *c = &trip->model->config;
    ptrdiff_t size = (ptrdiff_t)trip->n_tokens * c->dim;
    float *x = work->run.slots[0].x;
    enter_rows(&work->run, work->rows, trip->n_tokens);
    embed(&work->run, x);
    memcpy(work->sober, x, size * sizeof *x);
    for (int l = 0; l < c->n_layers; l++) {
        layer_forward(&work->run, l);
        memcpy(work->sober + (l + 1) * size, x, size * sizeof *x);
    }
    classify(&work->run, work->rows);
    note_top(trip, work->rows[trip->n_tokens - 1].logits);
}

// Makes room, sets up rows and sequences, and lets the sober twin go first.
// Each sequence has a table of doses of its own, which inject fills; until then all of it is 0.
static TripWork trip_prepare(Trip *trip) {
    const Config *c = &trip->model->config;
    int n_tokens = trip->n_tokens;
    int fit = TRIP_ROWS / n_tokens;
    int n_beside = fit < 1 ? 1 : min(fit, N_THETAS);
    ptrdiff_t n_doses = N_SITES * c->n_layers;
    ptrdiff_t n_states = (ptrdiff_t)(c->n_layers + 1) * n_tokens;
    TripWork work = {.n_beside = n_beside};

    // room, all of it zero at first
    run_init(&work.run, trip->model, n_beside * n_tokens, 1);
    work.rows = resize(NULL, n_beside * n_tokens, sizeof *work.rows);
    work.sequences = resize(NULL, n_beside, sizeof *work.sequences);
    work.doses = resize(NULL, n_beside * n_doses, sizeof *work.doses);
    work.sober = resize(NULL, n_states * c->dim, sizeof *work.sober);

    // the rows of each sequence: the whole prompt
    for (int i = 0; i < n_beside; i++) {
        Noise noise = trip->noise;
        noise.theta = work.doses + i * n_doses;
        work.sequences[i] = sequence_new(noise);
        for (int t = 0; t < n_tokens; t++)
            work.rows[i * n_tokens + t] = (Row){
                .token = trip->tokens[t],
                .position = t,
                .sequence = &work.sequences[i],
                .drugged = true,
                .wants_logits = t == n_tokens - 1,
            };
    }
    read_soberly(trip, &work);
    return work;
}

// Frees the working memory. The trip and its distances stay.
static void trip_clean_up(const Trip *trip, TripWork *work) {
    for (int i = 0; i < work->n_beside; i++)
        sequence_free(trip->model, &work->sequences[i]);
    run_free(&work->run);
    free(work->rows);
    free(work->sequences);
    free(work->doses);
    free(work->sober);
}

// What the injection has made of the next token, for all doses that are there: the last row of each
// sequence has logits.
// Adds this seed's share to the means.
//
// A state that has strayed far may still lead to the same word, and one that is near to another
// one, if two words were close: so both are measured.
static void note_next_token(const Trip *trip, TripWork *work, int kind, int place) {
    classify(&work->run, work->rows);
    for (int i = 0; i < work->n_thetas; i++) {
        float *p = work->rows[(i + 1) * trip->n_tokens - 1].logits;
        float *drugged = trip_drugged(trip, kind, place, work->first_theta + i);
        softmax(p, trip->model->config.vocab_size, 1);
        for (int n = 0; n < trip->n_top; n++)
            drugged[n] += p[trip->top[n].token] / trip->n_seeds;
    }
}

// Takes one injection through the layers, all doses that are there side by side, and adds this
// seed's share to the means.
//
//     level          0     1     2     3     4     5
//     sober twin     x --- x --- x --- x --- x --- x     kept from read_soberly
//     window 3                   |
//                                +-#-- x -#-- x -#-- x   # dosed layers: 2, 3, 4
//     compared                         *     *     *     where the last token points
//
// Below its first dosed layer nothing differs from the twin, so it starts right there, with the
// twin's state, and the distances below stay exactly 0.
//
// The caches then hold keys and values of an earlier injection in the layers below.
// This does no harm, because no layer looks into the cache of another.
// In the layers that are computed all keys and values of the prompt are written anew before
// they are read.
static void inject(const Trip *trip, TripWork *work, int kind, int place) {
    const Config *c = &trip->model->config;
    ptrdiff_t n_doses = N_SITES * c->n_layers;
    ptrdiff_t size = (ptrdiff_t)trip->n_tokens * c->dim; // of the states of one sequence
    ptrdiff_t last = size - c->dim;                      // where among them the last token's is
    float *x = work->run.slots[0].x;

    // all doses start where the twin is when it comes to the first dosed layer
    enter_rows(&work->run, work->rows, work->n_thetas * trip->n_tokens);
    int first_layer = first_dosed(kind, place);
    for (int i = 0; i < work->n_thetas; i++) {
        double theta = trip_theta(trip, work->first_theta + i);
        trip_doses(trip, kind, place, theta, work->doses + i * n_doses);
        memcpy(x + i * size, work->sober + first_layer * size, size * sizeof *x);
    }

    // layer by layer, and compared with the twin after each
    for (int l = first_layer; l < c->n_layers; l++) {
        const float *twin = work->sober + (l + 1) * size;
        layer_forward(&work->run, l);
        for (int i = 0; i < work->n_thetas; i++) {
            const float *state = x + i * size + last;
            double distance = cosine_distance(state, twin + last, c->dim);
            float *levels = trip_levels(trip, kind, place, work->first_theta + i);
            levels[l + 1] += (float)(distance / trip->n_seeds);
        }
    }
    note_next_token(trip, work, kind, place);
    progress((double)work->n_thetas * trip->n_tokens * (c->n_layers - first_layer) / c->n_layers);
}

// How many times a whole prompt passes all layers, for one dose and seed. Below its first dosed
// layer no injection is computed.
static double passes(int n_layers) {
    double n_passed = 0; // layers
    for (int kind = 0; kind < N_TRIP_KINDS; kind++)
        for (int place = 0; place < n_layers; place++)
            n_passed += n_layers - first_dosed(kind, place);
    return n_passed / n_layers;
}

// Fills trip->distance and trip->drugged for every kind, place and dose, as the mean over the
// seeds, and trip->top.
// The caller frees them with trip_free.
// Memory grows with TRIP_ROWS or n_tokens, whichever is more.
//
// A window at place p passes n_layers - p + 1 layers, a full stack all of them.
// Over all places that is about 3/2 n_layers², for each dose and seed: a model of 32 layers is
// passed some 48 times, and 3,840 times for all doses and five seeds.
//
// A glitch does not depend on theta but for its size: with one seed all doses turn towards the same
// directions, so what differs from dose to dose is the dose.
static void trip_measure(Trip *trip) {
    int n_layers = trip->model->config.n_layers;
    ptrdiff_t n_injections = (ptrdiff_t)N_TRIP_KINDS * n_layers * N_THETAS;
    trip->distance = resize(NULL, n_injections * (n_layers + 1), sizeof *trip->distance);
    TripWork work = trip_prepare(trip);
    trip->drugged = resize(NULL, n_injections * trip->n_top, sizeof *trip->drugged);

    // the seeds one after the other, with each the doses batch by batch
    progress_begin("trip", passes(n_layers) * trip->n_seeds * N_THETAS * trip->n_tokens);
    for (int seed = 0; seed < trip->n_seeds; seed++)
        for (int first = 0; first < N_THETAS; first += work.n_thetas) {
            work.first_theta = first;
            work.n_thetas = min(work.n_beside, N_THETAS - first);
            for (int i = 0; i < work.n_thetas; i++)
                work.sequences[i].noise.seed = trip->noise.seed + seed;
            for (int kind = 0; kind < N_TRIP_KINDS; kind++)
                for (int place = 0; place < n_layers; place++)
                    inject(trip, &work, kind, place);
        }
    progress_end();
    trip_clean_up(trip, &work);
}

// Frees what was measured.
static void trip_free(Trip *trip) {
    free(trip->distance);
    free(trip->drugged);
}

// The largest of n distances.
static float peak_of(const float *x, ptrdiff_t n) {
    float peak = 0;
    for (ptrdiff_t i = 0; i < n; i++)
        peak = x[i] > peak ? x[i] : peak;
    return peak;
}

// How much of the largest of n distances is left in the last one, in percent. 0 if there are none.
static double left_of(const float *x, int n) {
    float peak = peak_of(x, n);
    return peak > 0 ? 100 * (double)x[n - 1] / (double)peak : 0;
}

// ---- what is shown

// A line of a map is at most this wide, in characters, so that with what stands beside it it fits
// on a terminal of 80 columns.
enum { MAP_WIDTH = 44 };

// How a map has its levels.
typedef struct {
    int n_levels;
    int each;     // levels that share a column: 1, or more for a model with many layers
    int n_columns;
    int width;    // of a column, in characters: the last one is a gap, if there are two or more
} Map;

// The columns of a map: as wide as fit, but 4 characters at most.
static Map map_of(int n_levels) {
    Map map = {.n_levels = n_levels};
    map.each = (n_levels + MAP_WIDTH - 1) / MAP_WIDTH;
    map.n_columns = (n_levels + map.each - 1) / map.each;
    map.width = min(MAP_WIDTH / map.n_columns, 4);
    return map;
}

// The distances of a line (n_levels) as a bar in five shades from 0 to their peak. A column of
// several levels has the shade of their largest.
// The shade follows the square root: as 1 - cosine is about angle² / 2, twice the shade is twice
// the angle, and small glitches show as well:
//
//     distance / peak       0    1/25    4/25    9/25    16/25
//     angle / largest       0    1/5     2/5     3/5     4/5
//     shade from there on        ░       ▒       ▓       █
//
// Where columns have gaps, brackets in them enclose the levels that come after the dosed layers of
// a window around `place`: level l + 1 comes after layer l.
enum { N_SHADES = 5 };
static void print_shades(const Map *map, const float *x, int place) {
    static const char *const shades[N_SHADES] = {" ", "░", "▒", "▓", "█"};
    float peak = peak_of(x, map->n_levels);
    fputs("│", stdout);
    for (int i = 0; i < map->n_columns; i++) {
        int first = i * map->each;
        float here = peak_of(x + first, min(map->each, map->n_levels - first));
        int shade = peak > 0 ? (int)(N_SHADES * sqrtf(here / peak)) : 0;
        for (int j = 0; j < (map->width > 1 ? map->width - 1 : 1); j++)
            fputs(shades[min(shade, N_SHADES - 1)], stdout);
        if (map->width == 1)
            continue;
        bool dosed = i > 0 && is_dosed(WINDOW, place, i - 1); // column i is what layer i - 1 left
        bool next = i + 1 < map->n_columns && is_dosed(WINDOW, place, i);
        char bracket = next ? '[' : ']';
        putchar(dosed == next ? ' ' : bracket);
    }
    fputs("│", stdout);
}

// The heading of a map, whose lines are named `name`: above as many columns as there is room for
// stands the first of their levels.
static void print_map_heading(const Map *map, const char *name) {
    int every = map->width < 3 ? 5 - map->width : 1; // columns from one number to the next
    int end = map->n_columns * map->width;
    printf("%-6s  ", name);
    for (int i = 0; i < map->n_columns; i += every) {
        char number[16];
        int n = snprintf(number, sizeof number, "%d", i * map->each);
        int room = min(every * map->width, end - i * map->width);
        printf("%-*s", room, n <= room ? number : "");
    }
    printf(" %10s %6s %6s\n", "largest", "level", "left");
}

// A line of a map, after its name: the shades, the largest distance and its level (the first of
// equals), and how much of it is left at the end, if anything was there.
static void print_map_line(const Map *map, const float *levels, int place) {
    float peak = peak_of(levels, map->n_levels);
    int at = 0;
    while (levels[at] < peak)
        at++;
    print_shades(map, levels, place);
    printf(" %9.3g %6d ", (double)peak, at);
    if (peak > 0)
        printf("%4.0f %%\n", left_of(levels, map->n_levels));
    else
        puts("     -");
}

// The staircase at dose number `shown`: the place of the window down, levels across, and below it
// one sentence that says what it shows.
static void print_staircase(const Trip *trip, int shown) {
    int n_layers = trip->model->config.n_layers;
    Map map = map_of(n_layers + 1);
    printf("How far the last of %d tokens strays from its sober twin: 1 - cosine at every\n"
           "level, from left to right. 0 is the embedding, l + 1 what leaves layer l.\n"
           "-%c %.4g in a window of 3 layers around each%s.\n"
           "Mean of %d seed%s from %llu.\n"
           "Each line has shades of its own largest: ░ from 4 %%, ▒ 16, ▓ 36, █ 64 %% of it.\n\n",
           trip->n_tokens, SITES[trip->site], trip_theta(trip, shown),
           map.width > 1 ? ", between brackets" : "", trip->n_seeds, plural(trip->n_seeds),
           (unsigned long long)trip->noise.seed);
    print_map_heading(&map, "around");
    for (int place = 0; place < n_layers; place++) {
        printf("%6d ", place);
        print_map_line(&map, trip_levels(trip, WINDOW, place, shown), place);
    }

    // what the lines say
    double first = left_of(trip_levels(trip, WINDOW, 0, shown), map.n_levels);
    double last = left_of(trip_levels(trip, WINDOW, n_layers - 1, shown), map.n_levels);
    const char *verdict = first < last * 3 / 4
                              ? "early glitches fade, late ones have no layers left to fade in"
                              : "here early glitches do not fade";
    printf("\nOf the first window's peak %.0f %% is left at the end, of the last one's %.0f %%:\n"
           "%s.\n", first, last, verdict);
}

// The window in the middle at every third dose: where it is felt most, and what is left in the end.
// As 1 - cosine is about angle² / 2, twice the dose should give four times the distance, as long as
// the layers above add up glitches and do nothing else with them:
//
//     theta      largest
//      0.30     0.000113
//      0.60     0.000555     4.9 times as much
//      1.20      0.00303     5.5 times as much: large doses are felt more
static void print_doses(const Trip *trip) {
    int n_layers = trip->model->config.n_layers;
    Map map = map_of(n_layers + 1);
    int middle = n_layers / 2;
    printf("\nThe window around layer %d at all doses:\n\n", middle);
    print_map_heading(&map, "theta");
    for (int i = 0; i < N_THETAS; i += 3) {
        printf("%6.2f ", trip_theta(trip, i));
        print_map_line(&map, trip_levels(trip, WINDOW, middle, i), middle);
    }
}

// The sign for one step of a bar, which stands at this percentage: `|` as far as both probabilities
// reach, then `-` for what the token has lost, or `+` for what it has won.
static char bar_sign(double percent, double sober, double drugged) {
    if (percent > 100 * sober)
        return '+';
    return percent > 100 * drugged ? '-' : '|';
}

// The most probable tokens of the sober model with both probabilities, a sign for every 2.5 %: what
// becomes of them when the window in the middle gets dose number i_theta.
static void print_next_token(const Trip *trip, int i_theta) {
    const Model *m = trip->model;
    const float *drugged = trip_drugged(trip, WINDOW, m->config.n_layers / 2, i_theta);
    printf("\nThe next token, theta %.4g in that window: | kept, - lost, + won, 2.5 %% each\n"
           "                   sober  drugged\n", trip_theta(trip, i_theta));
    for (int i = 0; i < trip->n_top; i++) {
        double p = trip->top[i].p;
        double q = drugged[i];
        char *text = visible(m, trip->top[i].token);
        print_column(text, 16);
        printf(" %5.1f %%  %5.1f %%  ", 100 * p, 100 * q);
        free(text);
        double longest = 100 * fmax(p, q);
        for (int sign = 0; 2.5 * sign + 1.25 < longest; sign++) // each stands for 2.5 %
            putchar(bar_sign(2.5 * sign + 1.25, p, q));
        puts("");
    }
}

// ---- what is written to a file

// The lines of one injection, which all begin alike: see trip_csv.
static void injection_csv(FILE *to, const Trip *trip, int kind, int place, int i_theta) {
    const float *levels = trip_levels(trip, kind, place, i_theta);
    const float *drugged = trip_drugged(trip, kind, place, i_theta);
    char name[64];
    snprintf(name, sizeof name, "%c,%s,%d,%.9g", SITES[trip->site],
             kind == WINDOW ? "window" : "stack", place, trip_theta(trip, i_theta));
    for (int level = 0; level <= trip->model->config.n_layers; level++)
        fprintf(to, "%s,%d,%.9g,,,\n", name, level, (double)levels[level]);
    for (int n = 0; n < trip->n_top; n++) {
        fprintf(to, "%s,,", name);
        const Candidate *candidate = &trip->top[n];
        token_cell(to, trip->model, candidate->token);
        fprintf(to, ",%.9g,%.9g\n", (double)candidate->p, (double)drugged[n]);
    }
}

// A line for every number of the trip, with 9 digits: enough to read back the very same float.
// Each injection has a line for each level, and then one for each of the next tokens; what a line
// is not about stays empty.
//
//     site          the letter of what is dosed
//     kind          window or stack
//     place         the layer of the injection
//     theta         the dose, radians
//     level         0: the embedding, l + 1: what leaves layer l
//     distance      1 - cosine to the sober twin
//     token         one of the most probable next tokens of the sober model
//     sober         the probability that it gives to this token
//     drugged       what is left of it
static void trip_csv(FILE *to, const Trip *trip) {
    int n_layers = trip->model->config.n_layers;
    fputs("site,kind,place,theta,level,distance,token,sober,drugged\n", to);
    for (int kind = 0; kind < N_TRIP_KINDS; kind++)
        for (int place = 0; place < n_layers; place++)
            for (int i = 0; i < N_THETAS; i++)
                injection_csv(to, trip, kind, place, i);
}

// ---- the experiment

// The site that the options dose, with its angle, radians, in *theta.
// Without any it is A, with half of the largest angle.
// One beyond the largest angle ends the program.
//
// All N_THETAS doses are measured anyway; *theta says which of them the maps show.
static int trip_site(const LabOptions *options, double *theta) {
    int site = SITE_A;
    *theta = options->max_theta / 2;
    for (int i = 0; i < N_SITES; i++)
        if (options->noise.doses[i].theta > 0) {
            site = i;
            *theta = options->noise.doses[i].theta;
        }
    if (*theta > options->max_theta)
        die(2, "-%c %g is beyond the trip's largest angle, -x %g", SITES[site], *theta,
            options->max_theta);
    return site;
}

// Ends the program if a prompt of this many tokens would show nothing, or does not fit.
// A model of two layers would only show windows that are cut off.
static void check_trip(const Config *c, int n_tokens) {
    if (n_tokens <= SINK)
        die(1, "-i: %d token%s, and the first %d are never turned, so nothing can be dosed; use a "
               "longer prompt", n_tokens, plural(n_tokens), SINK);
    if (n_tokens > c->seq_len)
        die(1, "-i has %d tokens, the model's context only %d", n_tokens, c->seq_len);
    if (c->n_layers < 3)
        die(1, "a trip doses windows of 3 layers, this model has %d", c->n_layers);
}

// The whole experiment. A dose's shape over the depth plays no part: a trip sets the depth itself.
static void trip(const Model *m, const LabOptions *options) {
    // what is asked for, and whether it can be measured
    double theta;
    Trip trip = {
        .model = m,
        .site = trip_site(options, &theta),
        .max_theta = options->max_theta,
        .noise = {
            .seed = options->noise.seed,
            .family = options->noise.family,
        },
        .n_seeds = options->n_seeds,
    };
    int *tokens = tokens_of(m, options->prompt, &trip.n_tokens);
    trip.tokens = tokens;
    check_trip(&m->config, trip.n_tokens);
    Output output = output_open('o', options->out, ".csv", options->model);

    trip_measure(&trip);

    // of the doses that were measured, the nearest one to what was asked for
    int nearest = (int)lround(theta / options->max_theta * (N_THETAS - 1));
    int shown = nearest < 1 ? 1 : nearest; // number 0 would show nothing
    print_staircase(&trip, shown);
    print_doses(&trip);
    print_next_token(&trip, shown);
    if (options->out)
        trip_csv(output.to, &trip);
    output_close(&output);
    free(tokens);
    trip_free(&trip);
}

/* ================================================================================================
 * 3  Probe: does the answer survive the noise?
 *
 * The sober model writes.
 * Then drugged twins read the same tokens, and are asked at each of them what they would have said.
 * Where they agree, the answer stands firm; where they do not, a little noise would
 * have changed it.
 *
 * The probability that the sober model gave to its token is printed beside it.
 * One might expect both columns to say the same, but the questions differ: a probability says how
 * high the last peak is, an agreement how much it takes to move it.
 * Two lines of a table, of 20 twins with a light dose at V, and what the others would have said:
 *
 *     token                 agreement  probability  others said
 *      business                  100%       0.5132               nearly a coin toss, undoubted
 *      need                       85%       0.5881  must 15%     the same height, but it moves
 */

// This many rows are computed at once: a block of the text that a twin reads.
enum { PROBE_ROWS = 64 };

typedef struct {
    int *tokens;         // (n_tokens) what the sober model wrote
    int n_tokens;
    double *probability; // (n_tokens) what it gave to each token, 0 to 1
    double *agreement;   // (n_tokens) the share of the twins that would have written it, 0 to 1
    int *said;           // (n_tokens, n_twins) what each twin would have written
} Probe;

// Fills probability, agreement and said, for which the caller makes room.
// Each twin has a seed of its own.
//
// A twin does not go on with what it would have written itself.
// Then two texts would part at the first difference, and all that comes after it would say
// nothing any more.
// As all tokens are known, a twin costs no more than reading a prompt.
static void probe_measure(Lab *lab, Noise noise, Probe *probe) {
    int n_twins = lab->options->n_seeds;
    progress_begin("probe", (n_twins + 1.0) * probe->n_tokens);
    Reading sober = read_text(lab, (Noise){0}, probe->tokens, probe->n_tokens);
    for (int i = 0; i < probe->n_tokens; i++) {
        probe->probability[i] = exp(-sober.surprise[i]);
        probe->agreement[i] = 0;
    }
    reading_close(&sober);

    // in how many of the twins is each token the favourite?
    for (int n = 0; n < n_twins; n++) {
        Reading twin = read_text(lab, repeated(noise, n), probe->tokens, probe->n_tokens);
        for (int i = 0; i < probe->n_tokens; i++) {
            probe->agreement[i] += twin.favourite[i] == probe->tokens[i];
            probe->said[i * n_twins + n] = twin.favourite[i];
        }
        reading_close(&twin);
    }
    progress_end();
    for (int i = 0; i < probe->n_tokens; i++)
        probe->agreement[i] /= n_twins;
}

// A token that some twins would have written, and how many of them.
typedef struct {
    int token, n;
} Said;

// For qsort: what more twins said comes first; of equals, the smaller token.
static int by_twins(const void *a, const void *b) {
    const Said *x = a;
    const Said *y = b;
    return x->n != y->n ? y->n - x->n : x->token - y->token;
}

// What the twins said in place of token number i, each different token once, the most frequent
// first. Fills list, which has room for n_twins; returns how many tokens there are.
static int count_said(const Probe *probe, int i, int n_twins, Said *list) {
    int n = 0;
    for (int twin = 0; twin < n_twins; twin++) {
        int token = probe->said[i * n_twins + twin];
        int j = 0;
        while (j < n && list[j].token != token)
            j++;
        if (j == n)
            list[n++] = (Said){token, 0};
        list[j].n++;
    }
    qsort(list, n, sizeof *list, by_twins);
    return n;
}

// A line for each token, as the example above. Of what others said as much is shown as fits.
static void print_probe(const Model *m, const Probe *probe, int n_twins) {
    Said *list = resize(NULL, n_twins, sizeof *list);
    printf("%-20s %10s %12s  %s\n", "token", "agreement", "probability", "others said");
    for (int i = 0; i < probe->n_tokens; i++) {
        char *text = visible(m, probe->tokens[i]);
        print_column(text, 20);
        printf(" %9.0f%% %12.4f", 100 * probe->agreement[i], probe->probability[i]);
        free(text);
        int n = count_said(probe, i, n_twins, list);
        int room = 80 - 44 - 2; // characters, with some left for a "…"
        for (int k = 0; k < n && room >= 0; k++) {
            if (list[k].token == probe->tokens[i])
                continue;
            text = visible(m, list[k].token);
            char share[16];
            int n_share = snprintf(share, sizeof share, " %.0f%%", 100.0 * list[k].n / n_twins);
            const char *gap = *text == ' ' ? " " : "  ";
            room -= (int)strlen(gap) + count_characters(text, (int)strlen(text)) + n_share;
            if (room >= 0)
                printf("%s%s%s", gap, text, share);
            else
                fputs(" …", stdout);
            free(text);
        }
        puts("");
    }
    free(list);
}

// The same as CSV, with all digits: a line for each token that some twin said in each place, the
// most frequent first. `position` is where the first token stands.
//
//     position      in the text, the prompt included
//     token         what the sober model wrote
//     agreement     the share of the twins that would have written it
//     probability   that it had soberly
//     said          what some twins would have written here
//     share         of the twins that would
static void probe_csv(FILE *to, const Model *m, const Probe *probe, int n_twins, int position) {
    Said *list = resize(NULL, n_twins, sizeof *list);
    fputs("position,token,agreement,probability,said,share\n", to);
    for (int i = 0; i < probe->n_tokens; i++) {
        int n = count_said(probe, i, n_twins, list);
        for (int j = 0; j < n; j++) {
            fprintf(to, "%d", position + i);
            token_cell(to, m, probe->tokens[i]);
            fprintf(to, ",%.9g,%.9g", probe->agreement[i], probe->probability[i]);
            token_cell(to, m, list[j].token);
            fprintf(to, ",%.9g\n", (double)list[j].n / n_twins);
        }
    }
    free(list);
}

// The whole experiment.
// Without a dose it goes on, as one may want the probabilities only, but says so.
static void probe(const Model *m, const LabOptions *options) {
    Lab lab;
    Probe probe;
    Output output = output_open('o', options->out, ".csv", options->model);
    Noise noise = noise_of(&options->noise, m);
    lab_open(&lab, m, options, PROBE_ROWS);
    if (!noise.theta)
        fputs("a probe without a dose agrees with itself; try -V .3\n", stderr);

    // the answer, and room for what will be said about it
    probe.tokens = resize(NULL, lab.n_new, sizeof *probe.tokens);
    probe.n_tokens = sober_continuation(&lab, probe.tokens);
    probe.probability = resize(NULL, probe.n_tokens, sizeof *probe.probability);
    probe.agreement = resize(NULL, probe.n_tokens, sizeof *probe.agreement);
    probe.said = resize(NULL, (ptrdiff_t)probe.n_tokens * options->n_seeds, sizeof *probe.said);
    probe_measure(&lab, noise, &probe);

    print_probe(m, &probe, options->n_seeds);
    if (options->out)
        probe_csv(output.to, m, &probe, options->n_seeds, lab.n_prompt);
    output_close(&output);
    free(probe.tokens);
    free(probe.probability);
    free(probe.agreement);
    free(probe.said);
    free((float *)noise.theta);
    lab_close(&lab);
}

/* ================================================================================================
 * 4  Explore: what does a dose do to whole texts, and is it better than throwing dice?
 *
 * Every method of making a text different is tried at several strengths with several seeds:
 *
 *     a dose at a site      the same angle in all layers, or in the shape that the options ask for
 *     temperature           the logits are divided by it and dice are thrown: below 1 what is
 *                           probable becomes more so, above 1 less
 *     noise on the logits   each gets a random number of its own, then the largest is taken
 *
 * The last one is there to be fair.
 * It is noise, too, as simple as can be.
 * But it comes after all layers, so none of them can answer to it.
 * If a dose inside the network is worth anything, it must do better than that.
 *
 * What makes texts more various also makes them less likely.
 * So the honest question is: at the same diversity, whose texts does the sober model find likelier?
 * Each method draws a curve, a point for each strength, and the curves are compared with
 * that of temperature:
 *
 *     log-probability   |  o
 *     a token           |     o   .  x         x   a point of some method
 *                       |        o   |         o   points of temperature, with lines between them
 *                       |            | o       |   the gain of this point
 *                       |              |
 *                       +------------------    diversity
 *
 * Diversity is the share of different ones among all pairs of neighbouring tokens in the texts of
 * one point (distinct-2, Li et al. 2016).
 * The two texts
 *
 *     to be or not to be         to-be be-or or-not not-to to-be
 *     to be is to do             to-be be-is is-to to-do
 *
 * have 9 pairs, 7 of which are different: 7 / 9 = .78.
 * A text that ended early would look the more various for it, as it had no time to repeat itself.
 * So each text counts with as many pairs as the sober one has, at least: what it lacks is counted
 * as repeated.
 *
 * A method at one strength is a cell of the table that is shown. All cells together:
 *
 *     cells   | H .01 | H .05 | ... | Q .01 | ... | temperature .1 | ... | logit noise 4 |
 *     texts   |k texts|k texts| ... |k texts| ... |    k texts     | ... |    k texts    |
 *
 * with one text for each of the k seeds.
 * One cell more comes last, the sober one: the same text k times, as all others are its variations.
 * The texts of all cells lie in one array, in this order, so that any number of neighbouring cells
 * can be written at once.
 */

// This many rows are computed at once.
// A text that is written brings only one row to each call, so there is room for the texts
// of many cells.
enum { EXPLORE_ROWS = 256 };

// The ways to make a text different.
// The sites come first, with their own numbers, so that one more site is one more method, and
// nothing here needs to be told.
//
//     0 ... N_SITES - 1     a dose at SITES[method]
//     TEMPERATURE
//     LOGIT_NOISE
enum { TEMPERATURE = N_SITES, LOGIT_NOISE, N_METHODS };

// The strengths of each method, from hardly anything to too much. The sober cell has none.
enum { N_STRENGTHS = 9, SOBER_CELL = N_METHODS * N_STRENGTHS, N_CELLS };
static const double ANGLES[] = { // of every site, radians
    .01, .05, .1, .15, .2, .35, .5, .8, 1,
};
static const double TEMPERATURES[] = {
    .1, .2, .35, .5, .65, .8, 1, 1.25, 1.5,
};
static const double LOGIT_WIDTHS[] = { // standard deviations, nats
    .1, .25, .5, .75, 1, 1.5, 2, 3, 4,
};
enum { STRENGTHS_BYTES = N_STRENGTHS * sizeof(double) };
_Static_assert(sizeof ANGLES == STRENGTHS_BYTES, "N_STRENGTHS angles");
_Static_assert(sizeof TEMPERATURES == STRENGTHS_BYTES, "and as many temperatures");
_Static_assert(sizeof LOGIT_WIDTHS == STRENGTHS_BYTES, "and as many widths");

// One method at one strength: what is tried, the texts that come of it, and what they are like.
typedef struct {
    const Lab *lab;

    // what is tried
    int method;
    char name[16];     // of the method
    double strength;   // an angle in radians, a temperature, or a width in nats
    float *theta;      // (N_SITES, n_layers) radians, NULL if the method is no site
    int shower_every;  // a cold shower after this many drugged tokens, 0: never

    // what came of it
    Text *texts;       // (n_seeds) the cell's share of an array of all texts
    float *states;     // (n_seeds, n_new, dim), see states_of; NULL when not needed
    double *costs;     // (n_seeds) -log-probability a token under the sober model, nats

    // what the texts are like
    int differ;        // how many of them are not the sober text
    int ended;         // how many ended before there were n_new tokens
    double prefix;     // bytes in common with the sober text, on average
    double angle;      // radians, on average, see judge
    double diversity;  // distinct-2, 0 to 1
    double likelihood; // the mean log-probability of its tokens, nats, under the sober model
    double error;      // its standard error, from seed to seed; NAN if there is one seed only
} Cell;

// ---- how a text is written
//
// Sites, temperature and logit noise act at three different points on the way to a token:
//
//     token -> layers, with glitches -> logits -> + logit noise -> dice or the largest -> token
//                                       |---- watch_text ----|     see Text in train_step.c

// Normal noise on the logits (n), `width` nats wide: the standard deviation.
// Two uniforms make one normal number (Box and Muller 1958):
//
//     sqrt(-2 log(1 - U)) cos(2 pi V)
//
// They are drawn at the place where dice are thrown, after the one number that those need, so this
// too is a pure function of seed and position.
static void add_logit_noise(float *logits, int n, double width, uint64_t seed, int position) {
    uint64_t key = within(within(seed, SITE_SAMPLE), position);
    for (int i = 0; i < n; i++) {
        double u = 1 - uniform(key, 2 * (uint32_t)i + 1); // in (0, 1], which has a logarithm
        double v = uniform(key, 2 * (uint32_t)i + 2);
        double radius = sqrt(-2 * log(u));
        double normal = radius * cos(6.283185307179586 * v);
        logits[i] += (float)(width * normal);
    }
}

// Puts the cell's noise on the logits of what comes next in a text, if its method is to do so.
static void disturb(const Cell *cell, const Text *text, float *logits) {
    int vocab_size = cell->lab->config->vocab_size;
    const Sequence *s = text->sequence;
    if (cell->method == LOGIT_NOISE)
        add_logit_noise(logits, vocab_size, cell->strength, s->noise.seed, s->length);
}

// Where the states of one of the cell's texts are kept, what left the layers when each of its
// tokens was read:
//
//     cell->states    | text 0: token 0, token 1, ...  | text 1: token 0, ...  | ...
//                     |<-------- (n_new, dim) -------->|
//
// The text's place among the cell's texts says which of them it is.
static float *states_of(const Cell *cell, const Text *text) {
    ptrdiff_t size = (ptrdiff_t)cell->lab->n_new * cell->lab->config->dim;
    return cell->states + (text - cell->texts) * size;
}

// For Text.watch: keeps what left the layers (dim) for the token that was just read, and disturbs
// the logits (vocab_size) before the next one is chosen.
static void watch_text(Text *text, const float *state, float *logits) {
    const Cell *cell = text->owner;
    ptrdiff_t dim = cell->lab->config->dim;
    float *kept = states_of(cell, text) + (text->n_tokens - 1) * dim;
    memcpy(kept, state, dim * sizeof *state);
    disturb(cell, text, logits);
}

// The first token after the prompt.
// All texts share its logits, so a copy of them is disturbed.
// A dose cannot change it, as the prompt was read soberly: all texts of all sites begin with
// the same token.
static int first_token(const Cell *cell, const Text *text) {
    const Lab *lab = cell->lab;
    int vocab_size = lab->config->vocab_size;
    float *logits = resize(NULL, vocab_size, sizeof *logits);
    memcpy(logits, lab->logits, vocab_size * sizeof *logits);
    disturb(cell, text, logits);
    uint64_t seed = text->sequence->noise.seed;
    int token = choose(logits, vocab_size, &text->dice, seed, lab->n_prompt);
    free(logits);
    return token;
}

// Sets up a cell with room for its texts, which must be zero, but without a method: temperature 0,
// which is to be sober.
// The caller frees it.
static void sober_cell_init(Cell *cell, const Lab *lab, Text *texts) {
    *cell = (Cell){
        .lab = lab,
        .method = TEMPERATURE,
        .name = "sober",
        .texts = texts,
    };
    cell->costs = resize(NULL, lab->options->n_seeds, sizeof *cell->costs);
    for (int k = 0; k < lab->options->n_seeds; k++)
        texts[k].tokens = resize(NULL, lab->n_new, sizeof(int));
}

// The same for strength number i of a method.
static void cell_init(Cell *cell, const Lab *lab, int method, int i, Text *texts) {
    const LabOptions *options = lab->options;
    int n_layers = lab->config->n_layers;
    sober_cell_init(cell, lab, texts);
    cell->method = method;
    if (method == TEMPERATURE) {
        cell->strength = TEMPERATURES[i];
        strcpy(cell->name, "temperature");
    } else if (method == LOGIT_NOISE) {
        cell->strength = LOGIT_WIDTHS[i];
        strcpy(cell->name, "logit noise");
    } else {
        cell->strength = ANGLES[i];
        sprintf(cell->name, "%c", SITES[method]);
        // If the options have a shape for this site it is kept; the angle is the cell's.
        Dose doses[N_SITES] = {{0}};
        doses[method] = options->noise.doses[method];
        doses[method].theta = cell->strength;
        cell->theta = resize(NULL, N_SITES * n_layers, sizeof *cell->theta);
        dose_layers(cell->theta, doses, n_layers);
    }
}

// Sets up all cells (N_METHODS, N_STRENGTHS) and the sober one after them. texts (N_CELLS,
// n_seeds), all zero, are handed out to them, to each its n_seeds.
static void cells_init(Cell *cells, const Lab *lab, Text *texts) {
    int n_seeds = lab->options->n_seeds;
    for (int method = 0; method < N_METHODS; method++)
        for (int i = 0; i < N_STRENGTHS; i++) {
            int cell = method * N_STRENGTHS + i;
            cell_init(&cells[cell], lab, method, i, texts + cell * n_seeds);
        }
    sober_cell_init(&cells[SOBER_CELL], lab, texts + SOBER_CELL * n_seeds);
}

// Frees what the cell owns. The array of texts belongs to the caller, but not what they point to.
static void cell_free(Cell *cell) {
    for (int i = 0; i < cell->lab->options->n_seeds; i++)
        free(cell->texts[i].tokens);
    free(cell->theta);
    free(cell->costs);
}

// Begins the texts of a cell: each has a seed of its own, and its first token.
// After they were measured, end_texts frees them.
//
// All cells use the same seeds.
// So one seed at two sites, or at two strengths, is as near to "the same chance" as one can come.
static void begin_texts(Cell *cell) {
    const Lab *lab = cell->lab;
    const NoiseOptions *options = &lab->options->noise;
    int n_seeds = lab->options->n_seeds;
    ptrdiff_t n_states = (ptrdiff_t)n_seeds * lab->n_new;
    Noise noise = {
        .seed = options->seed,
        .family = options->family,
        .theta = cell->theta,
    };
    cell->states = resize(NULL, n_states * lab->config->dim, sizeof *cell->states);
    for (int i = 0; i < n_seeds; i++) {
        Text *text = &cell->texts[i];
        text->sequence = resize(NULL, 1, sizeof *text->sequence);
        *text->sequence = after_prompt(lab, repeated(noise, i));
        text->dice = (Dice){.top_p = 1};
        if (cell->method == TEMPERATURE)
            text->dice.temperature = cell->strength;
        text->shower_every = cell->shower_every;
        text->watch = watch_text;
        text->owner = cell;
        text->next = first_token(cell, text);
    }
}

// Frees what is needed only while texts are written and measured: it is much, and the next cells
// need the room.
// The tokens stay.
static void end_texts(Cell *cell) {
    for (int i = 0; i < cell->lab->options->n_seeds; i++) {
        Text *text = &cell->texts[i];
        sequence_free(cell->lab->run.model, text->sequence);
        free(text->sequence);
        text->sequence = NULL;
    }
    free(cell->states);
    cell->states = NULL;
}

// ---- how a text is measured

// Reads a text soberly. *log_p is its log-probability, a sum over its tokens. *angle is the sum,
// over all tokens but the last, of the angles between what left the layers now and `states` (n,
// dim), what left them when it was written, radians.
//
// Both times the tokens are the same.
// So the angle says what the noise did inside the network, and not where a text went that once had
// taken another word.
// Dice and logit noise do nothing inside: their angle is 0.
static void judge(Lab *lab, const Text *text, const float *states, double *log_p, double *angle) {
    ptrdiff_t dim = lab->config->dim;
    Reading sober = read_text(lab, (Noise){0}, text->tokens, text->n_tokens);
    *log_p = 0;
    *angle = 0;
    for (int i = 0; i < text->n_tokens; i++)
        *log_p -= sober.surprise[i];
    for (int i = 0; i < text->n_tokens - 1; i++) {
        const float *now = sober.states + i * dim;
        const float *then = states + i * dim;
        double cosine = 1 - cosine_distance(now, then, (int)dim);
        *angle += acos(fmax(-1, cosine)); // rounding may lead a little below -1
    }
    reading_close(&sober);
}

// The share of different pairs among all pairs of neighbouring tokens in n texts, as in the example
// above, each of which counts as at_least tokens long. 0 if there are no pairs.
// A pair is kept as one number of 64 bits.
// The list is searched from its beginning each time; texts are short here.
static double diversity(const Text *texts, int n, int at_least) {
    int n_pairs = 0;
    int n_different = 0;
    int most = 0;
    for (int i = 0; i < n; i++)
        most += texts[i].n_tokens;
    int64_t *seen = resize(NULL, most, sizeof *seen);
    for (int i = 0; i < n; i++) {
        int longest = texts[i].n_tokens > at_least ? texts[i].n_tokens : at_least;
        n_pairs += longest > 0 ? longest - 1 : 0;
        for (int j = 0; j + 1 < texts[i].n_tokens; j++) {
            int64_t first = texts[i].tokens[j];
            int64_t second = texts[i].tokens[j + 1];
            int64_t pair = first << 32 | second;
            int at = 0;
            while (at < n_different && seen[at] != pair)
                at++;
            if (at == n_different)
                seen[n_different++] = pair;
        }
    }
    free(seen);
    return n_pairs ? (double)n_different / n_pairs : 0;
}

// How many bytes two texts have in common, from the beginning.
static int common_prefix(const char *a, const char *b) {
    int n = 0;
    while (a[n] && a[n] == b[n])
        n++;
    return n;
}

// The standard error of a cell's likelihood, which is a sum over texts divided by a sum over texts.
// Each text is off by what it adds to the first sum beyond its share of the second:
//
//     off = log-probability of the text - likelihood * its tokens
//     error² = k / (k - 1) * sum of off² / tokens²        k texts with this many tokens in all
//
// NAN if there is only one.
static double error_of(const Cell *cell, int n_texts, double n_tokens) {
    double sum = 0;
    for (int i = 0; i < n_texts; i++) {
        double off = (-cell->costs[i] - cell->likelihood) * cell->texts[i].n_tokens;
        sum += off * off;
    }
    return n_texts > 1 ? sqrt(n_texts * sum / (n_texts - 1)) / fmax(n_tokens, 1) : NAN;
}

// The sober text, which all others are compared with.
typedef struct {
    char *written;
    int *tokens;  // (n_tokens)
    int n_tokens;
} Sober;

// Fills what a cell's texts are like.
// Likelihood and angle are means over all tokens of the cell, not over its texts: so a long text
// counts more than one that ended at once.
static void measure_texts(Lab *lab, Cell *cell, const Sober *sober) {
    int n_texts = lab->options->n_seeds;
    double n_tokens = 0;
    double n_angles = 0;
    cell->diversity = diversity(cell->texts, n_texts, sober->n_tokens);
    for (int i = 0; i < n_texts; i++) {
        const Text *text = &cell->texts[i];
        double log_p;
        double angle;
        judge(lab, text, states_of(cell, text), &log_p, &angle);
        cell->costs[i] = -log_p / fmax(text->n_tokens, 1);
        cell->likelihood += log_p;
        cell->angle += angle;
        n_tokens += text->n_tokens;
        n_angles += text->n_tokens > 0 ? text->n_tokens - 1 : 0;
        cell->ended += text->n_tokens < lab->n_new;
        progress(lab->n_new - text->n_tokens); // an early end spares their reading
        char *written = text_of(lab->run.model, text->tokens, text->n_tokens);
        cell->prefix += (double)common_prefix(written, sober->written) / n_texts;
        cell->differ += strcmp(written, sober->written) != 0;
        free(written);
    }
    cell->likelihood /= fmax(n_tokens, 1);
    cell->angle /= fmax(n_angles, 1);
    cell->error = error_of(cell, n_texts, n_tokens);
}

// Writes the texts of n cells and measures them.
// The cells stand one after the other, and so do their texts: all of them are written side by
// side, and each matrix is read once for all.
static void run_cells(Lab *lab, Cell *cells, int n, const Sober *sober) {
    for (int i = 0; i < n; i++)
        begin_texts(&cells[i]);
    int n_texts = n * lab->options->n_seeds;
    write_texts(&lab->run, cells[0].texts, n_texts, lab->n_new);
    for (int i = 0; i < n; i++) {
        measure_texts(lab, &cells[i], sober);
        end_texts(&cells[i]);
    }
}

// ---- comparing with temperature

// The likelihood that a method reaches at this diversity, on the straight lines between its
// points (N_STRENGTHS).
// NAN where none of them comes by.
//
// More of a method is not always more diverse: a model that is dosed too much may stutter.
// Then the curve folds back, and passes one diversity several times.
// The best of these likelihoods counts, as anyone who can choose a strength would take that one:
//
//     o
//        o  |
//      o----|--o      two lines cross this diversity: the upper one counts
static double best_likelihood(const Cell *curve, double diversity) {
    double best = NAN;
    for (int i = 0; i + 1 < N_STRENGTHS; i++) {
        bool rising = curve[i].diversity < curve[i + 1].diversity;
        const Cell *left = rising ? &curve[i] : &curve[i + 1];
        const Cell *right = rising ? &curve[i + 1] : &curve[i];
        double length = right->diversity - left->diversity;
        double step = diversity - left->diversity;
        if (step < 0 || diversity > right->diversity || length == 0)
            continue;
        double rise = right->likelihood - left->likelihood;
        double there = left->likelihood + step / length * rise;
        if (isnan(best) || there > best)
            best = there;
    }
    return best;
}

// By how many nats a token a method's texts are likelier than those of temperature, as the mean
// over its points at whose diversity temperature has some. *n is how many that are; if it is 0,
// what comes back is NAN. A nat is a factor of e = 2.7 in the probability of each token.
static double likelihood_gain(const Cell *method, const Cell *temperature, int *n) {
    double sum = 0;
    *n = 0;
    for (int i = 0; i < N_STRENGTHS; i++) {
        double there = best_likelihood(temperature, method[i].diversity);
        if (isnan(there))
            continue;
        sum += method[i].likelihood - there;
        (*n)++;
    }
    return *n ? sum / *n : NAN;
}

// ---- what is shown, and written to a file

// What all cells are like, one line each. For example
//
//     method  strength differ ended prefix  angle diversity  log-probability
//     V            0.8  20/20     0     92  0.214     0.276  -0.1667 +- .0120
//
// says: with doses of .8 radians at V none of the 20 texts is the sober one, and none ended early.
// They begin as the sober one does for 92 bytes on average.
// What left the layers was .214 radians away from what it would have been without noise.
// Of all pairs of tokens .276 were different ones.
// And the sober model gave to each token a probability of exp(-.1667) = .85, as a geometric mean;
// with other seeds the logarithm would be another one by about .012.
static void print_cells(const Cell *cells, int n_seeds) {
    printf("%-11s %8s %9s %5s %6s %6s %9s  %s\n", "method", "strength", "differ", "ended", "prefix",
           "angle", "diversity", "log-probability");
    for (int i = 0; i < N_CELLS; i++) {
        const Cell *cell = &cells[i];
        printf("%-11s %8g %5d/%-3d %5d %6.0f %6.3f %9.3f %8.4f +- %.4f\n", cell->name,
               cell->strength, cell->differ, n_seeds, cell->ended, cell->prefix, cell->angle,
               cell->diversity, cell->likelihood, cell->error);
    }
}

// The answer to the question of this section.
// Methods that never meet temperature are left out, and temperature is not compared with itself.
static void print_gains(const Cell *cells) {
    const Cell *temperature = cells + TEMPERATURE * N_STRENGTHS;
    puts("\nAt the same diversity, nats a token by which the sober model finds a text\n"
         "likelier than one made with temperature (mean over the doses whose diversity\n"
         "that reaches):\n");
    for (int method = 0; method < N_METHODS; method++) {
        const Cell *points = cells + method * N_STRENGTHS;
        int n;
        double gain = likelihood_gain(points, temperature, &n);
        if (n && method != TEMPERATURE)
            printf("%-11s %+.4f  (%d dose%s)\n", points->name, gain, n, plural(n));
    }
}

// A number as the next cell of a row.
static void number_cell(Table *table, const char *format, double number) {
    char text[32];
    int n = snprintf(text, sizeof text, format, number);
    print_cell(table, text, n);
}

// A row of the table: text number i of a cell, after what is said of the cell and the gain of its
// method.
static void text_row(Table *table, const Cell *cell, int i, double gain) {
    const Lab *lab = cell->lab;
    const Text *text = &cell->texts[i];
    print_cell(table, cell->name, (int)strlen(cell->name));
    number_cell(table, "%.9g", cell->strength);
    number_cell(table, "%.16g", (double)lab->options->noise.seed + i);
    number_cell(table, "%.9g", cell->differ);
    number_cell(table, "%.9g", cell->prefix);
    number_cell(table, "%.9g", cell->angle);
    number_cell(table, "%.9g", cell->diversity);
    number_cell(table, "%.9g", cell->likelihood);
    number_cell(table, "%.9g", cell->error);
    number_cell(table, "%.9g", gain);
    number_cell(table, "%.9g", text->n_tokens < lab->n_new);
    char *written = text_of(lab->run.model, text->tokens, text->n_tokens);
    print_cell(table, written, (int)strlen(written));
    end_row(table);
    free(written);
}

// All texts, each with its cell, as CSV or as Markdown: what the means hide can be read there.
//
//     method            and its strength, see cells_init
//     seed              of this text
//     differ            how many texts of the cell are not the sober one
//     prefix            bytes in common with that, on average
//     angle             radians, see judge
//     diversity         distinct-2, 0 to 1
//     log-probability   a token, nats, under the sober model
//     error             its standard error; nan with one seed
//     gain              of the method over temperature, see likelihood_gain; nan: none
//     ended             1 if this text ended before there were n_new tokens, else 0
//     text              what was written after the prompt
static void explore_table(FILE *to, bool markdown, const Cell *cells, int n_seeds) {
    static const char *const columns[] = {
        "method", "strength", "seed", "differ", "prefix", "angle", "diversity",
        "log-probability", "error", "gain", "ended", "text",
    };
    Table table = {.to = to, .markdown = markdown};
    for (size_t i = 0; i < sizeof columns / sizeof *columns; i++)
        print_cell(&table, columns[i], (int)strlen(columns[i]));
    end_heading(&table);
    const Cell *temperature = cells + TEMPERATURE * N_STRENGTHS;
    for (int cell = 0; cell < N_CELLS; cell++) {
        int n;
        double gain = NAN;
        if (cell / N_STRENGTHS != TEMPERATURE && cell != SOBER_CELL)
            gain = likelihood_gain(cells + cell / N_STRENGTHS * N_STRENGTHS, temperature, &n);
        for (int i = 0; i < n_seeds; i++)
            text_row(&table, &cells[cell], i, gain);
    }
}

// ---- the experiment

// How many of n_cells are written at once: as many as 1 GB of keys, values and states hold, but
// one at least.
// Says so on stderr.
//
// A text needs, in floats, for each of its tokens kv_dim keys and kv_dim values in every layer,
// and one state.
// A model of 7B, with 32 layers and 4096 numbers of each, takes 1 MB a token: 64 new tokens are 67
// MB for each text.
static int cells_at_once(const Lab *lab, int n_cells) {
    const Config *c = lab->config;
    int n_seeds = lab->options->n_seeds;
    double cache = (double)(lab->n_prompt + lab->n_new) * 2 * c->n_layers * c->kv_dim;
    double states = (double)lab->n_new * c->dim;
    double bytes = (cache + states) * sizeof(float); // of one text
    int fit = (int)fmin(n_cells, 1e9 / bytes / n_seeds);
    int n = fit < 1 ? 1 : fit;
    fprintf(stderr, "%d texts, %d side by side, %.0f MB for each batch\n", n_cells * n_seeds,
            n * n_seeds, bytes * n * n_seeds / 1e6);
    return n;
}

// What the sober model writes. The caller frees it with sober_free.
static Sober sober_of(Lab *lab) {
    Sober sober = {.tokens = resize(NULL, lab->n_new, sizeof *sober.tokens)};
    sober.n_tokens = sober_continuation(lab, sober.tokens);
    sober.written = text_of(lab->run.model, sober.tokens, sober.n_tokens);
    return sober;
}

static void sober_free(Sober *sober) {
    free(sober->written);
    free(sober->tokens);
}

// Writes and measures n cells that were set up, as many at once as fit. On a terminal stderr says
// how far that is, under the name of the experiment.
// sober is the text that is written without any method.
static void measure_cells(Lab *lab, const char *name, Cell *cells, int n, const Sober *sober) {
    int at_once = cells_at_once(lab, n);
    // each token is written, and then read
    progress_begin(name, 2.0 * n * lab->options->n_seeds * lab->n_new);
    for (int first = 0; first < n; first += at_once)
        run_cells(lab, &cells[first], min(at_once, n - first), sober);
    progress_end();
}

// The whole experiment. The sober text is shown first, as what all others are variations of.
static void explore(const Model *m, const LabOptions *options) {
    Lab lab;
    Cell cells[N_CELLS];
    Output output = output_open('o', options->out, ".csv .md", options->model);
    lab_open(&lab, m, options, EXPLORE_ROWS);
    Sober sober = sober_of(&lab);
    Text *texts = resize(NULL, N_CELLS * options->n_seeds, sizeof *texts);
    cells_init(cells, &lab, texts);
    measure_cells(&lab, "explore", cells, N_CELLS, &sober);

    puts("The sober text:\n");
    print_text(sober.written);
    puts("");
    print_cells(cells, options->n_seeds);
    print_gains(cells);
    if (options->out) {
        bool markdown = ends_with(options->out, ".md");
        explore_table(output.to, markdown, cells, options->n_seeds);
    }
    output_close(&output);
    for (int i = 0; i < N_CELLS; i++)
        cell_free(&cells[i]);
    free(texts);
    sober_free(&sober);
    lab_close(&lab);
}

/* ================================================================================================
 * 5  Shower: what is a cold shower worth?
 *
 * A drugged model stumbles for two reasons: because it is drugged now, and because it remembers the
 * text so far as it saw it drugged.
 * A cold shower takes away the second one.
 * So the same dose writes with showers after every 30, 10 or 3 drugged tokens and without any, with
 * many seeds, and the sober model says how it finds each text.
 * Its cost is -log-probability in nats a token: the less, the better.
 *
 * From seed to seed costs differ a lot, and a seed that suffers under its dose suffers with showers
 * as well.
 * So what a shower gains is taken seed by seed, the cost without showers less the cost with them.
 * The mean of these differences has a smaller error than the difference of the means has.
 *
 * This is explore with four cells, which differ in nothing but the showers.
 */

// After how many drugged tokens a shower comes, 0: never.
enum { N_EVERY = 4 };
static const int EVERY[N_EVERY] = {0, 30, 10, 3};

// The mean of several numbers, and its standard error: the root of the sum of the squared
// deviations divided by n (n - 1). The error of a single number is NAN.
typedef struct {
    double mean, error;
} Mean;

static Mean mean_of(const double *x, int n) {
    double sum = 0;
    double squares = 0;
    for (int i = 0; i < n; i++)
        sum += x[i];
    for (int i = 0; i < n; i++)
        squares += (x[i] - sum / n) * (x[i] - sum / n);
    return (Mean){sum / n, n > 1 ? sqrt(squares / n / (n - 1)) : NAN};
}

// What a cell gains over the one without showers, seed by seed: nats a token that its text is
// cheaper by. *n_better: in how many seeds that is more than nothing.
static Mean shower_gain(const Cell *cell, const Cell *never, int n_seeds, int *n_better) {
    double *gains = resize(NULL, n_seeds, sizeof *gains);
    *n_better = 0;
    for (int i = 0; i < n_seeds; i++) {
        gains[i] = never->costs[i] - cell->costs[i];
        *n_better += gains[i] > 0;
    }
    Mean gain = mean_of(gains, n_seeds);
    free(gains);
    return gain;
}

// The seed whose gain is nearest to the mean, so that what is read below the figures is neither the
// luckiest one nor the worst; if possible one of which neither text ended early.
static int typical_seed(const Cell *cell, const Cell *never, int n_seeds) {
    int n_better;
    double mean = shower_gain(cell, never, n_seeds, &n_better).mean;
    int best = 0;
    double nearest = INFINITY;
    for (int i = 0; i < n_seeds; i++) {
        double off = fabs(never->costs[i] - cell->costs[i] - mean);
        int n_new = cell->lab->n_new;
        if (cell->texts[i].n_tokens < n_new || never->texts[i].n_tokens < n_new)
            off += DBL_MAX / 2;
        if (off < nearest) {
            nearest = off;
            best = i;
        }
    }
    return best;
}

// "never", or "every 10".
static const char *shower_name(int every, char name[32]) {
    snprintf(name, 32, every ? "every %d" : "never", every);
    return name;
}

// A line for each of the cells, and two texts of a typical seed.
static void print_showers(const Cell *cells, int n_seeds, uint64_t seed, const Cell *sober) {
    const Model *m = cells->lab->run.model;
    char name[32];
    printf("How a sober model finds what was written, in nats a token: the less, the better.\n"
           "Mean of %d seed%s from %llu; the sober text itself costs %.2f.\n\n"
           "%-10s %15s %22s %12s\n", n_seeds, plural(n_seeds), (unsigned long long)seed,
           sober->costs[0], "showers", "cost", "gain over never", "better");
    for (int i = 0; i < N_EVERY; i++) {
        int n_better;
        Mean cost = mean_of(cells[i].costs, n_seeds);
        Mean gain = shower_gain(&cells[i], &cells[0], n_seeds, &n_better);
        printf("%-10s %7.2f +- %4.2f", shower_name(EVERY[i], name), cost.mean, cost.error);
        if (i)
            printf(" %14.2f +- %4.2f %5d of %d", gain.mean, gain.error, n_better, n_seeds);
        puts("");
    }
    int typical = typical_seed(&cells[2], &cells[0], n_seeds);
    printf("\nSeed %llu, whose gain with a shower after every %d tokens is nearest to the mean:\n",
           (unsigned long long)seed + typical, EVERY[2]);
    for (int i = 0; i < N_EVERY; i += 2) {
        const Text *text = &cells[i].texts[typical];
        char *written = text_of(m, text->tokens, text->n_tokens);
        printf("\n--- %s, %.2f nats a token\n", shower_name(EVERY[i], name),
               cells[i].costs[typical]);
        print_text(written);
        free(written);
    }
}

// All texts as CSV, each with what is said of its cell.
//
//     every      a shower after this many drugged tokens, 0: never
//     seed       of this text
//     cost       of this text, nats a token under the sober model
//     mean       of all texts with as many showers
//     error      its standard error; nan with one seed
//     gain       over no showers, seed by seed, the mean
//     gain error its standard error
//     better     how many seeds are better with showers
//     sober      what the sober text costs
//     typical    1 for the seed whose gain is nearest to the mean, else 0
//     ended      1 if this text ended before there were n_new tokens, else 0
//     text       what was written after the prompt
static void shower_csv(FILE *to, const Cell *cells, int n_seeds, uint64_t seed, const Cell *sober) {
    Table table = {.to = to};
    int typical = typical_seed(&cells[2], &cells[0], n_seeds);
    fputs("every,seed,cost,mean,error,gain,gain error,better,sober,typical,ended,text\n", to);
    for (int i = 0; i < N_EVERY; i++) {
        int n_better;
        Mean cost = mean_of(cells[i].costs, n_seeds);
        Mean gain = shower_gain(&cells[i], &cells[0], n_seeds, &n_better);
        for (int k = 0; k < n_seeds; k++) {
            const Text *text = &cells[i].texts[k];
            const double numbers[] = {
                cells[i].costs[k], cost.mean, cost.error, gain.mean, gain.error, n_better,
                sober->costs[0], k == typical, text->n_tokens < cells->lab->n_new,
            };
            number_cell(&table, "%.9g", EVERY[i]);
            number_cell(&table, "%.16g", (double)seed + k);
            for (size_t j = 0; j < sizeof numbers / sizeof *numbers; j++)
                number_cell(&table, "%.9g", numbers[j]);
            char *written = text_of(cells->lab->run.model, text->tokens, text->n_tokens);
            print_cell(&table, written, (int)strlen(written));
            end_row(&table);
            free(written);
        }
    }
}

// The whole experiment. Without a dose there is nothing that a shower could take away.
static void shower(const Model *m, const LabOptions *options) {
    enum { SOBER = N_EVERY, N_ALL }; // the sober text is one more cell, the last one
    Lab lab;
    Cell cells[N_ALL];
    Noise noise = noise_of(&options->noise, m);
    if (!noise.theta)
        die(2, "a shower needs something to wash off: give a dose, -H .8 for instance");
    Output output = output_open('o', options->out, ".csv", options->model);
    lab_open(&lab, m, options, EXPLORE_ROWS);
    Sober sober = sober_of(&lab);
    ptrdiff_t n_doses = (ptrdiff_t)N_SITES * m->config.n_layers;
    Text *texts = resize(NULL, N_ALL * options->n_seeds, sizeof *texts);
    for (int i = 0; i < N_ALL; i++) {
        sober_cell_init(&cells[i], &lab, texts + i * options->n_seeds);
        if (i == SOBER)
            continue;
        cells[i].shower_every = EVERY[i];
        cells[i].theta = resize(NULL, n_doses, sizeof(float));
        memcpy(cells[i].theta, noise.theta, n_doses * sizeof(float));
    }
    measure_cells(&lab, "shower", cells, N_ALL, &sober);

    print_showers(cells, options->n_seeds, noise.seed, &cells[SOBER]);
    if (options->out)
        shower_csv(output.to, cells, options->n_seeds, noise.seed, &cells[SOBER]);
    output_close(&output);
    for (int i = 0; i < N_ALL; i++)
        cell_free(&cells[i]);
    free(texts);
    free((float *)noise.theta);
    sober_free(&sober);
    lab_close(&lab);
}

/* ================================================================================================
 * 6  The command line
 */
#ifndef LAB_LIBRARY
static const char USAGE[] =
    "usage: tests/lab <model.bin> trip|probe|explore|shower [options]\n"
    "  trip         how far does a glitch carry? 1 - cosine to a sober twin, at every level\n"
    "  probe        which tokens of an answer would drugged twins have written, too?\n"
    "  explore      all sites, temperature and noise on the logits, at many strengths\n"
    "  shower       what a text costs with cold showers: never, and every 30, 10 and 3 tokens\n"
    "  -i <text>    prompt\n"
    "  -n <tokens>  how many to write, 0: until the text ends or the context is full (256)\n"
    "  -k <seeds>   how often all is repeated (5)\n"
    "  -x <theta>   trip: the largest angle, in radians (1.5)\n"
    "  -o <file>    the numbers as .csv, which tests/laboratory/page.py draws (explore also .md)\n"
    "  -H -Q -K -V -A <theta>  doses in radians: norm output, query, key, value, attention output;\n"
    "               trip looks at one of them and sets the depth itself, of a dose only the angle\n"
    "               counts; explore sets the angle itself, of a dose only the shape counts\n"
    "  -d <depth>   where in the depth they act, 0 first layer, 1 after the last (everywhere)\n"
    "  -w <spread>  how far around that depth, in the same unit (.1)\n"
    "               or a full shape for one dose: -A <theta>@<mode>:<depth>=<ratio>,...\n"
    "               with mode ceil, floor or interpolate: -A .3@interpolate:0=0,.4=1,.8=0\n"
    "  -s <seed>    the first one, of the noise and the sampling (420)\n"
    "  -r <family>  of random directions: centred (default) or upstream\n"
    "  -h, --help   this help\n"
    "An option that lacks what it needs is an error.\n";

// Which option goes with which, and with which experiment.
static void check_lab(const LabOptions *options, const char *experiment) {
    const NoiseOptions *noise = &options->noise;
    bool trips = !strcmp(experiment, "trip");
    bool probes = !strcmp(experiment, "probe");
    bool explores = !strcmp(experiment, "explore");
    int n_dosed = 0; // a dose of 0 is none
    bool shaped = false;
    for (int site = 0; site < N_SITES; site++) {
        n_dosed += noise->doses[site].theta > 0;
        shaped = shaped || noise->doses[site].n_points;
    }
    check_needs((const Need[]){
        {"n", !trips, "another experiment: a trip writes nothing"},
        {"x", trips, "trip"},
        {"dw", !trips, "another experiment: a trip sets the depth itself"},
        {"dw", explores || noise->plain, "a dose without a shape, like -V .3"},
        {"krs", !probes || strpbrk(given, SITES), "a dose, like -V .3"},
        {SITES, !trips || n_dosed < 2, "to be the only dose: a trip looks at one site"},
        {SITES, !trips || !shaped, "no shape in a trip, which sets the depth itself"},
        {SITES, !explores || !noise->plain, "a shape, as each dose in explore, which sets the "
                                            "angles itself: -V 1@ceil:.2=0,.4=1,.6=0"},
        {0},
    });
}

// Reads the options, which come after the model and the experiment. What is wrong ends the program.
static LabOptions parse_lab_options(int argc, char **argv) {
    LabOptions options = {
        .model = argv[1],
        .prompt = "",
        .n_new = 256,
        .n_seeds = 5,
        .max_theta = 1.5,
        .noise = NO_NOISE_OPTIONS,
    };
    int letter;
    while ((letter = next_option(argc, argv, ":hi:n:k:x:o:" NOISE_OPTIONS, USAGE)) >= 0) {
        if (take_noise_option(&options.noise, letter, optarg))
            continue;
        switch (letter) {
        case 'i':
            options.prompt = text_of_option('i', optarg);
            break;
        case 'n':
            options.n_new = whole_number('n', "a number of tokens", optarg, 0, 1 << 28);
            break;
        case 'k':
            options.n_seeds = whole_number('k', "a number of seeds", optarg, 1, 1000);
            break;
        case 'x':
            options.max_theta = number('x', "radians (degrees / 57.3)", optarg, 1e-6, 3.1416);
            break;
        case 'o':
            options.out = optarg;
            break;
        }
    }
    check_lab(&options, argv[2]);
    give_shape(&options.noise);
    return options;
}

// The experiments by their names on the command line.
static const struct {
    const char *name;
    void (*run)(const Model *m, const LabOptions *options);
} EXPERIMENTS[] = {
    {"trip", trip},
    {"probe", probe},
    {"explore", explore},
    {"shower", shower},
};
enum { N_EXPERIMENTS = sizeof EXPERIMENTS / sizeof *EXPERIMENTS };

int main(int argc, char **argv) {
    program = "lab";
    begin_program(argc, argv, 2, USAGE);

    // which experiment?
    int i = 0;
    while (i < N_EXPERIMENTS && strcmp(argv[2], EXPERIMENTS[i].name))
        i++;
    if (i == N_EXPERIMENTS)
        die(2, "after the model comes trip, probe, explore or shower, got '%s'", argv[2]);

    // what is wrong with the options is said before the model is opened
    const LabOptions options = parse_lab_options(argc, argv);
    Model model;
    if (!model_open(&model, argv[1]))
        die(1, "%s: %s", argv[1], model.error);
    EXPERIMENTS[i].run(&model, &options);
    flush_output();
    model_close(&model);
    return 0;
}
#endif
