//! Ranks as threads of one process: the transport of tests, and the plainest one.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::collectives::Ranks;
use crate::error::{Collective, DistError};
use crate::transport::{Incoming, Outgoing, Transport};

/// Messages on their way, by sender and receiver.
type Letters = HashMap<(usize, usize), VecDeque<(Collective, Vec<u8>)>>;

#[derive(Debug, Default)]
struct PostOffice {
    letters: Mutex<Letters>,
    arrived: Condvar,
}

/// One rank among the threads of a process.
#[derive(Debug)]
pub struct ThreadTransport {
    rank: usize,
    size: usize,
    hosts: Vec<String>,
    office: Arc<PostOffice>,
}

impl ThreadTransport {
    /// The transports of `size` ranks.
    pub fn connected(size: usize) -> Vec<Self> {
        let office = Arc::new(PostOffice::default());
        (0..size)
            .map(|rank| Self {
                rank,
                size,
                hosts: vec!["this process".to_owned(); size],
                office: Arc::clone(&office),
            })
            .collect()
    }
}

impl Transport for ThreadTransport {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn set_hosts(&mut self, hosts: Vec<String>) {
        self.hosts = hosts;
    }

    fn host(&self, rank: usize) -> &str {
        &self.hosts[rank]
    }

    fn exchange(
        &self,
        collective: Collective,
        sends: &[Outgoing<'_>],
        receives: &mut [Incoming<'_>],
        timeout: Duration,
    ) -> Result<(), DistError> {
        let started = Instant::now();
        let mut letters = self.office.letters.lock().unwrap_or_else(PoisonError::into_inner);
        for send in sends {
            let to = letters.entry((self.rank, send.to)).or_default();
            to.push_back((collective, send.bytes.to_vec()));
        }
        self.office.arrived.notify_all();
        for receive in receives {
            let (theirs, bytes) = loop {
                let letter = letters
                    .get_mut(&(receive.from, self.rank))
                    .and_then(VecDeque::pop_front);
                if let Some(letter) = letter {
                    break letter;
                }
                let Some(left) = timeout.checked_sub(started.elapsed()) else {
                    return Err(DistError::DeadlineMissed {
                        collective,
                        rank: receive.from,
                        host: self.host(receive.from).to_owned(),
                        waited: started.elapsed(),
                    });
                };
                let woken = self.office.arrived.wait_timeout(letters, left);
                letters = woken.unwrap_or_else(PoisonError::into_inner).0;
            };
            check(self, collective, theirs, receive, bytes.len())?;
            receive.bytes.copy_from_slice(&bytes);
        }
        Ok(())
    }
}

fn check(
    transport: &ThreadTransport,
    ours: Collective,
    theirs: Collective,
    receive: &Incoming<'_>,
    actual: usize,
) -> Result<(), DistError> {
    let (rank, host) = (receive.from, transport.host(receive.from).to_owned());
    if ours != theirs {
        let theirs = theirs.to_string();
        return Err(DistError::OrderMismatch {
            rank,
            host,
            ours,
            theirs,
        });
    }
    if receive.bytes.len() != actual {
        return Err(DistError::LengthMismatch {
            collective: ours,
            rank,
            host,
            expected: receive.bytes.len(),
            actual,
        });
    }
    Ok(())
}

/// Runs `work` as every rank of a group of `size` threads; gives the results by rank.
///
/// # Panics
/// When a rank panics.
pub fn run_ranks<R: Send>(
    size: usize,
    timeout: Duration,
    work: impl Fn(&Ranks<ThreadTransport>) -> R + Sync,
) -> Vec<R> {
    let transports = ThreadTransport::connected(size);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (transports.into_iter())
            .map(|transport| {
                let work = &work;
                scope.spawn(move || work(&Ranks::new(transport, timeout)))
            })
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, R>| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        threads.into_iter().map(join).collect()
    })
}
