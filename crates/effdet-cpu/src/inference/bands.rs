//! Bands of lines that go through a depthwise convolution with what comes before and after it, without leaving the cache.
//!
//! A task makes the input lines of a band one by one in a ring of line buffers ([`Source`]), convolves each output line, and
//! passes it on ([`Target`]). Lines next to a band's edge are made by both neighbours; channels, where they can be split, have no
//! such cost.

use std::marker::PhantomData;

use super::activate::{ActivatedLine, activate, is_fused, with_fused};
use super::depthwise::{Geometry, LANE_GROUP, OutputLine, Ring, output_line};
use super::fold::{Dense, DepthwiseAt};
use super::fusion::{FuseInput, FusedLine, fuse_line};
use super::lifetimes::Slot;
use super::product::{Line, Product, Rows, multiply};
use super::run::{Output, Run};
use crate::arena::Bump;
use crate::kernels::gemm::{PANEL, padded};
use crate::kernels::resample::Resampler;
use crate::math::{Act, activations, with_activation};
use crate::simd::{Simd, dispatch};

/// Channels of a task where channels can be split: three lane groups fill the registers of a product's tile.
const BLOCK_GROUPS: usize = 3;

/// Tasks of a layer, about.
const TASKS: usize = 12;

/// Input lines that a band may at most make a second time, as a share of its own lines.
const MOST_REPEATED: f64 = 0.13;

/// Pixels that are put together before a product, so that its tiles are whole.
const SLAB_PIXELS: usize = 96;

/// Pixels that are worked on in one go where an activation follows: they should stay in the L1 cache.
const CHUNK_PIXELS: usize = 64;

/// Channels from which on head outputs are written past the caches: they are too many to stay there.
const STREAMED_CHANNELS: usize = 128;

/// Values that are put together before that, about; they should stay in the L1 cache.
const STREAMED_VALUES: usize = 8 << 10;

/// Rows of a product that make whole tiles.
const ROW_UNIT: usize = 8;

/// Multiply-adds of a task that ends in a product, about: some tens of microseconds.
const TASK_MACS: usize = 2 << 20;

/// Values after which the colours and all vector widths repeat.
const COLOUR_PERIOD: usize = 48;

/// What the input lines of a depthwise convolution are made of.
#[derive(Debug)]
pub(super) enum Source {
    /// The network's first convolution and its activation.
    Stem {
        conv: Dense,
        image: Geometry,
        /// Factor and summand of each colour.
        normalize: [(f32, f32); 3],
        act: Act,
    },
    /// A pointwise expansion and its activation.
    Expand { input: Slot, conv: Dense, act: Act },
    /// Resampled features, weighted, added and activated.
    Features {
        inputs: Vec<Feature>,
        /// First of the constants `[inputs, channels]`.
        factors: Option<usize>,
        act: Act,
    },
}

/// A feature that enters a layer.
#[derive(Debug)]
pub(super) struct Feature {
    pub slot: Slot,
    pub resampler: Resampler,
}

/// Where the output lines go.
#[derive(Debug)]
pub(super) enum Target {
    /// Activated into a tensor `[height, width, channels]`, with channel sums per band for squeeze-and-excitation.
    Tensor { act: Act, out: Slot, sums: Option<Slot> },
    /// Through a pointwise convolution: `out = act(bias + line·W) (+ residual)`.
    Pointwise {
        conv: Dense,
        act: Act,
        out: Output,
        residual: Option<Slot>,
    },
}

/// A depthwise convolution with its surroundings.
#[derive(Debug)]
pub(super) struct BandLayer {
    pub source: Source,
    pub depthwise: DepthwiseAt,
    pub geometry: Geometry,
    pub channels: usize,
    pub target: Target,
    /// First of as many zeros among the constants as the longest line has values.
    pub zeros: usize,
}

/// Output lines `top..bottom` and some lane groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BandTask {
    pub band: usize,
    pub top: usize,
    pub bottom: usize,
    pub group: usize,
    pub groups: usize,
}

impl BandLayer {
    fn groups(&self) -> usize {
        self.channels.div_ceil(LANE_GROUP)
    }

