// Targets for libFuzzer; make fuzz builds and runs each of them, see tests/judges/fuzz.py:
//
//     -DTARGET_FILE    the bytes of a model file: parsed, a text encoded, logits, a step
//     -DTARGET_TEXT    a text: encoded by a vocabulary of each kind, and printed again
//     -DTARGET_DRUGS   a command line of drugs, an argument a line
//     -DTARGET_STEP    a command line of train_step
//
// A program that refuses its input exits. Here exit comes back to the target instead, and what was
// taken by then is given back. FUZZ_MODELS is a folder of models, named 0.bin and so on.
#define _GNU_SOURCE
#include <errno.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static jmp_buf back;
__attribute__((noreturn)) static void come_back(void) {
    longjmp(back, 1);
}

// Every allocation is in a list, in front of its bytes.
typedef struct Block {
    struct Block *next, *previous;
    size_t size;
    size_t spare; // keeps what follows at a multiple of 16
} Block;
static Block blocks = {&blocks, &blocks, 0, 0};

static void *take(void *old, size_t n) {
    Block *block = old ? (Block *)old - 1 : NULL;
    if (n > 1 << 28)
        return NULL; // a machine with little memory
    Block *fresh = calloc(1, sizeof *fresh + n);
    *fresh = (Block){blocks.next, &blocks, n, 0};
    blocks.next->previous = fresh;
    blocks.next = fresh;
    if (block) {
        memcpy(fresh + 1, old, block->size < n ? block->size : n);
        block->previous->next = block->next;
        block->next->previous = block->previous;
        free(block);
    }
    return fresh + 1;
}

// What is not in the list is the C library's: from open_memstream, getline.
static void give(void *memory) {
    Block *block = blocks.next;
    while (block != &blocks && block + 1 != memory)
        block = block->next;
    if (block == &blocks) {
        free(memory);
        return;
    }
    block->previous->next = block->next;
    block->next->previous = block->previous;
    free(block);
}

// The mapped file of a program that left without giving it back: a system has only so many mappings.
static struct {
    void *at;
    size_t n;
} mapping;

static void *take_mapping(size_t n, int prot, int flags, int file) {
    mapping.n = n;
    return mapping.at = mmap(NULL, n, prot, flags, file, 0);
}

static int give_mapping(void *at, size_t n) {
    mapping.at = NULL;
    return munmap(at, n);
}

static void give_all(void) {
    while (blocks.next != &blocks)
        give(blocks.next + 1);
    if (mapping.at && mapping.at != MAP_FAILED)
        give_mapping(mapping.at, mapping.n);
}

static char *copy_text(const char *text, size_t n) {
    char *copy = take(NULL, strnlen(text, n) + 1);
    return memcpy(copy, text, strnlen(text, n));
}

#define exit(status) come_back()
#define atexit(function) ((void)(function))
#define calloc(count, size) take(NULL, (count) * (size))
#define realloc(old, size) take(old, size)
#define free(memory) give((void *)(memory))
#define strdup(text) copy_text(text, SIZE_MAX)
#define strndup(text, n) copy_text(text, n)
#define mmap(any, n, prot, flags, file, from) take_mapping(n, prot, flags, file)
#define munmap(at, n) give_mapping(at, n)
#define realpath(path, none) (access(path, F_OK) ? NULL : copy_text(path, SIZE_MAX))
#ifdef TARGET_DRUGS
#define main program_main
#include "../../drugs.c"
#elif defined TARGET_STEP
#define DRUGS_LIBRARY
#define main program_main
#include "../../train_step.c"
#else
#define DRUGS_LIBRARY
#define TRAIN_STEP_LIBRARY
#include "../../train_step.c"
#endif
#undef main
#undef free

static char folder[4096]; // of the models

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    const char *models = getenv("FUZZ_MODELS");
    snprintf(folder, sizeof folder, "%s", models ? models : ".");
    return 0;
}

