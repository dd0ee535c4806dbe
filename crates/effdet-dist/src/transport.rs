//! Messages between ranks: the one primitive that collectives are made of.

use std::time::Duration;

use crate::error::{Collective, DistError};

/// A message to a rank.
#[derive(Debug, Clone, Copy)]
pub struct Outgoing<'a> {
    /// Receiver.
    pub to: usize,
    /// Its bytes.
    pub bytes: &'a [u8],
}

/// A message expected from a rank.
#[derive(Debug)]
pub struct Incoming<'a> {
    /// Sender.
    pub from: usize,
    /// Where its bytes go; their number is part of what is expected.
    pub bytes: &'a mut [u8],
}

/// Carries messages between the ranks of a group.
pub trait Transport {
    /// Number of this process, from 0.
    fn rank(&self) -> usize;

    /// Number of processes, at least 1.
    fn size(&self) -> usize;

    /// Takes the machine of every rank, for messages.
    fn set_hosts(&mut self, hosts: Vec<String>);

    /// Machine of a rank; empty before [`Self::set_hosts`].
    fn host(&self, rank: usize) -> &str;

    /// Sends and receives, all at once; at most one message per peer in each direction.
    ///
    /// Messages between two ranks arrive in the order in which they were sent.
    ///
    /// # Errors
    /// [`DistError::DeadlineMissed`] with the first rank that is missing after `timeout`, [`DistError::LengthMismatch`],
    /// [`DistError::OrderMismatch`] and [`DistError::Transport`]. A transport that cannot leave unfinished messages behind ends
    /// the process instead.
    fn exchange(
        &self,
        collective: Collective,
        sends: &[Outgoing<'_>],
        receives: &mut [Incoming<'_>],
        timeout: Duration,
    ) -> Result<(), DistError>;
}

/// The first ranks of a group as a group of their own.
///
/// The whole group is behind a trait object: groups of groups would be types without end.
pub(crate) struct FirstRanks<'a> {
    pub all: &'a dyn Transport,
    pub size: usize,
}

impl Transport for FirstRanks<'_> {
    fn rank(&self) -> usize {
        self.all.rank()
    }

    fn size(&self) -> usize {
        self.size
    }

    /// The machines are known already.
    fn set_hosts(&mut self, _: Vec<String>) {}

    fn host(&self, rank: usize) -> &str {
        self.all.host(rank)
    }

    fn exchange(
        &self,
        collective: Collective,
        sends: &[Outgoing<'_>],
        receives: &mut [Incoming<'_>],
        timeout: Duration,
    ) -> Result<(), DistError> {
        self.all.exchange(collective, sends, receives, timeout)
    }
}