    /// Values of a line buffer with `groups` lane groups.
    fn line_len(&self, groups: usize) -> usize {
        groups * self.geometry.group_stride()
    }

    /// Values of the longest line that must be zero.
    pub(super) fn zeros_len(&self) -> usize {
        let image = match &self.source {
            Source::Stem { image, .. } => image.group_stride(),
            _ => 0,
        };
        image.max(self.line_len(self.groups()))
    }

    /// Multiply-adds, and values of all tensors that are not only in line buffers.
    pub(super) fn cost(&self) -> (usize, usize) {
        let (input, output) = (self.geometry.input.cells(), self.geometry.output.cells());
        let taps = self.geometry.size * self.geometry.size * self.channels;
        let (mut macs, mut values) = (output * taps, taps);
        let mut dense = |conv: &Dense, cells: usize| {
            macs += cells * conv.inputs * conv.outputs;
            values += conv.inputs * conv.outputs;
        };
        match &self.source {
            Source::Stem { conv, image, .. } => {
                dense(conv, input);
                values += image.input.cells() * 3;
            }
            Source::Expand { conv, .. } => {
                dense(conv, input);
                values += input * conv.inputs;
            }
            Source::Features { inputs, .. } => {
                let cells: usize = inputs.iter().map(|input| input.resampler.input().cells()).sum();
                values += cells * self.channels;
            }
        }
        match &self.target {
            Target::Tensor { .. } => values += output * self.channels,
            Target::Pointwise { conv, .. } => {
                macs += output * conv.inputs * conv.outputs;
                values += (output + conv.inputs) * conv.outputs;
            }
        }
        (macs, values)
    }

    /// Multiply-adds of a task, without those of lines that its neighbours make too.
    pub(super) fn task_cost(&self, task: &BandTask) -> u64 {
        let (macs, _) = self.cost();
        let share = (task.bottom - task.top) * task.groups;
        (macs * share / (self.geometry.output.height * self.groups())) as u64
    }

    /// Bands of a layer; a function of the shapes alone.
    pub(super) fn bands(&self) -> usize {
        let height = self.geometry.output.height;
        let wanted = match (&self.target, &self.source) {
            (Target::Pointwise { conv, .. }, _) => {
                (self.geometry.output.cells() * conv.inputs * conv.outputs).div_ceil(TASK_MACS)
            }
            (Target::Tensor { .. }, Source::Expand { .. }) => {
                TASKS.div_ceil(self.groups().div_ceil(BLOCK_GROUPS))
            }
            (Target::Tensor { .. }, _) => TASKS,
        };
        let repeated = (self.geometry.size - self.geometry.stride.min(self.geometry.size)) as f64;
        let least_lines = match self.target {
            // Lines are cheap to make there.
            Target::Pointwise { .. } => 4,
            Target::Tensor { .. } => (repeated / self.geometry.stride as f64 / MOST_REPEATED).ceil() as usize,
        };
        wanted.clamp(1, (height / least_lines.max(1)).max(1))
    }

    /// The tasks of the layer.
    pub(super) fn tasks(&self) -> Vec<BandTask> {
        let (bands, groups) = (self.bands(), self.groups());
        let blocks = match (&self.source, &self.target) {
            (Source::Expand { .. }, Target::Tensor { .. }) => groups.div_ceil(BLOCK_GROUPS),
            _ => 1,
        };
        let height = self.geometry.output.height;
        let mut tasks = Vec::with_capacity(bands * blocks);
        for band in 0..bands {
            for block in 0..blocks {
                let group = groups * block / blocks;
                tasks.push(BandTask {
                    band,
                    top: height * band / bands,
                    bottom: height * (band + 1) / bands,
                    group,
                    groups: groups * (block + 1) / blocks - group,
                });
            }
        }
        tasks
    }

    /// Output lines that are put together before a product.
    fn slab_lines(&self, task: &BandTask) -> usize {
        (SLAB_PIXELS / self.geometry.output.width).clamp(1, task.bottom - task.top)
    }

