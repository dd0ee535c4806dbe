//! `effdet recipe`: complete configurations by name, those of the reference's scripts and their counterparts for a CPU.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use effdet_model::suggest::nearest;
use serde::Deserialize;

use super::launch;
use super::ranks::is_started_among_ranks;
use crate::cli::{Command, RecipeCommand, RecipeRun, parse};

macro_rules! recipes {
    ($($name:literal,)*) => {
        /// Every recipe of the folder `recipes`, by name.
        const RECIPES: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../../../../recipes/", $name, ".toml"))),)*];
    };
}

recipes! {
    "convergence-amp-32xv100-32g",
    "convergence-amp-8xa100-80g",
    "convergence-amp-8xv100-32g",
    "convergence-cpu",
    "convergence-cpu-2ranks",
    "convergence-fp32-32xv100-32g",
    "convergence-fp32-8xv100-32g",
    "convergence-tf32-8xa100-80g",
    "evaluate-amp-8xa100-80g",
    "evaluate-amp-8xv100-32g",
    "evaluate-cpu",
    "evaluate-fp32-8xv100-32g",
    "evaluate-tf32-8xa100-80g",
    "inference",
    "inference-benchmark",
    "inference-benchmark-cpu",
    "inference-cpu",
    "training-benchmark-amp-1xa100-80g",
    "training-benchmark-amp-8xa100-80g",
    "training-benchmark-amp-8xv100-32g",
    "training-benchmark-cpu",
    "training-benchmark-fp32-8xv100-32g",
    "training-benchmark-tf32-1xa100-80g",
    "training-benchmark-tf32-8xa100-80g",
}

/// Folders that recipes speak of, with their places when nothing else is said: those of the reference's containers.
const FOLDERS: [(&str, &str); 3] = [
    ("datadir", "/workspace/coco"),
    ("checkpointdir", "/workspace/checkpoints"),
    ("resultsdir", "/tmp"),
];

/// A command line as a file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Recipe {
    /// What it does.
    about: String,
    /// The reference's script that it stands for.
    script: String,
    /// What the reference publishes for it.
    published: Option<String>,
    /// Processes.
    ranks: usize,
    /// Command and subcommand.
    command: Vec<String>,
    /// Positional arguments.
    #[serde(default)]
    arguments: Vec<String>,
    /// Options by name; `true` is an option without value.
    options: BTreeMap<String, toml::Value>,
    /// Hyper-parameters.
    #[serde(default)]
    hparams: BTreeMap<String, toml::Value>,
}

