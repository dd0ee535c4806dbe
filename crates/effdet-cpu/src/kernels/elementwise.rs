//! Elementwise passes and per-channel sums, for the places where no convolution has them as a prologue or epilogue.

use std::marker::PhantomData;

use super::Executor;
use super::gemm::padded;
use super::pointwise::{ChannelVectors, RowPlan, VectorIndex, check, flush_rows, part, reduce_totals};
use super::row_plan::RowBlock;
use super::row_sweeps::{Sweep, load, store, sweep};
use crate::arena::{Bump, SharedPtr};
use crate::math::{Act, Activation, with_activation};
use crate::probe::{Kernel, Work};
use crate::simd::Simd;

/// Tasks that a pass over all rows is cut into, about.
const TASKS: usize = 64;

/// An affine map per channel, `scale·raw + shift`: batch norm as its consumers apply it.
///
/// Vectors by group select the batch-norm group of a row (the level in the heads, 0 elsewhere).
#[derive(Debug, Clone, Copy)]
pub struct Affine<'a> {
    /// Batch norm's γ/σ.
    pub scale: ChannelVectors<'a>,
    /// Batch norm's β − μγ/σ.
    pub shift: ChannelVectors<'a>,
}

impl<'a> Affine<'a> {
    /// One pair of vectors per group: `[groups, channels]` each, a plain `[channels]` where there is one group.
    pub fn per_group(scale: &'a [f32], shift: &'a [f32]) -> Self {
        Self {
            scale: ChannelVectors::per_group(scale),
            shift: ChannelVectors::per_group(shift),
        }
    }

    /// One pair of vectors per image: `[images, channels]` each.
    pub fn per_image(scale: &'a [f32], shift: &'a [f32]) -> Self {
        Self {
            scale: ChannelVectors::per_image(scale),
            shift: ChannelVectors::per_image(shift),
        }
    }
}

/// Channel vectors, or a constant where there are none.
#[derive(Debug)]
pub(super) enum Vectors<'a> {
    Given(ChannelVectors<'a>),
    Constant(Vec<f32>),
}

impl<'a> Vectors<'a> {
    /// # Panics
    /// When the vectors are not `channels` long for each of `groups` or `images`.
    #[track_caller]
    pub(super) fn new(
        what: &str,
        vectors: Option<ChannelVectors<'a>>,
        default: f32,
        (groups, images, channels): (usize, usize, usize),
    ) -> Self {
        match vectors {
            Some(vectors) => {
                let count = match vectors.index {
                    VectorIndex::Group => groups,
                    VectorIndex::Image => images,
                };
                check(what, vectors.values.len(), count * channels);
                Self::Given(vectors)
            }
            None => Self::Constant(vec![default; channels]),
        }
    }

    /// The vector of a group and image, from `channel` on.
    pub(super) fn at(&self, group: usize, image: usize, channels: usize, channel: usize) -> *const f32 {
        match self {
            Self::Given(vectors) => {
                let index = match vectors.index {
                    VectorIndex::Group => group,
                    VectorIndex::Image => image,
                };
                vectors.values[index * channels + channel..].as_ptr()
            }
            Self::Constant(values) => values[channel..].as_ptr(),
        }
    }
}

/// The vectors of an affine map, which may be the identity.
#[derive(Debug)]
pub(super) struct AffineVectors<'a> {
    pub scale: Vectors<'a>,
    pub shift: Vectors<'a>,
}

impl<'a> AffineVectors<'a> {
    /// # Panics
    /// As [`Vectors::new`].
    #[track_caller]
    pub(super) fn new(affine: Option<Affine<'a>>, counts: (usize, usize, usize)) -> Self {
        Self {
            scale: Vectors::new("scale", affine.map(|affine| affine.scale), 1.0, counts),
            shift: Vectors::new("shift", affine.map(|affine| affine.shift), 0.0, counts),
        }
    }
}

/// The tensor `act(scale·raw + shift)`, of which only `raw` is stored.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a, X = f32> {
    /// What is stored: `[rows, channels]`.
    pub raw: &'a [X],
    /// The affine map, none for the identity.
    pub affine: Option<Affine<'a>>,
    /// The activation.
    pub act: Act,
}

impl<'a, X> Source<'a, X> {
    /// A tensor that is stored as it is.
    pub fn plain(x: &'a [X]) -> Self {
        Self {
            raw: x,
            affine: None,
            act: Act::Identity,
        }
    }
}

