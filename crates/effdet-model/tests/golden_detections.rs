//! Candidates, suppression and post-processing against numbers produced by running the reference (TensorFlow 2.8.4, NumPy).

mod golden;

use effdet_model::anchors::Anchors;
use effdet_model::detect::candidates::ImageHeads;
use effdet_model::detect::nms::{ScoredBox, suppress_inclusive};
use effdet_model::detect::{
    DetectError, Detection, postprocess_combined, postprocess_evaluation, postprocess_global,
    postprocess_per_class, wbf,
};
use effdet_model::engine::{HeadOutputs, LevelOutput};
use effdet_model::hparams::{NmsConfigs, NmsMethod};
use effdet_model::label_map::ClassIndex;
use golden::{array, close, deterministic, number, numbers, section, square_anchors};
use serde_json::Value;

const IMAGE_SCALES: [f32; 2] = [1.5, 0.8];
const IMAGE_IDS: [f64; 2] = [139.0, 285.0];
const PIXELS: f64 = 1e-4;
const SCORE: f64 = 1e-6;

fn golden(key: &str) -> &'static Value {
    &section("preprocess_losses_postprocess")[key]
}

/// Head outputs of the golden section: logits `4·s − 3`, codes `s/2`.
fn outputs() -> HeadOutputs {
    let level = |level: u32| {
        let side = 128 >> level;
        let values = |tensor: u32, channels: u32, map: fn(f64) -> f64| {
            let count = 2 * side * side * channels;
            (0..count)
                .map(|element| map(deterministic(tensor, element)) as f32)
                .collect()
        };
        LevelOutput {
            height: side as usize,
            width: side as usize,
            class_logits: values(200_000 + level, 819, |s| 4.0 * s - 3.0),
            box_codes: values(300_000 + level, 36, |s| 0.5 * s),
        }
    };
    HeadOutputs {
        batch: 2,
        levels: (3..=7).map(level).collect(),
    }
}

fn check_box(what: &str, got: [f32; 4], want: &[f64]) {
    for (got, &want) in got.iter().zip(want) {
        assert!((f64::from(*got) - want).abs() < PIXELS, "{what}: {got} {want}");
    }
}

fn check_score(what: &str, got: f32, want: f64) {
    assert!((f64::from(got) - want).abs() < SCORE, "{what}: {got} {want}");
}

type Path = fn(&HeadOutputs, usize, &Anchors, &NmsConfigs, f32) -> Result<Vec<Detection>, DetectError>;

fn detections(path: Path, config: &NmsConfigs) -> [Vec<Detection>; 2] {
    let (outputs, anchors) = (outputs(), square_anchors(128));
    [0, 1].map(|image| path(&outputs, image, &anchors, config, IMAGE_SCALES[image]).unwrap())
}

/// Source: `golden.json`, `pre_nms`.
#[test]
fn the_best_5000_logits_equal_the_reference() {
    let (outputs, anchors) = (outputs(), square_anchors(128));
    for image in 0..2 {
        let candidates = ImageHeads::new(&outputs, image, &anchors).unwrap().top(5000);
        assert_eq!(candidates.len(), 5000);
        let sum: f64 = candidates
            .iter()
            .map(|candidate| f64::from(candidate.score))
            .sum();
        assert!(close(
            "score_sum",
            sum,
            number(&golden("pre_nms")["score_sum"][image]),
            SCORE
        ));
        check_score(
            "min_score",
            candidates[4999].score,
            number(&golden("pre_nms")["min_score"][image]),
        );
        for (rank, want) in array(&golden("pre_nms")["top3"][image]).iter().enumerate() {
            let got = candidates[rank];
            check_box("top3", got.box_yxyx_px, &numbers(&want["box"]));
            check_score("top3", got.score, number(&want["score"]));
            assert_eq!(f64::from(got.class.0), number(&want["cls"]));
        }
    }
}

/// `[image_id, x1, y1, x2, y2, score, class + 1]`.
fn evaluation_row(image: usize, detection: &Detection) -> [f64; 7] {
    let [ymin, xmin, ymax, xmax] = detection.box_yxyx_px.map(f64::from);
    let class = f64::from(detection.class.0 + 1);
    [
        IMAGE_IDS[image],
        xmin,
        ymin,
        xmax,
        ymax,
        f64::from(detection.score),
        class,
    ]
}

/// Source: `golden.json`, `pyfunc_gaussian`, `pyfunc_linear`, `pyfunc_hard`, `pyfunc_diou`.
#[test]
fn evaluation_detections_equal_the_reference_for_every_method() {
    for method in [
        NmsMethod::Gaussian,
        NmsMethod::Linear,
        NmsMethod::Hard,
        NmsMethod::Diou,
    ] {
        let golden = golden(&format!("pyfunc_{method}"));
        let found = detections(
            postprocess_evaluation,
            &NmsConfigs {
                method,
                ..NmsConfigs::default()
            },
        );
        let mut sum = 0.0;
        for (image, found) in found.iter().enumerate() {
            assert_eq!(found.len(), 100);
            let rows: Vec<_> = found
                .iter()
                .map(|detection| evaluation_row(image, detection))
                .collect();
            sum += rows.iter().flatten().sum::<f64>();
            for (rank, want) in [0, 1, 2, 10, 50, 99]
                .into_iter()
                .zip(array(&golden["rows"][image]))
            {
                let want = numbers(want);
                let got = rows[rank];
                for column in 0..7 {
                    let tolerance = if column == 5 { SCORE } else { PIXELS };
                    assert!(
                        (got[column] - want[column]).abs() < tolerance,
                        "{method} {rank}: {got:?} {want:?}"
                    );
                }
            }
        }
        assert!(close("sum", sum, number(&golden["sum"]), 1e-6), "{method}");
    }
}

