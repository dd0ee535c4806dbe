//! `effdet recipe`.

use clap::{Args, Subcommand};

/// Options of `recipe`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  effdet recipe list
  effdet recipe show convergence-amp-8xa100-80g
  effdet recipe run convergence-cpu
  effdet recipe run training-benchmark-fp32-8xv100-32g --ranks 2 --set datadir=/data/coco -- --batch-size 4
  effdet recipe run evaluate-fp32-8xv100-32g --dry-run

Recipes speak of the folders $datadir, $checkpointdir and $resultsdir: set them with --set, or as variables of the environment.")]
pub struct RecipeArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: RecipeCommand,
}

/// What to do with recipes.
#[derive(Debug, Subcommand)]
pub enum RecipeCommand {
    /// Names and what they do.
    List,
    /// The command line of a recipe, and what the reference publishes for it.
    Show {
        /// Recipe.
        name: String,
        /// Place of a folder.
        #[arg(long, value_name = "NAME=FOLDER")]
        set: Vec<String>,
    },
    /// Run a recipe.
    Run(RecipeRun),
}

/// Options of `recipe run`.
#[derive(Debug, Args)]
pub struct RecipeRun {
    /// Recipe.
    pub name: String,
    /// Place of a folder.
    #[arg(long, value_name = "NAME=FOLDER")]
    pub set: Vec<String>,
    /// Ranks; default: the recipe's.
    #[arg(long, value_name = "N")]
    pub ranks: Option<usize>,
    /// Check data and memory, print the plan and train nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Options that are added, or take the place of the recipe's.
    #[arg(last = true, value_name = "OPTIONS")]
    pub more: Vec<String>,
}
