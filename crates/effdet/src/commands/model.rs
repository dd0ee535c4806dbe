//! Hyper-parameters from the command line.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use effdet_model::hparams::{AutoaugmentPolicy, HParams, Profile};

use crate::cli::{AugmentArgs, Augmentation, ModelArgs};

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

/// Applies the options of augmentation that the command line names.
pub fn apply_augmentation(args: &AugmentArgs, hparams: &mut HParams) -> Result<()> {
    if !args.augment.is_empty() {
        let policies: Vec<AutoaugmentPolicy> = (args.augment.iter())
            .filter_map(|name| match name {
                Augmentation::AutoaugmentV0 => Some(AutoaugmentPolicy::V0),
                Augmentation::AutoaugmentV1 => Some(AutoaugmentPolicy::V1),
                Augmentation::AutoaugmentV2 => Some(AutoaugmentPolicy::V2),
                Augmentation::AutoaugmentV3 => Some(AutoaugmentPolicy::V3),
                Augmentation::Randaugment => Some(AutoaugmentPolicy::Randaug),
                Augmentation::Gridmask | Augmentation::None => None,
            })
            .collect();
        ensure!(
            policies.len() <= 1,
            "--augment: an image goes through one policy, name one of autoaugment-v0 … autoaugment-v3 and randaugment"
        );
        ensure!(
            args.augment.len() == 1 || !args.augment.contains(&Augmentation::None),
            "--augment: none goes with nothing else"
        );
        hparams.autoaugment_policy = policies.first().copied();
        hparams.grid_mask = args.augment.contains(&Augmentation::Gridmask);
    }
    if let Some([hue, saturation, value]) = args.hsv {
        (hparams.hsv_h, hparams.hsv_s, hparams.hsv_v) = (hue, saturation, value);
    }
    for (slot, value) in [
        (&mut hparams.mosaic, args.mosaic),
        (&mut hparams.mixup, args.mixup),
        (&mut hparams.close_mosaic, args.close_mosaic),
    ] {
        if let Some(value) = value {
            *slot = value;
        }
    }
    hparams.reduced_decode |= args.reduced_decode;
    hparams.validate()?;
    Ok(())
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
