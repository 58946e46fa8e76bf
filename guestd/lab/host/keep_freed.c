/*
 * Preloaded into an emulating QEMU, so that a hot-removed CPU does not corrupt its heap.
 *
 * QEMU 7.2 to at least 10.0 frees an emulated CPU when it is unplugged, but leaves it in the list of those
 * whose TLB and jump cache are flushed at each change of the memory map, and the next CPU to be plugged is
 * such a change. It then writes into freed memory and sooner or later aborts (seen here: at the first CPU
 * that was plugged after three had been unplugged). What was freed around the end of a CPU thread is
 * therefore kept: such a CPU stays a harmless zombie, at a cost of a few MiB.
 *
 * No headers, so that tcc alone can compile it.
 */
typedef unsigned long size_t;
struct timespec { long seconds, nanoseconds; };

extern void __libc_free(void *);
extern size_t malloc_usable_size(void *);
extern int clock_gettime(int, struct timespec *);
extern void *dlsym(void *, const char *);

#define RTLD_NEXT ((void *)-1L)
#define CLOCK_MONOTONIC 1
#define KEEP_SECONDS 3
#define KEEP_BYTES 1024 /* smaller blocks are none of those written to later */

static volatile long keep_until;

static long now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.seconds;
}

int pthread_join(unsigned long thread, void **result)
{
    int (*real)(unsigned long, void **) = dlsym(RTLD_NEXT, "pthread_join");
    int error;

    keep_until = now() + KEEP_SECONDS;
    error = real(thread, result);
    keep_until = now() + KEEP_SECONDS;
    return error;
}

void free(void *block)
{
    if (block && keep_until && malloc_usable_size(block) >= KEEP_BYTES) {
        if (now() <= keep_until)
            return;
        keep_until = 0;
    }
    __libc_free(block);
}
