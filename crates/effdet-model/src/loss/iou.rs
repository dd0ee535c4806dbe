//! IoU, GIoU, DIoU and CIoU losses on boxes.
//!
//! Source: arXiv:1902.09630 (GIoU), arXiv:1911.08287 (DIoU, CIoU); the reference's `utils/iou_utils.py`.

use std::f64::consts::PI;

use crate::hparams::IouLossKind;

/// A loss of one box and its derivatives with respect to the four predicted values.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct BoxTerm {
    /// Value.
    pub value: f64,
    /// Derivatives, in the order of the prediction.
    pub gradient: [f64; 4],
}

/// `1 − similarity` of a predicted and a target box, `[ymin, xmin, ymax, xmax]`; 0 for a target without area.
///
/// ```text
/// iou  = I/U
/// giou = iou − (C − U)/C          C: area of the enclosing box
/// diou = iou − ρ²/c²              ρ: distance of the centres, c: diagonal of the enclosing box
/// ciou = diou − a·v               v = 4/π²·(atan(w/h) − atan(w_t/h_t))²,  a = v/((1 − iou) + v)
/// ```
///
/// Sides are clamped at 0 and a division by 0 gives 0. The gradient holds v constant, as the reference's does. Where a
/// coordinate equals the target's, the prediction takes the whole derivative of the minimum or maximum.
pub fn loss(kind: IouLossKind, predicted: [f64; 4], target: [f64; 4]) -> BoxTerm {
    if !(target[2] > target[0] && target[3] > target[1]) {
        return BoxTerm::default();
    }
    let v = match kind {
        IouLossKind::Ciou => aspect_term(predicted, target),
        _ => 0.0,
    };
    loss_at_fixed_aspect(kind, predicted, target, v)
}

/// [`loss`] of box codes: both are decoded with the anchor, and coordinates whose target code is exactly 0 count as 0.
pub fn coded_loss(kind: IouLossKind, code: [f32; 4], target: [f32; 4], anchor: [f32; 4]) -> BoxTerm {
    let anchor = Anchor::from(anchor);
    let mask = target.map(|coordinate| f64::from(u8::from(coordinate != 0.0)));
    let masked = |coordinates: [f64; 4]| std::array::from_fn(|i| coordinates[i] * mask[i]);
    let code = code.map(f64::from);
    let loss = loss(
        kind,
        masked(anchor.decode(code)),
        masked(anchor.decode(target.map(f64::from))),
    );
    let partials = masked(loss.gradient);
    BoxTerm {
        value: loss.value,
        gradient: anchor.code_gradient(code, partials),
    }
}

/// v, the disagreement of the aspect ratios.
fn aspect_term(predicted: [f64; 4], target: [f64; 4]) -> f64 {
    let angle = |b: [f64; 4]| {
        let (height, width) = ((b[2] - b[0]).max(0.0), (b[3] - b[1]).max(0.0));
        divide(width, height).atan()
    };
    4.0 * ((angle(predicted) - angle(target)) / PI).powi(2)
}

fn loss_at_fixed_aspect(kind: IouLossKind, p: [f64; 4], t: [f64; 4], v: f64) -> BoxTerm {
    let y = Span::new(p[0], p[2], t[0], t[2]);
    let x = Span::new(p[1], p[3], t[1], t[3]);
    let intersection = y.common * x.common;
    let union = y.own * x.own + y.target * x.target - intersection;
    let iou = divide(intersection, union);

    let mut value = iou;
    // Derivatives of the similarity by each intermediate.
    let (mut by_iou, mut by_union) = (1.0, 0.0);
    let (mut by_hull_y, mut by_hull_x) = (0.0, 0.0);
    let (mut by_centre_y, mut by_centre_x) = (0.0, 0.0);
    match kind {
        IouLossKind::Iou => {}
        IouLossKind::Giou => {
            let hull = y.hull.max(0.0) * x.hull.max(0.0);
            value -= divide(hull - union, hull);
            by_union += divide(1.0, hull);
            let by_hull = -divide(union, hull * hull);
            (by_hull_y, by_hull_x) = (by_hull * x.hull, by_hull * y.hull);
        }
        IouLossKind::Diou | IouLossKind::Ciou => {
            let distance2 = y.offset * y.offset + x.offset * x.offset;
            let diagonal2 = y.hull * y.hull + x.hull * x.hull;
            let a = divide(v, (1.0 - iou) + v);
            value -= divide(distance2, diagonal2) + a * v;
            by_iou -= a * a;
            let by_distance2 = -divide(1.0, diagonal2);
            let by_diagonal2 = divide(distance2, diagonal2 * diagonal2);
            (by_centre_y, by_centre_x) = (2.0 * y.offset * by_distance2, 2.0 * x.offset * by_distance2);
            (by_hull_y, by_hull_x) = (2.0 * y.hull * by_diagonal2, 2.0 * x.hull * by_diagonal2);
        }
    }
    by_union -= by_iou * divide(intersection, union * union);
    let by_intersection = by_iou * divide(1.0, union) - by_union;

    let [dymin, dymax] = y.gradient(
        by_union * x.own,
        by_intersection * x.common,
        by_hull_y,
        by_centre_y,
    );
    let [dxmin, dxmax] = x.gradient(
        by_union * y.own,
        by_intersection * y.common,
        by_hull_x,
        by_centre_x,
    );
    BoxTerm {
        value: 1.0 - value,
        gradient: [-dymin, -dxmin, -dymax, -dxmax],
    }
}

