//! What every engine has to pass, shared by the integration tests of engines.

pub mod agreement;
pub mod golden;
pub mod worst;
