//! Shapes of a depthwise convolution and how its work is cut into tasks.

use effdet_model::network::{MapSize, same_padding};

/// Channels that a line buffer keeps together; every vector width divides it.
pub(super) const LANE_GROUP: usize = 16;

/// Tasks that suffice to keep the threads of a workstation evenly busy; more would repeat more work at the bands' edges.
const TASKS: usize = 16;

/// Bytes that the ring of line buffers may take: it should stay in the L2 cache.
const RING_BYTES: usize = 384 << 10;

/// Lane groups that a task has at most. Splitting channels turns the reads of a tensor into short pieces, which main memory
/// serves slowly.
const MOST_LANE_GROUPS: usize = 16;

/// The shapes of a depthwise convolution and how its work is cut into tasks; a function of the shapes alone.
///
/// Tensors hold one map after the other as `[map][image][height][width][channels]`; the maps are batch-norm groups (levels
/// in the heads, a single one elsewhere) that share the weights.
#[derive(Debug, Clone)]
pub struct DepthwisePlan {
    pub(super) images: usize,
    pub(super) channels: usize,
    pub(super) kernel_size: usize,
    pub(super) stride: usize,
    pub(super) maps: Vec<MapGeometry>,
    input_rows: usize,
    output_rows: usize,
    /// Parts of the output, for the forward pass.
    pub(super) output_tasks: Vec<Part>,
    /// Parts of the input, for the backward pass.
    pub(super) input_tasks: Vec<Part>,
}

/// One map of the plan.
#[derive(Debug, Clone, Copy)]
pub(super) struct MapGeometry {
    pub input: MapSize,
    pub output: MapSize,
    pub pad_top: usize,
    pub pad_left: usize,
    /// Row (pixel) of the input tensor where the map of image 0 starts.
    pub first_input: usize,
    /// Row (pixel) of the output tensor where the map of image 0 starts.
    pub first_output: usize,
}

/// What one task works on: lines `top..bottom`, columns `left..left + width` of one map and image, and some channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    pub map: usize,
    pub image: usize,
    pub top: usize,
    pub bottom: usize,
    pub left: usize,
    pub width: usize,
    pub channel: usize,
    pub channels: usize,
}

impl DepthwisePlan {
    /// The plan for `images` images with one map per group.
    ///
    /// # Panics
    /// When `kernel_size` is not 3 or 5, `stride` not 1 or 2, or a count is 0.
    pub fn new(images: usize, maps: &[MapSize], channels: usize, kernel_size: usize, stride: usize) -> Self {
        assert!(
            matches!((kernel_size, stride), (3 | 5, 1 | 2)),
            "a depthwise convolution of kernel {kernel_size} and stride {stride} is not supported"
        );
        assert!(
            images > 0 && channels > 0 && maps.iter().all(|map| map.cells() > 0),
            "images, channels and maps must not be empty"
        );
        let (mut input_rows, mut output_rows) = (0, 0);
        let geometry = |&input: &MapSize| {
            let (height, pad_top) = same_padding(input.height, kernel_size, stride);
            let (width, pad_left) = same_padding(input.width, kernel_size, stride);
            let map = MapGeometry {
                input,
                output: MapSize { height, width },
                pad_top,
                pad_left,
                first_input: input_rows,
                first_output: output_rows,
            };
            input_rows += images * input.cells();
            output_rows += images * map.output.cells();
            map
        };
        let maps: Vec<_> = maps.iter().map(geometry).collect();
        let inputs: Vec<_> = maps.iter().map(|map| map.input).collect();
        let outputs: Vec<_> = maps.iter().map(|map| map.output).collect();
        let halo = kernel_size - stride;
        Self {
            output_tasks: cut(
                images,
                &outputs,
                channels,
                &|width| kernel_size * (width * stride + halo),
                halo,
            ),
            input_tasks: cut(
                images,
                &inputs,
                channels,
                &|width| kernel_size.div_ceil(stride) * (width / stride + kernel_size),
                halo * stride,
            ),
            images,
            channels,
            kernel_size,
            stride,
            maps,
            input_rows,
            output_rows,
        }
    }

