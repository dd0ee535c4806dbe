//! `effdet checkpoint`: the checkpoints of a run.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use effdet_ckpt::{CheckpointReader, CheckpointStore, Listing, Retention, RunLock};
use serde_json::{Value, json};

use super::compare;
use crate::cli::CheckpointCommand;

/// Runs the command.
pub fn run(command: &CheckpointCommand) -> Result<ExitCode> {
    match command {
        CheckpointCommand::List { run, json } => list(run, *json)?,
        CheckpointCommand::Verify { path, json } => return verify(path, *json),
        CheckpointCommand::Gc {
            run,
            keep,
            keep_best,
            dry_run,
        } => gc(run, *keep, *keep_best, *dry_run)?,
        CheckpointCommand::Diff { a, b, json } => compare::diff(a, b, *json)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn listing(run: &Path) -> Result<Listing> {
    ensure!(
        run.is_dir(),
        "{}: no such folder; give the folder of a run",
        run.display()
    );
    Ok(CheckpointStore::new(run).list()?)
}

fn bytes(reader: &CheckpointReader) -> u64 {
    reader.manifest().files.values().map(|file| file.bytes).sum()
}

fn list(run: &Path, as_json: bool) -> Result<()> {
    let listing = listing(run)?;
    let mut out = std::io::stdout().lock();
    if as_json {
        let complete: Vec<Value> = (listing.complete.iter())
            .map(|reader| {
                let state = reader.state();
                json!({"path": reader.path(), "step": state.step, "epoch": state.epoch, "metric": state.metric, "bytes": bytes(reader)})
            })
            .collect();
        let damaged: Vec<Value> = (listing.passed_over.iter())
            .map(|bad| json!({"path": bad.path, "error": bad.error.to_string()}))
            .collect();
        writeln!(out, "{}", json!({"complete": complete, "damaged": damaged}))?;
        return Ok(());
    }
    writeln!(out, "{:>10} {:>7} {:>8} {:>10}", "step", "epoch", "metric", "MB")?;
    for reader in &listing.complete {
        let state = reader.state();
        let metric = state
            .metric
            .map_or_else(|| "-".to_owned(), |metric| format!("{metric:.4}"));
        let mb = bytes(reader) as f64 / 1e6;
        writeln!(
            out,
            "{:>10} {:>7} {metric:>8} {mb:>10.1}",
            state.step, state.epoch
        )?;
    }
    for bad in &listing.passed_over {
        writeln!(out, "damaged: {}: {}", bad.path.display(), bad.error)?;
    }
    Ok(())
}

fn verify(path: &Path, as_json: bool) -> Result<ExitCode> {
    let mut results: Vec<(String, Option<String>)> = Vec::new();
    let mut check = |name: &Path, result: Result<(), effdet_ckpt::CkptError>| {
        results.push((
            name.display().to_string(),
            result.err().map(|error| error.to_string()),
        ));
    };
    if path.join("manifest.json").is_file() {
        check(
            path,
            CheckpointReader::open(path).and_then(|reader| reader.verify()),
        );
    } else {
        let listing = listing(path)?;
        for reader in &listing.complete {
            check(reader.path(), reader.verify());
        }
        for bad in listing.passed_over {
            check(&bad.path, Err(bad.error));
        }
    }
    ensure!(
        !results.is_empty(),
        "{}: no checkpoint (step-* folder) in it",
        path.display()
    );
    let mut out = std::io::stdout().lock();
    if as_json {
        let rows: Vec<Value> = (results.iter())
            .map(|(path, error)| json!({"path": path, "intact": error.is_none(), "error": error}))
            .collect();
        writeln!(out, "{}", json!(rows))?;
    } else {
        for (path, error) in &results {
            writeln!(out, "{path}: {}", error.as_deref().unwrap_or("intact"))?;
        }
    }
    Ok(match results.iter().all(|(_, error)| error.is_none()) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn gc(run: &Path, keep: Option<usize>, keep_best: usize, dry_run: bool) -> Result<()> {
    listing(run)?;
    // A run that is at work saves into temporary folders.
    let _lock = RunLock::acquire(run, &format!("process {}", std::process::id()))
        .context("checkpoints are collected when no run is at work")?;
    let store = CheckpointStore::new(run);
    let mut out = std::io::stdout().lock();
    let retention = keep.map(|keep| Retention {
        keep_last: keep.max(1),
        keep_best,
        keep_steps: Vec::new(),
    });
    if dry_run {
        if let Some(retention) = &retention {
            for (_, path) in store.superfluous(retention)? {
                writeln!(out, "would remove {}", path.display())?;
            }
        }
        writeln!(out, "would remove temporary folders of killed saves")?;
        return Ok(());
    }
    for path in store.gc()? {
        writeln!(out, "removed {}", path.display())?;
    }
    if let Some(retention) = &retention {
        let pruned = store.prune(retention)?;
        for step in pruned.removed {
            writeln!(out, "removed {}", store.path_of(step).display())?;
        }
        for failed in pruned.failed {
            tell!(
                "warning: cannot remove {}: {}",
                failed.path.display(),
                failed.error
            );
        }
    }
    Ok(())
}
