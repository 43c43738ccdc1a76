//! What went wrong, as OpenAI's API tells it.

use axum::extract::rejection::JsonRejection;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use jamba_core::Error;
use serde_json::{Value, json};

/// A status, and OpenAI's error object.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<&'static str>,
    message: String,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, code: None, param: None, message: message.into() }
    }

    fn with_code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// The request asks for what makes no sense, or for what there is not.
    pub(crate) fn invalid(param: &'static str, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message);
        Self { param: Some(param), ..error }
    }

    /// The same of a request to `/v1/completions`, whose fields have other names.
    pub(crate) fn of_completion(self) -> Self {
        let param = self.param.map(|param| match param {
            "messages" => "prompt",
            "top_logprobs" => "logprobs",
            other => other,
        });
        Self { param, ..self }
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
    }

    pub(crate) fn no_model(name: &str) -> Self {
        let error = Self::not_found(format!("the model `{name}` does not exist"));
        Self { param: Some("model"), ..error.with_code("model_not_found") }
    }

    pub(crate) fn method_not_allowed() -> Self {
        let message = "this path has another method";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    pub(crate) fn unauthorized() -> Self {
        let message = "a valid API key is needed: Authorization: Bearer KEY";
        let error = Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", message);
        error.with_code("invalid_api_key")
    }

    pub(crate) fn forbidden(message: &str) -> Self {
        Self::new(StatusCode::FORBIDDEN, "invalid_request_error", message)
    }

    /// The server ends.
    pub(crate) fn ending() -> Self {
        let message = "the server was shut down before the reply was complete";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message)
    }

    /// The error object.
    pub(crate) fn body(&self) -> Value {
        let Self { kind, code, param, message, .. } = self;
        json!({ "error": { "message": message, "type": kind, "param": param, "code": code } })
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::QueueFull { .. } => {
                let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
                error.with_code("queue_full")
            }
            Error::Context { .. } | Error::Budget { .. } => {
                Self::invalid("messages", message).with_code("context_length_exceeded")
            }
            Error::EngineStopped => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message)
            }
            Error::Grammar { .. } => Self::invalid("response_format", message),
            Error::Option { option, .. } => Self::invalid(option, message),
            Error::Message { .. } | Error::Template { .. } | Error::EmptyPrompt => {
                Self::invalid("messages", message)
            }
            Error::Token { .. } => Self::invalid("prompt", message),
            _ => Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message),
        }
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        let message = rejection.body_text();
        let status = match rejection.status() {
            // OpenAI's status for a field of another type.
            StatusCode::UNPROCESSABLE_ENTITY => StatusCode::BAD_REQUEST,
            status => status,
        };
        Self::new(status, "invalid_request_error", message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        let mut set = |name: HeaderName, value| {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        };
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => set(header::RETRY_AFTER, "1"),
            StatusCode::UNAUTHORIZED => set(header::WWW_AUTHENTICATE, "Bearer"),
            _ => {}
        }
        response
    }
}
