//! Record framing: u64 length | masked CRC32C of it | payload | masked CRC32C of it, all little-endian.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::error::{DataError, Result};

/// Bytes before a payload.
pub const HEADER_BYTES: u64 = 12;
/// Bytes after a payload.
pub const FOOTER_BYTES: u64 = 4;

/// CRC32C rotated right by 15 bits plus 0xa282ead8, as TensorFlow stores it.
pub fn masked_crc32c(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Whether bytes are the length of a record and its checksum.
pub(super) fn is_header(bytes: &[u8]) -> bool {
    bytes.len() == HEADER_BYTES as usize && masked_crc32c(&bytes[..8]) == le_u32(&bytes[8..])
}

/// Appends one record.
///
/// # Errors
/// What `output` reports.
pub fn write_record(output: &mut impl Write, payload: &[u8]) -> io::Result<()> {
    let length = (payload.len() as u64).to_le_bytes();
    output.write_all(&length)?;
    output.write_all(&masked_crc32c(&length).to_le_bytes())?;
    output.write_all(payload)?;
    output.write_all(&masked_crc32c(payload).to_le_bytes())
}

/// One record of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Counted from 0.
    pub index: u64,
    /// First byte of the payload in the file.
    pub payload_offset: u64,
    /// Payload.
    pub payload: Vec<u8>,
}

/// Reads the records of a file in order and checks both checksums.
#[derive(Debug)]
pub struct RecordReader<R> {
    input: R,
    file: PathBuf,
    file_bytes: u64,
    max_record_bytes: u64,
    offset: u64,
    next: u64,
    lost: bool,
}

impl<R: Read> RecordReader<R> {
    /// Reads `input`, which holds `file_bytes` bytes and is called `file` in messages.
    pub fn new(input: R, file: &Path, file_bytes: u64, max_record_bytes: u64) -> Self {
        Self {
            input,
            file: file.to_path_buf(),
            file_bytes,
            max_record_bytes,
            offset: 0,
            next: 0,
            lost: false,
        }
    }

    /// The next record; none at the end.
    ///
    /// After a damaged payload the next call reads the record behind it. After any other error the place of the next record is
    /// unknown, and there is none.
    ///
    /// # Errors
    /// [`DataError::Record`] for wrong checksums and truncation, [`DataError::TooLarge`] before a large payload is allocated,
    /// [`DataError::Io`].
    pub fn next_record(&mut self) -> Result<Option<Record>> {
        if self.lost || self.offset == self.file_bytes {
            return Ok(None);
        }
        // Only a record read to its end tells where the next one is.
        self.lost = true;
        let left = self.file_bytes - self.offset;
        if left < HEADER_BYTES {
            return Err(self.fault(format!(
                "{left} bytes are left, fewer than a header: the file was cut off, copy or convert it again"
            )));
        }
        let mut header = [0; HEADER_BYTES as usize];
        self.read(&mut header)?;
        let [length, crc] = [&header[..8], &header[8..]];
        if masked_crc32c(length) != le_u32(crc) {
            return Err(self.fault(
                "the length has a wrong checksum: the file is no TFRecord file, or damaged; copy or convert it again"
                    .into(),
            ));
        }
        let length = u64::from_le_bytes(length.try_into().expect("eight bytes"));
        let left = left - HEADER_BYTES;
        if left < FOOTER_BYTES || length > left - FOOTER_BYTES {
            return Err(self.fault(format!(
                "{length} bytes are announced but {left} are left: the file was cut off, copy or convert it again"
            )));
        }
        if length > self.max_record_bytes {
            return Err(DataError::TooLarge {
                file: format!("{}: record {}", self.file.display(), self.next),
                bytes: length,
                limit: self.max_record_bytes,
            });
        }
        let mut payload = vec![0; length as usize];
        let mut crc = [0; FOOTER_BYTES as usize];
        self.read(&mut payload)?;
        self.read(&mut crc)?;
        let record = Record {
            index: self.next,
            payload_offset: self.offset + HEADER_BYTES,
            payload,
        };
        let intact = masked_crc32c(&record.payload) == le_u32(&crc);
        let fault = (!intact).then(|| {
            self.fault(
                "the payload has a wrong checksum: the file is damaged, copy or convert it again".into(),
            )
        });
        self.offset += HEADER_BYTES + length + FOOTER_BYTES;
        self.next += 1;
        self.lost = false;
        fault.map_or(Ok(Some(record)), Err)
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.input.read_exact(buffer).map_err(|source| DataError::Io {
            file: self.file.clone(),
            source,
        })
    }

