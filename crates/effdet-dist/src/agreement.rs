//! Ranks check that they were started alike.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::ProcessGroup;
use crate::error::DistError;

/// Differences shown one by one; more are counted.
const SHOWN: usize = 20;

/// Compares named values of every rank with those of rank 0.
///
/// # Errors
/// [`DistError::Disagreement`] on every rank with one line per difference: name, value of rank 0, value of the rank that differs. A
/// name that one side lacks counts as one.
pub fn agree(group: &dyn ProcessGroup, facts: &[(String, String)]) -> Result<(), DistError> {
    if group.size() == 1 {
        return Ok(());
    }
    // Names and values are text of a configuration: unit and record separators do not occur in it.
    let lines: Vec<String> = (facts.iter())
        .map(|(name, value)| format!("{name}\x1f{value}"))
        .collect();
    let all = group.all_gather(lines.join("\x1e").as_bytes())?;
    let all: Vec<String> = (all.iter())
        .map(|bytes| String::from_utf8_lossy(bytes).into_owned())
        .collect();
    let facts: Vec<BTreeMap<&str, &str>> = (all.iter())
        .map(|text| {
            text.split('\x1e')
                .filter_map(|line| line.split_once('\x1f'))
                .collect()
        })
        .collect();
    let mut differences = Vec::new();
    for (rank, theirs) in facts.iter().enumerate().skip(1) {
        let names: std::collections::BTreeSet<&str> = facts[0].keys().chain(theirs.keys()).copied().collect();
        for name in names {
            let (expected, actual) = (facts[0].get(name), theirs.get(name));
            if expected != actual {
                differences.push((
                    name,
                    expected.copied().unwrap_or("(absent)"),
                    rank,
                    actual.copied().unwrap_or("(absent)"),
                ));
            }
        }
    }
    if differences.is_empty() {
        return Ok(());
    }
    let mut table = String::new();
    for (name, expected, rank, actual) in differences.iter().take(SHOWN) {
        // Writing to a string cannot fail.
        let _ = writeln!(
            table,
            "  {name}: rank 0 on {} has {expected}, rank {rank} on {} has {actual}",
            group.host(0),
            group.host(*rank)
        );
    }
    if differences.len() > SHOWN {
        let _ = writeln!(table, "  and {} more", differences.len() - SHOWN);
    }
    Err(DistError::Disagreement { table })
}

/// Compares a digest of the weights of every rank with that of rank 0.
///
/// # Errors
/// [`DistError::Diverged`] on every rank with the first rank that differs.
pub fn same_weights(group: &dyn ProcessGroup, step: u64, digest: &str) -> Result<(), DistError> {
    let all = group.all_gather(digest.as_bytes())?;
    match all.iter().position(|other| *other != all[0]) {
        None => Ok(()),
        Some(rank) => Err(DistError::Diverged {
            step,
            rank,
            host: group.host(rank).to_owned(),
        }),
    }
}
