//! Chroma to the resolution of luma, and YCbCr to RGB.

use std::ops::Range;

use super::scan::Plane;

/// Chroma of the pixels `columns` of row `y`, from the even column at or before the first one on.
///
/// The triangle filter: each sample is 3/4 of the nearest and 1/4 of the next nearest one, down first, rounded, then across. Beyond
/// the plane its edge goes on.
pub(super) fn upsample_row(
    plane: &Plane,
    y: usize,
    rows_too: bool,
    columns: &Range<usize>,
    filtered: &mut Vec<u8>,
    out: &mut Vec<u8>,
) {
    let (width, height) = plane.extent();
    let (first, last) = (columns.start / 2, (columns.end - 1) / 2);
    // With one neighbour on each side.
    let count = last + 1 - first;
    filtered.resize(count + 2, 0);
    let held = plane.first_column();
    let (low, high) = (first.saturating_sub(1), (last + 2).min(width));
    let part = low - held..high - held;
    let inner = &mut filtered[usize::from(first == 0)..][..part.len()];
    if rows_too {
        let near = y / 2;
        let far = match y % 2 {
            0 => near.saturating_sub(1),
            _ => (near + 1).min(height - 1),
        };
        let (near, far) = (&plane.row(near)[part.clone()], &plane.row(far)[part]);
        for ((out, &near), &far) in inner.iter_mut().zip(near).zip(far) {
            *out = blend(near, far);
        }
    } else {
        inner.copy_from_slice(&plane.row(y)[part]);
    }
    if first == 0 {
        filtered[0] = filtered[1];
    }
    if last + 1 == width {
        filtered[count + 1] = filtered[count];
    }
    out.resize(2 * count, 0);
    let (before, here, behind) = (&filtered[..count], &filtered[1..=count], &filtered[2..]);
    for (((out, &before), &here), &behind) in (out.as_chunks_mut::<2>().0.iter_mut())
        .zip(before)
        .zip(here)
        .zip(behind)
    {
        *out = [blend(here, before), blend(here, behind)];
    }
}

#[inline(always)]
fn blend(near: u8, far: u8) -> u8 {
    ((3 * u16::from(near) + u16::from(far) + 2) >> 2) as u8
}

/// BT.601 with full range in 14 bits, rounded down at halves; the constants are those of the full decoder.
pub(super) fn to_rgb(luma: &[u8], blue: &[u8], red: &[u8], rgb: [&mut [u8]; 3]) {
    const HALF: i32 = (1 << 13) - 1;
    let count = luma.len();
    let [r, g, b] = rgb.map(|colour| &mut colour[..count]);
    let (blue, red) = (&blue[..count], &red[..count]);
    let clamp = |value: i16| value.clamp(0, 255) as u8;
    for index in 0..count {
        let y = i16::from(luma[index]);
        let (cb, cr) = (
            i32::from(i16::from(blue[index]) - 128),
            i32::from(i16::from(red[index]) - 128),
        );
        // y·2¹⁴ has no bits below the shift, so it is added behind it.
        r[index] = clamp(y + ((cr * 22970 + HALF) >> 14) as i16);
        g[index] = clamp(y + ((cr * -11700 + cb * -5638 + HALF) >> 14) as i16);
        b[index] = clamp(y + ((cb * 29032 + HALF) >> 14) as i16);
    }
}
