//! What must hold for any input, and the edges of the definition.

use effdet_metrics::{
    AreaRange, CocoSummary, Dataset, DetectionRow, EvalOptions, GroundTruth, ImageSet, MetricsError, Warning,
    evaluate,
};
use proptest::prelude::*;

fn object(id: i64, image_id: i64, bbox_xywh_px: [f64; 4]) -> GroundTruth {
    GroundTruth {
        id,
        image_id,
        category_id: 1,
        bbox_xywh_px,
        area: bbox_xywh_px[2] * bbox_xywh_px[3],
        iscrowd: false,
        ignore: false,
    }
}

fn detection(image_id: i64, bbox_xywh_px: [f64; 4], score: f64) -> DetectionRow {
    DetectionRow {
        image_id,
        category_id: 1,
        bbox_xywh_px,
        score,
    }
}

fn run(image_ids: &[i64], ground_truth: &[GroundTruth], detections: &[DetectionRow]) -> CocoSummary {
    let dataset = Dataset {
        image_ids,
        category_ids: &[1, 2, 3],
        ground_truth,
    };
    evaluate(&dataset, detections, &EvalOptions::default()).unwrap()
}

/// Up to the machine epsilon that pycocotools adds to the denominator of precision.
#[track_caller]
fn assert_close(actual: f64, expected: f64) {
    assert!(
        (actual - expected).abs() < 1e-12,
        "{actual} instead of {expected}"
    );
}

const BOX: [f64; 4] = [10.0, 20.0, 50.0, 50.0];
const FAR: [f64; 4] = [300.0, 300.0, 50.0, 50.0];

#[test]
fn nothing_at_all_is_minus_one_everywhere() {
    let dataset = Dataset {
        image_ids: &[],
        category_ids: &[],
        ground_truth: &[],
    };
    let summary = evaluate(&dataset, &[], &EvalOptions::default()).unwrap();
    assert_eq!(summary.stats, [-1.0; 12]);
    assert!(summary.per_class.is_empty());
    assert_eq!(summary.precision_curve(0, AreaRange::All, 0), None);
}

#[test]
fn detections_without_objects_are_minus_one() {
    let summary = run(&[1], &[], &[detection(1, BOX, 0.9)]);
    assert_eq!(summary.stats, [-1.0; 12]);
    assert_eq!(summary.per_class[0].num_objects, 0);
}

#[test]
fn objects_without_detections_are_zero() {
    let summary = run(&[1], &[object(1, 1, BOX)], &[]);
    assert_eq!((summary.ap(), summary.stats[8]), (0.0, 0.0));
    // A medium object says nothing about small and large ones.
    assert_eq!(
        (summary.stats[3], summary.stats[4], summary.stats[5]),
        (-1.0, 0.0, -1.0)
    );
}

#[test]
fn an_object_on_an_image_without_detections_is_missed_unless_only_detected_images_count() {
    let truth = [object(1, 1, BOX), object(2, 2, BOX)];
    let dataset = Dataset {
        image_ids: &[1, 2],
        category_ids: &[1],
        ground_truth: &truth,
    };
    let rows = [detection(1, BOX, 0.9)];
    let evaluated = |images| evaluate(&dataset, &rows, &EvalOptions { images }).unwrap();
    assert_eq!(evaluated(ImageSet::All).stats[8], 0.5);
    let only = evaluated(ImageSet::OnlyWithDetections);
    assert_close(only.ap(), 1.0);
    assert_eq!(only.stats[8], 1.0);
}

#[test]
fn a_padding_row_makes_its_image_count() {
    let truth = [object(1, 1, BOX), object(2, 2, BOX)];
    let dataset = Dataset {
        image_ids: &[1, 2],
        category_ids: &[1],
        ground_truth: &truth,
    };
    let mut padding = detection(2, [0.0; 4], -1e5);
    padding.category_id = 0;
    let options = EvalOptions {
        images: ImageSet::OnlyWithDetections,
    };
    let summary = evaluate(&dataset, &[detection(1, BOX, 0.9), padding], &options).unwrap();
    assert_eq!(summary.stats[8], 0.5);
    assert_eq!(
        summary.warnings,
        [Warning::DetectionsOfUnknownCategory { count: 1 }]
    );
}

#[test]
fn the_second_detection_of_an_object_is_a_mistake() {
    let truth = [object(1, 1, BOX), object(2, 1, FAR)];
    let rows = [
        detection(1, BOX, 0.9),
        detection(1, BOX, 0.8),
        detection(1, FAR, 0.7),
    ];
    let summary = run(&[1], &truth, &rows);
    let curve = summary.precision_curve(0, AreaRange::All, 0).unwrap();
    assert_close(curve[50], 1.0);
    assert_close(curve[51], 2.0 / 3.0);
    assert_eq!(
        summary.score_curve(0, AreaRange::All, 0).unwrap()[51..],
        [0.7; 50]
    );
}

