//! Builds the description from hyper-parameters.

use super::*;
use crate::hparams::{FusionMethod, Profile};

/// Why hyper-parameters describe no network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// Unknown backbone.
    #[error("unknown backbone {name:?}; known: efficientnet-b0 … b7, efficientnet-lite0 … lite4")]
    UnknownBackbone {
        /// The name given.
        name: String,
    },
    /// An option outside what this implementation describes.
    #[error("{option} is not supported: {remedy}")]
    Unsupported {
        /// The option and its value.
        option: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The image is too small or too narrow for the pyramid.
    #[error(
        "level {level}: a {from_height}x{from_width} map cannot be resampled to {to_height}x{to_width} \
         (larger on one axis only): use a larger or squarer image_size, or fewer levels"
    )]
    Resample {
        /// Level of the node.
        level: usize,
        /// Input rows.
        from_height: usize,
        /// Input columns.
        from_width: usize,
        /// Wanted rows.
        to_height: usize,
        /// Wanted columns.
        to_width: usize,
    },
}

/// kernel, repeats, stride, expand ratio, input filters, output filters of the seven stacks of EfficientNet.
const STACKS: [(usize, usize, usize, usize, usize, usize); 7] = [
    (3, 1, 1, 1, 32, 16),
    (3, 2, 2, 6, 16, 24),
    (5, 2, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (5, 3, 1, 6, 80, 112),
    (5, 4, 2, 6, 112, 192),
    (3, 1, 1, 6, 192, 320),
];

struct Backbone {
    width: f64,
    depth: f64,
    lite: bool,
}

fn backbone(name: &str) -> Result<Backbone, NetworkError> {
    let (width, depth, lite) = match name.strip_prefix("efficientnet-").unwrap_or("") {
        "b0" => (1.0, 1.0, false),
        "b1" => (1.0, 1.1, false),
        "b2" => (1.1, 1.2, false),
        "b3" => (1.2, 1.4, false),
        "b4" => (1.4, 1.8, false),
        "b5" => (1.6, 2.2, false),
        "b6" => (1.8, 2.6, false),
        "b7" => (2.0, 3.1, false),
        "lite0" => (1.0, 1.0, true),
        "lite1" => (1.0, 1.1, true),
        "lite2" => (1.1, 1.2, true),
        "lite3" => (1.2, 1.4, true),
        "lite4" => (1.4, 1.8, true),
        _ => {
            return Err(NetworkError::UnknownBackbone {
                name: name.to_owned(),
            });
        }
    };
    Ok(Backbone { width, depth, lite })
}

/// Scales a channel count by the width multiplier, to a multiple of 8 that loses at most a tenth.
fn round_filters(filters: usize, width: f64) -> usize {
    let scaled = width * filters as f64;
    let rounded = (((scaled + 4.0) / 8.0).floor() as usize * 8).max(8);
    if (rounded as f64) < 0.9 * scaled {
        rounded + 8
    } else {
        rounded
    }
}

fn round_repeats(repeats: usize, depth: f64) -> usize {
    (depth * repeats as f64).ceil() as usize
}

/// Collects variables; within a module, statistics come after all trainables.
struct Builder {
    variables: Vec<Variable>,
}

impl Builder {
    fn add(
        &mut self,
        name: String,
        shape: &[usize],
        kind: VariableKind,
        initializer: Initializer,
        object_key: String,
        upstream_name: String,
    ) -> VariableId {
        let id = VariableId(self.variables.len());
        let len = shape.iter().product();
        let shape = shape.to_vec();
        self.variables.push(Variable {
            name,
            shape,
            kind,
            offset: 0,
            len,
            initializer,
            object_key,
            upstream_name,
        });
        id
    }

    fn leaf(&mut self, at: &Place, leaf: &str, shape: &[usize], initializer: Initializer) -> VariableId {
        let kind = if leaf.starts_with("moving_") {
            VariableKind::Statistic
        } else {
            VariableKind::Trainable
        };
        let join = |prefix: &str| format!("{prefix}/{leaf}");
        self.add(
            join(&at.name),
            shape,
            kind,
            initializer,
            join(&at.key),
            join(&at.upstream),
        )
    }

    fn bn(&mut self, at: &Place, channels: usize) -> BatchNorm {
        let mut add = |leaf: &str, value: f32| self.leaf(at, leaf, &[channels], Initializer::Constant(value));
        BatchNorm {
            gamma: add("gamma", 1.0),
            beta: add("beta", 0.0),
            mean: add("moving_mean", 0.0),
            variance: add("moving_variance", 1.0),
            channels,
        }
    }

    fn conv(
        &mut self,
        at: &Place,
        size: usize,
        stride: usize,
        channels: (usize, usize),
        bias: bool,
        init: Initializer,
    ) -> Conv {
        let (in_channels, out_channels) = channels;
        let kernel = self.leaf(at, "kernel", &[size, size, in_channels, out_channels], init);
        let bias = bias.then(|| self.leaf(at, "bias", &[out_channels], Initializer::Constant(0.0)));
        Conv {
            kernel,
            bias,
            size,
            stride,
            in_channels,
            out_channels,
        }
    }

    fn depthwise(
        &mut self,
        at: &Place,
        size: usize,
        stride: usize,
        channels: usize,
        init: Initializer,
    ) -> Depthwise {
        let kernel = self.leaf(at, "depthwise_kernel", &[size, size, channels, 1], init);
        Depthwise {
            kernel,
            size,
            stride,
            channels,
        }
    }

    fn separable(
        &mut self,
        at: &Place,
        channels: (usize, usize),
        init: Initializer,
        bias: f32,
    ) -> SeparableConv {
        let (in_channels, out_channels) = channels;
        let depthwise = self.depthwise(at, 3, 1, in_channels, init);
        let kernel = self.leaf(at, "pointwise_kernel", &[1, 1, in_channels, out_channels], init);
        let bias = Some(self.leaf(at, "bias", &[out_channels], Initializer::Constant(bias)));
        let pointwise = Conv {
            kernel,
            bias,
            size: 1,
            stride: 1,
            in_channels,
            out_channels,
        };
        SeparableConv { depthwise, pointwise }
    }

    /// Puts the statistics added since `start` behind the trainables added since then; gives the map from old to new ids.
    fn statistics_last(&mut self, start: usize) -> Vec<VariableId> {
        let tail: Vec<Variable> = self.variables.drain(start..).collect();
        let mut order: Vec<usize> = (0..tail.len()).collect();
        order.sort_by_key(|&i| tail[i].kind == VariableKind::Statistic);
        let mut moved: Vec<VariableId> = (0..start + tail.len()).map(VariableId).collect();
        for (new, &old) in order.iter().enumerate() {
            moved[start + old] = VariableId(start + new);
        }
        let mut slots: Vec<Option<Variable>> = tail.into_iter().map(Some).collect();
        self.variables
            .extend(order.iter().filter_map(|&old| slots[old].take()));
        moved
    }
}

/// Where a layer's variables go: our name, the object key of a TF2 checkpoint, automl's name.
struct Place {
    name: String,
    key: String,
    upstream: String,
}

impl Place {
    fn new(name: impl Into<String>, key: impl Into<String>, upstream: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            key: key.into(),
            upstream: upstream.into(),
        }
    }

    /// Outside the backbone automl uses the same names.
    fn same(name: impl Into<String>, key: impl Into<String>) -> Self {
        let name = name.into();
        Self {
            upstream: name.clone(),
            name,
            key: key.into(),
        }
    }
}

