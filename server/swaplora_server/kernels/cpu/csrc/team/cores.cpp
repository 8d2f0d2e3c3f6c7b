#include <algorithm>
#include <chrono>
#include <cstring>
#include <omp.h>
#include <vector>
#ifdef __linux__
#include <sched.h>
#endif
#include "cores.h"

namespace {

constexpr std::chrono::milliseconds OFTEN(1);  // between two looks
constexpr int IN_VAIN = 16;  // moves in a row, after which nobody is moved any more

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
    std::vector<int> taken(cores, cores + threads);
    for (int one = 0; one <= thread; one++) {
        if (!shares(one)) continue;
        const auto own = std::find(allowed, allowed + num_allowed, cores[one]) - allowed;
        for (int next = 1; next <= num_allowed; next++) {
            const int core = allowed[(own + next) % num_allowed];
            if (has(taken.data(), taken.data() + taken.size(), core)) continue;
            if (one == thread) return core;
            taken.push_back(core);
            break;
        }
    }
    return cores[thread];
}

extern "C" int move_to(int core) {
#ifdef __linux__
    cpu_set_t before, only, all, after;
    if (sched_getaffinity(0, sizeof before, &before) || !CPU_ISSET(core, &before)) return 0;
    CPU_ZERO(&only);
    CPU_SET(core, &only);
    if (sched_setaffinity(0, sizeof only, &only)) return 0;
    const int is_there = sched_getcpu() == core;
    // What a thread asked for is kept, and its cpuset, which may grow, is cut to it (Linux 6.2). So it asks for all, which
    // comes to the cpuset, unless it had less of that.
    std::memset(&all, 0xff, sizeof all);
    if (sched_setaffinity(0, sizeof all, &all) || sched_getaffinity(0, sizeof after, &after) || !CPU_EQUAL(&after, &before))
        sched_setaffinity(0, sizeof before, &before);
    return is_there;
#else
    return 0;
#endif
}

void keep_apart(int threads) {
#ifdef __linux__
    using Clock = std::chrono::steady_clock;
    thread_local Clock::time_point looked_at;
    const Clock::time_point now = Clock::now();
    thread_local int num_in_vain;  // where the number of a core is not the one that a thread is on, as in some sandboxes
    if (threads < 2 || num_in_vain >= IN_VAIN || now - looked_at < OFTEN) return;
    looked_at = now;
    thread_local std::vector<int> mine;  // the threads of the team see the caller's, not their own
    mine.assign(threads, -1);
    int* const cores = mine.data();
    int num_moved = 0, num_there = 0;
#pragma omp parallel num_threads(threads) reduction(+ : num_moved, num_there)
    {
        const int thread = omp_get_thread_num();
        cores[thread] = sched_getcpu();
#pragma omp barrier
        if (has(cores, cores + thread, cores[thread])) {
            cpu_set_t set;
            const std::vector<int> allowed = allowed_cores(set);
            const int core = core_for(cores, threads, thread, allowed.data(), int(allowed.size()));
            if (core != cores[thread]) num_moved++, num_there += move_to(core);
        }
    }
    if (num_moved) num_in_vain = num_there ? 0 : num_in_vain + 1;
#endif
}
