//! The promise of `zoo::Eval`: images are prepared as timm's evaluation transform does it, bit for bit.
//! `reference/make_preprocess_fixtures.py` makes the answers.

use std::fs;
use std::path::Path;

use karat::data::Image;
use karat::data::transform::Normalization;
use karat::model::zoo::Eval;
use karat::tensor::random::{Purpose, Rng};
use safetensors::SafeTensors;

#[test]
fn images_are_prepared_as_timm_does() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/preprocess");
    let mut seen = 0;
    for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        let bytes = fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let metadata = SafeTensors::read_metadata(&bytes).unwrap().1.metadata().clone().unwrap();
        let (size, crop) = (metadata["size"].parse().unwrap(), metadata["crop"].parse().unwrap());
        let normalization = match metadata["normalization"].as_str() {
            "imagenet" => Normalization::IMAGENET,
            "half" => Normalization::HALF,
            other => panic!("{other}"),
        };
        let source = file.tensor("image").unwrap();
        let &[height, width, channels] = source.shape() else { panic!("{:?}", source.shape()) };
        let image = Image { height, width, channels, pixels: source.data().into() };
        let eval = Eval { size, crop, normalization };
        let run = |eval: Eval| {
            let transform = eval.transform().unwrap();
            let mut out = vec![f32::NAN; transform.len()];
            transform.apply(&image, &mut Rng::new(0, Purpose::Augment, 0, 0), &mut out).unwrap();
            out
        };
        // The 8-bit pixels, rows first; then the normalised planes.
        let planes = run(Eval { normalization: Normalization::NONE, ..eval });
        let cut = file.tensor("cut").unwrap();
        assert_eq!(cut.shape(), [size, size, 3]);
        for (i, &want) in cut.data().iter().enumerate() {
            assert_eq!(planes[i % 3 * size * size + i / 3] * 255.0, f32::from(want), "{}: byte {i}", path.display());
        }
        let output = file.tensor("output").unwrap();
        let want: Vec<u32> = output.data().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
        let got: Vec<u32> = run(eval).iter().map(|x| x.to_bits()).collect();
        let wrong = got.iter().zip(&want).position(|(a, b)| a != b);
        assert!(got.len() == want.len() && wrong.is_none(), "{}: float {wrong:?}", path.display());
        seen += 1;
    }
    assert_eq!(seen, 7);
}
