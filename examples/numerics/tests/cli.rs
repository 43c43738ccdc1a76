//! The programs as a user runs them: what they print, and how they refuse.

use std::path::Path;
use std::process::{Command, Output};

/// The built example; `cargo test` builds all of them beside the tests.
fn example(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let profile = test.ancestors().nth(2).unwrap();
    let path = profile.join("examples").join(name).with_extension(std::env::consts::EXE_EXTENSION);
    assert!(path.is_file(), "{} is not built", path.display());
    let mut command = Command::new(path);
    command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."));
    command
}

#[track_caller]
fn success(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    assert!(status.success(), "{status}: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}

/// Ends with an error of one line that has all of these in it: no panic, no abort.
#[track_caller]
fn refused(command: &mut Command, parts: &[&str]) {
    let Output { status, stderr, .. } = command.output().unwrap();
    let err = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(2), "{err}");
    for part in parts {
        assert!(err.contains(part), "`{part}` is not in: {err}");
    }
}

#[test]
fn every_problem_is_written_and_replayed_from_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let list = success(example("problems").arg("--list"));
    let lines: Vec<&str> = list.lines().collect();
    assert_eq!(lines.len(), 2 * 18);
    for pair in lines.chunks_exact(2) {
        let (op, case) = (pair[0], pair[1].trim());
        let [drawn, replayed] = ["drawn", "replayed"].map(|name| folder.path().join(name));
        success(example("problems").args(["--op", op, "--seed", "0", "-o"]).arg(&drawn));
        let printed =
            success(example("problems").args(["--op", op, "--case", case, "-o"]).arg(&replayed));
        assert!(printed.starts_with(case), "{printed}");
        assert_eq!(std::fs::read(drawn).unwrap(), std::fs::read(replayed).unwrap(), "{op}");
    }
}

#[test]
fn problems_that_there_cannot_be_are_refused() {
    let refuse = |op: &str, case: &str, part: &str| {
        refused(
            example("problems").args(["--op", op, "--case", case, "-o", "/dev/null"]),
            &["case", part],
        );
    };
    let list = success(example("problems").arg("--list"));
    let lines: Vec<&str> = list.lines().collect();
    // Every size of every problem, one at a time: what no machine has room for, and what wraps.
    let mut tried = 0;
    // More pieces than rows are as many as rows; a model without experts uses none of them.
    let size = |(name, value): &(&String, &serde_json::Value)| {
        value.is_u64() && !["seed", "pieces", "top_k"].contains(&name.as_str())
    };
    for pair in lines.chunks_exact(2) {
        let (op, case) = (pair[0], pair[1].trim());
        let problem: serde_json::Value = serde_json::from_str(case).unwrap();
        let sizes = problem.get("sizes").unwrap_or(&problem).as_object().unwrap();
        for (name, value) in sizes.iter().filter(size) {
            for wrong in [1u64 << 40, u64::MAX] {
                let from = format!("\"{name}\":{value}");
                let changed = case.replacen(&from, &format!("\"{name}\":{wrong}"), 1);
                assert_ne!(changed, case);
                refuse(op, &changed, "but ");
                tried += 1;
            }
        }
    }
    assert!(tried > 100, "{tried}");
    let zero = r#"{"op":"silu_mul","rows":2,"n":0,"precision":"f32","seed":7}"#;
    refuse("silu_mul", zero, "at least 1");
    let experts = r#"{"op":"moe_experts","rows":2,"hidden":3,"inter":3,"experts":2,"top_k":3,"ties":false,"pieces":1,"weights":"f32","precision":"f32","seed":7}"#;
    refuse("moe_experts", experts, "top_k");
    refuse("silu_mul", "{", "EOF");
    refused(
        example("problems").args(["--op", "linear", "--case", &line("mlp"), "-o", "/dev/null"]),
        &["--op names"],
    );
}

fn line(op: &str) -> String {
    let list = success(example("problems").arg("--list"));
    let mut lines = list.lines().skip_while(|line| *line != op);
    lines.nth(1).expect("an operator").trim().to_owned()
}

#[test]
fn backends_are_compared_layer_by_layer() {
    let table = success(example("compare").args(["--a", "oracle", "--b", "cpu", "--tokens", "5"]));
    assert!(table.contains("layer 0") && table.contains("head"), "{table}");
    let json = success(example("compare").args(["--b", "cpu-f32", "--tokens", "3", "--json"]));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["tokens"], 3);
    for step in json["steps"].as_array().unwrap() {
        assert!(step["errors"][0]["largest"].as_f64().unwrap() < 1e-5, "{step}");
    }
}

#[test]
fn what_does_not_fit_the_machine_is_refused_before_it_is_made() {
    let large = ["--preset", "jamba-1.5-large"];
    refused(example("compare").args(large), &["GiB", "--layers"]);
    let many = ["--tokens", "18446744073709551615"];
    refused(example("compare").args(many), &["GiB", "--tokens"]);
    let layers = ["--preset", "jamba-tales-11m", "--layers", "1000000000000"];
    refused(example("compare").args(layers), &["layers", "jamba-tales-11m"]);
    refused(example("compare").args(["--preset", "jamba-9"]), &["jamba-9"]);
}

#[test]
fn files_of_activations_are_compared_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b, other] = ["a", "b", "other"].map(|name| folder.path().join(name));
    let write = |op: &str, seed: &str, to: &Path| {
        success(example("problems").args(["--op", op, "--seed", seed, "-o"]).arg(to));
    };
    write("linear", "1", &a);
    write("linear", "1", &b);
    write("silu_mul", "1", &other);
    let compared = |to: &Path| {
        let output = example("compare").arg("--trace").args([&a, to]).arg("--json").output();
        serde_json::from_slice::<Vec<serde_json::Value>>(&output.unwrap().stdout).unwrap()
    };
    let same = compared(&b);
    assert!(same.len() > 2 && same.iter().all(|d| d["largest"] == 0.0 && d["fault"].is_null()));
    // What one has and the other has not, or has in another shape, is a fault by its name.
    let named = |d: &&serde_json::Value| d["name"] == "in.weight" && !d["fault"].is_null();
    assert_eq!(compared(&other).iter().filter(named).count(), 1);
    refused(example("compare").arg("--trace").arg(&a).arg(folder.path().join("none")), &["none"]);
}

#[test]
fn other_tensors_and_lost_output_end_with_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|name| folder.path().join(name).with_extension("safetensors"));
    for (op, path) in [("linear", &a), ("embed", &b)] {
        success(example("problems").args(["--op", op, "--output"]).arg(path));
    }
    let code = |other| {
        let mut command = example("compare");
        command.arg("--trace").arg(&a).arg(other).output().unwrap().status.code()
    };
    assert_eq!((code(&a), code(&b)), (Some(0), Some(1)));
    #[cfg(target_os = "linux")]
    for (name, args) in [("problems", &["--list"][..]), ("compare", &["--tokens", "2"])] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let status = example(name).args(args).stdout(full).status().unwrap();
        assert_eq!(status.code(), Some(2), "{name}");
    }
}

#[test]
fn errors_above_a_bound_end_with_1() {
    let bounded = |bound| {
        let args = ["--b", "cpu-f32", "--tokens", "3", "--at-most", bound];
        example("compare").args(args).output().unwrap().status.code()
    };
    assert_eq!((bounded("1e-4"), bounded("0")), (Some(0), Some(1)));
    for bound in ["-1", "nan", "x"] {
        refused(example("compare").args(["--at-most", bound]), &["--at-most", "0 or more"]);
    }
}
