//! Collectives over a transport: direct exchanges, and sums in the order of the ranks.
//!
//! A sum runs in two phases: every rank owns a part of the buffer, receives that part from all others, adds the parts up in f64 in
//! the order of the ranks and sends the result to all. That moves `2·(N−1)/N` buffers per rank, as a ring does, but every element is
//! added in one order whatever the transport, the message sizes or the timing. Short buffers go to everybody at once and are added
//! in the same order. Each rank waits for each other rank directly, so that the one that is missing can be named.

use std::cell::RefCell;
use std::time::Duration;

use bytemuck::Pod;
use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::error::{Collective, DistError};
use crate::transport::{FirstRanks, Incoming, Outgoing, Transport};
use crate::{ProcessGroup, Wire};

/// Values of a long sum that are under way at once: 4 MiB of f32.
const BUCKET: usize = 1 << 20;
/// Values up to which a buffer goes to every rank as a whole.
const SHORT: usize = 2048;
/// Bytes of one message of a broadcast or a gathering.
const PIECE: usize = 64 << 20;

/// A number on its way between ranks.
trait Number: Pod {
    fn to_f64(self) -> f64;
    fn from_f64(value: f64) -> Self;
}

impl Number for f32 {
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

impl Number for f64 {
    fn to_f64(self) -> f64 {
        self
    }
    fn from_f64(value: f64) -> Self {
        value
    }
}

impl Number for f16 {
    fn to_f64(self) -> f64 {
        self.to_f64()
    }
    fn from_f64(value: f64) -> Self {
        // Through f32 as the values themselves came.
        f16::from_f32(value as f32)
    }
}

/// The group of processes behind a transport.
#[derive(Debug)]
pub struct Ranks<T> {
    transport: T,
    timeout: Duration,
    received: RefCell<Vec<u64>>,
    sums: RefCell<Vec<f64>>,
    halves: RefCell<Vec<f16>>,
}

/// The part of `len` values that `rank` of `size` owns.
fn part(len: usize, rank: usize, size: usize) -> std::ops::Range<usize> {
    len * rank / size..len * (rank + 1) / size
}

impl<T: Transport> Ranks<T> {
    /// The group behind `transport`; no collective lasts longer than `timeout`.
    pub fn new(transport: T, timeout: Duration) -> Self {
        Self {
            transport,
            timeout,
            received: RefCell::default(),
            sums: RefCell::default(),
            halves: RefCell::default(),
        }
    }

    /// Exchanges the names of the machines, so that errors can tell them.
    ///
    /// # Errors
    /// Those of [`ProcessGroup::all_gather`].
    pub fn introduce(&mut self, host: &str) -> Result<(), DistError> {
        let names = self.all_gather(host.as_bytes())?;
        let names = names
            .iter()
            .map(|name| String::from_utf8_lossy(name).into_owned());
        self.transport.set_hosts(names.collect());
        Ok(())
    }

    /// The transport.
    pub fn transport(&self) -> &T {
        &self.transport
    }

    fn peers(&self) -> impl Iterator<Item = usize> {
        let (rank, size) = (self.transport.rank(), self.transport.size());
        // Everybody starts with another peer.
        (1..size).map(move |distance| (rank + distance) % size)
    }

