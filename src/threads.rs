//! Threads that stay awake between the many short parallel parts of a network.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rayon::Yield;

/// How long a thread without work looks for some before it naps.
const ALERT: Duration = Duration::from_millis(2);
/// How long it naps.
const NAP: Duration = Duration::from_micros(200);

/// Runs `work` on a thread of the current pool while its other threads stay awake.
///
/// Rayon's threads go to sleep after a few microseconds without work, and waking one takes longer than many a part of a small network.
/// Here they go on looking for work for some milliseconds, and then look every fraction of one. Results do not depend on it. A process
/// calls this once, around everything that it computes: the threads are busy until `work` returns.
pub fn awake<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    struct Finish<'a>(&'a AtomicBool);
    impl Drop for Finish<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
        }
    }
    let finished = AtomicBool::new(false);
    rayon::scope(|scope| {
        let own = rayon::current_thread_index();
        let finished = &finished;
        scope.spawn_broadcast(move |_, context| {
            // The thread of `work` gets here while it waits for others: it has no time.
            if Some(context.index()) != own {
                look_for_work(finished);
            }
        });
        // Also when `work` panics.
        let _finish = Finish(finished);
        work()
    })
}

fn look_for_work(finished: &AtomicBool) {
    let mut idle_since = None;
    while !finished.load(Ordering::Acquire) {
        if rayon::yield_now() == Some(Yield::Executed) {
            idle_since = None;
        } else if idle_since.get_or_insert_with(Instant::now).elapsed() < ALERT {
            // Another process may need the core.
            std::thread::yield_now();
        } else {
            std::thread::sleep(NAP);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::AssertUnwindSafe;

    use rayon::prelude::*;

    use super::*;

    #[test]
    fn work_and_nested_work_run_and_return() {
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let sum = pool.install(|| awake(|| (0..1000u64).into_par_iter().map(|i| (0..i).into_par_iter().sum::<u64>()).sum::<u64>()));
            assert_eq!(sum, (0..1000u64).map(|i| i * i.saturating_sub(1) / 2).sum::<u64>());
        }
    }

    #[test]
    fn a_panic_ends_it() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let caught = std::panic::catch_unwind(AssertUnwindSafe(|| pool.install(|| awake(|| panic!("expected")))));
        assert!(caught.is_err());
    }
}
