//! Options of commands that several processes run together.

use clap::Args;

/// How the ranks that `mpirun`, `srun` or `effdet launch` started work together.
#[derive(Debug, Clone, Args)]
pub struct RankArgs {
    /// Seconds that ranks wait for each other; then the run ends with the name of the one that is missing.
    #[arg(long, value_name = "SECONDS", default_value_t = 120.0, alias = "dist_timeout")]
    pub dist_timeout: f64,
}
