//! Equality with pycocotools 2.0.11: on the stored golden case, on generated data, and on real data where it is present.

use std::fs;
use std::path::{Path, PathBuf};

use effdet_metrics::{
    AreaRange, CocoSummary, Dataset, DetectionRow, EvalOptions, GroundTruth, NUM_IOU_THRESHOLDS, evaluate,
};
use serde_json::Value;

/// Ground truth in COCO's JSON layout.
struct Truth {
    image_ids: Vec<i64>,
    category_ids: Vec<i64>,
    objects: Vec<GroundTruth>,
}

impl Truth {
    fn from_json(json: &Value) -> Self {
        let ids = |key: &str| {
            json[key]
                .as_array()
                .unwrap()
                .iter()
                .map(|row| row["id"].as_i64().unwrap())
                .collect()
        };
        let objects = json["annotations"]
            .as_array()
            .unwrap()
            .iter()
            .map(|row| GroundTruth {
                id: row["id"].as_i64().unwrap(),
                image_id: row["image_id"].as_i64().unwrap(),
                category_id: row["category_id"].as_i64().unwrap(),
                bbox_xywh_px: bbox(&row["bbox"]),
                area: row["area"].as_f64().unwrap(),
                iscrowd: row["iscrowd"]
                    .as_bool()
                    .unwrap_or_else(|| row["iscrowd"].as_i64() != Some(0)),
                ignore: false,
            })
            .collect();
        Self {
            image_ids: ids("images"),
            category_ids: ids("categories"),
            objects,
        }
    }

    fn evaluate(&self, detections: &[DetectionRow]) -> CocoSummary {
        let dataset = Dataset {
            image_ids: &self.image_ids,
            category_ids: &self.category_ids,
            ground_truth: &self.objects,
        };
        evaluate(&dataset, detections, &EvalOptions::default()).unwrap()
    }
}

fn bbox(json: &Value) -> [f64; 4] {
    std::array::from_fn(|i| json[i].as_f64().unwrap())
}

fn floats(json: &Value) -> Vec<f64> {
    json.as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_f64().unwrap())
        .collect()
}

