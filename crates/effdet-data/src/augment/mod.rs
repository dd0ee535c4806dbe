//! The operations of automl's AutoAugment on 8-bit images and normalised boxes, bit for bit.
//!
//! Source: automl's `aug/autoaugment.py`, itself after Cubuk et al., "AutoAugment" (2019) and Zoph et al., "Learning Data
//! Augmentation Strategies for Object Detection" (2019).

pub mod geometry;
pub mod pixels;

/// Value of every channel where an operation leaves nothing of the image.
pub const REPLACE: u8 = 128;

#[cfg(test)]
mod golden_tests;
