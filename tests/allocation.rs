//! The promise: a training step that has run once asks the system for no more memory than a few small blocks.

mod tiny;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use karat::data::{Dataset, Split};
use karat::tensor::pool;
use karat::train::{Length, TrainConfig, Trainer};
use tiny::Tiny;

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
    let objective = Tiny::new(32, 3, 64).unwrap();
    let data = Dataset::builtin(Split::Train).unwrap();
    let config = TrainConfig { length: Length::Steps(40), ..TrainConfig::default() };
    let mut trainer = Trainer::new(&objective, &data, config).unwrap();
    rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap().install(|| {
        for _ in 0..8 {
            trainer.step().unwrap();
        }
        let fresh = pool::stats().fresh_allocations;
        COUNT.store(true, Ordering::Relaxed);
        for _ in 0..20 {
            trainer.step().unwrap();
        }
        COUNT.store(false, Ordering::Relaxed);
        assert_eq!(LARGE.load(Ordering::Relaxed), 0, "requests of more than 4 KiB");
        assert_eq!(pool::stats().fresh_allocations, fresh, "blocks that the pool did not have");
        // The counter counts: one large vector is seen.
        COUNT.store(true, Ordering::Relaxed);
        std::hint::black_box(vec![1u8; 5000]);
        COUNT.store(false, Ordering::Relaxed);
        assert!(LARGE.load(Ordering::Relaxed) > 0);
    });
}
