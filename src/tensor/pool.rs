//! Pooled, 64-byte-aligned memory: a training step that has run once asks the operating system for nothing the next time.
//!
//! Small blocks come from the heap; freed ones are kept by size class and handed out again. Large blocks are cut out of a few anonymous
//! memory maps that ask for huge pages: the smallest gap that fits, and freed neighbours become one gap again, so that what is resident
//! stays close to what is in use at the same time.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Mutex;

use super::Float;

const ALIGN: usize = 64;
/// Blocks from this size on are cut out of regions, in whole pages.
const LARGE: usize = 64 << 10;
const PAGE: usize = 4 << 10;
const HUGE_PAGE: usize = 2 << 20;
/// The least size of a region; pages that were never touched cost nothing.
const REGION: usize = 64 << 20;
/// The most bytes of small blocks that are kept for later.
const SLACK: usize = 32 << 20;

/// A block of the heap.
struct Block(NonNull<u8>);

// SAFETY: a block owns its memory and nothing else refers to it.
unsafe impl Send for Block {}

impl Block {
    fn new(bytes: usize) -> Block {
        let layout = heap_layout(bytes);
        // SAFETY: size classes are never zero.
        let pointer = unsafe { alloc_zeroed(layout) };
        Block(NonNull::new(pointer).unwrap_or_else(|| handle_alloc_error(layout)))
    }

    fn release(self, bytes: usize) {
        // SAFETY: allocated in `new` with the layout of the same size.
        unsafe { dealloc(self.0.as_ptr(), heap_layout(bytes)) }
    }
}

fn heap_layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes, ALIGN).expect("a buffer smaller than the address space")
}

/// The size class of a request: eight steps to a power of two for small blocks, whole pages for large ones.
fn size_class(bytes: usize) -> usize {
    let step = if bytes >= LARGE { PAGE } else { (bytes.next_power_of_two() / 16).max(ALIGN) };
    bytes.max(1).div_ceil(step) * step
}

/// A memory map, and its gaps: where they begin and how long they are. No two gaps touch.
struct Region {
    map: memmap2::MmapRaw,
    gaps: BTreeMap<usize, usize>,
}

impl Region {
    fn new(bytes: usize) -> Option<Region> {
        let map = memmap2::MmapRaw::from(memmap2::MmapMut::map_anon(bytes).ok()?);
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Some(Region { map, gaps: BTreeMap::from([(0, bytes)]) })
    }

    /// Takes the first `bytes` of the gap at `offset`.
    fn take(&mut self, offset: usize, bytes: usize) -> NonNull<u8> {
        let len = self.gaps.remove(&offset).expect("a gap");
        if len > bytes {
            self.gaps.insert(offset + bytes, len - bytes);
        }
        // SAFETY: a gap lies in the map.
        let pointer = unsafe { self.map.as_mut_ptr().add(offset) };
        NonNull::new(pointer).expect("a memory map has an address")
    }

    fn give(&mut self, pointer: NonNull<u8>, mut bytes: usize) {
        let mut offset = pointer.as_ptr() as usize - self.map.as_ptr() as usize;
        if let Some(next) = self.gaps.remove(&(offset + bytes)) {
            bytes += next;
        }
        if let Some((&before, &len)) = self.gaps.range(..offset).next_back()
            && before + len == offset
        {
            (offset, bytes) = (before, len + bytes);
        }
        self.gaps.insert(offset, bytes);
    }

    /// Gives the memory of the gaps back to the operating system.
    fn trim(&self) {
        #[cfg(unix)]
        for (&offset, &len) in &self.gaps {
            // SAFETY: nobody refers to a gap; when it is read again it holds zeros.
            let _ = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, len) };
        }
    }
}

#[derive(Default)]
struct Pool {
    small: BTreeMap<usize, Vec<Block>>,
    small_bytes: usize,
    regions: Vec<Region>,
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
    with_pool(|pool| {
        pool.trim_small(0);
        pool.regions.iter().for_each(Region::trim);
    });
    start_peak();
}

/// Starts a new measurement of the peak; unused memory stays at hand.
pub fn start_peak() {
    with_pool(|pool| pool.stats.peak_bytes = pool.stats.live_bytes);
}