    /// Values of the convolution's outputs that are kept.
    fn slab_len(&self, task: &BandTask) -> usize {
        let width = self.geometry.output.width;
        match self.target {
            Target::Pointwise { .. } => self.slab_lines(task) * width * padded(self.channels),
            Target::Tensor { act, .. } if is_fused(act) => 0,
            Target::Tensor { .. } => CHUNK_PIXELS.min(width) * task.groups * LANE_GROUP,
        }
    }

    /// Rows that are put together before they are written past the caches; none where the result is small or read again soon.
    fn streamed_rows(&self) -> Option<usize> {
        match &self.target {
            Target::Pointwise { conv, out, .. }
                if !matches!(out, Output::Slot(_)) && conv.outputs >= STREAMED_CHANNELS =>
            {
                Some((STREAMED_VALUES / conv.outputs / ROW_UNIT).max(1) * ROW_UNIT)
            }
            _ => None,
        }
    }

    fn streamed_len(&self) -> usize {
        match (&self.target, self.streamed_rows()) {
            (Target::Pointwise { conv, .. }, Some(rows)) => rows * conv.outputs,
            _ => 0,
        }
    }

    /// Values of scratch memory that a task needs.
    pub(super) fn scratch_len(&self, task: &BandTask) -> usize {
        let image_len = match &self.source {
            Source::Stem { image, .. } => {
                3 * Bump::room(image.group_stride()) + 2 * Bump::room(COLOUR_PERIOD)
            }
            _ => 0,
        };
        self.geometry.size * Bump::room(self.line_len(task.groups))
            + Bump::room(self.slab_len(task))
            + Bump::room(self.streamed_len())
            + image_len
    }