/// Runs the command.
pub fn run(command: &RecipeCommand) -> Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    match command {
        RecipeCommand::List => {
            for (name, _) in RECIPES {
                writeln!(out, "{name:<36} {}", find(name)?.about)?;
            }
        }
        RecipeCommand::Show { name, set } => {
            let recipe = find(name)?;
            writeln!(out, "{}: {}", name, recipe.about)?;
            writeln!(out, "stands for {}", recipe.script)?;
            if let Some(published) = &recipe.published {
                writeln!(out, "published there: {published}")?;
            }
            let words = recipe.words(&folders(set)?, &[]);
            match recipe.ranks {
                1 => writeln!(out, "effdet {}", words.join(" "))?,
                ranks => writeln!(out, "effdet launch -n {ranks} -- {}", words.join(" "))?,
            }
        }
        RecipeCommand::Run(args) => {
            drop(out);
            return run_recipe(args);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn run_recipe(args: &RecipeRun) -> Result<ExitCode> {
    let recipe = find(&args.name)?;
    let words = recipe.words(&folders(&args.set)?, &args.more);
    let mut cli = match parse(std::iter::once(&"effdet".to_owned()).chain(&words)) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let ranks = args.ranks.unwrap_or(recipe.ranks);
    ensure!(ranks > 0, "--ranks must be at least 1");
    if args.dry_run {
        tell!("{}: effdet {}", args.name, words.join(" "));
        if let Command::Train(train) = &mut cli.command {
            (train.dry_run, train.plan_ranks) = (true, Some(ranks));
            return super::run(cli);
        }
        return check_inputs(&cli.command).map(|()| ExitCode::SUCCESS);
    }
    if ranks == 1 || is_started_among_ranks() {
        return super::run(cli);
    }
    let launch = ["effdet", "launch", "-n", &ranks.to_string(), "--"].map(str::to_owned);
    match parse(launch.iter().chain(&words)).map(|cli| cli.command) {
        Ok(Command::Launch(launch)) => launch::run(&launch),
        Ok(_) => bail!("the launcher's own command line was not understood: this is a bug, please report it"),
        Err(error) => error.exit(),
    }
}

/// Whether what a command reads is there.
fn check_inputs(command: &Command) -> Result<()> {
    let paths: Vec<std::path::PathBuf> = match command {
        Command::Eval(eval) => {
            let source = &eval.source;
            (eval
                .checkpoint
                .iter()
                .chain(&source.data)
                .chain(&source.val_json)
                .cloned())
            .collect()
        }
        Command::Infer(infer) => {
            let inputs = infer.inputs.iter().map(std::path::PathBuf::from);
            std::iter::once(infer.checkpoint.clone()).chain(inputs).collect()
        }
        _ => Vec::new(),
    };
    let pattern = match command {
        Command::Eval(eval) => eval.source.val_file_pattern.as_ref(),
        _ => None,
    };
    for path in &paths {
        ensure!(path.exists(), "{} is missing", path.display());
    }
    if let Some(pattern) = pattern {
        let found = glob::glob(pattern)
            .with_context(|| pattern.clone())?
            .flatten()
            .count();
        ensure!(found > 0, "{pattern}: no record file");
    }
    Ok(())
}

fn find(name: &str) -> Result<Recipe> {
    let Some((_, text)) = RECIPES.iter().find(|(known, _)| *known == name) else {
        let guess = nearest(name, RECIPES.iter().map(|(known, _)| *known));
        bail!("there is no recipe {name:?}{guess}; `effdet recipe list` shows all");
    };
    toml::from_str(text).with_context(|| format!("recipe {name}"))
}

/// Places of the folders: given, of the environment, or the reference's.
fn folders(set: &[String]) -> Result<Vec<(&'static str, String)>> {
    let mut folders: Vec<(&str, String)> = (FOLDERS.iter())
        .map(|(name, place)| (*name, std::env::var(name).unwrap_or_else(|_| (*place).to_owned())))
        .collect();
    for text in set {
        let (name, place) = text.split_once('=').context("--set takes NAME=FOLDER")?;
        let folder = folders.iter_mut().find(|(known, _)| *known == name);
        let names = FOLDERS.map(|(name, _)| name).join(", ");
        folder
            .with_context(|| format!("--set {name}: recipes speak of {names}"))?
            .1 = place.to_owned();
    }
    Ok(folders)
}

impl Recipe {
    /// The command line without the program; options of `more` win over the recipe's.
    fn words(&self, folders: &[(&str, String)], more: &[String]) -> Vec<String> {
        let place = |text: &str| {
            (folders.iter()).fold(text.to_owned(), |text, (name, place)| {
                text.replace(&format!("${name}"), place)
            })
        };
        let overridden = |name: &str| {
            more.iter().any(|word| {
                word.strip_prefix("--")
                    .is_some_and(|word| word.split('=').next() == Some(name))
            })
        };
        let mut words = self.command.clone();
        for (name, value) in self.options.iter().filter(|(name, _)| !overridden(name)) {
            match value {
                toml::Value::Boolean(true) => words.push(format!("--{name}")),
                toml::Value::Boolean(false) => {}
                toml::Value::String(text) => words.push(format!("--{name}={}", place(text))),
                value => words.push(format!("--{name}={value}")),
            }
        }
        if !self.hparams.is_empty() && !overridden("hparams") {
            let pairs: Vec<String> = self
                .hparams
                .iter()
                .map(|(name, value)| format!("{name}={value}"))
                .collect();
            words.push(format!("--hparams={}", pairs.join(",")));
        }
        words.extend(more.iter().cloned());
        words.extend(self.arguments.iter().map(|argument| place(argument)));
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_of_the_folder_is_here_and_is_a_command_line() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes");
        let mut files: Vec<String> = (std::fs::read_dir(folder).unwrap())
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
            .map(|path| path.file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        files.sort();
        let names: Vec<&str> = RECIPES.iter().map(|(name, _)| *name).collect();
        assert_eq!(files, names);
        for name in names {
            let recipe = find(name).unwrap();
            let words = recipe.words(&folders(&[]).unwrap(), &[]);
            let cli = parse(std::iter::once(&"effdet".to_owned()).chain(&words));
            assert!(cli.is_ok(), "{name}: {}", cli.unwrap_err());
            assert!(!words.iter().any(|word| word.contains('$')), "{words:?}");
        }
    }

    /// Source: the reference's scripts: global batch and steps of an epoch of 120,000 images.
    #[test]
    fn convergence_recipes_have_the_batches_of_the_reference() {
        for (name, global, steps) in [
            ("convergence-amp-8xa100-80g", 1600, 75),
            ("convergence-tf32-8xa100-80g", 832, 145),
            ("convergence-amp-8xv100-32g", 512, 235),
            ("convergence-fp32-8xv100-32g", 320, 375),
            ("convergence-amp-32xv100-32g", 2048, 59),
            ("convergence-fp32-32xv100-32g", 1280, 94),
        ] {
            let recipe = find(name).unwrap();
            let batch = recipe.options["batch-size"].as_integer().unwrap() as usize * recipe.ranks;
            assert_eq!((batch, 120_000usize.div_ceil(batch)), (global, steps), "{name}");
        }
    }

    #[test]
    fn options_given_beside_a_recipe_win() {
        let recipe = find("inference-benchmark-cpu").unwrap();
        let more = ["--batch-size".to_owned(), "3".to_owned()];
        let words = recipe.words(&[], &more).join(" ");
        assert_eq!(words, "bench infer --model=d0 --steps=10 --batch-size 3");
    }

    #[test]
    fn a_misspelt_recipe_is_suggested() {
        let message = find("convergence-cpi").unwrap_err().to_string();
        assert!(message.contains("convergence-cpu"), "{message}");
    }
}
