/* Keeps QEMU's software emulation (TCG) alive after a vCPU was unplugged. Preloaded by the lab, only there.
 *
 * QEMU 7.2, the one in Debian 12, forgets to unregister an unplugged vCPU's memory listener. The next change
 * of the memory map (the next CPU, a DIMM, a PCI device) flushes the TLB of a vCPU that was freed, and the
 * heap is corrupt. Only TCG registers that listener; under KVM there is nothing to mend.
 *
 * What the dangling listener writes to (vCPU, TLB tables, jump cache) is therefore never given back: free()
 * does nothing in a thread between the end of a vCPU thread that it joined and the end of the critical section
 * (the big lock) in which it tears that vCPU down, and it does nothing in the RCU thread. A lab machine
 * lives for minutes and loses about 1 MiB for each unplugged vCPU.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <string.h>

struct thread_arguments { /* of qemu_thread_create(), util/qemu-thread-posix.c */
	void *(*start)(void *);
	void *argument;
	char *name;
};

enum { MOST_VCPUS = 4096 };
static pthread_t vcpu_threads[MOST_VCPUS];
static int vcpus;

enum state { NORMAL, JOINED, TEARING_DOWN, RCU };
static __thread enum state state __attribute__((tls_model("initial-exec")));
static __thread pthread_mutex_t *big_lock __attribute__((tls_model("initial-exec")));

struct start { void *(*routine)(void *); void *argument; };

extern void __libc_free(void *);

void free(void *block)
{
	if (state == NORMAL || state == JOINED)
		__libc_free(block);
}

static void *rcu_thread(void *argument)
{
	struct start start = *(struct start *)argument;

	state = RCU;
	return start.routine(start.argument);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*routine)(void *), void *argument)
{
	static int (*create)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
	static struct start rcu;
	const struct thread_arguments *qemu = argument;
	int is_vcpu = 0, result;

	if (!create)
		create = dlsym(RTLD_NEXT, "pthread_create");
	if (argument && qemu->name) {
		is_vcpu = !strncmp(qemu->name, "CPU ", 4);
		if (!strcmp(qemu->name, "call_rcu")) {
			rcu = (struct start){ routine, argument };
			return create(thread, attributes, rcu_thread, &rcu);
		}
	}
	result = create(thread, attributes, routine, argument);
	if (!result && is_vcpu && vcpus < MOST_VCPUS)
		vcpu_threads[vcpus++] = *thread;
	return result;
}

int pthread_join(pthread_t thread, void **value)
{
	static int (*join)(pthread_t, void **);
	int result, i;

	if (!join)
		join = dlsym(RTLD_NEXT, "pthread_join");
	result = join(thread, value);
	for (i = 0; i < vcpus; i++)
		if (pthread_equal(vcpu_threads[i], thread)) {
			vcpu_threads[i] = vcpu_threads[--vcpus];
			state = JOINED;
			break;
		}
	return result;
}

int pthread_mutex_lock(pthread_mutex_t *mutex)
{
	static int (*lock)(pthread_mutex_t *);

	if (!lock)
		lock = dlsym(RTLD_NEXT, "pthread_mutex_lock");
	if (state == JOINED) { /* cpu_remove_sync() takes the big lock again right after joining */
		big_lock = mutex;
		state = TEARING_DOWN;
	}
	return lock(mutex);
}

int pthread_mutex_unlock(pthread_mutex_t *mutex)
{
	static int (*unlock)(pthread_mutex_t *);

	if (!unlock)
		unlock = dlsym(RTLD_NEXT, "pthread_mutex_unlock");
	if (state == TEARING_DOWN && mutex == big_lock)
		state = NORMAL;
	return unlock(mutex);
}
