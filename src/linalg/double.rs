//! `C = A B` in f64 by `matrixmultiply`: an independent implementation for the oracle.

use super::Epilogue;
use super::gemm::RawEpilogue;
use super::view::{Mat, MatMut, Rows};
use crate::simd::{Kernel, Vector};
use crate::tensor::{Buffer, Float};

/// Elements of made rows that exist at a time.
const BLOCK: usize = 1 << 20;

pub(super) fn dgemm(a: Mat<f64>, b: Mat<f64>, c: &mut MatMut<f64>, add: bool) {
    let (m, k, n) = (a.rows(), a.cols(), b.cols());
    assert!(
        b.rows() == k && c.rows() == m && c.cols() == n,
        "matrix product of {m}×{k} and {}×{n} into {}×{}",
        b.rows(),
        c.rows(),
        c.cols()
    );
    let c_row = c.row_stride() as isize;
    let (ars, acs) = (a.row_stride() as isize, a.col_stride() as isize);
    let (brs, bcs) = (b.row_stride() as isize, b.col_stride() as isize);
    let beta = if add { 1.0 } else { 0.0 };
    // SAFETY: the views lie inside their slices and the shapes agree.
    unsafe {
        matrixmultiply::dgemm(
            m,
            k,
            n,
            1.0,
            a.data().as_ptr(),
            ars,
            acs,
            b.data().as_ptr(),
            brs,
            bcs,
            beta,
            c.data().as_mut_ptr(),
            c_row,
            1,
        );
    }
}

struct Finish<'a, 'b, 'c> {
    c: &'a mut MatMut<'b, f64>,
    epilogue: RawEpilogue<'c, f64>,
}

impl Kernel<f64> for Finish<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector<f64>>(self) {
        let (m, n, stride) = (self.c.rows(), self.c.cols(), self.c.row_stride());
        // SAFETY: one thread, and C is borrowed mutably.
        unsafe { self.epilogue.finish::<V>(self.c.data().as_mut_ptr(), stride, (0, m), (0, n)) };
    }
}

pub(super) fn gemm_f64(a: Mat<f64>, b: Mat<f64>, mut c: MatMut<f64>, epilogue: Epilogue<f64>) {
    let epilogue = RawEpilogue::new(epilogue, c.rows(), c.cols());
    dgemm(a, b, &mut c, epilogue.accumulate);
    f64::dispatch(Finish { c: &mut c, epilogue });
}

pub(super) fn gemm_rows_f64(a: &dyn Rows<f64>, b: Mat<f64>, mut c: MatMut<f64>, epilogue: Epilogue<f64>) {
    let (m, k) = (a.rows(), a.cols());
    assert!(c.rows() == m, "matrix product of {m} rows into {}", c.rows());
    let epilogue = RawEpilogue::new(epilogue, m, c.cols());
    let each = (BLOCK / k.max(1)).clamp(1, m.max(1));
    let mut made = Buffer::scratch(each * k);
    for from in (0..m).step_by(each) {
        let rows = each.min(m - from);
        a.copy(from..from + rows, 0..k, &mut made, k);
        dgemm(Mat::new(&made[..rows * k], rows, k), b, &mut c.rows_from(from, rows), epilogue.accumulate);
    }
    f64::dispatch(Finish { c: &mut c, epilogue });
}

pub(super) fn pack_f64(b: Mat<f64>, packed: &mut [f64]) {
    let (k, n) = (b.rows(), b.cols());
    for (p, row) in packed.chunks_exact_mut(n.max(1)).take(k).enumerate() {
        for (j, x) in row.iter_mut().enumerate() {
            *x = b.data()[p * b.row_stride() + j * b.col_stride()];
        }
    }
}
