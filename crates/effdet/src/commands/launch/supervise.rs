//! One run of the MPI launcher: its messages, its signals and its end.

use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// Between two looks at the child.
const LOOK: Duration = Duration::from_millis(100);
/// What a rank prints of another that is missing.
const MISSING: &str = " is missing after ";

/// How a run of the launcher ended.
pub struct Ended {
    /// Exit code, 128 + signal for a killed launcher.
    pub code: i32,
    /// What the first rank said that misses another.
    pub missing: Option<String>,
    /// Asked to stop from outside.
    pub stopped: bool,
}

/// Runs `command` to its end. The first of `stops` lets the ranks save and stop, the second ends them, and nothing outlives `grace`
/// after a rank was reported missing.
pub fn supervise(command: &mut Command, stops: &AtomicUsize, grace: Duration) -> Result<Ended> {
    // A group of its own, so that a Ctrl-C reaches this process alone.
    let mut child = command.stderr(Stdio::piped()).process_group(0).spawn()?;
    let pid = Pid::from_child(&child);
    let missing = Arc::new(Mutex::new(None));
    let reader = child.stderr.take().map(|stderr| {
        let missing = Arc::clone(&missing);
        std::thread::spawn(move || pass_on(stderr, &missing))
    });
    let mut heard_stops = 0;
    let mut failed_at: Option<Instant> = None;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        let requests = stops.load(Ordering::Relaxed);
        if requests > heard_stops {
            heard_stops = requests;
            match requests {
                // mpirun passes it on to every rank, which SIGTERM would only give a moment to end.
                1 => {
                    tell!("stopping after this step; once more to end at once");
                    let _ = kill_process(pid, Signal::USR2);
                }
                2 => {
                    let _ = kill_process_group(pid, Signal::TERM);
                }
                _ => end(&mut child),
            }
        }
        if failed_at.is_none() && missing.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            failed_at = Some(Instant::now());
        }
        if failed_at.is_some_and(|since| since.elapsed() > grace) {
            tell!("mpirun does not end by itself: killed with all its processes");
            end(&mut child);
        }
        std::thread::sleep(LOOK);
    };
    if let Some(reader) = reader {
        // A process that holds the pipe open must not hold the supervisor.
        let waited = Instant::now();
        while !reader.is_finished() && waited.elapsed() < Duration::from_secs(2) {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let missing = missing.lock().unwrap_or_else(PoisonError::into_inner).take();
    Ok(Ended {
        code: status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or_default()),
        missing,
        stopped: heard_stops > 0,
    })
}

/// Kills a process with everything that it started.
fn end(child: &mut Child) {
    for pid in descendants(child.id()) {
        if let Some(pid) = Pid::from_raw(pid) {
            // It may have ended already.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    let _ = child.kill();
}

/// Processes that a process started, and those that they started.
fn descendants(root: u32) -> Vec<i32> {
    let processes: Vec<(i32, i32)> = (std::fs::read_dir("/proc").into_iter().flatten().flatten())
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            // The command name may hold spaces and parentheses; the rest follows the last one.
            let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
            Some((pid, parent))
        })
        .collect();
    let mut found = vec![root as i32];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(
            processes
                .iter()
                .filter(|(_, of)| *of == parent)
                .map(|(pid, _)| *pid),
        );
        next += 1;
    }
    found.split_off(1)
}

/// Passes messages on as they come, and notes the first of a missing rank.
fn pass_on(mut from: impl Read, missing: &Mutex<Option<String>>) {
    let mut buffer = [0; 4096];
    let mut line = Vec::new();
    loop {
        let read = match from.read(&mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(read) => &buffer[..read],
        };
        // The reader of our messages may have gone; the run goes on.
        let _ = std::io::stderr().write_all(read);
        for &byte in read {
            if byte != b'\n' {
                line.push(byte);
                continue;
            }
            let text = String::from_utf8_lossy(&line);
            if text.contains(MISSING) {
                let mut missing = missing.lock().unwrap_or_else(PoisonError::into_inner);
                missing.get_or_insert_with(|| text.into_owned());
            }
            line.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn the_code_of_the_launcher_is_passed_on() {
        let none = AtomicUsize::new(0);
        let ended = supervise(&mut shell("exit 7"), &none, Duration::from_secs(1)).unwrap();
        assert_eq!((ended.code, ended.missing, ended.stopped), (7, None, false));
    }

    #[test]
    fn a_launcher_that_hangs_after_a_rank_was_missed_is_killed_with_its_children() {
        let none = AtomicUsize::new(0);
        let script = "echo 'error: all-reduce: rank 1 on b is missing after 4 s' >&2; sleep 600 & sleep 600";
        let started = Instant::now();
        let ended = supervise(&mut shell(script), &none, Duration::from_millis(200)).unwrap();
        assert_eq!(ended.code, 137);
        assert!(ended.missing.is_some_and(|text| text.contains("rank 1 on b")));
        assert!(started.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn a_request_to_stop_reaches_the_launcher_as_the_signal_that_lets_ranks_save() {
        let one = AtomicUsize::new(1);
        let script = "trap 'exit 130' USR2; while :; do sleep 0.05; done";
        // The shell may need a moment to set its trap: the signal would end it with 140 before.
        let ended = supervise(&mut shell(script), &one, Duration::from_secs(5)).unwrap();
        assert!(
            ended.stopped && [130, 128 + 12].contains(&ended.code),
            "{}",
            ended.code
        );
    }
}
