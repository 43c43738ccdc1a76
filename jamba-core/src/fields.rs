//! Typed access to the JSON of a model folder.

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::tensor::Dtype;

/// Typed access to the keys of a JSON object; unknown keys are never looked at.
pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// Named by errors.
    file: &'static str,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(value: &'a Value, file: &'static str) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self { map, file }),
            other => {
                let (value, allowed) = (kind(other).into(), "a JSON object is expected".into());
                Err(Error::Config { file, field: "the whole", value, allowed })
            }
        }
    }

    fn error(
        &self,
        field: &'static str,
        value: impl ToString,
        allowed: impl Into<String>,
    ) -> Error {
        let (value, allowed) = (value.to_string(), allowed.into());
        Error::Config { file: self.file, field, value, allowed }
    }

    /// The value of a key that is there and not null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    pub(crate) fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    fn parse<T>(
        &self,
        key: &'static str,
        allowed: &str,
        parse: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        parse(value).map(Some).ok_or_else(|| self.error(key, brief(value), allowed))
    }

    pub(crate) fn size(&self, key: &'static str) -> Result<Option<usize>> {
        let whole = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
        self.parse(key, "a whole number of at least 0 is expected", whole)
    }

    /// A size that may be absent, but not null.
    pub(crate) fn size_or(&self, key: &'static str, default: usize) -> Result<usize> {
        if self.is_null(key) {
            return Err(self.error(key, "null", "a whole number is expected"));
        }
        Ok(self.size(key)?.unwrap_or(default))
    }

    pub(crate) fn flag(&self, key: &'static str) -> Result<Option<bool>> {
        self.parse(key, "true or false is expected", Value::as_bool)
    }

    pub(crate) fn float(&self, key: &'static str) -> Result<Option<f32>> {
        self.parse(key, "a number is expected", |v| v.as_f64().map(|x| x as f32))
    }

    pub(crate) fn id(&self, key: &'static str) -> Result<Option<u32>> {
        self.parse(key, "a token id is expected", token_id)
    }

    pub(crate) fn ids(&self, key: &'static str) -> Result<Option<Vec<u32>>> {
        self.parse(key, "a token id or a list of them is expected", |v| match v {
            Value::Array(list) => list.iter().map(token_id).collect(),
            one => token_id(one).map(|id| vec![id]),
        })
    }

    pub(crate) fn dt_rank(&self, hidden_size: usize) -> Result<usize> {
        match self.get("mamba_dt_rank") {
            None => Ok(hidden_size.div_ceil(16)),
            Some(Value::String(s)) if s == "auto" => Ok(hidden_size.div_ceil(16)),
            Some(value) => value.as_u64().and_then(|n| usize::try_from(n).ok()).ok_or_else(|| {
                self.error("mamba_dt_rank", brief(value), "a whole number or \"auto\" is expected")
            }),
        }
    }

    pub(crate) fn dtype(&self) -> Result<Option<Dtype>> {
        let key = if self.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
        self.parse(key, "float32, float16 or bfloat16 is expected", |v| match v.as_str()? {
            "float32" | "float" => Some(Dtype::F32),
            "float16" | "half" => Some(Dtype::F16),
            "bfloat16" => Some(Dtype::Bf16),
            _ => None,
        })
    }

    /// Refuses what would load but compute something else than the model it came from.
    pub(crate) fn refuse_unsupported(&self) -> Result<()> {
        let text = |key| self.get(key).map(brief);
        if let Some(value) = self.get("model_type").filter(|v| v.as_str() != Some("jamba")) {
            return Err(self.error("model_type", brief(value), "only \"jamba\" is supported"));
        }
        if let Some(quantization) = self.get("quantization_config") {
            let method = quantization.get("quant_method").map_or("missing".into(), brief);
            let allowed =
                "pre-quantised checkpoints are not supported: use the F32, F16 or BF16 original";
            return Err(self.error("quantization_config.quant_method", method, allowed));
        }
        if let Some(value) =
            self.get("hidden_act").filter(|v| !matches!(v.as_str(), Some("silu" | "swish")))
        {
            return Err(self.error("hidden_act", brief(value), "only \"silu\" is supported"));
        }
        if let Some(value) = text("sliding_window") {
            return Err(self.error(
                "sliding_window",
                value,
                "only null (attention to all earlier tokens) is supported",
            ));
        }
        if self.flag("mamba_inner_layernorms")? == Some(false) {
            let allowed = "only true is supported (RMSNorm on dt, B and C)";
            return Err(self.error("mamba_inner_layernorms", "false", allowed));
        }
        Ok(())
    }
}

fn token_id(value: &Value) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok()
}

/// A value as it appears in an error: whole if short.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
