//! The process among others: how it learns of them, what it takes of a machine, and how it ends when one of them fails.

use std::fs;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use effdet_data::dataset::DetectionDataset;
use effdet_dist::{ProcessGroup, SingleProcess, agree};
use effdet_model::label_map::LabelMap;
use sha2::{Digest, Sha256};

use super::run_config::{RunConfig, RunData};
use crate::cli::RankArgs;

/// Exit code of a run that ended because a rank did not take part any more.
pub const RANK_MISSING: u8 = 75;

/// How a launcher tells its processes that they belong together: variables that hold the number of ranks.
const SIZE_VARIABLES: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"];
/// Set by process managers that leave the number of ranks to their library.
const PMIX_RANK: &str = "PMIX_RANK";
const SLURM_SIZE: &str = "SLURM_STEP_NUM_TASKS";

/// Whether messages of this process are other ranks' as well, and so not printed.
static SILENT: AtomicBool = AtomicBool::new(false);

/// Whether this process prints what every rank would print.
pub fn speaks() -> bool {
    !SILENT.load(Ordering::Relaxed)
}

/// The ranks of a command.
pub struct Job<'a> {
    /// How to reach the others.
    pub group: &'a dyn ProcessGroup,
    /// Processors for this rank where several share a machine.
    pub threads: Option<usize>,
}

impl Job<'_> {
    /// Whether this rank writes and prints.
    pub fn is_root(&self) -> bool {
        self.group.is_root()
    }

    /// The given thread count, or this rank's share of the machine.
    pub fn threads(&self, given: Option<usize>) -> Option<usize> {
        given.or(self.threads)
    }
}

/// Runs `work` as one of the ranks that this process was started among; alone where nothing says otherwise.
///
/// When several ranks work together and one fails, it prints its error with its rank and machine and ends all of them.
pub fn run(args: &RankArgs, work: impl FnOnce(&Job<'_>) -> Result<ExitCode>) -> Result<ExitCode> {
    let timeout = Duration::try_from_secs_f64(args.dist_timeout);
    let timeout = timeout.ok().filter(|timeout| !timeout.is_zero());
    let timeout = timeout.context("--dist-timeout must be a number of seconds above 0, such as 600")?;
    if !is_started_among_ranks() {
        return work(&Job {
            group: &SingleProcess,
            threads: None,
        });
    }
    among_ranks(timeout, work)
}

/// Whether a launcher started this process as one of several.
pub fn is_started_among_ranks() -> bool {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .and_then(|value| value.parse::<usize>().ok())
    };
    let by_launcher = SIZE_VARIABLES.iter().find_map(|name| number(name));
    let by_slurm = || number(PMIX_RANK).and(number(SLURM_SIZE));
    by_launcher.or_else(by_slurm).is_some_and(|size| size > 1)
}