    /// Runs one task.
    ///
    /// # Safety
    /// Call it inside a task of the pool with its worker; the slots must hold what the layer reads, and the task's part of its
    /// output belong to the caller.
    pub(super) unsafe fn run(&self, run: &Run<'_>, task: &BandTask, worker: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match (self.geometry.size, self.geometry.stride) {
                (3, 1) => self.run_sized::<3, 1>(run, task, worker),
                (3, 2) => self.run_sized::<3, 2>(run, task, worker),
                (5, 1) => self.run_sized::<5, 1>(run, task, worker),
                _ => self.run_sized::<5, 2>(run, task, worker),
            }
        }
    }

    /// # Safety
    /// As [`run`](Self::run).
    unsafe fn run_sized<const K: usize, const ST: usize>(
        &self,
        run: &Run<'_>,
        task: &BandTask,
        worker: usize,
    ) {
        let line_len = self.line_len(task.groups);
        let slab_stride = padded(self.channels);
        let width = self.geometry.output.width;
        let slab_lines = self.slab_lines(task);
        let slab_len = self.slab_len(task);
        // SAFETY: inside the task, with its worker, once; the pieces hold whole lines, and the slots what their layer needs.
        unsafe {
            let mut scratch = Bump::new(run.executor.pool().scratch(worker, self.scratch_len(task)));
            let zeros = run.constant(self.zeros);
            let lines: [_; K] = std::array::from_fn(|_| scratch.take(line_len));
            let slab = scratch.take(slab_len);
            let streamed = scratch.take(self.streamed_len());
            let mut maker = LineMaker::new(self, run, task, &mut scratch, zeros);
            let mut ring = Ring::<K>::new(self.geometry, lines, zeros, task.groups, task.top);
            let taps = K * K * LANE_GROUP;
            let weights = run.constant(self.depthwise.weights + task.group * taps);
            let bias = (self.depthwise.bias).map_or(std::ptr::null(), |bias| {
                run.constant(bias + task.group * LANE_GROUP)
            });
            let first_channel = task.group * LANE_GROUP;
            let channels = (task.groups * LANE_GROUP).min(self.channels - first_channel);
            let mut from = task.top;
            while from < task.bottom {
                let to = match self.target {
                    Target::Tensor { .. } => from + 1,
                    Target::Pointwise { .. } => (from + slab_lines).min(task.bottom),
                };
                for y in from..to {
                    let line = OutputLine::<K, activations::Identity> {
                        lines: ring.window(y, |line, first| maker.make(line, first)),
                        group_stride: self.geometry.group_stride(),
                        pixels: width,
                        channels,
                        weights,
                        bias,
                        out: slab.wrapping_add((y - from) * width * slab_stride),
                        pixel_stride: slab_stride,
                        sums: std::ptr::null_mut(),
                        act: PhantomData,
                    };
                    match &self.target {
                        Target::Pointwise { .. } => output_line::<_, K, ST>(run.isa(), &line),
                        Target::Tensor { act, out, sums } => {
                            let out = run.buffer(*out).add(y * width * self.channels + first_channel);
                            let sums = sums.map_or(std::ptr::null_mut(), |sums| {
                                run.buffer(sums)
                                    .add(task.band * padded(self.channels) + first_channel)
                            });
                            if y == task.top && !sums.is_null() {
                                sums.write_bytes(0, task.groups * LANE_GROUP);
                            }
                            if is_fused(*act) {
                                with_fused!(*act, A => {
                                    let line = line.into_tensor::<A>(out, self.channels, sums);
                                    output_line::<A, K, ST>(run.isa(), &line);
                                });
                                continue;
                            }
                            for first in (0..width).step_by(CHUNK_PIXELS) {
                                let pixels = CHUNK_PIXELS.min(width - first);
                                let chunk = OutputLine::<K, _> {
                                    lines: line.lines.map(|line| line.add(first * ST * LANE_GROUP)),
                                    pixels,
                                    out: slab,
                                    pixel_stride: task.groups * LANE_GROUP,
                                    ..line
                                };
                                output_line::<_, K, ST>(run.isa(), &chunk);
                                let activated = ActivatedLine {
                                    raw: slab,
                                    raw_stride: task.groups * LANE_GROUP,
                                    pixels,
                                    channels,
                                    out: out.add(first * self.channels),
                                    pixel_stride: self.channels,
                                    sums,
                                };
                                activated.run(run.isa(), *act);
                            }
                        }
                    }
                }
                if let Target::Pointwise {
                    conv,
                    act,
                    out,
                    residual,
                } = &self.target
                {
                    let rows = (to - from) * width;
                    let block = self.streamed_rows().unwrap_or(rows);
                    for first in (0..rows).step_by(block) {
                        let count = block.min(rows - first);
                        let product = Product::plain(
                            (count, conv.outputs, conv.inputs),
                            (slab.add(first * slab_stride), slab_stride),
                            run.constant(conv.weights),
                            run.constant(conv.bias),
                        );
                        let at = (from * width + first) * conv.outputs;
                        let target = run.output(*out).add(at);
                        let is_streamed = self.streamed_rows().is_some();
                        let sink = Rows {
                            out: if is_streamed { streamed } else { target },
                            stride: conv.outputs,
                            residual: std::ptr::null(),
                        };
                        multiply(run.isa(), &product, &sink);
                        let residual =
                            residual.map_or(std::ptr::null(), |slot| run.buffer(slot).add(at).cast_const());
                        let len = count * conv.outputs;
                        activate(run.isa(), *act, sink.out, len, residual);
                        if is_streamed {
                            stream_values(run.isa(), streamed, target, len);
                        }
                    }
                }
                from = to;
            }
        }
    }
}

/// Makes input lines.
enum LineMaker<'a> {
    Stem {
        run: &'a Run<'a>,
        layer: &'a BandLayer,
        conv: Dense,
        image: Geometry,
        ring: Ring<3>,
        factors: *const f32,
        summands: *const f32,
        act: Act,
    },
    Expand {
        run: &'a Run<'a>,
        layer: &'a BandLayer,
        input: *const f32,
        conv: Dense,
        act: Act,
        group: usize,
        groups: usize,
    },
    Features {
        run: &'a Run<'a>,
        layer: &'a BandLayer,
        inputs: Vec<FuseInput<'a>>,
        act: Act,
    },
}

