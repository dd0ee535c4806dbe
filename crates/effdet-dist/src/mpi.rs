//! Ranks as MPI processes (Open MPI, MPICH and what shares their interface).
//!
//! Messages are immediate sends and receives that are polled against the deadline; a message is received only after its length and
//! kind were looked at. MPI has no way to leave unfinished messages behind, so a failed exchange ends every process of the job.

use std::time::{Duration, Instant};

use mpi::environment::Universe;
use mpi::request::{LocalScope, Request};
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, Destination, Equivalence, Source};

use crate::error::{Collective, DistError};
use crate::transport::{Incoming, Outgoing, Transport};

/// How long a rank that waits keeps its processor before it sleeps between looks.
const EAGER: Duration = Duration::from_millis(2);
/// Sleep between looks after that.
const NAP: Duration = Duration::from_micros(50);
/// Looks between two readings of the clock.
const LOOKS: u32 = 32;

/// Most that counts of the time between two readings.
const LONGEST_LOOK: Duration = Duration::from_millis(500);

/// Told of a failure that ends the process, on the rank where it is seen.
pub type OnFailure = Box<dyn Fn(&DistError)>;

/// The ranks that `mpirun`, `srun` or a scheduler started.
pub struct MpiTransport {
    world: SimpleCommunicator,
    hosts: Vec<String>,
    on_failure: OnFailure,
    exit_code: i32,
    /// Ends MPI when dropped, so it goes last.
    _universe: Universe,
}

impl std::fmt::Debug for MpiTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MpiTransport")
            .field("rank", &self.rank())
            .field("size", &self.size())
            .finish_non_exhaustive()
    }
}

impl MpiTransport {
    /// Starts MPI; none when it runs already. A failed exchange calls `on_failure` and ends the job with `exit_code`.
    pub fn start(on_failure: OnFailure, exit_code: i32) -> Option<Self> {
        // Only the thread that holds the group calls MPI, but the engine has others.
        let (universe, _) = mpi::initialize_with_threading(mpi::Threading::Serialized)?;
        let world = universe.world();
        let size = world.size() as usize;
        Some(Self {
            world,
            hosts: vec![String::new(); size],
            on_failure,
            exit_code,
            _universe: universe,
        })
    }

    /// Name of this machine as MPI knows it.
    pub fn processor_name() -> String {
        mpi::environment::processor_name().unwrap_or_else(|_| "an unnamed machine".to_owned())
    }

    /// Ends every process of the job.
    pub fn abort(&self, exit_code: i32) -> ! {
        self.world.abort(exit_code)
    }

    fn check(
        &self,
        ours: Collective,
        rank: usize,
        tag: i32,
        expected: usize,
        actual: usize,
    ) -> Result<(), DistError> {
        let host = self.host(rank).to_owned();
        let theirs = Collective::ALL.get(tag as usize);
        if theirs != Some(&ours) {
            let theirs = theirs.map_or_else(|| format!("message {tag}"), Collective::to_string);
            return Err(DistError::OrderMismatch {
                rank,
                host,
                ours,
                theirs,
            });
        }
        if expected != actual {
            return Err(DistError::LengthMismatch {
                collective: ours,
                rank,
                host,
                expected,
                actual,
            });
        }
        Ok(())
    }

    fn fail(&self, error: &DistError) -> ! {
        (self.on_failure)(error);
        self.abort(self.exit_code)
    }
}

/// Waits between looks at messages: awake at first, then asleep, so that more ranks than processors get on.
struct Patience {
    last: Instant,
    looks: u32,
    waited: Duration,
}

impl Patience {
    fn new() -> Self {
        Self {
            last: Instant::now(),
            looks: 0,
            waited: Duration::ZERO,
        }
    }

    /// Passes some time; gives the time waited so far.
    fn wait(&mut self) -> Duration {
        self.looks += 1;
        if self.waited > EAGER {
            std::thread::sleep(NAP);
        } else {
            std::thread::yield_now();
            if !self.looks.is_multiple_of(LOOKS) {
                return self.waited;
            }
        }
        // A process that was stopped itself must not blame its peers for the time.
        self.waited += self.last.elapsed().min(LONGEST_LOOK);
        self.last = Instant::now();
        self.waited
    }
}

type Pending<'a, 'b> = Request<'a, [u8], &'b LocalScope<'a>>;

/// Drops the requests that are complete.
fn advance(requests: &mut Vec<(usize, Pending<'_, '_>)>) {
    for index in (0..requests.len()).rev() {
        let (rank, request) = requests.swap_remove(index);
        if let Err(pending) = request.test() {
            requests.push((rank, pending));
        }
    }
}

impl Transport for MpiTransport {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
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
        let tag = collective.tag() as i32;
        let mut expected: Vec<(usize, &mut [u8])> = (receives.iter_mut())
            .map(|incoming| (incoming.from, &mut *incoming.bytes))
            .collect();
        mpi::request::scope(|scope| {
            let mut pending = Vec::with_capacity(sends.len() + expected.len());
            for send in sends {
                let peer = self.world.process_at_rank(send.to as i32);
                pending.push((send.to, peer.immediate_send_with_tag(scope, send.bytes, tag)));
            }
            let mut patience = Patience::new();
            loop {
                for index in (0..expected.len()).rev() {
                    let peer = self.world.process_at_rank(expected[index].0 as i32);
                    let Some((message, status)) = peer.immediate_matched_probe() else {
                        continue;
                    };
                    let (from, bytes) = expected.swap_remove(index);
                    let actual = status.count(u8::equivalent_datatype()) as usize;
                    if let Err(error) = self.check(collective, from, status.tag(), bytes.len(), actual) {
                        self.fail(&error);
                    }
                    pending.push((from, message.immediate_matched_receive_into(scope, bytes)));
                }
                advance(&mut pending);
                let missing = expected.first().map(|(rank, _)| *rank);
                let Some(rank) = missing.or(pending.first().map(|(rank, _)| *rank)) else {
                    return Ok(());
                };
                let waited = patience.wait();
                if waited > timeout {
                    let host = self.host(rank).to_owned();
                    self.fail(&DistError::DeadlineMissed {
                        collective,
                        rank,
                        host,
                        waited,
                    });
                }
            }
        })
    }
}
