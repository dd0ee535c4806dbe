//! The plain reference against the numbers measured on the reference implementation, and in f32 against itself in f64.

mod common;

use effdet_cpu::reference::ReferenceEngine;

mod in_f32 {
    use super::ReferenceEngine;
    use crate::{agreement_tests, golden_tests};

    golden_tests!(|network| ReferenceEngine::<f32>::new(network).unwrap());
    agreement_tests!(|network| ReferenceEngine::<f32>::new(network).unwrap());
}

mod in_f64 {
    use super::ReferenceEngine;
    use crate::golden_tests;

    golden_tests!(|network| ReferenceEngine::<f64>::new(network).unwrap());
}

#[test]
fn weights_and_images_are_generated_as_for_the_golden_file() {
    common::golden::check_generator();
}
