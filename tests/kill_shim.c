/* Ends the process by SIGKILL at the n-th call that changes a file below one folder: preloaded, armed by kill_arm().
   A write that is to be the last one writes half of its bytes first. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char under[PATH_MAX];
static long at, count;

void kill_arm(const char *folder, long n) { snprintf(under, sizeof under, "%s", folder); at = n; count = 0; }
long kill_count(void) { return count; }

static int path_counts(const char *path) { return under[0] && strncmp(path, under, strlen(under)) == 0; }

static int fd_counts(int fd) {
    char link[64], path[PATH_MAX];
    if (!under[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return path_counts(path);
}

static int place_counts(int dir, const char *path) { return path[0] == '/' ? path_counts(path) : fd_counts(dir); }
static int last(void) { return __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST) == at; }
static void end(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

#define NEXT(type, name, ...) static type (*next)(__VA_ARGS__); if (!next) next = (type (*)(__VA_ARGS__)) dlsym(RTLD_NEXT, name)

ssize_t write(int fd, const void *data, size_t size) {
    NEXT(ssize_t, "write", int, const void *, size_t);
    if (fd_counts(fd) && last()) { next(fd, data, size / 2); end(); }
    return next(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    NEXT(ssize_t, "pwrite", int, const void *, size_t, off_t);
    if (fd_counts(fd) && last()) { next(fd, data, size / 2, offset); end(); }
    return next(fd, data, size, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    NEXT(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    if (fd_counts(fd) && last()) { next(fd, data, size / 2, offset); end(); }
    return next(fd, data, size, offset);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
    NEXT(ssize_t, "writev", int, const struct iovec *, int);
    if (fd_counts(fd) && last()) end();
    return next(fd, parts, n);
}
int fsync(int fd) {
    NEXT(int, "fsync", int);
    if (fd_counts(fd) && last()) end();
    return next(fd);
}
int fdatasync(int fd) {
    NEXT(int, "fdatasync", int);
    if (fd_counts(fd) && last()) end();
    return next(fd);
}
int rename(const char *from, const char *to) {
    NEXT(int, "rename", const char *, const char *);
    if (path_counts(to) && last()) end();
    return next(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    NEXT(int, "renameat", int, const char *, int, const char *);
    if (place_counts(b, to) && last()) end();
    return next(a, from, b, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    NEXT(int, "renameat2", int, const char *, int, const char *, unsigned);
    if (place_counts(b, to) && last()) end();
    return next(a, from, b, to, flags);
}
int ftruncate(int fd, off_t size) {
    NEXT(int, "ftruncate", int, off_t);
    if (fd_counts(fd) && last()) end();
    return next(fd, size);
}
int ftruncate64(int fd, off64_t size) {
    NEXT(int, "ftruncate64", int, off64_t);
    if (fd_counts(fd) && last()) end();
    return next(fd, size);
}
int unlink(const char *path) {
    NEXT(int, "unlink", const char *);
    if (path_counts(path) && last()) end();
    return next(path);
}
int unlinkat(int dir, const char *path, int flags) {
    NEXT(int, "unlinkat", int, const char *, int);
    if (place_counts(dir, path) && last()) end();
    return next(dir, path, flags);
}
int rmdir(const char *path) {
    NEXT(int, "rmdir", const char *);
    if (path_counts(path) && last()) end();
    return next(path);
}
int mkdir(const char *path, mode_t mode) {
    NEXT(int, "mkdir", const char *, mode_t);
    if (path_counts(path) && last()) end();
    return next(path, mode);
}
int mkdirat(int dir, const char *path, mode_t mode) {
    NEXT(int, "mkdirat", int, const char *, mode_t);
    if (place_counts(dir, path) && last()) end();
    return next(dir, path, mode);
}
