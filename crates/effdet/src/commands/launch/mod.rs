//! `effdet launch`: `mpirun` under supervision.
//!
//! `mpirun` itself can hang when a machine is lost, and knows nothing of checkpoints. So it runs as a child: its messages are passed
//! on and read, what does not end in time is killed, and a run goes on from its last checkpoint on the machines that answer.

mod hosts;
mod supervise;

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use effdet_ckpt::CheckpointStore;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use self::hosts::Hosts;
use self::supervise::{Ended, supervise};
use super::ranks::RANK_MISSING;
use super::signals::on_signals;
use crate::cli::{CacheArgs, Cli, Command as Inner, LaunchArgs, TrainArgs, parse};

/// Runs the command.
pub fn run(args: &LaunchArgs) -> Result<ExitCode> {
    ensure!(args.ranks > 0, "-n must be at least 1");
    let inner = parse(std::iter::once("effdet".to_owned()).chain(args.command.clone()));
    let train = match inner {
        Ok(Cli {
            command: Inner::Train(train),
        }) => Some(train),
        Ok(Cli {
            command: Inner::Eval(_) | Inner::Bench(_),
        }) => None,
        Ok(_) => bail!(
            "-- {}: only train, eval and bench run on several ranks",
            args.command[0]
        ),
        // Usage errors of the ranks' command are those of the launcher.
        Err(error) => error.exit(),
    };
    let run_dir = train.as_ref().and_then(|train| train.run_dir.clone());
    ensure!(
        args.max_restarts == 0 || run_dir.is_some(),
        "--max-restarts needs a run that can go on: train with --run-dir DIR"
    );
    let mut hosts = args.hostfile.as_deref().map(Hosts::read).transpose()?;
    let mut ranks = args.ranks;
    let mut command = args.command.clone();
    let stops = stop_requests()?;
    let mut restarts = 0;
    loop {
        let mut mpirun = mpirun(args, ranks, hosts.as_ref(), &command)?;
        tell!("{}", shown(&mpirun));
        if args.dry_run {
            return Ok(ExitCode::SUCCESS);
        }
        let ended = supervise(&mut mpirun, &stops, Duration::from_secs(args.grace)).with_context(|| {
            format!(
                "cannot run {}: is MPI installed, or named with --mpirun?",
                args.mpirun
            )
        })?;
        let Ended {
            code,
            missing,
            stopped,
        } = ended;
        let lost = code == i32::from(RANK_MISSING) || code > 128 || missing.is_some();
        if code == 0 || stopped || !lost || restarts == args.max_restarts {
            return Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)));
        }
        restarts += 1;
        if let Some(hosts) = &mut hosts {
            for lost in hosts.drop_unreachable(&args.rsh) {
                tell!("{lost} does not answer: going on without it");
            }
            ranks = ranks.min(hosts.slots());
            ensure!(ranks > 0, "no machine answers");
        }
        if let (Some(train), Some(run_dir)) = (&train, &run_dir)
            && has_checkpoint(run_dir)
        {
            command = resume_command(train, run_dir);
        }
        tell!("restart {restarts} of {} with {ranks} ranks", args.max_restarts);
    }
}

fn has_checkpoint(run_dir: &Path) -> bool {
    CheckpointStore::new(run_dir)
        .list()
        .is_ok_and(|listing| !listing.complete.is_empty())
}

/// The command that goes on with a run: everything else is in its configuration.
fn resume_command(train: &TrainArgs, run_dir: &Path) -> Vec<String> {
    let mut command = vec!["train".to_owned(), "--resume".to_owned()];
    let mut option = |name: &str, value: Option<String>| {
        command.extend(value.map(|value| format!("{name}={value}")));
    };
    option("--run-dir", Some(run_dir.display().to_string()));
    option("--dist-timeout", Some(train.ranks.dist_timeout.to_string()));
    option("--log-steps", Some(train.log_steps.to_string()));
    option("--log-filename", Some(train.log_filename.clone()));
    option("--threads", train.engine.threads.map(|n| n.to_string()));
    option("--isa", train.engine.isa.clone());
    option("--workers", train.workers.map(|n| n.to_string()));
    option("--max-steps", train.max_steps.map(|n| n.to_string()));
    option("--memory-limit", train.memory_limit.map(|n| n.to_string()));
    let CacheArgs {
        cache,
        cache_limit,
        cache_dir,
    } = &train.cache;
    option("--cache", Some(cache.clone()));
    option("--cache-limit", cache_limit.map(|n| n.to_string()));
    option(
        "--cache-dir",
        cache_dir.as_ref().map(|dir| dir.display().to_string()),
    );
    for (flag, set) in [
        ("--quiet", train.quiet),
        ("--grad-checkpoint", train.grad_checkpoint),
        ("--ignore-memory", train.ignore_memory),
        ("--strict", train.strict),
    ] {
        if set {
            command.push(flag.to_owned());
        }
    }
    command
}

