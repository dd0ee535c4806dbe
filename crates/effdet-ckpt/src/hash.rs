//! SHA-256 of bytes and of weights.

use effdet_model::weights::Weights;
use sha2::{Digest, Sha256};

/// SHA-256 of `bytes` as 64 lower-case hexadecimal digits.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// SHA-256 of all values of a network, for "these two are equal to the last bit".
///
/// Hashed are, for the trainable values and then for the statistics: their number as a little-endian `u64`, and each value as a
/// little-endian `f32`. So −0 differs from 0, and NaNs differ by their payload.
pub fn weights_hash(weights: &Weights) -> String {
    let mut hasher = Sha256::new();
    for values in [&weights.trainable, &weights.statistics] {
        hasher.update((values.len() as u64).to_le_bytes());
        for chunk in values.chunks(16 * 1024) {
            hasher.update(crate::tensors::little_endian(chunk));
        }
    }
    hex(&hasher.finalize())
}

fn hex(digest: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    digest
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|nibble| DIGITS[usize::from(nibble)] as char)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_sha_256() {
        // FIPS 180-4, example "abc".
        assert_eq!(
            sha256_hex(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn a_weights_hash_sees_every_bit_and_the_border_between_the_buffers() {
        let weights = |trainable: &[f32], statistics: &[f32]| {
            weights_hash(&Weights {
                trainable: trainable.to_vec(),
                statistics: statistics.to_vec(),
            })
        };
        let reference = weights(&[1.0, 0.0], &[2.0]);
        assert_eq!(reference, weights(&[1.0, 0.0], &[2.0]));
        for other in [
            weights(&[1.0, -0.0], &[2.0]),
            weights(&[1.0], &[0.0, 2.0]),
            weights(&[0.0, 1.0], &[2.0]),
            weights(&[f32::from_bits(1.0f32.to_bits() + 1), 0.0], &[2.0]),
        ] {
            assert_ne!(reference, other);
        }
    }
}
