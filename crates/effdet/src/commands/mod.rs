//! Commands: resolve the command line against the world, do the work, print.

mod bench;
mod checkpoint;
mod data;
mod detector;
mod engine;
mod eval;
mod ground_truth;
mod host;
mod infer;
mod inspect_checkpoint;
mod inspect_model;
mod inspect_trace;
mod model;
mod pretrained;
mod progress;
mod quickstart;
mod report;
mod run_config;
mod sources;
mod terminal;
mod train;

use std::process::ExitCode;

use anyhow::Result;
use clap::CommandFactory;

use crate::cli::{Cli, Command, InspectCommand};

/// Runs the command of `cli`.
pub fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::Bench(args) => bench::run(&args.command)?,
        Command::Data(args) => data::run(&args.command)?,
        Command::Eval(args) => eval::run(&args)?,
        Command::Infer(args) => return infer::run(&args),
        Command::Inspect(args) => inspect(&args.command)?,
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "effdet", &mut std::io::stdout());
        }
        Command::Train(args) => return train::run(&args),
    }
    Ok(ExitCode::SUCCESS)
}

fn inspect(command: &InspectCommand) -> Result<()> {
    match command {
        InspectCommand::Model {
            model,
            variables,
            hparams_only,
            json,
        } => inspect_model::run(model, *variables, *hparams_only, *json),
        InspectCommand::Checkpoint {
            path,
            variables,
            json,
        } => inspect_checkpoint::run(path, *variables, *json),
        InspectCommand::Trace {
            model,
            engine,
            weights,
            checkpoint,
            input,
            boxes,
            mode,
            reference,
            out,
        } => inspect_trace::run(&inspect_trace::Request {
            model,
            engine,
            weights: weights.as_deref(),
            checkpoint: checkpoint.as_deref(),
            input,
            boxes: boxes.as_deref(),
            mode,
            reference: *reference,
            out,
        }),
    }
}
