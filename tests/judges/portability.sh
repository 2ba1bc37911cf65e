# Whether the digest is the same everywhere: builds tests/digest for every machine that this one can
# be or stand in for, and compares with tests/makers/digest.txt. Machines on which it could not be the same
# must be refused by the build, and no compiler may have a warning to give. What it needs it installs,
# if it may; what cannot be had is skipped by name. Status 1 if anything is otherwise.
cd "$(dirname "$0")/../.." || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
n_same=0

as_root=
[ "$(id -u)" = 0 ] || as_root='sudo -n'
install() {
    command -v apt-get > /dev/null && $as_root true 2> /dev/null &&
        $as_root apt-get install -y -qq --no-install-recommends "$@" > /dev/null 2>&1
}
have() { command -v "$1" > /dev/null; }

# The same digest? compare NAME COMMAND...
compare() {
    name=$1
    shift
    if "$@" > "$work/digest.txt" 2> "$work/errors" && cmp -s "$work/digest.txt" tests/makers/digest.txt; then
        n_same=$((n_same + 1))
        echo "same     $name"
    else
        failed=1
        echo "DIFFERS  $name"
        diff tests/makers/digest.txt "$work/digest.txt" | head -n 3
        head -n 3 "$work/errors"
    fi
}

# build COMPILER FLAGS...: $work/digest. Quietly, as it may be impossible.
build() {
    "$@" -std=gnu11 -ffp-contract=off -w tests/makers/digest.c -o "$work/digest" -lm 2> "$work/errors"
}

# Builds and compares, or says that it cannot be built. try COMPILER FLAGS...
try() {
    if build "$@"; then compare "$*" $run "$work/digest"; else echo "skipped  $*"; fi
}

# Must be refused, in one sentence that is ours. refuse SENTENCE COMPILER FLAGS...
refuse() {
    sentence=$1
    shift
    if build "$@"; then
        failed=1
        echo "BUILT    $*, although $sentence"
    elif grep -m 1 'error' "$work/errors" | grep -q "#error.*$sentence"; then
        echo "refused  $*"
    else
        failed=1
        echo "BROKEN   $*"
        head -n 3 "$work/errors"
    fi
}

# Can this processor do what is asked? supports NAME...
supports() {
    for feature in "$@"; do
        echo "int main(void) { return !__builtin_cpu_supports(\"$feature\"); }" > "$work/cpu.c"
        cc "$work/cpu.c" -o "$work/cpu" 2> /dev/null && "$work/cpu" || return 1
    done
}

[ -n "$as_root" ] || install gcc clang libomp-dev
marches=native
if [ "$(uname -m)" = x86_64 ]; then
    marches="native x86-64"
    supports avx2 fma && marches="$marches haswell znver2"
    supports avx512f avx512bw avx512cd avx512dq avx512vl && marches="$marches skylake-avx512"
fi

# Compiles every program in each of the two languages of today. strict COMPILER
strict() {
    warnings="-Wall -Wextra -Wpedantic -Wshadow -Wstrict-prototypes -Wno-unknown-pragmas -Wno-psabi"
    for language in gnu11 gnu17; do
        verdict='no words'
        for source in drugs.c train_step.c tests/laboratory/lab.c tests/makers/pretrain.c \
                      tests/makers/digest.c tests/judges/bench.c tests/unit/logits.c tests/unit/tokens.c; do
            $1 -std=$language -O1 -ffp-contract=off $warnings -Werror -c $source -o "$work/object" ||
                { failed=1; verdict=WARNINGS; }
        done
        echo "$verdict $1 -std=$language $warnings"
    done
}

run=
for compiler in gcc clang; do
    if ! have $compiler; then echo "skipped  $compiler"; continue; fi
    strict $compiler
    for march in $marches; do
        try $compiler -O3 -march=$march
        try $compiler -O3 -march=$march -fopenmp
    done
    for level in -O0 -O1 -O2; do
        try $compiler $level
        try $compiler $level -march=native -fopenmp
    done
    for threads in 1 2 3 4 5; do
        build $compiler -O3 -march=native -fopenmp &&
            compare "$compiler, $threads threads" env OMP_NUM_THREADS=$threads "$work/digest"
    done
    # A product and a sum in one rounding are one instruction, vfmadd or the like.
    if build $compiler -O3 -march=native && have objdump; then
        if objdump -d "$work/digest" | grep -q 'vfn*m'; then
            failed=1
            echo "FUSED    $compiler -O3 -march=native"
            objdump -d "$work/digest" | grep -m 3 'vfn*m'
        else
            echo "unfused  $compiler -O3 -march=native"
        fi
    fi
done

if [ "$(uname -m)" = x86_64 ]; then
    echo 'int main(void) { return 0; }' > "$work/empty.c"
    gcc -m32 "$work/empty.c" -o "$work/empty" 2> /dev/null || install gcc-multilib ||
        install libc6-dev-i386 "gcc-$(gcc -dumpversion)-multilib"
    m32="-m32 -idirafter /usr/include/x86_64-linux-gnu" # the kernel's headers serve both
    for compiler in gcc clang; do
        try $compiler -O3 $m32 -msse2 -mfpmath=sse
        try $compiler -O1 $m32 -msse2 -mfpmath=sse
    done
    # x87 keeps more digits than a float has: such a build must be refused.
    if gcc -m32 "$work/empty.c" -o "$work/empty" 2> /dev/null; then
        refuse 'more digits than a float has' gcc -O1 $m32 -mfpmath=387
    fi
fi

have musl-gcc || install musl-tools
try musl-gcc -O3 -static

if [ "$(uname -m)" != aarch64 ]; then
    have qemu-aarch64 && have aarch64-linux-gnu-gcc ||
        install qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross
    run=qemu-aarch64
    if have qemu-aarch64; then
        for level in -O0 -O3; do try aarch64-linux-gnu-gcc $level -static; done
        try clang --target=aarch64-linux-gnu -O3 -static
    else
        echo 'skipped  aarch64'
    fi
fi

# A machine that is big-endian, and Windows, which a compiler is told that it is on.
have s390x-linux-gnu-gcc || install gcc-s390x-linux-gnu libc6-dev-s390x-cross
if have s390x-linux-gnu-gcc; then
    refuse 'little-endian, and this machine is not' s390x-linux-gnu-gcc -O1
else
    echo 'skipped  s390x'
fi
have gcc && refuse 'build this in WSL' gcc -D_WIN32

echo "$n_same builds and runs with the same digest"
exit $failed