/// Renames variable ids after a reordering.
trait Remap {
    fn remap(&mut self, moved: &[VariableId]);
}

impl Remap for VariableId {
    fn remap(&mut self, moved: &[VariableId]) {
        *self = moved[self.0];
    }
}

impl<T: Remap> Remap for Option<T> {
    fn remap(&mut self, moved: &[VariableId]) {
        if let Some(inner) = self {
            inner.remap(moved);
        }
    }
}

macro_rules! remap_fields {
    ($type:ty: $($field:ident),+) => {
        impl Remap for $type {
            fn remap(&mut self, moved: &[VariableId]) {
                $(self.$field.remap(moved);)+
            }
        }
    };
}

remap_fields!(Conv: kernel, bias);
remap_fields!(Depthwise: kernel);
remap_fields!(BatchNorm: gamma, beta, mean, variance);
remap_fields!(SeparableConv: depthwise, pointwise);
remap_fields!(ChannelMatch: conv, bn);

/// Numbers repeated layer names as Keras does: `conv2d`, `conv2d_1` …
#[derive(Default)]
struct Counter(usize);

impl Counter {
    fn next(&mut self, base: &str) -> String {
        self.0 += 1;
        if self.0 == 1 {
            base.to_owned()
        } else {
            format!("{base}_{}", self.0 - 1)
        }
    }
}

