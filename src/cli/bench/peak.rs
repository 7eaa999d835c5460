//! `karat bench peak`: the two limits of one core, per instruction set.

use std::io::Write;

use clap::Args;
use serde_json::json;

use super::{Outcome, Report, say};
use crate::error::Result;
use crate::simd::{self, Isa, peak};

/// Measure the two limits of one core: fused multiply-adds per second and bytes per second
#[derive(Args)]
#[command(after_help = "Example: karat bench peak")]
pub struct Peak {
    #[command(flatten)]
    report: Report,
}

impl Peak {
    pub(super) fn run(&self, out: &mut dyn Write) -> Result<Outcome> {
        let active = simd::isa();
        let bandwidth = peak::bandwidth();
        let mut flops = Vec::new();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            simd::force(isa)?;
            flops.push((isa, peak::fma_flops()));
        }
        simd::force(active)?;
        if self.report.talks() {
            for (isa, flops) in &flops {
                let used = if *isa == active { "  in use" } else { "" };
                say(out, format!("{:<10}{:>9.1} GFLOP/s{used}", isa.name(), flops / 1e9))?;
            }
            say(out, format!("{:<10}{:>9.1} GB/s (two reads and one write)", "memory", bandwidth / 1e9))?;
        }
        let flops: serde_json::Map<_, _> = flops.iter().map(|(isa, flops)| (isa.name().to_string(), json!(flops / 1e9))).collect();
        self.report.finish(out, &json!({ "isa": active.name(), "gflops": flops, "gigabytes_per_second": bandwidth / 1e9 }))
    }
}
