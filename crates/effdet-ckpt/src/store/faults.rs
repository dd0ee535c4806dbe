//! Every operation of a save made to fail in turn, and the process made to die at every one.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use effdet_model::hparams::Profile;
use effdet_model::network::{Initializer, Variable, VariableKind};
use serde_json::Value;

use super::*;

/// What goes wrong at operation number `at`, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// The operation fails, those after it work.
    Fails,
    /// The process dies in the middle of it: nothing after it happens.
    Dies,
}

struct Faulty {
    fault: Fault,
    at: usize,
    count: Arc<AtomicUsize>,
}

impl Faulty {
    fn check(&self) -> io::Result<()> {
        let number = self.count.fetch_add(1, Ordering::SeqCst) + 1;
        let broken = match self.fault {
            Fault::Fails => number == self.at,
            Fault::Dies => number >= self.at,
        };
        if broken {
            Err(io::Error::from_raw_os_error(28)) // ENOSPC
        } else {
            Ok(())
        }
    }
}

impl Filesystem for Faulty {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.check()?;
        Disk.create_dir_all(path)
    }

    fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<File> {
        match self.check() {
            Ok(()) => Disk.write_new(path, bytes),
            Err(error) => {
                // A full disk takes a part. A dead process reaches this only for the write it died in.
                if self.fault == Fault::Fails || self.count.load(Ordering::SeqCst) == self.at {
                    Disk.write_new(path, &bytes[..bytes.len() / 2])?;
                }
                Err(error)
            }
        }
    }

    fn sync_file(&self, file: &File) -> io::Result<()> {
        self.check()?;
        Disk.sync_file(file)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.check()?;
        Disk.sync_dir(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.check()?;
        Disk.rename(from, to)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.check()?;
        Disk.remove_dir_all(path)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.check()?;
        Disk.remove_file(path)
    }
}

fn table() -> VariableTable {
    let variable = |name: &str, kind| Variable {
        name: name.to_owned(),
        shape: vec![3],
        kind,
        offset: 0,
        len: 3,
        initializer: Initializer::Constant(0.0),
        object_key: String::new(),
        upstream_name: String::new(),
    };
    VariableTable::new(vec![
        variable("bn/gamma", VariableKind::Trainable),
        variable("bn/moving_mean", VariableKind::Statistic),
    ])
}

fn state(step: u64) -> CheckpointState {
    CheckpointState {
        step,
        epoch: 0,
        sample_position: 0,
        model: "test".to_owned(),
        profile: Profile::Seed,
        hparams: Value::Null,
        class_map: Vec::new(),
        data_fingerprint: String::new(),
        config_hash: String::new(),
        loss_scale: None,
        metric: None,
        extra: Value::Null,
    }
}

fn save(store: &CheckpointStore, step: u64, value: f32) -> Result<PathBuf, CkptError> {
    let weights = Weights {
        trainable: vec![value; 3],
        statistics: vec![-value; 3],
    };
    store.save(&Snapshot {
        state: &state(step),
        table: &table(),
        weights: &weights,
        ema: Some(&weights),
        slots: &[("momentum", &[value; 3])],
    })
}

/// Saves step 2 over a good step 1 with a fault at each operation in turn, until a save meets none.
///
/// `prepare` runs after the good save; `check` sees the result of the faulty save.
fn sweep(
    fault: Fault,
    prepare: impl Fn(&Path),
    check: impl Fn(usize, &CheckpointStore, Result<PathBuf, CkptError>),
) {
    for at in 1.. {
        let dir = tempfile::tempdir().unwrap();
        let healthy = CheckpointStore::new(dir.path());
        save(&healthy, 1, 1.0).unwrap();
        prepare(dir.path());
        let count = Arc::new(AtomicUsize::new(0));
        let faulty = Faulty {
            fault,
            at,
            count: Arc::clone(&count),
        };
        let result = save(
            &CheckpointStore::with_filesystem(dir.path(), Box::new(faulty)),
            2,
            2.0,
        );
        let operations = count.load(Ordering::SeqCst);
        check(at, &healthy, result);
        if operations < at {
            assert!(at > 10, "a save has more than {at} operations");
            return;
        }
    }
}

