//! Checkpoints named on the command line: run folders and step folders.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use effdet_ckpt::{CheckpointReader, CheckpointState, CheckpointStore};
use effdet_model::hparams::HParams;
use effdet_model::label_map::{CategoryId, Indexing, LabelMap};
use effdet_model::network::Network;
use effdet_model::weights::Weights;

/// A checkpoint with its values.
pub struct Trained {
    /// Its folder and manifest.
    pub reader: CheckpointReader,
    /// Hyper-parameters, with the overrides applied.
    pub hparams: HParams,
    /// Classes that it was trained on.
    pub label_map: LabelMap,
}

impl Trained {
    /// Opens a step folder, or the newest checkpoint of a run folder.
    pub fn open(path: &Path) -> Result<Self> {
        let reader = open(path)?;
        let context = || format!("checkpoint {}", reader.path().display());
        let hparams = reader.state().parse_hparams().with_context(context)?;
        let label_map = label_map(reader.state()).with_context(context)?;
        Ok(Self {
            reader,
            hparams,
            label_map,
        })
    }

    /// The network of the hyper-parameters as they are now.
    pub fn network(&self) -> Result<Arc<Network>> {
        Ok(Arc::new(Network::new(&self.hparams)?))
    }

    /// The moving averages of the weights, or the weights themselves where asked for or where there are no averages.
    pub fn weights(&self, network: &Network, raw: bool) -> Result<Weights> {
        let table = &network.variables;
        let averages = if raw { None } else { self.reader.ema(table)? };
        averages.map_or_else(|| Ok(self.reader.weights(table)?), Ok)
    }
}

/// Opens a step folder, or the newest intact checkpoint of a run folder, saying on stderr what was passed over.
pub fn open(path: &Path) -> Result<CheckpointReader> {
    if path.join("manifest.json").is_file() {
        return Ok(CheckpointReader::open(path)?);
    }
    if !path.is_dir() {
        bail!(
            "{}: no such folder; give a run folder or one of its step-* folders",
            path.display()
        );
    }
    let mut listing = CheckpointStore::new(path).list()?;
    let newest = listing.complete.pop();
    let newest_step = newest.as_ref().map(|reader| reader.state().step);
    for bad in &listing.passed_over {
        if newest_step.is_none_or(|step| bad.path > CheckpointStore::new(path).path_of(step)) {
            tell!("warning: passed over {}: {}", bad.path.display(), bad.error);
        }
    }
    newest.with_context(|| {
        format!(
            "{}: no complete checkpoint (step-* folder) in it; give a run folder or a step folder",
            path.display()
        )
    })
}

/// The label map that the trainer saved; of checkpoints from elsewhere, the one that their list of classes means.
fn label_map(state: &CheckpointState) -> Result<LabelMap> {
    if let Some(saved) = state.extra.get("label_map").filter(|saved| !saved.is_null()) {
        return serde_json::from_value(saved.clone()).context("label map in manifest.json");
    }
    let consecutive = state
        .class_map
        .iter()
        .zip(1..)
        .all(|(class, expected)| class.id == expected);
    let indexing = if consecutive {
        Indexing::IdMinusOne
    } else {
        Indexing::Contiguous
    };
    let categories = (state.class_map.iter()).map(|class| (CategoryId(class.id), class.name.clone()));
    Ok(LabelMap::new(indexing, categories)?)
}
