//! Process groups: what the trainer knows about other processes.
//!
//! Data-parallel training needs three collectives over flat `f32` buffers: the sum of the gradients, a broadcast of the initial
//! weights, and a barrier. [`ProcessGroup`] names them; [`SingleProcess`] is the group of one. Nothing outside this crate knows how ranks
//! talk to each other.
//!
//! # What an implementation over several processes owes
//!
//! * Every rank calls the same collectives in the same order with buffers of the same length.
//! * **No call blocks for ever.** A blocking collective never returns when a peer hangs (a stopped process, a dead link). So an MPI
//!   implementation starts the immediate form (`MPI_Iallreduce`, `MPI_Ibcast`, `MPI_Ibarrier`), polls it against a deadline, and returns
//!   [`DistError::DeadlineMissed`] with the rank that is missing. The caller then saves nothing and exits; the launcher ends the others.
//! * **The same bits on every rank.** The sum may depend on the number of ranks but not on timing, and a NaN of one rank reaches all.
//! * Rank 0 alone writes checkpoints and reports.
#![forbid(unsafe_code)]

use std::fmt;
use std::time::Duration;

/// A collective operation, as errors name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Collective {
    /// [`ProcessGroup::all_reduce_sum`].
    AllReduceSum,
    /// [`ProcessGroup::broadcast`].
    Broadcast,
    /// [`ProcessGroup::barrier`].
    Barrier,
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AllReduceSum => "all-reduce",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
        })
    }
}

/// Why a collective failed. The contents of the buffer are unspecified afterwards.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DistError {
    /// Caller: the root of a broadcast is not a rank of the group.
    #[error("broadcast from rank {root}, but the group has the ranks 0 to {}", size - 1)]
    RootOutOfRange {
        /// The given root.
        root: usize,
        /// Ranks in the group.
        size: usize,
    },
    /// Caller: ranks gave buffers of different lengths, so they do not run the same model.
    #[error(
        "{collective}: rank {rank} gave {actual} values where rank 0 gave {expected}; start every rank with the same configuration"
    )]
    LengthMismatch {
        /// The operation.
        collective: Collective,
        /// A rank that differs from rank 0.
        rank: usize,
        /// Values of rank 0.
        expected: usize,
        /// Values of that rank.
        actual: usize,
    },
    /// Environment: a rank did not take part in time.
    #[error(
        "{collective}: rank {rank} is missing after {} s; look at its log and machine, then resume from the last checkpoint",
        waited.as_secs_f64()
    )]
    DeadlineMissed {
        /// The operation.
        collective: Collective,
        /// The first rank that is missing.
        rank: usize,
        /// How long the others waited.
        waited: Duration,
    },
    /// Environment: the transport failed.
    #[error("{collective}: {reason}; resume from the last checkpoint")]
    Transport {
        /// The operation.
        collective: Collective,
        /// What the transport says.
        reason: String,
    },
}

/// The processes that train one model together.
pub trait ProcessGroup: Send {
    /// Number of this process, from 0.
    fn rank(&self) -> usize;

    /// Number of processes, at least 1.
    fn size(&self) -> usize;

    /// Replaces `values` by their sum over all ranks, element by element.
    ///
    /// # Determinism
    /// Every rank receives the same bits, a function of the values and the number of ranks.
    ///
    /// # Errors
    /// [`DistError::LengthMismatch`], [`DistError::DeadlineMissed`], [`DistError::Transport`].
    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<(), DistError>;

    /// Replaces `values` on every rank by those of rank `root`.
    ///
    /// # Errors
    /// [`DistError::RootOutOfRange`] and those of [`ProcessGroup::all_reduce_sum`].
    fn broadcast(&self, values: &mut [f32], root: usize) -> Result<(), DistError>;

    /// Returns when every rank has arrived.
    ///
    /// # Errors
    /// [`DistError::DeadlineMissed`], [`DistError::Transport`].
    fn barrier(&self) -> Result<(), DistError>;

    /// Whether this rank writes checkpoints and reports.
    fn is_root(&self) -> bool {
        self.rank() == 0
    }

    /// Whether `flag` is set on any rank: a request to stop must reach all of them at the same step.
    ///
    /// # Errors
    /// Those of [`ProcessGroup::all_reduce_sum`].
    fn any(&self, flag: bool) -> Result<bool, DistError> {
        let mut votes = [f32::from(u8::from(flag))];
        self.all_reduce_sum(&mut votes)?;
        Ok(votes[0] > 0.0)
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

    fn all_reduce_sum(&self, _values: &mut [f32]) -> Result<(), DistError> {
        Ok(())
    }

    fn broadcast(&self, _values: &mut [f32], root: usize) -> Result<(), DistError> {
        if root >= self.size() {
            return Err(DistError::RootOutOfRange {
                root,
                size: self.size(),
            });
        }
        Ok(())
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
    }

    #[test]
    fn collectives_of_a_single_process_keep_every_bit() {
        let values = [1.5f32, -0.0, f32::NAN, f32::INFINITY, f32::MIN_POSITIVE / 2.0];
        let mut reduced = values;
        SingleProcess.all_reduce_sum(&mut reduced).unwrap();
        SingleProcess.broadcast(&mut reduced, 0).unwrap();
        assert_eq!(reduced.map(f32::to_bits), values.map(f32::to_bits));
        SingleProcess.all_reduce_sum(&mut []).unwrap();
    }

    #[test]
    fn a_broadcast_from_a_rank_that_does_not_exist_is_refused() {
        let error = SingleProcess.broadcast(&mut [0.0], 1).unwrap_err();
        assert_eq!(error, DistError::RootOutOfRange { root: 1, size: 1 });
        assert_eq!(
            error.to_string(),
            "broadcast from rank 1, but the group has the ranks 0 to 0"
        );
    }

    #[test]
    fn a_flag_is_set_when_any_rank_sets_it() {
        assert_eq!(SingleProcess.any(true), Ok(true));
        assert_eq!(SingleProcess.any(false), Ok(false));
        // A rank of a group whose other member votes yes.
        struct WithEagerPeer;
        impl ProcessGroup for WithEagerPeer {
            fn rank(&self) -> usize {
                1
            }
            fn size(&self) -> usize {
                2
            }
            fn all_reduce_sum(&self, values: &mut [f32]) -> Result<(), DistError> {
                values.iter_mut().for_each(|value| *value += 1.0);
                Ok(())
            }
            fn broadcast(&self, _: &mut [f32], _: usize) -> Result<(), DistError> {
                Ok(())
            }
            fn barrier(&self) -> Result<(), DistError> {
                Ok(())
            }
        }
        assert_eq!(WithEagerPeer.any(false), Ok(true));
        assert!(!WithEagerPeer.is_root());
    }

    #[test]
    fn a_missed_deadline_names_the_rank_and_the_next_step() {
        let error = DistError::DeadlineMissed {
            collective: Collective::AllReduceSum,
            rank: 3,
            waited: Duration::from_secs(30),
        };
        assert_eq!(
            error.to_string(),
            "all-reduce: rank 3 is missing after 30 s; look at its log and machine, then resume from the last checkpoint"
        );
    }
}
