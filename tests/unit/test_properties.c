/* test_properties.c - what the noise is for, property by property.
 *
 * A deliberate change should turn red what it changes and nothing else; anything more is a mistake.
 * Draw angles by another law, and only angles::follow_the_law_of_their_family is red; freeze the
 * noise, and only place::of_the_query is; turn keys before RoPE, and only
 * rope::a_key_is_turned_behind_it is, and its message says whether they are turned there rightly.
 * How each property is seen is said in properties.h.
 */
#include "properties.h"

Test(angles, follow_the_law_of_their_family) {
    for (int l = 0; l < N_LAWS; l++)
        expect_law(&LAWS[l]);
}

Test(angles, know_nothing_of_the_direction) {
    for (int l = 0; l < N_LAWS; l++)
        expect_angles_know_nothing(&LAWS[l]);
}

Test(directions, lean_as_their_family_does) {
    for (int l = 0; l < N_LAWS; l++)
        expect_lean(&LAWS[l]);
}

Test(observer, sees_what_is_there) {
    for (int i = 0; i < N_JUDGED; i++)
        expect_visible(JUDGED[i]);
}

/* ------------------------------------------------------------------------------------------------
 * What a place is: which of its parts draw another glitch.
 *
 *             site   layer   head   query position   key position
 *     H        x       x                  x
 *     Q, A     x       x       x          x
 *     K, V     x       x       x          x                x
 */
Test(place, of_the_seed) {
    Spot other = HERE;
    other.seed++;
    for (int i = 0; i < N_JUDGED; i++) {
        expect_alike(JUDGED[i], HERE, HERE, "readings of the same");
        expect_different(JUDGED[i], HERE, other, "seeds");
    }
}

Test(place, of_the_layer) {
    Spot other = HERE;
    other.layer++;
    for (int i = 0; i < N_JUDGED; i++)
        expect_different(JUDGED[i], HERE, other, "layers");
}

// Heads 2 and 3 read the same keys and values. At H there are no heads yet.
Test(place, of_the_head) {
    Spot other = HERE;
    other.head++;
    expect_alike(SITE_H, HERE, other, "heads");
    expect_different(SITE_Q, HERE, other, "heads");
    expect_different(SITE_K, HERE, other, "query heads that read the same key");
    expect_different(SITE_V, HERE, other, "query heads that read the same value");
    expect_different(SITE_A, HERE, other, "heads");
}

// Each reader sees another glitch, also of the same key. Noise without this property is frozen.
Test(place, of_the_query) {
    Spot other = HERE;
    other.query++;
    expect_different(SITE_H, HERE, other, "positions (is it frozen?)");
    expect_different(SITE_Q, HERE, other, "positions (is it frozen?)");
    expect_different(SITE_K, HERE, other, "readers of the same key (is it frozen?)");
    expect_different(SITE_V, HERE, other, "readers of the same value (is it frozen?)");
    expect_different(SITE_A, HERE, other, "positions (is it frozen?)");
}

// For the same reader.
Test(place, of_the_key) {
    Spot other = HERE;
    other.key++;
    expect_different(SITE_K, HERE, other, "positions of the key");
    expect_different(SITE_V, HERE, other, "positions of the value");
    expect_alike(SITE_Q, HERE, other, "positions of a key that is read");
}

// The same place at two sites: else Q and A, say, would always turn the same way.
Test(place, of_the_site) {
    const int of_heads[] = {SITE_Q, SITE_K, SITE_V, SITE_A};
    float x[DIM], seen[4][DIM];
    Observer o;
    observer_open(&o);
    some_vector(6, x, DIM);
    for (int i = 0; i < 4; i++)
        see(&o, of_heads[i], 1, HERE, x, seen[i]);
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < i; j++)
            cr_expect(angle_between(seen[i], seen[j], HEAD_DIM) > .01,
                      "PLACE: sites %c and %c get the same glitch, and should get different ones",
                      SITES[of_heads[i]], SITES[of_heads[j]]);
    observer_close(&o);
}

Test(glitch, keeps_the_length) {
    for (int i = 0; i < N_JUDGED; i++)
        expect_length_kept(JUDGED[i]);
}

Test(glitch, does_not_mind_the_length) {
    for (int i = 0; i < N_JUDGED; i++)
        expect_length_ignored(JUDGED[i]);
}

Test(rope, a_key_is_turned_behind_it) {
    expect_key_turned(true, 0, FAMILY_CENTRED);
    expect_key_turned(true, 5, FAMILY_UPSTREAM);
}

Test(rope, a_query_is_turned_before_it) {
    expect_query_turned_before_rope();
}

Test(dose, of_its_own_layer) {
    for (int i = 0; i < N_JUDGED; i++)
        expect_own_dose(JUDGED[i]);
}

// A model that looks at nothing looks at its first tokens.
Test(sink, is_never_turned) {
    for (int i = 0; i < N_JUDGED; i++)
        expect_sink(JUDGED[i], 6);
}

Test(cache, only_H_enters_it) {
    for (int i = 0; i < N_JUDGED; i++)
        expect_cache(JUDGED[i], JUDGED[i] == SITE_H);
}

Test(sober, to_the_last_bit) {
    expect_sober();
}

Test(backward, turn_and_turn_backward_draw_the_same) {
    for (int l = 0; l < N_LAWS; l++)
        expect_turn_backward(&LAWS[l]);
}

Test(backward, attention_goes_back_through_the_same_glitches) {
    for (int i = 0; i < N_JUDGED; i++)
        expect_books(JUDGED[i]);
}
