//! What Jinja's `map`, `select` and the like return: Python's generators.
//!
//! minijinja returns lists, which have what generators have not: a length, a form in JSON, a second
//! reading, and being false where they are empty.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use minijinja::value::{Enumerator, Kwargs, Object, ObjectRepr, Rest};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters};

use super::environment::arguments;

/// Items that are read once.
pub(super) struct Generator(Mutex<Vec<Value>>);

impl fmt::Debug for Generator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<generator object>")
    }
}

impl Object for Generator {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let mut items = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Enumerator::Values(std::mem::take(&mut *items))
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        None
    }
}

/// `value`, if Python can iterate over it: minijinja takes `None` for an empty list.
pub(super) fn each(value: Value) -> Result<Value, Error> {
    if value.is_none() {
        let reason = "'NoneType' object is not iterable";
        return Err(Error::new(ErrorKind::InvalidOperation, reason));
    }
    Ok(value)
}

/// Adds the filters that return generators.
pub(super) fn add_to(env: &mut Environment<'_>) {
    let lists = [
        ("map", Value::from_function(filters::map)),
        ("select", Value::from_function(filters::select)),
        ("reject", Value::from_function(filters::reject)),
        ("selectattr", Value::from_function(filters::selectattr)),
        ("rejectattr", Value::from_function(filters::rejectattr)),
        ("unique", Value::from_function(filters::unique)),
    ];
    for (name, list) in lists {
        let filter = move |state: &mut State, value: Value, given: Rest<Value>, named: Kwargs| {
            let items = list.call(state, &arguments(value, given, named))?.try_iter()?.collect();
            Ok::<_, Error>(Value::from_object(Generator(Mutex::new(items))))
        };
        env.add_filter(name, filter);
    }
}
