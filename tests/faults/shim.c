/* Loaded before libc: from the k-th call of a kind on, calls fail, write half, or kill the process. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SHORT = -1, KILL = -2 };                   /* in place of an errno */
static _Atomic int armed, left, fails, seen;      /* fails: how many calls still fail once it began */
static int error;
static char wanted[16];

void fault_arm(const char *call, int k, int count, int what) {
    armed = 0;
    strncpy(wanted, call, sizeof wanted - 1);
    left = k; fails = count; error = what; seen = 0;
    armed = 1;
}
int fault_disarm(void) { armed = 0; return seen; } /* how many calls were hit */

static int hit(const char *call) {
    if (!armed || strcmp(call, wanted) || atomic_fetch_sub(&left, 1) > 1) return 0;
    if (atomic_fetch_sub(&fails, 1) <= 0) return 0;
    seen++;
    if (error == KILL) kill(getpid(), SIGKILL);
    errno = error;
    return 1;
}

#define REAL(name) ((__typeof__(&name)) dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t n) {
    struct stat is;
    if (armed && !fstat(fd, &is) && S_ISREG(is.st_mode) && hit("write")) { /* files, no pipes or sockets */
        if (error != SHORT) return -1;
        n = (n + 1) / 2;
    }
    return REAL(write)(fd, data, n);
}
int fsync(int fd) { return hit("fsync") ? -1 : REAL(fsync)(fd); }
int rename(const char *from, const char *to) { return hit("rename") ? -1 : REAL(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { return hit("mkdir") ? -1 : REAL(mkdir)(path, mode); }