fn read_json(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn result_rows(json: &Value) -> Vec<DetectionRow> {
    json.as_array()
        .unwrap()
        .iter()
        .map(|row| DetectionRow {
            image_id: row["image_id"].as_i64().unwrap(),
            category_id: row["category_id"].as_i64().unwrap(),
            bbox_xywh_px: bbox(&row["bbox"]),
            score: row["score"].as_f64().unwrap(),
        })
        .collect()
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn the_golden_case_equals_pycocotools() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/golden_coco.json");
    let golden = read_json(Path::new(path));
    let detections: Vec<DetectionRow> = golden["detections"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| {
            let row = floats(row);
            DetectionRow {
                image_id: row[0] as i64,
                category_id: row[6] as i64,
                bbox_xywh_px: [row[1], row[2], row[3], row[4]],
                score: row[5],
            }
        })
        .collect();
    let summary = Truth::from_json(&golden["ground_truth"]).evaluate(&detections);
    let per_class: Vec<f64> = summary.per_class.iter().map(|class| class.ap).collect();
    let difference = largest_difference(&summary.stats, &floats(&golden["result"]["stats"])).max(
        largest_difference(&per_class, &floats(&golden["result"]["per_class"])),
    );
    println!("largest difference {difference:e}");
    assert!(difference < 1e-12, "largest difference {difference:e}");
}

#[test]
fn real_data_sets_equal_pycocotools() {
    let data = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data"));
    if !data.join("cocoeval/expected.json").exists() {
        println!("skipped: ../shared/data is absent");
        return;
    }
    let expected = read_json(&data.join("cocoeval/expected.json"));
    let cases = expected["cases"].as_object().unwrap();
    assert!(!cases.is_empty());
    for (name, case) in cases {
        let truth = Truth::from_json(&read_json(&data.join(case["gt"].as_str().unwrap())));
        let detections = result_rows(&read_json(&data.join(case["dt"].as_str().unwrap())));
        let summary = truth.evaluate(&detections);
        let difference = largest_difference(&summary.stats, &floats(&case["stats"]));
        println!(
            "{name}: {} detections, AP {}, largest difference {difference:e}",
            detections.len(),
            summary.ap()
        );
        assert!(difference < 1e-12, "{name}: largest difference {difference:e}");
    }
}

/// The generator of `fixtures/generate.py`.
struct Draws(u64);

impl Draws {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    fn bbox(&mut self, grid: u64) -> [f64; 4] {
        let side = 512 / grid;
        [
            (grid * self.below(side)) as f64,
            (grid * self.below(side)) as f64,
            (grid * (1 + self.below(side / 2))) as f64,
            (grid * (1 + self.below(side / 2))) as f64,
        ]
    }

    fn near(&mut self, origin: [f64; 4], grid: u64) -> [f64; 4] {
        origin.map(|value| value + grid as f64 * (self.below(5) as f64 - 2.0))
    }
}

fn synthesize(case: &[u64], seed: u64) -> (Truth, Vec<DetectionRow>) {
    let &[images, categories, objects, detections, grid, steps, first_id] = case else {
        panic!("a case has seven numbers");
    };
    let mut draws = Draws(1_000_003 * seed + 17);
    let (mut truth, mut found) = (Vec::new(), Vec::new());
    for image in 0..images {
        let mut boxes: Vec<(u64, [f64; 4])> = Vec::new();
        for _ in 0..draws.below(objects + 1) {
            let category = 1 + draws.below(categories + 1);
            let rect = draws.bbox(grid);
            let iscrowd = draws.below(8) == 0;
            let area = rect[2] * rect[3] * (1 + draws.below(4)) as f64 / 4.0;
            truth.push(GroundTruth {
                id: (first_id as usize + truth.len()) as i64,
                image_id: image as i64,
                category_id: category as i64,
                bbox_xywh_px: rect,
                area,
                iscrowd,
                ignore: false,
            });
            boxes.push((category, rect));
        }
        for _ in 0..draws.below(detections + 1) {
            let (category, rect) = if !boxes.is_empty() && draws.below(4) > 0 {
                let (category, origin) = boxes[draws.below(boxes.len() as u64) as usize];
                (category, draws.near(origin, grid))
            } else {
                (1 + draws.below(categories + 1), draws.bbox(grid))
            };
            found.push(DetectionRow {
                image_id: image as i64,
                category_id: category as i64,
                bbox_xywh_px: rect,
                score: draws.below(steps) as f64 / steps as f64,
            });
        }
    }
    let truth = Truth {
        image_ids: (0..images as i64).rev().collect(),
        category_ids: (1..=categories as i64).collect(),
        objects: truth,
    };
    (truth, found)
}

/// Crowds, equal scores, equal IoUs, more than 100 detections, boxes of negative size, annotation id 0, classes without objects, images
/// without detections, undeclared categories. Written by `fixtures/generate.py`.
#[test]
fn generated_data_equal_pycocotools_to_the_last_bit() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/pycocotools.json");
    let rows = read_json(Path::new(path));
    for row in rows.as_array().unwrap() {
        let case: Vec<u64> = floats(&row["case"]).iter().map(|&v| v as u64).collect();
        let seed = row["seed"].as_u64().unwrap();
        let (truth, detections) = synthesize(&case, seed);
        let name = format!("case {case:?}, seed {seed}");
        assert_eq!(
            Some(truth.objects.len() as u64),
            row["objects"].as_u64(),
            "{name}"
        );
        assert_eq!(
            Some(detections.len() as u64),
            row["detections"].as_u64(),
            "{name}"
        );

        let summary = truth.evaluate(&detections);
        assert_eq!(summary.stats.to_vec(), floats(&row["stats"]), "{name}");
        let per_class: Vec<f64> = summary.per_class.iter().map(|class| class.ap).collect();
        assert_eq!(per_class, floats(&row["per_class"]), "{name}");

        let (mut precision, mut score, mut recall) = (0.0, 0.0, 0.0);
        for class in 0..summary.per_class.len() {
            for area in AreaRange::ALL {
                for t in 0..NUM_IOU_THRESHOLDS {
                    precision += summary
                        .precision_curve(class, area, t)
                        .unwrap()
                        .iter()
                        .sum::<f64>();
                    score += summary.score_curve(class, area, t).unwrap().iter().sum::<f64>();
                }
                for m in 0..3 {
                    recall += summary.recall(class, area, m).unwrap().iter().sum::<f64>();
                }
            }
        }
        for (what, sum) in [
            ("precision_sum", precision),
            ("score_sum", score),
            ("recall_sum", recall),
        ] {
            let expected = row[what].as_f64().unwrap();
            assert!((sum - expected).abs() < 1e-7, "{name}: {what} {sum} {expected}");
        }
    }
}
