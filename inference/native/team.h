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

// The caller of run() or begin() is member 0. Between begin() and join() the others work without it, and at a step's end
// they may go on to the next.
class Team {
  public:
    // `job` is what every thread does in a step; at its end one of them asks goes_on(number), with all others waiting,
    // whether another begins at once.
    Team(int size, std::function<void(Member &)> job, std::function<bool(long)> goes_on)
        : size(size), job(std::move(job)), goes_on(std::move(goes_on)) {
        for (auto &set : next) set = std::vector<Counter>(size);
        for (int id = 0; id < size; id++) members.push_back(std::make_unique<Member>(*this, id));
        for (int id = 1; id < size; id++) threads.emplace_back([this, id] { serve(*members[id]); });
    }
    ~Team() {
        settle(true);
        stopping = true;
        wake();
        for (auto &thread : threads) thread.join();
    }
    Team(const Team &) = delete;

    // Do one step on all threads, the caller's included; none is still in it when this returns. Only once settled.
    void run() {
        start(size);
        work(*members[0], members[0]->round = first);
    }

    // Let the other threads, of which there must be one, begin a step; return its number. Only once settled.
    long begin() { return start(size - 1), begun.load(std::memory_order_relaxed); }

    // Take part in what is left of a begun step, and return when it is over.
    void join(long number) {
        Member &me = *members[0];
        while (!is_over(number)) {
            State now = meeting.load(std::memory_order_acquire);
            if (now.present == now.arrived) std::this_thread::yield();  // it is ending
            else if (meeting.compare_exchange_weak(now, {now.phase, uint16_t(now.present + 1), now.arrived}))
                work(me, (me.round = first, now.phase));
        }
    }

    // Join until nobody works. `drop`: nobody wants the results. Only while goes_on() says no.
    void settle(bool drop) {
        dropped.store(drop, std::memory_order_relaxed);
        for (;;)
            if (const long number = begun.load(std::memory_order_acquire); !is_over(number)) join(number);
            else if (meeting.load(std::memory_order_acquire).present) std::this_thread::yield();  // it is ending
            else break;
        dropped.store(false, std::memory_order_relaxed);
    }
    long next_number() const { return begun.load(std::memory_order_relaxed) + 1; }  // of the step that the caller begins next
    bool is_over(long number) const { return ended.load(std::memory_order_acquire) >= number; }
    const int size;

  private:
    friend class Member;
    struct State {
        uint32_t phase;             // how many have ended
        uint16_t present, arrived;  // members in the step, 0 between steps; of them at the end of this phase
    };
    void start(int present) {
        const uint32_t phase = meeting.load(std::memory_order_acquire).phase;
        first = phase;
        begun.fetch_add(1, std::memory_order_relaxed);
        meeting.store({phase, uint16_t(present), 0}, std::memory_order_release);
        wake();
    }
    void wake() {
        steps.value.fetch_add(1, std::memory_order_release);
        steps.value.notify_all();
    }
    // What the last member does when a step has come to its end: until the phase is over, nobody joins or leaves.
    void end(uint32_t phase) {
        const long number = begun.load(std::memory_order_relaxed);
        const bool more = goes_on(number);
        first = phase + 1;
        if (more) begun.store(number + 1, std::memory_order_release);
        ended.store(number, std::memory_order_release);
        meeting.store({phase + 1, uint16_t(more ? size - 1 : 0), 0}, std::memory_order_release);
        if (more) wake();
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
    const std::function<bool(long)> goes_on;
    std::vector<std::unique_ptr<Member>> members;
    alignas(64) std::atomic<State> meeting{State{0, 0, 0}};
    std::atomic<long> begun{0}, ended{0};  // steps so far
    uint32_t first = 0;                    // phase of the step
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
        const bool over = !last && now.arrived + 1 == now.present;
        then = over ? State{now.phase + 1, now.present, 0} : State{now.phase, now.present, uint16_t(now.arrived + 1)};
    } while (!team.meeting.compare_exchange_weak(now, then, std::memory_order_acq_rel, std::memory_order_relaxed));
    if (then.phase != now.phase) return;
    if (then.arrived == then.present) return team.end(now.phase);
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
