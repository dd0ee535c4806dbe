//! What the kernels' tests share.

use effdet_model::hparams::ActType;
use effdet_model::network::MapSize;

use super::Executor;
use crate::arena::AlignedBuf;
use crate::math::Act;
use crate::reference::{Tensor, ops};
use crate::simd::Isa;

/// Values in [−1, 1) from a counter.
pub(crate) fn values(len: usize, seed: u32) -> Vec<f32> {
    let value = |i: u32| {
        (i.wrapping_add(seed << 20).wrapping_mul(2_654_435_761) ^ 0x5bd1_e995).wrapping_mul(747_796_405)
    };
    (0..len as u32)
        .map(|i| (value(i) >> 8) as f32 / (1 << 23) as f32 - 1.0)
        .collect()
}

pub(crate) fn buffer(len: usize, seed: u32) -> AlignedBuf {
    AlignedBuf::from_slice(&values(len, seed))
}

/// The activation and its slope in float64, by the plain reference.
pub(crate) fn activation(act: Act, z: f64) -> (f64, f64) {
    let act = match act {
        Act::Swish => ActType::Swish,
        Act::Relu => ActType::Relu,
        Act::Relu6 => ActType::Relu6,
        Act::HSwish => ActType::Hswish,
        Act::Mish => ActType::Mish,
        Act::Identity => ActType::Identity,
        Act::SRelu => ActType::Srelu,
    };
    let single = |value: f64| Tensor {
        batch: 1,
        map: MapSize { height: 1, width: 1 },
        channels: 1,
        data: vec![value],
    };
    let z = single(z);
    (
        ops::activate(&z, act).data[0],
        ops::activate_backward(&z, act, &single(1.0)).data[0],
    )
}

/// Asserts that values agree with float64 ones to `tolerance` of the largest of these.
#[track_caller]
pub(crate) fn assert_close<T: Copy + Into<f64>>(what: &str, actual: &[T], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(1e-3, |m: f64, x| m.max(x.abs()));
    for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let a: f64 = a.into();
        assert!(
            (a - e).abs() <= tolerance * largest,
            "{what}[{i}] is {a}, {e} expected"
        );
    }
}

/// Runs a kernel on every instruction set and with several numbers of threads, asserts that all results are equal, and
/// returns them.
#[track_caller]
pub(crate) fn same_everywhere<R: PartialEq>(run: impl Fn(&Executor) -> R) -> R {
    let expected = run(&Executor::new(1, Isa::Portable));
    for isa in Isa::available() {
        for threads in [1, 2, 3] {
            assert!(
                run(&Executor::new(threads, isa)) == expected,
                "{isa} with {threads} threads differs"
            );
        }
    }
    expected
}
