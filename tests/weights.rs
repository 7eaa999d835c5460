//! Published weights under other names and for other image sizes: what `model::weights` promises beyond copying by name.

use std::path::Path;

use karat::Result;
use karat::model::network::Built;
use karat::model::weights::{self, Loaded};
use karat::model::zoo::Model;
use karat::nn::{Checkpoint, Entry, Params};
use karat::tensor::Tensor;
use karat::tensor::random::{Purpose, Rng};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// A name, a shape, values.
type Named = (String, Vec<usize>, Vec<f32>);

fn built(name: &str, size: Option<usize>) -> (Model, Built) {
    let model = Model::named(name, 3, size).unwrap();
    let built = model.build().unwrap();
    (model, built)
}

/// All of a network's tensors, buffers included.
fn state(p: &Params<f32>) -> Vec<Named> {
    let layout = p.layout();
    let one = |e: &Entry, x: &[f32]| (e.name.clone(), e.param.shape().to_vec(), x.to_vec());
    let params = layout.params().iter().map(|e| one(e, p.get(e.param)));
    params.chain(layout.buffers().iter().map(|e| one(e, p.buffer(e.param)))).collect()
}

fn load(path: &Path, state: &[Named], model: &Model, p: &mut Params<f32>) -> Result<Loaded> {
    let bytes: Vec<Vec<u8>> = state.iter().map(|(_, _, x)| x.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let views = state.iter().zip(&bytes).map(|((name, shape, _), x)| (name, TensorView::new(Dtype::F32, shape.clone(), x).unwrap()));
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    weights::load(&Checkpoint::open(path).unwrap(), model, p, false)
}

/// timm's Swin merges at the beginning of the next stage and calls the classifier `head.fc`; the authors store two constants.
#[test]
fn swin_has_two_publications() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("swin.safetensors");
    let (model, built) = built("swin_micro", None);
    let p = Params::<f32>::init(&built.layout, 4);
    let mut timm = state(&p);
    for (name, ..) in &mut timm {
        if let Some((stage, rest)) = name.strip_prefix("layers.").and_then(|n| n.split_once(".downsample.")) {
            *name = format!("layers.{}.downsample.{rest}", stage.parse::<usize>().unwrap() + 1);
        } else if let Some(rest) = name.strip_prefix("head.") {
            *name = format!("head.fc.{rest}");
        }
    }
    let mut q = Params::<f32>::zeros(&built.layout);
    load(&path, &timm, &model, &mut q).unwrap();
    assert!(p.flat() == q.flat());

    let mut official = state(&p);
    official.push(("layers.0.blocks.1.attn_mask".into(), vec![1], vec![0.0]));
    official.push(("layers.0.blocks.0.attn.relative_position_index".into(), vec![1], vec![0.0]));
    let mut q = Params::<f32>::zeros(&built.layout);
    let loaded = load(&path, &official, &model, &mut q).unwrap();
    assert!(p.flat() == q.flat() && loaded.dropped.len() == 2);
}

/// timm's XCiT stores q, k and v of the class blocks one by one; a missing one is named.
#[test]
fn xcit_joins_q_k_v() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("xcit.safetensors");
    let (model, built) = built("xcit_micro", None);
    let p = Params::<f32>::init(&built.layout, 4);
    let mut timm = Vec::new();
    for (name, shape, x) in state(&p) {
        match name.split_once(".attn.qkv.").filter(|_| name.starts_with("cls_attn_blocks.")) {
            None => timm.push((name.replace("pos_embeder.", "pos_embed."), shape, x)),
            Some((block, rest)) => {
                for (part, x) in ["q", "k", "v"].iter().zip(x.chunks(x.len() / 3)) {
                    let shape = [&[shape[0] / 3], &shape[1..]].concat();
                    timm.push((format!("{block}.attn.{part}.{rest}"), shape, x.to_vec()));
                }
            }
        }
    }
    let mut q = Params::<f32>::zeros(&built.layout);
    load(&path, &timm, &model, &mut q).unwrap();
    assert!(p.flat() == q.flat());
    let short: Vec<Named> = timm.iter().filter(|(name, ..)| name != "cls_attn_blocks.0.attn.k.bias").cloned().collect();
    let error = load(&path, &short, &model, &mut q).unwrap_err().to_string();
    assert!(error.contains("1 missing: block 1 of 3 beside cls_attn_blocks.0.attn.q.bias"), "{error}");
    let mut narrow = timm.clone();
    let k = narrow.iter_mut().find(|(name, ..)| name == "cls_attn_blocks.0.attn.k.bias").unwrap();
    (k.1, k.2) = (vec![2], vec![0.0; 2]);
    let error = load(&path, &narrow, &model, &mut q).unwrap_err().to_string();
    assert!(error.contains("cls_attn_blocks.0.attn.k.bias") && error.contains("expected one shape"), "{error}");
}

