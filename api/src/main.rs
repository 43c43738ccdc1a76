//! Prints the public items of a crate, from what rustdoc says of it in JSON.

use std::error::Error;

use public_api::Builder;

fn main() -> Result<(), Box<dyn Error>> {
    let file = std::env::args_os().nth(1).ok_or("usage: jamba-api FILE.json")?;
    // What every type has does not say anything of this one.
    let items = Builder::from_rustdoc_json(file).omit_blanket_impls(true);
    print!("{}", items.omit_auto_trait_impls(true).build()?);
    Ok(())
}
