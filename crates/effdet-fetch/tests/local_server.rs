//! Downloads from a server on this machine, and archives that mean no good.

use std::fs;
use std::io::{BufRead, BufReader, Cursor, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use effdet_fetch::{Checksum, FetchError, Limits, Request, fetch, unpack};
use sha2::{Digest, Sha256};

/// How a server misbehaves.
#[derive(Clone, Copy, PartialEq)]
enum Manner {
    Ranges,
    /// Hangs up after so many bytes of every answer.
    BreaksOff(usize),
    /// Knows no ranges.
    Whole,
    Answers(u16),
    /// Redirects to a file of this machine.
    RedirectsToFile,
}

struct Server {
    url: String,
    /// Ranges that were asked for.
    ranges: Arc<Mutex<Vec<Option<usize>>>>,
}

fn serve(content: Vec<u8>, manner: Manner) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/sub/data.bin", listener.local_addr().unwrap());
    let ranges = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&ranges);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut start = None;
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            while let Some(Ok(line)) = lines.next() {
                if line.is_empty() {
                    break;
                }
                let line = line.to_ascii_lowercase();
                if let Some(range) = line.strip_prefix("range: bytes=") {
                    start = Some(range.trim_end_matches('-').parse::<usize>().unwrap());
                }
            }
            log.lock().unwrap().push(start);
            let from = start.filter(|_| manner != Manner::Whole).unwrap_or(0);
            let body = content.get(from..).unwrap_or_default();
            let total = content.len();
            let head = match manner {
                Manner::Answers(status) => format!("{status} No\r\ncontent-length: 0"),
                Manner::RedirectsToFile => {
                    "302 Found\r\nlocation: file:///etc/passwd\r\ncontent-length: 0".into()
                }
                _ if from > 0 && from >= total => "416 No\r\ncontent-length: 0".into(),
                _ if from > 0 => format!(
                    "206 Partial\r\ncontent-range: bytes {from}-{}/{total}\r\ncontent-length: {}",
                    total - 1,
                    body.len()
                ),
                _ => format!("200 OK\r\ncontent-length: {total}"),
            };
            let body = match manner {
                Manner::BreaksOff(after) => &body[..body.len().min(after)],
                Manner::Answers(_) | Manner::RedirectsToFile => &[],
                _ => body,
            };
            // The client may hang up first.
            let _ = write!(stream, "HTTP/1.1 {head}\r\nconnection: close\r\n\r\n")
                .and_then(|()| stream.write_all(body));
        }
    });
    Server { url, ranges }
}

fn content() -> Vec<u8> {
    (0..300_000u32).flat_map(u32::to_le_bytes).collect()
}

fn sha256(bytes: &[u8]) -> Checksum {
    Checksum::Sha256(
        Sha256::digest(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect(),
    )
}

fn get(server: &Server, target: &Path, checksum: &Checksum, max_bytes: u64) -> Result<u64, FetchError> {
    let request = Request {
        url: &server.url,
        target,
        checksum,
        max_bytes,
        pause: Duration::from_millis(1),
    };
    fetch(&request, &mut |_, _| {}).map(|fetched| fetched.received)
}

#[test]
fn a_file_comes_whole_and_is_not_fetched_again() {
    let folder = tempfile::tempdir().unwrap();
    let (server, target) = (serve(content(), Manner::Ranges), folder.path().join("a/data.bin"));
    let checksum = sha256(&content());
    assert_eq!(get(&server, &target, &checksum, 1 << 30).unwrap(), 1_200_000);
    assert_eq!(fs::read(&target).unwrap(), content());
    assert_eq!(get(&server, &target, &checksum, 1 << 30).unwrap(), 0);
    assert_eq!(*server.ranges.lock().unwrap(), [None]);
    assert_eq!(
        fs::read_dir(target.parent().unwrap()).unwrap().count(),
        1,
        "no .part is left"
    );
}

#[test]
fn a_broken_connection_is_resumed_where_it_broke() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("data.bin");
    let server = serve(content(), Manner::BreaksOff(500_000));
    get(&server, &target, &sha256(&content()), 1 << 30).unwrap();
    assert_eq!(fs::read(&target).unwrap(), content());
    let ranges = server.ranges.lock().unwrap();
    assert_eq!(*ranges, [None, Some(500_000), Some(1_000_000)]);
}