    fn fault(&self, what: String) -> DataError {
        DataError::Record {
            file: self.file.clone(),
            record: self.next,
            offset: self.offset,
            what,
        }
    }
}

fn le_u32(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes.try_into().expect("four bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn framed(payloads: &[Vec<u8>]) -> Vec<u8> {
        let mut out = Vec::new();
        for payload in payloads {
            write_record(&mut out, payload).unwrap();
        }
        out
    }

    fn reader(bytes: &[u8]) -> RecordReader<&[u8]> {
        RecordReader::new(bytes, Path::new("a.tfrecord"), bytes.len() as u64, 1 << 20)
    }

    fn read_all(bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut reader = reader(bytes);
        let mut payloads = Vec::new();
        while let Some(record) = reader.next_record()? {
            let at = record.payload_offset as usize;
            assert_eq!(bytes[at..at + record.payload.len()], record.payload);
            payloads.push(record.payload);
        }
        Ok(payloads)
    }

    /// CRC32C of RFC 3720, appendix B.4 (0x8a9136aa, 0x62a8ab43, 0x46dd794e), masked.
    #[test]
    fn checksums_equal_the_published_ones() {
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(masked_crc32c(&[0; 32]), 0x0fd7_fffa);
        assert_eq!(masked_crc32c(&[0xff; 32]), 0xf909_b029);
        assert_eq!(masked_crc32c(&ascending), 0x951f_7892);
    }

    /// The record of `tfrecordio_test.py` in Apache Beam, written there by TensorFlow.
    #[test]
    fn a_record_is_framed_as_tensorflow_frames_it() {
        let foo = [
            3, 0, 0, 0, 0, 0, 0, 0, 0xb0, 0x99, 0x49, 0x0e, b'f', b'o', b'o', 0x61, 0x8a, 0xbe, 0xfe,
        ];
        assert_eq!(framed(&[b"foo".to_vec()]), foo);
    }

    #[test]
    fn a_record_may_be_empty() {
        assert_eq!(read_all(&framed(&[vec![]])).unwrap(), [Vec::<u8>::new()]);
    }

    #[test]
    fn an_empty_file_has_no_records() {
        assert_eq!(read_all(&[]).unwrap(), Vec::<Vec<u8>>::new());
    }

    #[test]
    fn a_file_cut_at_any_byte_of_its_last_record_is_an_error_with_file_record_and_offset() {
        let bytes = framed(&[b"first".to_vec(), b"second".to_vec()]);
        let second = framed(&[b"first".to_vec()]).len();
        for len in second + 1..bytes.len() {
            let mut reader = reader(&bytes[..len]);
            assert!(reader.next_record().unwrap().is_some());
            let error = reader.next_record().unwrap_err().to_string();
            assert!(
                error.contains(&format!("a.tfrecord: record 1 at byte {second}:"))
                    && error.contains("cut off"),
                "{error}"
            );
            assert_eq!(reader.next_record().unwrap(), None);
        }
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        let bytes = framed(&[b"payload".to_vec()]);
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(read_all(&damaged).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn reading_goes_on_behind_a_damaged_payload() {
        let mut bytes = framed(&[b"first".to_vec(), b"second".to_vec()]);
        bytes[HEADER_BYTES as usize] ^= 1;
        let mut reader = reader(&bytes);
        let error = reader.next_record().unwrap_err().to_string();
        assert!(error.contains("record 0") && error.contains("payload"), "{error}");
        let record = reader.next_record().unwrap().unwrap();
        assert_eq!((record.index, record.payload), (1, b"second".to_vec()));
    }

    #[test]
    fn enormous_lengths_are_refused_before_allocation() {
        for length in [u64::MAX, u64::MAX - 15, 1 << 40] {
            let mut bytes = length.to_le_bytes().to_vec();
            bytes.extend(masked_crc32c(&length.to_le_bytes()).to_le_bytes());
            bytes.extend([0; 64]);
            assert!(matches!(read_all(&bytes), Err(DataError::Record { .. })));
            // The file itself may claim to be as long.
            let mut endless = RecordReader::new(&bytes[..], Path::new("a.tfrecord"), u64::MAX, 1 << 20);
            assert!(matches!(
                endless.next_record(),
                Err(DataError::TooLarge { .. } | DataError::Record { .. })
            ));
        }
    }

    proptest! {
        #[test]
        fn what_is_framed_reads_back(payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..8)) {
            prop_assert_eq!(read_all(&framed(&payloads)).unwrap(), payloads);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_all(&bytes);
        }
    }
}
