//! `karat finetune`: a classifier, from scratch or from pre-trained parameters.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};

use super::progress::Progress;
use super::{Outcome, new_run, picture, say, write_config};
use crate::data::Dataset;
use crate::model::weights::{self, Loaded};
use crate::model::zoo::Model;
use crate::nn::{Checkpoint, Objective, Params};
use crate::train::{
    BEST, CHECKPOINT, Classification, Event, FineTune, Length, METRICS, STATE, Start, Teacher, TeacherConfig, TrainConfig, Trainer,
    evaluation, finetuning_network, read_accuracies, read_metrics, saved_config,
};
use crate::{Error, Result};

/// Train a classifier, from scratch or from pre-trained parameters
///
/// With no arguments: a small XCiT on the built-in images. Writes configuration, metrics, curves, the last and the best
/// parameters and the trainer's state into one folder. A run that was killed goes on with --resume and ends in the same bits.
#[derive(Args, Default)]
#[command(after_help = "Example: karat finetune --model vit_micro --from runs/mae-vit_micro --layer-decay 0.75 --epochs 10")]
pub struct Finetune {
    /// The network (`karat list models`) [default: that of --from, else xcit_micro]
    #[arg(long, value_name = "NAME")]
    pub(super) model: Option<String>,
    /// A folder of images, IDX or CIFAR files [default: built-in Fashion-MNIST subset]
    #[arg(long, value_name = "PATH")]
    pub(super) data: Option<String>,
    /// Side of the images in pixels [default: that of --from, else the network's]
    #[arg(long, value_name = "N")]
    pub(super) image_size: Option<usize>,
    /// Passes over the images [default: 12]
    #[arg(long, value_name = "N", conflicts_with = "steps")]
    pub(super) epochs: Option<u64>,
    /// Optimizer steps
    #[arg(long, value_name = "N")]
    pub(super) steps: Option<u64>,
    /// Images per step [default: 64, or all if there are fewer]
    #[arg(long, value_name = "B")]
    pub(super) batch: Option<usize>,
    /// The largest learning rate [default: 0.001]
    #[arg(long, value_name = "X")]
    pub(super) lr: Option<f64>,
    /// Start from the run in this folder, of pre-training or of finetune
    #[arg(long, value_name = "RUN")]
    pub(super) from: Option<PathBuf>,
    /// Start from published weights (safetensors)
    #[arg(long, value_name = "FILE", conflicts_with = "from")]
    pub(super) weights: Option<PathBuf>,
    /// Leave the classifier of --weights or --from out: other classes
    #[arg(long)]
    pub(super) new_head: bool,
    /// The smallest share of an image's area that a training crop shows [default: 0.8]
    #[arg(long, value_name = "S")]
    pub(super) crop: Option<f64>,
    /// α of mixup [default: 0, none]
    #[arg(long, value_name = "A")]
    pub(super) mixup: Option<f64>,
    /// α of cutmix [default: 0, none]
    #[arg(long, value_name = "A")]
    pub(super) cutmix: Option<f64>,
    /// Label smoothing [default: 0.1]
    #[arg(long, value_name = "E")]
    pub(super) smoothing: Option<f64>,
    /// Random augmentation: operations per image and their magnitude (0 to 10) [default: none]
    #[arg(long, value_name = "N,M", value_parser = randaug)]
    pub(super) randaug: Option<(usize, f64)>,
    /// Probability of random erasing [default: 0]
    #[arg(long, value_name = "P")]
    pub(super) erasing: Option<f64>,
    /// Learning rate of a layer over that of the next [default: 1]
    #[arg(long, value_name = "D")]
    pub(super) layer_decay: Option<f64>,
    /// Probability that the last block's branches are dropped [default: the network's]
    #[arg(long, value_name = "R")]
    pub(super) drop_path: Option<f64>,
    /// Decay of a moving average of the parameters, which is evaluated and saved [default: 0, none]
    #[arg(long, value_name = "D")]
    pub(super) ema: Option<f64>,
    /// Run blocks twice to save memory
    #[arg(long)]
    pub(super) recompute: bool,
    /// A network that teaches one with two heads
    #[arg(long, value_name = "NAME", requires = "teacher_weights")]
    pub(super) teacher: Option<String>,
    /// The teacher's weights (safetensors), or the folder of its run
    #[arg(long, value_name = "FILE", requires = "teacher")]
    pub(super) teacher_weights: Option<String>,
    /// Learn the teacher's answer, or its probabilities [default: hard]
    #[arg(long, value_enum, requires = "teacher")]
    pub(super) distill: Option<Distill>,
    /// Temperature of soft distillation [default: 3]
    #[arg(long, value_name = "T", requires = "distill")]
    pub(super) tau: Option<f64>,
    /// Train on the first images of each class only, N in all
    #[arg(long, value_name = "N")]
    pub(super) limit: Option<usize>,
    /// Seed of everything random [default: 0]
    #[arg(long, value_name = "S")]
    pub(super) seed: Option<u64>,
    /// Steps between two saves [default: one epoch]
    #[arg(long, value_name = "N")]
    pub(super) save_every: Option<u64>,
    /// Leave out images that cannot be read, instead of failing
    #[arg(long)]
    pub(super) skip_bad: bool,
    /// A configuration such as a run's config.toml; options override it
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// The folder to write [default: runs/finetune-MODEL]
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
    /// Go on with the run in this folder, with its configuration
    #[arg(long, value_name = "DIR", conflicts_with_all = [
        "model", "data", "image_size", "epochs", "steps", "batch", "lr", "from", "weights", "new_head", "mixup", "cutmix", "smoothing",
        "randaug", "erasing", "layer_decay", "drop_path", "ema", "recompute", "teacher", "limit", "seed", "save_every", "skip_bad", "config",
        "out", "crop",
    ])]
    pub(super) resume: Option<PathBuf>,
}