impl Pool {
    /// A block, and its region if it is a large one.
    fn take(&mut self, class: usize) -> (usize, NonNull<u8>) {
        self.stats.live_bytes += class;
        self.stats.peak_bytes = self.stats.peak_bytes.max(self.stats.live_bytes);
        if class < LARGE {
            return (0, self.take_small(class));
        }
        let gaps = self.regions.iter().enumerate().flat_map(|(i, region)| region.gaps.iter().map(move |(&offset, &len)| (len, i, offset)));
        let (region, offset) = match gaps.filter(|gap| gap.0 >= class).min() {
            Some((_, region, offset)) => (region, offset),
            None => {
                self.stats.fresh_allocations += 1;
                // Each region is half as large as all before it: few regions, few gaps that end at a border.
                let mapped: usize = self.regions.iter().map(|region| region.map.len()).sum();
                let bytes = class.max(mapped / 2).max(REGION).next_multiple_of(HUGE_PAGE);
                match Region::new(bytes).or_else(|| Region::new(class)) {
                    Some(region) => self.regions.push(region),
                    None => handle_alloc_error(heap_layout(class)),
                }
                (self.regions.len() - 1, 0)
            }
        };
        (region, self.regions[region].take(offset, class))
    }

    fn take_small(&mut self, class: usize) -> NonNull<u8> {
        if let Some(block) = self.small.get_mut(&class).and_then(Vec::pop) {
            self.small_bytes -= class;
            return block.0;
        }
        if class > 4096 {
            self.stats.fresh_allocations += 1;
        }
        Block::new(class).0
    }

    fn give(&mut self, class: usize, region: usize, pointer: NonNull<u8>) {
        self.stats.live_bytes -= class;
        if class >= LARGE {
            return self.regions[region].give(pointer, class);
        }
        self.small_bytes += class;
        self.small.entry(class).or_default().push(Block(pointer));
        self.trim_small(SLACK);
    }

    /// Releases unused small blocks, largest first, until at most `keep` bytes of them are left.
    fn trim_small(&mut self, keep: usize) {
        while self.small_bytes > keep {
            let Some((&class, blocks)) = self.small.iter_mut().next_back() else { return };
            match blocks.pop() {
                Some(block) => {
                    self.small_bytes -= class;
                    block.release(class);
                }
                None => {
                    self.small.remove(&class);
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
    region: usize,
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
            return Buffer { pointer: NonNull::dangling(), len, class: 0, region: 0, owns: PhantomData };
        }
        let class = size_class(len.checked_mul(size_of::<T>()).expect("a buffer smaller than the address space"));
        let (region, pointer) = with_pool(|pool| pool.take(class));
        Buffer { pointer: pointer.cast(), len, class, region, owns: PhantomData }
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
        if self.class > 0 {
            with_pool(|pool| pool.give(self.class, self.region, self.pointer.cast()));
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
        for bytes in [1, 64, 65, 4000, 5000, LARGE - 1, LARGE, 1 << 20, (1 << 20) + 1, 100_000_003] {
            let class = size_class(bytes);
            assert!(class >= bytes && class.is_multiple_of(ALIGN), "{bytes} → {class}");
            assert!(class - bytes <= (bytes / 8).clamp(ALIGN, LARGE / 8), "{bytes} → {class}");
        }
    }

    /// Blocks never overlap, whatever the order in which they are freed, and in the end one gap is left.
    #[test]
    fn gaps_become_one_again() {
        let mut region = Region::new(64 * PAGE).unwrap();
        let mut rng = crate::tensor::random::Rng::new(5, crate::tensor::random::Purpose::Case, 0, 0);
        let mut live: Vec<(NonNull<u8>, usize)> = Vec::new();
        for round in 0..2000 {
            if rng.chance(0.55) {
                let bytes = PAGE * rng.between(1, 9);
                if let Some((&offset, _)) = region.gaps.iter().find(|gap| *gap.1 >= bytes) {
                    live.push((region.take(offset, bytes), bytes));
                }
            } else if !live.is_empty() {
                let (pointer, bytes) = live.swap_remove(round % live.len());
                region.give(pointer, bytes);
            }
            let base = region.map.as_ptr() as usize;
            let mut parts: Vec<(usize, usize)> = live.iter().map(|(p, len)| (p.as_ptr() as usize - base, *len)).collect();
            parts.extend(region.gaps.iter().map(|(&offset, &len)| (offset, len)));
            parts.sort_unstable();
            let end = parts.iter().fold(0, |end, &(offset, len)| if offset == end { end + len } else { usize::MAX });
            assert_eq!(end, 64 * PAGE, "round {round}: {parts:?}");
        }
        live.drain(..).for_each(|(pointer, bytes)| region.give(pointer, bytes));
        assert_eq!(region.gaps, BTreeMap::from([(0, 64 * PAGE)]));
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
