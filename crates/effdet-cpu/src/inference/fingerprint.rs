//! A fingerprint that tells whether weights are those of the last call.

use std::sync::Mutex;

use effdet_model::weights::Weights;

use crate::kernels::Executor;

/// Values that a task works on.
const TASK_VALUES: usize = 256 << 10;

/// Independent chains, so that multiplications overlap.
const CHAINS: usize = 8;

/// 64 bits that change whenever a single value does, and for any other change all but surely.
///
/// Not for adversaries: only for an engine that is handed the weights on every call.
pub(crate) fn fingerprint(executor: &Executor, weights: &Weights) -> u64 {
    let parts: Vec<&[f32]> = (weights.trainable.chunks(TASK_VALUES))
        .chain(weights.statistics.chunks(TASK_VALUES))
        .collect();
    let hashes = Mutex::new(vec![0; parts.len()]);
    executor.pool().run(parts.len(), &|task, _| {
        let hash = hash(parts[task]);
        hashes.lock().expect("no task panics with the lock held")[task] = hash;
    });
    let hashes = hashes.into_inner().expect("no task panics with the lock held");
    hashes.into_iter().fold(0, mix)
}

/// One step of a chain; a bijection of the chain for every word and of the word for every chain.
fn mix(chain: u64, word: u64) -> u64 {
    let mixed = (chain ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ mixed >> 29
}

fn hash(values: &[f32]) -> u64 {
    let (groups, rest) = values.as_chunks::<{ 2 * CHAINS }>();
    let mut chains: [u64; CHAINS] = std::array::from_fn(|i| i as u64);
    let word = |low: f32, high: f32| u64::from(low.to_bits()) | u64::from(high.to_bits()) << 32;
    for group in groups {
        for (i, chain) in chains.iter_mut().enumerate() {
            *chain = mix(*chain, word(group[2 * i], group[2 * i + 1]));
        }
    }
    let hash = chains.into_iter().fold(values.len() as u64, mix);
    rest.iter().fold(hash, |hash, value| mix(hash, word(*value, 0.0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;

    #[test]
    fn every_single_change_shows() {
        let executor = Executor::new(2, Isa::detect());
        let mut weights = Weights {
            trainable: (0..TASK_VALUES + 37).map(|i| i as f32).collect(),
            statistics: vec![1.0; 21],
        };
        let before = fingerprint(&executor, &weights);
        assert_eq!(fingerprint(&Executor::new(1, Isa::Portable), &weights), before);
        for index in [0, 1, 1000, TASK_VALUES - 1, TASK_VALUES, TASK_VALUES + 36] {
            let value = weights.trainable[index];
            weights.trainable[index] = f32::from_bits(value.to_bits() ^ 1);
            assert_ne!(fingerprint(&executor, &weights), before, "value {index}");
            weights.trainable[index] = value;
        }
        weights.statistics.swap(0, 20);
        assert_eq!(fingerprint(&executor, &weights), before, "equal values");
        weights.statistics[20] = -1.0;
        assert_ne!(fingerprint(&executor, &weights), before);
    }
}
