//! Which buffers a pass needs, when, and where they lie in one region of memory.
//!
//! Layers are built twice by the same code: first to ask for their buffers, then, once these have places, to get them. Hence
//! the plan cannot differ from what is allocated, and asking alone predicts the memory.

use std::sync::Arc;

use crate::arena::{ALIGNMENT, AlignedBuf, Element, Lifetime, Region};

/// Hands out buffers of a region by their lifetimes.
#[derive(Debug)]
pub(crate) struct Memory {
    shares: bool,
    requests: Vec<Request>,
    /// Where the buffers lie, once they have places.
    region: Option<Arc<Region>>,
    next: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Request {
    owner: &'static str,
    bytes: usize,
    lifetime: Lifetime,
    offset: usize,
}

/// Bytes of the buffers of one owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnedBytes {
    /// What the buffers are for.
    pub owner: &'static str,
    /// Bytes of all its buffers together; what shares memory counts for each owner.
    pub bytes: usize,
    /// Bytes of those that are in use in the step that needs most memory.
    pub at_peak: usize,
}

impl Memory {
    /// Takes requests. Buffers share memory where their lifetimes allow, or never if not `shares`.
    pub(crate) fn plan(shares: bool) -> Self {
        Self {
            shares,
            requests: Vec::new(),
            region: None,
            next: 0,
        }
    }

    /// Gives every request its place and allocates them together; the same requests, in the same order, then get their
    /// buffers.
    pub(crate) fn allocate(mut self) -> Self {
        let bytes = self.place();
        self.region = Some(Region::new(bytes));
        self
    }

    /// A buffer for `len` values; empty as long as it has no place.
    ///
    /// # Panics
    /// When it differs from what was asked for in its turn.
    pub(crate) fn buffer<T: Element>(
        &mut self,
        owner: &'static str,
        len: usize,
        lifetime: Lifetime,
    ) -> AlignedBuf<T> {
        let request = Request {
            owner,
            bytes: (len * size_of::<T>()).next_multiple_of(ALIGNMENT),
            lifetime: if self.shares { lifetime } else { Lifetime::ALWAYS },
            offset: 0,
        };
        let Some(region) = &self.region else {
            self.requests.push(request);
            return AlignedBuf::default();
        };
        let placed = self.requests[self.next];
        assert!(
            placed
                == (Request {
                    offset: placed.offset,
                    ..request
                }),
            "buffers are asked for in the order of the plan"
        );
        self.next += 1;
        // SAFETY: `place` keeps buffers apart whose lifetimes overlap, and hands each out once.
        unsafe { AlignedBuf::in_region(region, placed.offset, len, request.lifetime) }
    }

    /// The region; one without memory as long as nothing has its place.
    pub(crate) fn region(&self) -> Arc<Region> {
        self.region.clone().unwrap_or_else(|| Region::new(0))
    }

    /// Gives every request the lowest place that is free during its lifetime, the largest first; gives the bytes of all.
    pub(crate) fn place(&mut self) -> usize {
        let asked: Vec<_> = (self.requests.iter())
            .map(|request| (request.bytes, request.lifetime))
            .collect();
        let (offsets, total) = place(&asked, Preference::Lowest, 1);
        for (request, offset) in self.requests.iter_mut().zip(offsets) {
            request.offset = offset;
        }
        total
    }

    /// The buffers by owner, in order of their first request.
    pub(crate) fn by_owner(&self) -> Vec<OwnedBytes> {
        let live_in = |step: u32| {
            let step = Lifetime {
                first: step,
                last: step,
            };
            self.requests
                .iter()
                .filter(move |request| request.lifetime.overlaps(step))
        };
        let bytes_in = |step: u32| live_in(step).map(|request| request.bytes).sum::<usize>();
        let peak = (self.requests.iter().map(|request| request.lifetime.first))
            .max_by_key(|&step| bytes_in(step))
            .unwrap_or(0);
        let mut owners: Vec<OwnedBytes> = Vec::new();
        for request in &self.requests {
            let live = request.lifetime.overlaps(Lifetime {
                first: peak,
                last: peak,
            });
            let at_peak = if live { request.bytes } else { 0 };
            match owners.iter_mut().find(|owned| owned.owner == request.owner) {
                Some(owned) => {
                    owned.bytes += request.bytes;
                    owned.at_peak += at_peak;
                }
                None => owners.push(OwnedBytes {
                    owner: request.owner,
                    bytes: request.bytes,
                    at_peak,
                }),
            }
        }
        owners
    }
}