#[test]
fn what_an_earlier_run_left_is_used_unless_it_is_of_another_file() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("data.bin");
    let part = folder.path().join("data.bin.part");
    let checksum = sha256(&content());
    fs::write(&part, &content()[..700_000]).unwrap();
    let server = serve(content(), Manner::Ranges);
    assert_eq!(get(&server, &target, &checksum, 1 << 30).unwrap(), 500_000);
    fs::remove_file(&target).unwrap();
    fs::write(&part, vec![7; 700_000]).unwrap();
    assert_eq!(
        get(&server, &target, &checksum, 1 << 30).unwrap(),
        500_000 + 1_200_000
    );
    assert_eq!(fs::read(&target).unwrap(), content());
    // A server without ranges sends everything.
    fs::remove_file(&target).unwrap();
    fs::write(&part, &content()[..700_000]).unwrap();
    let server = serve(content(), Manner::Whole);
    assert_eq!(get(&server, &target, &checksum, 1 << 30).unwrap(), 1_200_000);
    assert_eq!(fs::read(&target).unwrap(), content());
}

/// Server, checksum, most bytes, and whether the error is the right one.
type Case = (Manner, Checksum, u64, fn(&FetchError) -> bool);

#[test]
fn a_wrong_checksum_a_long_file_and_refusals_leave_nothing_under_the_name() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("data.bin");
    let right = sha256(&content());
    let cases: [Case; 6] = [
        (Manner::Ranges, Checksum::Md5("00".into()), 1 << 30, |error| {
            matches!(error, FetchError::Checksum { .. })
        }),
        (Manner::Ranges, right.clone(), 1000, |error| {
            matches!(error, FetchError::TooLarge { limit: 1000, .. })
        }),
        (Manner::Answers(404), right.clone(), 1 << 30, |error| {
            matches!(error, FetchError::Status { status: 404, .. })
        }),
        (Manner::Answers(503), right.clone(), 1 << 30, |error| {
            matches!(error, FetchError::Network { .. })
        }),
        (Manner::BreaksOff(0), right.clone(), 1 << 30, |error| {
            matches!(error, FetchError::Network { .. })
        }),
        (Manner::RedirectsToFile, right, 1 << 30, |error| {
            matches!(error, FetchError::Network { .. })
        }),
    ];
    for (manner, checksum, max_bytes, fits) in cases {
        let error = get(&serve(content(), manner), &target, &checksum, max_bytes).unwrap_err();
        assert!(fits(&error), "{error}");
        assert!(!target.exists());
    }
}

const LIMITS: Limits = Limits {
    total_bytes: 10_000,
    entries: 10,
};

