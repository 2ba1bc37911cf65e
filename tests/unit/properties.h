/* properties.h - what the noise is for, property by property, as functions to be asked.
 *
 * golden.h knows whether a number is right, but not why: change one thing on purpose, and all of
 * it is red. Here each function judges one property, from outside, and says in words which one is
 * gone. test_properties.c asks for all of them; exercises.c asks for those that an exercise leaves
 * alone, and turns the others round.
 *
 * How one sees what a site does. The sites Q, K, V and A act inside of attention, which shows
 * nothing but its result. But attention can be given queries, keys and values that are made up so
 * that the result gives away the turned vector; see struct Observer.
 */
#define TRAIN_STEP_LIBRARY
#include "../../train_step.c"
#include "testing.h"
#include "golden.h"

// The sites that are judged here. One that is added has properties of its own.
static const int JUDGED[] = {SITE_H, SITE_Q, SITE_K, SITE_V, SITE_A};
enum { N_JUDGED = sizeof JUDGED / sizeof *JUDGED };

enum { FIRST_DRUGGED = N_TOKENS - N_DRUGGED }; // row of golden.h that is turned

static double dot_in_double(const float *a, const float *b, ptrdiff_t n) {
    double sum = 0;
    for (ptrdiff_t i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

static double length_of(const float *x, ptrdiff_t n) {
    return sqrt(dot_in_double(x, x, n));
}

static double angle_between(const float *a, const float *b, int n) {
    double cosine = dot_in_double(a, b, n) / (length_of(a, n) * length_of(b, n));
    return acos(fmax(-1, fmin(1, cosine)));
}

// n numbers from -1 to 1.
static void some_vector(uint64_t stream, float *x, int n) {
    for (int i = 0; i < n; i++)
        x[i] = 2 * unit(stream, (uint64_t)i) - 1;
}

/* ------------------------------------------------------------------------------------------------
 * The laws that angles and directions follow. A family of your own gets a line in LAWS.
 */
typedef struct {
    int family;
    const char *name;
    double mean, spread; // of the angle and its standard deviation, in units of theta
    double lean;         // the mean cosine of the direction with (1, 1, ..., 1)
} Law;
static const Law LAWS[] = {
    {FAMILY_CENTRED, "centred", .5, .2887, 0},        // uniform in [0, theta): 1 / sqrt(12)
    {FAMILY_UPSTREAM, "upstream", .5, .2887, .866},   // a number in [0, 1) is 1/2 on average
};
enum { N_LAWS = sizeof LAWS / sizeof *LAWS };
enum { DRAWS = 20000, LONG = 64, LONGEST = 4096 };

// A place that nobody else uses.
static Place nth_place(uint64_t n, const Law *law, float theta) {
    return (Place){.hash = scramble(n + 1), .theta = theta, .family = law->family};
}

// How far x (n) is turned at a place, negative if away from u. u (n) is filled with the direction.
// The turned vector is x times a + u times b; its part along x has the cosine, that along the rest of u
// the sine (section 4 of drugs.c).
static double angle_at(Place place, const float *x, int n, float *u) {
    Glitch glitch = draw_glitch(place, x, n, u);
    double xx = dot_in_double(x, x, n);
    double ux = dot_in_double(u, x, n);
    double oo = dot_in_double(u, u, n) - ux * ux / xx;
    return atan2((double)glitch.b * sqrt(oo / xx), (double)glitch.a + (double)glitch.b * ux / xx);
}

// The angles of many places, in units of theta, with their mean and spread.
typedef struct {
    double angle[DRAWS];
    double mean, spread;
} Angles;

// For vectors of length n. The directions come from the same places: see nth_place.
static void draw_angles(Angles *a, const Law *law, float theta, int n, int draws) {
    static float x[LONGEST], u[LONGEST];
    double squares = 0;
    some_vector(1, x, n);
    a->mean = 0;
    for (int i = 0; i < draws; i++) {
        a->angle[i] = angle_at(nth_place((uint64_t)i, law, theta), x, n, u) / (double)theta;
        a->mean += a->angle[i] / draws;
        squares += a->angle[i] * a->angle[i] / draws;
    }
    a->spread = sqrt(squares - a->mean * a->mean);
}

static void expect_law(const Law *law) {
    static Angles a;
    const float thetas[] = {.1f, .5f};
    for (int i = 0; i < 2; i++) {
        draw_angles(&a, law, thetas[i], LONG, DRAWS);
        double off = fmax(fabs(a.mean - law->mean), fabs(a.spread - law->spread));
        cr_expect(off < .02, // they scatter by .002, and if the spread is 1 by .007
                  "ANGLES: those of family %s are %.3f theta on average, with a spread of %.3f; "
                  "its law says %.3f and %.3f", law->name, a.mean, a.spread, law->mean, law->spread);
    }
}

// Sums of products of two numbers that are 0 on average and 1 in spread: over n, a correlation.
typedef struct {
    double with_u, with_size;             // of the angle and u[j]; of the angle and |u[j]|
    double size_with_u, size_with_size;   // of |angle|
} Correlations;

// If the same draw made both, some directions would get large angles and others small ones. Sizes are
// asked too: what is symmetrical around 0 hides from a plain correlation.
static void expect_angles_unguessable(const Law *law, int n, int draws) {
    static Angles a;
    static Correlations all[LONGEST];
    static float u[LONGEST], x[LONGEST];
    const float theta = .5f;
    const double centre = law->lean > 0 ? .5 : 0; // of each number of u
    double mean_size = 0;
    memset(all, 0, sizeof all);
    some_vector(1, x, n);
    draw_angles(&a, law, theta, n, draws);
    for (int i = 0; i < draws; i++)
        mean_size += fabs(a.angle[i]) / draws;
    // The mean of the squares is the same for the angles and for their sizes.
    const double size_spread = sqrt(a.spread * a.spread + a.mean * a.mean - mean_size * mean_size);
    for (int i = 0; i < draws; i++) {
        double deviation = (a.angle[i] - a.mean) / a.spread / draws;
        double size = (fabs(a.angle[i]) - mean_size) / size_spread / draws;
        draw_glitch(nth_place((uint64_t)i, law, theta), x, n, u);
        for (int j = 0; j < n; j++) {
            // Uniform from -1/2 to 1/2: the spread is 1 / sqrt(12), that of the size half of it.
            double number = ((double)u[j] - centre) * sqrt(12);
            double number_size = (fabs((double)u[j] - centre) - .25) * sqrt(48);
            all[j].with_u += deviation * number;
            all[j].with_size += deviation * number_size;
            all[j].size_with_u += size * number;
            all[j].size_with_size += size * number_size;
        }
    }
    const double chance = 8 / sqrt(draws); // they scatter by 1 / sqrt(draws)
    for (int j = 0; j < n; j++) {
        double most = fmax(fmax(fabs(all[j].with_u), fabs(all[j].with_size)),
                           fmax(fabs(all[j].size_with_u), fabs(all[j].size_with_size)));
        cr_expect(most < chance, "ANGLES: in family %s the angle and u[%d] of %d come from the same draw: "
                  "their correlation, or that of their sizes, is %.2f", law->name, j, n, most);
    }
}

static void expect_angles_know_nothing(const Law *law) {
    expect_angles_unguessable(law, LONG, DRAWS);
    expect_angles_unguessable(law, LONGEST, 2000);
}

static void expect_lean(const Law *law) {
    float x[LONG], u[LONG], ones[LONG];
    double lean = 0;
    some_vector(3, x, LONG);
    for (int i = 0; i < LONG; i++)
        ones[i] = 1;
    for (uint64_t i = 0; i < DRAWS; i++) {
        draw_glitch(nth_place(i, law, 1), x, LONG, u);
        lean += cos(angle_between(u, ones, LONG)) / DRAWS;
    }
    cr_expect(fabs(lean - law->lean) < .01, // it scatters by .001
              "DIRECTIONS: those of family %s have a cosine of %.3f with (1, ..., 1), its law "
              "says %.3f", law->name, lean, law->lean);
}

/* ------------------------------------------------------------------------------------------------
 * The observer: a row that reads a cache of its own making, in model G, with noise at one site.
 *
 *     site   what it is given                               what gives the turned vector away
 *     H      x, and gains of 1                              xn
 *     Q      all keys 0 but one, which is a unit vector     the weight of that key
 *     K      all keys 0 but one; a unit vector as query     the weight of that key
 *     V      all values 0 but one; equal weights            the result, times the number of keys
 *     A      all values alike                               the result
 *     other  x                                              what the FFN adds to it
 *
 * A vector of zeros is never turned, so the other keys and values stay out of it.
 */
enum { HEAD_DIM = 8, DIM = 64, KV_DIM = 32, MOST_KEYS = 64 }; // of G
typedef struct {
    Bench bench;
    Sequence sequence;
    Row row;
    float theta[N_SITES * MOST_LAYERS];
    float elsewhere; // the dose of the site in other layers than the one it looks at
    int family;
} Observer;

// Where it looks.
typedef struct {
    uint64_t seed;
    int layer, head;
    int query, key; // positions
} Spot;
static const Spot HERE = {.seed = 1, .layer = 1, .head = 2, .query = 10, .key = 8};

// How many keys the row sees.
static int n_seen(const Observer *o, Spot at) {
    const int window = o->bench.model.config.sliding_window;
    return window ? min(window, at.query + 1) : at.query + 1;
}

// The gain of a layer's first norm. That of a bench may be written.
static float *attention_gain(const Model *m, int layer) {
    return (float *)(uintptr_t)m->layers[layer].w[ATT_NORM].data;
}

static void observer_open(Observer *o) {
    memset(o, 0, sizeof *o);
    bench_open(&o->bench, G, 1);
    const Model *m = &o->bench.model;
    cr_assert(m->config.dim == DIM && m->config.head_dim == HEAD_DIM && m->config.kv_dim == KV_DIM);
    for (int layer = 0; layer < m->config.n_layers; layer++)
        for (int i = 0; i < DIM; i++)
            attention_gain(m, layer)[i] = 1;
    o->sequence = sequence_new((Noise){.theta = o->theta});
    sequence_reserve(m, &o->sequence, MOST_KEYS);
}

static void observer_close(Observer *o) {
    sequence_free(&o->bench.model, &o->sequence);
    bench_close(&o->bench);
}

// Turns back what RoPE does at a position.
static void turn_back(const Observer *o, float *x, int position) {
    float cos_sin[HEAD_DIM];
    rope_angles(&o->bench.model, position, cos_sin);
    rope_backward(x, cos_sin, HEAD_DIM);
}

// Puts x (HEAD_DIM) into every kv head of a position, as a key or as a value.
static void fill(float *cache, int position, const float *x) {
    for (int i = 0; i < KV_DIM; i++)
        cache[position * KV_DIM + i] = x[i % HEAD_DIM];
}

static void forget(Observer *o, int layer) {
    memset(o->sequence.k[layer], 0, MOST_KEYS * KV_DIM * sizeof(float));
    memset(o->sequence.v[layer], 0, MOST_KEYS * KV_DIM * sizeof(float));
}

// What the head finds for this query (HEAD_DIM, before noise and RoPE).
static const float *look(Observer *o, Spot at, const float *query) {
    Run *run = &o->bench.run;
    float *q = run->slots[0].q + at.head * HEAD_DIM;
    memcpy(q, query, HEAD_DIM * sizeof *q);
    attention(run, at.layer);
    return run->slots[0].att + at.head * HEAD_DIM;
}

// q.key of the one key that is not 0, from its weight w. All others have a q.key of 0, so
// w = exp(s) / (exp(s) + number of the others) with s = q.key / sqrt(HEAD_DIM).
static double score(Observer *o, Spot at, const float *query, const float *key) {
    const float one[HEAD_DIM] = {1};
    forget(o, at.layer);
    fill(o->sequence.k[at.layer], at.key, key);
    fill(o->sequence.v[at.layer], at.key, one);
    double w = look(o, at, query)[0];
    return log(w / (1 - w) * (n_seen(o, at) - 1)) * sqrt(HEAD_DIM);
}

static void see_query(Observer *o, Spot at, const float *x, float *seen) {
    for (int i = 0; i < HEAD_DIM; i++) {
        float key[HEAD_DIM] = {0};
        key[i] = 1;
        seen[i] = (float)score(o, at, x, key);
    }
    turn_back(o, seen, at.query); // keys meet it behind RoPE
}

static void see_key(Observer *o, Spot at, const float *x, float *seen) {
    for (int i = 0; i < HEAD_DIM; i++) {
        float query[HEAD_DIM] = {0};
        query[i] = 1;
        turn_back(o, query, at.query); // so that RoPE makes the unit vector of it
        seen[i] = (float)score(o, at, query, x);
    }
}

static void see_value(Observer *o, Spot at, const float *x, float *seen) {
    const float nothing[HEAD_DIM] = {0};
    forget(o, at.layer);
    fill(o->sequence.v[at.layer], at.key, x);
    const float *found = look(o, at, nothing);
    for (int i = 0; i < HEAD_DIM; i++)
        seen[i] = found[i] * (float)n_seen(o, at);
}

static void see_result(Observer *o, Spot at, const float *x, float *seen) {
    const float nothing[HEAD_DIM] = {0};
    forget(o, at.layer);
    for (int position = 0; position <= at.query; position++)
        fill(o->sequence.v[at.layer], position, x);
    memcpy(seen, look(o, at, nothing), HEAD_DIM * sizeof *seen);
}

static void see_input(Observer *o, Spot at, const float *x, float *seen) {
    const Slot *s = &o->bench.run.slots[0];
    memcpy(s->x, x, DIM * sizeof *x);
    layer_forward(&o->bench.run, at.layer);
    memcpy(seen, s->xn, DIM * sizeof *seen);
}

// For a site of your own behind w2: what the layer's second half adds to the residual stream.
static void see_added(Observer *o, Spot at, const float *x, float *seen) {
    const Slot *s = &o->bench.run.slots[0];
    memcpy(s->x, x, DIM * sizeof *x);
    forget(o, at.layer);
    layer_forward(&o->bench.run, at.layer);
    for (int i = 0; i < DIM; i++)
        seen[i] = s->x[i] - s->xm[i]; // with one slot, x is that of the next layer by now
}

static int size_at(int site) {
    return site == SITE_H || site > SITE_A ? DIM : HEAD_DIM;
}

// What becomes of x at a site, with this dose there and none elsewhere.
static void see(Observer *o, int site, float dose, Spot at, const float *x, float *seen) {
    Run *run = &o->bench.run;
    const Config *c = &o->bench.model.config;
    memset(o->theta, 0, sizeof o->theta);
    for (int layer = 0; layer < c->n_layers; layer++)
        o->theta[site * c->n_layers + layer] = layer == at.layer ? dose : o->elsewhere;
    o->sequence.noise.seed = at.seed;
    o->sequence.noise.family = o->family;
    o->row = (Row){.token = at.query, .position = at.query, .sequence = &o->sequence, .drugged = true};
    run->rows = &o->row;
    run->n_rows = 1;
    rope_angles(&o->bench.model, at.query, run->cos_sin);
    switch (site) {
    case SITE_H:
        see_input(o, at, x, seen);
        break;
    case SITE_Q:
        see_query(o, at, x, seen);
        break;
    case SITE_K:
        see_key(o, at, x, seen);
        break;
    case SITE_V:
        see_value(o, at, x, seen);
        break;
    case SITE_A:
        see_result(o, at, x, seen);
        break;
    default:
        see_added(o, at, x, seen);
    }
}

// How much what is seen at two spots differs, relative to its length: the most of a few seeds. The
// smallest of random angles are hard to see; the largest of 8 is not.
static double difference(Observer *o, int site, Spot a, Spot b) {
    const int n = size_at(site);
    float x[DIM], seen_a[DIM], seen_b[DIM];
    double most = 0;
    some_vector(4, x, DIM);
    for (uint64_t seed = 1; seed <= 8; seed++) {
        a.seed += 1000 * seed;
        b.seed += 1000 * seed;
        see(o, site, 1, a, x, seen_a);
        see(o, site, 1, b, x, seen_b);
        for (int i = 0; i < n; i++)
            seen_b[i] -= seen_a[i];
        most = fmax(most, length_of(seen_b, n) / length_of(seen_a, n));
    }
    return most;
}

// Two glitches differ by .8 and more; what is the same differs by rounding, 3e-7.
static void expect_different(int site, Spot a, Spot b, const char *what) {
    Observer o;
    observer_open(&o);
    cr_expect(difference(&o, site, a, b) > .1,
              "PLACE: at site %c two %s get the same glitch, and should get two different ones",
              SITES[site], what);
    observer_close(&o);
}

static void expect_alike(int site, Spot a, Spot b, const char *what) {
    Observer o;
    observer_open(&o);
    cr_expect(difference(&o, site, a, b) < 1e-5,
              "PLACE: at site %c two %s get different glitches, and should get the same one",
              SITES[site], what);
    observer_close(&o);
}

// Whether anything of x is turned at a spot, for one of a few seeds. Where nothing is, the bits are
// those of a dose of 0.
static bool turns(Observer *o, int site, Spot at) {
    float x[DIM], sober[DIM], seen[DIM];
    bool turned = false;
    some_vector(11, x, DIM);
    for (at.seed = 0; at.seed < 8; at.seed++) {
        see(o, site, 0, at, x, sober);
        see(o, site, 1, at, x, seen);
        turned |= memcmp(sober, seen, (size_t)size_at(site) * sizeof *x) != 0;
    }
    return turned;
}

// The instrument itself: without noise one sees what is there.
static void expect_visible(int site) {
    const int n = size_at(site);
    float x[DIM], seen[DIM];
    Observer o;
    observer_open(&o);
    some_vector(5, x, DIM);
    see(&o, site, 0, HERE, x, seen);
    double scale = length_of(x, n) / length_of(seen, n);
    cr_expect(angle_between(x, seen, n) < 1e-5, // observed 3e-7
              "what is seen at %c is not what is there", SITES[site]);
    if (site != SITE_H) // which is behind a norm
        cr_expect(fabs(scale - 1) < 1e-5, "what is seen at %c is %g times too short", SITES[site],
                  scale);
    cr_expect(turns(&o, site, HERE), "noise at site %c turns nothing", SITES[site]);
    observer_close(&o);
}

/* ------------------------------------------------------------------------------------------------
 * What a glitch does to a vector.
 */
static void expect_length_kept(int site) {
    const int n = size_at(site);
    float x[DIM], sober[DIM], seen[DIM];
    double worst = 1;
    Observer o;
    observer_open(&o);
    for (uint64_t k = 0; k < 20; k++) {
        Spot at = HERE;
        at.seed = k;
        some_vector(10 + k, x, DIM);
        see(&o, site, 0, at, x, sober);
        see(&o, site, 1.5f, at, x, seen);
        double stretch = length_of(seen, n) / length_of(sober, n);
        if (fabs(stretch - 1) > fabs(worst - 1))
            worst = stretch;
    }
    cr_expect(fabs(worst - 1) < 1e-5, // observed 4e-7
              "LENGTH: site %c makes a vector %.3f times as long; a rotation keeps its length",
              SITES[site], worst);
    observer_close(&o);
}

// Twice as long a vector becomes twice as long a turned one. So an angle is the same storm for all.
static void expect_length_ignored(int site) {
    float x[DIM], twice[DIM], seen[DIM], seen_twice[DIM];
    Observer o;
    if (size_at(site) == DIM) // a norm stands before it
        return;
    observer_open(&o);
    some_vector(7, x, DIM);
    for (int j = 0; j < DIM; j++)
        twice[j] = 2 * x[j];
    see(&o, site, 1, HERE, x, seen);
    see(&o, site, 1, HERE, twice, seen_twice);
    for (int j = 0; j < HEAD_DIM; j++)
        seen_twice[j] -= 2 * seen[j];
    double off = length_of(seen_twice, HEAD_DIM) / length_of(seen, HEAD_DIM);
    cr_expect(off < 1e-5, // observed 9e-7
              "LENGTH: site %c does not do the same to a vector twice as long: off by %.3f",
              SITES[site], off);
    observer_close(&o);
}

/* ------------------------------------------------------------------------------------------------
 * On which side of RoPE. RoPE's hands are stopped (frequencies 0, so that positions turn nothing).
 * What is turned before RoPE looks the same then, once RoPE is turned back; what is turned behind
 * it, as it is.
 */
static void stop_hands(Observer *o) {
    static const double frequencies[HEAD_DIM / 2];
    o->bench.model.rope_freq = frequencies;
}

// Relative to the length; of the same, 4e-7.
static double distance(const float *a, const float *b) {
    double sum = 0;
    for (int i = 0; i < HEAD_DIM; i++)
        sum += pow((double)a[i] - (double)b[i], 2);
    return sqrt(sum) / length_of(a, HEAD_DIM);
}

// A reader sees a key turned: as it lies in the cache, RoPE included, or as it was before RoPE?
static void expect_key_turned(bool behind_rope, int window, int family) {
    float key[HEAD_DIM], unturned[HEAD_DIM];
    float seen[HEAD_DIM], seen_before[HEAD_DIM];
    float still[HEAD_DIM], still_before[HEAD_DIM];
    Observer o;
    observer_open(&o);
    o.bench.model.config.sliding_window = window;
    o.family = family;
    some_vector(8, key, HEAD_DIM);
    memcpy(unturned, key, sizeof key);
    turn_back(&o, unturned, HERE.key); // as it was before RoPE
    see(&o, SITE_K, 1, HERE, key, seen);
    memcpy(seen_before, seen, sizeof seen);
    turn_back(&o, seen_before, HERE.key);
    stop_hands(&o);
    see(&o, SITE_K, 1, HERE, key, still);
    see(&o, SITE_K, 1, HERE, unturned, still_before);
    bool behind = distance(seen, still) < 1e-5;
    bool before = distance(seen_before, still_before) < 1e-5;
    cr_expect(behind || before,
              "ROPE: site K turns a key neither as it lies in the cache (behind RoPE) nor as it "
              "was before RoPE: is RoPE turned back by another position than the key's?");
    cr_expect(behind == behind_rope || !(behind || before),
              "ROPE: site K turns a key %s, and not %s",
              behind ? "as it lies in the cache, behind RoPE" : "as it was before RoPE",
              behind ? "as it was before RoPE" : "as it lies in the cache");
    observer_close(&o);
}

static void expect_query_turned_before_rope(void) {
    float query[HEAD_DIM], seen[HEAD_DIM], still[HEAD_DIM];
    Observer o;
    observer_open(&o);
    some_vector(9, query, HEAD_DIM);
    see(&o, SITE_Q, 1, HERE, query, seen);
    stop_hands(&o);
    see(&o, SITE_Q, 1, HERE, query, still);
    cr_expect(distance(seen, still) < 1e-5,
              "ROPE: site Q does not turn the query as it is before RoPE");
    observer_close(&o);
}

/* ------------------------------------------------------------------------------------------------
 * What is left alone.
 */

// What is dosed in other layers only is sober in this one.
static void expect_own_dose(int site) {
    float x[DIM], sober[DIM], seen[DIM];
    Observer o;
    observer_open(&o);
    some_vector(12, x, DIM);
    see(&o, site, 0, HERE, x, sober);
    o.elsewhere = 1;
    see(&o, site, 0, HERE, x, seen);
    cr_expect(!memcmp(sober, seen, (size_t)size_at(site) * sizeof *x),
              "DOSE: site %c of layer %d turns with a dose of another layer", SITES[site],
              HERE.layer);
    observer_close(&o);
}

// From the position `first` on queries are turned, and keys and values are turned while they are
// read; before it, neither.
static void expect_sink(int site, int first) {
    Observer o;
    observer_open(&o);
    Spot at = HERE;
    // At position 0 there is one key, and its weight is 1 whatever becomes of it.
    for (at.query = site == SITE_Q || site == SITE_K; at.query <= 9; at.query++) {
        at.key = at.query; // its own
        bool turned = turns(&o, site, at);
        cr_expect(turned == (at.query >= first),
                  "SINK: a query at position %d is %sturned at site %c", at.query,
                  turned ? "" : "not ", SITES[site]);
    }
    at = HERE;
    for (at.key = 0; at.key <= 9 && (site == SITE_K || site == SITE_V); at.key++) {
        bool turned = turns(&o, site, at);
        cr_expect(turned == (at.key >= first),
                  "SINK: position %d, read by a query at %d, is %sturned at site %c", at.key,
                  at.query, turned ? "" : "not ", SITES[site]);
    }
    observer_close(&o);
}

static bool same(const float *a, const float *b, size_t n) {
    return !memcmp(a, b, n * sizeof *a);
}

// Reads the tokens of G with a noise; the caller frees the sequence. logits: (vocab_size) of the
// last one.
static Sequence read_all(Bench *b, Noise noise, int how, float *logits) {
    Sequence s = sequence_new(noise);
    const float *last = feed(&b->run, &s, G_TOKENS, N_TOKENS, how | WANTS_LOGITS);
    memcpy(logits, last, (size_t)G.vocab_size * sizeof *logits);
    return s;
}

// Reads the tokens of a model of golden.h with these sites dosed, and compares with what
// reference.py says: for sites that an exercise leaves alone.
static void check_golden(FileHeader header, const int *tokens, int sites, const GoldenRow *golden) {
    Bench b;
    bench_open(&b, header, N_TOKENS);
    Sequence s = sequence_new(bench_noise(&b, sites, FAMILY_CENTRED));
    feed(&b.run, &s, tokens, N_TOKENS, DRUGGED | ALL_LOGITS);
    for (int r = FIRST_DRUGGED; r < N_TOKENS; r++) {
        const float *logits = b.run.block[r].logits;
        const GoldenRow *want = &golden[r - FIRST_DRUGGED];
        double off = fabs(length_of(logits, header.vocab_size) / want->norm - 1);
        for (int j = 0; j < N_ENTRIES; j++) {
            double entry = (double)logits[(37 * r + 53 * j + 11) % header.vocab_size];
            off = fmax(off, fabs(entry - want->entry[j]) / want->norm);
        }
        cr_assert(off < 1e-5, // observed 7e-7
                  "GOLDEN: with noise at %s the logits at position %d are no longer what reference.py "
                  "says, off by %.2g: this exercise leaves that site alone", site_letters(sites), r, off);
    }
    sequence_free(&b.model, &s);
    bench_close(&b);
}

static void expect_golden(int site) {
    check_golden(G, G_TOKENS, 1 << site, G_DRUGGED[site]);
    check_golden(M, M_TOKENS, 1 << site, M_DRUGGED[site]);
}

// A block of rows gives the bits that single rows give, whatever their number and their wishes.
static void expect_block(int site) {
    static float together[N_TOKENS][320];
    Bench b;
    bench_open(&b, G, N_TOKENS);
    Noise noise = bench_noise(&b, 1 << site, FAMILY_CENTRED);
    Sequence block = sequence_new(noise), single = sequence_new(noise), few = sequence_new(noise);
    feed(&b.run, &block, G_TOKENS, N_TOKENS, DRUGGED | ALL_LOGITS);
    for (int r = 0; r < N_TOKENS; r++)
        memcpy(together[r], b.run.block[r].logits, sizeof together[r]);
    for (int r = 0; r < N_TOKENS; r++)
        cr_assert(same(feed(&b.run, &single, G_TOKENS + r, 1, DRUGGED | WANTS_LOGITS), together[r], 320),
                  "BLOCK: with noise at site %c the logits at position %d depend on whether its row "
                  "comes alone or in a block", SITES[site], r);
    cr_expect(same(feed(&b.run, &few, G_TOKENS, N_TOKENS, DRUGGED | WANTS_LOGITS), together[N_TOKENS - 1],
                   320),
              "BLOCK: with noise at site %c logits depend on whether those of other rows are wanted",
              SITES[site]);
    sequence_free(&b.model, &block);
    sequence_free(&b.model, &single);
    sequence_free(&b.model, &few);
    bench_close(&b);
}

// A step over the tokens of G with noise at one site.
typedef struct {
    Bench bench;
    Sequence sequence;
    Step step;
} Lesson;

static void lesson_open(Lesson *l, int site) {
    bench_open(&l->bench, G, 1);
    l->sequence = sequence_new(bench_noise(&l->bench, 1 << site, FAMILY_CENTRED));
    step_init(&l->step, &l->bench.model, N_TOKENS);
    step_add(&l->step, &l->sequence, G_TOKENS, N_TOKENS, DRUGGED);
    step_take(&l->step);
}

static void lesson_close(Lesson *l) {
    step_free(&l->step);
    sequence_free(&l->bench.model, &l->sequence);
    bench_close(&l->bench);
}

// A vector of zeros is left alone, and so is the gradient: with values of zeros att is zero.
static void expect_zeros_survive(int site) {
    Lesson l;
    lesson_open(&l, site);
    float *wv = (float *)(uintptr_t)l.bench.model.layers[1].w[WV].data; // of a bench: may be written
    memset(wv, 0, KV_DIM * DIM * sizeof *wv);
    step_take(&l.step);
    const float *dxn = l.step.grads.slots[1].xn;
    const float *dx = l.step.grads.slots[0].x;
    cr_expect(isfinite(l.step.loss) && isfinite(dot(dxn, dxn, N_TOKENS * DIM)) &&
                  isfinite(dot(dx, dx, N_TOKENS * DIM)),
              "ZERO: with noise at site %c vectors of zeros make a loss or a gradient that is no number",
              SITES[site]);
    lesson_close(&l);
}

// With noise in layer 1 only, is it in what lies in the cache of this layer? Keys and values that
// are turned while they are read leave it sober.
static void expect_cache(int site, bool enters) {
    static float logits[320];
    const size_t n = (size_t)N_TOKENS * KV_DIM;
    float theta[N_SITES * MOST_LAYERS] = {0};
    theta[site * G.n_layers + 1] = 1;
    Bench b;
    bench_open(&b, G, N_TOKENS);
    Sequence sober = read_all(&b, (Noise){0}, 0, logits);
    Sequence s = read_all(&b, (Noise){.seed = SEED, .theta = theta}, DRUGGED, logits);
    bool keys = !same(s.k[1], sober.k[1], n);
    bool values = !same(s.v[1], sober.v[1], n);
    cr_expect(keys == enters, "CACHE: noise at site %c is %sin the keys of its own layer",
              SITES[site], keys ? "" : "not ");
    cr_expect(values == enters, "CACHE: noise at site %c is %sin the values of its own layer",
              SITES[site], values ? "" : "not ");
    cr_expect(!same(s.k[2], sober.k[2], n), "CACHE: noise at site %c does not reach the layer "
              "above", SITES[site]);
    sequence_free(&b.model, &s);
    sequence_free(&b.model, &sober);
    bench_close(&b);
}

// Sober is sober to the last bit, with doses of 0 and also where a dosed sequence reads soberly.
static void expect_sober(void) {
    static float want[320], logits[320];
    const char *const why[] = {"a dose of 0", "a row that is not drugged"};
    float nothing[N_SITES * MOST_LAYERS] = {0};
    float much[N_SITES * MOST_LAYERS];
    for (int i = 0; i < N_SITES * MOST_LAYERS; i++)
        much[i] = 1;
    Bench b;
    bench_open(&b, G, N_TOKENS);
    const size_t n = (size_t)N_TOKENS * KV_DIM;
    Sequence sober = read_all(&b, (Noise){0}, 0, want);
    for (int i = 0; i < 2; i++) {
        Noise noise = {.seed = SEED, .theta = i ? much : nothing};
        Sequence s = read_all(&b, noise, i ? 0 : DRUGGED, logits);
        bool same_all = same(logits, want, (size_t)G.vocab_size);
        for (int layer = 0; layer < G.n_layers; layer++)
            same_all &= same(s.k[layer], sober.k[layer], n) && same(s.v[layer], sober.v[layer], n);
        cr_expect(same_all, "SOBER: %s leaves other bits than no noise at all", why[i]);
        sequence_free(&b.model, &s);
    }
    sequence_free(&b.model, &sober);
    bench_close(&b);
}

/* ------------------------------------------------------------------------------------------------
 * Forward and backward draw the same glitch.
 *
 * A function is homogeneous if twice the x gives twice the y; a glitch is, and all of a layer's
 * products are. Such a y has
 *
 *     dy . y = dx . x          (Euler)
 *
 * whatever the loss is: the way back gives what the way forward took. If it goes through another
 * glitch, the books do not balance. No differences are needed for that, so it is a sharp test of
 * where the glitch was drawn. It does not know whether dx is right in every direction; test_step.c
 * does.
 */
static void expect_turn_backward(const Law *law) {
    for (uint64_t i = 0; i < 200; i++) {
        float x[LONG], y[LONG], g[LONG], dy[LONG], u[LONG];
        Place place = nth_place(i, law, 1.5f);
        some_vector(20, x, LONG);
        some_vector(21, dy, LONG);
        memcpy(y, x, sizeof x);
        memcpy(g, dy, sizeof dy);
        turn(place, y, LONG, u);
        turn_backward(place, x, g, LONG, u);
        double off = dot_in_double(dy, y, LONG) - dot_in_double(g, x, LONG);
        off /= length_of(dy, LONG) * length_of(x, LONG);
        cr_assert(fabs(off) < 1e-6, // observed 4e-8
                  "BACKWARD: turn_backward does not go back through the glitch that turn drew, or "
                  "is no derivative of it: family %s, off by %g", law->name, off);
    }
}

// The books of one layer's attention, each a sum over all rows.
typedef struct {
    double q, k, v; // dq . q and so on, as they come out of wq, wk and wv
    double out;     // datt . att, by way of wo: what attention added to x, with the gradient there
    double gain;    // dgain . gain of the attention norm, which is that of the sober xn
    double size;    // of what is added up, for the error
} Books;

static Books books_of(const Step *step, int layer) {
    const Config *c = &step->model->config;
    const Slot *a = &step->acts.slots[layer];
    const Slot *g = &step->grads.slots[layer];
    Books books = {0};
    for (ptrdiff_t r = 0; r < step->n_rows; r++) {
        const float *cos_sin = step->acts.cos_sin + r * c->head_dim;
        float key[KV_DIM];
        memcpy(key, a->k + r * c->kv_dim, sizeof key);
        for (int i = 0; i < c->kv_dim; i += c->head_dim)
            rope_backward(key + i, cos_sin, c->head_dim); // the slot has it behind RoPE
        books.q += dot_in_double(g->q + r * c->q_dim, a->q + r * c->q_dim, c->q_dim);
        books.k += dot_in_double(g->k + r * c->kv_dim, key, c->kv_dim);
        books.v += dot_in_double(g->v + r * c->kv_dim, a->v + r * c->kv_dim, c->kv_dim);
        const float *dxm = g->xm + r * c->dim;
        books.out += dot_in_double(dxm, a->xm + r * c->dim, c->dim);
        books.out -= dot_in_double(dxm, a->x + r * c->dim, c->dim);
        books.size += length_of(g->v + r * c->kv_dim, c->kv_dim)
                    * length_of(a->v + r * c->kv_dim, c->kv_dim);
    }
    const float *gain = step->model->layers[layer].w[ATT_NORM].data;
    books.gain = dot_in_double(dgain(step, layer, ATT_NORM), gain, c->dim);
    return books;
}

// The loss of the lesson with the weights as they are now.
static double loss_now(Step *step) {
    double sum = 0;
    forward(&step->acts, step->rows, step->n_rows);
    for (int r = 0; r < step->n_rows; r++)
        sum += surprise(step->rows[r].logits, G.vocab_size, G_TOKENS[r + 1]);
    return sum / step->n_rows;
}

// By how much the loss changes if the weights of a tensor move along a direction (as many numbers as
// it has), times 1 / how far: from the way forward alone. What is not linear in so long a step goes
// away by extrapolation from two lengths: (4 f(h) - f(2 h)) / 3.
static double slope_of_loss(Step *step, int layer, int which, const float *direction) {
    const float h = .005f;
    int n_out, n_in;
    tensor_shape(&step->model->config, which, &n_out, &n_in);
    const ptrdiff_t n = (ptrdiff_t)n_out * n_in;
    float *w = (float *)(uintptr_t)step->model->layers[layer].w[which].data; // of a bench: may be written
    float *old = resize(NULL, n, sizeof *old);
    double slope[2];
    memcpy(old, w, (size_t)n * sizeof *old);
    for (int i = 0; i < 2; i++) {
        double loss[2];
        for (int side = 0; side < 2; side++) {
            const float far = (i ? 2 * h : h) * (side ? -1 : 1);
            for (ptrdiff_t j = 0; j < n; j++)
                w[j] = old[j] + far * direction[j];
            loss[side] = loss_now(step);
        }
        slope[i] = (loss[0] - loss[1]) / (2 * (double)(i ? 2 * h : h));
    }
    memcpy(w, old, (size_t)n * sizeof *old);
    free(old);
    return (4 * slope[0] - slope[1]) / 3;
}

// If all keys of a layer grow: dk . k, from the way forward alone.
static double slope_of_keys(Step *step, int layer) {
    float growth[KV_DIM * DIM];
    memcpy(growth, step->model->layers[layer].w[WK].data, sizeof growth);
    return slope_of_loss(step, layer, WK, growth);
}

// The result of attention is homogeneous in the values; and it does not change if queries grow as
// keys shrink, so dq.q = dk.k. All three are made of xn.
static void check_books(const Books *books, int site, int layer) {
    double most = 1e-6 * books->size; // observed 3e-8
    double readers = books->q + books->k + books->v;
    cr_expect(fabs(books->q - books->k) < most,
              "BACKWARD: with noise at site %c, layer %d, queries and keys do not go back through "
              "the glitches of the way forward: dq.q is %.6f, dk.k %.6f",
              SITES[site], layer, books->q, books->k);
    cr_expect(fabs(books->v - books->out) < most,
              "BACKWARD: with noise at site %c, layer %d, values do not go back through the "
              "glitches of the way forward: dv.v is %.6f, datt.att %.6f",
              SITES[site], layer, books->v, books->out);
    cr_expect(fabs(readers - books->gain) < most,
              "BACKWARD: with noise at site %c, layer %d, the norm's output does not go back "
              "through the glitches of the way forward: dxn.xn is %.6f, its readers give %.6f",
              SITES[site], layer, books->gain, readers);
}

// dq.q and dk.k could both be wrong in the same way, so the loss itself is asked for one of them.
static void check_slope(Step *step, const Books *books, int site, int layer) {
    double slope = slope_of_keys(step, layer);
    cr_expect(fabs(slope - books->k) < 2e-4 * books->size, // observed 1e-5
              "BACKWARD: with noise at site %c, layer %d, keys do not go back through the glitches "
              "of the way forward: if they all grow, the loss changes %.6f times as much, and the "
              "way back says %.6f times", SITES[site], layer, slope, books->k);
}

static void expect_books(int site) {
    Books books[MOST_LAYERS];
    Lesson l;
    lesson_open(&l, site);
    for (int layer = 0; layer < G.n_layers; layer++)
        books[layer] = books_of(&l.step, layer);
    for (int layer = 0; layer < G.n_layers; layer++) {
        check_books(&books[layer], site, layer);
        check_slope(&l.step, &books[layer], site, layer);
    }
    lesson_close(&l);
}

// The gradient of a tensor as numbers (n). The caller frees it.
static float *gradient_of(const Step *s, int layer, int which, int *n) {
    int n_out, n_in;
    tensor_shape(&s->model->config, which, &n_out, &n_in);
    *n = n_out * n_in;
    float *gradient = resize(NULL, *n, sizeof *gradient);
    add_gradient(s, gradient, 1, layer, which, 0, n_out);
    return gradient;
}

// The gradient of each tensor says what the loss does when the tensor moves in a random direction.
static void expect_gradient(int site) {
    int layer, which, n, n_wrong = 0;
    char last[200] = "";
    Lesson l;
    lesson_open(&l, site);
    for (int i = 0; tensor_at(&l.bench.model.config, i, &layer, &which); i++) {
        step_take(&l.step); // anew, as looking for the slope of the one before went forward
        float *gradient = gradient_of(&l.step, layer, which, &n);
        float *direction = resize(NULL, n, sizeof *direction);
        some_vector((uint64_t)(100 + i), direction, n);
        double told = dot_in_double(gradient, direction, n);
        double seen = slope_of_loss(&l.step, layer, which, direction);
        // In a random direction from -1 to 1 the slope is about |gradient| / sqrt(3).
        double error = fabs(seen - told) / (length_of(gradient, n) / sqrt(3));
        if (!(error < 3e-3)) { // observed 8e-4
            n_wrong++;
            snprintf(last, sizeof last, "%s of layer %d: it moves a little, the loss changes by %.5f, and "
                     "the gradient says by %.5f", TENSOR_NAMES[which], layer, seen, told);
        }
        free(gradient);
        free(direction);
    }
    cr_expect(!n_wrong, "BACKWARD: with noise at site %c the gradients of %d tensors are no slopes of the "
              "loss. The last of them, with the fault just behind it, is %s", SITES[site], n_wrong, last);
    lesson_close(&l);
}