/// Arguments of [`activate`].
#[derive(Debug)]
pub struct Activate<'a> {
    /// The rows of all tensors.
    pub rows: &'a RowPlan,
    /// Number of channels.
    pub channels: usize,
    /// What is activated.
    pub source: Source<'a>,
    /// Factor of each image, `[images]`: stochastic depth. 1 where absent.
    pub gain: Option<&'a [f32]>,
    /// What is added, `[rows, channels]`.
    pub residual: Option<&'a [f32]>,
    /// Overwritten with `gain·act(scale·raw + shift) + residual`: `[rows, channels]`.
    pub out: &'a mut [f32],
}

/// Forms a tensor that must be stored.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
pub fn activate(executor: &Executor, args: Activate<'_>) {
    let Activate {
        rows,
        channels,
        source,
        gain,
        residual,
        out,
    } = args;
    let len = rows.rows() * channels;
    let tensors = 2 + usize::from(residual.is_some());
    let _report = executor.report(Kernel::Elementwise, Work::new(0, tensors * len));
    check("the source", source.raw.len(), len);
    check("out", out.len(), len);
    if let Some(residual) = residual {
        check("the residual", residual.len(), len);
    }
    let gain = Gain::new(gain, rows);
    let affine = AffineVectors::new(source.affine, (rows.group_count(), rows.image_count(), channels));
    let out = SharedPtr::new(out);
    with_activation!(source.act, A => {
        for_blocks::<0>(executor, rows, channels, None, &|block, _| {
            let at = block.row * channels;
            // SAFETY: the sizes are checked above, and blocks are disjoint.
            unsafe {
                let pass = ActivatePass::<A> {
                    rows: block.rows,
                    columns: channels,
                    raw: source.raw.as_ptr().add(at),
                    scale: affine.scale.at(block.group, block.image, channels, 0),
                    shift: affine.shift.at(block.group, block.image, channels, 0),
                    gain: gain.of(block),
                    residual: residual.map_or(std::ptr::null(), |residual| residual[at..].as_ptr()),
                    out: out.get().add(at),
                    act: PhantomData,
                };
                sweep(executor.isa(), &pass);
            }
        });
    });
}

/// Arguments of [`activate_backward`].
#[derive(Debug)]
pub struct ActivateBackward<'a> {
    /// The rows of all tensors.
    pub rows: &'a RowPlan,
    /// Number of channels.
    pub channels: usize,
    /// What was activated.
    pub source: Source<'a>,
    /// Factor of each image, `[images]`.
    pub gain: Option<&'a [f32]>,
    /// Gradient by the output of [`activate`]: `[rows, channels]`.
    pub dout: &'a [f32],
    /// Overwritten with the gradient by z = scale·raw + shift, `gain·dout·act'(z)`: `[rows, channels]`.
    pub dz: &'a mut [f32],
    /// Overwritten with Σdz and Σdz·raw over the rows of each group: `[groups, 2, channels]`.
    pub sums: Option<&'a mut [f64]>,
}

/// The backward pass of [`activate`]; the gradient by its residual is `dout` itself.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
pub fn activate_backward(executor: &Executor, args: ActivateBackward<'_>) {
    let ActivateBackward {
        rows,
        channels,
        source,
        gain,
        dout,
        dz,
        sums,
    } = args;
    let len = rows.rows() * channels;
    let _report = executor.report(Kernel::Elementwise, Work::new(0, 3 * len));
    check("the source", source.raw.len(), len);
    check("dout", dout.len(), len);
    check("dz", dz.len(), len);
    let gain = Gain::new(gain, rows);
    let affine = AffineVectors::new(source.affine, (rows.group_count(), rows.image_count(), channels));
    let dz = SharedPtr::new(dz);
    with_activation!(source.act, A => {
        for_blocks::<2>(executor, rows, channels, sums, &|block, sums| {
            let at = block.row * channels;
            // SAFETY: the sizes are checked above, and blocks are disjoint.
            unsafe {
                let pass = ActivateBackwardPass::<A> {
                    rows: block.rows,
                    columns: channels,
                    raw: source.raw.as_ptr().add(at),
                    scale: affine.scale.at(block.group, block.image, channels, 0),
                    shift: affine.shift.at(block.group, block.image, channels, 0),
                    gain: gain.of(block),
                    dout: dout.as_ptr().add(at),
                    dz: dz.get().add(at),
                    sums,
                    act: PhantomData,
                };
                sweep(executor.isa(), &pass);
            }
        });
    });
}

