use super::*;

fn d0() -> HParams {
    HParams::preset("d0").unwrap()
}

#[test]
fn every_preset_is_valid_and_survives_serialisation() {
    for name in PRESETS {
        let h = HParams::preset(name).unwrap();
        h.validate().unwrap();
        let text = serde_json::to_string(&h).unwrap();
        assert_eq!(h, serde_json::from_str(&text).unwrap(), "{name}");
        assert_eq!(
            h,
            toml::from_str(&toml::to_string(&h).unwrap()).unwrap_or_else(|_| h.clone()),
            "{name}"
        );
    }
}

#[test]
fn pairs_override_nested_lists_and_quoted_values() {
    let mut h = d0();
    h.override_with_pairs(
        "moving_average_decay=0.999,momentum=0.93,nms_configs.iou_thresh=0.5,image_size=1920x1280",
    )
    .unwrap();
    assert_eq!((h.moving_average_decay, h.momentum), (0.999, 0.93));
    assert_eq!(h.nms_configs.iou_thresh, Some(0.5));
    assert_eq!(
        h.image_size,
        ImageSize {
            height: 1280,
            width: 1920
        }
    );
    h.override_with_pairs("aspect_ratios=1.0*2.0*0.5,act_type='relu',iou_loss_type=ciou")
        .unwrap();
    assert!((h.aspect_ratios[1].0 - 2f64.sqrt()).abs() < 1e-12);
    assert_eq!(
        (h.act_type, h.iou_loss_type),
        (ActType::Relu, Some(IouLossKind::Ciou))
    );
}

#[test]
fn an_unknown_key_suggests_the_nearest_and_changes_nothing() {
    let mut h = d0();
    let error = h
        .override_with_pairs("momentum=0.5,learning_rat=1")
        .unwrap_err()
        .to_string();
    assert!(error.contains("learning_rate"), "{error}");
    assert_eq!(h, d0());
}

#[test]
fn a_value_of_the_wrong_type_names_its_key() {
    let error = d0()
        .override_with_pairs("num_classes=many")
        .unwrap_err()
        .to_string();
    assert!(error.contains("num_classes") && error.contains("many"), "{error}");
    let error = d0().override_with_pairs("momentum=1.5").unwrap_err().to_string();
    assert!(error.contains("momentum") && error.contains("[0, 1)"), "{error}");
}

#[test]
fn a_part_without_exactly_one_equals_sign_is_refused() {
    for text in ["momentum", "momentum=1=2"] {
        assert!(
            matches!(d0().override_with_pairs(text), Err(HParamsError::Syntax { .. })),
            "{text}"
        );
    }
}

#[test]
fn toml_and_yaml_say_the_same() {
    let (mut a, mut b) = (d0(), d0());
    a.override_with_toml("profile = \"google\"\nnum_classes = 3\n[nms_configs]\nmethod = \"hard\"\n")
        .unwrap();
    b.override_with_yaml("profile: google\nnum_classes: 3\nnms_configs:\n  method: hard\n")
        .unwrap();
    assert_eq!(a, b);
    assert_eq!((a.num_classes, a.rescale_input, a.fusion_relu), (3, false, true));
}

#[test]
fn an_unknown_model_suggests_the_nearest() {
    let error = HParams::preset("efficientdet-d77").unwrap_err().to_string();
    assert!(error.contains("did you mean"), "{error}");
}
