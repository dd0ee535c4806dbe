//! The machines of a job.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How long a machine may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// Machines with their slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hosts(Vec<(String, usize)>);

impl Hosts {
    /// Reads a host file: `name`, `name slots=N` or `name:N` per line; `#` begins a comment.
    pub fn read(file: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        Self::parse(&text).with_context(|| file.display().to_string())
    }

    fn parse(text: &str) -> Result<Self> {
        let mut hosts = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_whitespace();
            let Some(name) = words.next() else { continue };
            let (name, mut slots) = match name.rsplit_once(':') {
                Some((name, slots)) => (name, slots.to_owned()),
                None => (name, "1".to_owned()),
            };
            for word in words {
                match word.split_once('=') {
                    Some(("slots", given)) => slots = given.to_owned(),
                    Some(("max_slots" | "max-slots", _)) => {}
                    _ => bail!("line {}: {word:?}: expected slots=N", number + 1),
                }
            }
            let slots: usize = slots
                .parse()
                .with_context(|| format!("line {}: {slots:?} is no number of slots", number + 1))?;
            hosts.push((name.to_owned(), slots));
        }
        ensure!(!hosts.is_empty(), "no machine in it; a line is `name slots=N`");
        Ok(Self(hosts))
    }

    /// Slots of all machines.
    pub fn slots(&self) -> usize {
        self.0.iter().map(|(_, slots)| slots).sum()
    }

    /// Whether all is on this machine.
    pub fn is_local(&self) -> bool {
        self.0
            .iter()
            .all(|(name, _)| name == "localhost" || name == "127.0.0.1")
    }

    /// As Open MPI's `--host` takes them.
    pub fn open_mpi(&self) -> String {
        self.join(|name, slots| format!("{name}:{slots}"))
    }

    /// As the `-hosts` of MPICH takes them.
    pub fn hydra(&self) -> String {
        self.open_mpi()
    }

    fn join(&self, show: impl Fn(&str, usize) -> String) -> String {
        let shown: Vec<String> = self.0.iter().map(|(name, slots)| show(name, *slots)).collect();
        shown.join(",")
    }

    /// Drops the machines on which nothing can be run any more; gives their names.
    pub fn drop_unreachable(&mut self, rsh: &str) -> Vec<String> {
        if self.is_local() {
            return Vec::new();
        }
        let mut lost = Vec::new();
        self.0.retain(|(name, _)| {
            let there = answers(rsh, name);
            if !there {
                lost.push(name.clone());
            }
            there
        });
        lost
    }
}

/// Whether `true` can be run on a machine.
fn answers(rsh: &str, host: &str) -> bool {
    let mut words = rsh.split_whitespace();
    let Some(program) = words.next() else { return false };
    let child = Command::new(program)
        .args(words)
        .args([host, "true"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else { return false };
    let started = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return status.success(),
            Ok(None) if started.elapsed() < ANSWER => std::thread::sleep(Duration::from_millis(50)),
            _ => {
                // It may have ended in between.
                let _ = child.kill();
                let _ = child.wait();
                return false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_files_of_the_usual_kinds_are_read() {
        let hosts =
            Hosts::parse("# cluster\nnode1 slots=8\nnode2:4\n\nnode3 slots=2 max_slots=4 # old\nnode4\n")
                .unwrap();
        assert_eq!(hosts.open_mpi(), "node1:8,node2:4,node3:2,node4:1");
        assert_eq!((hosts.slots(), hosts.is_local()), (15, false));
        assert!(Hosts::parse("localhost slots=4").unwrap().is_local());
    }

    #[test]
    fn faults_of_a_host_file_are_named_by_line() {
        for (text, part) in [
            ("a slots=x", "line 1"),
            ("a\nb cpus=2", "line 2"),
            ("# none", "no machine"),
        ] {
            let message = format!("{:#}", Hosts::parse(text).unwrap_err());
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn machines_that_do_not_answer_are_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let agent = folder.path().join("agent");
        std::fs::write(&agent, "[ \"$1\" = up ]\n").unwrap();
        let mut hosts = Hosts::parse("up slots=2\ndown slots=2").unwrap();
        assert_eq!(
            hosts.drop_unreachable(&format!("sh {}", agent.display())),
            ["down"]
        );
        assert_eq!(hosts.open_mpi(), "up:2");
    }
}
