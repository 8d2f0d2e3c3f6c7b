#include <algorithm>
#include <chrono>
#include <omp.h>
#include <vector>
#ifdef __linux__
#include <sched.h>
#endif
#include "cores.h"

namespace {

constexpr std::chrono::milliseconds OFTEN(1);  // between two looks

bool has(const int* start, const int* stop, int value) { return std::find(start, stop, value) != stop; }

#ifdef __linux__
// None where there are more than fit.
std::vector<int> allowed_cores(cpu_set_t& set) {
    std::vector<int> allowed;
    if (!sched_getaffinity(0, sizeof set, &set))
        for (int core = 0; core < CPU_SETSIZE; core++)
            if (CPU_ISSET(core, &set)) allowed.push_back(core);
    return allowed;
}
#endif

}  // namespace

extern "C" int core_for(const int* cores, int threads, int thread, const int* allowed, int num_allowed) {
    const auto shares = [&](int one) { return has(cores, cores + one, cores[one]); };
    if (!shares(thread)) return cores[thread];
    int before = 0;  // who are to move
    for (int one = 0; one < thread; one++) before += shares(one);
    for (const int* core = allowed; core < allowed + num_allowed; core++)
        if (!has(cores, cores + threads, *core) && before-- == 0) return *core;
    return cores[thread];
}

extern "C" void move_to(int core) {
#ifdef __linux__
    cpu_set_t before, only;
    if (sched_getaffinity(0, sizeof before, &before)) return;
    CPU_ZERO(&only);
    CPU_SET(core, &only);
    if (!sched_setaffinity(0, sizeof only, &only)) sched_setaffinity(0, sizeof before, &before);
#endif
}

void keep_apart(int threads) {
#ifdef __linux__
    using Clock = std::chrono::steady_clock;
    thread_local Clock::time_point looked_at;
    const Clock::time_point now = Clock::now();
    if (threads < 2 || now - looked_at < OFTEN) return;
    looked_at = now;
    thread_local std::vector<int> mine;  // the threads of the team see the caller's, not their own
    mine.assign(threads, -1);
    int* const cores = mine.data();
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num();
        cores[thread] = sched_getcpu();
#pragma omp barrier
        if (has(cores, cores + thread, cores[thread])) {
            cpu_set_t set;
            const std::vector<int> allowed = allowed_cores(set);
            const int core = core_for(cores, threads, thread, allowed.data(), int(allowed.size()));
            if (core != cores[thread]) move_to(core);
        }
    }
#endif
}
