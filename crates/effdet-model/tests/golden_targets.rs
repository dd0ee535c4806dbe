//! Anchors, assignment and losses against numbers produced by running the reference (TensorFlow 2.8.4, CPU, float32).

mod golden;

use effdet_model::anchors::{AnchorConfig, Anchors};
use effdet_model::assign::{Assigner, assign_plainly};
use effdet_model::engine::Targets;
use effdet_model::hparams::{HParams, IouLossKind};
use effdet_model::loss::focal::Focal;
use effdet_model::loss::{HeadSlices, LossConfig, detection_loss, iou};
use golden::{array, close, number, numbers, section, square_anchors};
use serde_json::Value;

fn check_anchors(key: &str, side: usize) {
    let golden = &section("network_and_training")[key];
    let anchors = square_anchors(side);
    assert_eq!(anchors.len() as f64, number(&golden["n"]));
    // The file holds f32 values; its reader may be off by the last digit of an f64.
    let want_row = |value: &Value| numbers(value).iter().map(|&x| x as f32).collect::<Vec<f32>>();
    for (index, want) in array(&golden["first9"]).iter().enumerate() {
        assert_eq!(
            anchors.boxes_yxyx_px[index].to_vec(),
            want_row(want),
            "anchor {index}"
        );
    }
    assert_eq!(
        anchors.boxes_yxyx_px[anchors.len() - 1].to_vec(),
        want_row(&golden["last"])
    );
    if let Some(want) = golden.get("row9") {
        assert_eq!(anchors.boxes_yxyx_px[9].to_vec(), want_row(want));
    }
    let sum: f64 = anchors
        .boxes_yxyx_px
        .iter()
        .flatten()
        .map(|&x| f64::from(x))
        .sum();
    assert!(close("sum", sum, number(&golden["sum"]), 1e-9));
}

/// Source: `golden.json`, `network_and_training.anchors128`.
#[test]
fn anchors_of_128_pixels_equal_the_reference() {
    check_anchors("anchors128", 128);
}

/// Source: `golden.json`, `network_and_training.anchors512`.
#[test]
fn anchors_of_512_pixels_equal_the_reference() {
    check_anchors("anchors512", 512);
}

/// The boxes and class indices of the four images of `golden.json`, `network_and_training.labels`.
fn labelled_images() -> [(Vec<[f32; 4]>, Vec<i32>); 4] {
    [
        (
            vec![
                [10.0, 20.0, 60.0, 90.0],
                [5.5, 3.25, 20.0, 25.0],
                [64.0, 64.0, 127.0, 127.0],
                [100.0, 2.0, 104.0, 6.0],
            ],
            vec![0, 17, 89, 2],
        ),
        (
            vec![[0.0, 0.0, 127.0, 127.0], [30.0, 30.0, 62.0, 62.0]],
            vec![6, 43],
        ),
        (vec![], vec![]),
        (
            vec![
                [16.0, 32.0, 48.0, 64.0],
                [16.0, 32.0, 48.0, 64.0],
                [70.0, 10.0, 73.0, 120.0],
            ],
            vec![1, 4, 60],
        ),
    ]
}

fn targets_of(anchors: &Anchors, image: usize, plainly: bool) -> (usize, Vec<i32>, Vec<f32>) {
    let (boxes, classes) = &labelled_images()[image];
    let (mut class_targets, mut box_targets) = (vec![0; anchors.len()], vec![0.0; 4 * anchors.len()]);
    let positives = if plainly {
        assign_plainly(anchors, boxes, classes, &mut class_targets, &mut box_targets)
    } else {
        Assigner::new(anchors).assign(boxes, classes, &mut class_targets, &mut box_targets)
    };
    (positives, class_targets, box_targets)
}

/// Source: `golden.json`, `network_and_training.labels`.
#[test]
fn targets_of_four_images_equal_the_reference() {
    let golden = &section("network_and_training")["labels"];
    let anchors = square_anchors(128);
    for plainly in [false, true] {
        for image in 0..4 {
            let (positives, classes, codes) = targets_of(&anchors, image, plainly);
            assert_eq!(positives as f64, number(&golden["num_positives"][image]));
            let histogram = golden["cls_hist"][image].as_object().unwrap();
            for (class, count) in histogram {
                let class: i32 = class.parse().unwrap();
                let got = classes.iter().filter(|&&c| c == class).count();
                assert_eq!(got as f64, number(count), "image {image}, class {class}");
            }
            for (index, level) in anchors.levels.iter().enumerate() {
                let positives = classes[level.range.clone()].iter().filter(|&&c| c >= 0).count();
                assert_eq!(
                    positives as f64,
                    number(&golden["cls_pos_per_level"][image][index])
                );
                let codes = &codes[4 * level.range.start..4 * level.range.end];
                let sum: f64 = codes.iter().map(|&code| f64::from(code)).sum();
                let abs: f64 = codes.iter().map(|&code| f64::from(code).abs()).sum();
                let want = (
                    number(&golden["box_sum"][image][index]),
                    number(&golden["box_abs"][image][index]),
                );
                assert!(
                    close("box_sum", sum, want.0, 2e-6),
                    "image {image}, level {index}"
                );
                assert!(
                    close("box_abs", abs, want.1, 2e-6),
                    "image {image}, level {index}"
                );
            }
        }
    }
}

