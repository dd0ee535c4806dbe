//! The plain reference against the numbers measured on the reference implementation.

mod common;

use effdet_cpu::reference::ReferenceEngine;

golden_tests!(in_f32, |network| ReferenceEngine::<f32>::new(network).unwrap());
golden_tests!(in_f64, |network| ReferenceEngine::<f64>::new(network).unwrap());

#[test]
fn weights_and_images_are_generated_as_for_the_golden_file() {
    common::golden::check_generator();
}