#[cfg(not(feature = "mpi"))]
fn among_ranks(_: Duration, _: impl FnOnce(&Job<'_>) -> Result<ExitCode>) -> Result<ExitCode> {
    anyhow::bail!(
        "started as one of several ranks, but this program was built without MPI, so every rank would train a model of its own; \
         build it with: cargo build --release -p effdet --features mpi"
    )
}

#[cfg(feature = "mpi")]
fn among_ranks(timeout: Duration, work: impl FnOnce(&Job<'_>) -> Result<ExitCode>) -> Result<ExitCode> {
    use effdet_dist::Ranks;
    use effdet_dist::mpi::MpiTransport;

    let on_failure = |error: &effdet_dist::DistError| {
        tell!("error: {error}");
        leave_if_stuck();
        // The launcher passes messages on in its own time, and aborting ends that.
        std::thread::sleep(Duration::from_millis(300));
    };
    let transport = MpiTransport::start(Box::new(on_failure), i32::from(RANK_MISSING))
        .context("MPI is running already in this process")?;
    let mut ranks = Ranks::new(transport, timeout);
    ranks.introduce(&MpiTransport::processor_name())?;
    SILENT.store(!ranks.is_root(), Ordering::Relaxed);
    let outcome = share_of_machine(&ranks)
        .map_err(anyhow::Error::from)
        .and_then(|threads| {
            let group = &ranks;
            work(&Job { group, threads })
        });
    let outcome = outcome.and_then(|code| {
        ranks.barrier()?;
        Ok(code)
    });
    if let Err(error) = &outcome
        && ranks.size() > 1
    {
        if !ranks.is_root() {
            // What all ranks find, rank 0 tells.
            std::thread::sleep(Duration::from_millis(500));
        }
        tell!(
            "error: rank {} on {}: {error:#}",
            ranks.rank(),
            ranks.host(ranks.rank())
        );
        leave_if_stuck();
        ranks.transport().abort(1);
    }
    outcome
}

/// Ends the process when the end of the job does not: a dead link can hold it.
#[cfg(feature = "mpi")]
fn leave_if_stuck() {
    std::thread::spawn(|| {
        std::thread::sleep(Duration::from_secs(5));
        std::process::exit(i32::from(RANK_MISSING));
    });
}

/// Processors for this rank: those that the launcher bound it to, or its share of those that all ranks of the machine may use.
#[cfg(feature = "mpi")]
fn share_of_machine(group: &dyn ProcessGroup) -> Result<Option<usize>, effdet_dist::DistError> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let own = status
        .lines()
        .find(|line| line.starts_with("Cpus_allowed_list:"))
        .unwrap_or_default();
    let sets = group.all_gather(own.as_bytes())?;
    let host = group.host(group.rank());
    let sharing = (sets.iter().enumerate())
        .filter(|(rank, set)| group.host(*rank) == host && *set == own.as_bytes())
        .count();
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(Some((available / sharing.max(1)).max(1)))
}

/// What rank 0 makes, for all ranks.
pub fn from_root(job: &Job<'_>, make: impl FnOnce() -> Result<Vec<u8>>) -> Result<Vec<u8>> {
    let own = if job.is_root() { make()? } else { Vec::new() };
    Ok(job.group.broadcast_bytes(own, 0)?)
}

/// Refuses ranks that do not run the same program on the same data in the same way.
pub fn verify(job: &Job<'_>, config: &RunConfig, data: &RunData, label_map: &LabelMap) -> Result<()> {
    if job.group.size() == 1 {
        return Ok(());
    }
    let classes = serde_json::to_string(label_map)?;
    let mut facts = vec![
        program()?,
        ("training data".to_owned(), data.train.fingerprint()),
        ("classes".to_owned(), classes),
    ];
    if let Some(val) = &data.val {
        facts.push(("held-out data".to_owned(), val.fingerprint()));
    }
    flatten("", &toml::Value::try_from(config)?, &mut facts);
    Ok(agree(job.group, &facts)?)
}

/// The same for an evaluation: program, weights and data.
pub fn verify_evaluation(job: &Job<'_>, weights: &str, dataset: &DetectionDataset) -> Result<()> {
    if job.group.size() == 1 {
        return Ok(());
    }
    let facts = [
        program()?,
        ("weights".to_owned(), weights.to_owned()),
        ("data".to_owned(), dataset.fingerprint()),
    ];
    Ok(agree(job.group, &facts)?)
}

/// Version of this program and first digits of the hash of its file.
fn program() -> Result<(String, String)> {
    let program = std::env::current_exe().context("cannot tell where this program lies")?;
    let bytes = fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
    let digest = Sha256::digest(&bytes);
    let digits: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let version = env!("CARGO_PKG_VERSION");
    Ok(("program".to_owned(), format!("{version} ({digits})")))
}

/// The values of a configuration with their dotted names.
pub fn flatten(prefix: &str, value: &toml::Value, facts: &mut Vec<(String, String)>) {
    match value {
        toml::Value::Table(table) => {
            for (name, value) in table {
                let dot = if prefix.is_empty() { "" } else { "." };
                flatten(&format!("{prefix}{dot}{name}"), value, facts);
            }
        }
        value => facts.push((prefix.to_owned(), value.to_string())),
    }
}
