//! Keyed random draws: every draw is a function of (seed, purpose, epoch, index), never of what was drawn before it elsewhere.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// What a random draw is for; two purposes never share a stream.
///
/// The discriminants are part of the file format of a run: never renumber them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u64)]
pub enum Purpose {
    /// Initial values of variables; index = position in the variable table.
    Init = 1,
    /// Order of the samples of an epoch.
    Shuffle = 2,
    /// Horizontal flip of one sample.
    Flip = 3,
    /// Scale jitter and crop of one sample.
    Jitter = 4,
    /// Stochastic depth of one image of a step.
    DropConnect = 5,
    /// Rendering of one synthetic image.
    Synthetic = 6,
    /// AutoAugment or RandAugment of one sample.
    Augment = 7,
    /// Mosaic of one sample.
    Mosaic = 8,
    /// Mixup of one sample.
    Mixup = 9,
    /// GridMask of one sample.
    GridMask = 10,
    /// Hue, saturation and value of one sample.
    Hsv = 11,
}

/// A stream of random numbers keyed by (seed, purpose, epoch, index).
///
/// ChaCha8 whose 32-byte key is the four numbers as little-endian `u64`.
///
/// # Determinism
/// The same key gives the same stream on every machine and in every thread.
#[derive(Debug, Clone)]
pub struct Draws(ChaCha8Rng);

impl Draws {
    /// Opens the stream of one key.
    pub fn new(seed: u64, purpose: Purpose, epoch: u64, index: u64) -> Self {
        let mut key = [0u8; 32];
        for (slot, part) in key.chunks_exact_mut(8).zip([seed, purpose as u64, epoch, index]) {
            slot.copy_from_slice(&part.to_le_bytes());
        }
        Self(ChaCha8Rng::from_seed(key))
    }

    /// Next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        self.0.next_u32()
    }

    /// Next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Uniform in [0, 1) on a grid of 2⁻²⁴, as TensorFlow's `random.uniform` for float32.
    pub fn uniform(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// Uniform in [0, 1) on a grid of 2⁻⁵³.
    pub fn uniform_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / 9_007_199_254_740_992.0)
    }

    /// Uniform in [low, high).
    pub fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.uniform()
    }

    /// Uniform integer in [0, bound), without modulo bias; 0 when `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        if bound <= 1 {
            return 0;
        }
        // Lemire's method: the high half of a 128-bit product, rejecting the few biased low halves.
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(bound);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }

    /// Standard normal (Box–Muller, cosine half).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform_f64()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform_f64()).cos()
    }

    /// Standard normal conditioned on |x| ≤ 2, by rejection.
    pub fn truncated_normal(&mut self) -> f64 {
        loop {
            let x = self.normal();
            if x.abs() <= 2.0 {
                return x;
            }
        }
    }

    /// Fisher–Yates shuffle in place.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_key_gives_the_same_stream_and_another_key_another() {
        let draw = |seed, purpose, epoch, index| Draws::new(seed, purpose, epoch, index).next_u64();
        let reference = draw(1, Purpose::Flip, 2, 3);
        assert_eq!(reference, draw(1, Purpose::Flip, 2, 3));
        for other in [
            draw(2, Purpose::Flip, 2, 3),
            draw(1, Purpose::Jitter, 2, 3),
            draw(1, Purpose::Flip, 3, 3),
            draw(1, Purpose::Flip, 2, 4),
        ] {
            assert_ne!(reference, other);
        }
    }

    #[test]
    fn a_stream_is_pinned_so_that_old_runs_stay_repeatable() {
        let mut draws = Draws::new(0, Purpose::Init, 0, 0);
        let first: Vec<u32> = (0..3).map(|_| draws.next_u32()).collect();
        assert_eq!(first, [1_389_847_909, 1_072_424_912, 3_107_563_525]);
    }

    #[test]
    fn uniform_draws_stay_in_range_and_average_one_half() {
        let mut draws = Draws::new(7, Purpose::Jitter, 0, 0);
        let mean = (0..10_000)
            .map(|_| {
                let u = draws.uniform();
                assert!((0.0..1.0).contains(&u));
                f64::from(u)
            })
            .sum::<f64>()
            / 10_000.0;
        assert!((mean - 0.5).abs() < 0.02, "mean {mean}");
    }

    #[test]
    fn a_shuffle_is_a_permutation() {
        let mut items: Vec<u32> = (0..1000).collect();
        Draws::new(3, Purpose::Shuffle, 5, 0).shuffle(&mut items);
        assert_ne!(items, (0..1000).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn truncated_normals_never_leave_two_deviations() {
        let mut draws = Draws::new(3, Purpose::Init, 0, 0);
        assert!((0..5000).all(|_| draws.truncated_normal().abs() <= 2.0));
    }
}