/// A shared module may appear under any of its names, but all have to agree; norms that nothing uses are left out.
#[test]
fn coat_has_second_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("coat.safetensors");
    let (model, built) = built("coat_micro", None);
    let p = Params::<f32>::init(&built.layout, 4);
    let mut q = Params::<f32>::zeros(&built.layout);
    let renamed = |from: &str, to: &str, keep: bool| {
        let mut state = state(&p);
        let at = state.iter().position(|(name, ..)| name == from).unwrap();
        let mut twin = state[at].clone();
        twin.0 = to.into();
        if keep {
            state.push(twin);
        } else {
            state[at] = twin;
        }
        state.push(("norm1.weight".into(), vec![32], vec![1.0; 32]));
        state
    };
    for (from, to) in [
        ("cpe1.proj.weight", "serial_blocks1.0.cpe.proj.weight"),
        ("crpe2.conv_list.0.bias", "serial_blocks2.0.factoratt_crpe.crpe.conv_list.0.bias"),
        ("crpe3.conv_list.1.weight", "parallel_blocks.1.factoratt_crpe3.crpe.conv_list.1.weight"),
        ("parallel_blocks.0.mlp2.fc1.weight", "parallel_blocks.0.mlp4.fc1.weight"),
    ] {
        for keep in [true, false] {
            q.flat_mut().fill(0.0);
            let loaded = load(&path, &renamed(from, to, keep), &model, &mut q).unwrap();
            assert!(p.flat() == q.flat() && loaded.dropped == ["norm1.weight"], "{to}");
        }
        let mut state = renamed(from, to, true);
        state.iter_mut().find(|(name, ..)| name == to).unwrap().2[0] += 1.0;
        let error = load(&path, &state, &model, &mut q).unwrap_err().to_string();
        assert!(error.contains(from) && error.contains(to) && error.contains("differ"), "{error}");
    }
}

/// Tables of positions are resized for other image sizes: constants stay as they are, and the network runs.
#[test]
fn tables_of_positions_are_resized() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    for (name, size, tables) in [("swin_micro", 16, 2), ("cait_micro", 48, 1), ("beit_micro", 48, 6), ("xvit_micro", 48, 1)] {
        let (_, small) = built(name, None);
        let mut p = Params::<f32>::init(&small.layout, 4);
        let layout = small.layout.clone();
        for entry in layout.params() {
            if entry.name.ends_with("relative_position_bias_table") || entry.name == "pos_embed" {
                p.get_mut(entry.param).fill(0.25);
            }
        }
        let (model, other) = built(name, Some(size));
        let mut q = Params::<f32>::zeros(&other.layout);
        let loaded = load(&path, &state(&p), &model, &mut q).unwrap();
        assert_eq!(loaded.resized.len(), tables, "{name}: {:?}", loaded.resized);
        for entry in other.layout.params().iter().filter(|e| loaded.resized.contains(&e.name)) {
            assert!(q.get(entry.param).iter().all(|x| (x - 0.25).abs() < 1e-6), "{name}: {}", entry.name);
        }
        let mut rng = Rng::new(5, Purpose::Case, 0, 0);
        let images = Tensor::from_fn([1, 3, size, size], |_| rng.normal() as f32);
        let logits = other.network.infer(&q, &images).unwrap();
        assert!(logits[0].data().iter().all(|z| z.is_finite()), "{name}");
    }
}
