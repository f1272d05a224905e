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
    bool skips() const { return (int)(joins - round) > 0; }  // what comes next was done before it came to the others
    const int id;

  private:
    friend class Team;
    void barrier(bool last = false);
    void clear_next();
    Team &team;
    unsigned round = 0, joins = 0;  // the phase that its program has come to; the one in which it came to the step
};

// The caller of run() or begin() is member 0. Between begin() and join() the others work without it.
class Team {
  public:
    // `job` is what every thread does in a step.
    Team(int size, std::function<void(Member &)> job) : size(size), job(std::move(job)) {
        for (auto &set : next) set = std::vector<Counter>(size);
        for (int id = 0; id < size; id++) members.push_back(std::make_unique<Member>(*this, id));
        for (int id = 1; id < size; id++) threads.emplace_back([this, id] { serve(*members[id]); });
    }
    ~Team() {
        join(true);
        stopping = true;  // published by start()
        start();
        for (auto &thread : threads) thread.join();
    }
    Team(const Team &) = delete;

    // Do one step on all threads, the caller's included; none is still in it when this returns.
    void run() {
        start(size);
        work(*members[0], members[0]->round);
    }

    // Let the other threads, of which there must be one, begin a step.
    void begin() { start(size - 1); }

    // Take part in what is left of a begun step, and return when it is over. `drop`: nobody wants its results.
    void join(bool drop) {
        Member &me = *members[0];
        dropped.store(drop, std::memory_order_relaxed);
        for (State now = meeting.load(std::memory_order_acquire); now.present; )
            if (meeting.compare_exchange_weak(now, {now.phase, uint16_t(now.present + 1), now.arrived})) {
                work(me, now.phase);
                break;
            }
        me.round = meeting.load(std::memory_order_acquire).phase;
        dropped.store(false, std::memory_order_relaxed);
    }
    const int size;

  private:
    friend class Member;
    struct State {
        uint32_t phase;             // how many have ended
        uint16_t present, arrived;  // members in the step, 0 between steps; of them at the end of this phase
    };
    void start(int present = 0) {
        if (present) meeting.store({meeting.load().phase, uint16_t(present), 0});
        steps.value.fetch_add(1, std::memory_order_release);
        steps.value.notify_all();
    }
    void work(Member &me, unsigned joins) {
        me.joins = joins;
        job(me);
        me.clear_next();
        me.barrier(true);
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
            work(me, me.round);
        }
    }
    const std::function<void(Member &)> job;
    std::vector<std::unique_ptr<Member>> members;
    alignas(64) std::atomic<State> meeting{State{0, 0, 0}};
    Counter steps;
    std::vector<Counter> next[2];  // of each thread's share: the next piece; two sets, used by turns
    std::atomic<bool> dropped{false};
    bool stopping = false;
    std::vector<std::thread> threads;
};

// Wait for the others. Spins, because phases last microseconds; gives way when a thread was put aside by the system.
inline void Member::barrier(bool last) {
    const bool skip = skips();
    round++;
    if (skip) return;
    using State = Team::State;
    State now = team.meeting.load(std::memory_order_relaxed), then;
    do {
        const bool all = now.arrived + 1 == now.present;
        then = all ? State{now.phase + 1, last ? uint16_t(0) : now.present, 0} : State{now.phase, now.present, uint16_t(now.arrived + 1)};
    } while (!team.meeting.compare_exchange_weak(now, then, std::memory_order_acq_rel, std::memory_order_relaxed));
    if (then.phase != now.phase) return;
    for (int spins = 0; team.meeting.load(std::memory_order_acquire).phase == now.phase; spins++)
        if (spins < 4000) _mm_pause();
        else std::this_thread::yield();
}

// Reset the set of the next phase, which nobody uses before the barrier; also for member 0, which may be away.
inline void Member::clear_next() {
    auto &later = team.next[(round + 1) % 2];
    later[id].value.store(0, std::memory_order_relaxed);
    if (id == 1) later[0].value.store(0, std::memory_order_relaxed);
}

// Do work(0) to work(n-1) together and wait until all is done. Each thread goes through its own share in order, one
// sequential stream of weights, and then helps the others: a busy neighbour costs what it takes, not half the speed.
template <class Work> void Member::each(long n, Work work) {
    if (skips()) return barrier();
    auto &now = team.next[round % 2];
    clear_next();
    for (int k = 0; k < team.size; k++) {
        const int of = (id + k) % team.size;
        const long from = n * of / team.size, to = n * (of + 1) / team.size;
        for (long i; !team.dropped.load(std::memory_order_relaxed) && (i = from + now[of].value.fetch_add(1, std::memory_order_relaxed)) < to;)
            work(i);
    }
    barrier();
}
