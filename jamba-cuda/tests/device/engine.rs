//! The engine on the device: requests that share it get what they would get alone.

use jamba_core::{
    Engine, EngineOptions, FinishReason, GenerateOptions, LanguageModel, Model, Request, Sampling,
    SessionOptions, Tokenizer, generate_ids,
};
use jamba_cuda::{CudaBackend, Precision};
use libtest_mimic::{Failed, Trial};

use crate::models::{best_and_gap, gap};
use crate::support::{check, guarded, root};

pub(crate) fn trials(precision: Precision) -> Vec<Trial> {
    let trial = |name, run: fn(CudaBackend) -> Result<(), Failed>| {
        Trial::test(format!("{precision:?}::engine::{name}"), move || guarded(precision, run))
    };
    vec![
        trial("together_as_alone", together_as_alone),
        trial("prefix_cache", prefix_cache),
        trial("cancelled", cancelled),
    ]
}

struct Demo {
    model: Model<CudaBackend>,
    tokenizer: Tokenizer,
    precision: Precision,
}

impl Demo {
    fn load(backend: CudaBackend) -> Result<Self, Failed> {
        let folder = root().join("models/jamba-tales-11m");
        let (precision, tokenizer) = (backend.precision(), Tokenizer::from_folder(&folder)?);
        Ok(Self { model: Model::load(&folder, backend)?, tokenizer, precision })
    }

    fn engine(&self, options: EngineOptions) -> jamba_core::Result<Engine> {
        Engine::new(&self.model, &self.tokenizer, options)
    }

    fn alone(&self, prompt: &[u32], options: GenerateOptions) -> jamba_core::Result<Vec<u32>> {
        let session = SessionOptions { context: 256, ..SessionOptions::default() };
        let mut session = self.model.session(session)?;
        Ok(generate_ids(&mut session, &self.tokenizer, prompt, options)?.ids)
    }

    /// The same tokens, up to one whose logit is so close to the best that the sum of a step in
    /// another order may decide.
    fn same(&self, prompt: &[u32], got: &[u32], expected: &[u32]) -> Result<usize, Failed> {
        let same = got.iter().zip(expected).take_while(|(a, b)| a == b).count();
        if got.len() == expected.len() && same == got.len() {
            return Ok(same);
        }
        let held = [prompt, &expected[..same]].concat();
        let mut session =
            self.model.session(SessionOptions { context: 256, ..SessionOptions::default() })?;
        let (_, found) = best_and_gap(session.append(&held)?);
        let message = format!("{prompt:?} parts at {same} of {}, gap {found}", expected.len());
        check(found <= gap(self.precision), message)?;
        Ok(same)
    }
}

fn greedy(max_tokens: usize) -> GenerateOptions {
    GenerateOptions { sampling: Sampling::greedy(), max_tokens, ..GenerateOptions::default() }
}

const PROMPTS: [&str; 6] =
    ["Once upon a time", "The little dog", "A fox", "Tom and Sue went to the", "An owl", "It"];

/// More requests than slots, greedy and sampled ones, with chunks of prompts between them.
fn together_as_alone(backend: CudaBackend) -> Result<(), Failed> {
    let demo = Demo::load(backend)?;
    let options = EngineOptions { slots: 4, context: 256, step_tokens: 16, ..Default::default() };
    let engine = demo.engine(options)?;
    let mut requests = Vec::new();
    for (i, prompt) in PROMPTS.iter().cycle().take(18).enumerate() {
        let mut prompt = demo.tokenizer.encode(prompt)?;
        prompt.extend((0..i as u32 * 3).map(|k| 300 + 7 * k));
        let sampling = match i % 3 {
            2 => Sampling { temperature: 0.8, top_p: 0.9, seed: i as u64, ..Sampling::default() },
            _ => Sampling::greedy(),
        };
        requests.push((prompt, GenerateOptions { sampling, ..greedy(40) }));
    }
    let streams: Vec<_> = requests
        .iter()
        .map(|(prompt, options)| engine.submit(Request::new(prompt.clone(), options.clone())))
        .collect::<Result<_, _>>()?;
    let (mut same, mut all) = (0, 0);
    for (stream, (prompt, options)) in streams.into_iter().zip(&requests) {
        let got = stream.collect_all()?.ids;
        if options.sampling.temperature > 0.0 {
            // Where a draw falls between two tokens is decided by the last bits of all logits.
            check(!got.is_empty(), "nothing was sampled")?;
            continue;
        }
        let expected = demo.alone(prompt, options.clone())?;
        same += demo.same(prompt, &got, &expected)?;
        all += expected.len();
    }
    println!(
        "{:?} engine: {same} of {all} greedy tokens are those of a request alone",
        demo.precision
    );
    let stats = engine.stats();
    check(stats.finished == 18 && stats.failed == 0, format!("{stats:?}"))?;
    engine.shutdown();
    Ok(())
}

/// Prompts that begin alike start from kept states, and go on as without them.
fn prefix_cache(backend: CudaBackend) -> Result<(), Failed> {
    let demo = Demo::load(backend)?;
    let options = EngineOptions { slots: 2, context: 256, ..Default::default() };
    let engine = demo.engine(options)?;
    let story = "Once upon a time there was a little dog who lived in a house by the sea with";
    let mut cached = 0;
    for end in ["", " a cat", " a cat", " his friend the owl"] {
        let prompt = demo.tokenizer.encode(&format!("{story}{end}"))?;
        let completion = engine.submit(Request::new(prompt.clone(), greedy(30)))?.collect_all()?;
        demo.same(&prompt, &completion.ids, &demo.alone(&prompt, greedy(30))?)?;
        cached += completion.usage.cached_tokens;
    }
    println!("{:?} engine: {cached} tokens of prompts came from the cache", demo.precision);
    check(cached >= 30, format!("only {cached} tokens came from the cache"))?;
    engine.shutdown();
    Ok(())
}

/// A request that is cancelled ends, and those beside it do not notice.
fn cancelled(backend: CudaBackend) -> Result<(), Failed> {
    let demo = Demo::load(backend)?;
    let options = EngineOptions { slots: 3, context: 256, prefix_cache: 0, ..Default::default() };
    let engine = demo.engine(options)?;
    let prompt = demo.tokenizer.encode("Once upon a time")?;
    let endless = GenerateOptions { ignore_eos: true, ..greedy(240) };
    let dropped = engine.submit(Request::new(prompt.clone(), endless.clone()))?;
    let mut stopped = engine.submit(Request::new(prompt.clone(), endless))?;
    let kept = engine.submit(Request::new(prompt.clone(), greedy(60)))?;
    for _ in 0..3 {
        stopped.next().ok_or("it ended")??;
    }
    drop(dropped);
    stopped.cancel();
    let completion = stopped.collect_all()?;
    let reason = completion.finish_reason;
    check(reason == Some(FinishReason::Cancelled), format!("{reason:?}"))?;
    demo.same(&prompt, &kept.collect_all()?.ids, &demo.alone(&prompt, greedy(60))?)?;
    engine.shutdown();
    let stats = engine.stats();
    check(stats.cancelled == 2 && stats.finished == 1, format!("{stats:?}"))
}
