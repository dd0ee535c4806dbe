//! Sums across lanes that do not depend on the vector's width: 16 virtual lanes and a fixed tree.

use crate::simd::{Simd, sum_16};

/// The virtual lanes.
pub(crate) const VIRTUAL_LANES: usize = 16;

/// Vectors that the virtual lanes take on the narrowest instruction set.
const MOST_VECTORS: usize = 4;

/// 16 running sums: value `i` of a row goes to lane `i mod 16`.
#[derive(Clone, Copy)]
pub(crate) struct LaneSums<S: Simd>([S::V; MOST_VECTORS]);

impl<S: Simd> LaneSums<S> {
    /// Vectors that are in use.
    pub(crate) const VECTORS: usize = VIRTUAL_LANES / S::LANES;

    /// # Safety
    /// The instruction set must be available, here and in all methods.
    #[inline(always)]
    pub(crate) unsafe fn zero() -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self([S::zero(); MOST_VECTORS]) }
    }

    /// The sums of vector `index`, below [`VECTORS`](Self::VECTORS).
    #[inline(always)]
    pub(crate) fn vector(&mut self, index: usize) -> &mut S::V {
        &mut self.0[index]
    }

    /// The sum of all lanes.
    ///
    /// # Safety
    /// As [`zero`](Self::zero).
    #[inline(always)]
    pub(crate) unsafe fn total(self) -> f32 {
        let mut lanes = [0.0; VIRTUAL_LANES];
        for (i, v) in self.0.into_iter().take(Self::VECTORS).enumerate() {
            // SAFETY: VECTORS·LANES = 16.
            unsafe { S::store(lanes.as_mut_ptr().add(i * S::LANES), v) };
        }
        sum_16(lanes)
    }
}

/// `Σ a_i·b_i` over slices of equal length.
///
/// # Safety
/// The instruction set must be available.
#[inline(always)]
pub(crate) unsafe fn dot<S: Simd>(a: &[f32], b: &[f32]) -> f32 {
    debug_assert_eq!(a.len(), b.len());
    // SAFETY: vectors at the end are partial.
    unsafe {
        let mut sums = LaneSums::<S>::zero();
        for (a, b) in a.chunks(VIRTUAL_LANES).zip(b.chunks(VIRTUAL_LANES)) {
            for i in 0..LaneSums::<S>::VECTORS {
                let lanes = a.len().saturating_sub(i * S::LANES).min(S::LANES);
                if lanes > 0 {
                    let (a, b) = (a.as_ptr().add(i * S::LANES), b.as_ptr().add(i * S::LANES));
                    let sum = sums.vector(i);
                    *sum = S::fma(S::load_partial(a, lanes), S::load_partial(b, lanes), *sum);
                }
            }
        }
        sums.total()
    }
}
