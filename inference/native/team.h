// The threads of one engine: they sleep between steps, share out the pieces of each phase, and meet after it.
// Own threads and not OpenMP: several engines and torch's own pool live in one process, and the number granted is certain.
#pragma once
#include <immintrin.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

struct alignas(64) Counter {  // a cache line of its own
    std::atomic<long> value{0};
};

class Team;

// One thread's part in the team.
class Member {
  public:
    Member(Team &team, int id) : id(id), team(team) {}
    template <class Work> void each(long n, Work work);
    void barrier();
    const int id;

  private:
    Team &team;
    unsigned round = 0;
};

class Team {
  public:
    // `job` is what every thread does in a step.
    Team(int size, std::function<void(Member &)> job) : size(size), job(std::move(job)) {
        for (auto &set : next) set = std::vector<Counter>(size);
        for (int id = 0; id < size; id++) members.push_back(std::make_unique<Member>(*this, id));
        for (int id = 1; id < size; id++) threads.emplace_back([this, id] { serve(*members[id]); });
    }
    ~Team() {
        stopping = true;  // published by start()
        start();
        for (auto &thread : threads) thread.join();
    }
    Team(const Team &) = delete;

    // Do one step on all threads, the caller's included; none is still in it when this returns.
    void run() {
        start();
        job(*members[0]);
        members[0]->barrier();
    }
    const int size;

  private:
    friend class Member;
    void start() {
        steps.value.fetch_add(1, std::memory_order_release);
        steps.value.notify_all();
    }
    // Between steps: look for 100 us, then sleep. A thread woken from sleep comes 20 to 50 us late in a virtual machine,
    // which is 3 % of an int8 step.
    void serve(Member &me) {
        for (long seen = 0;; seen++) {
            const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
            while (steps.value.load(std::memory_order_acquire) == seen) {
                if (std::chrono::steady_clock::now() < until) _mm_pause();
                else steps.value.wait(seen, std::memory_order_acquire);
            }
            if (stopping) return;
            job(me);
            me.barrier();
        }
    }
    const std::function<void(Member &)> job;
    std::vector<std::unique_ptr<Member>> members;
    Counter steps, arrived, phase;
    std::vector<Counter> next[2];  // of each thread's share: the next piece; two sets, used by turns
    bool stopping = false;
    std::vector<std::thread> threads;
};

// Wait for the others. Spins, because phases last microseconds; gives way when a thread was put aside by the system.
inline void Member::barrier() {
    const long before = team.phase.value.load(std::memory_order_relaxed);
    if (team.arrived.value.fetch_add(1, std::memory_order_acq_rel) == team.size - 1) {
        team.arrived.value.store(0, std::memory_order_relaxed);
        team.phase.value.store(before + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; team.phase.value.load(std::memory_order_acquire) == before; spins++)
        if (spins < 4000) _mm_pause();
        else std::this_thread::yield();
}

// Do work(0) to work(n-1) together and wait until all is done. Each thread goes through its own share in order, one
// sequential stream of weights, and then helps the others: a busy neighbour costs what it takes, not half the speed.
template <class Work> void Member::each(long n, Work work) {
    auto &now = team.next[round % 2], &later = team.next[(round + 1) % 2];
    round++;
    later[id].value.store(0, std::memory_order_relaxed);  // the set of the next `each`: nobody uses it before the barrier
    for (int k = 0; k < team.size; k++) {
        const int of = (id + k) % team.size;
        const long from = n * of / team.size, to = n * (of + 1) / team.size;
        for (long i; (i = from + now[of].value.fetch_add(1, std::memory_order_relaxed)) < to;) work(i);
    }
    barrier();
}
