//! Boxes: coding against anchors and overlap.
//!
//! A box is `[ymin, xmin, ymax, xmax]` in pixels. Everything here is plain f32 in a stated operation order without fused
//! multiply-add, because ties between anchors are decided by rounding.
//!
//! Source: the reference's `object_detection/{faster_rcnn_box_coder,region_similarity_calculator}.py`, `model/anchors.py`.

/// Smallest side that [`encode`] divides by or takes a logarithm of.
const MIN_SIDE: f32 = 1e-8;

/// Encodes a box against an anchor as `[ty, tx, th, tw]`.
///
/// ```text
/// ty = (yc_box − yc_anchor) / h_anchor      th = ln(h_box / h_anchor)
/// tx = (xc_box − xc_anchor) / w_anchor      tw = ln(w_box / w_anchor)
/// ```
///
/// Sides below 1e-8 count as 1e-8 in the divisions and logarithms. There are no variances.
pub fn encode(box_yxyx_px: [f32; 4], anchor_yxyx_px: [f32; 4]) -> [f32; 4] {
    let (yc, xc, h, w) = centre_and_size(box_yxyx_px);
    let (yc_a, xc_a, h_a, w_a) = centre_and_size(anchor_yxyx_px);
    let (h, w) = (h.max(MIN_SIDE), w.max(MIN_SIDE));
    let (h_a, w_a) = (h_a.max(MIN_SIDE), w_a.max(MIN_SIDE));
    [(yc - yc_a) / h_a, (xc - xc_a) / w_a, ln(h / h_a), ln(w / w_a)]
}

/// Decodes `[ty, tx, th, tw]` against an anchor; the inverse of [`encode`].
///
/// ```text
/// yc = ty·h_anchor + yc_anchor      h = exp(th)·h_anchor      (x likewise)
/// ```
///
/// `th` and `tw` are not clamped, so large ones give infinite boxes.
pub fn decode(code: [f32; 4], anchor_yxyx_px: [f32; 4]) -> [f32; 4] {
    let [ymin, xmin, ymax, xmax] = anchor_yxyx_px;
    let [ty, tx, th, tw] = code;
    let (yc_a, xc_a) = ((ymin + ymax) / 2.0, (xmin + xmax) / 2.0);
    let (h_a, w_a) = (ymax - ymin, xmax - xmin);
    let (h, w) = (exp(th) * h_a, exp(tw) * w_a);
    let (yc, xc) = (ty * h_a + yc_a, tx * w_a + xc_a);
    [yc - h / 2.0, xc - w / 2.0, yc + h / 2.0, xc + w / 2.0]
}

/// Area `(ymax − ymin)·(xmax − xmin)` in square pixels; meaningless for inverted boxes.
#[inline]
pub fn area(box_yxyx_px: [f32; 4]) -> f32 {
    let [ymin, xmin, ymax, xmax] = box_yxyx_px;
    (ymax - ymin) * (xmax - xmin)
}

/// Intersection over union, no extra pixel; exactly 0 where the boxes do not overlap.
pub fn iou(a: [f32; 4], b: [f32; 4]) -> f32 {
    iou_with_areas(a, area(a), b, area(b))
}

/// [`iou`] with the areas at hand.
///
/// The order of operations is `inter / ((area_a + area_b) − inter)`.
#[inline]
pub fn iou_with_areas(a: [f32; 4], area_a: f32, b: [f32; 4], area_b: f32) -> f32 {
    let height = least(a[2], b[2]) - greatest(a[0], b[0]);
    let width = least(a[3], b[3]) - greatest(a[1], b[1]);
    let inter = greatest(height, 0.0) * greatest(width, 0.0);
    let overlap = inter / ((area_a + area_b) - inter);
    if inter > 0.0 { overlap } else { 0.0 }
}

/// The smaller value as a single compare-and-select, which vectorises; `b` when either is NaN.
#[inline]
fn least(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

/// The greater value as a single compare-and-select; `b` when either is NaN.
#[inline]
fn greatest(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Single-precision exponential through f64, so that the result does not depend on the platform's `expf`.
#[inline]
pub(crate) fn exp(x: f32) -> f32 {
    f64::from(x).exp() as f32
}

/// Single-precision logarithm through f64, see [`exp`].
#[inline]
fn ln(x: f32) -> f32 {
    f64::from(x).ln() as f32
}

/// Centre and size; the centre from the unclamped size, as the reference computes it.
fn centre_and_size(box_yxyx_px: [f32; 4]) -> (f32, f32, f32, f32) {
    let [ymin, xmin, ymax, xmax] = box_yxyx_px;
    let (h, w) = (ymax - ymin, xmax - xmin);
    (ymin + h / 2.0, xmin + w / 2.0, h, w)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_box() -> impl Strategy<Value = [f32; 4]> {
        (
            -600.0..600.0_f32,
            -600.0..600.0_f32,
            0.5..600.0_f32,
            0.5..600.0_f32,
        )
            .prop_map(|(y, x, h, w)| [y, x, y + h, x + w])
    }

    #[test]
    fn a_box_equal_to_its_anchor_encodes_to_zero() {
        let anchor = [-12.0, -12.0, 20.0, 20.0];
        assert_eq!(encode(anchor, anchor), [0.0; 4]);
    }

    #[test]
    fn a_box_without_area_encodes_to_finite_values() {
        let code = encode([5.0, 5.0, 5.0, 9.0], [0.0, 0.0, 10.0, 10.0]);
        assert!(code.iter().all(|t| t.is_finite()), "{code:?}");
        assert_eq!(code[2], (1e-9_f64.ln()) as f32);
    }

    #[test]
    fn boxes_that_only_touch_do_not_overlap() {
        assert_eq!(iou([0.0, 0.0, 10.0, 10.0], [10.0, 0.0, 20.0, 10.0]), 0.0);
        assert_eq!(iou([3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]), 0.0);
    }

    #[test]
    fn half_a_box_has_half_the_overlap() {
        assert_eq!(iou([0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0]), 0.5);
    }

    proptest! {
        #[test]
        fn decoding_inverts_encoding(object in any_box(), anchor in any_box()) {
            let decoded = decode(encode(object, anchor), anchor);
            for (got, want) in decoded.iter().zip(object) {
                // Half a thousandth of a pixel at coordinates of a thousand pixels.
                prop_assert!((got - want).abs() < 2e-3, "{decoded:?} {object:?}");
            }
        }

        #[test]
        fn overlap_is_symmetric_and_within_zero_and_one(a in any_box(), b in any_box()) {
            prop_assert_eq!(iou(a, b), iou(b, a));
            prop_assert!((0.0..=1.0).contains(&iou(a, b)));
            prop_assert!((iou(a, a) - 1.0).abs() < 1e-6);
        }

        #[test]
        fn overlap_never_panics_and_is_zero_without_a_common_pixel(a in any::<[f32; 4]>(), b in any::<[f32; 4]>()) {
            let apart = a[2] <= b[0] || a[3] <= b[1];
            let value = iou(a, b);
            prop_assert!(!apart || value == 0.0);
        }
    }
}
