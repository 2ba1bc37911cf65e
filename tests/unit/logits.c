// Prints the logits of given tokens, a line for each position: logits MODEL.bin ID ID ...
// test_export.py compares them with a forward pass of its own, written in another language.
#define DRUGS_LIBRARY
#include "../../drugs.c"

int main(int argc, char **argv) {
    Model model;
    Run run;
    Sequence sequence = sequence_new((Noise){0});
    program = "logits";
    if (argc < 3)
        die(2, "usage: logits MODEL.bin ID ID ...");
    if (!model_open(&model, argv[1]))
        die(1, "%s: %s", argv[1], model.error);
    run_init(&run, &model, 1, 1);
    for (int i = 2; i < argc; i++) {
        int vocab_size = model.config.vocab_size;
        int token = atoi(argv[i]);
        if (token < 0 || token >= vocab_size)
            die(1, "no such token: %s", argv[i]);
        const float *logits = feed(&run, &sequence, &token, 1, WANTS_LOGITS);
        for (int t = 0; t < vocab_size; t++)
            printf("%.9g ", (double)logits[t]);
        puts("");
    }
    flush_output();
    run_free(&run);
    sequence_free(&model, &sequence);
    model_close(&model);
    return 0;
}
