// Prints the logits of given tokens, a line for each position: logits MODEL.bin ID ID ...
// test_export.py compares them with a forward pass of its own, written in another language.
#define main drugs_main
#include "../drugs.c"
#undef main

int main(int argc, char **argv) {
    Model m;
    Run run;
    Sequence s = sequence_new((Noise){0});
    if (argc < 3) die(2, "usage: logits MODEL.bin ID ID ...");
    if (!model_open(&m, argv[1])) die(1, "%s: %s", argv[1], m.error);
    run_init(&run, &m, 1, 1);
    for (int i = 2; i < argc; i++) {
        int token = atoi(argv[i]);
        if (token < 0 || token >= m.config.vocab_size) die(1, "no such token: %s", argv[i]);
        const float *logits = feed(&m, &run, &s, &token, 1, i - 2, false, true);
        for (int t = 0; t < m.config.vocab_size; t++) printf("%.9g ", (double)logits[t]);
        puts("");
    }
    run_free(&run);
    sequence_free(&m, &s);
    model_close(&m);
    return 0;
}
