//! Aligned buffers, and memory that several of them share at different times.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Alignment of every buffer in bytes: a cache line and the widest vector.
pub const ALIGNMENT: usize = 64;

const HUGE_PAGE: usize = 2 << 20;

/// What a buffer may hold.
///
/// # Safety
/// All bits zero must be a value, and values must need no drop.
pub unsafe trait Element: Copy + Send + Sync + 'static {}

// SAFETY: 0.0 is all bits zero.
unsafe impl Element for f32 {}

/// A zeroed buffer on a 64-byte boundary: memory of its own, or a part of a [`Region`].
///
/// Buffers from 2 MB on are aligned to 2 MB and asked to be backed by huge pages, which spares most of the TLB misses and
/// page faults; allocate once and reuse.
pub struct AlignedBuf<T: Element = f32> {
    start: NonNull<T>,
    len: usize,
    home: Option<Home>,
}

/// Where a buffer lies that has no memory of its own.
struct Home {
    region: Arc<Region>,
    lifetime: Lifetime,
}

/// The steps of a pass, both ends included, during which a buffer holds something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetime {
    /// First step.
    pub first: u32,
    /// Last step.
    pub last: u32,
}

impl Lifetime {
    /// All steps.
    pub const ALWAYS: Self = Self {
        first: 0,
        last: u32::MAX,
    };

    /// Whether a step is common to both.
    pub const fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    const fn contains(self, step: u32) -> bool {
        self.first <= step && step <= self.last
    }
}

/// Memory that buffers share whose lifetimes do not overlap, and the step at hand.
///
/// A buffer of a region can be used during the steps of its lifetime only; each use asserts that.
#[derive(Debug)]
pub struct Region {
    memory: AlignedBuf<f32>,
    step: AtomicU32,
}

impl Region {
    /// A zeroed region of `bytes` bytes.
    pub fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            memory: AlignedBuf::zeroed(bytes.div_ceil(size_of::<f32>())),
            step: AtomicU32::new(0),
        })
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.memory.len * size_of::<f32>()
    }

    /// Goes on to a step: what buffers hold whose lifetime is over is lost.
    ///
    /// # Safety
    /// Nothing may be borrowed from a buffer whose lifetime does not reach `step`: its bytes become another buffer's.
    pub(crate) unsafe fn enter(&self, step: u32) {
        self.step.store(step, Ordering::Relaxed);
    }
}

impl<T: Element> AlignedBuf<T> {
    /// A buffer of `len` zeros.
    pub fn zeroed(len: usize) -> Self {
        let home = None;
        if len == 0 {
            let start = NonNull::dangling();
            return Self { start, len, home };
        }
        let layout = Self::layout(len);
        // SAFETY: the layout's size is not 0, and the whole allocation is written before it is read.
        unsafe {
            let start = alloc(layout);
            let Some(start) = NonNull::new(start) else {
                handle_alloc_error(layout)
            };
            #[cfg(target_os = "linux")]
            if layout.align() == HUGE_PAGE {
                // Only advice: a refusal costs speed and nothing else.
                let _ = libc::madvise(start.as_ptr().cast(), layout.size(), libc::MADV_HUGEPAGE);
            }
            start.as_ptr().write_bytes(0, layout.size());
            let start = start.cast();
            Self { start, len, home }
        }
    }

    /// The part of `region` from byte `offset` on.
    ///
    /// # Panics
    /// When the part is not inside the region or not on a 64-byte boundary.
    ///
    /// # Safety
    /// No other buffer whose lifetime overlaps may have a byte in common with this one.
    pub(crate) unsafe fn in_region(
        region: &Arc<Region>,
        offset: usize,
        len: usize,
        lifetime: Lifetime,
    ) -> Self {
        if len == 0 {
            return Self::zeroed(0);
        }
        let end = len
            .checked_mul(size_of::<T>())
            .and_then(|bytes| bytes.checked_add(offset));
        assert!(
            end.is_some_and(|end| end <= region.memory.len * size_of::<f32>())
                && offset.is_multiple_of(ALIGNMENT),
            "a buffer lies inside its region"
        );
        Self {
            // SAFETY: inside the region's memory.
            start: unsafe { region.memory.start.cast::<u8>().add(offset).cast() },
            len,
            home: Some(Home {
                region: Arc::clone(region),
                lifetime,
            }),
        }
    }

    /// A copy of `values`.
    pub fn from_slice(values: &[T]) -> Self {
        let mut buffer = Self::zeroed(values.len());
        buffer.copy_from_slice(values);
        buffer
    }

    /// Makes the buffer hold at least `len` values; the old content is lost when it has to grow.
    pub fn grow(&mut self, len: usize) {
        if self.len < len {
            *self = Self::zeroed(0);
            *self = Self::zeroed(len);
        }
    }

    /// # Panics
    /// Outside the buffer's lifetime.
    #[inline]
    fn check_lifetime(&self) {
        if let Some(Home { region, lifetime }) = &self.home {
            let step = region.step.load(Ordering::Relaxed);
            assert!(
                lifetime.contains(step),
                "a buffer of steps {} to {} is used in step {step}",
                lifetime.first,
                lifetime.last
            );
        }
    }