/// Source: `golden.json`, `network_and_training.labels.img0_positives`. Holds the forced match of `[100, 2, 104, 6]`, a tie in
/// exact arithmetic.
#[test]
fn every_positive_anchor_of_the_first_image_equals_the_reference() {
    let golden = &section("network_and_training")["labels"]["img0_positives"];
    let (_, classes, codes) = targets_of(&square_anchors(128), 0, false);
    let positives: Vec<usize> = (0..classes.len())
        .filter(|&anchor| classes[anchor] >= 0)
        .collect();
    let rows: Vec<Vec<f64>> = array(golden).iter().map(numbers).collect();
    let rows = &rows[..];
    assert!(!rows.is_empty());
    for row in rows {
        let anchor = row[0] as usize;
        assert!(positives.contains(&anchor), "anchor {anchor}");
        assert_eq!(f64::from(classes[anchor]), row[1], "class of anchor {anchor}");
        for (coordinate, &want) in row[2..].iter().enumerate() {
            let got = f64::from(codes[4 * anchor + coordinate]);
            assert!(
                close("code", got, want, 5e-7),
                "anchor {anchor}, coordinate {coordinate}"
            );
        }
    }
    assert_eq!(rows.len(), positives.len());
}

fn seed_losses() -> LossConfig {
    LossConfig::from(&HParams::preset("efficientdet-d0").unwrap())
}

/// Source: `golden.json`, `focal_y0` and `focal_y1`. Where the reference overflows (null gradient), the "plain" form holds.
#[test]
fn focal_losses_and_gradients_equal_the_reference_where_it_does_not_overflow() {
    let focal = Focal::from(&seed_losses());
    for (key, positive) in [("focal_y0", false), ("focal_y1", true)] {
        let golden = &section("preprocess_losses_postprocess")[key];
        for (index, logit) in numbers(&golden["x"]).into_iter().enumerate() {
            let term = focal.evaluate(logit, positive);
            match golden["grad"][index].as_f64() {
                Some(gradient) => {
                    let relative = |got: f64, want: f64| (got / want - 1.0).abs() < 2e-5;
                    let want = number(&golden["stable"][index]);
                    assert!(relative(term.value, want), "{key} {logit}: {} {want}", term.value);
                    assert!(
                        relative(term.gradient, gradient),
                        "{key} {logit}: {} {gradient}",
                        term.gradient
                    );
                }
                None => assert!(close(key, term.value, number(&golden["plain"][index]), 1e-6)),
            }
        }
    }
}

/// Source: `golden.json`, `focal_ls0.1`: label smoothing 0.1.
#[test]
fn smoothed_focal_losses_equal_the_reference() {
    let focal = Focal {
        label_smoothing: 0.1,
        ..Focal::from(&seed_losses())
    };
    let golden = &section("preprocess_losses_postprocess");
    for (key, positive) in [("0", false), ("1", true)] {
        let values = numbers(&golden["focal_ls0.1"][key]);
        // The first logit, −100, overflows in the reference.
        for (&logit, want) in numbers(&golden["focal_y0"]["x"]).iter().zip(values).skip(1) {
            let got = focal.evaluate(logit, positive).value;
            assert!((got / want - 1.0).abs() < 2e-5, "{logit}: {got} {want}");
        }
    }
}

/// Source: `golden.json`, `huber`.
#[test]
fn the_masked_huber_loss_equals_the_reference() {
    let golden = &section("preprocess_losses_postprocess")["huber"];
    let floats = |value: &Value| {
        numbers(&array(value)[0])
            .iter()
            .map(|&x| x as f32)
            .collect::<Vec<f32>>()
    };
    let (box_targets, box_codes) = (floats(&golden["t"]), floats(&golden["p"]));
    let config = AnchorConfig::from(&HParams::preset("efficientdet-d0").unwrap());
    let one = AnchorConfig {
        image_height: 1,
        image_width: 1,
        max_level: 3,
        num_scales: 1,
        aspect_ratios: config.aspect_ratios[..1].to_vec(),
        ..config
    };
    let heads = HeadSlices {
        class_logits: &[-9.0],
        box_codes: &box_codes,
        num_classes: 1,
    };
    let normalizer = number(&golden["npos"]) as f32;
    let targets = Targets {
        class_targets: &[0],
        box_targets: &box_targets,
        normalizer,
    };
    let losses = detection_loss(
        &seed_losses(),
        &Anchors::new(&one).unwrap(),
        &heads,
        &targets,
        None,
    )
    .unwrap();
    assert!(close(
        "huber",
        f64::from(losses.box_loss),
        number(&golden["loss"]),
        1e-8
    ));
}

/// Source: `golden.json`, `iou` and `iou_in`.
#[test]
fn iou_losses_equal_the_reference() {
    let golden = section("preprocess_losses_postprocess");
    let boxes = |key: &str| -> Vec<[f64; 4]> {
        array(&golden["iou_in"][key])
            .iter()
            .map(|b| numbers(b).try_into().unwrap())
            .collect()
    };
    let (predicted, target) = (boxes("pred"), boxes("target"));
    for (key, kind) in [
        ("iou", IouLossKind::Iou),
        ("giou", IouLossKind::Giou),
        ("diou", IouLossKind::Diou),
        ("ciou", IouLossKind::Ciou),
    ] {
        for (index, want) in numbers(&golden["iou"][key]).into_iter().enumerate() {
            let got = iou::loss(kind, predicted[index], target[index]).value;
            assert!(close(key, got, want, 5e-7), "box {index}");
        }
    }
}
