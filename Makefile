# make          builds the programs for this machine: drugs, train_step and the laboratory, tests/lab
# make demo     what DRµGS does to a small model that is included
# make lesson   what one gradient step does to it
# make test     all tests
#
# The laboratory
# make trip     how far a glitch carries
# make explore  what doses do to whole texts
# make probe    which words of an answer survive the noise
# make shower   what a cold shower is worth
# make page     a page of all of these to look at, lab.html; MODEL=model.bin: of another model
#
# The classroom
# make exercise judges one of the exercises in tests/classroom/EXERCISES.md: N=4
#
# After a change that is meant
# make digest   what small models compute, as hashes, anew
# make golden   the numbers of the reference, anew
# make pretrain raises the included model anew, tests/fresh.bin; SEED=5 for another one
#
# What judges the tests
# make debug    all tests again, under AddressSanitizer and UndefinedBehaviorSanitizer
# make portability  builds for each machine that this one can stand in for: is the digest the same?
# make mutate   changes one thing at a time and asks whether the tests notice; N=40 SEED=1
# make coverage the lines of the two books and the laboratory that no test runs
# make faults   lets one thing after the other fail: memory, disks, signals, the model's file
# make fuzz     feeds the programs with nonsense, SECONDS=120 for each of five targets (clang)
# make analyse  what clang-tidy, cppcheck and gcc -fanalyzer find, without running anything
# make bench    speed, as ratios against this machine's limits
#
# make clean    removes what was built

CFLAGS = -O3 $(call accepts,-march=native -mtune=generic)
OPENMP = $(call accepts,-fopenmp)

# A flag, if the compiler can build a program with it, else nothing.
accepts = $(shell t=$$(mktemp) && echo 'int main(void) { return 0; }' | \
                  $(CC) $(1) -x c - -o $$t 2>/dev/null && echo $(1); rm -f $$t)

# gnu11 has POSIX's mmap and getline. Sums are never reordered, so -ffast-math has no place here, and a
# product and a sum are always two roundings: left to itself, a compiler fuses them in one place and
# not in another.
FLAGS := -std=gnu11 -ffp-contract=off -Wall -Wextra -Wpedantic -Wshadow -Wno-unknown-pragmas \
         -Wno-psabi $(CFLAGS) $(OPENMP)
SANITIZE = -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined

# Programs are built in tests/; their sources stand in its folders.
VPATH = tests/unit:tests/makers:tests/laboratory:tests/judges
C_TESTS = tests/test_drugs tests/test_properties tests/test_loader tests/test_step tests/test_lab \
          tests/test_more