    /// Rows (pixels) of the input tensor over all maps and images.
    pub fn input_rows(&self) -> usize {
        self.input_rows
    }

    /// Products of weights and inputs that the convolution adds up, those with padding included.
    pub(super) fn multiply_adds(&self) -> usize {
        self.kernel_size * self.kernel_size * self.output_rows * self.channels
    }

    /// Rows (pixels) of the output tensor over all maps and images.
    pub fn output_rows(&self) -> usize {
        self.output_rows
    }

    /// Values of one task's partial weight gradient.
    pub(super) fn partial_stride(&self) -> usize {
        self.kernel_size * self.kernel_size * self.most_lane_groups() * LANE_GROUP
    }

    /// Bytes of the partial weight gradients of a backward pass.
    pub(crate) fn partial_bytes(&self) -> usize {
        self.input_tasks.len() * self.partial_stride() * size_of::<f32>()
    }

    /// The most lane groups that a task of either pass has.
    pub(super) fn most_lane_groups(&self) -> usize {
        let tasks = self.output_tasks.iter().chain(&self.input_tasks);
        tasks.map(|part| part.lane_groups()).max().unwrap_or(0)
    }
}

impl Part {
    pub(super) fn lane_groups(&self) -> usize {
        self.channels.div_ceil(LANE_GROUP)
    }
}

/// Cuts the maps of all images into parts of about equal work.
///
/// `ring_pixels` is the size of the line buffers for a part of some width, and `halo` the number of lines that neighbouring
/// bands both prepare.
fn cut(
    images: usize,
    maps: &[MapSize],
    channels: usize,
    ring_pixels: &dyn Fn(usize) -> usize,
    halo: usize,
) -> Vec<Part> {
    let cells: usize = maps.iter().map(|map| map.cells()).sum();
    let groups = channels.div_ceil(LANE_GROUP);
    let blocks = groups.div_ceil(MOST_LANE_GROUPS);
    let mut parts = Vec::new();
    for (map, size) in maps.iter().enumerate() {
        let block_bytes = groups.div_ceil(blocks) * LANE_GROUP * size_of::<f32>();
        let fits = |tiles: usize| ring_pixels(size.width.div_ceil(tiles)) * block_bytes <= RING_BYTES;
        let tiles = (1..size.width.div_ceil(16))
            .find(|&tiles| fits(tiles))
            .unwrap_or(size.width.div_ceil(16));
        let share = (TASKS * size.cells()).div_ceil(cells * images * blocks * tiles);
        let bands = share.min(size.height / (8 * halo)).max(1);
        let tile_width = size.width.div_ceil(tiles).next_multiple_of(8);
        for image in 0..images {
            for band in 0..bands {
                for left in (0..size.width).step_by(tile_width) {
                    for block in 0..blocks {
                        let channel = groups * block / blocks * LANE_GROUP;
                        let end = (groups * (block + 1) / blocks * LANE_GROUP).min(channels);
                        parts.push(Part {
                            map,
                            image,
                            top: size.height * band / bands,
                            bottom: size.height * (band + 1) / bands,
                            left,
                            width: tile_width.min(size.width - left),
                            channel,
                            channels: end - channel,
                        });
                    }
                }
            }
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_every_cell_and_channel_once() {
        let maps = [(64, 64), (300, 7), (1, 1), (33, 900)].map(|(height, width)| MapSize { height, width });
        for (channels, kernel_size, stride) in [(3, 3, 1), (40, 5, 2), (672, 5, 1), (144, 3, 2)] {
            let plan = DepthwisePlan::new(2, &maps, channels, kernel_size, stride);
            for (tasks, rows) in [
                (&plan.output_tasks, plan.output_rows),
                (&plan.input_tasks, plan.input_rows),
            ] {
                let covered: usize = tasks
                    .iter()
                    .map(|p| (p.bottom - p.top) * p.width * p.channels)
                    .sum();
                assert_eq!(covered, rows * channels);
                assert!(
                    tasks
                        .iter()
                        .all(|p| p.channel % LANE_GROUP == 0 && p.lane_groups() <= plan.most_lane_groups())
                );
            }
        }
    }
}
