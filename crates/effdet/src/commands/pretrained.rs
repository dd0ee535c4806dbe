//! Weights that a run starts from.

use std::path::Path;

use anyhow::Result;
use effdet_ckpt::{MatchReport, load_tensors, match_variables};
use effdet_model::network::Network;
use effdet_model::weights::Weights;

use super::checkpoint;

/// Weights of a checkpoint or a safetensors file, by name; what does not fit keeps its initial values.
pub fn load_pretrained(path: &Path, network: &Network, weights: &mut Weights) -> Result<MatchReport> {
    let file = if path.is_file() {
        path.to_path_buf()
    } else {
        let step = checkpoint::open(path)?.path().to_path_buf();
        let averages = step.join("ema.safetensors");
        if averages.is_file() {
            averages
        } else {
            step.join("weights.safetensors")
        }
    };
    Ok(match_variables(
        &network.variables,
        &load_tensors(&file)?,
        &[],
        weights,
    )?)
}

/// Variables and tensors named of each list.
const LISTED: usize = 8;

/// Says on stderr what was loaded, what of the file had no use and what keeps its initial values.
pub fn print_match(title: &str, report: &MatchReport) {
    tell!("{title}: {} variables loaded", report.loaded.len());
    let skipped = report.skipped.iter().map(|s| (&s.tensor, &s.reason));
    print_list("tensors of the file not used", skipped);
    let initial = report.reinitialised.iter().map(|r| (&r.variable, &r.reason));
    print_list("variables re-initialised", initial);
}

fn print_list<'a>(what: &str, entries: impl ExactSizeIterator<Item = (&'a String, &'a String)>) {
    let count = entries.len();
    if count == 0 {
        return;
    }
    tell!("  {count} {what}:");
    for (name, reason) in entries.take(LISTED) {
        tell!("    {name}: {reason}");
    }
    if count > LISTED {
        tell!("    and {} more", count - LISTED);
    }
}
