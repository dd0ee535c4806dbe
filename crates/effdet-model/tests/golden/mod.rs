//! What the golden tests share: the file of golden numbers and its input generator.
#![allow(dead_code)]

use std::sync::LazyLock;

use effdet_model::anchors::{AnchorConfig, Anchors};
use effdet_model::hparams::HParams;
use serde_json::Value;

static GOLDEN: LazyLock<Value> = LazyLock::new(|| {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/golden.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
});

/// A section of `golden.json`.
pub fn section(name: &str) -> &'static Value {
    &GOLDEN[name]
}

pub fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is not a number"))
}

pub fn array(value: &Value) -> &[Value] {
    value
        .as_array()
        .unwrap_or_else(|| panic!("{value} is not an array"))
}

pub fn numbers(value: &Value) -> Vec<f64> {
    array(value).iter().map(number).collect()
}

/// Whether `got` lies within `tolerance · max(1, |want|)` of `want`; prints both where not.
pub fn close(what: &str, got: f64, want: f64, tolerance: f64) -> bool {
    let near = (got - want).abs() <= tolerance * want.abs().max(1.0);
    if !near {
        println!("{what}: got {got}, want {want}");
    }
    near
}

/// The anchors of D0 for a square image.
pub fn square_anchors(side: usize) -> Anchors {
    let config = AnchorConfig::from(&HParams::preset("efficientdet-d0").unwrap());
    Anchors::new(&AnchorConfig {
        image_height: side,
        image_width: side,
        ..config
    })
    .unwrap()
}

/// `s(k, e)` of the golden inputs: element `element` of deterministic tensor `tensor`, in `[-1, 1)`.
pub fn deterministic(tensor: u32, element: u32) -> f64 {
    let mut x = tensor
        .wrapping_mul(1_000_003)
        .wrapping_add(element.wrapping_mul(7919))
        .wrapping_add(12_345);
    x = x.wrapping_mul(2_654_435_761);
    x ^= x >> 16;
    x = x.wrapping_mul(2_246_822_519);
    x ^= x >> 13;
    2.0 * f64::from(x) / 4_294_967_296.0 - 1.0
}
