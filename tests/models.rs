//! The promises of every network in `model::zoo`: the published sizes, passes that agree, training that learns, weights by name.

use std::sync::{Mutex, MutexGuard, PoisonError};

use karat::Result;
use karat::model::weights;
use karat::model::zoo::{Eval, FAMILIES, Family, Model, Variant, variants};
use karat::nn::{Checkpoint, Params, Pass, StepKey, Watch};
use karat::tensor::random::{Purpose, Rng};
use karat::tensor::{Tensor, pool};
use karat::train::Optimizer;

const CLASSES: usize = 3;
const BATCH: usize = 2;
const STEPS: usize = 8;
/// How far apart inference and the plain pass may be where batch norms are folded, against the largest logit: some hundred roundings.
const FOLDING: f32 = 2e-5;

/// One test at a time: the pool counts the memory of the process.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The small network of each family, or of the one that `KARAT_ONLY` names by its operation.
fn small() -> impl Iterator<Item = (&'static Family, &'static Variant)> {
    let only = std::env::var("KARAT_ONLY").ok();
    FAMILIES.iter().filter(move |f| only.as_ref().is_none_or(|op| op == f.op)).map(|family| {
        let variant = family.variants.iter().find(|v| v.eval == Eval::SMALL);
        (*family, variant.unwrap_or_else(|| panic!("{} has no small network for 32-pixel images", family.op)))
    })
}

fn images(batch: usize, size: usize) -> Tensor<f32> {
    let mut rng = Rng::new(5, Purpose::Case, 0, 0);
    Tensor::from_fn([batch, 3, size, size], |_| rng.normal() as f32)
}

/// The gradient of the mean cross-entropy by the logits, and its value.
fn cross_entropy(logits: &Tensor<f32>, label: impl Fn(usize) -> usize) -> (f32, Tensor<f32>) {
    let [b, classes] = logits.dims("logits").unwrap();
    let mut d = Tensor::zeros([b, classes]);
    let mut loss = 0.0;
    for (i, (z, d)) in logits.data().chunks(classes).zip(d.data_mut().chunks_mut(classes)).enumerate() {
        let max = z.iter().copied().fold(f32::MIN, f32::max);
        let sum: f32 = z.iter().map(|z| (z - max).exp()).sum();
        for (j, (d, z)) in d.iter_mut().zip(z).enumerate() {
            let hot = if j == label(i) { 1.0 } else { 0.0 };
            *d = ((z - max).exp() / sum - hot) / b as f32;
        }
        loss -= (z[label(i)] - max - sum.ln()) / b as f32;
    }
    (loss, d)
}

