//! A fork-join pool of persistent threads.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::fmt;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};

use effdet_model::engine::Workers;

use crate::arena::AlignedBuf;

/// How often an idle worker looks for work before it parks: a hundred microseconds, longer than the serial stretch between
/// two kernels.
const SPINS_BEFORE_PARKING: u32 = 10_000;

/// How often the caller looks whether the last tasks are done before it gives its time slice away.
const SPINS_BEFORE_YIELDING: u32 = 2_000;

type Job<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// Persistent threads that share the tasks of one job at a time.
///
/// Every thread has a share of neighbouring tasks and claims them one by one; when they are gone it helps the others, from the
/// far end of their shares, so a thread that the system takes off its core delays only the task it holds. Jobs that go
/// over the same tensor in the same order thus find most of it in the cache of the thread that left it there, which matters where
/// threads do not share one: there a line of the other's costs as much as main memory. Results must depend on the task
/// alone, then they are the same for any number of threads.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Handles for waking, with whether the worker sleeps at index worker − 1 of `Shared::asleep`.
    handles: Vec<Thread>,
    /// Held while a job runs.
    running: Mutex<()>,
}

struct Shared {
    /// Of every worker.
    shares: Vec<Share>,
    /// Number of jobs so far.
    jobs: AtomicU64,
    unfinished: AtomicUsize,
    /// Points to the `Job` of the running job, which lives on the caller's stack until `unfinished` is 0.
    job: AtomicPtr<()>,
    stop: AtomicBool,
    asleep: Vec<AtomicBool>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    scratch: Vec<Scratch>,
}

/// Tasks that nobody has claimed yet: the first one in the high half, the end in the low half.
///
/// One word on a cache line of its own. Whoever claims a task reads the job afterwards, so that a worker which slept through
/// the end of a job claims a task of the next one rightly or not at all.
#[repr(align(128))]
struct Share(AtomicU64);

impl Share {
    fn set(&self, first: usize, end: usize) {
        self.0.store((first as u64) << 32 | end as u64, Ordering::Release);
    }

    /// Claims the first task, or the last one.
    fn claim(&self, is_owner: bool) -> Option<usize> {
        let mut seen = self.0.load(Ordering::Acquire);
        loop {
            let (first, end) = (seen >> 32, seen & u64::from(u32::MAX));
            if first >= end {
                return None;
            }
            let (task, left) = if is_owner {
                (first, (first + 1) << 32 | end)
            } else {
                (end - 1, first << 32 | (end - 1))
            };
            match (self.0).compare_exchange_weak(seen, left, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(task as usize),
                Err(now) => seen = now,
            }
        }
    }
}

struct Scratch(UnsafeCell<AlignedBuf>);

// SAFETY: `Pool::scratch` hands a worker's buffer only to the task that runs on that worker.
unsafe impl Sync for Scratch {}

thread_local! {
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
}

