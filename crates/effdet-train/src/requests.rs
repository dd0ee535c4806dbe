//! What may be asked of a run from outside while it goes on.

use std::sync::atomic::{AtomicBool, Ordering};

use effdet_dist::{DistError, ProcessGroup, Wire};

/// Flags that signal handlers set and the trainer looks at after every step and every batch of an evaluation.
#[derive(Debug, Default)]
pub struct Requests {
    /// Save and end.
    pub stop: AtomicBool,
    /// Save and go on.
    pub save: AtomicBool,
}

/// What any rank was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Asked {
    pub stop: bool,
    pub save: bool,
}

impl Requests {
    /// What was asked of any rank; all ranks get the same answer. A request to save counts once.
    pub(crate) fn agree(&self, group: &dyn ProcessGroup) -> Result<Asked, DistError> {
        let own = [
            self.stop.load(Ordering::Relaxed),
            self.save.swap(false, Ordering::Relaxed),
        ];
        let mut votes = own.map(|asked| f32::from(u8::from(asked)));
        group.all_reduce_sum(&mut votes, Wire::F32)?;
        let [stop, save] = votes.map(|votes| votes > 0.0);
        Ok(Asked { stop, save })
    }
}
