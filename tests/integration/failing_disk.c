/* Preloaded into a process: a disk that fails when it is told to, and counts its syncs.
 *
 * The file named by FAILING_DISK is shared memory: see `struct control`. Only files whose path holds `match` are
 * concerned. A failed sync leaves what was written in the page cache, as a real one does.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

struct control {
    int32_t sync_errno;  /* every sync fails with this; 0: none does */
    int32_t write_errno; /* every write, likewise */
    int32_t synced;      /* syncs that went well */
    int32_t failed;      /* calls that were failed */
    char match[64];
};

static struct control *control;

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("FAILING_DISK");
    int fd = path ? open(path, O_RDWR) : -1;
    if (fd < 0)
        return;
    void *shared = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (shared != MAP_FAILED)
        control = shared;
    close(fd);
}

static int concerned(int fd)
{
    char link[32], path[4096];
    if (!control)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return strstr(path, control->match) != NULL;
}

static int fails(int fd, int32_t wanted)
{
    if (!wanted || !concerned(fd))
        return 0;
    __atomic_add_fetch(&control->failed, 1, __ATOMIC_SEQ_CST);
    errno = wanted;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int count(int fd, int result)
{
    if (result == 0 && concerned(fd))
        __atomic_add_fetch(&control->synced, 1, __ATOMIC_SEQ_CST);
    return result;
}

int fsync(int fd) { return control && fails(fd, control->sync_errno) ? -1 : count(fd, REAL(fsync)(fd)); }

int fdatasync(int fd) { return control && fails(fd, control->sync_errno) ? -1 : count(fd, REAL(fdatasync)(fd)); }

ssize_t write(int fd, const void *data, size_t size)
{
    return control && fails(fd, control->write_errno) ? -1 : REAL(write)(fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at)
{
    return control && fails(fd, control->write_errno) ? -1 : REAL(pwrite)(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
    return control && fails(fd, control->write_errno) ? -1 : REAL(pwrite64)(fd, data, size, at);
}
