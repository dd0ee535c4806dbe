//! Aligned f32 buffers.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Alignment of every buffer in bytes: a cache line and the widest vector.
pub const ALIGNMENT: usize = 64;

const HUGE_PAGE: usize = 2 << 20;

/// A zeroed f32 buffer on a 64-byte boundary.
///
/// Buffers from 2 MB on are aligned to 2 MB and asked to be backed by huge pages, which spares most of the TLB misses and
/// page faults; allocate once and reuse.
pub struct AlignedBuf {
    start: NonNull<f32>,
    len: usize,
}

impl AlignedBuf {
    /// A buffer of `len` zeros.
    pub fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self {
                start: NonNull::dangling(),
                len,
            };
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
            Self {
                start: start.cast(),
                len,
            }
        }
    }

    /// A copy of `values`.
    pub fn from_slice(values: &[f32]) -> Self {
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

    fn layout(len: usize) -> Layout {
        let bytes = len
            .checked_mul(size_of::<f32>())
            .expect("a buffer fits the address space");
        let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { ALIGNMENT };
        Layout::from_size_align(bytes, align)
            .expect("a buffer fits the address space")
            .pad_to_align()
    }
}

impl Default for AlignedBuf {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated in `zeroed` with this very layout.
            unsafe { dealloc(self.start.as_ptr().cast(), Self::layout(self.len)) }
        }
    }
}

impl Deref for AlignedBuf {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: `len` initialised values, owned by self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `deref`, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Clone for AlignedBuf {
    fn clone(&self) -> Self {
        Self::from_slice(self)
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuf")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

// SAFETY: the buffer owns its memory like a Vec<f32>.
unsafe impl Send for AlignedBuf {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for AlignedBuf {}

/// A raw pointer to f32 that tasks of a pool may share; they must write disjoint parts.
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
            let buffer = AlignedBuf::zeroed(len);
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
    fn pieces_of_scratch_memory_are_apart_and_aligned() {
        let mut memory = AlignedBuf::zeroed(Bump::room(3) + Bump::room(17));
        let mut bump = Bump::new(&mut memory);
        let (a, b) = (bump.take(3), bump.take_zeroed(17));
        assert_eq!(b.addr() - a.addr(), ALIGNMENT);
        assert_eq!(b.addr() % ALIGNMENT, 0);
    }
}