pub(super) fn build(hparams: &HParams) -> Result<Network, NetworkError> {
    let unsupported = |option: String, remedy| Err(NetworkError::Unsupported { option, remedy });
    if !hparams.separable_conv {
        return unsupported(
            "separable_conv=false".into(),
            "leave it true; no published model uses it",
        );
    }
    if hparams.conv_after_downsample || hparams.conv_bn_act_pattern {
        return unsupported(
            "conv_after_downsample or conv_bn_act_pattern".into(),
            "leave both false; no published model uses them",
        );
    }
    if let Some(name) = hparams.fpn_name.as_deref().filter(|&name| name != "bifpn") {
        return unsupported(format!("fpn_name={name}"), "use bifpn");
    }

    let mut builder = Builder {
        variables: Vec::new(),
    };
    let image = MapSize {
        height: hparams.image_size.height,
        width: hparams.image_size.width,
    };
    let (stem, blocks) = build_backbone(&mut builder, hparams, image)?;

    let mut maps = vec![image];
    for _ in 0..hparams.max_level {
        let last = maps[maps.len() - 1];
        maps.push(MapSize {
            height: last.height.div_ceil(2),
            width: last.width.div_ceil(2),
        });
    }
    let levels: Vec<Level> = (hparams.min_level..=hparams.max_level)
        .map(|level| Level {
            level,
            map: maps[level],
        })
        .collect();

    let backbone_levels: Vec<usize> = (hparams.min_level..=hparams.max_level.min(5))
        .filter_map(|level| blocks.iter().position(|block| block.endpoint == Some(level)))
        .collect();
    // Channels of the features that enter the first cell.
    let mut channels: Vec<usize> = backbone_levels
        .iter()
        .map(|&i| blocks[i].project.out_channels)
        .collect();

    let extra_levels = build_extra_levels(&mut builder, hparams, &maps, &mut channels)?;
    let cells = build_cells(&mut builder, hparams, &levels, &channels)?;
    let anchors = hparams.anchors_per_cell();
    let class_head = build_head(
        &mut builder,
        hparams,
        &levels,
        "class",
        anchors,
        hparams.num_classes,
    );
    let box_head = build_head(&mut builder, hparams, &levels, "box", anchors, 4);

    Ok(Network {
        hparams: hparams.clone(),
        variables: VariableTable::new(builder.variables),
        stem,
        blocks,
        backbone_levels,
        extra_levels,
        cells,
        class_head,
        box_head,
        levels,
    })
}

