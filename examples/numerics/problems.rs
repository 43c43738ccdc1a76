//! Inputs and expected outputs of any problem of the conformance kit, for kernels written in
//! another language.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use jamba_core::recording::Recording;
use jamba_core::{Error, Result};
use jamba_examples::{print, run};
use jamba_tests::oracle::OracleBackend;
use jamba_tests::problem::{AnyProblem, NAMES, example};
use jamba_tests::{Numbers, Precision};

/// Writes the inputs (`in.NAME`) and what an f64 oracle computes from them (`out.NAME`) of one
/// problem to a safetensors file (F32).
///
/// States are named `state.LAYER.PART.SLOT`: before the step with `in.`, where the slot holds any
/// token, after it with `out.`. The line that describes the problem is printed; it replays it.
#[derive(Parser)]
#[command(allow_negative_numbers = true)]
struct Args {
    /// Lists the operators and blocks, each with an example of a line for --case.
    #[arg(long, exclusive = true)]
    list: bool,
    /// Operator or block.
    #[arg(long, value_name = "NAME", required_unless_present = "list")]
    op: Option<String>,
    /// One line of JSON: sizes, batch and seed, as --list or a failing test prints it.
    #[arg(long, value_name = "JSON", conflicts_with = "seed")]
    case: Option<String>,
    /// Seed of a random problem.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Rounds activations to bf16, for kernels that keep them so.
    #[arg(long, conflicts_with = "case")]
    bf16: bool,
    /// File to write.
    #[arg(long, short, value_name = "FILE.safetensors", required_unless_present = "list")]
    output: Option<PathBuf>,
}

fn main() -> ExitCode {
    run(|| problems(&Args::parse()))
}

fn problems(args: &Args) -> Result<()> {
    let precision = if args.bf16 { Precision::Bf16 } else { Precision::F32 };
    let numbers = Numbers::from(precision);
    let (Some(op), Some(output)) = (&args.op, &args.output) else {
        for name in NAMES {
            let problem = example(name, &numbers, 0).expect("one of its names");
            print(&format!("{name}\n  {problem}\n"))?;
        }
        return Ok(());
    };
    let unknown = || wrong("op", op, "--list shows the operators and blocks there are");
    let problem: AnyProblem = match &args.case {
        Some(line) => line
            .parse()
            .map_err(|error| wrong("case", &format!("{line} ({error})"), "one line of JSON"))?,
        None => example(op, &numbers, args.seed).ok_or_else(unknown)?,
    };
    if problem.name() != op {
        return Err(wrong("case", problem.name(), "it must be of the operator that --op names"));
    }
    print(&format!("{problem}\n"))?;
    let expected = problem.run(&OracleBackend)?;
    let mut file = Recording::default();
    for (prefix, tensors) in [("in", problem.inputs().tensors), ("out", expected.tensors)] {
        let named = tensors.into_iter().map(|(name, tensor)| (format!("{prefix}.{name}"), tensor));
        file.tensors.extend(named);
    }
    for (name, tensor) in &file.tensors {
        print(&format!("  {name:48} {:?}\n", tensor.shape))?;
    }
    file.save(output)?;
    jamba_examples::note!("wrote {} tensors to {}", file.tensors.len(), output.display());
    Ok(())
}

fn wrong(option: &'static str, value: &str, allowed: &'static str) -> Error {
    Error::Option { option, value: value.into(), allowed }
}