/// Where [`place`] looks for room first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Preference {
    /// At the lowest free place.
    Lowest,
    /// In the middle of a larger buffer whose lifetime is over or to come, if there is room. Workers take tensors from end to end
    /// in equal shares: what two workers write then stays on their own side, and no cache line moves from one to the other for
    /// nothing but being overwritten.
    Centred,
}

/// Offsets at which no two buffers overlap whose lifetimes do, and the size of all; multiples of `unit` if sizes are.
///
/// The largest first, each at the lowest place that is free during its lifetime: a few per cent above the best possible for chains of
/// layers.
pub(crate) fn place(
    buffers: &[(usize, Lifetime)],
    preference: Preference,
    unit: usize,
) -> (Vec<usize>, usize) {
    let mut order: Vec<usize> = (0..buffers.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(buffers[i].0));
    let mut offsets = vec![0; buffers.len()];
    let mut total = 0;
    let mut placed: Vec<usize> = Vec::with_capacity(order.len());
    for &index in &order {
        let (size, lifetime) = buffers[index];
        let mut offset = 0;
        // `placed` ascends by offset, so the first gap that is wide enough ends the search.
        let neighbours = || {
            placed
                .iter()
                .filter(|&&other| buffers[other].1.overlaps(lifetime))
        };
        for &other in neighbours() {
            if offsets[other] >= offset + size {
                break;
            }
            offset = offset.max(offsets[other] + buffers[other].0);
        }
        if preference == Preference::Centred {
            let is_free = |offset: usize| {
                neighbours().all(|&other| {
                    offset + size <= offsets[other] || offsets[other] + buffers[other].0 <= offset
                })
            };
            let centred = order[..placed.len()].iter().find_map(|&larger| {
                let offset = offsets[larger] + (buffers[larger].0 - size) / 2 / unit * unit;
                is_free(offset).then_some(offset)
            });
            offset = centred.unwrap_or(offset);
        }
        offsets[index] = offset;
        let at = placed.partition_point(|&other| offsets[other] <= offset);
        placed.insert(at, index);
        total = total.max(offset + size);
    }
    (offsets, total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(memory: &mut Memory) -> Vec<AlignedBuf<f32>> {
        [(100, 0, 9), (40, 1, 3), (60, 4, 6), (30, 2, 5), (10, 7, 7)]
            .map(|(len, first, last)| memory.buffer("test", len, Lifetime { first, last }))
            .into()
    }

    #[test]
    fn buffers_share_memory_exactly_where_their_lifetimes_allow() {
        let mut plan = Memory::plan(true);
        assert!(ask(&mut plan).iter().all(|buffer| buffer.is_empty()));
        let bytes = plan.place();
        for (i, a) in plan.requests.iter().enumerate() {
            for b in &plan.requests[..i] {
                let apart = a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset;
                assert!(apart || !a.lifetime.overlaps(b.lifetime));
            }
        }
        // 100, 60 and 30 values are in use together, on boundaries of 16 values.
        assert_eq!(bytes, 4 * (112 + 64 + 32));
        let mut memory = plan.allocate();
        let buffers = ask(&mut memory);
        let region = memory.region();
        // SAFETY: nothing is borrowed.
        unsafe { region.enter(2) };
        assert_eq!([0, 1, 3].map(|i: usize| buffers[i].len()), [100, 40, 30]);
    }

    #[test]
    fn without_sharing_every_buffer_has_its_own_memory() {
        let mut plan = Memory::plan(false);
        ask(&mut plan);
        assert_eq!(plan.place(), 4 * (112 + 48 + 64 + 32 + 16));
        assert_eq!(plan.by_owner()[0].at_peak, plan.place());
    }
}
