//! Hyper-parameters from the command line.

use std::path::Path;

use anyhow::{Context, Result, bail};
use effdet_model::hparams::{HParams, Profile};

use crate::cli::ModelArgs;

/// Applies `--hparams`: pairs, or a TOML or YAML file.
pub fn apply_overrides(hparams: &mut HParams, text: &str) -> Result<()> {
    if text.is_empty() {
        return Ok(());
    }
    let extension = Path::new(text).extension().and_then(|e| e.to_str()).unwrap_or("");
    match extension {
        _ if text.contains('=') => hparams.override_with_pairs(text).context("--hparams"),
        "toml" | "yaml" | "yml" => {
            let content =
                std::fs::read_to_string(text).with_context(|| format!("--hparams: cannot read {text}"))?;
            let result = match extension {
                "toml" => hparams.override_with_toml(&content),
                _ => hparams.override_with_yaml(&content),
            };
            result.with_context(|| format!("--hparams: {text}"))
        }
        _ => bail!("--hparams {text:?} is neither k=v pairs nor a .toml or .yaml file"),
    }
}

/// Preset ← profile ← `--hparams` ← dedicated options; `default` when no model is named.
pub fn resolve_hparams(args: &ModelArgs, default: &str) -> Result<HParams> {
    let mut hparams = HParams::preset(args.model.as_deref().unwrap_or(default))?;
    match args.profile.as_deref() {
        None => {}
        Some("seed") => hparams.set_profile(Profile::Seed),
        Some("google") => hparams.set_profile(Profile::Google),
        Some(other) => bail!("--profile {other:?}: known profiles are seed and google"),
    }
    apply_overrides(&mut hparams, &args.hparams)?;
    if let Some(size) = args.image_size {
        hparams.image_size = size;
    }
    if let Some(classes) = args.num_classes {
        hparams.num_classes = classes;
    }
    hparams.validate()?;
    Ok(hparams)
}