    fn exchange(
        &self,
        collective: Collective,
        sends: &[Outgoing<'_>],
        receives: &mut [Incoming<'_>],
    ) -> Result<(), DistError> {
        self.transport.exchange(collective, sends, receives, self.timeout)
    }

    fn sum<N: Number>(&self, values: &mut [N]) -> Result<(), DistError> {
        let (rank, size) = (self.transport.rank(), self.transport.size());
        if size == 1 {
            return Ok(());
        }
        let (short, mut received) = (values.len() <= SHORT, self.received.borrow_mut());
        let own = if short {
            0..values.len()
        } else {
            part(values.len(), rank, size)
        };
        let words = (own.len() * size_of::<N>()).div_ceil(size_of::<u64>());
        received.resize((words * (size - 1)).max(size - 1), 0);
        let outgoing = |to: usize| match short {
            true => 0..values.len(),
            false => part(values.len(), to, size),
        };
        let sends: Vec<Outgoing<'_>> = (self.peers())
            .map(|to| Outgoing {
                to,
                bytes: bytemuck::cast_slice(&values[outgoing(to)]),
            })
            .collect();
        let mut receives: Vec<Incoming<'_>> = (self.peers().zip(received.chunks_exact_mut(words.max(1))))
            .map(|(from, chunk)| Incoming {
                from,
                bytes: &mut bytemuck::cast_slice_mut(chunk)[..own.len() * size_of::<N>()],
            })
            .collect();
        self.exchange(Collective::AllReduceSum, &sends, &mut receives)?;

        let mut sums = self.sums.borrow_mut();
        sums.clear();
        for other in 0..size {
            let piece: &[N] = match (other + size - rank) % size {
                0 => &values[own.clone()],
                distance => {
                    let words = &received[(distance - 1) * words..distance * words];
                    &bytemuck::cast_slice(words)[..own.len()]
                }
            };
            match other {
                0 => sums.extend(piece.iter().map(|v| v.to_f64())),
                _ => sums.iter_mut().zip(piece).for_each(|(sum, v)| *sum += v.to_f64()),
            }
        }
        for (value, &sum) in values[own.clone()].iter_mut().zip(&*sums) {
            *value = N::from_f64(sum);
        }
        drop(sums);
        if short {
            return Ok(());
        }
        self.share_parts(Collective::AllReduceSum, values)
    }

    /// Sends this rank's part of `values` to all and receives theirs.
    fn share_parts<N: Pod>(&self, collective: Collective, values: &mut [N]) -> Result<(), DistError> {
        let (rank, size, len) = (self.transport.rank(), self.transport.size(), values.len());
        let own = part(len, rank, size);
        let (before, rest) = values.split_at_mut(own.start);
        let (mine, after) = rest.split_at_mut(own.len());
        let mine: &[N] = mine;
        let mut receives = Vec::with_capacity(size - 1);
        for (mut rest, ranks) in [(before, 0..rank), (after, rank + 1..size)] {
            for from in ranks {
                let (theirs, others) = rest.split_at_mut(part(len, from, size).len());
                receives.push(Incoming {
                    from,
                    bytes: bytemuck::cast_slice_mut(theirs),
                });
                rest = others;
            }
        }
        let sends: Vec<Outgoing<'_>> = (self.peers())
            .map(|to| Outgoing {
                to,
                bytes: bytemuck::cast_slice(mine),
            })
            .collect();
        self.exchange(collective, &sends, &mut receives)
    }

    /// One piece of a broadcast: short ones directly, long ones in parts that all ranks pass on.
    fn broadcast_piece(&self, bytes: &mut [u8], root: usize) -> Result<(), DistError> {
        let (rank, size) = (self.transport.rank(), self.transport.size());
        let (short, len) = (bytes.len() <= SHORT, bytes.len());
        let share = |of: usize| if short { 0..len } else { part(len, of, size) };
        if rank == root {
            let sends: Vec<Outgoing<'_>> = (self.peers())
                .map(|to| Outgoing {
                    to,
                    bytes: &bytes[share(to)],
                })
                .collect();
            self.exchange(Collective::Broadcast, &sends, &mut [])?;
        } else {
            let incoming = Incoming {
                from: root,
                bytes: &mut bytes[share(rank)],
            };
            self.exchange(Collective::Broadcast, &[], &mut [incoming])?;
        }
        match short {
            true => Ok(()),
            false => self.share_parts(Collective::Broadcast, bytes),
        }
    }
}

impl<T: Transport> ProcessGroup for Ranks<T> {
    fn rank(&self) -> usize {
        self.transport.rank()
    }

    fn size(&self) -> usize {
        self.transport.size()
    }

    fn host(&self, rank: usize) -> &str {
        self.transport.host(rank)
    }

    fn first(&self, size: usize) -> Option<Box<dyn ProcessGroup + '_>> {
        let all = &self.transport;
        let size = size.min(all.size());
        (all.rank() < size).then(|| Box::new(Ranks::new(FirstRanks { all, size }, self.timeout)) as Box<_>)
    }

    fn all_reduce_sum(&self, values: &mut [f32], wire: Wire) -> Result<(), DistError> {
        // An empty buffer is exchanged as well, so that a rank that has more is found.
        let buckets = values.len().div_ceil(BUCKET).max(1);
        for bucket in 0..buckets {
            let end = ((bucket + 1) * BUCKET).min(values.len());
            let values = &mut values[bucket * BUCKET..end];
            match wire {
                Wire::F32 => self.sum(values)?,
                Wire::F16 if self.size() == 1 => {}
                Wire::F16 => {
                    let mut halves = self.halves.borrow_mut();
                    halves.resize(values.len(), f16::ZERO);
                    halves.convert_from_f32_slice(values);
                    self.sum(&mut halves[..])?;
                    halves.convert_to_f32_slice(values);
                }
            }
        }
        Ok(())
    }

    fn all_reduce_sum_f64(&self, values: &mut [f64]) -> Result<(), DistError> {
        self.sum(values)
    }

    fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<(), DistError> {
        let size = self.size();
        if root >= size {
            return Err(DistError::RootOutOfRange { root, size });
        }
        if size == 1 {
            return Ok(());
        }
        bytes
            .chunks_mut(PIECE)
            .try_for_each(|piece| self.broadcast_piece(piece, root))
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, DistError> {
        let (rank, size) = (self.rank(), self.size());
        let own_len = (bytes.len() as u64).to_ne_bytes();
        let mut lengths = vec![own_len; size];
        let sends: Vec<Outgoing<'_>> = (self.peers())
            .map(|to| Outgoing { to, bytes: &own_len })
            .collect();
        let mut receives: Vec<Incoming<'_>> = (lengths.iter_mut().map(|length| &mut length[..]).enumerate())
            .filter(|(from, _)| *from != rank)
            .map(|(from, bytes)| Incoming { from, bytes })
            .collect();
        self.exchange(Collective::AllGather, &sends, &mut receives)?;

        let lengths: Vec<usize> = (lengths.iter().map(|len| u64::from_ne_bytes(*len) as usize)).collect();
        let mut all: Vec<Vec<u8>> = lengths.iter().map(|&len| vec![0; len]).collect();
        all[rank].copy_from_slice(bytes);
        let pieces = lengths.iter().max().map_or(0, |len| len.div_ceil(PIECE));
        let window = |len: usize, piece: usize| (piece * PIECE).min(len)..((piece + 1) * PIECE).min(len);
        for piece in 0..pieces {
            let mine = &bytes[window(bytes.len(), piece)];
            let sends: Vec<Outgoing<'_>> = match mine.is_empty() {
                true => Vec::new(),
                false => self.peers().map(|to| Outgoing { to, bytes: mine }).collect(),
            };
            let mut receives: Vec<Incoming<'_>> = (all.iter_mut().enumerate())
                .filter(|(from, _)| *from != rank)
                .map(|(from, bytes)| {
                    let window = window(bytes.len(), piece);
                    Incoming {
                        from,
                        bytes: &mut bytes[window],
                    }
                })
                .filter(|incoming| !incoming.bytes.is_empty())
                .collect();
            self.exchange(Collective::AllGather, &sends, &mut receives)?;
        }
        Ok(all)
    }

    fn barrier(&self) -> Result<(), DistError> {
        let sends: Vec<Outgoing<'_>> = self.peers().map(|to| Outgoing { to, bytes: &[] }).collect();
        let mut receives: Vec<Incoming<'_>> = (self.peers())
            .map(|from| Incoming { from, bytes: &mut [] })
            .collect();
        self.exchange(Collective::Barrier, &sends, &mut receives)
    }
}
