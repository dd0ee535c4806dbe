//! NumPy `.npy` files with little-endian float32 or float64 in C order.
//!
//! Format: `\x93NUMPY`, version, header length, a Python dictionary literal as header, raw values.

use anyhow::{Context, Result, bail, ensure};

/// Reads a `.npy` file into its shape and values.
pub fn parse(bytes: &[u8]) -> Result<(Vec<usize>, Vec<f32>)> {
    let (magic, rest) = bytes
        .split_at_checked(8)
        .context("shorter than a .npy header: is the file complete?")?;
    ensure!(
        &magic[..6] == b"\x93NUMPY",
        "not a .npy file: it does not start with \\x93NUMPY"
    );
    let (header_len, rest) = match magic[6] {
        1 => {
            let (len, rest) = rest.split_first_chunk::<2>().context("header is cut off")?;
            (usize::from(u16::from_le_bytes(*len)), rest)
        }
        2 | 3 => {
            let (len, rest) = rest.split_first_chunk::<4>().context("header is cut off")?;
            (u32::from_le_bytes(*len) as usize, rest)
        }
        version => bail!("version {version} of the .npy format is unknown; save with numpy.save"),
    };
    let (header, values) = rest.split_at_checked(header_len).context("header is cut off")?;
    let header = std::str::from_utf8(header).context("header is not text")?;
    ensure!(
        header.contains("'fortran_order': False"),
        "array is in Fortran order; save numpy.ascontiguousarray(x)"
    );
    let shape_text = header
        .split_once("'shape': (")
        .and_then(|(_, rest)| rest.split_once(')'))
        .map(|(shape, _)| shape)
        .context("header has no shape")?;
    let shape = shape_text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(|part| {
            part.parse::<usize>()
                .with_context(|| format!("shape ({shape_text})"))
        })
        .collect::<Result<Vec<_>>>()?;
    let count = shape
        .iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d))
        .context("shape overflows")?;
    let width = if header.contains("'<f4'") {
        4
    } else if header.contains("'<f8'") {
        8
    } else {
        bail!("dtype is not little-endian float32 or float64; save x.astype('float32')");
    };
    let expected = count.checked_mul(width).context("shape overflows")?;
    ensure!(
        values.len() == expected,
        "{} bytes of values, shape {shape:?} needs {expected}",
        values.len()
    );
    let values = if width == 4 {
        values
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect()
    } else {
        values
            .as_chunks()
            .0
            .iter()
            .map(|b| f64::from_le_bytes(*b) as f32)
            .collect()
    };
    Ok((shape, values))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(descr: &str, shape: &str, values: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(values);
        bytes
    }

    #[test]
    fn both_float_widths_are_read() {
        let narrow: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(
            parse(&file("<f4", "(2,)", &narrow)).unwrap(),
            (vec![2], vec![1.5, -2.0])
        );
        let wide: Vec<u8> = [1.5f64, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(
            parse(&file("<f8", "(1, 2)", &wide)).unwrap(),
            (vec![1, 2], vec![1.5, -2.0])
        );
    }

    #[test]
    fn every_truncation_is_an_error_that_says_why() {
        let values: Vec<u8> = [1.0f32; 4].iter().flat_map(|v| v.to_le_bytes()).collect();
        let whole = file("<f4", "(2, 2)", &values);
        for len in 0..whole.len() {
            assert!(parse(&whole[..len]).is_err(), "{len} bytes");
        }
        assert!(parse(&whole).is_ok());
    }

    #[test]
    fn huge_shapes_and_other_dtypes_are_refused() {
        assert!(parse(&file("<f4", "(18446744073709551615, 9)", &[])).is_err());
        assert!(
            parse(&file("<i8", "(0,)", &[]))
                .unwrap_err()
                .to_string()
                .contains("float32")
        );
    }
}