/// What a student learns from its teacher.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub(super) enum Distill {
    Hard,
    Soft,
}

fn randaug(text: &str) -> std::result::Result<(usize, f64), String> {
    let parts = text.split_once(',').and_then(|(n, m)| Some((n.trim().parse().ok()?, m.trim().parse().ok()?)));
    parts.ok_or_else(|| "expected N,M: operations per image and their magnitude, such as 2,9".into())
}

impl Finetune {
    /// The configuration but for what depends on the data, and where the parameters come from.
    pub(super) fn config(&self) -> Result<(TrainConfig, Start)> {
        let mut defaults = TrainConfig::classification();
        let mut settings = FineTune::default();
        let mut start = Start::Scratch;
        let mut published_size = None;
        if let Some(run) = &self.from {
            let file = Checkpoint::open(run.join(CHECKPOINT))?;
            let old = saved_config(&file)?;
            defaults.data.clone_from(&old.data);
            published_size = Some(old.image_size);
            settings.normalization = old.normalization();
            start = match old.finetune {
                Some(finetune) => {
                    (defaults.model, settings.network) = (old.model, finetune.network);
                    Start::Classifier { file, new_head: self.new_head }
                }
                None => {
                    (defaults.model, settings.network) = finetuning_network(&old.method, &old.model);
                    Start::Pretrained(file)
                }
            };
        } else if let Some(path) = &self.weights {
            start = Start::Classifier { file: Checkpoint::open(path)?, new_head: self.new_head };
        } else if self.new_head {
            return Err(Error::usage("--new-head needs --weights or --from: a run from scratch has a new classifier anyway"));
        }
        let read = |defaults: &TrainConfig| self.config.as_ref().map_or(Ok(defaults.clone()), |path| defaults.updated_from(path));
        // The network decides the default size of its images.
        let name = self.model.clone().map_or_else(|| read(&defaults).map(|c| c.model), Ok)?;
        let variant = Model::named(&name, 1, None)?.variant;
        defaults.image_size = published_size.unwrap_or(variant.eval.size);
        if self.from.is_none() {
            settings.normalization = variant.eval.normalization;
        }
        let mut c = read(&defaults)?;
        c.model = name;
        if let Some(data) = &self.data {
            c.data.clone_from(data);
        }
        c.image_size = self.image_size.unwrap_or(c.image_size);
        c.length = self.epochs.map(Length::Epochs).or(self.steps.map(Length::Steps)).unwrap_or(c.length);
        c.batch = self.batch.unwrap_or(c.batch);
        c.lr = self.lr.unwrap_or(c.lr);
        c.min_lr = c.min_lr.min(c.lr);
        c.crop = self.crop.unwrap_or(c.crop);
        c.seed = self.seed.unwrap_or(c.seed);
        c.save_every = self.save_every.unwrap_or(c.save_every);
        c.skip_bad |= self.skip_bad;
        let mut f = c.finetune.take().unwrap_or_default();
        if self.from.is_some() {
            f.network = settings.network;
        }
        f.normalization = settings.normalization;
        for (target, value) in [
            (&mut f.mixup, self.mixup),
            (&mut f.cutmix, self.cutmix),
            (&mut f.smoothing, self.smoothing),
            (&mut f.erasing, self.erasing),
            (&mut f.layer_decay, self.layer_decay),
            (&mut f.drop_path, self.drop_path),
            (&mut f.ema, self.ema),
        ] {
            *target = value.unwrap_or(*target);
        }
        f.randaug = self.randaug.or(f.randaug);
        f.recompute |= self.recompute;
        f.limit = self.limit.unwrap_or(f.limit);
        if self.limit == Some(0) {
            return Err(Error::config("limit", "0, expected at least one image"));
        }
        if let (Some(model), Some(weights)) = (&self.teacher, &self.teacher_weights) {
            let tau = match (self.distill.unwrap_or(Distill::Hard), self.tau) {
                (Distill::Soft, tau) => Some(tau.unwrap_or(3.0)),
                (Distill::Hard, None) => None,
                (Distill::Hard, Some(_)) => return Err(Error::usage("--tau is for --distill soft")),
            };
            f.teacher = Some(TeacherConfig { model: model.clone(), weights: weights.clone(), tau });
        }
        c.finetune = Some(f);
        Ok((c, start))
    }

