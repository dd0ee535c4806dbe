//! What a run changes, and its way from and to checkpoints.

use effdet_model::network::Network;
use effdet_model::weights::Weights;

use crate::error::TrainError;
use crate::loss_scale::LossScale;
use crate::optimizer::Optimizer;

/// Everything that training changes.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainState {
    /// Variables.
    pub weights: Weights,
    /// Moving averages; none when switched off.
    pub average: Option<Weights>,
    /// Optimiser with its slots.
    pub optimizer: Optimizer,
    /// Updates done.
    pub step: u64,
    /// Position in the stream of samples.
    pub sample_position: u64,
    /// Loss scaling; none where the precision needs none.
    pub loss_scale: Option<LossScale>,
    /// Best value of the selection metric and evaluations since.
    pub best: Option<f64>,
    /// Evaluations without improvement.
    pub stale: u64,
    /// The evaluation behind this step was given up; it comes first when the run goes on.
    pub evaluation_due: bool,
}

impl TrainState {
    /// The start of a run from `weights`.
    ///
    /// # Errors
    /// A freeze pattern that is no regular expression.
    pub fn new(network: &Network, weights: Weights) -> Result<Self, TrainError> {
        let averaged = network.hparams.moving_average_decay > 0.0;
        Ok(Self {
            average: averaged.then(|| Weights::zeros(&network.variables)),
            optimizer: Optimizer::new(&network.hparams, &network.variables)?,
            weights,
            step: 0,
            sample_position: 0,
            loss_scale: None,
            best: None,
            stale: 0,
            evaluation_due: false,
        })
    }

    /// The state of a checkpoint.
    ///
    /// # Errors
    /// [`TrainError::Resume`] when something a run needs is missing.
    pub fn from_checkpoint(
        network: &Network,
        checkpoint: effdet_ckpt::Checkpoint,
    ) -> Result<Self, TrainError> {
        let path = checkpoint.path.display().to_string();
        let missing = |what: String| TrainError::Resume {
            path: path.clone(),
            what,
        };
        let mut state = Self::new(network, checkpoint.weights)?;
        if state.average.is_some() {
            state.average = Some(checkpoint.ema.ok_or_else(|| {
                missing("it has no moving averages; set moving_average_decay=0 or start a new run".into())
            })?);
        }
        for (name, values) in state.optimizer.slots_mut() {
            let saved = checkpoint
                .slots
                .get(name)
                .filter(|saved| saved.len() == values.len());
            let saved = saved.ok_or_else(|| missing(format!("it has no {name} of this optimiser")))?;
            values.copy_from_slice(saved);
        }
        state.step = checkpoint.state.step;
        state.sample_position = checkpoint.state.sample_position;
        state.loss_scale = checkpoint.state.loss_scale.map(LossScale::from);
        let extra = &checkpoint.state.extra;
        state.best = extra.get("best").and_then(serde_json::Value::as_f64);
        state.stale = extra
            .get("stale")
            .and_then(serde_json::Value::as_u64)
            .unwrap_or(0);
        let due = extra.get("evaluation_due").and_then(serde_json::Value::as_bool);
        state.evaluation_due = due.unwrap_or(false);
        Ok(state)
    }

    /// The weights to evaluate and to ship: averages where there are any and a step has been made.
    pub fn evaluation_weights(&self) -> &Weights {
        self.average
            .as_ref()
            .filter(|_| self.step > 0)
            .unwrap_or(&self.weights)
    }
}
