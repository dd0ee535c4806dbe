//! Process groups: what the trainer knows about other processes.
//!
//! Data-parallel training needs few collectives over flat buffers: sums of gradients and statistics, a broadcast of the initial
//! weights, a gathering of detections, a barrier. [`ProcessGroup`] names them; [`SingleProcess`] is the group of one, [`Ranks`] the
//! group behind a [`transport::Transport`]: MPI (cargo feature `mpi`) or the threads of one process. Nothing outside this crate
//! knows how ranks talk to each other.
//!
//! # What every group keeps
//!
//! * Every rank calls the same collectives in the same order with buffers of the same length; a difference is an error.
//! * **No call blocks for ever.** Every exchange is polled against a deadline, and a missed one names the rank, its machine and the
//!   collective. MPI cannot leave unfinished messages behind, so there the process ends with the message.
//! * **The same bits on every rank, and from run to run.** Sums run in the order of the ranks; a NaN of one rank reaches all.
//! * Rank 0 alone writes checkpoints and reports.
#![forbid(unsafe_code)]

mod agreement;
mod collectives;
mod error;
#[cfg(feature = "mpi")]
pub mod mpi;
pub mod threads;
pub mod transport;

pub use agreement::{agree, same_weights};
pub use collectives::Ranks;
pub use error::{Collective, DistError};

/// How values of a sum travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Wire {
    /// As they are.
    #[default]
    F32,
    /// Rounded to half precision on both ways, added in f64: half the bytes.
    F16,
}

/// The processes that train one model together.
pub trait ProcessGroup {
    /// Number of this process, from 0.
    fn rank(&self) -> usize;

    /// Number of processes, at least 1.
    fn size(&self) -> usize;

    /// Machine of a rank, for messages.
    fn host(&self, rank: usize) -> &str;

    /// The first `size` ranks as a group of their own; none for a rank that is not among them.
    fn first(&self, size: usize) -> Option<Box<dyn ProcessGroup + '_>>;

    /// Replaces `values` by their sum over all ranks, element by element, in place.
    ///
    /// # Determinism
    /// Every rank receives the same bits, a function of the values and the number of ranks: values are added in f64 in the order of
    /// the ranks and rounded once.
    ///
    /// # Errors
    /// [`DistError::LengthMismatch`], [`DistError::DeadlineMissed`], [`DistError::Transport`].
    fn all_reduce_sum(&self, values: &mut [f32], wire: Wire) -> Result<(), DistError>;

    /// The same for f64.
    ///
    /// # Errors
    /// As [`Self::all_reduce_sum`].
    fn all_reduce_sum_f64(&self, values: &mut [f64]) -> Result<(), DistError>;

    /// Replaces `bytes` on every rank by those of rank `root`.
    ///
    /// # Errors
    /// [`DistError::RootOutOfRange`] and those of [`Self::all_reduce_sum`].
    fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<(), DistError>;

    /// The bytes of every rank, by rank; their lengths may differ.
    ///
    /// # Errors
    /// As [`Self::all_reduce_sum`].
    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, DistError>;

    /// Returns when every rank has arrived.
    ///
    /// # Errors
    /// As [`Self::all_reduce_sum`].
    fn barrier(&self) -> Result<(), DistError>;

    /// Whether this rank writes checkpoints and reports.
    fn is_root(&self) -> bool {
        self.rank() == 0
    }

    /// Whether `flag` is set on any rank: a request to stop must reach all of them at the same step.
    ///
    /// # Errors
    /// As [`Self::all_reduce_sum`].
    fn any(&self, flag: bool) -> Result<bool, DistError> {
        let mut votes = [f32::from(u8::from(flag))];
        self.all_reduce_sum(&mut votes, Wire::F32)?;
        Ok(votes[0] > 0.0)
    }

    /// The bytes of rank `root` on every rank, whatever their number.
    ///
    /// # Errors
    /// As [`Self::broadcast`].
    fn broadcast_bytes(&self, bytes: Vec<u8>, root: usize) -> Result<Vec<u8>, DistError> {
        let mut len = (bytes.len() as u64).to_ne_bytes();
        self.broadcast(&mut len, root)?;
        let mut bytes = bytes;
        bytes.resize(u64::from_ne_bytes(len) as usize, 0);
        self.broadcast(&mut bytes, root)?;
        Ok(bytes)
    }

    /// Replaces `values` on every rank by those of rank `root`.
    ///
    /// # Errors
    /// As [`Self::broadcast`].
    fn broadcast_f32(&self, values: &mut [f32], root: usize) -> Result<(), DistError> {
        self.broadcast(bytemuck::cast_slice_mut(values), root)
    }
}

/// The group of one process: every collective leaves the values as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SingleProcess;

impl ProcessGroup for SingleProcess {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn host(&self, _rank: usize) -> &str {
        "this machine"
    }

    fn first(&self, _size: usize) -> Option<Box<dyn ProcessGroup + '_>> {
        Some(Box::new(Self))
    }

    fn all_reduce_sum(&self, _values: &mut [f32], _wire: Wire) -> Result<(), DistError> {
        Ok(())
    }

    fn all_reduce_sum_f64(&self, _values: &mut [f64]) -> Result<(), DistError> {
        Ok(())
    }

    fn broadcast(&self, _bytes: &mut [u8], root: usize) -> Result<(), DistError> {
        match root {
            0 => Ok(()),
            _ => Err(DistError::RootOutOfRange { root, size: 1 }),
        }
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, DistError> {
        Ok(vec![bytes.to_vec()])
    }

    fn barrier(&self) -> Result<(), DistError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_process_is_rank_zero_of_one() {
        let group: Box<dyn ProcessGroup> = Box::new(SingleProcess);
        assert_eq!((group.rank(), group.size(), group.is_root()), (0, 1, true));
        assert_eq!(group.barrier(), Ok(()));
        assert_eq!((group.any(true), group.any(false)), (Ok(true), Ok(false)));
        assert_eq!(group.all_gather(b"ab"), Ok(vec![b"ab".to_vec()]));
    }

    #[test]
    fn collectives_of_a_single_process_keep_every_bit() {
        let values = [1.5f32, -0.0, f32::NAN, f32::INFINITY, f32::MIN_POSITIVE / 2.0];
        let mut reduced = values;
        SingleProcess.all_reduce_sum(&mut reduced, Wire::F16).unwrap();
        SingleProcess.broadcast_f32(&mut reduced, 0).unwrap();
        assert_eq!(reduced.map(f32::to_bits), values.map(f32::to_bits));
    }

    #[test]
    fn a_broadcast_from_a_rank_that_does_not_exist_is_refused() {
        let error = SingleProcess.broadcast(&mut [0], 1).unwrap_err();
        assert_eq!(error, DistError::RootOutOfRange { root: 1, size: 1 });
        assert_eq!(
            error.to_string(),
            "broadcast from rank 1, but the group has the ranks 0 to 0"
        );
    }
}
