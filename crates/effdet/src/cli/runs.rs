//! `effdet checkpoint` and `effdet compare`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// Options of `checkpoint`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  effdet checkpoint list runs/shape
  effdet checkpoint verify runs/shape --json
  effdet checkpoint gc runs/shape --keep 2 --dry-run
  effdet checkpoint diff runs/shape/step-00000100 runs/shape/step-00000200")]
pub struct CheckpointArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: CheckpointCommand,
}

/// What can be done with the checkpoints of a run.
#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// Complete checkpoints with step, epoch, metric and size, and what is damaged.
    List {
        /// Run folder.
        run: PathBuf,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Verify the checksum of every file; exit 1 when anything is damaged.
    Verify {
        /// Run folder or step folder.
        path: PathBuf,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Remove what killed saves left behind and, with --keep, old checkpoints; the newest intact one always stays.
    Gc {
        /// Run folder.
        run: PathBuf,
        /// Newest checkpoints to keep; without it all stay.
        #[arg(long, value_name = "N")]
        keep: Option<usize>,
        /// Best checkpoints to keep beside them.
        #[arg(long, value_name = "N", default_value_t = 1)]
        keep_best: usize,
        /// Say what would be removed.
        #[arg(long)]
        dry_run: bool,
    },
    /// Differences of state, configuration and values of two checkpoints.
    Diff {
        /// Run folder or step folder.
        a: PathBuf,
        /// Run folder or step folder.
        b: PathBuf,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
}

/// Options of `compare`.
#[derive(Debug, Args)]
#[command(after_help = "\
Exits 1 when --exact finds a difference.

Examples:
  effdet compare runs/a runs/b
  effdet compare before after --exact      proves that a change of the program changed no number")]
pub struct CompareArgs {
    /// Run folder or step folder.
    pub a: PathBuf,
    /// Run folder or step folder.
    pub b: PathBuf,
    /// Demand the same bits in weights, averages and optimiser, and the same losses in every common step.
    #[arg(long)]
    pub exact: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}
