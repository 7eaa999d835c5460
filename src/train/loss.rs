//! The loss of a classifier.

use crate::tensor::Tensor;

/// The mean cross-entropy `−log softmax(z)[label]` of logits `[B, classes]`, and its gradient `(softmax(z) − onehot) / B`.
///
/// # Panics
/// If there are fewer labels than rows or a label is no class.
pub fn cross_entropy(logits: &Tensor<f32>, labels: &[usize]) -> (f32, Tensor<f32>) {
    let (rows, classes) = logits.shape().rows_cols();
    let mut d = logits.clone();
    let mut loss = 0.0;
    for (z, &label) in d.data_mut().chunks_exact_mut(classes.max(1)).zip(&labels[..rows]) {
        let max = z.iter().copied().fold(f32::MIN, f32::max);
        let own = z[label] - max;
        let mut sum = 0.0;
        for z in z.iter_mut() {
            *z = libm::expf(*z - max);
            sum += *z;
        }
        loss += (libm::logf(sum) - own) / rows as f32;
        z.iter_mut().for_each(|p| *p /= sum * rows as f32);
        z[label] -= 1.0 / rows as f32;
    }
    (loss, d)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cross_entropy_of_known_logits() {
        let (third, logits) = (1.0f32 / 3.0, Tensor::from_fn([2, 3], |i| if i < 3 { 5.0 } else { [0.0, 1e4, 0.0][i - 3] }));
        let (loss, d) = cross_entropy(&logits, &[2, 1]);
        assert!((loss - 0.5 * 3.0f32.ln()).abs() < 1e-6);
        let expected = [third / 2.0, third / 2.0, (third - 1.0) / 2.0, 0.0, 0.0, 0.0];
        assert!(d.data().iter().zip(expected).all(|(d, e)| (d - e).abs() < 1e-6), "{:?}", d.data());
    }
}
