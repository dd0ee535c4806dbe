//! EfficientDet object detection: train, evaluate, run and inspect.
#![forbid(unsafe_code)]

mod cli;
mod commands;
mod draw;
mod npy;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match commands::run(cli::Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