fn check_served(key: &str, path: Path, config: &NmsConfigs) {
    let golden = golden(key);
    for (image, found) in detections(path, config).iter().enumerate() {
        assert_eq!(found.len() as f64, number(&golden["valid"][image]), "{key}");
        if let Some(want) = golden.get("score_sum") {
            let sum: f64 = found.iter().map(|detection| f64::from(detection.score)).sum();
            assert!(close(key, sum, number(&want[image]), 1e-6));
        }
        for (rank, want) in [0, 1, 5, 20, 99].into_iter().zip(array(&golden["rows"][image])) {
            let got = found[rank];
            check_box(key, got.box_yxyx_px, &numbers(&want["box"]));
            check_score(key, got.score, number(&want["score"]));
            assert_eq!(f64::from(got.class.0 + 1), number(&want["cls"]), "{key} {rank}");
        }
    }
}

fn serving(method: NmsMethod, score_thresh: f64) -> NmsConfigs {
    NmsConfigs {
        method,
        score_thresh,
        ..NmsConfigs::default()
    }
}

/// Source: `golden.json`, `global_*`; the suffix is the score threshold, 0 means unset.
#[test]
fn served_detections_equal_the_reference() {
    for (suffix, score_thresh) in [("0.4", 0.4), ("0", 0.0)] {
        for method in [NmsMethod::Gaussian, NmsMethod::Hard] {
            let key = format!("global_{method}_{suffix}");
            check_served(&key, postprocess_global, &serving(method, score_thresh));
        }
    }
}

/// Source: `golden.json`, `perclass_*_0.4`.
#[test]
fn per_class_detections_equal_the_reference() {
    for method in [NmsMethod::Gaussian, NmsMethod::Hard] {
        check_served(
            &format!("perclass_{method}_0.4"),
            postprocess_per_class,
            &serving(method, 0.4),
        );
    }
}

/// Source: `golden.json`, `combined`.
#[test]
fn combined_detections_equal_the_reference() {
    check_served("combined", postprocess_combined, &NmsConfigs::default());
}

#[test]
fn evaluation_without_the_inclusive_convention_is_the_per_class_path() {
    let config = NmsConfigs {
        pyfunc: false,
        ..serving(NmsMethod::Hard, 0.4)
    };
    assert_eq!(
        detections(postprocess_evaluation, &config),
        detections(postprocess_per_class, &config)
    );
}

#[test]
fn a_served_path_refuses_the_methods_it_does_not_know() {
    let (outputs, anchors) = (outputs(), square_anchors(128));
    let refused = postprocess_global(&outputs, 0, &anchors, &serving(NmsMethod::Diou, 0.4), 1.0);
    assert_eq!(
        refused,
        Err(DetectError::Method {
            path: "global",
            method: NmsMethod::Diou
        })
    );
}

/// Source: `golden.json`, `tiny_*`.
#[test]
fn suppression_of_five_boxes_equals_the_reference() {
    let rows: [[f32; 5]; 5] = [
        [0.0, 0.0, 10.0, 10.0, 0.9],
        [1.0, 1.0, 11.0, 11.0, 0.8],
        [0.0, 0.0, 10.0, 10.0, 0.7],
        [20.0, 20.0, 30.0, 30.0, 0.6],
        [2.0, 2.0, 9.0, 9.0, 0.0009],
    ];
    let boxes = rows.map(|[x1, y1, x2, y2, score]| ScoredBox {
        box_yxyx_px: [y1, x1, y2, x2],
        score,
    });
    for method in [
        NmsMethod::Gaussian,
        NmsMethod::Linear,
        NmsMethod::Hard,
        NmsMethod::Diou,
    ] {
        let config = NmsConfigs {
            method,
            ..NmsConfigs::default()
        };
        let kept = suppress_inclusive(&boxes, &config, 100);
        let golden = array(golden(&format!("tiny_{method}")));
        assert_eq!(kept.len(), golden.len(), "{method}");
        for (kept, want) in kept.iter().zip(golden) {
            let want = numbers(want);
            let row = rows[kept.index].map(f64::from);
            assert_eq!(row[..4], want[..4], "{method}");
            check_score("tiny", kept.score, want[4]);
        }
    }
}

/// Source: `golden.json`, `wbf`.
#[test]
fn fused_boxes_of_three_models_equal_the_reference() {
    let rows: [[f32; 6]; 5] = [
        [10.0, 10.0, 50.0, 50.0, 0.9, 1.0],
        [12.0, 11.0, 52.0, 51.0, 0.6, 1.0],
        [100.0, 100.0, 140.0, 150.0, 0.5, 1.0],
        [11.0, 10.0, 49.0, 50.0, 0.7, 2.0],
        [10.0, 12.0, 51.0, 50.0, 0.3, 1.0],
    ];
    let detections = rows.map(|[x1, y1, x2, y2, score, class]| Detection {
        box_yxyx_px: [y1, x1, y2, x2],
        score,
        class: ClassIndex(class as u32),
    });
    let fused = wbf::fuse(&detections, 3);
    let golden = array(golden("wbf"));
    assert_eq!(fused.len(), golden.len());
    for (fused, want) in fused.iter().zip(golden) {
        let want = numbers(want);
        check_box("wbf", fused.box_yxyx_px, &[want[2], want[1], want[4], want[3]]);
        check_score("wbf", fused.score, want[5]);
        assert_eq!(f64::from(fused.class.0), want[6]);
    }
}
