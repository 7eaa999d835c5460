//! The promise: a training step that has run once asks the system for no more memory than a few small blocks.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use karat::data::{Dataset, Split};
use karat::tensor::pool;
use karat::train::{Length, TrainConfig, Trainer};

/// Counts requests of more than 4 KiB while it is told to.
struct Counting;

static COUNT: AtomicBool = AtomicBool::new(false);
static LARGE: AtomicUsize = AtomicUsize::new(0);

fn note(size: usize) {
    if size > 4096 && COUNT.load(Ordering::Relaxed) {
        LARGE.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        unsafe { System.realloc(pointer, layout, size) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_steady_training_step_allocates_nothing_large() {
    let objective = karat::mim::methods::build("greenmim", "swin_micro", 32, None).unwrap();
    let data = Dataset::builtin(Split::Train).unwrap();
    // Small enough for a test; all buffers but the batch's are the default run's.
    let config = TrainConfig { length: Length::Steps(93), batch: 16, ..TrainConfig::default() };
    let mut trainer = Trainer::new(&*objective, &data, config).unwrap();
    rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap().install(|| {
        // Which buffers two threads ever need at the same time is up to the scheduler, so a busy machine may take longer to warm up:
        // large requests must die out, within one epoch (the next one makes its order of images).
        let mut requests = Vec::new();
        for window in 0..5 {
            let fresh = pool::stats().fresh_allocations;
            LARGE.store(0, Ordering::Relaxed);
            COUNT.store(true, Ordering::Relaxed);
            for _ in 0..if window == 0 { 8 } else { 20 } {
                trainer.step().unwrap();
            }
            COUNT.store(false, Ordering::Relaxed);
            requests.push((LARGE.load(Ordering::Relaxed), pool::stats().fresh_allocations - fresh));
        }
        assert!(requests[1..].contains(&(0, 0)), "requests of more than 4 KiB, blocks that the pool lacked: {requests:?}");
        assert!(requests[0].0 > 0 && requests[0].1 > 0, "the counters count: {requests:?}");
    });
}