    /// Runs the command; what it has to say goes to `out`, progress to standard error.
    ///
    /// # Errors
    /// Bad options, unreadable data or weights, a folder that already holds a run, a damaged state.
    pub(super) fn run(self, out: &mut dyn Write) -> Result<Outcome> {
        let (mut config, start, folder, state) = match &self.resume {
            Some(folder) => {
                let state = Checkpoint::open(folder.join(STATE))?;
                (saved_config(&state)?, Start::Scratch, folder.clone(), Some(state))
            }
            None => {
                let (config, start) = self.config()?;
                let folder = self.out.clone().unwrap_or_else(|| Path::new("runs").join(format!("finetune-{}", config.model)));
                new_run(&folder)?;
                (config, start, folder, None)
            }
        };
        let ([train, test], skipped) = config.open_both()?;
        for (_, error) in skipped.iter().flat_map(|skipped| &skipped.files) {
            eprintln!("karat: left out: {error}");
        }
        let Some(settings) = &mut config.finetune else {
            return Err(Error::usage(format!("{} is a run of pre-training: karat pretrain --resume goes on with it", folder.display())));
        };
        match (&state, train.class_names()) {
            (None, names) => settings.class_names = names.to_vec(),
            (Some(state), names) if settings.class_names != names => {
                return Err(state.error(format!("the run's classes are not those of `{}`", train.name())));
            }
            _ => {}
        }
        let train = if settings.limit > 0 { train.balanced(settings.limit)? } else { train };
        if state.is_none() && self.batch.is_none() && self.config.is_none() {
            config.batch = config.batch.min(train.len().max(1));
        }
        let config = config.checked()?;
        let settings = config.finetune.clone().unwrap_or_default();
        let model = settings.model(&config.model, config.image_size)?;
        let mut classification = Classification::new(&model, &settings)?;
        if let Some(teacher) = &settings.teacher {
            classification = classification.taught_by(self::teacher(teacher, &config, &settings)?)?;
        }
        let evaluation = evaluation(&classification, &model, &test, &config)?;
        let mut trainer = match &state {
            Some(state) => Trainer::resume(&classification, &train, state)?,
            None => Trainer::new(&classification, &train, config)?,
        };
        if let Some(loaded) = start.load(&model, &mut trainer)? {
            report(out, &loaded, classification.layout().params().len() + classification.layout().buffers().len())?;
        }
        trainer.evaluate_with(evaluation);
        // Everything is in memory now; the state's file is about to be replaced.
        drop((state, start));
        learn(&mut trainer, &classification, [&train, &test], &folder, out)?;
        Ok(Outcome::Good)
    }
}

