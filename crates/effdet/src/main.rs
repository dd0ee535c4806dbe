//! EfficientDet object detection: train, evaluate, run and inspect.
#![forbid(unsafe_code)]

/// Prints a line to stderr; a terminal that is gone is no reason to stop.
macro_rules! tell {
    ($($part:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($part)*);
    }};
}

mod cli;
mod commands;
mod draw;
mod npy;

use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::parse(std::env::args_os()).unwrap_or_else(|error| error.exit());
    let prints_results = cli.command.prints_results();
    match commands::run(cli) {
        Ok(code) => code,
        // The reader of our output, `head` say, has seen enough.
        Err(error) if prints_results && is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            tell!("error: {}", commands::describe(&error));
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    io.map(std::io::Error::kind)
        .any(|kind| kind == std::io::ErrorKind::BrokenPipe)
}