impl<'a> LineMaker<'a> {
    /// # Safety
    /// The slots must hold what the layer reads.
    unsafe fn new(
        layer: &'a BandLayer,
        run: &'a Run<'a>,
        task: &BandTask,
        scratch: &mut Bump,
        zeros: *const f32,
    ) -> Self {
        // SAFETY: the caller's promise; the pieces hold what is written.
        unsafe {
            match &layer.source {
                Source::Stem {
                    conv,
                    image,
                    normalize,
                    act,
                } => {
                    let (factors, summands) = (scratch.take(COLOUR_PERIOD), scratch.take(COLOUR_PERIOD));
                    for i in 0..COLOUR_PERIOD {
                        factors.add(i).write(normalize[i % 3].0);
                        summands.add(i).write(normalize[i % 3].1);
                    }
                    let lines = std::array::from_fn(|_| scratch.take(image.group_stride()));
                    let top = layer.geometry.first_input_line(task.top);
                    Self::Stem {
                        run,
                        layer,
                        conv: *conv,
                        image: *image,
                        ring: Ring::new(*image, lines, zeros, 1, top),
                        factors,
                        summands,
                        act: *act,
                    }
                }
                Source::Expand { input, conv, act } => Self::Expand {
                    run,
                    layer,
                    input: run.buffer(*input),
                    conv: *conv,
                    act: *act,
                    group: task.group,
                    groups: task.groups,
                },
                Source::Features { inputs, factors, act } => Self::Features {
                    run,
                    layer,
                    inputs: (inputs.iter().enumerate())
                        .map(|(i, input)| FuseInput {
                            values: run.buffer(input.slot),
                            resampler: &input.resampler,
                            factor: factors
                                .map_or(std::ptr::null(), |at| run.constant(at + i * layer.channels)),
                        })
                        .collect(),
                    act: *act,
                },
            }
        }
    }

    /// # Safety
    /// `first` must be the first pixel of a line buffer of the task.
    unsafe fn make(&mut self, line: usize, first: *mut f32) {
        // SAFETY: the caller's promise; tensors hold whole maps.
        unsafe {
            match self {
                Self::Stem {
                    run,
                    layer,
                    conv,
                    image,
                    ring,
                    factors,
                    summands,
                    act,
                } => {
                    let len = image.input.width * 3;
                    let lines = ring.window(line, |y, target| {
                        let source = run.pixels.as_ptr().add(y * len);
                        affine_values(run.isa(), len, source, *factors, *summands, target);
                    });
                    let product = Product {
                        rows: image.output.width,
                        columns: padded(conv.outputs),
                        depth: 9,
                        lines,
                        line_count: 3,
                        a_stride: image.stride * 3,
                        // Lines in the cache.
                        ahead: 0,
                        b: run.constant(conv.weights),
                        b_panel_stride: conv.inputs * PANEL,
                        bias: run.constant(conv.bias),
                    };
                    fill(run, layer, &product, *act, first);
                }
                Self::Expand {
                    run,
                    layer,
                    input,
                    conv,
                    act,
                    group,
                    groups,
                } => {
                    let width = layer.geometry.input.width;
                    let product = Product::plain(
                        (width, *groups * PANEL, conv.inputs),
                        (input.add(line * width * conv.inputs), conv.inputs),
                        run.constant(conv.weights + *group * conv.inputs * PANEL),
                        run.constant(conv.bias + *group * PANEL),
                    );
                    fill(run, layer, &product, *act, first);
                }
                Self::Features {
                    run,
                    layer,
                    inputs,
                    act,
                } => {
                    with_activation!(*act, A => {
                        let fused = FusedLine::<A> {
                            inputs,
                            line,
                            pixels: layer.geometry.input.width,
                            channels: layer.channels,
                            out: first,
                            pixel_stride: LANE_GROUP,
                            group_stride: layer.geometry.group_stride(),
                            act: PhantomData,
                        };
                        fuse_line(run.isa(), &fused);
                    });
                }
            }
        }
    }
}

