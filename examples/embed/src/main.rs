//! The smallest complete program: a model folder, a prompt, the text as it comes.

use std::io::Write;

use jamba_core::{
    GenerateOptions, Generator, LanguageModel, Model, Sampling, SessionOptions, Tokenizer,
};
use jamba_cpu::CpuBackend;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args().nth(1).ok_or("usage: embed FOLDER [PROMPT]")?;
    let prompt = std::env::args().nth(2).unwrap_or("Once upon a time".into());

    let model = Model::load(&folder, CpuBackend::new())?;
    let tokenizer = Tokenizer::from_folder(&folder)?;
    let mut session = model.session(SessionOptions { context: 512, ..Default::default() })?;

    let sampling = Sampling::from_folder(&folder)?;
    let options = GenerateOptions { sampling, max_tokens: 100, ..Default::default() };
    let mut story = Generator::new(&mut session, &tokenizer, options)?;
    story.prompt_text(&prompt)?;
    print!("{prompt}");
    for piece in story {
        print!("{}", piece?.text);
        std::io::stdout().flush()?;
    }
    println!();
    Ok(())
}