OTHERS = tests/lab tests/logits tests/tokens tests/pretrain tests/bench tests/digest
PROGRAMS = drugs train_step $(OTHERS)
HEADERS = drugs.c train_step.c tests/laboratory/lab.c $(wildcard tests/*/*.h) .flags
SEED = 2

all: drugs train_step tests/lab

drugs train_step: %: %.c $(HEADERS)
	$(CC) $(FLAGS) $< -o $@ -lm

$(OTHERS): tests/%: %.c $(HEADERS)
	$(CC) $(FLAGS) $< -o $@ -lm

$(C_TESTS): tests/%: %.c $(HEADERS) | criterion
	$(CC) $(FLAGS) $< -o $@ -lcriterion -lm

# Changes when the compiler or its flags do, so that everything is built anew.
.flags: always
	@echo '$(CC) $(FLAGS)' | cmp -s - $@ || echo '$(CC) $(FLAGS)' > $@

criterion:
	@echo '#include <criterion/criterion.h>' | $(CC) -E -x c - > /dev/null 2>&1 || sh tests/unit/get_criterion.sh

# Every line is shown before it runs.
DEMO = ./drugs tests/hamlet.bin -i "To be"
demo: drugs
	@echo; echo '--- sober'
	$(DEMO) -n 48
	@echo; echo '--- a light dose on the values that attention reads: one model, many ways to go on'
	$(DEMO) -n 48 -V .5 -s 3
	$(DEMO) -n 48 -V .5 -s 4
	$(DEMO) -n 48 -V .7 -s 1
	$(DEMO) -n 48 -V .7 -s 3
	@echo; echo '--- the same on the output of attention'
	$(DEMO) -n 48 -A .5 -s 1
	$(DEMO) -n 48 -A .5 -s 5
	$(DEMO) -n 48 -A .7 -s 2
	$(DEMO) -n 48 -A .7 -s 1
	@echo; echo '--- an overdose, on the input of attention: the words hold, the grammar does not'
	$(DEMO) -n 100 -H .8 -s 3
	@echo; echo '--- the same, with a cold shower after every 10 tokens: what was written stays written,'
	@echo '--- but the model remembers it soberly. Seed 3 was chosen: it gains .80 nats a token, where the'
	@echo '--- mean of 100 seeds is .23 +- .07 (make shower)'
	$(DEMO) -n 100 -H .8 -s 3 -c 10

lesson: train_step
	./train_step tests/hamlet.bin

# Text as one word for the shell, whatever spaces and quotes are in it.
quoted = '$(subst ','\'',$(1))'

MODEL = tests/hamlet.bin
ADVICE = Here is some advice: To be a good leader, you must
TRIP = tests/lab $(call quoted,$(MODEL)) trip -i "$(ADVICE)" -V 1
EXPLORE = tests/lab $(call quoted,$(MODEL)) explore -i "To be" -n 64 -k 20
PROBE = tests/lab $(call quoted,$(MODEL)) probe -i "To be" -n 40 -V .5 -k 20
SHOWER = tests/lab $(call quoted,$(MODEL)) shower -i "To be" -n 100 -H .8 -k 100 -s 1
STEP = ./train_step $(call quoted,$(MODEL))
trip: tests/lab
	$(TRIP)

explore: tests/lab
	$(EXPLORE)

probe: tests/lab
	$(PROBE)

shower: tests/lab
	$(SHOWER)

# The numbers stay in the folder lab.
NOTE = The model is $(MODEL).
TABLES = $(patsubst %,lab/%.csv,trip explore probe shower words losses)
page: tests/lab train_step
	rm -f lab.html
	mkdir -p lab
	$(TRIP) -o lab/trip.csv > lab/trip.txt
	$(EXPLORE) -o lab/explore.csv > lab/explore.txt
	$(PROBE) -o lab/probe.csv > lab/probe.txt
	$(SHOWER) -o lab/shower.csv > lab/shower.txt
	$(STEP) -t lab/words.csv -a lab/losses.csv > lab/step.txt
	python3 tests/laboratory/page.py $(TABLES) -o lab.html -n $(call quoted,$(NOTE)) \
		-c $(call quoted,trip=$(TRIP)) -c $(call quoted,explore=$(EXPLORE)) \
		-c $(call quoted,probe=$(PROBE)) -c $(call quoted,shower=$(SHOWER)) \
		-c $(call quoted,step=$(STEP))

pretrain: tests/pretrain
	tests/pretrain tests/fresh.bin $(SEED)

digest: tests/digest
	tests/digest > tests/makers/digest.txt
	cat tests/makers/digest.txt

portability:
	sh tests/judges/portability.sh

# With LLAMA2C=FOLDER, which has run.c and tokenizer.bin, that program is timed as well.
bench: tests/bench
	$(if $(LLAMA2C),$(CC) -Ofast -march=native -fopenmp $(call quoted,$(LLAMA2C)/run.c) -o tests/llama2c -lm)
	tests/bench $(if $(LLAMA2C),tests/llama2c $(call quoted,$(LLAMA2C)/tokenizer.bin))

c_tests: $(C_TESTS) tests/digest
	tests/test_drugs
	tests/test_properties
	tests/test_loader
	tests/test_step
	tests/test_lab
	tests/test_more
	tests/digest | diff tests/makers/digest.txt -

test: $(PROGRAMS) c_tests
	python3 -m unittest discover tests/unit

# A, B, C and D are answers to questions, which the judge finds in its environment.
exercise: $(if $(filter 12,$(N)),tests/lab) | criterion
	@test '$(origin N)' != file || { echo 'which exercise? make exercise N=4'; exit 1; }
	$(CC) $(FLAGS) -O1 -DEXERCISE=$(N) tests/classroom/exercises.c -o tests/exercises -lcriterion -lm
	tests/exercises

golden:
	python3 tests/makers/reference.py > tests/unit/golden.tmp
	mv tests/unit/golden.tmp tests/unit/golden.h

# In the C tests leaks cannot be looked for: Criterion has threads of its own beside each of them. And
# where a sandbox forbids what looking for leaks takes, even -h fails. The sanitizer ends a path at a
# space, so the one to leaks.txt begins in this folder.
debug:
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 $(MAKE) $(PROGRAMS) c_tests CFLAGS='$(SANITIZE)'
	leaks=$$(ASAN_OPTIONS=detect_leaks=1 ./drugs -h > /dev/null 2>&1 && echo 1 || echo 0); \
	echo "leaks are looked for: $$leaks"; \
	LSAN_OPTIONS=print_suppressions=0:suppressions=tests/judges/leaks.txt \
		ASAN_OPTIONS=detect_leaks=$$leaks python3 -m unittest discover tests/unit

# The tree that is changed is a copy. SEED says which changes, 1 unless it is given.
N = 40
mutate: criterion
	python3 tests/judges/mutate.py -n $(N) --seed $(if $(filter file,$(origin SEED)),1,$(SEED))

coverage: criterion
	python3 tests/judges/coverage.py

SECONDS = 120
fuzz: tests/tokens
	python3 tests/judges/fuzz.py $(SECONDS)

analyse:
	sh tests/judges/analyse.sh

faults: drugs train_step tests/lab tests/tokens tests/logits
	python3 tests/judges/faults.py

clean:
	rm -f $(PROGRAMS) $(C_TESTS) tests/exercises tests/llama2c .flags tests/fresh.bin lab.html
	rm -rf lab

.PHONY: all test c_tests exercise golden debug demo lesson trip explore probe shower page pretrain digest \
        portability mutate coverage analyse faults fuzz bench clean criterion always