impl Pool {
    /// A pool of `threads` threads, the calling one among them; 0 counts as 1.
    pub fn new(threads: usize) -> Self {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            shares: (0..threads).map(|_| Share(AtomicU64::new(0))).collect(),
            jobs: AtomicU64::new(0),
            unfinished: AtomicUsize::new(0),
            job: AtomicPtr::new(std::ptr::null_mut()),
            stop: AtomicBool::new(false),
            asleep: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            panic: Mutex::new(None),
            scratch: (0..threads)
                .map(|_| Scratch(UnsafeCell::new(AlignedBuf::default())))
                .collect(),
        });
        let spawned: Vec<_> = (1..threads)
            .map(|worker| {
                let shared = Arc::clone(&shared);
                thread::Builder::new()
                    .name(format!("effdet-cpu-{worker}"))
                    .spawn(move || shared.work(worker))
                    .expect("the system can start a thread per core")
            })
            .collect();
        let handles = spawned.iter().map(|handle| handle.thread().clone()).collect();
        Self {
            shared,
            threads: spawned,
            handles,
            running: Mutex::new(()),
        }
    }

    /// Number of threads, the calling one included.
    pub fn threads(&self) -> usize {
        self.shared.scratch.len()
    }

    /// Calls `f(task, worker)` for every task below `tasks` and returns when all are done.
    ///
    /// `worker` is below [`threads`](Self::threads) and names the thread that runs the task.
    ///
    /// # Panics
    /// When called from inside a task, and with a task's own panic once all tasks are done.
    pub fn run(&self, tasks: usize, f: Job<'_>) {
        self.run_weighed(tasks, |_| 1, f);
    }

    /// [`run`](Self::run) for tasks that take as long as `cost` says, in any unit: shares are of about equal cost.
    pub fn run_weighed(&self, tasks: usize, cost: impl Fn(usize) -> u64, f: Job<'_>) {
        assert!(!IN_TASK.get(), "a task must not start another job on the pool");
        // A poisoned lock only says that a task panicked before.
        let _running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        if tasks == 0 {
            return;
        }
        assert!(u32::try_from(tasks).is_ok(), "fewer than 2^32 tasks");
        let job: Job<'_> = f;
        shared.unfinished.store(tasks, Ordering::Relaxed);
        shared
            .job
            .store((&raw const job).cast_mut().cast(), Ordering::Relaxed);
        let threads = self.threads() as u64;
        let total: u64 = (0..tasks).map(&cost).sum();
        let (mut next, mut before) = (0, 0);
        for (share, until) in shared.shares.iter().zip(1..) {
            let first = next;
            // A task belongs to the share that its middle falls into.
            while next < tasks && (2 * before + cost(next)) * threads <= 2 * total * until {
                before += cost(next);
                next += 1;
            }
            share.set(first, next);
        }
        // SeqCst pairs with the worker's "mark asleep, then look once more".
        shared.jobs.fetch_add(1, Ordering::SeqCst);
        for (asleep, handle) in shared.asleep.iter().zip(&self.handles).take(tasks - 1) {
            if asleep.load(Ordering::SeqCst) {
                handle.unpark();
            }
        }
        shared.run_tasks(0);
        let mut spins = 0;
        while shared.unfinished.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins < SPINS_BEFORE_YIELDING {
                std::hint::spin_loop();
            } else {
                thread::yield_now();
            }
        }
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// At least `len` values of scratch memory that belong to `worker`, their content whatever the last task left.
    ///
    /// # Safety
    /// Call it only inside a task with that task's own `worker`, and drop the slice before calling it again.
    #[allow(clippy::mut_from_ref, reason = "each worker has its own buffer")]
    pub unsafe fn scratch(&self, worker: usize, len: usize) -> &mut [f32] {
        // SAFETY: one task at a time runs on a worker, and it holds no other borrow by the caller's promise.
        let buffer = unsafe { &mut *self.shared.scratch[worker].0.get() };
        buffer.grow(len);
        buffer
    }
}

impl Workers for Pool {
    fn count(&self) -> usize {
        self.threads()
    }

    fn each(&self, jobs: usize, job: &(dyn Fn(usize) + Sync)) {
        self.run(jobs, &|task, _| job(task));
    }
}

impl Shared {
    /// A task of the worker's own share, or else of the next worker's that has one.
    fn claim(&self, worker: usize) -> Option<usize> {
        self.shares[worker].claim(true).or_else(|| {
            let (before, others) = self.shares.split_at(worker);
            (others[1..].iter().chain(before)).find_map(|share| share.claim(false))
        })
    }