/// The command line of the MPI launcher.
fn mpirun(args: &LaunchArgs, ranks: usize, hosts: Option<&Hosts>, inner: &[String]) -> Result<Command> {
    let program = std::env::current_exe().context("cannot tell where this program lies")?;
    let mut command = Command::new(&args.mpirun);
    let option = |name: &str, value: &str| [name.to_owned(), value.to_owned()];
    command.args(option("-np", &ranks.to_string()));
    let local = hosts.is_none_or(|hosts| hosts.is_local());
    if is_open_mpi(&args.mpirun) {
        // Ranks get a moment to save between SIGTERM and SIGKILL, which mpirun spends in full at the end of every failed job; and
        // they do not spin where they share processors.
        command.args(["--mca", "odls_base_sigkill_timeout", "4"]);
        command.args(["--mca", "mpi_yield_when_idle", "1"]);
        command.args(["--bind-to", "none"]);
        if let Some(hosts) = hosts {
            command.args(option("--host", &hosts.open_mpi()));
        }
        if !local {
            command.args(["--mca", "plm_rsh_agent", &args.rsh]);
        } else if hosts.is_none() {
            command.arg("--oversubscribe");
        }
    } else if let Some(hosts) = hosts {
        command.args(option("-hosts", &hosts.hydra()));
        command.args(option("-launcher-exec", &args.rsh));
    }
    command.args(args.mpirun_options.split_whitespace());
    command.arg(program).args(inner);
    command.stdin(Stdio::null());
    Ok(command)
}

/// Whether the launcher is Open MPI's, whose options differ from those of MPICH.
fn is_open_mpi(mpirun: &str) -> bool {
    let output = Command::new(mpirun).arg("--version").output();
    output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("Open MPI"))
}

/// A command as a shell takes it.
fn shown(command: &Command) -> String {
    let quoted = |part: &std::ffi::OsStr| {
        let part = part.to_string_lossy();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
        match !part.is_empty() && part.chars().all(plain) {
            true => part.into_owned(),
            false => format!("'{}'", part.replace('\'', r"'\''")),
        }
    };
    let parts =
        std::iter::once(OsString::from(command.get_program())).chain(command.get_args().map(OsString::from));
    parts.map(|part| quoted(&part)).collect::<Vec<_>>().join(" ")
}

/// Counts SIGTERM, SIGINT and SIGHUP.
fn stop_requests() -> Result<Arc<AtomicUsize>> {
    let requests = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&requests);
    on_signals(&[SIGTERM, SIGINT, SIGHUP], move |_| {
        seen.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    })?;
    Ok(requests)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(arguments: &[&str]) -> Box<TrainArgs> {
        match parse(["effdet", "train"].iter().chain(arguments))
            .unwrap()
            .command
        {
            Inner::Train(train) => train,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_run_that_goes_on_keeps_what_its_configuration_does_not_hold() {
        let first = train(&[
            "--data",
            "d",
            "--epochs",
            "3",
            "--run-dir",
            "r",
            "--threads",
            "2",
            "--dist-timeout",
            "4",
            "--quiet",
            "--ignore-memory",
            "--memory-limit",
            "2GB",
            "--cache",
            "disk",
            "--cache-limit",
            "1GB",
            "--cache-dir",
            "kept",
        ]);
        let command = resume_command(&first, Path::new("r"));
        assert!(
            command.contains(&"--resume".to_owned()) && !command.iter().any(|part| part.contains("epochs"))
        );
        let arguments: Vec<&str> = command[1..].iter().map(String::as_str).collect();
        let again = train(&arguments);
        assert!(again.resume && again.quiet);
        assert_eq!((again.engine.threads, again.ranks.dist_timeout), (Some(2), 4.0));
        assert!(again.ignore_memory && again.memory_limit == first.memory_limit);
        let cache = |train: &TrainArgs| {
            let CacheArgs {
                cache,
                cache_limit,
                cache_dir,
            } = train.cache.clone();
            (cache, cache_limit, cache_dir)
        };
        assert_eq!(cache(&again), cache(&first));
        assert_eq!(cache(&again).1, Some(1_000_000_000));
        let strict = train(&["--resume", "--strict", "--run-dir", "r"]);
        assert!(resume_command(&strict, Path::new("r")).contains(&"--strict".to_owned()));
    }

    #[test]
    fn a_command_is_shown_as_a_shell_takes_it() {
        let mut command = Command::new("mpirun");
        command.args(["-np", "2", "a b", "it's"]);
        assert_eq!(shown(&command), r"mpirun -np 2 'a b' 'it'\''s'");
    }
}
