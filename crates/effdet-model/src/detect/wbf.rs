//! Weighted box fusion: the detections of several models for one image made into one set.
//!
//! Source: arXiv:1910.13302; the reference's `utils/wbf.py`.

use std::collections::BTreeMap;

use super::Detection;
use crate::boxes;
use crate::label_map::ClassIndex;

/// Least overlap (inclusive) with which a detection joins a cluster.
pub const CLUSTER_IOU: f32 = 0.55;

/// Fuses the detections of `num_models` models for one image, best first.
///
/// Class by class and in input order, a detection joins the cluster whose fused box overlaps it most (of equal ones the first) if
/// their IoU is at least [`CLUSTER_IOU`], else it starts one. A cluster becomes
///
/// ```text
/// box = Σ score·box / Σ score      score = mean(score) · min(1, members / num_models)
/// ```
///
/// Of equal scores the lower class, then the older cluster comes first. The reference drops the last class, whose 1-based id lies
/// beyond its range; here no class is lost.
pub fn fuse(detections: &[Detection], num_models: usize) -> Vec<Detection> {
    let mut by_class: BTreeMap<ClassIndex, Vec<Cluster>> = BTreeMap::new();
    for detection in detections {
        let clusters = by_class.entry(detection.class).or_default();
        let overlaps = clusters
            .iter()
            .map(|c| boxes::iou(c.fused.box_yxyx_px, detection.box_yxyx_px));
        let best = overlaps
            .enumerate()
            .reduce(|best, next| if next.1 > best.1 { next } else { best });
        match best {
            Some((index, overlap)) if overlap >= CLUSTER_IOU => clusters[index].join(detection, num_models),
            _ => clusters.push(Cluster::start(detection, num_models)),
        }
    }
    let mut fused: Vec<Detection> = by_class
        .into_values()
        .flatten()
        .map(|cluster| cluster.fused)
        .collect();
    fused.sort_by(|a, b| b.score.total_cmp(&a.score));
    fused
}

struct Cluster {
    fused: Detection,
    members: usize,
    score_sum: f32,
    /// Σ score·box.
    weighted: [f32; 4],
}

impl Cluster {
    fn start(detection: &Detection, num_models: usize) -> Self {
        let mut cluster = Self {
            fused: *detection,
            members: 0,
            score_sum: 0.0,
            weighted: [0.0; 4],
        };
        cluster.join(detection, num_models);
        cluster
    }

    fn join(&mut self, detection: &Detection, num_models: usize) {
        self.members += 1;
        self.score_sum += detection.score;
        for (sum, coordinate) in self.weighted.iter_mut().zip(detection.box_yxyx_px) {
            *sum += detection.score * coordinate;
        }
        if self.score_sum > 0.0 {
            self.fused.box_yxyx_px = self.weighted.map(|sum| sum / self.score_sum);
        }
        let members = self.members as f32;
        let agreement = (members / num_models.max(1) as f32).min(1.0);
        self.fused.score = self.score_sum / members * agreement;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detection(at: f32, score: f32, class: u32) -> Detection {
        Detection {
            box_yxyx_px: [at, at, at + 10.0, at + 10.0],
            score,
            class: ClassIndex(class),
        }
    }

    #[test]
    fn nothing_fuses_to_nothing() {
        assert_eq!(fuse(&[], 2), []);
    }

    #[test]
    fn agreeing_models_keep_their_score_and_a_lone_one_loses_some() {
        let fused = fuse(
            &[
                detection(0.0, 0.8, 0),
                detection(50.0, 0.9, 0),
                detection(0.0, 0.6, 0),
            ],
            2,
        );
        assert_eq!(fused.len(), 2);
        assert!((fused[0].score - 0.7).abs() < 1e-6 && (fused[1].score - 0.45).abs() < 1e-6);
    }

    #[test]
    fn classes_are_fused_apart_and_none_is_lost() {
        assert_eq!(
            fuse(&[detection(0.0, 0.8, 0), detection(0.0, 0.8, 90)], 1).len(),
            2
        );
    }

    #[test]
    fn scores_of_zero_and_nan_do_no_harm() {
        let fused = fuse(
            &[
                detection(3.0, 0.0, 0),
                detection(3.0, 0.0, 0),
                detection(9.0, f32::NAN, 1),
            ],
            0,
        );
        assert_eq!(fused.len(), 2);
        assert!(fused.iter().any(|d| d.box_yxyx_px == [3.0, 3.0, 13.0, 13.0]));
    }
}
