//! Stochastic depth: whole residual branches dropped per image in training.
#![forbid(unsafe_code)]

use effdet_model::rng::{Draws, Purpose};

/// Keys of the draws of a step.
#[derive(Debug, Clone, Copy)]
pub struct DrawKeys<'a> {
    /// Seed of the run.
    pub seed: u64,
    /// Epoch of the batch.
    pub epoch: u64,
    /// One key per image.
    pub images: &'a [u64],
}

impl DrawKeys<'_> {
    /// Factor of the residual branch of every image: `⌊p + u⌋/p` with p = `survival` and u uniform in [0, 1).
    ///
    /// `layer` counts the layers that may have a residual branch, in the order in which they run: every block of the backbone,
    /// then every repeated layer of the class head, level by level, then those of the box head.
    ///
    /// # Determinism
    /// Keyed by (seed, epoch, the image's key, `layer`): independent of the batch an image lies in.
    pub fn branch_factors(&self, survival: f32, layer: u64) -> Vec<f32> {
        (self.images.iter())
            .map(|&key| {
                // The layer is mixed into the key so that layers draw independently.
                let key = key ^ layer.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let mut draws = Draws::new(self.seed, Purpose::DropConnect, self.epoch, key);
                (survival + draws.uniform()).floor() / survival
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branches_survive_with_their_probability_and_keep_their_mean() {
        let images: Vec<u64> = (0..20_000).collect();
        let keys = DrawKeys {
            seed: 1,
            epoch: 2,
            images: &images,
        };
        let factors = keys.branch_factors(0.8, 3);
        assert!(factors.iter().all(|&factor| factor == 0.0 || factor == 1.25));
        let mean = factors.iter().sum::<f32>() / factors.len() as f32;
        assert!((mean - 1.0).abs() < 0.02, "mean factor {mean}");
    }

    #[test]
    fn layers_epochs_and_images_draw_independently() {
        let images: Vec<u64> = (0..64).collect();
        let keys = DrawKeys {
            seed: 1,
            epoch: 2,
            images: &images,
        };
        let factors = keys.branch_factors(0.5, 0);
        assert_ne!(factors, keys.branch_factors(0.5, 1));
        assert_ne!(factors, DrawKeys { epoch: 3, ..keys }.branch_factors(0.5, 0));
        let some = DrawKeys {
            images: &images[8..16],
            ..keys
        };
        assert_eq!(factors[8..16], some.branch_factors(0.5, 0));
    }
}