/// Names are unique; parameters agree with the published counts exactly, multiply-adds to the digits that are given.
#[test]
fn published_figures() {
    let _alone = alone();
    let mut names = std::collections::BTreeSet::new();
    let mut wrong = Vec::new();
    for (_, variant) in variants() {
        for name in variant.also.iter().chain([&variant.name]) {
            assert!(names.insert(*name), "{name} twice");
        }
        let model = Model::named(variant.name, 1000, None).unwrap();
        let (count, counted) = (model.build().unwrap().layout.numel(), model.macs().unwrap() / 1e9);
        if variant.params.is_some_and(|params| params != count) {
            wrong.push(format!("{}: {count} parameters, published {:?}", variant.name, variant.params));
        }
        if variant.gmacs.is_some_and(|gmacs| (counted / gmacs - 1.0).abs() > 0.006) {
            wrong.push(format!("{}: {counted:.3} GMACs, published {:?}", variant.name, variant.gmacs));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Inference gives the bits of the plain pass, but for what folding batch norms into convolutions rounds; recomputation gives the
/// gradient's bits, with drop path on, and saves memory.
#[test]
fn passes_agree() {
    let _alone = alone();
    for (_, variant) in small() {
        let name = variant.name;
        let mut model = Model::named(name, CLASSES, None).unwrap();
        model.config.set("drop_path_rate", 0.3);
        let built = model.build().unwrap();
        let mut p = Params::<f32>::init(&built.layout, 1);
        // Norms that do something: else a mistake in folding them would not show.
        for (i, entry) in built.layout.params().iter().chain(built.layout.buffers()).enumerate() {
            let wave = |j: usize, x: f32| x * (1.0 + 0.2 * ((7 * i + 3 * j) as f32).sin()) + 0.02 * ((5 * i + 2 * j) as f32).cos();
            let values = if i < built.layout.params().len() { p.get_mut(entry.param) } else { p.buffer_mut(entry.param) };
            values.iter_mut().enumerate().for_each(|(j, x)| *x = wave(j, *x));
        }
        let x = images(BATCH, model.size);
        let watch = Watch::default();
        let inferred = built.network.infer(&p.watched(&watch), &x).unwrap();
        let shown = watch.take();
        assert!(
            shown.iter().any(|(n, _)| n == "pooled") && shown.len() > 1,
            "{name} shows {:?}",
            shown.iter().map(|s| &s.0).collect::<Vec<_>>()
        );
        let mut plain = Vec::new();
        let learn = |p: &Params<f32>, seen: &mut Vec<Tensor<f32>>| -> Result<(Params<f32>, usize)> {
            let mut g = Params::zeros(&built.layout);
            pool::reset_peak();
            let start = pool::stats().peak_bytes;
            built.network.learn(p, &mut g, &x, &mut |logits| {
                *seen = logits.to_vec();
                Ok(logits.iter().map(|z| cross_entropy(z, |i| i % CLASSES).1).collect())
            })?;
            Ok((g, pool::stats().peak_bytes - start))
        };
        learn(&p, &mut plain).unwrap();
        assert_eq!(inferred.len(), plain.len());
        for (a, b) in inferred.iter().zip(&plain) {
            assert_eq!(*a.shape(), [BATCH, CLASSES], "{name}");
            let folds = built.layout.buffers().iter().any(|b| b.name.ends_with("running_var"));
            let largest = b.data().iter().fold(0.0, |most: f32, z| most.max(z.abs()));
            let bound = if folds { FOLDING * largest } else { 0.0 };
            let close = a.data().iter().zip(b.data()).all(|(a, b)| a.is_finite() && (a - b).abs() <= bound);
            assert!(close, "{name}: inference and plain pass differ: {:?}, {:?}", a.data(), b.data());
        }
        let key = StepKey { seed: 3, step: 7 };
        let train = |recompute| learn(&p.run_as(Pass::Train { key, recompute }), &mut Vec::new()).unwrap();
        let ((kept, kept_bytes), (again, again_bytes)) = (train(false), train(true));
        assert!(kept.flat() == again.flat(), "{name}: recomputation changes the gradient");
        assert!(again_bytes < kept_bytes, "{name}: {again_bytes} bytes with recomputation, {kept_bytes} without");
        let other = learn(&p.run_as(Pass::Train { key: StepKey { step: 8, ..key }, recompute: false }), &mut Vec::new()).unwrap().0;
        assert!(kept.flat() != other.flat(), "{name}: drop path drops nothing");
        assert!(kept.flat().iter().all(|g| g.is_finite()), "{name}");
    }
}

/// Packed weights and a batch that is inferred in parts change no bit; weights that change after they were packed are packed again.
#[test]
fn packed_weights_and_parts_of_a_batch() {
    let _alone = alone();
    for (_, variant) in small() {
        let name = variant.name;
        let model = Model::named(name, CLASSES, None).unwrap();
        let built = model.build().unwrap();
        let plain = Params::<f32>::init(&built.layout, 1);
        let infer = |p: &Params<f32>, x: &Tensor<f32>| -> Vec<Vec<f32>> {
            let heads = built.network.infer(p, x).unwrap();
            heads.iter().map(|head| head.data().to_vec()).collect()
        };
        let few = images(BATCH, model.size);
        let mut packed = plain.packing();
        for _ in 0..2 {
            assert_eq!(infer(&packed, &few), infer(&plain, &few), "{name}");
        }
        // One image more than are inferred together.
        let many = images((224 * 224usize).div_ceil(model.size * model.size) + 1, model.size);
        let (first, last) = many.data().split_at(many.data().len() - few.data().len() / BATCH);
        assert_eq!(&first[..few.data().len()], few.data());
        let last = Tensor::new([1, 3, model.size, model.size], last).unwrap();
        for (all, (few, last)) in infer(&packed, &many).iter().zip(infer(&plain, &few).iter().zip(infer(&plain, &last))) {
            assert_eq!(all.len(), many.dims::<4>("images").unwrap()[0] * CLASSES, "{name}");
            assert!(all.starts_with(few) && all.ends_with(&last), "{name}");
        }
        packed.flat_mut().iter_mut().for_each(|w| *w *= 1.5);
        let mut changed = plain.clone();
        changed.flat_mut().iter_mut().for_each(|w| *w *= 1.5);
        assert_eq!(infer(&packed, &few), infer(&changed, &few), "{name}");
        assert_ne!(infer(&changed, &few), infer(&plain, &few), "{name}");
        // Norms that are part of their convolution.
        for variance in built.layout.buffers().iter().filter(|b| b.name.ends_with("running_var")) {
            [&mut packed, &mut changed].into_iter().for_each(|p| p.buffer_mut(variance.param).fill(2.5));
        }
        assert_eq!(infer(&packed, &few), infer(&changed, &few), "{name}");
    }
}

/// A few steps of AdamW learn a batch by heart.
#[test]
fn small_networks_learn() {
    let _alone = alone();
    for (_, variant) in small() {
        let model = Model::named(variant.name, CLASSES, None).unwrap();
        let built = model.build().unwrap();
        let mut p = Params::<f32>::init(&built.layout, 1);
        let mut optimizer = Optimizer::new(&p, (0.9, 0.95), 0.0);
        let x = images(CLASSES, model.size);
        let mut losses = Vec::new();
        for step in 0..STEPS as u64 {
            let mut g = Params::zeros(&built.layout);
            let train = p.run_as(Pass::Train { key: StepKey { seed: 0, step }, recompute: false });
            let mut loss = 0.0;
            let updates = built.network.learn(&train, &mut g, &x, &mut |logits| {
                let results: Vec<_> = logits.iter().map(|z| cross_entropy(z, |i| i)).collect();
                loss = results.iter().map(|r| r.0).sum::<f32>();
                Ok(results.into_iter().map(|r| r.1).collect())
            });
            drop(train);
            losses.push(loss);
            optimizer.step(&mut p, &g, 1e-3, step + 1, 1.0);
            p.update(&updates.unwrap());
        }
        assert!(losses[STEPS - 1] < 0.8 * losses[0], "{}: {losses:?}", variant.name);
    }
}

/// Weights load by name; a wrong file's error lists what is missing, unexpected and misshapen; a new head leaves the classifier out.
#[test]
fn weights_load_by_name() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    for (family, variant) in small() {
        let name = variant.name;
        let model = Model::named(name, CLASSES, None).unwrap();
        let built = model.build().unwrap();
        let p = Params::<f32>::init(&built.layout, 9);
        let path = folder.path().join(format!("{name}.safetensors"));
        save(&path, &p, |_| true);
        let file = Checkpoint::open(&path).unwrap();
        let mut q = Params::<f32>::zeros(&built.layout);
        weights::load(&file, &model, &mut q, false).unwrap();
        assert!(p.flat() == q.flat(), "{name}");

        let other = Model::named(name, CLASSES + 2, None).unwrap();
        let wide = other.build().unwrap();
        let mut q = Params::<f32>::init(&wide.layout, 2);
        let error = weights::load(&file, &other, &mut q, false).unwrap_err().to_string();
        assert!(error.contains("wrong shape") && error.contains("--new-head") && error.contains(name), "{error}");
        let loaded = weights::load(&file, &other, &mut q, true).unwrap();
        assert!(!loaded.fresh.is_empty() && loaded.fresh.iter().all(|n| family.rules.heads.iter().any(|h| n.starts_with(h))), "{loaded:?}");

        let first = built.layout.params()[0].name.clone();
        save(&path, &p, |n| n != first);
        let file = Checkpoint::open(&path).unwrap();
        let error = weights::load(&file, &model, &mut Params::zeros(&built.layout), false).unwrap_err().to_string();
        assert!(error.contains(&format!("1 missing: {first}")) && error.contains(&*path.to_string_lossy()), "{error}");
    }
    let error = Model::named("deit_smal_patch16_224", 1000, None).err().unwrap().to_string();
    assert!(error.contains("deit_small_patch16_224"), "{error}");
}

fn save(path: &std::path::Path, p: &Params<f32>, keep: impl Fn(&str) -> bool) {
    let layout = p.layout();
    let entries = layout.params().iter().map(|e| (e, p.get(e.param))).chain(layout.buffers().iter().map(|e| (e, p.buffer(e.param))));
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = entries
        .filter(|(e, _)| keep(&e.name))
        .map(|(e, x)| (e.name.clone(), e.param.shape().to_vec(), x.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let views = bytes.iter().map(|(name, shape, data)| {
        (name.clone(), safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), data).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}
