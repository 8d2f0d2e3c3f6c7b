// A processor of its own for each thread of the team that the calling thread leads.
#ifdef __linux__
#include <omp.h>
#include <sched.h>
#endif

// processors [threads]: their numbers, the leader's first. A thread that may not be bound stays free.
extern "C" void bind_team(const int* processors, int threads) {
#ifdef __linux__
#pragma omp parallel num_threads(threads)
    {
        cpu_set_t own;
        CPU_ZERO(&own);
        CPU_SET(processors[omp_get_thread_num()], &own);
        sched_setaffinity(0, sizeof own, &own);
    }
#endif
}