    fn layout(len: usize) -> Layout {
        let bytes = len
            .checked_mul(size_of::<T>())
            .expect("a buffer fits the address space");
        let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { ALIGNMENT };
        Layout::from_size_align(bytes, align)
            .expect("a buffer fits the address space")
            .pad_to_align()
    }
}

impl<T: Element> Default for AlignedBuf<T> {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl<T: Element> Drop for AlignedBuf<T> {
    fn drop(&mut self) {
        if self.len > 0 && self.home.is_none() {
            // SAFETY: allocated in `zeroed` with this very layout.
            unsafe { dealloc(self.start.as_ptr().cast(), Self::layout(self.len)) }
        }
    }
}

impl<T: Element> Deref for AlignedBuf<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.check_lifetime();
        // SAFETY: `len` initialised values, owned by self; in a region nobody else has them in this step.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Element> DerefMut for AlignedBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.check_lifetime();
        // SAFETY: as in `deref`, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T: Element> Clone for AlignedBuf<T> {
    fn clone(&self) -> Self {
        Self::from_slice(self)
    }
}

impl<T: Element> fmt::Debug for AlignedBuf<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuf")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

// SAFETY: the buffer owns its memory like a Vec, in a region during its lifetime.
unsafe impl<T: Element> Send for AlignedBuf<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Element> Sync for AlignedBuf<T> {}

/// A raw pointer that tasks of a pool may share; they must write disjoint parts.
#[derive(Debug)]
pub(crate) struct SharedPtr<T>(*mut T);

impl<T> Clone for SharedPtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedPtr<T> {}

impl<T> SharedPtr<T> {
    pub(crate) fn new(values: &mut [T]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// The pointer. A method, so that closures capture the whole, which is `Sync`, and not the field.
    #[inline(always)]
    pub(crate) fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: dereferencing is unsafe anyway; whoever does it answers for the disjointness.
unsafe impl<T> Send for SharedPtr<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for SharedPtr<T> {}

/// Hands out aligned pieces of a worker's scratch memory one after the other.
#[derive(Debug)]
pub(crate) struct Bump {
    next: *mut f32,
    left: usize,
}

impl Bump {
    /// Room that a piece of `len` values takes.
    pub(crate) const fn room(len: usize) -> usize {
        len.next_multiple_of(ALIGNMENT / size_of::<f32>())
    }

    pub(crate) fn new(memory: &mut [f32]) -> Self {
        Self {
            next: memory.as_mut_ptr(),
            left: memory.len(),
        }
    }

    /// The next `len` values, their content whatever was there.
    pub(crate) fn take(&mut self, len: usize) -> *mut f32 {
        let room = Self::room(len);
        assert!(room <= self.left, "scratch memory holds all pieces");
        let piece = self.next;
        // SAFETY: at most one past the end of the memory, by the assertion.
        self.next = unsafe { piece.add(room) };
        self.left -= room;
        piece
    }

    /// The next `len` values, zeroed.
    pub(crate) fn take_zeroed(&mut self, len: usize) -> *mut f32 {
        let piece = self.take(len);
        // SAFETY: `take` hands out `len` writable values.
        unsafe { piece.write_bytes(0, len) };
        piece
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zeroed_and_aligned() {
        for len in [0, 1, 17, HUGE_PAGE / 4 - 1, HUGE_PAGE / 4 + 5] {
            let buffer = AlignedBuf::<f32>::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert!(buffer.iter().all(|&x| x == 0.0));
            assert!(len == 0 || buffer.as_ptr().addr().is_multiple_of(ALIGNMENT));
        }
    }

    #[test]
    fn growing_keeps_a_large_enough_buffer() {
        let mut buffer = AlignedBuf::from_slice(&[1.0, 2.0]);
        buffer.grow(1);
        assert_eq!(*buffer, [1.0, 2.0]);
        buffer.grow(3);
        assert_eq!(*buffer, [0.0; 3]);
    }

    #[test]
    fn a_buffer_of_a_region_is_usable_during_its_lifetime_only() {
        let region = Region::new(128);
        let lifetime = |first, last| Lifetime { first, last };
        // SAFETY: the lifetimes of the two parts with common bytes do not overlap.
        let (mut early, late) = unsafe {
            (
                AlignedBuf::<f32>::in_region(&region, 0, 32, lifetime(1, 2)),
                AlignedBuf::<f32>::in_region(&region, 64, 16, lifetime(3, 3)),
            )
        };
        // SAFETY: nothing is borrowed.
        unsafe { region.enter(2) };
        early.fill(7.0);
        // SAFETY: as above.
        unsafe { region.enter(3) };
        assert_eq!(*late, [7.0; 16]);
        let used = std::panic::catch_unwind(|| early.len());
        assert!(used.is_err());
    }

    #[test]
    fn pieces_of_scratch_memory_are_apart_and_aligned() {
        let mut memory = AlignedBuf::zeroed(Bump::room(3) + Bump::room(17));
        let mut bump = Bump::new(&mut memory);
        let (a, b) = (bump.take(3), bump.take_zeroed(17));
        assert_eq!(b.addr() - a.addr(), ALIGNMENT);
        assert_eq!(b.addr() % ALIGNMENT, 0);
    }
}