/// Builds and loads a teacher.
fn teacher(teacher: &TeacherConfig, config: &TrainConfig, settings: &FineTune) -> Result<Teacher> {
    let path = Path::new(&teacher.weights);
    let file = Checkpoint::open(if path.is_dir() { path.join(CHECKPOINT) } else { path.to_path_buf() })?;
    // A teacher that karat trained knows its classes and what its network has of its own.
    let own = if file.meta("config").is_some() { saved_config(&file)?.finetune } else { None };
    let classes = own.as_ref().map_or(&settings.class_names, |own| &own.class_names);
    if *classes != settings.class_names {
        return Err(file.error(format!(
            "the teacher has other classes: {}, the images have {}",
            classes.len(),
            settings.class_names.len()
        )));
    }
    let lessons =
        FineTune { drop_path: 0.0, ..own.clone().unwrap_or_else(|| FineTune { network: Default::default(), ..settings.clone() }) };
    let model = lessons.model(&teacher.model, config.image_size)?;
    let built = model.build()?;
    let mut params = Params::zeros(&built.layout);
    weights::load(&file, &model, &mut params, false).map_err(|e| {
        // A new head would know nothing to teach.
        let message = e.to_string();
        Error::usage(format!("teacher with {} classes: {}", classes.len(), message.split("; --new-head").next().unwrap_or_default()))
    })?;
    let normalization = own.map_or(model.variant.eval.normalization, |own| own.normalization);
    Ok(Teacher::new(built, params, teacher.tau, normalization, settings.normalization))
}

/// Says what was loaded, and what not.
fn report(out: &mut dyn Write, loaded: &Loaded, all: usize) -> Result<()> {
    say(out, format!("loaded {} of {all} tensors", all - loaded.fresh.len()))?;
    for (what, names) in [("resized", &loaded.resized), ("freshly initialised", &loaded.fresh), ("left out", &loaded.dropped)] {
        let mut modules: Vec<&str> = names.iter().map(|name| name.split('.').next().unwrap_or(name)).collect();
        modules.dedup();
        if !modules.is_empty() {
            say(out, format!("{what}: {} tensors of {}", names.len(), modules.join(", ")))?;
        }
    }
    Ok(())
}

fn learn(
    trainer: &mut Trainer,
    objective: &Classification,
    [train, test]: [&Dataset; 2],
    folder: &Path,
    out: &mut dyn Write,
) -> Result<()> {
    let config = trainer.config().clone();
    let (done, steps) = trainer.progress();
    write_config(folder, &config)?;
    say(
        out,
        format!(
            "{}, {} parameters, on {} ({} images, {} classes); steps {done} to {steps} of {} images; {} threads",
            config.model,
            objective.layout().numel(),
            train.name(),
            train.len(),
            objective.classes(),
            config.batch,
            rayon::current_num_threads()
        ),
    )?;
    if !test.held_out() {
        say(out, "the same images serve for training and test: these are training accuracies")?;
    }
    let started = Instant::now();
    let mut progress = Progress::new(done, steps);
    let result = trainer.run_evaluated(folder, &mut |event| match event {
        Event::Step(report) => progress.step(report),
        Event::Accuracy(step, accuracy) => {
            let (top1, top5) = accuracy.fractions();
            progress.say(format!(
                "step {step}: top-1 {:.1} %, top-5 {:.1} % of {} test images",
                100.0 * top1,
                100.0 * top5,
                accuracy.images
            ));
        }
    });
    progress.finish();
    result?;

    let (losses, accuracies) = (read_metrics(&folder.join(METRICS))?, read_accuracies(&folder.join(METRICS))?);
    picture::loss_curve(&folder.join("loss.svg"), &losses, &format!("{}: loss", config.model))?;
    picture::accuracy_curve(&folder.join("accuracy.svg"), &accuracies, &format!("{}: accuracy", config.model))?;
    let last = accuracies.last().map_or(f64::NAN, |(_, top)| top[0]);
    say(
        out,
        format!(
            "top-1 {:.1} % of {} test images, best {:.1} %, after {steps} steps, {:.1} s; wrote {} and {BEST}",
            100.0 * last,
            test.len(),
            100.0 * trainer.best().fractions().0,
            started.elapsed().as_secs_f64(),
            folder.join(CHECKPOINT).display()
        ),
    )
}
