//! What is said.

use std::borrow::Cow;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// A message of a conversation: a JSON object with a `role`, and what the template reads of
/// `content`, `tool_calls`, `tool_call_id`, `name`, `reasoning_content` and others.
#[derive(Clone, Debug, PartialEq)]
pub struct Message(Map<String, Value>);

impl Message {
    /// A message with a text.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        let mut fields = Map::new();
        fields.insert("role".into(), role.into());
        fields.insert("content".into(), content.into().into());
        Self(fields)
    }

    /// What the model is to be.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// What a person says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// What the model said.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// What a tool returned.
    pub fn tool(content: impl Into<String>) -> Self {
        Self::new("tool", content)
    }

    /// A message as OpenAI's API has it.
    ///
    /// # Errors
    /// [`Error::Message`] for anything but an object with a string `role`.
    pub fn from_value(value: Value) -> Result<Self> {
        let is_message = value.get("role").is_some_and(Value::is_string);
        match value {
            Value::Object(fields) if is_message => Ok(Self(fields)),
            _ => Err(Error::Message {
                reason: "a message must be an object with a string `role`".into(),
            }),
        }
    }

    /// The message as JSON.
    pub fn into_value(self) -> Value {
        Value::Object(self.0)
    }

    /// The same with one more field, in the place of one of that name.
    pub fn with(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.0.insert(field.into(), value.into());
        self
    }

    /// Who speaks: `system`, `user`, `assistant`, `tool`, or what else the template knows.
    pub fn role(&self) -> &str {
        self.0.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// A field.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field)
    }

    /// The text of `content`: itself, or all its text parts together; empty without one.
    pub fn text(&self) -> Cow<'_, str> {
        match self.get("content") {
            Some(Value::String(text)) => text.into(),
            Some(Value::Array(parts)) => {
                let texts = parts.iter().filter_map(|part| part.get("text")?.as_str());
                texts.collect::<String>().into()
            }
            _ => "".into(),
        }
    }
}

/// Everything that a template is given.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chat {
    /// In the order in which they were said.
    pub messages: Vec<Message>,
    /// Functions that the model may call, as OpenAI's API describes them.
    pub tools: Vec<Value>,
    /// Texts that the model may rely on: objects with `title` and `text`.
    pub documents: Vec<Value>,
    /// Further variables of the template (`enable_thinking`), which hide those of the same name.
    pub variables: Map<String, Value>,
}

impl Chat {
    /// A conversation without tools and documents.
    pub fn new(messages: impl IntoIterator<Item = Message>) -> Self {
        Self { messages: messages.into_iter().collect(), ..Self::default() }
    }

    /// The conversation as JSON.
    pub fn to_value(&self) -> Value {
        let messages = self.messages.iter().map(|message| Value::Object(message.0.clone()));
        json!({
            "messages": messages.collect::<Vec<_>>(),
            "tools": self.tools,
            "documents": self.documents,
            "variables": self.variables,
        })
    }

    /// What [`to_value`](Self::to_value) returned.
    ///
    /// # Errors
    /// [`Error::Message`] for a field of another type.
    pub fn from_value(mut value: Value) -> Result<Self> {
        let mut list = |field: &str| match value.get_mut(field).map(Value::take) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(items)) => Ok(items),
            Some(_) => Err(Error::Message { reason: format!("`{field}` must be a list") }),
        };
        let messages = list("messages")?.into_iter().map(Message::from_value);
        let messages = messages.collect::<Result<_>>()?;
        let (tools, documents) = (list("tools")?, list("documents")?);
        let variables = match value.get_mut("variables").map(Value::take) {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(variables)) => variables,
            Some(_) => {
                return Err(Error::Message { reason: "`variables` must be an object".into() });
            }
        };
        Ok(Self { messages, tools, documents, variables })
    }
}