fn build_backbone(
    builder: &mut Builder,
    hparams: &HParams,
    image: MapSize,
) -> Result<(Stem, Vec<MbConv>), NetworkError> {
    let Backbone { width, depth, lite } = backbone(&hparams.backbone_name)?;
    let model = hparams.backbone_name.as_str();
    let init = match hparams.profile {
        Profile::Seed => Initializer::TruncatedNormalFanIn { scale: 2.0 },
        Profile::Google => Initializer::NormalFanOut { scale: 2.0 },
    };
    let mut layer = 0;
    let mut place = |name: String, upstream: String| {
        layer += 1;
        Place::new(
            name,
            format!("backbone/layer_with_weights-{}", layer - 1),
            upstream,
        )
    };
    let half = |map: MapSize, stride: usize| MapSize {
        height: map.height.div_ceil(stride),
        width: map.width.div_ceil(stride),
    };

    let stem_channels = if lite { 32 } else { round_filters(32, width) };
    let conv = builder.conv(
        &place("stem_conv2d".into(), format!("{model}/stem/conv2d")),
        3,
        2,
        (3, stem_channels),
        false,
        init,
    );
    let bn = builder.bn(
        &place("stem_bn".into(), format!("{model}/stem/tpu_batch_normalization")),
        stem_channels,
    );
    let stem = Stem {
        conv,
        bn,
        input: image,
        output: half(image, 2),
    };

    let repeats_of = |stack: usize| {
        let repeats = STACKS[stack].1;
        if lite && (stack == 0 || stack == STACKS.len() - 1) {
            repeats
        } else {
            round_repeats(repeats, depth)
        }
    };
    let total: usize = (0..STACKS.len()).map(repeats_of).sum();

    let mut blocks: Vec<MbConv> = Vec::with_capacity(total);
    let mut map = stem.output;
    let mut in_channels = stem_channels;
    let mut reduction = 1;
    for (stack, &(size, _, first_stride, ratio, _, filters)) in STACKS.iter().enumerate() {
        let out_channels = round_filters(filters, width);
        for block in 0..repeats_of(stack) {
            let stride = if block == 0 { first_stride } else { 1 };
            let name = format!("stack_{stack}/block_{block}");
            let index = blocks.len();
            let upstream = format!("{model}/blocks_{index}");
            let (mut convs, mut norms) = (Counter::default(), Counter::default());
            let wide = in_channels * ratio;
            let expand = (ratio != 1).then(|| {
                let at = place(
                    format!("{name}/expand_conv2d"),
                    format!("{upstream}/{}", convs.next("conv2d")),
                );
                let conv = builder.conv(&at, 1, 1, (in_channels, wide), false, init);
                let at = place(
                    format!("{name}/expand_bn"),
                    format!("{upstream}/{}", norms.next("tpu_batch_normalization")),
                );
                (conv, builder.bn(&at, wide))
            });
            let at = place(
                format!("{name}/depthwise_conv2d"),
                format!("{upstream}/depthwise_conv2d"),
            );
            let depthwise = builder.depthwise(&at, size, stride, wide, init);
            let at = place(
                format!("{name}/depthwise_bn"),
                format!("{upstream}/{}", norms.next("tpu_batch_normalization")),
            );
            let depthwise_bn = builder.bn(&at, wide);
            let squeeze_excite = (!lite).then(|| {
                let narrow = (in_channels / 4).max(1);
                let at = place(
                    format!("{name}/se_reduce_conv2d"),
                    format!("{upstream}/se/conv2d"),
                );
                let reduce = builder.conv(&at, 1, 1, (wide, narrow), true, init);
                let at = place(
                    format!("{name}/se_expand_conv2d"),
                    format!("{upstream}/se/conv2d_1"),
                );
                SqueezeExcite {
                    reduce,
                    expand: builder.conv(&at, 1, 1, (narrow, wide), true, init),
                }
            });
            let at = place(
                format!("{name}/project_conv2d"),
                format!("{upstream}/{}", convs.next("conv2d")),
            );
            let project = builder.conv(&at, 1, 1, (wide, out_channels), false, init);
            let at = place(
                format!("{name}/project_bn"),
                format!("{upstream}/{}", norms.next("tpu_batch_normalization")),
            );
            let project_bn = builder.bn(&at, out_channels);

            let output = half(map, stride);
            let skip = stride == 1 && in_channels == out_channels;
            let drop = 1.0 - hparams.backbone_survival_prob.unwrap_or(1.0);
            let survival = if skip {
                (1.0 - drop * index as f64 / total as f64) as f32
            } else {
                1.0
            };
            let last_of_stack = block + 1 == repeats_of(stack);
            let ends_reduction = last_of_stack && STACKS.get(stack + 1).is_none_or(|next| next.2 == 2);
            let endpoint = ends_reduction.then_some(reduction);
            reduction += usize::from(ends_reduction);
            blocks.push(MbConv {
                name,
                expand,
                depthwise,
                depthwise_bn,
                squeeze_excite,
                project,
                project_bn,
                skip,
                survival,
                input: map,
                output,
                endpoint,
            });
            map = output;
            in_channels = out_channels;
        }
    }
    Ok((stem, blocks))
}

