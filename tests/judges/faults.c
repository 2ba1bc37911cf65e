// A library that lets one thing fail in a program that knows nothing of it. tests/judges/faults.py builds it
// and puts it before the C library (LD_PRELOAD). Linux with glibc, on x86-64 and aarch64.
//
//     FAULT=alloc:K              the K-th allocation finds no memory
//     FAULT=write:K:error:E      the K-th system call that writes fails with errno E
//     FAULT=write:K:signal:S     before it, the process gets the signal S
//     FAULT=write:K:cut:PATH     before it, somebody cuts the file PATH short, to nothing
//     FAULT=write:K:spoil:PATH   before it, somebody overwrites the file PATH, all bytes with 255
//     FAULT=write:K:paste:PATH   before it, somebody overwrites it with the bytes of PATH.other
//     FAULT=read:K:error:E       the K-th system call that reads fails with errno E; and each one gives
//                                a third of its file at most, or of a pipe a byte, so that there is a
//                                middle. Only standard input and what lies in the current folder count.
//     FAULT_LOG=FILE             gets a line "fault FD" when it happens, where FD is the descriptor, -1
//                                if there is none, and "end ALLOCATIONS WRITES READS" when the program
//                                ends
//
// Writing calls are write, writev, pwrite64, fsync and those that rename; reading ones are read and
// pread64. A file that is mapped is read without a call: what a disk does to it there is what a cut
// does. Standard I/O makes its calls inside the C library, where no other function can take their
// place. So the kernel is asked to stop them (seccomp) and to send SIGSYS, whose handler here makes the
// call itself, with a mark in an argument that the call does not use.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);

enum { MARK = 0x5EC0FF }; // in the sixth argument
static long fail_alloc, fail_write, fail_read, n_allocs, n_writes, n_reads;
static bool short_reads;
static char action[16], argument[4096], here[PATH_MAX];
static int log_file = -1;

static void say(const char *what, long a, long b, long c) {
    char line[96];
    int n = snprintf(line, sizeof line, "%s %ld %ld %ld\n", what, a, b, c);
    if (log_file >= 0)
        syscall(SYS_write, log_file, line, n, 0, 0, MARK);
}

// Whether this allocation is the one.
static int fails(void) {
    if (__atomic_add_fetch(&n_allocs, 1, __ATOMIC_RELAXED) != fail_alloc)
        return 0;
    say("fault", -1, 0, 0);
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t n) {
    return fails() ? NULL : __libc_malloc(n);
}

void *calloc(size_t count, size_t size) {
    return fails() ? NULL : __libc_calloc(count, size);
}

void *realloc(void *old, size_t n) {
    return fails() ? NULL : __libc_realloc(old, n);
}

// What somebody else does to a file meanwhile.
static void harm(void) {
    char bytes[4096], other[sizeof argument + 8];
    int file = open(argument, O_RDWR);
    snprintf(other, sizeof other, "%s.other", argument);
    if (!strcmp(action, "cut") && ftruncate(file, 0))
        _exit(99);
    int from = open(strcmp(action, "spoil") ? other : argument, O_RDONLY);
    long n;
    for (long at = 0; strcmp(action, "cut") && (n = pread(from, bytes, sizeof bytes, at)) > 0; at += n) {
        if (!strcmp(action, "spoil"))
            memset(bytes, 255, sizeof bytes);
        syscall(SYS_pwrite64, file, bytes, n, at, 0, MARK);
    }
    close(from);
    close(file);
}

// Whether a descriptor is one of those whose reads count.
static bool counts(int file) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    long n = readlink(link, path, sizeof path - 1);
    path[n < 0 ? 0 : n] = '\0';
    return file == STDIN_FILENO || (*here && !strncmp(path, here, strlen(here)));
}

// Before a call that reads: the error that it meets as a negative number, or 0, with less to read.
static long read_less(const long *a, size_t *size) {
    struct stat info;
    if (!short_reads || !counts((int)a[0]) || fstat((int)a[0], &info))
        return 0;
    if (__atomic_add_fetch(&n_reads, 1, __ATOMIC_RELAXED) == fail_read) {
        say("fault", a[0], 0, 0);
        return -atoi(argument);
    }
    size_t most = S_ISREG(info.st_mode) ? (size_t)info.st_size / 3 + 1 : 1;
    *size = *size < most ? *size : most;
    return 0;
}

static void stopped(int number, siginfo_t *info, void *context) {
    (void)number;
    mcontext_t *cpu = &((ucontext_t *)context)->uc_mcontext;
#ifdef __x86_64__
    greg_t *r = cpu->gregs;
    long a[4] = {r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10]};
#else
    long a[4] = {cpu->regs[0], cpu->regs[1], cpu->regs[2], cpu->regs[3]};
#endif
    long result = 0;
    bool reads = info->si_syscall == SYS_read || info->si_syscall == SYS_pread64;
    if (reads)
        result = read_less(a, (size_t *)&a[2]);
    else if (__atomic_add_fetch(&n_writes, 1, __ATOMIC_RELAXED) == fail_write) {
        say("fault", info->si_syscall == SYS_renameat || info->si_syscall == SYS_renameat2 ? -1 : a[0], 0, 0);
        if (!strcmp(action, "error"))
            result = -atoi(argument);
        else if (!strcmp(action, "signal"))
            kill(getpid(), atoi(argument));
        else
            harm();
    }
    if (!result) {
        int before = errno;
        result = syscall(info->si_syscall, a[0], a[1], a[2], a[3], 0, MARK);
        if (result < 0)
            result = -errno;
        errno = before;
    }
#ifdef __x86_64__
    r[REG_RAX] = result;
#else
    cpu->regs[0] = result;
#endif
}

#define TRAP(call) \
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_##call, 0, 1), \
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP)

// Only the lower half of the sixth argument is compared; that will do.
static void stop_writes(void) {
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[5])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, MARK, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        TRAP(write), TRAP(writev), TRAP(pwrite64), TRAP(fsync), TRAP(renameat), TRAP(renameat2),
        TRAP(read), TRAP(pread64),
#ifdef SYS_rename
        TRAP(rename),
#endif
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    struct sigaction handler = {.sa_sigaction = stopped, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSYS, &handler, NULL);
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        say("no seccomp", errno, 0, 0);
}

__attribute__((constructor))
static void begin(void) {
    const char *fault = getenv("FAULT"), *path = getenv("FAULT_LOG");
    if (path) // a high number, which the program does not meet
        log_file = fcntl(open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666), F_DUPFD_CLOEXEC, 200);
    n_allocs = 0;
    short_reads = fault && sscanf(fault, "read:%ld:error:%4095s", &fail_read, argument) == 2;
    if (fault && !short_reads && sscanf(fault, "alloc:%ld", &fail_alloc) != 1)
        sscanf(fault, "write:%ld:%15[a-z]:%4095s", &fail_write, action, argument);
    if (!getcwd(here, sizeof here))
        *here = '\0';
    stop_writes();
}

__attribute__((destructor))
static void end(void) {
    say("end", n_allocs, n_writes, n_reads);
}
