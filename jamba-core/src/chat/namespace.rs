//! Jinja's `namespace`: the one thing of a template that can be changed, and so hold itself.
//!
//! minijinja's own is a map, which everything that prints or compares goes into, without end where it
//! holds itself. This one is closed but for its attributes, as it is in Jinja2. What sets them in a
//! template is [translated](super::environment::translated) to a call of [`SET`]; minijinja itself
//! sets attributes of its own namespaces only.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use minijinja::value::{DynObject, Kwargs, Object, ObjectRepr, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};

/// The method that sets an attribute.
pub(super) const SET: &str = "__setattr__";

#[derive(Default)]
struct Namespace(Mutex<BTreeMap<String, Value>>);

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<Namespace>")
    }
}

impl Object for Namespace {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        lock(&self.0).get(key.as_str()?).cloned()
    }

    /// It is itself only.
    fn custom_cmp(self: &Arc<Self>, other: &DynObject) -> Option<Ordering> {
        let other: *const Self = other.downcast_ref()?;
        Some(Arc::as_ptr(self).cmp(&other))
    }

    fn call_method(
        self: &Arc<Self>,
        _: &mut State<'_, '_>,
        method: &str,
        args: &[Value],
    ) -> Result<Value, Error> {
        if method != SET {
            return Err(ErrorKind::UnknownMethod.into());
        }
        let (name, value): (String, Value) = from_args(args)?;
        lock(&self.0).insert(name, value);
        Ok(().into())
    }
}

/// The namespaces of a render. Those that hold themselves are freed by nobody else.
#[derive(Clone, Default)]
pub(super) struct Namespaces(Arc<Mutex<Vec<Arc<Namespace>>>>);

impl Namespaces {
    /// Adds the function that makes them.
    pub(super) fn add_to(&self, env: &mut Environment<'_>) {
        let this = self.clone();
        env.add_function("namespace", move |given: Option<Value>, named: Kwargs| {
            let mut values = BTreeMap::new();
            if let Some(given) = given {
                for key in given.try_iter()? {
                    values.insert(key.to_string(), given.get_item(&key)?);
                }
            }
            for name in named.args() {
                values.insert(name.to_owned(), named.get(name)?);
            }
            let namespace = Arc::new(Namespace(values.into()));
            lock(&this.0).push(namespace.clone());
            Ok::<_, Error>(Value::from_dyn_object(namespace))
        });
    }

    /// Empties all of them.
    pub(super) fn clear(&self) {
        for namespace in lock(&self.0).drain(..) {
            let values = std::mem::take(&mut *lock(&namespace.0));
            drop(values);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