#[test]
fn any_number_of_detections_inside_a_crowd_are_ignored() {
    let crowd = GroundTruth {
        iscrowd: true,
        ..object(1, 1, [0.0, 0.0, 400.0, 400.0])
    };
    let truth = [crowd, object(2, 1, [500.0, 0.0, 50.0, 50.0])];
    let rows = [
        detection(1, BOX, 0.9),
        detection(1, BOX, 0.8),
        detection(1, [500.0, 0.0, 50.0, 50.0], 0.1),
    ];
    let summary = run(&[1], &truth, &rows);
    assert_close(summary.ap(), 1.0);
    assert_eq!(summary.per_class[0].num_objects, 1);
}

#[test]
fn an_ignored_object_absorbs_one_detection_only() {
    let difficult = GroundTruth {
        ignore: true,
        ..object(1, 1, BOX)
    };
    let truth = [difficult, object(2, 1, FAR)];
    let once = run(&[1], &truth, &[detection(1, BOX, 0.9), detection(1, FAR, 0.8)]);
    assert_close(once.ap(), 1.0);
    let twice = [
        detection(1, BOX, 0.9),
        detection(1, BOX, 0.85),
        detection(1, FAR, 0.8),
    ];
    assert_close(run(&[1], &truth, &twice).ap(), 0.5);
}

#[test]
fn equal_scores_rank_by_image_id_and_then_as_given() {
    let truth = [object(1, 5, BOX)];
    let hit = detection(5, BOX, 0.5);
    let ap50 = |rows: &[DetectionRow]| run(&[9, 5], &truth, rows).ap50();
    assert_close(ap50(&[detection(9, FAR, 0.5), hit]), 1.0);
    assert_close(ap50(&[hit, detection(5, FAR, 0.5)]), 1.0);
    assert_close(ap50(&[detection(5, FAR, 0.5), hit]), 0.5);
}

#[test]
fn only_the_first_hundred_detections_of_a_class_and_image_count() {
    let mut rows = vec![detection(1, FAR, 0.9); 100];
    rows.push(detection(1, BOX, 0.1));
    let truth = [object(1, 1, BOX)];
    assert_eq!(run(&[1], &truth, &rows).stats[8], 0.0);
    assert_eq!(run(&[1], &truth, &rows[1..]).stats[8], 1.0);
}

#[test]
fn recall_within_one_and_ten_detections_looks_at_the_first_ones() {
    let truth = [object(1, 1, BOX)];
    let mut rows = vec![detection(1, FAR, 0.9); 9];
    rows.push(detection(1, BOX, 0.1));
    let summary = run(&[1], &truth, &rows);
    assert_eq!(summary.stats[6..9], [0.0, 1.0, 1.0]);
}

#[test]
fn numbers_that_are_not_finite_are_refused_by_name() {
    let dataset = Dataset {
        image_ids: &[1],
        category_ids: &[1],
        ground_truth: &[],
    };
    let refused =
        |row| evaluate(&dataset, &[detection(1, BOX, 0.5), row], &EvalOptions::default()).unwrap_err();
    let error = refused(detection(1, BOX, f64::NAN));
    assert!(matches!(
        error,
        MetricsError::DetectionNotFinite {
            index: 1,
            field: "score",
            ..
        }
    ));
    assert!(error.to_string().contains("score = NaN"), "{error}");
    assert!(matches!(
        refused(detection(1, [0.0, 0.0, f64::INFINITY, 1.0], 0.5)),
        MetricsError::DetectionNotFinite {
            field: "bbox_xywh_px",
            ..
        }
    ));
    let truth = [GroundTruth {
        area: f64::NAN,
        ..object(4, 1, BOX)
    }];
    let dataset = Dataset {
        ground_truth: &truth,
        ..dataset
    };
    assert!(matches!(
        evaluate(&dataset, &[], &EvalOptions::default()),
        Err(MetricsError::GroundTruthNotFinite {
            id: 4,
            field: "area",
            ..
        })
    ));
}

#[test]
fn a_detection_on_an_unknown_image_is_refused() {
    let dataset = Dataset {
        image_ids: &[1],
        category_ids: &[1],
        ground_truth: &[],
    };
    assert_eq!(
        evaluate(&dataset, &[detection(2, BOX, 0.5)], &EvalOptions::default()),
        Err(MetricsError::UnknownImage {
            index: 0,
            image_id: 2
        })
    );
}

#[test]
fn annotations_that_cannot_count_are_reported() {
    let truth = [object(0, 1, BOX), object(1, 8, BOX)];
    let summary = run(&[1], &truth, &[detection(1, BOX, 0.5)]);
    assert_eq!(summary.ap(), 0.0);
    assert_eq!(
        summary.warnings,
        [
            Warning::AnnotationIdZero { count: 1 },
            Warning::GroundTruthOutside { count: 1 }
        ]
    );
}

