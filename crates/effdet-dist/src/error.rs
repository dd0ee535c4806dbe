//! What can go wrong between ranks.

use std::fmt;
use std::time::Duration;

/// A collective operation, as errors name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Collective {
    /// The sum of values over all ranks.
    AllReduceSum,
    /// Values of one rank for all.
    Broadcast,
    /// Bytes of every rank for all.
    AllGather,
    /// Waiting for all.
    Barrier,
}

#[cfg(feature = "mpi")]
impl Collective {
    /// Every operation, in the order of their message tags.
    pub(crate) const ALL: [Self; 4] = [
        Self::AllReduceSum,
        Self::Broadcast,
        Self::AllGather,
        Self::Barrier,
    ];

    /// Place in [`Self::ALL`].
    pub(crate) fn tag(self) -> usize {
        match self {
            Self::AllReduceSum => 0,
            Self::Broadcast => 1,
            Self::AllGather => 2,
            Self::Barrier => 3,
        }
    }
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AllReduceSum => "all-reduce",
            Self::Broadcast => "broadcast",
            Self::AllGather => "all-gather",
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
        "{collective}: rank {rank} on {host} sent {actual} bytes where this rank expects {expected}; start every rank with the same \
         configuration"
    )]
    LengthMismatch {
        /// The operation.
        collective: Collective,
        /// A rank that differs from this one.
        rank: usize,
        /// Its machine.
        host: String,
        /// Bytes that this rank expects.
        expected: usize,
        /// Bytes of that rank.
        actual: usize,
    },
    /// Caller: ranks do not call the same operations in the same order.
    #[error(
        "rank {rank} on {host} is in {theirs} while this rank is in {ours}: this is a bug, please report it"
    )]
    OrderMismatch {
        /// A rank that differs from this one.
        rank: usize,
        /// Its machine.
        host: String,
        /// The operation of this rank.
        ours: Collective,
        /// The operation of that rank.
        theirs: String,
    },
    /// Caller: the ranks were not started alike.
    #[error("the ranks were not started alike; every rank must have the values of rank 0:\n{table}")]
    Disagreement {
        /// One line per difference.
        table: String,
    },
    /// Environment: ranks hold different weights, which no correct machine computes.
    #[error(
        "step {step}: the weights of rank {rank} on {host} differ from those of rank 0; suspect its memory or processor, and resume \
         from the last checkpoint without it"
    )]
    Diverged {
        /// Updates done.
        step: u64,
        /// A rank that differs from rank 0.
        rank: usize,
        /// Its machine.
        host: String,
    },
    /// Environment: a rank did not take part in time.
    #[error(
        "{collective}: rank {rank} on {host} is missing after {:.0} s; look at its log and machine, then resume from the last \
         checkpoint",
        waited.as_secs_f64()
    )]
    DeadlineMissed {
        /// The operation.
        collective: Collective,
        /// The first rank that is missing.
        rank: usize,
        /// Its machine.
        host: String,
        /// How long this rank waited.
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
