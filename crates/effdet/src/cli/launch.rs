//! `effdet launch`.

use std::path::PathBuf;

use clap::Args;

/// Options of `launch`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  effdet launch -n 4 -- train --data my_coco --batch-size 16
  effdet launch -n 64 --hostfile hosts --max-restarts 3 -- train --data /data/coco --run-dir runs/coco --sync-bn
  effdet launch -n 2 -- eval --checkpoint runs/coco --data /data/coco

A line of the host file is `name slots=N`. When ranks or machines are lost, the rest is ended, and with --max-restarts the run goes on
from its last checkpoint on the machines that still answer. SIGTERM, or Ctrl-C, lets all ranks save one checkpoint at the same step.")]
pub struct LaunchArgs {
    /// Ranks in all.
    #[arg(long, short = 'n', value_name = "N", alias = "np")]
    pub ranks: usize,
    /// Machines and their slots; default: this machine.
    #[arg(long, value_name = "FILE")]
    pub hostfile: Option<PathBuf>,
    /// Start again from the last checkpoint this often, with what is left of the machines.
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub max_restarts: u32,
    /// Seconds that mpirun may take to end after a rank was reported missing.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub grace: u64,
    /// Program that reaches other machines.
    #[arg(long, value_name = "PROGRAM", default_value = "ssh")]
    pub rsh: String,
    /// The MPI launcher.
    #[arg(long, value_name = "PROGRAM", default_value = "mpirun")]
    pub mpirun: String,
    /// More options of the MPI launcher, separated by spaces.
    #[arg(long, value_name = "OPTIONS", default_value = "", allow_hyphen_values = true)]
    pub mpirun_options: String,
    /// Print the command and stop.
    #[arg(long)]
    pub dry_run: bool,
    /// The command that every rank runs: `train …` or `eval …`.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}