    /// Claims and runs tasks until none is left to claim.
    fn run_tasks(&self, worker: usize) {
        while let Some(task) = self.claim(worker) {
            // SAFETY: the task is of the running job; `run` does not return, and its `job` lives, before it is counted as
            // finished.
            let job: Job<'_> = unsafe { *self.job.load(Ordering::Relaxed).cast::<Job<'_>>() };
            IN_TASK.set(true);
            let result = catch_unwind(AssertUnwindSafe(|| job(task, worker)));
            IN_TASK.set(false);
            fence_streaming_stores();
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            crate::simd::release_tiles();
            if let Err(payload) = result {
                self.panic
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .get_or_insert(payload);
            }
            self.unfinished.fetch_sub(1, Ordering::Release);
        }
    }

    /// Runs tasks of every job that comes.
    fn work(&self, worker: usize) {
        let asleep = &self.asleep[worker - 1];
        let (mut jobs, mut spins) = (0, 0);
        while !self.stop.load(Ordering::Acquire) {
            let now = self.jobs.load(Ordering::Acquire);
            if now != jobs {
                self.run_tasks(worker);
                (jobs, spins) = (now, 0);
            } else if spins < SPINS_BEFORE_PARKING {
                spins += 1;
                std::hint::spin_loop();
            } else {
                asleep.store(true, Ordering::SeqCst);
                while self.jobs.load(Ordering::SeqCst) == jobs && !self.stop.load(Ordering::SeqCst) {
                    thread::park();
                }
                asleep.store(false, Ordering::Relaxed);
                spins = 0;
            }
        }
    }
}

/// Orders non-temporal stores before the atomic that reports a task as finished; they are exempt from the usual order.
fn fence_streaming_stores() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in mem::take(&mut self.threads) {
            thread.thread().unpark();
            // Tasks' panics are caught, so a worker ends normally.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("threads", &self.threads())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_number_of_threads() {
        for threads in [0, 1, 2, 3, 5] {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 7, 100] {
                for _ in 0..50 {
                    let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(tasks, &|task, worker| {
                        assert!(worker < pool.threads());
                        counts[task].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn every_worker_begins_with_a_share_of_about_equal_cost() {
        let pool = Pool::new(3);
        let order = Mutex::new(Vec::new());
        let others = std::sync::Barrier::new(3);
        // Each worker holds one task until all have one, so that the shares are seen as they are cut.
        pool.run_weighed(8, |task| [6, 1, 1, 4, 5, 1, 1, 5][task], &|task, worker| {
            order.lock().unwrap().push((worker, task));
            if [0, 3, 5].contains(&task) {
                others.wait();
            }
        });
        let order = order.into_inner().unwrap();
        for (worker, first) in [(0, 0), (1, 3), (2, 5)] {
            let of_worker: Vec<_> = order.iter().filter(|(w, _)| *w == worker).collect();
            assert_eq!(of_worker[0].1, first, "{order:?}");
        }
    }

    #[test]
    fn sleeping_workers_wake_for_the_next_job() {
        let pool = Pool::new(3);
        for _ in 0..5 {
            thread::sleep(std::time::Duration::from_millis(3));
            let sum = AtomicUsize::new(0);
            pool.run(10, &|task, _| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_leaves_the_pool_usable() {
        let pool = Pool::new(2);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(8, &|task, _| assert!(task != 5, "task five"));
        }));
        assert_eq!(caught.unwrap_err().downcast_ref::<&str>(), Some(&"task five"));
        let count = AtomicUsize::new(0);
        pool.run(4, &|_, _| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 4);
    }

    #[test]
    #[should_panic(expected = "must not start another job")]
    fn a_job_inside_a_task_is_refused() {
        let pool = Pool::new(1);
        pool.run(1, &|_, _| pool.run(1, &|_, _| ()));
    }

    #[test]
    fn scratch_memory_grows_on_demand_and_is_separate_per_worker() {
        let pool = Pool::new(2);
        pool.run(20, &|task, worker| {
            // SAFETY: inside the task, with its worker, one slice at a time.
            let scratch = unsafe { pool.scratch(worker, 64 + task) };
            scratch[..64].fill(task as f32);
            thread::yield_now();
            assert!(scratch[..64].iter().all(|&x| x == task as f32));
        });
    }
}
