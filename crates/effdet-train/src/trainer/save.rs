//! Checkpoints of a run.

use effdet_ckpt::{CheckpointState, CheckpointStore, ClassEntry, Retention, Snapshot};
use effdet_model::label_map::{ClassIndex, LabelMap};
use serde_json::json;

use super::{RunInputs, TrainState, Trainer, emit};
use crate::error::TrainError;
use crate::events::{Event, EventSink};

impl Trainer<'_> {
    /// Saves on rank 0 and removes what no rule keeps; `resumed_from` stays.
    pub(super) fn save(
        &self,
        inputs: &RunInputs<'_>,
        state: &TrainState,
        (store, resumed_from): (&CheckpointStore, u64),
        metric: Option<f64>,
        sinks: &mut [&mut dyn EventSink],
    ) -> Result<(), TrainError> {
        if !inputs.group.is_root() {
            return Ok(());
        }
        let hparams = serde_json::to_value(&inputs.network.hparams)
            .map_err(|error| TrainError::Config(format!("hyper-parameters: {error}")))?;
        let configuration = serde_json::to_string(&(&hparams, self.config))
            .map_err(|error| TrainError::Config(format!("configuration: {error}")))?;
        let manifest = CheckpointState {
            step: state.step,
            epoch: self.scheduled(state.step) / self.steps_per_epoch,
            sample_position: state.sample_position,
            model: inputs.network.hparams.name.clone(),
            profile: inputs.network.hparams.profile,
            hparams,
            class_map: class_entries(&inputs.label_map),
            data_fingerprint: inputs.train.fingerprint(),
            config_hash: effdet_ckpt::sha256_hex(configuration.as_bytes()),
            loss_scale: state.loss_scale.map(Into::into),
            metric,
            extra: json!({
                "best": state.best,
                "stale": state.stale,
                "evaluation_due": state.evaluation_due,
                "label_map": inputs.label_map,
                "train": self.config,
            }),
        };
        let slots = state.optimizer.slots();
        let snapshot = Snapshot {
            state: &manifest,
            table: &inputs.network.variables,
            weights: &state.weights,
            ema: state.average.as_ref(),
            slots: &slots,
        };
        let path = store.save(&snapshot)?;
        emit(
            sinks,
            &Event::Saved {
                step: state.step,
                path: &path,
            },
        )?;
        // What this process went on from stays: until it ends, that is the last state known to go on well.
        let mut keep_steps = vec![resumed_from];
        if let Some(every) = self.config.keep_every.filter(|&every| every > 0) {
            let listed = store.list()?.complete;
            let steps = listed.iter().map(|reader| reader.state().step);
            keep_steps.extend(steps.filter(|step| step.is_multiple_of(every)));
        }
        let retention = Retention {
            keep_last: self.config.keep_last.max(1),
            keep_best: self.config.keep_best,
            keep_steps,
        };
        for failed in store.prune(&retention)?.failed {
            let text = format!(
                "cannot remove the old checkpoint {}: {}",
                failed.path.display(),
                failed.error
            );
            emit(sinks, &Event::Warning(text))?;
        }
        Ok(())
    }
}

/// The classes as a checkpoint lists them: one entry per output that stands for a category id, unnamed where the id has none.
pub fn class_entries(label_map: &LabelMap) -> Vec<ClassEntry> {
    (0..label_map.min_num_classes() as u32)
        .filter_map(|index| {
            let id = label_map.category_id(ClassIndex(index))?;
            let name = label_map.name(id).unwrap_or_default().to_owned();
            Some(ClassEntry { id: id.0, name })
        })
        .collect()
}