fn loaded_value(store: &CheckpointStore) -> f32 {
    let latest = store.load_latest(&table()).unwrap();
    assert!(latest.passed_over.is_empty(), "{:?}", latest.passed_over);
    let checkpoint = latest.checkpoint.expect("a checkpoint is left");
    assert_eq!(
        checkpoint.weights.trainable,
        vec![checkpoint.state.step as f32; 3]
    );
    assert_eq!(checkpoint.ema.as_ref(), Some(&checkpoint.weights));
    checkpoint.weights.trainable[0]
}

#[test]
fn whichever_operation_fails_the_last_good_checkpoint_stays_and_the_error_names_the_path() {
    sweep(
        Fault::Fails,
        |_| (),
        |at, store, result| {
            match result {
                Ok(path) => {
                    assert!(path.ends_with("step-00000002"));
                    assert_eq!(loaded_value(store), 2.0, "operation {at}");
                }
                Err(CkptError::NotDurable { path, .. }) => {
                    assert!(path.ends_with("step-00000002"));
                    assert_eq!(loaded_value(store), 2.0, "operation {at}");
                }
                Err(error) => {
                    let message = error.to_string();
                    assert!(matches!(error, CkptError::Io { .. }), "operation {at}: {message}");
                    assert!(message.contains("step-00000002"), "operation {at}: {message}");
                    assert!(message.contains("os error 28"), "operation {at}: {message}");
                    assert_eq!(loaded_value(store), 1.0, "operation {at}");
                }
            }
            assert!(
                store.gc().unwrap().is_empty(),
                "operation {at} left something behind"
            );
        },
    );
}

#[test]
fn wherever_the_process_dies_the_store_holds_the_old_or_the_new_checkpoint_whole() {
    sweep(
        Fault::Dies,
        |_| (),
        |at, store, result| {
            let value = loaded_value(store);
            match result {
                Ok(_) | Err(CkptError::NotDurable { .. }) => assert_eq!(value, 2.0, "operation {at}"),
                Err(_) => assert_eq!(value, 1.0, "operation {at}"),
            }
            store.gc().unwrap();
            assert_eq!(names_in(store.dir()).unwrap().len(), value as usize);
            // Training goes on from there.
            save(store, 2, 2.0).unwrap();
            assert_eq!(loaded_value(store), 2.0, "operation {at}");
        },
    );
}

#[test]
fn a_damaged_checkpoint_of_the_same_step_is_replaced_or_the_earlier_one_stays() {
    let damage = |dir: &Path| {
        let damaged = dir.join("step-00000002");
        fs::create_dir(&damaged).unwrap();
        fs::write(damaged.join(MANIFEST_FILE), "{}").unwrap();
    };
    for fault in [Fault::Fails, Fault::Dies] {
        sweep(fault, damage, |at, store, result| {
            let latest = store.load_latest(&table()).unwrap();
            let step = latest.checkpoint.unwrap().state.step;
            let expected = match result {
                Ok(_) | Err(CkptError::NotDurable { .. }) => 2,
                Err(_) => 1,
            };
            assert_eq!(step, expected, "operation {at}");
        });
    }
}

#[test]
fn a_checkpoint_that_cannot_be_removed_does_not_stop_pruning() {
    let dir = tempfile::tempdir().unwrap();
    let healthy = CheckpointStore::new(dir.path());
    for step in 1..=4 {
        save(&healthy, step, step as f32).unwrap();
    }
    let faulty = Faulty {
        fault: Fault::Fails,
        at: 1,
        count: Arc::default(),
    };
    let retention = Retention {
        keep_last: 1,
        keep_best: 0,
        keep_steps: Vec::new(),
    };
    let pruned = CheckpointStore::with_filesystem(dir.path(), Box::new(faulty))
        .prune(&retention)
        .unwrap();
    assert_eq!(pruned.removed, [2, 3]);
    assert_eq!(pruned.failed.len(), 1);
    assert!(pruned.failed[0].path.ends_with("step-00000001"));
    assert_eq!(loaded_value(&healthy), 4.0);
}
