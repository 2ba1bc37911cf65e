// A library that lets one thing fail in a program that knows nothing of it. tests/faults.py builds it
// and puts it before the C library (LD_PRELOAD). Linux with glibc, on x86-64 and aarch64.
//
//     FAULT=alloc:K              the K-th allocation finds no memory
//     FAULT=write:K:error:E      the K-th system call that writes fails with errno E
//     FAULT=write:K:signal:S     before it, the process gets the signal S
//     FAULT=write:K:cut:PATH     before it, somebody cuts the file PATH short, to nothing
//     FAULT=write:K:spoil:PATH   before it, somebody overwrites the file PATH, all bytes with 255
//     FAULT_LOG=FILE             gets a line "fault FD" when it happens, where FD is the descriptor, -1
//                                if there is none, and "end ALLOCATIONS WRITES" when the program ends
//
// Writing calls are write, writev, pwrite64, fsync and those that rename. Standard I/O makes them
// inside the C library, where no other function can take their place. So the kernel is asked to stop
// them (seccomp) and to send SIGSYS, whose handler here makes the call itself, with a mark in an
// argument that the call does not use.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
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
static long fail_alloc, fail_write, n_allocs, n_writes;
static char action[16], argument[4096];
static int log_file = -1;

static void say(const char *what, long a, long b) {
    char line[64];
    int n = snprintf(line, sizeof line, "%s %ld %ld\n", what, a, b);
    if (log_file >= 0)
        syscall(SYS_write, log_file, line, n, 0, 0, MARK);
}

// Whether this allocation is the one.
static int fails(void) {
    if (__atomic_add_fetch(&n_allocs, 1, __ATOMIC_RELAXED) != fail_alloc)
        return 0;
    say("fault", -1, 0);
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
    struct stat info;
    static const char bytes[4096] = {[0 ... 4095] = (char)255};
    int file = open(argument, O_WRONLY);
    if (!strcmp(action, "cut") && ftruncate(file, 0))
        _exit(99);
    if (!strcmp(action, "spoil") && !fstat(file, &info))
        for (long at = 0; at < info.st_size; at += sizeof bytes)
            syscall(SYS_pwrite64, file, bytes, sizeof bytes, at, 0, MARK);
    close(file);
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
    if (__atomic_add_fetch(&n_writes, 1, __ATOMIC_RELAXED) == fail_write) {
        say("fault", info->si_syscall == SYS_renameat || info->si_syscall == SYS_renameat2 ? -1 : a[0], 0);
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
        say("no seccomp", errno, 0);
}

__attribute__((constructor))
static void begin(void) {
    const char *fault = getenv("FAULT"), *path = getenv("FAULT_LOG");
    if (path) // a high number, which the program does not meet
        log_file = fcntl(open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666), F_DUPFD_CLOEXEC, 200);
    n_allocs = 0;
    if (fault && sscanf(fault, "alloc:%ld", &fail_alloc) != 1)
        sscanf(fault, "write:%ld:%15[a-z]:%4095s", &fail_write, action, argument);
    stop_writes();
}

__attribute__((destructor))
static void end(void) {
    say("end", n_allocs, n_writes);
}