/// A predicted and a target interval along one axis.
struct Span {
    /// Length of the prediction, at least 0.
    own: f64,
    /// Length of the target, at least 0.
    target: f64,
    /// Length of the intersection, at least 0.
    common: f64,
    /// Length of the enclosing interval.
    hull: f64,
    /// Centre of the prediction less that of the target.
    offset: f64,
    low_is_inner: bool,
    high_is_inner: bool,
    low_is_outer: bool,
    high_is_outer: bool,
}

impl Span {
    fn new(low: f64, high: f64, target_low: f64, target_high: f64) -> Self {
        Self {
            own: (high - low).max(0.0),
            target: (target_high - target_low).max(0.0),
            common: (high.min(target_high) - low.max(target_low)).max(0.0),
            hull: high.max(target_high) - low.min(target_low),
            offset: (low + high) / 2.0 - (target_low + target_high) / 2.0,
            low_is_inner: low >= target_low,
            high_is_inner: high <= target_high,
            low_is_outer: low <= target_low,
            high_is_outer: high >= target_high,
        }
    }

    /// Derivatives by `[low, high]` from those by own length, common length, hull and centre.
    fn gradient(&self, by_own: f64, by_common: f64, by_hull: f64, by_centre: f64) -> [f64; 2] {
        let only_if = |condition: bool, value: f64| if condition { value } else { 0.0 };
        let own = only_if(self.own > 0.0, by_own);
        let common = only_if(self.common > 0.0, by_common);
        let centre = by_centre / 2.0;
        [
            centre - own - only_if(self.low_is_inner, common) - only_if(self.low_is_outer, by_hull),
            centre + own + only_if(self.high_is_inner, common) + only_if(self.high_is_outer, by_hull),
        ]
    }
}

/// An anchor as centre and size.
struct Anchor {
    centre_yx: [f64; 2],
    size_hw: [f64; 2],
}

impl From<[f32; 4]> for Anchor {
    fn from(box_yxyx_px: [f32; 4]) -> Self {
        let [ymin, xmin, ymax, xmax] = box_yxyx_px.map(f64::from);
        Self {
            centre_yx: [(ymin + ymax) / 2.0, (xmin + xmax) / 2.0],
            size_hw: [ymax - ymin, xmax - xmin],
        }
    }
}

impl Anchor {
    fn decode(&self, [ty, tx, th, tw]: [f64; 4]) -> [f64; 4] {
        let [h, w] = [th.exp() * self.size_hw[0], tw.exp() * self.size_hw[1]];
        let [yc, xc] = [
            ty * self.size_hw[0] + self.centre_yx[0],
            tx * self.size_hw[1] + self.centre_yx[1],
        ];
        [yc - h / 2.0, xc - w / 2.0, yc + h / 2.0, xc + w / 2.0]
    }

    /// Derivatives by the code from those by the decoded box.
    fn code_gradient(&self, [_, _, th, tw]: [f64; 4], [dymin, dxmin, dymax, dxmax]: [f64; 4]) -> [f64; 4] {
        let [h_a, w_a] = self.size_hw;
        [
            h_a * (dymin + dymax),
            w_a * (dxmin + dxmax),
            th.exp() * h_a * (dymax - dymin) / 2.0,
            tw.exp() * w_a * (dxmax - dxmin) / 2.0,
        ]
    }
}

