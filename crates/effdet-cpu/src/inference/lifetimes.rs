//! Places buffers with known lifetimes in one arena.

use crate::arena::{Bump, Lifetime};
use crate::memory::{Preference, place};

/// A buffer that the planner places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot(usize);

/// Buffers with the steps between which they hold something.
#[derive(Debug, Default)]
pub(super) struct Lifetimes {
    buffers: Vec<Buffer>,
}

#[derive(Debug)]
struct Buffer {
    len: usize,
    lifetime: Lifetime,
}

/// Where every buffer lies.
#[derive(Debug)]
pub(super) struct Placement {
    offsets: Vec<usize>,
    len: usize,
}

impl Lifetimes {
    /// A buffer of `len` values that is written in step `step`.
    pub(super) fn define(&mut self, len: usize, step: u32) -> Slot {
        let lifetime = Lifetime {
            first: step,
            last: step,
        };
        self.buffers.push(Buffer { len, lifetime });
        Slot(self.buffers.len() - 1)
    }

    /// Notes that `step` reads the buffer.
    pub(super) fn read(&mut self, slot: Slot, step: u32) {
        let lifetime = &mut self.buffers[slot.0].lifetime;
        lifetime.last = lifetime.last.max(step);
    }

    /// Offsets at which no two buffers that live in the same step overlap, each on a cache line.
    pub(super) fn place(&self) -> Placement {
        let asked: Vec<_> = (self.buffers.iter())
            .map(|buffer| (Bump::room(buffer.len), buffer.lifetime))
            .collect();
        let (offsets, len) = place(&asked, Preference::Centred, Bump::room(1));
        Placement { offsets, len }
    }
}

impl Placement {
    /// Values that all buffers need together.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// First value of a buffer in the arena.
    pub(super) fn offset(&self, slot: Slot) -> usize {
        self.offsets[slot.0]
    }
}

#[cfg(test)]
mod tests {
    use effdet_model::rng::{Draws, Purpose};

    use super::*;

    fn assert_apart(lifetimes: &Lifetimes, placement: &Placement) {
        let buffers: Vec<_> = lifetimes.buffers.iter().enumerate().collect();
        for &(i, a) in &buffers {
            let at = placement.offset(Slot(i));
            assert_eq!(at % 16, 0, "on a cache line");
            assert!(at + a.len <= placement.len());
            for &(j, b) in &buffers[i + 1..] {
                let other = placement.offset(Slot(j));
                let apart = at + a.len <= other || other + b.len <= at;
                assert!(
                    apart || !a.lifetime.overlaps(b.lifetime),
                    "{a:?} at {at} and {b:?} at {other}"
                );
            }
        }
    }

    #[test]
    fn a_chain_takes_the_room_of_its_largest_neighbours() {
        let mut lifetimes = Lifetimes::default();
        let mut last = lifetimes.define(100, 0);
        for (step, len) in [(1, 1600), (2, 320), (3, 640), (4, 16)] {
            lifetimes.read(last, step);
            last = lifetimes.define(len, step);
        }
        let placement = lifetimes.place();
        assert_apart(&lifetimes, &placement);
        assert_eq!(placement.len(), 1600 + 320);
    }

    #[test]
    fn buffers_that_live_together_never_overlap() {
        for seed in 0..200 {
            let mut draws = Draws::new(seed, Purpose::Synthetic, 0, 0);
            let mut lifetimes = Lifetimes::default();
            let steps = 1 + seed as u32 % 23;
            for step in 0..steps {
                for _ in 0..(draws.uniform() * 4.0) as usize {
                    let slot = lifetimes.define((draws.uniform() * 500.0) as usize, step);
                    lifetimes.read(slot, step + (draws.uniform() * (steps - step) as f32) as u32);
                }
            }
            let placement = lifetimes.place();
            assert_apart(&lifetimes, &placement);
            let needed = (0..steps)
                .map(|step| {
                    let step = Lifetime {
                        first: step,
                        last: step,
                    };
                    let alive = (lifetimes.buffers.iter()).filter(|b| b.lifetime.overlaps(step));
                    alive.map(|b| Bump::room(b.len)).sum::<usize>()
                })
                .max()
                .unwrap_or(0);
            assert!(
                placement.len() <= 2 * needed,
                "{} of at least {needed}",
                placement.len()
            );
        }
    }
}