/// Arguments of [`gradient_sums`].
#[derive(Debug)]
pub struct GradientSums<'a> {
    /// The rows of both tensors.
    pub rows: &'a RowPlan,
    /// Number of channels.
    pub channels: usize,
    /// Gradient by batch norm's output: `[rows, channels]`.
    pub dz: &'a [f32],
    /// Batch norm's input: `[rows, channels]`.
    pub y: &'a [f32],
    /// Overwritten with Σdz and Σdz·y over the rows of each group: `[groups, 2, channels]`.
    pub sums: &'a mut [f64],
}

/// What batch norm's backward pass needs, for a gradient that is put together by several kernels.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
pub fn gradient_sums(executor: &Executor, args: GradientSums<'_>) {
    let GradientSums {
        rows,
        channels,
        dz,
        y,
        sums,
    } = args;
    let _report = executor.report(Kernel::Elementwise, Work::new(0, dz.len() + y.len()));
    check("dz", dz.len(), rows.rows() * channels);
    check("y", y.len(), rows.rows() * channels);
    for_blocks::<2>(executor, rows, channels, Some(sums), &|block, sums| {
        let at = block.row * channels;
        // SAFETY: the sizes are checked above.
        unsafe {
            let pass = GradientSumsPass {
                rows: block.rows,
                columns: channels,
                dz: dz.as_ptr().add(at),
                y: y.as_ptr().add(at),
                sums,
            };
            sweep(executor.isa(), &pass);
        }
    });
}

/// The factor of each image.
struct Gain<'a>(Option<&'a [f32]>);

impl<'a> Gain<'a> {
    #[track_caller]
    fn new(gain: Option<&'a [f32]>, rows: &RowPlan) -> Self {
        if let Some(gain) = gain {
            check("gain", gain.len(), rows.image_count());
        }
        Self(gain)
    }

    fn of(&self, block: &RowBlock) -> f32 {
        self.0.map_or(1.0, |gain| gain[block.image])
    }
}

/// Calls `work(block, sums)` for every block. What the calls add to `sums`, N vectors of `padded(channels)`, ends up in
/// `totals` by group: `[groups, N, channels]`.
pub(super) fn for_blocks<const N: usize>(
    executor: &Executor,
    rows: &RowPlan,
    channels: usize,
    totals: Option<&mut [f64]>,
    work: &(dyn Fn(&RowBlock, *mut f32) + Sync),
) {
    if let Some(totals) = &totals {
        check("sums", totals.len(), rows.group_count() * N * channels);
    }
    let (isa, pool) = (executor.isa(), executor.pool());
    let tasks = rows.tasks(TASKS);
    let stride = padded(channels);
    let mut workspace = executor.workspace();
    let task_totals = workspace.totals(tasks.len() * N * channels);
    let shared_totals = SharedPtr::new(task_totals);
    let with_totals = totals.is_some();
    pool.run(tasks.len(), &|task, worker| {
        // SAFETY: inside the task, with its worker, once; the totals at `task` belong to it alone.
        let (mut scratch, totals) = unsafe {
            (
                Bump::new(pool.scratch(worker, Bump::room(N * stride))),
                part(shared_totals, task, N * channels),
            )
        };
        let sums = scratch.take_zeroed(N * stride);
        totals.fill(0.0);
        for block in rows.blocks(&tasks[task]) {
            work(block, if with_totals { sums } else { std::ptr::null_mut() });
            if with_totals {
                // SAFETY: N vectors of sums, N of totals.
                unsafe { flush_rows(isa, sums, stride, totals, channels) };
            }
        }
    });
    if let Some(totals) = totals {
        reduce_totals(
            task_totals,
            tasks.iter().map(|task| task.group),
            totals,
            N * channels,
        );
    }
}

struct ActivatePass<A> {
    rows: usize,
    columns: usize,
    raw: *const f32,
    scale: *const f32,
    shift: *const f32,
    gain: f32,
    /// 0 where null.
    residual: *const f32,
    out: *mut f32,
    act: PhantomData<A>,
}

