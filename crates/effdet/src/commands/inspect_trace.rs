//! `effdet inspect trace`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use effdet_ckpt::{load_tensors, match_variables};
use effdet_cpu::reference::ReferenceEngine;
use effdet_data::decode::{DecodeOptions, decode_rgb};
use effdet_data::preprocess::{Placement, PreprocessConfig, place_image};
use effdet_model::anchors::{AnchorConfig, Anchors};
use effdet_model::assign::Assigner;
use effdet_model::engine::{Engine, ImageBatch, Mode, StepOptions, Targets, TrainBatch};
use effdet_model::hparams::HParams;
use effdet_model::loss::normalizer;
use effdet_model::network::{Network, VariableKind};
use effdet_model::weights::Weights;
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;

use super::checkpoint::Trained;
use super::engine::cpu_engine;
use super::model::{apply_overrides, resolve_hparams};
use crate::cli::{EngineArgs, ModelArgs, StepMemory};
use crate::npy;

/// What to trace.
pub struct Request<'a> {
    pub model: &'a ModelArgs,
    pub engine: &'a EngineArgs,
    pub weights: Option<&'a Path>,
    pub checkpoint: Option<&'a Path>,
    pub input: &'a Path,
    pub boxes: Option<&'a Path>,
    pub mode: &'a str,
    pub reference: bool,
    pub out: &'a Path,
}

/// One object of the boxes file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TraceObject {
    #[serde(rename = "box")]
    box_yxyx_px: [f32; 4],
    class: i32,
}

/// Named tensors on their way into one safetensors file.
#[derive(Default)]
struct Tensors(BTreeMap<String, Tensor>);

struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Tensors {
    fn floats(&mut self, name: impl Into<String>, shape: &[usize], values: &[f32]) {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.insert(name.into(), Dtype::F32, shape, bytes);
    }

    fn integers(&mut self, name: impl Into<String>, shape: &[usize], values: &[i32]) {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.insert(name.into(), Dtype::I32, shape, bytes);
    }

    fn insert(&mut self, name: String, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) {
        let shape = shape.to_vec();
        self.0.insert(name, Tensor { dtype, shape, bytes });
    }

    fn write(&self, path: &Path) -> Result<()> {
        let views = (self.0.iter())
            .map(|(name, tensor)| {
                let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes)
                    .with_context(|| format!("tensor {name}"))?;
                Ok((name.as_str(), view))
            })
            .collect::<Result<Vec<_>>>()?;
        let bytes = safetensors::serialize(views, None)?;
        std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Runs the forward pass, and a training step where there are boxes, and writes everything computed.
pub fn run(request: &Request<'_>) -> Result<()> {
    let mode = match request.mode {
        "infer" => Mode::Infer,
        "train" => Mode::Train,
        other => bail!("--mode {other:?}: known modes are infer and train"),
    };
    let (network, mut weights) = load_network(request)?;
    let mut engine: Box<dyn Engine> = if request.reference {
        Box::new(ReferenceEngine::<f32>::new(Arc::clone(&network))?)
    } else {
        Box::new(cpu_engine(&network, request.engine, StepMemory::default())?)
    };
    let pixels = read_input(request.input, &network.hparams)
        .with_context(|| format!("--input {}", request.input.display()))?;
    let size = network.hparams.image_size;
    let images = ImageBatch {
        batch: pixels.len() / (size.height * size.width * 3),
        pixels: &pixels,
        height: size.height,
        width: size.width,
    };

    let mut tensors = Tensors::default();
    tensors.floats("input", &[images.batch, size.height, size.width, 3], &pixels);
    engine.trace(&weights, &images, mode, &mut |name, shape, values| {
        tensors.floats(name, shape, values);
    })?;
    if let Some(path) = request.boxes {
        let objects = read_boxes(path, images.batch, network.hparams.num_classes)
            .with_context(|| format!("--boxes {}", path.display()))?;
        train_step(
            engine.as_mut(),
            &network,
            &mut weights,
            images,
            &objects,
            &mut tensors,
        )?;
    }
    tensors.write(request.out)?;
    tell!("{} tensors in {}", tensors.0.len(), request.out.display());
    Ok(())
}

fn load_network(request: &Request<'_>) -> Result<(Arc<Network>, Weights)> {
    if let Some(path) = request.checkpoint {
        let mut trained = Trained::open(path)?;
        apply_overrides(&mut trained.hparams, &request.model.hparams)?;
        if let Some(size) = request.model.image_size {
            trained.hparams.image_size = size;
        }
        let network = trained.network()?;
        let weights = trained.weights(&network, false)?;
        return Ok((network, weights));
    }
    let Some(path) = request.weights else {
        bail!("give --weights FILE.safetensors with --model, or --checkpoint");
    };
    let network = Arc::new(Network::new(&resolve_hparams(request.model, "d0")?)?);
    let mut weights = Weights::zeros(&network.variables);
    let report = match_variables(&network.variables, &load_tensors(path)?, &[], &mut weights)?;
    if let Some(missing) = report.reinitialised.first() {
        bail!(
            "{}: {} of {} variables have no tensor, first {} ({}); a trace needs them all: compare with \
             `effdet inspect model --variables`",
            path.display(),
            report.reinitialised.len(),
            network.variables.len(),
            missing.variable,
            missing.reason
        );
    }
    Ok((network, weights))
}

/// Reads `[N, height, width, 3]` values of the network's input size, or prepares an image as evaluation does.
fn read_input(path: &Path, hparams: &HParams) -> Result<Vec<f32>> {
    let size = hparams.image_size;
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
    let (shape, values) = match extension.to_ascii_lowercase().as_str() {
        "npy" => npy::parse(&std::fs::read(path)?)?,
        "safetensors" => {
            let mut tensors = load_tensors(path)?.by_name;
            ensure!(
                tensors.len() == 1 || tensors.contains_key("input"),
                "{} tensors, none is called input",
                tensors.len()
            );
            let tensor = tensors
                .remove("input")
                .or_else(|| tensors.pop_first().map(|(_, tensor)| tensor));
            let tensor = tensor.context("no tensor")?;
            (tensor.shape, tensor.values)
        }
        _ => {
            let image = decode_rgb(&std::fs::read(path)?, &DecodeOptions::default())?;
            let config = PreprocessConfig::new(hparams);
            let placement = Placement::evaluation(&config, image.height() as usize, image.width() as usize);
            let mut values = vec![0.0; size.height * size.width * 3];
            place_image(&config, &image, &placement, &mut values);
            (vec![1, size.height, size.width, 3], values)
        }
    };
    let fits = matches!(shape.as_slice(), [(1..), height, width, 3] if (*height, *width) == (size.height, size.width));
    ensure!(
        fits,
        "shape {shape:?}, the network takes [N, {}, {}, 3]: set --image-size {}x{} or resize",
        size.height,
        size.width,
        shape.get(2).unwrap_or(&0),
        shape.get(1).unwrap_or(&0)
    );
    Ok(values)
}

fn read_boxes(path: &Path, batch: usize, num_classes: usize) -> Result<Vec<Vec<TraceObject>>> {
    let images: Vec<Vec<TraceObject>> = serde_json::from_slice(&std::fs::read(path)?)?;
    ensure!(
        images.len() == batch,
        "{} lists for {batch} images: give one list per image",
        images.len()
    );
    for (image, objects) in images.iter().enumerate() {
        for (index, object) in objects.iter().enumerate() {
            ensure!(
                usize::try_from(object.class).is_ok_and(|class| class < num_classes),
                "image {image}, object {index}: class {} is not within 0..{num_classes}",
                object.class
            );
        }
    }
    Ok(images)
}

/// Runs one training step without an update: targets, losses and the gradient of every variable.
fn train_step(
    engine: &mut dyn Engine,
    network: &Network,
    weights: &mut Weights,
    images: ImageBatch<'_>,
    objects: &[Vec<TraceObject>],
    tensors: &mut Tensors,
) -> Result<()> {
    let anchors = Anchors::new(&AnchorConfig::from(&network.hparams))?;
    let assigner = Assigner::new(&anchors);
    let count = anchors.len();
    let mut class_targets = vec![0; images.batch * count];
    let mut box_targets = vec![0.0; images.batch * count * 4];
    let mut positives = 0;
    for (image, objects) in objects.iter().enumerate() {
        let boxes: Vec<[f32; 4]> = objects.iter().map(|object| object.box_yxyx_px).collect();
        let classes: Vec<i32> = objects.iter().map(|object| object.class).collect();
        let rows = image * count..(image + 1) * count;
        positives += assigner.assign(
            &boxes,
            &classes,
            &mut class_targets[rows.clone()],
            &mut box_targets[rows.start * 4..rows.end * 4],
        );
    }
    tensors.integers("targets/class", &[images.batch, count], &class_targets);
    tensors.floats("targets/box", &[images.batch, count, 4], &box_targets);
    let draw_keys: Vec<u64> = (0..images.batch as u64).collect();
    let batch = TrainBatch {
        images,
        targets: Targets {
            class_targets: &class_targets,
            box_targets: &box_targets,
            normalizer: normalizer(positives),
        },
        draw_keys: &draw_keys,
    };
    let mut gradients = vec![0.0; network.variables.trainable_len()];
    let losses = engine.train_step(weights, &batch, &StepOptions::default(), &mut gradients)?;
    for (name, value) in [
        ("losses/class", losses.class_loss),
        ("losses/box", losses.box_loss),
        ("losses/box_iou", losses.box_iou_loss),
        ("losses/det", losses.det_loss),
        ("targets/normalizer", batch.targets.normalizer),
    ] {
        tensors.floats(name, &[], &[value]);
    }
    for variable in network.variables.iter() {
        if variable.kind == VariableKind::Trainable {
            let name = format!("gradients/{}", variable.name);
            tensors.floats(name, &variable.shape, &gradients[variable.range()]);
        }
    }
    Ok(())
}
