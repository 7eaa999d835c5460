//! Pooled, 64-byte-aligned memory: a training step that has run once allocates nothing the next time.
//!
//! Freed blocks are kept by size class and handed out again. Large blocks are anonymous memory maps that ask for huge pages.
//! What is kept never exceeds what was once in use at the same time by more than an eighth, so the pool does not raise the peak.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Mutex;

use super::Float;

const ALIGN: usize = 64;
/// Blocks from this size on are memory maps, rounded to whole huge pages.
const MAP_FROM: usize = 4 << 20;
const HUGE_PAGE: usize = 2 << 20;
/// Kept beside the eighth, so that small programs never trim.
const SLACK: usize = 32 << 20;

enum Block {
    Heap(NonNull<u8>),
    Map(memmap2::MmapMut),
}

// SAFETY: a block owns its memory and nothing else refers to it.
unsafe impl Send for Block {}

impl Block {
    fn new(bytes: usize) -> Block {
        if bytes >= MAP_FROM
            && let Ok(map) = memmap2::MmapMut::map_anon(bytes)
        {
            #[cfg(target_os = "linux")]
            let _ = map.advise(memmap2::Advice::HugePage);
            return Block::Map(map);
        }
        let layout = heap_layout(bytes);
        // SAFETY: size classes are never zero.
        let pointer = unsafe { alloc_zeroed(layout) };
        Block::Heap(NonNull::new(pointer).unwrap_or_else(|| handle_alloc_error(layout)))
    }

    fn pointer(&mut self) -> NonNull<u8> {
        match self {
            Block::Heap(pointer) => *pointer,
            Block::Map(map) => NonNull::new(map.as_mut_ptr()).expect("a memory map has an address"),
        }
    }

    fn release(self, bytes: usize) {
        if let Block::Heap(pointer) = self {
            // SAFETY: allocated in `new` with the layout of the same size.
            unsafe { dealloc(pointer.as_ptr(), heap_layout(bytes)) }
        }
    }
}

fn heap_layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes, ALIGN).expect("a buffer smaller than the address space")
}

/// The size class of a request: eight steps to a power of two, whole huge pages for large blocks.
fn size_class(bytes: usize) -> usize {
    let step = (bytes.next_power_of_two() / 16).max(ALIGN);
    let class = bytes.max(1).div_ceil(step) * step;
    if class >= MAP_FROM { class.div_ceil(HUGE_PAGE) * HUGE_PAGE } else { class }
}

#[derive(Default)]
struct Pool {
    free: BTreeMap<usize, Vec<Block>>,
    free_bytes: usize,
    stats: Stats,
}

/// What the pool has done since the program began (or since [`reset_peak`], for the peak).
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// Bytes in use now.
    pub live_bytes: usize,
    /// The most bytes in use at one time.
    pub peak_bytes: usize,
    /// Requests of more than 4 KiB that had to ask the operating system.
    pub fresh_allocations: usize,
}

static POOL: Mutex<Option<Pool>> = Mutex::new(None);

fn with_pool<R>(f: impl FnOnce(&mut Pool) -> R) -> R {
    let mut guard = POOL.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    f(guard.get_or_insert_with(Pool::default))
}

/// The pool's counters.
pub fn stats() -> Stats {
    with_pool(|pool| pool.stats)
}

/// Starts a new measurement of the peak and gives all unused memory back to the operating system.
pub fn reset_peak() {
    with_pool(|pool| pool.trim(0));
    start_peak();
}

/// Starts a new measurement of the peak; unused memory stays at hand.
pub fn start_peak() {
    with_pool(|pool| pool.stats.peak_bytes = pool.stats.live_bytes);
}

impl Pool {
    fn take(&mut self, class: usize) -> Block {
        self.stats.live_bytes += class;
        self.stats.peak_bytes = self.stats.peak_bytes.max(self.stats.live_bytes);
        if let Some(block) = self.free.get_mut(&class).and_then(Vec::pop) {
            self.free_bytes -= class;
            return block;
        }
        if class > 4096 {
            self.stats.fresh_allocations += 1;
        }
        let limit = self.stats.peak_bytes + self.stats.peak_bytes / 8 + SLACK;
        self.trim(limit.saturating_sub(self.stats.live_bytes));
        Block::new(class)
    }

    fn give(&mut self, class: usize, block: Block) {
        self.stats.live_bytes -= class;
        self.free_bytes += class;
        self.free.entry(class).or_default().push(block);
    }

    /// Releases unused blocks, largest first, until at most `keep` bytes of them are left.
    fn trim(&mut self, keep: usize) {
        while self.free_bytes > keep {
            let Some((&class, blocks)) = self.free.iter_mut().next_back() else { return };
            match blocks.pop() {
                Some(block) => {
                    self.free_bytes -= class;
                    block.release(class);
                }
                None => {
                    self.free.remove(&class);
                }
            }
        }
    }
}

/// A fixed-length array of `T` on pooled memory, aligned to 64 bytes.
pub struct Buffer<T: Float> {
    pointer: NonNull<T>,
    len: usize,
    class: usize,
    block: Option<Block>,
    owns: PhantomData<T>,
}

// SAFETY: a buffer owns its memory; `T` is a plain float.
unsafe impl<T: Float> Send for Buffer<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Float> Sync for Buffer<T> {}

impl<T: Float> Buffer<T> {
    /// A buffer whose contents are whatever was last stored there (never uninitialised memory): for outputs that are written whole.
    pub fn scratch(len: usize) -> Self {
        if len == 0 {
            return Buffer { pointer: NonNull::dangling(), len, class: 0, block: None, owns: PhantomData };
        }
        let class = size_class(len.checked_mul(size_of::<T>()).expect("a buffer smaller than the address space"));
        let mut block = with_pool(|pool| pool.take(class));
        Buffer { pointer: block.pointer().cast(), len, class, block: Some(block), owns: PhantomData }
    }

    /// A buffer of zeros.
    pub fn zeros(len: usize) -> Self {
        let mut buffer = Self::scratch(len);
        buffer.fill(T::ZERO);
        buffer
    }
}

impl<T: Float> Drop for Buffer<T> {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            with_pool(|pool| pool.give(self.class, block));
        }
    }
}

impl<T: Float> Clone for Buffer<T> {
    fn clone(&self) -> Self {
        let mut copy = Self::scratch(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl<T: Float> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `pointer` addresses `len` floats of this buffer's own block, zeroed when it was allocated.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.len) }
    }
}

impl<T: Float> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and the buffer is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_waste_at_most_an_eighth() {
        for bytes in [1, 64, 65, 4000, 5000, 1 << 20, (1 << 20) + 1, 100_000_003] {
            let class = size_class(bytes);
            assert!(class >= bytes && class.is_multiple_of(ALIGN), "{bytes} → {class}");
            assert!(class - bytes <= (bytes / 8).max(HUGE_PAGE.min(bytes / 2)).max(ALIGN), "{bytes} → {class}");
        }
    }

    #[test]
    fn aligned_and_independent() {
        let mut a = Buffer::<f32>::zeros(1000);
        let b = a.clone();
        a[3] = 5.0;
        assert_eq!(b[3], 0.0);
        assert_eq!(a.as_ptr() as usize % ALIGN, 0);
        assert!(Buffer::<f64>::zeros(0).is_empty());
    }
}
