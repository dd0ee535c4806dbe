//! Commands: resolve the command line against the world, do the work, print.

mod bench;
mod cache;
mod ceilings;
mod checkpoint;
mod checkpoints;
mod compare;
mod data;
mod detector;
mod doctor;
mod download;
mod engine;
mod eval;
mod ground_truth;
mod host;
mod infer;
mod inspect_batch;
mod inspect_checkpoint;
mod inspect_machine;
mod inspect_model;
mod inspect_trace;
mod launch;
mod memory;
mod model;
mod plan;
mod pretrained;
mod progress;
mod quickstart;
mod ranks;
mod recipe;
mod report;
mod resume;
mod run_config;
mod sanity;
mod signals;
mod sources;
mod terminal;
mod train;
mod view;

use std::process::ExitCode;

use anyhow::Result;
use clap::CommandFactory;

use crate::cli::{Cli, Command, InspectCommand};

/// Runs the command of `cli`.
pub fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::Bench(args) => return bench::run(&args.command),
        Command::Checkpoint(args) => return checkpoints::run(&args.command),
        Command::Compare(args) => return compare::run(&args),
        Command::Data(args) => return data::run(&args.command),
        Command::Eval(args) => return eval::run(&args),
        Command::Infer(args) => return infer::run(&args),
        Command::Inspect(args) => inspect(&args.command)?,
        Command::Launch(args) => return launch::run(&args),
        Command::Recipe(args) => return recipe::run(&args.command),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "effdet", &mut std::io::stdout());
        }
        Command::Train(args) => return train::run(&args),
    }
    Ok(ExitCode::SUCCESS)
}

/// An error and its causes in one line; a cause that an error already quotes is not repeated.
pub fn describe(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
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
        InspectCommand::Machine { engine, json } => inspect_machine::run(engine, *json),
        InspectCommand::Batch {
            file,
            checkpoint,
            engine,
        } => inspect_batch::run(file, checkpoint.as_deref(), engine),
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

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::describe;

    #[test]
    fn causes_that_an_error_quotes_are_said_once() {
        let quoting = anyhow!("no space").context("cannot write a.csv: no space; free some");
        assert_eq!(describe(&quoting), "cannot write a.csv: no space; free some");
        let plain = Err::<(), _>(anyhow!("no space"))
            .context("saving")
            .context("step 7");
        assert_eq!(describe(&plain.unwrap_err()), "step 7: saving: no space");
    }
}