impl<A: Activation> Sweep for ActivatePass<A> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    unsafe fn vector<S: Simd, const R: usize, const WHOLE: bool>(
        &self,
        row: usize,
        column: usize,
        lanes: usize,
    ) {
        // SAFETY: inside the rows and columns of the pass.
        unsafe {
            let scale = load::<S, WHOLE>(self.scale.add(column), lanes);
            let shift = load::<S, WHOLE>(self.shift.add(column), lanes);
            let gain = S::splat(self.gain);
            let mut z = [S::zero(); R];
            for (i, z) in z.iter_mut().enumerate() {
                let raw = load::<S, WHOLE>(self.raw.add((row + i) * self.columns + column), lanes);
                *z = S::fma(raw, scale, shift);
            }
            for (i, value) in A::values::<S, R>(z).into_iter().enumerate() {
                let at = (row + i) * self.columns + column;
                let mut out = S::mul(gain, value);
                if !self.residual.is_null() {
                    out = S::add(out, load::<S, WHOLE>(self.residual.add(at), lanes));
                }
                store::<S, WHOLE>(self.out.add(at), out, lanes);
            }
        }
    }
}

struct ActivateBackwardPass<A> {
    rows: usize,
    columns: usize,
    raw: *const f32,
    scale: *const f32,
    shift: *const f32,
    gain: f32,
    dout: *const f32,
    dz: *mut f32,
    /// Not wanted where null.
    sums: *mut f32,
    act: PhantomData<A>,
}

impl<A: Activation> Sweep for ActivateBackwardPass<A> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    unsafe fn vector<S: Simd, const R: usize, const WHOLE: bool>(
        &self,
        row: usize,
        column: usize,
        lanes: usize,
    ) {
        // SAFETY: inside the rows and columns of the pass; sums hold whole vectors.
        unsafe {
            let scale = load::<S, WHOLE>(self.scale.add(column), lanes);
            let shift = load::<S, WHOLE>(self.shift.add(column), lanes);
            let gain = S::splat(self.gain);
            let (mut sum, mut with_raw) = (S::zero(), S::zero());
            let (mut raws, mut z) = ([S::zero(); R], [S::zero(); R]);
            for (i, (raw, z)) in raws.iter_mut().zip(&mut z).enumerate() {
                *raw = load::<S, WHOLE>(self.raw.add((row + i) * self.columns + column), lanes);
                *z = S::fma(*raw, scale, shift);
            }
            let (_, slopes) = A::values_and_slopes::<S, R>(z);
            for (i, (slope, raw)) in slopes.into_iter().zip(raws).enumerate() {
                let at = (row + i) * self.columns + column;
                let dout = load::<S, WHOLE>(self.dout.add(at), lanes);
                let dz = S::mul(S::mul(gain, dout), slope);
                store::<S, WHOLE>(self.dz.add(at), dz, lanes);
                sum = S::add(sum, dz);
                with_raw = S::fma(dz, raw, with_raw);
            }
            if !self.sums.is_null() {
                add_sums::<S>(self.sums, self.columns, column, [sum, with_raw]);
            }
        }
    }
}

struct GradientSumsPass {
    rows: usize,
    columns: usize,
    dz: *const f32,
    y: *const f32,
    sums: *mut f32,
}

impl Sweep for GradientSumsPass {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    unsafe fn vector<S: Simd, const R: usize, const WHOLE: bool>(
        &self,
        row: usize,
        column: usize,
        lanes: usize,
    ) {
        // SAFETY: inside the rows and columns of the pass; sums hold whole vectors.
        unsafe {
            let (mut sum, mut with_y) = (S::zero(), S::zero());
            for row in row..row + R {
                let at = row * self.columns + column;
                let dz = load::<S, WHOLE>(self.dz.add(at), lanes);
                sum = S::add(sum, dz);
                with_y = S::fma(dz, load::<S, WHOLE>(self.y.add(at), lanes), with_y);
            }
            add_sums::<S>(self.sums, self.columns, column, [sum, with_y]);
        }
    }
}

