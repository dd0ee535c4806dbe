//! Whether there are AMX tiles here, and their configuration.

use super::Isa;

/// Whether products in the order of tiles have instructions of their own (AMX with bfloat16) where kernels run on `isa`.
///
/// The first call asks the system to let this process use them.
pub(crate) fn has_tiles(isa: Isa) -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return isa == Isa::Avx512 && amx::is_ready();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    {
        let _ = isa;
        false
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) use amx::{configure, release};

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx {
    use std::arch::asm;
    use std::arch::x86_64::__cpuid_count;
    use std::cell::Cell;
    use std::sync::OnceLock;

    /// `ARCH_REQ_XCOMP_PERM` of `arch_prctl(2)`, and the state it asks for, `XFEATURE_XTILEDATA`.
    const REQUEST_PERMISSION: libc::c_int = 0x1023;
    const TILE_DATA: libc::c_ulong = 18;

    /// Bits of leaf 7 of `cpuid`: AMX-BF16 and AMX-TILE.
    const AMX: u32 = 1 << 22 | 1 << 24;

    /// Whether processor and system let this process use tiles of bfloat16.
    pub(super) fn is_ready() -> bool {
        static READY: OnceLock<bool> = OnceLock::new();
        *READY.get_or_init(|| {
            let has_leaf_7 = __cpuid_count(0, 0).eax >= 7;
            if !has_leaf_7 || __cpuid_count(7, 0).edx & AMX != AMX || !is_x86_feature_detected!("avx512bf16")
            {
                return false;
            }
            // SAFETY: this call reads its two numbers and no memory; a system that does not know it, or does not keep tiles
            // when it switches between threads, says no.
            unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 }
        })
    }

    /// Operand of `ldtilecfg`: eight tiles of 16 rows of 64 bytes, except that the last two hold the lanes left over of a left
    /// operand (16 rows) and of a right one (columns of 16 lanes).
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    thread_local! {
        /// What this thread's tiles are shaped for; none where they are released.
        static SHAPED_FOR: Cell<Option<usize>> = const { Cell::new(None) };
    }

    /// Shapes the tiles of this thread, until it releases them: 0 to 5 are whole, 6 has 16 rows of `rest` lanes, and 7 has `rest`
    /// rows of 16 lanes. What they hold is lost, unless they had these shapes.
    ///
    /// # Safety
    /// [`is_ready`] must have said yes, and `rest` be at most 16; 0 leaves the last two out.
    pub(crate) unsafe fn configure(rest: usize) {
        debug_assert!(rest <= 16);
        // It takes as long as some ten products of tiles.
        if SHAPED_FOR.replace(Some(rest)) == Some(rest) {
            return;
        }
        let mut configuration = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        for tile in 0..6 {
            (configuration.row_bytes[tile], configuration.rows[tile]) = (64, 16);
        }
        if rest > 0 {
            (configuration.row_bytes[6], configuration.rows[6]) = (4 * rest as u16, 16);
            (configuration.row_bytes[7], configuration.rows[7]) = (64, rest as u8);
        }
        // SAFETY: a valid configuration, on a processor with tiles that the system lets this process use.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &configuration, options(nostack, readonly));
        }
    }

    /// Gives the tiles of this thread back: the system need not keep them any longer when it switches between threads, and the
    /// processor may sleep.
    pub(crate) fn release() {
        if SHAPED_FOR.replace(None).is_some() {
            // SAFETY: tiles were shaped, so there are tiles, and nothing is left in them that anybody reads.
            unsafe { asm!("tilerelease", options(nostack, nomem)) };
        }
    }
}
