// The threads of a team on cores of their own.
//
// Two that are on one core wait for each other, and as they spin while they wait, each does so for whole time slices: a
// step takes twenty times as long, until the system moves one of them. It is in no hurry to, a fifth of a second and more,
// where other threads are on the other cores, be they of the lowest priority. So who shares a core with another is moved,
// and then let go: where it goes on is the system's to say.
#pragma once

// Part those of the caller's team that share a core, as far as there are others. Looks once a millisecond, for some
// microseconds: a team that waits for itself comes here rarely, and so is looked at each time.
void keep_apart(int threads);

// Where a team's `thread` belongs that is on cores[thread]: there, but for a core that a thread before it has. Then on the
// next of `allowed` behind its own that no thread has, and none that moves before it takes: two programs that look for the
// lowest would both go there. Where there is none, it stays.
extern "C" {
int core_for(const int* cores, int threads, int thread, const int* allowed, int num_allowed);

// Move the caller to a core, if it may be there, and say whether it was. It may go on from there as before, and to cores that
// its cpuset gets later.
int move_to(int core);
}