/// Writes an activated product to a line buffer.
///
/// # Safety
/// The product's operands must be valid, and `first` be the first pixel of a line buffer for its columns.
unsafe fn fill(run: &Run<'_>, layer: &BandLayer, product: &Product, act: Act, first: *mut f32) {
    let group_stride = layer.geometry.group_stride();
    for row in (0..product.rows).step_by(CHUNK_PIXELS) {
        let rows = CHUNK_PIXELS.min(product.rows - row);
        // SAFETY: the caller's promise; rows of the product.
        unsafe {
            let chunk = Product {
                rows,
                lines: product.lines.map(|line| line.add(row * product.a_stride)),
                ..*product
            };
            with_fused!(act, A => {
                let sink = Line::<A> {
                    out: first.add(row * LANE_GROUP),
                    group_stride,
                    act: PhantomData,
                };
                multiply(run.isa(), &chunk, &sink);
            });
            for group in (0..product.columns / LANE_GROUP).filter(|_| !is_fused(act)) {
                let values = first.add(group * group_stride + row * LANE_GROUP);
                activate(run.isa(), act, values, rows * LANE_GROUP, std::ptr::null());
            }
        }
    }
}

#[inline(always)]
unsafe fn affine_values_body<S: Simd>(
    len: usize,
    source: *const f32,
    factors: *const f32,
    summands: *const f32,
    out: *mut f32,
) {
    for at in (0..len).step_by(S::LANES) {
        let lanes = S::LANES.min(len - at);
        // SAFETY: `len` values of source and target; the patterns repeat after COLOUR_PERIOD.
        unsafe {
            let factor = S::load(factors.add(at % COLOUR_PERIOD));
            let summand = S::load(summands.add(at % COLOUR_PERIOD));
            let value = S::fma(S::load_partial(source.add(at), lanes), factor, summand);
            S::store_partial(out.add(at), value, lanes);
        }
    }
}

dispatch! {
    /// `out = factor·source + summand` with patterns that repeat after [`COLOUR_PERIOD`] values.
    ///
    /// # Safety
    /// `isa` must be available and the pointers valid.
    unsafe fn affine_values(
        len: usize,
        source: *const f32,
        factors: *const f32,
        summands: *const f32,
        out: *mut f32,
    ) = affine_values_body;
}

#[inline(always)]
unsafe fn stream_values_body<S: Simd>(source: *const f32, target: *mut f32, len: usize) {
    let width = size_of::<f32>() * S::LANES;
    let mut at = (target.addr().wrapping_neg() % width / size_of::<f32>()).min(len);
    // SAFETY: `len` values; between the first and the last vector the target is aligned.
    unsafe {
        S::store_partial(target, S::load_partial(source, at), at);
        while at + S::LANES <= len {
            S::stream(target.add(at), S::load(source.add(at)));
            at += S::LANES;
        }
        S::store_partial(
            target.add(at),
            S::load_partial(source.add(at), len - at),
            len - at,
        );
    }
}

dispatch! {
    /// Copies values past the caches.
    ///
    /// # Safety
    /// `isa` must be available and the pointers valid.
    unsafe fn stream_values(source: *const f32, target: *mut f32, len: usize) = stream_values_body;
}

/// A resampled feature that is stored: a pyramid level above the backbone's.
#[derive(Debug)]
pub(super) struct LevelLayer {
    pub input: Feature,
    pub channels: usize,
    pub out: Slot,
}

impl LevelLayer {
    /// Makes the level.
    ///
    /// # Safety
    /// The slots must hold what the layer reads, and nobody else use its output.
    pub(super) unsafe fn run(&self, run: &Run<'_>) {
        let map = self.input.resampler.output();
        let inputs = [FuseInput {
            values: run.buffer(self.input.slot),
            resampler: &self.input.resampler,
            factor: std::ptr::null(),
        }];
        for line in 0..map.height {
            // SAFETY: lines of the output.
            unsafe {
                let fused = FusedLine::<activations::Identity> {
                    inputs: &inputs,
                    line,
                    pixels: map.width,
                    channels: self.channels,
                    out: run.buffer(self.out).add(line * map.width * self.channels),
                    pixel_stride: self.channels,
                    group_stride: LANE_GROUP,
                    act: PhantomData,
                };
                fuse_line(run.isa(), &fused);
            }
        }
    }
}