#if defined TARGET_DRUGS || defined TARGET_STEP
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    enum { MOST = 32 };
    char *copy = strcpy(malloc(n + 1), "");
    memcpy(copy, data, n);
    copy[n] = '\0';
    char model[5000];
    snprintf(model, sizeof model, "%s/%c.bin", folder, n && data[0] % 8 < 5 ? '0' + data[0] % 8 : '0');
    char *argv[MOST + 1] = {"program", model};
    int argc = 2;
    for (char *one = strtok(copy, "\n"); one && argc < MOST; one = strtok(NULL, "\n"))
        if (one != copy) // which chooses the model
            argv[argc++] = one;
    // Only files of the folder in which it runs are read and written.
    if (!memchr(copy, '/', n) && !memchr(data, '/', n)) {
        optind = 0; // getopt begins anew
        opterr = 0;
        getopt(1, (char *[]){"program", NULL}, "");
        if (!setjmp(back))
            program_main(argc, argv);
        give_all();
#ifdef TARGET_STEP
        remove_unfinished(); // as at an exit
        memset(unfinished, 0, sizeof unfinished);
#endif
        for (int file = 3; file < 64; file++)
            if (file > 8)
                close(file); // of streams that were left open
        clearerr(stdin);
    }
    free(copy);
    return 0;
}
#elif defined TARGET_TEXT
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    static Model models[10];
    static int n_models;
    while (!n_models || (n_models < 10 && models[n_models - 1].file)) {
        char path[5000];
        snprintf(path, sizeof path, "%s/%d.bin", folder, n_models);
        if (!model_open(&models[n_models], path))
            break;
        n_models++;
        blocks.next = blocks.previous = &blocks; // these stay
        mapping.at = NULL;
    }
    if (n < 2 || !n_models)
        return 0;
    const Model *m = &models[data[0] % n_models];
    Source source = {(const char *)data + 2, n - 2, data[1] % 3, .bos = data[1] & 4, .controls = data[1] & 8};
    if (setjmp(back)) {
        give_all();
        return 0;
    }
    int n_tokens;
    int *tokens = encode(m, source, &n_tokens);
    for (int i = 0; i < n_tokens; i++)
        if (tokens[i] < 0 || tokens[i] >= m->config.vocab_size)
            abort();
    char *text;
    size_t size;
    Printer printer = {.to = open_memstream(&text, &size), .at_start = !source.start};
    for (int i = 0; i < n_tokens; i++)
        print_token(&printer, m, tokens[i]);
    print_rest(&printer);
    fclose(printer.to);
    // Plain text comes back as it was.
    bool plain = !source.controls && source.start == AT_START;
    for (size_t i = 0; i < source.n; i++)
        plain = plain && source.bytes[i] >= '!' && source.bytes[i] <= '~';
    bool has_bytes = true;
    for (int byte = 0; byte < 256; byte++)
        has_bytes = has_bytes && symbol_of_byte(m, (char)byte) >= 0;
    if (plain && has_bytes)
        if (size != source.n || memcmp(text, source.bytes, size))
            abort();
    free(text);
    give(tokens);
    give_all();
    return 0;
}
#else
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    char *bytes;
    if (posix_memalign((void **)&bytes, 64, n + 1))
        return 0;
    memcpy(bytes, data, n);
    Model m;
    if (!setjmp(back) && model_parse(&m, bytes, n)) {
        const Config *c = &m.config;
        int n_tokens;
        int *tokens = tokens_of(&m, "ab the 12\xC3\xA9\n <s>", &n_tokens);
        n_tokens = min(n_tokens, min(12, c->seq_len));
        float theta[N_SITES * 4096];
        for (int i = 0; i < N_SITES * 4096; i++)
            theta[i] = .3f;
        Noise noise = {1, FAMILY_CENTRED, theta};
        Step step;
        step_init(&step, &m, n_tokens);
        Sequence sequence = sequence_new(noise);
        if (n_tokens > 1) {
            step_add(&step, &sequence, tokens, n_tokens, DRUGGED);
            step_take(&step);
            Stepped stepped;
            stepped_init(&stepped, &step, 2);
            Sequence other = sequence_new((Noise){0});
            other.step_size = .01f;
            const float *logits = feed(&stepped.run, &other, tokens, n_tokens, WANTS_LOGITS);
            char *text = text_of(&m, (int[]){argmax(logits, c->vocab_size)}, 1);
            free(text);
        }
    }
    give_all();
    free(bytes);
    return 0;
}
#endif