/// Adds a vector to each of two rows of sums.
#[inline(always)]
unsafe fn add_sums<S: Simd>(sums: *mut f32, columns: usize, column: usize, values: [S::V; 2]) {
    for (kind, value) in values.into_iter().enumerate() {
        // SAFETY: sums hold two vectors of padded columns.
        unsafe {
            let sum = sums.add(kind * padded(columns) + column);
            S::store(sum, S::add(S::load(sum), value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::pointwise::Segment;
    use super::super::testing::{activation, assert_close, buffer, same_everywhere, values};
    use super::*;

    struct Case {
        segments: Vec<Segment>,
        rows: RowPlan,
        channels: usize,
        raw: Vec<f32>,
        other: Vec<f32>,
        scale: Vec<f32>,
        shift: Vec<f32>,
        gain: Vec<f32>,
    }

    fn cases() -> Vec<Case> {
        let case = |(segments, channels): (&[(usize, usize, usize)], usize)| {
            let segments: Vec<_> = segments
                .iter()
                .map(|&(rows, image, group)| Segment { rows, image, group })
                .collect();
            let rows = RowPlan::new(&segments);
            Case {
                raw: buffer(rows.rows() * channels, 1).to_vec(),
                other: values(rows.rows() * channels, 2),
                scale: values(rows.group_count() * channels, 3),
                shift: values(rows.group_count() * channels, 4),
                gain: values(rows.image_count(), 5),
                segments,
                rows,
                channels,
            }
        };
        let cases: [(&[_], _); 3] = [
            (&[(1, 0, 0)], 3),
            (&[(101, 0, 0), (101, 1, 0)], 40),
            (&[(99, 0, 0), (99, 1, 0), (7, 0, 1), (7, 1, 1)], 88),
        ];
        cases.into_iter().map(case).collect()
    }

    impl Case {
        fn source(&self) -> Source<'_> {
            Source {
                raw: &self.raw,
                affine: Some(Affine::per_group(&self.scale, &self.shift)),
                act: Act::Swish,
            }
        }

        /// For every value: group, channel, raw, act, slope, gain, other.
        fn terms(&self) -> Vec<(usize, usize, f64, f64, f64, f64, f64)> {
            let mut terms = Vec::new();
            let owners = self
                .segments
                .iter()
                .flat_map(|s| std::iter::repeat_n((s.group, s.image), s.rows));
            for (row, (group, image)) in owners.enumerate() {
                for c in 0..self.channels {
                    let i = row * self.channels + c;
                    let (scale, shift) = (
                        self.scale[group * self.channels + c],
                        self.shift[group * self.channels + c],
                    );
                    let raw = f64::from(self.raw[i]);
                    let (act, slope) = activation(Act::Swish, raw * f64::from(scale) + f64::from(shift));
                    terms.push((
                        group,
                        c,
                        raw,
                        act,
                        slope,
                        f64::from(self.gain[image]),
                        f64::from(self.other[i]),
                    ));
                }
            }
            terms
        }
    }

    #[test]
    fn activating_matches_float64_and_itself_everywhere() {
        for case in cases() {
            let out = same_everywhere(|executor| {
                let mut out = vec![f32::NAN; case.raw.len()];
                let args = Activate {
                    rows: &case.rows,
                    channels: case.channels,
                    source: case.source(),
                    gain: Some(&case.gain),
                    residual: Some(&case.other),
                    out: &mut out,
                };
                activate(executor, args);
                out
            });
            let expected: Vec<f64> = case
                .terms()
                .iter()
                .map(|&(_, _, _, act, _, gain, other)| gain * act + other)
                .collect();
            assert_close("out", &out, &expected, 1e-6);
        }
    }

    #[test]
    fn the_way_back_matches_float64_and_itself_everywhere() {
        for case in cases() {
            let groups = case.rows.group_count();
            let (dz, sums) = same_everywhere(|executor| {
                let mut dz = vec![f32::NAN; case.raw.len()];
                let mut sums = vec![f64::NAN; groups * 2 * case.channels];
                let args = ActivateBackward {
                    rows: &case.rows,
                    channels: case.channels,
                    source: case.source(),
                    gain: Some(&case.gain),
                    dout: &case.other,
                    dz: &mut dz,
                    sums: Some(&mut sums),
                };
                activate_backward(executor, args);
                (dz, sums)
            });
            let again = same_everywhere(|executor| {
                let mut sums = vec![f64::NAN; groups * 2 * case.channels];
                let args = GradientSums {
                    rows: &case.rows,
                    channels: case.channels,
                    dz: &dz,
                    y: &case.raw,
                    sums: &mut sums,
                };
                gradient_sums(executor, args);
                sums
            });
            assert_eq!(sums, again);
            let mut expected_sums = vec![0.0; sums.len()];
            let mut expected = Vec::new();
            for (group, c, raw, _, slope, gain, other) in case.terms() {
                let dz = gain * other * slope;
                expected.push(dz);
                expected_sums[group * 2 * case.channels + c] += dz;
                expected_sums[(group * 2 + 1) * case.channels + c] += dz * raw;
            }
            assert_close("dz", &dz, &expected, 1e-6);
            assert_close("sums", &sums, &expected_sums, 2e-6);
        }
    }
}
