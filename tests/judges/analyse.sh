# What can be found without running anything: clang-tidy, cppcheck and gcc -fanalyzer, each where it is
# installed. Status 1 if one of them has a finding. What they are not asked, and what was answered,
# stands here with its reason.
cd "$(dirname "$0")/../.." || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
programs="drugs.c train_step.c tests/laboratory/lab.c tests/makers/pretrain.c"
checks='-*,bugprone-*,cert-*,clang-analyzer-*'
without() { checks="$checks,-$1"; }
answer() { echo "$1" >> "$work/answered"; }

# mathematics has functions of two vectors and of three sizes
without bugprone-easily-swappable-parameters
# numbers of a file and of an option are checked when they are read; -m32 and make debug see the rest
without bugprone-narrowing-conversions
without bugprone-implicit-widening-of-multiplication-result
# whether all was written is asked once, of the stream, when it is flushed or closed
without cert-err33-c
# one file is one program, and the next one includes it
without bugprone-suspicious-include
# if (strcmp(a, b)) is C
without bugprone-suspicious-string-compare
# memcpy_s and its kin are not in libc
without 'clang-analyzer-security.insecureAPI.*'
# a member stands where it is explained
without 'clang-analyzer-optin.performance.Padding'
# lost_page ends the program, and its signal comes while we read, not while a stream is busy
without bugprone-signal-handler
without cert-sig30-c
# a list of pointers is what is meant
without bugprone-sizeof-expression

# sscanf of two floats: how many it found is looked at, and then each of them
answer 'sscanf(text + 1, "%f=%f%n"'
# a run has one slot at least
answer 'memcpy(x + r * dim, embedding'
# a slot has all its buffers
answer 'memcpy(grads->xm, dx'
# room was made for a prompt, and that has a token at least
answer 'memcpy(s.k[l], lab->sequence.k[l]'
answer 'memcpy(s.tokens, lab->prompt'

# cppcheck takes a register of floats for one float
answer 'memcpy(half, sum'
# a prompt has a token at least, and a question's last one asks for logits
answer 'logits[argmax(logits, n)]'
# the heap holds merges that have a pair, and nothing else
answer 'pair->rank'
answer 'pair->left'
# a vocabulary has a piece at least, and the largest exp is 1
answer 'return log(sum) + max'

found=0
# Shows the findings among what TOOL says, each with its line of code. report TOOL < OUTPUT
report() {
    grep -A 1 -E ': (warning|error): ' | grep -v '^--$' | paste - - |
        grep -v -F -f "$work/answered" > "$work/findings"
    cat "$work/findings"
    echo "$1: $(grep -c . "$work/findings") findings"
    [ ! -s "$work/findings" ] || found=1
}

if command -v clang-tidy > /dev/null; then
    for program in $programs; do
        clang-tidy --quiet --checks="$checks" $program -- -std=gnu11
    done > "$work/said" 2> /dev/null
    report clang-tidy < "$work/said"
else
    echo 'skipped: clang-tidy'
fi
if command -v cppcheck > /dev/null; then
    cppcheck --quiet --std=c11 --enable=warning,performance,portability \
        --template='{file}:{line}: warning: {message} [{id}]\n{code}' $programs 2> "$work/said"
    report cppcheck < "$work/said"
else
    echo 'skipped: cppcheck'
fi
# What is not given back when a program ends early is not a leak; make debug looks for the others.
# And gcc 12 counts the bits of a vector of numbers as if it were one number.
if gcc -fanalyzer -E -x c /dev/null > /dev/null 2>&1; then
    for program in $programs; do
        gcc -std=gnu11 -O1 -fanalyzer -Wno-analyzer-malloc-leak -Wno-analyzer-file-leak \
            -Wno-analyzer-shift-count-overflow \
            -c $program -o "$work/object"
    done 2> "$work/said"
    report 'gcc -fanalyzer' < "$work/said"
else
    echo 'skipped: gcc -fanalyzer'
fi
exit $found