fn resize_kind(level: usize, input: MapSize, output: MapSize) -> Result<ResizeKind, NetworkError> {
    if input == output {
        Ok(ResizeKind::Same)
    } else if input.height > output.height && input.width > output.width {
        Ok(ResizeKind::MaxPool {
            stride_y: (input.height - 1) / output.height + 1,
            stride_x: (input.width - 1) / output.width + 1,
        })
    } else if input.height <= output.height && input.width <= output.width {
        Ok(ResizeKind::Nearest)
    } else {
        Err(NetworkError::Resample {
            level,
            from_height: input.height,
            from_width: input.width,
            to_height: output.height,
            to_width: output.width,
        })
    }
}

/// `at(part)` is the place of the `conv2d` or `bn` layer.
fn channel_match(
    builder: &mut Builder,
    hparams: &HParams,
    from: usize,
    at: impl Fn(&str) -> Place,
) -> Option<ChannelMatch> {
    let filters = hparams.fpn_num_filters;
    (from != filters).then(|| ChannelMatch {
        conv: builder.conv(
            &at("conv2d"),
            1,
            1,
            (from, filters),
            true,
            Initializer::GlorotUniform,
        ),
        bn: hparams
            .apply_bn_for_resampling
            .then(|| builder.bn(&at("bn"), filters)),
    })
}

fn build_extra_levels(
    builder: &mut Builder,
    hparams: &HParams,
    maps: &[MapSize],
    channels: &mut Vec<usize>,
) -> Result<Vec<ExtraLevel>, NetworkError> {
    let mut extra = Vec::new();
    for level in 6.max(hparams.min_level)..=hparams.max_level {
        let name = format!("resample_p{level}");
        let from = channels[channels.len() - 1];
        let (input, output) = (maps[level - 1], maps[level]);
        let matched = channel_match(builder, hparams, from, |part| {
            Place::same(
                format!("{name}/{part}"),
                format!("resample_layers/{}/{part}", level - 6),
            )
        });
        let resize = resize_kind(level, input, output)?;
        extra.push(ExtraLevel {
            level,
            name,
            resample: Resample {
                channel_match: matched,
                resize,
                input,
                output,
            },
        });
        channels.push(hparams.fpn_num_filters);
    }
    Ok(extra)
}

/// Level offset and input features of every node of a BiFPN cell with `count` levels.
fn bifpn_topology(count: usize) -> (Vec<(usize, Vec<usize>)>, Vec<usize>) {
    let mut ids: Vec<Vec<usize>> = (0..count).map(|level| vec![level]).collect();
    let latest = |ids: &[Vec<usize>], level: usize| ids[level][ids[level].len() - 1];
    let mut nodes = Vec::new();
    for level in (0..count - 1).rev() {
        nodes.push((level, vec![latest(&ids, level), latest(&ids, level + 1)]));
        ids[level].push(count + nodes.len() - 1);
    }
    for level in 1..count {
        let mut inputs = ids[level].clone();
        inputs.push(latest(&ids, level - 1));
        nodes.push((level, inputs));
        ids[level].push(count + nodes.len() - 1);
    }
    let outputs = (0..count).map(|level| latest(&ids, level)).collect();
    (nodes, outputs)
}

