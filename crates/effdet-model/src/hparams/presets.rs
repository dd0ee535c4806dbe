//! The published models and the defaults below them.

use super::*;
use crate::suggest::nearest;

/// Names of all presets.
pub const PRESETS: &[&str] = &[
    "efficientdet-d0",
    "efficientdet-d1",
    "efficientdet-d2",
    "efficientdet-d3",
    "efficientdet-d4",
    "efficientdet-d5",
    "efficientdet-d6",
    "efficientdet-d7",
    "efficientdet-d7x",
    "efficientdet-lite0",
    "efficientdet-lite1",
    "efficientdet-lite2",
    "efficientdet-lite3",
    "efficientdet-lite3x",
    "efficientdet-lite4",
];

impl HParams {
    /// The hyper-parameters of a preset: defaults of the seed for d0–d7x, of automl for the lite family.
    ///
    /// Accepts `efficientdet-d0` and the short form `d0`.
    ///
    /// # Errors
    /// [`HParamsError::UnknownModel`].
    pub fn preset(name: &str) -> Result<Self, HParamsError> {
        let full = if name.starts_with("efficientdet-") {
            name.to_owned()
        } else {
            format!("efficientdet-{name}")
        };
        let unknown = || HParamsError::UnknownModel {
            name: name.to_owned(),
            suggestion: nearest(&full, PRESETS.iter().copied()),
        };
        // backbone, image size, filters, cells, head repeats
        let (backbone, side, filters, cells, repeats) = match full.strip_prefix("efficientdet-").unwrap_or("")
        {
            "d0" => ("b0", 512, 64, 3, 3),
            "d1" => ("b1", 640, 88, 4, 3),
            "d2" => ("b2", 768, 112, 5, 3),
            "d3" => ("b3", 896, 160, 6, 4),
            "d4" => ("b4", 1024, 224, 7, 4),
            "d5" => ("b5", 1280, 288, 7, 4),
            "d6" => ("b6", 1280, 384, 8, 5),
            "d7" => ("b6", 1536, 384, 8, 5),
            "d7x" => ("b7", 1536, 384, 8, 5),
            "lite0" => ("lite0", 320, 64, 3, 3),
            "lite1" => ("lite1", 384, 88, 4, 3),
            "lite2" => ("lite2", 448, 112, 5, 3),
            "lite3" => ("lite3", 512, 160, 6, 4),
            "lite3x" => ("lite3", 640, 200, 6, 4),
            "lite4" => ("lite4", 640, 224, 7, 4),
            _ => return Err(unknown()),
        };
        let mut h = Self {
            name: full.clone(),
            backbone_name: format!("efficientnet-{backbone}"),
            image_size: ImageSize::square(side),
            fpn_num_filters: filters,
            fpn_cell_repeats: cells,
            box_class_repeats: repeats,
            ..Self::seed_defaults()
        };
        if matches!(
            full.as_str(),
            "efficientdet-d6" | "efficientdet-d7" | "efficientdet-d7x"
        ) {
            h.fpn_weight_method = Some(FusionMethod::Sum);
        }
        match full.as_str() {
            "efficientdet-d7" => h.anchor_scale = AnchorScale::All(5.0),
            "efficientdet-d7x" => h.max_level = 8,
            _ => {}
        }
        // Stochastic depth of the larger backbones follows upstream; the seed lost it by a misnamed key.
        h.backbone_survival_prob = (backbone != "b0").then_some(0.8);
        if backbone.starts_with("lite") {
            h.set_profile(Profile::Google);
            h.mean_rgb = [127.0; 3];
            h.stddev_rgb = [128.0; 3];
            h.act_type = ActType::Relu6;
            h.fpn_weight_method = Some(FusionMethod::Sum);
            if matches!(
                full.as_str(),
                "efficientdet-lite0" | "efficientdet-lite1" | "efficientdet-lite2" | "efficientdet-lite3x"
            ) {
                h.anchor_scale = AnchorScale::All(3.0);
            }
        }
        Ok(h)
    }

    fn seed_defaults() -> Self {
        Self {
            name: "efficientdet-d0".into(),
            profile: Profile::Seed,
            backbone_name: "efficientnet-b0".into(),
            act_type: ActType::Swish,
            image_size: ImageSize::square(512),
            target_size: None,
            input_rand_hflip: true,
            jitter_min: 0.1,
            jitter_max: 2.0,
            autoaugment_policy: None,
            grid_mask: false,
            hsv_h: 0.0,
            hsv_s: 0.0,
            hsv_v: 0.0,
            mosaic: 0.0,
            mixup: 0.0,
            close_mosaic: 10.0,
            reduced_decode: false,
            mean_rgb: [0.485 * 255.0, 0.456 * 255.0, 0.406 * 255.0],
            stddev_rgb: [0.229 * 255.0, 0.224 * 255.0, 0.225 * 255.0],
            resize_rule: ResizeRule::Legacy,
            rescale_input: true,
            num_classes: 91,
            skip_crowd_during_training: true,
            max_instances_per_image: 100,
            regenerate_source_id: false,
            min_level: 3,
            max_level: 7,
            num_scales: 3,
            aspect_ratios: vec![Aspect(1.0, 1.0), Aspect(1.4, 0.7), Aspect(0.7, 1.4)],
            anchor_scale: AnchorScale::All(4.0),
            momentum: 0.9,
            optimizer: OptimizerKind::Sgd,
            learning_rate: 0.08,
            lr_warmup_init: 0.008,
            lr_warmup_epoch: 1.0,
            lr_decay_method: LrDecay::Cosine,
            first_lr_drop_epoch: 200.0,
            second_lr_drop_epoch: 250.0,
            poly_lr_power: 0.9,
            clip_gradients_norm: 10.0,
            num_epochs: 300.0,
            label_smoothing: 0.0,
            alpha: 0.25,
            gamma: 1.5,
            delta: 0.1,
            box_loss_weight: 50.0,
            iou_loss_type: None,
            iou_loss_weight: 1.0,
            weight_decay: 4e-5,
            mixed_precision: false,
            loss_scale: 32768.0,
            box_class_repeats: 3,
            fpn_cell_repeats: 3,
            fpn_num_filters: 64,
            separable_conv: true,
            apply_bn_for_resampling: true,
            conv_after_downsample: false,
            conv_bn_act_pattern: false,
            fpn_name: None,
            fpn_weight_method: None,
            fusion_relu: false,
            upsample_rule: UpsampleRule::HalfPixel,
            survival_prob: None,
            backbone_survival_prob: None,
            nms_configs: NmsConfigs::default(),
            moving_average_decay: 0.9998,
            var_freeze_expr: None,
        }
    }
}
