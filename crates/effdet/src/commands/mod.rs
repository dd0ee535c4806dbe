//! Commands: resolve the command line against the world, do the work, print.

mod inspect_model;
mod model;

use std::process::ExitCode;

use anyhow::Result;
use clap::CommandFactory;

use crate::cli::{Cli, Command, InspectCommand};

/// Runs the command of `cli`.
pub fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::Inspect(args) => match args.command {
            InspectCommand::Model {
                model,
                variables,
                hparams_only,
                json,
            } => {
                inspect_model::run(&model, variables, hparams_only, json)?;
            }
            _ => anyhow::bail!("not wired yet"),
        },
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "effdet", &mut std::io::stdout());
        }
        _ => anyhow::bail!("not wired yet"),
    }
    Ok(ExitCode::SUCCESS)
}