fn build_cells(
    builder: &mut Builder,
    hparams: &HParams,
    levels: &[Level],
    channels: &[usize],
) -> Result<Vec<Cell>, NetworkError> {
    let filters = hparams.fpn_num_filters;
    let start = builder.variables.len();
    let (topology, outputs) = bifpn_topology(levels.len());
    let mut cells = Vec::with_capacity(hparams.fpn_cell_repeats);
    for cell in 0..hparams.fpn_cell_repeats {
        // Channels and map of every feature of the cell.
        let mut features: Vec<(usize, MapSize)> = levels
            .iter()
            .zip(channels)
            .map(|(level, &channels)| (if cell == 0 { channels } else { filters }, level.map))
            .collect();
        let mut nodes = Vec::with_capacity(topology.len());
        for (index, (level_index, input_ids)) in topology.iter().enumerate() {
            let Level { level, map } = levels[*level_index];
            let feature_count = features.len();
            let name = format!("fpn_cells/cell_{cell}/fnode{index}");
            let key = format!("fpn_cells/cells/{cell}/fnodes/{index}");
            let weight_shape: &[usize] = match hparams.fusion() {
                FusionMethod::ChannelAttn | FusionMethod::ChannelFastAttn => &[filters],
                _ => &[],
            };
            let mut weight_names = Counter::default();
            let fusion_weights = match hparams.fusion() {
                FusionMethod::Sum => Vec::new(),
                _ => (input_ids.iter())
                    .map(|_| {
                        let leaf = weight_names.next("WSM");
                        let at = Place::same(name.clone(), key.clone());
                        builder.leaf(&at, &leaf, weight_shape, Initializer::Constant(1.0))
                    })
                    .collect(),
            };
            let mut inputs = Vec::with_capacity(input_ids.len());
            for (position, &feature) in input_ids.iter().enumerate() {
                let (from, input) = features[feature];
                let matched = channel_match(builder, hparams, from, |part| {
                    Place::same(
                        format!("{name}/resample_{position}_{feature}_{feature_count}/{part}"),
                        format!("{key}/resample_layers/{position}/{part}"),
                    )
                });
                let resize = resize_kind(level, input, map)?;
                let resample = Resample {
                    channel_match: matched,
                    resize,
                    input,
                    output: map,
                };
                inputs.push(NodeInput { feature, resample });
            }
            let combine = format!("{name}/op_after_combine{feature_count}");
            let at = Place::same(
                format!("{combine}/conv"),
                format!("{key}/op_after_combine/conv_op"),
            );
            let conv = builder.separable(&at, (filters, filters), Initializer::GlorotUniform, 0.0);
            let at = Place::same(format!("{combine}/bn"), format!("{key}/op_after_combine/bn"));
            let bn = builder.bn(&at, filters);
            features.push((filters, map));
            nodes.push(Node {
                name,
                level,
                inputs,
                fusion_weights,
                conv,
                bn,
                map,
            });
        }
        cells.push(Cell {
            nodes,
            outputs: outputs.clone(),
        });
    }
    let moved = builder.statistics_last(start);
    for node in cells.iter_mut().flat_map(|cell| &mut cell.nodes) {
        node.fusion_weights.iter_mut().for_each(|id| id.remap(&moved));
        node.inputs
            .iter_mut()
            .for_each(|input| input.resample.channel_match.remap(&moved));
        node.conv.remap(&moved);
        node.bn.remap(&moved);
    }
    Ok(cells)
}

fn build_head(
    builder: &mut Builder,
    hparams: &HParams,
    levels: &[Level],
    kind: &'static str,
    anchors: usize,
    outputs_per_anchor: usize,
) -> Head {
    let filters = hparams.fpn_num_filters;
    let repeats = hparams.box_class_repeats;
    let init = Initializer::TruncatedNormalFanIn { scale: 1.0 };
    let name = if kind == "class" { "class_net" } else { "box_net" };
    let start = builder.variables.len();
    let convs: Vec<SeparableConv> = (0..repeats)
        .map(|i| {
            let at = Place::same(format!("{name}/{kind}-{i}"), format!("{name}/conv_ops/{i}"));
            builder.separable(&at, (filters, filters), init, 0.0)
        })
        .collect();
    let bns: Vec<Vec<BatchNorm>> = (0..repeats)
        .map(|i| {
            (levels.iter().enumerate())
                .map(|(j, level)| {
                    let at = Place::same(
                        format!("{name}/{kind}-{i}-bn-{}", level.level),
                        format!("{name}/bns/{i}/{j}"),
                    );
                    builder.bn(&at, filters)
                })
                .collect()
        })
        .collect();
    let key = if kind == "class" { "classes" } else { "boxes" };
    let at = Place::same(format!("{name}/{kind}-predict"), format!("{name}/{key}"));
    // A prior of 0.01 for every class keeps the first focal losses small.
    let bias = if kind == "class" {
        -(((1.0 - 0.01) / 0.01f64).ln() as f32)
    } else {
        0.0
    };
    let mut predict = builder.separable(&at, (filters, anchors * outputs_per_anchor), init, bias);

    let moved = builder.statistics_last(start);
    predict.remap(&moved);
    let layers = (convs.into_iter().zip(bns))
        .map(|(mut conv, mut bns)| {
            conv.remap(&moved);
            bns.iter_mut().for_each(|bn| bn.remap(&moved));
            HeadLayer { conv, bns }
        })
        .collect();
    Head {
        name,
        layers,
        predict,
        outputs_per_anchor,
    }
}