#[test]
fn the_table_is_the_one_pycocotools_prints() {
    let table = run(&[1], &[object(1, 1, BOX)], &[detection(1, BOX, 0.9)]).table();
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 12);
    assert_eq!(
        lines[0],
        " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 1.000"
    );
    assert_eq!(
        lines[2],
        " Average Precision  (AP) @[ IoU=0.75      | area=   all | maxDets=100 ] = 1.000"
    );
    assert_eq!(
        lines[6],
        " Average Recall     (AR) @[ IoU=0.50:0.95 | area=   all | maxDets=  1 ] = 1.000"
    );
    assert_eq!(
        lines[9],
        " Average Recall     (AR) @[ IoU=0.50:0.95 | area= small | maxDets=100 ] = -1.000"
    );
}

/// Boxes on a coarse grid, so that scores tie and IoUs tie often.
fn coarse_box() -> impl Strategy<Value = [f64; 4]> {
    (0..8u32, 0..8u32, 1..6u32, 1..6u32).prop_map(|(x, y, w, h)| [x, y, w, h].map(|v| f64::from(v) * 16.0))
}

fn fine_box() -> impl Strategy<Value = [f64; 4]> {
    (0.0..200.0f64, 0.0..200.0f64, 5.0..150.0f64, 5.0..150.0f64).prop_map(|(x, y, w, h)| [x, y, w, h])
}

fn truth(boxes: impl Strategy<Value = [f64; 4]>) -> impl Strategy<Value = Vec<GroundTruth>> {
    let row = (0..5i64, 1..4i64, boxes, prop::bool::weighted(0.1));
    prop::collection::vec(row, 0..25).prop_map(|rows| {
        rows.into_iter()
            .enumerate()
            .map(|(i, (image, category_id, bbox, iscrowd))| GroundTruth {
                category_id,
                iscrowd,
                ..object(i as i64 + 1, image, bbox)
            })
            .collect()
    })
}

fn rows(boxes: impl Strategy<Value = [f64; 4]>) -> impl Strategy<Value = Vec<DetectionRow>> {
    let row = (0..5i64, 1..4i64, boxes, 0..10u32);
    prop::collection::vec(row, 0..60).prop_map(|rows| {
        rows.into_iter()
            .map(|(image, category_id, bbox, score)| DetectionRow {
                category_id,
                ..detection(image, bbox, f64::from(score) / 10.0)
            })
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_order_of_images_changes_nothing(
        truth in truth(coarse_box()), rows in rows(coarse_box()), images in Just(vec![0i64, 1, 2, 3, 4]).prop_shuffle()
    ) {
        // Rows of one image stay in their order; whole images move.
        let place = |image: i64| images.iter().position(|&other| other == image);
        let (mut moved_truth, mut moved_rows) = (truth.clone(), rows.clone());
        moved_truth.sort_by_key(|object| place(object.image_id));
        moved_rows.sort_by_key(|row| place(row.image_id));
        prop_assert_eq!(run(&images, &moved_truth, &moved_rows), run(&[0, 1, 2, 3, 4], &truth, &rows));
    }

    #[test]
    fn the_order_of_annotations_changes_nothing_where_no_overlap_is_equal(
        (truth, shuffled) in truth(fine_box()).prop_flat_map(|t| (Just(t.clone()), Just(t).prop_shuffle())),
        rows in rows(fine_box())
    ) {
        let images = [0, 1, 2, 3, 4];
        prop_assert_eq!(run(&images, &shuffled, &rows), run(&images, &truth, &rows));
    }

    #[test]
    fn every_number_is_minus_one_or_within_zero_and_one(truth in truth(coarse_box()), rows in rows(coarse_box())) {
        let summary = run(&[0, 1, 2, 3, 4], &truth, &rows);
        for (name, value) in summary.named() {
            prop_assert!(value == -1.0 || (0.0..=1.0).contains(&value), "{} = {}", name, value);
        }
    }

    #[test]
    fn perfect_detections_have_an_average_precision_of_one(truth in truth(fine_box())) {
        let rows: Vec<DetectionRow> = truth
            .iter()
            .filter(|object| !object.iscrowd)
            .map(|object| DetectionRow { category_id: object.category_id, ..detection(object.image_id, object.bbox_xywh_px, 0.5) })
            .collect();
        let summary = run(&[0, 1, 2, 3, 4], &truth, &rows);
        let expected = if rows.is_empty() { -1.0 } else { 1.0 };
        prop_assert!((summary.ap() - expected).abs() < 1e-12, "AP {}", summary.ap());
    }
}
