//! Promises that any thread can settle.

use std::sync::Arc;

use napi::bindgen_prelude::{Object, Result, ToNapiValue};
use napi::{Env, JsDeferred};

use crate::mailbox::Mailbox;
use crate::{invalid, refusal};

/// What turns an answer into JavaScript's value, on JavaScript's thread.
type Resolver<T> = Box<dyn FnOnce(Env) -> Result<T>>;

/// What settles a promise: with a conversion of the answer, or with the engine's refusal.
pub(crate) type Settle<F> = Box<dyn FnOnce(std::result::Result<F, skep_machine::Error>) + Send>;

/// A promise and what settles it. What the engine has told until then is delivered first.
pub(crate) fn promise<T, F>(env: &Env, mailbox: Arc<Mailbox>) -> Result<(Settle<F>, Object<'_>)>
where
    T: ToNapiValue + 'static,
    F: FnOnce(&Env) -> Result<T> + Send + 'static,
{
    let (deferred, object): (JsDeferred<T, Resolver<T>>, _) = env.create_deferred()?;
    let settle: Settle<F> = Box::new(move |answer| {
        deferred.resolve(Box::new(move |env| {
            mailbox.deliver(&env);
            match answer {
                Ok(convert) => convert(&env),
                Err(error) => Err(refusal(&error)),
            }
        }));
    });
    Ok((settle, object))
}

/// Runs `body` on a thread of its own, for what would hold JavaScript's up.
pub(crate) fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    let started = std::thread::Builder::new().name(name.to_owned()).spawn(body);
    started.map(drop).map_err(|error| invalid("ERR_THREAD", format!("cannot start thread {name}: {error}")))
}
