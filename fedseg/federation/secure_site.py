"""A site's steps of secure aggregation as answers to messages, with the state between them.

The secrets of a round are one JSON in `context.state`, which stays at the node. What is masked with
them is in `masked`. Flower starts a process for each of these messages: nothing here imports torch,
which would take most of their time.
"""

from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message

from fedseg.config import StudyConfig
from fedseg.data.node import open_site
from fedseg.data.sites import Site
from fedseg.errors import ProtocolError, Reason, SiteError
from fedseg.messages import Task, answer_message, protocol_data
from fedseg.privacy import secagg
from fedseg.privacy.graph import LEAST_SITES
from fedseg.privacy.identity import read_identity
from fedseg.privacy.roster import Terms
from fedseg.privacy.secagg_state import State
from fedseg.privacy.secagg_wire import Begin, Purpose, unpack
from fedseg.privacy.sent_once import check_unsent, note_step

__all__ = ["SECURE_STEPS", "received", "save_state", "task_terms", "terms_of"]

Step = tuple[State, bytes]
"""State after a step, and its answer."""

_STATE = "secagg"


def terms_of(study: StudyConfig, run: str, number: int, purpose: Purpose) -> Terms:
    """Terms of a round; each side takes them from its own study config."""
    privacy = study.privacy
    return Terms(
        run=run,
        round=number,
        purpose=purpose,
        share=privacy.secagg_threshold,
        clip=privacy.secagg_clip,
        max_weight=1.0 if study.federation.weighting == "equal" else privacy.secagg_max_weight,
    )


def task_terms(message: Message, study: StudyConfig, purpose: Purpose) -> Terms:
    """Terms of the round that a message is about.

    Raises:
        SiteError: It is about another study, or about one without the protocol.
    """
    task = Task.from_message(message)
    if task.config_digest != study.digest() or not study.privacy.secure_aggregation:
        raise SiteError(Reason.CONFIG_MISMATCH)
    return terms_of(study, task.study_run, task.round_number, purpose)


def _load(context: Context) -> State | None:
    """State of this Flower run; what a site sent in an earlier one is on disk."""
    record = context.state.config_records.get(_STATE, ConfigRecord())
    if record.get("flower-run") != str(context.run_id):
        return None
    return State.from_json(str(record.get("state")))


def _loaded(context: Context) -> State:
    state = _load(context)
    if state is None:
        raise ProtocolError("got a message out of turn; expected one for a round's keys first")
    return state


def save_state(context: Context, state: State) -> None:
    """Keep the state until the next message."""
    context.state[_STATE] = ConfigRecord(
        {"flower-run": str(context.run_id), "state": state.to_json()}
    )


def _answer(message: Message, context: Context, state: State, data: bytes) -> Message:
    """Keep the state that a step ends with, and answer."""
    save_state(context, state)
    return answer_message(message, status="ok", protocol=data)


def _keys(message: Message, context: Context, study: StudyConfig) -> Message:
    site = open_site(context.node_config, study, make_phantoms=False)
    signer, _ = read_identity(site.config)
    task = Task.from_message(message)
    stamp = {"run": task.study_run, "round": task.round_number}
    terms = task_terms(message, study, unpack(Begin, protocol_data(message), stamp).purpose)
    check_unsent(site.config.cache, site.name, terms)
    state, data = secagg.start(terms, name=site.name, signer=signer, before=_load(context))
    return _answer(message, context, state, data)


def _answer_once(
    message: Message, context: Context, site: Site, terms: Terms, before: State, found: Step
) -> Message:
    """Answer a step, unless another process has answered it from the same state."""
    after, data = found
    key = before.adverts[max(before.index, 0)].mask
    note_step(site.config.cache, site.name, terms, after.stage, key)
    return _answer(message, context, after, data)


def _shares(message: Message, context: Context, study: StudyConfig) -> Message:
    site = open_site(context.node_config, study, make_phantoms=False)
    _, pinned = read_identity(site.config)
    state = _loaded(context)
    terms = task_terms(message, study, state.purpose)
    found = secagg.share(
        state,
        protocol_data(message),
        terms,
        pinned=pinned,
        least=max(LEAST_SITES, study.federation.min_sites),
    )
    if len(found[0].adverts) <= site.config.policy.min_peers:  # here they can be counted
        raise SiteError(Reason.POLICY_MIN_PEERS)
    return _answer_once(message, context, site, terms, state, found)


def _confirm(message: Message, context: Context, study: StudyConfig) -> Message:
    site = open_site(context.node_config, study, make_phantoms=False)
    signer, _ = read_identity(site.config)
    state = _loaded(context)
    terms = task_terms(message, study, state.purpose)
    found = secagg.confirm(state, protocol_data(message), terms, signer=signer)
    return _answer_once(message, context, site, terms, state, found)


def _unmask(message: Message, context: Context, study: StudyConfig) -> Message:
    site = open_site(context.node_config, study, make_phantoms=False)
    _, pinned = read_identity(site.config)
    state = _loaded(context)
    terms = task_terms(message, study, state.purpose)
    found = secagg.reveal(state, protocol_data(message), terms, pinned=pinned)
    return _answer_once(message, context, site, terms, state, found)


def _forget(message: Message, context: Context, study: StudyConfig) -> Message:
    """Forget the secrets of a round that is over: failed, or without this site's shares."""
    task, state = Task.from_message(message), _load(context)
    if state is not None and (state.run, state.round) == (task.study_run, task.round_number):
        save_state(context, secagg.forgotten(state))
    return answer_message(message, status="ok")


SECURE_STEPS: dict[str, Callable[[Message, Context, StudyConfig], Message]] = {
    "secagg_keys": _keys,
    "secagg_shares": _shares,
    "secagg_confirm": _confirm,
    "secagg_unmask": _unmask,
    "secagg_forget": _forget,
}
"""Action of the query to the step that answers it; masked words answer `train` and `evaluate`."""


def received(
    message: Message, context: Context, study: StudyConfig, purpose: Purpose
) -> State | None:
    """Take the neighbours' shares that come with the message; None without the protocol.

    Raises:
        ProtocolError: They are no good: nothing is computed in vain.
    """
    if not study.privacy.secure_aggregation:
        return None
    terms = task_terms(message, study, purpose)
    return secagg.receive(_loaded(context), protocol_data(message), terms)
