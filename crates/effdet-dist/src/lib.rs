//! Process groups: the single process, and later MPI.
#![forbid(unsafe_code)]