fn divide(numerator: f64, denominator: f64) -> f64 {
    if denominator == 0.0 {
        0.0
    } else {
        numerator / denominator
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [IouLossKind; 4] = [
        IouLossKind::Iou,
        IouLossKind::Giou,
        IouLossKind::Diou,
        IouLossKind::Ciou,
    ];

    /// Overlapping, nested either way, apart, and sharing an edge with the target in one coordinate only.
    const PAIRS: [([f64; 4], [f64; 4]); 5] = [
        ([10.0, 10.0, 50.0, 60.0], [12.0, 8.0, 55.0, 58.0]),
        ([20.0, 20.0, 30.0, 44.0], [12.0, 8.0, 55.0, 58.0]),
        ([2.0, 3.0, 70.0, 80.0], [12.0, 8.0, 55.0, 58.0]),
        ([0.0, 0.0, 10.0, 10.0], [20.0, 23.0, 30.0, 40.0]),
        ([0.0, 0.0, 10.0, 30.0], [20.0, 5.0, 30.0, 25.0]),
    ];

    #[test]
    fn the_gradient_is_the_slope_of_the_value_at_fixed_aspect() {
        let step = 1e-5;
        for kind in KINDS {
            for (predicted, target) in PAIRS {
                let v = if kind == IouLossKind::Ciou {
                    aspect_term(predicted, target)
                } else {
                    0.0
                };
                let gradient = loss(kind, predicted, target).gradient;
                for coordinate in 0..4 {
                    let at = |offset: f64| {
                        let mut moved = predicted;
                        moved[coordinate] += offset;
                        loss_at_fixed_aspect(kind, moved, target, v).value
                    };
                    let slope = (at(step) - at(-step)) / (2.0 * step);
                    let got = gradient[coordinate];
                    assert!(
                        (got - slope).abs() < 1e-9,
                        "{kind} {predicted:?} [{coordinate}]: {got} {slope}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_gradient_by_the_code_is_the_slope_of_the_decoded_loss() {
        let anchor = Anchor::from([-12.0, -8.0, 20.0, 30.0]);
        let target = anchor.decode([0.1, -0.2, 0.3, 0.2]);
        let code = [-0.05, 0.15, 0.1, -0.3];
        let step = 1e-6;
        for kind in [IouLossKind::Iou, IouLossKind::Giou, IouLossKind::Diou] {
            let partials = loss(kind, anchor.decode(code), target).gradient;
            let gradient = anchor.code_gradient(code, partials);
            for (index, got) in gradient.iter().enumerate() {
                let at = |offset: f64| {
                    let mut moved = code;
                    moved[index] += offset;
                    loss(kind, anchor.decode(moved), target).value
                };
                let slope = (at(step) - at(-step)) / (2.0 * step);
                assert!((got - slope).abs() < 1e-8, "{kind} [{index}]: {got} {slope}");
            }
        }
    }

    #[test]
    fn a_target_code_of_zero_puts_its_coordinate_to_zero_in_both_boxes() {
        let (anchor, code) = ([0.0, 0.0, 32.0, 32.0], [0.1, 0.2, 0.1, 0.3]);
        let target = [0.2, 0.0, 0.2, 0.1];
        let decoded = |code: [f32; 4]| {
            let mut decoded = Anchor::from(anchor).decode(code.map(f64::from));
            decoded[1] = 0.0;
            decoded
        };
        let term = coded_loss(IouLossKind::Iou, code, target, anchor);
        assert_eq!(
            term.value,
            loss(IouLossKind::Iou, decoded(code), decoded(target)).value
        );
    }

    #[test]
    fn equal_boxes_have_no_loss() {
        let b = [3.0, 4.0, 20.0, 31.0];
        for kind in KINDS {
            assert!(loss(kind, b, b).value.abs() < 1e-15);
        }
    }

    #[test]
    fn a_target_without_area_has_neither_loss_nor_gradient() {
        for kind in KINDS {
            assert_eq!(loss(kind, PAIRS[0].0, [5.0, 5.0, 5.0, 9.0]), BoxTerm::default());
        }
    }
}