fn tar(entries: &[(&str, tar::EntryType, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, kind, bytes) in entries {
        let mut header = tar::Header::new_ustar();
        // The library's own setter refuses the names that are to be tried.
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(*kind);
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        if !kind.is_file() && !kind.is_dir() {
            header.set_link_name("/etc/passwd").unwrap();
        }
        header.set_cksum();
        builder.append(&header, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

fn zip(entries: &[(&str, Option<u32>, &[u8])]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, mode, bytes) in entries {
        let mut options = zip::write::SimpleFileOptions::default();
        if let Some(mode) = mode {
            options = options.unix_permissions(*mode);
        }
        match mode {
            Some(0o120_777) => writer
                .add_symlink(*name, "/etc/passwd", zip::write::SimpleFileOptions::default())
                .unwrap(),
            _ => {
                writer.start_file(*name, options).unwrap();
                writer.write_all(bytes).unwrap();
            }
        }
    }
    writer.finish().unwrap().into_inner()
}

fn try_unpack(name: &str, bytes: &[u8]) -> (tempfile::TempDir, Result<u64, FetchError>) {
    let folder = tempfile::tempdir().unwrap();
    let archive = folder.path().join(name);
    fs::write(&archive, bytes).unwrap();
    let result = unpack(&archive, &folder.path().join("out"), &LIMITS, &mut |_| {});
    (folder, result.map(|unpacked| unpacked.files))
}

#[test]
fn archives_are_unpacked_into_their_folder() {
    use tar::EntryType;
    let tarred = tar(&[
        ("./", EntryType::dir(), b""),
        ("a/", EntryType::dir(), b""),
        ("a/b.txt", EntryType::file(), b"hello"),
        ("./c.txt", EntryType::file(), b"there"),
    ]);
    let zipped = zip(&[("a/b.txt", None, b"hello"), ("c.txt", None, b"there")]);
    for (name, bytes) in [("x.tar", tarred), ("x.zip", zipped)] {
        let (folder, result) = try_unpack(name, &bytes);
        assert_eq!(result.unwrap(), 2, "{name}");
        assert_eq!(fs::read(folder.path().join("out/a/b.txt")).unwrap(), b"hello");
    }
}

#[test]
fn archives_that_reach_out_or_swell_are_refused() {
    use tar::EntryType;
    let long = vec![0; 20_000];
    let many: Vec<(String, EntryType, &[u8])> = (0..12)
        .map(|index| (format!("{index}"), EntryType::file(), &b""[..]))
        .collect();
    let many: Vec<(&str, EntryType, &[u8])> = many
        .iter()
        .map(|(name, kind, bytes)| (name.as_str(), *kind, *bytes))
        .collect();
    let archives = [
        ("x.tar", tar(&[("../evil", EntryType::file(), b"x")])),
        ("x.tar", tar(&[("a/../../evil", EntryType::file(), b"x")])),
        ("x.tar", tar(&[("/tmp/effdet-evil", EntryType::file(), b"x")])),
        ("x.tar", tar(&[("C:evil", EntryType::file(), b"x")])),
        ("x.tar", tar(&[("link", EntryType::symlink(), b"")])),
        ("x.tar", tar(&[("link", EntryType::hard_link(), b"")])),
        ("x.tar", tar(&[("device", EntryType::character_special(), b"")])),
        ("x.tar", tar(&[("long", EntryType::file(), &long)])),
        ("x.tar", tar(&many)),
        ("x.zip", zip(&[("../evil", None, b"x")])),
        ("x.zip", zip(&[("/tmp/effdet-evil", None, b"x")])),
        ("x.zip", zip(&[("link", Some(0o120_777), b"")])),
        ("x.zip", zip(&[("long", None, &long)])),
        ("x.zip", b"no archive".to_vec()),
        ("x.rar", Vec::new()),
    ];
    for (index, (name, bytes)) in archives.into_iter().enumerate() {
        let (folder, result) = try_unpack(name, &bytes);
        assert!(result.is_err(), "archive {index}");
        let left: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert!(left.iter().all(|file| file == "out" || file == name), "{left:?}");
        assert!(!Path::new("/tmp/effdet-evil").exists());
    }
}

#[cfg(unix)]
#[test]
fn a_link_that_lies_in_the_folder_is_not_followed_out_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("out")).unwrap();
    std::os::unix::fs::symlink(outside.path(), folder.path().join("out/a")).unwrap();
    let archive = folder.path().join("x.tar");
    fs::write(&archive, tar(&[("a/b/evil", tar::EntryType::file(), b"x")])).unwrap();
    assert!(unpack(&archive, &folder.path().join("out"), &LIMITS, &mut |_| {}).is_err());
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
}
