// Prints the tokens of texts: tokens MODEL.bin [-x] < TEXTS, a line of ids for each. A zero ends a
// text. -x: control pieces that are spelt in a text are meant. test_tokenizer.py compares the ids
// with those of a tokenizer that was written in another language.
#define DRUGS_LIBRARY
#include "../../drugs.c"

int main(int argc, char **argv) {
    Model model;
    program = "tokens";
    if (argc < 2)
        die(2, "usage: tokens MODEL.bin [-x] < TEXTS");
    if (!model_open(&model, argv[1]))
        die(1, "%s: %s", argv[1], model.error);
    bool controls = argc > 2 && !strcmp(argv[2], "-x");
    char *text = NULL;
    size_t room = 0;
    ssize_t n;
    while ((n = getdelim(&text, &room, '\0', stdin)) > 0) {
        size_t n_text = (size_t)n - !text[n - 1];
        int n_tokens;
        int *tokens = encode(&model, (Source){text, n_text, .bos = true, .controls = controls},
                             &n_tokens);
        for (int i = 0; i < n_tokens; i++)
            printf("%s%d", i ? " " : "", tokens[i]);
        puts("");
        free(tokens);
    }
    if (!feof(stdin))
        die(1, "standard input cannot be read: %s", strerror(errno));
    flush_output();
    free(text);
    model_close(&model);
    return 0;
}
