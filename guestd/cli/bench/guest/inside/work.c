/* What the benches do inside a guest where Python would be too slow or too heavy: compiled on the host, static.
 *
 *   heap TOTAL_MIB KEEP_MIB LOG     takes memory page by page, gives back all but single pages spread over the whole,
 *                                   then works on those for ever; a line "SECONDS OPERATIONS" in LOG each 100 ms
 *   ramp MIB_PER_SECOND MIB         takes memory at a steady rate; "SECONDS WORST" when all is there, how long it took
 *                                   and how late the worst step was
 *   files DIRECTORY COUNT           makes empty files: memory of the kernel's own that cannot be moved
 *   blocks WORD FIRST COUNT         writes WORD to the state of so many memory blocks; "SECONDS FAILED"
 *   cpu NUMBER VALUE                writes VALUE to a CPU's switch; "SECONDS FAILED"
 *
 * Times are seconds of this kernel's monotonic clock.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define MIB (1UL << 20)

static double now(void)
{
	struct timespec at;
	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec + at.tv_nsec / 1e9;
}

static void sleep_until(double at)
{
	double left = at - now();
	struct timespec pause = {(time_t)left, (long)((left - (time_t)left) * 1e9)};
	if (left > 0)
		nanosleep(&pause, NULL);
}

static char *take(unsigned long bytes)
{
	char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (memory == MAP_FAILED) {
		perror("mmap");
		exit(1);
	}
	madvise(memory, bytes, MADV_NOHUGEPAGE); /* single pages: the worst case for whoever must move them */
	return memory;
}

static int heap(unsigned long total_mib, unsigned long keep_mib, const char *path)
{
	unsigned long pages = total_mib * MIB / PAGE, stride = total_mib / keep_mib, kept = pages / stride;
	char *memory = take(total_mib * MIB);
	FILE *log = fopen(path, "w");
	uint64_t seed = 88172645463325252ULL, operations = 0;
	double due;

	if (!log)
		return 1;
	for (unsigned long page = 0; page < pages; page++)
		memory[page * PAGE] = 1;
	for (unsigned long page = 0; stride > 1 && page < pages; page += stride)
		madvise(memory + (page + 1) * PAGE, (page + stride < pages ? stride - 1 : pages - page - 1) * PAGE, MADV_DONTNEED);
	for (due = now();;) {
		for (int i = 0; i < 200; i++) {
			seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
			uint64_t *words = (uint64_t *)(memory + (seed % kept) * stride * PAGE);
			for (int word = 0; word < 64; word++)
				words[word] += seed;
			operations++;
		}
		char *fresh = take(16 * PAGE); /* every program allocates, and feels it when there is nothing to be had */
		for (int page = 0; page < 16; page++)
			fresh[page * PAGE] = 1;
		munmap(fresh, 16 * PAGE);
		if (now() >= due) {
			fprintf(log, "%.3f %llu\n", now(), (unsigned long long)operations);
			fflush(log);
			due = now() + 0.1;
		}
	}
}

static int ramp(unsigned long rate_mib, unsigned long total_mib)
{
	char *memory = take(total_mib * MIB);
	double began = now(), worst = 0;

	for (unsigned long mib = 0; mib < total_mib; mib++) {
		double due = began + (double)mib / rate_mib;
		sleep_until(due);
		for (unsigned long page = 0; page < MIB / PAGE; page++)
			memory[mib * MIB + page * PAGE] = 1;
		if (now() - due > worst)
			worst = now() - due;
	}
	printf("%.3f %.3f\n", now() - began, worst);
	return 0;
}

static int files(const char *directory, unsigned long count)
{
	char path[256];

	for (unsigned long number = 0; number < count; number++) {
		snprintf(path, sizeof path, "%s/%lu", directory, number);
		int fd = open(path, O_CREAT | O_WRONLY, 0600);
		if (fd < 0) {
			perror(path);
			return 1;
		}
		close(fd);
	}
	return 0;
}

static int put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_TRUNC), failed = fd < 0;

	if (!failed) {
		failed = write(fd, text, strlen(text)) < 0;
		close(fd);
	}
	return failed;
}

static int blocks(const char *word, unsigned long first, unsigned long count)
{
	char path[128];
	int failed = 0;
	double began = now();

	for (unsigned long index = first; index < first + count; index++) {
		snprintf(path, sizeof path, "/sys/devices/system/memory/memory%lu/state", index);
		failed += put(path, word);
	}
	printf("%.6f %d\n", now() - began, failed);
	return 0;
}

static int cpu(const char *number, const char *value)
{
	char path[128];
	double began = now();

	snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%s/online", number);
	int failed = put(path, value);
	printf("%.6f %d\n", now() - began, failed);
	return 0;
}

int main(int count, char **words)
{
	if (count == 5 && !strcmp(words[1], "heap"))
		return heap(strtoul(words[2], NULL, 10), strtoul(words[3], NULL, 10), words[4]);
	if (count == 4 && !strcmp(words[1], "ramp"))
		return ramp(strtoul(words[2], NULL, 10), strtoul(words[3], NULL, 10));
	if (count == 4 && !strcmp(words[1], "files"))
		return files(words[2], strtoul(words[3], NULL, 10));
	if (count == 5 && !strcmp(words[1], "blocks"))
		return blocks(words[2], strtoul(words[3], NULL, 10), strtoul(words[4], NULL, 10));
	if (count == 4 && !strcmp(words[1], "cpu"))
		return cpu(words[2], words[3]);
	fprintf(stderr, "usage: see the top of work.c\n");
	return 2;
}
